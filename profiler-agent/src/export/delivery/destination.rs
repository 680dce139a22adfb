//! Delivers to one receiver, on a thread of its own: whatever one does, the others do not wait for it.
//!
//! Requests come through an inbox in memory and move to the spool at once, where there is one. They leave in the order in
//! which they came: the oldest is sent until the receiver accepts it, refuses it for good, or it has to make room.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    backoff::Backoff,
    inbox::Inbox,
    spool::{self, Number, Spool, Stored},
    stats::{DestinationStats, DropReason, Waiting},
};
use crate::export::otlp::{
    Request,
    client::{Accepted, Client, Failure, Reason},
};

/// A complaint that does not change is repeated so rarely.
const REPEAT: Duration = Duration::from_secs(600);

/// The thread's state.
pub(super) struct Destination {
    client: Client,
    backlog: Backlog,
    complaints: Complaints,
}

impl Destination {
    pub(super) fn new(
        client: Client,
        inbox: Arc<Inbox>,
        spool: Option<Spool>,
        max_age: Duration,
        stats: Arc<DestinationStats>,
    ) -> Self {
        let mut backlog = Backlog { inbox, spool, sending: None, max_age, stats, spool_failed: false };
        if let Some(spool) = &backlog.spool {
            backlog.stats.recovered.add(spool.tally());
        }
        backlog.count();
        Self { client, backlog, complaints: Complaints::default() }
    }

    /// Delivers until everything is and nothing more comes, or until the deadline, once there is one. What is left then
    /// stays in the spool, or is counted.
    pub(super) async fn run(mut self, mut deadline: watch::Receiver<Option<Instant>>) {
        let passed = async move {
            // An error means that nobody will set one.
            let set = deadline.wait_for(Option::is_some).await.ok().and_then(|deadline| *deadline);
            match set {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.deliver() => {}
            () = passed => {}
        }
        while !self.backlog.inbox.is_closed() {
            self.backlog.inbox.changed().await;
        }
        self.backlog.settle();
    }

    async fn deliver(&mut self) {
        let mut backoff = Backoff::default();
        loop {
            // (Asked for before the backlog is: what comes between is found in it.)
            let is_closed = self.backlog.inbox.is_closed();
            self.backlog.store();
            let Some(request) = self.backlog.next() else {
                if is_closed {
                    return;
                }
                self.backlog.inbox.changed().await;
                continue;
            };
            let started = Instant::now();
            let outcome = self.backlog.keep_storing(self.client.send(&request)).await;
            match outcome {
                Ok(accepted) => {
                    self.backlog.stats.answered_within(started.elapsed());
                    backoff.reset();
                    self.accepted(&request, &accepted);
                }
                Err(failure) if failure.reason.is_retryable() => {
                    self.backlog.stats.fail(failure.reason);
                    self.complain(&failure, &request);
                    self.backlog.give_back();
                    if self.backlog.inbox.is_closed() && self.backlog.is_safe() {
                        return;
                    }
                    let pause = backoff.pause(failure.retry_after);
                    self.backlog.keep_storing(tokio::time::sleep(pause)).await;
                    self.backlog.stats.retries.add(1);
                }
                Err(failure) => {
                    self.backlog.stats.fail(failure.reason);
                    if self.backlog.done() {
                        self.backlog.stats.lose(DropReason::Refused, request.tally);
                    }
                    self.complain(&failure, &request);
                }
            }
        }
    }

    fn accepted(&mut self, request: &Request, accepted: &Accepted) {
        // What made room while it was on its way is counted as dropped, and not once more.
        let is_news = self.backlog.done();
        let stats = &self.backlog.stats;
        stats.profiles_rejected.add(accepted.rejected_profiles);
        if is_news && accepted.rejected_profiles >= u64::from(request.profiles) {
            stats.lose(DropReason::Refused, request.tally);
        } else if is_news {
            // (Which samples a partial rejection hit is not said.)
            stats.exported.add(request.tally);
        }
        stats.requests.add(1);
        stats.bytes.add(request.body.len() as u64);
        stats.wire_bytes.add(self.client.sent_bytes());
        if accepted.rejected_profiles > 0 {
            if self.complaints.is_news(Complaint::Rejected) {
                warn!(
                    "{}: the receiver accepted a request and rejected {} of its {} profiles: {}",
                    stats.name, accepted.rejected_profiles, request.profiles, accepted.message
                );
            }
        } else if self.complaints.is_over() {
            info!("{}: profiles are accepted again", stats.name);
        }
    }

    fn complain(&mut self, failure: &Failure, request: &Request) {
        if !self.complaints.is_news(Complaint::Failed(failure.reason)) {
            return;
        }
        let name = &self.backlog.stats.name;
        if failure.reason.is_retryable() {
            let place = if self.backlog.is_safe() { "the spool" } else { "memory" };
            warn!("{name}: {failure}; what is to be sent waits in {place}");
        } else {
            warn!("{name}: {} were dropped: {failure}", request.tally);
        }
    }
}

/// What is being sent, and where it is until it is accepted.
enum Sending {
    /// Nowhere else.
    FromMemory(Request),
    FromSpool(Number),
}

/// What waits: in the spool first, then in memory. What is in memory is newer, since it only stays there while nothing can
/// be written to the spool.
struct Backlog {
    inbox: Arc<Inbox>,
    spool: Option<Spool>,
    /// What is being sent.
    sending: Option<Sending>,
    max_age: Duration,
    stats: Arc<DestinationStats>,
    spool_failed: bool,
}

impl Backlog {
    /// Moves what is in memory to the spool.
    fn store(&mut self) {
        if let Some(spool) = &mut self.spool {
            while let Some(request) = self.inbox.take() {
                if let Err(error) = spool.push(&request, SystemTime::now()) {
                    self.inbox.put_back(request);
                    self.stats.spool_failures.add(1);
                    if !std::mem::replace(&mut self.spool_failed, true) {
                        warn!("{}: {error}; what is to be sent waits in memory meanwhile", self.stats.name);
                    }
                    break;
                }
                self.stats.spooled.add(request.tally);
                if std::mem::take(&mut self.spool_failed) {
                    info!("{}: the spool can be written again", self.stats.name);
                }
            }
        }
        self.count();
    }

