//! Where client and server run. Left to itself the scheduler puts the floor now on the client's
//! processor and now on another, which changes its round trip twofold; so the servers get one and
//! the client another.

use std::ffi::OsStr;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The processor of the servers, once [`apart`] has been called.
static SERVERS: OnceLock<Option<String>> = OnceLock::new();

/// Ties this process to one processor and the servers that are started from here on to another.
pub fn apart() {
    let servers = SERVERS.get_or_init(|| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        let (first, last) =
            (allowed.split([',', '-']).next()?, allowed.split([',', '-']).next_back()?);
        let (first, last) = (first.trim(), last.trim());
        let mut tie = Command::new("taskset");
        tie.args(["-cp", first, &std::process::id().to_string()]).stdout(Stdio::null());
        let tied = first != last && tie.status().is_ok_and(|status| status.success());
        tied.then(|| last.to_owned())
    });
    match servers {
        Some(servers) => println!("(servers on processor {servers}, the client on another)"),
        None => println!("(NOT TIED to processors: one alone, or no taskset; figures may jump)"),
    }
}

/// A command that runs a server where servers belong.
pub fn server(program: impl AsRef<OsStr>) -> Command {
    let Some(Some(processor)) = SERVERS.get() else { return Command::new(program) };
    let mut command = Command::new("taskset");
    command.args(["-c", processor]).arg(program);
    command
}
