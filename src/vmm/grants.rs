//! What a lease answers a program that opens nodes by itself.

use super::interpose::{Answers, Asker, IOCTLS, Ioctl, Opened};
use super::{Error, Result};
use crate::client::{self, Client, Lease};
use crate::kernel::{Container, Group, IommuType, Node};
use crate::protocol::{self, FdKind, Handout};
use nix::errno::Errno;
use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lease, and its files as a program finds them that opens nodes by itself.
///
/// Where the broker keeps copies (handout `container`) every open gives the same open file. Else
/// nothing is kept here: what came with the lease is given away with the first open, and each
/// further one gives what the broker opens anew, with what the kernel says to that.
#[derive(Debug)]
pub struct Grants {
    broker: PathBuf,
    lease: Lease,
    groups: Vec<String>,
    cdevs: Cdevs,
    /// In handout `container`: what every open gives.
    attached: Option<Attached>,
    /// Else: what has not been given away yet.
    unused: Mutex<Vec<Fresh>>,
}

/// Which device each `/dev/vfio/devices/vfioN` is, by its N.
pub type Cdevs = BTreeMap<u32, String>;

/// The container and the groups that the broker attached.
#[derive(Debug)]
struct Attached {
    container: Container,
    groups: Vec<Group>,
    /// As the broker has set it.
    iommu: IommuType,
    /// Until the program sets its own.
    is_as_set: AtomicBool,
    /// The groups that the program has put into a container since it opened them. The others are
    /// shown to it as in none, as groups are that were just opened: some programs map nothing in a
    /// container that somebody else seems to have made.
    set: Mutex<HashSet<Node>>,
}

impl Attached {
    fn set(&self) -> MutexGuard<'_, HashSet<Node>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether these numbers of the asker are one of our groups and our container, and the group is
    /// attached at this moment: a program may have taken it out.
    fn has_both(
        &self,
        asker: Asker,
        group: RawFd,
        container: RawFd,
    ) -> std::result::Result<bool, Errno> {
        if !asker.has(container, self.container.as_fd())? {
            return Ok(false);
        }
        let Some(ours) = self.group(asker, group)? else { return Ok(false) };
        let (node, status) = (ours.node().clone(), ours.status());
        self.set().insert(node);
        Ok(status.is_ok_and(|status| status.attached))
    }

    /// Whether the number is one of our groups that the program has not put into a container, and it
    /// is in one by the broker's doing. It is viable then.
    fn looks_new(&self, asker: Asker, group: RawFd) -> std::result::Result<bool, Errno> {
        let Some(ours) = self.group(asker, group)? else { return Ok(false) };
        Ok(!self.set().contains(ours.node()) && ours.status().is_ok_and(|status| status.attached))
    }

    /// The one of our groups that a number of the asker is.
    fn group(&self, asker: Asker, number: RawFd) -> std::result::Result<Option<&Group>, Errno> {
        for ours in &self.groups {
            if asker.has(number, ours.as_fd())? {
                return Ok(Some(ours));
            }
        }
        Ok(None)
    }

    /// Whether the number is our container, and it has this IOMMU type at this moment: it loses it
    /// with its last group. Then it is the program that sets one, and the broker's means no more.
    fn has_iommu(
        &self,
        asker: Asker,
        container: RawFd,
        kind: u64,
    ) -> std::result::Result<bool, Errno> {
        if !self.is_as_set.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if !asker.has(container, self.container.as_fd())? {
            return Ok(false);
        }
        if self.container.info().is_err() {
            self.is_as_set.store(false, Ordering::Relaxed);
            return Ok(false);
        }
        Ok(kind == u64::from(self.iommu.number()))
    }
}

/// An open file that is given away.
#[derive(Debug)]
struct Fresh {
    kind: FdKind,
    name: String,
    file: OwnedFd,
}

impl Grants {
    /// The files of a lease; `broker` is where more are asked for.
    ///
    /// # Errors
    /// [`Error::NothingToOpen`]; a file of the lease is not what it should be.
    pub fn new(broker: PathBuf, mut lease: Lease, cdevs: Cdevs) -> Result<Self> {
        if lease.handout() == Handout::Devices {
            return Err(Error::NothingToOpen);
        }
        let groups = lease.files().iter().filter(|file| file.kind == FdKind::Group);
        let groups = groups.map(|file| file.name.clone()).collect();
        let (mut unused, mut attached) = (Vec::new(), None);
        if lease.handout() == Handout::Container {
            let kind = if lease.iommu() == "type1" { IommuType::Type1 } else { IommuType::Type1v2 };
            let (container, groups) = (lease.container()?, lease.groups()?);
            let (is_as_set, set) = (AtomicBool::new(true), Mutex::default());
            attached = Some(Attached { container, groups, iommu: kind, is_as_set, set });
        }
        for kind in [FdKind::Container, FdKind::Group, FdKind::Iommufd, FdKind::Cdev] {
            while let Some(file) = lease.files_mut().take(kind, None) {
                unused.push(Fresh { kind, name: file.name, file: file.fd });
            }
        }
        if attached.is_some() {
            unused.clear();
        }
        Ok(Self { broker, lease, groups, cdevs, attached, unused: Mutex::new(unused) })
    }

