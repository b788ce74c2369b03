//! Why the ledger refuses something: data, which the broker makes words of.

use super::{LeaseId, NotFree};
use crate::protocol::Bdf;

/// Why something was not entered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such lease, or not in a phase for this.
    #[error("no lease {0}")]
    NoSuchLease(LeaseId),
    /// Something of the lease is in flight.
    #[error("lease {0} has something in flight")]
    InFlight(LeaseId),
    /// The device's group is another lease's.
    #[error("{device} is in group {group}, which lease {holder} has")]
    Busy {
        /// The device that was named.
        device: Bdf,
        /// Its group.
        group: u32,
        /// Who has it.
        holder: LeaseId,
    },
    /// The device's group is not known to be free.
    #[error("{device} is in group {group}, which is not free: {why:?}")]
    Quarantined {
        /// The device that was named.
        device: Bdf,
        /// Its group.
        group: u32,
        /// Since when, in seconds since 1970.
        since: u64,
        /// Why.
        why: NotFree,
    },
    /// Devices of the group were handed to another tenant by their own nodes and are not proved.
    #[error("{device} is in group {group}, which is its last tenant's alone")]
    Unproved {
        /// The device that was named.
        device: Bdf,
        /// Its group.
        group: u32,
        /// Since when, in seconds since 1970.
        since: u64,
        /// The devices that may still be open.
        left: Vec<Bdf>,
    },
    /// What is asked for is just being taken back; the answer will be another one soon.
    #[error("{what:?} is just being reclaimed")]
    NotYet {
        /// What was asked for.
        what: Reclaimed,
        /// Since when, in seconds since 1970.
        since: u64,
    },
    /// It does not fit with what is there.
    #[error("{0:?}")]
    Conflict(Conflict),
    /// A quota or a fixed limit.
    #[error("{limit} is at most {most}, this would make {asked}")]
    OverLimit {
        /// Which.
        limit: &'static str,
        /// How much there may be.
        most: u64,
        /// How much there would be.
        asked: u64,
    },
    /// It makes no sense.
    #[error("{0:?}")]
    Bad(Bad),
}

/// What is just being taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reclaimed {
    /// The device that was named.
    Device(Bdf),
    /// The shared container of this name.
    Container(String),
}

/// What does not fit with what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// A lease has this name.
    LeaseInUse(LeaseId),
    /// The group of an adopted lease is another lease's.
    GroupInUse(u32),
    /// Whether an IOMMU is behind the group is otherwise for the rest of the lease.
    MixedLease {
        /// The group.
        group: u32,
    },
    /// The lease has the device already.
    AlreadyIn {
        /// Which device.
        device: Bdf,
        /// It is withheld for the lease.
        withheld: bool,
    },
    /// Another tenant has the PF of this VF.
    PfElsewhere {
        /// The VF that is asked for.
        vf: Bdf,
        /// Its PF.
        pf: Bdf,
    },
    /// Another tenant has a VF of this PF.
    VfElsewhere {
        /// The PF that is asked for.
        pf: Bdf,
        /// Its VF.
        vf: Bdf,
    },
    /// The container's members have another kind of trust.
    OtherTrust {
        /// The container's name.
        container: String,
    },
    /// Whether an IOMMU is behind their groups is otherwise for the container's members.
    MixedContainer {
        /// The container's name.
        container: String,
    },
    /// All members of the container have ended, and one is not reclaimed.
    LeftAlone {
        /// The container's name.
        container: String,
    },
    /// Handout iommufd has no type1 container.
    IommufdInContainer,
    /// Members of a shared container get devices.
    GroupOfSharedContainer,
    /// The handout has another address space.
    OtherSpace,
    /// A group without an IOMMU is handed out as devices.
    NoIommuAsGroup,
    /// The lease's holder, or nobody, maps for it.
    NotMappedHere,
    /// A range overlaps a mapping.
    Overlap {
        /// The range that is asked for.
        asked: IovaRange,
        /// The mapping.
        mapped: IovaRange,
        /// It is another member's of the container.
        is_foreign: bool,
    },
}

/// What makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// No device is named.
    NoDevice,
    /// A device is named twice.
    NamedTwice(Bdf),
    /// All that is named of a group is withheld.
    AllWithheld {
        /// The group.
        group: u32,
    },
    /// A range has no byte.
    EmptyRange,
    /// A range goes beyond the last address.
    RangeTooLong,
    /// A range to unmap ends within a mapping.
    CutsMapping {
        /// The range that is asked for.
        asked: IovaRange,
        /// The mapping.
        mapped: IovaRange,
    },
}

/// A range of IO virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

impl From<Conflict> for Refusal {
    fn from(conflict: Conflict) -> Self {
        Self::Conflict(conflict)
    }
}

impl From<Bad> for Refusal {
    fn from(bad: Bad) -> Self {
        Self::Bad(bad)
    }
}
