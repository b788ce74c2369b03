//! `vfio-broker attach`: a device into a running QEMU.

use super::qemu;
use super::style::{print, print_json_line, printable};
use super::{Context, EXIT_CODES, Failure};
use crate::qmp::hotplug::{Attach, Attached, attach};
use std::path::PathBuf;
use std::time::Duration;

/// Get a device and plug it into a running QEMU
///
/// It is QEMU's from then on: given back when QEMU ends, or by `vfio-broker detach`. What fails half
/// way is undone. QEMU 9.0 or newer is needed, with iommufd, a monitor, a free port to plug into (on a
/// q35 machine), and from its start a memlock limit above its guest's memory.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(super) struct Args {
    /// What lists call the holder
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// QEMU's monitor: the socket of -qmp unix:SOCKET,server=on,wait=off
    #[arg(long, value_name = "SOCKET")]
    qmp: PathBuf,
    /// The device: 65:00.0 or 0000:65:00.0, VENDOR:DEVICE for any free one of that kind, vf:BDF for
    /// any free VF of that device
    #[arg(long, value_name = "DEVICE")]
    device: String,
    /// A function of the same group that nobody is to use meanwhile; may come several times
    #[arg(long, value_name = "DEVICE")]
    withhold: Vec<String>,
    /// What QEMU is to call it [default: vfio-0000-65-00.0 for 0000:65:00.0]
    #[arg(long)]
    id: Option<String>,
    /// Where to plug it in: the id of a free pcie-root-port [default: what QEMU finds, which has to
    /// take devices while it runs]
    #[arg(long)]
    bus: Option<String>,
    /// Share this iommufd object of QEMU's command line [default: one for all attached devices]
    #[arg(long, value_name = "ID")]
    iommufd: Option<String>,
    /// How long QEMU may take for each step, in seconds: plugging in pins the guest's memory
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// A property of QEMU's vfio-pci, as in -device; may come several times
    #[arg(long = "property", value_name = "NAME=VALUE", value_parser = property)]
    properties: Vec<(String, String)>,
}

const EXAMPLES: &str = "\
Example:
  qemu-system-x86_64 -machine q35 -m 4G \\
      -qmp unix:/run/user/1000/web1.qmp,server=on,wait=off \\
      -device pcie-root-port,id=port1,chassis=1
  vfio-broker attach --vm web1 --qmp /run/user/1000/web1.qmp \\
      --device 65:00.0 --bus port1";

fn property(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("not NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(super) fn run(context: &Context, args: Args) -> Result<(), Failure> {
    let named = [args.device.clone()];
    let mut request = Attach::new(&args.vm, args.device);
    for device in args.withhold {
        request = request.withhold(device);
    }
    for (name, value) in args.properties {
        request = request.property(name, value);
    }
    request = args.id.into_iter().fold(request, Attach::id);
    request = args.bus.into_iter().fold(request, Attach::bus);
    request = args.iommufd.into_iter().fold(request, Attach::iommufd);
    let mut broker = context.connect()?;
    let timeout = Duration::from_secs(args.timeout);
    let mut monitor = qemu::connect(&args.qmp, timeout.min(qemu::GREETING))?;
    monitor.set_timeout(timeout);
    let attached = attach(&mut monitor, &mut broker, &request);
    let attached = attached.map_err(|error| qemu::failure(error).about(&named))?;
    let Attached { device, id, lease } = attached;
    if context.json {
        let vm = args.vm;
        let shape = serde_json::json!({ "vm": vm, "device": device, "id": id, "lease": lease });
        return Ok(print_json_line(&shape)?);
    }
    let line = printable(&format!("{device} is in {} as {id}, with lease {lease}", args.vm));
    Ok(print(&format!("{line}\n"))?)
}
