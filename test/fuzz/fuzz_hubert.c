/* A HuBERT model's folder. A model that loads computes features of noise, as many as it says, within its own memory. */
#include "fuzz.h"

static int fuzz_hubert(const uint8_t *bytes, size_t size) {
    static slam_ops *ops;
    float samples[3000];
    slam_unit_config config = slam_unit_config_default();
    const char *folder = fuzz_folder(bytes, size);
    if (!folder) return 0;
    if (!ops) MUST((ops = slam_cpu(1)) != NULL);
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
