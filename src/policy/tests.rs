//! What a policy decides.

mod problems;
mod properties;
mod refusals;

use super::*;

use crate::pci::{DeviceFacts, Id};
use crate::protocol::{Backend, Handout};

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
            file: "policy.toml".into(),
            line: Some(9),
            device: Some("0000:02:00.0".parse().unwrap()),
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
}

/// Each: the tenant's lines, the device, and the first words of the rule that decides.
#[test]
fn devices_are_decided_by_the_rule_that_says_so() {
    let vf = DeviceFacts {
        physfn: Some("0000:3b:00.0".parse().unwrap()),
        ..device("0000:3b:10.0", "8086:10ca")
    };
    let serial =
        |serial: &str| DeviceFacts { serial: Some(serial.into()), ..device(NIC, "8086:10d3") };
    let nic = device(NIC, "8086:10d3");
    let no = |rule| (false, rule);
    let yes = |rule| (true, rule);
    let narrow = r#"devices = [{ id = "8086:10d3", serial = "00-1B-21-ff-ff-a0-c3-01" }]"#;
    let cases = [
        (r#"devices = ["0000:65:00.0"]"#, nic.clone(), yes("devices[0]")),
        (r#"devices = ["0000:65:00.0"]"#, device("0000:65:00.1", "8086:10d3"), no("devices")),
        (r#"devices = ["0001:65:00.0"]"#, nic.clone(), no("devices")),
        (r#"devices = ["10de:2204", "8086:10d3"]"#, nic.clone(), yes("devices[1]")),
        (r#"devices = ["8086:10d3"]"#, device(NIC, "8086:10d4"), no("devices")),
        (
            r#"devices = [{ id = "8086:10D3", subsystem = "8086:A01F" }]"#,
            nic.clone(),
            yes("devices[0]"),
        ),
        (
            r#"devices = [{ id = "8086:10d3", subsystem = "8086:0000" }]"#,
            nic.clone(),
            no("devices[0]"),
        ),
        (
            r#"devices = [{ bdf = "0000:65:00.0", subsystem = "8086:0000" }]"#,
            nic.clone(),
            no("devices[0]"),
        ),
        (narrow, serial("00-1b-21-ff-ff-a0-c3-01"), yes("devices[0]")),
        (narrow, serial("00-1b-21-ff-ff-a0-c3-02"), no("devices[0]")),
        (narrow, nic.clone(), no("devices[0]")),
        (r#"devices = [{ vf_of = "0000:3b:00.0" }]"#, vf.clone(), yes("devices[0]")),
        (
            r#"devices = [{ vf_of = "0000:3b:00.0" }]"#,
            device("0000:3b:00.0", "8086:10c9"),
            no("devices"),
        ),
        (r#"devices = [{ vf_of = "0000:3b:00.1" }]"#, vf.clone(), no("devices")),
        (
            r#"devices = [{ vf_of = "0000:3b:00.0", id = "8086:1520" }]"#,
            vf.clone(),
            no("devices[0]"),
        ),
        // The entry that nearly fits does not keep a later one from fitting.
        (
            r#"devices = [{ bdf = "0000:65:00.0", id = "8086:10d4" }, "8086:10d3"]"#,
            nic.clone(),
            yes("devices[1]"),
        ),
        ("devices = [\"8086:10d3\"]\ndeny = [\"0000:65:00.0\"]", nic.clone(), no("deny[0]")),
        (
            "devices = [\"0000:65:00.0\"]\ndeny = [\"1022:1001\", \"8086:10d3\"]",
            nic.clone(),
            no("deny[1]"),
        ),
        (
            "devices = [\"8086:10ca\"]\ndeny = [{ vf_of = \"0000:3b:00.0\" }]",
            vf.clone(),
            no("deny[0]"),
        ),
        // To deny a PF says nothing about its VFs.
        ("devices = [\"8086:10ca\"]\ndeny = [\"0000:3b:00.0\"]", vf, yes("devices[0]")),
        // What narrows a deny and can't be read does not weaken it.
        (
            "devices = [\"8086:10d3\"]\ndeny = [{ id = \"8086:10d3\", serial = \"00-1b-21-ff-ff-a0-c3-01\" }]",
            nic.clone(),
            no("deny[0]"),
        ),
        (
            "devices = [\"8086:10d3\"]\ndeny = [{ id = \"8086:10d3\", serial = \"00-1b-21-ff-ff-a0-c3-01\" }]",
            serial("00-1b-21-ff-ff-a0-c3-02"),
            yes("devices[0]"),
        ),
        ("rights = [\"observe\"]", nic, no("devices (the default)")),
    ];
    for (lines, facts, (allowed, rule)) in cases {
        let decision = decide(&alice(lines), &facts);
        let named = decision.rule.starts_with(&format!("tenant \"alice\" {rule}, policy.toml:"));
        assert!(decision.allowed == allowed && named, "{lines}\n{facts:?}\n{decision:?}");
    }
}

#[test]
fn a_near_miss_says_what_differs() {
    let reason = |lines: &str, facts: &DeviceFacts| decide(&alice(lines), facts).reason;
    let nic = device(NIC, "8086:10d3");
    assert_eq!(
        reason(r#"devices = [{ id = "8086:10d3", subsystem = "8086:0000" }]"#, &nic),
        "a 8086:10d3 is allowed with subsystem 8086:0000, but that of 0000:65:00.0 is 8086:a01f"
    );
    assert_eq!(
        reason(r#"devices = [{ id = "8086:10d3", serial = "00-1b-21-ff-ff-a0-c3-01" }]"#, &nic),
        "a 8086:10d3 is allowed with serial 00-1b-21-ff-ff-a0-c3-01, but 0000:65:00.0 shows none"
    );
    assert_eq!(
        reason(r#"devices = ["10de:2204"]"#, &nic),
        "tenant \"alice\" has no entry for 0000:65:00.0 (8086:10d3)"
    );
}

/// Each: the matchers, the peer, whether it is the tenant.
#[test]
fn all_matchers_that_are_given_must_match() {
    let from = |unit: Option<&str>, label: Option<&str>| Peer {
        unit: unit.map(Into::into),
        label: label.map(Into::into),
        ..peer(1000)
    };
    let member = Peer { groups: vec![7, 36], ..peer(1000) };
    let primary = Peer { gid: 36, groups: vec![], ..peer(1000) };
    let svirt = "label = \"system_u:system_r:svirt_t\"";
    let unit = "unit = \"vm.service\"";
    let overflow = "user = 65534\naccept = [\"overflow-uid\"]";
    let nobody = Peer { gid: 65534, groups: vec![65534, 36], ..peer(65534) };
    let cases = [
        ("user = \"alice\"", peer(1000), true),
        ("user = 1000", peer(1001), false),
        ("user = [\"bob\", 1000]", peer(1000), true),
        ("user = 1000", peer(0), false),
        ("user = 0", peer(0), true),
        ("group = \"kvm\"", member.clone(), true),
        ("group = 36", primary, true),
        ("group = 36", peer(1000), false),
        ("group = 36\nuser = 1000", peer(1000), false),
        ("group = 36\nuser = 1001", member.clone(), false),
        ("group = 36\nuser = 1000", member, true),
        (unit, from(Some("vm.service"), None), true),
        (unit, from(Some("vm2.service"), None), false),
        (unit, from(None, None), false),
        (svirt, from(None, Some("system_u:system_r:svirt_t")), true),
        (svirt, from(None, Some("system_u:system_r:svirt_t:s0:c1,c2")), true),
        (svirt, from(None, Some("system_u:system_r:svirt_tcg_t:s0")), false),
        (svirt, from(None, Some("system_u:system_r")), false),
        (svirt, from(None, None), false),
        ("anyone = true", peer(4711), true),
        ("anyone = true", peer(0), true),
        ("anyone = true", peer(65534), false),
        ("anyone = true", peer(u32::MAX), false),
        ("group = 36", nobody.clone(), false),
        (unit, Peer { unit: Some("vm.service".into()), ..nobody.clone() }, false),
        (overflow, nobody, true),
        (overflow, peer(1000), false),
    ];
    for (matchers, peer, matches) in cases {
        let text =
            format!("version = 1\n[[tenant]]\nname = \"t\"\nrights = [\"observe\"]\n{matchers}");
        let policy = good(&text);
        assert_eq!(policy.tenant(&peer).is_ok(), matches, "{matchers} {peer:?}");
    }
}

#[test]
fn the_first_tenant_that_matches_counts_and_no_match_is_a_no() {
    let policy = good(
        r#"version = 1
[[tenant]]
name = "vms"
user = 1000
unit = "vm.service"
devices = ["8086:10d3"]
[[tenant]]
name = "alice"
user = 1000
rights = ["observe"]
"#,
    );
    let in_unit = Peer { unit: Some("vm.service".into()), ..peer(1000) };
    assert_eq!(policy.tenant(&in_unit).unwrap().name, "vms");
    assert_eq!(policy.tenant(&peer(1000)).unwrap().name, "alice");
    let refusal = policy.tenant(&peer(1001)).unwrap_err();
    assert_eq!(refusal.rule, "default deny, policy.toml");
    assert_eq!(refusal.reason, "no tenant is for gid 1001, uid 1001");
    let refusal = policy.tenant(&peer(65534)).unwrap_err();
    assert!(refusal.reason.contains("overflow-uid"), "{refusal}");
}

#[test]
fn rights_risks_and_handouts_are_what_the_file_lists() {
    let policy = alice(
        r#"devices = ["8086:10d3"]
rights = ["acquire", "observe"]
handouts = ["devices", "group"]
accept = ["no-iommu"]
managed = true
memlock = "2GiB"
[tenant.limits]
connections = 10
mapped_bytes = "512MiB"
"#,
    );
    let tenant = &policy.tenants()[0];
    let verbs = [Verb::Acquire, Verb::Bind, Verb::Manage, Verb::Observe];
    assert_eq!(verbs.map(|verb| policy.may(tenant, verb).allowed), [true, false, false, true]);
    assert_eq!(policy.may(tenant, Verb::Bind).rule, "tenant \"alice\" rights, policy.toml:6");
    assert!(policy.risk(tenant, Risk::NoIommu).allowed);
    assert!(!policy.risk(tenant, Risk::UnsafeInterrupts).allowed);
    assert_eq!(policy.handout(tenant, None), Ok(Handout::Devices));
    assert_eq!(policy.handout(tenant, Some(Handout::Group)), Ok(Handout::Group));
    let refused = policy.handout(tenant, Some(Handout::Container)).unwrap_err();
    assert_eq!(refused.reason, "tenant \"alice\" may have handouts devices, group, not container");
    assert_eq!(policy.backend(tenant, None), Ok(Backend::Type1));
    assert!(policy.backend(tenant, Some(Backend::Iommufd)).is_err());
    assert!(tenant.managed && !tenant.rebind);
    assert_eq!(tenant.memlock, 2 << 30);
    let limits = Limits { connections: 10, mapped_bytes: 512 << 20, ..Limits::default() };
    assert_eq!(tenant.limits, limits);
}

#[test]
fn backends_and_handouts_follow_from_each_other() {
    let of = |lines: &str| {
        let policy = alice(&format!("devices = [\"8086:10d3\"]\n{lines}"));
        let tenant = &policy.tenants()[0];
        (tenant.backends().to_vec(), tenant.handouts().to_vec())
    };
    let (type1, iommufd) = (Backend::Type1, Backend::Iommufd);
    assert_eq!(of("handouts = [\"iommufd\"]"), (vec![iommufd], vec![Handout::Iommufd]));
    assert_eq!(
        of("backends = [\"iommufd\", \"type1\"]"),
        (vec![iommufd, type1], vec![Handout::Iommufd, Handout::Container])
    );
    assert_eq!(
        of("handouts = [\"group\", \"iommufd\", \"devices\"]"),
        (vec![type1, iommufd], vec![Handout::Group, Handout::Iommufd, Handout::Devices])
    );
}

#[test]
fn only_members_join_a_shared_container() {
    let policy = good(
        r#"version = 1
[[tenant]]
name = "a"
user = 1000
devices = ["8086:10d3"]
handouts = ["devices"]
[[tenant]]
name = "b"
user = 1001
devices = ["8086:10d3"]
[[container]]
name = "pool"
members = ["a"]
[[container]]
name = "dpdk"
trust = "mutual"
members = ["a", "b"]
"#,
    );
    let [a, b] = policy.tenants() else { panic!() };
    let pool = policy.container(a, "pool").unwrap();
    assert_eq!((pool.trust, &pool.members), (Trust::Enforced, &vec!["a".to_owned()]));
    assert_eq!(policy.container(b, "dpdk").unwrap().trust, Trust::Mutual);
    // Whether there is a container of that name is not told to those who may not join it.
    let refused = policy.container(b, "pool").unwrap_err();
    let none = policy.container(b, "pond").unwrap_err();
    assert_eq!(refused.reason.replace("pool", "pond"), none.reason);
    assert_eq!(refused.rule, none.rule);
}

#[test]
fn a_refusal_says_in_fields_where_the_rule_is_and_which_device_it_is_about() {
    let policy = alice(r#"devices = ["8086:10d3"]"#);
    let decision = decide(&policy, &device(NIC, "10de:2204"));
    let refusal = decision.clone().ok().unwrap_err();
    assert_eq!((&refusal.rule, &refusal.reason), (&decision.rule, &decision.reason));
    let line = refusal.line.unwrap();
    assert!(refusal.rule.ends_with(&format!(", {}:{line}", refusal.file)), "{}", refusal.rule);
    assert_eq!(refusal.device, Some(NIC.parse().unwrap()));
    let right = policy.may(&policy.tenants()[0], Verb::Observe).ok().unwrap_err();
    assert_eq!((right.device, right.line.is_some()), (None, true));
    let nobody = policy.tenant(&peer(4711)).unwrap_err();
    assert_eq!((nobody.device, nobody.line), (None, None));
    assert_eq!(decide(&policy, &device(NIC, "8086:10d3")).ok(), Ok(()));
}

#[test]
fn a_tenant_means_the_same_where_others_come_before_it() {
    let tenant = |name: &str, user: u32| {
        format!("[[tenant]]\nname = \"{name}\"\nuser = {user}\ndevices = [\"8086:10d3\"]\n")
    };
    let (a, b, c) = (tenant("a", 1000), tenant("b", 1001), tenant("c", 1002));
    let policy = |tenants: &[&String]| {
        let all: String = tenants.iter().map(|tenant| tenant.as_str()).collect();
        parse(&format!("version = 1\n{all}")).unwrap()
    };
    let words = policy(&[&a, &b]).principals("b").unwrap();
    assert!(policy(&[&a, &b]).means("b", &words));
    assert!(policy(&[&c, &a, &b]).means("b", &words), "some were taken away");
    assert!(policy(&[&a, &c, &b]).means("b", &words));
    assert!(!policy(&[&b]).means("b", &words), "it means those of \"a\" too");
    assert!(!policy(&[&c, &b]).means("b", &words));
    assert!(!policy(&[&a]).means("b", &words), "there is none");
    assert!(!policy(&[&a, &tenant("b", 1003)]).means("b", &words));
}

#[test]
fn root_and_the_broker_s_own_user_are_administrators() {
    for (uid, brokers, is_one) in
        [(0, 0, true), (0, 990, true), (990, 990, true), (1000, 990, false), (1000, 0, false)]
    {
        assert_eq!(administers(uid, brokers), is_one, "{uid} where it runs as {brokers}");
    }
    assert!(!administers(OVERFLOW_ID, OVERFLOW_ID));
}

/// The launcher compiles it, and broker and keepers go by what it has written down.
#[test]
fn a_compiled_policy_is_the_same_when_it_was_written_down_and_read() {
    let text = r#"
version = 1
[[deny]]
devices = ["0000:01:00.0"]
reason = "the host's"
[[tenant]]
name = "vms"
user = "alice"
group = "kvm"
rights = ["acquire", "observe"]
devices = [
    { bdf = "0000:65:00.0", id = "8086:10d3", serial = "00-11-22-33-44-55-66-77" },
    { vf_of = "0000:3b:00.0" },
    "10de:2684",
]
handouts = ["devices", "iommufd"]
accept = ["unsafe-interrupts"]
memlock = "1GiB"
[tenant.limits]
leases = 3
[[container]]
name = "pool"
members = ["vms"]
trust = "mutual"
"#;
    let policy = parse(text).unwrap();
    let read: Policy = serde_json::from_slice(&serde_json::to_vec(&policy).unwrap()).unwrap();
    let shown = |policy: &Policy| {
        let bare = Policy { warnings: Problems::default(), ..policy.clone() };
        format!("{bare:?}")
    };
    assert_eq!(shown(&read), shown(&policy));
}
