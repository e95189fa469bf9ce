/* What ranks do together: the exchanges against sums made here, and training, whose numbers must be those of one process. Run by
   itself it is a single process; ranks_test.sh runs it as several, also as C++ with the emulator of CUDA and NCCL. Rank 0 prints. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

static slam_comm *comm;
static slam_ops *ops; // attached to it

/* A device of the kind that is tested. The emulator is slow, and its numbers are bf16, so that float weights are sharded, too. */
#ifdef SLAM_EMULATOR
static slam_ops *device(void) { return slam_cuda(0, 2); }
enum { ROWS = 4, T = 16, STEPS = 3, LAYERS = 3, POISONED = 1 };
static const double later =
    1e-3; // after the first update a weight may round to the other bf16, which all that follows shows
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
    for (int k = 1; k < comm->size; k++) sum += number(k, i);
    return sum;
}

static void test_shares(void) {
    slam_comm c = *comm;
    for (c.size = 1; c.size < 9; c.size++)
        for (size_t n = 0; n < 3000; n = 2 * n + 1) {
            size_t shared = 0, parted = 0;
            for (c.rank = 0; c.rank < c.size; c.rank++) {
                const range share = comm_share(&c, n), part = comm_part(&c, c.rank, n);
                CHECK(share.first == shared && share.end - share.first - n / (size_t)c.size <= 1,
                      "share %zu to %zu of %zu", share.first, share.end, n);
                CHECK(part.first == parted && part.first % 64 == 0, "part %zu to %zu of %zu", part.first, part.end, n);
                shared = share.end;
                parted = part.end;
            }
            CHECK(shared == n && parted == n, "%zu and %zu of %zu", shared, parted, n);
        }
}

/* The n bytes that a rank gathers in a round: none, some of every second rank, many. */
static size_t gathered(int round, int rank) {
    return round == 0 ? 0 : round == 1 ? (size_t)(rank % 2 ? 0 : rank + 1) : 100000 + (size_t)rank;
}

static void test_collectives(void) {
    const int rank = comm->rank, size = comm->size;
    double x[1500];
    char text[] = "none";
    CHECK(slam_comm_max(comm, 10 - rank) == 10 && slam_comm_max(comm, -5 - rank) == -5, "the largest");
    CHECK(comm_equal(comm, ~(uint64_t)0) && comm_equal(comm, 0), "equal numbers");
    CHECK(size == 1 || !comm_equal(comm, 7 + (uint64_t)(rank == size - 1)), "one that differs");
    for (size_t i = 0; i < 1500; i++) x[i] = (double)number(rank, i);
    slam_comm_sum(comm, x, 1500);
    for (size_t i = 0; i < 1500; i++) {
        double sum = (double)number(0, i);
        for (int k = 1; k < size; k++) sum += (double)number(k, i);
        CHECK(x[i] == sum, "sum %zu is %.17g, expected %.17g", i, x[i], sum);
    }
    if (rank == 0) memcpy(text, "sent", 5);
    comm_broadcast(comm, text, sizeof text);
    CHECK(!strcmp(text, "sent"), "%s", text);
    for (int round = 0; round < 3; round++) {
        size_t at = 0;
        strbuf own = ZERO;
        for (size_t i = 0; i < gathered(round, rank); i++) strbuf_add(&own, "%c", 'a' + rank);
        strbuf all = comm_all_gather(comm, &own);
        for (int k = 0; k < size; k++)
            for (size_t i = 0; i < gathered(round, k); i++, at++)
                if ((at >= all.n || all.at[at] != 'a' + k) && !CHECK(0, "byte %zu of rank %d", i, k)) break;
        CHECK(at == all.n, "%zu bytes of %zu", all.n, at);
        strbuf_free(&own), strbuf_free(&all);
    }
}

/* The error is the lowest failed rank's, and from then on nobody waits. A NULL comm is a single process. */
static void test_all_ok(void) {
    slam_comm *c = slam_comm_init();
    set_error("own, %d", comm->rank);
    CHECK(slam_all_ok(c, 1) == 1 && !c->failed, "no rank failed");
    CHECK(slam_all_ok(c, comm->rank == 0 && comm->size > 1) == 0, "all but the first failed");
    CHECK(!strcmp(slam_error(), comm->size > 1 ? "rank 1: own, 1" : "own, 0"), "%s", slam_error());
    CHECK(c->failed == (comm->size > 1), "known");
    CHECK(comm->size == 1 || slam_all_ok(c, 1) == 0, "all ok after a failure");
    slam_comm_finalize(c, 1);
    CHECK(slam_all_ok(NULL, 1) && !slam_all_ok(NULL, 0) && slam_comm_max(NULL, 3) == 3 && comm_equal(NULL, 5), "NULL");
    CHECK(comm_share(NULL, 7).end == 7 && comm_part(NULL, 0, 7).end == 7, "NULL");
}

