//! From the file's text to a [`Policy`].

use super::device::{DeviceRule, Id};
use super::peer::{NO_ID, Who};
use super::problem::Report;
use super::reader::{Section, Value, did_you_mean};
use super::shadow;
use super::tenant::{DenyAll, Limits, Listed};
use super::{Names, OVERFLOW_ID, Policy, Problems, Risk, SharedContainer, Tenant, Trust, Verb};
use crate::protocol::{Backend, Bdf, Handout};
use std::ops::Range;
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
        for error in syntax {
            report.error(error.span().unwrap_or(0..0), error.message());
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
    shadow::check(&mut parser.report, &tenants);

    let report = parser.report;
    let failed = report.has_errors();
    let problems = report.into_problems();
    if failed {
        return Err(problems);
    }
    let file = file.rsplit('/').next().unwrap_or(file).to_owned();
    let tenants = tenants.into_iter().map(|found| found.tenant).collect();
    Ok(Policy { file, tenants, containers, deny, warnings: problems })
}

fn version(report: &mut Report<'_>, root: &Section<'_, '_>) {
    let Some(value) = root.get("version") else {
        report.error(0..0, "the file does not say its version").help("begin it with `version = 1`");
        return;
    };
    if let Some(version) = report.number(value, "version").filter(|version| *version != 1) {
        report
            .error(value.span(), format!("version {version} is not known"))
            .help("this program reads version 1");
    }
}

/// A tenant with the places that later checks speak of.
pub(super) struct Found {
    pub(super) tenant: Tenant,
    pub(super) name_span: Range<usize>,
    /// The entries of `user`, each with its place.
    pub(super) users: Vec<(u32, Range<usize>)>,
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
        if root.get("tenant").is_none() {
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
        let (who, users) = self.who(&section, accept.contains(&Accept::OverflowUid));
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
            who,
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

    /// The matchers.
    fn who(
        &mut self,
        section: &Section<'_, '_>,
        accepts_overflow: bool,
    ) -> (Who, Vec<(u32, Range<usize>)>) {
        let users = section.get("user").map(|value| self.users(value, accepts_overflow));
        let groups = section.get("group").map(|value| self.groups(value));
        let units = section.get("unit").map(|value| self.texts(value, "unit", Self::check_unit));
        let labels =
            section.get("label").map(|value| self.texts(value, "label", Self::check_label));
        let anyone = section.get("anyone");
        let given = [users.is_some(), groups.is_some(), units.is_some(), labels.is_some()];
        if let Some(value) = anyone {
            let span = value.span();
            match self.report.boolean(value, "anyone") {
                Some(true) if given.contains(&true) => {
                    self.report
                        .error(
                            span,
                            "anyone stands alone: with it, no other matcher means anything",
                        )
                        .help("leave out `anyone`, or the others");
                }
                Some(true) => {
                    self.report
                        .warn(span, "every process that reaches the socket is this tenant")
                        .help(
                            "for trying things out; elsewhere name users, groups, units or labels",
                        );
                }
                Some(false) => {
                    self.report.error(span, "anyone = false says nothing").help("leave it out");
                }
                None => {}
            }
        } else if !given.contains(&true) {
            self.report
                .error(section.span.clone(), "this tenant is for nobody")
                .help("say whom it is for: user, group, unit or label");
        }
        let listed = users.as_ref().is_some_and(|users| users.iter().any(|u| u.0 == OVERFLOW_ID));
        if let Some(accept) = section.get("accept").filter(|_| accepts_overflow && !listed) {
            self.report
                .error(accept.span(), "overflow-uid is accepted, and no user is 65534")
                .help("add `user = 65534`, or leave overflow-uid out");
        }
        let who = Who {
            anyone: anyone.is_some(),
            users: users.as_ref().map(|users| users.iter().map(|(uid, _)| *uid).collect()),
            groups,
            units,
            labels,
            accepts_overflow,
        };
        (who, users.unwrap_or_default())
    }

    fn users(&mut self, value: &Value<'_>, overflow: bool) -> Vec<(u32, Range<usize>)> {
        let mut users: Vec<(u32, Range<usize>)> = Vec::new();
        for item in self.report.one_or_list(value, "user") {
            let names = self.names;
            let Some(uid) = self.id(item, "user", &|name| names.uid(name)) else { continue };
            let by_name = item.get_ref().is_str();
            if uid == OVERFLOW_ID && (by_name || !overflow) {
                self.report
                    .error(
                        item.span(),
                        "uid 65534 is not one user: everybody whom this user namespace has no \
                         number for shows as it",
                    )
                    .help(
                        "if that is meant, write `user = 65534` and `accept = [\"overflow-uid\"]`",
                    );
            } else if users.iter().any(|(other, _)| *other == uid) {
                self.report.error(item.span(), format!("uid {uid} is listed twice"));
            } else {
                users.push((uid, item.span()));
            }
        }
        users
    }

    fn groups(&mut self, value: &Value<'_>) -> Vec<u32> {
        let mut groups = Vec::new();
        for item in self.report.one_or_list(value, "group") {
            let names = self.names;
            let Some(gid) = self.id(item, "group", &|name| names.gid(name)) else { continue };
            if gid == OVERFLOW_ID {
                self.report
                    .error(item.span(), "gid 65534 is not one group: unmapped ones show as it")
                    .help("name a group of its own");
            } else {
                groups.push(gid);
            }
        }
        groups
    }

    /// A user or group, by name or number.
    fn id(
        &mut self,
        value: &Value<'_>,
        what: &str,
        find: &dyn Fn(&str) -> Option<u32>,
    ) -> Option<u32> {
        let Some(name) = value.get_ref().as_str() else {
            let number = self.report.number(value, what)?;
            let id = u32::try_from(number).ok().filter(|id| *id != NO_ID);
            if id.is_none() {
                self.report.error(value.span(), format!("{number} can't be a {what}'s number"));
            }
            return id;
        };
        let id = find(name).filter(|id| *id != NO_ID);
        if id.is_none() {
            let help = if !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit()) {
                "a number is written without quotes"
            } else {
                "check the spelling, create it first, or write its number"
            };
            self.report
                .error(value.span(), format!("there is no {what} {name:?} on this machine"))
                .help(help);
        }
        id
    }

