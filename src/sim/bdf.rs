//! PCI addresses: segment, bus, device and function.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::str::FromStr;

/// A PCI address, written `0000:65:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// The segment, also called domain.
    pub segment: u16,
    /// Bus, device and function as one number: the routing id.
    pub routing_id: u16,
}

impl Bdf {
    /// The bus number.
    pub fn bus(self) -> u8 {
        (self.routing_id >> 8) as u8
    }

    /// Device and function in one byte.
    pub fn devfn(self) -> u8 {
        self.routing_id as u8
    }

    /// The address `by` routing ids further on; `None` past the end of the segment.
    pub fn plus(self, by: u32) -> Option<Self> {
        let routing_id = u16::try_from(u32::from(self.routing_id).checked_add(by)?).ok()?;
        Some(Self { routing_id, ..self })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, function) = (self.devfn() >> 3, self.devfn() & 7);
        write!(f, "{:04x}:{:02x}:{device:02x}.{function:x}", self.segment, self.bus())
    }
}

impl FromStr for Bdf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a PCI address such as 0000:65:00.0");
        let parse = || {
            let (segment, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let field = |digits: &str, len: usize, most: u16| {
                let all_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
                let value = u16::from_str_radix(digits, 16).ok()?;
                (all_hex && digits.len() == len && value <= most).then_some(value)
            };
            let devfn = field(device, 2, 31)? << 3 | field(function, 1, 7)?;
            let routing_id = field(bus, 2, 255)? << 8 | devfn;
            Some(Self { segment: field(segment, 4, u16::MAX)?, routing_id })
        };
        parse().ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back_as_it_was_written() {
        let bdf: Bdf = "0000:65:1f.7".parse().unwrap();
        assert_eq!((bdf.bus(), bdf.devfn()), (0x65, 0xff));
        assert_eq!(bdf.to_string(), "0000:65:1f.7");
        assert_eq!(bdf.plus(1).unwrap().to_string(), "0000:66:00.0");
        for wrong in ["", "65:00.0", "0000:65:20.0", "0000:65:00.8", "0000:+5:00.0", "0:65:00.0"] {
            assert!(wrong.parse::<Bdf>().is_err(), "{wrong}");
        }
    }
}
