//! Every sequence of what can happen in a small world, up to a depth: two groups, one of them with two
//! devices, two tenants, one shared container. States that were there before are not gone on from.

use super::model::{GROUPS, Model, State};
use super::*;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

/// Set where there is time for the deep search.
const FULL: &str = "VFIO_FULL";

/// A group, with the devices of it to use and to withhold, a bit each.
type Wanted = (u32, u8, u8);

/// What is asked for in a small world, in each form.
struct World {
    wanted: Vec<Vec<Wanted>>,
    /// Handout and address space, as [`Model::acquire`] has them.
    forms: &'static [(u8, u8)],
}

/// Small enough that each quota is met.
const SMALL: Quota = Quota { leases: 2, devices: 2, mappings: 2, mapped_bytes: 2 << 12 };

/// Devices with a container of their own, and with the shared one; iommufd.
const FEW: &[(u8, u8)] = &[(2, 3), (2, 0), (4, 3)];

/// These, the handouts container and group, and the shared container with the other kind of trust.
const ALL: &[(u8, u8)] = &[(0, 3), (1, 3), (2, 3), (2, 0), (2, 2), (4, 3)];

/// Of two groups `two` has two devices and `one` has one, or is asked for one.
fn few(two: u32, one: u32) -> World {
    let wanted = [(two, 1, 0), (two, 2, 0), (one, 1, 0)].map(|one| vec![one]).into();
    World { wanted, forms: FEW }
}

fn all(two: u32, one: u32) -> World {
    let mut wanted = few(two, one).wanted;
    wanted.push(vec![(two, 3, 0)]);
    wanted.push(vec![(two, 1, 2)]);
    // Nothing of it is used: right only where it adds to a lease.
    wanted.push(vec![(two, 0, 2)]);
    wanted.push(vec![(two, 1, 0), (one, 1, 0)]);
    World { wanted, forms: ALL }
}

/// What led to a state.
struct Path {
    op: Op,
    before: Option<Rc<Self>>,
}

/// Tells what led to a state in which a rule is broken.
struct Witness<'a>(&'a Op, &'a Option<Rc<Path>>);

impl Drop for Witness<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let (mut path, mut before) = (vec![format!("{:?}", self.0)], self.1);
        while let Some(last) = before {
            path.push(format!("{:?}", last.op));
            before = &last.before;
        }
        path.reverse();
        eprintln!("after {} steps:\n  {}", path.len(), path.join("\n  "));
    }
}

/// Of a million states two have the same by one chance in many millions, and then one is left out.
fn fingerprint(model: &Model) -> u64 {
    let mut hasher = DefaultHasher::new();
    model.hash(&mut hasher);
    hasher.finish()
}

impl Model {
    /// Two states that differ in nothing that can ever be seen become one.
    fn canonical(mut self, op: &Op) -> Self {
        self.mapped.values_mut().for_each(|mapped| mapped.sort());
        self.mapped.retain(|_, mapped| !mapped.is_empty());
        self.pending.sort_by_key(|pending| pending.lease);
        if let Op::Rebind { group } = op {
            // Nobody remembers a number of before.
            self.registrations.remove(group);
        }
        self
    }

    fn count(&self, state: State) -> usize {
        self.holders.values().filter(|holder| holder.state == state).count()
    }

    /// Everything that can happen next.
    fn next(&self, world: &World) -> Vec<Op> {
        let mut ops = vec![Op::Restart { hangs: false }, Op::Restart { hangs: true }];
        // Without a trace of anybody the tenants are the same.
        let is_new = self.holders.is_empty() && self.unproved.is_empty() && self.stale.is_empty();
        for tenant in 0..if is_new { 1 } else { 2 } {
            for (wanted, (handout, space)) in world
                .wanted
                .iter()
                .flat_map(|wanted| world.forms.iter().map(move |form| (wanted.clone(), *form)))
            {
                ops.push(Op::Acquire { tenant, wanted, handout, space });
            }
        }
        for which in 0..self.pending.len() {
            ops.extend((0..3).map(|how| Op::Finish { which, how }));
        }
        let going = self.mapped.values().flatten().filter(|m| m.in_flight.is_some());
        for which in 0..going.count() {
            ops.extend([true, false].map(|ok| Op::Settle { which, ok }));
        }
        for lease in 0..self.count(State::Live) {
            ops.extend(world.wanted.iter().cloned().map(|wanted| Op::Extend { lease, wanted }));
            ops.extend((0..3).map(|keeps| Op::End { lease, keeps }));
            for (page, pages) in [(0, 1), (1, 1), (0, 2), (0, 0)] {
                ops.extend([0, 2, 3].map(|how| Op::Map { lease, page, pages, how }));
            }
            for (page, pages) in [(0, 1), (0, 2)] {
                ops.extend([0, 2, 3].map(|how| Op::Unmap { lease, page, pages, how }));
            }
            let own = self.mapped.values().flatten().filter(|m| !m.by_broker);
            if own.count() == 0 {
                ops.push(Op::OwnMap { lease, page: 0 });
            }
        }
        for lease in 0..self.count(State::Dead) {
            ops.push(Op::Silent { lease });
            // No kernel call fails, one of them does, all do.
            let faults = (1..=6).map(|nth| 1 << nth).chain([0, u16::MAX]);
            ops.extend(faults.map(|faults| Op::Reclaim { lease, faults }));
        }
        for lease in 0..self.holders.len() {
            ops.extend((0..3).map(|keeps| Op::KeeperDies { lease, keeps }));
        }
        for group in 0..GROUPS {
            if self.kept.contains_key(&group) || self.stale.contains_key(&group) {
                ops.push(Op::LetGo { group });
            }
            if self.unproved.contains_key(&group) {
                ops.push(Op::Rebind { group });
            }
        }
        ops
    }
}

/// Goes through a world; how many states there are within so many steps.
fn search(world: &World, depth: usize) -> usize {
    let start = Model::new(SMALL);
    let mut seen = HashSet::from([fingerprint(&start)]);
    let mut states = vec![(start, None)];
    for level in 1..=depth {
        let mut found = Vec::new();
        for (model, before) in &states {
            let mut unchanged = model.clone();
            for op in model.next(world) {
                let witness = Witness(&op, before);
                if !unchanged.step(&op) {
                    continue;
                }
                let next = std::mem::replace(&mut unchanged, model.clone()).canonical(&op);
                if !seen.insert(fingerprint(&next)) {
                    continue;
                }
                // What keepers say is what is here, and there is a way back to nothing.
                next.clone().restart(false);
                next.clone().end_of_the_world();
                drop(witness);
                let path = Rc::new(Path { op, before: before.clone() });
                found.push((next, Some(path)));
            }
        }
        println!("{} states within {level} steps", seen.len());
        states = found;
    }
    seen.len()
}

/// Searches a world to one depth, or to another where there is time, each with the number of states
/// there: fewer are no success.
fn search_to(world: &World, short: (usize, usize), full: (usize, usize)) {
    let (depth, states) = if std::env::var_os(FULL).is_some() { full } else { short };
    assert_eq!(search(world, depth), states, "states within {depth} steps");
}

#[test]
fn no_sequence_of_a_few_requests_breaks_a_rule() {
    search_to(&few(2, 6), (4, 3238), (6, 47_228));
}

#[test]
fn no_sequence_about_a_pf_and_its_vf_breaks_a_rule() {
    search_to(&few(0, 1), (4, 1846), (6, 22_305));
}

#[test]
fn no_sequence_of_all_requests_breaks_a_rule() {
    search_to(&all(2, 6), (3, 2595), (4, 15_168));
}
