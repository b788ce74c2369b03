//! Another process: it is handed open files, does what it is told with them, and can be killed.

use crate::script::{PAGE, memory};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use vfio_broker::kernel::{
    Container, Device, DmaMap, Error, Group, IoasMap, IoasMapFile, Iommufd, Kernel, Linux,
    MapFlags, Mapped, Node, Unmap, UnmapFlags,
};
use vfio_broker::sim::Wire;
use vfio_broker::sys::fdpass;

const WANTED: &str = "VFIO_CONFORMANCE_AGENT";

/// An agent that waits for commands.
pub(crate) struct Agent {
    process: Child,
    socket: OwnedFd,
}

impl Agent {
    /// Starts an agent with this process's rights.
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// Starts an agent without capabilities, which may lock so many bytes.
    pub(crate) fn unprivileged(memlock: u64) -> Self {
        Self::with(&[("VFIO_CONFORMANCE_MEMLOCK", memlock.to_string())])
    }

    fn with(env: &[(&str, String)]) -> Self {
        let (socket, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .env(WANTED, "1")
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::from(theirs))
            .spawn()
            .unwrap();
        Self { process, socket }
    }

    /// Sends a command with open files; returns the answer.
    pub(crate) fn ask(&self, command: &str, fds: &[BorrowedFd<'_>]) -> String {
        fdpass::send(self.socket.as_fd(), command.as_bytes(), fds, MsgFlags::empty()).unwrap();
        let mut answer = [0; 256];
        let got = fdpass::receive(self.socket.as_fd(), &mut answer, 0, MsgFlags::empty()).unwrap();
        String::from_utf8_lossy(&answer[..got.len]).into_owned()
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Whether this process is to be an agent.
pub(crate) fn is_wanted() -> bool {
    std::env::var_os(WANTED).is_some()
}

/// What an agent has been handed or has made.
#[derive(Default)]
struct Things {
    container: Option<Container>,
    group: Option<Group>,
    device: Option<Device>,
    iommufd: Option<Iommufd>,
    memory: Vec<Mapped>,
}

/// The agent's body: commands from standard input, until it is closed.
pub(crate) fn main() {
    let simulated = std::env::var_os(crate::run::CONTROL);
    let kernel: Arc<dyn Kernel> = match &simulated {
        Some(path) => Arc::new(Wire::connect(Path::new(path)).unwrap()),
        None => Arc::new(Linux),
    };
    // Only now, so that it could reach the simulation.
    if let Some(bytes) =
        std::env::var("VFIO_CONFORMANCE_MEMLOCK").ok().and_then(|it| it.parse().ok())
    {
        setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes).unwrap();
        if Uid::effective().is_root() {
            setgroups(&[]).unwrap();
            setgid(Gid::from_raw(65534)).unwrap();
            setuid(Uid::from_raw(65534)).unwrap();
        }
    }
    let stdin = std::io::stdin();
    let mut things = Things::default();
    loop {
        let mut command = [0; 256];
        let got = fdpass::receive(stdin.as_fd(), &mut command, 4, MsgFlags::empty());
        let Some(got) = got.ok().filter(|got| got.len > 0) else { return };
        let command = String::from_utf8_lossy(&command[..got.len]).into_owned();
        let answer = match obey(&kernel, &mut things, &command, got.fds) {
            Ok(answer) => answer,
            Err(error) => format!("{:?}", error.errno),
        };
        let _ = fdpass::send(stdin.as_fd(), answer.as_bytes(), &[], MsgFlags::empty());
    }
}

fn obey(
    kernel: &Arc<dyn Kernel>,
    things: &mut Things,
    command: &str,
    fds: Vec<OwnedFd>,
) -> Result<String, Error> {
    let words: Vec<&str> = command.split(' ').collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    let here = || Arc::clone(kernel);
    let mut fds = fds.into_iter();
    let container = things.container.as_ref();
    let iommufd = things.iommufd.as_ref();
    let missing = || Error::new("agent", "", nix::errno::Errno::EBADF);
    match words[0] {
        "take-container" => {
            things.container = fds.next().map(|fd| Container::from_fd(here(), fd));
        }
        "take-group" => {
            things.group = fds.next().map(|fd| Group::from_fd(here(), Node::Group(0), fd));
        }
        "take-device" => {
            things.device = fds.next().map(|fd| Device::from_fd(here(), "taken", fd));
        }
        "map" => {
            let memory = memory(number(2));
            container.ok_or_else(missing)?.map(&DmaMap {
                flags: DmaMap::READ | DmaMap::WRITE,
                vaddr: memory.vaddr(),
                iova: number(1) * PAGE,
                size: number(2) * PAGE,
            })?;
            things.memory.push(memory);
        }
        "new-address" => {
            let memory = memory(number(2));
            container.ok_or_else(missing)?.map(&DmaMap {
                flags: DmaMap::VADDR,
                vaddr: memory.vaddr(),
                iova: number(1) * PAGE,
                size: number(2) * PAGE,
            })?;
            things.memory.push(memory);
        }
        "unmap" => {
            let (iova, size) = (number(1) * PAGE, number(2) * PAGE);
            let unmap = Unmap { flags: 0, iova, size };
            return Ok(container.ok_or_else(missing)?.unmap(&unmap)?.to_string());
        }
        "unmap-all" => {
            let unmap = Unmap { flags: UnmapFlags::ALL, iova: 0, size: 0 };
            return Ok(container.ok_or_else(missing)?.unmap(&unmap)?.to_string());
        }
        "open-group" => {
            let node = words[1].parse().map_or(Node::Container, Node::Group);
            things.group = Some(Group::open(here(), node)?);
        }
        "open-device" => {
            let group = things.group.as_ref().ok_or_else(missing)?;
            things.device = Some(group.device(words[1])?);
        }
        "ids" => {
            let device = things.device.as_ref().ok_or_else(missing)?;
            return Ok(format!("{:04x?}", device.pci_ids()?));
        }
        "unset" => things.group.as_ref().ok_or_else(missing)?.unset_container()?,
        "status" => {
            let status = things.group.as_ref().ok_or_else(missing)?.status()?;
            return Ok(format!("viable {} attached {}", status.viable, status.attached));
        }
        "take-iommufd" => {
            things.iommufd = fds.next().map(|fd| Iommufd::from_fd(here(), fd));
        }
        "open-iommufd" => things.iommufd = Some(Iommufd::open(here())?),
        "open-cdev" => things.device = Some(Device::open_cdev(here(), number(1) as u32, "cdev")?),
        "rlimit-mode" => iommufd.ok_or_else(missing)?.set_rlimit_mode(true)?,
        "bind" => {
            let device = things.device.as_ref().ok_or_else(missing)?;
            return Ok(device.bind_iommufd(iommufd.ok_or_else(missing)?)?.to_string());
        }
        "attach" => {
            let device = things.device.as_ref().ok_or_else(missing)?;
            return Ok(device.attach_iommufd_pt(number(1) as u32)?.to_string());
        }
        "ioas-map" => {
            let memory = memory(number(3));
            let map = IoasMap {
                flags: MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE,
                vaddr: memory.vaddr(),
                iova: number(2) * PAGE,
                size: number(3) * PAGE,
            };
            iommufd.ok_or_else(missing)?.ioas_map(number(1) as u32, &map)?;
            things.memory.push(memory);
        }
        "ioas-map-file" => {
            let (file, _memory) = Mapped::memfd((number(3) * PAGE) as usize).unwrap();
            let map = IoasMapFile {
                flags: MapFlags::FIXED_IOVA | MapFlags::READ | MapFlags::WRITE,
                start: 0,
                iova: number(2) * PAGE,
                size: number(3) * PAGE,
            };
            iommufd.ok_or_else(missing)?.ioas_map_file(number(1) as u32, file.as_fd(), &map)?;
        }
        "ioas-unmap-all" => {
            let unmapped = iommufd.ok_or_else(missing)?.ioas_unmap_all(number(1) as u32)?;
            return Ok(unmapped.to_string());
        }
        "close" => *things = Things::default(),
        _ => return Ok("unknown command".into()),
    }
    Ok("ok".into())
}
