#!/bin/sh
# test/test_gpu.sh TEST_CUDA [TRAIN [DPO]]: `make gpu-test`, on a machine with a GPU. TEST_CUDA is test/test_cuda.cu built by nvcc,
# TRAIN and DPO the programs built with CUDA (./train, ./dpo). Runs the tests of operations and model on the device, trains, stops,
# resumes and moves small runs between CPU and GPU, learns preferences on both, and repeats the operations' tests under compute-sanitizer. Prints `ok NAME`,
# `FAIL NAME: why` or `skip NAME: why` and last `N passed, N failed`; of TEST_CUDA only what failed or was skipped.
#
# In the environment: MPIRUN (none: no ranks), BUDGET (450 seconds; the sanitizer's tools share what the rest leaves), LOGS (a folder that keeps what the
# programs printed), SANITIZER (path of compute-sanitizer), PARTS (all: "ones operations bits others ranks moves preferences memory
# sanitizer"; others and moves go on from the runs of bits). To try this script elsewhere: DEVICE (cuda), DTYPES ("bf16 f32"), STEPS (200),
# OPTIONS (of train: "--model m.json --context 64 --batch 4"), OPERATIONS (text in the names of TEST_CUDA's tests).

root=$(cd "$(dirname "$0")/.." && pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
test_cuda=$(absolute "${1:-none}") train=$(absolute "${2:-$root/train}") dpo=$(absolute "${3:-$root/dpo}")
device=${DEVICE:-cuda} dtypes=${DTYPES:-bf16 f32} steps=${STEPS:-200} budget=${BUDGET:-450}
half=$((steps / 2))
for program in "$test_cuda" "$train" "$dpo"; do
    [ -x "$program" ] || { echo "test_gpu.sh: error: $program: no such program: make gpu-test"; exit 1; }
done
began=$(date +%s)
folder=${TEST_FOLDER:-$(mktemp -d)} || exit 1
cleanup() {
    cd /
    rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM
[ -z "$LOGS" ] || { mkdir -p "$LOGS" && logs=$(cd "$LOGS" && pwd); }
cd "$folder" || exit 1
logs=${logs:-$folder}
. "$root/test/lib.sh"
# check NAME WHY COMMAND...: ok where the command succeeds
check() {
    check_name=$1 check_why=$2
    shift 2
    if "$@" >check.out 2>&1; then ok "$check_name"; else fail "$check_name" "$check_why; $(tail -n 1 check.out)"; fi
}
part() { # part NAME: is it to run?
    case " ${PARTS:-ones operations bits others ranks moves preferences memory sanitizer} " in *" $1 "*) ;; *) return 1 ;; esac
}
left() { echo $((budget - $(date +%s) + began)); }
limited() { # limited SECONDS COMMAND...
    if command -v timeout >/dev/null; then timeout -k 5 "$@"; else shift && "$@"; fi
}
# run NAME OPTIONS...: trains into folder NAME; a failure is one of the tests, and 1
run() {
    run_name=$1
    shift
    limited 120 "$train" "$@" --out "$run_name" >"$logs/$run_name.out" 2>"$logs/$run_name.err" </dev/null && return
    fail "training $run_name" "status $?: $(head -n 1 "$logs/$run_name.err")"
    return 1
}
# shellcheck disable=SC2086 # OPTIONS is several words
fresh() { # fresh NAME DEVICE DTYPE OPTIONS...: a run of all steps
    fresh_name=$1 fresh_device=$2 fresh_dtype=$3
    shift 3
    run "$fresh_name" $OPTIONS --steps "$steps" --save-every $half --eval-every $half --keep 0 --tune off --device "$fresh_device" \
        --dtype "$fresh_dtype" "$@"
}
step_name() { printf 'step_%06d' "$1"; }
timeless() { sed 's/, "seconds".*//' "$1/log.jsonl"; }
same_logs() {
    timeless "$1" >same.1
    timeless "$2" >same.2
    test -s same.1 && cmp same.1 same.2
}
same_weights() { # same_weights A B STEP
    for file in model optimizer; do cmp "$1/$(step_name "$3")/$file.safetensors" "$2/$(step_name "$3")/$file.safetensors" || return 1; done
}
same_runs() { same_logs "$1" "$2" && same_weights "$1" "$2" "$steps"; }
# near A B FIRST LAST TOLERANCE: the losses of steps FIRST to LAST differ by no more, relatively; says the largest difference
near() {
    grep -h '"loss"' "$2/log.jsonl" "$1/log.jsonl" | awk -v first="$3" -v last="$4" -v tolerance="$5" '{ gsub(",", "")
        if ($2 < first || $2 > last) next
        if (!($2 in loss)) { loss[$2] = $6; next }
        d = $6 / loss[$2] - 1; if (d < 0) d = -d
        n++; if (!(d <= most)) { most = d; at = $2 } }
        END { printf "%d steps, largest difference %.2g at step %d, allowed %g\n", n, most, at, tolerance; exit !(n == last - first + 1 && most <= tolerance) }'
}
# half_of RUN NAME: a copy that ends with the checkpoint in the middle
half_of() {
    cp -RP "$1" "$2" && rm -rf "${2:?}/$(step_name "$steps")" "${2:?}/best" && ln -sfn "$(step_name $half)" "$2/latest"
}
# halt_at_step PROCESS RUN N: waits until the log has N steps, then halts the process; fails where it has ended before
halt_at_step() {
    while ! grep -q "\"step\": $3," "$2/log.jsonl" 2>/dev/null; do kill -0 "$1" 2>/dev/null || return 1; done
    kill -STOP "$1" 2>/dev/null
}
# interrupted NAME SIGNAL STEP DTYPE: a run that got the signal after that step and went on; fails where it could not be caught
# shellcheck disable=SC2086
interrupted() {
    "$train" $OPTIONS --steps "$steps" --save-every $half --eval-every $half --keep 0 --tune off --device "$device" --dtype "$4" --out "$1" \
        >"$logs/$1.out" 2>"$logs/$1.err" </dev/null &
    process=$!
    halt_at_step $process "$1" "$3" || { wait $process; return 1; }
    kill "-$2" $process
    kill -CONT $process
    wait $process 2>/dev/null
    [ ! -d "$1/$(step_name "$steps")" ] && run "$1" --resume
}

