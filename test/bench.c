/* Measures training steps of three models on the CPU, generation and HuBERT, next to PyTorch (test/bench_torch.py) in the same run
   if there is a Python with torch and transformers, and writes the table to test/results/.

       make bench [BENCH="--threads N --seconds S --rows tiny,10m,slam,generate,hubert,vocoder,dpo --python PATH"]

   A step is forward, backward and AdamW with clipping, on random tokens, one document per row; "slam" is one micro-step of the
   358M model, only forward and backward, on both sides. "generate" continues 64 prompts of 75 tokens by up to 150 each, sampled;
   its numbers are new tokens per second. "vocoder" synthesises units by a HiFi-GAN with random weights. "hubert" computes features of 15 s of noise by mHuBERT-25Hz's shape with random weights,
   up to layer 11; its numbers are seconds of audio per second. "dpo" compares steps of preference optimisation with shared
   prompts to steps without. The two sides take turns, ROUNDS times; numbers are medians. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "random_hubert.h"

enum { ROUNDS = 3, STEPS_MAX = 4096 };

#ifdef SLAM_BLAS
static const char products[] = "BLAS";
#else
static const char products[] = "our own kernel";
#endif

typedef struct bench_row {
    const char *name, *what;
    int V, C, L, NH, KVH, HS, F; // else as the preset "slam"
    int B, T, update;
} bench_row;

static const bench_row rows[] = {
    {"tiny", "C 128, 4 layers, 4 heads, 2 KV heads, F 384, V 102, B 16, T 256", 102, 128, 4, 4, 2, 32, 384, 16, 256, 1},
    {"10m", "C 320, 8 layers, 5 heads, 1 KV head, F 864, V 502, B 4, T 512", 502, 320, 8, 5, 1, 64, 864, 4, 512, 1},
    {"slam", "Qwen2.5-0.5B, V 502, B 1, T 1024, forward and backward", 502, 896, 24, 14, 2, 64, 4864, 1, 1024, 0},
    {"generate", "the 10m model continues 64 prompts of 75 tokens by 150, sampled; new tokens per second", 502, 320, 8,
     5, 1, 64, 864, 64, 225, 0},
    {"hubert", "mHuBERT-25Hz to layer 11, 15 s of audio; audio seconds per second", 0, 0, 0, 0, 0, 0, 0, 1, 15, 0},
    {"vocoder", "unit HiFi-GAN of 25 Hz, 10 s of audio; audio seconds per second", 0, 0, 0, 0, 0, 0, 0, 1, 10, 0},
};
enum { ROWS = sizeof rows / sizeof *rows };

static int compare(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare);
    return n ? x[n / 2] : 0;
}

static void die(void) {
    fprintf(stderr, "bench: error: %s\n", slam_error());
    exit(1);
}

static slam_config config_of(const bench_row *r) {
    slam_config c;
    if (!slam_config_load(&c, "slam")) die();
    c.V = r->V, c.C = r->C, c.L = r->L, c.NH = r->NH, c.KVH = r->KVH, c.HS = r->HS, c.F = r->F;
    return c;
}

/* Tokens per second: the median over the steps of `seconds` seconds, after two that do not count. */
static double measure(const bench_row *r, int threads, double seconds) {
    const int N = r->B * r->T;
    static double times[STEPS_MAX];
    int n = 0;
    uint64_t seed = 1;
    const slam_config config = config_of(r);
    slam_ops *ops = slam_cpu(threads);
    slam_model *m = ops ? slam_model_new(ops, &config, 1) : NULL;
    slam_adamw opt = ZERO;
    opt.beta1 = 0.9, opt.beta2 = 0.999, opt.eps = 1e-8, opt.clip = 0.5;
    if (!m || !slam_model_plan(m, r->B, r->T, SLAM_TRAIN) || (r->update && !slam_adamw_init(&opt, m))) die();
    slam_batch b = slam_batch_new(r->B, r->T, 0);
    b.B = r->B;
    for (int i = 0; i < N; i++) b.tokens[i] = (int)rng_below(&seed, (uint64_t)r->V);
    for (int i = 0; i < N; i++) b.targets[i] = i % r->T == r->T - 1 ? -1 : b.tokens[i + 1];
    memset(b.doc_start, 0, (size_t)N * sizeof(int));
    double start = 0;
    for (int k = -2; k < STEPS_MAX && (k < 3 || slam_clock() - start < seconds); k++) {
        slam_step step = ZERO;
        const double began = slam_clock();
        if (k == 0) start = began;
        if (!slam_forward_backward(m, &b, 1.0f / (float)N) || !ops->finish(ops)) die();
        if (r->update && !slam_adamw_step(&opt, 1e-4, &step)) die();
        if (k >= 0) times[n++] = slam_clock() - began;
    }
    if (r->update) slam_adamw_free(&opt);
    slam_batch_free(&b);
    slam_model_free(m);
    slam_ops_free(ops);
    return N / median(times, n);
}

