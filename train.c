/* train.c - pre-training. `./train` alone trains a tiny model on the bundled corpus.

   main() reads the flags; pretrain() plans, opens the model and trains; train() is the training loop: batch, forward
   and backward, update, log, evaluate, save. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct program {
    slam_run run; /* flags, model, optimiser, folder, log and progress; dpo.c uses the same type */
    /* values of this program's own flags */
    char *weights, *twist, *model_name, *recipe;
    double rope_theta, rate;
    int V;
    double val_loss;
    slam_data *data, *val;
    double tokens; /* of an epoch */
    char *start;   /* model folder to load; NULL: random weights */
    slam_loader *loader;
    slam_batch batch;
} program;

/* ---- the training loop ---- */

/* One update: forward and backward over the micro-batches of the global batch, then AdamW. The loss is the mean over
   all targets of the global batch. */
static int train_step(program *p, double lr, slam_step *step) {
    slam_run *r = &p->run;
    slam_loader *l = p->loader;
    int rows;
    if (slam_loader_begin(l, r->o.batch, r->comm) <= 0) return 0;
    if (!l->targets) return slam_set_error("a batch of %d rows has no token to predict", r->o.batch);
    while ((rows = slam_loader_next(l, &p->batch)) > 0) {
        if (!l->rows_left) slam_adamw_overlap(&r->opt); /* the ranks exchange gradients during the last backward pass */
        if (!slam_forward_backward(r->model, &p->batch, (float)(1.0 / (double)l->targets))) return 0;
    }
    return slam_adamw_step(&r->opt, lr, step);
}

static int train(program *p) {
    slam_run *r = &p->run;
    slam_trainer *t = &r->trainer;
    slam_loader *l = p->loader;
    const size_t n_sources = p->val ? p->val->n_sources : 0;
    double *losses = (double *)calloc(1 + n_sources, sizeof *losses); /* of all validation data, then of each source */
    uint64_t targets;
    slam_step step;
    int ok = 1;

    while (ok && slam_run_continues(r)) {
        ok = train_step(p, slam_learning_rate(&r->schedule, t->step), &step);
        if (!ok) break;
        t->epoch = l->epoch;
        t->row = l->row;
        ok = slam_run_finish_step(r, &step, step.loss_sum / (double)l->targets, l->tokens, NULL, 0);

        if (ok && p->val && slam_run_eval_due(r))
            ok = slam_data_loss(r->model, p->val, &p->batch, losses, &targets) &&
                 slam_run_finish_eval(r, losses, n_sources, NULL, 0);

        if (ok && slam_run_save_due(r)) ok = slam_run_save(r);
    }
    p->val_loss = losses[0];
    free(losses);
    return ok;
}

/* ---- flags ---- */

/* What --recipe slam sets (Maimon, Elmakies and Adi 2025, and the configuration of SlamKit). */
static const char *const recipe_slam[][2] = {
    {"model", "slam"},  {"context", "1024"},        {"batch", "78"},        {"steps", "17625"},      {"lr", "1e-3"},
    {"min-lr", "5e-5"}, {"warmup", "max(100, 1%)"}, {"beta1", "0.9"},       {"beta2", "0.999"},      {"eps", "1e-8"},
    {"clip", "0.5"},    {"weight-decay", "0"},      {"schedule", "cosine"}, {"rope-theta", "10000"}, {NULL, NULL},
};

