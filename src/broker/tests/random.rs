//! Random sequences of calls, deaths and failing kernel calls, against maps of who has what.

use super::failing::{Failing, failing};
use super::*;
use crate::kernel::{Device, Iommufd};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// The devices that are asked for, with their groups.
const DEVICES: [(&str, u32); 6] = [
    ("0000:01:00.0", 1),
    ("0000:01:00.1", 1),
    ("0000:02:00.0", 2),
    ("0000:03:00.0", 3),
    ("0000:05:00.0", 5),
    ("0000:08:00.0", 8),
];

/// Which of them has VFs.
const PF: usize = 4;

/// `fault` is the kernel call that fails, counted from the op's first; 0 for none.
#[derive(Clone, Debug)]
enum Op {
    Acquire {
        uid: u32,
        devices: BTreeSet<usize>,
        form: u8,
        fault: i64,
    },
    Add {
        lease: usize,
        device: usize,
        fault: i64,
    },
    GetFds {
        lease: usize,
        fault: i64,
    },
    Map {
        lease: usize,
        page: u64,
        pages: u64,
        fault: i64,
    },
    Unmap {
        lease: usize,
        page: u64,
        pages: u64,
        fault: i64,
    },
    /// The holder dies; somebody else keeps its first file, or not.
    Die {
        lease: usize,
        keeps: bool,
        fault: i64,
    },
    /// The holder gives it back, its files open or closed.
    Release {
        lease: usize,
        keeps: bool,
        fault: i64,
    },
    /// Everything that was kept is closed, and what is pending is tried again.
    Retry,
}

fn op() -> impl Strategy<Value = Op> {
    let lease = || 0..6usize;
    let fault = || prop_oneof![2 => Just(0i64), 1 => 1..60i64];
    let devices = || prop::collection::btree_set(0..DEVICES.len(), 1..3);
    prop_oneof![
        6 => (1000..1002u32, devices(), 0..7u8, fault())
            .prop_map(|(uid, devices, form, fault)| Op::Acquire { uid, devices, form, fault }),
        2 => (lease(), 0..DEVICES.len(), fault())
            .prop_map(|(lease, device, fault)| Op::Add { lease, device, fault }),
        1 => (lease(), fault()).prop_map(|(lease, fault)| Op::GetFds { lease, fault }),
        4 => (lease(), 0..16u64, 1..4u64, 0..6i64)
            .prop_map(|(lease, page, pages, fault)| Op::Map { lease, page, pages, fault }),
        2 => (lease(), 0..16u64, 1..8u64, 0..6i64)
            .prop_map(|(lease, page, pages, fault)| Op::Unmap { lease, page, pages, fault }),
        2 => (lease(), any::<bool>(), 0..8i64)
            .prop_map(|(lease, keeps, fault)| Op::Die { lease, keeps, fault }),
        2 => (lease(), any::<bool>(), 0..8i64)
            .prop_map(|(lease, keeps, fault)| Op::Release { lease, keeps, fault }),
        1 => Just(Op::Retry),
    ]
}

/// A lease as its holder sees it.
struct Held {
    uid: u32,
    reply: Acquired,
    fds: Vec<OwnedFd>,
    devices: BTreeSet<usize>,
    mapped: BTreeMap<u64, u64>,
}

struct Story {
    world: World,
    kernel: Arc<Failing>,
    held: Vec<Held>,
    /// Who has which group, by public name.
    owner: BTreeMap<u32, String>,
    /// Groups of leases that have ended and whose files are kept, or whose reclaim failed. Their keepers
    /// try again by themselves: each may be free at any time.
    uncertain: BTreeSet<u32>,
    /// Groups that were handed out by iommufd, and the uid whose tenant alone can have them.
    only_for: BTreeMap<u32, u32>,
    kept: Vec<OwnedFd>,
}

impl Story {
    /// Makes a call with a fault; says whether the fault was met.
    fn with_fault<T>(&self, fault: i64, call: impl FnOnce(&World) -> T) -> (T, bool) {
        self.kernel.arm(&self.world, fault);
        let done = call(&self.world);
        let met = self.kernel.disarm() && fault > 0;
        (done, met)
    }

    fn books(&self) -> crate::ledger::Ledger {
        self.world.ledger()
    }

