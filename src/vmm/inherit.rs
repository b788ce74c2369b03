//! What a lease gives a program: the open files in the order of their numbers.

use super::arguments::position;
use super::{Error, Placeholder, Result};
use crate::client::Lease;
use crate::protocol::{FdKind, Group};
use crate::sys::slots::FIRST;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

/// The files of a lease as a program inherits them: those of the lease in their order, and the
/// lease fd last.
#[derive(Debug)]
pub struct InheritedFds<'l> {
    lease: &'l Lease,
    files: Vec<(FdKind, &'l str, BorrowedFd<'l>)>,
}

impl<'l> InheritedFds<'l> {
    /// All that the lease has.
    pub fn all(lease: &'l Lease) -> Self {
        let files = lease.files().iter();
        let mut files: Vec<_> =
            files.map(|file| (file.kind, &*file.name, file.fd.as_fd())).collect();
        files.push((FdKind::Lease, "", lease.lifeline()));
        Self { lease, files }
    }

    /// The lease fd alone.
    pub fn lifeline(lease: &'l Lease) -> Self {
        Self { lease, files: vec![(FdKind::Lease, "", lease.lifeline())] }
    }

    /// The open files, in the order of their numbers.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'l>> {
        self.files.iter().map(|(_, _, fd)| *fd)
    }

    /// What `LISTEN_FDS` is set to.
    pub fn count(&self) -> usize {
        self.files.len()
    }

    /// What `LISTEN_FDNAMES` is set to: `container`, `group-15`, `cdev-0000-65-00.0`, `lease`… Names
    /// can't have a colon there, which stands between them.
    pub fn names(&self) -> String {
        let name = |&(kind, name, _): &(FdKind, &str, BorrowedFd<'_>)| match kind {
            FdKind::Container | FdKind::Iommufd | FdKind::Lease => word(kind).to_owned(),
            FdKind::Group | FdKind::Device | FdKind::Cdev => {
                format!("{}-{}", word(kind), name.replace(':', "-"))
            }
        };
        self.files.iter().map(name).collect::<Vec<_>>().join(":")
    }

    /// The number that a placeholder stands for. `asked` are the devices as they were asked for, in
    /// the order of the request; `groups` is asked for only where there are several.
    ///
    /// # Errors
    /// [`Error::NotInLease`] and those of [`Arguments::check`](super::Arguments::check).
    pub fn number(
        &self,
        placeholder: &Placeholder,
        asked: &[String],
        groups: &[Group],
    ) -> Result<RawFd> {
        let device = match placeholder.device() {
            Some(_) => self.lease.devices().get(position(placeholder, asked)?).map(String::as_str),
            None => None,
        };
        let (kind, name) = match placeholder {
            Placeholder::Iommufd => (FdKind::Iommufd, None),
            Placeholder::Container => (FdKind::Container, None),
            Placeholder::Lease => (FdKind::Lease, None),
            Placeholder::Cdev(_) => (FdKind::Cdev, device.map(str::to_owned)),
            Placeholder::Device(_) => (FdKind::Device, device.map(str::to_owned)),
            Placeholder::Group(_) => (FdKind::Group, group_of(device, groups)),
        };
        let fits = |file: &&(FdKind, &str, BorrowedFd<'_>)| {
            file.0 == kind && name.as_deref().is_none_or(|name| name == file.1)
        };
        let at = self.files.iter().position(|file| fits(&file));
        let missing = || Error::NotInLease {
            placeholder: placeholder.to_string(),
            handout: format!("{:?}", self.lease.handout()).to_lowercase(),
        };
        let at = at.ok_or_else(missing)?;
        Ok(FIRST + RawFd::try_from(at).map_err(|_| missing())?)
    }
}

/// The group of a device, where there is more than one to choose from.
fn group_of(device: Option<&str>, groups: &[Group]) -> Option<String> {
    let has = |group: &&Group| group.devices.iter().any(|d| Some(d.bdf.as_str()) == device);
    groups.iter().find(has).map(|group| group.id.to_string())
}

fn word(kind: FdKind) -> &'static str {
    match kind {
        FdKind::Container => "container",
        FdKind::Group => "group",
        FdKind::Device => "device",
        FdKind::Iommufd => "iommufd",
        FdKind::Cdev => "cdev",
        FdKind::Lease => "lease",
    }
}
