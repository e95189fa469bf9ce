/* gpu_bench.cu - measures the CUDA operations and the training step of the Slam model, each against what the card can
   do at most: copying from its memory to its memory, and a matrix product of size 8192 through the same operation that
   the model uses.

       gpu_bench ceilings|products|memory|attention|step|hubert|generate
                 [--copy GB/s] [--peak TFLOP/s] [--keys FILE] [--seconds S] [--small]

   `make gpu-bench` (test/gpu_bench.sh) runs one part after the other, each in a process of its own, since after a
   kernel that failed a process can do nothing more on the card. Tables go to stdout; each metric that is compared with
   another program's goes to FILE as a line `key value`. Parts after the first get the two ceilings by --copy and
   --peak, without them shares are not printed. --seconds: rows that would begin later are skipped. --small: tiny
   shapes, to try this program under the emulator.

   A figure is the median of ROUNDS rounds, each of as many calls as take 20 ms, timed by events in the stream. Numbers
   are random (a product of zeros is faster); calls take turns among several sets of tensors, SPAN bytes in all, so that
   no cache holds them. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "random_hubert.h"
#include <tuple>

enum { ROUNDS = 7, SETS = 32, BATCHES = 4 };
static const double SPAN = 512e6; // bytes; the L2 cache of an H200 has 60 MB

typedef struct bench {
    slam_ops *ops;
    cudaStream_t stream;
    slam_config config;
    int small, stride, rows; // stride: of rows of logits; rows of a step
    double copy, peak;       // bytes and FLOP a second that were measured; 0: unknown
    double began, seconds;
    FILE *keys;
    char *arena; // tensors of the row that is being measured
    size_t used, size;
    float *numbers; // random numbers, normal(0, 1), and the same as activations
    slam_act *acts;
    size_t pool;
    int full; // a tensor did not fit
} bench;

static void stop(const char *why) {
    fprintf(stderr, "gpu_bench: error: %s\n", why);
    exit(1);
}

static void key(bench *b, double value, const char *format, ...) {
    va_list args;
    if (!b->keys || !(value > 0)) return;
    va_start(args, format);
    vfprintf(b->keys, format, args);
    va_end(args);
    fprintf(b->keys, " %.6g\n", value);
    fflush(b->keys);
}

static int late(bench *b, const char *what) {
    if (b->seconds <= 0 || slam_clock() - b->began < b->seconds) return 0;
    printf("%s: skipped, the time is used up\n", what);
    return 1;
}

/* ---- time in the stream ---- */

#ifdef SLAM_EMULATOR
typedef double moment; // work is done when a call returns
static void moment_new(moment *) {}
static void moment_free(moment) {}
static void moment_note(bench *, moment *m) { *m = slam_clock(); }
static double moment_between(moment from, moment to) { return to - from; }
#else
typedef cudaEvent_t moment;
static void moment_new(moment *m) {
    if (cudaEventCreate(m) != cudaSuccess) stop("no event could be made");
}
static void moment_free(moment m) { cudaEventDestroy(m); }
static void moment_note(bench *b, moment *m) { cudaEventRecord(*m, b->stream); }
static double moment_between(moment from, moment to) {
    float ms = 0;
    return cudaEventElapsedTime(&ms, from, to) == cudaSuccess ? ms * 1e-3 : 0;
}
#endif

static int compare(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare);
    return n ? x[n / 2] : 0;
}

/* Seconds that n calls of work(i) take. */
template <typename F> static double seconds_of_calls(bench *b, F work, int n) {
    moment from, to;
    moment_new(&from);
    moment_new(&to);
    moment_note(b, &from);
    for (int i = 0; i < n; i++) work(i);
    moment_note(b, &to);
    const double seconds = b->ops->finish(b->ops) ? moment_between(from, to) : -1;
    moment_free(from);
    moment_free(to);
    return seconds;
}

/* Seconds of one call of work(i), i = 0, 1, ...; 0, with a message, if it failed or its tensors did not fit. */
template <typename F> static double seconds_of(bench *b, const char *what, F work) {
    double times[ROUNDS];
    const int rounds = b->small ? 1 : ROUNDS;
    if (b->full) {
        printf("%s: skipped, its tensors do not fit\n", what);
        return 0;
    }
    double once = seconds_of_calls(b, work, 2); // the first call also finds algorithms and loads kernels
    if (once >= 0) once = seconds_of_calls(b, work, 2) / 2;
    const int n = b->small || once <= 0 ? 2 : once > 0.01 ? 2 : (int)fmin(0.02 / once, 500);
    for (int r = 0; once >= 0 && r < rounds; r++)
        if ((times[r] = seconds_of_calls(b, work, n) / n) < 0) once = -1;
    if (once >= 0) return median(times, rounds);
    printf("%s: FAILED: %s\n", what, slam_error());
    return 0;
}

/* ---- tensors ---- */

static void *tensor_space(bench *b, size_t bytes) {
    bytes = (bytes + 255) / 256 * 256;
    if (bytes > b->size - b->used) {
        b->full = 1;
        return b->arena;
    }
    b->used += bytes;
    return b->arena + b->used - bytes;
}

/* n random numbers of `size` bytes, from another place of the pool for each tensor */
static void *drawn(bench *b, const void *pool, size_t n, size_t size) {
    const size_t start = b->used / 256 * 7919 % (b->pool / 2) / 64 * 64;
    char *p = (char *)tensor_space(b, n * size);
    if (b->full) return p;
    for (size_t i = 0; i < n; i += b->pool - start) {
        const size_t m = n - i < b->pool - start ? n - i : b->pool - start;
        cudaMemcpyAsync(p + i * size, (const char *)pool + start * size, m * size, cudaMemcpyDeviceToDevice, b->stream);
    }
    return p;
}
static slam_act *act_tensor(bench *b, size_t n) { return (slam_act *)drawn(b, b->acts, n, b->ops->act_bytes); }
static float *float_tensor(bench *b, size_t n) { return (float *)drawn(b, b->numbers, n, sizeof(float)); }
static float *zero_tensor(bench *b, size_t n) {
    float *p = (float *)tensor_space(b, n * sizeof *p);
    if (!b->full) b->ops->zero(b->ops, p, n * sizeof *p);
    return p;
}
static void *upload(bench *b, const void *host, size_t bytes) {
    void *p = tensor_space(b, bytes);
    if (!b->full) b->ops->upload(b->ops, p, host, bytes);
    return p;
}
static void tensors_clear(bench *b) {
    b->used = 0;
    b->full = 0;
}

