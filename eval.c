/* eval.c - what a model has learned. `./eval` alone scores the newest run on the bundled corpus's validation part, `./eval swuggy` (and
   so on) on a bundled test set, `./eval generate` lets it go on where the stories there have begun. `mpirun -np N ./eval ...` shares the
   work among N ranks, to the same figures and files. All ranks do what is below, the first one prints and writes; where one of them
   fails by itself, the others hear of it when they agree next, at the latest in the end. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    char *train, *json, *device, *dtype;
    int context, batch, threads;
    slam_unit_flags units; /* of audio */
    /* of test sets */
    char *unit_file, *split, *submission;
    int sum;
    /* of generate */
    char *out, *transcripts;
    double prompt_seconds, temperature, top_p, repetition_penalty;
    long seed;
    int prompt_units, rate, top_k, max_new, greedy;
} options;

static int flag_table(slam_flag *f, options *o) {
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Options", 0, 0, 0, 0},
        {"train", SLAM_TEXT, &o->train, "DATA", NULL, "count n-grams on this: what counting alone reaches on the same tokens", 0, 0,
         0, 0},
        {"context", SLAM_INT, &o->context, "N", NULL, "tokens of a row (the run's own, else 1024)", 2, 1 << 24, 0, 0},
        {"batch", SLAM_INT, &o->batch, "N", "8 | 64", "rows (generate: prompts) at once", 1, 1 << 20, 0, 0},
        {"json", SLAM_TEXT, &o->json, "FILE", NULL, "write the figures to this file", 0, 0, 0, 0},
        {"device", SLAM_TEXT, &o->device, "NAME", "auto", "auto, cpu, cuda or cuda:N", 0, 0, 0, 0},
        {"dtype", SLAM_CHOICE, &o->dtype, "auto|f32|bf16", "auto", "f32 on the CPU, bf16 on CUDA", 0, 0, 0, 0},
        {"threads", SLAM_INT, &o->threads, "N", "0", "of the CPU; 0: one a core", 0, 4096, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Audio", 0, 0, 0, 0},
        {"kmeans", SLAM_TEXT, &o->units.kmeans, "KM.npy", NULL, "whose units audio becomes; KM.json beside it says how", 0, 0, 0,
         0},
        {"hubert", SLAM_TEXT, &o->units.hubert, "DIR", NULL, "the model that KM.json names, where it has moved, or names none", 0,
         0, 0, 0},
        {"layer", SLAM_INT, &o->units.layer, "N", "11", "of --hubert", 0, 1000, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Test sets", 0, 0, 0, 0},
        {"units", SLAM_TEXT, &o->unit_file, "FILE.jsonl", NULL,
         "the sequences as units (SlamKit features or tokens), found by the names of the set's files", 0, 0, 0, 0},
        {"split", SLAM_CHOICE, &o->split, "dev|test", NULL, "of a folder with all of ZeroSpeech's (dev)", 0, 0, 0, 0},
        {"sum", SLAM_SWITCH, &o->sum, NULL, NULL, "compare sums of log-probabilities, not means", 0, 0, 0, 0},
        {"submission", SLAM_TEXT, &o->submission, "FILE", NULL, "write each file's score as ZeroSpeech takes them", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Generation", 0, 0, 0, 0},
        {"out", SLAM_TEXT, &o->out, "FILE", NULL, "FILE.jsonl: file_name, prompt and units of each continuation. Also -o", 0, 0, 0,
         0},
        {"prompt-seconds", SLAM_REAL, &o->prompt_seconds, "S", "3", "how much of a recording is its prompt; 0: all of it", 0, 1e6,
         0, 0},
        {"prompt-units", SLAM_INT, &o->prompt_units, "N", "0", "or its first N units; 0: by seconds", 0, 1 << 28, 0, 0},
        {"rate", SLAM_INT, &o->rate, "25|50", "25", "frames a second of the durations in PROMPTS.jsonl", 1, 1000, 0, 0},
        {"max-new", SLAM_INT, &o->max_new, "N", "150",
         "units of a continuation at most (no more than half the context unless it is given)", 1, 1 << 24, 0, 0},
        {"temperature", SLAM_REAL, &o->temperature, "X", "0.8", "logits are divided by it", 1e-6, 1e6, 0, 0},
        {"top-k", SLAM_INT, &o->top_k, "N", "25", "draw from the N most likely; 0: all", 0, 1 << 20, 0, 0},
        {"top-p", SLAM_REAL, &o->top_p, "P", "1", "draw from the most likely that make up P", 0, 1, 0, 0},
        {"repetition-penalty", SLAM_REAL, &o->repetition_penalty, "X", "1", "for what was there already; 1: none", 1e-3, 1e3, 0, 0},
        {"greedy", SLAM_SWITCH, &o->greedy, NULL, NULL, "take the most likely, draw nothing", 0, 0, 0, 0},
        {"seed", SLAM_LONG, &o->seed, "N", "0", "of the draws", 0, 0, 0, 0},
        {"transcripts", SLAM_TEXT, &o->transcripts, "FILE", NULL,
         "auto-BLEU-2 of texts, a line for each continuation that was heard; generates nothing", 0, 0, 0, 0},
    };
    const int n = (int)(sizeof table / sizeof *table);
    for (int i = 0; i < n; i++) f[i] = table[i];
    return n;
}

/* What a call opens. */
typedef struct job {
    options o;
    slam_flags flags;
    slam_flag table[36];
    int task;
    slam_list test, train; /* patterns */
    const char *note;      /* of the data that are scored, where the call does not name them */
    char *folder;
    slam_trainer run; /* of the run that the model is from; without settings where it is from none */
    slam_ranks *ranks;
    slam_ops *ops;
    slam_model *model;
    slam_quantiser *quantiser;
    slam_data *test_data, *train_data;
    slam_progress progress;
    size_t failed; /* audio files */
} job;

enum { PPL, SWUGGY, SBLIMP, STORYCLOZE, SALMON, GENERATE, TASKS };
static const char *const tasks[] = {"ppl", "swuggy", "sblimp", "storycloze", "salmon", "generate"};

static int task_of(const char *word) {
    int task = 0;
    while (task < TASKS && strcmp(word, tasks[task])) task++;
    return task;
}

/* [MODEL] [TASK [PATH...]]; 0: it is not that. */
static int read_arguments(job *j, const char **model) {
    static const char expected[] = "expected ppl, swuggy, sblimp, storycloze, salmon or generate";
    const slam_list *rest = &j->flags.rest;
    size_t task = 0;
    *model = NULL;
    j->task = PPL;
    if (rest->n && task_of(rest->at[0]) == TASKS) *model = rest->at[task++];
    if (task == rest->n && *model) return slam_refuse("the task is missing after %s, %s", *model, expected);
    if (task < rest->n && (j->task = task_of(rest->at[task])) == TASKS)
        return slam_refuse("%s: there is no such task, %s", rest->at[task], expected);
    for (size_t i = task + 1; i < rest->n; i++)
        if (!slam_list_add(&j->test, rest->at[i])) return 0;
    if (j->task > PPL && j->task < GENERATE && j->test.n > 1)
        return slam_refuse("%s: one test set at a time, after %s", j->test.at[1], j->test.at[0]);
    return !j->o.train || slam_list_add(&j->train, j->o.train);
}

/* Files are for the first rank to write. */
static void drop_files(options *o) {
    free(o->json), free(o->submission), free(o->out);
    o->json = o->submission = o->out = NULL;
}

static int bundled(const char *argv0, const char *name, slam_list *list) {
    char *path = slam_path_beside(argv0, name);
    const int ok = path && slam_list_add(list, path);
    free(path);
    return ok;
}

static const char *setting(const job *j, const char *name, const char *fallback) {
    const char *value = slam_settings_get(&j->run.settings, name);
    return value ? value : fallback;
}

/* Without DATA: what the run was validated on, beside n-grams counted on what it was trained on. A run that held nothing out is
   scored on its training data, a model that is from no run on the bundled corpus. */
static int name_data(job *j, const char *argv0) {
    slam_list given, train;
    if (j->test.n) return 1;
    memset(&given, 0, sizeof given);
    memset(&train, 0, sizeof train);
    if (!slam_settings_get(&j->run.settings, "data")) /* also a run of dpo, which has pairs */
        return bundled(argv0, "test/corpus/val.bin", &j->test) &&
               (j->train.n || bundled(argv0, "test/corpus/train.bin", &j->train));
    const int held_out = atof(setting(j, "val-fraction", "0")) > 0;
    int ok = slam_settings_recall_paths(&j->run.settings, "data", &given, &train);
    slam_list_free(&given);
    ok = ok && slam_settings_recall_paths(&j->run.settings, "val", &given, &j->test);
    if (ok && !train.n) // a run without DATA
        ok = bundled(argv0, "test/corpus/train.bin", &train) &&
             (held_out || j->test.n || bundled(argv0, "test/corpus/val.bin", &j->test));
    j->note = j->test.n ? "" : held_out ? " (what the run held out)" : " (what it was trained on: the run held nothing out)";
    for (size_t i = 0; ok && !j->test.n && i < train.n; i++) ok = slam_list_add(&given, train.at[i]);
    if (ok && !j->test.n) {
        j->test = given;
        memset(&given, 0, sizeof given);
    }
    for (size_t i = 0; ok && !j->train.n && i < train.n; i++) ok = slam_list_add(&given, train.at[i]);
    if (ok && !j->train.n) {
        slam_list_free(&j->train);
        j->train = given;
        memset(&given, 0, sizeof given);
    }
    slam_list_free(&given);
    slam_list_free(&train);
    return ok;
}

/* `fraction` is moved to *held_out as the run did it. */
static slam_data *open_data(const job *j, const slam_list *patterns, int context, double fraction, slam_data **held_out) {
    const int V = slam_model_config(j->model)->V;
    slam_data *data = slam_data_new(context);
    int ok = data != NULL, said;
    for (size_t i = 0; ok && i < patterns->n; i++) ok = slam_data_add(data, patterns->at[i], 1);
    ok = ok && slam_data_vocabulary(data, &said);
    if (ok && said && said != V) ok = slam_refuse("%s: a vocabulary of %d, the model has one of %d", patterns->at[0], said, V);
    if (ok && j->run.units && slam_data_fingerprint(data) && j->run.units != slam_data_fingerprint(data))
        ok = slam_refuse("%s: units of quantiser %08x, the model was trained on those of %08x", patterns->at[0],
                         (unsigned)slam_data_fingerprint(data), (unsigned)j->run.units);
    if (ok && slam_data_prepare(data, V, fraction, (uint64_t)atoll(setting(j, "seed", "0")), held_out)) return data;
    slam_data_free(data);
    return NULL;
}

/* N-grams are counted by the first rank. */
static int open_all(job *j, int context, int named) {
    const double fraction = named ? 0 : atof(setting(j, "val-fraction", "0"));
    if (fraction > 0) return (j->train_data = open_data(j, &j->test, context, fraction, &j->test_data)) != NULL;
    if (!(j->test_data = open_data(j, &j->test, context, 0, NULL))) return 0;
    return !j->train.n || !slam_ranks_root(j->ranks) || (j->train_data = open_data(j, &j->train, context, 0, NULL)) != NULL;
}

static int write_json(const char *path, double nll, uint64_t n, const double *ngrams) {
    static const char *const names[] = {"unigram", "bigram", "trigram", "fourgram", "fivegram"};
    FILE *f = fopen(path, "w");
    if (!f) return slam_refuse("%s: cannot be written", path);
    fprintf(f, "{\"task\": \"ppl\", \"n\": %llu, \"nll\": %.17g, \"perplexity\": %.17g", (unsigned long long)n, nll, exp(nll));
    for (int k = 0; ngrams && k < 5; k++) fprintf(f, ", \"%s\": %.17g", names[k], ngrams[k]);
    fprintf(f, "}\n");
    const int failed = ferror(f);
    return fclose(f) == 0 && !failed ? 1 : slam_refuse("%s: cannot be written", path);
}

/* Tokens of a row, where --context does not say it: the run's own, as far as the model has positions for them. */
static int context_of(const job *j) {
    const int T = slam_model_config(j->model)->T, context = atoi(setting(j, "context", "1024"));
    return j->o.context ? j->o.context : context < T ? context : T;
}

/* Whether a file that is made last can be made at all. */
static int may_write(const char *path) { return !path || slam_prompts_may_write(path); }

/* ---- audio ---- */

static int open_quantiser(job *j) {
    slam_speech_settings settings;
    if (!j->o.units.kmeans)
        return slam_refuse("%s: is audio: --kmeans KM.npy makes units of it", j->test.n ? j->test.at[0] : "the set");
    if (!slam_unit_settings(&j->flags, &j->o.units, 0, &settings)) return 0;
    if (!(j->quantiser = slam_quantiser_open(j->o.units.kmeans, &settings, j->ops))) return 0;
    const uint32_t made = slam_quantiser_fingerprint(j->quantiser);
    if (j->run.units && j->run.units != made)
        return slam_refuse("%s: units of quantiser %08x, the model was trained on those of %08x", j->o.units.kmeans, (unsigned)made,
                           (unsigned)j->run.units);
    if (slam_quantiser_count(j->quantiser) > slam_model_config(j->model)->V - 2)
        return slam_refuse("%s: %d units, the model has a vocabulary of %d, which is room for %d", j->o.units.kmeans,
                           slam_quantiser_count(j->quantiser), slam_model_config(j->model)->V, slam_model_config(j->model)->V - 2);
    return 1;
}

static int listen(void *context, const slam_speech_progress *p) {
    job *j = (job *)context;
    if (p->failed) {
        slam_progress_clear(&j->progress);
        if (slam_ranks_root(j->ranks)) fprintf(stderr, "eval: left out: %s\n", p->because ? p->because : p->failed);
        j->failed++;
        return 1;
    }
    slam_progress_show(&j->progress, (double)p->done, (double)p->of, "listening");
    return !slam_signals_stop();
}

/* ---- test sets ---- */

static slam_testset *open_set(job *j, const char *argv0) {
    static const int kinds[] = {0, SLAM_SWUGGY, SLAM_SBLIMP, SLAM_STORYCLOZE, SLAM_SALMON};
    options *o = &j->o;
    char folder[64];
    snprintf(folder, sizeof folder, "test/corpus/%s", tasks[j->task]);
    if (!j->test.n && !o->unit_file && j->task == SALMON) {
        slam_refuse("salmon: expected the folder of SALMon's parts");
        return NULL;
    }
    if (!j->test.n && !o->unit_file && !(slam_bundled_units(argv0, j->run.units) && bundled(argv0, folder, &j->test))) return NULL;
    char *units = o->unit_file;
    slam_testset *set =
        slam_testset_open(kinds[j->task], j->test.n ? j->test.at[0] : NULL, o->split, o->units.kmeans != NULL, &units);
    if (set && units != o->unit_file) slam_flags_set(&j->flags, "units", units);
    if (units != o->unit_file) free(units);
    return set;
}

/* The sequences: of the file of units, or of audio, of which every file must be heard. */
static int hear_set(job *j, const slam_testset *set, slam_units *units) {
    slam_list paths;
    if (j->o.unit_file) return slam_testset_units(set, j->o.unit_file, slam_model_config(j->model)->V - 2, units);
    memset(&paths, 0, sizeof paths);
    slam_sources *sources = open_quantiser(j) && slam_testset_audio(set, &paths) ? slam_sources_audio(&paths, 0) : NULL;
    if (sources) slam_sources_ranks(sources, j->ranks);
    int ok = sources && slam_quantiser_sources(j->quantiser, sources, units, listen, j);
    slam_progress_clear(&j->progress);
    if (ok && j->failed) ok = slam_refuse("%zu of the set's files cannot be heard: no figure can be given", j->failed);
    slam_sources_free(sources);
    slam_list_free(&paths);
    return ok;
}

static int weigh(void *context, uint64_t done, uint64_t of) {
    slam_progress *bar = (slam_progress *)context;
    const double seconds = slam_clock() - bar->began;
    char what[64], rate[32];
    snprintf(what, sizeof what, "%s tokens/s", slam_spell_count(rate, (double)done / (seconds > 1e-3 ? seconds : 1e-3)));
    slam_progress_show(bar, (double)done, (double)of, what);
    return !slam_signals_stop();
}

static void print_accuracies(const slam_accuracy *a, size_t n) {
    printf("\n%-28s %7s %9s   95%% interval\n", "", "pairs", "accuracy");
    for (size_t i = 0; i < n; i++) {
        if (i && strcmp(a[i].group, a[i - 1].group)) printf("by %s\n", a[i].group);
        printf("%-28.60s %7zu", i ? a[i].name : "all", a[i].n);
        if (a[i].n) printf(" %8.2f%%", 100 * a[i].mean);
        if (a[i].n > 1) printf("   +- %.2f", 196 * a[i].deviation / sqrt((double)a[i].n));
        printf("\n");
    }
}

static int score_set(job *j, slam_testset *set) {
    const options *o = &j->o;
    const size_t items = slam_testset_items(set)->n;
    const int context = context_of(j);
    slam_units *units = (slam_units *)calloc(items ? items : 1, sizeof *units);
    double *scores = (double *)calloc(items ? items : 1, sizeof *scores);
    slam_scored report;
    size_t n;
    int ok = units && scores ? hear_set(j, set, units) : slam_refuse("out of memory");
    slam_progress_begin(&j->progress);
    ok = ok && slam_score_units(j->model, units, items, o->batch, context, o->sum, scores, &report, weigh, &j->progress);
    slam_progress_clear(&j->progress);
    const slam_accuracy *a = ok ? slam_testset_accuracies(set, scores, &n) : NULL;
    if (a) {
        print_accuracies(a, n);
        printf("by the %s of log-probabilities over %llu tokens of %zu sequences", o->sum ? "sum" : "mean",
               (unsigned long long)report.tokens, items);
        if (report.different < items) printf(", %zu of them different", report.different);
        if (report.slid) printf("; %zu are longer than a row of %d, which slides over them", report.slid, context);
        if (report.silent) printf("; %zu have no unit", report.silent);
        printf("\n");
        ok = (!o->json || slam_testset_write(set, tasks[j->task], o->sum, scores, o->json)) &&
             (!o->submission || slam_testset_submission(set, scores, o->submission));
    }
    for (size_t i = 0; units && i < items; i++) slam_units_free(&units[i]);
    free(units);
    free(scores);
    return a && ok;
}

static int test_set(job *j, const char *argv0) {
    slam_testset *set = open_set(j, argv0);
    if (!set) return 0;
    printf("set      %s, %zu sequences\n", j->test.n ? j->test.at[0] : j->o.unit_file, slam_testset_items(set)->n);
    if (j->o.unit_file) printf("units    %s\n", j->o.unit_file);
    fflush(stdout);
    const int ok = may_write(j->o.json) && may_write(j->o.submission) && score_set(j, set);
    slam_testset_free(set);
    return ok;
}

/* ---- generate ---- */

typedef struct generation {
    job *job;
    slam_prompts prompts;
    uint64_t tokens;
    int stopped;
} generation;

static int ends_in(const char *path, const char *end) {
    const size_t n = strlen(path), m = strlen(end);
    return n > m && !strcmp(path + n - m, end);
}

static int hear_prompts(generation *g, const slam_list *arguments, const slam_prompt_length *length) {
    job *j = g->job;
    slam_list files;
    memset(&files, 0, sizeof files);
    int ok = open_quantiser(j) && slam_audio_list(&files, (const char *const *)arguments->at, arguments->n) &&
             slam_prompts_audio(&g->prompts, j->quantiser, j->ranks, &files, length, listen, j);
    slam_progress_clear(&j->progress);
    slam_list_free(&files);
    return ok;
}

/* PROMPTS, or the beginnings of the bundled corpus's validation part. */
static int find_prompts(generation *g, const char *argv0) {
    job *j = g->job;
    const slam_prompt_length length = {(size_t)j->o.prompt_units, j->o.prompt_units ? 0 : j->o.prompt_seconds, j->o.rate};
    slam_list audio;
    size_t guessed, all_guessed = 0, lists = 0;
    memset(&audio, 0, sizeof audio);
    int ok = j->test.n || bundled(argv0, "test/corpus/val.bin", &j->test);
    for (size_t i = 0; ok && i < j->test.n; i++) {
        const char *path = j->test.at[i];
        slam_list one = {&j->test.at[i], 1, 1};
        if (ends_in(path, ".jsonl")) {
            ok = slam_prompts_units(&g->prompts, path, &length, &guessed);
            all_guessed += ok ? guessed : 0;
        } else if (ends_in(path, ".bin")) {
            slam_data *data = open_data(j, &one, slam_model_config(j->model)->T, 0, NULL);
            ok = data && slam_prompts_data(&g->prompts, data, &length);
            lists += length.seconds > 0;
            slam_data_free(data);
        } else ok = slam_list_add(&audio, path);
    }
    ok = ok && (!audio.n || hear_prompts(g, &audio, &length));
    slam_list_free(&audio);
    if (ok && !g->prompts.n) return slam_refuse("%s: there is no prompt in it", j->test.at[0]);
    if (ok && (lists || all_guessed)) j->note = " (no durations: 18 units a second; --prompt-units N takes N)";
    return ok;
}

static int watch(void *context, size_t done, uint64_t tokens) {
    generation *g = (generation *)context;
    const double seconds = slam_clock() - g->job->progress.began, of = (double)g->prompts.n, most = of * g->job->o.max_new;
    const double share = (double)tokens / most > (double)done / of ? (double)tokens / most : (double)done / of;
    char what[96], rate[32];
    snprintf(what, sizeof what, "%zu/%zu prompts  %s tokens/s", done, g->prompts.n,
             slam_spell_count(rate, (double)tokens / (seconds > 1e-3 ? seconds : 1e-3)));
    slam_progress_show(&g->job->progress, share, 1, what);
    g->tokens = tokens;
    g->stopped = slam_signals_stop();
    return !g->stopped;
}

/* The figures, and the file; a part of the continuations is kept as FILE.partial. */
static int tell_generation(generation *g, double seconds) {
    const options *o = &g->job->o;
    size_t done = 0, ended = 0, cut = 0;
    char rate[32], tokens[32], time[32], *partial = NULL;
    for (size_t i = 0; i < g->prompts.n; i++) {
        const slam_prompt *p = &g->prompts.at[i];
        done += p->continuation != NULL;
        ended += p->continuation && p->ended;
        cut += p->cut > 0;
    }
    const double share = slam_prompts_auto_bleu(&g->prompts, 2);
    if (share < 0) return 0;
    if (cut) printf("%zu prompts were longer than the context of %d leaves room for, and lost their beginnings\n", cut, o->context);
    printf("%zu continuations, of which %zu ended by themselves: %s tokens in %s, %s tokens/s\nauto-BLEU-2 of units  %.4f\n", done,
           ended, slam_spell_count(tokens, (double)g->tokens), slam_spell_time(time, seconds),
           slam_spell_count(rate, (double)g->tokens / seconds), share);
    int ok = 1;
    if (o->out && g->stopped) {
        const size_t n = strlen(o->out) + 9;
        ok = (partial = (char *)malloc(n)) != NULL;
        if (ok) snprintf(partial, n, "%s.partial", o->out);
    }
    const char *path = partial ? partial : o->out;
    ok = ok && (!path || slam_prompts_write(&g->prompts, path));
    if (ok && path) printf("written to %s\n", path);
    if (ok && g->stopped) printf("stopped after %zu of %zu prompts; the same command begins anew\n", done, g->prompts.n);
    free(partial);
    return ok;
}

static int write_generation_json(const generation *g) {
    FILE *f = fopen(g->job->o.json, "w");
    if (!f) return slam_refuse("%s: cannot be written", g->job->o.json);
    fprintf(f, "{\"task\": \"generate\", \"n\": %zu, \"tokens\": %llu, \"auto_bleu_2\": %.17g}\n", g->prompts.n,
            (unsigned long long)g->tokens, slam_prompts_auto_bleu(&g->prompts, 2));
    const int failed = ferror(f);
    return fclose(f) == 0 && !failed ? 1 : slam_refuse("%s: cannot be written", g->job->o.json);
}

static int score_transcripts(const char *path) {
    size_t n;
    const double share = slam_texts_auto_bleu(path, 2, &n);
    if (share >= 0) printf("auto-BLEU-2 of texts  %.4f over %zu lines of %s\n", share, n, path);
    return share >= 0;
}

static int generate(job *j, const char *argv0) {
    options *o = &j->o;
    generation g;
    memset(&g, 0, sizeof g);
    g.job = j;
    o->context = context_of(j);
    if (!slam_flags_given(&j->flags, "max-new") && o->max_new > o->context / 2) o->max_new = o->context / 2;
    const slam_generation how = {{o->greedy ? 0 : o->temperature, o->top_k, o->top_p, o->repetition_penalty},
                                 o->max_new,
                                 o->context,
                                 o->batch,
                                 (uint64_t)o->seed};
    int ok = may_write(o->out) && may_write(o->json) && find_prompts(&g, argv0);
    if (ok) {
        printf("prompts  %zu%s\n", g.prompts.n, j->note ? j->note : "");
        for (size_t i = 0; i < j->test.n; i++) printf("         %s\n", j->test.at[i]);
        fflush(stdout);
        slam_progress_begin(&j->progress);
        ok = slam_generate(j->model, &how, &g.prompts, watch, &g);
        const double seconds = slam_clock() - j->progress.began;
        slam_progress_clear(&j->progress);
        g.stopped = ok && slam_ranks_max(j->ranks, g.stopped);
        ok = ok && tell_generation(&g, seconds) && (!o->json || g.stopped || write_generation_json(&g));
    }
    slam_prompts_free(&g.prompts);
    return ok;
}

/* ---- perplexity ---- */

static int perplexity(job *j, const char *argv0) {
    static const char *const names[] = {"unigram", "bigram", "trigram", "4-gram", "5-gram"};
    const options *o = &j->o;
    const int context = o->context ? o->context : atoi(setting(j, "context", "1024")), named = j->test.n > 0;
    double nll, ngrams[5];
    uint64_t targets, same;
    int counts;
    if (!name_data(j, argv0) || !open_all(j, context, named)) return 0;
    for (size_t i = 0; i < j->test.n; i++) printf("%s%s%s\n", i ? "         " : "data     ", j->test.at[i], j->note ? j->note : "");
    for (size_t i = 0; i < j->train.n; i++) printf("%s%s\n", i ? "         " : "n-grams  counted on ", j->train.at[i]);
    fflush(stdout);
    if (!slam_model_plan(j->model, o->batch, context, SLAM_INFERENCE) ||
        !slam_score_data(j->model, j->test_data, -1, o->batch, &nll, &targets))
        return 0;
    if (!targets) return slam_refuse("%s: no token to predict", j->test.at[0]);
    if (!isfinite(nll)) return slam_refuse("%s: the model's loss on %s is not finite", j->folder, j->test.at[0]);
    printf("\n                nats a token   perplexity\nmodel           %12.4f %12.2f\n", nll, exp(nll));
    counts = j->train_data && slam_ranks_root(j->ranks);
    if (counts && !slam_ngrams(j->train_data, j->test_data, slam_model_config(j->model)->V, ngrams, &same)) return 0;
    if (counts && same != targets)
        return slam_refuse("%s: n-grams predict %llu tokens, the model %llu: they cannot be compared", j->test.at[0],
                           (unsigned long long)same, (unsigned long long)targets);
    for (int k = 0; counts && k < 5; k++) printf("%-15s %12.4f %12.2f\n", names[k], ngrams[k], exp(ngrams[k]));
    printf("over %llu tokens in rows of %d%s\n", (unsigned long long)targets, context,
           counts ? "; n-grams are interpolated (Witten-Bell)" : "");
    return !o->json || write_json(o->json, nll, targets, counts ? ngrams : NULL);
}

static int evaluate(job *j, const char *argv0, const char *path) {
    const options *o = &j->o;
    char note[256], spelled[32];
    if (j->task == GENERATE && o->transcripts) return score_transcripts(o->transcripts);
    if (!(j->folder = slam_run_model(path)) || !(j->ops = slam_device(j->ranks, o->device, o->dtype, o->threads, note))) return 0;
    if (!slam_ranks_agree(j->ranks, (j->model = slam_model_load(j->ops, j->folder)) != NULL)) return 0;
    slam_trainer_read(&j->run, j->folder); /* a model that others made has none */
    const int ranks = slam_ranks_count(j->ranks);
    printf("device   %s%s%s%s", j->ops->name, *note ? " (" : "", note, *note ? ")" : "");
    if (ranks > 1) printf(" on each of %d ranks", ranks);
    printf("\nmodel    %s: %s parameters\n", j->folder,
           slam_spell_count(spelled, (double)slam_config_parameters(slam_model_config(j->model))));
    if (j->task != PPL) slam_signals_catch(j->ranks); /* ppl ends where it stands */
    slam_progress_begin(&j->progress);
    return j->task == PPL ? perplexity(j, argv0) : j->task == GENERATE ? generate(j, argv0) : test_set(j, argv0);
}

int main(int argc, char **argv) {
    job j;
    const char *model = NULL;
    memset(&j, 0, sizeof j);
    if (!(j.ranks = slam_program_begin("eval"))) return 1;
    j.flags.program = "eval";
    j.flags.usage = "[MODEL] ppl [DATA...] [options]\n       eval [MODEL] swuggy|sblimp|storycloze|salmon [PATH] [options]\n       "
                    "eval [MODEL] generate [PROMPTS...] [options]";
    j.flags.about =
        "Scores a model: a folder with config.json and model.safetensors, or a run, of which the newest checkpoint is taken; "
        "without one the newest run. ppl: loss and perplexity on token shards (.bin) or unit files (.jsonl); without DATA on "
        "what the run was validated on, beside n-gram models counted on what it was trained on. swuggy, "
        "sblimp, storycloze, salmon: how often the right one of a pair is the likelier; PATH is a folder of ZeroSpeech 2021 (gold.csv), of "
        "SlamKit's pairs of files, or of SALMon's parts, as audio or with units; without PATH a bundled set. generate: continues PROMPTS, "
        "which are audio, unit files or token shards; without PROMPTS the bundled validation part.";
    j.flags.at = j.table;
    j.flags.n = flag_table(j.table, &j.o);
    const int parsed = slam_flags_parse(&j.flags, argc, argv);
    int status =
        parsed == 0 || (parsed == 1 && (!read_arguments(&j, &model) || !slam_flags_defaults(&j.flags, j.task == GENERATE) ||
                                        !slam_device_check(j.o.device)))
            ? 2
            : 0;
    if (!slam_ranks_root(j.ranks)) drop_files(&j.o);
    if (status == 0) {
        int ok = parsed == 2 || evaluate(&j, argv[0], model);
        if (ok && (fflush(stdout) != 0 || ferror(stdout))) ok = slam_refuse("stdout: cannot be written");
        status = !slam_ranks_agree(j.ranks, ok) ? 1 : j.failed ? 3 : 0;
    }
    slam_program_end(&j.flags, j.ranks, status);
    slam_data_free(j.test_data);
    slam_data_free(j.train_data);
    slam_quantiser_free(j.quantiser);
    slam_model_free(j.model);
    slam_ops_free(j.ops);
    slam_list_free(&j.test);
    slam_list_free(&j.train);
    slam_trainer_free(&j.run);
    slam_flags_free(&j.flags);
    free(j.folder);
    return status;
}
