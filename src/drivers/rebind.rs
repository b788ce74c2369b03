//! Binding a device anew to the VFIO driver that it has: proof that nobody has it open.

use super::bind::{bind, probe, unbind};
use super::plan::{Failed, apply};
use crate::host;
use crate::kernel::{Error, Kernel};
use crate::protocol::Bdf;
use nix::errno::Errno;

/// Why a device was not bound again.
#[derive(Debug, thiserror::Error)]
pub enum RebindError {
    /// It is a host driver's by now.
    #[error("{0} is not on a VFIO driver any more")]
    NotOnVfio(Bdf),
    /// Probing it could give it to a host driver.
    #[error("{0} has no driver, and its driver_override names no VFIO one")]
    NoOverride(Bdf),
    /// The kernel says nothing where an earlier unbind is still under way.
    #[error("{0} is not on a driver yet: some process has it open")]
    StillOpen(Bdf),
    /// Sysfs can't be read.
    #[error(transparent)]
    Read(#[from] Error),
    /// A write failed.
    #[error(transparent)]
    Write(#[from] Failed),
}

/// Binds a device again: to its driver, or where it has none to the one that it had `before` an earlier
/// attempt that came to no end, or to the one that its `driver_override` names. Returns when its last file
/// is closed, whenever that is.
///
/// `registration` is the one that is to end. Another one is left alone: somebody else was faster.
///
/// # Errors
/// [`RebindError`].
pub fn rebind(
    kernel: &dyn Kernel,
    device: Bdf,
    registration: u64,
    driver: Option<&str>,
    before: Option<&str>,
) -> Result<(), RebindError> {
    // Whoever asks looked a while ago. What is a host driver's by now, or could become one's,
    // nobody has named.
    match driver {
        Some(driver) => match host::registration(kernel, device)? {
            Some(now) if now == registration => {
                Ok(apply(kernel, &[unbind(device, driver), bind(device, driver)])?)
            }
            Some(_) => Ok(()),
            None => Err(RebindError::NotOnVfio(device)),
        },
        None => {
            let again = match before {
                Some(driver) => apply(kernel, &[bind(device, driver)]),
                None => {
                    let path = format!("bus/pci/devices/{device}/driver_override");
                    let only = kernel.sysfs_read(&path);
                    if !only.is_ok_and(|only| String::from_utf8_lossy(&only).contains("vfio")) {
                        return Err(RebindError::NoOverride(device));
                    }
                    apply(kernel, &[probe(device)])
                }
            };
            match again {
                // It is on its driver still, which waits for the last close.
                Err(failed) if matches!(failed.error.errno, Errno::EBUSY | Errno::ENODEV) => {}
                done => done?,
            }
            match host::registration(kernel, device)? {
                // Before Linux 6.6 it is there until the earlier unbind comes to its end.
                Some(now) if now != registration => Ok(()),
                _ => Err(RebindError::StillOpen(device)),
            }
        }
    }
}

/// Takes all these devices off their drivers, and binds each again when the last one is off: the group that
/// they are all of ends in between. Returns when the last of their files is closed, whenever that is.
///
/// # Errors
/// [`Failed`]: a write failed; what was done before is undone.
pub fn rebind_all(kernel: &dyn Kernel, devices: &[(Bdf, String)]) -> Result<(), Failed> {
    let unbinds = devices.iter().map(|(device, driver)| unbind(*device, driver));
    let binds = devices.iter().map(|(device, driver)| bind(*device, driver));
    apply(kernel, &unbinds.chain(binds).collect::<Vec<_>>())
}
