/* Test sets against the official scorer's numbers (test/fixtures/scoring, made by test/reference_scoring.py), n-grams against counting
   by hand, and errors. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FIXTURES "test/fixtures/scoring/"

/* ---- test sets ---- */

/* Scores of a submission's lines, in the order of the set's items. */
static double *scores_of(const slam_testset *s, const char *path) {
    double *scores = NEW(double, s->items.n), score;
    char name[64];
    size_t found = 0;
    FILE *f = fopen(path, "r");
    while (f && fscanf(f, "%63s %lf", name, &score) == 2)
        for (size_t i = 0; i < s->items.n; i++)
            if (!strcmp(s->items.at[i], name)) {
                scores[i] = score;
                found++;
            }
    if (f) fclose(f);
    CHECK(found == s->items.n, "%zu scores of %zu", found, s->items.n);
    return scores;
}

static const slam_accuracy *accuracy_named(const slam_testset *s, const char *group, const char *name) {
    for (size_t i = 0; i < s->n_accuracies; i++)
        if (!strcmp(s->accuracies[i].group, group) && !strcmp(s->accuracies[i].name, name)) return &s->accuracies[i];
    return NULL;
}

static void check_official(const char *set, const slam_testset *s) {
    char line[4000], of[20], group[20], name[20];
    size_t lines = 0;
    FILE *f = fopen(FIXTURES "expected.txt", "r");
    while (f && fgets(line, sizeof line, f)) {
        int count;
        double mean, deviation;
        if (sscanf(line, "%19s %19s %19s %d %lf %lf", of, group, name, &count, &mean, &deviation) != 6 ||
            strcmp(of, set) || !strcmp(group, "pairs"))
            continue;
        const slam_accuracy *ours = strcmp(group, "all") ? accuracy_named(s, group, name) : s->accuracies;
        if (!CHECK(ours, "no accuracy %s %s", group, name)) continue;
        CHECK((int)ours->n == count, "%s %s: %zu pairs, expected %d", group, name, ours->n, count);
        check_near(name, ours->mean, mean, 5.1e-5); // 4 decimals
        check_near(name, ours->deviation, deviation, 5.1e-5);
        lines++;
    }
    if (f) fclose(f);
    CHECK(lines == s->n_accuracies, "%zu accuracies of %zu", lines, s->n_accuracies);
}

static int compare_doubles(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* The official score of each pair, sorted. */
static void check_official_pairs(const char *set, const slam_testset *s) {
    char line[4000], start[40];
    double pairs[200] = {0}, voices[200] = {0};
    for (size_t i = 0; i < s->n_pairs; i++) {
        pairs[s->pairs[i].cell] += s->pairs[i].score;
        voices[s->pairs[i].cell]++;
    }
    for (size_t i = 0; i < s->n_cells; i++) pairs[i] /= voices[i];
    qsort(pairs, s->n_cells, sizeof *pairs, compare_doubles);
    snprintf(start, sizeof start, "%s pairs - ", set);
    FILE *f = fopen(FIXTURES "expected.txt", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, start, strlen(start))) continue;
        char *at = line + strlen(start);
        for (size_t i = 0; i < s->n_cells; i++) check_near("a pair", pairs[i], strtod(at, &at), 5.1e-5);
    }
    if (f) fclose(f);
}

static void test_official(void) {
    const char *const sets[] = {"lexical", "syntactic"}, *const gold[] = {FIXTURES "lexical.csv",
                                                                          FIXTURES "syntactic.csv"};
    const char *const text[] = {FIXTURES "lexical.txt", FIXTURES "syntactic.txt"};
    for (int k = 0; k < 2; k++) {
        if (!TEST("test sets: the official scorer's numbers, %s", sets[k])) continue;
        slam_testset *s = slam_testset_open(k ? SLAM_SBLIMP : SLAM_SWUGGY, gold[k], NULL, 0, NULL);
        if (!CHECK(s, "%s", slam_error())) continue;
        double *scores = scores_of(s, text[k]);
        slam_testset_score(s, scores);
        check_official(sets[k], s);
        check_official_pairs(sets[k], s);
        /* what is written reads back as the same scores */
        CHECK(slam_testset_submission(s, check_path("again.txt")), "%s", slam_error());
        double *again = scores_of(s, check_path("again.txt"));
        for (size_t i = 0; i < s->items.n; i++) check_near("a score as written", again[i], scores[i], 1e-8);
        for (size_t i = 0; i < s->items.n; i++) again[i] = -1.5 + 1e-12 * (double)i; // equal in nine digits
        slam_testset_score(s, again);
        CHECK(s->accuracies->mean == 0.5 && s->accuracies->deviation == 0, "equal scores give %g +- %g",
              s->accuracies->mean, s->accuracies->deviation);
        free(scores);
        free(again);
        slam_testset_free(s);
    }
}

