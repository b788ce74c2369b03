//! `demo --host`: the same on this machine's own VFIO, with devices that are on VFIO drivers.

use super::setup::Plan;
use crate::cli::Failure;
use crate::host::{Device, Host};
use crate::kernel::Linux;
use std::path::Path;

const HOW_TO_GIVE_ONE: &str = "to give VFIO a device that nothing else needs: modprobe vfio-pci; \
    echo vfio-pci > /sys/bus/pci/devices/BDF/driver_override; echo BDF > \
    /sys/bus/pci/devices/BDF/driver/unbind; echo BDF > /sys/bus/pci/drivers_probe; the same for all \
    functions of its IOMMU group";

pub(super) fn plan(named: &[String]) -> Result<Plan, Failure> {
    if !nix::unistd::geteuid().is_root() {
        let what = "demo --host starts a broker, which opens VFIO: that takes root";
        return Err(Failure::new(what).advise("sudo vfio-broker demo --host"));
    }
    if !Path::new("/dev/vfio/vfio").exists() {
        let advice = "modprobe vfio-pci; with no IOMMU in this machine, see `vfio-broker demo`";
        return Err(Failure::new("there is no /dev/vfio/vfio on this machine").advise(advice));
    }
    let host = Host::scan(&Linux).map_err(|error| Failure::new(error.to_string()))?;
    for name in named {
        check_named(&host, name)?;
    }
    let wanted = |device: &Device| {
        let bdf = device.bdf().to_string();
        device.on_vfio && (named.is_empty() || named.contains(&bdf))
    };
    let groups = host.groups.values().filter(|group| !group.noiommu);
    // Groups are given as a whole, and a bridge alone need not be named.
    let groups = groups.filter(|group| group.devices.iter().all(|d| wanted(d) || d.is_bridge()));
    let mut groups = groups
        .map(|group| group.devices.iter().filter(|d| wanted(d)).map(|d| d.bdf().to_string()))
        .map(Iterator::collect::<Vec<_>>)
        .filter(|devices| !devices.is_empty());
    let Some(first) = groups.next() else {
        let what = "no device of this machine is on a VFIO driver with all others of its group";
        return Err(Failure::new(what).advise(HOW_TO_GIVE_ONE));
    };
    let second = groups.next().unwrap_or_default();
    let policy = policy(&[first.clone(), second.clone()].concat());
    let title = "on this machine's own VFIO".into();
    Ok(Plan { title, policy, topology: None, first, second, denied: None })
}

fn check_named(host: &Host, name: &str) -> Result<(), Failure> {
    let found = host.devices().find(|(_, device)| device.bdf().to_string() == name);
    let Some((group, device)) = found else {
        return Err(Failure::new(format!("no PCI device {name} in an IOMMU group"))
            .advise("lspci -D lists addresses; with no IOMMU switched on there are no groups"));
    };
    if !device.on_vfio {
        let driver = device.driver.as_deref().unwrap_or("no driver");
        return Err(Failure::new(format!("{name} is on {driver}, not on a VFIO driver"))
            .advise(HOW_TO_GIVE_ONE));
    }
    let blockers = group.blockers(|_| true);
    if blockers.is_empty() {
        return Ok(());
    }
    Err(crate::protocol::Error::NotViable { group: group.id, blockers }.into())
}

/// Two users may have the devices; root may look, and have nothing.
fn policy(devices: &[String]) -> String {
    let devices = serde_json::json!(devices);
    format!(
        r#"version = 1
[[tenant]]
name = "alice"
user = 1000
devices = {devices}
handouts = ["container", "devices"]
[[tenant]]
name = "nobody"
user = 65534
accept = ["overflow-uid"]
devices = {devices}
handouts = ["container", "devices"]
[[tenant]]
name = "root"
user = 0
rights = ["observe"]
[[container]]
name = "pool"
members = ["alice", "nobody"]
"#
    )
}
