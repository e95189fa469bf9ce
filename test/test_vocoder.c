/* Unit vocoders against PyTorch: test/fixtures/vocoder holds small models for every switch of the configuration
   (test/reference_vocoder.py makes them). Long inputs, which are synthesised in windows, against the same in one piece. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

static const char *const models[] = {"lj_25hz",        "expresso_50hz", "given_durations",  "plain_weights",
                                     "no_predictor",   "speakers",      "default_speakers", "styles",
                                     "uneven_kernels", "short_kernels"};
enum { MODELS = sizeof models / sizeof *models };

/* The numbers of a tensor of int32; free() them. */
static int *ints(const tensors *file, const char *name, size_t *n) {
    const tensor *t = tensors_find(file, name);
    if (!t) return NULL;
    *n = t->count;
    return (int *)memcpy(malloc(t->count * sizeof(int)), t->data, t->count * sizeof(int));
}

/* The samples of units; free() them. */
static float *synthesize(slam_vocoder *v, const int *unit, const int *duration, size_t n, size_t *samples) {
    const float *x;
    ptrdiff_t got = 0;
    *samples = 0;
    if (!CHECK(slam_vocoder_start(v, unit, duration, n), "%s", slam_error())) return NULL;
    float *out = NEW(float, v->samples);
    for (; (got = slam_vocoder_next(v, &x)) > 0; *samples += (size_t)got)
        memcpy(out + *samples, x, (size_t)got * sizeof *out);
    CHECK(got == 0 && *samples == v->samples, "%zu of %zu samples: %s", *samples, v->samples, slam_error());
    return out;
}

static void test_model(slam_ops *ops, const char *name) {
    char folder[200], path[300];
    snprintf(folder, sizeof folder, "test/fixtures/vocoder/%s", name);
    snprintf(path, sizeof path, "%s/case.safetensors", folder);
    tensors *file = tensors_open(path);
    if (!CHECK(file, "%s", slam_error())) return;
    size_t n = 0, m = 0, got = 0;
    int *units = ints(file, "units", &n), *durations = ints(file, "durations", &m);
    const char *kind = tensors_metadata(file, "durations");
    slam_vocoder *v = slam_vocoder_open(folder, atoi(tensors_metadata(file, "speaker")),
                                        atoi(tensors_metadata(file, "style")), NULL, ops);
    if (!CHECK(v, "%s", slam_error())) return;
    const tensor *t = tensors_find(file, "samples");
    float *expected = NEW(float, t->count);
    CHECK(tensor_floats(t, expected, 0, t->count), "%s", slam_error());
    float *out = synthesize(v, units, strcmp(kind, "given") ? NULL : durations, n, &got);
    if (CHECK(out && got == t->count, "%zu samples, expected %zu: %s", got, t->count, slam_error()))
        check_close("samples", out, expected, got, 1e-5);
    free(out), free(expected), free(units), free(durations);
    slam_vocoder_free(v);
    tensors_close(file);
}

/* Windows of any length give the bits of one: no sample depends on more than the halo. Memory depends on the window. */
static void test_windows(slam_ops *ops, const char *name) {
    enum { N = 120 };
    static const size_t windows[] = {1, 7, 64};
    int units[N];
    size_t n, m;
    const slam_path folder = path_join("test/fixtures/vocoder", name);
    slam_vocoder *v = slam_vocoder_open(folder.at, 0, 0, NULL, ops),
                 *short_one = slam_vocoder_open(folder.at, 0, 0, NULL, ops);
    if (!CHECK(v && short_one, "%s", slam_error())) return;
    for (int i = 0; i < N; i++) units[i] = (int)rng_below(&check_state.seed, (uint64_t)v->K);
    float *whole = synthesize(v, units, NULL, N, &n);
    for (int i = 0; i < 3; i++) {
        short_one->gan->window = windows[i];
        float *out = synthesize(short_one, units, NULL, N, &m);
        CHECK(m == n && short_one->frames == v->frames, "%zu samples, expected %zu", m, n);
        check_close("samples", out, whole, n, 1e-6);
        if (i == 0) CHECK(4 * short_one->gan->net.arena_bytes < 3 * v->gan->net.arena_bytes, "as much memory");
        free(out);
    }
    free(whole);
    slam_vocoder_free(v), slam_vocoder_free(short_one);
}

/* A copy of plain_weights in which `from` stands as `to` (of the same length, in the tensors' file); its path. */
static const char *changed(int weights, const char *from, const char *to) {
    static const char *const files[] = {"config.json", "model.safetensors"};
    char path[300];
    folder_create(check_path("changed"));
    for (int k = 0; k < 2; k++) {
        file_map map;
        snprintf(path, sizeof path, "test/fixtures/vocoder/plain_weights/%s", files[k]);
        if (!CHECK(file_map_open(&map, path), "%s", slam_error())) return "";
        const unsigned char *at = (const unsigned char *)memmem(map.data, map.size, from, strlen(from));
        strbuf out = ZERO;
        CHECK(k != weights || at, "no '%s' in %s", from, path);
        if (k == weights && at) {
            strbuf_add_bytes(&out, (const char *)map.data, (size_t)(at - map.data));
            strbuf_add(&out, "%s", to);
            at += strlen(from);
        } else at = map.data;
        strbuf_add_bytes(&out, (const char *)at, (size_t)(map.data + map.size - at));
        snprintf(path, sizeof path, "changed/%s", files[k]);
        check_file(path, out.at, out.n);
        strbuf_free(&out);
        file_map_close(&map);
    }
    return check_path("changed");
}

