//! SetMemlock with somebody else's lease, for more than the policy has, and for nobody in particular.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, Held, Setup, as_uid, beside, policy};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde_json::{Value, json};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

const GIB: u64 = 1 << 30;

/// A daemon that raises limits to a GiB.
fn daemon() -> Daemon {
    Daemon::with(Setup::policy(raising()))
}

fn raising() -> String {
    policy("").replace("anyone = true", "anyone = true\nmemlock = \"1GiB\"")
}

/// Makes calls on a lease, and checks that the limit of this process, which makes them, stays.
fn with_lease(daemon: &Daemon, calls: impl FnOnce(&mut Raw, &Held)) {
    let before = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    beside(daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        calls(&mut client, &lease);
        client.call("GetFds", lease.key()).ok();
    });
    assert_eq!(getrlimit(Resource::RLIMIT_MEMLOCK).unwrap(), before);
}

/// A connection that another process has made: a child that connects and then is `program`.
fn connected_by(daemon: &Daemon, program: &str, words: &[&str]) -> (Raw, Child) {
    let stream =
        socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let (fd, address) = (stream.as_raw_fd(), UnixAddr::new(&daemon.socket).unwrap());
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
    #[allow(unsafe_code)]
    // SAFETY: between fork and exec it makes one system call on what was made before, and allocates
    // nothing.
    unsafe {
        command.pre_exec(move || Ok(connect(fd, &address)?));
    }
    let child = command.spawn().unwrap();
    (Raw::of(stream.into()), child)
}

#[test]
fn a_lease_that_is_not_there_and_a_key_that_is_not_its() {
    with_lease(&daemon(), |client, lease| {
        let other = Held::acquire(client, "0000:66:00.0", "container");
        let (id, key) = (&lease.reply["lease"], &lease.reply["key"]);
        for (lease, key) in [
            (&json!("0123456789abcdef"), key),
            (&json!("nobody's"), key),
            (&json!(""), key),
            (id, &json!("")),
            (id, &json!("0".repeat(32))),
            (id, &other.reply["key"]),
        ] {
            let request = json!({ "lease": lease, "key": key, "bytes": GIB });
            client.call("SetMemlock", request).error("NoSuchLease");
        }
        client.call("Release", other.key()).ok();
        let over = other.with(json!({ "bytes": GIB }));
        client.call("SetMemlock", over).error("NoSuchLease");
    });
}

#[test]
fn parameters_that_make_no_sense() {
    with_lease(&daemon(), |client, lease| {
        let good = json!({ "bytes": 4096 });
        for more in [
            json!({}),
            json!({ "bytes": -1 }),
            json!({ "bytes": 1.5 }),
            json!({ "bytes": "4096" }),
            json!({ "bytes": null }),
            json!({ "bytes": 4096, "pid": 1 }),
        ] {
            client.call("SetMemlock", lease.with(more)).bad("parameters");
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        let with_file =
            client.call_with("SetMemlock", lease.with(good), &[std::os::fd::AsFd::as_fd(&file)]);
        with_file.bad("fds");
    });
}

#[test]
fn more_than_the_ceiling() {
    with_lease(&daemon(), |client, lease| {
        for bytes in [GIB + 1, i64::MAX as u64, u64::MAX] {
            let request = lease.with(json!({ "bytes": bytes }));
            let error = client.call("SetMemlock", request).error("OverLimit");
            for (field, is) in [("most", GIB), ("asked", bytes)] {
                assert_eq!(error[field], is, "{error}");
            }
            assert_eq!(error["limit"], "memlock");
            assert!(error["advice"].as_str().unwrap().contains("in the policy"), "{error}");
        }
    });
}

#[test]
fn a_policy_without_a_ceiling() {
    with_lease(&Daemon::start(), |client, lease| {
        for bytes in [0, 1, GIB] {
            let request = lease.with(json!({ "bytes": bytes }));
            let error = client.call("SetMemlock", request).error("Denied");
            assert!(error["rule"].as_str().unwrap().contains("without memlock"), "{error}");
        }
    });
}

/// Whoever knows a key can use the lease, but what its processes may lock its own tenant's policy says.
#[test]
fn a_lease_of_another_tenant() {
    let other = "[[tenant]]\nname = \"other\"\nuser = 12345\nmemlock = \"1GiB\"\n\
                 devices = [\"8086:10d3\"]\n[[tenant]]";
    let daemon = Daemon::with(Setup::policy(raising().replacen("[[tenant]]", other, 1)));
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(daemon.directory(), all).unwrap();
    with_lease(&daemon, |_, lease| {
        let request = lease.with(json!({ "bytes": GIB }));
        as_uid(12345, || {
            let error = daemon.connect().call("SetMemlock", request.clone()).error("Denied");
            assert_eq!(error["rule"], "a lease is one tenant's");
        });
    });
}

#[test]
fn a_peer_that_has_ended() {
    let daemon = daemon();
    with_lease(&daemon, |_, lease| {
        let (mut client, mut child) = connected_by(&daemon, "true", &[]);
        // It is served like anybody; the limit of a process that is no more can't be raised, and its
        // pid may be another's.
        child.wait().unwrap();
        client.call("Leases", json!({})).ok();
        let request = lease.with(json!({ "bytes": GIB }));
        match client.call("SetMemlock", request) {
            Reply::Error(name, parameters) if name.ends_with(".Unsupported") => {
                assert_eq!(parameters["what"], "SetMemlock");
            }
            Reply::Error(name, parameters) if name.ends_with(".Kernel") => {
                assert_eq!(
                    (&parameters["call"], &parameters["name"]),
                    (&json!("prlimit"), &json!("ESRCH"))
                );
            }
            other => panic!("{other:?}"),
        }
    });
}

/// What a process may lock, soft and hard, as /proc says it.
fn limits(child: &Child) -> Value {
    let text = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Max locked memory")).unwrap();
    let words: Vec<_> = line.split_whitespace().take(2).map(str::to_owned).collect();
    json!(words)
}

#[test]
fn it_is_the_process_that_connected_whose_limit_is_raised_and_never_lowered() {
    let daemon = daemon();
    with_lease(&daemon, |_, lease| {
        let words = ["--memlock=8388608:8388608", "sleep", "600"];
        let (mut client, mut child) = connected_by(&daemon, "prlimit", &words);
        crate::common::until("its limit is low", || {
            limits(&child) == json!(["8388608", "8388608"])
        });
        let mut set = |bytes: u64| client.call("SetMemlock", lease.with(json!({ "bytes": bytes })));
        match set(1 << 26) {
            Reply::Ok(reply, _) => {
                assert_eq!(reply["bytes"], 1 << 26);
                assert_eq!(limits(&child), json!(["67108864", "67108864"]));
                assert_eq!(set(4096).ok().0["bytes"], 1 << 26);
                assert_eq!(limits(&child), json!(["67108864", "67108864"]));
            }
            Reply::Error(name, parameters) => {
                assert!(name.ends_with(".Kernel"), "{name}");
                assert!(parameters["advice"].as_str().unwrap().contains("CAP_SYS_RESOURCE"));
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
    });
}
