//! QEMU that nobody changed, as an ordinary user without any capability, on real devices: it needs
//! the lab's guest (`tests/lab/run`) and does nothing elsewhere. The guest's devices are emulated by
//! a QEMU outside, the one that is given them runs inside. Other VMMs' ways are tried here too: the
//! example with rust-vmm's crates is this program by another name. `VFIO_QEMU` names another QEMU,
//! `VFIO_QEMU_STEP` a part of the name of the only steps to run.

// A test harness of its own: to clippy it is a program like any other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../common/brokerd.rs"]
mod brokerd;
#[path = "../common/children.rs"]
mod children;
mod dpdk;
#[path = "../common/guest.rs"]
mod guest;
#[path = "../../examples/rust_vmm.rs"]
mod rust_vmm;
mod story;
#[path = "../common/until.rs"]
mod until;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().next().is_some_and(|name| name.ends_with("/rust_vmm")) {
        return rust_vmm::main();
    }
    if std::env::var_os("LAB_KERNEL").is_none() {
        println!("test result: ok. 0 passed; QEMU on real devices needs the lab: see tests/lab");
        return ExitCode::SUCCESS;
    }
    let world = world::World::start();
    let only = std::env::var("VFIO_QEMU_STEP").unwrap_or_default();
    let mut passed = 0;
    for (name, needs_iommufd, step) in story::STEPS {
        if !name.contains(&only) {
            continue;
        }
        if needs_iommufd && !world.has_iommufd {
            println!("--- {name}: not on this kernel, which has no iommufd");
            continue;
        }
        println!("--- {name}");
        step(&world);
        world.is_as_before();
        passed += 1;
    }
    println!("test result: ok. {passed} passed; 0 failed; QEMU on {}", world.kernel);
    ExitCode::SUCCESS
}
