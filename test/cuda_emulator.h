/* cuda_emulator.h - runs the CUDA kernels of slam.h on the CPU, to test and to read them

   A file compiled as C++17 with -DSLAM_EMULATOR -include test/cuda_emulator.h gets section 5 of slam.h without CUDA:
   the kernels are plain C++ functions, and this file defines what they use of nvcc, of the runtime library and of
   cuBLASLt, and the functions that are PTX on a GPU. `make emulate` builds ./train-emulated that way.

   A launch runs its blocks in random order (dealt to OpenMP's threads where there are some). Each thread of a block is
   a fiber, a stack of its own; one runs until it reaches a barrier, a warp's collective or its end, then another one is
   drawn, at random. A collective completes when all threads that it names have arrived. So the order of threads is as
   wild as a GPU's may be, but the same for the same emulator_seed, and what depends on it is a bug in the kernel. With
   an even emulator_seed the warps of a block have priorities, drawn at random, and of the threads that can run one of
   the first warp runs: it is at the next block barrier, or at its end, before the second warp runs at all, and the last
   warp stays behind all others.

   What shows:
   - a missing barrier: shared memory is full of NaN when a block begins, and asynchronous copies (cp.async) leave NaN
     where they will write, until the thread that waits for them gets there or, at random, before;
   - a missing barrier between reads of shared memory and the next writes: with an even seed a warp overwrites what
     others have yet to read;
   - an access out of bounds: shared memory and cudaMalloc's blocks are exactly as long as was requested, which
     AddressSanitizer watches (-fsanitize=address); without it writes just behind shared memory;
   - a wrong mask, a barrier that some threads never reach, a misaligned 16-byte access of the PTX functions: the run
     ends with a message that names kernel, block and thread, and where the others wait. -fsanitize=alignment shows other
     misaligned accesses;
   - calls of the runtime library that fail on a GPU, or succeed and do nothing: a launch beyond the limits of grid,
     block, arguments or shared memory (above 48 kB only after cudaFuncSetAttribute); host memory where device memory is
     expected, as argument of a kernel or a product or to copy; a stream that is closed or the default one; an event that
     was not recorded, or not made for timing; cudaFree while queued work may use the memory; an error that
     cudaGetLastError still returns later. The first returns the error, the others end the run with a message;
   - blame: emulator_fault(NAME) makes a kernel fail as by a wrong address. All later calls return the error, and with
     CUDA_LAUNCH_BLOCKING in the environment its launch does.

   cuBLASLt is emulated from the documentation of the calls that slam.h makes: column-major layouts, transposes, leading
   dimensions, the bias, workspace, alignment. Its products are a loop. An algorithm must not be used for a problem
   other than it was proposed for, is refused for pointers that are less aligned, and a split sum over K loses its last
   K % 64 terms, as in cuBLASLt 13.1 on Hopper. It proposes several, which differ in their bits and in the time that
   events show, by emulator_products_state.times or EMULATOR_TIMES="3 1 2" in the environment.

   It does not show: two lanes that race between one collective and the next (a fiber runs on until it comes to one),
   bank conflicts, registers, or speed.

   A stream is a queue: with emulator_lazy(1) copies and launches run only when the host waits for them, so that host
   memory that is used again too early shows. What is asked of a second stream (nccl_emulator.h) always waits until
   somebody waits for it, and then finds done, of the first stream's work, only what that stream was told to wait for.
   There is one device. */
#ifndef CUDA_EMULATOR_H
#define CUDA_EMULATOR_H
#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tuple>
#include <unistd.h>
#include <vector>

#if defined __SANITIZE_ADDRESS__
#define EMULATOR_ASAN 1
#elif defined __has_feature
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

/* ---- words of the language: more than slam.h uses, for whoever changes a kernel ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) { // to nearest, ties to even
        uint32_t u;
        memcpy(&u, &f, sizeof u);
        bits = f != f ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    operator float() const {
        const uint32_t u = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &u, sizeof f);
        return f;
    }
};
static inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
static inline float __bfloat162float(__nv_bfloat16 b) { return (float)b; }

template <typename To, typename From> static inline To emulator_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline int __float_as_int(float f) { return emulator_bits<int>(f); }
static inline unsigned __float_as_uint(float f) { return emulator_bits<unsigned>(f); }
static inline float __int_as_float(int i) { return emulator_bits<float>(i); }
static inline float __uint_as_float(unsigned u) { return emulator_bits<float>(u); }
#define __expf expf // glibc has functions of these names that it does not export
#define __logf logf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline int __popc(unsigned u) { return __builtin_popcount(u); }
static inline int __ffs(int i) { return __builtin_ffs(i); }
static inline int __clz(int i) { return i ? __builtin_clz((unsigned)i) : 32; }
template <typename T> static inline T __ldg(const T *p) { return *p; }
template <typename T> static inline T min(T a, T b) { return a < b ? a : b; }
template <typename T> static inline T max(T a, T b) { return a > b ? a : b; }

/* ---- fibers ---- */

struct emulator_copy { // of cp.async
    void *to;
    const void *from;
    int bytes;
};

enum emulator_kind {
    EMULATOR_NONE,
    EMULATOR_BARRIER,
    EMULATOR_SYNCWARP,
    EMULATOR_SHUFFLE,
    EMULATOR_VOTE,
    EMULATOR_MMA,
    EMULATOR_LDMATRIX
};
static const char *const emulator_kinds[] = {"nothing", "__syncthreads", "__syncwarp", "a shuffle",
                                             "a vote",  "mma",           "ldmatrix"};

struct emulator_fiber {
    void *top;   // its stack pointer while it does not run
    char *stack; // EMULATOR_STACK bytes in `memory`
    void *memory;
    void *fake; // AddressSanitizer's
    struct {
        unsigned x, y, z;
    } thread;
    int index, done;
    /* what it has brought to the collective that it waits for, and takes from it */
    emulator_kind kind;
    unsigned mask;
    int source; // a shuffle's lane, 0..31
    uint64_t value, result;
    float *c;
    const uint32_t *a;
    uint32_t b[2], *out;
    const void *row;
    int transposed;
    std::vector<emulator_copy> copies;
    emulator_fiber();
    ~emulator_fiber();
};

enum { EMULATOR_STACK = 256 << 10, EMULATOR_STAGGER = 64 << 10, EMULATOR_THREADS = 1024 };

