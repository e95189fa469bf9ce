/* HuBERT against Transformers' HubertModel: test/fixtures/hubert holds small models for every switch of the configuration
   (test/reference_hubert.py makes them). An utterance's features are the same alone and in a batch. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#ifdef SLAM_BLAS
enum { SAME_BITS = 0 };
#else
enum { SAME_BITS = 1 };
#endif

static const char *const models[] = {"base",
                                     "mhubert",
                                     "large",
                                     "older_spelling",
                                     "with_head",
                                     "no_projection_norm",
                                     "stable_batch_norm",
                                     "layer_unstable",
                                     "one_convolution",
                                     "large_batch_norm",
                                     "wide_heads"};
enum { MODELS = sizeof models / sizeof *models, UTTERANCES = 4, LAYERS = 2 };

typedef struct fixture {
    char folder[200];
    tensors *file;
    int n, layers;
    float *samples[UTTERANCES];
    long lengths[UTTERANCES];
    const tensor *hidden[UTTERANCES][LAYERS + 1]; // NULL: the utterance is too short for a frame
} fixture;

static int fixture_open(fixture *f, const char *name) {
    char text[300];
    memset(f, 0, sizeof *f);
    snprintf(f->folder, sizeof f->folder, "test/fixtures/hubert/%s", name);
    snprintf(text, sizeof text, "%s/case.safetensors", f->folder);
    f->file = tensors_open(text);
    if (!CHECK(f->file, "%s", slam_error())) return 0;
    for (; f->n < UTTERANCES; f->n++) {
        snprintf(text, sizeof text, "audio.%d", f->n);
        const tensor *t = tensors_find(f->file, text);
        if (!t) break;
        f->lengths[f->n] = (long)t->count;
        f->samples[f->n] = (float *)malloc((t->count + 1) * sizeof(float));
        CHECK(tensor_floats(t, f->samples[f->n], 0, t->count), "%s", slam_error());
        for (int l = 0; l <= LAYERS; l++) {
            snprintf(text, sizeof text, "hidden.%d.%d", f->n, l);
            f->hidden[f->n][l] = tensors_find(f->file, text);
            if (f->hidden[f->n][l] && l > f->layers) f->layers = l;
        }
    }
    return 1;
}

static void fixture_close(fixture *f) {
    for (int i = 0; i < UTTERANCES; i++) free(f->samples[i]);
    tensors_close(f->file);
}

static size_t frames_of(const slam_hubert *h, long samples) {
    return hubert_frames(h, (size_t)samples, h->config.convs);
}

/* The utterance's features in memory for one more number, NaN. *n: how many numbers they are */
static float *room_for(const slam_hubert *h, long samples, size_t *n) {
    *n = frames_of(h, samples) * (size_t)h->config.C;
    float *x = NEW(float, *n + 1);
    for (size_t i = 0; i <= *n; i++) x[i] = NAN;
    return x;
}

static int features(slam_hubert *h, int n, float *const *samples, const long *lengths, float *const *out) {
    slam_tokenizer t = ZERO;
    slam_recording *r = NEW(slam_recording, n), **list = NEW(slam_recording *, n);
    t.hubert = h;
    t.width = h->config.C;
    for (int i = 0; i < n; i++) {
        r[i].samples = samples[i];
        r[i].n = (size_t)lengths[i];
        r[i].features = out[i];
        r[i].units.frames = frames_of(h, lengths[i]);
        list[i] = &r[i];
    }
    const int ok = hubert_compute(&t, list, n);
    free(r), free(list);
    return ok;
}

