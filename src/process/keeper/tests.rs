//! A keeper serves newer brokers until its leases have ended: its messages as version 1 has them, which
//! `frozen-1.jsonl` keeps, and which nobody changes with the types.

use super::*;
use crate::process::link::Call;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const FROZEN: &str = include_str!("frozen-1.jsonl");

/// The messages of this kind and name.
fn frozen(kind: &str, name: &str) -> Vec<Value> {
    let lines = FROZEN.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let all: Vec<_> = lines.filter(|line| line[kind] == name).collect();
    assert!(!all.is_empty(), "version 1 has {name}");
    all.into_iter().map(|mut line| line["message"].take()).collect()
}

/// Whether who knows `old` alone, and skips what it does not know, reads the same in `new`.
fn says_as_much(new: &Value, old: &Value) -> bool {
    match (new, old) {
        (Value::Object(new), Value::Object(old)) => {
            old.iter().all(|(name, old)| new.get(name).is_some_and(|new| says_as_much(new, old)))
        }
        (Value::Array(new), Value::Array(old)) => {
            new.len() == old.len() && new.iter().zip(old).all(|(new, old)| says_as_much(new, old))
        }
        _ => new == old,
    }
}

/// What today's broker sends is read by yesterday's keeper. `added` are fields that came later.
fn is_understood<T: Call + Serialize + DeserializeOwned>(added: Value) -> &'static str {
    let name = T::NAME.rsplit('.').next().unwrap();
    for old in frozen("call", name) {
        let mut today = old.clone();
        today.as_object_mut().unwrap().extend(added.as_object().unwrap().clone());
        let call: T = serde_json::from_value(today).unwrap();
        let new = serde_json::to_value(&call).unwrap();
        assert!(says_as_much(&new, &old), "{name}:\n{new}\n{old}");
    }
    name
}

/// What yesterday's keeper sends and writes down is read by today's broker, whole.
fn is_read<T: Serialize + DeserializeOwned>(name: &'static str) -> &'static str {
    for old in frozen("reply", name) {
        let read: T = serde_json::from_str(&old.to_string()).unwrap();
        let new = serde_json::to_value(&read).unwrap();
        assert!(says_as_much(&new, &old), "{name}:\n{new}\n{old}");
    }
    name
}

#[test]
fn keepers_of_version_1_understand_what_they_are_asked() {
    let none = || json!({});
    let checked = [
        is_understood::<Open>(none()),
        is_understood::<Reopen>(none()),
        is_understood::<Deliver>(none()),
        is_understood::<Undo>(none()),
        is_understood::<Map>(none()),
        is_understood::<Unmap>(none()),
        is_understood::<Memlock>(none()),
        is_understood::<Check>(none()),
        is_understood::<End>(none()),
        is_understood::<Mappings>(none()),
        is_understood::<Watch>(none()),
        is_understood::<Revoke>(json!({ "left": 30_000 })),
        is_understood::<Confirm>(none()),
    ];
    all_were_checked("call", &checked);
}

#[test]
fn what_keepers_of_version_1_say_and_write_down_is_read() {
    let checked = [
        is_read::<Opened>("Opened"),
        is_read::<Changed>("Changed"),
        is_read::<Delivered>("Delivered"),
        is_read::<Unmapped>("Unmapped"),
        is_read::<Raised>("Raised"),
        is_read::<MappingsPage>("MappingsPage"),
        is_read::<Told>("Told"),
        is_read::<Failed>("Failed"),
        is_read::<Saved>("Saved"),
    ];
    all_were_checked("reply", &checked);
}

fn all_were_checked(kind: &str, checked: &[&str]) {
    for line in FROZEN.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        if let Some(name) = line[kind].as_str() {
            assert!(checked.contains(&name), "{name} is spoken no more");
        }
    }
}
