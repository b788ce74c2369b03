//! A client of the demonstration, in a process of its own and, where that may be, under another
//! uid. It does what it is asked, a line of JSON each way.

use crate::cli::Failure;
use crate::client::{Acquire, Client, DmaRange, Error, Lease};
use crate::kernel::{Container, Device, DmaMap, Mapped};
use crate::protocol::{self, FdKind, Handout};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A client of the demonstration (hidden)
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {}

/// What an agent can be asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Say who it is.
    Hello,
    Acquire {
        vm: String,
        devices: Vec<String>,
        container: Option<String>,
    },
    /// Map memory with its own container.
    Map {
        iova: u64,
        size: u64,
    },
    /// Have memory mapped by the broker.
    MapDma {
        iova: u64,
        size: u64,
    },
    /// Open the device, read what it is.
    Device {
        name: String,
    },
    Release,
}

/// What it says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Hello { uid: u32, pid: i32, capabilities: String },
    Acquired { lease: String, tenant: String, handout: Handout, fds: Vec<String> },
    Done,
    Device { vendor: u16, device: u16, regions: u32, irqs: u32 },
    Released { proved: bool },
    Refused(protocol::Error),
    Failed(String),
}

/// Runs as the agent until its input ends.
pub(in crate::cli) fn run(socket: &Path) -> Result<(), Failure> {
    let mut state = State::default();
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?).map_err(std::io::Error::from)?;
        let answer = match state.carry_out(socket, ask) {
            Ok(answer) => answer,
            Err(Error::Broker { error, .. }) => Answer::Refused(error),
            Err(error) => Answer::Failed(error.to_string()),
        };
        let text = serde_json::to_string(&answer).map_err(std::io::Error::from)?;
        crate::cli::style::print(&(text + "\n"))?;
    }
    Ok(())
}

/// What the agent has by now.
#[derive(Default)]
struct State {
    broker: Option<Client>,
    lease: Option<Lease>,
    container: Option<Container>,
    device: Option<Device>,
    memory: Vec<Mapped>,
}

impl State {
    fn carry_out(&mut self, socket: &Path, ask: Ask) -> Result<Answer, Error> {
        let broker = match &mut self.broker {
            Some(broker) => broker,
            none => none.insert(Client::connect_to(socket)?),
        };
        if let Ask::Hello = ask {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
            let capabilities = effective.unwrap_or_default().trim().to_owned();
            let uid = Uid::effective().as_raw();
            return Ok(Answer::Hello { uid, pid: nix::unistd::getpid().as_raw(), capabilities });
        }
        if let Ask::Acquire { vm, devices, container } = ask {
            let mut request = Acquire::new(vm);
            for device in &devices {
                request = request.device(device);
            }
            request = match container {
                Some(name) => request.container(name).handout(Handout::Devices),
                None => request.handout(Handout::Container),
            };
            let lease = broker.acquire(request)?;
            let answer = acquired(&lease);
            self.lease = Some(lease);
            return Ok(answer);
        }
        let Some(lease) = &self.lease else { return Ok(Answer::Failed("no lease".into())) };
        Ok(match ask {
            Ask::Map { iova, size } => {
                let memory = anonymous(size)?.1;
                let container = lease.container()?;
                let flags = DmaMap::READ | DmaMap::WRITE;
                container.map(&DmaMap { flags, vaddr: memory.vaddr(), iova, size })?;
                self.memory.push(memory);
                self.container = Some(container);
                Answer::Done
            }
            Ask::MapDma { iova, size } => {
                let (file, _) = anonymous(size)?;
                broker.map_dma(lease, file, DmaRange::new(iova, size))?;
                Answer::Done
            }
            Ask::Device { name } => {
                let opened = lease.device(&name)?;
                let (vendor, device) = opened.pci_ids()?;
                let info = opened.info()?;
                self.device = Some(opened);
                Answer::Device { vendor, device, regions: info.regions, irqs: info.irqs }
            }
            Ask::Release | Ask::Hello | Ask::Acquire { .. } => self.release()?,
        })
    }

    fn release(&mut self) -> Result<Answer, Error> {
        self.device = None;
        self.container = None;
        let (Some(broker), Some(lease)) = (&mut self.broker, self.lease.take()) else {
            return Ok(Answer::Failed("no lease".into()));
        };
        let proved = broker.release(lease)?;
        self.memory.clear();
        Ok(Answer::Released { proved })
    }
}

fn acquired(lease: &Lease) -> Answer {
    let word = |kind| serde_json::to_value(kind).unwrap_or_default();
    let mut fds: Vec<String> = lease
        .files()
        .iter()
        .map(|file| match (file.kind, word(file.kind).as_str().unwrap_or_default()) {
            // A container of its own is named after the lease, which says nothing here.
            (FdKind::Container, kind) => kind.to_owned(),
            (_, kind) => format!("{kind} {}", file.name),
        })
        .collect();
    fds.push("lease".into());
    Answer::Acquired {
        lease: lease.id().to_owned(),
        tenant: lease.tenant().to_owned(),
        handout: lease.handout(),
        fds,
    }
}

fn anonymous(size: u64) -> Result<(std::os::fd::OwnedFd, Mapped), Error> {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    Mapped::memfd(size).map_err(|errno| Error::System { call: "memfd_create or mmap", errno })
}

/// An agent, from the side of whoever tells it what to do. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Agent {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub(super) uid: u32,
    pub(super) pid: i32,
    pub(super) capabilities: String,
}

impl Agent {
    /// Starts one under another uid, or under one's own.
    pub(super) fn start(socket: &Path, uid: Option<u32>) -> Result<Self, Failure> {
        // Not current_exe(): the other uid may not be allowed to walk to where this program is.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("vfio-broker").arg("--socket").arg(socket).arg("demo-agent");
        command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command
            .spawn()
            .map_err(|error| Failure::new(format!("can't start a client: {error}")))?;
        let (Some(asks), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::new("a client without pipes"));
        };
        let answers = BufReader::new(answers);
        let capabilities = String::new();
        let mut agent = Self { child, asks, answers, uid: 0, pid: 0, capabilities };
        match agent.ask(&Ask::Hello)? {
            Answer::Hello { uid, pid, capabilities } => {
                agent.uid = uid;
                agent.pid = pid;
                agent.capabilities = capabilities;
                Ok(agent)
            }
            other => Err(Failure::new(format!("a client could not start: {other:?}"))),
        }
    }

    pub(super) fn ask(&mut self, ask: &Ask) -> Result<Answer, Failure> {
        let mut line = serde_json::to_string(ask).map_err(std::io::Error::from)?;
        line.push('\n');
        self.asks.write_all(line.as_bytes())?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        serde_json::from_str(&answer)
            .map_err(|error| Failure::new(format!("a client answered {answer:?}: {error}")))
    }

    /// SIGKILL, and waits for its end.
    pub(super) fn kill(mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
