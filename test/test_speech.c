/* The resampler, MFCC against python_speech_features (fixture made by test/reference.py), k-means, units, and tokenising files. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include <sys/resource.h>
#include "check.h"

/* ---- audio to test with ---- */

static void put16(text *t, unsigned x) {
    const char bytes[2] = {(char)x, (char)(x >> 8)};
    text_add_bytes(t, bytes, 2);
}

static void put32(text *t, unsigned x) {
    put16(t, x);
    put16(t, x >> 16);
}

/* A WAV file of n 16-bit samples. */
static const char *write_wav(const char *name, const float *sample, size_t n, int rate) {
    text t = SLAM_ZERO;
    text_add(&t, "RIFF");
    put32(&t, (unsigned)(36 + 2 * n));
    text_add(&t, "WAVEfmt ");
    put32(&t, 16);
    put32(&t, 1 | 1 << 16);
    put32(&t, (unsigned)rate);
    put32(&t, 2 * (unsigned)rate);
    put32(&t, 2 | 16 << 16);
    text_add(&t, "data");
    put32(&t, (unsigned)(2 * n));
    for (size_t i = 0; i < n; i++) put16(&t, (unsigned)(int)lrintf(32767 * sample[i]));
    const char *path = check_file(name, t.at, t.n);
    text_free(&t);
    return path;
}

/* Something that changes: tones that jump, over noise. */
static float *make_audio(size_t n, int rate, uint64_t seed) {
    float *x = (float *)mem_new(n, sizeof *x);
    double hz = 0;
    for (size_t i = 0; i < n; i++) {
        if (i % ((size_t)rate / 10) == 0) hz = 100 + 2000 * rng_uniform(&seed);
        x[i] = (float)(0.5 * sin(2 * SPEECH_PI * hz * (double)i / rate) + 0.02 * rng_normal(&seed));
    }
    return x;
}

/* ---- resampler ---- */

/* 20 log10 of the amplitude of `hz` in x at 16 kHz, and of all else in it (rms * sqrt 2) */
static void tone_levels(const float *x, int n, double hz, double *tone, double *rest, double *late) {
    double cc = 0, ss = 0, cs = 0, xc = 0, xs = 0, xx = 0;
    for (int k = 0; k < n; k++) {
        const double c = cos(2 * SPEECH_PI * hz * k / 16000), s = sin(2 * SPEECH_PI * hz * k / 16000);
        cc += c * c;
        ss += s * s;
        cs += c * s;
        xc += x[k] * c;
        xs += x[k] * s;
    }
    const double det = cc * ss - cs * cs, a = (xs * cc - xc * cs) / det, b = (xc * ss - xs * cs) / det;
    for (int k = 0; k < n; k++) {
        const double e = x[k] - a * sin(2 * SPEECH_PI * hz * k / 16000) - b * cos(2 * SPEECH_PI * hz * k / 16000);
        xx += e * e;
    }
    *tone = 20 * log10(sqrt(a * a + b * b));
    *rest = 10 * log10(2 * xx / n + 1e-30);
    *late = fabs(atan2(b, a)) / (2 * SPEECH_PI * hz); // seconds
}

/* out = the resampled sine of amplitude 1, without what is near its ends; its first sample stands at time 0 */
static int resampled_sine(const slam_resampler *r, int rate, double hz, float *out) {
    const int n_out = 2000, margin = 400;
    const int before = margin * rate / 16000 / 160 * 160, n = before + (n_out + margin) * (rate / 100) / 160 + 1;
    const uint64_t skip = (uint64_t)before * 16000 / (uint64_t)rate;
    float *in = (float *)mem_new((size_t)n, sizeof *in), *all = (float *)mem_new(slam_resampler_length(r, (size_t)n), sizeof *all);
    for (int i = 0; i < n; i++) in[i] = (float)sin(2 * SPEECH_PI * hz * ((double)i / rate - (double)skip / 16000));
    slam_resample(r, all, in, (size_t)n);
    memcpy(out, all + skip, n_out * sizeof *out);
    free(in);
    free(all);
    return n_out;
}

static void test_resampler(void) {
    static const int rates[] = {8000, 11025, 22050, 44100, 48000, 96000};
    static float out[2000];
    for (int i = 0; i < 6; i++) {
        if (!TEST("resampler: a sine swept at %d Hz", rates[i])) continue;
        slam_resampler *r = slam_resampler_new(rates[i]);
        if (!CHECK(r, "%s", slam_error())) continue;
        const double lower = rates[i] < 16000 ? rates[i] / 2.0 : 8000;
        double ripple = 0, image = -300, alias = -300, late = 0;
        for (double f = 0.01; f < 0.9001; f += 0.01) { // steps, each held long enough to be measured
            double tone, rest, time;
            const int n = resampled_sine(r, rates[i], f * lower, out);
            tone_levels(out, n, f * lower, &tone, &rest, &time);
            ripple = fmax(ripple, fabs(tone));
            image = fmax(image, rest);
            late = fmax(late, time);
        }
        for (double hz = 8000; rates[i] > 16000 && hz < 0.5 * rates[i]; hz += 67) {
            double square = 0;
            const int n = resampled_sine(r, rates[i], hz, out);
            for (int k = 0; k < n; k++) square += (double)out[k] * out[k];
            alias = fmax(alias, 10 * log10(2 * square / n + 1e-30));
        }
        if (getenv("VERBOSE"))
            printf("    %d Hz: ripple %.5f dB, images %.1f dB, aliases %.1f dB, late %.2g s\n", rates[i], ripple, image, alias,
                   late);
        check_near("ripple in dB up to 0.9 of the lower Nyquist", ripple, 0, 0.01);
        check_near("delay in seconds", late, 0, 1e-8);
        CHECK(image <= -100, "images are at %.1f dB, expected below -100", image);
        CHECK(alias <= -100, "aliases are at %.1f dB, expected below -100", alias);
        slam_resampler_free(r);
    }
    if (TEST("resampler: lengths, a constant, 16 kHz as it is")) {
        static const int odd[] = {1000, 7999, 15999, 16000, 16001, 44099, 192000};
        for (int i = 0; i < 7; i++) {
            slam_resampler *r = slam_resampler_new(odd[i]);
            if (!CHECK(r, "%s", slam_error())) continue;
            CHECK(slam_resampler_length(r, 0) == 0 && slam_resampler_length(r, 1) == (size_t)((16000 + odd[i] - 1) / odd[i]),
                  "%d Hz", odd[i]);
            CHECK(slam_resampler_length(r, (size_t)odd[i] * 3) == 48000, "%d Hz", odd[i]);
            const size_t n = (size_t)odd[i], n_out = slam_resampler_length(r, n);
            float *in = (float *)mem_new(n, sizeof *in), *got = (float *)mem_new(n_out, sizeof *got);
            for (size_t k = 0; k < n; k++) in[k] = 0.5f;
            slam_resample(r, got, in, n);
            for (size_t k = n_out / 4; k < 3 * n_out / 4; k += 97) check_near("a constant", got[k], 0.5, 2e-6);
            free(in);
            free(got);
            slam_resampler_free(r);
        }
    }
    if (TEST("resampler: rates that are none")) {
        check_fails(slam_resampler_new(999), "expected 1000 to 768000");
        check_fails(slam_resampler_new(-5), "expected 1000 to 768000");
        check_fails(slam_resampler_new(1000000), "expected 1000 to 768000");
    }
}

/* ---- MFCC ---- */

