/* bfloat16: the upper half of a float32. */

#pragma once

#include <stdint.h>
#include <string.h>

#include "simd.h"

typedef uint16_t half_words __attribute__((vector_size(2 * SIMD_WIDTH), aligned(2), may_alias));

ALWAYS_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
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
