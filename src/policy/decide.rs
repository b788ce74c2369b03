//! The decisions, each with the rule that made it.

use super::device::Match;
use super::{
    DeviceFacts, DeviceRule, Listed, OVERFLOW_ID, Peer, Policy, Risk, SharedContainer, Tenant, Verb,
};
use crate::protocol::{Backend, Error, Handout};
use serde::Serialize;
use std::fmt::Display;

/// Yes or no, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// Whether it may be.
    pub allowed: bool,
    /// What decided, with its place in the file.
    pub rule: String,
    /// Why, in plain words.
    pub reason: String,
}

/// A no, with the rule and the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("denied by {rule}: {reason}")]
pub struct Refusal {
    /// What decided, with its place in the file.
    pub rule: String,
    /// Why, in plain words.
    pub reason: String,
}

impl From<Refusal> for Error {
    fn from(Refusal { rule, reason }: Refusal) -> Self {
        Self::Denied { rule, reason }
    }
}

impl Decision {
    fn yes(rule: String, reason: String) -> Self {
        Self { allowed: true, rule, reason }
    }

    fn no(rule: String, reason: String) -> Self {
        Self { allowed: false, rule, reason }
    }

    /// The decision as a result, to be passed on with `?`.
    ///
    /// # Errors
    /// The refusal, if it is one.
    pub fn ok(self) -> Result<(), Refusal> {
        let Self { allowed, rule, reason } = self;
        if allowed { Ok(()) } else { Err(Refusal { rule, reason }) }
    }
}

impl Policy {
    /// The tenant that `peer` is: the first in the file that is for it.
    ///
    /// # Errors
    /// No tenant is: it gets nothing, whoever it is.
    pub fn tenant(&self, peer: &Peer) -> Result<&Tenant, Refusal> {
        let matches = |tenant: &&Tenant| tenant.mismatch(peer).is_none();
        self.tenants.iter().find(matches).ok_or_else(|| self.no_tenant(peer))
    }

    /// Whether a process of the tenant may have its memlock limit raised to so many bytes.
    ///
    /// # Errors
    /// [`Error::Denied`] it never is, [`Error::OverLimit`] not as far.
    pub fn may_lock(&self, tenant: &Tenant, bytes: u64) -> Result<(), Error> {
        if tenant.memlock == 0 {
            let Tenant { name, line, .. } = tenant;
            return Err(Error::Denied {
                rule: format!("tenant {name:?} without memlock, {}:{line}", self.file),
                reason: format!(
                    "the memlock limit of processes of {name:?} is not raised; its tenant would need \
                     memlock = \"SIZE\" in the policy"
                ),
            });
        }
        if bytes > tenant.memlock {
            let (limit, most) = ("memlock".to_owned(), tenant.memlock);
            return Err(Error::OverLimit { limit, most, asked: bytes });
        }
        Ok(())
    }

    fn no_tenant(&self, peer: &Peer) -> Refusal {
        let rule = format!("default deny, {}", self.file);
        let Peer { uid, gid, .. } = peer;
        let overflow = *uid == OVERFLOW_ID && !self.tenants.iter().any(|t| t.who.takes_overflow());
        let overflow = if overflow {
            ", which stands for everybody whom this user namespace has no number for: a tenant \
             must list it as a number and accept \"overflow-uid\""
        } else {
            ""
        };
        // A gid that stands for any is no news.
        let gid = if *gid == OVERFLOW_ID { String::new() } else { format!("gid {gid}, ") };
        Refusal { rule, reason: format!("no tenant is for {gid}uid {uid}{overflow}") }
    }

    /// Whether `tenant` has a right.
    pub fn may(&self, tenant: &Tenant, verb: Verb) -> Decision {
        self.listed(tenant, "rights", &tenant.rights, verb, "has the right", "lacks the right")
    }

    /// Whether `tenant` accepts a risk.
    pub fn risk(&self, tenant: &Tenant, risk: Risk) -> Decision {
        let no = "must name this risk in `accept` before it may take it:";
        self.listed(tenant, "accept", &tenant.accepts, risk, "accepts", no)
    }

    fn listed<T: PartialEq + Display>(
        &self,
        tenant: &Tenant,
        key: &str,
        list: &Listed<T>,
        wanted: T,
        yes: &str,
        no: &str,
    ) -> Decision {
        let rule = self.rule(tenant, key, list.line);
        let name = &tenant.name;
        if list.values.contains(&wanted) {
            return Decision::yes(rule, format!("tenant {name:?} {yes} {wanted}"));
        }
        Decision::no(rule, format!("tenant {name:?} {no} {wanted}"))
    }

