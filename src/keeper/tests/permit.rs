//! A broker that was taken over: it asks for what it likes, for whom it likes. The client of these tests is
//! this process.

use super::super::permit::was_accepted;
use super::*;
use crate::policy::Policy;
use crate::process::keeper::{Confirm, Memlock, Revoke, Unmap};
use crate::process::launcher::InForce;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

/// The client may have the first device as such files, and `more`; another tenant both.
fn policy(more: &str) -> String {
    let uid = nix::unistd::geteuid().as_raw();
    format!(
        "version = 1\n[[tenant]]\nname = \"a\"\nuser = {uid}\ndevices = [\"0000:02:00.0\"]\n{more}\n\
         [[tenant]]\nname = \"b\"\nuser = 4242\n\
         devices = [\"0000:02:00.0\", \"0000:08:00.0\"]\nhandouts = [\"container\", \"iommufd\"]\n\
         [[tenant]]\nname = \"c\"\nuser = 4243\ndevices = [\"0000:08:00.0\"]\n\
         rights = [\"acquire\", \"manage\"]\n"
    )
}

/// Another tenant's manager, and one who is no tenant.
const OTHERS: [u32; 2] = [4243, 4244];

const DEVICES: &str = "handouts = [\"devices\", \"iommufd\"]";
const CONTAINERS: &str = "handouts = [\"container\", \"devices\"]";

fn put(world: &World, text: &str) -> InForce {
    let policy = Policy::parse("policy.toml", text, &()).unwrap();
    let new = world.directory.path().join("new");
    let in_force = InForce { service: service(), policy: Arc::new(policy) };
    std::fs::write(&new, serde_json::to_vec(&in_force).unwrap()).unwrap();
    std::fs::rename(new, world.directory.path().join("policy")).unwrap();
    in_force
}

fn judged(world: &World, text: &str) -> (JoinHandle<()>, Asker) {
    let in_force = put(world, text);
    let path = world.directory.path().join("policy");
    let file = std::fs::File::open(&path).unwrap();
    let judge = PolicyInForce::new(path, &file, in_force).unwrap();
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
    // The kernel counts a lease pipe's room against root's.
    let room = nix::fcntl::fcntl(&files[2], nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap();
    assert_eq!(room as u64, crate::keeper::memory::page_size());
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
    // A link between processes of the daemon has a peer too, and that is root.
    let (pair, _other) = UnixStream::pair().unwrap();
    // So has what the launcher connects to.
    let [_accepted, connected] = connection();
    for other in [file.as_fd(), pair.as_fd(), connected.as_fd()] {
        link.send(&call, &[other]);
        let failure = link.answer::<Open>().unwrap_err();
        assert!(matches!(&failure, Failure::Bad { field, .. } if field == "client"), "{failure:?}");
    }
    // With no file at all it is no call.
    link.send(&call, &[]);
    assert!(link.next().is_none());
    world.is_over(keeper);
}

#[test]
fn no_end_of_another_connection_passes_for_a_client_s_whatever_its_name() {
    let directory = TempDir::new().unwrap();
    let (service, elsewhere) = (directory.path().join("s"), directory.path().join("e"));
    let name = service.as_os_str().as_bytes();
    let listener = UnixListener::bind(&service).unwrap();
    let _client = UnixStream::connect(&service).unwrap();
    let accepted = listener.accept().unwrap().0;
    assert!(was_accepted(accepted.as_fd(), name));
    // As whoever has another view of the file system does, with other sockets.
    let bound = |socket: BorrowedFd<'_>| {
        std::fs::remove_file(&service).unwrap();
        socket::bind(socket.as_raw_fd(), &UnixAddr::new(&service).unwrap()).unwrap();
        assert_eq!(peer::address(socket).unwrap(), name);
    };
    let others = UnixListener::bind(&elsewhere).unwrap();
    let (family, kind, flags) = (AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC);
    let connecting = socket::socket(family, kind, flags, None).unwrap();
    bound(connecting.as_fd());
    socket::connect(connecting.as_raw_fd(), &UnixAddr::new(&elsewhere).unwrap()).unwrap();
    let _accepted = others.accept().unwrap();
    assert!(!was_accepted(connecting.as_fd(), name));
    let (brokers, _launchers) = pair(kind, flags).unwrap();
    bound(brokers.as_fd());
    assert!(!was_accepted(brokers.as_fd(), name));
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
    let client = own();
    link.send(&raise, &[client.as_fd()]);
    assert!(rule(link.answer::<Memlock>()).contains("without memlock"));
    // A policy that can't be read gives nothing.
    std::fs::remove_file(world.directory.path().join("policy")).unwrap();
    let refused = link.open(&wanted(OTHER, 2, Handout::Container, false));
    assert!(matches!(refused, Err(Failure::Kernel { .. })), "{refused:?}");
    drop((files, more, link));
    world.is_over(keeper);
}

