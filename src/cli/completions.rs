//! `vfio-broker completions`: completions for a shell, from the one description of the command
//! line.

use super::style::print;
use super::{Cli, Failure};
use clap::CommandFactory;

/// Print completions for a shell
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// For this shell
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vfio-broker", &mut script);
    Ok(print(&String::from_utf8_lossy(&script))?)
}
