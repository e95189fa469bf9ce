/* train.c - pre-training: flags, data and model together, and slam_run_train. `./train` alone trains on the bundled corpus. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    char *weights, *twist, *model, *recipe;
    double seconds, rope_theta, rate;
    long tokens;
    int V;
} options;

/* All that a call of the program opens. */
typedef struct train_job {
    slam_job j;
    options o;   /* besides those that all programs have that train */
    int measure; /* --time has to find the number of steps */
    slam_config config;
    slam_ops *ops;
    slam_data *data, *val;
    slam_data_size size;
    slam_pretraining *task;
    char *start;
} train_job;

/* What --recipe slam sets (Maimon, Elmakies and Adi 2025, and the configuration of SlamKit). */
static const char *const recipe_slam[][2] = {
    {"model", "slam"},  {"context", "1024"},        {"batch", "78"},        {"steps", "17625"},      {"lr", "1e-3"},
    {"min-lr", "5e-5"}, {"warmup", "max(100, 1%)"}, {"beta1", "0.9"},       {"beta2", "0.999"},      {"eps", "1e-8"},
    {"clip", "0.5"},    {"weight-decay", "0"},      {"schedule", "cosine"}, {"rope-theta", "10000"},
};

/* name, fallback (of two, the second is the one without DATA), help: see slam_job_flags */
static const char *const presets[][3] = {
    {"batch", "8 | 16", "rows of a step"},
    {"lr", "1e-3 | 5e-3", NULL},
    {"warmup", "max(100, 1%) | 50", NULL},
    {"schedule", "cosine", NULL},
    {"beta2", "0.999 | 0.95", NULL},
    {"weight-decay", "0 | 1", NULL},
    {"out", NULL, "folder of the run (runs/train, runs/train-2, ...)"},
    {"eval-every", "500 | 100", NULL},
    {"save-every", "500 | 200", NULL},
    {"log-every", "10 | 20", NULL},
    {"seed", NULL, "of weights, order and held-out documents"},
};

