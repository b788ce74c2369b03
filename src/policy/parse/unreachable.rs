//! Tenants that nobody can be, because an earlier one takes them all.

use super::found::Found;
use crate::policy::peer::{OVERFLOW_ID, Principals, covers};
use crate::policy::problem::Report;

/// Reports tenants, and single users of them, that an earlier tenant always takes.
pub(super) fn check(report: &mut Report<'_>, tenants: &[Found]) {
    for (at, found) in tenants.iter().enumerate() {
        let earlier = &tenants[..at];
        let taker = |uid: Option<u32>| {
            earlier
                .iter()
                .find(|other| takes(&other.tenant.principals, uid, &found.tenant.principals))
        };
        let name = &found.tenant.name;
        let taken: Vec<_> = if found.tenant.principals.users.is_some() {
            let users = found.users.iter();
            users.filter_map(|(uid, span)| Some((span, Some(*uid), taker(Some(*uid))?))).collect()
        } else {
            taker(None).map(|other| (&found.name_span, None, other)).into_iter().collect()
        };
        let all = taken.len() == found.users.len().max(1);
        if let (true, Some((_, _, other))) = (all, taken.first()) {
            let (by, line) = (&other.tenant.name, other.tenant.line);
            report.error(found.name_span.clone(), format!("nobody can be tenant {name:?}")).help(
                format!(
                    "{by:?} in line {line} comes first and takes everybody it is for; put the \
                     narrower one first"
                ),
            );
            continue;
        }
        for (span, uid, other) in taken {
            let (uid, by, line) = (uid.unwrap_or_default(), &other.tenant.name, other.tenant.line);
            report
                .warn(span.clone(), format!("uid {uid} is always tenant {by:?}, never {name:?}"))
                .help(format!("{by:?} is in line {line}, and the first that matches counts"));
        }
    }
}

/// Whether `earlier` is for everybody with this uid, or any uid, whom `later` is for.
fn takes(earlier: &Principals, uid: Option<u32>, later: &Principals) -> bool {
    let user = match (&earlier.users, uid) {
        (None, uid) => uid != Some(OVERFLOW_ID),
        (Some(users), Some(uid)) => users.contains(&uid),
        (Some(_), None) => false,
    };
    user && within(&later.groups, &earlier.groups, |a, b| a == b)
        && within(&later.units, &earlier.units, |a, b| a == b)
        && within(&later.labels, &earlier.labels, |a, b| covers(b, a))
}

/// Whether each of `inner` is one of `outer`; `None` is everything.
fn within<T>(inner: &Option<Vec<T>>, outer: &Option<Vec<T>>, same: fn(&T, &T) -> bool) -> bool {
    match (inner, outer) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(inner), Some(outer)) => inner.iter().all(|a| outer.iter().any(|b| same(a, b))),
    }
}
