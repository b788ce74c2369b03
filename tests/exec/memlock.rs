//! The memlock limit of programs.

use super::*;
use std::os::unix::fs::PermissionsExt;

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_RESOURCE: u32 = 24;

/// Whether this process has it, and with it the broker and the programs that it starts.
fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    u64::from_str_radix(set, 16).unwrap() >> number & 1 == 1
}

const LIMIT: &str = "--memlock=8388608:8388608";

/// A broker whose policy lets limits be raised to a GiB.
fn broker(directory: &tempfile::TempDir) -> Broker {
    let at = |name: &str| directory.path().join(name);
    let from = |name: &str| std::fs::read_to_string(format!("tests/topologies/{name}")).unwrap();
    std::fs::write(at("w.toml"), from("workstation.toml")).unwrap();
    let policy =
        from("workstation.policy.toml").replace("user = 1000", "user = 1000\nmemlock = \"1GiB\"");
    let policy = policy.replace("anyone = true", "anyone = true\nmemlock = \"1GiB\"");
    std::fs::write(at("w.policy.toml"), policy).unwrap();
    Broker::start(at("w.toml").to_str().unwrap())
}

/// `exec` by somebody who may lock 8 MiB.
fn exec_with_8_mib(broker: &Broker, options: &[&str]) -> Command {
    let inner = exec(broker, options);
    let mut command = Command::new("prlimit");
    command.arg(LIMIT).arg(inner.get_program()).args(inner.get_args()).stdin(Stdio::null());
    command
}

/// Something that is called like QEMU and says its limit, in KiB.
fn qemu(directory: &tempfile::TempDir) -> std::path::PathBuf {
    let path = directory.path().join("qemu-system-x86_64");
    std::fs::write(&path, "#!/bin/sh\nulimit -S -l\n").unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn the_limit_is_raised_as_far_as_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let (broker, qemu) = (broker(&directory), qemu(&directory));
    let cases: [(&[&str], &[&str], &str, &str); 4] = [
        (&["--memlock", "64M"], &[], "65536\n", "memlock limit: 64 MiB (--memlock)"),
        (
            &["--memlock", "auto"],
            &["-m", "512"],
            "786432\n",
            "768 MiB: 512 MiB of -m 512, and 256 MiB",
        ),
        (
            &["--memlock", "auto", "--inherit"],
            &["-m", "size=256M"],
            "524288\n",
            "512 MiB: 256 MiB of",
        ),
        (&["--memlock", "4096"], &[], "8192\n", ""),
    ];
    for (options, arguments, limit, word) in cases {
        let mut command = exec_with_8_mib(&broker, options);
        let (code, said, error) = run(command.arg(&qemu).args(arguments));
        if code == 1 && !has_capability(CAP_SYS_RESOURCE) {
            assert!(error.contains("it wants CAP_SYS_RESOURCE"), "{error}");
            continue;
        }
        assert_eq!((code, &*said), (0, limit), "{error}");
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_limit_that_one_may_raise_oneself_needs_no_policy() {
    let directory = tempfile::tempdir().unwrap();
    let (broker, qemu) = (Broker::start("workstation.toml"), qemu(&directory));
    let inner = exec(&broker, &["--memlock", "64KiB"]);
    let mut command = Command::new("prlimit");
    command.arg("--memlock=4096:131072").arg(inner.get_program()).args(inner.get_args());
    let (code, said, error) = run(command.stdin(Stdio::null()).arg(&qemu));
    assert_eq!((code, &*said), (0, "64\n"), "{error}");
}

#[test]
fn what_is_too_much_is_said_in_bytes_and_the_program_not_started() {
    let directory = tempfile::tempdir().unwrap();
    let (broker, qemu) = (broker(&directory), qemu(&directory));
    let mut command = exec_with_8_mib(&broker, &["--memlock", "auto"]);
    let (code, said, error) = run(command.arg(&qemu).args(["-m", "4G"]));
    assert_eq!((code, &*said), (1, ""), "{error}");
    for word in ["needed: 4352 MiB: 4096 MiB of -m 4G", "allowed by the policy: 1 GiB, as memlock"]
    {
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
    assert!(!error.contains("memlock limit:"), "what was refused is told as done: {error}");
    no_lease_is_left(&broker);
    let none = Broker::start("workstation.toml");
    let mut command = exec_with_8_mib(&none, &["--memlock", "64M"]);
    let (code, _, error) = run(command.arg("true"));
    assert_eq!(code, 3, "{error}");
    assert!(error.contains("needed: 64 MiB") && error.contains("without memlock"), "{error}");
    no_lease_is_left(&none);
}

#[test]
fn without_it_a_guest_that_does_not_fit_is_warned_of() {
    let directory = tempfile::tempdir().unwrap();
    let (broker, qemu) = (broker(&directory), qemu(&directory));
    let (code, said, error) = run(exec_with_8_mib(&broker, &[]).arg(&qemu).args(["-m", "512"]));
    assert_eq!((code, &*said), (0, "8192\n"), "{error}");
    // CAP_IPC_LOCK knows no limit.
    let unlimited = has_capability(CAP_IPC_LOCK);
    assert_eq!(error.contains("-> --memlock auto"), !unlimited, "{error}");
    let (code, _, error) = run(exec_with_8_mib(&broker, &["--memlock", "auto"]).arg("true"));
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("true has no -m of a QEMU"), "{error}");
    let (code, ..) = run(exec(&broker, &["--memlock", "lots"]).arg("true"));
    assert_eq!(code, 2);
}
