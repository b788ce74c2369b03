//! What a program's opens and ioctls are answered with. Several threads may be at it at once.

use super::call::Call;
use super::grants::{Attached, Grant, Grants, errno_of};
use super::sys::{self, Notification};
use crate::kernel::{Group, Node};
use nix::errno::Errno;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

/// Where the supervisor's words go.
pub type Log = fn(&str);

pub(super) struct Supervisor {
    listener: OwnedFd,
    grants: Grants,
    log: Log,
    /// What has been said is not said again.
    said: Mutex<BTreeSet<String>>,
}

/// `VFIO_GROUP_FLAGS_VIABLE`, and not attached.
const VIABLE: u32 = vfio_bindings::bindings::vfio::VFIO_GROUP_FLAGS_VIABLE;

/// What a system call is answered with.
enum Verdict {
    GoOn,
    Done,
    Failed(Errno),
}

impl Supervisor {
    pub(super) fn new(listener: OwnedFd, grants: Grants, log: Log) -> Self {
        Self { listener, grants, log, said: Mutex::default() }
    }

    /// Readable when there is a question; hung up when nobody is left to ask.
    pub(super) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// One that has nobody to tell anything.
    pub(super) fn silent(mut self) -> Self {
        self.log = |_| {};
        self
    }

    /// Answers a question. It takes as long as the program's memory and the broker do.
    ///
    /// # Errors
    /// The listener is of no more use.
    pub(super) fn answer(&self, question: &Notification) -> Result<(), Errno> {
        let call = Call::read(question);
        // Only now is it known that what was read was the asker's, and not its successor's.
        if !sys::is_waiting(self.listener.as_fd(), question.id) {
            return Ok(());
        }
        let call = call.unwrap_or_else(|errno| {
            let who = name(question.thread);
            self.say_once(&format!(
                "{who} can't be looked into ({errno}): it opens files by itself, and gets none of \
                 the lease's"
            ));
            Call::Other
        });
        let verdict = match call {
            Call::Open { node, close_on_exec } => {
                return self.open(question, &node, close_on_exec);
            }
            Call::SetContainer { group, container } => {
                self.is_attached(|attached| attached.has_both(question, group, container))
            }
            Call::SetIommu { container, kind } => {
                self.is_attached(|attached| attached.has_iommu(question, container, kind))
            }
            Call::GetStatus { group, flags } => self.is_attached(|attached| {
                Ok(attached.looks_new(question, group)? && flags.put(VIABLE).is_ok())
            }),
            Call::Other => Verdict::GoOn,
        };
        self.send(question, verdict)
    }

    fn send(&self, question: &Notification, verdict: Verdict) -> Result<(), Errno> {
        let listener = self.listener.as_fd();
        let sent = match verdict {
            Verdict::GoOn => sys::go_on(listener, question.id),
            Verdict::Done => sys::answer(listener, question.id, Ok(())),
            Verdict::Failed(errno) => sys::answer(listener, question.id, Err(errno)),
        };
        match sent {
            // It was killed meanwhile.
            Err(Errno::ENOENT) => Ok(()),
            other => other,
        }
    }

    fn open(&self, question: &Notification, node: &Node, close_on_exec: bool) -> Result<(), Errno> {
        let listener = self.listener.as_fd();
        let (given, fresh) = match self.grants.open(node) {
            Grant::Kept(file) => (sys::give(listener, question.id, file, close_on_exec), None),
            Grant::Given(fresh) => {
                let given = sys::give(listener, question.id, fresh.file.as_fd(), close_on_exec);
                (given, Some(fresh))
            }
            Grant::NotGranted => {
                let (who, lease) = (name(question.thread), self.grants.lease());
                let nodes = self.grants.nodes();
                let missing = self.grants.missing(node);
                self.say_once(&format!(
                    "{who} may not open {node}: lease {lease} has {nodes}; {missing}"
                ));
                return self.send(question, Verdict::Failed(Errno::EACCES));
            }
            Grant::Failed(error) => {
                let who = name(question.thread);
                self.say_once(&format!("{who} can't open {node} now: {error}"));
                return self.send(question, Verdict::Failed(errno_of(&error)));
            }
        };
        match (given, fresh) {
            // The program has it, and nobody else does: ours is closed here.
            (Ok(()), _) => Ok(()),
            (Err(errno), fresh) => {
                if let Some(fresh) = fresh {
                    self.grants.put_back(fresh);
                }
                self.send(question, Verdict::Failed(errno))
            }
        }
    }

    /// Whether the kernel says that what is asked for has been done.
    fn is_attached(&self, has: impl FnOnce(&Attached) -> Result<bool, Errno>) -> Verdict {
        let Some(attached) = &self.grants.attached else { return Verdict::GoOn };
        match has(attached) {
            Ok(true) => Verdict::Done,
            Ok(false) => Verdict::GoOn,
            Err(errno) => {
                self.say_once(&format!(
                    "whose files an ioctl names can't be seen (kcmp: {errno}): it goes on to the \
                     kernel, which says that the group is attached already"
                ));
                Verdict::GoOn
            }
        }
    }

    fn say_once(&self, text: &str) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        // A program can ask for as many things as it likes.
        let is_new = said.len() < 100 && said.insert(text.to_owned());
        // Whoever reads the log may be slow.
        drop(said);
        if is_new {
            (self.log)(text);
        }
    }
}

impl Attached {
    /// Whether these numbers of the asker are one of our groups and our container, and the group is
    /// attached at this moment: a program may have taken it out.
    fn has_both(
        &self,
        question: &Notification,
        group: RawFd,
        container: RawFd,
    ) -> Result<bool, Errno> {
        if !sys::is_same(question.thread, container, self.container.as_fd())? {
            return Ok(false);
        }
        let Some(ours) = self.group(question, group)? else { return Ok(false) };
        let (node, status) = (ours.node().clone(), ours.status());
        self.set().insert(node);
        Ok(status.is_ok_and(|status| status.attached))
    }

    /// Whether the number is one of our groups that the program has not put into a container, and it
    /// is in one by the broker's doing. It is viable then.
    fn looks_new(&self, question: &Notification, group: RawFd) -> Result<bool, Errno> {
        let Some(ours) = self.group(question, group)? else { return Ok(false) };
        Ok(!self.set().contains(ours.node()) && ours.status().is_ok_and(|status| status.attached))
    }

    /// The one of our groups that a number of the asker is.
    fn group(&self, question: &Notification, number: RawFd) -> Result<Option<&Group>, Errno> {
        for ours in &self.groups {
            if sys::is_same(question.thread, number, ours.as_fd())? {
                return Ok(Some(ours));
            }
        }
        Ok(None)
    }

    /// Whether the number is our container, and it has this IOMMU type at this moment: it loses it
    /// with its last group. Then it is the program that sets one, and the broker's means no more.
    fn has_iommu(
        &self,
        question: &Notification,
        container: RawFd,
        kind: u64,
    ) -> Result<bool, Errno> {
        if !self.is_as_set.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if !sys::is_same(question.thread, container, self.container.as_fd())? {
            return Ok(false);
        }
        if self.container.info().is_err() {
            self.is_as_set.store(false, Ordering::Relaxed);
            return Ok(false);
        }
        Ok(kind == u64::from(self.iommu.number()))
    }
}

/// A process, for people.
fn name(thread: Pid) -> String {
    let command = std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default();
    format!("{} (pid {thread})", command.trim_end().escape_debug())
}