/* How many sets of tensors take turns where one has so many bytes. */
static int sets_of(const bench *b, double bytes) {
    const int n = b->small ? 2 : 1 + (int)ceil(SPAN / bytes);
    return n < 2 ? 2 : n > SETS ? SETS : n;
}

static int *tokens_tensor(bench *b, int N) {
    uint64_t seed = 1;
    int *host = NEW(int, N);
    for (int i = 0; i < N; i++) host[i] = (int)rng_below(&seed, (uint64_t)b->config.V);
    int *p = (int *)upload(b, host, (size_t)N * sizeof *host);
    b->ops->finish(b->ops);
    free(host);
    return p;
}

static void tensors_open(bench *b) {
    slam_ops *ops = b->ops;
    uint64_t seed = 1;
    b->pool = b->small ? 1 << 16 : 1 << 23;
    b->size = b->small ? (size_t)64 << 20 : (size_t)fmin(8e9, 0.6 * (double)ops->memory);
    float *host = NEW(float, b->pool);
    b->numbers = (float *)ops->alloc(ops, b->pool * sizeof(float));
    b->acts = (slam_act *)ops->alloc(ops, b->pool * ops->act_bytes);
    while (!(b->arena = (char *)ops->alloc(ops, b->size)) && b->size > (size_t)64 << 20) b->size /= 2;
    if (!b->numbers || !b->acts || !b->arena) stop(slam_error());
    for (size_t i = 0; i < b->pool; i++) host[i] = (float)rng_normal(&seed);
    ops->upload(ops, b->numbers, host, b->pool * sizeof *host);
    ops->to_act(ops, b->acts, b->numbers, b->pool);
    if (!ops->finish(ops)) stop(slam_error());
    free(host);
}

static void share(double of, double ceiling) {
    if (of > 0 && ceiling > 0) printf(" %4.0f%%", 100 * of / ceiling);
    else printf("     -");
}

/* ---- ceilings ---- */

static void bench_ceilings(bench *b) {
    const size_t bytes = b->small ? 1 << 20 : (size_t)2 << 30;
    const int S = b->small ? 64 : 8192;
    slam_ops *ops = b->ops;
    printf("on %s\n", ops->name);
    char *to = (char *)tensor_space(b, bytes), *from = (char *)drawn(b, b->numbers, bytes / 4, 4);
    const double copy =
        seconds_of(b, "copy", [&](int) { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, b->stream); });
    if (copy > 0) printf("copy within the card's memory   %7.0f GB/s, read and written\n", 2e-9 * (double)bytes / copy);
    key(b, copy > 0 ? 2e-9 * (double)bytes / copy : 0, "copy");
    slam_act *x[2], *w[2], *out[2];
    tensors_clear(b);
    for (int k = 0; k < 2; k++) {
        x[k] = act_tensor(b, (size_t)S * S);
        w[k] = act_tensor(b, (size_t)S * S);
        out[k] = act_tensor(b, (size_t)S * S);
    }
    const double product = seconds_of(
        b, "matrix product", [&](int i) { ops->matmul_forward(ops, out[i % 2], x[i % 2], w[i % 2], NULL, S, S, S); });
    if (product > 0) printf("matrix product of size %4d     %7.0f TFLOP/s\n", S, 2e-12 * S * S * S / product);
    key(b, product > 0 ? 2e-12 * S * S * S / product : 0, "peak");
}

/* ---- matrix products of the model's shapes ---- */

enum { FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT };

static double product_seconds(bench *b, const char *what, int kind, int N, int C, int OC, int bias) {
    slam_ops *ops = b->ops;
    const size_t act = (size_t)ops->act_bytes, n = N, c = C, o = OC;
    slam_act *x[SETS], *w[SETS], *out[SETS];
    float *dw[SETS];
    tensors_clear(b);
    slam_act *bias_in = act_tensor(b, o);
    float *bias_out = zero_tensor(b, o);
    const int sets = sets_of(b, (double)((n * c + n * o) * act + c * o * (kind == BACKWARD_WEIGHT ? 4 : act)));
    for (int k = 0; k < sets; k++) {
        x[k] = act_tensor(b, n * c);
        out[k] = act_tensor(b, n * o);
        w[k] = kind == BACKWARD_WEIGHT ? NULL : act_tensor(b, c * o);
        dw[k] = kind == BACKWARD_WEIGHT ? zero_tensor(b, c * o) : NULL;
    }
    return seconds_of(b, what, [&](int i) {
        const int k = i % sets;
        if (kind == FORWARD) ops->matmul_forward(ops, out[k], x[k], w[k], bias ? bias_in : NULL, N, C, OC);
        else if (kind == BACKWARD_INPUT) ops->matmul_backward_input(ops, x[k], out[k], w[k], N, C, OC);
        else ops->matmul_backward_weight(ops, dw[k], bias ? bias_out : NULL, out[k], x[k], N, C, OC);
    });
}

