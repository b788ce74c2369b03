//! The Varlink interface `org.vfiobroker.Broker`: message types, errors and framing, shared by the
//! daemon and the client. No I/O happens here.

mod administration;
mod device_spec;
mod error;
mod frame;
mod messages;
mod methods;
mod processes;
#[cfg(any(test, fuzzing))]
pub mod properties;

#[cfg(test)]
mod interface_tests;
mod varlink;

pub use crate::bdf::Bdf;
pub use administration::*;
pub use device_spec::{DeviceSpec, is_uuid};
pub use error::{Blocker, Error, Holder, Until};
pub use frame::{Frames, MAX_MESSAGE, Oversize};
pub use messages::*;
#[cfg(any(test, fuzzing))]
pub(crate) use methods::with_methods;
pub use methods::{Method, Request, Rules};
pub use processes::{Known, OpenFile, OpenKind, Process, Processes};
#[cfg(feature = "client")]
pub(crate) use varlink::encode;
pub use varlink::*;

/// The interface's name.
pub const INTERFACE: &str = "org.vfiobroker.Broker";

/// The interface, in Varlink's own language: what `GetInterfaceDescription` returns.
pub const DESCRIPTION: &str = include_str!("org.vfiobroker.Broker.varlink");

/// Varlink's own interface, in the same language.
pub const SERVICE_DESCRIPTION: &str = include_str!("org.varlink.service.varlink");

/// Where the broker listens unless told otherwise.
pub const SOCKET_PATH: &str = "/run/vfio-broker/broker.sock";
