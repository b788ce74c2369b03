//! Open files where they do not belong.

use crate::common::fuse::Fuse;
use crate::common::raw::{Raw, Reply, call};
use crate::common::{Daemon, Held, Setup, as_uid, beside, policy, until};
use crate::{DEVICE, PAGE, is_free, map, memory};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use serde_json::json;
use std::os::fd::{AsFd, OwnedFd};
use vfio_broker::sys::peer::unread;

#[test]
fn an_fd_index_that_is_not_there() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect_and_greet();
        let lease = Held::acquire(&mut client, DEVICE, "devices");
        let memory = memory(PAGE);
        for (index, count) in [(0, 0), (1, 1), (16, 16), (usize::MAX, 1)] {
            let fds = vec![memory.as_fd(); count];
            let reply = client.call_with("MapDma", map(&lease, index, 0, PAGE), &fds);
            assert!(reply.bad("memory").contains("is not there"));
        }
        // The connection is as good as before.
        let reply = client.call_with("MapDma", map(&lease, 0, 0, PAGE), &[memory.as_fd()]);
        reply.ok();
    });
}

#[test]
fn fds_where_none_are_taken() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect_and_greet();
        let memory = memory(PAGE);
        for method in ["Leases", "Topology", "org.varlink.service.GetInfo"] {
            client.call_with(method, json!({}), &[memory.as_fd()]).bad("fds");
        }
        let acquire = json!({ "vm": "a", "devices": [DEVICE] });
        client.call_with("Acquire", acquire, &[memory.as_fd(); 16]).bad("fds");
        client.call("Leases", json!({})).ok();
        // In the midst of a message they belong to no call.
        let (head, tail) = (b"{\"method\":", b"\"x\"}\0");
        client.send(head);
        // Its own read, so that the kernel can't hand both parts over as one.
        until("the head is read", || unread(client.stream.as_fd()) == Ok(0));
        let _ = client.send_with(tail, &[memory.as_fd()]);
        client.hangs_up();
    });
}

#[test]
fn fds_from_a_tenant_that_may_not_map() {
    let policy = policy("").replace(", \"devices\"", "");
    assert!(!policy.contains("\"devices\""));
    let daemon = Daemon::with(Setup::policy(policy));
    beside(&daemon, || {
        let mut client = daemon.connect();
        client.call("Leases", json!({})).ok();
        let memory = memory(PAGE);
        let leases = call("Leases", &json!({}));
        match client.send_with(&leases, &[memory.as_fd()]) {
            // Linux 6.16 and later: the kernel itself refuses them.
            Err(errno) => {
                assert_eq!(errno, Errno::EPERM);
                client.call("Leases", json!({})).ok();
            }
            Ok(()) => client.hangs_up(),
        }
        // Before the daemon has seen the connection, nothing refuses them.
        let mut client = daemon.connect();
        match client.send_with(&leases, &[memory.as_fd()]) {
            Err(errno) => assert_eq!(errno, Errno::EPERM),
            Ok(()) => client.hangs_up(),
        }
    });
}

#[test]
fn more_than_16_fds() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let memory = memory(PAGE);
        for count in [17, 200, 253] {
            let mut client = daemon.connect_and_greet();
            let lease = Held::acquire(&mut client, DEVICE, "devices");
            let message = call("MapDma", &map(&lease, 0, 0, PAGE));
            client.send_with(&message, &vec![memory.as_fd(); count]).unwrap();
            client.hangs_up();
            drop(lease);
            let mut client = daemon.connect_and_greet();
            until("the device is free again", || is_free(&mut client, DEVICE));
        }
    });
}

#[test]
fn fds_that_nobody_reads() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        // They are in the socket's queue when the daemon hangs up.
        let mut client = daemon.connect_and_greet();
        let memory = memory(PAGE);
        client.send(&vec![b'x'; 60 << 10]);
        let _ = client.send_with(&[b'x'; 6 << 10], &[memory.as_fd(); 5]);
        let _ = client.send_with(&[b'x'; 6 << 10], &[memory.as_fd(); 5]);
        client.hangs_up();
    });
}

#[test]
fn files_that_linger_when_they_are_closed() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect_and_greet();
        let mut readers = Vec::new();
        for _ in 0..4 {
            let (lingering, reader) = lingering();
            readers.push(reader);
            // Ours goes first, so that the daemon's is the last and has to wait.
            daemon.pause();
            client.send_with(&call("Leases", &json!({})), &[lingering.as_fd()]).unwrap();
            drop(lingering);
            daemon.go_on();
            client.reply().bad("fds");
            client.call("Leases", json!({})).ok();
        }
    });
}

