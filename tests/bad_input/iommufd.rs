//! Requests for iommufd that make no sense, and calls that a lease by iommufd can't serve.

use crate::common::{Daemon, Held, beside};
use crate::{DEVICE, PAGE};
use serde_json::{Value, json};

fn with(more: Value) -> Value {
    let mut request = json!({ "vm": "test", "devices": [DEVICE] });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

#[test]
fn what_contradicts_itself() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        for (more, error) in [
            (json!({ "backend": "type1", "handout": "iommufd" }), "BadRequest"),
            (json!({ "backend": "iommufd", "handout": "group" }), "BadRequest"),
            (json!({ "backend": "iommufd", "container": "pool" }), "BadRequest"),
            (json!({ "backend": "vfio" }), "BadRequest"),
            (json!({ "backend": "iommufd", "devices": [DEVICE, DEVICE] }), "BadRequest"),
            (json!({ "backend": "iommufd", "devices": [] }), "BadRequest"),
            (json!({ "backend": "iommufd", "withhold": [DEVICE] }), "BadRequest"),
            (json!({ "backend": "iommufd", "devices": ["0000:99:00.0"] }), "NoSuchDevice"),
            (json!({ "backend": "iommufd", "vf_token": "x" }), "BadRequest"),
        ] {
            client.call("Acquire", with(more)).error(error);
        }
    });
    assert!(daemon.sim().stats().unwrap().is_idle());
}

#[test]
fn calls_on_a_lease_that_nothing_is_kept_of() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let lease = Held::acquire(&mut client, DEVICE, "iommufd");
        client.call("GetFds", lease.key()).error("Unsupported");
        let range = json!({ "iova": 0, "size": PAGE });
        client.call("UnmapDma", lease.with(range)).error("Unsupported");
        let other = json!(["0000:66:00.0"]);
        for (more, error) in [
            (json!({ "devices": other, "backend": "type1" }), "Conflict"),
            (json!({ "devices": other, "handout": "container" }), "Conflict"),
            (json!({ "devices": other, "vm": "another" }), "Conflict"),
            (json!({ "devices": [DEVICE] }), "Conflict"),
            (json!({ "devices": other, "key": "0" }), "NoSuchLease"),
        ] {
            let mut request = with(lease.key());
            request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            client.call("Acquire", request).error(error);
        }
    });
    assert!(daemon.sim().stats().unwrap().is_idle());
}
