/* What an engine's forward waits for on a CPU; `kernels.py` compiles it where it runs. What a row
   yields depends on that row alone: not on the batch, the number of threads or who takes it.

   HEAD (a multiple of 16), GROUP, the queries of a key/value head, and TILE are given when
   compiling. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "registers.h"

#define LANES REGISTER
#define VECTORS (HEAD / LANES)
#define KEYS 64 /* of a block: with HEAD=64 16 KiB, so that scores meet values in the first cache */
#define HELD (LANES == 16 ? 16 : 8) /* registers for sums of values: half of 32, or of 16 */
#define TOGETHER (HELD < 2 * VECTORS ? 1 : HELD < 4 * VECTORS ? HELD / VECTORS : 4) /* queries */
#define HALF (LANES < 8 ? LANES : 8)

typedef reg vec;
typedef float half __attribute__((vector_size(4 * HALF), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (lanes){__VA_ARGS__})
#endif
#if LANES == 16
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif

/* By lanes: a where x < y, and b where not. */
static inline vec less(vec x, vec y, vec a, vec b) {
    lanes is = x < y;
    return (vec)(((lanes)a & is) | ((lanes)b & ~is));
}

#define ALL(x) ((vec){0} + (x))

static inline void fetch(const float *row) {
    for (int i = 0; i < HEAD; i += 16) __builtin_prefetch(row + i);
}

/* Halves on halves, until one number is left. */
#define REDUCE(x, count, with) \
    union { __typeof__(x) all; float each[count]; } of = {x}; \
    for (int rest = count / 2; rest; rest /= 2) \
        for (int i = 0; i < rest; i++) of.each[i] = with(of.each[i], of.each[i + rest]); \
    return of.each[0];
#define ADD(a, b) ((a) + (b))
#define MORE(a, b) ((a) > (b) ? (a) : (b))

static inline float sum_half(half x) { REDUCE(x, HALF, ADD) }
static inline float sum(vec x) { REDUCE(x, LANES, ADD) }
static inline float largest(vec x) { REDUCE(x, LANES, MORE) }

/* exp for x <= 0: a power of two and a polynomial, as in Cephes (S. Moshier); 1e-7 relative. Next
   to 3 << 22 a float32 has no fraction: its last bits are the whole number. */
static inline vec exp_negative(vec x) {
    x = less(x, ALL(-87), ALL(-87), x);
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((lanes)shifted + 127) << 23);
}

/* Sums of neighbours, those of x and then those of y. */
static inline vec fold(vec x, vec y) {
    return SHUFFLE(x, y, EVEN) + SHUFFLE(x, y, ODD);
}

/* A query times so many keys, LANES at most: LANES sums of products, as many to each key, one key's
   after the other's. Beside it fetches `next`. */
#define SCORES(count) \
    static inline __attribute__((always_inline)) vec scores##count( \
        const vec *query, const float *keys, const float *next \
    )
