//! Where kernels differ: one profile a kernel, each difference a named fact.

use nix::errno::Errno;
use serde::Deserialize;
use std::str::FromStr;

/// A kernel whose answers are simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub enum Profile {
    /// Linux 6.1.
    #[serde(rename = "6.1")]
    V6_1,
    /// Linux 6.12.
    #[serde(rename = "6.12")]
    V6_12,
    /// Linux 7.2.
    #[serde(rename = "7.2")]
    V7_2,
}

impl Profile {
    /// All of them, oldest first.
    pub const ALL: [Profile; 3] = [Profile::V6_1, Profile::V6_12, Profile::V7_2];

    /// As it is written in files.
    pub fn name(self) -> &'static str {
        match self {
            Profile::V6_1 => "6.1",
            Profile::V6_12 => "6.12",
            Profile::V7_2 => "7.2",
        }
    }

    /// What `VFIO_GROUP_SET_CONTAINER` says to an fd that is no container.
    pub(crate) fn foreign_container(self) -> Errno {
        if self < Profile::V6_12 { Errno::EINVAL } else { Errno::EBADFD }
    }

    /// Whether `VFIO_TYPE1_NESTING_IOMMU` exists; it was removed in 6.13.
    pub(crate) fn has_nesting(self) -> bool {
        self < Profile::V7_2
    }

    /// Whether a device leaves sysfs and its group before its driver waits for the last close; since
    /// 6.6.
    pub(crate) fn hides_before_waiting(self) -> bool {
        self >= Profile::V6_12
    }

    /// Whether MSI-X vectors can be added while it is on, as on x86 since 6.5.
    pub(crate) fn has_dynamic_msix(self) -> bool {
        self >= Profile::V6_12
    }

    /// Whether capabilities are padded to 8 bytes, and structs with them; since 6.6.
    pub(crate) fn pads_capabilities(self) -> bool {
        self >= Profile::V6_12
    }

    /// Whether type1 tells addresses that overflow (EOVERFLOW) from other wrong ones (EINVAL).
    pub(crate) fn knows_overflow(self) -> bool {
        self >= Profile::V7_2
    }

    /// Whether a hot reset without groups is refused before it is asked whether the bus can be
    /// reset at all.
    pub(crate) fn counts_groups_first(self) -> bool {
        self >= Profile::V6_12
    }

    /// Whether the lab's kernel of this version has iommufd and cdevs: Debian's own have not, 6.12
    /// is built with them.
    pub(crate) fn has_cdev(self) -> bool {
        self == Profile::V6_12
    }

    /// Whether iommufd maps files, since 6.13, and can change the process that is charged, since
    /// 6.14.
    pub(crate) fn maps_files(self) -> bool {
        self >= Profile::V7_2
    }

    /// Whether `VFIO_DEVICE_BIND_IOMMUFD` asks for VF tokens, since 6.17: before, a cdev needs none.
    pub(crate) fn binds_with_token(self) -> bool {
        self >= Profile::V7_2
    }
}

impl FromStr for Profile {
    type Err = String;

    /// Takes a release as uname(2) gives it, or a profile's name.
    fn from_str(release: &str) -> Result<Self, String> {
        let fits = |profile: &&Profile| {
            release
                .strip_prefix(profile.name())
                .is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
        };
        let found = Profile::ALL.iter().find(fits).copied();
        found.ok_or_else(|| format!("no profile for a kernel {release}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_names_its_profile() {
        assert_eq!("6.1.0-56-amd64".parse(), Ok(Profile::V6_1));
        assert_eq!("6.12.117".parse(), Ok(Profile::V6_12));
        assert_eq!("7.2".parse(), Ok(Profile::V7_2));
        assert!("6.18.44".parse::<Profile>().is_err());
    }
}
