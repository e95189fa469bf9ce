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
    uint32_t n;
    slam_unit_config config = slam_unit_config_default();
    if (size < 4) return 0;
    memcpy(&n, bytes, 4);
    if (n > size - 4) return 0;
    if (!ops) MUST((ops = slam_cpu(1)) != NULL && mkdtemp(folder));
    write_file(folder, "config.json", bytes + 4, n);
    write_file(folder, "model.safetensors", bytes + 4 + n, size - 4 - n);
    config.features = SLAM_HUBERT;
    config.rate = 0;
    config.layer = 1;
    snprintf(config.hubert, sizeof config.hubert, "%s", folder);
    slam_tokenizer *t = slam_tokenizer_load(NULL, &config, ops);
    if (!t) return 0;
    slam_recording r = {samples, 3000, NULL, ZERO};
    uint64_t state = 1;
    for (int i = 0; i < 3000; i++) samples[i] = (float)rng_normal(&state);
    if (slam_units_encode(t, &r, 1)) MUST(r.units.frames <= 3080 && t->width > 0 && t->hubert->step > 0);
    free(r.features);
    slam_tokenizer_free(t);
    return 0;
}
