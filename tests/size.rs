//! A large machine: 4,096 devices in 4,096 groups, and 1,000 leases. How long it takes is printed with
//! `--nocapture`.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Daemon, Setup, until};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Instant;
use vfio_broker::client::{Acquire, Client, Lease};
use vfio_broker::protocol::{Handout, Topology};

const DOMAINS: usize = 16;
const GROUPS: usize = DOMAINS * 256;
const LEASES: usize = 1000;
const LAST: &str = "000f:ff:00.0";

fn setup() -> Setup {
    let mut topology =
        "kernel = \"6.12\"\nowner_rights = true\nmemlock = \"unlimited\"\n".to_owned();
    for domain in 0..DOMAINS {
        let id = domain * 256;
        write!(
            topology,
            "[[group]]\nid = {id}\nrepeat = 256\nstep = \"bus\"\n[[group.device]]\n\
             bdf = \"{domain:04x}:00:00.0\"\nvendor = 0x8086\ndevice = 0x10d3\nclass = 0x020000\n\
             driver = \"vfio-pci\"\n"
        )
        .unwrap();
    }
    let limits = "leases = 2000\ndevices = 5000\nfds = 20000\nrequests = 64";
    Setup { topology, policy: common::policy(limits), arguments: Vec::new() }
}

fn command(daemon: &Daemon) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
    command.arg("--socket").arg(&daemon.socket).stdin(Stdio::null());
    command
}

fn printed(command: &mut Command) -> String {
    let (start, output) = (Instant::now(), command.output().unwrap());
    assert!(output.status.success(), "{command:?}: {output:?}");
    eprintln!("{:?}: {:?}", command.get_args().skip(2).collect::<Vec<_>>(), start.elapsed());
    String::from_utf8(output.stdout).unwrap()
}

fn listed(daemon: &Daemon, what: &str) -> Vec<Value> {
    let text = printed(command(daemon).args([what, "--json"]));
    let whole: Value = serde_json::from_str(&text).unwrap();
    let list = if what == "topology" { "groups" } else { "leases" };
    whole[list].as_array().unwrap().clone()
}

fn device(number: usize) -> String {
    format!("{:04x}:{:02x}:00.0", number / 256, number % 256)
}

fn acquire(client: &mut Client, device: &str) -> Lease {
    client.acquire(Acquire::new("web").device(device).handout(Handout::Group)).unwrap()
}

/// A call of Topology that takes many replies.
fn more() -> Vec<u8> {
    let method = "org.vfiobroker.Broker.Topology";
    common::raw::bytes(&json!({ "method": method, "parameters": {}, "more": true }))
}

fn names(list: &[Value], field: &str) -> BTreeSet<String> {
    list.iter().map(|each| each[field].to_string()).collect()
}

