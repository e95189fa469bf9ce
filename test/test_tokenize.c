/* From files to units: lists of audio, text that voices synthesise, pairs, lines of units; token shards and lines, stopped
   and resumed; fits. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

/* ---- what the tests share ---- */

/* A WAV file of n samples that change: tones that jump, over noise. */
static const char *make_wav(const char *name, size_t n, int rate, uint64_t seed) {
    const uint32_t head[11] = {0x46464952,       (uint32_t)(36 + 2 * n), 0x45564157,         0x20746d66,   16,
                               1 | 1 << 16,      (uint32_t)rate,         (uint32_t)rate * 2, 2 | 16 << 16, 0x61746164,
                               (uint32_t)(2 * n)};
    strbuf s = ZERO;
    double hz = 0;
    strbuf_add_bytes(&s, head, sizeof head);
    for (size_t i = 0; i < n; i++) {
        if (i % ((size_t)rate / 10) == 0) hz = 100 + 2000 * rng_uniform(&seed);
        const double x = 0.5 * sin(2 * PI * hz * (double)i / rate) + 0.02 * rng_normal(&seed);
        const int16_t sample = (int16_t)lrint(32767 * x);
        strbuf_add_bytes(&s, &sample, 2);
    }
    const char *path = check_file(name, s.at, s.n);
    strbuf_free(&s);
    return path;
}

static slam_tokenizer *make_tokenizer(uint64_t seed) {
    const slam_unit_config c = slam_unit_config_default();
    slam_tokenizer *t = slam_tokenizer_load(NULL, &c, NULL);
    float *x = t->centroids = NEW(float, 20 * 39);
    for (int i = 0; i < 20 * 39; i++) x[i] = (float)(i % 39 ? 5 * rng_normal(&seed) : -10 * rng_uniform(&seed));
    CHECK(tokenizer_complete(t, "centroids", 20, 39), "%s", slam_error());
    return t;
}

static void check_same_file(const char *a, const char *b) {
    strbuf ta = read_file(a), tb = read_file(b);
    CHECK(ta.n == tb.n && ta.n > 0 && !memcmp(ta.at, tb.at, ta.n), "%s (%zu bytes) and %s (%zu) differ", a, ta.n, b,
          tb.n);
    strbuf_free(&ta);
    strbuf_free(&tb);
}

/* The file is `text`, or begins with it. */
static void check_text(const char *path, const char *text, int begins) {
    strbuf s = read_file(path);
    CHECK(s.n && (begins ? !strncmp(s.at, text, strlen(text)) : !strcmp(s.at, text)), "%.500s, expected %.500s", s.at,
          text);
    strbuf_free(&s);
}

static int leftovers(const char *out) {
    int n = 0;
    for (int i = 0; i < 2; i++) {
        char *path = string_print("%s.%s", out, i ? "journal" : "partial");
        n += path_exists(path);
        free(path);
    }
    return n;
}

/* The loop of tokenize.c, stopped after `most` inputs. */
static int tokenize(const slam_tokenizer *t, const slam_inputs *in, const char *out, int audio_repr, size_t most,
                    slam_writer *w) {
    const slam_item *item;
    const char *skipped;
    int more = 1;
    if (!slam_writer_open(w, out, in, t, audio_repr, 60)) return 0;
    slam_reader *r = slam_reader_open(in, t, in->first + w->inputs);
    for (size_t n = 0; n < most && more > 0 && (more = slam_reader_next(r, &item, &skipped)) > 0; n += item != NULL) {
        CHECK(item || !skipped, "skipped without an item");
        if (item && !slam_writer_add(w, item)) more = -1;
    }
    slam_reader_close(r);
    return slam_writer_close(w, more >= 0);
}

static slam_inputs lines_of(int kind, const char *path) {
    slam_inputs in = ZERO;
    CHECK(slam_inputs_open(&in, kind, &path, 1), "%s", slam_error());
    return in;
}

/* Whole by one thread, and by three stopped again and again: the same bytes and counts. */
static void check_stops(const slam_tokenizer *t, slam_inputs *in, const char *name, int audio_repr, slam_writer *w) {
    const int threads = omp_get_max_threads();
    const char *end = strrchr(name, '.');
    char *whole = string_copy(check_path(name)), *parts = string_print("%s.parts%s", whole, end);
    char *partial = string_print("%s.partial", parts);
    slam_writer part;
    size_t stops = 0;
    omp_set_num_threads(1);
    CHECK(tokenize(t, in, whole, audio_repr, SIZE_MAX, w), "%s", slam_error());
    omp_set_num_threads(3);
    do {
        if (!CHECK(tokenize(t, in, parts, audio_repr, 5, &part), "%s", slam_error())) break;
        if (++stops == 3 && part.inputs < in->end) { // a kill after a rename
            char path[PATH_MAX];
            CHECK(rename(partial, w->binary ? shard_path(path, parts, part.shards + 1) : parts) == 0, "rename");
        }
        if (stops != 2) continue;
        FILE *f = fopen(partial, "ab"); // a kill leaves more than the journal counts
        CHECK(f && fputs("half a docum", f) >= 0 && fclose(f) == 0, "write");
        in->end--;
        slam_writer other;
        check_fails(tokenize(t, in, parts, audio_repr, 5, &other), "other files or settings");
        in->end++;
    } while (part.inputs < in->end);
    omp_set_num_threads(threads);
    CHECK(stops > 2, "stopped %zu times", stops);
    CHECK(part.failed == w->failed && part.repetitive == w->repetitive && part.documents == w->documents &&
              part.samples == w->samples && part.frames == w->frames && part.units == w->units &&
              part.tokens == w->tokens && part.shards == w->shards,
          "the counts differ");
    check_same_file(whole, parts);
    CHECK(!leftovers(whole) && !leftovers(parts), "something is left over");
    for (uint64_t k = 1; w->binary && k <= w->shards; k++) {
        char a[PATH_MAX], b[PATH_MAX];
        shard s;
        check_same_file(shard_path(a, whole, k), shard_path(b, parts, k));
        if (!CHECK(shard_open(&s, a), "%s", slam_error())) continue;
        CHECK(s.n <= 60 && s.tokens[0] == 1 && s.tokens[s.n - 1] == 1, "shard %d has %zu tokens", (int)k, s.n);
        file_map_close(&s.map);
    }
    if (w->failed) {
        char *a = string_print("%s.failed", whole), *b = string_print("%s.failed", parts);
        check_same_file(a, b);
        free(a);
        free(b);
    }
    free(whole);
    free(parts);
    free(partial);
}

