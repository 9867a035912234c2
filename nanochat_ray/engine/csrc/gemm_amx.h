/* Matmuls with Intel's AMX, whose tiles multiply bfloat16 about 20 times as fast as AVX512 multiplies
   float32.

   A float32 is the sum of three bfloat16, since its 24 bits of significand are 8 + 8 + 8. Of the nine
   products of two such sums the six largest are computed, and added up in float32; each of the other
   three is less than 2^-21 of the result, 2^-24 on average. So the result is as accurate as float32
   arithmetic, in less time (arXiv 1904.06376). Elements below 1e-30 lose bits, and infinity becomes
   nan. */

#pragma once

/* The first macro is gcc's, the second one clang's. */
#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) \
    && defined(__AVX512BF16__) && !defined(WITHOUT_AMX)
#define HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_K 32 /* inputs of a tile */
#define AMX_PREFETCH_BYTES 2048 /* ahead in a panel that is read once */
#define TILE_ROWS 16
#define TILE_BYTES_PER_ROW 64
#define TILE_ELEMENTS (TILE_ROWS * TILE_K) /* bfloat16 */
#define SPLITS (K_BLOCK / 2)               /* `split_weight_row`s of a K block */
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

typedef uint16_t bfloat16;
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

/* `rows` rows of x as `tiles` tiles, of `height` rows each, and where their results go. */
typedef struct {
    const bfloat16 *x;
    float *y;
    int64_t y_stride, rows, tiles, height, depth;
} Batch;

/* Whether Linux grants this process the tile registers, which it must request. */
int amx_available(void) { return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); }

/* Makes all earlier stores visible to the tile loads that follow: gcc does not know that tile
   instructions read memory. */
#define COMPILER_BARRIER(pointer) __asm__ volatile("" : : "r"(pointer) : "memory");

/* The first row of tile t; the last tile may overlap the one before. */
static int64_t first_row(int64_t t, int64_t height, int64_t rows) {
    return t * height < rows - height ? t * height : rows - height;
}

/* Splits 16 pairs (a, b) of float32 into three bfloat16 each, `stride` elements apart. */
ALWAYS_INLINE void split_pairs(__m512 a, __m512 b, bfloat16 *out, int64_t stride) {
    const __m512i high_half = _mm512_set1_epi32(0xffff0000);
    for (int i = 0; i < 3; i++) {
        __m512i low = _mm512_srli_epi32((__m512i)a, 16);
        _mm512_storeu_si512(out + i * stride, low | ((__m512i)b & high_half));
        a -= (__m512)((__m512i)a & high_half);
        b -= (__m512)((__m512i)b & high_half);
    }
}

/* A tile's `height` rows of x, zeros up to `depth`: for each TILE_K inputs the rows rounded to bfloat16,
   or their three parts one after the other. */
