#!/bin/sh
# dpo from end to end. Prints `ok NAME`, `FAIL NAME: why` or `skip NAME: why`, and last
# `N passed, N failed`.
. "$(dirname "$0")/programs_lib.sh"

"$train" $few a.jsonl --val v.jsonl --steps 20 --save-every 5 --eval-every 10 --keep 2 --out one >/dev/null 2>&1
"$train" $few a.jsonl --steps 20 --seed 1 --eval-every 0 --out seed >/dev/null 2>&1
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
check 'dpo: --dry-run computes nothing' 'folder' sh -c "'$dpo' $prefer --dry-run --out dry | grep -q '120 for training, 40 for validation' && test ! -e dry"
check 'dpo: --val-fraction' 'pairs' sh -c "'$dpo' pairs-train.jsonl --init one --val-fraction 0.25 --dry-run | grep -q '90 for training, 30 for validation'"
refuses 'dpo: a unit beyond the vocabulary' 1 "pairs-stray.jsonl:121: 'rejected': unit 1 is 100, expected below 100" "$dpo" pairs-stray.jsonl --init one --out none
refuses 'dpo: units, not pairs' 1 "a.jsonl:1: 'prompt' is missing" "$dpo" a.jsonl --init one --out none
refuses 'dpo: a token shard' 1 'small.bin: expected preference pairs' "$dpo" small.bin --init one --out none
refuses 'dpo: no model' 1 '\-\-init: no model' sh -c "mkdir -p bare && cd bare && exec '$dpo' ../pairs-train.jsonl"
refuses 'dpo: a longer context than the model has' 1 'context 512.*256' "$dpo" pairs-train.jsonl --init one --context 512 --out none
refuses 'dpo: --val and --val-fraction' 2 'val-fraction' "$dpo" $prefer --val-fraction 0.1
refuses 'dpo: a folder that holds a run' 1 'd1.*--resume.*another' "$dpo" $prefer --out d1
refuses 'dpo: resume with another beta' 1 'beta 0.5.*0.1' "$dpo" --resume --out d1 --beta 0.5
refuses 'dpo: resume with a shared prompt' 1 'share-prompt 1.*none' "$dpo" --resume --out d1 --share-prompt
refuses 'dpo: resume with other pairs' 1 'pairs-val.jsonl.*pairs-train.jsonl' "$dpo" pairs-val.jsonl --resume --out d1
refuses 'dpo: resume with a lower limit' 1 'epochs 1.*2.*grow' "$dpo" --resume --out d1 --epochs 1
sed 's/"rejected": .*/"rejected": {"units": [1]}}/; s/"chosen": {[^}]*}/"chosen": {"units": [1]}/' pairs-val.jsonl >pairs-same.jsonl
refuses 'dpo: pairs of which none can be used' 1 'no pairs left to train on.*skipped: 40 with identical completions' "$dpo" pairs-same.jsonl --init one --out none
refuses 'dpo: validation pairs of which none can be used' 1 'pairs-same.jsonl: contains no pairs.*skipped: 40 with identical' "$dpo" pairs-train.jsonl --val pairs-same.jsonl --init one --out none
unwritable 'dpo' --out "$dpo" pairs-train.jsonl --init one
check 'dpo: leaves nothing' 'folder' test ! -e none

long="$prefer --steps 200"
"$dpo" $long --out dw >/dev/null 2>&1
"$dpo" $long --out dk >/dev/null 2>&1 &
process=$!
halt_at_step $process dk 57
kill -9 $process
wait $process 2>/dev/null
cp dk/reference.safetensors kept.safetensors
"$dpo" --resume --out dk >resumed.out 2>&1
check 'dpo: kill -9 and --resume: as if never stopped' 'differ' same_runs dw dk
check 'dpo: the reference is not computed again' 'it is' sh -c "! grep -q '^reference' resumed.out && cmp kept.safetensors dk/reference.safetensors && cmp kept.safetensors dw/reference.safetensors"
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
rm dd/reference.safetensors
"$dpo" --resume --out dd >dd.out 2>&1
check 'dpo: a missing reference is computed again' 'other' sh -c "grep -q '^reference 160 pairs' dd.out && cmp kept.safetensors dd/reference.safetensors"
check 'dpo: and the run is the same' 'differ' same_runs dw dd
head -c 1000 dt/reference.safetensors >dd/reference.safetensors
refuses 'dpo: a damaged reference' 1 'dd/reference.safetensors' "$dpo" --resume --out dd --steps 210
rm dd/reference.safetensors
mv one gone
refuses 'dpo: the model that is the reference is gone' 1 'one/step_.*config.json' "$dpo" --resume --out dd --steps 210
cp -r seed one && ln -sfn step_000020 one/latest && mv one/step_000020 "one/$(basename "$(readlink gone/latest)")" 2>/dev/null
refuses 'dpo: or another one' 1 'is not the model that this run was begun with' "$dpo" --resume --out dd --steps 210
rm -r one && mv gone one

# A kill while the reference is computed: the pass is repeated.
i=0
while [ $i -lt 60 ]; do cat pairs-train.jsonl pairs-val.jsonl; i=$((i + 1)); done >many.jsonl
"$dpo" many.jsonl --init one --threads 1 --steps 2 --out rw >whole.out 2>&1
for signal in 9 TERM; do
    : >rk.out # before the program starts, or the loop finds the line of the run before
    "$dpo" many.jsonl --init one --threads 1 --steps 2 --resume --out rk >rk.out 2>&1 &
    process=$!
    while ! grep -q '^run' rk.out && kill -0 $process 2>/dev/null; do sleep 0.01; done
    sleep 0.1
    kill -$signal $process
    wait $process 2>/dev/null
done
check 'dpo: SIGTERM while the reference is computed' 'no word' grep -q 'stopped before the first step' rk.out
"$dpo" many.jsonl --init one --threads 1 --steps 2 --resume --out rk >rk.out 2>&1
check 'dpo: after kills the same reference and the same run' 'differ' sh -c "cmp rw/reference.safetensors rk/reference.safetensors && cmp rw/latest/model.safetensors rk/latest/model.safetensors"

end
