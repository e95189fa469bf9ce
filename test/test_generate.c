/* Generation: greedy tokens against Transformers (fixtures made by test/reference_generate.py); what batch, order and threads must not
   change; prompts and continuations as files. The decoder and its sampling are in test_model.c. Run from the repository's root. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#define FOLDER "test/fixtures/generate"

static const slam_sampling greedy = {0, 0, 1, 1}, usual = {0.8, 25, 1, 1};

/* ---- the fixture ---- */

static tensors *file;
static int P, *prompt_tokens, *prompt_lengths; // prompts, (P,stride) and (P)
static size_t stride;

static int *ints(const char *name, size_t *n) {
    const tensor *t = tensors_find(file, name);
    if (!CHECK(t != NULL, "the fixture has no tensor '%s'", name)) return NULL;
    int *x = (int *)malloc((t->count + 1) * sizeof *x);
    memcpy(x, t->data, t->count * sizeof *x);
    if (n) *n = t->count;
    return x;
}

static int fixture_open(void) {
    size_t n = 0;
    file = tensors_open(FOLDER "/generated.safetensors");
    if (!CHECK(file != NULL, "%s", slam_error())) return 0;
    prompt_tokens = ints("prompts", &n);
    P = (int)tensors_find(file, "lengths")->count;
    prompt_lengths = ints("lengths", NULL);
    stride = n / P;
    return 1;
}

static slam_prompts fixture_prompts(void) {
    slam_prompts p = ZERO;
    char name[32];
    for (int b = 0; b < P; b++) {
        int units[256];
        for (int t = 1; t < prompt_lengths[b]; t++) units[t - 1] = prompt_tokens[b * stride + t] - 2;
        snprintf(name, sizeof name, "prompt %d", b);
        slam_prompts_add(&p, name, units, NULL, (size_t)prompt_lengths[b] - 1);
    }
    return p;
}

static slam_generation settings(slam_sampling sampling, int max_new, int batch) {
    slam_generation g = {sampling, max_new, 256, batch, 7};
    return g;
}

/* ---- tests ---- */

static void test_greedy(slam_model *m, int k) {
    char name[64];
    size_t n = 0;
    snprintf(name, sizeof name, "greedy.%d.penalty", k);
    const tensor *t = tensors_find(file, name);
    float penalty = 1;
    CHECK(t && tensor_floats(t, &penalty, 0, 1), "no tensor %s", name);
    snprintf(name, sizeof name, "greedy.%d", k);
    int *expected = ints(name, &n), wrong = 0, ended = 0, N = (int)n / P;
    for (int batch = 1; batch <= P; batch += P - 1) {
        slam_prompts p = fixture_prompts();
        slam_generation how = settings(greedy, N, batch);
        how.sampling.repetition_penalty = penalty;
        CHECK(slam_generate(m, &how, &p, NULL, NULL), "%s", slam_error());
        for (int b = 0; b < P; b++) {
            const int *row = expected + (size_t)b * N;
            int length = 0;
            while (length < N && row[length] >= 0) length++;
            wrong += p.at[b].length != length || p.at[b].ended != (length < N);
            for (int t = 0; t < length && t < p.at[b].length; t++) wrong += p.at[b].continuation[t] != row[t];
            ended += p.at[b].ended;
        }
        slam_prompts_free(&p);
    }
    CHECK(wrong == 0, "%d tokens or ends are not those of Transformers", wrong);
    free(expected);
}

/* Prompts of all lengths with some that are equal, in an order of the seed's. `who` gets each one's number. */
static slam_prompts many_prompts(int n, uint64_t order, int *who) {
    slam_prompts p = ZERO;
    for (int i = 0; i < n; i++) who[i] = i;
    for (int i = n - 1; order && i > 0; i--) {
        const int j = (int)rng_below(&order, (uint64_t)i + 1), k = who[i];
        who[i] = who[j], who[j] = k;
    }
    for (int i = 0; i < n; i++) {
        uint64_t stream = rng_stream(3, (uint64_t)who[i], 0);
        int units[300], length = (int)rng_below(&stream, 150);
        for (int t = 0; t < length; t++) units[t] = (int)rng_below(&stream, 38);
        slam_prompts_add(&p, "x", units, NULL, (size_t)length);
    }
    return p;
}

