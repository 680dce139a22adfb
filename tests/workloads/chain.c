/* Spins at the bottom of the call chain main -> level_01 -> ... -> level_30 for SECONDS.
   Usage: chain SECONDS */
#include <stdlib.h>

#include "monotonic.h"

static volatile unsigned long sink;
static double deadline;

__attribute__((noinline)) void level_30(void)
{
    /* A call now and then is too rare to be sampled; almost all time is spent in this frame. */
    do {
        for (unsigned long i = 0; i < 20000000; i++)
            sink += i;
    } while (now() < deadline);
}

#define LEVEL(upper, lower) \
    __attribute__((noinline)) void level_##upper(void) { level_##lower(); sink++; }
LEVEL(29, 30) LEVEL(28, 29) LEVEL(27, 28) LEVEL(26, 27) LEVEL(25, 26) LEVEL(24, 25) LEVEL(23, 24) LEVEL(22, 23)
LEVEL(21, 22) LEVEL(20, 21) LEVEL(19, 20) LEVEL(18, 19) LEVEL(17, 18) LEVEL(16, 17) LEVEL(15, 16) LEVEL(14, 15)
LEVEL(13, 14) LEVEL(12, 13) LEVEL(11, 12) LEVEL(10, 11) LEVEL(09, 10) LEVEL(08, 09) LEVEL(07, 08) LEVEL(06, 07)
LEVEL(05, 06) LEVEL(04, 05) LEVEL(03, 04) LEVEL(02, 03) LEVEL(01, 02)

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    deadline = now() + atof(argv[1]);
    level_01();
    return 0;
}
