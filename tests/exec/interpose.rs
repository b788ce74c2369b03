//! Programs that open VFIO's nodes by themselves.

use super::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::OnceLock;

/// `probe.c`, compiled once.
fn probe(is_static: bool) -> PathBuf {
    static BOTH: OnceLock<[PathBuf; 2]> = OnceLock::new();
    let both = BOTH.get_or_init(|| {
        [("probe", None), ("probe-static", Some("-static"))].map(|(name, option)| {
            let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
            let mut cc = Command::new("cc");
            cc.args(["-O1", "-Wall", "-Werror", "-pthread", "-o"]).arg(&path);
            cc.args(option).arg("tests/exec/probe.c");
            assert!(cc.status().unwrap().success(), "cc, which links Rust programs too");
            path
        })
    });
    both[usize::from(is_static)].clone()
}

fn steps(broker: &Broker, options: &[&str], steps: &[&str]) -> Command {
    let mut command = exec(broker, options);
    command.arg(probe(false)).args(steps);
    command
}

/// What the probe says of its steps: only what stands after the colon.
fn said(broker: &Broker, options: &[&str], list: &[&str]) -> (Vec<String>, String) {
    let (code, said, error) = run(&mut steps(broker, options, list));
    assert_eq!(code, 0, "{said}{error}");
    let each = said.lines().map(|line| line.rsplit_once(": ").unwrap().1.to_owned());
    (each.collect(), error)
}

#[test]
fn a_node_that_was_granted_is_opened_in_every_way() {
    let broker = Broker::start("workstation.toml");
    let (files, error) = said(
        &broker,
        &[],
        &[
            "open:/dev/vfio/15",
            "open:/dev/./vfio//../vfio/15",
            "openat:/dev:vfio/15",
            "cwd:/dev:vfio/15",
            "openat2:/dev/vfio/15",
            "rdonly:/dev/vfio/vfio",
            "thread:open:/dev/vfio/vfio",
            "fork:open:/dev/vfio/15",
            "same:0:4",
            "same:5:6",
            "same:0:5",
            "close:0",
            "open:/dev/vfio/15",
        ],
    );
    let cloexec = "simulated cloexec";
    assert_eq!(
        files,
        [
            cloexec,
            cloexec,
            "simulated",
            "simulated",
            cloexec,
            "simulated",
            cloexec,
            cloexec,
            "yes",
            "yes",
            "no",
            "closed",
            cloexec
        ],
        "{error}"
    );
    assert_eq!(error, "");
    no_lease_is_left(&broker);
}

#[test]
fn a_static_program_and_one_that_it_becomes_are_given_the_files_too() {
    let broker = Broker::start("workstation.toml");
    let mut command = exec(&broker, &["--interpose"]);
    command.arg(probe(true)).args(["open:/dev/vfio/15", "exec", "open:/dev/vfio/15"]);
    let (code, said, error) = run(&mut command);
    let line = "open:/dev/vfio/15: simulated cloexec\n";
    assert_eq!((code, said), (0, line.repeat(2)), "{error}");
    // The program's own program, a shell.
    let script = "exec 7<>/dev/vfio/15 && readlink /proc/$$/fd/7";
    let (code, said, error) = run(exec(&broker, &[]).args(["sh", "-c", script]));
    assert_eq!(code, 0, "{error}");
    assert!(said.starts_with("socket:["), "{said}");
}

#[test]
fn a_node_that_was_not_granted_is_refused_and_named_and_all_else_goes_on() {
    let broker = Broker::start("workstation.toml");
    let (files, error) = said(
        &broker,
        &[],
        &[
            "open:/dev/vfio/14",
            "open:/dev/vfio/14",
            "open:/dev/iommu",
            "open:/dev/vfio/devices/vfio0",
            "open:/dev/vfio/noiommu-15",
            "open:/dev/null",
            "rdonly:/dev/vfio-not-there",
            "open:",
            "open:/dev/vfio/nothing",
            "open:/dev/vfio/15/",
        ],
    );
    let refused = ["EACCES"; 5];
    assert_eq!(files[..5], refused);
    assert_eq!(files[5..8], ["/dev/null cloexec", "ENOENT", "ENOENT"]);
    assert!(files[8..].iter().all(|said| *said == "ENOENT" || *said == "ENOTDIR"), "{files:?}");
    for node in ["/dev/vfio/14", "/dev/iommu", "/dev/vfio/devices/vfio0", "/dev/vfio/noiommu-15"] {
        let line = format!(" may not open {node}: lease ");
        assert_eq!(error.matches(&line).count(), 1, "{node} in {error}");
    }
    for said in [
        "/dev/iommu: lease .* has /dev/vfio/vfio, /dev/vfio/15; .* --handout iommufd",
        "/dev/vfio/14: lease .* has /dev/vfio/vfio, /dev/vfio/15; .* see --device",
    ] {
        let parts: Vec<_> = said.split(".*").collect();
        let says = |line: &str| parts.iter().all(|part| line.contains(part));
        assert!(error.lines().any(says), "{said} in {error}");
    }
}

