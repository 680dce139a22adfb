//! Captures that run: each is a collection of its own beside the daemon's, for a bounded time, of a part of its scope.
//!
//! What it has counted becomes part of the daemon's counts at its end, and its profile goes where all profiles go.

use std::{
    pin::pin,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use profiler_common::abi::counter::Counter;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
    time::{interval, sleep},
};
use tracing::{debug, error, info, warn};

use super::{
    Ended, Order, Settings,
    limits::{Limits, Permit, Refusal},
    rules::WatchStats,
    watching::Watching,
};
use crate::{
    config::Config,
    control::{
        collection::{Collection, Plan, Surroundings},
        demand::{CaptureState, Declined, Demand},
    },
    kernel::{self, Attachments},
    label,
    pipeline::Pace,
    profile::Mark,
    status::Stats,
    symbolize::{SourceOptions, debuginfod::Debuginfod},
};

/// How long a capture waits at its end for files to be read: less than the agent has at its own end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of kernel memory for rows of unwind tables.
const MAX_TABLE_BYTES: usize = 8 << 20;
/// Least memory for names, bytes: with less, a large program's symbols would be read again and again.
const LEAST_NAMES: usize = 8 << 20;
/// Parts of the daemon's budgets that all captures together may take for names, and each for debug information.
const NAMES_PART: usize = 2;
const DEBUG_INFO_PART: usize = 4;
/// Seconds that the cost has to be above the budget, while nothing else is left to be given up, before captures are ended.
const BUDGET_SECONDS: u32 = 5;
/// Time between two looks at what the kernel programs have counted.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Where the answer about a capture goes.
pub(in crate::control) type Reply = oneshot::Sender<Result<CaptureState, Declined>>;

/// What a capture is made with.
pub(in crate::control) struct Means<'a> {
    pub(in crate::control) config: &'a Config,
    pub(in crate::control) labels: label::Options,
    pub(in crate::control) surroundings: &'a Surroundings,
    pub(in crate::control) debuginfod: Option<Arc<Debuginfod>>,
}

/// Those that run, and what may.
pub(in crate::control) struct Captures {
    limits: Limits,
    running: Vec<Running>,
    watching: Option<Watching>,
    demands: mpsc::Sender<Demand>,
    stats: Arc<Stats>,
    /// Seconds for which they have cost too much.
    too_costly: u32,
}

/// One that runs, until its last sample was handed on.
struct Running {
    state: CaptureState,
    attachments: Attachments,
    ending: Arc<OnceLock<Mark>>,
    /// Ends it before its time.
    end: Option<oneshot::Sender<Ended>>,
    task: JoinHandle<()>,
    _permit: Permit,
}

impl Captures {
    /// None runs yet; containers are watched from now on, if there are rules.
    pub(in crate::control) fn new(settings: &Settings, stats: &Arc<Stats>, demands: mpsc::Sender<Demand>) -> Self {
        Self {
            limits: Limits::new(settings.limits),
            running: Vec::new(),
            watching: Watching::start(settings, stats, &demands),
            demands,
            stats: Arc::clone(stats),
            too_costly: 0,
        }
    }

    /// Another configuration holds from now on: what was begun by the old one ends.
    pub(in crate::control) fn configure(&mut self, old: &Settings, new: &Settings) {
        self.end(Ended::Configuration);
        self.limits.configure(new.limits);
        if (&old.rules, old.interval) != (&new.rules, new.interval) {
            self.stats.captures.set_watched(WatchStats::default());
            self.watching = Watching::start(new, &self.stats, &self.demands);
        }
    }

    /// Captures that are under way.
    pub(in crate::control) fn list(&mut self) -> Vec<CaptureState> {
        self.forget();
        self.running.iter().map(|running| running.state.clone()).collect()
    }

