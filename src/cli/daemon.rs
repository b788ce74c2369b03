//! `vfio-broker daemon`, hidden: the daemon in this program, so that the demonstration needs no
//! other. It ends with its standard input, so it never outlives who started it.

use super::Failure;
use crate::daemon::{self, Options};
use clap::Parser;
use nix::sys::signal::{Signal, kill};
use std::ffi::OsString;
use std::io::Read;

/// Run as vfio-brokerd until standard input ends (hidden)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What vfio-brokerd takes
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

#[derive(Parser)]
#[command(name = "vfio-brokerd", no_binary_name = true)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    let arguments = Arguments::parse_from(args.arguments);
    std::thread::spawn(|| {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = kill(nix::unistd::getpid(), Signal::SIGTERM);
    });
    daemon::run(&arguments.options).map_err(|error| Failure::new(error.to_string()))
}
