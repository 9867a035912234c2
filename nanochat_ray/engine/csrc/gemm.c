/* y = x Wᵀ for the linear layers of a CPU engine: x and y in float32, W in one of the formats of
   weight_formats.h. `kernels.py` compiles it at engine start-up.

   Each sum is accumulated in one order, whatever the number of rows and threads: a row of y depends
   bitwise on its row of x alone.

   The weight is packed in panels of PANEL_WIDTH outputs, where `depth` is the number of inputs rounded
   up to K_BLOCK, and the padding is 0. */

#include <stdint.h>
#include <string.h>

#include "simd.h"
#include "weight_formats.h"
#include "work_stealing.h"

#define MAX_PASS_ROWS 128 /* converted rows of x that share a panel; they fit into the L2 cache */

#include "gemm_amx.h"

/* All rows of x times `vectors` registers' width of a panel. */
ALWAYS_INLINE void multiply_panel(
    const int format, const int vectors, const char *x, int64_t x_stride, int64_t rows,
    int64_t inputs, const char *w, int64_t first, float *y, int64_t y_stride
) {
    const int max_rows = (format == INT8 ? INT8_ACCUMULATORS : ACCUMULATORS) / vectors;
    for (int64_t r = 0; r < rows; r += max_rows) {
        const char *x_rows = x + r * x_stride;
        float *y_rows = y + r * y_stride;
/* A constant number of rows, so that the compiler unrolls the microkernel. */
#define ARGUMENTS(count) \
    count < max_rows ? count : max_rows, vectors, x_rows, x_stride, inputs, w, first, y_rows, y_stride
#define CASE(count) \
    case count: \
        if (format == FP32) multiply_fp32(ARGUMENTS(count)); \
        if (format == BF16) multiply_bf16(ARGUMENTS(count)); \
        if (format == INT8) multiply_int8(ARGUMENTS(count)); \
        break;
        switch (rows - r < max_rows ? rows - r : max_rows) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
            CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
        }
    }
}

/* Every thread converts all of x for itself: to fetch what another core has converted would take as
   long. */
ALWAYS_INLINE void linear_simd(
    const int format, const float *x, const char *w, float *y, char *scratch, int64_t rows,
    int64_t inputs, int64_t panels, int threads
) {
    const int64_t depth = (inputs + K_BLOCK - 1) / K_BLOCK * K_BLOCK, y_stride = panels * PANEL_WIDTH;
    const int64_t panel_bytes = format == INT8 ? depth / INT8_BLOCK * INT8_BLOCK_BYTES
                                               : depth * PANEL_WIDTH * (format == FP32 ? 4 : 2);
    const int64_t x_stride = format == FP32   ? inputs * (int64_t)sizeof(float)
                             : format == BF16 ? depth * (int64_t)sizeof(Bf16Input)
                                              : depth / INT8_BLOCK * (int64_t)sizeof(Int8Input);
    const int accumulators = format == INT8 ? INT8_ACCUMULATORS : ACCUMULATORS;
    const int64_t pass_rows = format == FP32 ? rows : MAX_PASS_ROWS;
    for (int64_t first = 0, count; first < rows; first += count) {
        count = rows - first < pass_rows ? rows - first : pass_rows;
        WorkRange ranges[threads];
        split_work(ranges, panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const float *x_floats = x + first * inputs;
            char *x_rows = format == FP32 ? (char *)x_floats : scratch + THREAD_ID * count * x_stride;
            if (format == BF16)
                convert_rows_bf16(x_floats, count, inputs, depth, (Bf16Input *)x_rows);
            if (format == INT8)
                convert_rows_int8(x_floats, count, inputs, depth, (Int8Input *)x_rows);
            for (int64_t n; (n = next_panel(ranges, THREAD_ID, threads)) >= 0;) {
                const char *panel = w + n * panel_bytes;
                float *y_panel = y + first * y_stride + n * PANEL_WIDTH;
                if (count * PANEL_WIDTH <= accumulators * SIMD_WIDTH)
                    multiply_panel(format, MAX_VECTORS, x_rows, x_stride, count, inputs, panel, 0,
                                   y_panel, y_stride);
                else
                    for (int64_t i = 0; i < PANEL_WIDTH; i += 2 * SIMD_WIDTH)
                        multiply_panel(format, 2, x_rows, x_stride, count, inputs, panel, i,
                                       y_panel + i, y_stride);
            }
        }
    }
}

/* y [rows, panels * PANEL_WIDTH] = x [rows, inputs] times the packed weight w in `format`. `scratch` has
   6 bytes for each of depth * R elements for each thread, where R is the number of rows rounded up to
   16, at most MAX_PASS_ROWS; in FP32 without AMX it may be null. */
void linear(
    int format, const float *x, const void *w, float *y, void *scratch, int64_t rows, int64_t inputs,
    int64_t panels, int threads
) {
#ifdef HAVE_AMX
#define LINEAR_FLOATS linear_amx
#else
#define LINEAR_FLOATS linear_simd
#endif
    if (format == FP32) LINEAR_FLOATS(FP32, x, w, y, scratch, rows, inputs, panels, threads);
    if (format == BF16) LINEAR_FLOATS(BF16, x, w, y, scratch, rows, inputs, panels, threads);
    if (format == INT8) linear_simd(INT8, x, w, y, scratch, rows, inputs, panels, threads);
}
