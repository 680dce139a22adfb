//! What is remembered of threads between two events.

use core::ptr::read_volatile;

use profiler_common::abi::{
    counter::Counter,
    waits::{THREAD_SLOTS, ThreadWait},
};

use crate::maps::{MORE_THREADS, THREADS, WAIT_CONTROL, count};

/// Fetches a thread's slot into the cache while the other thread of the switch is seen to.
#[inline(always)]
pub fn touch(thread: u32) {
    if let Some(slot) = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1)) {
        // SAFETY: an array's slots are always there.
        unsafe { read_volatile(&raw const (*slot).thread) };
    }
}

/// What is remembered of a thread.
#[inline(always)]
pub fn find(thread: u32) -> Option<&'static mut ThreadWait> {
    let slot = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1))?;
    // SAFETY: an array's slots are always there; the scheduler's locks order what happens to one thread.
    let slot = unsafe { &mut *slot };
    if slot.thread == thread {
        return Some(slot);
    }
    if slot.thread == 0 {
        return None;
    }
    // SAFETY: a value of this preallocated map stays readable while the program runs; as above.
    MORE_THREADS.get_ptr_mut(thread).map(|wait| unsafe { &mut *wait })
}

/// Makes room for a thread that is not remembered.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
pub fn remember(thread: u32) -> Option<&'static mut ThreadWait> {
    let slot = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1))?;
    // SAFETY: as in `find`. (Should two CPUs take the same slot at the same moment, the later one has it, and
    // the other thread's wait is not known when it ends.)
    let slot = unsafe { &mut *slot };
    if slot.thread == 0 {
        *slot = ThreadWait { thread, ..ThreadWait::default() };
        return Some(slot);
    }
    let _checked_below = MORE_THREADS.insert(thread, ThreadWait { thread, ..ThreadWait::default() }, 0);
    let wait = MORE_THREADS.get_ptr_mut(thread);
    if wait.is_none() {
        count(Counter::ThreadsFull);
        // From now on, an unknown thread may also be one for which there was no room.
        if let Some(control) = WAIT_CONTROL.get_ptr_mut(0) {
            // SAFETY: an array's slots are always there.
            unsafe { (*control).is_incomplete = 1 };
        }
    }
    // SAFETY: as in `find`.
    wait.map(|wait| unsafe { &mut *wait })
}

/// Forgets a thread that has ended.
#[cold]
#[unsafe(link_section = ".text")]
#[inline(never)]
pub fn forget(thread: u32) {
    let Some(slot) = THREADS.get_ptr_mut(thread & (THREAD_SLOTS as u32 - 1)) else { return };
    // SAFETY: as in `find`.
    let slot = unsafe { &mut *slot };
    if slot.thread == thread {
        slot.began_ns = 0;
        slot.thread = 0;
    } else if slot.thread != 0 {
        let _unknown_is_fine = MORE_THREADS.remove(thread);
    }
}
