/* The CUDA ops against those of the CPU, in float and in bf16: every op on random shapes, ragged ends included, then
   whole models. Built by a C++ compiler with the emulator it runs here, each case under three orders of threads whose
   results must be the same bits; built by nvcc it runs on a GPU (`make gpu-test`), each case twice. With -DOPS_ONLY it
   needs only sections 1, 4 and 5. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"
#include <functional>
#include <vector>

#ifdef SLAM_EMULATOR
enum { RUNS = 3 };
#else
enum { RUNS = 2 };
static void emulator_seed(uint64_t) {}
static void emulator_lazy(int) {}
#endif

static int random_int(int n) { return (int)rng_below(&check_state.seed, (uint64_t)n); }

/* ---- one op on both backends ---- */

enum kind { ACT, FLOAT, INT, DOUBLE };
static const size_t host_size[] = {4, 4, 4, 8};

/* An argument in memory: what it holds before the op, on the host (an activation as float, already rounded), and
   whether the op writes it. Integers must be the CPU's. */
struct tensor_of {
    kind type;
    std::vector<char> host;
    int is_output;
    size_t n() const { return host.size() / host_size[type]; }
    float *floats() { return (float *)host.data(); }
    int *ints() { return (int *)host.data(); }
};

static tensor_of numbers(kind type, size_t n, double size, int is_output = 0) {
    tensor_of t = {type, std::vector<char>(n * 4), is_output};
    for (size_t i = 0; i < n; i++) t.floats()[i] = (float)(size * rng_normal(&check_state.seed));
    return t;
}

static tensor_of integers(size_t n, int below, int is_output = 0) {
    tensor_of t = {INT, std::vector<char>(n * 4), is_output};
    for (size_t i = 0; i < n; i++) t.ints()[i] = random_int(below);
    return t;
}

static tensor_of doubles(const double *x, size_t n, int is_output) {
    return {DOUBLE, std::vector<char>((const char *)x, (const char *)(x + n)), is_output};
}

/* What an op only writes is full of NaN before. */
static tensor_of unwritten(kind type, size_t n) {
    tensor_of t = numbers(type, n, 0, 1);
    for (size_t i = 0; i < n; i++) t.floats()[i] = NAN;
    return t;
}

static int shift; // activations and floats begin so many numbers behind an aligned address
static size_t bytes_before(slam_ops *ops, const tensor_of &t) {
    return t.type == ACT ? shift * ops->act_bytes : t.type == FLOAT ? shift * sizeof(float) : 0;
}

static void *to_device(slam_ops *ops, const tensor_of &t) {
    const size_t n = t.n(), before = bytes_before(ops, t);
    char *p = (char *)ops->alloc(ops, before + (t.type == ACT ? n * ops->act_bytes : t.host.size()));
    float *wide = t.type == ACT ? (float *)ops->alloc(ops, n * sizeof(float)) : NULL;
    if (!CHECK(p, "%s", slam_error())) return NULL;
    p += before;
    ops->upload(ops, wide ? (char *)wide : p, t.host.data(), t.host.size());
    if (wide) ops->to_act(ops, (slam_act *)p, wide, n);
    ops->release(ops, wide);
    return p;
}

static std::vector<char> from_device(slam_ops *ops, const tensor_of &t, void *p) {
    std::vector<char> out(t.host.size());
    float *wide = t.type == ACT ? (float *)ops->alloc(ops, t.n() * sizeof(float)) : NULL;
    if (wide) ops->to_float(ops, wide, (slam_act *)p, t.n());
    ops->download(ops, out.data(), wide ? wide : p, out.size());
    ops->release(ops, wide);
    return out;
}

typedef std::function<void(slam_ops *, void **)> operation; // gets the addresses of the tensors in their order

static std::vector<std::vector<char>> run_on(slam_ops *ops, const std::vector<tensor_of> &tensors,
                                             const operation &op) {
    std::vector<void *> at;
    std::vector<std::vector<char>> results;
    for (const tensor_of &t : tensors) at.push_back(to_device(ops, t));
    if (CHECK(ops->finish(ops), "%s", slam_error())) op(ops, at.data());
    CHECK(ops->finish(ops), "%s", slam_error());
    for (size_t i = 0; i < tensors.size(); i++) {
        if (tensors[i].is_output) results.push_back(from_device(ops, tensors[i], at[i]));
        ops->release(ops, at[i] ? (char *)at[i] - bytes_before(ops, tensors[i]) : NULL);
    }
    return results;
}

static slam_ops *cpu, *gpu; // gpu: what is being tested

/* Runs the op on both and compares the outputs. */
static void check_operation(const char *name, std::vector<tensor_of> tensors, const operation &op, int runs = RUNS) {
    const int is_bf16 = gpu->act_bytes == 2;
    for (tensor_of &t : tensors) // both begin with the same numbers
        for (size_t i = 0; is_bf16 && t.type == ACT && i < t.n(); i++) t.floats()[i] = (float)bf16(t.floats()[i]);
    const std::vector<std::vector<char>> expected = run_on(cpu, tensors, op);
    std::vector<std::vector<char>> first;
    for (int run = 0; run < runs; run++) {
        emulator_seed((uint64_t)run + 1);
        const std::vector<std::vector<char>> got = run_on(gpu, tensors, op);
        if (run == 0) first = got;
        CHECK(got == first, "%s: order of threads %d gives other bits", name, run);
    }
    size_t k = 0;
    for (const tensor_of &t : tensors) {
        if (!t.is_output) continue;
        const void *e = expected[k].data(), *g = first[k++].data();
        char what[200];
        snprintf(what, sizeof what, "%.150s, argument %d", name, (int)(&t - tensors.data()));
        if (t.type == INT) CHECK(memcmp(e, g, t.host.size()) == 0, "%s differs", what);
        else if (t.type == DOUBLE) check_near(what, *(const double *)g / *(const double *)e, 1, 1e-5);
        else check_close(what, (const float *)g, (const float *)e, t.n(), is_bf16 ? 2e-2 : 1e-5);
    }
}

#define A(i) ((slam_act *)p[i])
#define F(i) ((float *)p[i])
#define I(i) ((int *)p[i])

/* ---- the ops of the language model ---- */

static void test_casts(size_t n) {
    check_operation("casts", {numbers(FLOAT, n, 3), unwritten(ACT, n), unwritten(FLOAT, n)},
                    [=](slam_ops *ops, void **p) {
                        ops->to_act(ops, A(1), F(0), n);
                        ops->to_float(ops, F(2), A(1), n);
                    });
}

static void test_embedding(int N, int C, int V) {
    check_operation("embedding forward",
                    {integers(N, V), numbers(ACT, (size_t)V * C, 1), unwritten(ACT, (size_t)N * C)},
                    [=](slam_ops *ops, void **p) { ops->embedding_forward(ops, A(2), I(0), A(1), N, C); });
    check_operation("embedding backward",
                    {integers(N, V), numbers(ACT, (size_t)N * C, 1), numbers(FLOAT, (size_t)V * C, 1, 1)},
                    [=](slam_ops *ops, void **p) { ops->embedding_backward(ops, F(2), A(1), I(0), N, C, V); });
}

/* N groups of G rows of C numbers, `stride` apart, `at` numbers into a row; what lies between the rows must stay as it
   is. */
static void test_rmsnorm(int N, int G, int C, int stride, int at) {
    const size_t n = (size_t)N * stride;
    check_operation("rmsnorm forward",
                    {numbers(ACT, n, 2), numbers(ACT, C, 1), numbers(ACT, n, 1, 1), unwritten(FLOAT, N * G)},
                    [=](slam_ops *ops, void **p) {
                        rmsnorm_forward(ops, NULL, (slam_act *)((char *)p[2] + at * ops->act_bytes), F(3),
                                        (slam_act *)((char *)p[0] + at * ops->act_bytes), NULL, A(1), N, G, C, stride);
                    });
    check_operation("rmsnorm forward in place", {numbers(ACT, n, 2, 1), numbers(ACT, C, 1), unwritten(FLOAT, N * G)},
                    [=](slam_ops *ops, void **p) {
                        slam_act *x = (slam_act *)((char *)p[0] + at * ops->act_bytes);
                        rmsnorm_forward(ops, NULL, x, F(2), x, NULL, A(1), N, G, C, stride);
                    });
    check_operation("rmsnorm forward of a sum",
                    {numbers(ACT, n, 2), numbers(ACT, n, 1), numbers(ACT, C, 1), numbers(ACT, n, 1, 1),
                     numbers(ACT, n, 1, 1), unwritten(FLOAT, N * G)},
                    [=](slam_ops *ops, void **p) {
                        slam_act *x[5];
                        for (int k = 0; k < 5; k++)
                            x[k] = (slam_act *)((char *)p[k] + (k == 2 ? 0 : at * ops->act_bytes));
                        rmsnorm_forward(ops, x[3], x[4], F(5), x[0], x[1], x[2], N, G, C, stride);
                    });
    tensor_of rstd = numbers(FLOAT, N * G, 0);
    for (int i = 0; i < N * G; i++) rstd.floats()[i] = 0.5f + (float)rng_uniform(&check_state.seed);
    check_operation("rmsnorm backward",
                    {numbers(ACT, n, 1, 1), numbers(FLOAT, C, 1, 1), numbers(ACT, n, 1), numbers(ACT, n, 1),
                     numbers(ACT, C, 1), rstd},
                    [=](slam_ops *ops, void **p) {
                        slam_act *x[4];
                        for (int k = 0; k < 4; k++) x[k] = (slam_act *)((char *)p[k] + at * ops->act_bytes);
                        rmsnorm_backward(ops, x[0], F(1), x[2], x[3], A(4), F(5), N, G, C, stride);
                    });
    check_operation("rmsnorm backward in place",
                    {numbers(ACT, n, 1, 1), numbers(FLOAT, C, 1, 1), numbers(ACT, n, 1), numbers(ACT, C, 1), rstd},
                    [=](slam_ops *ops, void **p) {
                        slam_act *x[3];
                        for (int k = 0; k < 3; k++) x[k] = (slam_act *)((char *)p[k] + at * ops->act_bytes);
                        rmsnorm_backward(ops, x[0], F(1), x[0], x[2], A(3), F(4), N, G, C, stride);
                    });
}

