//! What the broker and the process that looks for holders say to each other: one message there, with what
//! is looked for, and two back, each with all that was found so far.

use crate::protocol::{Bdf, Process};
use serde::{Deserialize, Serialize};

/// The most groups that are looked for at a time.
pub const MOST_GROUPS: usize = 32;
/// The most processes that are named for one group.
pub const MOST_PROCESSES: usize = 8;
/// The most files that are named for one process.
pub const MOST_FILES: usize = 4;
/// A message at most: all of that, with names of which each byte may take six in JSON. The kernel takes
/// no message that is much longer than this.
pub const MOST_BYTES: usize = 128 << 10;

/// What is looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Search {
    /// At most [`MOST_GROUPS`].
    pub groups: Vec<SearchedGroup>,
    /// The keepers of these groups, which are no holders.
    pub keepers: Vec<u32>,
}

/// A group that some process may have open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SearchedGroup {
    /// Its number.
    pub id: u32,
    /// The path of its node.
    pub node: String,
    /// Its devices.
    pub devices: Vec<SearchedDevice>,
}

/// A device of such a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SearchedDevice {
    /// Its address.
    pub bdf: Bdf,
    /// The path of its own node, where it has one now.
    pub node: Option<String>,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// For each group that was looked for, in that order, who has it; those first of whom that is certain.
    pub found: Vec<Vec<Process>>,
    /// How many processes could not be looked into.
    pub hidden: usize,
    /// More than these have something of a group.
    pub more: bool,
    /// All was looked at that there is to be looked at.
    pub is_whole: bool,
    /// Why that is not all there is, where it is not.
    pub why: Option<String>,
}
