//! The start of QEMU through `vfio-broker exec`, against the same QEMU that needs no broker: in the
//! lab one that opens the same device by itself, as root; elsewhere, where no device can be had, one
//! without. And what the interposer's filter costs a program on calls that it does not ask about.
//!
//! QEMU greets before it has its devices, so the clock stops when it has answered the first command,
//! which it does once it has them. Everybody is root here: what differs is `exec` alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::daemon::{Daemon, kernel_name, on_real_kernel};
use common::figures::{heading, median, median_ratio, millis, percentile, table, verdict};
use common::{NIC, rounds};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vfio_broker::protocol::GroupState;

const QEMU: &str = "qemu-system-x86_64";
const INHERIT: f64 = 1.02;
const INTERPOSE: f64 = 1.05;

/// Says that this process is the program that makes system calls.
const CALLS: &str = "VFIO_BROKER_BENCH_CALLS";

fn main() {
    if let Some(count) = std::env::var_os(CALLS) {
        make_calls(count.to_str().unwrap().parse().unwrap());
        return;
    }
    heading(&format!("exec: QEMU's start until it has answered, on {}", kernel_name()));
    let daemon = Daemon::start();
    let rounds = if on_real_kernel() { rounds(7, 15) } else { rounds(11, 40) };
    if on_real_kernel() {
        let legacy = format!("vfio-pci,id=hd0,host={NIC}");
        let legacy = ["-device", &legacy];
        let iommufd = format!("vfio-pci,id=hd0,iommufd=i0,host={NIC}");
        let iommufd = ["-object", "iommufd,id=i0", "-device", &iommufd];
        let by_number = format!("vfio-pci,id=hd0,iommufd=i0,fd={{cdev:{NIC}}}");
        let by_number = ["-object", "iommufd,id=i0,fd={iommufd}", "-device", &by_number];
        starts(
            &daemon,
            rounds,
            &[
                Way::plain("iommufd: opens its device itself", &iommufd),
                Way::exec("iommufd: exec, by number", &[], &by_number, 0, INHERIT),
            ],
        );
        starts(
            &daemon,
            rounds,
            &[
                Way::plain("type1: opens its device itself", &legacy),
                Way::exec("type1: exec, interposed, container", &[], &legacy, 0, INTERPOSE),
                Way::exec(
                    "type1: exec, interposed, group",
                    &["--handout", "group"],
                    &legacy,
                    0,
                    INTERPOSE,
                ),
            ],
        );
    } else {
        starts(
            &daemon,
            rounds,
            &[
                Way::plain("no device", &[]),
                Way::exec("no device: exec, inherited", &["--inherit"], &[], 0, INHERIT),
                Way::exec("no device: exec, interposed", &["--interpose"], &[], 0, INTERPOSE),
            ],
        );
        println!("(without a device QEMU has little to do; with one, and a kernel: in the lab)");
    }
    other_calls(&daemon);
}

/// A way to start QEMU.
struct Way<'a> {
    name: &'a str,
    /// `exec`'s options; `None` without it.
    options: Option<&'a [&'a str]>,
    arguments: &'a [&'a str],
    /// Which of the ways it is compared with, and how many times as long it may take.
    goal: Option<(usize, f64)>,
}

impl<'a> Way<'a> {
    fn plain(name: &'a str, arguments: &'a [&'a str]) -> Self {
        Self { name, options: None, arguments, goal: None }
    }

    fn exec(
        name: &'a str,
        options: &'a [&'a str],
        arguments: &'a [&'a str],
        floor: usize,
        goal: f64,
    ) -> Self {
        Self { name, options: Some(options), arguments, goal: Some((floor, goal)) }
    }

    fn command(&self, daemon: &Daemon) -> Command {
        let mut command = match self.options {
            Some(options) => exec(daemon, options, QEMU),
            None => Command::new(QEMU),
        };
        command.args(["-machine", "q35,accel=tcg", "-m", "64", "-S", "-display", "none"]);
        command.args(["-nodefaults", "-qmp", "stdio"]).args(self.arguments);
        command
    }
}

fn exec(daemon: &Daemon, options: &[&str], program: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
    command.arg("--socket").arg(daemon.socket()).args(["exec", "--vm", "bench", "--device", NIC]);
    command.args(options).arg("--").arg(program);
    command
}