/* The first algorithm that cuBLASLt proposes, then the one that is kept after measuring. */
static void bench_products(bench *b) {
    const slam_config *c = &b->config;
    const int O = c->NH * c->HS, W = O + 2 * c->KVH * c->HS, T = b->small ? 64 : 1024;
    const int in[] = {c->C, O, c->C, c->F, c->C}, out[] = {W, c->C, 2 * c->F, c->C, b->stride},
              rows[] = {39, 8, 78, 16};
    static const char *const names[] = {"qkv", "out", "gate_up", "down", "head"};
    slam_products *products = b->ops->products;
    for (int r = 0; r < (b->small ? 1 : 4); r++) {
        const int N = b->small ? 4 * T : rows[r] * T;
        double layer[2] = {0, 0}, flops = 0;
        int whole = 1;
        if (late(b, "matrix products")) return;
        printf("%sN = %-5d TFLOP/s %27s %19s %19s\n", r ? "\n" : "", N, "forward", "backward input", "backward weight");
        for (int p = 0; p < 5; p++) {
            const double flop = 2.0 * N * in[p] * out[p];
            printf("%-8s %5d -> %-5d", names[p], in[p], out[p]);
            for (int kind = FORWARD; kind <= BACKWARD_WEIGHT; kind++) {
                char what[64];
                double s = 0;
                snprintf(what, sizeof what, "%s, pass %d", names[p], kind);
                for (products->tune = 0; products->tune < 2; products->tune++) {
                    s = product_seconds(b, what, kind, N, in[p], out[p], p == 0 && kind == FORWARD);
                    printf(products->tune ? " %4.0f" : " %8.0f", s > 0 ? 1e-12 * flop / s : 0);
                    if (p < 4) layer[products->tune] += s;
                }
                share(s > 0 ? flop / s : 0, b->peak);
                if (p < 4) flops += flop;
                whole = whole && s > 0;
            }
            products->tune = products->measured = 0;
            printf("\n");
            fflush(stdout);
        }
        if (!whole) continue;
        printf("a layer's twelve: %.0f us, %.3f us a token in all layers, %.0f TFLOP/s", 1e6 * layer[1],
               1e6 * layer[1] * c->L / N, 1e-12 * flops / layer[1]);
        share(flops / layer[1], b->peak);
        printf("; by the first proposed: %.3f us a token\n", 1e6 * layer[0] * c->L / N);
        key(b, 1e-12 * flops / layer[1], "products/%d", N / T);
    }
}

/* ---- what moves bytes ---- */

static void memory_row(bench *b, const char *name, double n, double bytes, const char *formula, double seconds) {
    if (!(seconds > 0)) return;
    printf("%-20s %9.0f %9.1f %7.0f", name, n, 1e6 * seconds, 1e-9 * bytes / seconds);
    share(bytes / seconds, b->copy);
    printf("   %s\n", formula);
    fflush(stdout);
    key(b, 1e-9 * bytes / seconds, "memory/%s/%.0f", name, n);
}

static void memory_rows(bench *b, int N) {
    slam_ops *ops = b->ops;
    const int C = b->config.C, F = b->config.F, V = b->config.V, W = (b->config.NH + 2 * b->config.KVH) * b->config.HS;
    const double n = N, a = ops->act_bytes, c = C, f = F, v = V, st = b->stride;
    const size_t rows = N;
    slam_act *x[SETS], *y[SETS], *z[SETS], *u[SETS];
    float *r[SETS];
    double s;

    tensors_clear(b);
    int *tokens = tokens_tensor(b, N), sets = sets_of(b, n * c * a);
    slam_act *table = act_tensor(b, (size_t)V * C);
    float *dtable = zero_tensor(b, (size_t)V * C);
    for (int k = 0; k < sets; k++) x[k] = act_tensor(b, rows * C);
    s = seconds_of(b, "embedding_forward",
                   [&](int i) { ops->embedding_forward(ops, x[i % sets], tokens, table, N, C); });
    memory_row(b, "embedding_forward", n, n * c * a + v * c * a + 4 * n, "N C a + V C a + 4 N", s);
    s = seconds_of(b, "embedding_backward",
                   [&](int i) { ops->embedding_backward(ops, dtable, x[i % sets], tokens, N, C, V); });
    memory_row(b, "embedding_backward", n, n * c * a + 8 * v * c + 4 * n, "N C a + 8 V C + 4 N", s);

    tensors_clear(b);
    sets = sets_of(b, 4 * n * c * a);
    slam_act *w = act_tensor(b, C);
    float *dw = zero_tensor(b, C);
    for (int k = 0; k < sets; k++) {
        x[k] = act_tensor(b, rows * C);
        y[k] = act_tensor(b, rows * C);
        z[k] = act_tensor(b, rows * C);
        u[k] = act_tensor(b, rows * C);
        r[k] = float_tensor(b, rows);
    }
    s = seconds_of(b, "rmsnorm_forward", [&](int i) {
        const int k = i % sets;
        ops->rmsnorm_forward(ops, z[k], u[k], r[k], x[k], y[k], w, 1e-6f, N, 1, C, C);
    });
    memory_row(b, "rmsnorm_forward", n, 4 * n * c * a + 4 * n, "4 N C a + 4 N: x, delta -> s, y, r", s);
    s = seconds_of(b, "rmsnorm_backward", [&](int i) {
        const int k = i % sets;
        ops->rmsnorm_backward(ops, x[k], dw, y[k], z[k], w, r[k], N, 1, C, C);
    });
    memory_row(b, "rmsnorm_backward", n, 4 * n * c * a + 4 * n, "4 N C a + 4 N: dy, s, ds, rstd -> ds", s);

    tensors_clear(b);
    sets = sets_of(b, 5 * n * f * a);
    for (int k = 0; k < sets; k++) {
        x[k] = act_tensor(b, rows * F);
        y[k] = act_tensor(b, 2 * rows * F);
        z[k] = act_tensor(b, 2 * rows * F);
    }
    s = seconds_of(b, "swiglu_forward", [&](int i) { ops->swiglu_forward(ops, x[i % sets], y[i % sets], N, F); });
    memory_row(b, "swiglu_forward", n, 3 * n * f * a, "3 N F a", s);
    s = seconds_of(b, "swiglu_backward", [&](int i) {
        const int k = i % sets;
        ops->swiglu_backward(ops, z[k], x[k], y[k], N, F);
    });
    memory_row(b, "swiglu_backward", n, 5 * n * f * a, "5 N F a", s);

    tensors_clear(b);
    tokens = tokens_tensor(b, N);
    sets = sets_of(b, n * st * a);
    float *losses = float_tensor(b, rows);
    for (int k = 0; k < sets; k++) x[k] = act_tensor(b, rows * b->stride);
    slam_xent xent = ZERO;
    xent.N = N, xent.V = V, xent.stride = b->stride, xent.scale = 1e-5f;
    s = seconds_of(b, "crossentropy", [&](int i) { ops->crossentropy(ops, losses, x[i % sets], tokens, &xent); });
    memory_row(b, "crossentropy", n, 2 * n * st * a + 8 * n, "2 N stride a + 8 N", s);

    const double without = product_seconds(b, "qkv without bias", BACKWARD_WEIGHT, N, C, W, 0),
                 with = product_seconds(b, "qkv with bias", BACKWARD_WEIGHT, N, C, W, 1);
    if (with > without && without > 0)
        memory_row(b, "bias_gradient", n, n * W * a, "N W a; the time that a bias adds to backward_weight of qkv",
                   with - without);
}

