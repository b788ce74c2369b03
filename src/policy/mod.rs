//! Who may have what: the policy file, its checks, and the decisions with their reasons. Pure: no
//! I/O happens here.
//!
//! Nothing is allowed unless the file says so, for root too, and a deny beats every allow. Every
//! decision names the rule that made it and its place in the file.

mod decide;
mod device;
mod parse;
mod peer;
mod problem;
mod reader;
mod tenant;

pub use decide::{Decision, Form, Refusal};
pub use peer::{Names, OVERFLOW_ID, Peer, administers};
pub use problem::{Problem, Problems, Severity};
pub use tenant::{Limits, Risk, SharedContainer, Tenant, Trust, Verb};

use crate::protocol::Bdf;
use device::DeviceRule;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tenant::{DenyAll, Listed};

/// Where the policy is unless told otherwise.
pub const POLICY_PATH: &str = "/etc/vfio-broker/policy.toml";

/// What decisions call a policy that is in no file.
pub const BUILT_IN: &str = "built-in policy";

/// Between those whom a tenant is for and those who are another tenant before it.
const NOT: &str = "; not ";

/// A policy file that was read and found good.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Policy {
    /// The file's name without its directories: as decisions call it.
    file: String,
    tenants: Vec<Tenant>,
    containers: Vec<SharedContainer>,
    deny: Vec<DenyAll>,
    /// For whoever reads the file.
    #[serde(skip)]
    warnings: Problems,
    /// Of devices whose serial numbers not everybody may read who goes by it.
    serials: Serials,
}

/// Serial numbers of devices, each with the number of the device's directory in sysfs: another device at
/// the same address has another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serials(pub BTreeMap<Bdf, (u64, String)>);

impl Serials {
    /// The serial number of a device that has this directory.
    pub fn of(&self, bdf: Bdf, inode: u64) -> Option<&str> {
        self.0.get(&bdf).filter(|(known, _)| *known == inode).map(|(_, serial)| serial.as_str())
    }
}

impl Policy {
    /// Reads a policy. `file_name` is for messages; `names` finds users and groups.
    ///
    /// # Errors
    /// Everything that is wrong with it, not only the first thing.
    pub fn parse(file_name: &str, text: &str, names: &dyn Names) -> Result<Self, Problems> {
        parse::policy(file_name, text, names)
    }

    /// What is allowed and probably not meant.
    pub fn warnings(&self) -> &Problems {
        &self.warnings
    }

    /// The tenants, in the order in which they are tried.
    pub fn tenants(&self) -> &[Tenant] {
        &self.tenants
    }

    /// Whom a tenant's name means, in words: the same words in two policies mean the same principals.
    /// `None` where there is no such tenant.
    pub fn principals(&self, tenant: &str) -> Option<String> {
        let at = self.tenants.iter().position(|known| known.name == tenant)?;
        // The first tenant that matches is it: who is meant by those before is not meant here.
        let each =
            self.tenants.iter().take(at + 1).rev().map(|tenant| tenant.principals.to_string());
        Some(each.collect::<Vec<_>>().join(NOT))
    }

    /// Whether a tenant of this name means nobody who was not meant by these [words](Self::principals):
    /// tenants that come before it now may have taken some away.
    pub fn means(&self, tenant: &str, principals: &str) -> bool {
        let Some(now) = self.principals(tenant) else { return false };
        let (mut now, mut then) = (now.split(NOT), principals.split(NOT));
        let is_same = now.next() == then.next();
        let taken: Vec<&str> = now.collect();
        is_same && then.all(|before| taken.contains(&before))
    }

    /// Whether any tenant is for a unit, so that it must be found out which one a peer runs in.
    pub fn names_units(&self) -> bool {
        self.tenants.iter().any(|tenant| tenant.principals.units.is_some())
    }

    /// The serial numbers that were read when it was.
    pub fn serials(&self) -> &Serials {
        &self.serials
    }

    /// The same policy with serial numbers that were read for it.
    pub fn with_serials(self, serials: Serials) -> Self {
        Self { serials, ..self }
    }

    /// Whether any rule names a serial number, so that devices must be asked for theirs.
    pub fn names_serials(&self) -> bool {
        let named = |rules: &[DeviceRule]| rules.iter().any(|rule| rule.serial.is_some());
        self.deny.iter().any(|deny| named(&deny.devices))
            || self.tenants.iter().any(|t| named(&t.devices.values) || named(&t.deny.values))
    }

    /// The shared containers.
    pub fn containers(&self) -> &[SharedContainer] {
        &self.containers
    }
}

#[cfg(test)]
mod tests;
