/* The CUDA operations against those of the CPU, in float and in bf16: every operation on random shapes, ragged ends included, then
   whole models. Built by a C++ compiler with the emulator it runs here, each case under three orders of threads whose results must
   be the same bits; built by nvcc it runs on a GPU (`make gpu-test`), each case twice. */
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
#endif

static int random_int(int n) { return (int)rng_below(&check_state.seed, (uint64_t)n); }

/* ---- one operation on both backends ---- */

enum kind { ACT, FLOAT, INT, BYTE, DOUBLE };
static const size_t host_size[] = {4, 4, 4, 1, 8};

/* An argument in memory: what it holds before the operation, on the host (an activation as float, already rounded), whether the
   operation writes it, and whether what it writes must be the CPU's to the bit. */
struct tensor_of {
    kind type;
    std::vector<char> host;
    int is_output, exact;
    size_t n() const { return host.size() / host_size[type]; }
    float *floats() { return (float *)host.data(); }
    int *ints() { return (int *)host.data(); }
};

static tensor_of numbers(kind type, size_t n, double size, int is_output = 0) {
    tensor_of t;
    t.type = type;
    t.host.resize(n * 4);
    t.is_output = is_output;
    t.exact = 0;
    for (size_t i = 0; i < n; i++) t.floats()[i] = (float)(size * rng_normal(&check_state.seed));
    return t;
}

static tensor_of integers(size_t n, int below, int is_output = 0) {
    tensor_of t;
    t.type = INT;
    t.host.resize(n * 4);
    t.is_output = is_output;
    t.exact = 1;
    for (size_t i = 0; i < n; i++) t.ints()[i] = random_int(below);
    return t;
}

/* What an operation only writes is full of NaN before. */
static tensor_of unwritten(kind type, size_t n) {
    tensor_of t = numbers(type, n, 0, 1);
    for (size_t i = 0; i < n; i++) t.floats()[i] = NAN;
    return t;
}

static void *to_device(slam_ops *ops, const tensor_of &t) {
    const size_t n = t.n();
    if (t.type != ACT) {
        void *p = ops->alloc(ops, t.host.size());
        if (CHECK(p, "%s", slam_error())) ops->upload(ops, p, t.host.data(), t.host.size());
        return p;
    }
    float *wide = (float *)ops->alloc(ops, n * sizeof(float));
    slam_act *p = (slam_act *)ops->alloc(ops, n * ops->bytes_per_act);
    if (!CHECK(wide && p, "%s", slam_error())) return NULL;
    ops->upload(ops, wide, t.host.data(), n * sizeof(float));
    ops->to_act(ops, p, wide, n);
    ops->finish(ops);
    ops->release(ops, wide);
    return p;
}

static std::vector<char> from_device(slam_ops *ops, const tensor_of &t, void *p) {
    std::vector<char> out(t.host.size());
    float *wide = NULL;
    if (t.type == ACT) {
        wide = (float *)ops->alloc(ops, t.n() * sizeof(float));
        ops->to_float(ops, wide, (slam_act *)p, t.n());
    }
    ops->download(ops, out.data(), wide ? wide : p, out.size());
    ops->release(ops, wide);
    return out;
}

static std::vector<std::vector<char>> run_on(slam_ops *ops, const std::vector<tensor_of> &tensors,
                                             const std::function<void(slam_ops *, void **)> &operation) {
    std::vector<void *> at;
    std::vector<std::vector<char>> results;
    for (const tensor_of &t : tensors) at.push_back(to_device(ops, t));
    if (CHECK(ops->finish(ops), "%s", slam_error())) operation(ops, at.data());
    CHECK(ops->finish(ops), "%s", slam_error());
    for (size_t i = 0; i < tensors.size(); i++) {
        if (tensors[i].is_output) results.push_back(from_device(ops, tensors[i], at[i]));
        ops->release(ops, at[i]);
    }
    return results;
}

static slam_ops *cpu, *gpu; // gpu: what is being tested

/* Runs `operation` on both and holds the outputs against each other. The operation gets the tensors' places in their order. */
static void check_operation(const char *name, std::vector<tensor_of> tensors,
                            const std::function<void(slam_ops *, void **)> &operation) {
    const int is_bf16 = gpu->bytes_per_act == 2;
    for (tensor_of &t : tensors) // both begin with the same numbers
        for (size_t i = 0; is_bf16 && t.type == ACT && i < t.n(); i++) t.floats()[i] = (float)bf16(t.floats()[i]);
    const std::vector<std::vector<char>> expected = run_on(cpu, tensors, operation);
    std::vector<std::vector<char>> first;
    for (int run = 0; run < RUNS; run++) {
        emulator_seed((uint64_t)run + 1);
        const std::vector<std::vector<char>> got = run_on(gpu, tensors, operation);
        if (run == 0) first = got;
        CHECK(got == first, "%s: order of threads %d gives other bits", name, run);
    }
    size_t k = 0;
    for (const tensor_of &t : tensors) {
        if (!t.is_output) continue;
        const void *e = expected[k].data(), *g = first[k].data();
        k++;
        char what[200];
        snprintf(what, sizeof what, "%.150s, argument %d", name, (int)(&t - tensors.data()));
        if (t.type == INT || t.type == BYTE || t.exact) CHECK(memcmp(e, g, t.host.size()) == 0, "%s differs", what);
        else if (t.type == DOUBLE) check_near(what, *(const double *)g / *(const double *)e, 1, 1e-5);
        else check_close(what, (const float *)g, (const float *)e, t.n(), is_bf16 ? 2e-2 : 1e-5);
    }
}

#define A(i) ((slam_act *)p[i])
#define F(i) ((float *)p[i])
#define I(i) ((int *)p[i])

/* ---- the operations ---- */

