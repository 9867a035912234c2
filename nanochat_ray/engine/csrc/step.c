/* A forward as one call: a plan of operations, which `step_plan.py` writes once. Each operation
   rounds its results to memory, so the bits are those of the same operations called one by one. A
   row's results depend on that row alone.

   Compile-time constant: HEAD_DIM, a multiple of 16. */

#include <math.h>

#include "plan.h"

/* At most 8 floats: half a head of 16 is one. */
#define HALF_WIDTH MIN(SIMD_WIDTH, 8)
#define HALF_VECTORS (HEAD_DIM / 2 / HALF_WIDTH)
typedef float half_vec __attribute__((vector_size(4 * HALF_WIDTH), aligned(4), may_alias));
static inline float sum_half_lanes(half_vec x) { REDUCE_LANES(x, HALF_WIDTH, ADD) }

/* Entry i of a table. */
static float read_number(const void *table, int64_t format, int64_t i) {
    if (format == FLOAT32) return ((const float *)table)[i];
    return bits_float((uint32_t)((const uint16_t *)table)[i] << 16);
}

static void gather(const Operation *op, int64_t from, float *y) {
    const int64_t first = MAX(from, 0) * op->x_stride;
    for (int64_t i = 0; i < op->width; i++) y[i] = read_number(op->x, op->format, first + i);
}

static void rms_norm(const float *x, float *y, int64_t width, float eps) {
    float rest = 0;
    vec squares = {0};
    int64_t i = 0;
    for (; i + SIMD_WIDTH <= width; i += SIMD_WIDTH) squares += *(vec *)(x + i) * *(vec *)(x + i);
    for (; i < width; i++) rest += x[i] * x[i];
    float scale = 1 / sqrtf((sum_lanes(squares) + rest) / width + eps);
    for (i = 0; i < width; i++) y[i] = x[i] * scale;
}

/* Rotary embedding, then RMSNorm, of heads [heads, HEAD_DIM] in place. */
static void rotary_qk_norm(const float *cos, const float *sin, float *y, int64_t heads, float eps) {
    const half_vec *c = (const half_vec *)cos, *s = (const half_vec *)sin;
    for (int64_t h = 0; h < heads; h++) {
        half_vec *first = (half_vec *)(y + h * HEAD_DIM), *second = first + HALF_VECTORS;
        half_vec squares = {0};
        for (int i = 0; i < HALF_VECTORS; i++) {
            half_vec a = first[i] * c[i] + second[i] * s[i];
            half_vec b = second[i] * c[i] - first[i] * s[i];
            first[i] = a, second[i] = b;
            squares += a * a + b * b;
        }
        float scale = 1 / sqrtf(sum_half_lanes(squares) / HEAD_DIM + eps);
        for (int i = 0; i < 2 * HALF_VECTORS; i++) first[i] *= scale;
    }
}

static inline vec softcap_vec(vec x, float cap) {
    vec t = exp_negative(select_less(x, -x, -x, x) * (-2 / cap)), y = (1 - t) / (1 + t) * cap;
    return select_less(x, (vec){0}, -y, y);
}

/* cap * tanh(y / cap) in place, with an error of 2e-7 * cap. */
static void softcap(float *y, int64_t count, float cap) {
    int64_t i = 0;
    for (; i + SIMD_WIDTH <= count; i += SIMD_WIDTH)
        *(vec *)(y + i) = softcap_vec(*(vec *)(y + i), cap);
    for (; i < count; i++) y[i] = softcap_vec(BROADCAST(y[i]), cap)[0];
}

/* 1 / (1 + exp(-x)), without overflow. */
static __attribute__((noinline)) float sigmoid(float x) {
    vec e = exp_negative(BROADCAST(x < 0 ? x : -x));
    return (x < 0 ? e[0] : 1) / (1 + e[0]);
}

/* y = (factor * sigmoid(gate)) * x for each of `count` heads of row r. */
static void gate_heads(
    const Operation *op, const Step *step, int64_t r, float factor, const float *gates,
    const float *x, float *y
) {
    for (int64_t h = 0; h < op->count; h++) {
        volatile float gate = sigmoid(gates[h]);
        /* No share of a token before the start of a sequence or of a document. */
        if (op->extra && (step->indices[PREVIOUS][r] < 0 ||
                          step->indices[IDS][r] == step->document_start))
            gate = 0;
        gate *= factor;
        for (int64_t i = 0; i < op->width; i++) y[h * op->width + i] = gate * x[h * op->width + i];
    }
}

/* An operation on each row by itself. */
static void run_rows(const Operation *op, const Step *step, int64_t rows) {
    const float factor = op->value * (op->factor ? read_number(op->factor, op->format, 0) : 1);
    float *const output = op->y ? op->y : step->logits;
#pragma omp parallel for num_threads(step->threads) if (step->threads > 1 && rows > 8)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = (const float *)op->x + r * op->x_stride;
        const float *weight = (const float *)op->weight + r * op->weight_stride;
        float *y = output + r * op->y_stride;
        switch (op->kind) {
            case GATHER: gather(op, step->indices[op->extra][r], y); break;
            case RMS_NORM: rms_norm(x, y, op->width, op->value); break;
            case ROTARY: rotary_qk_norm(x, weight, y, op->count, op->value); break;
            case SOFTCAP: softcap(y, op->width, op->value); break;
            case GATE: gate_heads(op, step, r, factor, weight, x, y); break;
            case RELU_SQUARED:
                for (int64_t i = 0; i < op->width; i++) y[i] = x[i] > 0 ? x[i] * x[i] : 0;
                break;
            case ADD:
                for (int64_t i = 0; i < op->width; i++) y[i] += x[i];
                break;
            case SCALE:
                for (int64_t i = 0; i < op->width; i++) y[i] = factor * x[i];
        }
    }
}

/* Runs a plan. From the gather of the rows that need logits on, there are only those. */
void run_step(const Operation *operations, int64_t count, const Step *step) {
    int64_t rows = step->rows;
    for (const Operation *op = operations; op < operations + count && rows; op++) {
        if (op->kind == GATHER && op->extra == LOGITS) rows = step->num_logits;
        if (op->kind == LINEAR)
            linear(op, step, rows);
        else if (op->kind == ATTENTION) slot_attention(op, step);
        else run_rows(op, step, rows);
    }
}

/* The level of instructions that this was compiled for. */
const char *isa_name(void) { return ISA_NAME; }
