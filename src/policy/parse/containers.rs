//! The shared containers.

use super::super::reader::{Section, did_you_mean};
use super::super::{SharedContainer, Trust};
use super::{Found, Parser, TRUSTS, name_of};
use crate::protocol::{Backend, Handout};

impl Parser<'_> {
    pub(super) fn containers(
        &mut self,
        root: &Section<'_, '_>,
        tenants: &[Found],
    ) -> Vec<SharedContainer> {
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
        if section.lacks(&["members"]) {
            self.report
                .error(section.span.clone(), "nobody may join this container")
                .help("add `members = [...]` with names of tenants");
        }
        let Some(value) = section.get("members") else { return Vec::new() };
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
                Trust::Mutual => handouts.iter().any(|h| h.backend() == Backend::Type1),
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
}
