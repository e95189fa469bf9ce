/* safetensors: an input that starts with '{' is the header up to a zero byte, and the data behind it, because mutations would
   never make the length of a header right. Tensors fill the data exactly, and all their numbers can be read. */
#include "fuzz.h"

static void check_safetensors(const tensors *t, size_t data) {
    for (size_t i = 0; i < t->n; i++) {
        const tensor *one = &t->at[i];
        const size_t bytes = one->count * dtype_bytes[one->dtype];
        float number;
        MUST(tensors_find(t, one->name) == one && bytes <= data);
        data -= bytes;
        for (size_t k = 0; k < one->count && one->dtype <= DTYPE_F64; k++) MUST(tensor_floats(one, &number, k, 1));
        MUST(!tensor_floats(one, &number, one->count, 1));
        tensor_has_shape(one, 2, 3, 1);
    }
    MUST(data == 0);
    tensors_metadata(t, "format");
}

static int fuzz_safetensors(const uint8_t *bytes, size_t size) {
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
    tensors *t = NEW(tensors, 1);
    if (tensors_add(t, "fuzz", &map)) {
        uint64_t header;
        memcpy(&header, t->file[0].map.data, 8);
        check_safetensors(t, t->file[0].map.size - 8 - header);
    }
    t->file[0].map.size = 0; // not mapped
    tensors_close(t);
    fuzz_free(&map);
    return 0;
}
