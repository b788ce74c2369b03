//! The monitor's client against a peer that says what a test tells it to.

use super::{Error, Monitor};
use crate::sys::fdpass;
use nix::sys::socket::MsgFlags;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;
/// Long enough to be waited for in vain, in tests of silence.
const SHORT: Duration = Duration::from_millis(50);

/// One connection, from QEMU's side.
struct Peer(BufReader<UnixStream>);

impl Peer {
    fn say(&mut self, text: &str) {
        // The other side may have given up.
        let _ = self.0.get_mut().write_all(format!("{text}\r\n").as_bytes());
    }

    /// The next command; `None` at the end.
    fn command(&mut self) -> Option<Value> {
        let mut line = String::new();
        let len = self.0.read_line(&mut line).unwrap_or(0);
        (len > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    fn answer(&mut self, command: &Value, value: Value) {
        self.say(&json!({ "return": value, "id": command["id"] }).to_string());
    }

    fn greet(&mut self) {
        self.say(GREETING);
        let command = self.command().unwrap();
        assert_eq!(command["execute"], "qmp_capabilities");
        self.answer(&command, json!({}));
    }
}

struct Scripted {
    path: PathBuf,
    _directory: tempfile::TempDir,
    thread: JoinHandle<()>,
}

impl Scripted {
    fn new(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            script(Peer(BufReader::new(listener.accept().unwrap().0)));
        });
        Self { path, _directory: directory, thread }
    }

    fn connect(&self) -> super::Result<Monitor> {
        Monitor::connect_within(&self.path, Duration::from_secs(20))
    }

    fn join(self) {
        self.thread.join().unwrap();
    }
}

/// What comes of a command to which the peer says this.
fn answered(said: impl FnOnce(&mut Peer, &Value) + Send + 'static) -> super::Result<Value> {
    let qemu = Scripted::new(|mut peer| {
        peer.greet();
        let command = peer.command().unwrap();
        said(&mut peer, &command);
    });
    let result = qemu.connect().unwrap().execute("query-status", json!({}));
    qemu.join();
    result
}