/* {flag, default, help} instead of the common ones; a default "x | y" is x with DATA, y without (bundled corpus). */
static const char *const presets[][3] = {
    {"batch", "8 | 16", "rows per step"},
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

static void set_flags(program *p) {
    slam_run *r = &p->run;
    slam_options *o = &r->o;
    const slam_flag own[] = {
        SLAM_HEADING("Data"),
        SLAM_FLAG("val", SLAM_LIST, &o->val, "PATH", NULL, "validation data; may be repeated"),
        SLAM_NUMBER("val-fraction", SLAM_REAL, &o->val_fraction, "P", "0", 0, 0.9,
                    "or hold out this share of the documents"),
        SLAM_FLAG("weights", SLAM_TEXT, &p->weights, "W,W,...", NULL,
                  "how often an epoch repeats each DATA, e.g. 1,0.5 [1 for each]"),
        SLAM_NUMBER("vocab", SLAM_INT, &p->V, "V", NULL, 3, 65536, "vocabulary size, if the data does not state it"),
        SLAM_NUMBER("context", SLAM_INT, &o->context, "N", "1024 | 256", 2, 1 << 24, "tokens per row"),
        SLAM_HEADING("Model"),
        SLAM_FLAG("model", SLAM_TEXT, &p->model_name, "NAME", NULL, "tiny, slam or a config.json [tiny]"),
        SLAM_FLAG("init", SLAM_PATH, &o->init, "DIR", NULL, "start from this model, trained on the same units"),
        SLAM_FLAG("twist", SLAM_PATH, &p->twist, "DIR", NULL,
                  "start from this text model; keeps the first V rows of its embedding"),
        SLAM_NUMBER("rope-theta", SLAM_REAL, &p->rope_theta, "X", NULL, 1, 1e12,
                    "base of the rotary positions [the model's]"),
        SLAM_FLAG("recipe", SLAM_CHOICE, &p->recipe, "slam", NULL, "all settings of the Slam paper at once"),
        SLAM_HEADING("Length: the smallest of these limits sets the number of steps and the schedule"),
        SLAM_NUMBER("steps", SLAM_LONG | SLAM_LIMIT, &o->steps, "N", "- | 600", 1, 1e12, "updates"),
        SLAM_NUMBER("tokens", SLAM_LONG | SLAM_LIMIT, &o->tokens, "N", NULL, 1, 1e15, "tokens, without padding"),
        SLAM_NUMBER("epochs", SLAM_REAL | SLAM_LIMIT, &o->epochs, "X", "1 | -", 1e-6, 1e6, "passes over the data"),
        SLAM_NUMBER("time", SLAM_TIME | SLAM_LIMIT, &o->seconds, "HH:MM:SS", NULL, 1e-3, 1e9,
                    "as many steps as fit, by the speed of the first ones"),
        SLAM_NUMBER("rate", SLAM_REAL | SLAM_UNSAVED, &p->rate, "N", NULL, 0, 1e12,
                    "with --dry-run: tokens per second, to print the time"),
    };
    r->data_name = "data";
    r->bundled_data[0] = "test/corpus/train.bin";
    r->bundled_data[1] = "test/corpus/val.bin";
    r->flags.program = "train";
    r->flags.usage = "[options] [DATA...]";
    r->flags.about =
        "Trains a speech language model on units: token shards (.bin) or unit files (.jsonl), globs allowed; without "
        "DATA on the bundled corpus. Defaults stand in brackets; where there are two, the second is for the "
        "bundled corpus.";
    slam_run_flags(r, own, (int)(sizeof own / sizeof *own), presets, (int)(sizeof presets / sizeof *presets));
}

/* Parses --weights W,W,... for n sources (0: any number); *weight is that of source i, 1 without the flag. */
static int source_weight(const char *weights, size_t i, size_t n, double *weight) {
    *weight = 1;
    if (!weights || !*weights) return 1;
    const char *at = weights;
    for (size_t k = 0;; k++) {
        char *end;
        const double w = strtod(at, &end);
        if (end == at || (*end && *end != ','))
            return slam_set_error("--weights %s: expected numbers separated by commas", weights);
        if (k == i) *weight = w;
        at = end + 1;
        if (!*end)
            return !n || k + 1 == n ||
                   slam_set_error("--weights %s: %zu numbers for %zu DATA arguments", weights, k + 1, n);
    }
}

/* What the table of flags cannot check. */
static int check_flags(program *p) {
    const slam_run *r = &p->run;
    const size_t sources = r->flags.rest.n ? r->flags.rest.n : r->o.resume ? 0 : 1;
    double weight;
    if (r->o.init && p->twist) return slam_set_error("--init and --twist: expected one model to start from");
    if (p->model_name && (r->o.init || p->twist))
        return slam_set_error("--model with --init or --twist: that model determines the shape already");
    return source_weight(p->weights, 0, sources, &weight);
}

/* ---- the plan: settings, device, data, vocabulary, length ---- */

static int is_preset(const char *model) { return !strcmp(model, "tiny") || !strcmp(model, "slam"); }

/* A value comes from the command line, else from the resumed run, else from the recipe, else from the defaults. */
static int resolve_flags(program *p) {
    slam_run *r = &p->run;
    for (int i = 0; p->recipe && recipe_slam[i][0]; i++)
        if (!slam_flags_given(&r->flags, recipe_slam[i][0]))
            slam_flags_set(&r->flags, recipe_slam[i][0], recipe_slam[i][1]);
    if (p->model_name && !is_preset(p->model_name))
        slam_flags_set(&r->flags, "model", slam_path_absolute(p->model_name).at);
    return slam_run_open(r);
}

static int open_data(program *p) {
    const slam_run *r = &p->run;
    const slam_strings *data = &r->flags.rest, *val = &r->o.val;
    if (!(p->data = slam_data_new(r->o.context))) return 0;
    for (size_t i = 0; i < data->n; i++) {
        double weight;
        if (!source_weight(p->weights, i, data->n, &weight) || !slam_data_add(p->data, data->at[i], weight)) return 0;
    }
    if (val->n && !(p->val = slam_data_new(r->o.context))) return 0;
    for (size_t i = 0; i < val->n; i++)
        if (!slam_data_add(p->val, val->at[i], 1)) return 0;
    return 1;
}

/* The vocabulary: (1) resumed run, --init: the model's; (2) else the data's or --vocab; (3) else 502 with a preset or
   --twist, (4) else that of config.json. */
static int resolve_vocabulary(program *p) {
    slam_run *r = &p->run;
    slam_config *c = &r->config;
    const int of_data = p->data->V, of_val = p->val ? p->val->V : 0;
    int V = of_data ? of_data : of_val;
    if (of_data && of_val && of_data != of_val)
        return slam_set_error("%s: has vocabulary %d, the training data %d", r->o.val.at[0], of_val, of_data);
    if (V && p->V && p->V != V) return slam_set_error("--vocab %d: the data has vocabulary %d", p->V, V);
    if (!V) V = p->V;
    if (r->checkpoint || r->o.init)
        return !V || V == c->V || slam_set_error("%s: the model has vocabulary %d, the data %d", p->start, c->V, V);
    if (p->twist && V > c->V)
        return slam_set_error("%s: the model has vocabulary %d, expected at least the data's %d", p->start, c->V, V);
    if (V) c->V = V;
    else if (p->twist || is_preset(p->model_name)) c->V = 502;
    return 1;
}

/* Units of different tokenizers are incompatible, and only the fingerprint shows it. */
static int check_units(const program *p) {
    const uint32_t units = p->data->fingerprint, of_val = p->val ? p->val->fingerprint : 0;
    slam_trainer before;
    if (units && of_val && units != of_val)
        return slam_set_error("%s: units of tokenizer %08x, the training data has units of %08x", p->run.o.val.at[0],
                              (unsigned)of_val, (unsigned)units);
    if (!p->run.o.init || !slam_trainer_load(&before, p->start)) return 1; /* not made by train: unknown */
    const uint64_t known = before.units;
    slam_trainer_free(&before);
    return !known || !units || known == units ||
           slam_set_error("%s: trained on units of tokenizer %08x, the data has units of %08x", p->start,
                          (unsigned)known, (unsigned)units);
}

static int read_config(program *p) {
    slam_run *r = &p->run;
    slam_config *c = &r->config;
    const char *from = r->checkpoint ? r->checkpoint : r->o.init ? r->o.init : p->twist;
    char path[4200];
    if (from && !(p->start = slam_run_model(from, NULL))) return 0;
    if (!from && !p->model_name) slam_flags_set(&r->flags, "model", "tiny");
    if (from) snprintf(path, sizeof path, "%s/config.json", p->start);
    else snprintf(path, sizeof path, "%s", p->model_name);
    if (!slam_config_load(c, path) || !resolve_vocabulary(p)) return 0;
    if (p->rope_theta > 0) c->rope_theta = p->rope_theta;
    if (p->start && r->o.context > c->T)
        return slam_set_error("--context %d: %s has up to %d positions", r->o.context, p->start, c->T);
    if (r->o.context > c->T) c->T = r->o.context;
    return 1;
}

/* Steps until --tokens have been seen. */
static int steps_for_tokens(program *p, long *steps) {
    slam_run *r = &p->run;
    slam_loader *l = p->loader;
    double tokens = 0, limit = (double)r->o.tokens;
    char text[64], count[32];
    int rows = 1;
    slam_bar_begin(&r->bar);
    for (*steps = 0; rows > 0 && tokens < limit && !slam_stop_requested(); ++*steps) {
        rows = slam_loader_begin(l, r->o.batch, NULL);
        tokens += (double)l->tokens;
        if (*steps % 1000) continue;
        snprintf(text, sizeof text, "plan  steps for %s tokens", slam_format_count(count, tokens));
        slam_bar_show(&r->bar, tokens, limit, text);
    }
    slam_bar_clear(&r->bar);
    return rows > 0 && !slam_stop_requested() && slam_loader_seek(l, 0, 0);
}

static void print_model_and_data(const program *p) {
    const slam_config *m = &p->run.config;
    const slam_loader *l = p->loader;
    size_t documents = 0;
    char a[32], b[32], c[32];
    for (size_t i = 0; i < p->data->n_sources; i++) documents += p->data->sources[i].documents;
    printf("model    %s: %s parameters, %d layers, %d channels, vocabulary %d\n", p->start ? p->start : p->model_name,
           slam_format_count(a, (double)slam_config_parameters(m)), m->L, m->C, m->V);
    printf("data     %s tokens, %s documents, %zu source%s; %s rows of %d, %.1f%% full\n",
           slam_format_count(a, p->tokens), slam_format_count(b, (double)documents), p->data->n_sources,
           p->data->n_sources == 1 ? "" : "s", slam_format_count(c, (double)l->epoch_rows), l->T,
           100 * p->tokens / ((double)l->epoch_rows * l->T));
}

static int plan(program *p) {
    slam_run *r = &p->run;
    const slam_options *o = &r->o;
    const uint64_t seed = (uint64_t)o->seed;
    long token_steps = 0;
    char text[32];
    if (!resolve_flags(p) || !open_data(p) || !read_config(p) || !check_units(p)) return 0;
    if (!slam_data_prepare(p->data, r->config.V, o->val_fraction, seed)) return 0;
    if (o->val.n && !slam_data_prepare(p->val, r->config.V, 0, 0)) return 0;
    if (!o->val.n) p->val = p->data->held_out;
    slam_loader *l = p->loader = slam_loader_new(p->data, seed, 1);
    if (!l) return 0;
    slam_loader_begin(l, (int)l->epoch_rows, NULL); /* counts the tokens of an epoch */
    p->tokens = (double)l->tokens;
    slam_loader_seek(l, 0, 0);
    if (o->tokens && r->grows && !steps_for_tokens(p, &token_steps)) return 0;
    print_model_and_data(p);
    const double steps_per_epoch = (double)l->epoch_rows / o->batch, tokens = p->tokens / steps_per_epoch;
    if (!slam_run_plan(r, o->batch, o->context, steps_per_epoch, tokens, token_steps)) return 0;
    if (!o->dry_run || p->rate <= 0) return 1;
    const long steps = r->trainer.steps ? r->trainer.steps : (long)(o->seconds * p->rate / tokens);
    printf("time     %s for %ld steps at %g tokens/s\n", slam_format_time(text, (double)steps * tokens / p->rate),
           steps, p->rate);
    return 1;
}

/* ---- --time ---- */

/* Seconds per step, from some steps with learning rate 0, which leave the weights as they are, and of an evaluation.
   The steps (at least 4) take 2 % of the limit, from 1 to 20 s, or if 10 % of the limit is less than 1 s, that. */
static int measure_speed(program *p, double *seconds_per_step) {
    slam_run *r = &p->run;
    const double limit = r->o.seconds, share = 0.02 * limit,
                 enough = share > 20  ? 20
                          : share > 1 ? share
                                      : fmin(1, 0.1 * limit);
    double start = slam_clock();
    uint64_t targets;
    slam_step step;
    long n = 0;
    /* while any rank needs more */
    for (; slam_comm_max(r->comm, n < 4 || (n < 1000 && slam_clock() - start < enough)); n++) {
        if (n == 1) start = slam_clock(); /* the first step is slower than the others */
        if (!train_step(p, 0, &step) || !slam_all_ok(r->comm, !slam_stop_requested())) return 0;
    }
    *seconds_per_step = (slam_clock() - start) / (double)(n - 1);
    slam_adamw_reset(&r->opt);
    if (!p->val || !r->o.eval_every) return 1;
    double *losses = (double *)calloc(1 + p->val->n_sources, sizeof *losses);
    start = slam_clock();
    const int ok = slam_data_loss(r->model, p->val, &p->batch, losses, &targets);
    r->eval_seconds = slam_clock() - start;
    free(losses);
    return ok;
}

/* Sets the number of steps to what fits into the time that is left. */
static int fit_steps(program *p) {
    slam_run *r = &p->run;
    slam_trainer *t = &r->trainer;
    const long before = t->steps, eval_every = p->val ? r->o.eval_every : 0, save_every = r->o.save_every;
    double seconds; /* of a step */
    char text[32];
    if (!measure_speed(p, &seconds)) return 0;
    /* 12 bytes per parameter (weight and moments) to a disk of 300 MB/s */
    r->save_seconds = 12.0 * (double)slam_config_parameters(&r->config) / 300e6;
    /* at worst every evaluation has the best loss so far, which is saved */
    const long saved_every = eval_every && (!save_every || eval_every < save_every) ? eval_every : save_every;
    double each = seconds;
    if (eval_every) each += r->eval_seconds / (double)eval_every;
    if (saved_every) each += r->save_seconds / (double)saved_every;
    const double left = r->o.seconds - (slam_clock() - r->began);
    const double more = (0.97 * left - 2 * (r->eval_seconds + r->save_seconds)) / each; /* 3 % in reserve */
    const long fewest = -slam_comm_max(r->comm, more > 1 ? -(long)more : -1);           /* the minimum over ranks */
    if (!t->steps || t->step + fewest < t->steps) t->steps = t->step + fewest;
    if (!r->fresh && t->steps < before)
        return slam_set_error("--time %s: allows %ld steps, the resumed run has %ld, and a limit may only grow",
                              slam_format_time(text, r->o.seconds), t->steps, before);
    printf("time     %s: %.4g s per step make %ld steps\n", slam_format_time(text, r->o.seconds), seconds, t->steps);
    return 1;
}

/* ---- main ---- */

/* Creates model and optimiser, and restores the checkpoint if there is one. */
static int open_model(program *p) {
    slam_run *r = &p->run;
    const slam_options *o = &r->o;
    if (!p->start) r->model = slam_model_new(r->ops, &r->config, (uint64_t)o->seed);
    else if (!r->checkpoint && p->twist) r->model = slam_model_twist(r->ops, p->start, r->config.V);
    else r->model = slam_model_load(r->ops, p->start);
    if (r->model && p->rope_theta > 0) r->model->config.rope_theta = p->rope_theta;
    const int ok = r->model && slam_model_plan(r->model, r->micro, r->T, r->mode) && slam_adamw_init(&r->opt, r->model);
    if (!slam_all_ok(r->comm, ok) || !slam_run_tune(r)) return 0;
    p->batch = slam_batch_new(r->micro, r->T, 0);
    const int timed = o->seconds > 0 && r->grows && (r->fresh || slam_flags_given(&r->flags, "time"));
    if (timed && !fit_steps(p)) return 0;
    r->trainer.units = p->data->fingerprint;
    return slam_run_begin(r, p->data->hash) &&
           slam_all_ok(r->comm, slam_loader_seek(p->loader, r->trainer.epoch, r->trainer.row));
}

static void print_end(program *p) {
    slam_run *r = &p->run;
    char validation[96] = "";
    if (p->val_loss > 0)
        snprintf(validation, sizeof validation, "validation loss %.4f nats per token (perplexity %.2f)", p->val_loss,
                 exp(p->val_loss));
    slam_run_print_end(r, validation);
    printf("      ./eval ");
    slam_print_path(r->folder);
    printf(" ppl\n          compares it with n-gram models of the same data\n");
    if (r->bundled)
        printf("      ./tokenize FOLDER --fit 100 --kmeans km.npy\n"
               "      ./tokenize FOLDER --kmeans km.npy -o my.bin && ./train my.bin\n"
               "          trains on your own recordings\n");
}

static int pretrain(program *p) {
    if (!slam_all_ok(p->run.comm, plan(p))) return 0;
    if (p->run.o.dry_run) return 1;
    if (!open_model(p) || !train(p)) return 0;
    print_end(p);
    return 1;
}

int main(int argc, char **argv) {
    static program p;
    slam_run *r = &p.run;
    if (!(r->comm = slam_program_begin("train"))) return 1;
    set_flags(&p);
    const int parsed = slam_run_parse(r, argc, argv);
    int status = 0;
    if (!parsed || (parsed == 1 && !check_flags(&p))) status = 2;
    else if (parsed == 1) status = !pretrain(&p);
    status = slam_run_end(r, status);
    slam_loader_free(p.loader);
    slam_batch_free(&p.batch);
    if (p.data && p.val != p.data->held_out) slam_data_free(p.val);
    slam_data_free(p.data);
    free(p.start);
    return status;
}
