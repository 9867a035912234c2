/* Attention over keys and values by slot, in float32 or bfloat16, for a CPU engine; `kernels.py`
   compiles it at engine start-up. All arithmetic is in float32. A token's result depends on that token
   alone: not on the batch, the number of threads or the thread that computes it.

   Compile-time constants: HEAD_DIM (a multiple of 16), GROUP_SIZE, the queries of a key/value head,
   and TILE_TOKENS, the tokens of a sequence that read their keys together, at most. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "plan.h"
#include "simd.h"
#include "vector_math.h"

#define HEAD_VECTORS (HEAD_DIM / SIMD_WIDTH)
/* Keys of a block: 16 KiB with heads of 64, so that keys and then values stay in the L1 cache. */
#define KEY_BLOCK 64
/* Registers for weighted sums of values: half of 32, or of 16. */
#define ACCUMULATORS (SIMD_WIDTH == 16 ? 16 : 8)
/* Queries whose weighted sums are accumulated in one pass over the values. */
#define QUERIES_PER_PASS \
    (ACCUMULATORS < 2 * HEAD_VECTORS   ? 1 \
     : ACCUMULATORS < 4 * HEAD_VECTORS ? ACCUMULATORS / HEAD_VECTORS \
                                       : 4)

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (ivec){__VA_ARGS__})
#endif
#if SIMD_WIDTH == 16
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif SIMD_WIDTH == 8
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif

#define HEAD_BYTES(is_bf16) (HEAD_DIM * ((is_bf16) ? sizeof(uint16_t) : sizeof(float)))

ALWAYS_INLINE void prefetch_head(const int is_bf16, const char *row) {
    for (int i = 0; i < HEAD_BYTES(is_bf16); i += 64) __builtin_prefetch(row + i);
}

/* In bfloat16 two vectors of a head are stored as one of pairs, which a shift and a mask make float32. A
   last vector that has no other one is in order. */
#define IS_PAIRED(i) ((i) / 2 * 2 + 1 < HEAD_VECTORS)

/* Vector i of a head in float32 or bfloat16. */
ALWAYS_INLINE vec load_vector(const int is_bf16, const char *head, const int i) {
    if (!is_bf16) return ((const vec *)head)[i];
    if (!IS_PAIRED(i)) return widen_bf16((const uint16_t *)head + i * SIMD_WIDTH);
    const ivec pairs = ((const unaligned_ivec *)head)[i / 2];
    return i % 2 ? (vec)(pairs & (int)0xffff0000) : (vec)(pairs << 16);
}

/* The dot products of a query with SIMD_WIDTH consecutive keys, one in each lane. Also prefetches the rows
   from `next` on, unless that is null. */
ALWAYS_INLINE vec dot_products(const int is_bf16, const vec *query, const char *keys, const char *next) {
    vec sums[SIMD_WIDTH];
#pragma GCC unroll 16
    for (int j = 0; j < SIMD_WIDTH; j++) {
        if (next) prefetch_head(is_bf16, next + j * HEAD_BYTES(is_bf16));
        sums[j] = (vec){0}; /* without it, heads of 16 would fuse the product with a later addition */
        for (int i = 0; i < HEAD_VECTORS; i++)
            sums[j] += query[i] * load_vector(is_bf16, keys + j * HEAD_BYTES(is_bf16), i);
    }
    /* Of each two vectors, neighbouring lanes are added up: those of the first, then of the second. */
#pragma GCC unroll 4
    for (int n = SIMD_WIDTH / 2; n; n /= 2)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++)
            sums[j] = SHUFFLE(sums[2 * j], sums[2 * j + 1], EVEN_LANES) +
                      SHUFFLE(sums[2 * j], sums[2 * j + 1], ODD_LANES);
    return sums[0];
}

/* Adds the values [KEY_BLOCK, HEAD_DIM] from `from` to `to`, weighted, to the outputs of `queries`
   queries. Also prefetches the rows of `next` before `next_rows`. */
ALWAYS_INLINE void add_values(
    const int is_bf16, const int queries, vec (*outputs)[HEAD_VECTORS], float (*weights)[KEY_BLOCK],
    const char *values, int from, int to, const char *next, int next_rows
) {
    vec sums[QUERIES_PER_PASS][HEAD_VECTORS];
    memcpy(sums, outputs, queries * sizeof *outputs);
    for (int j = from; j < to; j++) {
        const char *value = values + j * HEAD_BYTES(is_bf16);
        if (j < next_rows) prefetch_head(is_bf16, next + j * HEAD_BYTES(is_bf16));
        for (int n = 0; n < queries; n++)
            for (int i = 0; i < HEAD_VECTORS; i++)
                sums[n][i] += weights[n][j] * load_vector(is_bf16, value, i);
    }
    memcpy(outputs, sums, queries * sizeof *outputs);
}

