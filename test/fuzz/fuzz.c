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

static int (*target)(const uint8_t *bytes, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *name = strrchr(**argv, '_');
    (void)argc;
#define TARGET(which)                                                                                                  \
    if (name && !strcmp(name, "_" #which)) target = fuzz_##which;
    TARGET(audio)
    TARGET(config)
    TARGET(csv)
    TARGET(data)
    TARGET(gold)
    TARGET(hubert)
    TARGET(index)
    TARGET(json)
    TARGET(npy)
    TARGET(pairs)
    TARGET(safetensors)
    TARGET(shard)
    TARGET(units)
    TARGET(vocoder)
    MUST(target);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) { return target(bytes, size); }
