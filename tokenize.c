/* tokenize - speech into units, and the centroids that decide them. */
#include "slam.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct options {
    slam_unit_flags units;
    char *out, *pairs, *text, *part, *device, *dtype;
    slam_list tts;
    int fit, audio_repr, threads;
    long fit_frames, shard_tokens, seed;
    double max_seconds, max_repetition;
} options;

typedef struct job {
    options o;
    slam_flag table[32];
    slam_flags flags;
    slam_ranks *ranks;
    slam_ops *ops; // of HuBERT
    slam_sources *sources;
    const char *what; // they are: "file" or "line"
    int units;        // they are units already: there is nothing to compute
    slam_progress progress;
    int left_out, stopped; // files that a fit left out; by a signal
} job;

static int flag_table(options *o, slam_flag *f) {
    const slam_flag table[] = {
        {NULL, 0, NULL, NULL, NULL, "Units", 0, 0, 0, 0},
        {"kmeans", SLAM_TEXT, &o->units.kmeans, "FILE.npy", NULL,
         "the centroids, one a unit; FILE.json beside it says what they are of, and a flag that contradicts it is an error", 0, 0,
         0, 0},
        {"fit", SLAM_INT, &o->fit, "K", NULL, "find K centroids in the audio first and write them to --kmeans", 1, 65534, 0, 0},
        {"fit-frames", SLAM_LONG, &o->fit_frames, "N", "1000000 | 200000",
         "frames that --fit goes by, drawn evenly from the audio; HuBERT's take 3 kB each", 1, 1e9, 0, 0},
        {"seed", SLAM_LONG, &o->seed, "N", "0", "of --fit", 0, 9e15, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Features (of --fit, or of centroids without a FILE.json)", 0, 0, 0, 0},
        {"features", SLAM_CHOICE, &o->units.features, "mfcc|hubert", "mfcc | hubert",
         "mfcc: 13 MFCC with their first and second differences, which need no model; hubert: a layer of --hubert", 0, 0, 0, 0},
        {"rate", SLAM_CHOICE, &o->units.rate, "25|50", "25 | -", "frames a second", 0, 0, 0, 0},
        {"hubert", SLAM_TEXT, &o->units.hubert, "DIR", NULL,
         "a HuBERT model in Hugging Face's format (config.json, model.safetensors)", 0, 0, 0, 0},
        {"layer", SLAM_INT, &o->units.layer, "N", "11",
         "of --hubert: what leaves its Nth transformer layer; 0: what enters the first", 0, 1000, 0, 0},
        {"normalize", SLAM_SWITCH, &o->units.normalize, NULL, NULL, "each file's waveform to zero mean and unit variance", 0, 0, 0,
         0},
        {"no-dedup", SLAM_SWITCH, &o->units.no_dedup, NULL, NULL,
         "a unit for every frame; else neighbours that are the same become one", 0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Input", 0, 0, 0, 0},
        {"max-seconds", SLAM_REAL, &o->max_seconds, "S", "60",
         "a longer file is cut into parts of at most S seconds, in the quietest 20 ms of the last fifth before S; a part is a "
         "document of its own, with start and end in FILE.jsonl; 0: never cut",
         0, 1e6, 0, 0},
        {"pairs", SLAM_TEXT, &o->pairs, "IN.jsonl", NULL,
         "preference pairs: lines with prompt_path, chosen_path, rejected_path (audio files, as seen from IN.jsonl) become lines "
         "with prompt, chosen, rejected as units, for OUT.jsonl",
         0, 0, 0, 0},
        {"text", SLAM_TEXT, &o->text, "FILE", NULL,
         "text that --tts speaks: a document a line; lines of prompt, chosen and rejected with tabs between them become pairs", 0,
         0, 0, 0},
        {"tts", SLAM_LIST, &o->tts, "'COMMAND {text}'", NULL,
         "writes WAV to its stdout, e.g. 'espeak-ng --stdout {text}'; without {text} it reads a line from its stdin, as piper does. It "
         "is run without a shell, --threads at a time. Given several "
         "times: voices that take turns",
         0, 0, 0, 0},
        {"max-repetition", SLAM_REAL, &o->max_repetition, "X", "0.3",
         "of pairs with text: those are left out of whose pairs of words in prompt and chosen a share of X or more occurs twice "
         "(auto-BLEU-2); 0: none are. With --pairs only where it is given",
         0, 2, 0, 0},
        {"part", SLAM_TEXT, &o->part, "I/N", NULL,
         "only part I (from 1) of N equal ones of all files or lines, for N machines: what they write, one after the other, is what "
         "one machine writes",
         0, 0, 0, 0},
        {NULL, 0, NULL, NULL, NULL, "Output", 0, 0, 0, 0},
        {"out", SLAM_TEXT, &o->out, "FILE", NULL,
         "FILE.bin: token shards, what train reads; FILE.jsonl: SlamKit features (units, duration, file_name), or pairs. Also -o",
         0, 0, 0, 0},
        {"audio-repr", SLAM_SWITCH, &o->audio_repr, NULL, NULL, "with FILE.jsonl: SlamKit tokens (\"<Un3><Un49>...\") instead", 0,
         0, 0, 0},
        {"shard-tokens", SLAM_LONG, &o->shard_tokens, "N", "500000000",
         "a FILE.bin that would grow larger becomes FILE-00001.bin, FILE-00002.bin, ..., and FILE.bin the last", 2, 2147483647, 0,
         0},
        {NULL, 0, NULL, NULL, NULL, "Machine", 0, 0, 0, 0},
        {"device", SLAM_TEXT, &o->device, "NAME", "auto", "of --hubert: auto, cpu, cuda or cuda:N", 0, 0, 0, 0},
        {"dtype", SLAM_CHOICE, &o->dtype, "auto|f32|bf16", "auto", "of --hubert: f32 on the CPU, bf16 on CUDA", 0, 0, 0, 0},
        {"threads", SLAM_INT, &o->threads, "N", "0", "of the CPU; 0: one a core. The output is the same for any number", 0, 4096, 0,
         0},
    };
    const int n = (int)(sizeof table / sizeof *table);
    for (int i = 0; i < n; i++) f[i] = table[i];
    return n;
}

static const char hint[] =
    "tokenize turns speech into units for train:\n"
    "\n"
    "  ./tokenize AUDIO... --fit 100 --kmeans km.npy    finds 100 centroids in AUDIO\n"
    "  ./tokenize AUDIO... --kmeans km.npy -o out.bin   writes AUDIO as units\n"
    "\n"
    "AUDIO: audio files, folders of them, or @LIST with a path a line. ./tokenize --help lists all flags: text\n"
    "to speech to units (--text), preference pairs (--pairs), and more.\n";

/* ---- what is shown ---- */

static int watch(void *context, const slam_speech_progress *p) {
    job *j = (job *)context;
    if (p->failed) {
        slam_progress_clear(&j->progress);
        if (slam_ranks_root(j->ranks)) fprintf(stderr, "tokenize: left out: %s\n", p->because ? p->because : p->failed);
        j->left_out++;
        return 1;
    }
    const double seconds = slam_clock() - j->progress.began;
    char what[96];
    if (!strcmp(p->stage, "fit")) snprintf(what, sizeof what, "finding centroids  pass %zu", p->done);
    else if (j->units) snprintf(what, sizeof what, "%zu/%zu lines", p->done, p->of);
    else
        snprintf(what, sizeof what, "%zu/%zu %ss  %.2f h  %.0f h/h", p->done, p->of, j->what, p->seconds / 3600,
                 p->seconds / (seconds > 1e-3 ? seconds : 1e-3));
    slam_progress_show(&j->progress, (double)p->done, (double)p->of, what);
    j->stopped = slam_signals_stop();
    return !j->stopped;
}

static const char *plural(size_t n) { return n == 1 ? "" : "s"; }

/* ---- the quantiser ---- */

/* HuBERT runs on a device; MFCC need none. */
static int open_device(job *j, const slam_speech_settings *s) {
    const options *o = &j->o;
    char note[256];
    if (s->features != SLAM_HUBERT) return 1;
    if (!(j->ops = slam_device(j->ranks, o->device, o->dtype, o->threads, note))) return 0;
    printf("device   %s%s%s%s\nmodel    %s, layer %d\n", j->ops->name, *note ? " (" : "", note, *note ? ")" : "", s->hubert,
           s->layer);
    if (!s->normalize && slam_hubert_asks_normalize(s->hubert))
        printf("         its preprocessor_config.json asks for normalised waveforms, which are not: --normalize makes them so\n");
    fflush(stdout);
    return 1;
}

static slam_quantiser *fit_quantiser(job *j, const slam_speech_settings *settings) {
    const options *o = &j->o;
    const size_t frames = (size_t)o->fit_frames;
    const double began = slam_clock();
    slam_kmeans_report r;
    int may = slam_quantiser_may_fit(o->units.kmeans, settings, j->sources, o->fit, frames, (uint64_t)o->seed);
    if (!slam_ranks_agree(j->ranks, may && (!o->out || slam_tokenize_may(o->out)))) return NULL;
    slam_ranks_broadcast(j->ranks, &may, sizeof may);
    if (may == 2) {
        printf("fit      %s was made by this command before\n", o->units.kmeans);
        return slam_quantiser_open(o->units.kmeans, settings, j->ops);
    }
    slam_quantiser *q = slam_quantiser_fit(settings, j->ops, j->sources, o->fit, frames, (uint64_t)o->seed, watch, j, &r);
    slam_progress_clear(&j->progress);
    if (q && !slam_ranks_agree(j->ranks, !slam_ranks_root(j->ranks) || slam_quantiser_save(q, o->units.kmeans, &r))) {
        slam_quantiser_free(q);
        q = NULL;
    }
    if (!q) return NULL;
    printf("fit      %d centroids from %zu frames in %.1f s, %d full passes, mean squared distance %.4g\n", o->fit, r.frames,
           slam_clock() - began, r.passes, r.inertia);
    if (r.reseeded) printf("         centroids without a frame were moved to the furthest frames, %d times\n", r.reseeded);
    if (r.dead) printf("         %d centroids have no frame: the audio holds fewer different ones than %d\n", r.dead, o->fit);
    printf("wrote    %s, and its settings beside it\n", o->units.kmeans);
    return q;
}

/* ---- the units ---- */

/* The exit status; -1: failed. */
static int tokenize(job *j, const slam_quantiser *q) {
    slam_tokenize_report r;
    const char *out = j->o.out;
    slam_progress_begin(&j->progress);
    const int ok = slam_tokenize(q, j->sources, out, j->o.audio_repr, (uint64_t)j->o.shard_tokens, watch, j, &r);
    const double seconds = slam_clock() - j->progress.began, heard = (double)r.samples / 16000;
    slam_progress_clear(&j->progress);
    if (!ok) return -1;
    if (r.stopped) {
        printf("stopped  after %zu of %zu %ss; the same command goes on from there\n", r.files, slam_sources_count(j->sources),
               j->what);
        return 0;
    }
    const size_t done = r.files - r.failed;
    printf("units    %zu %s%s", done, j->what, plural(done));
    if (r.earlier) printf(" (%zu of them before)", r.earlier);
    if (r.documents != done - r.repeats) printf(", %zu documents", r.documents);
    if (!j->units) printf(heard < 3600 ? ", %.0f s of audio" : ", %.2f h of audio", heard < 3600 ? heard : heard / 3600);
    printf(", in %.1f s\n         %llu tokens", seconds, (unsigned long long)r.tokens);
    if (heard > 0) printf(", %.1f units a second of audio", (double)r.units / heard);
    printf(", %.2f frames a unit\n", r.units ? (double)r.frames / (double)r.units : 0);
    if (r.repeats) printf("         %zu pair%s left out, whose text repeats itself\n", r.repeats, plural(r.repeats));
    const size_t stem = strlen(out) - (strlen(out) > 4 && !strcmp(out + strlen(out) - 4, ".bin") ? 4 : 6);
    if (r.shards > 1) printf("wrote    %.*s-*.bin and %s, %d shards\n", (int)stem, out, out, r.shards);
    else printf("wrote    %s\n", out);
    if (r.failed) printf("failed   %zu %s%s, listed in %s.failed\n", r.failed, j->what, plural(r.failed), out);
    if (slam_sources_pairs_out(j->sources)) return r.failed ? 3 : 0;
    if (r.shards > 1) printf("next     ./train '%.*s*.bin'\n", (int)stem, out);
    else printf("next     ./train %s\n", out);
    return r.failed ? 3 : 0;
}

/* ---- what becomes units ---- */

static int is_jsonl(const char *path) {
    const size_t n = strlen(path);
    return n > 6 && !strcmp(path + n - 6, ".jsonl");
}

static slam_sources *open_arguments(job *j) {
    const slam_list *given = &j->flags.rest;
    slam_list files = {NULL, 0, 0};
    slam_sources *s = NULL;
    if (j->units) return slam_sources_units(given);
    if (slam_audio_list(&files, (const char *const *)given->at, given->n)) {
        if (files.n) s = slam_sources_audio(&files, j->o.max_seconds);
        else slam_refuse("no audio: the manifest names no file");
    }
    slam_list_free(&files);
    return s;
}

static int open_sources(job *j) {
    const options *o = &j->o;
    const double repetition = o->pairs && !slam_flags_given(&j->flags, "max-repetition") ? 0 : o->max_repetition;
    size_t part = 1, of = 1;
    j->what = o->pairs || o->text || j->units ? "line" : "file";
    if (o->pairs) j->sources = slam_sources_pairs(o->pairs, repetition);
    else if (o->text) j->sources = slam_sources_text(o->text, &o->tts, repetition);
    else j->sources = open_arguments(j);
    if (!j->sources) return 0;
    if (slam_sources_pairs_out(j->sources) && (!is_jsonl(o->out) || o->audio_repr))
        return slam_refuse("--out %s: pairs go into a name that ends in .jsonl, without --audio-repr", o->out);
    if (o->part) sscanf(o->part, "%zu/%zu", &part, &of);
    return slam_sources_part(j->sources, part, of);
}

/* The exit status; -1: failed. */
static int run(job *j) {
    slam_speech_settings settings;
    const options *o = &j->o;
    if (!slam_ranks_agree(j->ranks, open_sources(j))) return -1;
    slam_sources_ranks(j->sources, j->ranks);
    slam_progress_begin(&j->progress);
    if (j->units && !o->units.kmeans) return tokenize(j, NULL);
    if (!slam_ranks_agree(j->ranks, slam_unit_settings(&j->flags, &o->units, o->fit, &settings)) ||
        !slam_ranks_agree(j->ranks, open_device(j, &settings)))
        return -1;
    slam_quantiser *q = o->fit ? fit_quantiser(j, &settings) : slam_quantiser_open(o->units.kmeans, &settings, j->ops);
    int status = -1;
    j->stopped = (int)slam_ranks_max(j->ranks, j->stopped);
    if (!slam_ranks_agree(j->ranks, q != NULL)) {
        slam_quantiser_free(q);
        q = NULL;
    }
    if (q && o->out) status = tokenize(j, q);
    else if (q) {
        printf("next     ./tokenize AUDIO... --kmeans %s -o out.bin\n", o->units.kmeans);
        status = j->left_out ? 3 : 0;
    } else if (j->stopped) {
        printf("stopped  before the centroids were found; the same command begins anew\n");
        status = 0;
    }
    slam_quantiser_free(q);
    return status;
}

/* Flags that mean nothing for what becomes units here. */
static int check_unused(const job *j, const char *why, const char *const *flags) {
    for (; *flags; flags++)
        if (slam_flags_given(&j->flags, *flags)) return slam_refuse("--%s: %s", *flags, why);
    return 1;
}

/* AUDIO, units, --pairs or --text: one of them. */
static int check_input(job *j) {
    static const char *const of_audio[] = {"fit",      "features",    "rate",   "hubert", "layer", "normalize",
                                           "no-dedup", "max-seconds", "device", "dtype",  NULL};
    static const char *const of_files[] = {"fit", "max-seconds", NULL};
    static const char *const of_text[] = {"max-repetition", NULL};
    const options *o = &j->o;
    const slam_list *rest = &j->flags.rest;
    size_t jsonl = 0;
    for (size_t i = 0; i < rest->n; i++) jsonl += is_jsonl(rest->at[i]);
    if ((rest->n > 0) + (o->pairs != NULL) + (o->text != NULL) > 1)
        return slam_refuse("AUDIO, --pairs and --text: expected one of them");
    if (!rest->n && !o->pairs && !o->text) return slam_refuse("no AUDIO: expected audio files, folders or @LIST");
    if (jsonl && jsonl < rest->n) return slam_refuse("units (.jsonl) and audio together: expected one kind");
    if (o->text && !o->tts.n) return slam_refuse("--text: expected --tts 'COMMAND {text}' as well, which speaks it");
    if (o->tts.n && !o->text) return slam_refuse("--tts: is for --text FILE");
    if (o->max_seconds > 0 && o->max_seconds < 1) return slam_refuse("--max-seconds %g: expected 0, or 1 at least", o->max_seconds);
    j->units = jsonl > 0;
    if (j->units && !check_unused(j, "the units are there already", of_audio)) return 0;
    if ((o->pairs || o->text) && !check_unused(j, "is for AUDIO", of_files)) return 0;
    return o->pairs || o->text || check_unused(j, "is for --pairs and --text", of_text);
}

static int check_part(const options *o) {
    unsigned long part = 0, of = 0;
    char more = 0;
    if (!o->part) return 1;
    if (sscanf(o->part, "%lu/%lu%c", &part, &of, &more) != 2 || strchr(o->part, '-') || part < 1 || part > of)
        return slam_refuse("--part %s: expected I/N with I from 1 to N, e.g. 2/8", o->part);
    return !o->fit || slam_refuse("--part: is for -o OUT; centroids are found once, for all parts");
}

/* What the table cannot say of a flag. */
static int check_flags(job *j) {
    const options *o = &j->o;
    if (!check_input(j) || !check_part(o)) return 0;
    if (!o->units.kmeans && !j->units)
        return slam_refuse(o->fit ? "--fit: expected --kmeans FILE.npy, where the centroids go"
                                  : "expected --kmeans FILE.npy; --fit K makes one");
    if (!o->fit && !o->out) return slam_refuse("expected -o OUT.bin or OUT.jsonl, or --fit K");
    const size_t n = o->out ? strlen(o->out) : 0;
    const int bin = n > 4 && !strcmp(o->out + n - 4, ".bin"), jsonl = n && is_jsonl(o->out);
    if (o->out && !bin && !jsonl) return slam_refuse("--out %s: expected a name that ends in .bin or .jsonl", o->out);
    if (o->audio_repr && !jsonl) return slam_refuse("--audio-repr: is for OUT.jsonl");
    if (slam_flags_given(&j->flags, "shard-tokens") && !bin) return slam_refuse("--shard-tokens: is for OUT.bin");
    if (!o->fit && slam_flags_given(&j->flags, "fit-frames")) return slam_refuse("--fit-frames: is for --fit K");
    if (!o->fit && slam_flags_given(&j->flags, "seed")) return slam_refuse("--seed: is for --fit K");
    return 1;
}

int main(int argc, char **argv) {
    static job j;
    if (!(j.ranks = slam_program_begin("tokenize"))) return 1;
    j.flags.program = "tokenize";
    j.flags.usage = "[options] AUDIO...|UNITS.jsonl... -o OUT.bin|OUT.jsonl";
    j.flags.about =
        "Speech into units. AUDIO: audio files of any sample rate (WAV; with libsndfile also FLAC, Ogg, MP3, AIFF and more), folders of "
        "them, or @LIST with a path a line. UNITS.jsonl: units that are there already, into another form. A command that was cut short goes on where it stopped when it is repeated. The value without a flag stands in brackets; of two, the second is with --hubert. Exit status: 0, all files done, or stopped by a signal (Ctrl-C) after "
        "saying how to go on; 3, done, but some files or lines were left out; 1, an error; 2, a wrong command line.";
    j.flags.at = j.table;
    j.flags.n = flag_table(&j.o, j.table);
    if (argc == 1) {
        fputs(hint, stdout);
        return slam_program_end(&j.flags, j.ranks, 0);
    }
    const int parsed = slam_flags_parse(&j.flags, argc, argv);
    if (parsed == 2) return slam_program_end(&j.flags, j.ranks, 0);
    if (!parsed || !slam_flags_defaults(&j.flags, j.o.units.hubert != NULL) || !check_flags(&j))
        return slam_program_end(&j.flags, j.ranks, 2);
    slam_threads(j.ranks, j.o.threads);
    slam_signals_catch(j.ranks);
    int status = run(&j);
    if (status < 0) {
        slam_progress_clear(&j.progress);
        status = 1;
    }
    slam_program_end(&j.flags, j.ranks, status);
    slam_sources_free(j.sources);
    slam_ops_free(j.ops);
    slam_flags_free(&j.flags);
    return status;
}
