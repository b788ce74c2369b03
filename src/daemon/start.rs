//! From the command line to the first connection, and from SIGTERM to the end.

use super::listen::{self, Listening};
use super::observer::DaemonObserver;
use super::open_files::OpenFiles;
use super::options::Options;
use super::proxy::{Machine, Proxy};
use super::rebinder::{DaemonRebinder, Processes};
use super::record::RecordFile;
use super::start_error::StartError;
use super::{Daemon, accept, file_mode, log, reclaim, workers};
use crate::broker::{Broker, Given};
use crate::host::Host;
use crate::kernel::{Kernel, Linux};
use crate::policy::{POLICY_PATH, Policy};
use crate::protocol::Lease;
use crate::sim::{Sim, Topology, Wire};
use crate::sys::readiness::watch;
use crate::users::SystemUsers;
use nix::errno::Errno;
use nix::fcntl::Flock;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use std::convert::Infallible;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinError, LocalSet, spawn_local};
use tracing::{info, warn};

/// Runs the daemon until SIGTERM, SIGINT or SIGHUP.
///
/// # Errors
/// It could not start.
pub fn run(options: &Options) -> Result<(), StartError> {
    log::start(options.log_format);
    let passed = listen::passed()?;
    let files = raise_file_limit().map_err(StartError::set_up("the limit of open files"))?;
    // The simulation ends when this does.
    let (kernel, processes, machine, _sim) = kernel(options)?;
    let policy = Arc::new(policy(options, &*kernel)?);
    let observer = DaemonObserver::new().map_err(StartError::set_up("epoll for lease pipes"))?;
    let observer = Arc::new(observer);
    let proxy = Proxy::new(Arc::clone(&kernel), machine, options.call_deadline / 3);
    let broker = Broker::new(kernel, policy, observer.clone());
    broker.set_rebinder(Arc::new(DaemonRebinder::new(processes)));
    broker.set_contested(Box::new(Arc::clone(&proxy)));
    let kept = Arc::clone(&broker);
    let activated = passed.is_some();
    let listening = Listening::new(passed, &options.socket)?;
    // Now no other daemon is there.
    let only = take_over(&broker, options).inspect_err(|_| listening.remove_file())?;
    tell_the_start(options, activated);
    let runtime = with_workers(workers::MOST_THREADS, Builder::new_current_thread().enable_all());
    let runtime = runtime.map_err(StartError::set_up("the event loop"))?;
    let reclaims = with_workers(reclaim::MOST_THREADS, &mut Builder::new_current_thread());
    let reclaims = reclaims.map_err(StartError::set_up("the reclaims' threads"))?;
    let workers = reclaims.handle().clone();
    let daemon = Daemon::new(broker, observer, workers, OpenFiles::new(files), options)
        .map_err(StartError::set_up("the closer thread"))?;
    let (tasks, accounts) = (LocalSet::new(), Rc::clone(&daemon.accounts));
    let served = tasks.block_on(&runtime, serve(Rc::new(daemon), &listening));
    listening.remove_file();
    // Their close can hang, and this process with it, and all other files with that.
    proxy.close_at_the_end(kept.leave_contested(options.call_deadline));
    drop(only);
    // What peers sent and nobody has read must not be closed here, not even by the end of the process:
    // the close can hang.
    accounts.end();
    drop(tasks);
    accounts.hand_over_connections();
    // A worker may be stuck in the kernel: it ends with the process.
    runtime.shutdown_background();
    reclaims.shutdown_background();
    served
}

/// Takes over what the last daemon of this kernel has left, and keeps others from doing so. A simulated
/// machine that ends with its daemon leaves nothing.
fn take_over(broker: &Broker, options: &Options) -> Result<Option<Flock<File>>, StartError> {
    if options.sim.is_some() {
        return Ok(None);
    }
    // Wherever this one listens: what was handed out is the same.
    let place = match options.sim_at.is_none() && nix::unistd::geteuid().is_root() {
        true => Path::new(crate::protocol::SOCKET_PATH),
        false => &options.socket,
    };
    let only = listen::be_the_only_one(place)?;
    let record = RecordFile::of(place)?;
    let given = record.read()?;
    for Given { device, lease, vm, tenant, .. } in &given {
        info!(%device, lease, vm, tenant, "may be open since before the restart");
    }
    let unusable = record.unusable();
    let taken = broker.set_record(Arc::new(record), given);
    taken.map_err(|error| unusable(error.to_string()))?;
    Ok(Some(only))
}

