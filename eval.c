/* eval.c - measures a model. `./eval` alone: the perplexity of the newest run, next to that of n-gram models; `./eval
   swuggy` (sblimp, storycloze, salmon): how often it prefers the correct one of two sequences; `./eval generate`:
   continues prompts; `./eval resynthesize` turns units back into audio, as generate does with --wav.

   Each task is a pair of functions: open_perplexity and perplexity, open_set and score_pairs, open_prompts and generate
   or synthesize. main, at the end, calls them. `mpirun -np N ./eval ...` shares the work among N ranks, with the same
   numbers and files; rank 0 prints and writes. */
#define _POSIX_C_SOURCE 200809L /* getline */
#include "slam.h"
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PPL, SWUGGY, SBLIMP, STORYCLOZE, SALMON, GENERATE, RESYNTHESIZE, TASKS };
static const char *const task_names[TASKS] = {"ppl",    "swuggy",   "sblimp",      "storycloze",
                                              "salmon", "generate", "resynthesize"};

typedef struct program {
    const char *argv0;
    slam_comm *comm;
    slam_flags flags;
    slam_flag table[44];
    /* flags */
    char *train, *json, *device, *dtype, *units, *split, *submission, *out, *transcripts, *wav, *vocoder_folder;
    slam_unit_flags unit_flags;
    slam_generation how;
    double prompt_seconds;
    long seed;
    int context, batch, threads, sum, prompt_units, rate, greedy, wav_prompt, speaker, style;
    /* arguments */
    int task;
    const char *path;           /* model or run; NULL: the newest run */
    slam_strings data, counted; /* what is measured, as given or by default; what n-grams are counted on */
    /* what is opened */
    slam_ops *ops;
    slam_model *model;
    char *folder;     /* of the model */
    slam_trainer run; /* that it is from; zeros if that is not known */
    slam_data *opened[2], *test_data, *train_data;
    slam_tokenizer *tokenizer;
    slam_testset *set;
    slam_units *set_units; /* (set->items.n) */
    slam_prompts prompts;
    slam_vocoder *vocoder;
    slam_strings wavs; /* (prompts.n) the names of their WAV files, without .wav */
    size_t n_spoken;   /* prompts that are synthesised so far */
    slam_bar bar;
    size_t skipped; /* audio files that cannot be decoded, prompts without units */
} program;

static int is_root(const program *p) { return p->comm->rank == 0; }

static int n_units(const program *p) {
    if (p->model) return p->model->config.V - 2;
    return p->vocoder ? p->vocoder->K : p->tokenizer ? p->tokenizer->K : 65534;
}

static const char *setting(const program *p, const char *name, const char *fallback) {
    const char *value = slam_trainer_setting(&p->run, name, 0);
    return value ? value : fallback;
}

/* --context, else the run's, as far as the model has positions. */
static int context_of(const program *p) {
    const int T = p->model->config.T, context = atoi(setting(p, "context", "1024"));
    return p->context ? p->context : context < T ? context : T;
}

static int ends_in(const char *path, const char *end) {
    const size_t n = strlen(path), m = strlen(end);
    return n > m && !strcmp(path + n - m, end);
}

static void add_bundled(const program *p, const char *name, slam_strings *list) {
    slam_strings_add(list, slam_path_beside(p->argv0, name).at);
}

/* The progress callback: files of tokenize and synthesize, tokens of all else. */
static int show_progress(void *context, const slam_progress *progress) {
    program *p = (program *)context;
    const int synthesizes = !strcmp(progress->stage, "synthesize"); /* reports on one prompt */
    const double total = synthesizes ? (double)p->prompts.n : progress->total;
    const double done = synthesizes ? (double)p->n_spoken + progress->done / progress->total : progress->done;
    char text[96], count[32];
    if (progress->skipped) {
        slam_bar_clear(&p->bar);
        fprintf(stderr, "eval: skipped: %s\n", progress->reason);
        return !slam_stop_requested();
    }
    if (synthesizes || !strcmp(progress->stage, "tokenize"))
        snprintf(text, sizeof text, "%s %.0f/%.0f files", progress->stage, floor(done), total);
    else
        snprintf(text, sizeof text, "%s  %s tokens/s", progress->stage,
                 slam_format_count(count, done / (slam_clock() - p->bar.began + 1e-3)));
    slam_bar_show(&p->bar, done, total, text);
    return !slam_stop_requested();
}

static int write_json(const program *p, const slam_metric *metrics, int n) {
    return !p->json || slam_metrics_write(task_names[p->task], metrics, n, p->json);
}

