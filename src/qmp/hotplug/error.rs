//! Why a device did not get into a QEMU, or out of it.

use crate::qmp::{self, Version};
use crate::{client, protocol};
use std::time::Duration;

/// The result of an attach or a detach.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a device did not get in or out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The conversation with QEMU failed, or QEMU refused.
    #[error(transparent)]
    Qemu(#[from] qmp::Error),
    /// The conversation with the broker failed, or the broker refused.
    #[error(transparent)]
    Broker(#[from] client::Error),
    /// This QEMU can't be given devices. Nothing was touched.
    #[error("QEMU {version} can't be given devices: {why}")]
    Unsupported {
        /// The version.
        version: Version,
        /// What it lacks.
        why: String,
    },
    /// The request can't be carried out as it is. Nothing was touched.
    #[error("{what}: {why}")]
    BadRequest {
        /// Which part of it.
        what: String,
        /// Why not.
        why: String,
    },
    /// The device is in this QEMU already. Nothing was touched.
    #[error("{device} is in this QEMU already, as {id}")]
    AlreadyThere {
        /// The device.
        device: String,
        /// What QEMU calls it.
        id: String,
    },
    /// The device is not one that was attached.
    #[error(
        "{device} was not attached to {vm} through this monitor; {}",
        if .attached.is_empty() {
            "nothing was".to_owned()
        } else {
            format!("what was: {}", .attached.join(", "))
        }
    )]
    NotAttached {
        /// The device.
        device: String,
        /// The VM.
        vm: String,
        /// What was, each with its VM.
        attached: Vec<String>,
    },
    /// QEMU said that it has the device, and does not have it.
    #[error("QEMU plugged {device} in as {id}, and does not have it: {why}")]
    NotThere {
        /// The device.
        device: String,
        /// What QEMU was to call it.
        id: String,
        /// What it says instead.
        why: String,
    },
    /// The guest was asked to let go of the device and refused, or has not done so in time. The
    /// device is still in the guest.
    #[error("the guest {} {device} ({id}); it still has it", waited(*.after))]
    GuestKeeps {
        /// The device.
        device: String,
        /// What QEMU calls it.
        id: String,
        /// How long it was waited for; `None` where the guest refused.
        after: Option<Duration>,
    },
    /// A failure that could not be undone in QEMU.
    #[error("{error}; left in QEMU: {}; the next attach or detach there clears it", left.join(", "))]
    Left {
        /// The failure.
        error: Box<Error>,
        /// What is left.
        left: Vec<String>,
    },
}

impl Error {
    /// What to do about it; `None` where the error's own words say all.
    pub fn advice(&self) -> Option<String> {
        match self {
            Error::Qemu(error) => error.advice().map(str::to_owned),
            Error::Broker(error) => error.advice(),
            Error::Unsupported { .. } => {
                Some(format!("QEMU {} or newer with iommufd can", super::OLDEST))
            }
            Error::GuestKeeps { .. } => Some("look into the guest, and try again".into()),
            Error::Left { error, .. } => error.advice(),
            Error::BadRequest { .. }
            | Error::AlreadyThere { .. }
            | Error::NotAttached { .. }
            | Error::NotThere { .. } => None,
        }
    }

    /// The failure itself, whatever it left behind.
    pub fn cause(&self) -> &Error {
        match self {
            Error::Left { error, .. } => error.cause(),
            other => other,
        }
    }

    pub(super) fn bad(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::BadRequest { what: what.into(), why: why.into() }
    }

    /// Whether the broker does not know the lease: it has ended.
    pub(super) fn lease_is_gone(error: &client::Error) -> bool {
        matches!(error, client::Error::Broker { error: protocol::Error::NoSuchLease { .. }, .. })
    }
}

fn waited(after: Option<Duration>) -> String {
    match after {
        Some(after) => format!("has not let go, within {} s, of", after.as_secs()),
        None => "refuses to let go of".to_owned(),
    }
}
