//! Landlock: which files a process can open for the rest of its life.

#![allow(unsafe_code)]

use super::Error;
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use nix::errno::Errno;
use nix::libc;

/// As much of it as there is, up to here: what a later kernel adds is not denied before it was tried.
const ABI: ABI = ABI::V6;

/// `LANDLOCK_CREATE_RULESET_VERSION`
const VERSION: libc::c_uint = 1;

/// Has this process, and all that it starts, open nothing from here on, but read what is beneath these
/// paths; and neither signal others nor look into them. Which of that a kernel denies depends on what it
/// knows of Landlock ([`version`]); opening files it denies in any case.
///
/// # Errors
/// Which call failed.
pub fn read_only(paths: &[&str]) -> super::Result<()> {
    let failed = |error: RulesetError| {
        let errno = errno(&error);
        let mut failed = Error::new("landlock_restrict_self", paths.join(" "), errno);
        failed.note = Some(error.to_string().into());
        failed
    };
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let enforced = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI))
        .and_then(|rules| rules.scope(Scope::from_all(ABI)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(path_beneath_rules(paths, read)))
        .and_then(|rules| rules.restrict_self())
        .map_err(failed)?;
    match enforced.ruleset {
        RulesetStatus::NotEnforced => {
            Err(Error::new("landlock_create_ruleset", paths.join(" "), Errno::EOPNOTSUPP))
        }
        _ => Ok(()),
    }
}

fn errno(error: &(dyn std::error::Error + 'static)) -> Errno {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(code) =
            error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error)
        {
            return Errno::from_raw(code);
        }
        next = error.source();
    }
    Errno::EINVAL
}

/// Which version of Landlock the kernel has.
///
/// # Errors
/// ENOSYS, EOPNOTSUPP: none; EPERM: a filter that this process is under does not let it ask.
pub fn version() -> Result<u32, Errno> {
    // SAFETY: it reads nothing through the null pointer, with this flag.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION)
    };
    Errno::result(version).map(|version| u32::try_from(version).unwrap_or(0))
}
