//! What `/proc` shows of processes.

use super::files::{Mapping, OpenFile};
use crate::sys::node::device_number;
use nix::errno::Errno;
use std::fs::{File, read_dir, read_link, read_to_string};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// The longest name of a command, in characters: Linux keeps 15.
const MOST_NAME: usize = 16;

/// A `/proc`, which in tests is a directory that looks like it.
pub(super) struct Proc {
    root: PathBuf,
}

/// Whether a process could be looked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looked {
    Into,
    /// It has ended meanwhile, or is a thread of the kernel's.
    Nothing,
    /// That is not allowed.
    Hidden,
}

impl Proc {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Whether all of the machine's processes are in it.
    pub(super) fn has_all(&self) -> bool {
        let own = read_link(self.root.join("self/ns/pid"));
        own.is_ok_and(|own| own == Path::new(super::INITIAL_NAMESPACE))
    }

    /// All but this one.
    pub(super) fn processes(&self) -> Vec<u32> {
        let own = std::process::id();
        numbers(&self.root).unwrap_or_default().into_iter().filter(|pid| *pid != own).collect()
    }

    fn of(&self, pid: u32, what: &str) -> PathBuf {
        self.root.join(format!("{pid}/{what}"))
    }

    /// The user that a process runs as, and its name.
    pub(super) fn who(&self, pid: u32) -> Option<(u32, String)> {
        let status = std::fs::read(self.of(pid, "status")).ok()?;
        let status = String::from_utf8_lossy(&status);
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
        let uid = field("Uid:")?.split_whitespace().next()?.parse().ok()?;
        Some((uid, field("Name:\t")?.chars().take(MOST_NAME).collect()))
    }

    /// Shows each open file of a process: those of its first thread, which all share as a rule.
    pub(super) fn files(&self, pid: u32, see: impl FnMut(&OpenFile)) -> Looked {
        match self.open_files(&self.of(pid, ""), see) {
            Ok(()) => Looked::Into,
            Err(Errno::EACCES | Errno::EPERM) if self.has_memory(pid) => Looked::Hidden,
            Err(_) => Looked::Nothing,
        }
    }

    /// Only threads of the kernel's, and those that have ended, have none.
    fn has_memory(&self, pid: u32) -> bool {
        let status = std::fs::read(self.of(pid, "status")).unwrap_or_default();
        status.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"VmSize:"))
    }

    /// The same for its other threads: one that has unshared its files has its own, and of a process whose
    /// first thread has ended the others show what is open.
    pub(super) fn threads_files(&self, pid: u32, mut see: impl FnMut(&OpenFile)) {
        for thread in numbers(&self.of(pid, "task")).unwrap_or_default() {
            if thread != pid {
                let _ = self.open_files(&self.of(pid, &format!("task/{thread}")), &mut see);
            }
        }
    }

    fn open_files(&self, of: &Path, mut see: impl FnMut(&OpenFile)) -> Result<(), Errno> {
        for number in numbers(&of.join("fd"))? {
            let path = of.join(format!("fd/{number}"));
            let Ok(link) = read_link(&path) else { continue };
            let file = OpenFile::new(&link.to_string_lossy(), || device_number(&path));
            let info = || read_to_string(of.join(format!("fdinfo/{number}"))).unwrap_or_default();
            file.map(|file| file.with_info(info)).iter().for_each(&mut see);
        }
        Ok(())
    }

    /// Shows each mapping of a VFIO file in the memory of a process. Waits for as long as that changes its
    /// mappings, which may be for ever.
    pub(super) fn mappings(&self, pid: u32, mut see: impl FnMut(&Mapping)) {
        let Ok(maps) = File::open(self.of(pid, "maps")) else { return };
        for line in BufReader::new(maps).split(b'\n').map_while(Result::ok) {
            Mapping::read(&String::from_utf8_lossy(&line)).iter().for_each(&mut see);
        }
    }

    /// Whether files are in flight in the queue of a socket that a process has.
    pub(super) fn has_queued(&self, pid: u32) -> bool {
        let files = self.of(pid, "fd");
        numbers(&files).unwrap_or_default().iter().any(|number| {
            let link = read_link(files.join(number.to_string()));
            link.is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
                && read_to_string(self.of(pid, &format!("fdinfo/{number}")))
                    .is_ok_and(|info| super::files::has_queued(&info))
        })
    }
}

/// The entries of a directory that are numbers, as processes, threads and open files are.
fn numbers(directory: &Path) -> Result<Vec<u32>, Errno> {
    let failed = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
    let entries = read_dir(directory).map_err(failed)?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut numbers: Vec<u32> = names.collect();
    numbers.sort_unstable();
    Ok(numbers)
}
