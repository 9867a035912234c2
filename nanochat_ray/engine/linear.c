/* Matrix products of a CPU engine; `kernels.py` compiles it where it runs. A row of the result hangs
   on its row of x alone, to the bit: each sum is made in one order, however many rows there are. */

#include <stdint.h>
#include <string.h>

#include "registers.h"

/* Weights lie in blocks of COLUMNS outputs: w [blocks, depth, COLUMNS], where depth is the width of
   x rounded up to CHUNK, and what is beyond it 0. */
#define COLUMNS 32
#define CHUNK 64

#define LINE 16 /* floats */
#define AHEAD 16 /* columns to fetch: a processor's own prefetching ends at a page's end */
#define SUMS (REGISTER == 16 ? 28 : 12) /* registers of sums: most of 32, and of 16 */

/* Blocks of weights that a thread has yet to multiply. */
typedef union {
    struct {
        uint32_t begin, end;
    };
    uint64_t both;
} Share;

static void share_out(Share *shares, int64_t blocks, int threads) {
    for (int64_t i = 0; i < threads; i++)
        shares[i] = (Share){{blocks * i / threads, blocks * (i + 1) / threads}};
}

/* A block for thread `me`: its next, or when it has no more another's last, so that nobody waits for
   a thread that the system holds up. -1 when all are taken. No order of memory is asked for: results
   are read when the whole team is done. */
static int64_t take(Share *shares, int me, int threads) {
    for (int i = 0; i < threads; i++) {
        Share *of = shares + (me + i) % threads, is, left;
        is.both = __atomic_load_n(&of->both, __ATOMIC_RELAXED);
        while (is.begin < is.end) {
            left = is;
            int64_t block = i ? --left.end : left.begin++;
            if (__atomic_compare_exchange_n(
                    &of->both, &is.both, left.both, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED
                ))
                return block;
        }
    }
    return -1;
}

#ifdef _OPENMP
int omp_get_thread_num(void);
#define ME omp_get_thread_num()
#else
#define ME 0
#endif

/* `rows` rows of a product, `across` registers wide: their sums stay in registers. */
static inline __attribute__((always_inline)) void tile(
    const int rows, const int across, const float *x, int64_t width, const float *w, float *y,
    int64_t y_step
) {
    reg sums[SUMS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < width; k++, w += COLUMNS) {
        const reg *column = (const reg *)w;
        for (int i = 0; i < COLUMNS; i += LINE) __builtin_prefetch(w + AHEAD * COLUMNS + i);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < across; i++) sums[r * across + i] += x[r * width + k] * column[i];
    }
    for (int r = 0; r < rows; r++) memcpy(y + r * y_step, sums + r * across, across * sizeof(reg));
}

/* All rows of a product, `across` registers wide. */
static inline __attribute__((always_inline)) void strip(
    const int across, const float *x, int64_t rows, int64_t width, const float *w, float *y,
    int64_t y_step
) {
    const int most = SUMS / across;
    for (int64_t r = 0; r < rows; r += most) {
        const float *from = x + r * width;
        float *to = y + r * y_step;
#define CASE(count) \
    case count: \
        tile(count < most ? count : most, across, from, width, w, to, y_step); \
        break
        switch (rows - r < most ? rows - r : most) {
            CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7);
            CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
        }
    }
}

/* The first name is gcc's, the second one clang's. */
#if defined(__linux__) && (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512F__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* AMX multiplies tiles of bfloat16 some 20 times as fast as AVX512 multiplies float32. A float32 is
   the sum of three bfloat16: its 24 bits are 8, 8 and 8. Of the nine products of two such sums the
   six largest are made, and added up in float32; the other three are less than 2^-21 of the whole,
   and 2^-24 on average. So the result is as near to the true one as float32 comes, in less time
   than float32 takes (arXiv 1904.06376). What is below 1e-30 loses bits, and infinity becomes nan. */
#define STEP 32              /* inputs of a tile */
#define HEIGHT 16            /* its rows */
#define PART (HEIGHT * STEP) /* numbers in one of its three */
#define TILES 8              /* of x, that share a block of weights and fit into the second cache */
#define STEPS (CHUNK / STEP)
#define HALVES (COLUMNS / HEIGHT)
#define ASK_FOR 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

typedef uint16_t bfloat16;
typedef bfloat16 Weights[HALVES][3][PART]; /* of one step */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} Layout;

