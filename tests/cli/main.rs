//! `vfio-broker` as people run it, against a broker on a simulated kernel.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

mod broker;

use broker::Broker;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

const NIC: &str = "0000:03:00.0";
const DISK: &str = "0000:06:00.0";
const AHCI: &str = "0000:05:00.0";

fn command(broker: Option<&Broker>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
    command.stdin(Stdio::null()).env_remove("VFIO_BROKER_SOCKET");
    if let Some(broker) = broker {
        command.arg("--socket").arg(broker.socket());
    }
    command
}

fn run(broker: Option<&Broker>, arguments: &[&str]) -> Output {
    command(broker).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What a successful run printed.
fn printed(broker: Option<&Broker>, arguments: &[&str]) -> String {
    let output = run(broker, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout).to_owned()
}

fn json(broker: &Broker, arguments: &[&str]) -> Value {
    let all = [arguments, &["--json"]].concat();
    serde_json::from_str(&printed(Some(broker), &all)).unwrap()
}

/// A failed run: its exit code and what it said.
fn failed(broker: Option<&Broker>, arguments: &[&str]) -> (i32, String) {
    let output = run(broker, arguments);
    (output.status.code().unwrap(), text(&output.stderr).to_owned())
}

/// `acquire`, holding until its input is closed.
struct Holder {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Holder {
    fn start(broker: &Broker, vm: &str, device: &str) -> (Self, Value) {
        let mut command = command(Some(broker));
        command.args(["acquire", "--json", "--vm", vm, "--device", device]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut whole = String::new();
        // One object over several lines; the last is a brace alone.
        while !whole.ends_with("\n}\n") {
            assert!(output.read_line(&mut whole).unwrap() > 0, "it ended after {whole:?}");
        }
        (Self { child, output }, serde_json::from_str(&whole).unwrap())
    }

    /// Ends its input; returns what it said last.
    fn end(mut self) -> Value {
        drop(self.child.stdin.take());
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&rest).unwrap()
    }
}

#[test]
fn the_demonstration_goes_as_told() {
    let story = printed(None, &["demo"]);
    for scene in ["container, group 15, lease", "8086:15f3", "denied", "busy", "SIGKILL", "as told"]
    {
        assert!(story.contains(scene), "no {scene} in:\n{story}");
    }
    assert!(!story.contains("  no  "), "{story}");
    assert!(story.lines().count() <= 45, "more than a screenful:\n{story}");
    let whole: Value = serde_json::from_str(&printed(None, &["demo", "--json"])).unwrap();
    assert_eq!(whole["ok"], true);
    assert!(whole["checks"].as_u64().unwrap() >= 15, "{whole}");
}

#[test]
fn acquire_shows_what_came_and_holds_it_until_its_input_ends() {
    let broker = Broker::start("workstation.toml");
    let (holder, came) = Holder::start(&broker, "web1", NIC);
    assert_eq!((&came["vm"], &came["handout"]), (&"web1".into(), &"container".into()));
    assert_eq!(came["devices"], serde_json::json!([NIC]));
    assert_eq!(came["key"].as_str().unwrap().len(), 32);
    let kinds: Vec<_> = came["fds"].as_array().unwrap().iter().map(|fd| &fd["kind"]).collect();
    assert_eq!(kinds, ["container", "group", "lease"]);

    let leases = json(&broker, &["leases"]);
    let lease = &leases["leases"][0];
    assert_eq!((&lease["lease"], &lease["vm"]), (&came["lease"], &"web1".into()));
    assert_eq!(lease["pid"], holder.child.id());
    assert!(lease.get("key").is_none(), "the key is nobody else's: {lease}");
    let table = printed(Some(&broker), &["leases"]);
    assert!(table.starts_with("LEASE") && table.contains("web1"), "{table}");

    let (code, said) = failed(Some(&broker), &["acquire", "--vm", "b", "--device", NIC]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains("is busy") && said.contains("web1 of"), "{said}");

    assert_eq!(holder.end()["proved"], true);
    assert_eq!(json(&broker, &["leases"]), serde_json::json!({ "leases": [] }));
    assert_eq!(printed(Some(&broker), &["leases"]), "no leases\n");
}

#[test]
fn acquire_for_a_person_does_not_show_the_key() {
    let broker = Broker::start("workstation.toml");
    let said = printed(Some(&broker), &["acquire", "--vm", "web1", "--device", NIC]);
    for what in ["for web1", NIC, "container", ": group 15", "released"] {
        assert!(said.contains(what), "no {what} in:\n{said}");
    }
    assert!(!said.contains("key"), "{said}");
}

#[test]
fn a_killed_holder_has_given_everything_back() {
    let broker = Broker::start("workstation.toml");
    let (mut holder, _) = Holder::start(&broker, "web1", NIC);
    holder.child.kill().unwrap();
    holder.child.wait().unwrap();
    // The broker is told by the pipe; an Acquire waits for a reclaim that is under way.
    let (holder, _) = loop {
        let (code, said) = match run(Some(&broker), &["acquire", "--vm", "b", "--device", NIC]) {
            output if output.status.success() => break Holder::start(&broker, "c", NIC),
            output => (output.status.code().unwrap(), text(&output.stderr).to_owned()),
        };
        assert_eq!(code, 4, "{said}");
    };
    holder.end();
}

#[test]
fn topology_shows_groups_devices_and_what_is_in_the_way() {
    let broker = Broker::start("workstation.toml");
    let (holder, came) = Holder::start(&broker, "web1", NIC);
    let whole = json(&broker, &["topology"]);
    let groups = whole["groups"].as_array().unwrap();
    let group = |id: u64| groups.iter().find(|group| group["id"] == id).unwrap();
    let nic = &group(15)["devices"][0];
    assert_eq!((&nic["bdf"], &nic["vendor"]), (&NIC.into(), &"8086".into()));
    assert_eq!((&nic["driver"], &nic["class"]), (&"vfio-pci".into(), &"020000".into()));
    assert_eq!((&nic["lease"], &group(15)["state"]), (&came["lease"], &"held".into()));
    assert_eq!(
        (&group(17)["viable"], &group(17)["blockers"][0]["bdf"]),
        (&false.into(), &AHCI.into())
    );

    let tree = printed(Some(&broker), &["topology"]);
    assert!(tree.contains("group 15  held\n"), "{tree}");
    assert!(tree.contains("<- web1 of "), "{tree}");
    assert!(tree.contains(&format!("! {AHCI} is on ahci\n")), "{tree}");
    for state in ["group 1  a bridge", "group 19  no VFIO driver", "group 14  free"] {
        assert!(tree.contains(state), "no {state} in:\n{tree}");
    }
    // Nobody is shown how to take what the host needs: its disk, its console, its root port.
    assert!(!tree.contains("unbind") && !tree.contains("modprobe"), "{tree}");
    assert!(group(17)["blockers"][0]["fix"].as_str().unwrap().contains("unbind"));
    for kept in [1, 2, 18] {
        for blocker in group(kept)["blockers"].as_array().unwrap() {
            assert_eq!(blocker.get("fix"), None, "{blocker}");
        }
    }
    assert_eq!(
        (&group(15)["devices"][0]["vfio"], &group(19)["devices"][0]["vfio"]),
        (&true.into(), &false.into())
    );
    assert!(!tree.contains('\x1b'), "coloured although it is no terminal: {tree}");
    holder.end();
}

#[test]
fn watch_tells_what_happens() {
    let broker = Broker::start("workstation.toml");
    let mut watch = command(Some(&broker));
    let mut watch = watch.args(["watch", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut events = BufReader::new(watch.stdout.take().unwrap());
    // Nothing says when the watch has begun, so leases come and go until it tells of one.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let event = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                printed(Some(&broker), &["acquire", "--vm", "web1", "--device", NIC]);
            }
        });
        let mut line = String::new();
        events.read_line(&mut line).unwrap();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        serde_json::from_str::<Value>(&line).unwrap()
    });
    assert_eq!((&event["vm"], &event["devices"][0]), (&"web1".into(), &NIC.into()));
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[test]
fn a_refusal_says_which_rule_and_what_to_do() {
    let broker = Broker::start("workstation.toml");
    let acquire = |device| failed(Some(&broker), &["acquire", "--vm", "v", "--device", device]);
    let (code, said) = acquire(DISK);
    assert_eq!(code, 3, "{said}");
    for what in ["the host runs from this disk", "deny[0]", "policy explain"] {
        assert!(said.contains(what), "no {what} in: {said}");
    }
    let devices = ["acquire", "--vm", "v", "--device", AHCI, "--device", "0000:05:00.1"];
    let (code, said) = failed(Some(&broker), &devices);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&format!("{AHCI} is on ahci: ")), "{said}");

    let (code, said) = acquire("0000:99:00.0");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("0000:99:00.0"), "{said}");
    let (code, said) = acquire("eth0");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("\"eth0\""), "{said}");

    let arguments = ["acquire", "--json", "--vm", "v", "--device", DISK];
    let (code, said) = failed(Some(&broker), &arguments);
    let error: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((code, &error["error"]), (3, &"org.vfiobroker.Broker.Denied".into()));
    assert!(error["parameters"]["rule"].as_str().unwrap().starts_with("deny[0]"), "{error}");
}

