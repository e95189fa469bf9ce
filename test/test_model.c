/* The model against Transformers (fixtures made by test/reference.py): logits, loss, every gradient, 20 steps of AdamW; folders in
   every layout that loads; what must be refused; and finite differences through the whole model. Run from the repository's root. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FIXTURES "test/fixtures/"

/* ---- a case file ---- */

typedef struct fixture {
    tensors *file;
    slam_batch batch;
} fixture;

static const tensor *need(const tensors *file, const char *name) {
    const tensor *t = tensors_find(file, name);
    CHECK(t != NULL, "the fixture has no tensor '%s'", name);
    return t;
}

static float *floats(const tensors *file, const char *name, size_t *n) {
    const tensor *t = need(file, name);
    float *x = t ? (float *)malloc((t->count + 1) * sizeof *x) : NULL;
    if (t) CHECK(tensor_floats(t, x, 0, t->count), "%s", slam_error());
    if (n) *n = t ? t->count : 0;
    return x;
}

static int *ints(const tensors *file, const char *name) {
    const tensor *t = tensors_find(file, name);
    if (!t) return NULL;
    int *x = (int *)malloc((t->count + 1) * sizeof *x);
    memcpy(x, t->data, t->count * sizeof *x);
    return x;
}

static int fixture_open(fixture *f, const char *path) {
    memset(f, 0, sizeof *f);
    f->file = tensors_open(path);
    if (!CHECK(f->file != NULL, "%s", slam_error())) return 0;
    const tensor *t = need(f->file, "tokens");
    f->batch.B = (int)t->shape[0];
    f->batch.T = (int)t->shape[1];
    f->batch.tokens = ints(f->file, "tokens");
    f->batch.targets = ints(f->file, "targets");
    f->batch.doc_start = ints(f->file, "doc_start");
    f->batch.hole = ints(f->file, "hole");
    if (!f->batch.doc_start) f->batch.doc_start = (int *)calloc(t->count, sizeof(int));
    return 1;
}

static void fixture_close(fixture *f) {
    free(f->batch.tokens), free(f->batch.targets), free(f->batch.doc_start), free(f->batch.hole);
    tensors_close(f->file);
}

static int count_targets(const slam_batch *b) {
    int n = 0;
    for (int i = 0; b->targets && i < b->B * b->T; i++) n += b->targets[i] >= 0;
    return n;
}

/* Logits at every position that is not padding (a pad is token 0, a piece of its own, without a target). */
static void check_logits(slam_model *m, fixture *f, double tolerance) {
    const slam_batch *b = &f->batch;
    const int V = slam_model_config(m)->V, N = b->B * b->T;
    size_t n = 0;
    float *expected = floats(f->file, "logits", &n), *got = (float *)calloc((size_t)N * V, sizeof *got);
    if (!CHECK(n == (size_t)N * V, "%zu logits, expected %d x %d", n, N, V)) return;
    if (!CHECK(slam_model_plan(m, b->B, b->T, SLAM_INFERENCE) && slam_model_logits(m, b, got), "%s", slam_error())) return;
    for (int i = 0; i < N; i++)
        if (b->tokens[i] == 0 && b->doc_start[i] == i % b->T) memset(got + (size_t)i * V, 0, V * sizeof *got);
    check_close("logits", got, expected, n, tolerance);
    free(expected), free(got);
}

static void check_gradients(slam_model *m, const fixture *f) {
    size_t n = 0;
    parameter *list = parameters_of(&m->config, &n);
    for (size_t k = 0; k < n; k++) {
        char name[128];
        snprintf(name, sizeof name, "grad.%s", list[k].name);
        float *expected = floats(f->file, name, NULL);
        if (expected) check_close(name, m->gradients + list[k].at, expected, parameter_size(&list[k]), 1e-4);
        free(expected);
    }
    free(list);
}

/* The gradients of `batch` done `rows` rows at a time. */
static int backward_in_parts(slam_model *m, const slam_batch *b, int rows, float scale) {
    for (int i = 0; i < b->B; i += rows) {
        const size_t at = (size_t)i * b->T;
        slam_batch part = {b->B - i < rows ? b->B - i : rows, b->T, b->tokens + at, b->targets + at, b->doc_start + at,
                           b->hole ? b->hole + 2 * at : NULL};
        if (!slam_model_backward(m, &part, scale, NULL, NULL)) return 0;
    }
    return 1;
}

static void check_training(slam_ops *ops, slam_model *m, fixture *f) {
    const int targets = count_targets(&f->batch);
    float *loss = floats(f->file, "loss", NULL);
    if (!CHECK(slam_model_plan(m, f->batch.B, f->batch.T, SLAM_TRAIN), "%s", slam_error())) return;
    CHECK(backward_in_parts(m, &f->batch, f->batch.B, 1.0f / (float)targets), "%s", slam_error());
    check_near("loss", m->stats[0] / targets, loss[0], 1e-5 * loss[0]);
    check_gradients(m, f);
    ops->zero(ops, m->stats, 2 * sizeof(double));
    ops->zero(ops, m->gradients, m->w.total * sizeof(float));
    free(loss);
    if (!tensors_find(f->file, "losses20")) return;
    size_t n = 0;
    float *losses = floats(f->file, "losses20", &n), *norms = floats(f->file, "norms20", NULL),
          *lrs = floats(f->file, "lrs20", NULL), *s = floats(f->file, "settings", NULL);
    const slam_adamw settings = {0, 0.9, 0.999, 1e-8, s[7], s[8], 0};
    slam_optimiser *o = slam_optimiser_new(m, &settings);
    for (size_t k = 0; k < n; k++) {
        slam_step step;
        const double lr = slam_schedule(SLAM_COSINE, (long)k, (long)s[3], (long)s[2], s[0], s[1]);
        check_near("lr", lr, lrs[k], 1e-6 * s[0]);
        CHECK(backward_in_parts(m, &f->batch, 1 + (int)(k % 2), 1.0f / (float)targets) && slam_optimiser_step(o, lr, &step), "%s",
              slam_error());
        check_near("loss of a step", step.loss_sum / targets, losses[k], 1e-5 * losses[k]);
        check_near("norm of a step", step.grad_norm, norms[k], 1e-4 * norms[k]);
    }
    slam_optimiser_free(o);
    free(losses), free(norms), free(lrs), free(s);
}

