//! What the lease gives for which node.

use crate::client::{self, Client, Lease};
use crate::kernel::{Container, Group, IommuType, Node};
use crate::protocol::{self, FdKind, Handout};
use nix::errno::Errno;
use std::collections::{BTreeMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The lease, and its files as a program finds them that opens nodes by itself.
///
/// Where the broker keeps copies (handout `container`) every open gives the same open file. Else
/// nothing is kept here: what came with the lease is given away with the first open, and each
/// further one gives what the broker opens anew, with what the kernel says to that.
pub(super) struct Grants {
    broker: PathBuf,
    lease: Lease,
    groups: Vec<String>,
    cdevs: Cdevs,
    /// In handout `container`: what every open gives.
    pub(super) attached: Option<Attached>,
    /// Else: what has not been given away yet.
    unused: Mutex<Vec<Fresh>>,
}

/// Which device each `/dev/vfio/devices/vfioN` is, by its N.
pub type Cdevs = BTreeMap<u32, String>;

/// The container and the groups that the broker attached.
pub(super) struct Attached {
    pub(super) container: Container,
    pub(super) groups: Vec<Group>,
    /// As the broker has set it.
    pub(super) iommu: IommuType,
    /// Until the program sets its own.
    pub(super) is_as_set: AtomicBool,
    /// The groups that the program has put into a container since it opened them. The others are
    /// shown to it as in none, as groups are that were just opened: some programs map nothing in a
    /// container that somebody else seems to have made.
    set: Mutex<HashSet<Node>>,
}

impl Attached {
    pub(super) fn set(&self) -> MutexGuard<'_, HashSet<Node>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What becomes of an open.
pub(super) enum Grant<'g> {
    /// This open file, which is kept.
    Kept(BorrowedFd<'g>),
    /// This one, which is the program's alone.
    Given(Fresh),
    /// The lease has no such thing.
    NotGranted,
    /// It has, and it can't be had now.
    Failed(client::Error),
}

/// An open file that is given away.
pub(super) struct Fresh {
    kind: FdKind,
    name: String,
    pub(super) file: OwnedFd,
}

impl Grants {
    /// The files of a lease; `broker` is where more are asked for.
    pub(super) fn new(broker: PathBuf, mut lease: Lease, cdevs: Cdevs) -> client::Result<Self> {
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
    pub(super) fn nodes(&self) -> String {
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
    pub(super) fn missing(&self, node: &Node) -> &'static str {
        let by_iommufd = matches!(node, Node::Iommu | Node::Cdev(_));
        match (self.lease.handout() == Handout::Iommufd, by_iommufd) {
            (true, false) => "groups and their container come with --handout container, or group",
            (false, true) => "iommufd and the devices' nodes come with --handout iommufd",
            _ => "it is of no device of the lease: see --device",
        }
    }

    /// The lease's name.
    pub(super) fn lease(&self) -> &str {
        self.lease.id()
    }

    /// What an open of `node` is answered with.
    pub(super) fn open(&self, node: &Node) -> Grant<'_> {
        let Some((kind, name)) = self.granted(node) else { return Grant::NotGranted };
        if let Some(attached) = &self.attached {
            attached.set().remove(node);
            let group = attached.groups.iter().find(|group| group.node() == node);
            return Grant::Kept(group.map_or(attached.container.as_fd(), Group::as_fd));
        }
        let fits = |fresh: &Fresh| {
            fresh.kind == kind && name.as_ref().is_none_or(|name| fresh.name == *name)
        };
        let mut unused = self.unused();
        if let Some(at) = unused.iter().position(fits) {
            return Grant::Given(unused.remove(at));
        }
        drop(unused);
        match self.ask(kind, name) {
            Ok(fresh) => Grant::Given(fresh),
            Err(error) => Grant::Failed(error),
        }
    }

    /// Nobody took it: the next open gets it.
    pub(super) fn put_back(&self, fresh: Fresh) {
        self.unused().push(fresh);
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
    fn ask(&self, kind: FdKind, name: Option<String>) -> client::Result<Fresh> {
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
        let file = fds.pop().ok_or_else(missing)?;
        Ok(Fresh { kind, name: name.unwrap_or_default(), file })
    }
}

/// What open(2) is to say to an open that the broker could not make.
pub(super) fn errno_of(error: &client::Error) -> Errno {
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
