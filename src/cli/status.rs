//! `vfio-broker status`: what the broker and its keepers are at.

use super::style::{ago, all_printable, bytes, columns, print, print_json, since};
use super::{Context, Failure};
use crate::protocol::{BrokerStatus, Keeper, PolicyStatus};

/// Show what the broker is at, and each process that keeps leases
///
/// Root sees all of it, and so do those with the right "observe"; those with "manage" see the keepers of
/// their own tenant's leases, and everybody else the version alone.
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(context: &Context, _: &Args) -> Result<(), Failure> {
    let status = context.connect()?.status()?;
    if context.json {
        return Ok(print_json(&status)?);
    }
    Ok(print(&text(&all_printable(status)?))?)
}

fn text(status: &BrokerStatus) -> String {
    let mut lines = vec![["version".to_owned(), status.version.clone()].to_vec()];
    let mut line = |name: &str, what: String| lines.push(vec![name.to_owned(), what]);
    if let Some(pid) = status.launcher {
        line("launcher", format!("pid {pid}, which signals are for"));
    }
    if let (Some(pid), Some(at)) = (status.pid, status.since) {
        line("broker", format!("pid {pid}, since {}", since(at)));
    }
    if let Some(sandbox) = &status.sandbox {
        for (at, part) in sandbox.split("; ").enumerate() {
            line(if at == 0 { "sandbox" } else { "" }, part.to_owned());
        }
    }
    if let Some(count) = status.connections {
        line("connections", count.to_string());
    }
    if let Some(policy) = &status.policy {
        let PolicyStatus { file, read, tenants, .. } = policy;
        line("policy", format!("{file}, {tenants} tenants, read {}", since(*read)));
        if let Some(why) = &policy.refused {
            let at = policy.refused_at.map_or(String::new(), |at| format!("at {}: ", since(at)));
            line("", format!("a later one was refused {at}{why}"));
        }
    }
    if status.pid.is_some() {
        line("keepers", status.keepers.len().to_string());
    }
    let mut text = columns(&lines);
    if !status.keepers.is_empty() {
        let head = ["KEEPER", "PID", "FOR", "MEMORY", "LEASES", "IN A CALL"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        rows.extend(status.keepers.iter().map(row));
        text += &format!("\n{}", columns(&rows));
    }
    for lease in status.keepers.iter().flat_map(|keeper| &keeper.leases) {
        for line in lease.left.iter().flat_map(super::revoke::lines) {
            text += &format!("{} has left {line}\n", lease.lease);
        }
    }
    text
}

fn row(keeper: &Keeper) -> Vec<String> {
    let lease = |lease: &crate::protocol::KeptLease| {
        let ended = if lease.ended { " (ended)" } else { "" };
        // A keeper has the name of its first lease.
        let name =
            if lease.lease == keeper.name { String::new() } else { format!("{} ", lease.lease) };
        format!("{name}{} of {}{ended}", lease.vm, lease.tenant)
    };
    let leases: Vec<_> = keeper.leases.iter().map(lease).collect();
    let memory = match (keeper.memory, keeper.shared) {
        (Some(all), Some(shared)) => format!("{}, {} shared", bytes(all), bytes(shared)),
        (Some(all), None) => bytes(all),
        (None, _) => "unknown".to_owned(),
    };
    let call = match (&keeper.call, &keeper.object, keeper.call_since) {
        (Some(call), Some(object), Some(at)) => format!("{call} on {object}, for {}", ago(at)),
        _ => "-".to_owned(),
    };
    vec![
        keeper.name.clone(),
        if keeper.alive { keeper.pid.to_string() } else { "dead".to_owned() },
        keeper.since.map_or("unknown".to_owned(), ago),
        memory,
        if leases.is_empty() { "-".to_owned() } else { leases.join(", ") },
        call,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::KeptLease;

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        let lease = |lease: &str| KeptLease {
            lease: lease.into(),
            vm: "web1".into(),
            tenant: "a".into(),
            ended: lease == "ff",
            left: Vec::new(),
        };
        let keeper = Keeper {
            name: "0f".into(),
            pid: 7,
            alive: true,
            since: None,
            memory: None,
            shared: None,
            leases: vec![lease("0f"), lease("ff")],
            call: Some("VFIO_IOMMU_MAP_DMA".into()),
            object: Some("0f".into()),
            call_since: Some(0),
        };
        let dead = Keeper {
            alive: false,
            call: None,
            memory: Some(4096),
            shared: Some(0),
            ..keeper.clone()
        };
        let status = BrokerStatus {
            version: "1".into(),
            pid: Some(1),
            since: Some(0),
            launcher: Some(2),
            sandbox: None,
            connections: Some(3),
            policy: None,
            keepers: vec![keeper, dead],
        };
        let text = text(&status);
        let row = text.lines().find(|line| line.starts_with("0f      7 ")).unwrap();
        assert!(row.contains("unknown  unknown"), "{text}");
        assert!(row.contains("web1 of a, ff web1 of a (ended)"), "{text}");
        assert!(row.contains("VFIO_IOMMU_MAP_DMA on 0f, for "), "{text}");
        assert!(text.contains("dead  unknown  4 KiB, 0 B shared "), "{text}");
        let stranger = BrokerStatus {
            pid: None,
            since: None,
            launcher: None,
            connections: None,
            keepers: Vec::new(),
            ..status
        };
        assert_eq!(super::text(&stranger), "version  1\n");
    }
}
