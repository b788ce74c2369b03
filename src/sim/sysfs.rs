//! The simulated `/sys`: what the broker reads of it, built from the machine's state.

use super::machine::{DeviceView, DriverFile, Machine};
use nix::errno::Errno;
use std::collections::{BTreeSet, HashMap};

/// An entry of the tree.
#[derive(Clone, Debug)]
enum Entry {
    Directory(BTreeSet<String>),
    File(Vec<u8>),
    Link(String),
}

/// A tree of files, by path without a leading slash.
#[derive(Debug, Default)]
pub(crate) struct Sysfs {
    entries: HashMap<String, Entry>,
    /// The numbers of what comes and goes.
    inodes: HashMap<String, u64>,
    /// What can be written.
    writable: HashMap<String, DriverFile>,
}

/// How many links a path may lead through, as in the kernel.
const MOST_LINKS: u32 = 40;

/// Real kernels take one that is free.
const CDEV_MAJOR: u32 = 510;

impl Sysfs {
    /// The tree of a machine as it is now.
    pub(crate) fn of(machine: &Machine) -> Self {
        let mut tree = Self::default();
        for directory in ["bus/pci/devices", "bus/pci/drivers", "class/vfio", "class/vfio-dev"] {
            tree.directory(directory);
        }
        tree.directory("kernel/iommu_groups");
        let topology = machine.topology();
        let flag = |on: bool| if on { "Y\n" } else { "N\n" };
        tree.file(
            "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
            flag(topology.allow_unsafe_interrupts),
        );
        tree.file(
            "module/vfio_iommu_type1/parameters/dma_entry_limit",
            &format!("{}\n", topology.dma_entry_limit),
        );
        tree.file("module/vfio/parameters/enable_unsafe_noiommu_mode", flag(topology.noiommu));
        for group in &topology.groups {
            let path = format!("kernel/iommu_groups/{}", group.id);
            tree.directory(&format!("{path}/devices"));
            if group.noiommu {
                tree.file(&format!("{path}/name"), "vfio-noiommu\n");
            }
            tree.file(&format!("{path}/type"), &format!("{}\n", group.kind));
            let mut reserved: Vec<_> = topology.reserved.iter().chain(&group.reserved).collect();
            reserved.sort_by_key(|region| region.start);
            let lines = reserved.iter().map(|region| {
                format!("0x{:016x} 0x{:016x} {}\n", region.start, region.end, region.kind)
            });
            tree.file(&format!("{path}/reserved_regions"), &lines.collect::<String>());
            if machine.has_node(group.id) {
                tree.vfio_class("vfio", &machine.node_name(group.id));
            }
        }
        tree.writable("bus/pci/drivers_probe", "", DriverFile::Probe);
        for driver in machine.drivers() {
            let path = format!("bus/pci/drivers/{driver}");
            tree.writable(&format!("{path}/bind"), "", DriverFile::Bind(driver.to_owned()));
            tree.writable(&format!("{path}/unbind"), "", DriverFile::Unbind(driver.to_owned()));
        }
        for device in machine.views() {
            tree.device(&device);
        }
        tree
    }

    fn device(&mut self, view: &DeviceView<'_>) {
        let device = view.facts;
        let bdf = device.bdf.to_string();
        let home = format!("devices/pci{:04x}:{:02x}", device.bdf.segment, device.bdf.bus);
        let path = format!("{home}/{bdf}");
        self.link(&format!("bus/pci/devices/{bdf}"), &format!("../../../{path}"));
        let mut file = |name: &str, text: String| self.file(&format!("{path}/{name}"), &text);
        let subsystem = (
            device.subsystem_vendor.unwrap_or(device.vendor),
            device.subsystem_device.unwrap_or(device.device),
        );
        file("vendor", format!("0x{:04x}\n", device.vendor));
        file("device", format!("0x{:04x}\n", device.device));
        file("subsystem_vendor", format!("0x{:04x}\n", subsystem.0));
        file("subsystem_device", format!("0x{:04x}\n", subsystem.1));
        file("class", format!("0x{:06x}\n", device.class));
        file("revision", format!("0x{:02x}\n", device.revision));
        file("numa_node", format!("{}\n", device.numa_node));
        let class = device.class.to_be_bytes();
        let modalias = format!(
            "pci:v{:08X}d{:08X}sv{:08X}sd{:08X}bc{:02X}sc{:02X}i{:02X}\n",
            device.vendor, device.device, subsystem.0, subsystem.1, class[1], class[2], class[3]
        );
        file("modalias", modalias);
        if let Some(boot) = device.boot_vga.or((class[1] == 3).then_some(false)) {
            file("boot_vga", format!("{}\n", u8::from(boot)));
        }
        if device.reset {
            file("reset", String::new());
            file("reset_method", "flr\n".into());
        }
        if device.total_vfs > 0 {
            file("sriov_totalvfs", format!("{}\n", device.total_vfs));
            file("sriov_numvfs", format!("{}\n", view.vfs.len()));
            file("sriov_drivers_autoprobe", "1\n".into());
        }
        let only = format!("{}\n", view.driver_override.unwrap_or("(null)"));
        let of = DriverFile::Override(device.bdf);
        self.writable(&format!("{path}/driver_override"), &only, of);
        self.insert(&format!("{path}/config"), Entry::File(view.config.to_vec()));
        for (nth, vf) in view.vfs.iter().enumerate() {
            let target = format!("../../devices/pci{:04x}:{:02x}/{vf}", vf.segment, vf.bus);
            self.link(&format!("{path}/virtfn{nth}"), &format!("../{target}"));
        }
        if let Some(pf) = device.physfn {
            let target = format!("../../../devices/pci{:04x}:{:02x}/{pf}", pf.segment, pf.bus);
            self.link(&format!("{path}/physfn"), &target);
        }
        let group = format!("kernel/iommu_groups/{}", view.group);
        self.link(&format!("{path}/iommu_group"), &format!("../../../{group}"));
        self.link(&format!("{group}/devices/{bdf}"), &format!("../../../../{path}"));
        self.link(&format!("{path}/subsystem"), "../../../bus/pci");
        if let Some(driver) = view.driver {
            let home = format!("bus/pci/drivers/{driver}");
            self.link(&format!("{path}/driver"), &format!("../../../{home}"));
            self.link(&format!("{home}/{bdf}"), &format!("../../../../{path}"));
        }
        if let Some(number) = view.number {
            let name = format!("vfio{number}");
            let home = format!("{path}/vfio-dev/{name}");
            self.directory(&home);
            self.inodes.insert(home.clone(), view.registration);
            if view.has_cdev {
                self.file(&format!("{home}/dev"), &format!("{CDEV_MAJOR}:{number}\n"));
            }
            self.link(&format!("class/vfio-dev/{name}"), &format!("../../{home}"));
        }
    }

