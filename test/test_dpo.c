/* Preference optimisation against its formula in PyTorch (fixture made by test/reference_dpo.py); a shared prompt against endings that
   are computed apart; reading, cutting, packing; the file of the reference. Run from the repository's root. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FIXTURE "test/fixtures/dpo/"

static slam_pairs *pairs_of(const char *path, int V, int context, int share) {
    slam_pairs *p = slam_pairs_new(V, context, share, 0);
    if (CHECK(p && slam_pairs_add(p, path, 0) && slam_pairs_prepare(p, 0, 0), "%s", slam_error())) return p;
    slam_pairs_free(p);
    return NULL;
}

/* n random pairs with prompts, chosen and rejected endings of up to these numbers of units, as a file. */
static const char *random_pairs(const char *name, int n, int V, const int most[3], uint64_t seed) {
    text t = SLAM_ZERO;
    for (int i = 0; i < n; i++)
        for (int part = 0; part < 3; part++) {
            const int length =
                part ? 1 + (int)rng_below(&seed, (uint64_t)most[part]) : (int)rng_below(&seed, (uint64_t)most[0] + 1);
            text_add(&t, "%s\"%s\": {\"units\": [", part ? ", " : "{", pair_names[part]);
            for (int k = 0; k < length; k++) text_add(&t, "%s%d", k ? ", " : "", (int)rng_below(&seed, (uint64_t)V - 2));
            text_add(&t, "]}%s", part == 2 ? "}\n" : "");
        }
    const char *path = check_file(name, t.at, t.n);
    text_free(&t);
    return path;
}

static const slam_config small = {27, 24, 2, 3, 1, 8, 40, 256, 1, 1, 1e-6, 0.3, 10000};

/* ---- PyTorch ---- */

static double number_at(const tensors *file, const char *name, size_t i) {
    const tensor *t = tensors_find(file, name);
    double x = NAN;
    if (CHECK(t && t->count > i, "the fixture has no '%s'", name)) memcpy(&x, (const char *)t->data + i * sizeof x, sizeof x);
    return x;
}

static void check_gradients(const slam_model *m, const tensors *file, const char *smoothing) {
    size_t n = 0;
    parameter *list = parameters_of(&m->config, &n);
    for (size_t k = 0; k < n; k++) {
        char name[128];
        snprintf(name, sizeof name, "grad.%s.%s", smoothing, list[k].name);
        const tensor *t = tensors_find(file, name);
        float *expected = (float *)malloc(parameter_size(&list[k]) * sizeof *expected);
        if (CHECK(t && tensor_floats(t, expected, 0, t->count), "no '%s' in the fixture", name))
            check_close(name, m->gradients + list[k].at, expected, parameter_size(&list[k]), 1e-4);
        free(expected);
    }
    free(list);
}

/* One step on all pairs of the fixture. */
static void test_torch(slam_ops *ops, const char *smoothing, int share, int context, int micro) {
    if (!TEST("PyTorch: smoothing %s, %s, rows of %d, %d at once", smoothing, share ? "shared" : "apart", context, micro)) return;
    tensors *file = tensors_open(FIXTURE "pairs.safetensors");
    slam_model *policy = slam_model_load(ops, FIXTURE "policy"), *reference = slam_model_load(ops, FIXTURE "reference");
    if (!CHECK(file && policy && reference, "%s", slam_error())) return;
    slam_pairs *p = pairs_of(FIXTURE "pairs.jsonl", slam_model_config(policy)->V, context, share);
    const double beta = number_at(file, "settings", 0);
    slam_dpo *d = slam_dpo_new(policy, p, beta, atof(smoothing), (int)p->n, micro, SLAM_TRAIN, 1);
    uint64_t tokens, pairs;
    char name[64];
    if (!CHECK(d && slam_model_plan(reference, micro, 1024, SLAM_INFERENCE), "%s", slam_error())) return;
    check_fails(slam_dpo_accumulate(d, p->n, NULL, NULL), "of 0 pairs of 8");
    CHECK(slam_pairs_compute(p, reference, micro, NULL, 0, NULL, NULL) == 1, "%s", slam_error());
    for (size_t i = 0; i < 2 * p->n; i++) check_near("reference", p->reference[i], number_at(file, "reference_logps", i), 1e-4);
    CHECK(slam_dpo_next(d, &tokens, &pairs) && pairs == p->n && slam_dpo_accumulate(d, pairs, NULL, NULL), "%s", slam_error());
    double loss = 0, margin = 0;
    slam_dpo_figures sum = SLAM_ZERO;
    for (size_t i = 0; i < p->n; i++) {
        const uint32_t number = d->rows.place[i].pair;
        const double sums[2] = {sum.loss, sum.margin};
        for (int side = 0; side < 2; side++)
            check_near("log-probability", d->rows.logp[2 * i + side], number_at(file, "logps", 2 * (size_t)number + side), 1e-4);
        pair_loss(d, number, d->rows.logp + 2 * i, &sum);
        snprintf(name, sizeof name, "loss.%s", smoothing);
        check_near("loss of a pair", sum.loss - sums[0], number_at(file, name, number), 1e-4 * number_at(file, name, number));
        loss += number_at(file, name, number);
        snprintf(name, sizeof name, "margin.%s", smoothing);
        check_near("margin of a pair", sum.margin - sums[1], number_at(file, name, number),
                   1e-4 * fabs(number_at(file, name, number)));
        margin += number_at(file, name, number);
    }
    check_near("mean loss", slam_dpo_last(d, 0).loss, loss / (double)p->n, 1e-5);
    check_near("mean margin", slam_dpo_last(d, 0).margin, margin / (double)p->n, 1e-4);
    check_near("statistics", policy->stats[0], loss, 1e-5);
    check_gradients(policy, file, smoothing);
    slam_dpo_free(d);
    slam_pairs_free(p);
    slam_model_free(policy);
    slam_model_free(reference);
    tensors_close(file);
}

