//! Keepers' processes: starting them, a way to each, listening to them, and a new one for what a dead
//! one has left.

use super::Broker;
use super::keeper::KeeperHandle;
use crate::kernel;
use crate::process::keeper::{Told, Watch};
use crate::process::launcher::Standing;
use crate::process::link::{self, Answer, Asking, Lost};
use crate::protocol::Error;
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::time::Duration;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

/// How often a way to a keeper is looked for where there is none.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(5);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How long a keeper that salvages may take to begin.
const SALVAGE: Duration = Duration::from_secs(2);

impl Broker {
    /// Starts a keeper.
    pub(super) async fn start_keeper(self: &Rc<Self>) -> Result<Rc<KeeperHandle>, Error> {
        let name = super::key::new_lease_id()?.to_string();
        let failed = |error: std::io::Error| started("fork", "a keeper's process", &error);
        let links = self.keepers.start(&name).await.map_err(failed)?;
        let keeper = Rc::new(KeeperHandle::new(name));
        let watch = self.link_up(&keeper, links).map_err(failed)?;
        self.attend(&keeper, Some(watch));
        Ok(keeper)
    }

    /// Has a keeper asked on the first of two links; gives the second.
    fn link_up(&self, keeper: &KeeperHandle, links: [OwnedFd; 2]) -> std::io::Result<Asking> {
        let [ask, watch] = links;
        keeper.set_link(Some(Asking::new(ask)?));
        Asking::new(watch)
    }

    /// Listens to a keeper for as long as anything here needs it; finds a new way to it where there is
    /// none, and has a dead one's things taken back.
    pub(super) fn attend(self: &Rc<Self>, keeper: &Rc<KeeperHandle>, watch: Option<Asking>) {
        let (broker, over) = (Rc::downgrade(self), Rc::clone(&keeper.over));
        let keeper = Rc::downgrade(keeper);
        spawn_local(async move {
            tokio::select! {
                () = over.notified() => {}
                () = listen(broker, keeper, watch) => {}
            }
        });
    }
}

/// Watches a keeper until nothing is to be known of it.
async fn listen(broker: Weak<Broker>, keeper: Weak<KeeperHandle>, mut watch: Option<Asking>) {
    let mut pause = FIRST_PAUSE;
    let mut salvaged: Option<Instant> = None;
    loop {
        if let Some(link) = watch.take() {
            let Some(broken) = keeper.upgrade().map(|keeper| Rc::clone(&keeper.broken)) else {
                return;
            };
            let lost = tokio::select! {
                lost = hear(&broker, &keeper, link) => lost,
                // One link alone can break, where a keeper had no room for the files of a call.
                () = broken.notified() => Lost::Closed,
            };
            debug!(%lost, "a keeper's link has ended");
            pause = FIRST_PAUSE;
        }
        let (Some(broker), Some(keeper)) = (broker.upgrade(), keeper.upgrade()) else { return };
        keeper.set_link(None);
        let (keepers, name) = (&broker.keepers, &keeper.name);
        let turn = broker.finding.lock().await;
        let (standing, links) = keepers.find(name).await.unwrap_or_else(|error| {
            debug!(%error, keeper = name, "it can't be told how a keeper is");
            (Standing::Alive, None)
        });
        drop(turn);
        match standing {
            Standing::Gone => {
                keeper.set_gone();
                return broker.free_with_keeper(broker.leases_of(&keeper));
            }
            Standing::Dead if salvaged.is_none_or(|at| at.elapsed() >= SALVAGE) => {
                salvaged = Some(Instant::now());
                broker.end_with_keeper(&keeper);
                if let Err(error) = keepers.salvage(name).await {
                    warn!(%error, keeper = name, "can't take back what a keeper has left");
                }
            }
            Standing::Dead | Standing::Alive => {}
        }
        match links.map(|links| broker.link_up(&keeper, links)) {
            Some(Ok(link)) => watch = Some(link),
            Some(Err(error)) => debug!(%error, keeper = name, "no way to a keeper"),
            None => {}
        }
        drop((broker, keeper));
        if watch.is_none() {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Takes down what a keeper tells, for as long as it does.
async fn hear(broker: &Weak<Broker>, keeper: &Weak<KeeperHandle>, mut link: Asking) -> Lost {
    if let Err(lost) = link.send(&link::call(&Watch {}, true), &[]).await {
        return lost;
    }
    // Those that it may not have any more.
    let mut doubtful = match (broker.upgrade(), keeper.upgrade()) {
        (Some(broker), Some(keeper)) => broker.leases_of(&keeper),
        _ => return Lost::Closed,
    };
    loop {
        let parameters = match link.next_answer().await {
            Ok(Answer::Reply(parameters, _)) => parameters,
            Ok(Answer::Error(name, _)) => return Lost::Malformed(name),
            Err(lost) => return lost,
        };
        let told: Told = match serde_json::from_str(&parameters) {
            Ok(told) => told,
            Err(error) => return Lost::Malformed(error.to_string()),
        };
        let (Some(broker), Some(keeper)) = (broker.upgrade(), keeper.upgrade()) else {
            return Lost::Closed;
        };
        match told.state {
            Some(state) => {
                doubtful.retain(|id| id.to_string() != state.record.lease);
                broker.learn_mappings(&keeper, &state).await;
                broker.learn(&keeper, state);
            }
            // What it has not told of is no more.
            None => {
                broker.free_with_keeper(std::mem::take(&mut doubtful));
                keeper.set_known();
            }
        }
    }
}

/// A keeper could not be started, or its like.
pub(super) fn started(call: &'static str, object: &str, error: &std::io::Error) -> Error {
    let errno = error.raw_os_error().map_or(Errno::EAGAIN, Errno::from_raw);
    kernel::Error::new(call, object, errno).into()
}