static void test_mfcc(void) {
    for (int rate = 25; rate <= 50; rate += 25)
        for (int k = 0; k < 2; k++) {
            if (!TEST("mfcc: as python_speech_features, %d frames a second, signal %d", rate, k)) continue;
            slam_speech_settings settings;
            char name[32];
            tensors *fixture = tensors_open("test/fixtures/mfcc.safetensors");
            if (!CHECK(fixture, "%s", slam_error())) return;
            snprintf(name, sizeof name, "signal.%d", k);
            const tensor *signal = tensors_find(fixture, name);
            snprintf(name, sizeof name, "mfcc%d.%d", rate, k);
            const tensor *wanted = tensors_find(fixture, name);
            slam_speech_defaults(&settings);
            settings.rate = rate;
            slam_speech *s = slam_speech_new(&settings, NULL);
            if (CHECK(signal && wanted && s, "the fixture has no %s", name) &&
                CHECK(slam_speech_frames(s, signal->count) == wanted->shape[0], "%zu frames, expected %zu",
                      slam_speech_frames(s, signal->count), wanted->shape[0])) {
                float *x = (float *)mem_new(signal->count, sizeof *x), *got = (float *)mem_new(wanted->count, sizeof *got);
                float *expected = (float *)mem_new(wanted->count, sizeof *expected);
                for (size_t i = 0; i < signal->count; i++) {
                    int16_t v;
                    memcpy(&v, signal->data + 2 * i, 2);
                    x[i] = (float)v / 32768;
                }
                CHECK(tensor_floats(wanted, expected, 0, wanted->count), "%s", slam_error());
                CHECK(slam_speech_features(s, got, x, signal->count), "%s", slam_error());
                for (size_t i = 0; i < wanted->count; i++) check_near(name, got[i], expected[i], 1e-3);
                free(x);
                free(got);
                free(expected);
            }
            slam_speech_free(s);
            tensors_close(fixture);
        }
    if (TEST("mfcc: frames of short, silent and loud audio; --normalize")) {
        slam_speech_settings settings;
        slam_speech_defaults(&settings);
        slam_speech *plain = slam_speech_new(&settings, NULL);
        settings.normalize = 1;
        slam_speech *normal = slam_speech_new(&settings, NULL);
        CHECK(slam_speech_frames(plain, 0) == 0 && slam_speech_frames(plain, 1) == 1 && slam_speech_frames(plain, 1024) == 1 &&
                  slam_speech_frames(plain, 1025) == 2 && slam_speech_frames(plain, 1664) == 2 &&
                  slam_speech_frames(plain, 1665) == 3,
              "frames");
        float zero[3000] = {0}, got[39 * 5], loud[3000], *x = make_audio(3000, 16000, 3);
        CHECK(slam_speech_features(plain, got, zero, 3000), "%s", slam_error());
        check_near("energy of silence", got[0], log(2.220446049250313e-16), 1e-5);
        for (int i = 13; i < 39; i++) check_near("differences in silence", got[i], 0, 0);
        CHECK(slam_speech_features(plain, got, zero, 0), "%s", slam_error());
        float a[39 * 5], b[39 * 5];
        for (int i = 0; i < 3000; i++) loud[i] = 0.25f + 10 * x[i];
        CHECK(slam_speech_features(normal, a, x, 3000) && slam_speech_features(normal, b, loud, 3000), "%s", slam_error());
        check_close("normalised, of another level", a, b, 39 * 4, 1e-4);
        CHECK(slam_speech_features(plain, b, x, 3000) && b[0] != a[0], "normalising changes nothing");
        settings.rate = 30;
        check_fails(slam_speech_new(&settings, NULL), "expected 25 or 50");
        free(x);
        slam_speech_free(plain);
        slam_speech_free(normal);
    }
}

/* ---- k-means ---- */

/* n frames around K places that are far apart; the place of frame i is i % K. */
static float *make_clusters(size_t n, int D, int K, float *place, uint64_t seed) {
    float *x = (float *)mem_new(n * (size_t)D, sizeof *x);
    for (int i = 0; i < K * D; i++) place[i] = (float)(20 * rng_normal(&seed));
    for (size_t i = 0; i < n; i++)
        for (int d = 0; d < D; d++)
            x[i * (size_t)D + (size_t)d] = place[(int)(i % (size_t)K) * D + d] + (float)(0.5 * rng_normal(&seed));
    return x;
}

static void test_kmeans(void) {
    enum { N = 12345, D = 39, K = 37 };
    static float place[K * D], found[K * D], again[K * D];
    slam_kmeans_report r, r2;
    float *x = make_clusters(N, D, K, place, 5);
    if (TEST("k-means: finds clusters that are there")) {
        int taken[K] = {0};
        CHECK(slam_kmeans(x, N, D, K, 1, found, NULL, NULL, &r), "%s", slam_error());
        for (int k = 0; k < K; k++) {
            int nearest = 0;
            for (int i = 0; i < K; i++)
                if (squared_distance(found + k * D, place + i * D, D) < squared_distance(found + k * D, place + nearest * D, D))
                    nearest = i;
            taken[nearest]++;
            check_near("distance of a centroid to its place", sqrt(squared_distance(found + k * D, place + nearest * D, D)), 0,
                       0.4);
        }
        for (int k = 0; k < K; k++) CHECK(taken[k] == 1, "cluster %d has %d centroids", k, taken[k]);
        check_near("inertia", r.inertia, 0.25 * D, 0.2);
        CHECK(r.dead == 0 && r.frames == N && r.passes >= 2, "%d dead, %zu frames, %d passes", r.dead, r.frames, r.passes);
    }
    if (TEST("k-means: the same for any number of threads, another for another seed")) {
        const int threads = threads_count();
        threads_set(1);
        CHECK(slam_kmeans(x, N, D, K, 9, found, NULL, NULL, &r), "%s", slam_error());
        threads_set(5);
        CHECK(slam_kmeans(x, N, D, K, 9, again, NULL, NULL, &r2), "%s", slam_error());
        CHECK(!memcmp(found, again, sizeof found) && r.inertia == r2.inertia, "one thread and five differ");
        CHECK(slam_kmeans(x, N, D, K, 10, again, NULL, NULL, &r2) && memcmp(found, again, sizeof found),
              "seeds 9 and 10 give the same");
        threads_set(threads);
    }
    if (TEST("k-means: fewer different frames than centroids, fewer frames")) {
        float few[60 * 2];
        for (int i = 0; i < 60; i++) few[2 * i] = (float)(i % 3), few[2 * i + 1] = 1;
        CHECK(slam_kmeans(few, 60, 2, 5, 0, found, NULL, NULL, &r), "%s", slam_error());
        CHECK(r.dead == 2 && r.inertia == 0, "%d dead, inertia %g", r.dead, r.inertia);
        check_fails(slam_kmeans(few, 4, 2, 5, 0, found, NULL, NULL, &r), "4 frames are fewer than the 5 centroids");
        few[7] = NAN;
        check_fails(slam_kmeans(few, 60, 2, 5, 0, found, NULL, NULL, &r), "frame 3 holds a number that is not finite");
    }
    if (TEST("k-means: a centroid without frames is put onto a far one")) {
        kmeans_fit f = SLAM_ZERO;
        float points[] = {0, 1, 2, 100}, centroid[] = {1, 50, 1000}, distance[4], lanes[16];
        size_t order[4], count[3], first[4];
        int unit[4];
        f.x = points;
        f.n = 4;
        f.D = 1;
        f.K = 3;
        f.centroid = centroid;
        f.lanes = lanes;
        f.order = order;
        f.unit = unit;
        f.distance = distance;
        f.count = count;
        f.first = first;
        double inertia;
        CHECK(fit_assign(&f, &inertia) && inertia == 2502 / 4., "mean squared distance");
        CHECK(fit_update(&f) == 1, "no centroid was moved");
        CHECK(centroid[0] == 1 && centroid[1] == 100 && centroid[2] == 100, "%g %g %g", (double)centroid[0], (double)centroid[1],
              (double)centroid[2]);
    }
    free(x);
}

static void test_resampler_without_table(void) {
    if (TEST("resampler: a rate whose taps are too many to be kept")) {
        float *x = make_audio(30000, 44100, 5), a[11000], b[11000];
        slam_resampler *r = slam_resampler_new(44100);
        const size_t n = slam_resampler_length(r, 30000);
        slam_resample(r, a, x, 30000);
        free(r->tap);
        r->tap = NULL;
        slam_resample(r, b, x, 30000);
        CHECK(!memcmp(a, b, n * sizeof *a), "with a table and without one differ");
        slam_resampler_free(r);
        r = slam_resampler_new(767999);
        CHECK(r && !r->tap && r->taps <= RESAMPLER_LONGEST, "%d taps", r ? r->taps : 0);
        slam_resample(r, b, x, 30000);
        slam_resampler_free(r);
        free(x);
    }
}

