#!/bin/sh
# train and dpo as several ranks: the numbers of one process, whatever their number; checkpoints that do not tell it; deaths.
. "$(dirname "$0")/ranks.sh"
train=$root/train dpo=$root/dpo eval=$root/eval

# close NAME TOLERANCE RUN OTHER: both logs have the same steps and tokens, losses and norms that differ by no more
close() {
    awk -v tolerance="$2" '
        { gsub(/[",:{}]/, " "); key = $2 " " ($3 == "tokens" ? $4 : $3); value = 0 }
        { for (i = 1; i < NF; i++) if ($i == "loss" || $i == "val_loss") value = $(i + 1) }
        FNR == NR { first[key] = value; n++; next }
        { d = first[key] - value; if (!(key in first) || d > tolerance || d < -tolerance) { bad = key " " first[key] " " value }; m++ }
        END { if (bad || n != m || !n) { print n " and " m " lines: " bad; exit 1 } }' "$3/log.jsonl" "$4/log.jsonl" >close.out 2>&1 &&
        ok "$1" || fail "$1" "$(cat close.out)"
}
# close_weights NAME RUN OTHER: |a - b| <= 1e-3 |a|
close_weights() {
    for run in "$2" "$3"; do od -An -v -tf4 -w4 -j 8192 "$run/latest/model.safetensors" >weights.$(basename "$run"); done
    difference=$(paste "weights.$(basename "$2")" "weights.$(basename "$3")" |
        awk '{ d += ($1 - $2) ^ 2; a += $1 ^ 2 } END { printf "%.2g", sqrt(d / a); exit !(a > 0 && d <= 1e-6 * a) }') &&
        ok "$1 (differ by $difference)" || fail "$1" "they differ by $difference of their norm"
}
same_state() { cmp "$1/latest/model.safetensors" "$2/latest/model.safetensors" && cmp "$1/latest/optimizer.safetensors" "$2/latest/optimizer.safetensors"; }
settings='--context 64 --batch 10 --steps 12 --warmup 4 --lr 1e-4 --eval-every 6 --save-every 4 --keep 0 --threads 1'

# unit PROGRAM RANKS
unit() {
    on "$2" "$root/$B/$1" >unit.out 2>&1
    unit_status=$?
    if [ $unit_status -eq 0 ] && tail -n 1 unit.out | grep -q '^[1-9][0-9]* passed, 0 failed'; then ok "$1 by $2"; else
        fail "$1 by $2" "$(grep FAIL unit.out | head -n 3) $(tail -n 1 unit.out)"
    fi
}
for ranks in 1 3 4; do unit test_ranks $ranks; done
if [ -x "$root/$B/test_ranks_cuda" ]; then unit test_ranks_cuda 3; else echo 'skip test_ranks_cuda: no C++ compiler'; fi

# ---- the same numbers ----

check 'train: one process' "$train" $settings --out r0
for ranks in 2 4; do
    check "train: $ranks ranks" on $ranks "$train" $settings --out r$ranks
    close "train: losses of $ranks ranks" 1e-5 r0 r$ranks
    close_weights "train: weights of $ranks ranks" r0 r$ranks
done
check 'train: 4 ranks once more' on 4 "$train" $settings --out again
check 'train: the same bits' same_state r4 again
check 'train: 4 ranks without ZeRO' on 4 "$train" $settings --zero 0 --out plain
check 'train: the same bits without ZeRO' same_state r4 plain
check 'train: one log, no other folder' sh -c '[ "$(grep -c "\"loss\"" r4/log.jsonl)" = 12 ] && ! ls -d runs* 2>/dev/null'

# ---- checkpoints do not tell how many wrote them ----

check 'resume: 4 ranks stop at step 4' on 4 "$train" $settings --out part
for run in half same; do cp -r part $run && rm -rf $run/step_000008 $run/step_000012 && ln -sfn step_000004 $run/latest; done
check 'resume: 2 go on' on 2 "$train" --resume --out half
close 'resume: saved by 4, resumed by 2' 1e-5 r0 half
check 'resume: 4 go on' on 4 "$train" --resume --out same
check 'resume: by as many, the same bits' same_state r4 same
rm -rf half/step_000008 half/step_000012 && ln -sfn step_000004 half/latest
check 'resume: one process goes on' "$train" --resume --out half
close 'resume: saved by 4, resumed by 1' 1e-5 r0 half
cp -r r0 up && rm -rf up/step_000008 up/step_000012 && ln -sfn step_000004 up/latest
check 'resume: 3 go on' on 3 "$train" --resume --out up
close 'resume: saved by 1, resumed by 3' 1e-5 r0 up

# ---- ends ----

# wait_for_step RUN N: until its log has so many lines
wait_for_step() {
    for _ in $(seq 300); do
        [ -f "$1/log.jsonl" ] && [ "$(wc -l <"$1/log.jsonl")" -ge "$2" ] && return
        sleep 0.1
    done
    return 1
}
# rank_process N RUN: the process of the Nth rank of those that train into RUN
rank_process() { pgrep -f "^$train .*--out $2\$" | sed -n "$1p"; }
# within SECONDS PROCESS: it ends
within() {
    for _ in $(seq $(($1 * 10))); do
        kill -0 "$2" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -9 "$2"
    return 1
}
long='--context 64 --batch 8 --steps 100000 --eval-every 0 --save-every 3 --keep 2 --threads 1'
for victim in 2 1; do
    on 3 "$train" $long --out kill$victim >kill.out 2>&1 &
    runner=$!
    name="kill: rank $((victim - 1)) of 3"
    if wait_for_step kill$victim $((4 + victim)) && kill -9 "$(rank_process $victim kill$victim)" && within 10 $runner; then
        if wait $runner; then fail "$name" 'status 0'; else ok "$name ends all"; fi
    else
        fail "$name" "$(tail -n 3 kill.out)"
    fi
    check "$name: nobody is left" sh -c "! pgrep -f '^$train .*--out kill$victim\$'"
    lines=$(wc -l <kill$victim/log.jsonl)
    on 2 "$train" --resume --out kill$victim >kill.out 2>&1 &
    runner=$!
    if wait_for_step kill$victim $((lines + 2)) && kill -TERM "$(rank_process 2 kill$victim)" && within 10 $runner && wait $runner; then
        ok "$name: 2 go on"
    else
        fail "$name: 2 go on" "$(tail -n 3 kill.out)"
    fi
    check "$name: each step once" sh -c "grep -o '\"step\": [0-9]*' kill$victim/log.jsonl | awk '\$2 != NR { exit 1 } END { if (NR < 5) exit 1 }'"
done
on 3 "$train" $long --out stop >stop.out 2>&1 &
runner=$!
if wait_for_step stop 4 && kill -TERM "$(rank_process 3 stop)" && within 10 $runner && wait $runner; then
    ok 'SIGTERM to one rank stops all, status 0'
else
    fail 'SIGTERM to one rank stops all' "$(tail -n 3 stop.out)"
fi
check 'SIGTERM: the last step is saved' sh -c '[ "$(tail -n 1 stop/log.jsonl | sed "s/[^0-9]*\([0-9]*\).*/\1/")" = "$(readlink stop/latest | sed "s/step_0*//")" ]'

# says NAME COUNT PATTERN COMMAND...: it fails, and says so, so many times
says() {
    says_name=$1 says_count=$2 says_pattern=$3
    shift 3
    if "$@" >says.out 2>&1; then fail "$says_name" 'status 0'; else
        says_got=$(grep -c "$says_pattern" says.out)
        if [ "$says_got" = "$says_count" ]; then ok "$says_name"; else fail "$says_name" "$says_got times '$says_pattern': $(grep error: says.out | head -n 2)"; fi
    fi
}
says 'an error of all is said once' 1 'error: .*nowhere' on 3 "$train" nowhere.bin --steps 2
says 'a wrong flag is said once' 1 'error: --stepz' on 3 "$train" --stepz 2
says 'fewer rows than ranks' 1 'error: --batch 2: fewer than the 3 ranks' on 3 "$train" --batch 2
says '--ranks without --dry-run' 1 'mpirun -np 4' "$train" --ranks 4
# the second rank does not see what the others see
cp "$root/test/corpus/val.bin" mine.bin && cp "$root/test/corpus/train.bin" yours.bin
cat >odd.sh <<END
#!/bin/sh
[ "\${OMPI_COMM_WORLD_RANK:-\$PMI_RANK}" = 1 ] && exec "$train" mine.bin "\$@"
exec "$train" yours.bin "\$@"
END
says 'ranks that see other data' 1 'do not see the same data' on 2 sh odd.sh --vocab 102 --model tiny $settings --out odd
sed -i 's/mine.bin/gone.bin/' odd.sh
says 'one rank alone fails' 1 'error: rank 1: .*gone.bin' on 2 sh odd.sh --vocab 102 --model tiny $settings --out odd
mkdir -p wall && ln -s /dev/full wall/log.jsonl 2>/dev/null
says 'a log that cannot be written ends all' 1 'error: .*log.jsonl' on 2 "$train" $settings --resume --out wall

# ---- preferences ----

pairs='--batch 6 --steps 4 --eval-every 2 --lr 1e-4 --threads 1'
check 'dpo: one process' "$dpo" --init r0 $pairs --out d0
check 'dpo: 4 ranks' on 4 "$dpo" --init r0 $pairs --out d4
close 'dpo: losses of 4 ranks' 1e-5 d0 d4
check 'dpo: the same reference, bit by bit' cmp d0/reference.bin d4/reference.bin

# ---- the plan ----

check 'plan: four ranks' sh -c "'$train' --dry-run --ranks 4 --threads 1 --flops 1e11 --bandwidth 1e9 >plan.out && grep -q 'optimiser 1.6,' plan.out &&
    grep -q '4 of 4 rows' plan.out && grep -q 'step .* = compute .* + reduce .* + gather' plan.out"
on 4 "$train" --dry-run --threads 1 >four.out
check 'plan: four ranks plan the same' sh -c 'grep -A 1 "^memory" plan.out >plan.1 && grep -A 1 "^memory" four.out | tr -d "\r" >plan.2 && cmp plan.1 plan.2'
end