static void set_flags(train_job *t) {
    options *o = &t->o;
    slam_options *c = &t->j.o;
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Data", 0, 0, 0, 0},
        {"val", SLAM_LIST, &c->val, "PATH", NULL, "validation data; may be repeated", 0, 0, 0, 0},
        {"val-fraction", SLAM_REAL, &c->val_fraction, "P", "0", "or hold out this share of the documents", 0, 0.9, 0, 0},
        {"weights", SLAM_TEXT, &o->weights, "W,W,...", NULL, "how often an epoch draws from each DATA (1 each)", 0, 0, 0, 0},
        {"vocab", SLAM_INT, &o->V, "V", NULL, "size of the vocabulary, where the data do not say", 3, 65536, 0, 0},
        {"context", SLAM_INT, &c->context, "N", "1024 | 256", "tokens of a row", 2, 1 << 24, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Model", 0, 0, 0, 0},
        {"model", SLAM_TEXT, &o->model, "NAME", "tiny", "tiny, slam or a config.json", 0, 0, 0, 0},
        {"init", SLAM_TEXT, &c->init, "DIR", NULL, "start from this model of the same units", 0, 0, 0, 0},
        {"twist", SLAM_TEXT, &o->twist, "DIR", NULL, "start from this text model, its embedding cut to the units", 0, 0, 0, 0},
        {"rope-theta", SLAM_REAL, &o->rope_theta, "X", NULL, "base of the rotary positions (the model's)", 1, 1e12, 0, 0},
        {"recipe", SLAM_CHOICE, &o->recipe, "slam", NULL, "all settings of the Slam paper at once", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Length: the first limit reached ends the run and fixes the schedule", 0, 0, 0, 0},
        {"steps", SLAM_LONG, &c->steps, "N", "- | 600", "updates", 1, 1e12, 0, 0},
        {"tokens", SLAM_LONG, &o->tokens, "N", NULL, "real tokens, padding not counted", 1, 1e15, 0, 0},
        {"epochs", SLAM_REAL, &c->epochs, "X", "1 | -", "passes over the data", 1e-6, 1e6, 0, 0},
        {"time", SLAM_TIME, &o->seconds, "HH:MM:SS", NULL, "as many steps as fit, by the rate of the first ones", 0, 0, 0, 0},
        {"rate", SLAM_REAL, &o->rate, "N", NULL, "tokens a second, for the time that --dry-run prints", 0, 1e12, 0, 0},
    };
    slam_job *j = &t->j;
    j->program = "train";
    j->key = "data";
    j->not_kept = "out resume dry-run rate ranks flops bandwidth val";
    j->may_change = "threads device recompute save-every keep log-every zero";
    j->may_grow = "steps tokens epochs time";
    j->flags.program = "train";
    j->flags.usage = "[options] [DATA...]";
    j->flags.about =
        "Trains a speech language model on units: token shards (.bin) or unit files (.jsonl), globs allowed; without DATA on the "
        "bundled corpus. The value without a flag stands in brackets; of two, the second is the one without DATA.";
    slam_job_flags(j, table, (int)(sizeof table / sizeof *table), presets, (int)(sizeof presets / sizeof *presets));
}

/* ---- which run, which settings ---- */

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
static int check_flags(train_job *t) {
    const options *o = &t->o;
    const char *init = t->j.o.init;
    const size_t sources = t->j.flags.rest.n ? t->j.flags.rest.n : t->j.o.resume ? 0 : 1;
    double weight;
    if (init && o->twist) return slam_refuse("--init and --twist: a run starts from one model");
    if (o->model && (init || o->twist))
        return slam_refuse("--model with --init or --twist: the model that training starts from has its shape");
    return slam_job_check(&t->j) && weight_at(o->weights, 0, sources, &weight);
}

static int is_name(const char *model) { return !strcmp(model, "tiny") || !strcmp(model, "slam"); }

/* Flags, then what the resumed run has, then the recipe, then defaults: the first to say a value decides. */
static int settle(train_job *t) {
    options *o = &t->o;
    slam_job *j = &t->j;
    if (!slam_job_absolute(j, "init") || !slam_job_absolute(j, "twist")) return 0;
    if (o->model && !is_name(o->model) && !slam_job_absolute(j, "model")) return 0;
    if (!slam_job_recall(j)) return 0;
    for (size_t i = 0; j->fresh && o->recipe && i < sizeof recipe_slam / sizeof *recipe_slam; i++)
        if (!slam_flags_given(&j->flags, recipe_slam[i][0]) && !slam_flags_set(&j->flags, recipe_slam[i][0], recipe_slam[i][1]))
            return 0;
    for (int i = 0; i < j->flags.n; i++)
        if (j->table[i].to == &o->model && (j->o.init || o->twist)) j->table[i].fallback = NULL;
    return slam_job_defaults(j);
}

/* ---- data and vocabulary ---- */

/* How the sources that are validated on are called in the log: as the user calls them. */
static const slam_list *val_names(const slam_job *j) {
    if (j->o.val_fraction > 0) return j->is_bundled ? &j->data : &j->flags.rest;
    return j->o.val.n ? &j->o.val : &j->val;
}

static int open_data(train_job *t) {
    const slam_job *j = &t->j;
    if (!(t->data = slam_data_new(j->o.context))) return 0;
    for (size_t i = 0; i < j->data.n; i++) {
        double weight;
        if (!weight_at(t->o.weights, i, j->data.n, &weight) || !slam_data_add(t->data, j->data.at[i], weight)) return 0;
    }
    if (j->val.n && !(t->val = slam_data_new(j->o.context))) return 0;
    for (size_t i = 0; i < j->val.n; i++)
        if (!slam_data_add(t->val, j->val.at[i], 1)) return 0;
    return 1;
}

/* The model's V stands where there is one; else the data's, --vocab, what a config.json says, the recipe's 502. */
static int decide_vocabulary(train_job *t) {
    const options *o = &t->o;
    int said, val_said = 0;
    if (!slam_data_vocabulary(t->data, &said) || (t->val && !slam_data_vocabulary(t->val, &val_said))) return 0;
    if (said && val_said && said != val_said)
        return slam_refuse("%s: a vocabulary of %d, but the training data have one of %d", t->j.val.at[0], val_said, said);
    said = said ? said : val_said;
    if (said && o->V && o->V != said) return slam_refuse("--vocab %d: the data have a vocabulary of %d", o->V, said);
    said = said ? said : o->V;
    if (t->j.checkpoint || t->j.o.init)
        return !said || said == t->config.V
                   ? 1
                   : slam_refuse("%s: the model has a vocabulary of %d, the data one of %d", t->start, t->config.V, said);
    if (o->twist && said > t->config.V)
        return slam_refuse("%s: the model has a vocabulary of %d, fewer than the data's %d", t->start, t->config.V, said);
    if (said) t->config.V = said;
    else if (o->twist || is_name(o->model)) t->config.V = 502;
    return 1;
}

/* Quantisers that differ number their units differently, and nothing else would tell. */
static int check_units(const train_job *t) {
    const uint32_t units = slam_data_fingerprint(t->data), val = t->val ? slam_data_fingerprint(t->val) : 0;
    slam_trainer start;
    if (units && val && units != val)
        return slam_refuse("%s: units of quantiser %08x, those of the training data are of %08x", t->j.val.at[0], val, units);
    if (!t->j.o.init || !slam_trainer_read(&start, t->start)) return 1; // a model of other make does not say
    const uint32_t known = start.units;
    slam_trainer_free(&start);
    return !known || !units || known == units
               ? 1
               : slam_refuse("%s: trained on units of quantiser %08x, the data have %08x", t->start, known, units);
}

/* The configuration of what training starts from; t->start is its folder, NULL: a new model. */
static int read_config(train_job *t) {
    const char *from = t->j.checkpoint ? t->j.checkpoint : t->j.o.init ? t->j.o.init : t->o.twist;
    const int context = t->j.o.context;
    char path[4200];
    if (from) {
        if (!(t->start = slam_run_model(from))) return 0;
        snprintf(path, sizeof path, "%s/config.json", t->start);
    } else snprintf(path, sizeof path, "%s", t->o.model);
    if (!slam_config_read(&t->config, path) || !decide_vocabulary(t)) return 0;
    if (t->o.rope_theta > 0) t->config.rope_theta = t->o.rope_theta;
    if (t->start && context > t->config.T)
        return slam_refuse("--context %d: %s was made for up to %d positions", context, t->start, t->config.T);
    if (context > t->config.T) t->config.T = context;
    return 1;
}

static int open_model(train_job *t) {
    slam_run *r = &t->j.run;
    if (!t->start) r->model = slam_model_new(t->ops, &t->config, (uint64_t)t->j.o.seed);
    else if (!t->j.checkpoint && t->o.twist) r->model = slam_model_twist(t->ops, t->start, t->config.V);
    else r->model = slam_model_load(t->ops, t->start);
    if (r->model && t->o.rope_theta > 0) slam_model_set_rope_theta(r->model, t->o.rope_theta);
    return r->model != NULL;
}

/* ---- how long ---- */

/* The first limit decides; what --time allows is found once the model runs. */
static int fix_steps(train_job *t) {
    const options *o = &t->o;
    const slam_options *c = &t->j.o;
    long most = 0;
    t->measure = o->seconds > 0 && (t->j.fresh || slam_job_grows(&t->j, "time"));
    t->j.run.max_tokens = (uint64_t)o->tokens;
    t->j.run.max_seconds = o->seconds;
    if (o->tokens && slam_job_grows(&t->j, NULL) &&
        !slam_steps_for_tokens(t->data, c->context, c->batch, (uint64_t)c->seed, (uint64_t)o->tokens, &most))
        return 0;
    return slam_job_steps(&t->j, (double)t->size.rows / c->batch, most);
}

/* ---- the plan ---- */

static void print_plan(const train_job *t, const char *note) {
    const slam_options *c = &t->j.o;
    const slam_config *m = &t->config;
    const long steps = t->j.run.trainer.steps;
    const double tokens = (double)steps * c->batch * c->context * t->size.fill;
    char a[32], b[32], d[32];
    slam_job_print_device(&t->j, note);
    printf("model    %s: %s parameters, %d layers, %d channels, vocabulary %d\n", t->start ? t->start : t->o.model,
           slam_spell_count(a, (double)slam_config_parameters(m)), m->L, m->C, m->V);
    printf("data     %s tokens, %s documents, %d source%s; %s rows of %d, %.1f%% full\n",
           slam_spell_count(a, (double)t->size.tokens), slam_spell_count(b, (double)t->size.documents), slam_data_sources(t->data),
           slam_data_sources(t->data) == 1 ? "" : "s", slam_spell_count(d, (double)t->size.rows), c->context, 100 * t->size.fill);
    slam_job_print_memory(&t->j, m, c->batch);
    if (!steps) printf("steps    as many as fit into the time\n");
    else
        printf("steps    %ld of %d rows: %s tokens, %.3g epochs\n", steps, c->batch, slam_spell_count(a, tokens),
               tokens / (double)t->size.tokens);
    slam_job_print_schedule(&t->j);
    fflush(stdout);
}

static void print_dry_run(const train_job *t) {
    const options *o = &t->o;
    const slam_options *c = &t->j.o;
    const double flops = slam_config_flops(&t->config, c->context), tokens = (double)c->batch * c->context * t->size.fill;
    char a[32], b[32];
    printf("work     %s FLOP a token\n", slam_spell_count(b, flops));
    slam_job_print_ranks(&t->j, &t->config, c->batch, tokens);
    if (o->rate > 0 && t->j.run.trainer.steps)
        printf("time     %s at %g tokens/s\n", slam_spell_time(a, (double)t->j.run.trainer.steps * tokens / o->rate), o->rate);
    else if (o->rate > 0)
        printf("time     %s make %.0f steps at %g tokens/s\n", slam_spell_time(a, o->seconds), floor(o->seconds * o->rate / tokens),
               o->rate);
}

/* What there is to do after the run. */
static void print_next(const train_job *t) {
    printf("\nnext  ");
    slam_job_print_resume(&t->j);
    printf("      ./eval ");
    slam_print_path(t->j.run.folder);
    printf(" ppl\n          sets it beside n-gram models of the same data\n");
    if (!t->j.is_bundled) return;
    printf(
        "      ./tokenize FOLDER --fit 100 --kmeans km.npy\n      ./tokenize FOLDER --kmeans km.npy -o my.bin && ./train my.bin\n          trains on recordings of your own\n");
}

/* ---- the run ---- */

/* Settles all that is known before training: settings, device, data, vocabulary, length. */
static int plan(train_job *t, const char *argv0, char note[256]) {
    slam_job *j = &t->j;
    const slam_options *c = &j->o;
    if (!settle(t) || !slam_job_name_data(j, argv0, "test/corpus/train.bin", "test/corpus/val.bin")) return 0;
    if (!(t->ops = slam_job_device(j, note))) return 0;
    if (!open_data(t) || !read_config(t) || !check_units(t)) return 0;
    if (!slam_data_prepare(t->data, t->config.V, c->val_fraction, (uint64_t)c->seed, c->val_fraction > 0 ? &t->val : NULL))
        return 0;
    if (j->val.n && !slam_data_prepare(t->val, t->config.V, 0, 0, NULL)) return 0;
    return slam_data_measure(t->data, -1, (uint64_t)c->seed, &t->size) &&
           slam_job_fill(j, t->ops, &t->config, c->batch, c->context) && fix_steps(t);
}

static int train(train_job *t) {
    slam_job *j = &t->j;
    const slam_options *c = &j->o;
    slam_run *r = &j->run;
    uint64_t hash;
    char validation[96] = "";
    if (!open_model(t)) return 0;
    t->task = slam_pretraining_new(r->model, t->data, t->val, val_names(j), c->context, c->batch, r->micro, slam_job_mode(j),
                                   (uint64_t)c->seed);
    if (!t->task) return 0;
    r->task = slam_pretraining_task(t->task);
    const int timed = t->measure ? slam_run_time(r) : 1;
    if (timed == 2) printf("stopped before the first step\n");
    if (timed != 1) return timed;
    r->trainer.units = slam_data_fingerprint(t->data);
    if (!slam_data_hash(t->data, &t->size, c->context, (uint64_t)c->seed, &hash) || !slam_job_keep(j, hash) || !slam_job_begin(j))
        return 0;
    const long first = r->trainer.step;
    if (!slam_run_train(r)) return 0;
    if (r->val_step)
        snprintf(validation, sizeof validation, "validation loss %.4f nats a token (perplexity %.2f)", r->val_loss,
                 exp(r->val_loss));
    slam_job_print_end(j, first, validation);
    print_next(t);
    return 1;
}

int main(int argc, char **argv) {
    train_job t;
    char note[256] = "";
    memset(&t, 0, sizeof t);
    t.j.run.began = slam_clock();
    if (!(t.j.ranks = slam_program_begin("train"))) return 1;
    set_flags(&t);
    const int parsed = slam_flags_parse(&t.j.flags, argc, argv);
    int status = parsed == 0 || (parsed == 1 && !check_flags(&t)) ? 2 : 0;
    if (parsed == 1 && status == 0) {
        slam_signals_catch(t.j.ranks);
        int ok = slam_ranks_agree(t.j.ranks, plan(&t, argv[0], note));
        if (ok) print_plan(&t, note);
        if (ok && t.j.o.dry_run) print_dry_run(&t);
        else if (ok) ok = train(&t);
        else if ((ok = (int)slam_ranks_max(t.j.ranks, slam_signals_stop()))) printf("stopped before the first step\n");
        status = ok ? 0 : 1;
    }
    status = slam_job_end(&t.j, status);
    slam_pretraining_free(t.task);
    slam_model_free(t.j.run.model);
    slam_data_free(t.val);
    slam_data_free(t.data);
    slam_ops_free(t.ops);
    free(t.start);
    return status;
}
