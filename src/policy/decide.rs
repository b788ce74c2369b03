//! The decisions, each with the rule that made it.

use super::device::Match;
use super::{
    DeviceRule, Listed, OVERFLOW_ID, Peer, Policy, Risk, SharedContainer, Tenant, Trust, Verb,
};
use crate::pci::DeviceFacts;
use crate::protocol::{Backend, Bdf, Handout};
use serde::{Deserialize, Serialize};
use std::fmt::Display;

/// Yes or no, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// Whether it may be.
    pub allowed: bool,
    /// What decided, with its place in the file.
    pub rule: String,
    /// The policy file, as decisions call it.
    pub file: String,
    /// The line of that rule; none where nothing in the file stands for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// The device that was asked about; none where none was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Bdf>,
    /// Why, in plain words.
    pub reason: String,
}

/// A no, with the rule and the reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("denied by {rule}: {reason}")]
pub struct Refusal {
    /// What decided, with its place in the file.
    pub rule: String,
    /// The policy file, as decisions call it.
    pub file: String,
    /// The line of that rule; none where nothing in the file stands for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// The device that was asked about; none where none was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Bdf>,
    /// Why, in plain words.
    pub reason: String,
}

/// What decided: whose rule, which key, which line.
struct Rule {
    name: String,
    line: Option<usize>,
}

/// What a lease is, as far as a policy has a say in it; its devices aside.
#[derive(Clone, Copy, Debug)]
pub struct Form<'a> {
    /// How its files are handed out.
    pub handout: Handout,
    /// The shared container it is in, and what that's members may do there.
    pub container: Option<(&'a str, Trust)>,
}

impl From<Refusal> for Decision {
    fn from(refusal: Refusal) -> Self {
        let Refusal { rule, file, line, device, reason } = refusal;
        Self { allowed: false, rule, file, line, device, reason }
    }
}