static void test_casts(size_t n) {
    tensor_of rounded = unwritten(ACT, n), back = unwritten(FLOAT, n);
    check_operation("casts", {numbers(FLOAT, n, 3), rounded, back}, [=](slam_ops *ops, void **p) {
        ops->to_act(ops, A(1), F(0), n);
        ops->to_float(ops, F(2), A(1), n);
    });
}

static void test_embedding(int N, int C, int V) {
    check_operation("embedding forward", {integers(N, V), numbers(ACT, (size_t)V * C, 1), unwritten(ACT, (size_t)N * C)},
                    [=](slam_ops *ops, void **p) { ops->embedding_forward(ops, A(2), I(0), A(1), N, C); });
    check_operation("embedding backward", {integers(N, V), numbers(ACT, (size_t)N * C, 1), numbers(FLOAT, (size_t)V * C, 1, 1)},
                    [=](slam_ops *ops, void **p) { ops->embedding_backward(ops, F(2), A(1), I(0), N, C, V); });
}

static void test_rmsnorm(int N, int C) {
    const size_t n = (size_t)N * C;
    check_operation("rmsnorm forward", {numbers(ACT, n, 2), numbers(ACT, C, 1), unwritten(ACT, n), unwritten(FLOAT, N)},
                    [=](slam_ops *ops, void **p) { ops->rmsnorm_forward(ops, A(0), A(2), F(3), A(0), NULL, A(1), 1e-6f, N, C); });
    check_operation(
        "rmsnorm forward of a sum",
        {numbers(ACT, n, 2), numbers(ACT, n, 1), numbers(ACT, C, 1), unwritten(ACT, n), unwritten(ACT, n), unwritten(FLOAT, N)},
        [=](slam_ops *ops, void **p) { ops->rmsnorm_forward(ops, A(3), A(4), F(5), A(0), A(1), A(2), 1e-6f, N, C); });
    tensor_of r = numbers(FLOAT, N, 0);
    for (int i = 0; i < N; i++) r.floats()[i] = 0.5f + (float)rng_uniform(&check_state.seed);
    check_operation("rmsnorm backward",
                    {numbers(ACT, n, 1, 1), numbers(FLOAT, C, 1, 1), numbers(ACT, n, 1), numbers(ACT, n, 1), numbers(ACT, C, 1), r},
                    [=](slam_ops *ops, void **p) { ops->rmsnorm_backward(ops, A(0), F(1), A(2), A(3), A(4), F(5), N, C); });
}

static void test_matmul(int N, int C, int OC) {
    const size_t x = (size_t)N * C, w = (size_t)OC * C, out = (size_t)N * OC;
    check_operation("matmul forward",
                    {numbers(ACT, x, 1), numbers(ACT, w, 0.1), numbers(ACT, OC, 1), unwritten(ACT, out), unwritten(ACT, out)},
                    [=](slam_ops *ops, void **p) {
                        ops->matmul_forward(ops, A(3), A(0), A(1), A(2), N, C, OC);
                        ops->matmul_forward(ops, A(4), A(0), A(1), NULL, N, C, OC);
                    });
    check_operation("matmul backward",
                    {numbers(ACT, x, 1), numbers(ACT, w, 0.1), numbers(ACT, out, 1), unwritten(ACT, x), numbers(FLOAT, w, 1, 1),
                     numbers(FLOAT, OC, 1, 1)},
                    [=](slam_ops *ops, void **p) {
                        ops->matmul_backward_input(ops, A(3), A(2), A(1), N, C, OC);
                        ops->matmul_backward_weight(ops, F(4), F(5), A(2), A(0), N, C, OC);
                        ops->matmul_backward_weight(ops, F(4), NULL, A(2), A(0), N, C, OC);
                    });
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
            ops->crossentropy(ops, F(3), A(0), I(1), scaled == 2 ? F(2) : NULL, scaled ? 0.25f : 0, N, V, stride);
        });
}

/* What lies between V and stride counts for nothing, however large it is, and its gradient is 0. */
static void test_crossentropy_padding(int N, int V, int stride) {
    tensor_of targets = integers(N, V), logits = numbers(ACT, (size_t)N * stride, 3, 1);
    targets.ints()[0] = V - 1;
    if (N > 1) targets.ints()[1] = -1;
    for (int i = 0; i < N; i++)
        for (int v = V; v < stride; v++) logits.floats()[(size_t)i * stride + v] = 10000;
    check_operation("cross-entropy with padding", {logits, targets, unwritten(FLOAT, N)},
                    [=](slam_ops *ops, void **p) { ops->crossentropy(ops, F(2), A(0), I(1), NULL, 0.25f, N, V, stride); });
}

static void test_sums(size_t n) {
    tensor_of out;
    out.type = DOUBLE;
    out.host.resize(2 * sizeof(double));
    out.is_output = 1;
    out.exact = 0;
    ((double *)out.host.data())[0] = 3, ((double *)out.host.data())[1] = 5;
    tensor_of x = numbers(FLOAT, n, 1);
    for (size_t i = 0; i < n; i++) x.floats()[i] += 0.5f;
    check_operation("sum", {x, out}, [=](slam_ops *ops, void **p) { ops->sum(ops, (double *)p[1], F(0), n); });
    check_operation("sum of squares", {x, out}, [=](slam_ops *ops, void **p) { ops->sum_squares(ops, (double *)p[1], F(0), n); });
}

