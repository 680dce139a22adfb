//! The one list of everything the kernel programs count.

/// How a counter takes part in the books: `fired = idle + out_of_scope + undecided + seen`, and
/// `seen = delivered samples + every loss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Every event the programs were called for.
    Fired,
    /// Not a sample by intention: nothing was lost.
    Skipped,
    /// An event that should become a sample.
    Seen,
    /// A seen event that did not become a sample.
    Lost,
    /// Neither: tells how things went.
    Info,
}

/// Declares [`Counter`]: kernel index, metric name, role and documentation from one line each.
macro_rules! counters {
    ($($name:ident, $metric:literal, $role:ident, $doc:literal;)*) => {
        /// Index into the kernel's per-CPU counter array.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Counter {
            $(#[doc = $doc] $name,)*
        }

        impl Counter {
            /// Every counter, in index order.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
            /// How many there are: the length of the kernel's array.
            pub const COUNT: usize = Self::ALL.len();

            /// Name used in metrics (without prefix and `_total`) and reports.
            pub const fn metric(self) -> &'static str {
                match self { $(Self::$name => $metric,)* }
            }

            /// How it takes part in the books.
            pub const fn role(self) -> Role {
                match self { $(Self::$name => Role::$role,)* }
            }

            /// One sentence for people.
            pub const fn doc(self) -> &'static str {
                match self { $(Self::$name => $doc,)* }
            }
        }
    };
}

counters! {
    Fired, "samples_fired", Fired, "Times the sampling event fired, on any CPU.";
    Idle, "samples_idle", Skipped, "Events that found the CPU idle.";
    OutOfScope, "samples_out_of_scope", Skipped, "Events in processes outside the recording's scope, or outside of the agent's PID namespace.";
    Undecided, "samples_undecided", Skipped, "Events in processes of which nobody knew yet whether they are in scope.";
    Seen, "samples_seen", Seen, "Events that should become a sample.";
    LostScratch, "samples_lost_scratch", Lost, "Samples lost because the per-CPU scratch space was missing.";
    LostBuffer, "samples_lost_buffer", Lost, "Samples lost because no buffer was installed.";
    LostOverflow, "samples_lost_overflow", Lost, "Samples lost because the buffer and the overflow ring were both full or busy.";
    Overflowed, "samples_overflowed", Info, "Samples that took the overflow ring because the buffer was full or busy.";
    WaitsSampled, "waits_sampled", Info, "Waits whose stack was taken.";
    WaitsRationed, "waits_rationed", Info, "Waits that found the ration of stacks used up; their time is exported without a stack.";
    WaitsShort, "waits_short", Info, "Waits that were shorter than the minimum duration; their time is not exported.";
    WaitsLost, "waits_lost", Info, "Waits whose time was lost because the buffer and the overflow ring were both full or busy.";
    WaitsLostNs, "waits_lost_nanoseconds", Info, "Time of lost waits.";
    ThreadsFull, "threads_full", Info, "Times a thread that left its CPU could not be remembered.";
    NoticesLost, "notices_lost", Info, "Process notices (fork, exec, exit, new place, table wanted) that found their ring full.";
    CgroupNoticesLost, "cgroup_notices_lost", Info, "Notices of new and removed cgroups that found their ring full; the cgroups are read again.";
    OnCpuNs, "on_cpu_nanoseconds", Info, "Time that the kernel program of the sampling clock ran.";
    Switches, "switches", Info, "Times a CPU turned to another thread while waits were followed.";
    SwitchesNs, "switches_nanoseconds", Info, "Time that the kernel program of these ran, without taking stacks; measured at some of them.";
    WaitStacksNs, "wait_stacks_nanoseconds", Info, "Time that it took the stacks of waits.";
    NoticesNs, "notices_nanoseconds", Info, "Time that the kernel programs ran that announce processes and cgroups.";
    TargetsFull, "targets_full", Info, "Children of a recorded process that could not be followed because the target map was full.";
    ScopeFull, "scope_full", Info, "New processes and cgroups of which it could not be noted that a rule of the scope may be about them.";
}