/* ---- shared and apart ---- */

typedef struct outcome {
    float *gradients;
    slam_dpo_figures figures;
    double loss_sum;
    uint64_t tokens;
    int rows;
} outcome;

/* Gradients of a step on the first `batch` pairs of a file, from a model that has moved away from its reference. */
static outcome step_on(slam_ops *ops, const char *path, int batch, int context, int share, int micro, int mode) {
    outcome out = SLAM_ZERO;
    slam_model *m = slam_model_new(ops, &small, 3), *reference = slam_model_new(ops, &small, 4);
    slam_pairs *p = pairs_of(path, small.V, context, share);
    slam_dpo *d = p ? slam_dpo_new(m, p, 0.2, 0.05, batch, micro, mode, 5) : NULL;
    uint64_t pairs;
    if (CHECK(d && slam_model_plan(reference, micro, 1024, SLAM_INFERENCE) &&
                  slam_pairs_compute(p, reference, micro, NULL, 0, NULL, NULL) == 1 && slam_dpo_next(d, &out.tokens, &pairs) &&
                  slam_dpo_accumulate(d, pairs, NULL, NULL),
              "%s", slam_error())) {
        out.gradients = (float *)malloc(m->w.total * sizeof *out.gradients);
        memcpy(out.gradients, m->gradients, m->w.total * sizeof *out.gradients);
        out.figures = slam_dpo_last(d, 0);
        out.loss_sum = m->stats[0];
        out.rows = d->rows.rows;
    }
    slam_dpo_free(d);
    slam_pairs_free(p);
    slam_model_free(m);
    slam_model_free(reference);
    return out;
}

static void check_outcomes(const outcome *a, const outcome *b, double tolerance) {
    if (!CHECK(a->gradients && b->gradients, "a step failed")) return;
    check_close("gradients", a->gradients, b->gradients, weights_of(&small).total, tolerance);
    check_near("loss", a->figures.loss, b->figures.loss, tolerance);
    check_near("margin", a->figures.margin, b->figures.margin, tolerance * (1 + fabs(b->figures.margin)));
    check_near("log-probabilities", a->figures.logp_chosen, b->figures.logp_chosen, tolerance * fabs(b->figures.logp_chosen));
    check_near("sum of losses", a->loss_sum, b->loss_sum, 1e-6 * fabs(b->loss_sum));
}

static void test_shared(slam_ops *ops) {
    const int most[3] = {40, 15, 15};
    const char *path = random_pairs("shared.jsonl", 60, small.V, most, 7);
    const outcome apart = step_on(ops, path, 60, 128, 0, 4, SLAM_TRAIN);
    if (TEST("a shared prompt: the same as apart, in fewer tokens")) {
        const outcome shared = step_on(ops, path, 60, 128, 1, 4, SLAM_TRAIN);
        check_outcomes(&shared, &apart, 1e-5);
        CHECK(shared.tokens < apart.tokens * 3 / 4, "%d and %d tokens", (int)shared.tokens, (int)apart.tokens);
        free(shared.gradients);
    }
    if (TEST("what does not fit shared is computed apart")) { // rows of 64: up to 72 shared, up to 57 apart
        const outcome some = step_on(ops, path, 60, 64, 1, 3, SLAM_TRAIN);
        slam_pairs *p = pairs_of(path, small.V, 64, 1);
        CHECK(p->size.apart > 0 && p->size.apart < 20 && p->size.cut == 0, "%d apart, %d cut", (int)p->size.apart,
              (int)p->size.cut);
        check_outcomes(&some, &apart, 1e-5);
        slam_pairs_free(p);
        free(some.gradients);
    }
    if (TEST("rows at once change the last bits at most")) {
        const outcome one = step_on(ops, path, 60, 128, 1, 1, SLAM_TRAIN), many = step_on(ops, path, 60, 128, 1, 64, SLAM_TRAIN),
                      again = step_on(ops, path, 60, 128, 1, 64, SLAM_TRAIN_RECOMPUTE);
        check_outcomes(&one, &many, 1e-6);
        CHECK(one.rows == many.rows, "%d rows and %d", one.rows, many.rows);
        CHECK(!memcmp(many.gradients, again.gradients, weights_of(&small).total * sizeof(float)), "recomputed gradients differ");
        free(one.gradients), free(many.gradients), free(again.gradients);
    }
    free(apart.gradients);
}

