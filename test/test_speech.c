/* Audio files, the resampler and the segmenter; MFCC against python_speech_features (fixture made by test/reference.py); k-means
   and the unit tokenizer. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include <sys/resource.h>
#include "check.h"

/* ---- audio to test with ---- */

typedef struct wav_kind {
    const char *name;
    int format, bits; // as the header says
} wav_kind;

static const wav_kind wav_kinds[] = {{"8-bit", 1, 8},
                                     {"16-bit", 1, 16},
                                     {"24-bit", 1, 24},
                                     {"32-bit", 1, 32},
                                     {"float32", 3, 32},
                                     {"float64", 3, 64},
                                     {"20-bit in 3 bytes", 1, 20},
                                     {"12-bit in 2 bytes", 1, 12}};
enum { WAV_KINDS = sizeof wav_kinds / sizeof *wav_kinds };

static int wav_bytes(const wav_kind *k) { return (k->bits + 7) / 8; }
static void put(strbuf *s, uint64_t value, int bytes) { strbuf_add_bytes(s, &value, (size_t)bytes); }

/* A WAV file up to its data, the data chunk of `size` bytes. */
static void wav_header(strbuf *s, const wav_kind *k, int channels, int rate, int extensible, uint32_t size) {
    const int frame = channels * wav_bytes(k);
    strbuf_add(s, "RIFF");
    put(s, size + (extensible ? 60 : 36), 4);
    strbuf_add(s, "WAVEfmt ");
    put(s, extensible ? 40 : 16, 4);
    put(s, extensible ? 0xfffe : (uint64_t)k->format, 2);
    put(s, (uint64_t)channels, 2);
    put(s, (uint64_t)rate, 4);
    put(s, (uint64_t)rate * (uint64_t)frame, 4);
    put(s, (uint64_t)frame, 2);
    put(s, (uint64_t)k->bits, 2);
    if (extensible) {
        put(s, 22, 2);
        put(s, (uint64_t)k->bits, 2);
        put(s, 0, 4);
        put(s, (uint64_t)k->format, 2);
        strbuf_add_bytes(s, "\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71", 14);
    }
    strbuf_add(s, "data");
    put(s, size, 4);
}

/* A WAV file of n 16-bit samples. */
static const char *write_wav(const char *name, const float *sample, size_t n, int rate) {
    strbuf s = ZERO;
    wav_header(&s, &wav_kinds[1], 1, rate, 0, (uint32_t)(2 * n));
    for (size_t i = 0; i < n; i++) put(&s, (uint64_t)lrintf(32767 * sample[i]), 2);
    const char *path = check_file(name, s.at, s.n);
    strbuf_free(&s);
    return path;
}

/* Something that changes: tones that jump, over noise. */
static float *make_audio(size_t n, int rate, uint64_t seed) {
    float *x = NEW(float, n);
    double hz = 0;
    for (size_t i = 0; i < n; i++) {
        if (i % ((size_t)rate / 10) == 0) hz = 100 + 2000 * rng_uniform(&seed);
        x[i] = (float)(0.5 * sin(2 * PI * hz * (double)i / rate) + 0.02 * rng_normal(&seed));
    }
    return x;
}

typedef struct recording {
    float *x;
    size_t n, capacity;
    int rate;
} recording;

/* All frames of a file, `step` at a time, of a channel or (0) of all; NULL x on failure. */
static recording read_channel(const char *path, int channel, size_t step) {
    recording r = ZERO;
    audio a;
    ptrdiff_t got = audio_open(&a, path, "x.wav") ? 1 : -1;
    a.channel = channel;
    for (; got > 0; r.n += (size_t)got) {
        GROW(float, r.x, r.capacity, r.n + step);
        got = audio_read(&a, r.x + r.n, step);
        if (got < 0) break;
    }
    r.rate = a.rate;
    CHECK(got < 0 || r.n == a.at, "%zu frames of %d", r.n, (int)a.at);
    if (got < 0) free(r.x), r.x = NULL, r.n = 0;
    audio_close(&a);
    return r;
}

static recording read_all(const char *path, size_t step) { return read_channel(path, 0, step); }
static recording read_bytes(const strbuf *s, size_t n) { return read_all(check_file("x.wav", s->at, n), 1000); }
static int reads(const strbuf *s, size_t n) {
    const recording r = read_bytes(s, n);
    free(r.x);
    return r.x != NULL;
}

/* ---- WAV ---- */

/* Adds one sample and returns the number that it stands for. */
static double wav_put(strbuf *s, const wav_kind *k, uint64_t *state) {
    const double x = 2 * rng_uniform(state) - 1, scale = ldexp(1, 8 * wav_bytes(k) - 1);
    if (k->format == 3) {
        const float narrow = (float)x;
        strbuf_add_bytes(s, k->bits == 32 ? (const void *)&narrow : (const void *)&x, (size_t)k->bits / 8);
        return k->bits == 32 ? (double)narrow : x;
    }
    const int64_t whole =
        rng_below(state, 10) == 0 ? (x < 0 ? -(int64_t)scale : (int64_t)scale - 1) : (int64_t)floor(x * scale);
    put(s, (uint64_t)(k->bits == 8 ? whole + 128 : whole), wav_bytes(k));
    return (double)whole / scale;
}

static void test_wav_values(void) {
    static const int channels[] = {1, 2, 8};
    for (int k = 0; k < WAV_KINDS; k++) {
        if (!TEST("wav: %s, plain and extensible, 1, 2 and 8 channels", wav_kinds[k].name)) continue;
        for (int i = 0; i < 6; i++) {
            enum { n = 200 };
            const int c = channels[i / 2];
            float expected[n];
            strbuf s = ZERO;
            uint64_t state = (uint64_t)(k * 10 + i);
            wav_header(&s, &wav_kinds[k], c, 22050, i % 2, (uint32_t)(n * c * wav_bytes(&wav_kinds[k])));
            for (int t = 0; t < n; t++) {
                double sum = 0;
                for (int j = 0; j < c; j++) sum += wav_put(&s, &wav_kinds[k], &state);
                expected[t] = (float)(sum / c);
            }
            const recording r = read_all(check_file("x.wav", s.at, s.n), 7);
            if (CHECK(r.n == n && r.rate == 22050, "%zu samples at %d: %s", r.n, r.rate, slam_error()))
                for (int t = 0; t < n; t++) check_near("sample", r.x[t], expected[t], 1e-7);
            free(r.x);
            strbuf_free(&s);
        }
    }
}

