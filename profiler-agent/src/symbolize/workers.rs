//! Threads that read files, so that one that is slow (on a network, or of absurd size) does not delay the others.
//!
//! Jobs go in, what came of them comes out, both through bounded queues. A thread that stays with a file for too long is
//! replaced, and comes back when it is done with it.

use std::{
    collections::HashMap,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::warn;

use crate::{allowance::Allowance, profile::ExecutableId};

/// Most threads, with those that are stuck: then nothing is read until one of them comes back.
const MAX_THREADS: usize = 8;
/// Jobs that may wait for a thread.
const MAX_WAITING: usize = 64;
/// Results that may wait to be taken: each may be large.
const MAX_DONE: usize = 2;

/// Files under work, and since when.
type Running = Mutex<HashMap<ExecutableId, Instant>>;

/// What all threads do: `None` where a job made them panic.
type Work<J, R> = fn(J) -> R;

/// Threads that turn jobs into results.
pub(in crate::symbolize) struct Workers<J, R> {
    jobs: SyncSender<(ExecutableId, J)>,
    done: Receiver<(ExecutableId, Option<R>)>,
    shared: Arc<Shared<J, R>>,
    threads: usize,
    /// Threads that work at the same time.
    wanted: usize,
    /// How long a thread may stay with a file.
    limit: Duration,
}

struct Shared<J, R> {
    work: Work<J, R>,
    waiting: Mutex<Receiver<(ExecutableId, J)>>,
    running: Running,
    results: SyncSender<(ExecutableId, Option<R>)>,
    allowance: Arc<Allowance>,
}

impl<J: Send + 'static, R: Send + 'static> Workers<J, R> {
    /// As many workers, whose threads are started when there is work, and only work within an allowance.
    pub(in crate::symbolize) fn new(
        work: Work<J, R>,
        wanted: usize,
        limit: Duration,
        allowance: Arc<Allowance>,
    ) -> Self {
        let (jobs, waiting) = sync_channel(MAX_WAITING);
        let (results, done) = sync_channel(MAX_DONE);
        let shared = Shared { work, waiting: Mutex::new(waiting), running: Mutex::default(), results, allowance };
        Self { jobs, done, shared: Arc::new(shared), threads: 0, wanted, limit }
    }

    /// Hands over a job, or back where there is no room for it.
    pub(in crate::symbolize) fn offer(&mut self, id: ExecutableId, job: J) -> Result<(), J> {
        if self.threads < self.wanted {
            self.add_thread();
        }
        self.jobs.try_send((id, job)).map_err(|error| match error {
            TrySendError::Full((_, job)) | TrySendError::Disconnected((_, job)) => job,
        })
    }

    /// The next result, and of which file: `None` in it where the work panicked. Waits for it until `deadline`.
    pub(in crate::symbolize) fn next(&mut self, deadline: Instant) -> Option<(ExecutableId, Option<R>)> {
        self.done.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }

    /// A file that a thread has been with for too long. Each is returned once; another thread takes that thread's place.
    pub(in crate::symbolize) fn overdue(&mut self) -> Option<ExecutableId> {
        let limit = self.limit;
        let overdue = {
            let mut running = lock(&self.shared.running);
            let overdue = running.iter().find(|(_, since)| since.elapsed() > limit).map(|(&id, _)| id)?;
            running.remove(&overdue);
            overdue
        };
        self.add_thread();
        Some(overdue)
    }

    fn add_thread(&mut self) {
        if self.threads >= MAX_THREADS {
            return;
        }
        let shared = Arc::clone(&self.shared);
        match thread::Builder::new().name("file reader".to_owned()).spawn(move || shared.run()) {
            Ok(_) => self.threads += 1,
            Err(error) => warn!("a thread that reads files could not be started: {error}"),
        }
    }
}

impl<J, R> Shared<J, R> {
    /// Works until nobody offers jobs any more.
    fn run(&self) {
        loop {
            let next = lock(&self.waiting).recv();
            let Ok((id, job)) = next else { return };
            let result = self.allowance.spend(|| {
                lock(&self.running).insert(id, Instant::now());
                // Files are untrusted and their readers are fuzzed; if one panics all the same, it costs names only.
                panic::catch_unwind(AssertUnwindSafe(|| (self.work)(job))).ok()
            });
            lock(&self.running).remove(&id);
            if self.results.send((id, result)).is_err() {
                return;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any test takes.
    const LONG: Duration = Duration::from_secs(60);

    /// A job that waits for a word, one that panics, or one that is done at once.
    enum Job {
        Wait(Receiver<()>),
        Panic,
        Answer(u32),
    }

    fn work(job: Job) -> u32 {
        match job {
            Job::Wait(word) => {
                // An error means that the test is over.
                let _ = word.recv();
                0
            }
            Job::Panic => panic!("for the test"),
            Job::Answer(answer) => answer,
        }
    }

    /// Files that never come to an end take threads, but other files are read all the same; when they do come to an end,
    /// it is not too late.
    #[test]
    fn slow_files_do_not_delay_others() {
        let mut workers = Workers::new(work, 2, Duration::ZERO, Arc::default());
        let mut words = Vec::new();
        for id in 0..4 {
            let (word, waits) = sync_channel(1);
            words.push(word);
            assert!(workers.offer(ExecutableId(id), Job::Wait(waits)).is_ok());
        }
        let mut overdue = Vec::new();
        let begin = Instant::now();
        while overdue.len() < 4 && begin.elapsed() < LONG {
            overdue.extend(workers.overdue());
            thread::yield_now();
        }
        overdue.sort_unstable();
        assert_eq!(overdue, (0..4).map(ExecutableId).collect::<Vec<_>>());
        assert!(workers.offer(ExecutableId(7), Job::Answer(77)).is_ok());
        assert_eq!(workers.next(begin + LONG), Some((ExecutableId(7), Some(77))));
        words[2].send(()).expect("a thread listens");
        assert_eq!(workers.next(begin + LONG), Some((ExecutableId(2), Some(0))));
    }

    /// A thread outlives a job that panics.
    #[test]
    fn panics_cost_one_result() {
        let mut workers = Workers::new(work, 2, LONG, Arc::default());
        for id in 0..3 {
            assert!(workers.offer(ExecutableId(id), Job::Panic).is_ok());
        }
        assert!(workers.offer(ExecutableId(3), Job::Answer(33)).is_ok());
        let deadline = Instant::now() + LONG;
        let mut results: Vec<_> = (0..4).filter_map(|_| workers.next(deadline)).collect();
        results.sort_unstable();
        assert_eq!(results[3], (ExecutableId(3), Some(33)));
        assert_eq!(results.iter().filter(|(_, result)| result.is_none()).count(), 3);
    }
}
