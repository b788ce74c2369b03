//! Handing over: the reply with its open files, on the client's own connection.

use super::open::Pending;
use super::permit::Client;
use super::{Keeper, KeptLease};
use crate::kernel::{Error, Group};
use crate::process::keeper::{Deliver, Delivered, Failure, LeaseRecord, Phase};
use crate::protocol::{Fd, FdKind, Handout};
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use serde_json::Value;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How long a client may take to read what is in the way; the broker has seen that there is room.
const PATIENCE: Duration = Duration::from_secs(1);

/// The files of a reply, each with what it is.
#[derive(Default)]
struct Files<'a> {
    described: Vec<Fd>,
    fds: Vec<BorrowedFd<'a>>,
}

impl<'a> Files<'a> {
    fn add(&mut self, kind: FdKind, name: impl ToString, fd: BorrowedFd<'a>) {
        let index = self.fds.len();
        self.described.push(Fd { index, kind, name: name.to_string() });
        self.fds.push(fd);
    }
}

impl Keeper {
    /// Sends a reply with what is pending, and what is wanted of what is kept. From its first byte on
    /// the lease is its holder's, which is written down before: the next broker knows it from there.
    pub(super) fn deliver(&mut self, call: Deliver, client: &Client) -> Result<Delivered, Failure> {
        let name = call.lease.clone();
        let lease = self.lease(&name)?;
        if lease.is_ending() {
            return Err(Failure::NoSuchLease);
        }
        self.permit_holder(&lease.state.record, client)
            .inspect_err(|_| self.undo_pending(&name))?;
        let pipe = match call.lifeline {
            true => Some(pipe().inspect_err(|_| self.undo_pending(&name))?),
            false => None,
        };
        let (theirs, ours) = pipe.unzip();
        let lease = self.lease_mut(&name)?;
        let is_first = lease.state.phase == Phase::Opening;
        lease.state.phase = Phase::Held;
        let written = if is_first { self.save() } else { Ok(()) };
        let theirs = theirs.as_ref().map(AsFd::as_fd);
        let sent = written.map_err(Failure::from);
        let sent = sent.and_then(|()| self.send(&call, client, theirs, is_first));
        let whole = match sent {
            Ok(whole) => whole,
            Err(failure) => {
                self.undo_pending(&name);
                return Err(failure);
            }
        };
        let lease = self.lease_mut(&name)?;
        lease.lifelines.extend(ours);
        let pending = lease.pending.take();
        let is_new = pending.is_some();
        lease.keep(pending);
        let has_changed = is_new || call.lifeline;
        if has_changed {
            self.touch(&name);
        }
        if is_new && !is_first {
            // The files are its holder's whatever comes of this; what stood there before names them all.
            let _ = self.save();
        }
        let state = if has_changed { Some(self.told(&name)?.state) } else { None };
        Ok(Delivered { whole, state })
    }

    /// Whether all of it went.
    fn send(
        &self,
        call: &Deliver,
        client: &Client,
        lifeline: Option<BorrowedFd<'_>>,
        first: bool,
    ) -> Result<bool, Failure> {
        let lease = self.lease(&call.lease)?;
        let record = &lease.state.record;
        let mut files = Files::default();
        let wanted = |kind, name: &str| call.kept.as_ref().is_some_and(|w| w.includes(kind, name));
        let container = self.container.as_ref().filter(|_| record.gives_container());
        if let Some(container) = container {
            let named = container_name(record);
            if first || wanted(FdKind::Container, named) {
                files.add(FdKind::Container, named, container.as_fd());
            }
        }
        let pending = lease.pending.as_ref();
        if let Some(container) = pending.and_then(|pending| pending.container.as_ref()) {
            files.add(FdKind::Container, "", container.as_fd());
        }
        for (id, group) in lease.delivered_groups(&|id| wanted(FdKind::Group, &id.to_string())) {
            files.add(FdKind::Group, id, group.as_fd());
        }
        if let Some(pending) = pending {
            for (bdf, device) in &pending.devices {
                files.add(FdKind::Device, bdf, device.as_fd());
            }
            if let Some(iommufd) = &pending.iommufd {
                files.add(FdKind::Iommufd, "", iommufd.as_fd());
            }
            for cdev in &pending.cdevs {
                files.add(FdKind::Cdev, cdev.bdf, cdev.device.as_fd());
            }
        }
        if let Some(lifeline) = lifeline {
            files.add(FdKind::Lease, "", lifeline);
        }
        let mut parameters = call.parameters.clone();
        let described = serde_json::to_value(&files.described).unwrap_or(Value::Null);
        parameters.insert("fds".into(), described);
        let bytes = crate::process::link::reply(&parameters, false);
        send_all(client, &bytes, &files.fds)
    }
}

impl KeptLease {
    /// The groups whose files go with a reply, each once.
    fn delivered_groups(&self, wanted: &dyn Fn(u32) -> bool) -> Vec<(u32, &Group)> {
        let pending = self.pending.as_ref();
        let asked = |id: u32| pending.is_some_and(|p| p.deliver_groups.contains(&id));
        let shares = self.state.record.handout == Handout::Container;
        let kept = self.groups.iter().map(|(id, group)| (*id, group));
        let kept = kept.filter(|(id, _)| shares && (asked(*id) || wanted(*id)));
        let fresh = pending.map_or(&[][..], |pending| &pending.groups).iter();
        let fresh = fresh.map(|(id, group)| (*id, group)).filter(|(id, _)| asked(*id));
        let mut all: Vec<_> = kept.chain(fresh).collect();
        all.sort_by_key(|(id, _)| *id);
        all
    }

    /// Keeps what is to be kept of what was delivered; the rest is its holder's alone.
    fn keep(&mut self, pending: Option<Pending>) {
        let Some(Pending { groups, .. }) = pending else { return };
        if self.state.record.handout != Handout::Group {
            self.groups.extend(groups);
        }
    }
}

fn container_name(record: &LeaseRecord) -> &str {
    record.container.as_ref().map_or(&record.lease, |container| &container.name)
}

/// The holder's end of a lease pipe and ours, in this order.
fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    let made = nix::unistd::pipe2(OFlag::O_CLOEXEC);
    let made = made.map_err(|errno| Error::new("pipe2", "lease pipe", errno))?;
    // Nothing is ever in it, and the kernel counts its room against root's: 1,000 pipes of the usual 16
    // pages would be all that root's processes without rights can have.
    let _ = fcntl(&made.1, FcntlArg::F_SETPIPE_SZ(1));
    Ok(made)
}

/// Sends a message, its files with the first byte. Whether all of it went; an error where nothing did.
fn send_all(client: &Client, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool, Failure> {
    let mut sent = 0;
    while sent < bytes.len() {
        let with = if sent == 0 { fds } else { &[] };
        let part = fdpass::send(client.as_fd(), &bytes[sent..], with, MsgFlags::MSG_DONTWAIT);
        let failed = match part {
            Ok(count) => {
                sent += count;
                continue;
            }
            Err(Errno::EAGAIN) if is_writable(client) => continue,
            Err(errno) => errno,
        };
        return if sent > 0 { Ok(false) } else { Err(Failure::NotDelivered(failed as i32)) };
    }
    Ok(true)
}

/// Waits until there is room for more; false where the client leaves none for too long.
fn is_writable(client: &Client) -> bool {
    let mut ask = [PollFd::new(client.as_fd(), PollFlags::POLLOUT)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut ask, patience) {
            Err(Errno::EINTR) => {}
            ready => return ready.is_ok_and(|count| count > 0),
        }
    }
}
