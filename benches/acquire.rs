//! Acquire and Release through the daemon, against the same system calls made directly.
//!
//! The floor is all the VFIO calls and all reading of sysfs that broker and keeper make. The keeper's
//! process, which each lease starts and ends, is not in it, nor are pipes and sockets; two lines below say
//! what a bare process takes, and round trips. The keeper reads sysfs a second time, the floor does not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::NIC;
use common::daemon::{Daemon, TOPOLOGY, kernel_name, on_real_kernel};
use common::figures::{heading, median, median_ratio, micros, percentile, table, verdict};
use common::floor::{self, Floor};
use common::placement;

use nix::unistd::ForkResult;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_broker::client::{Acquire, Client};
use vfio_broker::host;
use vfio_broker::kernel::{
    Container, Extension, Group, IommuType, Kernel, Linux, Node, Unmap, UnmapFlags,
};
use vfio_broker::protocol::{Bdf, Handout};
use vfio_broker::sim::{Sim, Topology};

/// On a real kernel, and natively on the simulated one.
const GOALS: (f64, f64) = (2.5, 1.5);
const CALLS: usize = 20;

fn main() {
    floor::be_it_if_asked();
    heading(&format!("acquire: Acquire + Release of one device on {}", kernel_name()));
    placement::apart();
    let (kernel, _sim) = kernel();
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let pipe = nix::unistd::pipe().unwrap().0;
    let mut bare_loop = Floor::start(b"{}\0", &[pipe.as_fd(); 3]);
    let (mut ours, mut theirs, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    let (mut trips, mut processes) = (Vec::new(), Vec::new());
    for round in 0..=common::rounds(11, 30) {
        let broker = time(|| through(&mut client));
        let bare = time(|| directly(&kernel));
        // The first is for warming up.
        if round > 0 {
            pairs.push((median(&broker), median(&bare)));
            ours.extend(broker);
            theirs.extend(bare);
            trips.extend(time(|| {
                bare_loop.client.call(b"{}\0");
                bare_loop.client.call(b"{}\0");
            }));
            processes.extend(time(process));
        }
    }
    let ratio = median_ratio(pairs);
    let goal = if on_real_kernel() { GOALS.0 } else { GOALS.1 };
    table(&[
        row!["", "median", "p99", "ratio", ""],
        line("broker: Acquire, close, Release", &ours, format!("{ratio:.2}"), verdict(ratio, goal)),
        line("the same calls directly", &theirs, "1".into(), String::new()),
        line("two round trips with a bare epoll loop", &trips, String::new(), String::new()),
        line("a process that begins and ends", &processes, String::new(), String::new()),
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

/// What broker and keeper ask of the kernel, in their order and with nothing around it.
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
    assert_eq!(host::find(&**kernel, bdf).unwrap(), host::Place::Group(id));

    container.unmap(&Unmap { flags: UnmapFlags::ALL, iova: 0, size: 0 }).unwrap();
    group.unset_container().unwrap();
    drop(group);
    drop(container);
    Group::open(Arc::clone(kernel), Node::Group(id)).unwrap();
}

/// The least that a keeper costs.
#[allow(unsafe_code)]
fn process() {
    // SAFETY: the child does nothing but end.
    match unsafe { nix::unistd::fork() }.unwrap() {
        // SAFETY: it ends the process, and none of what the parent has.
        ForkResult::Child => unsafe { nix::libc::_exit(0) },
        ForkResult::Parent { child } => drop(nix::sys::wait::waitpid(child, None).unwrap()),
    }
}

fn line(what: &str, times: &[Duration], ratio: String, said: String) -> Vec<String> {
    row![what, micros(median(times)), micros(percentile(times, 99)), ratio, said]
}
