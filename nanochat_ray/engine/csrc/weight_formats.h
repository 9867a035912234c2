/* The formats of a packed weight: of each a microkernel, and how it wants the rows of x.

   A panel has PANEL_WIDTH outputs and `depth` inputs, and comes in rows of ROW_BYTES, which hold 4 bytes
   of each output: one float32, two bfloat16 (inputs 2k and 2k + 1) or four int8. In INT8, rows of
   INT8_BLOCK inputs are followed by one bfloat16 scale of each output. */

#pragma once

#include <stdint.h>
#include <string.h>

#include "simd.h"
#include "vector_math.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAVE_VNNI
#endif
#if defined(__AVX512BF16__) || defined(HAVE_VNNI)
#include <immintrin.h>
#endif

#define PANEL_WIDTH 32
#define K_BLOCK 64
#define ROW_BYTES (4 * PANEL_WIDTH)
#define CACHE_LINE_BYTES 64
#define INT8_BLOCK 32
#define INT8_ROWS (INT8_BLOCK / 4) /* panel rows of a block */
#define INT8_BLOCK_BYTES (INT8_ROWS * ROW_BYTES + 2 * PANEL_WIDTH)
#define PREFETCH_DISTANCE 64 /* panel rows: hardware prefetching stops at the end of a page */
#define ACCUMULATORS (SIMD_WIDTH == 16 ? 28 : 12) /* registers, of 32 and of 16 */
/* The same in INT8, which has sums of a block beside those of all. */
#define INT8_ACCUMULATORS (SIMD_WIDTH == 16 ? 12 : 6)
#define MAX_VECTORS (PANEL_WIDTH / SIMD_WIDTH)

enum { FP32, BF16, INT8 }; /* as `native.WEIGHT_FORMATS` */

ALWAYS_INLINE void prefetch_panel_row(const char *row) {
    for (int i = 0; i < ROW_BYTES; i += CACHE_LINE_BYTES)
        __builtin_prefetch(row + PREFETCH_DISTANCE * ROW_BYTES + i);
}

/* The parameters of a microkernel: `rows` rows of x, x_stride bytes apart, times `vectors` registers'
   width of the panel w, from the output `first` on. The sums stay in registers over all inputs, and
   then go to y, whose rows are y_stride floats apart. */
#define MICROKERNEL(name) \
    ALWAYS_INLINE void name( \
        const int rows, const int vectors, const char *x, int64_t x_stride, int64_t inputs, \
        const char *w, int64_t first, float *y, int64_t y_stride \
    )
#define STORE_SUMS \
    for (int r = 0; r < rows; r++) memcpy(y + r * y_stride, sums + r * vectors, vectors * sizeof(vec));

