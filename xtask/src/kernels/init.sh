#!/bin/busybox sh
# The first process of a VM of `cargo xtask kernels`. It prepares the machine, runs what /runs says, and switches
# off. What the host reads stands between lines that begin with @@kernels@@.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec </dev/null >/dev/ttyS0 2>&1
# Kernel messages would end up in the middle of stacks; all of them follow at the end.
dmesg -n 1

say() {
    echo "@@kernels@@ $*"
}

# record NAME FLAGS COMMAND...: records a command. Both outputs go to files first: a terminal is slower than them
# and would be shown progress.
record() {
    name=$1 flags=$2
    shift 2
    echo "$name" >/tmp/run
    # shellcheck disable=SC2086 # no flag has spaces
    /profiler-agent record --frequency 99 --format folded --output - $flags -- "$@" >/tmp/stdout 2>/tmp/stderr
    status=$?
    say "run $name"
    say "status $status"
    say stderr
    cat /tmp/stderr
    say stdout
    cat /tmp/stdout
    say end
    if [ $status != 0 ] && [ ! -e /tmp/explained ]; then
        touch /tmp/explained
        echo "The same again, with the debug log's last 64 KiB, for people:"
        # shellcheck disable=SC2086
        /profiler-agent --log-level debug record --output /tmp/again.folded $flags -- "$@" 2>&1 | tail -c 65536
    fi
}

# containers: records the machine while one program runs in the cgroup of a container that was there before, and another
# in that of one that is made meanwhile, and says which of both are in the recording.
containers() {
    early=$(printf 'a%.0s' $(seq 64)) late=$(printf 'b%.0s' $(seq 64))
    pod=/sys/fs/cgroup/kubepods/burstable/pod2d8a3c1e-0f4b-4c56-9d7e-8a9b0c1d2e3f
    echo containers >/tmp/run
    mkdir -p "$pod/$early"
    sh -c "echo \$\$ >$pod/$early/cgroup.procs; exec /shapes chain 600" >/dev/null &
    program=$!
    /profiler-agent record --frequency 99 --duration 10s --output /tmp/containers.otlp 2>/tmp/stderr &
    agent=$!
    until grep -q sampling /tmp/stderr; do sleep 0.2; done
    sleep 1
    mkdir "$pod/$late"
    sh -c "echo \$\$ >$pod/$late/cgroup.procs; exec /shapes chain 3" >/dev/null
    rmdir "$pod/$late"
    wait $agent
    kill $program
    # An attribute's text stands in a recording as it is.
    found=
    for container in early late; do
        eval "grep -q \"\$$container\" /tmp/containers.otlp" && found="$found $container"
    done
    say "containers$found"
}

# A run that does not end says where everything is, while the machine still can.
watch_runs() {
    while sleep 5; do
        [ -e /tmp/run ] || continue
        if [ $(($(date +%s) - $(stat -c %Y /tmp/run))) -gt 100 ]; then
            echo "STUCK in $(cat /tmp/run):"
            tail -c 2000 /tmp/stderr
            for task in /proc/[0-9]*/task/*; do
                # Kernel threads have no command line.
                [ -n "$(head -c 1 "${task%/task/*}/cmdline")" ] || continue
                echo "$task $(cat "$task/comm"): $(cut -d ' ' -f 3 "$task/stat") in"
                cat "$task/stack"
            done
            echo l >/proc/sysrq-trigger
            dmesg | tail -n 60
            poweroff -f
        fi
    done
}
watch_runs &

say "release $(uname -r)"
# For the registers that the host prints of a machine that hangs.
grep -E ' _text$' /proc/kallsyms
/profiler-agent check
. /runs
containers
echo "Kernel messages:"
dmesg | tail -n 100
say done
poweroff -f
