//! The daemon: starts and stops collection, keeps it within its budget, and follows the configuration.
//!
//! One loop, on the main thread. Whatever is decided here is small; all the work is done by the threads of the pipeline
//! and of the exporters.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tracing::{error, info, warn};

use super::{
    books::books,
    capture::{
        Ended, Order,
        running::{self, Captures, Means},
    },
    collection::{Collection, Plan, Surroundings, label_options},
    delivery::{delivery_options, destinations},
    demand::{Declined, Demand},
    effort::{deferred_work, describe, governor, pace, schedule, wanted},
    governor::Governor,
    kill_switch::KillSwitch,
    reload::Source,
    signals::Signals,
    socket::{self, Command},
    spending::{Meter, memory},
    stats::ControlStats,
};
use crate::{
    allowance::Allowance,
    config::{Config, Overrides, Request},
    export::delivery::{Delivering, Delivery},
    kernel, label,
    pipeline::{PROFILE_QUEUE, Pace},
    profile::Profile,
    redact::Redaction,
    schedule::{Phase, Schedule},
    status::{self, Access, Stats},
};

/// How long the last window may take to be delivered at shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two looks at the stop file, the configuration file and the schedule.
const LOOK: Duration = Duration::from_millis(500);
/// Looks in a second: the budget is seen to once in so many.
const LOOKS_PER_SECOND: u32 = 2;
/// Seconds until collection is tried again where it could not be resumed.
const RETRY_SECONDS: u32 = 10;
/// Commands, and rules that have fired, that may wait.
const DEMAND_QUEUE: usize = 8;

/// What the command line says.
pub struct Options {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// What flags and environment set.
    pub overrides: Overrides,
    /// The kernel's type information.
    pub btf: PathBuf,
    /// Whether kernel programs write to the log.
    pub kernel_debug: bool,
    /// Hides from the log what is to be hidden from now on.
    pub redact_log: fn(&Redaction),
}

/// Whether anything is collected.
enum State {
    Running(Collection),
    /// Nothing is attached; what was collected is still being handed on.
    Stopping(JoinHandle<anyhow::Result<()>>),
    Stopped,
}

struct Daemon {
    source: Source,
    redact_log: fn(&Redaction),
    config: Config,
    surroundings: Surroundings,
    labels: label::Options,
    kill_switch: KillSwitch,
    schedule: Schedule,
    phase: Phase,
    governor: Governor,
    meter: Meter,
    state: State,
    captures: Captures,
    /// Seconds until collection is tried again, after it could not be started.
    retry: u32,
    stats: Arc<Stats>,
}

/// Runs until it is told to end.
pub async fn run(options: Options, config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::catch()?;
    let listen = config.status.listen;
    let access = Access::open(config.status.access.clone()).map_err(anyhow::Error::msg)?;
    let listener =
        TcpListener::bind(listen).await.with_context(|| format!("the status endpoint cannot listen on {listen}"))?;
    let stats = Arc::new(Stats::default());
    let labels = labels_of(&config, &stats)?;
    let delivery = Delivery::open(delivery_options(config.export.clone()), &stats)?;
    // (Captures may end at the same time as a window does.)
    let (profiles, queue) = mpsc::channel(PROFILE_QUEUE + config.capture.limits.max_running);
    let status = tokio::spawn(status::serve(listener, access, Arc::clone(&stats)));
    let (demands, mut demanded) = mpsc::channel(DEMAND_QUEUE);
    let control = socket::listen(&config.control.socket, demands.clone());
    let captures = Captures::new(&config.capture, &stats, demands);
    let mut daemon = Daemon::new(options, config, labels, profiles, captures, &stats)?;
    let mut delivering = delivery.start(queue)?;
    info!(
        "exporting to {} every {}; status on http://{}/metrics",
        destinations(&stats),
        humantime::format_duration(daemon.config.export.window),
        listen,
    );
    if daemon.config.schedule.replicas.is_some() && daemon.config.kubernetes.is_none() {
        warn!("schedule.replicas holds for nobody: nothing here knows pods (see kubernetes)");
    }
    if let Some(number) = kernel::pid_namespace() {
        info!("only processes of the agent's own PID namespace ({number}) are seen");
    }

    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut look = 0_u32;
    let failed = loop {
        tokio::select! {
            _ = signals.interrupt.recv() => { info!("interrupted: exporting the last window"); break false; }
            _ = signals.terminate.recv() => { info!("terminated: exporting the last window"); break false; }
            _ = signals.hangup.recv() => daemon.reload(true),
            _ = signals.stop.recv() => daemon.kill_switch.command(true),
            _ = signals.resume.recv() => daemon.kill_switch.command(false),
            Some(demand) = demanded.recv() => daemon.meet(demand),
            _ = looks.tick() => {
                look = look.wrapping_add(1);
                daemon.kill_switch.look();
                daemon.follow_schedule();
                daemon.reload(false);
                if look.is_multiple_of(LOOKS_PER_SECOND) {
                    daemon.keep_budget();
                }
            }
            // (That its queue is closed means that nothing can be delivered.)
            _ = &mut delivering.ended => break true,
            failed = daemon.state_changes() => if failed { break true },
        }
        daemon.reconcile();
    };
    stats.set_ready(false);
    let outcome = daemon.end(delivering).await;
    status.abort();
    control.end();
    if failed { outcome.and(Err(anyhow::anyhow!("collection ended"))) } else { outcome.map(|()| ExitCode::SUCCESS) }
}

