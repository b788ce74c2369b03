//! Topology, Leases and their like: answers that grow with the machine. With `more` each group or lease is a
//! reply, made when those before it have been taken; without, all of them are one, if it fits.

use super::connection::{Connection, Lost};
use super::incoming::Flags;
use super::outgoing::Answer;
use crate::protocol::{
    Drain, Drained, Error, Group, Groups, Lease, LeaseList, MAX_MESSAGE, Revoked,
};
use serde::Serialize;

impl Connection {
    /// Sends all replies but the last one, which it returns.
    pub(super) async fn topology(&self, flags: Flags) -> Result<Result<Answer, Error>, Lost> {
        End::told_apart(self.list_groups(flags).await)
    }

    /// Sends all replies but the last one, which it returns.
    pub(super) async fn leases(&self, flags: Flags) -> Result<Result<Answer, Error>, Lost> {
        End::told_apart(self.list_leases(flags).await)
    }

    /// The same, each as soon as the lease is over.
    pub(super) async fn drain(
        &self,
        request: Drain,
        flags: Flags,
    ) -> Result<Result<Answer, Error>, Lost> {
        End::told_apart(self.end_all(request, flags).await)
    }

    async fn list_groups(&self, flags: Flags) -> Result<Answer, End> {
        let mut list = List::new(self, flags, |groups: Vec<Group>| Groups { groups });
        let broker = &self.daemon.broker;
        let step = broker.step(&self.caller).await;
        let mut tour = broker.tour(&self.caller)?;
        drop(step);
        broker.look_for_holders(&self.caller).await;
        while !tour.is_over() {
            let step = broker.step(&self.caller).await;
            let groups = broker.next_groups(&self.caller, &mut tour)?;
            drop(step);
            list.extend(groups).await?;
        }
        list.last()
    }

    async fn list_leases(&self, flags: Flags) -> Result<Answer, End> {
        let mut list = List::new(self, flags, |leases: Vec<Lease>| LeaseList { leases });
        let (broker, mut after) = (&self.daemon.broker, None);
        broker.look_for_holders(&self.caller).await;
        loop {
            let step = broker.step(&self.caller).await;
            let leases = broker.leases_after(&self.caller, &mut after)?;
            drop(step);
            list.extend(leases).await?;
            if after.is_none() {
                return list.last();
            }
        }
    }
}

impl Connection {
    async fn end_all(&self, request: Drain, flags: Flags) -> Result<Answer, End> {
        let mut list = List::new(self, flags, |leases: Vec<Revoked>| Drained { leases });
        let broker = &self.daemon.broker;
        for begun in broker.drain(&self.caller, &self.socket, request.grace).await? {
            let revoked = self.while_there(broker.revoked(begun)).await?;
            list.extend(vec![revoked]).await?;
        }
        list.last()
    }
}

/// Why a list came to no last reply.
pub(super) enum End {
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
    pub(super) fn told_apart(result: Result<Answer, Self>) -> Result<Result<Answer, Error>, Lost> {
        match result {
            Ok(answer) => Ok(Ok(answer)),
            Err(Self::Refused(error)) => Ok(Err(error)),
            Err(Self::Lost(lost)) => Err(lost),
        }
    }
}

/// A list on its way to a client.
pub(super) struct List<'a, T, F> {
    connection: &'a Connection,
    /// It goes in many replies.
    many: bool,
    /// Of many replies the last item, which may be the end; otherwise all items so far.
    items: Vec<T>,
    /// What all items take up as JSON.
    size: usize,
    reply: F,
}

impl<'a, T: Serialize, R: Serialize, F: Fn(Vec<T>) -> R> List<'a, T, F> {
    pub(super) fn new(connection: &'a Connection, flags: Flags, reply: F) -> Self {
        let many = flags.more && !flags.oneway;
        Self { connection, many, items: Vec::new(), size: 0, reply }
    }

    pub(super) async fn extend(&mut self, items: Vec<T>) -> Result<(), End> {
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

    pub(super) fn last(self) -> Result<Answer, End> {
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
