/* Scores of sequences against the model's own losses, test sets against the official scorer's figures (test/fixtures/scoring,
   made by test/reference_scoring.py), and what is refused. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FIXTURES "test/fixtures/scoring/"

static const slam_config small_config = {30, 24, 2, 4, 2, 6, 40, 256, 1, 1, 1e-6, 0.3, 10000};

/* ---- sequences ---- */

enum { SEQUENCES = 40 };

static void make_sequences(slam_units *u) {
    uint64_t state = 9;
    memset(u, 0, SEQUENCES * sizeof *u);
    for (int i = 0; i < SEQUENCES; i++) {
        u[i].n = i == 3 ? 0 : i == 4 ? 200 : i == 5 ? 131 : 1 + rng_below(&state, 30);
        u[i].unit = (int *)mem_new(u[i].n, sizeof *u[i].unit);
        for (size_t k = 0; k < u[i].n; k++) u[i].unit[k] = (int)rng_below(&state, 28);
    }
    for (int i = 30; i < SEQUENCES; i++) { // some are equal
        free(u[i].unit);
        u[i].n = u[i - 20].n;
        u[i].unit = (int *)mem_new(u[i].n, sizeof *u[i].unit);
        memcpy(u[i].unit, u[i - 20].unit, u[i].n * sizeof *u[i].unit);
    }
}

static void free_sequences(slam_units *u) {
    for (int i = 0; i < SEQUENCES; i++) slam_units_free(&u[i]);
}

/* The sum of losses of tokens from..to-1 of a row of its own that begins at token `start`. */
static double losses_of(slam_model *m, const int *tokens, int start, int from, int to) {
    int input[256], targets[256], doc_start[256] = {0};
    float losses[256];
    double sum = 0;
    for (int t = start; t < to; t++) {
        input[t - start] = tokens[t];
        targets[t - start] = tokens[t + 1];
    }
    const slam_batch b = {1, to - start, input, targets, doc_start, NULL};
    CHECK(slam_model_plan(m, 1, to - start, SLAM_INFERENCE) && slam_model_losses(m, &b, losses), "%s", slam_error());
    for (int t = from; t < to; t++) sum += losses[t - start];
    return sum;
}

static int tokens_of(const slam_units *u, int *tokens) {
    tokens[0] = tokens[u->n + 1] = 1;
    for (size_t k = 0; k < u->n; k++) tokens[k + 1] = u->unit[k] + 2;
    return (int)u->n + 1; // to predict
}

/* Stops at the second call. */
static int stop_at(void *context, uint64_t done, uint64_t of) {
    *(uint64_t *)context += done <= of;
    return *(uint64_t *)context < 2;
}

