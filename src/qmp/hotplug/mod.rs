//! Devices from the broker into a running QEMU, and out of it again.
//!
//! [`attach`] makes a lease, gives QEMU the lease fd, the iommufd and the device, and has it plug the
//! device in; from then on the lease is QEMU's, and the caller may end. [`detach`] is the way back.
//!
//! All that has to be known later is kept in QEMU itself, as an object beside the device (see
//! [`state`](self)'s `Record`): it ends when QEMU ends, nobody can lose it, and who may talk to the
//! monitor is master of the device anyway. So what an attach leaves behind that was killed half way
//! is found, and cleared, by the next attach or detach on the same monitor.

mod attach;
mod check;
mod detach;
mod error;
mod state;

pub use attach::{Attach, Attached, attach};
pub use check::OLDEST;
pub use detach::{Detach, Detached, detach};
pub use error::{Error, Result};
