//! A relay between a client and QEMU's monitor, which stops at a command: what the client asked for is
//! done, and the client has not heard of it.

use nix::sys::socket::MsgFlags;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use vfio_broker::fdpass;

pub struct Relay {
    listener: UnixListener,
}

/// Where it has stopped; the connections end when it is dropped.
pub struct Stopped {
    _client: UnixStream,
    _qemu: UnixStream,
}

impl Relay {
    pub fn listen(path: &Path, user: u32) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        chown(path, Some(user), Some(user)).unwrap();
        Self { listener }
    }

    /// Relays one client's commands until number `at` is done; its name. `None` when the client has
    /// ended before.
    pub fn until(&self, at: usize, monitor: &Path) -> Option<(String, Stopped)> {
        let client = self.listener.accept().unwrap().0;
        let qemu = UnixStream::connect(monitor).unwrap();
        let mut answers = BufReader::new(qemu.try_clone().unwrap());
        let mut to_client = client.try_clone().unwrap();
        let mut answer = |say: bool| {
            let mut line = String::new();
            answers.read_line(&mut line).unwrap();
            if say {
                // It may have ended.
                let _ = to_client.write_all(line.as_bytes());
            }
            !line.contains("\"event\"")
        };
        answer(true); // the greeting
        for number in 0.. {
            let (mut line, mut files) = (Vec::new(), Vec::new());
            while line.last() != Some(&b'\n') {
                let mut buf = [0; 4096];
                let got = fdpass::receive(client.as_fd(), &mut buf, 16, MsgFlags::empty());
                match got {
                    Ok(got) if got.len > 0 => {
                        line.extend_from_slice(&buf[..got.len]);
                        files.extend(got.fds);
                    }
                    _ => return None,
                }
            }
            let with: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            let sent = fdpass::send(qemu.as_fd(), &line, &with, MsgFlags::empty()).unwrap();
            assert_eq!(sent, line.len());
            drop(files);
            while !answer(number != at) {}
            if number == at {
                let call: serde_json::Value = serde_json::from_slice(&line).unwrap();
                let name = call["execute"].as_str().unwrap().to_owned();
                return Some((name, Stopped { _client: client, _qemu: qemu }));
            }
        }
        None
    }
}
