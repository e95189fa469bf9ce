/* .npy: the numbers are finite and as many as the file has. */
#include "fuzz.h"

static int fuzz_npy(const uint8_t *bytes, size_t size) {
    file_map map = fuzz_map(bytes, size);
    float *data = NULL;
    size_t rows = 0, cols = 0;
    if (npy_parse(&map, "fuzz", &data, &rows, &cols)) {
        for (size_t i = 0; i < rows * cols; i++) MUST(isfinite(data[i]));
        MUST(rows * cols <= size / 4);
        free(data);
    }
    fuzz_free(&map);
    return 0;
}
