//! A peer's open files are never this process's. Closing one can take for ever, and a process in
//! which that happens can't even be killed (a FUSE file whose server keeps quiet); and what it waits
//! for may be something that only this process still has.
//!
//! So a *receiver* receives, checks and closes them: this program again, in a process of its own, with
//! no privileges and none of the daemon's files, started for each message that brings any. Files that
//! can be memory it puts into the queue of a socket, and that socket is what it passes on. A receiver
//! that takes too long is killed; one that even a kill does not end counts against the account that it
//! was started for. Sockets that may hold something unread are closed by a second role of the same
//! program ([`socket_closer`]).

mod role;
mod socket_closer;

pub(super) use role::be_one_if_asked;
pub(super) use socket_closer::SocketCloser;

use super::account::{Account, ConnectionCharge};
use super::incoming::Sent;
use super::peer_socket::PeerSocket;
use crate::protocol::Error;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, setsockopt, shutdown, socketpair,
    sockopt,
};
use nix::sys::time::TimeVal;
use role::{NAME, Report, Role};
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

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
    #[error("the process that receives fds: {0}")]
    Failed(std::io::Error),
}

/// All receivers. Lives on the event loop.
#[derive(Debug)]
pub(super) struct Receivers {
    places: Semaphore,
    by_uid: RefCell<HashMap<u32, Rc<Semaphore>>>,
}

impl Default for Receivers {
    fn default() -> Self {
        Self { places: Semaphore::new(MOST), by_uid: RefCell::default() }
    }
}

impl Receivers {
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
        let socket = socket.try_clone().map_err(NotTaken::Failed)?;
        let ending = |_| NotTaken::Failed(Errno::ECANCELED.into());
        let _of_uid = of_uid.acquire().await.map_err(ending)?;
        let _of_owner = account.receivers.acquire().await.map_err(ending)?;
        let _of_all = self.places.acquire().await.map_err(ending)?;
        let done = spawn_blocking(move || take(socket)).await;
        let (result, left) = done.map_err(|error| NotTaken::Failed(error.into()))?;
        account.unkillable.0.borrow_mut().extend(left.map(|child| (uid, child)));
        result
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
pub(super) struct Unkillable(RefCell<Vec<(u32, Child)>>);

impl Unkillable {
    /// How many there are, where that is too many for one more of this uid.
    fn are_too_many(&self, uid: u32) -> Option<usize> {
        let mut unkillable = self.0.borrow_mut();
        unkillable.retain_mut(|(_, child)| matches!(child.try_wait(), Ok(None)));
        let own = unkillable.iter().filter(|(of, _)| *of == uid).count();
        (own >= MOST_UNKILLABLE || unkillable.len() >= MOST_UNKILLABLE_OF_OWNER)
            .then_some(unkillable.len())
    }
}

/// Has a receiver take a message; also gives the receiver where it does not end.
fn take(socket: OwnedFd) -> (Result<Taken, NotTaken>, Option<Child>) {
    let failed = || Err(NotTaken::Failed(Errno::EPROTO.into()));
    let mut receiver = match Helper::start(Role::Take) {
        Ok(receiver) => receiver,
        Err(error) => return (Err(NotTaken::Failed(error)), None),
    };
    let (ours, flags) = (receiver.socket.as_fd(), MsgFlags::empty());
    // It fails where the receiver died, and then there is no report either.
    let _ = fdpass::send(ours, b"f", &[socket.as_fd()], flags);
    let _ = shutdown(ours.as_raw_fd(), Shutdown::Write);
    // The connection has it still: at the daemon's end no thread must keep a copy.
    drop(socket);
    let mut buffer = vec![0; role::MOST_BYTES];
    let taken = match fdpass::receive(ours, &mut buffer, 1, flags) {
        Ok(got) => Report::decode(&buffer[..got.len])
            .map_or_else(failed, |report| report.into_taken(got.fds.into_iter().next())),
        Err(_) => failed(),
    };
    let ended = receiver.ends_within(CLOSING_PATIENCE);
    (taken, (!ended).then_some(receiver.child))
}

/// A process of this program that was started, and the socket to it.
#[derive(Debug)]
struct Helper {
    child: Child,
    socket: OwnedFd,
}

impl Helper {
    fn start(role: Role) -> std::io::Result<Self> {
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        setsockopt(&socket, sockopt::SendTimeout, &patience)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(role.name()).env_clear().stdin(theirs);
        command.stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        Ok(Self { child: command.spawn()?, socket })
    }

    /// Waits for its end, and kills it when the time is up. False if even that does not end it.
    fn ends_within(&mut self, patience: Duration) -> bool {
        // It says nothing when it ends: it is asked, at first often.
        const KILLED: Duration = Duration::from_millis(500);
        let until = Instant::now() + patience;
        let mut killed_until = None;
        let mut pause = Duration::from_micros(100);
        loop {
            match self.child.try_wait() {
                Ok(Some(_)) | Err(_) => return true,
                Ok(None) => {}
            }
            let now = Instant::now();
            match killed_until {
                None if now >= until => {
                    let _ = self.child.kill();
                    killed_until = Some(now + KILLED);
                    pause = Duration::from_micros(100);
                }
                Some(end) if now >= end => return false,
                _ => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(10));
                }
            }
        }
    }
}
