//! Servers as Debian ships them, without their symbols and debug files: how many of their frames have names?
//!
//! Printed, by where names were found, and by why there was none. That is no promise: what a file does not say, nobody
//! can know. What is promised is that no frame goes without a name and a reason for it.

use std::{collections::BTreeMap, fs, os::unix::fs::chown, path::PathBuf, process::Command, time::Duration};

use profiler_tests::{
    Background, agent, eventually, free_port, kernel_is_usable, record,
    recorded::{Frame, samples},
    run, scratch, stderr, stdout,
};

/// Where Debian has PostgreSQL, by version.
const POSTGRES: &str = "/usr/lib/postgresql";
/// Files of which shares are printed.
const TOP: usize = 4;

/// Records a server with its children while it is busy, and prints how its user frames are named.
fn check(name: &str, server: &Background, load: &mut Command) {
    let load = Background::start(load);
    let recording = scratch("servers").join(name).with_extension("otlp");
    let mut command = Command::new(agent());
    command.args(["--log-level", "debug"]).args(
        record(&["--frequency", "499", "--duration", "4s", "--pid", &server.pid().to_string(), "--output"]).get_args(),
    );
    let output = run(command.arg(&recording));
    assert!(output.status.success(), "{name}: {}", stderr(&output));
    drop(load);

    let samples = samples(&fs::read(&recording).expect("the recording"));
    let (mut all, mut named) = (0, 0);
    let mut reasons: BTreeMap<&str, u64> = BTreeMap::new();
    let mut files: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for sample in &samples {
        for frame in sample.frames.iter().filter(|frame| frame.kind == "native") {
            let Frame { name, nameless, file, .. } = &**frame;
            let shares = files.entry(file.rsplit('/').next().unwrap_or(file)).or_default();
            all += sample.count;
            shares.1 += sample.count;
            if name.is_some() {
                named += sample.count;
                shares.0 += sample.count;
            } else {
                // Code in no file has no reason to tell: that is what it is.
                assert!(nameless.is_some() || file.is_empty(), "{name:?} without a reason: {frame:?}");
                *reasons.entry(nameless.as_deref().unwrap_or("in no file")).or_default() += sample.count;
            }
        }
    }
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    println!("{name}: {:.1} % of {all} user frames have names", percent(named, all));
    for (reason, count) in reasons {
        println!("    {:5.1} % {reason}", percent(count, all));
    }
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_unstable_by_key(|(_, (_, all))| std::cmp::Reverse(*all));
    for (file, (named, of)) in files.into_iter().take(TOP) {
        println!("    {:5.1} % of frames in {file}, {:.1} % of them named", percent(of, all), percent(named, of));
    }
    let told = stderr(&output);
    let told = told.lines().find_map(|line| line.split_once(" frames named in "));
    println!("    distinct frames: {}", told.map_or("", |(_, rest)| rest));
    assert!(all > 1000, "{name} was not busy");
}

#[test]
fn redis() {
    if !kernel_is_usable() {
        return;
    }
    let port = free_port().to_string();
    let mut server = Command::new("redis-server");
    let server = Background::start(server.args(["--port", &port, "--save", ""]).current_dir(scratch("redis")));
    eventually("redis", Duration::from_secs(20), || {
        run(Command::new("redis-cli").args(["-p", &port, "ping"])).status.success().then_some(())
    });
    let mut load = Command::new("redis-benchmark");
    check("redis-server", &server, load.args(["-p", &port, "-q", "-l", "-t", "set,get,lrange_100,zadd,mset"]));
}

#[test]
fn nginx() {
    if !kernel_is_usable() {
        return;
    }
    let folder = scratch("nginx");
    let port = free_port();
    let place = folder.display();
    let settings = format!(
        "daemon off; worker_processes 1; user root; pid {place}/pid; error_log {place}/error;\n\
         events {{}}\n\
         http {{ access_log {place}/access; gzip on; gzip_types *; gzip_http_version 1.0; client_body_temp_path {place}/body;\n\
         server {{ listen 127.0.0.1:{port}; root {place}; }} }}\n"
    );
    fs::write(folder.join("nginx.conf"), settings).expect("settings");
    let page: String = (0..4000).map(|line| format!("{line}: the quick brown fox\n")).collect();
    fs::write(folder.join("page.html"), page).expect("a page");
    let server =
        Background::start(Command::new("nginx").arg("-p").arg(&folder).arg("-c").arg(folder.join("nginx.conf")));
    let page = format!("http://127.0.0.1:{port}/page.html");
    eventually("nginx", Duration::from_secs(20), || {
        run(Command::new("ab").args(["-n", "1", &page])).status.success().then_some(())
    });
    let mut load = Command::new("ab");
    check(
        "nginx",
        &server,
        load.args(["-q", "-t", "60", "-n", "10000000", "-c", "4", "-H", "Accept-Encoding: gzip", &page]),
    );
    // Its worker ends with it when it is asked to.
    server.signal(nix::sys::signal::Signal::SIGTERM);
    server.finish();
}

/// The newest PostgreSQL's programs.
fn postgres_programs() -> PathBuf {
    let versions = fs::read_dir(POSTGRES).unwrap_or_else(|error| panic!("{POSTGRES}: {error}"));
    let programs = versions.flatten().map(|version| version.path().join("bin"));
    programs.filter(|programs| programs.join("postgres").is_file()).max().expect("a PostgreSQL")
}

#[test]
fn postgres() {
    if !kernel_is_usable() {
        return;
    }
    let programs = postgres_programs();
    // It refuses to be root, and its user may not look into ours' folders.
    let folder = std::env::temp_dir().join(format!("profiler-tests-postgres-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let id = |flag: &str| stdout(&run(Command::new("id").args([flag, "postgres"]))).trim().parse::<u32>().ok();
    let (user, group) = (id("-u").expect("the user postgres"), id("-g").expect("its group"));
    chown(&folder, Some(user), Some(group)).expect("a folder for it");
    let as_postgres = |program: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user.to_string(), "--regid", &group.to_string(), "--clear-groups", "--"]);
        command.arg(programs.join(program)).current_dir(&folder);
        command
    };
    let data = folder.join("data");
    let made = run(as_postgres("initdb").args(["--no-sync", "--auth", "trust", "--pgdata"]).arg(&data));
    assert!(made.status.success(), "{}", stderr(&made));
    let port = free_port().to_string();
    let server = Background::start(
        as_postgres("postgres").args(["-F", "-h", "127.0.0.1", "-p", &port, "-k"]).arg(&folder).arg("-D").arg(&data),
    );
    let bench = |arguments: &[&str]| {
        let mut bench = as_postgres("pgbench");
        bench.args(["--host", "127.0.0.1", "--port", &port]).args(arguments).arg("postgres");
        bench
    };
    eventually("postgres", Duration::from_secs(30), || {
        run(&mut bench(&["--initialize", "--quiet", "--scale", "2"])).status.success().then_some(())
    });
    check("postgres", &server, &mut bench(&["--client", "2", "--time", "60"]));
    // Fast: it ends its sessions.
    server.signal(nix::sys::signal::Signal::SIGINT);
    server.finish();
    fs::remove_dir_all(&folder).expect("its folder");
}