    /// Waits for something else, and stores what comes meanwhile.
    async fn keep_storing<T>(&mut self, wait: impl Future<Output = T>) -> T {
        let mut wait = std::pin::pin!(wait);
        loop {
            let inbox = Arc::clone(&self.inbox);
            tokio::select! {
                biased;
                outcome = &mut wait => return outcome,
                () = inbox.changed() => self.store(),
            }
        }
    }

    /// The oldest that is not too old: to be sent.
    fn next(&mut self) -> Option<Request> {
        let now = SystemTime::now();
        if let Some(Sending::FromMemory(request)) = &self.sending {
            if !self.is_too_old(request, now) {
                return Some(request.clone());
            }
            self.stats.lose(DropReason::TooOld, request.tally);
            self.sending = None;
        }
        if let Some(spool) = &mut self.spool {
            match spool.front(now) {
                Ok(Some(Stored { number, request })) => {
                    self.sending = Some(Sending::FromSpool(number));
                    self.count();
                    return Some(request);
                }
                Ok(None) => {}
                Err(error) => warn!("{}: {error}", self.stats.name),
            }
        }
        while let Some(request) = self.inbox.take() {
            if self.is_too_old(&request, now) {
                self.stats.lose(DropReason::TooOld, request.tally);
            } else {
                self.sending = Some(Sending::FromMemory(request.clone()));
                return Some(request);
            }
        }
        self.count();
        None
    }

    fn is_too_old(&self, request: &Request, now: SystemTime) -> bool {
        now.duration_since(request.closed).is_ok_and(|age| age > self.max_age)
    }

    /// What was being sent has to be sent again. Meanwhile it is one of those that wait, and may have to make room: else one
    /// that a receiver never takes would keep all others.
    fn give_back(&mut self) {
        // (What is in the spool came later.)
        let is_overtaken = self.spool.as_ref().is_some_and(|spool| !spool.is_empty());
        match self.sending.take() {
            Some(Sending::FromMemory(request)) if is_overtaken => self.sending = Some(Sending::FromMemory(request)),
            Some(Sending::FromMemory(request)) => self.inbox.put_back(request),
            Some(Sending::FromSpool(_)) | None => {}
        }
        self.count();
    }

    /// What was being sent needs no sending any more. False: it had to make room meanwhile, and was counted.
    fn done(&mut self) -> bool {
        let was_there = match (self.sending.take(), &mut self.spool) {
            (Some(Sending::FromSpool(number)), Some(spool)) => spool.pop(number),
            _ => true,
        };
        self.count();
        was_there
    }

