//! A simulated machine as its topology file describes it: kernel, IOMMU, groups and devices.
//!
//! The file is TOML; `docs/sim.md` is its reference. Reading it checks it: a [`Topology`] that
//! exists has no two devices at one address, no two groups with one number and no VF without its
//! PF.

use super::profile::Profile;
use crate::bdf::Bdf;
use crate::protocol::is_uuid;
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, BTreeSet};

/// A simulated machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Which kernel is simulated.
    pub kernel: Profile,
    /// Whether the kernel has iommufd and devices' own nodes; as the lab's of this version where it
    /// is left out.
    pub cdev: Option<bool>,
    /// The type1 versions that exist: 1 and 2 unless said otherwise.
    #[serde(default = "both_versions")]
    pub type1: Vec<u32>,
    /// Page sizes of the IOMMU in bytes, powers of two.
    #[serde(default = "page_sizes")]
    pub page_sizes: Vec<u64>,
    /// First and last address that the IOMMU can translate.
    #[serde(default = "aperture")]
    pub aperture: (u64, u64),
    /// How many mappings a container can have (a parameter of vfio_iommu_type1).
    #[serde(default = "dma_entry_limit")]
    pub dma_entry_limit: u32,
    /// How much memory a caller may pin.
    #[serde(default)]
    pub memlock: Memlock,
    /// Whether the IOMMU isolates interrupts.
    #[serde(default = "yes")]
    pub interrupt_remapping: bool,
    /// A parameter of vfio_iommu_type1: go on without interrupt remapping.
    #[serde(default)]
    pub allow_unsafe_interrupts: bool,
    /// A parameter of vfio: groups without an IOMMU can be used.
    #[serde(default)]
    pub noiommu: bool,
    /// Whether the simulation's own user has CAP_SYS_RAWIO and CAP_SYS_RESOURCE in it, whatever its
    /// processes have.
    #[serde(default)]
    pub owner_rights: bool,
    /// Whether the IOMMU can enforce cache coherence (`VFIO_DMA_CC_IOMMU`).
    #[serde(default = "yes")]
    pub dma_coherent: bool,
    /// Reserved regions of every group.
    #[serde(default = "msi_window")]
    pub reserved: Vec<Reserved>,
    /// The IOMMU groups, after [`Group::repeat`] has been carried out.
    #[serde(default, rename = "group")]
    pub groups: Vec<Group>,
}

/// The limit of pinned memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memlock {
    /// The caller's own RLIMIT_MEMLOCK, unless it has CAP_IPC_LOCK.
    #[default]
    Rlimit,
    /// None at all.
    Unlimited,
    /// So many bytes for every process, whatever its capabilities.
    Bytes(u64),
}

impl<'de> Deserialize<'de> for Memlock {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "\"rlimit\", \"unlimited\" or a number of bytes")]
        enum File {
            Name(Name),
            Bytes(u64),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Name {
            Rlimit,
            Unlimited,
        }
        Ok(match File::deserialize(deserializer)? {
            File::Name(Name::Rlimit) => Memlock::Rlimit,
            File::Name(Name::Unlimited) => Memlock::Unlimited,
            File::Bytes(bytes) => Memlock::Bytes(bytes),
        })
    }
}

/// An address range that devices can't be given, both ends included.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reserved {
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
    /// As sysfs names it: `msi`, `reserved`, `direct` or `direct-relaxable`.
    #[serde(default = "reserved_kind")]
    pub kind: String,
}

/// An IOMMU group.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// Whether it has no IOMMU behind it; the machine's `noiommu` must be on.
    #[serde(default)]
    pub noiommu: bool,
    /// The type in sysfs.
    #[serde(default = "group_type", rename = "type")]
    pub kind: String,
    /// Reserved regions beside the machine's.
    #[serde(default)]
    pub reserved: Vec<Reserved>,
    /// So many groups like this one: each has the next number, and its devices are [`Group::step`]
    /// further on.
    #[serde(default = "one")]
    pub repeat: u32,
    /// How far apart repeated devices are: `function`, `device` or `bus`.
    #[serde(default)]
    pub step: Step,
    /// Its devices.
    #[serde(default, rename = "device")]
    pub devices: Vec<Device>,
}

