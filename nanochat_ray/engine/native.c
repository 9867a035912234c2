/* What an engine's forward waits for on a CPU; `native.py` compiles it where it runs. What a row yields depends on that row alone: not on the batch, the number of threads or
   who takes it.

   HEAD (a multiple of 16) and GROUP, the queries of a key/value head, are given when compiling. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define VECTORS (HEAD / LANES)
#define KEYS 64  /* of a block: with HEAD=64 16 KiB, so that scores meet values in the first cache */
#define AHEAD 16 /* keys to fetch ahead: no processor's own prefetching crosses a page of 4 KiB */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(LANES)));

/* A tile of a matrix product fills the registers, or nearly: 32 of AVX512, 16 of AVX, 32 of NEON. */
#define COLUMNS 32
#if defined(__AVX512F__)
#define REGISTER 16
#define TILE_ROWS 14
#elif defined(__AVX__)
#define REGISTER 8
#define TILE_ROWS 3
#else
#define REGISTER 4
#define TILE_ROWS 3
#endif
#define TILE_WIDTH (COLUMNS / REGISTER)
typedef float reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));

static inline void fetch(const float *row) {
    for (int i = 0; i < HEAD; i += LANES) __builtin_prefetch(row + i);
}

static inline float sum_half(half x) {
    union { half all; quarter halves[2]; } of = {x};
    quarter c = of.halves[0] + of.halves[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline float sum(vec x) {
    union { vec all; half halves[2]; } of = {x};
    return sum_half(of.halves[0] + of.halves[1]);
}

/* exp for x <= 0: a power of two and a polynomial, as in Cephes (S. Moshier); 1e-7 relative. */
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* Queries q [GROUP, HEAD] over keys and values [count, HEAD], into y [GROUP, HEAD]. Each is
   read once, a block at a time, with the running maximum and sum of "Online normalizer calculation
   for softmax" (arXiv 1805.02867). */
static void attend_one(
    const float *q, const float *keys, const float *values, int64_t count, float scale, float *y
) {
    vec query[GROUP][VECTORS], made[GROUP][VECTORS];
    float most[GROUP], total[GROUP], weight[GROUP][KEYS];
    memcpy(query, q, sizeof query);
    memset(made, 0, sizeof made);
    for (int g = 0; g < GROUP; g++) most[g] = -INFINITY, total[g] = 0;

    for (int64_t first = 0; first < count; first += KEYS) {
        int held = count - first < KEYS ? (int)(count - first) : KEYS;
        for (int j = 0; j < held; j++) {
            const vec *key = (const vec *)(keys + (first + j) * HEAD);
            fetch((const float *)key + AHEAD * HEAD);
            for (int g = 0; g < GROUP; g++) {
                vec products = query[g][0] * key[0];
                for (int i = 1; i < VECTORS; i++) products += query[g][i] * key[i];
                weight[g][j] = sum(products) * scale;
            }
        }
        for (int g = 0; g < GROUP; g++) {
            float before = most[g];
            for (int j = 0; j < held; j++) most[g] = weight[g][j] > most[g] ? weight[g][j] : most[g];
            for (int j = held; j < KEYS; j++) weight[g][j] = most[g];
            for (int j = 0; j < KEYS; j++) weight[g][j] = exp_negative(weight[g][j] - most[g]);
            for (int j = held; j < KEYS; j++) weight[g][j] = 0;
            vec sums = *(const vec *)weight[g];
            for (int j = LANES; j < KEYS; j += LANES) sums += *(const vec *)(weight[g] + j);
            float fade = first ? exp_negative(before - most[g]) : 0;
            total[g] = total[g] * fade + sum(sums);
            for (int i = 0; i < VECTORS; i++) made[g][i] *= fade;
        }
        for (int j = 0; j < held; j++) {
            const vec *value = (const vec *)(values + (first + j) * HEAD);
            fetch((const float *)value + AHEAD * HEAD);
            for (int g = 0; g < GROUP; g++)
                for (int i = 0; i < VECTORS; i++) made[g][i] += weight[g][j] * value[i];
        }
    }
    for (int g = 0; g < GROUP; g++)
        for (int i = 0; i < VECTORS; i++) made[g][i] /= total[g];
    memcpy(y, made, sizeof made);
}

/* Rows k and v [rows, heads, HEAD], `step` floats from row to row, to their places in keys and
   values [slots, heads, length, HEAD]; then attention of the first `decodes` rows of q [decodes,
   heads * GROUP, HEAD] into y, over at most `window` tokens before their own unless it is < 0. */
void step_attention(
    const float *q, int64_t q_step, const float *k, int64_t k_step, const float *v, int64_t v_step,
    float *keys, float *values, const int64_t *slots, const int64_t *positions, float *y,
    int64_t decodes, int64_t rows, int64_t heads, int64_t length, int64_t window, float scale,
    int threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t r = 0; r < rows; r++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t place = ((slots[r] * heads + h) * length + positions[r]) * HEAD;
                memcpy(keys + place, k + r * k_step + h * HEAD, HEAD * sizeof(float));
                memcpy(values + place, v + r * v_step + h * HEAD, HEAD * sizeof(float));
            }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < decodes * heads; item++) {
            int64_t r = item / heads, h = item % heads, end = positions[r] + 1;
            int64_t begin = window >= 0 && positions[r] > window ? positions[r] - window : 0;
            int64_t place = ((slots[r] * heads + h) * length + begin) * HEAD;
            attend_one(q + r * q_step + h * GROUP * HEAD, keys + place, values + place, end - begin,
                       scale, y + item * GROUP * HEAD);
        }
    }
}