static void test_channels(void) {
    if (!TEST("wav: a channel of several, or their mean")) return;
    static const int16_t frames[3][3] = {{16384, -16384, 8192}, {-8192, 8192, 0}, {4096, 0, -4096}};
    static const float mean[3] = {0.25f / 3, 0, 0};
    strbuf s = ZERO;
    wav_header(&s, &wav_kinds[1], 3, 16000, 0, sizeof frames);
    strbuf_add_bytes(&s, frames, sizeof frames);
    const char *path = check_file("x.wav", s.at, s.n);
    for (int channel = 0; channel <= 3; channel++) {
        const recording r = read_channel(path, channel, 2);
        if (CHECK(r.n == 3, "%zu frames: %s", r.n, slam_error()))
            for (int t = 0; t < 3; t++)
                check_near("sample", r.x[t], channel ? frames[t][channel - 1] / 32768.0 : mean[t], 1e-8);
        free(r.x);
    }
    strbuf_free(&s);
}

/* The file consists of three samples 0.5, -0.5, 0.25. */
static void check_three(const strbuf *s) {
    const recording r = read_bytes(s, s->n);
    CHECK(r.n == 3 && r.x[0] == 0.5f && r.x[1] == -0.5f && r.x[2] == 0.25f, "%zu samples: %s", r.n, slam_error());
    free(r.x);
}

static void test_wav_chunks(void) {
    static const char three[] = "\x00\x40\x00\xc0\x00\x20", list[] = "LIST\x05\x00\x00\x00"
                                                                     "abcde\x00";
    const wav_kind *k = &wav_kinds[1];
    if (TEST("wav: the sizes that programs write into pipes")) {
        static const uint32_t sizes[][2] = {
            // RIFF, data
            {36, 0},          {0, 0},          {0xffffffffu, 0},           {0x7ffff024, 0},
            {36, 0x7ffff000}, {0, 0x7fffffff}, {0x80000000u, 0x80000000u}, {0xffffffffu, 0xffffffffu}};
        for (int i = 0; i < 8; i++) {
            strbuf s = ZERO;
            wav_header(&s, k, 1, 16000, 0, sizes[i][1]);
            memcpy(s.at + 4, &sizes[i][0], 4);
            strbuf_add_bytes(&s, three, 6);
            put(&s, 'x', 1); // half a sample: the pipe broke
            check_three(&s);
            check_fails(reads(&s, s.n - 7), "x.wav: it holds no audio");
            strbuf_free(&s);
        }
    }
    if (TEST("wav: no data, but chunks behind them")) {
        strbuf s = ZERO;
        wav_header(&s, k, 1, 16000, 0, 0);
        strbuf_add_bytes(&s, list, 14);
        s.at[4] = 50; // the size of RIFF includes the list: nothing is unknown
        check_fails(reads(&s, s.n), "x.wav: it holds no audio");
        strbuf_free(&s);
    }
    if (TEST("wav: other chunks before and after, data of an odd size")) {
        for (uint32_t odd = 0; odd < 2; odd++) {
            strbuf s = ZERO, head = ZERO;
            wav_header(&head, k, 1, 16000, 0, 6 + odd);
            strbuf_add_bytes(&s, head.at, 12);
            strbuf_add_bytes(&s, list, 14);
            strbuf_add_bytes(&s, head.at + 12, head.n - 12);
            strbuf_add_bytes(&s, three, 6);
            if (odd) put(&s, 0x55, 2);
            strbuf_add_bytes(&s, "id3 \xff\xff\xff\xff", 8);
            check_three(&s);
            strbuf_free(&s);
            strbuf_free(&head);
        }
    }
    if (TEST("wav: tags in front, the size of the data known and unknown")) {
        for (int footer = 0; footer < 2; footer++)
            for (int tags = 1; tags <= 4; tags++) {
                strbuf s = ZERO;
                for (int tag = 0; tag < (tags + 1) / 2; tag++) {
                    strbuf_add_bytes(&s, footer ? "ID3\x04\x00\x10\x00\x00\x01\x05" : "ID3\x04\x00\x00\x00\x00\x01\x05",
                                     10); // 133 bytes
                    for (int i = 0; i < 133 + 10 * footer; i++) put(&s, 0xff, 1);
                }
                wav_header(&s, k, 1, 16000, 0, tags % 2 ? 6 : 0);
                strbuf_add_bytes(&s, three, 6);
                check_three(&s);
                strbuf_free(&s);
            }
    }
    if (TEST("wav: RF64, its sizes in chunk ds64")) {
        for (int more = 0; more < 2; more++) {
            strbuf s = ZERO, head = ZERO;
            wav_header(&head, k, 1, 16000, 0, 0xffffffffu);
            strbuf_add_bytes(&s, "RF64\xff\xff\xff\xffWAVEds64\x1c\x00\x00\x00", 20);
            put(&s, 72 + 6 + 14 * (uint64_t)more, 8);
            put(&s, 6, 8);
            put(&s, 3, 8);
            put(&s, 0, 4); // no table
            strbuf_add_bytes(&s, head.at + 12, head.n - 12);
            strbuf_add_bytes(&s, three, 6);
            if (more) strbuf_add_bytes(&s, list, 14);
            check_three(&s);
            check_fails(reads(&s, s.n - 1 - 14 * (size_t)more),
                        "x.wav: chunk 'data' is longer than the rest of the file");
            check_fails(reads(&s, 30), "x.wav: chunk 'ds64' is longer than the rest of the file");
            memset(s.at + 28, 0, 8); // no data
            if (more) check_fails(reads(&s, s.n), "x.wav: it holds no audio");
            strbuf_free(&s);
            strbuf_free(&head);
        }
    }
}

