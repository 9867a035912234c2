/* A plan of operations over buffers whose addresses stay, as `plan_operations.py` writes it. */

#pragma once

#include "simd.h"

enum { GATHER, RMS_NORM, LINEAR, ROTARY, ATTENTION, RELU_SQUARED, SOFTCAP, ADD, SCALE, GATE };
enum { FLOAT32, BFLOAT16 }; /* of a table */

/* One operation. Of buffers with a stride, `width` floats of each row are used. */
typedef struct {
    int64_t kind;
    const void *x; /* input. ROTARY: cosines; ATTENTION: queries, then keys and values of a row */
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

/* The tokens of a step. Tile t of attention has those from tile_starts[t] on, up to before
   tile_starts[t + 1]: consecutive tokens of one slot, at most TILE_TOKENS. */
typedef struct {
    const int64_t *indices[NUM_INDICES]; /* ids, previous ids (-1: none), positions, logits rows */
    const int64_t *slots, *tile_starts;
    int64_t rows, num_logits, tiles, document_start; /* -1: no such token */
    int64_t kv_length;
    float attention_scale;
    float *logits;
    void *scratch; /* of `linear` */
    int64_t threads;
} Step;

void linear(const Operation *, const Step *, int64_t rows);
void slot_attention(const Operation *, const Step *);
