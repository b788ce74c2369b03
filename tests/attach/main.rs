//! `vfio-broker attach` and `detach`: a broker on a simulated kernel, and a model of QEMU that fails
//! where it is told to.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

#[path = "../common/mod.rs"]
mod common;
mod failing;
mod hostile;
mod killed;
mod qemu;
mod revoked;
mod usual;

use common::{Daemon, SOON, Setup, until};
use qemu::Qemu;
use std::path::Path;
use std::time::Duration;
use vfio_broker::client::{Acquire, Client};
use vfio_broker::protocol::Backend;
use vfio_broker::qmp::Monitor;
use vfio_broker::qmp::hotplug::{self, Attach, Attached, Detach, Detached, attach, detach};

const NIC: &str = "0000:65:00.0";
const OTHER: &str = "0000:66:00.0";
/// The two functions of one group.
const PAIR: [&str; 2] = ["0000:70:00.0", "0000:70:00.1"];

const TWO_IN_A_GROUP: &str = r#"
[[group]]
id = 40
[[group.device]]
bdf = "0000:70:00.0"
vendor = 0x8086
device = 0x10d3
class = 0x020000
driver = "vfio-pci"
[[group.device]]
bdf = "0000:70:00.1"
vendor = 0x8086
device = 0x10d3
class = 0x020000
driver = "vfio-pci"
"#;

const POLICY: &str = r#"
version = 1
[[tenant]]
name = "everybody"
anyone = true
devices = ["8086:10d3"]
handouts = ["container", "iommufd"]
"#;

/// A broker and a QEMU.
struct World {
    broker: Daemon,
    qemu: Qemu,
}

impl World {
    fn start() -> Self {
        Self::with_policy(POLICY)
    }

    fn with_policy(policy: &str) -> Self {
        let topology = format!("{}{TWO_IN_A_GROUP}", common::TOPOLOGY);
        let broker = Daemon::with(Setup { topology, ..Setup::policy(policy) });
        Self { broker, qemu: Qemu::start() }
    }

    fn client(&self) -> Client {
        Client::connect_to(&self.broker.socket).unwrap()
    }

    fn attach(&self, request: &Attach) -> hotplug::Result<Attached> {
        self.attach_within(request, SOON)
    }

    fn attach_within(&self, request: &Attach, timeout: Duration) -> hotplug::Result<Attached> {
        let mut monitor = Monitor::connect_within(self.qemu.path(), timeout)?;
        attach(&mut monitor, &mut self.client(), request)
    }

    fn detach(&self, request: &Detach) -> hotplug::Result<Detached> {
        let mut monitor = Monitor::connect_within(self.qemu.path(), SOON)?;
        detach(&mut monitor, &mut self.client(), request, &mut |_| {})
    }

    fn leases(&self) -> usize {
        self.client().leases().unwrap().len()
    }

    /// Nothing of a device is left anywhere, and whoever wants it can have it.
    #[track_caller]
    fn is_clean(&self) {
        assert_eq!(self.qemu.model().leftovers(), [""; 0]);
        self.is_free(NIC);
        assert_eq!(self.leases(), 0);
    }

    /// The device can be acquired, which waits for a lease that is just ending.
    #[track_caller]
    fn is_free(&self, device: &str) {
        let request = Acquire::new("somebody").device(device).backend(Backend::Iommufd);
        let mut client = self.client();
        let lease = client.acquire(request).unwrap();
        client.release(lease).unwrap();
    }
}

fn nic() -> Attach {
    Attach::new("web1", NIC).bus("port1")
}

/// `vfio-broker` with a socket.
fn vfio_broker(world: &World, words: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vfio-broker"));
    command.arg("--socket").arg(&world.broker.socket).args(words);
    command.stdin(std::process::Stdio::null());
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
