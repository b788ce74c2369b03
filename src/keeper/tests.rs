//! A keeper on the simulated kernel, asked as a broker asks it.

mod permit;
mod sockets;
mod unwritten;

use super::*;
use crate::process::keeper::{
    Check, Deliver, Delivered, End, FAILED, Failed, LeaseRecord, LeasedDevice, LeasedGroup, Map,
    Mappings, MappingsPage, NotFree, Open, Opened, Saved, SharedContainer, Step, Told, VERSION,
    Watch,
};
use crate::process::launcher::Standing;
use crate::process::link::{self, Call};
use crate::process::queued_files::queue;
use crate::protocol::{Fd, FdKind, Handout};
use crate::sim::{Fault, Sim, Stats, Topology};
use crate::sys::{fdpass, peer};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde_json::Value;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;
use tempfile::TempDir;

const MACHINE: &str = r#"
kernel = "6.12"
owner_rights = true
memlock = "unlimited"
[[group]]
id = 2
device = [{ bdf = "0000:02:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
[[group]]
id = 8
device = [{ bdf = "0000:08:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
"#;

const NAME: &str = "0123456789abcdef";

/// By then everything has happened that will.
const LIMIT: Duration = Duration::from_secs(50);

struct World {
    sim: Sim,
    place: Place,
    directory: TempDir,
}

/// A keeper's link, as the broker has it.
struct Asker {
    socket: UnixStream,
    bytes: VecDeque<u8>,
}

impl World {
    fn new() -> Self {
        let sim = Sim::start(Topology::from_toml(MACHINE).unwrap()).unwrap();
        let directory = TempDir::new().unwrap();
        let place = Place::new(&directory.path().join("keepers")).unwrap();
        Self { sim, place, directory }
    }

    fn run(&self, first: Vec<OwnedFd>, salvage: bool) -> JoinHandle<()> {
        self.run_judged(first, salvage, None)
    }

    fn run_judged(&self, first: Vec<OwnedFd>, salvage: bool, judge: Judge) -> JoinHandle<()> {
        let (place, kernel) = (self.place.clone(), self.sim.kernel());
        let links = Links { first, machine: self.sim.wire().end(), salvage, judge };
        std::thread::spawn(move || run(kernel, &place, NAME, Vec::new(), links).unwrap())
    }

    /// A keeper with so many links.
    fn keeper<const N: usize>(&self) -> (JoinHandle<()>, [Asker; N]) {
        self.keeper_judged(None)
    }

    fn keeper_judged<const N: usize>(&self, judge: Judge) -> (JoinHandle<()>, [Asker; N]) {
        let mut theirs = Vec::new();
        let askers = std::array::from_fn(|_| {
            let (ours, other) = UnixStream::pair().unwrap();
            theirs.push(OwnedFd::from(other));
            Asker { socket: ours, bytes: VecDeque::new() }
        });
        (self.run_judged(theirs, false, judge), askers)
    }

    fn stats(&self) -> Stats {
        self.sim.stats().unwrap()
    }

    fn until(&self, is_so: impl Fn() -> bool) {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < LIMIT, "it has not come to that: {:#?}", self.stats());
            std::thread::yield_now();
        }
    }

    fn written(&self) -> Option<Vec<LeaseState>> {
        self.place.kept(NAME.into()).saved().ok().map(|saved| saved.leases)
    }

    /// Nothing is left, of the keeper's directory neither.
    fn is_over(&self, keeper: JoinHandle<()>) {
        keeper.join().unwrap();
        assert!(self.stats().is_idle(), "{:#?}", self.stats());
        assert!(self.place.names().unwrap().is_empty());
        assert!(self.directory.path().exists());
    }
}

/// Where clients connect, as far as a keeper sees it.
static SERVICE: LazyLock<Mutex<UnixListener>> = LazyLock::new(|| {
    let name = format!("vfio-broker-keeper-tests-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    Mutex::new(UnixListener::bind_addr(&address).unwrap())
});

fn service() -> Vec<u8> {
    peer::address(SERVICE.lock().unwrap().as_fd()).unwrap()
}

/// A client's connection, accepted, and its own end.
fn connection() -> [UnixStream; 2] {
    let service = SERVICE.lock().unwrap();
    let theirs = UnixStream::connect_addr(&service.local_addr().unwrap()).unwrap();
    [service.accept().unwrap().0, theirs]
}

/// The same of another user's; `None` where only root could make one.
fn connection_of(uid: u32) -> Option<[UnixStream; 2]> {
    let service = SERVICE.lock().unwrap();
    let theirs = peer::connected_as(uid, &service.local_addr().unwrap())?;
    Some([service.accept().unwrap().0, theirs])
}

impl Asker {
    fn send<C: Call>(&self, call: &C, fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&link::call(call, false), fds);
    }

    fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let sent = fdpass::send(self.socket.as_fd(), bytes, fds, MsgFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next message; `None` at the end of the link.
    fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.bytes.drain(..=end).collect();
                return Some(serde_json::from_slice(&message[..end]).unwrap());
            }
            let mut buffer = [0; 4096];
            match std::io::Read::read(&mut self.socket, &mut buffer).unwrap_or(0) {
                0 => return None,
                len => self.bytes.extend(&buffer[..len]),
            }
        }
    }

    fn answer<C: Call>(&mut self) -> Result<C::Reply, Failure> {
        let message = self.next().expect("an answer");
        let parameters = message["parameters"].clone();
        match message.get("error") {
            None => Ok(serde_json::from_value(parameters).unwrap()),
            Some(name) => {
                assert_eq!(name, FAILED);
                Err(serde_json::from_value::<Failed>(parameters).unwrap().failure)
            }
        }
    }

    fn ask<C: Call>(&mut self, call: &C) -> Result<C::Reply, Failure> {
        self.send(call, &[]);
        self.answer::<C>()
    }

    /// Asks for whoever has made this connection.
    fn ask_for<C: Call>(&mut self, call: &C, client: &UnixStream) -> Result<C::Reply, Failure> {
        self.send(call, &[client.as_fd()]);
        self.answer::<C>()
    }

    fn open(&mut self, call: &Open) -> Result<Opened, Failure> {
        self.ask_for(call, &connection()[0])
    }

    /// Delivers what is pending; gives the client's files.
    fn deliver(&mut self, lease: &str) -> Result<(Vec<Fd>, Vec<OwnedFd>), Failure> {
        let [client, ours] = connection();
        self.deliver_to(lease, &client)?;
        let mut buffer = [0; 4096];
        let got = fdpass::receive(ours.as_fd(), &mut buffer, fdpass::MAX_FDS, MsgFlags::empty());
        let got = got.unwrap();
        let reply: Value = serde_json::from_slice(&buffer[..got.len - 1]).unwrap();
        Ok((serde_json::from_value(reply["parameters"]["fds"].clone()).unwrap(), got.fds))
    }

    fn deliver_to(&mut self, lease: &str, client: &UnixStream) -> Result<Delivered, Failure> {
        let (lease, parameters) = (lease.to_owned(), serde_json::Map::new());
        let deliver = Deliver { lease, parameters, lifeline: true, kept: None };
        self.ask_for(&deliver, client)
    }

    fn map(&mut self, lease: &str, iova: u64) {
        let (memory, _) = crate::kernel::Mapped::memfd(4096).unwrap();
        let queue = queue(&[(0, memory.as_fd())]).unwrap();
        self.map_of(lease, iova, 0, queue.as_fd()).unwrap();
    }

    /// Asks for a page of the file of that index to be mapped.
    fn map_of(
        &mut self,
        lease: &str,
        iova: u64,
        memory: usize,
        queue: BorrowedFd<'_>,
    ) -> Result<Changed, Failure> {
        let (read, write, offset, size) = (true, true, 0, 4096);
        let map = Map { lease: lease.into(), iova, size, read, write, memory, offset };
        let [client, _] = connection();
        self.send(&map, &[queue, client.as_fd()]);
        self.answer::<Map>()
    }
}