static slam_testset *open_gold(int kind, const char *text) {
    return slam_testset_open(kind, check_file("gold.csv", text, strlen(text)), NULL, 1, NULL);
}

static void test_gold(void) {
    static const char lexical[] = "id,filename,voice,correct", syntactic[] = "id,filename,voice,type,subtype,correct";
    static const struct {
        int kind;
        const char *columns, *rows, *error;
    } wrong[] = {
        {SLAM_SWUGGY, "", "", "found 0 rows"},
        {SLAM_SWUGGY, lexical, "", "found 1 rows"},
        {SLAM_SWUGGY, "id,filename,voice", "1,a,A\n", "has no column 'correct'"},
        {SLAM_SWUGGY, lexical, "1,a,A,1\n1,b,A,0\n2,c,A,1\n",
         "gold.csv: 'c' has no partner: in sorted order, 'nothing' follows"},
        {SLAM_SWUGGY, lexical, "1,a,A,1\n1,b,A,1\n", "'a' has no partner: in sorted order, 'b' follows"},
        {SLAM_SWUGGY, lexical, "1,a,A,1\n1,b,A,0\n1,c,A,0\n", "'c' has no partner"},
        {SLAM_SWUGGY, lexical, "1,a,A,1\n1,b,A,0\n1,c,A,1\n1,d,A,0\n",
         "'a' has no partner: in sorted order, 'c' follows"},
        {SLAM_SWUGGY, lexical, "1,a,A,1\n1,b,B,0\n", "'a' has no partner: in sorted order, 'b' follows"},
        {SLAM_SWUGGY, lexical, "1,a,A,1\n1,a,A,0\n", "gold.csv: two sequences have the name 'a'"},
        {SLAM_SWUGGY, lexical, "1,a,A,yes\n1,b,A,0\n", "gold.csv:2: 'correct' is 'yes'"},
        {SLAM_SWUGGY, lexical, "1,,A,1\n1,b,A,0\n", "'filename' is ''"},
        {SLAM_SWUGGY, lexical, ",a,A,1\n,b,A,0\n", "gold.csv:2: 'id' is ''"},
        {SLAM_SWUGGY, "id,filename,voice,correct,frequency", "1,a,A,1,often\n1,b,A,0,\n", "'frequency' is 'often'"},
        {SLAM_SWUGGY, "id,filename,voice,correct,length", "1,a,A,1,2.5\n1,b,A,0,\n", "'length' is '2.5'"},
        {SLAM_SWUGGY, lexical, "1,a,A\n", "gold.csv:2: found 3 fields, expected 4"},
        {SLAM_SWUGGY, lexical, "1,\"a,A,1\n", "gold.csv:2: found no end of a field in quotes"},
        {SLAM_SWUGGY, lexical, "1,\"a\"b,A,1\n", "after a closing quote"},
        {SLAM_SBLIMP, lexical, "1,a,A,1\n", "has no column 'type'"},
        {SLAM_SBLIMP, "id,filename,voice,frequency,length,correct", "1,a,A,3,4,1\n1,b,A,3,4,0\n", "no column 'type'"},
        {SLAM_SWUGGY, syntactic, "1,a,A,x,y,1\n1,b,A,x,y,0\n", "has sBLIMP's columns"},
        {SLAM_SBLIMP, syntactic, "1,a,A,x,y,1\n1,b,B,x,y,0\n",
         "gold.csv: 'a' has no partner: in sorted order, 'b' follows"},
        {SLAM_SBLIMP, syntactic, "1,a,A,x,y,1\n2,b,A,x,y,1\n2,c,A,x,y,0\n1,d,A,x,y,0\n", // an order that differs
         "gold.csv: 'a' has no partner: in sorted order, 'd' follows"},
        {SLAM_SBLIMP, syntactic, "1,a,A,x,y,1\n1,b,A,x,y,0\n1,c,A,x,y,1\n", "'c' has no partner"},
        {SLAM_SBLIMP, syntactic, "1,a,A,x,y,1\n1,b,A,x,y,0\n1,c,A,x,y,0\n", "'c' has no partner"},
        {SLAM_SBLIMP, syntactic, "1,a,A,x,,1\n1,b,A,x,,0\n", "gold.csv:2: 'subtype' is ''"},
        {SLAM_SALMON, "a", "", "gold.csv: expected a folder of audio files"},
    };
    if (TEST("gold.csv: errors"))
        for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
            char *text = string_print("%s\n%s", wrong[i].columns, wrong[i].rows);
            check_fails(open_gold(wrong[i].kind, *wrong[i].columns ? text : ""), wrong[i].error);
            free(text);
        }
    if (TEST("gold.csv: quotes, line ends, empty fields, one pair")) {
        const double scores[] = {2, 1};
        slam_testset *s = open_gold(SLAM_SWUGGY, "\xef\xbb\xbfid,word,\"filename\",voice,correct,frequency\r\n"
                                                 "1,\"a \"\"b\"\"\nc, d\",\"x,1\",A,1,\r\n\r\n1,,y,A,0,7");
        csv table;
        CHECK(csv_read(&table, check_path("gold.csv")) && !strcmp(table.cells[7], "a \"b\"\nc, d") &&
                  table.lines[2] == 5,
              "%s", slam_error());
        csv_free(&table);
        if (CHECK(s, "%s", slam_error())) {
            CHECK(!strcmp(s->items.at[0], "x,1") && s->items.n == 2, "'%s'", s->items.at[0]);
            slam_testset_score(s, scores);
            const slam_accuracy *a = s->accuracies;
            CHECK(s->n_accuracies == 1 && a->n == 1 && a->mean == 1 && isnan(a->deviation), "%zu accuracies",
                  s->n_accuracies);
        }
        slam_testset_free(s);
    }
}

