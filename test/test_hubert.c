/* HuBERT against Transformers' HubertModel: test/fixtures/hubert holds small models for every switch of the configuration
   (test/reference_hubert.py makes them). An utterance's features are the same alone and in a batch. */
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

int main(void) {
    slam_ops *ops = slam_cpu(2);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: %s", models[k])) test_model(ops, models[k]);
    for (int k = 0; k < MODELS; k++)
        if (TEST("hubert: batches, %s", models[k])) test_batches(ops, models[k]);
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
    slam_ops_free(ops);
    return check_end();
}