fn bdf(group: u32) -> Bdf {
    format!("0000:{group:02x}:00.0").parse().unwrap()
}

/// What a broker asks for one device of a group, in this form.
fn wanted(lease: &str, group: u32, handout: Handout, shared: bool) -> Open {
    let container = SharedContainer { name: "pool".into(), mutual: false };
    let record = LeaseRecord {
        lease: lease.into(),
        key: "0".repeat(32),
        tenant: "a".into(),
        principals: String::new(),
        vm: "web1".into(),
        uid: 1000,
        pid: 1,
        since: 7,
        handout,
        container: shared.then_some(container),
        noiommu: false,
        rebind: false,
        devices: vec![LeasedDevice { bdf: bdf(group), group, withheld: false }],
    };
    let attached = vec![Step::OpenContainer, Step::OpenGroup(group), Step::Attach(group)];
    let steps = match handout {
        Handout::Container => attached,
        Handout::Devices => [attached, vec![Step::OpenDevice(group, bdf(group))]].concat(),
        Handout::Group => vec![Step::OpenGroup(group)],
        Handout::Iommufd => {
            vec![Step::OpenIommufd, Step::CheckGroup(group), Step::OpenCdev(group, bdf(group))]
        }
    };
    let deliver_groups = match handout {
        Handout::Container | Handout::Group => vec![group],
        Handout::Devices | Handout::Iommufd => Vec::new(),
    };
    let groups = vec![LeasedGroup { id: group, noiommu: false, members: vec![(bdf(group), None)] }];
    Open { record, groups, steps, names: BTreeMap::new(), deliver_groups, extends: false }
}

