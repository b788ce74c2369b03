//! A kernel in front of the simulated one that fails when told to.

use super::*;
use crate::kernel::{Ioctl, Node, Reply};
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

/// A kernel whose nth call from now fails, whoever makes it.
#[derive(Debug, Default)]
pub(super) struct Failing {
    pub(super) left: AtomicI64,
    /// The keepers whose calls do not count: what they have has ended, and they look by themselves
    /// from time to time whether it is free.
    idle: Mutex<BTreeSet<String>>,
}

impl Failing {
    /// Has the nth call from now fail.
    pub(super) fn arm(&self, world: &World, nth: i64) {
        let books = world.broker.books();
        let live = |entry: &&Rc<books::Entry>| books.ledger.live(entry.id).is_some();
        let entries = books.entries.values().filter(live);
        let busy: BTreeSet<_> = entries.map(|entry| entry.keeper.name.clone()).collect();
        let mut all: BTreeSet<_> = world.keepers.place.names().unwrap().into_iter().collect();
        all.retain(|name| !busy.contains(name));
        *self.idle.lock().unwrap() = all;
        self.left.store(nth, Ordering::SeqCst);
    }

    /// Whether it has failed; from now on no call will.
    pub(super) fn disarm(&self) -> bool {
        self.left.swap(0, Ordering::SeqCst) <= 0
    }

    fn count(&self, keeper: Option<&str>) -> Result<(), Errno> {
        if keeper.is_some_and(|name| self.idle.lock().unwrap().contains(name)) {
            return Ok(());
        }
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left == 1 { Err(Errno::EIO) } else { Ok(()) }
    }
}

/// The kernel as the broker, or one keeper, sees it.
#[derive(Debug)]
struct View {
    kernel: Arc<dyn Kernel>,
    failing: Arc<Failing>,
    keeper: Option<String>,
}

impl View {
    fn count(&self) -> Result<(), Errno> {
        self.failing.count(self.keeper.as_deref())
    }
}

impl Kernel for View {
    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        self.count()?;
        self.kernel.open(node)
    }

    fn find(&self, node: &Node) -> Result<(), Errno> {
        self.count()?;
        self.kernel.find(node)
    }

    fn ioctl(&self, fd: BorrowedFd<'_>, call: Ioctl<'_>) -> Result<Reply, Errno> {
        self.count()?;
        self.kernel.ioctl(fd, call)
    }

    fn pread(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        self.count()?;
        self.kernel.pread(fd, buf, offset)
    }

    fn pwrite(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize, Errno> {
        self.count()?;
        self.kernel.pwrite(fd, buf, offset)
    }

    fn sysfs_read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.count()?;
        self.kernel.sysfs_read(path)
    }

    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.count()?;
        self.kernel.sysfs_write(path, bytes)
    }

    fn sysfs_list(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.count()?;
        self.kernel.sysfs_list(path)
    }

    fn sysfs_inode(&self, path: &str) -> Result<u64, Errno> {
        self.count()?;
        self.kernel.sysfs_inode(path)
    }

    fn sysfs_link(&self, path: &str) -> Result<String, Errno> {
        self.count()?;
        self.kernel.sysfs_link(path)
    }
}

/// The world with a kernel in front of it that fails at will.
pub(super) fn failing() -> (World, Arc<Failing>) {
    let sim = simulation(MACHINE);
    let failing = Arc::new(Failing::default());
    let (shared, kernel) = (Arc::clone(&failing), sim.kernel());
    let view = move |keeper: Option<&str>| {
        let (kernel, failing) = (Arc::clone(&kernel), Arc::clone(&shared));
        Arc::new(View { kernel, failing, keeper: keeper.map(str::to_owned) }) as Arc<dyn Kernel>
    };
    let front = view(None);
    let kernels: KernelOf = Box::new(move |name| view(Some(name)));
    (World::with(sim, POLICY, Patience::NONE, front, kernels), failing)
}