/* `rows` rows and COLUMNS columns of a product, whose sums stay in registers. Each is made in the
   order of k, however many rows there are beside it. */
static inline __attribute__((always_inline)) void tile(
    const int rows, const float *x, int64_t width, const float *w, float *y, int64_t y_step
) {
    reg sums[TILE_ROWS][TILE_WIDTH];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < width; k++, w += COLUMNS) {
        const reg *column = (const reg *)w;
        for (int i = 0; i < COLUMNS; i += LANES) __builtin_prefetch(w + AHEAD * COLUMNS + i);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < TILE_WIDTH; i++) sums[r][i] += x[r * width + k] * column[i];
    }
    for (int r = 0; r < rows; r++) memcpy(y + r * y_step, sums[r], sizeof sums[r]);
}

/* x [rows, width] times w [blocks, width, COLUMNS] into y [rows, blocks * COLUMNS]. */
void linear(
    const float *x, const float *w, float *y, int64_t rows, int64_t width, int64_t blocks, int threads
) {
    int64_t y_step = blocks * COLUMNS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < blocks; n++)
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const float *from = x + r * width, *with = w + n * width * COLUMNS;
            float *to = y + r * y_step + n * COLUMNS;
#define CASE(count) \
    case count: \
        tile(count < TILE_ROWS ? count : TILE_ROWS, from, width, with, to, y_step); \
        break
            switch (rows - r < TILE_ROWS ? rows - r : TILE_ROWS) {
                CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
                CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14);
            }
        }
}

/* Rotary embedding by cos and sin [rows, HEAD / 2], then RMSNorm, of x [rows, heads, HEAD] in place,
   `step` floats from row to row. */
void turn_and_norm(
    float *x, int64_t step, const float *cos, const float *sin, int64_t rows, int64_t heads,
    float eps, int threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++) {
            half *first = (half *)(x + r * step + h * HEAD), *second = first + VECTORS;
            const half *c = (const half *)(cos + r * HEAD / 2);
            const half *s = (const half *)(sin + r * HEAD / 2);
            half squares = {0};
            for (int i = 0; i < VECTORS; i++) {
                half a = first[i] * c[i] + second[i] * s[i], b = second[i] * c[i] - first[i] * s[i];
                first[i] = a, second[i] = b;
                squares += a * a + b * b;
            }
            float scale = 1 / sqrtf(sum_half(squares) / HEAD + eps);
            for (int i = 0; i < 2 * VECTORS; i++) first[i] *= scale;
        }
}

/* RMSNorm of x [rows, width] into y. */
void rms_norm(const float *x, float *y, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * width;
        float *to = y + r * width, rest = 0;
        vec squares = {0};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) squares += *(vec *)(from + i) * *(vec *)(from + i);
        for (; i < width; i++) rest += from[i] * from[i];
        float scale = 1 / sqrtf((sum(squares) + rest) / width + eps);
        for (i = 0; i < width; i++) to[i] = from[i] * scale;
    }
}

/* max(x, 0)^2 of x [count], in place. */
void relu_squared(float *x, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
}

/* cap * tanh(x / cap) of x [count], in place; 1e-7 of cap. */
void softcap(float *x, int64_t count, float cap, int threads) {
    float slope = -2 / cap;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        float t = exp_negative(slope * fabsf(x[i]));
        x[i] = copysignf(cap * (1 - t) / (1 + t), x[i]);
    }
}