static void test_adamw(size_t n) {
    tensor_of stats, v = numbers(FLOAT, n, 1, 1);
    stats.type = DOUBLE;
    stats.is_output = stats.exact = 0;
    for (size_t i = 0; i < n; i++) v.floats()[i] *= v.floats()[i];
    const double cases[][2] = {{1, 4}, {1, 1e-4}, {NAN, 1}, {1, INFINITY}}; // clipped, not clipped, twice not taken
    for (int k = 0; k < 4; k++) {
        stats.host.assign((const char *)cases[k], (const char *)cases[k] + sizeof cases[k]);
        tensor_of w_act = numbers(ACT, n, 1, 1);
        check_operation("AdamW", {w_act, numbers(FLOAT, n, 1, 1), numbers(FLOAT, n, 1, 1), v, numbers(FLOAT, n, 1), stats},
                        [=](slam_ops *ops, void **p) {
                            const slam_adamw h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, 3};
                            slam_act *rounded = ops->bytes_per_act == 4 ? A(1) : A(0);
                            ops->adamw(ops, rounded, F(1), F(2), F(3), F(4), (double *)p[5], &h, n);
                            if (ops->bytes_per_act == 4 && gpu->bytes_per_act == 2 && k < 2) ops->to_act(ops, A(0), F(1), n);
                        });
    }
}

/* ---- attention ---- */

struct shape {
    int B, T, NH, KVH, HS;
    int documents; // about so many a row; 0: one token each
    int holes, both_ways;
};

struct windows {
    tensor_of start, end, hole, rope;
};

static windows make_window(const shape &s) {
    windows w;
    w.start = integers((size_t)s.B * s.T, 1);
    w.end = integers((size_t)s.B * s.T, 1);
    w.hole = integers((size_t)s.B * s.T * 2, 1);
    w.rope = numbers(FLOAT, (size_t)s.T * s.HS, 0);
    for (int b = 0; b < s.B; b++) {
        int *start = w.start.ints() + b * s.T, *end = w.end.ints() + b * s.T, *hole = w.hole.ints() + 2 * b * s.T;
        for (int t = 0, first = 0; t < s.T; t++) {
            if (s.documents == 0 || (s.documents > 1 && random_int(s.T) < s.documents)) first = t;
            start[t] = first;
        }
        for (int t = s.T - 1, last = s.T; t >= 0; t--) {
            end[t] = last;
            if (start[t] == t) last = t;
        }
        for (int t = 0; s.holes && t < s.T; t++) { // the last third of a document does not see the one before it
            const int n = end[t] - start[t], first = start[t] + n / 3, past = start[t] + 2 * n / 3;
            if (t >= past && past > first && start[t] % 2 == 0) hole[2 * t] = first, hole[2 * t + 1] = past;
        }
    }
    for (int t = 0; t < s.T; t++)
        for (int c = 0; c < s.HS / 2; c++) {
            const double angle = t * pow(10000, -2.0 * c / s.HS);
            w.rope.floats()[t * s.HS + c] = (float)cos(angle);
            w.rope.floats()[t * s.HS + s.HS / 2 + c] = (float)sin(angle);
        }
    return w;
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
    s.holes = !s.both_ways && random_int(2);
    return s;
}

static void test_attention(const shape &s) {
    const windows w = make_window(s);
    const size_t N = (size_t)s.B * s.T, O = (size_t)s.NH * s.HS, W = O + 2 * (size_t)s.KVH * s.HS;
    tensor_of qkv = numbers(ACT, N * W, 1, 1);
    for (int rope = 0; rope < 2; rope++)
        check_operation(
            rope ? "attention" : "attention without rotation",
            {w.start, w.end, w.hole, w.rope, qkv, unwritten(ACT, N * O), unwritten(FLOAT, N * s.NH), numbers(ACT, N * O, 1),
             unwritten(ACT, N * W), unwritten(FLOAT, N * s.NH)},
            [=](slam_ops *ops, void **p) {
                const slam_window win = {
                    s.B, s.T, s.NH, s.KVH, s.HS, I(0), s.both_ways ? I(1) : NULL, s.holes ? I(2) : NULL, rope ? F(3) : NULL};
                ops->attention_forward(ops, A(5), F(6), A(4), &win);
                ops->attention_backward(ops, A(8), F(9), A(7), A(5), F(6), A(4), &win);
            });
}

static void test_decode(const shape &s) {
    const windows w = make_window(s);
    const size_t O = (size_t)s.NH * s.HS, K = 2 * (size_t)s.KVH * s.HS;
    tensor_of lengths = integers(s.B, s.T);
    lengths.ints()[0] = s.T - 1;
    if (s.B > 1) lengths.ints()[1] = 0;
    check_operation(
        "attention of one more token",
        {lengths, w.rope, numbers(ACT, (size_t)s.B * s.T * K, 1, 1), numbers(ACT, s.B * (O + K), 1, 1), unwritten(ACT, s.B * O)},
        [=](slam_ops *ops, void **p) {
            const slam_window win = {s.B, s.T, s.NH, s.KVH, s.HS, NULL, NULL, NULL, F(1)};
            ops->attention_decode(ops, A(4), A(2), A(3), I(0), &win);
        });
}

static void test_fill(const shape &s) {
    const size_t O = (size_t)s.NH * s.HS, K = 2 * (size_t)s.KVH * s.HS;
    const int room = s.T + 2;
    tensor_of slots = integers(s.B, 1), lengths = integers(s.B, s.T + 1);
    for (int b = 0; b < s.B; b++) slots.ints()[b] = s.B - b;
    check_operation("keys and values into the cache",
                    {slots, lengths, numbers(ACT, (size_t)s.B * s.T * (O + K), 1), numbers(ACT, (s.B + 1) * room * K, 1, 1)},
                    [=](slam_ops *ops, void **p) {
                        const slam_window win = {s.B, s.T, s.NH, s.KVH, s.HS, NULL, NULL, NULL, NULL};
                        ops->attention_fill(ops, A(3), A(2), I(0), I(1), room, &win);
                    });
}

