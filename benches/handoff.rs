//! A GetFds round trip on an open lease, against a bare epoll loop that answers the same bytes.
//!
//! The lease has the handout `container`, and the client has its lease pipe: what it asks for is the
//! two fds that a VMM needs, container and group. Without a goal, beside it: the same with a further
//! lease pipe, which has to be made, watched and seen to hang up; and the handout `devices`, where the
//! kernel opens the device anew each time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::daemon::{Daemon, kernel_name};
use common::figures::{heading, median, median_ratio, micros, percentile, table, verdict};
use common::floor::{self, Floor};
use common::placement;
use common::raw::{self, RawClient};
use std::os::fd::AsFd;
use std::time::Duration;
use vfio_broker::protocol::Handout;

const GOAL: f64 = 1.5;
const CALLS: usize = 250;

fn main() {
    floor::be_it_if_asked();
    heading(&format!("handoff: GetFds round trips on {}", kernel_name()));
    placement::apart();
    let mut rows = vec![row!["", "median", "p99", "ratio", ""]];
    measure(Handout::Container, false, "container + group", Some(GOAL), &mut rows);
    measure(Handout::Container, true, "container + group + lease pipe", None, &mut rows);
    measure(Handout::Devices, true, "device, opened anew + lease pipe", None, &mut rows);
    table(&rows);
}

fn measure(
    handout: Handout,
    lifeline: bool,
    what: &str,
    goal: Option<f64>,
    rows: &mut Vec<Vec<String>>,
) {
    let daemon = Daemon::start();
    let lease = daemon.acquire(handout);
    let call = raw::get_fds(&lease, lifeline);
    let mut client = RawClient::new(daemon.connect());
    let (reply, came) = client.call(&call);
    let mut floor = Floor::start(reply, &came.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    let fds = came.len();
    drop(came);

    let (mut ours, mut theirs, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    client.time(&call, fds, CALLS);
    floor.client.time(&call, fds, CALLS);
    for _ in 0..common::rounds(15, 40) {
        let broker = client.time(&call, fds, CALLS);
        let bare = floor.client.time(&call, fds, CALLS);
        pairs.push((median(&broker), median(&bare)));
        ours.extend(broker);
        theirs.extend(bare);
    }
    let ratio = median_ratio(pairs);
    let said = goal.map_or_else(|| "no goal".to_owned(), |goal| verdict(ratio, goal));
    rows.push(line(&format!("broker: {what}"), &ours, format!("{ratio:.2}"), said));
    rows.push(line(
        &format!("bare epoll loop: as many fds, {fds}"),
        &theirs,
        "1".into(),
        String::new(),
    ));
}

fn line(what: &str, times: &[Duration], ratio: String, said: String) -> Vec<String> {
    row![what, micros(median(times)), micros(percentile(times, 99)), ratio, said]
}
