#!/bin/sh
# What the emulator is for: mistakes planted into copies of slam.h's kernels must show, each in its way; the copy without one must
# not. Calls of the runtime library that a GPU would refuse. Then train-emulated and dpo-emulated, whose losses must follow the CPU's
# and whose bits depend on the algorithms of matrix products, which a run keeps.
. "$(dirname "$0")/lib.sh"
cd "$(dirname "$0")/.." || exit 1
folder=${TEST_FOLDER:-$(mktemp -d)}
CXX=${CXX:-g++}
printf '#include <vector>\nint main() { return (int)std::vector<int>().size(); }\n' >"$folder/try.cc"
$CXX -std=c++17 "$folder/try.cc" -o "$folder/try" 2>/dev/null || { skip emulator "$CXX makes no C++17 program"; end; }

cat >"$folder/planted.cc" <<'C'
#define SLAM_IMPLEMENTATION
#include "slam.h"
/* A norm and its gradients on both backends, under three orders of threads; status 1 where they differ. */
enum { N = 70, LARGEST = 1025 };
static int C = 64;
static void *given(slam_ops *ops, const float *x, size_t n) {
    void *p = ops->alloc(ops, n * sizeof *x);
    ops->upload(ops, p, x, n * sizeof *x);
    return p;
}
static void run(slam_ops *ops, const float *x, float *out) {
    slam_act *dy = (slam_act *)given(ops, x, N * C), *s = (slam_act *)given(ops, x + 50, N * C), *ds = (slam_act *)given(ops, x + 9, N * C);
    slam_act *w = (slam_act *)given(ops, x + 5, C), *y = (slam_act *)ops->alloc(ops, sizeof(float) * N * C);
    float *rstd = (float *)ops->alloc(ops, sizeof(float) * N), *dw = (float *)ops->alloc(ops, sizeof(float) * C);
    ops->rmsnorm_forward(ops, s, y, rstd, s, NULL, w, 1e-6f, N, 1, C, C);
    ops->rmsnorm_backward(ops, ds, dw, dy, s, w, rstd, N, 1, C, C);
    ops->download(ops, out, y, sizeof(float) * N * C);
    ops->download(ops, out + N * C, ds, sizeof(float) * N * C);
    ops->download(ops, out + 2 * N * C, dw, sizeof(float) * C);
    if (!ops->finish(ops)) fprintf(stderr, "%s\n", slam_error()), exit(2);
    void *all[] = {dy, s, ds, w, y, rstd, dw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ops->release(ops, all[i]);
}
int main(int argc, char **argv) {
    static float x[(N + 1) * LARGEST], out[2][(2 * N + 1) * LARGEST];
    uint64_t seed = 3;
    if (argc > 1) planted = argv[1];
    if (is("trailing")) C = LARGEST; // a block a row, whose sums go through the same shared memory one after the other
    for (size_t i = 0; i < sizeof x / sizeof *x; i++) x[i] = (float)rng_normal(&seed);
    slam_ops *cpu = slam_cpu(1), *gpu = slam_cuda(0, 4);
    if (!cpu || !gpu) return fprintf(stderr, "%s\n", slam_error()), 2;
    run(cpu, x, out[0]);
    for (int order = 1; order <= 3; order++) {
        emulator_seed(order);
        run(gpu, x, out[1]);
        for (int i = 0; i < 2 * N * C + C; i++)
            if (!(fabsf(out[0][i] - out[1][i]) < 1e-4f)) {
                printf("number %d is %g, not %g, order %d\n", i, out[1][i], out[0][i], order);
                return 1;
            }
    }
    slam_ops_free(cpu);
    slam_ops_free(gpu);
    return 0;
}
C
# slam.h with every mistake; the program makes the one that its argument names
printf '#include <string.h>\nstatic const char *planted = "";\nstatic int is(const char *name) { return !strcmp(planted, name); }\n' |
    cat - slam.h >"$folder/slam.h"
plant() { # plant KERNEL SCRIPT: sed's SCRIPT changes this function
    sed "/$1(/,/^}/{$2
}" "$folder/slam.h" >"$folder/changed.h"
    ! cmp -s "$folder/slam.h" "$folder/changed.h" || fail "$1" 'nothing could be planted'
    mv "$folder/changed.h" "$folder/slam.h"
}
plant rmsnorm_backward_kernel 's/__syncthreads();/if (!is("barrier")) &/'
plant block_combine '/x = shared/,/return/s/__syncthreads();/if (!is("trailing")) &/'
plant warp_sum 's/0xffffffffu/is("mask") ? 0x0000ffffu : &/'
plant norm_kernel 's/STEP < C) a/STEP < C + is("bounds")) a/'
shows() { # shows MISTAKE NAME PATTERN: the program with it ends badly, and says so
    if ASAN_OPTIONS=detect_leaks=0 "$folder/planted" "$1" >"$folder/log" 2>&1; then fail "$2" 'nothing showed'
    elif grep -q "$3" "$folder/log"; then ok "$2: $(grep -m 1 -o "$3.*" "$folder/log")"
    else fail "$2" "$(head -n 1 "$folder/log")"; fi
}
address=-fsanitize=address
$CXX $address "$folder/try.cc" -o "$folder/try" 2>/dev/null || address=
if $CXX -std=c++17 -O0 -w $address -DSLAM_EMULATOR -include test/cuda_emulator.h "$folder/planted.cc" -o "$folder/planted" -lm 2>"$folder/log"; then
    if "$folder/planted" >"$folder/log" 2>&1; then ok 'kernels without a mistake'; else fail 'kernels without a mistake' "$(head -n 1 "$folder/log")"; fi
    shows barrier 'a missing barrier' 'number .* is -*nan'
    shows trailing 'a missing barrier after a sum' 'number .* order 2'
    shows mask 'a wrong mask' 'emulator: .*mask 0000ffff'
    if [ $address ]; then shows bounds 'a read out of bounds' 'AddressSanitizer: heap-buffer-overflow'
    else skip 'a read out of bounds' "$CXX has no AddressSanitizer"; fi