static int open_model(program *p) {
    char count[32];
    if (p->task == RESYNTHESIZE) {
        slam_threads(p->comm, p->threads);
        return !p->vocoder_folder || (p->ops = slam_device(p->comm, p->device, p->dtype, p->threads)) != NULL;
    }
    if (!(p->folder = slam_run_model(p->path, NULL))) return 0;
    if (!(p->ops = slam_device(p->comm, p->device, p->dtype, p->threads))) return 0;
    p->model = slam_model_load(p->ops, p->folder);
    if (!slam_all_ok(p->comm, p->model != NULL)) return 0;
    if (!slam_trainer_load(&p->run, p->folder)) memset(&p->run, 0, sizeof p->run); /* a model from elsewhere */
    printf("model    %s: %s parameters\n", p->folder,
           slam_format_count(count, (double)slam_config_parameters(&p->model->config)));
    return p->context <= p->model->config.T ||
           slam_set_error("--context %d: %s has up to %d positions", p->context, p->folder, p->model->config.T);
}

/* ---- perplexity ---- */

/* Whether the model was trained on units of this tokenizer, as far as both are known. */
static int check_tokenizer(const program *p, const char *path, uint64_t fingerprint) {
    if (!p->run.units || !fingerprint || p->run.units == fingerprint) return 1;
    return slam_set_error("%s: units of tokenizer %08x, the model was trained on units of %08x", path,
                          (unsigned)fingerprint, (unsigned)p->run.units);
}

/* Data of the model's units. `fraction` of it is held out, chosen as the run chose it. */
static slam_data *open_data(const program *p, const slam_strings *paths, int context, double fraction) {
    const int V = n_units(p) + 2;
    slam_data *data = slam_data_new(context);
    int ok = data != NULL;
    for (size_t i = 0; ok && i < paths->n; i++) ok = slam_data_add(data, paths->at[i], 1);
    if (ok && data->V && data->V != V)
        ok = slam_set_error("%s: the vocabulary is %d, the %s %d", paths->at[0], data->V,
                            p->model ? "model's" : "centroids'", V);
    ok = ok && check_tokenizer(p, paths->at[0], data->fingerprint);
    if (ok && slam_data_prepare(data, V, fraction, (uint64_t)atoll(setting(p, "seed", "0")))) return data;
    slam_data_free(data);
    return NULL;
}

/* Without DATA: the run's validation data, or what it held out of its training data, or its training data; n-grams are
   counted on its training data. A model from elsewhere, or from dpo, is measured on the bundled data. */
static int open_perplexity(program *p) {
    const int context = context_of(p), by_default = !p->data.n;
    const int of_train = by_default && !strcmp(setting(p, "program", ""), "train");
    const double fraction = of_train ? atof(setting(p, "val-fraction", "0")) : 0;
    const char *note = fraction > 0 ? " (what the run held out)" : "";
    if (of_train) slam_trainer_paths(&p->run, "val", &p->data);
    if (of_train && !p->counted.n) slam_trainer_paths(&p->run, "data", &p->counted);
    if (of_train && !p->data.n) {
        slam_trainer_paths(&p->run, "data", &p->data);
        if (p->data.n && fraction <= 0) note = " (its training data: the run held nothing out)";
    }
    if (!p->data.n) add_bundled(p, fraction > 0 ? "test/corpus/train.bin" : "test/corpus/val.bin", &p->data);
    if (by_default && !p->counted.n) add_bundled(p, "test/corpus/train.bin", &p->counted);
    for (size_t i = 0; i < p->data.n; i++) printf("%s%s%s\n", i ? "         " : "data     ", p->data.at[i], note);
    for (size_t i = 0; i < p->counted.n; i++) printf("%s%s\n", i ? "         " : "n-grams  of ", p->counted.at[i]);
    fflush(stdout);
    if (!(p->opened[0] = open_data(p, &p->data, context, fraction))) return 0;
    p->test_data = fraction > 0 ? p->opened[0]->held_out : p->opened[0];
    if (fraction > 0 && !p->train) p->train_data = p->opened[0];
    else if (p->counted.n && is_root(p)) p->train_data = p->opened[1] = open_data(p, &p->counted, context, 0);
    return !p->counted.n || !is_root(p) || p->train_data != NULL;
}

