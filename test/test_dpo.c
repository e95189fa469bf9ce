/* Preference pairs and DPO: against its formula in PyTorch (fixture made by test/reference_dpo.py), shared prompts against separate
   ones, reading, packing, order, the file of the reference. Run from the repository's root. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FIXTURE "test/fixtures/dpo/"
enum { PROMPT, CHOSEN, REJECTED };
static const char *const part_names[] = {"prompt", "chosen", "rejected"};

static slam_pairs pairs_new(int V, int context, int share, double max_repetition) {
    slam_pairs p = ZERO;
    p.V = V;
    p.context = context;
    p.share = share;
    p.max_repetition = max_repetition;
    return p;
}

static slam_pairs pairs_of(const char *path, int V, int context, int share) {
    slam_pairs p = pairs_new(V, context, share, 0);
    CHECK(slam_pairs_add(&p, path, 0) && slam_pairs_prepare(&p, 0, 0), "%s", slam_error());
    return p;
}

/* n random pairs with prompts, chosen and rejected completions of up to these numbers of units, as a file. */
static const char *random_pairs(const char *name, int n, int V, const int most[3], uint64_t seed) {
    strbuf s = ZERO;
    for (int i = 0; i < n; i++)
        for (int part = 0; part < 3; part++) {
            const int length =
                part ? 1 + (int)rng_below(&seed, (uint64_t)most[part]) : (int)rng_below(&seed, (uint64_t)most[0] + 1);
            strbuf_add(&s, "%s\"%s\": {\"units\": [", part ? ", " : "{", part_names[part]);
            for (int k = 0; k < length; k++)
                strbuf_add(&s, "%s%d", k ? ", " : "", (int)rng_below(&seed, (uint64_t)V - 2));
            strbuf_add(&s, "]}%s", part == 2 ? "}\n" : "");
        }
    const char *path = check_file(name, s.at, s.n);
    strbuf_free(&s);
    return path;
}

static const slam_config small = {27, 24, 2, 3, 1, 8, 40, 256, 1, 1, 1e-6, 0.3, 10000, 0, 0, 0, 0, 0};

/* ---- the loop over batches, as in dpo.c ---- */

typedef struct metrics {
    double loss, margin, accuracy, logp_chosen, logp_rejected, pairs;
} metrics;

/* Forward pass and, if n_pairs is not 0, backward pass for the loss / n_pairs. logp (NULL: not wanted): of item i. */
static int dpo_batch(slam_model *m, const slam_pairs *p, slam_batch *b, double beta, double smoothing, double n_pairs,
                     metrics *sum, double *logp) {
    float *weights = NEW(float, (size_t)b->B *(size_t)b->T);
    const double before = sum->loss;
    int ok = CHECK(slam_forward(m, b), "%s", slam_error());
    for (size_t k = 0; ok && k < b->n_sequences; k += 2) {
        const slam_sequence *s = &b->sequences[k];
        const double *reference = &p->reference[s->item];
        double logps[2], slope;
        ok = CHECK(s[0].item % 2 == 0 && s[1].item == s[0].item + 1, "items %zu, %zu", s[0].item, s[1].item);
        for (int side = 0; side < 2; side++) logps[side] = slam_sequence_logp(b, &s[side]);
        const double margin = (logps[0] - reference[0]) - (logps[1] - reference[1]);
        sum->loss += slam_dpo_loss(beta, smoothing, margin, &slope);
        sum->margin += margin;
        sum->accuracy += margin > 0;
        sum->logp_chosen += logps[0];
        sum->logp_rejected += logps[1];
        sum->pairs++;
        for (int side = 0; side < 2; side++) {
            if (logp) logp[s[side].item] = logps[side];
            for (int i = s[side].first; i < s[side].end && n_pairs > 0; i++)
                weights[i] = (float)((side ? slope : -slope) / n_pairs);
        }
    }
    if (ok && n_pairs > 0) ok = CHECK(slam_backward(m, weights, sum->loss - before), "%s", slam_error());
    free(weights);
    return ok;
}

/* The next `pairs` pairs of a loader, `micro` rows at a time: means. */
static metrics dpo_step(slam_model *m, slam_loader *l, int pairs, int micro, double beta, double smoothing, int train,
                        double *logp) {
    const slam_pairs *p = (const slam_pairs *)l->packer->context;
    metrics sum = ZERO;
    slam_batch b = slam_batch_new(micro, p->T, p->share);
    const int n = slam_loader_begin(l, pairs, NULL);
    while (slam_loader_next(l, &b) > 0)
        if (!dpo_batch(m, p, &b, beta, smoothing, train ? n : 0, &sum, logp)) break;
    CHECK(sum.pairs == n && l->n == n, "%g pairs of %d", sum.pairs, n);
    for (double *x = &sum.loss; x < &sum.pairs; x++) *x /= n;
    slam_batch_free(&b);
    return sum;
}

static int compute_reference(slam_pairs *p, slam_model *reference, int micro, slam_progress_fn *progress,
                             void *context) {
    slam_batch b = slam_batch_new(micro, p->T, p->share);
    const int ok = slam_model_plan(reference, micro, p->T, SLAM_INFERENCE) &&
                   slam_pairs_reference(p, reference, &b, progress, context);
    slam_batch_free(&b);
    return ok;
}

static void test_loss(void) {
    if (!TEST("the loss of a margin and its slope")) return;
    for (double D = -40; D <= 40; D += 2.5)
        for (double e = 0; e < 0.3; e += 0.1) {
            double slope, unused;
            const double loss = slam_dpo_loss(0.7, e, D, &slope), h = 1e-5, s = 1 / (1 + exp(-0.7 * D));
            check_near("loss", loss, -(1 - e) * log(s) - e * log(1 / (1 + exp(0.7 * D))), 1e-9 * (1 + loss));
            const double difference = slam_dpo_loss(0.7, e, D + h, &unused) - slam_dpo_loss(0.7, e, D - h, &unused);
            check_near("slope", slope, difference / (2 * h), 1e-8);
        }
    double slope;
    check_near("far below", slam_dpo_loss(1, 0, -1e4, &slope), 1e4, 1e-9);
    check_near("slope there", slope, -1, 0);
    check_near("far above", slam_dpo_loss(1, 0, 1e4, &slope), 0, 0);
}

