/* dpo.c - preference optimisation: pairs, their reference and slam_run_train. `./dpo` alone: the bundled pairs, from the newest run of
   ./train. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* All that a call of the program opens. */
typedef struct dpo_job {
    slam_job j;
    double beta, label_smoothing, repetition_filter;
    int share_prompt;
    char *reference; /* folder of the model that training starts from */
    slam_config config;
    slam_trainer before; /* of the run that it is from; without settings where it is from none */
    slam_ops *ops;
    slam_pairs *pairs;
    slam_pairs_size size;
    slam_dpo *dpo;
    uint64_t model; /* the reference's hash */
    slam_progress bar;
} dpo_job;

/* name, fallback (of two, the second is the one without PAIRS), help: see slam_job_flags */
static const char *const presets[][3] = {
    {"batch", "64 | 16", "pairs of a step"},
    {"lr", "5e-5 | 1e-4", NULL},
    {"warmup", "max(100, 1%) | 5", NULL},
    {"schedule", "constant", NULL},
    {"out", NULL, "folder of the run (runs/dpo, runs/dpo-2, ...)"},
    {"eval-every", "100 | 10", NULL},
    {"save-every", "500 | 0", NULL},
    {"log-every", "10 | 5", NULL},
    {"seed", NULL, "of the order and of held-out pairs"},
};

static void set_flags(dpo_job *d) {
    slam_job *j = &d->j;
    slam_options *c = &j->o;
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Pairs", 0, 0, 0, 0},
        {"val", SLAM_LIST, &c->val, "PATH", NULL, "pairs to validate on; may be repeated", 0, 0, 0, 0},
        {"val-fraction", SLAM_REAL, &c->val_fraction, "P", "0", "or hold out this share of the pairs", 0, 0.9, 0, 0},
        {"repetition-filter", SLAM_REAL, &d->repetition_filter, "P", "0.3",
         "leave out pairs whose text (prompt_text, chosen_text) has an auto-BLEU-2 of this or more; 0: none", 0, 1, 0, 0},
        {"context", SLAM_INT, &c->context, "N", NULL, "most tokens of a prompt with an ending (as the model was trained)", 4,
         1 << 24, 0, 0},
        {"share-prompt", SLAM_SWITCH, &d->share_prompt, NULL, NULL, "compute a prompt once for both of its endings", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Preference", 0, 0, 0, 0},
        {"init", SLAM_TEXT, &c->init, "DIR", NULL, "the model to start from, and to stay near (the newest run of train)", 0, 0, 0,
         0},
        {"beta", SLAM_REAL, &d->beta, "X", "0.1", "how near", 1e-6, 1e3, 0, 0},
        {"label-smoothing", SLAM_REAL, &d->label_smoothing, "P", "0", "share of pairs that may be the wrong way round", 0, 0.5, 0,
         0},
        {NULL, 0, NULL, NULL, NULL, "Length: the first limit reached ends the run", 0, 0, 0, 0},
        {"steps", SLAM_LONG, &c->steps, "N", NULL, "updates", 1, 1e12, 0, 0},
        {"epochs", SLAM_REAL, &c->epochs, "X", "1", "passes over the pairs", 1e-6, 1e6, 0, 0},
    };
    j->program = "dpo";
    j->key = "pairs";
    j->not_kept = "out resume dry-run ranks flops bandwidth val";
    j->may_change = "threads device recompute save-every keep log-every zero";
    j->may_grow = "steps epochs";
    j->flags.program = "dpo";
    j->flags.usage = "[options] [PAIRS.jsonl...]";
    j->flags.about =
        "Direct preference optimisation on SlamKit preference pairs (.jsonl, globs allowed): of two endings of a prompt one is "
        "preferred. Without PAIRS on the bundled ones. The value without a flag stands in brackets; of two, the second is the one "
        "without PAIRS.";
    slam_job_flags(j, table, (int)(sizeof table / sizeof *table), presets, (int)(sizeof presets / sizeof *presets));
}

/* ---- which run, which model ---- */

/* The model that training starts from is named at the beginning of a run, and stays its reference. */
static int name_reference(dpo_job *d) {
    slam_job *j = &d->j;
    slam_settings *s = &j->run.trainer.settings;
    const char *stored = slam_settings_get(s, "reference"), *hash = slam_settings_get(s, "reference_model");
    char *newest = NULL, *model = NULL;
    if (!j->fresh) {
        if (!stored || !hash) return slam_refuse("trainer.json: does not say what the reference of this run is");
        d->model = strtoull(hash, NULL, 16);
        return (d->reference = slam_path_absolute(stored)) != NULL;
    }
    if (!j->o.init && !(newest = slam_run_newest("train")))
        return slam_refuse("--init: no model to start from is named, and %s; ./train makes one", slam_error());
    if ((model = slam_run_model(j->o.init ? j->o.init : newest)) != NULL) d->reference = slam_path_absolute(model);
    free(newest);
    free(model);
    return d->reference && slam_settings_set(s, "reference", d->reference);
}

