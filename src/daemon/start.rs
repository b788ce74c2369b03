//! The broker's process, from what the launcher gives it to the end.

use super::launcher_link::{LauncherLink, Orders};
use super::observer::DaemonObserver;
use super::open_files::OpenFiles;
use super::{Daemon, accept, reload};
use crate::broker::{Broker, Parts};
use crate::keeper::PATIENCE;
use crate::kernel::Kernel;
use crate::launcher::{Options, StartError};
use crate::log::{self, LEASES};
use crate::policy::Policy;
use crate::process::launcher::{Alive, PolicyRead, Ready, Told};
use crate::process::link::Lost;
use crate::protocol::Lease;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::task::{JoinError, JoinHandle, LocalSet, spawn_local};
use tracing::info;

/// What a broker begins with.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) options: Options,
    pub(crate) policy: Arc<Policy>,
    /// The file it was read from.
    pub(crate) policy_read: PolicyRead,
    /// Whose sysfs it reads.
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) listener: UnixListener,
    /// To ask the launcher on, and to be told on what to do.
    pub(crate) links: [OwnedFd; 2],
    /// What its processes have given up, in words.
    pub(crate) sandbox: String,
    /// The limit of open files.
    pub(crate) files: u64,
    /// The simulated machine ends with the launcher.
    pub(crate) machine_ends: bool,
}

/// By what a broker was told to stop that has nobody to tell it.
const NO_LAUNCHER: &str = "none: the launcher is no more";

/// Serves clients until the launcher ends it.
///
/// # Errors
/// It could not begin, or can't go on.
pub(crate) fn run(given: Given) -> Result<(), StartError> {
    let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(1).build();
    let runtime = runtime.map_err(StartError::set_up("the event loop"))?;
    LocalSet::new().block_on(&runtime, async {
        log::keep_draining();
        serve(given).await
    })
}

async fn serve(given: Given) -> Result<(), StartError> {
    let Given {
        options,
        policy,
        policy_read,
        kernel,
        listener,
        links: [ask, watch],
        sandbox,
        files,
        machine_ends,
    } = given;
    let lost = StartError::set_up::<std::io::Error>;
    // It goes on when all other tasks have ended.
    let (launcher, end) = LauncherLink::new(ask).map_err(lost("the launcher's link"))?;
    let orders = launcher.watch(watch).await.map_err(lost("the launcher's link"))?;
    let observer = Rc::new(DaemonObserver::new());
    let broker = Broker::new(Parts {
        kernel,
        policy,
        observer: observer.clone(),
        keepers: Box::new(Rc::clone(&launcher)),
        patience: PATIENCE.iter().sum(),
        deadline: options.call_deadline,
    });
    let open_files = OpenFiles::new(files);
    let daemon = Daemon::new(
        broker,
        observer,
        Rc::clone(&launcher),
        open_files,
        policy_read,
        sandbox,
        &options,
    );
    let accounts = Rc::clone(&daemon.accounts);
    let tasks = LocalSet::new();
    let served =
        tasks.run_until(serve_clients(Rc::new(daemon), listener, (&launcher, end), orders)).await;
    let served = served.map(|(broker, why)| tell_the_end(&broker, &why, machine_ends));
    // What peers sent and nobody has read must not be closed here, not even by the end of the process:
    // the close can hang.
    accounts.end();
    drop(tasks);
    accounts.hand_over_connections().await;
    served
}

/// Serves until told to stop; says by what.
async fn serve_clients(
    daemon: Rc<Daemon>,
    listener: UnixListener,
    (launcher, mut end): (&Rc<LauncherLink>, JoinHandle<Lost>),
    mut orders: Orders,
) -> Result<(Rc<Broker>, String), StartError> {
    let broker = Rc::clone(&daemon.broker);
    broker.adopt().await.map_err(|error| StartError::Adopt(error.to_string()))?;
    let lost = StartError::set_up::<std::io::Error>;
    let connections = spawn_local(accept::serve(Rc::clone(&daemon), listener));
    launcher.ask(&Ready {}).await.map_err(lost("the launcher's link"))?;
    if let Some(period) = sd_notify::watchdog_enabled() {
        spawn_local(feed_watchdog(Rc::clone(launcher), period));
    }
    let judged = Rc::clone(&broker);
    // Of what was acquired by the policy of an earlier start.
    spawn_local(async move { judged.judge_leases().await });
    let mut connections = connections;
    loop {
        let (told, files) = tokio::select! {
            end = &mut connections => return Err(ended("the wait for connections", end)),
            told = orders.next() => match told {
                Some(told) => told,
                None => return Ok((broker, NO_LAUNCHER.into())),
            },
            lost = &mut end => return match lost {
                Ok(Lost::Closed) => Ok((broker, NO_LAUNCHER.into())),
                // The launcher has a new broker begin.
                Ok(lost) => Err(link_ended(lost.to_string())),
                Err(panicked) => Err(link_ended(panicked.to_string())),
            },
        };
        match told {
            Told::Stop(signal) => return Ok((broker, signal)),
            Told::Policy(read) => {
                reload::take(&daemon, read, files.into_iter().next()).await;
                // What the service manager waits for.
                launcher.ask(&Ready {}).await.map_err(lost("the launcher's link"))?;
            }
        }
    }
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

fn link_ended(why: String) -> StartError {
    StartError::Ended { what: "the launcher's link", why }
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

/// Tells the service manager twice a period, by way of the launcher, that the event loop goes round.
async fn feed_watchdog(launcher: Rc<LauncherLink>, period: Duration) {
    let mut turns = tokio::time::interval(period / 2);
    loop {
        turns.tick().await;
        if launcher.ask(&Alive {}).await.is_err() {
            return;
        }
    }
}