static void test_fixture(slam_ops *ops, const char *folder, double tolerance) {
    fixture f;
    if (!TEST("Transformers: %s", folder)) return;
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s", folder);
    slam_model *m = slam_model_load(ops, path);
    if (!CHECK(m != NULL, "%s", slam_error())) return;
    snprintf(path, sizeof path, FIXTURES "%s/case.safetensors", folder);
    if (!fixture_open(&f, path)) return;
    check_logits(m, &f, tolerance);
    if (tensors_find(f.file, "loss")) check_training(ops, m, &f);
    fixture_close(&f);
    slam_model_free(m);
}

/* TWIST: a text model cut to the units' vocabulary, 102 rows here. */
static void test_twist(slam_ops *ops, const char *folder) {
    fixture f;
    char path[256];
    if (!TEST("Transformers: %s", folder)) return;
    snprintf(path, sizeof path, FIXTURES "%s", folder);
    slam_model *m = slam_model_twist(ops, path, 102);
    if (!CHECK(m != NULL, "%s", slam_error())) return;
    snprintf(path, sizeof path, FIXTURES "%s/twist.safetensors", folder);
    if (fixture_open(&f, path)) check_logits(m, &f, 2e-5);
    fixture_close(&f);
    slam_model_free(m);
}

static void test_schedules(void) {
    const char *const kinds[] = {"cosine", "inverse_sqrt", "linear", "constant"};
    if (!TEST("Transformers: schedules")) return;
    tensors *file = tensors_open(FIXTURES "schedules.safetensors");
    if (!CHECK(file != NULL, "%s", slam_error())) return;
    for (int k = 0; k < 12; k++) {
        char name[64];
        size_t n = 0;
        snprintf(name, sizeof name, "%s.%d", kinds[k / 3], k % 3);
        float *lrs = floats(file, name, &n);
        snprintf(name, sizeof name, "%s.%d.settings", kinds[k / 3], k % 3);
        float *s = floats(file, name, NULL);
        for (size_t i = 0; lrs && s && i < n; i++) {
            const double lr = slam_schedule(k / 3, (long)i, (long)s[3], (long)s[2], s[0], s[1]);
            if (!check_near(name, lr, lrs[i], 1e-6 * s[0])) break;
        }
        free(lrs), free(s);
    }
    tensors_close(file);
}

static void test_adamw(slam_ops *ops) {
    if (!TEST("PyTorch: AdamW with weight decay")) return;
    tensors *file = tensors_open(FIXTURES "adamw.safetensors");
    if (!CHECK(file != NULL, "%s", slam_error())) return;
    size_t n = 0;
    float *w = floats(file, "p0", &n), *g = floats(file, "g", NULL), *p = floats(file, "p", NULL),
          *s = floats(file, "settings", NULL);
    float *m = (float *)calloc(n, sizeof *m), *v = (float *)calloc(n, sizeof *v);
    const tensor *t = need(file, "settings");
    double settings[5];
    memcpy(settings, t->data, sizeof settings);
    for (int step = 0; step < 10; step++) {
        const slam_adamw h = {settings[0], settings[1], settings[2], settings[3], settings[4], 0, step + 1};
        const double stats[2] = {0, 0};
        ops->adamw(ops, (slam_act *)w, w, m, v, g + (size_t)step * n, stats, &h, n);
        check_close("weights", w, p + (size_t)step * n, n, 3e-7);
    }
    free(w), free(g), free(p), free(s), free(m), free(v);
    tensors_close(file);
}

/* `python test/reference.py sizes` prints this table from Transformers' models and PyTorch's FlopCounterMode. */
static void test_sizes(void) {
    static const struct {
        slam_config config;
        int T;
        size_t parameters;
        double weights, attention; // FLOP a token, forward and backward; of attention over all T x T pairs
    } sizes[] = {
        {{151936, 896, 24, 14, 2, 64, 4864, 0, 1, 1, 0, 0, 0}, 128, 494032768, 2963767296, 33030144},
        {{502, 896, 24, 14, 2, 64, 4864, 0, 1, 1, 0, 0, 0}, 1024, 358347904, 2149658112, 264241152},
        {{102, 128, 4, 4, 2, 32, 384, 0, 1, 1, 0, 0, 0}, 256, 801664, 4796928, 1572864},
        {{2000, 192, 3, 6, 2, 32, 500, 0, 0, 0, 0, 0, 0}, 100, 1928256, 9257472, 691200},
    };
    if (!TEST("Transformers: parameters and FLOP a token")) return;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const slam_config *c = &sizes[k].config;
        CHECK(slam_config_parameters(c) == sizes[k].parameters, "V %d, C %d: %zu parameters, expected %zu", c->V, c->C,
              slam_config_parameters(c), sizes[k].parameters);
        const double expected = sizes[k].weights + sizes[k].attention / 2; // a causal mask leaves half of the pairs
        check_near("FLOP a token", slam_config_flops(c, sizes[k].T) / expected, 1, 1e-12);
    }
    slam_config tiny, slam;
    CHECK(slam_config_read(&tiny, "tiny") && slam_config_read(&slam, "slam"), "%s", slam_error());
    CHECK(slam_config_parameters(&tiny) == sizes[2].parameters && slam_config_parameters(&slam) == sizes[1].parameters,
          "tiny has %zu parameters, slam %zu", slam_config_parameters(&tiny), slam_config_parameters(&slam));
}

/* ---- the whole model by finite differences ---- */

