//! A table of open files that a thread has to itself.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::SigSet;

/// Gives the calling thread a table of open files of its own, in which only standard input, output
/// and error are open; threads that it starts share it. What it opens from then on, no process that
/// another thread forks has a copy of. To be called first in a new thread that was handed no fd:
/// numbers mean other files there than in the rest of the process. Signals are blocked in it first,
/// because their handlers may use the process's numbers.
///
/// Source: close_range(2), `CLOSE_RANGE_UNSHARE`; Linux 5.9.
///
/// # Errors
/// ENOSYS an older kernel, EPERM a seccomp filter's refusal; EMFILE, ENOMEM. The table is the process's then.
pub(crate) fn have_own() -> Result<(), Errno> {
    SigSet::all().thread_block()?;
    let (first, last) = (3 as libc::c_uint, libc::c_uint::MAX);
    // SAFETY: it closes nothing that another thread owns, for it closes in a copy of their table;
    // the caller owns nothing that is open.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) };
    Errno::result(done).map(drop)
}
