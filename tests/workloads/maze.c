/* Takes random ways through two functions that call each other, 20 deep, so that hardly two stacks are
   alike, in THREADS threads for SECONDS.
   Usage: maze THREADS SECONDS */
#include <pthread.h>
#include <stdlib.h>

#include "monotonic.h"

static double deadline;
static volatile unsigned long sink;

static void right(unsigned way, int depth);

#define CROSSING(name)                                      \
    static void name(unsigned way, int depth)               \
    {                                                       \
        if (depth == 0)                                     \
            for (int i = 0; i < 5000; i++)                  \
                sink += i;                                  \
        else if (way & 1)                                   \
            left(way >> 1, depth - 1);                      \
        else                                                \
            right(way >> 1, depth - 1);                     \
        sink++;                                             \
    }
CROSSING(left)
CROSSING(right)

static void *work(void *seed)
{
    unsigned state = (unsigned)(unsigned long)seed;
    while (now() < deadline)
        left(rand_r(&state), 20);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int threads = atoi(argv[1]);
    deadline = now() + atof(argv[2]);
    pthread_t others[64];
    for (long i = 1; i < threads && i < 64; i++)
        pthread_create(&others[i], 0, work, (void *)i);
    work((void *)77);
    for (int i = 1; i < threads && i < 64; i++)
        pthread_join(others[i], 0);
    return 0;
}
