/* How many floats the processor's registers hold, and a vector of as many. */

#if defined(__AVX512F__)
#define REGISTER 16
#elif defined(__AVX__)
#define REGISTER 8
#else
#define REGISTER 4
#endif
typedef float reg __attribute__((vector_size(4 * REGISTER), aligned(4), may_alias));
