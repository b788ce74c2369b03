//! The machine, read once for all who want it at the same time.

use super::Group;
use crate::kernel::{Kernel, Result};
use crate::policy::Serials;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Groups as they were read last. Each has a lock of its own, held while it is read: who wants the
/// same group meanwhile waits for that reading instead of making another.
#[derive(Debug, Default)]
pub struct Survey {
    groups: Mutex<HashMap<u32, Arc<Mutex<Option<Reading>>>>>,
}

/// A group at one moment; none where there was none of that number.
#[derive(Debug)]
struct Reading {
    began: Instant,
    group: Option<Arc<Group>>,
}

impl Survey {
    /// A group as it was at `since` or later, with its devices' serial numbers where `serials` are asked for.
    ///
    /// # Errors
    /// What reading sysfs says.
    pub fn group(
        &self,
        kernel: &dyn Kernel,
        id: u32,
        since: Instant,
        serials: Option<&Serials>,
    ) -> Result<Option<Arc<Group>>> {
        let known = Arc::clone(lock(&self.groups).entry(id).or_default());
        let mut known = lock(&known);
        if let Some(reading) = known.as_ref().filter(|reading| reading.began >= since) {
            return Ok(reading.group.clone());
        }
        let began = Instant::now();
        let mut group = Group::scan(kernel, id)?;
        if let (Some(group), Some(serials)) = (group.as_mut(), serials) {
            group.read_serials(kernel, serials)?;
        }
        let group = group.map(Arc::new);
        *known = Some(Reading { began, group: group.clone() });
        Ok(group)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
