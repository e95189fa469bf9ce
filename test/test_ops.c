/* The operations of the CPU: each forward pass against its mathematics in double, each backward pass against finite differences
   of the forward pass, and all of them bit for bit the same with one thread and with two. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

/* The same bits for the same sums: libraries do not promise them. */
#if defined SLAM_OPENBLAS || defined SLAM_ACCELERATE
enum { promised = 0 };
#else
enum { promised = 1 };
#endif

static float *random_floats(size_t n, double size) {
    float *x = (float *)malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)(size * rng_normal(&check_state.seed));
    return x;
}
static int random_int(int n) { return (int)rng_below(&check_state.seed, (uint64_t)n); }
static slam_act *act(float *x) { return (slam_act *)x; }

/* ---- the attention windows of a few documents; if asked, with a hole in the last one of each row, seen both ways (not only what
   stands before), without rotation ---- */

typedef struct shape {
    int B, T, NH, KVH, HS, holes, both, still;
} shape;

static slam_window make_window(shape s) {
    int *doc = (int *)malloc(sizeof(int) * (size_t)(s.B * s.T)), *hole = (int *)calloc((size_t)(s.B * s.T), 2 * sizeof(int)),
        *end = (int *)malloc(sizeof(int) * (size_t)(s.B * s.T));
    float *rope = (float *)malloc(sizeof(float) * (size_t)(s.T * s.HS));
    for (int b = 0; b < s.B; b++) {
        int start = 0;
        for (int t = 0; t < s.T; t++) {
            if (t > start && random_int(s.T / 3 + 1) == 0 && t < s.T - 8) start = t;
            doc[b * s.T + t] = start;
        }
        for (int t = s.T - 1; t >= 0; t--)
            end[b * s.T + t] = t + 1 < s.T && doc[b * s.T + t + 1] <= t ? end[b * s.T + t + 1] : t + 1;
        const int n = s.T - start;
        for (int t = start + 2 * n / 3; s.holes && n >= 6 && t < s.T; t++) {
            hole[2 * (b * s.T + t)] = start + n / 3;
            hole[2 * (b * s.T + t) + 1] = start + 2 * n / 3;
        }
    }
    for (int p = 0; p < s.T; p++)
        for (int c = 0; c < s.HS / 2; c++) {
            const double angle = p * pow(10000, -2.0 * c / s.HS);
            rope[p * s.HS + c] = (float)cos(angle);
            rope[p * s.HS + s.HS / 2 + c] = (float)sin(angle);
        }
    const slam_window w = {s.B, s.T, s.NH, s.KVH, s.HS, doc, s.both ? end : NULL, s.holes ? hole : NULL, s.still ? NULL : rope};
    if (!s.holes) free(hole);
    if (!s.both) free(end);
    if (s.still) free(rope);
    return w;
}

static void free_window(slam_window w) {
    free((void *)(uintptr_t)w.doc_start);
    free((void *)(uintptr_t)w.doc_end);
    free((void *)(uintptr_t)w.hole);
    free((void *)(uintptr_t)w.rope);
}

/* Attention as the formula of section 3 says it, in double, one query at a time. */
static void attention_in_double(double *out, const float *qkv, const slam_window *w) {
    const int HS = w->HS, W = (w->NH + 2 * w->KVH) * HS, half = HS / 2;
    double *s = (double *)malloc(sizeof(double) * (size_t)w->T), q[256], k[256];
    for (int b = 0; b < w->B; b++)
        for (int h = 0; h < w->NH; h++)
            for (int i = 0; i < w->T; i++) {
                const int *hole = w->hole ? w->hole + 2 * (b * w->T + i) : NULL;
                double sum = 0, *o = out + ((size_t)(b * w->T + i) * w->NH + h) * HS;
                for (int c = 0; c < HS; c++) o[c] = 0;
                for (int j = w->doc_start[b * w->T + i]; j < (w->doc_end ? w->doc_end[b * w->T + i] : i + 1); j++) {
                    if (hole && j >= hole[0] && j < hole[1]) continue;
                    s[j] = 0;
                    for (int side = 0; side < 2; side++) {
                        const int t = side ? j : i, *th = w->hole ? w->hole + 2 * (b * w->T + t) : NULL;
                        const int p = t - w->doc_start[b * w->T + t] - (th ? th[1] - th[0] : 0);
                        const float *x = qkv + (size_t)(b * w->T + t) * W + (side ? w->NH + h / (w->NH / w->KVH) : h) * HS;
                        double *to = side ? k : q;
                        for (int c = 0; c < half; c++) {
                            const double cosine = w->rope ? w->rope[p * HS + c] : 1,
                                         sine = w->rope ? w->rope[p * HS + half + c] : 0;
                            to[c] = x[c] * cosine - x[c + half] * sine;
                            to[c + half] = x[c + half] * cosine + x[c] * sine;
                        }
                    }
                    for (int c = 0; c < HS; c++) s[j] += q[c] * k[c];
                    s[j] = exp(s[j] / sqrt(HS));
                    sum += s[j];
                    for (int c = 0; c < HS; c++)
                        o[c] += s[j] * qkv[(size_t)(b * w->T + j) * W + (w->NH + w->KVH + h / (w->NH / w->KVH)) * HS + c];
                }
                for (int c = 0; c < HS; c++) o[c] /= sum;
            }
    free(s);
}