/* ---- PyTorch ---- */

static double number_at(const tensors *file, const char *name, size_t i) {
    const tensor *t = tensors_find(file, name);
    double x = NAN;
    if (CHECK(t && t->count > i, "the fixture has no '%s'", name)) memcpy(&x, t->data + i * sizeof x, sizeof x);
    return x;
}

static void check_gradients(const slam_model *m, const tensors *file, const char *smoothing) {
    const model_tensors list = tensors_of(&m->config);
    for (size_t k = 0; k < list.n; k++) {
        char name[128];
        snprintf(name, sizeof name, "grad.%s.%s", smoothing, list.list[k].name);
        const tensor *t = tensors_find(file, name);
        float *expected = NEW(float, tensor_size(&list.list[k]));
        if (CHECK(t && tensor_floats(t, expected, 0, t->count), "no '%s' in the fixture", name))
            check_close(name, m->grads + list.list[k].offset, expected, tensor_size(&list.list[k]), 1e-4);
        free(expected);
    }
    free(list.list);
}

/* One step on all pairs of the fixture. */
static void test_torch(slam_ops *ops, const char *smoothing, int share, int context, int micro) {
    if (!TEST("PyTorch: smoothing %s, %s, context %d, %d rows at once", smoothing, share ? "shared" : "separate",
              context, micro))
        return;
    tensors *file = tensors_open(FIXTURE "pairs.safetensors");
    slam_model *policy = slam_model_load(ops, FIXTURE "policy"), *reference = slam_model_load(ops, FIXTURE "reference");
    if (!CHECK(file && policy && reference, "%s", slam_error())) return;
    slam_pairs p = pairs_of(FIXTURE "pairs.jsonl", policy->config.V, context, share);
    const double beta = number_at(file, "settings", 0), e = atof(smoothing);
    double logp[64], loss = 0, margin = 0, slope;
    char name[64];
    CHECK(!p.reference, "a reference before it is computed");
    CHECK(compute_reference(&p, reference, micro, NULL, NULL), "%s", slam_error());
    for (size_t i = 0; i < 2 * p.n; i++)
        check_near("reference", p.reference[i], number_at(file, "reference_logps", i), 1e-4);
    slam_loader *l = slam_loader_new_pairs(&p, 0, 1, 1);
    CHECK(l && slam_model_plan(policy, micro, p.T, SLAM_TRAIN), "%s", slam_error());
    const metrics mean = dpo_step(policy, l, (int)p.n, micro, beta, e, 1, logp);
    for (size_t i = 0; i < p.n; i++) {
        const double D = logp[2 * i] - p.reference[2 * i] - (logp[2 * i + 1] - p.reference[2 * i + 1]);
        for (size_t side = 0; side < 2; side++)
            check_near("log-probability", logp[2 * i + side], number_at(file, "logps", 2 * i + side), 1e-4);
        snprintf(name, sizeof name, "loss.%s", smoothing);
        check_near("loss of a pair", slam_dpo_loss(beta, e, D, &slope), number_at(file, name, i),
                   1e-4 * number_at(file, name, i));
        loss += number_at(file, name, i);
        snprintf(name, sizeof name, "margin.%s", smoothing);
        check_near("margin of a pair", D, number_at(file, name, i), 1e-4 * fabs(number_at(file, name, i)));
        margin += number_at(file, name, i);
    }
    check_near("mean loss", mean.loss, loss / (double)p.n, 1e-5);
    check_near("mean margin", mean.margin, margin / (double)p.n, 1e-4);
    check_near("statistics", policy->stats[0], loss, 1e-5);
    check_gradients(policy, file, smoothing);
    slam_loader_free(l);
    slam_pairs_free(&p);
    slam_model_free(policy);
    slam_model_free(reference);
    tensors_close(file);
}

/* ---- shared and separate prompts ---- */

typedef struct outcome {
    float *grads;
    size_t n;
    metrics mean;
    double loss_sum;
    uint64_t tokens, unshared, truncated;
    int rows;
} outcome;

/* Gradients of a step on the first `batch` pairs of a file, from a model that has moved away from its reference. */
static outcome step_on(slam_ops *ops, const char *path, int batch, int context, int share, int micro, int mode) {
    outcome out = ZERO;
    slam_model *m = slam_model_new(ops, &small, 3), *reference = slam_model_new(ops, &small, 4);
    slam_pairs p = pairs_of(path, small.V, context, share);
    slam_loader *l = slam_loader_new_pairs(&p, 0, 5, 1);
    if (CHECK(l && compute_reference(&p, reference, micro, NULL, NULL) && slam_model_plan(m, micro, p.T, mode), "%s",
              slam_error())) {
        out.mean = dpo_step(m, l, batch, micro, 0.2, 0.05, 1, NULL);
        out.n = m->n_weights;
        out.grads = NEW(float, out.n);
        memcpy(out.grads, m->grads, out.n * sizeof *out.grads);
        out.loss_sum = m->stats[0];
        out.rows = l->rows;
        out.tokens = l->tokens;
        out.unshared = p.unshared;
        out.truncated = p.truncated;
    }
    slam_loader_free(l);
    slam_pairs_free(&p);
    slam_model_free(m);
    slam_model_free(reference);
    return out;
}

static void check_outcomes(const outcome *a, const outcome *b, double tolerance) {
    if (!CHECK(a->grads && b->grads, "a step failed")) return;
    check_close("gradients", a->grads, b->grads, a->n, tolerance);
    check_near("loss", a->mean.loss, b->mean.loss, tolerance);
    check_near("margin", a->mean.margin, b->mean.margin, tolerance * (1 + fabs(b->mean.margin)));
    check_near("log-probabilities", a->mean.logp_chosen, b->mean.logp_chosen, tolerance * fabs(b->mean.logp_chosen));
    check_near("sum of losses", a->loss_sum, b->loss_sum, 1e-6 * fabs(b->loss_sum));
}