/* The ends of a signal are as if zeros lay before and after it. A second of zeros is a whole number of inputs and outputs. */
static void test_resampler_ends(void) {
    static const int rates[] = {8000, 11025, 44100, 47999, 48000, 96000}, lengths[] = {1, 2, 40, 1234, 5000};
    for (int i = 0; i < 6; i++) {
        if (!TEST("resampler: the first and last outputs at %d Hz", rates[i])) continue;
        const size_t rate = (size_t)rates[i];
        slam_resampler *r = slam_resampler_new(rates[i]);
        for (int k = 0; CHECK(r, "%s", slam_error()) && k < 5; k++) {
            const size_t n = (size_t)lengths[k], n_out = slam_resampler_length(r, n), padded = n + 2 * rate;
            uint64_t seed = 61;
            float *in = (float *)mem_new(padded, sizeof *in),
                  *all = (float *)mem_new(slam_resampler_length(r, padded), sizeof *all),
                  *out = (float *)mem_new(n_out, sizeof *out);
            for (size_t t = 0; t < n; t++) in[rate + t] = (float)rng_normal(&seed);
            slam_resample(r, all, in, padded);
            slam_resample(r, out, in + rate, n);
            for (size_t t = 0; t < n_out; t++) check_near("an output", out[t], all[16000 + t], 3e-6);
            free(in), free(all), free(out);
        }
        slam_resampler_free(r);
    }
}

/* The sample of frames for k-means: of ten times as many frames that are numbered, each is kept with probability 1/10. */
static void test_frame_sample(void) {
    if (!TEST("k-means: the sample of frames is uniform")) return;
    enum { SEEN = 20000, KEPT = 2000 };
    static float frames[SEEN][2];
    static char kept[SEEN];
    reservoir r = SLAM_ZERO;
    uint64_t seed = 67;
    double sum = 0;
    int tenth[10] = {0};
    for (int i = 0; i < SEEN; i++) frames[i][0] = (float)i, frames[i][1] = (float)-i;
    memset(kept, 0, sizeof kept);
    r.most = KEPT;
    r.state = 3;
    for (size_t at = 0, n; at < SEEN; at += n) { // clips of up to 300 frames
        n = 1 + (size_t)rng_below(&seed, 300);
        if (n > SEEN - at) n = SEEN - at;
        CHECK(reservoir_add(&r, frames[at], n, 2), "%s", slam_error());
    }
    CHECK(r.n == KEPT && r.seen == SEEN, "%zu frames of %zu", r.n, (size_t)r.seen);
    for (size_t i = 0; i < r.n; i++) {
        const int number = (int)r.frame[2 * i];
        if (!CHECK(number >= 0 && number < SEEN && r.frame[2 * i + 1] == (float)-number, "frame %d is torn", number)) continue;
        CHECK(!kept[number]++, "frame %d is there twice", number);
        tenth[number * 10 / SEEN]++;
        sum += number;
    }
    check_near("mean number over the middle one", sum / KEPT / ((SEEN - 1) / 2.0), 1, 0.05);         // deviation 0.012
    for (int i = 0; i < 10; i++) check_near("share of a tenth", tenth[i] / (double)KEPT, 0.1, 0.03); // deviation 0.0064
    free(r.frame);
}

/* ---- the quantiser ---- */

static slam_quantiser *make_quantiser(int rate, int dedup, int K, uint64_t seed) {
    slam_speech_settings s;
    float *centroids = (float *)mem_new((size_t)K * 39, sizeof *centroids);
    for (int i = 0; i < K * 39; i++) centroids[i] = (float)(i % 39 ? 5 * rng_normal(&seed) : -10 * rng_uniform(&seed));
    slam_speech_defaults(&s);
    s.rate = rate;
    s.dedup = dedup;
    slam_quantiser *q = slam_quantiser_new(&s, NULL, centroids, K);
    free(centroids);
    return q;
}

static void test_quantiser(void) {
    if (TEST("units: the nearest centroid, the first of those that tie")) {
        static float centroids[70 * 39], x[39 * 50];
        slam_speech_settings s;
        uint64_t seed = 3;
        int unit[50];
        float distance[50];
        for (int i = 0; i < 70 * 39; i++) centroids[i] = (float)(int)(4 * rng_normal(&seed));
        for (int d = 0; d < 39; d++) centroids[66 * 39 + d] = centroids[5 * 39 + d]; // the same place twice
        for (int i = 0; i < 50 * 39; i++) x[i] = i < 39 ? centroids[5 * 39 + i] : (float)(int)(4 * rng_normal(&seed));
        slam_speech_defaults(&s);
        slam_quantiser *q = slam_quantiser_new(&s, NULL, centroids, 70);
        slam_quantiser_nearest(q, x, 50, unit, distance);
        CHECK(unit[0] == 5 && distance[0] == 0, "unit %d at %g, expected 5 at 0", unit[0], (double)distance[0]);
        for (int i = 0; i < 50; i++) {
            int nearest = 0;
            for (int k = 1; k < 70; k++)
                if (squared_distance(x + 39 * i, centroids + 39 * k, 39) <
                    squared_distance(x + 39 * i, centroids + 39 * nearest, 39))
                    nearest = k;
            CHECK(unit[i] == nearest, "frame %d: %d, expected %d", i, unit[i], nearest);
        }
        slam_quantiser_free(q);
    }
    if (TEST("units: repeats become one with a duration")) {
        int unit[] = {4, 4, 4, 1, 4, 4, 0}, duration[7], same[] = {4, 4, 1};
        const int units[] = {4, 1, 4, 0}, durations[] = {3, 1, 2, 1};
        CHECK(units_merge(unit, duration, 7, 1) == 4 && !memcmp(unit, units, sizeof units) &&
                  !memcmp(duration, durations, sizeof durations),
              "merged");
        CHECK(units_merge(same, duration, 3, 0) == 3 && same[1] == 4 && duration[0] == 1, "kept apart");
        CHECK(units_merge(same, duration, 0, 1) == 0, "none");
    }
    if (TEST("quantiser: the fingerprint is that of settings and centroids")) {
        slam_quantiser *a = make_quantiser(25, 1, 20, 1), *b = make_quantiser(50, 1, 20, 1), *c = make_quantiser(25, 0, 20, 1),
                       *d = make_quantiser(25, 1, 20, 2), *e = make_quantiser(25, 1, 19, 1), *f = make_quantiser(25, 1, 20, 1);
        const uint32_t mark = slam_quantiser_fingerprint(a);
        CHECK(mark && mark == slam_quantiser_fingerprint(f), "two alike differ");
        CHECK(mark != slam_quantiser_fingerprint(b) && mark != slam_quantiser_fingerprint(c) &&
                  mark != slam_quantiser_fingerprint(d) && mark != slam_quantiser_fingerprint(e),
              "two that differ are alike");
        slam_quantiser *const all[] = {a, b, c, d, e, f};
        for (int i = 0; i < 6; i++) slam_quantiser_free(all[i]);
    }
    if (TEST("quantiser: km.npy and km.json")) {
        slam_speech_settings other;
        slam_quantiser *q = make_quantiser(50, 0, 20, 1), *back;
        char *path = text_copy(check_path("km.npy"));
        const char *json_path;
        slam_speech_defaults(&other);
        CHECK(slam_quantiser_save(q, path, NULL), "%s", slam_error());
        if (CHECK(back = slam_quantiser_open(path, &other, NULL), "%s", slam_error())) {
            CHECK(slam_quantiser_fingerprint(back) == slam_quantiser_fingerprint(q) && slam_quantiser_settings(back)->rate == 50 &&
                      !slam_quantiser_settings(back)->dedup && slam_quantiser_count(back) == 20,
                  "what was read is not what was written");
            slam_quantiser_free(back);
        }
        static const char *const damaged[][2] = {
            {"{\"features\": \"whisper\"}", "'features' is \"whisper\""},
            {"{\"features\": \"hubert\", \"hubert\": \"none\"}", "HuBERT needs a device"},
            {"{\"features\": \"mfcc\", \"rate\": 30}", "'rate' is 30"},
            {"{\"features\": \"mfcc\", \"rate\": 25, \"normalize\": 3}", "expected true or false"},
            {"{\"features\": \"mfcc\", \"fingerprint\": 5}", "do not belong together"},
            {"{\"features\": ", "km.json"},
            {"[]", "'features' is \"\""}};
        for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
            check_file("km.json", damaged[i][0], strlen(damaged[i][0]));
            check_fails(slam_quantiser_open(path, &other, NULL), damaged[i][1]);
        }
        json_path = check_path("km.json");
        unlink(json_path);
        other.rate = 25;
        if (CHECK(back = slam_quantiser_open(path, &other, NULL), "%s", slam_error()))
            CHECK(slam_quantiser_settings(back)->rate == 25, "the caller's settings");
        slam_quantiser_free(back);
        float wrong[12] = {0};
        CHECK(npy_write(path, wrong, 3, 4), "%s", slam_error());
        check_fails(slam_quantiser_open(path, &other, NULL), "has shape (3, 4)");
        slam_quantiser_free(q);
        free(path);
    }
    if (TEST("units: of a sample, of silence, of a file at another rate")) {
        slam_quantiser *q = make_quantiser(25, 1, 20, 1);
        slam_units u;
        float one = 0.5f, zero[20000] = {0};
        CHECK(slam_quantiser_units(q, &one, 1, &u) && u.n == 1 && u.duration[0] == 1 && u.frames == 1, "of one sample");
        slam_units_free(&u);
        CHECK(slam_quantiser_units(q, zero, 20000, &u) && u.n == 1 && (size_t)u.duration[0] == u.frames, "%zu units of silence",
              u.n);
        slam_units_free(&u);
        CHECK(slam_quantiser_units(q, zero, 0, &u) && u.n == 0, "of nothing");
        slam_units_free(&u);
        float *x = make_audio(22050, 22050, 8);
        CHECK(slam_quantiser_file(q, write_wav("a.wav", x, 22050, 22050), &u) && u.samples == 16000 && u.frames == 25,
              "%zu samples", u.samples);
        slam_units_free(&u);
        check_fails(slam_quantiser_file(q, write_wav("empty.wav", x, 0, 16000), &u), "it holds no audio");
        check_fails(slam_quantiser_file(q, write_wav("slow.wav", x, 10, 500), &u), "500 samples a second");
        check_fails(slam_quantiser_file(q, check_path("none.wav"), &u), "cannot be opened");
        free(x);
        slam_quantiser_free(q);
    }
}