static void test_model(slam_ops *ops, const char *name) {
    fixture f;
    if (!fixture_open(&f, name)) return;
    for (int l = 0; l <= f.layers; l++) {
        slam_hubert *h = hubert_load(ops, f.folder, l, 40);
        float *out[UTTERANCES];
        size_t n[UTTERANCES];
        if (!CHECK(h, "%s", slam_error())) break;
        for (int i = 0; i < f.n; i++) out[i] = room_for(h, f.lengths[i], &n[i]);
        CHECK(features(h, f.n, f.samples, f.lengths, out), "%s", slam_error());
        for (int i = 0; i < f.n; i++) {
            const tensor *t = f.hidden[i][l];
            float *expected = NEW(float, n[i] + 1), *alone = NEW(float, n[i] + 1);
            if (!CHECK(n[i] == (t ? t->count : 0), "utterance %d: %zu numbers", i, n[i])) break;
            CHECK(isnan(out[i][n[i]]), "utterance %d: something is written behind its features", i);
            if (t) CHECK(tensor_floats(t, expected, 0, n[i]), "%s", slam_error());
            check_close("hidden states", out[i], expected, n[i], 3e-5);
            CHECK(features(h, 1, &f.samples[i], &f.lengths[i], &alone), "%s", slam_error());
            check_close("alone", alone, out[i], n[i], 1e-5);
            if (SAME_BITS) CHECK(!memcmp(alone, out[i], n[i] * sizeof(float)), "utterance %d: other bits alone", i);
            free(expected), free(alone), free(out[i]);
        }
        hubert_free(h);
    }
    fixture_close(&f);
}

/* With pad 0, samples that have the zeros of the fixture around them already; with others, fewer or more zeros. */
static void test_padding(slam_ops *ops, const char *name) {
    fixture f;
    if (!fixture_open(&f, name)) return;
    for (int pad = 0; pad <= 80; pad += 20) {
        slam_hubert *h = hubert_load(ops, f.folder, f.layers, pad);
        if (!CHECK(h, "%s", slam_error())) break;
        for (int i = 0; i < f.n; i++) {
            const int more = 40 - pad; // zeros to add to, or take from, the fixture's audio
            const tensor *t = f.hidden[i][f.layers];
            const long length = f.lengths[i] + 2 * more;
            if (!t || length < 0) continue;
            float *in = NEW(float, (size_t)length + 1), *expected = NEW(float, t->count);
            size_t n;
            float *out = room_for(h, length, &n);
            if (more >= 0) memcpy(in + more, f.samples[i], (size_t)f.lengths[i] * sizeof *in);
            CHECK(features(h, 1, &in, &length, &out), "%s", slam_error());
            CHECK(n == t->count && tensor_floats(t, expected, 0, n), "pad %d: %zu numbers", pad, n);
            if (more >= 0 && n == t->count) check_close("hidden states", out, expected, n, 3e-5);
            CHECK(isnan(out[n]), "pad %d: something is written behind its features", pad);
            free(in), free(expected), free(out);
        }
        hubert_free(h);
    }
    fixture_close(&f);
}

/* An utterance has the same bits in any batch: of mixed lengths, with some many times and some of NaN; as one of several rows of
   almost equal length; by one thread; and where a batch has a shape of its own (batch_invariant 0). */