/* Attention of the queries q [used, GROUP_SIZE, HEAD_DIM] of consecutive tokens, the first one at
   `position`, over the keys and values [.., HEAD_DIM] of their head, into y. `tokens` >= `used` are
   computed, a constant.

   Online softmax (arXiv 1805.02867): keys come in blocks that start at multiples of KEY_BLOCK and are
   added up in their order, with a running maximum and a running sum for each query; so the result does
   not depend on which tokens are computed together. Up to SIMD_WIDTH - 1 keys around the visible ones
   are read and masked. While keys are read their values are prefetched, and while values are read the
   next keys: more prefetches at a time would wait for each other. With `is_bf16`, a constant, keys and
   values are bfloat16, which become float32 in registers. */
ALWAYS_INLINE void attend(
    const int is_bf16, const int tokens, int64_t used, const float *q, int64_t q_stride,
    const char *keys, const char *values, int64_t position, int64_t window, float scale, float *y,
    int64_t y_stride
) {
    vec query[TILE_TOKENS * GROUP_SIZE][HEAD_VECTORS], output[TILE_TOKENS * GROUP_SIZE][HEAD_VECTORS];
    vec running_sum[TILE_TOKENS * GROUP_SIZE]; /* partial sums in each lane */
    float running_max[TILE_TOKENS * GROUP_SIZE], weights[TILE_TOKENS * GROUP_SIZE][KEY_BLOCK];
    vec lane_index;
    for (int i = 0; i < SIMD_WIDTH; i++) lane_index[i] = i;
    for (int n = 0; n < tokens * GROUP_SIZE; n++) {
        int64_t token = n / GROUP_SIZE < used ? n / GROUP_SIZE : used - 1;
        memcpy(query[n], q + token * q_stride + n % GROUP_SIZE * HEAD_DIM, sizeof *query);
        for (int i = 0; i < HEAD_VECTORS; i++) query[n][i] *= scale, output[n][i] = (vec){0};
        running_max[n] = -INFINITY, running_sum[n] = (vec){0};
    }
    memset(weights, 0, tokens * GROUP_SIZE * sizeof *weights);

    int64_t end = position + used, begin = window >= 0 && position > window ? position - window : 0;
    for (int64_t block = begin / KEY_BLOCK * KEY_BLOCK; block < end; block += KEY_BLOCK) {
        int from = begin > block ? begin - block : 0;
        int to = end - block < KEY_BLOCK ? end - block : KEY_BLOCK;
        const char *block_keys = keys + block * HEAD_BYTES(is_bf16);
        const char *block_values = values + block * HEAD_BYTES(is_bf16);
        /* Attention scores. */
        for (int j = from / SIMD_WIDTH * SIMD_WIDTH; j < to; j += SIMD_WIDTH)
            for (int n = 0; n < tokens * GROUP_SIZE; n++) {
                const int64_t row = j * HEAD_BYTES(is_bf16);
                *(vec *)(weights[n] + j) =
                    dot_products(is_bf16, query[n], block_keys + row, n ? 0 : block_values + row);
            }
        /* Scores to weights, with a rescaling of what has been added up before. */
        for (int n = 0; n < tokens * GROUP_SIZE; n++) {
            int64_t at = position + (n / GROUP_SIZE < used ? n / GROUP_SIZE : used - 1) - block;
            float first = window >= 0 && at > window ? at - window : 0;
            float last = at < KEY_BLOCK ? at : KEY_BLOCK - 1;
            vec *w = (vec *)weights[n], sums = {0};
            if (first > last) {
                memset(w, 0, sizeof *weights);
                continue;
            }
/* Vector i of the block: `visible` in the lanes of keys from `first` to `last`, else `hidden`. */
#define MASK(i, visible, hidden) \
    select_less(lane_index + 1.0f * i * SIMD_WIDTH, BROADCAST(first), hidden, \
                select_less(BROADCAST(last), lane_index + 1.0f * i * SIMD_WIDTH, hidden, visible))
            vec highest = BROADCAST(running_max[n]);
            for (int i = 0; i < KEY_BLOCK / SIMD_WIDTH; i++) {
                w[i] = MASK(i, w[i], BROADCAST(-INFINITY));
                highest = select_less(highest, w[i], w[i], highest);
            }
            float previous_max = running_max[n];
            running_max[n] = max_lanes(highest);
            for (int i = 0; i < KEY_BLOCK / SIMD_WIDTH; i++) {
                w[i] = MASK(i, exp_negative(w[i] - running_max[n]), (vec){0});
                sums += w[i];
            }
            float rescale = exp_negative(BROADCAST(previous_max - running_max[n]))[0];
            running_sum[n] = running_sum[n] * rescale + sums;
            for (int i = 0; i < HEAD_VECTORS; i++) output[n][i] *= rescale;
        }
        /* Weighted sums of values. */
        const char *next_keys = block_keys + KEY_BLOCK * HEAD_BYTES(is_bf16);
        int n = 0, next_rows = end - block - KEY_BLOCK;
        for (; n + QUERIES_PER_PASS <= tokens * GROUP_SIZE; n += QUERIES_PER_PASS, next_rows = 0)
            add_values(is_bf16, QUERIES_PER_PASS, output + n, weights + n, block_values, from, to,
                       next_keys, next_rows);
        for (; n < tokens * GROUP_SIZE; n++, next_rows = 0)
            add_values(is_bf16, 1, output + n, weights + n, block_values, from, to, next_keys,
                       next_rows);
    }
    for (int n = 0; n < used * GROUP_SIZE; n++) {
        float sum = sum_lanes(running_sum[n]);
        for (int i = 0; i < HEAD_VECTORS; i++) output[n][i] /= sum;
        float *out = y + n / GROUP_SIZE * y_stride + n % GROUP_SIZE * HEAD_DIM;
        memcpy(out, output[n], sizeof *output);
    }
}

