//! GetFds, and the list that describes open files.

use super::books::{Books, Entry, Files, Lifeline};
use super::form::gives_container;
use super::hint::system;
use super::space::Space;
use super::{Broker, Caller, LifelineId, SentFd, lifeline, no_such_lease};
use crate::host;
use crate::kernel::{Container, Group, Node};
use crate::ledger::{Lease, Refusal};
use crate::protocol::{Bdf, Error, Fd, FdKind, Fds, GetFds, Handout};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An open file and what it is.
pub(super) struct Named<F = OwnedFd> {
    pub(super) kind: FdKind,
    pub(super) name: String,
    pub(super) fd: F,
}

impl<F> Named<F> {
    pub(super) fn group(id: u32, fd: F) -> Self {
        Self { kind: FdKind::Group, name: id.to_string(), fd }
    }
}

impl Named<SentFd> {
    /// The container of a lease.
    pub(super) fn container(lease: &Lease, entry: &Entry) -> Option<Self> {
        let container = entry.space.as_ref().and_then(|space| space.container())?;
        let name = super::container_name(lease);
        Some(Self { kind: FdKind::Container, name, fd: SentFd::Container(container) })
    }

    pub(super) fn copied(self) -> Result<Named, Error> {
        let Self { kind, name, fd } = self;
        Ok(Named { kind, name, fd: lifeline::copy(fd)? })
    }
}

impl Named {
    pub(super) fn device(bdf: Bdf, fd: OwnedFd) -> Self {
        Self { kind: FdKind::Device, name: bdf.to_string(), fd }
    }
}

/// The description of the files, and the files in its order.
pub(super) fn list<F>(named: Vec<Named<F>>) -> (Vec<Fd>, Vec<F>) {
    let each = named.into_iter().enumerate();
    each.map(|(index, Named { kind, name, fd })| (Fd { index, kind, name }, fd)).unzip()
}

impl Broker {
    /// The open files of a lease once more, and a further lifeline unless the request wants none: the
    /// same files where the broker keeps them, else opened anew.
    ///
    /// # Errors
    /// What the kernel says where it must be asked: EBUSY while somebody has the group open.
    pub fn get_fds(&self, caller: &Caller, request: &GetFds) -> Result<(Fds, Vec<OwnedFd>), Error> {
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        let mut files = entry.files();
        let lease = self.live(&entry)?;
        check_kept_any(&lease, request)?;
        let kept = kept(&lease, &entry, &files, request).into_iter();
        let mut fds = kept.map(Named::copied).collect::<Result<Vec<_>, _>>()?;
        match lease.handout {
            Handout::Group => {
                let books = self.books();
                let groups: Vec<_> = books.ledger.groups_of(lease.id).map(|(id, _)| id).collect();
                drop(books);
                for id in
                    groups.into_iter().filter(|id| request.wants(FdKind::Group, &id.to_string()))
                {
                    let group = Group::open(Arc::clone(&entry.contested), Node::Group(id))?;
                    self.check_members(&lease, id)?;
                    fds.push(Named::group(id, group.into()));
                }
                // Whoever opens nodes by itself wants one; to all others it means nothing.
                if request.kind == Some(FdKind::Container) {
                    let (kind, name) = (FdKind::Container, String::new());
                    let fd = Container::open(Arc::clone(&self.kernel))?.into();
                    fds.push(Named { kind, name, fd });
                }
            }
            Handout::Devices => {
                let used = lease.devices.iter().filter(|handed| !handed.withheld);
                for handed in used.filter(|d| request.wants(FdKind::Device, &d.bdf.to_string())) {
                    if let Some(group) = files.group(handed.group) {
                        let device = group.device(&files.name(handed.bdf))?;
                        fds.push(Named::device(handed.bdf, device.into()));
                    }
                }
            }
            Handout::Iommufd => {
                if request.kind == Some(FdKind::Iommufd) {
                    fds.push(Named::iommufd(self.open_iommufd()?));
                }
                let used = lease.devices.iter().filter(|handed| !handed.withheld);
                for handed in used.filter(|d| request.wants(FdKind::Cdev, &d.bdf.to_string())) {
                    let cdev = self.open_cdev(handed.bdf)?;
                    self.check_members(&lease, handed.group)?;
                    // The lease has the device, so what fails from here on need not be taken back.
                    self.remember(lease.id, &[(handed.bdf, handed.group, cdev.registration)])?;
                    files.registrations.insert(handed.bdf, cdev.registration);
                    fds.push(Named::cdev(handed.bdf, cdev));
                }
            }
            Handout::Container => {}
        }
        self.with_lifeline(&entry, request, fds)
    }

    /// As [`get_fds`](Self::get_fds) where that takes no kernel call that can block, else `None`:
    /// then call that on a worker. Never blocks, and makes no copies: sending makes one.
    pub fn try_get_fds(
        &self,
        caller: &Caller,
        request: &GetFds,
    ) -> Option<Result<(Fds, Vec<SentFd>), Error>> {
        let entry = match self.authorize(caller, &request.lease, &request.key) {
            Ok(entry) => entry,
            Err(error) => return Some(Err(error)),
        };
        let files = entry.files_now()?;
        let lease = match self.live(&entry) {
            Ok(lease) => lease,
            Err(error) => return Some(Err(error)),
        };
        if let Err(error) = check_kept_any(&lease, request) {
            return Some(Err(error));
        }
        if lease.handout != Handout::Container {
            return None;
        }
        Some(self.with_lifeline(&entry, request, kept(&lease, &entry, &files, request)))
    }