/// How far apart the devices of repeated groups are.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// One routing id, as VFs are.
    #[default]
    Function,
    /// One device: 8 routing ids.
    Device,
    /// One bus: 256 routing ids.
    Bus,
}

/// A PCI function.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its address.
    pub bdf: Bdf,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id; the vendor's where it is left out.
    pub subsystem_vendor: Option<u16>,
    /// Subsystem id; the device's where it is left out.
    pub subsystem_device: Option<u16>,
    /// Class, subclass and programming interface, 24 bits.
    #[serde(default = "class")]
    pub class: u32,
    /// Revision id.
    #[serde(default)]
    pub revision: u8,
    /// The driver it is bound to at the start.
    pub driver: Option<String>,
    /// Whether that is a VFIO driver; where it is left out, whether the name begins with `vfio`.
    pub vfio: Option<bool>,
    /// A bridge: no VFIO driver takes it, and its driver does not claim DMA.
    #[serde(default)]
    pub bridge: bool,
    /// Whether it is PCI Express: 4096 bytes of configuration space and the ERR interrupt.
    #[serde(default = "yes")]
    pub pcie: bool,
    /// Its BARs.
    #[serde(default = "bars")]
    pub bars: Vec<Bar>,
    /// Size of its expansion ROM in bytes, 0 without one.
    #[serde(default)]
    pub rom: u64,
    /// Whether it has the legacy VGA ranges (region 8).
    #[serde(default)]
    pub vga: bool,
    /// Whether it has an INTx pin.
    #[serde(default = "yes")]
    pub intx: bool,
    /// MSI vectors: a power of two up to 32, 0 without MSI.
    #[serde(default = "one")]
    pub msi: u32,
    /// MSI-X, where it has that.
    pub msix: Option<Msix>,
    /// Device-specific regions, from index 9 on.
    #[serde(default)]
    pub regions: Vec<ExtraRegion>,
    /// Bytes of configuration space that differ from what is built from the rest.
    #[serde(default)]
    pub config: Vec<ConfigBytes>,
    /// Whether it can be reset alone.
    #[serde(default = "yes")]
    pub reset: bool,
    /// What a slot or bus reset hits; where it is left out, everything on its bus, and nothing on
    /// bus 0, which can't be reset.
    pub hot_reset: Option<Vec<Bdf>>,
    /// The PF that it is a VF of.
    pub physfn: Option<Bdf>,
    /// How many VFs it can have.
    #[serde(default)]
    pub total_vfs: u32,
    /// The VF token that is set at the start, a UUID.
    pub vf_token: Option<String>,
    /// NUMA node, -1 for none.
    #[serde(default = "no_node")]
    pub numa_node: i32,
    /// Whether it is the boot display; only displays have the file.
    pub boot_vga: Option<bool>,
}

/// A base address register.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bar {
    /// 0 to 5.
    pub index: u8,
    /// Length in bytes, a power of two.
    pub size: u64,
    /// Whether it is I/O ports.
    #[serde(default)]
    pub io: bool,
    /// Whether it takes two registers.
    #[serde(default)]
    pub wide: bool,
    /// Whether it is prefetchable.
    #[serde(default)]
    pub prefetch: bool,
    /// Whether VFIO lets it be mapped; where it is left out, memory of at least a page.
    pub mmap: Option<bool>,
}

impl Bar {
    /// Whether VFIO lets it be mapped.
    pub fn can_mmap(&self) -> bool {
        self.mmap.unwrap_or(!self.io && self.size >= 4096)
    }
}

/// The MSI-X capability.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msix {
    /// Vectors, 1 to 2048.
    pub count: u32,
    /// The BAR with the table.
    #[serde(default)]
    pub bar: u8,
    /// Where in that BAR the table starts, in bytes.
    #[serde(default)]
    pub offset: u64,
}