impl Decision {
    /// The decision as a result, to be passed on with `?`.
    ///
    /// # Errors
    /// The refusal, if it is one.
    pub fn ok(self) -> Result<(), Refusal> {
        let Self { allowed, rule, file, line, device, reason } = self;
        if allowed { Ok(()) } else { Err(Refusal { rule, file, line, device, reason }) }
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

    /// Up to how many bytes a process of the tenant may have its memlock limit raised.
    ///
    /// # Errors
    /// It is never raised.
    pub fn memlock(&self, tenant: &Tenant) -> Result<u64, Refusal> {
        let Tenant { name, line, memlock, .. } = tenant;
        if *memlock > 0 {
            return Ok(*memlock);
        }
        let rule = Rule { name: format!("tenant {name:?} without memlock"), line: Some(*line) };
        Err(self.refusal(
            rule,
            None,
            format!(
                "the memlock limit of processes of {name:?} is not raised; its tenant would need \
                 memlock = \"SIZE\" in the policy"
            ),
        ))
    }

    fn no_tenant(&self, peer: &Peer) -> Refusal {
        let Peer { uid, gid, .. } = peer;
        let overflow =
            *uid == OVERFLOW_ID && !self.tenants.iter().any(|t| t.principals.takes_overflow());
        let overflow = if overflow {
            ", which stands for everybody whom this user namespace has no number for: a tenant \
             must list it as a number and accept \"overflow-uid\""
        } else {
            ""
        };
        // A gid that stands for any is no news.
        let gid = if *gid == OVERFLOW_ID { String::new() } else { format!("gid {gid}, ") };
        self.refusal(default_deny(), None, format!("no tenant is for {gid}uid {uid}{overflow}"))
    }

    /// That a lease is of a tenant that this policy has not, or means somebody else by.
    pub fn no_such_tenant(&self, name: &str) -> Refusal {
        let reason = format!("tenant {name:?} is not there any more, or is for others than it was");
        self.refusal(default_deny(), None, reason)
    }

    /// That what only administrators may say was said by another user.
    pub fn no_administrator(&self, uid: u32) -> Refusal {
        let reason = format!("uid {uid} is no administrator: root, or whoever runs the daemon");
        self.refusal(default_deny(), None, reason)
    }

    /// That a lease is in a shared container which was of the other kind.
    fn another_trust(&self, container: &SharedContainer) -> Refusal {
        let SharedContainer { name, line, .. } = container;
        let rule = Rule { name: format!("container {name:?} trust"), line: Some(*line) };
        let reason = format!("shared container {name:?} had another trust when it was made");
        self.refusal(rule, None, reason)
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
        let rule = rule_of(tenant, key, list.line);
        let name = &tenant.name;
        if list.values.contains(&wanted) {
            return self.decision(true, rule, None, format!("tenant {name:?} {yes} {wanted}"));
        }
        self.decision(false, rule, None, format!("tenant {name:?} {no} {wanted}"))
    }

    /// Whether `tenant` may use or withhold a device, whatever the verb. Deny beats allow.
    pub fn device(&self, tenant: &Tenant, facts: &DeviceFacts) -> Decision {
        let what = format!("{} ({})", facts.bdf, facts.id());
        let decide = |allowed, rule, reason| self.decision(allowed, rule, Some(facts.bdf), reason);
        for (at, deny) in self.deny.iter().enumerate() {
            if let Some((rule, line)) = first_deny(&deny.devices, facts) {
                let rule = Rule { name: format!("deny[{at}] devices[{rule}]"), line: Some(line) };
                let reason = &deny.reason;
                return decide(false, rule, format!("{what} is denied to everybody: {reason}"));
            }
        }
        let name = &tenant.name;
        if let Some((rule, line)) = first_deny(&tenant.deny.values, facts) {
            let rule = rule_of(tenant, &format!("deny[{rule}]"), Some(line));
            return decide(false, rule, format!("{what} is denied to tenant {name:?}"));
        }
        let mut nearly = None;
        for (at, entry) in tenant.devices.values.iter().enumerate() {
            let rule = || rule_of(tenant, &format!("devices[{at}]"), Some(entry.line));
            match entry.allows(facts) {
                Match::Yes => {
                    let reason = format!("{what} is allowed to tenant {name:?} by \"{entry}\"");
                    return decide(true, rule(), reason);
                }
                Match::Nearly(why) => {
                    nearly.get_or_insert_with(|| decide(false, rule(), why));
                }
                Match::No => {}
            }
        }
        nearly.unwrap_or_else(|| {
            let rule = rule_of(tenant, "devices", tenant.devices.line);
            decide(false, rule, format!("tenant {name:?} has no entry for {what}"))
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
                let reason = format!("tenant {name:?} may have {key} {may}, not {asked}{cure}");
                Err(self.refusal(rule_of(tenant, key, list.line), None, reason))
            }
        }
    }

    /// The shared container of this name, if `tenant` may join it.
    ///
    /// # Errors
    /// It may not, or there is none: which of the two is not told.
    pub fn container(&self, tenant: &Tenant, name: &str) -> Result<&SharedContainer, Refusal> {
        let open = |c: &&SharedContainer| c.name == name && c.members.contains(&tenant.name);
        self.containers.iter().find(open).ok_or_else(|| {
            let tenant = &tenant.name;
            let reason =
                format!("no shared container {name:?} has tenant {tenant:?} among its members");
            self.refusal(default_deny(), None, reason)
        })
    }

    /// Whether `tenant` may have a lease of this form.
    ///
    /// # Errors
    /// It may not.
    pub fn permits(&self, tenant: &Tenant, form: Form<'_>) -> Result<(), Refusal> {
        self.may(tenant, Verb::Acquire).ok()?;
        self.backend(tenant, Some(form.handout.backend()))?;
        self.handout(tenant, Some(form.handout))?;
        if let Some((name, trust)) = form.container {
            let container = self.container(tenant, name)?;
            if container.trust != trust {
                return Err(self.another_trust(container));
            }
        }
        Ok(())
    }

    fn decision(&self, allowed: bool, rule: Rule, device: Option<Bdf>, reason: String) -> Decision {
        Decision { allowed, ..self.refusal(rule, device, reason).into() }
    }

    fn refusal(&self, rule: Rule, device: Option<Bdf>, reason: String) -> Refusal {
        let (Rule { name, line }, file) = (rule, self.file.clone());
        let rule = match line {
            Some(line) => format!("{name}, {file}:{line}"),
            None => format!("{name}, {file}"),
        };
        Refusal { rule, file, line, device, reason }
    }
}

/// What decides where nothing in the file does.
fn default_deny() -> Rule {
    Rule { name: "default deny".into(), line: None }
}

/// A rule of a tenant: its key, and the line of that. The tenant's own line where the default stands.
fn rule_of(tenant: &Tenant, key: &str, line: Option<usize>) -> Rule {
    let name = &tenant.name;
    let name = match line {
        Some(_) => format!("tenant {name:?} {key}"),
        None => format!("tenant {name:?} {key} (the default)"),
    };
    Rule { name, line: line.or(Some(tenant.line)) }
}

/// The first rule that denies a device: its index and line.
fn first_deny(rules: &[DeviceRule], facts: &DeviceFacts) -> Option<(usize, usize)> {
    let mut each = rules.iter().enumerate();
    each.find(|(_, rule)| rule.denies(facts)).map(|(at, rule)| (at, rule.line))
}