    fn acquire(&mut self, uid: u32, request: &Acquire, devices: BTreeSet<usize>, fault: i64) {
        let before = (self.world.stats(), self.books());
        let groups: BTreeSet<u32> = devices.iter().map(|n| DEVICES[*n].1).collect();
        let own = request.lease.clone();
        let is_foreign =
            |g: &u32| self.owner.get(g).is_some_and(|lease| Some(lease) != own.as_ref());
        let only_for_another =
            groups.iter().any(|g| self.only_for.get(g).is_some_and(|whose| *whose != uid));
        let foreign = groups.iter().any(is_foreign) || only_for_another;
        let certain = groups.iter().any(|g| is_foreign(g) && !self.uncertain.contains(g));
        let foreign_for_certain = certain || only_for_another;
        let (done, met) = self.with_fault(fault, |world| world.acquire(uid, request));
        match done {
            Ok(Grant { reply, fds }) => {
                assert!(!foreign_for_certain, "{groups:?} are {:?}'s", self.owner);
                // What can't be read while it is looked for shows nothing.
                assert!(!met || !self.only_for.is_empty(), "a call failed and nobody minded");
                assert_eq!(reply.fds.len(), fds.len());
                for group in groups {
                    self.owner.insert(group, reply.lease.clone());
                }
                match self.held.iter_mut().find(|held| held.reply.lease == reply.lease) {
                    Some(held) => {
                        held.fds.extend(fds);
                        held.devices.extend(devices);
                    }
                    None => {
                        let mapped = BTreeMap::new();
                        self.held.push(Held { uid, reply, fds, devices, mapped });
                    }
                }
            }
            Err(error) => {
                let after = (self.world.stats(), self.books());
                let was = |lease: &Lease| before.1.lease(lease.id).is_some();
                assert!(after.1.leases().all(was), "{error} left a lease");
                if self.uncertain.is_empty() {
                    assert_eq!(after, before, "{error} left something");
                }
                let fits = match &error {
                    Error::Busy { .. } | Error::Quarantined { .. } => foreign,
                    Error::Kernel { .. } => met,
                    Error::OverLimit { .. } => true,
                    // Which form it has decides, and what the lease has already.
                    Error::Unnamed { group: group @ (1 | 3), .. } => groups.contains(group),
                    Error::Conflict { .. } => request.container.is_some() || own.is_some(),
                    _ => false,
                };
                assert!(fits, "{error} to {request:?}, {:?}", self.owner);
            }
        }
    }

    fn map(&mut self, lease: usize, page: u64, pages: u64, fault: i64) {
        let Held { uid, reply, .. } = &self.held[lease];
        let (uid, reply, iova, size) = (*uid, reply.clone(), page << 12, pages << 12);
        let mapped: u64 = self.world.stats().spaces.iter().map(|space| space.mapped_bytes).sum();
        let (done, met) = self.with_fault(fault, |world| world.map(uid, &reply, iova, size));
        let now: u64 = self.world.stats().spaces.iter().map(|space| space.mapped_bytes).sum();
        match done {
            Ok(()) => {
                // Keepers of leases that are not over unmap meanwhile what was theirs, and may be those
                // that meet the fault.
                assert!(!self.uncertain.is_empty() || (!met && now == mapped + size));
                let beside: Vec<_> =
                    self.held.iter().filter(|h| h.reply.container == reply.container).collect();
                let overlap = beside
                    .iter()
                    .flat_map(|held| &held.mapped)
                    .any(|(at, len)| *at < iova + size && iova < at + len);
                assert!(!overlap, "{page}+{pages} was there already");
                self.held[lease].mapped.insert(iova, size);
            }
            Err(error) => {
                assert!(!self.uncertain.is_empty() || now == mapped, "{error}");
                assert!(met || !matches!(error, Error::Kernel { .. }), "{error}");
            }
        }
    }

    fn unmap(&mut self, lease: usize, page: u64, pages: u64, fault: i64) {
        let Held { uid, reply, .. } = &self.held[lease];
        let (uid, reply, iova, size) = (*uid, reply.clone(), page << 12, pages << 12);
        let (done, met) = self.with_fault(fault, |world| world.unmap(uid, &reply, iova, size));
        let mapped = &mut self.held[lease].mapped;
        let inside = |at: u64, len: u64| iova <= at && at + len <= iova + size;
        let whole: u64 =
            mapped.iter().filter(|(at, len)| inside(**at, **len)).map(|(_, len)| len).sum();
        match done {
            Ok(bytes) => {
                assert_eq!(bytes, whole);
                mapped.retain(|at, len| !inside(*at, *len));
            }
            // Those that did not fail are gone all the same: what is left is in the books.
            Err(Error::Kernel { .. }) => {
                assert!(met);
                let books = self.world.broker.books();
                let known = books.ledger.live(reply.lease.parse().unwrap()).unwrap();
                mapped.retain(|at, _| known.mappings.contains_key(at));
            }
            Err(error) => {
                let fine = matches!(error, Error::BadRequest { .. } | Error::Unsupported { .. });
                assert!(fine, "{error}");
            }
        }
    }