static void test_sequences(slam_ops *ops) {
    slam_units u[SEQUENCES], reversed[SEQUENCES];
    double scores[SEQUENCES], sums[SEQUENCES], other[SEQUENCES];
    int tokens[256];
    slam_scored report;
    slam_model *m = slam_model_new(ops, &small_config, 3);
    make_sequences(u);
    if (TEST("sequences: each is what a row of its own gives")) {
        CHECK(slam_score_units(m, u, SEQUENCES, 3, 256, 0, scores, &report, NULL, NULL), "%s", slam_error());
        CHECK(report.slid == 0 && report.different < 31 && report.different > 25, "%zu different", report.different);
        for (int i = 0; i < SEQUENCES; i++) {
            const int n = tokens_of(&u[i], tokens);
            check_near("mean", scores[i], -losses_of(m, tokens, 0, 0, n) / n, 2e-5);
            if (i >= 30) CHECK(scores[i] == scores[i - 20], "equal sequences have other scores");
        }
        CHECK(slam_score_units(m, u, SEQUENCES, 1, 256, 1, sums, &report, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < SEQUENCES; i++) check_near("sum", sums[i] / (double)(u[i].n + 1), scores[i], 2e-5);
    }
    if (TEST("sequences: windows predict each token once, with half a window before it")) {
        CHECK(slam_score_units(m, u, SEQUENCES, 2, 64, 1, sums, &report, NULL, NULL), "%s", slam_error());
        CHECK(report.slid == 2, "%zu are longer than a row", report.slid);
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
    if (TEST("sequences: batch, order and company change nothing")) {
        for (int i = 0; i < SEQUENCES; i++) reversed[i] = u[SEQUENCES - 1 - i];
        CHECK(slam_score_units(m, reversed, SEQUENCES, 7, 100, 0, other, &report, NULL, NULL), "%s", slam_error());
        CHECK(slam_score_units(m, u, SEQUENCES, 1, 100, 0, scores, &report, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < SEQUENCES; i++) check_near("score", other[SEQUENCES - 1 - i], scores[i], 1e-5);
        CHECK(slam_score_units(m, u, 1, 8, 256, 0, other, &report, NULL, NULL), "%s", slam_error());
        check_near("alone", other[0], scores[0], 1e-5);
        CHECK(slam_score_units(m, u + 3, 1, 8, 256, 0, other, &report, NULL, NULL) && report.tokens == 1,
              "a sequence without units: %s", slam_error());
        CHECK(slam_score_units(m, u, 0, 8, 256, 0, other, &report, NULL, NULL), "no sequences: %s", slam_error());
    }
    if (TEST("sequences: what is refused")) {
        uint64_t calls = 0;
        check_fails(slam_score_units(m, u, SEQUENCES, 1, 256, 0, scores, &report, stop_at, &calls), "stopped after");
        CHECK(calls == 2, "the watch was called %d times", (int)calls);
        check_fails(slam_score_units(m, u, SEQUENCES, 1, 257, 0, scores, &report, NULL, NULL), "the model has positions for 256");
        u[2].unit[0] = 28;
        check_fails(slam_score_units(m, u, SEQUENCES, 3, 256, 0, scores, &report, NULL, NULL), "unit 28, expected below 28");
        u[2].unit[0] = 0;
        check_fails(slam_score_units(m, u, SEQUENCES, 0, 256, 0, scores, &report, NULL, NULL), "expected at least");
        const float nan = NAN;
        ops->upload(ops, m->weights, &nan, sizeof nan);
        check_fails(slam_score_units(m, u, SEQUENCES, 3, 256, 0, scores, &report, NULL, NULL), "not finite");
    }
    free_sequences(u);
    slam_model_free(m);
}

/* ---- test sets ---- */

/* Scores of a submission's lines, in the order of the set's items. */
static double *scores_of(const slam_testset *s, const char *path) {
    const slam_list *items = slam_testset_items(s);
    double *scores = (double *)malloc(items->n * sizeof *scores), score;
    char name[64];
    size_t found = 0;
    FILE *f = fopen(path, "r");
    while (f && fscanf(f, "%63s %lf", name, &score) == 2)
        for (size_t i = 0; i < items->n; i++)
            if (!strcmp(items->at[i], name)) {
                scores[i] = score;
                found++;
            }
    if (f) fclose(f);
    CHECK(found == items->n, "%zu scores of %zu", found, items->n);
    return scores;
}

static const slam_accuracy *accuracy_named(const slam_accuracy *a, size_t n, const char *group, const char *name) {
    for (size_t i = 0; i < n; i++)
        if (!strcmp(a[i].group, group) && !strcmp(a[i].name, name)) return &a[i];
    return NULL;
}

static void check_official(const char *set, const slam_accuracy *a, size_t n) {
    char line[4000], of[20], group[20], name[20];
    int lines = 0;
    FILE *f = fopen(FIXTURES "expected.txt", "r");
    while (f && fgets(line, sizeof line, f)) {
        int count;
        double mean, deviation;
        if (sscanf(line, "%19s %19s %19s %d %lf %lf", of, group, name, &count, &mean, &deviation) != 6 || strcmp(of, set) ||
            !strcmp(group, "pairs"))
            continue;
        const slam_accuracy *ours = strcmp(group, "all") ? accuracy_named(a, n, group, name) : a;
        if (!CHECK(ours, "no figure %s %s", group, name)) continue;
        CHECK((int)ours->n == count, "%s %s: %zu pairs, expected %d", group, name, ours->n, count);
        check_near(name, ours->mean, mean, 5.1e-5); // 4 decimals
        check_near(name, ours->deviation, deviation, 5.1e-5);
        lines++;
    }
    if (f) fclose(f);
    CHECK(lines == (int)n, "%d figures of %zu", lines, n);
}

static int compare_doubles(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* The official score of each pair, sorted. */
static void check_official_pairs(const char *set, const slam_testset *s) {
    char line[4000], start[40];
    double pairs[200];
    for (size_t i = 0; i < s->cells; i++) pairs[i] = s->cell[i].sum / (double)s->cell[i].n;
    qsort(pairs, s->cells, sizeof *pairs, compare_doubles);
    snprintf(start, sizeof start, "%s pairs - ", set);
    FILE *f = fopen(FIXTURES "expected.txt", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, start, strlen(start))) continue;
        char *at = line + strlen(start);
        for (size_t i = 0; i < s->cells; i++) check_near("a pair", pairs[i], strtod(at, &at), 5.1e-5);
    }
    if (f) fclose(f);
}

static void test_official(void) {
    const char *const sets[] = {"lexical", "syntactic"};
    for (int k = 0; k < 2; k++) {
        char gold[100], text[100];
        size_t n;
        if (!TEST("test sets: the official scorer's figures, %s", sets[k])) continue;
        snprintf(gold, sizeof gold, FIXTURES "%s.csv", sets[k]);
        snprintf(text, sizeof text, FIXTURES "%s.txt", sets[k]);
        slam_testset *s = slam_testset_gold(k ? SLAM_SBLIMP : SLAM_SWUGGY, gold);
        if (!CHECK(s, "%s", slam_error())) continue;
        double *scores = scores_of(s, text);
        const slam_accuracy *a = slam_testset_accuracies(s, scores, &n);
        if (CHECK(a, "%s", slam_error())) {
            check_official(sets[k], a, n);
            check_official_pairs(sets[k], s);
        }
        /* what is written is read as the same scores */
        CHECK(slam_testset_submission(s, scores, check_path("again.txt")), "%s", slam_error());
        double *again = scores_of(s, check_path("again.txt"));
        for (size_t i = 0; i < slam_testset_items(s)->n; i++) check_near("a score as written", again[i], scores[i], 1e-8);
        for (size_t i = 0; i < slam_testset_items(s)->n; i++) again[i] = -1.5 + 1e-12 * (double)i; // nine digits tie
        a = slam_testset_accuracies(s, again, &n);
        CHECK(a && a->mean == 0.5 && a->deviation == 0, "a model to which all is the same has %g +- %g", a->mean, a->deviation);
        free(scores);
        free(again);
        slam_testset_free(s);
    }
}

static slam_testset *gold(int kind, const char *text) {
    return slam_testset_gold(kind, check_file("gold.csv", text, strlen(text)));
}

static void test_gold(void) {
    const char *const lexical[][2] = {
        {"", "has no rows"},
        {"id,filename,voice,correct\n", "has no rows"},
        {"id,filename,voice\n1,a,A\n", "has no column 'correct'"},
        {"id,filename,voice,correct\n1,a,A,1\n1,b,A,0\n2,c,A,1\n", "gold.csv:4: id '2' and voice 'A' have 1 words and 0 non-words"},
        {"id,filename,voice,correct\n1,a,A,1\n1,b,A,1\n", "have 2 words and 0"},
        {"id,filename,voice,correct\n1,a,A,1\n1,b,A,0\n1,c,A,0\n", "have 1 words and 2 non-words"},
        {"id,filename,voice,correct\n1,a,A,1\n1,b,B,0\n", "expected one of each"},
        {"id,filename,voice,correct\n1,a,A,1\n1,a,A,0\n", "the filename 'a' stands in two rows"},
        {"id,filename,voice,correct\n1,a,A,yes\n1,b,A,0\n", "gold.csv:2: 'correct' is 'yes'"},
        {"id,filename,voice,correct\n1,,A,1\n1,b,A,0\n", "'filename' is empty"},
        {"id,filename,voice,correct\n,a,A,1\n,b,A,0\n", "gold.csv:2: 'id' is empty"},
        {"id,filename,voice,correct,frequency\n1,a,A,1,often\n1,b,A,0,\n", "'frequency' is 'often'"},
        {"id,filename,voice,correct\n1,a,A\n", "gold.csv:2: 3 fields, expected 4"},
        {"id,filename,voice,correct\n1,\"a,A,1\n", "gold.csv:2: a quote"},
        {"id,filename,voice,correct\n1,\"a\"b,A,1\n", "after a closing quote"},
    };
    const char *const syntactic[][2] = {
        {"id,filename,voice,correct\n1,a,A,1\n", "has no column 'type'"},
        {"id,filename,voice,type,subtype,correct\n1,a,A,x,y,1\n1,b,B,x,y,0\n",
         "gold.csv:2: pairs with line 3, by their order, but"},
        {"id,filename,voice,type,subtype,correct\n1,a,A,x,y,1\n1,b,A,x,y,0\n1,c,A,x,y,1\n",
         "'c' is right, and there is no wrong row"},
        {"id,filename,voice,type,subtype,correct\n1,a,A,x,y,1\n1,b,A,x,y,0\n1,c,A,x,y,0\n",
         "'c' is wrong, and there is no right row"},
        {"id,filename,voice,type,subtype,correct\n1,a,A,x,,1\n1,b,A,x,,0\n", "gold.csv:2: 'subtype' is empty"},
    };
    if (TEST("gold.csv: what is refused")) {
        for (size_t i = 0; i < sizeof lexical / sizeof *lexical; i++) check_fails(gold(SLAM_SWUGGY, lexical[i][0]), lexical[i][1]);
        for (size_t i = 0; i < sizeof syntactic / sizeof *syntactic; i++)
            check_fails(gold(SLAM_SBLIMP, syntactic[i][0]), syntactic[i][1]);
        check_fails(gold(SLAM_SALMON, "a\n"), "for sWUGGY and sBLIMP");
        check_fails(slam_testset_gold(SLAM_SWUGGY, check_path("none.csv")), "none.csv");
    }
    if (TEST("gold.csv: quotes, line ends, empty fields, one pair")) {
        size_t n;
        const double scores[] = {2, 1};
        slam_testset *s = gold(SLAM_SWUGGY, "\xef\xbb\xbfid,word,\"filename\",voice,correct,frequency\r\n"
                                            "1,\"a \"\"b\"\"\nc, d\",\"x,1\",A,1,\r\n\r\n1,,y,A,0,7");
        if (CHECK(s, "%s", slam_error())) {
            CHECK(!strcmp(slam_testset_items(s)->at[0], "x,1") && slam_testset_items(s)->n == 2, "'%s'",
                  slam_testset_items(s)->at[0]);
            CHECK(!strcmp(csv_at(&s->gold, 0, 1), "a \"b\"\nc, d") && csv_line(&s->gold, 1) == 5, "'%s', line %zu",
                  csv_at(&s->gold, 0, 1), csv_line(&s->gold, 1));
            const slam_accuracy *a = slam_testset_accuracies(s, scores, &n);
            CHECK(a && n == 1 && a->n == 1 && a->mean == 1 && isnan(a->deviation), "%zu figures", n);
        }
        slam_testset_free(s);
    }
}

static void test_written(void) {
    const double scores[] = {-1.5, -1.5, -0.25, -3};
    size_t n;
    if (TEST("figures as JSON: hostile names, pairs, scores; a single pair has no deviation")) {
        slam_testset *s =
            gold(SLAM_SBLIMP, "id,filename,voice,type,subtype,correct\n1,\"a\"\"\nb\",A,\"x\\ \xff\",y,1\n1,c,A,\"x\\ \xff\",y,0\n"
                              "2,d,A,z,y,1\n2,e,A,z,y,0\n");
        if (!CHECK(s && slam_testset_accuracies(s, scores, &n), "%s", slam_error())) return;
        CHECK(slam_testset_write(s, "sblimp", 1, scores, check_path("figures.json")), "%s", slam_error());
        json *root = json_read(check_path("figures.json"));
        if (CHECK(root, "%s", slam_error())) {
            const json *types = json_get(root, "by_type"), *pairs = json_get(root, "pairs"), *items = json_get(root, "scores");
            CHECK(json_get(root, "n")->number == 2 && json_get(root, "accuracy")->number == 0.75 &&
                      !strcmp(json_text(root, "of", ""), "sum"),
                  "of all");
            check_near("upper end", json_get(root, "high")->number, 0.75 + 1.96 * sqrt(0.125) / sqrt(2), 1e-12);
            CHECK(types && types->n == 2 && json_get(types->first, "std")->type == JSON_NULL &&
                      !strcmp(json_text(types->first, "type", ""), "x\\ \xef\xbf\xbd"),
                  "by type");
            CHECK(pairs && pairs->n == 2 && !strcmp(json_text(pairs->first, "right", ""), "a\"\nb") &&
                      json_get(pairs->first, "score")->number == 0.5,
                  "pairs");
            CHECK(items && items->n == 4 && json_get(items->first, "score")->number == -1.5, "scores");
        }
        json_free(root);
        check_fails(slam_testset_submission(s, scores, check_path("blanks.txt")), "cannot stand in a line");
        slam_testset_free(s);
    }
    if (TEST("gold.csv: of the other set")) {
        check_fails(gold(SLAM_SWUGGY, "id,filename,voice,type,subtype,correct\n1,a,A,x,y,1\n1,b,A,x,y,0\n"), "as sBLIMP's has");
        check_fails(gold(SLAM_SBLIMP, "id,filename,voice,frequency,length,correct\n1,a,A,3,4,1\n1,b,A,3,4,0\n"),
                    "no column 'type'");
    }
}

static void test_gold_words(void) {
    size_t n;
    const double scores[] = {1, 2, 1, 2};
    if (TEST("gold.csv: a word is what its first right row says")) {
        slam_testset *s = gold(SLAM_SWUGGY, "id,filename,voice,correct,frequency,length\n"
                                            "7,a,A,0,900,2\n7,b,B,1,3,5\n7,c,A,1,400,4\n7,d,B,0,,\n");
        const slam_accuracy *a = s ? slam_testset_accuracies(s, scores, &n) : NULL;
        if (CHECK(a, "%s", slam_error())) {
            const slam_accuracy *band = accuracy_named(a, n, "frequency", "1-5"), *length = accuracy_named(a, n, "length", "5");
            CHECK(band && band->n == 1 && length && length->n == 1 && a->n == 1, "no pair in the band 1-5 of length 5");
            check_near("over voices", a->mean, 0.5, 0); // A: 1 of c, 1 of a: a tie; B: a tie
        }
        slam_testset_free(s);
    }
    if (TEST("submission: a name with a blank")) {
        slam_testset *s = gold(SLAM_SWUGGY, "id,filename,voice,correct\n7,a b,A,0\n7,c,A,1\n");
        check_fails(slam_testset_submission(s, scores, check_path("blank.txt")), "the name 'a b' cannot stand in a line");
        slam_testset_free(s);
    }
}

/* A set of the files whose names `text` holds, with blanks between them. */
static slam_testset *files_of(int kind, const char *text) {
    slam_list list = SLAM_ZERO;
    char *copy = text_copy(text);
    for (char *name = strtok(copy, " "); name; name = strtok(NULL, " ")) slam_list_add(&list, name);
    slam_testset *s = slam_testset_files(kind, &list);
    slam_list_free(&list);
    free(copy);
    return s;
}

static void test_files(void) {
    size_t n;
    if (TEST("folders of pairs: by number, the right one first; parts")) {
        const double scores[] = {1, 5, 3, 2, 7, 7, 9, 8};
        slam_testset *s =
            files_of(SLAM_STORYCLOZE, "b/10_x.wav a/2_r.wav a/3_w.wav b/9_y.wav d/10_0.wav d/10_1.wav c/0_r.wav c/1_w.wav");
        if (CHECK(s, "%s", slam_error())) {
            const slam_accuracy *a = slam_testset_accuracies(s, scores, &n);
            /* a: 2_r 5 over 3_w 3; d: 10_0 7 ties with 10_1 7; b: 9_y 2 over 10_x 1; c: 9 over 8 */
            CHECK(a && a->n == 4 && a->mean == 3.5 / 4, "%zu pairs, %g", a->n, a->mean);
        }
        slam_testset_free(s);
        s = files_of(SLAM_SBLIMP, "1+x_2.wav 0+x_2.wav");
        CHECK(s && s->pair[0].right == 1, "%s", slam_error());
        slam_testset_free(s);
        s = files_of(SLAM_SALMON, "p/sample_0_1.wav p/sample_0_0.wav q/sample_7_0.wav q/sample_7_1.wav");
        if (CHECK(s, "%s", slam_error())) {
            const slam_accuracy *a = slam_testset_accuracies(s, scores, &n);
            const slam_accuracy *p = accuracy_named(a, n, "part", "p"), *q = accuracy_named(a, n, "part", "q");
            CHECK(n == 3 && p && q && p->mean == 1 && q->mean == 1, "%zu figures", n);
        }
        slam_testset_free(s);
    }
    if (TEST("folders of pairs: what is refused")) {
        check_fails(files_of(SLAM_STORYCLOZE, ""), "no file");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav"), "has no partner");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav 1_b.wav 3_c.wav 4_d.wav 5_e.wav 6_f.wav 8_g.wav 9_h.wav 10_i.wav"),
                    "no partner");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav 2_b.wav"), "has no partner: it would be paired with 2_b.wav");
        check_fails(files_of(SLAM_STORYCLOZE, "a/0_a.wav b/1_b.wav"), "a/0_a.wav: has no partner");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav 0_a.wav"), "stands there twice");
        check_fails(
            files_of(SLAM_STORYCLOZE, "0_a.wav 0_b.wav 1_b.wav 2_a.wav 2_b.wav 3_a.wav 3_b.wav 4_b.wav"), // 1_a and 4_a lack
            "1_b.wav: has no partner: it would be paired with 2_a.wav");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav 0_b.wav 1_a.wav 2_b.wav"), "1_a.wav: has no partner");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav 0_b.wav 0_c.wav 0_d.wav"),
                    "0_c.wav: its number is that of 0_a.wav and 0_b.wav");
        check_fails(files_of(SLAM_STORYCLOZE, "0_a.wav 0_a.flac 1_b.wav 1_b.flac"), "0_a.flac and 0_a.wav are of one name");
        check_fails(files_of(SLAM_STORYCLOZE, "x_a.wav 0_a.wav"), "expected a name NUMBER_");
        check_fails(files_of(SLAM_SBLIMP, "0_a.wav 1_a.wav"), "expected a name NUMBER+");
        check_fails(files_of(SLAM_SALMON, "p/sample_0_0.wav p/sample_1_1.wav"), "has no partner");
        check_fails(files_of(SLAM_SALMON, "p/sample_0_0.wav p/sample_0_2.wav"), "sample_NUMBER_0");
    }
}

