/* Threads that wait in known places, and measure for themselves how long: time passed less CPU time used.
   Prints `site NAME NANOSECONDS WAITS` for each place when it is done.
   Usage: waits SECONDS [FILE] (a file of at least 16 MiB that can be read past the page cache) */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../monotonic.h"

struct site {
    const char *name;
    long nanoseconds, waits;
};

enum { READ = 16 << 20 };

static double deadline;
static atomic_int done, finished;
static int pipe_ends[2], disk;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static long turns;
static _Thread_local long turns_seen;
static _Thread_local void *block;

static long clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void nap(long microseconds)
{
    struct timespec t = {0, microseconds * 1000};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &t, 0);
}

__attribute__((noinline)) void wait_in_sleep(void) { nap(5000); }
__attribute__((noinline)) void wait_between_reads(void) { nap(3000); }
__attribute__((noinline)) void wait_while_moved(void) { nap(7000); }

__attribute__((noinline)) void wait_for_futex(void)
{
    pthread_mutex_lock(&lock);
    while (turns == turns_seen)
        pthread_cond_wait(&condition, &lock);
    turns_seen = turns;
    pthread_mutex_unlock(&lock);
}

__attribute__((noinline)) void wait_for_pipe(void)
{
    char byte;
    if (read(pipe_ends[0], &byte, 1) != 1)
        _exit(3);
}

__attribute__((noinline)) void wait_for_disk(void)
{
    if (pread(disk, block, READ, 0) != READ)
        _exit(4);
}

/* Calls `wait` until the deadline and adds up what it waited. Each clock is read once before and once after in the
   same order, so that reading them costs both the same. */
static void measure(struct site *site, void (*wait)(void))
{
    long wall = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    wait();
    long wall_after = clock_ns(CLOCK_MONOTONIC), cpu_after = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    site->nanoseconds += (wall_after - wall) - (cpu_after - cpu);
    site->waits++;
}

/* Main's own wait: in pieces, so that no stack of the first moment stands for the whole time. */
__attribute__((noinline)) void wait_for_threads(void) { nap(50000); }

static void print(struct site *site) { printf("site %s %ld %ld\n", site->name, site->nanoseconds, site->waits); }

#define THREAD(wait)                         \
    static void *thread_##wait(void *unused) \
    {                                        \
        struct site site = {#wait, 0, 0};    \
        while (now() < deadline)             \
            measure(&site, wait);            \
        print(&site);                        \
        finished++;                          \
        return unused;                       \
    }
THREAD(wait_in_sleep)
THREAD(wait_for_futex)
THREAD(wait_for_pipe)
THREAD(wait_while_moved)

static void *thread_reader(void *unused)
{
    struct site disk_site = {"wait_for_disk", 0, 0}, between = {"wait_between_reads", 0, 0};
    if (posix_memalign(&block, 4096, READ))
        _exit(5);
    while (now() < deadline) {
        for (int i = 0; i < 2; i++)
            measure(&disk_site, wait_for_disk);
        measure(&between, wait_between_reads);
    }
    print(&disk_site);
    print(&between);
    finished++;
    return unused;
}

/* Lets the others go on, and moves one of them to another CPU while it sleeps. */
static void *thread_driver(void *moved)
{
    int cpus = sysconf(_SC_NPROCESSORS_ONLN);
    for (long turn = 0; !done; turn++) {
        nap(5000);
        pthread_mutex_lock(&lock);
        turns++;
        pthread_cond_signal(&condition);
        pthread_mutex_unlock(&lock);
        if (write(pipe_ends[1], "x", 1) != 1)
            _exit(6);
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(turn % cpus, &set);
        pthread_setaffinity_np(*(pthread_t *)moved, sizeof set, &set);
    }
    return 0;
}

int main(int argc, char **argv)
{
    int has_file = argc == 3;
    if (argc < 2 || pipe(pipe_ends) || (has_file && (disk = open(argv[2], O_RDONLY | O_DIRECT)) < 0))
        return 2;
    deadline = now() + atof(argv[1]);
    pthread_t moved, driver, others[4];
    pthread_create(&moved, 0, thread_wait_while_moved, 0);
    pthread_create(&driver, 0, thread_driver, &moved);
    void *(*starts[])(void *) = {thread_wait_in_sleep, thread_wait_for_futex, thread_wait_for_pipe, thread_reader};
    for (int i = 0; i < 3 + has_file; i++)
        pthread_create(&others[i], 0, starts[i], 0);
    while (finished < 4 + has_file)
        wait_for_threads();
    done = 1;
    pthread_join(driver, 0);
    return 0;
}
