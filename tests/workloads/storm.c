/* What is expensive to profile: on each CPU, two threads that hand it to each other so many times in two milliseconds, and
   burn what is left of them at the bottom of a deep stack. Prints how long they ran: `ran NANOSECONDS`, and how often
   they were switched: `switched TIMES`.
   Usage: storm SECONDS ROUND_TRIPS */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "monotonic.h"

/* A round trip is two switches. */
#define SLOT 0.002
#define DEPTH 400

struct pair {
    int cpu;
    _Atomic int turn;
};

static double deadline;
static int round_trips;
static volatile unsigned long sink;

static void hand_over(struct pair *pair, int to)
{
    atomic_store(&pair->turn, to);
    syscall(SYS_futex, &pair->turn, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
}

static void wait_for(struct pair *pair, int turn)
{
    int now;
    while ((now = atomic_load(&pair->turn)) != turn && now != 2)
        syscall(SYS_futex, &pair->turn, FUTEX_WAIT_PRIVATE, now, 0, 0, 0);
}

__attribute__((noinline)) void burn(double until)
{
    while (now() < until)
        for (int i = 0; i < 5000; i++)
            sink += i;
}

__attribute__((noinline)) void descend(int depth, double until)
{
    if (depth == 0)
        burn(until);
    else
        descend(depth - 1, until);
    sink++;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *lead(void *argument)
{
    struct pair *pair = argument;
    pin(pair->cpu);
    for (double slot = now(); slot < deadline; slot += SLOT) {
        for (int i = 0; i < round_trips; i++) {
            hand_over(pair, 1);
            wait_for(pair, 0);
        }
        descend(DEPTH, slot + SLOT);
    }
    hand_over(pair, 2);
    return 0;
}

static void *follow(void *argument)
{
    struct pair *pair = argument;
    pin(pair->cpu);
    while (atomic_load(&pair->turn) != 2) {
        wait_for(pair, 1);
        if (atomic_load(&pair->turn) == 1)
            hand_over(pair, 0);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    deadline = now() + atof(argv[1]);
    round_trips = atoi(argv[2]);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct pair *pairs = calloc(cpus, sizeof *pairs);
    pthread_t *threads = calloc(2 * cpus, sizeof *threads);
    for (long cpu = 0; cpu < cpus; cpu++) {
        pairs[cpu].cpu = (int)cpu;
        pthread_create(&threads[2 * cpu], 0, lead, &pairs[cpu]);
        pthread_create(&threads[2 * cpu + 1], 0, follow, &pairs[cpu]);
    }
    for (long thread = 0; thread < 2 * cpus; thread++)
        pthread_join(threads[thread], 0);
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double ran = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("ran %.0f\nswitched %ld\n", ran * 1e9, used.ru_nvcsw + used.ru_nivcsw);
    return 0;
}
