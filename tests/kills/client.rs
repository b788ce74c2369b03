//! The life of a client: it acquires, does what dice say, and tells each thing that it has done in a line.

use crate::dice::Dice;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};
use vfio_broker::client::{Acquire, Client, DmaRange, Error, Lease};
use vfio_broker::protocol::{self, Handout};

pub const FLAG: &str = "--client";
/// Begins the line that says what may not be.
pub const FAILED: &str = "FAILED: ";
const RANGE: u64 = 1 << 16;

/// `SEED iommufd|groups DIRECTORY DEVICE...`
pub fn live(words: &[String]) {
    let [seed, has_iommufd, directory, devices @ ..] = words else { panic!("{words:?}") };
    let mut dice = Dice::new(seed.parse().unwrap());
    let mut handouts = vec![Handout::Container, Handout::Group, Handout::Devices, Handout::Devices];
    if has_iommufd == "iommufd" {
        handouts.push(Handout::Iommufd);
    }
    let handout = dice.one_of(&handouts);
    // Opened first, these are closed first where the process dies.
    let locks = Locks::open(Path::new(directory), devices);
    let mut broker = connects();
    let mut life = Life { dice, locks, devices, handout, maps: Vec::new(), next: 0 };
    let Some(lease) = life.acquires(&mut broker) else { return };
    life.goes_on(&mut broker, lease);
}

struct Life<'a> {
    dice: Dice,
    locks: Locks,
    devices: &'a [String],
    handout: Handout,
    /// What is known to be mapped, and what comes next.
    maps: Vec<u64>,
    next: u64,
}

impl Life<'_> {
    /// Devices to ask for, by their indexes.
    fn wants(&mut self) -> Vec<usize> {
        let one = self.dice.below(self.devices.len() as u64) as usize;
        // The first two are one group, which these hand out as a whole.
        let whole = matches!(self.handout, Handout::Container | Handout::Group);
        if whole && one < 2 { vec![0, 1] } else { vec![one] }
    }

    fn named(&self, order: Acquire, wanted: &[usize]) -> Acquire {
        wanted.iter().fold(order, |order, index| order.device(&self.devices[*index]))
    }

    fn acquires(&mut self, broker: &mut Client) -> Option<Lease> {
        for _ in 0..20 {
            let wanted = self.wants();
            let mut order = self.named(Acquire::new("random"), &wanted).handout(self.handout);
            if self.handout == Handout::Devices && self.dice.below(2) == 0 {
                order = order.container("enforced");
            }
            if let Some(lease) = did("acquire", broker.acquire(order)) {
                wanted.iter().for_each(|index| self.locks.take(*index));
                return Some(lease);
            }
            std::thread::sleep(Duration::from_millis(self.dice.below(100)));
        }
        None
    }

    fn goes_on(&mut self, broker: &mut Client, mut lease: Lease) {
        for _ in 0..3 + self.dice.below(8) {
            match self.dice.below(6) {
                0 | 1 if self.handout == Handout::Devices => self.maps(broker, &lease),
                2 if !self.maps.is_empty() => self.unmaps(broker, &lease),
                3 => self.adds(broker, &mut lease),
                // Of the others there is no copy.
                4 if matches!(self.handout, Handout::Container | Handout::Devices) => {
                    drop(did("files", broker.get_fds(&lease)))
                }
                _ => looks(broker, &lease),
            }
        }
        match self.dice.below(3) {
            // The end of the process is the end of the lease.
            0 => {}
            1 => {
                self.locks.drop_all();
                drop(lease);
            }
            _ => {
                self.locks.drop_all();
                did("release", broker.release(lease));
            }
        }
    }

    fn maps(&mut self, broker: &mut Client, lease: &Lease) {
        // Members of one container have one address space.
        let iova = ((u64::from(std::process::id()) % 512) << 28) + self.next * RANGE;
        self.next += 1;
        let memory = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&memory, RANGE as i64).unwrap();
        if did("map", broker.map_dma(lease, &memory, DmaRange::new(iova, RANGE))).is_some() {
            self.maps.push(iova);
        }
    }

    fn unmaps(&mut self, broker: &mut Client, lease: &Lease) {
        let Some(iova) = self.maps.pop() else { return };
        if let Some(bytes) = did("unmap", broker.unmap_dma(lease, iova, RANGE)) {
            check(bytes == RANGE, &format!("{bytes} bytes were mapped at {iova:#x}"));
        }
    }

    fn adds(&mut self, broker: &mut Client, lease: &mut Lease) {
        let wanted = self.wants();
        if wanted.iter().any(|index| lease.devices().contains(&self.devices[*index])) {
            return;
        }
        let order = self.named(Acquire::new(""), &wanted);
        if did("add", broker.add(lease, order)).is_some() {
            wanted.iter().for_each(|index| self.locks.take(*index));
        }
    }
}

/// The lease is still there.
fn looks(broker: &mut Client, lease: &Lease) {
    if let Some(all) = did("look", broker.leases()) {
        let is_there = all.iter().any(|it| it.lease == lease.id());
        check(is_there, &format!("lease {} is not in {all:?}", lease.id()));
    }
}

/// Tells what came of a call. What is lost with a broker, or somebody else has, is nobody's fault.
fn did<T>(what: &str, result: Result<T, Error>) -> Option<T> {
    let error = match result {
        Ok(value) => {
            println!("{what}");
            return Some(value);
        }
        Err(error) => error,
    };
    let takes = matches!(what, "acquire" | "add");
    match &error {
        // Nobody was asked.
        Error::Connect { .. } => std::thread::sleep(Duration::from_millis(50)),
        Error::Lost { .. } => println!("{what} lost"),
        Error::Broker {
            error: protocol::Error::Busy { .. } | protocol::Error::Quarantined { .. },
            ..
        } if takes => {
            println!("{what} refused");
        }
        _ => check(false, &format!("{what}: {error:?}")),
    }
    None
}

/// A connection, as soon as there is a daemon.
fn connects() -> Client {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        match Client::connect() {
            Ok(broker) => return broker,
            Err(error) => check(Instant::now() < until, &format!("in a minute: {error}")),
        }
        std::thread::sleep(Duration::from_millis(25));
    }
}

fn check(holds: bool, what: &str) {
    if !holds {
        println!("{FAILED}{what}");
        std::process::exit(1);
    }
}

/// A file for each device, locked by who has it: the kernel's word that nobody else does.
struct Locks(Vec<File>);

pub fn make_lock(directory: &Path, device: &str) {
    let path = directory.join(device);
    File::create(&path).unwrap().set_permissions(Permissions::from_mode(0o666)).unwrap();
}

impl Locks {
    fn open(directory: &Path, devices: &[String]) -> Self {
        let open =
            |device: &String| OpenOptions::new().write(true).open(directory.join(device)).unwrap();
        Self(devices.iter().map(open).collect())
    }

    fn take(&self, index: usize) {
        let taken = self.lock(index, libc::F_WRLCK);
        check(taken.is_ok(), &format!("device {index} is in two hands: {taken:?}"));
    }

    fn drop_all(&self) {
        for index in 0..self.0.len() {
            let _ = self.lock(index, libc::F_UNLCK);
        }
    }

    fn lock(&self, index: usize, kind: libc::c_int) -> Result<i32, Errno> {
        let whence = libc::SEEK_SET as i16;
        let lock =
            libc::flock { l_type: kind as i16, l_whence: whence, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(&self.0[index], FcntlArg::F_SETLK(&lock))
    }
}
