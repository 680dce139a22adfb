//! What the allocator does with memory that is free.

/// Keeps the allocator from holding on to memory. Call before there are threads.
///
/// Stages need megabytes for moments, each at its own time: one arena instead of one a thread lets them use each
/// other's, and what is large goes back to the system when it is freed. (Left to itself, glibc stops doing that for
/// ever larger sizes, up to 32 MiB.)
pub fn share_free_memory() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 128 << 10)] {
        // SAFETY: mallopt may be called at any time. Where it refuses, the default stays.
        unsafe {
            libc::mallopt(option, value);
        }
    }
}

/// Returns memory that was needed for a moment (the kernel's type information, a large unwind table) to the system;
/// glibc would keep it.
pub fn release_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