#[test]
fn what_the_broker_attached_is_answered_as_done() {
    let broker = Broker::start("workstation.toml");
    let (done, error) = said(
        &broker,
        &["--handout", "container"],
        &[
            "open:/dev/vfio/15",
            "open:/dev/vfio/vfio",
            // As a group that was just opened.
            "status:0",
            "container:0:1",
            "iommu:1:3",
            "status:0",
            // Another type, a container for a group, a file that is none of ours: the kernel's
            // affair, to which a simulated file is a socket.
            "iommu:1:1",
            "container:1:1",
            "container:0:0",
            "open:/dev/null",
            "container:2:1",
            "container:0:2",
            "iommu:2:3",
            "fork:container:0:1",
            "thread:iommu:1:3",
            "status:1",
            "open:/dev/vfio/15",
            "status:0",
            "fork:status:3",
        ],
    );
    let file = "simulated cloexec";
    assert_eq!(done[..6], [file, file, "free", "done", "done", "ENOTTY"], "{error}");
    assert_eq!(done[6..10], ["ENOTTY", "ENOTTY", "ENOTTY", "/dev/null cloexec"]);
    assert_eq!(done[10..16], ["ENOTTY", "ENOTTY", "ENOTTY", "done", "done", "ENOTTY"]);
    assert_eq!(done[16..], [file, "free", "free"], "opened anew");
    // Without a container of the broker's nothing is answered for the kernel.
    let list =
        ["open:/dev/vfio/15", "open:/dev/vfio/vfio", "container:0:1", "iommu:1:3", "status:0"];
    let (done, error) = said(&broker, &["--handout", "group"], &list);
    assert_eq!(done, [file, file, "ENOTTY", "ENOTTY", "ENOTTY"], "{error}");
}

#[test]
fn with_handout_group_every_open_is_a_fresh_one() {
    let broker = Broker::start("workstation.toml");
    let (files, error) = said(
        &broker,
        &["--handout", "group"],
        &[
            "open:/dev/vfio/15",
            "open:/dev/vfio/15",
            "close:0",
            "open:/dev/vfio/15",
            "fork:open:/dev/vfio/15",
            "close:1",
            "fork:open:/dev/vfio/15",
            "open:/dev/vfio/15",
            "open:/dev/vfio/vfio",
            "open:/dev/vfio/vfio",
            "same:3:4",
        ],
    );
    let file = "simulated cloexec";
    assert_eq!(
        files,
        [file, "EBUSY", "closed", file, "EBUSY", "closed", file, file, file, file, "no"],
        "{error}"
    );
    assert!(error.contains("can't open /dev/vfio/15 now: "), "{error}");
    no_lease_is_left(&broker);
}

#[test]
fn a_program_that_cannot_be_looked_into_goes_on_without() {
    let broker = Broker::start("workstation.toml");
    let list =
        ["dumpable:0", "open:/dev/vfio/15", "open:/dev/null", "dumpable:1", "open:/dev/vfio/15"];
    let (files, error) = said(&broker, &[], &list);
    if nix::unistd::geteuid().is_root() {
        // Root can look into everybody.
        assert_eq!(files[0], "simulated cloexec", "{error}");
    } else {
        assert_eq!(files[0], "ENOENT", "{error}");
        assert!(error.contains("can't be looked into"), "{error}");
    }
    assert_eq!(files[2], "simulated cloexec");
}

#[test]
fn status_and_signal_are_the_programs_own() {
    let broker = Broker::start("workstation.toml");
    for status in [0, 1, 77, 255] {
        let (code, ..) = run(&mut steps(&broker, &[], &[&format!("exit:{status}")]));
        assert_eq!(code, status);
    }
    for signal in [9, 13, 15, 6] {
        let output = steps(&broker, &[], &[&format!("kill:{signal}")]).output().unwrap();
        assert_eq!(output.status.signal(), Some(signal));
        assert!(!output.status.core_dumped());
    }
    no_lease_is_left(&broker);
}

/// A probe that has said that it is there.
fn waiting(
    broker: &Broker,
    options: &[&str],
    list: &[&str],
) -> (Child, BufReader<std::process::ChildStdout>) {
    let wanted = steps(broker, options, &[&["say:here"], list].concat());
    // What is ignored stays so in a program that is started, and whoever runs the tests may ignore
    // some: nohup does.
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP,INT,QUIT").arg(wanted.get_program()).args(wanted.get_args());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "here\n");
    (child, output)
}

