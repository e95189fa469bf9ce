#!/bin/sh
# test/programs.sh [FOLDER]: train, eval, tokenize and dpo from end to end, as FOLDER holds them (default: the project's own folder). Prints `ok NAME`,
# `FAIL NAME: why` or `skip NAME: why` and last `N passed, N failed`. A model of 22,000 parameters keeps every run under a second or two.

root=$(cd "$(dirname "$0")/.." && pwd)
programs=$(cd "${1:-$root}" && pwd) || exit 1
train=$programs/train eval=$programs/eval tokenize=$programs/tokenize dpo=$programs/dpo
folder=${TEST_FOLDER:-$(mktemp -d)} || exit 1
mounted=
cleanup() {
    cd /
    for mount in $mounted; do umount "$mount"; done
    rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM
cd "$folder" || exit 1
export CUDA_VISIBLE_DEVICES= # no GPU: numbers are compared with those of the CPU
passed=0 failed=0

ok() {
    echo "ok $1"
    passed=$((passed + 1))
}
fail() {
    echo "FAIL $1: $2"
    failed=$((failed + 1))
}
# check NAME WHY COMMAND...: ok where the command succeeds
check() {
    check_name=$1 check_why=$2
    shift 2
    if "$@" >check.out 2>&1; then ok "$check_name"; else fail "$check_name" "$check_why; $(tail -n 1 check.out)"; fi
}
# refuses NAME STATUS PATTERN COMMAND...: the command ends with this status and one sentence on stderr that has the pattern
refuses() {
    refuse_name=$1 refuse_status=$2 refuse_pattern=$3
    shift 3
    "$@" >refuse.out 2>refuse.err </dev/null
    refuse_got=$?
    if [ $refuse_got -ne "$refuse_status" ]; then
        fail "$refuse_name" "status $refuse_got, expected $refuse_status: $(head -n 1 refuse.err)"
    elif ! head -n 1 refuse.err | grep -q "error: .*$refuse_pattern"; then
        fail "$refuse_name" "expected '$refuse_pattern', got: $(head -n 1 refuse.err)"
    else
        ok "$refuse_name"
    fi
}
# timeless LOG: a log without what a clock has to do with
timeless() { sed 's/, "seconds".*//' "$1"; }
same_logs() {
    timeless "$1/log.jsonl" >same.1
    timeless "$2/log.jsonl" >same.2
    cmp same.1 same.2
}
same_weights() { cmp "$1/latest/model.safetensors" "$2/latest/model.safetensors" && cmp "$1/latest/optimizer.safetensors" "$2/latest/optimizer.safetensors"; }
same_runs() { same_logs "$1" "$2" && same_weights "$1" "$2"; }
# each_step RUN N: the log has steps 1 to N, each once and in order
each_step() { grep '"loss"' "$1/log.jsonl" | awk -v n="$2" '{ gsub(",", ""); if ($2 != NR) bad = 1 } END { if (bad || NR != n) { print NR " steps"; exit 1 } }'; }
# halt_at_step PROCESS RUN N: waits until the log has N steps, then halts the process; fails where it has ended before
halt_at_step() {
    while ! grep -q "\"step\": $3," "$2/log.jsonl" 2>/dev/null; do kill -0 "$1" 2>/dev/null || return 1; done
    kill -STOP "$1"
}

# ---- data: documents of a small grammar, as unit files and as a token shard ----

# units SEED DOCUMENTS
units() {
    awk -v seed="$1" -v documents="$2" 'function draw(n) { seed = (seed * 16807) % 2147483647; return seed % n }
    BEGIN { for (i = 0; i < 5; i++) draw(2); for (d = 0; d < documents; d++) {
        printf "{\"units\": ["; n = 20 + draw(60); u = draw(100)
        for (i = 0; i < n; i++) { printf "%s%d", i ? ", " : "", u; u = draw(4) ? (u * 7 + 3) % 100 : draw(100) }
        printf "], \"file_name\": \"%d\"}\n", d } }'
}
# shard V TOKEN...: llm.c's layout, the vocabulary in header word 3
shard() {
    shard_v=$1
    shift
    shard_text=$(for word in 20240520 1 $# "$shard_v"; do printf '\\%03o\\%03o\\%03o\\%03o' $((word % 256)) $((word / 256 % 256)) $((word / 65536 % 256)) $((word / 16777216)); done)
    printf "$shard_text"
    head -c 1008 /dev/zero
    for token in "$@"; do shard_text=$(printf '\\%03o\\%03o' $((token % 256)) $((token / 256))) && printf "$shard_text"; done
}
units 1 300 >a.jsonl
units 2 100 >b.jsonl
units 3 20 >v.jsonl
shard 102 1 5 6 7 8 9 10 1 1 11 12 13 14 15 1 >small.bin
shard 102 1 5 6 7 300 9 10 1 >stray.bin
cat >model.json <<'J'
{"model_type": "qwen2", "vocab_size": 102, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
 "intermediate_size": 64, "max_position_embeddings": 256, "tie_word_embeddings": true}
J
start="--context 64 --batch 4 --lr 5e-3 --warmup 5 --threads 1"
few="$start --model model.json"

# ---- flags ----

for program in train eval tokenize dpo; do
    check "$program --help" 'status' "$programs/$program" --help
    check "$program --version" 'no version' sh -c "'$programs/$program' --version | grep -q '[0-9]\.[0-9]'"
    refuses "$program: an unknown flag" 2 'nosuch' "$programs/$program" --nosuch
done
for program in train dpo; do "$programs/$program" --help | awk 'length($0) > 80 { bad = 1; print } END { exit bad }'; done >wide.txt
check 'help fits 80 columns' "$(head -n 1 wide.txt)" test ! -s wide.txt
refuses 'an mpirun that is not its own' 1 'mpirun has started 4 processes' env PMI_SIZE=4 ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" "$train" --dry-run
refuses 'an srun without --mpi' 1 'srun has started 4 processes' env SLURM_STEP_NUM_TASKS=4 "$train" --dry-run
refuses 'a flag without its value' 2 'lr' "$train" a.jsonl --lr
refuses 'a value that is no number' 2 'lr' "$train" a.jsonl --lr fast
refuses 'a wrong choice' 2 'schedule' "$train" a.jsonl --schedule wavy
refuses 'a wrong warm-up' 2 'warmup' "$train" a.jsonl --warmup soon
refuses '--time 0' 2 'time' "$train" a.jsonl --time 0
refuses 'a device of no kind' 2 'device abc' "$train" a.jsonl --device abc
refuses 'eval on a device of no kind' 2 'device cuda:x' "$eval" ppl a.jsonl --device cuda:x
refuses 'weights that are no numbers' 2 'weights abc' "$train" a.jsonl --weights abc
refuses 'weights that are too few' 2 'weights' "$train" a.jsonl b.jsonl --weights 1 --steps 1
refuses '--model with --init' 2 'shape' "$train" a.jsonl --model tiny --init x
refuses '--init with --twist' 2 'init' "$train" a.jsonl --init x --twist y

# ---- training ----

check 'twenty steps' 'status' "$train" $few a.jsonl --val v.jsonl --steps 20 --save-every 5 --eval-every 10 --keep 2 --out one
check 'each step stands in the log' 'steps' each_step one 20
check 'evaluations stand in the log' 'not two' test "$(grep -c val_loss one/log.jsonl)" = 2
check 'the last step is latest' 'link' test "$(readlink one/latest)" = step_000020
check '--keep 2 keeps two' 'folders' test "$(ls -d one/step_* | tr '\n' ' ')" = 'one/step_000015 one/step_000020 '
head -n 4 a.jsonl >four.jsonl # learned by heart, so that the loss on others soon rises
"$train" $few four.jsonl --val v.jsonl --steps 40 --eval-every 7 --save-every 10 --keep 1 --lr 0.02 --schedule constant --out high >/dev/null 2>&1
grep val_loss high/log.jsonl | awk '{ gsub("[,}]", ""); if (NR == 1 || $4 < least) { least = $4; at = $2 } } END { printf "step_%06d", at }' >lowest.txt
check 'best links to the lowest val_loss of the log' "$(readlink high/best), $(cat lowest.txt)" test "$(readlink high/best)" = "$(cat lowest.txt)" -a -f high/best/model.safetensors
check 'which is neither the last nor one that was due' "$(cat lowest.txt)" sh -c "! grep -q 0\$ lowest.txt"
check 'the last step is evaluated, then saved' 'order' sh -c "tail -n 1 high/log.jsonl | grep -q 'step\": 40, \"val_loss' && test \$(readlink high/latest) = step_000040"
"$train" $few a.jsonl --val v.jsonl --steps 20 --save-every 5 --eval-every 10 --keep 2 --out two >/dev/null 2>&1
check 'the same seed gives the same bytes' 'differ' same_runs one two
"$train" $few a.jsonl --val v.jsonl --steps 20 --seed 1 --eval-every 10 --out seed >/dev/null 2>&1
check 'another seed gives others' 'the same' sh -c '! cmp one/latest/model.safetensors seed/latest/model.safetensors'
"$train" $few a.jsonl --val v.jsonl --steps 20 --micro-batch 1 --eval-every 10 --out micro >/dev/null 2>&1
check '--micro-batch changes the last bits at most' 'too far' sh -c "grep -h '\"loss\"' one/log.jsonl micro/log.jsonl |
    awk '{ gsub(\",\", \"\"); if (\$2 in loss) { d = (\$6 - loss[\$2]) / \$6; if (d < 0) d = -d; n++; if (d > (\$2 == 1 ? 1e-6 : 1e-4)) bad = 1 }
    loss[\$2] = \$6 } END { exit bad || n != 20 }'"
"$train" $few a.jsonl --val v.jsonl --steps 20 --save-every 5 --eval-every 10 --keep 2 --recompute --out again >/dev/null 2>&1
check '--recompute changes no bit' 'differ' same_runs one again
check 'and is kept with the run' 'setting' grep -q '"recompute": "1"' again/latest/trainer.json
# of a large model: thousands of megabytes, of which one decimal is enough (test_model.c compares the bytes of a small one)
activations() { "$train" a.jsonl --model slam --context 1024 --batch 8 --micro-batch 8 --steps 20 --dry-run "$@" |
    sed -n 's/.*activations \([0-9.]*\).*/\1/p'; }
check 'but takes less memory' 'as much' sh -c "echo $(activations) $(activations --recompute) | awk '{ exit !(\$2 > 0 && \$2 < 0.9 * \$1) }'"
check '--format slamkit prefixes the names' 'no lm.' sh -c "'$train' $few a.jsonl --steps 2 --format slamkit --out kit && grep -q '\"lm.model.norm.weight\"' kit/latest/model.safetensors"
check '--init takes a run of other names' 'status' "$train" $start a.jsonl --init kit --steps 2 --out from_kit
check 'a shard trains' 'status' "$train" $few small.bin --steps 2 --out small
check '--twist cuts the vocabulary' 'V' sh -c "'$train' --model model.json --vocab 300 --context 64 --batch 4 a.jsonl --steps 1 --out large &&
    '$train' $start small.bin --twist large --steps 1 --out cut && grep -q '\"vocab_size\": 102' cut/latest/config.json"
check '--tokens counts real tokens' 'limit' sh -c "'$train' $few a.jsonl --tokens 3000 --out tokens && grep '\"loss\"' tokens/log.jsonl | tail -n 2 |
    awk '{ gsub(\",\", \"\"); t[NR] = \$4 } END { exit !(t[1] < 3000 && t[2] >= 3000) }'"
check 'two sources by weight, each validated' 'sources' sh -c "'$train' $few a.jsonl b.jsonl --weights 1,0.5 --val v.jsonl --val b.jsonl --steps 4 --eval-every 2 --out mix &&
    grep -q 'val_loss_by_source.*v.jsonl.*b.jsonl' mix/log.jsonl"
check '--val-fraction holds out' 'no val_loss' sh -c "'$train' $few a.jsonl --val-fraction 0.1 --steps 4 --out held && grep -q val_loss held/log.jsonl"
check '--eval-every 0: never' 'val_loss' sh -c "'$train' $few a.jsonl --val v.jsonl --eval-every 0 --steps 4 --out never && ! grep -q val_loss never/log.jsonl"
check '--dry-run trains nothing' 'folder' sh -c "'$train' $few a.jsonl --steps 20 --dry-run --rate 1000 --out dry | grep -q FLOP && test ! -e dry"
check 'folders of their own' 'folders' sh -c "'$train' $few a.jsonl --steps 1 && '$train' $few a.jsonl --steps 1 && test -d runs/train/latest -a -d runs/train-2/latest"
check 'eval takes the newest run' 'other' sh -c "'$eval' ppl v.jsonl --context 64 | grep -q runs/train-2"
check 'eval ppl beside n-grams' 'JSON' sh -c "'$eval' one ppl v.jsonl --train a.jsonl --json ppl.json && grep -q '\"task\": \"ppl\".*\"nll\".*\"perplexity\".*\"unigram\".*\"fivegram\"' ppl.json"
check 'eval finds the loss that training found' 'differ' sh -c "echo \$(sed 's/.*\"nll\": //; s/,.*//' ppl.json) \$(tail -n 1 one/log.jsonl | sed 's/.*\"val_loss\": //; s/[,}].*//') |
    awk '{ d = \$1 - \$2; exit !(NF == 2 && d < 1e-5 && d > -1e-5) }'"
if [ -f "$programs/test/corpus/train.bin" ]; then
    check 'the bundled corpus is found from anywhere' 'status' "$train" --steps 1 --eval-every 0 --out bundled
    check 'its stories are continued' 'lines' sh -c "'$eval' bundled generate --max-new 3 -o stories.jsonl && test \$(grep -c '\"file_name\": .*val.bin:[0-9]*\", \"prompt\": \\[.*\"units\": ' stories.jsonl) = 84"
else
    echo "skip the bundled corpus: it is not beside $train"
fi

# ---- generation ----

go_on="generate v.jsonl --prompt-units 4 --max-new 30"
check 'eval generate' 'status' "$eval" one $go_on -o said.jsonl --json said.json
check 'a line for each prompt, of so many units' 'lines' test "$(grep -c '^{"file_name": "[0-9]*", "prompt": \[[0-9]*, [0-9]*, [0-9]*, [0-9]*\], "units": \[[0-9, ]*\]}$' said.jsonl)" = 20
check 'figures as JSON' 'JSON' grep -q '^{"task": "generate", "n": 20, "tokens": [0-9]*, "auto_bleu_2": [0-9.e-]*}$' said.json
check 'one at a time says the same' 'differ' sh -c "'$eval' one $go_on -o alone.jsonl --batch 1 && cmp said.jsonl alone.jsonl"
check 'another seed says something else' 'the same' sh -c "'$eval' one $go_on -o other.jsonl --seed 1 && ! cmp said.jsonl other.jsonl"
check '--greedy needs no seed' 'differ' sh -c "'$eval' one $go_on --greedy -o said.jsonl && '$eval' one $go_on --greedy -o other.jsonl --seed 1 && cmp said.jsonl other.jsonl"
check 'a prompt longer than the context has room for' 'not told' sh -c "'$eval' one generate v.jsonl --prompt-seconds 0 --max-new 50 | grep -q 'prompts were longer than the context of 64'"
check 'continuations are prompts' 'status' "$eval" one generate said.jsonl --max-new 2
printf 'one two one two\n\n' >texts.txt
check 'auto-BLEU of texts' 'figure' sh -c "'$eval' generate --transcripts texts.txt | grep -q '0.3333 over 2 lines'"
refuses 'no room for a prompt' 1 '64 new tokens.*context of 64' "$eval" one generate v.jsonl --max-new 64
refuses 'a folder that is not there, before anything is generated' 1 'no/said.jsonl: cannot be written' "$eval" one $go_on -o no/said.jsonl
refuses 'prompts that are not there' 1 'nothing.jsonl' "$eval" one generate nothing.jsonl
refuses 'prompts beyond the vocabulary' 1 'x: token 702 at position 1' sh -c "echo '{\"units\": [700], \"file_name\": \"x\"}' >far.jsonl; exec '$eval' one generate far.jsonl"
refuses 'audio without --kmeans' 1 'x.wav.*--kmeans' "$eval" one generate x.wav
refuses 'a hot top-p' 2 'top-p' "$eval" one $go_on --top-p 2
cat v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl v.jsonl >many.jsonl
"$eval" one generate many.jsonl --batch 1 --max-new 60 -o halted.jsonl >halted.out 2>&1 &
halted=$!
while ! grep -q '^prompts' halted.out && kill -0 $halted 2>/dev/null; do :; done
kill -INT $halted
check 'a signal ends it well' 'status' wait $halted
check 'what was done by then is kept apart' 'files' sh -c 'grep -q "^stopped after [0-9]* of 200" halted.out && test -f halted.jsonl.partial -a ! -e halted.jsonl'

# ---- refusals ----

refuses 'a folder that holds a run' 1 'one.*--resume.*another' "$train" $few a.jsonl --steps 20 --out one
refuses 'a file that is not there' 1 'nothing.bin' "$train" nothing.bin --steps 1
refuses 'a token beyond the vocabulary' 1 'stray.bin.* 4 .*300' "$train" $few stray.bin --steps 1
refuses 'a unit beyond the vocabulary' 1 'a.jsonl:[0-9]' "$train" $few a.jsonl --vocab 50 --steps 1
refuses '--vocab against the shard' 1 '300.*102' "$train" $few small.bin --vocab 300 --steps 1
refuses 'data of another vocabulary than --init' 1 '300.*102' "$train" $start small.bin --init large --steps 1
refuses 'bf16 on the CPU' 1 'f32' "$train" $few a.jsonl --device cpu --dtype bf16 --steps 1
refuses 'bf16 where there is no GPU' 1 'dtype bf16: the CPU computes in f32.*cuda' "$train" $few a.jsonl --dtype bf16 --steps 1
refuses 'a GPU where there is none' 1 'cuda:0: ' "$train" $few a.jsonl --device cuda --steps 1
refuses 'eval with an unknown task' 2 'sing' "$eval" one sing
refuses 'eval without data' 1 'nothing' "$eval" one ppl nothing.jsonl
refuses 'resume with another setting' 1 'lr 0.1.*0.005' "$train" --resume --out one --lr 0.1
refuses 'resume with other data' 1 'b.jsonl.*a.jsonl' "$train" b.jsonl --resume --out one
refuses 'resume with a lower limit' 1 'steps 10.*20.*grow' "$train" --resume --out one --steps 10
cp a.jsonl moved.jsonl
"$train" $few moved.jsonl --steps 2 --out changed >/dev/null 2>&1
cat b.jsonl >>moved.jsonl
refuses 'resume on data that have changed' 1 'moved.jsonl' "$train" --resume --out changed --steps 4

cp -rL one copied
refuses 'a link that a copy made a folder' 1 'latest.*remove it' "$train" --resume --out copied --steps 30
"$train" $few a.jsonl --steps 3 --out closed >&- 2>&- <&-
check 'closed standard files take nothing with them' 'log' each_step closed 3
if [ -c /dev/full ]; then
    check 'eval where stdout is full' 'status 0' sh -c "'$eval' one ppl v.jsonl 2>full.err >/dev/full; test \$? = 1 && grep -q 'stdout: cannot be written' full.err"
fi
cp -r one damaged
sed 's/"steps": 20/"steps": 0/' one/step_000020/trainer.json >damaged/step_000020/trainer.json
refuses 'a trainer.json of no steps' 1 'steps' "$train" --resume --out damaged
echo '{"step": 20, ' >damaged/step_000020/trainer.json
refuses 'a damaged trainer.json' 1 'trainer.json' "$train" --resume --out damaged

# ---- going on ----

long="$few a.jsonl --val v.jsonl --steps 400 --eval-every 50 --save-every 20 --batch 8"
"$train" $long --out whole >/dev/null 2>&1
check 'a limit grows, lost links are mended' 'steps' sh -c "rm two/latest two/best && '$train' --resume --out two --steps 25 && test \$(readlink two/latest) = step_000025 && test -d two/best"
cp -r again more
check '--recompute may come with --resume' 'status' sh -c "'$train' --resume --out one --recompute --steps 25 && grep -q '\"recompute\": \"1\"' one/latest/trainer.json"
check 'which goes on as it would have without' 'differ' same_runs one two
check 'and stays with it' 'status' "$train" --resume --out more --steps 25
check 'to the same bits' 'differ' same_runs more two
check 'what is kept of the device' 'settings' sh -c "grep -q '\"device\": \"cpu\"' more/latest/trainer.json && grep -q '\"dtype\": \"f32\"' more/latest/trainer.json"
refuses 'resume with another type of numbers' 1 'dtype bf16.*f32' "$train" --resume --out more --dtype bf16
refuses 'resume on a GPU where there is none' 1 'cuda:0: ' "$train" --resume --out more --device cuda --micro-batch 2
sed 's/"device": "cpu"/"device": "cuda"/; s/"dtype": "f32"/"dtype": "bf16"/; s/"micro-batch": "[0-9]*"/"micro-batch": "1"/' more/latest/trainer.json >changed.json && cp changed.json more/latest/trainer.json
refuses 'a run from a GPU does not leave it by itself' 1 'cuda:0: ' "$train" --resume --out more --device auto --steps 30
check 'but where it is told to' 'note' sh -c "'$train' --resume --out more --device cpu --steps 30 >moved.out && grep -q '^device .*cpu.*cuda before' moved.out"
"$train" --resume --out two --steps 30 >/dev/null 2>&1
check 'with rows and numbers of the new device' 'differ' same_runs more two
check 'and stays there' 'status' "$train" --resume --out more --steps 31
if (ulimit -v 4000000 && "$train" --version) >/dev/null 2>&1; then
    refuses 'too little memory' 1 'out of memory.*--micro-batch' sh -c "ulimit -v 4000000; exec '$train' a.jsonl --context 1024 --batch 512 --micro-batch 512 --steps 1 --out none"
    check 'leaves nothing' 'folder' test ! -e none
else
    echo 'skip too little memory: no limit can be set for this program'
fi
check '--resume goes on where there is nothing yet' 'status' "$train" $few a.jsonl --steps 3 --resume --out fresh
check '--resume from another folder' 'status' sh -c "mkdir -p elsewhere && cd elsewhere && '$train' --resume --out ../fresh --steps 5"
"$train" $long --out term >term.out 2>&1 &
process=$!
halt_at_step $process term 60
refuses 'a second process on the same run' 1 'another process' "$train" --resume --out term
kill -TERM $process
kill -CONT $process
wait $process
check 'SIGTERM ends well' 'status' test $? -eq 0
stopped=$(grep -c '"loss"' term/log.jsonl)
check 'SIGTERM saves the step it finished' "step $stopped" test -d "term/step_$(printf %06d "$stopped")" -a "$stopped" -lt 400
"$train" --resume --out term >/dev/null 2>&1
check 'SIGTERM and --resume: as if never stopped' 'differ' same_runs whole term
"$train" $long --out kill >/dev/null 2>&1 &
process=$!
halt_at_step $process kill 70
kill -9 $process
wait $process 2>/dev/null
printf '{"step": 71, "tok' >>kill/log.jsonl
mkdir -p kill/.checkpoint.part && echo half >kill/.checkpoint.part/config.json
"$train" --resume --out kill >/dev/null 2>&1
check 'kill -9 and --resume: as if never stopped' 'differ' same_runs whole kill
check 'after a kill each step stands once' 'steps' each_step kill 400
check 'what a kill left is removed' 'leftover' test ! -e kill/.checkpoint.part

# Twenty kills at moments of chance, of a run that saves at every step: each resumed one goes on from a complete checkpoint.
bad=
reached=0
for moment in $(awk -v seed=$$ 'BEGIN { srand(seed); for (i = 0; i < 20; i++) printf "%.3f ", 0.02 + 0.3 * rand() }'); do
    "$train" $few a.jsonl --steps 1000000 --save-every 1 --keep 2 --resume --out chance >chance.out 2>chance.err &
    process=$!
    sleep "$moment"
    kill -9 $process 2>/dev/null || bad="ended by itself: $(head -n 1 chance.err)"
    wait $process 2>/dev/null
    for step in chance/step_*; do
        [ -d "$step" ] || continue
        [ -f "$step/trainer.json" ] && [ -f "$step/model.safetensors" ] && [ -f "$step/optimizer.safetensors" ] && [ -f "$step/config.json" ] || bad="$step is not complete"
    done
done
"$train" --resume --out chance >chance.out 2>chance.err &
process=$!
sleep 1
kill -TERM $process
wait $process || bad="did not end well: $(head -n 1 chance.err)"
reached=$(readlink chance/latest)
check 'twenty kills at moments of chance' "$bad" test -z "$bad" -a -n "$reached"
check 'after them each step stands once' 'steps' each_step chance "$(echo "${reached#step_}" | sed 's/^0*//')"
refuses 'resume with a time for fewer steps' 1 'time.* 1000000, .*grow' "$train" --resume --out chance --time 2
refuses 'resume with epochs of fewer steps' 1 ' 1000000, .*grow' "$train" --resume --out chance --epochs 1

# Two calls on one folder of which the slower one has looked for a checkpoint before the other had any.
: >both.out
"$train" $few a.jsonl --batch 64 --time 60 --out both >both.out 2>both.err &
process=$!
while ! grep -q '^schedule' both.out; do kill -0 $process 2>/dev/null || break; done
kill -STOP $process
"$train" $few a.jsonl --steps 2 --out both >/dev/null 2>&1
cp -r both first
kill -CONT $process
wait $process
check 'a run that another process has begun meanwhile' "status $?: $(cat both.err)" grep -q 'both: another process has trained here meanwhile' both.err
check 'stays as that process left it' 'differ' diff -r both first

"$train" $few a.jsonl --steps 5 --out grown >/dev/null 2>&1
"$train" --resume --out grown --steps 400000 --save-every 0 >/dev/null 2>&1 &
process=$!
halt_at_step $process grown 7
kill -9 $process
wait $process 2>/dev/null
check 'the kill came before a checkpoint' 'checkpoint' test "$(readlink grown/latest)" = step_000005
refuses 'a limit that has grown survives a kill' 1 'steps 10.* 400000, .*grow' "$train" --resume --out grown --steps 10

mkdir newest
check '--resume takes the newest run, whatever its name' 'other' sh -c "cd newest && '$train' $start --model ../model.json ../a.jsonl --steps 2 &&
    '$train' $start --model ../model.json ../a.jsonl --steps 2 --out runs/mine && mkdir runs/train-9 &&
    '$train' --resume --steps 4 && test \$(readlink runs/mine/latest) = step_000004 -a \$(readlink runs/train/latest) = step_000002"
check 'what is to be done next' 'other' sh -c "'$train' $few a.jsonl --tokens 2000 --out 'a b' | grep -q \"resume --out 'a b' --tokens 4000\$\""
if [ -f "$programs/test/corpus/train.bin" ]; then
    mkdir -p here/test && ln -s "$programs/test/corpus" here/test/corpus && cp "$train" "$eval" here
    check 'a run on the bundled corpus goes on where the program has moved to' 'status' sh -c "here/train --steps 1 --eval-every 0 --context 32 --batch 1 --out beside &&
        mv here there && there/train --resume --out beside --steps 2"
    check 'and is evaluated there' 'data' sh -c "there/eval beside ppl | grep -q 'there/test/corpus/val.bin'"
fi

# ---- tokenize: audio, hostile audio ----

. "$programs/test/wave.sh"
# noise FROM BYTES: the same every time
noise() { tail -c +"$1" "$root/slam.h" | head -c "$2"; }
mkdir -p speech/b hostile
for i in $(seq 40); do
    n=$((9000 + i * 602))
    { wave 1 1 8000 16 $n && noise $((i * 997)) $n; } >"speech/$([ $((i % 3)) -gt 0 ] || echo b/)$i.wav"
done
: >hostile/empty.wav
{ wave 1 1 16000 16 64000 && head -c 64000 /dev/zero; } >hostile/silent.wav
{ wave 1 1 16000 16 320 && noise 5 320; } >hostile/10ms.wav
{ wave 3 1 16000 32 4000 && head -c 4000 /dev/zero | tr '\000' '\377'; } >hostile/nan.wav
{ wave 1 1 96000 24 288000 && noise 7 288000; } >hostile/96k.wav
{ wave 1 8 44100 16 160000 && noise 9 160000; } >hostile/8channels.wav
{ wave 1 1 16000 16 64000 && noise 9 30000; } >hostile/short.wav
head -c 30 hostile/short.wav >hostile/header.wav
{ printf 'fLaC' && noise 11 1000; } >hostile/no.flac
{ wave 1 1 16000 16 320 && noise 5 320; } >hostile/locked.wav
ln -s . hostile/loop
ln -s ../hostile hostile/up
ln -s self hostile/self
ln -s nothing.wav hostile/gone.wav
chmod 000 hostile/locked.wav

check 'tokenize --fit' 'status' "$tokenize" speech --fit 20 --kmeans km.npy
check 'tokenize' 'status' "$tokenize" speech --kmeans km.npy -o whole.jsonl
check 'a line for each file' "$(wc -l <whole.jsonl) lines" test "$(wc -l <whole.jsonl)" = 40
check 'the same for any number of threads' 'differ' sh -c "'$tokenize' speech --kmeans km.npy --threads 1 -o single.jsonl && cmp whole.jsonl single.jsonl"
check 'parts of the list in order are the whole' 'differ' sh -c "for i in 1 2 3; do '$tokenize' speech --kmeans km.npy --part \$i/3 -o part\$i.jsonl || exit 1; done
    cat part1.jsonl part2.jsonl part3.jsonl | cmp whole.jsonl -"
check 'units into token shards without the audio' 'differ' sh -c "'$tokenize' speech --kmeans km.npy -o direct.bin && '$tokenize' whole.jsonl --kmeans km.npy -o again.bin && cmp direct.bin again.bin"
check 'and into tokens without the centroids' 'differ' sh -c "'$tokenize' whole.jsonl --audio-repr -o repr.jsonl && '$tokenize' repr.jsonl --kmeans km.npy -o third.bin && cmp direct.bin third.bin"
check 'which train reads' 'status' "$train" $few direct.bin repr.jsonl --steps 1 --out spoken
check 'a long file becomes lines with start and end' 'lines' sh -c "'$tokenize' speech --kmeans km.npy --max-seconds 1 -o parts.jsonl && grep -q '\"start\": 0, \"end\": 0\.[89]' parts.jsonl && test \$(wc -l <parts.jsonl) -gt 60"
"$tokenize" hostile --kmeans km.npy -o hostile.jsonl >hostile.out 2>hostile.err
check 'hostile files end in status 3' "status $?" test $? -eq 3
for name in empty nan short header no gone; do
    check "hostile: $name is left out with a sentence, and listed" 'not said' sh -c "grep -q 'left out: hostile/$name\.[a-z]*: ' hostile.err && grep -q '^hostile/$name\.' hostile.jsonl.failed"
done
for name in silent 10ms 96k 8channels; do check "hostile: $name has units" 'no line' grep -q "hostile/$name.wav" hostile.jsonl; done
if [ "$(id -u)" = 0 ]; then echo 'skip a file without permission: root may read it'; else
    check 'hostile: no permission' 'not said' grep -q 'left out: hostile/locked.wav: cannot be opened: Permission' hostile.err
fi
check 'hostile: nothing else fails, loops of links end' "$(wc -l <hostile.jsonl.failed)" test "$(cat hostile.jsonl hostile.jsonl.failed | wc -l)" = 11
chmod 600 hostile/locked.wav
check 'nothing usable' 'status or sentence' sh -c "'$tokenize' hostile/empty.wav --kmeans km.npy -o nothing.jsonl 2>nothing.err; test \$? = 1 && grep -q 'error: none of the 1 files' nothing.err"
refuses 'a folder without audio' 1 'has the name of audio' sh -c "mkdir -p bare && exec '$tokenize' bare --kmeans km.npy -o nothing2.jsonl"
refuses 'an output that is there' 1 'exists already' "$tokenize" speech --kmeans km.npy -o whole.jsonl
refuses 'tokenize: --part 3/2' 2 'part 3/2' "$tokenize" speech --kmeans km.npy --part 3/2 -o x.bin
refuses 'tokenize: --max-seconds 0.5' 2 'max-seconds' "$tokenize" speech --kmeans km.npy --max-seconds 0.5 -o x.bin
refuses 'tokenize: units with audio' 2 'together' "$tokenize" speech whole.jsonl -o x.bin
refuses 'tokenize: --text without --tts' 2 'tts' "$tokenize" --text x.txt --kmeans km.npy -o x.bin
refuses 'tokenize: --pairs into a shard' 1 'pairs go into' "$tokenize" --pairs whole.jsonl --kmeans km.npy -o x.bin

# ---- tokenize: text that is spoken (by cat, the text being a path), pairs ----

ls speech/*.wav speech/b/*.wav >stories.txt
ls speech/*.wav | paste -d '\t' - - - | head -n 8 | awk -F '\t' 'NF == 3' >pairs.tsv
slow="sh -c 'sleep 0.02; exec cat \"\$0\"' {text}"
check '--text' 'status' "$tokenize" --text stories.txt --tts 'cat {text}' --kmeans km.npy -o told.bin
check 'a voice without {text} reads its input' 'differ' sh -c "'$tokenize' --text stories.txt --tts 'xargs cat' --kmeans km.npy -o read.bin && cmp told.bin read.bin"
check 'text that becomes pairs' 'lines' sh -c "'$tokenize' --text pairs.tsv --tts 'cat {text}' --max-repetition 0 --kmeans km.npy -o pairs.jsonl && test \$(wc -l <pairs.jsonl) = \$(wc -l <pairs.tsv)"
awk -F '\t' '{ printf "{\"prompt_path\": \"%s\", \"chosen_path\": \"%s\", \"rejected_path\": \"%s\"}\n", $1, $2, $3 }' pairs.tsv >paths.jsonl
check '--pairs gives the same units' 'differ' sh -c "'$tokenize' --pairs paths.jsonl --kmeans km.npy -o named.jsonl &&
    sed 's/.*\"prompt\": {/{/' pairs.jsonl >pairs.1 && sed 's/.*\"prompt\": {/{/' named.jsonl >pairs.2 && test -s pairs.1 && cmp pairs.1 pairs.2"
refuses 'a voice that is not there' 1 'stories.txt:1: nosuchvoice cannot be started' "$tokenize" --text stories.txt --tts 'nosuchvoice {text}' --kmeans km.npy -o voice.bin
check 'leaves nothing' 'leftover' sh -c '! ls voice.bin*'

# ---- tokenize: HuBERT ----

hubert="--hubert $root/test/fixtures/hubert/mhubert --layer 2"
check 'tokenize --hubert --fit' 'status' "$tokenize" speech $hubert --fit 20 --kmeans kmh.npy
check 'km.json knows the model' 'status' "$tokenize" speech --kmeans kmh.npy -o hubert.jsonl
check 'the same for any number of threads and given the model' 'differ' sh -c "'$tokenize' speech $hubert --kmeans kmh.npy --threads 1 -o hubert1.jsonl && cmp hubert.jsonl hubert1.jsonl"
check 'HuBERT: parts of a file, and pairs' 'status' sh -c "'$tokenize' speech --kmeans kmh.npy --max-seconds 1 -o hubert.bin && '$tokenize' --pairs paths.jsonl --kmeans kmh.npy -o hubertpairs.jsonl &&
    test \$(wc -l <hubertpairs.jsonl) = \$(wc -l <pairs.tsv)"
"$tokenize" hostile --kmeans kmh.npy -o hubert_hostile.jsonl >hostile.out 2>hostile.err
check 'HuBERT: what is too short for a frame is left out' "status $?" sh -c "test $? = 3 && grep -q '10ms.wav: 10.0 ms of audio, which is too short' hostile.err && grep -q silent.wav hubert_hostile.jsonl"
refuses 'another layer than that of the centroids' 1 'made for layer 2' "$tokenize" speech --hubert "$root/test/fixtures/hubert/mhubert" --layer 1 --kmeans kmh.npy -o x.bin
refuses 'MFCC of centroids of HuBERT' 1 "made for HuBERT's features" "$tokenize" speech --features mfcc --kmeans kmh.npy -o x.bin
refuses 'HuBERT with centroids of MFCC' 1 'made for MFCC' "$tokenize" speech $hubert --kmeans km.npy -o x.bin
refuses 'HuBERT without a model' 1 'expected --hubert DIR' "$tokenize" speech --features hubert --fit 20 --kmeans kmx.npy
refuses 'a model that is not there' 1 'nowhere/config.json' "$tokenize" speech --hubert nowhere --fit 20 --kmeans kmx.npy
refuses '--layer without a model' 1 'is for --hubert' "$tokenize" speech --layer 3 --fit 20 --kmeans kmx.npy

# Kills and signals at moments of chance: in the end the bytes of a call that nothing disturbed.
rounds=0 bad=
for moment in $(awk -v seed=$$ 'BEGIN { srand(seed); for (i = 0; i < 60; i++) printf "%.3f ", 0.02 + 0.2 * rand() }'); do
    [ ! -f killed.bin ] || break
    rounds=$((rounds + 1))
    "$tokenize" --text stories.txt --tts "$slow" --kmeans km.npy --threads $((1 + rounds % 2)) -o killed.bin >killed.out 2>killed.err &
    process=$!
    sleep "$moment"
    if [ $((rounds % 3)) = 0 ]; then kill -9 $process 2>/dev/null; else kill -TERM $process 2>/dev/null; fi
    wait $process 2>/dev/null
    [ ! -s killed.err ] || bad=$(head -n 1 killed.err)
done
"$tokenize" --text stories.txt --tts "$slow" --kmeans km.npy -o killed.bin >/dev/null 2>&1
check 'tokenize after kills and signals' "$rounds rounds, $bad" test -z "$bad" -a $rounds -gt 2
check 'tokenize after them: the same bytes' 'differ' cmp told.bin killed.bin
check 'tokenize leaves nothing else' 'leftover' sh -c '! ls killed.bin.*'

mkdir small
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=12k tmpfs small 2>/dev/null; then
    mounted="$mounted $folder/small"
    refuses 'tokenize: a full disk' 1 'No space left' "$tokenize" speech --kmeans km.npy --max-seconds 0 -o small/out.jsonl
    mount -o remount,size=4m "$folder/small"
    check 'tokenize: after a full disk the same call goes on' 'differ' sh -c "'$tokenize' speech --kmeans km.npy --max-seconds 0 -o small/out.jsonl && cmp whole.jsonl small/out.jsonl"
else
    echo 'skip tokenize: a full disk: no small file system can be mounted here'
fi

# ---- dpo: pairs whose chosen ending follows the small grammar and whose rejected one does not ----

# pairs SEED PAIRS
pairs() {
    awk -v seed="$1" -v pairs="$2" 'function draw(n) { seed = (seed * 16807) % 2147483647; return seed % n }
    function ending(u, rule,  i, n, s) { n = 2 + draw(8); for (i = 0; i < n; i++) { u = rule ? (u * 7 + 3) % 100 : draw(100); s = s (i ? ", " : "") u }; return s }
    BEGIN { for (i = 0; i < 5; i++) draw(2); for (p = 0; p < pairs; p++) {
        n = 3 + draw(20); u = draw(100); s = u; for (i = 1; i < n; i++) { u = (u * 7 + 3) % 100; s = s ", " u }
        printf "{\"prompt\": {\"units\": [%s]}, \"chosen\": {\"units\": [%s]}, \"rejected\": {\"units\": [%s]}}\n", s, ending(u, 1), ending(u, 0) } }'
}
pairs 1 120 >pairs-train.jsonl
pairs 2 40 >pairs-val.jsonl
{ cat pairs-train.jsonl && echo '{"prompt": {"units": [1]}, "chosen": {"units": [2]}, "rejected": {"units": [100]}}'; } >pairs-stray.jsonl
prefer="pairs-train.jsonl --val pairs-val.jsonl --init one --batch 8 --lr 1e-3 --warmup 2 --threads 1 --eval-every 10 --save-every 10"
last() { grep "\"$2\"" "$1/log.jsonl" | tail -n 1 | sed "s/.*\"$2\": //; s/[,}].*//"; }

check 'dpo' 'status' "$dpo" $prefer --epochs 2 --out d1
check 'dpo: each step stands in the log' 'steps' each_step d1 30
check 'dpo: with margin, accuracy, log-probabilities' 'members' sh -c "test \$(grep -c '\"loss\".*\"margin\".*\"accuracy\".*\"logp_chosen\".*\"logp_rejected\"' d1/log.jsonl) = 30 -a \$(grep -c '\"val_loss\".*\"val_margin\".*\"val_accuracy\"' d1/log.jsonl) = 3"
check 'dpo: the first loss is log 2' "$(sed -n 's/.*"loss": \([^,]*\),.*/\1/p' d1/log.jsonl | head -n 1)" sh -c "sed -n 's/.*\"loss\": \([^,]*\),.*/\1/p' d1/log.jsonl | head -n 1 | grep -q '^0\.69314'"
check 'dpo: what is preferred is learned' "$(last d1 val_accuracy), $(last d1 val_loss)" sh -c "echo $(last d1 val_accuracy) $(last d1 val_loss) | awk '{ exit !(\$1 > 0.9 && \$2 < 0.69) }'"
"$dpo" $prefer --epochs 2 --out d2 >/dev/null 2>&1
check 'dpo: the same seed gives the same bytes' 'differ' same_runs d1 d2
"$dpo" $prefer --epochs 2 --share-prompt --out d3 >/dev/null 2>&1
check 'dpo: --share-prompt changes the last bits at most, in fewer tokens' 'too far' sh -c "grep -h '\"loss\"' d1/log.jsonl d3/log.jsonl | awk '{ gsub(\",\", \"\")
    if (\$2 in loss) { d = (\$6 - loss[\$2]) / \$6; if (d < 0) d = -d; n++; if (d > 1e-3 || \$4 >= 0.9 * tokens[\$2]) bad = 1 } loss[\$2] = \$6; tokens[\$2] = \$4 } END { exit bad || n != 30 }'"
check 'dpo: folders of their own, from the newest run of train' 'folders' sh -c "mkdir -p own && cd own && '$train' $start --model ../model.json ../a.jsonl --steps 2 &&
    '$dpo' ../pairs-train.jsonl --steps 2 --batch 4 && '$dpo' ../pairs-train.jsonl --steps 2 --batch 4 && test -d runs/dpo/latest -a -d runs/dpo-2/latest &&
    grep -q 'runs/train/step_000002' runs/dpo-2/latest/trainer.json && grep -q '\"context\": \"64\"' runs/dpo-2/latest/trainer.json"
check 'dpo: eval takes the newest run' 'other' sh -c "cd own && '$eval' ppl ../v.jsonl | grep -q runs/dpo-2"
check 'dpo: --dry-run computes nothing' 'folder' sh -c "'$dpo' $prefer --dry-run --out dry | grep -q '120 to train on, 40 to validate on' && test ! -e dry"
check 'dpo: --val-fraction' 'pairs' sh -c "'$dpo' pairs-train.jsonl --init one --val-fraction 0.25 --dry-run | grep -q '90 to train on, 30 to validate on'"
refuses 'dpo: a unit beyond the vocabulary' 1 "pairs-stray.jsonl:121: 'rejected': unit 1 is 100, expected below 100" "$dpo" pairs-stray.jsonl --init one --out none
refuses 'dpo: units, not pairs' 1 "a.jsonl:1: has no 'prompt'" "$dpo" a.jsonl --init one --out none
refuses 'dpo: a token shard' 1 'small.bin: expected preference pairs' "$dpo" small.bin --init one --out none
refuses 'dpo: no model' 1 '\-\-init: no model' sh -c "mkdir -p bare && cd bare && exec '$dpo' ../pairs-train.jsonl"
refuses 'dpo: a longer context than the model has' 1 'context 512.*256' "$dpo" pairs-train.jsonl --init one --context 512 --out none
refuses 'dpo: --val and --val-fraction' 2 'val-fraction' "$dpo" $prefer --val-fraction 0.1
refuses 'dpo: a folder that holds a run' 1 'd1.*--resume.*another' "$dpo" $prefer --out d1
refuses 'dpo: resume with another beta' 1 'beta 0.5.*0.1' "$dpo" --resume --out d1 --beta 0.5
refuses 'dpo: resume with a shared prompt' 1 'share-prompt 1.*none' "$dpo" --resume --out d1 --share-prompt
refuses 'dpo: resume with other pairs' 1 'pairs-val.jsonl.*pairs-train.jsonl' "$dpo" pairs-val.jsonl --resume --out d1
refuses 'dpo: resume with a lower limit' 1 'epochs 1.*2.*grow' "$dpo" --resume --out d1 --epochs 1
check 'dpo: leaves nothing' 'folder' test ! -e none

long="$prefer --steps 200"
"$dpo" $long --out dw >/dev/null 2>&1
"$dpo" $long --out dk >/dev/null 2>&1 &
process=$!
halt_at_step $process dk 57
kill -9 $process
wait $process 2>/dev/null
cp dk/reference.bin kept.bin
"$dpo" --resume --out dk >resumed.out 2>&1
check 'dpo: kill -9 and --resume: as if never stopped' 'differ' same_runs dw dk
check 'dpo: the reference is not computed again' 'it is' sh -c "! grep -q '^reference' resumed.out && cmp kept.bin dk/reference.bin && cmp kept.bin dw/reference.bin"
"$dpo" $long --out dt >term.out 2>&1 &
process=$!
halt_at_step $process dt 33
kill -TERM $process
kill -CONT $process
wait $process
check 'dpo: SIGTERM ends well' "status $?: $(tail -n 1 term.out)" test -d "dt/latest"
cp -r dt dd
"$dpo" --resume --out dt >/dev/null 2>&1
check 'dpo: SIGTERM and --resume: as if never stopped' 'differ' same_runs dw dt
head -c 1000 dt/reference.bin >dd/reference.bin # torn: what is missing is computed by the model that the run started from
"$dpo" --resume --out dd >dd.out 2>&1
check 'dpo: a torn reference is mended' 'other' sh -c "grep -q '^reference 160 of 160' dd.out && cmp kept.bin dd/reference.bin"
check 'dpo: and the run is the same' 'differ' same_runs dw dd
head -c 1000 dt/reference.bin >dd/reference.bin
mv one gone
refuses 'dpo: the model that is the reference is gone' 1 'one/step_.*config.json' "$dpo" --resume --out dd --steps 210
cp -r seed one && ln -sfn step_000020 one/latest && mv one/step_000020 "one/$(basename "$(readlink gone/latest)")" 2>/dev/null
refuses 'dpo: or another one' 1 'is not the model that this run was begun with' "$dpo" --resume --out dd --steps 210
rm -r one && mv gone one

# Kills while the reference is computed: each call goes on where the one before was stopped.
i=0
while [ $i -lt 60 ]; do cat pairs-train.jsonl pairs-val.jsonl; i=$((i + 1)); done >many.jsonl
count() { if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi; }
"$dpo" many.jsonl --init one --threads 1 --steps 2 --out rw >whole.out 2>&1
bad= rounds=0 before=0
while [ $rounds -lt 40 ] && [ "$before" -lt "$(count rw/reference.bin)" ]; do
    "$dpo" many.jsonl --init one --threads 1 --steps 2 --resume --out rk >rk.out 2>&1 &
    process=$!
    while kill -0 $process 2>/dev/null && [ "$(count rk/reference.bin)" -le $((before + 4096)) ]; do :; done
    if [ $((rounds % 3)) = 2 ]; then kill -TERM $process 2>/dev/null; else kill -9 $process 2>/dev/null; fi
    wait $process 2>/dev/null
    [ "$(count rk/reference.bin)" -ge "$before" ] || bad="$before bytes became $(count rk/reference.bin)"
    before=$(count rk/reference.bin) rounds=$((rounds + 1))
done
"$dpo" many.jsonl --init one --threads 1 --steps 2 --resume --out rk >rk.out 2>&1
check 'dpo: killed while the reference is computed, it does not start over' "$bad, $rounds rounds" test -z "$bad" -a $rounds -gt 2 -a $rounds -lt 40
check 'dpo: after kills the same reference and the same run' 'differ' sh -c "cmp rw/reference.bin rk/reference.bin && cmp rw/latest/model.safetensors rk/latest/model.safetensors"

# ---- eval: test sets ----

mkdir -p zero/lexical/dev pairset/one pairset/two salmon/bg_alignment salmon/speaker_consistency
echo 'id,filename,voice,frequency,word,phones,length,correct' >zero/lexical/dev/gold.csv
i=0
for file in $(ls speech/*.wav | head -n 24); do
    cp "$file" "zero/lexical/dev/f$i.wav"
    echo "$((i / 4)),f$i,v$((i / 2 % 2)),$((i * i)),,,5,$((i % 2))" >>zero/lexical/dev/gold.csv
    [ $i -ge 8 ] || cp "$file" "pairset/$([ $i -lt 4 ] && echo one || echo two)/${i}_x.wav"
    [ $i -ge 4 ] || cp "$file" "salmon/$([ $i -lt 2 ] && echo bg_alignment || echo speaker_consistency)/sample_0_$((i % 2)).wav"
    i=$((i + 1))
done
set_of() { "$eval" spoken "$@"; }
check 'eval swuggy: audio' 'status or count' sh -c "'$eval' spoken swuggy zero --kmeans km.npy --json audio.json --submission audio.txt && grep -q '\"n\": 6,' audio.json && test \$(wc -l <audio.txt) = 24"
check 'eval swuggy: the same of units' 'differ' sh -c "'$tokenize' zero/lexical/dev --kmeans km.npy -o zero.jsonl && '$eval' spoken swuggy zero/lexical/dev --units zero.jsonl --json units.json --submission units.txt &&
    cmp audio.json units.json && cmp audio.txt units.txt"
check 'eval storycloze: folders of pairs' 'count' sh -c "'$eval' spoken storycloze pairset --kmeans km.npy --sum --json pairset.json && grep -q '\"of\": \"sum\", \"n\": 4,' pairset.json"
check 'eval storycloze: of units alone' 'differ' sh -c "'$tokenize' pairset --kmeans km.npy -o pairset.jsonl && '$eval' spoken storycloze --units pairset.jsonl --sum --json pairset2.json && cmp pairset.json pairset2.json"
check 'eval salmon: by part' 'parts' sh -c "'$eval' spoken salmon salmon --kmeans km.npy --json salmon.json && grep -q '\"by_part\": \[{\"part\": \"bg_alignment\", \"n\": 1' salmon.json"
refuses 'eval: audio without centroids' 1 'kmeans' set_of swuggy zero
refuses 'eval: centroids of other units than the model' 1 'the model was trained on those of' set_of swuggy zero --kmeans kmh.npy
mv zero/lexical/dev/f3.wav f3.wav
refuses 'eval: a missing wav' 1 "'f3' is neither beside it" set_of swuggy zero --kmeans km.npy
: >zero/lexical/dev/f3.wav
check 'eval: a wav that cannot be heard' 'status or sentence' sh -c "'$eval' spoken swuggy zero --kmeans km.npy 2>unheard.err; test \$? = 1 &&
    grep -q 'error: 1 of the set.s files cannot be heard' unheard.err && grep -q f3.wav unheard.err"
mv f3.wav zero/lexical/dev/f3.wav
refuses 'eval: units without one of the files' 1 "has no line of 'f0'" set_of swuggy zero --units pairset.jsonl
sed 's/"units": \[[0-9]*/"units": [20/' zero.jsonl >large.jsonl
refuses 'eval: units out of the vocabulary' 1 'large.jsonl:1: unit 1 is 20, expected below 20' set_of swuggy zero --units large.jsonl
cat zero.jsonl zero.jsonl >twice.jsonl
refuses 'eval: two lines of a name' 1 "two lines are of 'f0'" set_of swuggy zero --units twice.jsonl
head -n 24 zero/lexical/dev/gold.csv >partner.csv
refuses 'eval: a row without a partner' 1 'partner.csv:[0-9]*: id .* expected one of each' set_of swuggy partner.csv --units zero.jsonl
mkdir -p empty_set
refuses 'eval: an empty folder' 1 'empty_set' set_of sblimp empty_set --kmeans km.npy
refuses 'eval: a split that PATH contradicts' 1 'dev/gold.csv: a split test is asked for' set_of swuggy zero/lexical/dev --split test --units zero.jsonl
refuses 'eval: a split that is not there' 1 'zero: there is no split test' set_of swuggy zero --split test --units zero.jsonl
refuses 'eval: more context than the model has positions' 1 'a context of 100000 tokens, the model has positions for' set_of swuggy zero --units zero.jsonl --context 100000
refuses 'eval: figures that cannot be written, before anything is scored' 1 'no/figures.json: cannot be written' set_of swuggy zero --units zero.jsonl --json no/figures.json
check 'eval: pairs and scores are in the figures' 'members' sh -c "grep -q '\"by_vocabulary\": \[{\"vocabulary\": \"in\", \"n\": 6,' units.json && test \$(grep -c '^{\"right\": \"f' units.json) = 12 -a \$(grep -c '^{\"name\": \"f' units.json) = 24"
check 'eval: figures for a pipe' 'JSON' sh -c "'$eval' spoken swuggy zero --units zero.jsonl --json /dev/stdout | sed -n '/^{/,\$p' | head -n 37 | grep -q '\"task\": \"swuggy\"'"
refuses 'eval: no such task' 2 'there is no such task' set_of swuggly zero
refuses 'eval: two sets' 2 'one test set at a time' set_of swuggy zero zero
if [ -f "$programs/test/corpus/swuggy/gold.csv" ]; then
    refuses 'eval: a model of other units than the bundled set' 1 'the bundled data are units of quantiser' set_of swuggy
    refuses 'dpo: a model of other units than the bundled pairs' 1 'the bundled data are units of quantiser' "$dpo" --init spoken
fi

# ---- limits of numbers, of time, of the disk ----

refuses 'twenty updates that are not finite' 1 'not finite 20 times' "$train" $few a.jsonl --steps 50 --save-every 1 --lr 1e25 --warmup 0 --schedule constant --out wild
check 'they are counted and reported' 'lines' test "$(grep -c 'not finite' refuse.out)" = 20
refuses 'without a checkpoint none is spoken of' 1 'in a row after step [0-9]*$' "$train" $few a.jsonl --steps 50 --save-every 0 --lr 1e25 --warmup 0 --schedule constant --out lost
"$train" $few a.jsonl --steps 5 --save-every 0 --schedule constant --warmup 0 --out good >/dev/null 2>&1
"$eval" good ppl v.jsonl --json before.json >/dev/null 2>&1
sed 's/"lr": "0.005"/"lr": "1e25"/' good/latest/trainer.json >changed.json && cp changed.json good/latest/trainer.json
refuses 'a run that breaks down' 1 'checkpoint is intact' "$train" --resume --out good --steps 50
"$eval" good ppl v.jsonl --json after.json >/dev/null 2>&1
check 'leaves the last good checkpoint' 'differ' sh -c "test \$(readlink good/latest) = step_000005 && grep -q nll before.json && cmp before.json after.json"

started=$(date +%s)
check '--time trains' 'status' "$train" $few a.jsonl --time 3 --out timed
check '--time ends in time' 'late' test $(($(date +%s) - started)) -le 6
steps=$(sed -n 's/.*"steps": \([0-9]*\),/\1/p' timed/latest/trainer.json)
"$train" $few a.jsonl --steps "$steps" --out counted >/dev/null 2>&1
lines=$(wc -l <timed/log.jsonl) # fewer than the steps where the machine grew busy
check '--time is the run of its number of steps' 'differ' sh -c "sed 's/, .seconds.*//' timed/log.jsonl >1.log && sed 's/, .seconds.*//' counted/log.jsonl | head -n $lines >2.log && cmp 1.log 2.log"

mkdir disk
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=900k tmpfs disk 2>/dev/null; then
    mounted="$mounted $folder/disk"
    refuses 'a full disk' 1 'No space left' "$train" $few a.jsonl --steps 100 --save-every 5 --keep 0 --out disk/run
    check 'a full disk leaves nothing half written' 'leftover' test ! -e disk/run/.checkpoint.part
    mount -o remount,size=20m "$folder/disk"
    check 'after a full disk the last checkpoint is good' 'status' "$train" --resume --out disk/run --keep 2
    check 'and each step stands once' 'steps' each_step disk/run 100
else
    echo 'skip a full disk: no small file system can be mounted here'
fi

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