static void test_matmul(int N, int C, int OC) {
    const size_t x = (size_t)N * C, w = (size_t)OC * C, out = (size_t)N * OC;
    check_operation(
        "matmul forward",
        {numbers(ACT, x, 1), numbers(ACT, w, 0.1), numbers(ACT, OC, 1), unwritten(ACT, out), unwritten(ACT, out)},
        [=](slam_ops *ops, void **p) {
            matmul_forward(ops, A(3), A(0), A(1), A(2), N, C, OC);
            matmul_forward(ops, A(4), A(0), A(1), NULL, N, C, OC);
        });
    check_operation("matmul backward",
                    {numbers(ACT, x, 1), numbers(ACT, w, 0.1), numbers(ACT, out, 1), unwritten(ACT, x),
                     numbers(FLOAT, w, 1, 1), numbers(FLOAT, OC, 1, 1)},
                    [=](slam_ops *ops, void **p) {
                        matmul_backward_input(ops, A(3), A(2), A(1), N, C, OC);
                        matmul_backward_weight(ops, F(4), F(5), A(2), A(0), N, C, OC);
                        matmul_backward_weight(ops, F(4), NULL, A(2), A(0), N, C, OC);
                    });
}

/* Sums of K ones are K exactly, also where K is no multiple of 64: no term of a split sum is lost. */
static void test_ones(int K) {
    const int N = 72, C = 40;
    tensor_of x = numbers(ACT, (size_t)K * C, 0), dout = numbers(ACT, (size_t)K * N, 0),
              dw = numbers(FLOAT, (size_t)N * C, 0, 1);
    for (size_t i = 0; i < x.n(); i++) x.floats()[i] = 1;
    for (size_t i = 0; i < dout.n(); i++) dout.floats()[i] = 1;
    const std::vector<char> got = run_on(gpu, {x, dout, dw}, [=](slam_ops *ops, void **p) {
        matmul_backward_weight(ops, F(2), NULL, A(1), A(0), K, C, N);
    })[0];
    for (int i = 0; i < N * C; i++)
        if (!CHECK(((const float *)got.data())[i] == (float)K, "sum of %d ones: %g", K, ((const float *)got.data())[i]))
            return;
}

static void test_swiglu(int N, int F_) {
    const size_t n = (size_t)N * F_;
    check_operation("swiglu forward", {numbers(ACT, 2 * n, 2), unwritten(ACT, n)},
                    [=](slam_ops *ops, void **p) { ops->swiglu_forward(ops, A(1), A(0), N, F_); });
    check_operation("swiglu backward", {numbers(ACT, 2 * n, 2), numbers(ACT, n, 1), unwritten(ACT, 2 * n)},
                    [=](slam_ops *ops, void **p) { ops->swiglu_backward(ops, A(2), A(1), A(0), N, F_); });
    check_operation("swiglu backward in place", {numbers(ACT, 2 * n, 2, 1), numbers(ACT, n, 1)},
                    [=](slam_ops *ops, void **p) { ops->swiglu_backward(ops, A(0), A(1), A(0), N, F_); });
}

static void test_crossentropy(int N, int V, int stride) {
    tensor_of targets = integers(N, V), logits = numbers(ACT, (size_t)N * stride, 3, 1), weights = numbers(FLOAT, N, 1);
    for (int i = 0; i < N; i += 3) targets.ints()[i] = -1;
    if (N > 1) logits.floats()[stride] = 200;  // one logit far above
    for (int scaled = 0; scaled < 3; scaled++) // the losses alone; with gradients; with weights
        check_operation("cross-entropy", {logits, targets, weights, unwritten(FLOAT, N)}, [=](slam_ops *ops, void **p) {
            const slam_xent x = xent(N, V, stride, scaled ? 0.25f : 0, scaled == 2 ? F(2) : NULL);
            ops->crossentropy(ops, F(3), A(0), I(1), &x);
        });
}

/* What lies between V and stride counts for nothing, however large it is, and its gradient is 0. */
static void test_crossentropy_padding(int N, int V, int stride) {
    tensor_of targets = integers(N, V), logits = numbers(ACT, (size_t)N * stride, 3, 1);
    targets.ints()[0] = V - 1;
    targets.ints()[1] = -1;
    for (int i = 0; i < N; i++)
        for (int v = V; v < stride; v++) logits.floats()[(size_t)i * stride + v] = 10000;
    check_operation("cross-entropy with padding", {logits, targets, unwritten(FLOAT, N)}, [=](slam_ops *ops, void **p) {
        const slam_xent x = xent(N, V, stride, 0.25f, NULL);
        ops->crossentropy(ops, F(2), A(0), I(1), &x);
    });
}

static void test_sums(size_t n) {
    const double begin[] = {3, 5};
    tensor_of out = doubles(begin, 2, 1), x = numbers(FLOAT, n, 1);
    for (size_t i = 0; i < n; i++) x.floats()[i] += 0.5f;
    check_operation("sum", {x, out}, [=](slam_ops *ops, void **p) { ops->sum(ops, (double *)p[1], F(0), n); });
    check_operation("sum of squares", {x, out},
                    [=](slam_ops *ops, void **p) { ops->sum_squares(ops, (double *)p[1], F(0), n); });
}

static void test_adamw(size_t n) {
    tensor_of v = numbers(FLOAT, n, 1, 1);
    for (size_t i = 0; i < n; i++) v.floats()[i] *= v.floats()[i];
    const double cases[][2] = {
        {1, 4}, {1, 1e-4}, {1, 1e40}, {NAN, 1}, {1, INFINITY}}; // clipped, not clipped, clipped; skipped twice
    for (int k = 0; k < 5; k++)
        check_operation("AdamW",
                        {numbers(ACT, n, 1, 1), numbers(FLOAT, n, 1, 1), numbers(FLOAT, n, 1, 1), v,
                         numbers(FLOAT, n, k == 2 ? 1e19 : 1), doubles(cases[k], 2, 0)},
                        [=](slam_ops *ops, void **p) {
                            const slam_adamw_params h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, 3};
                            slam_act *rounded = ops->act_bytes == 4 ? A(1) : A(0);
                            ops->adamw(ops, rounded, F(1), F(2), F(3), F(4), (double *)p[5], &h, n);
                            if (ops->act_bytes == 4 && gpu->act_bytes == 2 && k < 3) ops->to_act(ops, A(0), F(1), n);
                        });
}

/* ---- attention ---- */

struct shape {
    int B, T, NH, KVH, HS;
    int documents; // about so many a row; 0: one token each
    int masked, both_ways;
};

struct mask_of {
    tensor_of start, end, mask_start, mask_end, rope;
};

static mask_of make_mask(const shape &s) {
    const size_t n = (size_t)s.B * s.T;
    mask_of w = {integers(n, 1), integers(n, 1), integers(n, 1), integers(n, 1), numbers(FLOAT, (size_t)s.T * s.HS, 0)};
    for (int b = 0; b < s.B; b++) {
        int *start = w.start.ints() + b * s.T, *end = w.end.ints() + b * s.T;
        for (int t = 0, first = 0; t < s.T; t++) {
            if (s.documents == 0 || (s.documents > 1 && random_int(s.T) < s.documents)) first = t;
            start[t] = first;
        }
        for (int t = s.T - 1, last = s.T; t >= 0; t--) {
            end[t] = last;
            if (start[t] == t) last = t;
        }
        for (int t = 0; s.masked && t < s.T; t++) { // the last third of a document does not see the one before it
            const int n = end[t] - start[t], first = start[t] + n / 3, past = start[t] + 2 * n / 3;
            if (t >= past && past > first && start[t] % 2 == 0)
                w.mask_start.ints()[b * s.T + t] = first, w.mask_end.ints()[b * s.T + t] = past;
        }
    }
    slam_config c = ZERO;
    c.rope_theta = 10000;
    float *rope = rope_table(s.T, s.HS / 2, &c);
    memcpy(w.rope.floats(), rope, w.rope.host.size());
    free(rope);
    return w;
}

/* rotated: 0: no rotation; 1: of whole heads; 2: of their first half, with whatever numbers are there in the table */
static slam_mask mask_new(const shape &s, const float *rope, int rotated) {
    slam_mask m = ZERO;
    m.B = s.B, m.T = s.T, m.NH = s.NH, m.KVH = s.KVH, m.HS = s.HS;
    m.pairs = rotated ? s.HS / (2 * rotated) : 0;
    m.rope = rope;
    return m;
}

