//! The system calls of seccomp's user notification, which have no safe wrapper elsewhere, and fork.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, raise, sigprocmask};
use nix::unistd::{ForkResult, Pid};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

nix::ioctl_readwrite!(notif_recv, b'!', 0, libc::seccomp_notif);
nix::ioctl_readwrite!(notif_send, b'!', 1, libc::seccomp_notif_resp);
nix::ioctl_write_ptr!(notif_id_valid, b'!', 2, u64);
nix::ioctl_write_ptr!(notif_addfd, b'!', 3, libc::seccomp_notif_addfd);
nix::ioctl_write_int_bad!(notif_set_flags, nix::request_code_write!(b'!', 4, size_of::<u64>()));

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
    let _ = unsafe { notif_set_flags(listener.as_raw_fd(), SYNC_WAKE_UP) };
    Ok(listener)
}

/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` of linux/seccomp.h.
const SYNC_WAKE_UP: i32 = 1;

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
    // SAFETY: the kernel writes one struct, for which there is room and more.
    unsafe { notif_recv(listener.as_raw_fd(), &raw mut room.question) }?;
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
    unsafe { notif_send(listener.as_raw_fd(), &raw mut response) }.map(drop)
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
    unsafe { notif_addfd(listener.as_raw_fd(), &raw const request) }.map(drop)
}

/// Whether whoever asked still waits: what was read of its memory before was its own.
pub(super) fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the number lives through the call, which reads it.
    unsafe { notif_id_valid(listener.as_raw_fd(), &raw const id) }.is_ok()
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
        assert_eq!(
            nix::request_code_readwrite!(b'!', 0, size_of::<libc::seccomp_notif>()),
            0xc050_2100
        );
        assert_eq!(
            nix::request_code_readwrite!(b'!', 1, size_of::<libc::seccomp_notif_resp>()),
            0xc018_2101
        );
        assert_eq!(nix::request_code_write!(b'!', 2, size_of::<u64>()), 0x4008_2102);
        assert_eq!(
            nix::request_code_write!(b'!', 3, size_of::<libc::seccomp_notif_addfd>()),
            0x4018_2103
        );
    }
}
