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
    size_t n, m, got = 0;
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

int main(void) {
    slam_ops *ops = slam_cpu(2);
    for (int k = 0; k < MODELS; k++)
        if (TEST("vocoder: %s", models[k])) test_model(ops, models[k]);
    slam_ops_free(ops);
    return check_end();
}
