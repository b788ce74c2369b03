//! No room where the daemon writes down who has what: the directory of its keepers is on a full tmpfs.

use crate::DEVICE;
use crate::common::raw::{Raw, Reply};
use crate::common::{Daemon, Held, skipped, until};
use crate::restart::{Machine, end, states};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

const OTHER: &str = "0000:66:00.0";
const PAGE: u64 = 4096;

/// A small file system over a machine's runtime directory.
struct SmallRun(PathBuf);

impl SmallRun {
    fn mount(machine: &Machine) -> Option<Self> {
        let at = machine.directory.path().join("run");
        std::fs::create_dir(&at).unwrap();
        let options = Some("size=256k,mode=755");
        match mount(Some("test"), &at, Some("tmpfs"), MsFlags::empty(), options) {
            Ok(()) => Some(Self(at)),
            Err(errno) => {
                skipped(&format!("no tmpfs can be mounted here ({errno}); root is needed"));
                None
            }
        }
    }

    /// Leaves room for so many pages, and no more.
    fn fill_but(&self, pages: u64) {
        let mut file = File::create(self.filling()).unwrap();
        while file.write_all(&[0; PAGE as usize]).is_ok() {}
        let full = file.metadata().unwrap().len() / PAGE * PAGE;
        file.set_len(full - pages * PAGE).unwrap();
    }

    fn make_room(&self) {
        std::fs::remove_file(self.filling()).unwrap();
    }

    fn filling(&self) -> PathBuf {
        self.0.join("filling")
    }
}

impl Drop for SmallRun {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn acquire(client: &mut Raw, device: &str, handout: &str) -> Reply {
    client.call("Acquire", json!({ "vm": "v", "devices": [device], "handout": handout }))
}

fn leases(daemon: &Daemon) -> Vec<Value> {
    let (reply, _) = daemon.connect().call("Leases", json!({})).ok();
    let leases = reply["leases"].as_array().unwrap().iter();
    leases.map(|lease| lease["lease"].clone()).collect()
}

fn is_free(daemon: &Daemon, device: &str) -> bool {
    let (topology, _) = daemon.connect().call("Topology", json!({})).ok();
    let groups = topology["groups"].as_array().unwrap();
    groups.iter().any(|it| it["devices"][0]["bdf"] == device && it["state"] == "free")
}

fn map(client: &mut Raw, held: &Held, iova: u64) -> Reply {
    let memory = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memory, PAGE as i64).unwrap();
    let range = json!({
        "iova": iova, "size": PAGE, "read": true, "write": true, "memory": 0, "offset": 0,
    });
    client.call_with("MapDma", held.with(range), &[memory.as_fd()])
}

fn is_no_room(reply: Reply) {
    let error = reply.error("Kernel");
    assert_eq!((&error["call"], &error["name"]), (&json!("write"), &json!("ENOSPC")), "{error}");
}

#[test]
fn with_no_room_nothing_is_handed_out_and_leases_go_on() {
    let machine = Machine::start();
    let Some(run) = SmallRun::mount(&machine) else { return };
    let mut daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "devices");
    run.fill_but(0);
    let before = machine.sim.stats().unwrap();
    for handout in ["container", "group", "devices", "iommufd"] {
        is_no_room(acquire(&mut daemon.connect(), OTHER, handout));
        let more = held.with(json!({ "vm": "test", "devices": [OTHER], "handout": "devices" }));
        is_no_room(daemon.connect().call("Acquire", more));
        until("nothing is left of it", || machine.sim.stats().unwrap() == before);
        until("its keeper has ended", || states(&machine).len() == 1);
        assert!(is_free(&daemon, OTHER));
    }
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut client = daemon.connect_and_greet();
        assert_eq!(leases(&daemon), [held.reply["lease"].clone()]);
        map(&mut client, &held, 0).ok();
        let range = held.with(json!({ "iova": 0, "size": PAGE }));
        client.call("UnmapDma", range).ok();
        // A start takes no room of its own.
        end(daemon, signal);
        daemon = machine.daemon();
    }
    daemon.connect().call("Release", held.key()).ok();
    drop(held);
    until("it is taken back", || is_free(&daemon, DEVICE));
    run.make_room();
    for handout in ["container", "group", "devices", "iommufd"] {
        acquire(&mut daemon.connect(), OTHER, handout).ok();
        until("it is taken back", || leases(&daemon).is_empty());
    }
}

