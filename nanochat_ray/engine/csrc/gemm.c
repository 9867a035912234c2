/* y = x Wᵀ for the linear layers of a CPU engine: x and y in float32, W in one of the formats of
   weight_formats.h. `kernels.py` compiles it at engine start-up.

   Each sum is accumulated in one order, whatever the number of rows and threads: a row of y depends
   bitwise on its row of x alone.

   The weight is packed in panels of PANEL_WIDTH outputs, where `depth` is the number of inputs
   rounded up to K_BLOCK, and the padding is 0. */

#include "plan.h"
#include "weight_formats.h"

#define MAX_PASS_ROWS 128 /* converted rows of x that share a panel; they fit into the L2 cache */
#define SCRATCH_BYTES 6   /* of an element of x in its converted form, at most */
#ifdef HAVE_AMX
#define MAX_ROWS(format) ((format) == BF16 ? 2 * MAX_PASS_ROWS : MAX_PASS_ROWS)
#else
#define MAX_ROWS(format) MAX_PASS_ROWS
#endif

/* The next panel for this thread; -1 if none is left. Each thread starts with an equal range; one
   that has finished its range steals from another's, so that no thread waits for one that the
   operating system has suspended. Relaxed memory order suffices: results are read after the barrier
   at the end of the parallel region. */
static int64_t next_panel(const Matmul *m) {
    for (int i = 0, thread = THREAD_ID; i < m->threads; i++) {
        WorkRange *range = m->ranges + (thread + i) % m->threads;
        int64_t panel = __atomic_fetch_add(&range->begin, 1, __ATOMIC_RELAXED);
        if (panel < range->end) return panel;
    }
    return -1;
}

#ifdef HAVE_AMX
#include "gemm_amx.h"
#endif

/* All rows times `vectors` registers' width of the panel w. */
ALWAYS_INLINE void multiply_panel(
    const int format, const int vectors, const Matmul *m, const char *w, int64_t first, float *y
) {
    const int max_rows = (format == INT8 ? INT8_ACCUMULATORS : ACCUMULATORS) / vectors;
    for (int64_t row = 0; row < m->rows; row += max_rows)
/* A constant number of rows, so that the compiler unrolls the microkernel. */
#define CASE(count) \
    case count: microkernel(format, MIN(count, max_rows), vectors, m, row, w, first, y); break;
        switch (MIN(m->rows - row, max_rows)) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
            CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
        }
}

/* The panels that this thread gets. */
ALWAYS_INLINE void multiply_panels(const int format, const Matmul *m) {
    const int vectors = PANEL_WIDTH / SIMD_WIDTH;
    const int64_t panel_bytes = format == INT8
                                    ? m->depth / INT8_BLOCK * INT8_BLOCK_BYTES
                                    : m->depth * PANEL_WIDTH * (format == FP32 ? 4 : 2);
    for (int64_t panel; (panel = next_panel(m)) >= 0;) {
        const char *w = m->weights + panel * panel_bytes;
        float *y = m->y + panel * PANEL_WIDTH;
        if (m->rows * vectors <= (format == INT8 ? INT8_ACCUMULATORS : ACCUMULATORS))
            multiply_panel(format, vectors, m, w, 0, y);
        else
            for (int64_t i = 0; i < PANEL_WIDTH; i += 2 * SIMD_WIDTH)
                multiply_panel(format, 2, m, w, i, y);
    }
}

/* Every thread converts all of x for itself: to fetch what another core has converted would take as
   long. */
static void multiply(int format, Matmul *m) {
#ifdef HAVE_AMX
    if (format != INT8) {
        multiply_amx(format, m);
        return;
    }
#endif
    if (format != FP32) convert_rows(format, m);
    if (format == FP32) multiply_panels(FP32, m);
    if (format == BF16) multiply_panels(BF16, m);
    if (format == INT8) multiply_panels(INT8, m);
}

/* y [rows, panels * PANEL_WIDTH] = x [rows, inputs] times a packed weight. The step's scratch has
   SCRATCH_BYTES for each of depth * R elements for each thread, where R is the number of rows
   rounded up to 16, at most MAX_PASS_ROWS; in FP32 without AMX it may be null. */
void linear(const Operation *op, const Step *step, int64_t all_rows) {
    const int64_t inputs = op->width, depth = (inputs + K_BLOCK - 1) / K_BLOCK * K_BLOCK;
    const int64_t panels = op->count, threads = step->threads, max_rows = MAX_ROWS(op->format);
    const int64_t passes = (all_rows + max_rows - 1) / max_rows;
    WorkRange ranges[threads];
    Matmul m = {.weights = op->weight, .ranges = ranges, .threads = threads, .inputs = inputs,
                .depth = depth, .x_stride = 4 * inputs, .y_stride = panels * PANEL_WIDTH};
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = all_rows * pass / passes;
        m.rows = all_rows * (pass + 1) / passes - first;
        m.x = (const float *)op->x + first * inputs;
        m.y = (op->y ? op->y : step->logits) + first * m.y_stride;
        for (int64_t i = 0; i < threads; i++)
            ranges[i] = (WorkRange){panels * i / threads, panels * (i + 1) / threads};
#pragma omp parallel num_threads(threads) firstprivate(m) if (threads > 1)
        {
            const int64_t scratch_rows = MIN((m.rows + 15) / 16 * 16, MAX_PASS_ROWS);
            m.scratch = (char *)step->scratch + THREAD_ID * scratch_rows * depth * SCRATCH_BYTES;
            multiply(op->format, &m);
        }
    }
}
