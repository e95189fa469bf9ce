/* gold.csv: a table that is taken has as many fields in each row as in its first, and a set that is made of it pairs every row with
   another one. */
#include "fuzz.h"

static void check_set(int kind, const char *path) {
    slam_testset *s = slam_testset_gold(kind, path);
    size_t n;
    if (!s) return;
    const size_t items = slam_testset_items(s)->n;
    MUST(items == s->gold.rows && s->pairs * 2 == items && s->cells > 0 && s->cells <= s->pairs);
    double *scores = (double *)calloc(items, sizeof *scores);
    MUST(scores);
    for (size_t i = 0; i < s->pairs; i++) {
        MUST(s->pair[i].right < items && s->pair[i].wrong < items && s->pair[i].cell < s->cells);
        scores[s->pair[i].right] += 1;
        scores[s->pair[i].wrong] -= 1;
    }
    for (size_t i = 0; i < items; i++) MUST(scores[i] == 1 || scores[i] == -1);
    const slam_accuracy *a = slam_testset_accuracies(s, scores, &n);
    MUST(a && n >= 1 && a->n == s->cells && a->mean == 1);
    free(scores);
    slam_testset_free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    const char *path = fuzz_file(bytes, size);
    csv c;
    if (csv_read(&c, path)) {
        MUST(c.columns > 0 && c.rows > 0);
        for (size_t r = 0; r < c.rows; r++)
            for (size_t k = 0; k < c.columns; k++)
                MUST(csv_at(&c, r, k) >= c.text && strlen(csv_at(&c, r, k)) <= size && csv_line(&c, r) > 0);
        csv_free(&c);
    }
    check_set(SLAM_SWUGGY, path);
    check_set(SLAM_SBLIMP, path);
    return 0;
}
