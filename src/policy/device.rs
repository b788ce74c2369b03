//! Which devices a rule names.

use crate::pci::{DeviceFacts, Id};
use crate::protocol::Bdf;
use serde::{Deserialize, Serialize};
use std::fmt;

/// One entry of `devices` or `deny`. All that is given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DeviceRule {
    pub(super) line: usize,
    pub(super) bdf: Option<Bdf>,
    pub(super) vf_of: Option<Bdf>,
    pub(super) id: Option<Id>,
    pub(super) subsystem: Option<Id>,
    pub(super) serial: Option<String>,
}

/// What a rule says about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Match {
    Yes,
    /// Its place or kind is named, what is there is something else: what to tell.
    Nearly(String),
    No,
}

impl DeviceRule {
    /// As an entry of `devices`: what is not known does not match.
    pub(super) fn allows(&self, facts: &DeviceFacts) -> Match {
        let Some(named) = self.names(facts) else { return Match::No };
        let bdf = facts.bdf;
        if let Some(id) = self.id.filter(|id| *id != facts.id()) {
            return Match::Nearly(format!(
                "{named} is allowed as {id}, but {} is there now",
                facts.id()
            ));
        }
        if let Some(want) = self.subsystem.filter(|want| *want != facts.subsystem()) {
            let is = facts.subsystem();
            return Match::Nearly(format!(
                "{named} is allowed with subsystem {want}, but that of {bdf} is {is}"
            ));
        }
        match (&self.serial, &facts.serial) {
            (Some(want), Some(is)) if want != is => Match::Nearly(format!(
                "{named} is allowed with serial {want}, but that of {bdf} is {is}"
            )),
            (Some(want), None) => Match::Nearly(format!(
                "{named} is allowed with serial {want}, but {bdf} shows none"
            )),
            _ => Match::Yes,
        }
    }

    /// As an entry of `deny`: what is not known matches.
    pub(super) fn denies(&self, facts: &DeviceFacts) -> bool {
        let serial = match (&self.serial, &facts.serial) {
            (Some(want), Some(is)) => want == is,
            _ => true,
        };
        self.names(facts).is_some()
            && self.id.is_none_or(|id| id == facts.id())
            && self.subsystem.is_none_or(|id| id == facts.subsystem())
            && serial
    }

    /// What of `facts` this rule is about, in words, if it is about it at all. Ids beside an
    /// address do not choose a device, they check it.
    fn names(&self, facts: &DeviceFacts) -> Option<String> {
        match (self.bdf, self.vf_of, self.id) {
            (Some(bdf), None, _) => (bdf == facts.bdf).then(|| bdf.to_string()),
            (None, Some(pf), _) => {
                (facts.physfn == Some(pf)).then(|| format!("{}, a VF of {pf},", facts.bdf))
            }
            (None, None, Some(id)) => (id == facts.id()).then(|| format!("a {id}")),
            _ => None,
        }
    }
}

impl fmt::Display for DeviceRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.bdf, self.vf_of, self.id) {
            (Some(bdf), _, Some(id)) => write!(f, "{bdf} as {id}")?,
            (Some(bdf), _, None) => write!(f, "{bdf}")?,
            (None, Some(pf), Some(id)) => write!(f, "VFs of {pf} as {id}")?,
            (None, Some(pf), None) => write!(f, "VFs of {pf}")?,
            (None, None, Some(id)) => write!(f, "any {id}")?,
            (None, None, None) => write!(f, "nothing")?,
        }
        if let Some(subsystem) = self.subsystem {
            write!(f, ", subsystem {subsystem}")?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ", serial {serial}")?;
        }
        Ok(())
    }
}
