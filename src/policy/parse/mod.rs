//! From the file's text to a [`Policy`].

mod containers;
mod devices;
mod found;
mod principals;
mod unreachable;

use super::device::DeviceRule;
use super::problem::Report;
use super::reader::{Section, Value};
use super::tenant::{Limits, Listed};
use super::{Names, Policy, Problems, Risk, Tenant, Trust, Verb};
use crate::policy::Serials;
use crate::protocol::{Backend, Handout};
use devices::Use;
use found::Found;
use toml::de::DeTable;

const RIGHTS: [(&str, Verb); 4] = [
    ("acquire", Verb::Acquire),
    ("bind", Verb::Bind),
    ("manage", Verb::Manage),
    ("observe", Verb::Observe),
];
const HANDOUTS: [(&str, Handout); 4] = [
    ("container", Handout::Container),
    ("group", Handout::Group),
    ("devices", Handout::Devices),
    ("iommufd", Handout::Iommufd),
];
const BACKENDS: [(&str, Backend); 2] = [("type1", Backend::Type1), ("iommufd", Backend::Iommufd)];
const TRUSTS: [(&str, Trust); 2] = [("enforced", Trust::Enforced), ("mutual", Trust::Mutual)];
const ACCEPTS: [(&str, Accept); 3] = [
    ("unsafe-interrupts", Accept::Risk(Risk::UnsafeInterrupts)),
    ("no-iommu", Accept::Risk(Risk::NoIommu)),
    ("overflow-uid", Accept::OverflowUid),
];

/// What `accept` can name: a risk of a device, or that of a uid which is not one user's.
#[derive(Clone, Copy, PartialEq)]
enum Accept {
    Risk(Risk),
    OverflowUid,
}

/// Reads a whole file.
pub(super) fn policy(file: &str, text: &str, names: &dyn Names) -> Result<Policy, Problems> {
    let mut report = Report::new(file, text);
    let (root, syntax) = DeTable::parse_recoverable(text);
    if !syntax.is_empty() {
        // What the parser makes of the rest is a guess: complaints about it would mislead.
        let mut last = None;
        for error in syntax {
            let span = error.span().unwrap_or(0..0);
            if last.replace(span.start) != Some(span.start) {
                let problem = report.error(span, format!("this is not TOML: {}", error.message()));
                problem.help("the rest is checked once the file can be read");
            }
        }
        return Err(report.into_problems());
    }
    let known = ["version", "tenant", "container", "deny"];
    let root = report.known_keys(root.get_ref(), 0..0, "a policy", &known);
    version(&mut report, &root);

    let mut parser = Parser { report, names };
    let tenants = parser.tenants(&root);
    let containers = parser.containers(&root, &tenants);
    let deny = parser.deny_all(&root);
    unreachable::check(&mut parser.report, &tenants);

    let report = parser.report;
    let failed = report.has_errors();
    let problems = report.into_problems();
    if failed {
        return Err(problems);
    }
    let file = file.rsplit('/').next().unwrap_or(file).to_owned();
    let tenants = tenants.into_iter().map(|found| found.tenant).collect();
    Ok(Policy { file, tenants, containers, deny, warnings: problems, serials: Serials::default() })
}

fn version(report: &mut Report<'_>, root: &Section<'_, '_>) {
    if root.lacks(&["version"]) {
        report.error(0..0, "the file does not say its version").help("begin it with `version = 1`");
    }
    let Some(value) = root.get("version") else { return };
    if let Some(version) = report.number(value, "version").filter(|version| *version != 1) {
        report
            .error(value.span(), format!("version {version} is not known"))
            .help("this program reads version 1");
    }
}

struct Parser<'s> {
    report: Report<'s>,
    names: &'s dyn Names,
}

