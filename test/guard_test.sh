#!/bin/sh
# test/guard_test.sh [FOLDER]: tests that only run train, eval, tokenize and dpo of FOLDER (default: the project's
# folder) and read their files, so that they hold for any implementation: the golden runs (see golden.sh), the data of
# an epoch, schedules, validation, checkpoints, and kills before every call that changes a name on disk (see calls.c).
# Variables: CC compiles calls.c; MPIRUN starts two processes (none: skipped).
# Prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why` and last `N passed, N failed`.

root=$(cd "$(dirname "$0")/.." && pwd)
programs=$(cd "${1:-$root}" && pwd) || exit 1
train=$programs/train eval=$programs/eval tokenize=$programs/tokenize dpo=$programs/dpo
folder=$(cd "${TEST_FOLDER:-$(mktemp -d)}" && pwd -P) || exit 1
trap 'cd / && rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
golden=$folder/golden
cp -r "$root/test/fixtures/golden" "$golden" && cd "$golden" || exit 1
for file in run/*/trainer.json dpo/*/trainer.json; do
    sed "s|\"/golden|\"$golden|g" "$file" >moved && mv moved "$file" || exit 1
done
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
export ASAN_OPTIONS="$ASAN_OPTIONS:verify_asan_link_order=0:detect_leaks=0"
. "$root/test/lib.sh"
# must COMMAND...: a failure if the command does not succeed, which is no test of its own
must() { "$@" >must.out 2>&1 || fail "$(basename "$1") ... $(echo "$*" | tail -c 40)" "$(tail -n 1 must.out)"; }
# losses RUN MEMBER NAME: `NAME STEP VALUE` for each line of RUN's log that has the member
losses() { sed -n "s/^{\"step\": \([0-9]*\),.*\"$2\": \([^,}]*\).*/$3 \1 \2/p" "$1/log.jsonl"; }
# near TOLERANCE FILE FILE: the same lines in any order, but for the number at the end, which differs by no more
near() {
    awk -v tolerance="$1" '{ key = $0; sub(/ [^ ]*$/, "", key) }
        FNR == NR { first[key] = $NF; n++; next }
        { m++; d = first[key] - $NF }
        !(key in first) || !(d <= tolerance && d >= -tolerance) { print key ": " first[key] ", " $NF; bad = 1 }
        END { if (n != m || !n) { print n " and " m " lines"; bad = 1 } exit bad }' "$2" "$3"
}
header_end() { echo $((8 + $(od -An -tu8 -N 8 "$1"))); } # where a .safetensors file's numbers begin
# tensors FILE: `NAME FIRST COUNT` of each, in floats
tensors() {
    head -c "$(header_end "$1")" "$1" | tail -c +9 | tr -s '{}[]":, \n' ' ' |
        awk '{ for (i = 2; i <= NF; i++)
            if ($i == "dtype") name = $(i - 1)
            else if ($i == "data_offsets") print name, $(i + 1) / 4, ($(i + 2) - $(i + 1)) / 4 }'
}
# floats FILE: `NAME INDEX VALUE` of each
floats() {
    { tensors "$1" && echo end && od -An -v -tf4 -j "$(header_end "$1")" "$1" | tr -s ' ' '\n' | grep .; } |
        awk '$1 == "end" { numbers = 1; k = 0; next }
            !numbers { begins[$2] = $1; next }
            { if (k in begins) { name = begins[k]; first = k } print name, k - first, $1; k++ }'
}
one_batch='--context 64 --batch 8 --threads 1 --device cpu' # units.jsonl, in one step

# ---- golden runs: files and losses of an earlier program, losses and moments of PyTorch ----

