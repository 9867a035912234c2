/* Vector types of the widest registers that the compiler may use, the name of that level of instructions
   (of `kernels.LEVELS`; "amx" is `amx_available`), and the number of the current thread. */

#pragma once

#include <stdint.h>

#if defined(__AVX512F__)
#define SIMD_WIDTH 16 /* floats */
#elif defined(__AVX__)
#define SIMD_WIDTH 8
#else
#define SIMD_WIDTH 4
#endif

#if defined(__AVX512BF16__)
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

typedef float vec __attribute__((vector_size(4 * SIMD_WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * SIMD_WIDTH)));
typedef ivec unaligned_ivec __attribute__((aligned(4), may_alias));
typedef int32_t may_alias_int __attribute__((may_alias));
