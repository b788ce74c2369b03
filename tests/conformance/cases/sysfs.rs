//! What is read of sysfs.

use crate::script::{Script, device};
use nix::errno::Errno;

super::cases![
    ids_of_devices,
    drivers_of_devices,
    devices_on_vfio,
    groups_of_devices,
    a_group_lists_its_devices,
    reserved_regions,
    virtual_functions,
    parameters,
    files_that_are_none,
];

fn text(t: &Script, path: &str) -> Result<String, Errno> {
    t.kernel().sysfs_read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The last part of a link's target.
fn name(t: &Script, path: &str) -> Result<String, Errno> {
    let link = t.kernel().sysfs_link(path)?;
    Ok(link.rsplit('/').next().unwrap_or_default().to_owned())
}

const ALL: [&str; 8] = [
    device::E1000E,
    device::EDU0,
    device::NVME,
    device::PAIR0,
    device::PAIR1,
    device::MIXED_EDU,
    "0000:02:00.0",
    device::VF0,
];

fn ids_of_devices(t: &Script) {
    for bdf in ALL {
        for file in ["vendor", "device", "subsystem_vendor", "class", "revision", "modalias"] {
            t.note(&format!("{bdf}/{file}"), text(t, &format!("bus/pci/devices/{bdf}/{file}")));
        }
    }
}

fn drivers_of_devices(t: &Script) {
    for bdf in ALL {
        t.note(bdf, name(t, &format!("bus/pci/devices/{bdf}/driver")));
    }
}

fn devices_on_vfio(t: &Script) {
    for bdf in ALL {
        let path = format!("bus/pci/devices/{bdf}/vfio-dev");
        t.note(bdf, t.kernel().sysfs_list(&path).map(|names| names.len()));
    }
}

fn groups_of_devices(t: &Script) {
    let group = |bdf: &str| name(t, &format!("bus/pci/devices/{bdf}/iommu_group"));
    t.note("the pair is together", group(device::PAIR0) == group(device::PAIR1));
    t.note("the others are not", group(device::EDU0) == group(device::EDU1));
}

fn a_group_lists_its_devices(t: &Script) {
    for bdf in [device::EDU0, device::PAIR0, device::MIXED_EDU] {
        let path = format!("bus/pci/devices/{bdf}/iommu_group");
        t.note(bdf, t.kernel().sysfs_list(&format!("{path}/devices")));
        t.note("type", text(t, &format!("{path}/type")));
    }
}

fn reserved_regions(t: &Script) {
    for bdf in [device::EDU0, "0000:00:1f.0"] {
        let path = format!("bus/pci/devices/{bdf}/iommu_group/reserved_regions");
        t.note(bdf, text(t, &path));
    }
}

fn virtual_functions(t: &Script) {
    let pf = "bus/pci/devices/0000:02:00.0";
    t.note("how many", text(t, &format!("{pf}/sriov_numvfs")));
    t.note("the first", name(t, &format!("{pf}/virtfn0")));
    t.note("the second", name(t, &format!("{pf}/virtfn1")));
    t.note("the third", name(t, &format!("{pf}/virtfn2")));
    t.note("its PF", name(t, &format!("bus/pci/devices/{}/physfn", device::VF0)));
}

fn parameters(t: &Script) {
    for file in ["allow_unsafe_interrupts", "dma_entry_limit"] {
        t.note(file, text(t, &format!("module/vfio_iommu_type1/parameters/{file}")));
    }
}

fn files_that_are_none(t: &Script) {
    let device = format!("bus/pci/devices/{}", device::EDU0);
    t.note("no device", text(t, "bus/pci/devices/0000:99:00.0/vendor"));
    t.note("no file", text(t, &format!("{device}/nonsense")));
    t.note("a directory", text(t, "bus/pci/devices"));
    t.note("a list of a file", t.kernel().sysfs_list(&format!("{device}/vendor")));
    t.note("a list of nothing", t.kernel().sysfs_list("bus/pci/nonsense"));
    t.note("a link of a file", t.kernel().sysfs_link(&format!("{device}/vendor")));
    t.note("a link of nothing", t.kernel().sysfs_link(&format!("{device}/nonsense")));
    t.note("below a file", text(t, &format!("{device}/vendor/more")));
}
