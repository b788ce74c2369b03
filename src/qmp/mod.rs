//! A running QEMU's monitor (QMP), and devices into it and out of it.
//!
//! [`Monitor`] is the protocol and nothing else: commands and their answers, events in between, open
//! files that go along. [`hotplug`] is what the broker has to do with it.
//!
//! ```no_run
//! use vfio_broker::client::Client;
//! use vfio_broker::qmp::Monitor;
//! use vfio_broker::qmp::hotplug::{Attach, attach};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let mut qemu = Monitor::connect("/run/vm/web1.qmp")?;
//!     let mut broker = Client::connect()?;
//!     let request = Attach::new("web1", "0000:65:00.0").bus("port1");
//!     let attached = attach(&mut qemu, &mut broker, &request)?;
//!     println!("{} is {} in the guest", attached.device, attached.id);
//!     Ok(())
//! } // the lease lives as long as QEMU does, or until it is detached
//! ```

mod error;
pub mod hotplug;
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
