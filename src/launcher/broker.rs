//! The broker's process, as the launcher has to do with it.

use super::StartError;
use super::confine::Sandbox;
use super::options::Options;
use super::policy_file::PolicyFile;
use super::simulation;
use crate::daemon::{self, Given};
use crate::keeper::{Machine, PolicyInForce, links};
use crate::log;
use crate::process::launcher::{GiveUp, PolicyRead, Told};
use crate::process::link::{self, Answering};
use crate::process::role::Role;
use crate::sys::{child, fdpass};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::socket::MsgFlags;
use nix::unistd::Pid;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

/// What every broker of this launcher begins with.
#[derive(Debug)]
pub(super) struct Beginning {
    pub(super) options: Options,
    pub(super) policy: PolicyInForce,
    pub(super) policy_file: PolicyFile,
    pub(super) machine: Machine,
    pub(super) sandbox: Sandbox,
    /// The limit of open files.
    pub(super) files: u64,
    /// The simulated machine ends with the launcher.
    pub(super) machine_ends: bool,
}

/// A broker that was started.
#[derive(Debug)]
pub(super) struct Broker {
    pub(super) pid: Pid,
    /// The link on which it asks.
    pub(super) asks: Answering,
    /// The link on which it is told what to do.
    pub(super) tells: Option<Answering>,
    pub(super) is_ready: bool,
    /// It listens to what it is told.
    pub(super) watches: bool,
    /// What it said before it ended.
    pub(super) gave_up: Option<String>,
    /// How its process has ended. Its links may go on: whoever it gave them to has them.
    pub(super) ended: Option<String>,
}

impl Broker {
    /// Starts one, which serves a listening socket.
    pub(super) fn start(
        beginning: &Beginning,
        listener: &UnixListener,
    ) -> Result<Self, StartError> {
        let failed = StartError::set_up::<std::io::Error>;
        let ([ask, watch], [asked, told]) =
            links().map_err(|errno| failed("the broker's links")(errno.into()))?;
        let listener = listener.try_clone().map_err(failed("the socket"))?;
        let files = [ask, watch, listener.into()];
        let pid = child::fork(Role::Broker.name(), files, |files| serve(beginning, files));
        let pid = pid.map_err(|errno| failed("the broker's process")(errno.into()))?;
        let asks = Answering::without_files(asked);
        let tells = Some(Answering::without_files(told));
        let (is_ready, watches) = (false, false);
        Ok(Self { pid, asks, tells, is_ready, watches, gave_up: None, ended: None })
    }

    /// Tells it to end, once it listens.
    pub(super) fn tell_to_stop(&self, signal: &str) {
        self.tell(&Told::Stop(signal.into()), &[]);
    }

    /// Tells it what came of reading the policy again, with the compiled one if it is another. False where
    /// it does not hear it.
    pub(super) fn tell_policy(&self, read: &PolicyRead, compiled: Option<&File>) -> bool {
        self.tell(&Told::Policy(read.clone()), compiled.map(AsFd::as_fd).as_slice())
    }

    fn tell(&self, told: &Told, files: &[BorrowedFd<'_>]) -> bool {
        let Some(tells) = self.tells.as_ref().filter(|_| self.watches) else { return false };
        // Its end is seen on the other link.
        tells.send(&link::reply(told, true), files).is_ok()
    }

    /// Its links, once it has ended.
    pub(super) fn into_links(self) -> Vec<OwnedFd> {
        [Some(self.asks), self.tells].into_iter().flatten().map(Into::into).collect()
    }

    /// Ends it whatever it is at.
    pub(super) fn kill(&self) {
        let _ = kill(self.pid, Signal::SIGKILL);
    }
}

/// The broker's process.
fn serve(beginning: &Beginning, [ask, watch, listener]: [OwnedFd; 3]) -> u8 {
    let Ok(says) = ask.try_clone() else { return 1 };
    // A SIGHUP is meant for the launcher, which has the policy read: the broker must not end by one.
    if SigSet::from(Signal::SIGHUP).thread_block().is_err() {
        return 1;
    }
    let served = prepared(beginning).and_then(|kernel| {
        let Beginning { options, policy, policy_file, sandbox, files, machine_ends, .. } =
            beginning;
        daemon::run(Given {
            options: options.clone(),
            policy: Arc::clone(policy.policy()),
            policy_read: policy_file.status().clone(),
            kernel,
            listener: listener.into(),
            links: [ask, watch],
            sandbox: sandbox.to_string(),
            files: *files,
            machine_ends: *machine_ends,
        })
    });
    let code = match served {
        Ok(()) => 0,
        Err(error) => {
            give_up(says.as_fd(), &error);
            1
        }
    };
    log::flush();
    code
}

fn prepared(beginning: &Beginning) -> Result<Arc<dyn crate::kernel::Kernel>, StartError> {
    // Its socket may be one that only root can reach.
    let kernel = simulation::kernel(&beginning.machine)?;
    beginning.sandbox.confine(Role::Broker).map_err(StartError::Unconfined)?;
    Ok(kernel)
}

/// Says why it ends. Nobody waits for an answer.
fn give_up(says: BorrowedFd<'_>, error: &StartError) {
    let call = link::call(&GiveUp { why: error.to_string() }, false);
    let _ = fdpass::send(says, &call, &[], MsgFlags::MSG_DONTWAIT);
}