/* Stacks begin at different offsets to 64 kB: otherwise their tops would share a few sets of the caches. */
emulator_fiber::emulator_fiber() {
    static thread_local unsigned number;
    memory = mmap(NULL, EMULATOR_STACK + EMULATOR_STAGGER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    stack = (char *)memory + number++ * 832 % EMULATOR_STAGGER;
}
emulator_fiber::~emulator_fiber() { munmap(memory, EMULATOR_STACK + EMULATOR_STAGGER); }

struct emulator_state {
    const char *kernel;
    const std::function<void()> *body;
    dim3 grid, block;
    struct {
        unsigned x, y, z;
    } index;
    char *shared;
    void *top; // the scheduler's stack pointer
    emulator_fiber *now, *fibers[EMULATOR_THREADS];
    int threads, ready[EMULATOR_THREADS], n_ready,
        live;                                  // of this block: how many, who could go on, how many have not ended
    int by_warp, warps[EMULATOR_THREADS / 32]; // 1: who could go on is in ready_lanes, and warps go first in this order
    unsigned ready_lanes[EMULATOR_THREADS / 32];    // of a warp: that could go on
    unsigned lanes[EMULATOR_THREADS / 32];          // of a warp: that have not ended
    int at_barrier, at_warp[EMULATOR_THREADS / 32]; // how many wait for a barrier, for a collective of their warp
    uint64_t random;
    const void *bottom; // the scheduler's stack, for AddressSanitizer
    size_t bottom_size;
    void *fake;
};

static thread_local emulator_state emulator = {}; // constant-initialised: no guard at every use
#define threadIdx (emulator.now->thread)
#define blockIdx  (emulator.index)
#define blockDim  (emulator.block)
#define gridDim   (emulator.grid)

static inline uint64_t emulator_draw(uint64_t n) { // splitmix64
    uint64_t z = emulator.random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint64_t)((unsigned __int128)(z ^ z >> 31) * n >> 64);
}

