//! What is found out before anything is touched: whether this QEMU can be given devices, and whether
//! it will take the properties that were asked for.

use super::{Error, Result};
use crate::qmp::{self, Monitor, Version};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The first QEMU whose vfio-pci takes open files.
pub const OLDEST: Version = Version { major: 9, minor: 0, micro: 0 };

/// Properties of the device, each with QEMU's name of its type.
pub(super) type Types = BTreeMap<String, String>;

/// Whether QEMU can be given devices; the properties that its vfio-pci has.
pub(super) fn check(qemu: &mut Monitor) -> Result<Types> {
    let version = qemu.version();
    let unsupported = |why: &str| Error::Unsupported { version, why: why.to_owned() };
    if version < OLDEST {
        return Err(unsupported("its vfio-pci opens devices by itself only"));
    }
    // A list of all types would have QEMU load all its modules.
    match qemu.execute("qom-list-properties", json!({ "typename": "iommufd" })) {
        Err(qmp::Error::Command { .. }) => return Err(unsupported("it was built without iommufd")),
        other => drop(other?),
    }
    let properties = match qemu.execute("device-list-properties", json!({ "typename": "vfio-pci" }))
    {
        Err(qmp::Error::Command { .. }) => return Err(unsupported("it has no vfio-pci")),
        other => other?,
    };
    let types: Types = properties
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|each| Some((text(each, "name")?, text(each, "type")?)))
        .collect();
    match ["iommufd", "fd"].iter().find(|name| !types.contains_key(**name)) {
        Some(name) => Err(unsupported(&format!("its vfio-pci has no property {name:?}"))),
        None => Ok(types),
    }
}

/// The arguments of device_add for the properties asked for, of the types that QEMU wants.
pub(super) fn arguments(
    properties: &[(String, String)],
    types: &Types,
) -> Result<Map<String, Value>> {
    let mut arguments = Map::new();
    for (name, value) in properties {
        if let Some((_, instead)) = OURS.iter().find(|(ours, _)| ours == name) {
            return Err(Error::bad(format!("property {name}"), *instead));
        }
        let Some(kind) = types.get(name) else {
            return Err(Error::bad(
                format!("property {name}"),
                "this QEMU's vfio-pci has no such property",
            ));
        };
        // An address is a number or text, and as a number means something else.
        let kind = if name == "addr" { "str" } else { kind };
        let value = typed(value, kind).ok_or_else(|| {
            Error::bad(format!("property {name}"), format!("{value:?} is no {kind}"))
        })?;
        if arguments.insert(name.clone(), value).is_some() {
            return Err(Error::bad(format!("property {name}"), "it is given twice"));
        }
    }
    Ok(arguments)
}

/// What an attach sets by itself.
const OURS: [(&str, &str); 7] = [
    ("driver", "the driver is vfio-pci"),
    ("id", "there is an option for it"),
    ("bus", "there is an option for it"),
    ("fd", "the broker's is used"),
    ("iommufd", "there is an option for it"),
    ("host", "the device is the broker's to open"),
    ("sysfsdev", "the device is the broker's to open"),
];

/// QEMU's commands are typed: a number in quotes is none.
fn typed(value: &str, kind: &str) -> Option<Value> {
    let number = || {
        let hex = value.strip_prefix("0x").map(|digits| u64::from_str_radix(digits, 16).ok());
        let number = hex.unwrap_or_else(|| value.parse::<u64>().ok()).map(Value::from);
        number.or_else(|| value.parse::<i64>().ok().map(Value::from))
    };
    match kind {
        "bool" => match value {
            "on" | "yes" | "true" => Some(true.into()),
            "off" | "no" | "false" => Some(false.into()),
            _ => None,
        },
        // Sizes and the like may be numbers or text.
        _ => Some(number().filter(|_| kind != "str").unwrap_or_else(|| value.into())),
    }
}

fn text(value: &Value, name: &str) -> Option<String> {
    value.get(name)?.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn types() -> Types {
        let types = [
            ("x-no-mmap", "bool"),
            ("addr", "int32"),
            ("bootindex", "int32"),
            ("romfile", "str"),
            ("fd", "str"),
        ];
        types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).into()
    }

    fn of(properties: &[(&str, &str)]) -> Result<Value> {
        let owned: Vec<_> =
            properties.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        arguments(&owned, &types()).map(Value::Object)
    }

    #[test]
    fn values_get_the_type_that_qemu_wants() {
        let given =
            [("x-no-mmap", "on"), ("addr", "0x10"), ("bootindex", "0x10"), ("romfile", "7")];
        let wanted = json!({ "x-no-mmap": true, "addr": "0x10", "bootindex": 16, "romfile": "7" });
        assert_eq!(of(&given).unwrap(), wanted);
        assert_eq!(of(&[("bootindex", "-1")]).unwrap(), json!({ "bootindex": -1 }));
    }

    #[test]
    fn what_can_not_be_set_is_named() {
        for (given, says) in [
            (vec![("nosuch", "1")], "property nosuch: this QEMU's vfio-pci has no such"),
            (vec![("x-no-mmap", "maybe")], "\"maybe\" is no bool"),
            (vec![("fd", "7")], "property fd: the broker's is used"),
            (vec![("host", "01:00.0")], "property host"),
            (vec![("romfile", ""), ("romfile", "x")], "given twice"),
        ] {
            let error = of(&given).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