/* bfloat16 in the upper halves of the lanes, as `round_to_bf16`. */
static inline ivec round_vec(vec x) {
    const ivec bits = (ivec)x, is_number = x == x;
    return (((bits + 0x7fff + (bits >> 16 & 1)) & is_number) | (0x7fc00000 & ~is_number)) & (int)0xffff0000;
}

/* Stores HEAD_DIM floats in row `row` of a table, as `load_vector` reads them. */
static inline void store_head(void *table, int is_bf16, int64_t row, const float *x) {
    if (!is_bf16) {
        memcpy((float *)table + row * HEAD_DIM, x, HEAD_DIM * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)table + row * HEAD_DIM;
    for (int i = 0; i < HEAD_VECTORS; i++, x += SIMD_WIDTH)
        if (!IS_PAIRED(i))
            for (int j = 0; j < SIMD_WIDTH; j++) out[i * SIMD_WIDTH + j] = round_to_bf16(x[j]) >> 16;
        else if (i % 2)
            ((unaligned_ivec *)out)[i / 2] = (round_vec(*(vec *)(x - SIMD_WIDTH)) >> 16 & 0xffff) |
                                             round_vec(*(vec *)x);
}

/* Copies the keys and values [heads, HEAD_DIM] of each token to its slot and position in tables [slots, heads,
   kv_length, HEAD_DIM], where kv_length is a multiple of SIMD_WIDTH. Then computes the attention of its
   queries [heads * GROUP_SIZE, HEAD_DIM]: each token attends to itself and at most `window` tokens before
   it, to all if that is negative. All tiles of a head follow each other, so that the tiles of a prompt
   find its keys in the cache. */
void slot_attention(const Operation *op, const Step *step) {
    const int64_t *slots = step->slots, *positions = step->indices[POSITIONS];
    const int64_t heads = op->count, length = step->kv_length, stride = op->x_stride, y_stride = op->y_stride;
    const int is_bf16 = op->format == BFLOAT16;
    const float *q = op->x, *k = q + heads * GROUP_SIZE * HEAD_DIM, *v = k + heads * HEAD_DIM;
    char *keys = (char *)op->weight, *values = (char *)op->factor;
#pragma omp parallel num_threads(step->threads) if (step->threads > 1)
    {
#pragma omp for
        for (int64_t r = 0; r < step->rows; r++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t row = (slots[r] * heads + h) * length + positions[r];
                store_head(keys, is_bf16, row, k + r * stride + h * HEAD_DIM);
                store_head(values, is_bf16, row, v + r * stride + h * HEAD_DIM);
            }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < step->tiles * heads; item++) {
            int64_t t = item % step->tiles, h = item / step->tiles;
            int64_t r = step->tile_starts[t], used = step->tile_starts[t + 1] - r;
            int64_t at = (slots[r] * heads + h) * length * HEAD_BYTES(is_bf16);
            const float *tile_q = q + r * stride + h * GROUP_SIZE * HEAD_DIM;
            float *tile_y = op->y + r * y_stride + h * GROUP_SIZE * HEAD_DIM;
#define ATTEND(is_bf16, tokens) \
    attend(is_bf16, tokens, used, tile_q, stride, keys + at, values + at, positions[r], op->extra, \
           step->attention_scale, tile_y, y_stride)
            if (used == 1 && is_bf16) ATTEND(1, 1);
            else if (used == 1) ATTEND(0, 1);
            else if (is_bf16) ATTEND(1, TILE_TOKENS);
            else ATTEND(0, TILE_TOKENS);
        }
    }
}
