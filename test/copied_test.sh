#!/bin/sh
# slam.h and slam.cu copied to a project: alone in an empty folder they compile as C11, C++17, and by clang without a
# warning, and a program of thirty lines that loads a checkpoint prints the logits of Transformers.
root=$(cd "$(dirname "$0")/.." && pwd)
. "$root/test/lib.sh"
folder=${TEST_FOLDER:-$(mktemp -d)}/copied
mkdir -p "$folder" && cp "$root/slam.h" "$root/slam.cu" "$folder" && cd "$folder" || exit 1

cat >logits.c <<'C'
#include "slam.h"
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    const int T = argc - 2;
    if (T < 1) return 2;
    slam_batch batch = slam_batch_new(1, T, 0);
    batch.B = 1;
    for (int t = 0; t < T; t++) batch.tokens[t] = atoi(argv[t + 2]), batch.targets[t] = -1, batch.doc_start[t] = 0;
    slam_ops *ops = slam_cpu(0);
    slam_model *m = ops ? slam_model_load(ops, argv[1]) : NULL;
    float *logits = m ? (float *)malloc((size_t)T * m->config.V * sizeof *logits) : NULL;
    if (!m || !slam_model_plan(m, 1, T, SLAM_INFERENCE) || !slam_logits(m, &batch, logits)) {
        fprintf(stderr, "%s\n", slam_error());
        return 1;
    }
    for (int i = 0, V = m->config.V; i < T * V; i++) printf("%.6f%c", logits[i], i % V == V - 1 ? '\n' : ' ');
    free(logits);
    slam_batch_free(&batch);
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
        fail "$name" "$(head -n 3 log)"
    elif [ -s log ]; then
        fail "$name" "a warning: $(head -n 3 log)"
    elif ! ./logits "$root/test/fixtures/qwen2_tied" $(head -n 1 "$root/test/fixtures/qwen2_tied/logits.txt") >printed 2>&1; then
        fail "$name" "$(cat printed)"
    elif why=$(tail -n +2 "$root/test/fixtures/qwen2_tied/logits.txt" | paste -d ' ' - printed |
        awk '{ for (i = 1; i <= NF / 2; i++) { d = $i - $(i + NF / 2); s += d * d; n += $i * $i; count++ } }
             END { if (count == 0 || s > 4e-10 * n) print count " logits, relative difference " sqrt(s / (n + 1e-30)); else exit 1 }'); then
        fail "$name" "$why"
    else
        ok "$name"
    fi
}
CC=${CC:-cc}
CXX=${CXX:-c++}
try 'C11' $CC -std=c11 -Wall -Wextra -Wpedantic
try 'C11 with OpenMP' $CC -std=c11 -O1 -Wall -Wextra -Wpedantic -fopenmp
try 'no flags' $CC
try 'C++17' $CXX -std=c++17 -Wall -Wextra
if command -v clang >/dev/null && [ "$CC" != clang ]; then try 'clang' clang -Wall -Wextra; fi
if printf '#include "slam.h"\n' | $CC -E -x c - 2>/dev/null | grep -q 'printf\|malloc'; then
    fail 'the public part includes only stddef.h and stdint.h' 'printf or malloc is declared'
else
    ok 'the public part includes only stddef.h and stdint.h'
fi
if ! ./logits /nonexistent 1 2>said && grep -q '/nonexistent' said; then ok 'a folder that does not exist'; else fail 'a folder that does not exist' "$(cat said)"; fi
end
