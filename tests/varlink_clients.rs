//! Other people's Varlink clients, as they are, against the daemon.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests, too

mod common;

use common::Daemon;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What the client of PyPI's package `varlink` is to do: introspect, then make calls.
const PROGRAM: &str = r#"
import sys, varlink
with varlink.Client.new_with_address("unix:" + sys.argv[1]) as client:
    with client.open("org.varlink.service") as service:
        info = service.GetInfo()
        print("product:", info["product"])
        print("interfaces:", " ".join(info["interfaces"]))
        for name in info["interfaces"]:
            text = service.GetInterfaceDescription(name)["description"]
            methods = varlink.Interface(text).members
            print("described:", name, len(methods))
    with client.open("org.vfiobroker.Broker") as broker:
        groups = broker.Topology()["groups"]
        print("groups:", *sorted(group["id"] for group in groups))
        bdf = "0000:65:00.0"
        lease = broker.Acquire("python", [{"bdf": bdf}])
        print("acquired:", *lease["devices"], *(fd["kind"] for fd in lease["fds"]))
        try:
            broker.Acquire("", [{"bdf": bdf}])
        except varlink.VarlinkError as error:
            print("error:", error.error(), error.parameters()["field"])
"#;

#[test]
#[ignore = "needs PyPI: run by tests/run"]
fn pypis_varlink_client() {
    let python = virtual_environment();
    let daemon = Daemon::start();
    let output = run(Command::new(python).arg("-c").arg(PROGRAM).arg(&daemon.socket));
    let said = String::from_utf8_lossy(&output.stdout);
    let has = |line: &str| assert!(said.lines().any(|l| l.starts_with(line)), "{line}: {said}");
    has("product: vfio-brokerd");
    has("interfaces: org.varlink.service org.vfiobroker.Broker");
    has("described: org.varlink.service ");
    has("described: org.vfiobroker.Broker ");
    has("groups: 26 27 28 29");
    has("acquired: 0000:65:00.0 ");
    has("error: org.vfiobroker.Broker.BadRequest vm");
}

/// A Python with the package, made under target/ once.
fn virtual_environment() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("varlink-venv");
    let python = directory.join("bin/python3");
    let has_it = || {
        let import = Command::new(&python).args(["-c", "import varlink"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    if !has_it() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "varlink"]));
        assert!(has_it(), "installed, and can't be imported");
    }
    python
}

#[test]
#[ignore = "needs varlinkctl of systemd 255 or later: run by tests/run"]
fn systemds_varlinkctl() {
    let program = std::env::var_os("VARLINKCTL").unwrap_or("varlinkctl".into());
    let daemon = Daemon::start();
    let ctl = |verb: &str, arguments: &[&str]| {
        let output = run(Command::new(&program).arg(verb).arg(&daemon.socket).args(arguments));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(ctl("info", &[]).contains("vfio-brokerd"));
    assert!(ctl("introspect", &["org.vfiobroker.Broker"]).contains("method Acquire"));
    let topology = ctl("call", &["org.vfiobroker.Broker.Topology", "{}"]);
    assert!(topology.contains("0000:65:00.0"), "{topology}");
    let lease = r#"{"vm": "ctl", "devices": ["0000:65:00.0"]}"#;
    let lease = ctl("call", &["org.vfiobroker.Broker.Acquire", lease]);
    assert!(lease.contains("\"lease\""), "{lease}");
    let wrong = Command::new(&program)
        .arg("call")
        .arg(&daemon.socket)
        .args(["org.vfiobroker.Broker.Acquire", r#"{"vm": "", "devices": []}"#])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(!wrong.status.success() && said.contains("org.vfiobroker.Broker.BadRequest"), "{said}");
}

/// What stands in for `varlinkctl --exec` of systemd 258 in the tests with QEMU makes the call that this
/// machine's varlinkctl makes.
#[test]
#[ignore = "needs varlinkctl of systemd 255 or later: run by tests/run"]
fn the_imitated_varlinkctl_makes_the_same_call() {
    let parameters =
        r#"{"vm": "web1", "devices": [{"bdf": "0000:65:00.0"}], "backend": "iommufd"}"#;
    let method = "org.vfiobroker.Broker.Acquire";
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let said = |command: &mut Command| {
        let mut client = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut call = Vec::new();
        BufReader::new(listener.accept().unwrap().0).read_until(0, &mut call).unwrap();
        // It is not answered.
        assert!(!client.wait().unwrap().success());
        String::from_utf8(call).unwrap()
    };
    let program = std::env::var_os("VARLINKCTL").unwrap_or("varlinkctl".into());
    let real = said(Command::new(program).arg("call").arg(&socket).args([method, parameters]));
    let imitation = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hotplug/varlinkctl.py");
    let mut command = Command::new("python3");
    command.arg(imitation).args(["--exec", "call"]).arg(&socket).args([method, parameters]);
    assert_eq!(said(command.args(["--", "true"])), real);
    assert!(real.ends_with("}\0"), "{real:?}");
}

/// Runs it; fails with all it said unless it succeeds.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (&output.stdout, &output.stderr);
    let said = [String::from_utf8_lossy(out), String::from_utf8_lossy(err)].concat();
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    output
}
