//! The policy as the launcher has to do with it: having it read, and putting it in force.

use super::StartError;
use super::confine::Sandbox;
use super::file_mode;
use super::options::Options;
use super::policy_source::{Compiled, PolicySource};
use crate::keeper::{Machine, Place, PolicyInForce};
use crate::log;
use crate::policy::Policy;
use crate::process::launcher::{InForce, PolicyRead};
use crate::process::role::Role;
use crate::sys::child;
use crate::sys::peer::address;
use crate::sys::process::now;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, getppid};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::error;

/// The most that a compiled policy may take.
const MOST: usize = 64 << 20;

/// The policy's file, and what came of reading it.
#[derive(Debug)]
pub(super) struct PolicyFile {
    source: PolicySource,
    /// How long reading it may take.
    patience: Duration,
    read: PolicyRead,
    reading: Option<nix::Result<Reading>>,
}

/// A process that reads it.
#[derive(Debug)]
struct Reading {
    /// None once it was waited for: another process may have its number then.
    pid: Option<Pid>,
    pipe: File,
    said: Vec<u8>,
    until: Instant,
}

impl PolicyFile {
    pub(super) fn new(options: &Options, machine: Machine) -> Self {
        Self {
            source: PolicySource::new(options, machine),
            patience: options.policy_deadline,
            read: PolicyRead::default(),
            reading: None,
        }
    }

    /// What came of reading it.
    pub(super) fn status(&self) -> &PolicyRead {
        &self.read
    }

    /// Has it read, and waits for that: at the start there is nothing else to do.
    ///
    /// # Errors
    /// Why it can't be used.
    pub(super) fn read(&mut self, sandbox: &mut Sandbox) -> Result<Policy, StartError> {
        self.begin(sandbox);
        loop {
            if let Some(compiled) = self.take() {
                sandbox.set_broker(compiled.broker);
                return compiled.policy.map_err(|why| StartError::Policy(why.text));
            }
            if let Some((pipe, until)) = self.waits_for() {
                let left = until.saturating_duration_since(Instant::now());
                let left = PollTimeout::try_from(left + Duration::from_millis(1));
                // Whatever poll says: what there is to do is looked for.
                let _ = poll(&mut [pipe], left.unwrap_or(PollTimeout::MAX));
            }
        }
    }

    /// Begins to have it read. Who is at that still may have looked too early, and is ended.
    pub(super) fn begin(&mut self, sandbox: &Sandbox) {
        self.give_up();
        self.reading = Some(Reading::begin(&self.source, sandbox, self.patience));
    }

    /// What becomes readable as it is read, and how long that is waited for.
    pub(super) fn waits_for(&self) -> Option<(PollFd<'_>, Instant)> {
        let reading = self.reading.as_ref()?.as_ref().ok()?;
        Some((PollFd::new(reading.pipe.as_fd(), PollFlags::POLLIN), reading.until))
    }

    /// What came of reading it, once something has.
    pub(super) fn take(&mut self) -> Option<Compiled> {
        let said = match self.reading.as_mut()? {
            Ok(reading) => reading.said(),
            Err(errno) => Some(Err(format!(
                "can't start a process that reads it: {} ({errno:?})",
                errno.desc()
            ))),
        };
        let compiled = said?.unwrap_or_else(|why| self.source.unread(&why));
        self.give_up();
        self.read.name.clone_from(&compiled.name);
        if let Err(why) = &compiled.policy {
            self.refused(why.line.clone());
        }
        Some(compiled)
    }

    /// Notes that what was read last is in force.
    pub(super) fn in_force(&mut self) {
        (self.read.read, self.read.refused) = (now(), None);
    }

    /// Notes why what was read last is not.
    pub(super) fn refused(&mut self, why: String) {
        self.read.refused = Some((now(), why));
    }

    /// A child has ended.
    pub(super) fn reaped(&mut self, pid: Pid) {
        if let Some(Ok(reading)) = &mut self.reading {
            reading.pid = reading.pid.filter(|reader| *reader != pid);
        }
    }

