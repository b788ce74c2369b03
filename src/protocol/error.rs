//! The errors of the interface, as they are on the wire: a name, and what goes with it.

use super::Processes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who holds something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The lease's public name.
    pub lease: String,
    /// What its holder called the VM.
    pub vm: String,
    /// The tenant it belongs to.
    pub tenant: String,
    /// The uid that acquired it.
    pub uid: u32,
    /// The process that acquired it.
    pub pid: i32,
}

/// A function that keeps its group from being viable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Which function.
    pub bdf: String,
    /// The driver it is on, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// What to do about it, for those who may have it; none for what the host can't spare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl std::fmt::Display for Blocker {
    /// Where it is, without the fix.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.driver {
            Some(driver) => write!(f, "{} is on {driver}", self.bdf),
            None => write!(f, "{} has no driver", self.bdf),
        }
    }
}

impl Blocker {
    /// Where it is, and what to do about it.
    pub fn with_fix(&self) -> String {
        let fix = self.fix.as_ref().map_or(String::new(), |fix| format!(": {fix}"));
        format!("{self}{fix}")
    }
}

/// Whom it waits for that a device becomes free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Until {
    /// Whoever still has it open closes it.
    Holder,
    /// An administrator takes it off its driver: nothing else shows that it is closed.
    Administrator,
    /// The kernel has answered, which the broker sees by itself. What this version does not know
    /// reads as this one.
    #[default]
    #[serde(other)]
    Kernel,
}

/// Everything that a call can fail with: data, and nothing about what to do. That is sent beside it,
/// see [`Error::to_json`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "error", content = "parameters")]
#[allow(missing_docs)] // each field is described in the .varlink file
pub enum Error {
    /// The policy does not allow it.
    #[serde(rename = "org.vfiobroker.Broker.Denied")]
    #[error("denied by {rule}: {reason}")]
    Denied {
        rule: String,
        reason: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        line: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        device: Option<Box<str>>,
    },
    /// A function of the group is on a driver that is not VFIO's.
    #[serde(rename = "org.vfiobroker.Broker.NotViable")]
    #[error("group {group} is not viable: {}", list(.blockers))]
    NotViable { group: u32, blockers: Vec<Blocker> },
    /// Devices of a group that is to be given are not named.
    #[serde(rename = "org.vfiobroker.Broker.Unnamed")]
    #[error(
        "group {group} is given as a whole, and {} is not named: each of its devices must be, to use \
         it or to withhold it",
        .companions.join(", ")
    )]
    Unnamed { group: u32, companions: Vec<String> },
    /// Somebody has it.
    #[serde(rename = "org.vfiobroker.Broker.Busy")]
    #[error("{device} is busy{}", held_by(.holder, .since))]
    Busy {
        device: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        holder: Option<Box<Holder>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        open_in: Option<Box<Processes>>,
    },
    /// Nobody has it, and the kernel has not shown yet that it is free.
    #[serde(rename = "org.vfiobroker.Broker.Quarantined")]
    #[error("{device} is not known to be free yet: {reason}")]
    Quarantined {
        device: String,
        since: u64,
        reason: String,
        #[serde(default)]
        until: Until,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        holder: Option<Box<Holder>>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        unbind: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        open_in: Option<Box<Processes>>,
    },
    /// It does not fit with what is there.
    #[serde(rename = "org.vfiobroker.Broker.Conflict")]
    #[error("{what}: {why}")]
    Conflict { what: String, why: String },
    /// A limit would be passed.
    #[serde(rename = "org.vfiobroker.Broker.OverLimit")]
    #[error("over the limit: {limit} is at most {most}, this would make {asked}")]
    OverLimit { limit: String, most: u64, asked: u64 },
    /// There is no such device.
    #[serde(rename = "org.vfiobroker.Broker.NoSuchDevice")]
    #[error("no such device: {device}")]
    NoSuchDevice { device: String },
    /// There is no such lease, or that is not its key.
    #[serde(rename = "org.vfiobroker.Broker.NoSuchLease")]
    #[error("no lease {lease}, or that is not its key")]
    NoSuchLease { lease: String },
    /// The request makes no sense.
    #[serde(rename = "org.vfiobroker.Broker.BadRequest")]
    #[error("bad request: {field}: {reason}")]
    BadRequest { field: String, reason: String },
    /// This host, or this broker, can't do that.
    #[serde(rename = "org.vfiobroker.Broker.Unsupported")]
    #[error("{what} is not supported: {why}")]
    Unsupported { what: String, why: String },
    /// The kernel refused.
    #[serde(rename = "org.vfiobroker.Broker.Kernel")]
    #[error("{call} on {object} failed: {name} ({errno}){}", noted(.note))]
    Kernel {
        call: String,
        object: String,
        errno: i32,
        name: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<Box<str>>,
    },
    /// Varlink's own: no such interface.
    #[serde(rename = "org.varlink.service.InterfaceNotFound")]
    #[error("no interface {interface}")]
    InterfaceNotFound { interface: String },
    /// Varlink's own: no such method.
    #[serde(rename = "org.varlink.service.MethodNotFound")]
    #[error("no method {method}")]
    MethodNotFound { method: String },
    /// Varlink's own: the answer is many replies, or too long for one.
    #[serde(rename = "org.varlink.service.ExpectedMore")]
    #[error("the answer takes more than one message: ask with \"more\"")]
    ExpectedMore {},
}

