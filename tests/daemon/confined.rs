//! A process that can't give up what its role does not need does not begin.

use crate::common::{Daemon, Setup, command, read_all, skipped};
use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use serde_json::json;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// A daemon's command, in a container that answers these system calls with EPERM.
fn contained(directory: &std::path::Path, setup: &Setup, refused: &[libc::c_long]) -> Command {
    let rules = refused.iter().map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let mut command = command(directory, setup);
    let install = move || apply_filter(&program).map_err(|_| std::io::Error::last_os_error());
    #[allow(unsafe_code)]
    // SAFETY: between fork and exec it makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(install)
    };
    command
}

fn start(refused: &[libc::c_long]) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("run/broker.sock");
    let command = contained(directory.path(), &Setup::default(), refused);
    Daemon::spawn(directory, socket, command)
}

/// What one that does not start says.
fn refusal(setup: &Setup, refused: &[libc::c_long]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let mut command = contained(directory.path(), setup, refused);
    command.arg("--socket").arg(directory.path().join("run/broker.sock"));
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let said = read_all(child.stderr.take().unwrap());
    assert_eq!(child.wait().unwrap().code(), Some(1), "{said}");
    said
}

#[test]
fn who_would_read_the_policy_with_all_of_root_s_rights_does_not_begin() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("only root has rights to give up");
    }
    let said = refusal(&Setup::default(), &[libc::SYS_capset]);
    assert!(said.contains("capset on the process vfiob-policy"), "{said}");
}

#[test]
fn a_broker_that_stays_root_does_not_begin() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("only root can become others");
    }
    let said = refusal(&Setup::default(), &[libc::SYS_setresuid]);
    assert!(said.contains("setresuid on the process vfiob-broker"), "{said}");
    // Its lines come from a process that stays root neither.
    assert!(said.contains("nobody writes the log: setresuid"), "{said}");
}

/// All that a system can lack of a sandbox.
const MISSING: [libc::c_long; 2] = [libc::SYS_seccomp, libc::SYS_landlock_create_ruleset];

#[test]
fn what_a_sandbox_lacks_is_named_and_required_only_where_it_is_to_be() {
    let require = |refused: &[libc::c_long]| {
        refusal(&Setup::default().argument("--sandbox", "require"), refused)
    };
    for (call, name) in MISSING.into_iter().zip(["seccomp: ", "landlock_create_ruleset: "]) {
        let said = require(&[call]);
        assert!(said.contains("--sandbox=require") && said.contains(name), "{said}");
        assert!(said.contains("EPERM"), "{said}");
    }
    let said = require(&MISSING);
    assert!(said.contains("seccomp: ") && said.contains("landlock_create_ruleset: "), "{said}");
    // Else it starts, and says so.
    let daemon = start(&MISSING);
    let lacks =
        ["system calls not filtered (seccomp: ", "files not limited (landlock_create_ruleset: "];
    let (status, _) = daemon.connect().call("Status", json!({})).ok();
    for lack in lacks {
        assert!(daemon.log().contains(lack), "{}", daemon.log());
        assert!(status["sandbox"].as_str().unwrap().contains(lack), "{status}");
    }
}

#[test]
fn what_is_in_force_is_said_and_can_be_left_out() {
    let said = |setup| {
        let daemon = Daemon::with(setup);
        let (status, _) = daemon.connect().call("Status", json!({})).ok();
        let said = status["sandbox"].as_str().unwrap().to_owned();
        // In the log as it is in the status, but for the broker's own rights.
        assert!(daemon.log().contains(said.split_once("; ").unwrap().1), "{}", daemon.log());
        said
    };
    let all = said(Setup::default());
    assert!(
        all.contains("system calls filtered in broker, keeper, receiver, closer, holders, log"),
        "{all}"
    );
    let none = said(Setup::default().argument("--sandbox", "off"));
    assert!(none.contains("system calls not filtered (--sandbox=off)"), "{none}");
}
