//! `vfio-broker policy`: check a policy, and ask it why.

mod check;
mod explain;
mod explanation;

use super::{Context, Failure};
use crate::policy::{POLICY_PATH, Policy, Problems};
use crate::users::SystemUsers;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Check a policy file, or ask it who may have what and why
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Check(check::Args),
    Explain(explain::Args),
}

/// Exits with 1 where the file is wrong, and with 3 where the policy says no.
pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Check(args) => check::run(context, args),
        Command::Explain(args) => explain::run(context, args),
    }
}

/// The policy file that is meant where none is named.
fn path_or_default(path: &Option<PathBuf>) -> &Path {
    path.as_deref().unwrap_or(Path::new(POLICY_PATH))
}

/// Reads a policy as the daemon does. `other` is how the command line names another one.
fn load(path: &Path, other: &str) -> Result<Result<Policy, Problems>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::new(format!("can't read the policy {}: {error}", path.display()))
            .advise(format!("name another with {other}, or write one: docs/policy.md has examples"))
    })?;
    Ok(Policy::parse(&path.display().to_string(), &text, &SystemUsers))
}
