/* One of many processes that do little: every two seconds it runs for a millisecond, at the bottom of a deep stack.
   Usage: herd SECONDS */
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "monotonic.h"

#define DEPTH 100

static volatile unsigned long sink;

__attribute__((noinline)) void graze(double until)
{
    while (now() < until)
        for (int i = 0; i < 1000; i++)
            sink += i;
}

__attribute__((noinline)) void wander(int depth)
{
    if (depth == 0)
        graze(now() + 0.001);
    else
        wander(depth - 1);
    sink++;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    double deadline = now() + atof(argv[1]);
    /* They are not all in step. */
    usleep(getpid() % 2000 * 1000);
    while (now() < deadline) {
        wander(DEPTH);
        usleep(2000000);
    }
    return 0;
}
