//! What went wrong, for a person, for a program, and as an exit code.

use super::style::{self, Style, complain, printable, printable_lines};
use crate::client;
use crate::protocol::{Bdf, Blocker, Error, Holder};
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
const SOME_DEVICE: &str = "--device ADDRESS";

impl Failure {
    pub(super) fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let json = json!({ "error": "Failed", "message": what });
        Self { code: FAILED, what, details: Vec::new(), advice: None, json }
    }

    /// "what; what to do", as the library's errors are written.
    pub(super) fn of(message: &str) -> Self {
        let message = printable(message);
        let failure = Self::new(&*message);
        match message.rsplit_once("; ") {
            Some((what, advice)) => Self { what: what.to_owned(), ..failure }.advise(advice),
            None => failure,
        }
    }

    pub(super) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    pub(super) fn detail(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }

    /// The same, with another exit code.
    pub(super) fn code(mut self, code: u8) -> Self {
        self.code = code;
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
            complain(&format!("{}\n", self.as_json()));
        } else {
            complain(&self.text(&Style::of(&std::io::stderr())));
        }
        ExitCode::from(self.code)
    }

    fn as_json(&self) -> Value {
        let mut json = self.json.clone();
        json["hint"] = json!(self.advice);
        json
    }

    fn text(&self, style: &Style) -> String {
        let what = printable_lines(&self.what);
        let mut text = format!("vfio-broker: {}\n", style.red(&what));
        for line in &self.details {
            text += &format!("  {}\n", printable(line));
        }
        if let Some(advice) = &self.advice {
            text += &format!("  {} {}\n", style.bold("->"), printable(advice));
        }
        text
    }

    #[cfg(test)]
    pub(super) fn to_text(&self) -> String {
        self.text(&Style::plain())
    }

    /// The same, about these devices: advice that needs one names the first.
    pub(super) fn about(mut self, devices: &[String]) -> Self {
        let named = devices.iter().find(|device| Bdf::typed(device).is_ok());
        if let (Some(advice), Some(device)) = (&mut self.advice, named) {
            *advice = advice.replace(SOME_DEVICE, &format!("--device {device}"));
        }
        self
    }

    /// The broker is there no more.
    pub(super) fn gone() -> Self {
        let what = "the broker has gone".to_owned();
        let json = json!({ "error": "Lost", "message": what });
        let advice = Some("its log says why, or vfio-brokerd was stopped".to_owned());
        Self { code: NO_BROKER, what, details: Vec::new(), advice, json }
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let message = printable(&error.to_string());
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
        let what = printable(&what);
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
        Error::Denied { rule, reason } => {
            let advice = explain(&rule, &reason);
            (format!("denied: {reason}"), vec![format!("the rule that decided: {rule}")], advice)
        }
        Error::NotViable { group, blockers } => (
            format!("group {group} can't be used: not all of it is on VFIO drivers"),
            blockers.iter().map(Blocker::with_fix).collect(),
            not_viable(&blockers),
        ),
        Error::Busy { device, holder, since } => {
            // Only who may know the holder is told of its leases' ends.
            let advice = holder.as_ref().map_or("try again later".into(), |holder| {
                format!("`vfio-broker watch {}` tells when it is given back", holder.lease)
            });
            let holder = holder.iter().map(|holder| held_by(holder, since)).collect();
            (format!("{device} is busy"), holder, Some(advice))
        }
        Error::Quarantined { device, since, reason } => (
            format!("{device} is not known to be free yet"),
            vec![format!("{reason}; so since {}", style::since(since))],
            Some(match reason.contains("an administrator") {
                true => "whoever looks after this host can do that; then try again".into(),
                false => "whoever still has it open must close it; then try again".into(),
            }),
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
        Error::OverLimit { limit, most, asked }
            if ["memlock", "mapped_bytes"].contains(&&*limit) =>
        {
            let (most, asked) = (style::limit(most), style::limit(asked));
            (
                format!("over the limit: {limit} is at most {most}, this would make {asked}"),
                Vec::new(),
                Some(format!("ask for less, or have {limit} of the tenant raised in the policy")),
            )
        }
        other => (other.to_string(), Vec::new(), None),
    }
}

