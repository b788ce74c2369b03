//! What a program is answered: who interposes it says so.

use super::sys;
use crate::kernel::Node;
use nix::errno::Errno;
use nix::unistd::Pid;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

/// Answers a program's opens and ioctls. Several threads may ask at once.
pub trait Answers: Send + Sync {
    /// The requests of ioctl(2) that are asked about, of [`IOCTLS`](super::IOCTLS).
    fn ioctls(&self) -> &'static [u32];

    /// What an open of a node gives. It may take as long as it likes.
    fn open(&self, node: &Node) -> Opened<'_>;

    /// Takes back what an open of a node gave, and the program could not be given.
    fn put_back(&self, node: &Node, file: OwnedFd);

    /// Whether what an ioctl asks for is so already. Otherwise the kernel is asked.
    ///
    /// # Errors
    /// See kcmp(2).
    fn ioctl(&self, asker: Asker, ioctl: &Ioctl) -> Result<bool, Errno>;
}

/// What becomes of an open.
#[derive(Debug)]
pub enum Opened<'a> {
    /// The program gets a copy of a file that is kept.
    Kept(BorrowedFd<'a>),
    /// The program alone gets this file.
    Given(OwnedFd),
    /// It fails.
    Refused {
        /// With this errno.
        errno: Errno,
        /// What the log is to say behind the program's name.
        why: String,
    },
}

/// An ioctl that is asked about.
#[derive(Debug)]
#[cfg_attr(test, derive(PartialEq))]
pub enum Ioctl {
    /// `VFIO_GROUP_SET_CONTAINER`.
    SetContainer {
        /// Which group, by the asker's number.
        group: RawFd,
        /// Which container, by the asker's number.
        container: RawFd,
    },
    /// `VFIO_SET_IOMMU`.
    SetIommu {
        /// Which container, by the asker's number.
        container: RawFd,
        /// The IOMMU type.
        kind: u64,
    },
    /// `VFIO_GROUP_GET_STATUS`; where it is so, the group is shown as viable and in no container.
    GetStatus {
        /// Which group, by the asker's number.
        group: RawFd,
        /// Where the flags go.
        flags: Place,
    },
}

/// The thread that waits for an answer.
#[derive(Clone, Copy, Debug)]
pub struct Asker(pub(super) Pid);

impl Asker {
    /// Whether a number of the asker's is this open file.
    ///
    /// # Errors
    /// EPERM not ours to look into; ENOSYS a kernel without kcmp(2).
    pub fn has(self, number: RawFd, file: BorrowedFd<'_>) -> Result<bool, Errno> {
        sys::is_same(self.0, number, file)
    }
}

/// Where an answer goes in the asker's memory. It is that memory's also when the asker has ended
/// meanwhile and its number is another's.
#[derive(Debug)]
pub struct Place {
    pub(super) memory: File,
    pub(super) address: u64,
}

impl Place {
    /// Writes a value there.
    ///
    /// # Errors
    /// EIO: nothing that could be written to is there.
    pub(super) fn put(&self, value: u32) -> Result<(), Errno> {
        let put = self.memory.write_all_at(&value.to_ne_bytes(), self.address);
        put.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)))
    }
}

#[cfg(test)]
impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
    }
}
