/* HuBERT against Transformers' HubertModel: test/fixtures/hubert holds small models for every switch of the configuration
   (test/reference_hubert.py makes them). An utterance's features are the same alone and in a batch. */
static long convolved_at_once = 1 << 20;
#define HUBERT_SLICE convolved_at_once
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

#if defined SLAM_OPENBLAS || defined SLAM_ACCELERATE
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
    float *samples[UTTERANCES], *features[UTTERANCES];
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
    for (int i = 0; i < UTTERANCES; i++) free(f->samples[i]), free(f->features[i]);
    tensors_close(f->file);
}

/* Room for the features of all utterances, and how many numbers they are */
static size_t fixture_features(fixture *f, const slam_hubert *h, int i) {
    const size_t n = (size_t)slam_hubert_frames(h, f->lengths[i]) * slam_hubert_width(h);
    free(f->features[i]);
    f->features[i] = (float *)malloc((n + 1) * sizeof(float));
    for (size_t k = 0; k <= n; k++) f->features[i][k] = NAN;
    return n;
}

static int features(slam_hubert *h, int n, float *const *samples, const long *lengths, float *const *out) {
    return slam_hubert_features(h, n, (const float *const *)samples, lengths, out);
}

static void test_model(slam_ops *ops, const char *name) {
    fixture f;
    if (!fixture_open(&f, name)) return;
    for (int l = 0; l <= f.layers; l++) {
        slam_hubert *h = slam_hubert_load(ops, f.folder, l);
        size_t n[UTTERANCES];
        if (!CHECK(h, "%s", slam_error())) break;
        for (int i = 0; i < f.n; i++) n[i] = fixture_features(&f, h, i);
        CHECK(features(h, f.n, f.samples, f.lengths, f.features), "%s", slam_error());
        for (int i = 0; i < f.n; i++) {
            const tensor *t = f.hidden[i][l];
            if (!CHECK(n[i] == (t ? t->count : 0), "utterance %d: %zu numbers", i, n[i])) break;
            CHECK(f.features[i][n[i]] != f.features[i][n[i]], "utterance %d: something is written behind its features", i);
            float *expected = (float *)malloc((n[i] + 1) * sizeof(float)), *alone = (float *)malloc((n[i] + 1) * sizeof(float));
            if (t) CHECK(tensor_floats(t, expected, 0, n[i]), "%s", slam_error());
            check_close("hidden states", f.features[i], expected, n[i], 3e-5);
            CHECK(features(h, 1, &f.samples[i], &f.lengths[i], &alone), "%s", slam_error());
            check_close("alone", alone, f.features[i], n[i], 1e-5);
            if (SAME_BITS) CHECK(memcmp(alone, f.features[i], n[i] * sizeof(float)) == 0, "utterance %d: other bits alone", i);
            free(expected), free(alone);
        }
        slam_hubert_free(h);
    }
    fixture_close(&f);
}

/* Batches in all orders, of one utterance many times, and beside one that is nothing but NaN, are of no account; nor are threads. */
static void test_batches(slam_ops *ops, const char *name) {
    fixture f;
    if (!fixture_open(&f, name)) return;
    slam_hubert *h = slam_hubert_load(ops, f.folder, f.layers);
    if (!CHECK(h, "%s", slam_error())) return;
    float *bad = (float *)malloc(sizeof(float) * 5000), *out[9], *in[9];
    long lengths[9];
    for (int i = 0; i < 5000; i++) bad[i] = NAN;
    for (int i = 0; i < f.n; i++) fixture_features(&f, h, i);
    CHECK(features(h, f.n, f.samples, f.lengths, f.features), "%s", slam_error());
    for (int k = 0; k < 9; k++) {
        const int i = (7 * k + 1) % f.n;
        in[k] = k % 4 == 2 ? bad : f.samples[i];
        lengths[k] = k % 4 == 2 ? 5000 - k : f.lengths[i];
        out[k] = (float *)malloc(sizeof(float) * (1 + (size_t)slam_hubert_frames(h, lengths[k]) * slam_hubert_width(h)));
    }
    CHECK(features(h, 9, in, lengths, out), "%s", slam_error());
    for (int k = 0; k < 9; k++) {
        const int i = (7 * k + 1) % f.n;
        const size_t n = (size_t)slam_hubert_frames(h, lengths[k]) * slam_hubert_width(h);
        if (k % 4 == 2) continue;
        check_close("another batch", out[k], f.features[i], n, 1e-5);
        if (SAME_BITS) CHECK(memcmp(out[k], f.features[i], n * sizeof(float)) == 0, "utterance %d of the batch: other bits", k);
    }
    slam_hubert_free(h);
    slam_ops *one = slam_cpu(1);
    h = slam_hubert_load(one, f.folder, f.layers);
    if (CHECK(h, "%s", slam_error())) {
        CHECK(features(h, 9, in, lengths, out), "%s", slam_error());
        for (int k = 0; SAME_BITS && k < 9; k++)
            if (k % 4 != 2)
                CHECK(memcmp(out[k], f.features[(7 * k + 1) % f.n],
                             sizeof(float) * (size_t)slam_hubert_frames(h, lengths[k]) * slam_hubert_width(h)) == 0,
                      "one thread gives other bits");
        CHECK(features(h, 0, NULL, NULL, NULL), "an empty batch: %s", slam_error());
        lengths[0] = 0;
        CHECK(features(h, 1, in, lengths, out), "an empty utterance: %s", slam_error());
    }
    slam_hubert_free(h);
    slam_ops_free(one);
    slam_ops_free(slam_cpu(ops->threads)); // as many threads as before
    for (int k = 0; k < 9; k++) free(out[k]);
    free(bad);
    fixture_close(&f);
}

