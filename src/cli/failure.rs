//! What went wrong, for a person, for a program, and as an exit code.

use super::processes;
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
pub(super) const BUSY: u8 = 4;
const NO_BROKER: u8 = 5;
const SOME_DEVICE: &str = "--device ADDRESS";

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
        json["advice"] = json!(self.advice);
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

    /// An error of the interface, with the broker's advice; where more is known here, that is better.
    fn told(error: Error, advice: Option<String>) -> Self {
        let mut json = error.to_json(None);
        if let Some(object) = json.as_object_mut() {
            object.insert("message".to_owned(), error.to_string().into());
        }
        let code = match error {
            Error::Denied { .. } => DENIED,
            Error::Busy { .. } | Error::Quarantined { .. } => BUSY,
            _ => FAILED,
        };
        let advice = own_advice(&error).or(advice);
        let (what, details) = tell(error);
        Self { code, what: printable(&what), details, advice, json }
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
        let (what, advice) = (printable(&error.to_string()), error.advice());
        let kind = match error {
            client::Error::Broker { error, .. } => return Self::told(error, advice),
            client::Error::Connect { .. } => "Connect",
            client::Error::Lost { .. } => "Lost",
            client::Error::Timeout { .. } => "Timeout",
            client::Error::Request { .. } => "Request",
            _ => "Failed",
        };
        let code = if kind == "Connect" { NO_BROKER } else { FAILED };
        let json = json!({ "error": kind, "message": what });
        Self { code, what, details: Vec::new(), advice, json }
    }
}

/// An error of the interface that was not sent.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let advice = crate::broker::advice(&error);
        Self::told(error, advice)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// What happened, and what goes with it.
fn tell(error: Error) -> (String, Vec<String>) {
    match error {
        Error::Denied { rule, reason, .. } => {
            (format!("denied: {reason}"), vec![format!("the rule that decided: {rule}")])
        }
        Error::NotViable { group, blockers } => (
            format!("group {group} can't be used: not all of it is on VFIO drivers"),
            blockers.iter().map(Blocker::with_fix).collect(),
        ),
        Error::Busy { device, holder, since, open_in } => {
            let holder = holder.iter().map(|holder| held_by(holder, since));
            let open_in = open_in.iter().flat_map(|open_in| processes::lines(open_in));
            (format!("{device} is busy"), holder.chain(open_in).collect())
        }
        Error::Quarantined { device, since, reason, holder, open_in, .. } => {
            let why = format!("{reason}; so since {}", style::since(since));
            let holder = holder.map(|holder| {
                let Holder { lease, vm, tenant, uid, pid } = *holder;
                format!("{vm} of {tenant} (uid {uid}, pid {pid}) had it last, as lease {lease}")
            });
            let what = format!("{device} is not known to be free yet");
            let open_in = open_in.iter().flat_map(|open_in| processes::lines(open_in));
            (what, std::iter::once(why).chain(holder).chain(open_in).collect())
        }
        Error::Kernel { call, object, errno, name, note } => {
            let what = format!("the kernel refused {call} on {object}: {name} ({errno})");
            (what, note.into_iter().map(String::from).collect())
        }
        Error::OverLimit { limit, most, asked }
            if ["memlock", "mapped_bytes"].contains(&&*limit) =>
        {
            let (most, asked) = (style::limit(most), style::limit(asked));
            let what =
                format!("over the limit: {limit} is at most {most}, this would make {asked}");
            (what, Vec::new())
        }
        other => (other.to_string(), Vec::new()),
    }
}

/// What to do in the words of this command line, where they say more than the broker's.
fn own_advice(error: &Error) -> Option<String> {
    match error {
        Error::Denied { file: Some(file), device, .. } => Some(explain(file, device.as_deref())),
        Error::NotViable { blockers, .. } => withhold(blockers),
        Error::Unnamed { companions, .. } => {
            let each = companions.iter().map(|bdf| format!("--withhold {bdf}"));
            let each = each.collect::<Vec<_>>().join(" ");
            Some(format!("{each} keeps it from everybody meanwhile; --device in its place uses it"))
        }
        _ => None,
    }
}

/// The command that shows how the policy decided.
fn explain(file: &str, device: Option<&str>) -> String {
    let policy = match file.strip_suffix(".policy.toml") {
        _ if file == "policy.toml" => String::new(),
        Some(simulated) => format!(" --sim DIRECTORY/{simulated}.toml"),
        None => format!(" --policy DIRECTORY/{file}"),
    };
    let device = device.map_or(SOME_DEVICE.to_owned(), |device| format!("--device {device}"));
    let uid = nix::unistd::geteuid();
    format!("`vfio-broker policy explain --uid {uid} {device}{policy}` shows how it decides")
}

/// One without a driver is in the way of its own use alone.
fn withhold(blockers: &[Blocker]) -> Option<String> {
    let name = &blockers.first()?.bdf;
    blockers.iter().all(|blocker| blocker.driver.is_none()).then(|| {
        format!(
            "or, where another function of the group is wanted: --withhold {name} instead of \
             --device {name}"
        )
    })
}

