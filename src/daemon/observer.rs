//! What the broker tells the daemon of leases: for the log, and for those who watch.

use super::rate_limit::RateLimit;
use crate::broker::Observer;
use crate::protocol::{Event, EventKind};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::broadcast;
use tracing::{debug, info, warn};

/// How many events a watcher may lag behind before it is dropped.
const QUEUE: usize = 256;

/// Takes events to the log and to those who watch.
#[derive(Debug)]
pub(super) struct DaemonObserver {
    pub(super) events: broadcast::Sender<Arc<Event>>,
    /// By tenant, so that nobody's leases push another's out of the log.
    lines: RefCell<HashMap<String, RateLimit>>,
}

/// How many lines about a tenant's leases get into the log.
const LINES: u32 = 400;

impl DaemonObserver {
    pub(super) fn new() -> Self {
        Self { events: broadcast::Sender::new(QUEUE), lines: RefCell::default() }
    }

    /// Whether a line about a tenant's leases may be logged.
    pub(super) fn may_log(&self, tenant: &str) -> bool {
        let mut lines = self.lines.borrow_mut();
        let limit = lines.entry(tenant.to_owned()).or_insert_with(|| RateLimit::new(LINES));
        let passed = limit.pass(Instant::now());
        drop(lines);
        if let Some(held_back @ 1..) = passed {
            warn!(tenant, held_back, "too many leases for the log: lines are missing");
        }
        passed.is_some()
    }
}
impl Observer for DaemonObserver {
    fn event(&self, event: &Event) {
        if self.may_log(&event.tenant) {
            log(event);
        }
        // An error says that nobody watches.
        let _ = self.events.send(Arc::new(event.clone()));
    }
}

fn log(event: &Event) {
    let Event { event: kind, lease, vm, tenant, devices, .. } = event;
    let devices = devices.join(" ");
    match kind {
        EventKind::Acquired => info!(lease, vm, tenant, devices, "lease begins"),
        EventKind::Extended => info!(lease, vm, tenant, devices, "lease grows"),
        EventKind::Released => info!(lease, vm, tenant, devices, "lease ends: released"),
        EventKind::Gone => info!(lease, vm, tenant, devices, "lease ends: holder gone, or revoked"),
        EventKind::Reclaimed => debug!(lease, vm, tenant, devices, "devices are free again"),
        EventKind::Pause => info!(lease, vm, tenant, devices, "lease is being revoked"),
        EventKind::Force => {
            warn!(lease, vm, tenant, devices, "lease is taken: not given back in time")
        }
        EventKind::Quarantined => {
            warn!(lease, vm, tenant, devices, "devices are not known to be free: still in use");
        }
    }
}