    /// The end of a lease, one way or the other.
    fn end(&mut self, lease: usize, keeps: bool, release: bool, fault: i64) {
        let mut held = self.held.remove(lease);
        let by_iommufd = held.reply.handout == Handout::Iommufd;
        if keeps {
            self.kept.push(held.fds.remove(0));
        }
        if keeps && by_iommufd {
            self.kept.push(held.fds.remove(0));
            if fault % 2 == 0 {
                self.bind_kept();
            }
        }
        let given: Vec<_> = held.devices.iter().map(|n| DEVICES[*n].1).collect();
        let (proved, met) = if release {
            let stay = std::mem::take(&mut held.fds);
            self.kept.extend(stay);
            self.with_fault(fault, |world| Some(world.release(held.uid, &held.reply).unwrap()))
        } else {
            held.fds.clear();
            self.with_fault(fault, |world| {
                world.serve_hang_ups();
                None
            })
        };
        let groups: Vec<_> =
            self.owner.iter().filter(|(_, l)| **l == held.reply.lease).map(|(g, _)| *g).collect();
        let left: Vec<_> =
            groups.iter().filter(|g| self.books().group(**g).is_some()).copied().collect();
        if !keeps && !release && !met {
            assert!(left.is_empty(), "nobody has anything of {left:?}");
        }
        if let Some(proved) = proved {
            assert_eq!(proved, left.is_empty() && !by_iommufd);
        }
        for group in groups {
            if left.contains(&group) {
                self.uncertain.insert(group);
            } else {
                self.owner.remove(&group);
            }
            if by_iommufd && given.contains(&group) {
                self.only_for.insert(group, held.uid);
            }
        }
    }

    /// Whoever keeps an iommufd and a device binds the device to it.
    fn bind_kept(&self) {
        let [.., iommufd, cdev] = &*self.kept else { return };
        let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
        let iommufd = Iommufd::from_fd(self.world.sim.kernel(), copy(iommufd));
        let device = Device::from_fd(self.world.sim.kernel(), "kept", copy(cdev));
        device.bind_iommufd(&iommufd).unwrap();
    }

    fn retry(&mut self) {
        self.kept.clear();
        self.world.serve_hang_ups();
        self.world.retry_reclaims();
        for group in std::mem::take(&mut self.uncertain) {
            assert!(self.books().group(group).is_none(), "{group} is free and not known to be");
            self.owner.remove(&group);
        }
        let owner = &self.owner;
        for (group, _) in self.only_for.extract_if(.., |group, _| !owner.contains_key(group)) {
            for (bdf, _) in DEVICES.iter().filter(|(_, id)| *id == group) {
                self.world.rebind(bdf);
            }
        }
    }

    /// What keepers have taken back meanwhile.
    fn see_freed(&mut self) {
        if self.uncertain.is_empty() {
            return;
        }
        self.world.until(|| self.kernel_and_books_agree());
        let books = self.books();
        for group in self.uncertain.extract_if(.., |group| books.group(*group).is_none()) {
            self.owner.remove(&group);
        }
    }

    fn kernel_and_books_agree(&self) -> bool {
        let (books, stats) = (self.books(), self.world.stats());
        let in_kernel: u64 = stats.spaces.iter().map(|space| space.mapped_bytes).sum();
        let mappings = books.leases().flat_map(|lease| lease.mappings.values());
        let in_books: u64 = mappings.map(|mapping| mapping.size).sum();
        let attached: BTreeSet<u32> =
            stats.spaces.iter().flat_map(|space| space.groups.clone()).collect();
        let groups = books.groups().filter(|(_, group)| group.attached);
        let known: BTreeSet<u32> = groups.map(|(id, _)| id).collect();
        in_kernel == in_books && attached == known
    }

