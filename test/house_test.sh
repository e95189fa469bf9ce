#!/bin/sh
# Holds slam.h to its plan (test/house), and test/house to its word: a small mock that keeps the rules, with much in it that
# looks like a breach and is none, then the same mock with one breach at a time.
cd "$(dirname "$0")/.." || exit 1
folder=${TEST_FOLDER:-$(mktemp -d)}
passed=0 failed=0
ok() { echo "ok $1"; passed=$((passed + 1)); }
bad() { echo "FAIL $1: $2"; failed=$((failed + 1)); }

if said=$(test/house slam.h 2>&1); then ok 'house: slam.h keeps its plan'; else bad 'house: slam.h keeps its plan' "$(echo "$said" | grep -v ' lines' | head -n 20)"; fi

cat >"$folder/mock.h" <<'END'
/* mock.h - a house of five rooms

   CONTENTS (search for a number with its dot and name)
     1. BASE     errors        2. FORMATS      JSON, WAV
     3. OPS      the list      5. OPS ON CUDA
     9. DATA     pieces

   It's all made up. */
#ifndef SLAM_H
#define SLAM_H
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif
/* ----------------------------------------------------
   1. BASE
   ---------------------------------------------------- */
#define SLAM_VERSION "1"
const char *slam_error(void);
/* ----------------------------------------------------
   3. OPS      shapes
   ---------------------------------------------------- */
typedef struct slam_ops slam_ops;
struct slam_ops {
    const char *name;
    void (*sum)(slam_ops *, double *rate, int n); /* members and parameters may be called as functions elsewhere are */
};
enum { SLAM_ONE, SLAM_TWO = 2 };
slam_ops *slam_cuda(int device);
/* ----------------------------------------------------
   9. DATA
   ---------------------------------------------------- */
typedef struct slam_data slam_data;
int slam_data_open(slam_data *, const char *path);
#ifdef __cplusplus
}
#endif
#endif
#ifdef SLAM_IMPLEMENTATION
/* ====================================================
   1. BASE     errors
   may use: nothing
   ==================================================== */
#include <stdio.h>
#define TWICE(rate) ((rate) * 2)
#define LIMIT 8
typedef struct text {
    char *at;
    size_t n, json_depth; // a member, not the constant of formats
} text;
static char sentence[LIMIT], *cursor = sentence;
const char *slam_error(void) { return cursor ? sentence : "/* no comment */ json_read('\"') //"; }
static int __attribute__((format(printf, 1, 2))) fail(const char *format, ...) {
    (void)format;
    return 0;
}
/* ====================================================
   2. FORMATS      JSON, WAV
   may use: 1 base
   ==================================================== */
enum { json_depth = 64, json_width = LIMIT };
typedef int (*json_visitor)(const char *key);
struct wav { int rate; };
static int rate(const struct wav *w) { return TWICE(w->rate); }
static const int table[LIMIT] = {1, 2, '"', json_depth}, other_table[2] = {3, 4};
#ifdef SPECIAL
static int json_read(text *t, json_visitor visit) {
#else
static int json_read(text *t, json_visitor visit) { // the other branch
#endif
    if (t->n > json_width) return fail("json: %d", table[0] + other_table[1]);
    return visit ? visit("}") : 1;
}
/* ====================================================
   3. OPS      the list
   may use: 1 base
   ==================================================== */
static int sum(const int *rate, int n) {
    int i, json_read = 0, *p = NULL; /* a local called as a function of 2 */
    for (i = 0; i < n; i++) json_read += rate[i];
    struct { int table; } pair = {0};
    goto wav;
wav:
    return json_read + pair.table + (p != NULL) + (int)sizeof(slam_ops);
}
/* ====================================================
   5. OPS ON CUDA
   may use: 1 base,
            3 ops
   ==================================================== */
#ifdef __CUDACC__
#include <cuda_bf16.h>
template <typename T> struct alignas(16) pack { T at[16 / sizeof(T)]; };
template <typename T> static __global__ void __launch_bounds__(256) sum_kernel(T *rate, int n) { if (n) rate[0] = (T)SLAM_ONE; }
template __global__ void sum_kernel<float>(float *, int);
static int choose(int device) { return cudaSetDevice(device); }
#endif
slam_ops *slam_cuda(int device) {
    (void)sum;
    fail("no CUDA %d", device);
    return NULL;
}
/* ====================================================
   9. DATA     pieces
   may use: 1 base, 2 formats
   ==================================================== */
struct slam_data { text line; };
int slam_data_open(slam_data *d, const char *path) { return path ? json_read(&d->line, NULL) + rate(NULL) : fail("no path"); }
#endif
END

if said=$(test/house "$folder/mock.h" 2>&1); then ok 'house: a mock that keeps the rules'; else bad 'house: a mock that keeps the rules' "$said"; fi
case $said in
*" 9 data"*"-> 1 2"*) ok 'house: prints arrows' ;;
*) bad 'house: prints arrows' "$said" ;;
esac

