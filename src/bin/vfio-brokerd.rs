//! The daemon: opens VFIO devices and hands them out.

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use vfio_broker::launcher;

/// Opens VFIO devices and hands the open files to unprivileged programs
#[derive(Parser)]
#[command(name = "vfio-brokerd", version)]
struct Arguments {
    #[command(flatten)]
    options: launcher::Options,
}

fn main() -> ExitCode {
    match launcher::run(&Arguments::parse().options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody reads it, the exit code has to do.
            let _ = writeln!(std::io::stderr(), "vfio-brokerd: {error}");
            ExitCode::FAILURE
        }
    }
}
