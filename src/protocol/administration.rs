//! The calls of administrators and what they return.

use super::{Processes, Until};
use serde::{Deserialize, Serialize};

/// Asks what the broker is at; with `more`, one keeper in each reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {}

/// What the broker is at. Only the version is for everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerStatus {
    /// Its version.
    pub version: String,
    /// Its process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When it was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// The process that has started it, and everything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub launcher: Option<u32>,
    /// Whom it runs as, and what it may, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// How many connections it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// The policy in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyStatus>,
    /// Some keepers, or all.
    pub keepers: Vec<Keeper>,
}

/// Which policy is in force, and whether a later one was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// Where it was read from.
    pub file: String,
    /// When.
    pub read: u64,
    /// How many tenants it has.
    pub tenants: u64,
    /// What is wrong with what was read last, where that was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// When that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused_at: Option<u64>,
}

/// A process that keeps leases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keeper {
    /// Its name: that of its first lease, or of its directory.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Whether that process is there.
    pub alive: bool,
    /// When it was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// The memory that it has at the moment, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// What of that is pages of files, which other processes can have as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shared: Option<u64>,
    /// Its leases.
    pub leases: Vec<KeptLease>,
    /// The call that it has been in for longer than a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    /// What that call is made on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_since: Option<u64>,
}

/// A lease as its keeper has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptLease {
    /// Its public name.
    pub lease: String,
    /// What its holder called the VM.
    pub vm: String,
    /// The tenant that it was acquired by.
    pub tenant: String,
    /// It has ended, and not all of it is known to be free.
    pub ended: bool,
    /// What is left of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<Left>,
}

/// Ends a lease against its holder's will.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// Which lease.
    pub lease: String,
    /// How long its holder has to give it back, in seconds.
    pub grace: u64,
}

/// Ends all leases that the caller may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// How long their holders have to give them back, in seconds.
    pub grace: u64,
}

/// Leases that have ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// One in each reply; none where there was none.
    pub leases: Vec<Revoked>,
}

/// What became of a lease that was revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Its public name.
    pub lease: String,
    /// What its holder called the VM.
    pub vm: String,
    /// The tenant that it belonged to.
    pub tenant: String,
    /// It was taken; else its holder has given it back in time.
    pub forced: bool,
    /// The kernel has shown that nothing of it is in use.
    pub proved: bool,
    /// What can't be taken back.
    pub left: Vec<Left>,
}

/// A device of an ended lease that is not known to be free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Its address.
    pub device: String,
    /// Why not.
    pub reason: String,
    /// Whom that waits for.
    #[serde(default)]
    pub until: Until,
    /// Who has it still, for those who may know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_in: Option<Processes>,
}

/// That a lease is being revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Since when.
    pub since: u64,
    /// When it is taken by force.
    pub force: u64,
    /// It was.
    pub forced: bool,
    /// What can't be taken back.
    pub left: Vec<Left>,
}

impl Revoke {
    /// The longest grace: a day.
    pub const MAX_GRACE: u64 = 86_400;
}

/// An administrator's word that a device is not open anywhere, where the kernel can't show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirm {
    /// Its address.
    pub device: String,
}

/// What the word was good for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmed {
    /// The device's group.
    pub group: u32,
    /// The devices that still keep that group from others than their last tenant.
    pub left: Vec<String>,
}
