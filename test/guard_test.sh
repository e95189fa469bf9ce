#!/bin/sh
# test/guard_test.sh [FOLDER]: tests of train, eval, tokenize and dpo in FOLDER (default: the project's folder) that only run programs
# and read their files, so that they hold for any implementation: the golden runs of test/fixtures/golden (see golden.sh), the data
# of an epoch, schedules, checkpoints, and kills at every call that changes a name on disk (see calls.c).
# Variables: CC for calls.c, MPIRUN for two processes (none: skipped). Prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why`.

root=$(cd "$(dirname "$0")/.." && pwd)
programs=$(cd "${1:-$root}" && pwd) || exit 1
train=$programs/train eval=$programs/eval tokenize=$programs/tokenize dpo=$programs/dpo
folder=${TEST_FOLDER:-$(mktemp -d)} || exit 1
trap 'cd / && rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
cd "$folder" && cp -r "$root/test/fixtures/golden" golden || exit 1
folder=$(pwd -P)
cd "$folder/golden" && sed -i.old "s|/golden/|$folder/golden/|g" run/*/trainer.json dpo/*/trainer.json && rm run/*/*.old dpo/*/*.old || exit 1
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
export ASAN_OPTIONS="$ASAN_OPTIONS:verify_asan_link_order=0:detect_leaks=0"
passed=0 failed=0
ok() {
    echo "ok $1"
    passed=$((passed + 1))
}
fail() {
    echo "FAIL $1: $2"
    failed=$((failed + 1))
}
# check NAME COMMAND...: ok if the command succeeds
check() {
    check_name=$1
    shift
    if "$@" >check.out 2>&1; then ok "$check_name"; else fail "$check_name" "$(tail -n 2 check.out | tr '\n' ' ')"; fi
}
# refuses NAME PATTERN COMMAND...: the command ends with status 1 and an error message that has the pattern
refuses() {
    refuse_name=$1 refuse_pattern=$2
    shift 2
    "$@" >refuse.out 2>refuse.err
    refuse_status=$?
    if [ $refuse_status -eq 1 ] && grep -q "error: .*$refuse_pattern" refuse.err; then ok "$refuse_name"; else
        fail "$refuse_name" "status $refuse_status: $(head -n 1 refuse.err)"
    fi
}
# losses RUN MEMBER NAME: a line `NAME STEP VALUE` for each line of RUN's log that has the member
losses() { sed -n "s/^{\"step\": \([0-9]*\),.*\"$2\": \([^,}]*\).*/$3 \1 \2/p" "$1/log.jsonl"; }
# value MEMBER FILE: the last value of a JSON member
value() { sed -n "s/.*\"$1\": \([^,}]*\).*/\1/p" "$2" | tail -n 1; }
# near TOLERANCE FILE FILE: lines of the same words, the last of which is a number that differs by no more
near() {
    awk -v tolerance="$1" '{ key = $0; sub(/ [^ ]*$/, "", key) } FNR == NR { first[key] = $NF; n++; next } { m++; d = first[key] - $NF }
        !(key in first) || !(d <= tolerance && d >= -tolerance) { print key ": " first[key] ", " $NF; bad = 1 }
        END { if (n != m || !n) print n " and " m " lines"; exit bad || n != m || !n }' "$2" "$3"
}
# header FILE: each tensor of a .safetensors file as `NAME FIRST COUNT`, in floats; header_end: where its floats begin
header_end() { echo $((8 + $(od -An -tu8 -N 8 "$1"))); }
header() {
    head -c "$(header_end "$1")" "$1" | tail -c +9 | tr -s '{}[]":, \n' ' ' |
        awk '{ for (i = 2; i <= NF; i++) if ($i == "dtype") name = $(i - 1); else if ($i == "data_offsets") print name, $(i + 1) / 4, ($(i + 2) - $(i + 1)) / 4 }'
}
# floats FILE: each float as `NAME INDEX VALUE`
floats() {
    { header "$1" && echo end && od -An -v -tf4 -j "$(header_end "$1")" "$1" | tr -s ' ' '\n' | grep .; } |
        awk 'data { if (k in begins) { name = begins[k]; first = k } print name, k - first, $1; k++ } $1 == "end" { data = 1; k = 0; next } !data { begins[$2] = $1 }'
}
# patch FILE TENSOR INDEX BYTES: overwrites floats from that one on; BYTES for printf
patch() { printf "$4" | dd of="$1" bs=1 conv=notrunc seek=$(($(header_end "$1") + 4 * ($(header "$1" | sed -n "s/^$2 \([0-9]*\) .*/\1/p") + $3))) 2>/dev/null; }
same_state() { cmp "$1/latest/model.safetensors" "$2/latest/model.safetensors" && cmp "$1/latest/optimizer.safetensors" "$2/latest/optimizer.safetensors"; }
set_up='--context 64 --batch 8 --threads 1 --device cpu'

