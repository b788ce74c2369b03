//! The processes of this program: what each is called, who it is, and what it may.

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
    /// What lists of processes show.
    pub fn name(self) -> &'static CStr {
        match self {
            Self::Broker => c"vfiob-broker",
            Self::Keeper => c"vfiob-keeper",
            Self::Helper(Helper::Receiver) => c"vfiob-receiver",
            Self::Helper(Helper::Closer) => c"vfiob-closer",
            Self::Helper(Helper::Holders) => c"vfiob-holders",
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
            Self::Log => User::Overflow,
            // Whoever started it reaches its socket by that, and it reads the memory of who maps.
            Self::Simulation => User::Same,
        }
    }
}
