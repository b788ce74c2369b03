//! What a system call that waits for an answer wants: read from its registers and its memory.

use super::answers::{Ioctl, Place};
use super::path;
use super::sys::Notification;
use crate::kernel::Node;
use nix::errno::Errno;
use nix::libc;
use nix::unistd::Pid;
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What is asked for.
#[derive(Debug)]
#[cfg_attr(test, derive(PartialEq))]
pub(super) enum Call {
    /// To open a VFIO node.
    Open { node: Node, close_on_exec: bool },
    /// Something that may have been done already.
    Ioctl(Ioctl),
    /// Something that is none of our business.
    Other,
}

const SET_CONTAINER: u32 = crate::kernel::request::GROUP_SET_CONTAINER.number;
const SET_IOMMU: u32 = crate::kernel::request::SET_IOMMU.number;
const GET_STATUS: u32 = crate::kernel::request::GROUP_GET_STATUS.number;

/// The ioctls that can be asked about.
pub const IOCTLS: [u32; 3] = [SET_CONTAINER, SET_IOMMU, GET_STATUS];

impl Call {
    /// Reads it. What was read counts only if its maker still waits afterwards.
    ///
    /// # Errors
    /// EACCES, EPERM: the program's memory can't be looked into. ESRCH: it can't be seen.
    pub(super) fn read(notification: &Notification) -> Result<Self, Errno> {
        let &Notification { thread, number, arguments, .. } = notification;
        let [first, second, third, fourth, ..] = arguments;
        match number {
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => open(thread, libc::AT_FDCWD, first, second as i32),
            libc::SYS_openat => open(thread, first as RawFd, second, third as i32),
            libc::SYS_openat2 => open_how(thread, first as RawFd, second, third, fourth),
            libc::SYS_ioctl if second as u32 == SET_CONTAINER => {
                let Some(container) = read_array(thread, third)? else { return Ok(Self::Other) };
                let container = RawFd::from_ne_bytes(container);
                Ok(Self::Ioctl(Ioctl::SetContainer { group: first as RawFd, container }))
            }
            libc::SYS_ioctl if second as u32 == SET_IOMMU => {
                Ok(Self::Ioctl(Ioctl::SetIommu { container: first as RawFd, kind: third }))
            }
            libc::SYS_ioctl if second as u32 == GET_STATUS => {
                let Some(size) = read_array(thread, third)? else { return Ok(Self::Other) };
                // The kernel refuses one that is too small.
                if u32::from_ne_bytes(size) < STATUS_SIZE {
                    return Ok(Self::Other);
                }
                let flags = Place { memory: memory(thread, true)?, address: third.wrapping_add(4) };
                Ok(Self::Ioctl(Ioctl::GetStatus { group: first as RawFd, flags }))
            }
            _ => Ok(Self::Other),
        }
    }
}

/// Of `struct vfio_group_status`: its own size, and the flags.
const STATUS_SIZE: u32 = 8;

fn open(thread: Pid, directory: RawFd, address: u64, flags: i32) -> Result<Call, Errno> {
    // These open no device.
    if flags & (libc::O_PATH | libc::O_DIRECTORY) != 0 {
        return Ok(Call::Other);
    }
    let path = read_text(thread, address)?;
    let node = path::node(&path, || base(thread, directory));
    let close_on_exec = flags & libc::O_CLOEXEC != 0;
    Ok(node.map_or(Call::Other, |node| Call::Open { node, close_on_exec }))
}

/// openat2(2): flags, mode and how to resolve are in memory too.
fn open_how(
    thread: Pid,
    directory: RawFd,
    address: u64,
    how: u64,
    size: u64,
) -> Result<Call, Errno> {
    let resolve_at = how.wrapping_add(16);
    let (Some(flags), Some(resolve)) = (read_array(thread, how)?, read_array(thread, resolve_at)?)
    else {
        return Ok(Call::Other);
    };
    // Where paths are meant from another root, or the kernel is to refuse, it is to decide.
    let simple = libc::RESOLVE_NO_XDEV | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;
    if size < 24 || u64::from_ne_bytes(resolve) & !simple != 0 {
        return Ok(Call::Other);
    }
    open(thread, directory, address, u64::from_ne_bytes(flags) as i32)
}

/// The directory that a relative path starts from, as the program names it.
fn base(thread: Pid, directory: RawFd) -> Option<Vec<u8>> {
    let link = |name: &str| std::fs::read_link(format!("/proc/{thread}/{name}")).ok();
    let directory = match directory {
        libc::AT_FDCWD => link("cwd")?,
        fd => link(&format!("fd/{fd}"))?,
    };
    let root = link("root")?;
    // What is no file in the tree (a pipe, for example) has no whole path.
    if !directory.is_absolute() { None } else { path::below_root(&directory, Path::new(&root)) }
}

