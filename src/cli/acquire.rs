//! `vfio-broker acquire`: gets devices, shows what came, and holds them until told to stop.

use super::style::{columns, print, print_json};
use super::{Context, Failure};
use crate::client::{Acquire, Lease};
use crate::protocol::{FdKind, Handout};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd, AsRawFd};

/// Get devices, show what came, and hold them until Ctrl-C or the end of input
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What lists call the holder
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// A device: 0000:65:00.0, VENDOR:DEVICE for any free one of that kind, vf:BDF for any free VF
    /// of that device; may come several times
    #[arg(long = "device", value_name = "DEVICE", required = true)]
    devices: Vec<String>,
    /// A function of the same groups that nobody is to use meanwhile; may come several times
    #[arg(long, value_name = "DEVICE")]
    withhold: Vec<String>,
    /// In which form the open files are given
    #[arg(long, value_name = "FORM", value_parser = handout)]
    handout: Option<Handout>,
    /// Join this shared container of the policy
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
}

fn handout(text: &str) -> Result<Handout, String> {
    serde_json::from_value(text.into())
        .map_err(|_| "one of container, group, devices, iommufd".to_owned())
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
    signals.thread_block().map_err(|errno| Failure::new(format!("sigprocmask: {errno}")))?;

    let mut broker = context.connect()?;
    let lease = broker.acquire(args.request())?;
    if context.json {
        print_json(&shape(&lease))?;
    } else {
        print(&text(context, &lease))?;
    }
    let id = lease.id().to_owned();
    if !wait(&lease, &signals).map_err(|errno| Failure::new(format!("poll: {errno}")))? {
        let what = format!("the broker has ended lease {id}");
        return Err(Failure::new(what).advise("its log says why"));
    }
    let proved = broker.release(lease)?;
    if context.json {
        print_json(&serde_json::json!({ "lease": id, "released": true, "proved": proved }))?;
    } else {
        let state = if proved {
            "the kernel has shown that its devices are free"
        } else {
            "its devices are free once the kernel has shown that they are"
        };
        print(&format!("released {id}: {state}\n"))?;
    }
    Ok(())
}

/// Waits for a signal or the end of input; false when the broker ends the lease before that.
fn wait(lease: &Lease, signals: &SigSet) -> Result<bool, Errno> {
    let signal = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC)?;
    let input = std::io::stdin();
    let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
    loop {
        let mut fds = [
            PollFd::new(lease.lifeline(), PollFlags::POLLIN),
            PollFd::new(signal.as_fd(), PollFlags::POLLIN),
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => drop(other?),
        }
        let [ended, told, typed] = &fds;
        if ready(ended) {
            return Ok(false);
        }
        if ready(told) {
            return Ok(true);
        }
        // What is typed means nothing; only its end does.
        if ready(typed) && nix::unistd::read(input.as_fd(), &mut [0; 512]).unwrap_or(0) == 0 {
            return Ok(true);
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
fn text(context: &Context, lease: &Lease) -> String {
    let shape = shape(lease);
    let field = |name: &str| shape[name].as_str().unwrap_or_default().to_owned();
    let row = |name: &str, value: String| vec![format!("  {name}"), value];
    let mut rows = vec![
        row("tenant", field("tenant")),
        row("devices", lease.devices().join(" ")),
        row("backend", format!("{}, {}", field("backend"), field("iommu"))),
        row("handout", field("handout")),
        row("container", field("container")),
    ];
    for (i, file) in shape["fds"].as_array().into_iter().flatten().enumerate() {
        let (kind, name) = (file["kind"].as_str(), file["name"].as_str());
        let what = format!("{} {}", kind.unwrap_or_default(), name.unwrap_or_default());
        let title = if i == 0 { "open files" } else { "" };
        rows.push(row(title, format!("fd {}: {}", file["fd"], what.trim_end())));
    }
    let head = context.style.bold(&format!("lease {} for {}", lease.id(), lease.vm()));
    format!("{head}\n{}held until Ctrl-C or the end of input\n", columns(&rows))
}
