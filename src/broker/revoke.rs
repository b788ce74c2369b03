//! Revoke and Drain: the end of leases that their holders have not given back.
//!
//! The holder is told, and has some time. Then the lease ends as by a Release: its keeper undoes what is
//! ours, and what somebody still has open keeps the group in quarantine. That a lease is being revoked
//! stands in its keeper's state, so the next broker goes on with it.

use super::books::{Books, Entry};
use super::error::{another_tenants, told, unproved_reason};
use super::{Broker, Caller, devices, event, now, said};
use crate::ledger::{GroupState, Lease, LeaseId};
use crate::policy::Verb;
use crate::process::keeper;
use crate::protocol::{Error, Event, EventKind, Left, Revocation, Revoke, Revoked, Until};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::{spawn_local, yield_now};
use tokio::time::{Instant, sleep_until};

/// A lease that is being revoked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Revoking {
    /// Since when, in seconds since 1970.
    since: u64,
    /// When it is taken by force, in seconds since 1970.
    force: u64,
    until: Instant,
    forced: bool,
}

/// A lease whose revocation has begun, to be waited for.
#[derive(Debug)]
pub struct Begun {
    entry: Rc<Entry>,
    lease: Lease,
}

impl Broker {
    /// Begins to end a lease for whoever made the connection `client`; it goes on whatever becomes of that.
    ///
    /// # Errors
    /// No such lease that the caller may see, or it is not the caller's to end.
    pub fn revoke(
        self: &Rc<Self>,
        caller: &Caller,
        client: &Rc<impl AsFd + 'static>,
        request: &Revoke,
    ) -> Result<Begun, Error> {
        let grace = check_grace(request.grace)?;
        let refused = || Error::NoSuchLease { lease: said(&request.lease) };
        let id: LeaseId = request.lease.parse().map_err(|_| refused())?;
        let tenant = self.books().ledger.lease(id).map(|lease| lease.tenant.clone());
        let tenant = tenant.filter(|tenant| self.may_see(caller, tenant)).ok_or_else(refused)?;
        self.check_may_end(caller, id, &tenant)?;
        self.begin_to_end(id, client, grace).ok_or_else(refused)
    }

    /// The same for all leases that there are, as far as they are the caller's to end.
    ///
    /// # Errors
    /// The caller may end none.
    pub async fn drain(
        self: &Rc<Self>,
        caller: &Caller,
        client: &Rc<impl AsFd + 'static>,
        grace: u64,
    ) -> Result<Vec<Begun>, Error> {
        let grace = check_grace(grace)?;
        if !self.administers(caller) {
            let tenant = self.tenant(caller)?;
            tenant.policy.may(&tenant, Verb::Manage).ok()?;
        }
        let all: Vec<_> = {
            let books = self.books();
            books.ledger.leases().map(|lease| (lease.id, lease.tenant.clone())).collect()
        };
        let mut begun = Vec::new();
        for (id, tenant) in all {
            let is_live = self.books().ledger.live(id).is_some();
            if is_live && self.check_may_end(caller, id, &tenant).is_ok() {
                begun.extend(self.begin_to_end(id, client, grace));
                // Who watches hears of each before there is more than it can be told.
                yield_now().await;
            }
        }
        Ok(begun)
    }

    fn check_may_end(&self, caller: &Caller, id: LeaseId, tenant: &str) -> Result<(), Error> {
        if self.administers(caller) {
            return Ok(());
        }
        let own = self.tenant(caller)?;
        own.policy.may(&own, Verb::Manage).ok()?;
        if own.name == tenant { Ok(()) } else { Err(another_tenants(id)) }
    }

    /// An earlier end stands. One that has ended already is only waited for.
    fn begin_to_end(
        self: &Rc<Self>,
        id: LeaseId,
        client: &Rc<impl AsFd + 'static>,
        grace: Duration,
    ) -> Option<Begun> {
        let (entry, lease, is_live) = {
            let books = self.books();
            let lease = books.ledger.lease(id)?.clone();
            (books.entries.get(&id)?.clone(), lease, books.ledger.live(id).is_some())
        };
        let begun = Begun { entry: Rc::clone(&entry), lease: lease.clone() };
        let before = *entry.revoking.borrow();
        let until = Instant::now() + grace;
        if !is_live || before.is_some_and(|before| before.until <= until) {
            return Some(begun);
        }
        let (since, force) = (before.map_or_else(now, |it| it.since), now() + grace.as_secs());
        entry.revoking.replace(Some(Revoking { since, force, until, forced: false }));
        self.write_down(&entry, Rc::clone(client), until);
        if grace.is_zero() {
            self.force(id);
            return Some(begun);
        }
        let pause = event(EventKind::Pause, &lease, devices(&lease, false));
        self.tell(&Event { until: Some(force), ..pause });
        self.force_at(id, until);
        self.has_changed();
        Some(begun)
    }

    /// Its keeper is to end it then, and to tell the next broker.
    fn write_down(&self, entry: &Rc<Entry>, client: Rc<impl AsFd + 'static>, until: Instant) {
        let entry = Rc::clone(entry);
        spawn_local(async move {
            let Some(mut turn) = entry.keeper.turn_once_linked().await else { return };
            let revoking = *entry.revoking.borrow();
            if let Some(Revoking { since, force, .. }) = revoking {
                let lease = entry.id.to_string();
                let left = until.saturating_duration_since(Instant::now()).as_millis();
                let left = u64::try_from(left).unwrap_or(u64::MAX);
                // One of an older build does not know the call, and can't pass it on.
                let call = keeper::Revoke { lease, since, force, left };
                let _ = turn.ask(&call, &[client.as_fd()]).await;
            }
        });
    }