/* Over all parameters, as the optimiser calls them. */
static void memory_parameters(bench *b) {
    slam_ops *ops = b->ops;
    const size_t n = slam_config_parameters(&b->config) / 256 * 256;
    const double p = (double)n, a = ops->act_bytes;
    const double one[2] = {1, 1};
    const slam_adamw_params h = {1e-6, 0.9, 0.999, 1e-8, 0, 0.5, 1};
    tensors_clear(b);
    double *stats = (double *)upload(b, one, sizeof one);
    float *w = float_tensor(b, n), *m = zero_tensor(b, n), *v = zero_tensor(b, n), *g = float_tensor(b, n);
    slam_act *w_act = act_tensor(b, n);
    double s = seconds_of(b, "adamw", [&](int) { ops->adamw(ops, w_act, w, m, v, g, stats, &h, n); });
    memory_row(b, "adamw", p, (28 + a) * p, "(28 + a) n: w, m, v, g -> w, m, v, w_act", s);
    s = seconds_of(b, "sum_squares", [&](int) { ops->sum_squares(ops, stats, g, n); });
    memory_row(b, "sum_squares", p, 4 * p, "4 n", s);
    s = seconds_of(b, "to_act", [&](int) { ops->to_act(ops, w_act, w, n); });
    memory_row(b, "to_act", p, (4 + a) * p, "(4 + a) n", s);
    s = seconds_of(b, "to_float", [&](int) { ops->to_float(ops, w, w_act, n); });
    memory_row(b, "to_float", p, (4 + a) * p, "(4 + a) n", s);
    s = seconds_of(b, "zero", [&](int) { ops->zero(ops, g, 4 * n); });
    memory_row(b, "zero", p, 4 * p, "4 n", s);
}

static void bench_memory(bench *b) {
    printf("%-20s %9s %9s %7s %5s   bytes that must move; a = %d bytes an activation, C %d, F %d, V %d, stride %d\n",
           "operation", "N", "us", "GB/s", "share", b->ops->act_bytes, b->config.C, b->config.F, b->config.V,
           b->stride);
    const int T = b->small ? 64 : 1024;
    if (!late(b, "N = 8 rows")) memory_rows(b, 8 * T);
    if (!late(b, "the optimiser's")) memory_parameters(b);
    if (!b->small && !late(b, "N = 39 rows")) memory_rows(b, 39 * T);
}

/* ---- packed rows, made as for training ----
   Documents as long as the recipe's: lognormal, those longer than the context are split, 620 tokens a chunk at 1024. */

typedef struct bench_rows {
    slam_batch rows;
    double fill, chunk; // share of real tokens; mean length of a chunk
} bench_rows;

static int documents_write(const char *path, int V, int T, size_t tokens) {
    append_file f = ZERO;
    uint64_t seed = 1;
    uint16_t *document = NEW(uint16_t, (size_t)32 * T);
    int ok = append_open(&f, path) && append_resume(&f, 0) && shard_write_header(&f, V, 0);
    for (size_t done = 0; ok && done < tokens;) {
        const double length = 0.61 * (T < 1024 ? T : 1024) * exp(0.75 * rng_normal(&seed));
        const int n = length < 8 ? 8 : length > 32.0 * T ? 32 * T : (int)length;
        document[0] = document[n - 1] = DOCUMENT_TOKEN;
        for (int i = 1; i < n - 1; i++) document[i] = (uint16_t)(2 + rng_below(&seed, (uint64_t)V - 2));
        ok = append_write(&f, document, 2 * (size_t)n);
        done += (size_t)n;
    }
    free(document);
    ok = ok && shard_write_header(&f, V, 0);
    return append_close(&f) && ok;
}

static int documents_pack(bench_rows *p, const char *path, int V) {
    slam_data *data = slam_data_new(p->rows.T);
    int ok = slam_data_add(data, path, 1) && slam_data_prepare(data, V, 0, 0);
    slam_loader *loader = ok ? slam_loader_new(data, 1, 1) : NULL;
    ok = loader && slam_loader_begin(loader, p->rows.capacity, NULL) &&
         slam_loader_next(loader, &p->rows) == p->rows.capacity;
    if (ok) {
        p->fill = (double)loader->tokens / ((double)p->rows.B * p->rows.T);
        p->chunk = 0;
        for (size_t i = 0; i < data->n_chunks; i++) p->chunk += data->chunks[i].n / (double)data->n_chunks;
    }
    slam_loader_free(loader);
    slam_data_free(data);
    return ok;
}