static void test_batches(slam_ops *ops, const char *name) {
    enum { N = 40 };
    fixture f;
    if (!fixture_open(&f, name)) return;
    slam_ops *one = slam_cpu(1);
    slam_hubert *h = hubert_load(ops, f.folder, f.layers, 40), *h1 = hubert_load(one, f.folder, f.layers, 40);
    if (!CHECK(h && h1, "%s", slam_error())) return;
    float *in[N], *out[N], *alone[N], *bad = NEW(float, 5000);
    long lengths[N];
    size_t n[N];
    for (int i = 0; i < 5000; i++) bad[i] = NAN;
    for (int k = 0; k < N; k++) {
        const int i = (7 * k + 1) % f.n;
        in[k] = k % 4 == 2 ? bad : f.samples[i];
        lengths[k] = k % 4 == 2 ? 5000 - k : f.lengths[i] > 100 && k > 8 ? f.lengths[i] - k : f.lengths[i];
        out[k] = room_for(h, lengths[k], &n[k]);
        alone[k] = room_for(h, lengths[k], &n[k]);
        CHECK(features(h, 1, &in[k], &lengths[k], &alone[k]), "%s", slam_error());
    }
    for (int way = 0; way < 4;
         way++) { // both; one thread; a device whose batches hold many frames; whose rows depend on each other
        slam_hubert *by = way == 1 ? h1 : h;
        ops->asynchronous = way >= 2;
        ops->batch_invariant = SAME_BITS && way != 3;
        CHECK(features(by, N, in, lengths, out), "%s", slam_error());
        for (int k = 0; k < N; k++) {
            CHECK(isnan(out[k][n[k]]), "utterance %d: something is written behind its features", k);
            if (in[k] == bad) continue;
            check_close("another batch", out[k], alone[k], n[k], 1e-5);
            if (SAME_BITS)
                CHECK(!memcmp(out[k], alone[k], n[k] * sizeof(float)), "way %d, utterance %d of the batch: other bits",
                      way, k);
        }
    }
    ops->asynchronous = 0;
    ops->batch_invariant = SAME_BITS;
    CHECK(features(h, 0, NULL, NULL, NULL), "an empty batch: %s", slam_error());
    lengths[0] = 0;
    CHECK(features(h, 1, in, lengths, out), "an empty utterance: %s", slam_error());
    lengths[0] = INT_MAX;
    check_fails(features(h, 1, in, lengths, out), "a recording of 2147483647 samples");
    for (int k = 0; k < N; k++) free(out[k]), free(alone[k]);
    hubert_free(h);
    hubert_free(h1);
    slam_ops_free(one);
    slam_ops_free(slam_cpu(ops->threads)); // as many threads as before
    free(bad);
    fixture_close(&f);
}

static char *file_text(const char *folder, const char *name, size_t *n) {
    char path[400];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *in = fopen(path, "rb");
    char *text = (char *)calloc(1, 1 << 20);
    *n = in ? fread(text, 1, (1 << 20) - 1, in) : 0;
    if (in) fclose(in);
    return text;
}

/* A copy of the folder `name` in which `from` stands as `to` (of the same length, in the tensors' file); its path. */
static const char *changed(const char *name, const char *file, const char *from, const char *to) {
    static const char *const files[] = {"config.json", "model.safetensors"};
    char folder[300], path[64];
    snprintf(folder, sizeof folder, "test/fixtures/hubert/%s", name);
    folder_create(check_path("changed"));
    for (int k = 0; k < 2; k++) {
        size_t n = 0;
        char *text = file_text(folder, files[k], &n), *out = (char *)calloc(1, n + 1000);
        char *at = !strcmp(file, files[k]) ? (char *)memmem(text, n, from, strlen(from)) : text;
        CHECK(at, "no '%s' in %s of %s", from, files[k], name);
        const size_t before = at ? (size_t)(at - text) : 0, gone = at && !strcmp(file, files[k]) ? strlen(from) : 0,
                     more = gone ? strlen(to) : 0;
        memcpy(out, text, before);
        memcpy(out + before, to, more);
        memcpy(out + before + more, text + before + gone, n - before - gone);
        snprintf(path, sizeof path, "changed/%s", files[k]);
        check_file(path, out, n - gone + more);
        free(text), free(out);
    }
    return check_path("changed");
}