/* Linux grants tiles to a process that asks for them. */
int has_tiles(void) { return !syscall(SYS_arch_prctl, ASK_FOR, TILE_DATA); }

/* 16 pairs (a, b) in three parts, PART from each other, that sum up to them. */
static inline void split(__m512 a, __m512 b, bfloat16 *to) {
    const __m512i high = _mm512_set1_epi32(0xffff0000);
    for (int i = 0; i < 3; i++) {
        __m512i low = _mm512_srli_epi32((__m512i)a, 16);
        _mm512_store_si512(to + i * PART, low | ((__m512i)b & high));
        a -= (__m512)((__m512i)a & high);
        b -= (__m512)((__m512i)b & high);
    }
}

/* Row i of the tiles of a step, which pairs inputs i and i + 16. Half of the next step is fetched,
   and the processor itself sees to the rest: more would hold up the tiles' own loads. */
static inline void split_weights(const float *step, int64_t i, Weights to) {
    const float *a = step + i * COLUMNS, *b = a + HEIGHT * COLUMNS;
    for (int64_t j = 0; j < HALVES; j++, a += LINE, b += LINE) {
        _mm_prefetch(a + STEP * COLUMNS, _MM_HINT_T1);
        split(_mm512_loadu_ps(a), _mm512_loadu_ps(b), to[j][0] + i * STEP);
    }
}

/* `rows` rows of x, `width` floats and zeros up to `depth`, to the tiles from `to` on. */
static void split_rows(const float *x, int64_t rows, int64_t width, int64_t depth, bfloat16 *to) {
    for (int64_t k = 0; k < depth; k += STEP, to += 3 * PART) {
        int64_t rest = width < k ? 0 : width - k < STEP ? width - k : STEP;
        __mmask32 is = (__mmask32)((1ull << rest) - 1);
        const float *from = x + k;
        for (int64_t i = 0; i < rows; i++, from += width)
            split(_mm512_maskz_loadu_ps((__mmask16)is, from),
                  _mm512_maskz_loadu_ps((__mmask16)(is >> LINE), from + LINE), to + i * STEP);
    }
}

/* gcc does not see that what is about tiles reads memory: here all of it has been written. */
#define SEEN(what) __asm__ volatile("" : : "r"(what) : "memory");

#define LOAD_PARTS(first, second, third, of) \
    _tile_loadd(first, (of), 64); \
    _tile_loadd(second, (of) + PART, 64); \
    _tile_loadd(third, (of) + 2 * PART, 64);

/* Sums 0 or 1, plus x in 2 to 4 times weights in 5 to 7, the smallest products first. After every
   third some weights of the next chunk are split, so that neither waits for the other. */
#define MULTIPLY(j) \
    LOAD_PARTS(5, 6, 7, b[k][j][0]) \
    _tile_dpbf16ps(j, 4, 5); \
    _tile_dpbf16ps(j, 3, 6); \
    _tile_dpbf16ps(j, 2, 7); \
    SPLIT_UP_TO((due += pace) >> 16) \
    _tile_dpbf16ps(j, 3, 5); \
    _tile_dpbf16ps(j, 2, 6); \
    _tile_dpbf16ps(j, 2, 5); \
    SPLIT_UP_TO((due += pace) >> 16)

#define SPLIT_UP_TO(row) \
    for (int64_t until = row; next && split_rows < until; split_rows++) \
        split_weights(next + split_rows / HEIGHT * STEP * COLUMNS, split_rows % HEIGHT, \
                      next_parts[split_rows / HEIGHT]);

/* `rows` <= TILES * HEIGHT rows, whose parts are in x_parts, times the blocks of w, of `chunks` each,
   that `me` takes. Tiles are `height` rows each; the last may begin within the one before. */
