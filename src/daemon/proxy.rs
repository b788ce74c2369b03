//! Kernel calls on what a holder has open too.
//!
//! A holder can keep such a call in the kernel for ever: type1 pins pages under the lock that every call
//! on the container takes, and a page can be one that a file system of the holder's own never brings. A
//! process in such a call can't be killed, and what it has open stays open. So they are made by a
//! *proxy*: this program again, in a process of its own ([`process`]) that has no files but those of the
//! calls under way, each in a thread of its own. An answer is waited for no longer than a deadline; of
//! each lease one call is under way at a time.

mod process;

pub(super) use process::be_one_if_asked;

use crate::broker::Contested;
use crate::kernel::{Arg, Ioctl, Kernel, Node, Reply};
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use process::{Answer, Argument, Call, NAME};
pub(super) use process::{Machine, kernel};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tracing::error;

/// How long the process may take to say that it has taken a call. One that takes longer is no more.
const TAKEN: Duration = Duration::from_secs(5);

/// The way to the process that makes the calls, and what of this kernel needs none.
#[derive(Debug)]
pub(super) struct Proxy {
    kernel: Arc<dyn Kernel>,
    machine: Machine,
    patience: Duration,
    process: Mutex<Process>,
    /// Where the answers come to opens that were not answered in time, by group.
    opening: Mutex<HashMap<u32, OwnedFd>>,
}

/// The process, and those before it that have not ended yet.
#[derive(Debug, Default)]
struct Process {
    now: Option<(Child, OwnedFd)>,
    before: Vec<Child>,
}

/// What came of a call, with the file that it made; else where that will come to.
type Answered = Result<(Answer, Option<OwnedFd>), OwnedFd>;

/// The kernel of one lease.
#[derive(Debug)]
struct ProxyKernel {
    proxy: Arc<Proxy>,
    /// Where the answer comes to a call that was not answered in time.
    late: Mutex<Option<OwnedFd>>,
}

impl Proxy {
    /// One for this machine's kernel, or a simulated one's; `patience` is for each call.
    pub(super) fn new(kernel: Arc<dyn Kernel>, machine: Machine, patience: Duration) -> Arc<Self> {
        let (process, opening) = (Mutex::default(), Mutex::default());
        Arc::new(Self { kernel, machine, patience, process, opening })
    }

    /// Has these closed when this process has ended, each by itself: one that hangs keeps no other open.
    pub(super) fn close_at_the_end(&self, files: Vec<OwnedFd>) {
        for file in files {
            // From here on it has a copy, and ours is not the last one.
            let _ = self.begin(&Call::Keep, &[file.as_fd()]);
        }
    }

    /// Has a call made; returns where its answer comes.
    fn begin(&self, call: &Call, files: &[BorrowedFd<'_>]) -> Result<OwnedFd, Errno> {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        // The second try is with a process that was started just now.
        match self.give(&mut process, call, files) {
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::EAGAIN | Errno::ETIMEDOUT) => {
                process.give_up();
                self.give(&mut process, call, files)
            }
            given => given,
        }
    }

    /// Closes a file that may be the last copy: here it is not.
    fn close(&self, file: OwnedFd) {
        match self.begin(&Call::Close, &[file.as_fd()]) {
            Ok(told) => {
                // It closes its copy when it has been told that ours is closed.
                drop(file);
                drop(told);
            }
            Err(errno) => {
                error!(%errno, "no process can be had to close a file that its holder can keep open");
                // Open for ever, rather than in the way of all others.
                std::mem::forget(file);
            }
        }
    }

    /// Has a group opened, unless an earlier open of it has not come to its end.
    fn open(&self, group: u32, noiommu: bool) -> Result<OwnedFd, Errno> {
        let opening = || self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        has_ended(opening().get(&group))?;
        opening().remove(&group);
        match self.answer(&Call::OpenGroup { group, noiommu }, &[])? {
            Ok((_, file)) => file.ok_or(Errno::EIO),
            Err(late) => {
                opening().insert(group, late);
                Err(Errno::ETIMEDOUT)
            }
        }
    }