static int perplexity(program *p) {
    static const char *const names[] = {"unigram", "bigram", "trigram", "4-gram", "5-gram"};
    static const char *const keys[] = {"unigram", "bigram", "trigram", "fourgram", "fivegram"};
    const int context = p->test_data->context;
    const char *data = p->data.at[0];
    double *losses = (double *)calloc(1 + p->test_data->n_sources, sizeof *losses), ngrams[5];
    uint64_t targets, counted;
    slam_batch batch = slam_batch_new(p->batch, context, 0);
    const int ok = slam_model_plan(p->model, p->batch, context, SLAM_INFERENCE) &&
                   slam_data_loss(p->model, p->test_data, &batch, losses, &targets);
    const double loss = losses[0];
    free(losses);
    slam_batch_free(&batch);
    if (!ok) return 0;
    if (!targets) return slam_set_error("%s: no token to predict", data);
    if (!isfinite(loss)) return slam_set_error("%s: the model's loss on %s is not finite", p->folder, data);
    printf("\n               nats per token   perplexity\nmodel           %13.4f %12.2f\n", loss, exp(loss));
    slam_metric metrics[8] = {{"n", (double)targets}, {"nll", loss}, {"perplexity", exp(loss)}};
    if (p->train_data && !slam_ngrams(p->train_data, p->test_data, p->model->config.V, ngrams, &counted)) return 0;
    if (p->train_data && counted != targets)
        return slam_set_error("%s: n-grams predict %llu tokens, the model %llu", data, (unsigned long long)counted,
                              (unsigned long long)targets);
    for (int k = 0; p->train_data && k < 5; k++) {
        printf("%-15s %13.4f %12.2f\n", names[k], ngrams[k], exp(ngrams[k]));
        metrics[3 + k].name = keys[k];
        metrics[3 + k].value = ngrams[k];
    }
    printf("%llu tokens in rows of %d%s\n", (unsigned long long)targets, context,
           p->train_data ? "; n-grams are interpolated (Witten-Bell)" : "");
    return write_json(p, metrics, p->train_data ? 8 : 3);
}

/* ---- units of audio ---- */

static int open_tokenizer(program *p) {
    slam_unit_config config;
    const char *kmeans = p->unit_flags.kmeans;
    if (p->tokenizer) return 1;
    if (!kmeans)
        return slam_set_error("%s: is audio, expected --kmeans KM.npy as well", p->data.n ? p->data.at[0] : "the set");
    if (!slam_unit_flags_config(&p->flags, &p->unit_flags, 0, &config)) return 0;
    if (!(p->tokenizer = slam_tokenizer_load(kmeans, &config, p->ops))) return 0;
    if (!check_tokenizer(p, kmeans, p->tokenizer->fingerprint)) return 0;
    return p->tokenizer->K <= n_units(p) || slam_set_error("%s: has %d units, the %s %d", kmeans, p->tokenizer->K,
                                                           p->model ? "model" : "vocoder", n_units(p));
}

/* Units of audio files (paths->n), NULL on failure. Counts the files that are skipped. */
static slam_units *tokenize(program *p, const slam_strings *paths) {
    slam_units *units = (slam_units *)calloc(paths->n + 1, sizeof *units);
    slam_bar_begin(&p->bar);
    const int ok = slam_audio_units(p->tokenizer, p->comm, paths, units, show_progress, p);
    slam_bar_clear(&p->bar);
    for (size_t i = 0; ok && i < paths->n; i++) p->skipped += units[i].samples == 0;
    if (ok) return units;
    free(units);
    return NULL;
}

/* ---- test sets: is the correct sequence of a pair the more likely one? ---- */

static int open_set(program *p) {
    static const int kinds[] = {0, SLAM_SWUGGY, SLAM_SBLIMP, SLAM_STORYCLOZE, SLAM_SALMON};
    char folder[64];
    snprintf(folder, sizeof folder, "test/corpus/%s", task_names[p->task]);
    if (!p->data.n && !p->units) {
        if (p->task == SALMON) return slam_set_error("salmon: expected the folder of SALMon's parts");
        if (!slam_bundled_units(p->argv0, p->run.units)) return 0;
        add_bundled(p, folder, &p->data);
    }
    const char *path = p->data.n ? p->data.at[0] : NULL;
    p->set = slam_testset_open(kinds[p->task], path, p->split, p->unit_flags.kmeans != NULL, p->units);
    if (!p->set) return 0;
    printf("set      %s, %zu sequences\n", path ? path : p->units, p->set->items.n);
    if (p->set->units) printf("units    %s\n", p->set->units);
    fflush(stdout);
    if (p->set->units) {
        p->set_units = (slam_units *)calloc(p->set->items.n, sizeof *p->set_units);
        return slam_testset_read_units(p->set, n_units(p), p->set_units);
    }
    slam_strings paths = {NULL, 0, 0};
    if (open_tokenizer(p) && slam_testset_audio(p->set, &paths)) p->set_units = tokenize(p, &paths);
    slam_strings_free(&paths);
    return p->set_units && (!p->skipped || slam_set_error("%zu of the set's files cannot be decoded", p->skipped));
}

static void print_accuracies(const slam_testset *set) {
    printf("\n%-28s %7s %9s   95%% interval\n", "", "pairs", "accuracy");
    for (size_t i = 0; i < set->n_accuracies; i++) {
        const slam_accuracy *a = &set->accuracies[i];
        if (i && strcmp(a->group, a[-1].group)) printf("by %s\n", a->group);
        printf("%-28.60s %7zu", i ? a->name : "all", a->n);
        if (a->n) printf(" %8.2f%%", 100 * a->mean);
        if (a->n > 1) printf("   +- %.2f", 196 * a->deviation / sqrt((double)a->n));
        printf("\n");
    }
}

