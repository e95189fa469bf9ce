/* Token shards: the tokens fill the file. */
#include "fuzz.h"

static int fuzz_shard(const uint8_t *bytes, size_t size) {
    shard s = ZERO;
    unsigned sum = 0;
    s.map = fuzz_map(bytes, size);
    if (shard_parse(&s, "fuzz")) {
        for (size_t i = 0; i < s.n; i++) sum += s.tokens[i];
        MUST(2 * s.n + SHARD_HEADER == size && s.V >= 0 && s.V <= 65536);
    }
    (void)sum;
    fuzz_free(&s.map);
    return 0;
}
