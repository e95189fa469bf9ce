/* tokenize.c - speech to units, and the k-means centroids that define them.

   run() is the program: inputs, unit tokenizer, and tokenize(), the loop from files to units. */
#include "slam.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct program {
    slam_unit_flags unit_flags;
    char *out, *pairs, *text, *part, *device, *dtype;
    slam_strings tts;
    int fit, audio_repr, threads;
    long fit_frames, shard_tokens, seed;
    double max_seconds, max_repetition;
    slam_flag table[32];
    slam_flags flags;
    slam_comm *comm;
    slam_ops *ops; /* of HuBERT */
    slam_inputs inputs;
    slam_tokenizer *tokenizer; /* NULL: the inputs are units already */
    int parts;                 /* outputs that together hold what one process would write */
    char out_path[4096];       /* OUT, or this part's */
    slam_bar bar;
    size_t skipped;
} program;

static const char *plural(uint64_t n) { return n == 1 ? "" : "s"; }
static const char *input_word(const program *p) { return p->inputs.kind == SLAM_INPUT_AUDIO ? "file" : "line"; }

static void report_skipped(program *p, const char *reason) {
    slam_bar_clear(&p->bar);
    fprintf(stderr, "tokenize: skipped: %s\n", reason);
    p->skipped++;
}

/* ---- from files to units ---- */

static void show_progress(program *p, double done, double total, double audio_seconds) {
    const double seconds = slam_clock() - p->bar.began, hours = audio_seconds / 3600;
    char text[96];
    int n = snprintf(text, sizeof text, "%.0f/%.0f %ss", done, total, input_word(p));
    if (audio_seconds > 0)
        snprintf(text + n, sizeof text - (size_t)n, "  %.2f h  %.0f h/h", hours, hours * 3600 / seconds);
    slam_bar_show(&p->bar, done, total, text);
}

static void print_end(const program *p, const slam_writer *w) {
    const uint64_t done = w->inputs - w->failed;
    const double seconds = slam_clock() - p->bar.began, audio = (double)w->samples / 16000;
    const int stem = (int)strlen(p->out) - (w->binary ? 4 : 6);
    printf("units    %llu %s%s", (unsigned long long)done, input_word(p), plural(done));
    if (w->earlier) printf(" (%llu of them before)", (unsigned long long)w->earlier);
    if (w->documents != done - w->repetitive) printf(", %llu documents", (unsigned long long)w->documents);
    if (audio > 0)
        printf(audio < 3600 ? ", %.0f s of audio" : ", %.2f h of audio", audio < 3600 ? audio : audio / 3600);
    printf(", in %.1f s\n         %llu tokens", seconds, (unsigned long long)w->tokens);
    if (audio > 0) printf(", %.1f units per second of audio", (double)w->units / audio);
    printf(", %.2f frames per unit\n", w->units ? (double)w->frames / (double)w->units : 0);
    if (w->repetitive)
        printf("         %llu pair%s skipped: repetitive text\n", (unsigned long long)w->repetitive,
               plural(w->repetitive));
    if (p->parts > 1) printf("wrote    %s, one of %d parts\n", p->out_path, p->parts);
    else if (w->shards)
        printf("wrote    %.*s-*.bin and %s, %llu shards\n", stem, p->out, p->out, (unsigned long long)w->shards + 1);
    else printf("wrote    %s\n", p->out);
    if (w->failed)
        printf("skipped  %llu %s%s, listed in %s.failed\n", (unsigned long long)w->failed, input_word(p),
               plural(w->failed), p->out_path);
    if (p->inputs.pairs_out) return;
    if (w->shards || p->parts > 1) printf("next     ./train '%.*s*%s'\n", stem, p->out, p->out + stem);
    else printf("next     ./train %s\n", p->out);
}

