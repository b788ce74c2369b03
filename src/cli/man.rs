//! `vfio-broker man`: the manual pages, from the one description of the command line.

use super::style::print;
use super::{Failure, daemon, visible};
use clap::Command;

/// Print the manual page, or that of a subcommand
///
/// To read one: vfio-broker man policy check | man -l -
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Of this subcommand, as in `policy check` or `policy-check`; or of `vfio-brokerd`
    subcommand: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let page = page(&args.subcommand.join("-"))?;
    Ok(print(&written(page)?)?)
}

/// The generator's page, but for the sections that it knows too little of: a synopsis as in a usage
/// line, and what stands after the options.
fn written(mut page: Command) -> std::io::Result<String> {
    let usage = page.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").to_owned();
    let after = page.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (lists, version) = (page.has_subcommands(), page.get_version().is_some());
    let man =
        clap_mangen::Man::new(page).source(concat!("vfio-broker ", env!("CARGO_PKG_VERSION")));

    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    section(&mut text, "SYNOPSIS", &usage);
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if lists {
        man.render_subcommands_section(&mut text)?;
    }
    for part in after.split("\n\n").filter(|part| !part.is_empty()) {
        match part.split_once('\n') {
            Some(("Examples:" | "Example:", lines)) => section(&mut text, "EXAMPLES", lines),
            _ => {
                let codes = part.trim_start_matches("Exit codes: ").trim_end_matches('.');
                section(&mut text, "EXIT STATUS", &codes.replace("; ", "\n"));
            }
        }
    }
    if version {
        man.render_version_section(&mut text)?;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A section whose lines stay as they are.
fn section(text: &mut Vec<u8>, title: &str, lines: &str) {
    let escaped = lines.replace('\\', "\\e").replace('-', "\\-");
    // What begins with a dot or an apostrophe would be a command.
    let lines: Vec<_> = escaped.lines().map(|line| format!("\\&{line}\n")).collect();
    text.extend(format!(".SH \"{title}\"\n.nf\n{}.fi\n", lines.concat()).bytes());
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
