/* Batches: documents, chunks, packing, weights, seeking, shares of ranks, hash; auto-BLEU. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

/* ---- data to test with ---- */

typedef struct tokens {
    uint16_t *at;
    size_t n, capacity, documents;
} tokens;

/* A document of n random units below V - 2. */
static void add_document(tokens *t, size_t n, int V, uint64_t *rng) {
    GROW(uint16_t, t->at, t->capacity, t->n + n + 2);
    t->at[t->n++] = 1;
    for (size_t i = 0; i < n; i++) t->at[t->n++] = (uint16_t)(2 + rng_below(rng, (uint64_t)V - 2));
    t->at[t->n++] = 1;
    t->documents++;
}

static const char *write_shard(const char *name, const uint16_t *at, size_t n, int V, int fingerprint) {
    const int32_t header[256] = {20240520, 1, (int32_t)n, V, fingerprint};
    strbuf s = ZERO;
    strbuf_add_bytes(&s, header, sizeof header);
    strbuf_add_bytes(&s, at, 2 * n);
    const char *path = check_file(name, s.at, s.n);
    strbuf_free(&s);
    return path;
}

static const char *write_lines(const char *name, const tokens *t) {
    strbuf s = ZERO;
    for (size_t i = 0; i < t->n; i++) {
        strbuf_add(&s, "{\"units\": [");
        for (i++; t->at[i] != 1; i++) strbuf_add(&s, "%s%d", t->at[i - 1] == 1 ? "" : ", ", t->at[i] - 2);
        strbuf_add(&s, "], \"file_name\": \"a\"}\n");
    }
    const char *path = check_file(name, s.at, s.n);
    strbuf_free(&s);
    return path;
}

static const char *write_tokens(const char *name, tokens *t, int V) {
    const char *path = write_shard(name, t->at, t->n, V, 0);
    free(t->at);
    memset(t, 0, sizeof *t);
    return path;
}

/* A loader whose first batch is epoch 0. */
static slam_loader *load_epoch(const slam_data *d, uint64_t seed) {
    slam_loader *l = slam_loader_new(d, seed, 1);
    if (l) slam_loader_begin(l, (int)l->epoch_rows, NULL);
    return l;
}

static slam_data *open_data(int context, int V, const char *path) {
    slam_data *d = slam_data_new(context);
    if (!CHECK(d && slam_data_add(d, path, 1) && slam_data_prepare(d, V, 0, 0), "%s", slam_error())) exit(1);
    return d;
}

/* ---- what a loader gave ---- */

/* A hash of each chunk, in the order in which they came, and one of each row. */
typedef struct seen {
    uint64_t *chunk, *row;
    size_t chunks, chunk_capacity, rows, row_capacity, tokens, targets;
} seen;

static void see(uint64_t **list, size_t *n, size_t *capacity, uint64_t hash) {
    GROW(uint64_t, *list, *capacity, *n + 1);
    (*list)[(*n)++] = hash;
}

static void seen_free(seen *s) {
    free(s->chunk);
    free(s->row);
    memset(s, 0, sizeof *s);
}

static uint64_t hash_chunk(const int *token, int n) { return hash_bytes(HASH_START, token, (size_t)n * sizeof *token); }

/* Checks all that must hold for row i of a batch, notes its chunks. */
static void see_row(const slam_batch *b, int i, const slam_data *d, const slam_sequence **sequence, seen *s) {
    const int T = b->T, *token = b->tokens + i * T, *target = b->targets + i * T, *start = b->doc_start + i * T;
    int n = T, end;
    while (n > 0 && token[n - 1] == 0) n--;
    for (int t = 0; t < n; t = end) {
        for (end = t; end < n && start[end] == t; end++) {
            const int expected = end + 1 < n && start[end + 1] == t ? token[end + 1] : -1;
            CHECK(token[end] > 0, "padding inside of a row, at %d", end);
            CHECK(target[end] == expected, "target %d at %d, expected %d", target[end], end, expected);
        }
        if (!CHECK(end - t >= 2, "a chunk of %d tokens, doc_start[%d] = %d", end - t, t, start[t])) return;
        const slam_chunk *c = &d->chunks[(*sequence)->item];
        CHECK((*sequence)->first == i * T + t && (*sequence)->end == i * T + end - 1 && (int)c->n == end - t &&
                  d->files[c->file].tokens[c->first] == token[t],
              "sequence %d to %d, expected %d to %d", (*sequence)->first, (*sequence)->end, i * T + t, i * T + end - 1);
        ++*sequence;
        see(&s->chunk, &s->chunks, &s->chunk_capacity, hash_chunk(token + t, end - t));
        s->targets += (size_t)(end - t - 1);
    }
    for (int t = n; t < T; t++) CHECK(token[t] == 0 && target[t] == -1 && start[t] == t, "padding at %d", t);
    CHECK(n > 0, "an empty row");
    uint64_t hash = hash_bytes(HASH_START, token, (size_t)T * sizeof *token);
    hash = hash_bytes(hash_bytes(hash, target, (size_t)T * sizeof *target), start, (size_t)T * sizeof *start);
    see(&s->row, &s->rows, &s->row_capacity, hash);
    s->tokens += (size_t)n;
}

/* Reads this rank's share of the next global batch, `capacity` rows at a time. Returns slam_loader_begin's rows. */
static int see_batch(slam_loader *l, int rows, int capacity, const slam_comm *comm, seen *s) {
    const int n = slam_loader_begin(l, rows, comm), share = l->rows_left;
    int left = share, got;
    slam_batch b = slam_batch_new(capacity, l->T, 0);
    while ((got = slam_loader_next(l, &b)) > 0) {
        const slam_sequence *sequence = b.sequences;
        CHECK(got == b.B && got == (left < capacity ? left : capacity) && b.T == l->T, "%d rows of %d", got, left);
        for (int i = 0; i < got; i++) see_row(&b, i, (const slam_data *)l->packer->context, &sequence, s);
        CHECK(sequence == b.sequences + b.n_sequences, "%zu sequences", b.n_sequences);
        left -= got;
        CHECK(l->rows_left == left, "%d rows left, expected %d", l->rows_left, left);
    }
    slam_batch_free(&b);
    return n;
}