static void test_sample(int B, int V, int stride) {
    const slam_sampling ways[] = {{0, 0, 1, 1}, {1, 0, 1, 1}, {0.8, 25, 1, 1.1}, {1.3, 0, 0.7, 1}, {0.5, 3, 0.9, 1.5}};
    tensor_of seen, uniform = numbers(FLOAT, B, 0), logits = numbers(ACT, (size_t)B * stride, 2);
    seen.type = BYTE;
    seen.is_output = 1;
    seen.exact = 1;
    for (size_t i = 0; i < (size_t)B * V; i++) seen.host.push_back((char)(random_int(3) == 0));
    for (int i = 0; i < B; i++) uniform.floats()[i] = (float)rng_uniform(&check_state.seed);
    for (size_t i = 0; i < logits.n(); i += 2) logits.floats()[i] = (float)random_int(4); // ties
    for (size_t k = 0; k < sizeof ways / sizeof *ways; k++)
        check_operation("sample", {logits, seen, uniform, integers(B, 1, 1)}, [=](slam_ops *ops, void **p) {
            ops->sample(ops, I(3), A(0), ways[k].repetition_penalty != 1 ? (unsigned char *)p[1] : NULL, F(2), &ways[k], B, V,
                        stride);
        });
}

static void test_operations(void) {
    const char *dtype = gpu->bytes_per_act == 2 ? "bf16" : "f32";
    const int sizes[][2] = {{1, 8}, {3, 5}, {37, 64}, {130, 96}, {70, 33}, {18, 896}};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    for (int k = 0; k < SIZES + 3; k++) { // the last three at random, one of them with rows that are no multiple of 16 bytes
        check_state.seed = (uint64_t)k;   // of the sizes; a test has a seed of its own
        const int N = k < SIZES ? sizes[k][0] : 1 + random_int(99), C = k < SIZES ? sizes[k][1] : 8 * (1 + random_int(30)) + k % 2;
        if (TEST("op: embedding %s %d x %d", dtype, N, C)) test_embedding(N, C, 11);
        if (TEST("op: rmsnorm %s %d x %d", dtype, N, C)) test_rmsnorm(N, C);
        if (TEST("op: matmul %s %d x %d", dtype, N, C)) test_matmul(N, C, 24), test_matmul(N, C, 37);
        if (TEST("op: swiglu %s %d x %d", dtype, N, C)) test_swiglu(N, C);
        if (TEST("op: cross-entropy %s %d x %d", dtype, N, C))
            test_crossentropy(N, C, C), test_crossentropy(N, C, (C + 15) / 8 * 8);
        if (TEST("op: casts %s %d", dtype, N * C)) test_casts((size_t)N * C);
        if (TEST("op: sums %s %d", dtype, N * C)) test_sums((size_t)N * C);
        if (TEST("op: AdamW %s %d", dtype, N * C)) test_adamw((size_t)N * C);
        if (TEST("op: sample %s %d x %d", dtype, N % 5 + 1, C)) test_sample(C < 100 ? N % 5 + 1 : 1, C, C + k % 2 * 3);
    }
    if (TEST("op: embedding %s, many tokens", dtype)) test_embedding(3000, 24, 7);
    if (TEST("op: cross-entropy %s, a large vocabulary", dtype)) test_crossentropy(3, 20003, 20008);
    if (TEST("op: cross-entropy %s, 10000 behind the vocabulary", dtype)) {
        const int rows[][2] = {{502, 504}, {1020, 1024}, {1021, 1032}, {1501, 1504}, {1500, 1503}, {3001, 3003}}; // V, stride
        for (const int *row : rows) test_crossentropy_padding(5, row[0], row[1]);
    }
    if (TEST("op: rmsnorm %s, wide", dtype)) test_rmsnorm(3, 5000), test_rmsnorm(20, 1100);
    const shape corners[] = {{1, 1, 1, 1, 64, 1, 0, 0},    {2, 100, 2, 1, 64, 1, 0, 0}, {1, 200, 7, 1, 64, 4, 0, 0},
                             {1, 150, 14, 2, 64, 3, 1, 0}, {1, 90, 4, 2, 32, 1, 1, 0},  {2, 131, 2, 2, 32, 3, 0, 1},
                             {1, 70, 2, 1, 128, 2, 1, 0},  {1, 65, 4, 2, 16, 2, 1, 0},  {1, 40, 3, 3, 12, 0, 0, 0},
                             {1, 64, 2, 1, 64, 0, 0, 0},   {1, 300, 1, 1, 32, 2, 1, 0}};
    enum { CORNERS = sizeof corners / sizeof *corners, DRAWN = 8 };
    for (int k = 0; k < CORNERS + DRAWN; k++) {
        check_state.seed = (uint64_t)k;
        const shape s = k < CORNERS ? corners[k] : random_shape();
        if (TEST("op: attention %s B %d T %d NH %d KVH %d HS %d, %d documents%s%s", dtype, s.B, s.T, s.NH, s.KVH, s.HS, s.documents,
                 s.holes ? ", holes" : "", s.both_ways ? ", both ways" : ""))
            test_attention(s);
        if (k % 2 == 0 && TEST("op: decode %s B %d T %d NH %d KVH %d HS %d", dtype, s.B, s.T, s.NH, s.KVH, s.HS)) test_decode(s);
        if (k % 2 == 0 && TEST("op: cache %s B %d T %d NH %d KVH %d HS %d", dtype, s.B, s.T, s.NH, s.KVH, s.HS)) test_fill(s);
    }
}

/* What is beyond the kernels is an error, not other numbers. */
static void test_limits(void) {
    float *p = (float *)gpu->alloc(gpu, 4096 * sizeof(float));
    const slam_window win = {1, 3, 1, 1, 288, (int *)p, NULL, NULL, NULL};
    gpu->attention_forward(gpu, (slam_act *)p, p, (slam_act *)p, &win);
    check_fails(gpu->finish(gpu), "256 channels");
    gpu->rmsnorm_forward(gpu, NULL, (slam_act *)p, p, (slam_act *)p, NULL, (slam_act *)p, 1e-6f, 1, 10000);
    check_fails(gpu->finish(gpu), "8192 channels");
    CHECK(gpu->finish(gpu), "an error is told once, then forgotten: %s", slam_error());
    gpu->release(gpu, p);
}