static void test_wav_damaged(void) {
    static const struct {
        int at, bytes;
        uint32_t value;
        const char *error;
    } bad[] = {
        {0, 4, 0x58464952, "not a WAV file"},
        {8, 4, 0, "not a WAV file"},
        {12, 4, 0x20746d66 + 1, "chunk 'data' comes before chunk 'fmt '"},
        {16, 4, 0, "an empty fmt chunk"},
        {16, 4, 5000, "chunk 'fmt ' is longer than the rest of the file"},
        {16, 4, 0xffffffffu, "chunk 'fmt ' is longer than the rest of the file"},
        {20, 2, 0xfffe, "a WAV file of codec 0"},
        {20, 2, 255, "a WAV file of codec AAC"},
        {20, 2, 3, "1 channels of 16 bits in 2 bytes, expected PCM of"},
        {22, 2, 0, "0 channels of 16 bits in 2 bytes"},
        {22, 2, 65535, "65535 channels of 16 bits in 2 bytes"},
        {32, 2, 0, "1 channels of 16 bits in 0 bytes"},
        {34, 2, 0, "1 channels of 0 bits in 2 bytes"},
        {34, 2, 40, "1 channels of 40 bits in 2 bytes"},
        {34, 2, 24, "1 channels of 24 bits in 2 bytes"},
        {36, 4, 0, "it has no chunk 'data'"},
        {40, 4, 9, "chunk 'data' is longer than the rest of the file"},
        {40, 4, 0x7fffefff, "chunk 'data' is longer than the rest of the file"},
        {40, 4, 1, "it holds no audio"},
#ifndef SLAM_SNDFILE
        {20, 2, 7, "a WAV file of codec mu-law; to read it, install libsndfile1-dev"},
        {20, 2, 999, "a WAV file of codec 999; to read it, install libsndfile1-dev"},
#endif
    };
    if (TEST("audio: a file that cannot be decoded is closed once, by us")) { // else other threads lose their files
        audio a;
        check_fails(audio_open(&a, check_file("empty.wav", "", 0), NULL), "empty.wav: not a WAV file");
        CHECK(a.f && fcntl(fileno(a.f), F_GETFD) != -1, "its descriptor is closed already");
        audio_close(&a);
    }
    if (TEST("wav: damaged headers are errors")) {
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            strbuf s = ZERO;
            wav_header(&s, &wav_kinds[1], 1, 16000, 0, 8);
            strbuf_add(&s, "abcdefgh");
            memcpy(s.at + bad[i].at, &bad[i].value, (size_t)bad[i].bytes);
            check_fails(reads(&s, s.n), bad[i].error);
            CHECK(strstr(slam_error(), "x.wav: ") == slam_error(), "%s", slam_error());
            strbuf_free(&s);
        }
    }
    if (TEST("wav: no channels, samples that are no audio, no file")) {
        static const float samples[] = {NAN, INFINITY, -INFINITY, 1e30f};
        strbuf s = ZERO;
        audio a;
        wav_header(&s, &wav_kinds[1], 0, 16000, 0, 8);
        strbuf_add(&s, "abcdefgh");
        check_fails(reads(&s, s.n), "x.wav: 0 channels of 16 bits in 0 bytes");
        for (int i = 0; i < 4; i++) {
            s.n = 0;
            wav_header(&s, &wav_kinds[4], 1, 16000, 0, 8);
            put(&s, 0, 4);
            strbuf_add_bytes(&s, &samples[i], 4);
            check_fails(reads(&s, s.n), "x.wav: a sample is ");
        }
        check_fails(reads(&s, 0), "not a WAV file");
        check_fails(audio_open(&a, check_path("absent.wav"), NULL), "absent.wav: cannot be opened");
        audio_close(&a);
        audio_close(&a);
        check_fails(audio_open(&a, check_path("."), NULL), "is a folder");
        audio_close(&a);
        strbuf_free(&s);
    }
    for (int k = 0; k < WAV_KINDS; k++) {
        if (!TEST("damage: wav, %s, cut at every byte, 5000 times changed", wav_kinds[k].name)) continue;
        strbuf s = ZERO, changed = ZERO;
        uint64_t state = 1;
        int refused = 0;
        wav_header(&s, &wav_kinds[k], 2, 16000, k % 2, (uint32_t)(2 * 5 * wav_bytes(&wav_kinds[k])));
        for (int i = 0; i < 10; i++) wav_put(&s, &wav_kinds[k], &state);
        CHECK(reads(&s, s.n), "undamaged: %s", slam_error());
        for (size_t n = 0; n < s.n; n++) check_fails(reads(&s, n), "x.wav: ");
        for (int round = 0; round < 5000; round++) {
            changed.n = 0;
            strbuf_add_bytes(&changed, s.at, s.n);
            for (uint64_t more = 1 + rng_below(&state, 4); more-- > 0;) {
                const size_t at =
                    rng_below(&state, rng_below(&state, 2) || s.n < 64 ? s.n : 64); // headers are where it hurts
                if (rng_below(&state, 4)) changed.at[at] = (char)(changed.at[at] ^ 1 << rng_below(&state, 8));
                else changed.at[at] = (char)rng_next(&state);
            }
            set_error("%s", "");
            if (reads(&changed, s.n)) continue;
            refused++;
            CHECK(slam_error()[0], "an error without a message");
        }
        CHECK(refused > 0 && refused < 5000, "%d refused", refused);
        strbuf_free(&s);
        strbuf_free(&changed);
    }
}

/* ---- audio files of other formats, and pipes ---- */

/* Writes the bytes into a pipe, which has room for them, and opens it by its path. */
static int open_pipe(audio *a, const strbuf *bytes) {
    int ends[2];
    char path[40];
    CHECK(pipe(ends) == 0 && write(ends[1], bytes->at, bytes->n) == (ssize_t)bytes->n && close(ends[1]) == 0,
          "no pipe");
    snprintf(path, sizeof path, "/dev/fd/%d", ends[0]);
    const int ok = audio_open(a, path, "line 7");
    close(ends[0]);
    return ok;
}

/* The file's bytes from a pipe are the same audio. */
static void check_pipe(const char *path) {
    strbuf bytes = read_file(path);
    size_t n = 0, n_piped = 0;
    float *x = slam_audio_load(path, &n), *piped = NULL;
    audio a;
    if (CHECK(x && bytes.n < 60000, "%s", slam_error()) && CHECK(open_pipe(&a, &bytes), "%s", slam_error())) {
        CHECK(audio_next_segment(&a, 0, &piped, &n_piped) == 1 && n == n_piped && !memcmp(x, piped, n * sizeof *x),
              "%zu samples, not %zu: %s", n_piped, n, slam_error());
        audio_close(&a);
    }
    free(x);
    free(piped);
    strbuf_free(&bytes);
}

/* What takes the place of a file that was not downloaded is an error with the remedy, whatever the file was to be. */
static void test_pointers(void) {
    static const char *const texts[][2] = {
        {"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n", "git lfs pull"},
        {"/annex/objects/SHA256E-s12345--4d7a21.wav\n", "git annex get"},
        {"<!doctype html>\n<html><head>", "is a web page, not the file itself"}};
    if (!TEST("files that were not downloaded: audio, npy, safetensors, shards, JSON")) return;
    for (int i = 0; i < 3; i++) {
        char *path = string_copy(check_file("pointer.bin", texts[i][0], strlen(texts[i][0])));
        shard s;
        float *x;
        size_t n, m;
        check_fails(slam_audio_load(path, &n), texts[i][1]);
        check_fails(npy_read(path, &x, &n, &m), texts[i][1]);
        check_fails(tensors_open(path), texts[i][1]);
        check_fails(shard_open(&s, path), texts[i][1]);
        check_fails(json_load(path), texts[i][1]);
        free(path);
    }
}