/// The command that shows how the policy decided, as far as the refusal tells what to fill in.
fn explain(rule: &str, reason: &str) -> Option<String> {
    // ", FILE:LINE" is how a rule ends, or ", FILE".
    let file = rule.rsplit_once(", ").map_or("", |(_, file)| file);
    let file = file.split(':').next().unwrap_or_default();
    let policy = match file.strip_suffix(".policy.toml") {
        _ if file == "built-in policy" => return None,
        _ if file.is_empty() || file == "policy.toml" => String::new(),
        Some(simulated) => format!(" --sim DIRECTORY/{simulated}.toml"),
        None => format!(" --policy DIRECTORY/{file}"),
    };
    let mut words = reason.split(|c: char| c.is_whitespace() || c == ';');
    let device = words.find(|word| word.parse::<Bdf>().is_ok());
    let device = device.map_or(SOME_DEVICE.to_owned(), |device| format!("--device {device}"));
    let uid = nix::unistd::geteuid();
    Some(format!("`vfio-broker policy explain --uid {uid} {device}{policy}` shows how it decides"))
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
    let since = since.map_or(String::new(), |at| format!(" since {}", style::since(at)));
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
    fn a_refusal_comes_with_the_command_that_explains_it() {
        let advice = |rule: &str, reason: &str| {
            let (rule, reason) = (rule.to_owned(), reason.to_owned());
            Failure::from(Error::Denied { rule, reason }).about(&["0000:01:00.0".into()]).advice
        };
        let start =
            format!("`vfio-broker policy explain --uid {} --device", nix::unistd::geteuid());
        let cases = [
            (
                "deny[0] devices[0], policy.toml:3",
                "0000:06:00.0 (8086:1) is denied",
                "0000:06:00.0`",
            ),
            ("default deny, policy.toml", "no tenant is for uid 7", "0000:01:00.0`"),
            ("default deny, x.toml", "no", "0000:01:00.0 --policy DIRECTORY/x.toml`"),
            ("default deny, x.policy.toml", "no", "0000:01:00.0 --sim DIRECTORY/x.toml`"),
        ];
        for (rule, reason, end) in cases {
            let said = advice(rule, reason).unwrap();
            assert!(said.starts_with(&format!("{start} {end}")), "{said}");
        }
        assert_eq!(advice("deny[0], built-in policy:3", "no"), None);
    }

    #[test]
    fn limits_of_memory_are_told_as_a_person_reads_them() {
        let over =
            |limit: &str, asked| Error::OverLimit { limit: limit.into(), most: 1 << 30, asked };
        let memlock = text(over("memlock", u64::MAX));
        assert!(memlock.contains("memlock is at most 1 GiB, this would make unlimited\n  -> ask"));
        assert!(text(over("mapped_bytes", 3 << 29)).contains("make 1.5 GiB"));
        assert!(text(over("leases", 5)).contains("make 5\n"));
    }

    #[test]
    fn a_device_that_an_administrator_has_to_take_back_is_not_said_to_wait_for_a_close() {
        let told = |reason: &str| {
            let (device, reason) = ("d".to_owned(), reason.to_owned());
            text(Error::Quarantined { device, since: 0, reason })
        };
        assert!(told("its group is open somewhere").contains("must close it"));
        let kept = told("for its tenant until an administrator has unbound it");
        assert!(!kept.contains("must close it") && kept.contains("looks after"), "{kept}");
    }

    #[test]
    fn withholding_is_told_of_only_where_it_helps() {
        let blocker = |driver: Option<&str>| Blocker {
            bdf: "0000:05:00.1".into(),
            driver: driver.map(str::to_owned),
            fix: None,
        };
        let says = |blockers| text(Error::NotViable { group: 17, blockers });
        assert!(says(vec![blocker(None)]).contains("--withhold 0000:05:00.1"));
        assert!(!says(vec![blocker(None), blocker(Some("ahci"))]).contains("--withhold"));
    }

    #[test]
    fn nothing_from_elsewhere_reaches_the_terminal_raw() {
        let hostile = || "\x1b]0;x\x07\nvfio-broker: all is well".to_owned();
        let holder = Holder { lease: hostile(), vm: hostile(), tenant: hostile(), uid: 0, pid: 0 };
        let errors = [
            Error::Busy { device: hostile(), holder: Some(holder), since: None },
            Error::Denied { rule: hostile(), reason: hostile() },
            Error::Conflict { what: hostile(), why: hostile() },
        ];
        for error in errors {
            let said = text(error);
            assert!(!said.contains(['\x1b', '\x07']), "{said:?}");
            assert!(!said.contains("\nvfio-broker"), "a line of its own: {said:?}");
        }
    }

    #[test]
    fn every_failure_has_a_hint_for_programs_too() {
        let known = Failure::new("x").advise("do y").as_json();
        assert_eq!(known["hint"], "do y");
        assert_eq!(Failure::new("x").as_json().get("hint"), Some(&Value::Null));
        assert!(
            Failure::from(Error::NoSuchDevice { device: "d".into() }).as_json()["hint"].is_string()
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
        assert!(text.contains("`vfio-broker watch l7` tells"), "{text}");
        let unknown = Error::Busy { device: "d".into(), holder: None, since: None };
        let text = self::text(unknown);
        assert!(text.contains("try again later") && !text.contains("watch"), "{text}");
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