/* ---- audio files ---- */

/* Thirty files in a folder with others below it, five of them unusable; listed in the order of their names. */
static void make_folder(slam_inputs *in) {
    char name[64];
    const char *folder = check_path("audio");
    mkdir(folder, 0777);
    mkdir(check_path("audio/b"), 0777);
    mkdir(check_path("audio/b/c"), 0777);
    for (int i = 0; i < 30; i++) {
        snprintf(name, sizeof name, "audio/%s%02d.%s",
                 i % 3 == 1   ? "b/"
                 : i % 3 == 2 ? "b/c/"
                              : "",
                 i, i % 5 ? "wav" : "WAV");
        if (i % 11 == 10) check_file(name, "RIFF", 4);
        else make_wav(name, i == 4 ? 0 : 3000 + 1700 * (size_t)(i % 7), i % 2 ? 8000 : 16000, (uint64_t)i);
    }
    check_file("audio/notes.txt", "none", 4);
    CHECK(mkfifo(check_path("audio/pipe.wav"), 0666) == 0, "a pipe, from which nothing can be read");
    CHECK(symlink("..", check_path("audio/b/up")) == 0 && symlink("b", check_path("audio/z")) == 0, "links");
    folder = check_path("audio");
    CHECK(slam_inputs_open(in, SLAM_INPUT_AUDIO, &folder, 1), "%s", slam_error());
}

static void test_lists(slam_inputs *in) {
    if (!TEST("lists: folders in order, links, manifests")) return;
    slam_inputs list = ZERO;
    char **at = in->paths.at;
    // audio (10), audio/b (10), audio/b/c (10), and again by the link audio/z, in which up leads to a folder above
    CHECK(in->n == 50, "%zu files, expected 50", in->n);
    for (size_t i = 1; i < 10; i++) CHECK(strcmp(at[i - 1], at[i]) < 0, "%s after %s", at[i], at[i - 1]);
    char *text = string_print("%s\r\n\n%s\n%s", at[0], check_path("audio/b/c"), at[3]);
    char *name = string_print("@%s", check_file("list.txt", text, strlen(text)));
    const char *arguments[] = {name, "@/none", check_path("empty")};
    CHECK(slam_inputs_open(&list, SLAM_INPUT_AUDIO, arguments, 1) && list.n == 12 && !strcmp(list.paths.at[11], at[3]),
          "%zu: %s", list.n, slam_error());
    check_fails(slam_inputs_open(&list, SLAM_INPUT_AUDIO, arguments + 1, 1), "/none: cannot be opened");
    mkdir(arguments[2], 0777);
    check_fails(slam_inputs_open(&list, SLAM_INPUT_AUDIO, arguments + 2, 1), "no audio file");
    slam_inputs_free(&list);
    free(text);
    free(name);
}

/* Opens a list with this text; `expected` are the paths, each followed by a newline. */
static void check_list(const char *text, size_t n, const char *expected, const char *note) {
    char *name = string_print("@%s", check_file("list.txt", text, n));
    const char *argument = name;
    slam_inputs in = ZERO;
    strbuf got = ZERO;
    if (CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, &argument, 1), "%s", slam_error()))
        for (size_t i = 0; i < in.n; i++) strbuf_add(&got, "%s\n", in.paths.at[i]);
    CHECK(got.n && !strcmp(got.at, expected), "%s, expected %s", got.at, expected);
    CHECK(note ? in.notes.n == 1 && strstr(in.notes.at[0], note) != NULL : in.notes.n == 0, "%zu notes: %s", in.notes.n,
          in.notes.n ? in.notes.at[0] : "");
    strbuf_free(&got);
    slam_inputs_free(&in);
    free(name);
}

