/* eval.c - what a model has learned. `./eval` alone scores the newest run on the bundled corpus's validation part. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    char *train, *json, *device, *dtype;
    int context, batch, threads;
} options;

static int flag_table(slam_flag *f, options *o) {
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Options", 0, 0, 0, 0},
        {"train", SLAM_TEXT, &o->train, "DATA", NULL, "count n-grams on this: what counting alone reaches on the same tokens", 0, 0,
         0, 0},
        {"context", SLAM_INT, &o->context, "N", NULL, "tokens of a row (the run's own, else 1024)", 2, 1 << 24, 0, 0},
        {"batch", SLAM_INT, &o->batch, "N", "8", "rows at once", 1, 1 << 20, 0, 0},
        {"json", SLAM_TEXT, &o->json, "FILE", NULL, "write the figures to this file", 0, 0, 0, 0},
        {"device", SLAM_TEXT, &o->device, "NAME", "auto", "auto, cpu, cuda or cuda:N", 0, 0, 0, 0},
        {"dtype", SLAM_CHOICE, &o->dtype, "auto|f32|bf16", "auto", "f32 on the CPU, bf16 on CUDA", 0, 0, 0, 0},
        {"threads", SLAM_INT, &o->threads, "N", "0", "of the CPU; 0: one a core", 0, 4096, 0, 0},
    };
    const int n = (int)(sizeof table / sizeof *table);
    for (int i = 0; i < n; i++) f[i] = table[i];
    return n;
}

/* What a call opens. */
typedef struct job {
    options o;
    slam_flags flags;
    slam_flag table[8];
    slam_list test, train; /* patterns */
    const char *note;      /* of the data that are scored, where the call does not name them */
    char *folder;
    slam_trainer run; /* of the run that the model is from; without settings where it is from none */
    slam_ops *ops;
    slam_model *model;
    slam_data *test_data, *train_data;
} job;

/* [MODEL] ppl [DATA...]; 0: it is not that. */
static int read_arguments(job *j, const char **model) {
    const slam_list *rest = &j->flags.rest;
    size_t task = 0;
    *model = NULL;
    if (rest->n && strcmp(rest->at[0], "ppl")) *model = rest->at[task++];
    if (task < rest->n && strcmp(rest->at[task], "ppl"))
        return slam_refuse("%s: there is no such task, expected ppl", rest->at[task]);
    if (task == rest->n && *model) return slam_refuse("the task is missing after %s, expected ppl", *model);
    for (size_t i = task + 1; i < rest->n; i++)
        if (!slam_list_add(&j->test, rest->at[i])) return 0;
    return !j->o.train || slam_list_add(&j->train, j->o.train);
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

static int open_all(job *j, int context, int named) {
    const double fraction = named ? 0 : atof(setting(j, "val-fraction", "0"));
    if (fraction > 0) return (j->train_data = open_data(j, &j->test, context, fraction, &j->test_data)) != NULL;
    if (!(j->test_data = open_data(j, &j->test, context, 0, NULL))) return 0;
    return !j->train.n || (j->train_data = open_data(j, &j->train, context, 0, NULL)) != NULL;
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

static int score(job *j, const char *argv0, const char *path) {
    static const char *const names[] = {"unigram", "bigram", "trigram", "4-gram", "5-gram"};
    const options *o = &j->o;
    char note[256], spelled[32];
    double nll, ngrams[5];
    uint64_t targets, same;
    const int named = j->test.n > 0;
    if (!(j->folder = slam_run_model(path)) || !(j->ops = slam_device(o->device, o->dtype, o->threads, note))) return 0;
    if (!(j->model = slam_model_load(j->ops, j->folder))) return 0;
    slam_trainer_read(&j->run, j->folder); /* a model that others made has none */
    const slam_config *c = slam_model_config(j->model);
    const int context = o->context ? o->context : atoi(setting(j, "context", "1024"));
    if (!name_data(j, argv0) || !open_all(j, context, named)) return 0;
    printf("device   %s%s%s%s\nmodel    %s: %s parameters\n", j->ops->name, *note ? " (" : "", note, *note ? ")" : "", j->folder,
           slam_spell_count(spelled, (double)slam_config_parameters(c)));
    for (size_t i = 0; i < j->test.n; i++) printf("%s%s%s\n", i ? "         " : "data     ", j->test.at[i], j->note ? j->note : "");
    for (size_t i = 0; i < j->train.n; i++) printf("%s%s\n", i ? "         " : "n-grams  counted on ", j->train.at[i]);
    fflush(stdout);
    if (!slam_model_plan(j->model, o->batch, context, SLAM_INFERENCE) ||
        !slam_score_data(j->model, j->test_data, -1, o->batch, &nll, &targets))
        return 0;
    if (!targets) return slam_refuse("%s: no token to predict", j->test.at[0]);
    if (!isfinite(nll)) return slam_refuse("%s: the model's loss on %s is not finite", j->folder, j->test.at[0]);
    printf("\n                nats a token   perplexity\nmodel           %12.4f %12.2f\n", nll, exp(nll));
    if (j->train_data && !slam_ngrams(j->train_data, j->test_data, c->V, ngrams, &same)) return 0;
    if (j->train_data && same != targets)
        return slam_refuse("%s: n-grams predict %llu tokens, the model %llu: they cannot be compared", j->test.at[0],
                           (unsigned long long)same, (unsigned long long)targets);
    for (int k = 0; j->train_data && k < 5; k++) printf("%-15s %12.4f %12.2f\n", names[k], ngrams[k], exp(ngrams[k]));
    printf("over %llu tokens in rows of %d%s\n", (unsigned long long)targets, context,
           j->train_data ? "; n-grams are interpolated (Witten-Bell)" : "");
    return !o->json || write_json(o->json, nll, targets, j->train_data ? ngrams : NULL);
}

int main(int argc, char **argv) {
    job j;
    const char *model;
    memset(&j, 0, sizeof j);
    j.flags.program = "eval";
    j.flags.usage = "[MODEL] ppl [DATA...] [options]";
    j.flags.about =
        "Scores a model: a folder with config.json and model.safetensors, or a run, of which the newest checkpoint is taken; "
        "without one the newest run. ppl: loss and perplexity on token shards (.bin) or unit files (.jsonl); without DATA on "
        "what the run was validated on, beside n-gram models counted on what it was trained on.";
    j.flags.at = j.table;
    j.flags.n = flag_table(j.table, &j.o);
    const int parsed = slam_flags_parse(&j.flags, argc, argv);
    int status = parsed == 0 || (parsed == 1 && (!slam_flags_defaults(&j.flags, 0) || !slam_device_check(j.o.device) ||
                                                 !read_arguments(&j, &model)))
                     ? 2
                     : 0;
    if (parsed == 1 && status == 0) status = !score(&j, argv[0], model);
    if (status == 0 && (fflush(stdout) != 0 || ferror(stdout))) status = !slam_refuse("stdout: cannot be written");
    if (status == 2) slam_flags_usage(&j.flags);
    else if (status) fprintf(stderr, "eval: error: %s\n", slam_error());
    slam_data_free(j.test_data);
    slam_data_free(j.train_data);
    slam_model_free(j.model);
    slam_ops_free(j.ops);
    slam_list_free(&j.test);
    slam_list_free(&j.train);
    slam_trainer_free(&j.run);
    slam_flags_free(&j.flags);
    free(j.folder);
    return status;
}
