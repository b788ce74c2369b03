//! Start, readiness, socket activation, the end, and starts that can't work.

use crate::common::raw::Raw;
use crate::common::{Daemon, SOON, Setup, command, read_all, until};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

/// What the daemon told the service manager, up to the line that starts with `last`.
fn told(manager: &UnixDatagram, last: &str) -> String {
    manager.set_read_timeout(Some(SOON)).unwrap();
    let (mut said, mut text) = (String::new(), [0; 256]);
    while !said.lines().any(|line| line.starts_with(last)) {
        let len = manager.recv(&mut text).unwrap();
        said += std::str::from_utf8(&text[..len]).unwrap();
        said += "\n";
    }
    said
}

/// Starts a daemon that can't start; what it says.
fn refuses(command: &mut Command, directory: &Path) -> String {
    let status = command.status().unwrap();
    assert_eq!(status.code(), Some(1), "{status}");
    std::fs::read_to_string(directory.join("log")).unwrap()
}

#[test]
fn a_signal_ends_it_cleanly() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let directory = tempfile::tempdir().unwrap();
        let notify = directory.path().join("manager");
        let manager = UnixDatagram::bind(&notify).unwrap();
        let socket = directory.path().join("broker.sock");
        let mut command = command(directory.path(), &Setup::default());
        let command = command.arg("--socket").arg(&socket).env("NOTIFY_SOCKET", &notify);
        let mut child = command.spawn().unwrap();
        told(&manager, "READY=1");
        // Ready is when clients are served.
        let mut client = Raw::connect(&socket);
        client.call("Leases", json!({})).ok();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
        assert!(!told(&manager, "STOPPING=1").contains("READY"));
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
        assert!(!socket.exists(), "the socket's file is gone");
        client.hangs_up();
    }
}

#[test]
fn a_call_that_never_returns_does_not_hold_up_the_end() {
    let mut daemon = Daemon::start();
    let sim = daemon.sim();
    sim.fault(&vfio_broker::sim::Fault::never("VFIO_SET_IOMMU")).unwrap();
    let client = daemon.connect();
    let request = json!({ "vm": "a", "devices": [crate::DEVICE] });
    client.send(&crate::common::raw::call("Acquire", &request));
    until("the call is in the kernel", || sim.stats().unwrap().held == 1);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("run/broker.sock");
    std::fs::create_dir(socket.parent().unwrap()).unwrap();
    // Closing a socket leaves its file.
    drop(UnixListener::bind(&socket).unwrap());
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
    let daemon = Daemon::at(&socket);
    Raw::connect(&socket).call("Leases", json!({})).ok();

    let other = tempfile::tempdir().unwrap();
    let mut second = command(other.path(), &Setup::default());
    let said = refuses(second.arg("--socket").arg(&socket), other.path());
    assert!(said.contains("is being served already"), "{said}");
    assert!(said.contains(socket.to_str().unwrap()), "{said}");
    // The first one has noticed nothing.
    Raw::connect(&socket).call("Leases", json!({})).ok();
    drop(daemon);
}

#[test]
fn a_full_queue_is_a_live_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("broker.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    // A queue that is 0 long has room for one.
    let _waiting = UnixStream::connect(&socket).unwrap();
    let mut command = command(directory.path(), &Setup::default());
    let said = refuses(command.arg("--socket").arg(&socket), directory.path());
    assert!(said.contains("is being served already"), "{said}");
}

