//! The socket of a connection, which this process never closes with something in it.

use super::account::ConnectionCharge;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use tokio::io::unix::AsyncFd;

/// A connected client's socket. Wherever it is dropped, its owner's
/// [`SocketCloser`](super::receiver::SocketCloser) gets it, with its charge.
#[derive(Debug)]
pub(super) struct PeerSocket {
    socket: Rc<AsyncFd<OwnedFd>>,
    charge: Rc<ConnectionCharge>,
}

impl PeerSocket {
    pub(super) fn new(socket: AsyncFd<OwnedFd>, charge: Rc<ConnectionCharge>) -> Self {
        Self { socket: Rc::new(socket), charge }
    }

    /// Has it charged to another account.
    pub(super) fn recharge(&mut self, charge: Rc<ConnectionCharge>) {
        self.charge = charge;
    }
}

impl Deref for PeerSocket {
    type Target = AsyncFd<OwnedFd>;

    fn deref(&self) -> &Self::Target {
        &self.socket
    }
}

impl Drop for PeerSocket {
    fn drop(&mut self) {
        let (socket, charge) = (Rc::clone(&self.socket), Rc::clone(&self.charge));
        self.charge.account.socket_closer.close(socket, Some(charge));
    }
}