#[test]
fn signals_reach_the_program() {
    let broker = Broker::start("workstation.toml");
    for signal in ["TERM", "INT", "HUP", "USR1"] {
        let (mut child, _output) = waiting(&broker, &[], &["wait"]);
        // Waiting for a child closes its input, which would end it too.
        let input = child.stdin.take();
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        let status = child.wait().unwrap();
        let expected = match signal {
            "TERM" => 15,
            "INT" => 2,
            "HUP" => 1,
            _ => 10,
        };
        assert_eq!(status.signal(), Some(expected));
        drop(input);
    }
    no_lease_is_left(&broker);
}

#[test]
fn a_broker_that_does_not_answer_keeps_only_its_asker_waiting() {
    let broker = Broker::start("workstation.toml");
    for signal in [15, 9] {
        let ask = "beside:open:/dev/vfio/15";
        let list = ["open:/dev/vfio/15", "close:0", "wait", ask, "wait", "open:/dev/null", "wait"];
        let (mut child, mut output) = waiting(&broker, &["--handout", "group"], &list);
        let mut says = |step: &str| {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert_eq!(line, step);
        };
        says("open:/dev/vfio/15: simulated cloexec\n");
        says("close:0: closed\n");
        // In the broker's place somebody who takes the question, and never answers.
        let away = broker.socket().with_extension("away");
        std::fs::rename(broker.socket(), &away).unwrap();
        let silent = UnixListener::bind(broker.socket()).unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"x\n").unwrap();
        let (_asked, _) = silent.accept().unwrap();
        input.write_all(b"x\n").unwrap();
        says("open:/dev/null: /dev/null cloexec\n");
        let pid = match signal {
            15 => child.id().to_string(),
            _ => {
                std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap()
            }
        };
        let kill = ["-s".to_owned(), signal.to_string(), pid.trim().to_owned()];
        assert!(Command::new("kill").args(kill).status().unwrap().success());
        assert_eq!(child.wait().unwrap().signal(), Some(signal));
        let mut rest = String::new();
        output.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "", "it ended while one open of it waited");
        std::fs::rename(&away, broker.socket()).unwrap();
    }
    no_lease_is_left(&broker);
}

/// A broker whose policy gives devices by iommufd, to somebody who sees no more than what is theirs.
fn with_iommufd(directory: &tempfile::TempDir) -> Broker {
    let at = |name: &str| directory.path().join(name);
    let from = |name: &str| std::fs::read_to_string(format!("tests/topologies/{name}")).unwrap();
    let topology = format!("owner_rights = true\n{}", from("workstation.toml"));
    std::fs::write(at("w.toml"), topology).unwrap();
    let policy = from("workstation.policy.toml")
        .replace(
            r#"["container", "group", "devices"]"#,
            r#"["container", "group", "devices", "iommufd"]"#,
        )
        .replace(r#"rights = ["acquire", "observe"]"#, r#"rights = ["acquire"]"#);
    std::fs::write(at("w.policy.toml"), policy).unwrap();
    Broker::start(at("w.toml").to_str().unwrap())
}

/// The device's own node, as lists say.
fn node(broker: &Broker, device: &str) -> String {
    let (code, said, error) = run(vfio_broker(broker).args(["--json", "topology"]));
    assert_eq!(code, 0, "{error}");
    let list: Value = serde_json::from_str(&said).unwrap();
    let groups = list["groups"].as_array().unwrap().iter();
    let mut devices = groups.flat_map(|group| group["devices"].as_array().unwrap());
    let found = devices.find(|found| found["bdf"] == device).unwrap();
    found["cdev"].as_str().unwrap().to_owned()
}

#[test]
fn a_static_program_opens_an_iommufd_and_a_device_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let broker = with_iommufd(&directory);
    let open = format!("open:{}", node(&broker, NIC));
    let other = format!("open:{}", node(&broker, GPU));
    let list = ["open:/dev/iommu", &open, &open, "same:1:2", "close:2", "close:1", "close:0"];
    let more = ["open:/dev/iommu", &open, "same:3:4", &other, "open:/dev/vfio/vfio"];
    let mut command = exec(&broker, &["--backend", "iommufd"]);
    let (code, said, error) = run(command.arg(probe(true)).args(list).args(more));
    assert_eq!(code, 0, "{error}");
    let said: Vec<_> = said.lines().map(|line| line.rsplit_once(": ").unwrap().1).collect();
    let file = "simulated cloexec";
    assert_eq!(said[..4], [file, file, file, "no"], "fresh ones: {error}");
    assert_eq!(said[4..9], ["closed", "closed", "closed", file, file], "{error}");
    assert_eq!(said[10..], ["EACCES", "EACCES"]);
    let nodes = format!("has /dev/iommu, {};", node(&broker, NIC));
    assert_eq!(error.matches(&nodes).count(), 2, "{error}");
    no_lease_is_left(&broker);
}

