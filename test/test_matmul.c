/* Matrix products on the CPU against a loop in double: random shapes and those at the edges of tiles and blocks, all transposes,
   beta 0 (C is full of NaN before) and 1, rows with padding, which must stay as it was; and the same bits from any number of
   threads. */
#define SLAM_IMPLEMENTATION
#include "../slam.h"
#include "check.h"

static int draw(int n) { return (int)rng_below(&check_state.seed, (uint64_t)n); }

static int draw_size(void) {
    static const int edges[] = {0,  1,  2,  3,  4,  5,  6,   7,   8,   12,  13,  14,  15,  16,  17, 28,
                                29, 31, 32, 33, 64, 65, 102, 128, 255, 256, 257, 511, 512, 513, 600};
    const int kind = draw(3);
    return kind == 0 ? edges[draw(sizeof edges / sizeof *edges)] : kind == 1 ? 1 + draw(40) : 1 + draw(300);
}

/* A matrix whose rows are `ld` apart. The memory ends with the last number of the last row, so that AddressSanitizer sees every
   access beyond. */
typedef struct matrix {
    size_t ld, n;
    float *at;
} matrix;

static matrix matrix_new(int rows, int cols) {
    matrix m;
    m.ld = (size_t)cols + (size_t)draw(9) + !cols;
    m.n = rows ? (size_t)(rows - 1) * m.ld + (size_t)cols : 0;
    m.at = (float *)malloc(m.n * sizeof *m.at + 1);
    for (size_t i = 0; i < m.n; i++) m.at[i] = (float)(2 * rng_uniform(&check_state.seed) - 1);
    return m;
}

/* How many numbers of C are wrong: further from the exact one than 4 sqrt(K) roundings of the sum of absolute values, or padding
   that has changed. */
static int count_wrong(const float *C, const float *before, matrix a, matrix b, size_t ldc, int transA, int transB,
                       int M, int N, int K, int beta) {
    int wrong = 0;
    for (size_t i = 0; i < (M ? (size_t)(M - 1) * ldc + (size_t)N : 0); i++) {
        const size_t m = i / ldc, n = i % ldc;
        if (n >= (size_t)N) {
            wrong += C[i] != before[i];
            continue;
        }
        double sum = beta ? before[i] : 0, size = fabs(sum);
        for (size_t k = 0; k < (size_t)K; k++) {
            const double product = (double)(transA ? a.at[k * a.ld + m] : a.at[m * a.ld + k]) *
                                   (transB ? b.at[n * b.ld + k] : b.at[k * b.ld + n]);
            sum += product;
            size += fabs(product);
        }
        const double error = fabs(C[i] - sum), allowed = 4 * sqrt(K + 1.0) * 6e-8 * size + 1e-30;
        check_figure("error / allowed", error / allowed, 1);
        wrong += !(error <= allowed);
    }
    return wrong;
}

static void test_product(int threads, int transA, int transB, int M, int N, int K, int beta) {
    matrix a = transA ? matrix_new(K, M) : matrix_new(M, K), b = transB ? matrix_new(N, K) : matrix_new(K, N),
           c = matrix_new(M, N);
    float *before = (float *)malloc(c.n * sizeof *before + 1);
    for (size_t i = 0; !beta && i < c.n; i++)
        if (i % c.ld < (size_t)N) c.at[i] = NAN;
    memcpy(before, c.at, c.n * sizeof *before);
    gemm_parallel(threads, transA, transB, M, N, K, a.at, a.ld, b.at, b.ld, (float)beta, c.at, c.ld);
    const int wrong = count_wrong(c.at, before, a, b, c.ld, transA, transB, M, N, K, beta);
    CHECK(wrong == 0, "%d numbers: trans %d %d, M %d N %d K %d, beta %d, %d threads", wrong, transA, transB, M, N, K,
          beta, threads);
    if (GEMM_IS_OURS) {
        gemm(transA, transB, M, N, K, a.at, a.ld, b.at, b.ld, (float)beta, before, c.ld);
        CHECK(memcmp(before, c.at, c.n * sizeof *before) == 0, "%d threads give other bits: M %d N %d K %d", threads, M,
              N, K);
    }
    free(a.at), free(b.at), free(c.at), free(before);
}

int main(void) {
    slam_ops_free(slam_cpu(0)); // sets the number of threads of a BLAS
    for (int trans = 0; trans < 4; trans++)
        for (int beta = 0; beta < 2; beta++) {
            if (!TEST("C = %s %s%s", trans & 1 ? "A^T" : "A", trans & 2 ? "B^T" : "B", beta ? " + C" : "")) continue;
            for (int k = 0; k < 60; k++)
                test_product(1 + (k % 2 ? draw(70) : 0), trans & 1, trans >> 1, draw_size(), draw_size(),
                             k % 12 ? draw_size() : 500 + draw(400), beta);
            test_product(3, trans & 1, trans >> 1, 3, 1500, 2, beta); // more than one block of columns
        }
    return check_end();
}