    /// Whether what waits survives the agent.
    fn is_safe(&self) -> bool {
        self.spool.is_some() && !self.spool_failed && !matches!(self.sending, Some(Sending::FromMemory(_)))
    }

    /// Stores what is left, and counts what cannot be.
    fn settle(&mut self) {
        if let Some(Sending::FromMemory(request)) = self.sending.take() {
            self.inbox.put_back(request);
        }
        self.store();
        while let Some(request) = self.inbox.take() {
            self.stats.lose(DropReason::Shutdown, request.tally);
        }
        self.count();
    }

    /// Counts what was dropped, and tells how much waits.
    fn count(&mut self) {
        let sending = match &self.sending {
            Some(Sending::FromMemory(request)) => Some(request),
            _ => None,
        };
        let mut oldest = sending.map(|request| request.closed);
        if let Some(spool) = &mut self.spool {
            for dropped in spool.take_dropped() {
                let reason = match dropped.reason {
                    spool::DropReason::Space => DropReason::SpoolFull,
                    spool::DropReason::Age => DropReason::TooOld,
                    spool::DropReason::Damaged => DropReason::Damaged,
                };
                self.stats.lose(reason, dropped.tally);
            }
            self.stats.set_in_spool(Waiting {
                requests: spool.len() as u64,
                bytes: spool.bytes(),
                tally: spool.tally(),
            });
            oldest = oldest.or(spool.oldest());
        }
        let mut in_memory = self.inbox.waiting();
        if let Some(request) = sending {
            in_memory.requests += 1;
            in_memory.bytes += request.body.len() as u64;
            in_memory.tally += request.tally;
        }
        self.stats.set_in_memory(in_memory);
        self.stats.set_oldest(oldest.or(self.inbox.oldest()));
    }
}

/// What may be wrong with a receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Complaint {
    Failed(Reason),
    Rejected,
}

/// Says everything once, and rarely again.
#[derive(Debug, Default)]
struct Complaints {
    last: Option<(Complaint, Instant)>,
}

impl Complaints {
    /// Whether it should be said.
    fn is_news(&mut self, complaint: Complaint) -> bool {
        let is_known = self.last.is_some_and(|(last, since)| last == complaint && since.elapsed() < REPEAT);
        if !is_known {
            self.last = Some((complaint, Instant::now()));
        }
        !is_known
    }

    /// Notes that all is well. Whether it was not.
    fn is_over(&mut self) -> bool {
        self.last.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        export::otlp::client::{Compression, Endpoint, Protocol, Settings, Tls, UrlPath},
        profile::Tally,
    };

    /// A request that is sent again and again is one of those that wait: it makes room for newer ones like all others, and
    /// what is left at the end is counted.
    #[test]
    fn what_is_never_taken_makes_room() {
        // Nobody listens there.
        let endpoint = Endpoint::parse("http://127.0.0.1:1", Protocol::Grpc, UrlPath::OrStandard).expect("an endpoint");
        let client = Client::new(Settings {
            name: "nobody".to_owned(),
            endpoint,
            protocol: Protocol::Grpc,
            compression: Compression::None,
            timeout: Duration::from_secs(10),
            headers: Vec::new(),
            bearer_token_file: None,
            tls: Tls::default(),
        });
        let (inbox, stats) = (Arc::new(Inbox::new(100)), Arc::new(DestinationStats::new("nobody".to_owned())));
        let client = client.expect("valid settings");
        let destination = Destination::new(client, Arc::clone(&inbox), None, Duration::MAX, Arc::clone(&stats));
        let (set_deadline, deadline) = watch::channel(None);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an event loop");
            runtime.block_on(destination.run(deadline));
        });
        let request = |samples| Request {
            body: vec![0; 60].into(),
            tally: Tally { samples, off_cpu_ns: 0 },
            profiles: 1,
            closed: SystemTime::UNIX_EPOCH,
        };
        assert_eq!(inbox.put(request(1)).samples, 0);
        let failures = || stats.failures().iter().map(|(_, count)| count).sum::<u64>();
        while failures() == 0 || inbox.waiting().requests == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(inbox.put(request(2)).samples, 1);
        inbox.close();
        set_deadline.send(Some(Instant::now())).expect("it runs");
        thread.join().expect("it ends");
        assert_eq!(stats.dropped()[DropReason::Shutdown as usize], (DropReason::Shutdown, request(2).tally));
        assert_eq!(stats.waiting(), [Waiting::default(); 2]);
    }
}
