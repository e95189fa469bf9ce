/* dpo.c - preference optimisation. `./dpo` alone trains the newest run of ./train on the bundled preference pairs.

   Direct preference optimisation (Rafailov et al. 2023): the model learns to prefer the chosen completion of a prompt
   to the rejected one, by more than its reference does, which is the model that training starts from. */
#include "slam.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Sums over pairs, then means. */
typedef struct metrics {
    double loss, margin, accuracy, logp_chosen, logp_rejected, preferred, reference_preferred, pairs;
} metrics;

typedef struct program {
    slam_run run; /* flags, model, optimiser, folder, log and progress, shared with train.c */
    double beta, label_smoothing, repetition_filter;
    int share_prompt;
    slam_path reference;     /* folder of the model that training starts from */
    uint64_t reference_hash; /* of that model */
    slam_pairs pairs;
    double tokens, positions; /* of an epoch, without and with padding */
    int most_rows;            /* of a global batch */
    slam_loader *loader, *val_loader;
    slam_batch batch;
    float *weights; /* (B,T) gradient of the loss with respect to each token's loss */
    metrics eval;
} program;

/* ---- the training loop ---- */

static double half_if_equal(double a, double b) { return a > b ? 1 : a == b ? 0.5 : 0; }

/* Loss and metrics of the pairs in a batch after slam_forward, added to m. weights: the gradient of their loss /
   n_pairs with respect to the token losses. A completion's log-probability is minus the sum of its token losses. */
static void dpo_loss(program *p, double n_pairs, metrics *m) {
    const slam_batch *b = &p->batch;
    memset(p->weights, 0, (size_t)b->B * b->T * sizeof *p->weights);
    for (size_t k = 0; k + 1 < b->n_sequences; k += 2) {
        const slam_sequence *chosen = &b->sequences[k], *rejected = &b->sequences[k + 1];
        const double *reference = &p->pairs.reference[chosen->item];
        const double logp_chosen = slam_sequence_logp(b, chosen), logp_rejected = slam_sequence_logp(b, rejected);
        const double margin = (logp_chosen - reference[0]) - (logp_rejected - reference[1]);
        double dmargin;
        m->loss += slam_dpo_loss(p->beta, p->label_smoothing, margin, &dmargin);
        for (int i = chosen->first; i < chosen->end; i++) p->weights[i] = (float)(-dmargin / n_pairs);
        for (int i = rejected->first; i < rejected->end; i++) p->weights[i] = (float)(dmargin / n_pairs);
        m->margin += margin;
        m->accuracy += half_if_equal(margin, 0);
        m->logp_chosen += logp_chosen;
        m->logp_rejected += logp_rejected;
        m->preferred += half_if_equal(logp_chosen, logp_rejected);
        m->reference_preferred += half_if_equal(reference[0], reference[1]);
        m->pairs++;
    }
}

/* Sums of this rank -> means of all. */
static void metrics_mean(program *p, metrics *m) {
    double *sums = &m->loss, pairs;
    slam_comm_sum(p->run.comm, sums, sizeof *m / sizeof *sums);
    pairs = m->pairs;
    for (size_t i = 0; i + 1 < sizeof *m / sizeof *sums; i++) sums[i] /= pairs;
}

/* One update over a batch of pairs. */
static int train_step(program *p, double lr, slam_step *step, metrics *m) {
    slam_run *r = &p->run;
    slam_loader *l = p->loader;
    int rows;
    memset(m, 0, sizeof *m);
    if (slam_loader_begin(l, r->o.batch, r->comm) <= 0) return 0;
    while ((rows = slam_loader_next(l, &p->batch)) > 0) {
        const double before = m->loss;
        if (!slam_forward(r->model, &p->batch)) return 0;
        dpo_loss(p, (double)l->n, m);
        if (!l->rows_left) slam_adamw_overlap(&r->opt); /* the ranks exchange gradients during the last backward pass */
        if (!slam_backward(r->model, p->weights, m->loss - before)) return 0;
    }
    if (rows < 0 || !slam_adamw_step(&r->opt, lr, step)) return 0;
    metrics_mean(p, m);
    return 1;
}

static int evaluate(program *p) {
    slam_run *r = &p->run;
    slam_loader *l = p->val_loader;
    int pairs, rows = 0;
    memset(&p->eval, 0, sizeof p->eval);
    slam_loader_seek(l, 0, 0);
    while ((pairs = slam_loader_begin(l, r->o.batch, r->comm)) > 0)
        while ((rows = slam_loader_next(l, &p->batch)) > 0) {
            if (!slam_forward(r->model, &p->batch)) return 0;
            dpo_loss(p, 1, &p->eval);
        }
    metrics_mean(p, &p->eval);
    return pairs == 0 && rows == 0;
}