mv init elsewhere # a run resumes without the model that it started from
must "$train" --resume --out run
must "$dpo" --resume --out dpo
mv elsewhere init
must "$eval" run/step_000010 ppl val.jsonl --context 64 --json ppl.json
{ losses run loss train && losses run val_loss val && sed 's/.*"nll": \([^,]*\),.*/ppl \1/' ppl.json; } >run.txt
grep -v ^dpo losses.txt >expected.txt
check 'golden: the recorded losses' near 1e-5 expected.txt run.txt
check "golden: PyTorch's losses" near 2e-5 torch.txt run.txt
grep ^dpo losses.txt >expected.txt
losses dpo loss dpo >run.txt
check 'golden: the recorded losses of dpo' near 1e-5 expected.txt run.txt
# |a - b| <= 1e-4 |b| for each tensor (measured: 6.4e-6)
floats run/step_000020/optimizer.safetensors | sed 's/\.m / exp_avg /; s/\.v / exp_avg_sq /' >ours.txt
floats torch.safetensors | sed 's/\.exp_avg / exp_avg /; s/\.exp_avg_sq / exp_avg_sq /' >theirs.txt
check "golden: PyTorch's moments" awk '{ key = $1 " " $2 }
    FNR == NR { a[key, $3] = $4; n++; next }
    { m++; e[key] += ($4 - a[key, $3]) ^ 2; b[key] += $4 ^ 2; if (!((key, $3) in a)) bad = key " is missing" }
    END { for (key in b) if (b[key] == 0 || e[key] > 1e-8 * b[key]) bad = key ": " e[key] " of " b[key]
        print n, m, bad; exit bad != "" || n != m || n != 11168 }' ours.txt theirs.txt
check 'golden: units of audio' sh -c "'$tokenize' audio --kmeans km.npy -o new.jsonl && cmp speech.jsonl new.jsonl"
check 'golden: a token shard' sh -c "'$tokenize' speech.jsonl --kmeans km.npy -o new.bin && cmp speech.bin new.bin"
check 'golden: pairs' sh -c "'$tokenize' --pairs paths.jsonl --kmeans km.npy -o two.jsonl && cmp pairs.jsonl two.jsonl"
check 'golden: train reads the shard' "$train" speech.bin --context 64 --batch 2 --steps 1 --out shard

# ---- resume refuses other data of the same lengths ----

for name in units pairs; do cp $name.jsonl $name.kept; done
must "$train" units.jsonl --init init $one_batch --steps 1 --out own
must "$dpo" pairs.jsonl --init init --context 64 --batch 3 --steps 1 --threads 1 --out own_dpo
sed '1s/: \[[0-9]*/: [11/' units.kept >units.jsonl
refuses 'train: one unit is another' 1 'units.jsonl' "$train" --resume --out own --steps 2
sed '1s/"prompt": {"units": \[[0-9]*/"prompt": {"units": [11/' pairs.kept >pairs.jsonl
refuses 'dpo: one unit is another' 1 'pairs.jsonl' "$dpo" --resume --out own_dpo --steps 2
for name in units pairs; do mv $name.kept $name.jsonl; done
check 'train: the first data again' "$train" --resume --out own --steps 2
check 'dpo: the first data again' "$dpo" --resume --out own_dpo --steps 2

# ---- data: every chunk once an epoch ----

# 800,000 tokens in documents of 38 to 42, of which no two fit into a row
awk 'BEGIN { for (d = 0; d < 20000; d++) { n = 36 + (d * 7 + int(d / 5)) % 5; printf "{\"units\": ["
    for (i = 0; i < n; i++) printf "%s%d", i ? ", " : "", (i * 3 + d) % 8
    print "], \"file_name\": \"" d "\"}" } }' >poor.jsonl
echo '{"model_type": "qwen2", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64,
    "tie_word_embeddings": true}' >small.json
poor="poor.jsonl --model small.json --context 64 --batch 500 --epochs 1 --eval-every 0 --save-every 0 --out poor"
must "$train" $poor --dry-run
check 'rows that stay a third empty: --dry-run counts all' \
    grep -q '800k tokens, 20.0k documents.* 20.0k rows of 64' must.out
must "$train" $poor
check 'each comes once an epoch' test "$(losses poor tokens tokens | tail -n 1)" = 'tokens 40 800000'