static int score_pairs(program *p) {
    slam_testset *set = p->set;
    const size_t n = set->items.n;
    const int context = context_of(p);
    double *scores = (double *)calloc(n, sizeof *scores);
    size_t windowed = 0, tokens = 0;
    for (size_t i = 0; i < n; i++) tokens += p->set_units[i].n + 1;
    for (size_t i = 0; i < n; i++) windowed += p->set_units[i].n >= (size_t)context;
    slam_bar_begin(&p->bar);
    int ok = slam_score(p->model, p->set_units, n, p->batch, context, p->sum, scores, show_progress, p);
    slam_bar_clear(&p->bar);
    if (ok) {
        slam_testset_score(set, scores);
        print_accuracies(set);
        printf("by the %s of log-probabilities over %zu tokens of %zu sequences", p->sum ? "sum" : "mean", tokens, n);
        if (windowed) printf("; %zu are longer than a row of %d and scored in windows", windowed, context);
        printf("\n");
        ok = (!p->json || slam_testset_write(set, task_names[p->task], p->sum, p->json)) &&
             (!p->submission || slam_testset_submission(set, p->submission));
    }
    free(scores);
    return ok;
}

/* ---- generation ---- */

static int compare_names(const void *a, const void *b) {
    char **const x = *(char **const *)a, **const y = *(char **const *)b; /* of equal ones the first in order */
    return strcmp(*x, *y) ? strcmp(*x, *y) : (x > y) - (x < y);
}

/* Names of the WAV files: what is behind the last slash of a prompt's name, without .wav or the like, with _ instead of
   whatever may mean something to a shell or a file system. Equal ones become NAME, NAME~2, NAME~3. */
static int name_wavs(program *p) {
    static const char *const audio[] = {".wav", ".flac", ".ogg", ".mp3", ".opus"};
    const size_t n = p->prompts.n;
    char ***sorted = (char ***)calloc(n, sizeof *sorted), path[4400], safe[200];
    int ok = 1;
    for (size_t i = 0; i < n; i++) {
        const char *name = p->prompts.at[i].name, *slash = strrchr(name, '/');
        snprintf(safe, sizeof safe, "%s", slash && slash[1] ? slash + 1 : *name ? name : "_");
        for (int k = 0; k < 5; k++)
            if (ends_in(safe, audio[k])) *strrchr(safe, '.') = 0;
        for (char *c = safe; *c; c++)
            if (!(*c & 128) && !isalnum(*c) && !strchr(c == safe ? "_=" : "_=-+,@.", *c)) *c = '_';
        slam_strings_add(&p->wavs, safe);
    }
    for (size_t i = 0; i < n; i++) sorted[i] = &p->wavs.at[i];
    qsort(sorted, n, sizeof *sorted, compare_names);
    for (size_t i = 0, first = 0; ok && i < n; i++) {
        if (strcmp(*sorted[i], *sorted[first])) first = i;
        snprintf(path, sizeof path, i > first ? "%s~%zu" : "%s", *sorted[i], i - first + 1);
        free(*sorted[i]);
        *sorted[i] = strdup(path);
        snprintf(path, sizeof path, "%s/%s.wav", p->wav, *sorted[i]);
        ok = slam_output_check(path);
    }
    free(sorted);
    return ok;
}

/* Prompts of recordings, tokenized whole, so that their units are those of the recording. */
static int add_audio_prompts(program *p, const slam_strings *arguments) {
    const char *const *paths = (const char *const *)arguments->at;
    slam_inputs in;
    memset(&in, 0, sizeof in);
    int ok = open_tokenizer(p) && slam_inputs_open(&in, SLAM_INPUT_AUDIO, paths, arguments->n);
    slam_units *units = ok ? tokenize(p, &in.paths) : NULL;
    ok = units != NULL;
    for (size_t i = 0; is_root(p) && i < in.notes.n; i++) fprintf(stderr, "eval: note: %s\n", in.notes.at[i]);
    if (ok) p->prompts.rate = p->tokenizer->config.rate;
    for (size_t i = 0; ok && i < in.paths.n; i++) {
        const slam_units *u = &units[i];
        if (u->samples) slam_prompts_add(&p->prompts, in.paths.at[i], u->unit, u->duration, u->n);
        slam_units_free(&units[i]);
    }
    slam_inputs_free(&in);
    free(units);
    return ok;
}

