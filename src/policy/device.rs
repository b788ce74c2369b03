//! Which devices a rule names.

use crate::protocol::Bdf;
use std::fmt;

/// What sysfs says about a PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its address.
    pub bdf: Bdf,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem device id.
    pub subsystem_device: u16,
    /// Class code, 24 bits.
    pub class: u32,
    /// The PF, if this is a VF.
    pub physfn: Option<Bdf>,
    /// The PCI device serial number as lspci prints it, `00-11-22-33-44-55-66-77`, if the device
    /// has one and it could be read.
    pub serial: Option<String>,
}

impl DeviceFacts {
    /// Vendor and device id.
    pub fn id(&self) -> Id {
        Id(self.vendor, self.device)
    }

    /// Subsystem vendor and device id.
    pub fn subsystem(&self) -> Id {
        Id(self.subsystem_vendor, self.subsystem_device)
    }
}

/// Two ids as they are always written together: `8086:10d3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(pub u16, pub u16);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.0, self.1)
    }
}

impl Id {
    /// Reads `8086:10d3`, four hexadecimal digits each.
    pub fn parse(text: &str) -> Option<Self> {
        let (vendor, device) = text.split_once(':')?;
        let hex = |digits: &str| {
            let form = digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            form.then(|| u16::from_str_radix(digits, 16).ok()).flatten()
        };
        Some(Self(hex(vendor)?, hex(device)?))
    }
}

/// One entry of `devices` or `deny`. All that is given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DeviceRule {
    pub(super) line: usize,
    pub(super) bdf: Option<Bdf>,
    pub(super) vf_of: Option<Bdf>,
    pub(super) id: Option<Id>,
    pub(super) subsystem: Option<Id>,
    pub(super) serial: Option<String>,
}

/// What a rule says about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Match {
    Yes,
    /// Its place or kind is named, what is there is something else: what to tell.
    Nearly(String),
    No,
}

impl DeviceRule {
    /// As an entry of `devices`: what is not known does not match.
    pub(super) fn allows(&self, facts: &DeviceFacts) -> Match {
        let Some(named) = self.names(facts) else { return Match::No };
        let bdf = facts.bdf;
        if let Some(id) = self.id.filter(|id| *id != facts.id()) {
            return Match::Nearly(format!(
                "{named} is allowed as {id}, but {} is there now",
                facts.id()
            ));
        }
        if let Some(want) = self.subsystem.filter(|want| *want != facts.subsystem()) {
            let is = facts.subsystem();
            return Match::Nearly(format!(
                "{named} is allowed with subsystem {want}, but that of {bdf} is {is}"
            ));
        }
        match (&self.serial, &facts.serial) {
            (Some(want), Some(is)) if want != is => Match::Nearly(format!(
                "{named} is allowed with serial {want}, but that of {bdf} is {is}"
            )),
            (Some(want), None) => Match::Nearly(format!(
                "{named} is allowed with serial {want}, but {bdf} shows none"
            )),
            _ => Match::Yes,
        }
    }

    /// As an entry of `deny`: what is not known matches.
    pub(super) fn denies(&self, facts: &DeviceFacts) -> bool {
        let serial = match (&self.serial, &facts.serial) {
            (Some(want), Some(is)) => want == is,
            _ => true,
        };
        self.names(facts).is_some()
            && self.id.is_none_or(|id| id == facts.id())
            && self.subsystem.is_none_or(|id| id == facts.subsystem())
            && serial
    }

    /// What of `facts` this rule is about, in words, if it is about it at all. Ids beside an
    /// address do not choose a device, they check it.
    fn names(&self, facts: &DeviceFacts) -> Option<String> {
        match (self.bdf, self.vf_of, self.id) {
            (Some(bdf), None, _) => (bdf == facts.bdf).then(|| bdf.to_string()),
            (None, Some(pf), _) => {
                (facts.physfn == Some(pf)).then(|| format!("{}, a VF of {pf},", facts.bdf))
            }
            (None, None, Some(id)) => (id == facts.id()).then(|| format!("a {id}")),
            _ => None,
        }
    }
}

impl fmt::Display for DeviceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.bdf, self.vf_of, self.id) {
            (Some(bdf), _, Some(id)) => write!(f, "{bdf} as {id}")?,
            (Some(bdf), _, None) => write!(f, "{bdf}")?,
            (None, Some(pf), Some(id)) => write!(f, "VFs of {pf} as {id}")?,
            (None, Some(pf), None) => write!(f, "VFs of {pf}")?,
            (None, None, Some(id)) => write!(f, "any {id}")?,
            (None, None, None) => write!(f, "nothing")?,
        }
        if let Some(subsystem) = self.subsystem {
            write!(f, ", subsystem {subsystem}")?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ", serial {serial}")?;
        }
        Ok(())
    }
}
