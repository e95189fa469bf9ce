/* The ops of the CPU: each forward pass against its formula in double, each backward pass against finite differences of the
   formula or of the forward pass, and all of them with the same bits from one thread and from two. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

static float *zeros(size_t n) { return NEW(float, n + 1); }

/* n normal numbers of the running test's generator */
static float *normals(size_t n, double size) {
    float *x = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] = (float)(size * rng_normal(&check_state.seed));
    return x;
}

static int random_int(int n) { return (int)rng_below(&check_state.seed, (uint64_t)n); }
static slam_act *act(const float *x) { return (slam_act *)(uintptr_t)x; }

/* ---- memory, exp ---- */

static void test_memory(slam_ops *ops) {
    const size_t sizes[] = {0, 1, 1000, (size_t)5 << 20};
    for (int k = 0; k < 4; k++) {
        unsigned char *p = (unsigned char *)ops->alloc(ops, sizes[k]), any = 0;
        if (!CHECK(p, "%s", slam_error())) continue;
        CHECK((uintptr_t)p % 256 == 0, "%zu bytes at %p, expected a multiple of 256", sizes[k], (void *)p);
        for (size_t i = 0; i < sizes[k]; i++) any |= p[i];
        CHECK(any == 0, "memory is not zeroed");
        ops->release(ops, p);
    }
    ops->release(ops, NULL);
    check_fails(ops->alloc(ops, SIZE_MAX - 5), "--micro-batch");
}

static void test_exp(void) {
    double worst = 0;
    for (int i = -87000; i <= 88000; i++) {
        const float x = (float)i / 1000, y = exp_float(x);
        worst =
            fmax(worst, fabs(y / exp((double)x) - 1) / 0x1p-23); // in units of the last place of numbers just above 1
    }
    check_near("relative error / 2^-23", worst, 0, 2);
    const float limits[][2] = {{-1000, -87}, {-HUGE_VALF, -87}, {1000, 88}, {HUGE_VALF, 88}, {0, -0.0f}};
    for (int k = 0; k < 5; k++) check_near("clamped", exp_float(limits[k][0]), exp_float(limits[k][1]), 0);
    CHECK(isnan(exp_float(NAN)) && isnan(exp_float(-NAN)), "NaN must stay NaN");
}

/* ---- attention ---- */

/* Pair c of position t has the angle t theta^(-2c / HS); the table is computed in float. */
static void test_rope_table(int T, int HS, double theta) {
    slam_config c = ZERO;
    c.rope_theta = theta;
    float *table = rope_table(T, HS / 2, &c);
    for (int t = 0; t < T; t++)
        for (int c = 0; c < HS / 2; c++) {
            const double angle = t * pow(theta, -2.0 * c / HS), tolerance = 1e-7 + 5e-7 * angle;
            check_near("cosine", table[t * HS + c], cos(angle), tolerance);
            check_near("sine", table[t * HS + HS / 2 + c], sin(angle), tolerance);
        }
    free(table);
}

/* A few documents per row. Optionally with a masked span in the last document of each row, with doc_end (queries see their whole
   document), without rotation (unrotated 1) or with only the first half of each head rotated (2). */
typedef struct shape {
    int B, T, NH, KVH, HS, masked, bidirectional, unrotated;
} shape;

static slam_mask mask_new(shape s) {
    const size_t n = (size_t)s.B * s.T;
    int *doc = NEW(int, n), *end = NEW(int, n), *mask_start = NEW(int, n), *mask_end = NEW(int, n);
    for (int b = 0; b < s.B; b++) {
        int start = 0, *d = doc + b * s.T, *e = end + b * s.T;
        for (int t = 0; t < s.T; t++) {
            if (t > start && random_int(s.T / 3 + 1) == 0 && t < s.T - 8) start = t;
            d[t] = start;
        }
        for (int t = s.T - 1; t >= 0; t--) e[t] = t + 1 < s.T && d[t + 1] <= t ? e[t + 1] : t + 1;
        const int length = s.T - start;
        for (int t = start + 2 * length / 3; length >= 6 && t < s.T; t++)
            mask_start[b * s.T + t] = start + length / 3, mask_end[b * s.T + t] = start + 2 * length / 3;
    }
    slam_mask m = ZERO;
    m.B = s.B, m.T = s.T, m.NH = s.NH, m.KVH = s.KVH, m.HS = s.HS;
    m.doc_start = doc;
    if (s.bidirectional) m.doc_end = end;
    else free(end);
    if (s.masked) m.mask_start = mask_start, m.mask_end = mask_end;
    else free(mask_start), free(mask_end);
    m.pairs = s.unrotated == 1 ? 0 : s.HS / (s.unrotated ? 4 : 2);
    slam_config c = ZERO;
    c.rope_theta = 10000;
    m.rope = rope_table(s.T, m.pairs, &c);
    return m;
}

static void mask_free(slam_mask m) {
    const void *all[] = {m.doc_start, m.doc_end, m.mask_start, m.mask_end, m.rope};
    for (int k = 0; k < 5; k++) free((void *)(uintptr_t)all[k]);
}

/* out (HS) = x (HS), rotated by the position of row i of (B T) */
static void rotate_in_double(double *out, const float *x, const slam_mask *m, int i) {
    const int pairs = m->pairs;
    const int p = i % m->T - m->doc_start[i] - (m->mask_start ? m->mask_end[i] - m->mask_start[i] : 0);
    for (int c = 0; c < m->HS; c++) out[c] = x[c];
    for (int c = 0; c < pairs; c++) {
        const double cosine = m->rope[2 * p * pairs + c], sine = m->rope[(2 * p + 1) * pairs + c];
        out[c] = x[c] * cosine - x[c + pairs] * sine;
        out[c + pairs] = x[c + pairs] * cosine + x[c] * sine;
    }
}