static int list_metrics(const metrics *m, slam_metric list[4]) {
    const slam_metric all[] = {{"margin", m->margin},
                               {"accuracy", m->accuracy},
                               {"logp_chosen", m->logp_chosen},
                               {"logp_rejected", m->logp_rejected}};
    memcpy(list, all, sizeof all);
    return 4;
}

static int train(program *p) {
    slam_run *r = &p->run;
    slam_trainer *t = &r->trainer;
    slam_loader *l = p->loader;
    slam_metric list[4];
    slam_step step;
    metrics m;
    int ok = 1;

    while (ok && slam_run_continues(r)) {
        ok = train_step(p, slam_learning_rate(&r->schedule, t->step), &step, &m);
        if (!ok) break;
        t->epoch = l->epoch;
        t->row = l->row;
        ok = slam_run_finish_step(r, &step, step.loss_sum / (double)l->n, l->tokens, list, list_metrics(&m, list));

        if (ok && p->val_loader && slam_run_eval_due(r))
            ok = evaluate(p) && slam_run_finish_eval(r, &p->eval.loss, 0, list, list_metrics(&p->eval, list));

        if (ok && slam_run_save_due(r)) ok = slam_run_save(r);
    }
    return ok;
}

/* ---- flags ---- */

/* Defaults and help of the common flags, see slam_run_flags; "with PAIRS | without". */
static const char *const presets[][3] = {
    {"batch", "64 | 16", "pairs per step"},
    {"lr", "5e-5 | 1e-4", NULL},
    {"warmup", "max(100, 1%) | 5", NULL},
    {"schedule", "constant", NULL},
    {"out", NULL, "folder of the run (runs/dpo, runs/dpo-2, ...)"},
    {"eval-every", "100 | 10", NULL},
    {"save-every", "500 | 0", NULL},
    {"log-every", "10 | 5", NULL},
    {"seed", NULL, "of the order and of held-out pairs"},
};

static void set_flags(program *p) {
    slam_run *r = &p->run;
    slam_options *o = &r->o;
    const slam_flag own[] = {
        SLAM_HEADING("Pairs"),
        SLAM_FLAG("val", SLAM_LIST, &o->val, "PATH", NULL, "validation pairs; may be repeated"),
        SLAM_NUMBER("val-fraction", SLAM_REAL, &o->val_fraction, "P", "0", 0, 0.9,
                    "or hold out this share of the pairs"),
        SLAM_NUMBER("repetition-filter", SLAM_REAL, &p->repetition_filter, "P", "0.3", 0, 1,
                    "skip pairs whose text (prompt_text, chosen_text) has an auto-BLEU-2 of at least P; 0: none"),
        SLAM_NUMBER("context", SLAM_INT, &o->context, "N", NULL, 4, 1 << 24,
                    "maximum tokens of a prompt with a completion (as the model was trained)"),
        SLAM_FLAG("share-prompt", SLAM_SWITCH, &p->share_prompt, NULL, NULL,
                  "compute a prompt once for both of its completions"),
        SLAM_HEADING("Preference"),
        SLAM_FLAG("init", SLAM_PATH, &o->init, "DIR", NULL,
                  "the model to start from, which is the reference (newest run of train)"),
        SLAM_NUMBER("beta", SLAM_REAL, &p->beta, "X", "0.1", 1e-6, 1e3, "how close to stay to the reference"),
        SLAM_NUMBER("label-smoothing", SLAM_REAL, &p->label_smoothing, "P", "0", 0, 0.5,
                    "share of pairs that may be labelled wrongly"),
        SLAM_HEADING("Length: the first limit reached ends the run"),
        SLAM_NUMBER("steps", SLAM_LONG | SLAM_LIMIT, &o->steps, "N", NULL, 1, 1e12, "updates"),
        SLAM_NUMBER("epochs", SLAM_REAL | SLAM_LIMIT, &o->epochs, "X", "1", 1e-6, 1e6, "passes over the pairs"),
    };
    r->data_name = "pairs";
    r->bundled_data[0] = "test/corpus/pairs.jsonl";
    r->bundled_data[1] = "test/corpus/pairs-val.jsonl";
    r->flags.program = "dpo";
    r->flags.usage = "[options] [PAIRS.jsonl...]";
    r->flags.about =
        "Direct preference optimisation on SlamKit preference pairs (.jsonl, globs allowed): a prompt with a chosen "
        "and a rejected completion. Without PAIRS on the bundled ones. Defaults stand in brackets; where there are "
        "two, the second is for the bundled pairs.";
    slam_run_flags(r, own, (int)(sizeof own / sizeof *own), presets, (int)(sizeof presets / sizeof *presets));
}

/* ---- the plan: settings, device, reference model, pairs, length ---- */