static void test_exchange(void) {
    const size_t sizes[] = {1, 63, 64, 1000, 64 * 12, 300001, 5}, n_sizes = sizeof sizes / sizeof *sizes, all = 400000;
    float *x = (float *)ops->alloc(ops, all * sizeof *x), *whole = (float *)ops->alloc(ops, all * sizeof *x);
    size_t at = 0;
    CHECK(ops->finish(ops), "%s", slam_error()); // the memory is zero now
    for (size_t i = 0; i < all; i++) x[i] = number(comm->rank, i);
    for (size_t k = 0; k < n_sizes; at += sizes[k++]) { // one while another is under way
        CHECK(comm_reduce_scatter(ops->comm, x + at, sizes[k]), "%s", slam_error());
        comm_progress(ops->comm);
    }
    comm_wait(ops->comm);
    CHECK(ops->finish(ops), "%s", slam_error());
    at = 0;
    for (size_t k = 0; k < n_sizes; at += sizes[k++]) {
        const range part = comm_part(comm, comm->rank, sizes[k]);
        for (size_t i = part.first; i < part.end; i++)
            CHECK(x[at + i] == number_sum(at + i), "number %zu of %zu", i, sizes[k]);
        CHECK(comm_gather_parts(ops->comm, whole + at, x + at + part.first, sizes[k], sizeof *x), "%s", slam_error());
        CHECK(comm_gather_parts(ops->comm, x + at, x + at + part.first, sizes[k], sizeof *x), "%s", slam_error());
    }
    comm_wait(ops->comm);
    CHECK(ops->finish(ops), "%s", slam_error());
    CHECK(!ops->comm || !memcmp(x, whole, at * sizeof *x), "gathered in place and elsewhere");
    for (size_t i = 0; i < at; i++) CHECK(x[i] == number_sum(i), "number %zu", i);
    ops->release(ops, x);
    ops->release(ops, whole);
}

/* What is larger than a bucket may be: parts of nearly one size, neighbours. */
static void test_buckets(void) {
    const size_t sizes[] = {BUCKET_MAX, BUCKET_MAX + 1, 3 * (size_t)BUCKET_MAX - 1};
    for (size_t k = 0; k < 3; k++) {
        slam_buckets b = ZERO;
        size_t at = 7;
        b.comm = comm;
        bucket_add(&b, at, sizes[k], 5);
        CHECK(b.n == k + 1, "%zu buckets of %zu numbers", b.n, sizes[k]);
        for (size_t i = 0; i < b.n; at += b.list[i++].n)
            CHECK(b.list[i].first == at && b.list[i].after == 5 && b.list[i].n <= BUCKET_MAX &&
                      b.list[i].n + 512 * k >= sizes[k] / (k + 1),
                  "bucket %zu of %zu: %zu numbers at %zu", i, b.n, b.list[i].n, b.list[i].first);
        CHECK(at == 7 + sizes[k] && b.moments == sizes[k], "%zu numbers of %zu", at - 7, sizes[k]);
        free(b.list);
    }
}

/* ---- training ---- */

typedef struct outcome {
    double loss[STEPS], norm[STEPS];
    float *first, *weights, *moments; // (total) after the first update, (total), (2 total), on rank 0
    size_t total, kept;               // numbers of the model; of a moment that a rank keeps
    int reduced;                      // buckets reduced during the backward passes
} outcome;

static void outcome_free(outcome *o) { free(o->first), free(o->weights), free(o->moments); }

static slam_adamw adamw_new(slam_model *m) {
    slam_adamw o = ZERO;
    o.beta1 = 0.9, o.beta2 = 0.95, o.eps = 1e-8, o.weight_decay = 0.1, o.clip = 0.5;
    CHECK(slam_adamw_init(&o, m), "%s", slam_error());
    return o;
}

