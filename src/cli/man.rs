//! `vfio-broker man`: the manual page, from the one description of the command line.

use super::style::print;
use super::{Cli, Failure};
use clap::CommandFactory;

/// Print the manual page, or that of a subcommand: vfio-broker man | man -l -
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Of this subcommand
    subcommand: Option<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut command = Cli::command();
    command.build();
    if let Some(name) = &args.subcommand {
        let found = command.find_subcommand(name);
        let found = found.ok_or_else(|| Failure::new(format!("no subcommand {name}")))?;
        command = found.clone();
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(print(&String::from_utf8_lossy(&page))?)
}
