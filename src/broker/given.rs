//! Who was given which devices by their own nodes, beyond the end of this process: whoever has such a
//! node open keeps it when the broker ends, and the kernel does not show it to the next one.

use super::books::Entry;
use super::{Broker, no_such_lease, now};
use crate::kernel;
use crate::ledger::{LeaseId, Member, Request, Restored};
use crate::protocol::{Bdf, Error};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};

/// A device that was handed out by its own node, which may be open somewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Which device.
    pub device: Bdf,
    /// Which of its registrations with VFIO that node is of.
    pub registration: u64,
    /// Its group.
    pub group: u32,
    /// The group's devices on VFIO drivers, each with the PF it is a VF of.
    pub members: Vec<(Bdf, Option<Bdf>)>,
    /// The lease it was handed out with.
    pub lease: String,
    /// Whose that was.
    pub tenant: String,
    /// Whom the policy meant by that name; see
    /// [`Policy::principals`](crate::policy::Policy::principals).
    pub people: String,
    /// What its holder called the VM.
    pub vm: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
    /// When that was, in seconds since 1970.
    pub since: u64,
}

/// Keeps what was given until there is a next broker.
pub trait Record: Send + Sync {
    /// Puts this in place of what is kept: all of it, or on an error nothing.
    ///
    /// # Errors
    /// Which call failed on what.
    fn write(&self, given: &[Given]) -> kernel::Result<()>;
}

/// What is in the record, and the record itself where there is one. Its lock is taken last of all, and
/// held while the record is written.
#[derive(Default)]
pub(super) struct AllGiven {
    record: Option<Arc<dyn Record>>,
    all: BTreeMap<Bdf, Given>,
}

/// What was in the record of some devices before.
pub(super) type Before = Vec<(Bdf, Option<Given>)>;

impl AllGiven {
    /// Puts `all` into the record; where that fails nothing has changed.
    fn set(&mut self, all: BTreeMap<Bdf, Given>) -> kernel::Result<()> {
        let Some(record) = self.record.as_ref().filter(|_| all != self.all) else { return Ok(()) };
        record.write(&all.values().cloned().collect::<Vec<_>>())?;
        self.all = all;
        Ok(())
    }
}

impl Broker {
    /// Has this record kept from here on, and takes over what the last broker left in it: to this one
    /// its leases have ended and are to be taken back. Once, before anything is acquired.
    ///
    /// # Errors
    /// The record contradicts itself, or there are no random numbers.
    pub fn set_record(&self, record: Arc<dyn Record>, given: Vec<Given>) -> Result<(), Error> {
        self.restore(&given)?;
        let mut here = self.given();
        here.record = Some(record);
        here.all = given.into_iter().map(|given| (given.device, given)).collect();
        Ok(())
    }

    fn restore(&self, given: &[Given]) -> Result<(), Error> {
        // A group is one lease's; of what several leases left of it the last one is asked for.
        let mut groups = BTreeMap::<u32, Vec<&Given>>::new();
        for given in given {
            groups.entry(given.group).or_default().push(given);
        }
        let mut leases = BTreeMap::<&str, Vec<(u32, Vec<&Given>)>>::new();
        for (id, here) in groups {
            let last = here.iter().max_by_key(|given| given.since);
            let lease = last.map_or("", |last| last.lease.as_str());
            leases.entry(lease).or_default().push((id, here));
        }
        for (lease, groups) in leases {
            self.restore_lease(lease, &groups)?;
        }
        Ok(())
    }