/// A device-specific region.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtraRegion {
    /// Length in bytes.
    pub size: u64,
    /// `VFIO_REGION_INFO_FLAG_*`; read and write where it is left out.
    #[serde(default = "read_write")]
    pub flags: u32,
    /// The type of its type capability.
    #[serde(rename = "type")]
    pub kind: u32,
    /// The subtype of its type capability.
    pub subtype: u32,
    /// What can be mapped of it: offsets and sizes in bytes; no such capability where it is empty.
    #[serde(default)]
    pub sparse: Vec<(u64, u64)>,
}

/// Bytes of configuration space.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigBytes {
    /// Where they start.
    pub at: u16,
    /// The bytes, in hexadecimal digits; spaces are left out.
    pub hex: String,
}

impl ConfigBytes {
    /// The bytes, `None` where they are not pairs of hexadecimal digits.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let digits: Vec<u8> = self.hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let pair = |pair: &[u8]| {
            let text = std::str::from_utf8(pair).ok().filter(|text| text.len() == 2)?;
            u8::from_str_radix(text, 16).ok()
        };
        digits.chunks(2).map(pair).collect()
    }
}

/// Why a topology file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// It is not TOML, or not of this form; the message shows line, column and the text.
    #[error("{0}")]
    Form(String),
    /// It contradicts itself.
    #[error("{0}")]
    Sense(String),
}

impl Device {
    /// Whether a driver of this name takes part in VFIO.
    pub fn on_vfio(&self, driver: Option<&str>) -> bool {
        let Some(name) = driver else { return false };
        let by_name = name.starts_with("vfio") || name.contains("-vfio");
        match self.vfio {
            Some(vfio) if self.driver.as_deref() == Some(name) => vfio,
            _ => by_name,
        }
    }
}

impl Topology {
    /// Reads and checks a topology file.
    ///
    /// # Errors
    /// [`TopologyError`], with the line where TOML knows it.
    pub fn from_toml(text: &str) -> Result<Self, TopologyError> {
        let mut topology: Topology =
            toml::from_str(text).map_err(|error| TopologyError::Form(error.to_string()))?;
        topology.groups =
            topology.groups.iter().map(repeated).collect::<Result<Vec<_>, _>>()?.concat();
        topology.check()?;
        Ok(topology)
    }

    /// The same machine with another kernel.
    #[must_use]
    pub fn with_kernel(mut self, kernel: Profile) -> Self {
        self.kernel = kernel;
        self
    }

    /// Whether there are iommufds and cdevs.
    pub fn has_cdev(&self) -> bool {
        self.cdev.unwrap_or(self.kernel.has_cdev())
    }

    /// All devices with the number of their group.
    pub fn devices(&self) -> impl Iterator<Item = (u32, &Device)> {
        self.groups.iter().flat_map(|group| group.devices.iter().map(|device| (group.id, device)))
    }

