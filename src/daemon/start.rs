//! From the command line to the first connection, and from SIGTERM to the end.

use super::keepers::{Children, Processes};
use super::listen::{self, Listening};
use super::observer::DaemonObserver;
use super::open_files::OpenFiles;
use super::options::Options;
use super::policy_file::PolicyFile;
use super::start_error::StartError;
use super::{Daemon, accept, log, reload};
use crate::broker::{Broker, Parts};
use crate::keeper::{Machine, PATIENCE, Place};
use crate::kernel::{Kernel, Linux};
use crate::protocol::Lease;
use crate::sim::{Sim, Topology, Wire};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use std::convert::Infallible;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinError, LocalSet, spawn_local};
use tracing::{info, warn};

/// Runs the daemon until SIGTERM or SIGINT; at SIGHUP it reads the policy again.
///
/// # Errors
/// It could not start.
pub fn run(options: &Options) -> Result<(), StartError> {
    log::start(options.log_format);
    let passed = listen::passed()?;
    let files = raise_file_limit().map_err(StartError::set_up("the limit of open files"))?;
    // The simulation ends when this does, and its keepers with it.
    let (kernel, machine, sim) = kernel(options)?;
    let policy_file = PolicyFile::new(options, Arc::clone(&kernel));
    let policy = Arc::new(policy_file.read()?);
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
    let daemon = Daemon::new(broker, observer, OpenFiles::new(files), policy_file, options)
        .map_err(StartError::set_up("the closer thread"))?;
    let (tasks, accounts) = (LocalSet::new(), Rc::clone(&daemon.accounts));
    let served =
        tasks.block_on(&runtime, serve(Rc::new(daemon), &listening, sim.is_some(), children));
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
            true => info!(lease, vm, tenant, devices, "lease ends: its simulated machine does"),
            false => info!(lease, vm, tenant, devices, "lease goes on without a broker"),
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
    let hang_up = signal(SignalKind::hangup()).map_err(StartError::set_up("the SIGHUP handler"))?;
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
    let connections = spawn_local(accept::serve(Rc::clone(&daemon), socket));
    spawn_local(reload::at_each(hang_up, daemon));
    let judged = Rc::clone(&broker);
    // Of what was acquired by the policy of an earlier start.
    spawn_local(async move { judged.judge_leases().await });
    notify(&[NotifyState::Ready]);
    if let Some(period) = sd_notify::watchdog_enabled() {
        spawn_local(feed_watchdog(period));
    }
    let signal = tokio::select! {
        end = connections => return Err(ended("the wait for connections", end)),
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
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

pub(super) fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "can't tell the service manager");
    }
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
