//! Too many connections, and peers that do not read.

use crate::DEVICE;
use crate::common::raw::{bytes, call};
use crate::common::{Daemon, Held, Setup, beside, policy, until};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde_json::json;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

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
fn connections_over_the_limit_that_leave_lingering_files() {
    const ROUNDS: usize = 8;
    const EACH: usize = 200;
    let daemon = Daemon::with(Setup::policy(policy("connections = 2")));
    beside(&daemon, || {
        let mut client = daemon.connect();
        client.call("org.varlink.service.GetInfo", json!({})).ok();
        let before = daemon.open_fds();
        let (mut readers, mut most) = (Vec::new(), 0);
        for _ in 0..ROUNDS {
            // So that all of them come at a time, with what is in them.
            daemon.pause();
            for _ in 0..EACH {
                let (lingering, reader) = crate::files::lingering();
                let refused = daemon.connect();
                if let Err(errno) = refused.send_with(b"x", &[lingering.as_fd()]) {
                    // Linux 6.16 and later: nobody sends files before being let in.
                    assert_eq!(errno, Errno::EPERM);
                    std::mem::forget(lingering);
                }
                readers.push(reader);
            }
            daemon.go_on();
            // Those before it have been let in, and out again.
            daemon.connect().reply().error("OverLimit");
            most = most.max(daemon.open_fds());
        }
        // They don't gather, although none of them can be closed within the hour.
        assert!(most < before + 2 * EACH, "{most} open files, {before} before");
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
        until("the daemon hangs up", || {
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
    daemon.until_logged("does not read what it asked for");
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
        until("the daemon hangs up", || {
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

/// Who shares what a keeper has is served beside one that reads nothing.
#[test]
fn a_reply_that_nobody_reads_is_no_keepers_to_wait_for() {
    let setup = Setup::default().argument("--call-deadline", "20000");
    let daemon = Daemon::with(setup.argument("--write-deadline", "100000"));
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let request = call("GetFds", &lease.key());
        let greedy = daemon.connect();
        greedy.stream.set_nonblocking(true).unwrap();
        for _ in 0..200 {
            while greedy.send_with(&request, &[]).is_ok() {}
            client.call("GetFds", lease.key()).ok();
        }
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
        daemon.until_logged("does not read what it asked for");
        watcher.hangs_up();
    });
}

/// What a client leaves unread stays in the kernel at the daemon's cost, so it keeps its place.
#[test]
fn a_client_that_reads_nothing_keeps_its_place_until_it_has() {
    let daemon = Daemon::with(Setup::policy(policy("connections = 4")));
    beside(&daemon, || {
        let unread: Vec<_> = (0..3)
            .map(|_| {
                let mut client = UnixStream::connect(&daemon.socket).unwrap();
                let call = b"{\"method\":\"org.varlink.service.GetInfo\"}\0".repeat(50);
                client.write_all(&call).unwrap();
                client.shutdown(std::net::Shutdown::Write).unwrap();
                client
            })
            .collect();
        // The neighbour is the fourth.
        let more = || {
            let mut client = UnixStream::connect(&daemon.socket).unwrap();
            let mut said = String::new();
            let _ = client.shutdown(std::net::Shutdown::Write);
            client.read_to_string(&mut said).unwrap();
            said
        };
        for client in &unread {
            let mut poll = [PollFd::new(client.as_fd(), PollFlags::empty())];
            nix::poll::poll(&mut poll, PollTimeout::NONE).unwrap();
        }
        // Its calls are answered and it is done with; nobody is let in instead.
        for _ in 0..100 {
            assert!(more().contains("OverLimit"));
        }
        for mut client in unread {
            // All it was sent, and then the end.
            let mut said = Vec::new();
            client.read_to_end(&mut said).unwrap();
            assert_eq!(said.iter().filter(|byte| **byte == 0).count(), 50);
        }
        until("others are let in again", || more().is_empty());
    });
}
