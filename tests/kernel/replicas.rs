//! Replicas that take turns: what is seen of one stands for all turns.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    thread,
    time::{Duration, UNIX_EPOCH},
};

use profiler_tests::{
    cluster::{Cluster, objects},
    container::{Cgroups, Runc},
    eventually, kernel_is_usable,
    recorded::{begin, duration, samples},
    scratch,
    stopped::Stopped,
};

use crate::scope::{Daemon, cgroup_folder, cluster_with_account, run_in, runs};

/// What the kernel says that a container has used the CPU for, seconds.
fn cgroup_cpu_seconds(path: &str) -> f64 {
    let by_controller = Path::new("/sys/fs/cgroup/cpuacct").join(&path[1..]).join("cpuacct.usage");
    let unified = Path::new("/sys/fs/cgroup").join(&path[1..]).join("cpu.stat");
    let read = |text: String, unit: f64| text.trim().parse::<f64>().expect("a time") / unit;
    match fs::read_to_string(by_controller) {
        Ok(text) => read(text, 1e9),
        Err(_) => {
            let text = fs::read_to_string(unified).expect("a cgroup's books");
            let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).expect("a time");
            read(usage.to_owned(), 1e6)
        }
    }
}

/// Two pods of one Deployment take turns of 5 s, and what is seen of each stands for both turns, on the CPU and off it; what is
/// no replica is seen all the time and counts once.
#[test]
fn replicas_take_turns() {
    const NODE: &str = "here";
    const SLOT: u64 = 5;
    const SLOTS: u64 = 6;
    const PODS: [&str; 3] = ["web-6c1f-0", "web-6c1f-1", "alone"];
    if !kernel_is_usable() {
        return;
    }
    let Some(cluster) = Cluster::start("replicas") else { return };
    let (folder, _cgroups) = (scratch("replicas-agent"), Cgroups(&["kubepods"]));
    let account = cluster_with_account(&cluster, NODE);
    let deployment = cluster.create(&objects::workload("Deployment", "shop", "web"));
    let set = cluster.create(&objects::owned_by(objects::workload("ReplicaSet", "shop", "web-6c1f"), &deployment));
    let runc = Runc::new("replicas-containers", "burner", &PODS.map(str::to_owned));
    let mut running = Vec::new();
    let paths = [0, 1, 2].map(|number| {
        let (name, id) = (PODS[number], Runc::id(number as u64));
        let mut pod = objects::pod("shop", name, NODE, &["main"]);
        if name != "alone" {
            pod = objects::owned_by(objects::labelled(pod, "pod-template-hash", "6c1f"), &set);
        }
        let pod = cluster.run_pod(&pod, &[("main", &format!("containerd://{id}"))]);
        let path = format!("/kubepods/besteffort/pod{}/{id}", pod["metadata"]["uid"].as_str().expect("a UID"));
        running.push(runc.start(&id, &path, &[&format!("/bin/{name}"), "1", "600"]));
        eventually(name, Duration::from_secs(60), || runs(name).then_some(()));
        path
    });
    let more = format!(
        "kubernetes: {{enabled: true, node: {NODE}, kubeconfig: {}}}\n\
         schedule: {{every: {SLOT}s, replicas: {{of: 2}}}}\n",
        account.kubeconfig.display()
    );
    let daemon = Daemon::start(&folder, "both, wait_stacks: 0", &more);
    daemon.wait_for("samples_extrapolated_total", |samples| samples > 100.0);
    let since_epoch = || UNIX_EPOCH.elapsed().expect("a clock after 1970");
    let sleep_until = |seconds: f64| thread::sleep(Duration::from_secs_f64(seconds).saturating_sub(since_epoch()));
    // Far from the end of a turn, in which one of the two is. That one's long wait is seen from its beginning.
    sleep_until(((since_epoch().as_secs() / SLOT + 1) * SLOT) as f64 + 1.5);
    let sleepers = paths[..2].iter().map(|path| cgroup_folder(path)).flat_map(|cgroup| {
        let short = r#"-c 'import time
while True: time.sleep(0.5)'"#;
        [run_in(&cgroup, Path::new("python3"), short), run_in(&cgroup, Path::new("sleep"), "600")]
    });
    running.extend(sleepers.collect::<Vec<_>>());
    // The machine has other things to do, so that what a pod uses in one slot says little of another: the books are read at
    // the end of each.
    let first = since_epoch().as_secs() / SLOT + 1;
    let mut books = Vec::new();
    for slot in first..=first + SLOTS {
        sleep_until((slot * SLOT) as f64);
        books.push(paths.each_ref().map(|path| cgroup_cpu_seconds(path)));
    }
    thread::sleep(Duration::from_secs(2));
    println!("{} undecided", daemon.metric("samples_undecided_total"));
    let profiles = daemon.profiles.clone();
    drop(running);
    let said = daemon.end();
    let stopped = Stopped::of(&said);
    println!("{stopped:?}");
    assert!(stopped.balances() && stopped.extrapolated > 0, "{said}");

    // CPU seconds by slot and pod, of windows that began in it, and of those that were in it from its second second to its end.
    let (mut seen, mut within) = (vec![[0.0; 3]; SLOTS as usize], vec![[0.0; 3]; SLOTS as usize]);
    let mut slept = BTreeMap::<String, [f64; 3]>::new();
    for entry in fs::read_dir(profiles).expect("a folder") {
        let profile = fs::read(entry.expect("an entry").path()).expect("a profile");
        let begun = begin(&profile).duration_since(UNIX_EPOCH).expect("a time after 1970");
        let since = begun.as_secs_f64() - (first * SLOT) as f64;
        let (slot, until) = (since.div_euclid(SLOT as f64), since + duration(&profile).as_secs_f64());
        let is_within = since.rem_euclid(SLOT as f64) >= 1.0 && until <= (slot + 1.0) * SLOT as f64;
        for sample in samples(&profile) {
            assert_eq!(sample.marks.get("profiler.schedule.replicas").map(String::as_str), Some("1/2"));
            let pod = PODS.iter().position(|name| sample.resource.get("k8s.pod.name").is_some_and(|pod| pod == name));
            let Some(pod) = pod.filter(|_| (0.0..SLOTS as f64).contains(&slot)) else { continue };
            let seconds = sample.time_ns as f64 / 1e9;
            if sample.is_wait {
                slept.entry(sample.process).or_default()[pod] += seconds;
            } else {
                seen[slot as usize][pod] += seconds;
                within[slot as usize][pod] += if is_within { seconds } else { 0.0 };
            }
        }
    }
    let (mut turns, mut used, mut scaled, mut in_turns) = (Vec::new(), [0.0; 3], [0.0; 3], 0.0);
    for (slot, pair) in books.windows(2).enumerate() {
        let now = [0, 1, 2].map(|pod| pair[1][pod] - pair[0][pod]);
        let turn = usize::from(seen[slot][1] > seen[slot][0]);
        println!("slot {slot}: used {now:.2?}, seen and scaled {:.2?}", seen[slot]);
        assert!(within[slot][turn] > 0.0 && within[slot][1 - turn] == 0.0, "not alone: {:?}", within[slot]);
        turns.push(turn);
        in_turns += 2.0 * now[turn];
        for pod in 0..3 {
            used[pod] += now[pod];
            scaled[pod] += seen[slot][pod];
        }
    }
    println!(
        "turns {turns:?}; used {used:.2?}, seen and scaled {scaled:.2?}, twice what was used in turns {in_turns:.2}"
    );
    let share = |pod: usize| turns.iter().filter(|&&turn| turn == pod).count();
    assert!(share(0).abs_diff(share(1)) <= 2, "{turns:?}");
    let about = |value: f64, truth: f64, margin: f64| (value / truth - 1.0).abs() <= margin;
    assert!(about(scaled[0] + scaled[1], in_turns, 0.1) && about(scaled[2], used[2], 0.1));
    assert!(about(scaled[0] + scaled[1], used[0] + used[1], 0.1));
    // Of waits, those that began before a turn are missed in it; of the longest, one is seen in all of its turns.
    let all = (SLOTS * SLOT) as f64;
    println!("waited, in {all} s each: {slept:.1?}");
    let of =
        |name: &str| slept.iter().find(|(process, _)| process.starts_with(name)).map_or([0.0; 3], |(_, time)| *time);
    let (short, long) = (of("python3"), of("sleep"));
    assert!(about(short[0] + short[1], 2.0 * all * 0.95, 0.15) && about(long[0] + long[1], all, 0.3));
}
