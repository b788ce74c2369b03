//! Who asks, and whom a tenant is for.

use serde::{Deserialize, Serialize};
use std::fmt::{self, Display};

/// What the kernel says about a process at the other end of a socket; nothing here is what the
/// process says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its effective uid when it connected.
    pub uid: u32,
    /// Its effective gid.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
    /// Its pid in our pid namespace, 0 where it has none there. For messages only.
    pub pid: i32,
    /// The system unit it runs in, where that could be found out through its pidfd. A user unit is
    /// not one: anybody can name those.
    pub unit: Option<String>,
    /// Its SELinux context.
    pub label: Option<String>,
}

/// Whether a uid is an administrator's: root's, or that which the broker runs as, who could end it. What
/// is anybody's whom this user namespace has no number for is none.
pub fn administers(uid: u32, brokers: u32) -> bool {
    (uid == 0 || uid == brokers) && uid != OVERFLOW_ID
}

/// Finds the numbers of users and groups. Looking them up is I/O, and so the caller's.
pub trait Names {
    /// The uid of the user with this name.
    fn uid(&self, user: &str) -> Option<u32>;
    /// The gid of the group with this name.
    fn gid(&self, group: &str) -> Option<u32>;
}

/// Knows no name: for policies that have numbers alone.
impl Names for () {
    fn uid(&self, _: &str) -> Option<u32> {
        None
    }

    fn gid(&self, _: &str) -> Option<u32> {
        None
    }
}

/// The uid and gid that the kernel shows for everybody whom this user namespace has no number for.
pub const OVERFLOW_ID: u32 = 65534;

/// What the kernel gives for "no uid".
pub(super) const NO_ID: u32 = u32::MAX;

/// Whom a tenant is for. What is `None` was not asked for; all that was asked for must match, each
/// list with any one of its entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Principals {
    pub(super) anyone: bool,
    pub(super) users: Option<Vec<u32>>,
    pub(super) groups: Option<Vec<u32>>,
    pub(super) units: Option<Vec<String>>,
    pub(super) labels: Option<Vec<String>>,
    /// `accept = ["overflow-uid"]`.
    pub(super) accepts_overflow: bool,
}

impl fmt::Display for Principals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { anyone, users, groups, units, labels, accepts_overflow } = self;
        let words = [
            anyone.then(|| "anyone".to_owned()),
            users.as_ref().map(|users| format!("uid {}", any_of(users))),
            groups.as_ref().map(|groups| format!("group {}", any_of(groups))),
            units.as_ref().map(|units| format!("unit {}", any_of(units))),
            labels.as_ref().map(|labels| format!("label {}", any_of(labels))),
            accepts_overflow.then(|| "overflow-uid".to_owned()),
        ];
        f.write_str(&words.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

impl Principals {
    /// Why `peer` is not meant, or `None` if it is.
    pub(super) fn mismatch(&self, peer: &Peer) -> Option<String> {
        if peer.uid == NO_ID {
            return Some("the kernel has no uid for this peer".into());
        }
        if peer.uid == OVERFLOW_ID && !self.takes_overflow() {
            return Some(format!(
                "uid {OVERFLOW_ID} stands for everybody whom this user namespace has no number \
                 for; it only matches `user = {OVERFLOW_ID}` with `accept = [\"overflow-uid\"]`"
            ));
        }
        let Self { anyone, users, groups, units, labels, .. } = self;
        if !anyone
            && [users.is_some(), groups.is_some(), units.is_some(), labels.is_some()] == [false; 4]
        {
            return Some("it is for nobody".into());
        }
        if let Some(users) = users.as_ref().filter(|users| !users.contains(&peer.uid)) {
            return Some(format!("it is for uid {}, not {}", any_of(users), peer.uid));
        }
        let in_group =
            |gid: &u32| *gid != OVERFLOW_ID && (peer.gid == *gid || peer.groups.contains(gid));
        if let Some(groups) = groups.as_ref().filter(|groups| !groups.iter().any(in_group)) {
            return Some(format!("it is for members of group {}", any_of(groups)));
        }
        let in_unit = |unit: &String| peer.unit.as_ref() == Some(unit);
        if let Some(units) = units.as_ref().filter(|units| !units.iter().any(in_unit)) {
            let is = peer.unit.as_deref().unwrap_or("no system unit that is known");
            return Some(format!("it is for system unit {}, this is {is}", any_of(units)));
        }
        let labelled = |label: &String| peer.label.as_deref().is_some_and(|is| covers(label, is));
        if let Some(labels) = labels.as_ref().filter(|labels| !labels.iter().any(labelled)) {
            let is = peer.label.as_deref().unwrap_or("none");
            return Some(format!("it is for SELinux label {}, this one's is {is}", any_of(labels)));
        }
        None
    }

    /// Whether the overflow uid is meant, and not by accident.
    pub(super) fn takes_overflow(&self) -> bool {
        let listed = self.users.as_ref().is_some_and(|users| users.contains(&OVERFLOW_ID));
        self.accepts_overflow && listed
    }
}

/// Whether `wanted` names `label`: it is the same, or it leaves out fields at the end (the MLS
/// range, which differs from one libvirt guest to the next).
pub(super) fn covers(wanted: &str, label: &str) -> bool {
    label.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

fn any_of<T: Display>(list: &[T]) -> String {
    list.iter().map(T::to_string).collect::<Vec<_>>().join(" or ")
}