__attribute__((noreturn, format(printf, 1, 2))) static void emulator_fail(const char *format, ...) {
    va_list args;
    const emulator_fiber *f = emulator.now;
    fprintf(stderr, "emulator: %s, block (%u,%u,%u)", emulator.kernel ? emulator.kernel : "host", emulator.index.x,
            emulator.index.y, emulator.index.z);
    if (f) fprintf(stderr, ", thread (%u,%u,%u)", f->thread.x, f->thread.y, f->thread.z);
    fprintf(stderr, ": ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    abort();
}

#ifdef EMULATOR_ASAN
extern "C" void __sanitizer_start_switch_fiber(void **fake, const void *bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void *fake, const void **bottom, size_t *size);
#define EMULATOR_LEAVE(fake, bottom, size)  __sanitizer_start_switch_fiber(fake, bottom, size)
#define EMULATOR_ARRIVE(fake, bottom, size) __sanitizer_finish_switch_fiber(fake, bottom, size)
enum { EMULATOR_GUARD = 0 }; // AddressSanitizer watches what is behind a block's shared memory
#else
enum { EMULATOR_GUARD = 4096 };
#define EMULATOR_LEAVE(fake, bottom, size)  (void)0
#define EMULATOR_ARRIVE(fake, bottom, size) (void)0
#endif

static void emulator_main(void);

/* emulator_switch keeps what a call must preserve on the stack, its pointer in *save, and goes on where `to` was
   kept. */
#if defined __x86_64__ && defined __linux__
extern "C" void emulator_switch(void **save, void *to);
asm(".text\n.globl emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size emulator_switch,.-emulator_switch\n");
static void *emulator_first(char *stack) { // a stack that emulator_switch "returns" from into emulator_main
    void **top = (void **)(stack + EMULATOR_STACK) - 1; // a function begins 8 bytes off a multiple of 16
    *--top = (void *)emulator_main;
    return top - 6;
}
#elif defined __aarch64__ && defined __linux__
extern "C" void emulator_switch(void **save, void *to);
asm(".text\n.globl emulator_switch\n.type emulator_switch,%function\nemulator_switch:\n"
    "stp x19,x20,[sp,#-160]!\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\n"
    "stp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
    "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "ldp x19,x20,[sp],#160\nret\n.size emulator_switch,.-emulator_switch\n");
static void *emulator_first(char *stack) {
    void **top = (void **)(stack + EMULATOR_STACK) - 20;
    top[11] = (void *)emulator_main; // x30
    return top;
}
#else
#include <ucontext.h>
static void emulator_switch(void **save, void *to) { // a system call each time, but anywhere
    ucontext_t here;
    *save = &here;
    swapcontext(&here, (ucontext_t *)to);
}
static void *emulator_first(char *stack) {
    ucontext_t *first = (ucontext_t *)stack; // at the end that the stack grows towards, used up by the first switch
    getcontext(first);
    first->uc_stack.ss_sp = stack + sizeof *first;
    first->uc_stack.ss_size = EMULATOR_STACK - sizeof *first;
    first->uc_link = NULL;
    makecontext(first, emulator_main, 0);
    return first;
}
#endif

static void emulator_make_ready(int thread) {
    if (emulator.by_warp) emulator.ready_lanes[thread / 32] |= 1u << thread % 32;
    else emulator.ready[emulator.n_ready] = thread;
    emulator.n_ready++;
}

/* Draws one of the threads that could go on; by_warp: of the first warp that has any. */
static int emulator_take_ready(void) {
    if (!emulator.by_warp) {
        const uint64_t i = emulator_draw((uint64_t)emulator.n_ready);
        const int thread = emulator.ready[i];
        emulator.ready[i] = emulator.ready[--emulator.n_ready];
        return thread;
    }
    const int *warp = emulator.warps;
    while (!emulator.ready_lanes[*warp]) warp++;
    unsigned lanes = emulator.ready_lanes[*warp];
    for (uint64_t skip = emulator_draw((uint64_t)__builtin_popcount(lanes)); skip > 0; skip--) lanes &= lanes - 1;
    const int lane = __builtin_ctz(lanes);
    emulator.ready_lanes[*warp] &= ~(1u << lane);
    emulator.n_ready--;
    return *warp * 32 + lane;
}

/* From a fiber to one that is drawn, or to the scheduler if none could go on; `last`: it will not come back. */
static void emulator_yield(int last) {
    emulator_fiber *f = emulator.now, *next = emulator.n_ready > 0 ? emulator.fibers[emulator_take_ready()] : NULL;
    (void)last; // without AddressSanitizer
    emulator.now = next;
    if (next == f) return;
    EMULATOR_LEAVE(last ? NULL : &f->fake, next ? next->stack : emulator.bottom,
                   next ? EMULATOR_STACK : emulator.bottom_size);
    emulator_switch(&f->top, next ? next->top : emulator.top);
    EMULATOR_ARRIVE(f->fake, NULL, NULL);
}

/* From the scheduler to the first fiber of a block, until none could go on. */
static void emulator_start(void) {
    emulator_fiber *first = emulator.now = emulator.fibers[emulator_take_ready()];
    EMULATOR_LEAVE(&emulator.fake, first->stack, EMULATOR_STACK);
    emulator_switch(&emulator.top, first->top);
    EMULATOR_ARRIVE(emulator.fake, NULL, NULL);
}

static void emulator_deliver(emulator_fiber *f) {
    for (const emulator_copy &c : f->copies)
        if (c.bytes) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    f->copies.clear();
}

static void emulator_check_barrier(void);

static void emulator_main(void) {
    if (!emulator.bottom)
        EMULATOR_ARRIVE(NULL, &emulator.bottom, &emulator.bottom_size); // the first, from the scheduler
    else EMULATOR_ARRIVE(NULL, NULL, NULL);
    (*emulator.body)();
    emulator_fiber *f = emulator.now;
    emulator_deliver(f);
    f->done = 1;
    emulator.live--;
    emulator.lanes[f->index / 32] &= ~(1u << f->index % 32);
    emulator_check_barrier(); // it may have been the one that others wait for
    emulator_yield(1);
}

/* ---- collectives ---- */

static emulator_fiber *emulator_lane(int warp, int lane) {
    const int i = warp * 32 + lane;
    return i < emulator.threads && !emulator.fibers[i]->done ? emulator.fibers[i] : NULL;
}

static void emulator_release(emulator_fiber *f) {
    if (f->kind == EMULATOR_BARRIER) emulator.at_barrier--;
    else emulator.at_warp[f->index / 32]--;
    f->kind = EMULATOR_NONE;
    emulator_make_ready(f->index);
}

/* A barrier is complete when all threads that still run have come; then each gets the sum of what they brought. */
static void emulator_check_barrier(void) {
    uint64_t sum = 0;
    if (emulator.at_barrier == 0 || emulator.at_barrier < emulator.live) return;
    for (int i = 0; i < emulator.threads; i++)
        if (!emulator.fibers[i]->done) sum += emulator.fibers[i]->value;
    for (int i = 0; i < emulator.threads; i++)
        if (!emulator.fibers[i]->done) emulator.fibers[i]->result = sum, emulator_release(emulator.fibers[i]);
}

/* The warp's product of mma_bf16, with the fragments' places as its comment in slam.h has them. */
static void emulator_complete_mma(emulator_fiber *const lane[32]) {
    typedef float row_of_8 __attribute__((vector_size(32)));
    float A[16][16];
    row_of_8 B[16], C[16];
    for (int l = 0; l < 32; l++) {
        const int g = l / 4, t = l % 4;
        const uint32_t *a = lane[l]->a, *b = lane[l]->b;
        for (int half = 0; half < 2; half++) {
            const int shift = 16 * half, k = 2 * t + half;
            A[g][k] = emulator_bits<float>((a[0] >> shift & 0xffff) << 16);
            A[g + 8][k] = emulator_bits<float>((a[1] >> shift & 0xffff) << 16);
            A[g][k + 8] = emulator_bits<float>((a[2] >> shift & 0xffff) << 16);
            A[g + 8][k + 8] = emulator_bits<float>((a[3] >> shift & 0xffff) << 16);
            B[k][g] = emulator_bits<float>((b[0] >> shift & 0xffff) << 16);
            B[k + 8][g] = emulator_bits<float>((b[1] >> shift & 0xffff) << 16);
            C[g][k] = lane[l]->c[half], C[g + 8][k] = lane[l]->c[2 + half];
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) C[i] += A[i][k] * B[k];
    for (int l = 0; l < 32; l++)
        for (int e = 0; e < 4; e++) lane[l]->c[e] = C[l / 4 + e / 2 * 8][l % 4 * 2 + e % 2];
}

static void emulator_complete_ldmatrix(emulator_fiber *const lane[32]) {
    for (int l = 0; l < 32; l++)
        for (int m = 0; m < 4; m++) {
            uint16_t pair[2];
            for (int half = 0; half < 2; half++) {
                const int row = lane[l]->transposed ? l % 4 * 2 + half : l / 4,
                          column = lane[l]->transposed ? l / 4 : l % 4 * 2 + half;
                memcpy(&pair[half], (const char *)lane[8 * m + row]->row + 2 * column, 2);
            }
            lane[l]->out[m] = pair[0] | (uint32_t)pair[1] << 16;
        }
}

/* A warp's collective is complete when all lanes of the mask wait for the same one with the same mask. */
static void emulator_check_warp(emulator_kind kind, int warp, unsigned mask) {
    emulator_fiber *lane[32];
    uint64_t votes = 0;
    for (int l = 0; l < 32; l++) {
        lane[l] = NULL;
        if (!(mask >> l & 1)) continue;
        lane[l] = emulator_lane(warp, l);
        if (!lane[l])
            emulator_fail("%s with mask %08x, whose lane %d has ended or does not exist", emulator_kinds[kind], mask,
                          l);
        if (lane[l]->kind != kind || lane[l]->mask != mask) return;
        votes |= (lane[l]->value != 0 ? (uint64_t)1 : 0) << l;
    }
    if (kind == EMULATOR_MMA) emulator_complete_mma(lane);
    if (kind == EMULATOR_LDMATRIX) emulator_complete_ldmatrix(lane);
    for (int l = 0; l < 32; l++) {
        if (!lane[l]) continue;
        if (kind == EMULATOR_VOTE) lane[l]->result = votes;
        if (kind == EMULATOR_SHUFFLE && !lane[lane[l]->source])
            emulator_fail("a shuffle with mask %08x reads lane %d", mask, lane[l]->source);
        if (kind == EMULATOR_SHUFFLE) lane[l]->result = lane[lane[l]->source]->value;
        emulator_release(lane[l]);
    }
}

/* Waits, after its contribution was put into emulator.now, until the collective is complete. */
static void emulator_collect(emulator_kind kind, unsigned mask) {
    emulator_fiber *f = emulator.now;
    f->kind = kind;
    f->mask = mask;
    if (kind == EMULATOR_BARRIER) emulator.at_barrier++;
    else emulator.at_warp[f->index / 32]++;
    if (!f->copies.empty() && emulator_draw(4) == 0) emulator_deliver(f);
    if (kind == EMULATOR_BARRIER) emulator_check_barrier();
    else {
        if (!(mask >> f->index % 32 & 1))
            emulator_fail("%s with mask %08x, without its own lane %d", emulator_kinds[kind], mask, f->index % 32);
        if (emulator.at_warp[f->index / 32] >= __builtin_popcount(mask & emulator.lanes[f->index / 32]))
            emulator_check_warp(kind, f->index / 32, mask);
    }
    emulator_yield(0);
}

static uint64_t emulator_barrier(int value) {
    emulator.now->value = value != 0;
    emulator_collect(EMULATOR_BARRIER, 0);
    return emulator.now->result;
}
static inline void __syncthreads(void) { (void)emulator_barrier(0); }
static inline int __syncthreads_count(int p) { return (int)emulator_barrier(p); }
static inline int __syncthreads_or(int p) { return emulator_barrier(p) != 0; }
static inline int __syncthreads_and(int p) { return emulator_barrier(!p) == 0; }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator_collect(EMULATOR_SYNCWARP, mask); }

static unsigned emulator_vote(unsigned mask, int p) {
    emulator.now->value = p != 0;
    emulator_collect(EMULATOR_VOTE, mask);
    return (unsigned)emulator.now->result;
}
static inline unsigned __ballot_sync(unsigned mask, int p) { return emulator_vote(mask, p); }
static inline int __any_sync(unsigned mask, int p) { return emulator_vote(mask, p) != 0; }
static inline int __all_sync(unsigned mask, int p) { return emulator_vote(mask, !p) == 0; }

template <typename T> static T emulator_shuffle(unsigned mask, T x, int source) {
    T out;
    emulator.now->value = 0;
    memcpy(&emulator.now->value, &x, sizeof x);
    emulator.now->source = source;
    emulator_collect(EMULATOR_SHUFFLE, mask);
    memcpy(&out, &emulator.now->result, sizeof out);
    return out;
}
template <typename T> static inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
    const int l = emulator.now->index % 32;
    return emulator_shuffle(mask, x, l / width * width + (lane & (width - 1)));
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    const int l = emulator.now->index % 32, s = l ^ bits;
    return emulator_shuffle(mask, x, s / width == l / width ? s : l);
}
template <typename T> static inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const int l = emulator.now->index % 32;
    return emulator_shuffle(mask, x, l % width >= (int)by ? l - (int)by : l);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const int l = emulator.now->index % 32;
    return emulator_shuffle(mask, x, l % width + (int)by < width ? l + (int)by : l);
}

