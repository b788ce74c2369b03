//! What is open and mapped in a simulated kernel, for tests to look at.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Counts of a simulated kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Open container files.
    pub containers: u64,
    /// Open group files.
    pub groups: u64,
    /// Open device files.
    pub devices: u64,
    /// Open files of devices' own nodes, bound or not.
    pub cdevs: u64,
    /// Open iommufd files.
    pub open_iommufds: u64,
    /// Every container that exists: its file is open or a group is in it.
    pub spaces: Vec<Space>,
    /// Every iommufd that exists: its file is open or a device is bound to it.
    pub iommufds: Vec<IommufdState>,
    /// Bytes pinned for each process, by pid, whether it lives or not.
    pub locked: BTreeMap<i32, u64>,
    /// Bytes pinned for each user, by uid: iommufd's way of counting.
    pub locked_users: BTreeMap<u32, u64>,
    /// Replies that are held back by a fault.
    pub held: u64,
}

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Its number, never used again.
    pub id: u64,
    /// Whether its file is open.
    pub open: bool,
    /// The groups in it.
    pub groups: Vec<u32>,
    /// `type1`, `type1v2` or `noiommu`; `None` before `VFIO_SET_IOMMU`.
    pub iommu: Option<String>,
    /// How many mappings it has.
    pub mappings: u64,
    /// Their length together, in bytes.
    pub mapped_bytes: u64,
    /// What they have pinned and charged, in bytes.
    pub pinned_bytes: u64,
}

/// An iommufd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IommufdState {
    /// Its number, never used again.
    pub id: u64,
    /// Whether its file is open.
    pub open: bool,
    /// Whether processes are charged for pinned memory, rather than users.
    pub per_process: bool,
    /// How many IOAS it has.
    pub spaces: u64,
    /// How many devices are bound to it.
    pub devices: u64,
    /// How many mappings its IOAS have.
    pub mappings: u64,
    /// Their length together, in bytes.
    pub mapped_bytes: u64,
    /// What is pinned, in bytes.
    pub pinned_bytes: u64,
}

impl Stats {
    /// Whether nothing is open and nothing is left behind.
    pub fn is_idle(&self) -> bool {
        let files = self.containers + self.groups + self.devices + self.cdevs + self.open_iommufds;
        files == 0
            && self.spaces.is_empty()
            && self.iommufds.is_empty()
            && self.locked.is_empty()
            && self.locked_users.is_empty()
    }
}