/* ---- generation ---- */

enum { PROMPT_TOKENS = 75 };

/* New tokens per second. */
static double measure_generation(const bench_row *r, int threads, double seconds) {
    static double rates[STEPS_MAX];
    int units[PROMPT_TOKENS], n = 0;
    const slam_config config = config_of(r);
    slam_ops *ops = slam_cpu(threads);
    slam_model *m = ops ? slam_model_new(ops, &config, 1) : NULL;
    const slam_generation how = {{0.8, 25, 1, 1}, r->T - PROMPT_TOKENS, r->T, r->B, 1};
    if (!m) die();
    double start = 0;
    for (int k = -1; k < STEPS_MAX && (k < 3 || slam_clock() - start < seconds); k++) {
        slam_prompts p = ZERO;
        uint64_t seed = (uint64_t)k + 5, tokens = 0;
        for (int b = 0; b < r->B; b++) {
            for (int t = 0; t < PROMPT_TOKENS; t++) units[t] = (int)rng_below(&seed, (uint64_t)r->V - 2);
            slam_prompts_add(&p, "prompt", units, NULL, PROMPT_TOKENS - 1);
        }
        const double began = slam_clock();
        if (k == 0) start = began;
        if (!slam_generate(m, &how, &p, NULL, NULL)) die();
        for (size_t i = 0; i < p.n; i++) tokens += (uint64_t)(p.at[i].length + (p.at[i].ended != 0));
        if (k >= 0) rates[n++] = (double)tokens / (slam_clock() - began);
        slam_prompts_free(&p);
    }
    slam_model_free(m);
    slam_ops_free(ops);
    return median(rates, n);
}

/* FLOP per new token: its own forward pass and its share of the prompt's. */
static double generation_flops(const bench_row *r) {
    const slam_config config = config_of(r);
    return slam_config_flops(&config, r->T) / 3 * r->T / (r->T - PROMPT_TOKENS);
}

/* ---- HuBERT ---- */

/* Seconds of audio per second. */
static double measure_hubert(const bench_row *r, const char *folder, int threads, double seconds) {
    static double times[STEPS_MAX];
    const long samples = 16000L * r->T;
    int n = 0;
    uint64_t seed = 1;
    slam_ops *ops = slam_cpu(threads);
    slam_unit_config config = {SLAM_HUBERT, 0, 0, 1, HUBERT_LAYER, 40, 0, "", 0, 0};
    snprintf(config.hubert, sizeof config.hubert, "%s", folder);
    slam_tokenizer *t = ops ? slam_tokenizer_load(NULL, &config, ops) : NULL;
    float *x = NEW(float, (size_t)samples);
    if (!t) die();
    for (long i = 0; i < samples; i++) x[i] = (float)(0.1 * rng_normal(&seed));
    slam_recording recording = {x, (size_t)samples, NULL, ZERO};
    double start = 0;
    for (int k = -2; k < STEPS_MAX && (k < 3 || slam_clock() - start < seconds); k++) {
        const double began = slam_clock();
        if (k == 0) start = began;
        if (!slam_units_encode(t, &recording, 1)) die();
        if (k >= 0) times[n++] = slam_clock() - began;
        free(recording.features);
    }
    slam_tokenizer_free(t);
    slam_ops_free(ops);
    free(x);
    return r->T / median(times, n);
}

