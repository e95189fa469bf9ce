/* What ranks do together: the exchanges against sums made here, and training, whose numbers must be those of one process. Run by
   itself it is alone; ranks_test.sh runs it as several, also as C++ with the emulator of CUDA and NCCL. Rank 0 speaks for all. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

static slam_ranks *ranks;
static slam_ops *ops; // attached to them

/* A device of the kind that is tested. The emulator is slow, and its numbers are bf16, so that float weights are in parts, too. */
#ifdef SLAM_EMULATOR
static slam_ops *device(void) { return slam_cuda(0, 2); }
enum { ROWS = 4, T = 16, STEPS = 3, LAYERS = 3, POISONED = 1 };
static const double later = 1e-3; // after the first update a weight may round to the other bf16, which all that follows shows
#else
static slam_ops *device(void) { return slam_cpu(1); }
enum { ROWS = 7, T = 48, STEPS = 6, LAYERS = 5, POISONED = 2 };
static const double later = 1e-6;
#endif

static float number(int rank, size_t i) {
    uint64_t stream = rng_stream(3, (uint64_t)rank, i);
    return (float)rng_uniform(&stream) - 0.5f;
}

/* sum over the ranks of number(), in their order */
static float number_sum(size_t i) {
    float sum = number(0, i);
    for (int k = 1; k < ranks->n; k++) sum += number(k, i);
    return sum;
}

static void test_shares(void) {
    slam_ranks r = *ranks;
    for (r.n = 1; r.n < 9; r.n++)
        for (size_t n = 0; n < 3000; n = 2 * n + 1) {
            size_t shared = 0, parted = 0;
            for (r.rank = 0; r.rank < r.n; r.rank++) {
                size_t first, end, count;
                slam_ranks_share(&r, n, &first, &end);
                CHECK(first == shared && end - first - n / (size_t)r.n <= 1, "share %zu to %zu of %zu", first, end, n);
                shared = end;
                part_of(&r, r.rank, n, &first, &count);
                CHECK(first == parted && first % 64 == 0, "part %zu, %zu of %zu", first, count, n);
                parted += count;
            }
            CHECK(shared == n && parted == n, "%zu and %zu of %zu", shared, parted, n);
        }
}

static void test_words(void) {
    const int me = ranks->rank, n = ranks->n;
    double x[1500];
    char text[] = "none";
    CHECK(slam_ranks_max(ranks, 10 - me) == 10 && slam_ranks_max(ranks, -5 - me) == -5, "the largest");
    CHECK(slam_ranks_same(ranks, ~(uint64_t)0) && slam_ranks_same(ranks, 0), "the same numbers");
    CHECK(n == 1 || !slam_ranks_same(ranks, 7 + (uint64_t)(me == n - 1)), "one that differs");
    for (size_t i = 0; i < 1500; i++) x[i] = (double)number(me, i);
    slam_ranks_sum(ranks, x, 1500);
    for (size_t i = 0; i < 1500; i++) {
        double sum = (double)number(0, i);
        for (int k = 1; k < n; k++) sum += (double)number(k, i);
        CHECK(x[i] == sum, "sum %zu is %.17g, expected %.17g", i, x[i], sum);
    }
    if (me == 0) memcpy(text, "told", 5);
    slam_ranks_broadcast(ranks, text, sizeof text);
    CHECK(!strcmp(text, "told"), "%s", text);
    for (int round = 0; round < 3; round++) { // nothing at all; something of every second one; a lot
        size_t bytes_of_all, mine = round == 0 ? 0 : round == 1 ? (size_t)(me % 2 ? 0 : me + 1) : 100000 + (size_t)me, at = 0;
        char *bytes = (char *)malloc(mine + 1), *all;
        memset(bytes, 'a' + me, mine);
        if (!CHECK((all = (char *)slam_ranks_all_gather(ranks, bytes, mine, &bytes_of_all)) != NULL, "%s", slam_error())) return;
        for (int k = 0; k < n; k++) {
            const size_t of = round == 0 ? 0 : round == 1 ? (size_t)(k % 2 ? 0 : k + 1) : 100000 + (size_t)k;
            for (size_t i = 0; i < of; i++, at++)
                if ((at >= bytes_of_all || all[at] != 'a' + k) && !CHECK(0, "byte %zu of rank %d", i, k)) break;
        }
        CHECK(at == bytes_of_all, "%zu bytes of %zu", bytes_of_all, at);
        free(bytes);
        free(all);
    }
}

