//! Whom a keeper gives devices to: it asks the kernel who has the client's connection, reads the devices
//! itself, and applies the policy again. What the broker says of it counts for nothing.

use super::{Keeper, KeptLease};
use crate::host::{self, Group, NotAllowed, allows, allows_unsafe_interrupts};
use crate::policy::{Form, Peer, Policy, Tenant, Trust, Verb, administers};
use crate::process::keeper::{Failure, LeaseRecord, LeasedDevice, Open, Phase, Step};
use crate::process::launcher::InForce;
use crate::process::link::keep_open;
use crate::process::peer::describe;
use crate::protocol::{Bdf, Handout};
use crate::sys::peer::{address, peer_address};
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// The policy as the launcher compiled it, in a file that only root can have written.
#[derive(Clone, Debug)]
pub struct PolicyInForce {
    path: PathBuf,
    /// The file that it was read from; another policy comes in another file.
    file: FileId,
    in_force: Arc<InForce>,
}

impl PolicyInForce {
    /// What is in this file, which has this path now.
    ///
    /// # Errors
    /// See fstat(2).
    pub fn new(path: PathBuf, file: &File, in_force: InForce) -> std::io::Result<Self> {
        Ok(Self { path, file: FileId::of(file)?, in_force: Arc::new(in_force) })
    }

    /// As it was when this was made.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.in_force.policy
    }

    /// What is in force now.
    fn now(&mut self) -> std::io::Result<Arc<InForce>> {
        let file = File::open(&self.path)?;
        let id = FileId::of(&file)?;
        if id != self.file {
            let in_force = serde_json::from_str(&std::io::read_to_string(file)?)?;
            (self.file, self.in_force) = (id, Arc::new(in_force));
        }
        Ok(Arc::clone(&self.in_force))
    }
}

/// A file that is written once: its inode's number, which some file systems give out again, and when it was
/// written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId(u64, i64, i64);

impl FileId {
    fn of(file: &File) -> std::io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self(found.ino(), found.mtime(), found.mtime_nsec()))
    }
}

/// What is asked whether something may be; nothing where broker and keeper are one process, as in tests.
pub type Judge = Option<RefCell<PolicyInForce>>;

/// A client's own connection, and what it is judged by.
#[derive(Debug)]
pub(super) struct Client {
    connection: OwnedFd,
    /// The policy at the time of the call, and who the client is; `None` where nobody judges.
    judged: Option<(Arc<InForce>, Peer)>,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl Client {
    /// By which policy it is judged, and who it is.
    fn judged(&self) -> Option<(&Policy, &Peer)> {
        self.judged.as_ref().map(|(in_force, peer)| (&*in_force.policy, peer))
    }
}

impl Keeper {
    /// Whose connection it is that came with a call. It must have been accepted where clients connect: other
    /// sockets have other peers, root those that the launcher makes.
    pub(super) fn client(&self, connection: OwnedFd) -> Result<Client, Failure> {
        let Some(judge) = &self.judge else { return Ok(Client { connection, judged: None }) };
        let in_force = judge.borrow_mut().now().map_err(|error| Failure::Kernel {
            call: "read".into(),
            object: "the policy in force".into(),
            errno: error.raw_os_error().unwrap_or(nix::libc::EIO),
            note: Some(error.to_string()),
        })?;
        if !was_accepted(connection.as_fd(), &in_force.service) {
            // To close what is no client's could hang.
            keep_open([connection]);
            return Err(Failure::Bad {
                field: "client".into(),
                reason: "what came with this was not accepted from the service's socket, or its other end has \
                         a name"
                    .into(),
            });
        }
        let peer =
            describe(connection.as_fd(), in_force.policy.names_units()).map_err(|errno| {
                crate::kernel::Error::new("getsockopt", "the client's socket", errno)
            })?;
        Ok(Client { connection, judged: Some((in_force, peer)) })
    }