/* Query heads to key/value heads as 1, 2 or 7 to 1; documents from one token to the whole row. */
static shape random_shape(void) {
    const int ratios[] = {1, 2, 7}, sizes[] = {32, 64, 128, 20}, documents[] = {0, 1, 2, 5, 30};
    shape s;
    s.B = 1 + random_int(2);
    s.T = 1 + random_int(260);
    s.KVH = 1 + random_int(2);
    s.NH = s.KVH * ratios[random_int(3)];
    s.HS = sizes[random_int(4)];
    s.documents = documents[random_int(5)];
    s.both_ways = random_int(4) == 0;
    s.masked = !s.both_ways && random_int(2);
    return s;
}

static void test_attention(const shape &s, const mask_of &w, int rotated, int runs = RUNS) {
    const size_t N = (size_t)s.B * s.T, O = (size_t)s.NH * s.HS, W = O + 2 * (size_t)s.KVH * s.HS;
    check_operation(
        rotated == 2 ? "attention, half a head rotated"
        : rotated    ? "attention"
                     : "attention without rotation",
        {w.start, w.end, w.mask_start, w.mask_end, w.rope, numbers(ACT, N * W, 1, 1), unwritten(ACT, N * O),
         unwritten(FLOAT, N * s.NH), numbers(ACT, N * O, 1), unwritten(ACT, N * W), unwritten(FLOAT, N * s.NH)},
        [=](slam_ops *ops, void **p) {
            slam_mask mask = mask_new(s, F(4), rotated);
            mask.doc_start = I(0);
            if (s.both_ways) mask.doc_end = I(1);
            if (s.masked) mask.mask_start = I(2), mask.mask_end = I(3);
            ops->attention_forward(ops, A(6), F(7), A(5), &mask);
            ops->attention_backward(ops, A(9), F(10), A(8), A(6), F(7), A(5), &mask);
        },
        runs);
}

/* No query sees any key of the first tile of 64 keys: their gradients are zeros, whatever the copies of the tile are
   doing. */
static void test_unseen_tile(int HS) {
    const shape s = {1, 150, 2, 1, HS, 1, 0, 1};
    mask_of w = make_mask(s);
    for (int t = 0; t < s.T; t++) w.start.ints()[t] = 64, w.end.ints()[t] = s.T;
    for (int t = 0; t < 64; t++) w.start.ints()[t] = 64; // their rotary positions are negative, so there is no rotation
    test_attention(s, w, 0, RUNS == 3 && gpu->act_bytes == 2 ? 40 : RUNS); // kernels for float copy nothing
}

static void test_decode(const shape &s) {
    const mask_of w = make_mask(s);
    const size_t O = (size_t)s.NH * s.HS, K = 2 * (size_t)s.KVH * s.HS;
    tensor_of lengths = integers(s.B, s.T);
    lengths.ints()[0] = s.T - 1;
    if (s.B > 1) lengths.ints()[1] = 0;
    for (int rotated = 0; rotated < 3; rotated++)
        check_operation("attention of one more token",
                        {lengths, w.rope, numbers(ACT, (size_t)s.B * s.T * K, 1, 1), numbers(ACT, s.B * (O + K), 1, 1),
                         unwritten(ACT, s.B * O)},
                        [=](slam_ops *ops, void **p) {
                            const slam_mask mask = mask_new(s, F(1), rotated);
                            ops->attention_decode(ops, A(4), A(2), A(3), I(0), &mask);
                        });
}

static void test_fill(const shape &s) {
    const size_t O = (size_t)s.NH * s.HS, K = 2 * (size_t)s.KVH * s.HS;
    const int capacity = s.T + 2;
    tensor_of slots = integers(s.B, 1), lengths = integers(s.B, s.T + 1);
    for (int b = 0; b < s.B; b++) slots.ints()[b] = s.B - b;
    check_operation(
        "keys and values into the cache",
        {slots, lengths, numbers(ACT, (size_t)s.B * s.T * (O + K), 1), numbers(ACT, (s.B + 1) * capacity * K, 1, 1)},
        [=](slam_ops *ops, void **p) {
            const slam_mask mask = mask_new(s, NULL, 0);
            ops->attention_fill(ops, A(3), A(2), I(0), I(1), capacity, &mask);
        });
}

static void test_operations(const char *dtype) {
    const int sizes[][2] = {{1, 8}, {3, 5}, {37, 64}, {130, 96}, {70, 33}, {18, 896}};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    for (int k = 0; k < SIZES + 3;
         k++) { // the last three at random, one of them with rows that are no multiple of 16 bytes
        check_state.seed = (uint64_t)k; // of the sizes; a test has a seed of its own
        const int N = k < SIZES ? sizes[k][0] : 1 + random_int(99),
                  C = k < SIZES ? sizes[k][1] : 8 * (1 + random_int(30)) + k % 2;
        if (TEST("op: embedding %s %d x %d", dtype, N, C)) test_embedding(N, C, 11);
        if (TEST("op: rmsnorm %s %d x %d", dtype, N, C)) test_rmsnorm(N, 1, C, C, 0);
        if (TEST("op: matmul %s %d x %d", dtype, N, C)) test_matmul(N, C, 24), test_matmul(N, C, 37);
        if (TEST("op: swiglu %s %d x %d", dtype, N, C)) test_swiglu(N, C);
        if (TEST("op: cross-entropy %s %d x %d", dtype, N, C))
            test_crossentropy(N, C, C), test_crossentropy(N, C, (C + 15) / 8 * 8);
        if (TEST("op: casts %s %d", dtype, N * C)) test_casts((size_t)N * C);
        if (TEST("op: sums %s %d", dtype, N * C)) test_sums((size_t)N * C);
        if (TEST("op: AdamW %s %d", dtype, N * C)) test_adamw((size_t)N * C);
    }
    if (TEST("op: embedding %s, many tokens", dtype)) test_embedding(3000, 24, 7);
    if (TEST("op: embedding %s, large vocabulary, wide rows", dtype))
        test_embedding(1500, 8, 9000), test_embedding(40, 1208, 3);
    if (TEST("op: cross-entropy %s, a large vocabulary", dtype)) test_crossentropy(3, 20003, 20008);
    if (TEST("op: cross-entropy %s, 10000 behind the vocabulary", dtype)) {
        const int rows[][2] = {{502, 504},   {1020, 1024}, {1021, 1032},
                               {1501, 1504}, {1500, 1503}, {3001, 3003}}; // V, stride
        for (const int *row : rows) test_crossentropy_padding(5, row[0], row[1]);
    }
    if (TEST("op: rmsnorm %s, wide", dtype)) test_rmsnorm(3, 1, 5000, 5000, 0), test_rmsnorm(20, 1, 1100, 1100, 0);
    const int heads[][5] = {
        {9, 4, 64, 512, 0}, {21, 3, 128, 896, 128}, {7, 2, 20, 100, 20}, {5, 2, 32, 81, 3}, {3, 2, 320, 1000, 8}};
    for (const int *h : heads)
        if (TEST("op: rmsnorm %s of %d x %d heads of %d, %d apart", dtype, h[0], h[1], h[2], h[3]))
            test_rmsnorm(h[0], h[1], h[2], h[3], h[4]);
    const int ones[] = {64, 1000, 11528, 66576};
    for (int K : ones)
        if (TEST("op: matmul %s, %d ones", dtype, K)) test_ones(K);
    const shape corners[] = {{1, 1, 1, 1, 64, 1, 0, 0},    {2, 100, 2, 1, 64, 1, 0, 0}, {1, 200, 7, 1, 64, 4, 0, 0},
                             {1, 150, 14, 2, 64, 3, 1, 0}, {1, 90, 4, 2, 32, 1, 1, 0},  {2, 131, 2, 2, 32, 3, 0, 1},
                             {1, 70, 2, 1, 128, 2, 1, 0},  {1, 65, 4, 2, 16, 2, 1, 0},  {1, 40, 3, 3, 12, 0, 0, 0},
                             {1, 64, 2, 1, 64, 0, 0, 0},   {1, 300, 1, 1, 32, 2, 1, 0}, {1, 70, 2, 1, 256, 2, 1, 0}};
    enum { CORNERS = sizeof corners / sizeof *corners, DRAWN = 8 };
    for (int k = 0; k < CORNERS + DRAWN; k++) {
        check_state.seed = (uint64_t)k;
        const shape s = k < CORNERS ? corners[k] : random_shape();
        if (TEST("op: attention %s B %d T %d NH %d KVH %d HS %d, %d documents%s%s", dtype, s.B, s.T, s.NH, s.KVH, s.HS,
                 s.documents, s.masked ? ", masked spans" : "", s.both_ways ? ", both ways" : ""))
            test_attention(s, make_mask(s), 0, 1), test_attention(s, make_mask(s), 1),
                test_attention(s, make_mask(s), 2);
        if (k % 2 == 0 && TEST("op: decode %s B %d T %d NH %d KVH %d HS %d", dtype, s.B, s.T, s.NH, s.KVH, s.HS))
            test_decode(s);
        if (k % 2 == 0 && TEST("op: cache %s B %d T %d NH %d KVH %d HS %d", dtype, s.B, s.T, s.NH, s.KVH, s.HS))
            test_fill(s);
    }
    const int head_sizes[] = {32, 64, 128};
    for (int HS : head_sizes)
        if (TEST("op: attention %s, a tile that nobody sees, HS %d", dtype, HS)) test_unseen_tile(HS);
}

