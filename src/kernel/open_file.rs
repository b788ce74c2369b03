//! An open file of a kernel: what all typed handles do with theirs.

use super::{Arg, Error, Ioctl, Kernel, Node, Reply, Request, Result};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// An open file, the kernel that it is of, and its name in messages.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) kernel: Arc<dyn Kernel>,
    pub(super) name: String,
    fd: OwnedFd,
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OpenFile> for OwnedFd {
    fn from(file: OpenFile) -> OwnedFd {
        file.fd
    }
}

impl OpenFile {
    /// Opens a node; `name` is for what is called on it later.
    pub(super) fn open(kernel: Arc<dyn Kernel>, node: &Node, name: &str) -> Result<Self> {
        let fd = kernel.open(node).map_err(|errno| Error::new("open", node.to_string(), errno))?;
        Ok(Self::new(kernel, fd, name))
    }

    pub(super) fn new(kernel: Arc<dyn Kernel>, fd: OwnedFd, name: &str) -> Self {
        Self { kernel, name: name.to_owned(), fd }
    }

    /// What a failed call on it is told as.
    pub(super) fn failed(&self, call: &'static str) -> impl Fn(Errno) -> Error {
        let name = self.name.clone();
        move |errno| Error::new(call, name.clone(), errno)
    }

    pub(super) fn ioctl(&self, request: Request, arg: Arg<'_>) -> Result<Reply> {
        let call = Ioctl { request, arg };
        self.kernel.ioctl(self.as_fd(), call).map_err(self.failed(request.name))
    }

    /// An ioctl whose answer is its return value.
    pub(super) fn call(&self, request: Request, arg: Arg<'_>) -> Result<i32> {
        self.ioctl(request, arg).map(|reply| reply.value)
    }

    /// The same with a struct that names nothing else.
    pub(super) fn call_struct(&self, request: Request, bytes: &mut [u8]) -> Result<i32> {
        self.call(request, Arg::Struct { bytes, fds: &[], out: None })
    }
}