/* ---- what speech encoders need ---- */

static void test_gelu(size_t n) {
    check_operation("gelu", {numbers(ACT, n, 2, 1)}, [=](slam_ops *ops, void **p) { ops->gelu(ops, A(0), n); });
}

static void test_layernorm(int N, int C) {
    const size_t n = (size_t)N * C;
    for (int gelu = 0; gelu < 2; gelu++)
        check_operation("layernorm",
                        {numbers(ACT, n, 2, 1), numbers(ACT, n, 1), numbers(ACT, C, 1), numbers(ACT, C, 1), unwritten(ACT, n),
                         unwritten(ACT, n), unwritten(ACT, n)},
                        [=](slam_ops *ops, void **p) {
                            ops->layernorm(ops, NULL, A(4), A(0), NULL, A(2), A(3), 1e-5f, gelu, N, C);
                            ops->layernorm(ops, A(5), A(6), A(0), A(1), A(2), A(3), 1e-5f, gelu, N, C);
                            ops->layernorm(ops, A(0), NULL, A(0), A(1), NULL, NULL, 1e-5f, gelu, N, C);
                            ops->layernorm(ops, NULL, A(0), A(0), A(1), A(2), A(3), 1e-5f, gelu, N, C);
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

static void test_frames(int B, int T, int width, int G, int taps) {
    const int C = width * G, TO = T + taps - 1;
    check_operation("frames in groups",
                    {numbers(ACT, (size_t)B * T * C, 1, 1), numbers(ACT, C, 1), numbers(ACT, C, 1), random_lengths(B, T),
                     unwritten(ACT, (size_t)B * TO * C), unwritten(ACT, (size_t)B * TO * C)},
                    [=](slam_ops *ops, void **p) {
                        ops->group_frames(ops, A(4), A(0), I(3), A(1), A(2), taps / 2, B, T, TO, C, G);
                        ops->group_frames(ops, A(5), A(0), I(3), NULL, NULL, taps / 2, B, T, TO, C, G);
                        ops->mask_frames(ops, A(0), I(3), B, T, C);
                    });
}

static void test_conv1d(const slam_conv &c) {
    const size_t x = (size_t)(c.B * c.G * c.T + c.K) * c.C, w = (size_t)c.G * c.OC * c.K * c.C,
                 out = (size_t)c.B * c.TO * c.G * c.OC;
    check_operation("conv1d",
                    {numbers(ACT, x, 1), numbers(ACT, w, 1 / sqrt(c.K * c.C)), numbers(ACT, (size_t)c.G * c.OC, 1),
                     unwritten(ACT, out), unwritten(ACT, out)},
                    [=](slam_ops *ops, void **p) {
                        ops->conv1d(ops, A(3), A(0), A(1), A(2), &c);
                        ops->conv1d(ops, A(4), A(0), A(1), NULL, &c);
                    });
}

/* Centroids far enough apart that rounding changes no unit; some are there twice. */
static void test_nearest(int N, int D, int K) {
    tensor_of x = numbers(ACT, (size_t)N * D, 0), centroids = numbers(ACT, (size_t)K * D, 4), squares = numbers(FLOAT, K, 0);
    for (size_t i = 0; i < centroids.n(); i++) centroids.floats()[i] = (float)bf16(centroids.floats()[i]);
    for (int d = 0; K > 3 && d < D; d++) centroids.floats()[(size_t)(K - 1) * D + d] = centroids.floats()[D + d];
    for (int k = 0; k < K; k++)
        for (int d = 0; d < D; d++)
            squares.floats()[k] += centroids.floats()[(size_t)k * D + d] * centroids.floats()[(size_t)k * D + d];
    for (int i = 0; i < N; i++) {
        const int k = i == 0 ? K - 1 : random_int(K);
        for (int d = 0; d < D; d++)
            x.floats()[(size_t)i * D + d] = centroids.floats()[(size_t)k * D + d] + 0.1f * (float)rng_normal(&check_state.seed);
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
    if (TEST("op: frames in groups %s", dtype))
        test_frames(4, 30, 6, 3, 8), test_frames(1, 1, 1, 1, 1), test_frames(2, 9, 16, 2, 5);
    const slam_conv convs[] = {
        {1, 1, 1, 1, 1, 1, 1, 1, 0},        {2, 1, 400, 1, 80, 32, 10, 5, 0}, {3, 1, 80, 32, 40, 48, 3, 2, 1},
        {3, 1, 41, 48, 20, 5, 2, 2, 0},     {2, 3, 90, 16, 83, 16, 8, 1, 1},  {2, 2, 21, 4, 15, 4, 7, 1, 1},
        {1, 1, 640, 1, 128, 200, 10, 5, 1}, {1, 1, 90, 33, 28, 7, 7, 3, 1},   {2, 1, 30, 9, 9, 140, 3, 3, 0}};
    for (size_t k = 0; k < sizeof convs / sizeof *convs; k++) {
        const slam_conv &c = convs[k];
        if (TEST("op: conv1d %s B %d G %d T %d C %d to T %d C %d, %d taps, stride %d%s", dtype, c.B, c.G, c.T, c.C, c.TO, c.OC, c.K,
                 c.stride, c.gelu ? ", gelu" : ""))
            test_conv1d(c);
    }
}

/* A model of test/fixtures/hubert on the CPU and here, a batch and its utterances alone; the same bits every time. */
static void test_hubert(const char *name, int layer) {
    char folder[200];
    snprintf(folder, sizeof folder, "test/fixtures/hubert/%s", name);
    const long lengths[] = {1200, 300, 2500};
    std::vector<float> samples[3], out[4][3];
    const float *in[3];
    for (int i = 0; i < 3; i++) {
        for (long t = 0; t < lengths[i]; t++)
            samples[i].push_back((float)(0.3 * sin((double)t * (i + 1) / 7) + 0.1 * rng_normal(&check_state.seed)));
        in[i] = samples[i].data();
    }
    for (int run = 0; run < 4; run++) { // the CPU; twice here; each alone
        slam_hubert *h = slam_hubert_load(run ? gpu : cpu, folder, layer);
        if (!CHECK(h, "%s", slam_error())) return;
        float *to[3];
        emulator_seed((uint64_t)run);
        for (int i = 0; i < 3; i++) {
            out[run][i].assign((size_t)slam_hubert_frames(h, lengths[i]) * slam_hubert_width(h), NAN);
            to[i] = out[run][i].data();
        }
        if (run < 3) CHECK(slam_hubert_features(h, 3, in, lengths, to), "%s", slam_error());
        for (int i = 0; run == 3 && i < 3; i++) CHECK(slam_hubert_features(h, 1, in + i, lengths + i, to + i), "%s", slam_error());
        slam_hubert_free(h);
    }
    const int is_bf16 = gpu->bytes_per_act == 2;
    for (int i = 0; i < 3; i++) {
        check_close("features", out[1][i].data(), out[0][i].data(), out[0][i].size(), is_bf16 ? 5e-2 : 1e-4);
        check_close("features alone", out[3][i].data(), out[1][i].data(), out[0][i].size(), is_bf16 ? 2e-2 : 1e-5);
        CHECK(out[1][i] == out[2][i], "another order of threads gives other bits");
    }
}

/* Units by way of a batch that is filled up, and the nearest centroids on the device. */
static void test_units(void) {
    slam_speech_settings settings;
    slam_units u[2];
    std::vector<float> samples, centroids;
    slam_speech_defaults(&settings);
    settings.features = SLAM_HUBERT;
    settings.rate = 0;
    settings.layer = 1;
    snprintf(settings.hubert, sizeof settings.hubert, "test/fixtures/hubert/older_spelling");
    for (int t = 0; t < 2500; t++) samples.push_back((float)(0.3 * sin(t * t / 3e4) + 0.1 * rng_normal(&check_state.seed)));
    for (int i = 0; i < 10 * 24; i++) centroids.push_back((float)rng_normal(&check_state.seed));
    for (int k = 0; k < 2; k++) {
        slam_quantiser *q = slam_quantiser_new(&settings, k ? gpu : cpu, centroids.data(), 10);
        CHECK(q && slam_quantiser_units(q, samples.data(), samples.size(), &u[k]), "%s", slam_error());
        slam_quantiser_free(q);
    }
    std::vector<int> frames[2];
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < u[k].n; i++)
            for (int d = 0; d < u[k].duration[i]; d++) frames[k].push_back(u[k].unit[i]);
        slam_units_free(&u[k]);
    }
    if (!CHECK(frames[0].size() == frames[1].size() && frames[0].size() > 100, "%zu and %zu frames", frames[0].size(),
               frames[1].size()))
        return;
    int differ = 0, kinds = 0;
    for (size_t t = 0; t < frames[0].size(); t++) {
        differ += frames[0][t] != frames[1][t];
        kinds += t && frames[0][t] != frames[0][t - 1];
    }
    CHECK(kinds > 10 && differ <= (gpu->bytes_per_act == 2 ? (int)frames[0].size() / 10 : 0), "%d of %zu units differ", differ,
          frames[0].size());
}

/* ---- whole models ---- */

static const slam_config small_config = {30, 64, 2, 4, 2, 32, 96, 256, 1, 1, 1e-6, 0.1, 10000};

static slam_batch random_batch(int B, int T, int V, int holes) {
    slam_batch b = {B,
                    T,
                    (int *)malloc(sizeof(int) * B * T),
                    (int *)malloc(sizeof(int) * B * T),
                    (int *)malloc(sizeof(int) * B * T),
                    holes ? (int *)calloc((size_t)B * T, 2 * sizeof(int)) : NULL};
    const shape s = {B, T, 1, 1, 2, 3, holes, 0};
    windows w = make_window(s);
    for (int i = 0; i < B * T; i++) {
        b.tokens[i] = 1 + random_int(V - 1);
        b.doc_start[i] = w.start.ints()[i];
        if (holes) b.hole[2 * i] = w.hole.ints()[2 * i], b.hole[2 * i + 1] = w.hole.ints()[2 * i + 1];
        b.targets[i] = random_int(9) ? 1 + (b.tokens[i] * 7 + 3) % (V - 1) : -1; // something that can be learnt
    }
    return b;
}

static void free_batch(slam_batch *b) { free(b->tokens), free(b->targets), free(b->doc_start), free(b->hole); }

static int targets_of(const slam_batch &b) {
    int n = 0;
    for (int i = 0; i < b.B * b.T; i++) n += b.targets[i] >= 0;
    return n;
}

static std::vector<float> gradients_of(slam_model *m) {
    std::vector<float> g(m->w.total);
    m->ops->download(m->ops, g.data(), m->gradients, g.size() * sizeof(float));
    return g;
}

static void test_gradients(int holes) {
    slam_batch b = random_batch(2, 100, small_config.V, holes);
    std::vector<float> g[2];
    double stats[2][2];
    for (int k = 0; k < 2; k++) {
        slam_model *m = slam_model_new(k ? gpu : cpu, &small_config, 7);
        if (!CHECK(m && slam_model_plan(m, b.B, b.T, 1), "%s", slam_error())) return;
        CHECK(slam_model_backward(m, &b, 1.0f / targets_of(b), NULL, NULL), "%s", slam_error());
        g[k] = gradients_of(m);
        m->ops->download(m->ops, stats[k], m->stats, sizeof stats[k]);
        slam_model_free(m);
    }
    const double tolerance = gpu->bytes_per_act == 2 ? 3e-2 : 1e-4;
    check_near("loss", stats[1][0] / stats[0][0], 1, gpu->bytes_per_act == 2 ? 5e-3 : 1e-5);
    size_t n = 0;
    parameter *list = parameters_of(&small_config, &n);
    for (size_t k = 0; k < n; k++)
        if (!strstr(list[k].name, "k_proj.bias")) // zero but for rounding: the softmax does not see it
            check_close(list[k].name, g[1].data() + list[k].at, g[0].data() + list[k].at, parameter_size(&list[k]), tolerance);
    free(list);
    free_batch(&b);
}

/* The losses of `steps` steps; the weights in the end into `weights`. */
static std::vector<double> train_on(slam_ops *ops, int steps, int train, std::vector<float> *weights) {
    const slam_adamw h = {0, 0.9, 0.95, 1e-8, 0.1, 0.5, 0};
    std::vector<double> losses;
    check_state.seed = 5;
    slam_model *m = slam_model_new(ops, &small_config, 7);
    slam_optimiser *o = m && slam_model_plan(m, 2, 64, train) ? slam_optimiser_new(m, &h) : NULL;
    if (!CHECK(o, "%s", slam_error())) return losses;
    for (int i = 0; i < steps; i++) {
        slam_batch b = random_batch(4, 64, small_config.V, 0);
        slam_step step;
        for (int half = 0; half < 2; half++) {
            const slam_batch part = {2, 64, b.tokens + half * 128, b.targets + half * 128, b.doc_start + half * 128, NULL};
            CHECK(slam_model_backward(m, &part, 1.0f / targets_of(b), NULL, NULL), "%s", slam_error());
            memset(part.tokens, 0xff, sizeof(int) * 128); // the caller's memory is free for other use
        }
        CHECK(slam_optimiser_step(o, 1e-2, &step), "%s", slam_error());
        losses.push_back(step.loss_sum / targets_of(b));
        free_batch(&b);
    }
    if (weights) {
        weights->resize(m->w.total);
        ops->download(ops, weights->data(), m->master, weights->size() * sizeof(float));
    }
    slam_optimiser_free(o);
    slam_model_free(m);
    return losses;
}

static void test_training(void) {
    const std::vector<double> expected = train_on(cpu, 20, 1, NULL), got = train_on(gpu, 20, 1, NULL);
    if (!CHECK(expected.size() == 20 && got.size() == 20, "no 20 steps")) return;
    for (int i = 0; i < 20; i++) check_near("loss of a step", got[i], expected[i], gpu->bytes_per_act == 2 ? 2e-2 : 1e-4);
    CHECK(got[19] < got[0] - 0.5, "the loss goes from %g to %g", got[0], got[19]);
}

#if defined(SLAM_NCCL) && !defined(SLAM_EMULATOR)
/* One rank goes through NCCL as many do: its sums are its own numbers. */
static void test_nccl(void) {
    const size_t n = 100003;
    std::vector<float> x(n), y(n);
    slam_ranks *ranks = slam_ranks_join();
    if (!CHECK(ranks, "%s", slam_error())) return;
    const std::vector<double> expected = train_on(gpu, 6, 1, NULL);
    ranks->transport = TRANSPORT_MPI; // as if mpirun had started one
    slam_ranks_attach(ranks, gpu);
    if (!CHECK(ranks_connect(ranks) && ranks->transport == TRANSPORT_NCCL, "%s", slam_error())) return;
    for (size_t i = 0; i < n; i++) x[i] = (float)i / 3;
    float *a = (float *)gpu->alloc(gpu, n * sizeof(float)), *b = (float *)gpu->alloc(gpu, n * sizeof(float));
    gpu->upload(gpu, a, x.data(), n * sizeof(float));
    double *sums = (double *)gpu->alloc(gpu, 2 * sizeof(double)), got[2];
    gpu->sum(gpu, sums, a, n);
    gpu->download(gpu, got, sums, sizeof got);
    const double sum = got[0];
    CHECK(exchange_reduce_scatter(ranks, a, n) && exchange_all_gather(ranks, b, a, n, sizeof(float)), "%s", slam_error());
    CHECK(exchange_all_reduce(ranks, sums, 2), "%s", slam_error());
    exchange_wait(ranks);
    gpu->download(gpu, y.data(), b, n * sizeof(float));
    gpu->download(gpu, got, sums, sizeof got);
    CHECK(gpu->finish(gpu), "%s", slam_error());
    CHECK(x == y && got[0] == sum && got[1] == 0, "other numbers");
    const std::vector<double> losses = train_on(gpu, 6, 1, NULL), again = train_on(gpu, 6, 1, NULL);
    slam_ranks_zero(ranks, 0);
    const std::vector<double> plain = train_on(gpu, 6, 1, NULL);
    CHECK(losses == again && losses == plain, "other bits in another run, or without ZeRO");
    for (size_t i = 0; i < expected.size() && i < losses.size(); i++)
        check_near("loss of a step", losses[i], expected[i], gpu->bytes_per_act == 2 ? 1e-3 : 1e-6);
    gpu->release(gpu, a);
    gpu->release(gpu, b);
    gpu->release(gpu, sums);
    slam_ranks_leave(ranks, 0);
    CHECK(!gpu->ranks, "the device is alone again");
}
#endif

static void test_determinism(void) {
    std::vector<float> weights[4];
    std::vector<double> losses[4];
    for (int k = 0; k < 3; k++) {
        emulator_seed((uint64_t)k + 11);
#ifdef SLAM_EMULATOR
        emulator_lazy(k == 2); // the device works only when it is waited for
#endif
        losses[k] = train_on(gpu, 4, 1, &weights[k]);
    }
#ifdef SLAM_EMULATOR
    emulator_lazy(0);
#endif
    CHECK(losses[0] == losses[1] && weights[0] == weights[1], "another order of threads gives other bits");
    CHECK(losses[0] == losses[2] && weights[0] == weights[2], "a device that runs behind the host gives other bits");
    losses[3] = train_on(gpu, 4, 2, &weights[3]);
    CHECK(losses[0] == losses[3] && weights[0] == weights[3], "recomputing gives other bits");
}

static void test_memory(void) {
    slam_model *m = slam_model_new(gpu, &small_config, 1);
    if (!CHECK(m, "%s", slam_error())) return;
#ifdef SLAM_EMULATOR
    emulator_memory(emulator_device.used + (1 << 20));
    check_fails(slam_model_plan(m, 64, 256, 1), "--micro-batch");
    emulator_memory(EMULATOR_MEMORY);
#else
    check_fails(slam_model_plan(m, 1 << 18, 256, 1), "--micro-batch");
#endif
    CHECK(slam_model_plan(m, 1, 64, 1), "after it: %s", slam_error());
    slam_model_free(m);
}

/* Prompts of several lengths, continued on one of both; the first step's logits of all as well. */
static std::vector<int> generate_on(slam_ops *ops, const slam_sampling &how, int batch, std::vector<float> *logits) {
    const int lengths[] = {65, 1, 2, 40}, slots[] = {2, 0, 3, 1};
    slam_config config = small_config;
    slam_prompts p = SLAM_ZERO;
    std::vector<int> all;
    config.init_std = 0.3; // no two tokens are about as likely
    check_state.seed = 21;
    slam_model *m = slam_model_new(ops, &config, 9);
    for (int length : lengths) {
        std::vector<int> units;
        for (int t = 0; t < length; t++) units.push_back(random_int(config.V - 2));
        CHECK(slam_prompts_add(&p, "prompt", units.data(), units.size()), "%s", slam_error());
    }
    const slam_generation g = {how, 12, 100, batch, 3};
    CHECK(m && slam_generate(m, &g, &p, NULL, NULL), "%s", slam_error());
    for (size_t i = 0; i < p.n; i++) {
        all.insert(all.end(), p.at[i].continuation, p.at[i].continuation + p.at[i].length);
        all.push_back(-1);
    }
    if (logits) {
        const int *at[] = {p.at[0].tokens, p.at[1].tokens, p.at[2].tokens, p.at[3].tokens}, n[] = {p.at[0].n, 2, 3, 41};
        int drawn[4];
        slam_decoder *d = slam_decoder_new(m, 4, 70);
        logits->resize(4 * config.V);
        CHECK(d && slam_decoder_begin(d, 4, slots, at, n) && slam_decoder_step(d, &how, NULL, drawn) &&
                  slam_decoder_logits(d, logits->data()),
              "%s", slam_error());
        slam_decoder_free(d);
    }
    slam_prompts_free(&p);
    slam_model_free(m);
    return all;
}

static void test_generation(void) {
    const slam_sampling greedy = {0, 0, 1, 1}, penalty = {0, 0, 1, 1.3}, usual = {0.8, 25, 0.95, 1.1};
    std::vector<float> expected, got;
    const std::vector<int> tokens = generate_on(cpu, greedy, 4, &expected), same = generate_on(gpu, greedy, 4, &got);
    check_close("logits", got.data(), expected.data(), expected.size(), gpu->bytes_per_act == 2 ? 3e-2 : 1e-5);
    if (gpu->bytes_per_act == 4) {
        CHECK(same == tokens, "other tokens than the CPU's");
        CHECK(generate_on(gpu, greedy, 3, NULL) == tokens, "other tokens than the CPU's, three at once");
        CHECK(generate_on(gpu, penalty, 2, NULL) == generate_on(cpu, penalty, 2, NULL), "with a penalty other tokens");
        CHECK(generate_on(gpu, usual, 4, NULL) == generate_on(cpu, usual, 4, NULL), "sampled: other tokens");
    }
    emulator_seed(77);
#ifdef SLAM_EMULATOR
    emulator_lazy(1);
#endif
    CHECK(generate_on(gpu, greedy, 4, NULL) == same, "another order of threads draws other tokens");
#ifdef SLAM_EMULATOR
    emulator_lazy(0);
#endif
}

int main(void) {
    cpu = slam_cpu(0);
    for (int bytes = 4; bytes >= 2; bytes -= 2) {
        gpu = slam_cuda(0, bytes);
        if (!gpu) {
            printf("FAIL slam_cuda: %s\n0 passed, 1 failed\n", slam_error());
            return 1;
        }
        const char *dtype = bytes == 2 ? "bf16" : "f32";
        test_operations();
        if (TEST("op: limits %s", dtype)) test_limits();
        test_speech_operations(dtype);
        const char *const hubert[] = {"older_spelling", "large", "stable_batch_norm", "no_projection_norm", "wide_heads"};
        for (int k = 0; k < 5; k++)
            if (TEST("hubert: %s %s", hubert[k], dtype)) test_hubert(hubert[k], hubert[k][0] == 'w' ? 1 : 2);
        if (TEST("hubert: units %s", dtype)) test_units();
        if (TEST("model: gradients %s", dtype)) test_gradients(0);
        if (TEST("model: gradients with holes %s", dtype)) test_gradients(1);
        if (TEST("model: 20 steps %s", dtype)) test_training();
        if (TEST("model: the same bits every time %s", dtype)) test_determinism();
#if defined(SLAM_NCCL) && !defined(SLAM_EMULATOR)
        if (TEST("model: a rank of its own %s", dtype)) test_nccl();
#endif
        if (TEST("model: generation %s", dtype)) test_generation();
        if (TEST("model: out of memory %s", dtype)) test_memory();
        slam_ops_free(gpu);
    }
    slam_ops_free(cpu);
    return check_end();
}