fn own() -> UnixStream {
    let [ours, _] = connection();
    ours
}

fn revocation(left: u64) -> Revoke {
    Revoke { lease: ONE.into(), since: 1, force: 2, left }
}

#[test]
fn a_lease_is_ended_and_unmapped_for_who_may_have_it_and_for_nobody_else() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(DEVICES));
    link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    link.map(ONE, 0);
    let end = End { lease: ONE.into() };
    let unmap = Unmap { lease: ONE.into(), iova: 0, size: 4096 };
    for uid in OTHERS {
        let Some([client, _]) = connection_of(uid) else { return };
        rule(link.ask_for(&end, &client));
        rule(link.ask_for(&unmap, &client));
        rule(link.ask_for(&revocation(0), &client));
        rule(link.deliver_to(ONE, &client));
        let (memory, _) = crate::kernel::Mapped::memfd(4096).unwrap();
        let queue = queue(&[(0, memory.as_fd())]).unwrap();
        let (read, write, memory, offset) = (true, true, 0, 0);
        let (lease, iova, size) = (ONE.into(), 4096, 4096);
        let map = Map { lease, iova, size, read, write, memory, offset };
        link.send(&map, &[queue.as_fd(), client.as_fd()]);
        rule(link.answer::<Map>());
    }
    let nobody = link.ask(&end).unwrap_err();
    assert!(matches!(&nobody, Failure::Bad { field, .. } if field == "client"), "{nobody:?}");
    let state = link.ask(&Check { lease: ONE.into() }).unwrap().state;
    assert_eq!((state.phase, state.mappings, state.revoking), (Phase::Held, 1, None));
    assert_eq!(link.ask_for(&unmap, &own()).unwrap().unmapped, 4096);
    let state = link.ask_for(&end, &own()).unwrap().state;
    assert_eq!((state.phase, state.lifelines), (Phase::Ending, 0));
    // From then on it is tried again for anybody.
    drop(files);
    let _ = link.ask(&end);
    drop(link);
    world.is_over(keeper);
}

#[test]
fn a_lease_that_has_ended_is_not_delivered_any_more() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(DEVICES));
    link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    link.ask_for(&End { lease: ONE.into() }, &own()).unwrap();
    assert_eq!(link.deliver(ONE).unwrap_err(), Failure::NoSuchLease);
    drop((files, link));
    world.is_over(keeper);
}

#[test]
fn a_revocation_ends_its_lease_in_time_and_not_before_with_a_broker_or_without() {
    let world = World::new();
    let managed = format!("{DEVICES}\nrights = [\"acquire\", \"manage\"]");
    let managers = policy(&managed).replacen("\nuser = ", "\nuser = [4245, ", 1);
    let managers = managers.replacen("\ndevices", "]\ndevices", 1);
    let (keeper, mut link) = judged(&world, &managers);
    link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    // An administrator's word.
    link.ask_for(&revocation(3_600_000), &own()).unwrap();
    assert!(matches!(link.ask(&End { lease: ONE.into() }), Err(Failure::Bad { .. })));
    let state = link.ask(&Check { lease: ONE.into() }).unwrap().state;
    assert!(state.phase == Phase::Held && state.revoking.is_some(), "{state:?}");
    // A later end does not put an earlier one off, whoever asks for it.
    let Some([manager, _]) = connection_of(4245) else { return };
    link.ask_for(&revocation(20), &manager).unwrap();
    link.ask_for(&revocation(3_600_000), &own()).unwrap();
    drop((files, link));
    world.is_over(keeper);
}

