//! What a process gives up before it begins: rights, files and system calls that its role has no use for.

use super::StartError;
use super::options::SandboxMode;
use crate::process::calls::HOSTILE;
use crate::process::role::{Helper, Role, User};
use crate::sys::capabilities::{
    DAC_READ_SEARCH, IPC_LOCK, SYS_ADMIN, SYS_PTRACE, SYS_RAWIO, SYS_RESOURCE, keep_only,
};
use crate::sys::seccomp::{self, Filter, SystemCall};
use crate::sys::{self, landlock};
use nix::errno::Errno;
use nix::sys::prctl::{set_dumpable, set_keepcaps, set_no_new_privs};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use std::ffi::CStr;
use std::fmt;
use std::sync::Arc;

/// The broker's user where this system has none: in a range that nobody gives out (systemd's
/// UIDS-GIDS.md), because who runs as the same user could stop it.
const BROKER: u32 = 0xfffe_4654;
/// The user that has no rights, likewise.
const NOBODY: u32 = 0xfffe_4653;
/// Where a user namespace has none of these.
const OVERFLOW: u32 = 65534;

/// Whether the kernel gives groups without an IOMMU.
const NOIOMMU: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// What each process gives up, as far as this system can.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    broker: (Uid, Gid),
    /// The filters of system calls, or why there are none.
    filters: Result<Arc<Filters>, String>,
    /// The version of Landlock, or why there is none.
    landlock: Result<u32, String>,
}

/// The filters of all roles, which a child has with the launcher's memory.
#[derive(Debug)]
struct Filters {
    hostile: Filter,
    allowed: Vec<(Role, Filter)>,
}

impl Sandbox {
    /// Looks for what this system can. What is found is in force in each process from then on, or it does
    /// not begin.
    ///
    /// # Errors
    /// What is missing of what must be there.
    pub(super) fn find(mode: SandboxMode) -> Result<Self, StartError> {
        let broker = (Uid::from_raw(BROKER), Gid::from_raw(BROKER));
        let (filters, landlock) = match mode {
            SandboxMode::Off => (Err("--sandbox=off".to_owned()), Err("--sandbox=off".to_owned())),
            SandboxMode::Try | SandboxMode::Require => (filters().map(Arc::new), landlock()),
        };
        let sandbox = Self { broker, filters, landlock };
        match mode {
            SandboxMode::Require if sandbox.filters.is_err() || sandbox.landlock.is_err() => {
                Err(StartError::Sandbox(sandbox.to_string()))
            }
            _ => Ok(sandbox),
        }
    }

    /// Brokers run as this user from here on, if there is one, instead of one that nobody has.
    pub(super) fn set_broker(&mut self, user: Option<(u32, u32)>) {
        if let Some((uid, gid)) = user {
            self.broker = (Uid::from_raw(uid), Gid::from_raw(gid));
        }
    }

    /// Gives up, in the process of a role, what that role does not need.
    ///
    /// # Errors
    /// Which call failed. The process may do more than its role then, and must not begin.
    pub(crate) fn confine(&self, role: Role) -> sys::Result<()> {
        let failed = |call| failed(role, call);
        set_no_new_privs().map_err(failed("PR_SET_NO_NEW_PRIVS"))?;
        // What it knows is nobody else's.
        setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("setrlimit"))?;
        self.limit_files(role)?;
        if Uid::effective().is_root() {
            self.give_up_root(role)?;
        }
        // The last: it would refuse the others.
        self.filter_calls(role)
    }

    fn give_up_root(&self, role: Role) -> sys::Result<()> {
        let failed = |call| failed(role, call);
        let nobody = |id: u32| (Uid::from_raw(id), Gid::from_raw(id));
        let user = match role.user() {
            User::Same => return keep_capabilities(role).map_err(failed("capset")),
            User::Broker => self.broker,
            User::Nobody => nobody(NOBODY),
            User::Overflow => nobody(OVERFLOW),
        };
        setgroups(&[]).map_err(failed("setgroups"))?;
        let looks = role == Role::Helper(Helper::Holders);
        set_keepcaps(looks).map_err(failed("PR_SET_KEEPCAPS"))?;
        let became = become_user(user).or_else(|_| become_user(nobody(OVERFLOW)));
        became.map_err(failed("setresuid"))?;
        match role {
            // It looks into its own /proc, which would be root's.
            Role::Broker => set_dumpable(true).map_err(failed("PR_SET_DUMPABLE")),
            // To see other users' processes takes both; where root has not got them it sees less, and
            // says so.
            _ if looks => keep_only(&[SYS_PTRACE, DAC_READ_SEARCH]).map_err(failed("capset")),
            _ => Ok(()),
        }
    }

    fn limit_files(&self, role: Role) -> sys::Result<()> {
        match (&self.landlock, role.reads()) {
            (Ok(_), Some(paths)) => landlock::read_only(paths),
            _ => Ok(()),
        }
    }

    fn filter_calls(&self, role: Role) -> sys::Result<()> {
        let Ok(filters) = &self.filters else { return Ok(()) };
        let install = |filter: &Filter| filter.install().map_err(failed(role, "seccomp"));
        install(&filters.hostile)?;
        let allowed = filters.allowed.iter().find(|(known, _)| *known == role);
        allowed.map_or(Ok(()), |(_, filter)| install(filter))
    }
}

