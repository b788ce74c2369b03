//! The client of `docs/acquire.py`, as it is there, against a broker on a simulated kernel: the wire
//! needs nothing but a standard library.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

#[path = "cli/broker.rs"]
mod broker;
#[path = "common/brokerd.rs"]
mod brokerd;
#[path = "common/children.rs"]
mod children;

use broker::Broker;
use std::process::{Command, Output};

fn acquire(broker: &Broker, device: &str) -> Output {
    Command::new("python3")
        .arg("docs/acquire.py")
        .arg(broker.socket())
        .args(["python1", device])
        .output()
        .unwrap_or_else(|error| panic!("this test needs python3: {error}"))
}

#[test]
fn twenty_lines_of_python_get_the_open_files() {
    let program = std::fs::read_to_string("docs/acquire.py").unwrap();
    assert!(program.lines().count() < 20);
    let broker = Broker::start("workstation.toml");
    let output = acquire(&broker, "0000:03:00.0");
    let said = String::from_utf8_lossy(&output.stdout);
    let went_wrong = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{went_wrong}");
    for kind in ["'container", "'group 15'", "'lease'"] {
        assert!(said.contains(kind), "{said}");
    }
    // The program has ended, so its lease has too; what is denied is denied in its words.
    let output = acquire(&broker, "0000:06:00.0");
    let went_wrong = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(went_wrong.contains("org.vfiobroker.Broker.Denied"), "{went_wrong}");
    assert!(went_wrong.contains("the host runs from this disk"), "{went_wrong}");
}
