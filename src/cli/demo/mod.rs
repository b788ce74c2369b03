//! `vfio-broker demo`: the whole story in a screenful, each step of it checked.

pub(super) mod agent;
mod host;
mod simulated;
mod stage;
mod story;
mod tale;

use super::{Context, Failure};
use stage::Stage;
use tale::Tale;

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
    let stage = Stage::set(plan)?;
    let mut tale = Tale::new(context);
    let told = story::tell(&stage, &mut tale);
    let told = told.map_err(|failure| failure.and(stage.failure("")));
    tale.ends(told.is_ok())?;
    told
}
