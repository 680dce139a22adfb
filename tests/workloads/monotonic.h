/* The clock that the workloads run by. */
#include <time.h>

/* Seconds since some moment in the past. */
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}
