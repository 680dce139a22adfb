/* Processes that each burn CPU, more of them than there are CPUs, and then print how long the kernel says that they
   waited for one: `waited NANOSECONDS`, from the second field of /proc/self/schedstat.
   Usage: crowd PROCESSES SECONDS */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "monotonic.h"

static volatile unsigned long sink;

__attribute__((noinline)) void burn(double deadline)
{
    while (now() < deadline)
        for (int i = 0; i < 100000; i++)
            sink += i;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    double deadline = now() + atof(argv[2]);
    for (int i = 0; i < atoi(argv[1]); i++)
        if (fork() == 0) {
            burn(deadline);
            unsigned long ran, waited;
            FILE *file = fopen("/proc/self/schedstat", "r");
            if (!file || fscanf(file, "%lu %lu", &ran, &waited) != 2)
                _exit(3);
            printf("waited %lu\n", waited);
            fflush(stdout);
            _exit(0);
        }
    while (wait(0) > 0)
        ;
    return 0;
}
