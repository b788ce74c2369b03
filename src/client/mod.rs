//! For VMM authors: ask the broker for devices and get their open files.
//!
//! ```no_run
//! use vfio_broker::client::{Acquire, Client};
//! use vfio_broker::kernel::{DmaMap, Mapped};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let mut broker = Client::connect()?;
//!     let lease = broker.acquire(Acquire::new("web1").device("0000:65:00.0"))?;
//!     let container = lease.container()?; // attached, its IOMMU type set
//!     let (_fd, memory) = Mapped::memfd(2 << 20)?;
//!     let (vaddr, size) = (memory.vaddr(), memory.size() as u64);
//!     let flags = DmaMap::READ | DmaMap::WRITE;
//!     container.map(&DmaMap { flags, vaddr, iova: 0, size })?;
//!     let device = lease.device("0000:65:00.0")?;
//!     println!("{:04x?}, {} regions", device.pci_ids()?, device.info()?.regions);
//!     Ok(())
//! } // the lease ends here: its fd, and with it the last copy, is closed
//! ```
//!
//! A [`Lease`] is what the broker gave, as one unit. It lives as long as its lease fd, which the
//! [`Lease`] owns; connections come and go and mean nothing to it, so any [`Client`] can operate on
//! any lease whose key it has. [`tokio::Client`] is the same for tokio programs.

mod acquire;
mod administration;
pub(crate) mod connection;
mod error;
mod files;
mod lease;
mod replies;
pub(crate) mod send;
mod wire;

mod blocking;
#[cfg(feature = "async")]
pub mod tokio;

#[cfg(any(test, fuzzing))]
pub mod properties;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use acquire::Acquire;
pub use blocking::{Client, Watch};
pub use error::{Error, Result};
pub use files::{File, Files, inheritable};
pub use lease::{DmaRange, Lease};
pub use replies::Replies;

use std::path::PathBuf;

/// The environment variable that names another socket than [`crate::protocol::SOCKET_PATH`].
pub const SOCKET_VARIABLE: &str = "VFIO_BROKER_SOCKET";

/// Where the broker is: what [`SOCKET_VARIABLE`] says, or else the usual place.
pub fn socket_path() -> PathBuf {
    std::env::var_os(SOCKET_VARIABLE)
        .filter(|path| !path.is_empty())
        .map_or_else(|| crate::protocol::SOCKET_PATH.into(), PathBuf::from)
}
