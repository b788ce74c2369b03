//! `vfio-broker revoke --qmp`: QEMU is asked, and what it does not give back is taken.

use super::*;
use crate::qemu::Guest;
use serde_json::Value;
use std::process::Output;

/// Everybody may end the leases of the one tenant.
fn world() -> World {
    World::with_policy(&format!("{POLICY}rights = [\"acquire\", \"manage\", \"observe\"]\n"))
}

fn revoke(world: &World, lease: &str, grace: &str) -> Output {
    let qmp = text(world.qemu.path());
    let words = ["revoke", lease, "--grace", grace, "--qmp", qmp, "--json"];
    vfio_broker(world, &words).output().unwrap()
}

fn said(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[test]
fn a_guest_that_lets_go_gives_the_lease_back_in_time() {
    let world = world();
    let [first, second] = PAIR;
    let lease = world.attach(&Attach::new("web1", first)).unwrap().lease;
    world.attach(&Attach::new("web1", second)).unwrap();
    world.attach(&nic()).unwrap();
    let revoked = revoke(&world, &lease, "1h");
    assert_eq!(said(&revoked)["forced"], false, "{revoked:?}");
    assert_eq!(said(&revoked)["lease"], *lease);
    // What is of another lease stays.
    let model = world.qemu.model();
    assert_eq!(model.devices.keys().collect::<Vec<_>>(), ["vfio-0000-65-00.0"]);
    drop(model);
    assert_eq!(world.leases(), 1);
}

#[test]
fn what_a_guest_keeps_is_taken_when_the_time_is_over() {
    for guest in [Guest::Refuses, Guest::Keeps] {
        let world = world();
        world.qemu.model().guest = guest;
        let lease = world.attach(&nic()).unwrap().lease;
        let revoked = revoke(&world, &lease, "1");
        assert_eq!(said(&revoked)["forced"], true, "{revoked:?}");
        let why = String::from_utf8(revoked.stderr).unwrap();
        assert!(why.contains("guest"), "{why}");
        assert_eq!(world.qemu.model().devices.len(), 1, "nobody can take it out of there");
    }
}

#[test]
fn a_qemu_without_devices_of_the_lease_changes_nothing() {
    let world = world();
    let request = Acquire::new("web1").device(OTHER).backend(Backend::Iommufd);
    let lease = world.client().acquire(request).unwrap();
    world.attach(&nic()).unwrap();
    for grace in ["1h", "0"] {
        let revoked = revoke(&world, lease.id(), grace);
        assert!(!revoked.status.success() && revoked.stdout.is_empty(), "{revoked:?}");
        assert!(world.client().leases().unwrap().iter().all(|lease| lease.revoked.is_none()));
    }
    assert_eq!(world.leases(), 2);
}