#[test]
fn events_and_others_answers_come_between() {
    let qemu = Scripted::new(|mut peer| {
        peer.say(r#"{"return": {}, "id": "somebody who has gone"}"#);
        peer.say(r#"{"event": "EARLY"}"#);
        peer.greet();
        let command = peer.command().unwrap();
        peer.say(r#"{"event": "ONE", "data": {"device": "d"}}"#);
        peer.say(r#"{"error": {"class": "GenericError", "desc": "not yours"}, "id": 1}"#);
        peer.say(r#"{"return": "not yours either"}"#);
        peer.answer(&command, json!({ "running": true }));
        peer.say(r#"{"event": "TWO"}"#);
        peer.command();
    });
    let mut monitor = qemu.connect().unwrap();
    assert_eq!(monitor.version().to_string(), "10.0.2");
    assert_eq!(monitor.execute("query-status", json!({})).unwrap(), json!({ "running": true }));
    let event = monitor.event(SHORT).unwrap().unwrap();
    assert_eq!((&*event.name, &event.data["device"]), ("ONE", &json!("d")));
    assert_eq!(monitor.event(Duration::from_secs(20)).unwrap().unwrap().name, "TWO");
    assert_eq!(monitor.event(SHORT).unwrap(), None);
    drop(monitor);
    qemu.join();
}

#[test]
fn an_error_is_an_answer_and_the_monitor_goes_on() {
    let qemu = Scripted::new(|mut peer| {
        peer.greet();
        let first = peer.command().unwrap();
        let error = json!({ "class": "DeviceNotFound", "desc": "Device 'd' not found" });
        peer.say(&json!({ "error": error, "id": first["id"] }).to_string());
        let second = peer.command().unwrap();
        assert_ne!(first["id"], second["id"]);
        // What QEMU can't read is answered without an id.
        peer.say(r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#);
        let third = peer.command().unwrap();
        peer.answer(&third, json!(3));
    });
    let mut monitor = qemu.connect().unwrap();
    let error = monitor.execute("device_del", json!({ "id": "d" })).unwrap_err();
    let Error::Command { command, class, desc } = &error else { panic!("{error}") };
    assert_eq!([&**command, &**class], ["device_del", "DeviceNotFound"]);
    assert_eq!(desc, "Device 'd' not found");
    assert!(monitor.execute("x", json!({})).unwrap_err().is_answer());
    assert_eq!(monitor.execute("x", json!({})).unwrap(), json!(3));
    qemu.join();
}

#[test]
fn an_open_file_goes_along() {
    let (read_end, write_end) = nix::unistd::pipe().unwrap();
    let qemu = Scripted::new(|mut peer| {
        peer.greet();
        let mut buf = [0; 1000];
        let socket = peer.0.get_ref().as_fd();
        let got = fdpass::receive(socket, &mut buf, 2, MsgFlags::empty()).unwrap();
        let command: Value = serde_json::from_slice(&buf[..got.len]).unwrap();
        assert_eq!(command["execute"], "getfd");
        assert_eq!(command["arguments"], json!({ "fdname": "lease" }));
        let [file]: [OwnedFd; 1] = got.fds.try_into().unwrap();
        assert_eq!(nix::unistd::write(&file, b"hello").unwrap(), 5);
        peer.answer(&command, json!({}));
    });
    qemu.connect().unwrap().getfd("lease", write_end).unwrap();
    qemu.join();
    let mut buf = [0; 5];
    nix::unistd::read(&read_end, &mut buf).unwrap();
    assert_eq!(&buf, b"hello");
}

#[test]
fn what_is_not_qmp_is_said_to_be_so() {
    let bad: [(&str, &str); 6] = [
        ("HTTP/1.1 400 Bad Request", "expected"),
        ("[1, 2]", "no object"),
        ("{}", "nothing in it"),
        (r#"{"error": "x"}"#, "without class"),
        (r#"{"QMP": {"version": {}}}"#, "without version"),
        (r#"{"surprise": 1}"#, "surprise"),
    ];
    for (line, reason) in bad {
        let error = answered(move |peer, _| peer.say(line)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Malformed { .. }), "{text}");
        assert!(text.contains("query-status") && text.contains(reason), "{text}");
    }
}

#[test]
fn an_endless_line_ends_the_conversation() {
    let error = answered(|peer, _| {
        let part = "x".repeat(1 << 16);
        // As much as the other side takes.
        while peer.0.get_mut().write_all(part.as_bytes()).is_ok() {}
    });
    assert!(matches!(error.unwrap_err(), Error::Malformed { .. }));
}

#[test]
fn an_end_is_told_wherever_it_comes() {
    let qemu = Scripted::new(drop);
    let Error::Closed { during, .. } = qemu.connect().unwrap_err() else { panic!() };
    assert_eq!(during, "the greeting");
    let error = answered(|_, _| {}).unwrap_err();
    assert!(matches!(&error, Error::Closed { during, .. } if during == "query-status"), "{error}");
    let error = answered(|peer, _| drop(peer.0.get_mut().write_all(b"{\"retu"))).unwrap_err();
    assert!(matches!(error, Error::Closed { .. }), "{error}");
}

#[test]
fn files_from_qemu_are_not_taken() {
    let error = answered(|peer, _| {
        let null = std::fs::File::open("/dev/null").unwrap();
        let socket = peer.0.get_ref().as_fd();
        fdpass::send(socket, b"{}\r\n", &[null.as_fd()], MsgFlags::empty()).unwrap();
    });
    assert!(matches!(error.unwrap_err(), Error::Malformed { .. }));
}

#[test]
fn silence_has_an_end_and_nothing_is_said_after_it() {
    let qemu = Scripted::new(|mut peer| {
        peer.greet();
        let late = peer.command().unwrap();
        assert_eq!(peer.command(), None);
        peer.answer(&late, json!({}));
    });
    let mut monitor = qemu.connect().unwrap();
    monitor.set_timeout(SHORT);
    let error = monitor.execute("stop", json!({})).unwrap_err();
    assert!(matches!(error, Error::Timeout { after: SHORT, .. }), "{error}");
    let error = monitor.execute("cont", json!({})).unwrap_err();
    assert_eq!(error, Error::Broken { command: "cont".into() });
    assert!(matches!(monitor.event(SHORT), Err(Error::Broken { .. })));
    drop(monitor);
    qemu.join();
}

#[test]
fn a_monitor_that_has_a_client_is_silent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let _listener = UnixListener::bind(&path).unwrap();
    let error = Monitor::connect_within(&path, SHORT).unwrap_err();
    assert!(error.advice().unwrap().contains("is another client connected"), "{error}");
    let error = Monitor::connect(directory.path().join("other")).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
}

#[test]
fn a_flood_of_events_is_not_kept() {
    let qemu = Scripted::new(|mut peer| {
        peer.greet();
        let command = peer.command().unwrap();
        for number in 0..3000 {
            peer.say(&json!({ "event": "E", "data": number }).to_string());
        }
        peer.answer(&command, json!({}));
    });
    let mut monitor = qemu.connect().unwrap();
    monitor.execute("x", json!({})).unwrap();
    assert_eq!(monitor.event(SHORT).unwrap().unwrap().data, json!(3000 - 1024));
    qemu.join();
}

#[test]
fn large_events_are_not_kept() {
    const LARGE: usize = 1 << 18;
    let qemu = Scripted::new(|mut peer| {
        peer.greet();
        let command = peer.command().unwrap();
        for number in 0..20 {
            let data = json!([number, "x".repeat(LARGE)]);
            peer.say(&json!({ "event": "E", "data": data }).to_string());
        }
        peer.answer(&command, json!({}));
        peer.command();
    });
    let mut monitor = qemu.connect().unwrap();
    monitor.execute("x", json!({})).unwrap();
    let events = std::iter::from_fn(|| monitor.event(Duration::ZERO).unwrap());
    let numbers: Vec<_> = events.map(|event| event.data[0].clone()).collect();
    assert_eq!(numbers, [17, 18, 19], "three of them are less than a MiB");
    drop(monitor);
    qemu.join();
}

#[test]
fn who_never_stops_talking_is_given_up() {
    for flood in [r#"{"event": "E"}"#, r#"{"return": {}, "id": 1}"#, ""] {
        let talk = move |mut peer: Peer| {
            let flood = format!("{flood}\r\n").repeat(100);
            while peer.0.get_mut().write_all(flood.as_bytes()).is_ok() {}
        };
        let greeted = move |mut peer: Peer| {
            peer.greet();
            talk(peer);
        };
        let qemu = Scripted::new(talk);
        let error = Monitor::connect_within(&qemu.path, SHORT).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        qemu.join();
        let qemu = Scripted::new(greeted);
        let mut monitor = qemu.connect().unwrap();
        monitor.set_timeout(SHORT);
        let error = monitor.execute("x", json!({})).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        drop(monitor);
        qemu.join();
        let qemu = Scripted::new(greeted);
        let mut monitor = qemu.connect().unwrap();
        monitor.forget_events();
        let event = monitor.event(SHORT).unwrap();
        assert_eq!(event.is_some(), flood.contains("event"));
        drop(monitor);
        qemu.join();
    }
}
