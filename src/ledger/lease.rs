//! What the ledger keeps.

use crate::protocol::{Bdf, Handout};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// The public name of a lease: 16 lower case hexadecimal digits. Never authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Not the name of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not 16 lower case hexadecimal digits")]
pub struct NotALeaseId;

impl FromStr for LeaseId {
    type Err = NotALeaseId;

    fn from_str(text: &str) -> Result<Self, NotALeaseId> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() != 16 || !text.bytes().all(digit) {
            return Err(NotALeaseId);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| NotALeaseId)
    }
}

/// What one holder has been given, as one unit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Its public name.
    pub id: LeaseId,
    /// Whose it is, and whose quota it counts against.
    pub tenant: String,
    /// What its holder calls the VM.
    pub vm: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
    /// When, in seconds since 1970.
    pub since: u64,
    /// In which form its fds are given.
    pub handout: Handout,
    /// The address space its groups are attached to.
    pub space: Space,
    /// Its groups have no IOMMU behind them.
    pub noiommu: bool,
    /// How far it is.
    pub phase: Phase,
    /// Its devices in the order they were named; an ended lease keeps those of groups that are not
    /// free yet.
    pub devices: Vec<Handed>,
    /// What the broker mapped for it, by first address.
    pub mappings: BTreeMap<u64, Mapping>,
    /// What is being added to it; the whole of it while it is acquired.
    pub(super) adding: Option<Adding>,
}

impl Lease {
    /// Bytes the broker has mapped for it; `None` where its holder maps by itself, so that only
    /// the kernel knows.
    pub fn mapped(&self) -> Option<(u64, u64)> {
        let bytes = self.mappings.values().map(|mapping| mapping.size).sum();
        self.broker_maps().then_some((self.mappings.len() as u64, bytes))
    }

    /// The devices that are being added to it.
    pub fn adding(&self) -> impl Iterator<Item = &Handed> {
        self.adding.iter().flat_map(|adding| &adding.devices)
    }

    /// Whether the broker alone holds the container, so that mappings have owners.
    pub fn broker_maps(&self) -> bool {
        let mutual = matches!(self.space, Space::Shared { trust: Trust::Mutual, .. });
        self.handout == Handout::Devices && !mutual
    }
}

/// How far a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The kernel is being asked; nobody has been given anything.
    Acquiring,
    /// Its holder has it.
    Held,
    /// It has ended; its groups are taken back one by one.
    Ending,
}

/// The type1 address space of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Its holder brings a container, or makes address spaces in its iommufd.
    None,
    /// A container for this lease alone.
    Own,
    /// A container of the policy: made by the first member, gone with the last.
    Shared {
        /// Its name in the policy.
        name: String,
        /// What its members can do to each other.
        trust: Trust,
    },
}

/// The two kinds of shared containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trust {
    /// The broker alone holds the container: each member's mappings are its own.
    Enforced,
    /// Members hold the container too and can map and unmap for each other.
    Mutual,
}

/// A device of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handed {
    /// Its address.
    pub bdf: Bdf,
    /// Its group.
    pub group: u32,
    /// Kept from the host and from everybody else, not given to the holder.
    pub withheld: bool,
}

/// What an acquisition in flight adds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Adding {
    pub(super) devices: Vec<Handed>,
    pub(super) groups: Vec<u32>,
}

/// A range of IO virtual addresses that the broker mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Its length in bytes.
    pub size: u64,
    /// A kernel call on it is under way.
    pub(super) busy: bool,
}

impl Mapping {
    /// Whether the last address of `[iova, iova + size)` and that of the other range overlap.
    pub(super) fn overlaps(&self, at: u64, iova: u64, size: u64) -> bool {
        at <= iova + (size - 1) && iova <= at + (self.size - 1)
    }
}

/// A group that is not free.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Whose it is, or was.
    pub lease: LeaseId,
    /// How far it is.
    pub state: GroupState,
    /// It is attached to the lease's address space.
    pub attached: bool,
    /// Its devices on VFIO drivers, as they were when it was acquired.
    pub members: Vec<Member>,
}

/// How far a group is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GroupState {
    /// Being acquired.
    Acquiring,
    /// Held by a lease.
    Held,
    /// Its lease has ended and the kernel is being asked whether it is free.
    Reclaiming {
        /// Since when, in seconds since 1970.
        since: u64,
    },
    /// Asked, and it is not.
    Quarantined {
        /// What shows it.
        why: NotFree,
        /// Since when, in seconds since 1970.
        since: u64,
    },
}

/// What shows that a group of an ended lease is not free.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NotFree {
    /// Some process has the group open.
    GroupOpen {
        /// The group's node.
        node: String,
    },
    /// Some process has a device of the group open.
    DeviceOpen {
        /// The group's node.
        node: String,
    },
    /// The device's driver waits for the last close of the device's own node.
    DriverWaits {
        /// Which device.
        device: Bdf,
    },
    /// The device was let go of, and its driver is binding it again.
    DriverBinds {
        /// Which device.
        device: Bdf,
    },
    /// The kernel does not answer.
    Unanswered {
        /// What was asked about.
        object: String,
    },
    /// The kernel could not be asked.
    Failed {
        /// What it said.
        error: String,
    },
}

/// A device on a VFIO driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Its address.
    pub bdf: Bdf,
    /// The PF it is a VF of.
    pub physfn: Option<Bdf>,
}
