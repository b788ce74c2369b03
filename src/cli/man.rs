//! `vfio-broker man`: the manual pages, from the one description of the command line.

use super::style::print;
use super::{Failure, daemon, visible};
use clap::Command;

/// Print the manual page, or that of a subcommand: vfio-broker man policy check | man -l -
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Of this subcommand, as in `policy check` or `policy-check`; or of `vfio-brokerd`
    subcommand: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let page = page(&args.subcommand.join("-"))?;
    let mut text = Vec::new();
    clap_mangen::Man::new(page).render(&mut text)?;
    // What stands after the options is known to the generator as "extra".
    let text = String::from_utf8_lossy(&text).replace(".SH EXTRA", ".SH \"EXIT STATUS\"");
    Ok(print(&text)?)
}

/// The command of a page, which is called by its words with hyphens between them.
fn page(name: &str) -> Result<Command, Failure> {
    if name == "vfio-brokerd" {
        return Ok(daemon::command());
    }
    let mut whole = visible();
    whole.build();
    let wanted = name.strip_prefix("vfio-broker-").unwrap_or(name);
    if ["", "vfio-broker"].contains(&wanted) {
        return Ok(whole);
    }
    let found = find(&whole, wanted).cloned();
    found.ok_or_else(|| Failure::new(format!("there is no subcommand {name:?}")))
}

fn find<'c>(command: &'c Command, name: &str) -> Option<&'c Command> {
    command.get_subcommands().find_map(|sub| match name.strip_prefix(sub.get_name()) {
        Some("") => Some(sub),
        Some(rest) => find(sub, rest.strip_prefix('-')?),
        None => None,
    })
}
