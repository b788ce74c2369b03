//! Acquire and Release through the daemon, against the same system calls made directly.
//!
//! "The same" is checked first: a broker in this process and the direct way are both run on a
//! kernel that writes down what it is asked, and must have asked the same. That is all the VFIO
//! calls and all reading of sysfs; the daemon's own copies, pipes and sockets are not in the floor.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::NIC;
use common::daemon::{Daemon, TOPOLOGY, kernel_name, on_real_kernel, policy};
use common::figures::{heading, median, median_ratio, micros, percentile, table, verdict};
use common::floor::{self, Floor};
use common::placement;
use common::recorder::Recorder;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_broker::broker::{Broker, Caller, Nobody};
use vfio_broker::client::{Acquire, Client};
use vfio_broker::host;
use vfio_broker::kernel::{
    Container, Extension, Group, IommuType, Kernel, Linux, Node, Unmap, UnmapFlags,
};
use vfio_broker::policy::{Peer, Policy};
use vfio_broker::protocol::{self, Bdf, Handout, Release};
use vfio_broker::sim::{Sim, Topology};
use vfio_broker::users::SystemUsers;

const GOAL: f64 = 1.2;
const ROUNDS: usize = 30;
const CALLS: usize = 20;

fn main() {
    floor::be_it_if_asked();
    heading(&format!("acquire: Acquire + Release of one device on {}", kernel_name()));
    placement::apart();
    let (kernel, _sim) = kernel();
    let calls = same_calls(&kernel);
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let inside = Inside::new(&kernel);
    let pipe = nix::unistd::pipe().unwrap().0;
    let mut bare_loop = Floor::start(b"{}\0", &[pipe.as_fd(); 3]);
    let (mut ours, mut theirs, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    let (mut library, mut trips) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let broker = time(|| through(&mut client));
        let bare = time(|| directly(&kernel));
        // The first is for warming up.
        if round > 0 {
            pairs.push((median(&broker), median(&bare)));
            ours.extend(broker);
            theirs.extend(bare);
            library.extend(time(|| inside.acquire_and_release()));
            trips.extend(time(|| {
                bare_loop.client.call(b"{}\0");
                bare_loop.client.call(b"{}\0");
            }));
        }
    }
    let ratio = median_ratio(pairs);
    table(&[
        row!["", "median", "p99", "ratio", ""],
        line("broker: Acquire, close, Release", &ours, format!("{ratio:.2}"), verdict(ratio, GOAL)),
        line(&format!("the same {calls} calls directly"), &theirs, "1".into(), String::new()),
        line("the broker as a library, no daemon", &library, String::new(), String::new()),
        line("two round trips with a bare epoll loop", &trips, String::new(), String::new()),
    ]);
    if !on_real_kernel() {
        println!(
            "(every call of the simulated kernel is a message to a thread: run it in the lab)"
        );
    }
}

fn kernel() -> (Arc<dyn Kernel>, Option<Sim>) {
    if on_real_kernel() {
        return (Arc::new(Linux), None);
    }
    let sim = Sim::start(Topology::from_toml(TOPOLOGY).unwrap()).unwrap();
    (sim.kernel(), Some(sim))
}

fn time(mut once: impl FnMut()) -> Vec<Duration> {
    let each = (0..CALLS).map(|_| {
        let start = Instant::now();
        once();
        start.elapsed()
    });
    each.collect()
}

/// By its handout, so that it is not looked for the first backend that the host can do.
fn wanted() -> Acquire {
    Acquire::new("bench").device(NIC).handout(Handout::Container)
}

fn through(client: &mut Client) {
    let lease = client.acquire(wanted()).unwrap();
    // Closes container and group first: the kernel gives a group back only when nobody has it open.
    assert!(client.release(lease).unwrap(), "the group is not free");
}

/// What the broker asks of the kernel, in its order and with nothing around it.
fn directly(kernel: &Arc<dyn Kernel>) {
    let bdf: Bdf = NIC.parse().unwrap();
    let host::Place::Group(id) = host::find(&**kernel, bdf).unwrap() else { panic!("no {NIC}") };
    let found = host::Group::scan(&**kernel, id).unwrap().unwrap();
    assert!(found.is_viable());
    host::allows_unsafe_interrupts(&**kernel).unwrap();
    let container = Container::open(Arc::clone(kernel)).unwrap();
    let group = Group::open(Arc::clone(kernel), Node::Group(id)).unwrap();
    assert!(group.status().unwrap().viable);
    group.set_container(&container).unwrap();
    assert!(container.check_extension(Extension::Iommu(IommuType::Type1v2)).unwrap());
    container.set_iommu(IommuType::Type1v2).unwrap();

    container.unmap(&Unmap { flags: UnmapFlags::ALL, iova: 0, size: 0 }).unwrap();
    group.unset_container().unwrap();
    drop(group);
    drop(container);
    Group::open(Arc::clone(kernel), Node::Group(id)).unwrap();
}

/// The broker in this process, without a daemon around it.
struct Inside {
    broker: Arc<Broker>,
    caller: Caller,
    wanted: protocol::Acquire,
}

impl Inside {
    fn new(kernel: &Arc<dyn Kernel>) -> Self {
        let policy = Policy::parse("policy of the bench", &policy(), &SystemUsers).unwrap();
        let broker = Broker::new(Arc::clone(kernel), Arc::new(policy), Arc::new(Nobody));
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let pid = std::process::id() as i32;
        let peer = Peer { uid, gid, groups: Vec::new(), pid, unit: None, label: None };
        let wanted = wanted().into_request().unwrap();
        Self { broker, caller: Caller { peer }, wanted }
    }

    fn acquire_and_release(&self) {
        let grant = self.broker.acquire(&self.caller, &self.wanted).unwrap();
        let (lease, key) = (grant.reply.lease, grant.reply.key);
        drop(grant.fds);
        assert!(self.broker.release(&self.caller, &Release { lease, key }).unwrap().proved);
    }
}

/// Checks that broker and floor ask the same, and returns how much that is.
fn same_calls(kernel: &Arc<dyn Kernel>) -> usize {
    let recorder = Recorder::new(Arc::clone(kernel));
    Inside::new(&(recorder.clone() as Arc<dyn Kernel>)).acquire_and_release();
    let broker = recorder.take();
    directly(&(recorder.clone() as Arc<dyn Kernel>));
    assert_eq!(broker, recorder.take(), "the floor does not make the broker's calls");
    broker.len()
}

fn line(what: &str, times: &[Duration], ratio: String, said: String) -> Vec<String> {
    row![what, micros(median(times)), micros(percentile(times, 99)), ratio, said]
}
