/* fuzz.h - shared by the fuzz targets. A target is given bytes and passes them to one reader, which must return a value or an
   error; the value is then checked against what else is known about it. `make fuzz`, then e.g.

       build/fuzz/fuzz_audio -max_total_time=600 new-corpus test/fuzz/seeds/audio */
#ifndef FUZZ_H
#define FUZZ_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memfd_create */
#endif
#define SLAM_IMPLEMENTATION
#include "../../slam.h"

/* Ends the run if the condition does not hold. */
#define MUST(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s does not hold; slam_error() is '%s'\n", __FILE__, __LINE__, #condition,         \
                    slam_error());                                                                                     \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The bytes in memory of exactly their size, so that AddressSanitizer sees a step beyond them. */
static inline file_map fuzz_map(const void *bytes, size_t size) {
    file_map map = ZERO;
    void *copy = malloc(size ? size : 1);
    MUST(copy);
    memcpy(copy, bytes, size);
    map.data = (const unsigned char *)copy;
    map.size = size;
    return map;
}

static inline void fuzz_free(file_map *map) { free((void *)(uintptr_t)map->data); }

/* The path of a file of the bytes, for readers that take a path. */
static inline const char *fuzz_file(const void *bytes, size_t size) {
    static int fd = -1;
    static char path[40];
    if (fd < 0) {
        fd = memfd_create("fuzz", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    MUST(fd >= 0 && ftruncate(fd, 0) == 0 && pwrite(fd, bytes, size, 0) == (ssize_t)size);
    return path;
}

static inline void fuzz_write(const char *folder, const char *name, const uint8_t *bytes, size_t n) {
    char path[100];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

/* A model's folder of the bytes: the length of config.json in four of them, it, and model.safetensors. NULL: too few. */
static inline const char *fuzz_folder(const uint8_t *bytes, size_t size) {
    static char folder[] = "/tmp/fuzz.XXXXXX";
    static int made;
    uint32_t n;
    if (size < 4) return NULL;
    memcpy(&n, bytes, 4);
    if (n > size - 4) return NULL;
    if (!made++) MUST(mkdtemp(folder));
    fuzz_write(folder, "config.json", bytes + 4, n);
    fuzz_write(folder, "model.safetensors", bytes + 4 + n, size - 4 - n);
    return folder;
}
#endif