/// The last pages: what was handed out is known to the next daemon, however little could be written.
#[test]
fn what_was_handed_out_with_the_last_room_is_known_after_a_restart() {
    let machine = Machine::start();
    let Some(run) = SmallRun::mount(&machine) else { return };
    let mut given = Vec::new();
    for handout in ["container", "group", "devices"] {
        for pages in 1..4 {
            let daemon = machine.daemon();
            run.fill_but(pages);
            let reply = acquire(&mut daemon.connect(), DEVICE, handout);
            end(daemon, Signal::SIGKILL);
            let daemon = machine.daemon();
            match reply {
                Reply::Ok(reply, fds) => {
                    given.push(pages);
                    let held = Held { reply, fds };
                    assert_eq!(leases(&daemon), [held.reply["lease"].clone()], "{handout} {pages}");
                    daemon.connect().call("Release", held.key()).ok();
                }
                refused => is_no_room(refused),
            }
            until("it is taken back", || is_free(&daemon, DEVICE));
            end(daemon, Signal::SIGKILL);
            until("no keeper is left", || states(&machine).is_empty());
            run.make_room();
        }
    }
    assert!(given.contains(&3), "{given:?}");
}

/// What could not be written is once it can be, before anybody else could need it.
#[test]
fn what_could_not_be_written_is_once_there_is_room() {
    let machine = Machine::start();
    let Some(run) = SmallRun::mount(&machine) else { return };
    let daemon = machine.daemon();
    let held = Held::acquire(&mut daemon.connect(), DEVICE, "iommufd");
    run.fill_but(0);
    let text = |path: &Path| std::fs::read_to_string(path).unwrap();
    let state = states(&machine).remove(0);
    let key = held.key();
    let grace = json!({ "lease": held.reply["lease"], "grace": 3600 });
    let revoking = daemon.connect();
    revoking.send(&crate::common::raw::call("Revoke", &grace));
    let is_revoked = || leases_revoking(&daemon);
    until("it is being revoked", is_revoked);
    assert!(!text(&state).contains("\"force\""), "there was no room for it");
    run.make_room();
    until("it is written down", || text(&state).contains("\"force\""));
    daemon.connect().call("Release", key).ok();
    drop(held);
}

fn leases_revoking(daemon: &Daemon) -> bool {
    let (reply, _) = daemon.connect().call("Leases", json!({})).ok();
    reply["leases"][0]["revoked"].is_object()
}

#[test]
fn a_policy_that_can_not_be_written_for_keepers_is_refused() {
    let machine = Machine::start();
    let Some(run) = SmallRun::mount(&machine) else { return };
    let daemon = machine.daemon();
    let status = || daemon.connect().call("Status", json!({})).ok().0["policy"].clone();
    let before = status();
    let policy = std::fs::read_to_string(machine.policy()).unwrap();
    std::fs::write(machine.policy(), policy.replace("\"8086:10d3\"", "\"8086:ffff\"")).unwrap();
    run.fill_but(0);
    daemon.signal(Signal::SIGHUP);
    until("it is refused", || status()["refused"].is_string());
    let refused = status();
    assert!(refused["refused"].as_str().unwrap().contains("No space left"), "{refused}");
    assert_eq!(refused["read"], before["read"]);
    run.make_room();
    // The one before is in force still.
    acquire(&mut daemon.connect(), DEVICE, "group").ok();
    daemon.signal(Signal::SIGHUP);
    until("it is in force", || status()["refused"].is_null());
    acquire(&mut daemon.connect(), DEVICE, "group").error("Denied");
}
