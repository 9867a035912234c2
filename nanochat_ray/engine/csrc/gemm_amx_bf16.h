/* bfloat16 weights times x, rounded to bfloat16, with Intel's AMX: tiles of a packed panel are loaded
   as they are, since both have pairs of inputs next to each other. */

#pragma once

#include "gemm_amx.h"

#ifdef HAVE_AMX

/* Tile t has the `height` rows of x from this one on; the last one may overlap the one before. */
#define FIRST_ROW(t) ((t) * height < rows - height ? (t) * height : rows - height)

/* Two tiles of x, or one, times a panel. Accumulators are tiles 0 and 1, and 2 and 3 for the second
   tile of x; tiles 4 and 5 are x, 6 and 7 the weights. */
ALWAYS_INLINE void multiply_tiles_bf16(
    const int two, const int prefetches, const bfloat16 *x0, const bfloat16 *x1, int64_t depth,
    const char *w, float *y0, float *y1, int64_t y_stride
) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += TILE_K, w += TILE_ROWS * ROW_BYTES) {
        if (prefetches)
            for (int64_t i = 0; i < TILE_ROWS; i++) prefetch_panel_row(w + i * ROW_BYTES);
        _tile_loadd(6, w, ROW_BYTES);
        _tile_loadd(7, w + TILE_BYTES_PER_ROW, ROW_BYTES);
        _tile_loadd(4, x0 + k, 2 * depth);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, x1 + k, 2 * depth);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y0, 4 * y_stride);
    _tile_stored(1, y0 + TILE_ROWS, 4 * y_stride);
    if (two) {
        _tile_stored(2, y1, 4 * y_stride);
        _tile_stored(3, y1 + TILE_ROWS, 4 * y_stride);
    }
}

static void linear_amx_bf16(
    const float *x, const char *w, float *y, bfloat16 *scratch, int64_t all_rows, int64_t inputs,
    int64_t panels, int threads
) {
    const int64_t depth = (inputs + K_BLOCK - 1) / K_BLOCK * K_BLOCK, y_stride = panels * PANEL_WIDTH;
    const int64_t passes = (all_rows + MAX_PASS_ROWS - 1) / MAX_PASS_ROWS;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = all_rows * pass / passes, rows = all_rows * (pass + 1) / passes - first;
        const int64_t row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        const int64_t height = (rows + row_tiles - 1) / row_tiles;
        WorkRange ranges[threads];
        split_work(ranges, panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            bfloat16 *x_bf16 = scratch + THREAD_ID * rows * depth;
            convert_rows_bf16(x + first * inputs, rows, inputs, depth, x_bf16);
            TileConfig config = {.palette = 1};
            for (int i = 0; i < 8; i++)
                config.bytes_per_row[i] = TILE_BYTES_PER_ROW, config.rows[i] = i < 6 ? height : 16;
            COMPILER_BARRIER(&config)
            _tile_loadconfig(&config);
            COMPILER_BARRIER(x_bf16)
            for (int64_t n; (n = next_panel(ranges, THREAD_ID, threads)) >= 0;) {
                const char *panel = w + n * depth * PANEL_WIDTH * 2;
                float *y_panel = y + first * y_stride + n * PANEL_WIDTH;
                for (int64_t t = 0; t < row_tiles; t += 2) {
                    const int64_t r0 = FIRST_ROW(t), r1 = FIRST_ROW(t + 1);
                    const bfloat16 *x0 = x_bf16 + r0 * depth, *x1 = x_bf16 + r1 * depth;
                    float *y0 = y_panel + r0 * y_stride, *y1 = y_panel + r1 * y_stride;
                    if (t + 1 == row_tiles)
                        multiply_tiles_bf16(0, 1, x0, x1, depth, panel, y0, y1, y_stride);
                    else
                        multiply_tiles_bf16(1, t == 0, x0, x1, depth, panel, y0, y1, y_stride);
                }
            }
            _tile_release();
        }
    }
}
#endif
