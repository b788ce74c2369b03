//! The client for tokio programs: [`Client`] and [`Watch`] as in the parent module, with the same
//! leases and errors. The runtime needs its io and time drivers.
//!
//! A call that is dropped before it is done takes its connection with it; the next call makes a
//! new one. What a dropped Acquire would have given goes back to the broker by itself.

use super::blocking::{AWAY, LOOK_AGAIN, TIMEOUT, is_away};
use super::send::send;
use super::wire::{Inbox, Incoming, Lost, Outgoing, decode};
use super::{Acquire, DmaRange, Error, Files, Lease, Result, socket_path};
use crate::protocol::{self, Event, Method};
use crate::sys::fdpass::{self, MAX_FDS, ReceiveError};
use ::tokio::io::Interest;
use ::tokio::net::UnixStream;
use ::tokio::time::{Instant, sleep, timeout};
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use std::future::Future;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A connection to the broker; see [`super::Client`].
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Option<Duration>,
    connection: Option<Connection>,
}

impl Client {
    /// Connects to the broker at [`socket_path`].
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub async fn connect() -> Result<Self> {
        Self::connect_to(socket_path()).await
    }

    /// Connects to the broker at `path`.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub async fn connect_to(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let connection = Connection::open(&path).await?;
        Ok(Self { path, timeout: Some(TIMEOUT), connection: Some(connection) })
    }

    /// How long a call may take, 30 s unless set; `None` is for ever.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// See [`super::Client::acquire`].
    ///
    /// # Errors
    /// As there.
    pub async fn acquire(&mut self, request: Acquire) -> Result<Lease> {
        let request = request.into_request()?;
        let (reply, fds) = self.call(&request, &[]).await?;
        Lease::new(request.vm, reply, fds)
    }

    /// See [`super::Client::add`].
    ///
    /// # Errors
    /// As there.
    pub async fn add(&mut self, lease: &mut Lease, more: Acquire) -> Result<()> {
        let (reply, fds) = self.call(&lease.add_call(more)?, &[]).await?;
        lease.extend(reply, fds)
    }

    /// See [`super::Client::get_fds`].
    ///
    /// # Errors
    /// As there.
    pub async fn get_fds(&mut self, lease: &Lease) -> Result<Files> {
        let (reply, fds) = self.call(&lease.get_fds_call(), &[]).await?;
        Files::pair(protocol::GetFds::NAME, &reply.fds, fds)
    }

    /// See [`super::Client::release`].
    ///
    /// # Errors
    /// As there.
    pub async fn release(&mut self, lease: Lease) -> Result<bool> {
        let call = lease.release_call();
        let (lifeline, files) = lease.into_parts();
        drop(files);
        let (reply, _) = self.call(&call, &[]).await?;
        drop(lifeline);
        Ok(reply.proved)
    }

    /// See [`super::Client::map_dma`].
    ///
    /// # Errors
    /// As there.
    pub async fn map_dma(
        &mut self,
        lease: &Lease,
        memory: impl AsFd,
        range: DmaRange,
    ) -> Result<()> {
        self.call(&lease.map_call(&range), &[memory.as_fd()]).await.map(drop)
    }

    /// See [`super::Client::set_memlock`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn set_memlock(&mut self, lease: &Lease, bytes: u64) -> Result<u64> {
        let (lease, key) = (lease.id().to_owned(), lease.key().to_owned());
        Ok(self.call(&protocol::SetMemlock { lease, key, bytes }, &[]).await?.0.bytes)
    }

    /// See [`super::Client::unmap_dma`].
    ///
    /// # Errors
    /// As there.
    pub async fn unmap_dma(&mut self, lease: &Lease, iova: u64, size: u64) -> Result<u64> {
        Ok(self.call(&lease.unmap_call(iova, size), &[]).await?.0.unmapped)
    }

    /// See [`super::Client::topology`].
    ///
    /// # Errors
    /// As there.
    pub async fn topology(&mut self) -> Result<Vec<protocol::Group>> {
        let mut replies = self.call_more(&protocol::Topology {}).await?;
        let mut groups = Vec::new();
        while let Some(some) = replies.next().await {
            groups.extend(some?.groups);
        }
        Ok(groups)
    }

    /// See [`super::Client::leases`].
    ///
    /// # Errors
    /// As there.
    pub async fn leases(&mut self) -> Result<Vec<protocol::Lease>> {
        let mut replies = self.call_more(&protocol::Leases {}).await?;
        let mut leases = Vec::new();
        while let Some(some) = replies.next().await {
            leases.extend(some?.leases);
        }
        Ok(leases)
    }

    /// See [`super::Client::watch`].
    ///
    /// # Errors
    /// As there.
    pub async fn watch(&self, lease: Option<&str>) -> Result<Watch> {
        let call = protocol::Watch { lease: lease.map(str::to_owned) };
        let call = Outgoing::new(&call, true)?;
        let mut connection = Connection::open(&self.path).await?;
        within(self.timeout, connection.send(&call, &[]))
            .await
            .map_err(|lost| call.failed(lost, self.timeout))?;
        Ok(Watch { connection, call, over: false })
    }

    /// See [`super::Client::call`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn call<M: Method>(
        &mut self,
        call: &M,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(M::Reply, Vec<OwnedFd>)> {
        let call = Outgoing::new(call, false)?;
        let Incoming { message, fds } = self.exchange(&call, fds).await?;
        decode::<M>(&message).map(|(reply, _)| (reply, fds))
    }

    /// See [`super::Client::call_more`].
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn call_more<M: Method>(&mut self, call: &M) -> Result<Replies<'_, M>> {
        let call = Outgoing::new(call, true)?;
        let first = Some(self.exchange(&call, &[]).await?);
        let connection = self.connection.take();
        Ok(Replies { client: self, call, first, connection, method: PhantomData })
    }

    async fn exchange(&mut self, call: &Outgoing, fds: &[BorrowedFd<'_>]) -> Result<Incoming> {
        let mut again = true;
        loop {
            // Put back only after an answer, so also not when this future is dropped.
            let mut connection = match self.connection.take().filter(Connection::is_usable) {
                Some(connection) => connection,
                None => self.reconnect().await?,
            };
            let answer = within(self.timeout, async {
                connection.send(call, fds).await?;
                connection.receive(call.method).await
            });
            match answer.await {
                Ok(incoming) => {
                    self.connection = Some(connection);
                    return Ok(incoming);
                }
                Err(lost) if again && call.may_repeat_after(&lost) => again = false,
                Err(lost) => return Err(call.failed(lost, self.timeout)),
            }
        }
    }

    /// Connects again, waiting a while for a broker that is being restarted.
    async fn reconnect(&self) -> Result<Connection> {
        let back_by = Instant::now() + AWAY.min(self.timeout.unwrap_or(AWAY));
        loop {
            match Connection::open(&self.path).await {
                Err(error) if is_away(&error) && Instant::now() < back_by => {
                    sleep(LOOK_AGAIN).await;
                }
                result => return result,
            }
        }
    }
}

