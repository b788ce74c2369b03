//! Each step starts with nothing leased and ends so.

use crate::dpdk;
use crate::world::*;
use std::process::Command;

type Step = fn(&World);

/// Its name, whether it needs iommufd, and what it does.
pub const STEPS: [(&str, bool, Step); 13] = [
    ("the user may open no node", false, no_rights),
    ("legacy, a container that the broker attached", false, |world| legacy(world, "container")),
    ("legacy, an unattached group", false, |world| legacy(world, "group")),
    ("a static program opens its group, and again", false, a_program_of_its_own),
    ("a container that its holder detaches is the kernel's affair", false, detached),
    ("iommufd, cold: open files by number", true, by_number),
    ("iommufd, opened by QEMU itself", true, by_iommufd_itself),
    ("a static program opens an iommufd and a device, and again", true, a_device_of_its_own),
    ("rust-vmm's crates with the lease's open files", true, rust_vmm),
    ("rust-vmm's crates open nodes by themselves", false, rust_vmm_by_itself),
    ("DPDK sends packets", false, dpdk::sends),
    ("512 MiB do not fit in the default memlock limit", false, memlock),
    ("QEMU that is killed leaves nothing", false, killed),
];

/// Memory of the guest's guest, and what may be locked for it.
const MEMORY: &str = "64";
pub const ENOUGH: u64 = 256 * MIB;
const E1000E: (u64, u64) = (0x8086, 0x10d3);
const NOBODY: &str = "uid 2001 CapEff 0000000000000000";

fn no_rights(world: &World) {
    let opens = ["open:/dev/vfio/vfio", "open:/dev/vfio/1", "open:/dev/iommu"];
    for said in steps(world.user("env", 8 * MIB), &opens) {
        assert!(said == "EACCES" || said == "ENOENT", "{said}");
    }
}

fn legacy(world: &World, handout: &str) {
    let device = format!("vfio-pci,id=hd0,host={NIC}");
    let command = world.exec(&["--handout", handout], ENOUGH);
    let mut qemu = Qemu::start(command, MEMORY, &["-device", &device]);
    assert!(qemu.greets(), "it did not start");
    assert_eq!(qemu.device("hd0"), E1000E);
    let (who, files) = qemu.shows();
    assert_eq!(who, NOBODY);
    assert!(files.contains(&"/dev/vfio/vfio".to_owned()), "{files:?}");
    assert_eq!(world.leases()[0].handout, serde_json::from_value(handout.into()).unwrap());
    // A second one is refused, and told by whom.
    let output = world.exec(&[], ENOUGH).arg("true").output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{error}");
    let pid = world.leases()[0].pid;
    assert!(error.contains("web1 of user") && error.contains(&format!("pid {pid}")), "{error}");
    assert_eq!(qemu.quit().code(), Some(0));
}

fn a_program_of_its_own(world: &World) {
    let group = format!("open:/dev/vfio/{}", group_of(EDU));
    let device = format!("device:0:{EDU}");
    let list = [
        &*group,
        "open:/dev/vfio/vfio",
        "container:0:1",
        "iommu:1:3",
        "status:0",
        &device,
        &group,
        // Device, group and container: then all of it once more.
        "close:2",
        "close:0",
        "close:1",
        &group,
        "open:/dev/vfio/vfio",
        "container:3:4",
        "iommu:4:3",
        "thread:status:3",
        "fork:status:3",
    ];
    let said = steps(world.exec_for(EDU, &["--handout", "group"], ENOUGH), &list);
    assert_eq!(said[2..5], ["done", "done", "attached"]);
    assert_eq!(said[6], "EBUSY", "the kernel's own");
    assert_eq!(said[12..], ["done", "done", "attached", "attached"]);

    // The same where the broker attached it: there the kernel would refuse both calls.
    let again = [&list[..6], &["close:2", "close:0", "close:1"], &list[10..]].concat();
    let said = steps(world.exec_for(EDU, &["--handout", "container"], ENOUGH), &again);
    assert_eq!(said[2..5], ["done", "done", "attached"]);
    assert_eq!(said[11..], ["done", "done", "attached", "attached"]);
}

fn detached(world: &World) {
    let group = format!("open:/dev/vfio/{}", group_of(EDU));
    let list = [
        &*group,
        "open:/dev/vfio/vfio",
        // To the program it is one that nobody has attached.
        "status:0",
        "container:0:1",
        "iommu:1:3",
        "status:0",
        "unset:0",
        "status:0",
        // The kernel is asked: nothing is attached, so the call is made, and so is the next.
        "iommu:1:3",
        "container:0:1",
        "status:0",
        "iommu:1:1",
        "iommu:1:3",
    ];
    let said = steps(world.exec_for(EDU, &["--handout", "container"], ENOUGH), &list);
    let first = ["free", "done", "done", "attached", "done"];
    assert_eq!(said[2..7], first);
    let expected = ["free", "EINVAL", "done", "attached", "done", "EINVAL"];
    assert_eq!(said[7..], expected, "type 1 is set then, and 3 the kernel's to refuse");
}

