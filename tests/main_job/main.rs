//! The main job, end to end: the daemon as root with a policy, and clients as ordinary users
//! without any capability. Run on the host it uses the simulated kernel; in the lab's guest
//! (`tests/lab/run`) the same binary uses the real one, with real devices doing real DMA.
//!
//! Every client is a process of its own: this binary again, with a role.

// A test harness of its own: to clippy it is a program like any other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../common/children.rs"]
mod children;
mod edu;
mod former;
#[path = "../common/fuse.rs"]
#[allow(dead_code)]
mod fuse;
mod role;
mod story;
#[path = "../common/until.rs"]
mod until;
mod world;

use std::process::ExitCode;
use until::until;

/// What the file system's tests say where they can't be run; here it is needed.
fn skipped(why: &str) {
    panic!("{why}");
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(role::FLAG) {
        return role::play(arguments.collect());
    }
    let world = world::World::start();
    println!("main job: {}", world.kernel);
    let mut passed = 0;
    for (name, step) in story::STEPS {
        println!("--- {name}");
        step(&world);
        passed += 1;
    }
    world.end();
    println!("test result: ok. {passed} passed; 0 failed; 0 ignored; main job, {}", world.kernel);
    ExitCode::SUCCESS
}
