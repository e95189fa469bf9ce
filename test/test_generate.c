/* Generation against Transformers (fixtures made by test/reference_generate.py): greedy tokens, the distributions that are sampled
   from; a cache against none; what batch, order, threads and company must not change. Run from the repository's root. */
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

static double *doubles(const char *name) {
    const tensor *t = tensors_find(file, name);
    if (!CHECK(t != NULL, "the fixture has no tensor '%s'", name)) return NULL;
    double *x = (double *)malloc((t->count + 1) * sizeof *x);
    memcpy(x, t->data, t->count * sizeof *x);
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
    slam_prompts p = SLAM_ZERO;
    char name[32];
    for (int b = 0; b < P; b++) {
        int units[256];
        for (int t = 1; t < prompt_lengths[b]; t++) units[t - 1] = prompt_tokens[b * stride + t] - 2;
        snprintf(name, sizeof name, "prompt %d", b);
        CHECK(slam_prompts_add(&p, name, units, (size_t)prompt_lengths[b] - 1), "%s", slam_error());
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
    double *penalty = doubles(name);
    snprintf(name, sizeof name, "greedy.%d", k);
    int *expected = ints(name, &n), wrong = 0, ended = 0, N = (int)n / P;
    for (int batch = 1; batch <= P; batch += P - 1) {
        slam_prompts p = fixture_prompts();
        slam_generation how = settings(greedy, N, batch);
        how.sampling.repetition_penalty = penalty[0];
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
    free(penalty), free(expected);
}

/* The probabilities (V) that the next token of a sequence is drawn by: a step leaves logits and what the penalty concerns; then
   where the draw passes from one token to the next, as the uniform number grows, is found by halving, for all tokens at once. */
static void distribution(slam_decoder *d, const slam_sampling *s, const int *tokens, int n, double *p) {
    enum { HALVINGS = 24 };
    slam_ops *ops = d->model->ops;
    const int V = d->model->config.V, slot = 0;
    float *logits = (float *)malloc(sizeof(float) * V * V), zero = 0;
    float *low = (float *)calloc(V, sizeof(float)), *high = (float *)calloc(V, sizeof(float)),
          *u = (float *)calloc(V, sizeof(float));
    unsigned char *seen = (unsigned char *)malloc((size_t)V * V);
    int *drawn = (int *)malloc(sizeof(int) * V), first, fresh = 1;
    CHECK(slam_decoder_begin(d, 1, &slot, &tokens, &n) && slam_decoder_step(d, s, &zero, &first), "%s", slam_error());
    for (int t = 0; t < n; t++) fresh = fresh && tokens[t] != first;
    if (fresh) d->seen[first] = 0; // as before it was drawn
    for (int v = 0; v < V; v++) memcpy(logits + (size_t)v * V, d->logits, sizeof(float) * V), high[v] = 1;
    for (int k = 0; k < HALVINGS; k++) { // by low[v] v or less is drawn, from high[v] on what comes later
        for (int v = 0; v < V; v++) u[v] = (low[v] + high[v]) / 2, memcpy(seen + (size_t)v * V, d->seen, (size_t)V);
        ops->sample(ops, drawn, (slam_act *)logits, seen, u, s, V, V, V);
        for (int v = 0; v < V; v++) *(drawn[v] <= v ? &low[v] : &high[v]) = u[v];
    }
    for (int v = 0; v < V; v++) p[v] = (v < first ? 0 : high[v]) - (v <= first ? 0 : high[v - 1]);
    free(logits), free(low), free(high), free(u), free(seen), free(drawn);
}

static void test_distribution(slam_model *m, int k) {
    const int V = slam_model_config(m)->V;
    char name[64];
    size_t n = 0;
    snprintf(name, sizeof name, "sampled.%d.settings", k);
    double *given = doubles(name), *p = (double *)malloc(sizeof(double) * V), worst = 0;
    const slam_sampling s = {given[0], (int)given[1], given[2], given[3]};
    snprintf(name, sizeof name, "sampled.%d", k);
    int *drawn = ints(name, &n), steps = (int)n / P, tokens[256];
    snprintf(name, sizeof name, "sampled.%d.probabilities", k);
    const tensor *t = tensors_find(file, name);
    float *expected = (float *)malloc(t->count * sizeof(float));
    tensor_floats(t, expected, 0, t->count);
    slam_decoder *d = slam_decoder_new(m, 1, (int)stride + steps);
    CHECK(d != NULL, "%s", slam_error());
    for (int b = 0; d && b < P; b++)
        for (int i = 0; i < steps; i++) {
            const float *q = expected + ((size_t)b * steps + i) * V;
            memcpy(tokens, prompt_tokens + b * stride, sizeof(int) * prompt_lengths[b]);
            memcpy(tokens + prompt_lengths[b], drawn + (size_t)b * steps, sizeof(int) * i);
            distribution(d, &s, tokens, prompt_lengths[b] + i, p);
            for (int v = 0; v < V; v++) worst = fmax(worst, fabs(p[v] - q[v]));
        }
    check_near("probabilities", worst, 0, 1e-5);
    slam_decoder_free(d);
    free(given), free(p), free(drawn), free(expected);
}

/* Logits of every step against those of whole passes over what is there by then. */
static void test_cache(slam_model *m) {
    enum { STEPS = 70, SLOTS = 3 };
    const int V = slam_model_config(m)->V, first[SLOTS] = {1, 64, 127};
    int tokens[SLOTS][256], slots[SLOTS] = {2, 0, 1}, n[SLOTS], drawn[SLOTS], zeros[256] = {0};
    const int *at[SLOTS] = {tokens[0], tokens[1], tokens[2]};
    float *got = (float *)malloc(sizeof(float) * SLOTS * V * STEPS), *whole = (float *)malloc(sizeof(float) * 256 * V),
          uniform[SLOTS];
    uint64_t stream = 5;
    const slam_sampling hot = {1.5, 0, 1, 1};
    slam_decoder *d = slam_decoder_new(m, SLOTS, 200);
    for (int b = 0; b < SLOTS; b++) {
        n[b] = first[b];
        tokens[b][0] = 1;
        for (int t = 1; t < n[b]; t++) tokens[b][t] = 2 + (int)rng_below(&stream, (uint64_t)V - 2);
    }
    CHECK(d && slam_decoder_begin(d, SLOTS, slots, at, n), "%s", slam_error());
    for (int k = 0; k < STEPS; k++) {
        for (int b = 0; b < SLOTS; b++) uniform[b] = (float)rng_uniform(&stream) * 0.999f;
        CHECK(slam_decoder_step(d, &hot, uniform, drawn) && slam_decoder_logits(d, got + (size_t)k * SLOTS * V), "%s",
              slam_error());
        for (int b = 0; b < SLOTS; b++) tokens[b][n[b]++] = drawn[slots[b]];
        if (k == 30) CHECK(slam_model_nll(m, tokens[0], 20) > 0, "%s", slam_error()); // another plan in between
    }
    for (int b = 0; b < SLOTS; b++) {
        slam_batch one = {1, n[b], tokens[b], NULL, zeros, NULL};
        double worst = 0;
        CHECK(slam_model_plan(m, 1, n[b], SLAM_INFERENCE) && slam_model_logits(m, &one, whole), "%s", slam_error());
        for (int k = 0; k < STEPS; k++)
            for (int v = 0; v < V; v++)
                worst = fmax(worst, fabs(got[((size_t)k * SLOTS + slots[b]) * V + v] - whole[(size_t)(first[b] - 1 + k) * V + v]));
        check_near("logits", worst, 0, 5e-5); // of numbers up to 20, through float
    }
    slam_decoder_end(d, 0);
    CHECK(slam_decoder_step(d, &hot, uniform, drawn) && drawn[0] == -1 && drawn[1] > 0 && drawn[2] > 0, "a slot that has ended");
    free(got), free(whole);
    slam_decoder_free(d);
}

/* Prompts of all lengths with some that are equal, in an order of the seed's. `who` gets each one's number. */
static slam_prompts many_prompts(int n, uint64_t order, int *who) {
    slam_prompts p = SLAM_ZERO;
    for (int i = 0; i < n; i++) who[i] = i;
    for (int i = n - 1; order && i > 0; i--) {
        const int j = (int)rng_below(&order, (uint64_t)i + 1), k = who[i];
        who[i] = who[j], who[j] = k;
    }
    for (int i = 0; i < n; i++) {
        uint64_t stream = rng_stream(3, (uint64_t)who[i], 0);
        int units[300], length = (int)rng_below(&stream, 150);
        for (int t = 0; t < length; t++) units[t] = (int)rng_below(&stream, 38);
        slam_prompts_add(&p, "x", units, (size_t)length);
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
        how.context = 256 - batch; // room that nobody needs
        CHECK(slam_generate(m, &how, &other, NULL, NULL), "%s", slam_error());
        for (int i = 0; i < N; i++) wrong += !same(&other.at[i], &all.at[again[i]]);
        slam_prompts_free(&other);
    }
    for (int i = 0; i < N; i++) {
        slam_prompts alone = SLAM_ZERO, view = {&all.at[i], 1, 1};
        int units[300];
        for (int t = 1; t < view.at->n; t++) units[t - 1] = view.at->tokens[t] - 2;
        slam_prompts_add(&alone, "x", units, (size_t)view.at->n - 1);
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
        for (int i = 0; i < 6; i++) slam_prompts_add(&runs[k], "equal", units, 3);
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
        CHECK(same(&runs[0].at[i], &runs[3].at[i]), "prompt %d says something else when half of them were done before", i);
        equal += same(&runs[0].at[i], &runs[2].at[i]);
        for (int j = 0; j < i; j++) equal += same(&runs[0].at[i], &runs[0].at[j]);
    }
    CHECK(equal <= 1, "%d of 21 pairs from different streams are equal", equal); // two that end at once are
    CHECK(zeros == 0, "%d drawn tokens are 0 or 1", zeros);
    for (int k = 0; k < 4; k++) slam_prompts_free(&runs[k]);
}

static int stop_at_once(void *context, size_t done, uint64_t tokens) {
    (void)done;
    *(uint64_t *)context = tokens;
    return tokens < 20;
}

static void test_limits(slam_model *m) {
    int units[400];
    slam_prompts p = SLAM_ZERO, q = SLAM_ZERO;
    slam_generation how = settings(greedy, 30, 2);
    uint64_t tokens = 0;
    for (int i = 0; i < 400; i++) units[i] = i % 38;
    CHECK(slam_generate(m, &how, &p, NULL, NULL), "no prompts: %s", slam_error());
    how.context = 100;
    CHECK(slam_prompts_add(&p, "long", units, 400) && slam_prompts_add(&p, "empty", NULL, 0), "%s", slam_error());
    CHECK(slam_prompts_add(&q, "its end", units + 331, 69), "%s", slam_error());
    CHECK(slam_generate(m, &how, &p, NULL, NULL) && slam_generate(m, &how, &q, NULL, NULL), "%s", slam_error());
    CHECK(p.at[0].cut == 331 && p.at[0].n == 70 && p.at[0].tokens[0] == 1 && p.at[0].tokens[1] == units[331] + 2,
          "%d tokens cut, %d left", p.at[0].cut, p.at[0].n);
    CHECK(q.at[0].cut == 0 && same(&p.at[0], &q.at[0]), "a long prompt is not continued as its end is");
    CHECK(p.at[1].continuation != NULL && p.at[1].n == 1, "an empty prompt is not continued");
    slam_prompts_free(&q);
    how.max_new = 1;
    how.context = 2;
    CHECK(slam_prompts_add(&q, "empty", units, 5) && slam_generate(m, &how, &q, NULL, NULL) && q.at[0].length <= 1, "%s",
          slam_error());
    slam_prompts_free(&q);
    how = settings(usual, 30, 2);
    for (int i = 0; i < 10; i++) slam_prompts_add(&q, "stopped", units, (size_t)i);
    CHECK(slam_generate(m, &how, &q, stop_at_once, &tokens) && tokens >= 20 && tokens < 22, "%s", slam_error());
    CHECK(q.at[0].continuation == NULL, "the shortest prompt, the last to begin, is done after 20 tokens");
    slam_prompts_free(&q);
    slam_prompts_add(&q, "x.jsonl:3", units, 4);
    how.max_new = 256, check_fails(slam_generate(m, &how, &q, NULL, NULL), "no room for a prompt in a context of 256");
    how.context = 257, check_fails(slam_generate(m, &how, &q, NULL, NULL), "257 tokens, the model has positions for 256");
    how.context = 256, how.max_new = 0, check_fails(slam_generate(m, &how, &q, NULL, NULL), "0 new tokens");
    how.max_new = 5, how.batch = 0, check_fails(slam_generate(m, &how, &q, NULL, NULL), "batch of 0");
    how.batch = 1 << 30, CHECK(slam_generate(m, &how, &q, NULL, NULL), "%s", slam_error());
    slam_prompts_free(&q), slam_prompts_add(&q, "x.jsonl:3", units, 4);
    how.sampling.top_p = 1.5, check_fails(slam_generate(m, &how, &q, NULL, NULL), "top-p of 1.5");
    how.sampling.top_p = NAN, check_fails(slam_generate(m, &how, &q, NULL, NULL), "top-p");
    how.sampling = usual, how.sampling.temperature = -1, check_fails(slam_generate(m, &how, &q, NULL, NULL), "temperature of -1");
    how.sampling = usual, how.sampling.repetition_penalty = 0, check_fails(slam_generate(m, &how, &q, NULL, NULL), "penalty of 0");
    how.sampling = usual, how.sampling.top_k = -1, check_fails(slam_generate(m, &how, &q, NULL, NULL), "top-k of -1");
    q.at[0].tokens[2] = 40, how.sampling = usual;
    check_fails(slam_generate(m, &how, &q, NULL, NULL), "x.jsonl:3: token 40 at position 2");
    units[0] = -3, check_fails(slam_prompts_add(&q, "x.jsonl:4", units, 2), "x.jsonl:4: unit -3");
    slam_prompts_free(&p), slam_prompts_free(&q);
}

static void test_decoder_limits(slam_model *m) {
    int tokens[10] = {1, 2, 3, 4, 5}, slot = 0, length = 3, drawn;
    const int *at = tokens;
    float u = 0;
    slam_decoder *d = slam_decoder_new(m, 1, 4);
    check_fails(slam_decoder_new(m, 0, 4), "0 sequences");
    check_fails(slam_decoder_new(m, 1 << 20, 1 << 20), "2^29");
    CHECK(slam_decoder_step(d, &greedy, NULL, &drawn) && drawn == -1, "a step without a sequence");
    slot = 1, check_fails(slam_decoder_begin(d, 1, &slot, &at, &length), "slot 1");
    slot = 0, length = 5, check_fails(slam_decoder_begin(d, 1, &slot, &at, &length), "5 tokens");
    length = 0, check_fails(slam_decoder_begin(d, 1, &slot, &at, &length), "0 tokens");
    length = 3, CHECK(slam_decoder_begin(d, 1, &slot, &at, &length), "%s", slam_error());
    CHECK(slam_decoder_step(d, &usual, &u, &drawn) && slam_decoder_step(d, &usual, &u, &drawn), "%s", slam_error());
    check_fails(slam_decoder_step(d, &usual, &u, &drawn), "no room");
    slam_decoder_free(d);
}

static void test_not_finite(slam_ops *ops) {
    slam_model *m = slam_model_load(ops, FOLDER);
    slam_prompts p = SLAM_ZERO;
    const slam_generation how = settings(usual, 5, 2);
    slam_prompts_add(&p, "first", NULL, 0);
    m->master[m->w.norm] = NAN;
    check_fails(slam_generate(m, &how, &p, NULL, NULL), "first: the model's logits are not finite");
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
    text t = SLAM_ZERO;
    slam_prompts p = SLAM_ZERO;
    const slam_prompt_length first4 = {4, 3, 25}, second = {0, 1, 25}, edge = {0, 0.96, 25}, slow = {0, 0.3, 50}, all = {0, 0, 25};
    size_t guessed;
    text_add(
        &t,
        "{\"units\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], \"duration\": [3, 3, 3, 3, 3, 3, 3, 3, 3, 3], \"file_name\": \"a \\\"b\\\"\"}\n\n");
    text_add(&t, "{\"audio_repr\": \"");
    for (int i = 0; i < 60; i++) text_add(&t, "<Un%d>", i);
    text_add(&t, "\", \"file_name\": \"b\"}\n{\"units\": [], \"duration\": []}\n");
    const char *path = check_file("prompts.jsonl", t.at, t.n);
    char third[1100];
    snprintf(third, sizeof third, "%s:4", path);
    CHECK(slam_prompts_units(&p, path, &first4, &guessed) && p.n == 3 && guessed == 0, "%s", slam_error());
    units_are(&p.at[0], "a \"b\"", 0, 4), units_are(&p.at[1], "b", 0, 4), units_are(&p.at[2], third, 0, 0);
    slam_prompts_free(&p);
    CHECK(slam_prompts_units(&p, path, &second, &guessed) && guessed == 1, "%s", slam_error()); // frame 25 is in the ninth unit
    units_are(&p.at[0], "a \"b\"", 0, 9), units_are(&p.at[1], "b", 0, 18), units_are(&p.at[2], third, 0, 0);
    slam_prompts_free(&p);
    CHECK(slam_prompts_units(&p, path, &edge, NULL), "%s", slam_error()); // the ninth begins with frame 24
    units_are(&p.at[0], "a \"b\"", 0, 8);
    slam_prompts_free(&p);
    CHECK(slam_prompts_units(&p, path, &slow, NULL), "%s", slam_error());
    units_are(&p.at[0], "a \"b\"", 0, 5);
    CHECK(slam_prompts_units(&p, path, &all, &guessed) && p.n == 6 && guessed == 0, "%s", slam_error());
    units_are(&p.at[3], "a \"b\"", 0, 10), units_are(&p.at[4], "b", 0, 60);
    check_fails(slam_prompts_units(&p, check_file("bad.jsonl", "{\"units\": [1]}\n{\"units\": [-1]}\n", 30), &all, NULL),
                "bad.jsonl:2");
    check_fails(slam_prompts_units(&p, check_path("none.jsonl"), &all, NULL), "cannot be opened");
    slam_prompts_free(&p);
    slam_data *data = slam_data_new(8);
    CHECK(slam_data_add(data, path, 1) && slam_data_prepare(data, 62, 0, 0, NULL) && slam_prompts_data(&p, data, &first4), "%s",
          slam_error());
    CHECK(p.n == 2 && p.at[0].n == 5 && p.at[1].n == 5 && p.at[1].tokens[4] == 5, "%zu documents", p.n); // the empty one is none
    slam_prompts_free(&p);
    CHECK(slam_prompts_data(&p, data, &all) && p.n == 2 && p.at[1].n == 8, "%s", slam_error());
    slam_data_free(data);
    slam_prompts_free(&p);
    text_free(&t);
}

/* What is written can be read again, and has only what is made. */
static void test_output(slam_model *m) {
    slam_prompts p = fixture_prompts(), again = SLAM_ZERO;
    const slam_generation how = settings(usual, 20, 3);
    const slam_prompt_length all = {0, 0, 25};
    const char *path = check_path("out.jsonl");
    double sum = 0;
    CHECK(slam_generate(m, &how, &p, NULL, NULL), "%s", slam_error());
    free(p.at[2].continuation);
    p.at[2].continuation = NULL;
    CHECK(slam_prompts_write(&p, path) && slam_prompts_units(&again, path, &all, NULL) && again.n + 1 == p.n, "%s", slam_error());
    for (size_t i = 0; i < again.n; i++) {
        const slam_prompt *q = &p.at[i < 2 ? i : i + 1];
        CHECK(again.at[i].n == q->length + 1 && !strcmp(again.at[i].name, q->name) &&
                  memcmp(again.at[i].tokens + 1, q->continuation, sizeof(int) * (size_t)q->length) == 0,
              "%s is not what was written", q->name);
        sum += slam_unit_auto_bleu(q->continuation, (size_t)q->length, 2);
    }
    check_near("mean auto-BLEU-2", slam_prompts_auto_bleu(&p, 2), sum / (double)again.n, 1e-12);
    check_fails(slam_prompts_write(&p, check_path("no/such/folder.jsonl")), "cannot be written");
    check_fails(slam_prompts_may_write(check_path("no/such/folder.jsonl")), "cannot be written");
    check_fails(slam_prompts_may_write("test"), "is a folder");
    CHECK(slam_prompts_may_write(path) && path_is_file(path), "%s", slam_error());
    slam_prompts_free(&p), slam_prompts_free(&again);
}

static void test_texts(void) {
    const char texts[] = "a b a b\n\nnothing twice here\na, a, a"; // (ab ba ab: 2 of 3), 0, 0, (a, ,a a, ,a: 4 of 4)
    size_t n = 0;
    check_near("mean", slam_texts_auto_bleu(check_file("t.txt", texts, sizeof texts - 1), 2, &n), (2.0 / 3 + 1) / 4, 1e-12);
    CHECK(n == 4, "%zu lines", n);
    check_near("of nothing", slam_texts_auto_bleu(check_file("t.txt", "", 0), 2, &n), 0, 0);
    check_fails(slam_texts_auto_bleu(check_path("none.txt"), 2, &n) >= 0, "cannot be opened");
}

int main(void) {
    slam_ops *ops = slam_cpu(0);
    slam_model *m = slam_model_load(ops, FOLDER);
    if (!CHECK(m != NULL, "%s", slam_error()) || !fixture_open()) return check_end();
    for (int k = 0; k < 3; k++)
        if (TEST("greedy %d, token by token as Transformers", k)) test_greedy(m, k);
    for (int k = 0; k < 5; k++)
        if (TEST("distribution %d, as Transformers' processors leave it", k)) test_distribution(m, k);
    if (TEST("a cache gives what a whole pass gives")) test_cache(m);
    if (TEST("batch, order and room change nothing")) test_company(m);
    if (TEST("seeds, equal prompts, a part that is done already")) test_seeds(m);
    if (TEST("long, empty and stopped; wrong settings")) test_limits(m);
    if (TEST("decoder: full, wrong slots")) test_decoder_limits(m);
    if (TEST("a model that has gone wrong")) test_not_finite(ops);
    if (TEST("prompts from files")) test_prompt_files();
    if (TEST("continuations as a file")) test_output(m);
    if (TEST("auto-BLEU-2 of units")) test_repetition();
    if (TEST("auto-BLEU-2 of texts")) test_texts();
    free(prompt_tokens), free(prompt_lengths);
    tensors_close(file);
    slam_model_free(m);
    slam_ops_free(ops);
    return check_end();
}
