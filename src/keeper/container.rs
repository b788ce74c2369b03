//! The address space: a container and the groups in it.

use crate::kernel::{self, Extension, Group, IommuInfo, IommuType, Kernel};
use crate::process::keeper::Failure;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// An open container.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) file: kernel::Container,
    iommu: Option<IommuType>,
    attached: BTreeSet<u32>,
    /// What the IOMMU can map; groups that enter or leave change it.
    info: Option<IommuInfo>,
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Container {
    pub(super) fn open(kernel: &Arc<dyn Kernel>) -> kernel::Result<Self> {
        let file = kernel::Container::open(Arc::clone(kernel))?;
        Ok(Self { file, iommu: None, attached: BTreeSet::new(), info: None })
    }

    /// Attaches a group; the first one decides the IOMMU type. What of this fails is undone by
    /// [`leave`](Self::leave).
    pub(super) fn enter(&mut self, id: u32, group: &Group, noiommu: bool) -> Result<(), Failure> {
        group.set_container(&self.file)?;
        self.attached.insert(id);
        self.info = None;
        if self.iommu.is_none() {
            let kind = self.choose(noiommu)?;
            self.file.set_iommu(kind)?;
            self.iommu = Some(kind);
        }
        Ok(())
    }

    /// A group has left, or is about to with the last copy of its file.
    pub(super) fn leave(&mut self, id: u32) {
        self.attached.remove(&id);
        self.info = None;
    }

    /// A container without groups is of no use to anybody.
    pub(super) fn is_empty(&self) -> bool {
        self.attached.is_empty()
    }

    /// The IOMMU type, as the broker's clients are told it.
    pub(super) fn iommu(&self) -> &'static str {
        match self.iommu {
            Some(IommuType::Type1) => "type1",
            Some(IommuType::Type1v2) => "type1v2",
            Some(IommuType::NoIommu) => "noiommu",
            Some(IommuType::Other(_)) => "other",
            None => "none",
        }
    }

    /// What the IOMMU can map, asked once.
    pub(super) fn info(&mut self) -> kernel::Result<&IommuInfo> {
        if self.info.is_none() {
            self.info = Some(self.file.info()?);
        }
        Ok(self.info.get_or_insert_default())
    }

    /// Version 2 where it is there: it never unmaps more than it was asked to.
    fn choose(&self, noiommu: bool) -> Result<IommuType, Failure> {
        let kinds: &[IommuType] = match noiommu {
            true => &[IommuType::NoIommu],
            false => &[IommuType::Type1v2, IommuType::Type1],
        };
        for kind in kinds {
            if self.file.check_extension(Extension::Iommu(*kind))? {
                return Ok(*kind);
            }
        }
        Err(Failure::NoIommuDriver { noiommu })
    }
}