static slam_batch random_batch(int B, int T, int V, uint64_t *seed, int holes) {
    int *numbers = (int *)calloc((size_t)B * T, 5 * sizeof(int));
    const size_t N = (size_t)B * T;
    slam_batch b = {B, T, numbers, numbers + N, numbers + 2 * N, holes ? numbers + 3 * N : NULL};
    for (size_t i = 0; i < N; i++) {
        const int t = (int)(i % T);
        b.tokens[i] = (int)rng_below(seed, (uint64_t)V);
        b.targets[i] = rng_below(seed, 4) ? (int)rng_below(seed, (uint64_t)V) : -1;
        b.doc_start[i] = t == 0 ? 0 : rng_below(seed, 9) == 0 ? t : b.doc_start[i - 1];
        if (holes && t - b.doc_start[i] > 3) { // every token beyond a piece's fourth sees neither its second nor its third
            b.hole[2 * i] = b.doc_start[i] + 1;
            b.hole[2 * i + 1] = b.doc_start[i] + 3;
        }
    }
    return b;
}

static double sum_of_losses(slam_model *m, const slam_batch *b) {
    float losses[4096];
    double sum = 0;
    CHECK(slam_model_losses(m, b, losses), "%s", slam_error());
    for (int i = 0; i < b->B * b->T; i++) sum += losses[i];
    return sum;
}

static void test_finite_differences(slam_ops *ops, slam_config c, int holes) {
    uint64_t seed = 5;
    if (!TEST("finite differences: C %d L %d NH %d KVH %d HS %d F %d V %d%s%s%s", c.C, c.L, c.NH, c.KVH, c.HS, c.F, c.V,
              c.tied ? " tied" : "", c.qkv_bias ? " biases" : "", holes ? " holes" : ""))
        return;
    slam_model *m = slam_model_new(ops, &c, 3);
    slam_batch b = random_batch(3, 21, c.V, &seed, holes);
    size_t n = 0;
    parameter *list = parameters_of(&c, &n);
    for (size_t k = 0; k < n; k++)
        for (size_t i = 0; i < parameter_size(&list[k]); i++) m->master[list[k].at + i] += (float)(0.2 * rng_normal(&seed));
    CHECK(slam_model_plan(m, 3, 21, SLAM_TRAIN) && slam_model_backward(m, &b, 1, NULL, NULL), "%s", slam_error());
    CHECK(m->stats[0] == 0 || fabs(m->stats[0] - sum_of_losses(m, &b)) <= 1e-6 * m->stats[0], "backward's loss is not forward's");
    float *kept = (float *)malloc(m->w.total * sizeof *kept);
    memcpy(kept, m->master, m->w.total * sizeof *kept);
    for (size_t k = 0; k < n; k++) {
        const parameter *p = &list[k];
        const float *g = m->gradients + p->at;
        double norm = 0, loss[2];
        for (size_t i = 0; i < parameter_size(p); i++) norm += (double)g[i] * g[i];
        norm = sqrt(norm);
        if (!CHECK(norm > 0 || strstr(p->name, "k_proj.bias"), "%s has no gradient", p->name)) continue;
        /* along the gradient itself the slope is its norm; keys' biases are the exception: softmax does not see them without rotation */
        for (int side = 0; side < 2; side++) {
            for (size_t i = 0; i < parameter_size(p); i++)
                m->master[p->at + i] = kept[p->at + i] + (float)((side ? 3e-3 : -3e-3) * g[i] / norm);
            loss[side] = sum_of_losses(m, &b);
        }
        memcpy(m->master + p->at, kept + p->at, parameter_size(p) * sizeof *kept);
        check_near(p->name, (loss[1] - loss[0]) / 6e-3 / norm, 1, 5e-3 + 2e-2 / norm);
    }
    free(kept), free(list), free(b.tokens);
    slam_model_free(m);
}

