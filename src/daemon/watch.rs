//! `Watch`: events, as they happen, to one connection.

use super::connection::{Connection, Got, Lost};
use super::outgoing::Answer;
use crate::protocol::{Error, Watch};
use tokio::sync::broadcast::error::RecvError;

impl Connection {
    /// Sends events until the peer closes, lags behind, or sends anything. A lease that is not there
    /// would be waited for without end: it is refused.
    pub(super) async fn watch(&mut self, watch: Watch) -> Result<(), Lost> {
        let mut events = self.daemon.observer.events.subscribe();
        // Once events are being taken down, so that none of it is missed.
        if let Some(lease) = watch.lease.as_ref()
            && !self.daemon.broker.shows(&self.caller, lease)
        {
            let lease = lease.chars().take(64).collect();
            let refusal = self.refuse(&Error::NoSuchLease { lease });
            return self.send(refusal).await;
        }
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
            self.renew()?;
            let wanted = watch.lease.as_ref().is_none_or(|lease| *lease == event.lease);
            if wanted && self.daemon.broker.may_see(&self.caller, &event.tenant) {
                self.send(Answer::one_of_many(&*event)).await?;
            }
        }
    }

    /// Waits until the peer has closed. It has nothing to say any more, and nothing that it sends
    /// may stay unread: its own end, sent over itself, would keep the connection open for ever, and
    /// with it what waits unread at that end.
    async fn hang_up(&mut self) -> Result<(), Lost> {
        loop {
            if self.incoming.is_partial() {
                return Err(Lost::SpokeWhileWatching);
            }
            match self.receive().await? {
                Got::End => return Ok(()),
                Got::Files => return Err(Lost::SpokeWhileWatching),
                Got::Bytes => {}
            }
        }
    }
}