ALWAYS_INLINE void convert_tile(
    const int parts, const float *x, int64_t height, int64_t inputs, int64_t depth, bfloat16 *out
) {
    for (int64_t k = 0; k < depth; k += TILE_K, out += (parts - 1) * height * TILE_K) {
        const int64_t valid = inputs < k ? 0 : inputs - k < TILE_K ? inputs - k : TILE_K;
        const __mmask32 mask = (__mmask32)((1ull << valid) - 1);
        const float *row = x + k;
        for (int64_t r = 0; r < height; r++, row += inputs, out += TILE_K) {
            const __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, row);
            const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + 16);
            if (parts == 3) split_pairs(low, high, out, height * TILE_K);
            else _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Weights of a K block that are split while those of the block before are multiplied. */
typedef struct {
    const float *from; /* null: there is no such block */
    bfloat16 *to;      /* [K_BLOCK / TILE_K][2][3][TILE_ELEMENTS] */
    int64_t rows, due; /* done, and to be done, the latter in fixed point */
} Split;

/* Does `share` more of it, in fixed point. A row of the tiles pairs inputs i and i + 16. Prefetches half of
   the next TILE_K inputs; hardware prefetching fetches the rest. More prefetches would delay the loads of
   tiles. */
ALWAYS_INLINE void split_weights(Split *split, int64_t share) {
    for (split->due += share; split->from && split->rows < split->due >> 16; split->rows++) {
        const int64_t step = split->rows / TILE_ROWS, i = split->rows % TILE_ROWS;
        const float *a = split->from + (step * TILE_K + i) * PANEL_WIDTH, *b = a + TILE_ROWS * PANEL_WIDTH;
        bfloat16 *out = split->to + step * 6 * TILE_ELEMENTS + i * TILE_K;
        for (int j = 0; j < 2; j++, a += 16, b += 16, out += 3 * TILE_ELEMENTS) {
            _mm_prefetch(a + TILE_K * PANEL_WIDTH, _MM_HINT_T1);
            split_pairs(_mm512_loadu_ps(a), _mm512_loadu_ps(b), out, TILE_ELEMENTS);
        }
    }
}

/* Adds x (tiles 2 to 4) times weights (tiles 5 to 7) to the accumulator tile j (0 or 1), the smallest
   products first. After every third product some weights of the next K block are split, so that
   neither the tile unit nor the vector unit waits for the other. */
#define LOAD_PARTS(tile0, tile1, tile2, parts, size) \
    _tile_loadd(tile0, (parts), TILE_BYTES_PER_ROW); \
    _tile_loadd(tile1, (parts) + (size), TILE_BYTES_PER_ROW); \
    _tile_loadd(tile2, (parts) + 2 * (size), TILE_BYTES_PER_ROW);
#define MULTIPLY_ACCUMULATE(j) \
    LOAD_PARTS(5, 6, 7, w + 3 * j * TILE_ELEMENTS, TILE_ELEMENTS) \
    _tile_dpbf16ps(j, 4, 5); \
    _tile_dpbf16ps(j, 3, 6); \
    _tile_dpbf16ps(j, 2, 7); \
    split_weights(&next, share); \
    _tile_dpbf16ps(j, 3, 5); \
    _tile_dpbf16ps(j, 2, 6); \
    _tile_dpbf16ps(j, 2, 5); \
    split_weights(&next, share);

/* The panels of float32 weights that a thread gets. */
static void multiply_panels_fp32(
    const Batch *batch, const float *weights, WorkRange *ranges, int thread, int threads
) {
    bfloat16 buffers[2][6 * K_BLOCK / TILE_K * TILE_ELEMENTS] __attribute__((aligned(64)));
    float sums[MAX_PASS_ROWS / TILE_ROWS][2][TILE_ROWS * TILE_ROWS] __attribute__((aligned(64)));
    const int64_t depth = batch->depth, x_step = batch->height * TILE_K;
    const int64_t share = (SPLITS << 16) / (batch->tiles * K_BLOCK / TILE_K * 4);
    int64_t panel = next_panel(ranges, thread, threads), next_id;
    Split next = {panel < 0 ? 0 : weights + panel * depth * PANEL_WIDTH, buffers[0]};
    split_weights(&next, SPLITS << 16);
    for (int64_t k = 0, next_k, i = 1; panel >= 0; k = next_k, panel = next_id, i++) {
        const int is_last = k + K_BLOCK == depth;
        next_id = is_last ? next_panel(ranges, thread, threads) : panel, next_k = is_last ? 0 : k + K_BLOCK;
        const float *from = next_id < 0 ? 0 : weights + (next_id * depth + next_k) * PANEL_WIDTH;
        next = (Split){from, buffers[i & 1], 0, (1 << 16) - 1};
        COMPILER_BARRIER(buffers)
        for (int64_t t = 0; t < batch->tiles; t++) {
            float *sum0 = sums[t][0], *sum1 = sums[t][1];
            if (k == 0) {
                _tile_zero(0);
                _tile_zero(1);
            } else {
                _tile_loadd(0, sum0, TILE_BYTES_PER_ROW);
                _tile_loadd(1, sum1, TILE_BYTES_PER_ROW);
            }
            const bfloat16 *x = batch->x + (t * depth + k) * 3 * batch->height, *w = buffers[~i & 1];
            for (int j = 0; j < K_BLOCK; j += TILE_K, x += 3 * x_step, w += 6 * TILE_ELEMENTS) {
                LOAD_PARTS(2, 3, 4, x, x_step)
                MULTIPLY_ACCUMULATE(0)
                MULTIPLY_ACCUMULATE(1)
            }
            int64_t stride = TILE_BYTES_PER_ROW;
            if (is_last) {
                const int64_t row = first_row(t, batch->height, batch->rows);
                sum0 = batch->y + row * batch->y_stride + panel * PANEL_WIDTH, sum1 = sum0 + TILE_ROWS;
                stride = 4 * batch->y_stride;
            }
            _tile_stored(0, sum0, stride);
            _tile_stored(1, sum1, stride);
        }
        split_weights(&next, (SPLITS << 16) - next.due); /* the rest */
    }
}

/* What to prefetch: `step` bytes from `from` on while TILE_K inputs are multiplied, then the next ones. */
typedef struct {
    const char *from;
    int64_t step;
} Prefetch;

/* Two tiles of x from tile t on, or one, times a panel of bfloat16. Accumulators are tiles 0 and 1, and 2 and
   3 for the second tile of x; tiles 4 and 5 are x, 6 and 7 the weights, which are loaded as they are. */
ALWAYS_INLINE void multiply_tiles_bf16(
    const int two, const Batch *batch, int64_t t, const char *w, int64_t panel, Prefetch prefetch
) {
    const int64_t height = batch->height, y_stride = batch->y_stride;
    const bfloat16 *x0 = batch->x + t * height * batch->depth, *x1 = x0 + height * batch->depth;
    float *y = batch->y + panel * PANEL_WIDTH, *y0 = y + first_row(t, height, batch->rows) * y_stride;
    float *y1 = y + first_row(t + 1, height, batch->rows) * y_stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < batch->depth; k += TILE_K, w += TILE_ROWS * ROW_BYTES) {
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

/* The panels of bfloat16 weights that a thread gets. A panel that is read once is prefetched just ahead of
   its use. Else each pair of tiles prefetches its share of the next panel, so that weights arrive all the
   time. */
static void multiply_panels_bf16(
    const Batch *batch, const char *weights, WorkRange *ranges, int thread, int threads
) {
    const int64_t panel_bytes = batch->depth * PANEL_WIDTH * 2, pairs = (batch->tiles + 1) / 2;
    const int64_t lines = (TILE_ROWS * ROW_BYTES / CACHE_LINE_BYTES + pairs - 1) / pairs;
    for (int64_t panel; (panel = next_panel(ranges, thread, threads)) >= 0;) {
        const char *w = weights + panel * panel_bytes;
        Prefetch ahead = {w + (pairs == 1 ? AMX_PREFETCH_BYTES : panel_bytes),
                          lines * CACHE_LINE_BYTES};
        for (int64_t t = 0; t < batch->tiles; t += 2, ahead.from += batch->depth / TILE_K * ahead.step)
            if (t + 1 == batch->tiles) multiply_tiles_bf16(0, batch, t, w, panel, ahead);
            else multiply_tiles_bf16(1, batch, t, w, panel, ahead);
    }
}

/* Every thread converts all of x for itself: to fetch what another core has converted would take as
   long. */
ALWAYS_INLINE void linear_amx(
    const int format, const float *x, const void *w, float *y, bfloat16 *scratch, int64_t all_rows,
    int64_t inputs, int64_t panels, int threads
) {
    const int parts = format == FP32 ? 3 : 1, max_rows = MAX_PASS_ROWS * (format == FP32 ? 1 : 2);
    const int64_t depth = (inputs + K_BLOCK - 1) / K_BLOCK * K_BLOCK, y_stride = panels * PANEL_WIDTH;
    const int64_t passes = (all_rows + max_rows - 1) / max_rows;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = all_rows * pass / passes, rows = all_rows * (pass + 1) / passes - first;
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, height = (rows + tiles - 1) / tiles;
        WorkRange ranges[threads];
        split_work(ranges, panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            bfloat16 *own = scratch + THREAD_ID * tiles * height * depth * parts;
            for (int64_t t = 0; t < tiles; t++)
                convert_tile(parts, x + (first + first_row(t, height, rows)) * inputs, height, inputs,
                             depth, own + t * height * depth * parts);
            TileConfig config = {.palette = 1};
            for (int i = 0; i < 8; i++)
                config.bytes_per_row[i] = TILE_BYTES_PER_ROW, config.rows[i] = TILE_ROWS;
            for (int i = 0; i < (format == FP32 ? 5 : 6); i++) config.rows[i] = height;
            COMPILER_BARRIER(&config)
            _tile_loadconfig(&config);
            COMPILER_BARRIER(own)
            Batch batch = {own, y + first * y_stride, y_stride, rows, tiles, height, depth};
            if (format == FP32) multiply_panels_fp32(&batch, w, ranges, THREAD_ID, threads);
            else multiply_panels_bf16(&batch, w, ranges, THREAD_ID, threads);
            _tile_release();
        }
    }
}
#else
int amx_available(void) { return 0; }
#endif
