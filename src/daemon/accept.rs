//! Takes new connections in.

use super::Daemon;
use super::account::Account;
use super::connection::Connection;
use super::outgoing::Answer;
use super::rate_limit::RateLimit;
use crate::broker::Caller;
use crate::policy::Peer;
use crate::process::peer;
use crate::protocol::Error;
use crate::sys::peer::pass_fds;
use crate::sys::readiness::{try_watch, watch};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use std::convert::Infallible;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::task::{spawn_local, yield_now};
use tracing::{debug, warn};

/// How long nobody is let in after a failure that will not go away by itself: those who connect
/// wait in the socket's queue.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves everybody who connects, for ever.
///
/// # Errors
/// It can't wait for connections any more.
pub(super) async fn serve(
    daemon: Rc<Daemon>,
    listener: UnixListener,
) -> std::io::Result<Infallible> {
    let watched = watch(listener.try_clone()?.into(), Interest::READABLE)?;
    let mut failures = RateLimit::new(20);
    loop {
        let mut readable = watched.readable().await?;
        while daemon.open_files.are_out() {
            if let Some(held_back) = failures.pass(Instant::now()) {
                warn!(held_back, "open files run out: new connections wait");
            }
            tokio::time::sleep(PAUSE).await;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                admit(&daemon, stream);
                // A flood of connections must not hold up those that are there.
                yield_now().await;
            }
            Err(failure) if failure.kind() == ErrorKind::WouldBlock => readable.clear_ready(),
            Err(failure) if gone_again(&failure) => {}
            Err(failure) => {
                if let Some(held_back) = failures.pass(Instant::now()) {
                    warn!(%failure, held_back, "accept failed; trying again shortly");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Whether the client gave up before it was let in.
fn gone_again(failure: &std::io::Error) -> bool {
    matches!(failure.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted)
}

/// Finds out who it is, and serves it if there is room.
fn admit(daemon: &Rc<Daemon>, stream: UnixStream) {
    // Without it, urgent data (MSG_OOB) and the files that come with it are not seen by who looks
    // ahead, and closed here by the next read or the end.
    let policy = daemon.broker.policy();
    let inline = setsockopt(&stream, sockopt::OobInline, &true);
    let described = inline.and_then(|()| peer::describe(stream.as_fd(), policy.names_units()));
    let peer = match described {
        Ok(peer) => peer,
        Err(errno) => {
            debug!(reason = %Refused::Failed { call: "getsockopt", errno }, "not let in");
            return daemon.accounts.strangers_socket_closer().close(stream, None);
        }
    };
    let uid = peer.uid;
    let account = daemon.accounts.account(&policy, &peer);
    let socket_closer = Rc::clone(&account.socket_closer);
    if let Err((stream, reason)) = try_admit(daemon, stream, peer, account) {
        debug!(uid, %reason, "not let in");
        socket_closer.close(stream, None);
    }
}

fn try_admit(
    daemon: &Rc<Daemon>,
    stream: UnixStream,
    peer: Peer,
    account: Rc<Account>,
) -> Result<(), (OwnedFd, Box<Refused>)> {
    let charge = daemon.check_open_files().and_then(|()| daemon.accounts.charge(account));
    let charge = match charge {
        Ok(charge) => charge,
        Err(over) => {
            Answer::error(&over).send_what_fits(stream.as_fd());
            return Err((stream.into(), Box::new(Refused::Over(over))));
        }
    };
    set_up(stream.as_fd(), &charge.account);
    if let Err(error) = stream.set_nonblocking(true) {
        return Err((stream.into(), Box::new(Refused::Poll(error))));
    }
    let socket = try_watch(stream.into(), Interest::READABLE)
        .map_err(|(stream, error)| (stream, Box::new(Refused::Poll(error))))?;
    let connection = Connection::new(Rc::clone(daemon), Caller { peer }, socket, charge);
    spawn_local(connection.serve());
    Ok(())
}

/// Lets a client's socket take what its account may send, and hold what that may leave unread.
pub(super) fn set_up(socket: BorrowedFd<'_>, account: &Account) {
    // Where the kernel can't refuse fds, those that come end the connection.
    let _ = pass_fds(socket, account.terms().sends_fds);
    // The kernel doubles what it is told. It can't fail: the least is taken for too little.
    let _ = setsockopt(&socket, sockopt::SndBuf, &(account.most_unread / 2));
}

/// Why somebody was not let in.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Over(Error),
    #[error("{call}: {} ({errno:?})", errno.desc())]
    Failed { call: &'static str, errno: Errno },
    #[error("{0}")]
    Poll(std::io::Error),
}
