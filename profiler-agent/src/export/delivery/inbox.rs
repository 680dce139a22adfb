//! Requests in memory that a destination has not taken yet: one thread puts them in, another takes them out.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::stats::Waiting;
use crate::{export::otlp::Request, profile::Tally};

/// A bounded queue. What is put in never waits for whoever takes it out: the oldest make room.
#[derive(Debug)]
pub(super) struct Inbox {
    queue: Mutex<Queue>,
    changed: Notify,
    limit: usize,
}

#[derive(Debug, Default)]
struct Queue {
    requests: VecDeque<Request>,
    bytes: usize,
    is_closed: bool,
}

impl Inbox {
    /// One that holds at most `limit` bytes, or a single request.
    pub(super) fn new(limit: usize) -> Self {
        Self { queue: Mutex::default(), changed: Notify::new(), limit }
    }

    /// Adds a request behind the others. The result is what the oldest stood for that had to go.
    pub(super) fn put(&self, request: Request) -> Tally {
        let mut queue = self.lock();
        queue.bytes += request.body.len();
        queue.requests.push_back(request);
        let mut dropped = Tally::default();
        while queue.bytes > self.limit && queue.requests.len() > 1 {
            if let Some(oldest) = queue.take() {
                dropped += oldest.tally;
            }
        }
        drop(queue);
        self.changed.notify_one();
        dropped
    }

    /// Takes the oldest.
    pub(super) fn take(&self) -> Option<Request> {
        self.lock().take()
    }

    /// Gives back what was taken last.
    pub(super) fn put_back(&self, request: Request) {
        let mut queue = self.lock();
        queue.bytes += request.body.len();
        queue.requests.push_front(request);
    }

    /// Nothing will be put in any more.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_one();
    }

    /// Whether nothing will be put in any more.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// Resolves when something was put in, or nothing will be any more. Only one may wait.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What is in it.
    pub(super) fn waiting(&self) -> Waiting {
        let queue = self.lock();
        Waiting {
            requests: queue.requests.len() as u64,
            bytes: queue.bytes as u64,
            tally: queue.requests.iter().map(|request| request.tally).sum(),
        }
    }

    /// When the window of the oldest was closed.
    pub(super) fn oldest(&self) -> Option<std::time::SystemTime> {
        self.lock().requests.front().map(|request| request.closed)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn take(&mut self) -> Option<Request> {
        let oldest = self.requests.pop_front()?;
        self.bytes -= oldest.body.len();
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn request(samples: u64, bytes: usize) -> Request {
        Request {
            body: vec![0; bytes].into(),
            tally: Tally { samples, off_cpu_ns: 0 },
            profiles: 1,
            closed: SystemTime::UNIX_EPOCH,
        }
    }

    /// The oldest make room and are counted; one that is larger than everything is kept alone.
    #[test]
    fn the_oldest_make_room() {
        let inbox = Inbox::new(100);
        assert_eq!(inbox.put(request(1, 60)).samples, 0);
        assert_eq!(inbox.put(request(2, 40)).samples, 0);
        assert_eq!(inbox.put(request(4, 50)).samples, 1);
        assert_eq!(inbox.waiting(), Waiting { requests: 2, bytes: 90, tally: request(6, 0).tally });
        assert_eq!(inbox.put(request(8, 500)).samples, 6);
        let oldest = inbox.take().expect("the large one");
        assert_eq!((oldest.tally.samples, inbox.waiting()), (8, Waiting::default()));
        inbox.put_back(oldest);
        assert_eq!(inbox.take().map(|request| request.tally.samples), Some(8));
        assert_eq!(inbox.take(), None);
    }
}
