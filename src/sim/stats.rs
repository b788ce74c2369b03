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
    /// Every container that exists: its file is open or a group is in it.
    pub spaces: Vec<Space>,
    /// Bytes pinned for each process, by pid, whether it lives or not.
    pub locked: BTreeMap<i32, u64>,
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

impl Stats {
    /// Whether nothing is open and nothing is left behind.
    pub fn is_idle(&self) -> bool {
        self.containers + self.groups + self.devices == 0
            && self.spaces.is_empty()
            && self.locked.is_empty()
    }
}
