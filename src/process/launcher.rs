//! What the broker and the launcher say to each other: the interface `org.vfiobroker.Launcher`.
//!
//! The broker asks on one link, and is told on another when it is to end and by which policy to go.
//! Both are of the same build: the launcher has forked the broker.

use super::link::calls;
use super::role::Helper;
use crate::policy::Policy;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The name that every error of the launcher has; what it means is in its parameters.
pub const FAILED: &str = "org.vfiobroker.Launcher.Failed";

/// The parameters of [`FAILED`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failed {
    /// What a system call said.
    pub errno: i32,
}

impl Failed {
    /// The same as an error.
    pub fn errno(&self) -> Errno {
        Errno::from_raw(self.errno)
    }
}

calls! {
    "org.vfiobroker.Launcher.":
    StartKeeper -> Done,
    Salvage -> Done,
    FindKeeper -> KeeperFound,
    ReadKeepers -> Done,
    StartHelper -> HelperStarted,
    KillHelper -> Done,
    Ready -> Done,
    GiveUp -> Done,
    Alive -> Done,
    Watch -> Told,
}

/// It was done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {}

/// Starts a keeper. Two links to it come with the reply: to ask it on, and to watch it on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartKeeper {
    /// Its name.
    pub name: String,
}

/// Starts a keeper that takes back what a dead one has left.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Salvage {
    /// The dead one's name.
    pub name: String,
}

/// Looks for a keeper, and for a way to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FindKeeper {
    /// Its name.
    pub name: String,
}

/// What there is of a keeper. Two links come with it where one that is alive takes them; that it does
/// proves no life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeeperFound {
    /// How it is.
    pub standing: Standing,
}

/// How a keeper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// There is nothing of it that anybody would have to know.
    Gone,
    /// Its process has ended, and what it had is not taken back.
    Dead,
    /// Its process has its files still, whatever else is the matter with it.
    Alive,
}

/// Reads what keepers last wrote down, of some of them: it comes with the reply in a file of memory, as
/// [`kept`](super::kept) has it. An empty file is the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReadKeepers {
    /// Only those behind this one in the order of names.
    pub after: String,
}

/// Starts a process that receives or closes what peers sent. A SOCK_SEQPACKET link to it and its pidfd
/// come with the reply.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartHelper {
    /// For what.
    pub helper: Helper,
}

/// A process that was started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HelperStarted {
    /// Its number.
    pub pid: i32,
}

/// Kills a process that receives or closes, if it is there still.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KillHelper {
    /// Its number.
    pub pid: i32,
}

/// Clients are served from here on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ready {}

/// The broker can't begin, or can't go on, and ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GiveUp {
    /// Why.
    pub why: String,
}

/// The event loop goes round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Alive {}

/// Tells from here on what the broker is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Watch {}

/// What the broker is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Told {
    /// End: the launcher was sent this signal.
    Stop(String),
    /// The policy was read again. The compiled one comes with it in a file, unless it was refused.
    Policy(PolicyRead),
}

/// What keepers judge by, as it stands in the launcher's file. Fields may be added and none taken away:
/// keepers of an older launcher read it too.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InForce {
    /// The address of the socket that clients connect to, as [`address`](crate::sys::peer::address) has it.
    pub service: Vec<u8>,
    /// The policy as it was compiled.
    pub policy: Arc<Policy>,
}

/// What came of reading the policy.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PolicyRead {
    /// What it is called.
    pub name: String,
    /// When the one in force was read, in seconds since 1970.
    pub read: u64,
    /// When a later one was refused, and why; none where the last that was read is in force.
    pub refused: Option<(u64, String)>,
}