    fn texts(
        &mut self,
        value: &Value<'_>,
        what: &str,
        check: fn(&str) -> Option<&'static str>,
    ) -> Vec<String> {
        let mut texts = Vec::new();
        for item in self.report.one_or_list(value, what) {
            let Some(text) = self.report.string(item, what) else { continue };
            if let Some(help) = check(text) {
                self.report.error(item.span(), format!("{text:?} can't be a {what}")).help(help);
            }
            texts.push(text.to_owned());
        }
        texts
    }

    fn check_unit(text: &str) -> Option<&'static str> {
        let suffix = [".service", ".scope"].iter().find_map(|end| text.strip_suffix(end));
        let good = suffix.is_some_and(|name| !name.is_empty() && !text.contains(['/', '*', ' ']));
        (!good)
            .then_some("write a system unit's whole name, as in \"libvirtd.service\"; no patterns")
    }

    fn check_label(text: &str) -> Option<&'static str> {
        let fields = text.split(':').collect::<Vec<_>>();
        let good = fields.len() >= 3 && fields.iter().all(|field| !field.is_empty());
        let help = "write user:role:type; what comes after the type may be left out";
        (!good).then_some(help)
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
        if needs && section.get("devices").is_none() {
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
                for backend in handouts.iter().map(|handout| backend_of(*handout)) {
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
        for handout in handouts.iter().filter(|h| !backends.contains(&backend_of(**h))) {
            let (handout, backend) =
                (name_of(*handout, &HANDOUTS), name_of(backend_of(*handout), &BACKENDS));
            let span = section.get("handouts").map_or(section.span.clone(), |value| value.span());
            self.report
                .error(
                    span,
                    format!("handout {handout} needs backend {backend}, which is not listed"),
                )
                .help("leave `backends` out: it follows from the handouts");
        }
        for backend in backends {
            if !handouts.iter().any(|handout| backend_of(*handout) == *backend) {
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

    fn containers(&mut self, root: &Section<'_, '_>, tenants: &[Found]) -> Vec<SharedContainer> {
        let mut containers: Vec<SharedContainer> = Vec::new();
        for value in self.report.tables(root, "container") {
            let known = ["name", "trust", "members"];
            let Some(section) = self.report.section(value, "a container", &known) else { continue };
            let trust = section.get("trust").and_then(|v| self.report.word(v, "trust", &TRUSTS));
            let trust = trust.unwrap_or_default();
            let members = self.members(&section, trust, tenants);
            let Some(name) = self.report.name(&section, "a container") else { continue };
            if let Some(other) = containers.iter().find(|other| other.name == name) {
                let line = other.line;
                self.report
                    .error(section.span.clone(), format!("container {name:?} is there twice"))
                    .help(format!("the first is in line {line}"));
            }
            let line = self.report.line(section.span.start);
            containers.push(SharedContainer { name, trust, members, line });
        }
        containers
    }

    fn members(
        &mut self,
        section: &Section<'_, '_>,
        trust: Trust,
        tenants: &[Found],
    ) -> Vec<String> {
        let Some(value) = section.get("members") else {
            self.report
                .error(section.span.clone(), "nobody may join this container")
                .help("add `members = [...]` with names of tenants");
            return Vec::new();
        };
        let known: Vec<&str> = tenants.iter().map(|found| found.tenant.name.as_str()).collect();
        let mut members: Vec<String> = Vec::new();
        for item in self.report.list(value, "members") {
            let Some(name) = self.report.string(item, "an entry of members") else { continue };
            let Some(found) = tenants.iter().find(|found| found.tenant.name == name) else {
                self.report
                    .error(item.span(), format!("there is no tenant {name:?}"))
                    .help(did_you_mean(name, &known));
                continue;
            };
            if members.iter().any(|member| member == name) {
                self.report.error(item.span(), format!("{name:?} is listed twice"));
                continue;
            }
            let handouts = found.tenant.handouts();
            let can = match trust {
                Trust::Enforced => handouts.contains(&Handout::Devices),
                Trust::Mutual => handouts.iter().any(|h| backend_of(*h) == Backend::Type1),
            };
            if !can {
                let line = found.tenant.line;
                let kind = name_of(trust, &TRUSTS);
                self.report
                    .error(
                        item.span(),
                        format!("tenant {name:?} can't join: its handouts do not fit an {kind} container"),
                    )
                    .help(format!("add \"devices\" to handouts of the tenant in line {line}"));
            }
            members.push(name.to_owned());
        }
        members
    }

    fn deny_all(&mut self, root: &Section<'_, '_>) -> Vec<DenyAll> {
        let mut denies = Vec::new();
        for value in self.report.tables(root, "deny") {
            let known = ["devices", "reason"];
            let Some(section) = self.report.section(value, "a deny", &known) else { continue };
            if section.get("devices").is_none() {
                self.report
                    .error(section.span.clone(), "this deny names no devices")
                    .help("add `devices = [...]`");
            }
            let devices = self.devices(&section, "devices", Use::Deny);
            let reason = section.get("reason").and_then(|v| self.report.string(v, "reason"));
            if reason.is_none_or(|reason| reason.trim().is_empty()) {
                self.report
                    .error(section.span.clone(), "this deny gives no reason")
                    .help("add `reason = \"...\"`: it is shown to whoever is denied");
            }
            denies.push(DenyAll { devices, reason: reason.unwrap_or_default().to_owned() });
        }
        denies
    }

    fn devices(&mut self, section: &Section<'_, '_>, key: &str, used: Use) -> Vec<DeviceRule> {
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
        self.check_device(&section, &rule, used).then_some(rule)
    }

    /// Whether the keys make sense together.
    fn check_device(&mut self, section: &Section<'_, '_>, rule: &DeviceRule, used: Use) -> bool {
        let given = |key| section.get(key).is_some();
        let mut wrong = |message: &str, help: &str| {
            self.report.error(section.span.clone(), message).help(help);
        };
        if given("bdf") && given("vf_of") {
            wrong("a device has either bdf or vf_of", "to name one VF, write its own bdf");
        } else if !given("bdf") && !given("vf_of") && !given("id") {
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
        let read = [rule.bdf.is_some(), rule.vf_of.is_some(), rule.id.is_some()];
        let narrowed = [rule.subsystem.is_some(), rule.serial.is_some()];
        let all = read == ["bdf", "vf_of", "id"].map(given)
            && narrowed == ["subsystem", "serial"].map(given);
        all && read.contains(&true)
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

    /// The line of a key's value, if it is there.
    fn line(&self, section: &Section<'_, '_>, key: &str) -> Option<usize> {
        section.get(key).map(|value| self.report.line(value.span().start))
    }
}

/// What a list of devices is for.
#[derive(Clone, Copy, PartialEq)]
enum Use {
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

fn backend_of(handout: Handout) -> Backend {
    match handout {
        Handout::Container | Handout::Group | Handout::Devices => Backend::Type1,
        Handout::Iommufd => Backend::Iommufd,
    }
}

fn name_of<T: PartialEq>(value: T, words: &[(&'static str, T)]) -> &'static str {
    words.iter().find(|(_, word)| *word == value).map_or("", |(name, _)| name)
}