    /// Whether the client may have what is to be opened, all of the lease included.
    pub(super) fn permit(&self, call: &mut Open, client: &Client) -> Result<(), Failure> {
        let Some((policy, peer)) = client.judged() else { return Ok(()) };
        let record = &mut call.record;
        let tenant = policy.tenant(peer).map_err(denied)?;
        let known = self.leases.get(&record.lease).map(|lease| &lease.state);
        match known.map(|state| &state.record) {
            // Whoever acquired it first, whoever adds to it.
            Some(known) => (record.uid, record.pid) = (known.uid, known.pid),
            None => {
                (record.uid, record.pid) = (peer.uid, peer.pid);
                record.principals = policy.principals(&tenant.name).unwrap_or_default();
            }
        }
        if !is_of(policy, record, tenant) {
            return Err(denied(policy.no_such_tenant(&record.tenant)));
        }
        let trust = |mutual| if mutual { Trust::Mutual } else { Trust::Enforced };
        let container = record.container.as_ref().map(|it| (&*it.name, trust(it.mutual)));
        policy.permits(tenant, Form { handout: record.handout, container }).map_err(denied)?;
        record.rebind &= tenant.rebind || tenant.managed;
        let kept = known.into_iter().flat_map(|state| &state.groups).map(|group| group.group.id);
        check_steps(call, &kept.collect::<Vec<_>>())?;
        self.permit_devices(policy, tenant, &call.record, call.record.devices.iter())
    }

    /// Whether a client may use a lease: be given what is kept of it, map and unmap, end it. Its tenant
    /// may, and who could acquire it. Where the policy has come to know the client no more, the user who
    /// acquired it may as long as it lasts.
    pub(super) fn permit_holder(
        &self,
        record: &LeaseRecord,
        client: &Client,
    ) -> Result<(), Failure> {
        let Some((policy, peer)) = client.judged() else { return Ok(()) };
        let tenant = match policy.tenant(peer) {
            Ok(tenant) => tenant,
            // Not before: tenants can share a user, and differ by group, unit or label.
            Err(_) if peer.uid == record.uid => return Ok(()),
            Err(refusal) => return Err(denied(refusal)),
        };
        if is_of(policy, record, tenant) {
            return Ok(());
        }
        self.permit_devices(policy, tenant, record, record.devices.iter())
    }

    /// Whether a lease may end, for this client or without any.
    pub(super) fn permit_end(
        &self,
        lease: &KeptLease,
        client: Option<&Client>,
    ) -> Result<(), Failure> {
        // What was never delivered is undone by whoever has opened it.
        if lease.state.phase != Phase::Held || lease.is_forced(Instant::now()) {
            return Ok(());
        }
        match client {
            Some(client) => self.permit_holder(&lease.state.record, client),
            None if self.judge.is_none() => Ok(()),
            None => Err(Failure::Bad {
                field: "client".into(),
                reason: "a lease that is held ends for a client, and none came with this".into(),
            }),
        }
    }

    /// Whether a client may end a lease against its holder's will.
    pub(super) fn permit_revocation(
        &self,
        record: &LeaseRecord,
        client: &Client,
    ) -> Result<(), Failure> {
        let Some((policy, peer)) = client.judged() else { return Ok(()) };
        if is_administrator(peer) {
            return Ok(());
        }
        let tenant = policy.tenant(peer).map_err(denied)?;
        policy.may(tenant, Verb::Manage).ok().map_err(denied)?;
        match is_of(policy, record, tenant) {
            true => Ok(()),
            false => Err(denied(policy.no_such_tenant(&record.tenant))),
        }
    }

    /// Whether a client's word is enough where the kernel shows nothing.
    pub(super) fn permit_administrator(&self, client: &Client) -> Result<(), Failure> {
        let Some((policy, peer)) = client.judged() else { return Ok(()) };
        match is_administrator(peer) {
            true => Ok(()),
            false => Err(denied(policy.no_administrator(peer.uid))),
        }
    }

    /// Whether the limit of a client's process may be raised so far.
    pub(super) fn permit_memlock(&self, bytes: u64, client: &Client) -> Result<(), Failure> {
        let Some((policy, peer)) = client.judged() else { return Ok(()) };
        let tenant = policy.tenant(peer).map_err(denied)?;
        let most = policy.memlock(tenant).map_err(denied)?;
        if bytes <= most {
            return Ok(());
        }
        let reason = format!("{bytes} bytes are more than the policy's {most}");
        Err(Failure::Bad { field: "bytes".into(), reason })
    }