/* The loop from files to units. Returns the exit status; -1: failed. */
static int tokenize(program *p) {
    const slam_inputs *in = &p->inputs;
    const size_t total = in->end - in->first;
    const slam_item *item;
    const char *skipped;
    slam_writer w;
    if (!total) { /* more parts than inputs */
        printf("units    none: part of %d with nothing to do\n", p->parts);
        return 0;
    }
    if (!slam_writer_open(&w, p->out_path, in, p->tokenizer, p->audio_repr, (uint64_t)p->shard_tokens)) return -1;
    slam_reader *reader = slam_reader_open(in, p->tokenizer, in->first + w.inputs);
    slam_bar_begin(&p->bar);
    const uint64_t before = w.samples;
    int more = 1; /* the reader decodes and encodes chunks of many segments, and returns their inputs one by one */
    while (more > 0 && (more = slam_reader_next(reader, &item, &skipped)) > 0) {
        if (item && !slam_writer_add(&w, item)) more = -1;
        if (skipped) report_skipped(p, skipped);
        show_progress(p, (double)w.inputs, (double)total, (double)(w.samples - before) / 16000);
        if (!item && slam_stop_requested()) break;
    }
    slam_bar_clear(&p->bar);
    slam_reader_close(reader);
    if (!slam_writer_close(&w, more >= 0)) return -1;
    if (w.inputs == total) print_end(p, &w);
    else
        printf("stopped  after %llu of %zu %ss; the same command resumes\n", (unsigned long long)w.inputs, total,
               input_word(p));
    return w.inputs == total && w.failed ? 3 : 0;
}

/* ---- the unit tokenizer ---- */

/* HuBERT runs on a device; MFCC do not need one. */
static int open_device(program *p, const slam_unit_config *c) {
    if (c->features != SLAM_HUBERT) return 1;
    if (!(p->ops = slam_device(p->comm, p->device, p->dtype, p->threads))) return 0;
    printf("model    %s, layer %d\n", c->hubert, c->layer);
    fflush(stdout);
    return 1;
}

static int show_fit(void *context, const slam_progress *progress) {
    program *p = (program *)context;
    char text[64];
    snprintf(text, sizeof text, "finding centroids  pass %.0f", progress->done);
    if (progress->skipped) report_skipped(p, progress->reason);
    if (!strcmp(progress->stage, "fit")) slam_bar_show(&p->bar, progress->done, progress->total, text);
    else show_progress(p, progress->done, progress->total, progress->audio_seconds);
    return !slam_stop_requested();
}

static slam_tokenizer *fit_tokenizer(program *p, const slam_unit_config *config) {
    const char *path = p->unit_flags.kmeans;
    const size_t frames = (size_t)p->fit_frames;
    slam_kmeans_report report;
    slam_bar_begin(&p->bar);
    const double start = slam_clock();
    slam_tokenizer *t =
        slam_tokenizer_fit(path, config, p->ops, &p->inputs, p->fit, frames, (uint64_t)p->seed, show_fit, p, &report);
    slam_bar_clear(&p->bar);
    if (!t) return NULL;
    if (!report.frames) {
        printf("fit      %s was made by this command before\n", path);
        return t;
    }
    printf("fit      %d centroids from %zu frames in %.1f s, %d full passes, mean squared distance %.4g\n", p->fit,
           report.frames, slam_clock() - start, report.passes, report.inertia);
    if (report.dead)
        printf("         %d centroids have no frame: the audio has fewer distinct frames than %d\n", report.dead,
               p->fit);
    printf("wrote    %s, and its settings beside it\n", path);
    return t;
}

/* 1; 2: stopped by a signal; 0: failed */
static int open_tokenizer(program *p) {
    slam_unit_config config;
    if (p->inputs.kind == SLAM_INPUT_UNITS && !p->unit_flags.kmeans) return 1;
    if (!slam_unit_flags_config(&p->flags, &p->unit_flags, p->fit, &config) || !open_device(p, &config)) return 0;
    if (p->fit) p->tokenizer = fit_tokenizer(p, &config);
    else p->tokenizer = slam_tokenizer_load(p->unit_flags.kmeans, &config, p->ops);
    if (!p->tokenizer) return p->fit && slam_stop_requested() ? 2 : 0;
    if (p->tokenizer->do_normalize && !p->tokenizer->config.normalize)
        printf("         its preprocessor_config.json asks for normalised waveforms: see --normalize\n");
    return 1;
}

