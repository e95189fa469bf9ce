/* Synthesis from MFCC centroids: audio of units becomes the same units again, at the level of the original; durations,
   WAV files, errors. test/fixtures/speech.jsonl: 36 sentences of validation stories by the voices of the bundled corpus,
   with the units and durations of their audio, and its RMS at 16 kHz (measured by NumPy, after sox). */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include <sys/resource.h>
#include "check.h"

#ifdef __SANITIZE_ADDRESS__ // ten times as slow
enum { SENTENCES = 8, DOCUMENTS = 1, LONG_FRAMES = 500, EACH_UNIT = 5 };
#else
enum { SENTENCES = 36, DOCUMENTS = 10, LONG_FRAMES = 4500, EACH_UNIT = 1 }; // frames: 3 minutes, 11.5 MB as floats
#endif

static slam_tokenizer *bundled(int rate, int dedup) {
    slam_unit_config c = slam_unit_config_default();
    const int ok = rate == 25 && dedup ? slam_unit_config_load(&c, "test/corpus/km.npy") : 1;
    c.rate = rate;
    c.dedup = dedup;
    slam_tokenizer *t = ok ? slam_tokenizer_load("test/corpus/km.npy", &c, NULL) : NULL;
    CHECK(t, "%s", slam_error());
    return t;
}

/* All samples of a sequence. */
static float *speak(slam_vocoder *v, const int *unit, const int *duration, size_t n, size_t *n_samples) {
    const float *x;
    ptrdiff_t got;
    size_t at = 0;
    if (!CHECK(slam_vocoder_start(v, unit, duration, n), "%s", slam_error())) return NULL;
    float *all = NEW(float, v->samples);
    for (; (got = slam_vocoder_next(v, &x)) > 0; at += (size_t)got)
        if (CHECK(at + (size_t)got <= v->samples, "more samples than the sequence has"))
            memcpy(all + at, x, (size_t)got * sizeof *x);
    CHECK(got == 0 && at == v->samples && v->done == at, "%zu of %zu samples", at, v->samples);
    *n_samples = at;
    return all;
}

/* Levenshtein distance: insertions, deletions and substitutions that make b (m) of a (n). */
static size_t edit_distance(const int *a, size_t n, const int *b, size_t m) {
    size_t *d = NEW(size_t, m + 1);
    for (size_t j = 0; j <= m; j++) d[j] = j;
    for (size_t i = 0; i < n; i++) {
        size_t diagonal = d[0];
        d[0] = i + 1;
        for (size_t j = 0; j < m; j++) {
            const size_t least = d[j] < d[j + 1] ? d[j] + 1 : d[j + 1] + 1, kept = diagonal + (a[i] != b[j]);
            diagonal = d[j + 1];
            d[j + 1] = kept < least ? kept : least;
        }
    }
    const size_t distance = d[m];
    free(d);
    return distance;
}

typedef struct score {
    double units, errors, frames, same; /* units and their edit distance; frames, and those that have the unit wanted */
    double sentences, level;            /* dB above the original */
} score;

/* Synthesises units, makes units of the audio, and compares. */
static void score_units(score *s, slam_vocoder *v, const int *unit, const int *duration, size_t n, double rms) {
    slam_recording r = ZERO;
    double square = 0;
    float *x = speak(v, unit, duration, n, &r.n);
    r.samples = x;
    if (!x || !CHECK(slam_units_encode(v->tokenizer, &r, 1), "%s", slam_error())) return;
    CHECK(r.units.frames == v->frames, "%zu frames of audio for %zu", r.units.frames, v->frames);
    for (size_t i = 0, frame = 0; i < r.units.n; i++)
        for (int k = 0; k < r.units.duration[i] && frame < v->frames; k++, frame++)
            s->same += r.units.unit[i] == v->frame[frame];
    for (size_t i = 0; i < r.n; i++) square += (double)x[i] * x[i];
    s->frames += (double)v->frames;
    s->units += (double)n;
    s->errors += (double)edit_distance(unit, n, r.units.unit, r.units.n);
    s->sentences++;
    if (rms > 0) s->level += 20 * log10(sqrt(square / (double)r.n) / rms);
    slam_units_free(&r.units);
    free(x);
}

