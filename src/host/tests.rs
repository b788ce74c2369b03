//! What is read from a simulated sysfs.

use super::*;
use crate::kernel::Node;
use crate::sim::{Sim, Topology};

const MACHINE: &str = r#"
kernel = "6.12"
noiommu = true
[[group]]
id = 1
device = [
    { bdf = "0000:00:01.0", vendor = 0x8086, device = 0xa70d, class = 0x060400, driver = "pcieport", bridge = true },
    { bdf = "0000:01:00.0", vendor = 0x10de, device = 0x2684, class = 0x030000, driver = "vfio-pci" },
    { bdf = "0000:01:00.1", vendor = 0x10de, device = 0x22ba, driver = "snd_hda_intel" },
    { bdf = "0000:01:00.2", vendor = 0x10de, device = 0x1ada },
]
[[group]]
id = 2
device = [
    { bdf = "0000:02:00.0", vendor = 0x15b3, device = 0x101d, driver = "mlx5_core", total_vfs = 4 },
]
[[group]]
id = 3
device = [
    { bdf = "0000:02:00.1", vendor = 0x15b3, device = 0x101e, driver = "mlx5_special", vfio = true, physfn = "0000:02:00.0", subsystem_vendor = 0x15b3, subsystem_device = 0x0063 },
]
[[group]]
id = 4
noiommu = true
device = [{ bdf = "0000:03:00.0", vendor = 0x1af4, device = 0x1041, driver = "vfio-pci" }]
"#;

