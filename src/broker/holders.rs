//! Who still has what a lease has left open. A process with the right to look into others is asked, never
//! more than one at a time, and not for every call that shows a quarantine: what it finds is kept for a while,
//! and how long it took decides when there can be another one.

use super::error::told;
use super::{Broker, Caller, Oversight, books::Books};
use crate::host;
use crate::kernel::Node;
use crate::ledger::{GroupState, LeaseId};
use crate::process::holders::{MOST_GROUPS, Report, Search, SearchedDevice, SearchedGroup};
use crate::process::keeper::LeasedDevice;
use crate::protocol::{Bdf, Error, Known, Processes, Until};
use crate::sys::process::now;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep_until, timeout_at};

/// For how long what was found is good enough.
const FRESH: Duration = Duration::from_secs(5);
/// How long is waited for more.
const PATIENCE: Duration = Duration::from_secs(4);
/// The shortest pause between two looks; tests have not so much time.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 1000 });
/// The pause as a multiple of what the last look took: of one processor, a twentieth at most is spent.
const REST: u32 = 20;

/// What was found, and whether more is being looked for.
#[derive(Default)]
pub(super) struct Looks {
    found: RefCell<HashMap<u32, Found>>,
    is_looking: Cell<bool>,
    done: Notify,
    /// Not before then.
    next: Cell<Option<Instant>>,
}

/// What was found of one group.
struct Found {
    when: Instant,
    processes: Processes,
}

impl Broker {
    /// Has what the caller may know of holders looked up, as far as one look does that and can be had now.
    pub async fn look_for_holders(self: &Rc<Self>, caller: &Caller) {
        let ids = self.left_open(|tenant| self.may_see(caller, tenant));
        self.look_for(&ids, &[], false).await;
    }

    /// Has those of one device looked up, unless they were just before. Waits for that, but not for ever.
    pub(super) async fn look_for_holders_of(self: &Rc<Self>, device: &str) {
        let id = device.parse::<Bdf>().ok().and_then(|bdf| {
            let books = self.books();
            let mut groups = books.ledger.groups();
            let group = groups.find(|(_, group)| group.members.iter().any(|it| it.bdf == bdf));
            let mut unproved = books.ledger.unproved();
            let group = group.map(|(id, _)| id);
            group.or_else(|| {
                unproved.find(|(_, left)| left.left.contains_key(&bdf)).map(|(id, _)| id)
            })
        });
        if let Some(id) = id.filter(|id| left_since(&self.books(), *id).is_some()) {
            self.look_for(&[id], &[], true).await;
        }
    }

    /// What [`look_for_holders`](Self::look_for_holders) does, for what an ended lease has left.
    pub(super) async fn look_for_left(self: &Rc<Self>, id: LeaseId) {
        let ids: Vec<u32> = {
            let books = self.books();
            let groups = books.ledger.groups_of(id).map(|(group, _)| group);
            let unproved = books.ledger.unproved().filter(|(_, left)| left.lease == id);
            let all = groups.chain(unproved.map(|(group, _)| group));
            all.filter(|group| left_since(&books, *group).is_some()).collect()
        };
        self.look_for(&ids, &[], false).await;
    }

    /// Who still has a group that is quarantined or unproved, as far as that was looked for since.
    pub(super) fn open_in(&self, books: &Books, group: u32) -> Option<Processes> {
        let since = left_since(books, group)?;
        let found = self.looks.found.borrow();
        let processes = found.get(&group).map(|found| found.processes.clone());
        Some(processes.filter(|it| it.at >= since).unwrap_or_else(|| unknown("not looked for yet")))
    }