/* ---- the functions of slam.h that are PTX on a GPU ---- */

#define UNROLL
static inline char *shared_memory(void) { return emulator.shared; }
static inline float exp2_fast(float x) { return exp2f(x); }
template <typename R> static inline void stay_packed(R *) {}

static inline uint32_t pack_bf16(float lo, float hi) {
    return (uint32_t)__nv_bfloat16(lo).bits | (uint32_t)__nv_bfloat16(hi).bits << 16;
}

static inline void mma_bf16(float *c, const uint32_t *a, uint32_t b0, uint32_t b1) {
    emulator_fiber *f = emulator.now;
    f->a = a;
    f->b[0] = b0;
    f->b[1] = b1;
    f->c = c;
    emulator_collect(EMULATOR_MMA, 0xffffffffu);
}

static inline void emulator_aligned(const void *p, const char *what) {
    if ((uintptr_t)p % 16) emulator_fail("%s at %p, which is not a multiple of 16 bytes", what, p);
}

template <int TRANSPOSED> static inline void ldmatrix(uint32_t *out, const void *row) {
    emulator_fiber *f = emulator.now;
    emulator_aligned(row, "ldmatrix");
    f->row = row;
    f->out = out;
    f->transposed = TRANSPOSED;
    emulator_collect(EMULATOR_LDMATRIX, 0xffffffffu);
}

static inline void copy_async(void *to, const void *from, int valid) {
    emulator_fiber *f = emulator.now;
    char now[16];
    emulator_aligned(to, "cp.async to");
    if (valid) emulator_aligned(from, "cp.async from"), memcpy(now, from, 16); // a wrong address shows here
    memset(to, 0xff, 16);
    f->copies.push_back({to, from, valid ? 16 : 0});
}
static inline void copy_async_wait(void) { emulator_deliver(emulator.now); }

/* ---- launches ---- */

static uint64_t emulator_random_seed = 1;
static inline void emulator_seed(uint64_t seed) { emulator_random_seed = seed; }

static void emulator_run_block(const char *kernel, const std::function<void()> &body, dim3 grid, dim3 block,
                               size_t shared, size_t at, uint64_t seed) {
    static thread_local std::deque<emulator_fiber> fibers; // kept for the next block
    emulator_state &e = emulator;
    const size_t threads = (size_t)block.x * block.y * block.z;
    e.kernel = kernel;
    e.body = &body;
    e.grid = grid;
    e.block = block;
    e.index.x = (unsigned)(at % grid.x);
    e.index.y = (unsigned)(at / grid.x % grid.y);
    e.index.z = (unsigned)(at / grid.x / grid.y);
    e.random = seed + at * 0x9e3779b97f4a7c15u;
    void *memory = NULL;
    if (posix_memalign(&memory, 128, shared + EMULATOR_GUARD + 1) != 0)
        emulator_fail("no memory for %zu bytes of shared memory", shared);
    memset(memory, 0xff, shared + EMULATOR_GUARD);
    e.shared = (char *)memory;
    e.threads = e.live = (int)threads;
    e.n_ready = e.at_barrier = 0;
    e.by_warp = emulator_random_seed % 2 == 0;
    memset(e.ready_lanes, 0, sizeof e.ready_lanes);
    for (int w = 0; w < EMULATOR_THREADS / 32; w++) {
        const int k = (int)emulator_draw((uint64_t)w + 1);
        e.warps[w] = e.warps[k];
        e.warps[k] = w;
    }
    memset(e.at_warp, 0, sizeof e.at_warp);
    memset(e.lanes, 0, sizeof e.lanes);
    for (size_t i = 0; i < threads; i++) {
        if (i >= fibers.size()) fibers.emplace_back();
        emulator_fiber *f = &fibers[i];
        f->thread.x = (unsigned)(i % block.x);
        f->thread.y = (unsigned)(i / block.x % block.y);
        f->thread.z = (unsigned)(i / block.x / block.y);
        f->index = (int)i;
        f->done = 0;
        f->kind = EMULATOR_NONE;
        f->fake = NULL;
        f->copies.clear();
        f->top = emulator_first(f->stack);
        e.fibers[i] = f;
        emulator_make_ready((int)i);
        e.lanes[i / 32] |= 1u << i % 32;
    }
    emulator_start();
    if (e.live > 0) {
        for (size_t i = 0; i < threads; i++) {
            const emulator_fiber *f = e.fibers[i];
            if (f->done) continue;
            fprintf(stderr, "emulator: thread %d waits at %s", f->index, emulator_kinds[f->kind]);
            if (f->kind != EMULATOR_BARRIER) fprintf(stderr, " with mask %08x", f->mask);
            fprintf(stderr, "\n");
        }
        emulator_fail("%d of its %zu threads wait for others that do not come", e.live, threads);
    }
    const char *guard = e.shared + shared;
    if (EMULATOR_GUARD > 0 && (guard[0] != (char)0xff || memcmp(guard, guard + 1, EMULATOR_GUARD - 1) != 0))
        emulator_fail("it wrote behind its %zu bytes of shared memory", shared);
    free(e.shared);
    e.shared = NULL;
    e.kernel = NULL;
}

