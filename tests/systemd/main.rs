//! The units of `dist/` under a real systemd: the lab's guest whose first program it is
//! (`tests/run systemd`), with a QEMU and a client of ours that have devices through all of it.
//!
//! `VFIO_PROGRAMS` is the directory of the programs to install, those of the release.

// A test harness of its own: to clippy it is a program like any other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../common/brokerd.rs"]
mod brokerd;
#[path = "../common/children.rs"]
mod children;
#[path = "../common/copies.rs"]
mod copies;
#[path = "../main_job/edu.rs"]
mod edu;
#[path = "../common/guest.rs"]
mod guest;
#[path = "../qemu/world.rs"]
#[allow(dead_code, unused_imports)]
mod qemu;
mod story;
#[path = "../common/until.rs"]
mod until;
mod world;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::var_os("LAB_KERNEL").is_none() {
        println!("test result: ok. 0 passed; SKIPPED, the units need a systemd: tests/run systemd");
        return ExitCode::SUCCESS;
    }
    let first = std::fs::read_to_string("/proc/1/comm").unwrap();
    assert_eq!(first.trim(), "systemd", "this guest has another first program: see VFIO_LAB_ROOT");
    let mut world = world::World::install();
    for (name, step) in story::STEPS {
        println!("--- {name}");
        step(&mut world);
    }
    println!("test result: ok. {} passed; 0 failed; systemd", story::STEPS.len());
    ExitCode::SUCCESS
}
