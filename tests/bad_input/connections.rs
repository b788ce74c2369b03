//! Too many connections, and peers that do not read.

use crate::DEVICE;
use crate::common::raw::{bytes, call};
use crate::common::{Daemon, Held, Setup, beside, eventually, policy};
use nix::errno::Errno;
use serde_json::json;

#[test]
fn ten_thousand_connections_from_one_uid() {
    const LIMIT: usize = 100;
    let daemon = Daemon::with(Setup::policy(policy(&format!("connections = {LIMIT}"))));
    beside(&daemon, || {
        let mut open = Vec::new();
        let mut refused = 0;
        for _ in 0..10_000 {
            let mut client = daemon.connect();
            if open.len() < LIMIT - 1 {
                // The neighbour has one.
                client.call("org.varlink.service.GetInfo", json!({})).ok();
                open.push(client);
                continue;
            }
            let parameters = client.reply().error("OverLimit");
            assert_eq!(parameters["most"], LIMIT);
            client.hangs_up();
            refused += 1;
        }
        assert_eq!(refused, 10_000 - (LIMIT - 1));
        for client in &mut open {
            client.call("org.varlink.service.GetInfo", json!({})).ok();
        }
    });
}

#[test]
fn a_reader_that_never_reads() {
    let daemon = Daemon::with(Setup::default().argument("--write-deadline", "300"));
    beside(&daemon, || {
        let mut client = daemon.connect();
        let name = "org.varlink.service.GetInterfaceDescription";
        let request = call(name, &json!({ "interface": "org.vfiobroker.Broker" }));
        client.stream.set_nonblocking(true).unwrap();
        // Asks until the daemon has stopped to read and hung up.
        eventually("the daemon hangs up", || {
            loop {
                match client.send_with(&request, &[]) {
                    Ok(()) => {}
                    Err(Errno::EAGAIN) => return false,
                    Err(errno) => {
                        assert!([Errno::EPIPE, Errno::ECONNRESET].contains(&errno), "{errno}");
                        return true;
                    }
                }
            }
        });
        client.stream.set_nonblocking(false).unwrap();
        client.hangs_up();
    });
    assert!(daemon.log().contains("does not read what it asked for"), "{}", daemon.log());
}

#[test]
fn fds_that_nobody_takes_out_of_the_queue() {
    let daemon = Daemon::with(Setup::default().argument("--write-deadline", "300"));
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let request = call("GetFds", &lease.key());
        let greedy = daemon.connect();
        greedy.stream.set_nonblocking(true).unwrap();
        eventually("the daemon hangs up", || {
            loop {
                match greedy.send_with(&request, &[]) {
                    Ok(()) => {}
                    Err(Errno::EAGAIN) => return false,
                    Err(_) => return true,
                }
            }
        });
        client.call("GetFds", lease.key()).ok();
    });
}

#[test]
fn a_watcher_that_never_reads() {
    let daemon = Daemon::with(Setup::default().argument("--write-deadline", "300"));
    beside(&daemon, || {
        let mut watcher = daemon.connect();
        watcher.send(&bytes(&json!({
            "method": "org.vfiobroker.Broker.Watch", "parameters": {}, "more": true,
        })));
        // The neighbour's leases are events: sooner or later they fill its queue.
        let stuck = "does not read what it asked for";
        eventually("the watcher is dropped", || daemon.log().contains(stuck));
        watcher.hangs_up();
    });
}
