/* From logits to tokens, as `sampler.py` defines it, for a CPU engine. A row's token depends on
   that row alone. Nothing is sorted: top-k and top-p keep the tokens up to a distance from the likeliest
   one, which is found by bisection.

   V tokens; a token's distance is (largest logit - logit) / temperature, from 0 to infinity, its
   weight exp(-distance). The bits of such floats, seen as integers, have the floats' order. */

#include <math.h>

#include "simd.h"

enum { SAMPLED = 1, TOP_K = 2, TOP_P = 4, MIN_P = 8, PENALTY = 32, BIAS = 64, BAN = 128 };
#define INVALID (-1)
#define INFINITE 0x7f800000   /* the bits of infinity */
#define ZERO_WEIGHT 104       /* exp(-distance) in float32 is 0 from this distance on */
#define ALL_WEIGHT 0x42d00000 /* its bits */
#define FINE_BITS 21          /* of a bisection: among candidates alone */
#define HALF (SIMD_WIDTH / 2) /* doubles of a register */

typedef float half_float __attribute__((vector_size(4 * HALF), aligned(4), may_alias));
typedef int32_t half_int __attribute__((vector_size(4 * HALF), aligned(4), may_alias));
typedef double dvec __attribute__((vector_size(8 * HALF)));

/* Parameters of requests: an entry for each slot. Tables [slots, V] are null until a request needs
   them. */
typedef struct {
    const int64_t *features, *top_k, *seed, *ban_before;
    const double *top_p;
    const float *temperature, *min_p, *penalties; /* repetition, presence, frequency */
    const float *counts, *bias;
    const uint8_t *in_text, *bans;
} SamplingTable;

/* Tokens by ascending id, padded to a multiple of SIMD_WIDTH. */
typedef struct {
    int32_t *distance; /* bits of floats */
    float *weight;
    int32_t *ids;
    int64_t count;
} Candidates;

static inline double sum_doubles(dvec x) { REDUCE_LANES(x, HALF, ADD) }
static inline int32_t sum_integers(ivec x) { REDUCE_LANES(x, SIMD_WIDTH, ADD) }

static inline int any_lane(ivec x) {
    union { ivec all; uint64_t word[HALF]; } u = {x};
    uint64_t any = 0;
    for (int i = 0; i < HALF; i++) any |= u.word[i];
    return any != 0;
}

/* The finaliser of SplitMix64. */
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

/* The logit of a token in the text. Products are stored, so that they are rounded as torch's are,
   not fused with the subtraction. */
static float penalise(float logit, const float *penalties, float count) {
    volatile float scaled = logit > 0 ? logit / penalties[0] : logit * penalties[0];
    volatile float product = penalties[2] * count;
    float rest = scaled - product;
    return count > 0 ? rest - penalties[1] : rest;
}

static inline float add_bias(
    const float *logits, const uint8_t *mask, const float *bias, int64_t token
) {
    return (!mask || mask[token] ? logits[token] : -INFINITY) + (bias ? bias[token] : 0);
}

/* Logits after the mask (may be null), bias, penalties and bans of a row, into `out`. */
static void adjust(
    const float *logits, int64_t V, const SamplingTable *table, int64_t slot, int64_t position,
    const uint8_t *mask, int64_t row, const int64_t (*uncounted)[2], int64_t num_uncounted,
    float *out
) {
    const int64_t features = table->features[slot], first = slot * V;
    const float *bias = features & BIAS ? table->bias + first : 0;
    memcpy(out, logits, V * sizeof *out);
    for (int64_t i = 0; (mask || bias) && i < V; i++) out[i] = add_bias(logits, mask, bias, i);
    if (features & PENALTY) {
        const float *penalties = table->penalties + 3 * slot, *counts = table->counts + first;
        const uint8_t *in_text = table->in_text + first, *end = in_text + V;
        for (const uint8_t *at = in_text; (at = memchr(at, 1, end - at)); at++)
            out[at - in_text] = penalise(out[at - in_text], penalties, counts[at - in_text]);
        for (int64_t n = 0; n < num_uncounted; n++) {
            int64_t token = uncounted[n][1], repeats = 0;
            for (int64_t m = 0; m < num_uncounted; m++)
                repeats += uncounted[m][0] == row && uncounted[m][1] == token;
            if (uncounted[n][0] == row)
                out[token] = penalise(
                    add_bias(logits, mask, bias, token), penalties, counts[token] + repeats
                );
        }
    }
    if (features & BAN && position < table->ban_before[slot]) {
        const uint8_t *bans = table->bans + first;
        int64_t i = 0; /* where a grammar allows only banned tokens, the grammar wins */
        while (i < V && (bans[i] || out[i] == -INFINITY)) i++;
        for (int64_t j = 0; i < V && j < V; j++)
            if (bans[j]) out[j] = -INFINITY;
    }
}