/* Attention as the formula of section 3 says it, one query at a time. */
static void attention_in_double(double *out, const float *qkv, const slam_mask *m) {
    const int HS = m->HS, W = (m->NH + 2 * m->KVH) * HS;
    double q[256], k[256];
    for (int row = 0; row < m->B * m->T * m->NH; row++) {
        const int h = row % m->NH, i = row / m->NH, b0 = i / m->T * m->T,
                  group = h / (m->NH / m->KVH); // b0: row 0 of the sequence
        double sum = 0, *o = out + (size_t)row * HS;
        for (int c = 0; c < HS; c++) o[c] = 0;
        rotate_in_double(q, qkv + (size_t)i * W + h * HS, m, i);
        for (int j = m->doc_start[i]; j < (m->doc_end ? m->doc_end[i] : i - b0 + 1); j++) {
            if (m->mask_start && j >= m->mask_start[i] && j < m->mask_end[i]) continue;
            double s = 0;
            rotate_in_double(k, qkv + (size_t)(b0 + j) * W + (m->NH + group) * HS, m, b0 + j);
            for (int c = 0; c < HS; c++) s += q[c] * k[c];
            s = exp(s / sqrt(HS));
            sum += s;
            for (int c = 0; c < HS; c++) o[c] += s * qkv[(size_t)(b0 + j) * W + (m->NH + m->KVH + group) * HS + c];
        }
        for (int c = 0; c < HS; c++) o[c] /= sum;
    }
}

static void test_attention(slam_ops *ops, shape s) {
    slam_mask m = mask_new(s);
    const int W = (s.NH + 2 * s.KVH) * s.HS;
    const size_t N = (size_t)s.B * s.T, n = N * W, no = N * s.NH * s.HS, nl = N * s.NH;
    float *qkv = normals(n, 1), *rotated = zeros(n), *out = zeros(no), *lse = zeros(nl), *D = zeros(nl);
    float *dout = normals(no, 1), *dqkv = normals(n, 9), *expected = zeros(no), *moved = zeros(n),
          *direction = normals(n, 1);
    double *exact = NEW(double, no);
    memcpy(rotated, qkv, n * sizeof *qkv);
    ops->attention_forward(ops, act(out), lse, act(rotated), &m);
    attention_in_double(exact, qkv, &m);
    for (size_t i = 0; i < no; i++) expected[i] = (float)exact[i];
    check_close("attention forward", out, expected, no, 1e-6);
    ops->attention_backward(ops, act(dqkv), D, act(dout), act(out), lse, act(rotated), &m);
    /* the loss dout . out, in double, along random directions in q, k and v */
    const int ends[] = {0, s.NH * s.HS, (s.NH + s.KVH) * s.HS, W};
    const char *names[] = {"dq", "dk", "dv"};
    for (int part = 0; part < 3; part++) {
        double slope = 0, size = 0, loss[2] = {0, 0};
        for (int side = 0; side < 2; side++) {
            for (size_t i = 0; i < n; i++) {
                const int inside = (int)(i % W) >= ends[part] && (int)(i % W) < ends[part + 1];
                moved[i] = qkv[i] + (inside ? (side ? 1e-3f : -1e-3f) * direction[i] : 0);
                if (!inside || side) continue;
                slope += (double)dqkv[i] * direction[i];
                size += (double)dqkv[i] * dqkv[i];
            }
            attention_in_double(exact, moved, &m);
            for (size_t i = 0; i < no; i++) loss[side] += dout[i] * exact[i];
        }
        check_near(names[part], slope, (loss[1] - loss[0]) / 2e-3, 2e-4 * (sqrt(size) + 1));
    }
    free(qkv), free(rotated), free(out), free(lse), free(D), free(dout), free(dqkv), free(expected), free(exact);
    free(moved), free(direction);
    mask_free(m);
}

/* Sequences that start at different times, token by token, give the rows of the forward pass. */
static void test_decode(slam_ops *ops, shape s) {
    slam_mask m = mask_new(s);
    const int W = (s.NH + 2 * s.KVH) * s.HS, K = 2 * s.KVH * s.HS, O = s.NH * s.HS;
    const size_t N = (size_t)s.B * s.T;
    memset((void *)(uintptr_t)m.doc_start, 0, N * sizeof(int)); // one document a row
    float *qkv = normals(N * W, 1), *whole = zeros(N * W), *expected = zeros(N * O), *lse = zeros(N * s.NH);
    float *cache = zeros(N * K), *out = zeros(N * O), *row = zeros((size_t)s.B * W), *decoded = zeros((size_t)s.B * O);
    int *lengths = NEW(int, s.B), wrong = 0;
    memcpy(whole, qkv, N * W * sizeof *qkv);
    for (size_t i = 0; i < N * K; i++) cache[i] = NAN; // nothing beyond the end of a sequence may be read
    ops->attention_forward(ops, act(expected), lse, act(whole), &m);
    for (int step = 0; step < s.T + s.B - 1; step++) {
        slam_mask now = m;
        int first = 0, at[64], n = 0;
        for (int b = 0; b < s.B; b++) lengths[b] = step - b; // row b starts at step b
        while (lengths[first] >= s.T) first++;               // full rows come first
        for (int b = first; b < s.B && lengths[b] >= 0; b++, n++) {
            at[n] = lengths[b];
            memcpy(row + (size_t)n * W, qkv + ((size_t)b * s.T + at[n]) * W, W * sizeof *row);
        }
        now.B = n;
        ops->attention_decode(ops, act(decoded), act(cache + (size_t)first * s.T * K), act(row), at, &now);
        for (int i = 0; i < n; i++) {
            const size_t place = (size_t)(first + i) * s.T + at[i];
            memcpy(out + place * O, decoded + (size_t)i * O, O * sizeof *out);
            wrong += memcmp(row + (size_t)i * W, whole + place * W, W * sizeof *row) != 0;
        }
    }
    check_close("attention decode", out, expected, N * O, 1e-6);
    CHECK(wrong == 0, "%d rows are rotated differently than in the forward pass", wrong);
    free(qkv), free(whole), free(expected), free(lse), free(cache), free(out), free(row), free(decoded), free(lengths);
    mask_free(m);
}

/* Rows to the slots of the cache in reverse: what should be there is, everything else is untouched. */
static void test_fill(slam_ops *ops, shape s) {
    slam_mask m = mask_new(s);
    const int O = s.NH * s.HS, K = 2 * s.KVH * s.HS, capacity = s.T + 3;
    const size_t n = (size_t)(s.B + 1) * capacity * K;
    float *qkv = normals((size_t)s.B * s.T * (O + K), 1), *cache = zeros(n);
    int slots[64], lengths[64], wrong = 0;
    for (size_t i = 0; i < n; i++) cache[i] = NAN;
    for (int b = 0; b < s.B; b++) slots[b] = s.B - b, lengths[b] = b == 1 ? 0 : s.T - b;
    ops->attention_fill(ops, act(cache), act(qkv), slots, lengths, capacity, &m);
    for (int slot = 0; slot <= s.B; slot++)
        for (int t = 0; t < capacity; t++) {
            const int b = s.B - slot, filled = slot > 0 && t < lengths[b];
            const float *got = cache + ((size_t)slot * capacity + t) * K;
            for (int c = 0; c < K; c++)
                wrong += filled ? got[c] != qkv[((size_t)b * s.T + t) * (O + K) + O + c] : got[c] == got[c];
        }
    CHECK(wrong == 0, "%d numbers of the cache are wrong", wrong);
    free(qkv), free(cache);
    mask_free(m);
}

