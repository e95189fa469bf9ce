/* Audio of any format: a file becomes units in segments of a second, each frame in one unit, whatever the file holds. */
#include "fuzz.h"

/* libsndfile 1.2.0 leaks with damaged Ogg files; what this project allocates is still checked. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) { return "leak:libsndfile\nleak:libvorbis\nleak:libogg\n"; }

static int fuzz_audio(const uint8_t *bytes, size_t size) {
    static slam_tokenizer *t;
    const slam_unit_config config = slam_unit_config_default();
    double end = 0;
    float *x;
    size_t n;
    audio a;
    if (size > 1 << 18) return 0; // some formats make much audio out of few bytes
    if (!t) {
        MUST(t = slam_tokenizer_load(NULL, &config, NULL));
        t->centroids = NEW(float, 2 * 39);
        for (int i = 0; i < 3; i++) t->centroids[i] = (float)(i + 1);
        MUST(tokenizer_complete(t, "centroids", 2, 39));
    }
    int more = audio_open(&a, fuzz_file(bytes, size), NULL) ? 1 : -1;
    for (int i = 0; more > 0 && i < 20 && (more = audio_next_segment(&a, 1, &x, &n)) > 0; i++) {
        size_t frames = 0;
        slam_recording r = {x, n, NULL, ZERO};
        MUST(n > 0 && a.start == end && a.end > a.start && a.end - a.start <= 1);
        end = a.end;
        for (size_t k = 0; k < n; k++) MUST(isfinite(x[k]));
        MUST(slam_units_encode(t, &r, 1));
        for (size_t k = 0; k < r.units.n; k++) frames += (size_t)r.units.duration[k];
        MUST(frames == r.units.frames && frames > 0);
        slam_units_free(&r.units);
        free(x);
    }
    if (more < 0) MUST(slam_error()[0]);
    resampler **r = a.rate > 0 && a.rate <= 192000 ? &resamplers[a.rate] : NULL; // not kept: all rates are made up
    audio_close(&a);
    if (r && *r) free((*r)->tap), free(*r), *r = NULL;
    return 0;
}