    /// Starts a capture if the limits allow it. Whoever asked for it is told once it runs.
    pub(in crate::control) fn start(&mut self, order: &Order, means: Means<'_>, reply: Option<Reply>) -> bool {
        let subject: Arc<str> = order.subject().into();
        let permit = match self.admit(&subject, order) {
            Ok(permit) => permit,
            Err(refusal) => {
                debug!("no capture of {subject} by {}: {}", order.rule, self.explain(refusal));
                answer(reply, Err(Declined::Refused(refusal, self.explain(refusal))));
                return false;
            }
        };
        let plan = plan(order, &means, self.limits.settings().max_running);
        let state = CaptureState {
            rule: order.rule.to_string(),
            scope: subject.to_string(),
            reason: order.reason.to_string(),
            frequency: plan.config.frequency,
            until: until(permit.capture.duration),
            destinations: self.stats.destinations().iter().map(|destination| destination.name.clone()).collect(),
        };
        let (end, ended) = oneshot::channel();
        let (attachments, ending) = (plan.attachments.clone(), Arc::clone(&plan.ending));
        let stats = self.stats.begin_capture();
        let run = Run {
            state: state.clone(),
            surroundings: Surroundings { stats: Arc::clone(&stats), ..means.surroundings.clone() },
            plan,
            duration: permit.capture.duration,
            ended,
            reply,
        };
        let totals = Arc::clone(&self.stats);
        let task = tokio::spawn(async move {
            let ended = run.carry_out(&stats).await;
            totals.end_capture(&stats);
            totals.captures.add_ended(ended);
        });
        self.running.push(Running { state, attachments, ending, end: Some(end), task, _permit: permit });
        true
    }

    /// Refuses a capture while nothing is to be collected.
    pub(in crate::control) fn refuse_stopped(&mut self, reply: Option<Reply>) {
        let refusal = self.limits.refuse(Refusal::Stopped);
        self.stats.captures.set_decided(&self.limits);
        answer(reply, Err(Declined::Refused(refusal, self.explain(refusal))));
    }

    /// Ends all that run. Their programs are detached before this returns; what was captured is handed on by and by.
    pub(in crate::control) fn end(&mut self, ended: Ended) {
        self.forget();
        for running in &mut self.running {
            let Some(end) = running.end.take() else { continue };
            running.attachments.cut();
            // (One that has just had its time ends as it is.)
            let _ = running.ending.set(Mark { name: "profiler.capture.ended", value: ended.label().into() });
            let _ = end.send(ended);
        }
    }

    /// Ends them if the daemon's own collection has nothing left to give up, and the cost is above the budget all the same.
    /// Call once a second.
    pub(in crate::control) fn keep_budget(&mut self, too_costly: bool) {
        let goes_on = self.running.iter().any(|running| running.end.is_some());
        self.too_costly = if too_costly && goes_on { self.too_costly + 1 } else { 0 };
        if self.too_costly >= BUDGET_SECONDS {
            warn!("captures cost more than the budget allows: they are ended");
            self.end(Ended::Budget);
        }
    }

    /// Whether any is under way.
    pub(in crate::control) fn is_empty(&mut self) -> bool {
        self.forget();
        self.running.is_empty()
    }

    /// Ends all; resolves when everything was handed on.
    pub(in crate::control) fn finish(mut self) -> impl Future<Output = ()> {
        self.end(Ended::Shutdown);
        let tasks: Vec<_> = self.running.drain(..).map(|running| running.task).collect();
        async move {
            for task in tasks {
                // (An error means that it panicked, which was said.)
                let _ = task.await;
            }
        }
    }

    fn admit(&mut self, subject: &Arc<str>, order: &Order) -> Result<Permit, Refusal> {
        self.forget();
        // One that takes long to begin, or to hand on what it has, still takes memory.
        let admitted = if self.running.len() >= self.limits.settings().max_running {
            Err(self.limits.refuse(Refusal::Running))
        } else {
            self.limits.admit(Instant::now(), subject, &order.capture)
        };
        self.stats.captures.set_decided(&self.limits);
        admitted
    }

    /// A refusal for people, with what would be allowed.
    fn explain(&self, refusal: Refusal) -> String {
        let limits = self.limits.settings();
        let why = match refusal {
            Refusal::Running => "as many captures are running as may",
            Refusal::Hourly => "there were as many captures in the last hour as may be",
            Refusal::Cooldown => "this was captured a short time ago",
            Refusal::Stopped => return "nothing is captured while collection is stopped".to_owned(),
        };
        format!(
            "{why} (capture.max_running: {}, per_hour: {}, cooldown: {})",
            limits.max_running,
            limits.per_hour,
            humantime::format_duration(limits.cooldown)
        )
    }

    /// Forgets those that have ended.
    fn forget(&mut self) {
        self.running.retain(|running| !running.task.is_finished());
    }
}