static void test_errors(slam_ops *ops) {
    const char *c = "config.json", *m = "model.safetensors";
    const struct {
        const char *file, *from, *to, *error;
    } cases[] = {
        {c, "\"model_type\": \"hubert\"", "\"model_type\": \"wav2vec2\"", "model_type is 'wav2vec2'"},
        {c, "\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"", "hidden_act is 'relu'"},
        {c, "\"feat_extract_activation\": \"gelu\"", "\"feat_extract_activation\": \"gelu_new\"",
         "feat_extract_activation is 'gelu_new'"},
        {c, "\"feat_extract_norm\": \"group\"", "\"feat_extract_norm\": \"batch\"",
         "feat_extract_norm is 'batch', expected 'group' or 'layer'"},
        {c, "\"conv_bias\": false", "\"conv_bias\": 0", "'conv_bias'"},
        {c, "\"conv_dim\": [", "\"conv_dim\": [ 3,", "'conv_kernel' has 3 numbers, then its end"},
        {c, "\"conv_stride\": [", "\"conv_stride\": [ 0,",
         "'conv_stride' has 0 numbers, then 0, expected 1 to 16 from 1 to 16384, as many as conv_dim"},
        {c, "\"conv_stride\": [\n    5,\n    2,", "\"conv_stride\": [\n    1000, 1000,", "multiplies to more"},
        {c, "\"num_attention_heads\": 2", "\"num_attention_heads\": 5",
         "hidden_size is 24, expected a multiple of num_attention_heads, 5"},
        {c, "\"num_conv_pos_embedding_groups\": 4", "\"num_conv_pos_embedding_groups\": 7",
         "and of num_conv_pos_embedding_groups, 7"},
        {c, "\"intermediate_size\": 40", "\"intermediate_size\": 40, \"adapter_attn_dim\": 8", "adapter_attn_dim"},
        {c, "\"hidden_size\": 24", "\"hidden_size\": 32", "has shape (24,16), expected (32,16,1)"},
        {c, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "layer is 2, expected 0 to 1"},
        {c, "\"conv_pos_batch_norm\": false", "\"conv_pos_batch_norm\": true",
         "pos_conv_embed.conv.weight' is missing"},
        {c, "\"do_stable_layer_norm\": false", "\"do_stable_layer_norm\": \"no\"", "'do_stable_layer_norm'"},
        {m, "encoder.layers.1.final_layer_norm.bias", "encoder.layers.1.final_layer_norm.bios",
         "final_layer_norm.bias' is missing"},
        {m, "[16,16,3]", "[16,3,16]", "has shape (16,3,16), expected (16,16,3)"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
        check_fails(hubert_load(ops, changed("older_spelling", cases[k].file, cases[k].from, cases[k].to), 2, 40),
                    cases[k].error);
    check_fails(hubert_load(ops, "test/fixtures/hubert/base", 3, 40), "layer is 3");
    check_fails(hubert_load(ops, "test/fixtures/hubert/base", -1, 40), "layer is -1");
    check_fails(hubert_load(ops, "test/fixtures/none", 1, 40), "none");
    /* what a lower layer does not need may be wrong */
    slam_hubert *h = hubert_load(ops,
                                 changed("older_spelling", m, "encoder.layers.1.final_layer_norm.bias",
                                         "encoder.layers.1.final_layer_norm.bios"),
                                 1, 40);
    CHECK(h, "%s", slam_error());
    hubert_free(h);
}

/* ---- units ---- */

enum { RECORDINGS = 12, K = 9 };

/* Noise under a slow envelope, of lengths from 5 ms (too short for a frame of HuBERT) to 3 s. */
static void make_recordings(float **x, long *n) {
    static const long lengths[RECORDINGS] = {8000, 80, 48000, 8100, 16000, 2000, 31000, 8000, 640, 12345, 30500, 5000};
    uint64_t state = 5;
    for (int i = 0; i < RECORDINGS; i++) {
        n[i] = lengths[i];
        x[i] = NEW(float, (size_t)n[i]);
        for (long t = 0; t < n[i]; t++) x[i][t] = (float)(0.27 * rng_normal(&state) * sin((double)t * 4e-4 + i) * 0.3);
    }
}

static slam_unit_config config_of(const char *folder, int layer) {
    slam_unit_config c = slam_unit_config_default();
    c.features = SLAM_HUBERT;
    c.rate = 0;
    c.layer = layer;
    snprintf(c.hubert, sizeof c.hubert, "%s", folder);
    return c;
}

/* The features (frames,width) of a recording; free() them. */
static float *features_by(const slam_tokenizer *t, const float *x, long n, size_t *frames) {
    slam_tokenizer plain = *t;
    slam_recording r = {x, (size_t)n, NULL, ZERO};
    plain.K = 0;
    CHECK(slam_units_encode(&plain, &r, 1), "%s", slam_error());
    *frames = r.units.frames;
    return r.features;
}

/* Centroids near features of the longest recording. */
static slam_tokenizer *tokenizer_near(slam_ops *ops, const slam_unit_config *c, float *const *samples,
                                      const long *lengths) {
    slam_tokenizer *t = slam_tokenizer_load(NULL, c, ops);
    if (!CHECK(t, "%s", slam_error())) return NULL;
    const size_t D = (size_t)t->width;
    size_t frames;
    float *x = features_by(t, samples[2], lengths[2], &frames);
    t->centroids = NEW(float, K *D);
    for (size_t i = 0; i < K * D; i++) t->centroids[i] = 0.9f * x[i / D * (frames / K) * D + i % D];
    CHECK(tokenizer_complete(t, "centroids", K, D), "%s", slam_error());
    free(x);
    return t;
}

/* The units are the nearest centroids of the recording's features, by a loop of its own. */
static void check_units(const slam_tokenizer *tokenizer, const float *x, long n, const slam_units *u) {
    const size_t D = (size_t)tokenizer->width;
    size_t frames, t = 0;
    float *out = features_by(tokenizer, x, n, &frames);
    CHECK(u->frames == frames && u->samples == (size_t)n, "%zu frames, expected %zu", u->frames, frames);
    for (size_t i = 0; i < u->n; i++)
        for (int k = 0; k < u->duration[i] && t < frames; k++, t++) {
            double best = HUGE_VAL, ours = 0;
            for (int c = 0; c < K; c++) {
                double sum = 0;
                for (size_t d = 0; d < D; d++)
                    sum += pow((double)out[t * D + d] - tokenizer->centroids[(size_t)c * D + d], 2);
                if (sum < best) best = sum;
                if (c == u->unit[i]) ours = sum;
            }
            CHECK(ours <= best * (1 + 1e-5), "frame %zu: unit %d at %g, the nearest at %g", t, u->unit[i], ours, best);
        }
    CHECK(t == frames, "durations of %zu frames, expected %zu", t, frames);
    free(out);
}

static void test_units(slam_ops *ops) {
    slam_unit_config config = config_of("test/fixtures/hubert/mhubert", 2);
    float *x[RECORDINGS];
    long n[RECORDINGS];
    make_recordings(x, n);
    for (int normalize = 0; normalize < 2; normalize++) {
        if (!TEST("hubert: units of recordings%s, the same with any others", normalize ? ", normalised" : "")) continue;
        config.normalize = normalize;
        slam_tokenizer *t = tokenizer_near(ops, &config, x, n);
        slam_units alone[RECORDINGS];
        slam_recording r[RECORDINGS];
        for (int i = 0; t && i < RECORDINGS; i++) {
            const slam_recording one = {x[i], (size_t)n[i], NULL, ZERO};
            r[i] = one;
            CHECK(slam_units_encode(t, &r[i], 1), "%s", slam_error());
            alone[i] = r[i].units;
            check_units(t, x[i], n[i], &alone[i]);
        }
        CHECK(alone[1].frames == 0 && alone[1].n == 0, "5 ms have %zu frames", alone[1].frames);
        for (int way = 0; way < 3; way++) {
            ops->asynchronous = way > 0;
            ops->batch_invariant = SAME_BITS && way < 2;
            CHECK(slam_units_encode(t, r, RECORDINGS), "%s", slam_error());
            for (int i = 0; i < RECORDINGS; i++) {
                const slam_units *u = &r[i].units;
                CHECK(u->n == alone[i].n && u->frames == alone[i].frames &&
                          !memcmp(u->unit, alone[i].unit, u->n * sizeof(int)) &&
                          !memcmp(u->duration, alone[i].duration, u->n * sizeof(int)),
                      "way %d, recording %d: other units", way, i);
                slam_units_free(&r[i].units);
            }
        }
        ops->asynchronous = 0;
        ops->batch_invariant = SAME_BITS;
        for (int i = 0; i < RECORDINGS; i++) slam_units_free(&alone[i]);
        slam_tokenizer_free(t);
    }
    for (int i = 0; i < RECORDINGS; i++) free(x[i]);
}

/* The tokenizer of km.npy and km.json. */
static slam_tokenizer *load(const char *km_npy, const slam_unit_config *otherwise, slam_ops *ops) {
    slam_unit_config c = *otherwise;
    return slam_unit_config_load(&c, km_npy) ? slam_tokenizer_load(km_npy, &c, ops) : NULL;
}

/* km.json says which model and layer the centroids belong to; other weights are an error. */
static void test_config(slam_ops *ops) {
    slam_unit_config config = config_of("test/fixtures/hubert/mhubert", 1), other = slam_unit_config_default();
    float *x[RECORDINGS];
    long n[RECORDINGS];
    make_recordings(x, n);
    const slam_kmeans_report report = {100, 2.5, 3, 0};
    char *path = string_copy(check_path("kmh.npy"));
    config.normalize = 1;
    slam_tokenizer *t = tokenizer_near(ops, &config, x, n);
    if (t && TEST("hubert: km.json")) {
        CHECK(t->config.rate == 25 && t->hubert->step == 640, "%d frames per second", t->config.rate);
        CHECK(tokenizer_save(t, path, &report), "%s", slam_error());
        CHECK(slam_unit_config_load(&other, path) && other.features == SLAM_HUBERT && other.layer == 1 &&
                  other.normalize == 1 && other.rate == 25 && !strcmp(other.hubert, config.hubert),
              "layer %d of '%s'", other.layer, other.hubert);
        other = slam_unit_config_default();
        slam_tokenizer *back = load(path, &other, ops);
        CHECK(back && back->fingerprint == t->fingerprint && back->hubert->pad == 40, "%s", slam_error());
        slam_tokenizer_free(back);
        other = config;
        other.pad = 0;
        if (CHECK(back = slam_tokenizer_load(path, &other, ops), "%s", slam_error())) {
            CHECK(back->fingerprint != t->fingerprint, "another padding has the same fingerprint");
            CHECK(tokenizer_save(back, check_path("kmp.npy"), &report), "%s", slam_error());
        }
        slam_tokenizer_free(back);
        other = slam_unit_config_default();
        CHECK((back = load(check_path("kmp.npy"), &other, ops)) && back->hubert->pad == 0, "%s", slam_error());
        slam_tokenizer_free(back);
        check_fails(slam_unit_config_load(&other, check_path("kmp.npy")) && (other.pad = 1) &&
                        slam_tokenizer_load(check_path("kmp.npy"), &other, ops),
                    "do not belong together");
        other = slam_unit_config_default();
    }
    if (t && TEST("hubert: another model than that of the centroids")) {
        snprintf(other.hubert, sizeof other.hubert, "%s",
                 changed("mhubert", "config.json", "\"layer_norm_eps\": 1e-05", "\"layer_norm_eps\": 2e-05"));
        check_fails(load(path, &other, ops), "do not belong together");
        check_fails(load(path, &other, NULL), "HuBERT needs a device");
        other = config;
        other.rate = 50;
        check_fails(slam_tokenizer_load(NULL, &other, ops), "has 25 frames per second, expected 50");
        const float wrong[12] = {0};
        CHECK(npy_write(check_path("wrong.npy"), wrong, 3, 4), "%s", slam_error());
        check_fails(load(check_path("wrong.npy"), &config, ops),
                    "has shape (3, 4), expected 1 to 65534 centroids of 24 numbers");
    }
    if (TEST("hubert: hashes of slam 0.1, which are part of the fingerprints in shards")) {
        static const char *const names[] = {"mhubert", "stable_batch_norm", "older_spelling"};
        static const uint64_t hashes[] = {0xec28cbd324a455b0, 0x05197adf7002e3d9, 0xac7bdb4d5f024840};
        for (int i = 0; i < 3; i++) {
            slam_hubert *h = hubert_load(ops, path_join("test/fixtures/hubert", names[i]).at, 2, 40);
            CHECK(h && h->net.hash == hashes[i], "%s: %016llx", names[i], h ? (unsigned long long)h->net.hash : 0);
            hubert_free(h);
        }
    }
    if (TEST("hubert: preprocessor_config.json")) {
        static const char *const texts[] = {"{\"do_normalize\": false}", "{\"do_normalize\": true}",
                                            "{\"do_normalize\": 1}"};
        const char *folder = changed("mhubert", "config.json", "1e-05", "1e-05");
        for (int i = 0; i < 3; i++) {
            check_file("changed/preprocessor_config.json", texts[i], strlen(texts[i]));
            slam_hubert *h = hubert_load(ops, folder, 0, 40);
            CHECK(i == 2 ? !h && strstr(slam_error(), "'do_normalize'") != NULL : h && h->do_normalize == i, "%s: %s",
                  texts[i], slam_error());
            hubert_free(h);
        }
        unlink(check_path("changed/preprocessor_config.json"));
    }
    slam_tokenizer_free(t);
    for (int i = 0; i < RECORDINGS; i++) free(x[i]);
    free(path);
}

/* A model of one sample per frame, so that 2^19 samples are as many frames, too many for a batch. */
static void test_too_long(slam_ops *ops) {
    enum { TOO_LONG = 1 << 19 };
    uint32_t head[11] = {0x46464952,  36 + 2 * TOO_LONG, 0x45564157,   0x20746d66, 16,          1 | 1 << 16,
                         SAMPLE_RATE, 2 * SAMPLE_RATE,   2 | 16 << 16, 0x61746164, 2 * TOO_LONG};
    const slam_unit_config config =
        config_of(changed("older_spelling", "config.json", "\"conv_stride\": [\n    5,\n    2,\n    2\n",
                          "\"conv_stride\": [ 1, 1, 1 "),
                  1);
    slam_tokenizer *t = slam_tokenizer_load(NULL, &config, ops);
    const char *paths[2];
    slam_inputs in = ZERO;
    const slam_item *item;
    const char *skipped;
    if (!CHECK(t, "%s", slam_error())) return;
    char *bytes = (char *)calloc(1, sizeof head + 2 * TOO_LONG), *long_path;
    memcpy(bytes, head, sizeof head);
    paths[0] = long_path = string_copy(check_file("long.wav", bytes, sizeof head + 2 * TOO_LONG));
    head[1] = 36 + 512, head[10] = 512;
    memcpy(bytes, head, sizeof head);
    paths[1] = check_file("short.wav", bytes, sizeof head + 512);
    CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, paths, 2), "%s", slam_error());
    slam_reader *r = slam_reader_open(&in, t, 0);
    int more = 1;
    for (int i = 0; i < 2; i++) {
        do more = slam_reader_next(r, &item, &skipped);
        while (more > 0 && !item);
        if (!CHECK(more > 0, "%s", slam_error())) break;
        if (i) CHECK(!skipped, "%s", skipped);
        else CHECK(skipped && strstr(skipped, "long.wav: 524288 samples, expected fewer than 524288"), "%s", skipped);
    }
    slam_reader_close(r);
    slam_inputs_free(&in);
    slam_tokenizer_free(t);
    free(bytes);
    free(long_path);
}

int main(void) {
    slam_ops *ops = slam_cpu(2);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: %s", models[k])) test_model(ops, models[k]);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: batches, %s", models[k])) test_batches(ops, models[k]);
    for (int k = 0; k < MODELS; k += 5)
        if (TEST("hubert: other padding, %s", models[k])) test_padding(ops, models[k]);
    if (TEST("hubert: frames")) {
        slam_hubert *h = hubert_load(ops, "test/fixtures/hubert/mhubert", 0, 40);
        if (CHECK(h, "%s", slam_error())) { // of two LibriSpeech utterances, in mHuBERT-25Hz
            CHECK(frames_of(h, 225360) == 352 && frames_of(h, 255120) == 398, "%zu and %zu frames, expected 352, 398",
                  frames_of(h, 225360), frames_of(h, 255120));
            CHECK(frames_of(h, 0) == 0, "frames of no samples");
        }
        hubert_free(h);
    }
    if (TEST("hubert: models that are errors")) test_errors(ops);
    test_units(ops);
    test_config(ops);
    if (TEST("hubert: a file with too many frames is skipped")) test_too_long(ops);
    slam_ops_free(ops);
    return check_end();
}
