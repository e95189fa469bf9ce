/* check.h - the tests' harness. A test program includes slam.h with SLAM_IMPLEMENTATION, then this file, and reads

       static void test_units(void) {
           if (TEST("units: one line")) {
               units u = SLAM_ZERO;
               if (!CHECK(units_next(&r, &u) == 1, "%s", slam_error())) return;
               check_near("mean", mean(&u), 3.5, 1e-6);
           }
           if (TEST("units: a missing file")) check_fails(units_open(&r, check_path("none")), "cannot be opened");
       }
       int main(void) {
           test_units();
           return check_end();
       }

   TEST begins a named test and ends the one before. Each prints `ok NAME`, with the closest of its comparisons, or
   `FAIL NAME: why` with its first failure; more of them follow indented. check_end prints `N passed, N failed`.
   With CHECK_ONLY=text in the environment only the tests run whose name contains that text. */
#ifndef CHECK_H
#define CHECK_H
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    char name[200], why[20][600]; // the running test and its failures
    int failures, passed, failed;
    char closest[200]; // the comparison that came closest to its tolerance, and how close: figure / tolerance
    double closeness;
    uint64_t
        seed; // of the test's random numbers: TEST sets it to a hash of the name, so that no test changes those of another
} check_state;

/* `if (TEST(format, ...)) ...`: false where CHECK_ONLY asks for other tests. */
#define TEST(...) check_test(__VA_ARGS__)
/* Fails the test with a sentence of its own where `condition` does not hold; returns whether it does. */
#define CHECK(condition, ...) check_that((condition) ? 1 : 0, __FILE__, __LINE__, #condition, __VA_ARGS__)
/* |got - expected| <= tolerance */
#define check_near(what, got, expected, tolerance) check_near_at(__FILE__, __LINE__, what, got, expected, tolerance)
/* |got - expected| <= tolerance |expected| over n numbers, in the Euclidean norm */
#define check_close(what, got, expected, n, tolerance)                                                                 \
    check_close_at(__FILE__, __LINE__, what, got, expected, n, tolerance)
/* `expression` fails (0 or NULL) and leaves a sentence that contains `part`. */
#define check_fails(expression, part)                                                                                  \
    check_fails_at(__FILE__, __LINE__, #expression, (CHECK_NO_ERROR, !(expression)), part)
#ifdef SLAM_IMPLEMENTATION
#define CHECK_NO_ERROR (void)set_error("%s", "")
#else
#define CHECK_NO_ERROR (void)0
#endif

static inline void check_close_test(void) {
    if (!check_state.name[0]) return;
    if (check_state.failures == 0) {
        check_state.passed++;
        printf("ok %s%s%s%s\n", check_state.name, check_state.closest[0] ? "  [" : "", check_state.closest,
               check_state.closest[0] ? "]" : "");
    } else {
        check_state.failed++;
        printf("FAIL %s: %s\n", check_state.name, check_state.why[0]);
        for (int i = 1; i < check_state.failures && i < 20; i++) printf("    %s\n", check_state.why[i]);
        if (check_state.failures > 20) printf("    ... and %d more\n", check_state.failures - 20);
    }
    fflush(stdout);
    check_state.name[0] = check_state.closest[0] = 0;
    check_state.failures = 0;
    check_state.closeness = -1;
}

static inline int check_test(const char *format, ...) {
    const char *only = getenv("CHECK_ONLY");
    va_list args;
    check_close_test();
    va_start(args, format);
    vsnprintf(check_state.name, sizeof check_state.name, format, args);
    va_end(args);
    if (only && !strstr(check_state.name, only)) check_state.name[0] = 0;
    check_state.closeness = -1;
    check_state.seed = 0xcbf29ce484222325u; // FNV-1a
    for (const char *c = check_state.name; *c; c++)
        check_state.seed = (check_state.seed ^ (unsigned char)*c) * 0x100000001b3u;
    return check_state.name[0] != 0;
}

static inline int check_end(void) {
    check_close_test();
    printf("%d passed, %d failed\n", check_state.passed, check_state.failed);
    return check_state.failed != 0;
}

static inline void check_fail(const char *file, int line, const char *format, ...) {
    char text[480];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (!check_state.name[0]) snprintf(check_state.name, sizeof check_state.name, "(a check outside any TEST)");
    if (check_state.failures++ < 20)
        snprintf(check_state.why[check_state.failures - 1], sizeof check_state.why[0], "%.100s:%d: %s", file, line,
                 text);
}

static inline int check_that(int holds, const char *file, int line, const char *condition, const char *format, ...) {
    char text[300];
    va_list args;
    if (holds) return 1;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    check_fail(file, line, "%.150s does not hold: %s", condition, text);
    return 0;
}

/* Notes how close a comparison came; NaN is further than any tolerance. */
static inline int check_figure(const char *what, double figure, double tolerance) {
    double closeness = tolerance > 0 ? figure / tolerance : figure;
    if (closeness > check_state.closeness) {
        check_state.closeness = closeness;
        snprintf(check_state.closest, sizeof check_state.closest, "%.100s: %.2g of %.2g", what, figure, tolerance);
    }
    return figure <= tolerance;
}

static inline int check_near_at(const char *file, int line, const char *what, double got, double expected,
                                double tolerance) {
    double figure = got == expected ? 0 : fabs(got - expected);
    if (check_figure(what, figure, tolerance)) return 1;
    check_fail(file, line, "%.150s: got %.9g, expected %.9g: they differ by %.3g, allowed %.3g", what, got, expected,
               figure, tolerance);
    return 0;
}

static inline int check_close_at(const char *file, int line, const char *what, const float *got, const float *expected,
                                 size_t n, double tolerance) {
    double square = 0, norm = 0;
    size_t worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - expected[i], w = (double)got[worst] - expected[worst];
        square += d * d;
        norm += (double)expected[i] * expected[i];
        if (!(fabs(d) <= fabs(w)) && w == w) worst = i; // the first NaN stays
    }
    double figure = square == 0 ? 0 : sqrt(square / norm);
    if (check_figure(what, figure, tolerance)) return 1;
    check_fail(
        file, line,
        "%.150s: relative difference %.3g over %zu numbers, allowed %.3g; furthest at [%zu]: got %.9g, expected %.9g",
        what, figure, n, tolerance, worst, (double)got[worst], (double)expected[worst]);
    return 0;
}