/* The model that training starts from is the run's reference for good. */
static int name_reference(program *p) {
    slam_run *r = &p->run;
    const char *path = slam_trainer_setting(&r->trainer, "reference", 0);
    const char *hash = slam_trainer_setting(&r->trainer, "reference_model", 0);
    if (!r->fresh) {
        if (!path || !hash) return slam_set_error("trainer.json: expected settings 'reference' and 'reference_model'");
        p->reference_hash = strtoull(hash, NULL, 16);
        p->reference = slam_path_absolute(path);
        return 1;
    }
    char *model = slam_run_model(r->o.init, "train");
    if (!model && !r->o.init)
        return slam_set_error("--init: no model to start from is given, and %s; ./train makes one", slam_error());
    if (model) p->reference = slam_path_absolute(model);
    if (model) slam_trainer_set(&r->trainer, "reference", 0, p->reference.at);
    free(model);
    return model != NULL;
}

/* The default context is the one that the model was trained with. */
static int read_config(program *p) {
    slam_run *r = &p->run;
    slam_trainer before;
    char path[4200], text[32];
    snprintf(path, sizeof path, "%s/config.json", r->checkpoint ? r->checkpoint : p->reference.at);
    if (!slam_config_load(&r->config, path)) return 0;
    const int T = r->config.T;
    if (r->o.context > T)
        return slam_set_error("--context %d: %s has up to %d positions", r->o.context, p->reference.at, T);
    int context = 1024;
    if (slam_trainer_load(&before, p->reference.at)) {
        const char *trained = slam_trainer_setting(&before, "context", 0);
        if (trained) context = atoi(trained);
        if (r->fresh) r->trainer.units = before.units;
        slam_trainer_free(&before);
    }
    if (r->o.context) return 1;
    if (context > T) context = T;
    snprintf(text, sizeof text, "%d", context < 4 ? 4 : context);
    return slam_flags_set(&r->flags, "context", text);
}

/* Reads the pairs and measures an epoch of them. */
static int open_pairs(program *p) {
    const slam_run *r = &p->run;
    const slam_options *o = &r->o;
    slam_pairs *pairs = &p->pairs;
    pairs->V = r->config.V;
    pairs->context = o->context;
    pairs->share = p->share_prompt;
    pairs->max_repetition = p->repetition_filter;
    for (size_t i = 0; i < r->flags.rest.n; i++)
        if (!slam_pairs_add(pairs, r->flags.rest.at[i], 0)) return 0;
    for (size_t i = 0; i < o->val.n; i++)
        if (!slam_pairs_add(pairs, o->val.at[i], 1)) return 0;
    if (!slam_pairs_prepare(pairs, o->val_fraction, (uint64_t)o->seed)) return 0;
    slam_loader *l = p->loader = slam_loader_new_pairs(pairs, 0, (uint64_t)o->seed, 1);
    for (size_t n = 0; n < pairs->n_train; n += (size_t)o->batch) {
        if (slam_loader_begin(l, o->batch, NULL) <= 0) return 0;
        p->tokens += (double)l->tokens;
        p->positions += (double)l->rows * l->T;
        if (l->rows > p->most_rows) p->most_rows = l->rows;
    }
    if (pairs->n > pairs->n_train) p->val_loader = slam_loader_new_pairs(pairs, 1, 0, 0);
    return 1;
}

static void print_count(uint64_t n, const char *what) {
    if (n) printf(", %llu %s", (unsigned long long)n, what);
}

static void print_pairs(const program *p) {
    const slam_config *m = &p->run.config;
    const slam_pairs *s = &p->pairs;
    char a[32], text[200];
    printf("model    %s: %s parameters, %d layers, %d channels, vocabulary %d\n", p->reference.at,
           slam_format_count(a, (double)slam_config_parameters(m)), m->L, m->C, m->V);
    printf("pairs    %zu for training, %zu for validation", s->n_train, s->n - s->n_train);
    print_count(s->truncated, "prompts truncated");
    print_count(s->unshared, "too long to share a prompt");
    if (strcmp(slam_pairs_skipped(s, text), "none")) printf("\n         skipped %s", text);
    printf("\nrows     %s tokens, rows of up to %d, %.1f%% full, prompts %s\n", slam_format_count(a, p->tokens), s->T,
           100 * p->tokens / p->positions, p->share_prompt ? "shared" : "once per completion");
    printf("loss     beta %g, label smoothing %g\n", p->beta, p->label_smoothing);
}

static int plan(program *p) {
    slam_run *r = &p->run;
    if (!slam_run_open(r) || !name_reference(p) || !read_config(p)) return 0;
    if (r->bundled && !slam_bundled_units(r->argv0, r->trainer.units)) return 0;
    if (!open_pairs(p)) return 0;
    print_pairs(p);
    const double steps_per_epoch = (double)p->pairs.n_train / r->o.batch;
    return slam_run_plan(r, p->most_rows, p->pairs.T, steps_per_epoch, p->tokens / steps_per_epoch, 0);
}