/* The rest of this epoch, or the next one if it is over. */
static seen see_epoch(slam_loader *l) {
    seen s = ZERO;
    do see_batch(l, 1, 1, NULL, &s);
    while (l->row < l->epoch_rows);
    return s;
}

static seen see_data(const slam_data *d, uint64_t seed, int shuffle) {
    slam_loader *l = slam_loader_new(d, seed, shuffle);
    seen s = ZERO;
    if (CHECK(l != NULL, "%s", slam_error())) s = see_epoch(l);
    slam_loader_free(l);
    return s;
}

/* The chunks of a source, in file order. */
static seen see_source(const slam_data *d, int source) {
    seen s = ZERO;
    int *token = NEW(int, (size_t)d->context);
    for (size_t i = d->sources[source].first_chunk; i < d->sources[source].end_chunk; i++) {
        const slam_chunk *c = &d->chunks[i];
        for (uint32_t k = 0; k < c->n; k++) token[k] = d->files[c->file].tokens[c->first + k];
        see(&s.chunk, &s.chunks, &s.chunk_capacity, hash_chunk(token, (int)c->n));
    }
    free(token);
    return s;
}

static void see_all(seen *s, const seen *more) {
    for (size_t i = 0; i < more->chunks; i++) see(&s->chunk, &s->chunks, &s->chunk_capacity, more->chunk[i]);
}

/* The chunks that documents must have become, from the tokens alone. */
static seen expect_chunks(const tokens *t, int T) {
    seen s = ZERO;
    int *token = NEW(int, (size_t)T);
    for (size_t i = 0; i < t->n;) {
        size_t end = i + 1;
        while (t->at[end] != 1) end++;
        for (end++; i < end;) {
            int n = 0;
            while (n < T && i < end) token[n++] = t->at[i++];
            if (n < 2) continue;
            see(&s.chunk, &s.chunks, &s.chunk_capacity, hash_chunk(token, n));
            s.tokens += (size_t)n;
            s.targets += (size_t)n - 1;
        }
    }
    free(token);
    return s;
}

/* The same chunks the same number of times, in any order. */
static int same_chunks(const seen *a, const seen *b) {
    if (a->chunks != b->chunks || a->chunks == 0) return a->chunks == b->chunks;
    const size_t bytes = a->chunks * sizeof(uint64_t);
    uint64_t *x = NEW(uint64_t, 2 * a->chunks), *y = x + a->chunks;
    memcpy(x, a->chunk, bytes);
    memcpy(y, b->chunk, bytes);
    qsort(x, a->chunks, sizeof *x, compare_u64);
    qsort(y, b->chunks, sizeof *y, compare_u64);
    const int same = memcmp(x, y, bytes) == 0;
    free(x);
    return same;
}

static int same_rows(const seen *a, const seen *b) {
    return a->rows == b->rows && (a->rows == 0 || memcmp(a->row, b->row, a->rows * sizeof *a->row) == 0);
}

static size_t times_seen(const seen *s, uint64_t chunk) {
    size_t n = 0;
    for (size_t i = 0; i < s->chunks; i++) n += s->chunk[i] == chunk;
    return n;
}

/* ---- chunks and rows ---- */

static void test_chunks(void) {
    static const int contexts[] = {2, 3, 7, 64, 100, 1024};
    for (int c = 0; c < 6; c++) {
        const int T = contexts[c];
        if (!TEST("data: every chunk once, context %d", T)) continue;
        uint64_t rng = 5;
        tokens t = ZERO;
        for (int i = 0; i < 300; i++) add_document(&t, 1 + rng_below(&rng, i % 10 ? 60 : 3000), 502, &rng);
        slam_data *d = open_data(T, 502, write_shard("chunks.bin", t.at, t.n, 502, 0));
        seen expected = expect_chunks(&t, T), in_order = see_data(d, 0, 0);
        CHECK(same_chunks(&in_order, &expected), "in file order");
        slam_loader *l = slam_loader_new(d, 3, 1);
        seen first = see_epoch(l), second = see_epoch(l);
        CHECK(same_chunks(&first, &expected) && same_chunks(&second, &expected), "shuffled");
        CHECK(!same_rows(&first, &second), "two epochs in the same order");
        CHECK(first.tokens == expected.tokens && first.targets == expected.targets, "%zu tokens, %zu targets",
              first.tokens, first.targets);
        slam_loader_free(l);
        l = load_epoch(d, 3);
        CHECK(d->sources[0].documents == 300 && l->packer->batch.n_items == expected.chunks &&
                  l->tokens == first.tokens && l->targets == first.targets && l->epoch_rows == first.rows,
              "an epoch of %zu documents, %zu chunks, %zu tokens, %zu targets, %zu rows", d->sources[0].documents,
              l->packer->batch.n_items, (size_t)l->tokens, (size_t)l->targets, (size_t)l->epoch_rows);
        slam_loader_free(l);
        slam_data_free(d);
        seen_free(&expected), seen_free(&in_order), seen_free(&first), seen_free(&second);
        free(t.at);
    }
    if (TEST("data: a document that leaves a last chunk of one token")) {
        uint64_t rng = 5;
        tokens t = ZERO;
        add_document(&t, 15, 502, &rng); // 17 tokens: 8, 8 and a lone 1
        slam_data *d = open_data(8, 502, write_tokens("lone.bin", &t, 502));
        seen s = see_data(d, 0, 1);
        CHECK(s.chunks == 2 && s.tokens == 16 && s.targets == 14, "%zu chunks, %zu tokens, %zu targets", s.chunks,
              s.tokens, s.targets);
        seen_free(&s);
        slam_data_free(d);
    }
    if (TEST("data: less than a row")) {
        uint64_t rng = 37;
        tokens t = ZERO;
        add_document(&t, 5, 502, &rng);
        add_document(&t, 9, 502, &rng);
        slam_data *d = open_data(64, 502, write_tokens("small.bin", &t, 502));
        slam_loader *l = slam_loader_new(d, 0, 1);
        for (int e = 0; e < 3; e++) {
            seen s = see_epoch(l);
            CHECK(s.rows == 1 && s.tokens == 18 && s.targets == 16 && l->epoch == (uint64_t)e, "%zu rows, %zu tokens",
                  s.rows, s.tokens);
            seen_free(&s);
        }
        slam_loader_free(l);
        slam_data_free(d);
    }
}