/// A runtime with a worker thread that is always there. While there is none and the kernel can't start
/// one (TasksMax, a user's fork bomb), handing over work would panic.
fn with_workers(most: usize, runtime: &mut Builder) -> std::io::Result<Runtime> {
    let runtime = runtime.max_blocking_threads(most).thread_keep_alive(Duration::MAX).build()?;
    // Says whether there can be one; the runtime would not.
    let thread = std::thread::Builder::new().spawn(|| {})?;
    let _ = thread.join();
    runtime.spawn_blocking(|| {});
    Ok(runtime)
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

/// Says who loses what.
fn tell_the_end(broker: &Broker, signal: &str) {
    let leases = broker.held();
    info!(signal, leases = leases.len(), "stopping");
    for Lease { lease, vm, tenant, devices, .. } in leases {
        info!(lease, vm, tenant, devices = devices.join(" "), "lease ends: broker stopping");
    }
}

/// Serves until told to stop.
async fn serve(daemon: Rc<Daemon>, listening: &Listening) -> Result<(), StartError> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(StartError::set_up("the SIGTERM handler"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(StartError::set_up("the SIGINT handler"))?;
    // What closing the terminal sends; it would end us without a word.
    let mut hang_up =
        signal(SignalKind::hangup()).map_err(StartError::set_up("the SIGHUP handler"))?;
    let watch_hang_ups = || {
        let descriptor = daemon.observer.lifelines.descriptor()?;
        watch(descriptor, Interest::READABLE)
    };
    let hang_ups = watch_hang_ups().map_err(StartError::set_up("the watch on lease pipes"))?;
    let socket = listening.listener.try_clone().map_err(StartError::set_up("the socket"))?;
    let hang_ups = spawn_local(reclaim::on_hang_up(Rc::clone(&daemon), hang_ups));
    let retries = spawn_local(reclaim::retry(Rc::clone(&daemon)));
    let broker = Arc::clone(&daemon.broker);
    let connections = spawn_local(accept::serve(daemon, socket));
    notify(&[NotifyState::Ready]);
    if let Some(period) = sd_notify::watchdog_enabled() {
        spawn_local(feed_watchdog(period));
    }
    let signal = tokio::select! {
        end = hang_ups => return Err(ended("the watch on lease pipes", end)),
        end = retries => return Err(ended("the retrying of reclaims", end)),
        end = connections => return Err(ended("the wait for connections", end)),
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = hang_up.recv() => "SIGHUP",
    };
    tell_the_end(&broker, signal);
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
        (None, Some(_)) => return parse("built-in policy", &sim_policy(kernel)?),
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

/// A kernel, what rebinds devices there, where a proxy finds it, and the simulation if it is ours.
type Served = (Arc<dyn Kernel>, Processes, Machine, Option<Sim>);

fn kernel(options: &Options) -> Result<Served, StartError> {
    if let Some(topology) = &options.sim {
        let sim = simulated(topology, options.sim_control.as_deref())?;
        let machine = Machine::Simulated(sim.control_path().to_owned());
        return Ok((sim.kernel(), Processes::Simulated(sim.wire()), machine, Some(sim)));
    }
    if let Some(socket) = &options.sim_at {
        let wire = Wire::connect(socket)
            .map_err(|error| StartError::Sim(format!("{}: {error}", socket.display())))?;
        let wire = Arc::new(wire);
        let machine = Machine::Simulated(socket.clone());
        return Ok((wire.clone(), Processes::Simulated(wire), machine, None));
    }
    match Path::new("/dev/vfio/vfio").exists() {
        true => Ok((Arc::new(Linux), Processes::Linux, Machine::Linux, None)),
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