    /// Lets go of what holders have open too, and gives the last copies of it that are here. Closing
    /// them can take as long as the holders like. What somebody works on is not among them.
    /// Where that is so it is waited for, at most `patience`.
    pub fn leave_contested(&self, patience: Duration) -> Vec<OwnedFd> {
        let until = Instant::now() + patience;
        let entries: Vec<_> = self.books().entries.values().cloned().collect();
        // Calls that have begun come to their end, answered or not.
        let is_busy = |entry: &Arc<Entry>| {
            let free = |space: &Arc<Space>| space.is_free();
            entry.files_now().is_none() || !entry.space.as_ref().is_none_or(free)
        };
        while entries.iter().any(is_busy) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let spaces = entries.iter().filter_map(|entry| Some((entry, entry.space.as_ref()?)));
        let shared = spaces.filter_map(|(entry, space)| Some((entry, space, space.shared_now()?)));
        let shared: Vec<_> = shared.collect();
        let mut copies = Vec::new();
        for (entry, space, container) in shared {
            let Some(mut files) = entry.files_now() else { continue };
            files.groups.retain(|_, group| match lifeline::copy(&**group) {
                Ok(copy) => {
                    copies.push(copy);
                    false
                }
                Err(_) => true,
            });
            if let Ok(copy) = lifeline::copy(&*container) {
                copies.push(copy);
                space.leave();
            }
        }
        copies
    }

    /// Whether what was opened anew is what the lease has: numbers and addresses pass to others as a
    /// host's devices come and go, but not while one has the new file open.
    fn check_members(&self, lease: &Lease, group: u32) -> Result<(), Error> {
        for handed in lease.devices.iter().filter(|handed| handed.group == group) {
            if host::find(&*self.kernel, handed.bdf)? != host::Place::Group(group) {
                let why = format!("it is no longer in group {group}, which the lease has");
                return Err(Error::Conflict { what: handed.bdf.to_string(), why });
            }
        }
        Ok(())
    }

    fn live(&self, entry: &Entry) -> Result<Lease, Error> {
        self.books().ledger.live(entry.id).cloned().ok_or_else(|| no_such_lease(entry.id))
    }

    fn with_lifeline<F: From<OwnedFd>>(
        &self,
        entry: &Entry,
        request: &GetFds,
        mut fds: Vec<Named<F>>,
    ) -> Result<(Fds, Vec<F>), Error> {
        if request.lifeline.unwrap_or(true) {
            let (theirs, ()) = self.open_lifeline(entry, |books| {
                books.ledger.live(entry.id).map(drop).ok_or(Refusal::NoSuchLease(entry.id))
            })?;
            fds.push(Named { kind: FdKind::Lease, name: String::new(), fd: theirs.into() });
        }
        let (fds, files) = list(fds);
        Ok((Fds { fds }, files))
    }

    /// Makes a lifeline; it counts once `enter` has said yes, under the same lock. Returns the
    /// holder's end.
    pub(super) fn open_lifeline<T>(
        &self,
        entry: &Entry,
        enter: impl FnOnce(&mut Books) -> Result<T, Refusal>,
    ) -> Result<(OwnedFd, T), Error> {
        let (theirs, ours) = lifeline::pipe()?;
        let ours = Arc::new(ours);
        let id: LifelineId = self.books().new_lifeline();
        // The observer hears of it first: once it counts, anybody may end the lease.
        let watched = self.observer.lifeline_opened(id, Arc::clone(&ours));
        watched.map_err(|errno| system("epoll_ctl", "lease pipe", errno))?;
        let mut books = self.books();
        let entered = self
            .check_kept(&books, &entry.tenant, 1)
            .and_then(|()| enter(&mut books).map_err(|_| no_such_lease(entry.id)));
        if entered.is_ok() {
            books.lifelines.insert(id, Lifeline { lease: entry.id, write_end: ours });
        }
        drop(books);
        if entered.is_err() {
            self.observer.lifeline_closed(id);
        }
        entered.map(|entered| (theirs, entered))
    }
}

/// Whether there is something to be had once more.
fn check_kept_any(lease: &Lease, asked: &GetFds) -> Result<(), Error> {
    if lease.handout != Handout::Iommufd || asked.kind.is_some() {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "GetFds of handout iommufd".into(),
        why: "the broker keeps no copies of an iommufd and its cdevs, so that closing them frees \
              the devices: whoever needs them again keeps a copy, or says by kind what is to be \
              opened anew"
            .into(),
    })
}

/// What the broker keeps of what the holder was given.
fn kept(lease: &Lease, entry: &Entry, files: &Files, asked: &GetFds) -> Vec<Named<SentFd>> {
    let mut fds = Vec::new();
    if gives_container(lease) {
        fds.extend(Named::container(lease, entry));
    }
    if lease.handout == Handout::Container {
        let groups = files.groups.iter();
        fds.extend(groups.map(|(id, group)| Named::group(*id, SentFd::Group(Arc::clone(group)))));
    }
    fds.retain(|file| asked.wants(file.kind, &file.name));
    fds
}