/* ---- finite differences: sum(dout * op(x)) changes by gradient . direction ---- */

typedef struct problem {
    slam_ops *ops;
    int N, G, C, OC, stride;
    float *in[3], *out, *dout, *s, *rstd;
    size_t n_in[3], n_out;
    void (*forward)(struct problem *);
} problem;

static void problem_free(problem *p) {
    for (int k = 0; k < 3; k++) free(p->in[k]);
    free(p->out), free(p->dout), free(p->s), free(p->rstd);
}

/* Compares the slope of the loss along random directions in input k, by central differences, with that of `gradient`. */
static void check_gradient(const char *what, problem *p, int k, const float *gradient, double step) {
    float *kept = p->in[k];
    for (int trial = 0; trial < 3; trial++) {
        float *direction = normals(p->n_in[k], 1), *moved = zeros(p->n_in[k]);
        double slope = 0, size = 0, loss[2] = {0, 0};
        for (int side = 0; side < 2; side++) {
            for (size_t i = 0; i < p->n_in[k]; i++) moved[i] = kept[i] + (float)(side ? step : -step) * direction[i];
            p->in[k] = moved;
            p->forward(p);
            for (size_t i = 0; i < p->n_out; i++) loss[side] += (double)p->dout[i] * p->out[i];
        }
        p->in[k] = kept;
        for (size_t i = 0; i < p->n_in[k]; i++) {
            slope += (double)gradient[i] * direction[i];
            size += (double)gradient[i] * gradient[i];
        }
        check_near(what, slope, (loss[1] - loss[0]) / (2 * step), 2e-3 * sqrt(size) + 1e-4);
        free(direction), free(moved);
    }
}

/* in: x, w, delta or NULL */
static void rmsnorm_run(problem *p) {
    rmsnorm_forward(p->ops, p->s, p->out, p->rstd, p->in[0], p->in[2], p->in[1], p->N, 1, p->C, p->C);
}

static void test_rmsnorm(slam_ops *ops, int N, int C, int with_delta) {
    const size_t n = (size_t)N * C;
    problem p = ZERO;
    p.ops = ops, p.N = N, p.C = C, p.forward = rmsnorm_run;
    p.in[0] = normals(n, 1), p.in[1] = normals(C, 1), p.in[2] = with_delta ? normals(n, 1) : NULL;
    p.n_in[0] = p.n_in[2] = p.n_out = n, p.n_in[1] = C;
    p.out = zeros(n), p.dout = normals(n, 1), p.s = zeros(n), p.rstd = zeros(N);
    rmsnorm_run(&p);
    float *expected = zeros(n), *ds = normals(n, 1), *dw = normals(C, 1), *before = zeros(n + C);
    for (int i = 0; i < N; i++) {
        double sum = 0, s;
        for (int pass = 0; pass < 2; pass++)
            for (int c = 0; c < C; c++) {
                s = p.in[0][i * C + c] + (with_delta ? (double)p.in[2][i * C + c] : 0);
                if (pass == 0) sum += s * s;
                else expected[i * C + c] = (float)(p.in[1][c] * s / sqrt(sum / C + 1e-6));
            }
    }
    check_close("rmsnorm forward", p.out, expected, n, 1e-6);
    memcpy(before, ds, n * sizeof *ds);
    memcpy(before + n, dw, C * sizeof *dw);
    rmsnorm_backward(ops, ds, dw, p.dout, with_delta ? p.s : p.in[0], p.in[1], p.rstd, N, 1, C, C);
    for (size_t i = 0; i < n; i++) ds[i] -= before[i]; // both gradients add
    for (int c = 0; c < C; c++) dw[c] -= before[n + c];
    check_gradient("dx", &p, 0, ds, 1e-2);
    check_gradient("dw", &p, 1, dw, 1e-2);
    if (with_delta) check_gradient("ddelta", &p, 2, ds, 1e-2);
    problem_free(&p);
    free(expected), free(ds), free(dw), free(before);
}

/* The groups of x, N of `width` numbers, `stride` apart, without what lies between them. */
static float *gather(const float *x, int N, int width, int stride) {
    float *dense = zeros((size_t)N * width);
    for (int i = 0; i < N; i++) memcpy(dense + (size_t)i * width, x + (size_t)i * stride, width * sizeof *x);
    return dense;
}

/* How many numbers of x are not those of `dense` within groups, or not those of `before` between them. */
static int misplaced(const float *x, const float *before, const float *dense, int N, int width, int stride) {
    int wrong = 0;
    for (int i = 0; i < N; i++) {
        const float *xi = x + (size_t)i * stride, *gap = before + (size_t)i * stride + width;
        wrong += memcmp(xi, dense + (size_t)i * width, width * sizeof *x) != 0;
        wrong += memcmp(xi + width, gap, (stride - width) * sizeof *x) != 0;
    }
    return wrong;
}

