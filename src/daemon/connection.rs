//! One connection: reads calls, has them carried out, answers them in order.

use super::Daemon;
use super::accept::set_up;
use super::account::ConnectionCharge;
use super::incoming::{Flags, Incoming, Message, NoMessage, Sent, StrayFds};
use super::outgoing::{Answer, SendError};
use super::peer_socket::PeerSocket;
use super::receiver::NotTaken;
use crate::broker::Caller;
use crate::policy::Policy;
use crate::process::peer;
use crate::protocol::{Error, Request};
use crate::sys::fdpass::{self, ReceiveError};
use crate::sys::peer::{has_hung_up, unread};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, shutdown};
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::debug;

/// How often it is looked whether a client that waits has gone.
const HANG_UP: Duration = Duration::from_millis(250);

/// A connected client. While it is idle this is all there is of it: no buffers.
pub(super) struct Connection {
    pub(super) daemon: Rc<Daemon>,
    pub(super) caller: Arc<Caller>,
    /// A call that is under way has it as well.
    pub(super) socket: Rc<PeerSocket>,
    pub(super) charge: Rc<ConnectionCharge>,
    pub(super) incoming: Incoming,
    /// The last read may have left something behind.
    more: bool,
    /// By which the caller was found and charged.
    policy: Arc<Policy>,
}