fn list(blockers: &[Blocker]) -> String {
    blockers.iter().map(Blocker::with_fix).collect::<Vec<_>>().join("; ")
}

fn held_by(holder: &Option<Box<Holder>>, since: &Option<u64>) -> String {
    let who = holder.as_ref().map_or(String::new(), |h| {
        format!(": vm {:?} of {} (pid {}, uid {}) holds it", h.vm, h.tenant, h.pid, h.uid)
    });
    who + &since.map_or(String::new(), |at| format!(" since {at}"))
}

fn noted(note: &Option<Box<str>>) -> String {
    note.as_ref().map_or(String::new(), |note| format!(": {note}"))
}

impl Error {
    /// As it is sent: a parameter `advice` beside its own says what to do about it.
    pub fn to_json(&self, advice: Option<&str>) -> Value {
        let mut json = serde_json::to_value(self).unwrap_or_default();
        if let Some(advice) = advice
            && let Some(parameters) = json.get_mut("parameters").and_then(Value::as_object_mut)
        {
            parameters.insert("advice".to_owned(), advice.into());
        }
        json
    }

    /// The advice among an error's parameters.
    pub fn advice_in(parameters: &str) -> Option<String> {
        #[derive(Deserialize)]
        struct Advised {
            advice: Option<String>,
        }
        serde_json::from_str::<Advised>(parameters).ok()?.advice
    }

    /// A [`Error::BadRequest`] about one field.
    pub fn bad(field: impl Into<String>, reason: impl ToString) -> Self {
        Self::BadRequest { field: field.into(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quarantined(parameters: &str) -> Result<Error, serde_json::Error> {
        let name = "org.vfiobroker.Broker.Quarantined";
        serde_json::from_str(&format!(r#"{{"error":"{name}","parameters":{parameters}}}"#))
    }

    #[test]
    fn advice_stands_among_the_parameters_and_is_none_of_the_data() {
        let error = Error::NoSuchDevice { device: "d".into() };
        let sent = error.to_json(Some("look"));
        assert_eq!(sent["parameters"], serde_json::json!({ "device": "d", "advice": "look" }));
        let parameters = sent["parameters"].to_string();
        assert_eq!(Error::advice_in(&parameters).as_deref(), Some("look"));
        assert_eq!(serde_json::from_value::<Error>(sent).unwrap(), error);
        assert_eq!(error.to_json(None)["parameters"], serde_json::json!({ "device": "d" }));
        assert_eq!(Error::advice_in(r#"{"advice":null}"#), None);
    }

    #[test]
    fn what_is_not_known_of_an_error_is_no_reason_not_to_read_it() {
        for parameters in [
            r#"{"device":"d","since":1,"reason":"r"}"#,
            r#"{"device":"d","since":1,"reason":"r","until":"doomsday","new":[]}"#,
        ] {
            let read = quarantined(parameters).unwrap();
            assert!(matches!(read, Error::Quarantined { until: Until::Kernel, .. }), "{read:?}");
        }
        let read = quarantined(r#"{"device":"d","since":1,"reason":"r","until":"holder"}"#);
        assert!(matches!(read.unwrap(), Error::Quarantined { until: Until::Holder, .. }));
        assert_eq!(serde_json::to_string(&Until::Kernel).unwrap(), r#""kernel""#);
    }
}
