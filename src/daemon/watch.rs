//! `Watch`: events, as they happen, to one connection.

use super::connection::{Connection, Lost};
use super::outgoing::Answer;
use crate::protocol::Watch;
use tokio::sync::broadcast::error::RecvError;

impl Connection {
    /// Sends events until the peer closes, or lags behind. What else it sends waits for the end of
    /// this call, which never comes.
    pub(super) async fn watch(&mut self, watch: Watch) -> Result<(), Lost> {
        let mut events = self.daemon.observer.events.subscribe();
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                gone = self.hang_up() => return gone,
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvError::Lagged(_)) => return Err(Lost::Lagging),
                Err(RecvError::Closed) => return Ok(()),
            };
            let wanted = watch.lease.as_ref().is_none_or(|lease| *lease == event.lease);
            if wanted && self.daemon.broker.may_see(&self.caller, &event.tenant) {
                self.send(Answer::one_of_many(&*event)).await?;
            }
        }
    }

    /// Waits until the peer has closed; reads nothing.
    async fn hang_up(&self) -> Result<(), Lost> {
        loop {
            let mut readable = self.socket.readable().await.map_err(Lost::Poll)?;
            if readable.ready().is_read_closed() {
                return Ok(());
            }
            readable.clear_ready();
        }
    }
}
