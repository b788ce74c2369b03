//! What sysfs and fault rules want to know of a machine.

use super::{File, FileId, Machine};
use crate::bdf::Bdf;
use crate::kernel::request;
use crate::sim::topology::Device;

/// A device as sysfs shows it.
#[derive(Debug)]
pub(crate) struct DeviceView<'a> {
    pub(crate) facts: &'a Device,
    pub(crate) group: u32,
    pub(crate) driver: Option<&'a str>,
    pub(crate) driver_override: Option<&'a str>,
    /// The N of its `vfioN`, while it is on a VFIO driver.
    pub(crate) number: Option<u32>,
    /// Which of its registrations with VFIO that is; of one device no two are the same.
    pub(crate) registration: u64,
    /// Whether that can be opened.
    pub(crate) has_cdev: bool,
    pub(crate) vfs: Vec<Bdf>,
    pub(crate) config: &'a [u8],
}

impl Machine {
    /// All devices, in the order of the topology.
    pub(crate) fn views(&self) -> impl Iterator<Item = DeviceView<'_>> {
        let mut vfs: std::collections::BTreeMap<Bdf, Vec<Bdf>> = std::collections::BTreeMap::new();
        for device in &self.devices {
            if let Some(pf) = device.facts.physfn {
                vfs.entry(pf).or_default().push(device.facts.bdf);
            }
        }
        self.devices.iter().enumerate().map(move |(index, device)| DeviceView {
            facts: &device.facts,
            group: device.group,
            // The link goes before the driver does.
            driver: device.driver.as_deref().filter(|_| !device.leaving),
            driver_override: device.driver_override.as_deref(),
            number: device.number.filter(|_| device.is_registered(self.profile())),
            registration: device.registration,
            has_cdev: self.cdev_number(index).is_some(),
            vfs: vfs.get(&device.facts.bdf).cloned().unwrap_or_default(),
            config: device.config.bytes(),
        })
    }

    /// A group's name under `/dev/vfio`.
    pub(crate) fn node_name(&self, group: u32) -> String {
        let node = self.node(group).to_string();
        node.rsplit('/').next().unwrap_or_default().to_owned()
    }

    /// A request's name in the header; containers and devices share numbers.
    pub(crate) fn call_name(&self, file: FileId, number: u32) -> &'static str {
        use request::*;
        const CONTAINER: [Request; 7] = [
            GET_API_VERSION,
            CHECK_EXTENSION,
            SET_IOMMU,
            IOMMU_GET_INFO,
            IOMMU_MAP_DMA,
            IOMMU_UNMAP_DMA,
            IOMMU_DIRTY_PAGES,
        ];
        const GROUP: [Request; 4] =
            [GROUP_GET_STATUS, GROUP_SET_CONTAINER, GROUP_UNSET_CONTAINER, GROUP_GET_DEVICE_FD];
        const IOMMUFD: [Request; 10] = [
            IOMMU_DESTROY,
            IOMMU_OPTION,
            IOAS_ALLOC,
            IOAS_ALLOW_IOVAS,
            IOAS_COPY,
            IOAS_IOVA_RANGES,
            IOAS_MAP,
            IOAS_MAP_FILE,
            IOAS_UNMAP,
            IOAS_CHANGE_PROCESS,
        ];
        const DEVICE: [Request; 10] = [
            DEVICE_BIND_IOMMUFD,
            DEVICE_ATTACH_IOMMUFD_PT,
            DEVICE_DETACH_IOMMUFD_PT,
            DEVICE_GET_INFO,
            DEVICE_GET_REGION_INFO,
            DEVICE_GET_IRQ_INFO,
            DEVICE_SET_IRQS,
            DEVICE_RESET,
            DEVICE_GET_PCI_HOT_RESET_INFO,
            DEVICE_PCI_HOT_RESET,
        ];
        let known: &[Request] = match self.files.get(&file) {
            Some(File::Container(_)) => &CONTAINER,
            Some(File::Group(..)) => &GROUP,
            Some(File::Device(_) | File::Cdev(_)) => &DEVICE,
            Some(File::Iommufd(_)) => &IOMMUFD,
            None => &[],
        };
        known.iter().find(|request| request.number == number).map_or("", |request| request.name)
    }
}