static void test_shared(slam_ops *ops) {
    const int most[3] = {40, 15, 15};
    char *path = string_copy(random_pairs("shared.jsonl", 60, small.V, most, 7));
    const outcome separate = step_on(ops, path, 60, 128, 0, 4, SLAM_TRAIN);
    if (TEST("a shared prompt: the same as separate ones, in fewer tokens")) {
        const outcome shared = step_on(ops, path, 60, 128, 1, 4, SLAM_TRAIN);
        check_outcomes(&shared, &separate, 1e-5);
        CHECK(shared.tokens < separate.tokens * 3 / 4, "%d and %d tokens", (int)shared.tokens, (int)separate.tokens);
        free(shared.grads);
    }
    if (TEST(
            "pairs that do not fit shared are computed separately")) { // context 64: up to 72 shared, up to 57 separate
        const outcome some = step_on(ops, path, 60, 64, 1, 3, SLAM_TRAIN);
        CHECK(some.unshared > 0 && some.unshared < 20 && some.truncated == 0, "%d unshared, %d truncated",
              (int)some.unshared, (int)some.truncated);
        check_outcomes(&some, &separate, 1e-5);
        free(some.grads);
    }
    if (TEST("rows at once change the last bits at most")) {
        const outcome one = step_on(ops, path, 60, 128, 1, 1, SLAM_TRAIN),
                      many = step_on(ops, path, 60, 128, 1, 64, SLAM_TRAIN),
                      again = step_on(ops, path, 60, 128, 1, 64, SLAM_TRAIN_RECOMPUTE);
        check_outcomes(&one, &many, 1e-6);
        CHECK(one.rows == many.rows, "%d rows and %d", one.rows, many.rows);
        CHECK(!memcmp(many.grads, again.grads, many.n * sizeof(float)), "recomputed gradients differ");
        free(one.grads), free(many.grads), free(again.grads);
    }
    free(separate.grads);
    free(path);
}

/* The slope of the loss along the gradient is the gradient's norm. */
static void test_finite_differences(slam_ops *ops) {
    const int most[3] = {20, 10, 10};
    if (!TEST("finite differences")) return;
    slam_model *m = slam_model_new(ops, &small, 3), *reference = slam_model_new(ops, &small, 4);
    slam_pairs p = pairs_of(random_pairs("slope.jsonl", 12, small.V, most, 11), small.V, 64, 1);
    slam_loader *l = slam_loader_new_pairs(&p, 0, 5, 0);
    double loss[2], norm = 0;
    CHECK(compute_reference(&p, reference, 2, NULL, NULL) && slam_model_plan(m, 2, p.T, SLAM_TRAIN), "%s",
          slam_error());
    dpo_step(m, l, 12, 2, 0.5, 0.1, 1, NULL);
    const size_t n = m->n_weights;
    float *kept = NEW(float, n), *g = NEW(float, n);
    memcpy(kept, m->master, n * sizeof *kept);
    memcpy(g, m->grads, n * sizeof *g);
    for (size_t i = 0; i < n; i++) norm += (double)g[i] * g[i];
    norm = sqrt(norm);
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < n; i++) m->master[i] = kept[i] + (float)((side ? 3e-3 : -3e-3) * g[i] / norm);
        slam_loader_seek(l, 0, 0);
        loss[side] = dpo_step(m, l, 12, 2, 0.5, 0.1, 0, NULL).loss;
    }
    check_near("slope", (loss[1] - loss[0]) / 6e-3 / norm, 1, 2e-3);
    free(kept), free(g);
    slam_loader_free(l);
    slam_pairs_free(&p);
    slam_model_free(m);
    slam_model_free(reference);
}

/* ---- reading ---- */

static void test_truncated(void) {
    static const char line[] =
        "{\"prompt\": \"<Un1><Un2><Un3><Un4><Un5><Un6>\", \"chosen\": \"<Un7><Un8>\", \"rejected\": \"<Un9>\"}\n";
    static const char large[] = "{\"prompt\": \"\", \"chosen\": \"<Un7><Un8><Un1>\", \"rejected\": \"<Un9>\"}\n";
    const char *path = check_file("truncated.jsonl", line, sizeof line - 1);
    const int expected[] = {6, 6, 5, 4, 3, 2, 1, 0}; // contexts 11, 10 = 1 + 6 + 2 + 1, 9, ...
    if (!TEST("a prompt that is too long loses its beginning")) return;
    for (int context = 11; context >= 4; context--) {
        slam_pairs p = pairs_of(path, 20, context, 0);
        const int n = expected[11 - context],
                  all[] = {1, 3, 4, 5, 6, 7, 8, 9, 10, 1, 11, 1}; // prompt, chosen, rejected
        if (CHECK(p.n == 1 && (int)p.at[0].n_prompt == 1 + n && (int)p.truncated == (n < 6), "context %d: %d units",
                  context, (int)p.at[0].n_prompt - 1)) {
            CHECK(p.at[0].n_chosen == 3 && p.at[0].n_rejected == 2, "%u, %u", p.at[0].n_chosen, p.at[0].n_rejected);
            for (int k = 0; k < n + 6; k++)
                CHECK(p.at[0].tokens[k] == (k ? all[6 - n + k] : 1), "context %d: token %d is %d", context, k,
                      p.at[0].tokens[k]);
        }
        slam_pairs_free(&p);
    }
    slam_pairs p = pairs_new(20, 4, 0, 0);
    CHECK(slam_pairs_add(&p, check_file("large.jsonl", large, sizeof large - 1), 0) && p.skipped[SLAM_TOO_LONG] == 1,
          "%s", slam_error());
    check_fails(slam_pairs_prepare(&p, 0, 0), "1 too long");
    slam_pairs_free(&p);
}

