/* y = x Wᵀ for the linear layers of a CPU engine, in float32. `kernels.py` compiles it at engine
   start-up.

   Each sum is accumulated in one order, whatever the number of rows and threads: a row of y depends
   bitwise on its row of x alone.

   The weight is packed in panels of PANEL_WIDTH outputs: w [panels, depth, PANEL_WIDTH], where depth
   is the number of inputs rounded up to K_BLOCK, and the padding is 0. */

#include <stdint.h>
#include <string.h>

#include "simd.h"
#include "work_stealing.h"

#define PANEL_WIDTH 32
#define K_BLOCK 64

#define CACHE_LINE 16        /* floats */
#define PREFETCH_DISTANCE 16 /* panel rows: hardware prefetching stops at the end of a page */
#define ACCUMULATORS (SIMD_WIDTH == 16 ? 28 : 12) /* registers, of 32 and of 16 */

#include "gemm_amx.h"

/* The microkernel: `rows` rows of x times `vectors` registers' width of a panel. The accumulators
   stay in registers over the whole depth. */
ALWAYS_INLINE void microkernel(
    const int rows, const int vectors, const float *x, int64_t inputs, const float *w, float *y,
    int64_t y_stride
) {
    vec sums[ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < inputs; k++, w += PANEL_WIDTH) {
        const vec *weights = (const vec *)w;
        for (int i = 0; i < PANEL_WIDTH; i += CACHE_LINE)
            __builtin_prefetch(w + PREFETCH_DISTANCE * PANEL_WIDTH + i);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vectors; i++)
                sums[r * vectors + i] += x[r * inputs + k] * weights[i];
    }
    for (int r = 0; r < rows; r++)
        memcpy(y + r * y_stride, sums + r * vectors, vectors * sizeof(vec));
}

/* All rows of x times `vectors` registers' width of a panel. */
ALWAYS_INLINE void multiply_panel(
    const int vectors, const float *x, int64_t rows, int64_t inputs, const float *w, float *y,
    int64_t y_stride
) {
    const int max_rows = ACCUMULATORS / vectors;
    for (int64_t r = 0; r < rows; r += max_rows) {
        const float *x_rows = x + r * inputs;
        float *y_rows = y + r * y_stride;
/* A constant number of rows, so that the compiler unrolls the microkernel. */
#define CASE(count) \
    case count: \
        microkernel( \
            count < max_rows ? count : max_rows, vectors, x_rows, inputs, w, y_rows, y_stride \
        ); \
        break
        switch (rows - r < max_rows ? rows - r : max_rows) {
            CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7);
            CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
        }
    }
}

/* y [rows, panels * PANEL_WIDTH] = x [rows, inputs] times the packed weight w. With AMX if `scratch`
   is not null: for each thread three bfloat16 for each of depth * R elements, where R is the number of
   rows rounded up to 16, at most 128. */
void linear(
    const float *x, const float *w, float *y, void *scratch, int64_t rows, int64_t inputs,
    int64_t panels, int threads
) {
#ifdef HAVE_AMX
    if (scratch) {
        linear_amx(x, w, y, scratch, rows, inputs, panels, threads);
        return;
    }
#endif
    const int64_t y_stride = panels * PANEL_WIDTH;
    const int64_t depth = (inputs + K_BLOCK - 1) / K_BLOCK * K_BLOCK;
    WorkRange ranges[threads];
    split_work(ranges, panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t n; (n = next_panel(ranges, THREAD_ID, threads)) >= 0;) {
        const float *panel = w + n * depth * PANEL_WIDTH;
        float *y_panel = y + n * PANEL_WIDTH;
        if (rows * PANEL_WIDTH <= ACCUMULATORS * SIMD_WIDTH)
            multiply_panel(PANEL_WIDTH / SIMD_WIDTH, x, rows, inputs, panel, y_panel, y_stride);
        else
            for (int64_t i = 0; i < PANEL_WIDTH; i += 2 * SIMD_WIDTH)
                multiply_panel(2, x, rows, inputs, panel + i, y_panel + i, y_stride);
    }
}
