/* Lines of preference pairs: what is read fits the context and the vocabulary, and its rows are a batch that a model takes. */
#include "fuzz.h"

enum { V = 40, CONTEXT = 16 };

static void check_pair(const slam_pairs *p, const preference *q) {
    const size_t n = (size_t)q->n[PROMPT] + q->n[CHOSEN] + q->n[REJECTED];
    for (int part = CHOSEN; part <= REJECTED; part++) MUST(q->n[part] >= 1 && q->n[PROMPT] + q->n[part] + 2 <= CONTEXT);
    MUST(q->first + n <= p->n_tokens);
    for (size_t i = 0; i < n; i++) MUST(p->tokens[q->first + i] >= UNIT_TOKEN && p->tokens[q->first + i] < V);
}

static void check_rows(slam_pairs *p) {
    pair_rows r;
    uint64_t tokens = 0;
    MUST(rows_new(&r, p, p->n_train, 2));
    pack_pairs(&r, p->train, p->n_train);
    for (size_t first = 0, end; first < r.n; first = end) {
        slam_batch b;
        end = rows_fill(&r, first, &b);
        MUST(end > first && b.B >= 1 && b.B <= 2 && b.T <= slam_pairs_row(p));
        for (int i = 0; i < b.B * b.T; i++) {
            const int t = i % b.T, start = b.doc_start[i], hole = b.hole[2 * i], hole_end = b.hole[2 * i + 1];
            MUST(b.tokens[i] >= 0 && b.tokens[i] < V && b.targets[i] < V && start >= 0 && start <= t);
            MUST(hole == hole_end || (hole >= start && hole < hole_end && hole_end <= t));
            MUST(t - start - (hole_end - hole) < CONTEXT);
            tokens += b.tokens[i] != 0;
        }
    }
    MUST(tokens == r.tokens);
    rows_free(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    units_reader r;
    units u = SLAM_ZERO;
    json *root;
    slam_pairs *p = slam_pairs_new(V, CONTEXT, (int)(size % 2), 0.3);
    MUST(p);
    if (units_open(&r, fuzz_file(bytes, size))) {
        for (int ok = 1; ok && units_json(&r, &root) > 0;) {
            ok = pair_read(p, root, r.what, &u);
            json_free(root);
        }
        units_close(&r);
    }
    for (size_t i = 0; i < p->n; i++) check_pair(p, &p->at[i]);
    if (slam_pairs_prepare(p, 0, 0)) check_rows(p);
    units_free(&u);
    slam_pairs_free(p);
    return 0;
}