    /// Whether `tenant` may use or withhold a device, whatever the verb. Deny beats allow.
    pub fn device(&self, tenant: &Tenant, facts: &DeviceFacts) -> Decision {
        let what = format!("{} ({})", facts.bdf, facts.id());
        for (at, deny) in self.deny.iter().enumerate() {
            if let Some((rule, line)) = first_deny(&deny.devices, facts) {
                let rule = format!("deny[{at}] devices[{rule}], {}:{line}", self.file);
                let reason = &deny.reason;
                return Decision::no(rule, format!("{what} is denied to everybody: {reason}"));
            }
        }
        let name = &tenant.name;
        if let Some((rule, line)) = first_deny(&tenant.deny.values, facts) {
            let rule = self.rule(tenant, &format!("deny[{rule}]"), Some(line));
            return Decision::no(rule, format!("{what} is denied to tenant {name:?}"));
        }
        let mut nearly = None;
        for (at, entry) in tenant.devices.values.iter().enumerate() {
            let rule = || self.rule(tenant, &format!("devices[{at}]"), Some(entry.line));
            match entry.allows(facts) {
                Match::Yes => {
                    let reason = format!("{what} is allowed to tenant {name:?} by \"{entry}\"");
                    return Decision::yes(rule(), reason);
                }
                Match::Nearly(why) => {
                    nearly.get_or_insert_with(|| Decision::no(rule(), why));
                }
                Match::No => {}
            }
        }
        nearly.unwrap_or_else(|| {
            let rule = self.rule(tenant, "devices", tenant.devices.line);
            Decision::no(rule, format!("tenant {name:?} has no entry for {what}"))
        })
    }

    /// The handout `tenant` gets: the one it asks for, if it may have it, else its first.
    ///
    /// # Errors
    /// It may not.
    pub fn handout(&self, tenant: &Tenant, asked: Option<Handout>) -> Result<Handout, Refusal> {
        self.choose(tenant, "handouts", &tenant.handouts, asked, Handout::name)
    }

    /// The backend `tenant` gets: the one it asks for, if it may have it, else its first.
    ///
    /// # Errors
    /// It may not.
    pub fn backend(&self, tenant: &Tenant, asked: Option<Backend>) -> Result<Backend, Refusal> {
        self.choose(tenant, "backends", &tenant.backends, asked, Backend::name)
    }

    fn choose<T: Copy + PartialEq>(
        &self,
        tenant: &Tenant,
        key: &str,
        list: &Listed<T>,
        asked: Option<T>,
        show: fn(T) -> &'static str,
    ) -> Result<T, Refusal> {
        match asked.or_else(|| list.values.first().copied()) {
            Some(choice) if list.values.contains(&choice) => Ok(choice),
            choice => {
                let may: Vec<_> = list.values.iter().map(|value| show(*value)).collect();
                let (name, may) = (&tenant.name, may.join(", "));
                let asked = choice.map_or("none", show);
                // Backends that are not written down are those of the handouts.
                let cure = match key == "backends" && list.line.is_none() {
                    true => format!("; `handouts` of its tenant would need one of {asked}"),
                    false => String::new(),
                };
                Err(Refusal {
                    rule: self.rule(tenant, key, list.line),
                    reason: format!("tenant {name:?} may have {key} {may}, not {asked}{cure}"),
                })
            }
        }
    }

    /// The shared container of this name, if `tenant` may join it.
    ///
    /// # Errors
    /// It may not, or there is none: which of the two is not told.
    pub fn container(&self, tenant: &Tenant, name: &str) -> Result<&SharedContainer, Refusal> {
        let open = |c: &&SharedContainer| c.name == name && c.members.contains(&tenant.name);
        self.containers.iter().find(open).ok_or_else(|| Refusal {
            rule: format!("default deny, {}", self.file),
            reason: format!(
                "no shared container {name:?} has tenant {:?} among its members",
                tenant.name
            ),
        })
    }

    /// A rule's name: whose, which key, where. A tenant's own line where the default stands.
    fn rule(&self, tenant: &Tenant, key: &str, line: Option<usize>) -> String {
        let Tenant { name, line: begins, .. } = tenant;
        let file = &self.file;
        match line {
            Some(line) => format!("tenant {name:?} {key}, {file}:{line}"),
            None => format!("tenant {name:?} {key} (the default), {file}:{begins}"),
        }
    }
}

/// The first rule that denies a device: its index and line.
fn first_deny(rules: &[DeviceRule], facts: &DeviceFacts) -> Option<(usize, usize)> {
    let mut each = rules.iter().enumerate();
    each.find(|(_, rule)| rule.denies(facts)).map(|(at, rule)| (at, rule.line))
}
