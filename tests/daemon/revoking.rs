//! Revoke, Drain and Confirm over the socket.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply, bytes};
use crate::common::{Daemon, Held, Setup, as_uid, children, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::process::{Command, Output};

const DEVICES: [&str; 3] = [DEVICE, "0000:66:00.0", "0000:67:00.0"];

/// The test is an administrator by who it is; the policy gives it devices besides.
fn policy() -> String {
    let tenant = |name: &str, user: u32, rights: &str| {
        format!(
            "[[tenant]]\nname = \"{name}\"\nuser = {user}\ndevices = [\"8086:10d3\"]\n\
             handouts = [\"container\", \"iommufd\"]\nrights = [\"acquire\"{rights}]\n"
        )
    };
    let own = nix::unistd::geteuid().as_raw();
    let (own, other) = (tenant("own", own, ""), tenant("other", 12345, ""));
    format!("version = 1\n{own}{other}{}", tenant("manager", 12346, ", \"manage\""))
}

fn send_more(client: &Raw, method: &str, parameters: &Value) {
    let method = format!("org.vfiobroker.Broker.{method}");
    client.send(&bytes(&json!({ "method": method, "parameters": parameters, "more": true })));
}

fn command(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
    command.arg("--socket").arg(&daemon.socket).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn the_holder_hears_of_it_and_what_it_keeps_open_is_said() {
    let daemon = Daemon::with(Setup::policy(policy()));
    let mut client = daemon.connect();
    let held = Held::acquire(&mut client, DEVICE, "container");
    let lease = held.reply["lease"].as_str().unwrap().to_owned();
    let mut watcher = daemon.connect();
    send_more(&watcher, "Watch", &json!({ "lease": lease }));
    client.call("Leases", json!({})).ok();
    client.call("Leases", json!({})).ok();
    // Whoever asked goes away at once.
    let asker = daemon.connect();
    asker.send(&crate::common::raw::call("Revoke", &json!({ "lease": lease, "grace": 1 })));
    let (pause, _) = watcher.reply().ok();
    assert_eq!(pause["event"], "pause", "{pause}");
    assert_eq!(pause["until"].as_u64(), pause["at"].as_u64().map(|at| at + 1));
    drop(asker);
    for expected in ["force", "gone", "quarantined"] {
        assert_eq!(watcher.reply().ok().0["event"], expected);
    }
    client.call("GetFds", held.key()).error("NoSuchLease");
    let said = command(&daemon, &["leases"]);
    let said = text(&said.stdout);
    let expected = format!("{lease} was revoked, and is not free yet:\n  {DEVICE}: some process");
    assert!(said.contains(&expected), "{said}");
    // Who looked has ended, and says that it can't see what is simulated.
    assert!(said.contains("who has it is unknown: the machine is a simulated one"), "{said}");
    until("nobody looks", || children(daemon.launcher(), "vfiob-holders").is_empty());
    let again = command(&daemon, &["revoke", &lease, "--grace", "0"]);
    assert_eq!(again.status.code(), Some(4), "{again:?}");
    assert!(text(&again.stdout).contains("was taken; not free yet"), "{again:?}");
    drop(held);
    assert_eq!(watcher.reply().ok().0["event"], "reclaimed");
    let said = text(&command(&daemon, &["leases"]).stdout);
    assert_eq!(said, "no leases that you may see\n");
}

#[test]
fn only_administrators_and_managers_may_revoke() {
    let daemon = Daemon::with(Setup::policy(policy()));
    let Some(mut other) = as_uid(12345, || daemon.connect()) else { return };
    let mut manager = as_uid(12346, || daemon.connect()).unwrap();
    let mut stranger = as_uid(12347, || daemon.connect()).unwrap();
    let held = Held::acquire(&mut other, DEVICE, "container");
    let revoke = json!({ "lease": held.reply["lease"], "grace": 0 });
    other.call("Revoke", revoke.clone()).error("Denied");
    manager.call("Revoke", revoke.clone()).error("NoSuchLease");
    stranger.call("Revoke", revoke.clone()).error("Denied");
    for client in [&mut other, &mut stranger] {
        send_more(client, "Drain", &json!({ "grace": 0 }));
        client.reply().error("Denied");
        client.call("Confirm", json!({ "device": DEVICE })).error("Denied");
    }
    manager.call("Confirm", json!({ "device": DEVICE })).error("Denied");
    send_more(&manager, "Drain", &json!({ "grace": 0 }));
    assert_eq!(manager.reply().ok().0["leases"], json!([]));
    manager.call("Drain", json!({ "grace": 0 })).error("org.varlink.service.ExpectedMore");
    manager.call("Revoke", json!({ "lease": held.reply["lease"], "grace": 86_401 })).bad("grace");
    // Its own, without the key.
    let own = Held::acquire(&mut manager, DEVICES[1], "container");
    drop(own.fds);
    let revoke = json!({ "lease": own.reply["lease"], "grace": 0 });
    match manager.call("Revoke", revoke) {
        Reply::Ok(reply, _) => assert_eq!(reply["proved"], true, "{reply}"),
        // It has ended by itself already.
        Reply::Error(name, _) => assert!(name.ends_with(".NoSuchLease"), "{name}"),
    }
    other.call("Release", held.key()).ok();
}

#[test]
fn a_drain_ends_them_all_and_says_so_of_each() {
    let daemon = Daemon::with(Setup::policy(policy()));
    let mut client = daemon.connect();
    let held: Vec<_> =
        DEVICES.iter().map(|device| Held::acquire(&mut client, device, "container")).collect();
    let drained = command(&daemon, &["drain", "--grace", "0", "--json"]);
    assert_eq!(drained.status.code(), Some(4), "{drained:?}");
    let lines: Vec<Value> =
        text(&drained.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), held.len());
    assert!(
        lines.iter().all(|line| line["forced"] == true && line["left"][0]["until"] == "holder")
    );
    drop(held);
    until("all are free", || {
        let (leases, _) = client.call("Leases", json!({})).ok();
        leases["leases"].as_array().unwrap().is_empty()
    });
    let drained = command(&daemon, &["drain", "--grace", "0"]);
    assert_eq!(
        (drained.status.code(), text(&drained.stdout).as_str()),
        (Some(0), "no leases that you may take back\n")
    );
}

/// Nobody asks a keeper any more that only remembers a node, so nobody sees that it was killed.
#[test]
fn what_the_kernel_can_not_show_is_confirmed_by_an_administrator() {
    for is_killed in [false, true] {
        let daemon = Daemon::with(Setup::policy(policy()));
        let Some(mut other) = as_uid(12345, || daemon.connect()) else { return };
        drop(Held::acquire(&mut other, DEVICE, "iommufd"));
        let mut client = daemon.connect();
        let acquire = json!({ "vm": "v", "devices": [DEVICE] });
        until("it is kept for its last tenant", || match client.call("Acquire", acquire.clone()) {
            Reply::Error(_, parameters) => parameters["until"] == "administrator",
            Reply::Ok(..) => panic!("it is free"),
        });
        let keepers = || children(daemon.launcher(), "vfiob-keeper");
        if is_killed {
            kill(Pid::from_raw(keepers()[0] as i32), Signal::SIGKILL).unwrap();
            until("it has ended", || keepers().is_empty());
        }
        let said = command(&daemon, &["confirm", "65:00.0"]);
        let expected = format!("{DEVICE} is confirmed: group 26 is free for all\n");
        assert_eq!(text(&said.stdout), expected, "{said:?}");
        drop(client.call("Acquire", acquire).ok());
        until("nothing is remembered of it", || {
            let all = std::fs::read_dir(daemon.directory().join("keepers")).unwrap();
            all.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count() == 0
        });
        let refused = command(&daemon, &["confirm", "65:00.0"]);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    }
}

#[test]
fn who_goes_before_the_lease_is_over_keeps_no_place() {
    let daemon = Daemon::with(Setup::policy(policy()));
    let mut client = daemon.connect();
    let held = Held::acquire(&mut client, DEVICE, "container");
    let connections =
        |client: &mut Raw| client.call("Status", json!({})).ok().0["connections"].as_u64();
    let before = connections(&mut client);
    let revoke = json!({ "lease": held.reply["lease"], "grace": 3600 });
    let mut watcher = daemon.connect();
    send_more(&watcher, "Watch", &json!({ "lease": held.reply["lease"] }));
    let asker = daemon.connect();
    asker.send(&crate::common::raw::call("Revoke", &revoke));
    assert_eq!(watcher.reply().ok().0["event"], "pause");
    let drains = daemon.connect();
    send_more(&drains, "Drain", &json!({ "grace": 3600 }));
    assert!(connections(&mut client) > before);
    drop((asker, drains, watcher));
    until("they are forgotten", || connections(&mut client) == before);
    // The revocation stays.
    let status = client.call("Leases", json!({})).ok().0.to_string();
    assert!(status.contains("revok"), "{status}");
}