static void test_attention(slam_ops *ops, shape s) {
    slam_window w = make_window(s);
    const size_t n = (size_t)s.B * s.T * (s.NH + 2 * s.KVH) * s.HS, no = (size_t)s.B * s.T * s.NH * s.HS,
                 nl = (size_t)s.B * s.T * s.NH;
    float *qkv = random_floats(n, 1), *rotated = random_floats(n, 0), *out = random_floats(no, 0), *lse = random_floats(nl, 0),
          *D = random_floats(nl, 0);
    float *dout = random_floats(no, 1), *dqkv = random_floats(n, 9), *expected = random_floats(no, 0);
    double *exact = (double *)malloc(no * sizeof *exact);
    memcpy(rotated, qkv, n * sizeof *qkv);
    ops->attention_forward(ops, act(out), lse, act(rotated), &w);
    attention_in_double(exact, qkv, &w);
    for (size_t i = 0; i < no; i++) expected[i] = (float)exact[i];
    check_close("attention forward", out, expected, no, 1e-6);
    ops->attention_backward(ops, act(dqkv), D, act(dout), act(out), lse, act(rotated), &w);
    /* the loss dout . out, in double, along random directions */
    float *moved = random_floats(n, 0), *direction = random_floats(n, 1);
    for (int part = 0; part < 3; part++) {
        const int first = part == 0   ? 0
                          : part == 1 ? s.NH * s.HS
                                      : (s.NH + s.KVH) * s.HS,
                  end = part == 0 ? s.NH * s.HS : first + s.KVH * s.HS;
        double slope = 0, loss[2] = {0, 0}, size = 0;
        const int W = (s.NH + 2 * s.KVH) * s.HS;
        const char *names[] = {"dq", "dk", "dv"};
        for (int side = 0; side < 2; side++) {
            for (size_t i = 0; i < n; i++) {
                const int c = (int)(i % W);
                moved[i] = qkv[i] + (c >= first && c < end ? (side ? 1e-3f : -1e-3f) * direction[i] : 0);
            }
            attention_in_double(exact, moved, &w);
            for (size_t i = 0; i < no; i++) loss[side] += dout[i] * exact[i];
        }
        for (size_t i = 0; i < n; i++) {
            const int c = (int)(i % W);
            if (c < first || c >= end) continue;
            slope += (double)dqkv[i] * direction[i];
            size += (double)dqkv[i] * dqkv[i];
        }
        check_near(names[part], slope, (loss[1] - loss[0]) / 2e-3, 2e-4 * (sqrt(size) + 1));
    }
    free(qkv), free(rotated), free(out), free(lse), free(D), free(dout), free(dqkv), free(expected), free(exact), free(moved),
        free(direction);
    free_window(w);
}

/* Sequences of several lengths, token by token, each a row of the forward pass. */
static void test_decode(slam_ops *ops, shape s) {
    slam_window w = make_window(s);
    const int W = (s.NH + 2 * s.KVH) * s.HS, K = 2 * s.KVH * s.HS, O = s.NH * s.HS;
    const size_t N = (size_t)s.B * s.T;
    for (size_t i = 0; i < N; i++) ((int *)(uintptr_t)w.doc_start)[i] = 0; // one document a row
    float *qkv = random_floats(N * W, 1), *whole = random_floats(N * W, 0), *expected = random_floats(N * O, 0),
          *lse = random_floats(N * s.NH, 0), *cache = random_floats(N * K, 0), *out = random_floats(N * O, 0),
          *row = random_floats((size_t)s.B * W, 0), *drawn = random_floats((size_t)s.B * O, 0);
    int *lengths = (int *)malloc(sizeof(int) * (size_t)s.B), steps = 0, wrong = 0;
    memcpy(whole, qkv, N * W * sizeof *qkv);
    for (size_t i = 0; i < N * K; i++) cache[i] = NAN; // beyond a sequence's end nothing is read
    ops->attention_forward(ops, act(expected), lse, act(whole), &w);
    for (int b = 0; b < s.B; b++) lengths[b] = -b; // later rows begin later
    for (; steps < s.T + s.B - 1; steps++) {
        slam_window now = w;
        int first = 0, at[64], n = 0;
        while (lengths[first] >= s.T) first++; // rows that are full lie in front
        for (int b = first; b < s.B && lengths[b] >= 0; b++, n++) {
            at[n] = lengths[b];
            memcpy(row + (size_t)n * W, qkv + ((size_t)b * s.T + at[n]) * W, W * sizeof *row);
        }
        now.B = n;
        ops->attention_decode(ops, act(drawn), act(cache + (size_t)first * s.T * K), act(row), at, &now);
        for (int i = 0; i < n; i++) {
            const size_t place = (size_t)(first + i) * s.T + at[i];
            memcpy(out + place * O, drawn + (size_t)i * O, O * sizeof *out);
            wrong += memcmp(row + (size_t)i * W, whole + place * W, W * sizeof *row) != 0;
        }
        for (int b = 0; b < s.B; b++) lengths[b]++;
    }
    check_close("attention decode", out, expected, N * O, 1e-6);
    CHECK(wrong == 0, "%d rows are not rotated as the forward pass does it", wrong);
    free(qkv), free(whole), free(expected), free(lse), free(cache), free(out), free(row), free(drawn), free(lengths);
    free_window(w);
}

/* Rows into the cache, back to front: what was asked for is there, all else is untouched. */
static void test_fill(slam_ops *ops, shape s) {
    slam_window w = make_window(s);
    const int O = s.NH * s.HS, K = 2 * s.KVH * s.HS, room = s.T + 3;
    float *qkv = random_floats((size_t)s.B * s.T * (O + K), 1), *cache = random_floats((size_t)(s.B + 1) * room * K, 0);
    int slots[64], lengths[64], wrong = 0;
    for (size_t i = 0; i < (size_t)(s.B + 1) * room * K; i++) cache[i] = NAN;
    for (int b = 0; b < s.B; b++) slots[b] = s.B - b, lengths[b] = b == 1 ? 0 : s.T - b;
    ops->attention_fill(ops, act(cache), act(qkv), slots, lengths, room, &w);
    for (int slot = 0; slot <= s.B; slot++)
        for (int t = 0; t < room; t++) {
            const int b = s.B - slot, there = slot > 0 && t < lengths[b];
            const float *got = cache + ((size_t)slot * room + t) * K, *from = qkv + ((size_t)b * s.T + t) * (O + K) + O;
            for (int c = 0; c < K; c++) wrong += there ? !(got[c] == from[c]) : got[c] == got[c];
        }
    CHECK(wrong == 0, "%d numbers of the cache are not what they have to be", wrong);
    free(qkv), free(cache);
    free_window(w);
}

/* ---- finite differences: sum(dout * op(x)) must change by grad . direction ---- */

typedef struct problem {
    slam_ops *ops;
    int N, C, OC, V, use_delta;
    float *in[4];
    size_t n_in[4];
    int *tokens;
    float *dout, *out, *extra;
    size_t n_out;
    void (*forward)(struct problem *);
} problem;

static double problem_loss(problem *p) {
    double sum = 0;
    p->forward(p);
    for (size_t i = 0; i < p->n_out; i++) sum += (double)p->dout[i] * p->out[i];
    return sum;
}

