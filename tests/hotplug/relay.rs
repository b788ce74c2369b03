//! A relay between a client and QEMU's monitor, which stops at a command: what the client asked for is
//! done, and the client has not heard of it.

use nix::sys::socket::MsgFlags;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use vfio_broker::sys::fdpass;

pub struct Relay {
    listener: UnixListener,
}

/// A client that is relayed; its connections end when this is dropped.
pub struct Relayed {
    client: UnixStream,
    qemu: BufReader<UnixStream>,
    /// What QEMU has said and the client has not heard.
    unheard: Vec<u8>,
}

impl Relay {
    pub fn listen(path: &Path, user: u32) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        chown(path, Some(user), Some(user)).unwrap();
        Self { listener }
    }

    /// The next client, which is greeted.
    pub fn accept(&self, monitor: &Path) -> Relayed {
        let client = self.listener.accept().unwrap().0;
        let qemu = BufReader::new(UnixStream::connect(monitor).unwrap());
        let mut relayed = Relayed { client, qemu, unheard: Vec::new() };
        relayed.hear();
        relayed.tell();
        relayed
    }

    /// Relays one client's commands until number `at` is done; its name. `None` when the client has
    /// ended before.
    pub fn until(&self, at: usize, monitor: &Path) -> Option<(String, Relayed)> {
        let mut relayed = self.accept(monitor);
        let mut count = 0..;
        let call = relayed.until(|_| count.next() == Some(at))?;
        Some((call["execute"].as_str().unwrap().to_owned(), relayed))
    }
}

impl Relayed {
    /// Relays commands until one of them, which is done then. `None` when the client has ended.
    pub fn until(&mut self, mut stop: impl FnMut(&Value) -> bool) -> Option<Value> {
        loop {
            self.tell();
            let call = self.command()?;
            if stop(&call) {
                return Some(call);
            }
        }
    }

    /// Has the client's next command done.
    fn command(&mut self) -> Option<Value> {
        let (mut line, mut files) = (Vec::new(), Vec::new());
        while line.last() != Some(&b'\n') {
            let mut buf = [0; 4096];
            match fdpass::receive(self.client.as_fd(), &mut buf, 16, MsgFlags::empty()) {
                Ok(got) if got.len > 0 => {
                    line.extend_from_slice(&buf[..got.len]);
                    files.extend(got.fds);
                }
                _ => return None,
            }
        }
        let with: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let qemu = self.qemu.get_ref().as_fd();
        let sent = fdpass::send(qemu, &line, &with, MsgFlags::empty()).unwrap();
        assert_eq!(sent, line.len());
        while self.hear() {}
        Some(serde_json::from_slice(&line).unwrap())
    }

    /// Hears one line of QEMU's; says whether it is an event, with more to come.
    fn hear(&mut self) -> bool {
        let before = self.unheard.len();
        self.qemu.read_until(b'\n', &mut self.unheard).unwrap();
        String::from_utf8_lossy(&self.unheard[before..]).contains("\"event\"")
    }

    /// Passes on what QEMU has said.
    fn tell(&mut self) {
        // It may have ended.
        let _ = self.client.write_all(&std::mem::take(&mut self.unheard));
    }
}
