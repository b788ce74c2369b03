//! What is to be read of another process in `/proc` without waiting for it.

use nix::unistd::{SysconfVar, sysconf};
use std::fs::read_to_string;
use std::time::{SystemTime, UNIX_EPOCH};

/// How much memory a process has at the moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All pages that are there.
    pub resident: u64,
    /// Those of files among them.
    pub shared: u64,
}

/// The memory of a process, from `statm`; `None` where it can't be read. `smaps_rollup` would say more,
/// and waits for a lock that a process which hangs in a page fault may hold.
pub fn memory(pid: u32) -> Option<Memory> {
    let page = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
    resident(&read_to_string(format!("/proc/{pid}/statm")).ok()?, page)
}

fn resident(statm: &str, page: u64) -> Option<Memory> {
    let mut pages = statm.split_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some(Memory { resident: resident * page, shared: shared * page })
}

/// When a process was started, in seconds since 1970; `None` where that can't be read.
pub fn started(pid: u32) -> Option<u64> {
    let ticks =
        u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok().filter(|ticks| *ticks > 0)?;
    let uptime = read_to_string("/proc/uptime").ok()?;
    let uptime: u64 = uptime.split('.').next()?.parse().ok()?;
    let age = uptime.checked_sub(ticks_at_start_of(pid)? / ticks)?;
    now().checked_sub(age)
}

/// When a process was started, in ticks of the kernel's clock: with its number it is that process's alone until
/// the next boot. `None` where there is no such process.
pub fn ticks_at_start_of(pid: u32) -> Option<u64> {
    ticks_at_start(&read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Seconds since 1970, for people to read: what is decided by it is another thing once the clock is set.
#[allow(clippy::disallowed_methods)]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The name comes second, in parentheses, and can hold anything.
fn ticks_at_start(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_was_started() {
        let own = std::process::id();
        let memory = memory(own).unwrap();
        assert!(memory.resident > memory.shared, "{memory:?}");
        let age = now() + 1 - started(own).unwrap();
        assert!(age < 86_400, "{age} s");
        assert_eq!(super::memory(u32::MAX), None);
        assert_eq!(started(u32::MAX), None);
    }

    #[test]
    fn a_name_does_not_mislead() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1";
        assert_eq!(ticks_at_start(stat), Some(4242));
        assert_eq!(ticks_at_start("7 (a"), None);
        let memory = Memory { resident: 8192, shared: 4096 };
        assert_eq!(resident("9 2 1 0 0 0 0\n", 4096), Some(memory));
        assert_eq!(resident("", 4096), None);
    }
}
