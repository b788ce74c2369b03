//! libvirt as the user runs it, and the command of `docs/libvirt.md`. `VFIO_LIBVIRT` is a tree with a
//! libvirt, as `tests/lab/libvirt` prints its path.

use crate::world::*;
use std::path::Path;
use std::process::{Child, Command};

const DOMAIN: &str = "
<domain type='qemu'>
  <name>web1</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>
  <devices>
    <emulator>QEMU</emulator>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'/>
    <controller type='pci' index='2' model='pcie-root-port'/>
    <controller type='pci' index='3' model='pcie-root-port'/>
    <controller type='pci' index='4' model='pcie-root-port'/>
    <controller type='pci' index='5' model='pcie-root-port'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>";

pub fn through_its_monitor(world: &World) {
    let Some(tree) = std::env::var_os("VFIO_LIBVIRT") else {
        println!("    SKIPPED: VFIO_LIBVIRT is not set: see tests/lab/libvirt");
        return;
    };
    install(Path::new(&tree));
    let libvirt = Libvirt::start(world);
    println!("    libvirt {}", libvirt.virsh(&["--version"]).trim());
    let domain = world.own().join("web1.xml");
    std::fs::write(&domain, DOMAIN.replace("QEMU", &qemu())).unwrap();
    libvirt.virsh(&["define", domain.to_str().unwrap()]);
    libvirt.virsh(&["start", "--paused", "web1"]);
    let pid = libvirt.run.join("libvirt/qemu/run/web1.pid");
    let pid = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    assert!(vfio_files(pid).is_empty());

    well(libvirt.user("/bin/sh").args(["-c", &the_guides_command()]).output().unwrap());
    assert_eq!(vfio_files(pid).len(), 2, "an iommufd and a device: {:?}", vfio_files(pid));
    assert_eq!(world.leases(), 1);
    let ask = r#"{"execute":"qom-list","arguments":{"path":"/machine/peripheral"}}"#;
    let devices = libvirt.virsh(&["qemu-monitor-command", "web1", ask]);
    assert!(devices.contains(r#""name":"nic","type":"child<vfio-pci>""#), "{devices}");
    println!("    QEMU (pid {pid}) has {}", vfio_files(pid).join(" "));

    libvirt.virsh(&["destroy", "web1"]);
    until("the lease ends with its QEMU", || world.leases() == 0);
}

/// The command as the page has it, for a device that is there.
fn the_guides_command() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/libvirt.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, section) = page.split_once("## As an ordinary user").unwrap();
    let command: Vec<&str> = section
        .lines()
        .skip_while(|line| !line.starts_with("    vfio-broker exec"))
        .take_while(|line| line.starts_with("    "))
        .collect();
    assert!(command.len() > 5, "the command is not in the page");
    command.join("\n").replace("65:00.0", NIC)
}

/// Puts the tree into this guest's own, which forgets it with the guest.
fn install(tree: &Path) {
    well(Command::new("cp").arg("-a").arg(tree.join(".")).arg("/").output().unwrap());
    well(Command::new("/sbin/ldconfig").output().unwrap());
    // libvirt wants its user to have a name.
    for (file, line) in
        [("/etc/passwd", "alice:x:2001:2001::/:/bin/sh"), ("/etc/group", "alice:x:2001:")]
    {
        let text = std::fs::read_to_string(file).unwrap();
        std::fs::write(file, format!("{text}{line}\n")).unwrap();
    }
}

/// A libvirt of the user's own; ends when dropped.
struct Libvirt<'a> {
    world: &'a World,
    run: std::path::PathBuf,
    daemon: Option<Child>,
}

impl<'a> Libvirt<'a> {
    fn start(world: &'a World) -> Self {
        let run = world.own().join("run");
        let settings = world.own().join(".config/libvirt");
        well(world.user("/bin/mkdir").arg("-p").args([&run, &settings]).output().unwrap());
        // One daemon, without those that systemd would start beside it.
        let qemu = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\n";
        std::fs::write(settings.join("qemu.conf"), qemu).unwrap();
        let mut libvirt = Self { world, run, daemon: None };
        libvirt.daemon = Some(libvirt.user("/usr/sbin/libvirtd").spawn().unwrap());
        let socket = libvirt.run.join("libvirt/libvirt-sock");
        until("libvirtd listens", || socket.exists());
        libvirt
    }

    fn user(&self, program: &str) -> Command {
        let mut command = self.world.user(program);
        command.env("HOME", self.world.own()).env("XDG_RUNTIME_DIR", &self.run);
        let broker = Path::new(env!("CARGO_BIN_EXE_vfio-broker")).parent().unwrap();
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", broker.display()));
        command.env("LIBVIRT_DEFAULT_URI", "qemu:///session").current_dir("/");
        command
    }

    fn virsh(&self, words: &[&str]) -> String {
        well(self.user("/usr/bin/virsh").args(words).output().unwrap())
    }
}

impl Drop for Libvirt<'_> {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
