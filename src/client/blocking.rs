//! The blocking client.

use super::connection::{Connection, Deadline};
use super::replies::Replies;
use super::wire::{Incoming, Lost, Outgoing, decode};
use super::{Acquire, DmaRange, Error, Files, Lease, Result, socket_path};
use crate::protocol::{self, Event, FdKind, Method};
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a call may take, unless told otherwise.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

/// How long a broker that was there before may be away, as it is when it is restarted.
pub(super) const AWAY: Duration = Duration::from_secs(5);

/// How often a broker that is away is looked for.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A connection to the broker, made again when the broker was restarted.
///
/// A call whose connection turns out to be gone is made once more on a new one if it had not been
/// sent, or if it changes nothing; else the error is [`Error::Lost`].
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    pub(super) timeout: Option<Duration>,
    pub(super) connection: Option<Connection>,
}

impl Client {
    /// Connects to the broker at [`socket_path`].
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect() -> Result<Self> {
        Self::connect_to(socket_path())
    }

    /// Connects to the broker at `path`.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect_to(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let connection = Connection::open(&path, Deadline::after(Some(TIMEOUT)))?;
        Ok(Self { path, timeout: Some(TIMEOUT), connection: Some(connection) })
    }

    /// How long a call may take, 30 s unless set; `None` is for ever. Resets and pinned memory can
    /// take seconds.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks for devices.
    ///
    /// # Errors
    /// [`Error::Broker`] with the reason why not: denied, busy, not viable and more.
    pub fn acquire(&mut self, request: Acquire) -> Result<Lease> {
        let request = request.into_request()?;
        let (reply, fds) = self.call(&request, &[])?;
        Lease::new(request.vm, reply, fds)
    }

    /// Adds devices to a lease.
    ///
    /// # Errors
    /// As [`Client::acquire`]; the lease is as it was then.
    pub fn add(&mut self, lease: &mut Lease, more: Acquire) -> Result<()> {
        let (reply, fds) = self.call(&lease.add_call(more)?, &[])?;
        lease.extend(reply, fds)
    }

    /// The open files of a lease once more, without a further lease fd: `lease` has one.
    ///
    /// # Errors
    /// [`Error::Broker`], where the lease has ended.
    pub fn get_fds(&mut self, lease: &Lease) -> Result<Files> {
        self.files(&lease.get_fds_call())
    }

    /// The open files of a lease that another process acquired, and a further lease fd: the lease
    /// then lives as long as either.
    ///
    /// # Errors
    /// [`Error::Broker`], where there is no such lease with that key.
    pub fn get_fds_of(&mut self, lease: &str, key: &str) -> Result<Files> {
        let (lease, key) = (lease.to_owned(), key.to_owned());
        self.files(&protocol::GetFds { lease, key, ..Default::default() })
    }

    /// One open file of a lease that another process acquired, opened anew, and a further lease fd.
    pub(crate) fn open_again(
        &mut self,
        lease: &str,
        key: &str,
        kind: FdKind,
        name: &str,
    ) -> Result<Files> {
        let (lease, key, name) = (lease.to_owned(), key.to_owned(), Some(name.to_owned()));
        self.files(&protocol::GetFds { lease, key, lifeline: None, kind: Some(kind), name })
    }

    fn files(&mut self, call: &protocol::GetFds) -> Result<Files> {
        let (reply, fds) = self.call(call, &[])?;
        Files::pair(protocol::GetFds::NAME, &reply.fds, fds)
    }

    /// Ends a lease. All its open files in this process are closed first, so that the kernel can
    /// show that nothing is in use; returns whether it has.
    ///
    /// # Errors
    /// [`Error::Broker`]; the lease has ended all the same, since its files are closed.
    pub fn release(&mut self, lease: Lease) -> Result<bool> {
        let call = lease.release_call();
        let (lifeline, files) = lease.into_parts();
        drop(files);
        let (reply, _) = self.call(&call, &[])?;
        drop(lifeline);
        Ok(reply.proved)
    }

    /// Ends a lease that another process acquired; returns whether the kernel has shown that nothing
    /// of it is in use.
    ///
    /// # Errors
    /// [`Error::Broker`], where there is no such lease with that key.
    pub fn release_of(&mut self, lease: &str, key: &str) -> Result<bool> {
        let call = protocol::Release { lease: lease.to_owned(), key: key.to_owned() };
        Ok(self.call(&call, &[])?.0.proved)
    }

    /// Lets the lease's devices reach memory: a memfd, or a file on tmpfs or hugetlbfs. For
    /// leases whose container the broker keeps to itself (handout `devices`).
    ///
    /// # Errors
    /// [`Error::Broker`]: an overlap, a quota, memory of another kind.
    pub fn map_dma(&mut self, lease: &Lease, memory: impl AsFd, range: DmaRange) -> Result<()> {
        self.call(&lease.map_call(&range), &[memory.as_fd()]).map(drop)
    }

    /// Takes whole mappings back; returns the bytes.
    ///
    /// # Errors
    /// [`Error::Broker`], where a mapping would be cut.
    pub fn unmap_dma(&mut self, lease: &Lease, iova: u64, size: u64) -> Result<u64> {
        Ok(self.call(&lease.unmap_call(iova, size), &[])?.0.unmapped)
    }

    /// Has this process's memlock limit raised to so many bytes, for what it or a program that it
    /// starts maps for devices; returns what the limit is then. It is never lowered. The process is
    /// the one that connected, which this must be.
    ///
    /// # Errors
    /// [`Error::Broker`]: the policy does not allow as much, or nothing.
    pub fn set_memlock(&mut self, lease: &Lease, bytes: u64) -> Result<u64> {
        let (lease, key) = (lease.id().to_owned(), lease.key().to_owned());
        Ok(self.call(&protocol::SetMemlock { lease, key, bytes }, &[])?.0.bytes)
    }

    /// The IOMMU groups of the host with their devices, as far as the policy lets one see them. To
    /// have each as soon as it is read, use [`Client::call_more`].
    ///
    /// # Errors
    /// See [`Error`].
    pub fn topology(&mut self) -> Result<Vec<protocol::Group>> {
        let mut groups = Vec::new();
        for some in self.call_more(&protocol::Topology {})? {
            groups.extend(some?.groups);
        }
        Ok(groups)
    }

    /// The leases that one may see.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn leases(&mut self) -> Result<Vec<protocol::Lease>> {
        let mut leases = Vec::new();
        for some in self.call_more(&protocol::Leases {})? {
            leases.extend(some?.leases);
        }
        Ok(leases)
    }

    /// What happens to leases from now on, or to one of them; on a connection of its own.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn watch(&self, lease: Option<&str>) -> Result<Watch> {
        let call = protocol::Watch { lease: lease.map(str::to_owned) };
        let call = Outgoing::new(&call, true)?;
        let deadline = Deadline::after(self.timeout);
        let mut connection = Connection::open(&self.path, deadline)?;
        connection.send(&call, &[], deadline).map_err(|lost| call.failed(lost, self.timeout))?;
        Ok(Watch { connection, call, timeout: None, over: false })
    }

    /// Any method of the interface: its reply, and the open files that came with it.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn call<M: Method>(
        &mut self,
        call: &M,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(M::Reply, Vec<OwnedFd>)> {
        let call = Outgoing::new(call, false)?;
        let deadline = Deadline::after(self.timeout);
        let Incoming { message, fds } = self.exchange(&call, fds, deadline)?;
        decode::<M>(&message).map(|(reply, _)| (reply, fds))
    }

    /// Any method of the interface that lists something: reply by reply, each as soon as the broker has
    /// it. Open files don't come this way.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), vfio_broker::client::Error> {
    /// let mut broker = vfio_broker::client::Client::connect()?;
    /// for some in broker.call_more(&vfio_broker::protocol::Topology {})? {
    ///     for group in some?.groups {
    ///         println!("group {} has {} devices", group.id, group.devices.len());
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`Error`].
    pub fn call_more<M: Method>(&mut self, call: &M) -> Result<Replies<'_, M>> {
        Replies::new(self, call)
    }

    pub(super) fn exchange(
        &mut self,
        call: &Outgoing,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Incoming> {
        let mut again = true;
        loop {
            // Put back only after an answer: a connection that failed is of no more use.
            let mut connection = match self.connection.take().filter(Connection::is_usable) {
                Some(connection) => connection,
                None => self.reconnect(deadline)?,
            };
            let answer = connection
                .send(call, fds, deadline)
                .and_then(|()| connection.receive(call.method, deadline));
            match answer {
                Ok(incoming) => {
                    self.connection = Some(connection);
                    return Ok(incoming);
                }
                Err(lost) if again && call.may_repeat_after(&lost) => again = false,
                Err(lost) => return Err(call.failed(lost, self.timeout)),
            }
        }
    }

    /// Connects again, waiting a while for a broker that is being restarted.
    fn reconnect(&self, deadline: Deadline) -> Result<Connection> {
        let back_by = Deadline::after(Some(AWAY));
        loop {
            match Connection::open(&self.path, deadline) {
                Err(error)
                    if is_away(&error) && !back_by.has_passed() && !deadline.has_passed() =>
                {
                    std::thread::sleep(LOOK_AGAIN);
                }
                result => return result,
            }
        }
    }
}

