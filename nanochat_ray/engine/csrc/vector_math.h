/* Operations on numbers and vectors that C has no operator for. */

#pragma once

#include <string.h>

#include "simd.h"

/* At most 8 floats: half a head of 16 is one. */
#define HALF_WIDTH (SIMD_WIDTH < 8 ? SIMD_WIDTH : 8)
typedef float half_vec __attribute__((vector_size(4 * HALF_WIDTH), aligned(4), may_alias));

#define BROADCAST(x) ((vec){0} + (x))

/* Lane by lane: a where x < y, else b. */
static inline vec select_less(vec x, vec y, vec a, vec b) {
    ivec is_less = x < y;
    return (vec)(((ivec)a & is_less) | ((ivec)b & ~is_less));
}

/* Combines the upper half of the lanes with the lower half, until one lane is left. */
#define REDUCE_LANES(x, width, combine) \
    union { __typeof__(x) all; __typeof__((x)[0]) lane[width]; } u = {x}; \
    for (int half = width / 2; half; half /= 2) \
        for (int i = 0; i < half; i++) u.lane[i] = combine(u.lane[i], u.lane[i + half]); \
    return u.lane[0];
#define ADD(a, b) ((a) + (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static inline float sum_half_lanes(half_vec x) { REDUCE_LANES(x, HALF_WIDTH, ADD) }
static inline float sum_lanes(vec x) { REDUCE_LANES(x, SIMD_WIDTH, ADD) }
static inline float max_lanes(vec x) { REDUCE_LANES(x, SIMD_WIDTH, MAX) }

/* exp(x) for x <= 0, with a relative error of 1e-7: a power of two times a polynomial, as in Cephes
   (S. Moshier). A float32 near 3 << 22 has no fraction bits, so that adding this number rounds to a
   whole number, which then stands in the lowest bits. */
static inline vec exp_negative(vec x) {
    x = select_less(x, BROADCAST(-87), BROADCAST(-87), x);
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((ivec)shifted + 127) << 23);
}

typedef uint16_t half_words __attribute__((vector_size(2 * SIMD_WIDTH), aligned(2), may_alias));

ALWAYS_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ALWAYS_INLINE float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Rounds to nearest, ties to even; not a number stays so. */
ALWAYS_INLINE uint32_t round_to_bf16(float x) {
    uint32_t bits = float_bits(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000 : 0x7fc00000;
}

/* SIMD_WIDTH bfloat16 as float32. */
ALWAYS_INLINE vec widen_bf16(const uint16_t *x) {
    return (vec)(__builtin_convertvector(*(const half_words *)x, ivec) << 16);
}
