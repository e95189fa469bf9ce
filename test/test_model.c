/* The model against Transformers (fixtures made by test/reference.py and reference_generate.py): logits, loss, every gradient, 20 steps
   of AdamW, distributions that tokens are drawn from; folders in every layout that loads; what must be refused; finite differences
   through the whole model; a cache against none. Run from the repository's root. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FIXTURES "test/fixtures/"

static slam_config make_config(int V, int C, int L, int NH, int KVH, int HS, int F, int tied, int family) {
    slam_config c = ZERO;
    c.V = V, c.C = C, c.L = L, c.NH = NH, c.KVH = KVH, c.HS = HS, c.F = F, c.tied = tied, c.family = family;
    c.T = 64, c.eps = 1e-6, c.init_std = 0.3, c.rope_theta = 10000;
    return c;
}

static slam_config small(void) { return make_config(27, 24, 2, 3, 1, 8, 40, 0, SLAM_QWEN2); }

/* A small model of a family: Llama with scaled frequencies, SmolLM3 with a layer without positions. */
static slam_config small_of(int family) {
    slam_config c = make_config(27, 24, 2, 4, 2, 6, 40, family % 2, family);
    if (family == SLAM_LLAMA) c.rope_factor = 8, c.rope_low = 1, c.rope_high = 4, c.rope_original = 32;
    if (family == SLAM_SMOLLM3) c.no_rope = 2;
    c.init_std = 0.2;
    return c;
}

static void zero_grads(slam_model *m) {
    m->ops->zero(m->ops, m->stats, 2 * sizeof(double));
    if (m->grads) m->ops->zero(m->ops, m->grads, m->n_weights * sizeof(float));
}

static float *copy_of(const float *x, size_t n) { return (float *)memcpy(NEW(float, n), x, n * sizeof *x); }

static int same_floats(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof *a) == 0; }

static const model_tensor *tensor_named(const slam_model *m, const char *name) {
    for (size_t k = 0; k < m->layout->tensors.n; k++)
        if (!strcmp(m->layout->tensors.list[k].name, name)) return &m->layout->tensors.list[k];
    CHECK(0, "the model has no tensor '%s'", name);
    return m->layout->tensors.list;
}

static slam_adamw adamw_new(slam_model *m, double beta2, double weight_decay, double clip) {
    slam_adamw o = ZERO;
    o.beta1 = 0.9, o.beta2 = beta2, o.eps = 1e-8, o.weight_decay = weight_decay, o.clip = clip;
    CHECK(slam_adamw_init(&o, m), "%s", slam_error());
    return o;
}

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
    float *x = NEW(float, t ? t->count : 1);
    if (t) CHECK(tensor_floats(t, x, 0, t->count), "%s", slam_error());
    if (n) *n = t ? t->count : 0;
    return x;
}

static void ints(const tensors *file, const char *name, int *to) {
    const tensor *t = tensors_find(file, name);
    if (t) memcpy(to, t->data, t->count * sizeof *to);
}

static int count_targets(const slam_batch *b) {
    int n = 0;
    for (int i = 0; i < b->B * b->T; i++) n += b->targets[i] >= 0;
    return n;
}

static int fixture_open(fixture *f, const char *path) {
    memset(f, 0, sizeof *f);
    f->file = tensors_open(path);
    if (!CHECK(f->file != NULL, "%s", slam_error())) return 0;
    const tensor *t = need(f->file, "tokens"), *hole = tensors_find(f->file, "hole");
    slam_batch *b = &f->batch;
    *b = slam_batch_new((int)t->shape[0], (int)t->shape[1], hole != NULL);
    ints(f->file, "tokens", b->tokens);
    ints(f->file, "targets", b->targets);
    ints(f->file, "doc_start", b->doc_start);
    for (size_t i = 0; hole && i < t->count; i++) { // (B,T,2)
        memcpy(&b->mask_start[i], hole->data + 8 * i, 4);
        memcpy(&b->mask_end[i], hole->data + 8 * i + 4, 4);
    }
    return 1;
}

static void fixture_close(fixture *f) {
    slam_batch_free(&f->batch);
    tensors_close(f->file);
}

/* Logits at every position that is not padding (a pad is token 0, a document of its own, without a target). */
static void check_logits(slam_model *m, fixture *f, double tolerance) {
    const slam_batch *b = &f->batch;
    const int V = m->config.V, N = b->B * b->T;
    size_t n = 0;
    float *expected = floats(f->file, "logits", &n), *got = NEW(float, (size_t)N *V);
    if (!CHECK(n == (size_t)N * V, "%zu logits, expected %d x %d", n, N, V)) return;
    if (!CHECK(slam_model_plan(m, b->B, b->T, SLAM_INFERENCE) && slam_logits(m, b, got), "%s", slam_error())) return;
    for (int i = 0; i < N; i++)
        if (b->tokens[i] == 0 && b->doc_start[i] == i % b->T) memset(got + (size_t)i * V, 0, V * sizeof *got);
    check_close("logits", got, expected, n, tolerance);
    free(expected), free(got);
}

/* The gradients of a batch, `rows` rows at a time. */
static int backward_rows(slam_model *m, const slam_batch *b, int rows, float scale) {
    for (int i = 0; i < b->B; i += rows) {
        const size_t at = (size_t)i * b->T;
        slam_batch part = *b;
        part.B = b->B - i < rows ? b->B - i : rows;
        part.tokens += at, part.targets += at, part.doc_start += at;
        if (b->mask_start) part.mask_start += at, part.mask_end += at;
        if (!slam_forward_backward(m, &part, scale)) return 0;
    }
    return 1;
}

static void check_training(slam_model *m, fixture *f) {
    const int targets = count_targets(&f->batch);
    float *loss = floats(f->file, "loss", NULL);
    if (!CHECK(slam_model_plan(m, f->batch.B, f->batch.T, SLAM_TRAIN), "%s", slam_error())) return;
    CHECK(backward_rows(m, &f->batch, f->batch.B, 1.0f / (float)targets), "%s", slam_error());
    check_near("loss", m->stats[0] / targets, loss[0], 1e-5 * loss[0]);
    free(loss);
    for (size_t k = 0; k < m->layout->tensors.n; k++) {
        const model_tensor *t = &m->layout->tensors.list[k];
        char name[128];
        snprintf(name, sizeof name, "grad.%s", t->name);
        float *expected = floats(f->file, name, NULL);
        check_close(name, m->grads + t->offset, expected, tensor_size(t), 1e-4);
        free(expected);
    }
    zero_grads(m);
    if (!tensors_find(f->file, "losses20")) return;
    size_t n = 0;
    float *losses = floats(f->file, "losses20", &n), *norms = floats(f->file, "norms20", NULL),
          *lrs = floats(f->file, "lrs20", NULL);
    float *s = floats(f->file, "settings", NULL);
    const slam_schedule schedule = {SLAM_COSINE, s[0], s[1], (long)s[2], (long)s[3]};
    slam_adamw o = adamw_new(m, 0.999, s[7], s[8]);
    for (size_t k = 0; k < n; k++) {
        slam_step step;
        const double lr = slam_learning_rate(&schedule, (long)k);
        check_near("lr", lr, lrs[k], 1e-6 * s[0]);
        CHECK(backward_rows(m, &f->batch, 1 + (int)(k % 2), 1.0f / (float)targets) && slam_adamw_step(&o, lr, &step),
              "%s", slam_error());
        check_near("loss of a step", step.loss_sum / targets, losses[k], 1e-5 * losses[k]);
        check_near("norm of a step", step.grad_norm, norms[k], 1e-4 * norms[k]);
    }
    slam_adamw_free(&o);
    free(losses), free(norms), free(lrs), free(s);
}

/* Tokens after the first seven of the batch, one at a time. */
static void check_greedy(slam_model *m, fixture *f) {
    const tensor *t = need(f->file, "greedy");
    const slam_sampling greedy = {0, 0, 1, 1};
    const int slot = 0, length = 7, *at = f->batch.tokens;
    float *logits = NEW(float, m->config.V);
    slam_decoder *d = slam_decoder_new(m, 1, length + (int)t->count);
    if (!CHECK(d && slam_decoder_start(d, 1, &slot, &at, &length), "%s", slam_error())) return;
    for (size_t i = 0; i < t->count; i++) {
        int expected;
        memcpy(&expected, (const char *)t->data + i * sizeof expected, sizeof expected);
        CHECK(slam_decoder_logits(d, logits), "%s", slam_error());
        const int token = slam_sample(logits, m->config.V, NULL, &greedy, 0);
        if (!CHECK(token == expected, "token %zu is %d, expected %d", i, token, expected)) break;
        slam_decoder_append(d, 0, token);
    }
    free(logits);
    slam_decoder_free(d);
}

