//! The ledger against a plain model: over random sequences of requests, deaths and faults, and over all
//! of them in small worlds.

mod allowed;
mod mapping;
mod model;
mod refusals;
mod restart;
mod rules;
mod search;

use super::*;
use crate::protocol::{Bdf, Handout};
use model::{Keeps, Model};
use proptest::collection::vec;
use proptest::prelude::*;

fn busy() -> NotFree {
    NotFree::GroupOpen { node: "/dev/vfio/1".into() }
}

/// Something that happens. Numbers choose among what there is at the time.
#[derive(Clone, Debug)]
enum Op {
    /// Groups with the devices to use and to withhold, a bit each.
    Acquire {
        tenant: u8,
        wanted: Vec<(u32, u8, u8)>,
        handout: u8,
        space: u8,
    },
    Extend {
        lease: usize,
        wanted: Vec<(u32, u8, u8)>,
    },
    /// An acquisition in flight comes to its end.
    Finish {
        which: usize,
        how: u8,
    },
    Map {
        lease: usize,
        page: u64,
        pages: u64,
        how: u8,
    },
    Unmap {
        lease: usize,
        page: u64,
        pages: u64,
        how: u8,
    },
    /// A mapping in flight comes to its end.
    Settle {
        which: usize,
        ok: bool,
    },
    /// A holder that has the container maps by itself.
    OwnMap {
        lease: usize,
        page: u64,
    },
    End {
        lease: usize,
        keeps: u8,
    },
    /// Each bit is a kernel call that fails.
    Reclaim {
        lease: usize,
        faults: u16,
    },
    /// Whoever kept something of a group closes it.
    LetGo {
        group: u32,
    },
    /// An administrator takes its devices off their driver and binds them again.
    Rebind {
        group: u32,
    },
    /// The broker ends, and the next one takes over.
    Restart {
        hangs: bool,
    },
    KeeperDies {
        lease: usize,
        keeps: u8,
    },
    Silent {
        lease: usize,
    },
}

impl Model {
    /// It happens, and the rules hold. False where it was refused, and nothing has changed.
    fn step(&mut self, op: &Op) -> bool {
        let keeps = |number| match number {
            0 => Keeps::Device,
            1 => Keeps::Group,
            _ => Keeps::Nothing,
        };
        let entered = match *op {
            Op::Acquire { tenant, ref wanted, handout, space } => {
                self.acquire(tenant, wanted, handout, space)
            }
            Op::Extend { lease, ref wanted } => self.extend(lease, wanted),
            _ => true,
        };
        match *op {
            Op::Acquire { .. } | Op::Extend { .. } => {}
            Op::Finish { which, how } => self.finish(which, how),
            Op::Map { lease, page, pages, how } => self.map(lease, page, pages, how),
            Op::Unmap { lease, page, pages, how } => self.unmap(lease, page, pages, how),
            Op::Settle { which, ok } => self.settle(which, ok),
            Op::OwnMap { lease, page } => self.own_map(lease, page),
            Op::End { lease, keeps: number } => self.end(lease, keeps(number)),
            Op::Reclaim { lease, faults } => self.reclaim(lease, faults),
            Op::LetGo { group } => self.let_go(group),
            Op::Rebind { group } => self.rebind(group),
            Op::Restart { hangs } => self.restart(hangs),
            Op::KeeperDies { lease, keeps: number } => self.keeper_dies(lease, keeps(number)),
            Op::Silent { lease } => self.is_silent(lease),
        }
        if entered {
            self.check();
        }
        entered
    }
}

fn wanted() -> impl Strategy<Value = Vec<(u32, u8, u8)>> {
    vec((0..model::GROUPS, 0..4u8, prop_oneof![3 => Just(0u8), 1 => 0..4u8]), 1..3)
}

fn op() -> impl Strategy<Value = Op> {
    let lease = || 0..8usize;
    prop_oneof![
        6 => (0..3u8, wanted(), 0..6u8, 0..5u8)
            .prop_map(|(tenant, wanted, handout, space)| Op::Acquire { tenant, wanted, handout, space }),
        2 => (lease(), wanted()).prop_map(|(lease, wanted)| Op::Extend { lease, wanted }),
        6 => (0..3usize, 0..10u8).prop_map(|(which, how)| Op::Finish { which, how }),
        5 => (lease(), 0..12u64, 0..4u64, 0..4u8)
            .prop_map(|(lease, page, pages, how)| Op::Map { lease, page, pages, how }),
        2 => (lease(), 0..12u64, 0..8u64, 0..4u8)
            .prop_map(|(lease, page, pages, how)| Op::Unmap { lease, page, pages, how }),
        2 => (0..3usize, any::<bool>()).prop_map(|(which, ok)| Op::Settle { which, ok }),
        1 => (lease(), 0..12u64).prop_map(|(lease, page)| Op::OwnMap { lease, page }),
        3 => (lease(), 0..4u8).prop_map(|(lease, keeps)| Op::End { lease, keeps }),
        3 => (lease(), prop_oneof![Just(0u16), any::<u16>()])
            .prop_map(|(lease, faults)| Op::Reclaim { lease, faults }),
        1 => (0..model::GROUPS).prop_map(|group| Op::LetGo { group }),
        1 => (0..model::GROUPS).prop_map(|group| Op::Rebind { group }),
        1 => any::<bool>().prop_map(|hangs| Op::Restart { hangs }),
        1 => (lease(), 0..4u8).prop_map(|(lease, keeps)| Op::KeeperDies { lease, keeps }),
        1 => lease().prop_map(|lease| Op::Silent { lease }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_rules_hold(ops in vec(op(), 1..80)) {
        let mut model = Model::default();
        for op in &ops {
            model.step(op);
        }
        model.end_of_the_world();
    }
}