#[test]
fn what_a_device_may_be_open_in_is_an_administrator_s_to_vouch_for() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(DEVICES));
    link.open(&wanted(ONE, 2, Handout::Iommufd, false)).unwrap();
    drop(link.deliver(ONE).unwrap());
    let left = |state: &LeaseState| matches!(state.groups[0].stage, Stage::Unbound(_));
    world.until(|| world.written().is_some_and(|all| all.first().is_some_and(left)));
    let confirm = Confirm { lease: ONE.into(), group: 2, device: bdf(2) };
    for uid in [4242, 4243, 4244] {
        let Some([client, _]) = connection_of(uid) else { return };
        assert!(rule(link.ask_for(&confirm, &client)).contains("no administrator"));
    }
    assert!(left(&world.written().unwrap()[0]));
    assert_eq!(link.ask_for(&confirm, &own()).unwrap().state.phase, Phase::Gone);
    drop(link);
    world.is_over(keeper);
}

#[test]
fn a_lease_stays_its_holder_s_whatever_is_added_to_it() {
    let world = World::new();
    let policy_of_b = policy(CONTAINERS);
    let (keeper, mut link) = judged(&world, &policy_of_b);
    link.open(&wanted(ONE, 2, Handout::Container, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    let before = world.stats();
    let bad = |result: Result<Opened, Failure>| match result {
        Err(Failure::Bad { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let Some([b, _]) = connection_of(4242) else { return };
    // Another tenant's client, to which a device is added that it may have.
    let mut call = Open { extends: true, ..wanted(ONE, 8, Handout::Container, false) };
    call.record.tenant = "b".into();
    let principals = put(&world, &policy_of_b).policy.principals("b");
    call.record.principals = principals.unwrap();
    assert_eq!(bad(link.ask_for(&call, &b)), "record");
    // Its own, as another lease, or without what it has.
    let record = world.written().unwrap().remove(0).record;
    let same = Open { extends: true, ..wanted(ONE, 2, Handout::Container, false) };
    for other in [
        LeaseRecord { key: "1".repeat(32), ..record.clone() },
        LeaseRecord { noiommu: true, ..record.clone() },
        LeaseRecord { devices: Vec::new(), ..record.clone() },
    ] {
        let call = Open { record: other, steps: Vec::new(), groups: Vec::new(), ..same.clone() };
        let call = Open { deliver_groups: Vec::new(), ..call };
        assert_eq!(bad(link.open(&call)), "record");
    }
    // A lease of its own in the same address space.
    let mut call = wanted(OTHER, 8, Handout::Container, false);
    call.record.tenant = "b".into();
    assert_eq!(bad(link.ask_for(&call, &b)), "container");
    assert_eq!(world.stats(), before);
    drop((files, link));
    world.is_over(keeper);
}

#[test]
fn a_lease_that_no_broker_could_adopt_is_not_opened() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(DEVICES));
    let good = wanted(ONE, 2, Handout::Devices, false);
    for (lease, key) in
        [("no number", &*good.record.key), ("", ""), (ONE, "0"), (ONE, &"x".repeat(32))]
    {
        let mut call = good.clone();
        (call.record.lease, call.record.key) = (lease.into(), key.into());
        let bad = link.open(&call).unwrap_err();
        assert!(matches!(&bad, Failure::Bad { field, .. } if field == "record"), "{bad:?}");
    }
    assert!(world.stats().is_idle());
    drop(link);
    world.is_over(keeper);
}

#[test]
fn what_is_opened_is_what_was_judged_and_is_written_down() {
    let world = World::new();
    let (keeper, mut link) = judged(&world, &policy(DEVICES));
    // The kernel goes by the name, and a group that is not the lease's is never proved free.
    let mut misnamed = wanted(ONE, 2, Handout::Devices, false);
    misnamed.names = BTreeMap::from([(bdf(2), "0000:08:00.0".into())]);
    let mut suffixed = misnamed.clone();
    suffixed.names = BTreeMap::from([(bdf(2), "0000:02:00.01".into())]);
    let unwritten = Open { groups: Vec::new(), ..wanted(ONE, 2, Handout::Iommufd, false) };
    for call in [misnamed, suffixed, unwritten] {
        let bad = link.open(&call).unwrap_err();
        assert!(matches!(&bad, Failure::Bad { field, .. } if field == "steps"), "{bad:?}");
    }
    assert!(world.stats().is_idle());
    drop(link);
    world.is_over(keeper);
}