fn memory(thread: Pid, write: bool) -> Result<File, Errno> {
    if thread.as_raw() <= 0 {
        return Err(Errno::ESRCH);
    }
    File::options().read(true).write(write).open(format!("/proc/{thread}/mem")).map_err(errno)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn is_unmapped(error: &std::io::Error) -> bool {
    // EINVAL is for addresses that are no offset in a file.
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL))
}

/// The text at an address, without its NUL; empty where it has none within the longest path, which
/// is no path at all then. No page is touched that the kernel would not touch itself: to read one may
/// mean to wait for whoever fills it.
fn read_text(thread: Pid, address: u64) -> Result<Vec<u8>, Errno> {
    /// Pages are as large on x86, and a multiple of it everywhere.
    const PAGE: u64 = 4096;
    let memory = memory(thread, false)?;
    let mut text = Vec::new();
    while text.len() < libc::PATH_MAX as usize {
        let Some(from) = address.checked_add(text.len() as u64) else { break };
        let mut page = [0; PAGE as usize];
        let rest = &mut page[..(PAGE - from % PAGE) as usize];
        let read = match memory.read_at(rest, from) {
            Ok(len) => &rest[..len],
            // Nothing is mapped there: the kernel will say EFAULT itself.
            Err(error) if is_unmapped(&error) => break,
            Err(error) => return Err(errno(error)),
        };
        if let Some(end) = read.iter().position(|byte| *byte == 0) {
            text.extend_from_slice(&read[..end]);
            let is_path = text.len() < libc::PATH_MAX as usize;
            return Ok(if is_path { text } else { Vec::new() });
        }
        if read.is_empty() {
            break;
        }
        text.extend_from_slice(read);
    }
    Ok(Vec::new())
}

