//! What a VM records, and whether what it printed is right.

use std::fmt;

/// Begins the lines by which the VM's first process says what follows.
const MARK: &str = "@@kernels@@ ";
/// Lines that are shown of what a VM says of a run that does not end.
const STUCK_LINES: usize = 400;
/// Seconds that each program runs for.
const SECONDS: &str = "8";
/// Reasons that only the first moments of a program have.
const LEARNING: [&str; 2] = ["[incomplete: table pending]", "[incomplete: unknown process]"];
/// Samples of the first moments that are always allowed: emulated, learning takes its time.
const LEARNING_SAMPLES: u64 = 60;
/// Samples that make a recording worth judging.
const ENOUGH: u64 = 100;
/// Share of samples that has to be right, of those in user mode.
const USER_SHARE: f64 = 0.95;
/// The same for samples in kernel mode, where there are enough of them.
const KERNEL_SHARE: f64 = 0.90;
const ENOUGH_IN_KERNEL: u64 = 20;

/// A recording to make, and what is known about its stacks.
pub(super) struct Run {
    name: &'static str,
    flags: &'static str,
    command: String,
    /// The innermost function of the samples that show the chain.
    leaf: &'static str,
    /// Consecutive frames, the outermost first.
    chain: Vec<String>,
    /// Whether samples in kernel mode have to reach their root as well.
    judges_kernel: bool,
    /// Where waits are recorded: how far a place may be off from what the program says about itself.
    wait_tolerance: Option<f64>,
}

/// All recordings, in the order they are made in.
pub(super) fn runs() -> Vec<Run> {
    let run = |name, program: &str, mode: &str, leaf, chain| Run {
        name,
        flags: "",
        command: format!("/{program} {}", mode.replacen('S', SECONDS, 1)),
        leaf,
        chain,
        // A program that only computes has too few of them.
        judges_kernel: matches!(mode, "chain S" | "signal S"),
        wait_tolerance: None,
    };
    let waits = |name, flags, tolerance| Run {
        flags,
        wait_tolerance: Some(tolerance),
        ..run(name, "waits", "S", "", Vec::new())
    };
    let frames = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
    let around = |middle: Vec<String>| [frames(&["main"]), middle, frames(&["spin_to_deadline", "spin"])].concat();
    let levels = around((1..=30).map(|level| format!("level_{level:02}")).collect());
    let deep = around(vec!["descend".to_owned(); 500]);
    let in_thread = frames(&["thread_main", "work_in_thread", "spin_to_deadline", "spin"]);
    vec![
        run("chain", "shapes", "chain S", "spin", levels.clone()),
        run("chain, shared libraries", "shapes-shared", "chain S", "spin", levels),
        run("deep", "shapes", "deep S 500", "spin", deep.clone()),
        // A kernel with bpf_loop walks as one without it does; there, it makes no difference.
        Run { flags: "--walk-in-parts", ..run("deep, in parts", "shapes", "deep S 500", "spin", deep) },
        run("signal", "shapes", "signal S", "spin", frames(&["on_signal", "in_handler", "spin"])),
        run("vdso", "shapes", "vdso S", "ask_the_vdso", frames(&["main", "ask_the_vdso"])),
        run("threads", "shapes", "threads S", "spin", in_thread),
        // Emulated, learning takes a second, and a rationed stack of that time stands for others too.
        waits("waits", "--event off-cpu --wait-stacks 0", 0.1),
        waits("waits, rationed", "--event off-cpu --wait-stacks 50", 0.5),
        waits("waits, old ways", "--event off-cpu --wait-stacks 0 --walk-in-parts --watch-wakeups", 0.1),
    ]
}

impl Run {
    /// The line that makes the VM's first process do it.
    pub(super) fn line(&self) -> String {
        format!("record '{}' '{}' {}", self.name, self.flags, self.command)
    }
}

