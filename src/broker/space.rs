//! An address space: a container and the groups in it. Its lock is held while groups enter and
//! leave, so that making it, attaching and giving it up never cross; mapping goes on beside that.

use super::{error, lifeline};
use crate::kernel::{Container, Extension, Group, IommuInfo, IommuType, Kernel};
use crate::protocol::Error;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// A place for a container: empty until the first group comes, and again after the last has left.
#[derive(Debug, Default)]
pub(super) struct Space(Mutex<Option<Open>>);

/// An open container.
#[derive(Debug)]
pub(super) struct Open {
    container: Arc<Container>,
    /// Holders have it open too.
    shared: bool,
    iommu: Option<IommuType>,
    attached: BTreeSet<u32>,
    /// What the IOMMU can map; groups that enter or leave change it.
    info: Option<Arc<IommuInfo>>,
}

impl Space {
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container, if there is one.
    pub(super) fn container(&self) -> Option<Arc<Container>> {
        self.lock().as_ref().map(|open| Arc::clone(&open.container))
    }

    /// The container, if holders have it too and nobody works on it.
    pub(super) fn shared_now(&self) -> Option<Arc<Container>> {
        let guard = match self.0.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        guard.as_ref().filter(|open| open.shared).map(|open| Arc::clone(&open.container))
    }

    /// Whether nobody works on it just now.
    pub(super) fn is_free(&self) -> bool {
        !matches!(self.0.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// Closes the copy that is here.
    pub(super) fn leave(&self) {
        *self.lock() = None;
    }

    /// A holder is about to have it too: calls on it are made through this kernel from now on.
    pub(super) fn share(&self, contested: &Arc<dyn Kernel>) -> Result<(), Error> {
        if let Some(open) = self.lock().as_mut().filter(|open| !open.shared) {
            let copy = lifeline::copy(&*open.container)?;
            open.container = Arc::new(Container::from_fd(Arc::clone(contested), copy));
            open.shared = true;
        }
        Ok(())
    }

    /// The IOMMU type in use.
    pub(super) fn iommu(&self) -> Option<IommuType> {
        self.lock().as_ref().and_then(|open| open.iommu)
    }

    /// What the IOMMU can map, asked once.
    pub(super) fn info(&self) -> Result<Option<Arc<IommuInfo>>, Error> {
        let mut guard = self.lock();
        let Some(open) = guard.as_mut() else { return Ok(None) };
        if open.info.is_none() {
            open.info = Some(Arc::new(open.container.info()?));
        }
        Ok(open.info.clone())
    }
}

/// Opens a container where there is none.
pub(super) fn open(space: &mut Option<Open>, kernel: &Arc<dyn Kernel>) -> Result<(), Error> {
    if space.is_none() {
        let container = Arc::new(Container::open(Arc::clone(kernel))?);
        *space = Some(Open {
            container,
            shared: false,
            iommu: None,
            attached: BTreeSet::new(),
            info: None,
        });
    }
    Ok(())
}

/// Whether holders have the container open too.
pub(super) fn is_shared(space: Option<&Option<Open>>) -> bool {
    space.and_then(Option::as_ref).is_some_and(|open| open.shared)
}

/// Attaches a group; the first one decides the IOMMU type. What of this fails is undone by
/// [`leave`].
pub(super) fn enter(
    space: &mut Option<Open>,
    number: u32,
    group: &Group,
    noiommu: bool,
) -> Result<(), Error> {
    let Some(open) = space else {
        return Err(error::system("VFIO_GROUP_SET_CONTAINER", "container", nix::Error::EBADF));
    };
    group.set_container(&open.container)?;
    open.attached.insert(number);
    open.info = None;
    if open.iommu.is_none() {
        let kind = choose(&open.container, noiommu)?;
        open.container.set_iommu(kind)?;
        open.iommu = Some(kind);
    }
    Ok(())
}

/// A group has left, or is about to with the last copy of its open file; the last one takes the
/// container with it.
pub(super) fn leave(space: &mut Option<Open>, number: u32) {
    if let Some(open) = space {
        open.attached.remove(&number);
        open.info = None;
    }
    close_if_empty(space);
}

/// A container without groups is of no use to anybody.
pub(super) fn close_if_empty(space: &mut Option<Open>) {
    if space.as_ref().is_some_and(|open| open.attached.is_empty()) {
        *space = None;
    }
}

/// Version 2 where it is there: it never unmaps more than it was asked to.
fn choose(container: &Container, noiommu: bool) -> Result<IommuType, Error> {
    let kinds: &[IommuType] = match noiommu {
        true => &[IommuType::NoIommu],
        false => &[IommuType::Type1v2, IommuType::Type1],
    };
    for kind in kinds {
        if container.check_extension(Extension::Iommu(*kind))? {
            return Ok(*kind);
        }
    }
    Err(Error::Unsupported {
        what: if noiommu { "no-IOMMU" } else { "type1" }.into(),
        why: "the kernel has no such IOMMU driver for VFIO: modprobe vfio_iommu_type1 (for \
              no-IOMMU, vfio.enable_unsafe_noiommu_mode=1)"
            .into(),
    })
}
