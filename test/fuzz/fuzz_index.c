/* The index of a model in several files: two valid ones, and the input as model.safetensors.index.json. Nothing outside the
   folder is opened. */
#include "fuzz.h"

static char index_folder[] = "/dev/shm/fuzz-index-XXXXXX";

static void index_clean(void) { remove_tree(index_folder); }

static void index_begin(void) {
    const float numbers[6] = {1, 2, 3, 4, 5, 6};
    const tensor first = {"a", DTYPE_F32, 2, {2, 3}, numbers, 6, NULL};
    const tensor second = {"b", DTYPE_F32, 1, {6}, numbers, 6, NULL};
    MUST(mkdtemp(index_folder));
    atexit(index_clean);
    MUST(tensors_write(path_join(index_folder, "one").at, &first, 1, NULL) &&
         tensors_write(path_join(index_folder, "two").at, &second, 1, NULL));
}

static int fuzz_index(const uint8_t *bytes, size_t size) {
    static int begun;
    const char *folder = index_folder;
    if (!begun++) index_begin();
    int fd = open(path_join(folder, "model.safetensors.index.json").at, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    MUST(fd >= 0 && write(fd, bytes, size) == (ssize_t)size);
    close(fd);
    tensors *t = tensors_open(folder);
    MUST(t || strstr(slam_error(), folder));
    for (size_t i = 0; t && i < t->files; i++)
        MUST(strncmp(t->file[i].path, folder, strlen(folder)) == 0 &&
             !strchr(t->file[i].path + strlen(folder) + 1, '/'));
    tensors_close(t);
    return 0;
}
