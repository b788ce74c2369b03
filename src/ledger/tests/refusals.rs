//! What a refusal says: the model knows only that there is one.

use super::rules::{acquire, group};
use super::*;

#[test]
fn who_wants_a_group_is_told_how_far_it_is_from_free() {
    let mut ledger = Ledger::default();
    let wants = |id| Request::Acquire(acquire(id, "a", vec![group(3, 1)]));
    let (lease, device) = (LeaseId(1), model::bdf(3, 0));
    ledger.apply(wants(1)).unwrap();
    let busy_with = Refusal::Busy { device, group: 3, holder: lease };
    assert_eq!(ledger.apply(wants(2)), Err(busy_with));
    ledger.apply(Request::Commit { lease }).unwrap();
    ledger.apply(Request::End { lease, at: 5 }).unwrap();
    let not_yet = Refusal::NotYet { what: Reclaimed::Device(device), since: 5 };
    assert_eq!(ledger.apply(wants(2)), Err(not_yet));
    ledger.apply(Request::Stuck { group: 3, why: busy(), at: 6 }).unwrap();
    let quarantined = Refusal::Quarantined { device, group: 3, since: 6, why: busy() };
    assert_eq!(ledger.apply(wants(2)), Err(quarantined));
}

#[test]
fn handouts_and_spaces_that_do_not_go_together_are_refused_by_their_names() {
    use Handout::{Container, Devices, Group, Iommufd};
    let pool = |trust| Space::Shared { name: "pool".into(), trust };
    let shared = || pool(Trust::Enforced);
    let asked = |id: u64, handout, space, noiommu| {
        let groups = vec![WantedGroup { noiommu, ..group(id as u32, 1) }];
        let acquire = acquire(id, "a", groups);
        Request::Acquire(super::super::Acquire { handout, space, ..acquire })
    };
    let refused =
        |handout, space, noiommu| Ledger::default().apply(asked(1, handout, space, noiommu)).err();
    for (handout, space) in [
        (Iommufd, Space::None),
        (Group, Space::None),
        (Container, Space::Own),
        (Devices, Space::Own),
        (Devices, shared()),
    ] {
        assert_eq!(refused(handout, space, false), None, "{handout:?}");
    }
    for (handout, space, conflict) in [
        (Iommufd, Space::Own, Conflict::IommufdInContainer),
        (Iommufd, shared(), Conflict::IommufdInContainer),
        (Group, shared(), Conflict::GroupOfSharedContainer),
        (Container, shared(), Conflict::GroupOfSharedContainer),
        (Group, Space::Own, Conflict::OtherSpace),
        (Devices, Space::None, Conflict::OtherSpace),
    ] {
        assert_eq!(refused(handout, space, false), Some(conflict.into()), "{handout:?}");
    }
    // Without an IOMMU devices alone can be handed out, and their container is no other's.
    assert_eq!(refused(Devices, Space::Own, true), None);
    assert_eq!(refused(Container, Space::Own, true), Some(Conflict::NoIommuAsGroup.into()));
    let mut ledger = Ledger::default();
    ledger.apply(asked(1, Devices, shared(), false)).unwrap();
    let container = || "pool".to_owned();
    let mixed = Conflict::MixedContainer { container: container() };
    assert_eq!(ledger.apply(asked(2, Devices, shared(), true)), Err(mixed.into()));
    let other = Conflict::OtherTrust { container: container() };
    assert_eq!(ledger.apply(asked(2, Devices, pool(Trust::Mutual), false)), Err(other.into()));
    ledger.apply(asked(2, Devices, shared(), false)).unwrap();
}
