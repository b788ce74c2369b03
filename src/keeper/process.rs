//! A keeper's process: this program again, with nothing open but its links and the log.

use super::serve::{Links, run};
use super::{PATIENCE, Place};
use crate::kernel::{Kernel, Linux};
use crate::log;
use crate::sim::Wire;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;

/// What it is called in the list of processes; a program that is started under this name is one.
const NAME: &str = "vfio-broker-keeper";

/// Whose kernel.
#[derive(Clone, Debug)]
pub enum Machine {
    /// This machine's.
    Linux,
    /// A simulated one's, at this control socket.
    Simulated(PathBuf),
}

/// Starts a keeper of that name. Returns its process and two links to it, in non-blocking mode.
///
/// # Errors
/// What socketpair(2) or the start of a process says.
pub fn start(
    machine: &Machine,
    place: &Place,
    name: &str,
) -> std::io::Result<(Child, [OwnedFd; 2])> {
    let (first, theirs) = pair()?;
    let (second, others) = pair()?;
    let mut command = command(machine, place, name, "new");
    let child = command.stdin(theirs).stdout(others).spawn()?;
    Ok((child, [first, second]))
}

/// Starts one that takes back what a dead keeper of that name has left.
///
/// # Errors
/// What the start of a process says.
pub fn start_salvage(machine: &Machine, place: &Place, name: &str) -> std::io::Result<Child> {
    command(machine, place, name, "salvage").stdin(Stdio::null()).stdout(Stdio::null()).spawn()
}

fn command(machine: &Machine, place: &Place, name: &str, how: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(how).arg(place.path()).arg(name).env_clear().current_dir("/");
    if let Machine::Simulated(control) = machine {
        command.arg(control);
    }
    // Signals to the broker's group are not for it: it outlives the broker.
    command.envs(log::environment()).process_group(0);
    command
}

fn pair() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?)
}

/// Keeps, if this program was started for that: call it first of all in `main`.
pub fn be_one_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os();
    if args.next()? != NAME {
        return None;
    }
    // Whoever ends a service ends what it is at as well, and that is not to be left half done.
    let _ = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect::<SigSet>()
        .thread_block();
    log::join();
    let how = args.next()?;
    let (place, name) = (PathBuf::from(args.next()?), args.next()?.into_string().ok()?);
    let kept = keep(how == "salvage", &place, &name, args.next());
    log::flush();
    Some(match kept {
        Some(()) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    })
}

/// `None` where it could not begin: its links' end says so.
fn keep(salvage: bool, place: &Path, name: &str, control: Option<OsString>) -> Option<()> {
    let first = if salvage { Vec::new() } else { take_links()? };
    let place = Place::at(place);
    let (kernel, machine): (Arc<dyn Kernel>, Option<OwnedFd>) = match control {
        None => (Arc::new(Linux), None),
        Some(control) => {
            let wire = Wire::connect(control.as_ref()).ok()?;
            let end = wire.end();
            (Arc::new(wire), end)
        }
    };
    run(kernel, &place, name, PATIENCE.to_vec(), Links { first, machine, salvage }).ok()
}

/// The links, which a child is given as its input and output; in their place comes /dev/null.
fn take_links() -> Option<Vec<OwnedFd>> {
    let input = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    let output = std::io::stdout().as_fd().try_clone_to_owned().ok()?;
    let null = File::options().read(true).write(true).open("/dev/null").ok()?;
    nix::unistd::dup2_stdin(&null).ok()?;
    nix::unistd::dup2_stdout(&null).ok()?;
    Some(vec![input, output])
}