/* twist: a text model cut to the units' vocabulary, 102 rows here. */
static void test_fixture(slam_ops *ops, const char *folder, int twist) {
    fixture f;
    if (!TEST("Transformers: %s", folder)) return;
    char path[256];
    snprintf(path, sizeof path, FIXTURES "%s", folder);
    slam_model *m = twist ? slam_model_twist(ops, path, 102) : slam_model_load(ops, path);
    if (!CHECK(m != NULL, "%s", slam_error())) return;
    snprintf(path, sizeof path, FIXTURES "%s/%s.safetensors", folder, twist ? "twist" : "case");
    if (!fixture_open(&f, path)) return;
    check_logits(m, &f, 2e-5);
    if (tensors_find(f.file, "greedy")) check_greedy(m, &f);
    if (tensors_find(f.file, "loss")) check_training(m, &f);
    fixture_close(&f);
    slam_model_free(m);
}

static void test_fixtures(slam_ops *ops) {
    slam_strings list = ZERO;
    if (!CHECK(folder_list(FIXTURES, &list), "%s", slam_error())) return;
    int found = 0;
    for (size_t i = 0; i < list.n; i++)
        for (int twist = 0; twist < 2; twist++) {
            char path[256];
            snprintf(path, sizeof path, FIXTURES "%s/%s.safetensors", list.at[i], twist ? "twist" : "case");
            if (!path_is_file(path)) continue;
            test_fixture(ops, list.at[i], twist);
            found++;
        }
    CHECK(found >= 24, "%d fixtures, expected 24", found);
    slam_strings_free(&list);
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
        const slam_schedule schedule = {k / 3, s[0], s[1], (long)s[2], (long)s[3]};
        for (size_t i = 0; i < n; i++)
            if (!check_near(name, slam_learning_rate(&schedule, (long)i), lrs[i], 1e-6 * s[0])) break;
        free(lrs), free(s);
    }
    tensors_close(file);
}

static void test_adamw(slam_ops *ops) {
    if (!TEST("PyTorch: AdamW with weight decay")) return;
    tensors *file = tensors_open(FIXTURES "adamw.safetensors");
    if (!CHECK(file != NULL, "%s", slam_error())) return;
    size_t n = 0;
    float *w = floats(file, "p0", &n), *g = floats(file, "g", NULL), *p = floats(file, "p", NULL);
    float *m = NEW(float, n), *v = NEW(float, n);
    double s[5];
    memcpy(s, need(file, "settings")->data, sizeof s);
    for (int step = 0; step < 10; step++) {
        const slam_adamw_params h = {s[0], s[1], s[2], s[3], s[4], 0, step + 1};
        const double stats[2] = {0, 0};
        ops->adamw(ops, (slam_act *)w, w, m, v, g + (size_t)step * n, stats, &h, n);
        check_close("weights", w, p + (size_t)step * n, n, 3e-7);
    }
    free(w), free(g), free(p), free(m), free(v);
    tensors_close(file);
}

/* `python test/reference.py sizes` prints this table from Transformers' models and PyTorch's FlopCounterMode. */
static void test_sizes(void) {
    static const struct {
        int V, C, L, NH, KVH, HS, F, tied, family, T;
        size_t parameters;
        double weights, attention; // FLOP per token, forward and backward; of attention over all T x T pairs
    } sizes[] = {
        {151936, 896, 24, 14, 2, 64, 4864, 1, 1, 128, 494032768, 2963767296, 33030144},
        {502, 896, 24, 14, 2, 64, 4864, 1, 1, 1024, 358347904, 2149658112, 264241152},
        {102, 128, 4, 4, 2, 32, 384, 1, 1, 256, 801664, 4796928, 1572864},
        {2000, 192, 3, 6, 2, 32, 500, 0, 0, 100, 1928256, 9257472, 691200},
    };
    if (!TEST("Transformers: parameters and FLOP per token")) return;
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const slam_config c = make_config(sizes[k].V, sizes[k].C, sizes[k].L, sizes[k].NH, sizes[k].KVH, sizes[k].HS,
                                          sizes[k].F, sizes[k].tied, sizes[k].family);
        const double expected = sizes[k].weights + sizes[k].attention / 2; // a causal mask leaves half of the pairs
        CHECK(slam_config_parameters(&c) == sizes[k].parameters, "V %d, C %d: %zu parameters, expected %zu", c.V, c.C,
              slam_config_parameters(&c), sizes[k].parameters);
        check_near("FLOP per token", slam_config_flops(&c, sizes[k].T) / expected, 1, 1e-12);
    }
    slam_config tiny, slam;
    CHECK(slam_config_load(&tiny, "tiny") && slam_config_load(&slam, "slam"), "%s", slam_error());
    CHECK(slam_config_parameters(&tiny) == sizes[2].parameters && slam_config_parameters(&slam) == sizes[1].parameters,
          "tiny has %zu parameters, slam %zu", slam_config_parameters(&tiny), slam_config_parameters(&slam));
}

/* The head's weight gradient sums over rows of logits: split sums over a number of rows that is no multiple of 64 have
   been wrong in cuBLASLt 13.1 (compute capability 9.0). */
static void test_head_rows(void) {
    static const int V[] = {502, 32000, 49152};
    slam_config c;
    if (!TEST("memory: slices of logits are multiples of 64 rows")) return;
    CHECK(slam_config_load(&c, "slam"), "%s", slam_error());
    for (int i = 0; i < 6; i++) {
        const int bytes = i < 3 ? 2 : 4;
        c.V = V[i % 3];
        const double rows = slam_config_memory(&c, bytes, 78, 1024, SLAM_TRAIN, 1).logits / (round_up(c.V, 8) * bytes);
        CHECK(rows >= 64 && rows < 78 * 1024 && fmod(rows, 64) == 0, "%g rows of %d", rows, c.V);
    }
}

/* What slam_config_memory plans is what a model allocates, and sharding divides what it says. */
static void test_memory(slam_ops *ops) {
    if (!TEST("memory: as planned")) return;
    const slam_config c = small();
    slam_model *m = slam_model_new(ops, &c, 1);
    for (int mode = SLAM_INFERENCE; mode <= SLAM_TRAIN_RECOMPUTE; mode++) {
        const slam_memory p = slam_config_memory(&c, 4, 2, 21, mode, 1), q = slam_config_memory(&c, 2, 2, 21, mode, 4);
        CHECK(slam_model_plan(m, 2, 21, mode), "%s", slam_error());
        check_near("activations", p.activations + p.logits, (double)m->layout->arena_bytes, 0);
        check_near("weights", p.weights, 4.0 * (double)m->n_weights, 0);
        check_near("gradients", p.grads, mode ? p.weights : 0, 0);
        check_near("optimiser", p.optimiser, 2 * p.grads, 0);
        check_near("optimiser of a rank", q.optimiser, p.optimiser / 4, 0);
        check_near("bf16 weights of a rank", q.weights, p.weights / 4 * (mode ? 3 : 6), 0);
        check_near("total", q.total, q.weights + q.grads + q.optimiser + q.activations + q.logits, 0.5);
    }
    slam_model_free(m);
}

/* ---- the whole model by finite differences ---- */

static slam_batch random_batch(int B, int T, int V, uint64_t seed, int masked) {
    slam_batch b = slam_batch_new(B, T, masked);
    for (int i = 0; i < B * T; i++) {
        const int t = i % T;
        b.tokens[i] = (int)rng_below(&seed, (uint64_t)V);
        b.targets[i] = rng_below(&seed, 4) ? (int)rng_below(&seed, (uint64_t)V) : -1;
        b.doc_start[i] = t == 0 ? 0 : rng_below(&seed, 9) == 0 ? t : b.doc_start[i - 1];
        if (masked &&
            t - b.doc_start[i] > 3) { // every token after a document's fourth sees neither its second nor its third
            b.mask_start[i] = b.doc_start[i] + 1;
            b.mask_end[i] = b.doc_start[i] + 3;
        }
    }
    return b;
}

static double sum_of_losses(slam_model *m, slam_batch *b) {
    double sum = 0;
    CHECK(slam_forward(m, b), "%s", slam_error());
    for (int i = 0; i < b->B * b->T; i++) sum += b->losses[i];
    return sum;
}

