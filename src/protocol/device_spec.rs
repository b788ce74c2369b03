//! How a request names a device.

use serde::de::{self, Deserializer, MapAccess, Visitor};
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
        text.parse().map_err(de::Error::custom)
    }
}

/// A device as a request names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum DeviceSpec {
    /// This function.
    Bdf {
        /// Its address.
        bdf: Bdf,
    },
    /// Any free VF of this PF.
    VfOf {
        /// The PF's address.
        vf_of: Bdf,
    },
    /// Any free device of this kind.
    Kind {
        /// PCI vendor id, four hexadecimal digits.
        vendor: String,
        /// PCI device id, four hexadecimal digits.
        device: String,
    },
    /// A mediated device.
    Mdev {
        /// Its UUID.
        mdev: String,
    },
}

impl From<Bdf> for DeviceSpec {
    fn from(bdf: Bdf) -> Self {
        Self::Bdf { bdf }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bdf { bdf } => bdf.fmt(f),
            Self::VfOf { vf_of } => write!(f, "a VF of {vf_of}"),
            Self::Kind { vendor, device } => write!(f, "a {vendor}:{device}"),
            Self::Mdev { mdev } => write!(f, "mdev {mdev}"),
        }
    }
}

/// The object form; which fields are there says which kind it is.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Object {
    bdf: Option<Bdf>,
    vf_of: Option<Bdf>,
    vendor: Option<String>,
    device: Option<String>,
    mdev: Option<String>,
}

impl Object {
    fn spec(self) -> Result<DeviceSpec, &'static str> {
        match self {
            Self { bdf: Some(bdf), vf_of: None, vendor: None, device: None, mdev: None } => {
                Ok(DeviceSpec::Bdf { bdf })
            }
            Self { bdf: None, vf_of: Some(vf_of), vendor: None, device: None, mdev: None } => {
                Ok(DeviceSpec::VfOf { vf_of })
            }
            Self {
                bdf: None,
                vf_of: None,
                vendor: Some(vendor),
                device: Some(device),
                mdev: None,
            } => {
                let id =
                    |text: &str| text.len() == 4 && text.bytes().all(|b| b.is_ascii_hexdigit());
                if !id(&vendor) || !id(&device) {
                    return Err("vendor and device are four hexadecimal digits each");
                }
                let lower = |text: String| text.to_ascii_lowercase();
                Ok(DeviceSpec::Kind { vendor: lower(vendor), device: lower(device) })
            }
            Self { bdf: None, vf_of: None, vendor: None, device: None, mdev: Some(mdev) } => {
                Ok(DeviceSpec::Mdev { mdev })
            }
            _ => Err("a device is one of bdf, vf_of, mdev, or vendor with device"),
        }
    }
}

impl<'de> Deserialize<'de> for DeviceSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SpecVisitor)
    }
}

struct SpecVisitor;

impl<'de> Visitor<'de> for SpecVisitor {
    type Value = DeviceSpec;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "a device: a PCI address, or an object with bdf, vf_of, mdev, or vendor and device",
        )
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<DeviceSpec, E> {
        let is_uuid = text.len() == 36 && text.bytes().filter(|&b| b == b'-').count() == 4;
        if is_uuid {
            return Ok(DeviceSpec::Mdev { mdev: text.to_owned() });
        }
        text.parse().map(|bdf| DeviceSpec::Bdf { bdf }).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DeviceSpec, A::Error> {
        let object = Object::deserialize(de::value::MapAccessDeserializer::new(map))?;
        object.spec().map_err(de::Error::custom)
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
    fn a_device_is_a_string_or_one_kind_of_object() {
        let parse =
            |text: &str| serde_json::from_str::<DeviceSpec>(text).map_err(|e| e.to_string());
        let bdf: Bdf = "0000:65:00.0".parse().unwrap();
        assert_eq!(parse(r#""0000:65:00.0""#), Ok(DeviceSpec::Bdf { bdf }));
        assert_eq!(parse(r#"{"bdf":"0000:65:00.0"}"#), Ok(DeviceSpec::Bdf { bdf }));
        assert_eq!(parse(r#"{"vf_of":"0000:65:00.0"}"#), Ok(DeviceSpec::VfOf { vf_of: bdf }));
        let kind = DeviceSpec::Kind { vendor: "8086".into(), device: "10d3".into() };
        assert_eq!(parse(r#"{"vendor":"8086","device":"10D3"}"#), Ok(kind.clone()));
        assert_eq!(parse(&serde_json::to_string(&kind).unwrap()), Ok(kind));
        for odd in [
            "1",
            "null",
            "[]",
            "{}",
            r#"{"bdf":"0000:65:00.0","vendor":"8086"}"#,
            r#"{"vendor":"8086"}"#,
            r#"{"vendor":"80","device":"10d3"}"#,
            r#"{"bfd":"x"}"#,
        ] {
            assert!(parse(odd).is_err(), "{odd}");
        }
    }
}
