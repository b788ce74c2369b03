//! Where clients' connections end, and the sockets with files that they sent. What is in a socket's
//! queue goes with it. Closing that can take for ever, or as long as a guest's memory takes to be freed.
//! So a [`SocketCloser`] has a process close each socket that holds something, in a thread of its own.
//!
//! An owner has one such process, for as long as sockets come. The sockets are sent there at once; a
//! process that takes none for seconds is killed and replaced. Of those that even a kill does not end
//! an owner has [`MOST_UNKILLABLE`], and the last process is kept, to hold what comes. What no process
//! takes waits here. All of this stops its owner's connections and the files that it sends, and no other
//! owner's.

use super::super::account::ConnectionCharge;
use super::super::launcher_link::LauncherLink;
use super::{Helper, HelperProcess, MOST_UNKILLABLE, fdpass, has_not_ended};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

/// How long a closing process is kept for sockets that may come, and then has for what it still closes.
const PAUSE: Duration = Duration::from_millis(200);

/// How long after that is tried again what could not be.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// A closing process that takes nothing for so long is stuck.
const TAKING_PATIENCE: Duration = Duration::from_secs(3);

/// While more of an owner's sockets than this wait for a process, the owner gets no new connection.
const MOST_WAITING: usize = 64;

/// A socket to be closed, with the charge that it keeps until it is handed over.
type Waiting = (Box<dyn AsFd>, Option<Rc<ConnectionCharge>>);

/// Closes one owner's connections. Lives on the event loop.
pub(in super::super) struct SocketCloser {
    launcher: Rc<LauncherLink>,
    waiting: RefCell<Vec<Waiting>>,
    runs: Cell<bool>,
    /// Set at the daemon's end: what waits is taken by [`SocketCloser::hand_over_the_rest`].
    ended: Cell<bool>,
    more: Notify,
    unkillable: RefCell<Vec<OwnedFd>>,
    /// The last one, with what it may not be able to close.
    kept: RefCell<Option<Process>>,
}

/// A process that closes sockets.
#[derive(Debug)]
struct Process {
    helper: HelperProcess,
    /// It has sockets that it was not yet told to close.
    untold: Cell<bool>,
}

impl std::fmt::Debug for SocketCloser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketCloser").field("waiting", &self.waiting.borrow().len()).finish()
    }
}

impl SocketCloser {
    pub(in super::super) fn new(launcher: Rc<LauncherLink>) -> Rc<Self> {
        Rc::new(Self {
            launcher,
            waiting: RefCell::default(),
            runs: Cell::default(),
            ended: Cell::default(),
            more: Notify::new(),
            unkillable: RefCell::default(),
            kept: RefCell::default(),
        })
    }

    /// Closes a peer's socket: here if no file is in it, else by a process.
    pub(in super::super) fn close(
        self: &Rc<Self>,
        socket: impl AsFd + 'static,
        charge: Option<Rc<ConnectionCharge>>,
    ) {
        // From here on nothing more gets into its queue.
        let _ = shutdown(socket.as_fd().as_raw_fd(), Shutdown::Both);
        if is_emptied(socket.as_fd()) {
            return;
        }
        self.waiting.borrow_mut().push((Box::new(socket), charge));
        self.more.notify_one();
        if !self.ended.get() && !self.runs.replace(true) {
            spawn_local(Rc::clone(self).run());
        }
    }

    /// Whether its owner should get no new connection, and send no files: earlier ones can't be closed.
    pub(in super::super) fn is_overloaded(&self) -> bool {
        let is_last = self.count_unkillable() >= MOST_UNKILLABLE - 1;
        if !is_last {
            // There may be others again: this one ends when it has closed what it has.
            self.kept.take();
        }
        is_last || self.waiting.borrow().len() >= MOST_WAITING
    }

    /// From now on starts nothing any more.
    pub(in super::super) fn end(&self) {
        self.ended.set(true);
    }

    /// Hands all that still waits to a process, at the daemon's end: a file in a socket whose close hangs
    /// would keep this process from ending.
    pub(in super::super) async fn hand_over_the_rest(&self) -> std::io::Result<()> {
        if self.waiting.borrow().is_empty() {
            return Ok(());
        }
        let helper = HelperProcess::start(&self.launcher, Helper::Closer).await?;
        let process = Process { helper, untold: Cell::new(false) };
        self.hand_over(&process).await.map_err(Into::into)
    }

