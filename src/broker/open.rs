//! Opening what the ledger has decided that a lease gets, and closing it again.

use super::Broker;
use super::books::{Entry, Files};
use super::cdev::Cdev;
use super::plan::Chosen;
use super::space;
use crate::host;
use crate::kernel::{Device, Group, Iommufd, Node};
use crate::ledger::Effect;
use crate::protocol::{Bdf, Error};
use std::sync::Arc;

/// What the kernel has given so far, in its order.
#[derive(Default)]
pub(super) struct Opened {
    pub(super) groups: Vec<(u32, Group)>,
    pub(super) devices: Vec<(Bdf, Device)>,
    pub(super) iommufd: Option<Iommufd>,
    pub(super) cdevs: Vec<(Bdf, Cdev)>,
}

impl Opened {
    /// The devices' own nodes, with their groups and registrations.
    pub(super) fn registrations(&self, chosen: &Chosen) -> Vec<(Bdf, u32, u64)> {
        let group = |bdf: Bdf| chosen.devices.iter().find(|(device, _)| *device == bdf);
        let each = self.cdevs.iter();
        each.filter_map(|(bdf, cdev)| Some((*bdf, group(*bdf)?.1, cdev.registration))).collect()
    }

    /// Closes what was opened, the last first. Nobody else has a copy yet, so closing a group takes it
    /// out of its container too, and nothing of this can fail.
    pub(super) fn undo(self, entry: &Entry) {
        for cdev in self.cdevs.into_iter().rev() {
            drop(cdev);
        }
        drop(self.iommufd);
        for device in self.devices.into_iter().rev() {
            drop(device);
        }
        let mut space = entry.space.as_ref().map(|space| space.lock());
        for (id, group) in self.groups.into_iter().rev() {
            if space::is_shared(space.as_deref()) {
                // Its members can hold up what leaves that container.
                let group = group.through(&entry.contested);
                let _ = group.unset_container();
            } else {
                drop(group);
            }
            if let Some(space) = space.as_deref_mut() {
                space::leave(space, id);
            }
        }
        if let Some(space) = space.as_deref_mut() {
            space::close_if_empty(space);
        }
    }
}

impl Broker {
    /// Opens what the effects say; what was opened before one fails is in `opened`.
    pub(super) fn open(
        &self,
        entry: &Entry,
        files: &Files,
        effects: &[Effect],
        chosen: &Chosen,
        opened: &mut Opened,
    ) -> Result<(), Error> {
        let mut space = entry.space.as_ref().map(|space| space.lock());
        for effect in effects {
            match *effect {
                Effect::OpenSpace => {
                    if let Some(space) = space.as_deref_mut() {
                        space::open(space, &self.kernel)?;
                    }
                }
                Effect::OpenIommufd => opened.iommufd = Some(self.open_iommufd()?),
                // An open group would keep its devices from being bound.
                Effect::CheckGroup(id) => drop(self.open_group(entry, id, chosen)?),
                Effect::OpenCdev(_, bdf) => opened.cdevs.push((bdf, self.open_cdev(bdf)?)),
                Effect::OpenGroup(id) => {
                    let group = self.open_group(entry, id, chosen)?;
                    let group = match space::is_shared(space.as_deref()) {
                        true => group.through(&entry.contested),
                        false => group,
                    };
                    opened.groups.push((id, group));
                }
                Effect::Attach(id) => {
                    let group = opened.groups.iter().find(|(number, _)| *number == id);
                    if let (Some(space), Some((_, group))) = (space.as_deref_mut(), group) {
                        space::enter(space, id, group, no_iommu(id, chosen))?;
                    }
                }
                Effect::OpenDevice(id, bdf) => {
                    // Opening can reset the device; nobody else's container need wait for that.
                    drop(space.take());
                    let fresh = opened.groups.iter().find(|(number, _)| *number == id);
                    let group = fresh.map(|(_, group)| group).or_else(|| files.group(id));
                    if let Some(group) = group {
                        let name = chosen.names.get(&bdf).cloned();
                        let name = name.unwrap_or_else(|| bdf.to_string());
                        opened.devices.push((bdf, group.device(&name)?));
                    }
                }
                Effect::Map { .. }
                | Effect::Unmap { .. }
                | Effect::UnmapAll
                | Effect::Detach(_)
                | Effect::Prove(_)
                | Effect::ProveUnbound(_) => {}
            }
        }
        Ok(())
    }

    fn open_group(&self, entry: &Entry, id: u32, chosen: &Chosen) -> Result<Group, Error> {
        let node = match no_iommu(id, chosen) {
            true => Node::NoIommuGroup(id),
            false => Node::Group(id),
        };
        // Nobody has it by us, but somebody may have it all the same.
        let group = Group::open(Arc::clone(&entry.contested), node)
            .map_err(|error| self.group_error(id, chosen, error))?;
        let group = group.through(&self.kernel);
        if group.status()?.viable {
            return Ok(group);
        }
        let now = host::Group::scan(&*self.kernel, id)?;
        let blockers = now.map_or(Vec::new(), |group| group.blockers(|_| false));
        if blockers.is_empty() {
            let why = "the kernel calls it not viable although no driver of the host has a device \
                       of it: something else owns its DMA";
            return Err(Error::Conflict { what: format!("group {id}"), why: why.into() });
        }
        Err(Error::NotViable { group: id, blockers })
    }
}

fn no_iommu(id: u32, chosen: &Chosen) -> bool {
    chosen.groups.iter().any(|group| group.id == id && group.noiommu)
}
