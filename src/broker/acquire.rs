//! Acquire: the whole of it, or nothing.

use super::access::{CallersTenant, quota};
use super::attend::{FIRST_PAUSE, LONGEST_PAUSE};
use super::books::{Books, Entry};
use super::candidates::Candidates;
use super::error::no_answer;
use super::keeper::{KeeperHandle, NotDone, Turn};
use super::key::{Key, new_lease_id};
use super::plan::{Chosen, Plan};
use super::reload::Owner;
use super::{Broker, Caller, Delivery, container_name, devices, error, event, no_such_lease, now};
use crate::ledger::{self, Effect, GroupState, LeaseId, Refusal, Request, Space, Trust};
use crate::policy::{Policy, Tenant, Verb};
use crate::process::keeper::{
    Deliver, LeaseRecord, LeasedDevice, LeasedGroup, Open, Opened, Phase, SharedContainer, Step,
    Undo,
};
use crate::protocol::{Acquire, Error, EventKind, Handout};
use serde_json::{Map, Value, json};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

/// Why nothing was reserved.
struct Refused {
    error: Box<Error>,
    /// Which lease has what was asked for.
    holder: Option<LeaseId>,
    /// What was asked for is just being taken back.
    is_soon: bool,
}

impl<E: Into<Error>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self { error: Box::new(error.into()), holder: None, is_soon: false }
    }
}

/// What was planned and entered, and whose it is by which policy.
struct Reserved {
    tenant: CallersTenant,
    plan: Plan,
    chosen: Chosen,
    effects: Vec<Effect>,
}

/// What is to be handed over, and the policy that it was planned by.
struct Planned<'a> {
    policy: &'a Arc<Policy>,
    chosen: &'a Chosen,
}

/// What was opened for a lease, and the right to go on with its keeper.
struct Ready {
    turn: Turn,
    opened: Opened,
}

impl Broker {
    /// Gives devices to a new lease, or adds them to one; all or nothing. The reply goes to `client`
    /// by way of the lease's keeper.
    ///
    /// # Errors
    /// Nothing was changed: what had been done is undone, or will be when the kernel lets it.
    pub async fn acquire(
        self: &Rc<Self>,
        caller: &Caller,
        client: Rc<impl AsFd + 'static>,
        request: &Acquire,
    ) -> Result<Delivery, Error> {
        let until = Instant::now() + self.deadline;
        let known = match (&request.lease, &request.key) {
            (Some(lease), Some(key)) => {
                let entry = self.authorize(caller, lease, key)?;
                self.check_own(&*self.tenant(caller)?, &entry)?;
                Some(entry)
            }
            (None, None) => None,
            _ => return Err(Error::bad("lease", "lease and key come together")),
        };
        let id = known.as_ref().map_or_else(new_lease_id, |entry| Ok(entry.id))?;
        let Reserved { tenant, plan, chosen, effects } =
            self.reserve(caller, request, id, &known).await?;
        let entry = match known {
            Some(entry) => Ok(entry),
            None => timeout_at(until, self.new_entry(id, &tenant, &plan))
                .await
                .unwrap_or_else(|_| Err(error::no_answer("fork", "a keeper's process"))),
        };
        let entry = entry.inspect_err(|_| self.abort(id))?;
        let call =
            self.open_call(&entry, &plan, &chosen, effects).inspect_err(|_| self.abort(id))?;
        let devices = call.record.devices.clone();
        let ready = match self.open(&entry, call, Rc::clone(&client), until).await {
            Ok(ready) => ready,
            Err(error) => return Err(self.or_open_elsewhere(caller, &devices, error).await),
        };
        let planned = Planned { policy: &tenant.policy, chosen: &chosen };
        self.hand_over(&entry, ready, client.as_fd(), planned, request.lease.is_none()).await
    }

    fn check_own(&self, tenant: &Tenant, entry: &Entry) -> Result<(), Error> {
        if tenant.name == *entry.tenant.borrow() {
            return Ok(());
        }
        Err(error::another_tenants(entry.id))
    }