# ---- golden runs: checkpoints, data and losses of an earlier program, and of PyTorch ----

mv init kept # what is resumed needs no model but its own
check 'golden: train resumes' "$train" --resume --out run
{ losses run loss train && losses run val_loss val; } >run.txt
sed '/^dpo\|^ppl/d' losses.txt >expected.txt
check 'golden: the recorded losses' near 1e-5 expected.txt run.txt
sed '/^ppl/d' torch.txt >expected.txt
check "golden: PyTorch's losses" near 2e-5 expected.txt run.txt
# of each moment |a - b| <= 1e-4 |b|; measured: 1e-5
floats run/step_000020/optimizer.safetensors | sed 's/\.m / exp_avg /; s/\.v / exp_avg_sq /' >ours.txt
floats torch.safetensors | sed 's/\.exp_avg / exp_avg /; s/\.exp_avg_sq / exp_avg_sq /' >theirs.txt
check "golden: PyTorch's moments" awk '{ key = $1 " " $2 } FNR == NR { a[key, $3] = $4; n++; next }
    { m++; e[key] += ($4 - a[key, $3]) ^ 2; b[key] += $4 ^ 2; if (!((key, $3) in a)) bad = key " is missing" }
    END { for (key in b) { if (b[key] == 0 || e[key] > 1e-8 * b[key]) bad = key " differs by " sqrt(e[key] / (b[key] + 1e-30)) " of its norm"
        if (e[key] > worst * b[key]) worst = e[key] / b[key] }
        print n, m, sqrt(worst), bad; exit bad != "" || n != m || n != 11168 }' ours.txt theirs.txt
check 'golden: dpo resumes' "$dpo" --resume --out dpo
losses dpo loss dpo >run.txt
grep ^dpo losses.txt >expected.txt
check 'golden: the recorded losses of dpo' near 1e-5 expected.txt run.txt
mv kept init
check 'golden: eval reads the model' "$eval" run/step_000010 ppl val.jsonl --context 64 --json ppl.json
echo "ppl $(value nll ppl.json)" >run.txt
grep ^ppl losses.txt >expected.txt
check 'golden: the recorded loss' near 1e-5 expected.txt run.txt
check 'golden: units of audio' sh -c "'$tokenize' audio --kmeans km.npy -o new.jsonl && cmp speech.jsonl new.jsonl"
check 'golden: a token shard' sh -c "'$tokenize' speech.jsonl --kmeans km.npy -o new.bin && cmp speech.bin new.bin"
check 'golden: pairs' sh -c "'$tokenize' --pairs paths.jsonl --kmeans km.npy -o new_pairs.jsonl && cmp pairs.jsonl new_pairs.jsonl"
check 'golden: train reads the shard' "$train" speech.bin --context 64 --batch 2 --steps 1 --out shard

# ---- resume refuses other data of the same lengths ----

cp units.jsonl units.kept && cp pairs.jsonl pairs.kept
sed '1s/: \[[0-9]*/: [11/' units.kept >units.jsonl
refuses 'train: one unit is another' 'units.jsonl' "$train" --resume --out run --steps 30
sed '1s/"prompt": {"units": \[[0-9]*/"prompt": {"units": [11/' pairs.kept >pairs.jsonl
refuses 'dpo: one unit is another' 'pairs.jsonl' "$dpo" --resume --out dpo --steps 6
mv units.kept units.jsonl && mv pairs.kept pairs.jsonl
check 'and the same data again are accepted' sh -c "'$train' --resume --out run --steps 30 && '$dpo' --resume --out dpo --steps 6"

# ---- data: every chunk once an epoch ----

