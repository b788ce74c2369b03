//! In which form a new lease is given: through which backend, as which handout, in which address
//! space.

use super::{Broker, error};
use crate::kernel::{self, Node};
use crate::ledger::{Lease, Space, Trust};
use crate::policy::{self, Tenant};
use crate::protocol::{Acquire, Backend, Bdf, Error, Handout};

/// What the devices that are asked for have to do with it.
pub(super) struct Given {
    /// No IOMMU is behind them.
    pub(super) noiommu: bool,
    /// One that is on a VFIO driver and can't be opened without its group.
    pub(super) without_cdev: Option<Bdf>,
}

impl Broker {
    /// The handout and the address space of a new lease.
    pub(super) fn form(
        &self,
        tenant: &Tenant,
        request: &Acquire,
        given: &Given,
    ) -> Result<(Handout, Space), Error> {
        agree(request, given)?;
        if let Some(name) = &request.container {
            self.policy().container(tenant, name)?;
        }
        let handout = self.new_handout(tenant, request, given)?;
        if handout == Handout::Iommufd {
            self.can(Backend::Iommufd, given)?;
        }
        let space = match &request.container {
            Some(name) => {
                let policy = self.policy();
                let shared = policy.container(tenant, name)?;
                let trust = match shared.trust {
                    policy::Trust::Enforced => Trust::Enforced,
                    policy::Trust::Mutual => Trust::Mutual,
                };
                Space::Shared { name: shared.name.clone(), trust }
            }
            None if matches!(handout, Handout::Group | Handout::Iommufd) => Space::None,
            None => Space::Own,
        };
        Ok((handout, space))
    }

    fn new_handout(
        &self,
        tenant: &Tenant,
        request: &Acquire,
        given: &Given,
    ) -> Result<Handout, Error> {
        let only_devices = given.noiommu || request.container.is_some();
        if let Some(asked) = request.handout.or(only_devices.then_some(Handout::Devices)) {
            self.policy().backend(tenant, Some(asked.backend()))?;
            return Ok(self.policy().handout(tenant, Some(asked))?);
        }
        let backend = match request.backend {
            Some(asked) => self.policy().backend(tenant, Some(asked))?,
            None => self.first_possible(tenant, given)?,
        };
        // A policy has a handout for each of its backends.
        Ok(self.policy().handout(tenant, tenant.handout_of(backend))?)
    }

    /// The policy's first backend that the host can do.
    fn first_possible(&self, tenant: &Tenant, given: &Given) -> Result<Backend, Error> {
        let backends = tenant.backends();
        if let [only] = backends {
            return Ok(*only);
        }
        let mut why = None;
        for backend in backends {
            match self.can(*backend, given) {
                Ok(()) => return Ok(*backend),
                Err(error @ Error::Unsupported { .. }) => drop(why.get_or_insert(error)),
                Err(error) => return Err(error),
            }
        }
        match why {
            Some(error) => Err(error),
            None => Ok(self.policy().backend(tenant, None)?),
        }
    }

    /// Whether the host can do it; an [`Error::Unsupported`] names what it lacks.
    fn can(&self, backend: Backend, given: &Given) -> Result<(), Error> {
        let node = match backend {
            Backend::Type1 => Node::Container,
            Backend::Iommufd => Node::Iommu,
        };
        if let Err(errno) = self.kernel.find(&node) {
            return Err(error::no_node(kernel::Error::new("stat", node.to_string(), errno)));
        }
        match (backend, given.without_cdev) {
            (Backend::Iommufd, Some(bdf)) => Err(error::no_cdev(bdf)),
            _ => Ok(()),
        }
    }
}

/// What is asked for in one breath goes together.
fn agree(request: &Acquire, given: &Given) -> Result<(), Error> {
    let handout = request.handout;
    if let (Some(backend), Some(handout)) = (request.backend, handout)
        && handout.backend() != backend
    {
        let reason = format!(
            "{} is a handout of backend {}, and backend {} is asked for: leave one of the two out",
            handout.name(),
            handout.backend().name(),
            backend.name()
        );
        return Err(Error::bad("handout", reason));
    }
    let iommufd = request.backend == Some(Backend::Iommufd) || handout == Some(Handout::Iommufd);
    if iommufd && request.container.is_some() {
        let why = "a shared container is a type1 address space: leave it out, or ask for backend \
                   type1; devices that are added to one lease share its iommufd";
        return Err(Error::bad("container", why));
    }
    if iommufd && given.noiommu {
        let why = "no IOMMU is behind the group: it is handed out as devices, by backend type1";
        return Err(Error::Unsupported { what: "backend iommufd".into(), why: why.into() });
    }
    Ok(())
}

/// What is added to a lease comes in the lease's own form; naming another one is a mistake that is
/// better heard of.
pub(super) fn same_form(lease: &Lease, request: &Acquire) -> Result<(Handout, Space), Error> {
    let conflict = |what: &str| {
        let why = format!("lease {} was acquired with another one", lease.id);
        Err(Error::Conflict { what: what.into(), why })
    };
    if request.vm != lease.vm {
        return conflict("vm");
    }
    if request.backend.is_some_and(|backend| backend != lease.handout.backend()) {
        return conflict("backend");
    }
    if request.handout.is_some_and(|handout| handout != lease.handout) {
        return conflict("handout");
    }
    let shared = match &lease.space {
        Space::Shared { name, .. } => Some(name),
        Space::None | Space::Own => None,
    };
    if request.container.is_some() && request.container.as_ref() != shared {
        return conflict("container");
    }
    Ok((lease.handout, lease.space.clone()))
}
