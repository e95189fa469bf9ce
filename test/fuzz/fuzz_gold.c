/* gold.csv: a set that is made from it pairs every row with another one, and each pair has an accuracy. */
#include "fuzz.h"

static void check_set(int kind, const char *path) {
    slam_testset *s = NEW(slam_testset, 1);
    s->kind = kind;
    if (!testset_read_gold(s, path)) {
        slam_testset_free(s);
        return;
    }
    const size_t n = s->items.n;
    MUST(s->n_pairs * 2 == n && s->n_cells > 0 && s->n_cells <= s->n_pairs);
    double *scores = NEW(double, n);
    for (size_t i = 0; i < s->n_pairs; i++) {
        MUST(s->pairs[i].correct < n && s->pairs[i].wrong < n && s->pairs[i].cell < s->n_cells);
        scores[s->pairs[i].correct] += 1;
        scores[s->pairs[i].wrong] -= 1;
    }
    for (size_t i = 0; i < n; i++) MUST(scores[i] == 1 || scores[i] == -1);
    slam_testset_score(s, scores);
    MUST(s->n_accuracies >= 1 && s->accuracies[0].n == s->n_cells && s->accuracies[0].mean == 1);
    free(scores);
    slam_testset_free(s);
}

static int fuzz_gold(const uint8_t *bytes, size_t size) {
    const char *path = fuzz_file(bytes, size);
    check_set(SLAM_SWUGGY, path);
    check_set(SLAM_SBLIMP, path);
    return 0;
}