/* The first rank that fails speaks for all, and from then on nobody waits. */
static void test_agree(void) {
    slam_ranks *r = slam_ranks_join();
    fail("mine, %d", ranks->rank);
    CHECK(slam_ranks_agree(r, 1) == 1 && !slam_ranks_failed(r), "all are well");
    CHECK(slam_ranks_agree(r, ranks->rank == 0 && ranks->n > 1) == 0, "all but the first have failed");
    CHECK(!strcmp(slam_error(), ranks->n > 1 ? "rank 1: mine, 1" : "mine, 0"), "%s", slam_error());
    CHECK(slam_ranks_failed(r) == (ranks->n > 1), "known");
    CHECK(ranks->n == 1 || slam_ranks_agree(r, 1) == 0, "agreed after a failure");
    slam_ranks_leave(r, 1);
}

static void test_exchange(void) {
    const size_t sizes[] = {1, 63, 64, 1000, 64 * 12, 300001, 5};
    const size_t n_sizes = sizeof sizes / sizeof *sizes, all = 400000;
    float *x = (float *)ops->alloc(ops, all * sizeof *x), *whole = (float *)ops->alloc(ops, all * sizeof *x);
    size_t at = 0, first, count;
    CHECK(ops->finish(ops), "%s", slam_error()); // the memory is zero now
    for (size_t i = 0; i < all; i++) x[i] = number(ranks->rank, i);
    for (size_t k = 0; k < n_sizes; at += sizes[k++]) { // more under way than there is room for
        CHECK(exchange_reduce_scatter(ranks, x + at, sizes[k]), "%s", slam_error());
        exchange_progress(ranks);
    }
    exchange_wait(ranks);
    CHECK(ops->finish(ops), "%s", slam_error());
    at = 0;
    for (size_t k = 0; k < n_sizes; at += sizes[k++]) {
        part_of(ranks, ranks->rank, sizes[k], &first, &count);
        for (size_t i = first; i < first + count; i++) CHECK(x[at + i] == number_sum(at + i), "number %zu of %zu", i, sizes[k]);
        CHECK(exchange_all_gather(ranks, whole + at, x + at + first, sizes[k], sizeof *x), "%s", slam_error());
        CHECK(exchange_all_gather(ranks, x + at, x + at + first, sizes[k], sizeof *x), "%s", slam_error());
    }
    exchange_wait(ranks);
    CHECK(ops->finish(ops), "%s", slam_error());
    CHECK(ranks->transport == TRANSPORT_NONE || !memcmp(x, whole, at * sizeof *x), "gathered in place and apart");
    for (size_t i = 0; i < at; i++) CHECK(x[i] == number_sum(i), "number %zu", i);
    double stats[2] = {1.5 + ranks->rank, 2}, sum = 1.5, *given = (double *)(void *)x;
    for (int k = 1; k < ranks->n; k++) sum += 1.5 + k;
    ops->upload(ops, given, stats, sizeof stats);
    CHECK(exchange_all_reduce(ranks, given, 2), "%s", slam_error());
    ops->download(ops, stats, given, sizeof stats);
    CHECK(ops->finish(ops) && stats[0] == sum && stats[1] == 2 * ranks->n, "%g %g", stats[0], stats[1]);
    ops->release(ops, x);
    ops->release(ops, whole);
}

/* What is larger than a bucket may be: pieces of nearly one size, neighbours. */
static void test_buckets(void) {
    const size_t sizes[] = {BUCKET_MOST, BUCKET_MOST + 1, 3 * (size_t)BUCKET_MOST - 1};
    for (size_t k = 0; k < 3; k++) {
        slam_optimiser o = SLAM_ZERO;
        size_t at = 7;
        CHECK(bucket_add(&o, at, sizes[k], 5) && o.buckets == k + 1, "%zu buckets of %zu numbers", o.buckets, sizes[k]);
        for (size_t i = 0; i < o.buckets; at += o.all[i++].n)
            CHECK(o.all[i].first == at && o.all[i].after == 5 && o.all[i].n <= BUCKET_MOST &&
                      o.all[i].n + 512 * k >= sizes[k] / (k + 1),
                  "bucket %zu of %zu: %zu numbers at %zu", i, o.buckets, o.all[i].n, o.all[i].first);
        CHECK(at == 7 + sizes[k], "%zu numbers of %zu", at - 7, sizes[k]);
        free(o.all);
    }
}

/* ---- training ---- */

typedef struct outcome {
    double loss[STEPS], norm[STEPS];
    float *first, *weights, *moments; // (total) after the first update, (total), (2 total), on rank 0
    size_t total, kept;               // numbers of a moment that a rank keeps
} outcome;

static void outcome_free(outcome *o) {
    free(o->first);
    free(o->weights);
    free(o->moments);
}

