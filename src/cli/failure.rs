//! What went wrong, for a person, for a program, and as an exit code.

use super::style::Style;
use crate::client;
use crate::protocol::{Blocker, Error, Holder};
use serde_json::{Value, json};
use std::process::ExitCode;

/// Why a subcommand ended without what it was asked for.
#[derive(Debug)]
pub(super) struct Failure {
    code: u8,
    /// What happened, in one line.
    what: String,
    /// The rule, the holder, the blockers: a line each.
    details: Vec<String>,
    /// What to do about it.
    advice: Option<String>,
    json: Value,
}

const FAILED: u8 = 1;
pub(super) const DENIED: u8 = 3;
const BUSY: u8 = 4;
const NO_BROKER: u8 = 5;

impl Failure {
    pub(super) fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let json = json!({ "error": "Failed", "message": what });
        Self { code: FAILED, what, details: Vec::new(), advice: None, json }
    }

    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    pub(super) fn detail(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }

    /// Adds the details of another failure.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.details.extend(other.details);
        self
    }

    /// Tells it on standard error; returns the exit code.
    pub(super) fn report(&self, json: bool) -> ExitCode {
        if json {
            eprintln!("{}", self.json);
        } else {
            eprint!("{}", self.text(&Style::of(&std::io::stderr())));
        }
        ExitCode::from(self.code)
    }

    fn text(&self, style: &Style) -> String {
        let mut text = format!("vfio-broker: {}\n", style.red(&self.what));
        for line in &self.details {
            text += &format!("  {line}\n");
        }
        if let Some(advice) = &self.advice {
            text += &format!("  {} {advice}\n", style.bold("->"));
        }
        text
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let message = error.to_string();
        let kind = match error {
            client::Error::Broker(refusal) => return refusal.into(),
            client::Error::Connect { .. } => "Connect",
            client::Error::Lost { .. } => "Lost",
            client::Error::Timeout { .. } => "Timeout",
            client::Error::Request { .. } => "Request",
            _ => "Failed",
        };
        let code = if kind == "Connect" { NO_BROKER } else { FAILED };
        let json = json!({ "error": kind, "message": message });
        // "what; what to do", as the client's errors are written.
        let (what, advice) = match message.rsplit_once("; ") {
            Some((what, advice)) => (what.to_owned(), Some(advice.to_owned())),
            None => (message, None),
        };
        Self { code, what, details: Vec::new(), advice, json }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let mut json = serde_json::to_value(&error).unwrap_or_default();
        if let Some(object) = json.as_object_mut() {
            object.insert("message".to_owned(), error.to_string().into());
        }
        let code = match error {
            Error::Denied { .. } => DENIED,
            Error::Busy { .. } | Error::Quarantined { .. } => BUSY,
            _ => FAILED,
        };
        let (what, details, advice) = tell(error);
        Self { code, what, details, advice, json }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// What happened, what goes with it, what to do.
fn tell(error: Error) -> (String, Vec<String>, Option<String>) {
    match error {
        Error::Denied { rule, reason } => (
            format!("denied: {reason}"),
            vec![format!("the rule that decided: {rule}")],
            Some("`vfio-broker policy explain` shows how the policy decides, and for whom".into()),
        ),
        Error::NotViable { group, blockers } => (
            format!("group {group} can't be used: not all of it is on VFIO drivers"),
            blockers.iter().map(Blocker::with_fix).collect(),
            not_viable(&blockers),
        ),
        Error::Busy { device, holder, since } => (
            format!("{device} is busy"),
            holder.iter().map(|holder| held_by(holder, since)).collect(),
            Some("`vfio-broker watch` tells when it is given back".into()),
        ),
        Error::Quarantined { device, since, reason } => (
            format!("{device} is not known to be free yet"),
            vec![format!("{reason}; so since {}", super::style::since(since))],
            Some("whoever still has it open must close it; `vfio-broker watch` tells when".into()),
        ),
        Error::Kernel { call, object, errno, name, hint } => {
            (format!("the kernel refused {call} on {object}: {name} ({errno})"), vec![], Some(hint))
        }
        Error::NoSuchDevice { .. } => (
            error.to_string(),
            Vec::new(),
            Some("`vfio-broker topology` shows those that there are".into()),
        ),
        Error::NoSuchLease { .. } => (
            error.to_string(),
            Vec::new(),
            Some("`vfio-broker leases` shows those that there are".into()),
        ),
        other => (other.to_string(), Vec::new(), None),
    }
}

/// What to do about blockers, beside what each says itself.
fn not_viable(blockers: &[Blocker]) -> Option<String> {
    // One without a driver is in the way of its own use alone.
    if blockers.iter().all(|blocker| blocker.driver.is_none()) {
        let name = blockers.first().map_or("", |blocker| &blocker.bdf);
        return Some(format!(
            "or, where another function of the group is wanted: --withhold {name} instead of \
             --device {name}"
        ));
    }
    let kept = blockers.iter().any(|blocker| blocker.fix.is_none());
    let ask = "a function without a command is not yours to take: ask who looks after this host";
    kept.then(|| ask.into())
}

fn held_by(holder: &Holder, since: Option<u64>) -> String {
    let Holder { lease, vm, tenant, uid, pid } = holder;
    let since = since.map_or(String::new(), |at| format!(" since {}", super::style::since(at)));
    format!("{vm} of {tenant} (uid {uid}, pid {pid}) has it{since}, as lease {lease}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(error: Error) -> String {
        Failure::from(error).text(&Style::plain())
    }

    #[test]
    fn a_refusal_names_the_rule_and_says_where_to_look() {
        let denied = Error::Denied { rule: "default".into(), reason: "no tenant".into() };
        let failure = Failure::from(denied);
        assert_eq!(failure.code, DENIED);
        assert_eq!(failure.json["parameters"]["rule"], "default");
        assert_eq!(failure.json["error"], "org.vfiobroker.Broker.Denied");
        let text = failure.text(&Style::plain());
        assert!(
            text.contains("denied: no tenant\n  the rule that decided: default\n  -> "),
            "{text}"
        );
    }

    #[test]
    fn busy_names_the_holder() {
        let holder = Holder {
            lease: "l7".into(),
            vm: "web1".into(),
            tenant: "alice".into(),
            uid: 1000,
            pid: 42,
        };
        let busy = Error::Busy { device: "d".into(), holder: Some(holder), since: None };
        assert_eq!(Failure::from(busy.clone()).code, BUSY);
        let text = text(busy);
        assert!(text.contains("web1 of alice (uid 1000, pid 42)"), "{text}");
    }

    #[test]
    fn the_advice_of_a_client_error_stands_on_its_own_line() {
        let errno = nix::errno::Errno::ENOENT;
        let failure: Failure = client::Error::Connect { path: "/x".into(), errno }.into();
        assert_eq!(failure.code, NO_BROKER);
        let text = failure.text(&Style::plain());
        assert!(text.contains("\n  -> is vfio-brokerd running"), "{text}");
    }
}
