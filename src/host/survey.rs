//! The machine, read once for all who want it at the same time.

use super::Group;
use crate::kernel::{Kernel, Result};
use crate::policy::Serials;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Instant;

/// Groups as they were read last.
#[derive(Debug, Default)]
pub struct Survey {
    groups: RefCell<HashMap<u32, Reading>>,
    /// The group that was read last.
    last: Cell<u32>,
}

/// A group at one moment; none where there was none of that number.
#[derive(Debug)]
struct Reading {
    began: Instant,
    was_taken: bool,
    group: Option<Rc<Group>>,
}

impl Survey {
    /// A group as it was at `since` or later, with its devices' serial numbers where `serials` are asked for.
    /// `is_taken` says whether it is somebody's now: a device that is being taken back can be without its
    /// driver, so what was read then says nothing of it once it is free.
    ///
    /// # Errors
    /// What reading sysfs says.
    pub fn group(
        &self,
        kernel: &dyn Kernel,
        id: u32,
        since: Instant,
        is_taken: bool,
        serials: Option<&Serials>,
    ) -> Result<Option<Rc<Group>>> {
        let is_current = |it: &&Reading| it.began >= since && (is_taken || !it.was_taken);
        if let Some(reading) = self.groups.borrow().get(&id).filter(is_current) {
            return Ok(reading.group.clone());
        }
        let began = Instant::now();
        let mut group = Group::scan(kernel, id)?;
        if let (Some(group), Some(serials)) = (group.as_mut(), serials) {
            group.read_serials(kernel, serials)?;
        }
        let group = group.map(Rc::new);
        let reading = Reading { began, was_taken: is_taken, group: group.clone() };
        self.groups.borrow_mut().insert(id, reading);
        self.last.set(id);
        Ok(group)
    }

    /// Has these numbers, which are in order, begin behind the group that was read last. All who go round
    /// from there share each reading, whenever they came: nobody begins again where another has been.
    pub fn rotate(&self, ids: &mut [u32]) {
        ids.rotate_left(ids.partition_point(|id| *id <= self.last.get()));
    }
}