static void emulator_run(const char *kernel, const std::function<void()> &body, dim3 grid, dim3 block, size_t shared) {
    static uint64_t launches;
    const size_t n = (size_t)grid.x * grid.y * grid.z;
    const uint64_t seed = emulator_random_seed * 0xd1342543de82ef95u + 0x2545f4914f6cdd1du * ++launches;
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; i++) order[i] = i;
    emulator.random = seed;
    for (size_t i = n; i > 1; i--) std::swap(order[i - 1], order[emulator_draw(i)]);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
    for (size_t i = 0; i < n; i++) emulator_run_block(kernel, body, grid, block, shared, order[i], seed);
}

/* ---- the runtime library ---- */

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209
} cudaError_t;
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
typedef struct CUstream_st *cudaStream_t;
typedef struct emulator_event {
    uint64_t ticket;
    cudaStream_t stream; // that it was recorded in; NULL: it was not
    int timed;
    double time;
} * cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
};
struct cudaFuncAttributes {
    int binaryVersion, ptxVersion, numRegs;
    size_t sharedSizeBytes, localSizeBytes;
};

/* 99 kB of shared memory a block: the least that the GPUs of compute capability 8.0 to 12.0 have. */
enum { EMULATOR_SHARED = 48 << 10, EMULATOR_SHARED_MOST = 99 << 10, EMULATOR_PROCESSORS = 4 };
static const size_t EMULATOR_MEMORY = (size_t)1 << 30;

static struct {
    std::deque<std::function<void()>> queue; // of the one stream
    uint64_t asked, done;                    // how many were put there, have run
    int lazy, streams, stuck;                // stuck: the second stream never comes to an end
    std::set<cudaStream_t> open;             // streams
    const char *fault;                       // a kernel with this in its name fails
    int refuse;                              // 1: the next launch is refused, 2: that after it, ...
    int dry;                                 // launches and products are checked, but not run
    cudaError_t broken;                      // it has failed: what every call returns
    double clock;                            // milliseconds that products have taken
    std::map<cudaStream_t, uint64_t> seen;   // how much of the first stream's work a stream has waited for
    std::map<cudaStream_t, std::deque<std::function<void()>>> later; // what waits in streams other than the first
    std::map<const void *, size_t> shared;                           // bytes that a kernel may ask for
    cudaError_t error;
    size_t limit = EMULATOR_MEMORY, used; // bytes of device memory
    std::map<void *, size_t> blocks;
} emulator_device;

static inline void emulator_lazy(int lazy) { emulator_device.lazy = lazy; }
static inline void emulator_memory(size_t limit) { emulator_device.limit = limit; }

static void emulator_drain(uint64_t up_to) {
    while (emulator_device.done < up_to && !emulator_device.queue.empty()) {
        std::function<void()> work = std::move(emulator_device.queue.front());
        emulator_device.queue.pop_front();
        emulator_device.done++;
        if (!emulator_device.broken) work();
    }
}

/* What a call returns; cudaGetLastError then returns an error as well. */
static inline cudaError_t emulator_return(cudaError_t error) {
    if (emulator_device.broken) error = emulator_device.broken;
    if (error != cudaSuccess) emulator_device.error = error;
    return error;
}

static inline void emulator_fault(const char *kernel) { // NULL: all is well again
    emulator_device.fault = kernel;
    emulator_device.broken = emulator_device.error = cudaSuccess;
}

/* Is it `bytes` bytes of memory that cudaMalloc gave? */
static inline int emulator_on_device(const void *p, size_t bytes) {
    std::map<void *, size_t>::const_iterator block = emulator_device.blocks.upper_bound((void *)p);
    if (block == emulator_device.blocks.begin()) return 0;
    block--;
    return (const char *)p + bytes <= (const char *)block->first + block->second;
}

static inline void emulator_check_stream(cudaStream_t stream, const char *what) {
    if (!emulator_device.open.count(stream)) emulator_fail("%s in stream %p, which is not open", what, (void *)stream);
}

template <typename T> static inline void emulator_check_argument(const char *, const T &) {}
template <typename T> static inline void emulator_check_argument(const char *kernel, T *p) {
    if (p && !emulator_on_device(p, 1)) emulator_fail("an argument of %s is %p: no device memory", kernel, (void *)p);
}

static void emulator_ask_later(cudaStream_t, std::function<void()>);

/* slam.h opens two streams for a device: work that is put into the second waits there, as NCCL's does. */
static void emulator_ask(cudaStream_t stream, std::function<void()> work) {
    if ((uintptr_t)stream % 2 == 0) return emulator_ask_later(stream, std::move(work));
    emulator_device.asked++;
    emulator_device.queue.push_back(std::move(work));
    if (!emulator_device.lazy) emulator_drain(emulator_device.asked);
    else if (emulator_device.queue.size() > 1000)
        emulator_drain(emulator_device.asked - 500); // as a GPU goes on unasked
}

/* Arguments are copied when a kernel is launched, as <<<...>>> does. */
template <typename... P, typename... A>
static void emulator_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                            cudaStream_t stream, A... args) {
    static_assert((sizeof(P) + ... + 0) <= 4096, "arguments of a kernel: at most 4 kB");
    const std::tuple<P...> values(args...);
    const std::map<const void *, size_t>::const_iterator most = emulator_device.shared.find((const void *)kernel);
    const size_t threads = (size_t)block.x * block.y * block.z;
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
        threads < 1 || threads > EMULATOR_THREADS || block.z > 64 ||
        (emulator_device.refuse && --emulator_device.refuse == 0) ||
        shared > (most == emulator_device.shared.end() ? (size_t)EMULATOR_SHARED : most->second)) {
        emulator_return(cudaErrorInvalidConfiguration);
        return;
    }
    emulator_check_stream(stream, name);
    (emulator_check_argument(name, args), ...);
    if (emulator_device.dry) return;
    emulator_ask(stream, [=] {
        if (emulator_device.fault && strstr(name, emulator_device.fault)) {
            emulator_device.broken = cudaErrorIllegalAddress;
            return;
        }
        emulator_run(
            name, [&] { std::apply(kernel, values); }, grid, block, shared);
    });
    if (getenv("CUDA_LAUNCH_BLOCKING")) emulator_drain(emulator_device.asked);
    emulator_return(cudaSuccess);
}
#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                    \
    emulator_launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

