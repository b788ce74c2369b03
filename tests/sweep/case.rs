//! The operations: what is there before, what is done, and when that is over.

use crate::common::raw::{Raw, Reply, call};
use crate::qemu::Qemu;
use crate::world::{DEVICES, World, soon};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use vfio_broker::client::Client;
use vfio_broker::qmp::Monitor;
use vfio_broker::qmp::hotplug::{Attach, attach};

/// What memlock limits are raised to: no more than anybody may.
pub const RAISED: u64 = 128 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Acquire,
    Extend,
    Release,
    Map,
    Unmap,
    SetMemlock,
    Attach,
    /// The holder goes.
    Reclaim,
    /// The keeper is killed, and its holder lives.
    Salvage,
    /// The broker is killed, and the next one adopts.
    Restart,
    Reload,
    /// An administrator ends the lease at once, and its holder keeps what it has.
    Revoke,
    /// The same, after a grace.
    RevokeInTime,
    /// The holder has gone, and an administrator says that its device's node is closed.
    Confirm,
    /// The holder goes and keeps its group, whose drivers are bound anew for that.
    Bind,
}

/// In which form a lease is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    Container,
    Group,
    Devices,
    Iommufd,
    Enforced,
    Mutual,
}

/// An operation on one form; in a shared container perhaps with somebody else there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    pub operation: Operation,
    pub form: Form,
    pub beside: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let beside = if self.beside { ", a second member there" } else { "" };
        write!(f, "{:?} ({:?}{beside})", self.operation, self.form)
    }
}

impl Form {
    pub fn handout(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Group => "group",
            Self::Iommufd => "iommufd",
            Self::Devices | Self::Enforced | Self::Mutual => "devices",
        }
    }

    fn container(self) -> Option<&'static str> {
        match self {
            Self::Enforced => Some("enforced"),
            Self::Mutual => Some("mutual"),
            _ => None,
        }
    }

    fn wanted(self, device: &str) -> Value {
        let mut wanted = json!({ "vm": "v", "devices": [device], "handout": self.handout() });
        if let Some(container) = self.container() {
            wanted["container"] = container.into();
        }
        wanted
    }
}

/// Somebody who was given a lease.
pub struct Holder {
    pub reply: Value,
    pub fds: Vec<OwnedFd>,
    /// What came with the lease and later.
    pub given: Vec<Value>,
    pub devices: Vec<&'static str>,
}

impl Holder {
    fn new(reply: Value, fds: Vec<OwnedFd>, device: &'static str) -> Self {
        let given = reply["fds"].as_array().unwrap().clone();
        Self { reply, fds, given, devices: vec![device] }
    }

    pub fn acquire(world: &World, form: Form, device: &'static str) -> Result<Self, String> {
        match world.call("Acquire", form.wanted(device)) {
            Some(Reply::Ok(reply, fds)) => Ok(Self::new(reply, fds, device)),
            other => Err(format!("{device} can't be acquired: {other:?}")),
        }
    }

    pub fn key(&self) -> Value {
        json!({ "lease": self.reply["lease"], "key": self.reply["key"] })
    }

    pub fn with(&self, more: &Value) -> Value {
        let mut all = self.key();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    }

    /// Whether none of its pipes has been closed at the other end.
    pub fn stands(&self) -> bool {
        let pipes = self.given.iter().zip(&self.fds).filter(|(given, _)| given["kind"] == "lease");
        let mut pipes = pipes.map(|(_, fd)| fd);
        pipes.any(|pipe| {
            let mut ask = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            poll(&mut ask, PollTimeout::ZERO).unwrap();
            ask[0].revents() == Some(PollFlags::empty())
        })
    }

    pub fn map(&self, client: &mut Raw) -> Option<Reply> {
        let memory = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&memory, 8192).unwrap();
        let range = json!({ "iova": 0x1000, "size": 4096, "read": true, "write": true, "memory": 0, "offset": 0 });
        client.send_with(&call("MapDma", &self.with(&range)), &[memory.as_fd()]).ok()?;
        client.try_reply()
    }

    pub fn unmap(&self, client: &mut Raw) -> Option<Reply> {
        client.send(&call("UnmapDma", &self.with(&json!({ "iova": 0x1000, "size": 4096 }))));
        client.try_reply()
    }
}

