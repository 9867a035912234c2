/* Attention over keys and values by slot, in float32 or bfloat16, for a CPU engine; `kernels.py`
   compiles it at engine start-up. All arithmetic is in float32. A token's result depends on that
   token alone: not on the batch, the number of threads or the thread that computes it.

   Compile-time constants: HEAD_DIM (a multiple of 16), GROUP_SIZE, the queries of a key/value head,
   and TILE_TOKENS, the tokens of a sequence that read their keys together, at most. */

#include <math.h>

#include "plan.h"

#define HEAD_VECTORS (HEAD_DIM / SIMD_WIDTH)
/* Keys of a block: 16 KiB with heads of 64, so that keys and then values stay in the L1 cache. */
#define KEY_BLOCK 64
/* Registers for weighted sums of values: half of 32, or of 16. */
#define ACCUMULATORS (SIMD_WIDTH == 16 ? 16 : 8)
/* Queries whose weighted sums are accumulated in one pass over the values. */
#define QUERIES_PER_PASS MAX(1, MIN(4, ACCUMULATORS / HEAD_VECTORS))
/* Of a tile, and what the last pass has beyond. */
#define MAX_QUERIES (TILE_TOKENS * GROUP_SIZE)

/* Every second lane of two vectors, from lane i on. */
#if SIMD_WIDTH == 16
#define SECOND_LANES(i) i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, \
                        i + 16, i + 18, i + 20, i + 22, i + 24, i + 26, i + 28, i + 30
#elif SIMD_WIDTH == 8
#define SECOND_LANES(i) i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14
#else
#define SECOND_LANES(i) i, i + 2, i + 4, i + 6
#endif
#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (ivec){__VA_ARGS__})
#endif

typedef uint16_t half_words __attribute__((vector_size(2 * SIMD_WIDTH), aligned(2), may_alias));

#define HEAD_BYTES(is_bf16) (HEAD_DIM * ((is_bf16) ? 2 : 4))

ALWAYS_INLINE void prefetch_head(const int is_bf16, const char *row) {
    for (int i = 0; i < HEAD_BYTES(is_bf16); i += 64) __builtin_prefetch(row + i);
}

/* In bfloat16 two vectors of a head are stored as one of pairs, which a shift and a mask make
   float32. A last vector that has no other one is in order. */
#define IS_PAIRED(i) ((i) / 2 * 2 + 1 < HEAD_VECTORS)

/* Vector i of a head in float32 or bfloat16. */
ALWAYS_INLINE vec load_vector(const int is_bf16, const char *head, const int i) {
    if (!is_bf16) return ((const vec *)head)[i];
    ivec pairs;
    if (IS_PAIRED(i)) pairs = ((const unaligned_ivec *)head)[i / 2];
    else pairs = __builtin_convertvector(((const half_words *)head)[i], ivec);
    return (vec)(i % 2 ? pairs & (int)0xffff0000 : pairs << 16);
}

/* Stores a head in row `row` of a table, as `load_vector` reads it. */
static void store_head(const int is_bf16, void *table, int64_t row, const float *x) {
    char *head = (char *)table + row * HEAD_BYTES(is_bf16);
    if (!is_bf16) memcpy(head, x, HEAD_BYTES(0));
    for (int i = 0; is_bf16 && i < HEAD_VECTORS; i += 2, head += sizeof(vec), x += 2 * SIMD_WIDTH)
        for (int j = 0; j < SIMD_WIDTH; j++) {
            const uint32_t low = round_to_bf16(x[j]) >> 16;
            if (IS_PAIRED(i)) ((uint32_t *)head)[j] = low | round_to_bf16(x[SIMD_WIDTH + j]);
            else ((uint16_t *)head)[j] = low;
        }
}

/* The dot products of a query with SIMD_WIDTH consecutive keys, one in each lane. Also prefetches
   the rows from `next` on, unless that is null. */
