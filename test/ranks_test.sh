#!/bin/sh
# train and dpo as several ranks: the numbers of one process, whatever their number; checkpoints that do not tell it; deaths.
. "$(dirname "$0")/ranks.sh"
train=$root/train dpo=$root/dpo eval=$root/eval

# close NAME TOLERANCE RUN OTHER: both logs have the same steps and tokens, losses that differ by no more, and norms by no more of themselves
# (5e-7: sums of float in another order, 2.5e-8 measured)
close() {
    awk -v tolerance="$2" '
        { gsub(/[",:{}]/, " "); key = $2 " " ($3 == "tokens" ? $4 : $3); value = 0; norm = 1 }
        { for (i = 1; i < NF; i++) if ($i == "loss" || $i == "val_loss") value = $(i + 1); else if ($i == "grad_norm") norm = $(i + 1) }
        FNR == NR { first[key] = value; first_norm[key] = norm; n++; next }
        { d = first[key] - value; e = norm > 0 ? first_norm[key] / norm - 1 : 1; m++ }
        !(key in first) || d > tolerance || d < -tolerance || e > tolerance || e < -tolerance {
            bad = key " " first[key] " " value ", norms " first_norm[key] " " norm }
        END { if (bad || n != m || !n) { print n " and " m " lines: " bad; exit 1 } }' "$3/log.jsonl" "$4/log.jsonl" >close.out 2>&1 &&
        ok "$1" || fail "$1" "$(cat close.out)"
}
# close_weights NAME RUN OTHER: |a - b| <= 1e-6 |a| (1.2e-8 measured)
close_weights() {
    for run in "$2" "$3"; do od -An -v -tf4 -w4 -j 8192 "$run/latest/model.safetensors" >weights.$(basename "$run"); done
    difference=$(paste "weights.$(basename "$2")" "weights.$(basename "$3")" |
        awk '{ d += ($1 - $2) ^ 2; a += $1 ^ 2 } END { printf "%.2g", sqrt(d / a); exit !(a > 0 && d <= 1e-12 * a) }') &&
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
for ranks in 1 4; do unit test_ranks $ranks; done
if [ -x "$root/$B/test_ranks_cuda" ]; then unit test_ranks_cuda 3; else echo 'skip test_ranks_cuda: not built'; fi

# ---- the same numbers ----

check 'train: one process' "$train" $settings --out r0
for ranks in 2 4; do
    check "train: $ranks ranks" on $ranks "$train" $settings --out r$ranks
    close "train: losses of $ranks ranks" 5e-7 r0 r$ranks
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
close 'resume: saved by 4, resumed by 2' 5e-7 r0 half
check 'resume: 4 go on' on 4 "$train" --resume --out same
check 'resume: by as many, the same bits' same_state r4 same
rm -rf half/step_000008 half/step_000012 && ln -sfn step_000004 half/latest
check 'resume: one process goes on' "$train" --resume --out half
close 'resume: saved by 4, resumed by 1' 5e-7 r0 half
cp -r r0 up && rm -rf up/step_000008 up/step_000012 && ln -sfn step_000004 up/latest
check 'resume: 3 go on' on 3 "$train" --resume --out up
close 'resume: saved by 1, resumed by 3' 5e-7 r0 up

# ---- ends ----

# wait_for_step RUN N: until its log has so many lines
wait_for_step() {
    for _ in $(seq 300); do
        [ -f "$1/log.jsonl" ] && [ "$(wc -l <"$1/log.jsonl")" -ge "$2" ] && return
        sleep 0.1
    done
    return 1
}
long='--context 64 --batch 8 --steps 100000 --eval-every 0 --save-every 3 --keep 2 --threads 1'
for victim in 1 0; do
    name="kill: rank $victim of 3" run=kill$victim
    starts 3 "$train" $long --out $run
    wait_for_step $run $((4 + victim))
    check "$name ends all" stops KILL $victim any
    lines=$(wc -l <$run/log.jsonl)
    starts 2 "$train" --resume --out $run
    wait_for_step $run $((lines + 2))
    check "$name: 2 go on, TERM to the second stops them" stops TERM 1 0
    check "$name: each step once, the last one saved" sh -c "grep -o '\"step\": [0-9]*' $run/log.jsonl | awk -v latest=\$(readlink $run/latest | sed 's/step_0*//') '\$2 != NR { exit 1 } END { if (NR < 5 || NR != latest) exit 1 }'"
done

check 'an error of all' ends 1 on 3 "$train" nowhere.bin --steps 2
check 'an error of all: said once' once '.*nowhere'
check 'a wrong flag' ends 2 on 3 "$train" --stepz 2
check 'a wrong flag: said once' once '.*--stepz'
check 'fewer rows than ranks' ends 1 on 3 "$train" --batch 2
check 'fewer rows than ranks: said once' once '--batch 2: expected at least the number of ranks, 3'
check '--ranks is for --dry-run' ends 2 "$train" --ranks 4
# the second rank does not see what the others see
mkdir in.1
cp "$root/test/corpus/train.bin" yours.bin && cp "$root/test/corpus/val.bin" in.1/yours.bin
odd="$train yours.bin --vocab 102 --model tiny $settings --out $PWD/odd"
check 'ranks that see other data' ends 1 on 2 ./each $odd
check 'ranks that see other data: said once' once 'the ranks see different data'
rm in.1/yours.bin
check 'one rank sees no data' ends 1 on 2 ./each $odd
check 'one rank sees no data: said once' once 'rank 1: .*yours.bin'
rm -r in.1
mkdir wall && ln -s /dev/full wall/log.jsonl
check 'a log that cannot be written' ends 1 on 2 "$train" "$root/test/corpus/train.bin" $settings --resume --out wall
check 'a log that cannot be written: said once' once '.*log.jsonl: cannot be written'

# ---- preferences ----

pairs='--batch 6 --steps 4 --eval-every 2 --lr 1e-4 --threads 1'
check 'dpo: one process' "$dpo" --init r0 $pairs --out d0
check 'dpo: 4 ranks' on 4 "$dpo" --init r0 $pairs --out d4
close 'dpo: losses of 4 ranks' 5e-7 d0 d4
check 'dpo: the same reference, bit by bit' cmp d0/reference.safetensors d4/reference.safetensors

# ---- CUDA and NCCL, emulated: float weights in parts ----

if [ -x "$train-emulated" ] && [ ! "$SANITIZE" ]; then
    cat >small.json <<'END'
{"model_type": "qwen2", "vocab_size": 102, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
 "intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": true}
END
    emulated="$train-emulated --device cuda --dtype bf16 --model small.json --context 32 --batch 3 --steps 4 --warmup 1 --save-every 2 --keep 0 --eval-every 0 --threads 1"
    check 'bf16: one process' $emulated --out e0
    check 'bf16: 2 ranks' on 2 $emulated --out e2
    # the second rank's algorithms of products take other times, but it uses those of the first
    printf '#!/bin/sh\n[ "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" = 0 ] || export EMULATOR_TIMES="3 2 1"\nexec "$@"\n' >uneven && chmod +x uneven
    check 'bf16: 2 ranks, one of which would choose others' on 2 ./uneven $emulated --out uneven2
    check 'bf16: the same bits' same_state e2 uneven2
    close 'bf16: losses of 2 ranks' 1e-3 e0 e2
    check 'bf16: 2 ranks without ZeRO' on 2 $emulated --zero 0 --out plain2
    check 'bf16: the same bits without ZeRO' same_state e2 plain2
    cp -r e2 on && rm -rf on/step_000004 && ln -sfn step_000002 on/latest
    cp -r on off
    check 'bf16: 2 ranks go on' on 2 "$train-emulated" --resume --out on
    check 'bf16: to the same bits' same_state e2 on
    check 'bf16: one process goes on' "$train-emulated" --resume --out off
    close 'bf16: saved by 2, resumed by 1' 1e-3 e2 off
    export EMULATOR_NCCL_FAILS=1
    check 'NCCL fails on one rank, for which the others wait' ends 1 on 3 $emulated --out never
    check 'NCCL fails on one rank: said once' once 'rank 1: NCCL failed in ncclCommInitRank'
    unset EMULATOR_NCCL_FAILS
    export EMULATOR_NCCL_BREAKS=2
    check 'the network is gone from under one rank in a step' ends 1 on 3 $emulated --out never
    check 'the network is gone: said once' once 'rank 2: NCCL failed in an exchange'
    unset EMULATOR_NCCL_BREAKS
else
    echo 'skip bf16: no train-emulated, or a slow one'
fi

# ---- the plan ----

check 'plan: four ranks' sh -c "'$train' --dry-run --ranks 4 --threads 1 --flops 1e11 --bandwidth 1e9 >plan.out && grep -q 'optimiser 1.6,' plan.out &&
    grep -q '4 of 4 rows' plan.out && grep -q 'step .* = compute .* + reduce .* + gather' plan.out"
on 4 "$train" --dry-run --threads 1 >four.out
check 'plan: four ranks plan the same' sh -c 'grep -A 1 "^memory" plan.out >plan.1 && grep -A 1 "^memory" four.out | tr -d "\r" >plan.2 && cmp plan.1 plan.2'
end
