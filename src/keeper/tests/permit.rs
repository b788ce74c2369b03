//! A broker that was taken over: it asks for what it likes, for whom it likes. The client of these tests is
//! this process.

use super::*;
use crate::policy::Policy;
use crate::process::keeper::Memlock;
use std::cell::RefCell;

/// The client may have the first device as such files, and `more`; another tenant both.
fn policy(more: &str) -> String {
    let uid = nix::unistd::geteuid().as_raw();
    format!(
        "version = 1\n[[tenant]]\nname = \"a\"\nuser = {uid}\ndevices = [\"0000:02:00.0\"]\n{more}\n\
         [[tenant]]\nname = \"b\"\nuser = 4242\n\
         devices = [\"0000:02:00.0\", \"0000:08:00.0\"]\nhandouts = [\"container\", \"iommufd\"]\n"
    )
}

const CONTAINERS: &str = "handouts = [\"container\", \"devices\"]";

fn put(world: &World, text: &str) -> Policy {
    let policy = Policy::parse("policy.toml", text, &()).unwrap();
    let new = world.directory.path().join("new");
    std::fs::write(&new, serde_json::to_vec(&policy).unwrap()).unwrap();
    std::fs::rename(new, world.directory.path().join("policy")).unwrap();
    policy
}

fn judged(world: &World, text: &str) -> (JoinHandle<()>, Asker) {
    let policy = put(world, text);
    let path = world.directory.path().join("policy");
    let file = std::fs::File::open(&path).unwrap();
    let judge = PolicyInForce::new(path, &file, Arc::new(policy)).unwrap();
    let (keeper, [link]) = world.keeper_judged(Some(RefCell::new(judge)));
    (keeper, link)
}

/// By which rule it is denied.
fn rule<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
    match result {
        Err(Failure::Denied(refusal)) => format!("{}: {}", refusal.rule, refusal.reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_the_policy_gives_the_client_is_opened() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(CONTAINERS));
    let opened = link.open(&wanted(ONE, 2, Handout::Container, false)).unwrap();
    // Whose it is, is not what the broker says.
    assert_eq!(opened.state.record.uid, nix::unistd::geteuid().as_raw());
    let (_, files) = link.deliver(ONE).unwrap();
    assert_eq!(files.len(), 3);
    drop((files, link));
    world.is_over(keeper);
}

#[test]
fn what_the_policy_denies_the_client_is_not_opened_whatever_the_broker_says() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(CONTAINERS));
    let before = world.stats();
    // A device that is another tenant's alone, in its own name and in the other's.
    let call = wanted(ONE, 8, Handout::Container, false);
    assert!(rule(link.open(&call)).contains("no entry for 0000:08:00.0"));
    let mut call = wanted(ONE, 2, Handout::Container, false);
    call.record.tenant = "b".into();
    assert!(rule(link.open(&call)).contains("default deny"));
    // A form that the client may not have, and a container that it is no member of.
    assert!(rule(link.open(&wanted(ONE, 2, Handout::Iommufd, false))).contains("handouts"));
    assert!(rule(link.open(&wanted(ONE, 2, Handout::Devices, true))).contains("shared container"));
    // Steps that are about something else than the lease.
    for step in [
        Step::OpenGroup(8),
        Step::CheckGroup(8),
        Step::Attach(8),
        Step::OpenDevice(8, bdf(8)),
        Step::OpenDevice(2, bdf(8)),
        Step::OpenCdev(2, bdf(2)),
        Step::OpenIommufd,
    ] {
        let mut call = wanted(ONE, 2, Handout::Container, false);
        call.steps.push(step);
        let bad = link.open(&call).unwrap_err();
        assert!(
            matches!(&bad, Failure::Bad { field, .. } if field == "steps"),
            "{step:?}: {bad:?}"
        );
    }
    // A device of which the broker says that it is in the group that is given.
    let mut call = wanted(ONE, 2, Handout::Container, false);
    call.record.devices[0].group = 8;
    call.steps = vec![Step::OpenContainer, Step::OpenGroup(8), Step::Attach(8)];
    call.groups[0].id = 8;
    call.deliver_groups = vec![8];
    assert!(matches!(link.open(&call), Err(Failure::Moved { .. })));
    // A group's file where the form is devices.
    let mut call = wanted(ONE, 2, Handout::Devices, false);
    call.deliver_groups = vec![2];
    assert!(matches!(link.open(&call), Err(Failure::Bad { .. })));
    assert_eq!(world.stats(), before);
    drop(link);
    world.is_over(keeper);
}

#[test]
fn nothing_is_opened_without_a_client() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(CONTAINERS));
    let call = wanted(ONE, 2, Handout::Container, false);
    let (file, _) = crate::kernel::Mapped::memfd(4096).unwrap();
    link.send(&call, &[file.as_fd()]);
    let failure = link.answer::<Open>().unwrap_err();
    assert!(matches!(failure, Failure::Kernel { .. }), "{failure:?}");
    // With no file at all it is no call.
    link.send(&call, &[]);
    assert!(link.next().is_none());
    world.is_over(keeper);
}

#[test]
fn another_policy_applies_at_once_and_takes_nothing_back() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(CONTAINERS));
    link.open(&wanted(ONE, 2, Handout::Container, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    put(&world, &policy(CONTAINERS).replace("[\"0000:02:00.0\"]", "[\"0000:09:00.0\"]"));
    assert!(rule(link.open(&wanted(OTHER, 2, Handout::Container, false))).contains("no entry"));
    // Who has acquired it gets more of what it has.
    let (_, more) = link.deliver(ONE).unwrap();
    let raise = Memlock { lease: ONE.into(), bytes: 4096 };
    let (client, _) = UnixStream::pair().unwrap();
    link.send(&raise, &[client.as_fd()]);
    assert!(rule(link.answer::<Memlock>()).contains("without memlock"));
    // A policy that can't be read gives nothing.
    std::fs::remove_file(world.directory.path().join("policy")).unwrap();
    let refused = link.open(&wanted(OTHER, 2, Handout::Container, false));
    assert!(matches!(refused, Err(Failure::Kernel { .. })), "{refused:?}");
    drop((files, more, link));
    world.is_over(keeper);
}