    fn restore_lease(&self, lease: &str, groups: &[(u32, Vec<&Given>)]) -> Result<(), Error> {
        let bad = |reason: String| Error::bad(format!("lease {lease}"), reason);
        let all = || groups.iter().flat_map(|(_, here)| here);
        let Some(last) = all().find(|given| given.lease == lease) else { return Ok(()) };
        let id: LeaseId = lease.parse().map_err(|error| bad(format!("{error}")))?;
        let tenant = match self.policy.principals(&last.tenant) {
            Some(people) if all().all(|each| each.people == people) => last.tenant.clone(),
            // Nobody's: no tenant can have such a name.
            _ => format!("{} (as it was before the restart)", last.tenant),
        };
        let entry = Entry::new(id, &tenant, None, self.contested())?;
        entry.files().registrations = all().map(|each| (each.device, each.registration)).collect();
        let member = |&(bdf, physfn): &(Bdf, Option<Bdf>)| Member { bdf, physfn };
        let restored = groups.iter().map(|(id, here)| {
            let members = here.iter().max_by_key(|given| given.since);
            let members =
                members.map_or(Vec::new(), |last| last.members.iter().map(member).collect());
            (*id, members, here.iter().map(|given| given.device).collect())
        });
        let restored = Restored {
            lease: id,
            tenant,
            vm: last.vm.clone(),
            uid: last.uid,
            pid: last.pid,
            since: last.since,
            at: now(),
            groups: restored.collect(),
        };
        let mut books = self.books();
        books.ledger.apply(Request::Restore(restored)).map_err(|why| bad(why.to_string()))?;
        books.entries.insert(id, Arc::new(entry));
        Ok(())
    }

    /// Puts into the record what is about to be handed out. Returns what was there before, for
    /// [`forget`](Self::forget).
    ///
    /// # Errors
    /// It can't be written, and must not be handed out.
    pub(super) fn remember(
        &self,
        lease: LeaseId,
        cdevs: &[(Bdf, u32, u64)],
    ) -> Result<Before, Error> {
        if cdevs.is_empty() {
            return Ok(Before::new());
        }
        let fresh = self.described(lease, cdevs).ok_or_else(|| no_such_lease(lease))?;
        let mut given = self.given();
        let mut all = given.all.clone();
        let before = fresh.into_iter().map(|new| (new.device, all.insert(new.device, new)));
        let before = before.collect();
        given.set(all)?;
        Ok(before)
    }

    fn described(&self, lease: LeaseId, cdevs: &[(Bdf, u32, u64)]) -> Option<Vec<Given>> {
        let books = self.books();
        let lease = books.ledger.lease(lease)?;
        let people = self.policy.principals(&lease.tenant).unwrap_or_default();
        let describe = |&(device, group, registration): &(Bdf, u32, u64)| {
            let members = books.ledger.group(group)?.members.iter();
            Some(Given {
                device,
                registration,
                group,
                members: members.map(|member| (member.bdf, member.physfn)).collect(),
                lease: lease.id.to_string(),
                tenant: lease.tenant.clone(),
                people: people.clone(),
                vm: lease.vm.clone(),
                uid: lease.uid,
                pid: lease.pid,
                since: lease.since,
            })
        };
        cdevs.iter().map(describe).collect()
    }

    /// Takes back what was remembered and then not handed out.
    pub(super) fn forget(&self, before: Before) {
        if before.is_empty() {
            return;
        }
        let mut given = self.given();
        let mut all = given.all.clone();
        for (device, was) in before {
            match was {
                Some(was) => drop(all.insert(device, was)),
                None => drop(all.remove(&device)),
            }
        }
        // Too much in the record keeps a device from others until it is proved free, no more.
        let _ = given.set(all);
    }

    /// Forgets the nodes that are closed everywhere, as the kernel shows.
    pub(super) fn forget_proved(&self) {
        let known = self.given().all.clone();
        let ended = |given: &&Given| self.has_let_go(given.device, given.registration);
        let ended: Vec<_> = known.values().filter(ended).collect();
        if ended.is_empty() {
            return;
        }
        let mut given = self.given();
        let mut all = given.all.clone();
        all.retain(|device, given| {
            !ended.iter().any(|e| e.device == *device && e.registration == given.registration)
        });
        // As in `forget`; the next one that is written says it too.
        let _ = given.set(all);
    }

    fn given(&self) -> MutexGuard<'_, AllGiven> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