/* Groups of rows within wider rows give the same bits as a matrix of these rows, and what lies between them stays. */
static void test_rmsnorm_groups(slam_ops *ops, int N, int G, int C, int gap, int with_delta) {
    const int width = G * C, stride = width + gap;
    const size_t n = (size_t)N * stride, rows = (size_t)N * G;
    float *x = normals(n, 1), *delta = normals(n, 1), *dy = normals(n, 1), *y = normals(n, 1), *s = normals(n, 1),
          *ds = normals(n, 1);
    float *before[] = {gather(x, 1, (int)n, 0), gather(y, 1, (int)n, 0), gather(s, 1, (int)n, 0),
                       gather(ds, 1, (int)n, 0)};
    float *x1 = gather(x, N, width, stride), *delta1 = gather(delta, N, width, stride),
          *dy1 = gather(dy, N, width, stride);
    float *ds1 = gather(ds, N, width, stride), *y1 = zeros(rows * C), *s1 = zeros(rows * C), *w = normals(C, 1);
    float *rstd = zeros(rows), *rstd1 = zeros(rows), *dw = zeros(C), *dw1 = zeros(C);
    const slam_act *d = with_delta ? act(delta) : NULL, *d1 = with_delta ? act(delta1) : NULL;
    rmsnorm_forward(ops, s1, y1, rstd1, x1, d1, w, N * G, 1, C, C);
    rmsnorm_backward(ops, ds1, dw1, dy1, d ? s1 : x1, w, rstd1, N * G, 1, C, C);
    rmsnorm_forward(ops, s, y, rstd, x, d, w, N, G, C, stride);
    rmsnorm_backward(ops, ds, dw, dy, d ? s : x, w, rstd, N, G, C, stride);
    CHECK(memcmp(rstd, rstd1, rows * sizeof *rstd) == 0, "rstd differs");
    CHECK(misplaced(y, before[1], y1, N, width, stride) == 0, "y differs");
    if (d) CHECK(misplaced(s, before[2], s1, N, width, stride) == 0, "s differs");
    else CHECK(memcmp(s, before[2], n * sizeof *s) == 0, "s is written without delta");
    CHECK(misplaced(ds, before[3], ds1, N, width, stride) == 0, "ds differs");
    check_close("dw", dw, dw1, C, 1e-6);
    rmsnorm_forward(ops, s, x, rstd, x, d, w, N, G, C, stride);
    CHECK(misplaced(x, before[0], y1, N, width, stride) == 0, "y in place of x differs");
    memset(ds1, 0, rows * C * sizeof *ds1); // nothing else reaches s: as with zeros in ds
    memset(dw, 0, C * sizeof *dw), memset(dw1, 0, C * sizeof *dw);
    float *between = gather(dy, 1, (int)n, 0);
    rmsnorm_backward(ops, ds1, dw1, dy1, d ? s1 : x1, w, rstd1, N * G, 1, C, C);
    rmsnorm_backward(ops, dy, dw, dy, d ? s : before[0], w, rstd, N, G, C, stride);
    CHECK(misplaced(dy, between, ds1, N, width, stride) == 0, "ds in place of dy differs");
    check_close("dw in place", dw, dw1, C, 1e-6);
    free(between);
    for (int k = 0; k < 4; k++) free(before[k]);
    free(x), free(delta), free(dy), free(y), free(s), free(ds), free(x1), free(delta1), free(dy1), free(ds1), free(y1),
        free(s1);
    free(w), free(rstd), free(rstd1), free(dw), free(dw1);
}

/* in: x, w, b or NULL */
static void matmul_run(problem *p) { matmul_forward(p->ops, p->out, p->in[0], p->in[1], p->in[2], p->N, p->C, p->OC); }

static void test_matmul(slam_ops *ops, int N, int C, int OC, int bias) {
    problem p = ZERO;
    p.ops = ops, p.N = N, p.C = C, p.OC = OC, p.forward = matmul_run;
    p.n_in[0] = (size_t)N * C, p.n_in[1] = (size_t)OC * C, p.n_in[2] = OC, p.n_out = (size_t)N * OC;
    for (int k = 0; k < 3; k++) p.in[k] = k < 2 || bias ? normals(p.n_in[k], 1) : NULL;
    p.out = zeros(p.n_out), p.dout = normals(p.n_out, 1);
    for (size_t i = 0; i < p.n_out; i++) p.out[i] = NAN; // overwritten, not added to
    matmul_run(&p);
    float *expected = zeros(p.n_out), *dx = zeros(p.n_in[0]), *dw = zeros(p.n_in[1]), *twice = zeros(p.n_in[1]),
          *db = zeros(OC);
    for (int i = 0; i < N; i++)
        for (int o = 0; o < OC; o++) {
            double sum = bias ? p.in[2][o] : 0;
            for (int c = 0; c < C; c++) sum += (double)p.in[0][i * C + c] * p.in[1][o * C + c];
            expected[i * OC + o] = (float)sum;
        }
    check_close("matmul forward", p.out, expected, p.n_out, 1e-6);
    for (size_t i = 0; i < p.n_in[0]; i++) dx[i] = NAN;
    matmul_backward_input(ops, dx, p.dout, p.in[1], N, C, OC);
    matmul_backward_weight(ops, dw, bias ? db : NULL, p.dout, p.in[0], N, C, OC);
    check_gradient("dx", &p, 0, dx, 1e-1);
    check_gradient("dw", &p, 1, dw, 1e-1);
    if (bias) check_gradient("db", &p, 2, db, 1e-1);
    memcpy(twice, dw, p.n_in[1] * sizeof *dw);
    matmul_backward_weight(ops, twice, NULL, p.dout, p.in[0], N, C, OC);
    for (size_t i = 0; i < p.n_in[1]; i++) dw[i] *= 2;
    check_close("dw adds", twice, dw, p.n_in[1], 1e-6);
    problem_free(&p);
    free(expected), free(dx), free(dw), free(db), free(twice);
}

static void swiglu_run(problem *p) { p->ops->swiglu_forward(p->ops, act(p->out), act(p->in[0]), p->N, p->C); }

static void test_swiglu(slam_ops *ops, int N, int F) {
    problem p = ZERO;
    p.ops = ops, p.N = N, p.C = F, p.forward = swiglu_run;
    p.n_in[0] = 2 * (size_t)N * F, p.n_out = (size_t)N * F;
    p.in[0] = normals(p.n_in[0], 2), p.out = zeros(p.n_out), p.dout = normals(p.n_out, 1);
    p.in[0][0] = 200, p.in[0][1] = -200; // sigmoid at its limits
    swiglu_run(&p);
    float *expected = zeros(p.n_out), *in_place = zeros(p.n_in[0]), *d = zeros(p.n_in[0]);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < F; c++) {
            const double g = p.in[0][2 * i * F + c], u = p.in[0][2 * i * F + F + c];
            expected[i * F + c] = (float)(g / (1 + exp(-g)) * u);
        }
    check_close("swiglu forward", p.out, expected, p.n_out, 1e-6);
    for (int pass = 0; pass < 2; pass++) {
        if (pass) p.in[0][0] = p.in[0][1] = 1; // differences need a slope
        memcpy(in_place, p.in[0], p.n_in[0] * sizeof *d);
        ops->swiglu_backward(ops, act(d), act(p.dout), act(p.in[0]), N, F);
        ops->swiglu_backward(ops, act(in_place), act(p.dout), act(in_place), N, F); // as the model does
        CHECK(memcmp(d, in_place, p.n_in[0] * sizeof *d) == 0, "in place differs");
        CHECK(isfinite(d[0]) && isfinite(d[1]), "gradients at gates of +-200: %g, %g", (double)d[0], (double)d[1]);
    }
    check_gradient("dgate_up", &p, 0, d, 1e-2);
    problem_free(&p);
    free(expected), free(in_place), free(d);
}

