//! Iommufds: `/dev/iommu`, the objects in one, and how its calls are decoded.

use super::ioas::{Ioas, PagesId};
use super::memlock::Accounts;
use super::pages::Pages;
use super::tables::Attached;
use super::{CallArg, Caller, Capability, Done, File, FileId, Machine, UserStruct};
use crate::kernel::request;
use crate::sim::profile::Profile;
use iommufd_bindings::iommufd as uapi;
use nix::errno::Errno;
use std::collections::BTreeMap;

/// An iommufd's number, never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ContextId(pub(super) u64);

/// An iommufd (`struct iommufd_ctx`). It lives while its file is open or a device is bound to it.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) open: bool,
    /// Pinned memory is charged to each process, not to its user.
    pub(super) per_process: bool,
    /// The lowest free number is the next object's.
    pub(super) objects: BTreeMap<u32, Object>,
    pub(super) pages: BTreeMap<PagesId, Pages>,
    /// Groups of which a device is attached.
    pub(super) groups: BTreeMap<u32, Attached>,
    next_pages: u64,
}

/// An object of an iommufd.
#[derive(Debug)]
pub(super) struct Object {
    /// One for being there, and one for everything that needs it.
    pub(super) users: u32,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Ioas(Ioas),
    /// A page table that was made for devices attached to this IOAS; it goes with the last one.
    Table(u32),
    /// A bound device.
    Device,
}

impl Context {
    fn new() -> Self {
        Self {
            open: true,
            per_process: false,
            objects: BTreeMap::new(),
            pages: BTreeMap::new(),
            groups: BTreeMap::new(),
            next_pages: 1,
        }
    }

    pub(super) fn free_id(&self) -> u32 {
        (1..).find(|id| !self.objects.contains_key(id)).unwrap_or(u32::MAX)
    }

    pub(super) fn add(&mut self, kind: Kind) -> u32 {
        let id = self.free_id();
        self.objects.insert(id, Object { users: 1, kind });
        id
    }

    /// # Errors
    /// ENOENT: no such object, or another kind of it.
    pub(super) fn ioas(&mut self, id: u32) -> Result<&mut Ioas, Errno> {
        match self.objects.get_mut(&id).map(|object| &mut object.kind) {
            Some(Kind::Ioas(ioas)) => Ok(ioas),
            _ => Err(Errno::ENOENT),
        }
    }

    pub(super) fn add_pages(&mut self, pages: Pages) -> PagesId {
        let id = PagesId(self.next_pages);
        self.next_pages += 1;
        self.pages.insert(id, pages);
        id
    }

    /// `users` of an object, more or fewer.
    pub(super) fn use_object(&mut self, id: u32, more: i32) {
        if let Some(object) = self.objects.get_mut(&id) {
            object.users = object.users.saturating_add_signed(more);
        }
    }

    pub(super) fn all_ioas(&self) -> impl Iterator<Item = &Ioas> {
        self.objects.values().filter_map(|object| match &object.kind {
            Kind::Ioas(ioas) => Some(ioas),
            _ => None,
        })
    }

    /// `IOMMU_DESTROY`.
    fn destroy(&mut self, accounts: &mut Accounts, id: u32) -> Result<(), Errno> {
        let object = self.objects.get(&id).ok_or(Errno::ENOENT)?;
        if object.users > 1 {
            return Err(Errno::EBUSY);
        }
        if matches!(object.kind, Kind::Ioas(_)) {
            self.unmap_range(accounts, id, 0, u64::MAX)?;
        }
        self.objects.remove(&id);
        Ok(())
    }

