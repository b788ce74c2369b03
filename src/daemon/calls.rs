//! The broker's calls as a connection makes them: which of them a worker makes, and what becomes of
//! a result that comes too late.

use super::connection::Connection;
use super::incoming::{Deferred, Sent};
use super::outgoing::Answer;
use super::workers::Job;
use crate::broker::{Broker, Caller, SentFd};
use crate::protocol::{Acquire, Error, Fds, GetFds, Handout, MapDma, Release, UnmapDma};
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How long is waited before what is in use is asked for again, in milliseconds.
const BEFORE_BUSY: [u64; 7] = [0, 1, 2, 4, 8, 16, 32];

/// How long is waited for our copies of a tenant's files to be closed; one may hang.
const OUR_COPIES: Duration = Duration::from_secs(1);

impl Connection {
    pub(super) async fn acquire(&self, request: Acquire) -> Result<Answer, Error> {
        let names = request.devices.iter().map(ToString::to_string).collect::<Vec<_>>();
        let caller = Arc::clone(&self.caller);
        let job = Job {
            call: "Acquire",
            object: names.join(" "),
            work: move |broker: &Broker, awaited: &dyn Fn() -> bool| {
                broker.acquire_while(&caller, &request, awaited)
            },
            // What is left after the last look: a grant that is dropped, its lifeline with it.
            late: |_: &Broker, _| {},
        };
        let grant = self.run(job).await;
        if let Err(Error::Quarantined { .. } | Error::Conflict { .. }) = grant {
            self.daemon.wanted.notify_one();
        }
        let grant = grant?;
        if grant.reply.handout == Handout::Container {
            // The broker keeps all but the lease pipe: no close of ours is the last one.
            let fds = grant.fds.into_iter().map(SentFd::Made).collect();
            return Ok(Answer::with_kept(grant.reply, fds));
        }
        Ok(Answer::with_fds(grant.reply, Deferred::new(grant.fds, &self.seat.account.own_lane)))
    }

    /// The fast way: what the broker keeps, sent without a copy of it being made.
    pub(super) fn try_get_fds(&self, request: &GetFds) -> Option<Result<Answer, Error>> {
        let result = self.daemon.broker.try_get_fds(&self.caller, request)?;
        Some(result.map(|(reply, fds)| Answer::with_kept(reply, fds)))
    }

    pub(super) async fn get_fds(&self, request: GetFds) -> Result<Answer, Error> {
        let lane = &self.seat.account.own_lane;
        let mut result = self.open_anew(&request).await;
        for wait in BEFORE_BUSY {
            match &result {
                Err(Error::Kernel { errno, .. }) if *errno == Errno::EBUSY as i32 => {}
                _ => break,
            }
            // What is in use may be our own copy of what was sent before, which is closed some time
            // soon, or one that a process has which is being started, here or at the holder's.
            lane.drained(OUR_COPIES).await;
            tokio::time::sleep(Duration::from_millis(wait)).await;
            result = self.open_anew(&request).await;
        }
        let (reply, fds) = result?;
        Ok(Answer::with_fds(reply, Deferred::new(fds, lane)))
    }

    async fn open_anew(&self, request: &GetFds) -> Result<(Fds, Vec<OwnedFd>), Error> {
        let (object, request) = (request.lease.clone(), request.clone());
        let work = move |broker: &Broker, caller: &Caller| broker.get_fds(caller, &request);
        self.on_worker("GetFds", object, work, |_, _, _| {}).await
    }

    pub(super) async fn release(&self, request: Release) -> Result<Answer, Error> {
        let object = request.lease.clone();
        let work = move |broker: &Broker, caller: &Caller| broker.release(caller, &request);
        let released = self.on_worker("Release", object, work, |_, _, _| {}).await;
        if released.is_ok() {
            self.daemon.pending.notify_one();
        }
        released.map(Answer::reply)
    }

    pub(super) async fn map_dma(&self, request: MapDma, fds: Sent) -> Result<Answer, Error> {
        // Wherever the job is dropped, the file goes to its lane.
        let mut memory = fds.take(request.memory)?;
        let object = request.lease.clone();
        let MapDma { lease, key, iova, size, .. } = request.clone();
        let undo = UnmapDma { lease, key, iova, size };
        let work = move |broker: &Broker, caller: &Caller| {
            let gone = || Error::bad("memory", "it is gone");
            broker.map_dma(caller, &request, memory.take_first().ok_or_else(gone)?)
        };
        let late = move |broker: &Broker, caller: &Caller, _| {
            // It can only fail if the mapping is gone already, with its lease.
            let _ = broker.unmap_dma(caller, &undo);
        };
        self.on_worker("MapDma", object, work, late).await.map(Answer::reply)
    }

    pub(super) async fn unmap_dma(&self, request: UnmapDma) -> Result<Answer, Error> {
        let object = request.lease.clone();
        let work = move |broker: &Broker, caller: &Caller| broker.unmap_dma(caller, &request);
        self.on_worker("UnmapDma", object, work, |_, _, _| {}).await.map(Answer::reply)
    }

    pub(super) async fn on_worker<T: Send + 'static>(
        &self,
        call: &'static str,
        object: String,
        work: impl FnOnce(&Broker, &Caller) -> Result<T, Error> + Send + 'static,
        late: impl FnOnce(&Broker, &Caller, T) + Send + 'static,
    ) -> Result<T, Error> {
        let (caller, for_late) = (Arc::clone(&self.caller), Arc::clone(&self.caller));
        let job = Job {
            call,
            object,
            work: move |broker: &Broker, _: &dyn Fn() -> bool| work(broker, &caller),
            late: move |broker: &Broker, done| late(broker, &for_late, done),
        };
        self.run(job).await
    }

    async fn run<T, Work, Late>(&self, job: Job<Work, Late>) -> Result<T, Error>
    where
        T: Send + 'static,
        Work: FnOnce(&Broker, &dyn Fn() -> bool) -> Result<T, Error> + Send + 'static,
        Late: FnOnce(&Broker, T) + Send + 'static,
    {
        job.run(&self.daemon.broker, &self.seat.account, self.daemon.deadlines.call).await
    }
}