static void multiply(
    const bfloat16 *x_parts, const float *w, float *y, int64_t rows, int64_t tiles, int64_t height,
    int64_t chunks, int64_t y_step, Share *shares, int me, int threads
) {
    Weights parts[2][STEPS] __attribute__((aligned(64)));
    float sums[TILES][HALVES][HEIGHT * HEIGHT] __attribute__((aligned(64)));
    Layout layout = {.palette = 1};
    for (int i = 0; i < 8; i++)
        layout.bytes[i] = 64, layout.rows[i] = i < 5 ? height : HEIGHT;
    SEEN(&layout)
    _tile_loadconfig(&layout);
    const int64_t pace = (STEPS * HEIGHT << 16) / (tiles * STEPS * 2 * HALVES);
    int64_t block = -1, chunk = chunks - 1, after = take(shares, me, threads);
    for (int64_t turn = 0; turn == 0 || block >= 0; turn++) {
        const int ends = chunk == chunks - 1;
        const int64_t next_block = ends ? after : block, next_chunk = ends ? 0 : chunk + 1;
        const float *next = w + (next_block * chunks + next_chunk) * CHUNK * COLUMNS;
        if (next_block < 0) next = 0;
        Weights *b = parts[turn & 1], *next_parts = parts[(turn + 1) & 1];
        int64_t due = (1 << 16) - 1, split_rows = 0;
        SEEN(parts)
        for (int64_t t = 0; block >= 0 && t < tiles; t++) {
            float *sum = sums[t][0], *other = sums[t][1];
            if (chunk == 0) {
                _tile_zero(0);
                _tile_zero(1);
            } else {
                _tile_loadd(0, sum, 64);
                _tile_loadd(1, other, 64);
            }
            for (int64_t k = 0; k < STEPS; k++) {
                LOAD_PARTS(2, 3, 4, x_parts + ((t * chunks + chunk) * STEPS + k) * 3 * PART)
                MULTIPLY(0)
                MULTIPLY(1)
            }
            int64_t step = 64;
            if (ends) {
                int64_t row = t * height < rows - height ? t * height : rows - height;
                sum = y + row * y_step + block * COLUMNS, other = sum + HEIGHT;
                step = y_step * sizeof(float);
            }
            _tile_stored(0, sum, step);
            _tile_stored(1, other, step);
        }
        SPLIT_UP_TO(STEPS * HEIGHT)
        if (ends && next) after = take(shares, me, threads);
        block = next_block, chunk = next_chunk;
    }
    _tile_release();
}

/* Every thread splits all of x for itself: to fetch the half that another had split would take as
   long. */
static void linear_by_tiles(
    const float *x, const float *w, float *y, bfloat16 *parts, int64_t rows, int64_t width,
    int64_t blocks, int threads
) {
    const int64_t chunks = (width + CHUNK - 1) / CHUNK, depth = chunks * CHUNK;
    const int64_t y_step = blocks * COLUMNS;
    const int64_t passes = (rows + TILES * HEIGHT - 1) / (TILES * HEIGHT);
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t top = rows * pass / passes, count = rows * (pass + 1) / passes - top;
        const int64_t tiles = (count + HEIGHT - 1) / HEIGHT;
        const int64_t height = (count + tiles - 1) / tiles, last = count - height;
        Share shares[threads];
        share_out(shares, blocks, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            bfloat16 *mine = parts + ME * tiles * depth * 3 * HEIGHT;
            for (int64_t t = 0; t < tiles; t++) {
                int64_t row = top + (t * height < last ? t * height : last);
                split_rows(x + row * width, height, width, depth, mine + t * depth * 3 * HEIGHT);
            }
            multiply(mine, w, y + top * y_step, count, tiles, height, chunks, y_step, shares, ME,
                     threads);
        }
    }
}
#else
int has_tiles(void) { return 0; }
#endif

/* x [rows, width] times w into y [rows, blocks * COLUMNS]. By tiles if there are `parts`, memory for
   each thread of three bfloat16 for each of depth * rows, these rounded up to 16, 128 at most. */
void linear(
    const float *x, const float *w, float *y, void *parts, int64_t rows, int64_t width,
    int64_t blocks, int threads
) {
#ifdef TILES
    if (parts) {
        linear_by_tiles(x, w, y, parts, rows, width, blocks, threads);
        return;
    }
#endif
    const int64_t y_step = blocks * COLUMNS, depth = (width + CHUNK - 1) / CHUNK * CHUNK;
    Share shares[threads];
    share_out(shares, blocks, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t n; (n = take(shares, ME, threads)) >= 0;) {
        const float *with = w + n * depth * COLUMNS;
        float *to = y + n * COLUMNS;
        if (rows * COLUMNS <= SUMS * REGISTER)
            strip(COLUMNS / REGISTER, x, rows, width, with, to, y_step);
        else
            for (int64_t i = 0; i < COLUMNS; i += 2 * REGISTER)
                strip(2, x, rows, width, with + i, to + i, y_step);
    }
}
