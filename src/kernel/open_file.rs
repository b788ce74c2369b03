//! An open file of a kernel: what all typed handles do with theirs.

#![allow(unsafe_code)]

use super::{Arg, Error, Ioctl, Kernel, Node, Reply, Request, Result};
use nix::errno::Errno;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// An open file, the kernel that it is of and closed through, and its name in messages.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) kernel: Arc<dyn Kernel>,
    pub(super) name: String,
    fd: ManuallyDrop<OwnedFd>,
    /// `fd` is somebody else's now, and not to be looked at.
    is_taken: bool,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if !self.is_taken {
            // SAFETY: it has not been taken, and nothing looks at it after its end.
            let fd = unsafe { ManuallyDrop::take(&mut self.fd) };
            self.kernel.close(fd);
        }
    }
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OpenFile> for OwnedFd {
    fn from(mut file: OpenFile) -> OwnedFd {
        file.is_taken = true;
        // SAFETY: this is the end of `file`, which is told so.
        unsafe { ManuallyDrop::take(&mut file.fd) }
    }
}

impl OpenFile {
    /// Opens a node; `name` is for what is called on it later.
    pub(super) fn open(kernel: Arc<dyn Kernel>, node: &Node, name: &str) -> Result<Self> {
        let fd = kernel.open(node).map_err(|errno| Error::new("open", node.to_string(), errno))?;
        Ok(Self::new(kernel, fd, name))
    }

    pub(super) fn new(kernel: Arc<dyn Kernel>, fd: OwnedFd, name: &str) -> Self {
        Self { kernel, name: name.to_owned(), fd: ManuallyDrop::new(fd), is_taken: false }
    }

    pub(super) fn through(mut self, kernel: &Arc<dyn Kernel>) -> Self {
        self.kernel = Arc::clone(kernel);
        self
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
