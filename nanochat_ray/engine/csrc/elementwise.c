/* Row-wise and elementwise operations of a CPU engine, each one pass over memory. A row's result
   depends on that row alone.

   Compile-time constant: HEAD_DIM, a multiple of 16. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simd.h"
#include "vector_math.h"

/* Rotary embedding by cos and sin [tokens, HEAD_DIM / 2], then RMSNorm, of x [tokens, heads, HEAD_DIM]
   in place; `stride` floats from token to token. */
void rotary_qk_norm(
    float *x, int64_t stride, const float *cos, const float *sin, int64_t tokens, int64_t heads,
    float eps, int threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < tokens; r++)
        for (int64_t h = 0; h < heads; h++) {
            half_vec *first = (half_vec *)(x + r * stride + h * HEAD_DIM);
            half_vec *second = first + HEAD_DIM / 2 / HALF_WIDTH;
            const half_vec *c = (const half_vec *)(cos + r * HEAD_DIM / 2);
            const half_vec *s = (const half_vec *)(sin + r * HEAD_DIM / 2);
            half_vec squares = {0};
            for (int i = 0; i < HEAD_DIM / 2 / HALF_WIDTH; i++) {
                half_vec a = first[i] * c[i] + second[i] * s[i];
                half_vec b = second[i] * c[i] - first[i] * s[i];
                first[i] = a, second[i] = b;
                squares += a * a + b * b;
            }
            float scale = 1 / sqrtf(sum_half_lanes(squares) / HEAD_DIM + eps);
            for (int i = 0; i < HEAD_DIM / HALF_WIDTH; i++) first[i] *= scale;
        }
}

/* RMSNorm of x [rows, width] into y. */
void rms_norm(const float *x, float *y, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 8)
    for (int64_t r = 0; r < rows; r++) {
        const float *x_row = x + r * width;
        float *y_row = y + r * width, rest = 0;
        vec squares = {0};
        int64_t i = 0;
        for (; i + SIMD_WIDTH <= width; i += SIMD_WIDTH)
            squares += *(vec *)(x_row + i) * *(vec *)(x_row + i);
        for (; i < width; i++) rest += x_row[i] * x_row[i];
        float scale = 1 / sqrtf((sum_lanes(squares) + rest) / width + eps);
        for (i = 0; i < width; i++) y_row[i] = x_row[i] * scale;
    }
}

/* max(x, 0)^2 of x [count], in place. */
void relu_squared(float *x, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
}

static inline vec softcap_vec(vec x, float cap) {
    vec t = exp_negative(select_less(x, -x, -x, x) * (-2 / cap)), y = (1 - t) / (1 + t) * cap;
    return select_less(x, (vec){0}, -y, y);
}

/* cap * tanh(x / cap) of x [count], in place, with an error of 2e-7 * cap. */
void softcap(float *x, int64_t count, float cap, int threads) {
    int64_t full = count / SIMD_WIDTH * SIMD_WIDTH;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < full; i += SIMD_WIDTH)
        *(vec *)(x + i) = softcap_vec(*(vec *)(x + i), cap);
    vec rest = {0};
    memcpy(&rest, x + full, (count - full) * sizeof *x);
    rest = softcap_vec(rest, cap);
    memcpy(x + full, &rest, (count - full) * sizeof *x);
}

/* The level of instructions that this was compiled for. */
const char *isa_name(void) { return ISA_NAME; }