static void test_lines(void) {
    static const char good[] =
        "\n  \n"
        "{\"prompt\": \"\", \"chosen\": \"<Un0>\", \"rejected\": {\"units\": [1]}}\r\n"
        "{\"prompt\": \"<Un1>\", \"chosen\": \"\", \"rejected\": \"<Un2>\"}\n"
        "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2>\", \"rejected\": {\"audio_repr\": \"\"}}\n"
        "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2><Un3>\", \"rejected\": {\"units\": [2, 3]}}\n"
        "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2>\", \"rejected\": \"<Un3>\", \"prompt_text\": \"on and on\", "
        "\"chosen_text\": \"and on and on\"}\n"
        "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2>\", \"rejected\": \"<Un3>\", \"prompt_text\": 7, "
        "\"chosen_text\": null}";
    const char *const bad[][2] = {
        {"[]", "bad.jsonl:2: 'prompt' is missing"},
        {"{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\"}", "bad.jsonl:2: 'rejected' is missing"},
        {"{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\", \"rejected\": null}", "bad.jsonl:2: 'rejected' is missing"},
        {"{\"prompt\": \"<Un1>\", \"chosen\": \"<Un18>\", \"rejected\": \"<Un1>\"}",
         "bad.jsonl:2: 'chosen': unit 1 is 18, expected below 18 (the vocabulary is 20)"},
        {"{\"prompt\": {\"units\": [1, -1]}, \"chosen\": \"<Un18>\", \"rejected\": \"<Un1>\"}",
         "bad.jsonl:2: 'prompt': 'units' has -1"},
        {"{\"prompt\": {\"units\": [1], \"duration\": []}, \"chosen\": \"<Un8>\", \"rejected\": \"<Un1>\"}",
         "'prompt': has 0 durations, expected 1"},
        {"{\"prompt\": \"<Un1\", \"chosen\": \"<Un1>\", \"rejected\": \"<Un2>\"}",
         "bad.jsonl:2: 'prompt': unit 1 is '<Un1'"},
        {"{\"prompt\": {}, \"chosen\": \"<Un1>\", \"rejected\": \"<Un2>\"}",
         "'prompt': found an object, expected 'units' or 'audio_repr'"},
        {"{\"prompt\": ", "bad.jsonl:2"},
        {"\xff", "bad.jsonl:2"},
    };
    if (!TEST("lines of every kind")) return;
    slam_pairs p = pairs_new(20, 32, 1, 0.3);
    CHECK(slam_pairs_add(&p, check_file("good.jsonl", good, sizeof good - 1), 0), "%s", slam_error());
    CHECK(p.n == 2 && p.skipped[SLAM_EMPTY] == 2 && p.skipped[SLAM_IDENTICAL] == 1 && p.skipped[SLAM_REPETITIVE] == 1,
          "%zu pairs", p.n);
    CHECK(p.at[0].n_prompt == 1 && p.at[0].tokens[1] == 2 && p.at[0].tokens[3] == 3, "the first pair");
    slam_pairs_free(&p);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        strbuf s = ZERO;
        strbuf_add(&s, "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\", \"rejected\": \"<Un2>\"}\n%s\n", bad[i][0]);
        p = pairs_new(20, 32, 1, 0.3);
        check_fails(slam_pairs_add(&p, check_file("bad.jsonl", s.at, s.n), 0), bad[i][1]);
        slam_pairs_free(&p);
        strbuf_free(&s);
    }
    p = pairs_new(20, 32, 1, 0.3);
    check_fails(slam_pairs_add(&p, check_path("absent.jsonl"), 0), "no such file");
    check_fails(slam_pairs_add(&p, "test/test_dpo.c", 0), "expected preference pairs");
    check_fails(slam_pairs_add(&p, "test", 0), "expected preference pairs");
    CHECK(slam_pairs_add(&p, check_file("empty.jsonl", "", 0), 0), "%s", slam_error());
    check_fails(slam_pairs_prepare(&p, 0, 0),
                "no pairs left to train on: 0 are held out for validation; skipped: none");
    check_fails(slam_loader_new_pairs(&p, 0, 0, 1), "a loader of no prepared pairs");
    slam_pairs_free(&p);
    p = pairs_new(20, 3, 1, 0);
    check_fails(slam_pairs_add(&p, check_path("good.jsonl"), 0), "context of 3");
    p = pairs_new(2, 32, 1, 0);
    check_fails(slam_pairs_add(&p, check_path("good.jsonl"), 0), "expected below 0 (the vocabulary is 2)");
    slam_pairs_free(&p);
    p = pairs_new(20, 32, 1, 0);
    static const char same[] = "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\", \"rejected\": \"<Un1>\"}\n";
    CHECK(slam_pairs_add(&p, check_path("good.jsonl"), 0), "%s", slam_error());
    check_fails(slam_pairs_add(&p, check_file("same.jsonl", same, sizeof same - 1), 1),
                "same.jsonl: contains no pairs to validate on; skipped: 1 with identical completions");
    check_fails(slam_loader_new_pairs(&p, 0, 0, 1), "a loader of no prepared pairs");
    CHECK(slam_pairs_prepare(&p, 0, 0), "%s", slam_error());
    check_fails(slam_loader_new_pairs(&p, 1, 0, 1), "a loader of no prepared pairs");
    CHECK(slam_pairs_add(&p, check_path("good.jsonl"), 1), "%s", slam_error());
    check_fails(slam_pairs_add(&p, check_path("good.jsonl"), 0), "add pairs for training before validation");
    slam_pairs_free(&p);
    p = pairs_new(20, 32, 1, 0);
    CHECK(slam_pairs_add(&p, check_path("same.jsonl"), 0) && slam_pairs_add(&p, check_path("same.jsonl"), 0), "%s",
          slam_error());
    check_fails(slam_pairs_prepare(&p, 0, 0), "skipped: 2 with identical completions");
    slam_pairs_free(&p);
}

static int same_pair(const slam_pair *a, const slam_pair *b) {
    return a->n_prompt == b->n_prompt && a->n_chosen == b->n_chosen && a->n_rejected == b->n_rejected &&
           !memcmp(a->tokens, b->tokens, (a->n_prompt + a->n_chosen + a->n_rejected) * sizeof *a->tokens);
}

