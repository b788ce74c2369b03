//! Attaching bound devices: page tables of an IOAS, and which group has which.
//!
//! All devices of a group have one page table. An IOAS gets one with the first device that is
//! attached to it, and what is mapped there is pinned from then on, until the last one leaves.

use super::ioas::Owner;
use super::iommufd::{Context, Kind};
use super::memlock::Accounts;
use nix::errno::Errno;

/// A group of which a device is attached.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) table: u32,
    /// The attached devices, by object.
    pub(super) devices: Vec<u32>,
}

/// A device that is to be attached.
#[derive(Debug)]
pub(super) struct Candidate {
    /// Its object.
    pub(super) id: u32,
    pub(super) group: u32,
    /// What it can't be given, first and last address.
    pub(super) reserved: Vec<(u64, u64)>,
    /// First and last address that its page table translates.
    pub(super) aperture: (u64, u64),
}

impl Context {
    /// Attaches a device to an IOAS or a page table, instead of what it has; returns the table.
    pub(super) fn attach(
        &mut self,
        accounts: &mut Accounts,
        device: &Candidate,
        id: u32,
    ) -> Result<u32, Errno> {
        match self.objects.get(&id).ok_or(Errno::ENOENT)?.kind {
            Kind::Table(_) => self.take_table(accounts, device, id).map(|()| id),
            Kind::Ioas(_) => self.take_ioas(accounts, device, id),
            Kind::Device => Err(Errno::EINVAL),
        }
    }

    fn is_attached(&self, device: &Candidate) -> bool {
        self.groups.get(&device.group).is_some_and(|it| it.devices.contains(&device.id))
    }

    fn take_table(
        &mut self,
        accounts: &mut Accounts,
        device: &Candidate,
        table: u32,
    ) -> Result<(), Errno> {
        if self.is_attached(device) {
            self.replace(accounts, device, table)
        } else {
            self.join(device, table)
        }
    }