    fn vfio_class(&mut self, class: &str, name: &str) {
        let path = format!("devices/virtual/{class}/{name}");
        self.directory(&path);
        self.link(&format!("class/{class}/{name}"), &format!("../../{path}"));
    }

    fn directory(&mut self, path: &str) {
        if !self.entries.contains_key(path) {
            self.insert(path, Entry::Directory(BTreeSet::new()));
        }
    }

    fn file(&mut self, path: &str, text: &str) {
        self.insert(path, Entry::File(text.as_bytes().to_vec()));
    }

    fn writable(&mut self, path: &str, text: &str, file: DriverFile) {
        self.file(path, text);
        self.writable.insert(path.to_owned(), file);
    }

    fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Entry::Link(target.to_owned()));
    }

    fn insert(&mut self, path: &str, entry: Entry) {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.entries.insert(path.to_owned(), entry);
        if path.is_empty() {
            return;
        }
        self.directory(parent);
        if let Some(Entry::Directory(names)) = self.entries.get_mut(parent) {
            names.insert(name.to_owned());
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, EISDIR, ELOOP; EACCES it can only be written.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        let (entry, path) = self.find(path, true)?;
        match (entry, self.writable.get(&path)) {
            (Entry::File(bytes), None | Some(DriverFile::Override(_))) => Ok(bytes.clone()),
            (Entry::File(_), Some(_)) => Err(Errno::EACCES),
            _ => Err(Errno::EISDIR),
        }
    }

    /// Which file a write goes to.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, EISDIR, ELOOP; EACCES it can't be written: sysfs says so to root too.
    pub(crate) fn writes_to(&self, path: &str) -> Result<DriverFile, Errno> {
        let (entry, path) = self.find(path, true)?;
        match entry {
            Entry::File(_) => self.writable.get(&path).cloned().ok_or(Errno::EACCES),
            _ => Err(Errno::EISDIR),
        }
    }

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ELOOP.
    pub(crate) fn list(&self, path: &str) -> Result<Vec<String>, Errno> {
        match self.find(path, true)?.0 {
            Entry::Directory(names) => Ok(names.iter().cloned().collect()),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// The number of an entry. What is there from the beginning has one number for all of it.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, ELOOP.
    pub(crate) fn inode(&self, path: &str) -> Result<u64, Errno> {
        let (_, path) = self.find(path, true)?;
        Ok(self.inodes.get(&path).copied().unwrap_or_default())
    }

    /// Where a link points to.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, EINVAL not a link, ELOOP.
    pub(crate) fn target(&self, path: &str) -> Result<String, Errno> {
        match self.find(path, false)?.0 {
            Entry::Link(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Walks a path as the kernel does; a link at its end is followed where `follow` says so. The
    /// entry, and its path without links.
    fn find<'a>(&'a self, path: &'a str, follow: bool) -> Result<(&'a Entry, String), Errno> {
        let mut todo: Vec<&str> = path.split('/').rev().collect();
        let mut here = String::new();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            let parent = here.len();
            match name {
                "" | "." => continue,
                ".." => {
                    here.truncate(here.rfind('/').unwrap_or(0));
                    continue;
                }
                _ if here.is_empty() => here.push_str(name),
                _ => here.extend(["/", name]),
            }
            match self.entries.get(&here).ok_or(Errno::ENOENT)? {
                Entry::Link(target) if follow || !todo.is_empty() => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(Errno::ELOOP);
                    }
                    here.truncate(parent);
                    todo.extend(target.split('/').rev());
                }
                Entry::File(_) if !todo.is_empty() => return Err(Errno::ENOTDIR),
                _ => {}
            }
        }
        self.entries.get(&here).map(|entry| (entry, here)).ok_or(Errno::ENOENT)
    }
}
