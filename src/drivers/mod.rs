//! Drivers of devices, bound and unbound through sysfs: the only code that writes there.
//!
//! What is to be done is a plan of writes, each with the one that undoes it. A write can wait for
//! as long as somebody has the device open, and its process can't be killed meanwhile.

mod bind;
mod plan;
mod rebind;
#[cfg(test)]
mod tests;

pub use plan::Failed;
pub use rebind::{RebindError, rebind, rebind_all};
