/* Documents, pieces, packing, mixing, seeking; n-grams; a model's loss on data. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

/* ---- data to test with ---- */

typedef struct tokens {
    uint16_t *at;
    size_t n, capacity, documents;
} tokens;

/* A document of n random units below V - 2. */
static void add_document(tokens *t, size_t n, int V, uint64_t *random) {
    if (!mem_grow((void **)&t->at, &t->capacity, t->n + n + 2, sizeof *t->at)) abort();
    t->at[t->n++] = 1;
    for (size_t i = 0; i < n; i++) t->at[t->n++] = (uint16_t)(2 + rng_below(random, (uint64_t)V - 2));
    t->at[t->n++] = 1;
    t->documents++;
}

static const char *write_shard(const char *name, const uint16_t *at, size_t n, int V, int fingerprint) {
    int32_t header[256] = {20240520, 1, (int32_t)n, V, fingerprint};
    text t = SLAM_ZERO;
    text_add_bytes(&t, (const char *)header, sizeof header);
    if (n) text_add_bytes(&t, (const char *)at, 2 * n);
    const char *path = check_file(name, t.at, t.n);
    text_free(&t);
    return path;
}

static const char *write_lines(const char *name, const tokens *t) {
    text lines = SLAM_ZERO;
    for (size_t i = 0; i < t->n; i++) {
        text_add(&lines, "{\"units\": [");
        for (i++; t->at[i] != 1; i++) text_add(&lines, "%s%d", t->at[i - 1] == 1 ? "" : ", ", t->at[i] - 2);
        text_add(&lines, "], \"file_name\": \"a\"}\n");
    }
    const char *path = check_file(name, lines.at, lines.n);
    text_free(&lines);
    return path;
}

static const char *write_tokens(const char *name, tokens *t, int V) {
    const char *path = write_shard(name, t->at, t->n, V, 0);
    free(t->at);
    memset(t, 0, sizeof *t);
    return path;
}

static slam_data *open_data(int context, int V, const char *path) {
    slam_data *d = slam_data_new(context);
    if (!CHECK(d && slam_data_add(d, path, 1) && slam_data_prepare(d, V, 0, 0, NULL), "%s", slam_error())) exit(1);
    return d;
}

/* ---- what a stream of rows gave ---- */

/* A hash for each piece, in the order in which they came, and one for each row. */
typedef struct seen {
    uint64_t *piece, *row;
    size_t pieces, piece_capacity, rows, row_capacity, tokens, targets;
} seen;

static void see(uint64_t **list, size_t *n, size_t *capacity, uint64_t hash) {
    if (!mem_grow((void **)list, capacity, *n + 1, sizeof **list)) abort();
    (*list)[(*n)++] = hash;
}

static void seen_free(seen *s) {
    free(s->piece);
    free(s->row);
    memset(s, 0, sizeof *s);
}