/* ---- files ---- */

/* Thirty files in a folder with others below it, three of them unusable; listed in the order of their names. */
static void make_folder(slam_list *files) {
    char name[64];
    char folder[1024];
    const char *const argument = folder;
    snprintf(folder, sizeof folder, "%s", check_path("audio"));
    mkdir(folder, 0777);
    mkdir(check_path("audio/b"), 0777);
    mkdir(check_path("audio/b/c"), 0777);
    for (int i = 0; i < 30; i++) {
        const size_t n = 3000 + 1700 * (size_t)(i % 7);
        float *x = make_audio(n, 8000, (uint64_t)i);
        snprintf(name, sizeof name, "audio/%s%02d.%s", i % 3 == 1 ? "b/" : i % 3 == 2 ? "b/c/" : "", i, i % 5 ? "wav" : "WAV");
        if (i % 11 == 10) check_file(name, "RIFF", 4);
        else write_wav(name, x, i == 4 ? 0 : n, i % 2 ? 8000 : 16000);
        free(x);
    }
    check_file("audio/notes.txt", "none", 4);
    if (mkfifo(check_path("audio/pipe.wav"), 0666) != 0) CHECK(0, "no pipe"); // which must not be opened: nothing comes out of it
    if (symlink("..", check_path("audio/b/up")) != 0 || symlink("b", check_path("audio/z")) != 0) CHECK(0, "no links");
    CHECK(slam_audio_list(files, &argument, 1), "%s", slam_error());
}

typedef struct stopping {
    size_t after, failed;
} stopping;

static int stop_after(void *context, const slam_speech_progress *p) {
    stopping *s = (stopping *)context;
    s->failed += p->failed != NULL;
    return p->failed || p->done < s->after;
}

static text read_file(const char *path) {
    text t = SLAM_ZERO;
    file_map map;
    if (!CHECK(map_open(&map, path), "%s", slam_error())) return t;
    text_add_bytes(&t, (const char *)map.data, map.size);
    map_close(&map);
    return t;
}

static void check_same_file(const char *a, const char *b) {
    text ta = read_file(a), tb = read_file(b);
    CHECK(ta.n == tb.n && ta.n > 0 && !memcmp(ta.at, tb.at, ta.n), "%s (%zu bytes) and %s (%zu) differ", a, ta.n, b, tb.n);
    text_free(&ta);
    text_free(&tb);
}

/* slam_tokenize of audio files. */
static int tokenize(const slam_quantiser *q, const slam_list *files, const char *out, int audio_repr, uint64_t shard_tokens,
                    slam_speech_watch *watch, void *context, slam_tokenize_report *r) {
    slam_sources *s = slam_sources_audio(files, 60);
    const int ok = s && slam_tokenize(q, s, out, audio_repr, shard_tokens, watch, context, r);
    slam_sources_free(s);
    return ok;
}

