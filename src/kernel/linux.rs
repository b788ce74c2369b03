//! The real Linux behind [`Kernel`].

#![allow(unsafe_code)]

use super::{Arg, Ioctl, Kernel, Node, Reply, parse};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

/// The kernel this process runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

/// Structs are handed to the kernel in a buffer of at least this many bytes, zeros after the
/// caller's own: a request that reads more than its first field promises finds zeros there.
const SCRATCH: usize = 256;

impl Kernel for Linux {
    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        open(node.to_string().as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
    }

    fn find(&self, node: &Node) -> Result<(), Errno> {
        std::fs::metadata(node.to_string()).map(drop).map_err(errno)
    }

    fn ioctl(&self, fd: BorrowedFd<'_>, call: Ioctl<'_>) -> Result<Reply, Errno> {
        let number = libc::c_ulong::from(call.request.number);
        let raw = fd.as_raw_fd();
        let value = match call.arg {
            Arg::Value(value) => {
                // SAFETY: the request takes no pointer; `raw` is open for the borrow's life.
                unsafe { libc::ioctl(raw, number, value) }
            }
            Arg::Text(text) => {
                // SAFETY: `text` is NUL-terminated and lives through the call, which reads it.
                unsafe { libc::ioctl(raw, number, text.as_ptr()) }
            }
            Arg::Fd(named) => {
                let named: libc::c_int = named.as_raw_fd();
                // SAFETY: the pointer is to an int that lives through the call, which reads it.
                unsafe { libc::ioctl(raw, number, &raw const named) }
            }
            Arg::BadPointer => {
                // SAFETY: page zero is never mapped (vm.mmap_min_addr), the kernel answers EFAULT.
                unsafe { libc::ioctl(raw, number, 8usize) }
            }
            Arg::Struct { bytes, fds, out } => {
                let mut scratch = bytes.to_vec();
                scratch.resize(bytes.len().max(SCRATCH), 0);
                if parse::u32_at(&scratch, 0) as usize > scratch.len() {
                    return Err(Errno::EINVAL);
                }
                for slot in fds {
                    let number = slot.fd.map_or(-1, |fd| fd.as_raw_fd());
                    put(&mut scratch, slot.offset, &number.to_ne_bytes())?;
                }
                if let Some((offset, buffer)) = out {
                    let address = buffer.as_mut_ptr().expose_provenance() as u64;
                    put(&mut scratch, offset, &address.to_ne_bytes())?;
                }
                // SAFETY: the kernel reads and writes at most as many bytes as the first field says,
                // which is checked above, or those of the request's fixed head, which is within
                // `scratch`, and through the pointer in it at most the length that stands beside
                // it, which the typed layer took from that buffer; both live through the call.
                let value = unsafe { libc::ioctl(raw, number, scratch.as_mut_ptr()) };
                // Also after an error: hot reset info sets its count beside ENOSPC.
                let errno = Errno::last();
                let len = bytes.len();
                bytes.copy_from_slice(&scratch[..len]);
                if value < 0 {
                    return Err(errno);
                }
                value
            }
        };
        let value = Errno::result(value)?;
        if !call.request.returns_fd {
            return Ok(Reply { value, fd: None });
        }
        // SAFETY: the kernel has just made this fd for us (close-on-exec); nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(value) };
        Ok(Reply { value: 0, fd: Some(fd) })
    }

    fn pread(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        nix::sys::uio::pread(fd, buf, offset)
    }

    fn pwrite(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        nix::sys::uio::pwrite(fd, buf, offset)
    }

    fn sysfs_read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        std::fs::read(format!("/sys/{path}")).map_err(errno)
    }

    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = open(format!("/sys/{path}").as_str(), flags, Mode::empty())?;
        // Each write(2) is a command of its own, so half of one must not be followed by the rest.
        match nix::unistd::write(&file, bytes)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    fn sysfs_list(&self, path: &str) -> Result<Vec<String>, Errno> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(format!("/sys/{path}")).map_err(errno)? {
            names.push(entry.map_err(errno)?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn sysfs_inode(&self, path: &str) -> Result<u64, Errno> {
        std::fs::metadata(format!("/sys/{path}")).map(|found| found.ino()).map_err(errno)
    }

    fn sysfs_link(&self, path: &str) -> Result<String, Errno> {
        let target = std::fs::read_link(format!("/sys/{path}")).map_err(errno)?;
        Ok(String::from_utf8_lossy(target.as_os_str().as_bytes()).into_owned())
    }
}

fn errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn put(bytes: &mut [u8], offset: usize, field: &[u8]) -> Result<(), Errno> {
    let end = offset.checked_add(field.len()).ok_or(Errno::EINVAL)?;
    bytes.get_mut(offset..end).ok_or(Errno::EINVAL)?.copy_from_slice(field);
    Ok(())
}
