//! The devices that a tenant may have, and those that are denied.

use super::super::device::DeviceRule;
use super::super::reader::{Section, Value};
use super::super::tenant::DenyAll;
use super::Parser;
use crate::pci::Id;
use crate::protocol::Bdf;

impl Parser<'_> {
    pub(super) fn deny_all(&mut self, root: &Section<'_, '_>) -> Vec<DenyAll> {
        let mut denies = Vec::new();
        for value in self.report.tables(root, "deny") {
            let known = ["devices", "reason"];
            let Some(section) = self.report.section(value, "a deny", &known) else { continue };
            if section.lacks(&["devices"]) {
                self.report
                    .error(section.span.clone(), "this deny names no devices")
                    .help("add `devices = [...]`");
            }
            let devices = self.devices(&section, "devices", Use::Deny);
            let reason = section.get("reason").and_then(|v| self.report.string(v, "reason"));
            let empty = reason.is_some_and(|reason| reason.trim().is_empty());
            if empty || section.lacks(&["reason"]) {
                self.report
                    .error(section.span.clone(), "this deny gives no reason")
                    .help("add `reason = \"...\"`: it is shown to whoever is denied");
            }
            denies.push(DenyAll { devices, reason: reason.unwrap_or_default().to_owned() });
        }
        denies
    }

    pub(super) fn devices(
        &mut self,
        section: &Section<'_, '_>,
        key: &str,
        used: Use,
    ) -> Vec<DeviceRule> {
        let Some(value) = section.get(key) else { return Vec::new() };
        let mut rules: Vec<DeviceRule> = Vec::new();
        for item in self.report.list(value, key) {
            let Some(rule) = self.device(item, used) else { continue };
            let line = rule.line;
            let again = |other: &&DeviceRule| DeviceRule { line, ..(*other).clone() } == rule;
            if let Some(other) = rules.iter().find(again) {
                let line = other.line;
                self.report
                    .warn(item.span(), format!("{rule} is there twice"))
                    .help(format!("the first is in line {line}"));
            }
            rules.push(rule);
        }
        rules
    }

    fn device(&mut self, value: &Value<'_>, used: Use) -> Option<DeviceRule> {
        let line = self.report.line(value.span().start);
        if let Some(text) = value.get_ref().as_str() {
            return self.plain_device(value, text, line, used);
        }
        if !value.get_ref().is_table() {
            self.report
                .error(value.span(), "a device is a string or a table")
                .help("write \"8086:10d3\", or { bdf = \"0000:65:00.0\", id = \"8086:10d3\" }");
            return None;
        }
        let known = ["bdf", "vf_of", "id", "subsystem", "serial"];
        let section = self.report.section(value, "a device", &known)?;
        let rule = DeviceRule {
            line,
            bdf: section.get("bdf").and_then(|v| self.bdf(v, "bdf")),
            vf_of: section.get("vf_of").and_then(|v| self.bdf(v, "vf_of")),
            id: section.get("id").and_then(|v| self.pci_id(v, "id")),
            subsystem: section.get("subsystem").and_then(|v| self.pci_id(v, "subsystem")),
            serial: section.get("serial").and_then(|v| self.serial(v)),
        };
        self.check_device(&section, used);
        Some(rule)
    }

    /// Whether the keys make sense together.
    fn check_device(&mut self, section: &Section<'_, '_>, used: Use) {
        let given = |key| section.get(key).is_some();
        let mut wrong = |message: &str, help: &str| {
            self.report.error(section.span.clone(), message).help(help);
        };
        if given("bdf") && given("vf_of") {
            wrong("a device has either bdf or vf_of", "to name one VF, write its own bdf");
        } else if section.lacks(&["bdf", "vf_of", "id"]) {
            wrong(
                "this does not name a device",
                "write bdf, vf_of or id; subsystem and serial only narrow these",
            );
        } else if used == Use::Deny && given("bdf") && section.len() > 1 {
            wrong(
                "a deny by address holds for whatever is there",
                "leave the rest out, or deny by id",
            );
        }
    }

    fn plain_device(
        &mut self,
        value: &Value<'_>,
        text: &str,
        line: usize,
        used: Use,
    ) -> Option<DeviceRule> {
        if let Some(id) = Id::parse(text) {
            return Some(DeviceRule { line, id: Some(id), ..DeviceRule::default() });
        }
        if let Ok(bdf) = text.parse::<Bdf>() {
            if used == Use::Allow {
                self.report
                    .warn(value.span(), format!("whatever comes to be at {bdf} is allowed"))
                    .help(format!("write {{ bdf = \"{bdf}\", id = \"vendor:device\" }}"));
            }
            return Some(DeviceRule { line, bdf: Some(bdf), ..DeviceRule::default() });
        }
        self.report
            .error(value.span(), format!("{text:?} names no device"))
            .help(device_help(text));
        None
    }

    fn bdf(&mut self, value: &Value<'_>, what: &str) -> Option<Bdf> {
        let text = self.report.string(value, what)?;
        let bdf = text.parse().ok();
        if bdf.is_none() {
            self.report
                .error(value.span(), format!("{text:?} is not a PCI address"))
                .help(device_help(text));
        }
        bdf
    }

    fn pci_id(&mut self, value: &Value<'_>, what: &str) -> Option<Id> {
        let text = self.report.string(value, what)?;
        let id = Id::parse(text);
        if id.is_none() {
            self.report
                .error(value.span(), format!("{text:?} is not two PCI ids"))
                .help("write four hexadecimal digits each, as in \"8086:10d3\"");
        }
        id
    }

    fn serial(&mut self, value: &Value<'_>) -> Option<String> {
        let text = self.report.string(value, "serial")?.to_ascii_lowercase();
        let hex = |pair: &str| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit());
        if text.split('-').count() == 8 && text.split('-').all(hex) {
            return Some(text);
        }
        self.report
            .error(value.span(), format!("{text:?} is not a PCI device serial number"))
            .help("write it as lspci -vv shows it, as in \"00-1b-21-ff-ff-a0-c3-01\"");
        None
    }
}

/// What a list of devices is for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Use {
    Allow,
    Deny,
}

/// What somebody probably meant who wrote something like an address.
fn device_help(text: &str) -> String {
    let whole = format!("0000:{text}");
    if whole.parse::<Bdf>().is_ok() {
        return format!("write the whole address: \"{whole}\"");
    }
    "an address is \"0000:65:00.0\", vendor and device are \"8086:10d3\"".into()
}
