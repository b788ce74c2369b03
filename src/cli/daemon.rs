//! `vfio-broker daemon`, hidden: the daemon in this program, so that the demonstration needs no
//! other. It ends with its standard input, so it never outlives who started it.

use super::Failure;
use crate::launcher::{self, Options};
use clap::{CommandFactory, Parser};
use nix::sys::signal::{Signal, kill};
use std::ffi::OsString;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Run as vfio-brokerd until standard input ends (hidden)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Remove this directory then: who started it may have been killed
    #[arg(long)]
    remove: Option<PathBuf>,
    /// What vfio-brokerd takes
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Opens VFIO devices and hands the open files to unprivileged programs
#[derive(Parser)]
#[command(name = "vfio-brokerd", version, no_binary_name = true)]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

/// The daemon's own command line, for its manual page.
pub(super) fn command() -> clap::Command {
    Arguments::command()
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    let arguments = Arguments::parse_from(args.arguments);
    std::thread::spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        if let Some(directory) = args.remove {
            remove(&directory);
        }
        let _ = kill(nix::unistd::getpid(), Signal::SIGTERM);
    });
    launcher::run(&arguments.options).map_err(|error| Failure::new(error.to_string()))
}

/// Removes a directory in which files may still be made.
fn remove(directory: &Path) {
    const TRIES: usize = 10;
    let gone = |error: std::io::Error| error.kind() == ErrorKind::NotFound;
    let mut tries = 0..TRIES;
    while tries.next().is_some() && !std::fs::remove_dir_all(directory).map_or_else(gone, |()| true)
    {
    }
}