    /// Plans, and enters what was planned: from then on it is nobody else's. What is just being taken
    /// back is waited for, and while anything changes the plan is made anew.
    async fn reserve(
        self: &Rc<Self>,
        caller: &Caller,
        request: &Acquire,
        id: LeaseId,
        known: &Option<Rc<Entry>>,
    ) -> Result<Reserved, Error> {
        let (mut until, mut candidates) = (None, None);
        let (mut asked, mut has_looked) = (None, false);
        loop {
            let step = self.read_candidates(caller, request, &mut candidates).await?;
            let seen = self.generation.get();
            let tried = self.try_reserve(caller, request, id, known, candidates.as_ref());
            drop(step);
            let Refused { error, holder, is_soon } = match tried {
                Ok(reserved) => return Ok(reserved),
                Err(refused) => refused,
            };
            let until = *until.get_or_insert_with(|| Instant::now() + self.patience);
            let can_pass = match holder.filter(|_| holder != asked) {
                // One that is gone may not have been noticed yet.
                Some(holder) => {
                    asked = Some(holder);
                    self.has_let_go_of(holder).await
                }
                None => {
                    let can_pass = is_soon || self.can_pass(&error, request);
                    can_pass && self.changes(seen, until).await
                }
            };
            if can_pass {
                continue;
            }
            // Only who may know the last holder is told of those that still have it.
            match &*error {
                Error::Quarantined { holder: Some(_), device, .. } if !has_looked => {
                    has_looked = true;
                    self.look_for_holders_of(device).await;
                }
                _ => return Err(*error),
            }
        }
    }

    fn try_reserve(
        &self,
        caller: &Caller,
        request: &Acquire,
        id: LeaseId,
        known: &Option<Rc<Entry>>,
        candidates: Option<&Candidates>,
    ) -> Result<Reserved, Refused> {
        // Each attempt is by the policy of its time.
        let tenant = self.tenant(caller)?;
        tenant.policy.may(&tenant, Verb::Acquire).ok()?;
        let lease = match known {
            Some(entry) => {
                self.check_not_revoked(entry)?;
                // To what would not be given now nothing is added.
                self.judge(entry.id)?;
                let lease = self.books().ledger.live(entry.id).cloned();
                Some(lease.ok_or_else(|| no_such_lease(entry.id))?)
            }
            None => None,
        };
        let plan = self
            .plan(&tenant, request, lease.as_ref(), candidates)
            .map_err(|error| self.or_reclaiming(&tenant, error))?;
        self.look_for_proof(&tenant.name, |group| plan.concerns(group));
        let mut books = self.books();
        let chosen = self.choose(caller, &books, &plan, id, &tenant.name)?;
        let kept = match plan.handout {
            Handout::Iommufd => 1,
            _ => chosen.groups.len() + 2, // a container and a lease pipe
        };
        self.check_kept(&books, &tenant.name, kept as u64)?;
        let (groups, quota) = (chosen.groups.clone(), quota(&tenant.limits));
        let asked = match known {
            Some(_) => Request::Extend(ledger::Extend { lease: id, groups, quota }),
            None => Request::Acquire(ledger::Acquire {
                lease: id,
                tenant: tenant.name.clone(),
                vm: request.vm.clone(),
                uid: caller.peer.uid,
                pid: caller.peer.pid,
                at: now(),
                handout: plan.handout,
                space: plan.space.clone(),
                groups,
                quota,
            }),
        };
        match books.ledger.apply(asked) {
            Ok(effects) => Ok(Reserved { tenant, plan, chosen, effects }),
            Err(refusal) => {
                let holder = match refusal {
                    Refusal::Busy { holder, .. } => Some(holder),
                    _ => None,
                };
                let is_soon = matches!(refusal, Refusal::NotYet { .. });
                let error = Box::new(self.refused(caller, &books, refusal));
                Err(Refused { error, holder, is_soon })
            }
        }
    }

    /// A device that is being taken back can be without a driver just now, or without its own node.
    fn or_reclaiming(&self, tenant: &Tenant, error: Error) -> Refused {
        let Error::NotViable { group, blockers } = &error else { return error.into() };
        let books = self.books();
        let state = books.ledger.group(*group).map(|group| &group.state);
        let is_soon = matches!(state, Some(GroupState::Reclaiming { .. }));
        let device = blockers.first().map_or(format!("group {group}"), |b| b.bdf.clone());
        let error = self.not_free(tenant, &books, device, *group).unwrap_or(error);
        Refused { error: Box::new(error), holder: None, is_soon }
    }