    /// That a group is busy although no lease has it, and who has it, where the caller may know that.
    pub(super) async fn or_open_elsewhere(
        self: &Rc<Self>,
        caller: &Caller,
        devices: &[LeasedDevice],
        error: Error,
    ) -> Error {
        let Error::Kernel { call, object, errno, .. } = &error else { return error };
        if call != "open" || *errno != Errno::EBUSY as i32 {
            return error;
        }
        let id = object.strip_prefix("/dev/vfio/").map(|it| it.trim_start_matches("noiommu-"));
        let Some(id) = id.and_then(|id| id.parse().ok()) else { return error };
        if self.oversight(caller) != Oversight::Whole {
            return error;
        }
        let devices: Vec<Bdf> =
            devices.iter().filter(|device| device.group == id).map(|device| device.bdf).collect();
        let Some(device) = devices.first().map(ToString::to_string) else { return error };
        let node = object.clone();
        self.looks.found.borrow_mut().remove(&id);
        self.look_for(&[id], &[self.searched(id, node, &devices)], true).await;
        let found = self.looks.found.borrow().get(&id).map(|found| found.processes.clone());
        let open_in = found.unwrap_or_else(|| unknown("not looked for yet"));
        Error::Busy { device, holder: None, since: None, open_in: Some(Box::new(open_in)) }
    }

    /// Has these groups looked for unless what is known of them is fresh. Who is not patient waits for one
    /// look at most, and for none that can't begin yet: there can be more groups than a look takes.
    async fn look_for(self: &Rc<Self>, ids: &[u32], extra: &[SearchedGroup], is_patient: bool) {
        let until = Instant::now() + PATIENCE;
        let mut has_waited = false;
        while !ids.iter().all(|id| self.is_fresh(*id)) {
            if has_waited && !is_patient {
                return;
            }
            let done = self.looks.done.notified();
            let next = self.looks.next.get().filter(|next| *next > Instant::now());
            match next {
                _ if self.looks.is_looking.get() => {
                    if timeout_at(until, done).await.is_err() {
                        return;
                    }
                    has_waited = true;
                }
                Some(next) if !is_patient || next > until => return,
                Some(next) => sleep_until(next).await,
                None => self.begin_to_look(ids, extra),
            }
        }
    }

    fn is_fresh(&self, id: u32) -> bool {
        let since = left_since(&self.books(), id).unwrap_or(0);
        let found = self.looks.found.borrow();
        found.get(&id).is_some_and(|it| it.when.elapsed() < FRESH && it.processes.at >= since)
    }

    /// Those that are asked for first, and as many of the others as one look takes.
    fn begin_to_look(self: &Rc<Self>, first: &[u32], extra: &[SearchedGroup]) {
        let all: BTreeSet<u32> = self.left_open(|_| true).into_iter().collect();
        self.looks.found.borrow_mut().retain(|id, _| all.contains(id) || first.contains(id));
        let stale = first.iter().filter(|id| !self.is_fresh(**id)).copied();
        let mut ids: Vec<u32> = stale.collect();
        // Those that were never looked for, then those that it is longest ago for.
        ids.sort_by_key(|id| self.looks.found.borrow().get(id).map(|found| found.when));
        ids.extend(all.into_iter().filter(|id| !first.contains(id)));
        ids.truncate(MOST_GROUPS);
        let groups = ids.into_iter().filter_map(|id| {
            let extra = extra.iter().find(|group| group.id == id).cloned();
            extra.or_else(|| self.searched_left(id))
        });
        let groups: Vec<_> = groups.collect();
        self.looks.is_looking.set(true);
        let broker = Rc::clone(self);
        spawn_local(async move {
            let keepers = broker.keepers_of(&groups).await;
            let (began, search) = (Instant::now(), Search { groups, keepers });
            let report = broker.keepers.look(&search).await;
            let rest = PAUSE.max(began.elapsed() * REST);
            broker.looks.next.set(Some(Instant::now() + rest));
            broker.looks.take_down(&search, report);
        });
    }

    /// The groups that somebody may still have, of the tenants that `sees` says.
    fn left_open(&self, sees: impl Fn(&str) -> bool) -> Vec<u32> {
        let books = self.books();
        let sees_lease = |id| books.ledger.lease(id).is_some_and(|lease| sees(&lease.tenant));
        let groups = books
            .ledger
            .groups()
            .filter(|(id, group)| left_since(&books, *id).is_some() && sees_lease(group.lease));
        let unproved = books.ledger.unproved().filter(|(_, left)| sees(&left.tenant));
        let all: BTreeSet<u32> =
            groups.map(|(id, _)| id).chain(unproved.map(|(id, _)| id)).collect();
        all.into_iter().collect()
    }

