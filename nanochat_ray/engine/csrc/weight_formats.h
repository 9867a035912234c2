/* The formats of a packed weight: how each wants the rows of x, and the microkernel.

   A panel has PANEL_WIDTH outputs and `depth` inputs, and comes in rows of ROW_BYTES, which hold 4
   bytes of each output: one float32, two bfloat16 (inputs 2k and 2k + 1) or four int8. In INT8,
   rows of INT8_BLOCK inputs are followed by one bfloat16 scale of each output.

   The inputs of a panel row are 4 bytes of x where the processor has dot products of their format.
   Elsewhere each is a float32, and is multiplied with weights that become float32 in registers. */

#pragma once

#include "simd.h"

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

enum { FP32, BF16, INT8 }; /* as `native.WEIGHT_FORMATS` */

#define ACCUMULATORS (SIMD_WIDTH == 16 ? 28 : 12) /* registers, of 32 and of 16 */
/* The same in INT8, which has sums of a block beside those of all. */
#define INT8_ACCUMULATORS (SIMD_WIDTH == 16 ? 12 : 6)

/* Panels [begin, end) that are yet to be multiplied. */
typedef struct {
    int64_t begin, end;
} WorkRange;

/* A matmul of a batch of rows, as one thread sees it. */
typedef struct {
    const void *x; /* float32, or as the format wants it; rows are x_stride bytes apart */
    const char *weights;
    float *y; /* rows are y_stride floats apart */
    char *scratch;
    int64_t x_stride, y_stride, rows, inputs, depth;
    int64_t tiles, height; /* AMX: x is in `tiles` tiles of `height` rows */
    WorkRange *ranges; /* of all threads */
    int threads;
} Matmul;

/* bfloat16: x is rounded to bfloat16 too, and products are exact in float32. */
#ifdef __AVX512BF16__
typedef uint16_t Bf16Input;
#define TO_BF16_INPUT(x) (round_to_bf16(x) >> 16)
#else
typedef float Bf16Input;
#define TO_BF16_INPUT(x) bits_float(round_to_bf16(x))
#endif

static void convert_row_bf16(const float *x, int64_t inputs, int64_t depth, Bf16Input *out) {
    for (int64_t k = 0; k < inputs; k++) out[k] = TO_BF16_INPUT(x[k]);
    memset(out + inputs, 0, (depth - inputs) * sizeof *out);
}

/* int8, as in llama.cpp's Q8_0: INT8_BLOCK inputs of an output, or of a row of x, are whole numbers
   up to 127 times one scale. Sums of a block are exact, in any order. Weights are stored as whole
   number + 128, since VNNI multiplies unsigned bytes with signed ones: `offset` is -128 times the
   block's sum of x. Without VNNI the whole numbers of x are floats: a block's sums are below 2^24
   and exact in them. */
#ifdef HAVE_VNNI
typedef int8_t Int8Input;
typedef ivec BlockSum;
#else
typedef float Int8Input;
typedef vec BlockSum;
#endif
typedef struct {
    float scale;
    int32_t offset;
    Int8Input values[INT8_BLOCK];
} Int8Block;

static void convert_block_int8(const float *x, Int8Block *out) {
    uint32_t largest = 0; /* as bits, of which those of not a number are the largest */
    for (int i = 0; i < INT8_BLOCK; i++) largest = MAX(largest, float_bits(x[i]) & 0x7fffffff);
    const float magnitude = bits_float(largest);
    const float inverse = magnitude > 0 ? 127 / magnitude : 0;
    int sum = 0;
    for (int i = 0; i < INT8_BLOCK; i++) {
        /* Rounds: see exp_negative in simd.h. */
        int8_t value = float_bits(x[i] * inverse + 12582912.0f) - 0x4b400000;
        out->values[i] = value;
        sum += value;
    }
    out->scale = magnitude / 127;
    out->offset = -128 * sum;
}

static void convert_row_int8(const float *x, int64_t inputs, int64_t depth, Int8Block *out) {
    for (int64_t k = 0; k < depth; k += INT8_BLOCK) {
        float block[INT8_BLOCK] = {0};
        if (k < inputs) memcpy(block, x + k, 4 * MIN(inputs - k, INT8_BLOCK));
        convert_block_int8(block, out++);
    }
}

/* Replaces x, in float32, by what the format wants, in the scratch. */
static void convert_rows(int format, Matmul *m) {
    const int64_t inputs = m->inputs, depth = m->depth;
    const float *x = m->x;
    char *out = m->scratch;
    m->x = out;
    m->x_stride = format == BF16 ? depth * sizeof(Bf16Input)
                                 : depth / INT8_BLOCK * sizeof(Int8Block);
    for (int64_t r = 0; r < m->rows; r++, x += inputs, out += m->x_stride)
        if (format == BF16) convert_row_bf16(x, inputs, depth, (Bf16Input *)out);
        else convert_row_int8(x, inputs, depth, (Int8Block *)out);
}