# breach NAME SED_SCRIPT TEXT: the mock, changed so, is refused with this text
breach() {
    sed "$2" "$folder/mock.h" >"$folder/breach.h"
    if cmp -s "$folder/mock.h" "$folder/breach.h"; then
        bad "house: $1" 'the mock did not change'
    elif said=$(test/house "$folder/breach.h" 2>&1); then
        bad "house: $1" 'was not noticed'
    else
        case $said in
        *"$3"*) ok "house: $1" ;;
        *) bad "house: $1" "it said: $(echo "$said" | grep -v ' lines')" ;;
        esac
    fi
}
breach 'a function of a room that is not listed' 's/^    goto wav;/    rate(NULL); goto wav;/; s/const int \*rate, int n/const int *r, int n/; s/+= rate\[i\]/+= r[i]/' '3 ops uses rate of 2 formats, which its banner does not list'
breach 'a constant of a room that is not listed' 's/(p != NULL)/json_depth/' 'uses json_depth of 2'
breach 'a type of a room that is not listed' 's/^    (void)sum;/    json_visitor v = NULL; (void)v;/' '5 ops on cuda uses json_visitor of 2'
breach 'a tag of a room that is not listed' 's/^    (void)sum;/    struct wav w; (void)w;/' 'uses wav of 2'
breach 'a second variable of a declaration' 's/(p != NULL)/other_table[0]/' 'uses other_table of 2'
breach 'a macro of another room' 's/may use: 1 base, 2 formats/may use: 2 formats/; s/: fail("no path")/: LIMIT/' '9 data uses LIMIT of 1 base'
breach 'a use in a macro' 's/^#define LIMIT 8/&\n#define READ(t) json_read(t, 0)/' '1 base uses json_read of the later section 2 formats'
breach 'a later room' 's/return TWICE(w->rate)/return slam_data_open(NULL, NULL)/' '2 formats uses slam_data_open of the later section 9 data'
breach 'a public declaration uses an unlisted room' 's/^int slam_data_open(slam_data \*,/&slam_ops *,/' '9 data uses slam_ops of 3 ops'
breach 'a banner that lists a later room' 's/^   may use: nothing/   may use: 2 formats/' 'section 1 lists 2: a section uses only earlier ones'
breach 'a banner that lists more than the plan' 's/may use: 1 base, 2 formats/may use: 1 base, 2 formats, 3 ops/' 'section 9 lists 3, which the plan does not allow it'
breach 'a wrong name in may use' 's/may use: 1 base, 2 formats/may use: 1 base, 2 model/' "may use '2 model'"
breach 'no may use' '/may use: nothing/d' 'section 1 does not say what it may use'
breach 'a banner unlike the contents' 's/^   2. FORMATS  /   2. FILES    /' 'section 2 is called FILES, in the table of contents FORMATS'
breach 'a room that is not in the contents' 's/^   9. DATA     pieces/   8. DATA     pieces/' 'section 8. DATA is not in the table of contents'
breach 'contents without a room' 's/^     9. DATA     pieces/&\n     7. MODEL    layers/' 'section 7. MODEL of the table of contents does not exist'
breach 'rooms out of order' 's/^   3. OPS      the list/   1. BASE     again/' 'a second section 1'
breach 'a kernel outside 5' 's/^static int sum(/static __global__ int sum(/' '__global__ outside section 5'
breach 'CUDA outside 5' 's/return TWICE(w->rate)/return cudaSetDevice(0)/' 'cudaSetDevice outside section 5'
breach 'cuBLAS outside 5' 's/return TWICE(w->rate)/return cublasLtCreate(0)/' 'cublasLtCreate outside section 5'
breach 'a CUDA header outside 5' 's/^#include <stdio.h>/#include <cuda_runtime.h>/' 'include <cuda_runtime outside section 5'
breach 'MPI outside 6' 's/return TWICE(w->rate)/return MPI_Init(0, 0)/' 'MPI_Init outside section 6'
breach 'NCCL outside 6' 's/return TWICE(w->rate)/return ncclGroupStart()/' 'ncclGroupStart outside section 6'
breach 'a static function with the prefix' 's/^static int rate(/static int slam_rate(/' 'static function slam_rate has the prefix of public names'
breach 'a function that is not static' 's/^static int rate(/int rate(/' 'function rate is neither static nor called slam_'
breach 'a variable that is not static' 's/^static const int table/const int table/' 'variable table is neither static nor called slam_'
breach 'a public function that is not declared' 's/^static int rate(/int slam_rate(/' 'function slam_rate is not declared among the public declarations'
breach 'a public name without the prefix' 's/^#define SLAM_VERSION/#define VERSION/' 'public macro VERSION does not begin with slam_'
breach 'a public enum constant without the prefix' 's/SLAM_ONE,/ONE,/' 'public constant ONE does not begin with slam_'
breach 'a prototype of a later room' 's/^static int sum(/static int later(void);\n&/; s/^struct slam_data {/static int later(void) { return 0; }\n&/' 'later is declared here in 3 ops, but belongs to 9 data'
breach 'defined elsewhere than declared' '/^int slam_data_open(slam_data \*d/d; s/^slam_ops \*slam_cuda(int device) {/int slam_data_open(slam_data *d, const char *path) { return d != 0 \&\& path; }\n&/' 'slam_data_open is declared under section 9 data, but defined in 5 ops on cuda'

[ "$TEST_FOLDER" ] || rm -rf "$folder"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
