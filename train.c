/* train.c - pre-training: flags, data and model together, and slam_run_train. `./train` alone trains on the bundled corpus. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    slam_list val;
    char *weights, *out, *init, *twist, *model, *recipe, *micro, *warmup, *schedule, *device, *dtype, *format;
    double val_fraction, epochs, seconds, lr, min_lr, beta1, beta2, eps, weight_decay, clip, rope_theta, rate;
    long steps, tokens, seed, eval_every, save_every, log_every;
    int V, context, batch, threads, keep, recompute, resume, dry_run;
} options;

/* All that a call of the program opens. */
typedef struct job {
    options o;
    slam_flags flags;
    slam_flag table[48];
    slam_list data_paths, val_paths; /* what is opened; flags.rest and o.val are how the user calls it */
    int fresh, any_limit, measure;   /* not resumed; a limit was asked for; --time has to find the number of steps */
    int is_bundled;
    slam_ops *ops;
    slam_config config;
    slam_data *data, *val;
    slam_data_size size;
    slam_pretraining *task;
    char *folder, *checkpoint, *start;
    slam_run run;
} job;

/* What --recipe slam sets (Maimon, Elmakies and Adi 2025, and the configuration of SlamKit). */
static const char *const recipe_slam[][2] = {
    {"model", "slam"},  {"context", "1024"},        {"batch", "78"},        {"steps", "17625"},      {"lr", "1e-3"},
    {"min-lr", "5e-5"}, {"warmup", "max(100, 1%)"}, {"beta1", "0.9"},       {"beta2", "0.999"},      {"eps", "1e-8"},
    {"clip", "0.5"},    {"weight-decay", "0"},      {"schedule", "cosine"}, {"rope-theta", "10000"},
};

/* Flags that concern this call alone, those that may differ when a run goes on, and those that may then be greater. */
static const char not_kept[] = "out resume dry-run rate val";
static const char may_change[] = "threads device recompute save-every keep log-every";
static const char may_grow[] = "steps tokens epochs time";