static int same(const slam_prompt *a, const slam_prompt *b) {
    return a->length == b->length && a->ended == b->ended && a->continuation && b->continuation &&
           memcmp(a->continuation, b->continuation, sizeof(int) * (size_t)a->length) == 0;
}

static void test_company(slam_model *m) {
    enum { N = 40 };
    int who[N], again[N], wrong = 0, ended = 0;
    slam_generation how = settings(usual, 30, N);
    slam_prompts all = many_prompts(N, 0, who);
    CHECK(slam_generate(m, &how, &all, NULL, NULL), "%s", slam_error());
    for (int batch = 1; batch < N; batch += 9) {
        slam_prompts other = many_prompts(N, (uint64_t)batch, again);
        how.batch = batch;
        how.context = 256 - batch; // more than any of them needs
        CHECK(slam_generate(m, &how, &other, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < N; i++) wrong += !same(&other.at[i], &all.at[again[i]]);
        slam_prompts_free(&other);
    }
    for (int i = 0; i < N; i++) {
        slam_prompts alone = ZERO, view = {&all.at[i], 1, 1, 0, 0, 0, 0};
        int units[300];
        for (int t = 1; t < view.at->n; t++) units[t - 1] = view.at->tokens[t] - 2;
        slam_prompts_add(&alone, "x", units, NULL, (size_t)view.at->n - 1);
        CHECK(slam_generate(m, &how, &alone, NULL, NULL), "%s", slam_error());
        wrong += !same(alone.at, view.at);
        ended += view.at->ended;
        slam_prompts_free(&alone);
    }
    CHECK(wrong == 0, "%d continuations depend on their company", wrong);
    CHECK(ended > 0 && ended < N, "%d of %d sequences have ended: nobody made room, or everybody did", ended, N);
    slam_prompts_free(&all);
}

static void test_seeds(slam_model *m) {
    int equal = 0, zeros = 0, units[3] = {5, 6, 7};
    slam_prompts runs[4];
    for (int k = 0; k < 4; k++) { // seeds 1, 1, 2; and the second half of seed 1 alone after a stop
        slam_generation how = settings(usual, 40, 4);
        how.seed = k == 2 ? 2 : 1;
        memset(&runs[k], 0, sizeof runs[k]);
        for (int i = 0; i < 6; i++) slam_prompts_add(&runs[k], "equal", units, NULL, 3);
        if (k == 3) // some are there already
            for (int i = 0; i < 3; i++) {
                slam_prompt *q = &runs[k].at[i], *from = &runs[0].at[i];
                q->length = from->length, q->ended = from->ended;
                q->continuation = (int *)malloc(sizeof(int) * ((size_t)q->length + 1));
                memcpy(q->continuation, from->continuation, sizeof(int) * (size_t)q->length);
            }
        CHECK(slam_generate(m, &how, &runs[k], NULL, NULL), "%s", slam_error());
        for (int i = 0; i < 6; i++)
            for (int t = 0; t < runs[k].at[i].length; t++) zeros += runs[k].at[i].continuation[t] < 2;
    }
    for (int i = 0; i < 6; i++) {
        CHECK(same(&runs[0].at[i], &runs[1].at[i]), "the same seed says something else at %d", i);
        CHECK(same(&runs[0].at[i], &runs[3].at[i]), "prompt %d says something else when half of them were done before",
              i);
        equal += same(&runs[0].at[i], &runs[2].at[i]);
        for (int j = 0; j < i; j++) equal += same(&runs[0].at[i], &runs[0].at[j]);
    }
    CHECK(equal <= 1, "%d of 21 pairs from different streams are equal", equal); // two that end at once are
    CHECK(zeros == 0, "%d drawn tokens are 0 or 1", zeros);
    for (int k = 0; k < 4; k++) slam_prompts_free(&runs[k]);
}

/* Notes the last report; cancels after `most` tokens. */
typedef struct reports {
    double most, done, total;
} reports;

static int note_report(void *context, const slam_progress *p) {
    reports *r = (reports *)context;
    CHECK(!strcmp(p->stage, "generate") && p->done > r->done && p->done <= p->total, "%s: %g of %g", p->stage, p->done,
          p->total);
    r->done = p->done;
    r->total = p->total;
    return p->done < r->most;
}

static void test_limits(slam_model *m) {
    int units[400];
    slam_prompts p = ZERO, q = ZERO;
    slam_generation how = settings(greedy, 30, 2);
    for (int i = 0; i < 400; i++) units[i] = i % 38;
    CHECK(slam_generate(m, &how, &p, NULL, NULL), "no prompts: %s", slam_error());
    how.context = 100;
    slam_prompts_add(&p, "long", units, NULL, 400);
    slam_prompts_add(&p, "empty", NULL, NULL, 0);
    slam_prompts_add(&q, "its end", units + 331, NULL, 69);
    CHECK(slam_generate(m, &how, &p, NULL, NULL) && slam_generate(m, &how, &q, NULL, NULL), "%s", slam_error());
    CHECK(p.at[0].truncated == 331 && p.at[0].n == 70 && p.at[0].tokens[0] == 1 && p.at[0].tokens[1] == units[331] + 2,
          "%d tokens removed, %d left", p.at[0].truncated, p.at[0].n);
    CHECK(q.at[0].truncated == 0 && same(&p.at[0], &q.at[0]), "a long prompt is not continued as its end is");
    CHECK(p.at[1].continuation != NULL && p.at[1].n == 1, "an empty prompt is not continued");
    slam_prompts_free(&p);
    slam_prompts_free(&q);
    how.max_new = 1;
    how.context = 2;
    slam_prompts_add(&q, "empty", units, NULL, 5);
    CHECK(slam_generate(m, &how, &q, NULL, NULL) && q.at[0].length <= 1, "%s", slam_error());
    slam_prompts_free(&q);
    how = settings(usual, 30, 2);
    for (int i = 0; i < 10; i++) slam_prompts_add(&q, "stopped", units, NULL, (size_t)i);
    reports r = {20, 0, 0};
    CHECK(slam_generate(m, &how, &q, note_report, &r) && r.done >= 20 && r.done < 22, "%s", slam_error());
    CHECK(q.at[0].continuation == NULL, "the shortest prompt, the last to start, is done after 20 tokens");
    r.most = HUGE_VAL;
    r.done = 0;
    CHECK(slam_generate(m, &how, &q, note_report, &r) && r.done == r.total, "%g tokens of %g", r.done, r.total);
    slam_prompts_free(&q);
}

static void test_wrong_settings(slam_model *m) {
    const slam_generation good = settings(usual, 5, 1);
    slam_generation bad[10];
    static const char *const errors[] = {"no space for a prompt",
                                         "context of 257 tokens, the model has 256",
                                         "0 new tokens",
                                         "batch of 0",
                                         "top-p of 1.5",
                                         "top-p",
                                         "temperature of -1",
                                         "penalty of 0",
                                         "top-k of -1"};
    const int units[] = {0, 1, 2, 3}, far[] = {5, 38}, negative[] = {5, -3}, largest[] = {INT_MAX};
    slam_prompts q = ZERO;
    for (int i = 0; i < 10; i++) bad[i] = good;
    bad[0].max_new = 256;
    bad[1].context = 257;
    bad[2].max_new = 0;
    bad[3].batch = 0;
    bad[4].sampling.top_p = 1.5;
    bad[5].sampling.top_p = NAN;
    bad[6].sampling.temperature = -1;
    bad[7].sampling.repetition_penalty = 0;
    bad[8].sampling.top_k = -1;
    slam_prompts_add(&q, "x.jsonl:3", units, NULL, 4);
    for (int i = 0; i < 9; i++) check_fails(slam_generate(m, &bad[i], &q, NULL, NULL), errors[i]);
    bad[9].batch = 1 << 30;
    CHECK(slam_generate(m, &bad[9], &q, NULL, NULL), "a batch of more than there are: %s", slam_error());
    for (int i = 0; i < 3; i++) {
        slam_prompts_free(&q);
        slam_prompts_add(&q, "x.jsonl:4", i == 0 ? far : i == 1 ? negative : largest, NULL, i < 2 ? 2 : 1);
        check_fails(slam_generate(m, &good, &q, NULL, NULL), i == 0   ? "x.jsonl:4: unit 2 is 38, expected below 38"
                                                             : i == 1 ? "x.jsonl:4: unit 2 is -3"
                                                                      : "x.jsonl:4: unit 1 is");
    }
    slam_prompts_free(&q);
}

static void test_not_finite(slam_ops *ops) {
    slam_model *m = slam_model_load(ops, FOLDER);
    slam_prompts p = ZERO;
    const slam_generation how = settings(usual, 5, 2);
    slam_prompts_add(&p, "first", NULL, NULL, 0);
    for (size_t i = m->n_decayed; i < m->n_weights; i++) m->master[i] = NAN; // the norms
    check_fails(slam_generate(m, &how, &p, NULL, NULL), "first: the model's logits are not finite");
    CHECK(p.at[0].continuation == NULL, "a continuation of a broken model");
    slam_prompts_free(&p);
    slam_model_free(m);
}

static void test_repetition(void) {
    int units[200];
    uint64_t stream = 11;
    for (int round = 0; round < 50; round++) {
        const int n = round < 3 ? round : (int)rng_below(&stream, 200), kinds = 2 + (int)rng_below(&stream, 30);
        int again = 0;
        for (int i = 0; i < n; i++) units[i] = (int)rng_below(&stream, (uint64_t)kinds) * 37;
        for (int i = 0; i + 1 < n; i++) {
            int found = 0;
            for (int j = 0; j + 1 < n; j++) found |= j != i && units[i] == units[j] && units[i + 1] == units[j + 1];
            again += found;
        }
        check_near("auto-BLEU-2", slam_unit_auto_bleu(units, (size_t)n, 2), n > 1 ? (double)again / (n - 1) : 0, 1e-12);
    }
}

static int units_are(const slam_prompt *p, const char *name, int first, int n) {
    int wrong = strcmp(p->name, name) != 0 || p->n != n + 1 || p->tokens[0] != 1;
    for (int i = 0; i < n && !wrong; i++) wrong = p->tokens[1 + i] != first + i + 2;
    return CHECK(!wrong, "%s has %d tokens, expected %s with %d", p->name, p->n, name, n + 1);
}

/* Ten units of 3 frames each, with and without their durations; 60 units; none. */
static void test_prompt_files(void) {
    enum { FIRST_4, SECOND, EDGE, SLOW, ALL, LENGTHS };
    static const slam_prompts lengths[LENGTHS] = {{NULL, 0, 0, 4, 3, 25, 0},
                                                  {NULL, 0, 0, 0, 1, 25, 0},
                                                  {NULL, 0, 0, 0, 0.96, 25, 0},
                                                  {NULL, 0, 0, 0, 0.3, 50, 0},
                                                  {NULL, 0, 0, 0, 0, 25, 0}};
    static const int first[LENGTHS] = {4, 9, 8, 5, 10},
                     second[LENGTHS] = {4, 18, 18, 6, 60}; // frame 25 is in the ninth unit, which
    strbuf t = ZERO;                                       // begins with frame 24
    strbuf_add(&t, "{\"units\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], \"duration\": [3, 3, 3, 3, 3, 3, 3, 3, 3, 3], "
                   "\"file_name\": \"a \\\"b\\\"\"}\n\n{\"audio_repr\": \"");
    for (int i = 0; i < 60; i++) strbuf_add(&t, "<Un%d>", i);
    strbuf_add(&t, "\", \"file_name\": \"b\"}\n{\"units\": [], \"duration\": []}\n");
    char *path = string_copy(check_file("prompts.jsonl", t.at, t.n)), *third = string_print("%s:4", path);
    for (int k = 0; k < LENGTHS; k++) {
        slam_prompts p = lengths[k];
        const size_t guessed = p.max_units || p.max_seconds == 0 ? 0 : 1;
        CHECK(slam_prompts_add_lines(&p, path) && p.n == 3 && p.guessed == guessed, "%zu guessed: %s", p.guessed,
              slam_error());
        units_are(&p.at[0], "a \"b\"", 0, first[k]);
        units_are(&p.at[1], "b", 0, second[k]);
        units_are(&p.at[2], third, 0, 0);
        if (k == ALL) {
            check_fails(
                slam_prompts_add_lines(&p, check_file("bad.jsonl", "{\"units\": [1]}\n{\"units\": [-1]}\n", 30)),
                "bad.jsonl:2");
            check_fails(slam_prompts_add_lines(&p, check_path("none.jsonl")), "cannot be opened");
        }
        slam_prompts_free(&p);
    }
    slam_data *data = slam_data_new(8);
    CHECK(slam_data_add(data, path, 1) && slam_data_prepare(data, 62, 0, 0), "%s", slam_error());
    slam_prompts p = lengths[FIRST_4], all = lengths[ALL];
    slam_prompts_add_data(&p, data);
    CHECK(p.n == 2 && p.at[0].n == 5 && p.at[1].n == 5 && p.at[1].tokens[4] == 5, "%zu documents",
          p.n); // the empty one is none
    slam_prompts_add_data(&all, data);
    CHECK(all.n == 2 && all.at[1].n == 8 && all.at[1].tokens[7] == 8, "%s", slam_error());
    slam_data_free(data);
    slam_prompts_free(&p);
    slam_prompts_free(&all);
    strbuf_free(&t);
    free(path);
    free(third);
}

/* What is written reads back, and has only what is generated. */
static void test_output(slam_model *m) {
    slam_prompts p = fixture_prompts(), again = ZERO;
    const slam_generation how = settings(usual, 20, 3);
    const char *path = check_path("out.jsonl");
    CHECK(slam_generate(m, &how, &p, NULL, NULL), "%s", slam_error());
    free(p.at[2].continuation);
    p.at[2].continuation = NULL;
    CHECK(slam_prompts_write(&p, path) && slam_prompts_add_lines(&again, path) && again.n + 1 == p.n, "%s",
          slam_error());
    for (size_t i = 0; i < again.n; i++) {
        const slam_prompt *q = &p.at[i < 2 ? i : i + 1];
        CHECK(again.at[i].n == q->length + 1 && !strcmp(again.at[i].name, q->name) &&
                  memcmp(again.at[i].tokens + 1, q->continuation, sizeof(int) * (size_t)q->length) == 0,
              "%s is not what was written", q->name);
    }
    check_fails(slam_prompts_write(&p, check_path("no/such/folder.jsonl")), "cannot be written");
    slam_prompts_free(&p);
    slam_prompts_free(&again);
}

static void test_texts(void) {
    check_near("ab ba ab", slam_auto_bleu("a b a b\n", 2), 2.0 / 3, 1e-12);
    check_near("a, ,a a, ,a", slam_auto_bleu("a, a, a", 2), 1, 0);
    check_near("no repetition", slam_auto_bleu("nothing twice here\n", 2), 0, 0);
    check_near("of nothing", slam_auto_bleu("\n", 2), 0, 0);
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    slam_model *m = slam_model_load(ops, FOLDER);
    if (!CHECK(m != NULL, "%s", slam_error()) || !fixture_open()) return check_end();
    for (int k = 0; k < 3; k++)
        if (TEST("greedy %d, token by token as Transformers", k)) test_greedy(m, k);
    if (TEST("batch, order and context change nothing")) test_company(m);
    if (TEST("seeds, equal prompts, some that are done already")) test_seeds(m);
    if (TEST("long, empty and stopped")) test_limits(m);
    if (TEST("wrong settings and prompts")) test_wrong_settings(m);
    if (TEST("logits that are not finite")) test_not_finite(ops);
    if (TEST("prompts from files")) test_prompt_files();
    if (TEST("continuations as a file")) test_output(m);
    if (TEST("auto-BLEU-2 of units")) test_repetition();
    if (TEST("auto-BLEU-2 of texts")) test_texts();
    free(prompt_tokens);
    free(prompt_lengths);
    tensors_close(file);
    slam_model_free(m);
    slam_ops_free(ops);
    return check_end();
}