static void test_sentences(slam_vocoder *v) {
    for (int mean = 0; mean < 2; mean++) {
        if (!TEST("synthesis: sentences, with their %s durations", mean ? "units' mean" : "own")) continue;
        units_reader r;
        slam_units u = ZERO;
        score s = ZERO;
        if (!CHECK(units_open(&r, "test/fixtures/speech.jsonl"), "%s", slam_error())) return;
        while (s.sentences < SENTENCES && units_next(&r, &u) > 0)
            score_units(&s, v, u.unit, mean ? NULL : u.duration, u.n, json_get(r.root, "rms")->number);
        CHECK(s.sentences == SENTENCES, "%.0f sentences: %s", s.sentences, slam_error());
        check_near("unit error rate in percent", 100 * s.errors / s.units, 0, mean ? 15 : 12);
        if (!mean) check_near("frames with another unit, in percent", 100 - 100 * s.same / s.frames, 0, 10);
        check_near("level in dB above the original's", s.level / s.sentences, 0, 2);
        slam_units_free(&u);
        units_close(&r);
    }
    if (TEST("synthesis: documents of the bundled validation data")) {
        shard d;
        score s = ZERO;
        int unit[1024], n = 0;
        if (!CHECK(shard_open(&d, "test/corpus/val.bin"), "%s", slam_error())) return;
        for (size_t i = 1; i < d.n && s.sentences < DOCUMENTS; i++)
            if (d.tokens[i] != DOCUMENT_TOKEN) unit[n++] = d.tokens[i] - FIRST_UNIT;
            else if (n) {
                score_units(&s, v, unit, NULL, (size_t)n, 0);
                n = 0;
            }
        CHECK(s.sentences == DOCUMENTS, "%.0f documents", s.sentences);
        check_near("unit error rate in percent", 100 * s.errors / s.units, 0, 15);
        file_map_close(&d.map);
    }
}

/* One unit for four seconds has the cepstra of its centroid, and 0.5 more energy, which the synthesis adds. */
static void test_spectrum(int rate) {
    enum { FRAMES = 100, EDGE = 5 };
    if (!TEST("synthesis: the spectrum of a unit, %d frames per second", rate)) return;
    slam_tokenizer *t = bundled(rate, 0);
    slam_vocoder *v = slam_vocoder_open(NULL, 0, 0, t, NULL);
    double square[13] = ZERO;
    for (int k = 0; v && k < t->K; k += EACH_UNIT) {
        const int duration = FRAMES;
        size_t n;
        float *x = speak(v, &k, &duration, 1, &n), frame[13];
        double mean[13] = ZERO;
        for (int f = EDGE; x && f < FRAMES - EDGE; f++) {
            mfcc_frame(t->mfcc, frame, x, n, (size_t)f * (size_t)t->mfcc->step);
            for (int i = 0; i < 13; i++) mean[i] += frame[i] / (FRAMES - 2 * EDGE);
        }
        for (int i = 0; i < 13; i++)
            square[i] += pow(mean[i] - t->centroids[k * 39 + i] - (i ? 0 : 0.5), 2) * EACH_UNIT / t->K;
        free(x);
    }
    for (int i = 0; i < 13; i++) {
        char name[40];
        snprintf(name, sizeof name, "c_%d, root mean square", i);
        check_near(name, sqrt(square[i]), 0, i == 0 ? 0.2 : i == 1 ? 4 : 10); // of numbers up to 120
    }
    slam_vocoder_free(v);
    slam_tokenizer_free(t);
}

/* A voiced unit repeats itself after a period of the pitch, 90 to 130 Hz; an unvoiced one nowhere. */
static void test_pitch(slam_vocoder *v) {
    if (!TEST("synthesis: vowels have a pitch, consonants have none")) return;
    const int unit[] = {92, 79}, duration = 50; // of high and low c_1
    for (int i = 0; i < 2; i++) {
        size_t n;
        float *x = speak(v, &unit[i], &duration, 1, &n);
        double best = 0;
        int at = 0;
        for (int lag = SAMPLE_RATE / 150; x && lag < SAMPLE_RATE / 80; lag++) {
            double product = 0, square = 0;
            for (size_t t = 24000; t < 28000; t++) { // after 1.5 s, half way from 130 to 90 Hz
                product += (double)x[t] * x[t - (size_t)lag];
                square += (double)x[t] * x[t];
            }
            if (product / square > best) best = product / square, at = lag;
        }
        if (i == 0) check_near("pitch in Hz", (double)SAMPLE_RATE / at, 108, 4);
        CHECK(i ? best < 0.4 : best > 0.7, "correlation %.2f at a lag of %d", best, at);
        free(x);
    }
}