/* The slope of the loss along a random direction in input k, by central differences, against that of `gradient`. */
static void check_gradient(const char *what, problem *p, int k, const float *gradient, double step) {
    float *kept = p->in[k];
    for (int trial = 0; trial < 3; trial++) {
        float *direction = random_floats(p->n_in[k], 1), *moved = random_floats(p->n_in[k], 0);
        double slope = 0, size = 0, loss[2];
        for (int side = 0; side < 2; side++) {
            for (size_t i = 0; i < p->n_in[k]; i++) moved[i] = kept[i] + (float)(side ? step : -step) * direction[i];
            p->in[k] = moved;
            loss[side] = problem_loss(p);
        }
        p->in[k] = kept;
        for (size_t i = 0; i < p->n_in[k]; i++) {
            slope += (double)gradient[i] * direction[i];
            size += (double)gradient[i] * gradient[i];
        }
        check_near(what, slope, (loss[1] - loss[0]) / (2 * step), 2e-3 * sqrt(size) + 1e-4);
        free(direction);
        free(moved);
    }
}

static void rmsnorm_run(problem *p) {
    float *s = p->extra, *r = p->extra + (size_t)p->N * p->C;
    p->ops->rmsnorm_forward(p->ops, act(s), act(p->out), r, act(p->in[0]), p->use_delta ? act(p->in[1]) : NULL, act(p->in[2]),
                            1e-6f, p->N, p->C);
}

static void test_rmsnorm(slam_ops *ops, int N, int C, int use_delta) {
    const size_t n = (size_t)N * C;
    problem p = SLAM_ZERO;
    p.ops = ops, p.N = N, p.C = C, p.use_delta = use_delta, p.forward = rmsnorm_run;
    p.in[0] = random_floats(n, 1), p.in[1] = random_floats(n, 1), p.in[2] = random_floats(C, 1);
    p.n_in[0] = p.n_in[1] = n, p.n_in[2] = C;
    p.out = random_floats(n, 0), p.dout = random_floats(n, 1), p.extra = random_floats(n + N, 0), p.n_out = n;
    rmsnorm_run(&p);
    float *expected = random_floats(n, 0);
    for (int i = 0; i < N; i++) {
        double sum = 0;
        for (int c = 0; c < C; c++) sum += pow(p.in[0][i * C + c] + (use_delta ? (double)p.in[1][i * C + c] : 0), 2);
        for (int c = 0; c < C; c++)
            expected[i * C + c] =
                (float)(p.in[2][c] * (p.in[0][i * C + c] + (use_delta ? (double)p.in[1][i * C + c] : 0)) / sqrt(sum / C + 1e-6));
    }
    check_close("rmsnorm forward", p.out, expected, n, 1e-6);
    float *ds = random_floats(n, 1), *before = random_floats(n, 0), *dw = random_floats(C, 1), *dw_before = random_floats(C, 0);
    memcpy(before, ds, n * sizeof *ds);
    memcpy(dw_before, dw, C * sizeof *dw);
    const float *s = use_delta ? p.extra : p.in[0];
    ops->rmsnorm_backward(ops, act(ds), dw, act(p.dout), (const slam_act *)s, act(p.in[2]), p.extra + n, N, C);
    for (size_t i = 0; i < n; i++) ds[i] -= before[i]; // both gradients add
    for (int c = 0; c < C; c++) dw[c] -= dw_before[c];
    check_gradient("dx", &p, 0, ds, 1e-2);
    if (use_delta) check_gradient("ddelta", &p, 1, ds, 1e-2);
    check_gradient("dw", &p, 2, dw, 1e-2);
    for (int k = 0; k < 3; k++) free(p.in[k]);
    free(p.out), free(p.dout), free(p.extra), free(expected), free(ds), free(before), free(dw), free(dw_before);
}

static void matmul_run(problem *p) {
    p->ops->matmul_forward(p->ops, act(p->out), act(p->in[0]), act(p->in[1]), p->in[2] ? act(p->in[2]) : NULL, p->N, p->C, p->OC);
}

static void test_matmul(slam_ops *ops, int N, int C, int OC, int bias) {
    problem p = SLAM_ZERO;
    p.ops = ops, p.N = N, p.C = C, p.OC = OC, p.forward = matmul_run;
    p.n_in[0] = (size_t)N * C, p.n_in[1] = (size_t)OC * C, p.n_in[2] = OC, p.n_out = (size_t)N * OC;
    for (int k = 0; k < 3; k++) p.in[k] = k < 2 || bias ? random_floats(p.n_in[k], 1) : NULL;
    p.out = random_floats(p.n_out, 1), p.dout = random_floats(p.n_out, 1);
    for (size_t i = 0; i < p.n_out; i++) p.out[i] = NAN; // overwritten, not added to
    matmul_run(&p);
    float *expected = random_floats(p.n_out, 0), *dx = random_floats(p.n_in[0], 1), *dw = random_floats(p.n_in[1], 0),
          *db = random_floats(OC, 0);
    for (int i = 0; i < N; i++)
        for (int o = 0; o < OC; o++) {
            double sum = bias ? p.in[2][o] : 0;
            for (int c = 0; c < C; c++) sum += (double)p.in[0][i * C + c] * p.in[1][o * C + c];
            expected[i * OC + o] = (float)sum;
        }
    check_close("matmul forward", p.out, expected, p.n_out, 1e-6);
    for (size_t i = 0; i < p.n_in[0]; i++) dx[i] = NAN;
    ops->matmul_backward_input(ops, act(dx), act(p.dout), act(p.in[1]), N, C, OC);
    ops->matmul_backward_weight(ops, dw, bias ? db : NULL, act(p.dout), act(p.in[0]), N, C, OC);
    check_gradient("dx", &p, 0, dx, 1e-1);
    check_gradient("dw", &p, 1, dw, 1e-1);
    if (bias) check_gradient("db", &p, 2, db, 1e-1);
    float *twice = random_floats(p.n_in[1], 0);
    memcpy(twice, dw, p.n_in[1] * sizeof *dw);
    ops->matmul_backward_weight(ops, twice, NULL, act(p.dout), act(p.in[0]), N, C, OC);
    for (size_t i = 0; i < p.n_in[1]; i++) dw[i] *= 2;
    check_close("dw adds", twice, dw, p.n_in[1], 1e-6);
    for (int k = 0; k < 3; k++) free(p.in[k]);
    free(p.out), free(p.dout), free(expected), free(dx), free(dw), free(db), free(twice);
}

static void swiglu_run(problem *p) { p->ops->swiglu_forward(p->ops, act(p->out), act(p->in[0]), p->N, p->C); }

