//! How often the machine is read for "any of", and who waits meanwhile.

use super::*;
use crate::kernel::{Ioctl, Node, Reply};
use nix::errno::Errno;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use tokio::task::{JoinHandle, yield_now};

/// Many groups, each with a device of the same kind; the first has another one as well.
const GROUPS: usize = 100;

fn machine() -> String {
    let group = |id: usize| {
        format!(
            "[[group]]\nid = {id}\ndevice = [{{ bdf = \"0000:{id:02x}:00.0\", vendor = 0x8086, \
             device = 0x10d3, driver = \"vfio-pci\" }}]\n"
        )
    };
    let groups: String = (1..=GROUPS).map(group).collect();
    format!("kernel = \"6.12\"\nowner_rights = true\nmemlock = \"unlimited\"\n{groups}")
}

/// The broker's kernel: notes which groups are read.
#[derive(Debug)]
struct Counting {
    kernel: Arc<dyn Kernel>,
    reads: Arc<Mutex<Vec<u32>>>,
}

impl Kernel for Counting {
    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        self.kernel.open(node)
    }

    fn find(&self, node: &Node) -> Result<(), Errno> {
        self.kernel.find(node)
    }

    fn ioctl(&self, fd: BorrowedFd<'_>, call: Ioctl<'_>) -> Result<Reply, Errno> {
        self.kernel.ioctl(fd, call)
    }

    fn pread(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        self.kernel.pread(fd, buf, offset)
    }

    fn pwrite(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize, Errno> {
        self.kernel.pwrite(fd, buf, offset)
    }

    fn sysfs_read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.kernel.sysfs_read(path)
    }

    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.kernel.sysfs_write(path, bytes)
    }

    fn sysfs_list(&self, path: &str) -> Result<Vec<String>, Errno> {
        let group = path.strip_prefix("kernel/iommu_groups/");
        if let Some(id) = group.and_then(|rest| rest.strip_suffix("/devices")) {
            self.reads.lock().unwrap().push(id.parse().unwrap());
        }
        self.kernel.sysfs_list(path)
    }

    fn sysfs_inode(&self, path: &str) -> Result<u64, Errno> {
        self.kernel.sysfs_inode(path)
    }

    fn sysfs_link(&self, path: &str) -> Result<String, Errno> {
        self.kernel.sysfs_link(path)
    }
}

/// A world, and the groups that its broker has read since it was asked last.
struct Counted {
    world: World,
    reads: Arc<Mutex<Vec<u32>>>,
}

impl Counted {
    fn of(machine: &str, patience: Patience) -> Self {
        let sim = simulation(machine);
        let (kernel, reads) = (sim.kernel(), Arc::<Mutex<Vec<u32>>>::default());
        let front = Arc::new(Counting { kernel: sim.kernel(), reads: Arc::clone(&reads) });
        let world =
            World::with(sim, POLICY, patience, front, Box::new(move |_| Arc::clone(&kernel)));
        Self { world, reads }
    }

    fn new() -> Self {
        Self::of(&machine(), Patience::NONE)
    }

    fn reads(&self) -> Vec<u32> {
        let mut reads = std::mem::take(&mut *self.reads.lock().unwrap());
        reads.sort_unstable();
        reads
    }

    fn all() -> Vec<u32> {
        (1..=GROUPS as u32).collect()
    }

    /// Begins to list the groups, as the daemon does.
    fn begin_list(&self, uid: u32) -> JoinHandle<usize> {
        let broker = Rc::clone(&self.world.broker);
        self.world.local.spawn_local(async move {
            let step = broker.step(&caller(uid)).await;
            let mut tour = broker.tour(&caller(uid)).unwrap();
            drop(step);
            let mut groups = 0;
            while !tour.is_over() {
                let _step = broker.step(&caller(uid)).await;
                groups += broker.next_groups(&caller(uid), &mut tour).unwrap().len();
            }
            groups
        })
    }
}

fn nic() -> DeviceSpec {
    DeviceSpec::Kind { vendor: "8086".into(), device: "10d3".into() }
}

fn any_of(count: usize) -> Acquire {
    Acquire { devices: vec![nic(); count], ..want(&[]) }
}

#[test]
fn all_who_choose_at_the_same_time_have_the_machine_read_once() {
    let counted = Counted::new();
    let world = &counted.world;
    let begun: Vec<_> = (0..6).map(|n| world.begin(1000 + n % 3, &any_of(1))).collect();
    let grants: Vec<_> = begun.into_iter().map(|it| world.run(it).unwrap().unwrap()).collect();
    assert_eq!(counted.reads(), Counted::all());
    let chosen: std::collections::BTreeSet<_> =
        grants.iter().map(|grant| grant.reply.devices.clone()).collect();
    assert_eq!(chosen.len(), 6);
    // Who comes later has it read as it is then.
    drop(world.acquire(1000, &any_of(1)));
    assert_eq!(counted.reads(), Counted::all());
}

#[test]
fn whoever_comes_while_the_machine_is_read_has_the_rest_read_with_the_first_and_what_was_before_anew()
 {
    let counted = Counted::new();
    let world = &counted.world;
    let first = world.begin(1000, &any_of(1));
    world.run(async {
        while counted.reads.lock().unwrap().len() < GROUPS / 2 {
            yield_now().await;
        }
    });
    let before = counted.reads.lock().unwrap().len();
    let second = world.begin(1001, &any_of(1));
    drop((world.run(first).unwrap().unwrap(), world.run(second).unwrap().unwrap()));
    let reads = counted.reads();
    let anew = reads.len() - GROUPS;
    // The first may have a step before the second is heard of.
    assert!((before..=before + steps::GROUPS).contains(&anew), "{before}, and {anew} read anew");
    let twice = (1..=GROUPS as u32).filter(|id| reads.iter().filter(|it| *it == id).count() == 2);
    assert_eq!(twice.count(), anew);
}