    fn force_at(self: &Rc<Self>, id: LeaseId, until: Instant) {
        let broker = Rc::downgrade(self);
        spawn_local(async move {
            sleep_until(until).await;
            if let Some(broker) = broker.upgrade() {
                // The same: many can end at the same time.
                let _turn = broker.forcing.lock().await;
                broker.force(id);
                yield_now().await;
            }
        });
    }

    /// Goes on with what the broker before this one has begun.
    pub(super) fn resume_revocation(self: &Rc<Self>, entry: &Entry, state: &keeper::LeaseState) {
        let Some(keeper::Revoking { since, force, forced }) = state.revoking else { return };
        if entry.revoking.borrow().is_some() {
            return;
        }
        // However the clock was set meanwhile: it takes no longer than it was to take.
        let left = force.saturating_sub(now()).min(force.saturating_sub(since));
        let until = Instant::now() + Duration::from_secs(left.min(Revoke::MAX_GRACE));
        let is_held = state.phase == keeper::Phase::Held;
        entry.revoking.replace(Some(Revoking { since, force, until, forced }));
        if is_held {
            self.force_at(entry.id, until);
        }
    }

    /// The time is over: from here on the holder gets nothing more.
    pub(super) fn force(self: &Rc<Self>, id: LeaseId) {
        let (entry, lease) = {
            let books = self.books();
            let lease = books.ledger.live(id).cloned();
            let Some(found) = books.entries.get(&id).cloned().zip(lease) else { return };
            found
        };
        if let Some(revoking) = &mut *entry.revoking.borrow_mut() {
            revoking.forced = true;
        }
        self.tell(&event(EventKind::Force, &lease, devices(&lease, false)));
        if self.end(id, EventKind::Gone) {
            drop(self.have_taken_back(&entry, None::<Rc<OwnedFd>>));
        }
    }

    /// Waits until a lease is over, or in quarantine; says what is left of it.
    pub async fn revoked(self: &Rc<Self>, begun: Begun) -> Revoked {
        let Begun { entry, lease } = begun;
        let revoking = || *entry.revoking.borrow();
        let until = revoking().map_or_else(Instant::now, |it| it.until);
        let until = until + self.patience + 2 * super::ending::SILENCE;
        loop {
            let seen = self.generation.get();
            let is_live = self.books().ledger.live(entry.id).is_some();
            let goes_on = is_live || self.is_reclaiming(entry.id);
            if !goes_on || !self.changes(seen, until).await {
                break;
            }
        }
        self.look_for_left(entry.id).await;
        let left = self.left(&self.books(), entry.id);
        Revoked {
            lease: lease.id.to_string(),
            vm: lease.vm,
            tenant: lease.tenant,
            forced: revoking().is_some_and(|it| it.forced),
            proved: left.is_empty(),
            left,
        }
    }

    /// Whether a lease is being revoked, so that nothing is added to it.
    pub(super) fn check_not_revoked(&self, entry: &Entry) -> Result<(), Error> {
        match *entry.revoking.borrow() {
            None => Ok(()),
            Some(_) => Err(Error::Conflict {
                what: entry.id.to_string(),
                why: "this lease is being revoked: nothing is added to it".into(),
            }),
        }
    }

    /// That a lease is being revoked, as it is shown.
    pub(super) fn shown_revocation(&self, books: &Books, id: LeaseId) -> Option<Revocation> {
        let Revoking { since, force, forced, .. } = (*books.entries.get(&id)?.revoking.borrow())?;
        let left = if forced { self.left(books, id) } else { Vec::new() };
        Some(Revocation { since, force, forced, left })
    }

    /// The devices of an ended lease that are not known to be free, each with what keeps it.
    pub(super) fn left(&self, books: &Books, id: LeaseId) -> Vec<Left> {
        let mut all = Vec::new();
        for (group, state) in books.ledger.groups_of(id) {
            let (reason, until) = match &state.state {
                GroupState::Quarantined { why, .. } => told(why),
                GroupState::Reclaiming { .. } => {
                    ("the kernel is still being asked".into(), Until::Kernel)
                }
                GroupState::Acquiring | GroupState::Held => continue,
            };
            let lease = books.ledger.lease(id);
            let its = lease.iter().flat_map(|lease| &lease.devices).filter(|it| it.group == group);
            all.extend(its.map(|it| Left {
                device: it.bdf.to_string(),
                reason: reason.clone(),
                until,
                open_in: self.open_in(books, group),
            }));
        }
        for (group, unproved) in books.ledger.unproved().filter(|(_, left)| left.lease == id) {
            all.extend(unproved.left.keys().map(|bdf| Left {
                device: bdf.to_string(),
                reason: unproved_reason().into(),
                until: Until::Administrator,
                open_in: self.open_in(books, group),
            }));
        }
        all
    }
}

fn check_grace(grace: u64) -> Result<Duration, Error> {
    if grace > Revoke::MAX_GRACE {
        return Err(Error::bad("grace", "at most a day, 86400 seconds"));
    }
    Ok(Duration::from_secs(grace))
}