# ---- is there a device? ----

if ! limited 60 "$train" --device "$device" --steps 1 --dry-run >"$logs/plan.out" 2>"$logs/plan.err"; then
    echo "test_gpu.sh: no GPU that train can use: $(head -n 1 "$logs/plan.err")"
    exit 1
fi
echo "on $(sed -n 's/^device *//p' "$logs/plan.out")"

# ---- operations and model against the CPU ----

# tests NAME SECONDS TEXT: those of TEST_CUDA whose names contain TEXT
tests() {
    tests_limit=$2
    CHECK_ONLY=$3 limited "$tests_limit" "$test_cuda" >"$logs/test_cuda.out" 2>"$logs/test_cuda.err" </dev/null
    status=$?
    good=$(grep -c '^ok ' "$logs/test_cuda.out") bad=$(grep -c '^FAIL ' "$logs/test_cuda.out")
    passed=$((passed + good)) failed=$((failed + bad))
    grep -v '^ok \|^[0-9]* passed, [0-9]* failed' "$logs/test_cuda.out" | head -n 60
    case $status in
    0 | 1) [ "$(tail -n 1 "$logs/test_cuda.out")" = "$good passed, $bad failed" ] || status=early ;;
    124 | 137) status="stopped after $tests_limit s" ;;
    esac
    if [ "$status" = 0 ] && [ "$good" -gt 0 ]; then
        echo "ok $1: $good tests"
    elif [ "$status" != 1 ]; then
        fail "$1" "$good ok, $bad failed, then it ended ($status): $(tail -n 1 "$logs/test_cuda.err")"
    fi
}
part ones && tests 'sums of ones, split and whole' 60 ' ones'
part operations && tests 'operations and model' $(($(left) / 3)) "$OPERATIONS"

# ---- the same seed, the same bytes ----

for dtype in $dtypes; do
    part bits && fresh "$dtype" "$device" "$dtype" && fresh "$dtype-2" "$device" "$dtype" || continue
    check "$dtype: two runs have the same log" 'differ' same_logs "$dtype" "$dtype-2"
    check "$dtype: and the same weights and moments in the middle" 'differ' same_weights "$dtype" "$dtype-2" $half
    check "$dtype: and at the end" 'differ' same_weights "$dtype" "$dtype-2" "$steps"
    if interrupted "$dtype-term" TERM $((steps / 4)) "$dtype"; then
        check "$dtype: SIGTERM and --resume, as if never stopped" 'differ' same_runs "$dtype" "$dtype-term"
    else
        echo "skip $dtype: SIGTERM and --resume: it ended before it could be stopped"
    fi
    if interrupted "$dtype-kill" KILL $((half + 2)) "$dtype"; then
        check "$dtype: kill -9 and --resume, as if never stopped" 'differ' same_runs "$dtype" "$dtype-kill"
    else
        echo "skip $dtype: kill -9 and --resume: it ended before it could be stopped"
    fi
    if fresh "$dtype-tuned" "$device" "$dtype" --tune on && half_of "$dtype-tuned" "$dtype-kept" && run "$dtype-kept" --resume; then
        check "$dtype: --resume with the measured algorithms, as if never stopped" 'differ' same_runs "$dtype-tuned" "$dtype-kept"
        sed -n 's/^products /measured: /p' "$logs/$dtype-tuned.out"
    fi
