//! Rebinding of devices, each by this program again, in a process of its own that has none of the
//! daemon's files and that the daemon does not wait for when it ends: a driver that is told to go
//! waits for the last close of the device, and the process with it, killed or not.

use super::proxy::{Machine, kernel};
use crate::broker::Rebinder;
use crate::drivers;
use crate::protocol::Bdf;
use std::collections::HashSet;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{info, warn};

/// What it is called in the list of processes; a program that is started under this name is one.
const NAME: &str = "vfio-broker-rebinder";

/// The rebinds under way.
#[derive(Debug)]
pub(super) struct DaemonRebinder {
    machine: Machine,
    under_way: Arc<Mutex<HashSet<Bdf>>>,
}

impl DaemonRebinder {
    pub(super) fn new(machine: Machine) -> Self {
        Self { machine, under_way: Arc::default() }
    }
}

impl Rebinder for DaemonRebinder {
    fn begin(&self, device: Bdf, registration: u64, driver: Option<&str>) {
        let under_way = Arc::clone(&self.under_way);
        if !under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(device) {
            return;
        }
        let (machine, driver) = (self.machine.clone(), driver.map(str::to_owned));
        // The thread only waits for the process.
        let thread = std::thread::Builder::new().name("rebind".into()).spawn(move || {
            match run(&machine, device, registration, driver.as_deref()) {
                Ok(()) => info!(%device, driver, "bound again: nobody has it open"),
                Err(why) => warn!(%device, driver, why, "can't bind a device again"),
            }
            under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&device);
        });
        if let Err(error) = thread {
            warn!(%device, %error, "can't bind a device again: no thread");
            self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&device);
        }
    }
}

fn run(
    machine: &Machine,
    device: Bdf,
    registration: u64,
    driver: Option<&str>,
) -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).args([device.to_string(), registration.to_string()]);
    // An empty name is none.
    command.arg(driver.unwrap_or_default()).args(machine.arguments());
    command.env_clear().current_dir("/");
    // Signals to the daemon's group are not for it: they would do no good.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let output = command.output().map_err(|error| format!("can't start a process: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}; {}", said.trim(), output.status))
}

/// Rebinds a device if this program was started for that: call it first of all in `main`.
pub(super) fn be_one_if_asked() -> Option<ExitCode> {
    let mut args = super::started_as(NAME)?;
    let device: Bdf = args.next()?.to_str()?.parse().ok()?;
    let registration = args.next()?.to_str()?.parse().ok()?;
    let driver = args.next()?.into_string().ok().filter(|name| !name.is_empty());
    let rebound = match kernel(args.next()) {
        Ok(kernel) => drivers::rebind(&*kernel, device, registration, driver.as_deref())
            .map_err(|error| error.to_string()),
        Err(error) => Err(format!("can't reach the simulation: {error}")),
    };
    Some(match rebound {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    })
}