/* What the kernels cannot do is an error, not other numbers. */
static void test_limits(void) {
    float *p = (float *)gpu->alloc(gpu, 4096 * sizeof(float));
    slam_mask mask = mask_new({1, 3, 1, 1, 288, 0, 0, 0}, NULL, 0);
    mask.doc_start = (int *)p;
    gpu->attention_forward(gpu, (slam_act *)p, p, (slam_act *)p, &mask);
    check_fails(gpu->finish(gpu), "256 channels");
    rmsnorm_forward(gpu, NULL, (slam_act *)p, p, (slam_act *)p, NULL, (slam_act *)p, 1, 1, 10000, 10000);
    check_fails(gpu->finish(gpu), "8192 channels");
    CHECK(gpu->finish(gpu), "an error is reported once: %s", slam_error());
    matmul_forward(gpu, (slam_act *)p, (slam_act *)p, (slam_act *)p, NULL, 0, 8, 8);
    CHECK(gpu->finish(gpu), "no rows: %s", slam_error());
    gpu->release(gpu, p);
}

/* Large uploads from memory that is overwritten at once. */
static void test_upload(void) {
    const size_t n = (size_t)5 << 20;
    std::vector<float> x(n), y(n);
    float *p = (float *)gpu->alloc(gpu, n * sizeof(float));
    if (!CHECK(p, "%s", slam_error())) return;
    emulator_lazy(1);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < n; i++) x[i] = (float)(i % 100003 + round);
        gpu->upload(gpu, p, x.data(), n * sizeof(float));
    }
    std::vector<float> expected = x;
    std::fill(x.begin(), x.end(), -1.0f);
    gpu->download(gpu, y.data(), p, n * sizeof(float));
    gpu->zero(gpu, p, n * sizeof(float)); // queued when the memory is released
    gpu->release(gpu, p);
    emulator_lazy(0);
    CHECK(y == expected && gpu->finish(gpu), "other numbers: %s", slam_error());
}

#ifdef SLAM_EMULATOR
/* The algorithms of products: remembered for a shape and alignment, proposed again when refused. */
static void test_algorithms(void) {
    enum { N = 16 };
    slam_act *p = (slam_act *)gpu->alloc(gpu, 8 * N * N * sizeof(float));
    slam_act *x = p, *w = (slam_act *)((float *)p + N * N), *y = (slam_act *)((float *)p + 2 * N * N);
    slam_act *b = (slam_act *)((float *)p + 3 * N * N), *b_odd = (slam_act *)((char *)b + gpu->act_bytes);
    const int refusals = emulator_products_state.refusals;
    const auto proposals_of = [&](const slam_act *bias) {
        const int before = emulator_products_state.proposals;
        matmul_forward(gpu, y, x, w, bias, N, N, N);
        gpu->swiglu_forward(gpu, y, x, 1, N); // a refused product leaves no error to this launch
        CHECK(gpu->finish(gpu), "%s", slam_error());
        return emulator_products_state.proposals - before;
    };
    CHECK(proposals_of(b) == 1 && proposals_of(b) == 0, "an algorithm is not remembered");
    CHECK(proposals_of(b_odd) == 1 && proposals_of(b_odd) == 0 && proposals_of(b) == 0,
          "the alignment of the bias is not part of the shape");
    CHECK(proposals_of(NULL) == 1, "no bias is not part of the shape");
    CHECK(emulator_products_state.refusals == refusals,
          "an algorithm is used for an alignment that it was not proposed for");
    emulator_products_state.refuse = 2; // and so is the first one that is proposed instead
    CHECK(proposals_of(b) == 1 && proposals_of(b) == 0, "a refused algorithm is not replaced");
    emulator_products_state.refuse = 99;
    matmul_forward(gpu, y, x, w, b, N, N, N);
    emulator_products_state.refuse = 0;
    check_fails(gpu->finish(gpu), "cuda_matmul_forward");
    for (int rows = 1; rows <= 70; rows++)
        matmul_forward(gpu, y, x, w, b, rows % 2 ? 1 : 2, N, rows % 2 ? N : 1 + rows % 7);
    const slam_products *known = gpu->products; // its next entry, one of those that are not measured
    const auto splits_of = [&](int K) {
        const int at = known->measured + known->unmeasured % (SLAM_PRODUCTS - known->measured);
        matmul_forward(gpu, y, x, w, NULL, 1, K, 1);
        return ((const cublasLtMatmulAlgo_t *)&known->list[at][1])->splits;
    };
    CHECK(splits_of(192) == 2, "a sum may be split");
    CHECK(splits_of(200) == 1, "a sum of 200 is split");
    CHECK(gpu->finish(gpu), "%s", slam_error());
    gpu->release(gpu, p);
}

/* Algorithms that are measured: the fastest is kept, by a margin, and what a product adds to is not added to meanwhile.
   A second device that gets the table computes the same bits. */
static void test_tuning(void) {
    enum { N = 48, K = 112 };
    slam_ops *other = slam_cuda(0, gpu->act_bytes);
    slam_products *known = other->products;
    const int measured = SLAM_PRODUCTS / 2;
    const tensor_of numbers_of_x = numbers(FLOAT, N * K, 1);
    std::vector<float> bits[2];
    double *times = emulator_products_state.times;
    float *wide = (float *)other->alloc(other, N * K * sizeof(float)), *dw[2];
    slam_act *x = (slam_act *)other->alloc(other, 4 * N * K), *y = (slam_act *)other->alloc(other, 4 * K * K);
    other->upload(other, wide, numbers_of_x.host.data(), numbers_of_x.host.size());
    other->to_act(other, x, wide, N * K);
    const auto way_of = [&](int k) { return ((const cublasLtMatmulAlgo_t *)&known->list[k][1])->way; };
    const auto multiply = [&](int rows) { // another shape for each
        const int before = emulator_products_state.proposals;
        other->matmul_forward(other, y, x, x, NULL, rows, K, 8);
        CHECK(other->finish(other), "%s", slam_error());
        return emulator_products_state.proposals - before;
    };
    CHECK(multiply(8) == 1 && known->measured == 0, "a shape is measured unasked");
    known->tune = 1;
    times[0] = 5, times[1] = 1, times[2] = 3;
    emulator_lazy(1); // times can be read when the products are done
    CHECK(multiply(8) == 1 && known->measured == 1 && way_of(0) == 1, "not the fastest");
    emulator_lazy(0);
    times[1] = 7, times[2] = 4.95;
    CHECK(multiply(8) == 0 && multiply(7) == 1 && way_of(0) == 1 && way_of(1) == 0, "one that is 1 %% faster is taken");
    times[2] = 4.85;
    CHECK(multiply(6) == 1 && way_of(2) == 2, "one that is 3 %% faster is not taken");
    emulator_products_state.refuse = 3; // the second, which is no algorithm, counts for nothing
    other->matmul_forward(other, y, x, x, NULL, 5, K, 8);
    check_fails(other->finish(other), "CUBLAS_STATUS_NOT_SUPPORTED");
    CHECK(known->measured == 3, "a product that no algorithm computes is measured");
    times[0] = 1, emulator_products_state.refuse = 2;
    CHECK(multiply(4) == 1 && way_of(3) == 2, "one that is refused is taken");

    times[0] = 4, times[2] = 1;
    for (int k = 0; k < 2; k++) { // 1 + x^T x, where the memory for a measurement is there, and where it is not
        bits[k].assign(K * K, 1);
        dw[k] = (float *)other->alloc(other, K * K * sizeof(float));
        other->upload(other, dw[k], bits[k].data(), K * K * sizeof(float));
        if (k) emulator_memory(emulator_device.used), known->measured--;
        other->matmul_backward_weight(other, dw[k], NULL, x, x, N, K, K);
        emulator_memory(EMULATOR_MEMORY);
        other->download(other, bits[k].data(), dw[k], K * K * sizeof(float));
        CHECK(other->finish(other) && known->measured == 5, "%s", slam_error());
        CHECK(way_of(4) == (k ? 0 : 2), "way %d", way_of(4));
    }
    check_close("a sum", bits[0].data(), bits[1].data(), K * K, 1e-5);

    memcpy(gpu->products, known, sizeof *known);
    gpu->products->tune = 0;
    const int before = emulator_products_state.proposals;
    for (int k = 0; k < 2; k++) {
        slam_ops *ops = k ? gpu : other;
        bits[k].assign(8 * 8, 0);
        ops->matmul_forward(ops, y, x, x, NULL, 8, K, 8);
        ops->to_float(ops, dw[0], y, 8 * 8);
        ops->download(ops, bits[k].data(), dw[0], 8 * 8 * sizeof(float));
    }
    CHECK(bits[0] == bits[1] && emulator_products_state.proposals == before, "another device has other bits");

    for (int rows = 9; rows <= N; rows++) multiply(rows);
    CHECK(known->measured == measured, "%d measured", known->measured);
    known->tune = 0;
    for (int k = 1; k <= K; k++) other->matmul_forward(other, y, x, x, NULL, 8, k, 8);
    CHECK(multiply(8) == 0 && way_of(0) == 1, "a measured one is replaced");
    for (double &time : emulator_products_state.times) time = 0;
    for (void *p : {(void *)wide, (void *)x, (void *)y, (void *)dw[0], (void *)dw[1]}) other->release(other, p);
    slam_ops_free(other);
}

/* A product needs no memory when a model has taken all: the kernels of cuBLASLt are loaded before. An allocation that
   fails leaves no error to the launches after it. */
