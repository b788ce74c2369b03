//! Single rules, where a random sequence seldom gets to them.

use super::*;

fn acquire(id: u64, tenant: &str, groups: Vec<WantedGroup>) -> super::super::Acquire {
    super::super::Acquire {
        lease: LeaseId(id),
        tenant: tenant.into(),
        vm: "vm".into(),
        uid: 1000,
        pid: 1,
        at: 7,
        handout: Handout::Devices,
        space: Space::Own,
        groups,
        quota: Quota { leases: 9, devices: 99, mappings: 9, mapped_bytes: u64::MAX },
    }
}

fn group(id: u32, devices: u8) -> WantedGroup {
    let devices: Vec<_> = (0..devices).map(|n| model::bdf(id, n)).collect();
    let members = devices.iter().map(|bdf| Member { bdf: *bdf, physfn: None }).collect();
    WantedGroup { id, noiommu: false, members, devices, withhold: Vec::new() }
}

#[test]
fn a_lease_has_fourteen_devices_at_most() {
    let mut ledger = Ledger::default();
    let many = (0..2).map(|id| group(id, 7)).collect();
    ledger.apply(Request::Acquire(acquire(1, "a", many))).unwrap();
    ledger.apply(Request::Commit { lease: LeaseId(1) }).unwrap();
    let quota = acquire(1, "a", Vec::new()).quota;
    let more = Extend { lease: LeaseId(1), groups: vec![group(2, 1)], quota };
    let refusal = ledger.apply(Request::Extend(more)).unwrap_err();
    let limit = "devices of one lease";
    assert_eq!(refusal, Refusal::OverLimit { limit, most: 14, asked: 15 });
}

#[test]
fn a_group_is_opened_once_for_all_its_devices() {
    let mut ledger = Ledger::default();
    let effects = ledger.apply(Request::Acquire(acquire(1, "a", vec![group(3, 2)]))).unwrap();
    let device = |n| Effect::OpenDevice(3, model::bdf(3, n));
    let once = [Effect::OpenSpace, Effect::OpenGroup(3), Effect::Attach(3), device(0), device(1)];
    assert_eq!(effects, once);
}

#[test]
fn mapping_at_the_last_address_is_no_overflow() {
    let mut ledger = Ledger::default();
    let request = acquire(1, "a", vec![group(3, 1)]);
    let quota = request.quota;
    ledger.apply(Request::Acquire(request)).unwrap();
    let lease = LeaseId(1);
    ledger.apply(Request::Commit { lease }).unwrap();
    let mut map = |iova, size| ledger.apply(Request::Map { lease, iova, size, quota });
    assert!(map(u64::MAX - 0xfff, 0x1000).is_ok());
    assert!(matches!(map(u64::MAX - 0xfff, 0x1001), Err(Refusal::Bad { .. })));
    assert!(matches!(map(0, u64::MAX), Err(Refusal::Conflict { .. })));
    assert!(matches!(map(0, 0x1000), Ok(..)));
}

#[test]
fn a_stranger_in_the_container_keeps_newcomers_out() {
    let mut ledger = Ledger::default();
    let space = Space::Shared { name: "dpdk".into(), trust: Trust::Enforced };
    let member = |id: u64| super::super::Acquire {
        space: space.clone(),
        ..acquire(id, "a", vec![group(id as u32, 1)])
    };
    ledger.apply(Request::Acquire(member(1))).unwrap();
    ledger.apply(Request::Commit { lease: LeaseId(1) }).unwrap();
    ledger.apply(Request::End { lease: LeaseId(1), at: 5 }).unwrap();
    let refusal = ledger.apply(Request::Acquire(member(2))).unwrap_err();
    assert!(matches!(refusal, Refusal::NotYet { since: 5, .. }), "{refusal}");
    ledger.apply(Request::Stuck { group: 1, why: busy(), at: 6 }).unwrap();
    let refusal = ledger.apply(Request::Acquire(member(2))).unwrap_err();
    assert!(matches!(refusal, Refusal::Conflict { .. }), "{refusal}");
    ledger.apply(Request::Detached { group: 1 }).unwrap();
    ledger.apply(Request::Freed { group: 1 }).unwrap();
    ledger.apply(Request::Acquire(member(2))).unwrap();
}

#[test]
fn a_restored_lease_is_one_that_has_just_ended() {
    let request = super::super::Acquire {
        handout: Handout::Iommufd,
        space: Space::None,
        ..acquire(1, "a", vec![group(3, 2), group(4, 1)])
    };
    let groups = request.groups.iter().map(|g| (g.id, g.members.clone(), g.devices.clone()));
    let restored = Restored {
        lease: request.lease,
        tenant: request.tenant.clone(),
        vm: request.vm.clone(),
        uid: request.uid,
        pid: request.pid,
        since: request.at,
        at: 9,
        groups: groups.collect(),
    };
    let mut ended = Ledger::default();
    ended.apply(Request::Acquire(request)).unwrap();
    ended.apply(Request::Commit { lease: LeaseId(1) }).unwrap();
    ended.apply(Request::End { lease: LeaseId(1), at: 9 }).unwrap();
    let mut ledger = Ledger::default();
    assert_eq!(ledger.apply(Request::Restore(restored.clone())), Ok(Vec::new()));
    assert_eq!(ledger, ended);
    // It is there already, and so is its group.
    let others = [
        Restored { groups: Vec::new(), ..restored.clone() },
        Restored { lease: LeaseId(2), ..restored },
    ];
    for other in others {
        let refusal = ledger.apply(Request::Restore(other)).unwrap_err();
        assert!(matches!(refusal, Refusal::Conflict { .. }), "{refusal}");
        assert_eq!(ledger, ended);
    }
}
