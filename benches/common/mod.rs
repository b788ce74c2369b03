//! What the benches share. Each is a program of its own that prints a table: figures as ratios
//! against a floor that is measured in the same run, the goal, and whether it is met. A goal that
//! is missed is said loudly and is no failure: machines differ.

#![allow(dead_code)] // each bench uses its part

#[path = "../../tests/common/children.rs"]
pub mod children;
pub mod daemon;
pub mod figures;
pub mod floor;
pub mod placement;
pub mod raw;

/// The device that all of it is about: in the lab's guest it is there.
pub const NIC: &str = "0000:00:02.0";

/// A directory for what a daemon has in /run, which is memory too: a disk's file system takes longer for a
/// state file than all else takes together.
pub fn directory() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.unwrap()
}

/// How often a figure is taken: in the form that every change is tried with, and in the long one
/// (`VFIO_FULL`, set by `tests/run --full`), whose figures vary less.
pub fn rounds(short: usize, full: usize) -> usize {
    if std::env::var_os("VFIO_FULL").is_some() { full } else { short }
}