fn held_by(holder: &Holder, since: Option<u64>) -> String {
    let Holder { lease, vm, tenant, uid, pid } = holder;
    let since = since.map_or(String::new(), |at| format!(" since {}", style::since(at)));
    format!("{vm} of {tenant} (uid {uid}, pid {pid}) has it{since}, as lease {lease}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Until;

    fn text(error: Error) -> String {
        Failure::from(error).text(&Style::plain())
    }

    fn denied(file: Option<&str>, device: Option<&str>) -> Error {
        let (rule, reason) = ("default".into(), "no tenant".into());
        let (file, device) = (file.map(str::to_owned), device.map(Into::into));
        Error::Denied { rule, reason, file, line: None, device }
    }

    #[test]
    fn a_refusal_names_the_rule_and_says_where_to_look() {
        let failure = Failure::from(denied(Some("policy.toml"), None));
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
        let advice = |file, device| {
            Failure::from(denied(file, device)).about(&["0000:01:00.0".into()]).advice
        };
        let start =
            format!("`vfio-broker policy explain --uid {} --device", nix::unistd::geteuid());
        let cases = [
            ("policy.toml", Some("0000:06:00.0"), "0000:06:00.0`"),
            ("policy.toml", None, "0000:01:00.0`"),
            ("x.toml", None, "0000:01:00.0 --policy DIRECTORY/x.toml`"),
            ("x.policy.toml", None, "0000:01:00.0 --sim DIRECTORY/x.toml`"),
        ];
        for (file, device, end) in cases {
            let said = advice(Some(file), device).unwrap();
            assert!(said.starts_with(&format!("{start} {end}")), "{said}");
        }
        assert_eq!(advice(None, Some("0000:06:00.0")), None, "no file, nothing to be explained");
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
    fn what_the_broker_advises_is_told_as_it_is() {
        let (device, reason) = ("d".to_owned(), "an administrator; must close it".to_owned());
        let (until, holder, unbind) = (Until::Kernel, None, Vec::new());
        let error =
            Error::Quarantined { device, since: 0, reason, until, holder, unbind, open_in: None };
        let told = |advice: Option<&str>| {
            let advice = advice.map(Into::into);
            let error = client::Error::Broker { error: error.clone(), advice };
            Failure::from(error).advice
        };
        assert_eq!(told(Some("wait; then ask")).as_deref(), Some("wait; then ask"));
        assert_eq!(told(None), None, "nothing is made of the words of a reason");
    }

    #[test]
    fn withholding_is_told_of_only_where_it_helps() {
        let blocker = |driver: Option<&str>| Blocker {
            bdf: "0000:05:00.1".into(),
            driver: driver.map(str::to_owned),
            fix: None,
        };
        let companions = vec!["0000:05:00.1".into(), "0000:05:00.2".into()];
        let unnamed = text(Error::Unnamed { group: 17, companions });
        assert!(unnamed.contains("--withhold 0000:05:00.1 --withhold 0000:05:00.2 "), "{unnamed}");
        let says = |blockers| text(Error::NotViable { group: 17, blockers });
        assert!(says(vec![blocker(None)]).contains("--withhold 0000:05:00.1"));
        assert!(!says(vec![blocker(None), blocker(Some("ahci"))]).contains("--withhold"));
    }

    #[test]
    fn nothing_from_elsewhere_reaches_the_terminal_raw() {
        let hostile = || "\x1b]0;x\x07\nvfio-broker: all is well".to_owned();
        let holder = Holder { lease: hostile(), vm: hostile(), tenant: hostile(), uid: 0, pid: 0 };
        let holder = Box::new(holder);
        let errors = [
            Error::Busy { device: hostile(), holder: Some(holder), since: None, open_in: None },
            Error::Denied {
                rule: hostile(),
                reason: hostile(),
                file: Some(hostile()),
                line: None,
                device: Some(hostile().into()),
            },
            Error::Conflict { what: hostile(), why: hostile() },
        ];
        for error in errors {
            let said = text(error);
            assert!(!said.contains(['\x1b', '\x07']), "{said:?}");
            assert!(!said.contains("\nvfio-broker"), "a line of its own: {said:?}");
        }
    }

    #[test]
    fn every_failure_has_its_advice_for_programs_too() {
        let known = Failure::new("x").advise("do y").as_json();
        assert_eq!(known["advice"], "do y");
        assert_eq!(Failure::new("x").as_json().get("advice"), Some(&Value::Null));
        let told = Failure::from(Error::NoSuchDevice { device: "d".into() }).as_json();
        assert!(told["advice"].is_string());
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
        let busy = Error::Busy {
            device: "d".into(),
            holder: Some(holder.into()),
            since: None,
            open_in: None,
        };
        assert_eq!(Failure::from(busy.clone()).code, BUSY);
        let text = text(busy);
        assert!(text.contains("web1 of alice (uid 1000, pid 42)"), "{text}");
        assert!(text.contains("`vfio-broker watch l7` tells"), "{text}");
        let unknown = Error::Busy { device: "d".into(), holder: None, since: None, open_in: None };
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
