//! The client of what is timed: the same few system calls whoever answers, and no parsing.

use nix::sys::socket::MsgFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vfio_broker::client::Lease;
use vfio_broker::protocol::MAX_MESSAGE;
use vfio_broker::sys::fdpass::{self, MAX_FDS};

/// A connection that sends whole messages and reads whole replies.
pub struct RawClient {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl RawClient {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: vec![0; MAX_MESSAGE] }
    }

    /// One call and its reply.
    pub fn call(&mut self, call: &[u8]) -> (&[u8], Vec<OwnedFd>) {
        let sent = fdpass::send(self.stream.as_fd(), call, &[], MsgFlags::empty()).unwrap();
        assert_eq!(sent, call.len());
        let (mut len, mut fds) = (0, Vec::new());
        while len == 0 || self.buffer[len - 1] != 0 {
            let rest = &mut self.buffer[len..];
            let got = fdpass::receive(self.stream.as_fd(), rest, MAX_FDS, MsgFlags::empty());
            let got = got.unwrap();
            assert!(got.len > 0, "the other side has closed");
            len += got.len;
            fds.extend(got.fds);
        }
        (&self.buffer[..len], fds)
    }

    /// How long each of `count` calls took, to the last byte and the last fd. What they bring is
    /// closed before the next one, beside the clock.
    pub fn time(&mut self, call: &[u8], fds: usize, count: usize) -> Vec<Duration> {
        let each = (0..count).map(|_| {
            let start = Instant::now();
            let (_, came) = self.call(call);
            let took = start.elapsed();
            assert_eq!(came.len(), fds);
            took
        });
        each.collect()
    }
}

/// A GetFds call for a lease, as bytes, with or without a further lease pipe.
pub fn get_fds(lease: &Lease, lifeline: bool) -> Vec<u8> {
    format!(
        "{{\"method\":\"org.vfiobroker.Broker.GetFds\",\
         \"parameters\":{{\"lease\":\"{}\",\"key\":\"{}\",\"lifeline\":{lifeline}}}}}\0",
        lease.id(),
        lease.key()
    )
    .into_bytes()
}

/// Connects to a server that has just been started.
pub fn connect_soon(path: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
