/* A HuBERT model's folder: four bytes with the length of config.json, it, and model.safetensors. A model that loads computes
   features of noise, as many as it says, within its own memory. */
#include "fuzz.h"

static void write_file(const char *folder, const char *name, const uint8_t *bytes, size_t n) {
    char path[100];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static char folder[] = "/tmp/fuzz_hubert.XXXXXX";
    static slam_ops *ops;
    float samples[3000];
    const float *in = samples;
    uint32_t n;
    long length = 3000;
    if (size < 4) return 0;
    memcpy(&n, bytes, 4);
    if (n > size - 4) return 0;
    if (!ops) MUST((ops = slam_cpu(1)) != NULL && mkdtemp(folder));
    write_file(folder, "config.json", bytes + 4, n);
    write_file(folder, "model.safetensors", bytes + 4 + n, size - 4 - n);
    slam_hubert *h = slam_hubert_load(ops, folder, 1);
    if (!h) return 0;
    const long frames = slam_hubert_frames(h, length);
    const int D = h->width;
    MUST(frames >= 0 && frames <= length + 80 && D > 0 && h->step > 0);
    uint64_t state = 1;
    for (int i = 0; i < length; i++) samples[i] = (float)rng_normal(&state);
    float *out = (float *)malloc((size_t)frames * (size_t)D * sizeof *out + 1);
    if (out) slam_hubert_features(h, 1, &in, &length, &out);
    free(out);
    slam_hubert_free(h);
    return 0;
}