static void test_files(void) {
    slam_list files = SLAM_ZERO, list = SLAM_ZERO;
    slam_quantiser *q = make_quantiser(25, 1, 20, 1);
    stopping never = {SIZE_MAX, 0};
    slam_tokenize_report r, r2;
    make_folder(&files);
    if (TEST("files: folders in order, links, manifests")) {
        /* audio (10), audio/b (10), audio/b/c (10), and again by the link audio/z, in which up leads to what is above */
        CHECK(files.n == 50, "%zu files, expected 50", files.n);
        for (size_t i = 1; i < 10; i++)
            CHECK(strcmp(files.at[i - 1], files.at[i]) < 0, "%s after %s", files.at[i], files.at[i - 1]);
        text manifest = SLAM_ZERO;
        text_add(&manifest, "%s\r\n\n%s\n%s", files.at[0], check_path("audio/b/c"), files.at[3]);
        char at[1100];
        snprintf(at, sizeof at, "@%s", check_file("list.txt", manifest.at, manifest.n));
        const char *argument = at;
        CHECK(slam_audio_list(&list, &argument, 1) && list.n == 12 && !strcmp(list.at[11], files.at[3]), "%zu files: %s", list.n,
              slam_error());
        argument = "@/none";
        check_fails(slam_audio_list(&list, &argument, 1), "/none: cannot be opened");
        text_free(&manifest);
        slam_list_free(&list);
    }
    if (TEST("tokenize: OUT.bin is the files' units in order, for any number of threads")) {
        const int threads = threads_count();
        threads_set(1);
        char *one = text_copy(check_path("one.bin")), *five = text_copy(check_path("five.bin"));
        CHECK(tokenize(q, &files, one, 0, 1000000, stop_after, &never, &r), "%s", slam_error());
        threads_set(5);
        CHECK(tokenize(q, &files, five, 0, 1000000, NULL, NULL, &r2), "%s", slam_error());
        threads_set(threads);
        check_same_file(one, five);
        CHECK(r.files == files.n && r.failed == 5 && never.failed == 5 && r.shards == 1 && !memcmp(&r, &r2, sizeof r),
              "%zu files, %zu failed", r.files, r.failed);
        shard s;
        if (CHECK(shard_open(&s, one), "%s", slam_error())) {
            CHECK(s.V == 22 && s.fingerprint == slam_quantiser_fingerprint(q) && s.n == r.tokens &&
                      s.n == r.units + 2 * (files.n - 5),
                  "header");
            size_t t = 0;
            for (size_t i = 0; i < files.n; i++) {
                slam_units u;
                if (!slam_quantiser_file(q, files.at[i], &u)) continue;
                CHECK(t + u.n + 2 <= s.n && s.tokens[t] == 1 && s.tokens[t + u.n + 1] == 1, "%s begins at token %zu", files.at[i],
                      t);
                for (size_t k = 0; k < u.n && t + u.n + 2 <= s.n; k++)
                    CHECK(s.tokens[t + 1 + k] == u.unit[k] + 2, "%s: unit %zu", files.at[i], k);
                t += u.n + 2;
                slam_units_free(&u);
            }
            shard_close(&s);
        }
        text failed = read_file(check_path("one.bin.failed"));
        size_t lines = 0;
        for (size_t i = 0; i < failed.n; i++) lines += failed.at[i] == '\n';
        CHECK(lines == 5 && strstr(failed.at, "10.WAV") && strstr(failed.at, "04.wav"), "%zu lines: %s", lines, failed.at);
        CHECK(!path_is_file(check_path("one.bin.partial")) && !path_is_file(check_path("one.bin.journal")),
              "something is left over");
        check_fails(tokenize(q, &files, one, 0, 1000000, NULL, NULL, &r2), "exists already");
        text_free(&failed);
        free(one);
        free(five);
    }
    for (int kind = 0; kind < 3; kind++) {
        if (!TEST("tokenize: stopped again and again, then to the end: %s", kind == 0   ? "OUT.bin in shards"
                                                                            : kind == 1 ? "OUT.jsonl"
                                                                                        : "audio_repr"))
            continue;
        const uint64_t most = 120;
        char *whole = text_copy(check_path(kind ? "whole.jsonl" : "whole.bin")),
             *parts = text_copy(check_path(kind ? "parts.jsonl" : "parts.bin"));
        int stops = 0;
        CHECK(tokenize(q, &files, whole, kind == 2, most, NULL, NULL, &r), "%s", slam_error());
        for (r2.stopped = 1; r2.stopped && stops < 60; stops++) {
            stopping soon = {0, 0};
            if (!CHECK(tokenize(q, &files, parts, kind == 2, most, stop_after, &soon, &r2), "%s", slam_error())) break;
            if (stops == 1 && r2.stopped) { // what a kill leaves: more than the journal counts
                FILE *f = fopen(check_path(kind ? "parts.jsonl.partial" : "parts.bin.partial"), "ab");
                CHECK(f && fputs("half a docum", f) >= 0 && fclose(f) == 0, "write");
                slam_list fewer = files;
                fewer.n--;
                check_fails(tokenize(q, &fewer, parts, kind == 2, most, NULL, NULL, &r2), "other files or settings");
                r2.stopped = 1;
            }
        }
        CHECK(stops > 3, "stopped %d times", stops);
        r2.earlier = 0;
        CHECK(!memcmp(&r, &r2, sizeof r), "the reports differ");
        check_same_file(whole, parts);
        check_same_file(check_path(kind ? "whole.jsonl.failed" : "whole.bin.failed"),
                        check_path(kind ? "parts.jsonl.failed" : "parts.bin.failed"));
        if (kind == 0) {
            CHECK(r.shards > 3, "%d shards", r.shards);
            for (int i = 1; i < r.shards; i++) {
                char a[32], b[32];
                shard s;
                snprintf(a, sizeof a, "whole-%05d.bin", i);
                snprintf(b, sizeof b, "parts-%05d.bin", i);
                check_same_file(check_path(a), check_path(b));
                if (!CHECK(shard_open(&s, check_path(a)), "%s", slam_error())) continue;
                CHECK(s.n <= most && s.tokens[0] == 1 && s.tokens[s.n - 1] == 1, "shard %d of %zu tokens", i, s.n);
                shard_close(&s);
            }
        } else {
            units_reader reader;
            units u = SLAM_ZERO;
            size_t n = 0;
            int more = units_open(&reader, whole);
            while (more == 1 && (more = units_next(&reader, &u)) == 1) n += u.n;
            CHECK(more == 0 && n == r.units, "%zu units of %zu: %s", n, (size_t)r.units, slam_error());
            units_free(&u);
            units_close(&reader);
        }
        unlink(whole);
        unlink(parts);
        free(whole);
        free(parts);
    }
    if (TEST("tokenize: two processes, a name that is taken, a journal that is wrong")) {
        const char *out = check_path("two.bin");
        corpus other = SLAM_ZERO;
        other.out = out;
        other.want = WANT_TOKENS;
        other.quantiser = q;
        other.shard_tokens = 100;
        other.report = &r;
        memset(&r, 0, sizeof r);
        slam_sources *sources = slam_sources_audio(&files, 60);
        CHECK(corpus_begin(&other, sources), "%s", slam_error());
        check_fails(tokenize(q, &files, out, 0, 100, NULL, NULL, &r2), "another process is at work on it");
        corpus_end(&other, 1);
        slam_sources_free(sources);
        text journal = read_file(check_path("two.bin.journal"));
        char *bytes = strstr(journal.at, "\"bytes\": 0"), *left = strstr(journal.at, "\"failed\": 0");
        if (CHECK(bytes && left, "%s", journal.at)) {
            bytes[9] = '3';
            check_file("two.bin.journal", journal.at, journal.n);
            check_fails(tokenize(q, &files, out, 0, 100, NULL, NULL, &r2), "counts 3 bytes of tokens");
            bytes[9] = '0';
            left[10] = '1';
            check_file("two.bin.journal", journal.at, journal.n);
            check_fails(tokenize(q, &files, out, 0, 100, NULL, NULL, &r2), "counts 1 failed files of 0");
        }
        text_free(&journal);
        check_file("taken.bin", "mine", 4);
        check_fails(tokenize(q, &files, check_path("taken.bin"), 0, 100, NULL, NULL, &r2), "taken.bin: exists already");
        CHECK(!path_is_file(check_path("taken.bin.partial")) && !path_is_file(check_path("taken.bin.journal")), "left over");
        check_fails(slam_tokenize_may("/none/out.bin"), "/none/out.bin: cannot be written");
    }
    if (TEST("tokenize: nothing usable, a folder that is not there")) {
        slam_list none = SLAM_ZERO;
        slam_list_add(&none, "/none/a.wav");
        check_fails(tokenize(q, &none, check_path("none.bin"), 0, 100, NULL, NULL, &r),
                    "none of the 1 files or lines could be used");
        CHECK(!path_is_file(check_path("none.bin")) && path_is_file(check_path("none.bin.failed")), "files");
        check_fails(tokenize(q, &files, "/none/out.bin", 0, 100, NULL, NULL, &r), "/none/out.bin");
        check_fails(tokenize(q, &files, check_path("out.txt"), 0, 100, NULL, NULL, &r), "ends in .bin or .jsonl");
        slam_list_free(&none);
    }
    if (TEST("fit: from files, with fewer frames than they hold, for any number of threads")) {
        slam_speech_settings settings;
        slam_kmeans_report a, b;
        slam_sources *sources = slam_sources_audio(&files, 60);
        const int threads = threads_count();
        slam_speech_defaults(&settings);
        threads_set(1);
        slam_quantiser *first = slam_quantiser_fit(&settings, NULL, sources, 8, 100, 4, NULL, NULL, &a);
        threads_set(3);
        slam_quantiser *second = slam_quantiser_fit(&settings, NULL, sources, 8, 100, 4, stop_after, &never, &b);
        threads_set(threads);
        if (CHECK(first && second, "%s", slam_error())) {
            CHECK(slam_quantiser_fingerprint(first) == slam_quantiser_fingerprint(second), "one thread and three differ");
            CHECK(a.frames == 100 && a.inertia == b.inertia, "%zu frames", a.frames);
        }
        slam_quantiser_free(first);
        slam_quantiser_free(second);
        /* the files hold more than 8 x 10 frames: where listening ends must not hang on how long the blocks are */
        uint32_t mark[3];
        for (int i = 0; i < 3; i++) {
            threads_set(i + 1);
            slam_quantiser *few = slam_quantiser_fit(&settings, NULL, sources, 8, 10, 4, NULL, NULL, &a);
            mark[i] = CHECK(few, "%s", slam_error()) ? slam_quantiser_fingerprint(few) : (uint32_t)i;
            slam_quantiser_free(few);
        }
        threads_set(threads);
        CHECK(mark[0] == mark[1] && mark[0] == mark[2], "fits of less than all files differ");
        check_fails(slam_quantiser_may_fit("/none/km.npy", &settings, sources, 8, 10, 4), "/none/km.npy: cannot be written");
        const char *path = check_path("fit.npy");
        CHECK(slam_quantiser_may_fit(path, &settings, sources, 8, 10, 4) == 1, "%s", slam_error());
        slam_quantiser *few = slam_quantiser_fit(&settings, NULL, sources, 8, 10, 4, NULL, NULL, &a);
        CHECK(slam_quantiser_save(few, path, &a) && slam_quantiser_may_fit(path, &settings, sources, 8, 10, 4) == 2, "made");
        check_fails(slam_quantiser_may_fit(path, &settings, sources, 8, 10, 5), "fit.npy: exists already");
        unlink(path); // what a kill between the two files leaves
        CHECK(slam_quantiser_may_fit(path, &settings, sources, 8, 10, 4) == 1, "%s", slam_error());
        check_fails(slam_quantiser_may_fit(path, &settings, sources, 8, 10, 5), "fit.json: exists already");
        slam_quantiser_free(few);
        check_fails(slam_quantiser_fit(&settings, NULL, sources, 5000, 100000, 4, NULL, NULL, &a), "fewer than the 5000 centroids");
        slam_sources_free(sources);
    }
    slam_list_free(&files);
    slam_quantiser_free(q);
}

/* ---- audio files of other formats ---- */