/* PROMPTS, or the beginnings of the bundled validation data. */
static int open_prompts(program *p) {
    slam_strings audio = {NULL, 0, 0};
    const int whole = p->task == RESYNTHESIZE, T = whole ? 1 << 24 : p->model->config.T;
    int ok = 1;
    if (!whole) p->prompts.max_units = (size_t)p->prompt_units;
    if (!whole) p->prompts.max_seconds = p->prompt_seconds;
    p->prompts.rate = p->rate;
    if (!p->data.n) add_bundled(p, "test/corpus/val.bin", &p->data);
    for (size_t i = 0; ok && i < p->data.n; i++) {
        char *path = p->data.at[i];
        const slam_strings one = {&path, 1, 1};
        if (ends_in(path, ".jsonl")) ok = slam_prompts_add_lines(&p->prompts, path);
        else if (ends_in(path, ".bin")) {
            slam_data *data = open_data(p, &one, T, 0);
            if ((ok = data != NULL) != 0) slam_prompts_add_data(&p->prompts, data);
            slam_data_free(data);
        } else slam_strings_add(&audio, path);
    }
    ok = ok && (!audio.n || add_audio_prompts(p, &audio));
    slam_strings_free(&audio);
    if (!ok) return 0;
    if (!p->prompts.n) return slam_set_error("%s: has no prompt", p->data.at[0]);
    printf("prompts  %zu%s\n", p->prompts.n,
           p->prompts.guessed ? " (no durations: 18 units count as a second; --prompt-units N takes N)" : "");
    for (size_t i = 0; i < p->data.n; i++) printf("         %s\n", p->data.at[i]);
    fflush(stdout);
    return !p->wav || name_wavs(p);
}

/* Prints and writes what there is; if it was stopped, into OUT.partial. */
static int write_continuations(const program *p, double seconds, int stopped) {
    const slam_prompts *all = &p->prompts;
    size_t n = 0, ended = 0, truncated = 0;
    double tokens = 0, bleu = 0;
    char a[32], b[32], c[32], path[4200] = "";
    for (size_t i = 0; i < all->n; i++) {
        const slam_prompt *q = &all->at[i];
        truncated += q->truncated > 0;
        if (!q->continuation) continue;
        n++;
        ended += (size_t)q->ended;
        tokens += q->length + q->ended;
        bleu += slam_unit_auto_bleu(q->continuation, (size_t)q->length, 2);
    }
    if (n) bleu /= (double)n;
    if (truncated) printf("%zu prompts were longer than the context allows and lost their beginning\n", truncated);
    printf("%zu continuations, %zu of them ended by the model: %s tokens in %s, %s tokens/s\n", n, ended,
           slam_format_count(a, tokens), slam_format_time(b, seconds), slam_format_count(c, tokens / seconds));
    printf("auto-BLEU-2 of units  %.4f\n", bleu);
    if (p->out) {
        snprintf(path, sizeof path, "%s%s", p->out, stopped ? ".partial" : "");
        if (!slam_prompts_write(all, path)) return 0;
        printf("wrote    %s\n", path);
    }
    if (stopped) printf("stopped  after %zu of %zu prompts; the same command starts again\n", n, all->n);
    const slam_metric metrics[] = {{"n", (double)n}, {"tokens", tokens}, {"auto_bleu_2", bleu}};
    return stopped || write_json(p, metrics, 3);
}

static int score_transcripts(const char *path) {
    FILE *f = fopen(path, "r");
    char *line = NULL;
    size_t n = 0, capacity = 0;
    double sum = 0;
    for (; f && getline(&line, &capacity, f) >= 0; n++) sum += slam_auto_bleu(line, 2);
    if (!f || ferror(f)) return slam_set_error("%s: cannot be read", path);
    printf("auto-BLEU-2 of texts  %.4f over %zu lines of %s\n", n ? sum / (double)n : 0, n, path);
    fclose(f);
    free(line);
    return 1;
}

/* ---- audio of units ---- */

/* --wav: --vocoder, or the unit tokenizer, by default the bundled one. */
static int open_vocoder(program *p) {
    if (p->vocoder_folder) {
        p->vocoder = slam_vocoder_open(p->vocoder_folder, p->speaker, p->style, NULL, p->ops);
        return p->vocoder &&
               (p->vocoder->K == n_units(p) ||
                slam_set_error("%s: has %d units, the model %d", p->vocoder_folder, p->vocoder->K, n_units(p)));
    }
    if (!p->unit_flags.kmeans) {
        if (!slam_bundled_units(p->argv0, p->run.units)) return 0;
        slam_flags_set(&p->flags, "kmeans", slam_path_beside(p->argv0, "test/corpus/km.npy").at);
    }
    if (!open_tokenizer(p)) return 0;
    if (p->tokenizer->K != n_units(p))
        return slam_set_error("--wav: the model has %d units, expected --kmeans KM.npy with their centroids",
                              n_units(p));
    if (!p->tokenizer->durations && p->tokenizer->config.dedup)
        printf("         %s has no durations (.json): a unit without one lasts 1.4 frames\n", p->unit_flags.kmeans);
    return (p->vocoder = slam_vocoder_open(NULL, 0, 0, p->tokenizer, p->ops)) != NULL;
}

