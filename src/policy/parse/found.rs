//! What parsing finds, before it is known whether all of it is good.

use crate::policy::Tenant;
use std::ops::Range;

/// A tenant with the places that later checks speak of.
pub(super) struct Found {
    pub(super) tenant: Tenant,
    pub(super) name_span: Range<usize>,
    /// The entries of `user`, each with its place.
    pub(super) users: Vec<(u32, Range<usize>)>,
}
