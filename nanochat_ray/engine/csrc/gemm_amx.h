/* The part of gemm.c that uses Intel's AMX, whose tiles multiply bfloat16 about 20 times as fast as
   AVX512 multiplies float32.

   A float32 is the sum of three bfloat16, since its 24 bits of significand are 8 + 8 + 8. Of the nine
   products of two such sums the six largest are computed, and added up in float32; each of the other
   three is less than 2^-21 of the result, 2^-24 on average. So the result is as accurate as float32
   arithmetic, in less time (arXiv 1904.06376). Elements below 1e-30 lose bits, and infinity becomes
   nan. */

#pragma once

/* The first macro is gcc's, the second one clang's. */
#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__)
#define HAVE_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE_K 32                           /* inputs of a tile */
#define TILE_ROWS 16
#define TILE_BYTES_PER_ROW 64
#define CACHE_LINE 16                       /* floats */
#define TILE_ELEMENTS (TILE_ROWS * TILE_K)  /* bfloat16, of one of the three parts */
#define MAX_ROW_TILES (MAX_PASS_ROWS / TILE_ROWS)
#define TILES_PER_K_BLOCK (K_BLOCK / TILE_K)
#define TILES_PER_PANEL (PANEL_WIDTH / TILE_ROWS)
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

typedef uint16_t bfloat16;
typedef bfloat16 WeightTiles[TILES_PER_PANEL][3][TILE_ELEMENTS]; /* of TILE_K inputs of a panel */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

/* Whether Linux grants this process the tile registers, which it must request. */
int amx_available(void) { return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); }

/* Splits 16 pairs (a, b) of float32 into three bfloat16 each, TILE_ELEMENTS apart. */
static inline void split_pairs(__m512 a, __m512 b, bfloat16 *out) {
    const __m512i high_half = _mm512_set1_epi32(0xffff0000);
    for (int i = 0; i < 3; i++) {
        __m512i low = _mm512_srli_epi32((__m512i)a, 16);
        _mm512_store_si512(out + i * TILE_ELEMENTS, low | ((__m512i)b & high_half));
        a -= (__m512)((__m512i)a & high_half);
        b -= (__m512)((__m512i)b & high_half);
    }
}

/* Row i of the weight tiles of TILE_K inputs, which pairs inputs i and i + 16. Prefetches half of the
   next TILE_K inputs; hardware prefetching fetches the rest. More prefetches would delay the loads of
   tiles. */
static inline void split_weight_row(const float *weights, int64_t i, WeightTiles out) {
    const float *a = weights + i * PANEL_WIDTH, *b = a + TILE_ROWS * PANEL_WIDTH;
    for (int64_t j = 0; j < TILES_PER_PANEL; j++, a += CACHE_LINE, b += CACHE_LINE) {
        _mm_prefetch(a + TILE_K * PANEL_WIDTH, _MM_HINT_T1);
        split_pairs(_mm512_loadu_ps(a), _mm512_loadu_ps(b), out[j][0] + i * TILE_K);
    }
}

/* Splits `rows` rows of x, `inputs` floats each and zeros up to `depth`, into tiles. */
static void split_rows(const float *x, int64_t rows, int64_t inputs, int64_t depth, bfloat16 *out) {
    for (int64_t k = 0; k < depth; k += TILE_K, out += 3 * TILE_ELEMENTS) {
        int64_t valid = inputs < k ? 0 : inputs - k < TILE_K ? inputs - k : TILE_K;
        __mmask32 mask = (__mmask32)((1ull << valid) - 1);
        const float *row = x + k;
        for (int64_t i = 0; i < rows; i++, row += inputs)
            split_pairs(_mm512_maskz_loadu_ps((__mmask16)mask, row),
                        _mm512_maskz_loadu_ps((__mmask16)(mask >> CACHE_LINE), row + CACHE_LINE),
                        out + i * TILE_K);
    }
}

/* Makes all earlier stores visible to the tile loads that follow: gcc does not know that tile
   instructions read memory. */
#define COMPILER_BARRIER(pointer) __asm__ volatile("" : : "r"(pointer) : "memory");

/* Loads the three bfloat16 parts of a tile. */
#define LOAD_PARTS(tile0, tile1, tile2, parts) \
    _tile_loadd(tile0, (parts), TILE_BYTES_PER_ROW); \
    _tile_loadd(tile1, (parts) + TILE_ELEMENTS, TILE_BYTES_PER_ROW); \
    _tile_loadd(tile2, (parts) + 2 * TILE_ELEMENTS, TILE_BYTES_PER_ROW);

/* Adds x (tiles 2 to 4) times weights (tiles 5 to 7) to the accumulator tile j (0 or 1), the smallest
   products first. After every third product some weights of the next K block are split, so that
   neither the tile unit nor the vector unit waits for the other. */
#define MULTIPLY_ACCUMULATE(j) \
    LOAD_PARTS(5, 6, 7, weights[k][j][0]) \
    _tile_dpbf16ps(j, 4, 5); \
    _tile_dpbf16ps(j, 3, 6); \
    _tile_dpbf16ps(j, 2, 7); \
    SPLIT_WEIGHT_ROWS_UNTIL((rows_due += rows_per_slot) >> 16) \
    _tile_dpbf16ps(j, 3, 5); \
    _tile_dpbf16ps(j, 2, 6); \
    _tile_dpbf16ps(j, 2, 5); \
    SPLIT_WEIGHT_ROWS_UNTIL((rows_due += rows_per_slot) >> 16)

