//! The file, what is wrong with it, and what it decides.

use super::*;
use crate::protocol::{Backend, Bdf, Handout};

/// A machine with three users and two groups.
pub(super) struct Machine;

impl Names for Machine {
    fn uid(&self, user: &str) -> Option<u32> {
        let users = [("root", 0), ("alice", 1000), ("bob", 1001), ("nobody", 65534)];
        users.iter().find(|(name, _)| *name == user).map(|(_, uid)| *uid)
    }

    fn gid(&self, group: &str) -> Option<u32> {
        let groups = [("kvm", 36), ("nogroup", 65534)];
        groups.iter().find(|(name, _)| *name == group).map(|(_, gid)| *gid)
    }
}

fn parse(text: &str) -> Result<Policy, Problems> {
    Policy::parse("/etc/vfio-broker/policy.toml", text, &Machine)
}

pub(super) fn good(text: &str) -> Policy {
    parse(text).unwrap_or_else(|problems| panic!("{problems}"))
}

/// A file of one tenant, alice, with some more lines.
fn alice(more: &str) -> Policy {
    good(&format!("version = 1\n[[tenant]]\nname = \"alice\"\nuser = 1000\n{more}\n"))
}

pub(super) fn peer(uid: u32) -> Peer {
    Peer { uid, gid: uid, groups: vec![uid], pid: 1, unit: None, label: None }
}

pub(super) fn device(bdf: &str, id: &str) -> DeviceFacts {
    let Id(vendor, device) = Id::parse(id).unwrap();
    DeviceFacts {
        bdf: bdf.parse().unwrap(),
        vendor,
        device,
        subsystem_vendor: 0x8086,
        subsystem_device: 0xa01f,
        class: 0x020000,
        physfn: None,
        serial: None,
    }
}

const NIC: &str = "0000:65:00.0";

fn decide(policy: &Policy, facts: &DeviceFacts) -> Decision {
    policy.device(&policy.tenants()[0], facts)
}

#[test]
fn ten_lines_are_a_policy() {
    let policy = good(
        r#"version = 1

[[tenant]]
name = "alice"
user = "alice"
devices = [{ bdf = "0000:65:00.0", id = "8086:10d3" }]

[[deny]]
devices = ["1022:7901"]
reason = "the host boots from it"
"#,
    );
    assert!(policy.warnings().is_empty(), "{}", policy.warnings());
    let tenant = policy.tenant(&peer(1000)).unwrap();
    assert_eq!(tenant.name, "alice");
    assert!(policy.may(tenant, Verb::Acquire).allowed);
    let nic = policy.device(tenant, &device(NIC, "8086:10d3"));
    assert!(nic.allowed);
    assert_eq!(nic.rule, "tenant \"alice\" devices[0], policy.toml:6");
    let denied = policy.device(tenant, &device("0000:02:00.0", "1022:7901"));
    assert_eq!(
        denied,
        Decision {
            allowed: false,
            rule: "deny[0] devices[0], policy.toml:9".into(),
            reason: "0000:02:00.0 (1022:7901) is denied to everybody: the host boots from it"
                .into(),
        }
    );
    assert!(policy.tenant(&peer(0)).is_err(), "root gets nothing by being root");
}

#[test]
fn another_device_at_an_allowed_address_has_its_own_reason() {
    let policy = alice(r#"devices = [{ bdf = "0000:65:00.0", id = "8086:10d3" }]"#);
    let decision = decide(&policy, &device(NIC, "10de:2204"));
    assert!(!decision.allowed);
    assert_eq!(decision.reason, "0000:65:00.0 is allowed as 8086:10d3, but 10de:2204 is there now");
    assert_eq!(decision.rule, "tenant \"alice\" devices[0], policy.toml:5");
}

#[test]
fn defaults_are_few_and_finite() {
    let policy = alice(r#"devices = ["8086:10d3"]"#);
    let tenant = &policy.tenants()[0];
    assert_eq!(tenant.rights(), [Verb::Acquire]);
    assert_eq!(policy.handout(tenant, None), Ok(Handout::Container));
    assert_eq!(policy.backend(tenant, None), Ok(Backend::Type1));
    assert_eq!((tenant.managed, tenant.rebind, tenant.memlock), (false, false, 0));
    assert_eq!(tenant.limits, Limits::default());
    let refused = policy.handout(tenant, Some(Handout::Group)).unwrap_err();
    assert_eq!(refused.rule, "tenant \"alice\" handouts (the default), policy.toml:2");
    for verb in [Verb::Bind, Verb::Manage, Verb::Observe] {
        assert!(!policy.may(tenant, verb).allowed);
    }
    for risk in [Risk::UnsafeInterrupts, Risk::NoIommu] {
        assert!(!policy.risk(tenant, risk).allowed);
    }
    let _: Bdf = NIC.parse().unwrap();
}
