//! A file system whose server stops answering: just enough of FUSE for one file.

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::stat::Mode;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const ENOSYS: i32 = nix::libc::ENOSYS;

/// The mounted file system.
pub struct Fuse {
    directory: tempfile::TempDir,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The process whose requests, and its children's, are left without an answer.
    unanswered: Option<u32>,
    /// Which of its threads are waiting.
    waiting: BTreeSet<u32>,
    /// Whether the kernel writes back what was written, as it likes.
    writeback: bool,
    /// How many writes came; none is answered.
    writes: usize,
}

impl Fuse {
    /// Mounts it; `None`, with a word about it, where that is not allowed.
    pub fn mount() -> Option<Self> {
        Self::mount_with(false)
    }

    /// The same, where a written page is written back at the last close, and that is never answered:
    /// such a close can't even be killed.
    pub fn mount_with_writeback() -> Option<Self> {
        Self::mount_with(true)
    }

    fn mount_with(writeback: bool) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => return not_possible(&format!("/dev/fuse: {error}")),
        };
        let options =
            format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let mounted =
            mount(Some("test"), directory.path(), Some("fuse"), flags, Some(options.as_str()));
        if let Err(errno) = mounted {
            return not_possible(&format!("mount: {errno}"));
        }
        let state = Arc::new(Mutex::new(State { writeback, ..State::default() }));
        let served = Arc::clone(&state);
        std::thread::spawn(move || serve(device, &served));
        Some(Self { directory, state })
    }

    /// Where its one file is.
    pub fn file(&self) -> std::path::PathBuf {
        self.directory.path().join("file")
    }

    /// Opens its one file.
    pub fn open(&self) -> OwnedFd {
        open(&self.file(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).unwrap()
    }

    /// Writes to the file by a mapping, so that its last closes wait for the writeback: those of files
    /// that are closed here already. A file that is closed after this waits here.
    pub fn dirty(&self) {
        let file = File::from(self.open());
        let page = std::num::NonZeroUsize::new(4096).unwrap();
        let (access, shared) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED);
        #[allow(unsafe_code)]
        // SAFETY: a new mapping of a page, which nothing else refers to.
        let at = unsafe { mmap(None, page, access, shared, &file, 0) }.unwrap();
        // Its own close comes while all is clean; the mapping holds the file.
        drop(file);
        #[allow(unsafe_code)]
        // SAFETY: the page is mapped and stays so.
        unsafe {
            at.cast::<u8>().write_volatile(1);
        }
    }

    /// How many writes have not been answered.
    pub fn writes(&self) -> usize {
        self.state.lock().unwrap().writes
    }

    /// From now on, nothing that this process or a child of it asks is answered.
    pub fn stop_answering(&self, pid: u32) {
        self.state.lock().unwrap().unanswered = Some(pid);
    }

    /// Waits until one of them waits for an answer; returns the threads that do.
    pub fn waiting(&self) -> Vec<u32> {
        let waiting = || self.state.lock().unwrap().waiting.clone();
        super::until("somebody waits for the file system", || !waiting().is_empty());
        waiting().into_iter().collect()
    }

    /// Ends it: whoever waits gets an error.
    pub fn end(&self) {
        let _ = umount2(self.directory.path(), MntFlags::MNT_DETACH | MntFlags::MNT_FORCE);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.end();
    }
}

fn not_possible(why: &str) -> Option<Fuse> {
    super::skipped(&format!("no FUSE file system can be mounted here ({why}); root is needed"));
    None
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Answers requests: struct fuse_in_header is len, opcode (u32), unique, nodeid (u64), uid, gid,
/// pid, padding (u32).
fn serve(mut device: File, state: &Mutex<State>) {
    let mut request = vec![0; 1 << 17];
    while let Ok(len) = device.read(&mut request) {
        let (opcode, node) = (u32_at(&request, 4), request[16]);
        let unique = request[8..16].to_vec();
        let thread = u32_at(&request, 32);
        let body = &request[40..len];
        {
            let mut state = state.lock().unwrap();
            if state
                .unanswered
                .is_some_and(|pid| is_thread(pid, thread) || parent(thread) == Some(pid))
            {
                state.waiting.insert(thread);
                continue;
            }
            if opcode == WRITE {
                state.writes += 1;
                continue;
            }
        }
        let (error, answer) = match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => (0, init(body, state.lock().unwrap().writeback)),
            LOOKUP if body == b"file\0" => (0, entry()),
            LOOKUP => (-nix::libc::ENOENT, Vec::new()),
            GETATTR => (0, [&[0; 16][..], &attributes(node)].concat()),
            OPEN => (0, vec![0; 16]),
            READ => (0, vec![0; u32_at(body, 16) as usize]),
            STATFS => (0, vec![0; 80]),
            _ => (-ENOSYS, Vec::new()),
        };
        let mut reply = Vec::new();
        reply.extend((16 + answer.len() as u32).to_ne_bytes());
        reply.extend(error.to_ne_bytes());
        reply.extend(unique);
        reply.extend(answer);
        if device.write_all(&reply).is_err() && opcode == INIT {
            return;
        }
    }
}

/// Whether a thread is one of a process.
pub fn is_thread(pid: u32, thread: u32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}/task/{thread}")).exists()
}

/// The process that started the process of a thread.
fn parent(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// struct fuse_init_out of 7.31, with FUSE_WRITEBACK_CACHE or no features.
fn init(body: &[u8], writeback: bool) -> Vec<u8> {
    let mut out = vec![0; 64];
    out[0..4].copy_from_slice(&7u32.to_ne_bytes());
    out[4..8].copy_from_slice(&31u32.to_ne_bytes());
    out[8..12].copy_from_slice(&body[8..12]);
    out[12..16].copy_from_slice(&(u32::from(writeback) << 16).to_ne_bytes());
    out[20..24].copy_from_slice(&(1u32 << 16).to_ne_bytes());
    out
}

/// struct fuse_entry_out: node 2, nothing cached.
fn entry() -> Vec<u8> {
    let mut out = vec![0; 40];
    out[0..8].copy_from_slice(&2u64.to_ne_bytes());
    out.extend(attributes(2));
    out
}

/// struct fuse_attr: the root directory, or the file.
fn attributes(node: u8) -> Vec<u8> {
    let mut out = vec![0; 88];
    let mode: u32 = if node == 1 { 0o040_755 } else { 0o100_666 };
    out[0] = node;
    out[8..16].copy_from_slice(&4096u64.to_ne_bytes());
    out[60..64].copy_from_slice(&mode.to_ne_bytes());
    out[64..68].copy_from_slice(&1u32.to_ne_bytes());
    out
}
