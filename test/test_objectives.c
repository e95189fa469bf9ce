/* The loss of a data set and scores of sequences, against a model's losses of each chunk or sequence in a row of its own. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

static const slam_config small = {30, 24, 2, 4, 2, 6, 40, 256, 1, 1, 1e-6, 0.3, 10000, 0, 0, 0, 0, 0};

/* The sum of losses after tokens from .. to - 1 in a row of its own that begins at token `start`; tokens (to + 1). */
static double losses_of(slam_model *m, const int *tokens, int start, int from, int to) {
    slam_batch b = slam_batch_new(1, to - start, 0);
    double sum = 0;
    b.B = 1;
    for (int t = start; t < to; t++) {
        b.tokens[t - start] = tokens[t];
        b.targets[t - start] = tokens[t + 1];
        b.doc_start[t - start] = 0;
    }
    CHECK(slam_model_plan(m, 1, to - start, SLAM_INFERENCE) && slam_forward(m, &b), "%s", slam_error());
    for (int t = from; t < to; t++) sum += b.losses[t - start];
    slam_batch_free(&b);
    return sum;
}

/* ---- the loss of a data set ---- */

static const char *write_documents(const char *name, int n, int V, uint64_t *rng) {
    int32_t header[256] = {20240520, 1, 0, 0, 0};
    strbuf s = ZERO;
    strbuf_add_bytes(&s, header, sizeof header);
    for (int i = 0; i < n; i++) {
        uint16_t t[72] = {1};
        size_t k = 1;
        for (size_t units = 1 + rng_below(rng, 70); units > 0; units--)
            t[k++] = (uint16_t)(2 + rng_below(rng, (uint64_t)V - 2));
        t[k++] = 1;
        strbuf_add_bytes(&s, t, k * sizeof *t);
    }
    header[2] = (int32_t)((s.n - sizeof header) / 2);
    memcpy(s.at, header, sizeof header);
    const char *path = check_file(name, s.at, s.n);
    strbuf_free(&s);
    return path;
}

static void test_data_loss(slam_ops *ops) {
    if (!TEST("the loss of a data set is that of its chunks one by one")) return;
    enum { T = 48 };
    uint64_t rng = 43, targets, expected[2] = {0};
    double sum[2] = {0}, losses[3];
    slam_data *d = slam_data_new(T);
    CHECK(slam_data_add(d, write_documents("a.bin", 25, small.V, &rng), 1), "%s", slam_error());
    CHECK(slam_data_add(d, write_documents("b.bin", 9, small.V, &rng), 0.5), "%s", slam_error());
    CHECK(slam_data_prepare(d, small.V, 0, 0), "%s", slam_error());
    slam_model *m = slam_model_new(ops, &small, 1);
    for (size_t i = 0; i < d->n_chunks; i++) {
        const slam_chunk *c = &d->chunks[i];
        int tokens[T];
        for (uint32_t k = 0; k < c->n; k++) tokens[k] = d->files[c->file].tokens[c->first + k];
        sum[c->file] += losses_of(m, tokens, 0, 0, (int)c->n - 1);
        expected[c->file] += c->n - 1;
    }
    for (int B = 1; B <= 3; B++) {
        slam_batch b = slam_batch_new(B, T, 0);
        CHECK(slam_model_plan(m, B, T, SLAM_INFERENCE), "%s", slam_error());
        CHECK(slam_data_loss(m, d, &b, losses, &targets), "%s", slam_error()); // weights do not count
        const uint64_t n = expected[0] + expected[1];
        CHECK(targets == n, "%zu targets, expected %zu", (size_t)targets, (size_t)n);
        check_near("nats per target", losses[0], (sum[0] + sum[1]) / (double)n, 1e-5);
        for (int s = 0; s < 2; s++) check_near("of a source", losses[1 + s], sum[s] / (double)expected[s], 1e-5);
        slam_batch_free(&b);
    }
    slam_batch b = slam_batch_new(1, T, 0);
    d->V = small.V + 1;
    check_fails(slam_data_loss(m, d, &b, losses, &targets), "the model has one of 30");
    slam_batch_free(&b);
    slam_model_free(m);
    slam_data_free(d);
}

/* ---- sequences ---- */

enum { SEQUENCES = 40 };

static void make_sequences(slam_units *u) {
    uint64_t rng = 9;
    memset(u, 0, SEQUENCES * sizeof *u);
    for (int i = 0; i < SEQUENCES; i++) {
        const slam_units *same = i >= 30 ? &u[i - 20] : NULL; // some are equal
        u[i].n = same ? same->n : i == 3 ? 0 : i == 4 ? 200 : i == 5 ? 131 : 1 + (size_t)rng_below(&rng, 30);
        u[i].unit = NEW(int, u[i].n);
        for (size_t k = 0; k < u[i].n; k++) u[i].unit[k] = same ? same->unit[k] : (int)rng_below(&rng, 28);
    }
}