    async fn run(self: Rc<Self>) {
        let mut process = self.kept.take();
        while self.is_wanted().await {
            let Some(at_work) = self.process(process.take()).await else { continue };
            match self.hand_over(&at_work).await {
                Ok(()) => process = Some(at_work),
                // It takes nothing, or it has ended.
                Err(Errno::EAGAIN | Errno::EPIPE | Errno::ECONNRESET) => {
                    self.end_process(at_work, Duration::ZERO).await;
                }
                // The system lacks something; another process would lack it too.
                Err(_) => {
                    process = Some(at_work);
                    sleep(RETRY_PAUSE).await;
                }
            }
        }
        // What comes from now on starts another.
        self.runs.set(false);
        match process {
            Some(last) if self.count_unkillable() + 1 >= MOST_UNKILLABLE => {
                self.kept.replace(Some(last));
            }
            Some(process) => self.end_process(process, PAUSE).await,
            None => {}
        }
    }

    /// Waits until there is something to close; false when nothing comes.
    async fn is_wanted(&self) -> bool {
        while self.waiting.borrow().is_empty() {
            if timeout(PAUSE, self.more.notified()).await.is_err() {
                return !self.waiting.borrow().is_empty();
            }
        }
        true
    }

    /// The one that is there, or another; none for now where none can be had.
    async fn process(&self, there: Option<Process>) -> Option<Process> {
        if there.is_some() {
            return there;
        }
        if self.count_unkillable() < MOST_UNKILLABLE
            && let Ok(helper) = HelperProcess::start(&self.launcher, Helper::Closer).await
        {
            return Some(Process { helper, untold: Cell::new(false) });
        }
        sleep(RETRY_PAUSE).await;
        None
    }

    fn count_unkillable(&self) -> usize {
        let mut unkillable = self.unkillable.borrow_mut();
        unkillable.retain(has_not_ended);
        unkillable.len()
    }

    /// Sends a process all that waits. EAGAIN says that it has taken nothing for [`TAKING_PATIENCE`].
    async fn hand_over(&self, process: &Process) -> Result<(), Errno> {
        loop {
            let writable = timeout(TAKING_PATIENCE, process.helper.link.writable()).await;
            let Ok(Ok(mut writable)) = writable else { return Err(Errno::EAGAIN) };
            let link = process.helper.link.as_fd();
            match self.send_all(link, &process.untold, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => writable.clear_ready(),
                sent => return sent,
            }
        }
    }

    /// Sends a process what waits, until there is nothing more or it takes nothing more.
    fn send_all(
        &self,
        link: BorrowedFd<'_>,
        untold: &Cell<bool>,
        flags: MsgFlags,
    ) -> Result<(), Errno> {
        let mut waiting = self.waiting.borrow_mut();
        loop {
            // The process has copies and closes them at this word: ours are closed already, so that
            // they are not the last ones.
            if untold.get() {
                fdpass::send(link, b"c", &[], flags)?;
                untold.set(false);
            }
            if waiting.is_empty() {
                return Ok(());
            }
            let some = waiting.len().min(fdpass::SCM_MAX_FD);
            let sockets: Vec<_> =
                waiting[..some].iter().map(|(socket, _)| socket.as_fd()).collect();
            fdpass::send(link, b"f", &sockets, flags)?;
            untold.set(true);
            waiting.drain(..some);
        }
    }

    async fn end_process(&self, process: Process, patience: Duration) {
        let helper = process.helper;
        let _ = shutdown(helper.link.as_raw_fd(), Shutdown::Write);
        if let Err(unkillable) = helper.end_within(&self.launcher, patience).await {
            self.unkillable.borrow_mut().push(unkillable);
        }
    }
}

/// Reads what no files come with, so that most sockets need no process. False where there is more. It
/// is not much: what one peer could send before nobody read it.
fn is_emptied(socket: BorrowedFd<'_>) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match fdpass::peek(socket, &mut buffer) {
            Ok(next) if next.len == 0 => return true,
            Ok(next) if !next.fds => {
                let bytes = &mut buffer[..next.len];
                if fdpass::receive(socket, bytes, 0, MsgFlags::MSG_DONTWAIT).is_err() {
                    return false;
                }
            }
            _ => return false,
        }
    }
}
