//! Who still has a group or a device open, as far as `/proc` shows it: a process of its own, which has the
//! right to look into all others and nothing else, answers the broker, and ends.
//!
//! It opens no file of the processes that it looks into, and asks no file system about one: what a link says
//! is compared first, and a node's number is asked for without asking its file system. What it reads can
//! hang all the same (`maps` waits for a lock of the process), so it tells what it has before that.

mod files;
mod found;
mod proc;

use crate::process::holders::{MOST_BYTES, Report, Search};
use crate::sys::fdpass;
use found::Found;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use proc::{Looked, Proc};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// The namespace of processes that has all of a machine's in it.
const INITIAL_NAMESPACE: &str = "pid:[4026531836]";

/// Reads what is looked for, and says who has it.
///
/// # Errors
/// What a call on the link says.
pub fn answer(link: &OwnedFd, is_simulated: bool) -> Result<(), Errno> {
    let mut buffer = vec![0; MOST_BYTES];
    let got = fdpass::receive_all(link.as_fd(), &mut buffer, MsgFlags::empty())?;
    let search = serde_json::from_slice(&buffer[..got.len]).map_err(|_| Errno::EPROTO)?;
    if is_simulated {
        let why = "the machine is a simulated one, whose open files are sockets to /proc";
        return tell(link, &Report { why: Some(why.into()), ..Report::default() });
    }
    look(Path::new("/proc"), &search, |report| tell(link, report))
}

fn tell(link: &OwnedFd, report: &Report) -> Result<(), Errno> {
    // It has no maps and no floats: it can be written.
    let bytes = serde_json::to_vec(report).unwrap_or_default();
    fdpass::send(link.as_fd(), &bytes, &[], MsgFlags::empty()).map(drop)
}

/// Looks through all processes: at their open files, and then, where these don't say who has a group, at
/// their memory, the files of each of their threads, and the queues of their sockets.
fn look<E>(
    root: &Path,
    search: &Search,
    mut tell: impl FnMut(&Report) -> Result<(), E>,
) -> Result<(), E> {
    let proc = Proc::new(root);
    let mut found = Found::new(search);
    let mut hidden = 0;
    let processes = proc.processes();
    for pid in &processes {
        if !search.keepers.contains(pid) {
            let looked = proc.files(*pid, |file| found.look_at(*pid, file));
            hidden += usize::from(looked == Looked::Hidden);
        }
    }
    tell(&found.report(&proc, hidden, false))?;
    if !found.explains_all() {
        for pid in processes.iter().filter(|pid| !search.keepers.contains(pid)) {
            proc.threads_files(*pid, |file| found.look_at(*pid, file));
            proc.mappings(*pid, |mapping| found.look_at_mapping(*pid, mapping));
            if proc.has_queued(*pid) {
                found.add_queue(*pid);
            }
        }
    }
    tell(&found.report(&proc, hidden, true))
}

#[cfg(test)]
mod tests;