/* ---- inputs and outputs ---- */

static int is_jsonl(const char *path) {
    const size_t n = strlen(path);
    return n > 6 && !strcmp(path + n - 6, ".jsonl");
}

static int open_inputs(program *p) {
    slam_inputs *in = &p->inputs;
    const slam_strings *rest = &p->flags.rest;
    const char *const one[] = {p->pairs ? p->pairs : p->text};
    const char *const *paths = *one ? one : (const char *const *)rest->at;
    const double repetition = p->pairs && !slam_flags_given(&p->flags, "max-repetition") ? 0 : p->max_repetition;
    const int kind = p->pairs                ? SLAM_INPUT_PAIRS
                     : p->text               ? SLAM_INPUT_TEXT
                     : is_jsonl(rest->at[0]) ? SLAM_INPUT_UNITS
                                             : SLAM_INPUT_AUDIO;
    for (size_t i = 0; i < p->tts.n; i++) slam_strings_add(&in->voices, p->tts.at[i]);
    const int ok = slam_inputs_open(in, kind, paths, *one ? 1 : rest->n);
    for (size_t i = 0; p->comm->rank == 0 && i < in->notes.n; i++)
        fprintf(stderr, "tokenize: note: %s\n", in->notes.at[i]);
    in->max_seconds = p->max_seconds;
    in->max_repetition = in->pairs_out ? repetition : 0;
    if (ok && in->pairs_out && (!is_jsonl(p->out) || p->audio_repr))
        return slam_set_error("--out %s: pairs need a name that ends in .jsonl, and no --audio-repr", p->out);
    return ok;
}

/* --part I/N and mpirun -np N: each part has its share of the inputs and its own output, NAME-0000I-of-0000N.bin. */
static void choose_part(program *p) {
    size_t part = 1, parts = 1;
    if (p->part) sscanf(p->part, "%zu/%zu", &part, &parts);
    else if (!p->fit) part = (size_t)p->comm->rank + 1, parts = (size_t)p->comm->size;
    const size_t each = p->inputs.n / parts, more = p->inputs.n % parts; /* the first `more` parts have one more */
    p->inputs.first = (part - 1) * each + (part - 1 < more ? part - 1 : more);
    p->inputs.end = p->inputs.first + each + (part - 1 < more);
    p->parts = (int)parts;
    if (!p->out) return;
    const char *end = is_jsonl(p->out) ? ".jsonl" : ".bin";
    if (parts == 1) snprintf(p->out_path, sizeof p->out_path, "%s", p->out);
    else
        snprintf(p->out_path, sizeof p->out_path, "%.*s-%05zu-of-%05zu%s", (int)(strlen(p->out) - strlen(end)), p->out,
                 part, parts, end);
}

/* The exit status; -1: failed. */
static int run(program *p) {
    if (!open_inputs(p)) return -1;
    choose_part(p);
    const int ok = open_tokenizer(p);
    if (!ok) return -1;
    if (ok == 2) printf("stopped  before the centroids were found; the same command starts again\n");
    if (ok == 2) return 0;
    if (p->out) return tokenize(p);
    printf("next     ./tokenize AUDIO... --kmeans %s -o out.bin\n", p->unit_flags.kmeans);
    return p->skipped ? 3 : 0;
}

/* ---- flags ---- */