static void test_pipes(void) {
    if (TEST("audio: from a pipe")) {
        float *x = make_audio(20000, 22050, 4);
        audio a;
        strbuf none = ZERO;
        check_pipe(write_wav("pipe.wav", x, 20000, 22050));
        strbuf_add(&none, "nothing");
        check_fails(open_pipe(&a, &none), "line 7: not a WAV file");
        audio_close(&a);
        none.n = 0;
        check_fails(open_pipe(&a, &none), "line 7: not a WAV file");
        audio_close(&a);
        strbuf_free(&none);
        free(x);
    }
    if (TEST("audio: names of files that are audio")) {
        static const char *const read[] = {"a.wav", "b/c.d.FLAC", ".mp3", "a.sph", "a.Rf64"},
                                 *const counted[] = {"a.m4a", "b/c.WebM", "a.wav.raw"},
                                 *const others[] = {"wav", "a.wave", "a.wav/b", "a.", "a.txt", "a.flac.part"};
        for (int i = 0; i < 5; i++) CHECK(audio_extension(read[i]) < READ_EXTENSIONS, "%s", read[i]);
        for (int i = 0; i < 3; i++) {
            const int extension = audio_extension(counted[i]);
            CHECK(extension >= READ_EXTENSIONS && extension < AUDIO_EXTENSIONS, "%s", counted[i]);
        }
        for (int i = 0; i < 6; i++) CHECK(audio_extension(others[i]) == AUDIO_EXTENSIONS, "%s", others[i]);
    }
}

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
    for (size_t i = 0, step; i < n; i += step) { // some encoders fail with a long write
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
        double tolerance; // of samples, in the Euclidean norm; 0: only their number is compared
    } kinds[] = {{"a.flac", SF_FORMAT_FLAC | SF_FORMAT_PCM_16, 22050, 1, 0},
                 {"a.aiff", SF_FORMAT_AIFF | SF_FORMAT_PCM_16, 16000, 1, 0},
                 {"ulaw.wav", SF_FORMAT_WAV | SF_FORMAT_ULAW, 8000, 0, 0.03},
                 {"alaw.wav", SF_FORMAT_WAV | SF_FORMAT_ALAW, 8000, 0, 0.03},
                 {"ima.wav", SF_FORMAT_WAV | SF_FORMAT_IMA_ADPCM, 16000, 0, 0.2},
                 {"a.ogg", SF_FORMAT_OGG | SF_FORMAT_VORBIS, 44100, 0, 0},
                 {"a.opus", SF_FORMAT_OGG | 0x0064, 48000, 0, 0},
                 {"a.mp3", 0x230000 | 0x0082, 44100, 0, 0}};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        if (!TEST("audio: %s", kinds[k].name)) continue;
        const int rate = kinds[k].rate;
        const size_t n = (size_t)rate;
        float *x = make_audio(n, rate, k);
        char *path = NULL;
        const char *written = write_sound(kinds[k].name, kinds[k].format, x, n, rate);
        if (!written) {
            printf("skip %s: this libsndfile does not write it\n", kinds[k].name);
            free(x);
            continue;
        }
        path = string_copy(written);
        const recording got = read_all(path, 5000), wav = read_all(write_wav("same.wav", x, n, rate), 5000);
        CHECK(got.rate == rate && got.n + 3000 > n && got.n < n + 3000, "%zu frames at %d, expected about %zu: %s",
              got.n, got.rate, n, slam_error());
        if (kinds[k].exact) CHECK(got.n == n && !memcmp(got.x, wav.x, n * sizeof *x), "not the frames of the WAV file");
        if (kinds[k].tolerance && got.n >= n) check_close("frames", got.x, wav.x, n, kinds[k].tolerance);
        check_pipe(path);
        if (k == 0) { // what an interrupted download leaves, and what a bad disk does
            strbuf bytes = read_file(path);
            uint64_t state = 5;
            check_fails(reads(&bytes, bytes.n / 2), "x.wav: ");
            check_fails(reads(&bytes, 40), "x.wav: ");
            for (int i = 0; i < 100; i++) {
                for (int j = 0; j < 4; j++) bytes.at[rng_below(&state, i % 2 ? bytes.n : 200)] = (char)rng_next(&state);
                reads(&bytes, bytes.n);
            }
            strbuf_free(&bytes);
        }
        free(got.x);
        free(wav.x);
        free(path);
        free(x);
    }
    if (TEST("audio: an unknown format")) {
        audio a;
        check_fails(audio_open(&a, check_file("x.mp3", "none of the formats", 19), NULL),
                    "x.mp3: not a WAV file, and libsndfile cannot read it: ");
        audio_close(&a);
    }
}
#else
static void test_formats(void) {
    if (TEST("audio: what libsndfile would read")) {
        static const char *const starts[] = {"fLaC....", "\xff\xfb..", "ID3\x04", "none"};
        audio a;
        for (int i = 0; i < 4; i++) {
            check_fails(audio_open(&a, check_file("x.flac", starts[i], strlen(starts[i])), NULL),
                        "x.flac: not a WAV file");
            CHECK(strstr(slam_error(), "install libsndfile1-dev and build again"), "%s", slam_error());
            audio_close(&a);
        }
    }
}
#endif

/* ---- segments ---- */

/* Memory does not grow with the file; call it first. */
static void test_memory(void) {
#if !defined __SANITIZE_ADDRESS__ && defined __linux__
    if (TEST("segments: half an hour in the memory of a minute")) {
        enum { RATE = 16000, SECONDS = 1800 };
        struct rusage before, after;
        const float none = 0;
        float *x;
        size_t n, sum = 0, segments = 0;
        audio a;
        const uint32_t bytes = 2 * RATE * SECONDS;
        const char *path = write_wav("long.wav", &none, 1, RATE);
        const int fd = open(path, O_RDWR);
        CHECK(fd >= 0 && pwrite(fd, &bytes, 4, 40) == 4 && ftruncate(fd, 44 + (off_t)bytes) == 0, "a long file");
        close(fd);
        getrusage(RUSAGE_SELF, &before);
        CHECK(audio_open(&a, path, NULL), "%s", slam_error());
        for (; audio_next_segment(&a, 60, &x, &n) == 1; segments++, sum += n) free(x);
        audio_close(&a);
        getrusage(RUSAGE_SELF, &after);
        CHECK(sum == RATE * SECONDS && segments > 30 && segments < 40, "%zu samples in %zu segments", sum, segments);
        check_near("MB that it took", (double)(after.ru_maxrss - before.ru_maxrss) / 1024, 0, 20);
        unlink(path);
    }
#endif
}