/* `told`: the backward pass tells of its layers. poison: the step in which the last rank's gradient is not finite. */
static int train(slam_ops *with, const slam_config *config, int zero, int told, int poison, outcome *out) {
    const slam_adamw settings = {0, 0.9, 0.95, 1e-8, 0.1, 0.5, 0};
    static int tokens[ROWS * T], targets[ROWS * T], doc_start[ROWS * T];
    const double nan = NAN;
    size_t first, end;
    uint64_t random = 9;
    memset(out, 0, sizeof *out);
    slam_ranks_zero(with->ranks, zero);
    slam_ranks_share(with->ranks, ROWS, &first, &end);
    slam_model *m = slam_model_new(with, config, 5);
    if (!m || !slam_model_plan(m, 2, T, SLAM_TRAIN)) return 0;
    slam_optimiser *o = slam_optimiser_new(m, &settings);
    if (!o) return 0;
    const int root = slam_ranks_root(with->ranks);
    out->total = m->w.total;
    out->first = root ? (float *)malloc(out->total * sizeof(float)) : NULL;
    for (int step = 0; step < STEPS; step++) {
        slam_step s;
        for (int i = 0; i < ROWS * T; i++) tokens[i] = (int)rng_below(&random, (uint64_t)config->V);
        for (int i = 0; i < ROWS * T; i++) targets[i] = i % T + 1 < T ? tokens[i + 1] : -1;
        for (size_t b = first; b < end; b += 2) {
            const int last = end - b <= 2;
            const slam_batch batch = {last ? (int)(end - b) : 2, T, tokens + b * T, targets + b * T, doc_start, NULL};
            if (!slam_model_backward(m, &batch, 1.0f / (ROWS * (T - 1)), last && told ? slam_optimiser_after_layer : NULL, o))
                return 0;
            if (last && step == poison && slam_ranks_rank(with->ranks) == slam_ranks_count(with->ranks) - 1)
                with->upload(with, m->stats, &nan, sizeof nan);
        }
        if (!slam_optimiser_step(o, 1e-3, &s)) return 0;
        out->loss[step] = s.loss_sum / (ROWS * (T - 1));
        out->norm[step] = s.grad_norm;
        if (s.skipped != (step == poison)) return fail("step %d skipped: %d", step, s.skipped);
        if (step == 0 && !master_download(o, out->first)) return 0;
    }
    out->kept = o->n;
    out->weights = root ? (float *)malloc(out->total * sizeof(float)) : NULL;
    out->moments = root ? (float *)malloc(2 * out->total * sizeof(float)) : NULL;
    const int ok = master_download(o, out->weights) && state_download(o, o->m, out->moments) &&
                   state_download(o, o->v, root ? out->moments + out->total : NULL);
    slam_optimiser_free(o);
    slam_model_free(m);
    return ok;
}

static void check_same(const char *what, const outcome *a, const outcome *b) {
    CHECK(!memcmp(a->loss, b->loss, sizeof a->loss) && !memcmp(a->norm, b->norm, sizeof a->norm), "%s: other losses or norms",
          what);
    if (ranks->rank) return;
    CHECK(!memcmp(a->weights, b->weights, a->total * sizeof(float)), "%s: other weights", what);
    CHECK(!memcmp(a->moments, b->moments, 2 * a->total * sizeof(float)), "%s: other moments", what);
}

static void test_training(int tied) {
    slam_config c = config_tiny;
    slam_ops *lone = device();
    outcome alone, parts, late, whole;
    c.tied = tied;
    c.L = LAYERS; // buckets of two layers, and of one
    int ok = CHECK(train(lone, &c, 1, 0, -1, &alone), "%s", slam_error());
    ok = CHECK(train(ops, &c, 1, 1, -1, &parts), "%s", slam_error()) && ok;
    ok = CHECK(train(ops, &c, 1, 0, -1, &late), "%s", slam_error()) && ok;
    ok = CHECK(train(ops, &c, 0, 1, -1, &whole), "%s", slam_error()) && ok;
    if (!ok) return;
    for (int i = 0; i < STEPS; i++) {
        check_near("loss against one process", parts.loss[i], alone.loss[i], i ? later : 1e-6);
        check_near("norm against one process", parts.norm[i] / alone.norm[i], 1, i ? later : 1e-6);
    }
    if (ranks->rank == 0) {
        check_close("weights of the first update against one process", parts.first, alone.first, alone.total, 1e-6);
        check_close("weights against one process", parts.weights, alone.weights, alone.total, later);
    }
    check_same("reduced when all is computed", &parts, &late);
    check_same("without ZeRO", &parts, &whole);
    CHECK(whole.kept == alone.total && alone.kept == alone.total, "%zu and %zu moments of %zu", whole.kept, alone.kept,
          alone.total);
    /* what does not divide by 64 numbers and ranks, of each of 6 buckets */
    CHECK(parts.kept <= alone.total / (size_t)ranks->n + 6 * 64 * (size_t)ranks->n, "%zu moments of %zu", parts.kept, alone.total);
    outcome_free(&alone);
    outcome_free(&parts);
    outcome_free(&late);
    outcome_free(&whole);
    slam_ops_free(lone);
}

