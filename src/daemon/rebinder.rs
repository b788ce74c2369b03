//! Rebinding of devices, each by this program again, in a process of its own that has none of the
//! daemon's files and that the daemon does not wait for when it ends: a driver that is told to go
//! waits for the last close of the device, and the process with it, killed or not.

use crate::broker::Rebinder;
use crate::host;
use crate::kernel::Linux;
use crate::protocol::Bdf;
use crate::sim::Wire;
use nix::errno::Errno;
use std::collections::HashSet;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tracing::{info, warn};

/// What it is called in the list of processes; a program that is started under this name is one.
const NAME: &str = "vfio-broker-rebinder";

/// How often a simulated driver is asked whether it can go: real ones wait by themselves.
const SIMULATED: Duration = Duration::from_millis(20);

/// Who does it.
#[derive(Clone, Debug)]
pub(super) enum Processes {
    /// A process for each device.
    Linux,
    /// A simulated kernel has no sysfs that could be written to.
    Simulated(Arc<Wire>),
}

/// The rebinds under way.
#[derive(Debug)]
pub(super) struct DaemonRebinder {
    processes: Processes,
    under_way: Arc<Mutex<HashSet<Bdf>>>,
}

impl DaemonRebinder {
    pub(super) fn new(processes: Processes) -> Self {
        Self { processes, under_way: Arc::default() }
    }
}

impl Rebinder for DaemonRebinder {
    fn begin(&self, device: Bdf, registration: u64, driver: Option<&str>) {
        let under_way = Arc::clone(&self.under_way);
        if !under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(device) {
            return;
        }
        let (processes, driver) = (self.processes.clone(), driver.map(str::to_owned));
        // The thread only waits for the process.
        let thread = std::thread::Builder::new().name("rebind".into()).spawn(move || {
            match processes.rebind(device, registration, driver.as_deref()) {
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

impl Processes {
    fn rebind(&self, device: Bdf, registration: u64, driver: Option<&str>) -> Result<(), String> {
        match self {
            Self::Linux => run(device, registration, driver),
            Self::Simulated(sim) => simulate(sim, device, driver).map_err(|e| e.to_string()),
        }
    }
}

fn run(device: Bdf, registration: u64, driver: Option<&str>) -> Result<(), String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).args([device.to_string(), registration.to_string()]).args(driver);
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

fn simulate(sim: &Wire, device: Bdf, driver: Option<&str>) -> Result<(), Errno> {
    let device = device.to_string();
    loop {
        match sim.set_driver(&device, None) {
            Err(Errno::EBUSY) => std::thread::sleep(SIMULATED),
            done => break done?,
        }
    }
    sim.set_driver(&device, driver)
}

/// Rebinds a device if this program was started for that: call it first of all in `main`.
pub(super) fn be_one_if_asked() -> Option<ExitCode> {
    let mut args = super::started_as(NAME)?.filter_map(|word| word.into_string().ok());
    let device: Bdf = args.next()?.parse().ok()?;
    let registration = args.next()?.parse().ok()?;
    Some(match write(device, registration, args.next().as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    })
}

/// Writes what an administrator would.
fn write(device: Bdf, registration: u64, driver: Option<&str>) -> Result<(), String> {
    let write = |path: String| {
        std::fs::write(&path, device.to_string()).map_err(|error| format!("{path}: {error}"))
    };
    // The daemon looked a while ago. What is a host driver's by now, or could become one's, nobody
    // has named.
    let at = format!("/sys/bus/pci/devices/{device}");
    match driver {
        Some(driver) => {
            match host::registration(&Linux, device) {
                Ok(Some(now)) if now == registration => {}
                // Another rebind was faster: whoever has the device now is not meant.
                Ok(Some(_)) => return Ok(()),
                Ok(None) => return Err(format!("{device} is not on a VFIO driver any more")),
                Err(error) => return Err(error.to_string()),
            }
            write(format!("/sys/bus/pci/drivers/{driver}/unbind"))?;
            write(format!("/sys/bus/pci/drivers/{driver}/bind"))
        }
        None => {
            let wanted = std::fs::read_to_string(format!("{at}/driver_override"));
            if !wanted.as_ref().is_ok_and(|driver| driver.contains("vfio")) {
                return Err(format!(
                    "{device} has no driver, and its driver_override names no VFIO one"
                ));
            }
            write("/sys/bus/pci/drivers_probe".into())?;
            // The kernel says nothing where an earlier unbind is still under way.
            match host::registration(&Linux, device) {
                Ok(Some(_)) => Ok(()),
                Ok(None) => {
                    Err(format!("{device} is not on a driver yet: some process has it open"))
                }
                Err(error) => Err(error.to_string()),
            }
        }
    }
}
