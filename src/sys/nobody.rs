//! Being somebody who has no rights.

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// Has a process that runs as root run as the first of these users and groups that can be had, for
/// good; any other process stays who it is.
///
/// # Errors
/// What setgroups(2), setresgid(2) or setresuid(2) says: a user namespace may have none of them.
pub fn become_one_of(ids: &[u32]) -> nix::Result<()> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    setgroups(&[])?;
    let mut result = Err(Errno::EINVAL);
    for &id in ids {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        result = setresgid(gid, gid, gid).and_then(|()| setresuid(uid, uid, uid));
        if result.is_ok() {
            break;
        }
    }
    result
}
