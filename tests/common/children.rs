//! The processes that a daemon's launcher has started.

#![allow(dead_code)] // each program uses its part

/// The children of a process that have this name.
pub fn children(pid: u32, name: &str) -> Vec<u32> {
    let all = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let all = all.unwrap_or_default();
    let all = all.split_whitespace().map(|pid| pid.parse::<u32>().unwrap());
    let is = |pid: &u32| {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.trim_end() == name
    };
    all.filter(is).collect()
}

/// A field of a process's status; `None` once that has ended.
pub fn status(pid: u32, field: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:\t")))?;
    Some(line.to_owned())
}

/// The process that talks to a daemon's clients; `pid` is its launcher's.
pub fn broker(pid: u32) -> Option<u32> {
    children(pid, "vfiob-broker").into_iter().next()
}
