//! `vfio-broker` as people run it, against a broker on a simulated kernel.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

mod broker;
#[path = "../common/brokerd.rs"]
mod brokerd;
#[path = "../common/children.rs"]
mod children;
#[path = "../common/until.rs"]
mod until;

use broker::Broker;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use until::until;

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

/// With an input that is at its end: `acquire` gives back at once.
fn run(broker: Option<&Broker>, arguments: &[&str]) -> Output {
    command(broker).args(arguments).stdin(Stdio::piped()).output().unwrap()
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
        let mut line = String::new();
        assert!(output.read_line(&mut line).unwrap() > 0, "it ended at its start");
        (Self { child, output }, serde_json::from_str(&line).unwrap())
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
    assert_eq!(printed(Some(&broker), &["leases"]), "no leases that you may see\n");
}

#[test]
fn acquire_for_a_person_does_not_show_the_key() {
    let broker = Broker::start("workstation.toml");
    let said = printed(Some(&broker), &["acquire", "--vm", "web1", "--device", NIC]);
    for what in ["for web1", NIC, "container", ": group 15", "released"] {
        assert!(said.contains(what), "no {what} in:\n{said}");
    }
    assert!(!said.contains("key"), "{said}");
    let all = ["acquire", "--vm", "web1", "--device", NIC, "--handout", "group"];
    let said = printed(Some(&broker), &all);
    assert!(!said.contains("none") && !said.contains("container"), "{said}");
}

#[test]
fn without_an_input_that_could_end_it_is_held_until_a_signal() {
    let broker = Broker::start("workstation.toml");
    let mut command = command(Some(&broker)); // its input is /dev/null
    command.args(["acquire", "--json", "--vm", "web1", "--device", NIC]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    // It could have read its input's end by now, and does not: only the signal ends it.
    assert_eq!(json(&broker, &["leases"])["leases"][0]["pid"], child.id());
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let released: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(released["proved"], true);
    assert!(child.wait().unwrap().success());
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
    assert!(group(17)["blockers"][0]["fix"].as_str().unwrap().starts_with("simulated:"));
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
fn a_watch_on_one_lease_ends_when_it_has_been_taken_back() {
    let broker = Broker::start("workstation.toml");
    // Nothing says when the watch has begun; one that comes too late is refused, or hears the rest, and
    // does not wait.
    let watched = |_| {
        let (holder, came) = Holder::start(&broker, "web1", NIC);
        let mut watch = command(Some(&broker));
        watch.args(["watch", came["lease"].as_str().unwrap()]);
        let watch = watch.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        json(&broker, &["leases"]);
        holder.end();
        let output = watch.wait_with_output().unwrap();
        let said = text(&output.stdout).to_owned();
        (output.status.success() && said.contains("released")).then_some(said)
    };
    let said = (0..100).find_map(watched).unwrap();
    let events: Vec<_> = said.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    assert_eq!(events, ["released", "reclaimed"], "{said}");

    for unknown in ["0123456789abcdef", "nonsense"] {
        let (code, said) = failed(Some(&broker), &["watch", unknown]);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(&format!("no lease {unknown}")), "{said}");
    }
}

#[test]
fn a_watch_says_that_the_broker_has_gone() {
    let mut broker = Broker::start("workstation.toml");
    let (mut holder, came) = Holder::start(&broker, "web1", NIC);
    let lease = came["lease"].as_str().unwrap().to_owned();
    let mut watch = command(Some(&broker));
    let mut watch =
        watch.args(["watch"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut events = BufReader::new(watch.stdout.take().unwrap());
    // The first event shows that it has begun.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let pair = ["--device", "0000:01:00.0", "--withhold", "0000:01:00.1"];
                printed(Some(&broker), &[&["acquire", "--vm", "b"], &pair[..]].concat());
            }
        });
        events.read_line(&mut String::new()).unwrap();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let log = broker.end(Signal::SIGTERM);
    assert!(log.contains("stopping signal=\"SIGTERM\" leases=1"), "{log}");
    assert!(
        log.contains("lease ends: its simulated machine does") && log.contains(&lease),
        "{log}"
    );
    assert!(log.contains("kernel=\"SIMULATED") && log.contains("policy=\"tests"), "{log}");
    drop(events);
    let output = watch.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("the broker has gone"), "{said}");
    assert_eq!(holder.child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_refusal_says_which_rule_and_what_to_do() {
    let broker = Broker::start("workstation.toml");
    let acquire = |device| failed(Some(&broker), &["acquire", "--vm", "v", "--device", device]);
    let (code, said) = acquire(DISK);
    assert_eq!(code, 3, "{said}");
    let command = format!("policy explain --uid {} --device {DISK} --sim", nix::unistd::geteuid());
    for what in ["the host runs from this disk", "deny[0]", &command] {
        assert!(said.contains(what), "no {what} in: {said}");
    }
    let devices = ["acquire", "--vm", "v", "--device", AHCI, "--device", "0000:05:00.1"];
    let (code, said) = failed(Some(&broker), &devices);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&format!("{AHCI} is on ahci: ")), "{said}");

    let (code, said) = acquire("0000:01:00.0");
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("0000:01:00.1 is not named") && said.contains("-> --withhold 0000:01:00.1 ")
    );

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
    assert!(error["advice"].as_str().unwrap().contains("policy explain"), "{error}");
    let (code, said) = acquire("0000:00:01.0");
    assert!(code != 0 && !said.contains("unbind"), "{said}");
}

