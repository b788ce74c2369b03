//! Names of PCI vendors, devices and classes, from the list that most distributions install.

use std::collections::HashMap;

const PLACES: [&str; 3] =
    ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids", "/usr/share/pci.ids"];

/// The names that are known; none where the list is not installed.
#[derive(Debug, Default)]
pub(super) struct PciNames {
    vendors: HashMap<String, String>,
    devices: HashMap<(String, String), String>,
    classes: HashMap<String, String>,
}

impl PciNames {
    /// Reads the list of this machine.
    pub(super) fn load() -> Self {
        let text = PLACES.iter().find_map(|path| std::fs::read(path).ok());
        text.map_or_else(Self::default, |text| Self::parse(&String::from_utf8_lossy(&text)))
    }

    /// Vendors at the line's start with their devices one tab in; `C 02` classes with their
    /// subclasses one tab in.
    fn parse(text: &str) -> Self {
        let mut names = Self::default();
        let mut under = String::new();
        let mut in_classes = false;
        for line in text.lines() {
            if line.is_empty() || line.starts_with('#') || line.starts_with("\t\t") {
                continue;
            }
            let nested = line.strip_prefix('\t');
            let class = line.strip_prefix("C ");
            let Some((id, name)) = nested.or(class).unwrap_or(line).split_once("  ") else {
                continue;
            };
            let (id, name) = (id.to_owned(), name.to_owned());
            if nested.is_none() {
                under.clone_from(&id);
                in_classes = class.is_some();
            }
            match (nested.is_some(), in_classes) {
                (false, false) => drop(names.vendors.insert(id, name)),
                (true, false) => drop(names.devices.insert((under.clone(), id), name)),
                (false, true) => drop(names.classes.insert(id, name)),
                (true, true) => drop(names.classes.insert(under.clone() + &id, name)),
            }
        }
        names
    }

    /// Vendor and device by name where known, by number where not.
    pub(super) fn device(&self, vendor: &str, device: &str) -> String {
        let ids = format!("[{vendor}:{device}]");
        match self.vendors.get(vendor) {
            None => ids,
            Some(maker) => {
                let known = self.devices.get(&(vendor.to_owned(), device.to_owned()));
                let name = known.map_or("", String::as_str);
                format!("{maker} {name} {ids}").replace("  ", " ")
            }
        }
    }

    /// The class, given as four or six hexadecimal digits.
    pub(super) fn class(&self, class: &str) -> String {
        let name = class.get(..4).and_then(|sub| self.classes.get(sub));
        let name = name.or_else(|| class.get(..2).and_then(|base| self.classes.get(base)));
        name.cloned().unwrap_or_else(|| format!("class {class}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# comment\n8086  Intel Corporation\n\t10d3  82574L\n\t\t8086 0001  Sub\n\
        C 02  Network controller\n\t00  Ethernet controller\n\t\t01  nothing\n";

    #[test]
    fn what_is_known_has_a_name() {
        let names = PciNames::parse(LIST);
        assert_eq!(names.device("8086", "10d3"), "Intel Corporation 82574L [8086:10d3]");
        assert_eq!(names.device("8086", "ffff"), "Intel Corporation [8086:ffff]");
        assert_eq!(names.device("1234", "10d3"), "[1234:10d3]");
        assert_eq!(names.class("020000"), "Ethernet controller");
        assert_eq!(names.class("0280"), "Network controller");
        assert_eq!(names.class("ff00"), "class ff00");
        assert_eq!(PciNames::default().device("8086", "10d3"), "[8086:10d3]");
    }
}
