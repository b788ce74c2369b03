//! Leases by iommufd: opening what is handed out, and what shows that a device's own node is closed
//! everywhere.

use super::{Broker, error, fds::Named};
use crate::host;
use crate::kernel::{Device, Iommufd};
use crate::ledger::{Request, Unproved};
use crate::protocol::{Bdf, Error, FdKind};
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A device that was opened by its own node.
#[derive(Debug)]
pub(super) struct Cdev {
    device: Device,
    /// Which registration of the device with VFIO that node is of.
    pub(super) registration: u64,
}

impl Named {
    pub(super) fn iommufd(iommufd: Iommufd) -> Self {
        Self { kind: FdKind::Iommufd, name: String::new(), fd: iommufd.into() }
    }

    pub(super) fn cdev(bdf: Bdf, cdev: Cdev) -> Self {
        let fd: OwnedFd = cdev.device.into();
        Self { kind: FdKind::Cdev, name: bdf.to_string(), fd }
    }
}

impl Broker {
    /// A new iommufd that charges each process for what it pins itself, not all of a user's
    /// together.
    pub(super) fn open_iommufd(&self) -> Result<Iommufd, Error> {
        let iommufd = Iommufd::open(Arc::clone(&self.kernel)).map_err(error::no_iommufd)?;
        match iommufd.set_rlimit_mode(true) {
            // A kernel that has no such option.
            Err(error) if matches!(error.errno, Errno::EOPNOTSUPP | Errno::ENOTTY) => {}
            done => done?,
        }
        Ok(iommufd)
    }

    /// Opens a device by its own node, unbound.
    pub(super) fn open_cdev(&self, bdf: Bdf) -> Result<Cdev, Error> {
        let kernel = &*self.kernel;
        let number = host::cdev(kernel, bdf)?.ok_or_else(|| error::no_cdev(bdf))?;
        let name = bdf.to_string();
        let device = Device::open_cdev(Arc::clone(&self.kernel), number, &name)?;
        // A node's number can be another device's by now. From here on this one has its own, and its
        // driver can't go.
        let registration = host::registration(kernel, bdf)?;
        match (registration, host::cdev(kernel, bdf)?) {
            (Some(registration), Some(now)) if now == number => Ok(Cdev { device, registration }),
            _ => {
                let why = "its driver was just taken away; try again".into();
                Err(Error::Conflict { what: name, why })
            }
        }
    }

    /// Looks whether nodes that are not known to be closed are: those of `tenant`, and those of
    /// the groups that are asked for. What can't be read shows nothing.
    pub(super) fn look_for_proof(&self, tenant: &str, concerns: impl Fn(u32) -> bool) {
        let unproved: Vec<(u32, Unproved)> = {
            let books = self.books();
            let all = books.ledger.unproved();
            let those = all.filter(|(id, left)| left.tenant == tenant || concerns(*id));
            those.map(|(id, left)| (id, left.clone())).collect()
        };
        let mut proved = false;
        for (group, unproved) in unproved {
            for (device, registration) in unproved.left {
                if self.has_let_go(device, registration) {
                    // A report on what is in the ledger; it can't refuse.
                    let report = Request::Proved { group, device, registration };
                    let _ = self.books().ledger.apply(report);
                    proved = true;
                }
            }
        }
        if proved {
            self.forget_proved();
        }
    }
}