/// What one recording showed.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Row {
    release: String,
    name: &'static str,
    user: u64,
    learning: u64,
    rooted: u64,
    /// Rooted samples with the chain's leaf, and those of them that show the chain. Of waits, everything is in
    /// milliseconds, and these are what the program says and how much of it was recorded right.
    leaves: u64,
    exact: u64,
    kernel: u64,
    kernel_rooted: u64,
    /// What is wrong with it.
    complaints: Vec<String>,
}

impl Row {
    pub(super) const HEADER: &str = "kernel                     workload                 user  learning  rooted %  exact %  kernel  rooted %  verdict";

    /// What is wrong with it, as a sentence.
    pub(super) fn failure(&self) -> Option<String> {
        (!self.complaints.is_empty())
            .then(|| format!("{}, {}: {}", self.release, self.name, self.complaints.join("; ")))
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:26} {:23} {:5}  {:8}  {:>8}  {:>7}  {:6}  {:>8}  {}",
            self.release,
            self.name,
            self.user,
            self.learning,
            percent(self.rooted, self.user - self.learning),
            percent(self.exact, self.leaves),
            self.kernel,
            percent(self.kernel_rooted, self.kernel),
            if self.complaints.is_empty() { "ok" } else { "FAILED" }
        )
    }
}

/// Judges everything that a VM printed.
pub(super) fn judge(console: &str, runs: &[Run]) -> Result<Vec<Row>, String> {
    let release =
        console.lines().find_map(|line| said(line, "release ")).ok_or("the VM did not reach its first process")?;
    if !console.lines().any(|line| said(line, "done").is_some()) {
        let stuck = console.lines().skip_while(|line| !line.starts_with("STUCK")).take(STUCK_LINES);
        let stuck: String = stuck.map(|line| format!("\n    | {line}")).collect();
        return Err(format!("the VM ended before it was done{stuck}"));
    }
    let rows = runs.iter().map(|run| row(release, console, run));
    Ok(rows.chain([containers(release, console)]).collect())
}

/// Judges the recording of containers: one that was there before, and one that was made meanwhile.
fn containers(release: &str, console: &str) -> Row {
    let mut row = Row { release: release.to_owned(), name: "containers", ..Row::default() };
    let found = console.lines().find_map(|line| said(line, "containers")).unwrap_or_default();
    for container in ["early", "late"] {
        if !found.split(' ').any(|name| name == container) {
            row.complaints.push(format!("no sample of the {container} container has its ID"));
        }
    }
    row
}

/// Judges one recording.
fn row(release: &str, console: &str, run: &Run) -> Row {
    let mut row = Row { release: release.to_owned(), name: run.name, ..Row::default() };
    let lines = || console.lines().skip_while(|line| said(line, "run ") != Some(run.name)).skip(1);
    let status = lines().next().and_then(|line| said(line, "status "));
    let section = |name| {
        lines().skip_while(move |line| said(line, name).is_none()).skip(1).take_while(|line| !line.contains(MARK))
    };
    if status != Some("0") {
        let last = section("stderr").last().unwrap_or("nothing");
        row.complaints.push(format!("the agent ended with status {}: {last}", status.unwrap_or("unknown")));
        return row;
    }
    if let Some(tolerance) = run.wait_tolerance {
        if !section("stderr").any(|line| line.contains(", 0.000 s lost")) {
            row.complaints.push("time was lost".to_owned());
        }
        row.judge_waits(&section("stdout").collect::<Vec<_>>(), tolerance);
        return row;
    }
    match section("stderr").find_map(books) {
        Some((seen, exported, lost)) if seen == exported && lost == 0 => {}
        Some((seen, exported, lost)) => {
            row.complaints.push(format!("the books say seen {seen} = exported {exported} + lost {lost}"));
        }
        None => row.complaints.push("the agent's last line has no books".to_owned()),
    }
    for line in section("stdout") {
        match line.rsplit_once(' ').and_then(|(stack, count)| Some((stack, count.parse().ok()?))) {
            Some((stack, count)) => row.add(&stack.split(';').collect::<Vec<_>>(), count, run),
            None => row.complaints.push(format!("not a stack: {line:?}")),
        }
    }
    row.complain(run);
    row
}

