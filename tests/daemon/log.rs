//! A log that nobody reads, and who writes it.

use crate::DEVICE;
use crate::common::raw::call;
use crate::common::{Daemon, Held, Setup, command, cycle, policy, read_all, until};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::io::PipeReader;

/// A daemon whose log, in JSON, goes into a pipe that nobody reads yet.
fn unread() -> (Daemon, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let narrow = policy("").replace("\"8086:10d3\"", &format!("\"{DEVICE}\""));
    let setup = Setup::policy(narrow).argument("--log-format", "json");
    let mut command = command(directory.path(), &setup);
    command.stderr(writer.try_clone().unwrap());
    let socket = directory.path().join("run/broker.sock");
    let daemon = Daemon::spawn(directory, socket, command);
    // What others share is as it was.
    let flags = OFlag::from_bits_retain(fcntl(&writer, FcntlArg::F_GETFL).unwrap());
    assert!(!flags.contains(OFlag::O_NONBLOCK));
    (daemon, reader)
}

/// Has it log more than finds room anywhere.
fn fill(daemon: &Daemon) {
    let mut client = daemon.connect();
    for _ in 0..100 {
        client.send(&call("Explode", &json!({})).repeat(100));
        for _ in 0..100 {
            client.reply().error("org.varlink.service.MethodNotFound");
        }
    }
}

#[test]
fn a_log_that_nobody_reads_stops_nothing_and_keeps_each_leases_begin_and_end() {
    let (daemon, reader) = unread();
    fill(&daemon);
    let mut client = daemon.connect();
    let denied = call("Acquire", &json!({ "vm": "a", "devices": ["0000:68:00.0"] }));
    for _ in 0..100 {
        client.send(&denied.repeat(100));
        for _ in 0..100 {
            client.reply().error("Denied");
        }
    }
    let leases: Vec<Value> = (0..500)
        .map(|_| {
            let mut held = Held::acquire(&mut client, DEVICE, "container");
            // The lease's own file stays.
            held.fds.drain(..2);
            client.call("Release", held.key()).ok();
            held.reply["lease"].clone()
        })
        .collect();
    let said = std::thread::spawn(|| read_all(reader));
    // The room is told of while it serves.
    cycle(&mut client, DEVICE);
    daemon.signal(Signal::SIGTERM);
    let said = said.join().unwrap();
    // Each line is whole.
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |message: &str| -> Vec<&Value> {
        let starts = |line: &&Value| line["message"].as_str().unwrap().starts_with(message);
        lines.iter().filter(starts).map(|line| &line["lease"]).collect()
    };
    let (begun, ended) = (of("lease begins"), of("lease ends"));
    assert_eq!((begun.len(), ended.len()), (501, 501));
    assert!(begun.iter().zip(&leases).all(|(line, lease)| *line == lease));
    assert!(ended.iter().zip(&leases).all(|(line, lease)| *line == lease));
    let missing = |line: &&Value| line["message"].as_str().unwrap().contains("lines are missing");
    let missing: Vec<_> = lines.iter().filter(missing).collect();
    let dropped: u64 = missing.iter().map(|line| line["others"].as_u64().unwrap()).sum();
    assert!(missing.iter().all(|line| line["leases"] == 0), "{missing:?}");
    let refused = of("refused").len() as u64;
    assert!(dropped > 0 && refused < 10_000, "{dropped} dropped, {refused} refusals");
    assert!(refused + dropped >= 10_000, "{dropped} dropped, {refused} refusals");
}

#[test]
fn a_stuck_log_does_not_hold_up_the_end() {
    let (mut daemon, reader) = unread();
    fill(&daemon);
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    // What waited comes, though the daemon has gone, and nothing keeps the reader waiting.
    drop(held);
    let said = read_all(reader);
    assert!(said.contains("lease begins") && said.contains("lease ends"), "{said}");
    assert!(said.contains("lines are missing"), "{said}");
}

/// The process that writes a daemon's log.
fn writer_of(daemon: &Daemon) -> Option<Pid> {
    let all = crate::common::children(daemon.launcher(), "vfiob-log");
    all.into_iter().next().map(|pid| Pid::from_raw(pid as i32))
}

#[test]
fn who_writes_the_log_is_replaced_when_killed_and_no_line_is_lost() {
    let mut daemon = Daemon::start();
    let mut client = daemon.connect();
    let first = writer_of(&daemon).unwrap();
    kill(first, Signal::SIGKILL).unwrap();
    let held = Held::acquire(&mut client, DEVICE, "container");
    daemon.until_logged("there is another one");
    assert_ne!(writer_of(&daemon).unwrap(), first);
    drop(held);
    let log = daemon.end_and_log();
    assert!(log.contains("lease begins") && log.contains("lease ends"), "{log}");
}

#[test]
fn who_writes_the_log_has_no_rights_and_nothing_else_open() {
    let daemon = Daemon::start();
    let proc = format!("/proc/{}", writer_of(&daemon).unwrap());
    let open = || std::fs::read_dir(format!("{proc}/fd")).unwrap().count();
    let status = || std::fs::read_to_string(format!("{proc}/status")).unwrap();
    until("it has begun", || status().contains("NoNewPrivs:\t1"));
    let nobody = format!("Uid:\t{0}\t{0}\t{0}\t{0}", 65534);
    if nix::unistd::geteuid().is_root() {
        until("it is nobody", || status().contains(&nobody));
        assert!(status().contains("CapEff:\t0000000000000000"), "{}", status());
    }
    assert_eq!(open(), 3);
}

#[test]
fn a_line_too_long_for_the_pipe_is_cut_with_a_mark() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("policy.toml");
    std::fs::write(&file, policy("")).unwrap();
    // As long as a path may be; with the rest of its line it is too long.
    let dots = "./".repeat((4090 - file.to_str().unwrap().len()) / 2);
    let long = format!("{}/{dots}policy.toml", directory.path().display());
    for (format, mark) in [("json", "{\"too_long\":\"{"), ("text", "... (line cut: too long)\n")] {
        let setup = Setup::default().argument("--policy", &long).argument("--log-format", format);
        let log = Daemon::with(setup).end_and_log();
        assert!(log.contains(mark) && log.lines().all(|line| line.len() < 4096), "{log}");
    }
}