#[test]
fn where_nobody_reads_what_went_wrong_the_exit_code_says_it() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = command(None);
    command.args(["--socket", "/nonexistent/broker.sock", "leases"]).stderr(writer);
    assert_eq!(command.status().unwrap().code(), Some(5));
    let (code, said) = failed(None, &["--socket", "/tmp", "leases"]);
    assert!(code == 5 && said.contains("not a socket"), "{said}");
}

#[test]
fn a_simulated_machine_is_explained_by_the_policy_beside_it() {
    let explain = |device| {
        let sim = "tests/topologies/workstation.toml";
        run(None, &["policy", "explain", "--sim", sim, "--uid", "4242", "--device", device])
    };
    let allowed = explain(NIC);
    let said = text(&allowed.stdout);
    assert!(allowed.status.success() && said.contains("allowed"), "{said}");
    assert!(said.contains("no user 4242") && said.contains("--gid"), "{said}");
    assert_eq!(explain(DISK).status.code(), Some(3));
    assert_eq!(explain("0000:99:00.0").status.code(), Some(1));
}

#[test]
fn nothing_is_left_of_a_demonstration_or_a_broker_that_is_ended() {
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let directory = tempfile::tempdir().unwrap();
        let left = || std::fs::read_dir(directory.path()).unwrap().count();
        let mut demo = command(None);
        demo.arg("demo").env("TMPDIR", directory.path()).stdout(Stdio::piped());
        let mut demo = demo.spawn().unwrap();
        let mut story = BufReader::new(demo.stdout.take().unwrap());
        story.read_line(&mut String::new()).unwrap();
        kill(Pid::from_raw(demo.id() as i32), signal).unwrap();
        demo.wait().unwrap();
        until("the demonstration's directory is gone", || left() == 0);
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let directory = tempfile::tempdir().unwrap();
        let mut broker = Broker::start_in("workstation.toml", directory.path());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        broker.end(signal);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
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
    let handout = ["acquire", "--vm", "v", "--device", NIC, "--handout", "x"];
    let demo = ["demo", "--socket", "/x"];
    let demo_host = ["demo", "--device", NIC];
    for arguments in [&["acquire"][..], &["leases", "x"], &[], &demo_host, &demo, &handout] {
        let (code, said) = failed(None, arguments);
        assert_eq!(code, 2, "{arguments:?}: {said}");
    }
}

#[test]
fn what_the_broker_is_at_and_the_end_of_all_leases() {
    let broker = Broker::start("workstation.toml");
    let said = printed(Some(&broker), &["status"]);
    for name in ["version", "broker", "launcher", "sandbox", "connections", "policy", "keepers"] {
        assert!(said.lines().any(|line| line.starts_with(&format!("{name}  "))), "{said}");
    }
    assert_eq!(json(&broker, &["status"])["keepers"], serde_json::json!([]));
    let drained = printed(Some(&broker), &["drain"]);
    assert_eq!(drained, "no leases that you may take back\n");
    let (code, said) = failed(Some(&broker), &["revoke", "0000000000000000"]);
    assert!(code == 1 && said.contains("no lease 0000000000000000"), "{said}");
    let (code, said) = failed(Some(&broker), &["revoke", "0000000000000000", "--grace", "2d"]);
    assert!(code == 2 && said.contains("90s"), "{said}");
    let (code, said) = failed(Some(&broker), &["confirm", "65:00.0"]);
    assert!(code == 1 && said.contains("nothing to confirm"), "{said}");
}

