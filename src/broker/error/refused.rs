//! What does not fit, and what makes no sense, to the ledger, in words.

use crate::ledger::{Bad, Conflict, IovaRange};
use crate::protocol::Error;

impl From<Conflict> for Error {
    fn from(conflict: Conflict) -> Self {
        let container = |name: &str| format!("container {name:?}");
        let (what, why) = match conflict {
            Conflict::LeaseInUse(id) => (id.to_string(), "is in use".into()),
            Conflict::GroupInUse(id) => (format!("group {id}"), "is another lease's".into()),
            Conflict::MixedLease { group } => (
                format!("group {group}"),
                "groups with and without an IOMMU can't be in one lease".into(),
            ),
            Conflict::AlreadyIn { device, withheld } => {
                let how = if withheld { "withheld for" } else { "in" };
                (device.to_string(), format!("is {how} this lease already"))
            }
            Conflict::PfElsewhere { vf, pf } => {
                (vf.to_string(), format!("another tenant has {pf}, its PF"))
            }
            Conflict::VfElsewhere { pf, vf } => {
                (pf.to_string(), format!("another tenant has {vf}, a VF of it"))
            }
            Conflict::OtherTrust { container: name } => {
                (container(&name), "its members have another kind of trust".into())
            }
            Conflict::MixedContainer { container: name } => (
                container(&name),
                "groups with and without an IOMMU can't be in one container".into(),
            ),
            Conflict::LeftAlone { container: name } => {
                (container(&name), "its last member has ended and can't be reclaimed yet".into())
            }
            Conflict::IommufdInContainer => {
                ("handout iommufd".into(), "it has no type1 container".into())
            }
            Conflict::GroupOfSharedContainer => (
                "container".into(),
                "members of a shared container get handout devices: with its group a member could \
                 leave it"
                    .into(),
            ),
            Conflict::OtherSpace => {
                ("handout".into(), "it does not go with this address space".into())
            }
            Conflict::NoIommuAsGroup => (
                "handout".into(),
                "a group without an IOMMU is handed out as devices only: the kernel lets nobody \
                 without CAP_SYS_RAWIO use its group"
                    .into(),
            ),
            Conflict::NotMappedHere => {
                ("MapDma".into(), "the broker maps only where it alone holds the container".into())
            }
            Conflict::Overlap { asked, mapped, is_foreign } => {
                let whose = if is_foreign { " of another member" } else { "" };
                (range(asked), format!("it overlaps {}{whose}", range(mapped)))
            }
        };
        Self::Conflict { what, why }
    }
}

impl From<Bad> for Error {
    fn from(bad: Bad) -> Self {
        match bad {
            Bad::NoDevice => Self::bad("devices", "at least one is needed"),
            Bad::NamedTwice(device) => Self::bad("devices", format!("{device} is named twice")),
            Bad::AllWithheld { group } => Self::bad(
                "withhold",
                format!(
                    "of group {group} all is withheld: a device of it to be used must be named too"
                ),
            ),
            Bad::EmptyRange => Self::bad("size", "is 0"),
            Bad::RangeTooLong => Self::bad("size", "the range goes beyond the last address"),
            Bad::CutsMapping { asked, mapped } => Self::bad(
                "size",
                format!(
                    "{} would cut {}; mappings are taken back whole",
                    range(asked),
                    range(mapped)
                ),
            ),
        }
    }
}

fn range(IovaRange { iova, size }: IovaRange) -> String {
    format!("0x{iova:x}-0x{:x}", iova.saturating_add(size.saturating_sub(1)))
}
