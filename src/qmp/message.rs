//! A line of QMP, understood.

use serde_json::{Map, Value};

/// QEMU's version, as its greeting tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, as `DEVICE_DELETED`.
    pub name: String,
    /// What goes with it; `null` where nothing does.
    pub data: Value,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    Greeting(Version),
    Return { id: Value, value: Value },
    Error { id: Value, class: String, desc: String },
    Event(Event),
}

/// Understands a line; the error says what is wrong with it.
pub(super) fn parse(line: &[u8]) -> Result<Message, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let Value::Object(mut message) = value else {
        return Err("a line that is no object".into());
    };
    if let Some(greeting) = message.get("QMP") {
        return version(greeting).map(Message::Greeting).ok_or("a greeting without version".into());
    }
    if let Some(Value::String(name)) = message.get("event") {
        let name = name.clone();
        let data = message.remove("data").unwrap_or_default();
        return Ok(Message::Event(Event { name, data }));
    }
    let id = message.remove("id").unwrap_or_default();
    if let Some(error) = message.get("error") {
        let text = |name| error.get(name).and_then(Value::as_str).map(str::to_owned);
        let (Some(class), Some(desc)) = (text("class"), text("desc")) else {
            return Err("an error without class and desc".into());
        };
        return Ok(Message::Error { id, class, desc });
    }
    match message.remove("return") {
        Some(value) => Ok(Message::Return { id, value }),
        None => Err(format!("an object with {}", names(&message))),
    }
}

fn version(greeting: &Value) -> Option<Version> {
    let numbers = greeting.get("version")?.get("qemu")?;
    let number = |name| numbers.get(name)?.as_u64()?.try_into().ok();
    Some(Version { major: number("major")?, minor: number("minor")?, micro: number("micro")? })
}

fn names(message: &Map<String, Value>) -> String {
    let names: Vec<_> = message.keys().take(5).map(|name| format!("{name:.20?}")).collect();
    if names.is_empty() { "nothing in it".into() } else { names.join(", ") }
}
