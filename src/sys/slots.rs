//! The open files that a program is started with: the numbers from 3 on, in order, and beside them
//! nothing that was not meant for it.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::dup3;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// The first number, as `LISTEN_FDS` has it.
pub const FIRST: RawFd = 3;

/// Why the numbers were not taken, or not filled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that is to stay open is none, or its number is needed.
    #[error("--keep-fd {fd}: {why}")]
    KeepFd {
        /// Its number.
        fd: RawFd,
        /// What is wrong with it.
        why: String,
    },
    /// A system call failed.
    #[error("{call}: {} ({errno:?})", errno.desc())]
    System {
        /// Which call.
        call: &'static str,
        /// What it said.
        errno: Errno,
    },
}

/// The result of taking or filling them.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn system(call: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::System { call, errno }
    }
}

/// Numbers that are kept free for a program's files from before anything else is opened, so that
/// putting a file in its place never closes another one.
#[derive(Debug)]
pub struct Slots(Vec<OwnedFd>);

impl Slots {
    /// Takes the numbers from [`FIRST`] on. Every other file from there on that the process was
    /// started with is closed, but for those in `keep`, which the program is to inherit as they are.
    ///
    /// It is for the start of a program, before it opens anything itself, and works once.
    ///
    /// # Errors
    /// [`Error::KeepFd`]: not open, or among the numbers that are taken.
    pub fn reserve(count: usize, keep: &[RawFd]) -> Result<Self> {
        static DONE: AtomicBool = AtomicBool::new(false);
        if DONE.swap(true, Ordering::SeqCst) {
            return Err(Error::System { call: "close_range", errno: Errno::EBUSY });
        }
        let end = FIRST + RawFd::try_from(count).map_err(|_| too_many())?;
        let wrong = |fd: RawFd, why: String| Err(Error::KeepFd { fd, why });
        for &fd in keep {
            if (FIRST..end).contains(&fd) {
                let last = end - 1;
                return wrong(
                    fd,
                    format!("the numbers {FIRST} to {last} are for the lease's files"),
                );
            }
            // SAFETY: F_GETFD only looks at the number.
            if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
                return wrong(fd, "it is not open".into());
            }
        }
        for fd in inherited()?.into_iter().filter(|fd| *fd >= end && !keep.contains(fd)) {
            // SAFETY: it was open before this program ran, which therefore has no owner for it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        for &fd in keep {
            // SAFETY: it was found open above, and stays so.
            set_inherited(unsafe { BorrowedFd::borrow_raw(fd) }, true)?;
        }
        let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(Error::system("open /dev/null"))?;
        // `null` itself may have one of the numbers: a copy above all of them stands for it.
        let above = fcntl(&null, FcntlArg::F_DUPFD_CLOEXEC(end));
        let above = above.map_err(Error::system("fcntl F_DUPFD_CLOEXEC"))?;
        // SAFETY: the call has just made it.
        let above = unsafe { OwnedFd::from_raw_fd(above) };
        drop(null);
        let mut slots = Vec::with_capacity(count);
        for number in FIRST..end {
            // SAFETY: nothing in this program owns this number, as above.
            let slot = unsafe { nix::unistd::dup3_raw(&above, number, OFlag::O_CLOEXEC) };
            slots.push(slot.map_err(Error::system("dup3"))?);
        }
        Ok(Self(slots))
    }

    /// Puts files in their places, and leaves them to be inherited by the next program that this
    /// process becomes or starts.
    ///
    /// # Errors
    /// More files than numbers; what dup3(2) says.
    pub fn fill<F: AsFd>(&mut self, files: impl IntoIterator<Item = F>) -> Result<()> {
        let mut slots = self.0.iter_mut();
        let mut filled = 0;
        for file in files {
            let slot = slots.next().ok_or_else(too_many)?;
            dup3(file, slot, OFlag::O_CLOEXEC).map_err(Error::system("dup3"))?;
            filled += 1;
        }
        self.0.truncate(filled);
        self.0.iter().try_for_each(|slot| set_inherited(slot.as_fd(), true))
    }
}

fn too_many() -> Error {
    Error::System { call: "dup3", errno: Errno::EMFILE }
}

fn set_inherited(fd: BorrowedFd<'_>, inherited: bool) -> Result<()> {
    let flag = if inherited { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    fcntl(fd, FcntlArg::F_SETFD(flag)).map(drop).map_err(Error::system("fcntl F_SETFD"))
}

/// The numbers from [`FIRST`] on that are open.
fn inherited() -> Result<Vec<RawFd>> {
    let failed = |error: std::io::Error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        Error::System { call: "readdir /proc/self/fd", errno }
    };
    let mut numbers = Vec::new();
    let mut entries = std::fs::read_dir("/proc/self/fd").map_err(failed)?;
    while let Some(entry) = entries.next().transpose().map_err(failed)? {
        numbers.extend(entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    drop(entries);
    // The directory's own number was among them and is closed now.
    // SAFETY: F_GETFD only looks at the number.
    numbers.retain(|fd| *fd >= FIRST && unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0);
    Ok(numbers)
}