#[test]
fn every_list_is_whole_with_a_thousand_leases() {
    let daemon = Daemon::with(setup());
    let mut client = Client::connect_to(&daemon.socket).unwrap();
    let mut watch = command(&daemon);
    let mut watch = watch.args(["watch", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut events = BufReader::new(watch.stdout.take().unwrap()).lines();
    // Nothing says when the watch has begun, so a lease comes and goes until it tells of one.
    let (heard, told) = std::sync::mpsc::channel();
    let listener = std::thread::spawn(move || {
        let mut acquired = BTreeSet::new();
        while !acquired.contains(&json!(LAST).to_string()) {
            let event: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
            if event["event"] == "acquired" {
                acquired.insert(event["devices"][0].to_string());
                let _ = heard.send(());
            }
        }
        acquired
    });
    while told.try_recv().is_err() {
        drop(acquire(&mut client, &device(GROUPS - 2)));
        until("the device is free again", || {
            let (mut groups, device) = (client.topology().unwrap().into_iter(), device(GROUPS - 2));
            groups.all(|group| group.devices[0].bdf != device || group.devices[0].lease.is_none())
        });
    }

    let start = Instant::now();
    let mut leases: Vec<_> =
        (1..LEASES).map(|number| acquire(&mut client, &device(number))).collect();
    leases.push(acquire(&mut client, LAST));
    eprintln!("{LEASES} leases: {:?}", start.elapsed());
    assert_eq!(listener.join().unwrap().len(), LEASES + 1);
    watch.kill().unwrap();
    watch.wait().unwrap();

    let groups = listed(&daemon, "topology");
    assert_eq!((groups.len(), names(&groups, "id").len()), (GROUPS, GROUPS));
    let held: Vec<_> = groups.iter().filter(|group| group["state"] == "held").collect();
    assert_eq!(held.len(), LEASES);
    assert!(held.iter().all(|group| group["devices"][0]["lease"].is_string()));
    let list = listed(&daemon, "leases");
    assert_eq!((list.len(), names(&list, "lease").len()), (LEASES, LEASES));

    let tree = printed(command(&daemon).arg("topology"));
    assert_eq!(tree.lines().filter(|line| line.starts_with("group ")).count(), GROUPS);
    assert_eq!(tree.matches("<- web of everybody, lease ").count(), LEASES);
    let status = client.status().unwrap();
    let of: BTreeSet<&str> =
        status.keepers.iter().map(|keeper| keeper.leases[0].lease.as_str()).collect();
    assert_eq!((status.keepers.len(), of.len()), (LEASES, LEASES));
    assert!(status.keepers.iter().all(|keeper| keeper.alive && keeper.memory.is_some()));
    let said = printed(command(&daemon).arg("status"));
    assert_eq!(said.matches(" web of everybody ").count(), LEASES, "{said}");
    // With a line that says what the columns are.
    assert_eq!(printed(command(&daemon).arg("leases")).lines().count(), LEASES + 1);

    // Its input is at its end, so it gives the device back at once.
    let mut any = command(&daemon);
    any.args(["acquire", "--json", "--vm", "a", "--device", "8086:10d3"]).stdin(Stdio::piped());
    let any = printed(&mut any);
    let mut said = serde_json::Deserializer::from_str(&any).into_iter::<Value>();
    let came = said.next().unwrap().unwrap();
    assert!(came["devices"][0].is_string(), "{came}");

    let host = daemon.directory().join("host.toml");
    let mut explain = command(&daemon);
    explain.args(["policy", "explain", "--uid", "1000", "--device", LAST, "--sim"]).arg(host);
    assert!(printed(&mut explain).contains(LAST));
}

#[test]
fn without_more_a_list_that_is_too_long_says_so() {
    let daemon = Daemon::with(setup());
    let mut raw = daemon.connect();
    let too_long = raw.call("Topology", json!({}));
    too_long.error("org.varlink.service.ExpectedMore");
    let (leases, _) = raw.call("Leases", json!({})).ok();
    assert_eq!(leases["leases"], json!([]));
    let mut client = Client::connect_to(&daemon.socket).unwrap();
    let _held: Vec<_> = (0..400).map(|number| acquire(&mut client, &device(number))).collect();
    raw.call("Leases", json!({})).error("org.varlink.service.ExpectedMore");
    raw.call("Status", json!({})).error("org.varlink.service.ExpectedMore");
    assert_eq!(client.leases().unwrap().len(), 400);
}

#[test]
fn the_first_group_comes_before_the_last_is_read() {
    let daemon = Daemon::with(setup());
    let mut client = Client::connect_to(&daemon.socket).unwrap();
    let mut replies = client.call_more(&Topology {}).unwrap();
    let first = replies.next().unwrap().unwrap();
    assert_eq!((first.groups.len(), first.groups[0].id), (1, 0));
    // What is not read yet is seen as it is from now on.
    daemon.sim().set_driver(LAST, None).unwrap();
    let last = replies.last().unwrap().unwrap();
    assert_eq!((last.groups[0].id, &last.groups[0].devices[0].driver), (4095, &None));
}

#[test]
fn who_asks_for_a_list_and_does_not_read_it_holds_up_nobody() {
    let daemon = Daemon::with(setup().argument("--write-deadline", "2000"));
    let mut silent: Vec<_> = (0..8).map(|_| daemon.connect()).collect();
    for client in &silent {
        client.send(&more());
    }
    let mut client = Client::connect_to(&daemon.socket).unwrap();
    assert_eq!(client.topology().unwrap().len(), GROUPS);
    drop(acquire(&mut client, LAST));
    for client in &mut silent {
        client.hangs_up();
    }
    daemon.until_logged("does not read what it asked for");
}

#[test]
fn a_pager_that_stops_to_read_loses_nothing() {
    let daemon = Daemon::with(setup().argument("--write-deadline", "2000"));
    let mut topology = command(&daemon);
    let mut topology = topology.arg("topology").stdout(Stdio::piped()).spawn().unwrap();
    let mut output = topology.stdout.take().unwrap();
    output.read_exact(&mut [0]).unwrap();
    // By the time that one who began later was hung up on, the command would have been too.
    let silent = daemon.connect();
    silent.send(&more());
    daemon.until_logged("does not read what it asked for");
    let mut rest = String::new();
    output.read_to_string(&mut rest).unwrap();
    assert!(topology.wait().unwrap().success());
    assert!(rest.contains("group 4095  free"));
}