static int order_hashes(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static uint64_t hash_piece(const int *token, int n) { return hash_bytes(HASH_START, token, (size_t)n * sizeof *token); }

/* Reads one row, checks all that must hold for it, notes its pieces. Returns 0 at the end of the epoch. */
static int see_row(slam_rows *r, int T, seen *s) {
    int *token = (int *)mem_new((size_t)T, 3 * sizeof *token), *target = token + T, *start = token + 2 * T;
    int n_targets, n = slam_rows_next(r, token, target, start, &n_targets), end, pieces = 0;
    CHECK(n >= 0 && n <= T, "%d tokens", n);
    for (int t = 0; t < n; t = end, pieces++) {
        for (end = t; end < n && start[end] == t; end++) {
            int wanted = end + 1 < n && start[end + 1] == t ? token[end + 1] : -1;
            CHECK(token[end] > 0, "padding inside of a row, at %d", end);
            CHECK(target[end] == wanted, "target %d at %d, expected %d", target[end], end, wanted);
        }
        if (!CHECK(end - t >= 2, "a piece of %d tokens, doc_start[%d] = %d", end - t, t, start[t])) break;
        see(&s->piece, &s->pieces, &s->piece_capacity, hash_piece(token + t, end - t));
    }
    for (int t = n; n && t < T; t++) CHECK(token[t] == 0 && target[t] == -1 && start[t] == t, "padding at %d", t);
    CHECK(n_targets == n - pieces, "%d targets, but %d tokens in %d pieces", n_targets, n, pieces);
    if (n) {
        see(&s->row, &s->rows, &s->row_capacity, hash_bytes(HASH_START, token, 3 * (size_t)T * sizeof *token));
        s->tokens += (size_t)n;
        s->targets += (size_t)n_targets;
    }
    free(token);
    return n;
}

static seen see_epoch(slam_rows *r, int T) {
    seen s = SLAM_ZERO;
    while (see_row(r, T, &s)) continue;
    return s;
}

static seen see_data(const slam_data *d, int source, uint64_t seed, int shuffle) {
    slam_rows *r = slam_rows_new(d, source, seed, shuffle);
    seen s = SLAM_ZERO;
    if (CHECK(r != NULL, "%s", slam_error())) s = see_epoch(r, d->context);
    slam_rows_free(r);
    return s;
}

/* The pieces that the documents must have become, told from the tokens alone. */
static seen expect_pieces(const tokens *t, int T) {
    seen s = SLAM_ZERO;
    int *token = (int *)mem_new((size_t)T, sizeof *token);
    for (size_t i = 0; i < t->n;) {
        size_t end = i + 1;
        while (t->at[end] != 1) end++;
        for (end++; i < end;) {
            int n = 0;
            while (n < T && i < end) token[n++] = t->at[i++];
            if (n < 2) continue;
            see(&s.piece, &s.pieces, &s.piece_capacity, hash_piece(token, n));
            s.tokens += (size_t)n;
            s.targets += (size_t)n - 1;
        }
    }
    free(token);
    return s;
}

/* The same pieces the same number of times, in whatever order. */
static int same_pieces(const seen *a, const seen *b) {
    if (a->pieces != b->pieces || a->pieces == 0) return a->pieces == b->pieces;
    size_t bytes = a->pieces * sizeof(uint64_t);
    uint64_t *x = (uint64_t *)mem_new(2, bytes), *y = x + a->pieces;
    memcpy(x, a->piece, bytes);
    memcpy(y, b->piece, bytes);
    qsort(x, a->pieces, sizeof *x, order_hashes);
    qsort(y, b->pieces, sizeof *y, order_hashes);
    int same = memcmp(x, y, bytes) == 0;
    free(x);
    return same;
}

static int same_rows(const seen *a, const seen *b) {
    return a->rows == b->rows && (a->rows == 0 || memcmp(a->row, b->row, a->rows * sizeof *a->row) == 0);
}

static size_t times_seen(const seen *s, uint64_t piece) {
    size_t n = 0;
    for (size_t i = 0; i < s->pieces; i++) n += s->piece[i] == piece;
    return n;
}

/* ---- tests ---- */

static void test_pieces(void) {
    static const int contexts[] = {2, 3, 7, 64, 100, 1024};
    for (int c = 0; c < 6; c++) {
        int T = contexts[c];
        if (!TEST("data: every piece once, context %d", T)) continue;
        uint64_t random = 5;
        tokens t = SLAM_ZERO;
        for (int i = 0; i < 300; i++) add_document(&t, 1 + rng_below(&random, i % 10 ? 60 : 3000), 502, &random);
        slam_data *d = open_data(T, 502, write_shard("pieces.bin", t.at, t.n, 502, 0));
        seen expected = expect_pieces(&t, T), in_order = see_data(d, -1, 0, 0);
        CHECK(same_pieces(&in_order, &expected), "in file order");
        slam_rows *r = slam_rows_new(d, -1, 3, 1);
        seen first = see_epoch(r, T), second = see_epoch(r, T);
        CHECK(same_pieces(&first, &expected) && same_pieces(&second, &expected), "shuffled");
        CHECK(!same_rows(&first, &second), "two epochs in the same order");
        CHECK(first.tokens == expected.tokens && first.targets == expected.targets, "%zu tokens, %zu targets", first.tokens,
              first.targets);
        slam_data_size size;
        CHECK(slam_data_measure(d, 0, 3, &size), "%s", slam_error());
        CHECK(size.documents == 300 && size.pieces == expected.pieces && size.tokens == first.tokens &&
                  size.targets == first.targets && size.rows == first.rows,
              "%zu documents, %zu pieces, %zu tokens, %zu targets, %zu rows are measured", (size_t)size.documents,
              (size_t)size.pieces, (size_t)size.tokens, (size_t)size.targets, (size_t)size.rows);
        check_near("fill", size.fill, (double)first.tokens / ((double)first.rows * T), 1e-12);
        slam_rows_free(r);
        slam_data_free(d);
        seen_free(&expected), seen_free(&in_order), seen_free(&first), seen_free(&second);
        free(t.at);
    }
    if (TEST("data: a document that leaves a last piece of one token")) {
        uint64_t random = 5;
        tokens t = SLAM_ZERO;
        add_document(&t, 15, 502, &random); // 17 tokens: 8, 8 and a lone 1
        slam_data *d = open_data(8, 502, write_tokens("lone.bin", &t, 502));
        seen s = see_data(d, -1, 0, 1);
        CHECK(s.pieces == 2 && s.tokens == 16 && s.targets == 14, "%zu pieces, %zu tokens, %zu targets", s.pieces, s.tokens,
              s.targets);
        seen_free(&s);
        slam_data_free(d);
    }
}

/* The tokens are looked at block by block; documents know nothing of that. */
static void test_blocks(void) {
    if (!TEST("data: documents that cross the blocks of the scan")) return;
    enum { T = 1024 };
    uint64_t random = 7;
    tokens t = SLAM_ZERO;
    for (int i = 0; i < 24; i++) add_document(&t, 3 * SCAN_BLOCK / 24 + rng_below(&random, 1000), 502, &random);
    slam_data *d = open_data(T, 502, write_shard("blocks.bin", t.at, t.n, 502, 0));
    seen expected = expect_pieces(&t, T), s = see_data(d, -1, 0, 1);
    CHECK(same_pieces(&s, &expected), "%zu pieces, expected %zu", s.pieces, expected.pieces);
    slam_data_free(d);
    t.at[t.n - 5] = 600;
    d = slam_data_new(T);
    CHECK(slam_data_add(d, write_shard("blocks.bin", t.at, t.n, 502, 0), 1), "%s", slam_error());
    char wrong[80];
    snprintf(wrong, sizeof wrong, "token %zu (from 0) is 600", t.n - 5);
    check_fails(slam_data_prepare(d, 502, 0, 0, NULL), wrong);
    slam_data_free(d);
    seen_free(&expected), seen_free(&s);
    free(t.at);
}

static double uniform(uint64_t *random, double from, double to) { return from + (to - from) * rng_uniform(random); }

/* Seconds of an utterance: LibriSpeech's train parts (mean 12.3 s, most between 14 and 16.5, a tail down to 2), recordings cut
   at silences near 52 s (with 19.5 units a second about 1,024 tokens), talks of up to ten minutes. */
static double seconds_of(int kind, uint64_t *random) {
    if (kind == 0) {
        double s = rng_uniform(random) < 0.62 ? 14.8 + 0.9 * rng_normal(random) : uniform(random, 2, 14.5);
        return s > 17 ? 17 : s;
    }
    if (kind == 1) return 52 + 6 * rng_normal(random);
    return uniform(random, 1, 600);
}

static void test_fill(void) {
    static const char *const kinds[] = {"LibriSpeech", "cuts near 52 s", "talks"};
    static const int contexts[] = {256, 1024, 2048}, documents[] = {20000, 10000, 700};
    for (int kind = 0; kind < 3; kind++) {
        uint64_t random = 9;
        tokens t = SLAM_ZERO;
        for (int i = 0; i < documents[kind]; i++)
            add_document(&t, (size_t)(seconds_of(kind, &random) * (19.5 + 1.2 * rng_normal(&random))), 502, &random);
        size_t mean = t.n / t.documents;
        const char *path = write_tokens("fill.bin", &t, 502);
        for (int c = 0; c < 3; c++) {
            if (!TEST("data: rows are full: lengths of %s (mean %zu tokens), context %d", kinds[kind], mean, contexts[c])) continue;
            slam_data *d = open_data(contexts[c], 502, path);
            slam_data_size size;
            CHECK(slam_data_measure(d, -1, 0, &size), "%s", slam_error());
            check_near("empty share", 1 - size.fill, 0, 0.02);
            slam_data_free(d);
        }
    }
}

static void test_mixing(void) {
    if (!TEST("data: rows come in no order of length")) return;
    uint64_t random = 11;
    tokens t = SLAM_ZERO;
    for (int i = 0; i < 20000; i++) add_document(&t, (size_t)(19.5 * seconds_of(0, &random)), 502, &random);
    slam_data *d = open_data(1024, 502, write_tokens("mixing.bin", &t, 502));
    slam_rows *r = slam_rows_new(d, -1, 0, 1);
    double moments[5] = {0}, rows = 0; // x: the row's place, y: its pieces
    for (const packed_row *row; (row = next_row(r)) != NULL; rows++) {
        double x = rows, y = row->n;
        moments[0] += x, moments[1] += y, moments[2] += x * x, moments[3] += y * y, moments[4] += x * y;
    }
    double xy = moments[4] / rows - moments[0] / rows * moments[1] / rows;
    double xx = moments[2] / rows - moments[0] / rows * moments[0] / rows,
           yy = moments[3] / rows - moments[1] / rows * moments[1] / rows;
    check_near("correlation of a row's place with its number of pieces", xy / sqrt(xx * yy), 0, 0.1);
    slam_rows_free(r);
    slam_data_free(d);
}

static void test_seek(void) {
    if (!TEST("data: seeking equals reading on")) return;
    enum { EPOCHS = 3, T = 128 };
    uint64_t random = 13, epoch, row;
    tokens t = SLAM_ZERO;
    for (int i = 0; i < 20000; i++) add_document(&t, 1 + rng_below(&random, 60), 502, &random); // more than two windows
    slam_data *d = slam_data_new(T);
    CHECK(slam_data_add(d, write_tokens("seek.bin", &t, 502), 1.3) && slam_data_prepare(d, 502, 0, 0, NULL), "%s", slam_error());
    slam_rows *r = slam_rows_new(d, -1, 7, 1);
    seen all[EPOCHS];
    for (int e = 0; e < EPOCHS; e++) {
        slam_rows_tell(r, &epoch, &row);
        CHECK(epoch == (uint64_t)e && row == 0, "epoch %zu, row %zu", (size_t)epoch, (size_t)row);
        all[e] = see_epoch(r, T);
    }
    for (int i = 0; i < 60; i++) {
        uint64_t to_epoch = rng_below(&random, EPOCHS), to_row = rng_below(&random, all[to_epoch].rows + 1);
        slam_rows *other = i % 2 ? slam_rows_new(d, -1, 7, 1) : r;
        seen s = SLAM_ZERO;
        CHECK(slam_rows_seek(other, to_epoch, to_row), "%s", slam_error());
        slam_rows_tell(other, &epoch, &row);
        CHECK(epoch == to_epoch && row == to_row, "epoch %zu, row %zu", (size_t)epoch, (size_t)row);
        if (see_row(other, T, &s)) {
            CHECK(s.row[0] == all[to_epoch].row[to_row], "row %zu of epoch %zu", (size_t)to_row, (size_t)to_epoch);
        } else {
            slam_rows_tell(other, &epoch, &row);
            CHECK(to_row == all[to_epoch].rows && epoch == to_epoch + 1 && row == 0, "an end at row %zu", (size_t)to_row);
        }
        if (other != r) slam_rows_free(other);
        seen_free(&s);
    }
    check_fails(slam_rows_seek(r, 1, all[1].rows + 1), "the data are not those of before");
    for (int e = 0; e < EPOCHS; e++) seen_free(&all[e]);
    slam_rows_free(r);
    slam_data_free(d);
}

static void test_small_weight(void) {
    if (!TEST("data: a source of less than a draw an epoch comes round")) return;
    enum { T = 64, EPOCHS = 20 };
    uint64_t random = 18;
    slam_data *d = slam_data_new(T);
    tokens many = SLAM_ZERO, one = SLAM_ZERO;
    for (int i = 0; i < 30; i++) add_document(&many, 20, 502, &random);
    add_document(&one, 30, 502, &random);
    CHECK(slam_data_add(d, write_tokens("many.bin", &many, 502), 1), "%s", slam_error());
    CHECK(slam_data_add(d, write_tokens("one.bin", &one, 502), 0.3), "%s", slam_error());
    CHECK(slam_data_prepare(d, 502, 0, 0, NULL), "%s", slam_error());
    slam_rows *r = slam_rows_new(d, -1, 1, 1), *again = slam_rows_new(d, -1, 1, 1);
    size_t came = 0;
    for (uint64_t e = 0; e < EPOCHS; e++) {
        CHECK(slam_rows_seek(again, e, 0), "%s", slam_error());
        seen s = see_epoch(r, T), t = see_epoch(again, T);
        CHECK(s.pieces == 30 || s.pieces == 31, "%zu draws", s.pieces);
        CHECK(t.pieces == s.pieces, "after a seek %zu draws, expected %zu", t.pieces, s.pieces);
        came += s.pieces - 30;
        seen_free(&s), seen_free(&t);
    }
    CHECK(came == 6, "came %zu times in 20 epochs, expected 6", came);
    slam_rows_free(r), slam_rows_free(again);
    slam_data_free(d);
}

static void test_weights(void) {
    static const int documents[] = {101, 40, 60, 60};
    static const double weights[] = {1, 2.5, 0.5, 1.0 / 3};
    static const char *const names[] = {"one.bin", "two_and_a_half.bin", "half.bin", "third.bin"};
    if (!TEST("data: weights")) return;
    enum { T = 256, EPOCHS = 6 };
    uint64_t random = 17;
    slam_data *d = slam_data_new(T);
    seen pieces[4], epochs[EPOCHS];
    for (int s = 0; s < 4; s++) {
        tokens t = SLAM_ZERO;
        for (int i = 0; i < documents[s]; i++) add_document(&t, 20 + rng_below(&random, 60), 502, &random);
        pieces[s] = expect_pieces(&t, T);
        CHECK(slam_data_add(d, write_tokens(names[s], &t, 502), weights[s]), "%s", slam_error());
    }
    CHECK(slam_data_prepare(d, 502, 0, 0, NULL), "%s", slam_error());
    slam_rows *r = slam_rows_new(d, -1, 1, 1);
    for (int e = 0; e < EPOCHS; e++) {
        epochs[e] = see_epoch(r, T);
        CHECK(epochs[e].pieces == 101 + 100 + 30 + 20, "an epoch of %zu draws", epochs[e].pieces);
        for (size_t i = 0; i < pieces[0].pieces; i++) CHECK(times_seen(&epochs[e], pieces[0].piece[i]) == 1, "piece %zu", i);
        size_t three = 0;
        for (size_t i = 0; i < pieces[1].pieces; i++) {
            size_t n = times_seen(&epochs[e], pieces[1].piece[i]);
            CHECK(n == 2 || n == 3, "a piece with weight 2.5 came %zu times", n);
            three += n == 3;
        }
        CHECK(three == 20, "%zu of 40 pieces came a third time", three);
    }
    for (size_t i = 0; i < pieces[2].pieces; i++)
        for (int e = 0; e < EPOCHS; e += 2) {
            size_t n = times_seen(&epochs[e], pieces[2].piece[i]), m = times_seen(&epochs[e + 1], pieces[2].piece[i]);
            CHECK(n + m == 1, "a piece with weight 0.5 came %zu times in epoch %d and %zu times in the next", n, e, m);
        }
    for (size_t i = 0; i < pieces[3].pieces; i++)
        for (int e = 0; e < EPOCHS; e += 3) {
            size_t n = 0;
            for (int k = 0; k < 3; k++) n += times_seen(&epochs[e + k], pieces[3].piece[i]);
            CHECK(n == 1, "a piece with weight 1/3 came %zu times in three epochs", n);
        }
    for (int s = 0; s < 4; s++) { // evaluation knows no weights
        seen once = see_data(d, s, 0, 0);
        CHECK(same_pieces(&once, &pieces[s]), "source %d in file order", s);
        seen_free(&once), seen_free(&pieces[s]);
    }
    for (int e = 0; e < EPOCHS; e++) seen_free(&epochs[e]);
    slam_rows_free(r);
    slam_data_free(d);
}

static void test_held_out(void) {
    enum { T = 32 };
    if (TEST("data: held-out documents")) {
        uint64_t random = 19;
        tokens t[2] = SLAM_ZERO;
        for (int i = 0; i < 210; i++) add_document(&t[0], 1 + rng_below(&random, 150), 502, &random);
        for (int i = 0; i < 33; i++) add_document(&t[1], 1 + rng_below(&random, 150), 502, &random);
        text paths[2] = SLAM_ZERO;
        text_add(&paths[0], "%s", write_shard("held_a.bin", t[0].at, t[0].n, 502, 0));
        text_add(&paths[1], "%s", write_lines("held_b.jsonl", &t[1]));
        seen chosen[2];
        for (uint64_t seed = 0; seed < 3; seed++) {
            slam_data *d = slam_data_new(T), *held = NULL;
            CHECK(slam_data_add(d, paths[0].at, 2) && slam_data_add(d, paths[1].at, 1), "%s", slam_error());
            CHECK(slam_data_prepare(d, 502, 0.1, seed, &held), "%s", slam_error());
            CHECK(slam_data_sources(held) == 2 && !strcmp(slam_data_source_name(held, 1), paths[1].at),
                  "the sources of the held-out part");
            CHECK(held->source[0].documents == 21 && d->source[0].documents == 189, "%zu of 210", held->source[0].documents);
            CHECK(held->source[1].documents == 3 && d->source[1].documents == 30, "%zu of 33", held->source[1].documents);
            for (int s = 0; s < 2; s++) {
                seen whole = expect_pieces(&t[s], T), kept = see_data(d, s, 0, 0), out = see_data(held, s, 0, 0), both = SLAM_ZERO;
                for (size_t i = 0; i < kept.pieces; i++) see(&both.piece, &both.pieces, &both.piece_capacity, kept.piece[i]);
                for (size_t i = 0; i < out.pieces; i++) see(&both.piece, &both.pieces, &both.piece_capacity, out.piece[i]);
                CHECK(same_pieces(&both, &whole), "the two parts of source %d are not the whole", s);
                seen_free(&whole), seen_free(&kept), seen_free(&out), seen_free(&both);
            }
            // a document is on one side with all of its pieces: each side's documents open and close
            for (size_t i = 0, open = 0; i < held->n; i++) {
                const piece *p = &held->pieces[i];
                const uint16_t *at = piece_tokens(held, p);
                CHECK(open || at[0] == 1, "a held-out piece whose document begins elsewhere");
                open = p->n == T && at[p->n - 1] != 1;
            }
            if (seed < 2) chosen[seed] = see_data(held, -1, 0, 0);
            slam_data_free(d); // either part may go first
            if (seed == 2) {
                seen s = see_data(held, -1, 0, 0);
                CHECK(s.pieces > 0, "the held-out part without the other");
                seen_free(&s);
            }
            slam_data_free(held);
        }
        CHECK(!same_pieces(&chosen[0], &chosen[1]), "two seeds hold out the same documents");
        for (int s = 0; s < 2; s++) {
            seen_free(&chosen[s]);
            text_free(&paths[s]);
            free(t[s].at);
        }
    }
    if (TEST("data: held-out documents where there are few")) {
        static const struct {
            int documents;
            double fraction;
            size_t held;
        } few[] = {{2, 0.01, 1}, {10, 0.99, 9}, {10, 0.25, 3}, {3, 0.5, 2}};
        uint64_t random = 23;
        for (int i = 0; i < 4; i++) {
            tokens t = SLAM_ZERO;
            for (int k = 0; k < few[i].documents; k++) add_document(&t, 5, 502, &random);
            slam_data *d = slam_data_new(T), *held = NULL;
            CHECK(slam_data_add(d, write_tokens("few.bin", &t, 502), 1), "%s", slam_error());
            CHECK(slam_data_prepare(d, 502, few[i].fraction, 0, &held), "%s", slam_error());
            CHECK(held && held->source[0].documents == few[i].held, "%zu of %d", held->source[0].documents, few[i].documents);
            slam_data_free(held);
            slam_data_free(d);
        }
        tokens t = SLAM_ZERO;
        add_document(&t, 5, 502, &random);
        slam_data *d = slam_data_new(T), *held = NULL;
        CHECK(slam_data_add(d, write_tokens("few.bin", &t, 502), 1), "%s", slam_error());
        check_fails(slam_data_prepare(d, 502, 0.5, 0, &held), "one document, of which none can be held out");
        slam_data_free(d);
    }
}

/* Adds and prepares; 0 where either fails. */
static int data_opens(const char *pattern, int V) {
    slam_data *d = slam_data_new(64);
    int ok = slam_data_add(d, pattern, 1) && slam_data_prepare(d, V, 0, 0, NULL);
    slam_data_free(d);
    return ok;
}

static void test_refused(void) {
    if (TEST("data: malformed shards are refused")) {
        static const uint16_t unopened[] = {5, 6, 1}, unclosed[] = {1, 5, 1, 1, 6}, missing[] = {1, 5, 6, 1, 7, 1, 1, 8, 1};
        static const uint16_t between[] = {1, 5, 1, 9, 1, 6, 1}, doubled[] = {1, 1, 5, 1}, padded[] = {1, 5, 0, 1},
                              large[] = {1, 5, 77, 1};
        static const uint16_t trailing[] = {1, 5, 1, 9}, hollow[] = {1, 1, 1, 1}, fine[] = {1, 1, 1, 5, 1, 1, 76, 1};
        check_fails(data_opens(write_shard("bad.bin", unopened, 3, 0, 0), 77), "bad.bin: token 0 (from 0) is 5, expected 1");
        check_fails(data_opens(write_shard("bad.bin", unclosed, 5, 0, 0), 77), "bad.bin: the document that token 3 (from 0) opens");
        check_fails(data_opens(write_shard("bad.bin", missing, 9, 0, 0), 77), "bad.bin: token 4 (from 0) is 7, expected 1");
        check_fails(data_opens(write_shard("bad.bin", between, 7, 0, 0), 77), "bad.bin: token 3 (from 0) is 9, expected 1");
        check_fails(data_opens(write_shard("bad.bin", doubled, 4, 0, 0), 77), "bad.bin: token 2 (from 0) is 5, expected 1");
        check_fails(data_opens(write_shard("bad.bin", trailing, 4, 0, 0), 77), "bad.bin: token 3 (from 0) is 9, expected 1");
        check_fails(data_opens(write_shard("bad.bin", padded, 4, 0, 0), 77), "bad.bin: token 2 (from 0) is 0, padding");
        check_fails(data_opens(write_shard("bad.bin", large, 4, 0, 0), 77), "bad.bin: token 2 (from 0) is 77, expected below 77");
        check_fails(data_opens(write_shard("bad.bin", hollow, 4, 0, 0), 77), "bad.bin: holds no document");
        check_fails(data_opens(write_shard("bad.bin", fine, 0, 0, 0), 77), "bad.bin: holds no document");
        CHECK(data_opens(write_shard("good.bin", fine, 8, 0, 0), 77), "%s", slam_error());
        CHECK(data_opens(write_shard("good.bin", large, 4, 0, 0), 65536), "%s", slam_error());
        CHECK(data_opens(write_shard("good.bin", large, 4, 0, 0), 1000000), "%s", slam_error());
    }
    if (TEST("data: a wrong token is found wherever it stands")) {
        uint64_t random = 29;
        tokens t = SLAM_ZERO;
        for (int i = 0; i < 5; i++) add_document(&t, 97, 502, &random);
        for (size_t i = 0; i < t.n; i++) {
            uint16_t kept = t.at[i];
            char expected[80];
            t.at[i] = 502;
            snprintf(expected, sizeof expected, "token %zu (from 0) is 502", i);
            check_fails(data_opens(write_shard("wrong.bin", t.at, t.n, 0, 0), 502), expected);
            t.at[i] = kept;
            for (uint16_t broken = 1; broken < 3; broken++) { // a 1 too many, a 1 missing
                if ((kept == 1) == (broken == 1)) continue;
                t.at[i] = broken;
                check_fails(data_opens(write_shard("wrong.bin", t.at, t.n, 0, 0), 502), "wrong.bin: ");
            }
            t.at[i] = kept;
        }
        free(t.at);
    }
    if (TEST("data: malformed unit files are refused")) {
        static const struct {
            const char *lines, *error;
        } bad[] = {
            {"{\"units\": [1, 2]}\n\n{\"units\": [3, 100, 7]}\n", "units.jsonl:3: unit 100, expected below 100"},
            {"{\"units\": [1, 2]}\n{\"units\": [3, 65534]}\n", "units.jsonl:2: unit 65534"},
            {"{\"units\": [1, -2]}\n", "units.jsonl:1"},
            {"{\"units\": [1, 2]}\n{\"units\": [3, 4}\n", "units.jsonl:2"},
            {"{\"units\": []}\n", "units.jsonl: holds no document"},
            {"", "units.jsonl"},
        };
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
            check_fails(data_opens(check_file("units.jsonl", bad[i].lines, strlen(bad[i].lines)), 102), bad[i].error);
        const char *good = "{\"units\": [1, 2]}\r\n{\"units\": []}\n{\"units\": [3, 99]}";
        CHECK(data_opens(check_file("units.jsonl", good, strlen(good)), 102), "%s", slam_error());
    }
    if (TEST("data: sources that cannot be are refused")) {
        static const uint16_t one[] = {1, 5, 1};
        const char *a = write_shard("said_a.bin", one, 3, 102, 7), *b = write_shard("said_b.bin", one, 3, 502, 7);
        const char *c = write_shard("said_c.bin", one, 3, 102, 8), *silent = write_shard("said_d.bin", one, 3, 0, 0);
        const char *other = check_file("said.txt", "x", 1);
        slam_data *d = slam_data_new(64), *held = NULL;
        int V = -1;
        CHECK(slam_data_vocabulary(d, &V) && V == 0 && slam_data_fingerprint(d) == 0, "before anything was added");
        check_fails(slam_data_prepare(d, 102, 0, 0, NULL), "there are no data");
        check_fails(slam_data_add(d, check_path("none*.bin"), 1), "no such file");
        check_fails(slam_data_add(d, check_path("none.bin"), 1), "no such file");
        check_fails(slam_data_add(d, check_path(""), 1), "is a folder");
        check_fails(slam_data_add(d, other, 1), "expected token shards (.bin) or unit files (.jsonl)");
        check_fails(slam_data_add(d, a, 0), "weight 0");
        check_fails(slam_data_add(d, a, -1), "weight -1");
        check_fails(slam_data_add(d, a, NAN), "weight");
        check_fails(slam_data_add(d, a, 1e9), "weight");
        slam_data_free(d);
        d = slam_data_new(64);
        CHECK(slam_data_add(d, silent, 1) && slam_data_add(d, a, 1) && slam_data_vocabulary(d, &V) && V == 102,
              "a vocabulary of %d", V);
        CHECK(slam_data_fingerprint(d) == 7, "fingerprint %u", (unsigned)slam_data_fingerprint(d));
        check_fails(slam_data_add(d, b, 1), "a vocabulary of 502");
        check_fails(slam_data_add(d, c, 1), "quantiser 00000008");
        check_fails(slam_data_prepare(d, 2, 0, 0, NULL), "a vocabulary of 2");
        check_fails(slam_data_prepare(d, 102, 1, 0, &held), "fraction 1");
        check_fails(slam_data_prepare(d, 102, NAN, 0, &held), "fraction");
        slam_data_free(d);
        d = slam_data_new(64);
        check_fails(slam_rows_new(d, -1, 0, 1), "not prepared");
        CHECK(slam_data_add(d, a, 1e-3) && slam_data_prepare(d, 102, 0, 0, NULL), "%s", slam_error());
        check_fails(slam_data_prepare(d, 102, 0, 0, NULL), "once");
        check_fails(slam_data_add(d, a, 1), "cannot be added");
        check_fails(slam_rows_new(d, -1, 0, 1), "draws nothing");
        check_fails(slam_rows_new(d, 1, 0, 0), "source 1, expected 0 to 0");
        slam_data_free(d);
        check_fails(slam_data_new(1), "context 1");
        check_fails(slam_data_new(INT_MAX), "at most 16777216");
    }
}

static void test_order(void) {
    if (TEST("data: the order hangs on the seed and the documents alone")) {
        enum { T = 100 };
        uint64_t random = 31;
        tokens t = SLAM_ZERO;
        for (int i = 0; i < 2000; i++) add_document(&t, 1 + rng_below(&random, 150), 502, &random);
        slam_data *whole = open_data(T, 502, write_shard("order.bin", t.at, t.n, 502, 0));
        slam_data *lines = open_data(T, 502, write_lines("order.jsonl", &t));
        for (int i = 0; i < 4; i++) { // the same documents in four shards of one pattern, written last one first
            size_t end[5] = {0};
            for (size_t k = 0, mark = 0, n = 0; k < t.n; k++)
                if (t.at[k] == 1 && ++mark % 2 == 0 && ++n % 500 == 0) end[n / 500] = k + 1;
            char name[40];
            snprintf(name, sizeof name, "order_part_%d.bin", 3 - i);
            write_shard(name, t.at + end[3 - i], end[4 - i] - end[3 - i], 502, 0);
        }
        slam_data *parts = open_data(T, 502, check_path("order_part_?.bin"));
        seen a = see_data(whole, -1, 1, 1), b = see_data(lines, -1, 1, 1), c = see_data(parts, -1, 1, 1),
             d = see_data(whole, -1, 2, 1);
        CHECK(same_rows(&a, &b), "a unit file with the documents of a shard");
        CHECK(same_rows(&a, &c), "shards with the documents of one");
        CHECK(!same_rows(&a, &d) && same_pieces(&a, &d), "two seeds");
        int threads = threads_count();
        threads_set(1);
        slam_data *single = open_data(T, 502, check_path("order.bin"));
        threads_set(threads);
        seen e = see_data(single, -1, 1, 1);
        CHECK(same_rows(&a, &e), "one thread");
        slam_data_free(whole), slam_data_free(lines), slam_data_free(parts), slam_data_free(single);
        seen_free(&a), seen_free(&b), seen_free(&c), seen_free(&d), seen_free(&e);
        free(t.at);
    }
    if (TEST("data: less than a row")) {
        uint64_t random = 37;
        tokens t = SLAM_ZERO;
        add_document(&t, 5, 502, &random);
        add_document(&t, 9, 502, &random);
        slam_data *d = open_data(64, 502, write_tokens("small.bin", &t, 502));
        slam_rows *r = slam_rows_new(d, -1, 0, 1);
        for (int e = 0; e < 3; e++) {
            seen s = see_epoch(r, 64);
            CHECK(s.rows == 1 && s.tokens == 18 && s.targets == 16, "%zu rows, %zu tokens", s.rows, s.tokens);
            seen_free(&s);
        }
        slam_rows_free(r);
        slam_data_free(d);
    }
}

/* 20,000 documents of 38 to 42 tokens at context 64: no two fit one row, and no row is more than two thirds full. */
static void test_poor_rows(void) {
    if (!TEST("data: every chunk exactly once an epoch where no rows are full")) return;
    enum { T = 64, DOCUMENTS = 20000, EPOCHS = 3 };
    uint64_t random = 47;
    tokens t = SLAM_ZERO;
    for (int i = 0; i < DOCUMENTS; i++) add_document(&t, 36 + rng_below(&random, 5), 502, &random);
    const size_t total = t.n;
    seen expected = expect_pieces(&t, T);
    slam_data *d = open_data(T, 502, write_tokens("poor.bin", &t, 502));
    slam_rows *r = slam_rows_new(d, -1, 3, 1);
    for (int e = 0; e < EPOCHS; e++) {
        seen s = see_epoch(r, T);
        CHECK(s.pieces == DOCUMENTS && s.tokens == total && s.rows == DOCUMENTS,
              "epoch %d: %zu chunks, %zu tokens, %zu rows; expected %d, %zu, %d", e, s.pieces, s.tokens, s.rows, DOCUMENTS, total,
              DOCUMENTS);
        CHECK(same_pieces(&s, &expected), "epoch %d: other chunks", e);
        seen_free(&s);
    }
    slam_data_size size;
    CHECK(slam_data_measure(d, -1, 3, &size), "%s", slam_error());
    CHECK(size.tokens == total && size.pieces == DOCUMENTS, "%zu tokens and %zu chunks are measured, expected %zu and %d",
          (size_t)size.tokens, (size_t)size.pieces, total, DOCUMENTS);
    slam_rows_free(r);
    slam_data_free(d);
    seen_free(&expected);
}

typedef struct hash_place {
    uint64_t hash;
    size_t place;
} hash_place;

/* Correlation between the places of the same n hashes in two orders: 1 for the same order, about 0 for unrelated ones. */
static double order_correlation(const uint64_t *a, const uint64_t *b, size_t n) {
    hash_place *x = (hash_place *)mem_new(2 * n, sizeof *x), *y = x + n;
    const double mean = ((double)n - 1) / 2, variance = ((double)n * (double)n - 1) / 12;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        x[i].hash = a[i];
        y[i].hash = b[i];
        x[i].place = y[i].place = i;
    }
    qsort(x, n, sizeof *x, order_hashes);
    qsort(y, n, sizeof *y, order_hashes);
    for (size_t i = 0; i < n; i++) sum += ((double)x[i].place - mean) * ((double)y[i].place - mean);
    free(x);
    return sum / (double)n / variance;
}