#[test]
fn whoever_comes_last_of_many_waits_for_one_round() {
    let counted = Counted::new();
    let world = &counted.world;
    let mut begun = Vec::new();
    for n in 0..8 {
        let before = counted.reads.lock().unwrap().len();
        begun.push(world.begin(1000 + n % 3, &any_of(1)));
        world.run(async {
            while counted.reads.lock().unwrap().len() < before + 2 * steps::GROUPS {
                yield_now().await;
            }
        });
    }
    let before = counted.reads.lock().unwrap().len() - 2 * steps::GROUPS;
    begun.into_iter().for_each(|it| drop(world.run(it).unwrap()));
    let all = counted.reads().len();
    assert!(
        all <= before + GROUPS + steps::GROUPS,
        "{all} groups were read, {before} of them before"
    );
}

#[test]
fn others_are_answered_between_the_steps_of_a_flood() {
    let counted = Counted::new();
    let world = &counted.world;
    let refused = Acquire { devices: vec![nic(); 2], handout: Some(Handout::Iommufd), ..want(&[]) };
    let mut flood = Vec::new();
    for _ in 0..20 {
        flood.push(world.begin(1000, &refused));
    }
    let lists: Vec<_> = (0..20).map(|_| counted.begin_list(1000)).collect();
    let calls = world.run(async {
        let (mut calls, mut read) = (0, 0);
        while !lists.iter().all(JoinHandle::is_finished) {
            // Of another tenant, by its address, and refused: answered in one go.
            let call = acquire(&world.broker, 1001, &want(&["0000:f0:00.0"])).await;
            assert!(matches!(call, Err(Error::NoSuchDevice { .. })));
            let now = counted.reads.lock().unwrap().len();
            assert!(now - read <= steps::GROUPS, "{} groups were read meanwhile", now - read);
            (calls, read) = (calls + 1, now);
            yield_now().await;
        }
        calls
    });
    assert!(calls > GROUPS / steps::GROUPS);
    for call in flood {
        drop(world.run(call).unwrap());
    }
    for list in lists {
        assert_eq!(world.run(list).unwrap(), GROUPS);
    }
}

#[test]
fn a_tenant_with_many_calls_has_no_more_of_the_steps_than_one_with_one() {
    let world = World::new();
    let order = Rc::new(RefCell::new(Vec::new()));
    let begin = |uid: u32| {
        let (broker, order) = (Rc::clone(&world.broker), Rc::clone(&order));
        world.local.spawn_local(async move {
            for _ in 0..3 {
                let _step = broker.step(&caller(uid)).await;
                order.borrow_mut().push(uid);
            }
        })
    };
    let flood: Vec<_> = (0..20).map(|_| begin(1000)).collect();
    let other = begin(1001);
    world.run(async {
        while !other.is_finished() {
            let before = order.borrow().len();
            yield_now().await;
            assert!(order.borrow().len() <= before + 1, "two steps without a turn between them");
        }
    });
    let so_far = order.borrow().iter().filter(|uid| **uid == 1000).count();
    assert!(so_far <= 4, "{so_far} steps of the flood before the third of another");
    flood.into_iter().for_each(|task| world.run(task).unwrap());
    assert_eq!(order.borrow().len(), 63);
}

#[test]
fn who_waits_for_one_device_does_not_have_the_machine_read_again_for_each_change() {
    let counted = Counted::of(&machine(), Patience::long());
    let world = &counted.world;
    let mut last = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let stale: Vec<_> = last.fds.drain(..last.fds.len() - 1).collect();
    drop(last);
    world.until(|| world.has_pending_reclaims());
    counted.reads();
    let request =
        Acquire { devices: [specs(&["0000:02:00.0"]), vec![nic()]].concat(), ..want(&[]) };
    let waiting = world.begin(1001, &request);
    world.until(|| counted.reads.lock().unwrap().len() >= GROUPS);
    for _ in 0..5 {
        let mut grant = world.acquire(1000, &want(&["0000:03:00.0"])).unwrap();
        grant.fds.clear();
        assert_eq!(world.release(1000, &grant.reply), Ok(true));
    }
    assert!(!waiting.is_finished());
    drop(stale);
    let grant = world.run(waiting).unwrap().unwrap();
    assert_eq!(grant.reply.devices, ["0000:02:00.0", "0000:01:00.0"]);
    let reads = counted.reads();
    let others = reads.iter().filter(|id| **id > 3).copied();
    assert_eq!(others.collect::<Vec<_>>(), (4..=GROUPS as u32).collect::<Vec<_>>());
}

#[test]
fn what_was_somebodys_when_it_was_read_is_read_again_once_it_is_free() {
    let counted = Counted::new();
    let world = &counted.world;
    let held = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap();
    let (request, mut candidates) = (any_of(1), None);
    let read = |candidates: &mut Option<candidates::Candidates>| {
        counted.reads();
        let step = world.run(world.broker.read_candidates(&caller(1001), &request, candidates));
        drop(step.unwrap());
        counted.reads()
    };
    assert_eq!(read(&mut candidates), Counted::all());
    assert!(read(&mut candidates).is_empty(), "nothing has changed");
    drop(held);
    world.serve_hang_ups();
    world.assert_idle();
    world.sim.set_driver("0000:02:00.0", None).unwrap();
    assert_eq!(read(&mut candidates), [2]);
    let group = &candidates.as_ref().unwrap().groups[&2];
    assert!(!group.devices[0].on_vfio, "as it is now");
    assert!(read(&mut candidates).is_empty());
    // By another policy all is looked at anew.
    world.reload(POLICY);
    assert_eq!(read(&mut candidates), Counted::all());
}
