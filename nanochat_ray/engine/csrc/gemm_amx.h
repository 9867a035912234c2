/* Matmuls with Intel's AMX, whose tiles multiply bfloat16 about 20 times as fast as AVX512
   multiplies float32.

   A float32 is split into three bfloat16, since its 24 bits of significand are 8 + 8 + 8. Of the
   nine products of two such sums the six largest are computed, and added up in float32: as accurate
   as float32 arithmetic, in less time (arXiv 1904.06376). Elements below 1e-30 lose bits, and
   infinity becomes nan. */

#pragma once

#define TILE_K 32 /* inputs of a tile */
#define TILE_ROWS 16
#define TILE_BYTES_PER_ROW 64
#define TILE_ELEMENTS (TILE_ROWS * TILE_K) /* bfloat16 */
#define AMX_PREFETCH_BYTES 2048 /* ahead in a panel that is read once */
#define SPLITS (K_BLOCK / 2)    /* of a K block's weights, into tile rows */

typedef uint16_t bfloat16;

/* Makes all earlier stores visible to the tile loads that follow: gcc does not know that tile
   instructions read memory. */
#define COMPILER_BARRIER(pointer) __asm__ volatile("" : : "r"(pointer) : "memory");

/* The first row of tile t; the last tile may overlap the one before. */
static int64_t first_row(const Matmul *m, int64_t t) {
    return MIN(t * m->height, m->rows - m->height);
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

/* Replaces x, in float32, by tiles in the scratch, with zeros up to `depth`: for each TILE_K inputs
   the rows of a tile rounded to bfloat16, or their three parts one after the other. */
ALWAYS_INLINE void convert_to_tiles(const int parts, Matmul *m) {
    const int64_t height = m->height, inputs = m->inputs;
    bfloat16 *out = (bfloat16 *)m->scratch;
    for (int64_t t = 0; t < m->tiles; t++)
        for (int64_t k = 0; k < m->depth; k += TILE_K, out += (parts - 1) * height * TILE_K) {
            const int64_t valid = MAX(0, MIN(inputs - k, TILE_K));
            const __mmask32 mask = (__mmask32)((1ull << valid) - 1);
            const float *row = (const float *)m->x + first_row(m, t) * inputs + k;
            for (int64_t r = 0; r < height; r++, row += inputs, out += TILE_K) {
                const __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, row);
                const __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), row + 16);
                if (parts == 3) split_pairs(low, high, out, height * TILE_K);
                else _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
        }
    m->x = m->scratch;
}

/* Weights of a K block that are split while those of the block before are multiplied. */
typedef struct {
    const float *from; /* null: there is no such block */
    bfloat16 *to;      /* [K_BLOCK / TILE_K][2][3][TILE_ELEMENTS] */
    int64_t rows, due; /* done, and to be done, the latter in fixed point */
} Split;

/* Does `share` more of it, in fixed point. A row of the tiles pairs inputs i and i + 16. Prefetches
   half of the next TILE_K inputs, hardware the rest: more prefetches would delay tile loads. */
ALWAYS_INLINE void split_weights(Split *split, int64_t share) {
    for (split->due += share; split->from && split->rows < split->due >> 16; split->rows++) {
        const int64_t step = split->rows / TILE_ROWS, i = split->rows % TILE_ROWS;
        const float *a = split->from + (step * TILE_K + i) * PANEL_WIDTH;
        bfloat16 *out = split->to + step * 6 * TILE_ELEMENTS + i * TILE_K;
        for (int j = 0; j < 2; j++, a += 16, out += 3 * TILE_ELEMENTS) {
            _mm_prefetch(a + TILE_K * PANEL_WIDTH, _MM_HINT_T1);
            const __m512 b = _mm512_loadu_ps(a + TILE_ROWS * PANEL_WIDTH);
            split_pairs(_mm512_loadu_ps(a), b, out, TILE_ELEMENTS);
        }
    }
}

/* Adds x (tiles 2 to 4) times weights (tiles 5 to 7) to the accumulator tile j (0 or 1), the
   smallest products first. After every third product some weights of the next K block are split, so
   that neither the tile unit nor the vector unit waits for the other. */
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

