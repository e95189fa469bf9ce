/* Lines of preference pairs: what is read fits the context and the vocabulary, and its rows are batches that a model takes. */
#include "fuzz.h"

enum { PAIRS_V = 40, CONTEXT = 16 };

static void check_pair(const slam_pair *q) {
    const uint32_t n[] = {q->n_prompt, q->n_chosen, q->n_rejected};
    const uint16_t *t = q->tokens;
    MUST(n[0] >= 1 && n[1] >= 2 && n[2] >= 2 && n[0] + n[1] <= CONTEXT && n[0] + n[2] <= CONTEXT);
    MUST(*t++ == DOCUMENT_TOKEN);
    for (int part = 0; part < 3; part++) {
        for (uint32_t i = 1; i < n[part]; i++, t++) MUST(*t >= FIRST_UNIT && *t < PAIRS_V);
        if (part > 0) MUST(*t++ == DOCUMENT_TOKEN);
    }
}

static void check_rows(const slam_pairs *p) {
    slam_batch b = slam_batch_new(2, p->T, 1);
    slam_loader *l = slam_loader_new_pairs(p, 0, 1, 1);
    uint64_t tokens = 0;
    size_t completions = 0;
    MUST(l && slam_loader_begin(l, (int)p->n, NULL) == (int)p->n);
    while (slam_loader_next(l, &b) > 0) {
        MUST(b.B >= 1 && b.B <= 2 && b.T <= p->T);
        completions += b.n_sequences;
        for (int i = 0; i < b.B * b.T; i++) {
            const int t = i % b.T, start = b.doc_start[i], mask = b.mask_start[i], mask_end = b.mask_end[i];
            MUST(b.tokens[i] >= 0 && b.tokens[i] < PAIRS_V && b.targets[i] < PAIRS_V && start >= 0 && start <= t);
            MUST(mask == mask_end || (mask >= start && mask < mask_end && mask_end <= t));
            MUST(t - start - (mask_end - mask) < CONTEXT);
            tokens += b.tokens[i] != 0;
        }
    }
    MUST(tokens == l->tokens && completions == 2 * p->n);
    slam_loader_free(l);
    slam_batch_free(&b);
}

static int fuzz_pairs(const uint8_t *bytes, size_t size) {
    units_reader r;
    slam_units u[3];
    slam_pairs p = ZERO;
    p.V = PAIRS_V;
    p.context = CONTEXT;
    p.share = (int)(size % 2);
    p.max_repetition = 0.3;
    memset(u, 0, sizeof u);
    if (units_open(&r, fuzz_file(bytes, size))) {
        for (int ok = 1; ok && units_next(&r, NULL) > 0;) ok = pairs_add_line(&p, r.root, r.what, u);
        units_close(&r);
    }
    for (size_t i = 0; i < p.n; i++) check_pair(&p.at[i]);
    p.n_train = p.n;
    if (slam_pairs_prepare(&p, 0, 0)) check_rows(&p);
    for (int k = 0; k < 3; k++) slam_units_free(&u[k]);
    slam_pairs_free(&p);
    return 0;
}
