//! The processes that have something open, as far as they can be known.

use serde::{Deserialize, Serialize};

/// How much of what there is was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Known {
    /// All that `/proc` shows, and it says who has it.
    Whole,
    /// There may be others.
    Partial,
    /// Nothing was.
    Unknown,
}

/// The processes that have a group, or a device of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// How much was seen.
    pub known: Known,
    /// Why that is not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// When that was, in seconds since 1970.
    pub at: u64,
    /// Those that were found.
    pub processes: Vec<Process>,
}

/// A process, and what it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// The user that it runs as.
    pub uid: u32,
    /// Its name, as it calls itself.
    pub command: String,
    /// Some of what it has.
    pub files: Vec<OpenFile>,
}

/// What an open file is, or what else has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OpenKind {
    /// A group.
    Group,
    /// A device that was got from its group.
    Device,
    /// A device's own node.
    Cdev,
    /// Memory of a device.
    Mapping,
    /// KVM's device for VFIO, which has groups or devices.
    Kvm,
    /// A socket with files in its queue.
    Socket,
    /// An iommufd.
    Iommufd,
    /// A container.
    Container,
}

/// Something that a process has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// What it is.
    pub kind: OpenKind,
    /// The group's number or the device's address, where that is certain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
