//! What a process gives up before it begins.

use crate::process::role::{Helper, Role, User};
use crate::sys::capabilities::{
    DAC_READ_SEARCH, IPC_LOCK, SYS_PTRACE, SYS_RAWIO, SYS_RESOURCE, keep_only,
};
use nix::errno::Errno;
use nix::sys::prctl::{set_dumpable, set_keepcaps, set_no_new_privs};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// The broker's user where this system has none: in a range that nobody gives out (systemd's
/// UIDS-GIDS.md), because who runs as the same user could stop it.
const BROKER: u32 = 0xfffe_4654;
/// The user that has no rights, likewise.
const NOBODY: u32 = 0xfffe_4653;
/// Where a user namespace has none of these.
const OVERFLOW: u32 = 65534;

/// Whether the kernel gives groups without an IOMMU.
const NOIOMMU: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// The name of the broker's user, where the system has one.
const BROKER_NAME: &str = "vfio-broker";

/// Whom processes run as.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Users {
    broker: (Uid, Gid),
}

impl Users {
    /// Looks for the broker's user.
    pub(super) fn find() -> Self {
        let known = nix::unistd::User::from_name(BROKER_NAME).ok().flatten();
        let known = known.filter(|user| !user.uid.is_root()).map(|user| (user.uid, user.gid));
        Self { broker: known.unwrap_or((Uid::from_raw(BROKER), Gid::from_raw(BROKER))) }
    }

    /// Gives up, in the process of a role, what that role does not need.
    ///
    /// # Errors
    /// EPERM, EINVAL: this process may not run as others.
    pub(crate) fn confine(&self, role: Role) -> Result<(), Errno> {
        set_no_new_privs()?;
        // What it knows is nobody else's.
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        if !Uid::effective().is_root() {
            return Ok(());
        }
        let nobody = |id: u32| (Uid::from_raw(id), Gid::from_raw(id));
        let user = match role.user() {
            User::Same => return keep_capabilities(role),
            User::Broker => self.broker,
            User::Nobody => nobody(NOBODY),
            User::Overflow => nobody(OVERFLOW),
        };
        setgroups(&[])?;
        let looks = role == Role::Helper(Helper::Holders);
        set_keepcaps(looks)?;
        become_user(user).or_else(|_| become_user(nobody(OVERFLOW)))?;
        match role {
            // It looks into its own /proc, which would be root's.
            Role::Broker => set_dumpable(true),
            // To see other users' processes takes both; where root has not got them it sees less, and
            // says so.
            _ if looks => keep_only(&[SYS_PTRACE, DAC_READ_SEARCH]),
            _ => Ok(()),
        }
    }
}

/// Of what root may, a keeper raises limits: its own, for what it maps, and those of its clients; and it
/// opens groups without an IOMMU where the kernel has such. The files that it opens are root's.
fn keep_capabilities(role: Role) -> Result<(), Errno> {
    if role != Role::Keeper {
        return Ok(());
    }
    let mut kept = vec![SYS_RESOURCE];
    // Whose limit would hold is not this process's tenant; the broker keeps count by the policy.
    if setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_err() {
        kept.push(IPC_LOCK);
    }
    if std::fs::read(NOIOMMU).is_ok_and(|is_on| is_on.starts_with(b"Y")) {
        kept.push(SYS_RAWIO);
    }
    keep_only(&kept)
}

fn become_user((uid, gid): (Uid, Gid)) -> Result<(), Errno> {
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}
