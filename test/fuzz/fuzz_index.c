/* The index of a model in several files: two valid ones, and the input as model.safetensors.index.json. Nothing outside the
   folder is opened. */
#include "fuzz.h"

static char folder[] = "/dev/shm/fuzz-index-XXXXXX";

static void clean(void) { remove_tree(folder); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const float numbers[6] = {1, 2, 3, 4, 5, 6};
    const tensor first = {"a", DTYPE_F32, 2, {2, 3}, numbers, 6, NULL};
    const tensor second = {"b", DTYPE_F32, 1, {6}, numbers, 6, NULL};
    (void)argc;
    (void)argv;
    MUST(mkdtemp(folder));
    atexit(clean);
    MUST(tensors_write(path_join(folder, "one").at, &first, 1, NULL) &&
         tensors_write(path_join(folder, "two").at, &second, 1, NULL));
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
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
