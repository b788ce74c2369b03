//! Status: who sees what of the daemon and its keepers.

use crate::DEVICE;
use crate::common::raw::Raw;
use crate::common::{Daemon, Held, Setup, as_uid, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vfio_broker::sim::Fault;

const OWN_DEVICE: &str = "0000:66:00.0";

fn status(client: &mut Raw) -> Value {
    client.call("Status", json!({})).ok().0
}

fn keepers(status: &Value) -> Vec<Value> {
    status["keepers"].as_array().unwrap().clone()
}

#[test]
fn everybody_sees_the_version_and_administrators_all_of_it() {
    let policy = |rights: &str| {
        format!(
            "version = 1\n[[tenant]]\nname = \"a\"\nuser = 12346\ndevices = [\"{DEVICE}\"]\n\
             [[tenant]]\nname = \"b\"\nuser = 12345\ndevices = [\"{OWN_DEVICE}\"]\nrights = [\"acquire\"{rights}]\n"
        )
    };
    for (rights, sees) in [("", None), (", \"manage\"", Some(1)), (", \"observe\"", Some(2))] {
        let daemon = Daemon::with(Setup::policy(policy(rights)));
        let Some(mut other) = as_uid(12346, || daemon.connect()) else { return };
        let mut own = as_uid(12345, || daemon.connect()).unwrap();
        let _held = [
            Held::acquire(&mut other, DEVICE, "container"),
            Held::acquire(&mut own, OWN_DEVICE, "container"),
        ];
        let seen = status(&mut own);
        let version = json!({ "version": env!("CARGO_PKG_VERSION"), "keepers": [] });
        match sees {
            None => assert_eq!(seen, version),
            Some(count) => {
                assert_eq!(keepers(&seen).len(), count, "{rights}: {seen}");
                assert_eq!((&seen["pid"], &seen["connections"]), (&json!(daemon.pid()), &json!(2)));
                let leases = keepers(&seen).into_iter().map(|keeper| keeper["leases"].clone());
                assert!(leases.into_iter().any(|leases| leases[0]["tenant"] == "b"), "{seen}");
            }
        }
        // A stranger, and root, which is one too, but an administrator.
        let mut stranger = as_uid(12347, || daemon.connect()).unwrap();
        assert_eq!(status(&mut stranger), version);
        stranger.call("Leases", json!({})).error("Denied");
        let mut root = daemon.connect();
        let seen = status(&mut root);
        assert_eq!(keepers(&seen).len(), 2);
        assert_eq!(seen["policy"]["tenants"], 2, "{seen}");
        let (leases, _) = root.call("Leases", json!({})).ok();
        assert_eq!(leases["leases"].as_array().unwrap().len(), 2);
        root.call("Acquire", json!({ "vm": "v", "devices": [DEVICE] })).error("Denied");
        let (groups, _) = root.call("Topology", json!({})).ok();
        assert!(groups.to_string().contains(DEVICE), "{groups}");
        stranger.call("Topology", json!({})).error("Denied");
    }
}

#[test]
fn a_keeper_is_shown_with_its_process_and_the_call_that_it_hangs_in() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let held = Held::acquire(&mut client, DEVICE, "container");
    let keeper = keepers(&status(&mut client)).remove(0);
    assert_eq!(keeper["leases"][0]["lease"], held.reply["lease"]);
    assert_eq!((&keeper["alive"], &keeper["leases"][0]["ended"]), (&json!(true), &json!(false)));
    let name = std::fs::read_to_string(format!("/proc/{}/comm", keeper["pid"])).unwrap();
    assert_eq!(name, "vfiob-keeper\n");
    assert!(keeper["memory"].as_u64().unwrap() > keeper["shared"].as_u64().unwrap(), "{keeper}");
    assert!(keeper["since"].is_u64() && keeper["call"].is_null(), "{keeper}");
    daemon.sim().fault(&Fault::never("VFIO_IOMMU_UNMAP_DMA")).unwrap();
    drop(held);
    until("the call that it is in is shown", || {
        let keeper = keepers(&status(&mut client)).remove(0);
        keeper["call"] == "reclaim" && keeper["object"] == "/dev/vfio/26"
    });
    let keeper = keepers(&status(&mut client)).remove(0);
    assert_eq!(keeper["leases"][0]["ended"], true);
    assert!(keeper["call_since"].is_u64(), "{keeper}");
    daemon.sim().clear_faults().unwrap();
    until("no keeper is left", || keepers(&status(&mut client)).is_empty());
}

#[test]
fn a_policy_that_was_refused_is_shown_until_a_good_one_is_read() {
    let daemon = Daemon::start();
    let mut client = daemon.connect();
    let file = daemon.directory().join("host.policy.toml");
    let good = std::fs::read_to_string(&file).unwrap();
    let policy = status(&mut client)["policy"].clone();
    assert_eq!((&policy["file"], &policy["refused"]), (&json!(file), &Value::Null));
    std::fs::write(&file, format!("{good}\nnonsense = 1\n")).unwrap();
    daemon.signal(Signal::SIGHUP);
    until("it is refused", || status(&mut client)["policy"]["refused"].is_string());
    let refused = status(&mut client)["policy"].clone();
    let lines = good.lines().count() + 2;
    let at = format!("{}:{lines}:1: ", file.display());
    assert!(refused["refused"].as_str().unwrap().contains(&at), "{refused}");
    assert_eq!(refused["read"], policy["read"]);
    std::fs::write(&file, good).unwrap();
    daemon.signal(Signal::SIGHUP);
    until("it is good again", || status(&mut client)["policy"]["refused"].is_null());
}
