/* Distributes weight panels over threads. Each thread starts with an equal range; one that has finished
   its range steals from another's, so that no thread waits for one that the operating system has
   suspended. */

#pragma once

#include <stdint.h>

/* Panels [begin, end) that are yet to be multiplied. */
typedef struct {
    int64_t begin, end;
} WorkRange;

static void split_work(WorkRange *ranges, int64_t panels, int threads) {
    for (int64_t i = 0; i < threads; i++)
        ranges[i] = (WorkRange){panels * i / threads, panels * (i + 1) / threads};
}

/* The next panel of a thread's own range or, if that is empty, of another's; -1 if no panel is left.
   Relaxed memory order suffices: results are read after the barrier at the end of the parallel region. */
static int64_t next_panel(WorkRange *ranges, int thread, int threads) {
    for (int i = 0; i < threads; i++) {
        WorkRange *range = ranges + (thread + i) % threads;
        int64_t panel = __atomic_fetch_add(&range->begin, 1, __ATOMIC_RELAXED);
        if (panel < range->end) return panel;
    }
    return -1;
}
