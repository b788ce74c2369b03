//! The broker's calls as a connection makes them.

use super::connection::{Connection, Lost};
use super::incoming::Sent;
use super::outgoing::{Answer, has_room};
use crate::broker::Delivery;
use crate::policy::Peer;
use crate::protocol::{
    Acquire, Confirm, Error, GetFds, MapDma, Memlock, Release, Revoke, SetMemlock, UnmapDma,
};
use std::future::Future;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::time::timeout;
use tracing::info;

impl Connection {
    /// Answers a call whose reply a keeper sends.
    pub(super) async fn acquire(&self, request: Acquire) -> Result<Option<Answer>, Lost> {
        has_room(self.socket.as_fd(), self.daemon.deadlines.write).await?;
        let client = Rc::clone(&self.socket);
        let broker = &self.daemon.broker;
        self.delivered(self.in_place(broker.acquire(&self.caller, client, &request)).await)
    }

    /// The same.
    pub(super) async fn get_fds(&self, request: GetFds) -> Result<Option<Answer>, Lost> {
        has_room(self.socket.as_fd(), self.daemon.deadlines.write).await?;
        let client = self.socket.as_fd();
        let broker = &self.daemon.broker;
        self.delivered(self.in_place(broker.get_fds(&self.caller, client, &request)).await)
    }

    /// What is left to be sent: nothing where a keeper has sent all of it.
    fn delivered(&self, result: Result<Delivery, Error>) -> Result<Option<Answer>, Lost> {
        match result {
            Ok(Delivery::Whole) => Ok(None),
            Ok(Delivery::Part) => Err(Lost::HalfReply),
            Err(error) => Ok(Some(self.refuse(&error))),
        }
    }

    pub(super) async fn release(&self, request: Release) -> Result<Answer, Error> {
        let (broker, client) = (&self.daemon.broker, Rc::clone(&self.socket));
        self.in_place(broker.release(&self.caller, client, &request)).await.map(Answer::reply)
    }

    pub(super) async fn map_dma(&self, request: MapDma, fds: Sent) -> Result<Answer, Error> {
        let files = fds.queue_with(request.memory)?;
        let (broker, client) = (&self.daemon.broker, Rc::clone(&self.socket));
        let call = broker.map_dma(&self.caller, client, &request, files);
        self.in_place(call).await.map(Answer::reply)
    }

    pub(super) async fn unmap_dma(&self, request: UnmapDma) -> Result<Answer, Error> {
        let (broker, client) = (&self.daemon.broker, Rc::clone(&self.socket));
        self.in_place(broker.unmap_dma(&self.caller, client, &request)).await.map(Answer::reply)
    }

    /// The process at the other end may have its limit raised.
    pub(super) async fn set_memlock(&self, request: SetMemlock) -> Result<Answer, Error> {
        let (broker, client) = (&self.daemon.broker, Rc::clone(&self.socket));
        let bytes = self.in_place(broker.set_memlock(&self.caller, client, &request)).await?;
        if let Some(held_back) = self.charge.account.may_log_raise(Instant::now()) {
            let Peer { uid, pid, .. } = self.caller.peer;
            info!(uid, pid, bytes, lease = request.lease, held_back, "memlock limit raised");
        }
        Ok(Answer::reply(Memlock::of(bytes)))
    }

    /// Not in one of its tenant's places: what takes them up may be what is to be ended.
    /// Whoever goes before the lease is over leaves the revocation as it is.
    pub(super) async fn revoke(&self, request: Revoke) -> Result<Result<Answer, Error>, Lost> {
        let broker = &self.daemon.broker;
        Ok(match broker.revoke(&self.caller, &self.socket, &request) {
            Ok(begun) => Ok(Answer::reply(self.while_there(broker.revoked(begun)).await?)),
            Err(error) => Err(error),
        })
    }

    pub(super) async fn confirm(&self, request: Confirm) -> Result<Answer, Error> {
        let (broker, client) = (&self.daemon.broker, self.socket.as_fd());
        broker.confirm(&self.caller, client, &request).await.map(Answer::reply)
    }

    /// Makes a call in one of its tenant's places; waits for one.
    async fn in_place<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let terms = self.charge.account.terms();
        let place = Arc::clone(&terms.requests).acquire_owned();
        let Ok(Ok(_place)) = timeout(self.daemon.deadlines.call, place).await else {
            let most = terms.most_requests as u64;
            return Err(Error::OverLimit {
                limit: "requests in flight of this tenant".into(),
                most,
                asked: most + 1,
            });
        };
        call.await
    }
}
