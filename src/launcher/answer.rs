//! What the broker has the launcher do.

use super::broker::Beginning;
use super::serve::Launcher;
use crate::holders;
use crate::keeper::{Machine, keep, links, pair, tell_why};
use crate::log;
use crate::process::launcher::{
    Alive, Done, FAILED, Failed, FindKeeper, GiveUp, HelperStarted, KeeperFound, KillHelper,
    ReadKeepers, Ready, Salvage, StartHelper, StartKeeper, Watch,
};
use crate::process::link::{self, Call, Lost, Message};
use crate::process::role::{Helper, Role};
use crate::receiver;
use crate::sys::child;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{SockFlag, SockType};
use nix::unistd::Pid;
use sd_notify::NotifyState;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use tracing::error;

/// How many keepers are read in one go, while nothing else is answered.
const PAGE_OF_KEEPERS: usize = 256;

type Answer<T> = Result<(T, Vec<OwnedFd>), Errno>;

impl Launcher {
    /// Answers all that the broker has asked.
    ///
    /// # Errors
    /// The link has ended, and the broker with it.
    pub(super) fn answer_broker(&mut self) -> Result<(), Lost> {
        while let Some(Message { bytes, .. }) = self.broker.asks.next_call()? {
            let (method, parameters) = link::parse_call(&bytes)?;
            let (answer, fds) = self.answer(&method, parameters.as_bytes())?;
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            self.broker.asks.send(&answer, &fds)?;
        }
        if self.read_watch().is_err() {
            // What it says of its end comes on the other link.
            self.broker.tells = None;
        }
        Ok(())
    }

    /// Takes the broker's wish to be told what to do.
    fn read_watch(&mut self) -> Result<(), Lost> {
        let Some(tells) = &mut self.broker.tells else { return Ok(()) };
        let mut begins = false;
        while let Some(Message { bytes, .. }) = tells.next_call()? {
            if link::parse_call(&bytes)?.0 == Watch::NAME {
                begins = true;
            }
        }
        if begins {
            self.broker.watches = true;
            self.tell_missed();
        }
        Ok(())
    }

    fn answer(&mut self, method: &str, bytes: &[u8]) -> Result<(Vec<u8>, Vec<OwnedFd>), Lost> {
        Ok(match method {
            StartKeeper::NAME => framed(self.start_keeper(link::parse(bytes)?)),
            Salvage::NAME => framed(self.salvage(link::parse(bytes)?)),
            FindKeeper::NAME => framed(self.find_keeper(&link::parse(bytes)?)),
            ReadKeepers::NAME => framed(self.read_keepers(&link::parse(bytes)?)),
            StartHelper::NAME => framed(self.start_helper(&link::parse(bytes)?)),
            KillHelper::NAME => framed(self.kill_helper(&link::parse(bytes)?)),
            Ready::NAME => {
                self.broker.is_ready = true;
                super::serve::notify(&[NotifyState::Ready]);
                framed(done())
            }
            Alive::NAME => {
                super::serve::notify(&[NotifyState::Watchdog]);
                framed(done())
            }
            GiveUp::NAME => {
                let GiveUp { why } = link::parse(bytes)?;
                self.broker.gave_up = Some(why);
                framed(done())
            }
            _ => {
                let what = BTreeMap::from([("method", method)]);
                (link::error("org.varlink.service.MethodNotFound", &what), Vec::new())
            }
        })
    }

    fn start_keeper(&self, StartKeeper { name }: StartKeeper) -> Answer<Done> {
        let (ours, theirs) = links()?;
        self.fork_keeper(&name, theirs, Some)?;
        Ok((Done {}, ours.into()))
    }

    fn salvage(&self, Salvage { name }: Salvage) -> Answer<Done> {
        self.fork_keeper(&name, [], |[]| None)?;
        done()
    }

    /// Starts a keeper that has these files, of which `links` makes its links.
    fn fork_keeper<const N: usize>(
        &self,
        name: &str,
        files: [OwnedFd; N],
        links: impl FnOnce([OwnedFd; N]) -> Option<[OwnedFd; 2]>,
    ) -> Result<(), Errno> {
        let Beginning { machine, policy, sandbox, .. } = &self.beginning;
        child::fork(Role::Keeper.name(), files, |files| {
            let links = links(files);
            let confined = sandbox.confine(Role::Keeper);
            let asked = links.as_ref().and_then(|[asked, _]| asked.try_clone().ok());
            let kept = || keep(machine, &self.place, name, links, policy.clone()).is_ok();
            once_confined(confined, asked, kept)
        })
        .map(drop)
    }

