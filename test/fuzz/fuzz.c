/* All fuzz targets in one program, since slam.h takes long to compile; its name says which one runs. */
#include "fuzz_audio.c"
#include "fuzz_config.c"
#include "fuzz_csv.c"
#include "fuzz_data.c"
#include "fuzz_gold.c"
#include "fuzz_hubert.c"
#include "fuzz_index.c"
#include "fuzz_json.c"
#include "fuzz_npy.c"
#include "fuzz_pairs.c"
#include "fuzz_safetensors.c"
#include "fuzz_shard.c"
#include "fuzz_units.c"
#include "fuzz_vocoder.c"

static const struct {
    const char *name;
    int (*run)(const uint8_t *bytes, size_t size);
} targets[] = {
    {"fuzz_audio", fuzz_audio},
    {"fuzz_config", fuzz_config},
    {"fuzz_csv", fuzz_csv},
    {"fuzz_data", fuzz_data},
    {"fuzz_gold", fuzz_gold},
    {"fuzz_hubert", fuzz_hubert},
    {"fuzz_index", fuzz_index},
    {"fuzz_json", fuzz_json},
    {"fuzz_npy", fuzz_npy},
    {"fuzz_pairs", fuzz_pairs},
    {"fuzz_safetensors", fuzz_safetensors},
    {"fuzz_shard", fuzz_shard},
    {"fuzz_units", fuzz_units},
    {"fuzz_vocoder", fuzz_vocoder},
};
static int (*target)(const uint8_t *bytes, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *slash = strrchr(**argv, '/'), *name = slash ? slash + 1 : **argv;
    (void)argc;
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (!strcmp(name, targets[i].name)) target = targets[i].run;
    MUST(target);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) { return target(bytes, size); }