impl Row {
    /// Adds a stack: its process, its frames or why they are not whole and its frames.
    fn add(&mut self, stack: &[&str], count: u64, run: &Run) {
        let marker = stack.get(1).filter(|frame| frame.starts_with("[incomplete: "));
        let leaf = stack.last().unwrap_or(&"");
        let learning = marker.is_some_and(|reason| LEARNING.contains(reason));
        if leaf.ends_with("_[k]") {
            if learning {
                return;
            }
            self.kernel += count;
            self.kernel_rooted += if marker.is_none() { count } else { 0 };
            return;
        }
        self.user += count;
        match marker {
            Some(_) if learning => self.learning += count,
            Some(_) => {}
            None => {
                self.rooted += count;
                if *leaf == run.leaf {
                    self.leaves += count;
                    let shown = stack.windows(run.chain.len()).any(|frames| frames == run.chain);
                    self.exact += if shown { count } else { 0 };
                }
            }
        }
    }

    /// Compares the places of waits with what the program says about them (`site NAME NANOSECONDS WAITS`).
    fn judge_waits(&mut self, lines: &[&str], tolerance: f64) {
        let stacks: Vec<(Vec<&str>, u64)> = lines
            .iter()
            .filter_map(|line| line.rsplit_once(' '))
            .filter(|(stack, _)| !stack.starts_with("site "))
            .filter_map(|(stack, time)| Some((stack.split(';').collect(), time.parse().ok()?)))
            .collect();
        let milliseconds = |matches: &dyn Fn(&[&str]) -> bool| {
            stacks.iter().filter(|(stack, _)| matches(stack)).map(|(_, time)| time).sum::<u64>() / 1000
        };
        let is_learning = |stack: &[&str]| {
            // Main waits for its threads from the first moment to the last.
            stack.get(1).is_some_and(|marker| LEARNING.iter().any(|learning| marker.contains(learning)))
        };
        self.user = milliseconds(&|_| true);
        self.learning = milliseconds(&is_learning);
        self.rooted = milliseconds(&|stack| !stack.get(1).is_some_and(|frame| frame.starts_with("[incomplete: ")));
        for words in lines.iter().filter_map(|line| line.strip_prefix("site ")).map(|line| line.split(' ')) {
            let words: Vec<&str> = words.collect();
            let [site, own, _] = words[..] else { continue };
            let own = own.parse().unwrap_or(0) / 1_000_000;
            let ours = milliseconds(&|stack| stack.contains(&site));
            self.leaves += own;
            self.exact += own.saturating_sub(own.abs_diff(ours));
            if own.abs_diff(ours) as f64 > tolerance * own as f64 {
                self.complaints.push(format!("{ours} ms recorded in {site} instead of {own}"));
            }
        }
        let known = self.user - self.learning;
        if self.leaves == 0 || (self.rooted as f64) < USER_SHARE * known as f64 {
            self.complaints.push(format!("{} of {known} ms reach their root", self.rooted));
        }
    }

    /// Compares what was counted with what has to be.
    fn complain(&mut self, run: &Run) {
        let below = |part: u64, whole: u64, share: f64| (part as f64) < share * whole as f64;
        let known = self.user - self.learning;
        let mut complain = |wrong: bool, text: String| {
            if wrong {
                self.complaints.push(text);
            }
        };
        complain(known < ENOUGH, format!("only {known} samples in user mode"));
        complain(
            self.learning > LEARNING_SAMPLES.max(self.user / 4),
            format!("{} of {} samples while learning", self.learning, self.user),
        );
        complain(below(self.rooted, known, USER_SHARE), format!("{} of {known} stacks reach their root", self.rooted));
        complain(self.leaves == 0, format!("no whole stack ends in {}", run.leaf));
        complain(
            below(self.exact, self.leaves, USER_SHARE),
            format!("{} of {} stacks that end in {} show its callers", self.exact, self.leaves, run.leaf),
        );
        complain(
            run.judges_kernel
                && self.kernel >= ENOUGH_IN_KERNEL
                && below(self.kernel_rooted, self.kernel, KERNEL_SHARE),
            format!("{} of {} stacks in kernel mode reach their root", self.kernel_rooted, self.kernel),
        );
    }
}