static void test_written(void) {
    const double scores[] = {-1.5, -1.5, -0.25, -3};
    if (!TEST("results as JSON: hostile names, pairs, scores; a single pair has no deviation")) return;
    slam_testset *s =
        open_gold(SLAM_SBLIMP, "id,filename,voice,type,subtype,correct\n1,\"a\"\"\nb\",A,\"x\\ \xff\",y,1\n"
                               "1,c,A,\"x\\ \xff\",y,0\n2,d,A,z,y,1\n2,e,A,z,y,0\n");
    if (!CHECK(s, "%s", slam_error())) return;
    slam_testset_score(s, scores);
    CHECK(slam_testset_write(s, "sblimp", 1, check_path("results.json")), "%s", slam_error());
    json *root = json_load(check_path("results.json"));
    if (CHECK(root, "%s", slam_error())) {
        const json *types = json_get(root, "by_type"), *pairs = json_get(root, "pairs"),
                   *items = json_get(root, "scores");
        CHECK(json_get(root, "n")->number == 2 && json_get(root, "accuracy")->number == 0.75 &&
                  !strcmp(json_string(root, "of", ""), "sum"),
              "of all");
        check_near("upper end", json_get(root, "high")->number, 0.75 + 1.96 * sqrt(0.125) / sqrt(2), 1e-12);
        CHECK(types && types->n == 2 && !json_get(types->first, "std") && !json_get(types->first, "low") &&
                  !strcmp(json_string(types->first, "type", ""), "x\\ \xff"),
              "by type");
        CHECK(pairs && pairs->n == 2 && !strcmp(json_string(pairs->first, "right", ""), "a\"\nb") &&
                  json_get(pairs->first, "score")->number == 0.5,
              "pairs");
        CHECK(items && items->n == 4 && json_get(items->first, "score")->number == -1.5, "scores");
    }
    json_free(root);
    check_fails(slam_testset_submission(s, check_path("blanks.txt")), "has spaces or quotes");
    check_fails(slam_testset_write(s, "sblimp", 1, check_path("no/such/results.json")), "cannot be written");
    slam_testset_free(s);
}