static void test_swiglu(slam_ops *ops, int N, int F) {
    problem p = SLAM_ZERO;
    p.ops = ops, p.N = N, p.C = F, p.forward = swiglu_run;
    p.n_in[0] = 2 * (size_t)N * F, p.n_out = (size_t)N * F;
    p.in[0] = random_floats(p.n_in[0], 2), p.out = random_floats(p.n_out, 0), p.dout = random_floats(p.n_out, 1);
    p.in[0][0] = 200, p.in[0][1] = -200; // sigmoid at its ends
    swiglu_run(&p);
    float *expected = random_floats(p.n_out, 0), *d = random_floats(p.n_in[0], 0);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < F; c++)
            expected[i * F + c] =
                (float)((double)p.in[0][2 * i * F + c] / (1 + exp(-(double)p.in[0][2 * i * F + c])) * p.in[0][2 * i * F + F + c]);
    check_close("swiglu forward", p.out, expected, p.n_out, 1e-6);
    memcpy(d, p.in[0], p.n_in[0] * sizeof *d);
    ops->swiglu_backward(ops, act(d), act(p.dout), act(d), N, F); // in place, as the model does
    p.in[0][0] = p.in[0][1] = 1;                                  // differences are taken where they can be
    float *d2 = random_floats(p.n_in[0], 0);
    ops->swiglu_backward(ops, act(d2), act(p.dout), act(p.in[0]), N, F);
    CHECK(isfinite(d[0]) && isfinite(d[1]), "gradients at gates of +-200: %g, %g", (double)d[0], (double)d[1]);
    check_gradient("dgate_up", &p, 0, d2, 1e-2);
    free(p.in[0]), free(p.out), free(p.dout), free(expected), free(d), free(d2);
}

/* Rows `stride` apart, whose ends are no logits: far larger numbers. */
static void test_crossentropy(slam_ops *ops, int N, int V, int stride, int weighted) {
    const size_t n = (size_t)N * stride;
    float *z = random_floats(n, 3), *kept = random_floats(n, 0), *loss = random_floats(N, 1), *expected = random_floats(n, 0),
          *expected_loss = random_floats(N, 0), *weights = random_floats(N, 1);
    int *targets = (int *)malloc(sizeof(int) * (size_t)N);
    for (int i = 0; i < N; i++)
        for (int v = V; v < stride; v++) z[i * stride + v] = 1e4f;
    if (weighted) weights[0] = 0;
    memcpy(kept, z, n * sizeof *z);
    for (int i = 0; i < N; i++) {
        targets[i] = i % 5 == 1 ? -1 : random_int(V);
        const double weight = 0.25 * (weighted ? weights[i] : 1);
        float *zi = z + (size_t)i * stride;
        double sum = 0;
        if (i % 7 == 3) zi[0] = kept[i * stride] = 300; // one logit far above
        for (int v = 0; v < V; v++) sum += exp((double)zi[v] - 300);
        for (int v = 0; v < V; v++)
            expected[i * stride + v] = targets[i] < 0 ? 0 : (float)(weight * (exp((double)zi[v] - 300) / sum - (v == targets[i])));
        expected_loss[i] = targets[i] < 0 ? 0 : (float)(log(sum) + 300 - (double)zi[targets[i]]);
    }
    const float *w = weighted ? weights : NULL;
    ops->crossentropy(ops, loss, act(z), targets, w, 0, N, V, stride);
    for (int i = 0; i < N; i++) check_near("a loss", loss[i], expected_loss[i], 1e-6 * (1 + expected_loss[i])); // may be almost 0
    CHECK(memcmp(z, kept, n * sizeof *z) == 0, "logits are left alone with scale 0");
    ops->crossentropy(ops, loss, act(z), targets, w, 0.25f, N, V, stride);
    for (int i = 0; i < N; i++) check_near("a loss", loss[i], expected_loss[i], 1e-6 * (1 + expected_loss[i])); // may be almost 0
    check_close("dlogits", z, expected, n, 2e-6);
    free(z), free(kept), free(loss), free(expected), free(expected_loss), free(weights), free(targets);
}

static void test_embedding(slam_ops *ops, int N, int C, int V) {
    float *table = random_floats((size_t)V * C, 1), *x = random_floats((size_t)N * C, 0), *dx = random_floats((size_t)N * C, 1);
    float *d = random_floats((size_t)V * C, 1), *expected = random_floats((size_t)V * C, 0);
    int *tokens = (int *)malloc(sizeof(int) * (size_t)N), wrong = 0;
    memcpy(expected, d, sizeof(float) * (size_t)V * C);
    for (int i = 0; i < N; i++) tokens[i] = random_int(V);
    ops->embedding_forward(ops, act(x), tokens, act(table), N, C);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < C; c++) {
            wrong += x[i * C + c] != table[tokens[i] * C + c];
            expected[tokens[i] * C + c] += dx[i * C + c];
        }
    CHECK(wrong == 0, "%d numbers are not the table's", wrong);
    ops->embedding_backward(ops, d, act(dx), tokens, N, C, V);
    check_close("dtable", d, expected, (size_t)V * C, 0);
    free(table), free(x), free(dx), free(d), free(expected), free(tokens);
}

/* ---- sampling: probabilities as the definition says them, by sorting, in double ---- */

typedef struct ranked {
    double z;
    int v;
} ranked;

static int by_size(const void *a, const void *b) {
    const double x = ((const ranked *)a)->z, y = ((const ranked *)b)->z;
    return x < y ? 1 : x > y ? -1 : ((const ranked *)a)->v - ((const ranked *)b)->v;
}

/* p (V), of which p[0] is 0; greedy: 1 for the one that is drawn. */
static void probabilities(double *p, const float *logits, const unsigned char *seen, slam_sampling s, int V) {
    ranked *r = (ranked *)malloc(sizeof *r * (size_t)V);
    double total = 0, sum = 0, kept = 0;
    for (int v = 1; v < V; v++) {
        r[v].v = v, r[v].z = logits[v];
        if (seen && seen[v]) r[v].z = (float)(r[v].z < 0 ? r[v].z * s.repetition_penalty : r[v].z / s.repetition_penalty);
    }
    qsort(r + 1, (size_t)(V - 1), sizeof *r, by_size);
    for (int v = 0; v < V; v++) p[v] = 0;
    if (s.temperature == 0) p[r[1].v] = 1;
    else {
        int k = s.top_k > 0 && s.top_k < V - 1 ? s.top_k : V - 1, n = 0;
        while (k < V - 1 && r[k + 1].z == r[k].z) k++;
        for (int i = 1; i <= k; i++) total += p[r[i].v] = exp((r[i].z - r[1].z) / s.temperature);
        while (n < k && (n == 0 || sum / total < s.top_p || r[n + 1].z == r[n].z)) sum += p[r[++n].v];
        for (int i = n + 1; i <= k; i++) p[r[i].v] = 0;
        for (int v = 0; v < V; v++) kept += p[v];
        for (int v = 0; v < V; v++) p[v] /= kept;
    }
    free(r);
}

