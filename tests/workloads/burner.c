/* Burns CPU in THREADS threads for SECONDS, then prints the CPU seconds it used.
   Usage: burner THREADS SECONDS */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

#include "monotonic.h"

static double deadline;
static volatile unsigned long sink;

__attribute__((noinline)) void burn(void)
{
    for (unsigned long i = 0; i < 1000000; i++)
        sink += i;
}

static void *work(void *unused)
{
    while (now() < deadline)
        burn();
    return unused;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int threads = atoi(argv[1]);
    deadline = now() + atof(argv[2]);
    pthread_t others[64];
    for (int i = 1; i < threads && i < 64; i++)
        pthread_create(&others[i], 0, work, 0);
    work(0);
    for (int i = 1; i < threads && i < 64; i++)
        pthread_join(others[i], 0);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("%.6f\n", usage.ru_utime.tv_sec + usage.ru_stime.tv_sec
                         + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
    return 0;
}