/* The largest logit; NaN if one is NaN. */
static float largest(const float *logits, int64_t padded) {
    vec peak = BROADCAST(-INFINITY);
    ivec is_nan = {0};
    for (int64_t i = 0; i < padded; i += SIMD_WIDTH) {
        vec x = *(vec *)(logits + i);
        is_nan |= x != x;
        peak = select_less(peak, x, x, peak);
    }
    return any_lane(is_nan) ? NAN : max_lanes(peak);
}

/* Replaces logits by distances, and finds the weights; beyond `cutoff` they are infinity and 0. */
static void weigh(Candidates *all, float peak, float temperature, float cutoff) {
    for (int64_t i = 0; i < all->count; i += SIMD_WIDTH) {
        vec *logits = (vec *)(all->distance + i), *weights = (vec *)(all->weight + i);
        vec d = (peak - *logits) / temperature;
        *logits = d = select_less(BROADCAST(cutoff), d, BROADCAST(INFINITY), d);
        *weights = select_less(d, BROADCAST(ZERO_WEIGHT), exp_negative(-d), (vec){0});
    }
}

/* Weights of HALF candidates from i on, 0 beyond distance `last`. */
ALWAYS_INLINE dvec select_weights(const Candidates *c, int64_t i, int32_t last) {
    const half_int is_inside = *(half_int *)(c->distance + i) <= last;
    const half_int weights = *(half_int *)(c->weight + i) & is_inside;
    return __builtin_convertvector((half_float)weights, dvec);
}

/* Weight of the tokens up to distance `last`. */
static double sum_weights(const Candidates *c, int32_t last) {
    dvec low = {0}, high = {0};
    for (int64_t i = 0; i < c->count; i += SIMD_WIDTH) {
        low += select_weights(c, i, last);
        high += select_weights(c, i + HALF, last);
    }
    return sum_doubles(low + high);
}

/* Number of the tokens up to distance `last`. */
static double count_tokens(const Candidates *c, int32_t last) {
    ivec count = {0};
    for (int64_t i = 0; i < c->count; i += SIMD_WIDTH)
        count -= *(unaligned_ivec *)(c->distance + i) <= last;
    return sum_integers(count);
}

/* Leaves the tokens up to distance `last`. */
static void select_candidates(Candidates *c, int32_t last) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->count; i += SIMD_WIDTH) {
        if (!any_lane(*(unaligned_ivec *)(c->distance + i) <= last)) continue;
        for (int64_t j = i; j < i + SIMD_WIDTH; j++) {
            int is_candidate = c->distance[j] <= last;
            c->distance[n] = c->distance[j], c->weight[n] = c->weight[j], c->ids[n] = c->ids[j];
            n += is_candidate;
        }
    }
    for (c->count = n; c->count % SIMD_WIDTH; c->count++)
        c->distance[c->count] = INFINITE, c->weight[c->count] = 0;
}

/* The smallest distance up to which tokens weigh, or number, at least `goal`; infinity if all are
   less. Leaves the tokens up to there, and some beyond. */
static int32_t threshold(Candidates *c, int weighs, double goal) {
    int32_t result = 0;
    for (int bit = 30; bit >= 0; bit--) {
        const int32_t trial = result + ((1 << bit) - 1);
        if (weighs && trial >= ALL_WEIGHT) continue;
        if ((weighs ? sum_weights(c, trial) : count_tokens(c, trial)) < goal) result = trial + 1;
        if (bit == FINE_BITS) select_candidates(c, result + ((1 << bit) - 1));
    }
    return MIN(result, INFINITE);
}