const ONE: &str = "0000000000000001";
const OTHER: &str = "0000000000000002";

#[test]
fn a_lease_ends_by_itself_with_no_broker_there() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
    let (described, files) = link.deliver(ONE).unwrap();
    let kinds: Vec<_> = described.iter().map(|fd| fd.kind).collect();
    assert_eq!((kinds, files.len()), (vec![FdKind::Device, FdKind::Lease], 2));
    link.map(ONE, 0);
    drop(link);
    // The holder has it still: without a broker the keeper goes on.
    assert_eq!(world.stats().spaces[0].mappings, 1);
    assert_eq!(world.written().unwrap()[0].phase, Phase::Held);
    assert!(!keeper.is_finished());
    drop(files);
    world.is_over(keeper);
}

#[test]
fn a_new_link_finds_what_is_there() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    link.map(ONE, 0);
    link.map(ONE, 1 << 20);
    drop(link);
    let socket =
        UnixStream::from(world.place.find(NAME).unwrap().1.unwrap().into_iter().next().unwrap());
    socket.set_nonblocking(false).unwrap();
    let mut link = Asker { socket, bytes: VecDeque::new() };
    let state = link.ask(&Check { lease: ONE.into() }).unwrap().state;
    assert_eq!((state.phase, state.mappings, state.lifelines), (Phase::Held, 2, 1));
    let MappingsPage { mappings } = link.ask(&Mappings { lease: ONE.into(), from: 1 }).unwrap();
    assert_eq!(mappings, [(1 << 20, 4096)]);
    drop(link);
    drop(files);
    world.is_over(keeper);
}

#[test]
fn what_is_pending_when_its_link_ends_is_undone() {
    for handout in [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd] {
        let world = World::new();
        let (keeper, [mut link, mut other]) = world.keeper();
        link.open(&wanted(ONE, 2, handout, false)).unwrap();
        assert!(!world.stats().is_idle());
        drop(link);
        world.until(|| world.stats().is_idle());
        // Told as long as it may be of interest, then not known any more.
        let gone = other.ask(&Check { lease: ONE.into() }).map(|told| told.state.phase);
        assert!(matches!(gone, Ok(Phase::Gone) | Err(Failure::NoSuchLease)), "{gone:?}");
        drop(other);
        world.is_over(keeper);
    }
}

#[test]
fn a_client_that_has_gone_gets_nothing() {
    for handout in [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd] {
        let world = World::new();
        let (keeper, [mut link]) = world.keeper();
        link.open(&wanted(ONE, 2, handout, false)).unwrap();
        let (client, ours) = UnixStream::pair().unwrap();
        drop(ours);
        let failure = link.deliver_to(ONE, &client).unwrap_err();
        assert_eq!(failure, Failure::NotDelivered(Errno::EPIPE as i32));
        assert!(world.stats().is_idle(), "{:#?}", world.stats());
        assert_eq!(world.written(), Some(Vec::new()));
        drop(link);
        world.is_over(keeper);
    }
}

#[test]
fn garbage_ends_its_link_and_no_other() {
    let world = World::new();
    for garbage in [&b"{\0"[..], b"{}\0", b"[1]\0", b"\xff\0", b"\0"] {
        let (keeper, [mut link, mut other]) = world.keeper();
        link.open(&wanted(ONE, 2, Handout::Devices, false)).unwrap();
        let (_, files) = link.deliver(ONE).unwrap();
        link.send_bytes(garbage, &[]);
        assert_eq!(link.next(), None);
        assert_eq!(other.ask(&Check { lease: ONE.into() }).unwrap().state.phase, Phase::Held);
        drop((link, other, files));
        world.is_over(keeper);
    }
}

