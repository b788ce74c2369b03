//! What a refusal says beside no, and that there is one.

use super::*;

/// Alice with a device, and some more lines.
fn with(lines: &str) -> Policy {
    alice(&format!("devices = [\"8086:10d3\"]\n{lines}"))
}

#[test]
fn no_memlock_is_a_refusal_and_no_limit_of_nothing() {
    let memlock = |lines: &str| {
        let policy = with(lines);
        policy.memlock(&policy.tenants()[0])
    };
    assert_eq!(memlock("memlock = \"64KiB\"").ok(), Some(64 << 10));
    let refusal = memlock("").unwrap_err();
    assert_eq!(
        (&*refusal.rule, refusal.line),
        ("tenant \"alice\" without memlock, policy.toml:2", Some(2))
    );
}

#[test]
fn handouts_are_named_as_the_cure_only_where_backends_follow_from_them() {
    let cure = "; `handouts` of its tenant would need one of";
    let backend = |lines: &str| {
        let policy = with(lines);
        let tenant = &policy.tenants()[0];
        policy.backend(tenant, Some(Backend::Iommufd)).unwrap_err().reason
    };
    assert!(backend("").ends_with(&format!("{cure} iommufd")), "{}", backend(""));
    let written = backend("backends = [\"type1\"]");
    assert!(!written.contains(cure), "{written}");
    let policy = with("");
    let refusal = policy.handout(&policy.tenants()[0], Some(Handout::Devices)).unwrap_err();
    assert!(!refusal.reason.contains(cure), "{}", refusal.reason);
}

#[test]
fn of_several_near_misses_the_first_is_told() {
    let first = r#"{ id = "8086:10d3", subsystem = "8086:0000" }"#;
    let second = r#"{ id = "8086:10d3", subsystem = "8086:0001" }"#;
    let policy = alice(&format!("devices = [{first}, {second}]"));
    let reason = decide(&policy, &device(NIC, "8086:10d3")).reason;
    assert!(reason.contains("with subsystem 8086:0000"), "{reason}");
}

#[test]
fn a_lease_s_form_is_permitted_as_a_whole_or_refused_by_the_first_rule_that_it_breaks() {
    let policy = good(
        r#"
version = 1
[[tenant]]
name = "a"
user = 1000
devices = ["8086:10d3"]
handouts = ["container", "devices"]
[[tenant]]
name = "looks"
user = 1001
rights = ["observe"]
handouts = ["devices"]
[[container]]
name = "pool"
members = ["a"]
trust = "mutual"
"#,
    );
    let [a, looks] = policy.tenants() else { panic!() };
    let form = |handout, container| Form { handout, container };
    let refused = |tenant, form| policy.permits(tenant, form).unwrap_err().rule;
    assert_eq!(policy.permits(a, form(Handout::Container, None)), Ok(()));
    assert_eq!(policy.permits(a, form(Handout::Devices, Some(("pool", Trust::Mutual)))), Ok(()));
    let right = refused(looks, form(Handout::Devices, None));
    assert!(right.starts_with("tenant \"looks\" rights"), "{right}");
    let backend = refused(a, form(Handout::Iommufd, None));
    assert!(backend.starts_with("tenant \"a\" backends"), "{backend}");
    let handout = refused(a, form(Handout::Group, None));
    assert!(handout.starts_with("tenant \"a\" handouts"), "{handout}");
    let trust = refused(a, form(Handout::Devices, Some(("pool", Trust::Enforced))));
    assert!(trust.starts_with("container \"pool\" trust"), "{trust}");
    let none = refused(a, form(Handout::Devices, Some(("pond", Trust::Mutual))));
    assert!(none.starts_with("default deny"), "{none}");
}