/* ---- cross-entropy, embedding, sums, AdamW: against their formulas in double ---- */

/* Rows are `stride` apart; the padding behind V logits holds far larger numbers. */
static void test_crossentropy(slam_ops *ops, int N, int V, int stride, int weighted) {
    const size_t n = (size_t)N * stride;
    float *z = normals(n, 3), *before = zeros(n), *loss = normals(N, 1), *expected = zeros(n),
          *expected_loss = zeros(N);
    float *weights = normals(N, 1);
    int *targets = NEW(int, N);
    if (weighted) weights[0] = 0;
    for (int i = 0; i < N; i++) {
        float *zi = z + (size_t)i * stride;
        const double weight = 0.25 * (weighted ? weights[i] : 1);
        double sum = 0;
        targets[i] = i % 5 == 1 ? -1 : random_int(V);
        if (i % 7 == 3) zi[0] = 300; // one logit far above
        for (int v = V; v < stride; v++) zi[v] = 1e4f;
        for (int v = 0; v < V; v++) sum += exp((double)zi[v] - 300);
        for (int v = 0; v < V && targets[i] >= 0; v++)
            expected[i * stride + v] = (float)(weight * (exp((double)zi[v] - 300) / sum - (v == targets[i])));
        expected_loss[i] = targets[i] < 0 ? 0 : (float)(log(sum) + 300 - (double)zi[targets[i]]);
    }
    memcpy(before, z, n * sizeof *z);
    for (int pass = 0; pass < 2; pass++) {
        const slam_xent x = xent(N, V, stride, pass ? 0.25f : 0, weighted ? weights : NULL);
        ops->crossentropy(ops, loss, act(z), targets, &x);
        for (int i = 0; i < N; i++) // a loss may be almost 0
            check_near("a loss", loss[i], expected_loss[i], 1e-6 * (1 + expected_loss[i]));
        if (pass == 0) CHECK(memcmp(z, before, n * sizeof *z) == 0, "with scale 0 the logits stay");
    }
    check_close("dlogits", z, expected, n, 2e-6);
    z[0] = NAN, targets[0] = V - 1;
    const slam_xent one = xent(1, V, stride, 0, NULL);
    ops->crossentropy(ops, loss, act(z), targets, &one);
    CHECK(isnan(loss[0]), "the loss of a NaN is %g", loss[0]);
    free(z), free(before), free(loss), free(expected), free(expected_loss), free(weights), free(targets);
}

static void test_embedding(slam_ops *ops, int N, int C, int V) {
    const size_t n = (size_t)V * C;
    float *table = normals(n, 1), *x = zeros((size_t)N * C), *dx = normals((size_t)N * C, 1), *d = normals(n, 1),
          *expected = zeros(n);
    int *tokens = NEW(int, N), wrong = 0;
    memcpy(expected, d, n * sizeof *d);
    for (int i = 0; i < N; i++) tokens[i] = random_int(V);
    ops->embedding_forward(ops, act(x), tokens, act(table), N, C);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < C; c++) {
            wrong += x[i * C + c] != table[tokens[i] * C + c];
            expected[tokens[i] * C + c] += dx[i * C + c];
        }
    CHECK(wrong == 0, "%d numbers are not those of the table", wrong);
    ops->embedding_backward(ops, d, act(dx), tokens, N, C, V);
    check_close("dtable", d, expected, n, 0);
    free(table), free(x), free(dx), free(d), free(expected), free(tokens);
}

static void test_sums(slam_ops *ops) {
    const size_t sizes[] = {0, 1, 255, 256, 1000, 100003};
    for (int k = 0; k < 6; k++) {
        float *x = normals(sizes[k], 1);
        double sum = 1, squares = 2, got[2] = {1, 2}; // both add
        for (size_t i = 0; i < sizes[k]; i++) sum += x[i], squares += (double)x[i] * x[i];
        ops->sum(ops, got, x, sizes[k]);
        ops->sum_squares(ops, got + 1, x, sizes[k]);
        check_near("sum", got[0], sum, 1e-12 * squares);
        check_near("sum of squares", got[1], squares, 1e-12 * squares);
        free(x);
    }
}

static void test_adamw(slam_ops *ops) {
    enum { N = 1000 };
    float *w = normals(N, 1), *g = normals(N, 1), *m = zeros(N), *v = zeros(N), *w_act = zeros(N), expected[N];
    double W[N], M[N] = ZERO, U[N] = ZERO;
    for (int i = 0; i < N; i++) W[i] = w[i];
    for (int step = 1; step <= 3; step++) {
        const slam_adamw_params h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, step};
        double stats[2] = {1, 0};
        for (int i = 0; i < N; i++) stats[1] += (double)g[i] * g[i];
        ops->adamw(ops, act(step == 3 ? w_act : w), w, m, v, g, stats, &h, N);
        for (int i = 0; i < N; i++) {
            const double gi = g[i] * 0.5 / (sqrt(stats[1]) + 1e-6);
            M[i] = 0.9 * M[i] + 0.1 * gi, U[i] = 0.999 * U[i] + 0.001 * gi * gi;
            W[i] =
                W[i] * (1 - 1e-3) - 1e-2 * (M[i] / (1 - pow(0.9, step))) / (sqrt(U[i] / (1 - pow(0.999, step))) + 1e-8);
            expected[i] = (float)W[i];
            g[i] = g[i] * 0.7f - 0.1f;
        }
    }
    check_close("weights after 3 updates", w, expected, N, 1e-6);
    CHECK(memcmp(w, w_act, N * sizeof *w) == 0, "w_act is not w");
    const slam_adamw_params h = {1e-2, 0.9, 0.999, 1e-8, 0.1, 0.5, 4};
    const double bad[][2] = {{NAN, 1}, {1, INFINITY}, {1, NAN}};
    for (int k = 0; k < 3; k++) ops->adamw(ops, act(w), w, m, v, g, bad[k], &h, N);
    CHECK(memcmp(w, w_act, N * sizeof *w) == 0, "an update whose loss or norm is not finite must change nothing");
    free(w), free(g), free(m), free(v), free(w_act);
}