static int tokens_of(const slam_units *u, int *tokens) {
    tokens[0] = tokens[u->n + 1] = 1;
    for (size_t k = 0; k < u->n; k++) tokens[k + 1] = u->unit[k] + 2;
    return (int)u->n + 1; // to predict
}

/* Stops at the second call. */
static int stop_at(void *context, const slam_progress *p) {
    int *calls = (int *)context;
    CHECK(!strcmp(p->stage, "score") && p->done <= p->total, "%g of %g", p->done, p->total);
    return ++*calls < 2;
}

static void test_sequences(slam_ops *ops) {
    slam_units u[SEQUENCES], reversed[SEQUENCES];
    double scores[SEQUENCES], sums[SEQUENCES], other[SEQUENCES];
    int tokens[256];
    slam_model *m = slam_model_new(ops, &small, 3);
    make_sequences(u);
    if (TEST("sequences: each gets the score of a row of its own")) {
        CHECK(slam_score(m, u, SEQUENCES, 3, 256, 0, scores, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < SEQUENCES; i++) {
            const int n = tokens_of(&u[i], tokens);
            check_near("mean", scores[i], -losses_of(m, tokens, 0, 0, n) / n, 2e-5);
            if (i >= 30) CHECK(scores[i] == scores[i - 20], "equal sequences have other scores");
        }
        CHECK(slam_score(m, u, SEQUENCES, 1, 256, 1, sums, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < SEQUENCES; i++) check_near("sum", sums[i] / (double)(u[i].n + 1), scores[i], 2e-5);
    }
    if (TEST("sequences: windows predict each token once, with half a window before it")) {
        CHECK(slam_score(m, u, SEQUENCES, 2, 64, 1, sums, NULL, NULL), "%s", slam_error());
        for (int i = 4; i < 6; i++) {
            const int n = tokens_of(&u[i], tokens);
            double sum = losses_of(m, tokens, 0, 0, 64);
            for (int done = 64; done < n; done += 32) {
                const int end = done + 32 < n ? done + 32 : n;
                sum += losses_of(m, tokens, end - 64, done, end);
            }
            check_near("sum over windows", sums[i], -sum, 2e-3);
        }
    }
    if (TEST("sequences: batch, order and the other sequences change nothing")) {
        for (int i = 0; i < SEQUENCES; i++) reversed[i] = u[SEQUENCES - 1 - i];
        CHECK(slam_score(m, reversed, SEQUENCES, 7, 100, 0, other, NULL, NULL), "%s", slam_error());
        CHECK(slam_score(m, u, SEQUENCES, 1, 100, 0, scores, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < SEQUENCES; i++) check_near("score", other[SEQUENCES - 1 - i], scores[i], 1e-5);
        CHECK(slam_score(m, u, 1, 8, 256, 0, other, NULL, NULL), "%s", slam_error());
        check_near("alone", other[0], scores[0], 1e-5);
        CHECK(slam_score(m, u + 3, 1, 8, 256, 0, other, NULL, NULL), "a sequence without units: %s", slam_error());
        CHECK(slam_score(m, u, 0, 8, 256, 0, other, NULL, NULL), "no sequences: %s", slam_error());
    }
    if (TEST("sequences: errors")) {
        int calls = 0;
        check_fails(slam_score(m, u, SEQUENCES, 1, 256, 0, scores, stop_at, &calls), "stopped");
        CHECK(calls == 2, "%d calls", calls);
        check_fails(slam_score(m, u, SEQUENCES, 1, 257, 0, scores, NULL, NULL), "the model has 256 positions");
        check_fails(slam_score(m, u, SEQUENCES, 0, 256, 0, scores, NULL, NULL), "expected at least");
        check_fails(slam_score(m, u, SEQUENCES, 1, 1, 0, scores, NULL, NULL), "expected at least");
        u[2].unit[0] = 28;
        check_fails(slam_score(m, u, SEQUENCES, 3, 256, 0, scores, NULL, NULL),
                    "sequence 3: unit 1 is 28, expected below 28");
        u[2].unit[0] = 0;
        const float nan = NAN;
        ops->upload(ops, m->weights, &nan, sizeof nan);
        check_fails(slam_score(m, u, SEQUENCES, 3, 256, 0, scores, NULL, NULL), "the log-probability is not finite");
    }
    for (int i = 0; i < SEQUENCES; i++) free(u[i].unit);
    slam_model_free(m);
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    test_data_loss(ops);
    test_sequences(ops);
    slam_ops_free(ops);
    return check_end();
}