/* The rows that follow the vocabulary are zero and stay zero; logits made some rows at a time are those made all at once. */
static void test_padded_vocabulary(slam_ops *ops) {
    const slam_config c = {27, 24, 2, 3, 1, 8, 40, 64, 0, 1, 1e-6, 0.3, 10000};
    const slam_adamw settings = {0, 0.9, 0.999, 1e-8, 0.1, 0.5, 0};
    uint64_t seed = 9;
    if (!TEST("a vocabulary that is no multiple of 8")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_optimiser *o = slam_optimiser_new(m, &settings);
    slam_batch b = random_batch(2, 13, c.V, &seed, 0);
    float whole[26 * 27], parts[26 * 27];
    slam_step step;
    for (int k = 0; k < 3; k++)
        CHECK(slam_model_plan(m, 2, 13, SLAM_TRAIN) && slam_model_backward(m, &b, 1, NULL, NULL) &&
                  slam_optimiser_step(o, 1e-2, &step),
              "%s", slam_error());
    for (int i = 27 * 24; i < 32 * 24; i++)
        CHECK(m->master[m->w.embed + i] == 0 && m->master[m->w.head + i] == 0, "row %d is not zero", i / 24);
    CHECK(m->master[m->w.embed + 26 * 24] != 0 && m->master[m->w.head + 26 * 24] != 0, "the last row is zero");
    CHECK(slam_model_logits(m, &b, whole) && slam_model_backward(m, &b, 1, NULL, NULL), "%s", slam_error());
    float *gradients = (float *)malloc(m->w.total * sizeof *gradients);
    memcpy(gradients, m->gradients, m->w.total * sizeof *gradients);
    ops->zero(ops, m->gradients, m->w.total * sizeof *gradients);
    m->a.head_rows = 4;
    CHECK(slam_model_logits(m, &b, parts) && slam_model_backward(m, &b, 1, NULL, NULL), "%s", slam_error());
    check_close("logits", parts, whole, 26 * 27, 1e-6);
    check_close("gradients", m->gradients, gradients, m->w.total, 1e-6);
    free(gradients), free(b.tokens);
    slam_optimiser_free(o);
    slam_model_free(m);
}

/* Forward and backward apart are both together; a weight of 2 counts a token twice, one of 0 not at all. */
static void test_backward_from(slam_ops *ops) {
    const slam_config c = {27, 24, 2, 3, 1, 8, 40, 64, 0, 1, 1e-6, 0.3, 10000};
    uint64_t seed = 9;
    float losses[42], weights[42];
    if (!TEST("backward from given losses")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_batch b = random_batch(2, 21, c.V, &seed, 1);
    CHECK(slam_model_plan(m, 2, 21, SLAM_INFERENCE) && slam_model_losses(m, &b, losses), "%s", slam_error());
    check_fails(slam_model_backward_from(m, weights, 0, NULL, NULL), "planned for training");
    CHECK(slam_model_plan(m, 2, 21, SLAM_TRAIN) && slam_model_backward(m, &b, 0.5f, NULL, NULL), "%s", slam_error());
    float *twice = (float *)malloc(m->w.total * sizeof *twice), *kept = (float *)malloc(m->w.total * sizeof *kept);
    memcpy(kept, m->gradients, m->w.total * sizeof *kept);
    ops->zero(ops, m->gradients, m->w.total * sizeof *kept);
    for (int i = 0; i < 42; i++) weights[i] = 0.5f;
    CHECK(slam_model_losses(m, &b, losses) && slam_model_backward_from(m, weights, 1.5, NULL, NULL), "%s", slam_error());
    CHECK(memcmp(kept, m->gradients, m->w.total * sizeof *kept) == 0, "the gradients differ");
    double sum = 1.5;
    for (int i = 0; i < 42; i++) sum += losses[i];
    check_near("statistics", m->stats[0], sum, 1e-5 * sum);
    check_fails(slam_model_backward_from(m, weights, 0, NULL, NULL), "slam_model_losses");
    ops->zero(ops, m->gradients, m->w.total * sizeof *kept);
    for (int i = 0; i < 42; i++) weights[i] = i % 3 == 0 ? 1 : i % 3 == 1 ? 0 : -0.5f;
    CHECK(slam_model_losses(m, &b, losses) && slam_model_backward_from(m, weights, 0, NULL, NULL), "%s", slam_error());
    memcpy(kept, m->gradients, m->w.total * sizeof *kept);
    ops->zero(ops, m->gradients, m->w.total * sizeof *kept);
    for (int part = 0; part < 2; part++) { // the same as two passes with other targets
        int targets[42];
        for (int i = 0; i < 42; i++) targets[i] = i % 3 == 2 * part ? b.targets[i] : -1;
        slam_batch one = b;
        one.targets = targets;
        CHECK(slam_model_backward(m, &one, part ? -0.5f : 1, NULL, NULL), "%s", slam_error());
    }
    memcpy(twice, m->gradients, m->w.total * sizeof *twice);
    check_close("weighted", kept, twice, m->w.total, 1e-6);
    free(twice), free(kept), free(b.tokens);
    slam_model_free(m);
}

/* What is computed again has the bits of what would have been kept. */
static void test_recompute(slam_ops *ops) {
    const slam_config c = {27, 24, 3, 3, 1, 8, 40, 64, 0, 1, 1e-6, 0.3, 10000};
    const int modes[] = {SLAM_TRAIN, SLAM_TRAIN_RECOMPUTE, SLAM_TRAIN};
    uint64_t seed = 9;
    if (!TEST("recomputed: the same bits in less memory")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_batch b = random_batch(3, 21, c.V, &seed, 1);
    float *kept = NULL;
    double loss = 0;
    size_t bytes[3];
    for (int k = 0; k < 3; k++) {
        ops->zero(ops, m->stats, 2 * sizeof(double));
        if (m->gradients) ops->zero(ops, m->gradients, m->w.total * sizeof(float));
        CHECK(slam_model_plan(m, 3, 21, modes[k]) && slam_model_backward(m, &b, 0.1f, NULL, NULL), "%s", slam_error());
        bytes[k] = m->a.total;
        if (!kept) {
            loss = m->stats[0];
            kept = (float *)malloc(m->w.total * sizeof *kept);
            memcpy(kept, m->gradients, m->w.total * sizeof *kept);
        }
        CHECK(m->stats[0] == loss, "losses %.17g and %.17g", m->stats[0], loss);
        CHECK(memcmp(kept, m->gradients, m->w.total * sizeof *kept) == 0, "the gradients differ");
    }
    CHECK(bytes[1] < bytes[0] && bytes[2] == bytes[0], "%zu, %zu and %zu bytes", bytes[0], bytes[1], bytes[2]);
    const slam_memory all = slam_config_memory(&c, 4, 3, 21, SLAM_TRAIN, 1),
                      less = slam_config_memory(&c, 4, 3, 21, SLAM_TRAIN_RECOMPUTE, 1);
    CHECK(less.activations < 0.9 * all.activations && all.total - less.total == all.activations - less.activations,
          "activations of %.0f and %.0f bytes, all in all %.0f and %.0f", all.activations, less.activations, all.total, less.total);
    CHECK(slam_model_plan(m, 3, 21, SLAM_TRAIN_RECOMPUTE) && slam_model_plan(m, 2, 21, SLAM_INFERENCE) &&
              m->mode == SLAM_TRAIN_RECOMPUTE,
          "a plan for training serves to evaluate");
    free(kept), free(b.tokens);
    slam_model_free(m);
}

/* Attention in one packed row is attention in rows of their own. */
static void test_packing(slam_ops *ops) {
    const slam_config c = {31, 24, 2, 3, 1, 8, 40, 64, 1, 1, 1e-6, 0.3, 10000};
    uint64_t seed = 7;
    if (!TEST("documents packed in a row are documents alone")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    const int lengths[] = {1, 17, 2, 30, 14}, T = 64;
    int tokens[64], targets[64], start[64], at = 0;
    float packed[64], alone[64];
    for (int k = 0; k < 5; k++)
        for (int i = 0; i < lengths[k]; i++, at++) {
            tokens[at] = (int)rng_below(&seed, 31);
            targets[at] = (int)rng_below(&seed, 31);
            start[at] = at - i;
        }
    slam_batch b = {1, T, tokens, targets, start, NULL};
    CHECK(slam_model_plan(m, 1, T, SLAM_INFERENCE) && slam_model_losses(m, &b, packed), "%s", slam_error());
    for (int k = 0, first = 0; k < 5; first += lengths[k++]) {
        int zero[64] = {0};
        slam_batch one = {1, lengths[k], tokens + first, targets + first, zero, NULL};
        CHECK(slam_model_losses(m, &one, alone + first), "%s", slam_error());
    }
    check_close("losses", packed, alone, 64, 1e-6);
    slam_model_free(m);
}

/* ---- files ---- */

static void write_file(const char *folder, const char *name, const char *content) {
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    CHECK(make_folders(folder) && file_write(path, content, strlen(content)), "%s", slam_error());
}

static void test_save_and_load(slam_ops *ops) {
    const slam_config c = {37, 24, 2, 3, 1, 8, 40, 64, 0, 1, 1e-5, 0.1, 12345.5};
    for (int k = 0; k < 4; k++) {
        slam_config config = c;
        config.tied = k & 1;
        config.qkv_bias = k < 2;
        const int format = k % 3 == 1 ? SLAM_FORMAT_SLAMKIT : SLAM_FORMAT_HF;
        if (!TEST("saved and read back: %s%s%s", config.qkv_bias ? "Qwen2" : "Llama", config.tied ? ", tied" : "",
                  format == SLAM_FORMAT_SLAMKIT ? ", SlamKit's names" : ""))
            continue;
        const char *folder = check_path("saved");
        slam_model *a = slam_model_new(ops, &config, 11);
        CHECK(make_folders(folder) && slam_model_save(a, folder, format), "%s", slam_error());
        slam_model *b = slam_model_load(ops, folder);
        if (!CHECK(b != NULL, "%s", slam_error())) continue;
        CHECK(memcmp(&a->config, &b->config, sizeof a->config) == 0, "the configuration changed");
        CHECK(memcmp(a->master, b->master, a->w.total * sizeof(float)) == 0, "the weights changed");
        slam_model *t = slam_model_twist(ops, folder, 20);
        if (CHECK(t != NULL, "%s", slam_error())) {
            CHECK(t->config.V == 20 && memcmp(t->master + t->w.embed, a->master + a->w.embed, 20 * 24 * sizeof(float)) == 0,
                  "the embedding's first rows are kept");
            CHECK(memcmp(t->master + t->w.head, a->master + a->w.head, 20 * 24 * sizeof(float)) == 0,
                  "the head's first rows are kept");
            CHECK(memcmp(t->master + t->w.layer, a->master + a->w.layer, a->w.layer_size * 2 * sizeof(float)) == 0,
                  "the layers are kept");
        }
        check_fails(slam_model_twist(ops, folder, 38), "expected at least 38");
        slam_model_free(a), slam_model_free(b), slam_model_free(t);
        remove_tree(folder);
    }
}

/* A config.json that is a good one but for one member. */
static void try_config(const char *member, const char *expected) {
    char config[1024];
    const char *folder = check_path("config");
    snprintf(
        config, sizeof config,
        "{\"model_type\": \"qwen2\", \"vocab_size\": 10, \"hidden_size\": 8, \"intermediate_size\": 12, \"num_hidden_layers\": 1, "
        "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"x\": 0}");
    /* the member takes the place of the one of its name, or of "x" */
    char name[64], *at = NULL;
    snprintf(name, sizeof name, "%.*s", (int)strcspn(member, ":"), member);
    at = strstr(config, name);
    if (!at) at = strstr(config, "\"x\"");
    char rest[1024];
    snprintf(rest, sizeof rest, "%s", at + strcspn(at, ",}"));
    snprintf(at, sizeof config - (size_t)(at - config), "%s%s", member, rest);
    write_file(folder, "config.json", config);
    char path[1200];
    slam_config c;
    snprintf(path, sizeof path, "%s/config.json", folder);
    if (expected) check_fails(slam_config_read(&c, path), expected);
    else CHECK(slam_config_read(&c, path), "%s", slam_error());
}

static void test_configs(void) {
    if (TEST("config.json: what is not built is refused by name")) {
        try_config("\"x\": 1", NULL);
        try_config("\"model_type\": \"gpt2\"", "model_type is 'gpt2'");
        try_config("\"hidden_act\": \"gelu\"", "hidden_act is 'gelu'");
        try_config("\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}", "rope_scaling 'linear'");
        try_config("\"rope_parameters\": {\"rope_type\": \"yarn\"}", "rope_type 'yarn'");
        try_config("\"use_sliding_window\": true", "sliding window");
        try_config("\"layer_types\": [\"sliding_attention\"]", "sliding window");
        try_config("\"attention_bias\": true", "attention_bias");
        try_config("\"mlp_bias\": true", "mlp_bias");
        try_config("\"partial_rotary_factor\": 0.5", "partial_rotary_factor");
    }
    if (TEST("config.json: absurd and missing values")) {
        try_config("\"vocab_size\": 0", "vocab_size");
        try_config("\"vocab_size\": -3", "vocab_size");
        try_config("\"vocab_size\": 1e30", "vocab_size");
        try_config("\"vocab_size\": 10.5", "vocab_size");
        try_config("\"vocab_size\": \"many\"", "vocab_size");
        try_config("\"hidden_size\": null", "hidden_size");
        try_config("\"hidden_size\": 9", "hidden_size 9 over 2 heads");
        try_config("\"num_hidden_layers\": 100000", "num_hidden_layers");
        try_config("\"num_attention_heads\": 3", "3");
        try_config("\"num_key_value_heads\": 3", "3 key/value heads");
        try_config("\"head_dim\": 3", "head size is 3");
        try_config("\"rms_norm_eps\": -1", "rms_norm_eps");
        try_config("\"rope_theta\": 0", "rope_theta");
        try_config("\"intermediate_size\": 99999999999", "intermediate_size");
        slam_config c;
        check_fails(slam_config_read(&c, check_path("no-such/config.json")), "no-such/config.json");
        const char *path = check_file("broken.json", "{\"vocab_size\": ", 15);
        check_fails(slam_config_read(&c, path), "broken.json");
        check_fails(slam_config_read(&c, check_file("list.json", "[1]", 3)), "list.json");
    }
}

/* A model folder with one thing wrong in its weights. */
static void test_damaged_weights(slam_ops *ops) {
    const slam_config c = {11, 8, 1, 2, 1, 4, 12, 64, 1, 1, 1e-6, 0.1, 10000};
    if (!TEST("model.safetensors: missing, unknown, misshapen and non-finite tensors")) return;
    const char *folder = check_path("damaged");
    char path[1200];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    slam_model *m = slam_model_new(ops, &c, 1);
    CHECK(make_folders(folder) && slam_model_save(m, folder, SLAM_FORMAT_HF), "%s", slam_error());
    tensors *file = tensors_open(path);
    const size_t n = tensors_count(file);
    tensor_out *list = (tensor_out *)calloc(n + 1, sizeof *list);
    float poison[64];
    for (int i = 0; i < 64; i++) poison[i] = i == 40 ? NAN : 1;
    for (int damage = 0; damage < 5; damage++) {
        for (size_t k = 0; k < n; k++) {
            const tensor *t = tensors_at(file, k);
            list[k].name = t->name, list[k].rank = t->rank, list[k].dtype = t->dtype, list[k].data = t->data;
            for (int d = 0; d < t->rank; d++) list[k].shape[d] = t->shape[d];
            if (strcmp(t->name, "model.layers.0.self_attn.o_proj.weight")) continue;
            if (damage == 0) list[k].name = "model.layers.0.self_attn.p_proj.weight";
            if (damage == 1) list[k].shape[0] = 4, list[k].shape[1] = 16;
            if (damage == 2) list[k].data = poison;
            if (damage == 3) list[k].dtype = DTYPE_I32;
        }
        list[n].name = "model.layers.1.mlp.up_proj.weight", list[n].rank = 1, list[n].shape[0] = 8, list[n].dtype = DTYPE_F32,
        list[n].data = poison;
        const char *const expected[] = {"'model.layers.0.self_attn.o_proj.weight' is missing", "has shape (4,16), expected (8,8)",
                                        "not finite", "o_proj.weight",
                                        "'model.layers.1.mlp.up_proj.weight' is not part of this model"};
        const char *other = check_path("damaged2");
        char other_path[1200];
        snprintf(other_path, sizeof other_path, "%s/model.safetensors", other);
        slam_model *good = slam_model_load(ops, folder);
        CHECK(good && make_folders(other) && slam_model_save(good, other, SLAM_FORMAT_HF), "%s", slam_error());
        slam_model_free(good);
        CHECK(tensors_write(other_path, list, n + (damage == 4), NULL), "%s", slam_error());
        check_fails(slam_model_load(ops, other), expected[damage]);
    }
    tensors_close(file);
    unlink(path);
    check_fails(slam_model_load(ops, folder), "model.safetensors");
    free(list);
    slam_model_free(m);
}

static void test_bad_batches(slam_ops *ops) {
    const slam_config c = {11, 8, 1, 2, 1, 4, 12, 64, 1, 1, 1e-6, 0.1, 10000};
    if (!TEST("batches that would run out of bounds")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    int tokens[4] = {1, 2, 3, 4}, targets[4] = {2, 3, 4, -1}, start[4] = {0, 0, 0, 0}, hole[8] = {0};
    slam_batch b = {1, 4, tokens, targets, start, hole};
    float losses[4];
    check_fails(slam_model_losses(m, &b, losses), "planned");
    CHECK(slam_model_plan(m, 1, 4, SLAM_INFERENCE) && slam_model_losses(m, &b, losses), "%s", slam_error());
    check_fails(slam_model_backward(m, &b, 1, NULL, NULL), "not planned for training");
    tokens[1] = 11;
    check_fails(slam_model_losses(m, &b, losses), "token 11");
    tokens[1] = -1;
    check_fails(slam_model_losses(m, &b, losses), "token -1");
    tokens[1] = 2, targets[2] = 11;
    check_fails(slam_model_losses(m, &b, losses), "target 11");
    targets[2] = 4, start[2] = 3;
    check_fails(slam_model_losses(m, &b, losses), "doc_start 3");
    start[2] = -1;
    check_fails(slam_model_losses(m, &b, losses), "doc_start -1");
    start[2] = 0, hole[6] = 1, hole[7] = 4;
    check_fails(slam_model_losses(m, &b, losses), "hole [1,4)");
    b.B = 2;
    check_fails(slam_model_losses(m, &b, losses), "2 rows");
    slam_model_free(m);
}

/* The rule of slam_model_nll by hand: every token once, each with at least half a window before it. */
static void test_nll(slam_ops *ops) {
    slam_config c = {11, 8, 1, 2, 1, 4, 12, 16, 1, 1, 1e-6, 0.5, 10000};
    if (!TEST("nll of a sequence longer than the context")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    int tokens[45], targets[45], start[45];
    float losses[45];
    uint64_t seed = 1;
    double sum = 0;
    for (int i = 0; i < 45; i++) tokens[i] = (int)rng_below(&seed, 11);
    slam_model_plan(m, 1, 16, SLAM_INFERENCE);
    for (int first = 0, scored = 1; scored < 45; first += 8) {
        const int n = 45 - first < 16 ? 45 - first : 16;
        slam_batch b = {1, n, tokens + first, targets, start, NULL};
        for (int t = 0; t < n; t++) start[t] = 0, targets[t] = first + t + 1 < 45 ? tokens[first + t + 1] : -1;
        CHECK(slam_model_losses(m, &b, losses), "%s", slam_error());
        for (int t = 0; t < n; t++)
            if (first + t + 1 >= scored && first + t + 1 < 45) sum += losses[t], scored++;
    }
    check_near("nll", slam_model_nll(m, tokens, 45), sum / 44, 1e-6);
    CHECK(slam_model_nll(m, tokens, 1) < 0, "one token has nothing to score");
    slam_model_free(m);
}

/* ---- an update that is skipped, and a resume after it ---- */

/* One update on random batch `number`; with `poison` a gradient is NaN. */
static slam_step update(slam_model *m, slam_optimiser *o, uint64_t number, int poison) {
    slam_step step = SLAM_ZERO;
    slam_batch b = random_batch(2, 13, slam_model_config(m)->V, &number, 0);
    CHECK(slam_model_backward(m, &b, 1.0f / (float)count_targets(&b), NULL, NULL), "%s", slam_error());
    if (poison) m->gradients[7] = NAN;
    CHECK(slam_optimiser_step(o, 1e-2, &step), "%s", slam_error());
    free(b.tokens);
    return step;
}

static void test_skipped_update(slam_ops *ops) {
    if (!TEST("a gradient that is NaN changes nothing, also not for a resumed run")) return;
    const slam_config c = {27, 24, 2, 3, 1, 8, 40, 64, 0, 1, 1e-6, 0.3, 10000};
    const slam_adamw settings = {0, 0.9, 0.99, 1e-8, 0.1, 1, 0};
    slam_model *a = slam_model_new(ops, &c, 1), *b = slam_model_new(ops, &c, 1); // only a meets the NaN
    CHECK(slam_model_plan(a, 2, 13, SLAM_TRAIN) && slam_model_plan(b, 2, 13, SLAM_TRAIN), "%s", slam_error());
    slam_optimiser *oa = slam_optimiser_new(a, &settings), *ob = slam_optimiser_new(b, &settings);
    slam_trainer t = SLAM_ZERO, read;
    t.steps = 10;
    for (uint64_t k = 0; k < 4; k++) {
        const slam_step good = update(a, oa, 100 + k, 0), same = update(b, ob, 100 + k, 0);
        CHECK(!good.skipped && !same.skipped, "update %d is skipped", (int)k);
        t.step++;
        if (k != 1) continue;
        const slam_step bad = update(a, oa, 99, 1);
        CHECK(bad.skipped == 1 && !isfinite(bad.grad_norm), "the update with a NaN is not skipped, norm %g", bad.grad_norm);
        t.skipped++;
    }
    CHECK(slam_optimiser_updates(oa) == t.step, "%ld updates, expected %ld", slam_optimiser_updates(oa), t.step);
    CHECK(memcmp(a->master, b->master, a->w.total * sizeof(float)) == 0, "the weights differ from those of a run without the NaN");
    const char *run = check_path("skipped");
    char *folder = NULL;
    CHECK(make_folders(run) && slam_checkpoint_save(run, a, oa, &t, SLAM_FORMAT_HF, 0), "%s", slam_error());
    slam_optimiser_free(oa);
    slam_model_free(a);
    if (CHECK(slam_checkpoint_find(run, &folder) && folder && slam_trainer_read(&read, folder), "%s", slam_error())) {
        a = slam_model_load(ops, folder);
        CHECK(a && slam_model_plan(a, 2, 13, SLAM_TRAIN), "%s", slam_error());
        oa = slam_optimiser_new(a, &settings);
        CHECK(slam_optimiser_load(oa, folder), "%s", slam_error());
        CHECK(slam_optimiser_updates(oa) == read.step && read.step == 4 && read.skipped == 1,
              "%ld updates; trainer.json: step %ld, expected 4, and %ld skipped, expected 1", slam_optimiser_updates(oa), read.step,
              read.skipped);
        update(a, oa, 200, 0);
        update(b, ob, 200, 0);
        CHECK(memcmp(a->master, b->master, a->w.total * sizeof(float)) == 0, "the resumed run's next update is another one");
        slam_trainer_free(&read);
        slam_optimiser_free(oa);
        slam_model_free(a);
    }
    free(folder);
    remove_tree(run);
    slam_optimiser_free(ob);
    slam_model_free(b);
}

/* m is the mean of gradients and has both signs, v that of their squares: their names in the file are not interchanged. */
static void test_moment_names(slam_ops *ops) {
    if (!TEST("optimizer.safetensors: .m has both signs, .v has none")) return;
    const slam_config c = {27, 24, 1, 3, 1, 8, 40, 64, 0, 1, 1e-6, 0.3, 10000};
    const slam_adamw settings = {0, 0.9, 0.99, 1e-8, 0.1, 1, 0};
    const char *folder = check_path("moments");
    slam_model *m = slam_model_new(ops, &c, 1);
    CHECK(slam_model_plan(m, 2, 13, SLAM_TRAIN), "%s", slam_error());
    slam_optimiser *o = slam_optimiser_new(m, &settings);
    for (uint64_t k = 0; k < 3; k++) update(m, o, k, 0);
    CHECK(make_folders(folder) && slam_optimiser_save(o, folder), "%s", slam_error());
    char path[1200];
    snprintf(path, sizeof path, "%s/optimizer.safetensors", folder);
    tensors *file = tensors_open(path);
    size_t n = 0, negative[2] = {0};
    for (int k = 0; CHECK(file, "%s", slam_error()) && k < 2; k++) {
        float *x = floats(file, k ? "model.layers.0.mlp.up_proj.weight.v" : "model.layers.0.mlp.up_proj.weight.m", &n);
        for (size_t i = 0; i < n; i++) negative[k] += x[i] < 0;
        free(x);
    }
    CHECK(n == 24 * 40 && negative[0] > n / 4 && negative[1] == 0, "%zu numbers, negative: %zu of m, %zu of v", n, negative[0],
          negative[1]);
    tensors_close(file);
    remove_tree(folder);
    slam_optimiser_free(o);
    slam_model_free(m);
}

/* ---- a step: what is asked for and when it is waited for ---- */

/* A task that makes its batches up, and what was called: n next, x a next that failed, a accumulate, s seek, d a download of the
   step's statistics, w any other wait. */
static struct {
    slam_model *model;
    slam_batch batch;
    uint64_t row, missing;
    char events[200];
    int count;
} made_up;

static void event(char c) {
    if (made_up.count < 199) made_up.events[made_up.count++] = c;
}

static int made_up_next(void *context, uint64_t *tokens, uint64_t *terms) {
    (void)context;
    event(made_up.row == made_up.missing ? 'x' : 'n');
    if (made_up.row == made_up.missing) return fail("there is no batch %d", (int)made_up.row);
    uint64_t seed = made_up.row++;
    free(made_up.batch.tokens);
    made_up.batch = random_batch(2, 13, 27, &seed, 0);
    *tokens = 26;
    *terms = (uint64_t)count_targets(&made_up.batch);
    return 1;
}

static int made_up_accumulate(void *context, uint64_t terms, slam_after_layer *after_layer, void *after) {
    (void)context;
    event('a');
    return slam_model_backward(made_up.model, &made_up.batch, 1.0f / (float)terms, after_layer, after);
}

static void made_up_tell(void *context, uint64_t *epoch, uint64_t *row) {
    (void)context;
    *epoch = 0;
    *row = made_up.row;
}

static int made_up_seek(void *context, uint64_t epoch, uint64_t row) {
    (void)context, (void)epoch;
    event('s');
    made_up.row = row;
    return 1;
}

static void noting_download(slam_ops *ops, void *host, const void *from, size_t bytes) {
    event(bytes == 2 * sizeof(double) ? 'd' : 'w');
    cpu_copy(ops, host, from, bytes);
}

/* Trains `steps` steps with nothing on stdout. */
static int train_made_up(slam_ops *ops, const char *folder, long steps, uint64_t missing, int save_every) {
    slam_run r = SLAM_ZERO;
    const int out = (fflush(stdout), dup(1)), null = open("/dev/null", O_WRONLY);
    memset(&made_up, 0, sizeof made_up);
    const slam_config c = {27, 24, 2, 3, 1, 8, 40, 64, 0, 1, 1e-6, 0.3, 10000};
    made_up.model = r.model = slam_model_new(ops, &c, 1);
    made_up.missing = missing;
    r.folder = folder, r.ops = ops, r.context = 13, r.micro = 2, r.lr = 1e-2, r.began = slam_clock();
    r.adamw.beta1 = 0.9, r.adamw.beta2 = 0.999, r.adamw.eps = 1e-8;
    r.save_every = save_every, r.trainer.steps = steps;
    slam_task task = SLAM_ZERO;
    task.next = made_up_next, task.accumulate = made_up_accumulate, task.tell = made_up_tell, task.seek = made_up_seek;
    r.task = task;
    dup2(null, 1);
    int ok = slam_model_plan(r.model, 2, 13, SLAM_TRAIN) && slam_run_begin(&r, NULL);
    ops->download = noting_download;
    ok = ok && slam_run_train(&r);
    ops->download = cpu_copy;
    fflush(stdout);
    dup2(out, 1);
    close(out), close(null);
    slam_run_end(&r);
    slam_model_free(r.model);
    free(made_up.batch.tokens);
    return ok;
}

static void test_steps(slam_ops *ops) {
    const char *folder = check_path("steps");
    slam_trainer t;
    char path[1200];
    if (TEST("a step: the next batch is taken before the update is waited for")) {
        CHECK(train_made_up(ops, folder, 4, 1000, 1000), "%s", slam_error());
        /* before step 1, then batch 2 while 1 is computed, ...; the last takes none; its checkpoint downloads three arrays */
        CHECK(strcmp(made_up.events, "snandandandadwww") == 0, "%s", made_up.events);
        snprintf(path, sizeof path, "%s/latest", folder);
        CHECK(slam_trainer_read(&t, path), "%s", slam_error());
        CHECK(t.step == 4 && t.row == 4, "step %ld, row %d, expected 4 of both", t.step, (int)t.row);
        slam_trainer_free(&t);
        remove_tree(folder);
    }
    if (TEST("a batch that cannot be had is an error after the step before it")) {
        check_fails(train_made_up(ops, folder, 10, 3, 1), "there is no batch 3");
        snprintf(path, sizeof path, "%s/latest", folder);
        CHECK(slam_trainer_read(&t, path), "%s", slam_error());
        CHECK(t.step == 3 && t.row == 3, "step %ld, row %d, expected 3 of both", t.step, (int)t.row);
        slam_trainer_free(&t);
        remove_tree(folder);
    }
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    names list = SLAM_ZERO;
    if (!CHECK(folder_list(FIXTURES, &list), "%s", slam_error())) return check_end();
    for (size_t i = 0; i < list.n; i++) {
        char path[256];
        snprintf(path, sizeof path, FIXTURES "%s/case.safetensors", list.at[i]);
        if (path_is_file(path)) test_fixture(ops, list.at[i], 2e-5);
        snprintf(path, sizeof path, FIXTURES "%s/twist.safetensors", list.at[i]);
        if (path_is_file(path)) test_twist(ops, list.at[i]);
    }
    CHECK(list.n >= 15, "%zu fixtures, expected 15", list.n);
    names_free(&list);
    test_schedules();
    test_adamw(ops);
    test_sizes();
    const slam_config a = {19, 24, 2, 6, 2, 4, 20, 64, 1, 1, 1e-6, 0.2, 100},
                      b = {7, 10, 3, 1, 1, 6, 9, 64, 0, 0, 1e-3, 0.2, 10000};
    test_finite_differences(ops, a, 0);
    test_finite_differences(ops, b, 1);
    test_padded_vocabulary(ops);
    test_backward_from(ops);
    test_recompute(ops);
    test_packing(ops);
    test_save_and_load(ops);
    test_configs();
    test_damaged_weights(ops);
    test_bad_batches(ops);
    test_nll(ops);
    test_skipped_update(ops);
    test_moment_names(ops);
    test_steps(ops);
    slam_ops_free(ops);
    return check_end();
}