#[test]
fn without_a_broker_it_says_so() {
    let (code, said) = failed(None, &["--socket", "/nonexistent/broker.sock", "leases"]);
    assert_eq!(code, 5);
    assert!(said.contains("/nonexistent/broker.sock") && said.contains("is vfio-brokerd running"));
    let mut command = command(None);
    command.env("VFIO_BROKER_SOCKET", "/nonexistent/other.sock").args(["leases", "--json"]);
    let output = command.output().unwrap();
    let error: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!((output.status.code(), &error["error"]), (Some(5), &"Connect".into()));
    assert!(error["message"].as_str().unwrap().contains("/nonexistent/other.sock"));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for arguments in [&["acquire"][..], &["leases", "x"], &[], &["demo", "--device", NIC]] {
        let (code, said) = failed(None, arguments);
        assert_eq!(code, 2, "{arguments:?}: {said}");
    }
}

#[test]
fn the_policies_beside_the_topologies_pass_the_check() {
    printed(None, &["policy", "check", "tests/topologies/workstation.policy.toml"]);
    let (code, said) = failed(None, &["policy", "check", "/nonexistent/policy.toml"]);
    assert_eq!(code, 1);
    assert!(said.contains("/nonexistent/policy.toml"), "{said}");
}

#[test]
fn completions_and_manual_pages_come_from_the_one_command_line() {
    for shell in ["bash", "zsh", "fish"] {
        let script = printed(None, &["completions", shell]);
        assert!(script.contains("acquire") && script.contains("topology"), "{shell}: {script}");
    }
    let page = printed(None, &["man"]);
    assert!(page.contains(".TH vfio-broker 1") && page.contains("acquire"), "{page}");
    assert!(!page.contains("demo\\-agent"), "what is hidden is in the manual: {page}");
    assert!(printed(None, &["man", "acquire"]).contains("withhold"));
    assert_eq!(failed(None, &["man", "nothing"]).0, 1);
}
