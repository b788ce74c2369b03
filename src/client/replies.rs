//! Many replies to one call.

use super::blocking::Client;
use super::connection::{Connection, Deadline};
use super::wire::{Incoming, Outgoing, decode};
use super::{Error, Result};
use crate::protocol::Method;
use std::marker::PhantomData;

/// The replies to [`Client::call_more`], each as it comes. When it is dropped before the last one,
/// the connection goes with it, and the next call makes a new one.
#[derive(Debug)]
pub struct Replies<'a, M> {
    client: &'a mut Client,
    call: Outgoing,
    first: Option<Incoming>,
    /// None once the last reply has come.
    connection: Option<Connection>,
    method: PhantomData<M>,
}

impl<'a, M: Method> Replies<'a, M> {
    pub(super) fn new(client: &'a mut Client, call: &M) -> Result<Self> {
        let call = Outgoing::new(call, true)?;
        let deadline = Deadline::after(client.timeout);
        let first = Some(client.exchange(&call, &[], deadline)?);
        let connection = client.connection.take();
        Ok(Self { client, call, first, connection, method: PhantomData })
    }
}

impl<M: Method> Iterator for Replies<'_, M> {
    type Item = Result<M::Reply>;

    fn next(&mut self) -> Option<Self::Item> {
        let connection = self.connection.as_mut()?;
        let timeout = self.client.timeout;
        let incoming = match self.first.take() {
            Some(first) => Ok(first),
            None => connection.receive(self.call.method, Deadline::after(timeout)),
        };
        let reply = incoming
            .map_err(|lost| self.call.failed(lost, timeout))
            .and_then(|incoming| decode::<M>(&incoming.message));
        match &reply {
            Ok((_, true)) => {}
            Ok((_, false)) | Err(Error::Broker { .. } | Error::Unknown { .. }) => {
                self.client.connection = self.connection.take();
            }
            Err(_) => self.connection = None,
        }
        Some(reply.map(|(reply, _)| reply))
    }
}