/* Many uniforms for the same logits: each drawn token is the one whose share of [0,1) holds it, so that each is drawn as often as
   its probability says. */
static void test_sample(slam_ops *ops, int V, slam_sampling s, int with_seen, int coarse) {
    enum { B = 2000 };
    const int stride = V + 3;
    float *logits = random_floats((size_t)B * stride, 0), *uniform = random_floats(B, 0), *one = random_floats(stride, 2);
    unsigned char *seen = (unsigned char *)calloc((size_t)B, (size_t)V), *before = (unsigned char *)calloc((size_t)V, 1);
    double *p = (double *)malloc(sizeof(double) * (size_t)V);
    int *tokens = (int *)calloc(B, sizeof(int)), *count = (int *)calloc((size_t)V, sizeof(int)), wrong = 0, unmarked = 0;
    for (int v = 0; v < V; v++) {
        if (coarse) one[v] = roundf(2 * one[v]) / 2; // ties
        before[v] = (unsigned char)(with_seen && random_int(3) == 0);
    }
    one[0] = 50; // the padding's, by far the largest
    for (int v = V; v < stride; v++) one[v] = 60;
    for (int b = 0; b < B; b++) {
        memcpy(logits + (size_t)b * stride, one, sizeof(float) * (size_t)stride);
        memcpy(seen + (size_t)b * V, before, (size_t)V);
        uniform[b] = b == 0 ? 0 : b == 1 ? 0x1.fffffep-1f : (float)b / B;
    }
    ops->sample(ops, tokens, act(logits), with_seen ? seen : NULL, uniform, &s, B, V, stride);
    probabilities(p, one, with_seen ? before : NULL, s, V);
    for (int b = 0; b < B; b++) {
        const int t = tokens[b];
        double below = 0;
        for (int v = 0; v < t; v++) below += p[v];
        wrong += t < 1 || t >= V || p[t] == 0 || uniform[b] < below - 1e-6 || (uniform[b] > below + p[t] + 1e-6);
        unmarked += with_seen && !seen[(size_t)b * V + t];
        count[t]++;
    }
    CHECK(wrong == 0 || s.temperature == 0, "%d of %d draws are not the uniform's", wrong, B);
    CHECK(unmarked == 0, "%d draws are not marked as seen", unmarked);
    double worst = 0;
    for (int v = 0; v < V; v++) worst = fmax(worst, fabs(count[v] - B * p[v]));
    check_near("draws of a token", worst, 0, 2.01); // evenly spaced uniforms, and the two at the ends
    free(logits), free(uniform), free(one), free(seen), free(before), free(p), free(tokens), free(count);
}

/* By hand: what is kept at a threshold, and the first of the largest. */
static void test_sample_by_hand(slam_ops *ops) {
    float z[2][8] = {{9, 1, 3, 2, 3, 0, 3, 2}, {9, -1, -1, -2, -1, -4, -8, -8}}, u[2] = {0, 0};
    unsigned char seen[2][8] = {{0, 0, 1, 0, 0, 0, 0, 0}, {0, 1, 0, 0, 0, 0, 0, 0}};
    int t[2];
    const slam_sampling greedy = {0, 0, 1, 1}, two = {1, 2, 1, 1}, small = {1, 0, 1e-9, 1}, none = {1, 0, 0, 1},
                        penalty = {0, 0, 1, 2};
    ops->sample(ops, t, act(z[0]), NULL, u, &greedy, 2, 8, 8);
    CHECK(t[0] == 2 && t[1] == 1, "greedy: %d and %d, the first of the largest are 2 and 1", t[0], t[1]);
    u[0] = u[1] = 0.99f;
    ops->sample(ops, t, act(z[0]), NULL, u, &two, 2, 8, 8);
    CHECK(t[0] == 6 && t[1] == 4, "top-k 2: the last are %d and %d, with ties 6 and 4", t[0], t[1]);
    ops->sample(ops, t, act(z[0]), NULL, u, &small, 2, 8, 8);
    CHECK(t[0] == 6 && t[1] == 4, "top-p 1e-9: the last are %d and %d, with ties 6 and 4", t[0], t[1]);
    ops->sample(ops, t, act(z[0]), NULL, u, &none, 2, 8, 8);
    CHECK(t[0] == 6 && t[1] == 4, "top-p 0: the last are %d and %d, the largest stay", t[0], t[1]);
    ops->sample(ops, t, act(z[0]), seen[0], u, &penalty, 2, 8, 8);
    CHECK(t[0] == 4 && t[1] == 2, "penalty 2: %d and %d, expected 4 and 2", t[0], t[1]);
    ops->sample(ops, t, act(z[0]), seen[0], u, &penalty, 2, 8, 8);
    CHECK(t[0] == 6 && t[1] == 4, "penalty on what was drawn: %d and %d, expected 6 and 4", t[0], t[1]);
    z[0][3] = NAN, z[0][5] = -INFINITY;
    for (int i = 0; i < 1000; i++) {
        const slam_sampling hot = {100, 0, 1, 1};
        u[0] = (float)i / 1000;
        ops->sample(ops, t, act(z[0]), NULL, u, &hot, 1, 8, 8);
        CHECK(t[0] > 0 && t[0] < 8 && t[0] != 3 && t[0] != 5, "%d was drawn, which has no probability", t[0]);
    }
}