#ifdef SLAM_SNDFILE
/* n mono samples as a file of another format. */
static const char *write_sound(const char *name, int format, const float *sample, size_t n, int rate) {
    SF_INFO info;
    memset(&info, 0, sizeof info);
    info.channels = 1;
    info.samplerate = rate;
    info.format = format;
    const char *path = check_path(name);
    SNDFILE *f = sf_open(path, SFM_WRITE, &info);
    if (!f) return NULL;                         // this libsndfile does not write it
    for (size_t i = 0, step; i < n; i += step) { // some encoders do not stand a long write
        step = n - i < 1000 ? n - i : 1000;
        sf_write_float(f, sample + i, (sf_count_t)step);
    }
    sf_close(f);
    return path;
}

static void test_formats(void) {
    static const struct {
        const char *name;
        int format, rate, exact;
    } kinds[] = {{"a.flac", SF_FORMAT_FLAC | SF_FORMAT_PCM_16, 22050, 1},
                 {"a.aiff", SF_FORMAT_AIFF | SF_FORMAT_PCM_16, 16000, 1},
                 {"a.ogg", SF_FORMAT_OGG | SF_FORMAT_VORBIS, 44100, 0},
                 {"a.opus", SF_FORMAT_OGG | 0x0064, 48000, 0},
                 {"a.mp3", 0x230000 | 0x0082, 44100, 0}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        if (!TEST("audio: %s", kinds[k].name)) continue;
        const int rate = kinds[k].rate;
        const size_t n = (size_t)rate * 3;
        float *x = make_audio(n, rate, k);
        char *path = NULL;
        decoder d = SLAM_ZERO;
        audio_parts p, q;
        const char *written = write_sound(kinds[k].name, kinds[k].format, x, n, rate);
        if (!written) {
            printf("skip %s: this libsndfile does not write it\n", kinds[k].name);
            free(x);
            continue;
        }
        path = text_copy(written);
        const char *wav = write_wav("same.wav", x, n, rate);
        if (CHECK(parts_open(&p, &d, path, 0) && parts_next(&p) == 1, "%s", slam_error()) &&
            CHECK(parts_open(&q, &d, wav, 0) && parts_next(&q) == 1, "%s", slam_error())) {
            CHECK(p.from.rate == rate && p.n + 3000 > n && p.n < n + 3000, "%zu frames, expected about %zu", p.n, n);
            if (kinds[k].exact) CHECK(p.n == n && !memcmp(p.frame, q.frame, n * sizeof *x), "not the frames of the WAV file");
            CHECK(parts_next(&p) == 0 && parts_next(&q) == 0, "no end");
            parts_close(&q);
        }
        parts_close(&p);
        if (k == 0) { // what a download that broke off leaves, and what a bad disk does
            text bytes = read_file(path);
            slam_quantiser *quantiser = make_quantiser(25, 1, 5, 1);
            slam_units u;
            uint64_t state = 5;
            check_fails(slam_quantiser_file(quantiser, check_file("short.flac", bytes.at, bytes.n / 2), &u), "short.flac: ");
            check_fails(slam_quantiser_file(quantiser, check_file("head.flac", bytes.at, 40), &u), "head.flac: ");
            for (int i = 0; i < 100; i++) {
                for (int j = 0; j < 4; j++) bytes.at[rng_below(&state, i % 2 ? bytes.n : 200)] = (char)rng_next(&state);
                if (slam_quantiser_file(quantiser, check_file("bad.flac", bytes.at, bytes.n), &u)) slam_units_free(&u);
            }
            slam_quantiser_free(quantiser);
            text_free(&bytes);
        }
        decoder_close(&d);
        free(path);
        free(x);
    }
    if (TEST("audio: nothing that is known")) {
        sound s;
        check_fails(sound_open(&s, check_file("x.mp3", "none of the formats", 19)), "x.mp3: not a WAV file: libsndfile: ");
    }
}
#else
static void test_formats(void) {
    if (TEST("audio: what libsndfile would read")) {
        sound s;
        check_fails(sound_open(&s, check_file("x.flac", "fLaC....", 8)),
                    "is FLAC, and this program reads WAV alone: install libsndfile1-dev");
        check_fails(sound_open(&s, check_file("x.mp3", "\xff\xfb..", 4)), "is MP3");
        check_fails(sound_open(&s, check_file("x.ogg", "none", 4)), "x.ogg: not a WAV file");
    }
}
#endif

/* ---- long files ---- */

static void test_memory(void) {
#if !defined __SANITIZE_ADDRESS__ && defined __linux__
    if (TEST("parts: memory does not grow with the file")) {
        enum { RATE = 16000, SECONDS = 1800 };
        struct rusage before, after;
        float none = 0;
        slam_quantiser *q = make_quantiser(25, 1, 20, 1);
        slam_list files = SLAM_ZERO;
        slam_tokenize_report r;
        unsigned char size[4];
        const unsigned bytes = 2 * RATE * SECONDS;
        char *path = text_copy(write_wav("long.wav", &none, 1, RATE));
        for (int i = 0; i < 4; i++) size[i] = (unsigned char)(bytes >> 8 * i);
        const int fd = open(path, O_RDWR);
        CHECK(fd >= 0 && pwrite(fd, size, 4, 40) == 4 && ftruncate(fd, 44 + (off_t)bytes) == 0, "a long file");
        close(fd);
        slam_list_add(&files, path);
        getrusage(RUSAGE_SELF, &before);
        CHECK(tokenize(q, &files, check_path("long.jsonl"), 0, 1000, NULL, NULL, &r), "%s", slam_error());
        getrusage(RUSAGE_SELF, &after);
        CHECK(r.samples == RATE * SECONDS && r.documents > 30 && r.documents < 40, "%zu documents", r.documents);
        check_near("MB that it took", (double)(after.ru_maxrss - before.ru_maxrss) / 1024, 0, 40);
        unlink(path);
        slam_list_free(&files);
        slam_quantiser_free(q);
        free(path);
    }
#endif
}

static void test_parts(void) {
    enum { RATE = 8000, N = 47 * RATE };
    float *x = make_audio(N, RATE, 3);
    slam_quantiser *q = make_quantiser(25, 1, 20, 1);
    slam_list files = SLAM_ZERO;
    slam_tokenize_report r;
    for (int k = 0; k < 100; k++) { // near 8.4 s and 16.9 s it is quiet, and nowhere else
        x[(size_t)(8.4 * RATE) + (size_t)k * 4] = 0;
        for (int j = 0; j < 4; j++)
            x[(size_t)(8.4 * RATE) + (size_t)k * 4 + (size_t)j] = x[(size_t)(16.9 * RATE) + (size_t)k * 4 + (size_t)j] = 0;
    }
    slam_list_add(&files, write_wav("parts.wav", x, N, RATE));
    if (TEST("parts: cut where it is quiet, each as a file of its own")) {
        slam_sources *s = slam_sources_audio(&files, 10);
        units_reader reader;
        units u = SLAM_ZERO;
        double end = 0;
        int n = 0;
        CHECK(slam_tokenize(q, s, check_path("parts10.jsonl"), 0, 1000, NULL, NULL, &r), "%s", slam_error());
        CHECK(units_open(&reader, check_path("parts10.jsonl")), "%s", slam_error());
        for (; units_next(&reader, &u) == 1; n++) {
            slam_units alone;
            const size_t from = (size_t)(u.start * RATE + 0.5), to = (size_t)(u.end * RATE + 0.5);
            CHECK(u.start == end && u.end - u.start <= 10 && !strcmp(u.name, files.at[0]), "part %d from %g to %g", n, u.start,
                  u.end);
            if (n < 2) check_near("the cut", u.end, n ? 16.925 : 8.425, 0.02);
            end = u.end;
            if (!CHECK(slam_quantiser_file(q, write_wav("one.wav", x + from, to - from, RATE), &alone), "%s", slam_error())) break;
            CHECK(alone.n == u.n && !memcmp(alone.unit, u.unit, u.n * sizeof *u.unit) &&
                      !memcmp(alone.duration, u.duration, u.n * sizeof *u.unit),
                  "part %d is not what a file of its own would be", n);
            slam_units_free(&alone);
        }
        CHECK(end == 47 && n == 6 && r.documents == 6 && r.files == 1, "%d parts, %zu documents, up to %g s", n, r.documents, end);
        units_close(&reader);
        units_free(&u);
        CHECK(slam_tokenize(q, s, check_path("parts10.bin"), 0, 100, NULL, NULL, &r) && r.shards > 2, "%d shards: %s", r.shards,
              slam_error());
        slam_sources_free(s);
    }
    if (TEST("parts: the whole where it is no longer than the limit")) {
        for (int limit = 0; limit <= 47; limit += 47) {
            slam_sources *s = slam_sources_audio(&files, limit);
            const char *path = check_path(limit ? "whole47.jsonl" : "whole0.jsonl");
            CHECK(slam_tokenize(q, s, path, 0, 1000, NULL, NULL, &r) && r.documents == 1, "%s", slam_error());
            text t = read_file(path);
            CHECK(t.n && !strstr(t.at, "\"start\""), "a part");
            text_free(&t);
            slam_sources_free(s);
        }
    }
    slam_list_free(&files);
    slam_quantiser_free(q);
    free(x);
}