static int flag_table(slam_flag *f, options *o) {
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Data", 0, 0, 0, 0},
        {"val", SLAM_LIST, &o->val, "PATH", NULL, "validation data; may be repeated", 0, 0, 0, 0},
        {"val-fraction", SLAM_REAL, &o->val_fraction, "P", "0", "or hold out this share of the documents", 0, 0.9, 0, 0},
        {"weights", SLAM_TEXT, &o->weights, "W,W,...", NULL, "how often an epoch draws from each DATA (1 each)", 0, 0, 0, 0},
        {"vocab", SLAM_INT, &o->V, "V", NULL, "size of the vocabulary, where the data do not say", 3, 65536, 0, 0},
        {"context", SLAM_INT, &o->context, "N", "1024 | 256", "tokens of a row", 2, 1 << 24, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Model", 0, 0, 0, 0},
        {"model", SLAM_TEXT, &o->model, "NAME", "tiny", "tiny, slam or a config.json", 0, 0, 0, 0},
        {"init", SLAM_TEXT, &o->init, "DIR", NULL, "start from this model of the same units", 0, 0, 0, 0},
        {"twist", SLAM_TEXT, &o->twist, "DIR", NULL, "start from this text model, its embedding cut to the units", 0, 0, 0, 0},
        {"rope-theta", SLAM_REAL, &o->rope_theta, "X", NULL, "base of the rotary positions (the model's)", 1, 1e12, 0, 0},
        {"recipe", SLAM_CHOICE, &o->recipe, "slam", NULL, "all settings of the Slam paper at once", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Length: the first limit reached ends the run and fixes the schedule", 0, 0, 0, 0},
        {"steps", SLAM_LONG, &o->steps, "N", "- | 600", "updates", 1, 1e12, 0, 0},
        {"tokens", SLAM_LONG, &o->tokens, "N", NULL, "real tokens, padding not counted", 1, 1e15, 0, 0},
        {"epochs", SLAM_REAL, &o->epochs, "X", "1 | -", "passes over the data", 1e-6, 1e6, 0, 0},
        {"time", SLAM_TIME, &o->seconds, "HH:MM:SS", NULL, "as many steps as fit, by the rate of the first ones", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Optimiser", 0, 0, 0, 0},
        {"batch", SLAM_INT, &o->batch, "N", "8 | 16", "rows of a step", 1, 1 << 20, 0, 0},
        {"micro-batch", SLAM_TEXT, &o->micro, "N|auto", "auto", "rows that the device holds at once", 0, 0, 0, 0},
        {"recompute", SLAM_SWITCH, &o->recompute, NULL, NULL,
         "compute norms and SwiGLU again instead of keeping them: up to a third less for activations", 0, 0, 0, 0},
        {"lr", SLAM_REAL, &o->lr, "X", "1e-3 | 5e-3", "peak learning rate", 0, 1e30, 0, 0},
        {"min-lr", SLAM_REAL, &o->min_lr, "X", NULL, "where cosine ends (lr / 20)", 0, 1e30, 0, 0},
        {"warmup", SLAM_TEXT, &o->warmup, "N|P%", "max(100, 1%) | 50", "steps until the peak, or their share of all", 0, 0, 0, 0},
        {"schedule", SLAM_CHOICE, &o->schedule, "cosine|inverse-sqrt|linear|constant", "cosine", "after the warm-up", 0, 0, 0, 0},
        {"beta1", SLAM_REAL, &o->beta1, "X", "0.9", "of AdamW", 0, 0.999999, 0, 0},
        {"beta2", SLAM_REAL, &o->beta2, "X", "0.999 | 0.95", "of AdamW", 0, 0.999999999, 0, 0},
        {"eps", SLAM_REAL, &o->eps, "X", "1e-8", "of AdamW", 1e-30, 1, 0, 0},
        {"weight-decay", SLAM_REAL, &o->weight_decay, "X", "0 | 1", "of AdamW", 0, 100, 0, 0},
        {"clip", SLAM_REAL, &o->clip, "X", "0.5", "largest norm of the gradient; 0: any", 0, 1e9, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Run", 0, 0, 0, 0},
        {"out", SLAM_TEXT, &o->out, "DIR", NULL, "folder of the run (runs/train, runs/train-2, ...)", 0, 0, 0, 0},
        {"resume", SLAM_SWITCH, &o->resume, NULL, NULL, "go on with --out, or with the newest run; limits may grow", 0, 0, 0, 0},
        {"eval-every", SLAM_LONG, &o->eval_every, "N", "500 | 100", "steps between evaluations; 0: never", 0, 1e12, 0, 0},
        {"save-every", SLAM_LONG, &o->save_every, "N", "500 | 200", "steps between checkpoints; 0: only the last and the best", 0,
         1e12, 0, 0},
        {"keep", SLAM_INT, &o->keep, "N", "3", "newest checkpoints that stay, beside the best; 0: all", 0, 1 << 30, 0, 0},
        {"log-every", SLAM_LONG, &o->log_every, "N", "10 | 20",
         "steps between lines; on a terminal a bar, lines where this is given", 0, 1e12, 0, 0},
        {"format", SLAM_CHOICE, &o->format, "hf|slamkit", "hf", "names in the checkpoints", 0, 0, 0, 0},
        {"device", SLAM_TEXT, &o->device, "NAME", "auto", "auto, cpu, cuda or cuda:N", 0, 0, 0, 0},
        {"dtype", SLAM_CHOICE, &o->dtype, "auto|f32|bf16", "auto", "f32 on the CPU, bf16 on CUDA", 0, 0, 0, 0},
        {"threads", SLAM_INT, &o->threads, "N", "0", "of the CPU; 0: one a core", 0, 4096, 0, 0},
        {"seed", SLAM_LONG, &o->seed, "N", "0", "of weights, order and held-out documents", 0, 9e15, 0, 0},
        {"dry-run", SLAM_SWITCH, &o->dry_run, NULL, NULL, "print the plan, train nothing", 0, 0, 0, 0},
        {"rate", SLAM_REAL, &o->rate, "N", NULL, "tokens a second, for the time that --dry-run prints", 0, 1e12, 0, 0},
    };
    const int n = (int)(sizeof table / sizeof *table);
    for (int i = 0; i < n; i++) f[i] = table[i];
    return n;
}

/* ---- which run, which settings ---- */

/* N, P% or max(N, P%) */
static int read_warmup(slam_run *r, const char *spelled) {
    char *end;
    const int both = !strncmp(spelled, "max(", 4);
    double n = strtod(spelled + (both ? 4 : 0), &end), share = 0;
    if (both && *end == ',') {
        share = strtod(end + 1, &end);
        if (strcmp(end, "%)")) end = NULL;
    } else if (!strcmp(end, "%")) {
        share = n;
        n = 0;
    } else if (*end) end = NULL;
    if (!end || end == spelled || n < 0 || n != floor(n) || n > 1e12 || !(share >= 0 && share <= 100))
        return slam_refuse("--warmup %s: expected steps (100), a share of all (1%%) or the larger of both, max(100, 1%%)", spelled);
    r->warmup = (long)n;
    r->warmup_share = share / 100;
    return 1;
}

/* rows; 0: auto */
static int read_micro(const char *spelled, int *micro) {
    char *end;
    const long n = strtol(spelled, &end, 10);
    *micro = 0;
    if (!strcmp(spelled, "auto")) return 1;
    if (*end || n < 1 || n > 1 << 20) return slam_refuse("--micro-batch %s: expected a number of rows, or auto", spelled);
    *micro = (int)n;
    return 1;
}

/* W,W,...: one for each of n sources (0: any number), of which source i gets *weight; without the flag each is drawn once an epoch. */
static int weight_at(const char *weights, size_t i, size_t n, double *weight) {
    *weight = 1;
    if (!weights || !*weights) return 1;
    const char *at = weights;
    for (size_t k = 0;; k++) {
        char *end;
        const double w = strtod(at, &end);
        if (end == at || (*end && *end != ','))
            return slam_refuse("--weights %s: expected numbers with commas between them", weights);
        if (k == i) *weight = w;
        at = end + 1;
        if (*end) continue;
        return !n || k + 1 == n ? 1 : slam_refuse("--weights %s: %zu numbers for %zu DATA arguments", weights, k + 1, n);
    }
}

/* What the table cannot say of a flag. */
static int check_flags(job *j) {
    const options *o = &j->o;
    const size_t sources = j->flags.rest.n ? j->flags.rest.n : o->resume ? 0 : 1;
    double weight;
    int micro;
    if (o->init && o->twist) return slam_refuse("--init and --twist: a run starts from one model");
    if (o->model && (o->init || o->twist))
        return slam_refuse("--model with --init or --twist: the model that training starts from has its shape");
    if (o->val.n && o->val_fraction > 0)
        return slam_refuse("--val and --val-fraction: validation data are given or held out, not both");
    return (!o->warmup || read_warmup(&j->run, o->warmup)) && (!o->micro || read_micro(o->micro, &micro)) &&
           weight_at(o->weights, 0, sources, &weight) && (!o->device || slam_device_check(o->device));
}

/* A path among the flags is kept in full, so that a run can be resumed from another folder. */
static int make_absolute(job *j, const char *name, const char *path) {
    if (!path || !strcmp(path, "tiny") || !strcmp(path, "slam")) return 1;
    char *whole = slam_path_absolute(path);
    const int ok = whole && slam_flags_set(&j->flags, name, whole);
    free(whole);
    return ok;
}

static int is_limit(const job *j, const slam_flag *f) {
    return f->to == &j->o.steps || f->to == &j->o.tokens || f->to == &j->o.epochs || f->to == &j->o.seconds;
}

/* Whether the command line gives a limit that the run does not have already. */
static int is_new_limit(const job *j, const slam_flag *f) {
    const char *stored = slam_settings_get(&j->run.trainer.settings, f->name);
    const double value = f->type == SLAM_LONG ? (double)*(long *)f->to : *(double *)f->to;
    return f->given && !(stored && strtod(stored, NULL) == value);
}

/* Flags, then what the resumed run has, then the recipe, then defaults: the first to say a value decides. */
static int settle(job *j) {
    options *o = &j->o;
    slam_trainer *t = &j->run.trainer;
    if (!make_absolute(j, "init", o->init) || !make_absolute(j, "twist", o->twist) || !make_absolute(j, "model", o->model))
        return 0;
    if (o->out && !o->resume && !o->dry_run && !slam_run_claim(o->out)) return 0;
    if (o->resume && !slam_run_find("train", o->out, &j->folder, &j->checkpoint, t)) return 0;
    j->fresh = t->steps == 0;
    if (!j->fresh) {
        if (!slam_settings_recall(&t->settings, &j->flags, not_kept, may_change, may_grow) ||
            !slam_settings_recall_paths(&t->settings, "data", &j->flags.rest, &j->data_paths) ||
            !slam_settings_recall_paths(&t->settings, "val", &o->val, &j->val_paths))
            return 0;
    } else if (o->recipe) {
        for (size_t i = 0; i < sizeof recipe_slam / sizeof *recipe_slam; i++)
            if (!slam_flags_given(&j->flags, recipe_slam[i][0]) && !slam_flags_set(&j->flags, recipe_slam[i][0], recipe_slam[i][1]))
                return 0;
    }
    j->any_limit = o->steps || o->tokens || o->epochs > 0 || o->seconds > 0;
    for (int i = 0; i < j->flags.n; i++)
        if ((is_limit(j, &j->table[i]) && (j->any_limit || !j->fresh)) || (j->table[i].to == &o->model && (o->init || o->twist)))
            j->table[i].fallback = NULL;
    if (!slam_flags_defaults(&j->flags, j->flags.rest.n == 0)) return 0;
    if (o->min_lr < 0) {
        char spelled[32];
        snprintf(spelled, sizeof spelled, "%.15g", o->lr / 20);
        if (!slam_flags_set(&j->flags, "min-lr", spelled)) return 0;
    }
    return 1;
}

/* ---- data and vocabulary ---- */

static int bundled(const char *argv0, const char *name, slam_list *list) {
    char *path = slam_path_beside(argv0, name);
    const int ok = path && slam_list_add(list, path);
    free(path);
    return ok;
}

/* Without DATA the corpus beside the program is used, with its own validation part. Such a run keeps empty lists, so that it goes on wherever the
   program lies. */
static int name_data(job *j, const char *argv0) {
    options *o = &j->o;
    for (size_t i = 0; j->fresh && i < j->flags.rest.n; i++)
        if (!slam_list_add(&j->data_paths, j->flags.rest.at[i])) return 0;
    for (size_t i = 0; j->fresh && i < o->val.n; i++)
        if (!slam_list_add(&j->val_paths, o->val.at[i])) return 0;
    j->is_bundled = j->data_paths.n == 0;
    if (!j->is_bundled) return 1;
    return bundled(argv0, "test/corpus/train.bin", &j->data_paths) &&
           (j->val_paths.n || o->val_fraction > 0 || bundled(argv0, "test/corpus/val.bin", &j->val_paths));
}

/* How the sources that are validated on are called in the log: as the user calls them. */
static const slam_list *val_names(const job *j) {
    if (j->o.val_fraction > 0) return j->is_bundled ? &j->data_paths : &j->flags.rest;
    return j->o.val.n ? &j->o.val : &j->val_paths;
}

static int open_data(job *j) {
    options *o = &j->o;
    if (!(j->data = slam_data_new(o->context))) return 0;
    for (size_t i = 0; i < j->data_paths.n; i++) {
        double weight;
        if (!weight_at(o->weights, i, j->data_paths.n, &weight) || !slam_data_add(j->data, j->data_paths.at[i], weight)) return 0;
    }
    if (j->val_paths.n && !(j->val = slam_data_new(o->context))) return 0;
    for (size_t i = 0; i < j->val_paths.n; i++)
        if (!slam_data_add(j->val, j->val_paths.at[i], 1)) return 0;
    return 1;
}

/* The model's V stands where there is one; else the data's, --vocab, what a config.json says, the recipe's 502. */
static int decide_vocabulary(job *j) {
    const options *o = &j->o;
    int said, val_said = 0;
    if (!slam_data_vocabulary(j->data, &said) || (j->val && !slam_data_vocabulary(j->val, &val_said))) return 0;
    if (said && val_said && said != val_said)
        return slam_refuse("%s: a vocabulary of %d, but the training data have one of %d", j->val_paths.at[0], val_said, said);
    said = said ? said : val_said;
    if (said && o->V && o->V != said) return slam_refuse("--vocab %d: the data have a vocabulary of %d", o->V, said);
    said = said ? said : o->V;
    if (j->checkpoint || o->init)
        return !said || said == j->config.V
                   ? 1
                   : slam_refuse("%s: the model has a vocabulary of %d, the data one of %d", j->start, j->config.V, said);
    if (o->twist && said > j->config.V)
        return slam_refuse("%s: the model has a vocabulary of %d, fewer than the data's %d", j->start, j->config.V, said);
    if (said) j->config.V = said;
    else if (o->twist || !strcmp(o->model, "tiny") || !strcmp(o->model, "slam")) j->config.V = 502;
    return 1;
}

/* Quantisers that differ number their units differently, and nothing else would tell. */
static int check_units(const job *j) {
    const uint32_t units = slam_data_fingerprint(j->data), val = j->val ? slam_data_fingerprint(j->val) : 0;
    slam_trainer start;
    if (units && val && units != val)
        return slam_refuse("%s: units of quantiser %08x, those of the training data are of %08x", j->val_paths.at[0], val, units);
    if (!j->o.init || !slam_trainer_read(&start, j->start)) return 1; // a model of other make does not say
    const uint32_t known = start.units;
    slam_trainer_free(&start);
    return !known || !units || known == units
               ? 1
               : slam_refuse("%s: trained on units of quantiser %08x, the data have %08x", j->start, known, units);
}

/* The configuration of what training starts from; j->start is its folder, NULL: a new model. */
static int read_config(job *j) {
    options *o = &j->o;
    char path[4200];
    if (j->checkpoint || o->init || o->twist) {
        if (!(j->start = slam_run_model(j->checkpoint ? j->checkpoint : o->init ? o->init : o->twist))) return 0;
        snprintf(path, sizeof path, "%s/config.json", j->start);
    } else snprintf(path, sizeof path, "%s", o->model);
    if (!slam_config_read(&j->config, path) || !decide_vocabulary(j)) return 0;
    if (o->rope_theta > 0) j->config.rope_theta = o->rope_theta;
    if (j->start && o->context > j->config.T)
        return slam_refuse("--context %d: %s was made for up to %d positions", o->context, j->start, j->config.T);
    if (o->context > j->config.T) j->config.T = o->context;
    return 1;
}

static int open_model(job *j) {
    const options *o = &j->o;
    slam_run *r = &j->run;
    if (!j->start) r->model = slam_model_new(j->ops, &j->config, (uint64_t)o->seed);
    else if (!j->checkpoint && o->twist) r->model = slam_model_twist(j->ops, j->start, j->config.V);
    else r->model = slam_model_load(j->ops, j->start);
    if (r->model && o->rope_theta > 0) slam_model_set_rope_theta(r->model, o->rope_theta);
    return r->model != NULL;
}

/* ---- how long, in which parts ---- */

static int planned(const job *j) { return j->o.recompute ? SLAM_TRAIN_RECOMPUTE : SLAM_TRAIN; }

/* The rows at once are kept with the run: another number would change the last bits. */
static int fix_micro(job *j) {
    const options *o = &j->o;
    char spelled[32];
    int micro;
    if (!read_micro(o->micro, &micro)) return 0;
    if (!micro) micro = slam_micro_batch(j->ops, &j->config, o->batch, o->context, planned(j));
    j->run.micro = micro < o->batch ? micro : o->batch;
    snprintf(spelled, sizeof spelled, "%d", micro); // as it was asked for, so that the same command goes on
    return slam_flags_set(&j->flags, "micro-batch", spelled);
}

/* The first limit decides; what --time allows is found once the model runs. */
static int fix_steps(job *j) {
    const options *o = &j->o;
    slam_trainer *t = &j->run.trainer;
    const long stored = t->steps;
    long steps = o->steps, fit;
    int longer = 0;
    j->measure = o->seconds > 0 && j->fresh;
    for (int i = 0; i < j->flags.n; i++) {
        if (!is_limit(j, &j->table[i]) || !is_new_limit(j, &j->table[i])) continue;
        longer = 1;
        j->measure = j->measure || j->table[i].to == &o->seconds;
    }
    if (!j->fresh && !longer) return 1;
    if (o->epochs > 0) {
        fit = (long)ceil(o->epochs * (double)j->size.rows / o->batch);
        steps = !steps || fit < steps ? fit : steps;
    }
    if (o->tokens) {
        if (!slam_steps_for_tokens(j->data, o->context, o->batch, (uint64_t)o->seed, (uint64_t)o->tokens, &fit)) return 0;
        steps = !steps || fit < steps ? fit : steps;
    }
    if (steps && steps < stored)
        return slam_refuse("the limits make %ld steps, the run that is resumed has %ld, and a limit may only grow", steps, stored);
    t->steps = steps;
    j->run.min_steps = stored;
    return 1;
}

/* ---- the plan ---- */

static void print_plan(const job *j, const char *note) {
    const options *o = &j->o;
    const slam_config *c = &j->config;
    const slam_memory m = slam_config_memory(c, j->ops->bytes_per_act, j->run.micro, o->context, planned(j));
    char a[32], b[32], d[32];
    printf("device   %s%s%s%s\n", j->ops->name, *note ? " (" : "", note, *note ? ")" : "");
    printf("model    %s: %s parameters, %d layers, %d channels, vocabulary %d\n", j->start ? j->start : o->model,
           slam_spell_count(a, (double)slam_config_parameters(c)), c->L, c->C, c->V);
    printf("data     %s tokens, %s documents, %d source%s; %s rows of %d, %.1f%% full\n",
           slam_spell_count(a, (double)j->size.tokens), slam_spell_count(b, (double)j->size.documents), slam_data_sources(j->data),
           slam_data_sources(j->data) == 1 ? "" : "s", slam_spell_count(d, (double)j->size.rows), o->context, 100 * j->size.fill);
    printf(
        "memory   %.1f MB: weights %.1f, gradients %.1f, optimiser %.1f, activations %.1f,\n         logits %.1f; %d of %d rows at once\n",
        m.total / 1e6, m.weights / 1e6, m.gradients / 1e6, m.optimiser / 1e6, m.activations / 1e6, m.logits / 1e6, j->run.micro,
        o->batch);
}

static void print_schedule(const job *j) {
    const options *o = &j->o;
    const slam_trainer *t = &j->run.trainer;
    const double tokens = (double)t->steps * o->batch * o->context * j->size.fill;
    char a[32];
    if (!t->steps) printf("steps    as many as fit into the time\n");
    else
        printf("steps    %ld of %d rows: %s tokens, %.3g epochs\n", t->steps, o->batch, slam_spell_count(a, tokens),
               tokens / (double)j->size.tokens);
    printf("schedule lr %g, %s, warm-up %s\n", o->lr, o->schedule, o->warmup);
    if (t->steps && t->steps < j->run.warmup) printf("         the warm-up is longer than the run: lr does not reach its peak\n");
}

static void print_dry_run(const job *j) {
    const options *o = &j->o;
    const double flops = slam_config_flops(&j->config, o->context), tokens = (double)o->batch * o->context * j->size.fill;
    char a[32], b[32];
    printf("work     %s FLOP a token\n", slam_spell_count(b, flops));
    if (o->rate > 0 && j->run.trainer.steps)
        printf("time     %s at %g tokens/s\n", slam_spell_time(a, (double)j->run.trainer.steps * tokens / o->rate), o->rate);
    else if (o->rate > 0)
        printf("time     %s make %.0f steps at %g tokens/s\n", slam_spell_time(a, o->seconds), floor(o->seconds * o->rate / tokens),
               o->rate);
}

/* A path as a shell takes it. */
static void print_path(const char *path) {
    if (!strpbrk(path, " \t\n'\"\\$&;|<>()*?[]{}#~!`")) printf("%s", path);
    else {
        printf("'");
        for (const char *c = path; *c; c++) printf(*c == '\'' ? "'\\''" : "%c", *c);
        printf("'");
    }
}

/* Twice what was asked for; the number of steps where nothing was. */
static void print_twice(const job *j) {
    const options *o = &j->o;
    char time[32];
    if (o->steps || !j->any_limit) printf(" --steps %ld", 2 * (o->steps ? o->steps : j->run.trainer.steps));
    if (o->tokens) printf(" --tokens %ld", 2 * o->tokens);
    if (j->any_limit && o->epochs > 0) printf(" --epochs %.15g", 2 * o->epochs);
    if (o->seconds > 0) printf(" --time %s", slam_spell_time(time, 2 * o->seconds));
}

/* What there is to do after the run. */
static void print_next(const job *j) {
    const slam_run *r = &j->run;
    const int stopped = r->ended == SLAM_ENDED_SIGNAL;
    printf("\nnext  ./train --resume --out ");
    print_path(r->folder);
    if (!stopped) print_twice(j);
    printf("\n          %s\n      ./eval ", stopped ? "goes on where this stopped" : "goes on for as long again");
    print_path(r->folder);
    printf(" ppl\n          sets it beside n-gram models of the same data\n");
    if (!j->is_bundled) return;
    printf(
        "      ./tokenize FOLDER --fit 100 --kmeans km.npy\n      ./tokenize FOLDER --kmeans km.npy -o my.bin && ./train my.bin\n          trains on recordings of your own\n");
}

static void print_end(const job *j, long first) {
    const slam_run *r = &j->run;
    const slam_trainer *t = &r->trainer;
    char a[32], b[32];
    const char *why = r->ended == SLAM_ENDED_SIGNAL ? "stopped"
                      : r->ended == SLAM_ENDED_TIME ? "out of time"
                      : first == t->step            ? "complete"
                                                    : "done";
    printf("%s after %ld of %ld steps, %s tokens, %s", why, t->step, t->steps, slam_spell_count(b, (double)t->tokens),
           slam_spell_time(a, t->seconds));
    if (t->skipped) printf(", %ld updates left out", t->skipped);
    if (r->val_step) printf(": validation loss %.4f nats a token (perplexity %.2f)", r->val_loss, exp(r->val_loss));
    printf("\n");
    if (t->step) printf("checkpoint %s/step_%06ld, which is %s/latest\n", r->folder, t->step, r->folder);
    if (t->best_step)
        printf("           %s/best, of the lowest validation loss, is step %ld (%.4f)\n", r->folder, t->best_step, t->best_loss);
    print_next(j);
}

/* ---- the run ---- */

static int fill_run(job *j) {
    options *o = &j->o;
    slam_run *r = &j->run;
    const char *const schedules[] = {"cosine", "inverse-sqrt", "linear", "constant"};
    r->ops = j->ops;
    r->adamw.beta1 = o->beta1;
    r->adamw.beta2 = o->beta2;
    r->adamw.eps = o->eps;
    r->adamw.weight_decay = o->weight_decay;
    r->adamw.clip = o->clip;
    r->max_tokens = (uint64_t)o->tokens;
    r->max_seconds = o->seconds;
    r->lr = o->lr;
    r->min_lr = o->min_lr;
    for (int i = 0; i < 4; i++)
        if (!strcmp(o->schedule, schedules[i])) r->schedule = i;
    r->eval_every = o->eval_every;
    r->save_every = o->save_every;
    r->log_every = o->log_every;
    r->lines = slam_flags_given(&j->flags, "log-every");
    r->keep = o->keep;
    r->format = strcmp(o->format, "hf") ? SLAM_FORMAT_SLAMKIT : SLAM_FORMAT_HF;
    r->context = o->context;
    return read_warmup(r, o->warmup) && fix_micro(j);
}

/* What the run has to be resumed with: every setting as it came out, and the data. */
static int keep_settings(job *j) {
    slam_trainer *t = &j->run.trainer;
    char without[sizeof not_kept + sizeof may_grow];
    uint64_t hash;
    snprintf(without, sizeof without, "%s%s%s", not_kept, j->any_limit ? "" : " ", j->any_limit ? "" : may_grow);
    if (!slam_data_hash(j->data, &j->size, j->o.context, (uint64_t)j->o.seed, &hash)) return 0;
    if (!j->fresh && hash != t->data)
        return slam_refuse("%s: the data are not those that this run was begun with", j->data_paths.at[0]);
    t->data = hash;
    t->units = slam_data_fingerprint(j->data);
    return slam_settings_set(&t->settings, "program", "train") && slam_settings_keep(&t->settings, &j->flags, without) &&
           slam_settings_keep_paths(&t->settings, "data", &j->flags.rest) &&
           slam_settings_keep_paths(&t->settings, "val", &j->o.val);
}

/* Settles all that is known before training: settings, device, data, vocabulary, length. */
static int plan(job *j, const char *argv0, char note[256]) {
    options *o = &j->o;
    if (!settle(j) || !name_data(j, argv0)) return 0;
    if (!(j->ops = slam_run_device(&j->run.trainer.settings, &j->flags, o->device, o->dtype, o->threads, note))) return 0;
    if (!open_data(j) || !read_config(j) || !check_units(j)) return 0;
    if (!slam_data_prepare(j->data, j->config.V, o->val_fraction, (uint64_t)o->seed, o->val_fraction > 0 ? &j->val : NULL))
        return 0;
    if (j->val_paths.n && !slam_data_prepare(j->val, j->config.V, 0, 0, NULL)) return 0;
    return slam_data_measure(j->data, -1, (uint64_t)o->seed, &j->size) && fill_run(j) && fix_steps(j);
}

static int train(job *j) {
    options *o = &j->o;
    slam_run *r = &j->run;
    if (!open_model(j)) return 0;
    j->task = slam_pretraining_new(r->model, j->data, j->val, val_names(j), o->context, o->batch, r->micro, planned(j),
                                   (uint64_t)o->seed);
    if (!j->task) return 0;
    r->task = slam_pretraining_task(j->task);
    if (j->measure && !slam_run_time(r)) {
        if (slam_signals_stop()) printf("stopped before the first step\n");
        return slam_signals_stop();
    }
    if (!keep_settings(j)) return 0;
    r->folder = j->folder ? j->folder : o->out ? o->out : (j->folder = slam_run_new("train"));
    if (!r->folder) return 0;
    printf("run      %s\n", r->folder);
    fflush(stdout);
    if (!slam_run_begin(r, j->checkpoint)) return 0;
    const long first = r->trainer.step;
    if (!slam_run_train(r)) return 0;
    print_end(j, first);
    return 1;
}

static void close_all(job *j) {
    slam_run_end(&j->run);
    slam_pretraining_free(j->task);
    slam_model_free(j->run.model);
    slam_data_free(j->val);
    slam_data_free(j->data);
    slam_ops_free(j->ops);
    slam_list_free(&j->data_paths);
    slam_list_free(&j->val_paths);
    slam_flags_free(&j->flags);
    free(j->folder);
    free(j->checkpoint);
    free(j->start);
}

int main(int argc, char **argv) {
    job j;
    char note[256] = "";
    memset(&j, 0, sizeof j);
    j.run.began = slam_clock();
    j.o.min_lr = -1;
    j.flags.program = "train";
    j.flags.usage = "[options] [DATA...]";
    j.flags.about =
        "Trains a speech language model on units: token shards (.bin) or unit files (.jsonl), globs allowed; without DATA on the "
        "bundled corpus. The value without a flag stands in brackets; of two, the second is the one without DATA.";
    j.flags.at = j.table;
    j.flags.n = flag_table(j.table, &j.o);
    const int parsed = slam_flags_parse(&j.flags, argc, argv);
    int status = parsed == 0 || (parsed == 1 && !check_flags(&j)) ? 2 : 0;
    if (parsed == 1 && status == 0) {
        slam_signals_catch();
        int ok = plan(&j, argv[0], note);
        if (ok) {
            print_plan(&j, note);
            print_schedule(&j);
            fflush(stdout);
        }
        if (ok && j.o.dry_run) print_dry_run(&j);
        else if (ok) ok = train(&j);
        else if ((ok = slam_signals_stop())) printf("stopped before the first step\n");
        status = ok ? 0 : 1;
    }
    if (status == 2) slam_flags_usage(&j.flags);
    else if (status) fprintf(stderr, "train: error: %s\n", slam_error());
    close_all(&j);
    return status;
}