/* Everything with one thread and with two: the same bits. */
static void test_threads(void) {
    float *result[2];
    const int N = 150, C = 96, F = 200, V = 77;
    const shape s = {2, 75, 6, 2, 16, 1, 0, 0};
    const size_t n_qkv = (size_t)N * 160,
                 total = (size_t)N * C * 4 + 2 * n_qkv + (size_t)N * F * 4 + (size_t)C * F + (size_t)N * V + 5 * C;
    for (int run = 0; run < 2; run++) {
        check_state.seed = 99;
        slam_ops *ops = slam_cpu(run ? 2 : 1);
        slam_window w = make_window(s);
        float *x = random_floats((size_t)N * C, 1), *wide = random_floats((size_t)C * F, 1), *norm = random_floats(C, 1),
              *qkv = random_floats(n_qkv, 1);
        float *wide2 = random_floats(2 * (size_t)N * F, 1), *logits = random_floats((size_t)N * V, 1);
        float *to = result[run] = (float *)calloc(total, sizeof *to), *r = random_floats(N, 1), *lse = random_floats(N * 6, 1),
              *D = random_floats(N * 6, 1);
        int tokens[150];
        for (int i = 0; i < N; i++) tokens[i] = random_int(V);
        ops->matmul_forward(ops, act(to), act(x), act(wide), NULL, N, C, F), to += (size_t)N * F;
        ops->matmul_backward_weight(ops, to, NULL, act(wide2), act(x), N, C, F), to += (size_t)C * F;
        ops->rmsnorm_forward(ops, act(to), act(to + (size_t)N * C), r, act(x), act(x), act(norm), 1e-6f, N, C);
        ops->rmsnorm_backward(ops, act(to), to + 2 * (size_t)N * C, act(to + (size_t)N * C), act(x), act(norm), r, N, C),
            to += 2 * (size_t)N * C + C;
        ops->attention_forward(ops, act(to), lse, act(qkv), &w);
        ops->attention_backward(ops, act(to + (size_t)N * C), D, act(x), act(to), lse, act(qkv), &w), to += (size_t)N * C + n_qkv;
        const slam_sampling sampling = {0.9, 20, 0.9, 1};
        ops->sample(ops, tokens, act(logits), NULL, x, &sampling, N, V, V);
        ops->crossentropy(ops, r, act(logits), tokens, NULL, 1, N, V, V);
        memcpy(to, logits, sizeof(float) * (size_t)N * V);
        ops->swiglu_forward(ops, act(to), act(wide2), N, F);
        free(x), free(wide), free(norm), free(qkv), free(wide2), free(logits), free(r), free(lse), free(D);
        free_window(w);
        slam_ops_free(ops);
    }
    CHECK(memcmp(result[0], result[1], total * sizeof(float)) == 0, "results depend on the number of threads");
    free(result[0]);
    free(result[1]);
}

static void test_adamw(slam_ops *ops) {
    enum { N = 1000 };
    float *w = random_floats(N, 1), *g = random_floats(N, 1), *m = random_floats(N, 0), *v = random_floats(N, 0);
    double W[N], M[N], U[N], norm = 0;
    for (int i = 0; i < N; i++) W[i] = w[i], M[i] = U[i] = 0;
    for (int step = 1; step <= 3; step++) {
        double stats[2] = {1, 0};
        const slam_adamw h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, step};
        norm = 0;
        ops->sum_squares(ops, stats + 1, g, N);
        for (int i = 0; i < N; i++) norm += (double)g[i] * g[i];
        check_near("squared norm", stats[1] / norm, 1, 1e-12);
        ops->adamw(ops, act(w), w, m, v, g, stats, &h, N);
        for (int i = 0; i < N; i++) {
            const double gi = g[i] * 0.5 / (sqrt(norm) + 1e-6);
            M[i] = 0.9 * M[i] + 0.1 * gi, U[i] = 0.999 * U[i] + 0.001 * gi * gi;
            W[i] = W[i] * (1 - 1e-3) - 1e-2 * (M[i] / (1 - pow(0.9, step))) / (sqrt(U[i] / (1 - pow(0.999, step))) + 1e-8);
            g[i] = g[i] * 0.7f - 0.1f;
        }
    }
    float expected[N], kept[N];
    for (int i = 0; i < N; i++) expected[i] = (float)W[i];
    check_close("weights after 3 updates", w, expected, N, 1e-6);
    const slam_adamw h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, 4};
    const double bad[3][2] = {{NAN, 1}, {1, INFINITY}, {1, NAN}};
    memcpy(kept, w, sizeof kept);
    for (int k = 0; k < 3; k++) ops->adamw(ops, act(w), w, m, v, g, bad[k], &h, N);
    CHECK(memcmp(kept, w, sizeof kept) == 0, "a step whose loss or norm is not finite must change nothing");
    free(w), free(g), free(m), free(v);
}

/* ---- what speech encoders need, against the formulas of section 3 in double ---- */

static double gelu_in_double(double x) { return x * 0.5 * erfc(-x / sqrt(2)); }

static void test_gelu(slam_ops *ops) {
    enum { N = 20001 };
    float *x = random_floats(N, 0), *y = random_floats(N, 0), worst = 0;
    for (int i = 0; i < N; i++) y[i] = x[i] = (float)(i - N / 2) * 1e-3f;
    ops->gelu(ops, act(y), N);
    for (int i = 0; i < N; i++) {
        const double exact = gelu_in_double(x[i]), off = fabs(y[i] - exact) / (fabs(exact) + 1e-30);
        if (off > worst && fabs(x[i]) < 5) worst = (float)off;
        check_near("gelu", y[i], exact, 1e-6 * fabs(exact) + 1e-9);
    }
    check_near("worst relative error up to |x| = 5", worst, 0, 2e-6);
    y[0] = NAN, y[1] = 1e30f, y[2] = -1e30f;
    ops->gelu(ops, act(y), 3);
    CHECK(y[0] != y[0] && y[1] == 1e30f && fabsf(y[2]) < 1e-6f, "gelu of NaN, 1e30, -1e30 is %g, %g, %g", y[0], y[1], y[2]);
    free(x), free(y);
}

/* Frames beyond a row read on: x has room for them. */
static void test_conv1d(slam_ops *ops, slam_conv c, int with_bias) {
    const size_t nx = (size_t)(c.B * c.G * c.T + c.TO * c.stride + c.K) * c.C, nw = (size_t)c.G * c.OC * c.K * c.C,
                 no = (size_t)c.B * c.TO * c.G * c.OC;
    float *x = random_floats(nx, 1), *w = random_floats(nw, 0.5), *b = random_floats((size_t)c.G * c.OC, 1),
          *out = random_floats(no, 9), *expected = random_floats(no, 0);
    for (int r = 0; r < c.B; r++)
        for (int t = 0; t < c.TO; t++)
            for (int o = 0; o < c.G * c.OC; o++) {
                double sum = with_bias ? b[o] : 0;
                for (int k = 0; k < c.K * c.C; k++)
                    sum += (double)x[((size_t)(r * c.G + o / c.OC) * c.T + t * c.stride) * c.C + k] * w[(size_t)o * c.K * c.C + k];
                expected[((size_t)r * c.TO + t) * c.G * c.OC + o] = (float)(c.gelu ? gelu_in_double(sum) : sum);
            }
    ops->conv1d(ops, act(out), act(x), act(w), with_bias ? act(b) : NULL, &c);
    check_close("conv1d", out, expected, no, 1e-6);
    free(x), free(w), free(b), free(out), free(expected);
}

