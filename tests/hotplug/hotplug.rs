//! `vfio-broker attach` and `detach` with a running QEMU.

use crate::relay::Relay;
use crate::world::*;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub fn no_other_way(world: &World) {
    for node in ["/dev/vfio/vfio", "/dev/iommu", "/dev/vfio/1", "/dev/vfio/devices/vfio0"] {
        let output = world.user("/bin/sh").args(["-c", &format!(": <> {node}")]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("Permission denied"), "{node}: {said}");
    }
    let qemu = Qemu::start(world);
    for field in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(qemu.status(field), "0000000000000000", "{field}");
    }
    assert_eq!(qemu.status("Uid"), "2001\t2001\t2001\t2001");
    println!("    uid 2001, capability sets empty, {:?} open", qemu.vfio_files());
}

pub fn three_times(world: &World) {
    let qemu = Qemu::start(world);
    let mut files = None;
    for _ in 0..3 {
        say(attach(world, &qemu, NIC, "port1"));
        let open = qemu.vfio_files();
        println!("    QEMU has {}", open.join(" "));
        assert_eq!(open.len(), 2, "an iommufd and a device");
        say(detach(world, &qemu, NIC));
        assert_eq!(qemu.vfio_files(), ["/dev/iommu"], "the iommufd is kept for the next one");
        world.is_clean();
        let before = *files.get_or_insert_with(|| world.settled_files());
        until("the daemon's files are as before", || world.daemon_files() == before);
    }
}

pub fn two_devices(world: &World) {
    let qemu = Qemu::start(world);
    say(attach(world, &qemu, NIC, "port1"));
    say(attach(world, &qemu, EDU, "port2"));
    assert_eq!((qemu.vfio_files().len(), world.leases()), (3, 2));
    say(detach(world, &qemu, NIC));
    assert_eq!((qemu.vfio_files().len(), world.leases()), (2, 1));
    say(detach(world, &qemu, EDU));
}

pub fn attach_is_killed(world: &World) {
    let relayed = world.own().join("relay");
    let relay = Relay::listen(&relayed, ALICE);
    for at in 0.. {
        // A new one: with the iommufd of the last attach there would be less to do.
        let qemu = Qemu::start(world);
        let mut client = start_attach(world, relayed.to_str().unwrap());
        let Some((command, stopped)) = relay.until(at, &qemu.monitor) else {
            assert!(client.wait().unwrap().success());
            println!("    {at} commands in all");
            detach(world, &qemu, NIC);
            break;
        };
        client.kill().unwrap();
        client.wait().unwrap();
        drop(stopped);
        // Either it is in already, or the next one clears what is left.
        if qemu_has_device(&qemu) {
            assert_eq!(world.leases(), 1);
        } else {
            attach(world, &qemu, NIC, "port1");
        }
        detach(world, &qemu, NIC);
        world.is_clean();
        println!("    {command}: killed after it, cleared");
    }
}

pub fn qemu_is_killed(world: &World) {
    let relayed = world.own().join("relay");
    let relay = Relay::listen(&relayed, ALICE);
    let files = world.settled_files();
    for at in 0.. {
        let mut qemu = Qemu::start(world);
        let mut client = start_attach(world, relayed.to_str().unwrap());
        let Some((command, stopped)) = relay.until(at, &qemu.monitor) else {
            assert!(client.wait().unwrap().success());
            assert_eq!(world.leases(), 1);
            break;
        };
        qemu.kill();
        drop(stopped);
        assert!(!client.wait().unwrap().success());
        world.is_clean();
        println!("    {command}: QEMU killed after it, no lease is left");
    }
    world.is_clean();
    until("the daemon's files are as before", || world.daemon_files() == files);
    println!("    the daemon has {files} open files, as before");
}

/// A QEMU that takes no open files is told so, and nothing is touched.
pub fn too_old(world: &World) {
    let Ok(program) = std::env::var("VFIO_OLD_QEMU") else {
        println!("    SKIPPED: VFIO_OLD_QEMU is not set");
        return;
    };
    let qemu = Qemu::start_as(world, &program);
    let objects = crate::examples::query(&qemu.monitor, "/objects");
    let monitor = qemu.monitor.to_str().unwrap();
    for (verb, says) in [("attach", "QEMU 9.0.0 or newer"), ("detach", "was not attached to web1")]
    {
        let words = [verb, "--vm", "web1", "--qmp", monitor, "--device", NIC];
        let output = world.vfio_broker(&words).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        print!("    {verb}: {error}");
        assert!(!output.status.success() && error.contains(says), "{error}");
    }
    assert_eq!(crate::examples::query(&qemu.monitor, "/objects"), objects);
    let acquired = world.broker().topology().unwrap().iter().any(|group| group.unproved.is_some());
    assert!(!acquired, "no device was asked for");
}

