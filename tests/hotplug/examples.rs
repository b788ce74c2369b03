//! Each of `qmp-examples/`, as it is there, run by the user.

use crate::world::*;
use serde_json::json;
use std::path::Path;
use vfio_broker::qmp::Monitor;

/// Where PyPI's qemu.qmp is; the host has put it there, see tests/run.
const QEMU_QMP: &str = "VFIO_QMP_PYTHON";

pub fn all(world: &World) {
    let python = "/usr/bin/python3";
    let [device, vendor] = fields(NIC);
    let seen = ["\"qdev_id\": \"nic\"", &device, &vendor];
    run(world, "bash", "cold_plug.sh", &[NIC], &seen);
    for handout in ["container", "group"] {
        run(world, "bash", "legacy.sh", &[NIC, handout], &seen);
    }
    run(world, python, "hotplug.py", &[NIC], &["# plugged in", "# unplugged and given back"]);
    let shared = format!("# {NIC} and {EDU} on one iommufd");
    run(world, python, "second_device.py", &[NIC, EDU], &[&shared, "# QEMU has ended"]);
    let closed = ["# plugged in; 1 iommufd", "is deleted; 1 iommufd", "is removed; 0 iommufd"];
    run(world, python, "add_fd.py", &[NIC], &closed);
    if std::env::var_os(QEMU_QMP).is_none() {
        println!("    SKIPPED: hotplug_qemu_qmp.py: {QEMU_QMP} is not set");
        return;
    }
    let words = ["# plugged in", "# unplugged and given back"];
    run(world, python, "hotplug_qemu_qmp.py", &[NIC], &words);
}

/// The command of `docs/qemu.md`; `varlinkctl.py` does what systemd's own does from 258 on.
pub fn varlinkctl(world: &World) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hotplug/varlinkctl.py");
    let monitor = world.own().join("qmp");
    let _ = std::fs::remove_file(&monitor);
    let acquire = json!({ "vm": "web1", "devices": [{ "bdf": NIC }], "backend": "iommufd" });
    let mut command = world.user("/usr/bin/python3");
    command.arg(script).args(["--exec", "call"]).arg(world.socket());
    command.args(["org.vfiobroker.Broker.Acquire", &acquire.to_string(), "--"]);
    command.args([&*qemu(), "-machine", "q35", "-accel", "tcg", "-S"]);
    command.args(["-nodefaults", "-display", "none", "-m", "64"]);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
    command.args(["-object", "iommufd,id=iommufd0,fd=3"]);
    command.args(["-device", "vfio-pci,id=nic,addr=05.0,iommufd=iommufd0,fd=4"]);
    let mut qemu = Qemu::of(command.spawn().unwrap(), monitor);
    // The socket is there before the device is; the greeting comes after both.
    let seen = Monitor::connect(&qemu.monitor).unwrap().execute("query-pci", json!({})).unwrap();
    assert!(seen.to_string().contains("\"qdev_id\":\"nic\""), "{seen}");
    assert_eq!((qemu.vfio_files().len(), world.leases()), (2, 1));
    println!("    QEMU has {}, and nothing else of VFIO", qemu.vfio_files().join(" "));
    qemu.kill();
}

fn run(world: &World, interpreter: &str, script: &str, arguments: &[&str], expected: &[&str]) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("qmp-examples");
    let mut command = world.user(interpreter);
    command.arg(directory.join(script)).args(arguments).current_dir("/");
    command.env("PYTHONDONTWRITEBYTECODE", "1").env("TMPDIR", world.own());
    command.envs(std::env::var_os(QEMU_QMP).map(|packages| ("PYTHONPATH", packages)));
    let said = well(command.output().unwrap());
    for words in expected {
        assert!(said.contains(words), "{script}: no {words:?} in\n{said}");
    }
    world.is_clean();
    check_transcript(&directory.join(script), &said);
    println!("    {script}: as its transcript says");
}

/// The commands of an example's transcript are those that it gives, in that order.
fn check_transcript(script: &Path, said: &str) {
    let name = script.file_stem().unwrap().to_str().unwrap();
    let page = std::fs::read_to_string(script.with_file_name("README.md")).unwrap();
    let (_, section) = page.split_once(&format!("\n## {name}\n")).unwrap_or_else(|| {
        panic!("README.md has no transcript of {name}");
    });
    let section = section.split("\n## ").next().unwrap();
    let commands = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.trim_start().strip_prefix("-> "));
        let word = |line: &str| {
            let line = line.trim_start_matches("{\"execute\": \"");
            line.split(['"', ' ']).next().unwrap().to_owned()
        };
        lines.map(word).filter(|word| word != "qmp_capabilities").collect()
    };
    assert_eq!(commands(section), commands(said), "{name}\n{said}");
}

/// Vendor and device as query-pci writes them.
fn fields(bdf: &str) -> [String; 2] {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/bus/pci/devices/{bdf}/{name}")).unwrap();
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
    };
    [format!("\"device\": {},", read("device")), format!("\"vendor\": {},", read("vendor"))]
}

/// A list of QEMU's objects, as it says it.
pub fn query(monitor: &Path, path: &str) -> String {
    let mut qemu = Monitor::connect(monitor).unwrap();
    qemu.execute("qom-list", json!({ "path": path })).unwrap().to_string()
}