static void test_segments(void) {
    enum { RATE = 8000, N = 47 * RATE };
    float *x = make_audio(N, RATE, 3), *y, *alone;
    size_t n, n_alone;
    audio a;
    for (int k = 0; k < 400; k++) // quiet near 8.4 s and 16.9 s, and nowhere else
        x[(size_t)(8.4 * RATE) + (size_t)k] = x[(size_t)(16.9 * RATE) + (size_t)k] = 0;
    char *path = string_copy(write_wav("segments.wav", x, N, RATE));
    if (TEST("segments: split where it is quiet, each as a file of its own")) {
        double end = 0;
        int count = 0, more = audio_open(&a, path, NULL);
        for (; more > 0 && (more = audio_next_segment(&a, 10, &y, &n)) == 1; count++) {
            const size_t from = (size_t)(a.start * RATE + 0.5), to = (size_t)(a.end * RATE + 0.5);
            CHECK(a.start == end && a.end - a.start <= 10 && a.last == (a.end == 47), "segment %d from %g to %g", count,
                  a.start, a.end);
            if (count < 2) check_near("the end of a segment", a.end, count ? 16.925 : 8.425, 0.02);
            end = a.end;
            alone = slam_audio_load(write_wav("one.wav", x + from, to - from, RATE), &n_alone);
            CHECK(n == n_alone && !memcmp(y, alone, n * sizeof *y), "segment %d is not what a file of its own would be",
                  count);
            free(alone);
            free(y);
        }
        CHECK(more == 0 && end == 47 && count == 6, "%d segments, up to %g s: %s", count, end, slam_error());
        audio_close(&a);
    }
    if (TEST("segments: the whole file if it is not longer than the limit")) {
        for (int limit = 0; limit <= 47; limit += 47) {
            CHECK(audio_open(&a, path, NULL) && audio_next_segment(&a, limit, &y, &n) == 1, "%s", slam_error());
            CHECK(n == 2 * N && a.start == 0 && a.end == 47 && a.last, "%zu samples", n);
            CHECK(audio_next_segment(&a, limit, &alone, &n) == 0, "no end");
            audio_close(&a);
            free(y);
        }
    }
    if (TEST("segments: limits below 20 ms, no audio")) {
        const double limits[] = {1e-9, 0.001, 0.019, 0.02, 0.021, 0.05};
        write_wav("short.wav", x, 900, RATE);
        for (int i = 0; i < 6; i++) {
            double end = 0;
            CHECK(audio_open(&a, check_path("short.wav"), NULL), "%s", slam_error());
            while (audio_next_segment(&a, limits[i], &y, &n) == 1) {
                CHECK(a.start == end && a.end > end && a.end - end <= fmax(limits[i], 1.0 / RATE) + 1e-12,
                      "from %g to %g", a.start, a.end);
                end = a.end;
                free(y);
            }
            check_near("end", end, 900.0 / RATE, 1e-9);
            audio_close(&a);
        }
        check_fails(slam_audio_load(write_wav("empty.wav", x, 0, 16000), &n), "empty.wav: it holds no audio");
        check_fails(slam_audio_load(write_wav("slow.wav", x, 10, 500), &n), "500 samples per second");
        check_fails(slam_audio_load(write_wav("zero.wav", x, 10, 0), &n), "zero.wav: 0 samples per second");
        check_fails(slam_audio_load(write_wav("fast.wav", x, 10, -1), &n), "fast.wav: 2147483647 samples per second");
    }
    free(path);
    free(x);
}

/* ---- resampler ---- */

/* 20 log10 of the amplitude of `hz` in x at 16 kHz, and of all else in it (rms * sqrt 2); the delay in seconds */
static void tone_levels(const float *x, int n, double hz, double *tone, double *rest, double *late) {
    double cc = 0, ss = 0, cs = 0, xc = 0, xs = 0, xx = 0;
    for (int k = 0; k < n; k++) {
        const double c = cos(2 * PI * hz * k / 16000), s = sin(2 * PI * hz * k / 16000);
        cc += c * c;
        ss += s * s;
        cs += c * s;
        xc += x[k] * c;
        xs += x[k] * s;
    }
    const double det = cc * ss - cs * cs, a = (xs * cc - xc * cs) / det, b = (xc * ss - xs * cs) / det;
    for (int k = 0; k < n; k++) {
        const double e = x[k] - a * sin(2 * PI * hz * k / 16000) - b * cos(2 * PI * hz * k / 16000);
        xx += e * e;
    }
    *tone = 20 * log10(sqrt(a * a + b * b));
    *rest = 10 * log10(2 * xx / n + 1e-30);
    *late = fabs(atan2(b, a)) / (2 * PI * hz);
}

/* out = the resampled sine of amplitude 1, without what is near its ends; its first sample is at time 0 */
static int resampled_sine(int rate, double hz, float *out) {
    const int n_out = 2000, margin = 400;
    const int before = margin * rate / 16000 / 160 * 160, n = before + (n_out + margin) * (rate / 100) / 160 + 1;
    const uint64_t skip = (uint64_t)before * 16000 / (uint64_t)rate;
    size_t n_all;
    float *in = NEW(float, (size_t)n);
    for (int i = 0; i < n; i++) in[i] = (float)sin(2 * PI * hz * ((double)i / rate - (double)skip / 16000));
    float *all = slam_resample(in, (size_t)n, rate, &n_all);
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
        const double lower = rates[i] < 16000 ? rates[i] / 2.0 : 8000;
        double ripple = 0, image = -300, alias = -300, late = 0;
        for (double f = 0.01; f < 0.9001; f += 0.01) { // steps, each held long enough to be measured
            double tone, rest, time;
            const int n = resampled_sine(rates[i], f * lower, out);
            tone_levels(out, n, f * lower, &tone, &rest, &time);
            ripple = fmax(ripple, fabs(tone));
            image = fmax(image, rest);
            late = fmax(late, time);
        }
        for (double hz = 8000; rates[i] > 16000 && hz < 0.5 * rates[i]; hz += 67) {
            double square = 0;
            const int n = resampled_sine(rates[i], hz, out);
            for (int k = 0; k < n; k++) square += (double)out[k] * out[k];
            alias = fmax(alias, 10 * log10(2 * square / n + 1e-30));
        }
        check_near("ripple in dB up to 0.9 of the lower Nyquist frequency", ripple, 0, 0.01);
        check_near("delay in seconds", late, 0, 1e-8);
        CHECK(image <= -100, "images are at %.1f dB, expected below -100", image);
        CHECK(alias <= -100, "aliases are at %.1f dB, expected below -100", alias);
    }
    if (TEST("resampler: lengths, a constant, 16 kHz unchanged")) {
        static const int odd[] = {1000, 7999, 15999, 16000, 16001, 44099, 192000};
        for (int i = 0; i < 7; i++) {
            const size_t rate = (size_t)odd[i], n[] = {0, 1, 3 * rate, rate};
            const size_t expected[] = {0, (16000 + rate - 1) / rate, 48000, 16000};
            float *in = NEW(float, 3 * rate);
            for (size_t k = 0; k < 3 * rate; k++) in[k] = odd[i] == 16000 ? (float)k : 0.5f;
            for (int j = 0; j < 4; j++) {
                size_t n_out;
                float *got = slam_resample(in, n[j], odd[i], &n_out);
                CHECK(got && n_out == expected[j], "%d Hz: %zu of %zu samples", odd[i], n_out, n[j]);
                if (odd[i] == 16000) CHECK(!memcmp(in, got, n_out * sizeof *in), "16 kHz is changed");
                else
                    for (size_t k = n_out / 4; n[j] > 1 && k < 3 * n_out / 4; k += 97)
                        check_near("a constant", got[k], 0.5, 2e-6);
                free(got);
            }
            free(in);
        }
    }
    /* Beyond its ends the signal is 0: the same as with a second of zeros, a whole number of inputs and outputs, on each side. */
    static const int end_rates[] = {8000, 11025, 44100, 47999, 48000, 96000}, lengths[] = {1, 2, 40, 1234, 5000};
    for (int i = 0; i < 6; i++) {
        if (!TEST("resampler: the first and last outputs at %d Hz", end_rates[i])) continue;
        const size_t rate = (size_t)end_rates[i];
        for (int k = 0; k < 5; k++) {
            const size_t n = (size_t)lengths[k], padded = n + 2 * rate;
            size_t n_all, n_out;
            uint64_t seed = 61;
            float *in = NEW(float, padded);
            for (size_t t = 0; t < n; t++) in[rate + t] = (float)rng_normal(&seed);
            float *all = slam_resample(in, padded, end_rates[i], &n_all);
            float *got = slam_resample(in + rate, n, end_rates[i], &n_out);
            for (size_t t = 0; t < n_out; t++) check_near("an output", got[t], all[16000 + t], 3e-6);
            free(in), free(all), free(got);
        }
    }
    if (TEST("resampler: rates that are errors")) {
        const float in[2] = {0};
        size_t n;
        check_fails(slam_resample(in, 2, 999, &n), "expected 1000 to 192000");
        check_fails(slam_resample(in, 2, -5, &n), "expected 1000 to 192000");
        check_fails(slam_resample(in, 2, 192001, &n), "expected 1000 to 192000");
    }
}