fn by_number(world: &World) {
    let two = ["--device", EDU];
    let nic = format!("vfio-pci,id=hd0,iommufd=i0,fd={{cdev:{NIC}}}");
    let edu = format!("vfio-pci,id=hd1,iommufd=i0,fd={{cdev:{EDU}}}");
    let more = ["-object", "iommufd,id=i0,fd={iommufd}", "-device", &nic, "-device", &edu];
    let mut qemu = Qemu::start(world.exec(&two, ENOUGH), MEMORY, &more);
    assert!(qemu.greets(), "it did not start");
    assert_eq!(qemu.device("hd0"), E1000E);
    assert_eq!(qemu.device("hd1"), (0x1234, 0x11e8));
    assert_eq!(qemu.pid(), qemu.launcher.id(), "QEMU is what was started");
    let (who, files) = qemu.shows();
    assert_eq!(who, NOBODY);
    assert_eq!(files.len(), 3, "one iommufd, two devices, and no other VFIO file: {files:?}");
    assert_eq!(qemu.quit().code(), Some(0));
}

fn by_iommufd_itself(world: &World) {
    let device = format!("vfio-pci,id=hd0,iommufd=i0,host={NIC}");
    let more = ["-object", "iommufd,id=i0", "-device", &device];
    let command = world.exec(&["--backend", "iommufd"], ENOUGH);
    let mut qemu = Qemu::start(command, MEMORY, &more);
    assert!(qemu.greets(), "it did not start");
    assert_eq!(qemu.device("hd0"), E1000E);
    assert_eq!(qemu.shows().0, NOBODY);
    assert_eq!(qemu.quit().code(), Some(0));
}

fn a_device_of_its_own(world: &World) {
    let node = std::fs::read_dir(format!("/sys/bus/pci/devices/{EDU}/vfio-dev")).unwrap();
    let node = node.last().unwrap().unwrap().file_name().into_string().unwrap();
    let open = format!("open:/dev/vfio/devices/{node}");
    let list = [
        "open:/dev/iommu",
        &open,
        &open,
        "close:2",
        "close:1",
        "close:0",
        "open:/dev/iommu",
        &open,
    ];
    let said = steps(world.exec_for(EDU, &["--backend", "iommufd"], ENOUGH), &list);
    assert!(said.iter().all(|said| !said.starts_with('E')), "{said:?}");
}

fn rust_vmm(world: &World) {
    let run = |memlock| {
        let mut command = world.user(world.rust_vmm(), memlock);
        command.env("VFIO_BROKER_SOCKET", world.socket()).args([NIC, EDU]);
        says(command)
    };
    let (started, said, _) = run(8 * MIB);
    assert!(started);
    assert!(said.contains(&format!("{NIC} is 8086:10d3")), "two devices share one address space");
    assert!(said.contains(&format!("{EDU} has copied memory")));
    let (started, _, error) = run(2 * MIB);
    assert!(!started && error.contains("Cannot allocate memory"), "it may lock less than it maps");
}

fn rust_vmm_by_itself(world: &World) {
    let run = |options: &[&str], way| {
        let mut command = world.exec_for(EDU, options, 8 * MIB);
        command.arg(world.rust_vmm()).args([way, EDU]);
        says(command)
    };
    // It wants a group that is viable and in no container, which is what it is shown.
    for handout in ["group", "container"] {
        let (started, said, _) = run(&["--handout", handout], "--groups");
        assert!(started && said.contains("has copied memory"), "{handout}");
    }
    if world.has_iommufd {
        let (started, said, _) = run(&["--backend", "iommufd"], "--cdevs");
        assert!(started && said.contains("has copied memory"));
    }
}

/// Whether a program does what it is to do, and its output and errors.
fn says(mut command: Command) -> (bool, String, String) {
    let output = command.output().unwrap();
    let [said, error] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    print!("{said}{error}");
    (output.status.success(), said, error)
}

fn memlock(world: &World) {
    let device = format!("vfio-pci,id=hd0,host={NIC}");
    let start =
        |options: &[&str]| Qemu::start(world.exec(options, 8 * MIB), "512", &["-device", &device]);
    let mut without = start(&[]);
    assert!(!without.greets(), "it started with 8 MiB");
    assert_ne!(without.launcher.wait().unwrap().code(), Some(0));
    let mut with = start(&["--memlock", "auto"]);
    let started = with.greets();
    if world.names_peers {
        assert!(started, "it did not start");
        assert_eq!(with.device("hd0"), E1000E);
        assert_eq!(with.quit().code(), Some(0));
    } else {
        assert!(!started, "Unsupported before Linux 6.5");
    }
}

fn killed(world: &World) {
    let device = format!("vfio-pci,id=hd0,host={NIC}");
    let mut qemu = Qemu::start(world.exec(&[], ENOUGH), MEMORY, &["-device", &device]);
    assert!(qemu.greets(), "it did not start");
    let pid = nix::unistd::Pid::from_raw(qemu.pid() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let ended = qemu.launcher.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(9));
}

fn group_of(device: &str) -> String {
    let link = std::fs::read_link(format!("/sys/bus/pci/devices/{device}/iommu_group")).unwrap();
    link.file_name().unwrap().to_str().unwrap().to_owned()
}
