//! From the command line to the first connection, and from SIGTERM to the end.

use super::keepers::{Children, Processes};
use super::listen::{self, Listening};
use super::observer::DaemonObserver;
use super::open_files::OpenFiles;
use super::options::Options;
use super::start_error::StartError;
use super::{Daemon, accept, file_mode};
use crate::broker::{Broker, Parts};
use crate::host::Host;
use crate::keeper::{Machine, PATIENCE, Place};
use crate::kernel::{Kernel, Linux};
use crate::log::{self, LEASES, Log};
use crate::policy::{BUILT_IN, POLICY_PATH, Policy};
use crate::protocol::Lease;
use crate::sim::{Sim, Topology, Wire};
use crate::users::SystemUsers;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use std::convert::Infallible;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinError, LocalSet, spawn_local};
use tracing::{info, warn};

/// Runs the daemon until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// It could not start.
pub fn run(options: &Options) -> Result<(), StartError> {
    let passed = listen::passed()?;
    let log = log::start(options.log_format).map(Rc::new);
    let log = log.map_err(StartError::set_up("the process that writes the log"))?;
    let served = run_logged(options, passed, &log);
    log.end();
    served
}

fn run_logged(
    options: &Options,
    passed: Option<UnixListener>,
    log: &Rc<Log>,
) -> Result<(), StartError> {
    let files = raise_file_limit().map_err(StartError::set_up("the limit of open files"))?;
    // The simulation ends when this does, and its keepers with it.
    let (kernel, machine, sim) = kernel(options)?;
    let policy = Arc::new(policy(options, &*kernel)?);
    let activated = passed.is_some();
    let listening = Listening::new(passed, &options.socket)?;
    let place = keepers_place(options, sim.as_ref()).inspect_err(|_| listening.remove_file())?;
    // Two daemons would not know what the other has handed out.
    let only = listen::be_the_only_one(place.path()).inspect_err(|_| listening.remove_file())?;
    tell_the_start(options, activated);
    let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(WORKERS).build();
    let runtime = runtime.map_err(StartError::set_up("the event loop"))?;
    let observer = Rc::new(DaemonObserver::new());
    let processes = Processes::new(machine, place);
    let children = processes.children().clone();
    let broker = Broker::new(Parts {
        kernel,
        policy,
        observer: observer.clone(),
        keepers: Box::new(processes),
        patience: PATIENCE.iter().sum(),
        deadline: options.call_deadline,
    });
    let daemon = Daemon::new(broker, observer, OpenFiles::new(files), options)
        .map_err(StartError::set_up("the closer thread"))?;
    let (tasks, accounts) = (LocalSet::new(), Rc::clone(&daemon.accounts));
    let served = tasks.block_on(&runtime, async {
        log::keep_draining();
        let child =
            signal(SignalKind::child()).map_err(StartError::set_up("the SIGCHLD handler"))?;
        spawn_local(Rc::clone(log).keep_process(child));
        serve(Rc::new(daemon), &listening, sim.is_some(), children).await
    });
    listening.remove_file();
    drop(only);
    // What peers sent and nobody has read must not be closed here, not even by the end of the process:
    // the close can hang.
    accounts.end();
    drop(tasks);
    accounts.hand_over_connections();
    runtime.shutdown_background();
    served
}

/// The most threads that wait for processes which receive what peers send.
const WORKERS: usize = 64;

/// Where the keepers' directories are. Wherever this daemon listens: who has a machine's devices is the
/// same.
fn keepers_place(options: &Options, sim: Option<&Sim>) -> Result<Place, StartError> {
    let path = match sim.and_then(|sim| sim.control_path().parent()) {
        Some(directory) => directory.join("keepers"),
        None if options.sim_at.is_none() && nix::unistd::geteuid().is_root() => {
            Path::new(crate::protocol::SOCKET_PATH).with_file_name("keepers")
        }
        None => listen::beside(&options.socket, ".keepers"),
    };
    listen::make_directory(&path)?;
    Place::new(&path).map_err(|error| StartError::Keepers { path, why: error.to_string() })
}

/// Says what is served, and where.
fn tell_the_start(options: &Options, activated: bool) {
    let socket = match activated {
        true => "the service manager's".into(),
        false => options.socket.to_string_lossy(),
    };
    let kernel = match (&options.sim, &options.sim_at) {
        (Some(topology), _) => format!("SIMULATED, of {}", topology.display()),
        (None, Some(socket)) => format!("SIMULATED, at {}", socket.display()),
        (None, None) => "this machine's".into(),
    };
    info!(%socket, kernel, "listening");
}

/// Says who loses what, if anybody does.
fn tell_the_end(broker: &Broker, signal: &str, machine_ends: bool) {
    let leases = broker.held();
    info!(signal, leases = leases.len(), "stopping");
    for Lease { lease, vm, tenant, devices, .. } in leases {
        let devices = devices.join(" ");
        match machine_ends {
            true => {
                info!(target: LEASES, lease, vm, tenant, devices, "lease ends: its simulated machine does")
            }
            false => {
                info!(target: LEASES, lease, vm, tenant, devices, "lease goes on without a broker")
            }
        }
    }
}