static void test_epoch_order(void) {
    if (!TEST("data: epochs have the same chunks in unrelated orders")) return;
    enum { T = 128, EPOCHS = 3 };
    uint64_t random = 53;
    tokens t = SLAM_ZERO;
    for (int i = 0; i < 20000; i++) add_document(&t, 5 + rng_below(&random, 60), 502, &random);
    slam_data *d = open_data(T, 502, write_tokens("epochs.bin", &t, 502));
    slam_rows *r = slam_rows_new(d, -1, 3, 1);
    seen epoch[EPOCHS + 1];
    for (int e = 0; e < EPOCHS; e++) epoch[e] = see_epoch(r, T);
    epoch[EPOCHS] = see_data(d, -1, 0, 0); // the order of the file
    for (int a = 0; a <= EPOCHS; a++)
        for (int b = 0; b < a; b++) {
            if (!CHECK(same_pieces(&epoch[a], &epoch[b]), "epochs %d and %d: other chunks", b, a)) continue;
            seen rows[2] = {epoch[a], epoch[b]};
            size_t shared = 0;
            for (size_t i = 0; i < rows[0].rows; i += 10)
                for (size_t k = 0; k < rows[1].rows; k++) shared += rows[0].row[i] == rows[1].row[k];
            CHECK(shared < rows[0].rows / 100, "epochs %d and %d: %zu of %zu rows are the same", b, a, shared, rows[0].rows / 10);
            check_near("correlation of the places of chunks", order_correlation(epoch[a].piece, epoch[b].piece, epoch[a].pieces), 0,
                       0.05);
        }
    for (int e = 0; e <= EPOCHS; e++) seen_free(&epoch[e]);
    slam_rows_free(r);
    slam_data_free(d);
}

