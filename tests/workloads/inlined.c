/* Burns CPU for SECONDS in a function that is inlined in another, which is inlined in a third.
   Usage: inlined SECONDS */
#include <stdlib.h>

#include "monotonic.h"

static volatile unsigned long sink;

static inline __attribute__((always_inline)) void innermost(void)
{
    for (unsigned long i = 0; i < 100000; i++)
        sink += i;
}

static inline __attribute__((always_inline)) void middle(double deadline)
{
    while (now() < deadline)
        innermost();
}

static __attribute__((noinline)) void outermost(double deadline)
{
    middle(deadline);
    sink++;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    outermost(now() + atof(argv[1]));
    return 0;
}
