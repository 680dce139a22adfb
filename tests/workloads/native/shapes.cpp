// C++ shapes: spins in MODE for SECONDS. Usage: shapes++ MODE SECONDS
// Modes: chain (30 deep, through templates and virtual calls), exceptions, pool
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../monotonic.h"

static volatile unsigned long sink;
static double deadline;

__attribute__((noinline)) void spin()
{
    for (unsigned long i = 0; i < 200000; i++)
        sink += i;
}

struct Step {
    virtual ~Step() = default;
    virtual void go() = 0;
};

template <int N> struct Level : Step {
    __attribute__((noinline)) void go() override
    {
        Level<N - 1> next;
        Step *step = &next;
        asm volatile("" : "+r"(step));
        step->go();
        sink++;
    }
};

template <> struct Level<0> : Step {
    __attribute__((noinline)) void go() override
    {
        do
            spin();
        while (now() < deadline);
    }
};

void fail(int depth);

// A frame with something to clean up: the exception stops here and goes on.
__attribute__((noinline)) void fail_through_cleanup(int depth)
{
    std::string local(depth, 'x');
    fail(depth);
    sink += local.size();
}

__attribute__((noinline)) void fail(int depth)
{
    if (depth == 0)
        throw std::runtime_error("expected");
    if (depth % 10 == 0)
        fail_through_cleanup(depth - 1);
    else
        fail(depth - 1);
    sink++;
}

__attribute__((noinline)) void throw_and_catch()
{
    do {
        try {
            fail(20);
        } catch (const std::exception &) {
            sink++;
        }
    } while (now() < deadline);
}

__attribute__((noinline)) void job()
{
    spin();
}

void run_pool()
{
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> jobs;
    bool done = false;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++)
        threads.emplace_back([&] {
            std::unique_lock lock(mutex);
            for (;;) {
                changed.wait(lock, [&] { return done || !jobs.empty(); });
                if (jobs.empty())
                    return;
                auto next = std::move(jobs.front());
                jobs.pop_front();
                lock.unlock();
                next();
                lock.lock();
            }
        });
    while (now() < deadline) {
        {
            std::lock_guard lock(mutex);
            for (int i = 0; i < 32; i++)
                jobs.emplace_back(job);
        }
        changed.notify_all();
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        std::unique_lock lock(mutex);
        while (jobs.size() > 64) {
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            lock.lock();
        }
    }
    {
        std::lock_guard lock(mutex);
        done = true;
    }
    changed.notify_all();
    for (auto &thread : threads)
        thread.join();
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    deadline = now() + atof(argv[2]);
    if (!strcmp(argv[1], "chain"))
        Level<30>().go();
    else if (!strcmp(argv[1], "exceptions"))
        throw_and_catch();
    else if (!strcmp(argv[1], "pool"))
        run_pool();
    else
        return 2;
    return 0;
}