    fn permit_devices<'a>(
        &self,
        policy: &Policy,
        tenant: &Tenant,
        record: &LeaseRecord,
        devices: impl Iterator<Item = &'a LeasedDevice>,
    ) -> Result<(), Failure> {
        let kernel = &*self.kernel;
        let unsafe_interrupts = allows_unsafe_interrupts(kernel)?;
        for LeasedDevice { bdf, group: id, .. } in devices {
            let moved = || Failure::Moved {
                what: bdf.to_string(),
                why: format!("it is not in group {id}, of which the broker speaks"),
            };
            if host::find(kernel, *bdf)? != host::Place::Group(*id) {
                return Err(moved());
            }
            let mut group = Group::scan(kernel, *id)?.ok_or_else(moved)?;
            if policy.names_serials() {
                group.read_serials(kernel, policy.serials())?;
            }
            let device = group.device(*bdf).ok_or_else(moved)?;
            let allowed = allows(policy, tenant, &group, device, record.handout, unsafe_interrupts);
            allowed.map_err(|not| {
                denied(match not {
                    NotAllowed::Denied(refusal) | NotAllowed::Reaches { refusal, .. } => refusal,
                })
            })?;
        }
        Ok(())
    }
}

/// Whether this is the service's end of a connection. It has the name of the socket that accepted it, as
/// another one can have that is bound to the same path elsewhere; but an end that has connected has a peer with
/// a name, that of whoever listens.
pub(super) fn was_accepted(connection: BorrowedFd<'_>, service: &[u8]) -> bool {
    address(connection).is_ok_and(|name| name == service)
        && peer_address(connection).is_ok_and(|name| name.is_empty())
}

fn denied(refusal: crate::policy::Refusal) -> Failure {
    Failure::Denied(Box::new(refusal))
}

/// Root, and whoever runs the daemon. The broker's own user is neither, where it has one.
fn is_administrator(peer: &Peer) -> bool {
    administers(peer.uid, nix::unistd::geteuid().as_raw())
}

/// Whether a lease is of this tenant, which means nobody who was not meant when it was acquired.
fn is_of(policy: &Policy, record: &LeaseRecord, tenant: &Tenant) -> bool {
    tenant.name == record.tenant && policy.means(&record.tenant, &record.principals)
}

/// Nothing is opened but what was judged: each step is about a device of the lease, or its group, which
/// is written down as the lease's until it is free.
fn check_steps(call: &Open, kept: &[u32]) -> Result<(), Failure> {
    let Open { record, steps, groups, deliver_groups, names, .. } = call;
    let in_lease = |id: &u32| record.devices.iter().any(|device| device.group == *id);
    let has_group = |id: &u32| {
        in_lease(id) && (kept.contains(id) || groups.iter().any(|group| group.id == *id))
    };
    let uses = |id: &u32, bdf| {
        let is_it = |it: &&LeasedDevice| it.bdf == bdf && it.group == *id && !it.withheld;
        has_group(id) && record.devices.iter().any(|device| is_it(&device))
    };
    // The kernel is asked for the device that the name begins with.
    let is_named = |(bdf, name): (&Bdf, &String)| {
        let rest = name.strip_prefix(&bdf.to_string());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    };
    let is_judged = |step: &Step| match step {
        Step::OpenContainer => record.handout != Handout::Iommufd,
        Step::OpenIommufd => record.handout == Handout::Iommufd,
        Step::OpenGroup(id) | Step::CheckGroup(id) | Step::Attach(id) => has_group(id),
        Step::OpenDevice(id, bdf) => record.handout == Handout::Devices && uses(id, *bdf),
        Step::OpenCdev(id, bdf) => record.handout == Handout::Iommufd && uses(id, *bdf),
    };
    let good = steps.iter().all(is_judged)
        && groups.iter().all(|group| in_lease(&group.id))
        && names.iter().all(is_named)
        && (deliver_groups.is_empty() || record.handout.gives_group());
    match good {
        true => Ok(()),
        false => Err(Failure::Bad {
            field: "steps".into(),
            reason: "the broker asks for what is not in the lease".into(),
        }),
    }
}
