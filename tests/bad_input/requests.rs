//! Requests that are no good.

use crate::DEVICE;
use crate::common::raw::Reply;
use crate::common::{Daemon, beside};
use serde_json::{Value, json};

/// Sends one request with each set of parameters, with a neighbour beside it.
fn each(method: &str, cases: &[Value], check: impl Fn(Reply, &Value)) {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        for parameters in cases {
            check(client.call(method, parameters.clone()), parameters);
        }
    });
}

/// Fails unless each set of parameters gets a BadRequest about `field` that says `why`.
fn each_is_bad(method: &str, field: &str, why: &str, cases: &[Value]) {
    each(method, cases, |reply, parameters| {
        let reason = reply.bad(field);
        assert!(reason.contains(why), "{parameters}: {reason}");
    });
}

#[test]
fn unknown_fields() {
    let cases = [
        json!({ "vm": "a", "devices": [DEVICE], "force": true }),
        json!({ "vm": "a", "devices": [{ "bdf": DEVICE, "force": true }] }),
    ];
    each_is_bad("Acquire", "parameters", "unknown field `force`", &cases);
    let cases = [json!({ "x": 1 }), json!({ "lease": 1 })];
    each_is_bad("Leases", "parameters", "unknown field", &cases);
}

#[test]
fn wrong_types() {
    let cases = [
        json!({ "vm": 7, "devices": [DEVICE] }),
        json!({ "vm": "a", "devices": DEVICE }),
        json!({ "vm": "a", "devices": [7] }),
        json!({ "vm": "a", "devices": [[DEVICE]] }),
        json!({ "vm": "a", "devices": [{ "bdf": 7 }] }),
        json!({ "vm": "a", "devices": [DEVICE], "handout": true }),
        json!({ "vm": "a", "devices": [DEVICE], "handout": "everything" }),
        json!(["a", [DEVICE]]),
        json!("a"),
        json!(null),
        json!({}),
    ];
    each_is_bad("Acquire", "parameters", "", &cases);
}

#[test]
fn huge_numbers() {
    let numbers = ["1e400", "18446744073709551616", "-1", "1.5", "9".repeat(60_000).as_str()]
        .map(str::to_owned);
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        for number in &numbers {
            let message = format!(
                "{{\"method\":\"org.vfiobroker.Broker.UnmapDma\",\"parameters\":{{\"lease\":\"a\",\
                 \"key\":\"b\",\"iova\":0,\"size\":{number}}}}}\0"
            );
            client.send(message.as_bytes());
            client.reply().bad("parameters");
        }
    });
}

#[test]
fn a_vm_name_that_is_empty_or_long_or_odd() {
    let vm = |vm: &str| json!({ "vm": vm, "devices": [DEVICE] });
    let cases = [
        vm(""),
        vm(&"x".repeat(300)),
        vm(&"x".repeat(65)),
        vm("a b"),
        vm("a\nlease begins"),
        vm("\u{1b}[31m"),
        vm("käse"),
    ];
    each_is_bad("Acquire", "vm", "1 to 64", &cases);
}

#[test]
fn a_device_twice() {
    let cases = [
        json!({ "vm": "a", "devices": [DEVICE, DEVICE] }),
        json!({ "vm": "a", "devices": [DEVICE, { "bdf": DEVICE }] }),
        json!({ "vm": "a", "devices": [DEVICE], "withhold": [DEVICE] }),
    ];
    each_is_bad("Acquire", "devices", "named twice", &cases);
}

#[test]
fn a_bdf_of_odd_form() {
    let odd = [
        "",
        "65:00.0",
        "0000:65:00",
        "0000:65:00.8",
        "0000:65:20.0",
        "000:65:00.0",
        "0000:6500.0",
        "0000:65:00.0 ",
        "0000:65:00.0\0",
        "../../../etc/passwd",
        "123456789:65:00.0",
        "0000:+5:00.0",
        "０000:65:00.0",
    ];
    let cases: Vec<_> = odd.map(|bdf| json!({ "vm": "a", "devices": [bdf] })).into();
    each_is_bad("Acquire", "parameters", "not a PCI address", &cases);
    let cases: Vec<_> = odd.map(|bdf| json!({ "vm": "a", "devices": [{ "bdf": bdf }] })).into();
    each_is_bad("Acquire", "parameters", "not a PCI address", &cases);
}