/* The slope of the loss along the gradient is the gradient's norm. */
static void test_finite_differences(slam_ops *ops) {
    const int most[3] = {20, 10, 10};
    if (!TEST("finite differences")) return;
    slam_model *m = slam_model_new(ops, &small, 3), *reference = slam_model_new(ops, &small, 4);
    slam_pairs *p = pairs_of(random_pairs("slope.jsonl", 12, small.V, most, 11), small.V, 64, 1);
    slam_dpo *d = slam_dpo_new(m, p, 0.5, 0.1, 12, 2, SLAM_TRAIN, 5);
    uint64_t tokens, pairs;
    double loss[2], norm = 0;
    CHECK(slam_model_plan(reference, 2, 1024, SLAM_INFERENCE) && slam_pairs_compute(p, reference, 2, NULL, 0, NULL, NULL) == 1 &&
              slam_dpo_next(d, &tokens, &pairs) && slam_dpo_accumulate(d, pairs, NULL, NULL),
          "%s", slam_error());
    const size_t n = m->w.total;
    float *kept = (float *)malloc(n * sizeof *kept), *g = (float *)malloc(n * sizeof *g);
    memcpy(kept, m->master, n * sizeof *kept);
    memcpy(g, m->gradients, n * sizeof *g);
    for (size_t i = 0; i < n; i++) norm += (double)g[i] * g[i];
    norm = sqrt(norm);
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < n; i++) m->master[i] = kept[i] + (float)((side ? 3e-3 : -3e-3) * g[i] / norm);
        CHECK(slam_dpo_accumulate(d, pairs, NULL, NULL), "%s", slam_error());
        loss[side] = slam_dpo_last(d, 0).loss;
    }
    check_near("slope", (loss[1] - loss[0]) / 6e-3 / norm, 1, 2e-3);
    free(kept), free(g);
    slam_dpo_free(d);
    slam_pairs_free(p);
    slam_model_free(m);
    slam_model_free(reference);
}

/* ---- reading and cutting ---- */

static void test_cut(void) {
    static const char line[] =
        "{\"prompt\": \"<Un1><Un2><Un3><Un4><Un5><Un6>\", \"chosen\": \"<Un7><Un8>\", \"rejected\": \"<Un9>\"}\n";
    const char *path = check_file("cut.jsonl", line, sizeof line - 1);
    const int expected[] = {6, 6, 5, 4, 3, 2, 1, 0}; // contexts 11, 10 = 1 + 6 + 2 + 1, 9, ...
    if (!TEST("a prompt that is too long loses its beginning")) return;
    for (int context = 11; context >= 4; context--) {
        slam_pairs *p = pairs_of(path, 20, context, 0);
        const int n = expected[11 - context];
        if (!CHECK(p->n == 1 && (int)p->at[0].n[PROMPT] == n && (int)p->size.cut == (n < 6), "context %d: %d units", context,
                   (int)p->at[0].n[PROMPT]))
            continue;
        for (int k = 0; k < n + 3; k++) {
            const int unit = k < n ? 7 - n + k : 7 + k - n;
            CHECK(p->tokens[p->at[0].first + k] == unit + 2, "context %d: token %d is %d", context, k,
                  p->tokens[p->at[0].first + k]);
        }
        slam_pairs_free(p);
    }
    slam_pairs *p = slam_pairs_new(20, 4, 0, 0);
    static const char large[] = "{\"prompt\": \"\", \"chosen\": \"<Un7><Un8><Un1>\", \"rejected\": \"<Un9>\"}\n";
    CHECK(slam_pairs_add(p, check_file("large.jsonl", large, sizeof large - 1), 0) && p->size.large == 1, "%s", slam_error());
    check_fails(slam_pairs_prepare(p, 0, 0), "1 too long");
    slam_pairs_free(p);
}

