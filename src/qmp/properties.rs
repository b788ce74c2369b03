//! What must hold for any bytes from a monitor: checked by a fuzz target and by the tests.

#![allow(clippy::unwrap_used)] // a failure is what is looked for

use super::lines::Lines;
use super::message::{Message, parse};
use serde_json::{Value, json};

/// No bytes upset the reader, and what it has understood of a line is what the line says.
pub fn monitor(data: &[u8]) {
    let mut lines = Lines::default();
    for part in data.chunks(7) {
        lines.push(part);
        loop {
            match lines.next_line() {
                Ok(Some(line)) => check(&line),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

fn check(line: &[u8]) {
    let Ok(message) = parse(line) else { return };
    let said: Value = serde_json::from_slice(line).unwrap();
    let part = |name: &str| said.get(name).cloned().unwrap_or_default();
    match message {
        Message::Greeting(version) => {
            let qemu = &said["QMP"]["version"]["qemu"];
            let numbers = ["major", "minor", "micro"].map(|name| qemu[name].clone());
            assert_eq!(numbers, [version.major, version.minor, version.micro].map(|n| json!(n)));
        }
        Message::Return { id, value } => assert_eq!((id, value), (part("id"), part("return"))),
        Message::Error { id, class, desc } => {
            assert_eq!(id, part("id"));
            assert_eq!(
                [json!(class), json!(desc)],
                ["class", "desc"].map(|n| said["error"][n].clone())
            );
        }
        Message::Event(event) => {
            assert_eq!((json!(event.name), event.data), (part("event"), part("data")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a QEMU sends, to be spoilt.
    const LINES: [&str; 5] = [
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#,
        r#"{"return": {"fd": 13}, "id": "vfio-broker-1-2"}"#,
        r#"{"error": {"class": "GenericError", "desc": "Bus 'x' not found"}, "id": 7}"#,
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "DEVICE_DELETED", "data": {"device": "d"}}"#,
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
    ];

    proptest! {
        #[test]
        fn no_bytes_upset_the_reader(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            monitor(&data);
        }

        #[test]
        fn no_spoilt_line_upsets_the_reader(
            which in 0..LINES.len(),
            at in any::<prop::sample::Index>(),
            with in proptest::collection::vec(any::<u8>(), 0..4),
            gone in 0..8usize,
        ) {
            let mut data = format!("{}\r\n", LINES[which]).into_bytes();
            monitor(&data);
            let from = at.index(data.len());
            let to = (from + gone).min(data.len());
            data.splice(from..to, with);
            monitor(&data);
        }
    }
}