/* 20,000 documents of 38 to 42 tokens at context 64: no two fit one row, and no row is more than two thirds full. */
static void test_poor_rows(void) {
    if (!TEST("data: every chunk exactly once an epoch where no rows are full")) return;
    enum { T = 64, DOCUMENTS = 20000 };
    uint64_t rng = 47;
    tokens t = ZERO;
    for (int i = 0; i < DOCUMENTS; i++) add_document(&t, 36 + rng_below(&rng, 5), 502, &rng);
    const size_t total = t.n;
    seen expected = expect_chunks(&t, T);
    slam_data *d = open_data(T, 502, write_tokens("poor.bin", &t, 502));
    slam_loader *l = slam_loader_new(d, 3, 1);
    for (int e = 0; e < 3; e++) {
        seen s = see_epoch(l);
        CHECK(s.chunks == DOCUMENTS && s.tokens == total && s.rows == DOCUMENTS,
              "epoch %d: %zu chunks, %zu tokens, %zu rows; expected %d, %zu, %d", e, s.chunks, s.tokens, s.rows,
              DOCUMENTS, total, DOCUMENTS);
        CHECK(same_chunks(&s, &expected), "epoch %d: other chunks", e);
        seen_free(&s);
    }
    slam_loader_free(l);
    l = load_epoch(d, 3);
    CHECK(l->tokens == total && l->packer->batch.n_items == DOCUMENTS,
          "an epoch of %zu tokens and %zu chunks, expected %zu and %d", (size_t)l->tokens, l->packer->batch.n_items,
          total, DOCUMENTS);
    slam_loader_free(l);
    slam_data_free(d);
    seen_free(&expected);
}

typedef struct hash_place {
    uint64_t hash;
    size_t place;
} hash_place;

/* Correlation between the places of the same n hashes in two orders: 1 for the same order, about 0 for unrelated ones. */
static double order_correlation(const uint64_t *a, const uint64_t *b, size_t n) {
    hash_place *x = NEW(hash_place, 2 * n), *y = x + n;
    const double mean = ((double)n - 1) / 2, variance = ((double)n * (double)n - 1) / 12;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        x[i].hash = a[i];
        y[i].hash = b[i];
        x[i].place = y[i].place = i;
    }
    qsort(x, n, sizeof *x, compare_u64);
    qsort(y, n, sizeof *y, compare_u64);
    for (size_t i = 0; i < n; i++) sum += ((double)x[i].place - mean) * ((double)y[i].place - mean);
    free(x);
    return sum / (double)n / variance;
}

static void test_epoch_order(void) {
    if (!TEST("data: epochs have the same chunks in unrelated orders")) return;
    enum { T = 128, EPOCHS = 3 };
    uint64_t rng = 53;
    tokens t = ZERO;
    for (int i = 0; i < 20000; i++) add_document(&t, 5 + rng_below(&rng, 60), 502, &rng);
    slam_data *d = open_data(T, 502, write_tokens("epochs.bin", &t, 502));
    slam_loader *l = slam_loader_new(d, 3, 1);
    seen epoch[EPOCHS + 1];
    for (int e = 0; e < EPOCHS; e++) epoch[e] = see_epoch(l);
    epoch[EPOCHS] = see_data(d, 0, 0); // the order of the file
    for (int a = 0; a <= EPOCHS; a++)
        for (int b = 0; b < a; b++) {
            if (!CHECK(same_chunks(&epoch[a], &epoch[b]), "epochs %d and %d: other chunks", b, a)) continue;
            size_t shared = 0;
            for (size_t i = 0; i < epoch[a].rows; i += 10)
                for (size_t k = 0; k < epoch[b].rows; k++) shared += epoch[a].row[i] == epoch[b].row[k];
            CHECK(shared < epoch[a].rows / 100, "epochs %d and %d: %zu of %zu rows are the same", b, a, shared,
                  epoch[a].rows / 10);
            check_near("correlation of the places of chunks",
                       order_correlation(epoch[a].chunk, epoch[b].chunk, epoch[a].chunks), 0, 0.05);
        }
    for (int e = 0; e <= EPOCHS; e++) seen_free(&epoch[e]);
    slam_loader_free(l);
    slam_data_free(d);
}

static int data_opens(const char *pattern, int V) {
    slam_data *d = slam_data_new(64);
    const int ok = slam_data_add(d, pattern, 1) && slam_data_prepare(d, V, 0, 0);
    slam_data_free(d);
    return ok;
}

static void test_long_documents(void) {
    if (!TEST("data: documents of many thousand tokens")) return;
    enum { T = 1024 };
    uint64_t rng = 7;
    tokens t = ZERO;
    for (int i = 0; i < 24; i++) add_document(&t, 100000 + rng_below(&rng, 1000), 502, &rng);
    slam_data *d = open_data(T, 502, write_shard("long.bin", t.at, t.n, 502, 0));
    seen expected = expect_chunks(&t, T), s = see_data(d, 0, 1);
    CHECK(same_chunks(&s, &expected), "%zu chunks, expected %zu", s.chunks, expected.chunks);
    slam_data_free(d);
    t.at[t.n - 5] = 600;
    char wrong[80];
    snprintf(wrong, sizeof wrong, "token %zu (from 0) is 600", t.n - 5);
    check_fails(data_opens(write_shard("long.bin", t.at, t.n, 502, 0), 502), wrong);
    seen_free(&expected), seen_free(&s);
    free(t.at);
}

static double uniform(uint64_t *rng, double from, double to) { return from + (to - from) * rng_uniform(rng); }

/* Seconds of an utterance: LibriSpeech's train parts (mean 12.3 s, most between 14 and 16.5, a tail down to 2), recordings split
   at silences near 52 s (with 19.5 units a second about 1,024 tokens), talks of up to ten minutes. */
