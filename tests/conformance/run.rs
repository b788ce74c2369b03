//! Runs one case in a process of its own, on the real kernel or on a simulated one.

use crate::cases::{self, Case};
use crate::script::Script;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfio_broker::kernel::{Kernel, Linux};
use vfio_broker::sim::{Profile, Sim, Topology, Wire};

/// The control socket of the simulation to run on; the real kernel where it is not set.
pub(crate) const CONTROL: &str = "VFIO_CONFORMANCE_CONTROL";

/// Where the machine's parameters can be written, on a real kernel.
const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// Which cases a kernel is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cases {
    All,
    /// It has neither iommufd nor cdevs.
    WithoutCdev,
    /// It differs in having them from one that is asked the rest.
    CdevAlone,
}

impl Cases {
    fn are_for(self, case: &Case) -> bool {
        match self {
            Cases::All => true,
            Cases::WithoutCdev => !case.cdev,
            Cases::CdevAlone => case.cdev,
        }
    }
}

/// The command line.
pub(crate) struct Options {
    pub(crate) filters: Vec<String>,
    pub(crate) exact: bool,
    pub(crate) list: bool,
    pub(crate) real: bool,
    pub(crate) record: Option<PathBuf>,
    pub(crate) case: Option<String>,
}

impl Options {
    pub(crate) fn from_args() -> Self {
        let mut options = Self {
            filters: Vec::new(),
            exact: false,
            list: false,
            real: std::env::var_os("LAB_KERNEL").is_some(),
            record: None,
            case: None,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--real" => options.real = true,
                "--exact" => options.exact = true,
                "--list" => options.list = true,
                "--record" => options.record = args.next().map(PathBuf::from),
                "--case" => options.case = args.next(),
                // What cargo test's own harness takes, with a value of its own.
                "--test-threads" | "--skip" | "--format" | "--color" => drop(args.next()),
                flag if flag.starts_with('-') => {}
                filter => options.filters.push(filter.to_owned()),
            }
        }
        options
    }

    /// The cases for a kernel and a machine of the lab that the filters let through.
    pub(crate) fn cases(&self, machine: &str, which: Cases) -> Vec<Case> {
        let wanted = |case: &Case| {
            let fits = |filter: &String| {
                if self.exact { case.name == *filter } else { case.name.contains(filter) }
            };
            case.machine == machine
                && which.are_for(case)
                && (self.filters.is_empty() || self.filters.iter().any(fits))
        };
        cases::all().into_iter().filter(wanted).collect()
    }
}

/// The body of a case's process.
pub(crate) fn one(name: &str) -> ExitCode {
    let Some(case) = cases::all().into_iter().find(|case| case.name == name) else {
        eprintln!("no case {name}");
        return ExitCode::FAILURE;
    };
    let simulated =
        std::env::var_os(CONTROL).map(|path| Arc::new(Wire::connect(Path::new(&path)).unwrap()));
    let kernel: Arc<dyn Kernel> = match &simulated {
        Some(wire) => Arc::clone(wire) as Arc<dyn Kernel>,
        None => Arc::new(Linux),
    };
    let script = Script::new(kernel, simulated);
    (case.run)(&script);
    print!("{}", script.transcript());
    ExitCode::SUCCESS
}

/// Runs a case on the kernel that this process runs on.
pub(crate) fn on_real(case: &Case) -> String {
    let before = case.limit.map(|limit| {
        let before = std::fs::read_to_string(LIMIT).unwrap_or_default();
        let _ = std::fs::write(LIMIT, limit.to_string());
        before
    });
    let transcript = in_process(case, None, Duration::from_secs(60));
    if let Some(before) = before {
        let _ = std::fs::write(LIMIT, before);
    }
    transcript
}

/// Runs a case on a new simulation of a kernel.
pub(crate) fn on_sim(case: &Case, profile: Profile, which: Cases) -> String {
    let mut topology = machine(case.machine).with_kernel(profile);
    topology.owner_rights = case.rights;
    topology.cdev = Some(which != Cases::WithoutCdev);
    if let Some(limit) = case.limit {
        topology.dma_entry_limit = limit;
    }
    let sim = match Sim::start(topology) {
        Ok(sim) => sim,
        Err(error) => return format!("the simulation did not start: {error}\n"),
    };
    let transcript = in_process(case, Some(sim.control_path()), Duration::from_secs(60));
    match sim.stats() {
        Ok(stats) if stats.is_idle() => transcript,
        stats => format!("{transcript}left behind in the simulation: {stats:?}\n"),
    }
}

/// A machine of the lab, as the simulation is told about it.
fn machine(name: &str) -> Topology {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/topologies/lab.toml");
    let mut topology = Topology::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap();
    match name {
        "no-intremap" => topology.interrupt_remapping = false,
        "no-iommu" => {
            topology.noiommu = true;
            for (group, id) in topology.groups.iter_mut().zip(0..) {
                (group.noiommu, group.id) = (true, id);
            }
        }
        _ => {}
    }
    topology
}

fn in_process(case: &Case, control: Option<&Path>, deadline: Duration) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--case", &case.name]).stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).env_remove(CONTROL);
    if let Some(control) = control {
        command.env(CONTROL, control);
    }
    let mut child = command.spawn().unwrap();
    // Transcripts are shorter than a pipe is long, so nobody has to read meanwhile.
    let end = Instant::now() + deadline;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > end => {
                let _ = child.kill();
                break child.wait().unwrap();
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let (mut transcript, mut errors) = (String::new(), String::new());
    if let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) {
        let _ = out.read_to_string(&mut transcript);
        let _ = err.read_to_string(&mut errors);
    }
    if !status.success() {
        transcript.push_str(&format!("the case ended with {status}: {errors}\n"));
    }
    transcript
}
