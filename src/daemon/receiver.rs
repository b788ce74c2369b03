//! A peer's open files are never this process's. Closing one can take for ever, and a process in
//! which that happens can't even be killed (a FUSE file whose server keeps quiet); and what it waits
//! for may be something that only this process still has.
//!
//! So a *receiver* ([`crate::receiver`]) receives, checks and closes them, in a process of its own,
//! with no privileges and none of the daemon's files, started for each message that brings any. Files
//! that can be memory it puts into the queue of a socket, and that socket is what it passes on. A
//! receiver that takes too long is killed; one that even a kill does not end counts against the account
//! that it was started for. Sockets that may hold something unread are closed by another such process
//! ([`socket_closer`]).

mod socket_closer;

pub(super) use socket_closer::SocketCloser;

use super::account::{Account, ConnectionCharge};
use super::incoming::Sent;
use super::launcher_link::LauncherLink;
use super::peer_socket::PeerSocket;
use crate::process::launcher::{KillHelper, StartHelper};
use crate::process::role::Helper;
use crate::protocol::Error;
use crate::receiver::{MOST_BYTES, Report};
use crate::sys::fdpass::{self, ReceiveError, Received};
use crate::sys::peer::is_alive;
use crate::sys::readiness::watch;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Receivers at a time that take messages: for one uid, for one owner, and for all.
const MOST_OF_UID: usize = 4;
pub(super) const MOST_OF_OWNER: usize = 8;
const MOST: usize = 32;

/// Receivers that did not end even when they were killed: those that take messages for one uid, those
/// that close one owner's sockets.
const MOST_UNKILLABLE: usize = 4;

/// Of those that take messages for one owner, whatever their uids.
const MOST_UNKILLABLE_OF_OWNER: usize = 16;

/// How long a receiver may take to hand over what it received, and then to close the rest.
const PATIENCE: Duration = Duration::from_secs(10);
const CLOSING_PATIENCE: Duration = Duration::from_millis(200);

/// How long a process may take to end that was killed.
const KILLED: Duration = Duration::from_millis(500);

/// A message that came with open files.
#[derive(Debug)]
struct Taken {
    bytes: Vec<u8>,
    /// For each file, in the sender's order, what it is if it can't be memory.
    checked: Vec<Result<(), Error>>,
    /// A socket with the others in its queue.
    queue: Option<OwnedFd>,
}

/// Why nothing was taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotTaken {
    #[error("{0} processes that hold this client's files can't be ended")]
    Unkillable(usize),
    #[error("files that this client sent can't be closed")]
    Unclosed,
    #[error("more than {} fds in one message", fdpass::MAX_FDS)]
    TooMany,
    #[error("not all fds could be received: the limit of open files, or a security module")]
    Cut,
    #[error("the process that receives fds: {0}")]
    Failed(std::io::Error),
}

/// All receivers. Lives on the event loop.
#[derive(Debug)]
pub(super) struct Receivers {
    launcher: Rc<LauncherLink>,
    places: Semaphore,
    by_uid: RefCell<HashMap<u32, Rc<Semaphore>>>,
}

impl Receivers {
    pub(super) fn new(launcher: Rc<LauncherLink>) -> Self {
        Self { launcher, places: Semaphore::new(MOST), by_uid: RefCell::default() }
    }

    /// Takes the message at the head of a socket, which has files with it; they are charged as the
    /// connection is until they are closed.
    ///
    /// # Errors
    /// [`NotTaken`]: the connection is of no more use.
    pub(super) async fn take(
        &self,
        charge: &Rc<ConnectionCharge>,
        uid: u32,
        socket: &OwnedFd,
    ) -> Result<(Vec<u8>, Sent), NotTaken> {
        let Taken { bytes, checked, queue } = self.have_taken(&charge.account, uid, socket).await?;
        let queue = queue.map(|socket| PeerSocket::new(socket, Rc::clone(charge)));
        Ok((bytes, Sent::new(checked, queue)))
    }

    async fn have_taken(
        &self,
        account: &Account,
        uid: u32,
        socket: &OwnedFd,
    ) -> Result<Taken, NotTaken> {
        if account.socket_closer.is_overloaded() {
            return Err(NotTaken::Unclosed);
        }
        if let Some(unkillable) = account.unkillable.are_too_many(uid) {
            return Err(NotTaken::Unkillable(unkillable));
        }
        let of_uid = self.of(uid);
        let ending = |_| NotTaken::Failed(Errno::ECANCELED.into());
        let _of_uid = of_uid.acquire().await.map_err(ending)?;
        let _of_owner = account.receivers.acquire().await.map_err(ending)?;
        let _of_all = self.places.acquire().await.map_err(ending)?;
        let receiver = HelperProcess::start(&self.launcher, Helper::Receiver).await;
        let receiver = receiver.map_err(NotTaken::Failed)?;
        let taken = take(&receiver, socket).await;
        if let Err(unkillable) = receiver.end_within(&self.launcher, CLOSING_PATIENCE).await {
            account.unkillable.0.borrow_mut().push((uid, unkillable));
        }
        taken
    }