    fn give_up(&mut self) {
        if let Some(Ok(Reading { pid: Some(pid), .. })) = self.reading.take() {
            // Not waited for: a file can keep it from ending.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

impl Reading {
    fn begin(source: &PolicySource, sandbox: &Sandbox, patience: Duration) -> nix::Result<Self> {
        let (pipe, tell) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let launcher = getpid();
        let pid = child::fork(Role::PolicyReader.name(), [tell], |[tell]| {
            let told = tell_compiled(source, sandbox, launcher, tell.into())
                .inspect_err(|why| error!(%why, "the policy can't be read"));
            u8::from(told.is_err())
        })?;
        let until = Instant::now() + patience;
        Ok(Self { pid: Some(pid), pipe: pipe.into(), said: Vec::new(), until })
    }

    /// What it has said, once that is all, or why it says nothing.
    fn said(&mut self) -> Option<Result<Compiled, String>> {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) if self.said.len() + len <= MOST => self.said.extend(&buffer[..len]),
                Ok(_) => return Some(Err(format!("compiled it takes more than {MOST} bytes"))),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let is_late = Instant::now() >= self.until;
                    return is_late.then(|| {
                        Err("the file, or where its users are looked up, does not answer".into())
                    });
                }
                Err(error) => return Some(Err(error.to_string())),
            }
        }
        let compiled = serde_json::from_slice(&self.said);
        Some(compiled.map_err(|_| "the process that reads it has died".into()))
    }
}

/// The life of a process that reads the policy.
fn tell_compiled(
    source: &PolicySource,
    sandbox: &Sandbox,
    launcher: Pid,
    mut tell: File,
) -> Result<(), Box<dyn std::error::Error>> {
    if let Err(why) = sandbox.confine(Role::PolicyReader) {
        let why = format!("who reads it would have more rights than it should: {why}");
        return Ok(tell.write_all(&serde_json::to_vec(&source.unread(&why))?)?);
    }
    // Nobody else ends one that hangs.
    set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != launcher {
        return Ok(());
    }
    let compiled = source.compile();
    // What it has logged comes before what is said of it.
    log::flush();
    Ok(tell.write_all(&serde_json::to_vec(&compiled)?)?)
}

/// Puts the compiled policy where keepers find it, those of earlier launchers too; gives it as a file to
/// be read from.
///
/// # Errors
/// See open(2), write(2) and rename(2).
pub(super) fn put_in_force(
    policy: Policy,
    place: &Place,
    listener: &UnixListener,
) -> std::io::Result<(PolicyInForce, File)> {
    let in_force = InForce { service: address(listener.as_fd())?, policy: Arc::new(policy) };
    let (path, new) = (place.policy(), place.path().join("policy.new"));
    let text = serde_json::to_vec(&in_force)?;
    if let Some(file) = same(&path, &text) {
        return Ok((PolicyInForce::new(path, &file, in_force)?, file));
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = options.custom_flags(nix::libc::O_NOFOLLOW).open(&new)?;
    file.write_all(&text)?;
    // The broker gets it, and must not be able to write there.
    let file = File::open(&new)?;
    std::fs::rename(&new, &path)?;
    Ok((PolicyInForce::new(path, &file, in_force)?, file))
}

/// The file that is there, if it is ours and says this: a start needs no room where nothing has changed.
fn same(path: &Path, text: &[u8]) -> Option<File> {
    let mut options = OpenOptions::new();
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let mut file = options.read(true).custom_flags(flags).open(path).ok()?;
    let found = file.metadata().ok()?;
    let is_ours = found.is_file() && file_mode::is_owned(&found) && found.mode() & 0o077 == 0;
    let mut there = Vec::new();
    let is_same = is_ours && file.read_to_end(&mut there).is_ok() && there == text;
    is_same.then_some(file)
}