/* poison: the step in which the last rank's loss is not finite. */
static int train(slam_ops *with, const slam_config *config, int zero, int overlap, int poison, outcome *out) {
    const int rank = with->comm ? comm->rank : 0, last = with->comm ? comm->rank == comm->size - 1 : 1;
    const range rows = comm_share(with->comm, ROWS);
    const double nan = NAN;
    uint64_t random = 9;
    memset(out, 0, sizeof *out);
    comm->zero = zero;
    slam_model *m = slam_model_new(with, config, 5);
    slam_batch all = slam_batch_new(ROWS, T, 0);
    if (!m || !slam_model_plan(m, 2, T, SLAM_TRAIN)) return 0;
    slam_adamw o = adamw_new(m);
    out->total = m->n_weights;
    out->first = rank ? NULL : NEW(float, out->total);
    for (int step = 0; step < STEPS; step++) {
        slam_step s = ZERO;
        for (int i = 0; i < ROWS * T; i++) all.tokens[i] = (int)rng_below(&random, (uint64_t)config->V);
        for (int i = 0; i < ROWS * T; i++) all.targets[i] = i % T + 1 < T ? all.tokens[i + 1] : -1;
        for (size_t b = rows.first; b < rows.end; b += 2) {
            slam_batch some = all;
            some.B = rows.end - b < 2 ? 1 : 2;
            some.tokens += b * T, some.targets += b * T;
            if (overlap && rows.end - b <= 2) slam_adamw_overlap(&o);
            if (!slam_forward_backward(m, &some, 1.0f / (ROWS * (T - 1)))) return 0;
            CHECK(!m->grads_ready, "overlap lasts longer than a backward pass");
        }
        out->reduced += (int)o.buckets->reduced;
        if (step == poison && last) with->upload(with, m->stats, &nan, sizeof nan);
        if (!slam_adamw_step(&o, 1e-3, &s)) return 0;
        out->loss[step] = s.loss_sum / (ROWS * (T - 1));
        out->norm[step] = s.grad_norm;
        if (s.skipped != (step == poison)) return set_error("step %d skipped: %d", step, s.skipped);
        if (step == 0 && !adamw_download(&o, o.master ? o.master : m->master, out->first)) return 0;
        for (size_t i = 0; i < m->n_weights; i++) CHECK(m->grads[i] == 0, "gradient %zu after an update", i);
    }
    CHECK(o.updates == STEPS - (poison >= 0), "%ld updates", o.updates);
    out->kept = o.buckets->moments;
    out->weights = rank ? NULL : NEW(float, out->total);
    out->moments = rank ? NULL : NEW(float, 2 * out->total);
    const int ok = adamw_download(&o, o.master ? o.master : m->master, out->weights) &&
                   adamw_download(&o, o.m, out->moments) &&
                   adamw_download(&o, o.v, rank ? NULL : out->moments + out->total);
    slam_batch_free(&all);
    slam_adamw_free(&o);
    slam_model_free(m);
    return ok;
}

static void check_same(const char *what, const outcome *a, const outcome *b) {
    CHECK(!memcmp(a->loss, b->loss, sizeof a->loss) && !memcmp(a->norm, b->norm, sizeof a->norm),
          "%s: other losses or norms", what);
    if (comm->rank) return;
    CHECK(!memcmp(a->weights, b->weights, a->total * sizeof(float)), "%s: other weights", what);
    CHECK(!memcmp(a->moments, b->moments, 2 * a->total * sizeof(float)), "%s: other moments", what);
}

static void test_training(int tied) {
    slam_config c;
    slam_ops *alone = device();
    outcome one, sharded, late, whole;
    CHECK(slam_config_load(&c, "tiny"), "%s", slam_error());
    c.tied = tied;
    c.L = LAYERS; // buckets of two layers, and of one
    int ok = CHECK(train(alone, &c, 1, 0, -1, &one), "%s", slam_error());
    ok = CHECK(train(ops, &c, 1, 1, -1, &sharded), "%s", slam_error()) && ok;
    ok = CHECK(train(ops, &c, 1, 0, -1, &late), "%s", slam_error()) && ok;
    ok = CHECK(train(ops, &c, 0, 1, -1, &whole), "%s", slam_error()) && ok;
    if (!ok) return;
    for (int i = 0; i < STEPS; i++) {
        check_near("loss against one process", sharded.loss[i], one.loss[i], i ? later : 1e-6);
        check_near("norm against one process", sharded.norm[i] / one.norm[i], 1, i ? later : 1e-6);
    }
    if (comm->rank == 0) {
        check_close("weights of the first update against one process", sharded.first, one.first, one.total, 1e-6);
        check_close("weights against one process", sharded.weights, one.weights, one.total, later);
    }
    check_same("reduced when all is computed", &sharded, &late);
    check_same("without ZeRO", &sharded, &whole);
    CHECK(late.reduced == 0 && (comm->size == 1 || sharded.reduced > 0), "%d and %d buckets reduced early",
          late.reduced, sharded.reduced);
    CHECK(whole.kept == one.total && one.kept == one.total, "%zu and %zu moments of %zu", whole.kept, one.kept,
          one.total);
    /* what does not divide by 64 numbers and ranks, of each of 6 buckets */
    CHECK(sharded.kept <= one.total / (size_t)comm->size + 6 * 64 * (size_t)comm->size, "%zu moments of %zu",
          sharded.kept, one.total);
    outcome_free(&one), outcome_free(&sharded), outcome_free(&late), outcome_free(&whole);
    slam_ops_free(alone);
}