static void test_units(void) {
    slam_units u[2];
    slam_testset *s = files_of(SLAM_STORYCLOZE, "audio/1_b.flac audio/0_a.wav");
    const char *const lines[][2] = {
        {"", "holds no line"},
        {"{\"units\": [1], \"file_name\": \"x/0_a.wav\"}\n", "has no line of '1_b'"},
        {"{\"units\": [1], \"file_name\": \"0_a.wav\"}\n{\"units\": [2], \"file_name\": \"y/0_a\"}\n{\"units\": [2], \"file_name\": \"1_b\"}\n",
         "two lines are of '0_a'"},
        {"{\"units\": [1], \"file_name\": \"0_a.wav\"}\n{\"units\": [9], \"file_name\": \"1_b\"}\n",
         "u.jsonl:2: unit 1 is 9, expected below 9"},
        {"{\"units\": [1]}\n", "line 1 has no file_name"},
        {"{\"units\": [1], \"file_name\": \"0_a.wav\"}\n{\"units\"\n", "u.jsonl:2"},
    };
    if (TEST("units of a set: found by name, and what is refused")) {
        const char good[] =
            "{\"units\": [5, 6], \"file_name\": \"0_a.wav\"}\n{\"audio_repr\": \"<Un8>\", \"file_name\": \"z/1_b.wav\"}\n"
            "{\"units\": [1], \"file_name\": \"another\"}\n";
        if (CHECK(slam_testset_units(s, check_file("u.jsonl", good, strlen(good)), 9, u), "%s", slam_error())) {
            CHECK(u[0].n == 1 && u[0].unit[0] == 8 && u[1].n == 2 && u[1].unit[1] == 6, "%zu and %zu units", u[0].n, u[1].n);
            slam_units_free(&u[0]);
            slam_units_free(&u[1]);
        }
        for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
            check_fails(slam_testset_units(s, check_file("u.jsonl", lines[i][0], strlen(lines[i][0])), 9, u), lines[i][1]);
    }
    slam_testset_free(s);
    if (TEST("units of a set: folders count where names repeat")) {
        const char lines[] =
            "{\"units\": [0], \"file_name\": \"/x/p/sample_0_1.wav\"}\n{\"units\": [1], \"file_name\": \"q/sample_0_0\"}\n"
            "{\"units\": [2], \"file_name\": \"p/sample_0_0.wav\"}\n{\"units\": [3], \"file_name\": \"q/sample_0_1.wav\"}\n",
                   bare[] =
                       "{\"units\": [0], \"file_name\": \"sample_0_0.wav\"}\n{\"units\": [1], \"file_name\": \"sample_0_1.wav\"}\n";
        slam_units u[4];
        s = files_of(SLAM_SALMON, "/y/p/sample_0_0.wav /y/p/sample_0_1.wav /y/q/sample_0_0.wav /y/q/sample_0_1.wav");
        if (CHECK(s && slam_testset_units(s, check_file("u.jsonl", lines, strlen(lines)), 9, u), "%s", slam_error()))
            for (int i = 0; i < 4; i++) {
                CHECK(u[i].n == 1 && u[i].unit[0] == (i == 0   ? 2
                                                      : i == 1 ? 0
                                                      : i == 2 ? 1
                                                               : 3),
                      "item %d: unit %d", i, u[i].unit[0]);
                slam_units_free(&u[i]);
            }
        check_fails(slam_testset_units(s, check_file("u.jsonl", bare, strlen(bare)), 9, u), "has no line of 'p/sample_0_0'");
        slam_testset_free(s);
        s = files_of(SLAM_SALMON, "y/p/sample_0_0.wav y/p/sample_0_1.wav z/p/sample_0_0.wav z/p/sample_0_1.wav");
        check_fails(slam_testset_units(s, check_file("u.jsonl", lines, strlen(lines)), 9, u),
                    "two items are called 'p/sample_0_0'");
        slam_testset_free(s);
    }
}

