//! Real QEMU, run by an ordinary user without capabilities, with real devices from the broker. Runs in
//! the lab's guest (`tests/lab/run`), on a kernel with iommufd; elsewhere it only says that it does not.
//! `VFIO_QEMU` names another QEMU, `VFIO_HOTPLUG_STEP` a part of the name of the only steps to run.

// A test harness of its own: to clippy it is a program like any other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../common/brokerd.rs"]
mod brokerd;
#[path = "../common/children.rs"]
mod children;
mod examples;
#[path = "../common/guest.rs"]
mod guest;
mod hotplug;
mod libvirt;
mod relay;
#[path = "../common/until.rs"]
mod until;
mod world;

use std::process::ExitCode;
use world::World;

type Step = fn(&World);

const STEPS: [(&str, Step); 10] = [
    ("nothing of VFIO can be opened by the user who runs QEMU", hotplug::no_other_way),
    ("a QEMU that is too old is told so", hotplug::too_old),
    ("in and out, three times over", hotplug::three_times),
    ("two devices on one iommufd, given back one by one", hotplug::two_devices),
    ("attach is killed at each command", hotplug::attach_is_killed),
    ("QEMU is killed at each command of an attach", hotplug::qemu_is_killed),
    ("a device goes between its lease and its plug-in", hotplug::device_goes),
    ("varlinkctl gets QEMU its device", examples::varlinkctl),
    ("libvirt forwards a lease's files to its QEMU", libvirt::through_its_monitor),
    ("the examples run", examples::all),
];

fn main() -> ExitCode {
    if std::env::var_os("LAB_KERNEL").is_none() {
        println!("skipped: this test runs QEMU on the lab's devices; see tests/lab/README.md");
        return ExitCode::SUCCESS;
    }
    let only = std::env::var("VFIO_HOTPLUG_STEP").unwrap_or_default();
    let world = World::start();
    let mut passed = 0;
    for (name, step) in STEPS {
        if !name.contains(&only) {
            continue;
        }
        println!("--- {name}");
        step(&world);
        world.is_clean();
        passed += 1;
    }
    println!("test result: ok. {passed} passed; 0 failed; 0 ignored; real QEMU");
    ExitCode::SUCCESS
}
