//! The calls of the interface and what they return. `org.vfiobroker.Broker.varlink` says the same to
//! clients in other languages; a test compares the two.

use super::administration::Revocation;
use super::{Blocker, DeviceSpec, Error, Processes};
use serde::{Deserialize, Serialize};

/// In which form the fds of a lease are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Handout {
    /// The container, attached, and its groups
    Container,
    /// The groups alone
    Group,
    /// The devices alone: the broker maps
    Devices,
    /// An iommufd and the devices by their own nodes, unbound
    Iommufd,
}

impl Handout {
    /// The interface of the kernel that it belongs to.
    pub fn backend(self) -> Backend {
        match self {
            Self::Container | Self::Group | Self::Devices => Backend::Type1,
            Self::Iommufd => Backend::Iommufd,
        }
    }

    /// Whether its holder gets the open file of each group.
    pub fn gives_group(self) -> bool {
        matches!(self, Self::Container | Self::Group)
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Group => "group",
            Self::Devices => "devices",
            Self::Iommufd => "iommufd",
        }
    }
}

/// Through which interface of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Backend {
    /// Groups and a container
    Type1,
    /// An iommufd, and the devices' own nodes
    Iommufd,
}

impl Backend {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Type1 => "type1",
            Self::Iommufd => "iommufd",
        }
    }
}

/// What an fd is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FdKind {
    /// A VFIO container.
    Container,
    /// A VFIO group.
    Group,
    /// A device, from its group.
    Device,
    /// `/dev/iommu`.
    Iommufd,
    /// A device's own node, not bound yet.
    Cdev,
    /// The read end of a lease pipe: the lease ends with its last copy.
    Lease,
}

/// An open file that came with a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    /// Its number among the open files of that message.
    pub index: usize,
    /// What it is.
    pub kind: FdKind,
    /// The group's number, the device's address, or empty.
    pub name: String,
}

/// Asks for devices, all or none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acquire {
    /// What the caller calls the VM: [`MAX_VM`](Acquire::MAX_VM) bytes at most.
    pub vm: String,
    /// What is asked for.
    pub devices: Vec<DeviceSpec>,
    /// Functions of the same groups that nobody is to use meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub withhold: Option<Vec<DeviceSpec>>,
    /// Through which interface of the kernel; without it the policy's first that the host can do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// In which form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handout: Option<Handout>,
    /// A shared container of the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// A lease that the devices are added to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// That lease's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The UUID that the holder of the PF has set for its VFs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vf_token: Option<String>,
}

/// What an Acquire gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acquired {
    /// The lease's public name.
    pub lease: String,
    /// The secret by which the lease is operated on.
    pub key: String,
    /// The tenant that it belongs to.
    pub tenant: String,
    /// The interface of the kernel.
    pub backend: Backend,
    /// The form of the open files.
    pub handout: Handout,
    /// What the container is set to, or `none`.
    pub iommu: String,
    /// The name of the container; empty where the holder brings it.
    pub container: String,
    /// The addresses of the devices that were given by this call.
    pub devices: Vec<String>,
    /// The open files beside the reply.
    pub fds: Vec<Fd>,
}

/// Asks for the open files of a lease once more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetFds {
    /// The lease.
    pub lease: String,
    /// The lease's key.
    pub key: String,
    /// Whether a further lease fd is wanted: yes, unless this is false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lifeline: Option<bool>,
    /// Only files of this kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<FdKind>,
    /// Only the file of this name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl GetFds {
    /// Whether such a file is asked for.
    pub fn wants(&self, kind: FdKind, name: &str) -> bool {
        self.kind.is_none_or(|wanted| wanted == kind)
            && self.name.as_deref().is_none_or(|wanted| wanted == name)
    }
}

/// The open files of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fds {
    /// The open files beside the reply.
    pub fds: Vec<Fd>,
}

/// Ends a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The lease.
    pub lease: String,
    /// The lease's key.
    pub key: String,
}

/// The lease has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// The kernel has shown that nothing of the lease is in use.
    pub proved: bool,
}

/// Lets the devices of a lease reach memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapDma {
    /// The lease.
    pub lease: String,
    /// The lease's key.
    pub key: String,
    /// The address by which the devices reach it.
    pub iova: u64,
    /// How many bytes.
    pub size: u64,
    /// Devices may read it.
    pub read: bool,
    /// Devices may write it.
    pub write: bool,
    /// The number of the memory's file among those that came with the call.
    pub memory: usize,
    /// Where in that file it begins.
    pub offset: u64,
}

/// A reply that says nothing further.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// Takes whole mappings back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnmapDma {
    /// The lease.
    pub lease: String,
    /// The lease's key.
    pub key: String,
    /// Where they begin.
    pub iova: u64,
    /// How many bytes.
    pub size: u64,
}

/// What an UnmapDma took back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmapped {
    /// How many bytes.
    pub unmapped: u64,
}

/// Raises the memlock limit of the process that made the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetMemlock {
    /// A lease of the process's tenant.
    pub lease: String,
    /// The lease's key.
    pub key: String,
    /// The limit that is wanted.
    pub bytes: u64,
}

/// The memlock limit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memlock {
    /// The limit.
    pub bytes: u64,
}

impl Memlock {
    /// Of a limit in bytes. No limit at all (`RLIM_INFINITY`) is the largest number that Varlink has.
    #[must_use]
    pub fn of(limit: u64) -> Self {
        Self { bytes: limit.min(i64::MAX as u64) }
    }
}

/// Asks for the groups that the caller may see; with `more`, one in each reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {}

/// IOMMU groups of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Some groups, or all.
    pub groups: Vec<Group>,
}