static void test_poison(void) {
    outcome out;
    slam_config c = config_tiny;
    c.L = LAYERS;
    CHECK(train(ops, &c, 1, 1, POISONED, &out), "%s", slam_error());
    CHECK(isnan(out.loss[POISONED]) && isfinite(out.loss[POISONED + 1]) && isfinite(out.norm[POISONED + 1]),
          "the step is left out on all, the next one is not");
    outcome_free(&out);
}

/* Written by all together, read back by each its part, and by one alone. */
static void test_moments(void) {
    const slam_adamw settings = {0, 0.9, 0.95, 1e-8, 0.1, 0.5, 0};
    char folder[600];
    slam_ops *lone = device();
    snprintf(folder, sizeof folder, "%.500s", check_path("moments"));
    slam_ranks_broadcast(ranks, folder, sizeof folder);
    if (ranks->rank == 0) CHECK(make_folders(folder), "%s", slam_error());
    slam_model *m = slam_model_new(ops, &config_tiny, 5), *again = slam_model_new(ops, &config_tiny, 5),
               *l = slam_model_new(lone, &config_tiny, 5);
    slam_optimiser *o = slam_optimiser_new(m, &settings), *p = slam_optimiser_new(again, &settings),
                   *q = slam_optimiser_new(l, &settings);
    parameter *list = NULL;
    size_t n = 0;
    if (!CHECK(o && p && q && (list = parameters_of(&config_tiny, &n)) != NULL, "%s", slam_error())) return;
    for (size_t k = 0; k < n; k++) // what is between tensors is not written
        for (size_t i = 0; i < parameter_size(&list[k]); i++) {
            const float mean = number(0, list[k].at + i), square = number(1, list[k].at + i);
            state_upload(o, o->m, &mean, list[k].at + i, 1);
            state_upload(o, o->v, &square, list[k].at + i, 1);
        }
    o->updates = 17;
    CHECK(slam_optimiser_save(o, folder) && slam_optimiser_load(p, folder) && slam_optimiser_load(q, folder), "%s", slam_error());
    CHECK(p->updates == 17 && q->updates == 17, "%ld and %ld updates", p->updates, q->updates);
    CHECK(!memcmp(o->m, p->m, o->n * sizeof(float)) && !memcmp(o->v, p->v, o->n * sizeof(float)), "read by those who wrote");
    for (size_t i = 0; i < o->buckets; i++) {
        const bucket *b = &o->all[i];
        CHECK(!memcmp(o->m + b->at, q->m + b->mine, b->count * sizeof(float)), "the means of bucket %zu, alone", i);
        CHECK(!memcmp(o->v + b->at, q->v + b->mine, b->count * sizeof(float)), "the squares of bucket %zu, alone", i);
    }
    free(list);
    slam_optimiser_free(o);
    slam_optimiser_free(p);
    slam_optimiser_free(q);
    slam_model_free(m);
    slam_model_free(again);
    slam_model_free(l);
    slam_ops_free(lone);
}

int main(void) {
    ranks = slam_ranks_join();
    ops = device();
#ifdef SLAM_EMULATOR
    emulator_lazy(1); // so that what NCCL does not wait for has not been computed yet
#endif
    if (!ranks || !ops) return 1;
    slam_ranks_attach(ranks, ops);
    if (ops->ranks && !ranks_connect(ranks)) return 1;
    if (ranks->rank && !freopen("/dev/null", "w", stdout)) return 1;
    if (TEST("ranks: shares and parts")) test_shares();
    if (TEST("ranks: what they tell each other")) test_words();
    if (TEST("ranks: one fails, all know")) test_agree();
    if (TEST("ranks: reduce, gather")) test_exchange();
    if (TEST("ranks: large buckets")) test_buckets();
    for (int tied = 0; tied < 2; tied++)
        if (TEST("ranks: training, %s", tied ? "tied head" : "head of its own")) test_training(tied);
    if (TEST("ranks: a loss that is not finite on one of them")) test_poison();
    if (TEST("ranks: moments in a file")) test_moments();
    const int failed = (int)slam_ranks_max(ranks, (check_close_test(), check_state.failed));
    if (failed > check_state.failed) printf("FAIL ranks: another rank than the first has failed\n"), check_state.failed++;
    check_end();
    slam_ranks_leave(ranks, 0);
    slam_ops_free(ops);
    return failed != 0;
}