static void test_list_formats(void) {
    if (TEST("lists: byte order mark, CRLF, comments, blank lines")) {
        static const char marked[] = "\xef\xbb\xbf# speech\r\na b.wav\r\n\r\n#c.wav\r\n  d#e.flac  \r\n./#f.wav";
        check_list(marked, sizeof marked - 1, "a b.wav\nd#e.flac\n./#f.wav\n", NULL);
        check_list("\xef\xbb\xbf"
                   "a.wav",
                   8, "a.wav\n", NULL);
        char *name = string_print("@%s", check_file("list.txt",
                                                    "\xff\xfe"
                                                    "a\0.\0w\0",
                                                    8)); // UTF-16 of Windows
        const char *argument = name;
        slam_inputs in = ZERO;
        check_fails(slam_inputs_open(&in, SLAM_INPUT_AUDIO, &argument, 1), "list.txt:1: contains a zero byte");
        slam_inputs_free(&in);
        check_file("list.txt", "# nothing\n", 10);
        check_fails(slam_inputs_open(&in, SLAM_INPUT_AUDIO, &argument, 1), "has no lines");
        slam_inputs_free(&in);
        free(name);
    }
    if (TEST("lists: manifests of fairseq")) {
        static const char *const texts[][2] = {
            {"/data/a b\nx.wav\t32000\nc/y.flac\t16000\n", "/data/a b/x.wav\n/data/a b/c/y.flac\n"},
            {"\xef\xbb\xbf/data/\r\nx.wav\t32000\r\n", "/data//x.wav\n"},
            {"# of\nroot\n# comments\nx.wav\t1\n/y.wav\t2\n", "root/x.wav\n/y.wav\n"},
            {".\nx\ty.wav\t7\n", "./x\ty.wav\n"},
            {"x.wav\t32000\ny.wav\t1\n", "x.wav\ny.wav\n"},    // its root is missing
            {"id\tpath\nx.wav\t32000\n", "id\tpath\nx.wav\n"}, // no root is a header
            {"x.wav\ny 1.wav\nz.wav\t12a\n", "x.wav\ny 1.wav\nz.wav\t12a\n"}};
        for (int i = 0; i < 7; i++) check_list(texts[i][0], strlen(texts[i][0]), texts[i][1], NULL);
        // the root is a folder with more files, which are not inputs
        char *root = string_copy(check_path("root")), *text = string_print("%s\nlisted.wav\t2\n", root);
        char *all = string_print("a.wav\n%s\n", root), *one = string_print("%s/listed.wav\n", root);
        char *expected = string_print("a.wav\n%s/listed.wav\n%s/other.wav\n", root, root);
        mkdir(root, 0777);
        check_file("root/listed.wav", "x", 1);
        check_file("root/other.wav", "x", 1);
        check_list(text, strlen(text), one, NULL);
        check_list(all, strlen(all), expected, "list.txt:2: is a folder; all audio files in it are inputs");
        free(root), free(text), free(all), free(one), free(expected);
    }
    if (TEST("folders: audio that is passed over is counted by extension")) {
        static const char *const names[] = {"a.m4a", "b.M4A", "c.webm", "sub/d.wma", "e.txt", "f.sph"};
        char *folder = string_copy(check_path("mixed"));
        const char *argument = folder;
        char name[32];
        slam_inputs in = ZERO;
        mkdir(folder, 0777);
        mkdir(check_path("mixed/sub"), 0777);
        for (int i = 0; i < 5; i++) {
            snprintf(name, sizeof name, "mixed/%s", names[i]);
            check_file(name, "x", 1);
        }
        check_fails(slam_inputs_open(&in, SLAM_INPUT_AUDIO, &argument, 1),
                    "or below it; 2 .m4a, 1 .webm, 1 .wma: not read");
        slam_inputs_free(&in);
        check_file("mixed/f.sph", "x", 1);
        CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, &argument, 1) && in.n == 1 && in.notes.n == 1 &&
                  !strncmp(in.notes.at[0], "2 .m4a, 1 .webm, 1 .wma: not read; convert them", 47),
              "%s", in.notes.n ? in.notes.at[0] : slam_error());
        slam_inputs_free(&in);
        free(folder);
    }
}

/* Names of Latin-1 are not UTF-8: JSON has them as Python writes them, .failed as they are. */
static void test_names(const slam_tokenizer *t) {
    if (!TEST("names that are not UTF-8 survive in units, their copies, and .failed")) return;
    const char *paths[] = {NULL, NULL};
    slam_inputs in = ZERO;
    slam_writer w;
    char *good = string_copy(make_wav("caf\xe9.wav", 5000, 16000, 3)), *bad = string_copy(check_path("na\xefve.wav"));
    paths[0] = good, paths[1] = bad;
    CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, paths, 2), "%s", slam_error());
    CHECK(tokenize(t, &in, check_path("names.jsonl"), 0, SIZE_MAX, &w) && w.failed == 1, "%s", slam_error());
    slam_inputs_free(&in);
    in = lines_of(SLAM_INPUT_UNITS, check_path("names.jsonl"));
    CHECK(tokenize(t, &in, check_path("names2.jsonl"), 0, SIZE_MAX, &w) && w.documents == 1, "%s", slam_error());
    slam_inputs_free(&in);
    check_same_file(check_path("names.jsonl"), check_path("names2.jsonl"));
    strbuf line = read_file(check_path("names.jsonl"));
    CHECK(line.n && strstr(line.at, "/caf\\udce9.wav\""), "%s", line.at);
    char *failed = string_print("%s\n", bad);
    check_text(check_path("names.jsonl.failed"), failed, 0);
    strbuf_free(&line);
    free(failed), free(good), free(bad);
}

static int count_skipped(void *context, const slam_progress *p) {
    *(size_t *)context += p->skipped != NULL && strstr(p->reason, p->skipped) != NULL;
    return 1;
}