    /// Whether an error may be another one, or none, as soon as what is being taken back is free.
    fn can_pass(&self, error: &Error, request: &Acquire) -> bool {
        let books = self.books();
        match error {
            // While it is bound again a device looks as if this host had no cdevs.
            Error::NotViable { .. } | Error::Unsupported { .. } => {
                self.names_reclaimed(&books, request)
            }
            _ => false,
        }
    }

    /// Whether a device that is named by its address is just being taken back.
    fn names_reclaimed(&self, books: &Books, request: &Acquire) -> bool {
        let all = request.devices.iter().chain(request.withhold.iter().flatten());
        let named = |bdf: crate::protocol::Bdf| {
            all.clone().any(
                |spec| matches!(spec, crate::protocol::DeviceSpec::Bdf { bdf: b } if *b == bdf),
            )
        };
        books.ledger.groups().any(|(_, group)| {
            matches!(group.state, GroupState::Reclaiming { .. })
                && group.members.iter().any(|member| named(member.bdf))
        })
    }

    fn abort(&self, id: LeaseId) {
        // The ledger knows this lease and that it is being acquired. One that has ended meanwhile may
        // have waited for this alone.
        self.report(id, Request::Abort { lease: id });
    }

    /// A new lease's entry: with a keeper of its own, or that of its shared container.
    async fn new_entry(
        self: &Rc<Self>,
        id: LeaseId,
        tenant: &CallersTenant,
        plan: &Plan,
    ) -> Result<Rc<Entry>, Error> {
        let key = Key::new()?;
        let keeper = match &plan.space {
            Space::Shared { name, .. } => self.shared_keeper(name).await?,
            Space::None | Space::Own => self.start_keeper().await?,
        };
        let principals = tenant.policy.principals(&tenant.name).unwrap_or_default();
        self.books().owners.insert(id, Owner { name: tenant.name.clone(), principals });
        Ok(Rc::new(Entry::new(id, &tenant.name, key, keeper)))
    }

    async fn shared_keeper(self: &Rc<Self>, container: &str) -> Result<Rc<KeeperHandle>, Error> {
        let there = || self.books().shared.get(container).and_then(std::rc::Weak::upgrade);
        if let Some(keeper) = there() {
            return Ok(keeper);
        }
        let keeper = self.start_keeper().await?;
        // Another member can have been first meanwhile: one container has one keeper.
        if let Some(first) = there() {
            return Ok(first);
        }
        self.books().shared.insert(container.to_owned(), Rc::downgrade(&keeper));
        Ok(keeper)
    }

    fn open_call(
        &self,
        entry: &Entry,
        plan: &Plan,
        chosen: &Chosen,
        effects: Vec<Effect>,
    ) -> Result<Open, Error> {
        let books = self.books();
        let lease = books.ledger.lease(entry.id).ok_or_else(|| no_such_lease(entry.id))?;
        let owner = books.owners.get(&entry.id).cloned().unwrap_or_default();
        let policy = self.policy();
        let tenant = policy.tenants().iter().find(|tenant| tenant.name == owner.name);
        let device = |handed: &ledger::Handed| LeasedDevice {
            bdf: handed.bdf,
            group: handed.group,
            withheld: handed.withheld,
        };
        let container = match &lease.space {
            Space::Shared { name, trust } => {
                let (name, mutual) = (name.clone(), *trust == Trust::Mutual);
                Some(SharedContainer { name, mutual })
            }
            Space::None | Space::Own => None,
        };
        let record = LeaseRecord {
            lease: entry.id.to_string(),
            key: entry.key.to_hex(),
            tenant: owner.name,
            principals: owner.principals,
            vm: lease.vm.clone(),
            uid: lease.uid,
            pid: lease.pid,
            since: lease.since,
            handout: lease.handout,
            container,
            noiommu: lease.noiommu,
            rebind: tenant.is_some_and(|tenant| tenant.rebind || tenant.managed),
            devices: lease.devices.iter().chain(lease.adding()).map(device).collect(),
        };
        let is_new = |id: &u32| {
            effects.iter().any(|effect| match effect {
                Effect::OpenGroup(group) | Effect::CheckGroup(group) => group == id,
                _ => false,
            })
        };
        let group = |wanted: &ledger::WantedGroup| LeasedGroup {
            id: wanted.id,
            noiommu: wanted.noiommu,
            members: wanted.members.iter().map(|member| (member.bdf, member.physfn)).collect(),
        };
        let fresh = chosen.groups.iter().filter(|wanted| is_new(&wanted.id)).map(group);
        let delivered = matches!(plan.handout, Handout::Container | Handout::Group);
        let delivered = chosen.groups.iter().map(|group| group.id).filter(|_| delivered);
        Ok(Open {
            record,
            groups: fresh.collect(),
            deliver_groups: delivered.collect(),
            steps: effects.into_iter().filter_map(step).collect(),
            names: chosen.names.clone(),
            extends: books.entries.contains_key(&entry.id),
        })
    }

