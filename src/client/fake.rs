//! A small broker for the client's tests: it says what a test tells it to, call by call.

use crate::protocol::Frames;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

/// One connection, from the broker's side.
pub(super) struct Peer {
    stream: UnixStream,
    frames: Frames,
    /// Open files that came with the last call.
    pub(super) fds: Vec<OwnedFd>,
}

impl Peer {
    /// The next call as JSON; `None` when the client has closed.
    pub(super) fn call(&mut self) -> Option<serde_json::Value> {
        self.fds.clear();
        let mut buf = [0; 1000];
        loop {
            if let Some(message) = self.frames.next_message().unwrap() {
                return Some(serde_json::from_slice(message).unwrap());
            }
            let got = fdpass::receive(self.stream.as_fd(), &mut buf, 16, MsgFlags::empty());
            let got = match got {
                // It closed with something unread.
                Err(fdpass::ReceiveError::Errno(Errno::ECONNRESET)) => return None,
                other => other.unwrap(),
            };
            if got.len == 0 {
                return None;
            }
            self.frames.push(&buf[..got.len]);
            self.fds.extend(got.fds);
        }
    }

    /// Has the kernel refuse open files from the client, or no longer; false where it can't.
    pub(super) fn pass_fds(&self, pass: bool) -> bool {
        crate::sys::peer::pass_fds(self.stream.as_fd(), pass).is_ok()
    }

    /// Sends bytes as they are; the open files go with the first.
    pub(super) fn say(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.try_say(bytes, fds), Ok(bytes.len()));
    }

    pub(super) fn try_say(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> nix::Result<usize> {
        fdpass::send(self.stream.as_fd(), bytes, fds, MsgFlags::empty())
    }

    /// Sends a reply's parameters.
    pub(super) fn reply(&mut self, parameters: &str, fds: &[BorrowedFd<'_>]) {
        self.say(format!("{{\"parameters\":{parameters}}}\0").as_bytes(), fds);
    }

    /// Answers an Acquire as the broker does; returns the lease pipe's write end.
    pub(super) fn grant(&mut self) -> std::io::PipeWriter {
        let (read_end, write_end) = std::io::pipe().unwrap();
        let (container, group) = (null(), null());
        self.reply(
            r#"{"lease":"l1","key":"k1","tenant":"t","backend":"type1","handout":"container",
               "iommu":"type1v2","container":"c","devices":["0000:65:00.0"],"fds":[
               {"index":0,"kind":"container","name":""},{"index":1,"kind":"group","name":"26"},
               {"index":2,"kind":"lease","name":""}]}"#,
            &[container.as_fd(), group.as_fd(), read_end.as_fd()],
        );
        write_end
    }
}

/// A script that answers one call and hangs up, and what tells when it has.
pub(super) fn answer_and_hang_up(parameters: &'static str) -> (Script, Receiver<()>) {
    let (hung_up, heard) = std::sync::mpsc::channel();
    let script = script(move |mut peer| {
        peer.call();
        peer.reply(parameters, &[]);
        drop(peer);
        hung_up.send(()).unwrap();
    });
    (script, heard)
}

/// A script that grants a lease and has the kernel refuse open files until it is greeted, and then
/// too unless it lets them in.
pub(super) fn refuse_files_until_greeted(lets_in: bool) -> Script {
    script(move |mut peer| {
        peer.call();
        let can_refuse = peer.pass_fds(false);
        let _lease = peer.grant();
        if can_refuse {
            let greeting = peer.call().unwrap();
            assert_eq!(greeting["method"], "org.varlink.service.GetInfo");
            peer.pass_fds(lets_in);
            peer.reply("{}", &[]);
        }
        if lets_in {
            let call = peer.call().unwrap();
            assert_eq!((&call["parameters"]["iova"], peer.fds.len()), (&4096.into(), 1));
            peer.reply("{}", &[]);
        }
        assert!(peer.call().is_none() || !can_refuse);
    })
}

pub(super) fn null() -> std::fs::File {
    std::fs::File::open("/dev/null").unwrap()
}

/// The broker: one script for each connection, in the order in which they come.
pub(super) struct Fake {
    pub(super) path: PathBuf,
    _dir: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

pub(super) type Script = Box<dyn FnOnce(Peer) + Send>;

pub(super) fn script(script: impl FnOnce(Peer) + Send + 'static) -> Script {
    Box::new(script)
}

impl Fake {
    pub(super) fn new(scripts: Vec<Script>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broker.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = Some(std::thread::spawn(move || serve(&listener, scripts)));
        Self { path, _dir: dir, thread }
    }

    /// A broker at a path of the test's own.
    pub(super) fn serve_at(path: &Path, scripts: Vec<Script>) -> JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || serve(&listener, scripts))
    }

    /// Waits until every script has run; a panic in one is a panic here.
    pub(super) fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn serve(listener: &UnixListener, scripts: Vec<Script>) {
    for script in scripts {
        let (stream, _) = listener.accept().unwrap();
        script(Peer { stream, frames: Frames::default(), fds: Vec::new() });
    }
}
