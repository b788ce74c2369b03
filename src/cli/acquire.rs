//! `vfio-broker acquire`: gets devices, shows what came, and holds them until told to stop.

use super::style::{columns, print, print_json_line, printable};
use super::{Context, Failure};
use crate::client::{Acquire, Lease};
use crate::protocol::{Backend, FdKind, Handout};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{SFlag, fstat};
use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd};

/// Get devices, show what came, and hold them until Ctrl-C or the end of input
///
/// They are given back at SIGINT (Ctrl-C), SIGTERM or SIGHUP, and at the end of standard input where
/// that is a terminal or a pipe. In the background, and with standard input from /dev/null, only a
/// signal ends it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What lists call the holder
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// A device: 65:00.0 or 0000:65:00.0, VENDOR:DEVICE for any free one of that kind, vf:BDF for any
    /// free VF of that device; may come several times
    #[arg(long = "device", value_name = "DEVICE", required = true)]
    devices: Vec<String>,
    /// A function of the same groups that nobody is to use meanwhile; may come several times
    #[arg(long, value_name = "DEVICE")]
    withhold: Vec<String>,
    /// In which form the open files are given [default: the policy's first]
    #[arg(long, value_name = "FORM")]
    handout: Option<Handout>,
    /// Through which interface of the kernel [default: the policy's first that the host can do]
    #[arg(long, value_name = "BACKEND")]
    backend: Option<Backend>,
    /// Join this shared container of the policy
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
}

impl Args {
    fn request(self) -> Acquire {
        let mut request = Acquire::new(self.vm);
        for device in &self.devices {
            request = request.device(device);
        }
        for device in &self.withhold {
            request = request.withhold(device);
        }
        if let Some(handout) = self.handout {
            request = request.handout(handout);
        }
        if let Some(backend) = self.backend {
            request = request.backend(backend);
        }
        if let Some(container) = self.container {
            request = request.container(container);
        }
        request
    }
}

pub(super) fn run(context: &Context, args: Args) -> Result<(), Failure> {
    // Blocked before anything is held: a Ctrl-C from here on is a request to give it back.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    // With this one blocked, reading a terminal in the background fails instead of stopping us.
    let mut blocked = signals;
    blocked.add(Signal::SIGTTIN);
    blocked.thread_block().map_err(|errno| Failure::new(format!("sigprocmask: {errno}")))?;

    let mut broker = context.connect()?;
    let named = args.devices.clone();
    let lease = broker.acquire(args.request());
    let lease = lease.map_err(|error| Failure::from(error).about(&named))?;
    let input = ends();
    if context.json {
        print_json_line(&shape(&lease))?;
    } else {
        print(&text(context, &lease, input))?;
    }
    let id = lease.id().to_owned();
    if !wait(&lease, &signals, input).map_err(|errno| Failure::new(format!("poll: {errno}")))? {
        let what = format!("the broker has ended lease {id}");
        return Err(Failure::new(what).advise("its log says why, or vfio-brokerd was stopped"));
    }
    let shown = printable(&id);
    let by_iommufd = lease.backend() == Backend::Iommufd;
    let proved = broker.release(lease)?;
    if context.json {
        print_json_line(&serde_json::json!({ "lease": id, "released": true, "proved": proved }))?;
    } else {
        let state = if proved {
            "the kernel has shown that its devices are free"
        } else if by_iommufd {
            "its devices are for this tenant alone until they have been off their drivers (see \
             vfio-broker topology)"
        } else {
            "its devices are free once the kernel has shown that they are"
        };
        print(&format!("released {shown}: {state}\n"))?;
    }
    Ok(())
}

/// Whether standard input ends because somebody wants to end it: that of a terminal, a pipe or a
/// socket. `/dev/null` and files are at their end from the start, or soon.
fn ends() -> bool {
    let input = std::io::stdin();
    let kind = fstat(&input)
        .map_or(SFlag::empty(), |stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT);
    input.is_terminal() || kind == SFlag::S_IFIFO || kind == SFlag::S_IFSOCK
}

/// How often is looked whether the terminal is ours again.
const IN_BACKGROUND: u16 = 1000; // ms

/// Waits for a signal or the end of input, if that is waited for; false when the broker ends the
/// lease before that.
fn wait(lease: &Lease, signals: &SigSet, input: bool) -> Result<bool, Errno> {
    let signal = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC)?;
    let stdin = std::io::stdin();
    let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
    let mut background = false;
    loop {
        let mut fds = vec![
            PollFd::new(lease.lifeline(), PollFlags::POLLIN),
            PollFd::new(signal.as_fd(), PollFlags::POLLIN),
        ];
        if input && !background {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, if background { IN_BACKGROUND.into() } else { PollTimeout::NONE }) {
            Err(Errno::EINTR) => continue,
            other => drop(other?),
        }
        background = false;
        if fds.first().is_some_and(ready) {
            return Ok(false);
        }
        if fds.get(1).is_some_and(ready) {
            return Ok(true);
        }
        if fds.get(2).is_some_and(ready) {
            // What is typed means nothing; only its end does.
            match nix::unistd::read(&stdin, &mut [0; 512]) {
                Ok(0) => return Ok(true),
                Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(_) => background = true,
            }
        }
    }
}

/// What `--json` prints: the reply, with this process's numbers of the open files.
fn shape(lease: &Lease) -> serde_json::Value {
    let files = lease.files().iter().map(|file| (file.fd.as_raw_fd(), file.kind, &*file.name));
    let all = files.chain([(lease.lifeline().as_raw_fd(), FdKind::Lease, "")]);
    let fds: Vec<_> = all
        .map(|(fd, kind, name)| serde_json::json!({ "fd": fd, "kind": kind, "name": name }))
        .collect();
    serde_json::json!({
        "lease": lease.id(),
        "key": lease.key(),
        "vm": lease.vm(),
        "tenant": lease.tenant(),
        "backend": lease.backend(),
        "handout": lease.handout(),
        "iommu": lease.iommu(),
        "container": lease.container_name(),
        "devices": lease.devices(),
        "fds": fds,
    })
}

/// The same for a person, without the key.
fn text(context: &Context, lease: &Lease, input: bool) -> String {
    let shape = shape(lease);
    let field = |name: &str| shape[name].as_str().unwrap_or_default().to_owned();
    let row = |name: &str, value: String| vec![format!("  {name}"), value];
    let backend = match &*field("iommu") {
        "" | "none" => field("backend"),
        iommu => format!("{}, {iommu}", field("backend")),
    };
    let mut rows = vec![
        row("tenant", field("tenant")),
        row("devices", lease.devices().join(" ")),
        row("backend", backend),
        row("handout", field("handout")),
        row("container", field("container")),
    ];
    rows.retain(|row| row.iter().all(|cell| !cell.is_empty()));
    for (i, file) in shape["fds"].as_array().into_iter().flatten().enumerate() {
        let (kind, name) = (file["kind"].as_str(), file["name"].as_str());
        let what = format!("{} {}", kind.unwrap_or_default(), name.unwrap_or_default());
        let title = if i == 0 { "open files" } else { "" };
        rows.push(row(title, format!("fd {}: {}", file["fd"], what.trim_end())));
    }
    let head = printable(&format!("lease {} for {}", lease.id(), lease.vm()));
    for cell in rows.iter_mut().flatten() {
        *cell = printable(cell);
    }
    let until = if input { "Ctrl-C or the end of input" } else { "SIGINT, SIGTERM or SIGHUP" };
    format!("{}\n{}held until {until}\n", context.style.bold(&head), columns(&rows))
}