/* ---- MFCC ---- */

static slam_tokenizer *mfcc_of(int rate, int normalize) {
    slam_unit_config c = slam_unit_config_default();
    c.rate = rate;
    c.normalize = normalize;
    return slam_tokenizer_load(NULL, &c, NULL);
}

static int features_of(const slam_tokenizer *f, const float *x, size_t n, float *out) {
    slam_recording r = {x, n, NULL, ZERO};
    const int ok = slam_units_encode(f, &r, 1);
    if (ok) memcpy(out, r.features, r.units.frames * (size_t)f->width * sizeof *out);
    free(r.features);
    return ok;
}

static void test_mfcc(void) {
    for (int i = 0; i < 4; i++) {
        const int rate = i < 2 ? 25 : 50, k = i % 2;
        if (!TEST("mfcc: as python_speech_features, %d frames per second, signal %d", rate, k)) continue;
        char name[32];
        tensors *fixture = tensors_open("test/fixtures/mfcc.safetensors");
        if (!CHECK(fixture, "%s", slam_error())) return;
        snprintf(name, sizeof name, "signal.%d", k);
        const tensor *signal = tensors_find(fixture, name);
        snprintf(name, sizeof name, "mfcc%d.%d", rate, k);
        const tensor *wanted = tensors_find(fixture, name);
        slam_tokenizer *f = mfcc_of(rate, 0);
        if (CHECK(signal && wanted && f && f->width == 39 && f->mfcc->step == 16000 / rate, "the fixture has no %s",
                  name) &&
            CHECK(tokenizer_frames(f, signal->count) == wanted->shape[0], "%zu frames, expected %zu",
                  tokenizer_frames(f, signal->count), wanted->shape[0])) {
            float *x = NEW(float, signal->count), *got = NEW(float, wanted->count),
                  *expected = NEW(float, wanted->count);
            for (size_t t = 0; t < signal->count; t++) {
                int16_t v;
                memcpy(&v, signal->data + 2 * t, 2);
                x[t] = (float)v / 32768;
            }
            CHECK(tensor_floats(wanted, expected, 0, wanted->count), "%s", slam_error());
            CHECK(features_of(f, x, signal->count, got), "%s", slam_error());
            for (size_t t = 0; t < wanted->count; t++) check_near(name, got[t], expected[t], 1e-3);
            free(x), free(got), free(expected);
        }
        slam_tokenizer_free(f);
        tensors_close(fixture);
    }
    if (TEST("mfcc: frames of short, silent and loud audio; normalised; several at once")) {
        slam_tokenizer *plain = mfcc_of(25, 0), *normal = mfcc_of(25, 1);
        static const size_t lengths[][2] = {{0, 0}, {1, 1}, {1024, 1}, {1025, 2}, {1664, 2}, {1665, 3}};
        for (int i = 0; i < 6; i++)
            CHECK(tokenizer_frames(plain, lengths[i][0]) == lengths[i][1], "frames of %zu samples", lengths[i][0]);
        float zero[3000] = {0}, got[39 * 5], a[39 * 5], b[39 * 5], loud[3000], *x = make_audio(3000, 16000, 3);
        CHECK(features_of(plain, zero, 3000, got), "%s", slam_error());
        check_near("energy of silence", got[0], log(2.220446049250313e-16), 1e-5);
        for (int i = 13; i < 39; i++) check_near("differences in silence", got[i], 0, 0);
        CHECK(features_of(plain, zero, 0, got), "%s", slam_error());
        for (int i = 0; i < 3000; i++) loud[i] = 0.25f + 10 * x[i];
        CHECK(features_of(normal, x, 3000, a) && features_of(normal, loud, 3000, b), "%s", slam_error());
        check_close("normalised, of another level", a, b, 39 * 4, 1e-4);
        slam_recording r[] = {
            {x, 2000, NULL, ZERO}, {loud, 3000, NULL, ZERO}, {zero, 0, NULL, ZERO}, {x, 3000, NULL, ZERO}};
        CHECK(slam_units_encode(plain, r, 4), "%s", slam_error());
        CHECK(features_of(plain, x, 3000, a) && !memcmp(a, r[3].features, 39 * 5 * sizeof *a) &&
                  !memcmp(a, r[0].features, 13 * sizeof *a) && r[3].units.frames == 5,
              "not as alone");
        for (int i = 0; i < 4; i++) free(r[i].features);
        check_fails(mfcc_of(30, 0), "expected 25 or 50");
        free(x);
        slam_tokenizer_free(plain);
        slam_tokenizer_free(normal);
    }
}

/* ---- k-means ---- */

/* n frames around K places that are far apart; the place of frame i is i % K. */
static float *make_clusters(size_t n, int D, int K, float *place, uint64_t seed) {
    float *x = NEW(float, n *(size_t)D);
    for (int i = 0; i < K * D; i++) place[i] = (float)(20 * rng_normal(&seed));
    for (size_t i = 0; i < n * (size_t)D; i++)
        x[i] = place[i / (size_t)D % (size_t)K * (size_t)D + i % (size_t)D] + (float)(0.5 * rng_normal(&seed));
    return x;
}

UNFUSED static float squared_distance(const float *a, const float *b, int D) {
    float sum = 0;
    for (int d = 0; d < D; d++) sum += (a[d] - b[d]) * (a[d] - b[d]);
    return sum;
}

static int nearest_to(const float *x, const float *places, int K, int D) {
    int nearest = 0;
    for (int k = 1; k < K; k++)
        if (squared_distance(x, places + k * D, D) < squared_distance(x, places + nearest * D, D)) nearest = k;
    return nearest;
}

/* Counts calls, and cancels when *left of them are over. */
static int cancel_soon(void *context, const slam_progress *p) {
    CHECK(!strcmp(p->stage, "fit") && p->total == 0, "stage %s", p->stage);
    return (*(int *)context)-- > 0;
}

