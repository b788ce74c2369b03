//! Watches the write ends of lease pipes: one reports EPOLLERR once the last read end, in whichever
//! process, is closed.
//!
//! They are in an epoll instance of their own, which the event loop watches as one file. So a pipe
//! can be added and taken out on any thread, and a lease costs the event loop nothing.

use crate::broker::LifelineId;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The lease pipes that are watched.
#[derive(Debug)]
pub(super) struct Lifelines {
    epoll: Epoll,
    open: Mutex<HashMap<LifelineId, Arc<OwnedFd>>>,
}

impl Lifelines {
    /// The most that are reported in one go.
    pub(super) const MOST: usize = 64;

    pub(super) fn new() -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, open: Mutex::default() })
    }

    /// A second descriptor of the epoll instance, for the event loop: readable when
    /// [`hung_up`](Self::hung_up) has something to say.
    pub(super) fn descriptor(&self) -> std::io::Result<OwnedFd> {
        self.epoll.0.try_clone()
    }

    /// Watches one more.
    pub(super) fn add(&self, id: LifelineId, write_end: Arc<OwnedFd>) -> Result<(), Errno> {
        // EPOLLERR is always watched for; edge-triggered, so that it is reported once.
        let event = EpollEvent::new(EpollFlags::EPOLLET, id.0);
        let mut open = self.open();
        self.epoll.add(write_end.as_fd(), event)?;
        open.insert(id, write_end);
        Ok(())
    }

    /// Watches it no longer and lets go of it.
    pub(super) fn remove(&self, id: LifelineId) {
        let gone = self.open().remove(&id);
        if let Some(write_end) = gone {
            // It is there, and a file that epoll can watch can also be taken out.
            let _ = self.epoll.delete(write_end.as_fd());
        }
    }

    /// Those that have hung up since the last call; where it is [`Self::MOST`] there may be more.
    pub(super) fn hung_up(&self) -> Result<Vec<LifelineId>, Errno> {
        let mut events = [EpollEvent::empty(); Self::MOST];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        Ok(events[..count].iter().map(|event| LifelineId(event.data())).collect())
    }

    fn open(&self) -> MutexGuard<'_, HashMap<LifelineId, Arc<OwnedFd>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::Interest;

    fn pipe() -> (OwnedFd, Arc<OwnedFd>) {
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        (read_end, Arc::new(write_end))
    }

    #[test]
    fn each_hang_up_is_reported_once() {
        let lifelines = Lifelines::new().unwrap();
        let (reader, writer) = pipe();
        let (other_reader, other_writer) = pipe();
        lifelines.add(LifelineId(1), writer).unwrap();
        lifelines.add(LifelineId(2), other_writer).unwrap();
        let copy = reader.try_clone().unwrap();
        drop(reader);
        assert_eq!(lifelines.hung_up(), Ok(vec![]));
        drop(copy);
        assert_eq!(lifelines.hung_up(), Ok(vec![LifelineId(1)]));
        assert_eq!(lifelines.hung_up(), Ok(vec![]));
        lifelines.remove(LifelineId(1));
        lifelines.remove(LifelineId(2));
        assert_eq!(nix::unistd::read(&other_reader, &mut [0]), Ok(0), "the holder sees the end");
    }

    #[test]
    fn one_that_hung_up_before_it_was_added_is_reported() {
        let lifelines = Lifelines::new().unwrap();
        let (reader, writer) = pipe();
        drop(reader);
        lifelines.add(LifelineId(7), writer).unwrap();
        assert_eq!(lifelines.hung_up(), Ok(vec![LifelineId(7)]));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_event_loop_is_woken() {
        let lifelines = Lifelines::new().unwrap();
        let descriptor = lifelines.descriptor().unwrap();
        let watched = crate::sys::readiness::watch(descriptor, Interest::READABLE).unwrap();
        for id in 0..3 {
            let (reader, writer) = pipe();
            lifelines.add(LifelineId(id), writer).unwrap();
            let wait = tokio::time::timeout(Duration::from_secs(60), watched.readable());
            drop(reader);
            let mut ready = wait.await.unwrap().unwrap();
            assert_eq!(lifelines.hung_up(), Ok(vec![LifelineId(id)]));
            ready.clear_ready();
        }
    }
}