static void test_metrics_written(void) {
    static const char expected[] =
        "{\"task\": \"ppl\", \"n\": 19, \"nll\": 0.1, \"perplexity\": null, \"x\": null, \"y\": null}\n";
    const slam_metric metrics[] = {{"n", 19}, {"nll", 0.1}, {"perplexity", exp(800)}, {"x", NAN}, {"y", -INFINITY}};
    file_map map = ZERO;
    if (!TEST("metrics as JSON: neither inf nor nan")) return;
    CHECK(slam_metrics_write("ppl", metrics, 5, check_path("metrics.json")), "%s", slam_error());
    CHECK(file_map_open(&map, check_path("metrics.json")) && map.size == sizeof expected - 1 &&
              !memcmp(map.data, expected, map.size),
          "%.*s", (int)map.size, (const char *)map.data);
    file_map_close(&map);
    check_fails(slam_metrics_write("ppl", metrics, 5, check_path("no/such.json")), "cannot be written: No such file");
}

static void test_gold_words(void) {
    const double scores[] = {1, 2, 1, 2};
    if (TEST("gold.csv: frequency and length of a word are those of its first correct row")) {
        slam_testset *s = open_gold(SLAM_SWUGGY, "id,filename,voice,correct,frequency,length\n"
                                                 "7,a,A,0,900,2\n7,b,B,1,3,5.0\n7,c,A,1,400,4\n7,d,B,0,,\n");
        if (CHECK(s, "%s", slam_error())) {
            slam_testset_score(s, scores);
            const slam_accuracy *band = accuracy_named(s, "frequency", "1-5"),
                                *length = accuracy_named(s, "length", "5");
            CHECK(band && band->n == 1 && length && length->n == 1 && s->accuracies->n == 1,
                  "no pair of 1-5 and length 5");
            check_near("over voices", s->accuracies->mean, 0.5, 0); // A: 1 of c, 1 of a: a tie; B: a tie
            const slam_accuracy *empty = accuracy_named(s, "frequency", "oov");
            CHECK(empty && empty->n == 0 && isnan(empty->mean), "bands without pairs are listed");
        }
        slam_testset_free(s);
    }
    if (TEST("submission: a name with a space")) {
        slam_testset *s = open_gold(SLAM_SWUGGY, "id,filename,voice,correct\n7,a b,A,0\n7,c,A,1\n");
        if (CHECK(s, "%s", slam_error())) slam_testset_score(s, scores);
        check_fails(slam_testset_submission(s, check_path("blank.txt")), "the name 'a b' has spaces");
        slam_testset_free(s);
    }
    if (TEST("test sets: tens of thousands of types and lengths take no time")) {
        enum { WORDS = 40000 };
        strbuf text = ZERO;
        strbuf_add(&text, "id,filename,voice,type,subtype,correct,length\n");
        for (int i = 0; i < 2 * WORDS; i++)
            strbuf_add(&text, "%d,f%d,v,t%d,s,%d,%d\n", i / 2, i, i / 2 * 7919 % WORDS, i % 2, i);
        double *many = NEW(double, 2 * WORDS);
        for (int kind = SLAM_SWUGGY; kind <= SLAM_SBLIMP; kind++) {
            const double start = slam_clock();
            slam_testset *s = open_gold(kind, text.at);
            if (CHECK(s, "%s", slam_error())) {
                slam_testset_score(s, many);
                CHECK(s->n_accuracies == WORDS + 1 && slam_clock() - start < 10, "%zu accuracies in %.1f s",
                      s->n_accuracies, slam_clock() - start);
            }
            slam_testset_free(s);
        }
        free(many);
        strbuf_free(&text);
    }
}

/* A set of files by the names in `text`, separated by spaces, in a file of units: unit 0, 1, ... */
static slam_testset *files_of(int kind, const char *text) {
    strbuf lines = ZERO;
    char *copy = string_copy(text);
    int n = 0;
    strbuf_add(&lines, "\n");
    for (char *name = strtok(copy, " "); name; name = strtok(NULL, " "))
        strbuf_add(&lines, "{\"units\": [%d], \"file_name\": \"%s\"}\n", n++, name);
    const char *path = check_file("files.jsonl", lines.at, lines.n);
    strbuf_free(&lines);
    free(copy);
    return slam_testset_open(kind, NULL, NULL, 0, path);
}

