//! MapDma with ranges and memory that can't be.

use crate::common::fuse::is_thread;
use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, Held, Setup, beside, policy};
use crate::{DEVICE, PAGE, map, memory};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Runs a test with a lease that has the broker map.
fn mapping(limits: &str, test: impl FnOnce(&mut Raw, &Held, &Daemon)) {
    let daemon = Daemon::with(Setup::policy(policy(limits)));
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "devices");
        test(&mut client, &lease, &daemon);
    });
    let stats = daemon.sim().stats().unwrap();
    assert_eq!(stats.spaces.iter().map(|space| space.mapped_bytes).sum::<u64>(), 0, "{stats:?}");
}

#[test]
fn a_range_that_is_unaligned_or_empty_or_overflows() {
    mapping("", |client, lease, _| {
        let memory = memory(16 * PAGE);
        for (iova, size, offset) in [
            (1, PAGE, 0),
            (0, PAGE - 1, 0),
            (0, 1, 0),
            (0, PAGE, 1),
            (0, 0, 0),
            (PAGE, 0, 0),
            (u64::MAX, PAGE, 0),
            (u64::MAX - PAGE + 1, 2 * PAGE, 0),
            (0, u64::MAX, 0),
            (0, u64::MAX - PAGE + 1, 0),
            (0, PAGE, u64::MAX),
            (0, 2 * PAGE, u64::MAX - PAGE + 1),
        ] {
            let mut request = map(lease, 0, iova, size);
            request["offset"] = json!(offset);
            let reply = client.call_with("MapDma", request, &[memory.as_fd()]);
            let Reply::Error(name, parameters) = reply else { panic!("{iova:#x} {size:#x}") };
            let typed = [".BadRequest", ".Kernel", ".OverLimit"];
            assert!(typed.iter().any(|each| name.ends_with(each)), "{name} {parameters}");
        }
        let mut neither = map(lease, 0, 0, PAGE);
        (neither["read"], neither["write"]) = (json!(false), json!(false));
        client.call_with("MapDma", neither, &[memory.as_fd()]).error("BadRequest");
    });
}

#[test]
fn a_range_that_overlaps() {
    mapping("", |client, lease, _| {
        let memory = memory(16 * PAGE);
        let mut call =
            |iova, size| client.call_with("MapDma", map(lease, 0, iova, size), &[memory.as_fd()]);
        call(4 * PAGE, 4 * PAGE).ok();
        for (iova, size) in [(4, 4), (3, 2), (7, 2), (5, 1), (0, 16)] {
            call(iova * PAGE, size * PAGE).error("Conflict");
        }
        call(0, 4 * PAGE).ok();
        call(8 * PAGE, 4 * PAGE).ok();
    });
}

#[test]
fn memory_of_the_wrong_kind() {
    mapping("", |client, lease, daemon| {
        let (socket, _other) = UnixStream::pair().unwrap();
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty());
        let connection = client.stream.try_clone().unwrap();
        let kinds: Vec<(&str, OwnedFd)> = vec![
            ("a socket", socket.into()),
            ("the connection itself", connection.into()),
            ("another connection", daemon.connect().stream.into()),
            ("a listening socket", listener.into()),
            ("a pipe", pipe),
            ("the lease's own device", lease.fds[0].try_clone().unwrap()),
            ("an epoll instance", epoll.unwrap().0),
            ("a character device", open("/dev/zero")),
            ("a directory of tmpfs", open("/dev/shm")),
            ("a file of procfs", open("/proc/self/status")),
            ("a file of sysfs", open("/sys/kernel/notes")),
            ("the program itself", open("/proc/self/exe")),
        ];
        for (kind, fd) in kinds {
            let reply = client.call_with("MapDma", map(lease, 0, 0, PAGE), &[fd.as_fd()]);
            let reason = reply.bad("memory");
            assert!(reason.contains("tmpfs"), "{kind}: {reason}");
        }
    });
}

#[test]
fn memory_on_a_file_system_that_never_answers() {
    let Some(fuse) = crate::common::fuse::Fuse::mount() else { return };
    let mut daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "devices");
        let file = fuse.open();
        fuse.stop_answering(daemon.launcher());
        let reply = client.call_with("MapDma", map(&lease, 0, 0, PAGE), &[file.as_fd()]);
        assert!(reply.bad("memory").contains("tmpfs"));
        // As an fd that no method takes, and in the queue of a connection that is closed.
        client.call_with("Leases", json!({}), &[file.as_fd()]).bad("fds");
        let other = daemon.connect();
        let _ = other.send_with(b"half a message", &[file.as_fd()]);
        drop(other);
        client.call("Leases", json!({})).ok();
        for thread in fuse.waiting() {
            assert!(!is_thread(daemon.pid(), thread), "it is the daemon that waits");
        }
    });
    // A process that waits there can't be killed: the daemon can.
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
}

#[test]
fn memory_that_is_shorter_than_said() {
    mapping("", |client, lease, _| {
        let memory = memory(4 * PAGE);
        for (offset, size) in [(0, 5), (4, 1), (1, 4), (0, 1 << 20)] {
            let mut request = map(lease, 0, 0, size * PAGE);
            request["offset"] = json!(offset * PAGE);
            let reply = client.call_with("MapDma", request, &[memory.as_fd()]);
            assert!(reply.bad("memory").contains("the file has"));
        }
        client.call_with("MapDma", map(lease, 0, 0, 4 * PAGE), &[memory.as_fd()]).ok();
    });
}

#[test]
fn memory_that_shrinks_or_is_punched_afterwards() {
    use nix::fcntl::{FallocateFlags, fallocate};
    mapping("", |client, lease, _| {
        let size = 4 * PAGE;
        let (shrinks, punched) = (memory(size), memory(size));
        client.call_with("MapDma", map(lease, 0, 0, size), &[shrinks.as_fd()]).ok();
        client.call_with("MapDma", map(lease, 0, size, size), &[punched.as_fd()]).ok();
        nix::unistd::ftruncate(&shrinks, 0).unwrap();
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&punched, hole, 0, size as i64).unwrap();
        // The pages are pinned: they stay, and can be taken back.
        let (leases, _) = client.call("Leases", json!({})).ok();
        let held = |each: &&Value| each["lease"] == lease.reply["lease"];
        let mine = leases["leases"].as_array().unwrap().iter().find(held).unwrap();
        assert_eq!(mine["mapped_bytes"], 2 * size);
        for iova in [0, size] {
            let request = lease.with(json!({ "iova": iova, "size": size }));
            assert_eq!(client.call("UnmapDma", request).ok().0["unmapped"], size);
        }
        // What is gone can't be mapped again.
        client.call_with("MapDma", map(lease, 0, 0, size), &[shrinks.as_fd()]).bad("memory");
    });
}

#[test]
fn more_than_the_tenants_quota() {
    mapping("mapped_bytes = 65536\nmappings = 3", |client, lease, _| {
        let memory = memory(32 * PAGE);
        let mut call =
            |iova, size| client.call_with("MapDma", map(lease, 0, iova, size), &[memory.as_fd()]);
        call(0, 17 * PAGE).error("OverLimit");
        call(0, 14 * PAGE).ok();
        call(14 * PAGE, 3 * PAGE).error("OverLimit");
        call(14 * PAGE, PAGE).ok();
        call(15 * PAGE, PAGE).ok();
        // There is room for no byte and no mapping.
        call(16 * PAGE, PAGE).error("OverLimit");
    });
}
