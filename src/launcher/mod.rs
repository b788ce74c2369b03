//! The launcher: starts the broker, and for the broker everything else.
//!
//! It is what the service manager starts: the one process that has all of root's rights. It listens, and
//! forks: the broker, which talks to clients and has no rights; keepers, which have devices open; what
//! receives and closes peers' files; and what reads the policy. It has one thread and reads nothing
//! that a client has sent. What it forks has its memory, and of its files only what it is given.

mod answer;
mod broker;
mod confine;
mod earlier_broker;
mod file_mode;
mod listen;
mod options;
mod policy_file;
mod policy_source;
mod serve;
mod simulation;
mod start;
mod start_error;

pub(crate) use confine::Sandbox;
pub use options::{Options, SandboxMode};
pub use start::run;
pub use start_error::StartError;