static inline cudaError_t cudaGetLastError(void) {
    const cudaError_t error = emulator_device.error;
    emulator_device.error = emulator_device.broken;
    return error;
}
static inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                     ? "no error"
           : error == cudaErrorMemoryAllocation     ? "out of memory"
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
           : error == cudaErrorIllegalAddress       ? "an illegal memory access was encountered"
                                                    : "an error";
}
static inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
static inline cudaError_t cudaSetDevice(int device) {
    return emulator_return(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->major = 8;
    p->multiProcessorCount = EMULATOR_PROCESSORS;
    p->totalGlobalMem = emulator_device.limit;
    p->sharedMemPerBlockOptin = EMULATOR_SHARED_MOST;
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) {
    *total = emulator_device.limit;
    *free_ = *total > emulator_device.used ? *total - emulator_device.used : 0;
    return cudaSuccess;
}
template <typename T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    void *block = NULL;
    if (emulator_device.broken || emulator_device.used + bytes > emulator_device.limit ||
        posix_memalign(&block, 256, bytes ? bytes : 1) != 0)
        return emulator_return(cudaErrorMemoryAllocation);
    memset(block, 0xff, bytes);
    emulator_device.blocks[block] = bytes;
    emulator_device.used += bytes;
    *p = (T *)block;
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    size_t queued = emulator_device.queue.size();
    for (const auto &stream : emulator_device.later) queued += stream.second.size();
    if (p && queued && !emulator_device.broken)
        emulator_fail("cudaFree of %p while %zu queued calls may use it", p, queued);
    if (p && !emulator_device.blocks.count(p)) emulator_fail("cudaFree of %p, which cudaMalloc did not give", p);
    if (p) emulator_device.used -= emulator_device.blocks[p], emulator_device.blocks.erase(p);
    free(p);
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                                          cudaStream_t stream) {
    const int to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice,
              from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    emulator_check_stream(stream, "cudaMemcpyAsync");
    if (bytes == 0) return emulator_return(cudaSuccess);
    if (emulator_on_device(to, to_device ? bytes : 1) != to_device ||
        emulator_on_device(from, from_device ? bytes : 1) != from_device)
        return emulator_return(cudaErrorInvalidValue);
    emulator_ask(stream, [=] { memcpy(to, from, bytes); }); // CUDA may copy pageable memory earlier, but need not
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    emulator_check_stream(stream, "cudaMemsetAsync");
    if (bytes && !emulator_on_device(p, bytes)) return emulator_return(cudaErrorInvalidValue);
    emulator_ask(stream, [=] { memset(p, value, bytes); });
    return emulator_return(cudaSuccess);
}
/* A stream is known by its number; the work of odd ones is in the device's queue. */
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    *s = (cudaStream_t)(uintptr_t)++emulator_device.streams;
    emulator_device.open.insert(*s);
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    emulator_check_stream(s, "cudaStreamDestroy");
    emulator_device.open.erase(s);
    return emulator_return(cudaSuccess);
}
static void emulator_ask_later(cudaStream_t stream, std::function<void()> work) {
    const uint64_t seen = emulator_device.seen[stream];
    if (!emulator_device.stuck) emulator_device.later[stream].push_back([=] { emulator_drain(seen), work(); });
}
static inline void emulator_catch_up(cudaStream_t stream) {
    std::deque<std::function<void()>> &queue = emulator_device.later[stream];
    for (; !queue.empty(); queue.pop_front()) queue.front()();
}
static inline void emulator_hang_if_stuck() {
    while (emulator_device.stuck) pause();
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    emulator_check_stream(s, "cudaStreamSynchronize");
    emulator_hang_if_stuck(), emulator_catch_up(s), emulator_drain(emulator_device.asked);
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaStreamQuery(cudaStream_t s) {
    emulator_check_stream(s, "cudaStreamQuery");
    if (emulator_device.stuck) return emulator_return(cudaErrorNotReady);
    return emulator_catch_up(s), emulator_return(cudaSuccess);
}
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    *e = new emulator_event();
    (*e)->timed = !(flags & cudaEventDisableTiming);
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
static inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, emulator_return(cudaSuccess); }
static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    emulator_check_stream(s, "cudaEventRecord");
    e->ticket = emulator_device.asked;
    e->stream = s;
    e->time = emulator_device.clock;
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->stream || !to->stream || !from->timed || !to->timed)
        return emulator_return(cudaErrorInvalidResourceHandle);
    if (to->ticket > emulator_device.done) return emulator_return(cudaErrorNotReady);
    *ms = (float)(to->time - from->time);
    return emulator_return(cudaSuccess);
}
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    emulator_check_stream(s, "cudaStreamWaitEvent");
    if (!e->stream) emulator_fail("a stream waits for an event that was not recorded");
    emulator_device.seen[s] = std::max(emulator_device.seen[s], e->ticket);
    return emulator_catch_up(e->stream), emulator_return(cudaSuccess);
}
template <typename K> static inline cudaError_t cudaFuncSetAttribute(K kernel, cudaFuncAttribute what, int value) {
    if (what != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > EMULATOR_SHARED_MOST) return emulator_return(cudaErrorInvalidValue);
    emulator_device.shared[(const void *)kernel] = (size_t)value;
    return emulator_return(cudaSuccess);
}
template <typename K> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, K) {
    memset(a, 0, sizeof *a);
    a->ptxVersion = a->binaryVersion = 80;
    return cudaSuccess;
}

/* ---- cuBLASLt ---- */

typedef struct emulator_products {
    size_t loaded; // bytes of device memory that its kernels take, from the first product on
} * cublasLtHandle_t;
typedef enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 } cublasComputeType_t;
typedef enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType;
typedef enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 } cublasLtEpilogue_t;
typedef enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
} cublasLtMatmulDescAttributes_t;
typedef enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
} cublasLtMatmulPreferenceAttributes_t;
enum {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0,
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 1,
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2
};

typedef struct cublasLtMatmulDescOpaque_t {
    cublasOperation_t transA, transB;
    cublasLtEpilogue_t epilogue;
    const void *bias;
} cublasLtMatmulDescOpaque_t;
typedef struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld; // columns are ld numbers apart
} cublasLtMatrixLayoutOpaque_t;
typedef struct cublasLtMatmulPreferenceOpaque_t {
    size_t workspace;
    uint32_t schemes, align[4]; // of A, B, C, D
} cublasLtMatmulPreferenceOpaque_t;
typedef struct cublasLtMatmulAlgo_t { // the problem that it was proposed for, and bytes that it needs
    uint32_t m, n, k, epilogue, align[4], align_bias;
    uint32_t valid; // 0x1234
    int splits;
    int way; // to sum: 0 in double, 1 in float, 2 in float from the last term on
    uint64_t workspace, unused;
} cublasLtMatmulAlgo_t;
static_assert(sizeof(cublasLtMatmulAlgo_t) == 64, "as that of cuBLASLt");
typedef struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
} cublasLtMatmulHeuristicResult_t;

