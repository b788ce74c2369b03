//! Writes to sysfs: some wait for a driver to go, which this thread must not do.

use super::Server;
use crate::sim::fault::Effect;
use crate::sim::machine::Written;
use crate::sim::wire::{Answer, Request};
use nix::errno::Errno;
use std::os::fd::OwnedFd;

impl Server {
    /// Carries a write out and answers it, or lets it wait.
    pub(super) fn write_sysfs(&mut self, request: Request, reply: OwnedFd, effect: Option<Effect>) {
        let (device, then) = match self.written(&request) {
            Ok(Written::Done) => return self.give(reply, effect, &Answer::default(), None),
            Err(errno) => return self.give(reply, effect, &Answer::failed(errno), None),
            Ok(Written::Leaving(device)) => (device, None),
            Ok(Written::Locked(device)) => (device, Some(request)),
        };
        let token = self.next;
        self.next += 1;
        self.answers.wait(&self.epoll, token, device, reply, then);
    }

    fn written(&mut self, request: &Request) -> Result<Written, Errno> {
        let path = std::str::from_utf8(&request.bytes).map_err(|_| Errno::ENOENT)?;
        let (_, bytes) = request.out.as_ref().ok_or(Errno::EINVAL)?;
        let file = self.tree().writes_to(path)?;
        self.sysfs = None;
        self.machine.write_driver_file(&file, bytes)
    }

    /// Answers writes that waited for a driver which has gone by now.
    pub(super) fn tell_who_waited(&mut self) {
        for device in self.machine.take_left() {
            self.sysfs = None;
            for waiting in self.answers.take_waiting(device) {
                match waiting.then {
                    None => self.answers.send(waiting.reply, &Answer::default(), None),
                    Some(request) => self.write_sysfs(request, waiting.reply, None),
                }
            }
        }
    }
}
