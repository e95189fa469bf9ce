#!/bin/sh
# train from end to end. Prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why`, and last
# `N passed, N failed`.
. "$(dirname "$0")/programs_lib.sh"

# ---- flags ----

for program in train eval tokenize dpo; do
    check "$program --help" 'status' "$programs/$program" --help
    check "$program --version" 'no version' sh -c "'$programs/$program' --version | grep -q '[0-9]\.[0-9]'"
    refuses "$program: an unknown flag" 2 'nosuch' "$programs/$program" --nosuch
done
for program in train dpo; do "$programs/$program" --help | awk 'length($0) > 80 { bad = 1; print } END { exit bad }'; done >wide.txt
check 'help fits 80 columns' "$(head -n 1 wide.txt)" test ! -s wide.txt
refuses 'an mpirun that is not its own' 1 'mpirun started 4 processes' env PMI_SIZE=4 ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" "$train" --dry-run
refuses 'an srun without --mpi' 1 'srun started 4 processes' env SLURM_STEP_NUM_TASKS=4 "$train" --dry-run
refuses 'a flag without its value' 2 'lr' "$train" a.jsonl --lr
refuses 'a value that is no number' 2 'lr' "$train" a.jsonl --lr fast
refuses 'a wrong choice' 2 'schedule' "$train" a.jsonl --schedule wavy
refuses 'a wrong warm-up' 2 'warmup' "$train" a.jsonl --warmup soon
refuses '--time 0' 2 'time' "$train" a.jsonl --time 0
refuses 'a device of no kind' 2 'device abc' "$train" a.jsonl --device abc
refuses 'eval on a device of no kind' 2 'device cuda:x' "$eval" ppl a.jsonl --device cuda:x
refuses 'weights that are no numbers' 2 'weights abc' "$train" a.jsonl --weights abc
refuses 'weights that are too few' 2 'weights' "$train" a.jsonl b.jsonl --weights 1 --steps 1
refuses 'a weight that gives no chunk' 1 'gives no chunk' "$train" $few small.bin --weights 0.01 --steps 1 --out light
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
head -n 1 b.jsonl >one.jsonl
check 'a source of one document has nothing to hold out' 'sources' sh -c "'$train' $few a.jsonl one.jsonl --val-fraction 0.1 --steps 2 --eval-every 2 --out lone &&
    grep -q '\"a.jsonl\": [0-9.]*, \"one.jsonl\": null' lone/log.jsonl"
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

# ---- outputs that cannot be written, lost terminals ----

unwritable 'train' --out "$train" $few a.jsonl --steps 2
check 'train: a parent that is not there is made' 'status' "$train" $few a.jsonl --steps 1 --out deep/er/run
if [ "$may_mount" ]; then
    refuses 'train in a read-only folder' 1 'runs: cannot be written: .*Read-only.*--out DIR' sh -c "cd readonly && exec '$train' ../a.jsonl"
else
    skip 'outputs on a full or read-only disk' 'none can be mounted'
fi
"$train" $few a.jsonl --steps 100000 --out hangup >hangup.out 2>&1 &
process=$!
halt_at_step $process hangup 20
kill -HUP $process
kill -HUP $process
kill -CONT $process
wait $process
check 'SIGHUP ends well, also twice' "status $?: $(tail -n 1 hangup.out)" test $? -eq 0
check 'and saves the step it finished' 'no checkpoint' test -d "hangup/step_$(printf %06d "$(grep -c '"loss"' hangup/log.jsonl)")"
(trap '' HUP && exec "$train" $few a.jsonl --steps 60 --out nohup >nohup.out 2>&1) &
process=$!
halt_at_step $process nohup 20
kill -HUP $process
kill -CONT $process
wait $process
check 'under nohup SIGHUP changes nothing' "status $?" test "$(readlink nohup/latest)" = step_000060
{ "$train" $few a.jsonl --steps 60 --log-every 1 --out piped && echo ended >piped.end; } 2>/dev/null | head -n 1 >/dev/null
check 'a closed stdout: only the output is lost' 'the run is' test "$(readlink piped/latest)" = step_000060 -a -f piped.end

# ---- bytes of paths, locales, terminals, machines ----

odd=$(printf 'd\351p\377\303\251') # not UTF-8
mkdir "$odd"
if [ -d "$odd" ]; then
    cp a.jsonl "$odd/$odd.jsonl" && cp v.jsonl "$odd/v.jsonl" && cp model.json "$odd"
    "$train" $start --model "$odd/model.json" "$odd/$odd.jsonl" --val "$odd/v.jsonl" --steps 2 --eval-every 2 --out "$odd/run" >/dev/null 2>&1
    check 'paths that are not UTF-8: --resume' 'lost' "$train" --resume --out "$odd/run" --steps 4
    check 'paths that are not UTF-8: eval' 'lost' "$eval" "$odd/run" ppl
    check 'paths that are not UTF-8: --init, --resume' 'lost' sh -c "'$train' $start '$odd/$odd.jsonl' --init '$odd/run' --steps 2 --out '$odd/more' && '$train' --resume --out '$odd/more' --steps 3"