/* ---- what speech encoders need: against the formulas in double ---- */

static double gelu_in_double(double x) { return x * 0.5 * erfc(-x / sqrt(2)); }

static void test_gelu(slam_ops *ops) {
    enum { N = 20001 };
    float *x = zeros(N), *y = zeros(N);
    double worst = 0;
    for (int i = 0; i < N; i++) x[i] = (float)(i - N / 2) * 1e-3f;
    ops->gelu_forward(ops, act(y), act(x), N);
    for (int i = 0; i < N; i++) {
        const double exact = gelu_in_double(x[i]), error = fabs(y[i] - exact);
        check_near("gelu", y[i], exact, 1e-6 * fabs(exact) + 1e-9);
        if (fabs(x[i]) < 5) worst = fmax(worst, error / (fabs(exact) + 1e-30));
    }
    check_near("worst relative error up to |x| = 5", worst, 0, 2e-6);
    ops->gelu_forward(ops, act(x), act(x), N);
    CHECK(memcmp(x, y, N * sizeof *x) == 0, "in place differs");
    x[0] = NAN, x[1] = 1e30f, x[2] = -1e30f;
    ops->gelu_forward(ops, act(y), act(x), 3);
    CHECK(isnan(y[0]) && y[1] == 1e30f && fabsf(y[2]) < 1e-6f, "gelu of NaN, 1e30, -1e30 is %g, %g, %g", y[0], y[1],
          y[2]);
    free(x), free(y);
}

static void test_leaky_relu(slam_ops *ops) {
    enum { N = 1003 };
    float *x = normals(N, 1), *y = zeros(N);
    x[5] = NAN, x[6] = -INFINITY, x[7] = 0;
    ops->leaky_relu(ops, act(y), act(x), 0.1f, N);
    for (int i = 0; i < N; i++)
        if (i != 5) CHECK(y[i] == (x[i] > 0 ? x[i] : 0.1f * x[i]), "leaky ReLU of %g is %g", x[i], y[i]);
    CHECK(isnan(y[5]), "leaky ReLU of NaN is %g", y[5]);
    ops->leaky_relu(ops, act(x), act(x), 0.1f, N);
    CHECK(!memcmp(x + 6, y + 6, (N - 6) * sizeof *x), "in place differs");
    free(x), free(y);
}

/* x has space for what is read past the end of a row. */
static void test_conv1d(slam_ops *ops, slam_conv c, int bias) {
    const size_t nx = (size_t)(c.B * c.G * c.T + c.TO * c.stride + c.K * c.dilation) * c.C,
                 nw = (size_t)c.G * c.OC * c.K * c.C;
    const size_t no = (size_t)c.B * c.TO * c.G * c.OC;
    float *x = normals(nx, 1), *w = normals(nw, 0.5), *b = normals((size_t)c.G * c.OC, 1), *out = normals(no, 9);
    float *expected = zeros(no);
    for (size_t i = 0; i < no; i++) {
        const int o = (int)(i % (c.G * c.OC)), t = (int)(i / (c.G * c.OC) % c.TO), r = (int)(i / (c.G * c.OC) / c.TO);
        double sum = bias ? b[o] : 0;
        for (int k = 0; k < c.K * c.C; k++) {
            const int frame = (r * c.G + o / c.OC) * c.T + t * c.stride + k / c.C * c.dilation;
            sum += (double)x[(size_t)frame * c.C + k % c.C] * w[(size_t)o * c.K * c.C + k];
        }
        expected[i] = (float)(c.gelu ? gelu_in_double(sum) : sum);
    }
    ops->conv1d(ops, act(out), act(x), act(w), bias ? act(b) : NULL, &c);
    check_close("conv1d", out, expected, no, 1e-6);
    free(x), free(w), free(b), free(out), free(expected);
}

static void test_group_frames(slam_ops *ops) {
    enum { B = 3, T = 7, C = 6, G = 2, TO = 11, BEFORE = 3 };
    const int lengths[B] = {7, 0, 4};
    float *x = normals(B * T * C, 1), *out = normals(B * TO * C, 1), *scale = normals(C, 1), *shift = normals(C, 1);
    for (int with = 0; with < 4; with++) { // bit 0: scale, bit 1: shift
        ops->group_frames(ops, act(out), act(x), lengths, with & 1 ? act(scale) : NULL, with & 2 ? act(shift) : NULL,
                          BEFORE, B, T, TO, C, G);
        for (int i = 0; i < B * TO * C; i++) {
            const int row = i / (C / G), c = i % (C / G) + row / TO % G * (C / G), t = row % TO - BEFORE,
                      b = row / TO / G;
            const int inside = t >= 0 && t < lengths[b];
            const double y =
                inside ? x[(b * T + t) * C + c] * (with & 1 ? scale[c] : 1) + (with & 2 ? shift[c] : 0) : 0;
            check_near("group_frames", out[i], y, 1e-6);
        }
    }
    ops->mask_frames(ops, act(x), lengths, B, T, C);
    for (int i = 0; i < B * T * C; i++)
        CHECK((x[i] == 0) == (i / C % T >= lengths[i / C / T]), "mask_frames: number %d is %g", i, x[i]);
    free(x), free(out), free(scale), free(shift);
}

static void test_layernorm(slam_ops *ops, int N, int C, int gelu) {
    const size_t n = (size_t)N * C;
    float *x = normals(n, 2), *delta = normals(n, 1), *w = normals(C, 1), *b = normals(C, 1), *s = zeros(n),
          *y = zeros(n);
    float *expected = zeros(n), *sum = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] += 3;
    for (int with = 0; with < 2; with++) {
        for (int i = 0; i < N; i++) {
            float *si = sum + (size_t)i * C;
            double mean = 0, var = 0;
            for (int c = 0; c < C; c++) si[c] = x[(size_t)i * C + c] + (with ? delta[(size_t)i * C + c] : 0);
            for (int c = 0; c < C; c++) mean += si[c] / (double)C;
            for (int c = 0; c < C; c++) var += pow(si[c] - mean, 2) / C;
            for (int c = 0; c < C; c++) {
                const double out = (si[c] - mean) / sqrt(var + 1e-5) * w[c] + b[c];
                expected[(size_t)i * C + c] = (float)(gelu ? gelu_in_double(out) : out);
            }
        }
        layernorm(ops, with ? s : NULL, y, x, with ? delta : NULL, w, b, gelu, N, C);
        check_close("layernorm", y, expected, n, 1e-6);
        if (with) CHECK(memcmp(s, sum, n * sizeof *s) == 0, "s is not the sum");
    }
    layernorm(ops, y, NULL, x, delta, NULL, NULL, 0, N, C);
    CHECK(memcmp(y, sum, n * sizeof *s) == 0, "s alone is not the sum");
    layernorm(ops, NULL, x, x, delta, w, b, gelu, N, C);
    check_close("layernorm in place", x, expected, n, 1e-6);
    free(x), free(delta), free(w), free(b), free(s), free(y), free(expected), free(sum);
}

