//! A kernel that writes down what it is asked, so that two ways of asking can be compared.

use nix::errno::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use vfio_broker::kernel::{Ioctl, Kernel, Node, Reply};

/// A kernel behind a notebook.
#[derive(Debug)]
pub struct Recorder {
    kernel: Arc<dyn Kernel>,
    calls: Mutex<Vec<String>>,
}

impl Recorder {
    pub fn new(kernel: Arc<dyn Kernel>) -> Arc<Self> {
        Arc::new(Self { kernel, calls: Mutex::default() })
    }

    /// What was asked since the last time, in order.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }
}

impl Kernel for Recorder {
    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        self.note(format!("open {node}"));
        self.kernel.open(node)
    }

    fn ioctl(&self, fd: BorrowedFd<'_>, call: Ioctl<'_>) -> Result<Reply, Errno> {
        self.note(format!("ioctl {}", call.request.name));
        self.kernel.ioctl(fd, call)
    }

    fn pread(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        self.note(format!("pread {offset:#x}"));
        self.kernel.pread(fd, buf, offset)
    }

    fn pwrite(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize, Errno> {
        self.note(format!("pwrite {offset:#x}"));
        self.kernel.pwrite(fd, buf, offset)
    }

    fn sysfs_read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        self.note(format!("read /sys/{path}"));
        self.kernel.sysfs_read(path)
    }

    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        self.kernel.sysfs_write(path, bytes)
    }

    fn sysfs_list(&self, path: &str) -> Result<Vec<String>, Errno> {
        self.note(format!("readdir /sys/{path}"));
        self.kernel.sysfs_list(path)
    }

    fn sysfs_inode(&self, path: &str) -> Result<u64, Errno> {
        self.note(format!("stat /sys/{path}"));
        self.kernel.sysfs_inode(path)
    }

    fn sysfs_link(&self, path: &str) -> Result<String, Errno> {
        self.note(format!("readlink /sys/{path}"));
        self.kernel.sysfs_link(path)
    }
}