/* The units of the frames of a sequence. */
static void check_frames(slam_vocoder *v, const int *unit, const int *duration, size_t n, const int *frame, size_t m) {
    CHECK(slam_vocoder_start(v, unit, duration, n), "%s", slam_error());
    if (CHECK(v->frames == m, "%zu frames, expected %zu", v->frames, m))
        for (size_t i = 0; i < m; i++) CHECK(v->frame[i] == frame[i], "frame %zu has unit %d", i, v->frame[i]);
    CHECK(v->samples == 1024 + (m - 1) * 640, "%zu samples", v->samples);
}

/* durations: the end of a km.json beside the bundled centroids. */
static slam_tokenizer *with_durations(const char *durations) {
    strbuf s = ZERO;
    file_map npy;
    slam_unit_config c = slam_unit_config_default();
    CHECK(file_map_open(&npy, "test/corpus/km.npy"), "%s", slam_error());
    const char *path = check_file("km.npy", npy.data, npy.size);
    strbuf_add(&s, "{\"features\": \"mfcc\", \"rate\": 25, \"fingerprint\": 182614299%s}", durations);
    check_file("km.json", s.at, s.n);
    slam_tokenizer *t = slam_unit_config_load(&c, path) ? slam_tokenizer_load(path, &c, NULL) : NULL;
    file_map_close(&npy);
    strbuf_free(&s);
    return t;
}

static void test_stored_durations(void) {
    strbuf s = ZERO;
    strbuf_add(&s, ", \"durations\": [1000");
    for (int k = 1; k < 99; k++) strbuf_add(&s, ", %d", 10 * k);
    if (TEST("synthesis: durations in km.json")) {
        strbuf all = ZERO;
        strbuf_add(&all, "%s, 7]", s.at);
        slam_tokenizer *t = with_durations(all.at), *without = with_durations("");
        CHECK(t && t->durations && t->durations[0] == 1000 && t->durations[42] == 420 && t->durations[99] == 7, "%s",
              slam_error());
        CHECK(without && !without->durations, "durations from nowhere: %s", slam_error());
        slam_tokenizer_free(t);
        slam_tokenizer_free(without);
        strbuf_free(&all);
    }
    strbuf_add(&s, "]");
    if (TEST("synthesis: durations in km.json, one too few"))
        check_fails(with_durations(s.at), "has 99 durations, expected 100");
    strbuf_free(&s);
}

static void test_durations(void) {
    static const int unit[] = {0, 1, 2, 3, 0}, given[] = {2, 0, 0, 3, 1};
    slam_tokenizer *t = bundled(25, 1), *plain = bundled(25, 0);
    slam_vocoder *v = slam_vocoder_open(NULL, 0, 0, t, NULL), *each = slam_vocoder_open(NULL, 0, 0, plain, NULL);
    free(t->durations);
    t->durations = NULL;
    if (TEST("synthesis: units whose durations nobody knows last 1.4 frames")) {
        static const int frame[] = {0, 1, 1, 2, 3, 3, 0};
        check_frames(v, unit, NULL, 5, frame, 7);
    }
    if (TEST("synthesis: mean durations, rounded with the remainder carried on, at least 1 frame")) {
        static const int frame[] = {0, 1, 2, 2, 3, 0}, with_given[] = {0, 0, 1, 2, 2, 2, 3, 3, 3, 0};
        t->durations = NEW(int, t->K);
        t->durations[0] = 20, t->durations[1] = 48, t->durations[2] = 104, t->durations[3] = 40; // 0.5, 1.2, 2.6, 1
        check_frames(v, unit, NULL, 5, frame, 6);
        check_frames(v, unit, given, 5, with_given, 10);
    }
    if (TEST("synthesis: units that are not deduplicated have one frame")) check_frames(each, unit, NULL, 5, unit, 5);
    slam_vocoder_free(v);
    slam_vocoder_free(each);
    slam_tokenizer_free(t);
    slam_tokenizer_free(plain);
}