/* ---- vocoder ---- */

static const char vocoder_config[] =
    "{\"num_embeddings\": 500, \"embedding_dim\": 128, \"upsample_initial_channel\": 512,\n"
    " \"upsample_rates\": [5, 4, 4, 4, 2], \"upsample_kernel_sizes\": [11, 8, 8, 8, 4], \"model_in_dim\": 128,\n"
    " \"resblock_kernel_sizes\": [3, 7, 11], \"resblock_dilation_sizes\": [[1, 3, 5], [1, 3, 5], [1, 3, 5]]}\n";

/* Writes the folder of a vocoder with random weights. Returns the FLOP for a second of audio. */
static double random_vocoder(const char *folder) {
    static const int rates[] = {5, 4, 4, 4, 2}, kernels[] = {11, 8, 8, 8, 4};
    random_tensors l = ZERO;
    char name[100];
    double flops = 0, rate = 25;
    random_module(&l, "conv_pre", 512, 128, 7);
    random_module(&l, "conv_post", 1, 16, 7);
    for (int i = 0; i < 5; i++) {
        const size_t C = 256 >> i;
        snprintf(name, sizeof name, "ups.%d", i);
        random_module(&l, name, 2 * C, C, kernels[i]);
        l.at[l.n - 1].shape[0] = l.at[l.n - 1].count = C;
        flops += 2 * rate * 2 * C * C * kernels[i];
        rate *= rates[i];
        for (int k = 0; k < 18; k++) {
            const int taps = 3 + 4 * (k / 6);
            snprintf(name, sizeof name, "resblocks.%d.convs%d.%d", 3 * i + k / 6, k % 2 + 1, k / 2 % 3);
            random_module(&l, name, C, C, taps);
            flops += 2 * rate * C * C * taps;
        }
    }
    random_module(&l, "dict", 500, 128, 0);
    free((void *)(uintptr_t)l.at[--l.n].data); // embeddings have no bias
    const slam_path config = path_join(folder, "config.json"), path = path_join(folder, "model.safetensors");
    if (!file_write(config.at, vocoder_config, strlen(vocoder_config)) || !tensors_write(path.at, l.at, l.n, NULL))
        die();
    for (size_t i = 0; i < l.n; i++) free((void *)(uintptr_t)l.at[i].data);
    return flops;
}

/* Seconds of audio per second. */
static double measure_vocoder(const bench_row *r, const char *folder, int threads, double seconds) {
    static double times[STEPS_MAX];
    const int frames = 25 * r->T;
    int n = 0, *units = NEW(int, frames);
    const float *x;
    slam_ops *ops = slam_cpu(threads);
    slam_vocoder *v = slam_vocoder_open(folder, 0, 0, NULL, ops);
    if (!v) die();
    for (int i = 0; i < frames; i++) units[i] = 7919 * i % 500;
    double start = 0;
    for (int k = -2; k < STEPS_MAX && (k < 3 || slam_clock() - start < seconds); k++) {
        const double began = slam_clock();
        if (k == 0) start = began;
        if (!slam_vocoder_start(v, units, NULL, (size_t)frames)) die();
        while (slam_vocoder_next(v, &x) > 0) {}
        if (k >= 0) times[n++] = slam_clock() - began;
    }
    slam_vocoder_free(v);
    slam_ops_free(ops);
    free(units);
    return r->T / median(times, n);
}

/* ---- preference optimisation ---- */

enum { DPO_BATCH = 24, DPO_PAIRS = 96, DPO_CONTEXT = 1024 };

