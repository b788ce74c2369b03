//! The system calls of seccomp's user notification, which have no safe wrapper elsewhere, and fork.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, raise, sigprocmask};
use nix::unistd::{ForkResult, Pid};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::raw::{c_uint, c_ulong};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

/// Of linux/seccomp.h, as the names below.
const SECCOMP_IOC_MAGIC: c_uint = b'!' as c_uint;

ioctl_iowr_nr!(SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOC_MAGIC, 0, libc::seccomp_notif);
ioctl_iowr_nr!(SECCOMP_IOCTL_NOTIF_SEND, SECCOMP_IOC_MAGIC, 1, libc::seccomp_notif_resp);
ioctl_iow_nr!(SECCOMP_IOCTL_NOTIF_ID_VALID, SECCOMP_IOC_MAGIC, 2, u64);
ioctl_iow_nr!(SECCOMP_IOCTL_NOTIF_ADDFD, SECCOMP_IOC_MAGIC, 3, libc::seccomp_notif_addfd);
ioctl_iow_nr!(SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_IOC_MAGIC, 4, u64);

/// A system call that waits for an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notification {
    pub(super) id: u64,
    /// The thread that makes it, as this process sees it; 0 where it can't.
    pub(super) thread: Pid,
    pub(super) number: libc::c_long,
    pub(super) arguments: [u64; 6],
}

/// Puts this process, and all that it starts, under a filter; returns what its questions are read
/// from. There is no way back.
///
/// # Errors
/// EBUSY a listener is there already; EINVAL, ENOSYS the kernel can't.
pub(super) fn install(filter: &[libc::sock_filter]) -> Result<OwnedFd, Errno> {
    nix::sys::prctl::set_no_new_privs()?;
    // Before Linux 5.16 a filter has the processor speculate less unless it is asked not to, which
    // would slow the program down; this filter is no sandbox.
    let fast = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    let listener = match install_with(filter, fast | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV) {
        // Before Linux 5.19.
        Err(Errno::EINVAL) => install_with(filter, fast),
        result => result,
    }?;
    // Who asks sleeps until it has the answer, so who answers may have its processor: that saves waking
    // another one. Before Linux 6.6 it can't be had, and is not needed.
    // SAFETY: the ioctl takes a number.
    let _ = unsafe { ioctl_with_val(&listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS(), SYNC_WAKE_UP) };
    Ok(listener)
}

/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` of linux/seccomp.h.
const SYNC_WAKE_UP: c_ulong = 1;

fn install_with(filter: &[libc::sock_filter], flags: libc::c_ulong) -> Result<OwnedFd, Errno> {
    let len = u16::try_from(filter.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` points to `len` instructions; both live through the call, which copies them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | flags,
            &raw const program,
        )
    };
    let fd = Errno::result(fd)? as RawFd;
    // SAFETY: the kernel has just made this fd for us (close-on-exec); nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Room for a question, also of a kernel whose struct has grown.
#[repr(C)]
struct Room {
    question: libc::seccomp_notif,
    more: [u64; 32],
}

/// Takes the next question.
///
/// # Errors
/// ENOENT, EINTR: whoever asked is gone.
pub(super) fn receive(listener: BorrowedFd<'_>) -> Result<Notification, Errno> {
    // SAFETY: all zeros is a valid value of these integers, and what the kernel wants to find.
    let mut room: Room = unsafe { std::mem::zeroed() };
    let question = (&raw mut room).cast::<libc::seccomp_notif>();
    // SAFETY: the kernel writes one struct, for which there is room and more.
    let done = unsafe { ioctl_with_mut_ptr(&listener, SECCOMP_IOCTL_NOTIF_RECV(), question) };
    Errno::result(done)?;
    let libc::seccomp_notif { id, pid, data, .. } = room.question;
    Ok(Notification {
        id,
        thread: Pid::from_raw(pid as i32),
        number: libc::c_long::from(data.nr),
        arguments: data.args,
    })
}

/// Has the system call go on to the kernel as it is.
///
/// # Errors
/// ENOENT: whoever asked is gone.
pub(super) fn go_on(listener: BorrowedFd<'_>, id: u64) -> Result<(), Errno> {
    respond(listener, id, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32)
}

