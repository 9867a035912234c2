/* Vectors of the widest registers that the compiler may use, operations on them that C has no
   operator for, the name of that level of instructions (of `kernels.LEVELS`), and the number of the
   current thread. */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define SIMD_WIDTH 16 /* floats */
#elif defined(__AVX__)
#define SIMD_WIDTH 8
#else
#define SIMD_WIDTH 4
#endif

/* gcc's name of AMX with bfloat16, or clang's. */
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && !defined(WITHOUT_AMX)
#define HAVE_AMX
#define ISA_NAME "amx"
#elif defined(__AVX512BF16__)
#define ISA_NAME "avx512_bf16"
#elif defined(__AVX512F__)
#define ISA_NAME "avx512"
#elif defined(__AVXVNNI__)
#define ISA_NAME "avx_vnni"
#elif defined(__AVX2__)
#define ISA_NAME "avx2"
#else
#define ISA_NAME "generic"
#endif

#ifdef _OPENMP
int omp_get_thread_num(void);
#define THREAD_ID omp_get_thread_num()
#else
#define THREAD_ID 0
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define BROADCAST(x) ((vec){0} + (x))
#define ADD(a, b) ((a) + (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(4 * SIMD_WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * SIMD_WIDTH)));
typedef ivec unaligned_ivec __attribute__((aligned(4), may_alias));
typedef int32_t may_alias_int __attribute__((may_alias));

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

typedef union {
    float number;
    uint32_t bits;
} FloatBits;

ALWAYS_INLINE uint32_t float_bits(float x) { return (FloatBits){.number = x}.bits; }
ALWAYS_INLINE float bits_float(uint32_t bits) { return (FloatBits){.bits = bits}.number; }

/* Rounds to nearest, ties to even; not a number stays so. */
ALWAYS_INLINE uint32_t round_to_bf16(float x) {
    uint32_t bits = float_bits(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000 : 0x7fc00000;
}
