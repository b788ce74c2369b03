//! What a broker and a keeper say to each other: the interface `org.vfiobroker.Keeper`.
//!
//! A keeper is asked on one link and watched on another. It knows leases by what the broker once told
//! it of them, and hands that back to the next broker. Fields may be added and none taken away: a
//! keeper serves newer brokers until its leases have ended.

use super::link::calls;
use crate::protocol::{Bdf, FdKind, Handout};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The name that every error of a keeper has; what it means is in its parameters.
pub const FAILED: &str = "org.vfiobroker.Keeper.Failed";

calls! {
    "org.vfiobroker.Keeper.":
    Open -> Opened,
    Reopen -> Changed,
    Deliver -> Delivered,
    Undo -> Changed,
    Map -> Changed,
    Unmap -> Unmapped,
    Memlock -> Raised,
    Check -> Changed,
    End -> Changed,
    Mappings -> MappingsPage,
    Watch -> Told,
    Revoke -> Changed,
    Confirm -> Changed,
}

/// A shared container of the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedContainer {
    /// Its name in the policy.
    pub name: String,
    /// Its members have the container's file too.
    pub mutual: bool,
}

/// A device of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasedDevice {
    /// Its address.
    pub bdf: Bdf,
    /// Its group.
    pub group: u32,
    /// Kept from the host and from everybody else, not given to the holder.
    pub withheld: bool,
}

/// What the broker knows of a lease and wants to be told again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Its public name.
    pub lease: String,
    /// Its secret.
    pub key: String,
    /// Whose it is.
    pub tenant: String,
    /// Whom the policy meant by that name; see [`Policy::principals`](crate::policy::Policy::principals).
    pub principals: String,
    /// What its holder calls the VM.
    pub vm: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
    /// When that was, in seconds since 1970.
    pub since: u64,
    /// In which form its files are given.
    pub handout: Handout,
    /// The container that it shares with other leases.
    pub container: Option<SharedContainer>,
    /// No IOMMU is behind its groups.
    pub noiommu: bool,
    /// The policy lets its devices be taken off their driver to prove them free.
    pub rebind: bool,
    /// Its devices, in the order they were named.
    pub devices: Vec<LeasedDevice>,
}

impl LeaseRecord {
    /// Whether the keeper alone holds the container, so that mappings have owners.
    pub fn keeper_maps(&self) -> bool {
        let mutual = self.container.as_ref().is_some_and(|container| container.mutual);
        self.handout == Handout::Devices && !mutual
    }

    /// Whether the holder has the container's file too.
    pub fn gives_container(&self) -> bool {
        let mutual = self.container.as_ref().is_some_and(|container| container.mutual);
        self.handout == Handout::Container || mutual
    }
}

/// A group of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasedGroup {
    /// Its number.
    pub id: u32,
    /// No IOMMU is behind it.
    pub noiommu: bool,
    /// Its devices on VFIO drivers when it was acquired, each with the PF it is a VF of.
    pub members: Vec<(Bdf, Option<Bdf>)>,
}

/// One thing to be done on the kernel for an acquisition, in the ledger's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Open the container, if it is not open yet.
    OpenContainer,
    /// Open a group and see that it is viable.
    OpenGroup(u32),
    /// Attach a group to the container; the first one there decides the IOMMU type.
    Attach(u32),
    /// Open a device of an attached group.
    OpenDevice(u32, Bdf),
    /// Open an iommufd that charges each process for itself.
    OpenIommufd,
    /// Open a group, see that it is viable, and close it.
    CheckGroup(u32),
    /// Open a device by its own node.
    OpenCdev(u32, Bdf),
}

/// Opens what a lease gets, for the first time or in addition, for the client whose own connection comes
/// beside this call. Nobody has anything of it before
/// [`Deliver`]; a link that ends before that undoes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Open {
    /// The lease as it is to be.
    pub record: LeaseRecord,
    /// The groups that are new to it.
    pub groups: Vec<LeasedGroup>,
    /// What to do.
    pub steps: Vec<Step>,
    /// How the kernel is asked for devices for which it wants more than the address.
    pub names: BTreeMap<Bdf, String>,
    /// The devices whose groups' files are to be delivered, where such are.
    pub deliver_groups: Vec<u32>,
    /// The lease is there already; one that has ended meanwhile does not come back by this.
    pub extends: bool,
}

