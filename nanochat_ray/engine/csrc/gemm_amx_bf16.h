/* bfloat16 weights times x, rounded to bfloat16, with Intel's AMX: tiles of a packed panel are loaded
   as they are, since they have pairs of inputs next to each other. */

#pragma once

#include "gemm_amx.h"

#ifdef HAVE_AMX

/* Rows of x that share a panel: a third of the bytes that float32's three parts take. */
#define MAX_BF16_PASS_ROWS (2 * MAX_PASS_ROWS)

/* Tile t has the `height` rows of x from this one on; the last one may overlap the one before. */
#define FIRST_ROW(t) ((t) * height < rows - height ? (t) * height : rows - height)

/* What to prefetch: `step` bytes from `from` on while TILE_K inputs are multiplied, then the next ones. */
typedef struct {
    const char *from;
    int64_t step;
} Prefetch;

/* Two tiles of x, or one, times a panel. Accumulators are tiles 0 and 1, and 2 and 3 for the second
   tile of x; tiles 4 and 5 are x, 6 and 7 the weights. */
ALWAYS_INLINE void multiply_tiles_bf16(
    const int two, const bfloat16 *x0, const bfloat16 *x1, int64_t height, int64_t depth, const char *w,
    float *y0, float *y1, int64_t y_stride, Prefetch prefetch
) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += TILE_K, w += TILE_ROWS * ROW_BYTES) {
        _tile_loadd(6, w, ROW_BYTES);
        _tile_loadd(7, w + TILE_BYTES_PER_ROW, ROW_BYTES);
        _tile_loadd(4, x0 + k * height, TILE_BYTES_PER_ROW);
        for (int64_t i = 0; i < prefetch.step; i += CACHE_LINE_BYTES)
            __builtin_prefetch(prefetch.from + i, 0, 2); /* into the L2 cache: x needs L1 */
        prefetch.from += prefetch.step;
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, x1 + k * height, TILE_BYTES_PER_ROW);
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

/* Rounds `height` rows of x to tiles of TILE_K inputs, with zeros up to `depth`. */
static void round_rows(const float *x, int64_t height, int64_t inputs, int64_t depth, bfloat16 *out) {
    for (int64_t k = 0; k < depth; k += TILE_K) {
        const int64_t valid = inputs < k ? 0 : inputs - k < TILE_K ? inputs - k : TILE_K;
        const __mmask32 mask = (__mmask32)((1ull << valid) - 1);
        const float *row = x + k;
        for (int64_t r = 0; r < height; r++, row += inputs, out += TILE_K) {
            const __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, row);
            const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> CACHE_LINE), row + CACHE_LINE);
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

static void linear_amx_bf16(
    const float *x, const char *w, float *y, bfloat16 *scratch, int64_t all_rows, int64_t inputs,
    int64_t panels, int threads
) {
    const int64_t depth = (inputs + K_BLOCK - 1) / K_BLOCK * K_BLOCK, y_stride = panels * PANEL_WIDTH;
    const int64_t panel_bytes = depth * PANEL_WIDTH * 2, steps = depth / TILE_K;
    const int64_t passes = (all_rows + MAX_BF16_PASS_ROWS - 1) / MAX_BF16_PASS_ROWS;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = all_rows * pass / passes, rows = all_rows * (pass + 1) / passes - first;
        const int64_t row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, pairs = (row_tiles + 1) / 2;
        const int64_t height = (rows + row_tiles - 1) / row_tiles;
        /* A panel that is read once is prefetched just ahead of its use. Else each pair of tiles
           prefetches its share of the next panel, so that weights arrive all the time. */
        const int64_t lines = (TILE_ROWS * ROW_BYTES / CACHE_LINE_BYTES + pairs - 1) / pairs;
        WorkRange ranges[threads];
        split_work(ranges, panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            bfloat16 *x_tiles = scratch + THREAD_ID * row_tiles * height * depth;
            for (int64_t t = 0; t < row_tiles; t++)
                round_rows(x + (first + FIRST_ROW(t)) * inputs, height, inputs, depth,
                           x_tiles + t * height * depth);
            TileConfig config = {.palette = 1};
            for (int i = 0; i < 8; i++)
                config.bytes_per_row[i] = TILE_BYTES_PER_ROW, config.rows[i] = i < 6 ? height : 16;
            COMPILER_BARRIER(&config)
            _tile_loadconfig(&config);
            COMPILER_BARRIER(x_tiles)
            for (int64_t n; (n = next_panel(ranges, THREAD_ID, threads)) >= 0;) {
                const char *panel = w + n * panel_bytes;
                float *y_panel = y + first * y_stride + n * PANEL_WIDTH;
                Prefetch ahead = {panel + (pairs == 1 ? PREFETCH_DISTANCE * ROW_BYTES : panel_bytes),
                                  lines * CACHE_LINE_BYTES};
                for (int64_t t = 0; t < row_tiles; t += 2, ahead.from += steps * ahead.step) {
                    const bfloat16 *x0 = x_tiles + t * height * depth, *x1 = x0 + height * depth;
                    float *y0 = y_panel + FIRST_ROW(t) * y_stride;
                    float *y1 = y_panel + FIRST_ROW(t + 1) * y_stride;
                    if (t + 1 == row_tiles)
                        multiply_tiles_bf16(0, x0, x1, height, depth, panel, y0, y1, y_stride, ahead);
                    else
                        multiply_tiles_bf16(1, x0, x1, height, depth, panel, y0, y1, y_stride, ahead);
                }
            }
            _tile_release();
        }
    }
}
#endif
