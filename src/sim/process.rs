//! A caller as `/proc` shows it: memory, limits and capabilities. Nothing it says about itself is
//! believed.

use super::machine::{Caller, Capability, Mm};
use nix::sys::socket::UnixCredentials;
use std::fs;
use std::sync::Arc;

/// The process that sent a message, by the credentials that the kernel put beside it.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pid: i32,
    uid: u32,
}

impl Process {
    pub(crate) fn new(sender: UnixCredentials) -> Self {
        Self { pid: sender.pid(), uid: sender.uid() }
    }

    /// A file of its directory in `/proc`; `None` where it is gone or out of reach.
    fn read(&self, name: &str) -> Option<String> {
        (self.pid > 0).then(|| fs::read_to_string(format!("/proc/{}/{name}", self.pid)).ok())?
    }
}

impl Caller for Process {
    fn keep(&self) -> Arc<dyn Caller + Send + Sync> {
        Arc::new(self.clone())
    }

    fn mm(&self) -> Mm {
        // The command in field 2 can hold anything, so fields are counted from its last bracket:
        // the start time is field 22.
        let started = self.read("stat").and_then(|stat| {
            let rest = stat.rsplit_once(')')?.1;
            rest.split_whitespace().nth(19)?.parse().ok()
        });
        Mm { pid: self.pid, started: started.unwrap_or(0) }
    }

    fn uid(&self) -> u32 {
        self.uid
    }

    fn capable(&self, capability: Capability) -> bool {
        let bit = match capability {
            Capability::DacOverride => 1,
            Capability::IpcLock => 14,
            Capability::SysRawio => 17,
            Capability::SysResource => 24,
        };
        // A capability counts in the simulation's own user namespace only, which stands for the
        // first one of a real kernel.
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
        if namespace("self") != namespace(&self.pid.to_string()) {
            return false;
        }
        let effective = self.read("status").and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        });
        effective.is_some_and(|set| set & (1 << bit) != 0)
    }

    fn memlock(&self) -> u64 {
        let limit = self.read("limits").and_then(|limits| {
            let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
            let soft = line.split_whitespace().next()?.to_owned();
            if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
        });
        limit.unwrap_or(0)
    }

    fn accessible(&self, start: u64, len: u64, write: bool) -> u64 {
        let maps = self.read("maps").unwrap_or_default();
        let mut reached = start;
        for (first, end, readable, writable) in maps.lines().filter_map(area) {
            if end <= reached {
                continue;
            }
            if first > reached || !readable || (write && !writable) {
                break;
            }
            reached = end;
            if reached - start >= len {
                break;
            }
        }
        (reached - start).min(len)
    }
}

/// A line of `/proc/PID/maps`: first address, end, readable, writable.
fn area(line: &str) -> Option<(u64, u64, bool, bool)> {
    let (range, rest) = line.split_once(' ')?;
    let (first, end) = range.split_once('-')?;
    let first = u64::from_str_radix(first, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    Some((first, end, rest.starts_with('r'), rest.as_bytes().get(1) == Some(&b'w')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Mapped;

    #[test]
    fn one_finds_oneself_in_proc() {
        let me = Process::new(UnixCredentials::new());
        let (_fd, memory) = Mapped::memfd(8192).unwrap();
        assert_eq!(me.accessible(memory.vaddr(), 8192, true), 8192);
        assert_eq!(me.accessible(8, 4096, false), 0);
        assert_ne!(me.mm().started, 0);
        assert!(me.memlock() > 0);
    }
}
