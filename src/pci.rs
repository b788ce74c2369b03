//! What a PCI function is, as sysfs shows it.

use crate::bdf::Bdf;
use serde::{Deserialize, Serialize};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