static void test_full_memory(void) {
    slam_ops *other = slam_cuda(0, gpu->act_bytes);
    slam_act *x = (slam_act *)other->alloc(other, 4096);
    emulator_memory(emulator_device.used);
    check_fails(other->alloc(other, 4096), "cannot allocate");
    other->swiglu_forward(other, x, x, 8, 8);
    other->matmul_forward(other, x, x, x, NULL, 8, 8, 8);
    CHECK(other->finish(other), "%s", slam_error());
    emulator_memory(EMULATOR_MEMORY);
    other->release(other, x);
    slam_ops_free(other);
}

/* What NCCL would do in its stream comes after what was queued before comm_begin, and before what is queued after
   comm_end. */
static void test_streams(void) {
    float x[] = {1, 2}, *p = (float *)gpu->alloc(gpu, sizeof x);
    emulator_lazy(1);
    for (int round = 0; round < 2; round++) { // the second with an event that was recorded before
        x[0] = 1, x[1] = 2;
        gpu->upload(gpu, p, x, sizeof x);
        gpu->zero(gpu, p, sizeof *p);
        gpu->comm_begin(gpu);
        emulator_ask_later((cudaStream_t)gpu->comm_stream, [=] { p[1] = p[0]; });
        gpu->comm_end(gpu);
        gpu->download(gpu, x, p, sizeof x);
        CHECK(x[0] == 0 && x[1] == 0, "round %d: %g %g", round, x[0], x[1]);
    }
    emulator_lazy(0);
    emulator_device.stuck = 1;
    CHECK(!gpu->comm_done(gpu), "it is not done");
    emulator_device.stuck = 0;
    CHECK(gpu->comm_done(gpu), "it is done");
    gpu->swiglu_forward(gpu, (slam_act *)p, (slam_act *)p, 0, 8);
    gpu->embedding_forward(gpu, (slam_act *)p, (int *)p, (slam_act *)p, 1, 1);
    CHECK(gpu->finish(gpu), "an error that is none: %s", slam_error());
    gpu->release(gpu, p);
}

/* The grids of shapes far larger than those that run here: 600,000 rows, 210,000 heads, a vocabulary of 152,064. */
static void test_large(void) {
    const int B = 15000, T = 40, N = B * T, C = 896, F = 4864, V = 152064;
    float *p = (float *)gpu->alloc(gpu, 1 << 20);
    slam_act *a = (slam_act *)p;
    int *i = (int *)p;
    const slam_xent x = xent(N, V, V, 1, NULL);
    const slam_adamw_params h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, 3};
    const slam_conv c = {B, 1, T, 512, T / 2, 512, 2, 2, 1, 0, 1, SLAM_GELU, i, a, a};
    const size_t n = (size_t)1 << 32;
    emulator_device.dry = 1;
    gpu->embedding_forward(gpu, a, i, a, N, C);
    gpu->embedding_backward(gpu, p, a, i, N, C, V);
    gpu->rmsnorm_forward(gpu, NULL, a, p, a, NULL, a, 1, N, 1, C, C);
    gpu->rmsnorm_forward(gpu, NULL, a, p, a, NULL, a, 1, N, 14, 64, 18 * 64);
    gpu->rmsnorm_backward(gpu, a, p, a, a, a, p, N, 14, 64, 18 * 64);
    gpu->matmul_forward(gpu, a, a, a, a, N, C, F);
    gpu->matmul_backward_input(gpu, a, a, a, N, C, F);
    gpu->matmul_backward_weight(gpu, p, p, a, a, N, C, F);
    gpu->matmul_backward_weight(gpu, p, p, a, a, N, 8, 8);
    for (int HS : {16, 32, 64, 128}) {
        slam_mask mask = mask_new({B, T, 14, 2, HS, 0, 0, 0}, p, 1);
        mask.doc_start = i;
        gpu->attention_forward(gpu, a, p, a, &mask);
        gpu->attention_backward(gpu, a, p, a, a, p, a, &mask);
        gpu->attention_decode(gpu, a, a, a, i, &mask);
        gpu->attention_fill(gpu, a, a, i, i, T, &mask);
    }
    gpu->swiglu_forward(gpu, a, a, N, F);
    gpu->swiglu_backward(gpu, a, a, a, N, F);
    gpu->crossentropy(gpu, p, a, i, &x);
    gpu->sum(gpu, (double *)p, p, n);
    gpu->adamw(gpu, a, p, p, p, p, (double *)p, &h, n);
    gpu->layernorm(gpu, a, a, a, a, a, a, 1, 0, N, C);
    gpu->channelnorm(gpu, a, a, a, i, 1, B, T, C);
    gpu->conv1d(gpu, a, a, a, a, &c);
    gpu->nearest(gpu, i, p, a, a, p, N, 768, 500);
    CHECK(gpu->finish(gpu), "%s", slam_error());
    gpu->swiglu_forward(gpu, a, a, 1 << 17, 1 << 18);
    check_fails(gpu->finish(gpu), "elements");
    emulator_device.dry = 0;
    gpu->release(gpu, p);
}

/* An error has the name of the op of which a launch failed, the first or a later one. */
static void test_names(void) {
    float *p = (float *)gpu->alloc(gpu, 1 << 20);
    slam_act *a = (slam_act *)p;
    int *i = (int *)(p + (1 << 16)); // zeros
    double *d = (double *)p;
    const slam_mask mask = {1, 8, 2, 1, 32, 16, i, NULL, NULL, NULL, p};
    const slam_adamw_params h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, 3};
    const slam_xent x = {8, 8, 8, 1, NULL};
    const struct {
        const char *name;
        int launches;
        std::function<void()> run;
    } list[] = {
        {"to_act", gpu->act_bytes == 2, [&] { gpu->to_act(gpu, (slam_act *)i, p, 9); }},
        {"embedding_forward", 1, [&] { gpu->embedding_forward(gpu, a, i, a, 8, 8); }},
        {"embedding_backward", 1, [&] { gpu->embedding_backward(gpu, p, a, i, 8, 8, 8); }},
        {"rmsnorm_forward", 1, [&] { gpu->rmsnorm_forward(gpu, NULL, a, p, a, NULL, a, 1, 8, 1, 8, 8); }},
        {"rmsnorm_backward", 2, [&] { gpu->rmsnorm_backward(gpu, a, p, a, a, a, p, 8, 1, 8, 8); }},
        {"matmul_backward_weight", 2, [&] { gpu->matmul_backward_weight(gpu, p, p, a, a, 8, 8, 8); }},
        {"attention_forward", 2, [&] { gpu->attention_forward(gpu, a, p, a, &mask); }},
        {"attention_backward", 2, [&] { gpu->attention_backward(gpu, a, p, a, a, p, a, &mask); }},
        {"attention_decode", 2, [&] { gpu->attention_decode(gpu, a, a, a, i, &mask); }},
        {"attention_fill", 1, [&] { gpu->attention_fill(gpu, a, a, i, i, 8, &mask); }},
        {"swiglu_forward", 1, [&] { gpu->swiglu_forward(gpu, a, a, 8, 8); }},
        {"swiglu_backward", 1, [&] { gpu->swiglu_backward(gpu, a, a, a, 8, 8); }},
        {"crossentropy", 1, [&] { gpu->crossentropy(gpu, p, a, i, &x); }},
        {"cuda_sum", 2, [&] { gpu->sum(gpu, d, p, 8); }},
        {"sum_squares", 2, [&] { gpu->sum_squares(gpu, d, p, 8); }},
        {"adamw", 1, [&] { gpu->adamw(gpu, a, p, p, p, p, d, &h, 8); }},
        {"layernorm", 1, [&] { gpu->layernorm(gpu, a, a, a, a, a, a, 1, 0, 8, 8); }},
        {"channelnorm", 1, [&] { gpu->channelnorm(gpu, a, a, a, i, 1, 1, 8, 8); }},
        {"nearest", 1, [&] { gpu->nearest(gpu, i, p, a, a, p, 8, 8, 8); }},
    };
    for (const auto &op : list)
        for (int at = 1; at <= op.launches; at++) {
            emulator_device.refuse = at;
            op.run();
            check_fails(gpu->finish(gpu), op.name);
        }
    emulator_device.refuse = 0;
    gpu->release(gpu, p);
}

/* A kernel that fails while later calls are queued: the message says what finds it, and CUDA_LAUNCH_BLOCKING does. */
static void test_blame(void) {
    float *p = (float *)gpu->alloc(gpu, 4096), numbers[8];
    double *sum = (double *)gpu->alloc(gpu, sizeof(double));
    const slam_xent x = {8, 8, 8, 1, NULL};
    gpu->finish(gpu);
    for (int blocking = 0; blocking < 2; blocking++) {
        if (blocking) setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
        emulator_lazy(1);
        emulator_fault("crossentropy");
        gpu->swiglu_forward(gpu, (slam_act *)p, (slam_act *)p, 8, 8);
        gpu->crossentropy(gpu, p, (slam_act *)p, (int *)p, &x);
        gpu->sum(gpu, sum, p, 8);
        gpu->download(gpu, numbers, p, sizeof numbers);
        check_fails(gpu->alloc(gpu, 1 << 20), "an operation before it failed");
        CHECK(!strstr(slam_error(), "--micro-batch"), "it is not a lack of memory: %s", slam_error());
        check_fails(gpu->finish(gpu), "an illegal memory access");
        const char *blamed =
            blocking ? "cuda_crossentropy failed" : "download or an operation before it (CUDA_LAUNCH_BLO";
        CHECK(strstr(slam_error(), blamed), "%s", slam_error());
        emulator_fault(NULL);
        emulator_lazy(0);
    }
    unsetenv("CUDA_LAUNCH_BLOCKING");
    CHECK(gpu->finish(gpu), "%s", slam_error());
    gpu->release(gpu, p);
    gpu->release(gpu, sum);
}
#endif