/* What a row holds, token by token. */
static void test_rows(void) {
    static const char lines[] = "{\"prompt\": \"<Un1><Un2>\", \"chosen\": \"<Un3>\", \"rejected\": \"<Un4><Un5>\"}\n";
    const char *path = check_file("rows.jsonl", lines, sizeof lines - 1);
    const int shared[7][6] = {{1, -1, 0, 0, 0, 0}, {3, -1, 0, 0, 0, 0}, {4, 5, 0, 0, 0, 0}, {5, 1, 0, 0, 0, 0},
                              {4, 6, 0, 2, 4, 0},  {6, 7, 0, 2, 4, 0},  {7, 1, 0, 2, 4, 0}};
    const int apart[9][6] = {{1, -1, 0, 0, 0, 0}, {3, -1, 0, 0, 0, 0}, {4, 5, 0, 0, 0, 0}, {5, 1, 0, 0, 0, 0}, {1, -1, 4, 0, 0, 0},
                             {3, -1, 4, 0, 0, 0}, {4, 6, 4, 0, 0, 0},  {6, 7, 4, 0, 0, 0}, {7, 1, 4, 0, 0, 0}};
    const uint32_t list[] = {0};
    if (!TEST("what stands in a row")) return;
    for (int share = 0; share < 2; share++) {
        slam_pairs *p = pairs_of(path, 20, 24, share);
        pair_rows r;
        slam_batch b = SLAM_ZERO;
        const int n = share ? 7 : 9, (*want)[6] = share ? shared : apart;
        CHECK(rows_new(&r, p, 1, 1), "%s", slam_error());
        pack_pairs(&r, list, 1);
        CHECK(rows_fill(&r, 0, &b) == 1 && b.B == 1 && b.T == 16 && r.tokens == (uint64_t)n, "%d rows of %d, %d tokens", b.B, b.T,
              (int)r.tokens);
        for (int t = 0; t < b.T; t++) {
            const int padding[6] = {0, -1, t, 0, 0, 0}, *w = t < n ? want[t] : padding;
            CHECK(b.tokens[t] == w[0] && b.targets[t] == w[1] && b.doc_start[t] == w[2] && b.hole[2 * t] == w[3] &&
                      b.hole[2 * t + 1] == w[4],
                  "%d at %d: %d -> %d, from %d, hole %d to %d", share, t, b.tokens[t], b.targets[t], b.doc_start[t], b.hole[2 * t],
                  b.hole[2 * t + 1]);
        }
        rows_free(&r);
        slam_pairs_free(p);
    }
}

/* A batch of pairs like SpokenSwag's (a prompt of 10 s, endings of 3 s) is hardly padded. */
static void test_even_rows(void) {
    text t = SLAM_ZERO;
    uint64_t seed = 2;
    if (!TEST("rows of about the same length")) return;
    for (int i = 0; i < 240; i++)
        for (int part = 0; part < 3; part++) {
            text_add(&t, "%s\"%s\": \"", part ? ", " : "{", pair_names[part]);
            for (int n = part ? 35 + (int)rng_below(&seed, 41) : 120 + (int)rng_below(&seed, 121); n > 0; n--)
                text_add(&t, "<Un%d>", (int)rng_below(&seed, 500));
            text_add(&t, part == 2 ? "\"}\n" : "\"");
        }
    const char *path = check_file("even.jsonl", t.at, t.n);
    for (int share = 0; share < 2; share++) {
        slam_pairs *p = pairs_of(path, 502, 1024, share);
        slam_pairs_size size;
        CHECK(slam_pairs_measure(p, 24, 1, &size), "%s", slam_error());
        const double full = (double)size.tokens / (double)size.positions;
        CHECK(full > 0.95, "%s: %.3f full", share ? "shared" : "apart", full);
        slam_pairs_free(p);
    }
    text_free(&t);
}

