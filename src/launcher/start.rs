//! From the command line to the broker.

use super::broker::Beginning;
use super::confine::Sandbox;
use super::earlier_broker;
use super::listen::{self, Listening};
use super::options::Options;
use super::policy_file::{self, PolicyFile};
use super::serve::{Launcher, take_signals};
use super::{StartError, simulation};
use crate::keeper::{Machine, Place};
use crate::log::{self, Log};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::os::unix::net::UnixListener;
use std::path::Path;
use tracing::info;

/// Runs the daemon until SIGTERM or SIGINT; at SIGHUP it reads the policy again. Only for a process with one thread.
///
/// # Errors
/// It could not start, or can't go on.
pub fn run(options: &Options) -> Result<(), StartError> {
    let passed = listen::passed()?;
    let sandbox = Sandbox::find(options.sandbox)?;
    let mut log = log::start(options.log_format, sandbox.clone())
        .map_err(StartError::set_up("the process that writes the log"))?;
    let served = serve(options, passed, sandbox, &mut log);
    log.end();
    served
}

fn serve(
    options: &Options,
    passed: Option<UnixListener>,
    mut sandbox: Sandbox,
    log: &mut Log,
) -> Result<(), StartError> {
    let signals = take_signals()?;
    let files = raise_file_limit().map_err(StartError::set_up("the limit of open files"))?;
    // The simulation ends when this does, and its keepers with it.
    let (machine, simulation) = simulation::machine(options)?;
    let mut policy_file = PolicyFile::new(options, machine.clone());
    let policy = policy_file.read(&mut sandbox)?;
    let place = keepers_place(options, simulation.is_some().then_some(&machine))?;
    let path = place.path();
    // Two daemons would not know what the other has handed out.
    let lock = listen::be_the_only_one(path)?;
    earlier_broker::end(path);
    place
        .clear()
        .map_err(|error| StartError::Keepers { path: path.into(), why: error.to_string() })?;
    let activated = passed.is_some();
    let listening = Listening::new(passed, &options.socket)?;
    let (policy, _) = policy_file::put_in_force(policy, &place, &listening.listener)
        .map_err(StartError::set_up("the policy's file for keepers"))?;
    policy_file.in_force();
    info!(%sandbox, "confined");
    tell_the_start(options, activated);
    let machine_ends = simulation.is_some();
    let options = options.clone();
    let beginning =
        Beginning { options, policy, policy_file, machine, sandbox, files, machine_ends };
    Launcher::new(beginning, place, signals, simulation, lock, listening)?.serve(log)
}

/// Where the keepers' directories are. Wherever this daemon listens: who has a machine's devices is the
/// same.
fn keepers_place(options: &Options, own: Option<&Machine>) -> Result<Place, StartError> {
    let beside_own = match own {
        Some(Machine::Simulated(control)) => control.parent(),
        _ => None,
    };
    let path = match beside_own {
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

/// Raises the limit of open files as far as it goes; returns how far.
fn raise_file_limit() -> Result<u64, Errno> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}
