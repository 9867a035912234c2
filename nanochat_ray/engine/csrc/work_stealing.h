/* Distributes weight panels over threads. Each thread starts with an equal range; one that has
   finished its range steals from the end of another's, so that no thread waits for one that the
   operating system has suspended. */

#pragma once

#include <stdint.h>

#include "threads.h"

/* Panels [begin, end) that a thread has yet to multiply, in one word for atomic updates. */
typedef union {
    struct {
        uint32_t begin, end;
    };
    uint64_t word;
} WorkRange;

static void split_work(WorkRange *ranges, int64_t panels, int threads) {
    for (int64_t i = 0; i < threads; i++)
        ranges[i] = (WorkRange){{panels * i / threads, panels * (i + 1) / threads}};
}

/* The next panel for a thread: the first of its own range or, if that is empty, the last of another
   thread's. -1 if no panel is left. Relaxed memory order suffices: results are read after the barrier
   at the end of the parallel region. */
static int64_t next_panel(WorkRange *ranges, int thread, int threads) {
    for (int i = 0; i < threads; i++) {
        WorkRange *range = ranges + (thread + i) % threads, current, rest;
        current.word = __atomic_load_n(&range->word, __ATOMIC_RELAXED);
        while (current.begin < current.end) {
            rest = current;
            int64_t panel = i ? --rest.end : rest.begin++;
            if (__atomic_compare_exchange_n(
                    &range->word, &current.word, rest.word, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED
                ))
                return panel;
        }
    }
    return -1;
}
