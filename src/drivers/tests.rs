//! Drivers on the simulated kernel.

use super::*;
use crate::host;
use crate::kernel::{Device, Iommufd};
use crate::protocol::Bdf;
use crate::sim::{Fault, Sim, Topology};
use nix::errno::Errno;
use std::sync::Arc;

const NIC: &str = "0000:03:00.0";
const OVERRIDE: &str = "bus/pci/devices/0000:03:00.0/driver_override";

fn topology() -> Topology {
    Topology::from_toml(include_str!("../../tests/topologies/workstation.toml")).unwrap()
}

fn start() -> (Sim, Bdf) {
    let sim = Sim::start(topology()).unwrap();
    (sim, NIC.parse().unwrap())
}

fn driver(sim: &Sim) -> Option<String> {
    let link = sim.kernel().sysfs_link(&format!("bus/pci/devices/{NIC}/driver"));
    link.ok().and_then(|link| link.rsplit('/').next().map(str::to_owned))
}

fn registration(sim: &Sim) -> Option<u64> {
    host::registration(&*sim.kernel(), NIC.parse().unwrap()).unwrap()
}

#[test]
fn a_rebind_makes_a_new_registration() {
    let (sim, nic) = start();
    let before = registration(&sim).unwrap();
    rebind(&*sim.kernel(), nic, before, Some("vfio-pci"), None).unwrap();
    assert_eq!(driver(&sim).as_deref(), Some("vfio-pci"));
    let after = registration(&sim).unwrap();
    assert_ne!(after, before);
    // The one that was meant has ended.
    rebind(&*sim.kernel(), nic, before, Some("vfio-pci"), None).unwrap();
    assert_eq!(registration(&sim), Some(after));
}

#[test]
fn a_write_that_fails_leaves_the_driver_as_it_was() {
    for nth in [1, 2] {
        let (sim, nic) = start();
        let before = registration(&sim).unwrap();
        sim.fault(Fault::fail("sysfs_write", Errno::EIO).nth(nth)).unwrap();
        let error = rebind(&*sim.kernel(), nic, before, Some("vfio-pci"), None).unwrap_err();
        let RebindError::Write(Failed { error, not_undone }) = error else { panic!("{error}") };
        assert_eq!((error.errno, not_undone.len()), (Errno::EIO, 0));
        assert_eq!(driver(&sim).as_deref(), Some("vfio-pci"), "after write {nth} failed");
    }
}

#[test]
fn what_cannot_be_undone_is_told() {
    let (sim, nic) = start();
    let before = registration(&sim).unwrap();
    sim.fault(Fault::fail("sysfs_write", Errno::EIO).nth(2).times(2)).unwrap();
    let error =
        rebind(&*sim.kernel(), nic, before, Some("vfio-pci"), None).unwrap_err().to_string();
    assert!(error.contains("not undone: write on /sys/bus/pci/drivers/vfio-pci/bind"), "{error}");
    assert_eq!(driver(&sim), None);
}

#[test]
fn a_device_that_left_vfio_is_left_alone() {
    let (sim, nic) = start();
    let before = registration(&sim).unwrap();
    sim.set_driver(NIC, None).unwrap();
    sim.set_driver(NIC, Some("e1000e")).unwrap();
    let error = rebind(&*sim.kernel(), nic, before, Some("vfio-pci"), None).unwrap_err();
    assert!(matches!(error, RebindError::NotOnVfio(_)), "{error}");
    assert_eq!(driver(&sim).as_deref(), Some("e1000e"));
}

#[test]
fn a_device_without_a_driver_goes_where_its_override_says() {
    let (sim, nic) = start();
    let kernel = sim.kernel();
    sim.set_driver(NIC, None).unwrap();
    let error = rebind(&*kernel, nic, 0, None, None).unwrap_err();
    assert!(matches!(error, RebindError::NoOverride(_)), "{error}");
    // The one that it had is as good.
    rebind(&*kernel, nic, 0, None, Some("vfio-pci")).unwrap();
    assert_eq!(driver(&sim).as_deref(), Some("vfio-pci"));
    sim.set_driver(NIC, None).unwrap();
    kernel.sysfs_write(OVERRIDE, b"vfio-pci\n").unwrap();
    rebind(&*kernel, nic, 0, None, None).unwrap();
    assert_eq!(driver(&sim).as_deref(), Some("vfio-pci"));
}

#[test]
fn a_rebind_waits_for_the_last_close() {
    let (sim, nic) = start();
    let kernel = sim.kernel();
    let before = registration(&sim).unwrap();
    kernel.sysfs_write(OVERRIDE, b"vfio-pci").unwrap();
    let number = host::cdev(&*kernel, nic).unwrap().unwrap();
    let open = Device::open_cdev(Arc::clone(&kernel), number, NIC).unwrap();
    let iommufd = Iommufd::open(Arc::clone(&kernel)).unwrap();
    open.bind_iommufd(&iommufd).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| rebind(&*kernel, nic, before, Some("vfio-pci"), None));
        while sim.stats().unwrap().held == 0 {
            std::thread::yield_now();
        }
        // It looks as if it had no driver, and probing it says nothing.
        assert_eq!((driver(&sim), registration(&sim)), (None, None));
        let error = rebind(&*kernel, nic, before, None, None).unwrap_err();
        assert!(matches!(error, RebindError::StillOpen(_)), "{error}");
        assert!(!waits.is_finished());
        drop(open);
        waits.join().unwrap().unwrap();
    });
    assert_eq!(driver(&sim).as_deref(), Some("vfio-pci"));
    assert!(registration(&sim).is_some_and(|now| now != before));
}
