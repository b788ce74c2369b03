//! The daemon: sockets, peers, limits, one task a connection.
//!
//! One thread serves all connections. Whatever can block in the kernel is done elsewhere: every call on
//! a VFIO file in the lease's keeper ([`keepers`]), receiving and closing what peers sent in processes
//! of their own ([`receiver`]).

mod accept;
mod account;
mod calls;
mod connection;
mod holders;
mod incoming;
mod introspect;
mod launcher_link;
mod lists;
mod observer;
mod open_files;
mod outgoing;
mod peer_socket;
mod rate_limit;
mod receiver;
mod reload;
mod start;
mod status;
mod watch;

pub(crate) use start::{Given, run};

use crate::broker::Broker;
use crate::launcher::Options;
use crate::log::excerpt;
use crate::policy::{Peer, Policy};
use crate::process::launcher::PolicyRead;
use crate::protocol::{Error, MAX_MESSAGE};
use crate::sys::process::now;
use account::{Account, Accounts};
use launcher_link::LauncherLink;
use observer::DaemonObserver;
use open_files::OpenFiles;
use receiver::Receivers;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};

/// What all connections share; lives on the event loop.
struct Daemon {
    broker: Rc<Broker>,
    observer: Rc<DaemonObserver>,
    accounts: Rc<Accounts>,
    receivers: Rc<Receivers>,
    open_files: OpenFiles,
    deadlines: Deadlines,
    /// The policy's file, and what came of reading it.
    policy: RefCell<PolicyRead>,
    /// What its processes have given up, in words.
    sandbox: String,
    /// When it was started, in seconds since 1970.
    since: u64,
    /// What is received passes through here, so that idle connections have no buffers.
    buffer: RefCell<Box<[u8]>>,
}

/// How long is waited for what others may never do.
struct Deadlines {
    call: Duration,
    read: Duration,
    write: Duration,
}

impl Daemon {
    fn new(
        broker: Rc<Broker>,
        observer: Rc<DaemonObserver>,
        launcher: Rc<LauncherLink>,
        open_files: OpenFiles,
        policy: PolicyRead,
        sandbox: String,
        options: &Options,
    ) -> Self {
        let most_connections = most_connections(&open_files);
        warn_of_quotas(&broker.policy(), &open_files);
        Self {
            broker,
            observer,
            accounts: Rc::new(Accounts::new(Rc::clone(&launcher), most_connections)),
            receivers: Rc::new(Receivers::new(launcher)),
            open_files,
            deadlines: Deadlines {
                call: options.call_deadline,
                read: options.read_deadline,
                write: options.write_deadline,
            },
            policy: RefCell::new(policy),
            sandbox,
            since: now(),
            buffer: RefCell::new(vec![0; MAX_MESSAGE].into()),
        }
    }

    /// Fails where the daemon's open files run short: what is left of them is for ending what there is.
    fn check_open_files(&self) -> Result<(), Error> {
        if !self.open_files.are_short() {
            return Ok(());
        }
        let most = self.open_files.limit() as u64;
        Err(Error::OverLimit {
            limit: "open files of the broker (RLIMIT_NOFILE, LimitNOFILE= of its unit)".into(),
            most,
            asked: most + 1,
        })
    }

    /// What is denied is the administrator's business; what else goes wrong is the client's. Each
    /// account has its own measure, so that nobody's denials hide another's.
    fn log_refusal(account: &Account, peer: &Peer, error: &Error) {
        let (uid, pid) = (peer.uid, peer.pid);
        if let Error::Denied { rule, reason, .. } = error {
            if let Some(held_back) = account.may_log_denial(Instant::now()) {
                let (rule, reason) = (excerpt(rule), excerpt(reason));
                info!(uid, pid, rule, reason, held_back, "denied");
            }
        } else {
            debug!(uid, pid, error = excerpt(&error.to_string()), "refused");
        }
    }
}

/// How many connections there is room for beside the leases' files and those in flight.
fn most_connections(files: &OpenFiles) -> usize {
    let (files, others) = (files.limit(), (files.limit() / 4).max(64));
    let most = files.saturating_sub(others);
    info!(open_files = files, connections = most, "serving");
    most
}

/// Says where the tenants' quotas together are more than there can be open files.
fn warn_of_quotas(policy: &Policy, files: &OpenFiles) {
    let each =
        policy.tenants().iter().map(|it| it.limits.fds.saturating_add(it.limits.connections));
    let quotas = each.fold(0, u64::saturating_add);
    if quotas > files.limit() as u64 {
        let open_files = files.limit();
        warn!(
            quotas,
            open_files,
            "the tenants' fds and connections together are more than the limit of open files, so some \
             can leave none to others: raise LimitNOFILE=, or lower the quotas"
        );
    }
}
