//! The end of a lease: Release, hang-up, and taking back what it had until the kernel itself shows
//! that nobody has anything of it.

use super::books::{Books, Entry, Files};
use super::lifeline::has_hung_up;
use super::{Broker, Caller, Ended, LifelineId, devices, error, event, no_such_lease, now, space};
use crate::kernel::{self, Group, Node, Unmap, UnmapFlags};
use crate::ledger::{Effect, Lease, LeaseId, NotFree, Request};
use crate::protocol::{Error, EventKind, Release, Released};
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::slice::Iter;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

impl Broker {
    /// Ends a lease and reclaims its devices.
    ///
    /// # Errors
    /// No such lease, or not its key. What can't be reclaimed is no error: `proved` is false then.
    pub fn release(&self, caller: &Caller, request: &Release) -> Result<Released, Error> {
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let ended = self.end(self.books(), entry.id, EventKind::Released);
        if !ended {
            return Err(no_such_lease(entry.id));
        }
        self.take_back(&entry, entry.files(), &self.patience);
        let books = self.books();
        let proved = books.ledger.groups_of(entry.id).next().is_none()
            && books.ledger.unproved().all(|(_, left)| left.lease != entry.id);
        Ok(Released { proved })
    }

    /// A lifeline reported EPOLLERR. Never blocks; where it was the lease's last one, the lease has
    /// ended and [`reclaim`](Self::reclaim) is to be called on a worker. Checks for itself that the
    /// pipe has hung up, so calling it once too often does no harm.
    pub fn hung_up(&self, lifeline: LifelineId) -> Option<Ended> {
        let mut books = self.books();
        let found = books.lifelines.get(&lifeline).filter(|l| has_hung_up(&l.write_end));
        let lease = found?.lease;
        let gone = books.lifelines.remove(&lifeline);
        let ended = match books.lifelines.values().any(|other| other.lease == lease) {
            true => {
                drop(books);
                false
            }
            false => self.end(books, lease, EventKind::Gone),
        };
        self.observer.lifeline_closed(lifeline);
        drop(gone);
        ended.then_some(Ended(lease))
    }

    /// Takes back what an ended lease had.
    pub fn reclaim(&self, ended: Ended) {
        let entry = self.books().entries.get(&ended.0).cloned();
        if let Some(entry) = entry {
            self.take_back(&entry, entry.files(), &self.patience);
        }
    }

    /// Whether some group waits for its last holder to let go. Never blocks.
    pub fn has_pending_reclaims(&self) -> bool {
        self.books().ledger.has_ending()
    }

    /// The leases that could not be reclaimed yet, for [`retry`](Self::retry). Never blocks.
    pub fn pending_reclaims(&self) -> Vec<Ended> {
        self.books().ledger.ending().map(Ended).collect()
    }

    /// Tries once more to reclaim one, without waiting for anybody; not where somebody is at it.
    pub fn retry(&self, ended: Ended) {
        let entry = self.books().entries.get(&ended.0).cloned();
        if let Some(entry) = entry
            && let Some(files) = entry.files_now()
        {
            self.take_back(&entry, files, &[]);
        }
    }

    /// Tries once more to reclaim each that could not be reclaimed yet.
    pub fn retry_reclaims(&self) {
        self.pending_reclaims().into_iter().for_each(|ended| self.retry(ended));
    }

    /// From here on nobody can use the lease. Whether it was live.
    fn end(&self, mut books: MutexGuard<'_, Books>, id: LeaseId, kind: EventKind) -> bool {
        let lease = books.ledger.live(id).cloned();
        let ended = books.ledger.apply(Request::End { lease: id, at: now() }).is_ok();
        let Some(lease) = lease.filter(|_| ended) else { return false };
        let lifelines = books.take_lifelines(id);
        drop(books);
        for (id, _) in &lifelines {
            self.observer.lifeline_closed(*id);
        }
        drop(lifelines);
        self.tell(&event(kind, &lease, devices(&lease, false)));
        true
    }

    /// `patience` is for all its groups together.
    fn take_back(&self, entry: &Entry, mut files: MutexGuard<'_, Files>, patience: &[Duration]) {
        let mut patience = patience.iter();
        let (before, known, effects) = {
            let mut books = self.books();
            let before = books.ledger.lease(entry.id).cloned();
            let known = quarantined(&books, entry.id);
            let effects = books.ledger.apply(Request::Reclaim { lease: entry.id });
            // Refused where somebody else has done it meanwhile.
            let (Some(before), Ok(effects)) = (before, effects) else { return };
            (before, known, effects)
        };
        let (mut kept, mut blocked) = (None, None);
        for effect in effects {
            match effect {
                Effect::Unmap { iova, size } => self.unmap_own(entry, iova, size),
                Effect::UnmapAll => blocked = unmap_all(entry).err(),
                Effect::Detach(id) if let Some(error) = &blocked => {
                    kept = Some(id);
                    self.stuck(id, error::not_detached(error.clone()));
                }
                Effect::Detach(id) => match detach(entry, &mut files, id, &mut patience) {
                    Ok(()) => self.report(Request::Detached { group: id }),
                    Err(error) => {
                        kept = Some(id);
                        self.stuck(id, error::not_detached(error));
                    }
                },
                // While our own copy is open, opening it again shows nothing.
                Effect::Prove(id) if kept == Some(id) => {}
                Effect::Prove(id) => match prove(entry, node(id, &before), &mut patience) {
                    Ok(()) => self.report(Request::Freed { group: id }),
                    Err(error) => self.stuck(id, error::not_proved(error)),
                },
                Effect::ProveUnbound(id) => match prove(entry, node(id, &before), &mut patience) {
                    Ok(()) => self.settle(id, &before, &files, &mut patience),
                    Err(error) => self.stuck(id, error::not_proved(error)),
                },
                Effect::OpenSpace
                | Effect::OpenIommufd
                | Effect::CheckGroup(_)
                | Effect::OpenCdev(..)
                | Effect::OpenGroup(_)
                | Effect::Attach(_)
                | Effect::OpenDevice(..)
                | Effect::Map { .. } => {}
            }
        }
        self.close_entry(entry, &before, &known);
    }