static double seconds_of(int kind, uint64_t *rng) {
    if (kind == 0) {
        const double s = rng_uniform(rng) < 0.62 ? 14.8 + 0.9 * rng_normal(rng) : uniform(rng, 2, 14.5);
        return s > 17 ? 17 : s;
    }
    return kind == 1 ? 52 + 6 * rng_normal(rng) : uniform(rng, 1, 600);
}

static void test_fill(void) {
    static const char *const kinds[] = {"LibriSpeech", "segments near 52 s", "talks"};
    static const int contexts[] = {256, 1024, 2048}, documents[] = {20000, 10000, 700};
    for (int kind = 0; kind < 3; kind++) {
        uint64_t rng = 9;
        tokens t = ZERO;
        for (int i = 0; i < documents[kind]; i++)
            add_document(&t, (size_t)(seconds_of(kind, &rng) * (19.5 + 1.2 * rng_normal(&rng))), 502, &rng);
        const size_t mean = t.n / t.documents;
        const char *path = write_tokens("fill.bin", &t, 502);
        for (int c = 0; c < 3; c++) {
            if (!TEST("data: rows are full: lengths of %s (mean %zu tokens), context %d", kinds[kind], mean,
                      contexts[c]))
                continue;
            slam_data *d = open_data(contexts[c], 502, path);
            slam_loader *l = load_epoch(d, 0);
            check_near("empty share", 1 - (double)l->tokens / ((double)l->epoch_rows * l->T), 0,
                       kind == 0 && contexts[c] == 1024 ? 0.003 : 0.02);
            slam_loader_free(l);
            slam_data_free(d);
        }
    }
}

static void test_mixing(void) {
    if (!TEST("data: rows come in no order of length")) return;
    uint64_t rng = 11;
    tokens t = ZERO;
    for (int i = 0; i < 20000; i++) add_document(&t, (size_t)(19.5 * seconds_of(0, &rng)), 502, &rng);
    slam_data *d = open_data(1024, 502, write_tokens("mixing.bin", &t, 502));
    slam_loader *l = slam_loader_new(d, 0, 1);
    const packed_rows *all = &l->packer->epoch;
    double x1 = 0, y1 = 0, x2 = 0, y2 = 0, xy = 0, rows = (double)all->n; // x: the row's place, y: its chunks
    for (size_t i = 0; i < all->n; i++) {
        const double x = (double)i, y = all->at[i].n;
        x1 += x, y1 += y, x2 += x * x, y2 += y * y, xy += x * y;
    }
    const double covariance = xy / rows - x1 / rows * y1 / rows;
    const double deviations = sqrt((x2 / rows - x1 / rows * x1 / rows) * (y2 / rows - y1 / rows * y1 / rows));
    check_near("correlation of a row's place with its number of chunks", covariance / deviations, 0, 0.1);
    slam_loader_free(l);
    slam_data_free(d);
}

/* Packing against first fit decreasing as it is defined. */
static void test_pack(void) {
    if (!TEST("packing: first fit decreasing")) return;
    uint64_t rng = 3;
    for (int trial = 0; trial < 50; trial++) {
        const uint32_t T = 1 + (uint32_t)rng_below(&rng, 200);
        const size_t n = (size_t)rng_below(&rng, 300);
        uint32_t *items = NEW(uint32_t, n), *lengths = NEW(uint32_t, n), *used = NEW(uint32_t, n),
                 *row_of = NEW(uint32_t, n);
        packed_rows rows = ZERO;
        size_t n_rows = 0;
        for (size_t i = 0; i < n; i++) {
            items[i] = (uint32_t)i;
            lengths[i] = 1 + (uint32_t)rng_below(&rng, T);
        }
        for (uint32_t l = T; l > 0; l--) // the longest first, into the first row that has space
            for (size_t i = 0; i < n; i++) {
                size_t r = 0;
                if (lengths[i] != l) continue;
                while (used[r] + l > T) r++;
                used[r] += l;
                row_of[i] = (uint32_t)r;
                if (r + 1 > n_rows) n_rows = r + 1;
            }
        pack(&rows, items, lengths, n, T);
        CHECK(rows.n == n_rows && rows.n_items == n, "%zu rows of %zu items, expected %zu of %zu", rows.n, rows.n_items,
              n_rows, n);
        for (size_t r = 0; r < rows.n; r++) {
            CHECK(rows.at[r].length == used[r], "row %zu: length %u, expected %u", r, rows.at[r].length, used[r]);
            for (uint32_t k = 0; k < rows.at[r].n; k++)
                CHECK(row_of[rows.items[rows.at[r].first + k]] == r, "trial %d: an item of another row", trial);
        }
        packed_rows_free(&rows);
        free(items), free(lengths), free(used), free(row_of);
    }
}

/* ---- positions, ranks ---- */

static void test_seek(void) {
    if (!TEST("data: seeking equals reading on")) return;
    enum { EPOCHS = 3, T = 128 };
    uint64_t rng = 13;
    tokens t = ZERO;
    for (int i = 0; i < 20000; i++) add_document(&t, 1 + rng_below(&rng, 60), 502, &rng);
    slam_data *d = slam_data_new(T);
    CHECK(slam_data_add(d, write_tokens("seek.bin", &t, 502), 1.3) && slam_data_prepare(d, 502, 0, 0), "%s",
          slam_error());
    slam_loader *l = slam_loader_new(d, 7, 1);
    seen all[EPOCHS];
    CHECK(l->epoch == 0 && l->row == 0, "epoch %zu, row %zu", (size_t)l->epoch, (size_t)l->row);
    for (int e = 0; e < EPOCHS; e++) {
        all[e] = see_epoch(l);
        CHECK(l->epoch == (uint64_t)e && l->row == all[e].rows, "epoch %zu, row %zu", (size_t)l->epoch, (size_t)l->row);
    }
    for (int i = 0; i < 60; i++) {
        const uint64_t epoch = rng_below(&rng, EPOCHS), row = rng_below(&rng, all[epoch].rows + 1);
        const int over = row == all[epoch].rows; // then the next one is row 0 of the next epoch
        slam_loader *other = i % 2 ? slam_loader_new(d, 7, 1) : l;
        seen s = ZERO;
        CHECK(slam_loader_seek(other, epoch, row), "%s", slam_error());
        CHECK(other->epoch == epoch && other->row == row, "epoch %zu, row %zu", (size_t)other->epoch,
              (size_t)other->row);
        see_batch(other, 1, 1, NULL, &s);
        CHECK(other->epoch == epoch + (uint64_t)over && other->row == (over ? 1 : row + 1), "after row %zu",
              (size_t)row);
        if (epoch + 1 < EPOCHS || !over)
            CHECK(s.row[0] == all[over ? epoch + 1 : epoch].row[over ? 0 : row], "row %zu of epoch %zu", (size_t)row,
                  (size_t)epoch);
        if (other != l) slam_loader_free(other);
        seen_free(&s);
    }
    check_fails(slam_loader_seek(l, 1, all[1].rows + 1), "this is other data");
    for (int e = 0; e < EPOCHS; e++) seen_free(&all[e]);
    slam_loader_free(l);
    slam_data_free(d);
}

