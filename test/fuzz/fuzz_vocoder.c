/* A vocoder's folder: four bytes with the length of config.json, it, and model.safetensors. A vocoder that loads synthesises units,
   as many samples as it says. */
#include "fuzz.h"

static void write_file(const char *folder, const char *name, const uint8_t *bytes, size_t n) {
    char path[100];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static char folder[] = "/tmp/fuzz_vocoder.XXXXXX";
    static slam_ops *ops;
    int units[5], durations[5] = {1, 2, 1, 3, 0};
    uint32_t n;
    if (size < 4) return 0;
    memcpy(&n, bytes, 4);
    if (n > size - 4) return 0;
    if (!ops) MUST((ops = slam_cpu(1)) != NULL && mkdtemp(folder));
    write_file(folder, "config.json", bytes + 4, n);
    write_file(folder, "model.safetensors", bytes + 4 + n, size - 4 - n);
    slam_vocoder *v = slam_vocoder_open(folder, 0, 0, NULL, ops);
    if (!v) return 0;
    MUST(v->K > 0 && v->step > 0 && v->gan->step > 0);
    for (int i = 0; i < 5; i++) units[i] = 7919 * i % v->K;
    if (slam_vocoder_start(v, units, durations, 5) && v->samples < 1 << 20) {
        const float *x;
        ptrdiff_t got;
        size_t sum = 0;
        while ((got = slam_vocoder_next(v, &x)) > 0) {
            for (ptrdiff_t i = 0; i < got; i++) MUST(!(fabsf(x[i]) > 1));
            sum += (size_t)got;
        }
        MUST(got < 0 || sum == v->samples);
    }
    slam_vocoder_free(v);
    return 0;
}