#define check_fails_at(file, line, expression, failed, part)                                                           \
    check_failure(failed, file, line, expression, slam_error, part)
static inline int check_failure(int failed, const char *file, int line, const char *expression,
                                const char *(*error)(void), const char *part) {
    if (!failed) check_fail(file, line, "%.150s succeeded, expected an error with '%s'", expression, part);
    else if (!strstr(error(), part))
        check_fail(file, line, "%.150s: the error is '%s', expected '%s' in it", expression, error(), part);
    else return 1;
    return 0;
}

#ifdef SLAM_IMPLEMENTATION
/* Tests call these ops through here, so that an argument that an op gets is added in one place; a pointer is a float *
   or a slam_act *. */
static inline void matmul_forward(slam_ops *ops, void *out, const void *x, const void *w, const void *b, int N, int C,
                                  int OC) {
    ops->matmul_forward(ops, (slam_act *)out, (const slam_act *)x, (const slam_act *)w, (const slam_act *)b, N, C, OC);
}
static inline void matmul_backward_input(slam_ops *ops, void *dx, const void *dout, const void *w, int N, int C,
                                         int OC) {
    ops->matmul_backward_input(ops, (slam_act *)dx, (const slam_act *)dout, (const slam_act *)w, N, C, OC);
}
static inline void matmul_backward_weight(slam_ops *ops, float *dw, float *db, const void *dout, const void *x, int N,
                                          int C, int OC) {
    ops->matmul_backward_weight(ops, dw, db, (const slam_act *)dout, (const slam_act *)x, N, C, OC);
}
static inline void rmsnorm_forward(slam_ops *ops, void *s, void *y, float *rstd, const void *x, const void *delta,
                                   const void *w, int N, int G, int C, int stride) {
    ops->rmsnorm_forward(ops, (slam_act *)s, (slam_act *)y, rstd, (const slam_act *)x, (const slam_act *)delta,
                         (const slam_act *)w, 1e-6f, N, G, C, stride);
}
static inline void rmsnorm_backward(slam_ops *ops, void *ds, float *dw, const void *dy, const void *s, const void *w,
                                    const float *rstd, int N, int G, int C, int stride) {
    ops->rmsnorm_backward(ops, (slam_act *)ds, dw, (const slam_act *)dy, (const slam_act *)s, (const slam_act *)w, rstd,
                          N, G, C, stride);
}
static inline void layernorm(slam_ops *ops, void *s, void *y, const void *x, const void *delta, const void *w,
                             const void *b, int gelu, int N, int C) {
    ops->layernorm(ops, (slam_act *)s, (slam_act *)y, (const slam_act *)x, (const slam_act *)delta, (const slam_act *)w,
                   (const slam_act *)b, 1e-5f, gelu, N, C);
}
/* The bytes of a file, with a zero after them. */
static inline strbuf read_file(const char *path) {
    strbuf s = ZERO;
    file_map map;
    if (!CHECK(file_map_open(&map, path), "%s", slam_error())) return s;
    strbuf_add_bytes(&s, map.data, map.size);
    file_map_close(&map);
    return s;
}
/* Other arguments of crossentropy are 0. */
static inline slam_xent xent(int N, int V, int stride, float scale, const float *weights) {
    slam_xent x = ZERO;
    x.N = N, x.V = V, x.stride = stride, x.scale = scale, x.weights = weights;
    return x;
}
#endif

/* A path for a file of the tests: `name` in the folder that test/run makes for each program and removes, or in /tmp.
   Good until eight later calls. */
static inline const char *check_path(const char *name) {
    static char paths[8][1024];
    static int next;
    const char *folder = getenv("TEST_FOLDER");
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder ? folder : "/tmp", name);
    return path;
}

/* A file of n bytes at check_path(name). */
static inline const char *check_file(const char *name, const void *bytes, size_t n) {
    const char *path = check_path(name);
    FILE *f = fopen(path, "wb");
    int written = f && fwrite(bytes, 1, n, f) == n;
    if (f && fclose(f) != 0) written = 0;
    CHECK(written, "the test cannot write %s", path);
    return path;
}
#endif