static void test_held_out(void) {
    const int most[3] = {12, 12, 12};
    if (!TEST("pairs that are held out, and those that are given")) return;
    char *path = string_copy(random_pairs("train.jsonl", 100, 50, most, 3));
    char *other = string_copy(random_pairs("val.jsonl", 7, 50, most, 4));
    slam_pairs p[2];
    for (int k = 0; k < 2; k++) { // by seeds 5 and 6
        p[k] = pairs_new(50, 64, 1, 0);
        CHECK(slam_pairs_add(&p[k], path, 0) && slam_pairs_add(&p[k], other, 1) &&
                  slam_pairs_prepare(&p[k], 0.1, 5 + k),
              "%s", slam_error());
    }
    slam_pairs given = pairs_of(other, 50, 64, 1), whole = pairs_of(path, 50, 64, 1);
    CHECK(p[0].n == 107 - (100 - whole.n) - (7 - given.n) && p[0].n - p[0].n_train == given.n + (whole.n + 5) / 10,
          "%zu of %zu to train on", p[0].n_train, p[0].n);
    for (size_t i = 0; i < whole.n + given.n; i++) {
        const slam_pair *q = i < whole.n ? &whole.at[i] : &given.at[i - whole.n];
        int times = 0, validation = 0;
        for (size_t k = 0; k < p[0].n; k++)
            if (same_pair(&p[0].at[k], q)) times++, validation = k >= p[0].n_train;
        CHECK(times == 1 && (i < whole.n || validation), "pair %zu: %d times", i, times);
    }
    CHECK(p[0].hash != p[1].hash, "another seed holds the same out");
    for (int k = 0; k < 2; k++) slam_pairs_free(&p[k]);
    slam_pairs_free(&given), slam_pairs_free(&whole);
    free(path), free(other);
}

static void test_hash(void) {
    static const char *const lines[] = {
        "{\"prompt\": \"<Un1><Un2>\", \"chosen\": \"<Un3>\", \"rejected\": \"<Un4><Un5>\"}\n",
        "{\"prompt\": \"<Un1><Un3>\", \"chosen\": \"<Un3>\", \"rejected\": \"<Un4><Un5>\"}\n",
        "{\"prompt\": \"<Un1><Un2>\", \"chosen\": \"<Un2>\", \"rejected\": \"<Un4><Un5>\"}\n",
        "{\"prompt\": \"<Un1><Un2>\", \"chosen\": \"<Un3>\", \"rejected\": \"<Un4><Un6>\"}\n",
        "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2><Un3>\", \"rejected\": \"<Un4><Un5>\"}\n",
    };
    uint64_t hash[5];
    if (!TEST("the hash tells any other unit and length")) return;
    for (int i = 0; i < 5; i++) {
        slam_pairs p = pairs_of(check_file("hash.jsonl", lines[i], strlen(lines[i])), 20, 24, 1);
        hash[i] = p.hash;
        for (int k = 0; k < i; k++) CHECK(hash[i] != hash[k], "lines %d and %d", k, i);
        slam_pairs_free(&p);
    }
}

/* ---- rows and order ---- */

/* What a row holds, token by token. */
static void test_rows(void) {
    static const char lines[] = "{\"prompt\": \"<Un1><Un2>\", \"chosen\": \"<Un3>\", \"rejected\": \"<Un4><Un5>\"}\n";
    const char *path = check_file("rows.jsonl", lines, sizeof lines - 1);
    // token, target, doc_start, mask_start, mask_end
    const int shared[7][5] = {{1, -1, 0, 0, 0}, {3, -1, 0, 0, 0}, {4, 5, 0, 0, 0}, {5, 1, 0, 0, 0},
                              {4, 6, 0, 2, 4},  {6, 7, 0, 2, 4},  {7, 1, 0, 2, 4}};
    const int separate[9][5] = {{1, -1, 0, 0, 0}, {3, -1, 0, 0, 0}, {4, 5, 0, 0, 0}, {5, 1, 0, 0, 0}, {1, -1, 4, 0, 0},
                                {3, -1, 4, 0, 0}, {4, 6, 4, 0, 0},  {6, 7, 4, 0, 0}, {7, 1, 4, 0, 0}};
    const int ends[2][4] = {{2, 4, 6, 9}, {2, 4, 4, 7}}; // of the completions' targets
    if (!TEST("what a row contains")) return;
    for (int share = 0; share < 2; share++) {
        slam_pairs p = pairs_of(path, 20, 24, share);
        slam_batch b = slam_batch_new(1, p.T, 1);
        slam_loader *l = slam_loader_new_pairs(&p, 0, 0, 1);
        const int n = share ? 7 : 9, (*want)[5] = share ? shared : separate;
        CHECK(slam_loader_begin(l, 1, NULL) == 1 && l->rows == 1 && l->rows_left == 1 && l->T == 16, "%d rows",
              l->rows);
        CHECK(slam_loader_next(l, &b) == 1 && b.B == 1 && b.T == 16 && l->tokens == (uint64_t)n && l->rows_left == 0,
              "%d rows of %d, %d tokens", b.B, b.T, (int)l->tokens);
        CHECK(b.n_sequences == 2, "%zu sequences", b.n_sequences);
        for (int side = 0; side < 2; side++)
            CHECK(b.sequences[side].item == (size_t)side && b.sequences[side].first == ends[share][2 * side] &&
                      b.sequences[side].end == ends[share][2 * side + 1],
                  "completion %d", side);
        for (int t = 0; t < b.T; t++) {
            const int padding[5] = {0, -1, t, 0, 0}, *w = t < n ? want[t] : padding;
            CHECK(b.tokens[t] == w[0] && b.targets[t] == w[1] && b.doc_start[t] == w[2] && b.mask_start[t] == w[3] &&
                      b.mask_end[t] == w[4],
                  "%d at %d: %d -> %d, from %d, mask %d to %d", share, t, b.tokens[t], b.targets[t], b.doc_start[t],
                  b.mask_start[t], b.mask_end[t]);
        }
        slam_loader_free(l);
        slam_batch_free(&b);
        slam_pairs_free(&p);
    }
}

