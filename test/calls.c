/* calls.c - an LD_PRELOAD library for guard_test.sh that checks in which order a program makes its files durable.

   CALLS_LOG=FILE  appends a line for each fsync, fdatasync, rename, unlink, rmdir, remove, symlink and ftruncate: `CALL PATH [PATH]`,
                   and the errors found:
                   `unsynced PATH`  a file, or a file of a folder or the folder itself, is renamed but has changed since its last fsync;
                                    or a *.journal is renamed into place while a *.partial beside it has changed since its last fsync
                   `lost PATH`      a link in CALLS_RUN that led to a model leads to none after this call
   CALLS_RUN=DIR   the run folder whose links `latest` and `best` are checked after every call
   CALLS_KILL=N    kills the process with SIGKILL before its Nth call */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct stat synced[4096]; // files as they were at their last fsync
static int n_synced, n_calls, link_seen[2];

static void note(const char *call, const char *a, const char *b) {
    const char *log = getenv("CALLS_LOG");
    const int fd = log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    if (fd < 0) return;
    dprintf(fd, "%s %s %s\n", call, a, b);
    close(fd);
}

static void before(const char *call, const char *a, const char *b) {
    const char *at = getenv("CALLS_KILL");
    if (at && ++n_calls == atoi(at)) raise(SIGKILL);
    note(call, a, b);
}

static void after(void) {
    static const char *const names[2] = {"latest", "best"};
    const char *run = getenv("CALLS_RUN");
    for (int i = 0; run && i < 2; i++) {
        char path[PATH_MAX];
        snprintf(path, sizeof path, "%s/%s/model.safetensors", run, names[i]);
        const int found = access(path, F_OK) == 0;
        if (!found && link_seen[i]) note("lost", path, "");
        link_seen[i] = found;
    }
}

/* Where this file stands in `synced`, or n_synced. */
static int find(const struct stat *s) {
    int i = 0;
    while (i < n_synced && (synced[i].st_ino != s->st_ino || synced[i].st_dev != s->st_dev)) i++;
    return i;
}

static void check_synced(const char *path) {
    struct stat s;
    if (lstat(path, &s) != 0 || (!S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode))) return;
    const struct stat *t = &synced[find(&s)];
    if (t == synced + n_synced || t->st_size != s.st_size || t->st_mtim.tv_sec != s.st_mtim.tv_sec ||
        t->st_mtim.tv_nsec != s.st_mtim.tv_nsec)
        note("unsynced", path, "");
}

/* The files of a folder whose names end in `end`. */
static void check_folder(const char *path, const char *end) {
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        const size_t n = strlen(e->d_name), m = strlen(end);
        char file[PATH_MAX];
        snprintf(file, sizeof file, "%s/%s", path, e->d_name);
        if (e->d_type == DT_REG && n >= m && !strcmp(e->d_name + n - m, end)) check_synced(file);
    }
    if (d) closedir(d);
}

static void sync_done(int fd, int result) {
    struct stat s;
    if (result == 0 && fstat(fd, &s) == 0) {
        const int i = find(&s);
        if (i == n_synced && n_synced < 4095) n_synced++;
        synced[i] = s;
    }
    after();
}

static const char *name_of(int fd, char path[PATH_MAX]) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return path;
}

#define REAL(call) ((__typeof__(&call))dlsym(RTLD_NEXT, #call))

int fsync(int fd) {
    char path[PATH_MAX];
    before("fsync", name_of(fd, path), "");
    const int result = REAL(fsync)(fd);
    sync_done(fd, result);
    return result;
}

int fdatasync(int fd) {
    char path[PATH_MAX];
    before("fdatasync", name_of(fd, path), "");
    const int result = REAL(fdatasync)(fd);
    sync_done(fd, result);
    return result;
}

int rename(const char *from, const char *to) {
    const size_t n = strlen(to);
    char folder[PATH_MAX];
    before("rename", from, to);
    check_synced(from);
    check_folder(from, "");
    snprintf(folder, sizeof folder, "%s", to);
    char *slash = strrchr(folder, '/');
    if (slash) *slash = 0;
    if (n > 8 && !strcmp(to + n - 8, ".journal")) check_folder(slash ? folder : ".", ".partial");
    const int result = REAL(rename)(from, to);
    after();
    return result;
}

int symlink(const char *to, const char *path) {
    before("symlink", to, path);
    const int result = REAL(symlink)(to, path);
    after();
    return result;
}

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    before("ftruncate", name_of(fd, path), "");
    const int result = REAL(ftruncate)(fd, size);
    after();
    return result;
}

#define REMOVES(call)                                                                                                  \
    int call(const char *path) {                                                                                       \
        before(#call, path, "");                                                                                       \
        const int result = REAL(call)(path);                                                                           \
        after();                                                                                                       \
        return result;                                                                                                 \
    }
REMOVES(unlink)
REMOVES(rmdir)
REMOVES(remove)
