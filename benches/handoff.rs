//! A GetFds round trip on an open lease, against a bare epoll loop that answers the same bytes.
//!
//! The lease has the handout `container`, so that the reply brings the two fds that a VMM needs,
//! container and group. It also brings a new lease pipe, as every GetFds does: making it, watching
//! it and seeing it hang up are part of what is timed. The floor sends the two fds alone. (The other
//! handout whose reply has two fds, `devices`, has the kernel open the device anew each time; it is
//! shown beside, without a goal.)

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::daemon::{Daemon, kernel_name};
use common::figures::{heading, median, median_ratio, micros, percentile, table, verdict};
use common::floor::{self, Floor};
use common::placement;
use common::raw::{self, RawClient};
use std::os::fd::AsFd;
use std::time::Duration;
use vfio_broker::protocol::{FdKind, Handout};

const GOAL: f64 = 1.5;
const ROUNDS: usize = 40;
const CALLS: usize = 250;

fn main() {
    floor::be_it_if_asked();
    heading(&format!("handoff: GetFds round trips on {}", kernel_name()));
    placement::apart();
    let mut rows = vec![row!["", "median", "p99", "ratio", ""]];
    measure(Handout::Container, "container + group + lease pipe", Some(GOAL), &mut rows);
    measure(Handout::Devices, "device, opened anew + lease pipe", None, &mut rows);
    table(&rows);
}

fn measure(handout: Handout, what: &str, goal: Option<f64>, rows: &mut Vec<Vec<String>>) {
    let daemon = Daemon::start();
    let lease = daemon.acquire(handout);
    let call = raw::get_fds(&lease);
    let mut client = RawClient::new(daemon.connect());
    let (reply, came) = client.call(&call);
    let files = lease.files().iter().filter(|file| file.kind != FdKind::Lease);
    let mut files: Vec<_> = files.map(|file| file.fd.as_fd()).collect();
    if handout == Handout::Devices {
        files.push(lease.lifeline());
    }
    assert_eq!(files.len(), 2);
    let mut floor = Floor::start(reply, &files);
    let fds = came.len();
    drop(came);

    let (mut ours, mut theirs, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    client.time(&call, fds, CALLS);
    floor.client.time(&call, 2, CALLS);
    for _ in 0..ROUNDS {
        let broker = client.time(&call, fds, CALLS);
        let bare = floor.client.time(&call, 2, CALLS);
        pairs.push((median(&broker), median(&bare)));
        ours.extend(broker);
        theirs.extend(bare);
    }
    let ratio = median_ratio(pairs);
    let said = goal.map_or_else(|| "no goal".to_owned(), |goal| verdict(ratio, goal));
    rows.push(line(&format!("broker: {what}"), &ours, format!("{ratio:.2}"), said));
    rows.push(line("bare epoll loop: two fds", &theirs, "1".into(), String::new()));
}

fn line(what: &str, times: &[Duration], ratio: String, said: String) -> Vec<String> {
    row![what, micros(median(times)), micros(percentile(times, 99)), ratio, said]
}