/* ---- what speech encoders need ---- */

static void test_gelu(size_t n) {
    check_operation("gelu", {numbers(ACT, n, 2), unwritten(ACT, n)},
                    [=](slam_ops *ops, void **p) { ops->gelu_forward(ops, A(1), A(0), n); });
    check_operation("gelu in place", {numbers(ACT, n, 2, 1)},
                    [=](slam_ops *ops, void **p) { ops->gelu_forward(ops, A(0), A(0), n); });
}

static void test_layernorm(int N, int C) {
    const size_t n = (size_t)N * C;
    for (int gelu = 0; gelu < 2; gelu++)
        check_operation("layernorm",
                        {numbers(ACT, n, 2, 1), numbers(ACT, n, 1), numbers(ACT, C, 1), numbers(ACT, C, 1),
                         unwritten(ACT, n), unwritten(ACT, n), unwritten(ACT, n)},
                        [=](slam_ops *ops, void **p) {
                            layernorm(ops, NULL, A(4), A(0), NULL, A(2), A(3), gelu, N, C);
                            layernorm(ops, A(5), A(6), A(0), A(1), A(2), A(3), gelu, N, C);
                            layernorm(ops, A(0), NULL, A(0), A(1), NULL, NULL, gelu, N, C);
                            layernorm(ops, NULL, A(0), A(0), A(1), A(2), A(3), gelu, N, C);
                        });
}

static tensor_of random_lengths(int B, int T) {
    tensor_of lengths = integers(B, T + 1);
    lengths.ints()[0] = T;
    if (B > 1) lengths.ints()[1] = 1;
    if (B > 2) lengths.ints()[2] = 0;
    return lengths;
}

static void test_channelnorm(int B, int T, int C) {
    tensor_of x = numbers(ACT, (size_t)B * T * C, 2, 1);
    for (size_t i = 0; i < x.n(); i++) x.floats()[i] += 1;
    check_operation("channelnorm", {x, numbers(ACT, C, 1), numbers(ACT, C, 1), random_lengths(B, T)},
                    [=](slam_ops *ops, void **p) { ops->channelnorm(ops, A(0), A(1), A(2), I(3), 1e-5f, B, T, C); });
}

/* What cannot be launched is reported once, by its name. */
static void test_launch(void) {
    float *out = (float *)gpu->alloc(gpu, 16);
    LAUNCH(gpu, add_partial_kernel, 1, 2048, 64, out, (const float *)out, 1, 1);
    check_fails(gpu->finish(gpu), "test_launch failed: invalid configuration");
    CHECK(gpu->finish(gpu), "%s", slam_error());
    gpu->release(gpu, out);
}

static void test_conv1d(const slam_conv &c, int runs = RUNS) {
    const size_t x = (size_t)c.B * c.T * c.G * c.C, w = (size_t)c.G * c.OC * c.K * c.C,
                 out = (size_t)c.B * c.TO * c.G * c.OC, in = (size_t)c.G * c.C;
    const tensor_of y = c.output == SLAM_ADD ? numbers(ACT, out, 1, 1) : unwritten(ACT, out);
    check_operation(
        "conv1d",
        {numbers(ACT, x, 1), numbers(ACT, w, 1 / sqrt(c.K * c.C)), numbers(ACT, (size_t)c.G * c.OC, 1), y, y, y,
         numbers(ACT, in, 1), numbers(ACT, in, 1), random_lengths(c.B, c.T)},
        [=](slam_ops *ops, void **p) {
            slam_conv normed = c;
            normed.lengths = I(8), normed.scale = A(6), normed.shift = A(7);
            ops->conv1d(ops, A(3), A(0), A(1), A(2), &c);
            ops->conv1d(ops, A(4), A(0), A(1), NULL, &c);
            ops->conv1d(ops, A(5), A(0), A(1), A(2), &normed);
        },
        runs);
}

/* Centroids far enough apart that rounding changes no unit; some are there twice. */
static void test_nearest(int N, int D, int K) {
    tensor_of x = numbers(ACT, (size_t)N * D, 0), centroids = numbers(ACT, (size_t)K * D, 4),
              squares = numbers(FLOAT, K, 0);
    for (size_t i = 0; i < centroids.n(); i++) centroids.floats()[i] = (float)bf16(centroids.floats()[i]);
    for (int d = 0; K > 3 && d < D; d++) centroids.floats()[(size_t)(K - 1) * D + d] = centroids.floats()[D + d];
    for (int k = 0; k < K; k++)
        for (int d = 0; d < D; d++)
            squares.floats()[k] += centroids.floats()[(size_t)k * D + d] * centroids.floats()[(size_t)k * D + d];
    for (int i = 0; i < N; i++) {
        const int k = i == 0 ? K - 1 : random_int(K);
        for (int d = 0; d < D; d++)
            x.floats()[(size_t)i * D + d] =
                centroids.floats()[(size_t)k * D + d] + 0.1f * (float)rng_normal(&check_state.seed);
    }
    check_operation("nearest", {x, centroids, squares, integers(N, 1, 1), numbers(FLOAT, (size_t)N * K, 0)},
                    [=](slam_ops *ops, void **p) { ops->nearest(ops, I(3), F(4), A(0), A(1), F(2), N, D, K); });
}

static void test_speech_operations(const char *dtype) {
    const int sizes[][2] = {{3, 5}, {9, 64}, {7, 33}, {21, 768}, {2, 2000}};
    for (int k = 0; k < 5; k++) {
        const int N = sizes[k][0], C = sizes[k][1];
        if (TEST("op: gelu %s %d", dtype, N * C)) test_gelu((size_t)N * C);
        if (TEST("op: layernorm %s %d x %d", dtype, N, C)) test_layernorm(N, C);
        if (TEST("op: nearest centroid %s %d x %d", dtype, N, C)) test_nearest(N, C, 1 + 20 * k);
    }
    const int rows[][3] = {{1, 3, 1}, {4, 50, 8}, {3, 129, 40}, {2, 400, 33}, {4, 7, 300}};
    for (int k = 0; k < 5; k++)
        if (TEST("op: channelnorm %s %d x %d x %d", dtype, rows[k][0], rows[k][1], rows[k][2]))
            test_channelnorm(rows[k][0], rows[k][1], rows[k][2]);
    if (TEST("op: tensors that are not aligned %s", dtype)) {
        for (shift = 1; shift <= 4; shift += 3) {
            test_embedding(19, 64, 11), test_rmsnorm(9, 2, 64, 192, 0), test_matmul(9, 64, 24), test_swiglu(7, 64);
            test_crossentropy(7, 60, 64), test_casts(64), test_sums(64), test_adamw(64);
            test_gelu(64), test_layernorm(5, 64), test_channelnorm(2, 9, 64);
            test_conv1d({2, 1, 41, 64, 20, 16, 2, 2, 1, 0, 1, SLAM_GELU, NULL, NULL, NULL});
        }
        shift = 0;
    }
    if (TEST("op: a launch that fails %s", dtype)) test_launch();
    const slam_conv convs[] = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, NULL, NULL, NULL},
                               {2, 1, 400, 1, 80, 32, 10, 5, 1, 0, 1, 0, NULL, NULL, NULL},
                               {3, 1, 80, 32, 40, 48, 3, 2, 1, 0, 1, SLAM_GELU, NULL, NULL, NULL},
                               {3, 1, 41, 48, 20, 5, 2, 2, 1, 0, 1, SLAM_ADD, NULL, NULL, NULL},
                               {2, 3, 90, 16, 90, 16, 8, 1, 1, 4, 1, SLAM_GELU, NULL, NULL, NULL},
                               {2, 2, 21, 4, 30, 4, 7, 1, 1, 6, 0.1f, SLAM_RELU, NULL, NULL, NULL},
                               {1, 1, 640, 1, 128, 200, 10, 5, 1, 3, 1, SLAM_GELU, NULL, NULL, NULL},
                               {1, 1, 90, 33, 28, 7, 7, 3, 1, 0, 1, SLAM_GELU, NULL, NULL, NULL},
                               {2, 1, 30, 9, 9, 140, 3, 3, 1, 1, 0.1f, 0, NULL, NULL, NULL},
                               {1, 1, 60, 16, 60, 16, 3, 1, 5, 5, 0.1f, SLAM_ADD, NULL, NULL, NULL},
                               {2, 2, 60, 5, 40, 7, 4, 2, 3, 9, 1, SLAM_GELU, NULL, NULL, NULL},
                               {1, 1, 3, 8, 10, 1, 7, 1, 10, 30, 0.01f, SLAM_ADD, NULL, NULL, NULL}};
    for (const slam_conv &c : convs)
        if (TEST("op: conv1d %s B %d G %d T %d C %d to T %d C %d, %d taps, stride %d, dilation %d, before %d", dtype,
                 c.B, c.G, c.T, c.C, c.TO, c.OC, c.K, c.stride, c.dilation, c.before))
            test_conv1d(c);
    /* more frames than are unfolded at once; 100 of them in the second part */
    const int frames = (CUDA_WORKSPACE - PRODUCT_WORKSPACE) / gpu->act_bytes / 512 + 100;
    if (TEST("op: conv1d %s, %d frames in two parts", dtype, frames))
        test_conv1d({1, 1, 8 * frames, 64, frames, 4, 8, 8, 1, 0, 1, SLAM_ADD, NULL, NULL, NULL}, 1);
}

