//! Leases that are somebody else's.

use crate::common::{Daemon, Held, beside};
use crate::{DEVICE, PAGE};
use serde_json::json;

#[test]
fn another_leases_id() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let mine = Held::acquire(&mut client, DEVICE, "container");
        let theirs = Held::acquire(&mut client, "0000:66:00.0", "container");
        let crossed = json!({ "lease": theirs.reply["lease"], "key": mine.reply["key"] });
        for method in ["GetFds", "Release"] {
            client.call(method, crossed.clone()).error("NoSuchLease");
        }
        let mut unmap = crossed.clone();
        unmap["iova"] = json!(0);
        unmap["size"] = json!(PAGE);
        client.call("UnmapDma", unmap).error("NoSuchLease");
        let mut more = crossed.clone();
        more["vm"] = json!("a");
        more["devices"] = json!(["0000:67:00.0"]);
        client.call("Acquire", more).error("NoSuchLease");
        client.call("GetFds", theirs.key()).ok();
    });
}

#[test]
fn a_wrong_key() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "container");
        let right = lease.reply["key"].as_str().unwrap().to_owned();
        let mut one_off = right.clone();
        let last = one_off.pop().unwrap();
        one_off.push(if last == '0' { '1' } else { '0' });
        let long = "0".repeat(60_000);
        for key in ["", "x", "käse", &right[1..], &one_off, &right.to_uppercase(), &long] {
            if key == right {
                continue;
            }
            let request = json!({ "lease": lease.reply["lease"], "key": key });
            client.call("GetFds", request.clone()).error("NoSuchLease");
            client.call("Release", request).error("NoSuchLease");
        }
        let nobody = json!({ "lease": "nobody's", "key": right });
        client.call("GetFds", nobody).error("NoSuchLease");
        client.call("GetFds", lease.key()).ok();
    });
}
