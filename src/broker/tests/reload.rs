//! Another policy while leases are held.

use super::*;
use crate::sim::Fault;

const NIC: &str = "0000:02:00.0";
const OTHER_NIC: &str = "0000:08:00.0";

/// The policy, with a part of it put in place of another.
fn with(part: &str, instead: &str) -> String {
    assert!(POLICY.contains(part), "{part}");
    POLICY.replacen(part, instead, 1)
}

/// What is said of the only lease that `uid` sees.
fn objection(world: &World, uid: u32) -> Option<String> {
    let mut list = world.broker.leases(&caller(uid)).unwrap().leases;
    assert_eq!(list.len(), 1, "{list:?}");
    list.remove(0).policy
}

#[test]
fn a_lease_that_would_not_be_given_any_more_goes_on_and_says_why() {
    let world = World::new();
    let cases = [
        (
            want(&[NIC]),
            r#""8086:10d3", "1b21:0612", "1b21"#,
            r#""1b21:0612", "1b21"#,
            "no entry for",
        ),
        (
            want_as(Handout::Group, &[NIC]),
            r#"handouts = ["container", "group", "#,
            r#"handouts = ["container", "#,
            "not group",
        ),
        (
            want_in("pool", &[NIC]),
            r#"members = ["a", "b"]"#,
            r#"members = ["b"]"#,
            "among its members",
        ),
        (want_in("friends", &[NIC]), "trust = \"mutual\"\n", "", "had another trust"),
        // The holder of the group's file reaches this one too.
        (
            Acquire { withhold: Some(specs(&["0000:01:00.1"])), ..want(&["0000:01:00.0"]) },
            r#""10de:22ba", "#,
            "",
            "no entry for",
        ),
        (want(&[NIC]), "user = 1000\n", "user = 1000\nrights = [\"observe\"]\n", "right acquire"),
        (want(&[NIC]), "user = 1000\n", "user = 1005\n", "for others than it was"),
        (want(&[NIC]), "name = \"a\"\n", "name = \"z\"\n", "not there any more"),
    ];
    for (request, part, instead, why) in cases {
        let policy = with(part, instead).replace(
            "members = [\"a\", \"b\"]",
            match instead {
                "name = \"z\"\n" => "members = [\"b\"]",
                _ => "members = [\"a\", \"b\"]",
            },
        );
        let grant = world.acquire(1000, &request).unwrap();
        assert_eq!(objection(&world, 1001), None);
        world.reload(&policy);
        let said = objection(&world, 1001).unwrap();
        assert!(said.contains(why) && said.contains("policy.toml"), "{said}");
        // The key is the key still; but nothing is added.
        if grant.reply.handout != Handout::Group {
            world.get_fds(1000, &get_fds(&grant.reply)).unwrap();
        }
        let added = world.acquire(1000, &more(&grant.reply, &[OTHER_NIC])).unwrap_err();
        assert!(matches!(added, Error::Denied { .. }), "{why}: {added}");
        world.reload(POLICY);
        assert_eq!(objection(&world, 1001), None, "it is allowed again");
        world.reload(&policy);
        let held = grant.reply.clone();
        drop(grant);
        assert_eq!(world.release(1000, &held).ok(), Some(true), "{why}");
        world.reload(POLICY);
        world.assert_idle();
    }
}

#[test]
fn a_lease_whose_tenant_is_not_there_any_more_is_nobody_else_s() {
    let mut world = World::new();
    let grant = world.acquire(1002, &want(&[NIC])).unwrap();
    let key = |key: &str| Release { lease: grant.reply.lease.clone(), key: key.into() };
    let other = with("name = \"m\"\nuser = 1002", "name = \"m\"\nuser = 1006");
    for _ in 0..2 {
        world.reload(&other);
        let list = world.broker.leases(&caller(1001)).unwrap().leases;
        assert_eq!(list[0].tenant, "m (by an earlier policy)");
        // Who has its name has not its rights, nor its leases to pay for.
        assert!(!world.broker.shows(&caller(1006), &grant.reply.lease));
        let refused = world.ask_release(1006, &key(""));
        assert!(matches!(refused, Err(Error::NoSuchLease { .. })));
        assert_eq!(world.broker.books().kept_for("m"), 0);
        world.reload(POLICY);
        assert!(world.broker.shows(&caller(1002), &grant.reply.lease));
        assert_eq!(world.broker.books().kept_for("m"), 3);
    }
    // The next broker finds it as this one has it.
    let World { local, broker, keepers, sim, runtime, .. } = world;
    drop((local, broker, runtime));
    let kernel = sim.kernel();
    world = World::on(sim, keepers, &other, Duration::ZERO, kernel);
    world.run(async { world.broker.adopt().await }).unwrap();
    world.run(world.broker.judge_leases());
    assert!(objection(&world, 1001).unwrap().contains("for others"));
    world.until(|| world.broker.books().entries.values().all(|entry| entry.lifelines.get() == 1));
    let key = key(&grant.reply.key);
    assert!(matches!(world.ask_release(1004, &key), Err(Error::Denied { .. })));
    assert_eq!(world.ask_release(1002, &key), Ok(false), "its holder has it open still");
    drop(grant);
    world.retry_reclaims();
    world.assert_idle();
}

