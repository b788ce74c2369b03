//! The daemon: opens VFIO devices and hands them out.

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;
use vfio_broker::daemon;

/// Opens VFIO devices and hands the open files to unprivileged programs
#[derive(Parser)]
#[command(name = "vfio-brokerd", version)]
struct Arguments {
    #[command(flatten)]
    options: daemon::Options,
}

fn main() -> ExitCode {
    if let Some(ended) = daemon::be_process_if_asked() {
        return ended;
    }
    match daemon::run(&Arguments::parse().options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody reads it, the exit code has to do.
            let _ = writeln!(std::io::stderr(), "vfio-brokerd: {error}");
            ExitCode::FAILURE
        }
    }
}