/* Every pair stands in the rows once, whatever its size, and no two overlap. */
static void test_packing(void) {
    const int most[3] = {120, 60, 60};
    const char *path = random_pairs("pack.jsonl", 700, 50, most, 3);
    if (!TEST("packing: every pair once, none torn")) return;
    for (int share = 0; share < 2; share++)
        for (int micro = 2; micro < 9; micro += 3) {
            slam_pairs *p = pairs_of(path, 50, 190, share);
            slam_pairs_size size;
            pair_rows r;
            uint64_t tokens = 0;
            CHECK(slam_pairs_measure(p, 700, 2, &size) && rows_new(&r, p, 700, micro), "%s", slam_error());
            pack_pairs(&r, p->train, 700);
            CHECK((double)size.tokens > 0.95 * (double)size.positions, "%.3f full", (double)size.tokens / (double)size.positions);
            char *seen = (char *)calloc(700, 1);
            for (size_t first = 0, end; first < r.n; first = end) {
                slam_batch b;
                end = rows_fill(&r, first, &b);
                CHECK(b.B <= micro && end > first, "%d rows at once", b.B);
                for (size_t i = first; i < end; i++) seen[r.place[i].pair]++;
                for (int i = 0; i < b.B * b.T; i++) tokens += b.tokens[i] != 0;
                for (size_t i = first; i < end; i++)
                    for (int side = 0; side < 2; side++) {
                        const preference *q = &p->at[r.place[i].pair];
                        const size_t at = ending_at(&b, &r.place[i], side, r.place[first].row);
                        CHECK(r.place[i].row - r.place[first].row < b.B, "a pair is torn");
                        CHECK(b.targets[at + q->n[CHOSEN + side]] == 1, "an ending does not end");
                    }
            }
            for (int i = 0; i < 700; i++) CHECK(seen[i] == 1, "pair %d stands there %d times", i, seen[i]);
            CHECK(tokens == r.tokens && tokens == size.tokens, "%d tokens of %d", (int)tokens, (int)r.tokens);
            free(seen);
            rows_free(&r);
            slam_pairs_free(p);
        }
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
        {"[]", "bad.jsonl:2: found an array, expected an object"},
        {"{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\"}", "bad.jsonl:2: has no 'rejected'"},
        {"{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\", \"rejected\": null}", "bad.jsonl:2: 'rejected': found null"},
        {"{\"prompt\": \"<Un1>\", \"chosen\": \"<Un18>\", \"rejected\": \"<Un1>\"}",
         "bad.jsonl:2: 'chosen': unit 1 is 18, expected below 18 (a vocabulary of 20 tokens)"},
        {"{\"prompt\": {\"units\": [1, -1]}, \"chosen\": \"<Un18>\", \"rejected\": \"<Un1>\"}", "bad.jsonl:2: 'prompt': number 2"},
        {"{\"prompt\": {\"units\": [1], \"duration\": []}, \"chosen\": \"<Un8>\", \"rejected\": \"<Un1>\"}", "0 durations for 1"},
        {"{\"prompt\": \"<Un1\", \"chosen\": \"<Un1>\", \"rejected\": \"<Un2>\"}", "bad.jsonl:2: 'prompt': unit 1 is spelled"},
        {"{\"prompt\": {}, \"chosen\": \"<Un1>\", \"rejected\": \"<Un2>\"}", "'prompt': found an object without 'units'"},
        {"{\"prompt\": ", "bad.jsonl:2"},
        {"\xff", "bad.jsonl:2"},
    };
    if (!TEST("lines of every kind")) return;
    slam_pairs *p = slam_pairs_new(20, 32, 1, 0.3);
    CHECK(slam_pairs_add(p, check_file("good.jsonl", good, sizeof good - 1), 0), "%s", slam_error());
    CHECK(p->n == 2 && p->size.silent == 2 && p->size.same == 1 && p->size.repeats == 1, "%zu pairs", p->n);
    CHECK(p->at[0].n[PROMPT] == 0 && p->tokens[p->at[0].first] == 2 && p->tokens[p->at[0].first + 1] == 3, "the first pair");
    slam_pairs_free(p);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        text t = SLAM_ZERO;
        text_add(&t, "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un1>\", \"rejected\": \"<Un2>\"}\n%s\n", bad[i][0]);
        p = slam_pairs_new(20, 32, 1, 0.3);
        check_fails(slam_pairs_add(p, check_file("bad.jsonl", t.at, t.n), 0), bad[i][1]);
        slam_pairs_free(p);
        text_free(&t);
    }
    p = slam_pairs_new(20, 32, 1, 0.3);
    check_fails(slam_pairs_add(p, check_path("absent.jsonl"), 0), "no such file");
    check_fails(slam_pairs_add(p, "test/test_dpo.c", 0), "expected preference pairs");
    check_fails(slam_pairs_add(p, "test", 0), "is a folder");
    check_fails(slam_pairs_add(p, check_file("empty.jsonl", "", 0), 0), "is empty");
    check_fails(slam_pairs_prepare(p, 0, 0), "no pair is left");
    check_fails(slam_pairs_prepare(p, 1, 0), "fraction 1");
    slam_pairs_free(p);
    check_fails(slam_pairs_new(20, 3, 1, 0), "context of 3");
}

static void test_hold_out(void) {
    const int most[3] = {5, 5, 5};
    if (!TEST("pairs that are held out, and those that are given")) return;
    const char *path = random_pairs("train.jsonl", 100, 50, most, 3), *other = random_pairs("val.jsonl", 7, 50, most, 4);
    slam_pairs *p = slam_pairs_new(50, 64, 1, 0), *again = slam_pairs_new(50, 64, 1, 0);
    CHECK(slam_pairs_add(p, path, 0) && slam_pairs_add(p, other, 1) && slam_pairs_prepare(p, 0.1, 5), "%s", slam_error());
    const size_t given = p->n - (p->n_train + p->n_validation);
    CHECK(p->n_validation >= 16 && p->n_train + p->n_validation == p->n && given == 0, "%zu and %zu", p->n_train, p->n_validation);
    char *seen = (char *)calloc(p->n, 1);
    for (size_t i = 0; i < p->n_train; i++) seen[p->train[i]]++;
    for (size_t i = 0; i < p->n_validation; i++) seen[p->validation[i]]++;
    for (size_t i = 0; i < p->n; i++) CHECK(seen[i] == 1, "pair %zu: %d times", i, seen[i]);
    for (int i = 0; i < 5; i++) CHECK(p->validation[i] >= 90, "the given ones come first");
    CHECK(slam_pairs_add(again, path, 0) && slam_pairs_add(again, other, 1) && slam_pairs_prepare(again, 0.1, 6), "%s",
          slam_error());
    CHECK(slam_pairs_hash(p) != slam_pairs_hash(again), "another seed holds the same out");
    free(seen);
    slam_pairs_free(p);
    slam_pairs_free(again);
}

