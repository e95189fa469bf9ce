/* Audio of any format: a file becomes units in parts of a second, each frame in one unit, whatever the file holds. */
#include "fuzz.h"

/* libsndfile 1.2.0 leaks with damaged Ogg files; what this project allocates is still looked at. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) { return "leak:libsndfile\nleak:libvorbis\nleak:libogg\n"; }

enum { LARGEST = 1 << 18 }; // bytes; some formats make much audio out of few

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static slam_quantiser *q;
    slam_speech_settings settings;
    float centroid[2 * 39] = {1, 2, 3};
    decoder d = SLAM_ZERO;
    audio_parts p;
    double end = 0;
    if (size > LARGEST) return 0;
    slam_speech_defaults(&settings);
    if (!q) q = slam_quantiser_new(&settings, NULL, centroid, 2);
    MUST(q);
    int more = parts_open(&p, &d, fuzz_file(bytes, size), 1) ? 1 : -1;
    for (int i = 0; more > 0 && i < 20 && (more = parts_next(&p)) > 0; i++) {
        slam_units u;
        size_t frames = 0;
        MUST(p.used > 0 && p.samples > 0 && p.start == end && p.end > p.start && p.end - p.start <= 1);
        end = p.end;
        for (size_t k = 0; k < p.samples; k++) MUST(isfinite(p.sample[k]));
        MUST(slam_quantiser_units(q, p.sample, p.samples, &u));
        for (size_t k = 0; k < u.n; k++) frames += (size_t)u.duration[k];
        MUST(frames == u.frames && frames > 0);
        slam_units_free(&u);
    }
    if (more < 0) MUST(slam_error()[0]);
    parts_close(&p);
    decoder_close(&d);
    return 0;
}