static void test_poison(void) {
    outcome out;
    slam_config c;
    CHECK(slam_config_load(&c, "tiny"), "%s", slam_error());
    c.L = LAYERS;
    CHECK(train(ops, &c, 1, 1, POISONED, &out), "%s", slam_error());
    CHECK(isnan(out.loss[POISONED]) && isfinite(out.loss[POISONED + 1]) && isfinite(out.norm[POISONED + 1]),
          "the step is skipped on all ranks, the next one is not");
    outcome_free(&out);
}

/* The state of all ranks as one, from there to each its part, and to a single process. */
static void test_state(void) {
    slam_config c;
    slam_ops *alone = device();
    CHECK(slam_config_load(&c, "tiny"), "%s", slam_error());
    comm->zero = 1;
    slam_model *m = slam_model_new(ops, &c, 5), *l = slam_model_new(alone, &c, 5);
    CHECK(slam_model_plan(m, 1, 1, SLAM_TRAIN) && slam_model_plan(l, 1, 1, SLAM_TRAIN), "%s", slam_error());
    slam_adamw o = adamw_new(m), q = adamw_new(l);
    if (!m->master) check_fails(slam_model_save(m, ".", SLAM_FORMAT_HF), "slam_checkpoint_save collects them");
    const model_tensors *t = &m->layout->tensors;
    float *host = NEW(float, m->n_weights), *whole = NEW(float, m->n_weights);
    for (size_t i = 0; i < m->n_weights; i++) host[i] = number(0, i);
    for (size_t k = 0; k < t->n; k++) { // as a checkpoint does: tensor by tensor
        adamw_upload(&o, o.m, host + t->list[k].offset, t->list[k].offset, tensor_size(&t->list[k]));
        adamw_upload(&q, q.m, host + t->list[k].offset, t->list[k].offset, tensor_size(&t->list[k]));
    }
    CHECK(adamw_download(&o, o.m, comm->rank ? NULL : whole), "%s", slam_error());
    for (size_t k = 0; comm->rank == 0 && k < t->n; k++)
        CHECK(!memcmp(whole + t->list[k].offset, host + t->list[k].offset, tensor_size(&t->list[k]) * sizeof(float)),
              "%s", t->list[k].name);
    CHECK(adamw_download(&q, q.m, host), "%s", slam_error());
    for (const bucket *k = o.buckets->list; k < o.buckets->list + o.buckets->n; k++) {
        ops->download(ops, whole, o.m + k->state, k->update_n * sizeof(float));
        CHECK(!memcmp(whole, host + k->update, k->update_n * sizeof(float)), "this rank's part of a bucket");
    }
    free(host), free(whole);
    slam_adamw_free(&o), slam_adamw_free(&q);
    slam_model_free(m), slam_model_free(l);
    slam_ops_free(alone);
}

int main(void) {
    comm = slam_comm_init();
    ops = device();
#ifdef SLAM_EMULATOR
    emulator_lazy(1); // so that what NCCL does not wait for has not been computed yet
#endif
    if (!comm || !ops) return 1;
    slam_comm_attach(comm, ops);
    if (!comm_connect(ops->comm)) return 1;
    if (comm->rank && !freopen("/dev/null", "w", stdout)) return 1;
    if (TEST("ranks: shares and parts")) test_shares();
    if (TEST("ranks: collectives")) test_collectives();
    if (TEST("ranks: one fails, all know")) test_all_ok();
    if (TEST("ranks: reduce, gather")) test_exchange();
    if (TEST("ranks: large buckets")) test_buckets();
    for (int tied = 0; tied < 2; tied++)
        if (TEST("ranks: training, %s", tied ? "tied head" : "head of its own")) test_training(tied);
    if (TEST("ranks: a loss that is not finite on one of them")) test_poison();
    if (TEST("ranks: the state of all")) test_state();
    const int failed = (int)slam_comm_max(comm, (check_close_test(), check_state.failed));
    if (failed > check_state.failed)
        printf("FAIL ranks: another rank than the first has failed\n"), check_state.failed++;
    check_end();
    slam_comm_finalize(comm, 0);
    slam_ops_free(ops);
    return failed != 0;
}