#ifndef OPS_ONLY
/* ---- speech encoders ---- */

static std::vector<float> waveform(long n, double frequency) {
    std::vector<float> x;
    for (long t = 0; t < n; t++)
        x.push_back((float)(0.3 * sin((double)t * frequency) + 0.1 * rng_normal(&check_state.seed)));
    return x;
}

/* A model of test/fixtures/hubert on the CPU and here, a batch and its utterances alone; the same bits every time. */
static void test_hubert(const char *name, int layer) {
    char folder[200];
    snprintf(folder, sizeof folder, "test/fixtures/hubert/%s", name);
    slam_unit_config config = {SLAM_HUBERT, 0, 0, 1, layer, 40, 0, "", 0, 0};
    snprintf(config.hubert, sizeof config.hubert, "%s", folder);
    const size_t lengths[] = {1200, 300, 2500};
    std::vector<float> samples[3], out[4][3];
    slam_recording r[3];
    for (int i = 0; i < 3; i++) {
        samples[i] = waveform((long)lengths[i], (i + 1) / 7.0);
        r[i] = {samples[i].data(), lengths[i], NULL, ZERO};
    }
    for (int run = 0; run < 4; run++) { // the CPU; twice here; each alone
        slam_tokenizer *t = slam_tokenizer_load(NULL, &config, run ? gpu : cpu);
        if (!CHECK(t, "%s", slam_error())) return;
        emulator_seed((uint64_t)run);
        if (run < 3) CHECK(slam_units_encode(t, r, 3), "%s", slam_error());
        for (int i = 0; i < 3; i++) {
            if (run == 3) CHECK(slam_units_encode(t, &r[i], 1), "%s", slam_error());
            out[run][i].assign(r[i].features, r[i].features + r[i].units.frames * (size_t)t->width);
            free(r[i].features);
        }
        slam_tokenizer_free(t);
    }
    const int is_bf16 = gpu->act_bytes == 2;
    for (int i = 0; i < 3; i++) {
        check_close("features", out[1][i].data(), out[0][i].data(), out[0][i].size(), is_bf16 ? 5e-2 : 1e-4);
        check_close("features alone", out[3][i].data(), out[1][i].data(), out[0][i].size(), is_bf16 ? 2e-2 : 1e-5);
        CHECK(out[1][i] == out[2][i], "another order of threads gives other bits");
    }
}

/* Units by way of a padded batch, and the nearest centroids on the device. */
static void test_units(void) {
    slam_unit_config config = slam_unit_config_default();
    config.features = SLAM_HUBERT;
    config.rate = 0;
    config.layer = 1;
    snprintf(config.hubert, sizeof config.hubert, "test/fixtures/hubert/older_spelling");
    std::vector<float> samples, centroids;
    std::vector<int> frames[2];
    for (int t = 0; t < 2500; t++)
        samples.push_back((float)(0.3 * sin(t * t / 3e4) + 0.1 * rng_normal(&check_state.seed)));
    for (int i = 0; i < 10 * 24; i++) centroids.push_back((float)rng_normal(&check_state.seed));
    for (int k = 0; k < 2; k++) {
        slam_recording r = {samples.data(), samples.size(), NULL, ZERO};
        const slam_units &u = r.units;
        slam_tokenizer *t = slam_tokenizer_load(NULL, &config, k ? gpu : cpu);
        if (!CHECK(t, "%s", slam_error())) return;
        t->centroids = (float *)memcpy(NEW(float, 10 * 24), centroids.data(), 10 * 24 * sizeof(float));
        if (!CHECK(tokenizer_complete(t, "centroids", 10, 24) && slam_units_encode(t, &r, 1), "%s", slam_error()))
            return;
        for (size_t i = 0; i < u.n; i++) frames[k].insert(frames[k].end(), u.duration ? u.duration[i] : 1, u.unit[i]);
        slam_units_free(&r.units);
        slam_tokenizer_free(t);
    }
    const size_t n = frames[0].size();
    if (!CHECK(frames[1].size() == n && n > 100, "%zu and %zu frames", n, frames[1].size())) return;
    int differ = 0, changes = 0;
    for (size_t t = 0; t < n; t++) {
        differ += frames[0][t] != frames[1][t];
        changes += t && frames[0][t] != frames[0][t - 1];
    }
    CHECK(changes > 10 && differ <= (gpu->act_bytes == 2 ? (int)n / 10 : 0), "%d of %zu units differ", differ, n);
}

/* A vocoder of test/fixtures/vocoder against PyTorch; in bf16 with PyTorch's durations. The same bits every time. */
static void test_vocoder(const char *name) {
    char folder[200], path[300];
    snprintf(folder, sizeof folder, "test/fixtures/vocoder/%s", name);
    snprintf(path, sizeof path, "%s/case.safetensors", folder);
    tensors *file = tensors_open(path);
    if (!CHECK(file, "%s", slam_error())) return;
    const tensor *unit = tensors_find(file, "units"), *duration = tensors_find(file, "durations"),
                 *samples = tensors_find(file, "samples");
    const int is_bf16 = gpu->act_bytes == 2, given = !strcmp(tensors_metadata(file, "durations"), "given");
    std::vector<int> units(unit->count), durations(unit->count);
    std::vector<float> expected(samples->count), first;
    memcpy(units.data(), unit->data, unit->count * sizeof(int));
    if (duration && (given || is_bf16)) memcpy(durations.data(), duration->data, unit->count * sizeof(int));
    CHECK(tensor_floats(samples, expected.data(), 0, samples->count), "%s", slam_error());
    for (int run = 0; run < RUNS; run++) {
        slam_vocoder *v = slam_vocoder_open(folder, atoi(tensors_metadata(file, "speaker")),
                                            atoi(tensors_metadata(file, "style")), NULL, gpu);
        std::vector<float> out;
        const float *x;
        emulator_seed((uint64_t)run + 1);
        if (!CHECK(v && slam_vocoder_start(v, units.data(), durations.data(), units.size()), "%s", slam_error()))
            return;
        for (ptrdiff_t n; (n = slam_vocoder_next(v, &x)) > 0;) out.insert(out.end(), x, x + n);
        if (run == 0) first = out;
        CHECK(out == first, "another order of threads gives other bits");
        slam_vocoder_free(v);
    }
    if (CHECK(first.size() == expected.size(), "%zu samples, expected %zu", first.size(), expected.size()))
        check_close("samples", first.data(), expected.data(), first.size(), is_bf16 ? 2e-2 : 1e-5);
    tensors_close(file);
}

/* ---- whole models ---- */

static slam_config small_config(int family = SLAM_QWEN2) {
    slam_config c = ZERO;
    c.V = 30, c.C = 64, c.L = 2, c.NH = 4, c.KVH = 2, c.HS = 32, c.F = 96, c.T = 256;
    c.tied = 1, c.family = family;
    c.eps = 1e-6, c.init_std = 0.1, c.rope_theta = 10000;
    c.no_rope = family == SLAM_SMOLLM3 ? 1 : 0;
    return c;
}

static slam_batch random_batch(int B, int T, int V, int masked) {
    slam_batch b = slam_batch_new(B, T, masked);
    const shape s = {B, T, 1, 1, 2, 3, masked, 0};
    mask_of w = make_mask(s);
    memcpy(b.doc_start, w.start.ints(), sizeof(int) * B * T);
    if (masked) memcpy(b.mask_start, w.mask_start.ints(), sizeof(int) * B * T);
    if (masked) memcpy(b.mask_end, w.mask_end.ints(), sizeof(int) * B * T);
    for (int i = 0; i < B * T; i++) {
        b.tokens[i] = 1 + random_int(V - 1);
        b.targets[i] = random_int(9) ? 1 + (b.tokens[i] * 7 + 3) % (V - 1) : -1; // something that can be learnt
    }
    return b;
}

static int count_targets(const slam_batch &b) {
    int n = 0;
    for (int i = 0; i < b.B * b.T; i++) n += b.targets[i] >= 0;
    return n;
}

static void test_gradients(int family, int masked) {
    const slam_config config = small_config(family);
    slam_batch b = random_batch(2, 100, config.V, masked);
    std::vector<float> g[2];
    double stats[2][2];
    const int is_bf16 = gpu->act_bytes == 2;
    for (int k = 0; k < 2; k++) {
        slam_model *m = slam_model_new(k ? gpu : cpu, &config, 7);
        if (!CHECK(m && slam_model_plan(m, b.B, b.T, SLAM_TRAIN), "%s", slam_error())) return;
        CHECK(slam_forward_backward(m, &b, 1.0f / count_targets(b)), "%s", slam_error());
        g[k].resize(m->n_weights);
        m->ops->download(m->ops, g[k].data(), m->grads, g[k].size() * sizeof(float));
        m->ops->download(m->ops, stats[k], m->stats, sizeof stats[k]);
        for (size_t i = 0; k == 1 && i < m->layout->tensors.n; i++) {
            const model_tensor &t = m->layout->tensors.list[i];
            if (!strstr(t.name, "k_proj.bias")) // zero but for rounding: the softmax does not see it
                check_close(t.name, g[1].data() + t.offset, g[0].data() + t.offset, tensor_size(&t),
                            is_bf16 ? 3e-2 : 1e-4);
        }
        slam_model_free(m);
    }
    check_near("loss", stats[1][0] / stats[0][0], 1, is_bf16 ? 5e-3 : 1e-5);
    slam_batch_free(&b);
}

