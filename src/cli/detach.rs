//! `vfio-broker detach`: a device out of a running QEMU.

use super::qemu;
use super::style::{complain, print, print_json_line, printable};
use super::{Context, EXIT_CODES, Failure};
use crate::qmp::hotplug::{Detach, Detached, detach};
use std::path::PathBuf;
use std::time::Duration;

/// Take a device out of a running QEMU and give it back
///
/// The guest is asked to let go of it, and may take its time, or never do so: then nothing has
/// changed, and it can be tried again.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{EXAMPLE}\n\n{EXIT_CODES}"))]
pub(super) struct Args {
    /// The name that it was attached with
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// QEMU's monitor: the one that the device was attached through
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// The device: 65:00.0 or 0000:65:00.0, or what QEMU calls it
    #[arg(long, value_name = "DEVICE")]
    device: String,
    /// How long the guest may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

const EXAMPLE: &str = "\
Example:
  vfio-broker detach --vm web1 --qmp /run/user/1000/web1.qmp --device 65:00.0";

/// How often is told how long it takes.
const TELL: u64 = 5; // s

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let mut broker = context.connect()?;
    let mut monitor = qemu::connect(&args.qmp, qemu::GREETING)?;
    let patience = Duration::from_secs(args.timeout);
    let request = Detach::new(&args.vm, &args.device).patience(patience);
    let mut told = 0;
    let mut waiting = |since: Duration| {
        if since.as_secs() >= told + TELL {
            told = since.as_secs();
            let device = printable(&args.device);
            complain(&format!(
                "waiting for the guest to let go of {device}: {told} of {} s\n",
                args.timeout
            ));
        }
    };
    let detached = detach(&mut monitor, &mut broker, &request, &mut waiting);
    let Detached { device, id, lease, proved } = detached.map_err(qemu::failure)?;
    if context.json {
        let vm = &args.vm;
        let released = proved.is_some();
        return Ok(print_json_line(&serde_json::json!({
            "vm": vm, "device": device, "id": id, "lease": lease, "released": released,
            "proved": proved,
        }))?);
    }
    let state = match proved {
        Some(true) => "the kernel has shown that it is free",
        Some(false) => "its tenant can have it again; `vfio-broker topology` says when others can",
        None => "its lease goes on, for another device of its group",
    };
    let line = printable(&format!("{device} is out of {}: {state}", args.vm));
    Ok(print(&format!("{line}\n"))?)
}