fn machine() -> Sim {
    Sim::start(Topology::from_toml(MACHINE).unwrap()).unwrap()
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

#[test]
fn groups_devices_and_drivers_are_read() {
    let sim = machine();
    let host = Host::scan(&*sim.kernel()).unwrap();
    assert_eq!(host.groups.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    let vf = host.groups[&3].device(bdf("0000:02:00.1")).unwrap();
    let facts = &vf.facts;
    assert_eq!((facts.vendor, facts.device, facts.class >> 16), (0x15b3, 0x101e, 0x02));
    assert_eq!((facts.subsystem_vendor, facts.subsystem_device), (0x15b3, 0x0063));
    assert_eq!(facts.physfn, Some(bdf("0000:02:00.0")));
    assert!(host.groups[&2].devices[0].sriov && !vf.sriov);
    assert_eq!(host.groups[&4].node(), Node::NoIommuGroup(4));
    assert_eq!(host.groups[&1].node(), Node::Group(1));
}

#[test]
fn a_vfio_driver_is_known_by_what_it_registers_not_by_its_name() {
    let sim = machine();
    let host = Host::scan(&*sim.kernel()).unwrap();
    let on_vfio = |group: u32, n: usize| host.groups[&group].devices[n].on_vfio;
    assert!(on_vfio(3, 0), "mlx5_special is a variant driver");
    assert!(on_vfio(1, 1) && !on_vfio(1, 0) && !on_vfio(1, 2) && !on_vfio(1, 3) && !on_vfio(2, 0));
}

#[test]
fn a_bridge_and_a_driverless_function_block_nothing() {
    let sim = machine();
    let mut group = Group::scan(&*sim.kernel(), 1).unwrap().unwrap();
    assert!(group.devices[0].is_bridge());
    let fix = group.blockers(|_| true)[0].fix.clone().unwrap();
    assert!(fix.starts_with("simulated:"), "no advice to take a device of this machine: {fix}");
    // As on a real one.
    group.devices.iter_mut().for_each(|device| device.simulated = false);
    let blockers = group.blockers(|_| true);
    assert_eq!(blockers.len(), 1);
    assert_eq!(blockers[0].to_string(), "0000:01:00.1 is on snd_hda_intel");
    let device = "/sys/bus/pci/devices/0000:01:00.1";
    assert_eq!(
        blockers[0].fix.as_deref().unwrap(),
        format!(
            "modprobe vfio-pci && echo vfio-pci > {device}/driver_override && echo 0000:01:00.1 > \
             {device}/driver/unbind && echo 0000:01:00.1 > /sys/bus/pci/drivers_probe"
        )
    );
    assert_eq!(group.blockers(|_| false)[0].fix, None);
    let driverless = group.devices.iter().find(|device| device.driver.is_none()).unwrap();
    let fix = driverless.fix().unwrap();
    assert!(fix.contains("drivers_probe") && !fix.contains("unbind"), "{fix}");
    sim.set_driver("0000:01:00.1", None).unwrap();
    assert!(Group::scan(&*sim.kernel(), 1).unwrap().unwrap().is_viable());
}

#[test]
fn nobody_is_told_to_take_a_bridge_or_the_hosts_console() {
    let machine = |driver: &str, boot: bool| {
        let display = format!(
            "kernel = \"6.12\"\n[[group]]\nid = 2\ndevice = [{{ bdf = \"0000:00:02.0\", vendor = 1, \
             device = 1, class = 0x030000, driver = \"{driver}\", boot_vga = {boot} }}]\n"
        );
        let sim = Sim::start(Topology::from_toml(&display).unwrap()).unwrap();
        Group::scan(&*sim.kernel(), 2).unwrap().unwrap().devices.remove(0)
    };
    assert!(machine("i915", true).console && machine("i915", true).fix().is_none());
    assert!(!machine("i915", false).console && machine("i915", false).fix().is_some());
    assert!(machine("vfio-pci", false).fix().is_none(), "it is there already");
    let bridge = &Group::scan(&*self::machine().kernel(), 1).unwrap().unwrap().devices[0];
    assert!(bridge.is_bridge() && bridge.fix().is_none());
}

#[test]
fn a_device_is_found_by_its_address() {
    let sim = machine();
    let place = |text| find(&*sim.kernel(), bdf(text)).unwrap();
    assert_eq!(place("0000:02:00.1"), Place::Group(3));
    assert_eq!(place("0000:77:00.0"), Place::Nowhere);
    assert!(Group::scan(&*sim.kernel(), 77).unwrap().is_none());
    assert_eq!(allows_unsafe_interrupts(&*sim.kernel()), Ok(false));
}

#[test]
fn a_device_on_vfio_has_a_node_of_its_own() {
    let node = |sim: &Sim, text| cdev(&*sim.kernel(), bdf(text)).unwrap();
    let sim = machine();
    let (gpu, vf) = (node(&sim, "0000:01:00.0").unwrap(), node(&sim, "0000:02:00.1").unwrap());
    assert_ne!(gpu, vf);
    assert!(crate::kernel::Device::open_cdev(sim.kernel(), gpu, "gpu").is_ok());
    // On the host's driver, on none, without an IOMMU, not there.
    for other in ["0000:01:00.1", "0000:01:00.2", "0000:03:00.0", "0000:77:00.0"] {
        assert_eq!(node(&sim, other), None, "{other}");
    }
    // Bound anew it takes the lowest number that is free.
    sim.set_driver("0000:01:00.0", None).unwrap();
    assert_eq!(node(&sim, "0000:01:00.0"), None);
    sim.set_driver("0000:01:00.0", Some("vfio-pci")).unwrap();
    assert_eq!(node(&sim, "0000:01:00.0"), Some(gpu));
    // A kernel without them still shows which devices are on VFIO.
    let without = MACHINE.replace("6.12", "7.2");
    let sim = Sim::start(Topology::from_toml(&without).unwrap()).unwrap();
    assert_eq!(node(&sim, "0000:01:00.0"), None);
    assert!(Group::scan(&*sim.kernel(), 1).unwrap().unwrap().devices[1].on_vfio);
}

/// On Linux the broker may not read where a serial number is: here the device shows none.
#[test]
fn a_serial_number_that_can_not_be_read_is_known_for_that_device_alone() {
    let sim = machine();
    let kernel = sim.kernel();
    let device = bdf("0000:03:00.0");
    let inode = kernel.sysfs_inode("bus/pci/devices/0000:03:00.0").unwrap();
    let serial = |known: Serials| {
        let mut group = Group::scan(&*kernel, 4).unwrap().unwrap();
        group.read_serials(&*kernel, &known).unwrap();
        group.device(device).unwrap().facts.serial.clone()
    };
    let of = |inode| Serials([(device, (inode, "00-11".to_owned()))].into());
    assert_eq!(serial(of(inode)).as_deref(), Some("00-11"));
    assert_eq!(serial(of(inode + 1)), None, "another device at that address");
    assert_eq!(serial(Serials::default()), None);
}