static double accuracy_of(slam_testset *s, const double *scores, size_t n_accuracies) {
    if (!CHECK(s, "%s", slam_error())) return -1;
    slam_testset_score(s, scores);
    CHECK(s->n_accuracies == n_accuracies, "%zu accuracies", s->n_accuracies);
    return s->accuracies->mean;
}

static void test_files(void) {
    static const struct {
        int kind;
        const char *files, *error;
    } wrong[] = {
        {SLAM_STORYCLOZE, "", "is empty"},
        {SLAM_STORYCLOZE, "0_a.wav", "has no partner"},
        {SLAM_STORYCLOZE, "0_a.wav 1_b.wav 3_c.wav 4_d.wav 5_e.wav 6_f.wav 8_g.wav 9_h.wav 10_i.wav", "no partner"},
        {SLAM_STORYCLOZE, "0_a.wav 2_b.wav", "has no partner: in sorted order, '2_b.wav' follows"},
        {SLAM_STORYCLOZE, "a/0_a.wav b/1_b.wav", "'a/0_a.wav' has no partner"},
        {SLAM_STORYCLOZE, "0_a.wav 0_a.wav", "two sequences have the name '0_a.wav'"},
        {SLAM_STORYCLOZE, "0_a.wav 0_b.wav 1_b.wav 2_a.wav 2_b.wav 3_a.wav 3_b.wav 4_b.wav", // 1_a and 4_a are missing
         "'1_b.wav' has no partner: in sorted order, '2_a.wav' follows"},
        {SLAM_STORYCLOZE, "0_a.wav 0_b.wav 1_a.wav 2_b.wav", "'1_a.wav' has no partner"},
        {SLAM_STORYCLOZE, "0_a.wav 0_b.wav 0_c.wav 0_d.wav", "'0_c.wav' has no partner"},
        {SLAM_STORYCLOZE, "0_a.wav 1_b.wav 1_c.wav 2_d.wav", "'1_c.wav' has no partner"},
        {SLAM_STORYCLOZE, "0_a.wav 0_a.flac 1_b.wav 1_b.flac", "two sequences have the name '"},
        {SLAM_STORYCLOZE, "0_a.wav 1_b.wav 3_c.wav 4_d.wav", "'3_c.wav' has no partner"}, // 2 and 5 are missing
        {SLAM_STORYCLOZE, "x_a.wav 0_a.wav", "expected a name NUMBER_"},
        {SLAM_SBLIMP, "0_a.wav 1_a.wav", "expected a name NUMBER+..., or gold.csv with it"},
        {SLAM_SALMON, "p/sample_0_0.wav p/sample_1_1.wav", "has no partner"},
        {SLAM_SALMON, "p/sample_0_0.wav p/sample_0_2.wav", "sample_NUMBER_0"},
    };
    if (TEST("folders of pairs: by number, the correct one first; parts")) {
        const double scores[] = {1, 5, 3, 2, 7, 7, 9, 8};
        slam_testset *s = files_of(
            SLAM_STORYCLOZE, "b/10_x.wav a/2_r.wav a/3_w.wav b/9_y.wav d/10_0.wav d/10_1.wav c/0_r.wav c/1_w.wav");
        /* a: 2_r 5 over 3_w 3; d: 10_0 7 ties with 10_1 7; b: 9_y 2 over 10_x 1; c: 9 over 8 */
        check_near("mean", accuracy_of(s, scores, 5), 3.5 / 4, 0);
        slam_testset_free(s);
        s = files_of(SLAM_SBLIMP, "1+x_2.wav 0+x_2.wav");
        CHECK(s && s->pairs[0].correct == 1 && accuracy_of(s, scores, 1) == 1, "%s", slam_error());
        slam_testset_free(s);
        s = files_of(SLAM_SALMON, "p/sample_0_1.wav p/sample_0_0.wav q/sample_7_0.wav q/sample_7_1.wav");
        check_near("mean", accuracy_of(s, scores, 3), 1, 0);
        CHECK(s && accuracy_named(s, "part", "p") && accuracy_named(s, "part", "q"), "parts");
        slam_testset_free(s);
    }
    if (TEST("folders of pairs: errors"))
        for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
            check_fails(files_of(wrong[i].kind, wrong[i].files), wrong[i].error);
}