/* DIR/NAME.wav of each prompt with its continuation and, if --wav-prompt, DIR/prompt/NAME.wav of the prompt alone. The
   ranks share the files. */
static int synthesize(program *p) {
    char a[32], b[32], path[4400];
    double sums[3] = {0, 0, 0}; /* files, seconds of audio, prompts without units */
    int ok = 1;
    slam_bar_begin(&p->bar);
    for (size_t i = (size_t)p->comm->rank; ok && i < p->prompts.n; i += (size_t)p->comm->size) {
        const slam_prompt *q = &p->prompts.at[i];
        const int most = q->n + q->length;
        int *units = (int *)calloc(2 * (size_t)most, sizeof *units), *durations = units + most;
        size_t n = 0;
        for (int t = 1; t < most; t++) { /* the first token opens the document */
            const int token = t < q->n ? q->tokens[t] : q->continuation[t - q->n];
            durations[n] = t < q->n ? q->durations[t] : 0;
            units[n] = token - 2;
            n += token != 0; /* padding */
        }
        for (int k = 0; n && ok && k <= (p->wav_prompt && q->n > 1); k++) {
            snprintf(path, sizeof path, "%s/%s%s.wav", p->wav, k ? "prompt/" : "", p->wavs.at[i]);
            if (!slam_vocoder_start(p->vocoder, units, durations, k ? (size_t)q->n - 1 : n))
                ok = slam_set_error("%s: %s", q->name, slam_error());
            ok = ok && slam_vocoder_write(p->vocoder, path, show_progress, p);
            sums[0] += ok;
            sums[1] += ok * (double)p->vocoder->samples / 16000;
        }
        if (!n) fprintf(stderr, "eval: skipped: %s: has no units\n", q->name);
        sums[2] += !n;
        free(units);
        p->n_spoken += (size_t)p->comm->size;
    }
    slam_bar_clear(&p->bar);
    const int stopped = slam_comm_max(p->comm, slam_stop_requested()) > 0;
    if (!slam_all_ok(p->comm, ok || stopped)) return 0;
    slam_comm_sum(p->comm, sums, 3);
    p->skipped += (size_t)sums[2];
    printf("wrote    %.0f files into %s: %s of audio in %s%s\n", sums[0], p->wav, slam_format_time(a, sums[1]),
           slam_format_time(b, slam_clock() - p->bar.began), stopped ? "; stopped before the end" : "");
    return 1;
}

static int generate(program *p) {
    slam_generation how = p->how;
    how.context = context_of(p);
    how.batch = p->batch;
    how.seed = (uint64_t)p->seed;
    if (p->greedy) how.sampling.temperature = 0;
    if (!slam_flags_given(&p->flags, "max-new") && how.max_new > how.context / 2) how.max_new = how.context / 2;
    slam_bar_begin(&p->bar);
    const int ok = slam_generate(p->model, &how, &p->prompts, show_progress, p);
    const double seconds = slam_clock() - p->bar.began;
    slam_bar_clear(&p->bar);
    const int stopped = slam_comm_max(p->comm, slam_stop_requested()) > 0;
    return ok && write_continuations(p, seconds, stopped) && (!p->wav || stopped || synthesize(p));
}

/* ---- flags ---- */

