//! A keeper's directory: its socket, its lock, and what somebody else would have to know if it hung or
//! were killed.
//!
//! `keepers/ID/lock` is locked for as long as the keeper's process has files. `keepers/ID/state` is
//! replaced as a whole, before each call that matters and after. `keepers/ID/socket` takes links from
//! the next broker. All of it is its owner's alone.

use crate::kernel::{Error, Result};
use crate::process::keeper::{LeaseState, Saved, VERSION};
use crate::process::kept::KeptKeeper;
use crate::process::launcher::Standing;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A new number with each start of the kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How many links may wait to be taken in.
const QUEUE: i32 = 8;

/// The directory of all keepers' directories.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

/// A keeper's own directory.
#[derive(Debug)]
pub(super) struct StateFile {
    directory: PathBuf,
    boot: String,
    _lock: Flock<File>,
}

impl Place {
    /// That directory, made if there is none; whose files others could replace is no good.
    ///
    /// # Errors
    /// Which call failed; EPERM where others can write there.
    pub fn new(directory: &Path) -> Result<Self> {
        let failed = |call| move |error| io(call, directory, &error);
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory).map_err(failed("mkdir"))?;
        let found = std::fs::symlink_metadata(directory).map_err(failed("stat"))?;
        let own = found.uid() == nix::unistd::geteuid().as_raw();
        if !found.is_dir() || !own || found.mode() & 0o022 != 0 {
            return Err(Error::new("stat", directory.to_string_lossy(), Errno::EPERM));
        }
        Ok(Self(directory.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where the policy in force is, as the launcher compiled it.
    pub fn policy(&self) -> PathBuf {
        self.0.join("policy")
    }

    /// The names of the keepers that have a directory.
    ///
    /// # Errors
    /// What reading the directory says.
    pub fn names(&self) -> Result<Vec<String>> {
        let failed = |error| io("readdir", &self.0, &error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            names.extend(name.into_string().ok().filter(|name| is_name(name)));
        }
        names.sort();
        Ok(names)
    }

    /// The directory of a keeper of this name, which comes from the broker: no other path.
    fn directory(&self, name: &str) -> Result<PathBuf> {
        match is_name(name) {
            true => Ok(self.0.join(name)),
            false => Err(Error::new("open", format!("a keeper called {name:?}"), Errno::EINVAL)),
        }
    }

    /// What a keeper of [`names`](Self::names) wrote last.
    pub fn kept(&self, name: String) -> KeptKeeper {
        let directory = self.0.join(&name);
        // In this order: one that is dead writes nothing any more.
        let is_alive = is_locked(&directory);
        let path = directory.join("state");
        let state = read_own(&path).map_err(|error| error.to_string());
        KeptKeeper { name, path: path.to_string_lossy().into_owned(), is_alive, state }
    }

    /// Takes away the directories of keepers that are over: of another start of the kernel, or without a
    /// lease. Only while nobody starts keepers: one that begins is not alive yet.
    ///
    /// # Errors
    /// What reading the directory says.
    pub fn clear(&self) -> Result<()> {
        let boot = boot_id().map_err(|error| io("read", Path::new(BOOT_ID), &error))?;
        for directory in self.names()?.into_iter().map(|name| self.0.join(name)) {
            if is_locked(&directory) {
                continue;
            }
            let is_over = match read_own(&directory.join("state")) {
                // One that never had anything.
                Ok(None) => true,
                Ok(Some(text)) => serde_json::from_slice::<Saved>(&text)
                    .is_ok_and(|saved| saved.boot != boot || saved.leases.is_empty()),
                Err(_) => false,
            };
            if is_over {
                remove(&directory);
            }
        }
        Ok(())
    }

    /// How a keeper is, and two links to it where one that is alive takes them.
    ///
    /// # Errors
    /// EINVAL for what no keeper is called.
    pub fn find(&self, name: &str) -> Result<(Standing, Option<[OwnedFd; 2]>)> {
        let directory = self.directory(name)?;
        if !directory.exists() {
            return Ok((Standing::Gone, None));
        }
        let standing = if is_locked(&directory) { Standing::Alive } else { Standing::Dead };
        let links = link_to(&directory).and_then(|first| Ok([first, link_to(&directory)?]));
        Ok((standing, links.ok().filter(|_| standing == Standing::Alive)))
    }
}

impl StateFile {
    /// Makes the directory of a new keeper.
    pub(super) fn create(place: &Place, name: &str) -> Result<Self> {
        let directory = place.directory(name)?;
        let failed = |error| io("mkdir", &directory, &error);
        DirBuilder::new().mode(0o700).create(&directory).map_err(failed)?;
        Self::locked(directory)
    }

    /// Takes over the directory of one whose process has ended; waits until it has.
    pub(super) fn take_over(place: &Place, name: &str) -> Result<Self> {
        Self::locked(place.directory(name)?)
    }

    /// Waits for whoever looks whether the lock is free.
    fn locked(directory: PathBuf) -> Result<Self> {
        let failed = |error| io("open", &directory.join("lock"), &error);
        let lock = open_lock(&directory, true).map_err(failed)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| Error::new("flock", directory.to_string_lossy(), errno))?;
        let boot = boot_id().map_err(|error| io("read", Path::new(BOOT_ID), &error))?;
        Ok(Self { directory, boot, _lock: lock })
    }

    /// The socket that takes links from brokers to come, in non-blocking mode.
    pub(super) fn listen(&self) -> Result<UnixListener> {
        let path = self.directory.join("socket");
        let failed = |call| {
            let path = path.to_string_lossy().into_owned();
            move |errno| Error::new(call, path, errno)
        };
        let _ = std::fs::remove_file(&path);
        let directory = File::open(&self.directory);
        let directory = directory.map_err(|error| io("open", &self.directory, &error))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None);
        let socket = socket.map_err(failed("socket"))?;
        let address = address(&directory).map_err(failed("bind"))?;
        bind(socket.as_raw_fd(), &address).map_err(failed("bind"))?;
        let backlog = Backlog::new(QUEUE).map_err(failed("listen"))?;
        listen(&socket, backlog).map_err(failed("listen"))?;
        Ok(socket.into())
    }