/* ---- model and reference ---- */

static int show_reference(void *context, const slam_progress *progress) {
    program *p = (program *)context;
    char text[64];
    snprintf(text, sizeof text, "reference %.0f/%.0f pairs", progress->done, progress->total);
    slam_bar_show(&p->run.bar, progress->done, progress->total, text);
    return !slam_stop_requested();
}

static int check_reference(const program *p, uint64_t hash) {
    return hash == p->reference_hash ||
           slam_set_error("%s: is not the model that this run was begun with", p->reference.at);
}

/* The reference's log-probabilities of all completions, from the run's folder, or computed and saved there. */
static int find_reference(program *p) {
    slam_run *r = &p->run;
    slam_model *reference = r->model;
    char path[4200], text[32];
    uint64_t hash;
    snprintf(path, sizeof path, "%s/reference.safetensors", r->folder);
    if (!slam_all_ok(r->comm, slam_pairs_load_reference(&p->pairs, path, p->reference_hash))) return 0;
    if (p->pairs.reference) return 1;
    const double start = slam_clock();
    int ok = 1;
    if (r->checkpoint) { /* the model has moved away from it */
        reference = slam_model_load(r->ops, p->reference.at);
        ok = reference && slam_model_hash(reference, &hash) && check_reference(p, hash) &&
             slam_model_plan(reference, p->batch.capacity, p->batch.T, SLAM_INFERENCE);
    }
    ok = slam_all_ok(r->comm, ok) && slam_pairs_reference(&p->pairs, reference, &p->batch, show_reference, p);
    slam_bar_clear(&r->bar);
    if (reference != r->model) slam_model_free(reference);
    const int root = r->comm->rank == 0;
    if (!ok || !slam_all_ok(r->comm, !root || slam_pairs_save_reference(&p->pairs, path, p->reference_hash))) return 0;
    printf("reference %zu pairs in %s\n", p->pairs.n, slam_format_time(text, slam_clock() - start));
    fflush(stdout);
    slam_bar_begin(&r->bar);
    return 1;
}

static int open_model(program *p) {
    slam_run *r = &p->run;
    char text[32];
    uint64_t hash = 0;
    int ok = (r->model = slam_model_load(r->ops, r->checkpoint ? r->checkpoint : p->reference.at)) != NULL;
    if (ok && !r->checkpoint) {
        ok = slam_model_hash(r->model, &hash) && (r->fresh || check_reference(p, hash));
        p->reference_hash = hash;
        snprintf(text, sizeof text, "%016llx", (unsigned long long)hash);
        if (r->fresh) slam_trainer_set(&r->trainer, "reference_model", 0, text);
    }
    ok = ok && slam_model_plan(r->model, r->micro, r->T, r->mode) && slam_adamw_init(&r->opt, r->model);
    if (!slam_all_ok(r->comm, ok) || !slam_run_tune(r)) return 0;
    p->batch = slam_batch_new(r->micro, r->T, 1);
    p->weights = (float *)calloc((size_t)r->micro * r->T, sizeof *p->weights);
    if (!slam_run_begin(r, p->pairs.hash)) return 0;
    const int found = slam_all_ok(r->comm, slam_loader_seek(p->loader, r->trainer.epoch, r->trainer.row));
    return found && find_reference(p);
}

static void print_end(program *p) {
    const metrics *m = &p->eval;
    char validation[256] = "";
    if (p->eval.pairs > 0)
        snprintf(validation, sizeof validation,
                 "validation loss %.4f, margin %.3f, accuracy %.1f%%\n"
                 "the chosen completion is more likely than the rejected one in %.1f%% of the validation pairs, "
                 "for the reference in %.1f%%",
                 m->loss, m->margin, 100 * m->accuracy, 100 * m->preferred, 100 * m->reference_preferred);
    slam_run_print_end(&p->run, validation);
}

static int optimise(program *p) {
    if (!slam_all_ok(p->run.comm, plan(p))) return 0;
    if (p->run.o.dry_run) return 1;
    if (!open_model(p) || !train(p)) return 0;
    print_end(p);
    return 1;
}

int main(int argc, char **argv) {
    static program p;
    slam_run *r = &p.run;
    if (!(r->comm = slam_program_begin("dpo"))) return 1;
    set_flags(&p);
    const int parsed = slam_run_parse(r, argc, argv);
    const int status = slam_run_end(r, parsed == 0 ? 2 : parsed == 1 ? !optimise(&p) : 0);
    slam_loader_free(p.loader);
    slam_loader_free(p.val_loader);
    slam_pairs_free(&p.pairs);
    slam_batch_free(&p.batch);
    free(p.weights);
    return status;
}
