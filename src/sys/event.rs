//! vmm-sys-util's eventfd, which gives its number alone: this one can be borrowed as an open file.

#![allow(unsafe_code)]

use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::{self, EFD_CLOEXEC, EFD_NONBLOCK};

/// An eventfd in non-blocking mode, close-on-exec.
#[derive(Debug)]
pub struct EventFd(eventfd::EventFd);

impl EventFd {
    /// One that counts from 0.
    ///
    /// # Errors
    /// See eventfd(2).
    pub fn new() -> Result<Self, Errno> {
        eventfd::EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map(Self).map_err(errno)
    }

    /// Adds to the count.
    ///
    /// # Errors
    /// EAGAIN the count is full.
    pub fn write(&self, by: u64) -> Result<(), Errno> {
        self.0.write(by).map_err(errno)
    }

    /// Takes the count.
    ///
    /// # Errors
    /// EAGAIN it is 0.
    pub fn read(&self) -> Result<u64, Errno> {
        self.0.read().map_err(errno)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.0` owns the number, and is borrowed for as long as the result.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