/* Rows as long as those that the model was trained on, but where a flag says otherwise. */
static int read_config(dpo_job *d) {
    slam_job *j = &d->j;
    char path[4200], spelled[32];
    snprintf(path, sizeof path, "%s/config.json", j->checkpoint ? j->checkpoint : d->reference);
    if (!slam_config_read(&d->config, path)) return 0;
    if (j->o.context > d->config.T)
        return slam_refuse("--context %d: %s was made for up to %d positions", j->o.context, d->reference, d->config.T);
    slam_trainer_read(&d->before, d->reference); /* a model that others made has none */
    if (j->fresh) j->run.trainer.units = d->before.units;
    if (j->o.context) return 1;
    const char *trained = slam_settings_get(&d->before.settings, "context");
    const int own = trained ? atoi(trained) : 1024, most = own < d->config.T ? own : d->config.T;
    snprintf(spelled, sizeof spelled, "%d", most < 4 ? 4 : most);
    return slam_flags_set(&j->flags, "context", spelled);
}

static int open_pairs(dpo_job *d) {
    const slam_job *j = &d->j;
    const slam_options *c = &j->o;
    d->pairs = slam_pairs_new(d->config.V, c->context, d->share_prompt, d->repetition_filter);
    for (size_t i = 0; d->pairs && i < j->data.n; i++)
        if (!slam_pairs_add(d->pairs, j->data.at[i], 0)) return 0;
    for (size_t i = 0; d->pairs && i < j->val.n; i++)
        if (!slam_pairs_add(d->pairs, j->val.at[i], 1)) return 0;
    return d->pairs && slam_pairs_prepare(d->pairs, c->val_fraction, (uint64_t)c->seed) &&
           slam_pairs_measure(d->pairs, c->batch, (uint64_t)c->seed, &d->size);
}

/* Settles all that is known before training: settings, device, model, pairs, length. */
static int plan(dpo_job *d, const char *argv0, char note[256]) {
    slam_job *j = &d->j;
    const slam_options *c = &j->o;
    if (!slam_job_absolute(j, "init") || !slam_job_recall(j) || !slam_job_defaults(j)) return 0;
    if (!slam_job_name_data(j, argv0, "test/corpus/pairs.jsonl", "test/corpus/pairs-val.jsonl")) return 0;
    if (!name_reference(d) || !read_config(d) || (j->is_bundled && !slam_bundled_units(argv0, j->run.trainer.units))) return 0;
    if (!open_pairs(d)) return 0;
    if (!(d->ops = slam_job_device(j, note))) return 0;
    if (!slam_job_fill(j, d->ops, &d->config, d->size.most_rows, slam_pairs_row(d->pairs))) return 0;
    return slam_job_steps(j, (double)d->size.train / c->batch, 0);
}

/* ---- the plan ---- */

static void print_count(uint64_t n, const char *what) {
    if (n) printf(", %llu %s", (unsigned long long)n, what);
}

static void print_plan(const dpo_job *d, const char *note) {
    const slam_options *c = &d->j.o;
    const slam_config *m = &d->config;
    const slam_pairs_size *s = &d->size;
    const long steps = d->j.run.trainer.steps;
    char a[32];
    slam_job_print_device(&d->j, note);
    printf("model    %s: %s parameters, %d layers, %d channels, vocabulary %d\n", d->reference,
           slam_spell_count(a, (double)slam_config_parameters(m)), m->L, m->C, m->V);
    printf("pairs    %llu to train on, %llu to validate on", (unsigned long long)s->train, (unsigned long long)s->validation);
    print_count(s->cut, "prompts cut");
    print_count(s->apart, "too long to share a prompt");
    if (s->repeats + s->silent + s->same + s->large) printf("\n         left out");
    print_count(s->repeats, "that repeat themselves");
    print_count(s->silent, "without a unit");
    print_count(s->same, "with the same ending twice");
    print_count(s->large, "too long");
    printf("\nrows     %s tokens, rows of up to %d, %.1f%% full, prompts %s\n", slam_spell_count(a, (double)s->tokens),
           d->j.run.context, 100 * (double)s->tokens / (double)s->positions, d->share_prompt ? "shared" : "for each ending");
    slam_job_print_memory(&d->j, m, s->most_rows);
    printf("steps    %ld of %d pairs: %.3g epochs\n", steps, c->batch, (double)steps * c->batch / (double)s->train);
    printf("loss     beta %g, label smoothing %g\n", d->beta, d->label_smoothing);
    if (c->dry_run) slam_job_print_ranks(&d->j, m, s->most_rows, (double)s->tokens * c->batch / (double)s->train);
    slam_job_print_schedule(&d->j);
    fflush(stdout);
}