impl Daemon {
    fn new(
        options: Options,
        config: Config,
        labels: label::Options,
        profiles: mpsc::Sender<Profile>,
        captures: Captures,
        stats: &Arc<Stats>,
    ) -> anyhow::Result<Self> {
        let surroundings = Surroundings {
            btf: options.btf,
            kernel_debug: options.kernel_debug,
            allowance: Arc::new(Allowance::default()),
            stats: Arc::clone(stats),
            profiles,
        };
        let kill_switch = KillSwitch::new(config.control.stop_file.clone(), config.control.stopped);
        let schedule = schedule(&config)?;
        let mut daemon = Self {
            phase: schedule.at(SystemTime::now()),
            schedule,
            redact_log: options.redact_log,
            source: Source::new(options.config, options.overrides),
            governor: governor(&config),
            config,
            labels,
            kill_switch,
            meter: Meter::new(stats, Arc::clone(&surroundings.allowance)),
            surroundings,
            state: State::Stopped,
            captures,
            retry: 0,
            stats: Arc::clone(stats),
        };
        daemon.surroundings.allowance.set_rate(deferred_work(&daemon.config));
        if daemon.kill_switch.is_off() {
            daemon.say_stopped();
        } else {
            daemon.start()?;
        }
        Ok(daemon)
    }

    /// Brings what is done into line with what is to be done.
    fn reconcile(&mut self) {
        let is_off = self.kill_switch.is_off();
        self.stats.set_stopped(is_off);
        if is_off {
            self.captures.end(Ended::Stopped);
        }
        match &self.state {
            State::Running(_) if is_off => self.stop(),
            State::Stopped if !is_off && self.retry == 0 => {
                if let Err(error) = self.start() {
                    self.retry = RETRY_SECONDS;
                    error!("collection cannot go on: {error:#}; it is tried again in {RETRY_SECONDS} s");
                }
            }
            _ => {}
        }
    }

    fn start(&mut self) -> anyhow::Result<()> {
        let plan = Plan::new(&self.config, self.labels.clone(), self.pace())?;
        let collection = Collection::start(plan, &self.surroundings)?;
        info!("{}", collection.description);
        self.state = State::Running(collection);
        // (What it takes to begin is over, and says nothing of what comes.)
        self.governor.begin();
        self.meter = Meter::new(&self.stats, Arc::clone(&self.surroundings.allowance));
        self.stats.set_ready(true);
        Ok(())
    }

    /// Detaches everything, now.
    fn stop(&mut self) {
        if let State::Running(collection) = std::mem::replace(&mut self.state, State::Stopped) {
            self.state = State::Stopping(collection.stop());
            self.stats.set_ready(false);
            self.stats.set_clock(0);
            if self.kill_switch.is_off() {
                self.say_stopped();
            }
        }
    }

    fn say_stopped(&self) {
        let reasons: Vec<String> = self.kill_switch.reasons().iter().map(ToString::to_string).collect();
        info!("stopped by {}: no kernel program is attached, nothing is collected", reasons.join(" and "));
        self.stats.set_stopped(true);
    }