impl fmt::Display for Sandbox {
    /// What is in force for whom, or why it is not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |is_in: fn(&Role) -> bool| {
            let names = Role::ALL.iter().filter(|role| is_in(role)).map(|role| role.name());
            let names: Vec<_> = names.map(CStr::to_string_lossy).collect();
            names
                .iter()
                .map(|name| name.trim_start_matches("vfiob-"))
                .collect::<Vec<_>>()
                .join(", ")
        };
        match &self.filters {
            Ok(_) => write!(f, "system calls filtered in {}; ", of(|role| role.calls().is_some()))?,
            Err(why) => write!(f, "system calls not filtered ({why}); ")?,
        }
        match &self.landlock {
            Ok(version) => {
                let limited = of(|role| role.reads().is_some());
                write!(f, "files limited in {limited} (Landlock {version})")
            }
            Err(why) => write!(f, "files not limited ({why})"),
        }
    }
}

fn filters() -> Result<Filters, String> {
    let lacking = |errno: Errno| format!("seccomp: {} ({errno:?})", errno.desc());
    seccomp::is_available().map_err(lacking)?;
    let lists = Role::ALL.into_iter().filter_map(|role| role.calls().map(|lists| (role, lists)));
    let compile = |(role, lists): (Role, &[&[SystemCall]])| {
        let calls = lists.iter().flat_map(|list| list.iter().copied());
        Ok((role, Filter::allow(calls)?))
    };
    Ok(Filters {
        hostile: Filter::kill_for(HOSTILE)?,
        allowed: lists.map(compile).collect::<Result<_, String>>()?,
    })
}

fn landlock() -> Result<u32, String> {
    landlock::version().map_err(|errno| {
        format!(
            "landlock_create_ruleset: {} ({errno:?}): it takes Linux 5.13, and \"landlock\" in its lsm=",
            errno.desc()
        )
    })
}

/// An error of a role's process.
fn failed(role: Role, call: &'static str) -> impl FnOnce(Errno) -> sys::Error {
    move |errno| {
        let process = format!("the process {}", role.name().to_string_lossy());
        sys::Error::new(call, process, errno)
    }
}

/// Of what root may, a keeper raises limits: its own, for what it maps, and those of its clients; and it
/// opens groups without an IOMMU where the kernel has such. The files that it opens are root's. Who reads
/// the policy finds it wherever it is, and the devices' serial numbers.
fn keep_capabilities(role: Role) -> Result<(), Errno> {
    let kept = match role {
        Role::Keeper => {
            let mut kept = vec![SYS_RESOURCE];
            // Whose limit would hold is not this process's tenant; the broker keeps count by the policy.
            if setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_err() {
                kept.push(IPC_LOCK);
            }
            if std::fs::read(NOIOMMU).is_ok_and(|is_on| is_on.starts_with(b"Y")) {
                kept.push(SYS_RAWIO);
            }
            kept
        }
        Role::PolicyReader => vec![DAC_READ_SEARCH, SYS_ADMIN],
        _ => return Ok(()),
    };
    keep_only(&kept)
}

fn become_user((uid, gid): (Uid, Gid)) -> Result<(), Errno> {
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

#[cfg(test)]
mod tests;
