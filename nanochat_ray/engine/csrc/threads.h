/* The number of the current thread of a parallel region. */

#pragma once

#ifdef _OPENMP
int omp_get_thread_num(void);
#define THREAD_ID omp_get_thread_num()
#else
#define THREAD_ID 0
#endif