#[test]
fn the_policies_beside_the_topologies_pass_the_check() {
    printed(None, &["policy", "check", "tests/topologies/workstation.policy.toml"]);
    let (code, said) = failed(None, &["policy", "check", "/nonexistent/policy.toml"]);
    assert_eq!(code, 1);
    assert!(said.contains("/nonexistent/policy.toml") && !said.contains("--policy"), "{said}");
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
    assert!(page.contains(".SH \"EXIT STATUS\"") && !page.contains("EXTRA"), "{page}");
    assert!(printed(None, &["man", "acquire"]).contains("withhold"));
    for command in ["status", "revoke", "drain", "confirm"] {
        assert!(page.contains(command), "{command}: {page}");
        let page = printed(None, &["man", command]);
        assert!(page.contains(&format!(".TH vfio-broker-{command} 1")), "{page}");
    }
    assert!(printed(None, &["man", "revoke"]).contains("grace"));
    for check in [&["man", "policy", "check"][..], &["man", "policy-check"]] {
        let page = printed(None, check);
        assert!(page.contains(".TH vfio-broker-policy-check 1"), "{page}");
    }
    assert!(printed(None, &["man", "vfio-brokerd"]).contains(".TH vfio-brokerd 1"));
    assert_eq!(failed(None, &["man", "nothing"]).0, 1);
}

#[test]
fn manual_pages_have_a_usage_line_examples_and_what_exit_codes_mean() {
    let exec = printed(None, &["man", "exec"]);
    for said in [
        ".SH \"SYNOPSIS\"\n.nf\n\\&vfio\\-broker exec [OPTIONS] \\-\\-vm <NAME>",
        "fd={cdev:65:00.0}'\n",
        "\\&127 there is no such program\n",
    ] {
        assert!(exec.contains(said), "{said} is not in {exec}");
    }
    for name in ["attach", "detach"] {
        let page = printed(None, &["man", name]);
        assert!(page.contains(".SH \"EXAMPLES\"") && page.contains("busy, or not free"), "{page}");
    }
}

#[test]
fn attach_waits_no_longer_for_a_silent_monitor_than_it_was_told() {
    let broker = Broker::start("workstation.toml");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let attach = ["attach", "--vm", "a", "--device", "65:00.0", "--timeout", "1", "--qmp"];
    let (code, said) = failed(Some(&broker), &[&attach[..], &[path.to_str().unwrap()]].concat());
    assert_eq!(code, 1);
    assert!(
        said.contains("to the greeting within 1s") && said.contains("no QMP monitor"),
        "{said}"
    );
}

#[test]
fn wrong_usage_is_json_too_where_that_is_asked_for() {
    let exec = ["exec", "--vm", "a", "--json", "--", "true"];
    let (code, said) = failed(None, &exec);
    assert_eq!(code, 2);
    let said: Value = serde_json::from_str(&said).unwrap();
    let message = "the following required arguments were not provided: --device <DEVICE>";
    assert_eq!(said["message"], message);
    // What belongs to the program is no option of ours, and help is no error.
    let (_, said) = failed(None, &["exec", "--vm", "a", "--", "true", "--json"]);
    assert!(said.starts_with("error: "), "{said}");
    assert!(printed(None, &["exec", "--json", "--help"]).starts_with("Get devices"));
}

#[test]
fn a_program_without_the_two_hyphens_before_it_is_told_of_them() {
    let exec = ["exec", "--vm", "a", "--device", "65:00.0"];
    let (code, said) = failed(None, &[&exec[..], &["true"]].concat());
    assert_eq!(code, 2);
    assert!(said.contains("come after `--`"), "{said}");
    let (_, said) = failed(None, &["dem"]);
    assert!(
        said.contains("'demo'") && !said.contains("agent"),
        "what is hidden is told of: {said}"
    );
    let (_, said) = failed(None, &["demo-agen"]);
    assert!(!said.contains("demo-agent"), "what is hidden is told of: {said}");
    let (_, said) = failed(None, &[&exec[..], &["--handuot", "group", "--", "true"]].concat());
    assert!(said.contains("'--handout'") && !said.contains("come after"), "{said}");
}

/// What bash offers for the last of these words.
fn completed(script: &str, words: &[&str]) -> Vec<String> {
    let list: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let (last, at) = (words[words.len() - 1], words.len() - 1);
    let before = words[words.len() - 2];
    let program = format!(
        "{script}\nCOMP_WORDS=({}); COMP_CWORD={at}\n_vfio__broker vfio-broker '{last}' '{before}'\n\
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        list.join(" ")
    );
    let output = Command::new("bash").arg("-c").arg(program).output().unwrap();
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_every_word_and_nothing_that_is_hidden() {
    let script = printed(None, &["completions", "bash"]);
    let first = completed(&script, &["vfio-broker", ""]);
    assert!(first.contains(&"acquire".into()), "{first:?}");
    assert!(!script.contains("demo-agent") && !first.contains(&"daemon".into()), "{first:?}");
    let second = completed(&script, &["vfio-broker", "policy", ""]);
    for word in ["check", "explain"] {
        assert!(second.contains(&word.into()), "{second:?}");
    }
    let forms = completed(&script, &["vfio-broker", "acquire", "--handout", ""]);
    assert_eq!(forms, ["container", "group", "devices", "iommufd"]);
}
