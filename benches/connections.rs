//! What idle connections cost: others' time, and memory. And how large the daemon is.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::daemon::{Daemon, kernel_name, on_real_kernel};
use common::figures::{heading, median, micros, percentile, table, verdict};
use common::placement;
use common::raw::{self, RawClient};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vfio_broker::protocol::Handout;

const IDLE: [usize; 4] = [1, 100, 1_000, 10_000];
const MOST: usize = IDLE[IDLE.len() - 1];
const CALLS: usize = 3000;

const P99_GOAL: f64 = 2.0;
const KIB_A_CONNECTION_GOAL: f64 = 8.0;
const MIB_RESIDENT_GOAL: f64 = 5.0;
const MIB_BINARY_GOAL: f64 = 4.0;

fn main() {
    heading(&format!("connections: GetFds round trips beside idle connections, {}", kernel_name()));
    placement::apart();
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files).unwrap();
    nix::sys::resource::setrlimit(files, most, most).unwrap();
    sizes();
    delays();
}

fn sizes() {
    let daemon = Daemon::start();
    let idle = daemon.resident();
    let none = daemon.settled_files();
    let connections = open(&daemon, MOST);
    daemon.settle(|files| files >= none + MOST);
    let a_connection = (daemon.resident().saturating_sub(idle)) as f64 / MOST as f64;
    drop(connections);
    let binary = std::fs::metadata(Daemon::PROGRAM).unwrap().len();
    let kernel = if on_real_kernel() { "" } else { ", the simulated kernel included" };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    table(&[
        size_row("resident, a connection", a_connection / 1024.0, "KiB", KIB_A_CONNECTION_GOAL),
        size_row(&format!("resident, idle{kernel}"), mib(idle), "MiB", MIB_RESIDENT_GOAL),
        size_row("vfio-brokerd, stripped", mib(binary), "MiB", MIB_BINARY_GOAL),
    ]);
}

fn size_row(what: &str, value: f64, unit: &str, goal: f64) -> Vec<String> {
    row![what, format!("{value:.2} {unit}"), verdict(value, goal)]
}

fn delays() {
    let daemon = Daemon::start();
    let lease = daemon.acquire(Handout::Container);
    let call = raw::get_fds(&lease, true);
    let mut client = RawClient::new(daemon.connect());
    let fds = client.call(&call).1.len();
    let base = daemon.settled_files();
    // By number of connections: each round's median and p99.
    let mut medians = [const { Vec::new() }; IDLE.len()];
    let mut highs = [const { Vec::new() }; IDLE.len()];
    for _ in 0..common::rounds(3, 7) {
        let mut idle = Vec::new();
        for (i, count) in IDLE.into_iter().enumerate() {
            idle.extend(open(&daemon, count - idle.len()));
            daemon.settle(|files| files >= base + count);
            client.time(&call, fds, CALLS / 10);
            let times = client.time(&call, fds, CALLS);
            medians[i].push(median(&times));
            highs[i].push(percentile(&times, 99));
        }
        drop(idle);
        daemon.settle(|files| files <= base + 8);
    }
    let mut rows = vec![row!["idle connections", "median", "p99", "p99 ratio", ""]];
    let alone = median(&highs[0]).as_secs_f64();
    for (i, count) in IDLE.into_iter().enumerate() {
        let high: Duration = median(&highs[i]);
        let ratio = high.as_secs_f64() / alone;
        let said = if count == MOST { verdict(ratio, P99_GOAL) } else { String::new() };
        rows.push(row![
            count,
            micros(median(&medians[i])),
            micros(high),
            format!("{ratio:.2}"),
            said
        ]);
    }
    table(&rows);
}

fn open(daemon: &Daemon, count: usize) -> Vec<UnixStream> {
    (0..count).map(|_| daemon.connect()).collect()
}
