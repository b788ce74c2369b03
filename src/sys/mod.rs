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
#[cfg(feature = "daemon")]
pub mod landlock;
pub mod memlock;
#[cfg(feature = "daemon")]
pub mod node;
pub mod peer;
pub mod process;
#[cfg(feature = "async")]
pub mod readiness;
#[cfg(feature = "daemon")]
pub mod seccomp;
#[cfg(feature = "cli")]
pub mod slots;
#[cfg(feature = "sim")]
pub(crate) mod table;

pub use error::{Error, Result};