/* Pairs as long as SpokenSwag's: prompts of about 180 units (10 s), completions of about 55 (3 s). */
static void dpo_write(const char *path) {
    static const char *const sides[] = {"prompt", "chosen", "rejected"};
    static const int least[] = {120, 35, 35}, most[] = {240, 75, 75};
    uint64_t seed = 1;
    strbuf t = ZERO;
    for (int i = 0; i < DPO_PAIRS; i++)
        for (int side = 0; side < 3; side++) {
            const int n = least[side] + (int)rng_below(&seed, (uint64_t)(most[side] - least[side] + 1));
            strbuf_add(&t, "%s\"%s\": \"", side ? ", " : "{", sides[side]);
            for (int k = 0; k < n; k++) strbuf_add(&t, "<Un%d>", (int)rng_below(&seed, 500));
            strbuf_add(&t, side == 2 ? "\"}\n" : "\"");
        }
    if (!file_write(path, t.at, t.n)) die();
    strbuf_free(&t);
}

/* Pairs per second of whole steps: forward, backward, AdamW, as dpo.c makes them. */
static double measure_dpo(const slam_config *config, const char *path, int share, int threads, double seconds) {
    static double times[STEPS_MAX];
    int n = 0, rows;
    slam_ops *ops = slam_cpu(threads);
    slam_model *m = ops ? slam_model_new(ops, config, 1) : NULL;
    slam_pairs p = ZERO;
    slam_adamw opt = ZERO;
    p.V = config->V, p.context = DPO_CONTEXT, p.share = share;
    opt.beta1 = 0.9, opt.beta2 = 0.999, opt.eps = 1e-8, opt.clip = 0.5;
    if (!m || !slam_pairs_add(&p, path, 0) || !slam_pairs_prepare(&p, 0, 0)) die();
    const int T = p.T;
    slam_batch b = slam_batch_new(2, T, 1);
    float *weights = NEW(float, (size_t)2 * T);
    slam_loader *l = slam_loader_new_pairs(&p, 0, 1, 1);
    if (!slam_model_plan(m, 2, T, SLAM_TRAIN) || !slam_adamw_init(&opt, m)) die();
    double start = 0;
    for (int k = -2; k < STEPS_MAX && (k < 3 || slam_clock() - start < seconds); k++) {
        slam_step step = ZERO;
        const double began = slam_clock();
        if (k == 0) start = began;
        if (slam_loader_begin(l, DPO_BATCH, NULL) <= 0) die();
        while ((rows = slam_loader_next(l, &b)) > 0) {
            double loss = 0, dmargin;
            if (!slam_forward(m, &b)) die();
            memset(weights, 0, (size_t)b.B * b.T * sizeof *weights);
            for (size_t s = 0; s < b.n_sequences; s++) {
                const slam_sequence *q = &b.sequences[s];
                loss += slam_dpo_loss(0.1, 0, slam_sequence_logp(&b, q), &dmargin);
                for (int i = q->first; i < q->end; i++) weights[i] = (float)dmargin / DPO_BATCH;
            }
            if (!slam_backward(m, weights, loss)) die();
        }
        if (rows < 0 || !slam_adamw_step(&opt, 1e-5, &step)) die();
        if (k >= 0) times[n++] = slam_clock() - began;
    }
    slam_loader_free(l);
    slam_adamw_free(&opt);
    slam_batch_free(&b);
    slam_pairs_free(&p);
    slam_model_free(m);
    slam_ops_free(ops);
    free(weights);
    return DPO_BATCH / median(times, n);
}