/// What was opened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Opened {
    /// The IOMMU type that the container has, as the broker's clients are told it.
    pub iommu: String,
    /// The lease as it is.
    pub state: LeaseState,
}

/// Which files of a lease are wanted once more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Of this kind alone.
    pub kind: Option<FdKind>,
    /// Of this name alone.
    pub name: Option<String>,
}

impl Wanted {
    /// Whether a file is among them.
    pub fn includes(&self, kind: FdKind, name: &str) -> bool {
        self.kind.is_none_or(|wanted| wanted == kind)
            && self.name.as_ref().is_none_or(|wanted| wanted == name)
    }
}

/// Opens anew what is wanted of a lease and is not kept; [`Deliver`] or [`Undo`] follows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reopen {
    /// Which lease.
    pub lease: String,
    /// What of it.
    pub wanted: Wanted,
}

/// Sends a reply on the client's own connection, which comes beside this call, with the files that
/// were opened for it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Deliver {
    /// Which lease.
    pub lease: String,
    /// The reply's parameters; `fds` is put in.
    pub parameters: serde_json::Map<String, serde_json::Value>,
    /// Send a further lease pipe with it.
    pub lifeline: bool,
    /// Send what is kept of these too.
    pub kept: Option<Wanted>,
}

/// How far a delivery came.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Delivered {
    /// All of it went. Else its first part did, with the files, and the connection is of no more use.
    pub whole: bool,
    /// The lease as it is, where this has changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<LeaseState>,
}

/// Closes what was opened and not delivered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Undo {
    /// Which lease.
    pub lease: String,
}

/// Maps memory for the client whose own connection is the second file beside this call. The first is a
/// socket that has the memory's file in its queue; see [`queued_files`](super::queued_files).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Map {
    /// Which lease.
    pub lease: String,
    /// First IO virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
    /// The file's index among those in the queue.
    pub memory: usize,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
}

/// Unmaps one mapping for the client whose own connection comes beside this call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unmap {
    /// Which lease.
    pub lease: String,
    /// First IO virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

/// How many bytes were unmapped.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unmapped {
    /// Bytes.
    pub unmapped: u64,
    /// The lease as it is.
    pub state: LeaseState,
}

/// Raises the memlock limit of the process that made the client's connection, which comes beside this
/// call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memlock {
    /// A lease of that process's tenant.
    pub lease: String,
    /// The limit that is wanted.
    pub bytes: u64,
}

/// The memlock limit that a process has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Raised {
    /// Bytes.
    pub bytes: u64,
}

/// Looks whether a lease's holder has gone.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Check {
    /// Which lease.
    pub lease: String,
}

/// Ends a lease for the client whose own connection comes beside this call. Without one, tries at once to
/// take back what a lease had that has ended, or that a revocation is to end by now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct End {
    /// Which lease.
    pub lease: String,
}

/// Revokes a lease for the client whose own connection comes beside this call. The keeper ends it when it
/// is time, and the next broker is told of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Revoke {
    /// Which lease.
    pub lease: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// When it is taken by force, in seconds since 1970.
    pub force: u64,
    /// How long that is from now on, in milliseconds: a clock can be set.
    pub left: u64,
}

/// Forgets that a device of an ended lease may be open, on the word of the administrator whose own
/// connection comes beside this call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Confirm {
    /// Which lease.
    pub lease: String,
    /// Its group.
    pub group: u32,
    /// Which device.
    pub device: Bdf,
}

/// The lease as it is; none where nothing is left of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Changed {
    /// The lease as it is.
    pub state: LeaseState,
}

/// Lists mappings, from an address on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mappings {
    /// Which lease.
    pub lease: String,
    /// The first address to be listed.
    pub from: u64,
}

/// A page of mappings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MappingsPage {
    /// First addresses and bytes; empty at the end.
    pub mappings: Vec<(u64, u64)>,
}

/// Tells every lease as it is, then each that changes, for as long as the link is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Watch {}

/// What is told to those who watch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    /// A lease as it is; none once all that are there have been told.
    pub state: Option<LeaseState>,
}

/// How far a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing of it has been delivered yet.
    Opening,
    /// Its holder has it.
    Held,
    /// It has ended, and is being taken back.
    Ending,
    /// Nothing of it is left.
    Gone,
}