/// The replies to [`Client::call_more`], each as it comes; see [`super::Replies`].
#[derive(Debug)]
pub struct Replies<'a, M> {
    client: &'a mut Client,
    call: Outgoing,
    first: Option<Incoming>,
    /// None once the last reply has come.
    connection: Option<Connection>,
    method: PhantomData<M>,
}

impl<M: Method> Replies<'_, M> {
    /// The next reply; `None` after the last one. None is lost when this future is dropped.
    pub async fn next(&mut self) -> Option<Result<M::Reply>> {
        let connection = self.connection.as_mut()?;
        let limit = self.client.timeout;
        let incoming = match self.first.take() {
            Some(first) => Ok(first),
            None => within(limit, connection.receive(self.call.method)).await,
        };
        let reply = incoming
            .map_err(|lost| self.call.failed(lost, limit))
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

async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = std::result::Result<T, Lost>>,
) -> std::result::Result<T, Lost> {
    match limit {
        None => work.await,
        Some(limit) => timeout(limit, work).await.unwrap_or(Err(Lost::TimedOut)),
    }
}

/// What happens to leases, event by event; see [`super::Watch`].
#[derive(Debug)]
pub struct Watch {
    connection: Connection,
    call: Outgoing,
    over: bool,
}

impl Watch {
    /// The next event; `None` once the broker has ended the watch. No event is lost when this
    /// future is dropped.
    pub async fn next(&mut self) -> Option<Result<Event>> {
        if self.over {
            return None;
        }
        let incoming = self.connection.receive(self.call.method).await;
        let event = incoming
            .map_err(|lost| self.call.failed(lost, None))
            .and_then(|incoming| decode::<protocol::Watch>(&incoming.message));
        self.over = !matches!(event, Ok((_, true)));
        Some(event.map(|(event, _)| event))
    }
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    inbox: Inbox,
}

