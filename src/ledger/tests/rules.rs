//! Single rules, where a random sequence seldom gets to them.

use super::*;

pub(super) fn acquire(id: u64, tenant: &str, groups: Vec<WantedGroup>) -> super::super::Acquire {
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

pub(super) fn group(id: u32, devices: u8) -> WantedGroup {
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
    assert!(matches!(map(u64::MAX - 0xfff, 0x1001), Err(Refusal::Bad(Bad::RangeTooLong))));
    assert!(matches!(map(0, u64::MAX), Err(Refusal::Conflict(..))));
    assert!(matches!(map(0, 0x1000), Ok(..)));
}

#[test]
fn an_unmap_that_leaves_the_last_byte_of_a_mapping_cuts_it() {
    let mut ledger = Ledger::default();
    let request = acquire(1, "a", vec![group(3, 1)]);
    let (lease, quota) = (request.lease, request.quota);
    for request in [
        Request::Acquire(request),
        Request::Commit { lease },
        Request::Map { lease, iova: 0x1000, size: 0x1001, quota },
        Request::MapDone { lease, iova: 0x1000, made: true },
    ] {
        ledger.apply(request).unwrap();
    }
    let mut unmap = |size| ledger.apply(Request::Unmap { lease, iova: 0x1000, size });
    assert!(matches!(unmap(0x1000), Err(Refusal::Bad(Bad::CutsMapping { .. }))));
    assert_eq!(unmap(0x1001), Ok(vec![Effect::Unmap { iova: 0x1000, size: 0x1001 }]));
}

#[test]
fn a_device_that_is_kept_for_its_last_tenant_counts_once_against_its_quota() {
    let mut ledger = Ledger::default();
    let asked = |id, number, devices| {
        let request = by_iommufd(id, vec![group(number, 1)]);
        let quota = Quota { devices, ..request.quota };
        Request::Acquire(super::super::Acquire { quota, ..request })
    };
    let lease = LeaseId(1);
    ledger.apply(asked(1, 3, 1)).unwrap();
    ledger.apply(Request::Commit { lease }).unwrap();
    ledger.apply(Request::End { lease, at: 8 }).unwrap();
    let left = [(model::bdf(3, 0), 7)].into();
    ledger.apply(Request::Unbound { group: 3, at: 9, left }).unwrap();
    let over = Refusal::OverLimit { limit: "devices", most: 1, asked: 2 };
    assert_eq!(ledger.apply(asked(2, 4, 1)), Err(over));
    // Acquired again it counts as what is held, and no second time.
    ledger.apply(asked(2, 3, 1)).unwrap();
    ledger.apply(asked(3, 4, 2)).unwrap();
}

#[test]
fn a_container_has_members_until_the_last_of_them_is_gone() {
    let mut ledger = Ledger::default();
    let space = Space::Shared { name: "dpdk".into(), trust: Trust::Enforced };
    let member = super::super::Acquire { space, ..acquire(1, "a", vec![group(1, 1)]) };
    let lease = member.lease;
    assert!(!ledger.has_members("dpdk"));
    ledger.apply(Request::Acquire(member)).unwrap();
    assert!(ledger.has_members("dpdk") && !ledger.has_members("other"));
    ledger.apply(Request::Commit { lease }).unwrap();
    assert!(!ledger.has_ending());
    ledger.apply(Request::End { lease, at: 5 }).unwrap();
    assert!(ledger.has_members("dpdk") && ledger.has_ending());
    ledger.apply(Request::Detached { group: 1 }).unwrap();
    ledger.apply(Request::Freed { group: 1 }).unwrap();
    assert!(!ledger.has_members("dpdk") && !ledger.has_ending());
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
    assert!(matches!(refusal, Refusal::Conflict(..)), "{refusal}");
    ledger.apply(Request::Detached { group: 1 }).unwrap();
    ledger.apply(Request::Freed { group: 1 }).unwrap();
    ledger.apply(Request::Acquire(member(2))).unwrap();
}

#[test]
fn leases_are_listed_in_the_order_of_their_names_from_any_of_them_on() {
    let mut ledger = Ledger::default();
    for id in [2, 1, 3] {
        ledger.apply(Request::Acquire(acquire(id, "a", vec![group(id as u32, 1)]))).unwrap();
    }
    let after = |id| ledger.leases_after(id).map(|lease| lease.id.0).collect::<Vec<_>>();
    assert_eq!(after(None), [1, 2, 3]);
    assert_eq!(after(Some(LeaseId(1))), [2, 3]);
    assert!(after(Some(LeaseId(3))).is_empty());
}

/// A lease as its keeper has it.
fn adopted(request: &super::super::Acquire, held: bool) -> Adopted {
    let group = |g: &WantedGroup| AdoptedGroup {
        id: g.id,
        attached: false,
        members: g.members.clone(),
        unbound: None,
    };
    let devices = |g: &WantedGroup| {
        let id = g.id;
        g.devices.clone().into_iter().map(move |bdf| Handed { bdf, group: id, withheld: false })
    };
    Adopted {
        lease: request.lease,
        tenant: request.tenant.clone(),
        vm: request.vm.clone(),
        uid: request.uid,
        pid: request.pid,
        since: request.at,
        handout: request.handout,
        space: request.space.clone(),
        noiommu: false,
        held,
        at: 9,
        devices: request.groups.iter().flat_map(devices).collect(),
        groups: request.groups.iter().map(group).collect(),
        is_mapped: false,
    }
}

#[test]
fn a_lease_s_name_is_sixteen_lower_case_hexadecimal_digits() {
    assert_eq!(LeaseId(0xab).to_string(), "00000000000000ab");
    for id in [0, 0xab, u64::MAX].map(LeaseId) {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    for odd in
        ["", "ab", "00000000000000AB", "000000000000ag00", "000000000000000ab", "+0000000000000ab"]
    {
        assert_eq!(odd.parse::<LeaseId>(), Err(NotALeaseId), "{odd}");
    }
}

#[test]
fn a_group_whose_devices_go_out_by_their_own_nodes_is_looked_at_and_not_kept_open() {
    let mut ledger = Ledger::default();
    let effects = ledger.apply(Request::Acquire(by_iommufd(1, vec![group(3, 1)]))).unwrap();
    let device = model::bdf(3, 0);
    assert_eq!(effects, [Effect::OpenIommufd, Effect::CheckGroup(3), Effect::OpenCdev(3, device)]);
    // Until it is committed it is being added.
    let lease = ledger.lease(LeaseId(1)).unwrap();
    let adding: Vec<_> = lease.adding().map(|handed| handed.bdf).collect();
    assert_eq!((adding, lease.devices.len()), (vec![device], 0));
}

fn by_iommufd(id: u64, groups: Vec<WantedGroup>) -> super::super::Acquire {
    super::super::Acquire {
        handout: Handout::Iommufd,
        space: Space::None,
        ..acquire(id, "a", groups)
    }
}

#[test]
fn an_adopted_lease_is_as_it_was() {
    let request = by_iommufd(1, vec![group(3, 2), group(4, 1)]);
    let (live, ended) = (adopted(&request, true), adopted(&request, false));
    let mut expected = Ledger::default();
    expected.apply(Request::Acquire(request)).unwrap();
    expected.apply(Request::Commit { lease: LeaseId(1) }).unwrap();
    for (adopted, end) in [(live, false), (ended, true)] {
        if end {
            expected.apply(Request::End { lease: LeaseId(1), at: 9 }).unwrap();
        }
        let mut ledger = Ledger::default();
        assert_eq!(ledger.apply(Request::Adopt(adopted.clone())), Ok(Vec::new()));
        assert_eq!(ledger, expected);
        // It is there already, and so is its group.
        let others = [
            Adopted { groups: Vec::new(), ..adopted.clone() },
            Adopted { lease: LeaseId(2), ..adopted },
        ];
        for other in others {
            let refusal = ledger.apply(Request::Adopt(other)).unwrap_err();
            assert!(matches!(refusal, Refusal::Conflict(..)), "{refusal}");
            assert_eq!(ledger, expected);
        }
    }
}

#[test]
fn a_group_that_was_unbound_is_its_tenants_alone_and_may_be_in_its_lease() {
    let mut ledger = Ledger::default();
    let old = by_iommufd(1, vec![group(3, 2), group(4, 1)]);
    let mut ended = adopted(&old, false);
    let left = [(model::bdf(3, 0), 7)];
    ended.groups[0].unbound = Some(left.into());
    let next = adopted(&by_iommufd(2, vec![group(3, 1)]), true);
    for known in [Request::Adopt(next), Request::Adopt(ended)] {
        ledger.apply(known).unwrap();
    }
    assert_eq!(ledger.group(3).unwrap().lease, LeaseId(2));
    let unproved = ledger.unproved_group(3).unwrap();
    assert_eq!((unproved.lease, unproved.left.clone()), (LeaseId(1), left.into()));
    assert!(!ledger.is_open_to(3, "b") && ledger.is_open_to(3, "a"));
    // Of the other group it is not known yet.
    let lease = ledger.lease(LeaseId(1)).unwrap();
    assert_eq!((lease.phase, lease.devices.len()), (Phase::Ending, 1));
    // One of which only that is left is no lease any more.
    let mut over = adopted(&by_iommufd(5, vec![group(5, 1)]), false);
    over.groups[0].unbound = Some([(model::bdf(5, 0), 7)].into());
    ledger.apply(Request::Adopt(over)).unwrap();
    assert!(ledger.lease(LeaseId(5)).is_none() && !ledger.is_open_to(5, "b"));
}

#[test]
fn what_is_mapped_for_an_adopted_lease_counts() {
    let mut ledger = Ledger::default();
    let request = acquire(1, "a", vec![group(3, 1)]);
    let quota = Quota { mappings: 2, ..request.quota };
    ledger.apply(Request::Adopt(adopted(&request, true))).unwrap();
    let lease = LeaseId(1);
    let mappings = vec![(0, 0x1000), (0x2000, 0x1000)];
    ledger.apply(Request::Mapped { lease, mappings: mappings.clone() }).unwrap();
    // To be told twice changes nothing.
    let before = ledger.clone();
    ledger.apply(Request::Mapped { lease, mappings }).unwrap();
    assert_eq!(ledger, before);
    let mut map = |iova, quota| ledger.apply(Request::Map { lease, iova, size: 0x1000, quota });
    assert!(matches!(map(0x2000, quota), Err(Refusal::Conflict(..))));
    assert!(matches!(map(0x1000, quota), Err(Refusal::OverLimit { most: 2, .. })));
    let unmap = Request::Unmap { lease, iova: 0, size: 0x3000 };
    assert_eq!(ledger.apply(unmap).unwrap().len(), 2);
}

#[test]
fn a_lease_that_is_another_tenant_s_now_counts_against_that_one() {
    let mut ledger = Ledger::default();
    let one = |id, tenant| {
        let request = acquire(id, tenant, vec![group(id as u32, 1)]);
        let quota = Quota { leases: 1, ..request.quota };
        Request::Acquire(super::super::Acquire {
            quota,
            handout: Handout::Iommufd,
            space: Space::None,
            ..request
        })
    };
    ledger.apply(one(1, "a")).unwrap();
    let over = |refused| matches!(refused, Err(Refusal::OverLimit { limit: "leases", .. }));
    assert!(over(ledger.apply(one(2, "a"))));
    let rename = Request::Rename { lease: LeaseId(1), tenant: "b".into() };
    ledger.apply(rename).unwrap();
    assert!(over(ledger.apply(one(3, "b"))));
    ledger.apply(one(2, "a")).unwrap();
    ledger.apply(Request::Commit { lease: LeaseId(1) }).unwrap();
    ledger.apply(Request::End { lease: LeaseId(1), at: 8 }).unwrap();
    // What it leaves is kept for whom it is by then.
    let left = [(model::bdf(1, 0), 7)].into();
    ledger.apply(Request::Unbound { group: 1, at: 9, left }).unwrap();
    assert!(ledger.is_open_to(1, "b") && !ledger.is_open_to(1, "a"));
    let kept: Vec<_> = ledger.unproved().map(|(group, left)| (group, &*left.tenant)).collect();
    assert_eq!(kept, [(1, "b")]);
    ledger.apply(Request::Rename { lease: LeaseId(1), tenant: "a".into() }).unwrap();
    assert!(ledger.is_open_to(1, "a") && !ledger.is_open_to(1, "b"));
    // One that is not there is no reason to refuse.
    let before = ledger.clone();
    ledger.apply(Request::Rename { lease: LeaseId(9), tenant: "c".into() }).unwrap();
    assert_eq!(ledger, before);
}

#[test]
fn a_group_that_is_not_handed_over_after_all_can_be_the_last_to_leave_a_container() {
    let space = Space::Shared { name: "dpdk".into(), trust: Trust::Enforced };
    let member = |id: u64| super::super::Acquire {
        space: space.clone(),
        ..acquire(id, "a", vec![group(id as u32, 1)])
    };
    let (first, second) = (LeaseId(1), LeaseId(2));
    let (devices, groups) = (vec![model::bdf(2, 0)], vec![2]);
    let ways = [
        vec![Request::Abort { lease: second }],
        vec![
            Request::Commit { lease: second },
            Request::Retract { lease: second, devices, groups },
        ],
    ];
    for undone in ways {
        let mut ledger = Ledger::default();
        let quota = member(1).quota;
        let before = [
            Request::Acquire(member(1)),
            Request::Commit { lease: first },
            Request::Map { lease: first, iova: 0, size: 0x1000, quota },
            Request::MapDone { lease: first, iova: 0, made: true },
            Request::Acquire(member(2)),
            Request::End { lease: first, at: 5 },
            Request::UnmapDone { lease: first, iova: 0, gone: false },
            Request::Detached { group: 1 },
            Request::Freed { group: 1 },
        ];
        for request in before {
            ledger.apply(request).unwrap();
        }
        assert_eq!(ledger.lease(first).unwrap().mapped(), Some((1, 0x1000)));
        for request in undone {
            ledger.apply(request).unwrap();
        }
        assert_eq!(
            ledger,
            Ledger::default(),
            "the kernel has forgotten the mapping with the group"
        );
    }
}

#[test]
fn an_ended_lease_of_which_only_a_mapping_is_left_is_adopted_with_it() {
    let request = super::super::Acquire {
        space: Space::Shared { name: "dpdk".into(), trust: Trust::Enforced },
        ..acquire(1, "a", Vec::new())
    };
    let lease = request.lease;
    let ended = Adopted { is_mapped: true, ..adopted(&request, false) };
    let mut ledger = Ledger::default();
    ledger.apply(Request::Adopt(ended.clone())).unwrap();
    ledger.apply(Request::Mapped { lease, mappings: vec![(0, 0x1000)] }).unwrap();
    // It counts, and nobody else gets the range.
    let member = super::super::Acquire {
        groups: vec![group(2, 1)],
        space: request.space.clone(),
        ..acquire(2, "a", Vec::new())
    };
    let quota = member.quota;
    ledger.apply(Request::Adopt(Adopted { lease: LeaseId(2), ..adopted(&member, true) })).unwrap();
    let map = Request::Map { lease: LeaseId(2), iova: 0, size: 0x1000, quota };
    let overlap = ledger.apply(map).unwrap_err();
    assert!(matches!(overlap, Refusal::Conflict(Conflict::Overlap { is_foreign: true, .. })));
    ledger.apply(Request::UnmapDone { lease, iova: 0, gone: true }).unwrap();
    assert!(ledger.lease(lease).is_none());
    // As it is where its keeper has undone it by now.
    let mut ledger = Ledger::default();
    ledger.apply(Request::Adopt(ended)).unwrap();
    ledger.apply(Request::NothingMapped { lease }).unwrap();
    assert_eq!(ledger, Ledger::default());
}