/* Every pair is in the rows once and whole, whatever its size, ranks and micro-batch, and rows are about equally long. */
static void test_packing(void) {
    const int most[3] = {120, 60, 60};
    char *path = string_copy(random_pairs("pack.jsonl", 700, 50, most, 3));
    if (!TEST("packing: every pair once and whole, the same rows for all ranks")) return;
    for (int share = 0; share < 2; share++) {
        slam_pairs p = pairs_of(path, 50, 190, share);
        const int n = (int)p.n;
        uint64_t *row_hash = NEW(uint64_t, p.n);
        for (int size = 1; size < 12; size += 5) {
            char *seen = NEW(char, p.n);
            uint64_t tokens = 0, expected = 0;
            int row = 0;
            for (int rank = 0; rank < size; rank++) {
                const int micro = 2 + rank;
                slam_comm comm = ZERO;
                comm.rank = rank;
                comm.size = size;
                slam_batch b = slam_batch_new(micro, p.T, 1);
                slam_loader *l = slam_loader_new_pairs(&p, 0, 2, 1);
                CHECK(slam_loader_begin(l, n, &comm) == n, "%s", slam_error());
                expected = l->tokens;
                CHECK((double)l->tokens > 0.95 * l->rows * l->T, "%.3f full", (double)l->tokens / (l->rows * l->T));
                while (slam_loader_next(l, &b) > 0) {
                    CHECK(b.B <= micro && b.T <= l->T, "%d rows of %d", b.B, b.T);
                    for (size_t k = 0; k < b.n_sequences; k++) {
                        const slam_sequence *s = &b.sequences[k];
                        const slam_pair *q = &p.at[s->item / 2];
                        seen[s->item / 2] = (char)(seen[s->item / 2] + 1);
                        CHECK(s->item % 2 == k % 2 && s->item / 2 == b.sequences[k & ~(size_t)1].item / 2,
                              "an incomplete pair");
                        CHECK(s->end - s->first == (int)(k % 2 ? q->n_rejected : q->n_chosen), "%d targets",
                              s->end - s->first);
                        CHECK(b.targets[s->end - 1] == 1 && s->first / b.T == (s->end - 1) / b.T,
                              "a completion does not end");
                    }
                    for (int i = 0; i < b.B; i++, row++) {
                        uint64_t hash = HASH_START; // of tokens without the padding
                        for (int t = 0; t < b.T; t++) {
                            if (b.tokens[i * b.T + t] == 0) continue;
                            tokens++;
                            hash = hash_bytes(hash, &b.tokens[i * b.T + t], sizeof *b.tokens);
                        }
                        if (size == 1) row_hash[row] = hash;
                        CHECK(row_hash[row] == hash, "row %d is another one for %d ranks", row, size);
                    }
                }
                CHECK(l->rows_left == 0, "%d rows left", l->rows_left);
                slam_loader_free(l);
                slam_batch_free(&b);
            }
            for (int i = 0; i < n; i++) CHECK(seen[i] == 2, "pair %d: %d completions", i, seen[i]);
            CHECK(tokens == expected, "%d tokens of %d", (int)tokens, (int)expected);
            free(seen);
        }
        free(row_hash);
        slam_pairs_free(&p);
    }
    free(path);
}

/* A batch of pairs like SpokenSwag's (a prompt of 10 s, completions of 3 s) is hardly padded. */
static void test_even_rows(void) {
    strbuf s = ZERO;
    uint64_t seed = 2;
    if (!TEST("rows of about the same length")) return;
    for (int i = 0; i < 240; i++)
        for (int part = 0; part < 3; part++) {
            strbuf_add(&s, "%s\"%s\": \"", part ? ", " : "{", part_names[part]);
            for (int n = part ? 35 + (int)rng_below(&seed, 41) : 120 + (int)rng_below(&seed, 121); n > 0; n--)
                strbuf_add(&s, "<Un%d>", (int)rng_below(&seed, 500));
            strbuf_add(&s, part == 2 ? "\"}\n" : "\"");
        }
    char *path = string_copy(check_file("even.jsonl", s.at, s.n));
    for (int share = 0; share < 2; share++) {
        slam_pairs p = pairs_of(path, 502, 1024, share);
        slam_loader *l = slam_loader_new_pairs(&p, 0, 1, 1);
        double tokens = 0, positions = 0;
        for (int i = 0; i < 10; i++) {
            slam_loader_begin(l, 24, NULL);
            tokens += (double)l->tokens;
            positions += (double)l->rows * l->T;
        }
        CHECK(tokens / positions > 0.95, "%s: %.3f full", share ? "shared" : "separate", tokens / positions);
        slam_loader_free(l);
        slam_pairs_free(&p);
    }
    free(path);
    strbuf_free(&s);
}

static void test_order(void) {
    const int most[3] = {12, 12, 12};
    enum { BATCH = 7, STEPS = 40 };
    if (!TEST("an epoch has every pair once; the position can be set")) return;
    slam_pairs p = pairs_of(random_pairs("order.jsonl", 50, small.V, most, 3), small.V, 64, 1);
    const size_t n = p.n_train;
    slam_loader *l = slam_loader_new_pairs(&p, 0, 9, 1), *other = slam_loader_new_pairs(&p, 0, 9, 1);
    uint64_t at[STEPS][2];
    uint32_t drawn[STEPS][BATCH];
    int *seen = NEW(int, n);
    for (int k = 0; k < STEPS; k++) {
        at[k][0] = l->epoch;
        at[k][1] = l->row;
        CHECK(slam_loader_begin(l, BATCH, NULL) == BATCH && l->n == BATCH, "%s", slam_error());
        memcpy(drawn[k], l->packer->batch.items, sizeof drawn[k]);
        for (int i = 0; i < BATCH; i++) seen[drawn[k][i]]++;
        CHECK(l->epoch * n + l->row == (uint64_t)(k + 1) * BATCH, "after %d steps: epoch %d, pair %d", k + 1,
              (int)l->epoch, (int)l->row);
        for (size_t i = 0; l->row == n && i < n; i++)
            CHECK(seen[i] == (int)l->epoch + 1, "pair %zu: %d times", i, seen[i]);
    }
    CHECK(memcmp(drawn[0], drawn[n / BATCH], sizeof drawn[0]) != 0, "epochs have one order");
    for (int k = STEPS - 1; k >= 0; k -= 3) {
        CHECK(slam_loader_seek(other, at[k][0], at[k][1]), "%s", slam_error());
        CHECK(slam_loader_begin(other, BATCH, NULL) == BATCH, "%s", slam_error());
        CHECK(!memcmp(other->packer->batch.items, drawn[k], sizeof drawn[k]),
              "step %d is another after setting the position", k);
    }
    check_fails(slam_loader_seek(other, 0, n + 1), "the epoch has 49 rows"); // of a damaged trainer.json
    free(seen);
    slam_loader_free(l), slam_loader_free(other);
    l = slam_loader_new_pairs(&p, 0, 0, 0); // without shuffling: once, in order
    CHECK(slam_loader_begin(l, 20, NULL) == 20 && slam_loader_begin(l, (int)n, NULL) == (int)n - 20 &&
              slam_loader_begin(l, 1, NULL) == 0 && l->rows == 0 && l->rows_left == 0,
          "to the end");
    slam_loader_free(l);
    slam_pairs_free(&p);
}

