//! Whom a tenant is for.

use super::super::peer::{NO_ID, OVERFLOW_ID, Principals};
use super::super::reader::{Section, Value};
use super::Parser;
use std::ops::Range;

impl Parser<'_> {
    /// The matchers.
    pub(super) fn principals(
        &mut self,
        section: &Section<'_, '_>,
        accepts_overflow: bool,
    ) -> (Principals, Vec<(u32, Range<usize>)>) {
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
        } else if section.lacks(&["user", "group", "unit", "label"]) {
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
        let principals = Principals {
            anyone: anyone.is_some(),
            users: users.as_ref().map(|users| users.iter().map(|(uid, _)| *uid).collect()),
            groups,
            units,
            labels,
            accepts_overflow,
        };
        (principals, users.unwrap_or_default())
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
}