/* Two channels of a file are the two speakers; a file with one has no second. */
static void test_channel(slam_tokenizer *t) {
    if (!TEST("tokenize: a channel of stereo, not of mono; another channel does not resume")) return;
    enum { N = 30000 };
    static int16_t frames[N][2];
    slam_units of[3] = {ZERO, ZERO, ZERO}, mono[3] = {ZERO, ZERO, ZERO};
    slam_strings paths = ZERO, alone = ZERO;
    slam_inputs in = ZERO;
    slam_writer w;
    size_t skipped = 0;
    slam_strings_add(&alone, make_wav("left.wav", N, 16000, 7));
    slam_strings_add(&alone, make_wav("right.wav", N, 16000, 8));
    strbuf left = read_file(alone.at[0]), right = read_file(alone.at[1]);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < 2; c++) memcpy(&frames[i][c], (c ? right.at : left.at) + 44 + 2 * i, 2);
    const uint32_t size = sizeof frames, rest = size + 36, rate = 64000;
    memcpy(left.at + 4, &rest, 4);
    left.at[22] = 2;
    memcpy(left.at + 28, &rate, 4);
    left.at[32] = 4;
    memcpy(left.at + 40, &size, 4);
    left.n = 44;
    strbuf_add_bytes(&left, frames, sizeof frames);
    slam_strings_add(&paths, check_file("stereo.wav", left.at, left.n));
    CHECK(slam_audio_units(t, NULL, &alone, mono, NULL, NULL), "%s", slam_error());
    for (t->config.channel = 1; t->config.channel <= 2; t->config.channel++) {
        const int c = t->config.channel;
        CHECK(slam_audio_units(t, NULL, &paths, &of[c], NULL, NULL), "%s", slam_error());
        CHECK(of[c].n == mono[c - 1].n && !memcmp(of[c].unit, mono[c - 1].unit, of[c].n * sizeof(int)), "channel %d",
              c);
    }
    t->config.channel = 2;
    slam_units none[2];
    CHECK(slam_audio_units(t, NULL, &alone, none, count_skipped, &skipped) && skipped == 2, "%zu skipped", skipped);
    for (int i = 0; i < 2; i++) slam_units_free(&none[i]);
    CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, (const char *const *)alone.at, 2), "%s", slam_error());
    check_fails(tokenize(t, &in, check_path("second.bin"), 0, SIZE_MAX, &w), "none of the 2 files");
    slam_inputs_free(&in);
    slam_strings_add(&paths, alone.at[0]);
    CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, (const char *const *)paths.at, 2), "%s", slam_error());
    CHECK(tokenize(t, &in, check_path("both.bin"), 0, 1, &w), "%s", slam_error());
    t->config.channel = 1;
    check_fails(tokenize(t, &in, check_path("both.bin"), 0, 5, &w), "other files or settings");
    t->config.channel = 0;
    slam_inputs_free(&in);
    for (int i = 0; i < 3; i++) slam_units_free(&of[i]), slam_units_free(&mono[i]);
    strbuf_free(&left);
    strbuf_free(&right);
    slam_strings_free(&paths);
    slam_strings_free(&alone);
}

static int cancel(void *context, const slam_progress *p) { return !context && p->done < 3; }

