//! Whom a keeper gives devices to: it asks the kernel who has the client's connection, reads the devices
//! itself, and applies the policy again. What the broker says of it counts for nothing.

use super::Keeper;
use crate::host::{self, Group, NotAllowed, allows, allows_unsafe_interrupts};
use crate::policy::{Form, Peer, Policy, Tenant, Trust};
use crate::process::keeper::{Failure, LeaseRecord, LeasedDevice, Open, Step};
use crate::process::peer::describe;
use crate::protocol::Handout;
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

/// The policy as the launcher compiled it, in a file that only root can have written.
#[derive(Clone, Debug)]
pub struct PolicyInForce {
    path: PathBuf,
    /// The inode that it was read from; another policy comes in another file.
    inode: u64,
    policy: Arc<Policy>,
}

impl PolicyInForce {
    /// The policy that is in this file, which has this path now.
    ///
    /// # Errors
    /// See fstat(2).
    pub fn new(path: PathBuf, file: &File, policy: Arc<Policy>) -> std::io::Result<Self> {
        Ok(Self { path, inode: file.metadata()?.ino(), policy })
    }

    /// As it was when this was made.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// The policy of now.
    fn now(&mut self) -> std::io::Result<Arc<Policy>> {
        let file = File::open(&self.path)?;
        let inode = file.metadata()?.ino();
        if inode != self.inode {
            let policy = serde_json::from_str(&std::io::read_to_string(file)?)?;
            (self.inode, self.policy) = (inode, Arc::new(policy));
        }
        Ok(Arc::clone(&self.policy))
    }
}

/// Who is asked whether something may be; nobody where broker and keeper are one process, as in tests.
pub type Judge = Option<RefCell<PolicyInForce>>;

impl Keeper {
    fn policy(&self) -> Result<Option<Arc<Policy>>, Failure> {
        let Some(judge) = &self.judge else { return Ok(None) };
        let policy = judge.borrow_mut().now();
        policy.map(Some).map_err(|error| Failure::Kernel {
            call: "read".into(),
            object: "the policy in force".into(),
            errno: error.raw_os_error().unwrap_or(nix::libc::EIO),
            note: Some(error.to_string()),
        })
    }

    /// Whether the client may have what is to be opened, all of the lease included.
    pub(super) fn permit(&self, call: &mut Open, client: &OwnedFd) -> Result<(), Failure> {
        let Some(policy) = self.policy()? else { return Ok(()) };
        let record = &mut call.record;
        let peer = peer(&policy, client)?;
        // Whoever acquired it first, whoever adds to it.
        let known = self.leases.get(&record.lease).map(|lease| &lease.state.record);
        (record.uid, record.pid) = known.map_or((peer.uid, peer.pid), |it| (it.uid, it.pid));
        let tenant = policy.tenant(&peer).map_err(denied)?;
        if record.tenant != tenant.name {
            return Err(denied(policy.no_such_tenant(&record.tenant)));
        }
        let trust = |mutual| if mutual { Trust::Mutual } else { Trust::Enforced };
        let container = record.container.as_ref().map(|it| (&*it.name, trust(it.mutual)));
        policy.permits(tenant, Form { handout: record.handout, container }).map_err(denied)?;
        record.rebind &= tenant.rebind || tenant.managed;
        check_steps(call)?;
        self.permit_devices(&policy, tenant, &call.record, call.record.devices.iter())
    }

    /// Whether a client may be given what is kept of a lease. Whoever acquired it may as long as it
    /// lasts, whatever the policy has come to be; others must be such as could acquire it.
    pub(super) fn permit_delivery(
        &self,
        record: &LeaseRecord,
        client: &OwnedFd,
    ) -> Result<(), Failure> {
        let Some(policy) = self.policy()? else { return Ok(()) };
        let peer = peer(&policy, client)?;
        if peer.uid == record.uid {
            return Ok(());
        }
        let tenant = policy.tenant(&peer).map_err(denied)?;
        if tenant.name == record.tenant {
            return Ok(());
        }
        self.permit_devices(&policy, tenant, record, record.devices.iter())
    }

    /// Whether the limit of a client's process may be raised so far.
    pub(super) fn permit_memlock(&self, bytes: u64, client: &OwnedFd) -> Result<(), Failure> {
        let Some(policy) = self.policy()? else { return Ok(()) };
        let peer = peer(&policy, client)?;
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

fn peer(policy: &Policy, client: &OwnedFd) -> Result<Peer, Failure> {
    describe(client.as_fd(), policy.names_units()).map_err(|errno| {
        crate::kernel::Error::new("getsockopt", "the client's socket", errno).into()
    })
}

fn denied(refusal: crate::policy::Refusal) -> Failure {
    Failure::Denied(Box::new(refusal))
}

/// Nothing is opened but what was judged: each step is about a device of the lease, or its group.
fn check_steps(call: &Open) -> Result<(), Failure> {
    let Open { record, steps, groups, deliver_groups, .. } = call;
    let has_group = |id: &u32| record.devices.iter().any(|device| device.group == *id);
    let uses = |id: &u32, bdf| {
        let is_it = |it: &&LeasedDevice| it.bdf == bdf && it.group == *id && !it.withheld;
        record.devices.iter().any(|device| is_it(&device))
    };
    let is_judged = |step: &Step| match step {
        Step::OpenContainer => record.handout != Handout::Iommufd,
        Step::OpenIommufd => record.handout == Handout::Iommufd,
        Step::OpenGroup(id) | Step::CheckGroup(id) | Step::Attach(id) => has_group(id),
        Step::OpenDevice(id, bdf) => record.handout == Handout::Devices && uses(id, *bdf),
        Step::OpenCdev(id, bdf) => record.handout == Handout::Iommufd && uses(id, *bdf),
    };
    let good = steps.iter().all(is_judged)
        && groups.iter().all(|group| has_group(&group.id))
        && (deliver_groups.is_empty() || record.handout.gives_group());
    match good {
        true => Ok(()),
        false => Err(Failure::Bad {
            field: "steps".into(),
            reason: "the broker asks for what is not in the lease".into(),
        }),
    }
}
