//! The policies beside the topologies: whoever runs them may have something that can be acquired as
//! the machine stands, and is denied something. And the policies in the documentation are good.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::sync::Arc;
use vfio_broker::host::Host;
use vfio_broker::kernel::Kernel;
use vfio_broker::policy::{Peer, Policy, Risk, Verb};
use vfio_broker::sim::{Sim, Topology};
use vfio_broker::users::SystemUsers;

fn peer(uid: u32) -> Peer {
    Peer { uid, gid: uid, groups: vec![uid], pid: 1, unit: None, label: None }
}

fn read(name: &str, end: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/topologies");
    std::fs::read_to_string(path.join(format!("{name}{end}"))).unwrap()
}

fn check(name: &str) {
    let policy = Policy::parse(name, &read(name, ".policy.toml"), &SystemUsers)
        .unwrap_or_else(|problems| panic!("{problems}"));
    let sim = Sim::start(Topology::from_toml(&read(name, ".toml")).unwrap()).unwrap();
    let kernel: Arc<dyn Kernel> = sim.kernel();
    let host = Host::scan(kernel.as_ref()).unwrap();

    for uid in [0, 1000, 1001, 65534] {
        let tenant = policy.tenant(&peer(uid)).unwrap();
        assert!(policy.may(tenant, Verb::Acquire).allowed);
        let may = |group: &vfio_broker::host::Group| {
            group.is_viable() && (!group.noiommu || policy.risk(tenant, Risk::NoIommu).allowed)
        };
        let has = host.devices().any(|(group, device)| {
            device.on_vfio && may(group) && policy.device(tenant, &device.facts).allowed
        });
        assert!(has, "{name}: uid {uid} may have nothing");
        let denied = host.devices().map(|(_, d)| policy.device(tenant, &d.facts));
        let denied = denied.filter(|decision| decision.rule.starts_with("deny["));
        assert!(denied.count() > 0, "{name}: uid {uid} is denied nothing");
    }
    // What is listed is there: every entry allows some device.
    for tenant in policy.tenants() {
        for entry in 0..tenant.devices().count() {
            let rule = format!("tenant {:?} devices[{entry}],", tenant.name);
            let used = host.devices().any(|(_, device)| {
                let decision = policy.device(tenant, &device.facts);
                decision.allowed && decision.rule.starts_with(&rule)
            });
            assert!(used, "{name}: {rule} allows nothing that is there");
        }
    }
}

#[test]
fn workstation() {
    check("workstation");
}

#[test]
fn sriov() {
    check("sriov");
}

#[test]
fn noiommu() {
    check("noiommu");
}

#[test]
fn large() {
    check("large");
}

/// The user names of the examples; their numbers do not matter.
struct Anybody;

impl vfio_broker::policy::Names for Anybody {
    fn uid(&self, user: &str) -> Option<u32> {
        Some(if user == "root" { 0 } else { 1000 })
    }

    fn gid(&self, _: &str) -> Option<u32> {
        Some(36)
    }
}

#[test]
fn examples_in_the_documentation_are_good() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/policy.md");
    let text = std::fs::read_to_string(path).unwrap();
    let examples: Vec<&str> =
        text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(examples.len() >= 6, "the examples have gone");
    for example in examples {
        let policy = Policy::parse("docs/policy.md", example, &Anybody)
            .unwrap_or_else(|problems| panic!("{problems}"));
        let expected = usize::from(example.contains("anyone = true"));
        assert_eq!(policy.warnings().iter().count(), expected, "{}", policy.warnings());
    }
}
