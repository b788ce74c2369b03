//! The floor: a bare epoll loop that answers each call with bytes and open files that it was given
//! once. One process, one thread, no parsing, no bookkeeping.

use super::raw::{RawClient, connect_soon};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::MsgFlags;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Stdio};
use vfio_broker::sys::fdpass::{self, MAX_FDS};

/// Says that this process is to be the floor.
const FLOOR: &str = "VFIO_BROKER_BENCH_FLOOR";

/// Becomes the floor where that is what this process was started for. First thing in `main`.
pub fn be_it_if_asked() {
    if let Some(path) = std::env::var_os(FLOOR) {
        serve(path.as_ref());
    }
}

/// A running floor; ends when dropped.
pub struct Floor {
    child: Child,
    pub client: RawClient,
    _dir: tempfile::TempDir,
}

impl Floor {
    /// One that answers with `reply` and `files`.
    pub fn start(reply: &[u8], files: &[BorrowedFd<'_>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("floor.sock");
        let this = std::env::current_exe().unwrap();
        let mut command = super::placement::server(this);
        let child = command.env(FLOOR, &path).stdin(Stdio::null()).spawn().unwrap();
        let teacher = connect_soon(&path);
        fdpass::send(teacher.as_fd(), reply, files, MsgFlags::empty()).unwrap();
        let client = RawClient::new(UnixStream::connect(&path).unwrap());
        Self { child, client, _dir: dir }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(path: &Path) -> ! {
    let listener = UnixListener::bind(path).unwrap();
    let mut buffer = vec![0; 64 << 10];
    let (teacher, _) = listener.accept().unwrap();
    let got = fdpass::receive(teacher.as_fd(), &mut buffer, MAX_FDS, MsgFlags::empty()).unwrap();
    let reply = buffer[..got.len].to_vec();
    let files: Vec<OwnedFd> = got.fds;
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();

    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let watch = |fd: BorrowedFd<'_>| {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, fd.as_raw_fd() as u64);
        epoll.add(fd, event).unwrap();
    };
    watch(listener.as_fd());
    let mut clients = HashMap::new();
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap();
        for event in &events[..count] {
            let Some(client): Option<&UnixStream> = clients.get(&event.data()) else {
                let (client, _) = listener.accept().unwrap();
                watch(client.as_fd());
                clients.insert(client.as_raw_fd() as u64, client);
                continue;
            };
            let got = fdpass::receive(client.as_fd(), &mut buffer, 0, MsgFlags::MSG_DONTWAIT);
            match got.unwrap().len {
                0 => drop(clients.remove(&event.data())),
                len => {
                    assert_eq!(buffer[len - 1], 0, "the bench sends whole messages");
                    fdpass::send(client.as_fd(), &reply, &files, MsgFlags::MSG_DONTWAIT).unwrap();
                }
            }
        }
    }
}
