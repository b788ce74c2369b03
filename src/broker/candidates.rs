//! What "any VF of" and "any of a kind" choose from: the whole machine, read in steps, together with all
//! who read it at the time.

use super::steps::{GROUPS, Step};
use super::{Broker, Caller};
use crate::host::{Device, Group, Survey, group_ids};
use crate::policy::{Policy, Verb};
use crate::protocol::{Acquire, DeviceSpec, Error};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use std::vec;

/// The groups with a device that fits one of a request's "any of".
pub(super) struct Candidates {
    pub(super) groups: BTreeMap<u32, Rc<Group>>,
    /// Those among them that were somebody's when they were looked at.
    taken: BTreeSet<u32>,
    /// Those that are still to be looked at.
    left: vec::IntoIter<u32>,
    since: Instant,
    survey: Rc<Survey>,
    /// Says whether serial numbers are read.
    policy: Arc<Policy>,
}

impl Broker {
    /// Reads what a request chooses from, if it leaves a choice; a further time only what has become free
    /// since. Returns a step for the choice itself, which takes long where there is much to choose from.
    pub(super) async fn read_candidates(
        &self,
        caller: &Caller,
        request: &Acquire,
        candidates: &mut Option<Candidates>,
    ) -> Result<Option<Step>, Error> {
        if !request.devices.iter().any(is_any_of) {
            return Ok(None);
        }
        // A reading that began before the call could lack what was plugged in, or became free, by then.
        let since = Instant::now();
        loop {
            let step = self.step(caller).await;
            let tenant = self.tenant(caller)?;
            tenant.policy.may(&tenant, Verb::Acquire).ok()?;
            let so_far = candidates.take().filter(|it| Arc::ptr_eq(&it.policy, &tenant.policy));
            let so_far = match so_far {
                Some(so_far) => so_far,
                None => self.first_candidates(since)?,
            };
            if !self.read_more(request, candidates.insert(so_far))? {
                return Ok(Some(step));
            }
        }
    }

    fn first_candidates(&self, since: Instant) -> Result<Candidates, Error> {
        let survey = self.shared_survey();
        let mut ids = group_ids(&*self.kernel)?;
        survey.rotate(&mut ids);
        Ok(Candidates {
            groups: BTreeMap::new(),
            taken: BTreeSet::new(),
            left: ids.into_iter(),
            since,
            survey,
            policy: self.policy(),
        })
    }

    /// One step of it; false where there is nothing left.
    fn read_more(&self, request: &Acquire, candidates: &mut Candidates) -> Result<bool, Error> {
        let books = self.books();
        let is_taken = |id: u32| books.ledger.group(id).is_some();
        let Candidates { groups, taken, left, since, survey, policy } = candidates;
        let mut ids: Vec<u32> = left.by_ref().take(GROUPS).collect();
        if ids.is_empty() {
            ids.extend(taken.iter().copied().filter(|id| !is_taken(*id)).take(GROUPS));
        }
        let serials = policy.names_serials().then(|| policy.serials());
        for id in &ids {
            groups.remove(id);
            taken.remove(id);
            let group = survey.group(&*self.kernel, *id, *since, is_taken(*id), serials)?;
            let can_be_chosen = |device: &Device| request.devices.iter().any(|it| fits(it, device));
            let Some(group) = group.filter(|it| it.devices.iter().any(can_be_chosen)) else {
                continue;
            };
            groups.insert(*id, group);
            if is_taken(*id) {
                taken.insert(*id);
            }
        }
        Ok(!ids.is_empty())
    }

    /// What those who read the machine at the moment share.
    pub(super) fn shared_survey(&self) -> Rc<Survey> {
        let mut shared = self.survey.borrow_mut();
        let survey = shared.upgrade().unwrap_or_default();
        *shared = Rc::downgrade(&survey);
        survey
    }
}

fn is_any_of(spec: &DeviceSpec) -> bool {
    matches!(spec, DeviceSpec::VfOf { .. } | DeviceSpec::Kind { .. })
}

/// Whether a device is what a request asks for any of.
pub(super) fn fits(spec: &DeviceSpec, device: &Device) -> bool {
    let facts = &device.facts;
    let is = |text: &str, id: u16| u16::from_str_radix(text, 16) == Ok(id);
    match spec {
        DeviceSpec::VfOf { vf_of } => facts.physfn == Some(*vf_of),
        DeviceSpec::Kind { vendor, device } => is(vendor, facts.vendor) && is(device, facts.device),
        DeviceSpec::Bdf { .. } | DeviceSpec::Mdev { .. } => false,
    }
}
