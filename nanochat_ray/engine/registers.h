/* How many floats the processor's registers hold, a vector of as many, and the name of that level
   of instructions. */

#if defined(__AVX512F__)
#define REGISTER 16
#define LEVEL "avx512"
#elif defined(__AVX2__)
#define REGISTER 8
#define LEVEL "avx2"
#elif defined(__AVX__)
#define REGISTER 8
#define LEVEL "avx"
#else
#define REGISTER 4
#if defined(__ARM_NEON)
#define LEVEL "neon"
#elif defined(__SSE2__)
#define LEVEL "sse2"
#else
#define LEVEL "generic"
#endif
#endif
typedef float reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
