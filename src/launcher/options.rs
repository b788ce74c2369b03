//! The daemon's command line.

use crate::log::LogFormat;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// What `vfio-brokerd` is told.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Who may have what [default: /etc/vfio-broker/policy.toml; with --sim NAME.toml,
    /// NAME.policy.toml beside it, or else everybody may have everything]
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,

    /// Where to listen; not used when the service manager passes a socket
    #[arg(long, value_name = "PATH", default_value = crate::protocol::SOCKET_PATH)]
    pub socket: PathBuf,

    /// Serve a simulated kernel with the devices described in this file
    #[arg(long, value_name = "TOPOLOGY.toml")]
    pub sim: Option<PathBuf>,

    /// Where the simulated kernel's own socket, control.sock, is made: whoever can reach it rules the
    /// simulation [default: a directory that only this user can reach]
    #[arg(long, value_name = "DIRECTORY", requires = "sim")]
    pub sim_control: Option<PathBuf>,

    /// Serve the simulated kernel that another process runs, at its control socket: one that a daemon
    /// can be restarted on
    #[arg(long, value_name = "SOCKET", conflicts_with = "sim", hide = true)]
    pub sim_at: Option<PathBuf>,

    /// Whether processes give up the system calls and files that their work does not take
    #[arg(long, value_name = "WHEN", default_value = "try")]
    pub sandbox: SandboxMode,

    /// How the log on standard error is written
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// The longest that a client waits for the kernel, in milliseconds
    #[arg(long, value_name = "MS", default_value = "30000", value_parser = millis, hide = true)]
    pub call_deadline: Duration,

    /// The longest that reading the policy may take, in milliseconds
    #[arg(long, value_name = "MS", default_value = "30000", value_parser = millis, hide = true)]
    pub policy_deadline: Duration,

    /// The longest that half a message may stay half, in milliseconds
    #[arg(long, value_name = "MS", default_value = "30000", value_parser = millis, hide = true)]
    pub read_deadline: Duration,

    /// The longest that a client may leave a reply unread, in milliseconds
    #[arg(long, value_name = "MS", default_value = "10000", value_parser = millis, hide = true)]
    pub write_deadline: Duration,
}

/// How much of a sandbox there must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// They do, and where this system can't have it all, nothing is started
    Require,
    /// They do as far as this system can; the line "confined" of the log and "vfio-broker status" say how far
    Try,
    /// They don't, to find out whether that is what something fails for
    Off,
}

fn millis(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_millis)
}