#[test]
fn a_stranger_can_not_hold_up_the_start() {
    let directory = tempfile::tempdir().unwrap();
    // Whoever may read a directory may lock it.
    let opened = std::fs::File::open(directory.path()).unwrap();
    let _held = Flock::lock(opened, FlockArg::LockExclusive).unwrap();
    let daemon = Daemon::at(&directory.path().join("broker.sock"));
    Raw::connect(&daemon.socket).call("Leases", json!({})).ok();
    let lock = directory.path().join("broker.sock.lock");
    assert_eq!(std::fs::metadata(lock).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn the_socket_is_not_made_where_others_can_replace_it() {
    let directory = tempfile::tempdir().unwrap();
    let open = directory.path().join("open");
    std::fs::create_dir(&open).unwrap();
    let socket = open.join("broker.sock");
    let says = || {
        let mut command = command(directory.path(), &Setup::default());
        refuses(command.arg("--socket").arg(&socket), directory.path())
    };
    std::fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
    assert!(says().contains("others can replace files"));
    std::fs::set_permissions(&open, Permissions::from_mode(0o775)).unwrap();
    assert!(says().contains("chmod go-w"));
    if nix::unistd::geteuid().is_root() {
        std::fs::set_permissions(&open, Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&open, Some(12345), None).unwrap();
        assert!(says().contains("chown root"));
    }
}

#[test]
fn a_directory_that_others_can_replace_is_no_place_for_the_socket() {
    let directory = tempfile::tempdir().unwrap();
    let (open, safe) = (directory.path().join("open"), directory.path().join("open/safe"));
    std::fs::create_dir_all(&safe).unwrap();
    std::fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
    let mut command = command(directory.path(), &Setup::default());
    let said = refuses(command.arg("--socket").arg(safe.join("broker.sock")), directory.path());
    assert!(said.contains(open.to_str().unwrap()) && !said.contains("safe"), "{said}");
}

#[test]
fn in_a_sticky_directory_only_our_own_files_are_used() {
    let directory = tempfile::tempdir().unwrap();
    let sticky = directory.path().join("sticky");
    std::fs::create_dir(&sticky).unwrap();
    std::fs::set_permissions(&sticky, Permissions::from_mode(0o1777)).unwrap();
    let socket = sticky.join("broker.sock");
    drop(Daemon::at(&socket));
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let says = || {
        let mut command = command(directory.path(), &Setup::default());
        refuses(command.arg("--socket").arg(&socket), directory.path())
    };
    let _ = std::fs::remove_file(&socket);
    drop(UnixListener::bind(&socket).unwrap());
    std::os::unix::fs::chown(&socket, Some(12345), None).unwrap();
    assert!(says().contains("belongs to uid 12345"));
    assert!(socket.exists(), "it is not ours to remove");
    std::fs::remove_file(&socket).unwrap();
    let lock = sticky.join("broker.sock.lock");
    std::os::unix::fs::chown(&lock, Some(12345), None).unwrap();
    let said = says();
    assert!(said.contains("broker.sock.lock") && said.contains("remove it"), "{said}");
}

#[test]
fn a_file_in_place_of_the_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("precious");
    std::fs::write(&socket, "data").unwrap();
    let mut command = command(directory.path(), &Setup::default());
    let said = refuses(command.arg("--socket").arg(&socket), directory.path());
    assert!(said.contains("is not a socket"), "{said}");
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "data");
}

#[test]
fn a_socket_that_was_put_in_place_of_ours_stays() {
    let mut daemon = Daemon::start();
    std::fs::remove_file(&daemon.socket).unwrap();
    let _others = UnixListener::bind(&daemon.socket).unwrap();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(daemon.socket.exists());
}

/// The daemon's command, run by a shell that passes it `stdin` as the service manager would.
fn activated(directory: &Path, count: u32, passed: Stdio, close: bool) -> Command {
    let daemon = command(directory, &Setup::default());
    let log = std::fs::File::create(directory.join("log")).unwrap();
    let pass = if close { "3<&-" } else { "3<&0" };
    let script = format!(
        "LISTEN_PID=$$ LISTEN_FDS={count}; export LISTEN_PID LISTEN_FDS; \
         exec \"$@\" {pass} 4<&0 </dev/null"
    );
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg("sh").arg(daemon.get_program()).args(daemon.get_args());
    shell.arg("--socket").arg(directory.join("unused.sock"));
    shell.stdin(passed).stdout(Stdio::null()).stderr(log);
    shell
}

#[test]
fn socket_activation() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("passed.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // A client may be there before the daemon is.
    let mut client = Raw::connect(&path);
    let passed = Stdio::from(OwnedFd::from(listener));
    let mut child = activated(directory.path(), 1, passed, false).spawn().unwrap();
    client.call("Leases", json!({})).ok();
    assert!(!directory.path().join("unused.sock").exists());
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(path.exists(), "the file is the service manager's");
}

#[test]
fn socket_activation_with_something_else() {
    let directory = tempfile::tempdir().unwrap();
    let says = |count, passed: OwnedFd, close, what: &str| {
        let mut command = activated(directory.path(), count, passed.into(), close);
        let said = refuses(&mut command, directory.path());
        assert!(said.contains("socket activation") && said.contains(what), "{what}: {said}");
    };
    let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    says(1, file(), false, "not a socket");
    says(1, file(), true, "Bad file descriptor");
    says(2, file(), false, "one is needed");
    let datagram = UnixDatagram::unbound().unwrap();
    says(1, datagram.into(), false, "not a stream socket");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    says(1, tcp.into(), false, "not of AF_UNIX");
    let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    says(1, connected.into(), false, "not listening");
}

