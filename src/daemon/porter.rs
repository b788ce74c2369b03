//! Open files that peers send are never this process's. Closing one can take for ever, and a process
//! in which that happens can't even be killed (a FUSE file whose server read the request and keeps
//! quiet); and what is waited for may be something that only this process still has.
//!
//! So a *porter* receives, looks at and closes them: this program again, in a process of its own,
//! with no privileges and none of the daemon's files, started for each message that brings any. Only
//! files that can be memory come from there. Sockets that may still hold something unread are closed
//! by one too. A porter that takes too long is killed; one that even that does not end counts against
//! the uid it was started for.

mod errand;

pub use errand::be_one_if_asked;

use super::closer::Lane;
use crate::fdpass;
use crate::protocol::Error;
use errand::{Errand, NAME, Report};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, setsockopt, shutdown, socketpair,
    sockopt,
};
use nix::sys::time::TimeVal;
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::{spawn_blocking, spawn_local};

/// Porters at work at a time, for one uid and for all.
const MOST_OF_ONE: usize = 4;
const MOST: usize = 32;

/// Porters of one uid that did not end even when they were killed.
const MOST_STUCK: usize = 4;

/// How long a porter may take to hand over what it received, and then to close the rest.
const PATIENCE: Duration = Duration::from_secs(10);
const CLOSING_PATIENCE: Duration = Duration::from_millis(200);

/// A message that came with open files.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) bytes: Vec<u8>,
    /// In the sender's order; those that can't be memory with what they are instead.
    pub(super) files: Vec<Result<OwnedFd, Error>>,
}

/// Why nothing was taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotTaken {
    #[error("{0} processes that hold this uid's files can't be ended")]
    Stuck(usize),
    #[error("more than {} fds in one message", fdpass::MAX_FDS)]
    TooMany,
    #[error("the process that receives fds: {0}")]
    Failed(std::io::Error),
}

/// All porters. Lives on the event loop.
#[derive(Debug)]
pub(super) struct Porters {
    places: Arc<Semaphore>,
    by_uid: RefCell<HashMap<u32, Rc<OfUid>>>,
}

/// What is at work for one uid.
#[derive(Debug)]
struct OfUid {
    places: Arc<Semaphore>,
    stuck: RefCell<Vec<Child>>,
    /// Sockets to be closed, all those that gather while a porter closes the last ones.
    sockets: RefCell<Vec<OwnedFd>>,
    closing: RefCell<bool>,
}

impl Default for Porters {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MOST)), by_uid: RefCell::default() }
    }
}

impl Porters {
    /// Takes the message at the head of a socket, which has files with it.
    ///
    /// # Errors
    /// [`NotTaken`]: the connection is of no more use.
    pub(super) async fn take(&self, uid: u32, socket: &OwnedFd) -> Result<Taken, NotTaken> {
        let of_uid = self.of(uid);
        let stuck = of_uid.still_stuck();
        if stuck >= MOST_STUCK {
            return Err(NotTaken::Stuck(stuck));
        }
        let socket = socket.try_clone().map_err(NotTaken::Failed)?;
        let (result, left) = self
            .send(&of_uid, move || {
                let mut taken = Err(NotTaken::Failed(Errno::EPROTO.into()));
                let left = run(Errand::Take, vec![socket], |report, files| {
                    taken = report.into_taken(files);
                });
                match left {
                    Ok(left) => (taken, left),
                    Err((error, _)) => (Err(NotTaken::Failed(error)), None),
                }
            })
            .await?;
        of_uid.stuck.borrow_mut().extend(left);
        result
    }

    /// Closes a peer's socket: here if there is nothing in it, else by a porter. `lane` is where it
    /// goes if none can be had.
    pub(super) fn close(self: &Rc<Self>, uid: u32, socket: OwnedFd, lane: &Lane) {
        // From here on nothing more gets into its queue.
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        if fdpass::peek(socket.as_fd(), &mut [0]).is_ok_and(|next| next.len == 0) {
            return;
        }
        let of_uid = self.of(uid);
        of_uid.sockets.borrow_mut().push(socket);
        if !of_uid.closing.replace(true) {
            let (porters, lane) = (Rc::clone(self), lane.clone());
            spawn_local(async move { porters.close_gathered(&of_uid, &lane).await });
        }
    }

