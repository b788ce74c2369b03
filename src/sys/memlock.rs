//! The memlock limit of another process.

#![allow(unsafe_code)]

use super::peer::is_alive;
use super::{Error, Result};
use nix::errno::Errno;
use nix::libc;
use std::os::fd::BorrowedFd;

const CALL: &str = "prlimit";

/// Raises the soft and the hard RLIMIT_MEMLOCK of a process to so many bytes; returns the soft one
/// that it has then. A limit is never lowered. `pid` is what `pidfd` was when it was made; prlimit(2)
/// takes no pidfd, so that the pid has not passed to another process is seen before and after.
///
/// # Errors
/// ESRCH it has ended; EPERM without CAP_SYS_RESOURCE, where the hard limit is lower.
pub fn raise_memlock(pidfd: BorrowedFd<'_>, pid: i32, bytes: u64) -> Result<u64> {
    let failed = |errno| Error::new(CALL, format!("process {pid}"), errno);
    // 0 is this process itself: what the kernel shows for one outside of our pid namespace.
    if pid <= 0 || !is_alive(pidfd).map_err(failed)? {
        return Err(failed(Errno::ESRCH));
    }
    let before = prlimit(pid, None).map_err(failed)?;
    let wanted = libc::rlimit64 {
        rlim_cur: before.rlim_cur.max(bytes),
        rlim_max: before.rlim_max.max(bytes),
    };
    if before.rlim_cur < wanted.rlim_cur {
        let replaced = prlimit(pid, Some(wanted)).map_err(failed)?;
        if !is_alive(pidfd).map_err(failed)? {
            if let Some(higher) = lowered(&replaced, &wanted) {
                let _ = prlimit(pid, Some(higher));
            }
            return Err(failed(Errno::ESRCH));
        }
    }
    Ok(wanted.rlim_cur)
}

/// What to set for a process that was not meant: the pid may have passed to it before the limit was
/// replaced, or after that, and then the limit that was replaced is not its own. So what it has got too
/// much is left to it, and only what it can have lost is given back.
fn lowered(replaced: &libc::rlimit64, set: &libc::rlimit64) -> Option<libc::rlimit64> {
    let higher = libc::rlimit64 {
        rlim_cur: replaced.rlim_cur.max(set.rlim_cur),
        rlim_max: replaced.rlim_max.max(set.rlim_max),
    };
    (higher != *set).then_some(higher)
}

/// Sets the limit, if there is a new one; returns what it was.
fn prlimit(pid: i32, new: Option<libc::rlimit64>) -> std::result::Result<libc::rlimit64, Errno> {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `new` is null or points to a struct, `old` points to one; both live through the call.
    let result = unsafe { libc::prlimit64(pid, libc::RLIMIT_MEMLOCK, new, &raw mut old) };
    Errno::result(result).map(|_| old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    use std::process::{Child, Command, Stdio};

    fn child() -> (Child, OwnedFd) {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        // SAFETY: the call takes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        // SAFETY: the call has just made it.
        (child, unsafe { OwnedFd::from_raw_fd(Errno::result(fd).unwrap() as i32) })
    }

    #[test]
    fn a_limit_is_raised_and_never_lowered() {
        let (mut child, pidfd) = child();
        let pid = child.id() as i32;
        let small = libc::rlimit64 { rlim_cur: 4096, rlim_max: 65536 };
        prlimit(pid, Some(small)).unwrap();
        assert_eq!(raise_memlock(pidfd.as_fd(), pid, 8192).unwrap(), 8192);
        assert_eq!(raise_memlock(pidfd.as_fd(), pid, 10).unwrap(), 8192);
        let now = prlimit(pid, None).unwrap();
        assert_eq!((now.rlim_cur, now.rlim_max), (8192, 65536));
        match raise_memlock(pidfd.as_fd(), pid, 1 << 40) {
            Ok(bytes) => assert_eq!(bytes, 1 << 40),
            Err(error) => assert_eq!(error.errno, Errno::EPERM, "without CAP_SYS_RESOURCE"),
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = raise_memlock(pidfd.as_fd(), pid, 1 << 20).unwrap_err();
        assert_eq!(gone.errno, Errno::ESRCH);
    }

    #[test]
    fn whoever_was_not_meant_has_no_lower_limit_afterwards() {
        let limit = |rlim_cur, rlim_max| libc::rlimit64 { rlim_cur, rlim_max };
        let set = limit(100, 200);
        // The pid passed on after the limit was set: what was replaced was another's.
        for before in [limit(0, 0), limit(8, 8), limit(8, 200), set] {
            assert_eq!(lowered(&before, &set), None);
        }
        // Before.
        assert_eq!(lowered(&limit(300, 400), &set), Some(limit(300, 400)));
        assert_eq!(lowered(&limit(8, 400), &set), Some(limit(100, 400)));
        assert_eq!(lowered(&limit(150, 150), &set), Some(limit(150, 200)));
    }

    #[test]
    fn pid_0_is_nobody() {
        let (mut child, pidfd) = child();
        let before = prlimit(0, None).unwrap();
        for pid in [0, -1] {
            let error = raise_memlock(pidfd.as_fd(), pid, u64::MAX).unwrap_err();
            assert_eq!(error.errno, Errno::ESRCH);
        }
        assert_eq!(prlimit(0, None).unwrap().rlim_cur, before.rlim_cur);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