static void test_errors(slam_ops *ops) {
    static const struct {
        int weights;
        const char *from, *to, *error;
    } cases[] = {
        {0, "\"f0\": false", "\"f0\": true", "'f0' is set, expected a vocoder of units, speakers and styles alone"},
        {0, "\"f0\": false", "\"embedder_params\": {\"a\": 1}", "'embedder_params' is set"},
        {0, "\"f0\": false", "\"lambda_commit\": 0.02", "'lambda_commit' is set"},
        {0, "\"f0\": false", "\"lambda_commit_code\": 0.02", "'lambda_commit_code' is set"},
        {0, "\"resblock\": \"1\"", "\"resblock\": \"2\"", "resblock is '2', expected '1'"},
        {0, "16000", "22050", "'sampling_rate' is 22050"},
        {0, "\"num_embeddings\": 50", "\"num_embeddings\": 51", "'dict.weight' has shape (50,8), expected (51,8,1)"},
        {0, "\"num_embeddings\": 50", "\"num_embeddings\": 1e9", "'num_embeddings' is 1e9"},
        {0, "\"embedding_dim\": 8", "\"embedding\": 8", "'embedding_dim' is missing"},
        {0, "\"upsample_initial_channel\": 16", "\"upsample_initial_channel\": 3", "stage 1 has"},
        {0, "\"upsample_initial_channel\": 16", "\"upsample_initial_channel\": 32", "expected (32,8,7)"},
        {0, "\"upsample_rates\": [", "\"upsample_rates\": [2,", "'upsample_kernel_sizes' has 2 numbers, then its end"},
        {0, "\"upsample_rates\": [", "\"upsample_rates\": [0,", "'upsample_rates' has 0 numbers, then 0"},
        {0, "\"upsample_rates\": [\n    3", "\"upsample_rates\": [\n    9", "stage 0 has rate 9, kernel size 7"},
        {0, "\"upsample_rates\": [\n    3", "\"upsample_rates\": [\n    9999", "stage 0 has rate 9999"},
        {0, "\"resblock_kernel_sizes\": [\n    3", "\"resblock_kernel_sizes\": [\n    4", "block 0 has kernel size 4"},
        {0, "\"resblock_kernel_sizes\": [", "\"resblock_kernel_sizes\": [7,",
         "'resblock_dilation_sizes' has 0 numbers"},
        {0, "\"resblock_dilation_sizes\": [\n    [", "\"resblock_dilation_sizes\": [\n    [9, ",
         "'resblock_dilation_sizes'"},
        {0, "\"resblock_dilation_sizes\": [\n    [\n      1", "\"resblock_dilation_sizes\": [\n    [\n      16384",
         "block 0 has kernel size 3 and reads 16395 frames"},
        {0, "\"resblock_dilation_sizes\"", "\"dilations\"", "'resblock_dilation_sizes' has 0 numbers, then its end"},
        {0, "{", "{{", "config.json"},
        {1, "conv_post.bias", "conv_past.bias", "'conv_post.bias' is missing, expected (1,1,1)"},
        {1, "ups.0.weight\"", "ups.9.weight\"", "'ups.0.weight' is missing, expected (16,8,7)"},
        {1, "[16,8,7]", "[8,16,7]", "expected (16,8,7)"},
        {1, "dur_predictor.ln2.bias", "dur_predictor.ln3.bias", "'dur_predictor.ln2.bias' is missing"},
        {1, "\"F32\"", "\"I32\"", "expected F32, F16, BF16 or F64"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
        check_fails(slam_vocoder_open(changed(cases[k].weights, cases[k].from, cases[k].to), 0, 0, NULL, ops),
                    cases[k].error);
    check_fails(slam_vocoder_open("test/fixtures/vocoder/speakers", 5, 0, NULL, ops), "5 rows of spkr.weight");
    check_fails(slam_vocoder_open("test/fixtures/vocoder/speakers", -1, 0, NULL, ops), "expected number -1");
    check_fails(slam_vocoder_open("test/fixtures/vocoder/speakers", 0, 1, NULL, ops), "0 rows of style.weight");
    check_fails(slam_vocoder_open("test/fixtures/none", 0, 0, NULL, ops), "none");
    check_fails(slam_vocoder_open("test/fixtures/hubert/base", 0, 0, NULL, ops), "'num_embeddings' is missing");
    slam_vocoder *v = slam_vocoder_open("test/fixtures/vocoder/plain_weights", 0, 0, NULL, ops);
    const int units[] = {3, 50, 2}, negative[] = {-1}, huge[] = {INT_MAX, INT_MAX, INT_MAX};
    if (!CHECK(v, "%s", slam_error())) return;
    check_fails(slam_vocoder_start(v, units, NULL, 3), "unit 2 is 50, expected 0 to 49");
    check_fails(slam_vocoder_start(v, negative, NULL, 1), "unit 1 is -1");
    check_fails(slam_vocoder_start(v, units, NULL, 0), "has no units");
    check_fails(slam_vocoder_start(v, units, huge, 1), "too long for a WAV file");
    slam_vocoder_free(v);
}

int main(void) {
    slam_ops *ops = slam_cpu(2);
    for (int k = 0; k < MODELS; k++)
        if (TEST("vocoder: %s", models[k])) test_model(ops, models[k]);
    for (int k = 3; k < MODELS; k++)
        if (TEST("vocoder: windows, %s", models[k])) test_windows(ops, models[k]);
    if (TEST("vocoder: folders and units that are errors")) test_errors(ops);
    slam_ops_free(ops);
    return check_end();
}
