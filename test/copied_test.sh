#!/bin/sh
# The "copy it into your project" case: slam.h and slam.cu alone in an empty folder, compiled as C11, C++17 and by clang without a
# warning, and a program of thirty lines that loads a checkpoint and prints logits, held against those of Transformers.
passed=0 failed=0
ok() { echo "ok $1"; passed=$((passed + 1)); }
no() { echo "FAIL $1: $2"; failed=$((failed + 1)); }
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${TEST_FOLDER:-$(mktemp -d)}/copied
mkdir -p "$folder" && cp "$root/slam.h" "$root/slam.cu" "$folder" && cd "$folder" || exit 1

cat >logits.c <<'C'
#include "slam.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    enum { T_MAX = 64 };
    int tokens[T_MAX], doc_start[T_MAX] = {0};
    const int T = argc - 2;
    if (T < 1 || T > T_MAX) return 2;
    for (int t = 0; t < T; t++) tokens[t] = atoi(argv[t + 2]);
    slam_ops *ops = slam_cpu(0);
    slam_model *m = ops ? slam_model_load(ops, argv[1]) : NULL;
    if (!m || !slam_model_plan(m, 1, T, 0)) {
        fprintf(stderr, "%s\n", slam_error());
        return 1;
    }
    const slam_batch batch = {1, T, tokens, NULL, doc_start, NULL};
    const int V = slam_model_config(m)->V;
    float *logits = (float *)malloc((size_t)T * V * sizeof *logits);
    if (!slam_model_logits(m, &batch, logits)) {
        fprintf(stderr, "%s\n", slam_error());
        return 1;
    }
    for (int i = 0; i < T * V; i++) printf("%.6f%c", logits[i], i % V == V - 1 ? '\n' : ' ');
    free(logits);
    slam_model_free(m);
    slam_ops_free(ops);
    return 0;
}
C

# try NAME COMPILE...: compiles slam.cu and the program, no warning allowed, and compares what it prints
try() {
    name=$1 && shift
    lang=c && case $name in *C++*) lang=c++ ;; esac
    if ! "$@" -x $lang -c slam.cu -o slam.o >log 2>&1 || ! "$@" -x $lang -c logits.c -o logits.o >>log 2>&1 ||
        ! "$@" slam.o logits.o -o logits -lm >>log 2>&1; then
        no "$name" "$(head -n 3 log)"
    elif [ -s log ]; then
        no "$name" "a warning: $(head -n 3 log)"
    elif ! ./logits "$root/test/fixtures/qwen2_tied" $(head -n 1 "$root/test/fixtures/qwen2_tied/logits.txt") >printed 2>&1; then
        no "$name" "$(cat printed)"
    elif why=$(tail -n +2 "$root/test/fixtures/qwen2_tied/logits.txt" | paste -d ' ' - printed |
        awk '{ for (i = 1; i <= NF / 2; i++) { d = $i - $(i + NF / 2); s += d * d; n += $i * $i; count++ } }
             END { if (count == 0 || s > 4e-10 * n) print count " logits, relative difference " sqrt(s / (n + 1e-30)); else exit 1 }'); then
        no "$name" "$why"
    else
        ok "$name"
    fi
}
CC=${CC:-cc}
CXX=${CXX:-c++}
try 'C11' $CC -std=c11 -O1 -Wall -Wextra -Wpedantic
try 'C11 with OpenMP' $CC -std=c11 -O1 -Wall -Wextra -Wpedantic -fopenmp
try 'no flags' $CC
try 'C++17' $CXX -std=c++17 -O1 -Wall -Wextra
if command -v clang >/dev/null && [ "$CC" != clang ]; then try 'clang' clang -O1 -Wall -Wextra; fi
if printf '#include "slam.h"\n' | $CC -E -x c - 2>/dev/null | grep -q 'printf\|malloc'; then
    no 'the public part brings in stddef.h and stdint.h alone' 'printf or malloc is declared'
else
    ok 'the public part brings in stddef.h and stdint.h alone'
fi
if ! ./logits /nonexistent 1 2>said && grep -q '/nonexistent' said; then ok 'a folder that is not there'; else no 'a folder that is not there' "$(cat said)"; fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
