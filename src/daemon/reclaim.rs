//! Ended leases: takes their devices back, and tries again while the kernel says that they are in
//! use.

use super::Daemon;
use super::lifelines::Lifelines;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The most threads, stuck ones included. They are reclaims' own: the workers can all be stuck in calls
/// of a few tenants, and what the others have ended is to be taken back all the same.
pub(super) const MOST_THREADS: usize = 64;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const WANTED_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Reclaims each lease whose lifelines have all hung up. `hang_ups` is
/// [`Lifelines::descriptor`](super::lifelines::Lifelines::descriptor).
///
/// # Errors
/// It can't watch leases any more.
pub(super) async fn on_hang_up(
    daemon: Rc<Daemon>,
    hang_ups: AsyncFd<OwnedFd>,
) -> std::io::Result<Infallible> {
    loop {
        let mut readable = hang_ups.readable().await?;
        let ids = daemon.observer.lifelines.hung_up()?;
        // What hangs up from here on makes it ready anew.
        if ids.len() < Lifelines::MOST {
            readable.clear_ready();
        }
        for ended in ids.into_iter().filter_map(|id| daemon.broker.hung_up(id)) {
            let (broker, pending) = (Arc::clone(&daemon.broker), Arc::clone(&daemon.pending));
            daemon.reclaims.spawn_blocking(move || {
                broker.reclaim(ended);
                pending.notify_one();
            });
        }
    }
}

/// Retries, each time after twice the pause, while anything is pending. Each lease by itself: where the
/// kernel does not answer for one, the others need not wait, and that one is not asked for again.
pub(super) async fn retry(daemon: Rc<Daemon>) -> std::io::Result<Infallible> {
    let mut pause = FIRST_PAUSE;
    loop {
        if !daemon.broker.has_pending_reclaims() {
            daemon.pending.notified().await;
            pause = FIRST_PAUSE;
            continue;
        }
        tokio::select! {
            () = daemon.pending.notified() => {
                // However often somebody's lease ends: no more than one retry in this time.
                tokio::time::sleep(FIRST_PAUSE).await;
                pause = FIRST_PAUSE;
            }
            // No more often than this, however often somebody asks.
            () = daemon.wanted.notified() => tokio::time::sleep(WANTED_PAUSE).await,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
        }
        let mut retries = JoinSet::new();
        for ended in daemon.broker.pending_reclaims() {
            let broker = Arc::clone(&daemon.broker);
            retries.spawn_blocking_on(move || broker.retry(ended), &daemon.reclaims);
        }
        // Those that have begun come to their end without being waited for.
        let _ = timeout(WANTED_PAUSE, retries.join_all()).await;
    }
}
