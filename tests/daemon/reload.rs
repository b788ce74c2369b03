//! SIGHUP: the policy is read again while connections and leases are there.

use crate::DEVICE;
use crate::common::raw::{Raw, call};
use crate::common::{Daemon, Held, SOON, Setup, children, command, policy, status, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use vfio_broker::kernel::Mapped;

const OTHER_DEVICE: &str = "0000:66:00.0";

fn own(rest: &str) -> String {
    let uid = nix::unistd::geteuid();
    format!(
        "version = 1\n[[tenant]]\nname = \"mine\"\nuser = {uid}\ndevices = [\"8086:10d3\"]\n{rest}\n"
    )
}

/// A policy by which the test is nobody.
fn others() -> String {
    own("").replace(&format!("user = {}", nix::unistd::geteuid()), "user = 12345")
}

/// Has the daemon read this policy; what it has logged since.
fn reload(daemon: &Daemon, policy: &str) -> String {
    std::fs::write(daemon.directory().join("host.policy.toml"), policy).unwrap();
    let before = daemon.log().len();
    daemon.signal(Signal::SIGHUP);
    let mut log = String::new();
    until("the policy has been read", || {
        log = daemon.log()[before..].to_owned();
        log.contains("is in force") || log.contains("policy refused")
    });
    log
}

fn acquire(client: &mut Raw, device: &str) -> crate::common::raw::Reply {
    client.call("Acquire", json!({ "vm": "v", "devices": [device] }))
}

#[test]
fn a_sighup_to_the_broker_instead_of_the_launcher_ends_nothing() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let broker = daemon.pid();
    daemon.signal_broker(Signal::SIGHUP);
    // By the same process, on the same connection: after the signal was delivered.
    let (status, _) = client.call("Status", json!({})).ok();
    assert_eq!(status["pid"], broker);
    assert!(reload(&daemon, &others()).contains("is in force"));
}

#[test]
fn connections_that_are_open_go_by_the_policy_of_now() {
    let daemon = Daemon::with(Setup::policy(others()));
    let mut client = daemon.connect();
    let denied = |client: &mut Raw| {
        client.call("Leases", json!({}));
        acquire(client, DEVICE).error("Denied");
    };
    denied(&mut client);
    let handouts = "handouts = [\"devices\", \"container\"]";
    reload(&daemon, &own(handouts));
    let held = Held::acquire(&mut client, DEVICE, "devices");
    // Who may map may send files too.
    let memory = Mapped::memfd(8192).unwrap().0;
    let map = json!({ "iova": 0x1000, "size": 4096, "read": true, "write": true, "memory": 0, "offset": 0 });
    client.send_with(&call("MapDma", &held.with(map)), &[memory.as_fd()]).unwrap();
    client.reply().ok();
    reload(&daemon, &own("handouts = [\"container\"]"));
    client
        .call("Acquire", json!({ "vm": "v", "devices": [OTHER_DEVICE], "handout": "devices" }))
        .error("Denied");
    reload(&daemon, &others());
    denied(&mut client);
    reload(&daemon, &own(handouts));
    client.call("Release", held.key()).ok();
}

#[test]
fn a_policy_that_can_not_be_used_is_refused_and_said_where() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let broken = own("handouts = [\"container\"]\n").replace("user =", "\n  usr =");
    let log = reload(&daemon, &broken);
    assert!(log.contains("host.policy.toml:5:3: "), "{log}");
    drop(Held::acquire(&mut client, DEVICE, "group"));
    // No file is no policy, and neither is one that others can write to.
    std::fs::set_permissions(
        daemon.directory().join("host.policy.toml"),
        std::os::unix::fs::PermissionsExt::from_mode(0o666),
    )
    .unwrap();
    let log = reload(&daemon, &own(""));
    assert!(log.contains("chmod go-w"), "{log}");
    acquire(&mut client, OTHER_DEVICE).ok();
}

#[test]
fn a_lease_that_would_not_be_given_any_more_is_shown() {
    let daemon = Daemon::with(Setup::policy(own("")));
    let mut client = daemon.connect();
    let held = Held::acquire(&mut client, DEVICE, "container");
    let said = |client: &mut Raw| -> Value {
        let (leases, _) = client.call("Leases", json!({})).ok();
        leases["leases"][0]["policy"].clone()
    };
    assert_eq!(said(&mut client), Value::Null);
    let log = reload(&daemon, &own("deny = [\"0000:65:00.0\"]"));
    until("it has been looked at", || said(&mut client).is_string());
    let why = said(&mut client);
    assert!(why.as_str().unwrap().contains("0000:65:00.0"), "{why}");
    until("it is logged", || daemon.log().contains("no longer allowed"));
    drop(log);
    client.call("GetFds", held.key()).ok();
    reload(&daemon, &own(""));
    until("it is allowed again", || said(&mut client).is_null());
    client.call("Release", held.key()).ok();
}

#[test]
fn limits_are_those_of_now() {
    let daemon = Daemon::with(Setup::policy(policy("connections = 3")));
    let mut clients = [daemon.connect(), daemon.connect(), daemon.connect()];
    clients.iter_mut().for_each(|client| drop(client.call("Leases", json!({})).ok()));
    daemon.connect().call("Leases", json!({})).error("OverLimit");
    reload(&daemon, &policy("connections = 4\nleases = 1\nrequests = 1"));
    clients[0].call("Leases", json!({})).ok();
    let mut fourth = daemon.connect();
    let _held = Held::acquire(&mut fourth, DEVICE, "container");
    acquire(&mut clients[1], OTHER_DEVICE).error("OverLimit");
    reload(&daemon, &policy("connections = 2"));
    // Those that are there stay.
    clients.iter_mut().for_each(|client| drop(client.call("Leases", json!({})).ok()));
    acquire(&mut clients[1], OTHER_DEVICE).ok();
    daemon.connect().call("Leases", json!({})).error("OverLimit");
    drop(clients);
    until("there is room again", || {
        matches!(daemon.connect().call("Leases", json!({})), crate::common::raw::Reply::Ok(..))
    });
}

