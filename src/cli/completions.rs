//! `vfio-broker completions`: completions for a shell, from the one description of the command
//! line.

use super::style::print;
use super::{Failure, visible};

/// Print completions for a shell
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// For this shell
    shell: clap_complete::Shell,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut visible(), "vfio-broker", &mut script);
    // For bash, the hyphen in the program's name is taken for the space before a subcommand in some
    // of the generated labels and not in others, and those never meet.
    let script = String::from_utf8_lossy(&script).replace("vfio__subcmd__broker", "vfio__broker");
    Ok(print(&script)?)
}