/// Who has what before the operation and after it.
#[derive(Default)]
pub struct Cast {
    /// Who does it or undergoes it.
    pub holder: Option<Holder>,
    /// The second member.
    pub other: Option<Holder>,
    pub qemu: Option<Qemu>,
    /// A connection that was let in before: files may be sent there.
    client: Option<Raw>,
    keepers: Vec<PathBuf>,
    states: Vec<String>,
    log: usize,
    processes: Vec<Pid>,
    /// The lease has ended by its holder's will or an administrator's, or may have.
    pub ends: bool,
    /// It was said that it has.
    pub ended: bool,
}

impl Case {
    /// All of them.
    pub fn all() -> Vec<Self> {
        use Form::{Container, Devices, Enforced, Group, Iommufd, Mutual};
        use Operation::*;
        let forms = [Container, Group, Devices, Iommufd, Enforced, Mutual];
        let mut all = Vec::new();
        for operation in [Acquire, Extend, Release, Reclaim, Salvage, Restart, Revoke] {
            for form in forms {
                all.push(Self { operation, form, beside: false });
                if form.container().is_some() {
                    all.push(Self { operation, form, beside: true });
                }
            }
        }
        for operation in [Map, Unmap] {
            for (form, beside) in [(Devices, false), (Enforced, false), (Enforced, true)] {
                all.push(Self { operation, form, beside });
            }
        }
        let once = [
            (SetMemlock, Container),
            (SetMemlock, Iommufd),
            (Attach, Iommufd),
            (Reload, Container),
            (Reload, Mutual),
            (RevokeInTime, Container),
            (RevokeInTime, Devices),
            (Confirm, Iommufd),
            (Bind, Container),
        ];
        all.extend(once.map(|(operation, form)| Self { operation, form, beside: false }));
        all
    }

    /// One form of each operation, of each another one.
    pub fn sample() -> Vec<Self> {
        let mut last = None;
        let mut of_operation = 0;
        let all = Self::all();
        all.iter()
            .filter(|case| {
                let is_next = last.replace(case.operation) != Some(case.operation);
                of_operation = if is_next { 0 } else { of_operation + 1 };
                let forms = all.iter().filter(|it| it.operation == case.operation).count();
                of_operation == case.operation as usize % forms
            })
            .copied()
            .collect()
    }

    /// Whether the policy lets drivers be bound anew: where it does, nobody has to confirm anything.
    pub fn rebinds(self) -> bool {
        self.operation != Operation::Confirm
    }

    /// Whether somebody has the lease before.
    fn is_of_a_lease(self) -> bool {
        !matches!(self.operation, Operation::Acquire | Operation::Attach)
    }

    /// Has be there what is there before.
    pub fn prepare(self, world: &World) -> Cast {
        let mut cast = Cast::default();
        if self.beside {
            cast.other = Some(Holder::acquire(world, self.form, DEVICES[2]).unwrap());
        }
        if self.is_of_a_lease() {
            cast.holder = Some(Holder::acquire(world, self.form, DEVICES[0]).unwrap());
        }
        if matches!(self.operation, Operation::Map | Operation::Unmap) {
            let mut client = world.connect().unwrap();
            client.call("org.varlink.service.GetInfo", json!({})).ok();
            if self.operation == Operation::Unmap {
                cast.holder.as_ref().unwrap().map(&mut client).unwrap().ok();
            }
            cast.client = Some(client);
        }
        if self.operation == Operation::Confirm {
            cast.holder.as_mut().unwrap().fds.clear();
            soon("a node is left", || {
                let left = world.states().iter().any(|state| state.contains("\"unbound\""));
                (!left).then(|| format!("{:?}", world.states()))
            })
            .unwrap();
        }
        if self.operation == Operation::SetMemlock {
            let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
            setrlimit(Resource::RLIMIT_MEMLOCK, RAISED / 2, hard).unwrap();
        }
        if self.operation == Operation::Attach {
            cast.qemu = Some(Qemu::start());
        }
        cast.keepers = world.keepers();
        cast.states = world.states();
        cast.log = world.log().len();
        cast.processes = world.processes().into_iter().map(|(pid, _)| pid).collect();
        cast
    }