static void bench_dpo(strbuf *t, const char *folder, const bench_row *r, int threads, double seconds) {
    const slam_config config = config_of(r);
    double rate[2][ROUNDS], ratio[ROUNDS];
    char path[128];
    snprintf(path, sizeof path, "%s/pairs.jsonl", folder);
    dpo_write(path);
    for (int i = 0; i < ROUNDS; i++) {
        for (int share = 0; share < 2; share++) rate[share][i] = measure_dpo(&config, path, share, threads, seconds);
        ratio[i] = rate[1][i] / rate[0][i];
        printf("dpo, round %d: shared %.2f, unshared %.2f pairs/s\n", i + 1, rate[1][i], rate[0][i]);
        fflush(stdout);
    }
    strbuf_add(
        t,
        "\ndpo, the model of row 10m, prompts of 120 to 240 units, completions of 35 to 75, %d pairs per step, context %d:\n"
        "%.2f pairs/s with shared prompts, %.2f with one per completion, ratio %.2f\n",
        DPO_BATCH, DPO_CONTEXT, median(rate[1], ROUNDS), median(rate[0], ROUNDS), median(ratio, ROUNDS));
    remove(path);
}

/* ---- both sides ---- */

/* The same row by PyTorch, and its versions; 0: not available. */
static double measure_torch(const bench_row *r, const char *folder, const char *python, int threads, double seconds,
                            char *versions, size_t n) {
    char command[512], line[1024] = "";
    static const field rates[] = {{"tokens_per_second", FIELD_REAL, 0, 0, 1e12, 0},
                                  {"audio_seconds_per_second", FIELD_REAL, 0, 0, 1e12, 0}};
    double rate = 0;
    snprintf(command, sizeof command,
             "%s test/bench_torch.py --row %s --folder '%s' --threads %d --seconds %g 2>/dev/null", python, r->name,
             folder, threads, seconds);
    FILE *pipe = popen(command, "r");
    while (pipe && fgets(line, sizeof line, pipe))
        if (line[0] == '{') {
            json *j = json_parse(line, strlen(line), "bench_torch.py");
            fields_read(j, rates, 2, &rate, "bench_torch.py");
            snprintf(versions, n, "PyTorch %s, Transformers %s", json_string(j, "torch", "?"),
                     json_string(j, "transformers", "?"));
            json_free(j);
        }
    if (pipe) pclose(pipe);
    return rate;
}

/* FLOP/s of a square matrix product larger than the caches, the most that a step could reach. */
static double sgemm_peak(int threads) {
    enum { S = 2048 };
    slam_ops *ops = slam_cpu(threads);
    slam_act *x[3];
    double best = 1e9;
    for (int k = 0; k < 3; k++)
        if (!(x[k] = (slam_act *)ops->alloc(ops, (size_t)S * S * sizeof(float)))) die();
    for (int k = 0; k < 5; k++) {
        const double began = slam_clock();
        ops->matmul_forward(ops, x[0], x[1], x[2], NULL, S, S, S);
        if (slam_clock() - began < best) best = slam_clock() - began;
    }
    for (int k = 0; k < 3; k++) ops->release(ops, x[k]);
    slam_ops_free(ops);
    return 2.0 * S * S * S / best;
}

static void machine_name(char *name, size_t n) {
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(name, n, "unknown CPU");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            snprintf(name, n, "%s", strchr(line, ':') + 2);
            name[strcspn(name, "\n")] = 0;
            break;
        }
    if (f) fclose(f);
}