static void test_finite_differences(slam_ops *ops, slam_config c, int masked) {
    uint64_t seed = 6;
    if (!TEST("finite differences: C %d L %d NH %d KVH %d HS %d F %d V %d%s %s%s", c.C, c.L, c.NH, c.KVH, c.HS, c.F,
              c.V, c.tied ? " tied" : "", families[c.family].type, masked ? " masked spans" : ""))
        return;
    slam_model *m = slam_model_new(ops, &c, 3);
    slam_batch b = random_batch(3, 21, c.V, 5, masked);
    for (size_t k = 0; k < m->layout->tensors.n; k++) {
        const model_tensor *t = &m->layout->tensors.list[k];
        for (size_t i = 0; i < tensor_size(t); i++) m->master[t->offset + i] += (float)(0.2 * rng_normal(&seed));
    }
    CHECK(slam_model_plan(m, 3, 21, SLAM_TRAIN) && slam_forward_backward(m, &b, 1), "%s", slam_error());
    const double loss = m->stats[0];
    check_near("loss of the backward pass", loss, sum_of_losses(m, &b), 1e-6 * loss);
    float *original = copy_of(m->master, m->n_weights);
    for (size_t k = 0; k < m->layout->tensors.n; k++) {
        const model_tensor *t = &m->layout->tensors.list[k];
        const float *g = m->grads + t->offset;
        float *w = m->master + t->offset;
        double norm = 0, side[2];
        for (size_t i = 0; i < tensor_size(t); i++) norm += (double)g[i] * g[i];
        norm = sqrt(norm);
        if (!CHECK(norm > 0 || strstr(t->name, "k_proj.bias"), "%s has no gradient", t->name)) continue;
        /* along the gradient itself the slope is its norm; keys' biases are the exception: softmax does not see them without rotation */
        for (int s = 0; s < 2; s++) {
            for (size_t i = 0; i < tensor_size(t); i++)
                w[i] = original[t->offset + i] + (float)((s ? 3e-3 : -3e-3) * g[i] / norm);
            side[s] = sum_of_losses(m, &b);
        }
        memcpy(w, original + t->offset, tensor_size(t) * sizeof *w);
        check_near(t->name, (side[1] - side[0]) / 6e-3 / norm, 1, 5e-3 + 2e-2 / norm);
    }
    free(original);
    slam_batch_free(&b);
    slam_model_free(m);
}