/* Reads units (n) from other lines than the set was made from. */
static int read_lines(slam_testset *s, const char *lines, slam_units *u, size_t n) {
    memset(u, 0, n * sizeof *u);
    if (!CHECK(s && s->items.n == n, "%s", slam_error())) return 0;
    free(s->units);
    s->units = string_copy(check_file("u.jsonl", lines, strlen(lines)));
    return slam_testset_read_units(s, 9, u);
}

static void free_units(slam_units *u, size_t n) {
    for (size_t i = 0; i < n; i++) slam_units_free(&u[i]);
}

static void test_units(void) {
    slam_units u[4];
    static const char *const wrong[][2] = {
        {"", "has no line with the name"},
        {"{\"units\": [1], \"file_name\": \"x/0_a.wav\"}\n", "has no line with the name 'audio/1_b.flac'"},
        {"{\"units\": [1], \"file_name\": \"0_a.wav\"}\n{\"units\": [2], \"file_name\": \"y/0_a\"}\n"
         "{\"units\": [2], \"file_name\": \"1_b\"}\n",
         "u.jsonl:2: an earlier line has the name 'y/0_a'"},
        {"{\"units\": [1], \"file_name\": \"0_a.wav\"}\n{\"units\": [9], \"file_name\": \"1_b\"}\n",
         "u.jsonl:2: unit 1 is 9, expected below 9"},
        {"{\"units\": [1]}\n", "has no line with the name"},
        {"{\"units\": [1], \"file_name\": \"0_a.wav\"}\n{\"units\"\n", "u.jsonl:2"},
    };
    if (TEST("units of a set: found by name; errors")) {
        slam_testset *s = files_of(SLAM_STORYCLOZE, "audio/1_b.flac audio/0_a.wav");
        CHECK(
            read_lines(
                s,
                "{\"units\": [5, 6], \"file_name\": \"0_a.wav\"}\n{\"audio_repr\": \"<Un8>\", \"file_name\": \"z/1_b.wav\"}\n"
                "{\"units\": [1], \"file_name\": \"another\"}\n",
                u, 2),
            "%s", slam_error());
        CHECK(u[0].n == 1 && u[0].unit[0] == 8 && u[1].n == 2 && u[1].unit[1] == 6, "%zu and %zu units", u[0].n,
              u[1].n);
        free_units(u, 2);
        for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
            check_fails(read_lines(s, wrong[i][0], u, 2), wrong[i][1]);
            free_units(u, 2);
        }
        slam_testset_free(s);
    }
    if (TEST("units of a set: folders count if names repeat")) {
        static const int expected[] = {2, 0, 1, 3};
        slam_testset *s =
            files_of(SLAM_SALMON, "/y/p/sample_0_0.wav /y/p/sample_0_1.wav /y/q/sample_0_0.wav /y/q/sample_0_1.wav");
        CHECK(
            read_lines(
                s,
                "{\"units\": [0], \"file_name\": \"/x/p/sample_0_1.wav\"}\n{\"units\": [1], \"file_name\": \"q/sample_0_0\"}\n"
                "{\"units\": [2], \"file_name\": \"p/sample_0_0.wav\"}\n{\"units\": [3], \"file_name\": \"q/sample_0_1.wav\"}\n",
                u, 4),
            "%s", slam_error());
        for (int i = 0; i < 4; i++) CHECK(u[i].n == 1 && u[i].unit[0] == expected[i], "item %d", i);
        free_units(u, 4);
        check_fails(
            read_lines(
                s,
                "{\"units\": [0], \"file_name\": \"sample_0_0.wav\"}\n{\"units\": [1], \"file_name\": \"sample_0_1.wav\"}\n",
                u, 4),
            "has no line with the name '/y/p/sample_0_0.wav'");
        free_units(u, 4);
        slam_testset_free(s);
        s = files_of(SLAM_SALMON, "y/p/sample_0_0.wav y/p/sample_0_1.wav z/p/sample_0_0.wav z/p/sample_0_1.wav");
        memset(u, 0, sizeof u);
        CHECK(s && slam_testset_read_units(s, 9, u) && u[3].unit[0] == 3, "folders of folders: %s", slam_error());
        free_units(u, 4);
        slam_testset_free(s);
    }
}