done

# ---- the same run in other parts ----

first=${dtypes%% *}
part others && fresh recompute "$device" "$first" --recompute && check "$first: --recompute changes no bit" 'differ' same_runs "$first" recompute
rows=$(sed -n 's/.*"micro-batch": "\([0-9]*\)".*/\1/p' "$first/latest/trainer.json" 2>/dev/null)
for dtype in $dtypes; do
    part others && [ "${rows:-0}" -ge 2 ] && fresh "$dtype-micro" "$device" "$dtype" --micro-batch $((rows / 2)) || continue
    few=$((steps < 20 ? steps : 20))
    check "$dtype: half the rows at once, the same losses for $few steps" 'too far' near "$dtype-micro" "$dtype" 1 $few 1e-3
    case $dtype in f32) tolerance=1e-3 ;; *) tolerance=2e-2 ;; esac
    check "$dtype: and to the end" 'too far' near "$dtype-micro" "$dtype" 1 "$steps" $tolerance
done

# ---- as a rank, whose gradients and weights go through NCCL ----

if part ranks && [ "$MPIRUN" ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    lone=$train
    printf '#!/bin/sh\nexec "%s" -np 1 "%s" "$@"\n' "$MPIRUN" "$lone" >rank && chmod +x rank
    for dtype in $dtypes; do
        train=$folder/rank
        fresh "$dtype-rank" "$device" "$dtype" && fresh "$dtype-zero" "$device" "$dtype" --zero 0 || continue
        train=$lone
        case $dtype in f32) tolerance=1e-4 ;; *) tolerance=2e-2 ;; esac
        check "$dtype: a rank of its own has the same losses" 'too far' near "$dtype-rank" "$dtype" 1 "$steps" $tolerance
        check "$dtype: without ZeRO the same bits" 'differ' same_weights "$dtype-rank" "$dtype-zero" "$steps"
        if half_of "$dtype-rank" "$dtype-alone" && run "$dtype-alone" --resume; then
            check "$dtype: what a rank saved goes on without one" 'too far' near "$dtype-alone" "$dtype" 1 "$steps" $tolerance
        fi
    done
    train=$lone
elif part ranks; then
    echo 'skip a rank of its own: no MPI'
fi

# ---- from the CPU to the GPU and back ----

if part moves && fresh cpu cpu f32; then
    for dtype in $dtypes; do
        case $dtype in f32) tolerance=1e-4 ;; *) tolerance=2e-2 ;; esac
        check "$dtype: the losses are the CPU's" 'too far' near "$dtype" cpu 1 "$steps" $tolerance
        if half_of cpu "cpu-$dtype" && run "cpu-$dtype" --resume --device "$device" --dtype "$dtype"; then
            check "a run of the CPU goes on on the device in $dtype" 'too far' near "cpu-$dtype" cpu 1 "$steps" $tolerance
        fi
        if half_of "$dtype" "$dtype-cpu" && run "$dtype-cpu" --resume --device cpu --dtype f32; then
            check "a run of the device in $dtype goes on on the CPU" 'too far' near "$dtype-cpu" cpu 1 "$steps" $tolerance
        fi
    done
fi

# ---- preference optimisation ----

awk 'function part(n,  s, i) { for (i = 0; i < n; i++) { seed = (seed * 16807) % 2147483647; s = s "<Un" seed % 100 ">" }; return s }
    BEGIN { seed = 7; for (p = 0; p < 160; p++)
        printf "{\"prompt\": \"%s\", \"chosen\": \"%s\", \"rejected\": \"%s\"}\n", part(p % 23), part(1 + p % 7), part(1 + p % 11) }' >pairs.jsonl