/* The rows after the vocabulary are zero and stay zero; logits made a few rows at a time are those made all at once. */
static void test_padded_vocabulary(slam_ops *ops) {
    const slam_config c = small();
    if (!TEST("a vocabulary that is no multiple of 8")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_batch b = random_batch(2, 13, c.V, 9, 0);
    float whole[26 * 27], parts[26 * 27];
    slam_step step;
    slam_adamw o = ZERO;
    check_fails(slam_adamw_init(&o, m), "not planned for training");
    CHECK(slam_model_plan(m, 2, 13, SLAM_TRAIN), "%s", slam_error());
    o = adamw_new(m, 0.999, 0.1, 0.5);
    for (int k = 0; k < 3; k++)
        CHECK(slam_forward_backward(m, &b, 1) && slam_adamw_step(&o, 1e-2, &step), "%s", slam_error());
    const float *embed = m->master + tensor_named(m, "model.embed_tokens.weight")->offset;
    const float *head = m->master + tensor_named(m, "lm_head.weight")->offset;
    for (int i = 27 * 24; i < 32 * 24; i++) CHECK(embed[i] == 0 && head[i] == 0, "row %d is not zero", i / 24);
    CHECK(embed[26 * 24] != 0 && head[26 * 24] != 0, "the last row is zero");
    CHECK(slam_logits(m, &b, whole) && slam_forward_backward(m, &b, 1), "%s", slam_error());
    float *grads = copy_of(m->grads, m->n_weights);
    zero_grads(m);
    m->layout->head_rows = 4;
    CHECK(slam_logits(m, &b, parts) && slam_forward_backward(m, &b, 1), "%s", slam_error());
    check_close("logits", parts, whole, 26 * 27, 1e-6);
    check_close("gradients", m->grads, grads, m->n_weights, 1e-6);
    free(grads);
    slam_batch_free(&b);
    slam_adamw_free(&o);
    slam_model_free(m);
}

/* Forward and then backward are both at once; a weight of 2 counts a token twice, one of 0 not at all. */
static void test_backward(slam_ops *ops) {
    const slam_config c = small();
    float weights[42];
    if (!TEST("backward of weighted losses")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_batch b = random_batch(2, 21, c.V, 9, 1);
    CHECK(slam_model_plan(m, 2, 21, SLAM_INFERENCE) && slam_forward(m, &b), "%s", slam_error());
    check_fails(slam_backward(m, weights, 0), "plan for training");
    CHECK(slam_model_plan(m, 2, 21, SLAM_TRAIN) && slam_forward_backward(m, &b, 0.5f), "%s", slam_error());
    float *both = copy_of(m->grads, m->n_weights);
    zero_grads(m);
    for (int i = 0; i < 42; i++) weights[i] = 0.5f;
    CHECK(slam_forward(m, &b) && slam_backward(m, weights, 1.5), "%s", slam_error());
    CHECK(same_floats(both, m->grads, m->n_weights), "the gradients differ");
    CHECK(m->stats[0] == 1.5, "statistics: %g, expected the given loss", m->stats[0]);
    check_fails(slam_backward(m, weights, 0), "slam_forward");
    zero_grads(m);
    for (int i = 0; i < 42; i++) weights[i] = i % 3 == 0 ? 1 : i % 3 == 1 ? 0 : -0.5f;
    CHECK(slam_forward(m, &b) && slam_backward(m, weights, 0), "%s", slam_error());
    float *weighted = copy_of(m->grads, m->n_weights);
    zero_grads(m);
    for (int part = 0; part < 2; part++) { // the same as two passes with other targets
        int targets[42];
        for (int i = 0; i < 42; i++) targets[i] = i % 3 == 2 * part ? b.targets[i] : -1;
        slam_batch one = b;
        one.targets = targets;
        CHECK(slam_forward_backward(m, &one, part ? -0.5f : 1), "%s", slam_error());
    }
    check_close("weighted", weighted, m->grads, m->n_weights, 1e-6);
    free(both), free(weighted);
    slam_batch_free(&b);
    slam_model_free(m);
}

/* What is recomputed has the bits of what would have been kept. */
static void test_recompute(slam_ops *ops, slam_config c) {
    const int modes[] = {SLAM_TRAIN, SLAM_TRAIN_RECOMPUTE, SLAM_TRAIN};
    if (!TEST("recomputed: the same bits in less memory, %s", families[c.family].type)) return;
    c.L = 3;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_batch b = random_batch(3, 21, c.V, 9, 1);
    float *first = NULL;
    double loss = 0;
    size_t bytes[3];
    for (int k = 0; k < 3; k++) {
        zero_grads(m);
        CHECK(slam_model_plan(m, 3, 21, modes[k]) && slam_forward_backward(m, &b, 0.1f), "%s", slam_error());
        bytes[k] = m->layout->arena_bytes;
        if (!first) loss = m->stats[0], first = copy_of(m->grads, m->n_weights);
        CHECK(m->stats[0] == loss, "losses %.17g and %.17g", m->stats[0], loss);
        CHECK(same_floats(first, m->grads, m->n_weights), "the gradients differ");
    }
    CHECK(bytes[1] < bytes[0] && bytes[2] == bytes[0], "%zu, %zu and %zu bytes", bytes[0], bytes[1], bytes[2]);
    CHECK(slam_model_plan(m, 3, 21, SLAM_TRAIN_RECOMPUTE) && slam_model_plan(m, 2, 21, SLAM_INFERENCE) &&
              slam_model_plan(m, 6, 10, SLAM_INFERENCE) && m->mode == SLAM_TRAIN_RECOMPUTE,
          "a plan for training serves to evaluate");
    CHECK(slam_model_plan(m, 1, 22, SLAM_INFERENCE) && m->mode == SLAM_INFERENCE && m->T == 22,
          "longer rows are planned anew");
    free(first);
    slam_batch_free(&b);
    slam_model_free(m);
}

/* Attention in one packed row is attention in rows of their own. */
static void test_packing(slam_ops *ops, slam_config c) {
    uint64_t seed = 7;
    if (!TEST("documents packed in a row are documents alone, %s", families[c.family].type)) return;
    c.V = 31;
    slam_model *m = slam_model_new(ops, &c, 1);
    const int lengths[] = {1, 17, 2, 30, 14};
    slam_batch b = slam_batch_new(1, 64, 0);
    float alone[64];
    for (int k = 0, at = 0; k < 5; k++)
        for (int i = 0; i < lengths[k]; i++, at++) {
            b.tokens[at] = (int)rng_below(&seed, 31);
            b.targets[at] = (int)rng_below(&seed, 31);
            b.doc_start[at] = at - i;
        }
    CHECK(slam_model_plan(m, 1, 64, SLAM_INFERENCE) && slam_forward(m, &b), "%s", slam_error());
    for (int k = 0, first = 0; k < 5; first += lengths[k++]) {
        int zero[64] = {0};
        slam_batch one = b;
        one.T = lengths[k], one.tokens += first, one.targets += first, one.doc_start = zero, one.losses = alone + first;
        CHECK(slam_forward(m, &one), "%s", slam_error());
    }
    check_close("losses", b.losses, alone, 64, 1e-6);
    slam_batch_free(&b);
    slam_model_free(m);
}

/* ---- files ---- */

static void test_save_and_load(slam_ops *ops) {
    static const int tensors_of_layer[FAMILIES] = {9, 12, 9, 11, 11, 9};
    for (int k = 0; k < 2 * FAMILIES; k++) {
        slam_config config = small_of(k / 2);
        config.V = 37, config.tied = k % 2, config.eps = 1e-5, config.rope_theta = 12345.5, config.init_std = 0.1;
        const int format = k % 4 == 1 || k % 4 == 2 ? SLAM_FORMAT_SLAMKIT : SLAM_FORMAT_HF;
        if (!TEST("saved and loaded: %s%s%s", families[config.family].type, config.tied ? ", tied" : "",
                  format == SLAM_FORMAT_SLAMKIT ? ", SlamKit's names" : ""))
            continue;
        const char *folder = check_path("saved");
        slam_model *a = slam_model_new(ops, &config, 11);
        CHECK(folder_create(folder) && slam_model_save(a, folder, format), "%s", slam_error());
        slam_model *b = slam_model_load(ops, folder);
        if (!CHECK(b != NULL, "%s", slam_error())) continue;
        CHECK(memcmp(&a->config, &b->config, sizeof a->config) == 0, "the configuration changed");
        CHECK(same_floats(a->master, b->master, a->n_weights), "the weights changed");
        char path[1200];
        snprintf(path, sizeof path, "%s/model.safetensors", folder);
        tensors *file = tensors_open(path); // no more than it must hold: a tied head is not written
        CHECK(file && file->n == 2 + (size_t)!config.tied + (size_t)config.L * tensors_of_layer[config.family],
              "%zu tensors", file->n);
        CHECK(file && !tensors_find(file, "lm_head.weight") == (config.tied || format == SLAM_FORMAT_SLAMKIT),
              "the head");
        tensors_close(file);
        slam_model *t = slam_model_twist(ops, folder, 20);
        if (CHECK(t != NULL, "%s", slam_error())) {
            CHECK(t->config.V == 20, "the vocabulary has %d tokens", t->config.V);
            for (size_t i = 0; i < t->layout->tensors.n;
                 i++) { // the first 20 rows of embedding and head, all of the others
                const model_tensor *of = &t->layout->tensors.list[i], *from = &a->layout->tensors.list[i];
                CHECK(same_floats(t->master + of->offset, a->master + from->offset, tensor_size(of)), "%s is not kept",
                      of->name);
            }
        }
        check_fails(slam_model_twist(ops, folder, 38), "expected at least the 38");
        slam_model_free(a), slam_model_free(b), slam_model_free(t);
        remove_tree(folder);
    }
}

/* A config.json that is a good one but for one member, which takes the place of the one of its name, or of "x". */
static int load_config(slam_config *c, const char *member) {
    char text[1024], name[64], rest[1024];
    snprintf(
        text, sizeof text,
        "{\"model_type\": \"qwen2\", \"vocab_size\": 10, \"hidden_size\": 8, \"intermediate_size\": 12, \"num_hidden_layers\": 1, "
        "\"num_attention_heads\": 2, \"num_key_value_heads\": 1, \"x\": 0}");
    snprintf(name, sizeof name, "%.*s", (int)strcspn(member, ":"), member);
    char *at = strstr(text, name) ? strstr(text, name) : strstr(text, "\"x\"");
    snprintf(rest, sizeof rest, "%s", at + strcspn(at, ",}"));
    snprintf(at, sizeof text - (size_t)(at - text), "%s%s", member, rest);
    return slam_config_load(c, check_file("config.json", text, strlen(text)));
}

static void test_configs(void) {
    static const char *const refused[][2] = {
        {"\"model_type\": \"gpt2\"", "model_type is 'gpt2'"},
        {"\"hidden_act\": \"gelu\"", "hidden_act is 'gelu'"},
        {"\"rope_scaling\": {\"type\": \"linear\"}", "'factor' is missing"},
        {"\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}", "rope_scaling has rope_type 'dynamic'"},
        {"\"rope_scaling\": {\"rope_type\": \"llama3\", \"type\": \"default\"}", "'factor' is missing"},
        {"\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, \"high_freq_factor\": 4}",
         "high_freq_factor is 4"},
        {"\"quantization_config\": {\"bits\": 4}", "quantization_config"},
        {"\"model_type\": \"mistral\"", "sliding_window is 4096"},
        {"\"model_type\": \"mistral\", \"sliding_window\": 100", "sliding_window is 100"},
        {"\"model_type\": \"smollm3\", \"use_sliding_window\": true, \"sliding_window\": 9", "use_sliding_window"},
        {"\"model_type\": \"smollm3\", \"use_sliding_window\": true, \"sliding_window\": 9, \"max_window_layers\": 9",
         "use_sliding_window"},
        {"\"model_type\": \"smollm3\", \"no_rope_layers\": []", "no_rope_layers"},
        {"\"is_causal\": false", "is_causal is 'false'"},
        {"\"model_type\": \"qwen3\", \"attention_bias\": true", "attention_bias"},
        {"\"rope_scaling\": 2", "rope_scaling is 2, expected an object"},
        {"\"rope_scaling\": [1]", "rope_scaling is an array"},
        {"\"rope_parameters\": {\"rope_type\": \"yarn\"}", "rope_parameters has rope_type 'yarn'"},
        {"\"rope_parameters\": {\"rope_type\": 3}", "rope_parameters has rope_type '3'"},
        {"\"rope_parameters\": {\"rope_type\": null, \"type\": \"default\"}", "rope_type 'null'"},
        {"\"rope_parameters\": {\"type\": null}", "rope_type 'null'"},
        {"\"rope_parameters\": {\"full_attention\": {\"rope_theta\": 5}}", "settings for 'full_attention'"},
        {"\"rope_scaling\": {\"sliding_attention\": {}, \"rope_theta\": 5}", "settings for 'sliding_attention'"},
        {"\"rope_parameters\": {\"rope_theta\": \"many\"}", "rope_theta"},
        {"\"rope_theta\": null", "rope_theta is null"},
        {"\"rope_theta\": 5, \"rope_parameters\": {\"rope_theta\": null}", "rope_theta is null"},
        {"\"rope_parameters\": {\"partial_rotary_factor\": 0.5}", "partial_rotary_factor"},
        {"\"partial_rotary_factor\": 0.5", "partial_rotary_factor"},
        {"\"use_sliding_window\": true, \"max_window_layers\": 0", "use_sliding_window is true"},
        {"\"use_sliding_window\": true, \"max_window_layers\": 0, \"sliding_window\": 9", "max_window_layers 0"},
        {"\"layer_types\": [\"sliding_attention\"]", "full_attention"},
        {"\"layer_types\": \"sliding_attention\"", "layer_types"},
        {"\"layer_types\": []", "layer_types"},
        {"\"hidden_act\": null", "hidden_act"},
        {"\"hidden_act\": 3", "hidden_act"},
        {"\"attention_bias\": true", "attention_bias"},
        {"\"mlp_bias\": true", "mlp_bias"},
        {"\"vocab_size\": 0", "vocab_size"},
        {"\"vocab_size\": -3", "vocab_size"},
        {"\"vocab_size\": 1e30", "vocab_size"},
        {"\"vocab_size\": 10.5", "vocab_size"},
        {"\"vocab_size\": \"many\"", "vocab_size"},
        {"\"hidden_size\": null", "hidden_size"},
        {"\"hidden_size\": 9", "hidden_size is 9, expected a multiple of the 2 heads"},
        {"\"num_hidden_layers\": 100000", "num_hidden_layers"},
        {"\"num_attention_heads\": 3", "3"},
        {"\"num_key_value_heads\": 3", "3 key/value heads"},
        {"\"head_dim\": 3", "head size is 3"},
        {"\"rms_norm_eps\": -1", "rms_norm_eps"},
        {"\"rope_theta\": 0", "rope_theta"},
        {"\"intermediate_size\": 99999999999", "intermediate_size"},
    };
    static const struct {
        const char *member;
        double rope_theta;
    } good[] = {
        // what Transformers 5 computes
        {"\"x\": 1", 10000},
        {"\"rope_theta\": 500", 500},
        {"\"rope_scaling\": null", 10000},
        {"\"rope_scaling\": {}, \"rope_parameters\": {\"rope_theta\": 7}", 7},
        {"\"rope_scaling\": {\"type\": \"default\"}, \"rope_theta\": 8", 8},
        {"\"rope_scaling\": {\"rope_type\": \"default\", \"rope_theta\": 1000000.0}", 1e6},
        {"\"rope_theta\": 8, \"rope_parameters\": {\"rope_theta\": 9, \"rope_type\": \"default\"}", 9},
        {"\"rope_theta\": 8, \"rope_parameters\": {\"type\": \"default\"}", 8},
        {"\"rope_scaling\": {\"type\": \"default\"}, \"rope_parameters\": {\"rope_theta\": 9}",
         10000}, // the former replaces the latter
        {"\"rope_parameters\": {\"partial_rotary_factor\": 1.0}", 10000},
        {"\"rope_theta\": null, \"rope_parameters\": {\"rope_theta\": 9}", 9},
        {"\"rope_parameters\": {\"rope_type\": \"default\", \"type\": \"linear\", \"factor\": 4, \"rope_theta\": 9}",
         9},
        {"\"rope_scaling\": {\"type\": \"default\"}, \"rope_parameters\": {\"rope_theta\": 9}, \"rope_theta\": 8", 8},
        // no window slides in any layer
        {"\"use_sliding_window\": true, \"layer_types\": [\"full_attention\"]", 10000},
        {"\"use_sliding_window\": true", 10000},
        {"\"use_sliding_window\": true, \"max_window_layers\": 1", 10000},
        {"\"use_sliding_window\": true, \"max_window_layers\": 0, \"sliding_window\": null", 10000},
        {"\"use_sliding_window\": false, \"max_window_layers\": 0, \"sliding_window\": 4", 10000},
    };
    /* of Transformers' AutoConfig.for_model(type), for 32 heads and 128 channels */
    static const struct {
        int T, KVH, HS, tied;
        double eps, rope_theta;
    } defaults[FAMILIES] = {{2048, 32, 4, 0, 1e-6, 1e4},    {32768, 32, 4, 0, 1e-6, 1e4}, {131072, 8, 4, 0, 1e-6, 1e4},
                            {32768, 32, 128, 0, 1e-6, 1e4}, {2048, 32, 4, 0, 1e-5, 1e4},  {32768, 4, 4, 1, 1e-6, 2e6}};
    slam_config c;
    if (TEST("config.json: unsupported, absurd or missing settings are errors that name them"))
        for (size_t k = 0; k < sizeof refused / sizeof *refused; k++)
            check_fails(load_config(&c, refused[k][0]), refused[k][1]);
    if (TEST("config.json: every spelling of the rotary base"))
        for (size_t k = 0; k < sizeof good / sizeof *good; k++)
            if (CHECK(load_config(&c, good[k].member), "%s", slam_error()))
                check_near(good[k].member, c.rope_theta, good[k].rope_theta, 0);
    if (TEST("config.json: defaults of each model_type"))
        for (int k = 0; k < FAMILIES; k++) {
            char text[512];
            snprintf(text, sizeof text,
                     "{\"model_type\": \"%s\", \"vocab_size\": 10, \"hidden_size\": 128, \"intermediate_size\": 12, "
                     "\"num_hidden_layers\": 8, \"num_attention_heads\": 32, \"sliding_window\": null}",
                     families[k].type);
            if (!CHECK(slam_config_load(&c, check_file("config.json", text, strlen(text))), "%s", slam_error()))
                continue;
            CHECK(c.family == k && c.T == defaults[k].T && c.KVH == defaults[k].KVH && c.HS == defaults[k].HS &&
                      c.tied == defaults[k].tied && c.eps == defaults[k].eps && c.rope_theta == defaults[k].rope_theta,
                  "%s: T %d, KVH %d, HS %d", families[k].type, c.T, c.KVH, c.HS);
            CHECK(c.no_rope == (k == SLAM_SMOLLM3 ? 0x88 : 0), "%s: layers without positions", families[k].type);
            snprintf(text + strlen(text) - 1, 100,
                     ", \"num_key_value_heads\": null, \"no_rope_layers\": [true, true, "
                     "false, 1, 0, 1, 1, 1]}");
            CHECK(slam_config_load(&c, check_file("config.json", text, strlen(text))), "%s", slam_error());
            CHECK(c.KVH == 32, "%s: %d key/value heads, expected as many as heads", families[k].type, c.KVH);
            CHECK(c.no_rope == (k == SLAM_SMOLLM3 ? 0x14 : 0), "%s: layers without positions", families[k].type);
        }
    if (TEST("config.json: SlamKit's, with its own vocabulary; files that are none")) {
        const char nested[] =
            "{\"vocab_size\": 7, \"base_config\": {\"model_type\": \"llama\", \"vocab_size\": 10, "
            "\"hidden_size\": 8, \"intermediate_size\": 12, \"num_hidden_layers\": 1, \"num_attention_heads\": 2}, "
            "\"rope_theta\": %s}";
        static const char *const thetas[] = {"10000", "3", "null"};
        char text[512];
        for (int k = 0; k < 3; k++) {
            snprintf(text, sizeof text, nested, thetas[k]);
            const char *path = check_file("nested.json", text, strlen(text));
            if (k) {
                check_fails(slam_config_load(&c, path), "rope_theta is ");
                continue;
            }
            CHECK(slam_config_load(&c, path), "%s", slam_error());
            CHECK(c.V == 7 && c.KVH == 2 && c.HS == 4 && c.T == 2048 && !c.tied && c.family == SLAM_LLAMA &&
                      c.rope_theta == 10000,
                  "V %d, KVH %d", c.V, c.KVH);
        }
        check_fails(slam_config_load(&c, check_path("no-such/config.json")), "no-such/config.json");
        check_fails(slam_config_load(&c, check_file("broken.json", "{\"vocab_size\": ", 15)), "broken.json");
        check_fails(slam_config_load(&c, check_file("list.json", "[1]", 3)), "list.json");
        check_fails(slam_config_load(&c, "model-q4.gguf/config.json"), "GGUF");
    }
}

/* The tensors of a folder's file as a list to write, with space for one more. */
static tensor *list_tensors(const tensors *file) {
    tensor *list = NEW(tensor, file->n + 1);
    return (tensor *)memcpy(list, file->at, file->n * sizeof *list);
}

/* A model folder with one thing wrong in its weights. */
static void test_damaged_weights(slam_ops *ops) {
    static const char *const expected[] = {"o_proj.weight' is missing, found e.g. 'model.embed_tokens.weight'",
                                           "has shape (4,16), expected (8,8)", "not finite", "o_proj.weight",
                                           "'model.layers.1.mlp.up_proj.weight' is not part of this model"};
    const slam_config c = make_config(11, 8, 1, 2, 1, 4, 12, 1, 1);
    if (!TEST("model.safetensors: missing, unknown, misshapen and non-finite tensors")) return;
    const char *folder = check_path("good"), *other = check_path("damaged");
    char path[1200], other_path[1200];
    float poison[64];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    snprintf(other_path, sizeof other_path, "%s/model.safetensors", other);
    slam_model *m = slam_model_new(ops, &c, 1);
    CHECK(folder_create(folder) && folder_create(other), "%s", slam_error());
    CHECK(slam_model_save(m, folder, SLAM_FORMAT_HF) && slam_model_save(m, other, SLAM_FORMAT_HF), "%s", slam_error());
    tensors *file = tensors_open(path);
    for (int i = 0; i < 64; i++) poison[i] = i == 40 ? NAN : 1;
    for (int damage = 0; damage < 5; damage++) {
        const size_t n = file->n;
        tensor *list = list_tensors(file), *o = list;
        while (strcmp(o->name, "model.layers.0.self_attn.o_proj.weight")) o++;
        if (damage == 0) o->name = "model.layers.0.self_attn.p_proj.weight";
        if (damage == 1) o->shape[0] = 4, o->shape[1] = 16;
        if (damage == 2) o->data = poison;
        if (damage == 3) o->dtype = DTYPE_I32;
        list[n].name = "model.layers.1.mlp.up_proj.weight", list[n].rank = 1, list[n].shape[0] = 8,
        list[n].data = poison, list[n].count = 8;
        CHECK(tensors_write(other_path, list, n + (damage == 4), NULL), "%s", slam_error());
        check_fails(slam_model_load(ops, other), expected[damage]);
        free(list);
    }
    tensors_close(file);
    unlink(path);
    check_fails(slam_model_load(ops, folder), "model.safetensors");
    slam_model_free(m);
}

/* A tensor of a file that the model does not use is an error, unless it says nothing new. */
static void test_unused_tensors(slam_ops *ops) {
    static const struct {
        const char *name, *error; // NULL: it loads
        int format;
        double rope_theta; // of the frequencies
        int bits;          // that they were rounded to
    } extra[] = {
        {"model.layers.0.self_attn.o_proj.bias", "o_proj.bias' is not part", SLAM_FORMAT_HF, 0, 0},
        {"model.layers.0.mlp.down_proj.bias", "down_proj.bias' is not part", SLAM_FORMAT_HF, 0, 0},
        {"model.layers.0.self_attn.q_norm.weight", "q_norm.weight' is not part", SLAM_FORMAT_HF, 0, 0},
        {"model.layers.1.input_layernorm.weight", "layers.1.input_layernorm.weight' is not part", SLAM_FORMAT_HF, 0, 0},
        {"model.norm.weight", "'model.norm.weight' is not part", SLAM_FORMAT_SLAMKIT, 0, 0},
        {"head.lm_head.weight", "'head.lm_head.weight' is not part", SLAM_FORMAT_HF, 0, 0},
        {"model.rotary_emb.inv_freq", NULL, SLAM_FORMAT_HF, 5000, 23},
        {"model.layers.0.self_attn.rotary_emb.inv_freq", NULL, SLAM_FORMAT_HF, 5000, 10},
        {"lm.model.rotary_emb.inv_freq", NULL, SLAM_FORMAT_SLAMKIT, 5000, 7},
        {"model.rotary_emb.inv_freq", "inv_freq' is not that of rope_theta 5000", SLAM_FORMAT_HF, 10000, 23},
        {"model.rotary_emb.inv_freq", "inv_freq' has shape (8), expected (4)", SLAM_FORMAT_HF, 0, 0},
    };
    slam_config c = make_config(11, 8, 1, 2, 1, 8, 12, 1, 1);
    if (!TEST("model.safetensors: tensors that the model does not use")) return;
    c.rope_theta = 5000;
    const char *folder = check_path("unused");
    char path[1200];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    for (size_t k = 0; k < sizeof extra / sizeof *extra; k++) {
        float x[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        slam_model *m = slam_model_new(ops, &c, 1);
        CHECK(folder_create(folder) && slam_model_save(m, folder, extra[k].format), "%s", slam_error());
        slam_model_free(m);
        tensors *file = tensors_open(path);
        tensor *list = list_tensors(file), *added = &list[file->n];
        for (int i = 0; i < 4 && extra[k].bits; i++) {
            int exponent;
            const double fraction = frexp(pow(extra[k].rope_theta, -2.0 * i / 8), &exponent),
                         scale = 2 << extra[k].bits;
            x[i] = (float)ldexp(rint(fraction * scale) / scale, exponent);
        }
        added->name = extra[k].name, added->rank = 1, added->count = added->shape[0] = extra[k].bits ? 4 : 8;
        added->data = x;
        CHECK(tensors_write(path, list, file->n + 1, NULL), "%s", slam_error());
        tensors_close(file);
        if (extra[k].error) check_fails(slam_model_load(ops, folder), extra[k].error);
        else CHECK((m = slam_model_load(ops, folder)) != NULL, "%s", slam_error());
        if (!extra[k].error) slam_model_free(m);
        free(list);
        remove_tree(folder);
    }
}

/* As Transformers 5: a tied model's file may hold the head as well. If it differs from the embedding, the model is not tied. */
static void test_tied_head(slam_ops *ops) {
    const slam_config c = make_config(11, 8, 1, 2, 1, 4, 12, 1, 1);
    if (!TEST("tied in config.json, with a head in the file")) return;
    const char *folder = check_path("tied");
    char path[1200];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    slam_model *m = slam_model_new(ops, &c, 1);
    CHECK(folder_create(folder) && slam_model_save(m, folder, SLAM_FORMAT_HF), "%s", slam_error());
    tensors *file = tensors_open(path);
    for (int differs = 0; differs < 2; differs++) {
        float *head = copy_of(m->master, 88);
        tensor *list = list_tensors(file);
        head[87] += (float)differs;
        list[file->n].name = "lm_head.weight", list[file->n].rank = 2, list[file->n].data = head,
        list[file->n].count = 88;
        list[file->n].shape[0] = 11, list[file->n].shape[1] = 8;
        CHECK(tensors_write(path, list, file->n + 1, NULL), "%s", slam_error());
        slam_model *loaded = slam_model_load(ops, folder);
        if (CHECK(loaded != NULL, "%s", slam_error())) {
            CHECK(loaded->config.tied == !differs, "head %s, tied %d", differs ? "differs" : "is the embedding",
                  loaded->config.tied);
            if (differs)
                CHECK(same_floats(loaded->master + tensor_named(loaded, "lm_head.weight")->offset, head, 88),
                      "another head");
        }
        slam_model_free(loaded);
        free(list), free(head);
    }
    tensors_close(file);
    remove_tree(folder);
    slam_model_free(m);
}

static void test_hash(slam_ops *ops) {
    if (!TEST("hash of a model: of its weights and its configuration")) return;
    slam_config c = small(), other = small();
    uint64_t h[4];
    other.rope_theta = 20000;
    for (int k = 0; k < 4; k++) {
        slam_model *m = slam_model_new(ops, k == 3 ? &other : &c, 1);
        if (k == 2) m->master[tensor_named(m, "model.norm.weight")->offset + 23] += 1e-6f;
        CHECK(slam_model_hash(m, &h[k]), "%s", slam_error());
        slam_model_free(m);
    }
    CHECK(h[0] == h[1] && h[0] != h[2] && h[0] != h[3] && h[2] != h[3], "%d %d %d", h[0] == h[1], h[0] == h[2],
          h[0] == h[3]);
}

static void test_bad_batches(slam_ops *ops) {
    const slam_config c = make_config(11, 8, 1, 2, 1, 4, 12, 1, 1);
    if (!TEST("batches that would read out of bounds")) return;
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_batch b = slam_batch_new(1, 4, 1);
    for (int t = 0; t < 4; t++) b.tokens[t] = t + 1, b.targets[t] = t < 3 ? t + 2 : -1;
    const struct {
        int *at, value;
        const char *error;
    } bad[] = {{&b.tokens[1], 11, "token 11"},
               {&b.tokens[1], -1, "token -1"},
               {&b.targets[2], 11, "target 11"},
               {&b.doc_start[2], 3, "doc_start 3"},
               {&b.doc_start[2], -1, "doc_start -1"},
               {&b.mask_end[3], 4, "masked span [0,4)"},
               {&b.mask_start[3], 1, "masked span [1,0)"},
               {&b.B, 2, "2 rows"},
               {&b.T, 5, "5 tokens"}};
    check_fails(slam_forward(m, &b), "planned");
    CHECK(slam_model_plan(m, 1, 4, SLAM_INFERENCE) && slam_forward(m, &b), "%s", slam_error());
    check_fails(slam_forward_backward(m, &b, 1), "not planned for training");
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
        const int good = *bad[k].at;
        *bad[k].at = bad[k].value;
        check_fails(slam_forward(m, &b), bad[k].error);
        *bad[k].at = good;
    }
    CHECK(slam_forward(m, &b), "%s", slam_error());
    check_fails(slam_model_plan(m, 0, 4, SLAM_INFERENCE), "0 rows");
    check_fails(slam_model_plan(m, 1 << 20, 1 << 20, SLAM_INFERENCE), "2^29");
    slam_batch_free(&b);
    slam_model_free(m);
}

/* ---- updates ---- */

/* One update on random batch `number`; with `poison` a gradient is NaN. */
static slam_step update(slam_model *m, slam_adamw *o, uint64_t number, int poison) {
    slam_step step = ZERO;
    slam_batch b = random_batch(2, 13, m->config.V, number, 0);
    CHECK(slam_forward_backward(m, &b, 1.0f / (float)count_targets(&b)), "%s", slam_error());
    if (poison) m->grads[7] = NAN;
    CHECK(slam_adamw_step(o, 1e-2, &step), "%s", slam_error());
    slam_batch_free(&b);
    return step;
}

static void test_skipped_update(slam_ops *ops) {
    if (!TEST("a gradient that is NaN changes nothing and is no update")) return;
    const slam_config c = small();
    slam_model *a = slam_model_new(ops, &c, 1), *b = slam_model_new(ops, &c, 1); // only a meets the NaN
    CHECK(slam_model_plan(a, 2, 13, SLAM_TRAIN) && slam_model_plan(b, 2, 13, SLAM_TRAIN), "%s", slam_error());
    slam_adamw oa = adamw_new(a, 0.99, 0.1, 1), ob = adamw_new(b, 0.99, 0.1, 1);
    for (uint64_t k = 0; k < 4; k++) {
        CHECK(!update(a, &oa, 100 + k, 0).skipped && !update(b, &ob, 100 + k, 0).skipped, "update %d is skipped",
              (int)k);
        if (k != 1) continue;
        const slam_step bad = update(a, &oa, 99, 1);
        CHECK(bad.skipped == 1 && !isfinite(bad.grad_norm), "the update with a NaN is not skipped, norm %g",
              bad.grad_norm);
    }
    CHECK(oa.updates == 4 && ob.updates == 4, "%ld and %ld updates, expected 4", oa.updates, ob.updates);
    CHECK(same_floats(a->master, b->master, a->n_weights), "the weights differ from those of a run without the NaN");
    CHECK(same_floats(oa.m, ob.m, a->n_weights) && same_floats(oa.v, ob.v, a->n_weights), "the moments differ");
    slam_adamw_reset(&oa);
    slam_adamw_free(&ob);
    ob = adamw_new(b, 0.99, 0.1, 1);
    update(a, &oa, 7, 0), update(b, &ob, 7, 0);
    CHECK(oa.updates == 1 && same_floats(a->master, b->master, a->n_weights), "reset is not a new optimiser");
    slam_adamw_free(&oa), slam_adamw_free(&ob);
    slam_model_free(a), slam_model_free(b);
}

/* A skipped update and then a resume: updates are the trainer's steps, and the next update is that of a run without the NaN. m is the
   mean of gradients and has both signs, v that of their squares: their names in the file are not interchanged. */
static void test_resume_after_skip(slam_ops *ops) {
    if (!TEST("a skipped update, a checkpoint, a resume; .m has both signs, .v has none")) return;
    const slam_config c = small();
    const char *run = check_path("skipped");
    char *folder = NULL;
    slam_trainer trainer = ZERO, loaded = ZERO;
    slam_model *a = slam_model_new(ops, &c, 1), *b = slam_model_new(ops, &c, 1);
    CHECK(slam_model_plan(a, 2, 13, SLAM_TRAIN) && slam_model_plan(b, 2, 13, SLAM_TRAIN), "%s", slam_error());
    slam_adamw oa = adamw_new(a, 0.99, 0.1, 1), ob = adamw_new(b, 0.99, 0.1, 1);
    for (uint64_t k = 0; k < 4; k++) {
        update(a, &oa, 100 + k, 0), update(b, &ob, 100 + k, 0);
        if (k == 1) update(a, &oa, 99, 1), trainer.skipped++;
    }
    trainer.step = 4, trainer.steps = 10;
    CHECK(folder_create(run) && slam_checkpoint_save(run, a, &oa, &trainer, SLAM_FORMAT_HF, 0), "%s", slam_error());
    slam_adamw_free(&oa);
    slam_model_free(a);
    folder = slam_run_model(run, NULL);
    if (!CHECK(folder && slam_trainer_load(&loaded, folder), "%s", slam_error())) return;
    a = slam_model_load(ops, folder);
    CHECK(a && slam_model_plan(a, 2, 13, SLAM_TRAIN), "%s", slam_error());
    oa = adamw_new(a, 0.99, 0.1, 1);
    CHECK(optimiser_load(&oa, folder, loaded.step), "%s", slam_error());
    CHECK(oa.updates == 4 && loaded.step == 4 && loaded.skipped == 1,
          "%ld updates; trainer.json: step %ld, %ld skipped", oa.updates, loaded.step, loaded.skipped);
    update(a, &oa, 200, 0), update(b, &ob, 200, 0);
    CHECK(same_floats(a->master, b->master, a->n_weights), "the resumed run's next update is another one");
    tensors *file = tensors_open(path_join(folder, "optimizer.safetensors").at);
    size_t n = 0, negative[2] = {0, 0};
    for (int k = 0; CHECK(file, "%s", slam_error()) && k < 2; k++) {
        float *x = floats(file, k ? "model.layers.0.mlp.up_proj.weight.v" : "model.layers.0.mlp.up_proj.weight.m", &n);
        for (size_t i = 0; i < n; i++) negative[k] += x[i] < 0;
        free(x);
    }
    CHECK(n == 24 * 40 && negative[0] > n / 4 && negative[1] == 0, "%zu numbers, negative: %zu of m, %zu of v", n,
          negative[0], negative[1]);
    tensors_close(file);
    slam_config wide = c;
    wide.F += 8;
    slam_model *other = slam_model_new(ops, &wide, 1);
    CHECK(slam_model_plan(other, 2, 13, SLAM_TRAIN), "%s", slam_error());
    slam_adamw oc = adamw_new(other, 0.99, 0.1, 1);
    CHECK(!optimiser_load(&oc, folder, loaded.step) && strstr(slam_error(), "has shape"),
          "moments of another shape are loaded: %s", slam_error());
    slam_adamw_free(&oc), slam_model_free(other);
    slam_trainer_free(&loaded);
    slam_adamw_free(&oa), slam_adamw_free(&ob);
    slam_model_free(a), slam_model_free(b);
    remove_tree(run);
    free(folder);
}

/* Weight decay concerns matrices alone: without a gradient they shrink, norms and biases stay. */
static void test_decay(slam_ops *ops) {
    if (!TEST("weight decay: matrices only")) return;
    const slam_config c = small();
    slam_model *m = slam_model_new(ops, &c, 1);
    slam_step step;
    CHECK(slam_model_plan(m, 2, 13, SLAM_TRAIN), "%s", slam_error());
    for (size_t i = 0; i < m->n_weights; i++) m->master[i] = 1;
    slam_adamw o = adamw_new(m, 0.99, 0.5, 0);
    CHECK(slam_adamw_step(&o, 0.1, &step), "%s", slam_error());
    for (size_t k = 0; k < m->layout->tensors.n; k++) {
        const model_tensor *t = &m->layout->tensors.list[k];
        const int matrix = strstr(t->name, "_proj.weight") || strstr(t->name, "embed") || strstr(t->name, "lm_head");
        for (size_t i = 0; i < tensor_size(t); i++)
            if (!check_near(t->name, m->master[t->offset + i], matrix ? 0.95 : 1, 1e-6)) break;
    }
    slam_adamw_free(&o);
    slam_model_free(m);
}

/* ---- decoding ---- */

/* Logits of every step against those of whole passes over what is there by then. */
static void test_cache(slam_model *m) {
    enum { STEPS = 70, SLOTS = 3 };
    if (!TEST("decoding: a cache against none, %s", families[m->config.family].type)) return;
    const int V = m->config.V, first[SLOTS] = {1, 64, 127}, slots[SLOTS] = {2, 0, 1};
    const slam_sampling hot = {1.5, 0, 1, 1};
    int tokens[SLOTS][256], n[SLOTS];
    const int *at[SLOTS] = {tokens[0], tokens[1], tokens[2]};
    float *got = NEW(float, (size_t)SLOTS *V *STEPS), *scratch = NEW(float, V), *whole = NEW(float, (size_t)256 * V);
    uint64_t stream = 5;
    slam_decoder *d = slam_decoder_new(m, SLOTS, 200);
    for (int b = 0; b < SLOTS; b++) {
        n[b] = first[b];
        for (int t = 0; t < n[b]; t++) tokens[b][t] = t ? 2 + (int)rng_below(&stream, (uint64_t)V - 2) : 1;
    }
    if (!CHECK(d && slam_decoder_start(d, SLOTS, slots, at, n), "%s", slam_error())) return;
    for (int k = 0; k < STEPS; k++) {
        float *logits = got + (size_t)k * SLOTS * V;
        CHECK(slam_decoder_logits(d, logits), "%s", slam_error());
        for (int b = 0; b < SLOTS; b++) {
            memcpy(scratch, logits + (size_t)slots[b] * V, V * sizeof(float));
            tokens[b][n[b]] = slam_sample(scratch, V, NULL, &hot, rng_uniform(&stream));
            slam_decoder_append(d, slots[b], tokens[b][n[b]++]);
        }
        if (k == 30) { // another pass in between, with a plan for more
            slam_batch other = slam_batch_new(2, 300, 0);
            CHECK(slam_model_plan(m, 2, 300, SLAM_INFERENCE) && slam_forward(m, &other), "%s", slam_error());
            slam_batch_free(&other);
        }
    }
    for (int b = 0; b < SLOTS; b++) {
        slam_batch one = slam_batch_new(1, n[b], 0);
        double worst = 0;
        memcpy(one.tokens, tokens[b], n[b] * sizeof(int));
        CHECK(slam_model_plan(m, 1, n[b], SLAM_INFERENCE) && slam_logits(m, &one, whole), "%s", slam_error());
        for (int k = 0; k < STEPS; k++)
            for (int v = 0; v < V; v++)
                worst = fmax(worst, fabs(got[((size_t)k * SLOTS + slots[b]) * V + v] -
                                         whole[(size_t)(first[b] - 1 + k) * V + v]));
        check_near("logits", worst, 0, 5e-5); // of numbers up to 20, in float
        slam_batch_free(&one);
    }
    free(got), free(scratch), free(whole);
    slam_decoder_free(d);
}

static void test_cache_of(slam_ops *ops, slam_config c) {
    c.T = 256, c.init_std = 0.3;
    slam_model *m = slam_model_new(ops, &c, 3);
    test_cache(m);
    slam_model_free(m);
}

/* The same sequence beside others, in another slot, started alone or together, has the same bits. */
static void test_company(slam_model *m) {
    enum { STEPS = 6 };
    if (!TEST("decoding: other sequences change nothing")) return;
    const int V = m->config.V, length = 70, lengths[3] = {5, length, 150};
    int tokens[3][256];
    const int *at[3] = {tokens[0], tokens[1], tokens[2]};
    float *alone = NEW(float, (size_t)STEPS *V), *logits = NEW(float, (size_t)5 * V);
    uint64_t stream = 6;
    for (int b = 0; b < 3; b++)
        for (int t = 0; t < 256; t++) tokens[b][t] = 1 + (int)rng_below(&stream, (uint64_t)V - 1);
    for (int company = 0; company < 3; company++) {
        slam_decoder *d = slam_decoder_new(m, company ? 5 : 1, company == 2 ? 256 : 160);
        const int slots[3] = {4, company ? 2 : 0, 1}, slot = slots[1];
        if (company == 0) CHECK(slam_decoder_start(d, 1, &slot, &at[1], &length), "%s", slam_error());
        else CHECK(slam_decoder_start(d, 3, slots, at, lengths), "%s", slam_error());
        for (int k = 0; k < STEPS; k++) {
            CHECK(slam_decoder_logits(d, logits), "%s", slam_error());
            if (company == 0) memcpy(alone + (size_t)k * V, logits, V * sizeof(float));
            CHECK(same_floats(logits + (size_t)slot * V, alone + (size_t)k * V, V), "company %d, step %d", company, k);
            slam_decoder_append(d, slot, tokens[1][length + k]);
            if (company) slam_decoder_append(d, 4, k == 2 ? -1 : 7);
            if (company && k == 3) CHECK(slam_decoder_start(d, 1, &slots[0], &at[2], &lengths[2]), "%s", slam_error());
        }
        slam_decoder_free(d);
    }
    free(alone), free(logits);
}

static void test_decoder_limits(slam_model *m) {
    if (!TEST("decoding: limits")) return;
    int tokens[10] = {1, 2, 3, 4, 5}, slot = 0, length = 3;
    const int *at = tokens;
    float *logits = NEW(float, m->config.V);
    slam_decoder *d = slam_decoder_new(m, 1, 4);
    check_fails(slam_decoder_new(m, 0, 4), "0 sequences");
    check_fails(slam_decoder_new(m, 1 << 20, 1 << 20), "2^29");
    CHECK(slam_decoder_logits(d, logits), "a step without a sequence: %s", slam_error());
    slot = 1, check_fails(slam_decoder_start(d, 1, &slot, &at, &length), "slot 1");
    slot = 0, length = 5, check_fails(slam_decoder_start(d, 1, &slot, &at, &length), "5 tokens");
    length = 0, check_fails(slam_decoder_start(d, 1, &slot, &at, &length), "0 tokens");
    tokens[1] = m->config.V, length = 3, check_fails(slam_decoder_start(d, 1, &slot, &at, &length), "position 1");
    tokens[1] = 2, CHECK(slam_decoder_start(d, 1, &slot, &at, &length), "%s", slam_error());
    CHECK(slam_decoder_logits(d, logits), "%s", slam_error());
    check_fails(slam_decoder_append(d, 0, m->config.V), "for slot 0, expected below");
    check_fails(slam_decoder_append(d, 1, 4), "token 4 for slot 1");
    check_fails(slam_decoder_append(d, -1, -1), "slot -1");
    CHECK(d->length[0] == 3 && slam_decoder_append(d, 0, 4), "%s", slam_error());
    CHECK(slam_decoder_logits(d, logits) && d->length[0] == 4, "%s", slam_error());
    check_fails(slam_decoder_append(d, 0, 5), "has 4 tokens");
    CHECK(slam_decoder_append(d, 0, -1), "%s", slam_error());
    CHECK(d->length[0] == 0 && slam_decoder_logits(d, logits), "%s", slam_error());
    tokens[0] = m->config.V, length = 1, check_fails(slam_decoder_start(d, 1, &slot, &at, &length), "position 0");
    CHECK(d->length[0] == 0, "a sequence that failed to start has %d tokens", d->length[0]);
    free(logits);
    slam_decoder_free(d);
}

/* ---- sampling ---- */

/* The probabilities p (V) of a draw from logits: where it passes from one token to the next as the uniform number grows is found by
   bisection. */
static void distribution(const float *logits, int V, const unsigned char *seen, const slam_sampling *s, double *p) {
    float *z = NEW(float, V);
    double before = 0;
    for (int v = 0; v < V; v++) {
        double low = before, high = 1; // up to low token v or less is drawn, from high on a later one
        for (int k = 0; k < 24 && low < high; k++) {
            const double u = (low + high) / 2;
            memcpy(z, logits, V * sizeof *z);
            const int drawn = slam_sample(z, V, seen, s, u);
            *(drawn <= v ? &low : &high) = u;
        }
        p[v] = high - before;
        before = high;
    }
    free(z);
}

static void test_distributions(slam_model *m, const tensors *file) {
    const tensor *prompts = need(file, "prompts"), *lengths = need(file, "lengths");
    const int V = m->config.V, P = (int)lengths->count, stride = (int)(prompts->count / lengths->count);
    for (int k = 0;; k++) {
        char name[64];
        double given[4], worst = 0;
        snprintf(name, sizeof name, "sampled.%d.settings", k);
        if (!tensors_find(file, name)) break;
        if (!TEST("Transformers: sampling %d", k)) continue;
        double *p = NEW(double, V);
        memcpy(given, need(file, name)->data, sizeof given);
        const slam_sampling s = {given[0], (int)given[1], given[2], given[3]};
        snprintf(name, sizeof name, "sampled.%d", k);
        const tensor *drawn = need(file, name);
        const int steps = (int)drawn->count / P, slot = 0;
        snprintf(name, sizeof name, "sampled.%d.probabilities", k);
        float *expected = floats(file, name, NULL), *logits = NEW(float, V);
        slam_decoder *d = slam_decoder_new(m, 1, stride + steps);
        for (int b = 0; b < P; b++) {
            int tokens[256], n;
            const int *at = tokens;
            unsigned char *seen = NEW(unsigned char, V);
            memcpy(&n, lengths->data + 4 * b, 4);
            memcpy(tokens, prompts->data + (size_t)4 * b * stride, 4 * (size_t)n);
            for (int t = 0; t < n; t++) seen[tokens[t]] = 1;
            CHECK(slam_decoder_start(d, 1, &slot, &at, &n), "%s", slam_error());
            for (int i = 0; i < steps; i++) {
                int next;
                CHECK(slam_decoder_logits(d, logits), "%s", slam_error());
                distribution(logits, V, seen, &s, p);
                for (int v = 0; v < V; v++) worst = fmax(worst, fabs(p[v] - expected[((size_t)b * steps + i) * V + v]));
                memcpy(&next, drawn->data + 4 * ((size_t)b * steps + i), 4);
                seen[next] = 1;
                slam_decoder_append(d, 0, next);
            }
            free(seen);
        }
        check_near("probabilities", worst, 0, 1e-5);
        slam_decoder_free(d);
        free(expected), free(logits), free(p);
    }
}

static void test_sampling(void) {
    if (!TEST("sampling: ties, padding, NaN, what cannot be")) return;
    const float z[6] = {9, 1, 3, 3, 2, NAN}; // token 0 is padding
    const slam_sampling greedy = {0, 0, 1, 1}, one = {1, 1, 1, 1}, tiny_p = {1, 0, 0, 1}, penalty = {0, 0, 1, 2},
                        all = {1, 0, 1, 1};
    const unsigned char seen[6] = {0, 0, 1, 1, 0, 0};
    double p[6];
    float x[6];
    CHECK(slam_sample((float *)memcpy(x, z, sizeof z), 6, NULL, &greedy, 0.9) == 2, "greedy: the first of the largest");
    CHECK(slam_sample((float *)memcpy(x, z, sizeof z), 6, seen, &penalty, 0.9) == 4, "a penalty on the largest");
    distribution(z, 6, NULL, &one, p);
    check_near("top-k keeps ties", fabs(p[2] - 0.5) + fabs(p[3] - 0.5), 0, 1e-6);
    distribution(z, 6, NULL, &tiny_p, p);
    check_near("top-p keeps ties", fabs(p[2] - 0.5) + fabs(p[3] - 0.5), 0, 1e-6);
    distribution(z, 6, NULL, &all, p);
    check_near("token 0 and NaN", p[0] + p[5], 0, 1e-6);
    check_near("softmax", p[4], exp(2) / (exp(1) + 2 * exp(3) + exp(2)), 1e-6);
    static const struct {
        slam_sampling s;
        const char *error;
    } bad[] = {{{1, 0, 1.5, 1}, "top-p of 1.5"},
               {{1, 0, NAN, 1}, "top-p"},
               {{-1, 0, 1, 1}, "temperature of -1"},
               {{1, 0, 1, 0}, "penalty of 0"},
               {{1, -1, 1, 1}, "top-k of -1"}};
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++) {
        memcpy(x, z, sizeof z);
        check_fails(slam_sample(x, 6, NULL, &bad[k].s, 0) >= 0, bad[k].error);
    }
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    slam_config a = make_config(19, 24, 2, 6, 2, 4, 20, 1, SLAM_QWEN2), b = make_config(7, 10, 3, 1, 1, 6, 9, 0, 0);
    a.init_std = b.init_std = 0.2, a.rope_theta = 100, b.eps = 1e-3;
    test_fixtures(ops);
    test_schedules();
    test_adamw(ops);
    test_sizes();
    test_head_rows();
    test_memory(ops);
    test_finite_differences(ops, a, 0);
    test_finite_differences(ops, b, 1);
    for (int family = 0; family < FAMILIES; family++) {
        test_finite_differences(ops, small_of(family), 1);
        test_recompute(ops, small_of(family));
        test_packing(ops, small_of(family));
        test_cache_of(ops, small_of(family));
    }
    test_padded_vocabulary(ops);
    test_backward(ops);
    test_save_and_load(ops);
    test_configs();
    test_damaged_weights(ops);
    test_unused_tensors(ops);
    test_tied_head(ops);
    test_hash(ops);
    test_bad_batches(ops);
    test_skipped_update(ops);
    test_resume_after_skip(ops);
    test_decay(ops);
    slam_model *m = slam_model_load(ops, FIXTURES "generate");
    tensors *file = tensors_open(FIXTURES "generate/generated.safetensors");
    if (CHECK(m && file, "%s", slam_error())) {
        test_cache(m);
        test_company(m);
        test_decoder_limits(m);
        test_distributions(m, file);
    }
    test_sampling();
    tensors_close(file);
    slam_model_free(m);
    slam_ops_free(ops);
    return check_end();
}
