//! A lease: what the broker gave to one holder, as one unit.

use super::files::inheritable;
use super::{Acquire, Error, Files, Result};
use crate::kernel::{self, Kernel, Node};
use crate::protocol::{self, Acquired, Backend, FdKind, Handout};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What the broker gave, with its open files.
///
/// Dropping it closes the lease fd and every open file in it. The lease ends when the last copy of
/// its lease fd, in whichever process, is closed; until the last copies of the other files are
/// closed too the broker gives its devices to nobody else. Connections to the broker mean nothing
/// to a lease.
///
/// The typed handles that it gives are copies of the same open files, so they may outlive it; the
/// broker will take the devices back once it has ended, though.
#[derive(Debug)]
pub struct Lease {
    id: String,
    key: String,
    vm: String,
    tenant: String,
    backend: Backend,
    handout: Handout,
    iommu: String,
    container: String,
    devices: Vec<String>,
    lifeline: OwnedFd,
    files: Files,
}

impl Lease {
    pub(super) fn new(vm: String, reply: Acquired, fds: Vec<OwnedFd>) -> Result<Self> {
        let mut files = Files::pair(METHOD, &reply.fds, fds)?;
        let Some(lifeline) = files.take(FdKind::Lease, None) else {
            return Err(Error::malformed(METHOD, "there is no lease fd in it"));
        };
        let Acquired {
            lease: id, key, tenant, backend, handout, iommu, container, devices, ..
        } = reply;
        let lifeline = lifeline.fd;
        Ok(Self {
            id,
            key,
            vm,
            tenant,
            backend,
            handout,
            iommu,
            container,
            devices,
            lifeline,
            files,
        })
    }

    /// Takes in what a further Acquire on this lease gave.
    pub(super) fn extend(&mut self, reply: Acquired, fds: Vec<OwnedFd>) -> Result<()> {
        let mut more = Files::pair(METHOD, &reply.fds, fds)?;
        // A further lifeline of the same lease: one is enough.
        drop(more.take(FdKind::Lease, None));
        self.files.extend(more);
        for device in reply.devices {
            if !self.devices.contains(&device) {
                self.devices.push(device);
            }
        }
        Ok(())
    }

    /// The lease's public name, as lists show it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The secret that every call on this lease needs. Whoever knows it and may talk to the broker
    /// can operate on the lease.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// What the VM was called in the request.
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// The policy's entry that it was given by.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Through which interface of the kernel.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// In which form the open files were given.
    pub fn handout(&self) -> Handout {
        self.handout
    }

    /// The IOMMU type that the container was set to.
    pub fn iommu(&self) -> &str {
        &self.iommu
    }

    /// The name of the container that the devices share an address space in.
    pub fn container_name(&self) -> &str {
        &self.container
    }

    /// The devices' addresses.
    pub fn devices(&self) -> &[String] {
        &self.devices
    }

    /// The open files that came, but for the lease fd.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The same, to take some of them out.
    pub fn files_mut(&mut self) -> &mut Files {
        &mut self.files
    }

