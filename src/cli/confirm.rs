//! `vfio-broker confirm`: an administrator's word that a device is not open anywhere.

use super::style::{print, print_json, printable};
use super::{Context, EXIT_CODES, Failure};
use crate::protocol::Bdf;

/// Say that nobody has a device open any more, where the kernel can't show it
///
/// A device that was handed out by iommufd may still be open by its own node, which the kernel shows to
/// nobody; so it is kept for its last tenant until it has been off its driver. Your word does instead. A
/// wrong one lets whoever has it open take the device over from its next holder. Only root can say it.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{EXAMPLE}\n\n{EXIT_CODES}"))]
pub(super) struct Args {
    /// The device: 65:00.0 or 0000:65:00.0
    device: String,
}

const EXAMPLE: &str = "\
Example:
  vfio-broker confirm 65:00.0";

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let device = Bdf::typed(&args.device).map_or(args.device.clone(), |bdf| bdf.to_string());
    let confirmed = context.connect()?.confirm(&device)?;
    if context.json {
        return Ok(print_json(&confirmed)?);
    }
    let group = confirmed.group;
    let line = match confirmed.left.is_empty() {
        true => format!("{device} is confirmed: group {group} is free for all"),
        false => {
            let left = confirmed.left.join(" ");
            format!("{device} is confirmed; group {group} still waits for {left}")
        }
    };
    Ok(print(&format!("{}\n", printable(&line)))?)
}