static void test_kmeans(void) {
    enum { N = 12345, D = 39, K = 37 };
    static float place[K * D], found[K * D], again[K * D];
    slam_kmeans_report r, r2;
    float *x = make_clusters(N, D, K, place, 5);
    if (TEST("k-means: finds clusters that are there")) {
        int taken[K] = {0};
        CHECK(kmeans_fit(x, N, D, K, 1, found, NULL, NULL, &r), "%s", slam_error());
        for (int k = 0; k < K; k++) {
            const int nearest = nearest_to(found + k * D, place, K, D);
            taken[nearest]++;
            check_near("distance of a centroid to its place",
                       sqrt(squared_distance(found + k * D, place + nearest * D, D)), 0, 0.4);
        }
        for (int k = 0; k < K; k++) CHECK(taken[k] == 1, "cluster %d has %d centroids", k, taken[k]);
        check_near("inertia", r.inertia, 0.25 * D, 0.2);
        CHECK(r.dead == 0 && r.frames == N && r.passes >= 2, "%d dead, %zu frames, %d passes", r.dead, r.frames,
              r.passes);
    }
    if (TEST("k-means: the same for any number of threads, different for another seed; cancelled")) {
        const int threads = omp_get_max_threads();
        int left = 103;
        omp_set_num_threads(1);
        CHECK(kmeans_fit(x, N, D, K, 9, found, NULL, NULL, &r), "%s", slam_error());
        omp_set_num_threads(5);
        CHECK(kmeans_fit(x, N, D, K, 9, again, NULL, NULL, &r2), "%s", slam_error());
        CHECK(!memcmp(found, again, sizeof found) && r.inertia == r2.inertia, "one thread and five differ");
        CHECK(kmeans_fit(x, N, D, K, 10, again, NULL, NULL, &r2) && memcmp(found, again, sizeof found),
              "seeds 9 and 10 give the same");
        CHECK(kmeans_fit(x, N, D, K, 9, again, cancel_soon, &left, &r2) && left == 3 - r2.passes,
              "%d calls left, %d passes", left, r2.passes);
        for (left = 0; left < 102; left += 101) {
            int calls = left;
            check_fails(kmeans_fit(x, N, D, K, 9, again, cancel_soon, &calls, &r2), "stopped during k-means");
        }
        omp_set_num_threads(threads);
    }
    if (TEST("k-means: fewer different frames than centroids, fewer frames")) {
        float few[60 * 2];
        for (int i = 0; i < 60; i++) few[2 * i] = (float)(i % 3), few[2 * i + 1] = 1;
        CHECK(kmeans_fit(few, 60, 2, 5, 0, found, NULL, NULL, &r), "%s", slam_error());
        CHECK(r.dead == 2 && r.inertia == 0 && r.passes == 1, "%d dead, inertia %g, %d passes", r.dead, r.inertia,
              r.passes);
        check_fails(kmeans_fit(few, 4, 2, 5, 0, found, NULL, NULL, &r),
                    "4 frames, expected at least one per centroid (5)");
        few[7] = NAN;
        check_fails(kmeans_fit(few, 60, 2, 5, 0, found, NULL, NULL, &r), "frame 3 has a number that is not finite");
    }
    if (TEST("k-means: a centroid without frames moves to a far one")) {
        float points[1000] = {0}; // the first 300 of the permutation, all 0, seed the three centroids
        points[7] = 100, points[500] = 60;
        CHECK(kmeans_fit(points, 1000, 1, 3, 0, found, NULL, NULL, &r), "%s", slam_error());
        CHECK(r.dead == 0 && r.inertia == 0, "%d dead, inertia %g", r.dead, r.inertia);
        CHECK(found[0] == 0 && found[1] == 60 && found[2] == 100, "%g %g %g", (double)found[0], (double)found[1],
              (double)found[2]);
    }
    free(x);
}

/* ---- the unit tokenizer ---- */

static slam_tokenizer *make_tokenizer(int rate, int dedup, int K, uint64_t seed) {
    slam_unit_config c = slam_unit_config_default();
    c.rate = rate;
    c.dedup = dedup;
    slam_tokenizer *t = slam_tokenizer_load(NULL, &c, NULL);
    float *x = t->centroids = NEW(float, (size_t)K * 39);
    for (int i = 0; i < K * 39; i++) x[i] = (float)(i % 39 ? 5 * rng_normal(&seed) : -10 * rng_uniform(&seed));
    if (tokenizer_complete(t, "centroids", (size_t)K, 39)) return t;
    slam_tokenizer_free(t);
    return NULL;
}

static int same_units(const slam_units *a, const slam_units *b) {
    return a->n == b->n && a->frames == b->frames && a->samples == b->samples &&
           !memcmp(a->unit, b->unit, a->n * sizeof(int)) && !memcmp(a->duration, b->duration, a->n * sizeof(int));
}

static void test_units(void) {
    if (TEST("units: the nearest centroid, of equal ones the first")) {
        static float centroids[70 * 39], x[39 * 50];
        uint64_t seed = 3;
        int unit[50];
        float distance[50];
        for (int i = 0; i < 70 * 39; i++) centroids[i] = (float)(int)(4 * rng_normal(&seed));
        for (int d = 0; d < 39; d++) centroids[66 * 39 + d] = centroids[5 * 39 + d]; // the same place twice
        for (int i = 0; i < 50 * 39; i++) x[i] = i < 39 ? centroids[5 * 39 + i] : (float)(int)(4 * rng_normal(&seed));
        centroids_nearest(x, NULL, 50, centroids, 70, 39, unit, distance);
        CHECK(unit[0] == 5 && distance[0] == 0, "unit %d at %g, expected 5 at 0", unit[0], (double)distance[0]);
        for (int i = 0; i < 50; i++) {
            const int nearest = nearest_to(x + 39 * i, centroids, 70, 39);
            CHECK(unit[i] == nearest && distance[i] == squared_distance(x + 39 * i, centroids + 39 * nearest, 39),
                  "frame %d: %d, expected %d", i, unit[i], nearest);
        }
    }
    if (TEST("units: repeats become one with a duration")) {
        int unit[] = {4, 4, 4, 1, 4, 4, 0}, duration[7], same[] = {4, 4, 1};
        const int units[] = {4, 1, 4, 0}, durations[] = {3, 1, 2, 1};
        CHECK(units_merge(unit, duration, 7, 1) == 4 && !memcmp(unit, units, sizeof units) &&
                  !memcmp(duration, durations, sizeof durations),
              "merged");
        CHECK(units_merge(same, duration, 3, 0) == 3 && same[1] == 4 && duration[0] == 1, "not merged");
        CHECK(units_merge(same, duration, 0, 1) == 0, "none");
    }
    if (TEST("units: of one sample, of silence, of several recordings and any number of threads")) {
        const int threads = omp_get_max_threads();
        slam_tokenizer *t = make_tokenizer(25, 1, 20, 1);
        const float one = 0.5f, zero[20000] = {0};
        float *x = make_audio(60000, 16000, 8);
        slam_recording r[] = {{&one, 1, NULL, ZERO},     {zero, 20000, NULL, ZERO}, {zero, 0, NULL, ZERO},
                              {x, 60000, NULL, ZERO},    {x, 16000, NULL, ZERO},    {x + 100, 1024, NULL, ZERO},
                              {x + 7, 30001, NULL, ZERO}};
        CHECK(slam_units_encode(t, r, 7), "%s", slam_error());
        CHECK(r[0].units.n == 1 && r[0].units.duration[0] == 1 && r[0].units.frames == 1, "of one sample");
        CHECK(r[1].units.n == 1 && (size_t)r[1].units.duration[0] == r[1].units.frames && r[1].units.samples == 20000,
              "%zu units of silence", r[1].units.n);
        CHECK(r[2].units.n == 0 && r[2].units.frames == 0 && r[3].units.n > 1, "of nothing");
        omp_set_num_threads(1);
        for (int i = 0; i < 7; i++) {
            slam_recording alone = r[i];
            CHECK(slam_units_encode(t, &alone, 1) && same_units(&alone.units, &r[i].units),
                  "recording %d: other units alone", i);
            slam_units_free(&alone.units);
            slam_units_free(&r[i].units);
        }
        omp_set_num_threads(threads);
        free(x);
        slam_tokenizer_free(t);
    }
}