/// Serves until told to stop.
async fn serve(
    daemon: Rc<Daemon>,
    listening: &Listening,
    machine_ends: bool,
    children: Children,
) -> Result<(), StartError> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(StartError::set_up("the SIGTERM handler"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(StartError::set_up("the SIGINT handler"))?;
    // What closing the terminal sends; it would end us without a word.
    let mut hang_up =
        signal(SignalKind::hangup()).map_err(StartError::set_up("the SIGHUP handler"))?;
    let mut child =
        signal(SignalKind::child()).map_err(StartError::set_up("the SIGCHLD handler"))?;
    spawn_local(async move {
        while child.recv().await.is_some() {
            children.reap();
        }
    });
    let broker = Rc::clone(&daemon.broker);
    broker.adopt().map_err(|error| StartError::Adopt(error.to_string()))?;
    let socket = listening.listener.try_clone().map_err(StartError::set_up("the socket"))?;
    let connections = spawn_local(accept::serve(daemon, socket));
    notify(&[NotifyState::Ready]);
    if let Some(period) = sd_notify::watchdog_enabled() {
        spawn_local(feed_watchdog(period));
    }
    let signal = tokio::select! {
        end = connections => return Err(ended("the wait for connections", end)),
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = hang_up.recv() => "SIGHUP",
    };
    tell_the_end(&broker, signal, machine_ends);
    notify(&[NotifyState::Stopping]);
    Ok(())
}

/// The error for a loop that should not have ended.
fn ended(what: &'static str, end: Result<std::io::Result<Infallible>, JoinError>) -> StartError {
    let why = match end {
        Ok(Ok(never)) => match never {},
        Ok(Err(error)) => error.to_string(),
        Err(panicked) => panicked.to_string(),
    };
    StartError::Ended { what, why }
}

/// Tells the service manager twice a period that the event loop goes round.
async fn feed_watchdog(period: Duration) {
    let mut turns = tokio::time::interval(period / 2);
    loop {
        turns.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "can't tell the service manager");
    }
}

/// The policy of the options, or the default one for the kernel they name.
fn policy(options: &Options, kernel: &dyn Kernel) -> Result<Policy, StartError> {
    let parse = |name: &str, text: &str| {
        let policy = Policy::parse(name, text, &SystemUsers).map_err(StartError::Policy)?;
        for problem in policy.warnings().iter() {
            warn!("{}:{}: {}", problem.file, problem.line, problem.message);
        }
        info!(policy = name, tenants = policy.tenants().len(), "policy read");
        Ok(policy)
    };
    let beside = options.sim.as_ref().map(|sim| sim.with_extension("policy.toml"));
    let path = match (&options.policy, beside) {
        (Some(path), _) => path.clone(),
        (None, Some(beside)) if beside.exists() => beside,
        (None, Some(_)) => return parse(BUILT_IN, &sim_policy(kernel)?),
        (None, None) => PathBuf::from(POLICY_PATH),
    };
    parse(&path.to_string_lossy(), &read_policy(&path)?)
}

/// The text of a policy that nobody but root and us has written.
fn read_policy(path: &Path) -> Result<String, StartError> {
    let unreadable = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => StartError::NoPolicy(path.to_owned()),
        _ => StartError::UnreadablePolicy { path: path.to_owned(), source },
    };
    // What is looked at is what is read, whatever becomes of the path in between.
    let file = File::open(path).map_err(unreadable)?;
    if !file_mode::is_file_safe(&file.metadata().map_err(unreadable)?) {
        return Err(StartError::UnsafePolicy(path.to_owned()));
    }
    std::io::read_to_string(file).map_err(unreadable)
}

/// Lets everybody have every device of a simulated host, each handout and each risk included.
fn sim_policy(kernel: &dyn Kernel) -> Result<String, StartError> {
    let host = Host::scan(kernel).map_err(|error| StartError::Sim(error.to_string()))?;
    let devices: Vec<_> = host.devices().map(|(_, d)| format!("\"{}\"", d.facts.bdf)).collect();
    Ok(format!(
        "version = 1\n[[tenant]]\nname = \"everybody\"\nanyone = true\ndevices = [{}]\n\
         handouts = [\"container\", \"group\", \"devices\", \"iommufd\"]\n\
         accept = [\"unsafe-interrupts\", \"no-iommu\"]\n",
        devices.join(", ")
    ))
}

/// A kernel, where a keeper finds it, and the simulation if it is ours.
type Served = (Arc<dyn Kernel>, Machine, Option<Sim>);

fn kernel(options: &Options) -> Result<Served, StartError> {
    if let Some(topology) = &options.sim {
        let sim = simulated(topology, options.sim_control.as_deref())?;
        let machine = Machine::Simulated(sim.control_path().to_owned());
        return Ok((sim.kernel(), machine, Some(sim)));
    }
    if let Some(socket) = &options.sim_at {
        let wire = Wire::connect(socket)
            .map_err(|error| StartError::Sim(format!("{}: {error}", socket.display())))?;
        return Ok((Arc::new(wire), Machine::Simulated(socket.clone()), None));
    }
    match Path::new("/dev/vfio/vfio").exists() {
        true => Ok((Arc::new(Linux), Machine::Linux, None)),
        false => Err(StartError::NoVfio),
    }
}

fn simulated(file: &Path, control: Option<&Path>) -> Result<Sim, StartError> {
    let at =
        |error: &dyn std::fmt::Display| StartError::Sim(format!("{}: {error}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| {
        StartError::Sim(format!(
            "can't read the topology {}: {error}; --sim takes a file that describes a machine, see \
             docs/sim.md",
            file.display()
        ))
    })?;
    let topology = Topology::from_toml(&text).map_err(|error| at(&error))?;
    let started = match control {
        Some(directory) => Sim::start_in(topology, directory),
        None => Sim::start(topology),
    };
    started.map_err(|error| at(&error))
}

/// Raises the limit of open files as far as it goes; returns how far.
fn raise_file_limit() -> Result<u64, Errno> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}
