//! System calls that are not about VFIO: open files over sockets, peers, limits, inherited files. Each
//! has a safe face here; the `unsafe` that it takes is behind it.

#[cfg(feature = "daemon")]
pub mod capabilities;
#[cfg(feature = "daemon")]
pub mod child;
mod error;
pub mod event;
pub mod fdpass;
pub mod inherited;
pub mod memlock;
pub mod peer;
pub mod process;
#[cfg(feature = "async")]
pub mod readiness;
#[cfg(feature = "cli")]
pub mod slots;
#[cfg(feature = "sim")]
pub(crate) mod table;

pub use error::{Error, Result};