/* Steps in which a panel row is multiplied, each with 4 bytes of x. */
#define STEPS(format) \
    ((format) == FP32 ? 1 : (format) == BF16 ? 2 * sizeof(Bf16Input) / 4 : sizeof(Int8Input))

/* sum + step i of the products of x with weights. In INT8 sums are those of a block: BlockSum. */
ALWAYS_INLINE vec multiply_add(
    const int format, const int i, vec sum, ivec weights, const char *x
) {
    const int32_t group = *(const may_alias_int *)x;
    const float number = bits_float(group);
    (void)i; /* a dot product is one step */
    if (format == FP32) return sum + number * (vec)weights;
#ifdef __AVX512BF16__
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(group);
    if (format == BF16) return (vec)_mm512_dpbf16_ps((__m512)sum, pair, (__m512bh)weights);
#else
    if (format == BF16) return sum + number * (vec)(i ? weights & (int)0xffff0000 : weights << 16);
#endif
#if defined(__AVX512VNNI__)
    return (vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(group));
#elif defined(HAVE_VNNI)
    return (vec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, _mm256_set1_epi32(group));
#else
    return sum + number * __builtin_convertvector(weights >> 8 * i & 255, vec);
#endif
}

/* Adds the products of `count` panel rows from w on to the sums of `rows` rows of x. */
ALWAYS_INLINE void multiply_panel_rows(
    const int format, const int rows, const int vectors, const char *x, int64_t x_stride,
    const char *w, int64_t count, vec *sums
) {
    for (int64_t k = 0; k < count; k++, w += ROW_BYTES) {
        for (int i = 0; i < ROW_BYTES; i += CACHE_LINE_BYTES)
            __builtin_prefetch(w + PREFETCH_DISTANCE * ROW_BYTES + i);
        for (int i = 0; i < (int)STEPS(format); i++, x += 4)
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < vectors; j++) {
                    vec *sum = sums + r * vectors + j;
                    const ivec weights = ((const unaligned_ivec *)w)[j];
                    *sum = multiply_add(format, i, *sum, weights, x + r * x_stride);
                }
    }
}

/* The same for a block of INT8, with the panel's outputs from `first` on. */
ALWAYS_INLINE void multiply_block(
    const int rows, const int vectors, const char *x, int64_t x_stride, const char *w,
    int64_t first, vec *sums
) {
#define BLOCK(r) ((const Int8Block *)(x + (r) * x_stride))
    vec block_sums[INT8_ACCUMULATORS];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < vectors; j++)
            block_sums[r * vectors + j] =
                (vec)__builtin_convertvector((ivec){0} + BLOCK(r)->offset, BlockSum);
    multiply_panel_rows(INT8, rows, vectors, (const char *)BLOCK(0)->values, x_stride,
                        w + 4 * first, INT8_ROWS, block_sums);
    w += INT8_ROWS * ROW_BYTES;
    __builtin_prefetch(w + PREFETCH_DISTANCE * ROW_BYTES);
    for (int j = 0; j < vectors; j++) {
        /* The scales of outputs n and n + PANEL_WIDTH / 2 are a pair. */
        const int64_t output = first + j * SIMD_WIDTH, pair = output % (PANEL_WIDTH / 2);
        const ivec pairs = *(const unaligned_ivec *)(w + 4 * pair);
        const vec scales = (vec)(output == pair ? pairs << 16 : pairs & (int)0xffff0000);
        for (int r = 0; r < rows; r++) {
            const BlockSum block_sum = (BlockSum)block_sums[r * vectors + j];
            sums[r * vectors + j] +=
                __builtin_convertvector(block_sum, vec) * scales * BLOCK(r)->scale;
        }
    }
}

/* The microkernel: `rows` rows of x from `row` on, times `vectors` registers' width of the panel w,
   from the output `first` on. The sums stay in registers over all inputs, and then go to y, where
   the panel's results begin. */
ALWAYS_INLINE void microkernel(
    const int format, const int rows, const int vectors, const Matmul *m, int64_t row,
    const char *w, int64_t first, float *y
) {
    const int64_t x_stride = m->x_stride, inputs = m->inputs;
    const char *x = (const char *)m->x + row * x_stride;
    vec sums[ACCUMULATORS];
    memset(sums, 0, sizeof sums);
    if (format == INT8)
        for (int64_t k = 0; k < inputs; k += INT8_BLOCK) {
            multiply_block(rows, vectors, x, x_stride, w, first, sums);
            x += sizeof(Int8Block);
            w += INT8_BLOCK_BYTES;
        }
    else
        multiply_panel_rows(format, rows, vectors, x, x_stride, w + 4 * first,
                            format == FP32 ? inputs : (inputs + 1) / 2, sums);
    for (int r = 0; r < rows; r++)
        memcpy(y + (row + r) * m->y_stride + first, sums + r * vectors, vectors * sizeof(vec));
}