/* units_of: in memory, of whole files. */
static void test_audio(const slam_tokenizer *t, slam_inputs *in, slam_units *units_of) {
    slam_writer w;
    size_t skipped = 0;
    if (TEST("units of files in memory: those of each file")) {
        CHECK(slam_audio_units(t, NULL, &in->paths, units_of, count_skipped, &skipped), "%s", slam_error());
        CHECK(skipped == 5, "%zu skipped", skipped);
        for (size_t i = 0; i < in->n; i++) {
            size_t n = 0;
            slam_units u = ZERO;
            float *x = slam_audio_load(in->paths.at[i], &n);
            slam_recording r = {x, n, NULL, u};
            if (x && slam_units_encode(t, &r, 1)) u = r.units;
            CHECK(u.n == units_of[i].n && u.samples == units_of[i].samples && u.frames == units_of[i].frames &&
                      (!u.n || (!memcmp(u.unit, units_of[i].unit, u.n * 4) &&
                                !memcmp(u.duration, units_of[i].duration, u.n * 4))),
                  "%s", in->paths.at[i]);
            slam_units_free(&u);
            free(x);
        }
        slam_units *none = NEW(slam_units, in->n);
        check_fails(slam_audio_units(t, NULL, &in->paths, none, cancel, NULL), "stopped");
        free(none);
    }
    if (TEST("tokenize: OUT.bin has the files' units in order")) {
        shard s;
        size_t at = 0;
        slam_inputs few = *in;
        few.end = 12;
        CHECK(tokenize(t, &few, check_path("few.bin"), 0, SIZE_MAX, &w), "%s", slam_error());
        strbuf all = ZERO;
        for (uint64_t k = 1; k <= w.shards + 1; k++) {
            char path[PATH_MAX];
            if (!CHECK(
                    shard_open(&s, k > w.shards ? check_path("few.bin") : shard_path(path, check_path("few.bin"), k)),
                    "%s", slam_error()))
                return;
            CHECK(s.V == 22 && s.fingerprint == t->fingerprint, "header");
            strbuf_add_bytes(&all, s.tokens, s.n * 2);
            file_map_close(&s.map);
        }
        const uint16_t *tokens = (const uint16_t *)(void *)all.at;
        CHECK(all.n / 2 == w.tokens, "%zu tokens of %zu", all.n / 2, (size_t)w.tokens);
        for (size_t i = 0; i < few.end; i++) {
            const slam_units *u = &units_of[i];
            if (!u->samples) continue;
            CHECK(at + u->n + 2 <= all.n / 2 && tokens[at] == 1 && tokens[at + u->n + 1] == 1, "file %zu at %zu", i,
                  at);
            for (size_t k = 0; k < u->n; k++) CHECK(tokens[at + 1 + k] == u->unit[k] + 2, "file %zu: unit %zu", i, k);
            at += u->n + 2;
        }
        strbuf_free(&all);
        check_fails(tokenize(t, &few, check_path("few.bin"), 0, SIZE_MAX, &w), "exists");
    }
    static const char *const kinds[] = {"whole.bin", "whole.jsonl", "repr.jsonl"};
    for (int kind = 0; kind < 3; kind++)
        if (TEST("tokenize: stopped again and again, then to the end: %s", kinds[kind])) {
            check_stops(t, in, kinds[kind], kind == 2, &w);
            CHECK(w.inputs == in->n && w.failed == 5 && w.documents == in->n - 5 && (kind || w.shards > 3), "counts");
            char *name = string_print("%s.failed", kinds[kind]);
            strbuf failed = read_file(check_path(name));
            CHECK(failed.n && strstr(failed.at, "10.WAV\n") && strstr(failed.at, "04.wav\n"), "%s", failed.at);
            strbuf_free(&failed);
            free(name);
        }
    if (TEST("tokenize: two processes, a name that is taken, a journal that is wrong")) {
        slam_writer one;
        const char *out = check_path("two.bin");
        CHECK(slam_writer_open(&one, out, in, t, 0, 60), "%s", slam_error());
        check_fails(tokenize(t, in, out, 0, SIZE_MAX, &w), "another process");
        CHECK(leftovers(out) == 2, "removed by the other");
        CHECK(slam_writer_close(&one, 1) && !leftovers(out) && !path_exists(check_path("two.bin.failed")),
              "nothing was done");
        CHECK(tokenize(t, in, out, 0, 5, &w), "%s", slam_error());
        strbuf journal = read_file(check_path("two.bin.journal"));
        char *bytes = strstr(journal.at, "\"bytes\": ");
        if (CHECK(bytes, "%s", journal.at)) {
            bytes[9] = '9';
            check_file("two.bin.journal", journal.at, journal.n);
            check_fails(tokenize(t, in, out, 0, 5, &w), "expected the journal's");
        }
        strbuf_free(&journal);
        check_file("taken.bin", "mine", 4);
        check_fails(tokenize(t, in, check_path("taken.bin"), 0, 5, &w), "taken.bin: exists");
        check_file("taken2-00001.bin", "mine", 4);
        check_fails(tokenize(t, in, check_path("taken2.bin"), 0, 5, &w), "taken2-00001.bin: exists");
        CHECK(!leftovers(check_path("taken.bin")) && !path_exists(check_path("taken.bin.failed")), "left over");
        check_fails(tokenize(t, in, "/none/out.bin", 0, 5, &w), "/none/out.bin.failed: cannot be written");
    }
    if (TEST("tokenize: nothing usable")) {
        const char *path = "/none/a.wav";
        slam_inputs none = ZERO;
        CHECK(slam_inputs_open(&none, SLAM_INPUT_AUDIO, &path, 1), "%s", slam_error());
        for (int i = 0; i < 2; i++)
            check_fails(tokenize(t, &none, check_path("none.bin"), 0, 5, &w), "none of the 1 files or lines");
        CHECK(!path_exists(check_path("none.bin")) && !leftovers(check_path("none.bin")), "files");
        check_text(check_path("none.bin.failed"), "/none/a.wav\n", 0);
        slam_inputs_free(&none);
    }
    if (TEST("tokenize: parts in order are the whole")) {
        slam_inputs part = *in;
        for (size_t of = 1; of <= 9; of += 4) {
            strbuf all = ZERO;
            for (size_t i = 0; i < of; i++) {
                char name[32];
                snprintf(name, sizeof name, "part%zu-%zu.jsonl", i, of);
                part.first = in->n * i / of;
                part.end = in->n * (i + 1) / of;
                CHECK(tokenize(t, &part, check_path(name), 0, SIZE_MAX, &w), "%s", slam_error());
                strbuf s = read_file(check_path(name));
                strbuf_add_bytes(&all, s.at, s.n);
                strbuf_free(&s);
            }
            check_text(check_path("part0-1.jsonl"), all.at, 0);
            strbuf_free(&all);
        }
    }
    if (TEST("tokenize: segments of a long file")) {
        slam_inputs one = ZERO;
        units_reader reader;
        slam_units u = ZERO;
        double end = 0;
        const char *path = make_wav("long.wav", 47 * 8000, 8000, 3);
        CHECK(slam_inputs_open(&one, SLAM_INPUT_AUDIO, &path, 1), "%s", slam_error());
        for (one.max_seconds = 47; one.max_seconds >= 0; one.max_seconds -= 47) {
            const char *out = one.max_seconds > 0 ? check_path("long47.jsonl") : check_path("long0.jsonl");
            CHECK(tokenize(t, &one, out, 0, SIZE_MAX, &w) && w.documents == 1, "%s", slam_error());
            strbuf s = read_file(out);
            CHECK(s.n && !strstr(s.at, "\"start\""), "a segment");
            strbuf_free(&s);
        }
        one.max_seconds = 10;
        CHECK(tokenize(t, &one, check_path("long10.bin"), 0, SIZE_MAX, &w) && w.shards > 2, "%s", slam_error());
        CHECK(tokenize(t, &one, check_path("long10.jsonl"), 0, SIZE_MAX, &w), "%s", slam_error());
        CHECK(units_open(&reader, check_path("long10.jsonl")), "%s", slam_error());
        for (; units_next(&reader, &u) == 1; end = u.end)
            CHECK(u.start == end && u.end - u.start <= 10 && !strcmp(u.name, one.paths.at[0]), "%g to %g", u.start,
                  u.end);
        CHECK(end == 47 && w.documents >= 5 && w.inputs == 1 && w.samples == 47 * 16000, "%zu documents",
              (size_t)w.documents);
        units_close(&reader);
        slam_units_free(&u);
        slam_inputs_free(&one);
    }
}

/* ---- lines ---- */