/* The largest distance that top-k and top-p keep. */
static int32_t filter(Candidates *c, int64_t features, int64_t k, double top_p) {
    int32_t last = INFINITE;
    double total = sum_weights(c, INFINITE);
    if (features & TOP_K) {
        last = threshold(c, 0, k);
        /* Of the tokens as likely as the k-th, only as many count as make k. */
        double nearer = sum_weights(c, last - 1), num_nearer = count_tokens(c, last - 1);
        double ties = sum_weights(c, last) - nearer, num_ties = count_tokens(c, last) - num_nearer;
        total = nearer + ties * ((k - num_nearer) / num_ties);
    }
    if (!(features & TOP_P)) return last;
    int32_t nucleus = threshold(c, 1, top_p * total);
    return MIN(nucleus, last);
}

/* Adds the weights up to distance `last` until their sum exceeds `target`. Returns the sum, and in
   *index the candidate at which it did. */
static double accumulate(const Candidates *c, int32_t last, double target, int64_t *index) {
    double sum = 0;
    for (int64_t i = 0; i < c->count; i += SIMD_WIDTH) {
        const dvec low = select_weights(c, i, last), high = select_weights(c, i + HALF, last);
        const double next = sum + sum_doubles(low + high);
        if (next > target) {
            /* Token by token the sum may round to less than `next`: then it is the last one. */
            for (int64_t j = i; j < i + SIMD_WIDTH && sum <= target; j++)
                if (c->distance[j] <= last && c->weight[j] > 0) {
                    sum += c->weight[j];
                    *index = j;
                }
            break;
        }
        sum = next;
    }
    return sum;
}

/* The token of logits [padded], which become distances. */
static int64_t sample_row(
    float *logits, int64_t padded, const SamplingTable *table, int64_t slot, int64_t position
) {
    const int64_t features = table->features[slot];
    float peak = largest(logits, padded);
    if (!isfinite(peak)) return INVALID;
    int64_t index = 0;
    if (!(features & SAMPLED)) {
        while (logits[index] != peak) index++;
        return index;
    }
    Candidates c = {(int32_t *)logits, logits + padded, (int32_t *)logits + 2 * padded, padded};
    int32_t last = INFINITE;
    const float cutoff = features & MIN_P ? -logf(table->min_p[slot]) : INFINITY;
    weigh(&c, peak, table->temperature[slot], cutoff);
    if (features & (TOP_K | TOP_P)) {
        for (int64_t i = 0; i < padded; i++) c.ids[i] = i;
        last = filter(&c, features, table->top_k[slot], table->top_p[slot]);
    }
    uint64_t noise = mix(mix(table->seed[slot]) + position * 0x9E3779B97F4A7C15) >> 12;
    double total = accumulate(&c, last, INFINITY, &index);
    accumulate(&c, last, noise * 0x1p-52 * total, &index);
    return features & (TOP_K | TOP_P) ? c.ids[index] : index;
}

/* Tokens [rows] at `positions`, from logits [rows, V] with `stride` floats from row to row, by the
   parameters of `slots`; INVALID for a row that is not finite. Row r has mask mask_rows[r] of masks
   [.., V], or none if that is negative or `mask_rows` null. `uncounted` are pairs of a row and a
   token of its text that the table does not count yet. `scratch` has, for each thread, three times
   `padded` floats, where `padded` is V rounded up to a multiple of 16. */
void sample(
    const float *logits, int64_t stride, int64_t rows, int64_t V, const SamplingTable *table,
    const int64_t *slots, const int64_t *positions, const int64_t *mask_rows, const uint8_t *masks,
    const int64_t (*uncounted)[2], int64_t num_uncounted, float *scratch, int64_t padded,
    int64_t *tokens, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1 && rows > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *own = scratch + THREAD_ID * 3 * padded;
        const uint8_t *mask = mask_rows && mask_rows[r] >= 0 ? masks + mask_rows[r] * V : 0;
        adjust(logits + r * stride, V, table, slots[r], positions[r], mask, r, uncounted,
               num_uncounted, own);
        for (int64_t i = V; i < padded; i++) own[i] = -INFINITY;
        tokens[r] = sample_row(own, padded, table, slots[r], positions[r]);
    }
}