static void test_channelnorm(slam_ops *ops, int T, int C, double mean_of_x) {
    enum { B = 4 };
    const size_t row = (size_t)T * C, n = B * row;
    const int lengths[B] = {T - random_int(T), 1, 0, T - random_int(T)};
    float *x = normals(n, 2), *w = normals(C, 1), *bias = normals(C, 1), *expected = zeros(n), *alone = zeros(n);
    for (size_t i = 0; i < n; i++) x[i] += (float)mean_of_x;
    memcpy(alone, x, n * sizeof *x);
    for (int k = 0; k < B * C; k++) {
        const int length = lengths[k / C], c = k % C;
        const float *xk = x + k / C * row + c;
        double mean = 0, var = 0;
        for (int t = 0; t < length; t++) mean += xk[(size_t)t * C] / (double)length;
        for (int t = 0; t < length; t++) var += pow(xk[(size_t)t * C] - mean, 2) / length;
        for (int t = 0; t < length; t++)
            expected[k / C * row + (size_t)t * C + c] =
                (float)gelu_in_double((xk[(size_t)t * C] - mean) / sqrt(var + 1e-5) * w[c] + bias[c]);
    }
    ops->channelnorm(ops, act(x), act(w), act(bias), lengths, 1e-5f, B, T, C);
    check_close("channelnorm", x, expected, n, mean_of_x > 10 ? 2e-5 : 1e-6);
    for (int b = 0; b < B; b++) { // the same frames in a batch of their own
        float *a = alone + b * row;
        if (lengths[b]) ops->channelnorm(ops, act(a), act(w), act(bias), &lengths[b], 1e-5f, 1, lengths[b], C);
        CHECK(memcmp(a, x + b * row, sizeof *x * (size_t)lengths[b] * C) == 0, "row %d differs when it is alone", b);
    }
    free(x), free(w), free(bias), free(expected), free(alone);
}

static void test_nearest(slam_ops *ops, int N, int D, int K) {
    float *x = normals((size_t)N * D, 1), *centroids = normals((size_t)K * D, 1), *squares = zeros(K),
          *scores = zeros((size_t)N * K);
    int *got = NEW(int, N);
    memcpy(centroids + (size_t)(K - 1) * D, centroids, (size_t)D * sizeof *x); // the first and the last are equal
    memcpy(x, centroids, (size_t)D * sizeof *x);
    for (int i = 0; i < K * D; i++) squares[i / D] += centroids[i] * centroids[i];
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
        CHECK(got[i] == first || fabs(ours - least) <= 1e-5 * least, "frame %d: centroid %d, the nearest is %d", i,
              got[i], first);
    }
    if (GEMM_IS_OURS) CHECK(got[0] == 0, "of two equal centroids, number %d was taken", got[0]);
    free(x), free(centroids), free(squares), free(scores), free(got);
}

/* ---- threads ---- */

