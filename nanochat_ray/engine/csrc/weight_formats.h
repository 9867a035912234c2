/* The formats of a packed weight: of each a microkernel, and how it wants the rows of x.

   A panel has PANEL_WIDTH outputs and `depth` inputs, and comes in rows of ROW_BYTES, which hold 4 bytes
   of each output: one float32, two bfloat16 (inputs 2k and 2k + 1) or four int8. */

#pragma once

#include <stdint.h>
#include <string.h>

#include "simd.h"

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#define PANEL_WIDTH 32
#define K_BLOCK 64
#define ROW_BYTES (4 * PANEL_WIDTH)
#define CACHE_LINE_BYTES 64
#define PREFETCH_DISTANCE 16 /* panel rows: hardware prefetching stops at the end of a page */
#define ACCUMULATORS (SIMD_WIDTH == 16 ? 28 : 12) /* registers, of 32 and of 16 */
#define MAX_VECTORS (PANEL_WIDTH / SIMD_WIDTH)

enum { FP32, BF16 }; /* as `native.WEIGHT_FORMATS` */

ALWAYS_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ALWAYS_INLINE void prefetch_panel_row(const char *row) {
    for (int i = 0; i < ROW_BYTES; i += CACHE_LINE_BYTES)
        __builtin_prefetch(row + PREFETCH_DISTANCE * ROW_BYTES + i);
}

/* The parameters of a microkernel: `rows` rows of x, x_stride bytes apart, times `vectors` registers'
   width of a panel from w on. The sums stay in registers over all inputs, and then go to y, whose rows
   are y_stride floats apart. */
#define MICROKERNEL(name) \
    ALWAYS_INLINE void name( \
        const int rows, const int vectors, const char *x, int64_t x_stride, int64_t inputs, \
        const char *w, float *y, int64_t y_stride \
    )
#define STORE_SUMS \
    for (int r = 0; r < rows; r++) memcpy(y + r * y_stride, sums + r * vectors, vectors * sizeof(vec));

/* float32: x as it is. */
MICROKERNEL(multiply_fp32) {
    vec sums[ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < inputs; k++, w += ROW_BYTES) {
        prefetch_panel_row(w);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vectors; i++)
                sums[r * vectors + i] += *(const float *)(x + r * x_stride + 4 * k) * ((const vec *)w)[i];
    }
    STORE_SUMS
}

/* bfloat16: x is rounded to bfloat16 too, and products are exact in float32. Without instructions for
   dot products of bfloat16, x is stored as float32, and a weight becomes one by a shift or a mask. */
#ifdef __AVX512BF16__
typedef uint16_t Bf16Input;
#else
typedef float Bf16Input;
#endif

/* Rounds to nearest, ties to even; not a number stays so. */
ALWAYS_INLINE uint32_t round_to_bf16(float x) {
    uint32_t bits = float_bits(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000 : 0x7fc00000;
}

static void convert_rows_bf16(
    const float *x, int64_t rows, int64_t inputs, int64_t depth, Bf16Input *out
) {
    for (int64_t r = 0; r < rows; r++, x += inputs, out += depth) {
        for (int64_t k = 0; k < inputs; k++) {
            uint32_t bits = round_to_bf16(x[k]);
#ifdef __AVX512BF16__
            out[k] = bits >> 16;
#else
            memcpy(out + k, &bits, sizeof bits);
#endif
        }
        memset(out + inputs, 0, (depth - inputs) * sizeof *out);
    }
}

MICROKERNEL(multiply_bf16) {
    vec sums[ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < (inputs + 1) / 2; k++, w += ROW_BYTES) {
        prefetch_panel_row(w);
        const unaligned_ivec *pairs = (const unaligned_ivec *)w;
#ifdef __AVX512BF16__
        for (int r = 0; r < rows; r++) {
            const Bf16Input *inputs_of_row = (const Bf16Input *)(x + r * x_stride) + 2 * k;
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const may_alias_int *)inputs_of_row);
            for (int i = 0; i < vectors; i++) {
                __m512 *sum = (__m512 *)(sums + r * vectors + i);
                *sum = _mm512_dpbf16_ps(*sum, pair, (__m512bh)pairs[i]);
            }
        }
#else
        /* One input after the other: fewer registers. */
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vectors; i++)
                sums[r * vectors + i] +=
                    ((const float *)(x + r * x_stride))[2 * k] * (vec)(pairs[i] << 16);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vectors; i++)
                sums[r * vectors + i] += ((const float *)(x + r * x_stride))[2 * k + 1] *
                                         (vec)(pairs[i] & (int)0xffff0000);
#endif
    }
    STORE_SUMS
}
