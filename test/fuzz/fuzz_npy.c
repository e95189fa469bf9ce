/* .npy: what is read is finite and as large as the file. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    float *data = NULL, sum = 0;
    size_t rows = 0, cols = 0;
    if (npy_parse(bytes, size, "fuzz", &data, &rows, &cols)) {
        for (size_t i = 0; i < rows * cols; i++) {
            MUST(isfinite(data[i]));
            sum += data[i];
        }
        MUST(rows * cols <= size / 4);
        free(data);
    }
    (void)sum;
    return 0;
}