/* ---- n-grams ---- */

/* -log p of target i of a piece by the formula, from counts taken by looking through all of the training tokens. */
static void ngrams_by_search(const slam_data *train, const uint16_t *at, uint32_t i, int V, double *sum) {
    double p = 1.0 / V;
    for (uint32_t k = 0; k < 5; k++) { // k tokens of context; where the piece has fewer, the lower order's p stands
        double count = 0, hits = 0, followers = 0;
        int follows[16] = {0};
        for (size_t q = 0; k <= i && q < train->n; q++) {
            const uint16_t *from = piece_tokens(train, &train->pieces[q]);
            for (uint32_t j = k > 1 ? k : 1; j < train->pieces[q].n; j++) {
                if (k && memcmp(from + j - k, at + i - k, k * sizeof *at) != 0) continue;
                count++;
                hits += from[j] == at[i];
                follows[from[j]] = 1;
            }
        }
        for (int v = 0; v < 16; v++) followers += follows[v];
        if (count > 0) p = (hits + followers * p) / (count + followers);
        sum[k] -= log(p);
    }
}

static void test_ngrams(void) {
    if (TEST("n-grams: by hand")) {
        static const uint16_t train[] = {1, 2, 3, 2, 3, 1}, test[] = {1, 2, 1};
        slam_data *a = open_data(64, 4, write_shard("train.bin", train, 6, 0, 0)),
                  *b = open_data(64, 4, write_shard("test.bin", test, 3, 0, 0));
        double nll[5], open = (2 + 3 * 0.25) / 8, shut = (1 + 3 * 0.25) / 8; // p_1 of the targets 2 and 1
        uint64_t n = 0;
        CHECK(slam_ngrams(a, b, 4, nll, &n) && n == 2, "%s", slam_error());
        check_near("unigrams", nll[0], -(log(open) + log(shut)) / 2, 1e-12);
        open = (1 + open) / 2; // 1 is followed once, by 2
        shut = shut / 3;       // 2 is followed twice, by 3
        check_near("bigrams", nll[1], -(log(open) + log(shut)) / 2, 1e-12);
        shut = shut / 2; // 1 2 is followed once, by 3
        for (int k = 2; k < 5; k++) check_near("longer ones", nll[k], -(log(open) + log(shut)) / 2, 1e-12);
        check_fails(slam_ngrams(a, b, 3, nll, &n), "vocabulary of 4");
        slam_data_free(a);
        slam_data_free(b);
    }
    for (int trial = 0; trial < 4; trial++) {
        if (!TEST("n-grams: against a search through the training data, %d", trial)) continue;
        uint64_t random = 41 + (uint64_t)trial, n = 0;
        int V = 4 + 3 * trial, T = 5 + 20 * trial;
        tokens train = SLAM_ZERO, test = SLAM_ZERO;
        for (int i = 0; i < 40; i++) add_document(&train, 1 + rng_below(&random, 60), V, &random);
        for (int i = 0; i < 6; i++) add_document(&test, 1 + rng_below(&random, 60), V, &random);
        slam_data *a = slam_data_new(T), *b = open_data(T, V, write_tokens("test.bin", &test, 0));
        CHECK(slam_data_add(a, write_tokens("train.bin", &train, 0), 3.7) && slam_data_prepare(a, V, 0, 0, NULL), "%s",
              slam_error());
        double nll[5], expected[5] = {0}, targets = 0;
        for (size_t p = 0; p < b->n; p++)
            for (uint32_t i = 1; i < b->pieces[p].n; i++, targets++)
                ngrams_by_search(a, piece_tokens(b, &b->pieces[p]), i, V, expected);
        CHECK(slam_ngrams(a, b, V, nll, &n) && (double)n == targets, "%s", slam_error());
        for (int k = 0; k < 5; k++) check_near("nats a token", nll[k], expected[k] / targets, 1e-12);
        slam_data_free(a);
        slam_data_free(b);
    }
}

