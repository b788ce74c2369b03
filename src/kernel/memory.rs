//! Memory that devices can be given: a shared mapping, owned.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;

/// A shared mapping of a file's bytes into this process; unmapped when dropped.
///
/// Its bytes are never borrowed, only copied in and out: devices and other processes may write
/// them at any time.
#[derive(Debug)]
pub struct Mapped {
    address: NonNull<c_void>,
    size: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only copied from and to.
unsafe impl Send for Mapped {}
// SAFETY: as above; concurrent copies race no worse than with the device.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps `size` bytes of `file` from `offset` bytes on, shared. Without `write` the mapping is
    /// read-only, and so is what can be pinned from it.
    ///
    /// # Errors
    /// See mmap(2); EINVAL for a size of 0.
    pub fn file(
        file: BorrowedFd<'_>,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let mut prot = ProtFlags::PROT_READ;
        prot.set(ProtFlags::PROT_WRITE, write);
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let address = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { address, size })
    }

    /// Makes a memfd of `size` bytes and maps it whole; returns both.
    pub fn memfd(size: usize) -> Result<(OwnedFd, Self), Errno> {
        let fd = memfd_create(c"vfio-dma", MFdFlags::MFD_CLOEXEC)?;
        let len = i64::try_from(size).map_err(|_| Errno::EOVERFLOW)?;
        nix::unistd::ftruncate(&fd, len)?;
        let mapped = Self::file(std::os::fd::AsFd::as_fd(&fd), 0, size, true)?;
        Ok((fd, mapped))
    }

    /// Where it is in this process.
    pub fn vaddr(&self) -> u64 {
        self.address.as_ptr().expose_provenance() as u64
    }

    /// Its length in bytes.
    pub fn size(&self) -> usize {
        self.size.get()
    }

    /// Copies bytes out, from `offset` on; `None` where that is outside.
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Option<()> {
        let source = self.at(offset, buf.len())?;
        for (i, byte) in buf.iter_mut().enumerate() {
            // SAFETY: `at` checked that `buf.len()` bytes from `source` are in the mapping.
            let address = unsafe { source.add(i) };
            // SAFETY: as above; volatile, because others may be writing.
            *byte = unsafe { address.read_volatile() };
        }
        Some(())
    }

    /// Copies bytes in, from `offset` on; `None` where that is outside. The mapping must have been
    /// made with `write`.
    pub fn write(&self, offset: usize, buf: &[u8]) -> Option<()> {
        let target = self.at(offset, buf.len())?;
        for (i, byte) in buf.iter().enumerate() {
            // SAFETY: `at` checked that `buf.len()` bytes from `target` are in the mapping.
            let address = unsafe { target.add(i) };
            // SAFETY: as above; volatile, because others may be reading.
            unsafe { address.write_volatile(*byte) };
        }
        Some(())
    }

    fn at(&self, offset: usize, len: usize) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        let inside = end <= self.size.get();
        inside.then(|| self.address.as_ptr().cast::<u8>().wrapping_add(offset))
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: we made this mapping and nothing holds a reference into it. It can't fail with
        // the address and size that mmap gave.
        let _ = unsafe { munmap(self.address, self.size.get()) };
    }
}