/* The losses of `steps` steps of two micro-batches; the weights in the end into `weights`. */
static std::vector<double> train_on(slam_ops *ops, int steps, int mode, std::vector<float> *weights) {
    const slam_config config = small_config();
    slam_adamw o = ZERO;
    o.beta1 = 0.9, o.beta2 = 0.95, o.eps = 1e-8, o.weight_decay = 0.1, o.clip = 0.5;
    std::vector<double> losses;
    check_state.seed = 5;
    slam_model *m = slam_model_new(ops, &config, 7);
    if (!CHECK(m && slam_model_plan(m, 2, 64, mode) && slam_adamw_init(&o, m), "%s", slam_error())) return losses;
    for (int i = 0; i < steps; i++) {
        slam_batch half[2] = {random_batch(2, 64, config.V, 0), random_batch(2, 64, config.V, 0)};
        const double targets = count_targets(half[0]) + count_targets(half[1]);
        slam_step step;
        for (int k = 0; k < 2; k++) {
            CHECK(slam_forward_backward(m, &half[k], (float)(1 / targets)), "%s", slam_error());
            memset(half[k].tokens, 0xff, sizeof(int) * 128); // the memory of the batch may be used again at once
        }
        CHECK(slam_adamw_step(&o, 1e-2, &step), "%s", slam_error());
        losses.push_back(step.loss_sum / targets);
        slam_batch_free(&half[0]), slam_batch_free(&half[1]);
    }
    if (weights) {
        weights->resize(m->n_weights);
        ops->download(ops, weights->data(), m->master, weights->size() * sizeof(float));
    }
    slam_adamw_free(&o);
    slam_model_free(m);
    return losses;
}

static void test_training(void) {
    const std::vector<double> expected = train_on(cpu, 20, SLAM_TRAIN, NULL), got = train_on(gpu, 20, SLAM_TRAIN, NULL);
    if (!CHECK(expected.size() == 20 && got.size() == 20, "no 20 steps")) return;
    for (int i = 0; i < 20; i++) check_near("loss of a step", got[i], expected[i], gpu->act_bytes == 2 ? 2e-2 : 1e-4);
    CHECK(got[19] < got[0] - 0.5, "the loss goes from %g to %g", got[0], got[19]);
}

static void test_determinism(void) {
    std::vector<float> weights[4];
    std::vector<double> losses[4];
    for (int k = 0; k < 3; k++) {
        emulator_seed((uint64_t)k + 11);
        emulator_lazy(k == 2); // the device works only when the host waits for it
        losses[k] = train_on(gpu, 4, SLAM_TRAIN, &weights[k]);
    }
    emulator_lazy(0);
    CHECK(losses[0] == losses[1] && weights[0] == weights[1], "another order of threads gives other bits");
    CHECK(losses[0] == losses[2] && weights[0] == weights[2], "a device that runs behind the host gives other bits");
    losses[3] = train_on(gpu, 4, SLAM_TRAIN_RECOMPUTE, &weights[3]);
    CHECK(losses[0] == losses[3] && weights[0] == weights[3], "recomputing gives other bits");
}

static void test_memory(void) {
    const slam_config config = small_config();
    slam_model *m = slam_model_new(gpu, &config, 1);
    if (!CHECK(m, "%s", slam_error())) return;
#ifdef SLAM_EMULATOR
    emulator_memory(emulator_device.used + (1 << 20));
    check_fails(slam_model_plan(m, 64, 256, SLAM_TRAIN), "--micro-batch");
    emulator_memory(EMULATOR_MEMORY);
#else
    check_fails(slam_model_plan(m, 1 << 18, 256, SLAM_TRAIN), "--micro-batch");
#endif
    CHECK(slam_model_plan(m, 1, 64, SLAM_TRAIN), "after it: %s", slam_error());
    slam_model_free(m);
}

/* Prompts of several lengths, continued on one of both; the first step's logits of all as well. */
static std::vector<int> generate_on(slam_ops *ops, int family, const slam_sampling &sampling, int batch,
                                    std::vector<float> *logits) {
    const int lengths[] = {65, 1, 2, 40}, slots[] = {2, 0, 3, 1};
    slam_config config = small_config(family);
    slam_prompts p = ZERO;
    std::vector<int> all;
    config.init_std = 0.3; // no two tokens are about as likely
    check_state.seed = 21;
    slam_model *m = slam_model_new(ops, &config, 9);
    for (int length : lengths) {
        std::vector<int> units;
        for (int t = 0; t < length; t++) units.push_back(random_int(config.V - 2));
        slam_prompts_add(&p, "prompt", units.data(), NULL, units.size());
    }
    const slam_generation g = {sampling, 12, 100, batch, 3};
    if (!CHECK(m && slam_generate(m, &g, &p, NULL, NULL), "%s", slam_error())) return all;
    for (size_t i = 0; i < p.n; i++) {
        all.insert(all.end(), p.at[i].continuation, p.at[i].continuation + p.at[i].length);
        all.push_back(-1);
    }
    if (logits) {
        const int *at[] = {p.at[0].tokens, p.at[1].tokens, p.at[2].tokens, p.at[3].tokens}, n[] = {p.at[0].n, 2, 3, 41};
        slam_decoder *d = slam_decoder_new(m, 4, 70);
        logits->resize(4 * config.V);
        CHECK(d && slam_decoder_start(d, 4, slots, at, n) && slam_decoder_logits(d, logits->data()), "%s",
              slam_error());
        slam_decoder_free(d);
    }
    slam_prompts_free(&p);
    slam_model_free(m);
    return all;
}

static void test_generation(int family) {
    const slam_sampling greedy = {0, 0, 1, 1}, penalty = {0, 0, 1, 1.3}, usual = {0.8, 25, 0.95, 1.1};
    std::vector<float> expected, got;
    const std::vector<int> tokens = generate_on(cpu, family, greedy, 4, &expected),
                           same = generate_on(gpu, family, greedy, 4, &got);
    check_close("logits", got.data(), expected.data(), expected.size(), gpu->act_bytes == 2 ? 3e-2 : 1e-5);
    if (gpu->act_bytes == 4) {
        CHECK(same == tokens, "other tokens than the CPU's");
        CHECK(generate_on(gpu, family, greedy, 3, NULL) == tokens, "other tokens than the CPU's, three at once");
        CHECK(generate_on(gpu, family, penalty, 2, NULL) == generate_on(cpu, family, penalty, 2, NULL),
              "with a penalty other tokens");
        CHECK(generate_on(gpu, family, usual, 4, NULL) == generate_on(cpu, family, usual, 4, NULL),
              "sampled: other tokens");
    }
    emulator_seed(77);
    emulator_lazy(1);
    CHECK(generate_on(gpu, family, greedy, 4, NULL) == same, "another order of threads draws other tokens");
    emulator_lazy(0);
}

static void test_models(const char *dtype) {
    const char *const hubert[] = {"older_spelling", "large", "stable_batch_norm", "no_projection_norm", "wide_heads"};
    for (const char *name : hubert)
        if (TEST("hubert: %s %s", name, dtype)) test_hubert(name, name[0] == 'w' ? 1 : 2);
    if (TEST("hubert: units %s", dtype)) test_units();
    const char *const vocoders[] = {"plain_weights", "speakers", "styles", "uneven_kernels", "given_durations"};
    for (const char *name : vocoders)
        if (TEST("vocoder: %s %s", name, dtype)) test_vocoder(name);
    if (TEST("model: gradients %s", dtype)) test_gradients(SLAM_QWEN2, 0);
    if (TEST("model: gradients with masked spans %s", dtype)) test_gradients(SLAM_QWEN2, 1);
    for (int family : {SLAM_QWEN3, SLAM_OLMO2, SLAM_SMOLLM3})
        if (TEST("model: gradients of %s %s", families[family].type, dtype)) test_gradients(family, 0);
    if (TEST("model: 20 steps %s", dtype)) test_training();
    if (TEST("model: the same bits every time %s", dtype)) test_determinism();
    for (int family : {SLAM_QWEN2, SLAM_QWEN3, SLAM_OLMO2, SLAM_SMOLLM3})
        if (TEST("model: generation of %s %s", families[family].type, dtype)) test_generation(family);
    if (TEST("model: out of memory %s", dtype)) test_memory();
}
#endif

int main(void) {
    cpu = slam_cpu(0);
    for (int bytes = 4; bytes >= 2; bytes -= 2) {
        gpu = slam_cuda(0, bytes);
        if (!gpu) {
            printf("FAIL slam_cuda: %s\n0 passed, 1 failed\n", slam_error());
            return 1;
        }
        const char *dtype = bytes == 2 ? "bf16" : "f32";
        test_operations(dtype);
        test_speech_operations(dtype);
        if (TEST("op: limits %s", dtype)) test_limits();
        if (TEST("op: upload %s", dtype)) test_upload();
#ifdef SLAM_EMULATOR
        if (TEST("op: algorithms of products %s", dtype)) test_algorithms();
        if (TEST("op: algorithms that are measured %s", dtype)) test_tuning();
        if (TEST("op: a product without free memory %s", dtype)) test_full_memory();
        if (TEST("op: streams %s", dtype)) test_streams();
        if (TEST("op: large shapes %s", dtype)) test_large();
        if (TEST("op: names in errors %s", dtype)) test_names();
        if (TEST("op: the kernel that failed %s", dtype)) test_blame();
#endif
#ifndef OPS_ONLY
        test_models(dtype);
#endif
        slam_ops_free(gpu);
    }
    slam_ops_free(cpu);
    return check_end();
}