/* Global batches are the same whatever ranks and micro-batches there are, and ranks have consecutive shares of them. */
static void test_ranks(void) {
    if (!TEST("data: rows do not depend on ranks and micro-batches")) return;
    enum { T = 64, BATCH = 13, BATCHES = 9 };
    uint64_t rng = 61;
    tokens t = ZERO;
    for (int i = 0; i < 150; i++) add_document(&t, 1 + rng_below(&rng, 70), 502, &rng);
    slam_data *d = open_data(T, 502, write_tokens("ranks.bin", &t, 502));
    uint64_t all_tokens = 0;
    for (size_t i = 0; i < d->n_chunks; i++) all_tokens += d->chunks[i].n;
    for (int shuffle = 0; shuffle < 2; shuffle++)
        for (int size = 1; size < 15; size += 4) {
            slam_loader *alone = slam_loader_new(d, 5, shuffle), *rank[15];
            for (int r = 0; r < size; r++) rank[r] = slam_loader_new(d, 5, shuffle);
            uint64_t total = 0;
            for (int k = 0, rows = 1; k < BATCHES && rows > 0; k++) {
                seen one = ZERO, all = ZERO;
                rows = see_batch(alone, BATCH, 1, NULL, &one);
                CHECK(rows == (int)one.rows && (rows == BATCH || !shuffle), "%d rows", rows);
                CHECK(alone->tokens == one.tokens && alone->targets == one.targets, "%zu tokens",
                      (size_t)alone->tokens);
                for (int r = 0; r < size; r++) {
                    slam_comm comm = ZERO;
                    comm.rank = r;
                    comm.size = size;
                    CHECK(see_batch(rank[r], BATCH, 1 + k % 4, &comm, &all) == rows && rank[r]->tokens == one.tokens &&
                              rank[r]->targets == one.targets && rank[r]->epoch == alone->epoch &&
                              rank[r]->row == alone->row,
                          "rank %d has another global batch", r);
                }
                CHECK(same_rows(&one, &all), "batch %d: the shares of %d ranks are not the batch", k, size);
                total += one.tokens;
                seen_free(&one), seen_free(&all);
            }
            if (shuffle) CHECK(alone->epoch > 0, "no batch over the end of an epoch");
            else CHECK(total == all_tokens && slam_loader_begin(alone, 3, NULL) == 0, "to the end");
            slam_loader_free(alone);
            for (int r = 0; r < size; r++) slam_loader_free(rank[r]);
        }
    slam_data_free(d);
}

/* ---- weights ---- */

static void test_small_weight(void) {
    if (!TEST("data: a source of less than a draw an epoch comes round")) return;
    enum { T = 64, EPOCHS = 20 };
    uint64_t rng = 18;
    slam_data *d = slam_data_new(T);
    tokens many = ZERO, one = ZERO;
    for (int i = 0; i < 30; i++) add_document(&many, 20, 502, &rng);
    add_document(&one, 30, 502, &rng);
    CHECK(slam_data_add(d, write_tokens("many.bin", &many, 502), 1), "%s", slam_error());
    CHECK(slam_data_add(d, write_tokens("one.bin", &one, 502), 0.3), "%s", slam_error());
    CHECK(slam_data_prepare(d, 502, 0, 0), "%s", slam_error());
    slam_loader *l = slam_loader_new(d, 1, 1), *again = slam_loader_new(d, 1, 1);
    size_t came = 0;
    for (uint64_t e = 0; e < EPOCHS; e++) {
        CHECK(slam_loader_seek(again, e, 0), "%s", slam_error());
        seen s = see_epoch(l), t = see_epoch(again);
        CHECK(s.chunks == 30 || s.chunks == 31, "%zu draws", s.chunks);
        CHECK(t.chunks == s.chunks, "after a seek %zu draws, expected %zu", t.chunks, s.chunks);
        came += s.chunks - 30;
        seen_free(&s), seen_free(&t);
    }
    CHECK(came == 6, "came %zu times in 20 epochs, expected 6", came);
    slam_loader_free(l), slam_loader_free(again);
    slam_data_free(d);
}