# 800,000 tokens in documents of 38 to 42, of which no two fit into a row
awk 'BEGIN { for (d = 0; d < 20000; d++) { n = 36 + (d * 7 + int(d / 5)) % 5; printf "{\"units\": ["
    for (i = 0; i < n; i++) printf "%s%d", i ? ", " : "", (i * 3 + d) % 8; print "], \"file_name\": \"" d "\"}" } }' >poor.jsonl
echo '{"model_type": "qwen2", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64, "tie_word_embeddings": true}' >small.json
poor="poor.jsonl --model small.json --context 64 --batch 500 --epochs 1 --eval-every 0 --save-every 0 --out poor"
check 'rows that cannot be filled: --dry-run counts all' sh -c "'$train' $poor --dry-run | grep -q '800k tokens, 20.0k documents.* 20.0k rows of 64'"
check 'rows that cannot be filled: train' "$train" $poor
check 'each comes once an epoch' sh -c "echo $(losses poor tokens '' | tail -n 1) | grep -qx '40 800000'"

# ---- schedule ----

check 'lr: train' "$train" units.jsonl --init init $set_up --steps 20 --warmup 13% --lr 1e-2 --min-lr 1e-3 --eval-every 0 --out lr
losses lr lr lr >run.txt
awk 'BEGIN { pi = atan2(0, -1); for (s = 0; s < 20; s++) printf "lr %d %.9g\n", s + 1, s < 3 ? 0.01 * s / 3 : 0.001 + 0.009 * (1 + cos(pi * (s - 3) / 17)) / 2 }' >expected.txt
check 'lr: 0 first, the peak after a warm-up of 2.6 steps rounded up, then the cosine' near 1e-9 expected.txt run.txt

# ---- validation ----

echo '{"units": [3, 3, 3, 3, 3, 9, 9, 9, 9, 9], "file_name": "x"}' >few.jsonl # 11 targets; val.jsonl has 118
check 'two sources of validation: train' "$train" units.jsonl --init init $set_up --val val.jsonl --val few.jsonl --steps 2 --eval-every 1 --out two
sed -n 's/.*"val_loss": \([^,]*\), "val_loss_by_source": {"val.jsonl": \([^,]*\), "few.jsonl": \([^}]*\)}.*/\1 \2 \3/p' two/log.jsonl >two.txt
check 'val_loss is the mean over their targets' awk '{ d = $1 - (118 * $2 + 11 * $3) / 129; far = $2 - $3; n++ }
    !(d < 1e-6 && d > -1e-6 && (far > 0.1 || far < -0.1)) { print; bad = 1 } END { exit bad || n != 2 }' two.txt
head -n 2 units.jsonl >learned.jsonl
learn="learned.jsonl --init init $set_up --val val.jsonl --eval-every 5 --save-every 5 --keep 0 --lr 0.02 --warmup 0 --schedule constant --batch 1"
check 'best: a run whose validation loss rises' "$train" $learn --steps 40 --out rises
lowest=$(losses rises val_loss val | sort -g -k 3 | awk 'NR == 1 { print $2 }')
"$train" $learn --steps "$lowest" --out stays >/dev/null 2>&1
check 'best: stopped at the lowest, resumed into worse' "$train" --resume --out stays --steps 40
check 'best: does not move' test "$lowest" -lt 40 -a "$(readlink stays/best)" = "$(printf 'step_%06d' "$lowest")" -a "$(readlink rises/best)" = "$(readlink stays/best)"

# ---- updates that are not finite ----

# One row of 16 has unit 49, for which the loss of this model is NaN: one batch of four is skipped.
awk 'BEGIN { for (d = 0; d < 16; d++) { printf "{\"units\": ["; for (i = 0; i < 40; i++) printf "%s%d", i ? ", " : "", d == 5 && i == 20 ? 49 : (i * 5 + d) % 48
    print "], \"file_name\": \"" d "\"}" } }' >nan.jsonl
nan="nan.jsonl --init not_finite --context 64 --batch 4 --threads 1 --lr 1e-3 --warmup 2 --schedule constant --eval-every 0 --save-every 5"
check 'not finite: train' "$train" $nan --steps 9 --out nan9
"$train" $nan --steps 5 --out nan5 >/dev/null 2>&1
check 'not finite: some updates were skipped before the checkpoint' grep -q '"skipped": [1-9]' nan5/log.jsonl
check 'not finite: the run resumes' "$train" --resume --out nan5 --steps 9
check 'not finite: as if never stopped' sh -c "[ \$(readlink nan5/latest) = step_000009 ] && cmp nan5/latest/model.safetensors nan9/latest/model.safetensors"