else
    fail 'kernels with mistakes' "$(head -n 1 "$folder/log")"
fi

# What the runtime library refuses on a GPU, a case each; its expected output is in the comment.
cat >"$folder/calls.cc" <<'C'
static void kernel(float *) {}
static cudaStream_t stream;
static float *p, host[64];
static cudaError_t launch(dim3 grid, dim3 block, size_t shared) {
    CUDA_LAUNCH(kernel, grid, block, shared, stream, p);
    return cudaGetLastError();
}
static cudaError_t copy(void *to, const void *from, size_t n, cudaMemcpyKind kind) { return cudaMemcpyAsync(to, from, n, kind, stream); }
static cudaError_t call(int number) {
    cudaEvent_t event, other;
    float ms;
    void *none = NULL;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    cudaEventCreate(&other);
    switch (number) {
    case 0: return emulator_lazy(1), launch(dim3(0x7fffffff, 65535, 65535), 1024, 48 << 10); // error 0
    case 1: return launch(dim3(1, 65536, 1), 32, 0);                    // error 9
    case 2: return launch(dim3(1, 1, 65536), 32, 0);                    // error 9
    case 3: return launch(1, 1025, 0);                                  // error 9
    case 4: return launch(dim3(0, 1, 1), 32, 0);                        // error 9
    case 5: return launch(1, 32, (48 << 10) + 1);                       // error 9
    case 6: return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10), launch(1, 32, 64 << 10); // error 0
    case 7: return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 << 10); // error 1
    case 8: return copy(p, host, 65 * 4, cudaMemcpyHostToDevice);       // error 1
    case 9: return copy(p, host, 4, cudaMemcpyDeviceToHost);            // error 1
    case 10: return copy(host, host, 4, cudaMemcpyDeviceToDevice);      // error 1
    case 11: return cudaMemsetAsync(host, 0, 4, stream);                // error 1
    case 12: return cudaMalloc(&none, (size_t)1 << 40), cudaGetLastError(); // error 2
    case 13: return cudaEventRecord(event, stream), cudaEventRecord(other, stream), cudaEventElapsedTime(&ms, event, other); // error 400
    case 14: return emulator_lazy(1), cudaMemsetAsync(p, 0, 4, stream), cudaEventRecord(other, stream), cudaEventElapsedTime(&ms, other, other); // error 600
    case 15: return emulator_lazy(1), cudaMemsetAsync(p, 0, 4, stream), cudaFree(p); // queued calls may use it
    case 16: return cudaStreamWaitEvent(stream, event, 0);              // not recorded
    case 17: return stream = NULL, launch(1, 32, 0);                    // which is not open
    case 18: return cudaStreamDestroy(stream), launch(1, 32, 0);        // which is not open
    case 19: return p = host, launch(1, 32, 0);                         // no device memory
    case 20: return cudaFree(p + 1);                                    // cudaMalloc did not give
    }
    return cudaSuccess;
}
int main(int argc, char **argv) {
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaMalloc(&p, 64 * sizeof *p);
    printf("error %d\n", (int)call(argc > 1 ? atoi(argv[1]) : 0));
}
C
if $CXX -std=c++17 -O0 -w -include test/cuda_emulator.h "$folder/calls.cc" -o "$folder/calls" 2>"$folder/log"; then
    sed -n 's/^ *case \([0-9]*\): .*; *\/\/ \(.*\)/\1 \2/p' "$folder/calls.cc" | while read -r number expected; do
        echo "$number $expected: $("$folder/calls" "$number" 2>&1 | tail -n 1)"
    done >"$folder/log"
    grep -v '^\([0-9]*\) \(.*\): .*\2$' "$folder/log" >"$folder/wrong"
    if [ "$(wc -l <"$folder/log")" -lt 20 ] || [ -s "$folder/wrong" ]; then fail 'what a GPU refuses' "$(head -n 1 "$folder/wrong")"
    else ok "what a GPU refuses: $(wc -l <"$folder/log") calls"; fi
else
    fail 'what a GPU refuses' "$(head -n 1 "$folder/log")"
fi