static void test_open(void) {
    const char table[] = "id,filename,voice,correct\n1,a,A,1\n1,b,A,0\n",
               pairs[] = "{\"units\": [1], \"file_name\": \"0_r\"}\n{\"units\": [2], \"file_name\": \"0_w\"}\n";
    char *root = text_copy(check_path("zerospeech")), *units = NULL;
    make_folders(check_path("zerospeech/lexical/test"));
    make_folders(check_path("storycloze"));
    check_file("zerospeech/lexical/test/gold.csv", table, strlen(table));
    if (TEST("sets: where they are looked for")) {
        slam_list paths = SLAM_ZERO;
        slam_testset *s = slam_testset_open(SLAM_SWUGGY, root, "test", 0, &units);
        CHECK(s && !units, "%s", slam_error());
        check_fails(slam_testset_audio(s, &paths), "gold.csv: 'a' is neither beside it");
        check_file("zerospeech/lexical/test/a", "", 0);
        check_file("zerospeech/lexical/test/b.wav", "", 0);
        CHECK(slam_testset_audio(s, &paths) && paths.n == 2 && path_ends(paths.at[1], "test/b.wav"), "%s", slam_error());
        slam_list_free(&paths);
        slam_testset_free(s);
        check_fails(slam_testset_open(SLAM_SWUGGY, root, "dev", 0, &units), "there is no split dev");
        check_fails(slam_testset_open(SLAM_SWUGGY, check_path("zerospeech/lexical/test"), "dev", 0, &units),
                    "a split dev is asked for");
        check_fails(slam_testset_open(SLAM_SWUGGY, root, NULL, 0, &units), "expected a name NUMBER_"); // a folder of files, then
        check_file("zerospeech/lexical/test/units.jsonl", pairs, strlen(pairs));
        s = slam_testset_open(SLAM_SWUGGY, root, "test", 1, &units);
        CHECK(s && !units, "units though audio was asked for");
        slam_testset_free(s);
        s = slam_testset_open(SLAM_SWUGGY, root, "test", 0, &units);
        CHECK(s && units && path_ends(units, "lexical/test/units.jsonl"), "units '%s'", units ? units : "");
        slam_testset_free(s);
        free(units);
        units = NULL;
        check_fails(slam_testset_open(SLAM_STORYCLOZE, check_path("storycloze"), NULL, 0, &units), "has the name of audio");
        check_fails(slam_testset_open(SLAM_STORYCLOZE, check_path("nowhere"), NULL, 0, &units), "nowhere: there is no such folder");
        check_fails(slam_testset_open(SLAM_STORYCLOZE, NULL, NULL, 0, &units), "expected a folder of audio files, or units");
        units = text_copy(check_file("storycloze/other.jsonl", pairs, strlen(pairs)));
        s = slam_testset_open(SLAM_STORYCLOZE, NULL, NULL, 0, &units);
        slam_units u[2];
        if (CHECK(s && slam_testset_items(s)->n == 2 && slam_testset_units(s, units, 9, u), "%s", slam_error())) {
            CHECK(u[1].unit[0] == 2, "units of another line");
            slam_units_free(&u[0]);
            slam_units_free(&u[1]);
        }
        slam_testset_free(s);
    }
    free(units);
    free(root);
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    test_sequences(ops);
    test_official();
    test_gold();
    test_written();
    test_gold_words();
    test_files();
    test_units();
    test_open();
    slam_ops_free(ops);
    return check_end();
}
