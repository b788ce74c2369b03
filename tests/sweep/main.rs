//! The crash sweep: in each step of each operation launcher, broker, keeper, and all of them at once are
//! killed with SIGKILL exactly there; the service is started again where its launcher was killed; then
//! no device is stranded or in two hands, no file, process or lease is left, and what each holder has is
//! what is listed.
//!
//! Run 0 of a case counts its points (`trace.rs` says what they are), and each further run reaches one of
//! them and kills. Every run has a machine and a service of its own. `cargo test` takes a form of each
//! operation and kills evenly spread over their points; `VFIO_FULL` (`tests/run --full`) takes all of it.
//! `VFIO_CASE="Salvage (Mutual"` takes the cases that are called so, and `VFIO_LOG=1` shows the service's
//! log with each failure.

#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod case;
mod check;
#[path = "../common/mod.rs"]
mod common;
#[path = "../attach/qemu.rs"]
#[allow(dead_code, unreachable_pub)]
mod qemu;
mod trace;
mod world;

use case::{Case, Cast};
use check::Files;
use common::SOON;
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use trace::{Point, Role, Tracer};
use world::World;

/// How many kills there are in the sample.
const SAMPLE: usize = 100;

/// Who is killed.
const VICTIMS: [&[Role]; 4] = [
    &[Role::Launcher],
    &[Role::Broker],
    &[Role::Keeper],
    &[Role::Launcher, Role::Broker, Role::Keeper, Role::Helper, Role::Log],
];

/// One kill.
struct Run {
    case: Case,
    point: Point,
    victims: BTreeSet<Role>,
    files: Files,
}

/// Does a case up to a point, kills there, and goes on; all points there were, and what is to be checked.
fn run(case: Case, kill: Option<&Run>) -> (World, Cast, Vec<Point>, bool) {
    let mut world = World::start(case.rebinds());
    let mut cast = case.prepare(&world);
    let pids: Vec<Pid> = world.processes().into_iter().map(|(pid, _)| pid).collect();
    let mut tracer = Tracer::seize(&pids);
    let over = cast.over();
    let reached = std::thread::scope(|threads| {
        let client = threads.spawn({
            let (world, cast) = (&world, &mut cast);
            move || case.perform(world, cast)
        });
        let to = kill.map(|run| &run.point);
        let reached = tracer
            .run(to, &case.to_string(), || client.is_finished() && case.is_over(&world, &over));
        if let Some(run) = kill.filter(|_| reached) {
            tracer.kill(&run.victims);
        }
        tracer.release(|| world.processes().into_iter().map(|(pid, _)| pid).collect());
        reached
    });
    if kill.is_some_and(|run| reached && run.victims.contains(&Role::Launcher)) {
        world.start_service().unwrap_or_else(|error| panic!("{error}\n{}", world.log()));
    }
    (world, cast, tracer.points, reached)
}

/// The points of a case, and what the service has open at its end.
fn count(case: Case) -> (Vec<Point>, Files) {
    let (world, cast, points, _) = run(case, None);
    let files = check::check(&world, case, cast, &BTreeSet::new(), None);
    (points, files.unwrap_or_else(|error| panic!("{case}, with no kill: {error}\n{}", world.log())))
}

/// Whether the point was reached; what does not hold.
fn kill(run_of: &Run) -> Result<bool, String> {
    let done = std::panic::catch_unwind(|| {
        let (world, cast, _, reached) = run(run_of.case, Some(run_of));
        let victims = if reached { run_of.victims.clone() } else { BTreeSet::new() };
        let checked = check::check(&world, run_of.case, cast, &victims, Some(run_of.files));
        checked.map(|_| reached).map_err(|error| match std::env::var_os("VFIO_LOG") {
            Some(_) => format!("{error}\n{}", world.log()),
            None => error,
        })
    });
    let said = |panic: Box<dyn std::any::Any + Send>| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
    };
    done.unwrap_or_else(|panic| Err(said(panic)))
}

fn in_parallel<T: Sync, R: Send>(all: &[T], each: impl Fn(&T) -> Option<R> + Sync) -> Vec<R> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(2, |it| it.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(one) = all.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let result = each(one);
                    done.lock().unwrap().extend(result);
                }
            });
        }
    });
    done.into_inner().unwrap()
}

#[test]
fn whoever_is_killed_wherever_nothing_is_lost() {
    let only = std::env::var("VFIO_CASE").unwrap_or_default();
    let is_full = std::env::var_os("VFIO_FULL").is_some();
    let cases = if is_full || !only.is_empty() { Case::all() } else { Case::sample() };
    let cases: Vec<Case> =
        cases.into_iter().filter(|case| case.to_string().contains(&only)).collect();
    let mut counted = in_parallel(&cases, |&case| Some((case, count(case))));
    counted.sort_by_key(|(case, _)| *case);
    let mut runs = Vec::new();
    let mut points = 0;
    for (case, (its, files)) in counted {
        points += its.len();
        let kinds = its.iter().fold(BTreeMap::new(), |mut kinds, point| {
            *kinds.entry(point.role).or_insert(0) += 1;
            kinds
        });
        println!("{case}: {} points, {kinds:?}", its.len());
        for point in its {
            for victims in VICTIMS {
                let victims: BTreeSet<Role> = victims.iter().copied().collect();
                // Where there is none of them yet, or no more, there is nobody to kill.
                if victims.is_disjoint(&point.alive) {
                    continue;
                }
                runs.push(Run { case, point: point.clone(), victims, files });
            }
        }
    }
    println!("{} cases, {points} points, {} kills", cases.len(), runs.len());
    // Neighbours in the list are neighbours in an operation: in this order its beginning is a sample.
    runs = spread(runs);
    if !is_full {
        runs.truncate(SAMPLE);
    }
    let start = Instant::now();
    let (done, missed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failures = in_parallel(&runs, |run| {
        let result = kill(run);
        done.fetch_add(1, Ordering::SeqCst);
        match result {
            Ok(true) => None,
            Ok(false) => {
                missed.fetch_add(1, Ordering::SeqCst);
                None
            }
            Err(error) => {
                let failure =
                    format!("{}: {:?} killed {}: {error}", run.case, run.victims, run.point);
                println!("{failure}");
                Some(failure)
            }
        }
    });
    let (done, missed) = (done.into_inner(), missed.into_inner());
    println!(
        "{} kills in {:?}, {missed} points did not come again",
        done - missed,
        start.elapsed()
    );
    assert!(failures.is_empty(), "{} failures", failures.len());
}

/// The same in another order: the beginning of it is a sample of all.
fn spread(runs: Vec<Run>) -> Vec<Run> {
    let count = runs.len();
    let is_coprime = |stride: &usize| {
        let (mut a, mut b) = (count, *stride);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    let stride = (count * 618 / 1000..).find(is_coprime).unwrap_or(1);
    let mut all: Vec<_> = runs.into_iter().map(Some).collect();
    (0..count).filter_map(|index| all[index * stride % count].take()).collect()
}
