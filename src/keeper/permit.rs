//! Whom a keeper gives devices to: it asks the kernel who has the client's connection, reads the devices
//! itself, and applies the policy again. What the broker says of it counts for nothing.

use super::{Keeper, KeptLease};
use crate::host::{self, Group, NotAllowed, allows, allows_unsafe_interrupts};
use crate::policy::{Form, Peer, Policy, Tenant, Trust, Verb, administers};
use crate::process::keeper::{Failure, LeaseRecord, LeasedDevice, Open, Phase, Step};
use crate::process::peer::describe;
use crate::protocol::{Bdf, Handout};
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
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
    policy: Arc<Policy>,
}

impl PolicyInForce {
    /// The policy that is in this file, which has this path now.
    ///
    /// # Errors
    /// See fstat(2).
    pub fn new(path: PathBuf, file: &File, policy: Arc<Policy>) -> std::io::Result<Self> {
        Ok(Self { path, file: FileId::of(file)?, policy })
    }

    /// As it was when this was made.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// The policy of now.
    fn now(&mut self) -> std::io::Result<Arc<Policy>> {
        let file = File::open(&self.path)?;
        let id = FileId::of(&file)?;
        if id != self.file {
            let policy = serde_json::from_str(&std::io::read_to_string(file)?)?;
            (self.file, self.policy) = (id, Arc::new(policy));
        }
        Ok(Arc::clone(&self.policy))
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

/// Who is asked whether something may be; nobody where broker and keeper are one process, as in tests.
pub type Judge = Option<RefCell<PolicyInForce>>;

impl Keeper {
    /// The policy in force, and who the client is; `None` where nobody is asked.
    fn policy_for(&self, client: &OwnedFd) -> Result<Option<(Arc<Policy>, Peer)>, Failure> {
        let Some(judge) = &self.judge else { return Ok(None) };
        let policy = judge.borrow_mut().now().map_err(|error| Failure::Kernel {
            call: "read".into(),
            object: "the policy in force".into(),
            errno: error.raw_os_error().unwrap_or(nix::libc::EIO),
            note: Some(error.to_string()),
        })?;
        let peer = describe(client.as_fd(), policy.names_units()).map_err(unknown)?;
        Ok(Some((policy, peer)))
    }

    /// Whether the client may have what is to be opened, all of the lease included.
    pub(super) fn permit(&self, call: &mut Open, client: &OwnedFd) -> Result<(), Failure> {
        let Some((policy, peer)) = self.policy_for(client)? else { return Ok(()) };
        let record = &mut call.record;
        let tenant = policy.tenant(&peer).map_err(denied)?;
        let known = self.leases.get(&record.lease).map(|lease| &lease.state);
        match known.map(|state| &state.record) {
            // Whoever acquired it first, whoever adds to it.
            Some(known) => (record.uid, record.pid) = (known.uid, known.pid),
            None => {
                (record.uid, record.pid) = (peer.uid, peer.pid);
                record.principals = policy.principals(&tenant.name).unwrap_or_default();
            }
        }
        if !is_of(&policy, record, tenant) {
            return Err(denied(policy.no_such_tenant(&record.tenant)));
        }
        let trust = |mutual| if mutual { Trust::Mutual } else { Trust::Enforced };
        let container = record.container.as_ref().map(|it| (&*it.name, trust(it.mutual)));
        policy.permits(tenant, Form { handout: record.handout, container }).map_err(denied)?;
        record.rebind &= tenant.rebind || tenant.managed;
        let kept = known.into_iter().flat_map(|state| &state.groups).map(|group| group.group.id);
        check_steps(call, &kept.collect::<Vec<_>>())?;
        self.permit_devices(&policy, tenant, &call.record, call.record.devices.iter())
    }

    /// Whether a client may use a lease: be given what is kept of it, map and unmap, end it. Whoever
    /// acquired it may as long as it lasts, whatever the policy has come to be; others must be such as
    /// could acquire it.
    pub(super) fn permit_holder(
        &self,
        record: &LeaseRecord,
        client: &OwnedFd,
    ) -> Result<(), Failure> {
        // The holder needs no policy, and is asked for nothing but its uid.
        if self.judge.is_none() || uid(client)? == record.uid {
            return Ok(());
        }
        let Some((policy, peer)) = self.policy_for(client)? else { return Ok(()) };
        let tenant = policy.tenant(&peer).map_err(denied)?;
        if is_of(&policy, record, tenant) {
            return Ok(());
        }
        self.permit_devices(&policy, tenant, record, record.devices.iter())
    }

    /// Whether a lease may end, for this client or without any.
    pub(super) fn permit_end(
        &self,
        lease: &KeptLease,
        client: Option<&OwnedFd>,
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
        client: &OwnedFd,
    ) -> Result<(), Failure> {
        let Some((policy, peer)) = self.policy_for(client)? else { return Ok(()) };
        if is_administrator(&peer) {
            return Ok(());
        }
        let tenant = policy.tenant(&peer).map_err(denied)?;
        policy.may(tenant, Verb::Manage).ok().map_err(denied)?;
        match is_of(&policy, record, tenant) {
            true => Ok(()),
            false => Err(denied(policy.no_such_tenant(&record.tenant))),
        }
    }

    /// Whether a client's word is enough where the kernel shows nothing.
    pub(super) fn permit_administrator(&self, client: &OwnedFd) -> Result<(), Failure> {
        let Some((policy, peer)) = self.policy_for(client)? else { return Ok(()) };
        match is_administrator(&peer) {
            true => Ok(()),
            false => Err(denied(policy.no_administrator(peer.uid))),
        }
    }

    /// Whether the limit of a client's process may be raised so far.
    pub(super) fn permit_memlock(&self, bytes: u64, client: &OwnedFd) -> Result<(), Failure> {
        let Some((policy, peer)) = self.policy_for(client)? else { return Ok(()) };
        let tenant = policy.tenant(&peer).map_err(denied)?;
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

fn uid(client: &OwnedFd) -> Result<u32, Failure> {
    Ok(getsockopt(client, sockopt::PeerCredentials).map_err(unknown)?.uid())
}

fn unknown(errno: Errno) -> Failure {
    crate::kernel::Error::new("getsockopt", "the client's socket", errno).into()
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