# With learning rate 0 a row is known by its loss. Documents of 42 tokens: one a row; of 32 tokens: two a row.
for n in 40 30; do
    awk -v n=$n 'function draw(n) { seed = (seed * 16807) % 2147483647; return int(seed / 65536) % n }
        BEGIN { seed = 5; for (d = 0; d < 16; d++) { printf "{\"units\": ["
        for (i = 0; i < n; i++) printf "%s%d", i ? ", " : "", draw(50)
        print "], \"file_name\": \"" d "\"}" } }' >same.jsonl
    must "$train" same.jsonl --init init $one_batch --batch 1 --lr 0 --epochs 2 --eval-every 0 --out rows$n
    rows=$((n == 40 ? 16 : 8))
    losses rows$n loss row | awk '{ printf "%.7f\n", $3 }' >rows.txt
    head -n $rows rows.txt >first$n.txt
    tail -n +$((rows + 1)) rows.txt >second$n.txt
    for file in first$n second$n; do sort $file.txt >$file.sorted; done
done
check 'a second epoch has the same chunks' sh -c \
    'cmp first40.sorted second40.sorted && [ $(uniq first40.sorted | wc -l) = 16 ]'
check 'in another order' sh -c '! cmp -s first40.txt second40.txt'
check 'and in other rows' sh -c '! cmp -s first30.sorted second30.sorted && [ $(wc -l <second30.sorted) = 8 ]'

# ---- learning rate ----

must "$train" units.jsonl --init init $one_batch --steps 20 --warmup 13% --lr 1e-2 --min-lr 1e-3 --eval-every 0 --out lr
losses lr lr lr >run.txt
awk 'BEGIN { pi = atan2(0, -1)
    for (s = 0; s < 20; s++)
        print "lr", s + 1, s < 3 ? 0.01 * s / 3 : 0.001 + 0.009 * (1 + cos(pi * (s - 3) / 17)) / 2 }' >expected.txt
check 'lr: 0, the peak after a warm-up of 2.6 steps rounded up, the cosine' near 1e-7 expected.txt run.txt

# ---- validation ----

echo '{"units": [3, 3, 3, 3, 3, 9, 9, 9, 9, 9], "file_name": "x"}' >few.jsonl # 11 targets; val.jsonl has 118
must "$train" units.jsonl --init init $one_batch --val val.jsonl --val few.jsonl --steps 2 --eval-every 1 --out two
sed -n 's/.*"val_loss": \([^,]*\),.* {"val.jsonl": \([^,]*\), "few.jsonl": \([^}]*\)}.*/\1 \2 \3/p' \
    two/log.jsonl >two.txt
check 'val_loss is the mean over the targets of all sources' awk '
    { d = $1 - (118 * $2 + 11 * $3) / 129; far = $2 - $3; n++ }
    !(d < 1e-6 && d > -1e-6 && (far > 0.1 || far < -0.1)) { print; bad = 1 } END { exit bad || n != 2 }' two.txt
head -n 2 units.jsonl >learned.jsonl
learn="learned.jsonl --init init $one_batch --batch 1 --val val.jsonl --eval-every 5 --save-every 5 --keep 0 --lr 0.02
    --warmup 0 --schedule constant"
must "$train" $learn --steps 40 --out rises
lowest=$(losses rises val_loss val | sort -g -k 3 | awk 'NR == 1 { print $2 }')
check 'a validation loss that rises' test "$lowest" -lt 40
must "$train" $learn --steps "$lowest" --out stays
must "$train" --resume --out stays --steps 40
check 'best does not move when a resumed run gets worse' \
    test "$(readlink stays/best)" = "$(printf 'step_%06d' "$lowest")"

# ---- updates that are not finite ----

# One row of 16 has unit 49, for which the loss of this model is NaN: one batch of four is skipped.
awk 'BEGIN { for (d = 0; d < 16; d++) { printf "{\"units\": ["
    for (i = 0; i < 40; i++) printf "%s%d", i ? ", " : "", d == 5 && i == 20 ? 49 : (i * 5 + d) % 48
    print "], \"file_name\": \"" d "\"}" } }' >nan.jsonl
nan="nan.jsonl --init not_finite --context 64 --batch 4 --threads 1 --lr 1e-3 --warmup 2 --schedule constant
    --eval-every 0"