/* ---- the order of pairs ---- */

static void test_order(slam_ops *ops) {
    const int most[3] = {5, 5, 5};
    if (!TEST("an epoch has every pair once; seek goes anywhere")) return;
    slam_model *m = slam_model_new(ops, &small, 3);
    slam_pairs *p = pairs_of(random_pairs("order.jsonl", 50, small.V, most, 3), small.V, 64, 1);
    const size_t n = p->n_train;
    slam_dpo *d = slam_dpo_new(m, p, 0.1, 0, 7, 2, SLAM_TRAIN, 9), *other = slam_dpo_new(m, p, 0.1, 0, 7, 2, SLAM_TRAIN, 9);
    uint32_t drawn[40][7];
    uint64_t at[40][2], tokens, pairs, epoch, turn;
    int *seen = (int *)calloc(n, sizeof *seen);
    for (int k = 0; k < 40; k++) {
        slam_dpo_tell(d, &at[k][0], &at[k][1]);
        CHECK(slam_dpo_next(d, &tokens, &pairs), "%s", slam_error());
        memcpy(drawn[k], d->drawn, sizeof drawn[k]);
        for (int i = 0; i < 7; i++) seen[drawn[k][i]]++;
        slam_dpo_tell(d, &epoch, &turn);
        const uint64_t done = epoch * n + turn;
        CHECK(done == (uint64_t)(k + 1) * 7, "after %d steps: epoch %d, pair %d", k + 1, (int)epoch, (int)turn);
        for (size_t i = 0; turn == n && i < n; i++) CHECK(seen[i] == (int)epoch + 1, "pair %zu: %d times", i, seen[i]);
    }
    CHECK(memcmp(drawn[0], drawn[n / 7], sizeof drawn[0]) != 0, "epochs have one order");
    for (int k = 39; k >= 0; k -= 3) {
        CHECK(slam_dpo_seek(other, at[k][0], at[k][1]) && slam_dpo_next(other, &tokens, &pairs), "%s", slam_error());
        CHECK(!memcmp(other->drawn, drawn[k], sizeof drawn[k]), "step %d is another after seek", k);
    }
    check_fails(slam_dpo_seek(other, 0, n + 1), "not those of before");
    free(seen);
    slam_dpo_free(d);
    slam_dpo_free(other);
    slam_pairs_free(p);
    slam_model_free(m);
}

/* ---- the reference's file ---- */

static int stop_at(void *context, uint64_t done, uint64_t of) {
    const uint64_t *at = (const uint64_t *)context;
    return of == at[1] && done < at[0];
}

static char *file_bytes(const char *path, size_t *n) {
    file_map map;
    if (!CHECK(map_open(&map, path), "%s", slam_error())) return NULL;
    char *bytes = (char *)malloc(map.size + 1);
    memcpy(bytes, map.data, map.size);
    *n = map.size;
    map_close(&map);
    return bytes;
}