/* float32: x as it is. */
MICROKERNEL(multiply_fp32) {
    vec sums[ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    w += 4 * first;
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
#define TO_BF16_INPUT(x) (round_to_bf16(x) >> 16)
#else
typedef float Bf16Input;
#define TO_BF16_INPUT(x) bits_float(round_to_bf16(x))
#endif

static void convert_rows_bf16(
    const float *x, int64_t rows, int64_t inputs, int64_t depth, Bf16Input *out
) {
    for (int64_t r = 0; r < rows; r++, x += inputs, out += depth) {
        for (int64_t k = 0; k < inputs; k++) out[k] = TO_BF16_INPUT(x[k]);
        memset(out + inputs, 0, (depth - inputs) * sizeof *out);
    }
}

MICROKERNEL(multiply_bf16) {
    vec sums[ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    w += 4 * first;
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

/* int8, as in llama.cpp's Q8_0: INT8_BLOCK inputs of an output, or of a row of x, are whole numbers up to
   127 times one scale. Sums of a block are exact, in any order. Weights are stored as whole number + 128,
   since VNNI multiplies unsigned bytes with signed ones: `offset` is -128 times the block's sum of x.
   Without VNNI the whole numbers of x are floats: a block's sums are below 2^24 and exact in them. */
#ifdef HAVE_VNNI
typedef struct {
    float scale;
    int32_t offset;
    int8_t values[INT8_BLOCK];
} Int8Input;
typedef ivec BlockSum;
#else
typedef struct {
    float scale, offset, values[INT8_BLOCK];
} Int8Input;
typedef vec BlockSum;
#endif

static void convert_block_int8(const float *x, Int8Input *out) {
    uint32_t largest = 0; /* as bits, of which those of not a number are the largest */
    for (int i = 0; i < INT8_BLOCK; i++) {
        uint32_t bits = float_bits(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    const float magnitude = bits_float(largest);
    const float inverse = magnitude > 0 ? 127 / magnitude : 0;
    int sum = 0;
    for (int i = 0; i < INT8_BLOCK; i++) {
        /* Rounds: see exp_negative in vector_math.h. */
        int8_t value = float_bits(x[i] * inverse + 12582912.0f) - 0x4b400000;
        out->values[i] = value;
        sum += value;
    }
    out->scale = magnitude / 127;
    out->offset = -128 * sum;
}

static void convert_rows_int8(
    const float *x, int64_t rows, int64_t inputs, int64_t depth, Int8Input *out
) {
    for (int64_t r = 0; r < rows; r++, x += inputs)
        for (int64_t k = 0; k < depth; k += INT8_BLOCK) {
            float block[INT8_BLOCK] = {0};
            if (k < inputs)
                memcpy(block, x + k, 4 * (inputs - k < INT8_BLOCK ? inputs - k : INT8_BLOCK));
            convert_block_int8(block, out++);
        }
}

/* Adds the products of 4 inputs to the sums of a block. */
ALWAYS_INLINE BlockSum add_quad(BlockSum sum, ivec weights, const void *quad) {
#if defined(__AVX512VNNI__) && SIMD_WIDTH == 16
    const __m512i inputs = _mm512_set1_epi32(*(const may_alias_int *)quad);
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, inputs);
#elif defined(HAVE_VNNI)
    const __m256i inputs = _mm256_set1_epi32(*(const may_alias_int *)quad);
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, inputs);
#else
    for (int i = 0; i < 4; i++)
        sum += ((const float *)quad)[i] * __builtin_convertvector(weights >> 8 * i & 255, vec);
    return sum;
#endif
}

MICROKERNEL(multiply_int8) {
    vec sums[INT8_ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < inputs; k += INT8_BLOCK, x += sizeof(Int8Input)) {
        BlockSum block_sums[INT8_ACCUMULATORS];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vectors; i++)
                block_sums[r * vectors + i] =
                    (BlockSum){0} + ((const Int8Input *)(x + r * x_stride))->offset;
        for (int j = 0; j < INT8_ROWS; j++, w += ROW_BYTES) {
            const unaligned_ivec *weights = (const unaligned_ivec *)(w + 4 * first);
            prefetch_panel_row(w);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < vectors; i++) {
                    BlockSum *sum = block_sums + r * vectors + i;
                    const Int8Input *input = (const Int8Input *)(x + r * x_stride);
                    *sum = add_quad(*sum, weights[i], input->values + 4 * j);
                }
        }
        __builtin_prefetch(w + PREFETCH_DISTANCE * ROW_BYTES);
        for (int i = 0; i < vectors; i++) {
            /* The scales of outputs j and j + PANEL_WIDTH / 2 are a pair. */
            const int64_t output = first + i * SIMD_WIDTH, pair = output % (PANEL_WIDTH / 2);
            const ivec pairs = *(const unaligned_ivec *)(w + 4 * pair);
            const vec scales = (vec)(output == pair ? pairs << 16 : pairs & (int)0xffff0000);
            for (int r = 0; r < rows; r++)
                sums[r * vectors + i] += __builtin_convertvector(block_sums[r * vectors + i], vec) *
                                         scales * ((const Int8Input *)(x + r * x_stride))->scale;
        }
        w += INT8_BLOCK_BYTES - INT8_ROWS * ROW_BYTES;
    }
    STORE_SUMS
}