#[test]
fn files_that_come_with_urgent_data() {
    use nix::sys::socket::MsgFlags;
    use vfio_broker::sys::fdpass;
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut readers = Vec::new();
        let mut urgent = |client: &Raw| {
            let (lingering, reader) = lingering();
            readers.push(reader);
            // Ours goes first, so that the daemon's is the last and has to wait.
            daemon.pause();
            let file = [lingering.as_fd()];
            if fdpass::send(client.stream.as_fd(), b"x", &file, MsgFlags::MSG_OOB).is_err() {
                // Its close would linger here.
                std::mem::forget(lingering);
            }
        };
        // It is the last of what was sent.
        let client = daemon.connect_and_greet();
        urgent(&client);
        drop(client);
        daemon.go_on();
        // More comes behind it.
        let mut client = daemon.connect_and_greet();
        client.call("Leases", json!({})).ok();
        urgent(&client);
        client.send(&call("Leases", &json!({})));
        daemon.go_on();
        client.reply().bad("message");
        // It was sent before the connection was accepted.
        daemon.pause();
        let client = daemon.connect();
        urgent(&client);
        drop(client);
        daemon.go_on();
        // Nobody has the connection any more, but it itself.
        let client = daemon.connect_and_greet();
        let own = client.stream.try_clone().unwrap();
        let _ = fdpass::send(own.as_fd(), b"x", &[own.as_fd()], MsgFlags::MSG_OOB);
    });
}

/// Sends files with a call and closes them here before the daemon can act: its close is the last one.
fn send_and_forget(client: &Raw, message: &[u8], files: Vec<OwnedFd>) {
    let (last, before) = message.split_last().unwrap();
    let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    client.send_with(before, &borrowed).unwrap();
    drop(files);
    client.send(&[*last]);
}

/// Sockets whose closes take an hour, or until the others behind them are closed.
fn plug() -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    (0..4).map(|_| lingering()).map(|(sender, reader)| (sender, OwnedFd::from(reader))).unzip()
}

#[test]
fn files_whose_closes_wait_for_each_other() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        // A lease fd that has to wait for them would keep its lease for ever.
        let mut client = daemon.connect_and_greet();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        for backwards in [false, true] {
            let (senders, readers) = plug();
            let copy = lease.fds.last().unwrap().try_clone().unwrap();
            let mut files: Vec<_> = readers.into_iter().chain([copy]).chain(senders).collect();
            if backwards {
                files.reverse();
            }
            send_and_forget(&client, &call("Leases", &json!({})), files);
            client.reply().bad("fds");
        }
        // The same in the queue of a connection that is closed.
        let (senders, readers) = plug();
        let copy = lease.fds.last().unwrap().try_clone().unwrap();
        let files: Vec<_> = readers.into_iter().chain([copy]).chain(senders).collect();
        send_and_forget(&daemon.connect_and_greet(), b"half a message", files);
        drop(lease);
        until("the device is free again", || is_free(&mut client, DEVICE));
    });
}

#[test]
fn memory_whose_close_waits() {
    let daemon =
        Daemon::with(Setup::policy(policy("requests = 4")).argument("--call-deadline", "2000"));
    beside(&daemon, || {
        let mut readers = Vec::new();
        let mut clients: Vec<_> = (0..8).map(|_| daemon.connect_and_greet()).collect();
        let nobodys = json!({
            "lease": "0000000000000000", "key": "00000000000000000000000000000000", "iova": 0,
            "size": PAGE, "read": true, "write": true, "memory": 0, "offset": 0,
        });
        for client in &mut clients {
            let (sender, reader) = lingering();
            readers.push(reader);
            send_and_forget(client, &call("MapDma", &nobodys), vec![sender]);
        }
        for client in &mut clients {
            client.reply().bad("memory");
        }
    });
}

#[test]
fn files_that_are_unread_when_the_daemon_ends() {
    let mut daemon = Daemon::start();
    let (sender, _reader) = lingering();
    let client = daemon.connect_and_greet();
    daemon.pause();
    client.send_with(b"half a message", &[sender.as_fd()]).unwrap();
    drop(sender);
    daemon.signal(Signal::SIGTERM);
    daemon.go_on();
    assert!(daemon.wait().success());
    assert!(!daemon.socket.exists());
}

