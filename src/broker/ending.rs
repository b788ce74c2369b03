//! What keepers tell of their leases, and the end of them.

use super::books::{Books, Entry};
use super::keeper::KeeperHandle;
use super::{Broker, Caller, devices, event, no_such_lease, now};
use crate::ledger::{GroupState, Lease, LeaseId, NotFree, Request};
use crate::process::keeper::{Check, End, LeaseState, Phase, Stage};
use crate::protocol::{Bdf, Error, EventKind, Release, Released};
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout_at};

/// How much longer than a take-back is patient its keeper may be silent.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

impl Broker {
    /// Ends a lease and reclaims its devices, for whoever made the connection `client`.
    ///
    /// # Errors
    /// No such lease, not its key, or one who may not have its devices. What can't be reclaimed is no
    /// error: `proved` is false then.
    pub async fn release(
        self: &Rc<Self>,
        caller: &Caller,
        client: Rc<impl AsFd + 'static>,
        request: &Release,
    ) -> Result<Released, Error> {
        let until = Instant::now() + self.patience + SILENCE;
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        // Its keeper looks for itself, but by then the lease has ended here.
        self.judge_holder(caller, entry.id)?;
        if !self.end(entry.id, EventKind::Released) {
            return Err(no_such_lease(entry.id));
        }
        let id = entry.id;
        let _ = timeout_at(until, self.have_taken_back(&entry, Some(client))).await;
        loop {
            let seen = self.generation.get();
            let is_over = self.books().ledger.groups_of(id).next().is_none();
            if is_over || !self.is_reclaiming(id) || !self.changes(seen, until).await {
                break;
            }
        }
        let books = self.books();
        let proved = books.ledger.groups_of(id).next().is_none()
            && books.ledger.unproved().all(|(_, left)| left.lease != id);
        Ok(Released { proved })
    }

    /// Has its keeper take a lease back that has ended, however long that is at something else; tells
    /// when it has tried once. It is a client that ends it, or a revocation that the keeper knows of.
    pub(super) fn have_taken_back(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        client: Option<Rc<impl AsFd + 'static>>,
    ) -> oneshot::Receiver<()> {
        let (broker, entry) = (Rc::clone(self), Rc::clone(entry));
        let (sender, done) = oneshot::channel();
        spawn_local(async move {
            let files: Vec<_> = client.iter().map(|client| client.as_fd()).collect();
            if let Some(mut turn) = entry.keeper.turn_once_linked().await
                && let Ok(told) = turn.ask(&End { lease: entry.id.to_string() }, &files).await
            {
                broker.learn(&entry.keeper, told.state);
            }
            let _ = sender.send(());
        });
        done
    }

    pub(super) fn is_reclaiming(&self, id: LeaseId) -> bool {
        let books = self.books();
        books.ledger.groups_of(id).any(|(_, g)| matches!(g.state, GroupState::Reclaiming { .. }))
    }

    /// Whether a lease's holder has gone, which its keeper may not have told yet.
    pub(super) async fn has_let_go_of(self: &Rc<Self>, id: LeaseId) -> bool {
        let Some(entry) = self.books().entries.get(&id).cloned() else { return false };
        let until = Instant::now() + self.deadline.min(Duration::from_millis(100));
        let Ok(mut turn) = entry.keeper.turn_until("Check", until).await else { return false };
        let (broker, keeper) = (Rc::clone(self), Rc::clone(&entry.keeper));
        let work = async move {
            let told = turn.ask(&Check { lease: id.to_string() }, &[]).await;
            if let Ok(told) = told {
                broker.learn(&keeper, told.state);
            }
            Ok(())
        };
        let _ = self.in_time(("Check", ""), until, work, |()| async {}).await;
        self.books().ledger.live(id).is_none()
    }

    /// From here on nobody can use the lease. Whether it was live.
    pub(super) fn end(self: &Rc<Self>, id: LeaseId, kind: EventKind) -> bool {
        let mut books = self.books();
        let lease = books.ledger.live(id).cloned();
        let ended = books.ledger.apply(Request::End { lease: id, at: now() }).is_ok();
        drop(books);
        let Some(lease) = lease.filter(|_| ended) else { return false };
        self.tell(&event(kind, &lease, devices(&lease, false)));
        self.has_changed();
        self.expect_news(id);
        true
    }

    /// A keeper that hangs can't say so.
    pub(super) fn expect_news(self: &Rc<Self>, id: LeaseId) {
        let (broker, silence) = (Rc::downgrade(self), self.patience + SILENCE);
        spawn_local(async move {
            sleep(silence).await;
            if let Some(broker) = broker.upgrade() {
                broker.call_silent(id);
            }
        });
    }

    /// What its keeper has not told to be free, and not told to be in use either.
    fn call_silent(self: &Rc<Self>, id: LeaseId) {
        let mut books = self.books();
        let Some(entry) = books.entries.get(&id).cloned() else { return };
        let Some(lease) = books.ledger.lease(id).cloned() else { return };
        let known = quarantined(&books, id);
        let why = silent(&entry);
        let silent = books.ledger.groups_of(id);
        let silent = silent.filter(|(_, g)| matches!(g.state, GroupState::Reclaiming { .. }));
        for group in silent.map(|(id, _)| id).collect::<Vec<_>>() {
            let report = Request::Stuck { group, why: why.clone(), at: now() };
            let _ = books.ledger.apply(report);
        }
        drop(books);
        self.has_changed();
        self.tell_outcome(&lease, &known);
    }

