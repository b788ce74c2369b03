//! What keepers have that were there before, and what they tell of leases that are not known here.

use super::attend::started;
use super::books::{Books, Entry};
use super::keeper::KeeperHandle;
use super::key::Key;
use super::reload::Owner;
use super::{Broker, error, now};
use crate::ledger::{Adopted, AdoptedGroup, Handed, LeaseId, Member, Request, Space, Trust};
use crate::process::keeper::{LeaseState, Mappings, Phase, Stage};
use crate::protocol::{Error, EventKind};
use std::collections::BTreeSet;
use std::rc::Rc;
use tracing::{info, warn};

impl Broker {
    /// Takes over what is there: every lease that some keeper has, living, hanging or dead, is known
    /// from here on. Once, before anything is acquired.
    ///
    /// # Errors
    /// What a dead keeper wrote can't be relied on, or two claim the same.
    pub async fn adopt(self: &Rc<Self>) -> Result<(), Error> {
        let mut keepers = Vec::new();
        let mut all = self.kept();
        while let Some(kept) = all.next().await? {
            let keeper = Rc::new(KeeperHandle::found(kept.name.clone()));
            match kept.saved() {
                // Only its directory is left.
                Ok(saved) if saved.leases.is_empty() && !kept.is_alive => {
                    let done = self.keepers.salvage(&kept.name).await;
                    done.map_err(|error| started("fork", &kept.name, &error))?;
                    continue;
                }
                Ok(saved) => {
                    for state in saved.leases {
                        let lease = &state.record.lease;
                        info!(
                            lease,
                            vm = state.record.vm,
                            tenant = state.record.tenant,
                            "known since before the restart"
                        );
                        self.adopt_lease(&keeper, state, false)?;
                    }
                }
                // One that lives can be asked.
                Err(why) if kept.is_alive => warn!(why, "asking its keeper instead"),
                Err(why) => return Err(Error::bad(format!("keeper {}", kept.name), why)),
            }
            keepers.push(keeper);
        }
        // Nothing is asked, and nothing taken back, before all of it is known.
        keepers.iter().for_each(|keeper| self.attend(keeper, None));
        Ok(())
    }

    /// A keeper has told of a lease that has no entry here.
    pub(super) fn learn_of_unknown(
        self: &Rc<Self>,
        keeper: &Rc<KeeperHandle>,
        id: LeaseId,
        state: LeaseState,
    ) {
        if state.phase == Phase::Gone || keeper.has_seen(id) {
            return;
        }
        if let Err(error) = self.adopt_lease(keeper, state, true) {
            warn!(%error, "a keeper has what it can't have");
        }
    }

    /// Enters a lease as its keeper has it. One that was never delivered has ended.
    fn adopt_lease(
        self: &Rc<Self>,
        keeper: &Rc<KeeperHandle>,
        state: LeaseState,
        is_told: bool,
    ) -> Result<(), Error> {
        let bad = |reason: String| Error::bad(format!("lease {}", state.record.lease), reason);
        let record = &state.record;
        let id: LeaseId = record.lease.parse().map_err(|error| bad(format!("{error}")))?;
        let key = Key::from_hex(&record.key).ok_or_else(|| bad("its key is none".into()))?;
        let owner = Owner::of(record);
        let tenant = owner.tenant(&self.policy());
        keeper.has_seen(id);
        let adopted = adopted(id, &tenant, &state);
        let held = adopted.held;
        let entry = Rc::new(Entry::new(id, &tenant, key, Rc::clone(keeper)));
        entry.lifelines.set(state.lifelines);
        if is_told {
            entry.revision.set(state.revision);
        }
        *entry.call.borrow_mut() = state.call.clone();
        self.resume_revocation(&entry, &state);
        let mut books = self.books();
        let Books { ledger, entries, shared, owners } = &mut *books;
        ledger.apply(Request::Adopt(adopted)).map_err(|refusal| bad(error::claimed(refusal)))?;
        owners.insert(id, owner);
        if let Some(container) = &record.container {
            shared.insert(container.name.clone(), Rc::downgrade(keeper));
        }
        // Of one that has only left nodes open, no more than that is known.
        if ledger.lease(id).is_some() {
            entries.insert(id, entry);
        }
        drop(books);
        if !held {
            self.expect_news(id);
        }
        Ok(())
    }

    pub(super) fn leases_of(&self, keeper: &KeeperHandle) -> Vec<LeaseId> {
        let books = self.books();
        keeper.seen().into_iter().filter(|id| books.entries.contains_key(id)).collect()
    }

