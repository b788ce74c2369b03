//! What the broker tells the daemon of leases: for the log, and for those who watch.

use crate::broker::Observer;
use crate::log::LEASES;
use crate::protocol::{Event, EventKind};
use std::sync::Arc;
use tokio::sync::broadcast;
use tracing::{debug, info, warn};

/// How many events a watcher may lag behind before it is dropped. A thousand leases that end at the same
/// moment have three events each, and a watcher that reads is not to be dropped for that.
const QUEUE: usize = 4096;

/// Takes events to the log and to those who watch.
#[derive(Debug)]
pub(super) struct DaemonObserver {
    pub(super) events: broadcast::Sender<Arc<Event>>,
}

impl DaemonObserver {
    pub(super) fn new() -> Self {
        Self { events: broadcast::Sender::new(QUEUE) }
    }
}

impl Observer for DaemonObserver {
    fn event(&self, event: &Event) {
        log(event);
        // An error says that nobody watches.
        let _ = self.events.send(Arc::new(event.clone()));
    }
}

fn log(event: &Event) {
    let Event { event: kind, lease, vm, tenant, devices, .. } = event;
    let devices = devices.join(" ");
    match kind {
        EventKind::Acquired => info!(target: LEASES, lease, vm, tenant, devices, "lease begins"),
        EventKind::Extended => info!(target: LEASES, lease, vm, tenant, devices, "lease grows"),
        EventKind::Released => {
            info!(target: LEASES, lease, vm, tenant, devices, "lease ends: released")
        }
        EventKind::Gone => {
            info!(target: LEASES, lease, vm, tenant, devices, "lease ends: holder gone, or revoked")
        }
        EventKind::Reclaimed => debug!(lease, vm, tenant, devices, "devices are free again"),
        EventKind::Pause => {
            info!(target: LEASES, lease, vm, tenant, devices, "lease is being revoked")
        }
        EventKind::Force => {
            warn!(target: LEASES, lease, vm, tenant, devices, "lease is taken: not given back in time")
        }
        EventKind::Quarantined => {
            warn!(lease, vm, tenant, devices, "devices are not known to be free: still in use");
        }
    }
}
