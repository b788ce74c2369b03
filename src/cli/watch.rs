//! `vfio-broker watch`: what happens to leases, as it happens.

use super::style::{all_printable, clock, complain, print, print_json_line};
use super::{Context, Failure};
use crate::client;
use crate::protocol::{Event, EventKind};
use std::collections::BTreeSet;
use std::io::IsTerminal;

/// Show what happens to leases, as it happens; times are in UTC
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// This lease only, until all of it has been taken back
    lease: Option<String>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let events = context.connect()?.watch(args.lease.as_deref())?;
    if std::io::stderr().is_terminal() {
        complain("watching\n");
    }
    // What the lease has had and not been taken back yet, once it has ended.
    let mut left: Option<BTreeSet<String>> = None;
    for event in events {
        let event = match event {
            Err(client::Error::Lost { .. }) => return Err(Failure::gone()),
            event => event?,
        };
        if context.json {
            print_json_line(&event)?;
        } else {
            print(&(line(context, &all_printable(event.clone())?) + "\n"))?;
        }
        match event.event {
            EventKind::Released | EventKind::Gone => left = Some(devices(&event)),
            EventKind::Reclaimed => {
                let left = left.get_or_insert_default();
                left.retain(|device| !event.devices.contains(device));
                if args.lease.is_some() && left.is_empty() {
                    return Ok(());
                }
            }
            EventKind::Acquired
            | EventKind::Extended
            | EventKind::Quarantined
            | EventKind::Pause
            | EventKind::Force => {}
        }
    }
    Err(Failure::gone())
}

fn devices(event: &Event) -> BTreeSet<String> {
    event.devices.iter().cloned().collect()
}

fn line(context: &Context, event: &Event) -> String {
    let style = context.style;
    let Event { lease, vm, tenant, devices, at, .. } = event;
    let what = match event.event {
        EventKind::Acquired => style.green("acquired   "),
        EventKind::Extended => style.green("extended   "),
        EventKind::Released => "released   ".to_owned(),
        EventKind::Gone => style.yellow("gone       "),
        EventKind::Reclaimed => "reclaimed  ".to_owned(),
        EventKind::Quarantined => style.red("quarantined"),
        EventKind::Pause => style.yellow("pause      "),
        EventKind::Force => style.red("force      "),
    };
    let until =
        event.until.map_or(String::new(), |at| format!(", to be given back by {}", clock(at)));
    format!("{}  {what}  {lease}  {vm} of {tenant}  {}{until}", clock(*at), devices.join(" "))
}
