/* Vector types of the widest registers that the compiler may use, and the name of that level of
   instructions. */

#pragma once

#include <stdint.h>

#if defined(__AVX512F__)
#define SIMD_WIDTH 16 /* floats */
#ifdef __AVX512BF16__
#define ISA_NAME "avx512_bf16"
#else
#define ISA_NAME "avx512"
#endif
#elif defined(__AVX2__)
#define SIMD_WIDTH 8
#ifdef __AVXVNNI__
#define ISA_NAME "avx_vnni"
#else
#define ISA_NAME "avx2"
#endif
#elif defined(__AVX__)
#define SIMD_WIDTH 8
#define ISA_NAME "avx"
#else
#define SIMD_WIDTH 4
#if defined(__ARM_NEON)
#define ISA_NAME "neon"
#elif defined(__SSE2__)
#define ISA_NAME "sse2"
#else
#define ISA_NAME "generic"
#endif
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * SIMD_WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * SIMD_WIDTH)));
typedef ivec unaligned_ivec __attribute__((aligned(4), may_alias));
typedef int32_t may_alias_int __attribute__((may_alias));