    fn searched_left(&self, id: u32) -> Option<SearchedGroup> {
        let (noiommu, devices) = {
            let books = self.books();
            match books.ledger.group(id) {
                Some(group) => {
                    let lease = books.ledger.lease(group.lease)?;
                    (lease.noiommu, group.members.iter().map(|member| member.bdf).collect())
                }
                None => {
                    let left = books.ledger.unproved_group(id)?;
                    (false, left.left.keys().copied().collect::<Vec<_>>())
                }
            }
        };
        let node = if noiommu { Node::NoIommuGroup(id) } else { Node::Group(id) };
        Some(self.searched(id, node.to_string(), &devices))
    }

    fn searched(&self, id: u32, node: String, devices: &[Bdf]) -> SearchedGroup {
        let cdev = |bdf| host::cdev(&*self.kernel, bdf).ok().flatten();
        let node_of = |bdf| cdev(bdf).map(|number| Node::Cdev(number).to_string());
        let devices = devices.iter().map(|bdf| SearchedDevice { bdf: *bdf, node: node_of(*bdf) });
        SearchedGroup { id, node, devices: devices.collect() }
    }

    /// The processes of the keepers that have these groups, because nobody else has proved them free.
    async fn keepers_of(&self, groups: &[SearchedGroup]) -> Vec<u32> {
        let names: BTreeSet<String> = {
            let books = self.books();
            let lease = |group: &SearchedGroup| Some(books.ledger.group(group.id)?.lease);
            let entries = groups.iter().filter_map(|group| books.entries.get(&lease(group)?));
            entries.map(|entry| entry.keeper.name.clone()).collect()
        };
        let mut pids = Vec::new();
        let mut all = self.kept();
        while let Ok(Some(kept)) = all.next().await {
            if names.contains(&kept.name) {
                pids.extend(kept.saved().map(|saved| saved.pid));
            }
        }
        pids
    }
}

impl Looks {
    fn take_down(&self, search: &Search, report: std::io::Result<Report>) {
        let when = Instant::now();
        let mut found = self.found.borrow_mut();
        for (at, group) in search.groups.iter().enumerate() {
            let processes = match &report {
                Ok(report) => described(report, at),
                Err(error) => unknown(&error.to_string()),
            };
            found.insert(group.id, Found { when, processes });
        }
        self.is_looking.set(false);
        self.done.notify_waiters();
    }
}

/// Since when somebody may still have a group that no lease has; `None` where it is free, held, or only just
/// being taken back.
fn left_since(books: &Books, group: u32) -> Option<u64> {
    match books.ledger.group(group).map(|group| &group.state) {
        Some(GroupState::Quarantined { since, why }) => {
            (told(why).1 == Until::Holder).then_some(*since)
        }
        Some(_) => None,
        None => books.ledger.unproved_group(group).map(|left| left.since),
    }
}

fn unknown(why: &str) -> Processes {
    Processes { known: Known::Unknown, why: Some(why.into()), at: now(), processes: Vec::new() }
}

/// What a report says of the group that was asked for at that place.
fn described(report: &Report, at: usize) -> Processes {
    let Some(processes) = report.found.get(at).cloned() else {
        return unknown(report.why.as_deref().unwrap_or("it could not be looked for"));
    };
    let is_certain =
        processes.iter().flat_map(|process| &process.files).any(|file| file.name.is_some());
    let mut why: Vec<String> = report.why.iter().cloned().collect();
    if !is_certain {
        why.push(
            "no open file says for certain who has it; one in flight in a socket never does".into(),
        );
    }
    if report.hidden > 0 {
        why.push(format!("{} processes could not be looked into", report.hidden));
    }
    if !report.is_whole && !is_certain {
        why.push("there was no time to look at all memory and all threads".into());
    }
    if report.more {
        why.push("not all are named".into());
    }
    let known = if why.is_empty() { Known::Whole } else { Known::Partial };
    let why = (!why.is_empty()).then(|| why.join("; "));
    Processes { known, why, at: now(), processes }
}