/// Starts QEMU in each way, one after the other, over and over.
fn starts(daemon: &Daemon, rounds: usize, ways: &[Way<'_>]) {
    let mut took = vec![Vec::new(); ways.len()];
    for round in 0..=rounds {
        // Who comes first changes, and the first round is for warming up.
        for at in 0..ways.len() {
            let at = (at + round) % ways.len();
            let time = start(&mut ways[at].command(daemon));
            settle(daemon);
            if round > 0 {
                took[at].push(time);
            }
        }
    }
    let mut rows = vec![row!["", "median", "p90", "ratio", ""]];
    for (way, times) in ways.iter().zip(&took) {
        let (ratio, said) = match way.goal {
            None => ("1".to_owned(), String::new()),
            Some((floor, goal)) => {
                let pairs = times.iter().copied().zip(took[floor].iter().copied());
                let ratio = median_ratio(pairs);
                (format!("{ratio:.3}"), verdict(ratio, goal))
            }
        };
        let (middle, high) = (millis(median(times)), millis(percentile(times, 90)));
        rows.push(row![way.name, middle, high, ratio, said]);
    }
    table(&rows);
}

/// How long it takes QEMU to answer its first command.
fn start(command: &mut Command) -> Duration {
    let since = Instant::now();
    let mut qemu = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = qemu.stdin.take().unwrap();
    writeln!(input, r#"{{"execute":"qmp_capabilities"}}"#).unwrap();
    let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
    let answer = lines.find(|line| line.as_ref().unwrap().contains("\"return\""));
    let took = since.elapsed();
    assert!(answer.is_some(), "QEMU did not start");
    writeln!(input, r#"{{"execute":"quit"}}"#).unwrap();
    assert!(qemu.wait().unwrap().success());
    took
}

/// Waits until nobody has anything, so that each start finds the same.
fn settle(daemon: &Daemon) {
    let mut client = daemon.client();
    let deadline = Instant::now() + Duration::from_secs(60);
    let is_free = |client: &mut vfio_broker::client::Client| {
        let groups = client.topology().unwrap();
        client.leases().unwrap().is_empty()
            && groups.iter().all(|g| g.state == GroupState::Free || g.unproved.is_some())
    };
    while !is_free(&mut client) {
        assert!(Instant::now() < deadline, "the device does not come back");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Two calls that the filter does not ask about: one that it knows by its number, and one that it
/// looks at closer, as it asks about two of its kind.
fn make_calls(count: u32) {
    use std::io::IsTerminal;
    let null = std::fs::File::open("/dev/null").unwrap();
    let time = |call: &dyn Fn()| {
        let since = Instant::now();
        (0..count).for_each(|_| call());
        since.elapsed().as_nanos() / u128::from(count)
    };
    let plain = time(&|| _ = std::hint::black_box(std::os::unix::process::parent_id()));
    let ioctl = time(&|| _ = std::hint::black_box(null.is_terminal()));
    println!("{plain} {ioctl}");
}

/// What a call costs that is not asked about, with the filter and without.
fn other_calls(daemon: &Daemon) {
    const COUNT: u32 = 500_000;
    let this = std::env::current_exe().unwrap();
    let this = this.to_str().unwrap();
    let run = |mut command: Command| -> [u64; 2] {
        let output = command.env(CALLS, COUNT.to_string()).stderr(Stdio::inherit()).output();
        let said = String::from_utf8(output.unwrap().stdout).unwrap();
        let each: Vec<_> = said.split_whitespace().map(|time| time.parse().unwrap()).collect();
        each.try_into().unwrap()
    };
    let mut times: [[Vec<Duration>; 2]; 2] = Default::default();
    for _ in 0..rounds(3, 7) {
        let commands = [Command::new(this), exec(daemon, &["--interpose"], this)];
        for (times, command) in times.iter_mut().zip(commands) {
            for (times, took) in times.iter_mut().zip(run(command)) {
                times.push(Duration::from_nanos(took));
            }
        }
        settle(daemon);
    }
    let [without, with] = times;
    let mut rows = vec![row!["a call that is not asked about", "without", "filtered", "ratio"]];
    for (name, (without, with)) in
        ["getppid", "ioctl, of another number"].iter().zip(without.iter().zip(&with))
    {
        let nanos = |times: &[Duration]| format!("{} ns", median(times).as_nanos());
        let ratio = median(with).as_secs_f64() / median(without).as_secs_f64();
        rows.push(row![name, nanos(without), nanos(with), format!("{ratio:.2}")]);
    }
    table(&rows);
}