static void test_errors(slam_vocoder *v) {
    if (TEST("synthesis: sequences that are errors")) {
        const int unit[] = {3, 100, -1}, duration[] = {1, INT_MAX, 1};
        check_fails(slam_vocoder_start(v, unit, NULL, 0), "has no units");
        check_fails(slam_vocoder_start(v, unit, NULL, 2), "unit 2 is 100, expected 0 to 99");
        check_fails(slam_vocoder_start(v, unit + 2, NULL, 1), "unit 1 is -1, expected 0 to 99");
        const int valid[] = {3, 4, 5};
        check_fails(slam_vocoder_start(v, valid, duration, 3), "too long for a WAV file");
        const float *x;
        CHECK(slam_vocoder_next(v, &x) == 0, "samples after an error");
    }
    if (TEST("synthesis: no vocoder without centroids of MFCC")) {
        slam_unit_config c = slam_unit_config_default();
        slam_tokenizer *t = slam_tokenizer_load(NULL, &c, NULL);
        check_fails(slam_vocoder_open(NULL, 0, 0, t, NULL), "needs a vocoder");
        check_fails(slam_vocoder_open(NULL, 0, 0, NULL, NULL), "needs a vocoder");
        slam_tokenizer_free(t);
    }
}

static int cancel(void *context, const slam_progress *p) {
    CHECK(!strcmp(p->stage, "synthesize") && p->done <= p->total && p->total == 1024 + 49 * 640, "progress");
    return p->done < *(double *)context;
}

static void test_wav(slam_vocoder *v) {
    const int unit = 45, duration = 50;
    char *path = string_copy(check_path("said.wav")), *part = string_print("%s.part", path);
    if (TEST("synthesis: a WAV file")) {
        // the canonical header of 44 bytes: PCM, mono, 16000 Hz, 32000 bytes a second, 2 a frame, 16 bits
        static const unsigned char format[] = "WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data";
        size_t n, m;
        file_map map;
        float *x = speak(v, &unit, &duration, 1, &n), *back = NULL;
        CHECK(slam_vocoder_start(v, &unit, &duration, 1) && slam_vocoder_write(v, path, NULL, NULL), "%s",
              slam_error());
        if (CHECK(file_map_open(&map, path), "%s", slam_error())) {
            const uint32_t sizes[] = {(uint32_t)(36 + 2 * n), (uint32_t)(2 * n)};
            CHECK(map.size == 44 + 2 * n && !memcmp(map.data, "RIFF", 4) && !memcmp(map.data + 4, sizes, 4) &&
                      !memcmp(map.data + 8, format, 32) && !memcmp(map.data + 40, sizes + 1, 4),
                  "the header");
            file_map_close(&map);
        }
        if (CHECK((back = slam_audio_load(path, &m)) && m == n, "%s", slam_error()))
            for (size_t i = 0; i < n; i++) check_near("sample", back[i], x[i], 1.1 / 32768);
        CHECK(!path_exists(part), "%s is left", part);
        free(x), free(back);
    }
    if (TEST("synthesis: WAV files that are cancelled or cannot be written")) {
        double until = 10000;
        unlink(path);
        CHECK(slam_vocoder_start(v, &unit, &duration, 1), "%s", slam_error());
        check_fails(slam_vocoder_write(v, path, cancel, &until), "said.wav: stopped before its end");
        CHECK(!path_exists(path) && !path_exists(part), "a file is left");
        CHECK(slam_vocoder_start(v, &unit, &duration, 1), "%s", slam_error());
        check_fails(slam_vocoder_write(v, "/none/x.wav", NULL, NULL), "/none/x.wav.part: cannot be written");
    }
    free(path);
    free(part);
}

/* Peak memory in bytes. */
static double peak(void) {
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
#ifdef __APPLE__
    return (double)r.ru_maxrss;
#else
    return 1024.0 * (double)r.ru_maxrss;
#endif
}

static void test_memory(slam_vocoder *v) {
    if (!TEST("synthesis: memory does not grow with the length")) return;
    const int unit = 45, some = 10, many = LONG_FRAMES;
    for (int i = 0; i < 2; i++) {
        const double before = peak();
        CHECK(slam_vocoder_start(v, &unit, i ? &many : &some, 1) &&
                  slam_vocoder_write(v, check_path("long.wav"), NULL, NULL),
              "%s", slam_error());
        if (i) check_near("growth in bytes", peak() - before, 0, 2e6);
    }
}

int main(void) {
    slam_tokenizer *t = bundled(25, 1);
    slam_vocoder *v = slam_vocoder_open(NULL, 0, 0, t, NULL);
    if (v) {
        test_memory(v); // before others, which need more
        test_sentences(v);
        test_errors(v);
        test_wav(v);
        test_pitch(v);
    }
    test_spectrum(25);
    test_spectrum(50);
    test_stored_durations();
    test_durations();
    slam_vocoder_free(v);
    slam_tokenizer_free(t);
    return check_end();
}
