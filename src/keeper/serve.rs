//! A keeper's loop: links, lease pipes, and what is to be tried again.

use super::permit::{Client, Judge};
use super::state_file::{Place, StateFile};
use super::{Keeper, KeptLease};
use crate::kernel::Kernel;
use crate::process::keeper::{
    Check, Confirm, Deliver, End, FAILED, Failed, Failure, LeaseState, Map, Mappings, Memlock,
    Open, Phase, Reopen, Revoke, Told, Undo, Unmap, Watch,
};
use crate::process::link::{self, Answering, Call, Lost, Message, keep_open};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long no link is taken in where one can't be.
const DEAF: Duration = Duration::from_millis(100);

/// How a keeper begins.
#[derive(Debug)]
pub struct Links {
    /// The links of the broker that wants it; none where it is to salvage what a dead one left.
    pub first: Vec<OwnedFd>,
    /// What hangs up when the kernel's machine is no more: a simulated one can end.
    pub machine: Option<OwnedFd>,
    /// Take over the directory of a dead keeper.
    pub salvage: bool,
    /// Who is asked whether a client may have something.
    pub judge: Judge,
}

/// What poll(2) found something to do with.
#[derive(Debug, Default)]
struct Ready {
    listener: bool,
    /// By their numbers.
    links: Vec<u64>,
    /// At least one lease pipe.
    pipes: bool,
    /// It has come to its end.
    machine: bool,
}

/// A link, and what it wants to know.
#[derive(Debug)]
pub(super) struct Link {
    id: u64,
    answering: Answering,
    /// The leases that have changed since it was told; `None` where it does not watch.
    untold: Option<BTreeSet<String>>,
    /// It has not been told yet that this is all.
    is_listing: bool,
}

/// Keeps until nothing is left to keep.
///
/// # Errors
/// The keeper's directory can't be made, or taken over: nothing has been opened then.
pub fn run(
    kernel: Arc<dyn Kernel>,
    place: &Place,
    name: &str,
    patience: Vec<Duration>,
    links: Links,
) -> crate::kernel::Result<()> {
    let begun = begin(place, name, links.salvage);
    let (file, listener, saved) =
        begun.inspect_err(|error| tell_why(links.first.first(), error))?;
    let mut keeper = Keeper {
        kernel,
        file,
        judge: links.judge,
        patience,
        container: None,
        leases: BTreeMap::new(),
        changed: BTreeSet::new(),
        gone: BTreeMap::new(),
        links: Vec::new(),
        next_link: 0,
        revision: 0,
        save_at: None,
    };
    links.first.into_iter().for_each(|socket| keeper.take_in(socket));
    keeper.salvage(saved);
    keeper.serve(&listener, links.machine.as_ref());
    keeper.file.remove();
    Ok(())
}

/// Tells whoever asks first on this link why the keeper can't begin.
pub fn tell_why(link: Option<&OwnedFd>, error: &crate::kernel::Error) {
    let failed = Failed { failure: error.clone().into() };
    if let Some(link) = link.and_then(|link| link.try_clone().ok()) {
        let _ = Answering::new(link).send(&link::error(FAILED, &failed), &[]);
    }
}

fn begin(
    place: &Place,
    name: &str,
    salvage: bool,
) -> crate::kernel::Result<(StateFile, UnixListener, Vec<LeaseState>)> {
    let file = match salvage {
        true => StateFile::take_over(place, name)?,
        false => StateFile::create(place, name)?,
    };
    let listener = file.listen()?;
    let saved = if salvage { file.read()? } else { Vec::new() };
    Ok((file, listener, saved))
}

impl Keeper {
    fn serve(&mut self, listener: &UnixListener, machine: Option<&OwnedFd>) {
        let mut deaf_until = None;
        while !(self.leases.is_empty() && self.links.is_empty()) {
            let ready = self.wait(listener, machine, deaf_until);
            if ready.machine {
                // With its machine all that was kept is gone.
                return;
            }
            if ready.listener || deaf_until.is_some() {
                deaf_until = self.accept(listener);
            }
            self.answer_links(&ready.links);
            self.see_hang_ups(ready.pipes);
            self.force(Instant::now());
            self.try_again(Instant::now());
            self.save_again(Instant::now());
            self.tell();
        }
    }