#[test]
fn nodes_that_were_left_open_are_kept_from_who_has_their_tenant_s_name() {
    let world = World::new();
    let stale = world.acquire(1000, &want_as(Handout::Iommufd, &[NIC])).unwrap();
    drop(stale);
    world.serve_hang_ups();
    world.until(|| world.broker.books().ledger.unproved().count() == 1);
    world.reload(&with("user = 1000\n", "user = 1006\n"));
    let error = world.acquire(1006, &want(&[NIC])).unwrap_err();
    assert!(matches!(error, Error::Quarantined { .. }), "{error}");
    world.reload(POLICY);
    drop(world.acquire(1000, &want(&[NIC])).unwrap());
    world.serve_hang_ups();
    world.rebind(NIC);
    world.assert_idle();
    assert!(world.broker.books().owners.len() <= 1, "owners are forgotten with their leases");
}

#[test]
fn who_waits_is_answered_by_the_policy_of_now() {
    let world = World::patient();
    let mut last = world.acquire(1001, &want(&[NIC])).unwrap();
    let stale: Vec<_> = last.fds.drain(..last.fds.len() - 1).collect();
    drop(last);
    world.until(|| world.broker.books().ledger.has_ending());
    let waits = world.begin(1000, &want(&[NIC]));
    world.run(tokio::task::yield_now());
    assert!(!waits.is_finished());
    world.reload(&with("user = 1000\n", "user = 1000\nrights = [\"observe\"]\n"));
    let error = world.run(waits).unwrap().unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    let waits = world.begin(1000, &want(&[NIC]));
    let denied = world.run(waits).unwrap().unwrap_err();
    assert!(matches!(denied, Error::Denied { .. }), "{denied}");
    drop(stale);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn what_is_being_opened_is_given_by_the_policy_of_now() {
    let world = World::new();
    for (policy, is_given) in [
        (with("user = 1000\n", "user = 1005\n"), false),
        (with(r#""8086:10d3", "1b21:0612", "1b21"#, r#""1b21:0612", "1b21"#), false),
        (with("leases = 5", "leases = 4"), true),
    ] {
        world.sim.fault(Fault::never("VFIO_GROUP_GET_DEVICE_FD")).unwrap();
        let begun = world.begin(1000, &want_as(Handout::Devices, &[NIC]));
        world.until(|| world.stats().held > 0);
        world.reload(&policy);
        world.sim.clear_faults().unwrap();
        match world.run(begun).unwrap() {
            Ok(_) => assert!(is_given),
            Err(error) => assert!(!is_given && matches!(error, Error::Denied { .. }), "{error}"),
        }
        world.serve_hang_ups();
        world.assert_idle();
        world.reload(POLICY);
    }
}

#[test]
fn quotas_are_those_of_now_and_count_what_is_held() {
    let world = World::new();
    let first = world.acquire(1000, &want(&[NIC])).unwrap();
    world.reload(&with("leases = 5", "leases = 1"));
    let error = world.acquire(1000, &want(&[OTHER_NIC])).unwrap_err();
    assert!(matches!(error, Error::OverLimit { .. }), "{error}");
    world.reload(&with("leases = 5", "leases = 2"));
    drop(world.acquire(1000, &want(&[OTHER_NIC])).unwrap());
    drop(first);
    world.serve_hang_ups();
    world.assert_idle();
}