/* ---- other sources ---- */

static void test_commands(void) {
    if (TEST("commands: arguments, and words in them")) {
        slam_list a = SLAM_ZERO;
        CHECK(command_split(&a, " say  -v 'a b' \"c \\\" \\d\" e\\ f'g'  x{text}y{text} ") && a.n == 6, "%zu: %s", a.n,
              slam_error());
        static const char *const wanted[] = {"say", "-v", "a b", "c \" \\d", "e fg", "x{text}y{text}"};
        for (size_t i = 0; i < 6 && i < a.n; i++) CHECK(!strcmp(a.at[i], wanted[i]), "%zu is '%s'", i, a.at[i]);
        char *word = command_argument("x{text}y{text}", "$(ls) '"), *flag = command_argument("{text}", "-w x"),
             *other = command_argument("{tex", "-");
        CHECK(!strcmp(word, "x$(ls) 'y$(ls) '") && !strcmp(flag, " -w x") && !strcmp(other, "{tex"), "%s %s %s", word, flag, other);
        free(word);
        free(flag);
        free(other);
        slam_list_free(&a);
        check_fails(command_split(&a, "say 'no end {text}"), "a quote (') that is not closed");
        slam_list_free(&a);
        check_fails(command_split(&a, "  "), "an empty command");
        slam_list_free(&a);
    }
    if (TEST("auto-BLEU: the share of n-grams that occur again")) {
        check_near("none", slam_auto_bleu("", 2), 0, 0);
        check_near("one word", slam_auto_bleu("a", 2), 0, 0);
        check_near("no repeat", slam_auto_bleu("a b c d", 2), 0, 0);
        check_near("a b, b a, a b", slam_auto_bleu("a b a b", 2), 2.0 / 3, 1e-15);
        check_near("punctuation apart", slam_auto_bleu("go, go, x", 2), 0.5, 1e-15);
        check_near("words", slam_auto_bleu("a b a", 1), 2.0 / 3, 1e-15);
    }
}

/* The units of a WAV file, as a line has them: "units": [...], "duration": [...] */
static text lists_of(const slam_quantiser *q, const char *path) {
    text t = SLAM_ZERO;
    slam_units u;
    if (!CHECK(slam_quantiser_file(q, path, &u), "%s", slam_error())) return t;
    const units line = units_line_of(&u, NULL);
    text_add_unit_lists(&t, &line);
    slam_units_free(&u);
    return t;
}

/* Whole, and stopped again and again: the same bytes. */
static void check_stops(const slam_quantiser *q, const slam_sources *s, const char *whole, const char *parts,
                        slam_tokenize_report *r) {
    slam_tokenize_report r2;
    int stops = 0;
    char *a = text_copy(check_path(whole)), *b = text_copy(check_path(parts));
    CHECK(slam_tokenize(q, s, a, 0, 100, NULL, NULL, r), "%s", slam_error());
    for (r2.stopped = 1; r2.stopped && stops < 60; stops++) {
        stopping soon = {0, 0};
        if (!CHECK(slam_tokenize(q, s, b, 0, 100, stop_after, &soon, &r2), "%s", slam_error())) break;
    }
    CHECK(stops > 2, "stopped %d times", stops);
    r2.earlier = 0;
    CHECK(!memcmp(r, &r2, sizeof r2), "the reports differ");
    check_same_file(a, b);
    free(a);
    free(b);
}

