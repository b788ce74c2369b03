//! MapDma and UnmapDma: mappings that a lease's keeper makes for it.

use super::access::quota;
use super::books::Entry;
use super::{Broker, Caller, no_such_lease};
use crate::ledger::{Effect, Lease, LeaseId, Request, Space as Kind};
use crate::process::keeper;
use crate::protocol::{Empty, Error, Handout, MapDma, UnmapDma, Unmapped};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use tokio::time::Instant;

impl Broker {
    /// Maps memory for a lease, for whoever made the connection `client`. `files` is a socket with the
    /// request's files in its queue, for the keeper alone to read.
    ///
    /// # Errors
    /// Nothing is mapped then, or will be when the kernel lets it.
    pub async fn map_dma(
        self: &Rc<Self>,
        caller: &Caller,
        client: Rc<impl AsFd + 'static>,
        request: &MapDma,
        files: impl AsFd + 'static,
    ) -> Result<Empty, Error> {
        let until = Instant::now() + self.deadline;
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        check_numbers(request)?;
        self.check_maps(&entry)?;
        let MapDma { iova, size, read, write, memory, offset, .. } = *request;
        let quota = quota(&self.limits_of(&entry.tenant.borrow()));
        let mut turn = entry.keeper.turn_until("MapDma", until).await?;
        self.enter_mapping(caller, Request::Map { lease: entry.id, iova, size, quota })?;
        let (broker, id) = (Rc::clone(self), entry.id);
        let lease = id.to_string();
        let call = keeper::Map { lease, iova, size, read, write, memory, offset };
        let asker = Rc::clone(&client);
        let work = async move {
            let done = turn.ask(&call, &[files.as_fd(), asker.as_fd()]).await;
            broker.report(id, Request::MapDone { lease: id, iova, made: done.is_ok() });
            done.map_err(|why| broker.not_done(why, id, &[], "MapDma"))?;
            Ok(turn)
        };
        let broker = Rc::clone(self);
        let late = move |turn| async move {
            // It can only fail if the mapping is gone already, with its lease.
            let _ = broker.unmap_range(id, iova, size, turn, client.as_fd()).await;
        };
        self.in_time(("MapDma", &request.lease), until, work, late).await?;
        Ok(Empty {})
    }

    /// Takes a lease's mappings back, whole ones only.
    ///
    /// # Errors
    /// Where the kernel fails on one of several, the others are gone all the same.
    pub async fn unmap_dma(
        self: &Rc<Self>,
        caller: &Caller,
        client: Rc<impl AsFd + 'static>,
        request: &UnmapDma,
    ) -> Result<Unmapped, Error> {
        let until = Instant::now() + self.deadline;
        let entry = self.authorize(caller, &request.lease, &request.key)?;
        self.check_maps(&entry)?;
        let UnmapDma { iova, size, .. } = *request;
        let turn = entry.keeper.turn_until("UnmapDma", until).await?;
        let effects = self.enter_mapping(caller, Request::Unmap { lease: entry.id, iova, size })?;
        let (broker, id) = (Rc::clone(self), entry.id);
        let work = async move { broker.unmap_each(id, effects, turn, client.as_fd()).await };
        let done = self.in_time(("UnmapDma", &request.lease), until, work, |_| async {}).await?;
        Ok(Unmapped { unmapped: done })
    }

    async fn unmap_range(
        &self,
        id: LeaseId,
        iova: u64,
        size: u64,
        turn: super::keeper::Turn,
        client: BorrowedFd<'_>,
    ) -> Result<u64, Error> {
        let effects = self.books().ledger.apply(Request::Unmap { lease: id, iova, size });
        self.unmap_each(id, effects.unwrap_or_default(), turn, client).await
    }

    async fn unmap_each(
        &self,
        id: LeaseId,
        effects: Vec<Effect>,
        mut turn: super::keeper::Turn,
        client: BorrowedFd<'_>,
    ) -> Result<u64, Error> {
        let (mut unmapped, mut failed) = (0, None);
        for effect in effects {
            let Effect::Unmap { iova, size } = effect else { continue };
            let call = keeper::Unmap { lease: id.to_string(), iova, size };
            let done = turn.ask(&call, &[client]).await;
            self.report(id, Request::UnmapDone { lease: id, iova, gone: done.is_ok() });
            match done {
                Ok(done) => unmapped += done.unmapped,
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        match failed {
            None => Ok(unmapped),
            Some(why) => Err(self.not_done(why, id, &[], "UnmapDma")),
        }
    }

    fn enter_mapping(&self, caller: &Caller, request: Request) -> Result<Vec<Effect>, Error> {
        let mut books = self.books();
        books.ledger.apply(request).map_err(|refusal| self.refused(caller, &books, refusal))
    }

    /// Whether the lease's keeper maps for it.
    fn check_maps(&self, entry: &Entry) -> Result<(), Error> {
        let lease = self.books().ledger.live(entry.id).cloned();
        let lease = lease.ok_or_else(|| no_such_lease(entry.id))?;
        holder_maps(&lease).map_or(Ok(()), Err)
    }
}

/// Where the holder has the container itself, it maps for itself; why.
fn holder_maps(lease: &Lease) -> Option<Error> {
    let why = match (lease.handout, &lease.space) {
        _ if lease.noiommu => "there is no IOMMU: devices use physical addresses",
        (Handout::Devices, Kind::Shared { .. }) if !lease.broker_maps() => {
            "members of a mutual container map by themselves, with the container they were given: \
             the broker could not tell whose mappings are whose"
        }
        (Handout::Devices, _) => return None,
        (Handout::Iommufd, _) => {
            "the holder has the iommufd and maps by itself, with IOMMU_IOAS_MAP; the broker keeps no \
             copy of it"
        }
        _ => "with this handout the holder maps by itself; acquire with handout devices",
    };
    Some(Error::Unsupported { what: "MapDma".into(), why: why.into() })
}

fn check_numbers(request: &MapDma) -> Result<(), Error> {
    let MapDma { iova, size, read, write, .. } = *request;
    if !read && !write {
        return Err(Error::bad("read", "one of read and write is needed"));
    }
    if size == 0 {
        return Err(Error::bad("size", "is 0"));
    }
    if iova.checked_add(size - 1).is_none() {
        return Err(Error::bad("iova", "iova and size together pass 2^64"));
    }
    Ok(())
}
