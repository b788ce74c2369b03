//! PCI addresses: segment, bus, device and function.

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// A PCI function's address, `DDDD:BB:DD.F`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// PCI segment, or domain.
    pub segment: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl Bdf {
    /// Device and function in one byte, as configuration cycles have them.
    pub fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }

    /// Reads what a person types: the full form, or `65:00.0` as `lspci` shows it, which is in
    /// domain 0.
    ///
    /// # Errors
    ///
    /// [`NotABdf`].
    pub fn typed(text: &str) -> Result<Self, NotABdf> {
        text.parse().or_else(|_| format!("0000:{text}").parse())
    }

    /// The address `by` routing ids further on; `None` past the end of the segment.
    pub fn plus(self, by: u32) -> Option<Self> {
        let id = u32::from(self.bus) << 8 | u32::from(self.devfn());
        let [bus, devfn] = u16::try_from(id.checked_add(by)?).ok()?.to_be_bytes();
        Some(Self { bus, device: devfn >> 3, function: devfn & 7, ..self })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, device, function } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

/// Not a PCI address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a PCI address of the form 0000:65:00.0")]
pub struct NotABdf;

impl FromStr for Bdf {
    type Err = NotABdf;

    /// Reads the full form only: four to eight lower or upper case hexadecimal digits of segment,
    /// then bus, device and function.
    fn from_str(text: &str) -> Result<Self, NotABdf> {
        let (segment, rest) = text.split_once(':').ok_or(NotABdf)?;
        let (bus, rest) = rest.split_once(':').ok_or(NotABdf)?;
        let (device, function) = rest.split_once('.').ok_or(NotABdf)?;
        let hex = |digits: &str, len: std::ops::RangeInclusive<usize>| {
            let form = len.contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            form.then(|| u32::from_str_radix(digits, 16).ok()).flatten().ok_or(NotABdf)
        };
        let segment = hex(segment, 4..=8)?;
        let bus = hex(bus, 2..=2)? as u8;
        let device = hex(device, 2..=2)? as u8;
        let function = hex(function, 1..=1)? as u8;
        if device > 31 || function > 7 {
            return Err(NotABdf);
        }
        Ok(Self { segment, bus, device, function })
    }
}

impl Serialize for Bdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_full_form_is_an_address() {
        let good: Bdf = "0000:65:00.0".parse().unwrap();
        assert_eq!(good.to_string(), "0000:65:00.0");
        assert_eq!("10000:E1:1f.7".parse::<Bdf>().unwrap().to_string(), "10000:e1:1f.7");
        for odd in [
            "",
            "65:00.0",
            "0000:65:00",
            "0000:65:20.0",
            "0000:65:00.8",
            "+000:65:00.0",
            "0000:65:00.0 ",
            "0000:065:00.0",
            "0000:65:00.00",
            "000000000:65:00.0",
            "é:65:00.0",
        ] {
            assert!(odd.parse::<Bdf>().is_err(), "{odd:?}");
        }
    }

    #[test]
    fn a_person_may_leave_out_the_domain() {
        for typed in ["65:00.0", "0000:65:00.0"] {
            assert_eq!(Bdf::typed(typed).unwrap().to_string(), "0000:65:00.0");
        }
        assert_eq!(Bdf::typed("10000:e1:00.0").unwrap().segment, 0x10000);
        for odd in ["", "5:00.0", "65:0.0", "8086:10d3", "0000:0000:65:00.0"] {
            assert!(Bdf::typed(odd).is_err(), "{odd:?}");
        }
    }

    #[test]
    fn routing_ids_count_through_functions_and_buses() {
        let bdf: Bdf = "0000:65:1f.7".parse().unwrap();
        assert_eq!(bdf.devfn(), 0xff);
        assert_eq!(bdf.plus(1).unwrap().to_string(), "0000:66:00.0");
        assert_eq!("0000:ff:1f.7".parse::<Bdf>().unwrap().plus(1), None);
    }
}