static void test_sources(void) {
    slam_quantiser *q = make_quantiser(25, 1, 20, 1);
    slam_list files = SLAM_ZERO, voices = SLAM_ZERO;
    slam_tokenize_report r, r2;
    text lists[8];
    text pairs = SLAM_ZERO, lines = SLAM_ZERO, tabs = SLAM_ZERO;
    for (int i = 0; i < 8; i++) {
        char name[32];
        snprintf(name, sizeof name, "s%d.wav", i);
        float *x = make_audio(5000 + 3000 * (size_t)i, 16000, 50 + (uint64_t)i);
        slam_list_add(&files, write_wav(name, x, 5000 + 3000 * (size_t)i, 16000));
        lists[i] = lists_of(q, files.at[i]);
        free(x);
    }
    if (TEST("conversions: features, tokens and shards without the audio")) {
        char *bin = text_copy(check_path("direct.bin")), *features = text_copy(check_path("features.jsonl")),
             *spelled = text_copy(check_path("spelled.jsonl"));
        CHECK(tokenize(q, &files, bin, 0, 60, NULL, NULL, &r) && tokenize(q, &files, features, 0, 60, NULL, NULL, &r2), "%s",
              slam_error());
        CHECK(tokenize(q, &files, spelled, 1, 60, NULL, NULL, &r2), "%s", slam_error());
        slam_list one = SLAM_ZERO;
        slam_list_add(&one, features);
        slam_sources *s = slam_sources_units(&one);
        CHECK(slam_tokenize(q, s, check_path("again.bin"), 0, 60, NULL, NULL, &r2), "%s", slam_error());
        CHECK(r2.shards == r.shards && r.shards > 1 && r2.tokens == r.tokens && r2.frames == r.frames, "%d shards of %d", r2.shards,
              r.shards);
        check_same_file(bin, check_path("again.bin"));
        check_same_file(check_path("direct-00001.bin"), check_path("again-00001.bin"));
        CHECK(slam_tokenize(NULL, s, check_path("again.jsonl"), 1, 60, NULL, NULL, &r2), "%s", slam_error());
        check_same_file(spelled, check_path("again.jsonl"));
        CHECK(slam_tokenize(NULL, s, check_path("copy.jsonl"), 0, 60, NULL, NULL, &r2), "%s", slam_error());
        check_same_file(features, check_path("copy.jsonl"));
        CHECK(slam_tokenize(NULL, s, check_path("unsaid.bin"), 0, 60, NULL, NULL, &r2), "%s", slam_error());
        shard unsaid;
        if (CHECK(shard_open(&unsaid, check_path("unsaid.bin")), "%s", slam_error())) {
            CHECK(unsaid.V == 0 && unsaid.fingerprint == 0, "V %d", unsaid.V);
            shard_close(&unsaid);
        }
        slam_sources_free(s);
        slam_list_free(&one);
        static const char bad[] = "{\"units\": [3, 25]}\n\n{\"units\": 3}\n{\"units\": [4], \"start\": 2.5, \"end\": 3}\n";
        slam_list_add(&one, check_file("bad.jsonl", bad, strlen(bad)));
        s = slam_sources_units(&one);
        CHECK(s && slam_tokenize(q, s, check_path("good.jsonl"), 0, 60, NULL, NULL, &r) && r.failed == 2 && r.documents == 1,
              "%zu failed: %s", r.failed, slam_error());
        text good = read_file(check_path("good.jsonl")), failed = read_file(check_path("good.jsonl.failed"));
        CHECK(good.n && !strcmp(good.at, "{\"units\": [4], \"file_name\": \"\", \"start\": 2.5, \"end\": 3}\n"), "%s", good.at);
        CHECK(failed.n && strstr(failed.at, "bad.jsonl:1\n") && strstr(failed.at, "bad.jsonl:3\n"), "%s", failed.at);
        text_free(&good);
        text_free(&failed);
        slam_sources_free(s);
        slam_list_free(&one);
        free(bin);
        free(features);
        free(spelled);
    }
    if (TEST("sources: parts in order are the whole")) {
        text all = SLAM_ZERO;
        for (size_t of = 1; of <= 9; of += 4) {
            all.n = 0;
            for (size_t i = 1; i <= of; i++) {
                char name[32];
                slam_sources *s = slam_sources_audio(&files, 60);
                snprintf(name, sizeof name, "part%zu-%zu.jsonl", i, of);
                CHECK(slam_sources_part(s, i, of), "%s", slam_error());
                if (slam_sources_count(s)) {
                    CHECK(slam_tokenize(q, s, check_path(name), 0, 60, NULL, NULL, &r), "%s", slam_error());
                    text t = read_file(check_path(name));
                    text_add_bytes(&all, t.at, t.n);
                    text_free(&t);
                } else CHECK(of == 9 && i == 9, "part %zu of %zu is empty", i, of);
                check_fails(slam_sources_part(s, of + 1, of), "expected 1 to");
                slam_sources_free(s);
            }
            text whole = read_file(check_path("part1-1.jsonl"));
            CHECK(whole.n == all.n && !memcmp(whole.at, all.at, all.n), "%zu parts are not the whole", of);
            text_free(&whole);
        }
        text_free(&all);
    }
    if (TEST("pairs: files become units, texts stay, in any order of threads and after stops")) {
        for (int i = 0; i < 24; i++) {
            if (i == 7)
                text_add(&pairs,
                         "{\"prompt_path\": \"s0.wav\", \"chosen_path\": \"none.wav\", \"rejected_path\": \"s0.wav\"}\n[]\n");
            text_add(
                &pairs,
                "{\"id\": %d, \"prompt_path\": \"s%d.wav\", \"chosen_path\": \"%s\", \"rejected_path\": \"s%d.wav\", \"prompt_text\": \"the %s\", \"chosen_text\": \"end.\"}\n",
                i, i % 8, files.at[(i + 1) % 8], (i + 2) % 8, i % 4 ? "\\\"x\\\"" : "a b a b a b");
        }
        slam_sources *s = slam_sources_pairs(check_file("pairs.jsonl", pairs.at, pairs.n), 0.3);
        const int threads = threads_count();
        CHECK(s && slam_sources_count(s) == 26 && slam_sources_pairs_out(s), "%s", slam_error());
        threads_set(3);
        check_stops(q, s, "pairs1.jsonl", "pairs2.jsonl", &r);
        threads_set(1);
        CHECK(slam_tokenize(q, s, check_path("pairs3.jsonl"), 0, 60, NULL, NULL, &r2), "%s", slam_error());
        threads_set(threads);
        check_same_file(check_path("pairs1.jsonl"), check_path("pairs3.jsonl"));
        CHECK(r.failed == 2 && r.repeats == 6 && r.documents == 18 && r.files == 26, "%zu failed, %zu repeat, %zu documents",
              r.failed, r.repeats, r.documents);
        text got = read_file(check_path("pairs1.jsonl")), wanted = SLAM_ZERO;
        text_add(&wanted, "{\"id\": 1, \"prompt_path\": \"s1.wav\", \"chosen_path\": ");
        text_add_json(&wanted, files.at[2]);
        text_add(
            &wanted,
            ", \"rejected_path\": \"s3.wav\", \"prompt_text\": \"the \\\"x\\\"\", \"chosen_text\": \"end.\", \"prompt\": {%s}, \"chosen\": {%s}, \"rejected\": {%s}}\n",
            lists[1].at, lists[2].at, lists[3].at);
        CHECK(got.n && !strncmp(got.at, wanted.at, wanted.n), "%.400s", got.at);
        check_fails(slam_tokenize(q, s, check_path("pairs.bin"), 0, 60, NULL, NULL, &r2),
                    "pairs go into a name that ends in .jsonl");
        check_fails(slam_tokenize(NULL, s, check_path("p.jsonl"), 0, 60, NULL, NULL, &r2), "no centroids");
        slam_sources_free(s);
        text_free(&got);
        text_free(&wanted);
    }
    if (TEST("text: spoken by voices in turn, in any order of threads and after stops")) {
        text wanted = SLAM_ZERO;
        char *path;
        slam_list_add(&voices, "cat {text}");
        slam_list_add(&voices, "sh -c 'cat \"$0\" >&2; exec cat \"$1\"' /dev/null {text}");
        for (int i = 0; i < 30; i++) text_add(&lines, "%s\r\n%s", i == 9 ? "/none/x.wav" : files.at[i % 8], i == 3 ? "\n" : "");
        path = text_copy(check_file("stories.txt", lines.at, lines.n));
        slam_sources *s = slam_sources_text(path, &voices, 0.3);
        CHECK(s && slam_sources_count(s) == 30 && !slam_sources_pairs_out(s), "%s", slam_error());
        check_stops(q, s, "told1.jsonl", "told2.jsonl", &r);
        CHECK(r.failed == 1 && r.documents == 29, "%zu failed", r.failed);
        text got = read_file(check_path("told1.jsonl")), failed = read_file(check_path("told1.jsonl.failed"));
        text_add(&wanted, "{%s, \"file_name\": ", lists[0].at);
        text_add_json(&wanted, path);
        wanted.n--;
        wanted.at[wanted.n] = 0;
        text_add(&wanted, ":1\"}\n{%s", lists[1].at);
        CHECK(got.n && !strncmp(got.at, wanted.at, wanted.n), "%.300s", got.at);
        CHECK(failed.n && strstr(failed.at, "stories.txt:11\n"), "%s", failed.at);
        text_free(&got);
        text_free(&failed);
        text_free(&wanted);
        slam_sources_free(s);
        free(path);
    }
    if (TEST("text: prompt, chosen and rejected become pairs with their text")) {
        for (int i = 0; i < 12; i++) text_add(&tabs, "%s\t%s\t%s\n", files.at[i % 8], files.at[(i + 1) % 8], files.at[5]);
        char *path = text_copy(check_file("pairs.tsv", tabs.at, tabs.n));
        slam_sources *s = slam_sources_text(path, &voices, 0);
        CHECK(s && slam_sources_pairs_out(s), "%s", slam_error());
        check_stops(q, s, "tsv1.jsonl", "tsv2.jsonl", &r);
        text got = read_file(check_path("tsv1.jsonl")), wanted = SLAM_ZERO;
        static const int side[] = {0, 1, 5};
        for (int k = 0; k < 3; k++) {
            text_add(&wanted, "%s\"%s_text\": ", k ? ", " : "{", pair_names[k]);
            text_add_json(&wanted, files.at[side[k]]);
        }
        for (int k = 0; k < 3; k++) text_add(&wanted, ", \"%s\": {%s}", pair_names[k], lists[side[k]].at);
        text_add(&wanted, "}\n");
        CHECK(got.n && !strncmp(got.at, wanted.at, wanted.n) && r.documents == 12, "%.600s", got.at);
        slam_sources_free(s);
        text_free(&got);
        text_free(&wanted);
        free(path);
        check_fails(slam_sources_text(check_file("four.tsv", "a\tb\tc\na\tb\n", 10), &voices, 0), "four.tsv:2: 2 fields");
        check_fails(slam_sources_text(check_file("blank.txt", "\n \n", 3), &voices, 0), "blank.txt: it holds no line");
    }
    if (TEST("text: commands that fail")) {
        static const char *const bad[][2] = {
            {"sh -c 'echo first >&2; echo the reason >&2; exit 3' {text}", "sh failed with status 3: the reason"},
            {"sh -c 'kill -9 $$' {text}", "sh was ended by signal 9"},
            {"echo {text}", "not a WAV file"},
            {"true {text}", "not a WAV file"}};
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            file_map map;
            sound spoken;
            slam_list voice = SLAM_ZERO;
            CHECK(command_split(&voice, bad[i][0]), "%s", slam_error());
            memset(&map, 0, sizeof map);
            check_fails(command_speak(&voice, "words", "x.txt:1", &spoken), bad[i][1]);
            slam_list_free(&voice);
        }
        slam_list one = SLAM_ZERO;
        slam_list_add(&one, "/none/such {text}");
        slam_sources *s = slam_sources_text(check_file("one.txt", "words\n", 6), &one, 0);
        check_fails(slam_tokenize(q, s, check_path("no.bin"), 0, 60, NULL, NULL, &r),
                    "one.txt:1: /none/such cannot be started: No such file");
        CHECK(!path_exists(check_path("no.bin.journal")) && !path_exists(check_path("no.bin.partial")), "something is left over");
        slam_sources_free(s);
        slam_list_free(&one);
    }
    for (int i = 0; i < 8; i++) text_free(&lists[i]);
    text_free(&pairs);
    text_free(&lines);
    text_free(&tabs);
    slam_list_free(&voices);
    slam_list_free(&files);
    slam_quantiser_free(q);
}

int main(void) {
    test_memory();
    test_resampler();
    test_resampler_without_table();
    test_resampler_ends();
    test_mfcc();
    test_kmeans();
    test_frame_sample();
    test_quantiser();
    test_files();
    test_formats();
    test_parts();
    test_commands();
    test_sources();
    return check_end();
}
