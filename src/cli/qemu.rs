//! QEMU's monitor for attach and detach, and what goes wrong there in words.

use super::Failure;
use crate::qmp::hotplug::Error;
use crate::qmp::{self, Monitor};
use std::path::Path;

pub(super) fn connect(path: &Path) -> Result<Monitor, Failure> {
    Monitor::connect(path).map_err(|error| failure(error.into()))
}

pub(super) fn failure(error: Error) -> Failure {
    let (error, left) = match error {
        Error::Left { error, left } => (*error, left),
        error => (error, Vec::new()),
    };
    let advice = advice(&error);
    let failure = match error {
        Error::Broker(error) => error.into(),
        error => Failure::of(&error.to_string()),
    };
    let failure = match advice {
        Some(advice) => failure.advise(advice),
        None => failure,
    };
    let left = left
        .into_iter()
        .map(|what| format!("left in QEMU: {what}; the next attach or detach there clears it"));
    left.fold(failure, Failure::detail)
}

/// What to do about QEMU's refusals, where its words are known.
fn advice(error: &Error) -> Option<&'static str> {
    let Error::Qemu(qmp::Error::Command { desc, .. }) = error else {
        return match error {
            Error::GuestKeeps { .. } => Some("look into the guest, and try again"),
            _ => None,
        };
    };
    let known = [
        (
            "does not support hotplugging",
            "name a pcie-root-port that QEMU was started with: --bus ID",
        ),
        ("no slot/function available", "that port is taken: name another one with --bus ID"),
        (
            "Cannot allocate memory",
            "QEMU may pin too little memory for its guest: see RLIMIT_MEMLOCK",
        ),
    ];
    known.iter().find(|(words, _)| desc.contains(words)).map(|(_, advice)| *advice)
}
