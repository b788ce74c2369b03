//! `vfio-broker watch`: what happens to leases, as it happens.

use super::style::print;
use super::{Context, Failure};
use crate::protocol::{Event, EventKind};

/// Show what happens to leases, as it happens
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// This lease only
    lease: Option<String>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    for event in context.connect()?.watch(args.lease.as_deref())? {
        let event = event?;
        let line = if context.json {
            serde_json::to_string(&event).map_err(std::io::Error::from)?
        } else {
            line(context, &event)
        };
        print(&(line + "\n"))?;
    }
    Ok(())
}

fn line(context: &Context, event: &Event) -> String {
    let style = context.style;
    let Event { lease, vm, tenant, devices, .. } = event;
    let what = match event.event {
        EventKind::Acquired => style.green("acquired   "),
        EventKind::Extended => style.green("extended   "),
        EventKind::Released => "released   ".to_owned(),
        EventKind::Gone => style.yellow("gone       "),
        EventKind::Reclaimed => "reclaimed  ".to_owned(),
        EventKind::Quarantined => style.red("quarantined"),
    };
    format!("{what}  {lease}  {vm} of {tenant}  {}", devices.join(" "))
}