static void set_flags(program *p) {
    slam_unit_flags *u = &p->unit_flags;
    const slam_flag table[] = {
        SLAM_HEADING("Units"),
        SLAM_FLAG("kmeans", SLAM_TEXT, &u->kmeans, "FILE.npy", NULL,
                  "the centroids, one per unit; FILE.json beside it has their settings, and a flag that contradicts it "
                  "is an error"),
        SLAM_NUMBER("fit", SLAM_INT, &p->fit, "K", NULL, 1, 65534,
                    "find K centroids in the audio first and write them to --kmeans"),
        SLAM_NUMBER("fit-frames", SLAM_LONG, &p->fit_frames, "N", "1000000 | 200000", 1, 1e9,
                    "frames for --fit, sampled evenly from the audio; HuBERT's take 3 kB each"),
        SLAM_NUMBER("seed", SLAM_LONG, &p->seed, "N", "0", 0, 9e15, "of --fit"),
        SLAM_HEADING("Features (of --fit, or of centroids without a FILE.json)"),
        SLAM_FLAG(
            "features", SLAM_CHOICE, &u->features, "mfcc|hubert", "mfcc | hubert",
            "mfcc: 13 MFCC with their first and second differences, no model needed; hubert: a layer of --hubert"),
        SLAM_FLAG("rate", SLAM_CHOICE, &u->rate, "25|50", "25 | -", "frames per second"),
        SLAM_FLAG("hubert", SLAM_PATH, &u->hubert, "DIR", NULL,
                  "a HuBERT model in Hugging Face's format (config.json, model.safetensors)"),
        SLAM_NUMBER("layer", SLAM_INT, &u->layer, "N", "11", 0, 1000,
                    "of --hubert: output of its Nth transformer layer; 0: input of the first"),
        SLAM_NUMBER("pad", SLAM_INT, &u->pad, "N", "40", 0, 16000,
                    "of --hubert: zeros before and after the samples; 40 as SlamKit, 0 as fairseq and textlesslib"),
        SLAM_FLAG("normalize", SLAM_SWITCH, &u->normalize, NULL, NULL,
                  "scale the waveform of each file or segment to zero mean and unit variance"),
        SLAM_FLAG("no-dedup", SLAM_SWITCH, &u->no_dedup, NULL, NULL,
                  "a unit for every frame; else equal neighbours are merged"),
        SLAM_HEADING("Input"),
        SLAM_FLAG("channel", SLAM_TEXT, &u->channel, "mix|N", NULL,
                  "of files with several: their mean, or channel N (from 1; SlamKit's evaluation reads the first). "
                  "--kmeans records that of --fit, which is the default; mix if there is none"),
        SLAM_NUMBER("max-seconds", SLAM_REAL, &p->max_seconds, "S", "60", 0, 1e6,
                    "split longer files into segments of at most S seconds, in the quietest 20 ms of the last fifth "
                    "before S; a segment is a document of its own, with start and end in FILE.jsonl; 0: never"),
        SLAM_FLAG("pairs", SLAM_TEXT, &p->pairs, "IN.jsonl", NULL,
                  "preference pairs: lines with prompt_path, chosen_path, rejected_path (audio files, relative to "
                  "IN.jsonl) become lines with prompt, chosen, rejected as units, in OUT.jsonl"),
        SLAM_FLAG(
            "text", SLAM_TEXT, &p->text, "FILE", NULL,
            "text that --tts synthesises: a document per line; lines of prompt, chosen and rejected separated by tabs "
            "become pairs"),
        SLAM_FLAG("tts", SLAM_LIST, &p->tts, "'COMMAND {text}'", NULL,
                  "shell command that writes WAV to stdout, e.g. 'espeak-ng --stdout {text}', where {text} is a quoted "
                  "variable; without it the line is on stdin, as for piper. Repeated: voices take turns"),
        SLAM_NUMBER("max-repetition", SLAM_REAL, &p->max_repetition, "X", "0.3", 0, 2,
                    "skip pairs in whose text a share of X or more of the word pairs occurs twice (auto-BLEU-2 of "
                    "prompt and chosen); 0: none. With --pairs only if given"),
        SLAM_FLAG("part", SLAM_TEXT, &p->part, "I/N", NULL,
                  "only part I (from 1) of N equal ones, for N machines, into OUT-0000I-of-0000N; together they hold "
                  "what one machine writes"),
        SLAM_HEADING("Output"),
        SLAM_FLAG("out", SLAM_TEXT, &p->out, "FILE", NULL,
                  "FILE.bin: token shards, the input of train; FILE.jsonl: SlamKit features (units, duration, "
                  "file_name), or pairs. Also -o"),
        SLAM_FLAG("audio-repr", SLAM_SWITCH, &p->audio_repr, NULL, NULL,
                  "in FILE.jsonl: SlamKit tokens (\"<Un3><Un49>...\") instead"),
        SLAM_NUMBER("shard-tokens", SLAM_LONG, &p->shard_tokens, "N", "500000000", 2, 2147483647,
                    "larger FILE.bin are split into FILE-00001.bin, FILE-00002.bin, ..., the last is FILE.bin"),
        SLAM_HEADING("Machine"),
        SLAM_FLAG("device", SLAM_DEVICE, &p->device, "NAME", "auto", "for --hubert: auto, cpu, cuda or cuda:N"),
        SLAM_FLAG("dtype", SLAM_CHOICE, &p->dtype, "auto|f32|bf16", "auto",
                  "for --hubert: f32 on the CPU, bf16 on CUDA"),
        SLAM_NUMBER("threads", SLAM_INT, &p->threads, "N", "0", 0, 4096,
                    "CPU threads; 0: one per core. The output is the same for any number"),
    };
    memcpy(p->table, table, sizeof table);
    p->flags.at = p->table;
    p->flags.n = (int)(sizeof table / sizeof *table);
    p->flags.program = "tokenize";
    p->flags.usage = "[options] AUDIO...|UNITS.jsonl... -o OUT.bin|OUT.jsonl";
    p->flags.about =
        "Converts speech to units. AUDIO: audio files of any sample rate (WAV; with libsndfile also FLAC, Ogg, MP3, "
        "AIFF and more), folders of them, or @LIST with a path per line (# begins a comment, - is stdin), or with "
        "fairseq's manifest. UNITS.jsonl: units, to be converted to "
        "another format. A command that was interrupted resumes when it is repeated. Defaults stand in brackets; where "
        "there are two, the second is for --hubert. Exit status: 0, all files done, or stopped by a signal; 3, done, "
        "but some files or lines were skipped; 1, an error; 2, a wrong command line.";
}

