//! Each step fails in turn, in each way in which it can.

use super::*;
use crate::qemu::{Fault, Guest};
use nix::errno::Errno;
use vfio_broker::qmp::hotplug::Error;
use vfio_broker::sim;

/// How many commands an attach makes, and a detach.
fn commands() -> (usize, usize) {
    let world = World::start();
    world.attach(&nic()).unwrap();
    let attach = world.qemu.model().commands.len();
    world.qemu.disarm();
    world.detach(&Detach::new("web1", NIC)).unwrap();
    (attach, world.qemu.model().commands.len())
}

#[test]
fn what_qemu_refuses_is_undone() {
    let world = World::start();
    for at in 0..commands().0 {
        world.qemu.arm(at, Fault::Refuse);
        let error = world.attach(&nic()).unwrap_err();
        let fails_before_anything_is_there = world.qemu.model().objects.is_empty();
        assert!(fails_before_anything_is_there, "at {at}: {:?}", world.qemu.model().objects);
        assert!(!matches!(error, Error::Left { .. }), "at {at}: {error}");
        world.is_clean();
    }
    world.qemu.disarm();
    world.attach(&nic()).unwrap();
}

#[test]
fn a_conversation_that_breaks_off_leaves_what_the_next_one_clears() {
    let world = World::start();
    let fds = world.broker.settled_fds();
    let faults = [Fault::Garbage, Fault::HangUp { done: false }, Fault::HangUp { done: true }];
    for at in 0..commands().0 {
        for fault in faults {
            // Without the iommufd of the last one.
            world.qemu.model().restart();
            world.qemu.arm(at, fault);
            world.attach(&nic()).unwrap_err();
            world.qemu.disarm();
            recovers(&world);
        }
    }
    world.broker.settles_at(fds);
}

/// The next attach works, or the device is in already; a detach takes it out.
fn recovers(world: &World) {
    match world.attach(&nic()) {
        Ok(_) => {}
        Err(Error::AlreadyThere { .. }) => assert_eq!(world.qemu.model().devices.len(), 1),
        Err(error) => panic!("{error}, after {:?}", world.qemu.model().commands),
    }
    world.detach(&Detach::new("web1", NIC)).unwrap();
    world.is_clean();
}

#[test]
fn a_qemu_that_falls_silent_is_given_up() {
    let world = World::start();
    let (steps, _) = commands();
    // The last before the device, and the device itself.
    for (at, done) in [(steps - 3, false), (steps - 2, false), (steps - 2, true)] {
        world.qemu.model().restart();
        world.qemu.arm(at, Fault::Silence { done });
        let error = world.attach_within(&nic(), Duration::from_secs(3)).unwrap_err();
        let cause = error.cause().to_string();
        assert!(cause.contains("no answer from QEMU"), "{error}");
        assert!(matches!(error, Error::Left { .. }), "{error}");
        assert_eq!(error.to_string().contains("device_add"), at == steps - 2, "{error}");
        world.qemu.disarm();
        recovers(&world);
    }
}

#[test]
fn a_detach_that_breaks_off_is_finished_by_the_next() {
    let world = World::start();
    let (_, steps) = commands();
    let faults = [Fault::Garbage, Fault::HangUp { done: false }, Fault::HangUp { done: true }];
    for at in 0..steps {
        for fault in faults {
            world.qemu.disarm();
            world.attach(&nic()).unwrap();
            world.qemu.arm(at, fault);
            world.detach(&Detach::new("web1", NIC)).unwrap_err();
            world.qemu.disarm();
            match world.detach(&Detach::new("web1", NIC)) {
                // It was the last step that was done.
                Ok(_) | Err(Error::NotAttached { .. }) => {}
                Err(error) => panic!("at {at}, {fault:?}: {error}"),
            }
            world.is_clean();
        }
    }
}

#[test]
fn a_guest_that_keeps_what_is_to_be_undone_keeps_its_lease() {
    let world = World::start();
    world.qemu.model().guest = Guest::Refuses;
    world.qemu.arm(commands().0 - 1, Fault::Refuse);
    let error = world.attach(&nic()).unwrap_err();
    assert!(matches!(error, Error::Left { .. }), "{error}");
    assert!(matches!(error.cause(), Error::NotThere { .. }), "{error}");
    assert_eq!((world.leases(), world.qemu.model().devices.len()), (1, 1));
    world.qemu.disarm();
    world.qemu.model().guest = Guest::LetsGo;
    world.detach(&Detach::new("web1", NIC)).unwrap();
    world.is_clean();
}

/// It is the broker's and QEMU's already when its driver lets go of it.
#[test]
fn a_device_that_vanishes_before_it_is_plugged_in_leaves_nothing() {
    let world = World::start();
    let fds = world.broker.settled_fds();
    let gone = sim::Fault::fail("VFIO_DEVICE_BIND_IOMMUFD", Errno::ENODEV).on(NIC);
    for _ in 0..3 {
        world.broker.sim().fault(&gone).unwrap();
        let error = world.attach(&nic()).unwrap_err();
        assert!(matches!(error, Error::Qemu(_)), "{error}");
        assert!(error.to_string().contains("ENODEV"), "{error}");
        world.is_clean();
    }
    // Now it is gone for everybody, until it is back.
    world.broker.sim().set_driver(NIC, None).unwrap();
    let error = world.attach(&nic()).unwrap_err();
    assert!(matches!(error, Error::Broker(_)), "{error}");
    assert_eq!(world.qemu.model().leftovers(), [""; 0]);
    assert_eq!(world.leases(), 0);
    world.broker.sim().set_driver(NIC, Some("vfio-pci")).unwrap();
    world.attach(&nic()).unwrap();
    world.detach(&Detach::new("web1", NIC)).unwrap();
    world.is_clean();
    world.broker.settles_at(fds);
}

#[test]
fn a_joined_lease_goes_on_when_the_second_device_fails() {
    let world = World::start();
    let [first, second] = PAIR;
    world.attach(&Attach::new("web1", first)).unwrap();
    let error = world.attach(&Attach::new("web1", second).bus("nowhere")).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert_eq!((world.leases(), world.qemu.model().devices.len()), (1, 1));
    world.detach(&Detach::new("web1", first)).unwrap();
    world.is_free(second);
    world.is_clean();
}

#[test]
fn a_second_device_of_a_group_that_did_not_get_in_can_come_again() {
    let world = World::start();
    let [first, second] = PAIR;
    let (one, two) = (Attach::new("web1", first), Attach::new("web1", second));
    world.attach(&one).unwrap();
    let there = world.qemu.model().leftovers();
    world.qemu.disarm();
    world.attach(&two).unwrap();
    let steps = world.qemu.model().commands.len();
    world.detach(&Detach::new("web1", second)).unwrap();
    for at in 0..steps {
        world.qemu.arm(at, Fault::Refuse);
        world.attach(&two).unwrap_err();
        assert_eq!(world.qemu.model().leftovers(), there, "at {at}");
        world.qemu.disarm();
        world.attach(&two).unwrap();
        world.detach(&Detach::new("web1", second)).unwrap();
    }
    world.detach(&Detach::new("web1", first)).unwrap();
    world.is_clean();
}
