//! Bytes that are no messages.

use crate::common::raw::call;
use crate::common::{Daemon, Setup, beside, until};
use serde_json::json;

#[test]
fn a_message_over_64_kib() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        // The longest that fits is answered.
        let mut client = daemon.connect();
        let padded = |len: usize| {
            let message = call("org.varlink.service.GetInfo", &json!({}));
            let mut padded = message[..message.len() - 1].to_vec();
            padded.resize(len - 1, b' ');
            padded.push(0);
            padded
        };
        client.send(&padded(64 << 10));
        client.reply().ok();
        client.send(&padded((64 << 10) + 1));
        client.hangs_up();
        let mut client = daemon.connect();
        client.send(&vec![b'['; 1 << 20]);
        client.hangs_up();
    });
}

#[test]
fn half_a_message_and_silence() {
    let daemon = Daemon::with(Setup::default().argument("--read-deadline", "200"));
    beside(&daemon, || {
        let mut client = daemon.connect();
        let message = call("org.varlink.service.GetInfo", &json!({}));
        client.send(&message[..9]);
        client.hangs_up();
        // After a whole message too.
        let mut client = daemon.connect();
        client.send(&[&message[..], &message[..9]].concat());
        client.reply().ok();
        assert!(client.try_reply().is_none());
    });
    daemon.until_logged("half a message and then silence");
}

#[test]
fn half_a_message_byte_by_byte_gets_no_longer() {
    let daemon = Daemon::with(Setup::default().argument("--read-deadline", "200"));
    beside(&daemon, || {
        let mut client = daemon.connect();
        client.stream.set_nonblocking(true).unwrap();
        until("it is disconnected", || {
            client.send(b" ");
            let mut byte = [0];
            match std::io::Read::read(&mut client.stream, &mut byte) {
                Ok(len) => len == 0,
                Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
            }
        });
    });
}

#[test]
fn half_a_message_and_the_end() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let client = daemon.connect();
        client.send(b"{\"method\":\"org");
        drop(client);
    });
}

#[test]
fn json_10000_levels_deep() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let (open, close) = ("[".repeat(10_000), "]".repeat(10_000));
        let objects = format!("{}1{}", "{\"a\":".repeat(10_000), "}".repeat(10_000));
        for deep in [format!("{open}{close}"), open.clone(), objects] {
            client.send(format!("{deep}\0").as_bytes());
            client.reply().bad("message");
            for field in ["devices", "vm", "unknown", "withhold"] {
                let method = "org.vfiobroker.Broker.Acquire";
                let message =
                    format!("{{\"method\":\"{method}\",\"parameters\":{{\"{field}\":{deep}}}}}\0");
                client.send(message.as_bytes());
                client.reply().error("BadRequest");
            }
            let message =
                format!("{{\"more\":{deep},\"method\":\"org.varlink.service.GetInfo\"}}\0");
            client.send(message.as_bytes());
            client.reply().bad("message");
        }
    });
}

#[test]
fn bytes_that_are_not_utf_8() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        for odd in [&b"\xff"[..], b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"] {
            client.send(&[odd, b"\0"].concat());
            client.reply().bad("message");
            let (head, tail) = (&b"{\"method\":\""[..], &b"\"}\0"[..]);
            client.send(&[head, odd, tail].concat());
            client.reply().bad("message");
            let head = b"{\"method\":\"org.vfiobroker.Broker.Acquire\",\"parameters\":{\"vm\":\"";
            client.send(&[head, odd, b"\",\"devices\":[]}}\0"].concat());
            client.reply().error("BadRequest");
        }
        // Control characters and text that is no JSON at all.
        let list = "[\"org.varlink.service.GetInfo\",{}]";
        for odd in ["\u{1}", "nonsense", "{}", "[]", list, "{\"method\":7}", "{\"method\":\"a\"}x"]
        {
            client.send(format!("{odd}\0").as_bytes());
            client.reply().bad("message");
        }
    });
}

#[test]
fn an_empty_message_ends_the_connection() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let info = call("org.varlink.service.GetInfo", &json!({}));
        client.send(&[&info[..], &[0; 1000]].concat());
        client.reply().ok();
        assert!(client.try_reply().is_none(), "an empty message was answered");
    });
}

#[test]
fn methods_that_are_not_there() {
    let daemon = Daemon::start();
    beside(&daemon, || {
        let mut client = daemon.connect();
        let missing = "org.varlink.service.MethodNotFound";
        client.call("Explode", json!({})).error(missing);
        client.call("org.varlink.service.Explode", json!({})).error(missing);
        let missing = "org.varlink.service.InterfaceNotFound";
        client.call("org.example.Explode", json!({})).error(missing);
        client.call(&format!("{}.x", "y".repeat(60_000)), json!({})).error(missing);
        let name = "org.varlink.service.GetInterfaceDescription";
        client.call(name, json!({ "interface": "z".repeat(60_000) })).error(missing);
    });
}