/* ---- the reference ---- */

static int stop_at_half(void *context, const slam_progress *p) {
    int *calls = (int *)context;
    ++*calls;
    return p->done < p->total / 2;
}

static int count_calls(void *context, const slam_progress *p) {
    int *calls = (int *)context;
    CHECK(!strcmp(p->stage, "reference") && p->done > 0 && p->done <= p->total, "%g of %g", p->done, p->total);
    *calls = p->done == p->total ? -*calls - 1 : *calls + 1;
    return 1;
}

static void test_reference(slam_ops *ops) {
    const int most[3] = {6, 4, 4};
    uint64_t model;
    int calls = 0;
    if (!TEST("the reference's file: saved, missing, damaged, of others")) return;
    slam_model *m = slam_model_new(ops, &small, 3);
    char *path = string_copy(random_pairs("kept.jsonl", 900, small.V, most, 3)),
         *file = string_copy(check_path("ref.safetensors"));
    slam_pairs p = pairs_of(path, small.V, 32, 1), again = pairs_of(path, small.V, 32, 1),
               other = pairs_of(path, small.V, 31, 1);
    unlink(file);
    CHECK(slam_model_hash(m, &model), "%s", slam_error());
    CHECK(slam_pairs_load_reference(&p, file, model) && !p.reference, "%s", slam_error());
    CHECK(compute_reference(&p, m, 4, count_calls, &calls) && calls < -1, "%s, %d calls", slam_error(), calls);
    CHECK(slam_pairs_save_reference(&p, file, model), "%s", slam_error());
    CHECK(slam_pairs_load_reference(&again, file, model) && again.reference, "%s", slam_error());
    for (size_t i = 0; i < p.n; i++)
        CHECK(!memcmp(&p.reference[2 * i], &again.reference[2 * i], 2 * sizeof *p.reference), "pair %zu", i);
    check_fails(slam_pairs_load_reference(&again, file, model + 1), "not the log-probabilities of these pairs");
    check_fails(slam_pairs_load_reference(&other, file, model), "not the log-probabilities of these pairs");
    check_fails(slam_pairs_load_reference(&again, path, model), "kept.jsonl");
    check_fails(slam_pairs_load_reference(&again, FIXTURE "policy/model.safetensors", model),
                "not the log-probabilities of these pairs");
    file_map map;
    CHECK(file_map_open(&map, file), "%s", slam_error());
    for (size_t size = 0; size < map.size;
         size += size < 60 ? 7 : 997) { // a file that is cut is an error, never numbers
        check_file("cut.safetensors", map.data, size);
        CHECK(!slam_pairs_load_reference(&again, check_path("cut.safetensors"), model), "cut at %zu", size);
    }
    file_map_close(&map);
    p.reference[2 * 7 + 1] = NAN;
    CHECK(slam_pairs_save_reference(&p, file, model), "%s", slam_error());
    check_fails(slam_pairs_load_reference(&again, file, model), "pair 8 is not finite");
    calls = 0;
    check_fails(compute_reference(&p, m, 4, stop_at_half, &calls), "stopped");
    CHECK(calls > 1, "%d calls", calls);
    m->master[5] = NAN;
    check_fails(compute_reference(&p, m, 4, NULL, NULL), "not finite");
    slam_pairs_free(&p), slam_pairs_free(&again), slam_pairs_free(&other);
    slam_model_free(m);
    free(path), free(file);
}

/* Preferring the chosen completion is learned, on pairs that have a rule: chosen units go up by one, rejected ones by two. */
static void test_learning(slam_ops *ops) {
    strbuf s = ZERO;
    uint64_t seed = 3;
    if (!TEST("a rule is learned, and held-out pairs show it")) return;
    for (int i = 0; i < 300; i++) {
        const int u = (int)rng_below(&seed, 25), v = (int)rng_below(&seed, 25);
        strbuf_add(&s, "{\"prompt\": \"<Un%d><Un%d>\", \"chosen\": \"<Un%d><Un%d>\", \"rejected\": \"<Un%d><Un%d>\"}\n",
                   v, u, (u + 1) % 25, (u + 2) % 25, (u + 2) % 25, (u + 4) % 25);
    }
    slam_model *m = slam_model_new(ops, &small, 3);
    slam_pairs p = pairs_new(small.V, 16, 1, 0);
    CHECK(slam_pairs_add(&p, check_file("rule.jsonl", s.at, s.n), 0) && slam_pairs_prepare(&p, 0.2, 1), "%s",
          slam_error());
    slam_adamw opt = ZERO;
    opt.beta1 = 0.9, opt.beta2 = 0.999, opt.eps = 1e-8, opt.clip = 0.5;
    slam_loader *l = slam_loader_new_pairs(&p, 0, 1, 1), *val = slam_loader_new_pairs(&p, 1, 0, 0);
    const int n_val = (int)(p.n - p.n_train);
    CHECK(compute_reference(&p, m, 4, NULL, NULL) && slam_model_plan(m, 4, p.T, SLAM_TRAIN) && slam_adamw_init(&opt, m),
          "%s", slam_error());
    const metrics first = dpo_step(m, val, n_val, 4, 0.1, 0, 0, NULL);
    check_near("margin at first", first.margin, 0, 1e-4);
    check_near("loss at first", first.loss, log(2), 1e-5);
    for (int k = 0; k < 120; k++) {
        slam_step step = ZERO;
        const metrics mean = dpo_step(m, l, 16, 4, 0.1, 0, 1, NULL);
        CHECK(slam_adamw_step(&opt, 3e-3, &step), "%s", slam_error());
        check_near("the step's loss", step.loss_sum / 16, mean.loss, 1e-5);
    }
    slam_loader_seek(val, 0, 0);
    const metrics last = dpo_step(m, val, n_val, 4, 0.1, 0, 0, NULL);
    CHECK(last.accuracy > 0.8, "accuracy %.3f", last.accuracy);
    strbuf_free(&s);
    slam_adamw_free(&opt);
    slam_loader_free(l), slam_loader_free(val);
    slam_pairs_free(&p);
    slam_model_free(m);
}