    /// The lease fd. It reads end-of-file when the broker ends the lease, so it can be polled for
    /// POLLIN or POLLHUP; there is nothing else to do with it.
    pub fn lifeline(&self) -> BorrowedFd<'_> {
        self.lifeline.as_fd()
    }

    /// A copy of the lease fd for a child process to inherit: the lease then lives until the child
    /// has ended too. See [`inheritable`].
    ///
    /// # Errors
    /// EMFILE: too many open files.
    pub fn inheritable_lifeline(&self) -> Result<OwnedFd> {
        inheritable(&self.lifeline)
    }

    /// Gives up the open files: the lease fd first, then the others. The lease ends when the first
    /// is closed.
    pub fn into_parts(self) -> (OwnedFd, Files) {
        (self.lifeline, self.files)
    }

    /// The container, of the handout `container` (and `group` where the container is shared).
    ///
    /// # Errors
    /// [`Error::Missing`] where the handout has none.
    pub fn container(&self) -> Result<kernel::Container> {
        let fd = self.copy(FdKind::Container, None)?;
        Ok(kernel::Container::from_fd(self.kernel_of(fd.as_fd(), "the container")?, fd))
    }

    /// The group, where there is but one.
    ///
    /// # Errors
    /// [`Error::Missing`] where the handout has none, or several: see [`Lease::groups`].
    pub fn group(&self) -> Result<kernel::Group> {
        let mut groups = self.groups()?;
        match (groups.pop(), groups.len()) {
            (Some(group), 0) => Ok(group),
            (None, _) => Err(self.missing(FdKind::Group, "")),
            (Some(_), others) => {
                let hint = format!("it has {}; see Lease::groups", others + 1);
                Err(Error::Missing {
                    lease: self.id.clone(),
                    kind: FdKind::Group,
                    name: String::new(),
                    hint,
                })
            }
        }
    }

    /// All groups; none where the handout has none.
    ///
    /// # Errors
    /// EMFILE: too many open files.
    pub fn groups(&self) -> Result<Vec<kernel::Group>> {
        let groups = self.files.iter().filter(|file| file.kind == FdKind::Group);
        groups
            .map(|file| {
                let fd = copy(&file.fd)?;
                let number = file.name.parse().unwrap_or_default();
                let no_iommu = self.iommu == "noiommu";
                let node = if no_iommu { Node::NoIommuGroup(number) } else { Node::Group(number) };
                Ok(kernel::Group::from_fd(self.kernel_of(fd.as_fd(), "the group")?, node, fd))
            })
            .collect()
    }

    /// A device: the one that was handed out, or else it is opened through its group, which is
    /// attached already with the handout `container` and which the holder attaches with `group`.
    ///
    /// # Errors
    /// [`Error::Missing`] it is not of this lease; [`Error::Kernel`] the kernel did not open it.
    pub fn device(&self, name: &str) -> Result<kernel::Device> {
        if let Some(file) = self.files.get(FdKind::Device, Some(name)) {
            let fd = copy(&file.fd)?;
            return Ok(kernel::Device::from_fd(self.kernel_of(fd.as_fd(), name)?, name, fd));
        }
        if !self.devices.iter().any(|device| device == name) {
            return Err(self.missing(FdKind::Device, name));
        }
        let mut last = self.missing(FdKind::Device, name);
        for group in self.groups()? {
            match group.device(name) {
                Ok(device) => return Ok(device),
                // ENODEV: it is in another group of this lease.
                Err(error) if error.errno == nix::errno::Errno::ENODEV => last = error.into(),
                Err(error) => return Err(error.into()),
            }
        }
        Err(last)
    }

    /// The iommufd, of the handout `iommufd`: empty, and nobody else's. Whoever makes address spaces
    /// in it and maps is charged for itself.
    ///
    /// # Errors
    /// [`Error::Missing`] where the handout has none, or it was taken out.
    pub fn iommufd(&self) -> Result<kernel::Iommufd> {
        let fd = self.copy(FdKind::Iommufd, None)?;
        Ok(kernel::Iommufd::from_fd(self.kernel_of(fd.as_fd(), "the iommufd")?, fd))
    }

    /// A device of the handout `iommufd` by its own node: unbound, until
    /// [`bind_iommufd`](kernel::Device::bind_iommufd) is called on it or a copy of it.
    ///
    /// # Errors
    /// [`Error::Missing`] it is not of this lease, another handout, or it was taken out.
    pub fn cdev(&self, name: &str) -> Result<kernel::Device> {
        let fd = self.copy(FdKind::Cdev, Some(name))?;
        Ok(kernel::Device::from_fd(self.kernel_of(fd.as_fd(), name)?, name, fd))
    }

    /// All devices of the handout `iommufd`, as [`Lease::cdev`]; none where the handout has none.
    ///
    /// # Errors
    /// EMFILE: too many open files.
    pub fn cdevs(&self) -> Result<Vec<kernel::Device>> {
        let cdevs = self.files.iter().filter(|file| file.kind == FdKind::Cdev);
        cdevs.map(|file| self.cdev(&file.name)).collect()
    }

    /// A copy of one of the open files.
    ///
    /// # Errors
    /// [`Error::Missing`] there is none; EMFILE too many open files.
    pub fn copy(&self, kind: FdKind, name: Option<&str>) -> Result<OwnedFd> {
        let file = self.files.get(kind, name);
        copy(&file.ok_or_else(|| self.missing(kind, name.unwrap_or_default()))?.fd)
    }

    /// The kernel that an open file belongs to: a simulated one is a socket, a real one never is.
    fn kernel_of(&self, fd: BorrowedFd<'_>, object: &str) -> Result<Arc<dyn Kernel>> {
        if !is_socket(fd) {
            return Ok(Arc::new(kernel::Linux));
        }
        self.simulated(object)
    }

    #[cfg(feature = "sim")]
    fn simulated(&self, _: &str) -> Result<Arc<dyn Kernel>> {
        Ok(Arc::new(crate::sim::Wire::detached()))
    }

    #[cfg(not(feature = "sim"))]
    fn simulated(&self, object: &str) -> Result<Arc<dyn Kernel>> {
        Err(Error::Simulated { lease: self.id.clone(), object: object.to_owned() })
    }

    fn missing(&self, kind: FdKind, name: &str) -> Error {
        let Self { id, handout, devices, .. } = self;
        let handout = serde_json::to_string(handout).unwrap_or_default();
        let hint = format!("its handout is {handout}, its devices are {}", devices.join(" "));
        Error::Missing { lease: id.clone(), kind, name: name.to_owned(), hint }
    }

    pub(super) fn get_fds_call(&self) -> protocol::GetFds {
        let (lease, key) = (self.id.clone(), self.key.clone());
        protocol::GetFds { lease, key, lifeline: Some(false), ..Default::default() }
    }

    pub(super) fn release_call(&self) -> protocol::Release {
        protocol::Release { lease: self.id.clone(), key: self.key.clone() }
    }

    pub(super) fn add_call(&self, more: Acquire) -> Result<protocol::Acquire> {
        let mut request = more.into_request()?;
        request.vm.clone_from(&self.vm);
        request.lease = Some(self.id.clone());
        request.key = Some(self.key.clone());
        Ok(request)
    }

    pub(super) fn map_call(&self, range: &DmaRange) -> protocol::MapDma {
        let &DmaRange { iova, size, read, write, offset } = range;
        let (lease, key) = (self.id.clone(), self.key.clone());
        protocol::MapDma { lease, key, iova, size, read, write, memory: 0, offset }
    }

    pub(super) fn unmap_call(&self, iova: u64, size: u64) -> protocol::UnmapDma {
        protocol::UnmapDma { lease: self.id.clone(), key: self.key.clone(), iova, size }
    }
}

