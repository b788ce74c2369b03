//! Calls and closes that wait for a lock, because a page does not come that a map of an iommufd waits for.

use super::Server;
use crate::sim::fault::Effect;
use crate::sim::incoming::Call;
use crate::sim::machine::{FileId, Locks};
use crate::sim::wire::{Answer, Request};
use std::os::fd::OwnedFd;

/// Something that waits, and what it has locked or is about to.
pub(super) struct Blocked {
    locks: Locks,
    what: What,
}

enum What {
    Call(Box<Waiting>),
    Close(FileId),
}

/// A call that has not begun.
struct Waiting {
    file: Option<FileId>,
    request: Request,
    call: Call,
    reply: OwnedFd,
    effect: Option<Effect>,
}

impl Server {
    /// Carries a call out and answers it, or lets it wait for what it locks.
    pub(super) fn once_unlocked(
        &mut self,
        file: Option<FileId>,
        request: Request,
        call: Call,
        reply: OwnedFd,
        effect: Option<Effect>,
    ) {
        let locks = file.map_or(Locks::default(), |file| {
            self.machine.locks_of(file, request.number, &request.bytes)
        });
        if self.must_wait(locks) {
            let waiting = Waiting { file, request, call, reply, effect };
            let what = What::Call(Box::new(waiting));
            return self.blocked.push(Blocked { locks, what });
        }
        let number = request.number;
        let (answer, fd) = match self.carry_out(file, request, call, &reply) {
            Ok(done) => done,
            Err(errno) => (Answer::failed(errno), None),
        };
        let faults_in = file.and_then(|file| self.machine.faults_in(file, number));
        if let Some(tables) = faults_in.filter(|_| effect.is_some()) {
            // The token of the answer that is held back.
            self.faulting.insert(self.next, tables);
        }
        self.give(reply, effect, &answer, fd);
    }

    /// Releases a file, or lets its close wait for what it locks.
    pub(super) fn close(&mut self, file: FileId) {
        let locks = self.machine.locks_of_close(file);
        if self.must_wait(locks) {
            return self.blocked.push(Blocked { locks, what: What::Close(file) });
        }
        self.machine.close(file);
        self.tell_who_waited();
    }

    /// Whoever has waited longest goes on first, as far as the pages have come.
    pub(super) fn unlock(&mut self) {
        let answers = &self.answers;
        self.faulting.retain(|token, _| answers.is_held(*token));
        for Blocked { locks, what } in std::mem::take(&mut self.blocked) {
            match what {
                _ if self.must_wait(locks) => self.blocked.push(Blocked { locks, what }),
                What::Call(waiting) => {
                    let Waiting { file, request, call, reply, effect } = *waiting;
                    self.once_unlocked(file, request, call, reply, effect);
                }
                What::Close(file) => self.close(file),
            }
        }
    }

    /// Whether a page is waited for that keeps a call from what it locks. Who waits for page tables has
    /// locked its bus.
    fn must_wait(&self, locks: Locks) -> bool {
        let is_faulting = |tables| self.faulting.values().any(|faulting| *faulting == tables);
        let is_taken = |bus| self.blocked.iter().any(|blocked| blocked.locks.bus == Some(bus));
        locks.tables.is_some_and(is_faulting) || locks.bus.is_some_and(is_taken)
    }
}