static void test_group_frames(slam_ops *ops) {
    enum { B = 3, T = 7, C = 6, G = 2, TO = 11, BEFORE = 3 };
    const int lengths[B] = {7, 0, 4};
    float *x = random_floats(B * T * C, 1), *out = random_floats(B * TO * C, 1), *scale = random_floats(C, 1),
          *shift = random_floats(C, 1);
    for (int with = 0; with < 2; with++) {
        ops->group_frames(ops, act(out), act(x), lengths, with ? act(scale) : NULL, with ? act(shift) : NULL, BEFORE, B, T, TO, C,
                          G);
        for (int i = 0; i < B * G * TO * C / G; i++) {
            const int c = i % (C / G) + i / (C / G) / TO % G * (C / G), t = i / (C / G) % TO - BEFORE, b = i / (C / G) / TO / G;
            const float from = t >= 0 && t < lengths[b] ? x[(b * T + t) * C + c] : 0;
            check_near("group_frames", out[i], t < 0 || t >= lengths[b] ? 0 : with ? from * scale[c] + shift[c] : from, 1e-6);
        }
    }
    ops->mask_frames(ops, act(x), lengths, B, T, C);
    for (int i = 0; i < B * T * C; i++)
        CHECK((x[i] == 0) == (i / C % T >= lengths[i / C / T]), "mask_frames: number %d is %g", i, x[i]);
    free(x), free(out), free(scale), free(shift);
}

static void test_layernorm(slam_ops *ops, int N, int C, int gelu) {
    const size_t n = (size_t)N * C;
    float *x = random_floats(n, 2), *delta = random_floats(n, 1), *w = random_floats(C, 1), *b = random_floats(C, 1),
          *s = random_floats(n, 0), *y = random_floats(n, 0), *expected = random_floats(n, 0), *sum = random_floats(n, 0);
    for (size_t i = 0; i < n; i++) x[i] += 3;
    for (int with = 0; with < 2; with++) {
        for (int i = 0; i < N; i++) {
            double mean = 0, var = 0;
            for (int c = 0; c < C; c++) {
                const size_t at = (size_t)i * C + c;
                sum[at] = with ? x[at] + delta[at] : x[at];
                mean += sum[at] / (double)C;
            }
            for (int c = 0; c < C; c++) var += pow(sum[(size_t)i * C + c] - mean, 2) / C;
            for (int c = 0; c < C; c++) {
                const double out = (sum[(size_t)i * C + c] - mean) / sqrt(var + 1e-5) * w[c] + b[c];
                expected[(size_t)i * C + c] = (float)(gelu ? gelu_in_double(out) : out);
            }
        }
        ops->layernorm(ops, with ? act(s) : NULL, act(y), act(x), with ? act(delta) : NULL, act(w), act(b), 1e-5f, gelu, N, C);
        check_close("layernorm", y, expected, n, 1e-6);
        if (with) CHECK(memcmp(s, sum, n * sizeof *s) == 0, "s is not the sum");
    }
    ops->layernorm(ops, act(y), NULL, act(x), act(delta), NULL, NULL, 0, 0, N, C);
    CHECK(memcmp(y, sum, n * sizeof *s) == 0, "a sum alone is not the sum");
    ops->layernorm(ops, NULL, act(x), act(x), act(delta), act(w), act(b), 1e-5f, gelu, N, C);
    check_close("layernorm in place", x, expected, n, 1e-6);
    free(x), free(delta), free(w), free(b), free(s), free(y), free(expected), free(sum);
}

static void test_channelnorm(slam_ops *ops, int B, int T, int C) {
    const size_t n = (size_t)B * T * C;
    int lengths[8];
    float *x = random_floats(n, 2), *w = random_floats(C, 1), *bias = random_floats(C, 1), *expected = random_floats(n, 0),
          *alone = random_floats(n, 0);
    for (size_t i = 0; i < n; i++) x[i] += 3;
    memcpy(alone, x, n * sizeof *x);
    for (int b = 0; b < B; b++) {
        lengths[b] = b == 1 ? 1 : b == 2 ? 0 : T - random_int(T);
        for (int c = 0; c < C; c++) {
            double mean = 0, var = 0;
            for (int t = 0; t < lengths[b]; t++) mean += x[((size_t)b * T + t) * C + c] / (double)lengths[b];
            for (int t = 0; t < lengths[b]; t++) var += pow(x[((size_t)b * T + t) * C + c] - mean, 2) / lengths[b];
            for (int t = 0; t < lengths[b]; t++)
                expected[((size_t)b * T + t) * C + c] =
                    (float)gelu_in_double((x[((size_t)b * T + t) * C + c] - mean) / sqrt(var + 1e-5) * w[c] + bias[c]);
        }
    }
    ops->channelnorm(ops, act(x), act(w), act(bias), lengths, 1e-5f, B, T, C);
    check_close("channelnorm", x, expected, n, 1e-6);
    for (int b = 0; b < B; b++) { // the same frames in a row of their own
        float *row = alone + (size_t)b * T * C;
        if (lengths[b]) ops->channelnorm(ops, act(row), act(w), act(bias), &lengths[b], 1e-5f, 1, lengths[b], C);
        CHECK(memcmp(row, x + (size_t)b * T * C, sizeof *x * (size_t)lengths[b] * C) == 0, "row %d differs when it is alone", b);
    }
    free(x), free(w), free(bias), free(expected), free(alone);
}

static void test_nearest(slam_ops *ops, int N, int D, int K) {
    float *x = random_floats((size_t)N * D, 1), *centroids = random_floats((size_t)K * D, 1), *squares = random_floats(K, 0),
          *scores = random_floats((size_t)N * K, 0);
    int *got = (int *)malloc(sizeof(int) * (size_t)N);
    for (int d = 0; d < D; d++) centroids[(size_t)(K - 1) * D + d] = centroids[d]; // the first and the last tie
    memcpy(x, centroids, (size_t)D * sizeof *x);
    for (int k = 0; k < K; k++)
        for (int d = 0; d < D; d++) squares[k] += centroids[(size_t)k * D + d] * centroids[(size_t)k * D + d];
    ops->nearest(ops, got, scores, act(x), act(centroids), squares, N, D, K);
    for (int i = 0; i < N; i++) {
        double least = HUGE_VAL, ours = 0;
        int first = 0;
        for (int k = 0; k < K; k++) {
            double distance = 0;
            for (int d = 0; d < D; d++) distance += pow((double)x[(size_t)i * D + d] - centroids[(size_t)k * D + d], 2);
            if (distance < least) least = distance, first = k;
            if (k == got[i]) ours = distance;
        }
        CHECK(got[i] == first || fabs(ours - least) <= 1e-5 * least, "frame %d: centroid %d, the nearest is %d", i, got[i], first);
    }
    if (promised) CHECK(got[0] == 0, "of two centroids that tie, %d was taken", got[0]);
    free(x), free(centroids), free(squares), free(scores), free(got);
}