# ---- model files ----

sed 's/"tie_word_embeddings": true/"tie_word_embeddings": false/' init/config.json >untied.json
"$train" units.jsonl --model untied.json $set_up --steps 1 --out untied >/dev/null 2>&1

header run/latest/model.safetensors | awk '{ print $1 }' | sort >names.txt
{ echo model.embed_tokens.weight && echo model.norm.weight && for l in 0 1; do
    for name in input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj; do
        echo model.layers.$l.$name.weight
    done
    for name in q k v; do echo model.layers.$l.self_attn.${name}_proj.bias; done
done; } | sort >expected.txt
check 'a tied model has these tensors, once each' cmp expected.txt names.txt
check 'an untied one has lm_head as well' sh -c "echo lm_head.weight | sort - expected.txt >untied.txt; $(command -v cat) >names.txt && cmp untied.txt names.txt" <<END
$(header untied/latest/model.safetensors | awk '{ print $1 }' | sort)
END
"$train" --resume --out lr --steps 21 >/dev/null 2>&1
cp -r run million && rm -f million/latest million/best && mv million/step_000010 million/step_999999 && mv million/step_000030 million/step_1000000 &&
    rm -rf million/step_0*
check 'step_1000000 is newer than step_999999' sh -c "'$eval' million ppl val.jsonl --context 64 --json a.json && '$eval' run/step_000030 ppl val.jsonl --context 64 --json b.json &&
    ! cmp -s b.json ppl.json && cmp a.json b.json"

# ---- scores in a submission ----

# With its last norm scaled down the model gives all tokens nearly the same probability: scores of -log 52 that differ from the seventh digit on.
cp -r init flat
patch flat/model.safetensors model.norm.weight 0 "$(for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do printf '\\027\\267\\121\\070'; done)"
echo 'id,filename,voice,frequency,word,phones,length,correct' >gold.csv
awk 'function draw(n) { seed = (seed * 16807) % 2147483647; return int(seed / 65536) % n }
    BEGIN { seed = 7; for (f = 0; f < 24; f++) { print int(f / 2) ",f" f ",v," f ",w,p,5," f % 2 >>"gold.csv"
        printf "{\"units\": ["; for (i = 0; i < 40; i++) printf "%s%d", i ? ", " : "", draw(50); print "], \"file_name\": \"f" f "\"}" } }' >scored.jsonl
check 'submission: eval' "$eval" flat swuggy gold.csv --units scored.jsonl --json swuggy.json --submission swuggy.txt
check 'submission: scores that differ in the eighth digit are no tie' awk '{ all[$2]; short[sprintf("%.6g", $2)] }
    END { for (s in all) n++; for (s in short) m++; print n " scores, " m " of six digits"; exit NR != 24 || n < 20 || m > 8 }' swuggy.txt

# ---- two processes ----

# Micro-batches of one row: gradients are summed over processes once a step, not once a micro-batch.
many='--batch 24 --micro-batch 1 --threads 1 --context 64 --steps 3 --warmup 0 --eval-every 0'
on() {
    OMPI_MCA_mpi_yield_when_idle=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
        OMPI_MCA_btl=self,vader OMPI_MCA_odls_base_sigkill_timeout=0 "$MPIRUN" -np "$@"
}
same_numbers() {
    for run in "$1" "$2"; do { losses $run loss loss && losses $run grad_norm norm; } >$run.txt; done
    near 5e-6 "$1.txt" "$2.txt"
}
if [ "$MPIRUN" ] && on 2 true >/dev/null 2>&1; then
    for i in 1 2 3 4; do cat pairs.jsonl; done | awk '{ sub(/"prompt": {"units": \[/, "&" NR ", "); sub(/"duration": \[/, "&1, "); print }' >pairs24.jsonl
    "$train" units.jsonl --init init $many --out m1 >/dev/null 2>&1
    check 'train: two processes, micro-batches of one row' on 2 "$train" units.jsonl --init init $many --out m2
    check 'train: the numbers of one' same_numbers m1 m2
    "$dpo" pairs24.jsonl --init init $many --out p1 >/dev/null 2>&1
    check 'dpo: two processes, micro-batches of one row' on 2 "$dpo" pairs24.jsonl --init init $many --out p2
    check 'dpo: the numbers of one' same_numbers p1 p2