ALWAYS_INLINE vec dot_products(
    const int is_bf16, const vec *query, const char *keys, const char *next
) {
    vec sums[SIMD_WIDTH];
#pragma GCC unroll 16
    for (int j = 0; j < SIMD_WIDTH; j++) {
        if (next) prefetch_head(is_bf16, next + j * HEAD_BYTES(is_bf16));
        sums[j] = (vec){0}; /* else heads of 16 would fuse the product with a later addition */
        for (int i = 0; i < HEAD_VECTORS; i++)
            sums[j] += query[i] * load_vector(is_bf16, keys + j * HEAD_BYTES(is_bf16), i);
    }
    /* Of each two vectors, neighbouring lanes are added up: of the first, then of the second. */
#pragma GCC unroll 4
    for (int n = SIMD_WIDTH / 2; n; n /= 2)
#pragma GCC unroll 8
        for (int j = 0; j < n; j++)
            sums[j] = SHUFFLE(sums[2 * j], sums[2 * j + 1], SECOND_LANES(0)) +
                      SHUFFLE(sums[2 * j], sums[2 * j + 1], SECOND_LANES(1));
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

/* Lane by lane: `visible` where first <= key <= last, else `hidden`. */
static inline vec mask_keys(vec key, float first, float last, vec visible, vec hidden) {
    visible = select_less(BROADCAST(last), key, hidden, visible);
    return select_less(key, BROADCAST(first), hidden, visible);
}

/* Attention of a tile, for the queries of key/value head h. The constant `tokens` is how many are
   computed; the tile uses the first ones.

   Online softmax (arXiv 1805.02867): keys come in blocks that start at multiples of KEY_BLOCK and
   are added up in their order, with a running maximum and a running sum for each query; so the
   result does not depend on which tokens are computed together. Up to SIMD_WIDTH - 1 keys around
   the visible ones are read and masked. While keys are read their values are prefetched, and while
   values are read the next keys: more prefetches at a time would wait for each other. */
ALWAYS_INLINE void attend(
    const int is_bf16, const int tokens, const Operation *op, const Step *step, int64_t tile,
    int64_t h
) {
    const int queries = tokens * GROUP_SIZE;
    const int64_t r = step->tile_starts[tile], used = step->tile_starts[tile + 1] - r;
    const int64_t position = step->indices[POSITIONS][r], window = op->extra;
    const int64_t at = (step->slots[r] * op->count + h) * step->kv_length * HEAD_BYTES(is_bf16);
    const char *keys = (const char *)op->weight + at, *values = (const char *)op->factor + at;
    const float *q = (const float *)op->x + r * op->x_stride + h * GROUP_SIZE * HEAD_DIM;
    float *y = op->y + r * op->y_stride + h * GROUP_SIZE * HEAD_DIM;

    vec query[MAX_QUERIES][HEAD_VECTORS], output[MAX_QUERIES][HEAD_VECTORS];
    vec running_sum[MAX_QUERIES]; /* partial sums in each lane */
    float running_max[MAX_QUERIES], weights[MAX_QUERIES][KEY_BLOCK];
    vec lane_index;
    for (int i = 0; i < SIMD_WIDTH; i++) lane_index[i] = i;
    for (int n = 0; n < queries; n++) {
        const int64_t token = MIN(n / GROUP_SIZE, used - 1);
        memcpy(query[n], q + token * op->x_stride + n % GROUP_SIZE * HEAD_DIM, sizeof *query);
        for (int i = 0; i < HEAD_VECTORS; i++) {
            query[n][i] *= step->attention_scale;
            output[n][i] = (vec){0};
        }
        running_max[n] = -INFINITY;
        running_sum[n] = (vec){0};
    }
    memset(weights, 0, queries * sizeof *weights);

    const int64_t end = position + used, begin = window >= 0 ? MAX(position - window, 0) : 0;
    for (int64_t block = begin / KEY_BLOCK * KEY_BLOCK; block < end; block += KEY_BLOCK) {
        const int from = MAX(begin - block, 0), to = MIN(end - block, KEY_BLOCK);
        const char *block_keys = keys + block * HEAD_BYTES(is_bf16);
        const char *block_values = values + block * HEAD_BYTES(is_bf16);
        /* Attention scores. */
        for (int j = from / SIMD_WIDTH * SIMD_WIDTH; j < to; j += SIMD_WIDTH)
            for (int n = 0; n < queries; n++) {
                const int row = j * HEAD_BYTES(is_bf16);
                *(vec *)(weights[n] + j) =
                    dot_products(is_bf16, query[n], block_keys + row, n ? 0 : block_values + row);
            }
        /* Scores to weights, with a rescaling of what has been added up before. */
        for (int n = 0; n < queries; n++) {
            const int64_t last = position + MIN(n / GROUP_SIZE, used - 1) - block;
            const int64_t first = window >= 0 ? MAX(last - window, 0) : 0;
            vec *w = (vec *)weights[n], sums = {0}, highest = BROADCAST(running_max[n]);
            if (first >= KEY_BLOCK || last < 0) {
                memset(w, 0, sizeof *weights);
                continue;
            }
            for (int i = 0; i < KEY_BLOCK / SIMD_WIDTH; i++) {
                const vec key = lane_index + 1.0f * i * SIMD_WIDTH;
                w[i] = mask_keys(key, first, last, w[i], BROADCAST(-INFINITY));
                highest = select_less(highest, w[i], w[i], highest);
            }
            const float previous_max = running_max[n];
            running_max[n] = max_lanes(highest);
            for (int i = 0; i < KEY_BLOCK / SIMD_WIDTH; i++) {
                const vec key = lane_index + 1.0f * i * SIMD_WIDTH;
                w[i] = mask_keys(key, first, last, exp_negative(w[i] - running_max[n]), (vec){0});
                sums += w[i];
            }
            const float rescale = exp_negative(BROADCAST(previous_max - running_max[n]))[0];
            running_sum[n] = running_sum[n] * rescale + sums;
            for (int i = 0; i < HEAD_VECTORS; i++) output[n][i] *= rescale;
        }
        /* Weighted sums of values. */
        const char *next_keys = block_keys + KEY_BLOCK * HEAD_BYTES(is_bf16);
        int n = 0, next_rows = end - block - KEY_BLOCK;
        for (; n + QUERIES_PER_PASS <= queries; n += QUERIES_PER_PASS, next_rows = 0)
            add_values(is_bf16, QUERIES_PER_PASS, output + n, weights + n, block_values, from, to,
                       next_keys, next_rows);
        for (; n < queries; n++, next_rows = 0)
            add_values(is_bf16, 1, output + n, weights + n, block_values, from, to, next_keys,
                       next_rows);
    }
    for (int n = 0; n < used * GROUP_SIZE; n++) {
        const float sum = sum_lanes(running_sum[n]);
        for (int i = 0; i < HEAD_VECTORS; i++) output[n][i] /= sum;
        memcpy(y + n / GROUP_SIZE * op->y_stride + n % GROUP_SIZE * HEAD_DIM, output[n],
               sizeof *output);
    }
}

/* Copies the keys and values [heads, HEAD_DIM] of each token to its slot and position in tables
   [slots, heads, kv_length, HEAD_DIM], where kv_length is a multiple of SIMD_WIDTH. Then computes
   the attention of its queries [heads * GROUP_SIZE, HEAD_DIM]: each token attends to itself and at
   most `window` tokens before it, to all if that is negative. All tiles of a head follow each
   other, so that the tiles of a prompt find its keys in the cache. */
void slot_attention(const Operation *op, const Step *step) {
    const int64_t heads = op->count, tiles = step->tiles;
    const int is_bf16 = op->format == BFLOAT16;
    void *keys = (void *)op->weight, *values = (void *)op->factor;
#pragma omp parallel num_threads(step->threads) if (step->threads > 1)
    {
#pragma omp for
        for (int64_t r = 0; r < step->rows; r++)
            for (int64_t h = 0; h < heads; h++) {
                const float *k = (const float *)op->x + r * op->x_stride +
                                 (heads * GROUP_SIZE + h) * HEAD_DIM;
                const int64_t position = step->indices[POSITIONS][r];
                const int64_t row = (step->slots[r] * heads + h) * step->kv_length + position;
                store_head(is_bf16, keys, row, k);
                store_head(is_bf16, values, row, k + heads * HEAD_DIM);
            }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < tiles * heads; item++) {
            const int64_t tile = item % tiles, h = item / tiles;
            const int is_single = step->tile_starts[tile + 1] - step->tile_starts[tile] == 1;
            if (is_single && is_bf16) attend(1, 1, op, step, tile, h);
            else if (is_single) attend(0, 1, op, step, tile, h);
            else if (is_bf16) attend(1, TILE_TOKENS, op, step, tile, h);
            else attend(0, TILE_TOKENS, op, step, tile, h);
        }
    }
}
