//! The demonstration's default: a simulated workstation, which is in this program.

use super::setup::Plan;

const TOPOLOGY: &str = include_str!("../../../tests/topologies/workstation.toml");
const POLICY: &str = include_str!("../../../tests/topologies/workstation.policy.toml");

pub(super) fn plan() -> Plan {
    let owned = |devices: &[&str]| devices.iter().map(ToString::to_string).collect();
    Plan {
        title: "on a simulated workstation; nothing of this machine is touched".into(),
        policy: POLICY.into(),
        topology: Some(TOPOLOGY),
        first: owned(&["0000:03:00.0"]),
        second: owned(&["0000:01:00.0", "0000:01:00.1"]),
        denied: Some("0000:06:00.0"),
    }
}
