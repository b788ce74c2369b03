//! What comes beside a message's bytes: who sent it, its reply socket, and the open files it
//! names.

use super::machine::{Event, FileId, Named};
use super::process::Process;
use super::wire::{FDS_WITH_CALL, Request};
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, UnixAddr, UnixCredentials, getsockname};
use nix::sys::stat::{SFlag, fstat};
use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

/// A message and what came with it.
#[derive(Debug)]
pub(super) struct Call {
    /// `None` where it is not of the right form.
    pub(super) request: Option<Request>,
    pub(super) sender: Option<UnixCredentials>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Call {
    pub(super) fn caller(&self) -> Option<Process> {
        self.sender.map(Process::new)
    }
}

/// Recognises open files.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Simulated open files by the inode of the end that was given out.
    inodes: HashMap<u64, FileId>,
    disposer: Disposer,
}

impl Incoming {
    pub(super) fn new(disposer: Disposer) -> Self {
        Self { inodes: HashMap::new(), disposer }
    }

    /// Remembers the end of a simulated open file that is being given out.
    pub(super) fn know(&mut self, inode: u64, file: FileId) {
        self.inodes.insert(inode, file);
    }

    /// Forgets it, before its inode can be another's.
    pub(super) fn forget(&mut self, inode: u64) {
        self.inodes.remove(&inode);
    }

    /// Takes the reply socket from a message. Without a Unix socket to answer to, nothing is done.
    pub(super) fn take_reply(&self, call: &mut Call) -> Option<OwnedFd> {
        if call.fds.is_empty() {
            return None;
        }
        let reply = call.fds.remove(0);
        if getsockname::<UnixAddr>(reply.as_raw_fd()).is_ok() {
            return Some(reply);
        }
        call.fds.push(reply);
        for fd in call.fds.drain(..) {
            self.disposer.close(fd);
        }
        None
    }

    /// Closes what came with a message that is not carried out.
    pub(super) fn dispose(&self, call: Call) {
        for fd in call.fds {
            self.disposer.close(fd);
        }
    }

    /// Finds out what the fds of a message are, and lets go of them.
    ///
    /// # Errors
    /// EINVAL: there are not as many as the message says.
    pub(super) fn name(
        &self,
        request: &Request,
        call: Call,
        reply: &OwnedFd,
    ) -> Result<Vec<(u32, Option<Named>)>, Errno> {
        let mut fds = call.fds;
        let wanted = request.fds();
        let mut enough = fds.len() == wanted.min(FDS_WITH_CALL);
        while enough && fds.len() < wanted {
            let more = fdpass::receive(
                reply.as_fd(),
                &mut [0; 1],
                fdpass::MAX_FDS,
                MsgFlags::MSG_DONTWAIT,
            );
            let more = more.map(|received| received.fds).unwrap_or_default();
            enough = !more.is_empty() && fds.len() + more.len() <= wanted;
            fds.extend(more);
        }
        let mut fds: Vec<Named> = fds.into_iter().map(|fd| self.recognise(fd)).collect();
        if !enough {
            return Err(Errno::EINVAL);
        }
        let mut fds = fds.drain(..);
        let slots = request.slots.iter();
        Ok(slots.map(|&(at, present)| (at, if present { fds.next() } else { None })).collect())
    }

    fn recognise(&self, fd: OwnedFd) -> Named {
        let is_socket = |mode: u32| mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits();
        let file = fstat(&fd)
            .ok()
            .filter(|stat| is_socket(stat.st_mode))
            .and_then(|stat| self.inodes.get(&stat.st_ino));
        if let Some(file) = file {
            return Named::File(*file);
        }
        let link = fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()));
        if link.is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]") {
            return Named::Event(Arc::new(EventFd(fd)));
        }
        let memory = memory_of(&fd);
        self.disposer.close(fd);
        memory.map_or(Named::Other, Named::Memory)
    }
}

/// How many bytes a file of memory has; `None` for any other file. Only files of tmpfs and hugetlbfs
/// have seals, and asking for them never reaches a file system, which could block.
fn memory_of(fd: &OwnedFd) -> Option<u64> {
    fcntl(fd, FcntlArg::F_GET_SEALS).ok()?;
    u64::try_from(fstat(fd).ok()?.st_size).ok()
}

/// An eventfd that interrupts are signalled to.
#[derive(Debug)]
struct EventFd(OwnedFd);

impl Event for EventFd {
    fn signal(&self) {
        // A counter that is full would block; the kernel leaves it as it is, too.
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut ready, PollTimeout::ZERO) == Ok(1) {
            let _ = nix::unistd::write(&self.0, &1u64.to_ne_bytes());
        }
    }
}

/// Closes open files of unknown kinds on a thread of its own: closing some can block.
#[derive(Debug)]
pub(super) struct Disposer(Option<Sender<OwnedFd>>);

impl Disposer {
    pub(super) fn start() -> Self {
        let (sender, receiver) = channel::<OwnedFd>();
        let thread = std::thread::Builder::new().name("vfio-sim-close".into());
        let started = thread.spawn(move || receiver.into_iter().for_each(drop));
        Self(started.is_ok().then_some(sender))
    }

    fn close(&self, fd: OwnedFd) {
        if let Some(sender) = &self.0 {
            // Where the thread is gone, the fd comes back in the error and is closed here.
            let _ = sender.send(fd);
        }
    }
}