# losses LOG: a line for each step
losses() { sed -n 's/.*"loss": \([^,]*\),.*/\1/p' "$1/log.jsonl"; }
# go NAME COMMAND...: a run
go() {
    name=$1
    shift
    "$@" --eval-every 0 --save-every 0 --out "$folder/$name" >"$folder/$name.log" 2>&1 || fail "$name" "$(tail -n 1 "$folder/$name.log")"
}
train() { name=$1 && shift && go "$name" "$@" --model "$folder/model.json" --context 64 --batch 4 --steps 20 --lr 5e-3 --warmup 0; }
dpo() { name=$1 && shift && go "$name" "$@" "$folder/pairs.jsonl" --init "$folder/cpu" --share-prompt --batch 6 --steps 4 --lr 1e-3 --warmup 0; }
# follows WHAT NAME EXPECTED STEPS TOLERANCE: the losses of two runs
follows() {
    losses "$folder/$3" >"$folder/expected"
    losses "$folder/$2" | paste "$folder/expected" - | awk -v steps="$4" -v most="$5" '
        { d = $1 - $2; if (d < 0) d = -d; if (d > worst) worst = d; if (NF == 2) n++ }
        END { print worst + 0; exit !(n == steps && worst <= most) }' >"$folder/worst" &&
        ok "$1: $4 losses within $(cat "$folder/worst") of the CPU's" ||
        fail "$1" "losses differ by $(cat "$folder/worst"), $5 is allowed"
}
cat >"$folder/model.json" <<'J'
{"model_type": "qwen2", "vocab_size": 102, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
 "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": true}
J
awk 'function part(n,  s, i) { for (i = 0; i < n; i++) { seed = (seed * 16807) % 2147483647; s = s "<Un" seed % 100 ">" }; return s }
    BEGIN { seed = 7; for (p = 0; p < 24; p++)
        printf "{\"prompt\": \"%s\", \"chosen\": \"%s\", \"rejected\": \"%s\"}\n", part(p % 13), part(1 + p % 7), part(1 + p % 5) }' >"$folder/pairs.jsonl"
if [ -x ./train-emulated ] && [ -x ./dpo-emulated ]; then
    train cpu ./train --device cpu
    dpo cpu-dpo ./dpo --device cpu
    for dtype in f32 bf16; do
        tolerance=1e-4
        [ $dtype = f32 ] || tolerance=2e-2
        train $dtype ./train-emulated --device cuda --dtype $dtype
        follows "train-emulated, $dtype" $dtype cpu 20 $tolerance
        dpo $dtype-dpo ./dpo-emulated --device cuda --dtype $dtype
        follows "dpo-emulated, $dtype" $dtype-dpo cpu-dpo 4 $tolerance
    done
    # six steps on a GPU whose algorithms of products take these times: tuned NAME TIMES OPTIONS...
    tuned() {
        name=$1 times=$2
        shift 2
        EMULATOR_TIMES=$times ./train-emulated --device cuda --dtype f32 --threads 2 --out "$folder/$name" "$@" >"$folder/$name.log" 2>&1 ||
            fail "$name" "$(tail -n 1 "$folder/$name.log")"
    }
    fresh="--model $folder/model.json --context 64 --batch 4 --steps 6 --save-every 3 --keep 0 --eval-every 0 --lr 5e-3 --warmup 0"
    same() { # same WHAT 1|0 A B: the bits of two runs are the same, or not
        cmp -s "$folder/$3/step_000006/optimizer.safetensors" "$folder/$4/step_000006/optimizer.safetensors" && found=1 || found=0
        [ $found = "$2" ] && ok "$1" || fail "$1" "same bits: $found"
    }
    half() { # half RUN NAME: a copy that ends with its third step
        cp -RP "$folder/$1" "$folder/$2" && rm -rf "$folder/$2/step_000006" && ln -sfn step_000003 "$folder/$2/latest"
    }
    # shellcheck disable=SC2086 # several words
    {
        tuned slow '3 2 1' $fresh
        tuned quick '1 2 3' $fresh
        tuned off '3 2 1' $fresh --tune off
        tuned off-2 '2 1 3' $fresh --tune off
    }
    same 'algorithms that are measured: their bits' 0 slow quick
    same '--tune off: the same bits, whatever the times' 1 off off-2
    half slow resumed
    tuned resumed '1 2 3' --resume
    same 'a resumed run keeps its algorithms' 1 slow resumed
    half slow moved
    sed 's/cuBLASLt 130000/cuBLASLt 120000/' "$folder/slow/step_000003/trainer.json" >"$folder/moved/step_000003/trainer.json"
    tuned moved '1 2 3' --resume
    same 'but not those of another library' 0 slow moved
    if grep -q '^products measured again, .* for cuBLASLt 120000, emulated GPU, f32:' "$folder/moved.log" &&
        grep -q '^products [0-9]* measured' "$folder/slow.log" && ! grep -q '^products' "$folder/resumed.log"; then
        ok 'what is measured is said'
    else fail 'what is measured is said' "$(grep '^products' "$folder/moved.log")"; fi
else
    skip train-emulated 'not built'
fi
end