    /// Has the keeper open it all. What is opened too late, or not whole, is undone.
    async fn open(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        call: Open,
        client: Rc<impl AsFd + 'static>,
        until: Instant,
    ) -> Result<Ready, Error> {
        let (broker, keeper, id) = (Rc::clone(self), Rc::clone(entry), entry.id);
        let object = call.record.devices.iter().map(|device| device.bdf.to_string());
        let object = object.collect::<Vec<_>>().join(" ");
        let devices = call.record.devices.clone();
        let work = async move {
            let Ok(mut turn) = keeper.keeper.turn_until("Acquire", until).await else {
                broker.abort(id);
                return Err(no_answer("Acquire", &keeper.keeper.name));
            };
            match turn.ask(&call, &[client.as_fd()]).await {
                Ok(opened) => Ok(Ready { turn, opened }),
                Err(why) => {
                    drop(turn);
                    if let NotDone::Lost(_) = why {
                        undone(&keeper.keeper, id, None).await;
                    }
                    let error = broker.not_done(why, id, &devices, "Acquire");
                    broker.abort(id);
                    Err(error)
                }
            }
        };
        let (broker, entry) = (Rc::clone(self), Rc::clone(entry));
        let undo = move |ready: Ready| async move {
            broker.undo(&entry, ready.turn).await;
        };
        self.in_time(("Acquire", &object), until, work, undo).await
    }

    async fn undo(&self, entry: &Entry, turn: Turn) {
        undone(&entry.keeper, entry.id, Some(turn)).await;
        self.abort(entry.id);
    }

