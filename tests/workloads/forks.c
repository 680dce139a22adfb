/* Forks a child that burns CPU for SECONDS without exec; the parent waits.
   Usage: forks SECONDS */
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "monotonic.h"

static volatile unsigned long sink;

__attribute__((noinline)) void in_child(double deadline)
{
    while (now() < deadline)
        for (int i = 0; i < 100000; i++)
            sink += i;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    double deadline = now() + atof(argv[1]);
    pid_t child = fork();
    if (child == 0) {
        in_child(deadline);
        _exit(0);
    }
    waitpid(child, 0, 0);
    return 0;
}
