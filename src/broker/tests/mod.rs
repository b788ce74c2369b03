//! The broker on the simulated kernel.

mod any_of;
mod confirm;
mod dma;
mod failing;
mod flow;
mod garbage;
mod holders;
mod iommufd;
mod late;
mod plan;
mod race;
mod random;
mod rebind;
mod reclaim;
mod reload;
mod restart;
mod revoke;
mod shared;
mod threads;
mod undo;

use super::*;
use crate::policy::Peer;
use crate::process::keeper::{Changed, Check, End};
use crate::process::link::Call;
use crate::process::queued_files::queue;
use crate::protocol::{
    Acquire, Acquired, DeviceSpec, Error, FdKind, Fds, GetFds, Handout, MapDma, Release, UnmapDma,
    Unmapped, Until,
};
use crate::sim::{Sim, Stats, Topology};
use crate::sys::fdpass;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use threads::{KernelOf, Threads};
use tokio::runtime::Runtime;
use tokio::task::LocalSet;

/// Group 1 has two devices on VFIO, 2 one, 3 one beside a function without a driver, 4 one beside
/// one that the host uses, 5 is a PF with its VFs in 6 and 7, and 8 has a device of 2's kind.
const MACHINE: &str = r#"
kernel = "6.12"
owner_rights = true
memlock = "unlimited"
[[group]]
id = 1
device = [
    { bdf = "0000:01:00.0", vendor = 0x10de, device = 0x2684, driver = "vfio-pci" },
    { bdf = "0000:01:00.1", vendor = 0x10de, device = 0x22ba, driver = "vfio-pci" },
]
[[group]]
id = 2
device = [{ bdf = "0000:02:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
[[group]]
id = 3
device = [
    { bdf = "0000:03:00.0", vendor = 0x1b21, device = 0x0612, driver = "vfio-pci" },
    { bdf = "0000:03:00.1", vendor = 0x1b21, device = 0x0625 },
]
[[group]]
id = 4
device = [
    { bdf = "0000:04:00.0", vendor = 0x8086, device = 0x1572, driver = "vfio-pci" },
    { bdf = "0000:04:00.1", vendor = 0x8086, device = 0x1572, driver = "i40e" },
]
[[group]]
id = 5
device = [
    { bdf = "0000:05:00.0", vendor = 0x15b3, device = 0x101d, driver = "vfio-pci", total_vfs = 2, vf_token = "00112233-4455-6677-8899-aabbccddeeff" },
]
[[group]]
id = 6
device = [
    { bdf = "0000:05:00.1", vendor = 0x15b3, device = 0x101e, driver = "vfio-pci", physfn = "0000:05:00.0" },
]
[[group]]
id = 7
device = [
    { bdf = "0000:05:00.2", vendor = 0x15b3, device = 0x101e, driver = "vfio-pci", physfn = "0000:05:00.0" },
]
[[group]]
id = 8
device = [{ bdf = "0000:08:00.0", vendor = 0x8086, device = 0x10d3, driver = "vfio-pci" }]
"#;

/// Uid 1000 has nearly everything, 1001 as much and it observes, 1002 manages its own, 1003 has one
/// function of group 1 and no right to anything else, and 1004 has nothing.
const POLICY: &str = r#"
version = 1
[[tenant]]
name = "a"
user = 1000
handouts = ["container", "group", "devices", "iommufd"]
devices = ["10de:2684", "10de:22ba", "8086:10d3", "1b21:0612", "1b21:0625", "8086:1572", "15b3:101d", "15b3:101e"]
limits = { leases = 5, devices = 8, mappings = 6, mapped_bytes = "1 MiB" }
[[tenant]]
name = "b"
user = 1001
rights = ["acquire", "observe"]
handouts = ["container", "group", "devices", "iommufd"]
devices = ["10de:2684", "10de:22ba", "8086:10d3", "1b21:0612", "1b21:0625", "15b3:101d", "15b3:101e"]
[[tenant]]
name = "m"
user = 1002
rights = ["acquire", "manage"]
handouts = ["devices", "container"]
devices = ["8086:10d3"]
[[tenant]]
name = "half"
user = 1003
handouts = ["container", "devices"]
devices = ["10de:2684"]
[[container]]
name = "pool"
members = ["a", "b"]
[[container]]
name = "friends"
trust = "mutual"
members = ["a", "b"]
"#;

/// Remembers what it is told.
#[derive(Default)]
struct Witness(RefCell<Vec<Event>>);

impl Observer for Witness {
    fn event(&self, event: &Event) {
        self.0.borrow_mut().push(event.clone());
    }
}

/// A reply to Acquire, as it comes out of the client's end of its connection.
#[derive(Debug)]
struct Grant {
    reply: Acquired,
    fds: Vec<OwnedFd>,
}

struct World {
    // In this order: what runs on the loop goes before the simulation that it talks to.
    local: LocalSet,
    broker: Rc<Broker>,
    witness: Rc<Witness>,
    keepers: Rc<Threads>,
    sim: Sim,
    runtime: Runtime,
}

/// How patient a world is: its keepers between their attempts, and its broker.
#[derive(Clone)]
struct Patience(Vec<Duration>, Duration);

impl Patience {
    const NONE: Self = Self(Vec::new(), Duration::ZERO);

    fn long() -> Self {
        Self(vec![Duration::from_millis(5); 10_000], LIMIT)
    }
}

/// By then everything has happened that will.
const LIMIT: Duration = Duration::from_secs(50);

impl World {
    fn new() -> Self {
        Self::of(MACHINE, POLICY)
    }

    /// A world that waits for as long as it takes.
    fn patient() -> Self {
        let sim = simulation(MACHINE);
        let kernel = sim.kernel();
        Self::with(sim, POLICY, Patience::long(), kernel.clone(), Box::new(move |_| kernel.clone()))
    }

    fn of(machine: &str, policy: &str) -> Self {
        let sim = simulation(machine);
        let kernel = sim.kernel();
        Self::with(sim, policy, Patience::NONE, kernel.clone(), Box::new(move |_| kernel.clone()))
    }

    fn with(
        sim: Sim,
        policy: &str,
        patience: Patience,
        kernel: Arc<dyn Kernel>,
        kernels: KernelOf,
    ) -> Self {
        let keepers = Rc::new(Threads::new(sim.wire(), kernels, patience.0.clone()));
        Self::on(sim, keepers, policy, patience.1, kernel)
    }

    /// A broker on a kernel and with keepers that may have been there before.
    fn on(
        sim: Sim,
        keepers: Rc<Threads>,
        policy: &str,
        patience: Duration,
        kernel: Arc<dyn Kernel>,
    ) -> Self {
        let policy = parsed(policy);
        let witness = Rc::new(Witness::default());
        let broker = Broker::new(Parts {
            kernel,
            policy: Arc::new(policy),
            observer: Rc::clone(&witness) as Rc<dyn Observer>,
            keepers: Box::new(Rc::clone(&keepers)),
            patience,
            deadline: LIMIT,
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { local: LocalSet::new(), broker, witness, keepers, sim, runtime }
    }

    /// Has the broker go by another policy, and say which leases that would not give.
    fn reload(&self, policy: &str) {
        self.broker.replace_policy(Arc::new(parsed(policy)));
        self.run(self.broker.judge_leases());
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.local.block_on(&self.runtime, future)
    }

    /// Lets things happen until this is so.
    fn until(&self, is_so: impl Fn() -> bool) {
        self.run(until(is_so));
    }

    fn stats(&self) -> Stats {
        self.sim.stats().unwrap()
    }

    /// Lease pipes that have not hung up.
    fn lifelines(&self) -> u64 {
        self.broker.books().entries.values().map(|entry| entry.lifelines.get()).sum()
    }

    fn ledger(&self) -> crate::ledger::Ledger {
        self.broker.books().ledger.clone()
    }

    /// Has each keeper look whether the holders of its leases have gone, and told what it finds.
    fn serve_hang_ups(&self) {
        let live = |lease: &Lease| lease.phase == crate::ledger::Phase::Held;
        self.ask_of_each(live, |lease| Check { lease });
    }

    /// Has each keeper try at once to take back what its ended leases had.
    fn retry_reclaims(&self) {
        let ended = |lease: &Lease| lease.phase == crate::ledger::Phase::Ending;
        self.ask_of_each(ended, |lease| End { lease });
    }

    fn ask_of_each<C: Call<Reply = Changed>>(
        &self,
        which: impl Fn(&Lease) -> bool,
        call: impl Fn(String) -> C,
    ) {
        let those: Vec<_> =
            self.ledger().leases().filter(|lease| which(lease)).map(|lease| lease.id).collect();
        for id in those {
            let Some(entry) = self.broker.books().entries.get(&id).cloned() else { continue };
            self.run(async {
                let mut turn = entry.keeper.turn().await.unwrap();
                let told = turn.ask(&call(id.to_string()), &[]).await;
                drop(turn);
                match told {
                    Ok(told) => self.broker.learn(&entry.keeper, told.state),
                    // It has told that already to whoever watches.
                    Err(_) => until(|| self.broker.books().ledger.lease(id).is_none()).await,
                }
            });
        }
    }

    fn has_pending_reclaims(&self) -> bool {
        self.broker.books().ledger.has_ending()
    }

    /// Has an administrator take a device off its driver and bind it again, and the broker see it.
    fn rebind(&self, bdf: &str) {
        self.sim.set_driver(bdf, None).unwrap();
        self.sim.set_driver(bdf, Some("vfio-pci")).unwrap();
        self.broker.topology(&caller(1001)).unwrap();
    }

    /// Nothing is open, nothing is mapped, nothing is in the books, and no keeper is left.
    fn assert_idle(&self) {
        let is_idle = || self.stats().is_idle() && self.keepers.place.names().unwrap().is_empty();
        self.until(is_idle);
        let books = self.broker.books();
        assert_eq!(books.ledger, crate::ledger::Ledger::default());
        assert!(books.entries.is_empty());
    }

    fn events(&self) -> Vec<(EventKind, Vec<String>)> {
        let events = std::mem::take(&mut *self.witness.0.borrow_mut());
        events.into_iter().map(|event| (event.event, event.devices)).collect()
    }

    fn acquire(&self, uid: u32, request: &Acquire) -> Result<Grant, Error> {
        self.run(acquire(&self.broker, uid, request))
    }

    fn get_fds(&self, uid: u32, request: &GetFds) -> Result<(Fds, Vec<OwnedFd>), Error> {
        let (client, ours) = connection();
        let done = self.run(self.broker.get_fds(&caller(uid), client.as_fd(), request))?;
        assert_eq!(done, Delivery::Whole);
        Ok(received(&ours))
    }

    fn release(&self, uid: u32, held: &Acquired) -> Result<bool, Error> {
        self.run(release(&self.broker, uid, held))
    }

    fn ask_release(&self, uid: u32, request: &Release) -> Result<bool, Error> {
        let client = Rc::new(connection().0);
        let done = self.run(self.broker.release(&caller(uid), client, request));
        done.map(|released| released.proved)
    }

    fn map(&self, uid: u32, held: &Acquired, iova: u64, size: u64) -> Result<(), Error> {
        self.run(map(&self.broker, uid, held, iova, size))
    }

    fn map_dma(&self, uid: u32, request: &MapDma, memory: OwnedFd) -> Result<(), Error> {
        let client = Rc::new(connection().0);
        self.run(self.broker.map_dma(&caller(uid), client, request, queued(memory))).map(drop)
    }

    fn unmap(&self, uid: u32, held: &Acquired, iova: u64, size: u64) -> Result<u64, Error> {
        self.run(unmap(&self.broker, uid, held, iova, size))
    }
}

fn parsed(policy: &str) -> Policy {
    let policy = Policy::parse("policy.toml", policy, &());
    policy.unwrap_or_else(|problems| panic!("{problems}"))
}

fn simulation(machine: &str) -> Sim {
    Sim::start(Topology::from_toml(machine).unwrap()).unwrap()
}

/// Waits until this is so.
async fn until(is_so: impl Fn() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("it has not come to that");
}

/// A client's connection, as the daemon has it and as the client has it.
fn connection() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

/// The reply that has come, with its open files.
fn received<T: DeserializeOwned>(client: &UnixStream) -> (T, Vec<OwnedFd>) {
    #[derive(serde::Deserialize)]
    struct Reply<T> {
        parameters: T,
    }
    let mut buffer = vec![0; 1 << 16];
    let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    let got = fdpass::receive(client.as_fd(), &mut buffer, fdpass::MAX_FDS, flags).unwrap();
    let text = buffer[..got.len].strip_suffix(&[0]).expect("the whole reply");
    (serde_json::from_slice::<Reply<T>>(text).unwrap().parameters, got.fds)
}

async fn acquire(broker: &Rc<Broker>, uid: u32, request: &Acquire) -> Result<Grant, Error> {
    let (client, ours) = connection();
    let done = broker.acquire(&caller(uid), Rc::new(client), request).await?;
    assert_eq!(done, Delivery::Whole);
    let (reply, fds) = received(&ours);
    Ok(Grant { reply, fds })
}

async fn release(broker: &Rc<Broker>, uid: u32, held: &Acquired) -> Result<bool, Error> {
    let request = Release { lease: held.lease.clone(), key: held.key.clone() };
    let client = Rc::new(connection().0);
    broker.release(&caller(uid), client, &request).await.map(|released| released.proved)
}

async fn map(
    broker: &Rc<Broker>,
    uid: u32,
    held: &Acquired,
    iova: u64,
    size: u64,
) -> Result<(), Error> {
    let (memory, _) = crate::kernel::Mapped::memfd(size as usize).unwrap();
    let request = map_request(held, iova, size);
    let client = Rc::new(connection().0);
    broker.map_dma(&caller(uid), client, &request, queued(memory)).await.map(drop)
}

async fn unmap(
    broker: &Rc<Broker>,
    uid: u32,
    held: &Acquired,
    iova: u64,
    size: u64,
) -> Result<u64, Error> {
    let Acquired { lease, key, .. } = held.clone();
    let request = UnmapDma { lease, key, iova, size };
    let client = Rc::new(connection().0);
    let done = broker.unmap_dma(&caller(uid), client, &request).await;
    done.map(|Unmapped { unmapped }| unmapped)
}

/// A request's only file, as the daemon has it.
fn queued(file: OwnedFd) -> OwnedFd {
    queue(&[(0, file.as_fd())]).unwrap()
}

fn map_request(held: &Acquired, iova: u64, size: u64) -> MapDma {
    let Acquired { lease, key, .. } = held.clone();
    MapDma { lease, key, iova, size, read: true, write: true, memory: 0, offset: 0 }
}

fn caller(uid: u32) -> Caller {
    let pid = uid as i32 + 10_000;
    Caller { peer: Peer { uid, gid: uid, groups: Vec::new(), pid, unit: None, label: None } }
}

fn want(devices: &[&str]) -> Acquire {
    Acquire { vm: "web1".into(), devices: specs(devices), ..Acquire::default() }
}

fn withholding(companion: &str, request: Acquire) -> Acquire {
    Acquire { withhold: Some(specs(&[companion])), ..request }
}

fn want_as(handout: Handout, devices: &[&str]) -> Acquire {
    Acquire { handout: Some(handout), ..want(devices) }
}

fn want_in(container: &str, devices: &[&str]) -> Acquire {
    Acquire { container: Some(container.into()), ..want(devices) }
}

fn more(held: &Acquired, devices: &[&str]) -> Acquire {
    let (lease, key) = (Some(held.lease.clone()), Some(held.key.clone()));
    Acquire { lease, key, ..want(devices) }
}

fn specs(devices: &[&str]) -> Vec<DeviceSpec> {
    devices.iter().map(|bdf| DeviceSpec::Bdf { bdf: bdf.parse().unwrap() }).collect()
}

fn kinds(grant: &Grant) -> Vec<(FdKind, &str)> {
    grant.reply.fds.iter().map(|fd| (fd.kind, fd.name.as_str())).collect()
}

fn get_fds(held: &Acquired) -> GetFds {
    GetFds { lease: held.lease.clone(), key: held.key.clone(), ..GetFds::default() }
}