    /// Has a call made; what came of it, or where that will come to.
    fn answer(&self, call: &Call, files: &[BorrowedFd<'_>]) -> Result<Answered, Errno> {
        let socket = self.begin(call, files)?;
        if !is_ready(&socket, self.patience)? {
            return Ok(Err(socket));
        }
        let mut bytes = vec![0; process::MOST_BYTES];
        let received = fdpass::receive(socket.as_fd(), &mut bytes, 1, MsgFlags::MSG_DONTWAIT);
        let mut received = received.map_err(|_| Errno::EIO)?;
        let answer: Answer =
            serde_json::from_slice(&bytes[..received.len]).map_err(|_| Errno::EIO)?;
        // Its end says that no copy of anything is left there.
        let _ = is_ready(&socket, TAKEN)?;
        match answer.errno {
            0 => Ok(Ok((answer, received.fds.pop()))),
            errno => Err(Errno::from_raw(errno)),
        }
    }

    fn give(
        &self,
        process: &mut Process,
        call: &Call,
        files: &[BorrowedFd<'_>],
    ) -> Result<OwnedFd, Errno> {
        let (answer, theirs) = pair()?;
        let bytes = serde_json::to_vec(call).map_err(|_| Errno::EINVAL)?;
        let all: Vec<_> = [theirs.as_fd()].into_iter().chain(files.iter().copied()).collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        fdpass::send(process.started(&self.machine)?, &bytes, &all, flags)?;
        drop(theirs);
        if !is_ready(&answer, TAKEN)? {
            return Err(Errno::ETIMEDOUT);
        }
        match fdpass::receive(answer.as_fd(), &mut [0; 1], 0, flags) {
            Ok(taken) if taken.len == 1 => Ok(answer),
            _ => Err(Errno::EPIPE),
        }
    }
}

impl Process {
    /// The way to it; starts one where there is none.
    fn started(&mut self, machine: &Machine) -> Result<BorrowedFd<'_>, Errno> {
        if self.now.is_none() {
            let (socket, theirs) = pair()?;
            let mut command = Command::new("/proc/self/exe");
            command.arg0(NAME).args(machine.arguments()).env_clear().current_dir("/");
            // Signals to the daemon's group are not for it: what it is at, it finishes.
            command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
            let child = command.spawn().map_err(|error| {
                Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EAGAIN))
            })?;
            self.now = Some((child, socket));
        }
        self.before.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        self.now.as_ref().map(|(_, socket)| socket.as_fd()).ok_or(Errno::ECHILD)
    }

    fn give_up(&mut self) {
        // It ends when what it is at has come to its end.
        self.before.extend(self.now.take().map(|(child, _)| child));
    }
}

impl Contested for Arc<Proxy> {
    fn kernel(&self) -> Arc<dyn Kernel> {
        Arc::new(ProxyKernel { proxy: Arc::clone(self), late: Mutex::default() })
    }
}

impl ProxyKernel {
    fn call(
        &self,
        call: &Call,
        files: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Option<OwnedFd>), Errno> {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        has_ended(late.as_ref())?;
        // Whatever came of it: what is done now is done on what it left.
        *late = None;
        self.proxy.answer(call, files)?.map_err(|socket| {
            *late = Some(socket);
            Errno::ETIMEDOUT
        })
    }

    fn reply(&self, call: &Call, files: &[BorrowedFd<'_>]) -> Result<Reply, Errno> {
        let (answer, fd) = self.call(call, files)?;
        Ok(Reply { value: answer.value, fd })
    }
}

impl Kernel for ProxyKernel {
    fn is_simulated(&self) -> bool {
        self.proxy.kernel.is_simulated()
    }

    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        match *node {
            Node::Group(group) => self.proxy.open(group, false),
            Node::NoIommuGroup(group) => self.proxy.open(group, true),
            // Nobody else has these.
            Node::Container | Node::Iommu | Node::Cdev(_) => self.proxy.kernel.open(node),
        }
    }

    fn close(&self, fd: OwnedFd) {
        self.proxy.close(fd);
    }

    fn ioctl(&self, fd: BorrowedFd<'_>, call: Ioctl<'_>) -> Result<Reply, Errno> {
        let Ioctl { request, arg } = call;
        let (number, returns_fd) = (request.number, request.returns_fd);
        let ioctl = |argument| Call::Ioctl { number, returns_fd, argument };
        match arg {
            Arg::Value(value) => self.reply(&ioctl(Argument::Value(value)), &[fd]),
            Arg::Text(text) => self.reply(&ioctl(Argument::Text(text.to_owned())), &[fd]),
            Arg::Fd(named) => self.reply(&ioctl(Argument::Fd), &[fd, named]),
            Arg::Struct { bytes, fds: [], out: None } => {
                let (answer, file) = self.call(&ioctl(Argument::Struct(bytes.to_vec())), &[fd])?;
                if answer.bytes.len() != bytes.len() {
                    return Err(Errno::EIO);
                }
                bytes.copy_from_slice(&answer.bytes);
                Ok(Reply { value: answer.value, fd: file })
            }
            // Not one of those that the broker makes on a holder's files.
            arg => self.proxy.kernel.ioctl(fd, Ioctl { request, arg }),
        }
    }

    fn pread(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        self.proxy.kernel.pread(fd, buf, offset)
    }

    fn pwrite(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize, Errno> {
        self.proxy.kernel.pwrite(fd, buf, offset)
    }

    fn sysfs_read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.proxy.kernel.sysfs_read(path)
    }

    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.proxy.kernel.sysfs_write(path, bytes)
    }

    fn sysfs_list(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.proxy.kernel.sysfs_list(path)
    }

    fn sysfs_link(&self, path: &str) -> Result<String, Errno> {
        self.proxy.kernel.sysfs_link(path)
    }

    fn sysfs_inode(&self, path: &str) -> Result<u64, Errno> {
        self.proxy.kernel.sysfs_inode(path)
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

/// Fails while an earlier call, which was not answered in time, is under way still.
fn has_ended(earlier: Option<&OwnedFd>) -> Result<(), Errno> {
    match earlier {
        Some(answer) if !is_ready(answer, Duration::ZERO)? => Err(Errno::ETIMEDOUT),
        _ => Ok(()),
    }
}

/// Whether something comes there within that time: a message, or the end.
fn is_ready(socket: &OwnedFd, within: Duration) -> Result<bool, Errno> {
    let within = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
    loop {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, within) {
            Err(Errno::EINTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}