    /// The process of a keeper is no more: its leases have ended with it.
    pub(super) fn end_with_keeper(self: &Rc<Self>, keeper: &KeeperHandle) {
        for id in self.leases_of(keeper) {
            if let Some(entry) = self.books().entries.get(&id) {
                // Who takes it back begins with what was last written down.
                entry.revision.set(0);
            }
            if self.end(id, EventKind::Gone) {
                warn!(lease = %id, keeper = keeper.name, "a lease has ended with its keeper");
            }
        }
    }

    /// A keeper has nothing of these leases any more: what they had is free.
    pub(super) fn free_with_keeper(self: &Rc<Self>, leases: Vec<LeaseId>) {
        for id in leases {
            self.end(id, EventKind::Gone);
            let mut books = self.books();
            let groups: Vec<u32> = books.ledger.groups_of(id).map(|(id, _)| id).collect();
            let free = |group| [Request::Detached { group }, Request::Freed { group }];
            let nothing = Request::NothingMapped { lease: id };
            books.report(id, std::iter::once(nothing).chain(groups.into_iter().flat_map(free)));
            drop(books);
            self.has_changed();
        }
    }

    /// What a keeper has mapped for a lease that is not known here yet, or has not been able to undo.
    pub(super) async fn learn_mappings(
        self: &Rc<Self>,
        keeper: &Rc<KeeperHandle>,
        state: &LeaseState,
    ) {
        let Ok(id) = state.record.lease.parse::<LeaseId>() else { return };
        let count = self.books().ledger.lease(id).map_or(0, |lease| lease.mappings.len() as u64);
        let is_ending = state.phase == Phase::Ending;
        // While it is held, calls that are under way are known here first.
        if state.mappings == 0 || state.mappings == count || (count > state.mappings && !is_ending)
        {
            return;
        }
        let lease = self.books().ledger.lease(id).cloned();
        let known = lease.map(|lease| lease.mappings).unwrap_or_default();
        let Some(mut turn) = keeper.turn().await else { return };
        let (mut all, mut from) = (Vec::new(), 0);
        while let Ok(page) = turn.ask(&Mappings { lease: id.to_string(), from }, &[]).await
            && let Some((last, _)) = page.mappings.last().copied()
        {
            all.extend(page.mappings);
            let Some(next) = last.checked_add(1) else { break };
            from = next;
        }
        let left: BTreeSet<u64> = all.iter().map(|(iova, _)| *iova).collect();
        let gone = known.into_keys().filter(|iova| is_ending && !left.contains(iova));
        for iova in gone {
            self.report(id, Request::UnmapDone { lease: id, iova, gone: true });
        }
        self.report(id, Request::Mapped { lease: id, mappings: all });
    }
}

/// A lease as the ledger is told of it.
fn adopted(id: LeaseId, tenant: &str, state: &LeaseState) -> Adopted {
    let record = &state.record;
    let space = match (&record.container, record.handout) {
        (Some(shared), _) => {
            let trust = if shared.mutual { Trust::Mutual } else { Trust::Enforced };
            Space::Shared { name: shared.name.clone(), trust }
        }
        (None, crate::protocol::Handout::Group | crate::protocol::Handout::Iommufd) => Space::None,
        (None, _) => Space::Own,
    };
    let group = |told: &crate::process::keeper::GroupState| AdoptedGroup {
        id: told.group.id,
        attached: told.attached,
        members: told.group.members.iter().map(|&(bdf, physfn)| Member { bdf, physfn }).collect(),
        unbound: match &told.stage {
            Stage::Unbound(left) => Some(left.clone()),
            _ => None,
        },
    };
    let device = |device: &crate::process::keeper::LeasedDevice| Handed {
        bdf: device.bdf,
        group: device.group,
        withheld: device.withheld,
    };
    let there = |device: &Handed| state.groups.iter().any(|told| told.group.id == device.group);
    Adopted {
        lease: id,
        tenant: tenant.to_owned(),
        vm: record.vm.clone(),
        uid: record.uid,
        pid: record.pid,
        since: record.since,
        handout: record.handout,
        space,
        noiommu: record.noiommu,
        held: state.phase == Phase::Held,
        at: now(),
        devices: record.devices.iter().map(device).filter(there).collect(),
        groups: state.groups.iter().map(group).collect(),
        is_mapped: state.mappings > 0,
    }
}
