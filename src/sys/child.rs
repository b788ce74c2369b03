//! Child processes that go on in this program, with nothing open but what they are given.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, Pid, dup2_stdin, dup2_stdout, setpgid};
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The first number behind standard input, output and error.
const FIRST: RawFd = 3;

/// Runs `child` in a new process, and ends that with what it returns. The child has standard error and
/// the `files` that it is given, and no other; its input and output are /dev/null. `name` is what lists
/// of processes show, of which Linux keeps 15 bytes.
///
/// Only for a process with one thread: what another thread is at would stay half done in the child.
///
/// # Errors
/// See fork(2).
pub fn fork<const N: usize>(
    name: &CStr,
    files: [OwnedFd; N],
    child: impl FnOnce([OwnedFd; N]) -> u8,
) -> Result<Pid, Errno> {
    // SAFETY: this process has one thread, so the child may do all that this one may.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let run = move || begin(name, &files).map(|()| child(files));
            // A panic must not get into the parent's frames, which the child has too.
            let code = catch_unwind(AssertUnwindSafe(run)).unwrap_or(Ok(101)).unwrap_or(100);
            // SAFETY: it ends the process, and nothing of it: what the parent would tidy up at its end
            // is not the child's.
            unsafe { libc::_exit(code.into()) }
        }
    }
}

/// What every child does first.
fn begin(name: &CStr, files: &[OwnedFd]) -> Result<(), Errno> {
    close_others(files)?;
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|_| Errno::ENODEV)?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    nix::sys::prctl::set_name(name)?;
    // The terminal's signals are for who started it.
    setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    SigSet::empty().thread_set_mask()
}

/// Closes every file but standard input, output and error, and these.
fn close_others(files: &[OwnedFd]) -> Result<(), Errno> {
    let mut kept: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    kept.sort_unstable();
    let mut next = FIRST;
    for number in kept.into_iter().filter(|number| *number >= FIRST) {
        close_range(next, number - 1)?;
        next = number + 1;
    }
    close_range(next, RawFd::MAX)
}

fn close_range(first: RawFd, last: RawFd) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    // SAFETY: these files have owners only in frames of the parent that the child never returns to.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    Errno::result(result).map(drop)
}

/// A file that is readable once the process has ended. `pid` is a child that was not waited for; of another
/// process it is to be made sure afterwards that it is the one that is meant.
///
/// # Errors
/// See pidfd_open(2).
pub fn pidfd(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two integers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let number = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this fd for us (close-on-exec); nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ends a process by its pidfd, whatever it is at.
///
/// # Errors
/// See pidfd_send_signal(2); ESRCH where it has ended.
pub fn send_kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let info = std::ptr::null::<libc::siginfo_t>();
    let (fd, signal) = (pidfd.as_raw_fd(), libc::SIGKILL);
    // SAFETY: the call takes integers, and no siginfo.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, info, 0) };
    Errno::result(result).map(drop)
}