    /// Does it, as a client that the service may leave at any time.
    pub fn perform(self, world: &World, cast: &mut Cast) {
        match self.operation {
            Operation::Acquire => cast.holder = Holder::acquire(world, self.form, DEVICES[0]).ok(),
            Operation::Extend => {
                let holder = cast.holder.as_mut().unwrap();
                let wanted = holder.with(&self.form.wanted(DEVICES[1]));
                if let Some(Reply::Ok(reply, fds)) = world.call("Acquire", wanted) {
                    holder.given.extend(reply["fds"].as_array().unwrap().clone());
                    holder.fds.extend(fds);
                    holder.devices.push(DEVICES[1]);
                }
            }
            Operation::Release => {
                cast.ends = true;
                let key = cast.holder.as_ref().unwrap().key();
                cast.ended = matches!(world.call("Release", key), Some(Reply::Ok(..)));
                if cast.ended {
                    cast.holder.as_mut().unwrap().fds.clear();
                }
            }
            Operation::Map => {
                let (holder, client) =
                    (cast.holder.as_ref().unwrap(), cast.client.as_mut().unwrap());
                drop(holder.map(client));
            }
            Operation::Unmap => {
                let (holder, client) =
                    (cast.holder.as_ref().unwrap(), cast.client.as_mut().unwrap());
                drop(holder.unmap(client));
            }
            Operation::SetMemlock => {
                let holder = cast.holder.as_ref().unwrap();
                drop(world.call("SetMemlock", holder.with(&json!({ "bytes": RAISED }))));
            }
            Operation::Attach => {
                let path = cast.qemu.as_ref().unwrap().path().to_owned();
                let Ok(mut client) = Client::connect_to(world.socket()) else { return };
                let Ok(mut monitor) = Monitor::connect_within(&path, crate::SOON) else {
                    return;
                };
                let _ = attach(
                    &mut monitor,
                    &mut client,
                    &Attach::new("web1", DEVICES[0]).bus("port1"),
                );
            }
            Operation::Reclaim => {
                (cast.ends, cast.ended) = (true, true);
                cast.holder.as_mut().unwrap().fds.clear();
            }
            Operation::Salvage => {
                cast.ends = true;
                kill_named(world, "vfiob-keeper");
            }
            Operation::Revoke | Operation::RevokeInTime => {
                cast.ends = true;
                let grace = u64::from(self.operation == Operation::RevokeInTime);
                let lease = cast.holder.as_ref().unwrap().reply["lease"].clone();
                let reply = world.call("Revoke", json!({ "lease": lease, "grace": grace }));
                cast.ended = matches!(reply, Some(Reply::Ok(..)));
            }
            Operation::Confirm => {
                cast.ends = true;
                cast.ended = matches!(confirm(world), Some(Reply::Ok(..)));
            }
            Operation::Bind => {
                cast.ends = true;
                let holder = cast.holder.as_mut().unwrap();
                let kinds: Vec<_> = holder.given.iter().map(|it| it["kind"] == "group").collect();
                let mut kept = kinds.iter();
                holder.fds.retain(|_| *kept.next().unwrap());
                let mut kept = kinds.iter();
                holder.given.retain(|_| *kept.next().unwrap());
            }
            Operation::Restart => kill_named(world, "vfiob-broker"),
            Operation::Reload => {
                let _ = kill(world.launcher, Signal::SIGHUP);
            }
        }
    }

    /// Whether what is seen from outside has happened; processes may be at the rest still.
    pub fn is_over(self, world: &World, cast: &Over) -> bool {
        match self.operation {
            Operation::Bind => world.keepers().is_empty(),
            Operation::Release | Operation::Reclaim => match self.beside {
                true => cast.states != world.states(),
                false => world.keepers().is_empty(),
            },
            Operation::Salvage => {
                let states = world.states();
                states.is_empty()
                    || states != cast.states && !states.iter().any(|it| it.contains("\"held\""))
            }
            Operation::Restart => {
                let broker = world.named("vfiob-broker");
                broker.is_some_and(|pid| !cast.processes.contains(&pid))
            }
            Operation::Reload => world.log()[cast.log..].contains("another policy is in force"),
            _ => true,
        }
    }
}

/// What [`Case::is_over`] compares with.
pub struct Over {
    states: Vec<String>,
    log: usize,
    processes: Vec<Pid>,
}

impl Cast {
    pub fn over(&self) -> Over {
        Over { states: self.states.clone(), log: self.log, processes: self.processes.clone() }
    }
}

/// An administrator's word that the first device's node is closed.
pub fn confirm(world: &World) -> Option<Reply> {
    world.call("Confirm", json!({ "device": DEVICES[0] }))
}

fn kill_named(world: &World, name: &str) {
    if let Some(pid) = world.named(name) {
        let _ = kill(pid, Signal::SIGKILL);
    }
}
