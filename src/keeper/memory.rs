//! Memory that a peer hands over: checked before anything touches it, and its bytes never are.

use crate::kernel;
use crate::process::keeper::Failure;
use crate::process::queued_files;
use crate::sys::fdpass::ReceiveError;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A file that can be pinned without a peer's file system having a say.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) fd: OwnedFd,
    size: u64,
    /// The size of the file's pages, in bytes.
    page: u64,
}

impl Memory {
    /// Takes the file of that index out of a socket's queue, and checks it: who sent the socket here may
    /// not have looked.
    ///
    /// # Errors
    /// [`Failure::Bad`] if it is not there, or else what it is instead.
    pub(super) fn take(queue: &OwnedFd, index: usize) -> Result<Self, Failure> {
        let taken = queued_files::take(queue.as_fd(), index).map_err(|error| match error {
            ReceiveError::Errno(errno) => system("recvmsg", "the memory's file", errno),
            truncated @ ReceiveError::Truncated { .. } => bad("memory", truncated),
        })?;
        Self::check(taken.ok_or_else(|| bad("memory", format!("fd {index} is not there")))?)
    }

    /// Takes a file if it is a regular one on tmpfs or hugetlbfs.
    ///
    /// # Errors
    /// [`Failure::Bad`] that says what it is instead.
    fn check(fd: OwnedFd) -> Result<Self, Failure> {
        check_memory(&fd)?;
        let stat = fstat(&fd).map_err(|errno| system("fstat", "memory", errno))?;
        let fs = fstatfs(&fd).map_err(|errno| system("fstatfs", "memory", errno))?;
        let huge = fs.filesystem_type() == HUGETLBFS_MAGIC;
        let page = if huge { fs.block_size() as u64 } else { page_size() };
        Ok(Self { fd, size: stat.st_size as u64, page })
    }

    /// Whether these bytes of it can be mapped.
    ///
    /// # Errors
    /// [`Failure::Bad`] about the field that is wrong.
    pub(super) fn check_range(&self, offset: u64, size: u64) -> Result<(), Failure> {
        let Self { size: there, page, .. } = self;
        for (field, value) in [("offset", offset), ("size", size)] {
            if value % page != 0 {
                let reason = format!("0x{value:x} is no multiple of the file's page, 0x{page:x}");
                return Err(bad(field, reason));
            }
        }
        let Some(end) = offset.checked_add(size) else {
            return Err(bad("offset", "offset and size together pass 2^64"));
        };
        if end > *there {
            let reason = format!("the file has 0x{there:x} bytes, offset and size want 0x{end:x}");
            return Err(bad("memory", reason));
        }
        Ok(())
    }
}

/// Whether a file is a regular one on tmpfs or hugetlbfs, whose close asks nobody. Never blocks.
///
/// # Errors
/// [`Failure::Bad`] that says what it is instead.
pub fn check_memory(fd: &OwnedFd) -> Result<(), Failure> {
    // Only these two have seals, and asking for seals asks no file system: everything below could
    // block for ever on a hostile one.
    if fcntl(fd, FcntlArg::F_GET_SEALS).is_err() {
        return Err(refused(fd, "not a file on tmpfs or hugetlbfs"));
    }
    let stat = fstat(fd).map_err(|errno| system("fstat", "memory", errno))?;
    let fs = fstatfs(fd).map_err(|errno| system("fstatfs", "memory", errno))?;
    let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    if regular && [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&fs.filesystem_type()) {
        return Ok(());
    }
    Err(refused(fd, "not a regular file on tmpfs or hugetlbfs"))
}

/// The kernel's page size in bytes.
pub(super) fn page_size() -> u64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    size.ok().flatten().map_or(4096, |size| size as u64)
}

/// Says what the file is as its link in /proc does, which asks no file system either.
fn refused(fd: &OwnedFd, why: &str) -> Failure {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let is = link.map_or_else(|_| "something else".into(), |to| to.display().to_string());
    bad("memory", format!("{is} is {why}"))
}

fn bad(field: &str, reason: impl ToString) -> Failure {
    Failure::Bad { field: field.into(), reason: reason.to_string() }
}

fn system(call: &'static str, object: &str, errno: nix::errno::Errno) -> Failure {
    kernel::Error::new(call, object, errno).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Mapped;
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    fn reason(fd: impl Into<OwnedFd>) -> String {
        match Memory::check(fd.into()) {
            Err(Failure::Bad { field, reason }) if field == "memory" => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_memory_is_memory() {
        let (memfd, _) = Mapped::memfd(8192).unwrap();
        assert_eq!(Memory::check(memfd).unwrap().size, 8192);
        assert!(reason(UnixStream::pair().unwrap().0).starts_with("socket:"));
        assert!(reason(nix::unistd::pipe().unwrap().0).starts_with("pipe:"));
        assert!(reason(File::open("/dev/null").unwrap()).starts_with("/dev/null is not"));
        assert!(reason(File::open("/dev/zero").unwrap()).starts_with("/dev/zero is not"));
        assert!(reason(File::open("/proc/self/maps").unwrap()).contains("not a file on tmpfs"));
        assert!(reason(File::open("/").unwrap()).starts_with("/ is not"));
        assert!(reason(tempfile::tempfile_in(".").unwrap()).contains("not a file on tmpfs"));
        let directory = File::open("/dev/shm").unwrap();
        assert!(reason(directory).contains("is not a"));
    }

    #[test]
    fn a_range_is_whole_pages_within_the_file() {
        let (memfd, _) = Mapped::memfd(2 * page_size() as usize).unwrap();
        let memory = Memory::check(memfd).unwrap();
        let page = page_size();
        let field = |offset, size| match memory.check_range(offset, size) {
            Err(Failure::Bad { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(memory.check_range(0, 2 * page), Ok(()));
        assert_eq!(memory.check_range(page, page), Ok(()));
        assert_eq!(field(1, page), "offset");
        assert_eq!(field(0, page + 1), "size");
        assert_eq!(field(page, 2 * page), "memory");
        assert_eq!(field(u64::MAX - page + 1, page), "offset");
    }
}