#[test]
fn a_call_that_it_does_not_know_is_answered() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    link.send_bytes(
        b"{\"method\":\"org.vfiobroker.Keeper.Later\",\"parameters\":{\"a\":1}}\0",
        &[],
    );
    let answer = link.next().unwrap();
    assert_eq!(answer["error"], "org.varlink.service.MethodNotFound");
    assert_eq!(answer["parameters"]["method"], "org.vfiobroker.Keeper.Later");
    // One that lacks its file is no call at all.
    let (lease, parameters) = (ONE.into(), serde_json::Map::new());
    link.send(&Deliver { lease, parameters, lifeline: true, kept: None }, &[]);
    assert_eq!(link.next(), None);
    world.is_over(keeper);
}

#[test]
fn what_is_begun_stands_in_the_state_file() {
    let world = World::new();
    let (keeper, [mut link, mut watch]) = world.keeper();
    world.sim.fault(Fault::never("VFIO_GROUP_GET_DEVICE_FD")).unwrap();
    watch.send_bytes(&link::call(&Watch {}, true), &[]);
    let (client, _) = UnixStream::pair().unwrap();
    link.send(&wanted(ONE, 2, Handout::Devices, false), &[client.as_fd()]);
    world.until(|| world.stats().held > 0);
    let begun = world.written().unwrap().remove(0);
    let call = begun.call.unwrap();
    assert_eq!((begun.phase, &*call.call, &*call.object), (Phase::Opening, "open", "0000:02:00.0"));
    assert!(call.since > 0);
    assert_eq!(world.place.find(NAME).unwrap().0, Standing::Alive);
    world.sim.clear_faults().unwrap();
    link.answer::<Open>().unwrap();
    let (_, files) = link.deliver(ONE).unwrap();
    let held = world.written().unwrap().remove(0);
    assert_eq!((held.phase, held.call), (Phase::Held, None));
    // And its end.
    world.sim.fault(Fault::never("VFIO_GROUP_UNSET_CONTAINER")).unwrap();
    drop(files);
    world.until(|| world.stats().held > 0);
    let ending = world.written().unwrap().remove(0);
    let call = ending.call.unwrap();
    assert_eq!(
        (ending.phase, &*call.call, &*call.object),
        (Phase::Ending, "reclaim", "/dev/vfio/2")
    );
    world.sim.clear_faults().unwrap();
    let mut last = None;
    while last != Some(Phase::Gone) {
        let told = watch.next().unwrap();
        let told: Told = serde_json::from_value(told["parameters"].clone()).unwrap();
        last = told.state.map(|state| state.phase).or(last);
    }
    drop((link, watch));
    world.is_over(keeper);
}

/// As a keeper that was killed has left it.
fn killed(world: &World, leases: &[LeaseState]) {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let (version, boot, pid) = (VERSION, boot.trim().to_owned(), 1);
    let saved = Saved { version, boot, pid, leases: leases.to_vec() };
    let file = StateFile::create(&world.place, NAME).unwrap();
    drop(file);
    let path = world.place.path().join(NAME).join("state");
    let mut options = std::fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create(true), 0o600);
    serde_json::to_writer(options.open(path).unwrap(), &saved).unwrap();
}

#[test]
fn what_a_killed_keeper_had_is_free_once_nobody_has_it() {
    for handout in [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd] {
        let world = World::new();
        let (keeper, [mut link]) = world.keeper();
        link.open(&wanted(ONE, 2, handout, false)).unwrap();
        let (_, files) = link.deliver(ONE).unwrap();
        let written = world.written().unwrap();
        drop((link, files));
        if handout == Handout::Iommufd {
            world.sim.set_driver("0000:02:00.0", None).unwrap();
            world.sim.set_driver("0000:02:00.0", Some("vfio-pci")).unwrap();
        }
        world.is_over(keeper);
        killed(&world, &written);
        // Somebody of the holder's has the group open.
        let node = crate::kernel::Node::Group(2);
        let stale = Group::open(world.sim.kernel(), node).unwrap();
        let salvage = world.run(Vec::new(), true);
        let is_stuck = |state: &LeaseState| {
            let stage = state.groups.first().map(|group| &group.stage);
            state.phase == Phase::Ending
                && matches!(stage, Some(Stage::Quarantined(NotFree::GroupOpen(_))))
        };
        world.until(|| world.written().is_some_and(|all| all.first().is_some_and(is_stuck)));
        drop(stale);
        world.is_over(salvage);
    }
}