    fn check(&self) -> Result<(), TopologyError> {
        let wrong = |text: String| Err(TopologyError::Sense(text));
        let mut groups = BTreeSet::new();
        let mut devices = BTreeMap::new();
        for group in &self.groups {
            if !groups.insert(group.id) {
                return wrong(format!("group {} is there twice", group.id));
            }
            if group.noiommu && !self.noiommu {
                return wrong(format!("group {} wants noiommu, which is off", group.id));
            }
            for device in &group.devices {
                if devices.insert(device.bdf, device).is_some() {
                    return wrong(format!("{} is there twice", device.bdf));
                }
            }
        }
        if !self.page_sizes.iter().all(|size| size.is_power_of_two()) || self.page_sizes.is_empty()
        {
            return wrong("page_sizes are powers of two, at least one".into());
        }
        if self.aperture.0 >= self.aperture.1 {
            return wrong("aperture is a first and a last address".into());
        }
        for device in devices.values() {
            let bdf = device.bdf;
            let pf = device.physfn.map(|pf| devices.get(&pf));
            if pf.is_some_and(|pf| pf.is_none_or(|pf| pf.physfn.is_some())) {
                return wrong(format!("{bdf}: physfn is no PF of this file"));
            }
            if device.bars.iter().any(|bar| bar.index > 5 || !bar.size.is_power_of_two()) {
                return wrong(format!("{bdf}: BARs are 0 to 5 and powers of two in size"));
            }
            if device.msi > 32 || (device.msi != 0 && !device.msi.is_power_of_two()) {
                return wrong(format!("{bdf}: msi is a power of two up to 32, or 0"));
            }
            if device.msix.is_some_and(|msix| msix.count == 0 || msix.count > 2048) {
                return wrong(format!("{bdf}: msix has 1 to 2048 vectors"));
            }
            if device.config.iter().any(|config| config.bytes().is_none()) {
                return wrong(format!("{bdf}: config is given in pairs of hexadecimal digits"));
            }
            let token = device.vf_token.as_deref();
            if token.is_some_and(|token| !is_uuid(token)) {
                return wrong(format!("{bdf}: vf_token is a UUID"));
            }
            if device.bridge && device.on_vfio(device.driver.as_deref()) {
                return wrong(format!("{bdf}: no VFIO driver takes a bridge"));
            }
        }
        Ok(())
    }
}

fn repeated(group: &Group) -> Result<Vec<Group>, TopologyError> {
    let step = match group.step {
        Step::Function => 1,
        Step::Device => 8,
        Step::Bus => 256,
    };
    let nth = |n: u32| {
        let mut next = group.clone();
        next.id = group.id.checked_add(n)?;
        for device in &mut next.devices {
            device.bdf = device.bdf.plus(n.checked_mul(step)?)?;
        }
        Some(next)
    };
    (0..group.repeat).map(nth).collect::<Option<Vec<_>>>().ok_or_else(|| {
        let text = format!("group {}: repeating it {} times is too far", group.id, group.repeat);
        TopologyError::Sense(text)
    })
}

fn both_versions() -> Vec<u32> {
    vec![1, 2]
}

fn page_sizes() -> Vec<u64> {
    vec![4 << 10, 2 << 20, 1 << 30]
}

fn aperture() -> (u64, u64) {
    (0, (1 << 48) - 1)
}

fn dma_entry_limit() -> u32 {
    65_535
}

fn yes() -> bool {
    true
}

fn one() -> u32 {
    1
}

fn no_node() -> i32 {
    -1
}

fn class() -> u32 {
    0x02_00_00
}

fn read_write() -> u32 {
    3
}

fn reserved_kind() -> String {
    "reserved".into()
}

fn group_type() -> String {
    "DMA-FQ".into()
}

fn msi_window() -> Vec<Reserved> {
    vec![Reserved { start: 0xfee0_0000, end: 0xfeef_ffff, kind: "msi".into() }]
}

fn bars() -> Vec<Bar> {
    vec![Bar { index: 0, size: 16 << 10, io: false, wide: false, prefetch: false, mmap: None }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_group_counts_numbers_and_addresses_up() {
        let text = r#"
            kernel = "6.12"
            [[group]]
            id = 100
            repeat = 64
            [[group.device]]
            bdf = "0000:65:10.0"
            vendor = 0x8086
            device = 0x154c
        "#;
        let topology = Topology::from_toml(text).unwrap();
        let last = topology.devices().last().unwrap();
        assert_eq!((last.0, last.1.bdf.to_string()), (163, "0000:65:17.7".into()));
    }

    #[test]
    fn mistakes_are_named() {
        let form = Topology::from_toml("kernel = \"6.12\"\nspeed = 3\n").unwrap_err();
        assert!(form.to_string().contains("line 2"), "{form}");
        assert!(Topology::from_toml("kernel = \"5.4\"").is_err());
        let twice = "kernel = \"6.12\"\n[[group]]\nid = 1\n[[group]]\nid = 1\n";
        let twice = Topology::from_toml(twice).unwrap_err();
        assert_eq!(twice.to_string(), "group 1 is there twice");
    }
}
