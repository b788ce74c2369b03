//! What administrators ask for.

use super::{Client, Result};
use crate::protocol::{self, BrokerStatus};

impl Client {
    /// What the broker is at, and each of its keepers, as far as one may see it.
    ///
    /// # Errors
    /// See [`Error`](super::Error).
    pub fn status(&mut self) -> Result<BrokerStatus> {
        let mut whole: Option<BrokerStatus> = None;
        let mut replies = self.call_more(&protocol::Status {})?;
        loop {
            match (replies.next(), &mut whole) {
                (Some(some), None) => whole = Some(some?),
                (Some(some), Some(whole)) => whole.keepers.extend(some?.keepers),
                (None, Some(_)) | (None, None) => break,
            }
        }
        drop(replies);
        match whole {
            Some(whole) => Ok(whole),
            // The iterator ends with a last reply, never without one.
            None => Ok(self.call(&protocol::Status {}, &[])?.0),
        }
    }
}
