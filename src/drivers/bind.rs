//! The steps that plans are made of.

use super::plan::{Step, Write};
use crate::protocol::Bdf;

/// Takes a device's driver away; waits until nobody has the device open.
pub(super) fn unbind(device: Bdf, driver: &str) -> Step {
    let does = to_driver(device, driver, "unbind");
    Step { does, undo: Some(to_driver(device, driver, "bind")) }
}

/// Gives a device without a driver to one.
pub(super) fn bind(device: Bdf, driver: &str) -> Step {
    let does = to_driver(device, driver, "bind");
    Step { does, undo: Some(to_driver(device, driver, "unbind")) }
}

/// Has the kernel find a driver for a device that has none. It says nothing when it finds none.
pub(super) fn probe(device: Bdf) -> Step {
    let does = Write { path: "bus/pci/drivers_probe".into(), text: device.to_string() };
    Step { does, undo: None }
}

fn to_driver(device: Bdf, driver: &str, file: &str) -> Write {
    Write { path: format!("bus/pci/drivers/{driver}/{file}"), text: device.to_string() }
}