    /// Takes in the links that wait. Until when none can be: where files or memory have run out, a link
    /// that waits would be poll's answer at once, again and again.
    fn accept(&mut self, listener: &UnixListener) -> Option<Instant> {
        loop {
            match listener.accept() {
                Ok((socket, _)) => self.take_in(socket.into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(_) => return Some(Instant::now() + DEAF),
            }
        }
    }

    /// Waits for something to do.
    fn wait(
        &self,
        listener: &UnixListener,
        machine: Option<&OwnedFd>,
        deaf_until: Option<Instant>,
    ) -> Ready {
        let heard = if deaf_until.is_none() { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut fds = vec![PollFd::new(listener.as_fd(), heard)];
        for link in &self.links {
            let untold = link.untold.as_ref().is_some_and(|untold| !untold.is_empty());
            let untold = untold || link.is_listing;
            let writable = if untold { PollFlags::POLLOUT } else { PollFlags::empty() };
            fds.push(PollFd::new(link.answering.as_fd(), PollFlags::POLLIN | writable));
        }
        let pipes = self.leases.values().flat_map(|lease| &lease.lifelines);
        fds.extend(pipes.map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::empty())));
        fds.extend(machine.map(|machine| PollFd::new(machine.as_fd(), PollFlags::empty())));
        let until = [self.next_attempt(), self.next_force(), self.save_at, deaf_until];
        let until = until.into_iter().flatten().min();
        let until = until.map(|at| at.saturating_duration_since(Instant::now()));
        let until = until.map(|left| left + Duration::from_millis(1));
        let until = until.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        if poll(&mut fds, until).is_err() {
            return Ready::default();
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
        let listener = ready.next().unwrap_or_default();
        let links = self.links.iter().filter_map(|link| ready.next()?.then_some(link.id)).collect();
        let machine = machine.is_some() && ready.next_back().unwrap_or_default();
        Ready { listener, links, pipes: ready.any(|pipe| pipe), machine }
    }

    fn take_in(&mut self, socket: OwnedFd) {
        self.next_link += 1;
        let answering = Answering::new(socket);
        self.links.push(Link { id: self.next_link, answering, untold: None, is_listing: false });
    }

    fn answer_links(&mut self, ids: &[u64]) {
        for &id in ids {
            if let Err(lost) = self.answer_link(id) {
                if let Some(at) = self.links.iter().position(|link| link.id == id) {
                    self.links.remove(at).answering.end(&lost);
                }
                self.undo_of_link(id);
            }
        }
    }

    fn link_mut(&mut self, id: u64) -> Result<&mut Link, Lost> {
        self.links.iter_mut().find(|link| link.id == id).ok_or(Lost::Closed)
    }

    fn answer_link(&mut self, id: u64) -> Result<(), Lost> {
        let mut message = self.link_mut(id)?.answering.next_call()?;
        while let Some(Message { bytes, fds }) = message {
            let (method, parameters) = link::parse_call(&bytes)?;
            let answer = self.answer(id, &method, parameters, fds)?;
            // Those who watch hear of it before the one who asked can ask again.
            self.tell();
            if let Some(answer) = answer {
                self.link_mut(id)?.answering.send(&answer, &[])?;
            }
            message = self.link_mut(id)?.answering.next_read_call()?;
        }
        Ok(())
    }

    fn answer(
        &mut self,
        link: u64,
        method: &str,
        parameters: &str,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>, Lost> {
        let parameters = parameters.as_bytes();
        let mut fds = fds.into_iter();
        let mut file = || fds.next().ok_or_else(|| Lost::Malformed("no file".into()));
        let answer = match method {
            Open::NAME => self.for_client(parameters, file()?, |keeper, call, client| {
                keeper.open(link, call, client)
            })?,
            Reopen::NAME => framed(self.reopen(link, link::parse(parameters)?)),
            Deliver::NAME => self.for_client(parameters, file()?, Self::deliver)?,
            Undo::NAME => framed(self.undo(&link::parse(parameters)?)),
            Map::NAME => {
                let mut queue = Some(file()?);
                let answer = self.for_client(parameters, file()?, |keeper, call: Map, client| {
                    keeper.check_holder(&call.lease, client)?;
                    queue
                        .take()
                        .map_or(Err(Failure::NoSuchLease), |queue| keeper.map(&call, &queue))
                });
                // What is in it for nobody who may map could be anything.
                keep_open(queue);
                answer?
            }
            Unmap::NAME => self.for_client(parameters, file()?, |keeper, call, client| {
                keeper.unmap(&call, client)
            })?,
            Memlock::NAME => self.for_client(parameters, file()?, |keeper, call, client| {
                keeper.raise_memlock(&call, client)
            })?,
            Check::NAME => framed(self.check(&link::parse(parameters)?)),
            End::NAME => {
                let call = link::parse(parameters)?;
                let client = file().ok().map(|file| self.client(file)).transpose();
                framed(client.and_then(|client| self.end(&call, client)))
            }
            Revoke::NAME => self.for_client(parameters, file()?, |keeper, call, client| {
                keeper.revoke(&call, client)
            })?,
            Confirm::NAME => self.for_client(parameters, file()?, |keeper, call, client| {
                keeper.confirm(&call, client)
            })?,
            Mappings::NAME => framed(self.mappings(&link::parse(parameters)?)),
            Watch::NAME => {
                let all = self.leases.keys().cloned().collect();
                let link = self.link_mut(link)?;
                (link.untold, link.is_listing) = (Some(all), true);
                return Ok(None);
            }
            _ => {
                let what = BTreeMap::from([("method", method)]);
                link::error("org.varlink.service.MethodNotFound", &what)
            }
        };
        // No broker sends more, and to close what else it is could hang.
        keep_open(fds);
        Ok(Some(answer))
    }

    /// The answer to a call that is made for a client.
    fn for_client<C: DeserializeOwned, R: Serialize>(
        &mut self,
        parameters: &[u8],
        connection: OwnedFd,
        act: impl FnOnce(&mut Self, C, &Client) -> Result<R, Failure>,
    ) -> Result<Vec<u8>, Lost> {
        let call = link::parse(parameters)?;
        let client = self.client(connection);
        Ok(framed(client.and_then(|client| act(self, call, &client))))
    }

    /// Tells those who watch what has changed. Who does not read is told later, and then only how
    /// things stand by then.
    pub(super) fn tell(&mut self) {
        let changed = std::mem::take(&mut self.changed);
        let (leases, gone) = (&self.leases, &self.gone);
        let state = |name: &String| -> Option<&LeaseState> {
            leases.get(name).map(|lease: &KeptLease| &lease.state).or_else(|| gone.get(name))
        };
        for link in &mut self.links {
            let Some(untold) = &mut link.untold else { continue };
            untold.extend(changed.iter().cloned());
            while let Some(name) = untold.first().cloned() {
                if let Some(state) = state(&name) {
                    let told = Told { state: Some(state.clone()) };
                    match link.answering.send(&link::reply(&told, true), &[]) {
                        Ok(()) => {}
                        Err(Lost::Errno { errno: Errno::EAGAIN, .. }) => break,
                        // Its end is seen when it is read from.
                        Err(_) => {}
                    }
                }
                untold.remove(&name);
            }
            if link.is_listing && untold.is_empty() {
                let all = link::reply(&Told { state: None }, true);
                link.is_listing = link.answering.send(&all, &[]).is_err();
            }
        }
        let untold = self.links.iter().filter_map(|link| link.untold.as_ref());
        let untold: BTreeSet<&String> = untold.flatten().collect();
        self.gone.retain(|name, _| untold.contains(name));
    }

    /// What a keeper had that is no more: all of it has ended.
    fn salvage(&mut self, saved: Vec<LeaseState>) {
        for mut state in saved {
            let name = state.record.lease.clone();
            state.phase = Phase::Held;
            (state.lifelines, state.mappings, state.call) = (0, 0, None);
            self.revision = self.revision.max(state.revision);
            for group in &mut state.groups {
                // The files have gone with their process, and the kernel has undone what they did.
                group.attached = false;
            }
            self.leases.insert(name.clone(), KeptLease::new(state));
            self.end_lease(&name);
        }
        // The first attempt writes the state file anew: by then all of them are there.
        for name in self.leases.keys().cloned().collect::<Vec<_>>() {
            self.take_back(&name);
        }
    }
}

fn framed<T: Serialize>(result: Result<T, Failure>) -> Vec<u8> {
    match result {
        Ok(done) => link::reply(&done, false),
        Err(failure) => link::error(FAILED, &Failed { failure }),
    }
}