#define FOLDED(half) \
    { \
        vec x = scores##half(query, keys, next); \
        return fold(x, scores##half(query, keys + half * HEAD, next ? next + half * HEAD : 0)); \
    }
SCORES(1) {
    const vec *key = (const vec *)keys;
    if (next) fetch(next);
    vec products = {0}; /* or with heads of 16 the product alone were fused with what follows */
    for (int i = 0; i < VECTORS; i++) products += query[i] * key[i];
    return products;
}
SCORES(2) FOLDED(1)
SCORES(4) FOLDED(2)
SCORES(8) FOLDED(4)
SCORES(16) FOLDED(8)
#define SCORES_OF(count) JOINED(scores, count)
#define JOINED(name, count) name##count

/* Adds a block's values [KEYS, HEAD] from `from` to `to`, by the weights of `count` queries. Beside
   it fetches `next`, up to `ahead` rows. */
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
   softmax keeps a running maximum and sum (arXiv 1805.02867). Up to LANES - 1 keys around those that
   count are read, and do not. While keys are read their values are fetched, and then the next keys:
   more at a time would wait for each other. */
static inline __attribute__((always_inline)) void attend(
    const int rows, int64_t used, const float *q, int64_t q_step, const float *keys,
    const float *values, int64_t position, int64_t window, float scale, float *y, int64_t y_step
) {
    vec query[TILE * GROUP][VECTORS], made[TILE * GROUP][VECTORS], total[TILE * GROUP];
    float most[TILE * GROUP], weight[TILE * GROUP][KEYS];
    vec numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    for (int n = 0; n < rows * GROUP; n++) {
        int64_t row = n / GROUP < used ? n / GROUP : used - 1;
        memcpy(query[n], q + row * q_step + n % GROUP * HEAD, sizeof *query);
        for (int i = 0; i < VECTORS; i++) query[n][i] *= scale, made[n][i] = (vec){0};
        most[n] = -INFINITY, total[n] = (vec){0};
    }
    memset(weight, 0, rows * GROUP * sizeof *weight);

    int64_t end = position + used, begin = window >= 0 && position > window ? position - window : 0;
    for (int64_t block = begin / KEYS * KEYS; block < end; block += KEYS) {
        int from = begin > block ? begin - block : 0, to = end - block < KEYS ? end - block : KEYS;
        for (int j = from / LANES * LANES; j < to; j += LANES) {
            int64_t at = (block + j) * HEAD;
            *(vec *)(*weight + j) = SCORES_OF(LANES)(*query, keys + at, values + at);
            for (int n = 1; n < rows * GROUP; n++)
                *(vec *)(weight[n] + j) = SCORES_OF(LANES)(query[n], keys + at, 0);
        }
        for (int n = 0; n < rows * GROUP; n++) {
            int64_t at = position + (n / GROUP < used ? n / GROUP : used - 1) - block;
            float first = window >= 0 && at > window ? at - window : 0, last = at < KEYS ? at : KEYS - 1;
            vec *w = (vec *)weight[n], sums = {0};
            if (first > last) {
                memset(w, 0, sizeof *weight);
                continue;
            }
#define SEEN(i, x, y) \
    less(numbers + 1.0f * i * LANES, ALL(first), y, less(ALL(last), numbers + 1.0f * i * LANES, y, x))
            vec highest = ALL(most[n]);
            for (int i = 0; i < KEYS / LANES; i++) {
                w[i] = SEEN(i, w[i], ALL(-INFINITY));
                highest = less(highest, w[i], w[i], highest);
            }
            float before = most[n];
            most[n] = largest(highest);
            for (int i = 0; i < KEYS / LANES; i++) {
                w[i] = SEEN(i, exp_negative(w[i] - most[n]), (vec){0});
                sums += w[i];
            }
            float fade = exp_negative(ALL(before - most[n]))[0];
            total[n] = total[n] * fade + sums;
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
        float all = sum(total[n]);
        for (int i = 0; i < VECTORS; i++) made[n][i] /= all;
        memcpy(y + n / GROUP * y_step + n % GROUP * HEAD, made[n], sizeof *made);
    }
}

/* Rows k and v [rows, heads, HEAD], `step` floats from row to row, to their places in keys and
   values [slots, heads, length, HEAD], where length is a multiple of LANES; then attention of q
   [rows, heads * GROUP, HEAD] into y, over at most `window` tokens before their own unless it is
   < 0. Rows from tiles[t] on to before tiles[t + 1], TILE at most, follow each other in one slot.
   All of a head come together, so that a prompt's tiles find its keys in the cache. */
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
            int64_t t = item % count, h = item / count, r = tiles[t], used = tiles[t + 1] - r;
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
            half *first = (half *)(x + r * step + h * HEAD), *second = first + HEAD / 2 / HALF;
            const half *c = (const half *)(cos + r * HEAD / 2);
            const half *s = (const half *)(sin + r * HEAD / 2);
            half squares = {0};
            for (int i = 0; i < HEAD / 2 / HALF; i++) {
                half a = first[i] * c[i] + second[i] * s[i], b = second[i] * c[i] - first[i] * s[i];
                first[i] = a, second[i] = b;
                squares += a * a + b * b;
            }
            float scale = 1 / sqrtf(sum_half(squares) / HEAD + eps);
            for (int i = 0; i < HEAD / HALF; i++) first[i] *= scale;
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

static inline vec capped(vec x, float cap) {
    vec t = exp_negative(less(x, -x, -x, x) * (-2 / cap)), y = (1 - t) / (1 + t) * cap;
    return less(x, (vec){0}, -y, y);
}

/* cap * tanh(x / cap) of x [count], in place; 2e-7 of cap. */
void softcap(float *x, int64_t count, float cap, int threads) {
    int64_t whole = count / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < whole; i += LANES) *(vec *)(x + i) = capped(*(vec *)(x + i), cap);
    vec rest = {0};
    memcpy(&rest, x + whole, (count - whole) * sizeof *x);
    rest = capped(rest, cap);
    memcpy(x + whole, &rest, (count - whole) * sizeof *x);
}

/* The instructions that this was compiled for. */
const char *kernel_level(void) { return LEVEL; }
