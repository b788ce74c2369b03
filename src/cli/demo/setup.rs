//! What the demonstration runs on: a broker in a temporary directory.

use crate::cli::Failure;
use crate::client::Client;
use crate::sim::Wire;
use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What is to be shown, on which devices.
#[derive(Debug)]
pub(super) struct Plan {
    /// Where it happens, in a line.
    pub(super) title: String,
    pub(super) policy: String,
    /// The simulated kernel, if it is one.
    pub(super) topology: Option<&'static str>,
    /// The devices of one group.
    pub(super) first: Vec<String>,
    /// The devices of another group, if there is one.
    pub(super) second: Vec<String>,
    /// One that the policy gives to nobody, if there is one.
    pub(super) denied: Option<&'static str>,
}

/// A broker, running.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) plan: Plan,
    pub(super) socket: PathBuf,
    /// The simulated kernel's own books.
    pub(super) sim: Option<Wire>,
    broker: Child,
    directory: tempfile::TempDir,
}

/// How long a broker may take to start: far more than it does.
const PATIENCE: Duration = Duration::from_secs(20);

impl Setup {
    pub(super) fn start(plan: Plan) -> Result<Self, Failure> {
        let directory = tempfile::Builder::new().prefix("vfio-broker-demo.").tempdir()?;
        let at = |name: &str| directory.path().join(name);
        // Clients under other uids walk through it to the socket.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755))?;
        std::fs::create_dir(at("control"))?;
        std::fs::set_permissions(at("control"), Permissions::from_mode(0o700))?;
        std::fs::write(at("demo.policy.toml"), &plan.policy)?;
        let socket = at("broker.sock");
        let ready = UnixDatagram::bind(at("notify"))?;

        let mut command = Command::new("/proc/self/exe");
        // Whatever ends this process: the broker sees the end of its input, and cleans up. Ctrl-C is
        // for this process alone.
        command.args(["daemon", "--remove"]).arg(directory.path()).process_group(0);
        command.args(["--", "--policy"]).arg(at("demo.policy.toml"));
        command.arg("--socket").arg(&socket);
        if let Some(topology) = plan.topology {
            std::fs::write(at("demo.toml"), topology)?;
            command.arg("--sim").arg(at("demo.toml")).arg("--sim-control").arg(at("control"));
        }
        command.env("NOTIFY_SOCKET", at("notify")).env_remove("LISTEN_FDS");
        let log = std::fs::File::create(at("log"))?;
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        let broker = command.spawn()?;
        let mut setup = Self { plan, socket, sim: None, broker, directory };
        setup.wait_until_ready(&ready)?;
        if setup.plan.topology.is_some() {
            let control = setup.directory.path().join("control/control.sock");
            setup.sim = Some(Wire::connect(&control)?);
        }
        Ok(setup)
    }

    fn wait_until_ready(&mut self, ready: &UnixDatagram) -> Result<(), Failure> {
        ready.set_read_timeout(Some(Duration::from_millis(50)))?;
        let start = Instant::now();
        let mut text = [0; 256];
        while start.elapsed() < PATIENCE {
            match ready.recv(&mut text) {
                Ok(len) if text.get(..len).is_some_and(|text| text.starts_with(b"READY=1")) => {
                    return Ok(());
                }
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
                _ => {}
            }
            if let Some(status) = self.broker.try_wait()? {
                return Err(self.failure(format!("the broker ended at its start: {status}")));
            }
        }
        Err(self.failure("the broker does not start"))
    }

    /// A failure with what the broker has logged.
    pub(super) fn failure(&self, what: impl Into<String>) -> Failure {
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let mut failure = Failure::new(what);
        for line in log.lines() {
            failure = failure.detail(format!("broker: {line}"));
        }
        failure
    }

    pub(super) fn connect(&self) -> Result<Client, Failure> {
        Ok(Client::connect_to(&self.socket)?)
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        // The end of its input tells it to end; it takes its socket with it.
        drop(self.broker.stdin.take());
        let _ = self.broker.wait();
    }
}
