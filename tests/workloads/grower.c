/* Takes MIB more of memory every second for SECONDS, and keeps it; burns CPU in between.
   Usage: grower MIB SECONDS */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "monotonic.h"

static volatile unsigned long sink;
static void *kept;

__attribute__((noinline)) void grow(void)
{
    void **more = malloc(1 << 20);
    if (!more)
        exit(1);
    memset(more, 1, 1 << 20);
    *more = kept;
    kept = more;
}

__attribute__((noinline)) void burn(double deadline)
{
    while (now() < deadline)
        for (int i = 0; i < 10000; i++)
            sink += i;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    double start = now(), step = 1 / atof(argv[1]), end = start + atof(argv[2]);
    for (double next = start; next < end; next += step) {
        grow();
        burn(next + step);
    }
    return 0;
}