static void test_reference(slam_ops *ops) {
    const int most[3] = {6, 4, 4};
    uint64_t model, known, stop[2];
    size_t n = 0, m_n = 0;
    if (!TEST("the reference's file: stopped, torn, damaged, of others")) return;
    slam_model *m = slam_model_new(ops, &small, 3);
    char path[1024], file[1024];
    snprintf(path, sizeof path, "%s", random_pairs("kept.jsonl", 900, small.V, most, 3));
    snprintf(file, sizeof file, "%s", check_path("reference.bin"));
    slam_pairs *p = pairs_of(path, small.V, 32, 1);
    unlink(file);
    CHECK(slam_model_hash(m, &model) && slam_model_plan(m, 4, 1024, SLAM_INFERENCE), "%s", slam_error());
    CHECK(slam_pairs_recall(p, file, model, &known) && known == 0, "%s", slam_error());
    CHECK(slam_pairs_compute(p, m, 4, file, model, NULL, NULL) == 1 && p->known == p->n, "%s", slam_error());
    double *whole = (double *)malloc(2 * p->n * sizeof *whole);
    memcpy(whole, p->reference, 2 * p->n * sizeof *whole);
    char *bytes = file_bytes(file, &n);
    CHECK(slam_pairs_recall(p, file, model, &known) && known == p->n && !memcmp(whole, p->reference, 2 * p->n * sizeof *whole),
          "%s: %d known", slam_error(), (int)known);
    stop[0] = 512;
    stop[1] = p->n;
    unlink(file);
    CHECK(slam_pairs_recall(p, file, model, &known) && slam_pairs_compute(p, m, 4, file, model, stop_at, stop) == 2, "%s",
          slam_error());
    CHECK(slam_pairs_recall(p, file, model, &known) && known == 512, "%d known", (int)known);
    /* cut anywhere and gone on with, it is the same file; with a wrong byte, what stands before it counts */
    for (size_t cut = 0; cut <= n; cut += cut < 60 ? 7 : 997) {
        check_file("reference.bin", bytes, cut);
        CHECK(slam_pairs_recall(p, file, model, &known) && known % 256 == 0, "%s", slam_error());
        memset(p->reference + 2 * known, 0, 2 * (p->n - (size_t)known) * sizeof *whole);
        CHECK(slam_pairs_compute(p, m, 4, file, model, NULL, NULL) == 1, "%s", slam_error());
        char *again = file_bytes(file, &m_n);
        CHECK(m_n == n && !memcmp(again, bytes, n), "cut at %zu: another file", cut);
        free(again);
    }
    for (size_t at = 8; at < n; at += 1013) {
        bytes[at] ^= 1;
        check_file("reference.bin", bytes, n);
        bytes[at] ^= 1;
        CHECK(slam_pairs_recall(p, file, model, &known), "%s", slam_error());
        CHECK(known <= (at < 40 ? 0 : (at - 40) / (256 * 16 + 8) * 256), "byte %zu is wrong and %d are known", at, (int)known);
    }
    check_file("reference.bin", bytes, n);
    check_fails(slam_pairs_recall(p, file, model + 1, &known), "the reference is another one");
    slam_pairs *other = pairs_of(path, small.V, 31, 1);
    check_fails(slam_pairs_recall(other, file, model, &known), "of other pairs");
    check_fails(slam_pairs_recall(p, path, model, &known), "holds no log-probabilities");
    slam_pairs_free(other);
    m->master[5] = NAN;
    check_fails(slam_pairs_compute((p->known = 0, p), m, 4, NULL, model, NULL, NULL), "not finite");
    free(bytes), free(whole);
    slam_pairs_free(p);
    slam_model_free(m);
}

/* Preferring what is chosen is learned, on pairs that have a rule: what is chosen goes up by one, what is rejected by two. */
static void test_learning(slam_ops *ops) {
    text t = SLAM_ZERO;
    uint64_t seed = 3, tokens, pairs;
    if (!TEST("a rule is learned, and held-out pairs show it")) return;
    for (int i = 0; i < 300; i++) {
        const int u = (int)rng_below(&seed, 25), v = (int)rng_below(&seed, 25);
        text_add(&t, "{\"prompt\": \"<Un%d><Un%d>\", \"chosen\": \"<Un%d><Un%d>\", \"rejected\": \"<Un%d><Un%d>\"}\n", v, u,
                 (u + 1) % 25, (u + 2) % 25, (u + 2) % 25, (u + 4) % 25);
    }
    slam_model *m = slam_model_new(ops, &small, 3);
    slam_pairs *p = slam_pairs_new(small.V, 16, 1, 0);
    CHECK(slam_pairs_add(p, check_file("rule.jsonl", t.at, t.n), 0) && slam_pairs_prepare(p, 0.2, 1), "%s", slam_error());
    const slam_adamw settings = {0, 0.9, 0.999, 1e-8, 0, 0.5, 0};
    slam_dpo *d = slam_dpo_new(m, p, 0.1, 0, 16, 4, SLAM_TRAIN, 1);
    slam_optimiser *o = slam_optimiser_new(m, &settings);
    CHECK(slam_pairs_compute(p, m, 4, NULL, 0, NULL, NULL) == 1 && slam_dpo_evaluate(d), "%s", slam_error());
    check_near("margin at first", slam_dpo_last(d, 1).margin, 0, 1e-4);
    check_near("loss at first", slam_dpo_last(d, 1).loss, log(2), 1e-5);
    for (int k = 0; k < 120; k++) {
        slam_step step;
        CHECK(slam_dpo_next(d, &tokens, &pairs) && slam_dpo_accumulate(d, pairs, NULL, NULL) && slam_optimiser_step(o, 3e-3, &step),
              "%s", slam_error());
        check_near("the step's loss", step.loss_sum / 16, slam_dpo_last(d, 0).loss, 1e-5);
    }
    CHECK(slam_dpo_evaluate(d) && slam_dpo_last(d, 1).accuracy > 0.8, "accuracy %.3f", slam_dpo_last(d, 1).accuracy);
    text_free(&t);
    slam_optimiser_free(o);
    slam_dpo_free(d);
    slam_pairs_free(p);
    slam_model_free(m);
}