    /// A report on what is in the ledger; it can't refuse.
    pub(super) fn report(&self, request: Request) {
        let _ = self.books().ledger.apply(request);
        self.changed.notify_all();
    }

    pub(super) fn stuck(&self, group: u32, why: NotFree) {
        self.report(Request::Stuck { group, why, at: now() });
    }

    fn unmap_own(&self, entry: &Entry, iova: u64, size: u64) {
        let container = entry.space.as_ref().and_then(|space| space.container());
        // Without a container there are no mappings.
        let gone = container
            .is_none_or(|container| container.unmap(&Unmap { flags: 0, iova, size }).is_ok());
        self.report(Request::UnmapDone { lease: entry.id, iova, gone });
    }

    /// Forgets leases of which nothing is left, and says what became of this one's devices; of
    /// those in groups that are `known` to be quarantined only that they are free now.
    fn close_entry(&self, entry: &Entry, before: &Lease, known: &[u32]) {
        let mut guard = self.books();
        let books = &mut *guard;
        // The last group to leave a shared container settles other members' mappings too.
        books.entries.retain(|id, _| books.ledger.lease(*id).is_some());
        let now = quarantined(books, entry.id);
        let (mut freed, mut stuck) = (Vec::new(), Vec::new());
        for handed in &before.devices {
            match books.ledger.group(handed.group).filter(|group| group.lease == entry.id) {
                None => freed.push(handed.bdf.to_string()),
                Some(_) if now.contains(&handed.group) && !known.contains(&handed.group) => {
                    stuck.push(handed.bdf.to_string());
                }
                Some(_) => {}
            }
        }
        drop(guard);
        for (kind, devices) in [(EventKind::Reclaimed, freed), (EventKind::Quarantined, stuck)] {
            if !devices.is_empty() {
                self.tell(&event(kind, before, devices));
            }
        }
    }
}

/// The lease's groups that are quarantined.
fn quarantined(books: &Books, lease: LeaseId) -> Vec<u32> {
    use crate::ledger::GroupState::Quarantined;
    let groups = books.ledger.groups_of(lease);
    groups
        .filter(|(_, group)| matches!(group.state, Quarantined { .. }))
        .map(|(id, _)| id)
        .collect()
}

fn node(id: u32, lease: &Lease) -> Node {
    if lease.noiommu { Node::NoIommuGroup(id) } else { Node::Group(id) }
}

/// Frees memory at once, where a holder that is still there could otherwise keep it pinned. What
/// fails here is undone by the kernel when the last group leaves; ETIMEDOUT where nothing else on this
/// container would be answered either.
fn unmap_all(entry: &Entry) -> kernel::Result<()> {
    let container = entry.space.as_ref().and_then(|space| space.container());
    let all = Unmap { flags: UnmapFlags::ALL, iova: 0, size: 0 };
    match container.map(|container| container.unmap(&all)) {
        Some(Err(error)) if error.errno == Errno::ETIMEDOUT => Err(error),
        _ => Ok(()),
    }
}

/// Takes a group out of its container and closes our copy. EBUSY as long as any process has a
/// device of it open.
fn detach(
    entry: &Entry,
    files: &mut Files,
    id: u32,
    patience: &mut Iter<'_, Duration>,
) -> kernel::Result<()> {
    patiently(patience, || {
        let mut space = entry.space.as_ref().map(|space| space.lock());
        if let Some(group) = files.groups.get(&id) {
            match group.unset_container() {
                Ok(()) => {}
                // Its holder took it out already, or its devices have left VFIO.
                Err(error) if matches!(error.errno, Errno::EINVAL | Errno::ENODEV) => {}
                Err(error) => return Err(error),
            }
        }
        files.groups.remove(&id);
        if let Some(space) = space.as_deref_mut() {
            space::leave(space, id);
        }
        Ok(())
    })
}

/// Opens a group afresh: it works only while nobody has it open.
fn prove(entry: &Entry, node: Node, patience: &mut Iter<'_, Duration>) -> kernel::Result<()> {
    patiently(patience, || match Group::open(Arc::clone(&entry.contested), node.clone()) {
        Ok(group) => {
            // Nobody else has it: its close waits for nobody.
            drop(OwnedFd::from(group));
            Ok(())
        }
        // No device of it is on a VFIO driver any more: whatever somebody had is dead.
        Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => Ok(()),
        Err(error) => Err(error),
    })
}

/// Tries again while the answer is EBUSY.
fn patiently(
    patience: &mut Iter<'_, Duration>,
    mut attempt: impl FnMut() -> kernel::Result<()>,
) -> kernel::Result<()> {
    loop {
        match attempt() {
            Err(error) if error.errno == Errno::EBUSY => match patience.next() {
                Some(wait) => std::thread::sleep(*wait),
                None => return Err(error),
            },
            done => return done,
        }
    }
}
