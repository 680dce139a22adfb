/* A library that a program loads while it runs. */
static volatile unsigned long calls;

__attribute__((noinline)) static void inside_plugin(void (*callback)(void))
{
    callback();
    calls++;
}

void plugin_work(void (*callback)(void))
{
    inside_plugin(callback);
    calls++;
}