/// What the broker knows of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupState {
    /// Nobody has it.
    Free,
    /// A lease has it.
    Held,
    /// Its lease has ended and it is being taken back.
    Reclaiming,
    /// The kernel has not shown yet that the last holder has let go.
    Quarantined,
}

/// An IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The kernel's number for it.
    pub id: u32,
    /// No function of it is on a driver of the host.
    pub viable: bool,
    /// Who has it by the broker.
    pub state: GroupState,
    /// The functions that keep it from being viable.
    pub blockers: Vec<Blocker>,
    /// Whom it is kept for, because devices of it may still be open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unproved: Option<Unproved>,
    /// Who has it still, where it is quarantined, for those who may know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_in: Option<Processes>,
    /// Its PCI functions.
    pub devices: Vec<Device>,
}

/// Devices that were handed out by their own nodes, and that somebody may still have open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unproved {
    /// The only tenant that can have the group.
    pub tenant: String,
    /// The lease that they were given by.
    pub lease: String,
    /// What that lease's holder called the VM.
    pub vm: String,
    /// When the lease ended.
    pub since: u64,
    /// The devices' addresses.
    pub devices: Vec<String>,
}

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its address.
    pub bdf: String,
    /// Vendor id, four hexadecimal digits.
    pub vendor: String,
    /// Device id, four hexadecimal digits.
    pub device: String,
    /// Class, six hexadecimal digits.
    pub class: String,
    /// The driver that it is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// That driver is VFIO's: no other device can be handed out.
    pub vfio: bool,
    /// The path of its own node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cdev: Option<String>,
    /// The lease that has it, for those who may know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
}

/// Asks for the leases that the caller may see; with `more`, one in each reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leases {}

/// Leases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseList {
    /// Some leases, or all.
    pub leases: Vec<Lease>,
}

/// A lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its public name.
    pub lease: String,
    /// What its holder called the VM.
    pub vm: String,
    /// The tenant that it belongs to.
    pub tenant: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
    /// The interface of the kernel.
    pub backend: Backend,
    /// The form of its open files.
    pub handout: Handout,
    /// The name of its container; empty where the holder brings it.
    pub container: String,
    /// The addresses of its devices.
    pub devices: Vec<String>,
    /// The functions that nobody is to use meanwhile.
    pub withheld: Vec<String>,
    /// How many mappings it has; `None` where the holder maps by itself.
    pub mappings: Option<u64>,
    /// How many bytes they have; `None` where the holder maps by itself.
    pub mapped_bytes: Option<u64>,
    /// When it was acquired.
    pub since: u64,
    /// Why the policy would not give it any more, where it would not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// That it is being revoked, or was and is not known to be free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Revocation>,
}

/// Asks for events of leases, as they happen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// This lease only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
}

/// What can happen to a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// The lease was made.
    Acquired,
    /// Devices were added.
    Extended,
    /// Its holder has released it.
    Released,
    /// Its last lease fd was closed.
    Gone,
    /// Devices were taken back, and are free.
    Reclaimed,
    /// Devices are not known to be free yet.
    Quarantined,
    /// The lease is being revoked, and its holder is to give it back.
    Pause,
    /// The time for that is over: it is taken.
    Force,
}

/// Something that happened to a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub event: EventKind,
    /// The lease.
    pub lease: String,
    /// What its holder called the VM.
    pub vm: String,
    /// The tenant that it belongs to.
    pub tenant: String,
    /// The addresses of the devices that it happened to.
    pub devices: Vec<String>,
    /// When.
    pub at: u64,
    /// Until when its holder has time to give it back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

/// The most devices in one call, and in one lease; with the lease fd, a container and groups their fds
/// fit into one message.
pub const MAX_DEVICES: usize = 14;

impl Acquire {
    /// The longest vm name, in bytes.
    pub const MAX_VM: usize = 64;

    /// What serde can't see: names, counts, and what goes together.
    pub(super) fn check(&self) -> Result<(), Error> {
        check_vm(&self.vm)?;
        if self.devices.is_empty() {
            return Err(Error::bad("devices", "at least one is needed"));
        }
        let withhold = self.withhold.as_deref().unwrap_or_default();
        let count = self.devices.len() + withhold.len();
        if count > MAX_DEVICES {
            let most = MAX_DEVICES;
            return Err(Error::bad(
                "devices",
                format!("{count} named, {most} at most in one call"),
            ));
        }
        let mut seen = std::collections::HashSet::new();
        for spec in self.devices.iter().chain(withhold) {
            let named = matches!(spec, DeviceSpec::Bdf { .. } | DeviceSpec::Mdev { .. });
            if named && !seen.insert(spec.to_string()) {
                return Err(Error::bad("devices", format!("{spec} is named twice")));
            }
        }
        if self.lease.is_some() != self.key.is_some() {
            return Err(Error::bad("lease", "lease and key come together"));
        }
        Ok(())
    }
}

/// A vm name is 1 to 64 printable ASCII characters without spaces, so that it can stand in a log
/// line, a list and a file name as it is.
fn check_vm(vm: &str) -> Result<(), Error> {
    let good = !vm.is_empty()
        && vm.len() <= Acquire::MAX_VM
        && vm.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:@+".contains(&b));
    if good {
        return Ok(());
    }
    Err(Error::bad("vm", "a vm name is 1 to 64 of A-Z a-z 0-9 - _ . : @ +"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_at_all_is_a_number_that_varlink_has() {
        assert_eq!(Memlock::of(8 << 20).bytes, 8 << 20);
        assert_eq!(i64::try_from(Memlock::of(u64::MAX).bytes), Ok(i64::MAX));
    }
}