else
    echo 'skip two processes: no MPI'
fi

# ---- files: what is on the disk before what, and kills before every call that changes it ----

calls() { # calls LOG N COMMAND...: killed before its Nth call (0: never)
    calls_log=$1 calls_n=$2
    shift 2
    env CALLS_LOG="$calls_log" CALLS_KILL="$calls_n" CALLS_RUN="$folder/golden/files" LD_PRELOAD="$folder/golden/calls.so" "$@" >calls.out 2>&1
}
kept="units.jsonl --init init $set_up --val val.jsonl --steps 2 --warmup 0 --lr 1e-2 --save-every 1 --eval-every 1 --keep 1 --out files"
# checksums FILE...: without what is measured in seconds
checksums() { for file; do echo "$file $(sed 's/, "seconds".*//; /"seconds":/d' "$file" 2>&1 | cksum)"; done; }
train_files() { checksums files/log.jsonl files/latest/* files/best/* && ls -A files | grep -v ^step_ && readlink files/latest files/best; }
tokenize_files() { checksums out*; }
# killed NAME FILES CLEAN COMMAND...: repeated after a kill before each of its calls, the command ends with the FILES of kept.txt
killed() {
    killed_name=$1 killed_files=$2 killed_clean=$3 killed_n=0 killed_bad=
    shift 3
    while [ -z "$killed_bad" ]; do
        killed_n=$((killed_n + 1))
        rm -rf $killed_clean
        calls /dev/null $killed_n "$@" 2>/dev/null
        [ $? -eq 137 ] || break
        [ ! -L files/latest ] || [ -f files/latest/model.safetensors ] || killed_bad="before call $killed_n: latest leads to no model"
        "$@" >again.out 2>&1
        $killed_files >again.txt 2>&1
        cmp -s kept.txt again.txt || killed_bad="before call $killed_n; then $(tail -n 1 again.out); $(diff kept.txt again.txt | grep '^[<>]' | head -n 3 | tr '\n' ' ')"
    done
    if [ "$killed_bad" ] || [ $killed_n -lt 10 ]; then fail "$killed_name" "$killed_bad"; else ok "$killed_name ($((killed_n - 1)) calls)"; fi
}
if ${CC:-cc} -O1 -shared -fPIC "$root/test/calls.c" -o calls.so -ldl 2>/dev/null && calls "$folder/golden/train.calls" 0 "$train" $kept && grep -q '^fsync' train.calls; then
    order() { # the folder is synced after a link or a checkpoint is renamed into place, before an older one is removed
        ! grep '^unsynced\|^lost' "$1" && awk '$1 == "rename" && $3 ~ /(step_[0-9]+|latest|best)$/ { open = 1 } $1 == "fsync" && $2 ~ /files$/ { open = 0 }
            $1 == "rename" && $2 ~ /step_[0-9]+$/ { removed = 1; if (open) bad = $0 } END { if (bad || !removed) print "removed before a sync: " bad; exit bad || !removed }' "$1"
    }
    check 'train: files are synced before they get their name, links move before checkpoints go' order train.calls
    train_files >kept.txt
    killed 'train: killed before each call, resumed: as if never stopped' train_files files "$train" $kept --resume
    echo broken >audio/4.wav
    for out in 'out.jsonl --max-seconds 1' 'out.bin --shard-tokens 40'; do
        rm -rf out* tokenize.calls
        calls "$folder/golden/tokenize.calls" 0 "$tokenize" audio --kmeans km.npy --threads 1 -o $out
        check "tokenize ${out%% *}: data are synced before the journal" sh -c '! grep ^unsynced tokenize.calls && grep -q "^rename.*journal$" tokenize.calls'
        tokenize_files >kept.txt
        killed "tokenize ${out%% *}: killed before each call, repeated: the same files and no other" tokenize_files 'out.* out-*' \
            "$tokenize" audio --kmeans km.npy --threads 1 -o $out
    done
else
    echo 'skip files: no C compiler for calls.c, or LD_PRELOAD has no effect'
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