static void test_units(const slam_tokenizer *t, const slam_inputs *in) {
    if (!TEST("lines of units: other formats without the audio")) return;
    static const struct { // from the features of `in`; of one line each
        const char *out;
        int with_tokenizer, audio_repr;
    } to[] = {{"again.bin", 1, 0}, {"again.jsonl", 0, 1}, {"copy.jsonl", 0, 0}, {"unsaid.bin", 0, 0}};
    static const char *const same[] = {"direct.bin", "spelled.jsonl", "features.jsonl"};
    slam_writer w, w2;
    for (int i = 0; i < 3; i++) CHECK(tokenize(t, in, check_path(same[i]), i == 1, SIZE_MAX, &w), "%s", slam_error());
    slam_inputs lines = lines_of(SLAM_INPUT_UNITS, check_path("features.jsonl"));
    for (int i = 0; i < 4; i++) {
        CHECK(tokenize(to[i].with_tokenizer ? t : NULL, &lines, check_path(to[i].out), to[i].audio_repr, SIZE_MAX, &w2),
              "%s", slam_error());
        CHECK(w2.tokens == w.tokens && w2.frames == w.frames && w2.documents == w.documents, "counts");
        if (i < 3) check_same_file(check_path(to[i].out), check_path(same[i]));
    }
    check_same_file(check_path("direct-00001.bin"), check_path("again-00001.bin"));
    shard unsaid;
    if (CHECK(shard_open(&unsaid, check_path("unsaid.bin")), "%s", slam_error())) {
        CHECK(unsaid.V == 0 && unsaid.fingerprint == 0, "V %d", unsaid.V);
        file_map_close(&unsaid.map);
    }
    slam_inputs_free(&lines);
    static const char bad[] = "{\"units\": [3, 25]}\n\n{\"units\": 3}\n{\"units\": [4], \"start\": 2.5, \"end\": 3}\n";
    lines = lines_of(SLAM_INPUT_UNITS, check_file("bad.jsonl", bad, strlen(bad)));
    CHECK(tokenize(t, &lines, check_path("good.jsonl"), 0, SIZE_MAX, &w) && w.failed == 2 && w.documents == 1, "%s",
          slam_error());
    check_text(check_path("good.jsonl"), "{\"units\": [4], \"file_name\": \"\", \"start\": 2.5, \"end\": 3}\n", 0);
    strbuf s = read_file(check_path("good.jsonl.failed"));
    CHECK(s.n && strstr(s.at, "bad.jsonl:1\n") && strstr(s.at, "bad.jsonl:3\n"), "%s", s.at);
    strbuf_free(&s);
    slam_inputs_free(&lines);
}

/* ---- pairs, and text that is spoken by cat: it names a file ---- */

static void test_pairs(const slam_tokenizer *t, const slam_strings *files, char *const *lists) {
    if (!TEST("pairs: files become units, texts stay, for any number of threads and after stops")) return;
    slam_writer w;
    static const char passed_on[] = "\"half\": -0.50, \"yes\": true, \"none\": null";
    strbuf s = ZERO;
    for (int i = 0; i < 24; i++) {
        if (i == 7)
            strbuf_add(
                &s,
                "{\"prompt_path\": \"s0.wav\", \"chosen_path\": \"none.wav\", \"rejected_path\": \"s0.wav\"}\n[]\n");
        strbuf_add(
            &s, "{\"id\": %d, \"prompt_path\": \"s%d.wav\", \"chosen_path\": \"%s\", \"rejected_path\": \"s%d.wav\", ",
            i, i % 8, files->at[(i + 1) % 8], (i + 2) % 8);
        strbuf_add(&s, "\"list\": [], \"chosen\": 1, %s, \"prompt_text\": \"the %s\", \"chosen_text\": \"end.\"}\n",
                   passed_on, i % 4 ? "\\\"x\\\"" : "a b a b a b");
    }
    slam_inputs in = lines_of(SLAM_INPUT_PAIRS, check_file("pairs.jsonl", s.at, s.n));
    in.max_repetition = 0.3;
    CHECK(in.n == 26 && in.pairs_out, "%zu lines", in.n);
    check_stops(t, &in, "pairs1.jsonl", 0, &w);
    CHECK(w.failed == 2 && w.repetitive == 6 && w.documents == 18 && w.inputs == 26,
          "%zu failed, %zu repetitive, %zu documents", (size_t)w.failed, (size_t)w.repetitive, (size_t)w.documents);
    s.n = 0;
    strbuf_add(&s, "{\"id\": 1, \"prompt_path\": \"s1.wav\", \"chosen_path\": ");
    strbuf_add_json(&s, files->at[2]);
    strbuf_add(&s, ", \"rejected_path\": \"s3.wav\", %s, \"prompt_text\": \"the \\\"x\\\"\", \"chosen_text\": \"end.\"",
               passed_on);
    strbuf_add(&s, ", \"prompt\": %s, \"chosen\": %s, \"rejected\": %s}\n", lists[1], lists[2], lists[3]);
    check_text(check_path("pairs1.jsonl"), s.at, 1);
    slam_inputs_free(&in);
    strbuf_free(&s);
}