# prefer NAME DEVICE DTYPE OPTIONS...: twenty steps of dpo, from the run that the CPU has made
prefer() {
    prefer_name=$1 prefer_device=$2 prefer_dtype=$3
    shift 3
    limited 120 "$dpo" pairs.jsonl --init cpu --batch 8 --steps 20 --lr 1e-4 --warmup 0 --share-prompt --tune off --device "$prefer_device" \
        --dtype "$prefer_dtype" --out "$prefer_name" "$@" >"$logs/$prefer_name.out" 2>"$logs/$prefer_name.err" </dev/null && return
    fail "dpo $prefer_name" "status $?: $(head -n 1 "$logs/$prefer_name.err")"
    return 1
}
if part preferences && [ -d cpu ] && prefer dpo-cpu cpu f32; then
    for dtype in $dtypes; do
        case $dtype in f32) tolerance=1e-3 ;; *) tolerance=5e-2 ;; esac
        prefer "dpo-$dtype" "$device" "$dtype" && prefer "dpo-$dtype-2" "$device" "$dtype" || continue
        check "dpo, $dtype: the losses are the CPU's" 'too far' near "dpo-$dtype" dpo-cpu 1 20 $tolerance
        check "dpo, $dtype: two runs have the same log" 'differ' same_logs "dpo-$dtype" "dpo-$dtype-2"
        check "dpo, $dtype: and the same weights and moments" 'differ' same_weights "dpo-$dtype" "dpo-$dtype-2" 20
        check "dpo, $dtype: and the same reference" 'differ' cmp "dpo-$dtype/reference.safetensors" "dpo-$dtype-2/reference.safetensors"
    done
fi

# ---- out of memory ----

if part memory && [ "$device" = cuda ] && [ -z "$OPTIONS" ]; then
    limited 120 "$train" --model slam --context 8192 --batch 64 --micro-batch 64 --steps 1 --device cuda --out large >"$logs/large.out" 2>"$logs/large.err" </dev/null
    status=$?
    if [ $status -ne 1 ]; then
        fail 'a batch beyond the memory' "status $status, expected 1: $(head -n 1 "$logs/large.err")"
    elif ! head -n 1 "$logs/large.err" | grep -q 'train: error: .*\(memory\|GB\|bytes\)'; then
        fail 'a batch beyond the memory' "expected an error about memory, got: $(head -n 1 "$logs/large.err")"
    else
        ok 'a batch beyond the memory is an error'
    fi
fi

# ---- under compute-sanitizer ----

sanitizer=
for program in "$SANITIZER" "$(command -v compute-sanitizer)" "$CUDA_HOME/bin/compute-sanitizer" "$(dirname "$(command -v "${NVCC:-nvcc}" || echo /none/none)")/compute-sanitizer" \
    /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
    [ -x "$program" ] && sanitizer=$program && break
done
# kernels of cuBLASLt are not what is tested
excluded=
for option in --kernel-name-exclude --kernel-regex-exclude; do
    if [ "$sanitizer" ] && [ -z "$excluded" ] && "$sanitizer" --help 2>/dev/null | grep -q -e $option; then
        for name in cublas cutlass nvjet xmma gemm splitK; do excluded="$excluded $option kns=$name"; done
    fi
done
tools='memcheck racecheck initcheck synccheck' rest=4
for tool in $tools; do
    part sanitizer && [ "$sanitizer" ] || break
    limit=$(($(left) / rest)) rest=$((rest - 1)) out=$logs/$tool.out
    if [ $limit -lt 10 ]; then
        echo "skip $tool: the $budget seconds are used up"
        continue
    fi
    # shellcheck disable=SC2086 # options
    CHECK_ONLY='op:' limited $limit "$sanitizer" --tool $tool --error-exitcode 99 $excluded "$test_cuda" >"$out" 2>&1 </dev/null
    status=$?
    good=$(grep -c '^ok ' "$out")
    found=$(grep '^=========.*\(rror\|azard\|nvalid\|ninitialized\|arrier\)' "$out" | grep -v 'ERROR SUMMARY: 0' | head -n 1 | sed 's/^=* *//' | cut -c 1-300)
    case $status in
    0) if [ "$good" -gt 0 ]; then ok "$tool: $good tests of operations"; else fail "$tool" 'no test of an operation ran'; fi ;;
    99) fail "$tool" "$found; $(grep -m 1 '^=========  *at \|^=========  *by ' "$out" | sed 's/^=* *//' | cut -c 1-200); after $good tests; $(grep 'SUMMARY' "$out" | sed 's/^=* *//')" ;;
    124 | 137) if [ "$found" ]; then fail "$tool" "$found"; else echo "skip $tool: stopped after $limit s, $good tests of operations found nothing"; fi ;;
    *) if grep -qi 'not supported\|unable to find\|failed to initialize\|unknown option\|unrecognised' "$out"; then
        echo "skip $tool: $(grep -i -m 1 'not supported\|unable to find\|failed to initialize\|unknown option\|unrecognised' "$out" | sed 's/^=* *//')"
    else
        fail "$tool" "status $status after $good tests: $(grep -m 1 '^FAIL' "$out"; tail -n 1 "$out")"
    fi ;;
    esac
done
[ "$sanitizer" ] || ! part sanitizer || echo 'skip compute-sanitizer: not found; it is in the CUDA Toolkit (package cuda-sanitizer-13-0), or set SANITIZER=/path/to/compute-sanitizer'

end
