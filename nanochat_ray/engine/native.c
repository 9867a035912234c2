/* What an engine's forward waits for on a CPU; `native.py` compiles it where it runs. What a row
   yields depends on that row alone: not on the batch, the number of threads or who takes it.

   HEAD (a multiple of 16), GROUP, the queries of a key/value head, and TILE are given when
   compiling. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define VECTORS (HEAD / LANES)
#define KEYS 64  /* of a block: with HEAD=64 16 KiB, so that scores meet values in the first cache */
#define TOGETHER (VECTORS > 4 ? 2 : 4) /* queries whose sums stay in registers */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(LANES)));

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

/* Adds a block's values [KEYS, HEAD] from `from` to `to`, by the weights of `count` queries, and
   fetches `next`, up to `ahead` rows. */
static inline __attribute__((always_inline)) void add_values(
    const int count, vec (*made)[VECTORS], float (*weight)[KEYS], const float *values, int from, int to,
    const float *next, int ahead
) {
    vec sums[TOGETHER][VECTORS];
    memcpy(sums, made, count * sizeof *made);
    for (int j = from; j < to; j++) {
        const vec *value = (const vec *)(values + j * HEAD);
        if (j < ahead) fetch(next + j * HEAD);
        for (int n = 0; n < count; n++)
            for (int i = 0; i < VECTORS; i++) sums[n][i] += weight[n][j] * value[i];
    }
    memcpy(made, sums, count * sizeof *made);
}

/* Queries q [used, GROUP, HEAD] at `position` and after it, over the keys and values [.., HEAD] of
   their head, into y; `rows` >= `used` is what is computed. Keys come in blocks that begin at a
   multiple of KEYS, and are summed in their order: so it is all one which rows are in one call. The
   softmax keeps a running maximum and sum (arXiv 1805.02867). */
static inline __attribute__((always_inline)) void attend(
    const int rows, int64_t used, const float *q, int64_t q_step, const float *keys,
    const float *values, int64_t position, int64_t window, float scale, float *y, int64_t y_step
) {
    vec query[TILE * GROUP][VECTORS], made[TILE * GROUP][VECTORS];
    float most[TILE * GROUP], total[TILE * GROUP], weight[TILE * GROUP][KEYS];
    quarter parts[TILE * GROUP][KEYS];
    for (int n = 0; n < rows * GROUP; n++) {
        int64_t row = n / GROUP < used ? n / GROUP : used - 1;
        memcpy(query[n], q + row * q_step + n % GROUP * HEAD, sizeof *query);
        for (int i = 0; i < VECTORS; i++) query[n][i] *= scale, made[n][i] = (vec){0};
        most[n] = -INFINITY, total[n] = 0;
    }
    memset(parts, 0, rows * GROUP * sizeof *parts);

    int64_t end = position + used, begin = window >= 0 && position > window ? position - window : 0;
    for (int64_t block = begin / KEYS * KEYS; block < end; block += KEYS) {
        int from = begin > block ? begin - block : 0, to = end - block < KEYS ? end - block : KEYS;
        for (int j = from; j < to; j++) {
            const vec *key = (const vec *)(keys + (block + j) * HEAD);
            fetch(values + (block + j) * HEAD);
            for (int n = 0; n < rows * GROUP; n++) {
                union { vec all; half halves[2]; } products = {query[n][0] * key[0]};
                for (int i = 1; i < VECTORS; i++) products.all += query[n][i] * key[i];
                union { half all; quarter halves[2]; } sums;
                sums.all = products.halves[0] + products.halves[1];
                parts[n][j] = sums.halves[0] + sums.halves[1];
            }
        }
        for (int n = 0; n < rows * GROUP; n++) {
            int64_t at = position + (n / GROUP < used ? n / GROUP : used - 1) - block;
            int first = window >= 0 && at > window ? at - window : 0, last = at < KEYS ? at : KEYS - 1;
            float *w = weight[n], lanes[LANES], before = most[n];
            const float *part = (const float *)parts[n];
            if (first > last) {
                memset(w, 0, sizeof *weight);
                continue;
            }
            for (int j = 0; j < KEYS; j++) {
                float score = (part[4 * j] + part[4 * j + 2]) + (part[4 * j + 1] + part[4 * j + 3]);
                w[j] = j >= first && j <= last ? score : -INFINITY;
            }
            for (int i = 0; i < LANES; i++) lanes[i] = before;
            for (int j = 0; j < KEYS; j += LANES)
                for (int i = 0; i < LANES; i++) lanes[i] = w[j + i] > lanes[i] ? w[j + i] : lanes[i];
            for (int i = 0; i < LANES; i++) most[n] = lanes[i] > most[n] ? lanes[i] : most[n];
            for (int j = 0; j < KEYS; j++) {
                float power = exp_negative(w[j] - most[n]);
                w[j] = j >= first && j <= last ? power : 0;
            }
            vec sums = *(const vec *)w;
            for (int j = LANES; j < KEYS; j += LANES) sums += *(const vec *)(w + j);
            float fade = exp_negative(before - most[n]);
            total[n] = total[n] * fade + sum(sums);
            for (int i = 0; i < VECTORS; i++) made[n][i] *= fade;
        }
        const float *next = keys + (block + KEYS) * HEAD, *held = values + block * HEAD;
        int n = 0, ahead = end - block - KEYS;
        for (; n + TOGETHER <= rows * GROUP; n += TOGETHER, ahead = 0)
            add_values(TOGETHER, made + n, weight + n, held, from, to, next, ahead);
        for (; n < rows * GROUP; n++, ahead = 0)
            add_values(1, made + n, weight + n, held, from, to, next, ahead);
    }
    for (int n = 0; n < used * GROUP; n++) {
        for (int i = 0; i < VECTORS; i++) made[n][i] /= total[n];
        memcpy(y + n / GROUP * y_step + n % GROUP * HEAD, made[n], sizeof *made);
    }
}

/* Rows k and v [rows, heads, HEAD], `step` floats from row to row, to their places in keys and
   values [slots, heads, length, HEAD]; then attention of q [rows, heads * GROUP, HEAD] into y, over
   at most `window` tokens before their own unless it is < 0. Rows from tiles[t] on to before
   tiles[t + 1], TILE at most, follow each other in one slot. */
void step_attention(
    const float *q, int64_t q_step, const float *k, int64_t k_step, const float *v, int64_t v_step,
    float *keys, float *values, const int64_t *slots, const int64_t *positions,
    const int64_t *tiles, float *y, int64_t count, int64_t rows, int64_t heads, int64_t length,
    int64_t window, float scale, int threads
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
        for (int64_t item = 0; item < count * heads; item++) {
            int64_t r = tiles[item / heads], used = tiles[item / heads + 1] - r, h = item % heads;
            int64_t place = (slots[r] * heads + h) * length * HEAD, y_step = heads * GROUP * HEAD;
            const float *from = q + r * q_step + h * GROUP * HEAD;
            float *to = y + r * y_step + h * GROUP * HEAD;
            if (used == 1)
                attend(1, 1, from, q_step, keys + place, values + place, positions[r], window, scale,
                       to, y_step);
            else
                attend(TILE, used, from, q_step, keys + place, values + place, positions[r], window,
                       scale, to, y_step);
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
