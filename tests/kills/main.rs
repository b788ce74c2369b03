//! Broker and launcher are killed at random instants, in the lab (`tests/run kills`), while QEMU has devices
//! and others acquire, add, map, release and die at random: nobody loses anything, and nothing is left.
//! 300 operations; 10,000 with `VFIO_FULL`. `VFIO_SEED` has the same dice thrown again, though time has its
//! own say.

// A test harness of its own: to clippy it is a program like any other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

#[path = "../common/brokerd.rs"]
mod brokerd;
#[path = "../common/children.rs"]
mod children;
mod client;
#[path = "../common/copies.rs"]
mod copies;
mod daemon;
mod dice;
#[path = "../main_job/edu.rs"]
mod edu;
#[path = "../common/guest.rs"]
mod guest;
mod holders;
mod load;
#[path = "../qemu/world.rs"]
#[allow(dead_code, unused_imports)]
mod qemu;
#[path = "../common/until.rs"]
mod until;

use daemon::Daemon;
use dice::Dice;
use holders::Holders;
use load::Load;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vfio_broker::client::Acquire;
use vfio_broker::protocol::Handout;

/// Of the lab's devices (`tests/lab/topology.sh`), those that are held all the time.
const NIC: &str = "0000:00:02.0";
const EDU0: &str = "0000:00:03.0";
const EDU1: &str = "0000:00:04.0";
/// Those that are fought for; the first two are one group.
const PAIR: [&str; 2] = ["0000:00:07.0", "0000:00:07.1"];
const VF: &str = "0000:02:10.0";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let Some((client::FLAG, life)) =
        arguments.split_first().map(|(it, life)| (it.as_str(), life))
    {
        client::live(life);
        return ExitCode::SUCCESS;
    }
    if std::env::var_os("LAB_KERNEL").is_none() {
        println!("test result: ok. 0 passed; SKIPPED, real devices are the lab's: tests/run kills");
        return ExitCode::SUCCESS;
    }
    let wanted = if std::env::var_os("VFIO_FULL").is_some() { 10_000 } else { 300 };
    let seed = std::env::var("VFIO_SEED")
        .map_or_else(|_| std::process::id().into(), |it| it.parse().unwrap());
    println!("{wanted} operations, VFIO_SEED={seed}");
    let mut dice = Dice::new(seed);
    let mut daemon = Daemon::start();
    let mut holders = Holders::acquire(&daemon);
    let load = Load::new(&daemon, wanted);
    let kills = std::thread::scope(|threads| {
        for number in 0..3 {
            threads.spawn({
                let (load, dice) = (&load, Dice::new(dice.next()));
                move || load.run(number, dice)
            });
        }
        // The others end with this one.
        let _ends = Ends(&load);
        kill_at_random(&mut daemon, &mut holders, &load, &mut dice)
    });
    println!("{kills} kills, {} starts, {}", daemon.starts, load.tally());
    assert!(kills > 0 && load.had_enough());
    for device in [PAIR[0], VF] {
        daemon.is_free(device);
    }
    holders.have_all();
    holders.are_known(&daemon);
    holders.end();
    nothing_is_left(&daemon);
    everything_can_be_had(&daemon);
    println!("test result: ok. 1 passed; 0 failed; {kills} kills in {wanted} operations");
    ExitCode::SUCCESS
}

struct Ends<'a>(&'a Load);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fails("it was not so".into());
        }
    }
}

fn kill_at_random(
    daemon: &mut Daemon,
    holders: &mut Holders,
    load: &Load,
    dice: &mut Dice,
) -> usize {
    let mut kills = 0;
    while !load.is_over() {
        // By what was done, as the guest is slow: and then in the midst of what is done next.
        let enough = load.done() + dice.below(40) as usize;
        until::until("the load goes on", || load.is_over() || load.done() >= enough);
        std::thread::sleep(Duration::from_millis(dice.below(100)));
        daemon.kill(dice);
        kills += 1;
        holders.have_all();
        // Some are killed before they have adopted anything.
        if dice.below(3) == 0 {
            daemon.start_if_gone();
            std::thread::sleep(Duration::from_millis(dice.below(400)));
            daemon.kill(dice);
            kills += 1;
        }
        let since = Instant::now();
        daemon.answers();
        println!("    answers {} ms after kill {kills}", since.elapsed().as_millis());
        holders.are_known(daemon);
        holders.have_all();
    }
    kills
}

fn nothing_is_left(daemon: &Daemon) {
    until::until("no lease is left", || daemon.client().leases().unwrap().is_empty());
    for device in [NIC, EDU0, EDU1, PAIR[0], VF] {
        daemon.is_free(device);
    }
    until::until("no other process is left", || {
        let left = daemon.processes();
        left == ["vfiob-broker", "vfiob-log"] || {
            println!("    {left:?}");
            false
        }
    });
}

/// Every device, in every way that this kernel has.
fn everything_can_be_had(daemon: &Daemon) {
    let mut handouts = vec![Handout::Container, Handout::Group, Handout::Devices];
    if daemon.has_iommufd {
        handouts.push(Handout::Iommufd);
    }
    for handout in handouts {
        for devices in [&[NIC][..], &[EDU0], &[EDU1], &PAIR, &[VF]] {
            let order =
                devices.iter().fold(Acquire::new("last"), |order, device| order.device(device));
            let mut broker = daemon.client();
            let lease = broker.acquire(order.handout(handout)).unwrap();
            assert_eq!(lease.devices(), devices);
            broker.release(lease).unwrap();
            daemon.is_free(devices[0]);
        }
    }
}