static void set_flags(program *p) {
    slam_unit_flags *u = &p->unit_flags;
    slam_sampling *s = &p->how.sampling;
    const slam_flag table[] = {
        SLAM_HEADING("All tasks"),
        SLAM_NUMBER("context", SLAM_INT, &p->context, "N", NULL, 2, 1 << 24, "tokens per row (the run's, else 1024)"),
        SLAM_NUMBER("batch", SLAM_INT, &p->batch, "N", "8 | 64", 1, 1 << 20, "rows at once; of generate: prompts"),
        SLAM_FLAG("json", SLAM_TEXT, &p->json, "FILE", NULL, "write the results to this file"),
        SLAM_FLAG("device", SLAM_DEVICE, &p->device, "NAME", "auto", "auto, cpu, cuda or cuda:N"),
        SLAM_FLAG("dtype", SLAM_CHOICE, &p->dtype, "auto|f32|bf16", "auto", "f32 on the CPU, bf16 on CUDA"),
        SLAM_NUMBER("threads", SLAM_INT, &p->threads, "N", "0", 0, 4096, "CPU threads; 0: one per core"),
        SLAM_HEADING("Perplexity"),
        SLAM_FLAG("train", SLAM_TEXT, &p->train, "DATA", NULL, "compare with n-gram models of this data"),
        SLAM_HEADING("Audio"),
        SLAM_FLAG("kmeans", SLAM_TEXT, &u->kmeans, "KM.npy", NULL, "the centroids; KM.json has their settings"),
        SLAM_FLAG("hubert", SLAM_TEXT, &u->hubert, "DIR", NULL, "HuBERT, if KM.json names none or it has moved"),
        SLAM_NUMBER("layer", SLAM_INT, &u->layer, "N", "11", 0, 1000, "of --hubert"),
        SLAM_NUMBER("pad", SLAM_INT, &u->pad, "N", "40", 0, 16000, "zeros around the samples of --hubert"),
        SLAM_FLAG("channel", SLAM_TEXT, &u->channel, "mix|N", NULL,
                  "of files with several: their mean, or channel N (SlamKit: 1); default: KM.json's, else mix"),
        SLAM_HEADING("Test sets"),
        SLAM_FLAG("units", SLAM_TEXT, &p->units, "FILE.jsonl", NULL,
                  "the sequences as units (SlamKit features or tokens), found by the names of the set's files"),
        SLAM_FLAG("split", SLAM_CHOICE, &p->split, "dev|test", NULL, "of a folder with all of ZeroSpeech's sets (dev)"),
        SLAM_FLAG("sum", SLAM_SWITCH, &p->sum, NULL, NULL, "compare sums of log-probabilities, not means"),
        SLAM_FLAG("submission", SLAM_TEXT, &p->submission, "FILE", NULL, "write `filename score` lines for ZeroSpeech"),
        SLAM_HEADING("Generation"),
        SLAM_FLAG("out", SLAM_TEXT, &p->out, "FILE", NULL, "FILE.jsonl: file_name, prompt, units of each. Also -o"),
        SLAM_NUMBER("prompt-seconds", SLAM_REAL, &p->prompt_seconds, "S", "3", 0, 1e6, "length of a prompt; 0: all"),
        SLAM_NUMBER("prompt-units", SLAM_INT, &p->prompt_units, "N", "0", 0, 1 << 28, "or its first N units"),
        SLAM_NUMBER("rate", SLAM_INT, &p->rate, "25|50", "25", 1, 1000, "frames/s of durations in PROMPTS.jsonl"),
        SLAM_NUMBER("max-new", SLAM_INT, &p->how.max_new, "N", "150", 1, 1 << 24,
                    "units of a continuation at most (at most half the context if this flag is not given)"),
        SLAM_NUMBER("temperature", SLAM_REAL, &s->temperature, "X", "0.8", 0, 1e6, "divides the logits"),
        SLAM_NUMBER("top-k", SLAM_INT, &s->top_k, "N", "25", 0, 1 << 20, "draw from the N most likely units; 0: all"),
        SLAM_NUMBER("top-p", SLAM_REAL, &s->top_p, "P", "1", 0, 1, "from the most likely of total probability P"),
        SLAM_NUMBER("repetition-penalty", SLAM_REAL, &s->repetition_penalty, "X", "1", 1e-3, 1e3,
                    "of units that have occurred; 1: none"),
        SLAM_FLAG("greedy", SLAM_SWITCH, &p->greedy, NULL, NULL, "take the most likely unit"),
        SLAM_NUMBER("seed", SLAM_LONG, &p->seed, "N", "0", 0, 0, "of sampling"),
        SLAM_FLAG("wav", SLAM_TEXT, &p->wav, "DIR", NULL,
                  "write prompts with their continuations as audio, DIR/NAME.wav, of the MFCC centroids in --kmeans"),
        SLAM_FLAG("wav-prompt", SLAM_SWITCH, &p->wav_prompt, NULL, NULL,
                  "and the prompts alone, DIR/prompt/NAME.wav, to tell the model from the synthesis"),
        SLAM_FLAG("vocoder", SLAM_TEXT, &p->vocoder_folder, "DIR", NULL,
                  "of --wav: a unit HiFi-GAN, config.json and model.safetensors, instead of the centroids"),
        SLAM_NUMBER("speaker", SLAM_INT, &p->speaker, "N", "0", 0, 1 << 30, "of --vocoder"),
        SLAM_NUMBER("style", SLAM_INT, &p->style, "N", "0", 0, 1 << 30, "of --vocoder"),
        SLAM_FLAG("transcripts", SLAM_TEXT, &p->transcripts, "FILE", NULL, "print auto-BLEU-2 of its lines only"),
    };
    memcpy(p->table, table, sizeof table);
    p->flags.at = p->table;
    p->flags.n = (int)(sizeof table / sizeof *table);
    p->flags.program = "eval";
    p->flags.usage = "[MODEL] ppl [DATA...] [options]\n"
                     "       ./eval [MODEL] swuggy|sblimp|storycloze|salmon [PATH] [options]\n"
                     "       ./eval [MODEL] generate [PROMPTS...] [options]\n"
                     "       ./eval resynthesize [UNITS...|AUDIO...] --wav DIR [options]";
    p->flags.about =
        "MODEL: a folder with config.json and model.safetensors, or a run; default: the newest run. ppl: loss and "
        "perplexity on token shards (.bin) or unit files (.jsonl); without DATA on the run's validation data, next to "
        "n-gram models of its training data. swuggy, sblimp, storycloze, salmon: how often the correct one of two "
        "sequences is more likely. PATH: a folder of ZeroSpeech 2021 (gold.csv), of SlamKit's pairs of files, or of "
        "SALMon's parts, as audio or with units; without PATH a bundled set. generate: continues PROMPTS: audio, unit "
        "files or token shards; default: the bundled validation data. resynthesize: writes such files as audio. "
        "Defaults stand in brackets; where there are two, the second is for generate.";
}