/// A lease as its keeper has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseState {
    /// Grows with each change: what is told late is known by that.
    pub revision: u64,
    /// What the broker said of it.
    pub record: LeaseRecord,
    /// How far it is.
    pub phase: Phase,
    /// Lease pipes that have not hung up.
    pub lifelines: u64,
    /// How many mappings the keeper has made for it.
    pub mappings: u64,
    /// Its groups that are not free yet.
    pub groups: Vec<GroupState>,
    /// What the keeper is at for it, which may take as long as the kernel likes.
    pub call: Option<UnderWay>,
    /// That it is being revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoking: Option<Revoking>,
}

/// That a lease is to end against its holder's will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoking {
    /// Since when, in seconds since 1970.
    pub since: u64,
    /// When it is taken by force, in seconds since 1970.
    pub force: u64,
    /// It was.
    #[serde(default)]
    pub forced: bool,
}

/// A call that has begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderWay {
    /// Which.
    pub call: String,
    /// On what.
    pub object: String,
    /// Since when, in seconds since 1970.
    pub since: u64,
}

/// A group as its lease's keeper has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupState {
    /// Which group.
    pub group: LeasedGroup,
    /// It is in the container.
    pub attached: bool,
    /// The devices that were handed out by their own nodes, each with the number of its registration
    /// with VFIO.
    pub registrations: BTreeMap<Bdf, u64>,
    /// The drivers that were about to be taken away from devices, and are to come back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub drivers: BTreeMap<Bdf, String>,
    /// How far it is.
    pub stage: Stage,
}

/// How far a group is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Its lease has it, or is about to.
    Held,
    /// The kernel is being asked whether it is free.
    Reclaiming,
    /// It was asked, and it is not.
    Quarantined(NotFree),
    /// No device of it is bound; whether somebody has the nodes of these open, the kernel does not
    /// show.
    Unbound(BTreeMap<Bdf, u64>),
}

/// Why a group is not free.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotFree {
    /// A process has this group open.
    GroupOpen(String),
    /// A process has a device of this group open.
    DeviceOpen(String),
    /// This device's driver has been told to go, and waits for the last close.
    DriverWaits(Bdf),
    /// This device was let go of, and its driver is still binding it again.
    DriverBinds(Bdf),
    /// The kernel gave another error: the call, its object, and what it said.
    Kernel(String, String, String),
}

/// Why a keeper did not do what it was asked. Whatever had been done of it is undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Failure {
    /// A system call failed.
    Kernel {
        /// The call as the headers name it.
        call: String,
        /// What it was made on.
        object: String,
        /// What the kernel answered.
        errno: i32,
        /// What the errno alone does not say.
        note: Option<String>,
    },
    /// A group that is not viable; its devices say why.
    NotViable(u32),
    /// Something else than a driver owns the group's DMA.
    Owned(u32),
    /// The device has no node of its own.
    NoCdev(Bdf),
    /// The kernel has no IOMMU driver of this kind.
    NoIommuDriver {
        /// The one without an IOMMU.
        noiommu: bool,
    },
    /// A device is another one, or in another group, than was planned with.
    Moved {
        /// Which.
        what: String,
        /// How.
        why: String,
    },
    /// A field of the request makes no sense.
    Bad {
        /// Which.
        field: String,
        /// Why.
        reason: String,
    },
    /// The keeper does not find that the policy gives this to the client.
    Denied(Box<crate::policy::Refusal>),
    /// The kernel does not say for certain which process has connected.
    UnknownPeer,
    /// The client does not take the reply.
    NotDelivered(i32),
    /// The keeper has no such lease, or not in a phase for this.
    NoSuchLease,
}

impl Failure {
    /// What the kernel answered, where that is why.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Kernel { errno, .. } => Some(Errno::from_raw(*errno)),
            _ => None,
        }
    }
}

impl From<crate::kernel::Error> for Failure {
    fn from(error: crate::kernel::Error) -> Self {
        Self::Kernel {
            call: error.call.into(),
            object: error.object,
            errno: error.errno as i32,
            note: error.note.map(Into::into),
        }
    }
}

/// The parameters of [`FAILED`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failed {
    /// What happened.
    pub failure: Failure,
}

/// What lies in a keeper's directory for whoever has to do without it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// [`VERSION`] of who wrote it.
    pub version: u32,
    /// The kernel that ran then: with it all files were closed, and its numbers mean other things now.
    pub boot: String,
    /// The keeper's process.
    pub pid: u32,
    /// Its leases.
    pub leases: Vec<LeaseState>,
}

/// What a keeper of this build writes.
pub const VERSION: u32 = 1;

#[cfg(test)]
mod tests;