/// Why a connection ended, other than by being closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("{0}")]
    NoMessage(#[from] NoMessage),
    #[error("{0}")]
    StrayFds(#[from] StrayFds),
    #[error("fds in a message: none are taken from this client")]
    FdsNotTaken,
    #[error("{0}")]
    NotTaken(#[from] NotTaken),
    #[error("closed in the midst of a message")]
    HalfMessage,
    #[error("closed before it was answered")]
    Gone,
    #[error("half a message and then silence")]
    Silent,
    #[error("was sent half a reply")]
    HalfReply,
    #[error("does not read the events it watches")]
    Lagging,
    #[error("sent something while it watches")]
    SpokeWhileWatching,
    #[error("{0}")]
    OverLimit(Error),
    #[error("getsockopt: {} ({_0:?})", _0.desc())]
    Unknown(Errno),
    #[error("{0}")]
    Send(#[from] SendError),
    #[error("recvmsg: {} ({_0:?})", _0.desc())]
    Receive(Errno),
    #[error("{0}")]
    Read(#[from] ReceiveError),
    #[error("{0}")]
    Poll(std::io::Error),
}

impl Connection {
    pub(super) fn new(
        daemon: Rc<Daemon>,
        caller: Caller,
        socket: AsyncFd<OwnedFd>,
        charge: Rc<ConnectionCharge>,
    ) -> Self {
        let socket = Rc::new(PeerSocket::new(socket, Rc::clone(&charge)));
        let incoming = Incoming::new(charge.account.most_message);
        let policy = daemon.broker.policy();
        Self { daemon, caller: Arc::new(caller), socket, charge, incoming, more: false, policy }
    }

    /// Finds out anew who the caller is and what it may, where the policy is another one than when that
    /// was found out last.
    pub(super) fn renew(&mut self) -> Result<(), Lost> {
        let policy = self.daemon.broker.policy();
        if Arc::ptr_eq(&policy, &self.policy) {
            return Ok(());
        }
        // A unit that was found stays: its process may have passed the socket on, and ended.
        if policy.names_units() && self.caller.peer.unit.is_none() {
            let peer = peer::describe(self.socket.as_fd(), true).map_err(Lost::Unknown)?;
            self.caller = Arc::new(Caller { peer });
        }
        let accounts = &self.daemon.accounts;
        let account = accounts.account(&policy, &self.caller.peer);
        if !Rc::ptr_eq(&account, &self.charge.account) {
            let charge = accounts.charge(account).map_err(|error| {
                Answer::error(&error).send_what_fits(self.socket.as_fd());
                Lost::OverLimit(error)
            })?;
            self.socket.recharge(Rc::clone(&charge));
            self.charge = charge;
        }
        self.incoming.limit(self.charge.account.most_message);
        set_up(self.socket.as_fd(), &self.charge.account);
        self.policy = policy;
        Ok(())
    }

    /// Serves it until it ends.
    pub(super) async fn serve(mut self) {
        let ended = self.answer_calls().await;
        let peer = self.caller.peer.clone();
        if let Err(reason) = ended {
            debug!(uid = peer.uid, pid = peer.pid, %reason, "disconnected");
        }
        let Self { daemon, charge, socket, incoming, .. } = self;
        drop(incoming);
        // Boxed, so that the task of an idle connection stays small.
        Box::pin(all_read(&daemon, &charge, peer.uid, socket.get_ref())).await;
    }

    /// One call at a time, as Varlink has it. What can take long is boxed, so that the task of an
    /// idle connection stays small.
    async fn answer_calls(&mut self) -> Result<(), Lost> {
        while let Some(Message { request, flags, fds }) = self.next_message().await? {
            self.renew()?;
            let answer = match self.check(request, flags, &fds) {
                Err(error) => Err(error),
                Ok(Request::GetInfo(_)) => Ok(Answer::reply(super::introspect::info())),
                Ok(Request::GetInterfaceDescription(asked)) => {
                    super::introspect::describe(&asked.interface)
                }
                Ok(Request::Acquire(request)) => match Box::pin(self.acquire(request)).await? {
                    Some(answer) => Ok(answer),
                    None => continue,
                },
                Ok(Request::GetFds(request)) => match Box::pin(self.get_fds(request)).await? {
                    Some(answer) => Ok(answer),
                    None => continue,
                },
                Ok(Request::Release(request)) => Box::pin(self.release(request)).await,
                Ok(Request::MapDma(request)) => Box::pin(self.map_dma(request, fds)).await,
                Ok(Request::UnmapDma(request)) => Box::pin(self.unmap_dma(request)).await,
                Ok(Request::SetMemlock(request)) => Box::pin(self.set_memlock(request)).await,
                Ok(Request::Topology(_)) => Box::pin(self.topology(flags)).await?,
                Ok(Request::Leases(_)) => Box::pin(self.leases(flags)).await?,
                Ok(Request::Status(_)) => Box::pin(self.status(flags)).await?,
                Ok(Request::Revoke(request)) => Box::pin(self.revoke(request)).await?,
                Ok(Request::Drain(request)) => Box::pin(self.drain(request, flags)).await?,
                Ok(Request::Confirm(request)) => Box::pin(self.confirm(request)).await,
                Ok(Request::Watch(watch)) => return Box::pin(self.watch(watch)).await,
            };
            let answer = answer.unwrap_or_else(|error| self.refuse(&error));
            if !flags.oneway {
                self.send(answer).await?;
            }
            // A client that has asked for more already waits until all others had a turn.
            if self.more || self.incoming.is_partial() {
                yield_now().await;
            }
        }
        Ok(())
    }

    /// What comes of work that takes as long as its caller wants it to, for as long as the caller is there:
    /// one that has gone keeps no place.
    pub(super) async fn while_there<T>(&self, work: impl Future<Output = T>) -> Result<T, Lost> {
        let gone = async {
            // To be told at once, what the client may have sent behind this call would have to be read.
            while !has_hung_up(self.socket.as_fd()) {
                sleep(HANG_UP).await;
            }
        };
        tokio::select! {
            done = work => Ok(done),
            () = gone => Err(Lost::Gone),
        }
    }

    /// What is wrong with a request before anybody looks at it closely.
    fn check(
        &self,
        request: Result<Request, Error>,
        flags: Flags,
        fds: &Sent,
    ) -> Result<Request, Error> {
        let request = request?;
        let rules = request.rules();
        if let Some(denied) = &self.charge.account.terms().denied
            && !rules.for_strangers
            && !(rules.for_administrators && self.daemon.broker.administers(&self.caller))
        {
            return Err(denied.clone());
        }
        if flags.upgrade {
            return Err(Error::bad("upgrade", "no method here can be upgraded"));
        }
        if fds.len() > 0 && !rules.takes_files {
            return Err(fds_not_taken());
        }
        if rules.needs_more && !flags.more {
            return Err(Error::ExpectedMore {});
        }
        if rules.needs_reply && flags.oneway {
            return Err(Error::bad("oneway", "this method only makes sense with its reply"));
        }
        if let Request::Acquire(_) = request {
            self.daemon.check_open_files()?;
        }
        Ok(request)
    }

    async fn next_message(&mut self) -> Result<Option<Message>, Lost> {
        let mut deadline = None;
        loop {
            if let Some(message) = self.incoming.next_message()? {
                return Ok(Some(message));
            }
            let readable = if self.incoming.is_partial() {
                let patience = self.daemon.deadlines.read;
                let until = *deadline.get_or_insert_with(|| Instant::now() + patience);
                let readable = Box::pin(timeout_at(until, self.socket.readable())).await;
                readable.map_err(|_| Lost::Silent)?
            } else {
                self.socket.readable().await
            };
            let readable = readable.map_err(Lost::Poll)?;
            match receive(&self.daemon, &mut self.incoming, &mut self.more, readable)? {
                Got::Bytes => {}
                Got::Files => Box::pin(self.take_files()).await?,
                Got::End if self.incoming.is_partial() => return Err(Lost::HalfMessage),
                Got::End => return Ok(None),
            }
        }
    }

    /// Waits until the peer sends something, or closes, and takes it.
    pub(super) async fn receive(&mut self) -> Result<Got, Lost> {
        let readable = self.socket.readable().await.map_err(Lost::Poll)?;
        receive(&self.daemon, &mut self.incoming, &mut self.more, readable)
    }

    /// Takes a message that has files with it.
    async fn take_files(&mut self) -> Result<(), Lost> {
        self.renew()?;
        if !self.charge.account.terms().sends_fds {
            return Err(Lost::FdsNotTaken);
        }
        let (receivers, uid) = (&self.daemon.receivers, self.caller.peer.uid);
        let (bytes, files) = receivers.take(&self.charge, uid, self.socket.get_ref()).await?;
        self.more = true;
        Ok(self.incoming.push(&bytes, files)?)
    }

    pub(super) async fn send(&self, answer: Answer) -> Result<(), Lost> {
        Ok(answer.send(self.socket.as_fd(), self.daemon.deadlines.write).await?)
    }

    /// An error as its answer, logged as it deserves.
    pub(super) fn refuse(&self, error: &Error) -> Answer {
        Daemon::log_refusal(&self.charge.account, &self.caller.peer, error);
        Answer::error(error)
    }
}

fn fds_not_taken() -> Error {
    Error::bad("fds", "this method takes no fds; MapDma alone does")
}

/// What a read brought.
pub(super) enum Got {
    Bytes,
    /// Nothing yet: files come with what is next.
    Files,
    End,
}

/// Takes what the socket has, by way of the buffer that all connections share. Looks first: what
/// files come with is not for this process to receive.
fn receive(
    daemon: &Daemon,
    incoming: &mut Incoming,
    more: &mut bool,
    mut readable: AsyncFdReadyGuard<'_, OwnedFd>,
) -> Result<Got, Lost> {
    let mut buffer = daemon.buffer.borrow_mut();
    let socket = readable.get_inner().as_fd();
    let next = match fdpass::peek(socket, &mut buffer) {
        Err(Errno::EAGAIN) => {
            readable.clear_ready();
            return Ok(Got::Bytes);
        }
        Err(errno) => return Err(Lost::Receive(errno)),
        Ok(next) => next,
    };
    if next.fds {
        return Ok(Got::Files);
    }
    if next.len == 0 {
        return Ok(Got::End);
    }
    let got = fdpass::receive(socket, &mut buffer[..next.len], 0, MsgFlags::MSG_DONTWAIT);
    let len = got?.len;
    // Less than there was room for: there is nothing more.
    *more = len == buffer.len();
    if !*more {
        readable.clear_ready();
    }
    incoming.push(&buffer[..len], Sent::default())?;
    Ok(Got::Bytes)
}

/// How often at the most it is looked whether a peer has read all it was sent.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Waits until the peer has read all, or is gone. What it leaves unread, open files in it, stays in the
/// kernel at our cost when our end is closed; so until then the connection keeps its place in the limits.
async fn all_read(daemon: &Daemon, charge: &Rc<ConnectionCharge>, uid: u32, socket: &OwnedFd) {
    // It sees the end behind what there is, and sends no more.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
    let mut pause = Duration::from_millis(1);
    let mut is_emptied = false;
    while unread(socket.as_fd()).is_ok_and(|bytes| bytes > 0) {
        // What it has sent could be its own end, which nobody else has.
        if !std::mem::replace(&mut is_emptied, true)
            && empty(daemon, charge, uid, socket).await.is_err()
        {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOK_AGAIN);
    }
}

/// Takes out what a peer has sent and nobody will read.
async fn empty(
    daemon: &Daemon,
    charge: &Rc<ConnectionCharge>,
    uid: u32,
    socket: &OwnedFd,
) -> Result<(), Lost> {
    let mut buffer = [0; 4096];
    loop {
        match fdpass::peek(socket.as_fd(), &mut buffer) {
            Ok(next) if next.len == 0 => return Ok(()),
            Ok(next) if next.fds => drop(daemon.receivers.take(charge, uid, socket).await?),
            Ok(next) => {
                let bytes = &mut buffer[..next.len];
                fdpass::receive(socket.as_fd(), bytes, 0, MsgFlags::MSG_DONTWAIT)?;
            }
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(Lost::Receive(errno)),
        }
    }
}
