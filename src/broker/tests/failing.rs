//! A kernel in front of the simulated one that fails when told to.

use super::*;
use crate::kernel::{Ioctl, Node, Reply};
use nix::errno::Errno;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI64, Ordering};

/// A kernel whose nth call from now fails.
#[derive(Debug)]
pub(super) struct Failing {
    kernel: Arc<dyn Kernel>,
    pub(super) left: AtomicI64,
}

impl Failing {
    fn count(&self) -> Result<(), Errno> {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left == 1 { Err(Errno::EIO) } else { Ok(()) }
    }
}

impl Kernel for Failing {
    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        self.count()?;
        self.kernel.open(node)
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
    let World { sim, broker, witness } = World::new();
    let kernel = Arc::new(Failing { kernel: sim.kernel(), left: AtomicI64::new(0) });
    let observer = Arc::clone(&witness) as Arc<dyn Observer>;
    let policy = Arc::clone(broker.policy());
    let front = Arc::clone(&kernel) as Arc<dyn Kernel>;
    let broker = Broker::with_patience(front, policy, observer, Vec::new());
    (World { sim, broker, witness }, kernel)
}