impl Connection {
    async fn open(path: &Path) -> Result<Self> {
        match UnixStream::connect(path).await {
            Ok(stream) => Ok(Self { stream, inbox: Inbox::default() }),
            Err(error) => {
                // A path that is too long has no errno of its own.
                let errno = error.raw_os_error().map_or(Errno::ENAMETOOLONG, Errno::from_raw);
                Err(Error::Connect { path: path.to_owned(), errno })
            }
        }
    }

    fn is_usable(&self) -> bool {
        self.inbox.is_empty() && super::connection::is_silent(self.stream.as_fd())
    }

    /// See the blocking client's.
    async fn send(
        &mut self,
        call: &Outgoing,
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), Lost> {
        match self.try_send(call, fds).await {
            Err(lost) if lost.is_refusal_of_fds() => {}
            sent => return sent,
        }
        let greeting = Outgoing::greeting();
        self.try_send(&greeting, &[]).await.map_err(Lost::before_the_call)?;
        self.receive(greeting.method).await.map_err(Lost::before_the_call)?;
        self.try_send(call, fds).await.map_err(Lost::if_refused_again)
    }

    async fn try_send(
        &self,
        call: &Outgoing,
        mut fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), Lost> {
        let mut rest = &call.bytes[..];
        while !rest.is_empty() {
            self.stream.writable().await.map_err(|error| Lost::Unsent(errno(&error)))?;
            match send(&self.stream, rest, fds) {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(Lost::Unsent(errno)),
            }
        }
        Ok(())
    }

    /// Dropped half way, it has kept what came: the next call goes on from there.
    async fn receive(&mut self, method: &'static str) -> std::result::Result<Incoming, Lost> {
        let mut buf = [0; 4096];
        loop {
            if let Some(incoming) = self.inbox.next(method).map_err(Lost::Bad)? {
                return Ok(incoming);
            }
            let receive = || match fdpass::receive(
                self.stream.as_fd(),
                &mut buf,
                MAX_FDS,
                MsgFlags::MSG_DONTWAIT,
            ) {
                Err(ReceiveError::Errno(errno)) => Err(errno.into()),
                other => Ok(other),
            };
            match self.stream.async_io(Interest::READABLE, receive).await {
                Err(error) => return Err(Lost::Unanswered(Some(errno(&error)))),
                Ok(Err(truncated)) => return Err(Lost::Bad(Error::received(method, truncated))),
                Ok(Ok(received)) if received.len == 0 => return Err(Lost::Unanswered(None)),
                Ok(Ok(received)) => {
                    self.inbox.push(buf.get(..received.len).unwrap_or_default(), received.fds);
                }
            }
        }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::super::fake::{Fake, answer_and_hang_up, null, refuse_files_until_greeted, script};
    use super::*;
    use crate::protocol::EventKind;

    fn run(work: impl Future<Output = ()>) {
        ::tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work);
    }

    fn request() -> Acquire {
        Acquire::new("web1").device("0000:65:00.0")
    }

    const LEASES: &str = r#"{"leases":[]}"#;

