//! What a thousand leases cost: the memory of their keepers, and the time of a start that finds them.
//!
//! Of a keeper's memory 52 to 64 KiB are page tables, by where the kernel has put the launcher's: all keepers
//! of a run are alike in that, and two runs are not.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod common;

use common::children::{broker, children};
use common::daemon::Daemon;
use common::figures::{heading, median, median_ratio, millis, table, verdict};
use common::raw;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vfio_broker::client::{Acquire, Client};
use vfio_broker::protocol::Handout;
use vfio_broker::sim::{Sim, Topology};

const LEASES: usize = 1000;

const KIB_A_KEEPER_GOAL: f64 = 128.0;
const MIB_IN_ALL_GOAL: f64 = 128.0;
const MS_GOAL: f64 = 100.0;
const RATIO_GOAL: f64 = 2.0;

/// As many groups as there are leases.
const TOPOLOGY: &str = r#"
kernel = "6.12"
owner_rights = true
memlock = "unlimited"
"#;

fn main() {
    heading(
        "restart: SIGKILL of launcher and broker, to the first answered request, simulated kernel",
    );
    let dir = common::directory();
    let sim = Sim::start_in(Topology::from_toml(&topology()).unwrap(), dir.path()).unwrap();
    fs::write(dir.path().join("policy.toml"), policy()).unwrap();
    let start = || start(dir.path(), &sim);

    let mut without = Vec::new();
    for _ in 0..common::rounds(5, 20) {
        let (mut launcher, took) = start();
        without.push(took);
        kill_both(&mut launcher);
    }

    let (mut launcher, _) = start();
    let mut client = Client::connect_to(dir.path().join("broker.sock")).unwrap();
    let leases: Vec<_> = (0..LEASES)
        .map(|number| {
            let wanted = Acquire::new("bench").device(&device(number)).handout(Handout::Group);
            client.acquire(wanted).unwrap()
        })
        .collect();
    let keepers = children(launcher.id(), "vfiob-keeper");
    assert_eq!(keepers.len(), LEASES);
    let kept: u64 = keepers.iter().map(|pid| kib(*pid)).sum();
    let all = kept + kib(launcher.id()) + kib(broker(launcher.id()).unwrap());

    let mut with = Vec::new();
    for _ in 0..common::rounds(5, 20) {
        kill_both(&mut launcher);
        let (again, took) = start();
        launcher = again;
        with.push(took);
        // Later figures are of a start that finds all of them too.
        let mut client = Client::connect_to(dir.path().join("broker.sock")).unwrap();
        while client.leases().unwrap().len() < LEASES {}
    }
    drop(leases);
    kill_both(&mut launcher);

    let own = |all: &[Took]| all.iter().map(|took| took.own).collect::<Vec<_>>();
    let wall = |all: &[Took]| all.iter().map(|took| took.wall).collect::<Vec<_>>();
    let ratio = median_ratio(own(&with).into_iter().zip(own(&without)));
    let ms = median(&own(&with)).as_secs_f64() * 1e3;
    table(&[
        row!["start", "own time", "until answered", "ratio", ""],
        row![
            "with no lease",
            millis(median(&own(&without))),
            millis(median(&wall(&without))),
            "1",
            ""
        ],
        row![
            format!("with {LEASES}"),
            millis(median(&own(&with))),
            millis(median(&wall(&with))),
            format!("{ratio:.2}"),
            format!("{}; {} ms, {}", verdict(ratio, RATIO_GOAL), ms.round(), verdict(ms, MS_GOAL))
        ],
    ]);
    let each = kept as f64 / LEASES as f64;
    let mib = all as f64 / 1024.0;
    table(&[
        row!["a keeper's share", format!("{each:.0} KiB"), verdict(each, KIB_A_KEEPER_GOAL)],
        row![
            format!("all, with {LEASES} leases"),
            format!("{mib:.1} MiB"),
            verdict(mib, MIB_IN_ALL_GOAL)
        ],
    ]);
}

/// What a start took until a request was answered: of the processors, and of the day.
struct Took {
    own: Duration,
    wall: Duration,
}

fn topology() -> String {
    let mut text = TOPOLOGY.to_owned();
    for domain in 0..LEASES.div_ceil(256) {
        text += &format!(
            "[[group]]\nid = {}\nrepeat = 256\nstep = \"bus\"\n[[group.device]]\n\
             bdf = \"{domain:04x}:00:00.0\"\nvendor = 0x8086\ndevice = 0x10d3\nclass = 0x020000\n\
             driver = \"vfio-pci\"\n",
            domain * 256
        );
    }
    text
}

fn device(number: usize) -> String {
    format!("{:04x}:{:02x}:00.0", number / 256, number % 256)
}

fn policy() -> String {
    format!(
        "version = 1\n[[tenant]]\nname = \"bench\"\nuser = {}\ndevices = [\"8086:10d3\"]\n\
         handouts = [\"group\"]\nlimits = {{ leases = 2000, devices = 5000, fds = 20000 }}\n",
        nix::unistd::geteuid()
    )
}

fn start(dir: &Path, sim: &Sim) -> (Child, Took) {
    let mut command = Command::new(Daemon::PROGRAM);
    command.arg("--policy").arg(dir.join("policy.toml"));
    command.arg("--socket").arg(dir.join("broker.sock")).arg("--sim-at").arg(sim.control_path());
    let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    let since = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let mut client = raw::RawClient::new(raw::connect_soon(&dir.join("broker.sock")));
    client.call(b"{\"method\":\"org.varlink.service.GetInfo\",\"parameters\":{}}\0");
    let wall = since.elapsed();
    let own =
        processor_time(child.id()) + broker(child.id()).map_or(Duration::ZERO, processor_time);
    (child, Took { own, wall })
}

/// Both, as nothing but a crash does.
fn kill_both(launcher: &mut Child) {
    let broker = broker(launcher.id()).unwrap();
    for pid in [launcher.id(), broker] {
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
    }
    launcher.wait().unwrap();
    let gone = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
    while !gone(broker) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// On a processor so far, by the scheduler's count (proc_pid_schedstat(5)).
fn processor_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// What a process has of memory: its share of each page, and the tables that map them.
fn kib(pid: u32) -> u64 {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap()
    };
    field("smaps_rollup", "Pss:") + field("status", "VmPTE:")
}
