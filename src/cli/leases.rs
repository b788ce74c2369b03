//! `vfio-broker leases`: who has what.

use super::style::{ago, all_printable, bytes, clock, columns, print, print_json};
use super::{Context, Failure};
use crate::protocol::{Lease, LeaseList, Revocation};

/// List who has what
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(context: &Context, _: &Args) -> Result<(), Failure> {
    let leases = context.connect()?.leases()?;
    if context.json {
        return Ok(print_json(&LeaseList { leases })?);
    }
    if leases.is_empty() {
        return Ok(print("no leases that you may see\n")?);
    }
    let leases = all_printable(leases)?;
    let head = ["LEASE", "VM", "TENANT", "UID", "PID", "HANDOUT", "CONTAINER", "DEVICES", "MAPPED"];
    let mut rows = vec![head.iter().chain(&["FOR"]).map(ToString::to_string).collect()];
    rows.extend(leases.iter().map(row));
    let mut text = columns(&rows);
    for lease in &leases {
        if let Some(why) = &lease.policy {
            text += &format!(
                "{} is no longer allowed, and goes on until it ends: {why}\n",
                lease.lease
            );
        }
    }
    text.extend(leases.iter().filter_map(revoked));
    Ok(print(&text)?)
}

/// What is to be known of one that is being revoked.
fn revoked(lease: &Lease) -> Option<String> {
    let Revocation { force, forced, left, .. } = lease.revoked.as_ref()?;
    let name = &lease.lease;
    if !forced {
        return Some(format!("{name} is being revoked, and is taken at {} UTC\n", clock(*force)));
    }
    let lines = left.iter().flat_map(super::revoke::lines).map(|line| format!("  {line}\n"));
    Some(format!("{name} was revoked, and is not free yet:\n{}", lines.collect::<String>()))
}

fn row(lease: &Lease) -> Vec<String> {
    let mapped = match (lease.mappings, lease.mapped_bytes) {
        (Some(count), Some(size)) => format!("{} in {count}", bytes(size)),
        _ => "by itself".to_owned(),
    };
    let withheld = lease.withheld.iter().map(|device| format!("({device})"));
    let devices: Vec<String> = lease.devices.iter().cloned().chain(withheld).collect();
    let handout = serde_json::to_value(lease.handout).unwrap_or_default();
    vec![
        lease.lease.clone(),
        lease.vm.clone(),
        lease.tenant.clone(),
        lease.uid.to_string(),
        lease.pid.to_string(),
        handout.as_str().unwrap_or_default().to_owned(),
        if lease.container.is_empty() { "-".to_owned() } else { lease.container.clone() },
        devices.join(" "),
        mapped,
        ago(lease.since),
    ]
}
