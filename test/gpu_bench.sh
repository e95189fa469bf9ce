#!/bin/sh
# test/gpu_bench.sh GPU_BENCH [OPTIONS for it]: `make gpu-bench`. Measures the CUDA operations and the Slam model's training step
# (gpu_bench.cu, one process for each part), then PyTorch's (bench_torch.py) in the same run, and sets them beside each other and
# beside what is to be reached. Prints all of it, the comparison last, and keeps it as RESULTS/gpu-DATE-GPU.txt.
#
# In the environment: PARTS (in their order: "ceilings step attention products memory hubert generate torch"), PYTHON (python3; with
# torch and transformers), BUDGET (450 seconds for everything), RESULTS (test/results), COMMIT (what git says), TORCH (options for
# bench_torch.py). A part that fails or takes too long loses its own metrics only; what is measured is kept after each.

if [ ! -x "${1:-}" ]; then
    echo 'gpu_bench.sh: no program: make gpu-bench' >&2
    exit 1
fi
case $1 in /*) program=$1 ;; *) program=$PWD/$1 ;; esac
shift
cd "$(dirname "$0")/.." || exit 1
began=$(date +%s)
budget=${BUDGET:-450} python=${PYTHON:-python3}
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
keys=$scratch/keys report=$scratch/report
touch "$keys" "$report"

left() { echo $((budget - $(date +%s) + began)); }
value() { awk -v key="$1" '$1 == key { v = $2 } END { print v }' "$keys"; }
say() { echo "$*" | tee -a "$report"; }
keep() { # writes the report to its file
    [ "$gpu" != 'unknown GPU' ] || gpu=$(sed -n 's/^on cuda:[0-9]* //p' "$report" | head -n 1)
    results=${RESULTS:-test/results}
    file=$results/gpu-$(date -u +%Y-%m-%d)-$(echo "${gpu:-unknown GPU}" | sed 's/NVIDIA //; s/[^A-Za-z0-9]\{1,\}/-/g').txt
    [ ! -s "$keys" ] || { mkdir -p "$results" && cp "$report" "$file"; }
}
# part TITLE SECONDS COMMAND...: runs it for so long at most, or for what is left
part() {
    part_title=$1 part_limit=$2
    shift 2
    say "" && say "---- $part_title ----"
    [ "$part_limit" -le "$(left)" ] || part_limit=$(left)
    if [ "$part_limit" -lt 5 ]; then
        say "skipped: the $budget seconds are used up"
        return
    fi
    if command -v timeout >/dev/null; then set -- timeout -k 5 "$part_limit" "$@"; fi
    { "$@" </dev/null 2>"$scratch/err"; echo $? >"$scratch/status"; } | tee -a "$report"
    part_status=$(cat "$scratch/status")
    keep
    [ "$part_status" != 0 ] || return
    case $part_status in
    124 | 137) say "FAILED: stopped after $part_limit s" ;;
    *) say "FAILED: status $part_status" ;;
    esac
    tail -n 5 "$scratch/err" | cut -c 1-300 | tee -a "$report"
}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[ "$gpu" ] || gpu='unknown GPU'
commit=${COMMIT:-$(git describe --always --dirty 2>/dev/null)}
cuda=$("${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
say "Operations and training step on the GPU, bf16; $gpu; $(date -u +%Y-%m-%d); commit ${commit:-unknown}; driver ${driver:-unknown}, CUDA ${cuda:-unknown}"

for name in ${PARTS:-ceilings step attention products memory hubert generate torch}; do
    copy=$(value copy) peak=$(value peak) options="--keys $keys --copy ${copy:-0} --peak ${peak:-0} $*"
    case $name in
    ceilings) title=ceilings seconds=60 ;;
    step) title='training step of the Slam model' seconds=120 options="--seconds 60 $options" ;;
    attention) title=attention seconds=45 options="--seconds 30 $options" ;;
    products) title='matrix products of the model: first proposed, measured, of peak' seconds=60 options="--seconds 40 $options" ;;
    memory) title='operations that move bytes' seconds=45 options="--seconds 30 $options" ;;
    hubert) title="HuBERT's units" seconds=40 options="--seconds 30 $options" ;;
    generate) title='generation by the Slam model' seconds=40 options="--seconds 30 $options" ;;
    esac
    # shellcheck disable=SC2086 # several words
    [ "$name" = torch ] || part "$title" $seconds "$program" "$name" $options
    [ "$name" = torch ] || continue
    if "$python" -c 'import torch, transformers' 2>"$scratch/err"; then
        # PyTorch ends by itself a while before it would be stopped
        # shellcheck disable=SC2086 # TORCH is several words
        part 'attention by PyTorch' 60 "$python" test/bench_torch.py --gpu attention --seconds 45 --keys "$keys" $TORCH
        rest=$(($(left) - 10))
        # shellcheck disable=SC2086
        part 'training step by Transformers' $rest "$python" test/bench_torch.py --gpu step --seconds $((rest - 15)) --keys "$keys" $TORCH
    else
        say ""
        say "PyTorch and Transformers are skipped: $(tail -n 1 "$scratch/err" | cut -c 1-200)"
    fi
done

# ---- beside each other ----

say ""
say "---- compared ----"
awk -v gpu="$gpu" '
function row(what, ours, theirs, ratio, target) {
    printf "%-58s %10s %10s %7s   %s\n", what, ours, theirs, ratio, target
}
function verdict(ratio, target) { return ratio + 0 >= target + 0 ? "reached" : "missed" }
function against(what, ours, theirs, ratio, target) { # ratio > 1: ours is faster
    if (!ours) row(what, "-", theirs ? theirs : "-", "-", "not measured")
    else if (!theirs) row(what, ours, "-", "-", "not measured")
    else row(what, ours, theirs, sprintf("%.2f", ratio), target ? sprintf("%.1f: %s", target, verdict(ratio, target)) : "")
}
function ms(x) { return x ? sprintf("%.3f", x) : "" }
function best(prefix, suffix,    k, most) { # also leaves its key in `where`
    where = ""
    for (k in v) if (index(k, prefix) == 1 && (suffix == "" || substr(k, length(k) - length(suffix) + 1) == suffix) && v[k] > most) { most = v[k]; where = k }
    return most ? int(most + 0.5) : ""
}
{ v[$1] = $2 }
END {
    row("what", "slam", "other", "ratio", "to reach")
    packed = best("step/", "/packed"); at = where; gsub("[^0-9]", "", at)
    target = gpu ~ /H[12]00/ ? 203000 : 0 # the efficiency that LLM.Q publishes, 463 TFLOP/s, on these shapes
    row("training step, tokens/s, packed, micro-batch " at, packed ? packed : "-", "", "", target ? sprintf("%d: %s", target, verdict(packed, target)) : "")
    if (packed && v["peak"]) row("  share of the measured peak at 2.28 GFLOP a token", sprintf("%.0f%%", packed * 2.28e-3 / v["peak"] * 100), "", "", "")
    if (gpu ~ /H100/) against("  beside LLM.Q: 149000 published for Qwen2.5-0.5B, derived", packed, 203000, packed / 203000, 1.0)
    whole = best("step/", "/whole")
    theirs = best("torch/step/compile/", ""); w = where; sub("torch/step/", "", w)
    against("  whole rows, beside Transformers " w, whole, theirs, theirs ? whole / theirs : 0, 1.5)
    theirs = best("torch/step/compile_bf16/", ""); w = where; sub("torch/step/", "", w)
    against("  whole rows, beside Transformers " w, whole, theirs, theirs ? whole / theirs : 0, 0)
    theirs = best("torch/step/eager/", ""); w = where; sub("torch/step/", "", w)
    against("  whole rows, beside Transformers " w, whole, theirs, theirs ? whole / theirs : 0, 0)
    m = v["step/memory/8"]
    h = v["hubert"]
    if (h) row("HuBERT units, audio seconds a second", int(h), "", "", "10000: " verdict(h, 10000))
    if (v["generate/64"]) row("generation, 64 prompts at once, new tokens/s", int(v["generate/64"]), "", "", "")
    if (m) row("memory in use, micro-batch 8 x 1024, GB", sprintf("%.1f", m), "", "", "24 GB: " (m < 24 ? "reached" : "missed"))
    for (T = 64; T <= 4096; T *= 2) for (pass = 0; pass < 2; pass++) for (side = 0; side < 2; side++) {
        p = pass ? "backward" : "forward"; name = side ? "cudnn" : "flash"
        o = v["attention/" p "/" T "/whole"]; t = v["torch/attention/" p "/" T "/" name]
        if (o || t) against("attention " p ", T " T ", ms, beside SDPA " name, ms(o), ms(t), o ? t / o : 0, side ? 0 : 1.0)
    }
}' "$keys" | tee -a "$report"
say ""
say "Transformers: Qwen2ForCausalLM, its best of the micro-batches above; compile and eager: float32 weights and bf16 autocast, as slam keeps"
say "them; _bf16: weights in bf16. SDPA: the faster of shared and copied key/value heads. Attention of slam includes the rotation."

[ -s "$keys" ] || exit 1
keep && echo "written to $file"
