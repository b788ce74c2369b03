//! `vfio-broker attach` and `detach` are killed with SIGKILL at each command in turn, before it is
//! done and after.

use super::*;
use crate::qemu::Fault;
use std::process::Stdio;
use vfio_broker::qmp::hotplug::Error;

#[test]
fn an_attach_that_is_killed_anywhere_is_cleared_by_the_next() {
    let world = World::start();
    let fds = world.broker.settled_fds();
    world.attach(&nic()).unwrap();
    let steps = world.qemu.model().commands.len();
    world.detach(&Detach::new("web1", NIC)).unwrap();
    for at in 0..steps {
        for done in [false, true] {
            // Without the iommufd of the last one.
            world.qemu.model().restart();
            kill_at(&world, "attach", NIC, at, done);
            match world.attach(&nic()) {
                Ok(_) => {}
                Err(Error::AlreadyThere { .. }) => assert_eq!(world.qemu.model().devices.len(), 1),
                Err(error) => panic!("killed at {at}, done {done}: {error}"),
            }
            world.detach(&Detach::new("web1", NIC)).unwrap();
            world.is_clean();
        }
    }
    world.broker.settles_at(fds);
}

/// The second one joins the lease of the first, which goes on whatever becomes of it.
#[test]
fn an_attach_of_a_groups_second_device_that_is_killed_anywhere_is_cleared_by_the_next() {
    let world = World::start();
    let fds = world.broker.settled_fds();
    let [first, second] = PAIR;
    let (one, two) = (Attach::new("web1", first), Attach::new("web1", second));
    world.attach(&one).unwrap();
    world.qemu.disarm();
    world.attach(&two).unwrap();
    let steps = world.qemu.model().commands.len();
    world.detach(&Detach::new("web1", first)).unwrap();
    world.detach(&Detach::new("web1", second)).unwrap();
    for at in 0..steps {
        for done in [false, true] {
            world.qemu.model().restart();
            world.attach(&one).unwrap();
            kill_at(&world, "attach", second, at, done);
            match world.attach(&two) {
                Ok(_) => {}
                Err(Error::AlreadyThere { .. }) => assert_eq!(world.qemu.model().devices.len(), 2),
                Err(error) => panic!("killed at {at}, done {done}: {error}"),
            }
            world.detach(&Detach::new("web1", second)).unwrap();
            // The other way round: the next attempt is at something else.
            kill_at(&world, "attach", second, at, done);
            world.detach(&Detach::new("web1", first)).unwrap();
            match world.detach(&Detach::new("web1", second)) {
                Ok(_) | Err(Error::NotAttached { .. }) => {}
                Err(error) => panic!("killed at {at}, done {done}: {error}"),
            }
            world.is_clean();
            world.is_free(second);
        }
    }
    world.broker.settles_at(fds);
}

#[test]
fn the_lease_of_an_attach_that_was_killed_ends_with_qemu() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    let steps = world.qemu.model().commands.len();
    world.qemu.model().restart();
    for at in 0..steps {
        kill_at(&world, "attach", NIC, at, true);
        world.qemu.model().restart();
        until("the lease has ended", || world.leases() == 0);
        world.is_free(NIC);
    }
}

#[test]
fn a_detach_that_is_killed_anywhere_is_finished_by_the_next() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    world.qemu.disarm();
    world.detach(&Detach::new("web1", NIC)).unwrap();
    let steps = world.qemu.model().commands.len();
    for at in 0..steps {
        for done in [false, true] {
            world.qemu.disarm();
            world.attach(&nic()).unwrap();
            kill_at(&world, "detach", NIC, at, done);
            match world.detach(&Detach::new("web1", NIC)) {
                Ok(_) | Err(Error::NotAttached { .. }) => {}
                Err(error) => panic!("killed at {at}, done {done}: {error}"),
            }
            world.is_clean();
        }
    }
}

fn kill_at(world: &World, what: &str, device: &str, at: usize, done: bool) {
    world.qemu.arm(at, Fault::Silence { done });
    let socket = text(world.qemu.path());
    let words = [what, "--vm", "web1", "--qmp", socket, "--device", device];
    let mut child =
        vfio_broker(world, &words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    world.qemu.faulty();
    child.kill().unwrap();
    child.wait().unwrap();
    world.qemu.disarm();
}