    async fn close_gathered(&self, of_uid: &OfUid, lane: &Lane) {
        loop {
            let sockets = of_uid.sockets.take();
            if sockets.is_empty() {
                of_uid.closing.replace(false);
                return;
            }
            let job = move || run(Errand::Close, sockets, |_, _| {});
            match self.send(of_uid, job).await {
                Ok(Ok(left)) => of_uid.stuck.borrow_mut().extend(left),
                Ok(Err((_, sockets))) => lane.close(sockets),
                // The runtime is ending, and with it this process.
                Err(_) => {}
            }
        }
    }

    /// Has a thread do it, once there is a place.
    async fn send<T: Send + 'static>(
        &self,
        of_uid: &OfUid,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NotTaken> {
        let ending = |_| NotTaken::Failed(Errno::ECANCELED.into());
        let _own = Arc::clone(&of_uid.places).acquire_owned().await.map_err(ending)?;
        let _common = Arc::clone(&self.places).acquire_owned().await.map_err(ending)?;
        spawn_blocking(job).await.map_err(|error| NotTaken::Failed(error.into()))
    }

    fn of(&self, uid: u32) -> Rc<OfUid> {
        let mut by_uid = self.by_uid.borrow_mut();
        if let Some(of_uid) = by_uid.get(&uid) {
            return Rc::clone(of_uid);
        }
        by_uid.retain(|_, of_uid| Rc::strong_count(of_uid) > 1 || of_uid.still_stuck() > 0);
        let of_uid = OfUid {
            places: Arc::new(Semaphore::new(MOST_OF_ONE)),
            stuck: RefCell::default(),
            sockets: RefCell::default(),
            closing: RefCell::default(),
        };
        Rc::clone(by_uid.entry(uid).or_insert(Rc::new(of_uid)))
    }
}

impl OfUid {
    fn still_stuck(&self) -> usize {
        let mut stuck = self.stuck.borrow_mut();
        stuck.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        stuck.len()
    }
}

/// Starts a porter, gives it the files and waits until it has done what it should. Returns it where
/// it does not end, and the files where there was no porter to give them to.
fn run(
    errand: Errand,
    files: Vec<OwnedFd>,
    on_report: impl FnOnce(Report, Vec<OwnedFd>),
) -> Result<Option<Child>, (std::io::Error, Vec<OwnedFd>)> {
    let (mut child, ours) = match start(errand) {
        Ok(started) => started,
        Err(error) => return Err((error, files)),
    };
    let flags = MsgFlags::empty();
    for some in files.chunks(fdpass::MAX_FDS) {
        let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
        // It fails where the porter died: what it was given is closed with it.
        let _ = fdpass::send(ours.as_fd(), b"f", &some, flags);
    }
    // It has copies: ours are never the last ones, so closing them can't block.
    drop(files);
    let _ = shutdown(ours.as_raw_fd(), Shutdown::Write);
    if let Errand::Take = errand {
        let mut buffer = vec![0; errand::MOST_BYTES];
        if let Ok(got) = fdpass::receive(ours.as_fd(), &mut buffer, fdpass::MAX_FDS, flags)
            && let Some(report) = Report::decode(&buffer[..got.len])
        {
            on_report(report, got.fds);
        }
    }
    Ok((!ends(&mut child, Instant::now() + CLOSING_PATIENCE)).then_some(child))
}

fn start(errand: Errand) -> std::io::Result<(Child, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
    setsockopt(&ours, sockopt::ReceiveTimeout, &patience)?;
    setsockopt(&ours, sockopt::SendTimeout, &patience)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(errand.name()).env_clear().stdin(theirs);
    command.stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
    Ok((command.spawn()?, ours))
}

/// Waits for the end of a porter, and kills it when the time is up.
fn ends(child: &mut Child, until: Instant) -> bool {
    // It says nothing when it ends: it is asked, at first often.
    const KILLED: Duration = Duration::from_millis(500);
    let mut killed_until = None;
    let mut pause = Duration::from_micros(100);
    loop {
        match child.try_wait() {
            Ok(Some(_)) | Err(_) => return true,
            Ok(None) => {}
        }
        let now = Instant::now();
        match killed_until {
            None if now >= until => {
                let _ = child.kill();
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