/// Whether nobody listens on the socket just now.
pub(super) fn is_away(error: &Error) -> bool {
    matches!(error, Error::Connect { errno: Errno::ENOENT | Errno::ECONNREFUSED, .. })
}

/// What happens to leases, event by event, until the broker ends it.
///
/// ```no_run
/// # fn main() -> Result<(), vfio_broker::client::Error> {
/// let broker = vfio_broker::client::Client::connect()?;
/// for event in broker.watch(None)? {
///     let event = event?;
///     println!("{:?} {} {}", event.event, event.lease, event.devices.join(" "));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Watch {
    connection: Connection,
    call: Outgoing,
    timeout: Option<Duration>,
    over: bool,
}

impl Watch {
    /// How long to wait for an event: for ever unless set. A timeout ends the watch.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    fn event(&mut self) -> Result<(Event, bool)> {
        let deadline = Deadline::after(self.timeout);
        let incoming = self.connection.receive(self.call.method, deadline);
        let incoming = incoming.map_err(|lost: Lost| self.call.failed(lost, self.timeout))?;
        decode::<protocol::Watch>(&incoming.message)
    }
}

impl AsFd for Watch {
    /// For poll(2): readable when an event may be there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Iterator for Watch {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let event = self.event();
        self.over = !matches!(event, Ok((_, true)));
        Some(event.map(|(event, _)| event))
    }
}