#[test]
fn each_line_of_a_json_log_is_an_object() {
    let mut daemon = Daemon::with(Setup::default().argument("--log-format", "json"));
    let mut client = daemon.connect();
    crate::common::cycle(&mut client, crate::DEVICE);
    client.call("Acquire", json!({ "vm": "a", "devices": ["0000:ff:00.0"] })).error("NoSuchDevice");
    let log = daemon.end_and_log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let begins = lines.iter().find(|line| line["message"] == "lease begins").unwrap();
    assert_eq!(begins["devices"], crate::DEVICE);
    assert_eq!(begins["level"], "INFO");
    assert!(begins["timestamp"].is_string());
}

#[test]
fn a_missing_policy() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.toml");
    let mut command = command(directory.path(), &Setup::default());
    let said = refuses(command.arg("--policy").arg(&missing), directory.path());
    assert!(said.contains(missing.to_str().unwrap()), "{said}");
    // It says what one looks like.
    assert!(said.contains("[[tenant]]"), "{said}");
}

#[test]
fn a_policy_that_is_no_text() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command(directory.path(), &Setup::default());
    let said = refuses(command.arg("--policy").arg(directory.path()), directory.path());
    assert!(said.contains("can't read the policy"), "{said}");
}

#[test]
fn a_policy_that_others_can_write_to() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.policy.toml");
    let beside = || command(directory.path(), &Setup::default());
    let named = || {
        let mut command = beside();
        command.arg("--policy").arg(&file);
        command
    };
    for make in [&beside as &dyn Fn() -> Command, &named] {
        for mode in [0o664, 0o646] {
            let mut command = make();
            std::fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            assert!(refuses(&mut command, directory.path()).contains("chmod go-w"));
        }
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        if nix::unistd::geteuid().is_root() {
            let mut command = make();
            std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
            assert!(refuses(&mut command, directory.path()).contains("chown root"));
            std::os::unix::fs::chown(&file, Some(0), None).unwrap();
        }
    }
}

#[test]
fn a_policy_that_never_comes() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = command(directory.path(), &Setup::default());
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).unwrap();
    command.arg("--policy").arg(&fifo).args(["--policy-deadline", "300"]);
    let said = refuses(&mut command, directory.path());
    assert!(said.contains("fifo: the file, or where its users are looked up"), "{said}");
}

#[test]
fn a_broken_policy() {
    let directory = tempfile::tempdir().unwrap();
    for broken in ["version = 1\n[[tenant]\n", "version = 1\nnonsense = 2\n"] {
        let mut command = command(directory.path(), &Setup::policy(broken));
        let said = refuses(&mut command, directory.path());
        let place = "host.policy.toml:2";
        assert!(said.contains(place), "{said}");
    }
}

#[test]
fn a_topology_that_can_not_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let broken = Setup { topology: "kernel = 7\n".into(), ..Setup::default() };
    let said = refuses(&mut command(directory.path(), &broken), directory.path());
    assert!(said.contains("host.toml"), "{said}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-brokerd"));
    let mut child = command.args(["--sim", "/nonexistent.toml"]).stderr(Stdio::piped()).spawn();
    let child = child.as_mut().unwrap();
    let said = read_all(child.stderr.take().unwrap());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(said.contains("/nonexistent.toml") && said.contains("No such file"), "{said}");
}

#[test]
fn the_socket_is_for_everybody() {
    let daemon = Daemon::start();
    let mode = |path: &Path| {
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path).unwrap().permissions())
            & 0o777
    };
    assert_eq!(mode(&daemon.socket), 0o666);
    assert_eq!(mode(daemon.socket.parent().unwrap()), 0o755);
}

#[test]
fn the_socket_is_for_everybody_whatever_the_umask() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = command(directory.path(), &Setup::default());
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("umask 077; exec \"$@\"").arg("sh");
    shell.arg(daemon.get_program()).args(daemon.get_args());
    shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let socket = directory.path().join("run/broker.sock");
    let daemon = Daemon::spawn(directory, socket, shell);
    let mode = std::fs::metadata(&daemon.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
}

/// The example that is shown to those who have no policy is a policy.
#[test]
fn the_example_is_good() {
    let example = include_str!("../../src/launcher/example.policy.toml");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, example.replace("\"kvm\"", "0")).unwrap();
    let path = file.path().to_str().unwrap();
    Daemon::with(Setup::default().argument("--policy", path));
}