/* ---- a model's loss ---- */

static void test_score(void) {
    if (!TEST("score: the loss of a model on data is that of its pieces one by one")) return;
    enum { T = 48, V = 20 };
    slam_config c;
    memset(&c, 0, sizeof c);
    c.V = V, c.C = 16, c.L = 2, c.NH = 2, c.KVH = 1, c.HS = 8, c.F = 24, c.T = T;
    c.tied = c.qkv_bias = 1;
    c.eps = 1e-6f, c.init_std = 0.3f, c.rope_theta = 10000;
    uint64_t random = 43, targets = 0, expected_targets = 0;
    tokens t = SLAM_ZERO;
    for (int i = 0; i < 25; i++) add_document(&t, 1 + rng_below(&random, 70), V, &random);
    slam_data *d = open_data(T, V, write_tokens("score.bin", &t, 0));
    slam_ops *ops = slam_cpu(0);
    slam_model *m = ops ? slam_model_new(ops, &c, 1) : NULL;
    if (CHECK(m && slam_model_plan(m, 3, T, 0), "%s", slam_error())) {
        double sum = 0, nll;
        for (size_t p = 0; p < d->n; p++) {
            int token[T], target[T], start[T] = {0}, n = (int)d->pieces[p].n;
            float loss[T];
            slam_batch batch = {1, n, token, target, start, NULL};
            for (int i = 0; i < n; i++) token[i] = piece_tokens(d, &d->pieces[p])[i];
            for (int i = 0; i < n; i++) target[i] = i + 1 < n ? token[i + 1] : -1;
            CHECK(slam_model_losses(m, &batch, loss), "%s", slam_error());
            for (int i = 0; i + 1 < n; i++, expected_targets++) sum += loss[i];
        }
        for (int B = 1; B <= 3; B++) {
            CHECK(slam_score_data(m, d, -1, B, &nll, &targets), "%s", slam_error());
            CHECK(targets == expected_targets, "%zu targets, expected %zu", (size_t)targets, (size_t)expected_targets);
            check_near("nats a token", nll, sum / (double)expected_targets, 1e-5);
        }
        check_fails(slam_score_data(m, d, -1, 0, &nll, &targets), "a batch of 0 rows");
    }
    slam_model_free(m);
    slam_ops_free(ops);
    slam_data_free(d);
}

int main(void) {
    test_pieces();
    test_poor_rows();
    test_epoch_order();
    test_blocks();
    test_fill();
    test_mixing();
    test_seek();
    test_weights();
    test_small_weight();
    test_held_out();
    test_refused();
    test_order();
    test_ngrams();
    test_score();
    return check_end();
}
