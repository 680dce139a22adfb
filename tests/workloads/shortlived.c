/* Uses MILLISECONDS of CPU time and exits.
   Usage: shortlived MILLISECONDS */
#include <stdlib.h>
#include <time.h>

static volatile unsigned long sink;

__attribute__((noinline)) void spin(double seconds)
{
    struct timespec t;
    do {
        for (int i = 0; i < 10000; i++)
            sink += i;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    } while (t.tv_sec + t.tv_nsec / 1e9 < seconds);
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    spin(atof(argv[1]) / 1e3);
    return 0;
}