#[test]
fn the_supervisor_holds_nothing_that_others_wait_for() {
    let broker = Broker::start("workstation.toml");
    let (mut child, _output) = waiting(&broker, &[], &["wait"]);
    let held = leases(&broker);
    assert_eq!(held[0]["pid"], child.id(), "the lease is the launcher's");
    if nix::unistd::geteuid().is_root() {
        let fd = |number| std::fs::read_link(format!("/proc/{}/fd/{number}", child.id())).unwrap();
        assert_eq!((fd(0), fd(1)), ("/dev/null".into(), "/dev/null".into()));
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", child.id())).unwrap();
        assert_eq!(cwd, PathBuf::from("/"));
    }
    child.stdin.take().unwrap().write_all(b"x\n").unwrap();
    assert!(child.wait().unwrap().success());
    no_lease_is_left(&broker);
}

#[test]
fn the_program_can_not_look_into_the_supervisor() {
    let broker = Broker::start("workstation.toml");
    // Before a program that opens no library has asked anything.
    let mut wanted = exec(&broker, &["--interpose"]);
    wanted.arg(probe(true)).arg("trace");
    let mut command = Command::new(wanted.get_program());
    if nix::unistd::geteuid().is_root() {
        // Root could, but for this.
        command = Command::new("setpriv");
        command.arg("--bounding-set=-sys_ptrace").arg(wanted.get_program());
    }
    command.args(wanted.get_args()).stdin(Stdio::null());
    for _ in 0..20 {
        let (_, said, error) = run(&mut command);
        assert_eq!(said, "trace: EPERM\n", "{error}");
    }
}

#[test]
fn what_a_program_leaves_running_is_served_on() {
    let broker = Broker::start("workstation.toml");
    let list = ["leave:open:/dev/vfio/15", "exit:5"];
    let (mut child, mut output) = waiting(&broker, &[], &list);
    let mut input = child.stdin.take().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5), "the status does not wait for the rest");
    assert_eq!(leases(&broker).len(), 1, "it still has the lease");
    input.write_all(b"x\n").unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "open:/dev/vfio/15: simulated cloexec\n");
    drop((input, output));
    no_lease_is_left(&broker);
}

#[test]
fn a_program_that_is_killed_leaves_nothing() {
    let broker = Broker::start("workstation.toml");
    let (mut child, _output) = waiting(&broker, &[], &["open:/dev/vfio/15", "wait"]);
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let program = std::fs::read_to_string(children).unwrap();
    let _input = child.stdin.take();
    assert!(Command::new("kill").args(["-9", program.trim()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    no_lease_is_left(&broker);
}

#[test]
fn two_interposers_do_not_fit_and_that_is_said() {
    let broker = Broker::start("workstation.toml");
    let inner = vfio_broker(&broker);
    let mut command = exec(&broker, &[]);
    command.arg(inner.get_program()).args(inner.get_args());
    command.args(["exec", "--vm", "w", "--device", GPU, "--withhold", AUDIO, "--", "true"]);
    let (code, _, error) = run(&mut command);
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("a seccomp listener is there already"), "{error}");
    no_lease_is_left(&broker);
}

#[test]
fn a_program_that_cannot_be_executed_is_told_as_without_an_interposer() {
    let broker = Broker::start("workstation.toml");
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    let mode: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap();
    let (code, _, error) = run(exec(&broker, &[]).arg(&script));
    assert_eq!(code, 127, "{error}");
    assert!(error.contains(script.to_str().unwrap()), "{error}");
    no_lease_is_left(&broker);
}

#[test]
fn the_program_inherits_the_lease_alone() {
    let broker = Broker::start("workstation.toml");
    let script = "echo $LISTEN_FDS $LISTEN_FDNAMES $((LISTEN_PID - $$)) $1; ls /proc/$$/fd";
    let (code, said, error) = run(exec(&broker, &[]).args(["sh", "-c", script, "sh", "{lease}"]));
    assert_eq!(code, 0, "{error}");
    assert_eq!(said, "1 lease 0 3\n0\n1\n2\n3\n");
    let mut command = exec(&broker, &["--interpose"]);
    let (code, _, error) = run(command.args(["true", "{container}"]));
    assert_eq!(code, 2, "{error}");
    let (code, _, error) = run(exec(&broker, &["--handout", "devices"]).arg("true"));
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("the handout devices has no node"), "{error}");
}
