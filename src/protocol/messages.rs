//! The calls of the interface and what they return. Field by field they are described in
//! `org.vfiobroker.Broker.varlink`.

#![allow(missing_docs)]

use super::{Blocker, DeviceSpec, Error};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A call as Varlink frames it.
#[derive(Debug, Deserialize)]
pub struct Call<'a> {
    #[serde(borrow)]
    pub method: std::borrow::Cow<'a, str>,
    #[serde(borrow, default)]
    pub parameters: Option<&'a RawValue>,
    #[serde(default)]
    pub more: Option<bool>,
    #[serde(default)]
    pub oneway: Option<bool>,
    #[serde(default)]
    pub upgrade: Option<bool>,
}

/// A reply as Varlink frames it: parameters, and whether more will follow. Errors are framed by
/// [`Error`] itself.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply<T> {
    pub parameters: T,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
}

/// A method of the broker: its name and its types.
pub trait Method: Serialize {
    /// The method's full name.
    const NAME: &'static str;
    /// What it returns.
    type Reply: Serialize + for<'de> Deserialize<'de>;
}

macro_rules! method {
    ($call:ident -> $reply:ty, $name:literal) => {
        impl Method for $call {
            const NAME: &'static str = concat!("org.vfiobroker.Broker.", $name);
            type Reply = $reply;
        }
    };
}

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
    Container,
    Group,
    Device,
    Iommufd,
    Cdev,
    Lease,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd {
    pub index: usize,
    pub kind: FdKind,
    pub name: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acquire {
    pub vm: String,
    pub devices: Vec<DeviceSpec>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withhold: Option<Vec<DeviceSpec>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handout: Option<Handout>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_token: Option<String>,
}
method!(Acquire -> Acquired, "Acquire");

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acquired {
    pub lease: String,
    pub key: String,
    pub tenant: String,
    pub backend: Backend,
    pub handout: Handout,
    pub iommu: String,
    pub container: String,
    pub devices: Vec<String>,
    pub fds: Vec<Fd>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetFds {
    pub lease: String,
    pub key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifeline: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<FdKind>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl GetFds {
    /// Whether such a file is asked for.
    pub fn wants(&self, kind: FdKind, name: &str) -> bool {
        self.kind.is_none_or(|wanted| wanted == kind)
            && self.name.as_deref().is_none_or(|wanted| wanted == name)
    }
}
method!(GetFds -> Fds, "GetFds");

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fds {
    pub fds: Vec<Fd>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    pub lease: String,
    pub key: String,
}
method!(Release -> Released, "Release");

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    pub proved: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapDma {
    pub lease: String,
    pub key: String,
    pub iova: u64,
    pub size: u64,
    pub read: bool,
    pub write: bool,
    pub memory: usize,
    pub offset: u64,
}
method!(MapDma -> Empty, "MapDma");

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnmapDma {
    pub lease: String,
    pub key: String,
    pub iova: u64,
    pub size: u64,
}
method!(UnmapDma -> Unmapped, "UnmapDma");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmapped {
    pub unmapped: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetMemlock {
    pub lease: String,
    pub key: String,
    pub bytes: u64,
}
method!(SetMemlock -> Memlock, "SetMemlock");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memlock {
    pub bytes: u64,
}

impl Memlock {
    /// Of a limit in bytes. No limit at all (`RLIM_INFINITY`) is the largest number that Varlink has.
    #[must_use]
    pub fn of(limit: u64) -> Self {
        Self { bytes: limit.min(i64::MAX as u64) }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {}
method!(Topology -> Groups, "Topology");

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    pub groups: Vec<Group>,
}

/// What the broker knows of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupState {
    Free,
    Held,
    Reclaiming,
    Quarantined,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub id: u32,
    pub viable: bool,
    pub state: GroupState,
    pub blockers: Vec<Blocker>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unproved: Option<Unproved>,
    pub devices: Vec<Device>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unproved {
    pub tenant: String,
    pub lease: String,
    pub vm: String,
    pub since: u64,
    pub devices: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub bdf: String,
    pub vendor: String,
    pub device: String,
    pub class: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    #[serde(default)]
    pub vfio: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdev: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leases {}
method!(Leases -> LeaseList, "Leases");

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseList {
    pub leases: Vec<Lease>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub lease: String,
    pub vm: String,
    pub tenant: String,
    pub uid: u32,
    pub pid: i32,
    pub backend: Backend,
    pub handout: Handout,
    pub container: String,
    pub devices: Vec<String>,
    pub withheld: Vec<String>,
    pub mappings: Option<u64>,
    pub mapped_bytes: Option<u64>,
    pub since: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
}
method!(Watch -> Event, "Watch");

/// What can happen to a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    Acquired,
    Extended,
    Released,
    Gone,
    Reclaimed,
    Quarantined,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub event: EventKind,
    pub lease: String,
    pub vm: String,
    pub tenant: String,
    pub devices: Vec<String>,
    pub at: u64,
}

/// A call for the broker's own interface, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Acquire(Acquire),
    GetFds(GetFds),
    Release(Release),
    MapDma(MapDma),
    UnmapDma(UnmapDma),
    SetMemlock(SetMemlock),
    Topology(Topology),
    Leases(Leases),
    Watch(Watch),
    GetInfo,
    GetInterfaceDescription(String),
}

/// What `org.varlink.service.GetInfo` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    pub vendor: String,
    pub product: String,
    pub version: String,
    pub url: String,
    pub interfaces: Vec<String>,
}

/// What `org.varlink.service.GetInterfaceDescription` takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetInterfaceDescription {
    pub interface: String,
}

/// What `org.varlink.service.GetInterfaceDescription` returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceDescription {
    pub description: String,
}

impl Request {
    /// Parses a call's parameters for the method it names. Fields that are too long, devices that
    /// come twice and the like are found here, so that nothing behind sees them.
    ///
    /// # Errors
    /// [`Error::BadRequest`], [`Error::MethodNotFound`] and [`Error::InterfaceNotFound`].
    pub fn parse(call: &Call<'_>) -> Result<Self, Error> {
        let method = call.method.as_ref();
        let text = call.parameters.map_or("{}", |raw| raw.get());
        Ok(match method {
            Acquire::NAME => Self::Acquire(read::<Acquire>(text)?.checked()?),
            GetFds::NAME => Self::GetFds(read(text)?),
            Release::NAME => Self::Release(read(text)?),
            MapDma::NAME => Self::MapDma(read(text)?),
            UnmapDma::NAME => Self::UnmapDma(read(text)?),
            SetMemlock::NAME => Self::SetMemlock(read(text)?),
            Topology::NAME => Self::Topology(read(text)?),
            Leases::NAME => Self::Leases(read(text)?),
            Watch::NAME => Self::Watch(read(text)?),
            "org.varlink.service.GetInfo" => Self::GetInfo,
            "org.varlink.service.GetInterfaceDescription" => {
                Self::GetInterfaceDescription(read::<GetInterfaceDescription>(text)?.interface)
            }
            _ => {
                let interface = method.rsplit_once('.').map_or("", |(interface, _)| interface);
                let known = [super::INTERFACE, "org.varlink.service"].contains(&interface);
                let cut = |text: &str| text.chars().take(100).collect();
                return Err(if known {
                    Error::MethodNotFound { method: cut(method) }
                } else {
                    Error::InterfaceNotFound { interface: cut(interface) }
                });
            }
        })
    }
}

fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Error> {
    // "parameters": null is what some clients send for none.
    let text = if text == "null" { "{}" } else { text };
    // serde would also take a struct's fields as a list.
    if !text.starts_with('{') {
        return Err(Error::bad("parameters", "not an object"));
    }
    serde_json::from_str(text).map_err(|error| Error::bad("parameters", error))
}

/// The most devices in one call, and in one lease; with the lease fd, a container and groups their fds
/// fit into one message.
pub const MAX_DEVICES: usize = 14;

impl Acquire {
    /// The longest vm name, in bytes.
    pub const MAX_VM: usize = 64;

    fn checked(self) -> Result<Self, Error> {
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
        Ok(self)
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
