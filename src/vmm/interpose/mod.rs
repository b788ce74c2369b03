//! The interposer: a program that opens `/dev/vfio/26` by itself is given an open file of ours.
//!
//! The program runs under a seccomp filter that has the kernel ask a supervisor about each open
//! (`filter`), which looks at the path in the program's memory (`call`, `path`), and hands a file over or lets the kernel
//! go on (`supervisor`), in threads (`service`) beside the one that passes signals on (`wait`). Which file,
//! the interposing program says (`answers`): nothing here knows of leases or of the broker.
//!
//! It is a convenience, not a security boundary: between the look and the kernel's own one the program
//! can change the path; it gets nothing by it that it could not have had without.

mod answers;
mod call;
mod filter;
mod path;
mod service;
mod start;
mod supervisor;
mod sys;
mod wait;

pub use answers::{Answers, Asker, Ioctl, Opened, Place};
pub use call::IOCTLS;
pub use supervisor::Log;
pub use wait::Ended;

use super::{Error, Result};
use crate::sys::slots::Slots;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::ForkResult;
use std::path::PathBuf;
use std::process::Command;
use supervisor::Supervisor;

/// A program and what it runs with.
pub struct Interposed {
    /// The program, its arguments and its environment. `LISTEN_PID` is set when its process is
    /// there.
    pub command: Command,
    /// What it inherits.
    pub slots: Slots,
    /// What it is answered.
    pub answers: Box<dyn Answers>,
    /// Where is told what it was not given.
    pub log: Log,
}

impl Interposed {
    /// Runs it to its end. What it has left running under the filter is served on by a process in
    /// the background.
    ///
    /// # Errors
    /// It was not started: [`Error::Program`], [`Error::Listener`] and others.
    pub fn run(self) -> Result<Ended> {
        let Self { command, slots, answers, log } = self;
        let filter = filter::program(answers.ioctls()).ok_or(Error::Architecture)?;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(Error::system("socketpair"))?;
        // From before there is a program, so that no end of it goes by unseen.
        let mut before = SigSet::empty();
        let blocked = wait::signals();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&blocked), Some(&mut before))
            .map_err(Error::system("sigprocmask"))?;
        // From before there is a program too: nobody is to look into this process, which has the lease's
        // key and can do more than the program. The program itself begins anew when it is executed.
        nix::sys::prctl::set_dumpable(false).map_err(Error::system("prctl PR_SET_DUMPABLE"))?;
        match sys::fork().map_err(Error::system("fork"))? {
            ForkResult::Child => {
                drop(ours);
                start::start(command, &filter, &before, &theirs)
            }
            ForkResult::Parent { child } => {
                let path = PathBuf::from(command.get_program());
                drop((theirs, slots, command));
                let listener = start::listener(&ours, child)?;
                let supervisor = Supervisor::new(listener, answers, log);
                wait::Wait::new(child, path, ours)?.run(supervisor)
            }
        }
    }
}
