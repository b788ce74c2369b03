//! The daemon: sockets, peers, limits, one task a connection.
//!
//! One thread serves all connections. Whatever can block in the kernel is done elsewhere: every call on
//! a VFIO file in the lease's keeper ([`keepers`]), receiving and closing what peers sent in processes
//! of their own ([`porter`]), and freeing guests' memory on closer threads ([`closer`]).

mod accept;
mod account;
mod calls;
mod closer;
mod connection;
mod file_mode;
mod incoming;
mod introspect;
mod keepers;
mod listen;
mod lists;
mod log;
mod observer;
mod options;
mod outgoing;
mod peer;
mod rate_limit;
mod receiver;
mod start;
mod start_error;
mod watch;

pub use log::LogFormat;
pub use options::Options;
pub use start::run;
pub use start_error::StartError;

use crate::broker::Broker;
use crate::policy::Peer;
use crate::protocol::{Error, MAX_MESSAGE};
use account::{Account, Accounts};
use closer::Closer;
use observer::DaemonObserver;
use receiver::Receivers;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tracing::{debug, info};

/// Does what one of the daemon's own processes is for, if this program was started as one: call it
/// first of all in `main`.
pub fn be_process_if_asked() -> Option<std::process::ExitCode> {
    receiver::be_one_if_asked().or_else(crate::keeper::be_one_if_asked)
}

/// The arguments, if this program was started under that name.
fn started_as(name: &str) -> Option<std::env::ArgsOs> {
    let mut args = std::env::args_os();
    (args.next()? == name).then_some(args)
}

/// What all connections share; lives on the event loop.
struct Daemon {
    broker: Rc<Broker>,
    observer: Rc<DaemonObserver>,
    accounts: Rc<Accounts>,
    receivers: Rc<Receivers>,
    deadlines: Deadlines,
    /// Whether the policy has tenants by unit.
    names_units: bool,
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
        most_connections: usize,
        options: &Options,
    ) -> std::io::Result<Self> {
        let names_units = broker.policy().names_units();
        Ok(Self {
            broker,
            observer,
            accounts: Rc::new(Accounts::new(most_connections, Closer::new()?)),
            receivers: Rc::default(),
            deadlines: Deadlines {
                call: options.call_deadline,
                read: options.read_deadline,
                write: options.write_deadline,
            },
            names_units,
            buffer: RefCell::new(vec![0; MAX_MESSAGE].into()),
        })
    }

    /// What is denied is the administrator's business; what else goes wrong is the client's. Each
    /// account has its own measure, so that nobody's denials hide another's.
    fn log_refusal(account: &Account, peer: &Peer, error: &Error) {
        let (uid, pid) = (peer.uid, peer.pid);
        if let Error::Denied { rule, reason, .. } = error {
            if let Some(held_back) = account.may_log_denial(Instant::now()) {
                let (rule, reason) = (log::excerpt(rule), log::excerpt(reason));
                info!(uid, pid, rule, reason, held_back, "denied");
            }
        } else {
            debug!(uid, pid, error = log::excerpt(&error.to_string()), "refused");
        }
    }
}