/// What follows in a line by which the first process says something.
fn said<'a>(line: &'a str, what: &str) -> Option<&'a str> {
    line.strip_prefix(MARK)?.strip_prefix(what)
}

/// Samples seen, exported and lost, of the agent's last line.
fn books(line: &str) -> Option<(u64, u64, u64)> {
    let (seen, rest) = line.split_once("seen ")?.1.split_once(" = exported ")?;
    let (exported, rest) = rest.split_once(" + lost ")?;
    let lost = rest.split(|end: char| !end.is_ascii_digit()).next()?;
    Some((seen.parse().ok()?, exported.parse().ok()?, lost.parse().ok()?))
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}", 100.0 * part as f64 / whole as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Judges one recording of `main;work` whose outputs and status are these.
    fn check(status: &str, stderr: &str, stdout: &str, expect: &[&str]) -> Row {
        let run = Run {
            name: "it",
            flags: "",
            command: String::new(),
            leaf: "work",
            chain: vec!["main".to_owned(), "work".to_owned()],
            judges_kernel: true,
            wait_tolerance: None,
        };
        let console = format!(
            "early\n{MARK}release 1.2\n{MARK}run it\n{MARK}status {status}\n{MARK}stderr\n{stderr}\n{MARK}stdout\n{stdout}\n\
             {MARK}end\n{MARK}containers early late\n{MARK}done\n"
        );
        let mut rows = judge(&console, &[run]).expect("the console is whole");
        let row = rows.remove(0);
        assert_eq!(row.complaints.len(), expect.len(), "{:?}", row.complaints);
        for (complaint, expected) in row.complaints.iter().zip(expect) {
            assert!(complaint.contains(expected), "{complaint:?} does not say {expected:?}");
        }
        row
    }

    const BALANCED: &str = "recorded 1 s: 9 samples; seen 9 = exported 9 + lost 0";

    /// Samples of the first moments and of the kernel do not count among those that must be right.
    #[test]
    fn counts_by_kind() {
        let stdout = "it;[incomplete: table pending];x_[k] 2\nit;main;work 190\nit;[incomplete: table pending];work 5\nit;[incomplete: not code];work 4\n\
                      it;[incomplete: not code];read_[k] 3\nit;main;other 1\nit;main;read_[k] 7";
        let row = check("0", BALANCED, stdout, &[]);
        assert_eq!((row.user, row.learning, row.rooted), (200, 5, 191));
        assert_eq!((row.leaves, row.exact, row.kernel, row.kernel_rooted), (190, 190, 10, 7));
    }

    /// Each thing that can be wrong is said.
    #[test]
    fn complains() {
        check("1", "it failed", "", &["status 1: it failed"]);
        check("0", "", "it;main;work 200", &["no books"]);
        check("0", "seen 9 = exported 8 + lost 1", "it;main;work 200", &["lost 1"]);
        check("0", BALANCED, "it;main;work 20", &["only 20"]);
        check("0", BALANCED, "it;main;work 200\nit;[incomplete: not code];work 20", &["200 of 220"]);
        check("0", BALANCED, "it;main;work 200\nit;[incomplete: table pending];work 90", &["90 of 290"]);
        check("0", BALANCED, "it;main;work 200\nit;work 20", &["200 of 220 stacks that end in work"]);
        check("0", BALANCED, "it;main;work 200\nit;[incomplete: not code];x_[k] 20", &["0 of 20 stacks in kernel"]);
        check("0", BALANCED, "it;main;work 200\nnoise", &["not a stack"]);
    }

    /// A VM that did not come to its end is no success.
    #[test]
    fn wants_the_end() {
        assert!(judge("panic", &[]).is_err());
        assert!(judge(&format!("{MARK}release 1.2\n"), &[]).is_err());
    }
}