static void print_end(const dpo_job *d, long first) {
    const slam_run *r = &d->j.run;
    const slam_dpo_figures f = slam_dpo_last(d->dpo, 1);
    char validation[128] = "";
    if (r->val_step)
        snprintf(validation, sizeof validation, "validation loss %.4f, margin %.3f, accuracy %.1f%%", f.loss, f.margin,
                 100 * f.accuracy);
    slam_job_print_end(&d->j, first, validation);
    if (r->val_step)
        printf("the chosen ending is the likelier one in %.1f%% of the pairs to validate on, for the reference in %.1f%%\n",
               100 * f.preferred, 100 * f.reference_preferred);
    printf("\nnext  ");
    slam_job_print_resume(&d->j);
}

/* ---- the run ---- */

static int watch(void *context, uint64_t done, uint64_t of) {
    dpo_job *d = (dpo_job *)context;
    char what[64];
    snprintf(what, sizeof what, "reference %llu/%llu pairs", (unsigned long long)done, (unsigned long long)of);
    slam_progress_show(&d->bar, (double)done, (double)of, what);
    return !slam_signals_stop();
}

/* The model that the run started from, which a run that goes on has left behind. */
static slam_model *open_reference(const dpo_job *d) {
    uint64_t hash;
    slam_model *m = slam_model_load(d->ops, d->reference);
    if (m && slam_model_hash(m, &hash) && hash == d->model && slam_model_plan(m, d->j.run.micro, d->j.run.context, SLAM_INFERENCE))
        return m;
    if (m && hash != d->model) slam_refuse("%s: is not the model that this run was begun with", d->reference);
    slam_model_free(m);
    return NULL;
}

/* What RUN/reference.bin does not have yet. 2: stopped by a signal. */
static int compute_reference(dpo_job *d) {
    const slam_run *r = &d->j.run;
    const uint64_t pairs = d->size.train + d->size.validation;
    slam_model *reference = r->model;
    uint64_t known;
    char path[4200], spelled[32];
    snprintf(path, sizeof path, "%s/reference.bin", r->folder);
    if (!slam_pairs_recall(d->pairs, path, d->model, &known)) return 0;
    if (known == pairs) return 1;
    if (d->j.checkpoint && !(reference = open_reference(d))) return 0;
    const double began = slam_clock();
    slam_progress_begin(&d->bar);
    const int status = slam_pairs_compute(d->pairs, reference, r->micro, path, d->model, watch, d);
    slam_progress_clear(&d->bar);
    if (reference != r->model) slam_model_free(reference);
    if (status == 1)
        printf("reference %llu of %llu pairs in %s\n", (unsigned long long)(pairs - known), (unsigned long long)pairs,
               slam_spell_time(spelled, slam_clock() - began));
    if (status == 2) printf("stopped before the first step; --resume goes on with the reference\n");
    fflush(stdout);
    return status;
}

static int open_model(dpo_job *d) {
    slam_job *j = &d->j;
    char spelled[32];
    uint64_t hash;
    if (!(j->run.model = slam_model_load(d->ops, j->checkpoint ? j->checkpoint : d->reference))) return 0;
    if (j->checkpoint) return 1;
    if (!slam_model_hash(j->run.model, &hash)) return 0;
    if (!j->fresh && hash != d->model) return slam_refuse("%s: is not the model that this run was begun with", d->reference);
    d->model = hash;
    snprintf(spelled, sizeof spelled, "%016llx", (unsigned long long)hash);
    return slam_settings_set(&j->run.trainer.settings, "reference_model", spelled);
}

static int train(dpo_job *d) {
    slam_job *j = &d->j;
    slam_run *r = &j->run;
    if (!open_model(d)) return 0;
    d->dpo =
        slam_dpo_new(r->model, d->pairs, d->beta, d->label_smoothing, j->o.batch, r->micro, slam_job_mode(j), (uint64_t)j->o.seed);
    if (!d->dpo) return 0;
    r->task = slam_dpo_task(d->dpo);
    if (!slam_job_keep(j, slam_pairs_hash(d->pairs)) || !slam_job_begin(j)) return 0;
    const long first = r->trainer.step;
    const int known = compute_reference(d);
    if (known != 1) return known;
    if (!slam_run_train(r)) return 0;
    print_end(d, first);
    return 1;
}

int main(int argc, char **argv) {
    dpo_job d;
    char note[256] = "";
    memset(&d, 0, sizeof d);
    d.j.run.began = slam_clock();
    if (!(d.j.ranks = slam_program_begin("dpo"))) return 1;
    set_flags(&d);
    const int parsed = slam_flags_parse(&d.j.flags, argc, argv);
    int status = parsed == 0 || (parsed == 1 && !slam_job_check(&d.j)) ? 2 : 0;
    if (parsed == 1 && status == 0) {
        slam_signals_catch(d.j.ranks);
        int ok = slam_ranks_agree(d.j.ranks, plan(&d, argv[0], note));
        if (ok) print_plan(&d, note);
        if (ok && !d.j.o.dry_run) ok = train(&d);
        status = ok ? 0 : 1;
    }
    status = slam_job_end(&d.j, status);
    slam_dpo_free(d.dpo);
    slam_pairs_free(d.pairs);
    slam_model_free(d.j.run.model);
    slam_ops_free(d.ops);
    slam_trainer_free(&d.before);
    free(d.reference);
    return status;
}