    /// Resolves when collection has ended: true, if by itself.
    async fn state_changes(&mut self) -> bool {
        match &mut self.state {
            State::Running(collection) => {
                // Nobody reports an exit here: the sender is gone.
                let _ = collection.failed().await;
                self.stop();
                true
            }
            State::Stopping(flushing) => {
                let outcome = flushing.await;
                self.state = State::Stopped;
                match outcome {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => error!("collection ended badly: {error:#}"),
                    Err(error) => error!("collection ended badly: {error}"),
                }
                kernel::release_free_memory();
                false
            }
            State::Stopped => std::future::pending().await,
        }
    }

    fn meet(&mut self, demand: Demand) {
        // An error in what follows means that nobody waits for the answer any more.
        match demand {
            Demand::Command(command, reply) => {
                let state = self.obey(command);
                let _ = reply.send(state);
            }
            Demand::Capture(request, reply) => match self.understand(*request) {
                Ok(order) => {
                    self.capture(&order, Some(reply));
                }
                Err(error) => {
                    let _ = reply.send(Err(Declined::Invalid(format!("{error:#}"))));
                }
            },
            Demand::Trigger(trigger, reply) => {
                // (What fired before the configuration changed may not be a rule any more.)
                let is_rule = self.config.capture.rules.contains(&trigger.rule);
                let _ = reply.send(is_rule && self.capture(&Order::from(&trigger), None));
            }
        }
    }

    fn understand(&self, request: Request) -> anyhow::Result<Order> {
        let order = request.validate(self.config.kubernetes.is_some())?;
        let mut pids = order.scope.iter().flat_map(|scope| &scope.pids);
        match pids.find(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            Some(pid) => bail!("scope: pids: there is no process {pid}"),
            None => Ok(order),
        }
    }

    fn obey(&mut self, command: Command) -> socket::State {
        match command {
            Command::Stop => self.kill_switch.command(true),
            Command::Resume => self.kill_switch.command(false),
            Command::Reload => self.reload(true),
            Command::State => {}
        }
        self.kill_switch.look();
        self.reconcile();
        socket::State {
            collecting: matches!(self.state, State::Running(_)),
            stopped_by: self.kill_switch.reasons().into_iter().map(|reason| reason.label().to_owned()).collect(),
            frequency: self.governor.effort().frequency,
            captures: self.captures.list(),
        }
    }

    /// Starts a capture, if it may be. Whether it is.
    fn capture(&mut self, order: &Order, reply: Option<running::Reply>) -> bool {
        self.kill_switch.look();
        if self.kill_switch.is_off() {
            self.captures.refuse_stopped(reply);
            return false;
        }
        let debuginfod = match &self.state {
            State::Running(collection) => collection.debuginfod(),
            State::Stopping(_) | State::Stopped => None,
        };
        let (config, labels, surroundings) = (&self.config, self.labels.clone(), &self.surroundings);
        self.captures.start(order, Means { config, labels, surroundings, debuginfod }, reply)
    }

    /// Sees to the budget, once a second.
    fn keep_budget(&mut self) {
        self.retry = self.retry.saturating_sub(1);
        // What is stopped rests.
        let State::Running(collection) = &self.state else { return };
        collection.count(&self.stats);
        let spent = self.meter.read(&self.stats, self.governor.effort().wait_share.is_some());
        let memory = memory();
        let (cost, budget) = (self.governor.cost(), self.governor.budget());
        // (Each change of the effort begins to add up the cost anew.)
        let is_least = self.governor.effort().frequency <= self.governor.least_frequency();
        self.captures.keep_budget(is_least && cost > budget);
        let captures = !self.captures.is_empty();
        if (self.phase.collects || captures) && self.governor.observe(spent, memory, collection.has_reached_pace()) {
            let effort = self.governor.effort();
            info!("{}", describe(&effort, &wanted(&self.config), cost, budget));
            collection.set_pace(self.pace());
            kernel::release_free_memory();
        }
        self.stats.control.set(ControlStats {
            effort: Some(self.governor.effort()),
            cost: self.governor.cost(),
            budget,
            memory: memory.unwrap_or_default(),
            memory_budget: self.config.budget.memory,
        });
        self.stats.control.add(&spent);
    }