#[test]
fn units_are_looked_for_once_the_policy_names_some() {
    let daemon = Daemon::with(Setup::policy(own("")));
    let mut client = daemon.connect();
    client.call("Leases", json!({})).ok();
    let first = "[[tenant]]\nname = \"unit\"\nunit = \"no-such.service\"\ndevices = [\"8086:10d3\"]\n[[tenant]]";
    reload(&daemon, &own("").replacen("[[tenant]]", first, 1));
    let (reply, _) = acquire(&mut client, DEVICE).ok();
    assert_eq!(reply["tenant"], "mine");
}

#[test]
fn the_service_manager_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let notify = directory.path().join("manager");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut command = command(directory.path(), &Setup::default());
    command.arg("--socket").arg(directory.path().join("broker.sock")).env("NOTIFY_SOCKET", &notify);
    let mut child = command.spawn().unwrap();
    let next = || {
        let mut text = [0; 256];
        let len = manager.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..len]).into_owned()
    };
    assert!(next().starts_with("READY=1"));
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    for policy in [own(""), "garbage".to_owned()] {
        std::fs::write(directory.path().join("host.policy.toml"), policy).unwrap();
        nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
        let said = next();
        assert!(said.starts_with("RELOADING=1") && said.contains("MONOTONIC_USEC="), "{said}");
        assert!(next().starts_with("READY=1"));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A policy that comes when somebody writes it, and until then keeps its reader waiting.
fn put_fifo(daemon: &Daemon) -> std::path::PathBuf {
    let path = daemon.directory().join("host.policy.toml");
    std::fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    path
}

fn readers(daemon: &Daemon) -> Vec<u32> {
    children(daemon.launcher(), "vfiob-policy")
}

#[test]
fn a_policy_that_does_not_come_holds_up_nobody_and_is_in_force_once_it_does() {
    let daemon = Daemon::start();
    let path = put_fifo(&daemon);
    daemon.signal(Signal::SIGHUP);
    until("it is waited for", || readers(&daemon).len() == 1);
    let reader = readers(&daemon)[0];
    let mut client = daemon.connect();
    // A keeper is started for each.
    for _ in 0..3 {
        drop(Held::acquire(&mut client, DEVICE, "container"));
    }
    daemon.signal(Signal::SIGHUP);
    until("another one waits in its place", || {
        let readers = readers(&daemon);
        readers.len() == 1 && readers[0] != reader
    });
    assert!(!daemon.log().contains("policy refused"), "{}", daemon.log());
    std::fs::write(path, others()).unwrap();
    daemon.until_logged("another policy is in force");
    acquire(&mut client, DEVICE).error("Denied");
    until("its reader has ended", || readers(&daemon).is_empty());
}

#[test]
fn a_refusal_names_the_errors_of_a_policy_and_not_what_it_would_be_warned_of() {
    let daemon = Daemon::with(Setup::policy(own("")));
    // An entry by its address alone is warned of.
    let text = own("").replacen("devices = [", "devices = [\"0000:99:00.0\", ", 1);
    let two = text.replace("user =", "name2 = 1\nusr =");
    let log = reload(&daemon, &two);
    let refused = log.lines().find(|line| line.contains("policy refused")).unwrap();
    assert!(
        refused.contains("2 errors: ") && !refused.contains("whatever comes to be"),
        "{refused}"
    );
}

#[test]
fn a_policy_that_never_comes_is_refused() {
    let daemon = Daemon::with(Setup::default().argument("--policy-deadline", "300"));
    put_fifo(&daemon);
    daemon.signal(Signal::SIGHUP);
    daemon.until_logged("policy refused");
    until("its reader was ended", || readers(&daemon).is_empty());
    let mut client = daemon.connect();
    let (status, _) = client.call("Status", json!({})).ok();
    let why = status["policy"]["refused"].as_str().unwrap();
    assert!(why.contains("does not answer"), "{why}");
    drop(Held::acquire(&mut client, DEVICE, "container"));
}

#[test]
fn whoever_reads_the_policy_can_write_nothing() {
    let daemon = Daemon::start();
    put_fifo(&daemon);
    daemon.signal(Signal::SIGHUP);
    until("it has begun to wait", || {
        // Once it is confined it opens the file, in which it sleeps.
        let readers = readers(&daemon);
        let is_filtered = |pid: &u32| status(*pid, "Seccomp").is_some_and(|mode| mode == "2");
        readers.iter().any(is_filtered)
    });
    let reader = readers(&daemon)[0];
    assert_eq!(status(reader, "NoNewPrivs").unwrap(), "1");
    if nix::unistd::geteuid().is_root() {
        let rights = u64::from_str_radix(&status(reader, "CapPrm").unwrap(), 16).unwrap();
        let (dac_read_search, sys_admin) = (1 << 2, 1 << 21);
        assert_eq!(rights & !(dac_read_search | sys_admin), 0, "{rights:x}");
    }
    // Nobody is left waiting.
    let path = format!("/proc/{reader}");
    daemon.signal(Signal::SIGKILL);
    until("it has ended with the launcher", || !std::path::Path::new(&path).exists());
}