    fn of(&self, uid: u32) -> Rc<Semaphore> {
        let mut by_uid = self.by_uid.borrow_mut();
        if let Some(places) = by_uid.get(&uid) {
            return Rc::clone(places);
        }
        by_uid.retain(|_, places| Rc::strong_count(places) > 1);
        Rc::clone(by_uid.entry(uid).or_insert(Rc::new(Semaphore::new(MOST_OF_UID))))
    }
}

/// An owner's receivers that did not end even when they were killed, with whom they were started for.
#[derive(Debug, Default)]
pub(super) struct Unkillable(RefCell<Vec<(u32, OwnedFd)>>);

impl Unkillable {
    /// How many there are, where that is too many for one more of this uid.
    fn are_too_many(&self, uid: u32) -> Option<usize> {
        let mut unkillable = self.0.borrow_mut();
        unkillable.retain(|(_, pidfd)| has_not_ended(pidfd));
        let own = unkillable.iter().filter(|(of, _)| *of == uid).count();
        (own >= MOST_UNKILLABLE || unkillable.len() >= MOST_UNKILLABLE_OF_OWNER)
            .then_some(unkillable.len())
    }
}

/// Has a receiver take a message.
async fn take(receiver: &HelperProcess, socket: &OwnedFd) -> Result<Taken, NotTaken> {
    let failed = || NotTaken::Failed(Errno::EPROTO.into());
    let link = &receiver.link;
    // It fails where the receiver died, and then there is no report either.
    let _ = fdpass::send(link.as_fd(), b"f", &[socket.as_fd()], MsgFlags::MSG_DONTWAIT);
    let _ = shutdown(link.as_raw_fd(), Shutdown::Write);
    let mut buffer = vec![0; MOST_BYTES];
    let got = timeout(PATIENCE, receive(link, &mut buffer)).await;
    let got = got.ok().and_then(Result::ok).ok_or_else(failed)?;
    let report = Report::decode(&buffer[..got.len]).ok_or_else(failed)?;
    taken(report, got.fds.into_iter().next())
}

pub(super) async fn receive(
    link: &AsyncFd<OwnedFd>,
    buffer: &mut [u8],
) -> std::io::Result<Received> {
    loop {
        let mut readable = link.readable().await?;
        let flags = MsgFlags::MSG_DONTWAIT;
        match fdpass::receive(link.as_fd(), buffer, 1, flags) {
            Err(ReceiveError::Errno(Errno::EAGAIN)) => readable.clear_ready(),
            got => return got.map_err(std::io::Error::other),
        }
    }
}

fn taken(report: Report, queue: Option<OwnedFd>) -> Result<Taken, NotTaken> {
    if report.too_many {
        return Err(NotTaken::TooMany);
    }
    if report.cut {
        return Err(NotTaken::Cut);
    }
    if queue.is_some() != report.refused.contains(&None) {
        return Err(NotTaken::Failed(Errno::EPROTO.into()));
    }
    let checked = report.refused.into_iter().map(|refused| match refused {
        Some(reason) => Err(Error::bad("memory", reason)),
        None => Ok(()),
    });
    Ok(Taken { bytes: report.bytes, checked: checked.collect(), queue })
}

/// A process that the launcher has started, and the link to it.
#[derive(Debug)]
pub(super) struct HelperProcess {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    pub(super) link: AsyncFd<OwnedFd>,
}

impl HelperProcess {
    pub(super) async fn start(launcher: &LauncherLink, helper: Helper) -> std::io::Result<Self> {
        let (started, fds) = launcher.ask(&StartHelper { helper }).await?;
        let fds = <[OwnedFd; 2]>::try_from(fds);
        let [link, pidfd] = fds.map_err(|_| std::io::Error::from(Errno::EPROTO))?;
        let link = watch(link, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { pid: started.pid, pidfd: watch(pidfd, Interest::READABLE)?, link })
    }

    /// Waits for its end, and has it killed when the time is up. Gives its pidfd where even that does
    /// not end it.
    pub(super) async fn end_within(
        self,
        launcher: &LauncherLink,
        patience: Duration,
    ) -> Result<(), OwnedFd> {
        let Self { pid, pidfd, link } = self;
        drop(link);
        if timeout(patience, pidfd.readable()).await.is_ok() {
            return Ok(());
        }
        let _ = launcher.ask(&KillHelper { pid }).await;
        match timeout(KILLED, pidfd.readable()).await {
            Ok(_) => Ok(()),
            Err(_) => Err(pidfd.into_inner()),
        }
    }
}

/// Whether a process is there still; one of which that can't be told is.
pub(super) fn has_not_ended(pidfd: &OwnedFd) -> bool {
    is_alive(pidfd.as_fd()).unwrap_or(true)
}
