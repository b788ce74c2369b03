//! What a proxy does, in its own process: each call in a thread, until no more come and all are
//! answered.

use crate::kernel::{Arg, Ioctl, Kernel, Linux, Node, Reply, Request};
use crate::sim::Wire;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::MsgFlags;
use serde::{Deserialize, Serialize};
use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::Builder;

/// What it is called in the list of processes; a program that is started under this name is one.
pub(super) const NAME: &str = "vfio-broker-proxy";

/// The longest call or answer, in JSON: a struct of some KiB, with up to four characters a byte.
pub(super) const MOST_BYTES: usize = 64 << 10;

/// The threads make a system call each and use next to no stack.
const STACK: usize = 128 << 10;

/// A call; with it come where its answer goes, the file that it is made on, and the one it names.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Call {
    /// Open a group's node.
    OpenGroup { group: u32, noiommu: bool },
    /// An ioctl.
    Ioctl { number: u32, returns_fd: bool, argument: Argument },
    /// Close the file when whoever asks has closed the way for the answer: its own copy is closed then.
    Close,
    /// Close the file when no more calls come.
    Keep,
}

/// The third argument of ioctl(2).
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Argument {
    Value(u64),
    Text(CString),
    Fd,
    Struct(Vec<u8>),
}

/// What came of it; with it comes the file that was opened.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Answer {
    /// 0 for success.
    pub(super) errno: i32,
    pub(super) value: i32,
    /// The struct as the kernel left it.
    pub(super) bytes: Vec<u8>,
}

/// Whose kernel.
#[derive(Clone, Debug)]
pub(in super::super) enum Machine {
    /// This machine's.
    Linux,
    /// A simulated one's, at this control socket.
    Simulated(PathBuf),
}

impl Machine {
    pub(in super::super) fn arguments(&self) -> Option<OsString> {
        match self {
            Self::Linux => None,
            Self::Simulated(control) => Some(control.into()),
        }
    }
}

/// The kernel that [`Machine::arguments`] named to this process.
pub(in super::super) fn kernel(argument: Option<OsString>) -> std::io::Result<Arc<dyn Kernel>> {
    match argument {
        None => Ok(Arc::new(Linux)),
        Some(control) => Ok(Arc::new(Wire::connect(control.as_ref())?)),
    }
}

/// Makes calls if this program was started as a proxy: call it first of all in `main`.
pub(in super::super) fn be_one_if_asked() -> Option<ExitCode> {
    let mut args = super::super::started_as(NAME)?;
    let Ok(kernel) = kernel(args.next()) else { return Some(ExitCode::FAILURE) };
    // Whoever ends a service ends what it is at as well, and that is not to be left half done.
    let _ = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect::<SigSet>()
        .thread_block();
    serve(&kernel);
    Some(ExitCode::SUCCESS)
}

fn serve(kernel: &Arc<dyn Kernel>) {
    let (stdin, none) = (std::io::stdin(), MsgFlags::empty());
    let mut bytes = vec![0; MOST_BYTES];
    let (mut threads, mut kept) = (Vec::new(), Vec::new());
    while let Ok(received) = fdpass::receive(stdin.as_fd(), &mut bytes, 3, none)
        && received.len > 0
    {
        let mut files = received.fds.into_iter();
        let call = serde_json::from_slice::<Call>(&bytes[..received.len]);
        let (Ok(call), Some(answer)) = (call, files.next()) else { continue };
        if let Call::Keep = call {
            kept.extend(files);
            let _ = fdpass::send(answer.as_fd(), TAKEN, &[], none);
            continue;
        }
        let (kernel, files) = (Arc::clone(kernel), files.collect());
        // It counts as taken when there is somebody to make it.
        let thread = Builder::new().stack_size(STACK).spawn(move || {
            let _ = fdpass::send(answer.as_fd(), TAKEN, &[], none);
            make(&*kernel, call, files, &answer);
        });
        threads.retain(|thread: &std::thread::JoinHandle<()>| !thread.is_finished());
        threads.extend(thread);
    }
    for file in kept {
        threads.extend(Builder::new().stack_size(STACK).spawn(move || drop(file)));
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// What is said of a call before it is made.
const TAKEN: &[u8] = b"t";

fn make(kernel: &dyn Kernel, call: Call, files: Vec<OwnedFd>, socket: &OwnedFd) {
    let mut answer = Answer::default();
    let done = match call {
        Call::OpenGroup { group, noiommu } => {
            let node = if noiommu { Node::NoIommuGroup(group) } else { Node::Group(group) };
            kernel.open(&node).map(|file| Reply { value: 0, fd: Some(file) })
        }
        Call::Ioctl { number, returns_fd, argument } => {
            let request = Request { number, name: "", returns_fd };
            let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            ioctl(kernel, request, argument, &files, &mut answer.bytes)
        }
        Call::Close => {
            let mut end = [PollFd::new(socket.as_fd(), PollFlags::empty())];
            while poll(&mut end, PollTimeout::NONE) == Err(Errno::EINTR) {}
            Ok(Reply::default())
        }
        Call::Keep => Ok(Reply::default()),
    };
    // What may have been the last copy is closed before anybody hears of the answer.
    drop(files);
    let file = match done {
        Ok(Reply { value, fd }) => {
            answer.value = value;
            fd
        }
        Err(errno) => {
            answer.errno = errno as i32;
            None
        }
    };
    // It has numbers in it only: it can be written.
    let bytes = serde_json::to_vec(&answer).unwrap_or_default();
    let files: Vec<BorrowedFd<'_>> = file.iter().map(AsFd::as_fd).collect();
    // Where nobody waits any more, the file is closed here.
    let _ = fdpass::send(socket.as_fd(), &bytes, &files, MsgFlags::MSG_DONTWAIT);
}

fn ioctl(
    kernel: &dyn Kernel,
    request: Request,
    argument: Argument,
    files: &[BorrowedFd<'_>],
    answer: &mut Vec<u8>,
) -> Result<Reply, Errno> {
    let &[file, ref named @ ..] = files else { return Err(Errno::EBADF) };
    match argument {
        Argument::Value(value) => kernel.ioctl(file, Ioctl { request, arg: Arg::Value(value) }),
        Argument::Text(text) => kernel.ioctl(file, Ioctl { request, arg: Arg::Text(&text) }),
        Argument::Fd => match named {
            &[named] => kernel.ioctl(file, Ioctl { request, arg: Arg::Fd(named) }),
            _ => Err(Errno::EBADF),
        },
        Argument::Struct(mut bytes) => {
            let arg = Arg::Struct { bytes: &mut bytes, fds: &[], out: None };
            let done = kernel.ioctl(file, Ioctl { request, arg });
            *answer = bytes;
            done
        }
    }
}