static const char hint[] =
    "tokenize turns speech into units for train:\n"
    "\n"
    "  ./tokenize AUDIO... --fit 100 --kmeans km.npy    finds 100 centroids in AUDIO\n"
    "  ./tokenize AUDIO... --kmeans km.npy -o out.bin   writes AUDIO as units\n"
    "\n"
    "AUDIO: audio files, folders of them, or @LIST with a path per line. ./tokenize --help lists all flags: text\n"
    "to speech to units (--text), preference pairs (--pairs), and more.\n";

/* Flags that have no meaning for this kind of input. */
static int check_unused(const program *p, const char *why, const char *const *flags) {
    for (; *flags; flags++)
        if (slam_flags_given(&p->flags, *flags)) return slam_set_error("--%s: %s", *flags, why);
    return 1;
}

/* AUDIO, units, --pairs or --text: exactly one of them. */
static int check_input(const program *p) {
    static const char *const of_audio[] = {"fit",      "features",    "rate",    "hubert", "layer", "pad", "normalize",
                                           "no-dedup", "max-seconds", "channel", "device", "dtype", NULL};
    static const char *const of_files[] = {"fit", "max-seconds", NULL}, *const of_text[] = {"max-repetition", NULL};
    const slam_strings *rest = &p->flags.rest;
    size_t jsonl = 0;
    for (size_t i = 0; i < rest->n; i++) jsonl += is_jsonl(rest->at[i]);
    if ((rest->n > 0) + (p->pairs != NULL) + (p->text != NULL) > 1)
        return slam_set_error("AUDIO, --pairs and --text: expected one of them");
    if (!rest->n && !p->pairs && !p->text) return slam_set_error("no AUDIO: expected audio files, folders or @LIST");
    if (jsonl && jsonl < rest->n) return slam_set_error("units (.jsonl) and audio together: expected one kind");
    if (p->text && !p->tts.n)
        return slam_set_error("--text: expected --tts 'COMMAND {text}' as well, which synthesises it");
    if (p->tts.n && !p->text) return slam_set_error("--tts: expected --text FILE as well");
    if (p->max_seconds > 0 && p->max_seconds < 1)
        return slam_set_error("--max-seconds %g: expected 0, or at least 1", p->max_seconds);
    if (jsonl && !check_unused(p, "the inputs are units already", of_audio)) return 0;
    if ((p->pairs || p->text) && !check_unused(p, "expected with AUDIO only", of_files)) return 0;
    if (!jsonl && !p->unit_flags.kmeans)
        return slam_set_error(p->fit ? "--fit: expected --kmeans FILE.npy, where the centroids are written"
                                     : "expected --kmeans FILE.npy; --fit K makes one");
    return p->pairs || p->text || check_unused(p, "expected with --pairs or --text only", of_text);
}

