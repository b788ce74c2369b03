//! The broker on the simulated kernel.

mod dma;
mod failing;
mod flow;
mod iommufd;
mod plan;
mod race;
mod random;
mod rebind;
mod reclaim;
mod restart;
mod shared;
mod undo;

use super::*;
use crate::policy::{Names, Peer};
use crate::protocol::{
    Acquire, Acquired, DeviceSpec, Error, FdKind, GetFds, Handout, MapDma, Release, UnmapDma,
    Unmapped, Until,
};
use crate::sim::{Sim, Stats, Topology};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

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
devices = ["10de:2684", "10de:22ba", "8086:10d3", "1b21:0612", "15b3:101d", "15b3:101e"]
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

struct NoNames;

impl Names for NoNames {
    fn uid(&self, _: &str) -> Option<u32> {
        None
    }

    fn gid(&self, _: &str) -> Option<u32> {
        None
    }
}

/// Remembers what it is told.
#[derive(Default)]
struct Witness {
    events: Mutex<Vec<Event>>,
    lifelines: Mutex<BTreeMap<LifelineId, Arc<OwnedFd>>>,
    watches_no_more: AtomicBool,
}

impl Observer for Witness {
    fn lifeline_opened(&self, id: LifelineId, write_end: Arc<OwnedFd>) -> Result<(), Errno> {
        if self.watches_no_more.load(Ordering::SeqCst) {
            return Err(Errno::ENOSPC);
        }
        self.lifelines.lock().unwrap().insert(id, write_end);
        Ok(())
    }

    fn lifeline_closed(&self, id: LifelineId) {
        let known = self.lifelines.lock().unwrap().remove(&id);
        assert!(known.is_some(), "{id:?} was closed and never opened");
    }

    fn event(&self, event: &Event) {
        self.events.lock().unwrap().push(event.clone());
    }
}

struct World {
    sim: Sim,
    broker: Arc<Broker>,
    witness: Arc<Witness>,
}

impl World {
    fn new() -> Self {
        Self::of(MACHINE, POLICY)
    }

    /// A world whose broker waits for as long as it takes.
    fn patient() -> Self {
        Self::new().made_patient()
    }

    fn made_patient(self) -> Self {
        let World { sim, broker, witness } = self;
        let observer = Arc::clone(&witness) as Arc<dyn Observer>;
        let patience = vec![Duration::from_millis(5); 10_000];
        let policy = Arc::clone(broker.policy());
        let broker = Broker::with_patience(sim.kernel(), policy, observer, patience);
        Self { sim, broker, witness }
    }

    fn of(machine: &str, policy: &str) -> Self {
        let sim = Sim::start(Topology::from_toml(machine).unwrap()).unwrap();
        let policy = Policy::parse("policy.toml", policy, &NoNames);
        let policy = policy.unwrap_or_else(|problems| panic!("{problems}"));
        let witness = Arc::new(Witness::default());
        let observer = Arc::clone(&witness) as Arc<dyn Observer>;
        let broker = Broker::with_patience(sim.kernel(), Arc::new(policy), observer, Vec::new());
        Self { sim, broker, witness }
    }

    fn stats(&self) -> Stats {
        self.sim.stats().unwrap()
    }

    /// What the daemon does when its event loop wakes.
    fn serve_hang_ups(&self) {
        let ids: Vec<_> = self.witness.lifelines.lock().unwrap().keys().copied().collect();
        for ended in ids.into_iter().filter_map(|id| self.broker.hung_up(id)) {
            self.broker.reclaim(ended);
        }
    }

    /// Has an administrator take a device off its driver and bind it again, and the broker see it.
    fn rebind(&self, bdf: &str) {
        self.sim.set_driver(bdf, None).unwrap();
        self.sim.set_driver(bdf, Some("vfio-pci")).unwrap();
        self.broker.topology(&caller(1001)).unwrap();
    }

    /// Nothing is open, nothing is mapped, nothing is in the books.
    fn assert_idle(&self) {
        assert!(self.stats().is_idle(), "{:#?}", self.stats());
        let books = self.broker.books();
        assert_eq!(books.ledger, crate::ledger::Ledger::default());
        assert!(books.entries.is_empty() && books.lifelines.is_empty());
        assert!(self.witness.lifelines.lock().unwrap().is_empty());
    }

    fn events(&self) -> Vec<(EventKind, Vec<String>)> {
        let events = std::mem::take(&mut *self.witness.events.lock().unwrap());
        events.into_iter().map(|event| (event.event, event.devices)).collect()
    }

    fn acquire(&self, uid: u32, request: &Acquire) -> Result<Grant, Error> {
        self.broker.acquire(&caller(uid), request)
    }

    fn release(&self, uid: u32, held: &Acquired) -> Result<bool, Error> {
        let request = Release { lease: held.lease.clone(), key: held.key.clone() };
        self.broker.release(&caller(uid), &request).map(|released| released.proved)
    }

    fn map(&self, uid: u32, held: &Acquired, iova: u64, size: u64) -> Result<(), Error> {
        let (memory, _) = crate::kernel::Mapped::memfd(size as usize).unwrap();
        self.broker.map_dma(&caller(uid), &map_request(held, iova, size), memory).map(drop)
    }

    fn unmap(&self, uid: u32, held: &Acquired, iova: u64, size: u64) -> Result<u64, Error> {
        let Acquired { lease, key, .. } = held.clone();
        let request = UnmapDma { lease, key, iova, size };
        self.broker.unmap_dma(&caller(uid), &request).map(|Unmapped { unmapped }| unmapped)
    }
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