    /// With a page table that the IOAS has, or a new one.
    fn take_ioas(
        &mut self,
        accounts: &mut Accounts,
        device: &Candidate,
        ioas: u32,
    ) -> Result<u32, Errno> {
        for table in self.ioas(ioas)?.tables.clone() {
            match self.take_table(accounts, device, table) {
                Ok(()) => return Ok(table),
                // Not a table for this device.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        let table = self.add(Kind::Table(ioas));
        self.use_object(ioas, 1);
        let joins = !self.is_attached(device);
        let mut result = if joins { self.join(device, table) } else { Ok(()) };
        let mut joined = joins && result.is_ok();
        if result.is_ok() {
            result = self.add_table(accounts, ioas, table, device.aperture);
        }
        if result.is_ok() && !joins {
            result = self.replace(accounts, device, table);
            joined = false;
        }
        if let Err(errno) = result {
            if joined {
                self.part(device.id, device.group);
            }
            self.drop_table(accounts, table);
            return Err(errno);
        }
        Ok(table)
    }

    /// Gives an IOAS a page table: what is mapped has to fit it, and is pinned for the first one.
    fn add_table(
        &mut self,
        accounts: &mut Accounts,
        id: u32,
        table: u32,
        (first, last): (u64, u64),
    ) -> Result<(), Errno> {
        let ioas = self.ioas(id)?;
        ioas.check_alignment_with_table()?;
        let outside: Vec<_> = first
            .checked_sub(1)
            .map(|end| (0, end))
            .into_iter()
            .chain(last.checked_add(1).map(|start| (start, u64::MAX)))
            .collect();
        ioas.reserve(&outside, Owner::Table(table))?;
        if ioas.tables.is_empty() {
            let areas = self.areas(id);
            self.fill(accounts, &areas)?;
        }
        self.ioas(id)?.tables.push(table);
        Ok(())
    }

    /// A device that is not attached takes the table that its group has, or brings the first.
    fn join(&mut self, device: &Candidate, table: u32) -> Result<(), Errno> {
        if self.groups.get(&device.group).is_some_and(|group| group.table != table) {
            return Err(Errno::EINVAL);
        }
        self.reserve(table, device.id, &device.reserved)?;
        let group = self.groups.entry(device.group);
        group.or_insert(Attached { table, devices: Vec::new() }).devices.push(device.id);
        self.use_object(table, 1);
        self.use_object(device.id, 1);
        Ok(())
    }

    /// A device that is attached takes all of its group to another table.
    fn replace(
        &mut self,
        accounts: &mut Accounts,
        device: &Candidate,
        table: u32,
    ) -> Result<(), Errno> {
        let group = self.groups.get(&device.group).ok_or(Errno::EINVAL)?;
        let (old, devices) = (group.table, group.devices.clone());
        if old == table {
            return Ok(());
        }
        for (nth, id) in devices.iter().enumerate() {
            if let Err(errno) = self.reserve(table, *id, &device.reserved) {
                self.unreserve(table, &devices[..nth]);
                return Err(errno);
            }
        }
        self.unreserve(old, &devices);
        if let Some(group) = self.groups.get_mut(&device.group) {
            group.table = table;
        }
        let moved = i32::try_from(devices.len()).unwrap_or(i32::MAX);
        self.use_object(table, moved);
        self.use_object(old, -moved);
        self.drop_unused_table(accounts, old);
        Ok(())
    }

    /// Detaches a device; nothing happens to one that is not attached.
    pub(super) fn detach_device(&mut self, accounts: &mut Accounts, id: u32, group: u32) {
        if let Some(table) = self.part(id, group) {
            self.drop_unused_table(accounts, table);
        }
    }

    /// Takes a device off its table; returns that.
    fn part(&mut self, id: u32, group: u32) -> Option<u32> {
        let attached = self.groups.get_mut(&group)?;
        let at = attached.devices.iter().position(|device| *device == id)?;
        attached.devices.remove(at);
        let (table, last) = (attached.table, attached.devices.is_empty());
        if last {
            self.groups.remove(&group);
        }
        self.unreserve(table, &[id]);
        self.use_object(table, -1);
        self.use_object(id, -1);
        Some(table)
    }

    fn drop_unused_table(&mut self, accounts: &mut Accounts, table: u32) {
        if self.objects.get(&table).is_some_and(|object| object.users == 1) {
            self.drop_table(accounts, table);
        }
    }

    /// Ends a page table; with an IOAS's last one nothing of it stays pinned.
    fn drop_table(&mut self, accounts: &mut Accounts, table: u32) {
        let Some(id) = self.ioas_of(table) else { return };
        self.objects.remove(&table);
        self.use_object(id, -1);
        let Ok(ioas) = self.ioas(id) else { return };
        ioas.unreserve(Owner::Table(table));
        let before = ioas.tables.len();
        ioas.tables.retain(|other| *other != table);
        if before > 0 && ioas.tables.is_empty() {
            let areas = self.areas(id);
            self.unfill(accounts, &areas);
        }
    }

    fn ioas_of(&self, table: u32) -> Option<u32> {
        match self.objects.get(&table)?.kind {
            Kind::Table(ioas) => Some(ioas),
            _ => None,
        }
    }

    fn reserve(&mut self, table: u32, device: u32, ranges: &[(u64, u64)]) -> Result<(), Errno> {
        let id = self.ioas_of(table).ok_or(Errno::EINVAL)?;
        let ioas = self.ioas(id)?;
        let result = ioas.reserve(ranges, Owner::Device(device));
        if result.is_err() {
            ioas.unreserve(Owner::Device(device));
        }
        result
    }

    fn unreserve(&mut self, table: u32, devices: &[u32]) {
        let Some(ioas) = self.ioas_of(table).and_then(|id| self.ioas(id).ok()) else { return };
        for device in devices {
            ioas.unreserve(Owner::Device(*device));
        }
    }
}