/// A tenant pipelines calls whose replies it does not read, and behind them a file whose close hangs:
/// neither a connection nor the end of the process must close it in the daemon.
#[test]
fn a_file_whose_close_can_not_be_killed_is_unread_when_the_daemon_ends() {
    let mut daemon = Daemon::start();
    // Ends first, whatever happens.
    let Some(fuse) = Fuse::mount_with_writeback() else { return };
    let client = daemon.connect_and_greet();
    let name = "org.varlink.service.GetInterfaceDescription";
    let request = call(name, &json!({ "interface": "org.vfiobroker.Broker" }));
    // More than the replies have room for.
    client.send(&request.repeat(500));
    let file = fuse.open();
    client.send_with(b"half a message", &[file.as_fd()]).unwrap();
    drop(file);
    fuse.dirty();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    drop(client);
    until("another process closes the file", || fuse.writes() > 0);
}

/// An owner's sockets whose closes hang stop that owner, and nobody else.
#[test]
fn sockets_that_can_not_be_closed_stop_their_owner_alone() {
    const MALLORY: u32 = 20_001;
    let mallory = "[[tenant]]\nname = \"mallory\"\nuser = 20001\ndevices = [\"0000:66:00.0\"]\n\
                   handouts = [\"devices\"]\n[tenant.limits]\nconnections = 2000\n";
    let policy = policy("").replace("[[tenant]]", &format!("{mallory}[[tenant]]"));
    let daemon = Daemon::with(Setup::policy(policy));
    let mut mounted = Vec::new();
    beside(&daemon, || {
        let greeted = || daemon.connect_and_greet();
        let Some(mut early) = as_uid(MALLORY, greeted) else { return };
        let mut refused = false;
        // Each round leaves sockets with a file behind too long a message, in a process that closes
        // them and that is then of no more use.
        for round in 1.. {
            let mut connections = Vec::new();
            for _ in 0..10 {
                let mut client = as_uid(MALLORY, || daemon.connect()).unwrap();
                client.send(&call("org.varlink.service.GetInfo", &json!({})));
                match client.try_reply() {
                    Some(Reply::Ok(..)) => connections.push(client),
                    Some(Reply::Error(name, _)) => {
                        assert!(name.ends_with(".OverLimit"), "{name}");
                        refused = true;
                    }
                    None => panic!("not even an answer"),
                }
            }
            if refused {
                break;
            }
            // One for each round: once a file system hangs, it does so here too.
            let Some(fuse) = Fuse::mount_with_writeback() else { break };
            daemon.pause();
            let file = fuse.open();
            for client in &connections {
                client.send(&vec![b'x'; 66 << 10]);
                client.send_with(b"x", &[file.as_fd()]).unwrap();
            }
            drop(file);
            fuse.dirty();
            daemon.go_on();
            for client in &mut connections {
                client.hangs_up();
            }
            mounted.push(fuse);
            // The last one that its owner has is kept.
            until("the process that closes them was killed", || {
                daemon.dead_children() >= round.min(3)
            });
        }
        if refused {
            // Nor are files taken that would have to be closed there too.
            let file = memory(PAGE);
            early.send_with(&call("Leases", &json!({})), &[file.as_fd()]).unwrap();
            early.hangs_up();
        }
        mounted.clear();
        until("the owner is served again", || {
            let mut client = as_uid(MALLORY, || daemon.connect()).unwrap();
            client.send(&call("org.varlink.service.GetInfo", &json!({})));
            matches!(client.try_reply(), Some(Reply::Ok(..)))
        });
    });
}

/// A TCP socket whose close takes an hour: SO_LINGER, unsent bytes, and a peer that does not read.
pub(crate) fn lingering() -> (OwnedFd, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (reader, _) = listener.accept().unwrap();
    // The least there is, so that it is full soon.
    let (send, receive) = (nix::sys::socket::sockopt::SndBuf, nix::sys::socket::sockopt::RcvBuf);
    nix::sys::socket::setsockopt(&sender, send, &1).unwrap();
    nix::sys::socket::setsockopt(&reader, receive, &1).unwrap();
    sender.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut &sender, &[0; 1 << 16]).is_ok() {}
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
    let option = nix::sys::socket::sockopt::Linger;
    nix::sys::socket::setsockopt(&sender.as_fd(), option, &linger).unwrap();
    sender.set_nonblocking(false).unwrap();
    (sender.into(), reader)
}