int main(int argc, char **argv) {
    int threads = 0;
    double seconds = 10;
    const char *python = getenv("PYTHON") ? getenv("PYTHON") : "python3",
               *wanted = "tiny,10m,slam,generate,hubert,vocoder,dpo";
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--threads")) threads = atoi(argv[i + 1]);
        if (!strcmp(argv[i], "--seconds")) seconds = atof(argv[i + 1]);
        if (!strcmp(argv[i], "--python")) python = argv[i + 1];
        if (!strcmp(argv[i], "--rows")) wanted = argv[i + 1];
    }
    if (threads < 1) threads = omp_get_max_threads();
    char folder[] = "/tmp/slam-bench-XXXXXX";
    if (!mkdtemp(folder)) die();
    char machine[128], versions[128] = "PyTorch not found", day[32], path[128], commit[64] = "unknown";
    time_t now = time(NULL);
    strbuf t = ZERO;
    machine_name(machine, sizeof machine);
    strftime(day, sizeof day, "%Y-%m-%d", gmtime(&now));
    FILE *git = popen("git describe --always --dirty 2>/dev/null", "r");
    if (git && fgets(commit, sizeof commit, git)) commit[strcspn(commit, "\n")] = 0;
    if (git) pclose(git);
    strbuf_add(
        &t,
        "Training steps, generation and HuBERT on the CPU, fp32, %d threads; %s; %s; commit %s; matrix products by %s\n",
        threads, machine, day, commit, products);
    strbuf_add(&t, "peak: %.0f GFLOP/s (a product of size 2048, best of 5)\n\n", sgemm_peak(threads) / 1e9);
    strbuf_add(&t, "%-8s %14s %10s %8s %16s %8s   model\n", "row", "slam tok/s", "GFLOP/s", "of peak", "PyTorch tok/s",
               "ratio");
    const double peak = sgemm_peak(threads);
    for (int k = 0; k < ROWS; k++) {
        const bench_row *r = &rows[k];
        double ours[ROUNDS], theirs[ROUNDS], ratio[ROUNDS];
        int has = 1;
        const slam_config config = config_of(r);
        const int is_vocoder = !strcmp(r->name, "vocoder"), is_hubert = r->V == 0 && !is_vocoder;
        const int is_generation = !strcmp(r->name, "generate"), is_audio = is_hubert || is_vocoder;
        if (!strstr(wanted, r->name)) continue;
        if (is_hubert && !random_hubert(folder)) die();
        const double vocoder_flops = is_vocoder ? random_vocoder(folder) : 0;
        for (int i = 0; i < ROUNDS; i++) {
            ours[i] = is_hubert       ? measure_hubert(r, folder, threads, seconds)
                      : is_vocoder    ? measure_vocoder(r, folder, threads, seconds)
                      : is_generation ? measure_generation(r, threads, seconds)
                                      : measure(r, threads, seconds);
            theirs[i] = has ? measure_torch(r, folder, python, threads, seconds, versions, sizeof versions) : 0;
            has = theirs[i] > 0;
            ratio[i] = has ? ours[i] / theirs[i] : 0;
            printf("%s, round %d: slam %.1f, PyTorch %.1f %s\n", r->name, i + 1, ours[i], theirs[i],
                   is_audio ? "audio s/s" : "tok/s");
            fflush(stdout);
        }
        const double rate = median(ours, ROUNDS), flops = rate * (is_hubert       ? random_hubert_flops(r->T)
                                                                  : is_vocoder    ? vocoder_flops
                                                                  : is_generation ? generation_flops(r)
                                                                                  : slam_config_flops(&config, r->T));
        strbuf_add(&t, "%-8s %14.*f %10.0f %7.0f%% ", r->name, is_audio, rate, flops / 1e9, 100 * flops / peak);
        if (has)
            strbuf_add(&t, "%16.*f %8.2f   %s\n", is_audio, median(theirs, ROUNDS), median(ratio, ROUNDS), r->what);
        else strbuf_add(&t, "%16s %8s   %s\n", "-", "-", r->what);
    }
    if (strstr(wanted, "dpo")) bench_dpo(&t, folder, &rows[1], threads, seconds);
    strbuf_add(
        &t,
        "\n%s (sdpa attention, fused AdamW, no torch.compile), the same threads; medians of %d rounds in turn of %g s a side\n",
        versions, ROUNDS, seconds);
    const char *const files[] = {"/model.safetensors", "/config.json", ""};
    for (int k = 0; k < 3; k++) {
        snprintf(path, sizeof path, "%s%s", folder, files[k]);
        remove(path);
    }
    snprintf(path, sizeof path, "test/results/cpu-%s.txt", day);
    printf("\n%s", t.at);
    if (!file_write(path, t.at, t.n)) die();
    printf("written to %s\n", path);
    strbuf_free(&t);
    return 0;
}