    /// The nodes that can be opened, for a log.
    fn nodes(&self) -> String {
        let mut nodes = match self.lease.handout() {
            Handout::Container | Handout::Group => vec![Node::Container.to_string()],
            Handout::Iommufd => vec![Node::Iommu.to_string()],
            Handout::Devices => Vec::new(),
        };
        nodes.extend(self.groups.iter().map(|group| format!("/dev/vfio/{group}")));
        if self.lease.handout() == Handout::Iommufd {
            nodes.extend(self.cdevs.keys().map(|number| Node::Cdev(*number).to_string()));
        }
        nodes.join(", ")
    }

    /// What has a node that can't be opened.
    fn missing(&self, node: &Node) -> &'static str {
        let by_iommufd = matches!(node, Node::Iommu | Node::Cdev(_));
        match (self.lease.handout() == Handout::Iommufd, by_iommufd) {
            (true, false) => "groups and their container come with --handout container, or group",
            (false, true) => "iommufd and the devices' nodes come with --handout iommufd",
            _ => "it is of no device of the lease: see --device",
        }
    }

    fn unused(&self) -> MutexGuard<'_, Vec<Fresh>> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which of the lease's files a node is.
    fn granted(&self, node: &Node) -> Option<(FdKind, Option<String>)> {
        match (node, self.lease.handout()) {
            (Node::Container, Handout::Container | Handout::Group) => {
                Some((FdKind::Container, None))
            }
            (Node::Group(number), Handout::Container | Handout::Group) => {
                let name = number.to_string();
                self.groups.contains(&name).then_some((FdKind::Group, Some(name)))
            }
            (Node::Iommu, Handout::Iommufd) => Some((FdKind::Iommufd, None)),
            (Node::Cdev(number), Handout::Iommufd) => {
                Some((FdKind::Cdev, Some(self.cdevs.get(number)?.clone())))
            }
            _ => None,
        }
    }

    /// Has the broker open one anew. The connection is for this alone: connections are limited, and
    /// programs open few nodes.
    fn ask(&self, kind: FdKind, name: Option<String>) -> client::Result<OwnedFd> {
        let call = protocol::GetFds {
            lease: self.lease.id().to_owned(),
            key: self.lease.key().to_owned(),
            lifeline: Some(false),
            kind: Some(kind),
            name: name.clone(),
        };
        let (_, mut fds) = Client::connect_to(&self.broker)?.call(&call, &[])?;
        let missing = || client::Error::Missing {
            lease: self.lease.id().to_owned(),
            kind,
            name: name.clone().unwrap_or_default(),
            hint: "the broker gave none".into(),
        };
        fds.pop().ok_or_else(missing)
    }
}

impl Answers for Grants {
    fn ioctls(&self) -> &'static [u32] {
        if self.attached.is_some() { &IOCTLS } else { &[] }
    }

    fn open(&self, node: &Node) -> Opened<'_> {
        let Some((kind, name)) = self.granted(node) else {
            let (lease, nodes, missing) = (self.lease.id(), self.nodes(), self.missing(node));
            let why = format!("may not open {node}: lease {lease} has {nodes}; {missing}");
            return Opened::Refused { errno: Errno::EACCES, why };
        };
        if let Some(attached) = &self.attached {
            attached.set().remove(node);
            let group = attached.groups.iter().find(|group| group.node() == node);
            return Opened::Kept(group.map_or(attached.container.as_fd(), Group::as_fd));
        }
        let fits = |fresh: &Fresh| {
            fresh.kind == kind && name.as_ref().is_none_or(|name| fresh.name == *name)
        };
        let mut unused = self.unused();
        if let Some(at) = unused.iter().position(fits) {
            return Opened::Given(unused.remove(at).file);
        }
        drop(unused);
        match self.ask(kind, name) {
            Ok(file) => Opened::Given(file),
            Err(error) => {
                let why = format!("can't open {node} now: {error}");
                Opened::Refused { errno: errno_of(&error), why }
            }
        }
    }

    /// Nobody took it: the next open gets it.
    fn put_back(&self, node: &Node, file: OwnedFd) {
        if let Some((kind, name)) = self.granted(node) {
            self.unused().push(Fresh { kind, name: name.unwrap_or_default(), file });
        }
    }

    fn ioctl(&self, asker: Asker, ioctl: &Ioctl) -> std::result::Result<bool, Errno> {
        let Some(attached) = &self.attached else { return Ok(false) };
        match *ioctl {
            Ioctl::SetContainer { group, container } => attached.has_both(asker, group, container),
            Ioctl::SetIommu { container, kind } => attached.has_iommu(asker, container, kind),
            Ioctl::GetStatus { group, .. } => attached.looks_new(asker, group),
        }
    }
}

/// What open(2) is to say to an open that the broker could not make.
fn errno_of(error: &client::Error) -> Errno {
    match error {
        client::Error::Broker { error, .. } => match error {
            protocol::Error::Kernel { errno, .. } => Errno::from_raw(*errno),
            protocol::Error::Busy { .. } => Errno::EBUSY,
            protocol::Error::NoSuchLease { .. } | protocol::Error::Denied { .. } => Errno::EACCES,
            _ => Errno::EIO,
        },
        _ => Errno::EIO,
    }
}