static int task_of(const char *word) {
    int task = 0;
    while (task < TASKS && strcmp(word, task_names[task])) task++;
    return task;
}

/* [MODEL] [TASK [PATH...]] */
static int read_arguments(program *p) {
    static const char expected[] = "expected ppl, swuggy, sblimp, storycloze, salmon, generate or resynthesize";
    const slam_strings *rest = &p->flags.rest;
    size_t at = 0;
    if (rest->n && task_of(rest->at[0]) == TASKS) p->path = rest->at[at++];
    if (p->path && at == rest->n) return slam_set_error("no task after %s: %s", p->path, expected);
    if (at < rest->n && (p->task = task_of(rest->at[at])) == TASKS)
        return slam_set_error("%s: there is no such task, %s", rest->at[at], expected);
    for (size_t i = at + 1; i < rest->n; i++) slam_strings_add(&p->data, rest->at[i]);
    if (p->task > PPL && p->task < GENERATE && p->data.n > 1)
        return slam_set_error("%s: one test set at a time, after %s", p->data.at[1], p->data.at[0]);
    if (p->task == RESYNTHESIZE && (!p->wav || p->path))
        return slam_set_error(p->path ? "resynthesize: expected no model" : "resynthesize: expected --wav DIR");
    if (p->wav_prompt && !p->wav) return slam_set_error("--wav-prompt: expected --wav DIR as well");
    if (p->vocoder_folder && !p->wav) return slam_set_error("--vocoder: expected --wav DIR as well");
    if (!p->greedy && slam_flags_given(&p->flags, "temperature") && p->how.sampling.temperature < 1e-6)
        return slam_set_error("--temperature %g: expected a positive number; --greedy takes the most likely unit",
                              p->how.sampling.temperature);
    if (p->train) slam_strings_add(&p->counted, p->train);
    return 1;
}

/* The files that are written: what cannot be is an error before the work. Rank 0 writes all but audio. */
static int check_outputs(program *p) {
    char **files[] = {&p->json, &p->submission, &p->out}, folder[4200];
    int ok = 1;
    snprintf(folder, sizeof folder, "%s/%s", p->wav ? p->wav : "", p->wav_prompt ? "prompt/" : "");
    if (p->wav && is_root(p)) ok = slam_output_check(folder);
    for (int i = 0; i < 3; i++) {
        if (!is_root(p)) *files[i] = NULL;
        ok = ok && (!*files[i] || slam_output_check(*files[i]));
    }
    return ok;
}

int main(int argc, char **argv) {
    static program p;
    p.argv0 = argv[0];
    if (!(p.comm = slam_program_begin("eval"))) return 1;
    set_flags(&p);
    const int parsed = slam_flags_parse(&p.flags, argc, argv);
    if (parsed == 2) return slam_program_end(&p.flags, p.comm, 0); /* --help */
    if (!parsed || !read_arguments(&p) || !slam_flags_defaults(&p.flags, p.task >= GENERATE))
        return slam_program_end(&p.flags, p.comm, 2);

    int ok; /* slam_all_ok is an all-reduce: if it failed on one rank, all end */
    if (p.task == GENERATE && p.transcripts) ok = score_transcripts(p.transcripts);
    else {
        ok = slam_all_ok(p.comm, check_outputs(&p)) && open_model(&p);
        if (p.task != PPL) slam_signals_catch(); /* ppl ends at once */
        if (p.task == PPL) ok = ok && slam_all_ok(p.comm, open_perplexity(&p)) && perplexity(&p);
        else if (p.task < GENERATE) ok = ok && slam_all_ok(p.comm, open_set(&p)) && score_pairs(&p);
        else {
            ok = ok && slam_all_ok(p.comm, (!p.wav || open_vocoder(&p)) && open_prompts(&p));
            if (p.task == GENERATE) ok = ok && generate(&p);
            else ok = ok && synthesize(&p);
        }
    }
    if (ok && (fflush(stdout) != 0 || ferror(stdout))) ok = slam_set_error("stdout: cannot be written");
    const int status = !slam_all_ok(p.comm, ok) ? 1 : p.skipped ? 3 : 0;
    return slam_program_end(&p.flags, p.comm, status); /* the system frees what is open */
}
