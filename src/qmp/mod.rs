//! A running QEMU's monitor (QMP), for launchers and for `vfio-broker attach`.
//!
//! [`Monitor`] is the protocol and nothing else: commands and their answers, events in between, open
//! files that go along.
//!
//! ```no_run
//! use serde_json::json;
//! use vfio_broker::qmp::Monitor;
//!
//! # fn main() -> vfio_broker::qmp::Result<()> {
//! let mut qemu = Monitor::connect("/run/vm/web1.qmp")?;
//! let status = qemu.execute("query-status", json!({}))?;
//! println!("QEMU {} is {}", qemu.version(), status["status"]);
//! # Ok(())
//! # }
//! ```

mod error;
mod lines;
mod message;
mod monitor;

#[cfg(any(test, fuzzing))]
pub mod properties;
#[cfg(test)]
mod tests;

pub use error::{Error, Result};
pub use message::{Event, Version};
pub use monitor::Monitor;