/// The driver is told to let go of a device that the broker and QEMU have open, and that QEMU does not
/// use yet. The kernel waits for both then.
pub fn device_goes(world: &World) {
    let relayed = world.own().join("relay");
    let relay = Relay::listen(&relayed, ALICE);
    let qemu = Qemu::start(world);
    let version = vfio_broker::qmp::Monitor::connect(&qemu.monitor).unwrap().version();
    if version.major >= 11 {
        // Seen with 11.1.3: now and then it keeps the open file, and it aborts when it is given a device
        // of the same id once more.
        println!("    NOT with QEMU {version}, which keeps a device's file that it could not bind");
        return;
    }
    let client = start_attach(world, relayed.to_str().unwrap());
    let mut session = relay.accept(&qemu.monitor);
    let is_device = |call: &Value| {
        let name = call["arguments"]["fdname"].as_str().unwrap_or_default();
        name.starts_with("vfio-broker.device.")
    };
    assert!(session.until(is_device).is_some(), "QEMU is given the device");
    let driver = PathBuf::from(format!("/sys/bus/pci/devices/{NIC}/driver"));
    let unbind = driver.join("unbind");
    let going = std::thread::spawn(|| std::fs::write(unbind, NIC));
    until("its driver begins to go", || !driver.exists());
    assert!(session.until(|_| false).is_none());
    drop(session);
    let output = client.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    print!("    {error}");
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("device_add failed") && error.contains("error bind device"), "{error}");
    // All of it is undone: else the driver would wait for ever.
    until("its driver has gone", || going.is_finished());
    going.join().unwrap().unwrap();
    assert_eq!(qemu.vfio_files(), ["/dev/iommu"], "the one that QEMU never closes");
    let objects = crate::examples::query(&qemu.monitor, "/objects");
    assert!(!objects.contains("vfio-broker"), "{objects}");
    world.is_clean();
    let output = attach_command(world, &qemu, NIC, "port1").output().unwrap();
    print!("    {}", String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success(), "it has no driver");
    std::fs::write("/sys/bus/pci/drivers_probe", NIC).unwrap();
    // Not by the same id: QEMU 11.1.3 aborts at the second device of one whose first it could not bind.
    let monitor = qemu.monitor.to_str().unwrap();
    let words = ["attach", "--vm", "web1", "--qmp", monitor, "--device", NIC, "--bus", "port1"];
    say(well(world.vfio_broker(&[&words[..], &["--id", "again"]].concat()).output().unwrap()));
    say(detach(world, &qemu, NIC));
}

fn start_attach(world: &World, monitor: &str) -> std::process::Child {
    let words = ["attach", "--vm", "web1", "--qmp", monitor, "--device", NIC, "--bus", "port1"];
    let mut command = world.vfio_broker(&words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn qemu_has_device(qemu: &Qemu) -> bool {
    qemu.vfio_files().iter().any(|name| name.contains("devices/"))
        && crate::examples::query(&qemu.monitor, "/machine/peripheral").contains("child<vfio-pci>")
}

fn attach(world: &World, qemu: &Qemu, device: &str, port: &str) -> String {
    well(attach_command(world, qemu, device, port).output().unwrap())
}

fn attach_command(world: &World, qemu: &Qemu, device: &str, port: &str) -> Command {
    let monitor = qemu.monitor.to_str().unwrap();
    let words = ["attach", "--vm", "web1", "--qmp", monitor, "--device", device, "--bus", port];
    world.vfio_broker(&words)
}

fn detach(world: &World, qemu: &Qemu, device: &str) -> String {
    let monitor = qemu.monitor.to_str().unwrap();
    let words = ["detach", "--vm", "web1", "--qmp", monitor, "--device", device];
    well(world.vfio_broker(&words).output().unwrap())
}

fn say(what: String) {
    print!("    {what}");
}
