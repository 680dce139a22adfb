/* The same program in two roots: its functions are named after the PLACE that it was compiled for. Spins for SECONDS,
   alone and below the C library's sort.
   Usage: job SECONDS */
#include <stdlib.h>

#include "monotonic.h"

#define JOINED(place, name) place##_##name
#define NAMED(place, name) JOINED(place, name)

static volatile unsigned long sink;

__attribute__((noinline)) void NAMED(PLACE, spin)(void)
{
    for (unsigned long i = 0; i < 1000; i++)
        sink += i;
}

__attribute__((noinline)) int NAMED(PLACE, compare)(const void *a, const void *b)
{
    NAMED(PLACE, spin)();
    return *(const int *)a - *(const int *)b + (int)(sink & 0);
}

__attribute__((noinline)) void NAMED(PLACE, sort)(void)
{
    int numbers[64];
    for (int i = 0; i < 64; i++)
        numbers[i] = (i * 37) & 63;
    qsort(numbers, 64, sizeof *numbers, NAMED(PLACE, compare));
    sink += (unsigned long)numbers[0];
}

int main(int argc, char **argv)
{
    double end = now() + (argc > 1 ? atof(argv[1]) : 1);
    while (now() < end)
        NAMED(PLACE, sort)();
    return 0;
}
