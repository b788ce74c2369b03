//! Compares transcripts: the simulation's with the recorded ones, or with the real kernel's.

use crate::cases::Case;
use crate::run::{self, Cases, Options};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use vfio_broker::sim::Profile;

/// The machines of the lab that cases are for.
const MACHINES: [&str; 3] = ["default", "no-intremap", "no-iommu"];

/// The kernels of the lab: name, profile, and which cases are for them.
const KERNELS: [(&str, Profile, Cases); 4] = [
    ("6.1", Profile::V6_1, Cases::WithoutCdev),
    ("6.12", Profile::V6_12, Cases::All),
    ("7.2", Profile::V7_2, Cases::WithoutCdev),
    ("7.2-cdev", Profile::V7_2, Cases::CdevAlone),
];

/// What a real kernel said to each case.
type Recorded = BTreeMap<String, String>;

/// Runs the cases on the simulation of every kernel that has been recorded.
pub(crate) fn with_recorded(options: &Options) -> bool {
    let start = Instant::now();
    let is_root = nix::unistd::Uid::effective().is_root();
    let (mut passed, mut failed, mut ignored) = (0, Vec::new(), 0);
    for (kernel, profile, which) in KERNELS {
        for machine in MACHINES {
            let Ok(recorded) = fs::read_to_string(transcript_path(kernel, machine)) else {
                continue;
            };
            let recorded = parse(&recorded);
            let mut cases = options.cases(machine, which);
            println!("\nrunning {} tests on {kernel} ({machine})", cases.len());
            for case in cases.extract_if(.., |case| case.root && !is_root) {
                ignored += 1;
                println!("test {kernel}::{machine}::{} ... ignored, needs root", case.name);
            }
            for (case, simulated) in in_parallel(&cases, |case| run::on_sim(case, profile, which)) {
                let name = format!("{kernel}::{machine}::{}", case.name);
                match recorded.get(&case.name) {
                    None => {
                        ignored += 1;
                        println!("test {name} ... ignored, not recorded on that kernel");
                    }
                    Some(real) if *real == simulated => {
                        passed += 1;
                        println!("test {name} ... ok");
                    }
                    Some(real) => {
                        println!("test {name} ... FAILED\n{}", difference(real, &simulated));
                        failed.push(name);
                    }
                }
            }
        }
    }
    summary(passed, &failed, ignored, start)
}

/// Runs the cases on the kernel that this process runs on, and on its simulation.
pub(crate) fn with_real(options: &Options) -> bool {
    let start = Instant::now();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let profile: Profile = match release.parse() {
        Ok(profile) => profile,
        Err(error) => {
            eprintln!("conformance: {error}");
            return false;
        }
    };
    let machine = std::env::var("LAB_TOPOLOGY").unwrap_or_else(|_| "default".into());
    let which = match (Path::new("/dev/iommu").exists(), profile) {
        (false, _) => Cases::WithoutCdev,
        // The others are for Debian's own kernel of this version.
        (true, Profile::V7_2) => Cases::CdevAlone,
        (true, _) => Cases::All,
    };
    let cases = options.cases(&machine, which);
    println!("\nrunning {} tests on kernel {release} and on its simulation", cases.len());
    let (mut passed, mut failed, mut record) = (0, Vec::new(), String::new());
    for case in &cases {
        let (real, simulated) = std::thread::scope(|scope| {
            let simulated = scope.spawn(|| run::on_sim(case, profile, which));
            (run::on_real(case), simulated.join().unwrap_or_default())
        });
        let _ = write!(record, "== {}\n{real}", case.name);
        if real == simulated {
            passed += 1;
            println!("test {} ... ok", case.name);
        } else {
            println!("test {} ... FAILED\n{}", case.name, difference(&real, &simulated));
            failed.push(case.name.clone());
        }
    }
    if let Some(path) = &options.record
        && let Err(error) = fs::write(path, record)
    {
        eprintln!("conformance: {}: {error}", path.display());
        return false;
    }
    let equal = cases.len() - failed.len();
    println!("\nconformance: kernel {release}: {equal} of {} cases equal", cases.len());
    summary(passed, &failed, 0, start)
}

/// Where what a kernel said on a machine of the lab is kept.
fn transcript_path(kernel: &str, machine: &str) -> PathBuf {
    let name = match machine {
        "default" => format!("{kernel}.txt"),
        other => format!("{kernel}.{other}.txt"),
    };
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance/transcripts").join(name)
}

fn parse(text: &str) -> Recorded {
    let cases = text.split("== ").skip(1);
    let case = |case: &str| {
        let (name, transcript) = case.split_once('\n').unwrap_or((case, ""));
        (name.to_owned(), transcript.to_owned())
    };
    cases.map(case).collect()
}

/// The lines of both, those marked that only one has.
fn difference(real: &str, simulated: &str) -> String {
    let (real, simulated): (Vec<_>, Vec<_>) = (real.lines().collect(), simulated.lines().collect());
    let mut text = String::new();
    for at in 0..real.len().max(simulated.len()) {
        match (real.get(at), simulated.get(at)) {
            (Some(real), Some(simulated)) if real == simulated => {
                let _ = writeln!(text, "           {real}");
            }
            (real, simulated) => {
                for (kind, line) in [("real", real), ("simulated", simulated)] {
                    let _ = writeln!(text, "{kind:>9}: {}", line.unwrap_or(&"(nothing)"));
                }
            }
        }
    }
    text
}

/// Runs cases on as many threads as there are processors; answers in order.
fn in_parallel(cases: &[Case], run: impl Fn(&Case) -> String + Sync) -> Vec<(&Case, String)> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let transcript = run(case);
                    done.lock().unwrap().insert(case.name.clone(), transcript);
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    cases.iter().map(|case| (case, done.remove(&case.name).unwrap_or_default())).collect()
}

fn summary(passed: usize, failed: &[String], ignored: usize, start: Instant) -> bool {
    if !failed.is_empty() {
        println!("\nfailures:");
        for name in failed {
            println!("    {name}");
        }
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; {ignored} ignored; 0 measured; 0 \
         filtered out; finished in {:.2}s\n",
        failed.len(),
        start.elapsed().as_secs_f64()
    );
    failed.is_empty()
}
