//! `vfio-broker exec`, against a broker on a simulated kernel.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

#[path = "../cli/broker.rs"]
mod broker;
#[path = "../common/brokerd.rs"]
mod brokerd;
#[path = "../common/children.rs"]
mod children;
mod inherit;
mod interpose;
mod memlock;
#[path = "../common/until.rs"]
mod until;

use broker::Broker;
use serde_json::Value;
use std::process::{Command, Output, Stdio};
use until::until;

const NIC: &str = "0000:03:00.0";
const GPU: &str = "0000:01:00.0";
const AUDIO: &str = "0000:01:00.1";

fn vfio_broker(broker: &Broker) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
    command.stdin(Stdio::null()).arg("--socket").arg(broker.socket());
    command
}

/// `exec` for a device, with more options; the program is to follow.
fn exec(broker: &Broker, options: &[&str]) -> Command {
    let mut command = vfio_broker(broker);
    command.args(["exec", "--vm", "web1", "--device", NIC]).args(options).arg("--");
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code().unwrap(), text(&stdout).to_owned(), text(&stderr).to_owned())
}

/// The leases that there are.
fn leases(broker: &Broker) -> Vec<Value> {
    let (code, said, error) = run(vfio_broker(broker).args(["--json", "leases"]));
    assert_eq!(code, 0, "{error}");
    let list: Value = serde_json::from_str(&said).unwrap();
    list["leases"].as_array().unwrap().clone()
}

/// Waits for what the broker learns from a pipe that hangs up.
fn no_lease_is_left(broker: &Broker) {
    until("no lease is left", || leases(broker).is_empty());
}
