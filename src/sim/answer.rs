//! Answers: sent at once, or held back by a fault.

use super::fault::Effect;
use super::wire::{Answer, MAX_MESSAGE, Request};
use crate::bdf::Bdf;
use crate::sys::fdpass;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::MsgFlags;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// The answers that are held back, by the token of their reply socket.
#[derive(Debug, Default)]
pub(super) struct Answers {
    held: HashMap<u64, Held>,
    waiting: BTreeMap<u64, Waiting>,
}

/// A write to sysfs that waits until a driver has let go of its device.
#[derive(Debug)]
pub(super) struct Waiting {
    device: Bdf,
    pub(super) reply: OwnedFd,
    /// What is carried out then; `None` where that was all.
    pub(super) then: Option<Request>,
}

#[derive(Debug)]
struct Held {
    /// When it is sent; `None` for never.
    due: Option<Instant>,
    reply: OwnedFd,
    message: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Answers {
    /// Sends an answer. A caller that is gone, or does not take it, has none; an fd in it is
    /// closed here, which was the only one of a new open file.
    pub(super) fn send(&self, reply: OwnedFd, answer: &Answer, fd: Option<OwnedFd>) {
        send(reply, &encode(answer, fd.as_ref()), fd);
    }

    /// Holds an answer back as a fault says, watching whether its caller gives up.
    pub(super) fn hold(
        &mut self,
        epoll: &Epoll,
        token: u64,
        effect: Effect,
        reply: OwnedFd,
        answer: &Answer,
        fd: Option<OwnedFd>,
    ) {
        let due = match effect {
            Effect::Slow(millis) => Instant::now().checked_add(Duration::from_millis(millis)),
            _ => None,
        };
        // Only hang-up is of interest, and that is always reported.
        if epoll.add(&reply, EpollEvent::new(EpollFlags::empty(), token)).is_ok() {
            let message = encode(answer, fd.as_ref());
            self.held.insert(token, Held { due, reply, message, fd });
        }
    }

    pub(super) fn is_held(&self, token: u64) -> bool {
        self.held.contains_key(&token) || self.waiting.contains_key(&token)
    }

    /// Drops an answer whose caller has given up.
    pub(super) fn forget(&mut self, token: u64) {
        self.held.remove(&token);
        self.waiting.remove(&token);
    }

    /// Lets a caller wait for a driver. One that gives up changes nothing: the driver goes on.
    pub(super) fn wait(
        &mut self,
        epoll: &Epoll,
        token: u64,
        device: Bdf,
        reply: OwnedFd,
        then: Option<Request>,
    ) {
        if epoll.add(&reply, EpollEvent::new(EpollFlags::empty(), token)).is_ok() {
            self.waiting.insert(token, Waiting { device, reply, then });
        }
    }

    /// Those who have waited for the driver of this device, first come first.
    pub(super) fn take_waiting(&mut self, device: Bdf) -> Vec<Waiting> {
        let all = std::mem::take(&mut self.waiting);
        let (waited, others) = all.into_iter().partition(|(_, it)| it.device == device);
        self.waiting = others;
        let waited: BTreeMap<u64, Waiting> = waited;
        waited.into_values().collect()
    }

    /// How many are held back.
    pub(super) fn held(&self) -> u64 {
        (self.held.len() + self.waiting.len()) as u64
    }

    /// How long until the next one is due.
    pub(super) fn next_due(&self) -> Option<Duration> {
        let next = self.held.values().filter_map(|held| held.due).min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    /// Sends those whose time has come.
    pub(super) fn send_due(&mut self) {
        let now = Instant::now();
        let due = |held: &Held| held.due.is_some_and(|due| due <= now);
        let tokens: Vec<u64> =
            self.held.iter().filter(|(_, held)| due(held)).map(|(token, _)| *token).collect();
        for token in tokens {
            if let Some(held) = self.held.remove(&token) {
                send(held.reply, &held.message, held.fd);
            }
        }
    }

    /// Sends all of them.
    pub(super) fn send_all(&mut self) {
        for (_, held) in self.held.drain() {
            send(held.reply, &held.message, held.fd);
        }
    }
}

fn encode(answer: &Answer, fd: Option<&OwnedFd>) -> Vec<u8> {
    let message = Answer { has_fd: fd.is_some(), ..answer.clone() }.encode();
    if message.len() > MAX_MESSAGE {
        return Answer::failed(Errno::EMSGSIZE).encode();
    }
    message
}

fn send(reply: OwnedFd, message: &[u8], fd: Option<OwnedFd>) {
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    let _ = fdpass::send(reply.as_fd(), message, &fds, MsgFlags::MSG_DONTWAIT);
}
