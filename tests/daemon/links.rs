//! A launcher that says something else than it should: it is root, and no peer reaches it, so this is a fault of
//! its own. Its broker ends rather than to take one answer for another, and leases go on.

use crate::DEVICE;
use crate::common::raw::{Reply, call};
use crate::common::{Daemon, Held, children, skipped, until};
use crate::restart::Machine;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockaddrLike, UnixAddr, getpeername};
use serde_json::json;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

const OTHER: &str = "0000:66:00.0";

/// Copies of the launcher's ends of its two links to the broker; `None` where none can be had.
fn links(daemon: &Daemon) -> Option<Vec<UnixStream>> {
    let pid = daemon.launcher();
    #[allow(unsafe_code)]
    // SAFETY: a bare system call that takes two numbers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = Errno::result(pidfd as i32).unwrap();
    #[allow(unsafe_code)]
    // SAFETY: the call has just made it, and nothing else has it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let mut links = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let is_socket = std::fs::read_link(&path)
            .is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        if !is_socket {
            continue;
        }
        let number: i32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        #[allow(unsafe_code)]
        // SAFETY: a bare system call that takes three numbers.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        let copy = match Errno::result(copy as i32) {
            Ok(copy) => copy,
            Err(errno) => {
                skipped(&format!("a process's files can't be had here: {errno}"));
                return None;
            }
        };
        #[allow(unsafe_code)]
        // SAFETY: the call has just made it, and nothing else has it.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        let peer = getpeername::<UnixAddr>(copy.as_raw_fd());
        let is_pair = peer
            .is_ok_and(|peer| peer.family() == Some(AddressFamily::Unix) && peer.path().is_none());
        let kind = nix::sys::socket::getsockopt(&copy, nix::sys::socket::sockopt::SockType);
        if is_pair && kind == Ok(nix::sys::socket::SockType::Stream) {
            links.push(UnixStream::from(copy));
        }
    }
    Some(links)
}

/// No message, no JSON, and what no reply says.
const GARBAGE: [&[u8]; 3] = [b"\0", b"{\0", b"{\"parameters\":7}\0"];

/// The daemon's end, or another broker's beginning, as the case may be: a lease stays either way.
#[test]
fn an_answer_of_the_launcher_that_is_none_costs_the_broker_and_no_lease() {
    let machine = Machine::start();
    let mut daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "container");
    let wanted = json!({ "vm": "v", "devices": [OTHER], "handout": "container" });
    for (which, garbage) in (0..2).flat_map(|which| GARBAGE.map(|garbage| (which, garbage))) {
        let said = String::from_utf8_lossy(garbage);
        let Some(links) = links(&daemon) else { return };
        assert_eq!(links.len(), 2, "{links:?}");
        let before = daemon.pid();
        let mut client = daemon.connect_and_greet();
        (&links[which]).write_all(garbage).unwrap();
        client.send(&call("Acquire", &wanted));
        let answer = client.try_reply();
        let is_another = |pid: &u32| *pid != before;
        until(&format!("the broker has ended: {which} {said}"), || {
            !daemon.is_there() || children(daemon.launcher(), "vfiob-broker").iter().any(is_another)
        });
        drop((client, answer));
        if !daemon.is_there() {
            daemon = machine.daemon();
        }
        daemon.connect().call("GetFds", held.key()).ok();
        until(&format!("after {said} the other is free"), || {
            let mut client = daemon.connect();
            client.send(&call("Acquire", &wanted));
            matches!(client.try_reply(), Some(Reply::Ok(..)))
        });
    }
}
