//! vfio-broker: a privileged daemon that opens VFIO devices and hands the open file descriptors to
//! unprivileged VMMs, and the client, the typed kernel calls and the simulated kernel that go with
//! it.
//!
//! - [`kernel`]: the ioctl layer, typed, with the real Linux behind it.
//! - `policy`: who may have what (feature `daemon`).
//! - [`protocol`]: what is said on the broker's socket.

pub mod fdpass;
pub mod kernel;
#[cfg(feature = "daemon")]
pub mod policy;
pub mod protocol;
