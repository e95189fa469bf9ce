/* WAV: audio is finite, and no longer than its bytes. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    audio a;
    double sum = 0;
    if (wav_parse(bytes, size, "fuzz", &a)) {
        MUST(a.n > 0 && a.n <= size && a.rate > 0);
        for (size_t i = 0; i < a.n; i++) {
            MUST(isfinite(a.sample[i]));
            sum += (double)a.sample[i];
        }
        audio_free(&a);
    }
    (void)sum;
    return 0;
}