must "$train" $nan --steps 9 --out nan9
must "$train" $nan --steps 5 --out nan5
check 'not finite: updates were skipped' grep -q '"skipped": [1-9]' nan5/log.jsonl
check 'not finite: the run resumes' "$train" --resume --out nan5 --steps 9
check 'not finite: as if never stopped' sh -c \
    '[ $(readlink nan5/latest) = step_000009 ] && cmp nan5/latest/model.safetensors nan9/latest/model.safetensors'

# ---- model files ----

for l in 0 1; do
    for name in input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj self_attn.q_proj \
        self_attn.k_proj self_attn.v_proj self_attn.o_proj; do echo model.layers.$l.$name.weight; done
    for name in q k v; do echo model.layers.$l.self_attn.${name}_proj.bias; done
done >layers.txt
{ echo model.embed_tokens.weight && echo model.norm.weight && cat layers.txt; } | sort >expected.txt
tensors run/latest/model.safetensors | awk '{ print $1 }' | sort >names.txt
check 'a tied model has these tensors, once each' cmp expected.txt names.txt
{ echo lm_head.weight && cat expected.txt; } | sed '/layers.1/d' | sort >untied.txt
tensors nan9/latest/model.safetensors | awk '{ print $1 }' | sort >names.txt
check 'an untied one has lm_head as well' cmp untied.txt names.txt
mkdir million && cp -r run/step_000010 million/step_999999 && cp -r run/step_000020 million/step_1000000
must "$eval" million ppl val.jsonl --context 64 --json newest.json
must "$eval" run/step_000020 ppl val.jsonl --context 64 --json last.json
check 'step_1000000 is newer than step_999999' sh -c '! cmp -s last.json ppl.json && cmp last.json newest.json'

# ---- scores in a submission ----

# With a last norm of 5e-5 all tokens are nearly as probable: scores near -log 52 that differ from the seventh digit on
cp -r init flat
first=$(tensors flat/model.safetensors | sed -n 's/^model.norm.weight \([0-9]*\) .*/\1/p')
at=$(($(header_end flat/model.safetensors) / 4 + first)) # the header's length is a multiple of 8
for i in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do printf '\027\267\121\070'; done |
    dd of=flat/model.safetensors bs=4 conv=notrunc seek=$at 2>/dev/null
echo 'id,filename,voice,frequency,word,phones,length,correct' >gold.csv
awk 'function draw(n) { seed = (seed * 16807) % 2147483647; return int(seed / 65536) % n }
    BEGIN { seed = 7; for (f = 0; f < 24; f++) { print int(f / 2) ",f" f ",v," f ",w,p,5," f % 2 >>"gold.csv"
        printf "{\"units\": ["; for (i = 0; i < 40; i++) printf "%s%d", i ? ", " : "", draw(50)
        print "], \"file_name\": \"f" f "\"}" } }' >scored.jsonl
must "$eval" flat swuggy gold.csv --units scored.jsonl --submission scores.txt
check 'scores that differ in the eighth digit are no tie' awk '{ all[$2]; short[sprintf("%.6g", $2)] }
    END { for (s in all) n++; for (s in short) m++
        print n " scores, " m " of six digits"; exit NR != 24 || n < 20 || m > 8 }' scores.txt

# ---- two processes ----

# Micro-batches of one row: gradients are summed over processes once a step, not once a micro-batch.
many='--batch 24 --micro-batch 1 --threads 1 --context 64 --steps 3 --warmup 0 --eval-every 0'
on() {
    OMPI_MCA_mpi_yield_when_idle=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
        OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_btl=self,vader OMPI_MCA_odls_base_sigkill_timeout=0 \
        "$MPIRUN" -np "$@"
}
numbers() { losses "$1" loss loss && losses "$1" grad_norm norm; }
if [ "$MPIRUN" ] && on 2 true >/dev/null 2>&1; then
    for i in 1 2 3 4 5 6 7 8; do cat pairs.jsonl; done |
        awk '{ sub(/"prompt": {"units": \[/, "&" NR ", "); sub(/"duration": \[/, "&1, "); print }' >pairs24.jsonl
    for program in train dpo; do
        data=units.jsonl
        [ $program = train ] || data=pairs24.jsonl
        must "$programs/$program" $data --init init $many --out $program.1
        must on 2 "$programs/$program" $data --init init $many --out $program.2
        numbers $program.1 >expected.txt
        numbers $program.2 >run.txt
        check "$program: two processes have the numbers of one" near 5e-6 expected.txt run.txt
    done
