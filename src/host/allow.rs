//! Whether a policy lets a tenant have what is in this machine.

use super::{Device, Group};
use crate::policy::{Policy, Refusal, Risk, Tenant};
use crate::protocol::{Bdf, Handout};

/// Why a tenant may not have a device in a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotAllowed {
    /// A rule is against it.
    Denied(Refusal),
    /// A rule is against another device of its group, which is reached with the group's file.
    Reaches {
        /// The rule.
        refusal: Refusal,
        /// The group.
        group: u32,
        /// The device that was asked for.
        device: Bdf,
    },
}

impl From<Refusal> for NotAllowed {
    fn from(refusal: Refusal) -> Self {
        Self::Denied(refusal)
    }
}

/// Whether the policy lets a tenant have a device in this form. Pure.
///
/// # Errors
/// It does not.
pub fn allows(
    policy: &Policy,
    tenant: &Tenant,
    group: &Group,
    device: &Device,
    handout: Handout,
    unsafe_interrupts: bool,
) -> Result<(), NotAllowed> {
    policy.device(tenant, &device.facts).ok()?;
    // Whoever has the group's open file can open each of its devices, named or not, that is on a VFIO
    // driver then, whatever it is on now.
    if handout.gives_group() {
        for other in group.devices.iter().filter(|other| !other.is_bridge()) {
            policy.device(tenant, &other.facts).ok().map_err(|refusal| NotAllowed::Reaches {
                refusal,
                group: group.id,
                device: device.bdf(),
            })?;
        }
    }
    if group.noiommu {
        policy.risk(tenant, Risk::NoIommu).ok()?;
    } else if unsafe_interrupts {
        policy.risk(tenant, Risk::UnsafeInterrupts).ok()?;
    }
    Ok(())
}
