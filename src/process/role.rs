//! The processes of this program: what each is called, who it is, and what it may.

use super::calls::{KEEPS, LOOKS, MESSAGES, READS, SERVES, THREADS, USUAL};
use crate::sys::seccomp::SystemCall;
use serde::{Deserialize, Serialize};
use std::ffi::CStr;

/// What a process is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Talks to clients and decides.
    Broker,
    /// Has an address space open.
    Keeper,
    /// Does what may not be done where there are other files.
    Helper(Helper),
    /// Reads and compiles the policy.
    PolicyReader,
    /// Copies the log to where it is read.
    Log,
    /// Plays a kernel.
    Simulation,
}

/// A process for one thing that the broker must not do, and ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Helper {
    /// Receives one message with open files, checks them, and reports.
    Receiver,
    /// Closes sockets that hold what nobody has read.
    Closer,
    /// Looks for processes that have something open. It has nothing of a peer's.
    Holders,
}

/// Whom a process runs as, where it is root who starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// As before.
    Same,
    /// The broker's own user: nobody else can stop it or look into it.
    Broker,
    /// A user that no file and no other process belongs to.
    Nobody,
    /// The user that systems call nobody. The journal puts its lines with those of the system; a uid that
    /// nobody knows gets a journal of its own.
    Overflow,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Broker,
        Self::Keeper,
        Self::Helper(Helper::Receiver),
        Self::Helper(Helper::Closer),
        Self::Helper(Helper::Holders),
        Self::PolicyReader,
        Self::Log,
        Self::Simulation,
    ];

    /// What lists of processes show.
    pub fn name(self) -> &'static CStr {
        match self {
            Self::Broker => c"vfiob-broker",
            Self::Keeper => c"vfiob-keeper",
            Self::Helper(Helper::Receiver) => c"vfiob-receiver",
            Self::Helper(Helper::Closer) => c"vfiob-closer",
            Self::Helper(Helper::Holders) => c"vfiob-holders",
            Self::PolicyReader => c"vfiob-policy",
            Self::Log => c"vfiob-log",
            Self::Simulation => c"vfiob-sim",
        }
    }

    /// Whom it runs as.
    pub fn user(self) -> User {
        match self {
            Self::Broker => User::Broker,
            // It opens device nodes and writes to sysfs, which are root's.
            Self::Keeper => User::Same,
            Self::Helper(_) => User::Nobody,
            // The policy can be one that root alone may read.
            Self::PolicyReader => User::Same,
            Self::Log => User::Overflow,
            // Whoever started it reaches its socket by that, and it reads the memory of who maps.
            Self::Simulation => User::Same,
        }
    }

    /// The system calls that it makes; `None` where it may make any.
    pub fn calls(self) -> Option<&'static [&'static [SystemCall]]> {
        match self {
            Self::Broker => Some(&[USUAL, MESSAGES, LOOKS, READS, SERVES]),
            Self::Keeper => Some(&[USUAL, MESSAGES, LOOKS, READS, KEEPS]),
            Self::Helper(Helper::Holders) => Some(&[USUAL, MESSAGES, LOOKS, READS]),
            // Each waits for several closes at a time, in threads.
            Self::Helper(Helper::Receiver | Helper::Closer) => {
                Some(&[USUAL, THREADS, MESSAGES, LOOKS])
            }
            // Name services are this system's, and make what calls they like but the hostile ones.
            Self::PolicyReader => None,
            Self::Log => Some(&[USUAL]),
            // A test aid, with no rights but those of who starts it.
            Self::Simulation => None,
        }
    }

    /// What it may read of the file system, while it may write nothing; `None` where it may open what its
    /// user may.
    pub fn reads(self) -> Option<&'static [&'static str]> {
        match self {
            // Devices; the units that clients run in, and what its own processes are at.
            Self::Broker => Some(&["/sys", "/proc"]),
            // Landlock would mark each device file that it opens, for whoever is given that.
            Self::Keeper => None,
            // Landlock would not let it look into other processes.
            Self::Helper(Helper::Holders) => None,
            Self::PolicyReader => Some(&["/"]),
            Self::Helper(Helper::Receiver | Helper::Closer) | Self::Log => Some(&[]),
            Self::Simulation => None,
        }
    }
}
