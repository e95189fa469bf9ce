/* Token shards: the tokens fill the file. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    shard s = SLAM_ZERO;
    unsigned sum = 0;
    s.path = text_copy("fuzz");
    s.map = fuzz_map(bytes, size);
    if (s.path && shard_parse(&s)) {
        for (size_t i = 0; i < s.n; i++) sum += s.tokens[i];
        MUST(2 * s.n + SHARD_HEADER == size && s.V >= 0 && s.V <= 65536);
    }
    (void)sum;
    shard_close(&s);
    return 0;
}