static void test_text(const slam_tokenizer *t, const slam_strings *files, char *const *lists) {
    slam_inputs in = ZERO;
    slam_writer w;
    strbuf s = ZERO;
    if (TEST("text: spoken by voices in turn, for any number of threads and after stops")) {
        for (int i = 0; i < 30; i++)
            strbuf_add(&s, "%s\r\n%s", i == 9 ? "/none/x.wav" : files->at[i % 8], i == 3 ? "\n" : "");
        in = lines_of(SLAM_INPUT_TEXT, check_file("stories.txt", s.at, s.n));
        slam_strings_add(&in.voices, "cat {text}");
        slam_strings_add(&in.voices, "sh -c 'cat \"$0\" >&2; exec cat \"$1\"' /dev/null {text}");
        slam_strings_add(&in.voices, "xargs cat");
        CHECK(in.n == 30 && !in.pairs_out, "%zu lines", in.n);
        check_stops(t, &in, "told.jsonl", 0, &w);
        CHECK(w.failed == 1 && w.documents == 29, "%zu failed", (size_t)w.failed);
        s.n = 0;
        strbuf_add(&s, "%.*s, \"file_name\": ", (int)strlen(lists[0]) - 1, lists[0]);
        strbuf_add_json(&s, in.paths.at[0]);
        strbuf_add(&s, "\b:1\"}\n");
        char *quote = strchr(s.at, '\b'); // "...stories.txt" is one string with ":1"
        memmove(quote - 1, quote + 1, strlen(quote));
        check_text(check_path("told.jsonl"), s.at, 1);
        strbuf failed = read_file(check_path("told.jsonl.failed"));
        CHECK(failed.n && strstr(failed.at, "stories.txt:11\n"), "%s", failed.at);
        strbuf_free(&failed);
        slam_inputs_free(&in);
    }
    if (TEST("text: prompt, chosen and rejected become pairs with their text")) {
        static const int side[] = {0, 1, 5};
        s.n = 0;
        for (int i = 0; i < 12; i++)
            strbuf_add(&s, "%s\t%s\t%s\n", files->at[i % 8], files->at[(i + 1) % 8], files->at[5]);
        in = lines_of(SLAM_INPUT_TEXT, check_file("pairs.tsv", s.at, s.n));
        slam_strings_add(&in.voices, "cat {text}");
        check_stops(t, &in, "tsv.jsonl", 0, &w);
        CHECK(in.pairs_out && w.documents == 12, "%zu documents", (size_t)w.documents);
        s.n = 0;
        for (int k = 0; k < 3; k++) {
            strbuf_add(&s, "%s\"%s_text\": ", k ? ", " : "{", pair_sides[k]);
            strbuf_add_json(&s, files->at[side[k]]);
        }
        for (int k = 0; k < 3; k++) strbuf_add(&s, ", \"%s\": %s", pair_sides[k], lists[side[k]]);
        strbuf_add(&s, "}\n");
        check_text(check_path("tsv.jsonl"), s.at, 1);
        slam_inputs_free(&in);
        const char *four = check_file("four.tsv", "a\tb\tc\na\tb\n", 10), *blank = check_file("blank.txt", "\n \n", 3);
        in = lines_of(SLAM_INPUT_TEXT, four);
        slam_reader *r = slam_reader_open(&in, t, 1);
        const slam_item *item;
        const char *skipped;
        while (slam_reader_next(r, &item, &skipped) > 0 && !item) {}
        CHECK(skipped && strstr(skipped, "four.tsv:2: 2 fields"), "%s", skipped);
        slam_reader_close(r);
        slam_inputs_free(&in);
        check_fails(slam_inputs_open(&in, SLAM_INPUT_TEXT, &blank, 1), "blank.txt: has no lines");
        slam_inputs_free(&in);
    }
    strbuf_free(&s);
}

static void test_voices(const slam_tokenizer *t) {
    if (TEST("voices: the text is one word, and no command")) {
        static const char *const quoted[] = {
            "printf '%s|' x{text}y \"{text}\" {text} >&2; exit 3",
            "sh -c 'printf \"%s|\" x\"$0\"y \"$1\" \"{text}\" >&2; exit 3' {text} {text}",
            "read -r line; printf '%s|' \"x${line}y\" \"$line\" \"$line\" >&2; exit 3"};
        static const char *const texts[] = {"a  b * '$(touch x)' `ls` \"; exit 4; \\", "-w it's"};
        for (int i = 0; i < 6; i++) {
            audio a = ZERO;
            const char *text = texts[i % 2], *space = i % 2 ? " " : "";
            char *said = string_print("status 3: x%s%sy|%s%s|%s%s|", space, text, space, text, space, text);
            check_fails(voice_open(&a, quoted[i / 2], text, "x.txt:1") == 1, said);
            audio_close(&a);
            free(said);
        }
    }
    if (TEST("voices: commands that fail")) {
        static const struct {
            const char *command, *error;
            int status;
        } bad[] = {{"echo first >&2; echo the reason >&2; exit 3 # {text}",
                    "x.txt:1: the voice failed with status 3: the reason", 0},
                   {"kill -9 $$ # {text}", "x.txt:1: the voice failed with status 137", 0},
                   {"echo {text}", "not a WAV file", 0},
                   {"true {text}", "not a WAV file", 0},
                   {"/none/such {text}", "/none/such", -1},
                   {"say 'no end {text}", "the voice failed with status ", 0},
                   {"  ", "the voice failed with status ", 0}};
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            audio a = ZERO;
            int status;
            check_fails((status = voice_open(&a, bad[i].command, "words", "x.txt:1")) == 1, bad[i].error);
            CHECK(status == bad[i].status, "%s: %d", bad[i].command, status);
            audio_close(&a);
        }
        slam_writer w;
        slam_inputs in = lines_of(SLAM_INPUT_TEXT, check_file("one.txt", "words\n", 6));
        slam_strings_add(&in.voices, "/none/such {text}");
        check_fails(tokenize(t, &in, check_path("no.bin"), 0, SIZE_MAX, &w),
                    "one.txt:1: the voice failed with status 127: ");
        CHECK(!leftovers(check_path("no.bin")) && !path_exists(check_path("no.bin.failed")), "something is left over");
        slam_inputs_free(&in);
    }
}

/* ---- fits ---- */