static void test_weights(void) {
    static const int documents[] = {101, 40, 60, 60};
    static const double weights[] = {1, 2.5, 0.5, 1.0 / 3};
    static const char *const names[] = {"one.bin", "two_and_a_half.bin", "half.bin", "third.bin"};
    if (!TEST("data: weights")) return;
    enum { T = 256, EPOCHS = 6 };
    uint64_t rng = 17;
    slam_data *d = slam_data_new(T);
    seen chunks[4], epochs[EPOCHS];
    for (int s = 0; s < 4; s++) {
        tokens t = ZERO;
        for (int i = 0; i < documents[s]; i++) add_document(&t, 20 + rng_below(&rng, 60), 502, &rng);
        chunks[s] = expect_chunks(&t, T);
        CHECK(slam_data_add(d, write_tokens(names[s], &t, 502), weights[s]), "%s", slam_error());
    }
    CHECK(slam_data_prepare(d, 502, 0, 0), "%s", slam_error());
    slam_loader *l = slam_loader_new(d, 1, 1);
    for (int e = 0; e < EPOCHS; e++) {
        epochs[e] = see_epoch(l);
        CHECK(epochs[e].chunks == 101 + 100 + 30 + 20, "an epoch of %zu draws", epochs[e].chunks);
        for (size_t i = 0; i < chunks[0].chunks; i++)
            CHECK(times_seen(&epochs[e], chunks[0].chunk[i]) == 1, "chunk %zu", i);
        size_t three = 0;
        for (size_t i = 0; i < chunks[1].chunks; i++) {
            const size_t n = times_seen(&epochs[e], chunks[1].chunk[i]);
            CHECK(n == 2 || n == 3, "a chunk with weight 2.5 came %zu times", n);
            three += n == 3;
        }
        CHECK(three == 20, "%zu of 40 chunks came a third time", three);
    }
    for (int s = 2; s < 4; s++) // weights 1/2 and 1/3: once in 2, in 3 epochs
        for (size_t i = 0; i < chunks[s].chunks; i++)
            for (int e = 0; e < EPOCHS; e += s) {
                size_t n = 0;
                for (int k = 0; k < s; k++) n += times_seen(&epochs[e + k], chunks[s].chunk[i]);
                CHECK(n == 1, "a chunk with weight 1/%d came %zu times in epochs %d to %d", s, n, e, e + s - 1);
            }
    seen once = see_data(d, 0, 0), all = ZERO; // evaluation ignores weights
    for (int s = 0; s < 4; s++) see_all(&all, &chunks[s]);
    CHECK(same_chunks(&once, &all), "each chunk once");
    for (int s = 0; s < 4; s++) seen_free(&chunks[s]);
    seen_free(&once), seen_free(&all);
    for (int e = 0; e < EPOCHS; e++) seen_free(&epochs[e]);
    slam_loader_free(l);
    slam_data_free(d);
}

/* ---- held-out documents ---- */

static void test_held_out(void) {
    enum { T = 32 };
    if (!TEST("data: held-out documents")) return;
    uint64_t rng = 19;
    tokens t[2] = ZERO;
    for (int i = 0; i < 210; i++) add_document(&t[0], 1 + rng_below(&rng, 150), 502, &rng);
    for (int i = 0; i < 33; i++) add_document(&t[1], 1 + rng_below(&rng, 150), 502, &rng);
    char *paths[2] = {string_copy(write_shard("held_a.bin", t[0].at, t[0].n, 502, 0)),
                      string_copy(write_lines("held_b.jsonl", &t[1]))};
    seen chosen[2];
    for (uint64_t seed = 0; seed < 3; seed++) {
        slam_data *d = slam_data_new(T);
        CHECK(slam_data_add(d, paths[0], 2) && slam_data_add(d, paths[1], 1), "%s", slam_error());
        CHECK(slam_data_prepare(d, 502, 0.1, seed), "%s", slam_error());
        const slam_data *held = d->held_out;
        CHECK(held->n_sources == 2 && !strcmp(held->sources[1].name, paths[1]) && held->sources[0].weight == 1 &&
                  held->V == 502 && held->hash == d->hash,
              "the sources of the held-out data");
        CHECK(held->sources[0].documents == 21 && d->sources[0].documents == 189, "%zu of 210",
              held->sources[0].documents);
        CHECK(held->sources[1].documents == 3 && d->sources[1].documents == 30, "%zu of 33",
              held->sources[1].documents);
        for (int s = 0; s < 2; s++) {
            seen whole = expect_chunks(&t[s], T), kept = see_source(d, s), out = see_source(held, s), both = ZERO;
            see_all(&both, &kept), see_all(&both, &out);
            CHECK(same_chunks(&both, &whole), "the two parts of source %d are not the whole", s);
            seen_free(&whole), seen_free(&kept), seen_free(&out), seen_free(&both);
        }
        // a document is on one side with all of its chunks: each side's documents open and close
        size_t opened = 0;
        for (size_t i = 0, open = 0; i < held->n_chunks; i++) {
            const slam_chunk *c = &held->chunks[i];
            const uint16_t *at = held->files[c->file].tokens + c->first;
            CHECK(open || at[0] == 1, "a held-out chunk whose document begins elsewhere");
            opened += at[0] == 1;
            open = c->n == T && at[c->n - 1] != 1;
        }
        CHECK(opened == 24, "%zu documents are held out", opened);
        if (seed < 2) chosen[seed] = see_data(held, 0, 0);
        slam_data_free(d);
    }
    CHECK(!same_chunks(&chosen[0], &chosen[1]), "two seeds hold out the same documents");
    for (int s = 0; s < 2; s++) {
        seen_free(&chosen[s]);
        free(paths[s]);
        free(t[s].at);
    }
}

static void test_few_held_out(void) {
    static const struct {
        int documents;
        double fraction;
        size_t held;
    } few[] = {{2, 0.01, 1}, {10, 0.99, 9}, {10, 0.25, 3}, {3, 0.5, 2}, {1, 0.5, 0}};
    uint64_t rng = 23;
    if (!TEST("data: held-out documents where there are few")) return;
    for (int i = 0; i < 5; i++) {
        tokens t = ZERO;
        for (int k = 0; k < few[i].documents; k++) add_document(&t, 5, 502, &rng);
        slam_data *d = slam_data_new(32);
        CHECK(slam_data_add(d, write_tokens("few.bin", &t, 502), 1), "%s", slam_error());
        if (few[i].held) {
            CHECK(slam_data_prepare(d, 502, few[i].fraction, 0), "%s", slam_error());
            CHECK(d->held_out && d->held_out->sources[0].documents == few[i].held, "%zu of %d",
                  d->held_out->sources[0].documents, few[i].documents);
        } else check_fails(slam_data_prepare(d, 502, few[i].fraction, 0), "one document, which cannot be held out");
        slam_data_free(d);
    }
}

/* ---- errors ---- */