    /// Kernel, books and holders agree.
    fn check(&mut self) {
        self.see_freed();
        let books = self.books();
        let owned: BTreeMap<_, _> =
            books.groups().map(|(id, g)| (id, g.lease.to_string())).collect();
        assert_eq!(owned, self.owner);
        // Where a reclaim is not over, who can have the group is not written yet.
        let only_for = books.unproved().map(|(id, left)| (id, left.tenant.clone()));
        let known: BTreeMap<_, _> = only_for.collect();
        let tenant = |uid: &u32| if *uid == 1000 { "a" } else { "b" }.to_owned();
        let model = self
            .only_for
            .iter()
            .filter(|(id, _)| known.contains_key(id) || !self.uncertain.contains(id));
        let model: BTreeMap<_, _> = model.map(|(id, uid)| (*id, tenant(uid))).collect();
        assert_eq!(known, model);
        let listed = self.world.broker.leases(&caller(1001)).unwrap().leases;
        assert_eq!(listed.len(), self.held.len());
        for held in &self.held {
            let lease = listed.iter().find(|lease| lease.lease == held.reply.lease).unwrap();
            let devices: BTreeSet<_> = held.devices.iter().map(|n| DEVICES[*n].0).collect();
            assert_eq!(lease.devices.iter().map(|bdf| &**bdf).collect::<BTreeSet<_>>(), devices);
            if let Some(bytes) = lease.mapped_bytes {
                assert_eq!(bytes, held.mapped.values().sum::<u64>());
            }
        }
        // What a keeper has done is told; where nothing is uncertain it has been.
        assert!(!self.uncertain.is_empty() || self.kernel_and_books_agree());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn kernel_books_and_holders_always_agree(ops in vec(op(), 1..40)) {
        let (world, kernel) = failing();
        let (held, owner) = (Vec::new(), BTreeMap::new());
        let (uncertain, kept) = (BTreeSet::new(), Vec::new());
        let only_for = BTreeMap::new();
        let mut story = Story { world, kernel, held, owner, uncertain, only_for, kept };
        for op in ops {
            let pick = |lease: usize| (!story.held.is_empty()).then(|| lease % story.held.len());
            match op {
                Op::Acquire { uid, devices, form, fault } => {
                    let names: Vec<_> = devices.iter().map(|n| DEVICES[*n].0).collect();
                    let request = match form {
                        0 => want_as(Handout::Container, &names),
                        1 => want_as(Handout::Group, &names),
                        2 => want_as(Handout::Devices, &names),
                        3 => want_in("pool", &names),
                        4 => want_in("friends", &names),
                        // A PF with VFs can't be taken off its driver to prove anything.
                        _ if devices.contains(&PF) => continue,
                        _ => want_as(Handout::Iommufd, &names),
                    };
                    story.acquire(uid, &request, devices, fault);
                }
                Op::Add { lease, device, fault } => if let Some(lease) = pick(lease) {
                    let Held { uid, reply, .. } = &story.held[lease];
                    if device == PF && reply.handout == Handout::Iommufd {
                        continue;
                    }
                    let (uid, request) = (*uid, more(reply, &[DEVICES[device].0]));
                    story.acquire(uid, &request, [device].into(), fault);
                },
                Op::GetFds { lease, fault } => if let Some(lease) = pick(lease) {
                    let Held { uid, reply, .. } = &story.held[lease];
                    let (uid, request) = (*uid, get_fds(reply));
                    let (done, met) = story.with_fault(fault, |world| world.get_fds(uid, &request));
                    let busy = matches!(reply.handout, Handout::Group | Handout::Iommufd);
                    assert_eq!(done.is_ok(), !met && !busy);
                    story.held[lease].fds.extend(done.into_iter().flat_map(|(_, fds)| fds));
                },
                Op::Map { lease, page, pages, fault } => if let Some(lease) = pick(lease) {
                    story.map(lease, page, pages, fault);
                },
                Op::Unmap { lease, page, pages, fault } => if let Some(lease) = pick(lease) {
                    story.unmap(lease, page, pages, fault);
                },
                Op::Die { lease, keeps, fault } => if let Some(lease) = pick(lease) {
                    story.end(lease, keeps, false, fault);
                },
                Op::Release { lease, keeps, fault } => if let Some(lease) = pick(lease) {
                    story.end(lease, keeps, true, fault);
                },
                Op::Retry => story.retry(),
            }
            story.check();
        }
        while !story.held.is_empty() {
            story.end(0, false, false, 0);
        }
        story.retry();
        story.world.assert_idle();
    }
}
