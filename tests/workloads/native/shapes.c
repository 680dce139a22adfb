/* One shape of native stack after another: spins in MODE for SECONDS.
   Usage: shapes MODE SECONDS [PLUGIN]
   Modes: chain (30 deep), deep DEPTH, sort, signal, linkage, vdso, threads, plugin */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../monotonic.h"

static volatile unsigned long sink;
static double deadline;

/* Work that takes a while without calling anything. */
__attribute__((noinline)) void spin(void)
{
    for (unsigned long i = 0; i < 200000; i++)
        sink += i;
}

__attribute__((noinline)) void spin_to_deadline(void)
{
    do
        spin();
    while (now() < deadline);
}

#define LEVEL(upper, lower) \
    __attribute__((noinline)) void level_##upper(void) { lower(); sink++; }
LEVEL(30, spin_to_deadline)
LEVEL(29, level_30) LEVEL(28, level_29) LEVEL(27, level_28) LEVEL(26, level_27) LEVEL(25, level_26)
LEVEL(24, level_25) LEVEL(23, level_24) LEVEL(22, level_23) LEVEL(21, level_22) LEVEL(20, level_21)
LEVEL(19, level_20) LEVEL(18, level_19) LEVEL(17, level_18) LEVEL(16, level_17) LEVEL(15, level_16)
LEVEL(14, level_15) LEVEL(13, level_14) LEVEL(12, level_13) LEVEL(11, level_12) LEVEL(10, level_11)
LEVEL(09, level_10) LEVEL(08, level_09) LEVEL(07, level_08) LEVEL(06, level_07) LEVEL(05, level_06)
LEVEL(04, level_05) LEVEL(03, level_04) LEVEL(02, level_03) LEVEL(01, level_02)

/* DEPTH frames of one function, with a frame size that the compiler cannot know. */
__attribute__((noinline)) unsigned long descend(int depth)
{
    char local[16 + depth % 3 * 16];
    memset(local, depth, sizeof local);
    if (depth <= 1)
        spin_to_deadline();
    else
        sink += descend(depth - 1);
    return local[depth % 16];
}

__attribute__((noinline)) int compare(const void *left, const void *right)
{
    unsigned long work = 0;
    for (int i = 0; i < 200; i++)
        work += i ^ sink;
    sink += work & 1;
    return *(const int *)left - *(const int *)right;
}

__attribute__((noinline)) void sort_to_deadline(void)
{
    int numbers[1000];
    do {
        for (int i = 0; i < 1000; i++)
            numbers[i] = (i * 7919) % 1000;
        qsort(numbers, 1000, sizeof numbers[0], compare);
    } while (now() < deadline);
}

__attribute__((noinline)) void in_handler(void)
{
    spin();
}

void on_signal(int signal)
{
    (void)signal;
    in_handler();
    sink++;
}

__attribute__((noinline)) void interrupted(void)
{
    do
        raise(SIGUSR1);
    while (now() < deadline);
}

__attribute__((noinline)) void call_through_linkage_table(void)
{
    do
        for (int i = 0; i < 20000; i++)
            sink += labs(i) + abs(i) + strlen((const char *)"x") + ffs(i) + random();
    while (now() < deadline);
}

__attribute__((noinline)) void ask_the_vdso(void)
{
    while (now() < deadline)
        sink++;
}

__attribute__((noinline)) void work_in_thread(void)
{
    spin_to_deadline();
    sink++;
}

void *thread_main(void *argument)
{
    work_in_thread();
    return argument;
}

void run_threads(void)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, thread_main, NULL);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

void called_back(void)
{
    spin_to_deadline();
    sink++;
}

void use_plugin(const char *path)
{
    void *plugin = dlopen(path, RTLD_NOW);
    if (!plugin) {
        fprintf(stderr, "%s\n", dlerror());
        exit(2);
    }
    void (*plugin_work)(void (*)(void)) = (void (*)(void (*)(void)))dlsym(plugin, "plugin_work");
    plugin_work(called_back);
    sink++;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    const char *mode = argv[1];
    deadline = now() + atof(argv[2]);
    if (!strcmp(mode, "chain"))
        level_01();
    else if (!strcmp(mode, "deep") && argc > 3)
        descend(atoi(argv[3]));
    else if (!strcmp(mode, "sort"))
        sort_to_deadline();
    else if (!strcmp(mode, "signal")) {
        signal(SIGUSR1, on_signal);
        interrupted();
    } else if (!strcmp(mode, "linkage"))
        call_through_linkage_table();
    else if (!strcmp(mode, "vdso"))
        ask_the_vdso();
    else if (!strcmp(mode, "threads"))
        run_threads();
    else if (!strcmp(mode, "plugin") && argc > 3)
        use_plugin(argv[3]);
    else
        return 2;
    return 0;
}
