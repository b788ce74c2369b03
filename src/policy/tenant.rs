//! What a tenant may have, and the shared containers.

use super::device::DeviceRule;
use super::peer::{Peer, Principals};
use crate::protocol::{Backend, Handout};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What one may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// Have devices.
    Acquire,
    /// Have drivers bound and unbound.
    Bind,
    /// Work on leases of one's tenant without their key.
    Manage,
    /// See what others hold.
    Observe,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Acquire => "acquire",
            Self::Bind => "bind",
            Self::Manage => "manage",
            Self::Observe => "observe",
        })
    }
}

/// What a tenant must accept by name before it gets a device that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Risk {
    /// The IOMMU does not remap interrupts: the device can raise any interrupt of the host.
    UnsafeInterrupts,
    /// There is no IOMMU: the device can reach all memory.
    NoIommu,
}

impl fmt::Display for Risk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnsafeInterrupts => "unsafe-interrupts",
            Self::NoIommu => "no-iommu",
        })
    }
}

/// How much one tenant may have at a time. All of it is finite unless the policy says more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Open connections.
    pub connections: u64,
    /// Requests that wait for the kernel.
    pub requests: u64,
    /// Leases.
    pub leases: u64,
    /// Devices, withheld ones too.
    pub devices: u64,
    /// Mappings made by MapDma.
    pub mappings: u64,
    /// Bytes in them.
    pub mapped_bytes: u64,
    /// Open files that the broker keeps for its leases.
    pub fds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            requests: 32,
            leases: 32,
            devices: 64,
            mappings: 4096,
            mapped_bytes: 16 << 30,
            fds: 512,
        }
    }
}

/// A list of the file, and where it is; no line where the default stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed<T> {
    pub(super) values: Vec<T>,
    pub(super) line: Option<usize>,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { values: Vec::new(), line: None }
    }
}

/// One who may have something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Whether drivers are bound when it acquires and put back when it is done.
    pub managed: bool,
    /// Whether a driver may be unbound and probed in order to prove a device free.
    pub rebind: bool,
    /// Up to where the broker raises the memlock limit of its processes, in bytes; 0 is never.
    pub memlock: u64,
    /// How much it may have.
    pub limits: Limits,
    pub(super) line: usize,
    pub(super) principals: Principals,
    pub(super) rights: Listed<Verb>,
    pub(super) devices: Listed<DeviceRule>,
    pub(super) deny: Listed<DeviceRule>,
    pub(super) backends: Listed<Backend>,
    pub(super) handouts: Listed<Handout>,
    pub(super) accepts: Listed<Risk>,
}

impl Tenant {
    /// Why this tenant is not for `peer`, or `None` if it is.
    pub fn mismatch(&self, peer: &Peer) -> Option<String> {
        self.principals.mismatch(peer)
    }

    /// Its rights.
    pub fn rights(&self) -> &[Verb] {
        &self.rights.values
    }

    /// The handouts it may ask for; the first of a backend is what it gets when it does not ask.
    pub fn handouts(&self) -> &[Handout] {
        &self.handouts.values
    }

    /// The handout it gets by a backend when it does not ask for another one.
    pub fn handout_of(&self, backend: Backend) -> Option<Handout> {
        self.handouts.values.iter().copied().find(|handout| handout.backend() == backend)
    }

    /// The backends it may ask for; the first that the host can do is what it gets when it does not
    /// ask.
    pub fn backends(&self) -> &[Backend] {
        &self.backends.values
    }

    /// The risks it accepts.
    pub fn accepts(&self) -> &[Risk] {
        &self.accepts.values
    }

    /// The line of the file it begins at.
    pub fn line(&self) -> usize {
        self.line
    }

    /// Its devices, in words.
    pub fn devices(&self) -> impl Iterator<Item = String> {
        self.devices.values.iter().map(DeviceRule::to_string)
    }
}

/// What the members of a shared container can do to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// Only the broker has the container; each member's mappings are its own.
    #[default]
    Enforced,
    /// Every member gets the container and can undo the others' mappings.
    Mutual,
}

/// A container that more than one lease may be in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedContainer {
    /// Its name.
    pub name: String,
    /// How far its members trust each other.
    pub trust: Trust,
    /// The tenants whose leases may join.
    pub members: Vec<String>,
    pub(super) line: usize,
}

/// A `[[deny]]` for everybody.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DenyAll {
    pub(super) devices: Vec<DeviceRule>,
    pub(super) reason: String,
}
