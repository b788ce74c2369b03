//! The blocking client against a broker that misbehaves.

use super::fake::{Fake, answer_and_hang_up, null, refuse_files_until_greeted, script};
use super::{Acquire, Client, DmaRange, Error, Lease};
use crate::protocol::{self, FdKind};
use std::io::Read;
use std::os::fd::AsFd;
use std::time::Duration;

const LEASES: &str = r#"{"leases":[]}"#;

fn acquire(broker: &mut Client) -> Lease {
    broker.acquire(Acquire::new("web1").device("0000:65:00.0")).unwrap()
}

#[test]
fn a_lease_comes_with_its_files_and_ends_with_its_fd() {
    let fake = Fake::new(vec![script(|mut peer| {
        let call = peer.call().unwrap();
        assert_eq!(call["method"], "org.vfiobroker.Broker.Acquire");
        let expected = serde_json::json!({"vm": "web1", "devices": [{"bdf": "0000:65:00.0"}]});
        assert_eq!(call["parameters"], expected);
        let write_end = peer.grant();
        assert!(peer.call().is_none());
        let written = nix::unistd::write(&write_end, b"x");
        assert_eq!(written, Err(nix::errno::Errno::EPIPE), "the lease fd is still open");
    })]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let lease = acquire(&mut broker);
    assert_eq!((lease.id(), lease.key(), lease.vm()), ("l1", "k1", "web1"));
    assert_eq!((lease.tenant(), lease.iommu()), ("t", "type1v2"));
    assert_eq!(lease.group().unwrap().node().to_string(), "/dev/vfio/26");
    lease.container().unwrap();
    let missing = lease.copy(FdKind::Iommufd, None).unwrap_err().to_string();
    assert!(missing.contains("without an iommufd"), "{missing}");
    let missing = lease.device("0000:01:00.0").unwrap_err().to_string();
    assert!(missing.contains("its devices are 0000:65:00.0"), "{missing}");
    drop(lease);
    drop(broker);
    fake.join();
}

#[test]
fn files_that_are_refused_before_the_connection_is_let_in_are_sent_after_that() {
    let fake = Fake::new(vec![refuse_files_until_greeted(true)]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let lease = acquire(&mut broker);
    broker.map_dma(&lease, null(), DmaRange::new(4096, 4096)).unwrap();
    drop(broker);
    fake.join();
}

#[test]
fn files_that_are_refused_for_good_are_an_error_that_says_why() {
    let fake = Fake::new(vec![refuse_files_until_greeted(false)]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let lease = acquire(&mut broker);
    if let Err(error) = broker.map_dma(&lease, null(), DmaRange::new(4096, 4096)) {
        let error = error.to_string();
        let can_refuse = !error.contains("was lost");
        assert!(!can_refuse || error.contains("lacks the handout"), "{error}");
    }
    drop(broker);
    fake.join();
}

#[test]
fn the_lease_fd_reads_end_of_file_when_the_broker_ends_the_lease() {
    let fake = Fake::new(vec![script(|mut peer| {
        peer.call();
        drop(peer.grant());
        peer.call();
    })]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let lease = acquire(&mut broker);
    let mut lifeline = std::fs::File::from(lease.lifeline().try_clone_to_owned().unwrap());
    assert_eq!(lifeline.read(&mut [0]).unwrap(), 0);
    drop(broker);
    fake.join();
}

#[test]
fn release_closes_the_files_before_it_asks() {
    let (sent, observed) = std::sync::mpsc::channel();
    let fake = Fake::new(vec![script(move |mut peer| {
        peer.call();
        let (group_read, group_write) = std::io::pipe().unwrap();
        let (lease_read, lease_write) = std::io::pipe().unwrap();
        peer.reply(
            r#"{"lease":"l1","key":"k1","tenant":"t","backend":"type1","handout":"group",
               "iommu":"type1v2","container":"c","devices":[],"fds":[
               {"index":0,"kind":"group","name":"26"},{"index":1,"kind":"lease","name":""}]}"#,
            &[group_read.as_fd(), lease_read.as_fd()],
        );
        drop((group_read, lease_read));
        let call = peer.call().unwrap();
        assert_eq!(call["parameters"], serde_json::json!({"lease": "l1", "key": "k1"}));
        let closed = nix::unistd::write(&group_write, b"x").is_err();
        let kept = nix::unistd::write(&lease_write, b"x").is_ok();
        sent.send((closed, kept)).unwrap();
        peer.reply(r#"{"proved":true}"#, &[]);
    })]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let lease = acquire(&mut broker);
    assert!(broker.release(lease).unwrap());
    assert_eq!(observed.recv().unwrap(), (true, true));
    fake.join();
}

#[test]
fn memory_goes_with_the_call_as_number_0() {
    let fake = Fake::new(vec![script(|mut peer| {
        peer.call();
        let _lease = peer.grant();
        let call = peer.call().unwrap();
        let expected = serde_json::json!({"lease": "l1", "key": "k1", "iova": 4096, "size": 8192,
            "read": true, "write": true, "memory": 0, "offset": 0});
        assert_eq!((&call["parameters"], peer.fds.len()), (&expected, 1));
        peer.reply("{}", &[]);
        assert_eq!(peer.call().unwrap()["parameters"]["size"], 8192);
        peer.reply(r#"{"unmapped":8192}"#, &[]);
    })]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let lease = acquire(&mut broker);
    broker.map_dma(&lease, null(), DmaRange::new(4096, 8192)).unwrap();
    assert_eq!(broker.unmap_dma(&lease, 4096, 8192).unwrap(), 8192);
    fake.join();
}

#[test]
fn a_call_on_a_connection_that_was_closed_is_made_on_a_new_one() {
    let (answer, hung_up) = answer_and_hang_up(LEASES);
    let fake = Fake::new(vec![
        answer,
        script(|mut peer| {
            assert_eq!(peer.call().unwrap()["method"], "org.vfiobroker.Broker.Acquire");
            peer.grant();
        }),
    ]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    assert!(broker.leases().unwrap().is_empty());
    hung_up.recv().unwrap();
    acquire(&mut broker);
    fake.join();
}

#[test]
fn a_lost_answer_is_asked_for_again_only_where_that_changes_nothing() {
    let hang_up = || {
        script(|mut peer| {
            peer.call();
        })
    };
    let (answer, hung_up) = answer_and_hang_up(LEASES);
    let fake = Fake::new(vec![hang_up(), answer, hang_up(), hang_up(), hang_up()]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    broker.leases().unwrap();
    hung_up.recv().unwrap();
    let error = broker.acquire(Acquire::new("web1").device("0000:65:00.0")).unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    let error = broker.leases().unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "tried twice, not for ever: {error}");
    fake.join();
}

#[test]
fn a_broker_that_comes_back_later_is_waited_for() {
    let fake = Fake::new(vec![script(|mut peer| {
        peer.call();
        peer.reply(LEASES, &[]);
    })]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    broker.leases().unwrap();
    std::fs::remove_file(&fake.path).unwrap();
    let caller = std::thread::spawn(move || broker.leases().map(|leases| leases.len()));
    let back = Fake::serve_at(
        &fake.path,
        vec![script(|mut peer| {
            peer.call();
            peer.reply(LEASES, &[]);
        })],
    );
    assert_eq!(caller.join().unwrap().unwrap(), 0);
    back.join().unwrap();
    fake.join();
}

#[test]
fn a_late_answer_is_never_taken_for_another() {
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let fake = Fake::new(vec![
        script(move |mut peer| {
            peer.call();
            wait.recv().unwrap();
            assert!(peer.call().is_none(), "the client keeps a connection that timed out");
        }),
        script(|mut peer| {
            peer.call();
            peer.reply(LEASES, &[]);
        }),
    ]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    broker.set_timeout(Some(Duration::from_millis(10)));
    let error = broker.topology().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    go_on.send(()).unwrap();
    broker.set_timeout(None);
    broker.leases().unwrap();
    fake.join();
}

#[test]
fn what_the_broker_says_unasked_answers_nothing() {
    let stray = r#"{"parameters":{"groups":[{"id":1,"viable":true,"state":"free",
        "blockers":[],"devices":[]}]}}"#;
    // With the answer in one piece, and after it.
    for together in [true, false] {
        let (said, heard) = std::sync::mpsc::channel();
        let fake = Fake::new(vec![
            script(move |mut peer| {
                peer.call();
                let answer = format!("{{\"parameters\":{LEASES}}}\0");
                if together {
                    peer.say(format!("{answer}{stray}\0").as_bytes(), &[]);
                } else {
                    peer.say(answer.as_bytes(), &[]);
                    peer.say(format!("{stray}\0").as_bytes(), &[]);
                }
                said.send(()).unwrap();
                assert!(peer.call().is_none(), "the connection is still in use");
            }),
            script(|mut peer| {
                assert_eq!(peer.call().unwrap()["method"], "org.vfiobroker.Broker.Topology");
                peer.reply(r#"{"groups":[]}"#, &[]);
            }),
        ]);
        let mut broker = Client::connect_to(&fake.path).unwrap();
        broker.leases().unwrap();
        heard.recv().unwrap();
        assert!(broker.topology().unwrap().is_empty(), "it took the stray message for its answer");
        fake.join();
    }
}

#[test]
fn an_error_keeps_the_connection() {
    let fake = Fake::new(vec![script(|mut peer| {
        peer.call();
        peer.say(
            b"{\"error\":\"org.vfiobroker.Broker.Busy\",\"parameters\":{\"device\":\"d\"}}\0",
            &[],
        );
        peer.call();
        peer.reply(LEASES, &[]);
    })]);
    let mut broker = Client::connect_to(&fake.path).unwrap();
    let error = broker.acquire(Acquire::new("web1").device("0000:65:00.0")).unwrap_err();
    assert!(matches!(error, Error::Broker { error: protocol::Error::Busy { .. }, .. }), "{error}");
    broker.leases().unwrap();
    fake.join();
}

#[test]
fn answers_that_are_none_are_errors_and_leak_nothing() {
    let grant = |fds: &str| {
        format!(
            r#"{{"parameters":{{"lease":"l","key":"k","tenant":"t","backend":"type1",
            "handout":"group","iommu":"i","container":"c","devices":[],"fds":[{fds}]}}}}"#
        ) + "\0"
    };
    let lease_at = |index: usize| format!(r#"{{"index":{index},"kind":"lease","name":""}}"#);
    let cases: Vec<(Vec<u8>, usize)> = vec![
        (b"hello\0".to_vec(), 1),
        (b"{\"parameters\":{}}\0".to_vec(), 1),
        (vec![b'x'; 70_000], 1),
        (grant("").into(), 0),
        (grant("").into(), 1),
        (grant(&lease_at(0)).into(), 0),
        (grant(&lease_at(3)).into(), 3),
        (grant(&[lease_at(0), lease_at(0)].join(",")).into(), 1),
        (grant(&lease_at(0)).into(), 17),
    ];
    for (answer, count) in cases {
        let (read_end, write_end) = std::io::pipe().unwrap();
        let said = answer.clone();
        let fake = Fake::new(vec![script(move |mut peer| {
            peer.call();
            // Of more than the client reads, the rest may find the connection closed.
            let fds = vec![read_end.as_fd(); count];
            let _ = peer.try_say(&said, &fds);
        })]);
        let mut broker = Client::connect_to(&fake.path).unwrap();
        let result = broker.acquire(Acquire::new("web1").device("0000:65:00.0"));
        let text = String::from_utf8_lossy(&answer).into_owned();
        let error = result.map(|_| text).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. } | Error::Fds { .. }), "{error}");
        fake.join();
        let closed = nix::unistd::write(&write_end, b"x").is_err();
        assert!(closed, "{count} files with {error}");
    }
}

#[test]
fn a_watch_gives_events_until_the_broker_ends_it() {
    let event = |name: &str, continues: bool| {
        format!(
            r#"{{"parameters":{{"event":"{name}","lease":"l1","vm":"web1","tenant":"t",
            "devices":[],"at":1}},"continues":{continues}}}"#
        ) + "\0"
    };
    let both = event("acquired", true) + &event("gone", false);
    let fake = Fake::new(vec![
        script(|mut peer| assert!(peer.call().is_none())),
        script(move |mut peer| {
            let call = peer.call().unwrap();
            assert_eq!((&call["more"], &call["parameters"]["lease"]), (&true.into(), &"l1".into()));
            peer.say(both.as_bytes(), &[]);
        }),
    ]);
    let broker = Client::connect_to(&fake.path).unwrap();
    let watch = broker.watch(Some("l1")).unwrap();
    drop(broker);
    let events: Vec<_> = watch.map(|event| event.unwrap().event).collect();
    assert_eq!(events, [protocol::EventKind::Acquired, protocol::EventKind::Gone]);
    fake.join();
}

#[test]
fn where_there_is_no_broker_the_error_says_what_to_look_at() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("broker.sock");
    let says = |path: &std::path::Path, what: &str, advice: &str| {
        let error = Client::connect_to(path).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert!(error.advice().unwrap().contains(advice), "{error:?}");
    };
    says(&path, "ENOENT", "is vfio-brokerd running");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    says(&path, "ECONNREFUSED", "nobody listens");
    says("/".repeat(200).as_ref(), "can't connect", "too long");
}
