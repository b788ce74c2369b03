//! Sockets that have in their queue what a peer sent: this process never closes one with something in it.

use super::account::ConnectionCharge;
use std::cell::RefCell;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use tokio::io::unix::AsyncFd;

/// A connected client's socket, or one with files that it sent. Wherever it is dropped, its owner's
/// [`SocketCloser`](super::receiver::SocketCloser) gets it, with its charge.
#[derive(Debug)]
pub(super) struct PeerSocket<S: AsFd + 'static = AsyncFd<OwnedFd>> {
    socket: Rc<S>,
    charge: RefCell<Rc<ConnectionCharge>>,
}

impl<S: AsFd + 'static> PeerSocket<S> {
    pub(super) fn new(socket: S, charge: Rc<ConnectionCharge>) -> Self {
        Self { socket: Rc::new(socket), charge: RefCell::new(charge) }
    }

    /// Has it charged to another account.
    pub(super) fn recharge(&self, charge: Rc<ConnectionCharge>) {
        self.charge.replace(charge);
    }
}

impl<S: AsFd + 'static> Deref for PeerSocket<S> {
    type Target = S;

    fn deref(&self) -> &Self::Target {
        &self.socket
    }
}

impl<S: AsFd + 'static> AsFd for PeerSocket<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S: AsFd + 'static> Drop for PeerSocket<S> {
    fn drop(&mut self) {
        let (socket, charge) = (Rc::clone(&self.socket), Rc::clone(&self.charge.borrow()));
        Rc::clone(&charge.account.socket_closer).close(socket, Some(charge));
    }
}
