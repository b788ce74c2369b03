//! The users and groups of this machine, from whatever its name service reads them.

use crate::policy::Names;
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use std::ffi::CString;

/// Looks users and groups up through the C library: may read files and ask daemons, so not on an
/// event loop.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemUsers;

impl Names for SystemUsers {
    fn uid(&self, user: &str) -> Option<u32> {
        User::from_name(user).ok().flatten().map(|user| user.uid.as_raw())
    }

    fn gid(&self, group: &str) -> Option<u32> {
        Group::from_name(group).ok().flatten().map(|group| group.gid.as_raw())
    }
}

impl SystemUsers {
    /// The groups that a user has after logging in, its own first; none where there is no such
    /// user.
    pub fn groups_of(&self, uid: u32) -> Vec<u32> {
        let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return Vec::new() };
        let Ok(name) = CString::new(user.name) else { return Vec::new() };
        let groups = getgrouplist(&name, user.gid).unwrap_or_else(|_| vec![user.gid]);
        let rest = groups.into_iter().map(Gid::as_raw).filter(|gid| *gid != user.gid.as_raw());
        std::iter::once(user.gid.as_raw()).chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_there_and_nonsense_is_not() {
        assert_eq!(SystemUsers.uid("root"), Some(0));
        assert_eq!(SystemUsers.gid("root"), Some(0));
        assert_eq!(SystemUsers.uid("no such user"), None);
        assert_eq!(SystemUsers.uid("nul\0"), None);
        assert_eq!(SystemUsers.groups_of(0).first(), Some(&0));
        assert!(SystemUsers.groups_of(u32::MAX - 1).is_empty());
    }
}
