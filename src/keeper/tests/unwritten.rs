//! A keeper that can't write its state file.

use super::*;
use crate::process::keeper::Confirm;
use std::path::PathBuf;

/// Has each write of the state file fail until it is dropped.
struct Unwritable(PathBuf);

impl Unwritable {
    fn new(world: &World) -> Self {
        let new = world.place.path().join(NAME).join("state.new");
        std::fs::create_dir(&new).unwrap();
        Self(new)
    }
}

impl Drop for Unwritable {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).unwrap();
    }
}

fn is_unwritten<T: std::fmt::Debug>(result: Result<T, Failure>) {
    let failure = result.unwrap_err();
    assert!(matches!(&failure, Failure::Kernel { call, .. } if call == "create"), "{failure:?}");
}

/// The next broker would take what is only being opened for ended.
#[test]
fn a_lease_is_written_down_as_held_before_it_is_its_holder_s() {
    for handout in [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd] {
        let world = World::new();
        let (keeper, [mut link]) = world.keeper();
        link.open(&wanted(ONE, 2, handout, false)).unwrap();
        let unwritable = Unwritable::new(&world);
        is_unwritten(link.deliver(ONE));
        assert!(world.stats().is_idle(), "{handout:?}: {:#?}", world.stats());
        drop((unwritable, link));
        world.is_over(keeper);
    }
}

#[test]
fn a_confirmation_that_can_not_be_written_down_is_none() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    link.open(&wanted(ONE, 2, Handout::Iommufd, false)).unwrap();
    drop(link.deliver(ONE).unwrap());
    let is_left = || {
        let left = |state: &LeaseState| matches!(state.groups[0].stage, Stage::Unbound(_));
        world.written().is_some_and(|all| all.first().is_some_and(left))
    };
    world.until(is_left);
    let confirm = Confirm { lease: ONE.into(), group: 2, device: bdf(2) };
    let client = UnixStream::pair().unwrap().0;
    let unwritable = Unwritable::new(&world);
    for _ in 0..2 {
        is_unwritten(link.ask_for(&confirm, &client));
        assert!(is_left());
    }
    drop(unwritable);
    assert_eq!(link.ask_for(&confirm, &client).unwrap().state.phase, Phase::Gone);
    drop(link);
    world.is_over(keeper);
}

#[test]
fn no_driver_is_taken_away_before_it_is_written_down_which() {
    for handout in [Handout::Iommufd, Handout::Container] {
        let world = World::new();
        let (keeper, [mut link]) = world.keeper();
        let mut open = wanted(ONE, 2, handout, false);
        open.record.rebind = true;
        link.open(&open).unwrap();
        let (described, files) = link.deliver(ONE).unwrap();
        let registration = || crate::host::registration(&*world.sim.kernel(), bdf(2)).unwrap();
        let before = registration();
        let unwritable = Unwritable::new(&world);
        // Of a container's lease somebody keeps the group: it is taken from them by the driver's end.
        let is_group = |(fd, _): &(Fd, OwnedFd)| fd.kind == FdKind::Group;
        let kept: Vec<_> = described.into_iter().zip(files).filter(is_group).collect();
        let mut why = || {
            let state = link.ask(&Check { lease: ONE.into() }).ok()?.state;
            match &state.groups.first()?.stage {
                Stage::Quarantined(NotFree::Kernel(call, ..)) => Some(call.clone()),
                _ => None,
            }
        };
        let began = Instant::now();
        while why().as_deref() != Some("create") {
            assert!(began.elapsed() < LIMIT, "{handout:?}: it does not say so");
        }
        assert_eq!(registration(), before, "{handout:?}");
        drop(unwritable);
        world.until(|| registration() != before);
        drop((kept, link));
        world.is_over(keeper);
    }
}
