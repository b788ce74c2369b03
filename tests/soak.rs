//! Clients that acquire, map, die and misbehave at random while brokers are killed: afterwards everything is
//! as it was. 20 seconds; ten minutes with `VFIO_FULL` (`tests/run --full`).

#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Daemon, Setup, children, policy, until};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use serde_json::json;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vfio_broker::client::{Acquire, Client, DmaRange};
use vfio_broker::protocol::{GroupState, Handout};

const DEVICES: usize = 64;
const HANDOUTS: [Handout; 4] =
    [Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd];

/// Between two deaths: the launcher takes five in half a minute for bad luck.
const PAUSE: Duration = Duration::from_millis(6500);

fn clients() -> usize {
    if std::env::var_os("VFIO_FULL").is_some() { 200 } else { 40 }
}

fn length() -> Duration {
    Duration::from_secs(if std::env::var_os("VFIO_FULL").is_some() { 600 } else { 20 })
}

fn setup() -> Setup {
    let topology = format!(
        "kernel = \"6.12\"\nowner_rights = true\nmemlock = \"unlimited\"\n[[group]]\nid = 26\n\
         repeat = {DEVICES}\nstep = \"bus\"\n[[group.device]]\nbdf = \"0000:40:00.0\"\n\
         vendor = 0x8086\ndevice = 0x10d3\nclass = 0x020000\ndriver = \"vfio-pci\"\n"
    );
    let limits = "leases = 200\ndevices = 200\nconnections = 1000\nrequests = 64\nfds = 2000";
    let policy = policy(limits).replace("[tenant.limits]", "rebind = true\n[tenant.limits]");
    Setup { topology, policy, arguments: Vec::new() }
}

fn device(index: usize) -> String {
    format!("0000:{:02x}:00.0", 0x40 + index)
}

/// What clients have in hand, and how often they had anything.
struct Shared {
    held: HashMap<usize, AtomicBool>,
    had: AtomicUsize,
    is_over: AtomicBool,
}

/// One client's life: whatever the broker says, nobody else has what it has.
fn live(daemon: &Daemon, shared: &Shared, number: usize) {
    let (random, mut turn) = (RandomState::new(), 0_u64);
    let mut dice = move |sides: usize| {
        turn += 1;
        random.hash_one((number, turn)) as usize % sides
    };
    while !shared.is_over.load(Ordering::SeqCst) {
        let (index, handout) = (dice(DEVICES), HANDOUTS[dice(4)]);
        if dice(8) == 0 {
            misbehave(daemon, dice(4));
            continue;
        }
        let Ok(mut client) = Client::connect_to(&daemon.socket) else { continue };
        let order = Acquire::new("soak").device(&device(index)).handout(handout);
        let Ok(lease) = client.acquire(order) else { continue };
        let held = &shared.held[&index];
        assert!(!held.swap(true, Ordering::SeqCst), "{} is in two hands", device(index));
        shared.had.fetch_add(1, Ordering::SeqCst);
        if handout == Handout::Devices && dice(2) == 0 {
            let memory = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap();
            nix::unistd::ftruncate(&memory, 1 << 16).unwrap();
            let range = DmaRange::new(0, 1 << 16);
            let _ = client.map_dma(&lease, &memory, range);
        }
        if dice(3) == 0 {
            let _ = client.get_fds(&lease);
        }
        held.store(false, Ordering::SeqCst);
        if dice(2) == 0 {
            let _ = client.release(lease);
        }
    }
}

fn misbehave(daemon: &Daemon, how: usize) {
    let Ok(mut socket) = std::os::unix::net::UnixStream::connect(&daemon.socket) else { return };
    let leases = b"{\"method\":\"org.vfiobroker.Broker.Leases\"}\0".repeat(50);
    let said: &[u8] = match how {
        0 => b"half a mess",
        1 => &[0xff; 5000],
        2 => &leases,
        _ => b"",
    };
    // It may be dead by now.
    let _ = socket.write_all(said);
}

#[test]
fn nothing_is_left_of_it() {
    let daemon = Daemon::with(setup());
    // What the first calls open stays open.
    let fds = {
        let mut client = Client::connect_to(&daemon.socket).unwrap();
        let lease = client.acquire(Acquire::new("soak").device(&device(0))).unwrap();
        client.release(lease).unwrap();
        drop(client);
        until("its keeper has ended", || daemon.keepers() == 0);
        daemon.open_fds()
    };
    let shared = Shared {
        held: (0..DEVICES).map(|index| (index, AtomicBool::new(false))).collect(),
        had: AtomicUsize::new(0),
        is_over: AtomicBool::new(false),
    };
    let mut deaths = 0;
    std::thread::scope(|threads| {
        let all: Vec<_> = (0..clients())
            .map(|number| {
                threads.spawn({
                    let (daemon, shared) = (&daemon, &shared);
                    move || live(daemon, shared, number)
                })
            })
            .collect();
        let until = Instant::now() + length();
        while Instant::now() + PAUSE < until && !all.iter().any(|client| client.is_finished()) {
            std::thread::sleep(PAUSE);
            daemon.signal_broker(Signal::SIGKILL);
            deaths += 1;
        }
        shared.is_over.store(true, Ordering::SeqCst);
    });
    println!("{} leases, {deaths} deaths of a broker", shared.had.load(Ordering::SeqCst));
    assert!(shared.had.load(Ordering::SeqCst) > 0 && deaths > 0);
    until("no lease is left, and every device is free", || {
        let Ok(mut client) = Client::connect_to(&daemon.socket) else { return false };
        let free = |groups: Vec<vfio_broker::protocol::Group>| {
            groups.iter().all(|group| group.state == GroupState::Free)
        };
        client.leases().is_ok_and(|leases| leases.is_empty()) && client.topology().is_ok_and(free)
    });
    until("no keeper is left", || daemon.keepers() == 0);
    until("nothing else is left", || {
        ["vfiob-receiver", "vfiob-closer"]
            .iter()
            .all(|it| children(daemon.launcher(), it).is_empty())
    });
    let stats = daemon.sim().stats().unwrap();
    assert!(stats.is_idle(), "{stats:#?}");
    until("the broker has the files that one has at first", || daemon.open_fds() <= fds);
    let mut client = daemon.connect();
    let wanted = json!({ "vm": "soak", "devices": [device(0)] });
    drop(client.call("Acquire", wanted).ok());
}