const METHOD: &str = <protocol::Acquire as protocol::Method>::NAME;

/// Memory that the lease's devices are to reach, where the broker maps (handout `devices`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// Address that the devices use, in bytes.
    pub iova: u64,
    /// Length in bytes.
    pub size: u64,
    /// Where it starts in the memory's file, in bytes.
    pub offset: u64,
    /// The devices may read it.
    pub read: bool,
    /// The devices may write it.
    pub write: bool,
}

impl DmaRange {
    /// `size` bytes from the file's start on at `iova`, to read and to write.
    pub fn new(iova: u64, size: u64) -> Self {
        Self { iova, size, offset: 0, read: true, write: true }
    }
}

fn copy(fd: &OwnedFd) -> Result<OwnedFd> {
    let errno = |error: std::io::Error| {
        nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EMFILE))
    };
    fd.try_clone()
        .map_err(|error| Error::System { call: "fcntl F_DUPFD_CLOEXEC", errno: errno(error) })
}

fn is_socket(fd: BorrowedFd<'_>) -> bool {
    use nix::sys::stat::{SFlag, fstat};
    fstat(fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Fd;

    #[test]
    fn a_simulated_file_is_used_as_one_or_refused_in_words() {
        let fd = |index, kind, name: &str| Fd { index, kind, name: name.into() };
        let device = "0000:65:00.0";
        let kinds = [(FdKind::Container, "c"), (FdKind::Group, "15"), (FdKind::Device, device)];
        let files = kinds.into_iter().enumerate().map(|(at, (kind, name))| fd(at, kind, name));
        let reply = Acquired {
            lease: "l1".into(),
            key: "k1".into(),
            tenant: "t".into(),
            backend: Backend::Type1,
            handout: Handout::Container,
            iommu: "type1v2".into(),
            container: "c".into(),
            devices: vec![device.into()],
            fds: files.chain([fd(3, FdKind::Lease, "")]).collect(),
        };
        let socket = || OwnedFd::from(std::os::unix::net::UnixStream::pair().unwrap().0);
        let lease = Lease::new("web1".into(), reply, (0..4).map(|_| socket()).collect()).unwrap();
        let all =
            [lease.container().map(drop), lease.group().map(drop), lease.device(device).map(drop)];
        for result in all {
            if cfg!(feature = "sim") {
                result.unwrap();
            } else {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("build with feature \"sim\""), "{error}");
            }
        }
    }
}