    /// Enters a report on a lease.
    pub(super) fn report(&self, id: LeaseId, report: Request) {
        self.books().report(id, [report]);
        self.has_changed();
    }

    /// Takes down what a keeper tells of a lease.
    pub(super) fn learn(self: &Rc<Self>, keeper: &Rc<KeeperHandle>, state: LeaseState) {
        let Ok(id) = state.record.lease.parse::<LeaseId>() else { return };
        let entry = self.books().entries.get(&id).cloned();
        let Some(entry) = entry else { return self.learn_of_unknown(keeper, id, state) };
        if state.revision <= entry.revision.get() {
            return;
        }
        entry.revision.set(state.revision);
        entry.lifelines.set(state.lifelines);
        *entry.call.borrow_mut() = state.call.clone();
        self.resume_revocation(&entry, &state);
        if matches!(state.phase, Phase::Ending | Phase::Gone) {
            if state.revoking.is_some_and(|revoking| revoking.forced) {
                self.force(id);
            }
            self.end(id, EventKind::Gone);
        }
        let mut books = self.books();
        let Some(lease) = books.ledger.lease(id) else { return };
        let reports = reports(&books, lease, &state);
        if reports.is_empty() {
            // As after each mapping: a lease can have very many, which are not copied for that.
            drop(books);
            return self.has_changed();
        }
        let (before, known) = (lease.clone(), quarantined(&books, id));
        books.report(id, reports);
        drop(books);
        self.has_changed();
        self.tell_outcome(&before, &known);
    }

    /// Says what became of an ended lease's devices; of those in groups that are `known` to be
    /// quarantined only that they are free now.
    fn tell_outcome(&self, before: &Lease, known: &BTreeSet<u32>) {
        let books = self.books();
        let now = quarantined(&books, before.id);
        let (mut freed, mut stuck) = (Vec::new(), Vec::new());
        for handed in &before.devices {
            match books.ledger.group(handed.group).filter(|group| group.lease == before.id) {
                None => freed.push(handed.bdf.to_string()),
                Some(_) if now.contains(&handed.group) && !known.contains(&handed.group) => {
                    stuck.push(handed.bdf.to_string());
                }
                Some(_) => {}
            }
        }
        drop(books);
        for (kind, devices) in [(EventKind::Reclaimed, freed), (EventKind::Quarantined, stuck)] {
            if !devices.is_empty() {
                self.tell(&event(kind, before, devices));
            }
        }
    }
}

/// What a lease's state says that the ledger does not know yet.
fn reports(books: &Books, lease: &Lease, state: &LeaseState) -> Vec<Request> {
    let mut reports = Vec::new();
    let undone = undone(books, lease, state);
    for (id, group) in books.ledger.groups_of(lease.id) {
        if matches!(group.state, GroupState::Acquiring) || undone.1.contains(&id) {
            continue;
        }
        let told = state.groups.iter().find(|told| told.group.id == id);
        if group.attached && told.is_none_or(|told| !told.attached) {
            reports.push(Request::Detached { group: id });
        }
        match told.map(|told| &told.stage) {
            None => reports.push(Request::Freed { group: id }),
            Some(Stage::Quarantined(why)) => {
                reports.push(Request::Stuck { group: id, why: why.clone().into(), at: now() });
            }
            Some(Stage::Unbound(left)) => {
                reports.push(Request::Unbound { group: id, at: now(), left: left.clone() });
            }
            Some(Stage::Held | Stage::Reclaiming) => {}
        }
    }
    let is_ended = matches!(state.phase, Phase::Ending | Phase::Gone);
    let has_more = !lease.mappings.is_empty() || books.ledger.groups_of(lease.id).next().is_none();
    if is_ended && state.mappings == 0 && has_more {
        // Before the groups: with the last of them the lease is forgotten.
        reports.insert(0, Request::NothingMapped { lease: lease.id });
    }
    let (devices, groups) = undone;
    if !devices.is_empty() || !groups.is_empty() {
        reports.push(Request::Retract { lease: lease.id, devices, groups });
    }
    reports
}

/// What a lease that goes on has here, and with its keeper no more: an extension that was under way when
/// this broker adopted it, and was undone since.
fn undone(books: &Books, lease: &Lease, state: &LeaseState) -> (Vec<Bdf>, Vec<u32>) {
    let goes_on = lease.phase == crate::ledger::Phase::Held && state.phase == Phase::Held;
    if !goes_on || lease.adding().next().is_some() {
        return Default::default();
    }
    let has = |bdf| state.record.devices.iter().any(|device| device.bdf == bdf);
    let devices = lease.devices.iter().map(|handed| handed.bdf).filter(|bdf| !has(*bdf));
    let groups = books.ledger.groups_of(lease.id).map(|(id, _)| id);
    let groups = groups.filter(|id| state.groups.iter().all(|told| told.group.id != *id));
    (devices.collect(), groups.collect())
}

/// The lease's groups that are quarantined.
fn quarantined(books: &Books, lease: LeaseId) -> BTreeSet<u32> {
    let groups = books.ledger.groups_of(lease);
    groups
        .filter(|(_, group)| matches!(group.state, GroupState::Quarantined { .. }))
        .map(|(id, _)| id)
        .collect()
}

fn silent(entry: &Entry) -> NotFree {
    let call = entry.call.borrow();
    let Some(under_way) = call.as_ref() else {
        return NotFree::Unanswered { object: format!("lease {}", entry.id) };
    };
    let object = under_way.object.clone();
    match object.parse() {
        Ok(device) if under_way.call == "driver unbind" => NotFree::DriverWaits { device },
        _ => NotFree::Unanswered { object },
    }
}
