//! Broker calls that may block in the kernel: each on a thread of its own, with a deadline.
//!
//! A thread that is stuck in the kernel can't be freed, so nobody waits for it beyond the deadline.
//! It keeps its tenant's place among the requests in flight, so that one tenant can't use up the
//! threads of all.

use super::account::Account;
use crate::broker::{Broker, error};
use crate::protocol::Error;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

/// The most threads, stuck ones included.
pub(super) const MOST_THREADS: usize = 256;

/// A call that a worker is to make.
pub(super) struct Job<Work, Late> {
    /// What is called, for messages.
    pub(super) call: &'static str,
    /// On what.
    pub(super) object: String,
    /// Makes the call; can ask whether somebody still waits for it.
    pub(super) work: Work,
    /// Undoes what was done when nobody waits for it any more.
    pub(super) late: Late,
}

impl<Work, Late> Job<Work, Late> {
    /// Does it on a worker.
    ///
    /// # Errors
    /// What the call says; [`Error::OverLimit`] when the tenant's other requests leave no room
    /// within the deadline; [`Error::Kernel`] with ETIMEDOUT.
    pub(super) async fn run<T: Send + 'static>(
        self,
        broker: &Arc<Broker>,
        account: &Account,
        deadline: Duration,
    ) -> Result<T, Error>
    where
        Work: FnOnce(&Broker, &dyn Fn() -> bool) -> Result<T, Error> + Send + 'static,
        Late: FnOnce(&Broker, T) + Send + 'static,
    {
        let Self { call, object, work, late } = self;
        let until = Instant::now() + deadline;
        let place = timeout_at(until, Arc::clone(&account.requests).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            let most = account.most_requests as u64;
            return Err(Error::OverLimit {
                limit: "requests in flight of this tenant".into(),
                most,
                asked: most + 1,
            });
        };
        let (sender, mut receiver) = oneshot::channel();
        let broker = Arc::clone(broker);
        let task = spawn_blocking(move || {
            let _place = place;
            let result = work(&broker, &|| !sender.is_closed());
            let undelivered = sender.send(result).err();
            if let Some(Ok(done)) = undelivered {
                late(&broker, done);
            }
        });
        let mut result = timeout_at(until, &mut receiver).await;
        if result.is_err() {
            // It may have come just now; from here on it can't.
            receiver.close();
            result = receiver.try_recv().map_or(result, |done| Ok(Ok(done)));
        }
        match result {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(error::bug(call, object)),
            Err(_) => {
                // One that has not begun does not begin any more.
                task.abort();
                Err(error::unanswered(call, object, deadline))
            }
        }
    }
}