static void test_shard_errors(void) {
    enum { MOST = 9 };
    static const struct {
        uint16_t tokens[MOST];
        int n;
        const char *error;
    } bad[] = {
        {{5, 6, 1}, 3, "bad.bin: token 0 (from 0) is 5, expected 1: no document is open"},
        {{1, 5, 1, 1, 6}, 5, "bad.bin: the document at token 3 (from 0)"},
        {{1, 5, 6, 1, 7, 1, 1, 8, 1}, 9, "bad.bin: token 4 (from 0) is 7, expected 1: no document is open"},
        {{1, 5, 1, 9, 1, 6, 1}, 7, "bad.bin: token 3 (from 0) is 9, expected 1: no document is open"},
        {{1, 1, 5, 1}, 4, "bad.bin: token 2 (from 0) is 5, expected 1: no document is open"},
        {{1, 5, 1, 9}, 4, "bad.bin: token 3 (from 0) is 9, expected 1: no document is open"},
        {{1, 5, 0, 1}, 4, "bad.bin: token 2 (from 0) is 0, expected 1 to 76"},
        {{1, 5, 77, 1}, 4, "bad.bin: token 2 (from 0) is 77, expected 1 to 76"},
        {{1, 1, 1, 1}, 4, "bad.bin: contains no documents"},
        {{0}, 0, "bad.bin: contains no documents"},
    };
    static const uint16_t large[] = {1, 5, 77, 1}, fine[] = {1, 1, 1, 5, 1, 1, 76, 1};
    if (TEST("data: errors of malformed shards")) {
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
            check_fails(data_opens(write_shard("bad.bin", bad[i].tokens, (size_t)bad[i].n, 0, 0), 77), bad[i].error);
        CHECK(data_opens(write_shard("good.bin", fine, 8, 0, 0), 77), "%s", slam_error());
        CHECK(data_opens(write_shard("good.bin", large, 4, 0, 0), 65536), "%s", slam_error());
        CHECK(data_opens(write_shard("good.bin", large, 4, 0, 0), 1000000), "%s", slam_error());
    }
    if (TEST("data: a wrong token is found wherever it is")) {
        uint64_t rng = 29;
        tokens t = ZERO;
        for (int i = 0; i < 5; i++) add_document(&t, 97, 502, &rng);
        for (size_t i = 0; i < t.n; i++) {
            const uint16_t kept = t.at[i];
            char expected[80];
            t.at[i] = 502;
            snprintf(expected, sizeof expected, "token %zu (from 0) is 502", i);
            check_fails(data_opens(write_shard("wrong.bin", t.at, t.n, 0, 0), 502), expected);
            t.at[i] = kept == 1 ? 2 : 1; // a 1 is missing, or one too many
            check_fails(data_opens(write_shard("wrong.bin", t.at, t.n, 0, 0), 502), "wrong.bin: ");
            t.at[i] = kept;
        }
        free(t.at);
    }
}

static void test_errors(void) {
    if (TEST("data: errors of malformed unit files")) {
        static const char *const bad[][2] = {
            {"{\"units\": [1, 2]}\n\n{\"units\": [3, 100, 7]}\n", "units.jsonl:3: unit 100, expected below 100"},
            {"{\"units\": [1, 2]}\n{\"units\": [3, 65534]}\n", "units.jsonl:2: unit 65534"},
            {"{\"units\": [1, 2]}\n{\"units\": [3, 65537]}\n", "units.jsonl:2: unit 65537"},
            {"{\"units\": [1, -2]}\n", "units.jsonl:1"},
            {"{\"units\": [1, 2]}\n{\"units\": [3, 4}\n", "units.jsonl:2"},
            {"{\"units\": []}\n", "units.jsonl: contains no documents"},
            {"", "units.jsonl"},
        };
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
            check_fails(data_opens(check_file("units.jsonl", bad[i][0], strlen(bad[i][0])), 102), bad[i][1]);
        check_fails(data_opens(check_file("units.jsonl", bad[2][0], strlen(bad[2][0])), 100000), bad[2][1]);
        const char *good = "{\"units\": [1, 2]}\r\n{\"units\": []}\n{\"units\": [3, 99]}";
        CHECK(data_opens(check_file("units.jsonl", good, strlen(good)), 102), "%s", slam_error());
    }
    if (TEST("data: errors of sources")) {
        static const uint16_t one[] = {1, 5, 1};
        const char *a = write_shard("a.bin", one, 3, 102, 7), *b = write_shard("b.bin", one, 3, 502, 7);
        const char *c = write_shard("c.bin", one, 3, 102, 8), *unknown = write_shard("d.bin", one, 3, 0, 0);
        const char *other = check_file("e.txt", "x", 1);
        slam_data *d = slam_data_new(64);
        CHECK(d->V == 0 && d->fingerprint == 0, "before anything was added");
        check_fails(slam_data_prepare(d, 102, 0, 0), "no data");
        check_fails(slam_data_add(d, check_path("none*.bin"), 1), "no such file");
        check_fails(slam_data_add(d, check_path("none.bin"), 1), "no such file");
        check_fails(slam_data_add(d, check_path(""), 1), "expected token shards");
        check_fails(slam_data_add(d, other, 1), "expected token shards (.bin) or unit lines (.jsonl)");
        check_fails(slam_data_add(d, a, 0), "weight 0");
        check_fails(slam_data_add(d, a, -1), "weight -1");
        check_fails(slam_data_add(d, a, NAN), "weight");
        check_fails(slam_data_add(d, a, 1e9), "weight");
        slam_data_free(d);
        d = slam_data_new(64);
        CHECK(slam_data_add(d, unknown, 1) && slam_data_add(d, a, 1) && d->V == 102, "a vocabulary of %d", d->V);
        CHECK(d->fingerprint == 7, "fingerprint %u", (unsigned)d->fingerprint);
        check_fails(slam_data_add(d, b, 1), "the vocabulary is 502, expected 102");
        check_fails(slam_data_add(d, c, 1), "unit tokenizer 00000008, expected 00000007");
        check_fails(slam_data_prepare(d, 2, 0, 0), "a vocabulary of 2");
        check_fails(slam_data_prepare(d, 102, 1, 0), "fraction 1");
        check_fails(slam_data_prepare(d, 102, NAN, 0), "fraction");
        slam_data_free(d);
        d = slam_data_new(64);
        check_fails(slam_loader_new(d, 0, 1), "not prepared");
        CHECK(slam_data_add(d, a, 1e-3) && slam_data_prepare(d, 102, 0, 0), "%s", slam_error());
        check_fails(slam_data_prepare(d, 102, 0, 0), "once");
        check_fails(slam_data_add(d, a, 1), "cannot be added");
        check_fails(slam_loader_new(d, 0, 1), "gives no chunk");
        slam_data_free(d);
        check_fails(slam_data_new(1), "context 1");
        check_fails(slam_data_new(INT_MAX), "2 to 16777216");
    }
}

