//! Limits, and those who have no tenant.

use crate::DEVICE;
use crate::common::raw::{Raw, call};
use crate::common::{self, Daemon, Held, Setup, as_uid, cycle, policy, until};
use serde_json::json;
use std::process::{Command, Stdio};

#[test]
fn who_has_no_tenant_may_ask_what_this_is() {
    let only_root = policy("").replace("anyone = true", "user = 0");
    let daemon = Daemon::with(Setup::policy(only_root));
    let connect = || as_uid(12345, || daemon.connect());
    let Some(mut stranger) = connect() else { return };
    stranger.call("org.varlink.service.GetInfo", json!({})).ok();
    let request = json!({ "vm": "a", "devices": [DEVICE] });
    for _ in 0..100 {
        let denied = stranger.call("Acquire", request.clone()).error("Denied");
        assert!(denied["rule"].as_str().unwrap().starts_with("default deny"), "{denied}");
    }
    stranger.call("Topology", json!({})).error("Denied");
    let logged = |uid: &str| {
        let log = daemon.log();
        log.lines().filter(|line| line.contains("denied") && line.contains(uid)).count()
    };
    // What is left out of one's own does not hide another's.
    as_uid(12346, || daemon.connect()).unwrap().call("Topology", json!({})).error("Denied");
    daemon.until_logged("uid=12346");
    assert_eq!(logged("uid=12346"), 1);
    assert!((1..50).contains(&logged("uid=12345")), "{} lines", logged("uid=12345"));
    // Few connections, and they come back.
    for _ in 0..3 {
        let mut more: Vec<Raw> = (0..15).map(|_| connect().unwrap()).collect();
        connect().unwrap().reply().error("OverLimit");
        for each in &mut more {
            each.call("org.varlink.service.GetInfo", json!({})).ok();
        }
        drop(more);
        until("there is room again", || {
            let mut client = connect().unwrap();
            let info = call("org.varlink.service.GetInfo", &json!({}));
            client.send(&info);
            matches!(client.try_reply(), Some(common::raw::Reply::Ok(..)))
        });
    }
    cycle(&mut daemon.connect(), DEVICE);
}

#[test]
fn connections_leave_room_for_other_files() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = common::command(directory.path(), &Setup::policy(policy("connections = 1000")));
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("ulimit -n 160; exec \"$@\"").arg("sh");
    shell.arg(daemon.get_program()).args(daemon.get_args());
    shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let socket = directory.path().join("run/broker.sock");
    let daemon = Daemon::spawn(directory, socket, shell);
    let mut client = daemon.connect();
    cycle(&mut client, DEVICE);
    let mut crowd: Vec<Raw> = (0..200).map(|_| daemon.connect()).collect();
    // The last ones were turned away, those who were there are served.
    crowd.last_mut().unwrap().reply().error("OverLimit");
    let lease = Held::acquire(&mut client, DEVICE, "container");
    client.call("GetFds", lease.key()).ok();
}

#[test]
fn a_healthy_system_logs_two_lines_a_lease() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = common::command(directory.path(), &Setup::default());
    command.env_remove("RUST_LOG");
    let socket = directory.path().join("run/broker.sock");
    let mut daemon = Daemon::spawn(directory, socket, command);
    let mut client = daemon.connect();
    let mut lease = Held::acquire(&mut client, DEVICE, "container");
    for _ in 0..10 {
        client.call("GetFds", lease.key()).ok();
        client.call("Explode", json!({})).error("org.varlink.service.MethodNotFound");
        client.call("Topology", json!({})).ok();
    }
    // The lease fd stays.
    lease.fds.drain(..2);
    client.call("Release", lease.key()).ok();
    cycle(&mut client, DEVICE);
    let log = daemon.end_and_log();
    let lines = log.lines().skip_while(|line| !line.contains("serving")).skip(1);
    let lines: Vec<_> = lines.take_while(|line| !line.contains("stopping")).collect();
    assert_eq!(lines.len(), 4, "{log}");
    for pair in lines.chunks(2) {
        assert!(pair[0].contains("lease begins") && pair[1].contains("lease ends"), "{log}");
    }
}

#[test]
fn many_uids_without_a_tenant_do_not_fill_the_log_together() {
    let only_root = policy("").replace("anyone = true", "user = 0");
    let mut daemon = Daemon::with(Setup::policy(only_root));
    let rounds = 100;
    for uid in 20_000..20_000 + rounds {
        let Some(mut stranger) = as_uid(uid, || daemon.connect()) else { return };
        for _ in 0..20 {
            stranger.call("Topology", json!({})).error("Denied");
        }
    }
    let log = daemon.end_and_log();
    let denied = log.lines().filter(|line| line.contains("denied")).count();
    assert!((1..rounds as usize * 20 / 2).contains(&denied), "{denied} lines");
}

#[test]
fn raised_limits_do_not_fill_the_log() {
    let generous = policy("").replace("anyone = true", "anyone = true\nmemlock = \"1 MiB\"");
    let mut daemon = Daemon::with(Setup::policy(generous));
    let mut client = daemon.connect();
    let lease = Held::acquire(&mut client, DEVICE, "container");
    let mut request = lease.key();
    request["bytes"] = json!(0);
    let rounds = 2000;
    for _ in 0..rounds {
        client.call("SetMemlock", request.clone()).ok();
    }
    let log = daemon.end_and_log();
    let raised = log.lines().filter(|line| line.contains("memlock limit raised")).count();
    assert!((1..rounds).contains(&raised), "{raised} lines");
}

#[test]
fn who_has_no_tenant_takes_up_little_memory() {
    let only_root = policy("").replace("anyone = true", "user = 0");
    let daemon = Daemon::with(Setup::policy(only_root).argument("--write-deadline", "300"));
    let Some(mut stranger) = as_uid(12345, || daemon.connect()) else { return };
    // Replies that it does not read.
    let name = "org.varlink.service.GetInterfaceDescription";
    let request = call(name, &json!({ "interface": "org.vfiobroker.Broker" }));
    stranger.send(&request.repeat(30));
    daemon.until_logged("does not read what it asked for");
    let mut unread = Vec::new();
    let _ = std::io::Read::read_to_end(&mut stranger.stream, &mut unread);
    assert!(unread.len() <= 32 << 10, "{} bytes", unread.len());
    // Messages that are longer than any call it may make.
    let mut stranger = as_uid(12345, || daemon.connect()).unwrap();
    stranger.send(&vec![b' '; 4 << 10]);
    stranger.hangs_up();
}

#[test]
fn quotas_over_the_limit_of_open_files_are_told_at_the_start() {
    let warned = |limits: &str| {
        let mut daemon = Daemon::with(Setup::policy(policy(limits)));
        daemon.end_and_log().contains("more than the limit of open files")
    };
    assert!(warned("fds = 9000000000"));
    assert!(!warned("fds = 8\nconnections = 8"));
}