else
    echo 'skip two processes: no MPI'
fi

# ---- files: the order in which they become durable, and kills before every call that changes a name ----

# calls LOG N COMMAND...: killed before its Nth call (0: never)
calls() {
    calls_log=$1 calls_n=$2
    shift 2
    env CALLS_LOG="$calls_log" CALLS_KILL="$calls_n" CALLS_RUN="$golden/files" LD_PRELOAD="$golden/calls.so" \
        "$@" >calls.out 2>&1
}
# A run folder is synced after a checkpoint or a link got its name and before an older checkpoint loses its own.
in_order() {
    ! grep '^unsynced\|^lost' "$1" && awk '$1 == "fsync" && $2 ~ /files$/ { open = 0 }
        $1 == "rename" && $3 ~ /(step_[0-9]+|latest|best)$/ { open = 1 }
        $1 == "rename" && $2 ~ /step_[0-9]+$/ { removed = 1; if (open) bad = $0 }
        END { print "removed before a sync: " bad; exit bad != "" || !removed }' "$1"
}
# checksums FILE...: without what a clock measures
checksums() { for file; do echo "$file $(sed 's/, "seconds".*//; /"seconds":/d; /"log_bytes":/d' "$file" 2>&1 | cksum)"; done; }
train_files() {
    checksums files/log.jsonl files/latest/* files/best/*
    ls -A files | grep -v ^step_
    readlink files/latest files/best
}
tokenize_files() { checksums out*; }
# killed NAME FILES CLEAN COMMAND...: killed before each of its calls and repeated, it ends with FILES as in kept.txt
killed() {
    killed_name=$1 killed_files=$2 killed_clean=$3 killed_n=0 killed_bad=
    shift 3
    while [ -z "$killed_bad" ]; do
        killed_n=$((killed_n + 1))
        rm -rf $killed_clean
        calls /dev/null $killed_n "$@" 2>/dev/null
        [ $? -eq 137 ] || break
        [ ! -L files/latest ] || [ -f files/latest/model.safetensors ] || killed_bad="call $killed_n: latest is broken"
        "$@" >again.out 2>&1
        $killed_files >again.txt 2>&1
        diff kept.txt again.txt >again.diff ||
            killed_bad="call $killed_n: $(tail -n 1 again.out); $(grep '^[<>]' again.diff | head -n 2 | tr '\n' ' ')"
    done
    if [ -z "$killed_bad" ] && [ $killed_n -gt 10 ]; then ok "$killed_name"; else fail "$killed_name" "$killed_bad"; fi
}
saves="units.jsonl --init init $one_batch --val val.jsonl --steps 2 --warmup 0 --lr 1e-2 --save-every 1 --eval-every 1
    --keep 1 --out files"
if ${CC:-cc} -O1 -shared -fPIC "$root/test/calls.c" -o calls.so -ldl 2>/dev/null &&
    calls "$golden/train.log" 0 "$train" $saves && grep -q '^fsync' train.log; then
    check 'train: files are synced before they get their names, links move before checkpoints go' in_order train.log
    train_files >kept.txt
    killed 'train: killed before each call, resumed, as if never stopped' train_files files "$train" $saves --resume
    echo broken >audio/4.wav
    for out in 'out.jsonl --max-seconds 1' 'out.bin --max-seconds 1 --shard-tokens 26'; do
        name="tokenize ${out%% *}" arguments="audio --kmeans km.npy --threads 1 -o $out"
        rm -rf out* tokenize.log
        calls "$golden/tokenize.log" 0 "$tokenize" $arguments
        check "$name: data are synced before the journal that counts them" sh -c \
            '! grep ^unsynced tokenize.log && grep -q "^rename.*journal$" tokenize.log'
        tokenize_files >kept.txt
        killed "$name: killed before each call, repeated, the same files and no other" tokenize_files 'out.* out-*' \
            "$tokenize" $arguments
    done
else
    echo 'skip files: calls.c cannot be compiled or preloaded'
fi

end