impl Parser<'_> {
    fn tenants(&mut self, root: &Section<'_, '_>) -> Vec<Found> {
        let mut tenants: Vec<Found> = Vec::new();
        for value in self.report.tables(root, "tenant") {
            let Some(found) = self.tenant(value) else { continue };
            let same = |other: &&Found| other.tenant.name == found.tenant.name;
            if let Some(other) = tenants.iter().find(same) {
                let line = other.tenant.line;
                self.report
                    .error(
                        found.name_span.clone(),
                        format!("{:?} is there twice", other.tenant.name),
                    )
                    .help(format!("the first is in line {line}; give each tenant its own name"));
            }
            tenants.push(found);
        }
        if root.lacks(&["tenant"]) {
            self.report.warn(0..0, "there is no tenant: nobody may have anything");
        }
        tenants
    }

    fn tenant(&mut self, value: &Value<'_>) -> Option<Found> {
        let known = [
            "name", "anyone", "user", "group", "unit", "label", "rights", "devices", "deny",
            "managed", "rebind", "backends", "handouts", "accept", "memlock", "limits",
        ];
        let section = self.report.section(value, "a tenant", &known)?;
        let accept = section.get("accept").map(|v| self.report.words(v, "accept", &ACCEPTS));
        let accept = accept.unwrap_or_default();
        let (principals, users) = self.principals(&section, accept.contains(&Accept::OverflowUid));
        let (rights, devices, deny) = self.rights_and_devices(&section);
        let (backends, handouts) = self.backends_and_handouts(&section);
        let accepts = accept.into_iter().filter_map(|accept| match accept {
            Accept::Risk(risk) => Some(risk),
            Accept::OverflowUid => None,
        });
        let accepts = Listed { values: accepts.collect(), line: self.line(&section, "accept") };
        let flag = |report: &mut Report<'_>, key| {
            section.get(key).and_then(|value| report.boolean(value, key)).unwrap_or(false)
        };
        let tenant = Tenant {
            managed: flag(&mut self.report, "managed"),
            rebind: flag(&mut self.report, "rebind"),
            memlock: section
                .get("memlock")
                .and_then(|value| self.report.size(value, "memlock"))
                .unwrap_or(0),
            limits: section.get("limits").map_or(Limits::default(), |value| self.limits(value)),
            line: self.report.line(section.span.start),
            name: self.report.name(&section, "a tenant")?,
            principals,
            rights,
            devices,
            deny,
            backends,
            handouts,
            accepts,
        };
        let name_span = section.get("name").map_or(section.span.clone(), |name| name.span());
        Some(Found { tenant, name_span, users })
    }

    fn rights_and_devices(
        &mut self,
        section: &Section<'_, '_>,
    ) -> (Listed<Verb>, Listed<DeviceRule>, Listed<DeviceRule>) {
        let rights = match section.get("rights") {
            Some(value) => self.report.words(value, "rights", &RIGHTS),
            None => vec![Verb::Acquire],
        };
        let devices = self.devices(section, "devices", Use::Allow);
        let deny = self.devices(section, "deny", Use::Deny);
        let has = |verb| rights.contains(&verb);
        let needs = has(Verb::Acquire) || has(Verb::Bind);
        if needs && section.lacks(&["devices"]) {
            self.report
                .error(section.span.clone(), "this tenant names no devices")
                .help("add `devices = [...]`; one that only looks has `rights = [\"observe\"]`");
        }
        if let (false, Some(value)) = (needs || rights.is_empty(), section.get("devices")) {
            self.report
                .warn(value.span(), "devices are named, and no right to have them")
                .help("add \"acquire\" to rights, or leave devices out");
        }
        if let (true, false, Some(value)) =
            (has(Verb::Manage), has(Verb::Acquire), section.get("rights"))
        {
            self.report
                .warn(
                    value.span(),
                    "nobody can have a lease of this tenant, so there is none to manage",
                )
                .help("add \"acquire\"");
        }
        let rights = Listed { values: rights, line: self.line(section, "rights") };
        let devices = Listed { values: devices, line: self.line(section, "devices") };
        (rights, devices, Listed { values: deny, line: self.line(section, "deny") })
    }

    /// Which of the two is not said follows from the other: a handout belongs to one backend.
    fn backends_and_handouts(
        &mut self,
        section: &Section<'_, '_>,
    ) -> (Listed<Backend>, Listed<Handout>) {
        let backends = section.get("backends").map(|v| self.report.words(v, "backends", &BACKENDS));
        let handouts = section.get("handouts").map(|v| self.report.words(v, "handouts", &HANDOUTS));
        let (backends, handouts) = match (backends, handouts) {
            (None, None) => (vec![Backend::Type1], vec![Handout::Container]),
            (Some(backends), None) => {
                let handouts = backends.iter().map(|backend| match backend {
                    Backend::Type1 => Handout::Container,
                    Backend::Iommufd => Handout::Iommufd,
                });
                (backends.clone(), handouts.collect())
            }
            (None, Some(handouts)) => {
                let mut backends = Vec::new();
                for backend in handouts.iter().map(|handout| handout.backend()) {
                    if !backends.contains(&backend) {
                        backends.push(backend);
                    }
                }
                (backends, handouts)
            }
            (Some(backends), Some(handouts)) => {
                self.check_agree(section, &backends, &handouts);
                (backends, handouts)
            }
        };
        let backends = Listed { values: backends, line: self.line(section, "backends") };
        (backends, Listed { values: handouts, line: self.line(section, "handouts") })
    }

    fn check_agree(
        &mut self,
        section: &Section<'_, '_>,
        backends: &[Backend],
        handouts: &[Handout],
    ) {
        for handout in handouts.iter().filter(|h| !backends.contains(&h.backend())) {
            let (handout, backend) =
                (name_of(*handout, &HANDOUTS), name_of(handout.backend(), &BACKENDS));
            let span = section.get("handouts").map_or(section.span.clone(), |value| value.span());
            self.report
                .error(
                    span,
                    format!("handout {handout} needs backend {backend}, which is not listed"),
                )
                .help("leave `backends` out: it follows from the handouts");
        }
        for backend in backends {
            if !handouts.iter().any(|handout| handout.backend() == *backend) {
                let name = name_of(*backend, &BACKENDS);
                let span =
                    section.get("backends").map_or(section.span.clone(), |value| value.span());
                self.report
                    .error(span, format!("backend {name} is listed, and no handout that uses it"))
                    .help("leave `backends` out: it follows from the handouts");
            }
        }
    }

    fn limits(&mut self, value: &Value<'_>) -> Limits {
        let mut limits = Limits::default();
        let known =
            ["connections", "requests", "leases", "devices", "mappings", "mapped_bytes", "fds"];
        let Some(section) = self.report.section(value, "limits", &known) else { return limits };
        let mut read = |key: &str, least: u64, limit: &mut u64| {
            let Some(value) = section.get(key) else { return };
            let bytes = key == "mapped_bytes";
            let read = if bytes { Report::size } else { Report::number };
            let Some(number) = read(&mut self.report, value, key) else { return };
            if number < least {
                self.report.error(value.span(), format!("{key} must be at least {least}"));
            }
            *limit = number;
        };
        // Without these two the tenant could not even ask.
        read("connections", 1, &mut limits.connections);
        read("requests", 1, &mut limits.requests);
        read("leases", 0, &mut limits.leases);
        read("devices", 0, &mut limits.devices);
        read("mappings", 0, &mut limits.mappings);
        read("mapped_bytes", 0, &mut limits.mapped_bytes);
        read("fds", 0, &mut limits.fds);
        limits
    }

    /// The line of a key's value, if it is there.
    fn line(&self, section: &Section<'_, '_>, key: &str) -> Option<usize> {
        section.get(key).map(|value| self.report.line(value.span().start))
    }
}

fn name_of<T: PartialEq>(value: T, words: &[(&'static str, T)]) -> &'static str {
    words.iter().find(|(_, word)| *word == value).map_or("", |(name, _)| name)
}
