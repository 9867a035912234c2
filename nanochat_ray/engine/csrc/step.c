/* A forward as one call: a plan of operations, which `step_plan.py` writes once, over buffers whose
   addresses stay. Each operation is that of a kernel of its own, or an elementwise one that rounds every
   result to memory, so the bits are those of the same operations called one by one. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "simd.h"
#include "vector_math.h"

/* The kernels of the other files. */
void linear(int, const float *, const void *, float *, void *, int64_t, int64_t, int64_t, int);
void rms_norm(const float *, float *, int64_t, int64_t, float, int);
void rotary_qk_norm(float *, int64_t, const float *, const float *, int64_t, int64_t, float, int);
void relu_squared(float *, int64_t, int);
void softcap(float *, int64_t, float, int);
void slot_attention(
    const float *, int64_t, const float *, int64_t, const float *, int64_t, void *, void *,
    const int64_t *, const int64_t *, const int64_t *, float *, int64_t, int64_t, int64_t, int64_t,
    int64_t, int, float, int
);

typedef enum { GATHER, RMS_NORM, LINEAR, ROTARY, ATTENTION, RELU_SQUARED, SOFTCAP, ADD, SCALE, GATE } Kind;
typedef enum { FLOAT32, BFLOAT16 } TableFormat;

/* One operation. Of buffers with a stride, `width` floats of each row are used. */
typedef struct {
    int64_t kind;
    const void *x; /* input */
    float *y;      /* output; null: the logits of the step */
    const void *weight; /* ROTARY: sines; ATTENTION: keys; GATE: gates before their sigmoid */
    const void *factor; /* a number in `format`; null: 1. ATTENTION: values */
    int64_t x_stride, y_stride, weight_stride, width;
    int64_t format; /* of the weight of LINEAR, of ATTENTION's keys, else of table and factor */
    int64_t count;  /* of heads, or of the weight's panels */
    int64_t extra;  /* GATHER: index in `Step.indices`; ATTENTION: window; GATE: whether it masks */
    float value;    /* epsilon, cap or a constant factor */
} Operation;

enum { IDS, PREVIOUS, POSITIONS, LOGITS, NUM_INDICES };

/* The tokens of a step. */
typedef struct {
    const int64_t *indices[NUM_INDICES]; /* ids, those before them (-1: none), positions, logits rows */
    const int64_t *slots, *tile_starts;
    int64_t rows, num_logits, tiles, document_start; /* -1: no such token */
    int64_t kv_length;
    float attention_scale;
    float *logits;
    void *scratch; /* of `linear` */
    int64_t threads;
} Step;

/* Entry i of a table. */
static float read_number(const void *table, int64_t format, int64_t i) {
    if (format == FLOAT32) return ((const float *)table)[i];
    union { uint32_t bits; float x; } u = {(uint32_t)((const uint16_t *)table)[i] << 16};
    return u.x;
}

static void gather_row(const Operation *op, int64_t from, float *y) {
    int64_t first = (from < 0 ? 0 : from) * op->x_stride;
    if (op->format == FLOAT32)
        memcpy(y, (const float *)op->x + first, op->width * sizeof *y);
    else
        for (int64_t i = 0; i < op->width; i++) y[i] = read_number(op->x, op->format, first + i);
}

/* 1 / (1 + exp(-x)), without overflow. */
static __attribute__((noinline)) vec sigmoid_vec(vec x) {
    vec e = exp_negative(select_less(x, (vec){0}, x, -x));
    return select_less(x, (vec){0}, e, BROADCAST(1)) / (1 + e);
}

/* sigmoid(x) of x [count], in place. */
void sigmoid(float *x, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] = sigmoid_vec(BROADCAST(x[i]))[0];
}

/* y = (factor * sigmoid(gate)) * x for each of `count` heads of a row. */
static void gate_row(
    const Operation *op, const Step *step, int64_t r, float factor, const float *x, float *y
) {
    const float *gates = (const float *)op->weight + r * op->weight_stride;
    for (int64_t h = 0; h < op->count; h++) {
        volatile float gate = sigmoid_vec(BROADCAST(gates[h]))[0];
        /* No share of a token before the start of a sequence or of a document. */
        if (op->extra && (step->indices[PREVIOUS][r] < 0 ||
                          step->indices[IDS][r] == step->document_start))
            gate = 0;
        gate *= factor;
        for (int64_t i = 0; i < op->width; i++) y[h * op->width + i] = gate * x[h * op->width + i];
    }
}

/* Operations that have no kernel of their own. */
static void run_rows(const Operation *op, const Step *step, int64_t rows) {
    float factor = op->value * (op->factor ? read_number(op->factor, op->format, 0) : 1);
#pragma omp parallel for num_threads(step->threads) if (step->threads > 1 && rows > 16)
    for (int64_t r = 0; r < rows; r++) {
        const float *x = (const float *)op->x + r * op->x_stride;
        float *y = op->y + r * op->y_stride;
        if (op->kind == GATHER) gather_row(op, step->indices[op->extra][r], y);
        if (op->kind == GATE) gate_row(op, step, r, factor, x, y);
        for (int64_t i = 0; op->kind == ADD && i < op->width; i++) y[i] += x[i];
        for (int64_t i = 0; op->kind == SCALE && i < op->width; i++) y[i] = factor * x[i];
    }
}

static void attention(const Operation *op, const Step *step) {
    const float *q = op->x, *k = q + op->width, *v = k + op->count * HEAD_DIM;
    slot_attention(
        q, op->x_stride, k, op->x_stride, v, op->x_stride, (void *)op->weight, (void *)op->factor,
        step->slots, step->indices[POSITIONS], step->tile_starts, op->y, step->tiles, step->rows,
        op->count, step->kv_length, op->extra, op->format == BFLOAT16, step->attention_scale,
        step->threads
    );
}

/* Runs a plan. From the gather of the rows that need logits on, there are only those. */
void run_step(const Operation *operations, int64_t count, const Step *step) {
    const int threads = step->threads;
    int64_t rows = step->rows;
    for (const Operation *op = operations; op < operations + count && rows; op++) {
        float *y = op->y ? op->y : step->logits;
        switch (op->kind) {
            case RMS_NORM: rms_norm(op->x, y, rows, op->width, op->value, threads); break;
            case LINEAR:
                linear(op->format, op->x, op->weight, y, step->scratch, rows, op->width, op->count, threads);
                break;
            case ROTARY:
                rotary_qk_norm(y, op->y_stride, op->x, op->weight, rows, op->count, op->value, threads);
                break;
            case ATTENTION: attention(op, step); break;
            case RELU_SQUARED: relu_squared(y, rows * op->width, threads); break;
            case SOFTCAP: softcap(y, rows * op->width, op->value, threads); break;
            default:
                if (op->kind == GATHER && op->extra == LOGITS) rows = step->num_logits;
                run_rows(op, step, rows);
        }
    }
}