/* The panels of float32 weights that this thread gets. */
static void multiply_panels_fp32(const Matmul *m) {
    bfloat16 buffers[2][6 * K_BLOCK / TILE_K * TILE_ELEMENTS] __attribute__((aligned(64)));
    float sums[MAX_PASS_ROWS / TILE_ROWS][TILE_ROWS * PANEL_WIDTH] __attribute__((aligned(64)));
    const float *weights = (const float *)m->weights;
    const int64_t depth = m->depth, x_step = m->height * TILE_K;
    const int64_t share = (SPLITS << 16) / (m->tiles * K_BLOCK / TILE_K * 4);
    int64_t panel = next_panel(m), next_id;
    Split next = {.from = panel < 0 ? 0 : weights + panel * depth * PANEL_WIDTH, .to = buffers[0]};
    split_weights(&next, SPLITS << 16);
    for (int64_t k = 0, next_k, i = 1; panel >= 0; k = next_k, panel = next_id, i++) {
        const int is_last = k + K_BLOCK == depth;
        next_id = is_last ? next_panel(m) : panel;
        next_k = is_last ? 0 : k + K_BLOCK;
        const float *from = next_id < 0 ? 0 : weights + (next_id * depth + next_k) * PANEL_WIDTH;
        next = (Split){from, buffers[i & 1], 0, (1 << 16) - 1};
        COMPILER_BARRIER(buffers)
        for (int64_t t = 0; t < m->tiles; t++) {
            float *sum = sums[t];
            int64_t stride = ROW_BYTES;
            if (k == 0) {
                _tile_zero(0);
                _tile_zero(1);
            } else {
                _tile_loadd(0, sum, stride);
                _tile_loadd(1, sum + TILE_ROWS, stride);
            }
            const bfloat16 *x = (const bfloat16 *)m->x + (t * depth + k) * 3 * m->height;
            const bfloat16 *w = buffers[~i & 1];
            for (int j = 0; j < K_BLOCK; j += TILE_K, x += 3 * x_step, w += 6 * TILE_ELEMENTS) {
                LOAD_PARTS(2, 3, 4, x, x_step)
                MULTIPLY_ACCUMULATE(0)
                MULTIPLY_ACCUMULATE(1)
            }
            if (is_last) {
                sum = m->y + first_row(m, t) * m->y_stride + panel * PANEL_WIDTH;
                stride = 4 * m->y_stride;
            }
            _tile_stored(0, sum, stride);
            _tile_stored(1, sum + TILE_ROWS, stride);
        }
        split_weights(&next, (SPLITS << 16) - next.due); /* the rest */
    }
}

/* Two tiles of x from tile t on, or one, times a panel of bfloat16. Accumulators are tiles 0 and 1,
   and 2 and 3 for the second tile of x; tiles 4 and 5 are x, 6 and 7 the weights, which are loaded
   as they are. Prefetches `step` bytes from `ahead` on while TILE_K inputs are multiplied, then the
   next ones, into the L2 cache: x needs L1. */
ALWAYS_INLINE void multiply_tiles_bf16(
    const int two, const Matmul *m, int64_t t, const char *w, float *y, const char *ahead,
    int64_t step
) {
    const int64_t height = m->height, y_stride = m->y_stride;
    const bfloat16 *x0 = (const bfloat16 *)m->x + t * height * m->depth;
    const bfloat16 *x1 = x0 + height * m->depth;
    float *y0 = y + first_row(m, t) * y_stride, *y1 = y + first_row(m, t + 1) * y_stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < m->depth; k += TILE_K, w += TILE_ROWS * ROW_BYTES, ahead += step) {
        _tile_loadd(6, w, ROW_BYTES);
        _tile_loadd(7, w + TILE_BYTES_PER_ROW, ROW_BYTES);
        _tile_loadd(4, x0 + k * height, TILE_BYTES_PER_ROW);
        for (int64_t i = 0; i < step; i += CACHE_LINE_BYTES) __builtin_prefetch(ahead + i, 0, 2);
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

/* The panels of bfloat16 weights that this thread gets. A panel that is read once is prefetched
   just ahead of its use. Else each pair of tiles prefetches its share of the next panel, so that
   weights arrive all the time. */
static void multiply_panels_bf16(const Matmul *m) {
    const int64_t panel_bytes = m->depth * PANEL_WIDTH * 2, pairs = (m->tiles + 1) / 2;
    const int64_t lines = (TILE_ROWS * ROW_BYTES / CACHE_LINE_BYTES + pairs - 1) / pairs;
    const int64_t step = lines * CACHE_LINE_BYTES;
    for (int64_t panel; (panel = next_panel(m)) >= 0;) {
        const char *w = m->weights + panel * panel_bytes;
        const char *ahead = w + (pairs == 1 ? AMX_PREFETCH_BYTES : panel_bytes);
        float *y = m->y + panel * PANEL_WIDTH;
        for (int64_t t = 0; t < m->tiles; t += 2, ahead += m->depth / TILE_K * step)
            if (t + 1 == m->tiles) multiply_tiles_bf16(0, m, t, w, y, ahead, step);
            else multiply_tiles_bf16(1, m, t, w, y, ahead, step);
    }
}

static void multiply_amx(int format, Matmul *m) {
    m->tiles = (m->rows + TILE_ROWS - 1) / TILE_ROWS;
    m->height = (m->rows + m->tiles - 1) / m->tiles;
    if (format == FP32) convert_to_tiles(3, m);
    else convert_to_tiles(1, m);
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        const int is_weight = i >= (format == FP32 ? 5 : 6);
        config.bytes_per_row[i] = TILE_BYTES_PER_ROW;
        config.rows[i] = is_weight ? TILE_ROWS : m->height;
    }
    COMPILER_BARRIER(&config)
    _tile_loadconfig(&config);
    COMPILER_BARRIER(m->scratch)
    if (format == FP32) multiply_panels_fp32(m);
    else multiply_panels_bf16(m);
    _tile_release();
}
