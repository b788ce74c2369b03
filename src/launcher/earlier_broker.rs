//! The broker of a launcher that was killed. It ends by itself once it sees that its links have; where it does
//! not get to that, or the end of its launcher hangs, the next launcher ends it. It is told by its number and
//! by when it was started, which stand in a file of the launcher's alone: a lock of the broker's own could be
//! passed on to others by one that was taken over.

use crate::sys::child::{pidfd, send_kill};
use crate::sys::process::ticks_at_start_of;
use nix::unistd::Pid;
use std::fs::OpenOptions;
use std::io::{Result, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tracing::{info, warn};

fn path(keepers: &Path) -> PathBuf {
    keepers.join("broker")
}

/// Notes which process is the broker.
pub(super) fn note(keepers: &Path, broker: Pid) {
    if let Err(error) = write(&path(keepers), broker) {
        // It ends by itself where it can.
        warn!(%error, "can't write down which process is the broker");
    }
}

fn write(path: &Path, broker: Pid) -> Result<()> {
    let started = ticks_at_start_of(broker.as_raw().unsigned_abs()).unwrap_or_default();
    let mut options = OpenOptions::new();
    // In place, and always as long: so it needs no room where all is taken.
    options.write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.custom_flags(nix::libc::O_NOFOLLOW).open(path)?;
    file.write_all(format!("{:>10} {started:>20}\n", broker.as_raw()).as_bytes())
}

/// Ends the broker of an earlier launcher, if it is still there. It makes no further step from here on,
/// whatever keeps its process from ending.
pub(super) fn end(keepers: &Path) {
    let Ok(text) = std::fs::read_to_string(path(keepers)) else { return };
    let Some((pid, started)) = parse(&text) else { return };
    // In this order: from the pidfd on it is the same process.
    let Ok(broker) = pidfd(pid) else { return };
    if ticks_at_start_of(pid.as_raw().unsigned_abs()) != Some(started) {
        return;
    }
    if send_kill(broker.as_fd()).is_ok() {
        info!(
            pid = pid.as_raw(),
            "the broker of an earlier launcher was still there, and is ended"
        );
    }
}

fn parse(text: &str) -> Option<(Pid, u64)> {
    let (pid, started) = text.trim().split_once(' ')?;
    let pid = pid.parse().ok().filter(|pid| *pid > 1)?;
    Some((Pid::from_raw(pid), started.trim().parse().ok().filter(|ticks| *ticks > 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_process_that_was_noted_is_ended_and_no_other_of_its_number() {
        let directory = tempfile::tempdir().unwrap();
        end(directory.path());
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        note(directory.path(), pid);
        let noted = std::fs::read_to_string(path(directory.path())).unwrap();
        let (_, started) = parse(&noted).unwrap();
        for other in [format!("{pid} {}", started + 1), format!("{pid}"), "-1 1".into(), "x".into()]
        {
            std::fs::write(path(directory.path()), other).unwrap();
            end(directory.path());
            assert!(child.try_wait().unwrap().is_none());
        }
        note(directory.path(), pid);
        end(directory.path());
        assert!(!child.wait().unwrap().success());
    }
}