/// What is written down of one while the others' turn has not come is all of it: who salvages can be
/// killed too.
#[test]
fn a_keeper_that_salvages_writes_down_all_leases_from_the_first_on() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    let mut files = Vec::new();
    for (lease, group) in [(ONE, 2), (OTHER, 8)] {
        link.open(&wanted(lease, group, Handout::Devices, true)).unwrap();
        files.push(link.deliver(lease).unwrap().1);
    }
    let written = world.written().unwrap();
    drop((link, files));
    world.is_over(keeper);
    killed(&world, &written);
    world.sim.fault(Fault::never("open").on("/dev/vfio/2")).unwrap();
    let salvage = world.run(Vec::new(), true);
    world.until(|| world.stats().held == 1);
    let phases: Vec<_> = world.written().unwrap().iter().map(|state| state.phase).collect();
    assert_eq!(phases, [Phase::Ending; 2]);
    world.sim.clear_faults().unwrap();
    world.is_over(salvage);
}

#[test]
fn a_driver_that_a_killed_keeper_took_away_comes_back() {
    for handout in [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd] {
        let world = World::new();
        let (keeper, [mut link]) = world.keeper();
        let mut open = wanted(ONE, 2, handout, false);
        open.record.rebind = true;
        link.open(&open).unwrap();
        let (_, files) = link.deliver(ONE).unwrap();
        let mut written = world.written().unwrap();
        drop((link, files));
        world.is_over(keeper);
        written[0].groups[0].drivers.insert(bdf(2), "vfio-pci".into());
        killed(&world, &written);
        world.sim.set_driver("0000:02:00.0", None).unwrap();
        world.is_over(world.run(Vec::new(), true));
        let device = crate::host::Device::scan(&*world.sim.kernel(), bdf(2)).unwrap().unwrap();
        assert_eq!(device.driver.as_deref(), Some("vfio-pci"), "{handout:?}");
    }
}

#[test]
fn the_end_of_one_member_leaves_the_others_mappings() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    let mut files = Vec::new();
    for (lease, group) in [(ONE, 2), (OTHER, 8)] {
        link.open(&wanted(lease, group, Handout::Devices, true)).unwrap();
        files.push(link.deliver(lease).unwrap().1);
    }
    link.map(ONE, 0);
    link.map(OTHER, 1 << 20);
    drop(files.remove(0));
    // Gone by itself, or by this.
    let _ = link.ask(&End { lease: ONE.into() });
    let space = world.stats().spaces.remove(0);
    assert_eq!((space.groups, space.mappings), (vec![8], 1));
    let state = link.ask(&Check { lease: OTHER.into() }).unwrap().state;
    assert_eq!((state.phase, state.mappings), (Phase::Held, 1));
    drop((link, files));
    world.is_over(keeper);
}

#[test]
fn a_lease_that_has_ended_does_not_come_back_by_being_extended() {
    let world = World::new();
    let (keeper, [mut link]) = world.keeper();
    link.open(&wanted(ONE, 2, Handout::Group, false)).unwrap();
    drop(link.deliver(ONE).unwrap());
    world.until(|| world.written() == Some(Vec::new()));
    let more = Open { extends: true, ..wanted(ONE, 8, Handout::Group, false) };
    assert_eq!(link.open(&more).unwrap_err(), Failure::NoSuchLease);
    let again = Open { extends: true, ..wanted(OTHER, 8, Handout::Group, false) };
    assert_eq!(link.open(&again).unwrap_err(), Failure::NoSuchLease);
    drop(link);
    world.is_over(keeper);
}

#[test]
fn a_name_that_is_a_path_is_nobody_s() {
    let world = World::new();
    let victim = world.directory.path().join("victim");
    std::fs::create_dir(&victim).unwrap();
    let path = victim.to_str().unwrap();
    for name in ["", ".", "..", "../victim", "a/../../victim", path, "0123456789abcdeg", "a\0b"] {
        assert_eq!(world.place.find(name).unwrap_err().errno, Errno::EINVAL, "{name:?}");
        for salvage in [false, true] {
            let links = Links { first: Vec::new(), machine: None, salvage, judge: None };
            let begun = run(world.sim.kernel(), &world.place, name, Vec::new(), links);
            assert_eq!(begun.unwrap_err().errno, Errno::EINVAL, "{name:?}");
        }
    }
    assert_eq!(std::fs::read_dir(&victim).unwrap().count(), 0);
    assert!(world.place.path().exists());
}