/// So many bytes at an address; `None` where they are not all there.
fn read_array<const LEN: usize>(thread: Pid, address: u64) -> Result<Option<[u8; LEN]>, Errno> {
    let mut bytes = [0; LEN];
    match memory(thread, false)?.read_at(&mut bytes, address) {
        Ok(len) if len == LEN => Ok(Some(bytes)),
        Ok(_) => Ok(None),
        Err(error) if is_unmapped(&error) => Ok(None),
        Err(error) => Err(errno(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn notification(number: libc::c_long, arguments: [u64; 6]) -> Notification {
        Notification { id: 1, thread: nix::unistd::gettid(), number, arguments }
    }

    fn openat(directory: RawFd, path: &CStr, flags: i32) -> Result<Call, Errno> {
        let path = path.as_ptr().expose_provenance() as u64;
        let arguments = [directory as u64, path, flags as u64, 0, 0, 0];
        Call::read(&notification(libc::SYS_openat, arguments))
    }

    #[test]
    fn an_open_is_read_from_memory() {
        let flags = libc::O_RDWR | libc::O_CLOEXEC;
        let group = Call::Open { node: Node::Group(26), close_on_exec: true };
        assert_eq!(openat(libc::AT_FDCWD, c"/dev/vfio/26", flags), Ok(group));
        let plain = Call::Open { node: Node::Iommu, close_on_exec: false };
        assert_eq!(openat(-1, c"/dev/iommu", libc::O_RDWR), Ok(plain));
        assert_eq!(openat(-1, c"/dev/iommu", libc::O_PATH), Ok(Call::Other));
        assert_eq!(openat(libc::AT_FDCWD, c"/etc/passwd", flags), Ok(Call::Other));
        assert_eq!(openat(-5, c"26", flags), Ok(Call::Other));
    }

    #[test]
    fn a_path_may_start_from_an_open_directory() {
        use std::os::fd::AsRawFd;
        let dev = File::open("/dev").unwrap();
        let call = openat(dev.as_raw_fd(), c"vfio/26", libc::O_RDWR);
        assert_eq!(call, Ok(Call::Open { node: Node::Group(26), close_on_exec: false }));
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(openat(pipe.as_raw_fd(), c"vfio/26", libc::O_RDWR), Ok(Call::Other));
    }

    #[test]
    fn openat2_that_changes_what_a_path_means_is_the_kernels() {
        let path = c"/dev/vfio/26".as_ptr().expose_provenance() as u64;
        let read = |resolve: u64, size: u64| {
            let how = [libc::O_RDWR as u64, 0, resolve];
            let how = how.as_ptr().expose_provenance() as u64;
            let arguments = [libc::AT_FDCWD as u64, path, how, size, 0, 0];
            Call::read(&notification(libc::SYS_openat2, arguments)).unwrap()
        };
        let group = Call::Open { node: Node::Group(26), close_on_exec: false };
        assert_eq!(read(0, 24), group);
        assert_eq!(read(libc::RESOLVE_NO_SYMLINKS, 24), group);
        assert_eq!(read(libc::RESOLVE_IN_ROOT, 24), Call::Other);
        assert_eq!(read(libc::RESOLVE_BENEATH, 24), Call::Other);
        assert_eq!(read(0, 8), Call::Other);
    }

    #[test]
    fn the_three_ioctls_are_read_and_others_are_not() {
        let number: RawFd = 9;
        let at = (&raw const number).expose_provenance() as u64;
        let ioctl = |request: u32, argument: u64| {
            let arguments = [7, u64::from(request) | 1 << 40, argument, 0, 0, 0];
            Call::read(&notification(libc::SYS_ioctl, arguments)).unwrap()
        };
        assert_eq!(
            ioctl(SET_CONTAINER, at),
            Call::Ioctl(Ioctl::SetContainer { group: 7, container: 9 })
        );
        assert_eq!(ioctl(SET_CONTAINER, 8), Call::Other, "a bad pointer");
        assert_eq!(ioctl(SET_IOMMU, 3), Call::Ioctl(Ioctl::SetIommu { container: 7, kind: 3 }));
        assert_eq!(ioctl(SET_IOMMU - 1, 3), Call::Other);
        let mut status = [8_u32, 0];
        let at = (&raw mut status).expose_provenance() as u64;
        let Call::Ioctl(Ioctl::GetStatus { group: 7, flags }) = ioctl(GET_STATUS, at) else {
            panic!("no status")
        };
        flags.put(5).unwrap();
        assert_eq!(*std::hint::black_box(&status), [8, 5]);
        let small = [7_u32, 0];
        let at = (&raw const small).expose_provenance() as u64;
        assert_eq!(ioctl(GET_STATUS, at), Call::Other, "too small");
        assert_eq!(ioctl(GET_STATUS, 8), Call::Other, "a bad pointer");
        let nowhere = Place { address: 8, ..flags };
        assert_eq!(nowhere.put(5), Err(Errno::EIO));
    }

    #[test]
    fn text_at_the_end_of_what_is_mapped_is_read_and_none_is_no_error() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
        let two = std::num::NonZeroUsize::new(8192).unwrap();
        let (read, private) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
        #[allow(unsafe_code)]
        // SAFETY: fresh memory at a place of the kernel's choice.
        let start = unsafe { mmap_anonymous(None, two, read, private) }.unwrap();
        let text = b"/dev/iommu\0";
        let at = start.as_ptr().cast::<[u8; 11]>().wrapping_byte_add(4096 - text.len());
        #[allow(unsafe_code)]
        // SAFETY: within the first page, which nobody else knows of.
        unsafe {
            at.write(*text)
        };
        let second = std::ptr::NonNull::new(start.as_ptr().wrapping_byte_add(4096)).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: nothing uses the second page.
        unsafe { munmap(second, 4096) }.unwrap();
        let address = start.as_ptr().expose_provenance() as u64;
        let me = nix::unistd::gettid();
        assert_eq!(read_text(me, address + 4096 - 11).unwrap(), b"/dev/iommu");
        assert_eq!(read_text(me, address + 4096 - 1).unwrap(), b"");
        assert_eq!(read_text(me, address + 4096).unwrap(), b"");
        assert_eq!(read_text(me, 0).unwrap(), b"");
        assert_eq!(read_text(me, u64::MAX).unwrap(), b"");
        assert_eq!(read_text(Pid::from_raw(0), address).unwrap_err(), Errno::ESRCH);
    }

    #[test]
    fn text_goes_on_in_the_next_page_and_is_at_most_a_path() {
        let me = nix::unistd::gettid();
        let memory = vec![b'x'; 3 * 4096];
        let address = memory.as_ptr().expose_provenance() as u64;
        assert_eq!(read_text(me, address).unwrap(), b"", "no end within a path's length");
        for len in [1, 4000, 4095, 4096, 5000] {
            let mut memory = memory.clone();
            memory[100 + len] = 0;
            let address = memory.as_ptr().expose_provenance() as u64;
            let text = read_text(me, address + 100).unwrap();
            let is_path = len < libc::PATH_MAX as usize;
            assert_eq!(text.len(), if is_path { len } else { 0 }, "{len}");
        }
    }
}
