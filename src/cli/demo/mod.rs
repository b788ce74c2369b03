//! `vfio-broker demo`: all of it in a screenful, each step of it checked.

pub(super) mod agent;
mod host;
mod report;
mod script;
mod setup;
mod simulated;

use super::{Context, Failure};
use report::Report;
use setup::Setup;

/// Show what it does, on a simulated machine: nothing of this one is touched
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show it on this machine's own VFIO instead; needs root
    #[arg(long)]
    host: bool,
    /// With --host: use this device, which must be on a VFIO driver [default: those that are]
    #[arg(long = "device", value_name = "BDF", requires = "host")]
    devices: Vec<String>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let plan = if args.host { host::plan(&args.devices)? } else { simulated::plan() };
    let setup = Setup::start(plan)?;
    let mut report = Report::new(context);
    let outcome = script::run(&setup, &mut report);
    let outcome = outcome.map_err(|failure| failure.and(setup.failure("")));
    report.end(outcome.is_ok())?;
    outcome
}