static void test_open(void) {
    static const char table[] = "id,filename,voice,correct\n1,a,A,1\n1,b,A,0\n";
    static const char pairs[] = "{\"units\": [1], \"file_name\": \"0_r\"}\n{\"units\": [2], \"file_name\": \"0_w\"}\n";
    if (!TEST("sets: where they are found")) return;
    char *root = string_copy(check_path("zerospeech")), *folder = string_print("%s/lexical/test", root);
    slam_strings paths = ZERO;
    slam_units u[2];
    folder_create(folder);
    folder_create(check_path("storycloze"));
    check_file("zerospeech/lexical/test/gold.csv", table, strlen(table));
    slam_testset *s = slam_testset_open(SLAM_SWUGGY, root, "test", 0, NULL);
    CHECK(s && !s->units, "%s", slam_error());
    check_fails(slam_testset_audio(s, &paths), "test/a: no such file");
    check_file("zerospeech/lexical/test/a", "", 0);
    check_file("zerospeech/lexical/test/b.wav", "", 0);
    CHECK(slam_testset_audio(s, &paths) && paths.n == 2 && string_ends(paths.at[1], "test/b.wav"), "%s", slam_error());
    slam_strings_free(&paths);
    slam_testset_free(s);
    check_fails(slam_testset_open(SLAM_SWUGGY, root, "dev", 0, NULL), "is not split dev");
    check_fails(slam_testset_open(SLAM_SWUGGY, folder, "dev", 0, NULL), "gold.csv: is not split dev");
    check_fails(slam_testset_open(SLAM_SWUGGY, root, NULL, 0, NULL),
                "expected a name NUMBER_"); // a folder of files, then
    check_file("zerospeech/lexical/test/units.jsonl", pairs, strlen(pairs));
    s = slam_testset_open(SLAM_SWUGGY, root, "test", 1, NULL);
    CHECK(s && !s->units, "units though audio was asked for");
    slam_testset_free(s);
    s = slam_testset_open(SLAM_SWUGGY, root, "test", 0, NULL);
    CHECK(s && s->units && string_ends(s->units, "lexical/test/units.jsonl"), "units '%s'",
          s && s->units ? s->units : "");
    slam_testset_free(s);
    check_fails(slam_testset_open(SLAM_STORYCLOZE, check_path("storycloze"), NULL, 0, NULL), "no audio file");
    check_fails(slam_testset_open(SLAM_STORYCLOZE, check_path("nowhere"), NULL, 0, NULL),
                "nowhere: expected a folder of audio files");
    check_fails(slam_testset_open(SLAM_STORYCLOZE, NULL, NULL, 0, NULL), "expected a folder of audio files, or units");
    s = slam_testset_open(SLAM_STORYCLOZE, NULL, NULL, 0, check_file("storycloze/other.jsonl", pairs, strlen(pairs)));
    memset(u, 0, sizeof u);
    CHECK(s && s->items.n == 2 && slam_testset_read_units(s, 9, u) && u[1].unit[0] == 2, "%s", slam_error());
    free_units(u, 2);
    slam_testset_free(s);
    free(root);
    free(folder);
}

/* ---- output files ---- */

static void test_output_check(void) {
    if (!TEST("output files: whether they can be written")) return;
    const char *path = check_file("there.json", "x", 1);
    check_fails(slam_output_check(check_path("no/such/folder.jsonl")), "cannot be written");
    check_fails(slam_output_check("test"), "is a folder");
    check_fails(slam_output_check("README.md/x.json"), "cannot be written: README.md/: Not a directory");
    CHECK(slam_output_check(path) && path_is_file(path), "%s", slam_error());
    CHECK(slam_output_check(check_path("new.json")) && !path_is_file(check_path("new.json")), "%s", slam_error());
    CHECK(slam_output_check("/dev/null"), "%s", slam_error());
    if (path_exists("/dev/full")) check_fails(slam_output_check("/dev/full"), "/dev/full: cannot be written: No space");
}

