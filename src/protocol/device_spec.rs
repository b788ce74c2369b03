//! How a request names a device.

use crate::bdf::Bdf;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::fmt::Hyphenated;

/// Whether a text is a UUID in the form that sysfs and the kernel's parser of tokens have.
pub fn is_uuid(text: &str) -> bool {
    text.parse::<Hyphenated>().is_ok()
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
                if !is_uuid(&mdev) {
                    return Err("mdev is a UUID");
                }
                Ok(DeviceSpec::Mdev { mdev })
            }
            _ => Err("a device is one of bdf, vf_of, or vendor with device"),
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
        f.write_str("a device: a PCI address, or an object with bdf, vf_of, or vendor and device")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<DeviceSpec, E> {
        if is_uuid(text) {
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
        let mdev = DeviceSpec::Mdev { mdev: "83b8f4f2-509F-382f-3c1e-e6bfe0fa1001".into() };
        assert_eq!(parse(r#""83b8f4f2-509F-382f-3c1e-e6bfe0fa1001""#), Ok(mdev.clone()));
        assert_eq!(parse(&serde_json::to_string(&mdev).unwrap()), Ok(mdev));
        for odd in [
            "1",
            "null",
            "[]",
            "{}",
            r#"{"bdf":"0000:65:00.0","vendor":"8086"}"#,
            r#"{"vendor":"8086"}"#,
            r#"{"vendor":"80","device":"10d3"}"#,
            r#"{"bfd":"x"}"#,
            r#""83b8f4f2-509f-382f-3c1e-e6bfe0fa100x""#,
            r#""{83b8f4f2-509f-382f-3c1e-e6bfe0fa1001}""#,
            r#"{"mdev":"83b8f4f2509f382f3c1ee6bfe0fa1001"}"#,
        ] {
            assert!(parse(odd).is_err(), "{odd}");
        }
    }
}
