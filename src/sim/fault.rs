//! Faults on demand: calls that fail, are slow or never return.
//!
//! A call that fails has no effect. A call that is slow or never returns has its effect when it is
//! made, as a reset that hangs has begun; only its answer is held back. What is held back is
//! dropped, with any fd in it, when the caller closes its reply socket: as if it had been killed
//! in the call.

use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A fault: which call, and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The request's name in the header such as `VFIO_IOMMU_MAP_DMA`, or `open`, `pread`,
    /// `pwrite`, `sysfs`, `sysfs_write`.
    pub call: String,
    /// Only calls on this object: a path, or a device's address. Any where it is left out.
    #[serde(default)]
    pub object: Option<String>,
    /// The first of the matching calls that is hit; 1 is the next one.
    #[serde(default = "one")]
    pub nth: u64,
    /// How many are hit from there on.
    #[serde(default = "one")]
    pub times: u64,
    /// What becomes of it.
    pub effect: Effect,
}

/// What becomes of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// It fails with this errno and has no effect.
    Fail(i32),
    /// It answers after so many milliseconds.
    Slow(u64),
    /// It never answers, until the faults are cleared.
    Never,
}

impl Fault {
    /// The next such call fails.
    pub fn fail(call: &str, errno: Errno) -> Self {
        Self::new(call, Effect::Fail(errno as i32))
    }

    /// The next such call answers late.
    pub fn slow(call: &str, by: Duration) -> Self {
        Self::new(call, Effect::Slow(u64::try_from(by.as_millis()).unwrap_or(u64::MAX)))
    }

    /// The next such call does not return.
    pub fn never(call: &str) -> Self {
        Self::new(call, Effect::Never)
    }

    fn new(call: &str, effect: Effect) -> Self {
        Self { call: call.to_owned(), object: None, nth: 1, times: 1, effect }
    }

    /// Only on this object: a node's path, or a device's address.
    #[must_use]
    pub fn on(mut self, object: &str) -> Self {
        self.object = Some(object.to_owned());
        self
    }

    /// Not the next call but the nth from now; 1 is the next one.
    #[must_use]
    pub fn nth(mut self, nth: u64) -> Self {
        self.nth = nth;
        self
    }

    /// So many calls in a row, u64::MAX for all of them.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }
}

/// The faults that are still to come.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<Fault>);

impl Faults {
    /// Adds one; `false` where it could never hit.
    pub(crate) fn add(&mut self, fault: Fault) -> bool {
        let sensible = fault.nth > 0 && fault.times > 0;
        if sensible {
            self.0.push(fault);
        }
        sensible
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Counts a call; what becomes of it, if anything does.
    pub(crate) fn count(&mut self, call: &str, object: &str) -> Option<Effect> {
        let mut effect = None;
        for fault in &mut self.0 {
            let hit = fault.call == call && fault.object.as_deref().is_none_or(|it| it == object);
            if !hit {
                continue;
            }
            if fault.nth > 1 {
                fault.nth -= 1;
            } else if fault.times > 0 && effect.is_none() {
                fault.times -= 1;
                effect = Some(fault.effect.clone());
            }
        }
        self.0.retain(|fault| fault.times > 0);
        effect
    }
}

fn one() -> u64 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_is_hit_and_no_other() {
        let mut faults = Faults::default();
        assert!(faults.add(Fault::fail("open", Errno::EIO).nth(2).on("/dev/vfio/1")));
        assert!(!faults.add(Fault::never("open").nth(0)));
        let hits: Vec<_> = (0..4).map(|_| faults.count("open", "/dev/vfio/1").is_some()).collect();
        assert_eq!(hits, [false, true, false, false]);
        assert!(faults.count("open", "/dev/vfio/2").is_none());
    }
}