    fn pace(&self) -> Pace {
        pace(&self.config, &self.governor.effort(), &self.phase, self.schedule.replicas())
    }

    /// Begins and ends to collect as the schedule has it.
    fn follow_schedule(&mut self) {
        let now = SystemTime::now();
        let before = self.phase;
        // (A clock that was set back may be far from the end of a phase.)
        if !self.schedule.is_always() {
            self.phase = self.schedule.at(now);
        }
        if self.phase.collects != before.collects
            && let State::Running(collection) = &self.state
        {
            collection.set_pace(self.pace());
        }
    }

    /// Takes over the configuration file, if it has changed, or `always`.
    fn reload(&mut self, always: bool) {
        let config = match self.source.read(always) {
            None => return,
            Some(Ok(config)) => config,
            Some(Err(error)) => {
                self.stats.config_refused.add(1);
                return error!("the configuration is left as it is: {error:#}");
            }
        };
        self.stats.config_loaded.add(1);
        if config == self.config {
            return info!("the configuration was read again: nothing has changed");
        }
        if let Err(error) = self.take_over(config) {
            self.stats.config_refused.add(1);
            error!("the configuration is left as it is: {error:#}");
        }
    }

    fn take_over(&mut self, config: Config) -> anyhow::Result<()> {
        let old = &self.config;
        if config.status != old.status || config.export != old.export || config.control.socket != old.control.socket {
            bail!("export, status.listen and control.socket only change with a restart of the agent");
        }
        let needs_restart = restarts(&config, old);
        let schedule = schedule(&config)?;
        if config.kubernetes != old.kubernetes || config.labels != old.labels || config.redact != old.redact {
            self.labels = labels_of(&config, &self.stats)?;
        }
        self.kill_switch.configure(config.control.stop_file.clone(), config.control.stopped);
        (self.phase, self.schedule) = (schedule.at(SystemTime::now()), schedule);
        (self.redact_log)(&config.redact);
        self.captures.configure(&self.config.capture, &config.capture);
        self.config = config;
        self.governor = governor(&self.config);
        self.surroundings.allowance.set_rate(deferred_work(&self.config));
        info!("the configuration was read again, and holds from now on");
        if needs_restart {
            // What was collected is exported as any window; collection goes on as soon as it is on its way.
            self.stop();
        } else if let State::Running(collection) = &self.state {
            collection.set_pace(self.pace());
            collection.set_scope(self.config.scope.clone());
        }
        Ok(())
    }

    /// Ends collection and delivers what there is.
    async fn end(mut self, delivering: Delivering) -> anyhow::Result<()> {
        self.stop();
        let flushing = match std::mem::replace(&mut self.state, State::Stopped) {
            State::Stopping(flushing) => Some(flushing),
            State::Running(_) | State::Stopped => None,
        };
        let (stats, events) = (Arc::clone(&self.stats), self.config.events);
        let captures = self.captures.finish();
        // The queue of profiles is closed behind the last one.
        drop((self.surroundings, self.state));
        // (An error means that a thread panicked, which was said.)
        let _ = tokio::task::spawn_blocking(move || delivering.finish(FLUSH_TIMEOUT)).await;
        let outcome = match flushing {
            Some(flushing) => flushing.await.context("collection ended badly").and_then(|outcome| outcome),
            None => Ok(()),
        };
        captures.await;
        for line in books(&stats, events) {
            info!("{line}");
        }
        outcome
    }
}

/// Whose samples they are, as the configuration has it.
fn labels_of(config: &Config, stats: &Stats) -> anyhow::Result<label::Options> {
    let Config { kubernetes, labels, redact, export, .. } = config.clone();
    label_options(kubernetes, labels, redact, Some(export.window), stats)
}

/// Whether what is different takes a new collection.
fn restarts(new: &Config, old: &Config) -> bool {
    new.events != old.events
        || new.waits.min_duration != old.waits.min_duration
        || new.table_bytes != old.table_bytes
        || new.debuginfod != old.debuginfod
        || new.source != old.source
        || new.kubernetes != old.kubernetes
        || new.labels != old.labels
        || new.redact != old.redact
        // The buffers were made for the old one.
        || new.frequency > old.frequency
}