static struct {
    int proposals, refusals; // calls of cublasLtMatmulAlgoGetHeuristic, of cublasLtMatmul that were refused
    int refuse;              // so many of the next products are refused
    double times[3];         // milliseconds that each way takes; 0: 1
} emulator_products_state;

static inline size_t cublasLtGetVersion(void) { return 130000; }

static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    return *h = new emulator_products(), CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    emulator_device.used -= h->loaded;
    return delete h, CUBLAS_STATUS_SUCCESS;
}
static inline const char *cublasLtGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED"
           : s                              ? "CUBLAS_STATUS_INVALID_VALUE"
                                            : "CUBLAS_STATUS_SUCCESS";
}
static inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDescOpaque_t *d, cublasComputeType_t compute,
                                                    cudaDataType scale) {
    *d = {CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL};
    // slam.h must not ask for tf32
    return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
static cublasStatus_t emulator_attribute(void *to, size_t expected, const void *value, size_t bytes) {
    if (bytes != expected) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDescOpaque_t *d,
                                                            cublasLtMatmulDescAttributes_t name, const void *value,
                                                            size_t bytes) {
    return name == CUBLASLT_MATMUL_DESC_TRANSA     ? emulator_attribute(&d->transA, sizeof d->transA, value, bytes)
           : name == CUBLASLT_MATMUL_DESC_TRANSB   ? emulator_attribute(&d->transB, sizeof d->transB, value, bytes)
           : name == CUBLASLT_MATMUL_DESC_EPILOGUE ? emulator_attribute(&d->epilogue, sizeof d->epilogue, value, bytes)
                                                   : emulator_attribute(&d->bias, sizeof d->bias, value, bytes);
}
static inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayoutOpaque_t *l, cudaDataType type, uint64_t rows,
                                                      uint64_t cols, int64_t ld) {
    *l = {type, rows, cols, ld};
    return ld >= (int64_t)rows && rows > 0 && cols > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
static inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreferenceOpaque_t *p) {
    *p = {0, 7, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreferenceOpaque_t *p,
                                                                  cublasLtMatmulPreferenceAttributes_t name,
                                                                  const void *value, size_t bytes) {
    if (name == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        return emulator_attribute(&p->workspace, sizeof p->workspace, value, bytes);
    if (name == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
        return emulator_attribute(&p->schemes, sizeof p->schemes, value, bytes);
    return emulator_attribute(&p->align[name - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], sizeof *p->align, value,
                              bytes);
}

/* The problem's dimensions; 0 where the layouts do not fit each other. */
static int emulator_problem(const cublasLtMatmulDescOpaque_t *d, const cublasLtMatrixLayoutOpaque_t *A,
                            const cublasLtMatrixLayoutOpaque_t *B, const cublasLtMatrixLayoutOpaque_t *C,
                            const cublasLtMatrixLayoutOpaque_t *D, cublasLtMatmulAlgo_t *problem) {
    const int a = d->transA == CUBLAS_OP_T, b = d->transB == CUBLAS_OP_T;
    memset(problem, 0, sizeof *problem);
    problem->m = (uint32_t)D->rows, problem->n = (uint32_t)D->cols, problem->k = (uint32_t)(a ? A->rows : A->cols);
    problem->epilogue = d->epilogue;
    problem->valid = 0x1234;
    problem->splits = 1;
    return (a ? A->cols : A->rows) == problem->m && (b ? B->cols : B->rows) == problem->k &&
           (b ? B->rows : B->cols) == problem->n && C->rows == D->rows && C->cols == D->cols && A->type == B->type &&
           C->type == D->type && (A->type == CUDA_R_16BF || D->type == CUDA_R_32F);
}
static uint32_t emulator_alignment(const void *p) {
    uint32_t bytes = 1;
    while (bytes < 256 && (uintptr_t)p % (2 * bytes) == 0) bytes *= 2;
    return bytes;
}

/* First an algorithm that splits K in two, if its partial sums may lie in the workspace, of which it takes all that it
   may have, then those that do not; in the middle one whose state says that it is none. */
static inline cublasStatus_t
cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDescOpaque_t *d, cublasLtMatrixLayoutOpaque_t *A,
                               cublasLtMatrixLayoutOpaque_t *B, cublasLtMatrixLayoutOpaque_t *C,
                               cublasLtMatrixLayoutOpaque_t *D, cublasLtMatmulPreferenceOpaque_t *p, int most,
                               cublasLtMatmulHeuristicResult_t *found, int *n) {
    cublasLtMatmulAlgo_t problem;
    if (!emulator_problem(d, A, B, C, D, &problem) || most < 2) return CUBLAS_STATUS_INVALID_VALUE;
    if (p->schemes & CUBLASLT_REDUCTION_SCHEME_INPLACE)
        return CUBLAS_STATUS_NOT_SUPPORTED; // slam.h must not ask for it
    emulator_products_state.proposals++;
    memcpy(problem.align, p->align, sizeof problem.align);
    problem.align_bias = d->epilogue == CUBLASLT_EPILOGUE_BIAS ? emulator_alignment(d->bias) : 0;
    const size_t partial = 2 * sizeof(float) * problem.m * problem.n;
    *n = 0;
    if (p->schemes & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE && problem.k >= 128 && partial <= p->workspace) {
        problem.splits = 2;
        problem.workspace = p->workspace;
        found[(*n)++] = {problem, p->workspace, CUBLAS_STATUS_SUCCESS};
        problem.splits = 1;
        problem.workspace = 0;
    }
    for (; problem.way < 3 && *n < most; problem.way++) {
        found[(*n)++] = {problem, 0, CUBLAS_STATUS_SUCCESS};
        if (problem.way > 0 || *n == most) continue;
        memset(&found[*n], 0xff, sizeof *found);
        found[(*n)++].state = CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}

static inline float emulator_number(const void *p, size_t i, cudaDataType type) {
    return type == CUDA_R_16BF ? (float)((const __nv_bfloat16 *)p)[i] : ((const float *)p)[i];
}

/* Column j of op(A) op(B) + bias + add D, into D. a: op(A) (k_end,m). */
template <typename Sum>
static void emulator_column(const cublasLtMatmulDescOpaque_t &desc, const float *a, uint64_t m, uint64_t k_end,
                            int backwards, const void *B, const cublasLtMatrixLayoutOpaque_t &b, void *D,
                            const cublasLtMatrixLayoutOpaque_t &d, float add, uint64_t j) {
    std::vector<Sum> column((size_t)m);
    for (uint64_t i = 0; desc.epilogue == CUBLASLT_EPILOGUE_BIAS && i < m; i++)
        column[i] = emulator_number(desc.bias, i, d.type);
    for (uint64_t step = 0; step < k_end; step++) {
        const uint64_t k = backwards ? k_end - 1 - step : step;
        const Sum x = emulator_number(B, desc.transB == CUBLAS_OP_T ? k * b.ld + j : j * b.ld + k, b.type);
        for (uint64_t i = 0; i < m; i++) column[i] += x * a[k * m + i];
    }
    for (uint64_t i = 0; i < m; i++) {
        const size_t at = j * d.ld + i;
        const float sum = (float)(column[i] + (add != 0 ? (Sum)add * emulator_number(D, at, d.type) : (Sum)0));
        if (d.type == CUDA_R_16BF) ((__nv_bfloat16 *)D)[at] = sum;
        else ((float *)D)[at] = sum;
    }
}

/* D = alpha op(A) op(B) + beta C + bias, of which slam.h uses alpha 1, beta 0 and 1, and D = C. */
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDescOpaque_t *d, const float *alpha,
                                            const void *A_, cublasLtMatrixLayoutOpaque_t *A, const void *B_,
                                            cublasLtMatrixLayoutOpaque_t *B, const float *beta, const void *C_,
                                            cublasLtMatrixLayoutOpaque_t *C, void *D_, cublasLtMatrixLayoutOpaque_t *D,
                                            const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                                            cudaStream_t stream) {
    cublasLtMatmulAlgo_t s;
    const void *const pointers[4] = {A_, B_, C_, D_};
    const cublasLtMatrixLayoutOpaque_t *const layouts[4] = {A, B, C, D};
    emulator_check_stream(stream, "cublasLtMatmul");
    if (!emulator_problem(d, A, B, C, D, &s) || *alpha != 1 || C_ != D_ || algo->valid != s.valid)
        return CUBLAS_STATUS_INVALID_VALUE;
    for (int i = 0; i < 4 && !emulator_device.dry; i++) {
        const size_t numbers = layouts[i]->cols ? (layouts[i]->cols - 1) * layouts[i]->ld + layouts[i]->rows : 0;
        const size_t bytes = numbers * (layouts[i]->type == CUDA_R_16BF ? 2 : 4);
        if (!emulator_on_device(pointers[i], bytes))
            emulator_fail("cublasLtMatmul: %p has no %zu bytes of device memory, operand %c", pointers[i], bytes,
                          "ABCD"[i]);
    }
    const size_t bias_bytes = d->epilogue == CUBLASLT_EPILOGUE_BIAS ? s.m * (D->type == CUDA_R_16BF ? 2 : 4) : 0;
    if (bias_bytes && !emulator_device.dry && !emulator_on_device(d->bias, bias_bytes))
        emulator_fail("cublasLtMatmul: %p has no %zu bytes of device memory, bias", d->bias, bias_bytes);
    if ((uintptr_t)workspace % 256 || !emulator_on_device(workspace, workspace_bytes))
        emulator_fail("cublasLtMatmul: %p has no %zu bytes of workspace, aligned to 256", workspace, workspace_bytes);
    if (s.m != algo->m || s.n != algo->n || s.k != algo->k || s.epilogue != algo->epilogue)
        emulator_fail("cublasLtMatmul: %u x %u x %u by an algorithm for %u x %u x %u or another epilogue", s.m, s.n,
                      s.k, algo->m, algo->n, algo->k);
    int refused = 0;
    for (int i = 0; i < 4; i++) refused |= emulator_alignment(pointers[i]) < algo->align[i];
    refused |= algo->align_bias && emulator_alignment(d->bias) < algo->align_bias;
    if (refused || emulator_products_state.refuse > 0) {
        emulator_products_state.refuse -= !refused;
        emulator_products_state.refusals++;
        return emulator_return(cudaErrorInvalidValue), CUBLAS_STATUS_NOT_SUPPORTED; // it may leave an error behind
    }
    if (algo->workspace > workspace_bytes)
        emulator_fail("cublasLtMatmul: the algorithm uses %zu bytes of workspace, there are %zu",
                      (size_t)algo->workspace, workspace_bytes);
    if (!h->loaded && emulator_device.used + (16 << 20) > emulator_device.limit)
        return emulator_return(cudaErrorMemoryAllocation), CUBLAS_STATUS_ALLOC_FAILED;
    if (!h->loaded) emulator_device.used += h->loaded = 16 << 20;
    if (emulator_device.dry) return CUBLAS_STATUS_SUCCESS;
    const uint64_t m = s.m, n = s.n, k_end = algo->splits > 1 ? s.k / 64 * 64 : s.k;
    const cublasLtMatmulDescOpaque_t desc = *d;
    const cublasLtMatrixLayoutOpaque_t a_layout = *A, b_layout = *B, d_layout = *D;
    const float add = *beta;
    const int splits = algo->splits, way = algo->way;
    const size_t bytes = algo->workspace;
    double *times = emulator_products_state.times;
    if (getenv("EMULATOR_TIMES")) sscanf(getenv("EMULATOR_TIMES"), "%lf %lf %lf", &times[0], &times[1], &times[2]);
    emulator_device.clock += times[way] > 0 ? times[way] : 1;
    emulator_ask(stream, [=] {
        if (splits > 1) { // it may write all of its workspace: the sums and the end
            memset(workspace, 0xff, 2 * m * n * sizeof(float));
            memset((char *)workspace + bytes - 4096, 0xff, 4096);
        }
        std::vector<float> a((size_t)k_end * m);
        for (uint64_t k = 0; k < k_end; k++)
            for (uint64_t i = 0; i < m; i++)
                a[k * m + i] = emulator_number(
                    A_, desc.transA == CUBLAS_OP_T ? i * a_layout.ld + k : k * a_layout.ld + i, a_layout.type);
        const auto column = way ? emulator_column<float> : emulator_column<double>;
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (int64_t j = 0; j < (int64_t)n; j++)
            column(desc, a.data(), m, k_end, way == 2, B_, b_layout, D_, d_layout, add, (uint64_t)j);
    });
    return CUBLAS_STATUS_SUCCESS;
}
#ifdef SLAM_MPI
#include "nccl_emulator.h"
#endif
#endif