    #[test]
    fn a_lease_is_the_same_as_with_the_blocking_client() {
        let fake = Fake::new(vec![script(|mut peer| {
            peer.call();
            let _lease = peer.grant();
            let call = peer.call().unwrap();
            assert_eq!((&call["parameters"]["iova"], peer.fds.len()), (&4096.into(), 1));
            peer.reply("{}", &[]);
            peer.call();
            peer.reply(r#"{"proved":false}"#, &[]);
        })]);
        run(async {
            let mut broker = Client::connect_to(&fake.path).await.unwrap();
            let lease = broker.acquire(request()).await.unwrap();
            assert_eq!((lease.id(), lease.groups().unwrap().len()), ("l1", 1));
            broker.map_dma(&lease, null(), DmaRange::new(4096, 4096)).await.unwrap();
            assert!(!broker.release(lease).await.unwrap());
        });
        fake.join();
    }

    #[test]
    fn files_that_are_refused_before_the_connection_is_let_in_are_sent_after_that() {
        let fake = Fake::new(vec![refuse_files_until_greeted(true)]);
        run(async {
            let mut broker = Client::connect_to(&fake.path).await.unwrap();
            let lease = broker.acquire(request()).await.unwrap();
            broker.map_dma(&lease, null(), DmaRange::new(4096, 4096)).await.unwrap();
        });
        fake.join();
    }

    #[test]
    fn a_connection_that_was_closed_is_made_again() {
        let hang_up = || {
            script(|mut peer| {
                peer.call();
            })
        };
        let (answer, hung_up) = answer_and_hang_up(LEASES);
        let fake = Fake::new(vec![hang_up(), answer, hang_up()]);
        run(async {
            let mut broker = Client::connect_to(&fake.path).await.unwrap();
            broker.leases().await.unwrap();
            hung_up.recv().unwrap();
            let error = broker.acquire(request()).await.unwrap_err();
            assert!(matches!(error, Error::Lost { .. }), "{error}");
        });
        fake.join();
    }

    #[test]
    fn a_call_that_was_dropped_or_timed_out_takes_its_connection_with_it() {
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
        let silent = |wait: std::sync::Arc<std::sync::Mutex<std::sync::mpsc::Receiver<()>>>| {
            script(move |mut peer| {
                peer.call();
                wait.lock().unwrap().recv().unwrap();
                assert!(peer.call().is_none(), "the connection is still in use");
            })
        };
        let fake = Fake::new(vec![
            silent(wait.clone()),
            silent(wait),
            script(|mut peer| {
                peer.call();
                peer.reply(LEASES, &[]);
            }),
        ]);
        run(async {
            let mut broker = Client::connect_to(&fake.path).await.unwrap();
            let dropped = timeout(Duration::from_millis(10), broker.topology()).await;
            assert!(dropped.is_err());
            go_on.send(()).unwrap();
            broker.set_timeout(Some(Duration::from_millis(10)));
            let error = broker.topology().await.unwrap_err();
            assert!(matches!(error, Error::Timeout { .. }), "{error}");
            go_on.send(()).unwrap();
            broker.set_timeout(None);
            broker.leases().await.unwrap();
        });
        fake.join();
    }

    #[test]
    fn a_watch_gives_what_comes_in_pieces() {
        let event = r#"{"parameters":{"event":"gone","lease":"l1","vm":"v","tenant":"t",
            "devices":[],"at":1},"continues":true}"#;
        let fake = Fake::new(vec![
            script(|_| {}),
            script(move |mut peer| {
                peer.call();
                for byte in event.as_bytes() {
                    peer.say(&[*byte], &[]);
                }
                peer.say(b"\0", &[]);
            }),
        ]);
        run(async {
            let broker = Client::connect_to(&fake.path).await.unwrap();
            let mut watch = broker.watch(None).await.unwrap();
            assert_eq!(watch.next().await.unwrap().unwrap().event, EventKind::Gone);
            let error = watch.next().await.unwrap().unwrap_err();
            assert!(matches!(error, Error::Lost { .. }), "{error}");
            assert!(watch.next().await.is_none());
        });
        fake.join();
    }

    #[test]
    fn without_a_broker_the_error_is_the_same() {
        run(async {
            let error = Client::connect_to("/nonexistent/broker.sock").await.unwrap_err();
            assert!(error.advice().unwrap().contains("is vfio-brokerd running"), "{error}");
            let error = Client::connect_to("/".repeat(200)).await.unwrap_err();
            assert!(error.advice().unwrap().contains("too long"), "{error}");
        });
    }
}