    fn rlimit_mode(&mut self, user: &UserStruct, may_set: bool) -> Result<u64, Errno> {
        if user.u32(12) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        match user.u16(8) {
            GET => Ok(self.per_process.into()),
            SET => {
                if !may_set {
                    return Err(Errno::EPERM);
                }
                if !self.objects.is_empty() {
                    return Err(Errno::EBUSY);
                }
                self.per_process = match user.u64(16) {
                    0 => false,
                    1 => true,
                    _ => return Err(Errno::EINVAL),
                };
                Ok(user.u64(16))
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn large_pages(&mut self, user: &UserStruct) -> Result<u64, Errno> {
        let ioas = self.ioas(user.u32(12))?;
        let value = user.u64(16);
        match user.u16(8) {
            GET => return Ok(ioas.large_pages.into()),
            SET if value == 0 && ioas.large_pages => {
                if !ioas.tables.is_empty() && !ioas.areas.is_empty() {
                    return Err(Errno::EINVAL);
                }
                ioas.check_alignment(super::memlock::PAGE)?;
                ioas.large_pages = false;
            }
            SET if value == 0 => {}
            SET if value == 1 => ioas.large_pages = true,
            SET => return Err(Errno::EINVAL),
            _ => return Err(Errno::EOPNOTSUPP),
        }
        Ok(value)
    }

    fn option(&mut self, user: &mut UserStruct, may_set: bool) -> Result<(), Errno> {
        if user.u16(10) != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        let value = match user.u32(4) {
            uapi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE => self.rlimit_mode(user, may_set)?,
            uapi::iommufd_option_IOMMU_OPTION_HUGE_PAGES => self.large_pages(user)?,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        user.set_u64(16, value);
        Ok(())
    }
}

const GET: u16 = uapi::iommufd_option_ops_IOMMU_OPTION_OP_GET as u16;
const SET: u16 = uapi::iommufd_option_ops_IOMMU_OPTION_OP_SET as u16;

impl Machine {
    pub(super) fn open_iommufd(&mut self, caller: &dyn Caller) -> Result<FileId, Errno> {
        if !self.topology.has_cdev() {
            return Err(Errno::ENOENT);
        }
        self.may_open(caller)?;
        let id = ContextId(self.next);
        self.contexts.insert(id, Context::new());
        Ok(self.new_file(File::Iommufd(id)))
    }

    pub(super) fn close_iommufd(&mut self, id: ContextId) {
        if let Some(context) = self.contexts.get_mut(&id) {
            context.open = false;
        }
        self.drop_unused_context(id);
    }

    /// The last reference has gone: with it all that is left, which no device is attached to.
    pub(super) fn drop_unused_context(&mut self, id: ContextId) {
        let bound = |object: &Object| matches!(object.kind, Kind::Device);
        let unused = |context: &Context| !context.open && !context.objects.values().any(bound);
        if self.contexts.get(&id).is_some_and(unused) {
            self.contexts.remove(&id);
        }
    }

    pub(super) fn iommufd_ioctl(
        &mut self,
        id: ContextId,
        number: u32,
        arg: &mut CallArg,
        caller: &dyn Caller,
    ) -> Result<Done, Errno> {
        let length = length(number, self.profile()).ok_or(Errno::ENOTTY)?;
        let user = arg.user()?;
        let size = user.argsz();
        if size < length {
            return Err(Errno::EINVAL);
        }
        if user.bytes.iter().take(size).skip(length).any(|&byte| byte != 0) {
            return Err(Errno::E2BIG);
        }
        let page = self.page();
        let option = number == request::IOMMU_OPTION.number;
        let may_set = option && self.has_right(caller, Capability::SysResource);
        let context = self.contexts.get_mut(&id).ok_or(Errno::EBADF)?;
        let accounts = &mut self.accounts;
        let result = match number {
            _ if number == request::IOMMU_DESTROY.number => context.destroy(accounts, user.u32(4)),
            _ if option => context.option(user, may_set),
            _ if number == request::IOAS_ALLOC.number => {
                if user.u32(4) != 0 {
                    return Err(Errno::EOPNOTSUPP);
                }
                user.set_u32(8, context.add(Kind::Ioas(Ioas::new(page))));
                Ok(())
            }
            _ if number == request::IOAS_IOVA_RANGES.number => context.iova_ranges(user),
            _ if number == request::IOAS_ALLOW_IOVAS.number => context.allow_iovas(user),
            _ if number == request::IOAS_MAP.number => context.map(accounts, user, caller),
            _ if number == request::IOAS_MAP_FILE.number => {
                context.map_file(accounts, user, caller)
            }
            _ if number == request::IOAS_COPY.number => context.copy(accounts, user),
            _ if number == request::IOAS_UNMAP.number => context.unmap(accounts, user),
            _ if number == request::IOAS_CHANGE_PROCESS.number => {
                context.change_process(accounts, user, caller)
            }
            _ => Err(Errno::ENOTTY),
        };
        result.map(|()| Done::default())
    }
}

/// How long a call's struct is; `None` for a call that the kernel does not have.
fn length(number: u32, profile: Profile) -> Option<usize> {
    let later = profile.maps_files();
    let length = match number {
        _ if number == request::IOMMU_DESTROY.number => size_of::<uapi::iommu_destroy>(),
        _ if number == request::IOMMU_OPTION.number => size_of::<uapi::iommu_option>(),
        _ if number == request::IOAS_ALLOC.number => size_of::<uapi::iommu_ioas_alloc>(),
        _ if number == request::IOAS_IOVA_RANGES.number => {
            size_of::<uapi::iommu_ioas_iova_ranges>()
        }
        _ if number == request::IOAS_ALLOW_IOVAS.number => {
            size_of::<uapi::iommu_ioas_allow_iovas>()
        }
        _ if number == request::IOAS_MAP.number => size_of::<uapi::iommu_ioas_map>(),
        _ if number == request::IOAS_COPY.number => size_of::<uapi::iommu_ioas_copy>(),
        _ if number == request::IOAS_UNMAP.number => size_of::<uapi::iommu_ioas_unmap>(),
        _ if later && number == request::IOAS_MAP_FILE.number => {
            size_of::<uapi::iommu_ioas_map_file>()
        }
        _ if later && number == request::IOAS_CHANGE_PROCESS.number => {
            size_of::<uapi::iommu_ioas_change_process>()
        }
        _ => return None,
    };
    Some(length)
}