static int check_part(const program *p) {
    unsigned long part = 0, parts = 0;
    char more = 0;
    if (p->fit && p->comm->size > 1) return slam_set_error("--fit: expected one process, without mpirun or srun");
    for (size_t i = 0; p->comm->size > 1 && i < p->flags.rest.n; i++)
        if (!strcmp(p->flags.rest.at[i], "-") || !strcmp(p->flags.rest.at[i], "@-"))
            return slam_set_error("%s: ranks cannot share stdin, expected @LIST", p->flags.rest.at[i]);
    if (!p->part) return 1;
    if (sscanf(p->part, "%lu/%lu%c", &part, &parts, &more) != 2 || strchr(p->part, '-') || part < 1 || part > parts ||
        parts > 99999)
        return slam_set_error("--part %s: expected I/N with I from 1 to N, e.g. 2/8", p->part);
    if (p->comm->size > 1) return slam_set_error("--part %s: each rank is a part already; use one of the two", p->part);
    return !p->fit || slam_set_error("--part: expected without --fit, which finds centroids once for all parts");
}

/* What the table of flags cannot check. */
static int check_flags(const program *p) {
    static const char *const of_fit[] = {"fit-frames", "seed", NULL};
    const size_t n = p->out ? strlen(p->out) : 0;
    const int bin = n > 4 && !strcmp(p->out + n - 4, ".bin"), jsonl = n && is_jsonl(p->out);
    if (!check_input(p) || !check_part(p)) return 0;
    if (!p->fit && !p->out) return slam_set_error("expected -o OUT.bin or OUT.jsonl, or --fit K");
    if (p->out && !bin && !jsonl)
        return slam_set_error("--out %s: expected a name that ends in .bin or .jsonl", p->out);
    if (n > 4000) return slam_set_error("--out: the path has %zu bytes, expected at most 4000", n);
    if (p->audio_repr && !jsonl) return slam_set_error("--audio-repr: expected with OUT.jsonl");
    if (slam_flags_given(&p->flags, "shard-tokens") && !bin)
        return slam_set_error("--shard-tokens: expected with OUT.bin");
    return p->fit || check_unused(p, "expected with --fit K", of_fit);
}

int main(int argc, char **argv) {
    static program p;
    if (!(p.comm = slam_program_begin("tokenize"))) return 1;
    set_flags(&p);
    if (argc == 1) {
        fputs(hint, stdout);
        return slam_program_end(&p.flags, p.comm, 0);
    }
    const int parsed = slam_flags_parse(&p.flags, argc, argv);
    if (parsed == 2) return slam_program_end(&p.flags, p.comm, 0);
    if (!parsed || !slam_flags_defaults(&p.flags, p.unit_flags.hubert != NULL) || !check_flags(&p))
        return slam_program_end(&p.flags, p.comm, 2);
    slam_threads(p.comm, p.threads);
    slam_signals_catch();
    int status = run(&p);
    if (!slam_all_ok(p.comm, status >= 0)) status = 1;
    status = (int)slam_comm_max(p.comm, status);
    slam_program_end(&p.flags, p.comm, status);
    slam_inputs_free(&p.inputs);
    slam_tokenizer_free(p.tokenizer);
    if (p.ops) slam_ops_free(p.ops);
    slam_flags_free(&p.flags);
    return status;
}