/* log p of units `to` after the prompt `from`, and of the 1 that ends them: a row of its own. */
static double completion_logp(slam_model *m, const int *from, int n_from, const int *to, int n_to) {
    slam_batch b = slam_batch_new(1, 32, 0);
    int n = 1;
    double sum = 0;
    b.tokens[0] = 1;
    for (int k = 0; k < n_from; k++) b.tokens[n++] = from[k] + 2;
    for (int k = 0; k < n_to; k++) b.tokens[n++] = to[k] + 2;
    for (int k = 0; k < n; k++) {
        b.targets[k] = k < n_from ? -1 : k + 1 < n ? b.tokens[k + 1] : 1;
        b.doc_start[k] = 0;
    }
    b.B = 1;
    b.T = n;
    CHECK(slam_forward(m, &b), "%s", slam_error());
    for (int k = n_from; k < n; k++) sum -= b.losses[k];
    slam_batch_free(&b);
    return sum;
}

/* Many validation pairs, in batches, each of them by itself. */
static void test_validation(slam_ops *ops) {
    if (!TEST("validation on 300 pairs is the mean over pairs one by one")) return;
    enum { PAIRS = 300 };
    static int units[PAIRS][3][8], n[PAIRS][3];
    static const char train[] = "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2>\", \"rejected\": \"<Un3><Un4>\"}\n";
    uint64_t seed = 12;
    strbuf s = ZERO;
    for (int i = 0; i < PAIRS; i++)
        for (int part = 0; part < 3; part++) {
            n[i][part] =
                part == 2 ? n[i][1] % 8 + 1 : 1 + (int)rng_below(&seed, 8); // the completions differ at least in length
            strbuf_add(&s, "%s\"%s\": \"", part ? ", " : "{", part_names[part]);
            for (int k = 0; k < n[i][part]; k++)
                strbuf_add(&s, "<Un%d>", units[i][part][k] = (int)rng_below(&seed, 25));
            strbuf_add(&s, "\"%s", part == 2 ? "}\n" : "");
        }
    slam_model *m = slam_model_new(ops, &small, 3), *reference = slam_model_new(ops, &small, 4);
    slam_pairs p = pairs_new(small.V, 32, 1, 0);
    CHECK(slam_pairs_add(&p, check_file("train.jsonl", train, sizeof train - 1), 0) &&
              slam_pairs_add(&p, check_file("validation.jsonl", s.at, s.n), 1) && slam_pairs_prepare(&p, 0, 0),
          "%s", slam_error());
    CHECK(compute_reference(&p, reference, 4, NULL, NULL) && slam_model_plan(m, 4, p.T, SLAM_INFERENCE), "%s",
          slam_error());
    slam_loader *l = slam_loader_new_pairs(&p, 1, 0, 0);
    slam_batch b = slam_batch_new(4, p.T, 1);
    metrics got = ZERO, want = ZERO;
    while (slam_loader_begin(l, 64, NULL) > 0)
        while (slam_loader_next(l, &b) > 0) dpo_batch(m, &p, &b, 0.3, 0, 0, &got, NULL);
    for (int i = 0; i < PAIRS; i++) {
        double logp[2][2]; // of the model and the reference: chosen, rejected
        for (int k = 0; k < 4; k++)
            logp[k / 2][k % 2] =
                completion_logp(k / 2 ? reference : m, units[i][0], n[i][0], units[i][1 + k % 2], n[i][1 + k % 2]);
        const double D = logp[0][0] - logp[1][0] - (logp[0][1] - logp[1][1]);
        want.loss += log(1 + exp(-0.3 * D)) / PAIRS;
        want.margin += D / PAIRS;
        want.accuracy += (D > 0 ? 1.0 : 0) / PAIRS;
        want.logp_chosen += logp[0][0] / PAIRS;
        want.logp_rejected += logp[0][1] / PAIRS;
    }
    CHECK(got.pairs == PAIRS, "%g pairs", got.pairs);
    check_near("loss", got.loss / PAIRS, want.loss, 1e-5);
    check_near("margin", got.margin / PAIRS, want.margin, 1e-4);
    check_near("accuracy", got.accuracy / PAIRS, want.accuracy, 1e-9);
    check_near("log p of the chosen", got.logp_chosen / PAIRS, want.logp_chosen, 1e-4);
    check_near("log p of the rejected", got.logp_rejected / PAIRS, want.logp_rejected, 1e-4);
    strbuf_free(&s);
    slam_batch_free(&b);
    slam_loader_free(l);
    slam_pairs_free(&p);
    slam_model_free(m);
    slam_model_free(reference);
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    const char *const smoothings[] = {"0", "0.1"};
    test_loss();
    for (int k = 0; k < 2; k++) {
        test_torch(ops, smoothings[k], 1, 64, 4);
        test_torch(ops, smoothings[k], 0, 64, 2);
        test_torch(ops, smoothings[k], 1, 33, 2); // some pairs of the fixture do not fit shared
    }
    test_shared(ops);
    test_finite_differences(ops);
    test_rows();
    test_packing();
    test_even_rows();
    test_truncated();
    test_lines();
    test_held_out();
    test_hash();
    test_order();
    test_reference(ops);
    test_learning(ops);
    test_validation(ops);
    slam_ops_free(ops);
    return check_end();
}