/* ---- order and hash ---- */

static uint64_t hash_of(const char *pattern, double weight, double fraction, uint64_t seed, int context) {
    slam_data *d = slam_data_new(context);
    CHECK(slam_data_add(d, pattern, weight) && slam_data_prepare(d, 502, fraction, seed), "%s", slam_error());
    const uint64_t hash = d->hash;
    slam_data_free(d);
    return hash;
}

static void test_order(void) {
    enum { T = 100 };
    uint64_t rng = 31;
    tokens t = ZERO;
    for (int i = 0; i < 2000; i++) add_document(&t, 1 + rng_below(&rng, 150), 502, &rng);
    write_shard("order.bin", t.at, t.n, 502, 0);
    write_lines("order.jsonl", &t);
    size_t end[5] = {0};
    for (size_t k = 0, mark = 0, n = 0; k < t.n; k++)
        if (t.at[k] == 1 && ++mark % 2 == 0 && ++n % 500 == 0) end[n / 500] = k + 1;
    for (int i = 3; i >= 0; i--) { // the same documents in four shards of one pattern, the last one written first
        char name[40];
        snprintf(name, sizeof name, "order_part_%d.bin", i);
        write_shard(name, t.at + end[i], end[i + 1] - end[i], 502, 0);
    }
    if (TEST("data: the order depends on the seed and the documents alone")) {
        slam_data *whole = open_data(T, 502, check_path("order.bin")),
                  *lines = open_data(T, 502, check_path("order.jsonl"));
        slam_data *parts = open_data(T, 502, check_path("order_part_?.bin"));
        const int threads = omp_get_max_threads();
        omp_set_num_threads(1);
        slam_data *single = open_data(T, 502, check_path("order.bin"));
        omp_set_num_threads(threads);
        seen a = see_data(whole, 1, 1), b = see_data(lines, 1, 1), c = see_data(parts, 1, 1);
        seen d = see_data(whole, 2, 1), e = see_data(single, 1, 1);
        CHECK(same_rows(&a, &b), "a unit file with the documents of a shard");
        CHECK(same_rows(&a, &c), "shards with the documents of one");
        CHECK(!same_rows(&a, &d) && same_chunks(&a, &d), "two seeds");
        CHECK(same_rows(&a, &e), "one thread");
        CHECK(whole->hash == lines->hash && whole->hash == parts->hash && whole->hash == single->hash, "hashes");
        slam_data_free(whole), slam_data_free(lines), slam_data_free(parts), slam_data_free(single);
        seen_free(&a), seen_free(&b), seen_free(&c), seen_free(&d), seen_free(&e);
    }
    if (TEST("data: the hash tells any other token, split and weight")) {
        char *path = string_copy(check_path("order.bin"));
        const uint64_t hash = hash_of(path, 1, 0, 0, T), held = hash_of(path, 1, 0.1, 1, T);
        for (int i = 0; i < 200; i++) {
            const size_t at =
                i < 2 ? 1 + (t.n - 3) * (size_t)i : (size_t)rng_below(&rng, t.n); // the first and last unit too
            const uint16_t kept = t.at[at];
            if (kept == 1) continue;
            t.at[at] = (uint16_t)(kept ^ 2 ? kept ^ 2 : 4);
            if (t.at[at] < 2 || t.at[at] > 501) t.at[at] = kept == 3 ? 4 : 3;
            CHECK(hash_of(write_shard("changed.bin", t.at, t.n, 502, 0), 1, 0, 0, T) != hash, "token %zu", at);
            t.at[at] = kept;
        }
        CHECK(hash_of(path, 1, 0, 0, T) == hash && hash_of(path, 1, 0, 5, T) == hash, "the same data");
        CHECK(hash_of(path, 1.5, 0, 0, T) != hash, "another weight");
        CHECK(hash_of(path, 1, 0, 0, T + 1) != hash, "another context");
        CHECK(held != hash && hash_of(path, 1, 0.1, 2, T) != held && hash_of(path, 1, 0.1, 1, T) == held, "held out");
        CHECK(hash_of(check_path("order_part_[012].bin"), 1, 0, 0, T) != hash, "fewer documents");
        free(path);
    }
    free(t.at);
}

static void test_auto_bleu(void) {
    if (!TEST("auto-BLEU: the share of n-grams that occur more than once")) return;
    check_near("none", slam_auto_bleu("", 2), 0, 0);
    check_near("one word", slam_auto_bleu("a", 2), 0, 0);
    check_near("no repeat", slam_auto_bleu("a b c d", 2), 0, 0);
    check_near("a b, b a, a b", slam_auto_bleu("a b a b", 2), 2.0 / 3, 1e-15);
    check_near("spaces", slam_auto_bleu("  a\tb \n a b ", 2), 2.0 / 3, 1e-15);
    check_near("a punctuation mark is a word", slam_auto_bleu("go, go, x", 2), 0.5, 1e-15);
    check_near("words", slam_auto_bleu("a b a", 1), 2.0 / 3, 1e-15);
    CHECK(pair_repeats("a b", "a b", 2.0 / 3) && !pair_repeats("a b", "a b", 0.7) && !pair_repeats("a b", "a b", 0),
          "of a pair");
}

int main(void) {
    test_chunks();
    test_pack();
    test_poor_rows();
    test_epoch_order();
    test_long_documents();
    test_fill();
    test_mixing();
    test_seek();
    test_ranks();
    test_weights();
    test_small_weight();
    test_held_out();
    test_few_held_out();
    test_shard_errors();
    test_errors();
    test_order();
    test_auto_bleu();
    return check_end();
}