fi
mkdir locales
for locale in de_DE fr_FR; do localedef -i $locale -f UTF-8 "locales/$locale.UTF-8" >/dev/null 2>&1; done
for locale in de_DE.UTF-8 fr_FR.UTF-8; do
    if [ "$(LOCPATH=$folder/locales LC_ALL=$locale locale decimal_point 2>/dev/null)" != , ]; then
        skip "the same bytes in $locale" 'localedef cannot make this locale'
        continue
    fi
    check "the same bytes in $locale" 'differ' env LOCPATH="$folder/locales" LC_ALL=$locale sh -c "
        '$train' $few a.jsonl --val v.jsonl --steps 5 --eval-every 5 --lr 2.5e-3 --out comma && '$train' --resume --out comma --steps 8 --lr 0.0025 && '$eval' comma ppl --json comma.json"
    [ -d point ] || "$train" $few a.jsonl --val v.jsonl --steps 5 --eval-every 5 --lr 2.5e-3 --out point >/dev/null 2>&1
    "$train" --resume --out point --steps 8 >/dev/null 2>&1
    "$eval" point ppl --json point.json >/dev/null 2>&1
    check "the same bytes in $locale: files" 'differ' sh -c "cmp comma.json point.json && cmp comma/latest/model.safetensors point/latest/model.safetensors && cmp comma/latest/config.json point/latest/config.json && grep -q '\"lr\": \"0.0025\"' comma/latest/trainer.json"
    rm -rf comma
done
# in_terminal COLUMNS COMMAND: what it prints, a line for each time that a line is begun
in_terminal() { script -qec "stty cols $1; $2" /dev/null 2>/dev/null </dev/null | tr '\r' '\n' | sed "s/$(printf '\033')\[K//"; }
if in_terminal 40 true >/dev/null 2>&1; then
    in_terminal 40 "'$train' $few a.jsonl --steps 400 --out narrow" >narrow.out
    check 'a progress bar of 40 columns' "$(grep -m 1 '^\[\|^step .*left' narrow.out)" awk '/left$/ || /^\[[#-]/ { n++; if (length($0) > 39) bad = 1 } END { exit bad || !n }' narrow.out
    in_terminal 80 "'$train' $few a.jsonl --tokens 2e8 --dry-run" >plan.out
    check '--tokens shows its progress' "$(tail -n 1 plan.out)" grep -q 'plan  steps for .* tokens' plan.out
else
    skip 'progress bars' 'script is not installed'
fi
if printf 'int x;' | ${CC:-cc} -mavx2 -fsyntax-only -x c - 2>/dev/null; then
    ${CC:-cc} -O0 -mavx2 '-D__builtin_cpu_supports(set)=0' -x c "$root/slam.cu" "$root/train.c" -o older -lm 2>older.log
    refuses 'a CPU older than the one that it was built for' 1 'this CPU does not have avx.*make CFLAGS=' ./older --version
else
    skip 'an older CPU' 'no compiler for x86-64'
fi
if ${CC:-cc} -m32 -ffreestanding -fsyntax-only -I "$root" -x c - </dev/null 2>/dev/null; then
    printf '#include "slam.h"\n' | ${CC:-cc} -m32 -ffreestanding -fsyntax-only -I "$root" -x c - 2>narrow.log
    check 'a 32-bit build' "$(head -n 1 narrow.log)" grep -q 'error.*64-bit' narrow.log
else
    skip 'a 32-bit build' 'no compiler for it'
fi

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
check 'but where it is told to' 'note' sh -c "'$train' --resume --out more --device cpu --steps 30 >moved.out && grep -q 'the run was on cuda before' moved.out"
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
while ! grep -q '^schedule' both.out; do kill -0 $process 2>/dev/null && sleep 0.01 || break; done
kill -STOP $process
"$train" $few a.jsonl --steps 2 --out both >/dev/null 2>&1
cp -r both first
kill -CONT $process
wait $process
check 'a run that another process has begun meanwhile' "status $?: $(cat both.err)" grep -q 'both: another process has trained this run meanwhile' both.err
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

if mount_at disk size=900k; then
    refuses 'a full disk' 1 'No space left' "$train" $few a.jsonl --steps 100 --save-every 5 --keep 0 --out disk/run
    check 'a full disk leaves nothing half written' 'leftover' test ! -e disk/run/.checkpoint.part
    mount -o remount,size=20m "$folder/disk"
    check 'after a full disk the last checkpoint is good' 'status' "$train" --resume --out disk/run --keep 2
    check 'and each step stands once' 'steps' each_step disk/run 100
else
    echo 'skip a full disk: no small file system can be mounted here'
fi

end