    /// Everything is open: what can still fail comes first, then the lease is its holder's.
    async fn hand_over(
        self: &Rc<Self>,
        entry: &Rc<Entry>,
        ready: Ready,
        client: BorrowedFd<'_>,
        Planned { policy, chosen }: Planned<'_>,
        is_new: bool,
    ) -> Result<Delivery, Error> {
        let Ready { mut turn, opened } = ready;
        let allowed = match Arc::ptr_eq(policy, &self.policy()) {
            true => Ok(()),
            // By the policy of now it may be another answer.
            false => self.judge(entry.id),
        };
        let committed = {
            let mut books = self.books();
            let tenant = entry.tenant.borrow();
            allowed.and_then(|()| self.check_kept(&books, &tenant, 1)).and_then(|()| {
                let commit = Request::Commit { lease: entry.id };
                books.ledger.apply(commit).map_err(|_| no_such_lease(entry.id))?;
                // What was told before it was opened is older than what is committed here.
                entry.revision.set(entry.revision.get().max(opened.state.revision));
                books.entries.insert(entry.id, Rc::clone(entry));
                books.ledger.live(entry.id).cloned().ok_or_else(|| no_such_lease(entry.id))
            })
        };
        let lease = match committed {
            Ok(lease) => lease,
            Err(error) => {
                self.undo(entry, turn).await;
                return Err(error);
            }
        };
        let named = chosen.devices.iter().map(|(bdf, _)| bdf.to_string()).collect::<Vec<_>>();
        let parameters = json!({
            "lease": entry.id.to_string(),
            "key": entry.key.to_hex(),
            "tenant": lease.tenant,
            "backend": lease.handout.backend(),
            "handout": lease.handout,
            "iommu": opened.iommu,
            "container": container_name(&lease),
            "devices": named.clone(),
        });
        let (lifeline, kept) = (true, None);
        let deliver =
            Deliver { lease: entry.id.to_string(), parameters: object(parameters), lifeline, kept };
        // Its end can be heard of before the answer to this.
        let kind = if is_new { EventKind::Acquired } else { EventKind::Extended };
        self.tell(&event(kind, &lease, devices(&lease, false)));
        match turn.ask(&deliver, &[client]).await {
            Ok(delivered) => {
                if let Some(state) = delivered.state {
                    self.learn(&entry.keeper, state);
                }
                Ok(delivered.whole.into())
            }
            // It may have been delivered: who takes back what the keeper had finds out.
            Err(NotDone::Lost(lost)) => {
                warn!(%lost, lease = %entry.id, "a keeper has ended while it handed a lease over");
                Ok(Delivery::Part)
            }
            Err(why) => {
                self.retract(entry, chosen);
                if is_new {
                    self.tell(&event(EventKind::Gone, &lease, devices(&lease, false)));
                }
                self.tell(&event(EventKind::Reclaimed, &lease, named));
                Err(self.not_done(why, entry.id, &[], "Acquire"))
            }
        }
    }

    /// The keeper has undone it already.
    fn retract(&self, entry: &Entry, chosen: &Chosen) {
        let mut books = self.books();
        let known = |id: u32| {
            books.ledger.group(id).is_some_and(|group| {
                // In any phase: what an ended lease still has is not free.
                let others = books.ledger.lease(group.lease).map(|lease| lease.devices.clone());
                let given = |bdf| {
                    chosen
                        .groups
                        .iter()
                        .any(|g| g.devices.contains(&bdf) || g.withhold.contains(&bdf))
                };
                others.is_some_and(|all| all.iter().any(|h| h.group == id && !given(h.bdf)))
            })
        };
        let groups = chosen.groups.iter().map(|group| group.id).filter(|id| !known(*id)).collect();
        let devices = chosen.groups.iter().flat_map(|g| g.devices.iter().chain(&g.withhold));
        let devices = devices.copied().collect();
        let lease = entry.id;
        books.report(lease, [Request::Retract { lease, devices, groups }]);
        drop(books);
        self.has_changed();
    }
}

/// Has what was opened and not delivered undone. Of a keeper that was killed meanwhile, what it had is open
/// until its process has ended, and is not free before somebody has proved it.
async fn undone(keeper: &KeeperHandle, id: LeaseId, mut turn: Option<Turn>) {
    let undo = Undo { lease: id.to_string() };
    let mut pause = FIRST_PAUSE;
    loop {
        let turn = match turn.take() {
            None => keeper.turn_once_linked().await,
            first => first,
        };
        // With the keeper all that it had is gone.
        let Some(mut turn) = turn else { return };
        match turn.ask(&undo, &[]).await {
            // Another keeper takes back what this one has left.
            Ok(changed) if changed.state.phase == Phase::Ending => {}
            Err(NotDone::Lost(_)) => {}
            Ok(_) | Err(NotDone::Failed(_)) => return,
        }
        drop(turn);
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn step(effect: Effect) -> Option<Step> {
    Some(match effect {
        Effect::OpenSpace => Step::OpenContainer,
        Effect::OpenGroup(id) => Step::OpenGroup(id),
        Effect::Attach(id) => Step::Attach(id),
        Effect::OpenDevice(id, bdf) => Step::OpenDevice(id, bdf),
        Effect::OpenIommufd => Step::OpenIommufd,
        Effect::CheckGroup(id) => Step::CheckGroup(id),
        Effect::OpenCdev(id, bdf) => Step::OpenCdev(id, bdf),
        Effect::Map { .. } | Effect::Unmap { .. } => return None,
    })
}

/// The fields of a JSON object.
pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}