/// Has the system call return 0, or fail.
///
/// # Errors
/// ENOENT: whoever asked is gone.
pub(super) fn answer(
    listener: BorrowedFd<'_>,
    id: u64,
    result: Result<(), Errno>,
) -> Result<(), Errno> {
    respond(listener, id, result.map_or_else(|errno| -(errno as i32), |()| 0), 0)
}

fn respond(listener: BorrowedFd<'_>, id: u64, error: i32, flags: u32) -> Result<(), Errno> {
    let mut response = libc::seccomp_notif_resp { id, val: 0, error, flags };
    // SAFETY: the struct lives through the call, which reads it.
    let done = unsafe { ioctl_with_mut_ref(&listener, SECCOMP_IOCTL_NOTIF_SEND(), &mut response) };
    Errno::result(done).map(drop)
}

/// Gives whoever asks a copy of an open file, and has the system call return its number there.
///
/// # Errors
/// ENOENT whoever asked is gone; EMFILE it has too many files.
pub(super) fn give(
    listener: BorrowedFd<'_>,
    id: u64,
    file: BorrowedFd<'_>,
    close_on_exec: bool,
) -> Result<(), Errno> {
    let request = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
        srcfd: file.as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    // SAFETY: the struct lives through the call, which reads it.
    let done = unsafe { ioctl_with_ref(&listener, SECCOMP_IOCTL_NOTIF_ADDFD(), &request) };
    Errno::result(done).map(drop)
}

/// Whether whoever asked still waits: what was read of its memory before was its own.
pub(super) fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the number lives through the call, which reads it.
    unsafe { ioctl_with_ref(&listener, SECCOMP_IOCTL_NOTIF_ID_VALID(), &id) == 0 }
}

/// Whether a file of another process is the same open file as one of ours.
///
/// # Errors
/// EPERM not ours to look into; ENOSYS a kernel without kcmp(2).
pub(super) fn is_same(thread: Pid, fd: RawFd, ours: BorrowedFd<'_>) -> Result<bool, Errno> {
    const KCMP_FILE: libc::c_int = 0;
    // SAFETY: the call takes numbers only.
    let order = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            thread.as_raw(),
            nix::unistd::getpid().as_raw(),
            KCMP_FILE,
            libc::c_ulong::from(fd as u32),
            libc::c_ulong::from(ours.as_raw_fd() as u32),
        )
    };
    match Errno::result(order) {
        Ok(order) => Ok(order == 0),
        Err(Errno::EBADF) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Forks a process that has one thread.
///
/// # Errors
/// See fork(2); EDEADLK where there are more threads, whose locks the child would never get.
pub(super) fn fork() -> Result<ForkResult, Errno> {
    let threads = || Ok(std::fs::read_dir("/proc/self/task").map_err(|_| Errno::ESRCH)?.count());
    // A thread that has been joined is listed for a moment.
    for _ in 0..1000 {
        if threads()? == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    if threads()? != 1 {
        return Err(Errno::EDEADLK);
    }
    // SAFETY: there is no other thread that could hold a lock.
    unsafe { nix::unistd::fork() }
}

/// Dies by a signal, as if it had no handler here; returns where that can't be.
pub(super) fn die_by(signal: Signal) {
    // SAFETY: no function of this program is made a handler.
    let reset = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
    let (mut this, unblock) = (SigSet::empty(), SigmaskHow::SIG_UNBLOCK);
    this.add(signal);
    // SIGKILL has no handler, and is not blocked.
    let _ = (reset, sigprocmask(unblock, Some(&this), None));
    let _ = raise(signal);
}

/// Ends this process at once, without what a program does at its end.
pub(super) fn exit_now(status: i32) -> ! {
    // SAFETY: it does not return, and touches nothing of ours.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_header() {
        assert_eq!(SECCOMP_IOCTL_NOTIF_RECV(), 0xc050_2100);
        assert_eq!(SECCOMP_IOCTL_NOTIF_SEND(), 0xc018_2101);
        assert_eq!(SECCOMP_IOCTL_NOTIF_ID_VALID(), 0x4008_2102);
        assert_eq!(SECCOMP_IOCTL_NOTIF_ADDFD(), 0x4018_2103);
        assert_eq!(SECCOMP_IOCTL_NOTIF_SET_FLAGS(), 0x4008_2104);
    }
}