static void test_speech_ops(slam_ops *ops) {
    const slam_conv convs[] = {{1, 1, 1, 1, 1, 1, 1, 1, 0},        {2, 1, 400, 1, 80, 32, 10, 5, 1},
                               {3, 1, 80, 32, 40, 48, 3, 2, 1},    {3, 1, 41, 8, 20, 5, 2, 2, 0},
                               {2, 3, 90, 6, 83, 6, 8, 1, 1},      {1, 2, 21, 4, 15, 4, 7, 1, 0},
                               {1, 1, 4000, 16, 2000, 33, 3, 2, 1}};
    for (size_t k = 0; k < sizeof convs / sizeof *convs; k++) {
        const slam_conv c = convs[k];
        if (TEST("conv1d B %d G %d T %d C %d to T %d C %d, %d taps, stride %d%s", c.B, c.G, c.T, c.C, c.TO, c.OC, c.K, c.stride,
                 c.gelu ? ", gelu" : ""))
            test_conv1d(ops, c, 0), test_conv1d(ops, c, 1);
    }
    if (TEST("gelu")) test_gelu(ops);
    if (TEST("frames in groups, masked")) test_group_frames(ops);
    const int sizes[][2] = {{3, 5}, {7, 33}, {65, 128}, {13, 768}};
    for (int k = 0; k < 4; k++) {
        if (TEST("layernorm %d x %d", sizes[k][0], sizes[k][1]))
            test_layernorm(ops, sizes[k][0], sizes[k][1], 0), test_layernorm(ops, sizes[k][0], sizes[k][1], 1);
        if (TEST("channelnorm %d x %d", 4 * sizes[k][0], sizes[k][1])) test_channelnorm(ops, 4, 20 * sizes[k][0], sizes[k][1]);
        if (TEST("nearest centroid %d x %d", sizes[k][0], sizes[k][1])) test_nearest(ops, sizes[k][0], sizes[k][1], 10 + 40 * k);
    }
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    const shape shapes[] = {{1, 1, 1, 1, 2, 0, 0, 0},    {2, 70, 4, 2, 8, 0, 0, 0},    {1, 200, 7, 1, 16, 1, 0, 0},
                            {3, 65, 3, 3, 12, 1, 0, 0},  {2, 129, 14, 2, 64, 1, 0, 0}, {1, 64, 6, 3, 6, 0, 0, 0},
                            {1, 1, 2, 1, 4, 0, 1, 1},    {2, 150, 4, 4, 16, 0, 1, 1},  {3, 100, 6, 2, 8, 1, 1, 0},
                            {1, 65, 12, 12, 64, 0, 1, 0}};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        const shape s = shapes[k];
        if (TEST("attention B %d T %d NH %d KVH %d HS %d%s%s%s", s.B, s.T, s.NH, s.KVH, s.HS, s.holes ? " with holes" : "",
                 s.both ? " both ways" : "", s.still ? " without rotation" : ""))
            test_attention(ops, s);
    }
    const shape decoded[] = {
        {1, 1, 1, 1, 2, 0, 0, 0}, {3, 70, 4, 2, 8, 0, 0, 0}, {2, 129, 14, 2, 64, 0, 0, 0}, {5, 33, 6, 3, 6, 0, 0, 1}};
    for (size_t k = 0; k < sizeof decoded / sizeof *decoded; k++) {
        const shape s = decoded[k];
        if (TEST("attention by tokens B %d T %d NH %d KVH %d HS %d", s.B, s.T, s.NH, s.KVH, s.HS)) test_decode(ops, s);
        if (TEST("keys and values into the cache B %d T %d KVH %d HS %d", s.B, s.T, s.KVH, s.HS)) test_fill(ops, s);
    }
    const slam_sampling samplings[] = {{1, 0, 1, 1},      {0.7, 0, 1, 1},    {1.5, 5, 1, 1},    {1, 0, 0.8, 1},
                                       {0.8, 10, 0.9, 1}, {1, 0, 1, 1.3},    {0.9, 7, 0.6, 2},  {0, 0, 1, 1.2},
                                       {1, 1, 1, 1},      {1, 1000, 0.5, 1}, {3, 0, 0.999, 0.8}};
    for (size_t k = 0; k < sizeof samplings / sizeof *samplings; k++) {
        const slam_sampling s = samplings[k];
        if (!TEST("sampling: temperature %g, top-k %d, top-p %g, penalty %g", s.temperature, s.top_k, s.top_p,
                  s.repetition_penalty))
            continue;
        for (int coarse = 0; coarse < 2; coarse++) {
            test_sample(ops, 2, s, 0, coarse);
            test_sample(ops, 37, s, 1, coarse);
            test_sample(ops, 502, s, s.repetition_penalty != 1, coarse);
        }
    }
    if (TEST("sampling by hand")) test_sample_by_hand(ops);
    const int sizes[][2] = {{1, 2}, {7, 33}, {65, 128}, {130, 97}};
    for (int k = 0; k < 4; k++) {
        if (TEST("rmsnorm %d x %d", sizes[k][0], sizes[k][1])) {
            test_rmsnorm(ops, sizes[k][0], sizes[k][1], 0);
            test_rmsnorm(ops, sizes[k][0], sizes[k][1], 1);
        }
        if (TEST("matmul %d x %d", sizes[k][0], sizes[k][1])) {
            test_matmul(ops, sizes[k][0], sizes[k][1], 45, 0);
            test_matmul(ops, sizes[k][0], sizes[k][1], 130, 1);
        }
        if (TEST("swiglu %d x %d", sizes[k][0], sizes[k][1])) test_swiglu(ops, sizes[k][0], sizes[k][1]);
        if (TEST("cross-entropy %d x %d", sizes[k][0], sizes[k][1])) {
            test_crossentropy(ops, sizes[k][0], sizes[k][1], sizes[k][1], 0);
            test_crossentropy(ops, sizes[k][0], sizes[k][1], sizes[k][1] + 6, 1);
        }
        if (TEST("embedding %d x %d", sizes[k][0], sizes[k][1])) test_embedding(ops, sizes[k][0], sizes[k][1], 11);
    }
    if (TEST("AdamW")) test_adamw(ops);
    test_speech_ops(ops);
    if (promised && TEST("one thread and two give the same bits")) test_threads();
    slam_ops_free(ops);
    return check_end();
}
