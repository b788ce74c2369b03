//! What a program's opens and ioctls are answered with. Several threads may be at it at once.

use super::answers::{Answers, Asker, Ioctl, Opened};
use super::call::Call;
use super::sys::{self, Notification};
use crate::kernel::Node;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// Where the supervisor's words go.
pub type Log = fn(&str);

pub(super) struct Supervisor {
    listener: OwnedFd,
    answers: Box<dyn Answers>,
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
    pub(super) fn new(listener: OwnedFd, answers: Box<dyn Answers>, log: Log) -> Self {
        Self { listener, answers, log, said: Mutex::default() }
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
                "{who} can't be looked into ({errno}): it opens files by itself, and gets none that \
                 it could be given"
            ));
            Call::Other
        });
        let verdict = match call {
            Call::Open { node, close_on_exec } => {
                return self.open(question, &node, close_on_exec);
            }
            Call::Ioctl(ioctl) => self.ioctl(question, &ioctl),
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
        let give = |file| sys::give(listener, question.id, file, close_on_exec);
        let (given, fresh) = match self.answers.open(node) {
            Opened::Kept(file) => (give(file), None),
            Opened::Given(fresh) => (give(fresh.as_fd()), Some(fresh)),
            Opened::Refused { errno, why } => {
                self.say_once(&format!("{} {why}", name(question.thread)));
                return self.send(question, Verdict::Failed(errno));
            }
        };
        match given {
            // The program has it, and nobody else does: ours is closed here.
            Ok(()) => Ok(()),
            Err(errno) => {
                if let Some(fresh) = fresh {
                    self.answers.put_back(node, fresh);
                }
                self.send(question, Verdict::Failed(errno))
            }
        }
    }

    /// The kernel is asked unless what is asked for is so already.
    fn ioctl(&self, question: &Notification, ioctl: &Ioctl) -> Verdict {
        match self.answers.ioctl(Asker(question.thread), ioctl) {
            Ok(true) => match ioctl {
                Ioctl::GetStatus { flags, .. } if flags.put(VIABLE).is_err() => Verdict::GoOn,
                _ => Verdict::Done,
            },
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

/// A process, for people.
fn name(thread: Pid) -> String {
    let command = std::fs::read_to_string(format!("/proc/{thread}/comm")).unwrap_or_default();
    format!("{} (pid {thread})", command.trim_end().escape_debug())
}
