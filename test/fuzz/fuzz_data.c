/* Tokens of a shard: the documents that are found are `1 u.. 1`, one after the other, and nothing but `1 1` is between them. */
#include "fuzz.h"

static int fuzz_data(const uint8_t *bytes, size_t size) {
    enum { V = 6 }; // so that many inputs are good
    token_file f = ZERO;
    document_list list = ZERO;
    uint64_t hash = 0, again = 0;
    size_t at = 0;
    uint16_t *tokens = (uint16_t *)malloc(size ? size * sizeof *tokens : 1);
    MUST(tokens);
    for (size_t i = 0; i < size; i++) tokens[i] = bytes[i] < 128 ? bytes[i] % 7 : 2; // 6 and 0 are wrong
    f.path = string_copy("fuzz");
    f.tokens = tokens;
    f.n = size;
    if (scan_file(&f, 0, V, &list, &hash)) {
        for (size_t i = 0; i < list.n; i++) {
            const slam_chunk *d = &list.at[i];
            for (; at < d->first; at++) MUST(tokens[at] == DOCUMENT_TOKEN);
            MUST(d->n >= 3 && tokens[at] == DOCUMENT_TOKEN && tokens[at + d->n - 1] == DOCUMENT_TOKEN);
            for (uint32_t k = 1; k + 1 < d->n; k++) MUST(tokens[at + k] >= FIRST_UNIT && tokens[at + k] < V);
            at += d->n;
        }
        for (; at < size; at++) MUST(tokens[at] == DOCUMENT_TOKEN);
        list.n = 0;
        if (size > 2 && tokens[1] >= FIRST_UNIT) {
            tokens[1] = tokens[1] == 2 ? 3 : 2;
            MUST(scan_file(&f, 0, V, &list, &again) && again != hash);
        }
    } else MUST(strstr(slam_error(), "fuzz: "));
    free(list.at);
    free(tokens);
    free(f.path);
    return 0;
}