#define SPLIT_WEIGHT_ROWS_UNTIL(row) \
    for (int64_t until = row; next && rows_split < until; rows_split++) \
        split_weight_row(next + rows_split / TILE_ROWS * TILE_K * PANEL_WIDTH, \
                         rows_split % TILE_ROWS, next_weights[rows_split / TILE_ROWS]);

/* One thread's part: `rows` rows (at most MAX_ROW_TILES * TILE_ROWS), whose bfloat16 parts are in
   x_parts, times the panels that the thread gets, of `k_blocks` K blocks each. Each of the `row_tiles`
   tiles has `height` rows; the last one may overlap the one before. Weights are split into bfloat16
   parts one K block ahead of the multiplication, into the other of two buffers. */
static void multiply_panels_amx(
    const bfloat16 *x_parts, const float *w, float *y, int64_t rows, int64_t row_tiles,
    int64_t height, int64_t k_blocks, int64_t y_stride, WorkRange *ranges, int thread, int threads
) {
    WeightTiles buffers[2][TILES_PER_K_BLOCK] __attribute__((aligned(64)));
    float sums[MAX_ROW_TILES][TILES_PER_PANEL][TILE_ROWS * TILE_ROWS] __attribute__((aligned(64)));
    TileConfig config = {.palette = 1};
    for (int i = 0; i < 8; i++)
        config.bytes_per_row[i] = TILE_BYTES_PER_ROW, config.rows[i] = i < 5 ? height : TILE_ROWS;
    COMPILER_BARRIER(&config)
    _tile_loadconfig(&config);
    /* Weight rows to split at each of the places for it, as a fixed-point number. */
    const int64_t rows_per_slot = (TILES_PER_K_BLOCK * TILE_ROWS << 16) /
                                  (row_tiles * TILES_PER_K_BLOCK * 2 * TILES_PER_PANEL);
    int64_t panel = -1, k_block = k_blocks - 1, following = next_panel(ranges, thread, threads);
    for (int64_t iteration = 0; iteration == 0 || panel >= 0; iteration++) {
        const int is_last_block = k_block == k_blocks - 1;
        const int64_t next_panel_id = is_last_block ? following : panel;
        const int64_t next_k_block = is_last_block ? 0 : k_block + 1;
        const float *next = w + (next_panel_id * k_blocks + next_k_block) * K_BLOCK * PANEL_WIDTH;
        if (next_panel_id < 0) next = 0;
        WeightTiles *weights = buffers[iteration & 1];
        WeightTiles *next_weights = buffers[(iteration + 1) & 1];
        int64_t rows_due = (1 << 16) - 1, rows_split = 0;
        COMPILER_BARRIER(buffers)
        for (int64_t t = 0; panel >= 0 && t < row_tiles; t++) {
            float *sum0 = sums[t][0], *sum1 = sums[t][1];
            if (k_block == 0) {
                _tile_zero(0);
                _tile_zero(1);
            } else {
                _tile_loadd(0, sum0, TILE_BYTES_PER_ROW);
                _tile_loadd(1, sum1, TILE_BYTES_PER_ROW);
            }
            for (int64_t k = 0; k < TILES_PER_K_BLOCK; k++) {
                LOAD_PARTS(2, 3, 4, x_parts +
                    ((t * k_blocks + k_block) * TILES_PER_K_BLOCK + k) * 3 * TILE_ELEMENTS)
                MULTIPLY_ACCUMULATE(0)
                MULTIPLY_ACCUMULATE(1)
            }
            int64_t stride = TILE_BYTES_PER_ROW;
            if (is_last_block) {
                int64_t row = t * height < rows - height ? t * height : rows - height;
                sum0 = y + row * y_stride + panel * PANEL_WIDTH, sum1 = sum0 + TILE_ROWS;
                stride = y_stride * sizeof(float);
            }
            _tile_stored(0, sum0, stride);
            _tile_stored(1, sum1, stride);
        }
        SPLIT_WEIGHT_ROWS_UNTIL(TILES_PER_K_BLOCK * TILE_ROWS)
        if (is_last_block && next) following = next_panel(ranges, thread, threads);
        panel = next_panel_id, k_block = next_k_block;
    }
    _tile_release();
}

/* Every thread splits all of x for itself: to fetch what another core has split would take as long. */
static void linear_amx(
    const float *x, const float *w, float *y, bfloat16 *scratch, int64_t rows, int64_t inputs,
    int64_t panels, int threads
) {
    const int64_t k_blocks = (inputs + K_BLOCK - 1) / K_BLOCK, depth = k_blocks * K_BLOCK;
    const int64_t y_stride = panels * PANEL_WIDTH;
    const int64_t passes = (rows + MAX_ROW_TILES * TILE_ROWS - 1) / (MAX_ROW_TILES * TILE_ROWS);
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = rows * pass / passes, count = rows * (pass + 1) / passes - first;
        const int64_t row_tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
        const int64_t height = (count + row_tiles - 1) / row_tiles, last_row = count - height;
        WorkRange ranges[threads];
        split_work(ranges, panels, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            bfloat16 *x_parts = scratch + THREAD_ID * row_tiles * depth * 3 * TILE_ROWS;
            for (int64_t t = 0; t < row_tiles; t++) {
                int64_t row = first + (t * height < last_row ? t * height : last_row);
                split_rows(x + row * inputs, height, inputs, depth,
                           x_parts + t * depth * 3 * TILE_ROWS);
            }
            multiply_panels_amx(x_parts, w, y + first * y_stride, count, row_tiles, height, k_blocks,
                                y_stride, ranges, THREAD_ID, threads);
        }
    }
}
#else
int amx_available(void) { return 0; }
#endif