/* log p of units `to` after the prompt `from`, and of the 1 that ends them: a row of its own. */
static double completion_logp(slam_model *m, const int *from, int n_from, const int *to, int n_to) {
    int token[32] = {1}, target[32], start[32] = {0}, n = 1;
    float losses[32];
    double sum = 0;
    for (int k = 0; k < n_from; k++) token[n++] = from[k] + 2;
    for (int k = 0; k < n_to; k++) token[n++] = to[k] + 2;
    for (int k = 0; k < n; k++) target[k] = k < n_from ? -1 : k + 1 < n ? token[k + 1] : 1;
    const slam_batch b = {1, n, token, target, start, NULL};
    CHECK(slam_model_losses(m, &b, losses), "%s", slam_error());
    for (int k = n_from; k < n; k++) sum -= losses[k];
    return sum;
}

/* More validation pairs than are computed at once, each of them by itself. */
static void test_validation(slam_ops *ops) {
    if (!TEST("validation on 300 pairs is the mean over pairs one by one")) return;
    enum { PAIRS = 300 };
    static int units[PAIRS][3][8], n[PAIRS][3];
    static const char train[] = "{\"prompt\": \"<Un1>\", \"chosen\": \"<Un2>\", \"rejected\": \"<Un3><Un4>\"}\n";
    uint64_t seed = 12;
    text t = SLAM_ZERO;
    for (int i = 0; i < PAIRS; i++)
        for (int part = 0; part < 3; part++) {
            n[i][part] = part == 2 ? n[i][1] % 8 + 1 : 1 + (int)rng_below(&seed, 8); // the completions differ at least in length
            text_add(&t, "%s\"%s\": \"", part ? ", " : "{", pair_names[part]);
            for (int k = 0; k < n[i][part]; k++) text_add(&t, "<Un%d>", units[i][part][k] = (int)rng_below(&seed, 25));
            text_add(&t, "\"%s", part == 2 ? "}\n" : "");
        }
    slam_model *m = slam_model_new(ops, &small, 3), *reference = slam_model_new(ops, &small, 4);
    slam_pairs *p = slam_pairs_new(small.V, 32, 1, 0);
    CHECK(slam_pairs_add(p, check_file("train.jsonl", train, sizeof train - 1), 0) &&
              slam_pairs_add(p, check_file("validation.jsonl", t.at, t.n), 1) && slam_pairs_prepare(p, 0, 0),
          "%s", slam_error());
    CHECK(slam_model_plan(reference, 4, slam_pairs_row(p), SLAM_INFERENCE), "%s", slam_error());
    slam_dpo *d = slam_dpo_new(m, p, 0.3, 0, 1, 4, SLAM_TRAIN, 1);
    CHECK(slam_pairs_compute(p, reference, 4, NULL, 0, NULL, NULL) == 1 && slam_dpo_evaluate(d), "%s", slam_error());
    const slam_dpo_figures got = slam_dpo_last(d, 1);
    double loss = 0, margin = 0, accuracy = 0, chosen = 0, rejected = 0;
    for (int i = 0; i < PAIRS; i++) {
        double logp[2][2]; // of the model and the reference: chosen, rejected
        for (int k = 0; k < 4; k++)
            logp[k / 2][k % 2] = completion_logp(k / 2 ? reference : m, units[i][0], n[i][0], units[i][1 + k % 2], n[i][1 + k % 2]);
        const double D = logp[0][0] - logp[1][0] - (logp[0][1] - logp[1][1]);
        loss += log(1 + exp(-0.3 * D)) / PAIRS;
        margin += D / PAIRS;
        accuracy += (D > 0 ? 1.0 : 0) / PAIRS;
        chosen += logp[0][0] / PAIRS;
        rejected += logp[0][1] / PAIRS;
    }
    check_near("loss", got.loss, loss, 1e-5);
    check_near("margin", got.margin, margin, 1e-4);
    check_near("accuracy", got.accuracy, accuracy, 1e-9);
    check_near("log p of the chosen", got.logp_chosen, chosen, 1e-4);
    check_near("log p of the rejected", got.logp_rejected, rejected, 1e-4);
    text_free(&t);
    slam_dpo_free(d);
    slam_pairs_free(p);
    slam_model_free(m);
    slam_model_free(reference);
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    const char *const smoothings[] = {"0", "0.1"};
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
    test_cut();
    test_lines();
    test_hold_out();
    test_order(ops);
    test_reference(ops);
    test_learning(ops);
    test_validation(ops);
    slam_ops_free(ops);
    return check_end();
}
