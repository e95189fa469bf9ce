/* safetensors: half the time the header's length is right, as bytes that change never make it: the input is then the header up to
   a zero byte, and the data behind it. Tensors fill the data exactly, and all their numbers can be read. */
#include "fuzz.h"

static void check(const tensors *t, size_t data) {
    float number;
    double wide = 0;
    for (size_t i = 0; i < tensors_count(t); i++) {
        const tensor *one = tensors_at(t, i);
        MUST(tensors_find(t, one->name) == one);
        MUST(tensor_bytes(one) <= data);
        data -= tensor_bytes(one);
        for (size_t k = 0; k < one->count && one->dtype <= DTYPE_F64; k++) {
            MUST(tensor_floats(one, &number, k, 1));
            wide += (double)number;
        }
        MUST(one->count == SIZE_MAX || !tensor_floats(one, &number, one->count, 1));
        tensor_shape_is(one, 2, 3, 1);
    }
    (void)wide;
    MUST(data == 0);
    tensors_metadata(t, "format");
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    file_map map;
    if (size > 0 && bytes[0] == '{') {
        const uint8_t *zero = (const uint8_t *)memchr(bytes, 0, size);
        const uint64_t header = zero ? (uint64_t)(zero - bytes) : size;
        const size_t data = zero ? size - header - 1 : 0;
        uint8_t *whole = (uint8_t *)malloc(8 + header + data);
        MUST(whole);
        memcpy(whole, &header, 8);
        memcpy(whole + 8, bytes, header);
        if (data) memcpy(whole + 8 + header, zero + 1, data);
        map = fuzz_map(whole, 8 + header + data);
        free(whole);
    } else map = fuzz_map(bytes, size);
    tensors *t = (tensors *)mem_new(1, sizeof *t);
    MUST(t);
    if (tensors_add(t, "fuzz", &map) && tensors_sort(t)) {
        uint64_t header;
        memcpy(&header, t->file[0].map.data, 8);
        check(t, t->file[0].map.size - 8 - header);
    }
    tensors_close(t);
    return 0;
}