    /// Puts this in place of what stands there; all of it or nothing.
    pub(super) fn write<'a>(&self, leases: impl Iterator<Item = &'a LeaseState>) -> Result<()> {
        let (version, boot, pid) = (VERSION, self.boot.clone(), std::process::id());
        let saved = Saved { version, boot, pid, leases: leases.cloned().collect() };
        // Its types have string keys and no floats: it can be written as JSON.
        let text = serde_json::to_vec(&saved).unwrap_or_default();
        let (new, path) = (self.directory.join("state.new"), self.directory.join("state"));
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(O_NOFOLLOW);
        let mut file = options.open(&new).map_err(|error| io("create", &new, &error))?;
        file.write_all(&text).map_err(|error| io("write", &new, &error))?;
        std::fs::rename(&new, &path).map_err(|error| io("rename", &path, &error))
    }

    /// What was written last.
    pub(super) fn read(&self) -> Result<Vec<LeaseState>> {
        let path = self.directory.join("state");
        let text = read_own(&path).map_err(|error| io("read", &path, &error))?;
        let Some(text) = text else { return Ok(Vec::new()) };
        let invalid = |error: serde_json::Error| io("read", &path, &error.into());
        Ok(serde_json::from_slice::<Saved>(&text).map_err(invalid)?.leases)
    }

    /// Takes the directory away; nothing is left that anybody would have to know.
    pub(super) fn remove(&self) {
        remove(&self.directory);
    }
}

fn remove(directory: &Path) {
    // What can't be removed says of itself that it is over.
    let _ = std::fs::remove_dir_all(directory);
}

/// A name that a keeper can have: no path.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a keeper's process has its files still, whatever state it is in.
fn is_locked(directory: &Path) -> bool {
    match open_lock(directory, false) {
        Ok(file) => Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err(),
        Err(_) => false,
    }
}

/// A new link to a keeper, in non-blocking mode. That it is made proves no life: a process that is
/// dead and can't end has its socket still.
///
/// # Errors
/// What connect(2) says.
fn link_to(directory: &Path) -> std::result::Result<OwnedFd, Errno> {
    let directory = File::open(directory).map_err(|error| errno(&error))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &address(&directory)?)?;
    Ok(socket)
}

/// By the directory's number, which is shorter than its path can be.
fn address(directory: &File) -> std::result::Result<UnixAddr, Errno> {
    UnixAddr::new(format!("/proc/self/fd/{}/socket", directory.as_raw_fd()).as_str())
}

/// The file whose lock a keeper has. Only the keeper creates it: others would, in a directory that is just being
/// removed.
fn open_lock(directory: &Path, create: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).truncate(false).mode(0o600);
    options.custom_flags(O_NOFOLLOW | O_NONBLOCK).open(directory.join("lock"))
}

/// A file that nobody else can have written; `None` where there is none.
fn read_own(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path);
    let mut file = match opened {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let found = file.metadata()?;
    let own = found.uid() == nix::unistd::geteuid().as_raw();
    if !found.is_file() || !own || found.mode() & 0o077 != 0 {
        return Err(std::io::Error::other("others than vfio-brokerd can have written to it"));
    }
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    Ok(Some(text))
}

fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn io(call: &'static str, path: &Path, error: &std::io::Error) -> Error {
    let note = (error.raw_os_error().is_none()).then(|| error.to_string().into());
    Error { note, ..Error::new(call, path.to_string_lossy(), errno(error)) }
}