/// One capture, from its start to its end.
struct Run {
    state: CaptureState,
    plan: Plan,
    surroundings: Surroundings,
    duration: Duration,
    ended: oneshot::Receiver<Ended>,
    reply: Option<Reply>,
}

impl Run {
    /// Loads the programs on a thread of its own, since that takes long, and collects until it is over.
    async fn carry_out(self, stats: &Arc<Stats>) -> Ended {
        let Self { mut state, plan, surroundings, duration, ended, reply } = self;
        let subject = state.scope.clone();
        let started = spawn_blocking(move || Collection::start(plan, &surroundings)).await;
        let collection = match started.map_err(anyhow::Error::from).and_then(|started| started) {
            Ok(collection) => collection,
            Err(error) => {
                error!("{subject} cannot be captured: {error:#}");
                answer(reply, Err(Declined::Failed(format!("{error:#}"))));
                return Ended::Failed;
            }
        };
        state.until = until(duration);
        let CaptureState { rule, reason, until, .. } = &state;
        info!("capturing {subject} until {until}, by {rule} ({reason}): {}", collection.description);
        answer(reply, Ok(state));
        let (ended, outcome) = collect(collection, duration, ended, stats).await;
        kernel::release_free_memory();
        let seen = stats.kernel(Counter::Seen);
        match outcome {
            Ok(()) => info!("the capture of {subject} has ended ({}): {seen} samples", ended.label()),
            Err(error) => error!("the capture of {subject} has ended badly: {error:#}"),
        }
        ended
    }
}

/// Collects until the time is over, or somebody ends it.
async fn collect(
    mut collection: Collection,
    duration: Duration,
    mut ended: oneshot::Receiver<Ended>,
    stats: &Stats,
) -> (Ended, anyhow::Result<()>) {
    let mut over = pin!(sleep(duration));
    let mut looks = interval(COUNT_EVERY);
    let ended = loop {
        tokio::select! {
            // (Nobody else has the other end.)
            ended = &mut ended => break ended.unwrap_or(Ended::Shutdown),
            () = &mut over => break Ended::Time,
            _ = collection.failed() => break Ended::Failed,
            _ = looks.tick() => collection.count(stats),
        }
    };
    let outcome = collection.stop().await;
    (ended, outcome.map_err(anyhow::Error::from).and_then(|outcome| outcome))
}

fn answer(reply: Option<Reply>, answer: Result<CaptureState, Declined>) {
    if let Some(reply) = reply {
        // An error means that nobody waits for it any more.
        let _ = reply.send(answer);
    }
}

/// When something ends that begins now.
fn until(duration: Duration) -> String {
    humantime::format_rfc3339_seconds(SystemTime::now() + duration).to_string()
}

/// What a capture collects: what was ordered, and the rest as the configuration has it. Its scope is a part of the
/// configuration's, and its budgets are parts of the daemon's.
fn plan(order: &Order, means: &Means<'_>, max_running: usize) -> Plan {
    let (capture, config) = (&order.capture, means.config);
    let source = SourceOptions {
        lines: capture.lines.unwrap_or(config.source.lines),
        inlines: capture.inlines.unwrap_or(config.source.inlines),
        bytes: config.source.bytes / DEBUG_INFO_PART,
    };
    let frequency = capture.frequency.unwrap_or(config.frequency);
    let mark = |name, value: &str| Mark { name, value: value.into() };
    let pace = Pace {
        collects: true,
        frequency,
        wait_stacks: config.waits.stacks_per_second,
        wait_share: Some(0),
        scale: 1.0,
        replicas: None,
        detail: true,
        names_bytes: (config.names_bytes / NAMES_PART / max_running.max(1)).max(LEAST_NAMES),
        marks: [mark("profiler.capture.rule", &order.rule), mark("profiler.capture.reason", &order.reason)].into(),
    };
    let mut config = config.clone();
    config.frequency = frequency;
    config.events = capture.events.unwrap_or(config.events);
    config.source = source;
    config.table_bytes = config.table_bytes.min(MAX_TABLE_BYTES);
    config.scope.within = order.scope.iter().cloned().collect();
    Plan {
        config,
        labels: means.labels.clone(),
        pace,
        window: None,
        patience: PATIENCE,
        debuginfod: means.debuginfod.clone(),
        attachments: Attachments::default(),
        ending: Arc::default(),
    }
}