/* All ops whose sums or tasks are divided among threads, with one and with two: the same bits. */
static void test_threads(void) {
    enum { N = 150, C = 96, F = 200, V = 77, W = 160 };
    const shape s = {2, 75, 6, 2, 16, 1, 0, 0};
    const slam_conv c = {2, 2, N / 2, C / 2, N / 2 - 4, 24, 5, 1, 1, 1};
    const slam_xent x4 = xent(N, V, V, 1, NULL);
    const int lengths[] = {70, 75};
    const size_t sizes[] = {N * F, C * F, F,     N * C, N * C,  N * C, C, N * C,
                            N * W, N * V, N * F, V * C, N * 48, N * C, 4, N};
    enum { PARTS = sizeof sizes / sizeof *sizes };
    float *result[2][PARTS];
    const uint64_t seed = check_state.seed;
    for (int run = 0; run < 2; run++) {
        slam_ops *ops = slam_cpu(run + 1);
        float **r = result[run];
        check_state.seed = seed;
        slam_mask m = mask_new(s);
        float *x = normals(N * C, 1), *w = normals(C * F, 1), *wide = normals(2 * N * F, 1), *qkv = normals(N * W, 1);
        float *rstd = zeros(N), *lse = zeros(N * 6), *D = zeros(N * 6), *losses = zeros(N), *scores = zeros(N * F);
        int tokens[N], nearest[N];
        for (int i = 0; i < N; i++) tokens[i] = random_int(V);
        for (int k = 0; k < PARTS; k++) r[k] = normals(sizes[k], 1);
        matmul_forward(ops, r[0], x, w, NULL, N, C, F);
        matmul_backward_weight(ops, r[1], r[2], wide, x, N, C, F);
        rmsnorm_forward(ops, r[3], r[4], rstd, x, x, w, N, 1, C, C);
        rmsnorm_backward(ops, r[5], r[6], r[4], x, w, rstd, N, 1, C, C);
        ops->attention_forward(ops, act(r[7]), lse, act(qkv), &m);
        ops->attention_backward(ops, act(r[8]), D, act(x), act(r[7]), lse, act(qkv), &m);
        ops->crossentropy(ops, losses, act(r[9]), tokens, &x4);
        ops->swiglu_forward(ops, act(r[10]), act(wide), N, F);
        ops->embedding_backward(ops, r[11], act(x), tokens, N, C, V);
        ops->conv1d(ops, act(r[12]), act(wide), act(w), NULL, &c);
        ops->channelnorm(ops, act(r[13]), act(w), act(x), lengths, 1e-5f, 2, N / 2, C);
        ops->sum_squares(ops, (double *)(void *)r[14], x, N * C);
        ops->nearest(ops, nearest, scores, act(x), act(w), wide, N, C, F);
        for (int i = 0; i < N; i++) r[15][i] = (float)nearest[i] + losses[i];
        free(x), free(w), free(wide), free(qkv), free(rstd), free(lse), free(D), free(losses), free(scores);
        mask_free(m);
        slam_ops_free(ops);
    }
    for (int k = 0; k < PARTS; k++) {
        CHECK(memcmp(result[0][k], result[1][k], sizes[k] * sizeof(float)) == 0,
              "result %d depends on the number of threads", k);
        free(result[0][k]), free(result[1][k]);
    }
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    if (TEST("memory")) test_memory(ops);
    if (TEST("exp")) test_exp();
    if (TEST("rotary table"))
        test_rope_table(2048, 64, 1e4), test_rope_table(300, 128, 1e6), test_rope_table(100, 12, 500);
    const shape shapes[] = {{1, 1, 1, 1, 2, 0, 0, 0},     {2, 70, 4, 2, 8, 0, 0, 0},    {1, 200, 7, 1, 16, 1, 0, 0},
                            {3, 65, 3, 3, 12, 1, 0, 0},   {2, 129, 14, 2, 64, 1, 0, 0}, {1, 64, 6, 3, 6, 0, 0, 0},
                            {1, 1, 2, 1, 4, 0, 1, 1},     {2, 150, 4, 4, 16, 0, 1, 1},  {3, 100, 6, 2, 8, 1, 1, 0},
                            {1, 65, 12, 12, 64, 0, 1, 0}, {2, 70, 4, 2, 12, 1, 0, 2}};
    const char *const rotations[] = {"", ", without rotation", ", the first half of a head rotated"};
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
        const shape s = shapes[k];
        if (TEST("attention B %d T %d NH %d KVH %d HS %d%s%s%s", s.B, s.T, s.NH, s.KVH, s.HS,
                 s.masked ? ", masked spans" : "", s.bidirectional ? ", bidirectional" : "", rotations[s.unrotated]))
            test_attention(ops, s);
    }
    const shape decoded[] = {{1, 1, 1, 1, 2, 0, 0, 0},
                             {3, 70, 4, 2, 8, 0, 0, 0},
                             {2, 129, 14, 2, 64, 0, 0, 0},
                             {5, 33, 6, 3, 6, 0, 0, 1},
                             {2, 40, 4, 2, 8, 0, 0, 2}};
    for (size_t k = 0; k < sizeof decoded / sizeof *decoded; k++) {
        const shape s = decoded[k];
        if (TEST("attention decode B %d T %d NH %d KVH %d HS %d", s.B, s.T, s.NH, s.KVH, s.HS)) test_decode(ops, s);
        if (TEST("attention fill B %d T %d KVH %d HS %d", s.B, s.T, s.KVH, s.HS)) test_fill(ops, s);
    }
    const int sizes[][2] = {{1, 2}, {7, 33}, {65, 128}, {130, 97}};
    for (int k = 0; k < 4; k++) {
        const int n = sizes[k][0], c = sizes[k][1];
        if (TEST("rmsnorm %d x %d", n, c)) test_rmsnorm(ops, n, c, 0), test_rmsnorm(ops, n, c, 1);
        if (TEST("rmsnorm %d groups of %d x %d", n, 1 + 3 * k, c))
            test_rmsnorm_groups(ops, n, 1 + 3 * k, c, 7 * k, 0), test_rmsnorm_groups(ops, n, 1 + 3 * k, c, 7 * k, 1);
        if (TEST("matmul %d x %d", n, c)) test_matmul(ops, n, c, 45, 0), test_matmul(ops, n, c, 130, 1);
        if (TEST("swiglu %d x %d", n, c)) test_swiglu(ops, n, c);
        if (TEST("cross-entropy %d x %d", n, c))
            test_crossentropy(ops, n, c, c, 0), test_crossentropy(ops, n, c, c + 6, 1);
        if (TEST("embedding %d x %d", n, c)) test_embedding(ops, n, c, 11);
    }
    if (TEST("rmsnorm of heads: 70 groups of 14 x 64")) test_rmsnorm_groups(ops, 70, 14, 64, 256, 0);
    if (TEST("sums")) test_sums(ops);
    if (TEST("AdamW")) test_adamw(ops);
    const slam_conv convs[] = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 0},         {2, 1, 400, 1, 80, 32, 10, 5, 1, 1},
                               {3, 1, 80, 32, 40, 48, 3, 2, 1, 1},     {3, 1, 41, 8, 20, 5, 2, 2, 1, 0},
                               {2, 3, 90, 6, 83, 6, 8, 1, 1, 1},       {1, 2, 21, 4, 15, 4, 7, 1, 1, 0},
                               {1, 1, 4000, 16, 2000, 33, 3, 2, 1, 1}, {1, 1, 60, 8, 50, 8, 3, 1, 5, 0},
                               {2, 2, 60, 5, 20, 7, 4, 2, 3, 1},       {2, 1, 24, 6, 12, 3, 2, 2, 12, 0},
                               {1, 1, 3000, 16, 2950, 16, 11, 1, 5, 0}};
    for (size_t k = 0; k < sizeof convs / sizeof *convs; k++) {
        const slam_conv c = convs[k];
        if (TEST("conv1d B %d G %d T %d C %d, TO %d OC %d, K %d stride %d dilation %d%s", c.B, c.G, c.T, c.C, c.TO,
                 c.OC, c.K, c.stride, c.dilation, c.gelu ? ", gelu" : ""))
            test_conv1d(ops, c, 0), test_conv1d(ops, c, 1);
    }
    if (TEST("gelu")) test_gelu(ops);
    if (TEST("leaky relu")) test_leaky_relu(ops);
    if (TEST("group_frames, mask_frames")) test_group_frames(ops);
    const int encoder[][2] = {{3, 5}, {7, 33}, {65, 128}, {13, 768}};
    for (int k = 0; k < 4; k++) {
        const int n = encoder[k][0], c = encoder[k][1];
        if (TEST("layernorm %d x %d", n, c)) test_layernorm(ops, n, c, 0), test_layernorm(ops, n, c, 1);
        if (TEST("channelnorm %d x %d", 20 * n, c)) test_channelnorm(ops, 20 * n, c, 3);
        if (TEST("channelnorm %d x %d, far from 0", 20 * n, c)) test_channelnorm(ops, 20 * n, c, 100);
        if (TEST("nearest centroid %d x %d", n, c)) test_nearest(ops, n, c, 10 + 40 * k);
    }
    if (GEMM_IS_OURS && TEST("one thread and two give the same bits")) test_threads();
    slam_ops_free(ops);
    return check_end();
}
