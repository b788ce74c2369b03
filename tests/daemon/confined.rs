//! A process that can't give up what its role does not need does not begin.

use crate::DEVICE;
use crate::common::{Daemon, Setup, children, command, read_all, skipped, until};
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
fn a_keeper_that_keeps_root_s_rights_does_not_begin_and_says_so() {
    if !nix::unistd::geteuid().is_root() {
        return skipped("only root has rights to give up");
    }
    let mut daemon = start(&[libc::SYS_capset]);
    let call = json!({ "vm": "v", "devices": [DEVICE] });
    let error = daemon.connect().call("Acquire", call).error("Kernel");
    assert_eq!((&error["call"], &error["name"]), (&json!("capset"), &json!("EPERM")), "{error}");
    until("it has ended", || children(daemon.launcher(), "vfiob-keeper").is_empty());
    let log = daemon.end_and_log();
    assert!(log.contains("a keeper would have more rights than it should"), "{log}");
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