/* Of ten times as many frames that are numbered, each is in the sample with probability 1/10. */
static void test_sample(void) {
    if (!TEST("fit: the sample of frames is uniform")) return;
    enum { SEEN = 20000, KEPT = 2000 };
    static float frames[SEEN][2];
    static char kept[SEEN];
    reservoir r = ZERO;
    uint64_t seed = 67;
    double sum = 0;
    int tenth[10] = {0};
    for (int i = 0; i < SEEN; i++) frames[i][0] = (float)i, frames[i][1] = (float)-i;
    r.most = KEPT;
    r.D = 2;
    r.state = 3;
    for (size_t at = 0, n; at < SEEN; at += n) { // recordings of up to 300 frames
        n = 1 + (size_t)rng_below(&seed, 300);
        if (n > SEEN - at) n = SEEN - at;
        reservoir_add(&r, frames[at], n);
    }
    CHECK(r.n == KEPT && r.seen == SEEN, "%zu frames of %zu", r.n, (size_t)r.seen);
    for (size_t i = 0; i < r.n; i++) {
        const int number = (int)r.frames[2 * i];
        if (!CHECK(number >= 0 && number < SEEN && r.frames[2 * i + 1] == (float)-number, "frame %d is torn", number))
            continue;
        CHECK(!kept[number]++, "frame %d is there twice", number);
        tenth[number * 10 / SEEN]++;
        sum += number;
    }
    check_near("mean number over the middle one", sum / KEPT / ((SEEN - 1) / 2.0), 1, 0.05);         // deviation 0.012
    for (int i = 0; i < 10; i++) check_near("share of a tenth", tenth[i] / (double)KEPT, 0.1, 0.03); // deviation 0.0064
    free(r.frames);
}

static void test_fit(const slam_inputs *in) {
    const slam_unit_config c = slam_unit_config_default();
    slam_kmeans_report r = ZERO;
    if (TEST("fit: with fewer frames than the files hold, the same for any number of threads")) {
        const int threads = omp_get_max_threads();
        for (size_t frames = 10; frames <= 100; frames += 90) { // 8 x 10 frames: not all files are read
            uint32_t first = 0;
            for (int n = 1; n <= 3; n++) {
                size_t skipped = 0;
                omp_set_num_threads(n);
                slam_tokenizer *t = slam_tokenizer_fit(check_path("sample.npy"), &c, NULL, in, 8, frames, 4,
                                                       count_skipped, &skipped, &r);
                unlink(check_path("sample.npy"));
                unlink(check_path("sample.json"));
                if (!CHECK(t, "%s", slam_error())) continue;
                if (n == 1) first = t->fingerprint;
                CHECK(t->fingerprint == first && r.frames == frames && (skipped == 5 || frames == 10),
                      "%d threads differ", n);
                slam_tokenizer_free(t);
            }
        }
        omp_set_num_threads(threads);
        check_fails(slam_tokenizer_fit(check_path("sample.npy"), &c, NULL, in, 5000, 100000, 4, NULL, NULL, &r),
                    "5000");
        check_fails(slam_tokenizer_fit(check_path("sample.npy"), &c, NULL, in, 8, 100, 4, cancel, NULL, &r), "stopped");
    }
    if (TEST("fit: of the same call again, of another")) {
        char *path = string_copy(check_path("fit.npy"));
        check_fails(slam_tokenizer_fit("/none/km.npy", &c, NULL, in, 8, 10, 4, NULL, NULL, &r),
                    "/none/km.npy: cannot be written");
        slam_tokenizer *t = slam_tokenizer_fit(path, &c, NULL, in, 8, 10, 4, NULL, NULL, &r);
        CHECK(t && r.frames == 10 && path_exists(path), "%s", slam_error());
        slam_tokenizer *again = slam_tokenizer_fit(path, &c, NULL, in, 8, 10, 4, NULL, NULL, &r);
        CHECK(again && !r.frames && again->fingerprint == t->fingerprint, "%s", slam_error());
        slam_tokenizer_free(again);
        check_fails(slam_tokenizer_fit(path, &c, NULL, in, 8, 10, 5, NULL, NULL, &r), "fit.npy: exists");
        unlink(path); // what a kill between the two files leaves
        check_fails(slam_tokenizer_fit(path, &c, NULL, in, 8, 10, 5, NULL, NULL, &r), "fit.json: exists");
        again = slam_tokenizer_fit(path, &c, NULL, in, 8, 10, 4, NULL, NULL, &r);
        CHECK(again && r.frames == 10 && again->fingerprint == t->fingerprint, "%s", slam_error());
        slam_tokenizer_free(again);
        slam_tokenizer_free(t);
        free(path);
    }
}

int main(void) {
    slam_tokenizer *t = make_tokenizer(1);
    slam_inputs folder = ZERO, in = ZERO;
    slam_strings files = ZERO;
    char name[32], *lists[8];
    make_folder(&folder);
    slam_units *units_of = NEW(slam_units, folder.n + 8);
    test_lists(&folder);
    test_list_formats();
    test_names(t);
    test_channel(t);
    test_audio(t, &folder, units_of);
    for (int i = 0; i < 8; i++) {
        snprintf(name, sizeof name, "s%d.wav", i);
        slam_strings_add(&files, make_wav(name, 5000 + 3000 * (size_t)i, 16000, 50 + (uint64_t)i));
    }
    CHECK(slam_inputs_open(&in, SLAM_INPUT_AUDIO, (const char *const *)files.at, 8), "%s", slam_error());
    slam_audio_units(t, NULL, &files, units_of + folder.n, NULL, NULL);
    for (int i = 0; i < 8; i++) { // as a line has them
        const slam_units *u = &units_of[folder.n + (size_t)i];
        const slam_units line = {u->unit, u->duration, u->n, 0, 0, 0, 0, NULL};
        strbuf s = ZERO;
        strbuf_add_units(&s, &line, 0);
        lists[i] = s.at;
    }
    test_units(t, &in);
    test_pairs(t, &files, lists);
    test_text(t, &files, lists);
    test_voices(t);
    test_sample();
    test_fit(&folder);
    for (size_t i = 0; i < folder.n + 8; i++) slam_units_free(&units_of[i]);
    for (int i = 0; i < 8; i++) free(lists[i]);
    free(units_of);
    slam_inputs_free(&folder);
    slam_inputs_free(&in);
    slam_strings_free(&files);
    slam_tokenizer_free(t);
    return check_end();
}
