//! What is written to sysfs. Every case leaves the drivers as it found them.

use crate::agent::Agent;
use crate::script::{Script, device};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::thread;
use vfio_broker::kernel::{Device, IommuType, IrqAction, IrqData};

super::cases![
    overrides,
    long_overrides,
    bind_of_a_device_with_a_driver,
    unbind_and_bind,
    probes,
    devices_that_are_none,
    files_that_cannot_be_written,
    files_that_cannot_be_read,
    unbind_waits_for_a_device,
    bind_waits_for_an_unbind,
    a_host_driver_in_a_group_in_use,
    unbind_waits_for_an_unbound_cdev,
    a_host_driver_beside_a_bound_cdev,
];

const PROBE: &str = "bus/pci/drivers_probe";
const VFIO: Option<&str> = Some("vfio-pci");
/// The index of the interrupt by which the kernel asks for a device back.
const REQUEST: u32 = 4;

fn write(t: &Script, what: &str, path: &str, bytes: impl AsRef<[u8]>) {
    t.note(what, t.kernel().sysfs_write(path, bytes.as_ref()));
}

fn text(t: &Script, path: &str) -> Result<String, Errno> {
    t.kernel().sysfs_read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn override_of(bdf: &str) -> String {
    format!("bus/pci/devices/{bdf}/driver_override")
}

fn bind(t: &Script, bdf: &str, driver: &str) {
    let path = format!("bus/pci/drivers/{driver}/bind");
    write(t, &format!("bind {bdf} to {driver}"), &path, bdf);
}

fn unbind(t: &Script, bdf: &str, driver: &str) {
    let path = format!("bus/pci/drivers/{driver}/unbind");
    write(t, &format!("unbind {bdf} from {driver}"), &path, bdf);
}

fn only(t: &Script, bdf: &str, driver: &str) {
    write(t, &format!("only {driver:?} for {bdf}"), &override_of(bdf), driver);
}

fn driver(t: &Script, bdf: &str) {
    let link = t.kernel().sysfs_link(&format!("bus/pci/devices/{bdf}/driver"));
    let name = link.map(|link| link.rsplit('/').next().unwrap_or_default().to_owned());
    t.note(&format!("driver of {bdf}"), name);
}

/// Back to how the lab's guest begins.
fn put_back(t: &Script, bdf: &str) {
    only(t, bdf, "vfio-pci");
    t.bind(bdf, VFIO);
}

fn overrides(t: &Script) {
    let path = override_of(device::EDU0);
    for bytes in [
        b"vfio-pci".as_slice(),
        b"e1000\n",
        b"",
        b"\n",
        b"first\nsecond\n",
        b"\nsecond",
        b" spaces ",
        b"before\0after",
        b"\0after",
        b"no \xff text",
    ] {
        let what = String::from_utf8_lossy(bytes);
        write(t, &format!("write {what:?}"), &path, bytes);
        t.note("read", text(t, &path));
    }
    driver(t, device::EDU0);
    put_back(t, device::EDU0);
}

fn long_overrides(t: &Script) {
    let path = override_of(device::EDU0);
    only(t, device::EDU0, "vfio-pci");
    for (name, end) in [(4093, "\n"), (4094, ""), (4094, "\n"), (4095, ""), (4096, ""), (9, "\n")] {
        write(t, &format!("{name} bytes and {end:?}"), &path, format!("{}{end}", "n".repeat(name)));
        t.note("read", text(t, &path).map(|text| text.len()));
    }
    write(t, "a zero and much behind", &path, format!("name\0{}", "n".repeat(4095)));
    write(t, "a line and much behind", &path, format!("name\n{}", "n".repeat(4095)));
    t.note("read", text(t, &path));
    put_back(t, device::EDU0);
}

fn bind_of_a_device_with_a_driver(t: &Script) {
    only(t, device::EDU0, "vfio-pci");
    bind(t, device::EDU0, "vfio-pci");
    bind(t, device::EDU0, "e1000");
    only(t, device::EDU0, "e1000");
    bind(t, device::EDU0, "vfio-pci");
    bind(t, device::EDU0, "e1000");
    driver(t, device::EDU0);
    only(t, device::MIXED_E1000, "\n");
    bind(t, device::MIXED_E1000, "e1000");
    bind(t, device::MIXED_E1000, "vfio-pci");
    driver(t, device::MIXED_E1000);
    put_back(t, device::EDU0);
}

fn unbind_and_bind(t: &Script) {
    only(t, device::EDU0, "vfio-pci");
    unbind(t, device::EDU0, "e1000");
    driver(t, device::EDU0);
    unbind(t, device::EDU0, "vfio-pci");
    driver(t, device::EDU0);
    unbind(t, device::EDU0, "vfio-pci");
    bind(t, device::EDU0, "e1000");
    driver(t, device::EDU0);
    let newline = format!("{}\n", device::EDU0);
    write(t, "bind, with a newline", "bus/pci/drivers/vfio-pci/bind", &newline);
    driver(t, device::EDU0);
    write(
        t,
        "unbind, through its link",
        &format!("bus/pci/devices/{}/driver/unbind", device::EDU0),
        &newline,
    );
    driver(t, device::EDU0);
    put_back(t, device::EDU0);
}

fn probes(t: &Script) {
    only(t, device::EDU0, "vfio-pci");
    write(t, "probe one with a driver", PROBE, device::EDU0);
    unbind(t, device::EDU0, "vfio-pci");
    only(t, device::EDU0, "nonsense");
    write(t, "probe for a driver that is none", PROBE, device::EDU0);
    driver(t, device::EDU0);
    only(t, device::EDU0, "vfio-pci");
    write(t, "probe for one that is", PROBE, format!("{}\n", device::EDU0));
    driver(t, device::EDU0);
    only(t, device::MIXED_E1000, "\n");
    unbind(t, device::MIXED_E1000, "e1000");
    write(t, "probe without an override", PROBE, device::MIXED_E1000);
    driver(t, device::MIXED_E1000);
}

fn devices_that_are_none(t: &Script) {
    for name in [
        "0000:99:00.0",
        "nonsense",
        "",
        "\n",
        "00:03.0",
        "0000:00:03.0 ",
        " 0000:00:03.0",
        "0000:00:03.0\n\n",
        "0000:00:03.0\0",
        "00000:00:03.0",
        "0000:00:1F.0",
    ] {
        for path in ["bus/pci/drivers/vfio-pci/bind", "bus/pci/drivers/e1000/unbind", PROBE] {
            write(t, &format!("{name:?} to {path}"), path, name);
        }
    }
    driver(t, device::EDU0);
}

fn files_that_cannot_be_written(t: &Script) {
    let home = format!("bus/pci/devices/{}", device::EDU0);
    for file in
        ["vendor", "class", "modalias", "nonsense", "driver", "driver/nonsense", "vendor/more"]
    {
        write(t, file, &format!("{home}/{file}"), "0");
        write(t, &format!("nothing to {file}"), &format!("{home}/{file}"), "");
    }
    for path in [
        home.as_str(),
        "bus/pci/drivers/nonsense/bind",
        "bus/pci/nonsense",
        "bus/pci/devices/0000:99:00.0/driver_override",
    ] {
        write(t, path, path, device::EDU0);
    }
}

fn files_that_cannot_be_read(t: &Script) {
    for path in ["bus/pci/drivers/vfio-pci/bind", "bus/pci/drivers/vfio-pci/unbind", PROBE] {
        t.note(path, text(t, path));
    }
}

/// An eventfd that is written to when the kernel asks for the device back.
fn request_of(device: &Device) -> EventFd {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
    let list = [Some(event.as_fd())];
    device.set_irqs(REQUEST, 0, IrqAction::Trigger, IrqData::Eventfd(&list)).unwrap();
    event
}

/// What sysfs shows of a device whose driver waits to go.
fn look(t: &Script, bdf: &str) {
    driver(t, bdf);
    let link = t.kernel().sysfs_link(&format!("bus/pci/drivers/vfio-pci/{bdf}"));
    t.note("link of the driver", link.map(drop));
    let names = t.kernel().sysfs_list(&format!("bus/pci/devices/{bdf}/vfio-dev"));
    t.note("vfio-dev", names.map(|names| names.len()));
}

/// Unbinds a device that an agent has open; asks `meanwhile` when the kernel waits for it, as
/// `waits` knows, and has the agent close it.
fn unbind_held(t: &Script, device: Device, waits: impl FnOnce(), meanwhile: impl FnOnce(&Agent)) {
    only(t, device::EDU0, "vfio-pci");
    let kernel = t.kernel();
    thread::scope(|scope| {
        // Gone at the latest with this function, or else the write would never end.
        let agent = Agent::start();
        t.note("agent takes", agent.ask("take-device", &[device.as_fd()]));
        drop(device);
        let unbinds = scope.spawn(move || {
            kernel.sysfs_write("bus/pci/drivers/vfio-pci/unbind", device::EDU0.as_bytes())
        });
        waits();
        look(t, device::EDU0);
        write(t, "probe", PROBE, device::EDU0);
        driver(t, device::EDU0);
        meanwhile(&agent);
        t.note("unbound already", unbinds.is_finished());
        t.note("agent closes", agent.ask("close", &[]));
        t.note("unbind", unbinds.join().unwrap());
    });
}

fn afterwards(t: &Script) {
    look(t, device::EDU0);
    put_back(t, device::EDU0);
}

fn unbind_waits_for_a_device(t: &Script) {
    let ready = t.device(device::EDU0);
    let event = request_of(&ready.device);
    let waits = || assert!(event.read().is_ok());
    unbind_held(t, ready.device, waits, |agent| {
        t.value("status", ready.group.status());
        t.ok("open again", ready.group.device(device::EDU0));
        t.note("agent reads", agent.ask("ids", &[]));
    });
    t.value("status", ready.group.status());
    afterwards(t);
}

fn bind_waits_for_an_unbind(t: &Script) {
    let ready = t.device(device::EDU0);
    let event = request_of(&ready.device);
    let kernel = t.kernel();
    let mut binds = None;
    unbind_held(
        t,
        ready.device,
        || assert!(event.read().is_ok()),
        |_| {
            binds = Some(thread::spawn(move || {
                kernel.sysfs_write("bus/pci/drivers/vfio-pci/bind", device::EDU0.as_bytes())
            }));
        },
    );
    t.note("bind", binds.map(|binds| binds.join().unwrap()));
    afterwards(t);
}

fn take_from_host(t: &Script) {
    only(t, device::MIXED_E1000, "\n");
    unbind(t, device::MIXED_E1000, "e1000");
}

fn give_to_host(t: &Script) {
    bind(t, device::MIXED_E1000, "e1000");
    write(t, "probe", PROBE, device::MIXED_E1000);
    driver(t, device::MIXED_E1000);
}

fn a_host_driver_in_a_group_in_use(t: &Script) {
    take_from_host(t);
    let (container, group) = t.attached(device::MIXED_EDU, IommuType::Type1v2);
    give_to_host(t);
    drop(container);
    give_to_host(t);
    t.ok("detach", group.unset_container());
    give_to_host(t);
    t.value("status", group.status());
}

fn unbind_waits_for_an_unbound_cdev(t: &Script) {
    let path = format!("bus/pci/devices/{}/vfio-dev", device::EDU0);
    let waits = || {
        while t.kernel().sysfs_list(&path).is_ok() {
            thread::yield_now();
        }
    };
    unbind_held(t, t.cdev(device::EDU0), waits, |agent| {
        t.note("agent opens an iommufd", agent.ask("open-iommufd", &[]));
        t.note("agent binds", agent.ask("bind", &[]));
    });
    afterwards(t);
}

fn a_host_driver_beside_a_bound_cdev(t: &Script) {
    take_from_host(t);
    let iommufd = t.iommufd();
    let device = t.bound(device::MIXED_EDU, &iommufd);
    give_to_host(t);
    drop(device);
    give_to_host(t);
}
