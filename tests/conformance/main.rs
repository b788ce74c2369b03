//! The conformance suite: the same calls on a real kernel and on the simulated one must read the
//! same, line by line.
//!
//! - `cargo test --test conformance` runs every case on the simulation, once for each kernel that
//!   has been recorded, and compares with what the real one said (`transcripts/`).
//! - In a guest of `tests/lab` (or with `--real`) it runs every case on the kernel it is on, and on
//!   the simulation of that kernel, and compares the two. `--record FILE` writes the real one's.
//!
//! Every case is a process of its own, with a deadline, so that its open files are gone afterwards
//! and a stuck one is seen.

// A test target of its own has no `#[test]` that clippy could know it by.
#![allow(clippy::unwrap_used, clippy::panic)]

mod agent;
mod cases;
mod compare;
mod run;
mod script;

use std::process::ExitCode;

fn main() -> ExitCode {
    if agent::is_wanted() {
        agent::main();
        return ExitCode::SUCCESS;
    }
    let options = run::Options::from_args();
    if let Some(name) = &options.case {
        return run::one(name);
    }
    if options.list {
        for case in cases::all() {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    let passed =
        if options.real { compare::with_real(&options) } else { compare::with_recorded(&options) };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
