//! What can go wrong between a lease and a program that runs with it.

use crate::sys::slots;
use nix::errno::Errno;
use std::path::PathBuf;

/// The result of starting a program.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What stands in braces is no placeholder.
    #[error(
        "{{{name}}} is no placeholder: there are {{iommufd}}, {{cdev:DEVICE}}, {{container}}, \
         {{group:DEVICE}}, {{device:DEVICE}} and {{lease}}; for the text itself write {{{{{name}}}}}"
    )]
    NoPlaceholder {
        /// The text between the braces.
        name: String,
    },
    /// A placeholder names a device that is not asked for.
    #[error("{placeholder} names nothing: --device has {}", list(.devices))]
    NamesNothing {
        /// The placeholder.
        placeholder: String,
        /// The devices that are asked for.
        devices: Vec<String>,
    },
    /// A placeholder could stand for several devices.
    #[error("{placeholder} could be any of several: {device} is asked for more than once")]
    Ambiguous {
        /// The placeholder.
        placeholder: String,
        /// What it names.
        device: String,
    },
    /// The lease has no such open file.
    #[error("there is no open file for {placeholder}: the lease's handout is {handout}")]
    NotInLease {
        /// The placeholder.
        placeholder: String,
        /// In which form the lease's files were given.
        handout: String,
    },
    /// The numbers of the lease's files can't be had.
    #[error(transparent)]
    Slots(#[from] slots::Error),
    /// There is no such program.
    #[error("{}: {}", program.display(), if *.errno == Errno::ENOENT { "no such program" } else { errno.desc() })]
    Program {
        /// As it was named.
        program: PathBuf,
        /// What execve(2) says, or would.
        errno: Errno,
    },
    /// Another program's filter is there already.
    #[error(
        "a seccomp listener is there already, of a container manager or another `exec`, and there \
         can be but one: the program can't be interposed; give it the open files by number"
    )]
    Listener,
    /// The kernel can't interpose.
    #[error(
        "this kernel can't interpose (seccomp: {errno:?}): Linux 5.14 or later, with CONFIG_SECCOMP_FILTER"
    )]
    NoSeccomp {
        /// What seccomp(2) said.
        errno: Errno,
    },
    /// The filter is not written for this machine.
    #[error("programs can be interposed on x86-64 and arm64 alone")]
    Architecture,
    /// A program that opens nodes has nothing to open.
    #[error(
        "the handout devices has no node that a program could open by itself: ask for another one, \
         or give the program its files by number"
    )]
    NothingToOpen,
    /// The lease's files are not what they should be.
    #[error(transparent)]
    Lease(#[from] crate::client::Error),
    /// A system call failed.
    #[error("{call}: {} ({errno:?})", errno.desc())]
    System {
        /// Which call.
        call: &'static str,
        /// What it said.
        errno: Errno,
    },
}

fn list(devices: &[String]) -> String {
    devices.join(" ")
}

impl Error {
    /// A failed system call.
    pub(super) fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System { call, errno }
    }
}
