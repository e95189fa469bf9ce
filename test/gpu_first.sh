#!/bin/sh
# test/gpu_first.sh: `make gpu-first`, for a GPU that is there for ten minutes. What is most likely to be wrong comes first, then what is
# most wanted: it builds; sums of ones; every operation, and whole models, against the CPU; 200 steps twice and resumed, bit by bit
# (test_gpu.sh); then ceilings, matrix products, the training step, attention, what moves bytes, PyTorch beside them (gpu_bench.sh); and
# compute-sanitizer in the time that is left. Everything goes to RESULTS/gpu-first-DATE-GPU.txt as soon as it is known.
#
# In the environment: MAKE, BUILD (the build folder), MPIRUN, BUDGET (530 seconds for everything), RESULTS (test/results), PYTHON.
# DRY=1: with the emulator in place of a GPU, and tiny shapes.
cd "$(dirname "$0")/.." || exit 1
began=$(date +%s)
budget=${BUDGET:-530} build=${BUILD:?} results=${RESULTS:-${DRY:+build}}
results=${results:-test/results}
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
test_cuda=$build/gpu_test bench=$build/gpu_bench programs="gpu-programs train dpo" train=./train dpo=./dpo small=''
if [ "$DRY" ]; then
    gpu='emulated GPU' test_cuda=$build/test_cuda bench=$build/gpu_bench-emulated train=./train-emulated dpo=./dpo-emulated small=--small
    programs="$test_cuda $bench train-emulated dpo-emulated"
    cat >"$scratch/model.json" <<'J'
{"model_type": "qwen2", "vocab_size": 102, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
 "intermediate_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": true}
J
    export STEPS=4 DTYPES=bf16 OPTIONS="--model $scratch/model.json --context 32 --batch 2" OPERATIONS='model: gradients' TORCH='--small --device cpu'
fi
mkdir -p "$results" || exit 1
report=$results/gpu-first-$(date -u +%Y-%m-%d)-$(echo "${gpu:-unknown GPU}" | sed 's/NVIDIA //; s/[^A-Za-z0-9]\{1,\}/-/g').txt
echo "First run on ${gpu:-an unknown GPU}; $(date -u +%Y-%m-%d); commit ${COMMIT:-$(git describe --always --dirty 2>/dev/null)}" | tee "$report"

left() { echo $((budget - $(date +%s) + began)); }
# stage TITLE SECONDS COMMAND...: with what is left of the time as its BUDGET, or so many seconds
stage() {
    title=$1 limit=$2
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 10 ]; then
        echo "== $title: skipped, the $budget seconds are used up" | tee -a "$report"
        return
    fi
    echo "== $title, after $(($(date +%s) - began)) s" | tee -a "$report"
    { BUDGET=$limit RESULTS=$scratch "$@" 2>&1 </dev/null; echo $? >"$scratch/status"; } | grep --line-buffered -v '^written to' | tee -a "$report"
    [ "$(cat "$scratch/status")" = 0 ] || { echo "== $title: FAILED" | tee -a "$report" && broken=1; }
}
# shellcheck disable=SC2086 # several words
build() { ${MAKE:-make} -j"$(nproc)" $programs >"$scratch/make" 2>&1 || { tail -n 20 "$scratch/make" && return 1; }; }

stage 'it builds' 400 build
[ ! "$broken" ] || exit 1
stage 'right' 200 env PARTS='ones operations bits' sh test/test_gpu.sh "$test_cuda" "$train" "$dpo"
stage 'fast' 400 env PARTS='ceilings products step attention memory torch' sh test/gpu_bench.sh "$bench" $small
[ "$DRY" ] || stage 'compute-sanitizer' 120 env PARTS=sanitizer sh test/test_gpu.sh "$test_cuda"
echo "== $(($(date +%s) - began)) s; written to $report" | tee -a "$report"
[ ! "$broken" ]