/* Samples of a batch of mixed lengths are convolved a row or a few rows at a time: the features are those of each alone. */
static void test_slices(slam_ops *ops, const char *name) {
    fixture f;
    if (!fixture_open(&f, name)) return;
    slam_hubert *h = slam_hubert_load(ops, f.folder, f.layers);
    if (!CHECK(h, "%s", slam_error())) return;
    size_t n[UTTERANCES];
    float *alone[UTTERANCES];
    long longest = 0;
    for (int i = 0; i < f.n; i++) {
        n[i] = fixture_features(&f, h, i);
        alone[i] = (float *)malloc((n[i] + 1) * sizeof(float));
        if (f.lengths[i] > longest) longest = f.lengths[i];
        CHECK(features(h, 1, &f.samples[i], &f.lengths[i], &alone[i]), "%s", slam_error());
    }
    for (int rows = 1; rows < 4; rows++) {
        convolved_at_once = rows * (longest + 1000);
        CHECK(features(h, f.n, f.samples, f.lengths, f.features), "%s", slam_error());
        for (int i = 0; i < f.n; i++) {
            check_close("features", f.features[i], alone[i], n[i], 1e-5);
            CHECK(f.features[i][n[i]] != f.features[i][n[i]], "utterance %d: something is written behind its features", i);
        }
    }
    convolved_at_once = 1 << 20;
    for (int i = 0; i < f.n; i++) free(alone[i]);
    slam_hubert_free(h);
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
    make_folders(check_path("changed"));
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

static void test_refused(slam_ops *ops) {
    const char *c = "config.json", *m = "model.safetensors";
    const struct {
        const char *file, *from, *to, *error;
    } cases[] = {
        {c, "\"model_type\": \"hubert\"", "\"model_type\": \"wav2vec2\"", "model_type is 'wav2vec2'"},
        {c, "\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"", "hidden_act is 'relu'"},
        {c, "\"feat_extract_activation\": \"gelu\"", "\"feat_extract_activation\": \"gelu_new\"",
         "feat_extract_activation is 'gelu_new'"},
        {c, "\"feat_extract_norm\": \"group\"", "\"feat_extract_norm\": \"batch\"", "feat_extract_norm is 'batch'"},
        {c, "\"conv_bias\": false", "\"conv_bias\": 0", "'conv_bias'"},
        {c, "\"conv_dim\": [", "\"conv_dim\": [ 3,", "conv_dim, conv_kernel and conv_stride have 4, 3 and 3"},
        {c, "\"conv_stride\": [", "\"conv_stride\": [ 0,", "'conv_stride' holds 0"},
        {c, "\"conv_stride\": [\n    5,\n    2,", "\"conv_stride\": [\n    1000, 1000,", "multiplies to more"},
        {c, "\"num_feat_extract_layers\": 3", "\"num_feat_extract_layers\": 4", "as num_feat_extract_layers says"},
        {c, "\"num_attention_heads\": 2", "\"num_attention_heads\": 5", "24 over 5 heads"},
        {c, "\"num_conv_pos_embedding_groups\": 4", "\"num_conv_pos_embedding_groups\": 7", "24 over 7 groups"},
        {c, "\"hidden_size\": 24", "\"hidden_size\": 32", "has shape (24,16), expected (32,16)"},
        {c, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "layer 2 was asked for, expected 0 to 1"},
        {c, "\"intermediate_size\": 40", "\"intermediate_size\": 40, \"adapter_attn_dim\": 8", "adapter_attn_dim"},
        {c, "\"conv_pos_batch_norm\": false", "\"conv_pos_batch_norm\": true", "conv.weight' is missing"},
        {c, "\"do_stable_layer_norm\": false", "\"do_stable_layer_norm\": \"no\"", "'do_stable_layer_norm'"},
        {m, "encoder.layers.1.final_layer_norm.bias", "encoder.layers.1.final_layer_norm.bios",
         "final_layer_norm.bias' is missing"},
        {m, "masked_spec_embed", "masked_spec_embad", "'masked_spec_embad' is not part"},
        {m, "[16,16,3]", "[16,3,16]", "expected (16,16,3)"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
        check_fails(slam_hubert_load(ops, changed("older_spelling", cases[k].file, cases[k].from, cases[k].to), 2), cases[k].error);
    check_fails(slam_hubert_load(ops, "test/fixtures/hubert/base", 3), "layer 3 was asked for");
    check_fails(slam_hubert_load(ops, "test/fixtures/hubert/base", -1), "layer -1 was asked for");
    check_fails(slam_hubert_load(ops, "test/fixtures/none", 1), "none");
    /* what a lower layer does not need may be wrong */
    slam_hubert *h = slam_hubert_load(
        ops, changed("older_spelling", m, "encoder.layers.1.final_layer_norm.bias", "encoder.layers.1.final_layer_norm.bios"), 1);
    CHECK(h, "%s", slam_error());
    slam_hubert_free(h);
}

/* ---- from files to units ---- */

enum { FILES = 12, K = 9 };

typedef struct speech_files {
    slam_list paths;
    float *x[FILES];
    size_t n[FILES];
} speech_files;

/* Noise under a slow envelope, of lengths from 5 ms (too short for a frame of HuBERT) to 3 s. */
static void make_files(speech_files *f) {
    static const size_t lengths[FILES] = {8000, 80, 48000, 8100, 16000, 2000, 31000, 8000, 640, 12345, 30500, 5000};
    uint64_t state = 5;
    memset(f, 0, sizeof *f);
    for (int i = 0; i < FILES; i++) {
        char name[32];
        f->n[i] = lengths[i];
        f->x[i] = (float *)malloc(lengths[i] * sizeof(float));
        int16_t *pcm = (int16_t *)malloc(lengths[i] * sizeof *pcm);
        for (size_t t = 0; t < lengths[i]; t++) {
            pcm[t] = (int16_t)(9000 * rng_normal(&state) * sin(t * 4e-4 + i) * 0.3);
            f->x[i][t] = (float)pcm[t] / 32768;
        }
        snprintf(name, sizeof name, "h%02d.wav", i);
        const uint32_t bytes = (uint32_t)(2 * lengths[i]), sizes[] = {36 + bytes, 16, 16000, 32000, bytes};
        char *wav = (char *)malloc(44 + bytes);
        memcpy(wav, "RIFF....WAVEfmt ....\1\0\1\0........\2\0\20\0data....", 44);
        memcpy(wav + 4, &sizes[0], 4), memcpy(wav + 16, &sizes[1], 4), memcpy(wav + 24, &sizes[2], 8),
            memcpy(wav + 40, &sizes[4], 4);
        memcpy(wav + 44, pcm, bytes);
        slam_list_add(&f->paths, check_file(name, wav, 44 + bytes));
        free(wav);
        free(pcm);
    }
}

static void free_files(speech_files *f) {
    for (int i = 0; i < FILES; i++) free(f->x[i]);
    slam_list_free(&f->paths);
}

static slam_speech_settings settings_of(const char *folder, int layer) {
    slam_speech_settings s;
    slam_speech_defaults(&s);
    s.features = SLAM_HUBERT;
    s.rate = 0;
    s.layer = layer;
    snprintf(s.hubert, sizeof s.hubert, "%s", folder);
    return s;
}

static float *features_of(slam_hubert *h, const float *x, size_t n, size_t *frames) {
    const long length = (long)n;
    *frames = (size_t)slam_hubert_frames(h, length);
    float *out = (float *)malloc((1 + *frames * slam_hubert_width(h)) * sizeof *out);
    CHECK(slam_hubert_features(h, 1, &x, &length, &out), "%s", slam_error());
    return out;
}

/* Centroids near features of the longest file. */
static slam_quantiser *quantiser_near(slam_ops *ops, const slam_speech_settings *s, const speech_files *f) {
    slam_hubert *h = slam_hubert_load(ops, s->hubert, s->layer);
    if (!CHECK(h, "%s", slam_error())) return NULL;
    size_t frames, D = (size_t)slam_hubert_width(h);
    float *x = features_of(h, f->x[2], f->n[2], &frames), *c = (float *)malloc(K * D * sizeof *c);
    for (size_t k = 0; k < K; k++)
        for (size_t d = 0; d < D; d++) c[k * D + d] = 0.9f * x[k * (frames / K) * D + d];
    slam_quantiser *q = slam_quantiser_new(s, ops, c, K);
    CHECK(q, "%s", slam_error());
    slam_hubert_free(h);
    free(x);
    free(c);
    return q;
}

/* The units of a file are the nearest centroids of its features, by a loop of its own. */
static void check_units(slam_hubert *h, const slam_quantiser *q, const float *x, size_t n, const slam_units *u) {
    size_t frames, D = (size_t)slam_hubert_width(h), t = 0;
    float *features = features_of(h, x, n, &frames);
    CHECK(u->frames == frames && u->samples == n, "%zu frames, expected %zu", u->frames, frames);
    for (size_t i = 0; i < u->n; i++)
        for (int k = 0; k < u->duration[i] && t < frames; k++, t++) {
            double best = HUGE_VAL, ours = 0;
            for (int c = 0; c < K; c++) {
                double sum = 0;
                for (size_t d = 0; d < D; d++) {
                    const double e = features[t * D + d] - q->centroid[c * D + d];
                    sum += e * e;
                }
                if (sum < best) best = sum;
                if (c == u->unit[i]) ours = sum;
            }
            CHECK(ours <= best * (1 + 1e-5), "frame %zu: unit %d at %g, the nearest at %g", t, u->unit[i], ours, best);
        }
    CHECK(t == frames, "durations of %zu frames, expected %zu", t, frames);
    free(features);
}

static int count_failed(void *context, const slam_speech_progress *p) {
    if (p->failed) {
        CHECK(strstr(p->because, "5.0 ms of audio, which is too short"), "%s", p->because);
        ++*(int *)context;
    }
    return 1;
}

/* Lets `left` calls pass, then stops. */
static int stop_soon(void *context, const slam_speech_progress *p) { return p->failed || (*(int *)context)-- > 0; }

static void check_bytes(const char *a, const char *b) {
    size_t n[2];
    char *text[2] = {file_text("", a, &n[0]), file_text("", b, &n[1])};
    CHECK(n[0] == n[1] && n[0] > 0 && !memcmp(text[0], text[1], n[0]), "%s (%zu bytes) and %s (%zu) differ", a, n[0], b, n[1]);
    free(text[0]);
    free(text[1]);
}

/* As slam_quantiser_sources, with room for so many samples and, where `asynchronous`, as for a device of that kind. */
static void check_rounds(const slam_quantiser *q, const slam_sources *s, int64_t room, int asynchronous,
                         const slam_units *expected) {
    audio_block b = SLAM_ZERO;
    size_t n, clip_at = 0;
    const slam_ops before = *q->ops;
    b.speech = q->speech;
    b.quantiser = q;
    b.sources = s;
    b.want = WANT_CLIPS;
    q->ops->asynchronous = asynchronous;
    q->ops->same_rows = before.same_rows && !asynchronous;
    CHECK(block_begin(&b), "%s", slam_error());
    b.most_waiting = room;
    for (size_t at = 0; at < s->n; at += n) {
        if (!CHECK(block_run(&b, at, &n) && n, "%s", slam_error())) break;
        for (size_t i = 0; i < n; i++) {
            heard *h = &b.result[i];
            CHECK(h->failed == (at + i == 1 && s->max_seconds == 0), "%s: %s", h->name, h->error ? h->error : "");
            for (size_t k = 0; k < h->clips.n; k++) {
                const slam_units *u = &h->clips.at[k]->u, *e = &expected[s->max_seconds > 0 ? clip_at++ : at + i];
                CHECK(u->n == e->n && u->frames == e->frames && !memcmp(u->unit, e->unit, u->n * sizeof *u->unit) &&
                          !memcmp(u->duration, e->duration, u->n * sizeof *u->unit),
                      "%s, part %zu: other units with room for %lld samples", h->name, k, (long long)room);
            }
            heard_free(h);
        }
    }
    block_end(&b);
    q->ops->asynchronous = before.asynchronous;
    q->ops->same_rows = before.same_rows;
}

/* Parts of the longest file, alone and in rounds. */
static void test_parts(const slam_quantiser *q, const speech_files *f) {
    slam_list one = SLAM_ZERO;
    slam_units expected[16];
    audio_parts p;
    decoder d = SLAM_ZERO;
    int n = 0;
    slam_list_add(&one, f->paths.at[2]);
    CHECK(parts_open(&p, &d, f->paths.at[2], 1), "%s", slam_error());
    for (; n < 16 && parts_next(&p) > 0; n++) CHECK(slam_quantiser_units(q, p.sample, p.samples, &expected[n]), "%s", slam_error());
    CHECK(n >= 3, "%d parts", n);
    slam_sources *s = slam_sources_audio(&one, 1);
    check_rounds(q, s, 1, 0, expected);
    check_rounds(q, s, 20000, 0, expected);
    slam_sources_free(s);
    for (int i = 0; i < n; i++) slam_units_free(&expected[i]);
    parts_close(&p);
    decoder_close(&d);
    slam_list_free(&one);
}

static void test_tokenize(const slam_quantiser *q, const slam_sources *s) {
    slam_tokenize_report r, r2;
    int stops = 0;
    char *whole = text_copy(check_path("whole.jsonl")), *parts = text_copy(check_path("parts.jsonl"));
    CHECK(slam_tokenize(q, s, whole, 0, 100, NULL, NULL, &r), "%s", slam_error());
    CHECK(r.files == FILES && r.failed == 1 && r.documents == FILES - 1, "%zu files, %zu failed", r.files, r.failed);
    do {
        int soon = 1;
        if (!CHECK(slam_tokenize(q, s, parts, 0, 100, stop_soon, &soon, &r2), "%s", slam_error())) break;
    } while (r2.stopped && ++stops < 40);
    CHECK(stops > 2 && !r2.stopped, "stopped %d times", stops);
    check_bytes(whole, parts);
    free(whole);
    free(parts);
}

static void test_units(slam_ops *ops) {
    const slam_speech_settings settings = settings_of("test/fixtures/hubert/mhubert", 2);
    slam_units u[FILES];
    speech_files f;
    int failed = 0;
    make_files(&f);
    slam_quantiser *q = quantiser_near(ops, &settings, &f);
    slam_hubert *h = slam_hubert_load(ops, settings.hubert, 2);
    slam_sources *s = slam_sources_audio(&f.paths, 0);
    if (q && TEST("hubert: units of files")) {
        CHECK(slam_quantiser_sources(q, s, u, count_failed, &failed) && failed == 1, "%d failed: %s", failed, slam_error());
        for (int i = 0; i < FILES; i++)
            if (i != 1) check_units(h, q, f.x[i], f.n[i], &u[i]);
        for (int i = 0; i < FILES; i++) slam_units_free(&u[i]);
    }
    if (q && TEST("hubert: units in any company are those alone")) {
        memset(u, 0, sizeof u);
        for (int i = 0; i < FILES; i++)
            if (i != 1) CHECK(slam_quantiser_file(q, f.paths.at[i], &u[i]), "%s", slam_error());
        for (int asynchronous = 0; asynchronous < 2; asynchronous++)
            for (int64_t room = 1; room < 1000000; room *= 30) check_rounds(q, s, room, asynchronous, u);
        for (int i = 0; i < FILES; i++) slam_units_free(&u[i]);
        test_parts(q, &f);
    }
    if (q && TEST("hubert: a job that is stopped goes on")) test_tokenize(q, s);
    slam_sources_free(s);
    slam_hubert_free(h);
    slam_quantiser_free(q);
    free_files(&f);
}

/* km.json says which model and layer the centroids are of, and other weights are told. */
static void test_settings(slam_ops *ops) {
    slam_speech_settings settings = settings_of("test/fixtures/hubert/mhubert", 1), other;
    slam_kmeans_report r, r2;
    speech_files f;
    make_files(&f);
    slam_sources *s = slam_sources_audio(&f.paths, 0);
    char *path = text_copy(check_path("kmh.npy"));
    settings.normalize = 1;
    if (TEST("hubert: a fit, and what km.json says of it")) {
        slam_quantiser *q = slam_quantiser_fit(&settings, ops, s, K, 100, 3, NULL, NULL, &r);
        if (!CHECK(q, "%s", slam_error())) return;
        slam_ops_free(slam_cpu(1));
        slam_quantiser *again = slam_quantiser_fit(&settings, ops, s, K, 100, 3, NULL, NULL, &r2);
        slam_ops_free(slam_cpu(ops->threads));
        CHECK(again && (!SAME_BITS || !memcmp(q->centroid, again->centroid, K * (size_t)q->D * sizeof(float))),
              "one thread fits others");
        CHECK(r.frames == 100 && r.inertia > 0 && slam_quantiser_settings(q)->rate == 25, "%zu frames, %d a second", r.frames,
              slam_quantiser_settings(q)->rate);
        CHECK(slam_quantiser_save(q, path, &r), "%s", slam_error());
        CHECK(slam_quantiser_may_fit(path, &settings, s, K, 100, 3) == 2, "not known again");
        slam_speech_defaults(&other);
        CHECK(slam_quantiser_settings_read(path, &other) && other.features == SLAM_HUBERT && other.layer == 1 &&
                  other.normalize == 1 && !strcmp(other.hubert, settings.hubert),
              "layer %d of '%s'", other.layer, other.hubert);
        slam_speech_defaults(&other);
        slam_quantiser_free(again);
        again = slam_quantiser_open(path, &other, ops);
        CHECK(again && slam_quantiser_fingerprint(again) == slam_quantiser_fingerprint(q), "%s", slam_error());
        slam_quantiser_free(again);
        slam_quantiser_free(q);
    }
    if (TEST("hubert: another model than that of the centroids")) {
        snprintf(other.hubert, sizeof other.hubert, "%s",
                 changed("mhubert", "config.json", "\"layer_norm_eps\": 1e-05", "\"layer_norm_eps\": 2e-05"));
        check_fails(slam_quantiser_open(path, &other, ops), "do not belong together");
        check_fails(slam_quantiser_open(path, &other, NULL), "HuBERT needs a device");
        other = settings;
        other.rate = 50;
        check_fails(slam_speech_new(&other, ops), "has 25 frames a second, not 50");
        const float wrong[12] = {0};
        CHECK(npy_write(check_path("wrong.npy"), wrong, 3, 4), "%s", slam_error());
        check_fails(slam_quantiser_open(check_path("wrong.npy"), &settings, ops),
                    "has shape (3, 4), expected 1 to 65534 centroids of 24 numbers");
    }
    slam_sources_free(s);
    free_files(&f);
    free(path);
}

int main(void) {
    slam_ops *ops = slam_cpu(2);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: %s", models[k])) test_model(ops, models[k]);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: batches, %s", models[k])) test_batches(ops, models[k]);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: slices of a batch, %s", models[k])) test_slices(ops, models[k]);
    if (TEST("hubert: frames")) {
        slam_hubert *h = slam_hubert_load(ops, "test/fixtures/hubert/mhubert", 0);
        if (CHECK(h, "%s", slam_error())) { // of two LibriSpeech utterances, in mHuBERT-25Hz
            CHECK(slam_hubert_frames(h, 225360) == 352 && slam_hubert_frames(h, 255120) == 398,
                  "%ld and %ld frames, expected 352, 398", slam_hubert_frames(h, 225360), slam_hubert_frames(h, 255120));
            CHECK(slam_hubert_frames(h, 0) == 0 && slam_hubert_frames(h, -5) == 0, "frames of no samples");
        }
        slam_hubert_free(h);
    }
    if (TEST("hubert: what is refused")) test_refused(ops);
    test_units(ops);
    test_settings(ops);
    slam_ops_free(ops);
    return check_end();
}