/* The tokenizer of km.npy and km.json. */
static slam_tokenizer *load(const char *km_npy, const slam_unit_config *otherwise, slam_ops *ops) {
    slam_unit_config c = *otherwise;
    return slam_unit_config_load(&c, km_npy) ? slam_tokenizer_load(km_npy, &c, ops) : NULL;
}

static void test_tokenizer(void) {
    if (TEST("tokenizer: the fingerprint is that of settings and centroids")) {
        slam_tokenizer *const all[] = {make_tokenizer(25, 1, 20, 1), make_tokenizer(25, 1, 20, 1),
                                       make_tokenizer(50, 1, 20, 1), make_tokenizer(25, 0, 20, 1),
                                       make_tokenizer(25, 1, 20, 2), make_tokenizer(25, 1, 19, 1)};
        CHECK(all[0]->fingerprint == 2335604442u, "%u is not that of version 0.1", (unsigned)all[0]->fingerprint);
        for (int i = 1; i < 6; i++)
            CHECK((all[i]->fingerprint == all[0]->fingerprint) == (i == 1), "tokenizers 0 and %d: %u and %u", i,
                  (unsigned)all[0]->fingerprint, (unsigned)all[i]->fingerprint);
        for (int i = 0; i < 6; i++) slam_tokenizer_free(all[i]);
        check_fails(make_tokenizer(25, 1, 0, 1), "has shape (0, 39), expected 1 to 65534 centroids");
        check_fails(make_tokenizer(25, 1, 65535, 1), "has shape (65535, 39), expected 1 to 65534 centroids");
    }
    if (TEST("tokenizer: km.npy and km.json")) {
        slam_unit_config other = slam_unit_config_default();
        const slam_kmeans_report report = {5000, 2.5, 3, 0};
        slam_tokenizer *t = make_tokenizer(50, 0, 20, 1), *back;
        char *path = string_copy(check_path("km.npy"));
        t->config.origin = 0x123456789abcdef0u;
        t->config.channel = 2;
        CHECK(tokenizer_save(t, path, &report), "%s", slam_error());
        strbuf text = read_file(check_path("km.json"));
        char expected[300];
        snprintf(
            expected, sizeof expected,
            "{\n  \"features\": \"mfcc\",\n  \"hubert\": \"\",\n  \"units\": 20,\n  \"width\": 39,\n  \"frames\": 5000,\n  "
            "\"inertia\": 2.5,\n  \"rate\": 50,\n  \"normalize\": false,\n  \"dedup\": false,\n  \"layer\": 11,\n  "
            "\"pad\": 40,\n  \"channel\": 2,\n  \"fingerprint\": %u,\n  \"origin\": \"123456789abcdef0\"\n}\n",
            (unsigned)t->fingerprint);
        CHECK(text.n && !strcmp(text.at, expected), "%s", text.at);
        strbuf_free(&text);
        other = slam_unit_config_default();
        if (CHECK(back = load(path, &other, NULL), "%s", slam_error())) {
            const slam_unit_config *c = &back->config;
            CHECK(back->fingerprint == t->fingerprint && c->rate == 50 && !c->dedup && back->K == 20 && c->channel == 2,
                  "not what was written");
            slam_tokenizer_free(back);
        }
        static const char *const damaged[][2] = {
            {"{\"features\": \"whisper\"}", "'features' is \"whisper\""},
            {"{\"features\": \"hubert\", \"hubert\": \"none\"}", "none: HuBERT needs a device"},
            {"{\"features\": \"mfcc\", \"rate\": 30}", "30 frames per second, expected 25 or 50"},
            {"{\"features\": \"mfcc\", \"rate\": 0}", "'rate' is 0"},
            {"{\"features\": \"mfcc\", \"rate\": 25, \"normalize\": 3}", "expected true or false"},
            {"{\"features\": \"mfcc\", \"fingerprint\": 5}", "do not belong together"},
            {"{\"features\": \"mfcc\", \"channel\": -1}", "'channel' is -1"},
            {"{\"features\": \"mfcc\", \"pad\": 0.5}", "'pad' is 0.5"},
            {"{\"features\": ", "km.json"},
            {"[]", "'features' is \"\""}};
        for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
            check_file("km.json", damaged[i][0], strlen(damaged[i][0]));
            check_fails(load(path, &other, NULL), damaged[i][1]);
        }
        unlink(check_path("km.json"));
        if (CHECK(back = load(path, &other, NULL), "%s", slam_error()))
            CHECK(back->config.rate == 25 && !back->config.channel && back->config.pad == 40, "the caller's settings");
        slam_tokenizer_free(back);
        const float wrong[12] = {0};
        CHECK(npy_write(path, wrong, 3, 4), "%s", slam_error());
        check_fails(load(path, &other, NULL), "has shape (3, 4)");
        for (int i = 0; i < 2; i++) { // a pickle of scikit-learn, plain and compressed: how to convert it
            check_file("km.npy", i ? "\x78\x9c\x8d\x54\x4d\x6f" : "\x80\x04\x95\x0a\x02\x00", 6);
            check_fails(load(path, &other, NULL), "numpy.save('km.npy', joblib.load('");
        }
        slam_tokenizer_free(t);
        free(path);
    }
}

int main(void) {
    test_memory();
    test_wav_values();
    test_channels();
    test_wav_chunks();
    test_wav_damaged();
    test_pipes();
    test_pointers();
    test_formats();
    test_segments();
    test_resampler();
    test_mfcc();
    test_kmeans();
    test_units();
    test_tokenizer();
    return check_end();
}