    fn find_keeper(&self, asked: &FindKeeper) -> Answer<KeeperFound> {
        let (standing, links) = self.place.find(&asked.name).map_err(|error| error.errno)?;
        Ok((KeeperFound { standing }, links.map(Vec::from).unwrap_or_default()))
    }

    fn read_keepers(&self, ReadKeepers { after }: &ReadKeepers) -> Answer<Done> {
        let names = self.place.names().map_err(|error| error.errno)?;
        let behind = names.into_iter().filter(|name| name > after);
        let mut all = Vec::new();
        for name in behind.take(PAGE_OF_KEEPERS) {
            self.place.kept(name).append_to(&mut all);
        }
        let file = memfd_create(c"keepers", MFdFlags::MFD_CLOEXEC)?;
        let mut file = File::from(file);
        file.write_all(&all)
            .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        Ok((Done {}, vec![file.into()]))
    }

    /// Starts a process that closes what it is given; gives the link to it.
    pub(super) fn start_closer(&mut self) -> Option<OwnedFd> {
        let started = self.start_helper(&StartHelper { helper: Helper::Closer });
        let (_, files) = started
            .inspect_err(|errno| error!(%errno, "can't start a process that closes"))
            .ok()?;
        files.into_iter().next()
    }

    fn start_helper(&mut self, StartHelper { helper }: &StartHelper) -> Answer<HelperStarted> {
        let (helper, sandbox) = (*helper, &self.beginning.sandbox);
        let (ours, theirs) = pair(SockType::SeqPacket, SockFlag::SOCK_CLOEXEC)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let pid = child::fork(Role::Helper(helper).name(), [theirs], |[link]| {
            let confined = sandbox.confine(Role::Helper(helper));
            once_confined(confined, None, || match helper {
                Helper::Receiver => receiver::receive(&link).is_ok(),
                Helper::Holders => {
                    let is_simulated = matches!(self.beginning.machine, Machine::Simulated(_));
                    holders::answer(&link, is_simulated).is_ok()
                }
                Helper::Closer => {
                    receiver::close_as_they_come(link.as_fd());
                    true
                }
            })
        })?;
        let pidfd = child::pidfd(pid).inspect_err(|_| {
            let _ = kill(pid, Signal::SIGKILL);
        })?;
        self.helpers.insert(pid);
        Ok((HelperStarted { pid: pid.as_raw() }, vec![ours, pidfd]))
    }

    /// Only what is no keeper: keepers outlive whoever asks.
    fn kill_helper(&mut self, KillHelper { pid }: &KillHelper) -> Answer<Done> {
        let pid = Pid::from_raw(*pid);
        if self.helpers.contains(&pid) {
            kill(pid, Signal::SIGKILL)?;
        }
        done()
    }
}

/// The life of a process, if it has given up what it should; else whoever is at the other end of the link is
/// told why not.
fn once_confined(
    confined: crate::sys::Result<()>,
    link: Option<OwnedFd>,
    begin: impl FnOnce() -> bool,
) -> u8 {
    let is_well = match confined {
        Ok(()) => {
            drop(link);
            begin()
        }
        Err(why) => {
            error!(%why, "a process would have more rights than it should, and does not begin");
            tell_why(link.as_ref(), &why);
            false
        }
    };
    log::flush();
    u8::from(!is_well)
}

fn done() -> Answer<Done> {
    Ok((Done {}, Vec::new()))
}

fn framed<T: Serialize>(answer: Answer<T>) -> (Vec<u8>, Vec<OwnedFd>) {
    match answer {
        Ok((reply, fds)) => (link::reply(&reply, false), fds),
        Err(errno) => (link::error(FAILED, &Failed { errno: errno as i32 }), Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::link::{Answering, Lost};
    use nix::errno::Errno;
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_not_confined_does_not_begin_and_whoever_wants_it_is_told() {
        let (asks, asked) = UnixStream::pair().unwrap();
        let why = crate::sys::Error::new("capset", "the process vfiob-keeper", Errno::EPERM);
        let mut begun = false;
        let code = once_confined(Err(why), Some(asked.into()), || {
            begun = true;
            true
        });
        assert!(!begun && code == 1);
        let mut answers = Answering::new(asks.into());
        let said = String::from_utf8(answers.next_call().unwrap().unwrap().bytes).unwrap();
        assert!(said.contains(crate::process::keeper::FAILED) && said.contains("capset"), "{said}");
        assert_eq!(answers.next_call().unwrap_err(), Lost::Closed);
        assert_eq!(once_confined(Ok(()), None, || true), 0);
        assert_eq!(once_confined(Ok(()), None, || false), 1);
    }
}