/* ---- n-grams ---- */

static slam_data *data_of(const char *name, const char *lines, int T, int V) {
    slam_data *d = slam_data_new(T);
    const int ok = slam_data_add(d, check_file(name, lines, strlen(lines)), 1) && slam_data_prepare(d, V, 0, 0);
    CHECK(ok, "%s", slam_error());
    return d;
}

/* Adds -log p of target i of a chunk by the formula, from counts of a search through all training tokens. */
static void ngrams_by_search(const slam_data *train, const uint16_t *at, uint32_t i, int V, double *sum) {
    double p = 1.0 / V;
    for (uint32_t k = 0; k < 5; k++) { // k tokens of context; if the chunk has fewer, the lower order's p stays
        double count = 0, hits = 0, followers = 0;
        int follows[16] = {0};
        for (size_t q = 0; k <= i && q < train->n_chunks; q++) {
            const uint16_t *from = chunk_tokens(train, &train->chunks[q]);
            for (uint32_t j = k > 1 ? k : 1; j < train->chunks[q].n; j++) {
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

static char *random_lines(int n, int n_units, uint64_t *random) {
    strbuf s = ZERO;
    for (int i = 0; i < n; i++) {
        const int length = 1 + (int)rng_below(random, 60);
        strbuf_add(&s, "{\"units\": [");
        for (int k = 0; k < length; k++)
            strbuf_add(&s, "%s%d", k ? ", " : "", (int)rng_below(random, (uint64_t)n_units));
        strbuf_add(&s, "]}\n");
    }
    return s.at;
}

static void test_ngrams(void) {
    double nll[5];
    uint64_t n = 0;
    if (TEST("n-grams: by hand")) {
        slam_data *a = data_of("train.jsonl", "{\"units\": [0, 1, 0, 1]}\n", 64, 4),
                  *b = data_of("test.jsonl", "{\"units\": [0]}\n", 64, 4);
        double open = (2 + 3 * 0.25) / 8, close = (1 + 3 * 0.25) / 8; // p_1 of the targets 2 and 1
        CHECK(slam_ngrams(a, b, 4, nll, &n) && n == 2, "%s", slam_error());
        check_near("unigrams", nll[0], -(log(open) + log(close)) / 2, 1e-12);
        open = (1 + open) / 2; // 1 is followed once, by 2
        close = close / 3;     // 2 is followed twice, by 3
        check_near("bigrams", nll[1], -(log(open) + log(close)) / 2, 1e-12);
        close = close / 2; // 1 2 is followed once, by 3
        for (int k = 2; k < 5; k++) check_near("longer ones", nll[k], -(log(open) + log(close)) / 2, 1e-12);
        check_fails(slam_ngrams(a, b, 3, nll, &n), "n-grams of 3 tokens, but the data has 4");
        slam_data_free(a);
        slam_data_free(b);
    }
    for (int trial = 0; trial < 4; trial++) {
        if (!TEST("n-grams: against a search through the training data, %d", trial)) continue;
        uint64_t random = check_state.seed;
        const int V = 4 + 3 * trial, T = 5 + 20 * trial;
        char *train = random_lines(40, V - 2, &random), *test = random_lines(6, V - 2, &random);
        slam_data *a = data_of("train.jsonl", train, T, V), *b = data_of("test.jsonl", test, T, V);
        double expected[5] = {0}, targets = 0;
        for (size_t c = 0; c < b->n_chunks; c++)
            for (uint32_t i = 1; i < b->chunks[c].n; i++, targets++)
                ngrams_by_search(a, chunk_tokens(b, &b->chunks[c]), i, V, expected);
        CHECK(slam_ngrams(a, b, V, nll, &n) && (double)n == targets, "%s", slam_error());
        for (int k = 0; k < 5; k++) check_near("nats per token", nll[k], expected[k] / targets, 1e-12);
        free(train);
        free(test);
        slam_data_free(a);
        slam_data_free(b);
    }
}

int main(void) {
    test_ngrams();
    test_official();
    test_gold();
    test_written();
    test_metrics_written();
    test_gold_words();
    test_files();
    test_units();
    test_open();
    test_output_check();
    return check_end();
}