/* `rows` rows of T tokens; whole: one document a row. */
static bench_rows rows_new(int rows, int T, int V, int whole) {
    bench_rows p = {slam_batch_new(rows, T, 0), 1, (double)T};
    uint64_t seed = 2;
    for (int i = 0; whole && i < rows * T; i++) p.rows.tokens[i] = (int)rng_below(&seed, (uint64_t)V);
    for (int i = 0; whole && i < rows * T; i++) p.rows.targets[i] = i % T == T - 1 ? -1 : p.rows.tokens[i + 1];
    if (whole) return p;
    char *path =
        string_print("%s/slam_gpu_bench_%ld.bin", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", (long)getpid());
    const size_t N = (size_t)rows * T;
    if (!documents_write(path, V, T, N + N / 4 + 64 * (size_t)T) || !documents_pack(&p, path, V)) stop(slam_error());
    unlink(path);
    free(path);
    return p;
}

/* ---- attention ---- */

static void attention_rows(bench *b, int T, int whole) {
    slam_ops *ops = b->ops;
    const slam_config *c = &b->config;
    const int B = b->small ? 2 : 32768 / T, HS = c->HS, W = (c->NH + 2 * c->KVH) * HS;
    const size_t N = (size_t)B * T, O = (size_t)c->NH * HS;
    char what[64];
    double pairs = 0;
    snprintf(what, sizeof what, "attention, T %d, %s", T, whole ? "one document a row" : "packed");
    if (late(b, what)) return;
    bench_rows p = rows_new(B, T, c->V, whole);
    const int *doc_start = p.rows.doc_start;
    for (size_t i = 0; i < N; i++) // a document of n tokens counts as n n / 2 pairs
        if (i + 1 == N || doc_start[i + 1] != doc_start[i] || (i + 1) % T == 0) {
            const double n = (double)(i % T) - doc_start[i] + 1;
            pairs += n * n / 2;
        }
    float *rope = rope_table(T, HS / 2, c);
    tensors_clear(b);
    slam_mask mask = ZERO;
    mask.B = B, mask.T = T, mask.NH = c->NH, mask.KVH = c->KVH, mask.HS = HS, mask.pairs = HS / 2;
    mask.doc_start = (const int *)upload(b, doc_start, N * sizeof(int));
    mask.rope = (const float *)upload(b, rope, (size_t)T * HS * sizeof *rope);
    slam_act *qkv[2], *dqkv[2], *out[2], *dout[2];
    float *lse[2], *D = float_tensor(b, (size_t)B * c->NH * T);
    for (int k = 0; k < 2; k++) {
        qkv[k] = act_tensor(b, N * W);
        dqkv[k] = act_tensor(b, N * W);
        out[k] = act_tensor(b, N * O);
        dout[k] = act_tensor(b, N * O);
        lse[k] = float_tensor(b, (size_t)B * c->NH * T);
    }
    const double forward =
        seconds_of(b, what, [&](int i) { ops->attention_forward(ops, out[i % 2], lse[i % 2], qkv[i % 2], &mask); });
    const double backward = !(forward > 0) ? 0 : seconds_of(b, what, [&](int i) {
        ops->attention_backward(ops, dqkv[i % 2], D, dout[i % 2], out[i % 2], lse[i % 2], qkv[i % 2], &mask);
    });
    const double flop = 4 * pairs * (double)O;
    if (forward > 0) {
        printf("%5d %4d  %-19s %9.3f %8.0f %10.3f %8.0f", T, B, whole ? "one a row" : "packed", 1e3 * forward,
               1e-12 * flop / forward, 1e3 * backward, backward > 0 ? 2.5e-12 * flop / backward : 0);
        if (!whole) printf("   %.0f tokens a chunk, %.1f%% full", p.chunk, 100 * p.fill);
        printf("\n");
        fflush(stdout);
    }
    key(b, 1e3 * forward, "attention/forward/%d/%s", T, whole ? "whole" : "packed");
    key(b, 1e3 * backward, "attention/backward/%d/%s", T, whole ? "whole" : "packed");
    slam_batch_free(&p.rows);
    free(rope);
}

static void bench_attention(bench *b) {
    const int sizes[] = {1024, 2048, 4096};
    printf(
        "causal, NH %d, KVH %d, HS %d, rotation included; FLOP: 4 n n / 2 HS NH a document forward, 2.5 times that backward\n",
        b->config.NH, b->config.KVH, b->config.HS);
    printf("%5s %4s  %-19s %9s %8s %10s %8s\n", "T", "B", "documents", "fwd ms", "TFLOP/s", "bwd ms", "TFLOP/s");
    for (int whole = 1; whole >= 0; whole--)
        for (int k = 0; k < 3; k++) attention_rows(b, b->small ? sizes[k] / 16 : sizes[k], whole);
}

/* ---- time of a step by kind of operation: each is called between two moments in the stream ---- */

enum { MATMUL, ATTENTION, NORMS, SWIGLU, HEAD, OPTIMISER, OTHER, TIMED_GROUPS, MARKS = 8192 };
static const char *const timed_names[] = {"matrix products", "attention", "norms", "SwiGLU", "head",
                                          "optimiser",       "other"};

static struct {
    slam_ops real;
    bench *b;
    moment from[MARKS], to[MARKS];
    int group[MARKS], n;
    double seconds[TIMED_GROUPS];
    long calls[TIMED_GROUPS];
    size_t parameters;
    int stride;
} profile;

static void profile_collect(slam_ops *ops) {
    profile.real.finish(ops);
    for (int i = 0; i < profile.n; i++) {
        profile.seconds[profile.group[i]] += moment_between(profile.from[i], profile.to[i]);
        profile.calls[profile.group[i]]++;
    }
    profile.n = 0;
}

static void profile_open(slam_ops *ops, int group) {
    if (profile.n == MARKS) profile_collect(ops);
    profile.group[profile.n] = group;
    moment_note(profile.b, &profile.from[profile.n]);
}

static void profile_close(void) { moment_note(profile.b, &profile.to[profile.n++]); }

/* The group of a call by its last argument: products with the vocabulary as output are the head, zeroing the gradients
   is part of the optimiser. */
static int group_of(int group, size_t n) {
    if (group == MATMUL && (int)n >= profile.stride - 8 && (int)n <= profile.stride) return HEAD;
    return group == OTHER && n / 4 >= profile.parameters ? OPTIMISER : group;
}
static int group_of(int group, const void *) { return group; }

/* An operation between two moments. */
template <auto OP, int GROUP, typename... A> static void timed(slam_ops *ops, A... a) {
    profile_open(ops, group_of(GROUP, std::get<sizeof...(A) - 1>(std::tie(a...))));
    (profile.real.*OP)(ops, a...);
    profile_close();
}
#define TIMED(name, group) ops->name = timed<&slam_ops::name, group>

static void profile_begin(bench *b) {
    slam_ops *ops = b->ops;
    memset(profile.seconds, 0, sizeof profile.seconds);
    memset(profile.calls, 0, sizeof profile.calls);
    profile.real = *ops;
    profile.b = b;
    profile.n = 0;
    profile.parameters = slam_config_parameters(&b->config);
    profile.stride = b->stride;
    for (int i = 0; i < MARKS; i++) {
        moment_new(&profile.from[i]);
        moment_new(&profile.to[i]);
    }
    TIMED(upload, OTHER), TIMED(zero, OTHER), TIMED(embedding_forward, OTHER), TIMED(embedding_backward, OTHER);
    TIMED(rmsnorm_forward, NORMS), TIMED(rmsnorm_backward, NORMS);
    TIMED(matmul_forward, MATMUL), TIMED(matmul_backward_input, MATMUL), TIMED(matmul_backward_weight, MATMUL);
    TIMED(attention_forward, ATTENTION), TIMED(attention_backward, ATTENTION);
    TIMED(swiglu_forward, SWIGLU), TIMED(swiglu_backward, SWIGLU), TIMED(crossentropy, HEAD), TIMED(sum, OTHER);
    TIMED(sum_squares, OPTIMISER), TIMED(adamw, OPTIMISER);
}

static void profile_end(bench *b) {
    profile_collect(b->ops);
    *b->ops = profile.real;
    for (int i = 0; i < MARKS; i++) {
        moment_free(profile.from[i]);
        moment_free(profile.to[i]);
    }
}

/* What each group should take for a token: products at 83 % of the peak, attention at 220 and 180 TFLOP/s on whole
   rows, the rest by its bytes at 85 % of copy speed. */
static double profile_budget(const bench *b, int group, double tokens) {
    const slam_config *c = &b->config;
    const double a = b->ops->act_bytes, C = c->C, F = c->F, L = c->L, O = c->NH * c->HS, W = O + 2.0 * c->KVH * c->HS;
    const double copy = 0.85 * b->copy, n = (double)slam_config_parameters(c);
    if (!(b->copy > 0) || !(b->peak > 0)) return 0;
    switch (group) {
    case MATMUL: return 6 * L * (W * C + C * O + 3 * F * C) / (0.83 * b->peak);
    case ATTENTION: return L * 2 * 1024 * O * (1 / 220e12 + 2.5 / 180e12);
    case NORMS: return (2 * L + 1) * 8 * C * a / copy;
    case SWIGLU: return L * 8 * F * a / copy;
    case HEAD: return 6 * C * b->stride / (0.83 * b->peak) + 2 * b->stride * a / copy;
    case OPTIMISER: return (28 + a + 4 + 4) * n / copy / tokens; // adamw, sum_squares, zero
    default: return 0;
    }
}

static void profile_print(const bench *b, double wall, double tokens) {
    double sum = 0, budget = 0;
    printf("%-16s %9s %6s %9s %10s %8s\n", "group", "ms a step", "share", "us/token", "budget", "calls");
    for (int g = 0; g < TIMED_GROUPS; g++) {
        const double s = profile.seconds[g], should = profile_budget(b, g, tokens);
        printf("%-16s %9.2f %5.1f%% %9.3f %10.3f %8ld\n", timed_names[g], 1e3 * s, 100 * s / wall, 1e6 * s / tokens,
               1e6 * should, profile.calls[g]);
        sum += s;
        budget += should;
    }
    printf("%-16s %9.2f %5.1f%% %9.3f %10.3f\n", "sum", 1e3 * sum, 100 * sum / wall, 1e6 * sum / tokens, 1e6 * budget);
    printf("%-16s %9.2f\n", "by the clock", 1e3 * wall);
}

/* ---- the training step ---- */

typedef struct result {
    double seconds, loss; // of a step; the first step's mean loss
} result;

/* Rows first to first + n - 1. */
static slam_batch step_batch(const bench_rows *p, int first, int n) {
    const size_t at = (size_t)first * p->rows.T;
    slam_batch b = ZERO;
    b.B = n;
    b.T = p->rows.T;
    b.tokens = p->rows.tokens + at, b.targets = p->rows.targets + at, b.doc_start = p->rows.doc_start + at;
    b.losses = p->rows.losses + at;
    return b;
}

/* One step: the rows of batch k, `micro` at a time, and the update. */
static int step_once(const bench *b, slam_model *m, slam_adamw *o, const bench_rows *p, int k, int micro,
                     slam_step *step, int *terms) {
    const int T = p->rows.T, first = k * b->rows % p->rows.B;
    *terms = 0;
    for (int i = first * T; i < (first + b->rows) * T; i++) *terms += p->rows.targets[i] >= 0;
    for (int row = 0; row < b->rows; row += micro) {
        const slam_batch batch = step_batch(p, first + row, b->rows - row < micro ? b->rows - row : micro);
        if (!slam_forward_backward(m, &batch, 1.0f / (float)*terms)) return 0;
    }
    return slam_adamw_step(o, 1e-5, step);
}

/* Steps for four seconds, three at least, after two that do not count. */
static int step_measure(const bench *b, slam_model *m, slam_adamw *o, const bench_rows *p, int micro, result *r) {
    double times[64], began = 0;
    int n = 0, terms;
    slam_step step;
    slam_products *products = b->ops->products;
    const slam_batch batch = step_batch(p, 0, micro); // as slam_run_tune does
    products->measured = 0;
    products->tune = 1;
    if (!slam_forward_backward(m, &batch, 1)) return 0;
    products->tune = 0;
    b->ops->zero(b->ops, m->grads, m->n_weights * sizeof *m->grads);
    b->ops->zero(b->ops, m->stats, 2 * sizeof *m->stats);
    for (int k = b->small ? -1 : -2; n < 64 && (n < (b->small ? 1 : 3) || (!b->small && slam_clock() - began < 4));
         k++) {
        const double start = slam_clock();
        if (k == 0) began = start;
        if (!step_once(b, m, o, p, k + 2, micro, &step, &terms)) return 0;
        if (step.skipped)
            return set_error("step %d: loss or gradient is not finite (loss %g)", k + 2, step.loss_sum / terms);
        if (r->loss == 0) r->loss = step.loss_sum / terms;
        if (k >= 0) times[n++] = slam_clock() - start;
    }
    r->seconds = median(times, n);
    return 1;
}

/* bytes in use on the card, by whatever runs on it */
static double card_used(double *total) {
    size_t room = 0, all = 0;
    cudaMemGetInfo(&room, &all);
    if (total) *total = (double)all;
    return (double)(all - room);
}

static int step_row(bench *b, slam_model *m, slam_adamw *o, const bench_rows *p, int micro, const char *documents,
                    double *best) {
    result r = {0, 0};
    char what[64];
    snprintf(what, sizeof what, "%d rows at once, %s", micro, documents);
    if (late(b, what)) return 0;
    if (!slam_model_plan(m, micro, p->rows.T, SLAM_TRAIN) || !step_measure(b, m, o, p, micro, &r)) {
        printf("%s: FAILED: %s\n", what, slam_error());
        fflush(stdout);
        return 0;
    }
    const double used = card_used(NULL), tokens = b->rows * (double)p->rows.T, rate = tokens * p->fill / r.seconds;
    printf("%5d  %-18s %10.0f %10.1f %9.3f %6.0f", micro, documents, rate, 1e3 * r.seconds, 1e6 * r.seconds / tokens,
           1e-12 * tokens / r.seconds * slam_config_flops(&b->config, p->rows.T));
    share(tokens / r.seconds * slam_config_flops(&b->config, p->rows.T), b->peak);
    printf(" %9.2f %9.2f   %.4f\n",
           1e-9 * slam_config_memory(&b->config, b->ops->act_bytes, micro, p->rows.T, SLAM_TRAIN, 1).total, 1e-9 * used,
           r.loss);
    fflush(stdout);
    key(b, rate, "step/%d/%s", micro, p->fill < 1 ? "packed" : "whole");
    if (micro == 8 && p->fill < 1) key(b, 1e-9 * used, "step/memory/8");
    if (rate > *best) {
        *best = rate;
        return 1;
    }
    return 0;
}

static void step_profile(bench *b, slam_model *m, slam_adamw *o, const bench_rows *p, int micro) {
    slam_step step;
    int terms;
    if (late(b, "time by kind of operation") || !slam_model_plan(m, micro, p->rows.T, SLAM_TRAIN)) return;
    profile_begin(b);
    const double began = slam_clock();
    const int ok = step_once(b, m, o, p, 0, micro, &step, &terms);
    profile_collect(b->ops);
    const double wall = slam_clock() - began;
    profile_end(b);
    if (!ok) printf("time by kind of operation: FAILED: %s\n", slam_error());
    if (!ok) return;
    printf(
        "\nOne step of %d rows, %d at once, packed, each operation between two events (which makes it somewhat slower)\n",
        b->rows, micro);
    profile_print(b, wall, b->rows * (double)p->rows.T);
}

static void bench_step(bench *b) {
    const int sizes[] = {39, 8, 78, 16, 26}, T = b->small ? 64 : 1024;
    double best = 0, total = 0, ignored = 0, began = slam_clock();
    int best_micro = 0;
    bench_rows p = rows_new(b->rows * (b->small ? 1 : BATCHES), T, b->config.V, 0),
               whole = rows_new(b->rows, T, b->config.V, 1);
    slam_model *m = slam_model_new(b->ops, &b->config, 1);
    slam_adamw o = ZERO;
    o.beta1 = 0.9, o.beta2 = 0.999, o.eps = 1e-8;
    if (!m || !slam_model_plan(m, 1, T, SLAM_TRAIN) || !slam_adamw_init(&o, m)) stop(slam_error());
    printf(
        "%.0fM parameters, made in %.1f s; a step is %d rows of %d; chunks of %.0f tokens packed, %.1f%% full;\n"
        "tokens are real ones, TFLOP/s and us count every position, attention as on whole rows; GB: planned, in use on the card\n",
        1e-6 * (double)slam_config_parameters(&b->config), slam_clock() - began, b->rows, T, p.chunk, 100 * p.fill);
    printf("%5s  %-18s %10s %10s %9s %6s %5s %9s %9s   first loss\n", "micro", "documents", "tokens/s", "ms a step",
           "us/pos.", "TFLOPS", "peak", "planned", "in use");
    for (int k = 0; k < (b->small ? 1 : 5); k++)
        if (step_row(b, m, &o, &p, b->small ? 2 : sizes[k], "packed", &best)) best_micro = b->small ? 2 : sizes[k];
    if (best_micro) {
        step_row(b, m, &o, &whole, best_micro, "one a row", &ignored);
        step_profile(b, m, &o, &p, best_micro);
        if (best_micro != 8 && !b->small) step_profile(b, m, &o, &p, 8);
    }
    card_used(&total);
    printf("the card has %.1f GB\n", 1e-9 * total);
    slam_adamw_free(&o);
    slam_model_free(m);
    slam_batch_free(&p.rows);
    slam_batch_free(&whole.rows);
}

/* ---- HuBERT's units ---- */

enum { RECORDINGS = 600 };

/* From samples on the host to units on the host. Recordings of noise as long as LibriSpeech's utterances, two thirds of
   12 to 17 s, others from 1 s on. */
static void bench_hubert(bench *b) {
    static slam_recording recordings[RECORDINGS];
    char folder[] = "/tmp/gpu_bench.XXXXXX";
    slam_unit_config config = slam_unit_config_default();
    double times[8], seconds = 0;
    uint64_t seed = 1;
    const int n = b->small ? 3 : RECORDINGS, rounds = b->small ? 1 : 5;
    int done = -1;
    if (!mkdtemp(folder) || !random_hubert(folder)) stop(slam_error());
    config.features = SLAM_HUBERT;
    config.rate = 0;
    config.layer = b->small ? 1 : HUBERT_LAYER;
    snprintf(config.hubert, sizeof config.hubert, "%s", folder);
    float *noise = NEW(float, 18 * 16000), *centroids = NEW(float, 500 * 768);
    for (int i = 0; i < 18 * 16000; i++) noise[i] = (float)(0.1 * rng_normal(&seed));
    for (int i = 0; i < 500 * 768; i++) centroids[i] = (float)rng_normal(&seed);
    for (int i = 0; i < n; i++) {
        const double length = (rng_below(&seed, 3) ? 12 : 1) + rng_uniform(&seed) * (i % 3 ? 5 : 11);
        recordings[i].n = (size_t)(16000 * (b->small ? 1 : fmin(length, 17)));
        recordings[i].samples = noise + rng_below(&seed, 16000);
        seconds += (double)recordings[i].n / 16000;
    }
    slam_tokenizer *t = slam_tokenizer_load(NULL, &config, b->ops);
    if (!t) stop(slam_error());
    t->centroids = centroids;
    if (!tokenizer_complete(t, "centroids", 500, 768)) stop(slam_error());
    for (; done < rounds && !(done > 0 && late(b, "further rounds")); done++) {
        const double began = slam_clock();
        if (!slam_units_encode(t, recordings, n)) stop(slam_error());
        times[done < 0 ? 0 : done] = slam_clock() - began;
        for (int i = 0; i < n; i++) slam_units_free(&recordings[i].units);
    }
    const double rate = seconds / median(times, done), flops = rate * random_hubert_flops(12);
    printf("%-44s %12s %9s\n%-44s %12.0f %9.1f", "", "audio s/s", "TFLOPS", "mHuBERT-25Hz to layer 11, 500 units", rate,
           1e-12 * flops);
    share(flops, b->peak);
    printf("\n%.0f s of audio in %d recordings\n", seconds, n);
    key(b, rate, "hubert");
    slam_tokenizer_free(t);
    free(noise);
    remove_tree(folder);
}

/* ---- generation ---- */

/* The Slam model continues prompts of 75 tokens by up to 150 each, sampled, `batch` at once. Bound by memory: a step
   reads all weights, and each sequence's keys and values. */
static void bench_generation(bench *b) {
    const slam_config *c = &b->config;
    const int sizes[] = {1, 16, 64, 256}, prompt = 75, fresh = 150;
    slam_model *m = slam_model_new(b->ops, c, 1);
    if (!m) stop(slam_error());
    printf("%5s %10s %12s %10s\n", "batch", "tokens/s", "ms a step", "of copy");
    for (int k = 0; k < (b->small ? 1 : 4); k++) {
        const slam_generation how = {{0.8, 25, 1, 1}, b->small ? 5 : fresh, prompt + fresh, sizes[k], 1};
        const double tokens_read = sizes[k] * (prompt + how.max_new / 2.0), act = b->ops->act_bytes;
        const double bytes = act * ((double)slam_config_parameters(c) + tokens_read * 2 * c->L * c->KVH * c->HS);
        double times[9], rates[9];
        int units[75], n = 0;
        if (late(b, "generation")) break;
        for (int round = -1; round < (b->small ? 1 : 5); round++) {
            slam_prompts p = ZERO;
            uint64_t seed = (uint64_t)round + 5;
            double tokens = 0;
            for (int i = 0; i < sizes[k]; i++) {
                for (int t = 0; t < prompt; t++) units[t] = (int)rng_below(&seed, (uint64_t)c->V - 2);
                slam_prompts_add(&p, "prompt", units, NULL, (size_t)prompt - 1);
            }
            const double start = slam_clock();
            if (!slam_generate(m, &how, &p, NULL, NULL)) stop(slam_error());
            const double seconds = slam_clock() - start;
            for (size_t i = 0; i < p.n; i++) tokens += p.at[i].length;
            if (round >= 0) times[n] = seconds / how.max_new, rates[n++] = tokens / seconds;
            slam_prompts_free(&p);
        }
        const double rate = median(rates, n), step = median(times, n);
        printf("%5d %10.0f %12.3f", sizes[k], rate, 1e3 * step);
        share(bytes / step, b->copy);
        printf("\n");
        key(b, rate, "generate/%d", sizes[k]);
    }
    slam_model_free(m);
}

int main(int argc, char **argv) {
    static bench b;
    const char *part = argc > 1 ? argv[1] : "", *keys = NULL;
    b.began = slam_clock();
    for (int i = 2; i < argc; i++) {
        if (!strcmp(argv[i], "--small")) b.small = 1;
        else if (i + 1 == argc)
            stop(
                "gpu_bench ceilings|products|memory|attention|step|hubert|generate [--copy GB/s] [--peak TFLOP/s] ...");
        else if (!strcmp(argv[i], "--copy")) b.copy = 1e9 * atof(argv[++i]);
        else if (!strcmp(argv[i], "--peak")) b.peak = 1e12 * atof(argv[++i]);
        else if (!strcmp(argv[i], "--seconds")) b.seconds = atof(argv[++i]);
        else if (!strcmp(argv[i], "--keys")) keys = argv[++i];
    }
    if (keys && !(b.keys = fopen(keys, "a"))) stop("the file of keys cannot be written");
    if (!slam_config_load(&b.config, b.small ? "tiny" : "slam")) stop(slam_error());
    b.config.V = b.small ? 102 : 502;
    b.stride = (b.config.V + 7) / 8 * 8;
    b.rows = b.small ? 4 : 78;
    b.ops = slam_cuda(0, 2);
    if (!b.ops) stop(slam_error());
    b.stream = ((cuda_ops *)b.ops)->stream;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (strcmp(part, "step") && strcmp(part, "hubert") && strcmp(part, "generate")) tensors_open(&b);
    if (!strcmp(part, "ceilings")) bench_ceilings(&b);
    else if (!strcmp(part, "products")) bench_products(&b);
    else if (!strcmp(part, "memory")) bench_memory(&b);
    else if (!strcmp(part, "attention")) bench_attention(&b);
    else if (!strcmp(part, "step")) bench_step(&b);
    else if (!strcmp(part, "hubert")) bench_hubert(&b);
    else if (!strcmp(part, "generate")) bench_generation(&b);
    else stop("name a part: ceilings, products, memory, attention, step, hubert or generate");
    b.ops->release(b.ops, b.arena);
    b.ops->release(b.ops, b.acts);
    b.ops->release(b.ops, b.numbers);
    slam_ops_free(b.ops);
    if (b.keys) fclose(b.keys);
    return 0;
}
