//! Topology and Leases: answers that grow with the machine. With `more` each group or lease is a
//! reply, made when those before it have been taken; without, all of them are one, if it fits.

use super::connection::{Connection, Lost};
use super::incoming::Flags;
use super::outgoing::Answer;
use crate::broker::{Broker, Caller, Tour};
use crate::protocol::{Error, Group, Groups, Lease, LeaseList, MAX_MESSAGE};
use serde::Serialize;
use std::sync::Arc;
use tokio::task::yield_now;
use tokio::time::timeout;

impl Connection {
    /// Sends all replies but the last one, which it returns.
    pub(super) async fn topology(&self, flags: Flags) -> Result<Result<Answer, Error>, Lost> {
        End::told_apart(self.list_groups(flags).await)
    }

    /// Sends all replies but the last one, which it returns.
    pub(super) async fn leases(&self, flags: Flags) -> Result<Result<Answer, Error>, Lost> {
        End::told_apart(self.list_leases(flags).await)
    }

    async fn list_groups(&self, flags: Flags) -> Result<Answer, End> {
        let mut list = List::new(self, flags, |groups: Vec<Group>| Groups { groups });
        let mut tour = self.read(|broker, caller| broker.tour(caller)).await?;
        while !tour.is_over() {
            let (left, groups) = self.next_groups(tour).await?;
            tour = left;
            list.extend(groups).await?;
        }
        list.last()
    }

    async fn next_groups(&self, mut tour: Tour) -> Result<(Tour, Vec<Group>), Error> {
        let next = move |broker: &Broker, caller: &Caller| {
            let groups = broker.next_groups(caller, &mut tour)?;
            Ok((tour, groups))
        };
        self.read(next).await
    }

    /// Reads the machine on a worker, when it is this tenant's turn to.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Broker, &Caller) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let scans = Arc::clone(&self.seat.account.scans);
        let turn = timeout(self.daemon.deadlines.call, scans.acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            let most = super::account::MOST_SCANS as u64;
            let limit = "requests of this tenant that read the machine".into();
            return Err(Error::OverLimit { limit, most, asked: most + 1 });
        };
        let work = move |broker: &Broker, caller: &Caller| {
            // A reading that hangs keeps its turn.
            let _turn = turn;
            work(broker, caller)
        };
        self.on_worker("Topology", "sysfs".into(), work, |_, _, _| {}).await
    }

    async fn list_leases(&self, flags: Flags) -> Result<Answer, End> {
        let mut list = List::new(self, flags, |leases: Vec<Lease>| LeaseList { leases });
        let mut after = None;
        loop {
            list.extend(self.daemon.broker.leases_after(&self.caller, &mut after)?).await?;
            if after.is_none() {
                return list.last();
            }
            yield_now().await;
        }
    }
}

/// Why a list came to no last reply.
enum End {
    Refused(Error),
    Lost(Lost),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<Lost> for End {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl End {
    fn told_apart(result: Result<Answer, Self>) -> Result<Result<Answer, Error>, Lost> {
        match result {
            Ok(answer) => Ok(Ok(answer)),
            Err(Self::Refused(error)) => Ok(Err(error)),
            Err(Self::Lost(lost)) => Err(lost),
        }
    }
}

/// A list on its way to a client.
struct List<'a, T, R> {
    connection: &'a Connection,
    /// It goes in many replies.
    many: bool,
    /// Of many replies the last item, which may be the end; otherwise all items so far.
    items: Vec<T>,
    /// What all items take up as JSON.
    size: usize,
    reply: fn(Vec<T>) -> R,
}

impl<'a, T: Serialize, R: Serialize> List<'a, T, R> {
    fn new(connection: &'a Connection, flags: Flags, reply: fn(Vec<T>) -> R) -> Self {
        let many = flags.more && !flags.oneway;
        Self { connection, many, items: Vec::new(), size: 0, reply }
    }

    async fn extend(&mut self, items: Vec<T>) -> Result<(), End> {
        for item in items {
            if self.many {
                if let Some(before) = self.items.pop() {
                    let answer = Answer::if_it_fits((self.reply)(vec![before]), true);
                    self.connection.send(answer.map_err(too_long)?).await?;
                }
            } else {
                self.size += serde_json::to_vec(&item).map_or(0, |bytes| bytes.len());
                // The rest need not be read.
                if self.size > MAX_MESSAGE {
                    return Err(End::Refused(Error::ExpectedMore {}));
                }
            }
            self.items.push(item);
        }
        Ok(())
    }

    fn last(self) -> Result<Answer, End> {
        let many = self.many;
        let refused = |size| if many { too_long(size) } else { Error::ExpectedMore {} };
        Answer::if_it_fits((self.reply)(self.items), false).map_err(|size| refused(size).into())
    }
}

/// A single item is more than a message can hold.
fn too_long(size: usize) -> Error {
    let (most, asked) = (MAX_MESSAGE as u64, size as u64);
    Error::OverLimit { limit: "bytes of a message".into(), most, asked }
}
