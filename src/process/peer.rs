//! Who is at the other end, as the kernel tells it; never what the peer says.

use crate::policy::Peer;
use crate::sys::peer;
use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use std::os::fd::{AsFd, BorrowedFd};

/// Describes the peer of a connected socket. The unit is only looked for if the policy names units.
///
/// # Errors
/// See getsockopt(2), SO_PEERCRED and its kin.
pub fn describe(socket: BorrowedFd<'_>, with_unit: bool) -> Result<Peer, Errno> {
    let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
    let pid = credentials.pid();
    Ok(Peer {
        uid: credentials.uid(),
        gid: credentials.gid(),
        groups: peer::groups(socket)?,
        pid,
        unit: if with_unit { unit(socket, pid)? } else { None },
        label: peer::label(socket)?,
    })
}

/// The system unit that the process runs in which connected, where that is certain: a pid may have
/// passed to another process, so the pidfd must show the first one alive before and after.
fn unit(socket: BorrowedFd<'_>, pid: i32) -> Result<Option<String>, Errno> {
    let Some(pidfd) = peer::pidfd(socket)? else { return Ok(None) };
    if pid <= 0 || !peer::is_alive(pidfd.as_fd())? {
        return Ok(None);
    }
    let Ok(cgroup) = std::fs::read_to_string(format!("/proc/{pid}/cgroup")) else {
        return Ok(None);
    };
    Ok(system_unit(&cgroup)
        .filter(|_| peer::is_alive(pidfd.as_fd()) == Ok(true))
        .map(str::to_owned))
}

/// The system unit in a `/proc/PID/cgroup` of cgroup v2: what is below the slices. Below
/// `user.slice` there is none, since users name those units as they like; below a service the names
/// are the service's own.
fn system_unit(cgroup: &str) -> Option<&str> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut parts = path.split('/').skip_while(|part| part.ends_with(".slice"));
    let user = path == "user.slice" || path.starts_with("user.slice/");
    let unit = parts.next()?;
    let is_unit = unit.ends_with(".service") || unit.ends_with(".scope");
    (is_unit && !user).then_some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn this_process_is_described() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = describe(ours.as_fd(), true).unwrap();
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(peer.gid, nix::unistd::getegid().as_raw());
        assert_eq!(peer.pid, std::process::id() as i32);
    }

    #[test]
    fn only_system_units_count() {
        let unit = |path: &str| {
            system_unit(&format!("1:name=x:/y.service\n0::{path}\n")).map(str::to_owned)
        };
        assert_eq!(unit("/system.slice/libvirtd.service").as_deref(), Some("libvirtd.service"));
        let nested = "/system.slice/system-vm.slice/vm@7.service/evil.service";
        assert_eq!(unit(nested).as_deref(), Some("vm@7.service"));
        assert_eq!(unit("/init.scope").as_deref(), Some("init.scope"));
        let user = "/user.slice/user-1000.slice/user@1000.service/app.slice/libvirtd.service";
        assert_eq!(unit(user), None);
        assert_eq!(unit("/user.slice/user-1000.slice/session-2.scope"), None);
        assert_eq!(unit("/"), None);
        assert_eq!(unit("/docker/0123"), None);
        assert_eq!(system_unit("4:cpu:/system.slice/x.service\n"), None, "cgroup v1");
    }
}
