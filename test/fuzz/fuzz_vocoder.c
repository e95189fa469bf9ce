/* A vocoder's folder. A vocoder that loads synthesises units, as many samples as it says. */
#include "fuzz.h"

static int fuzz_vocoder(const uint8_t *bytes, size_t size) {
    static slam_ops *ops;
    int units[5], durations[5] = {1, 2, 1, 3, 0};
    const char *folder = fuzz_folder(bytes, size);
    if (!folder) return 0;
    if (!ops) MUST((ops = slam_cpu(1)) != NULL);
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
