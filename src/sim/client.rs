//! The calling side: a [`Kernel`] whose calls are messages to a simulated one.

use super::fault::Fault;
use super::server::STATS_PAGE;
use super::stats::Stats;
use super::wire::{self, Answer, ArgKind, Op, Request};
use crate::kernel::{Arg, Ioctl, Kernel, Node, Reply, parse};
use crate::sys::fdpass::{self, ReceiveError};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, socket, socketpair,
};
use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A simulated kernel, reached from any process.
///
/// Calls on fds that are in hand need nothing but the fd; opening nodes and reading sysfs need a
/// connection to the simulation's control socket. One `Wire` serves all threads.
#[derive(Debug)]
pub struct Wire {
    control: Option<OwnedFd>,
}

impl Wire {
    /// Connects to a simulation by the path of its control socket.
    ///
    /// # Errors
    /// What connect(2) says.
    pub fn connect(control: &Path) -> io::Result<Self> {
        Self::connect_with(unconnected()?, control)
    }

    /// The same, with a socket that was made before.
    pub(super) fn connect_with(socket: OwnedFd, control: &Path) -> io::Result<Self> {
        connect(socket.as_raw_fd(), &UnixAddr::new(control)?)?;
        Ok(Self { control: Some(socket) })
    }

    /// A kernel for fds that were handed over: open and sysfs fail with ENOSYS.
    pub fn detached() -> Self {
        Self { control: None }
    }

    /// What hangs up when the simulation ends; `None` detached.
    pub fn end(&self) -> Option<OwnedFd> {
        self.control.as_ref().and_then(|control| control.try_clone().ok())
    }

    /// Adds a fault to the simulation.
    ///
    /// # Errors
    /// EINVAL a fault that makes no sense; ENOSYS detached.
    pub fn fault(&self, fault: &Fault) -> Result<(), Errno> {
        let text = serde_json::to_string(fault).map_err(|_| Errno::EINVAL)?;
        self.control_call(&Request::with_text(Op::AddFault, &text)).map(drop)
    }

    /// Forgets all faults; replies that were held back are sent.
    ///
    /// # Errors
    /// ENOSYS detached.
    pub fn clear_faults(&self) -> Result<(), Errno> {
        self.control_call(&Request::new(Op::ClearFaults)).map(drop)
    }

    /// What is open and mapped.
    ///
    /// # Errors
    /// ENOSYS detached.
    pub fn stats(&self) -> Result<Stats, Errno> {
        let (mut spaces, mut iommufds) = (Vec::new(), Vec::new());
        for first in (0..).step_by(STATS_PAGE) {
            let request = Request { value: first, ..Request::new(Op::Stats) };
            let (answer, _) = self.control_call(&request)?;
            let page: Stats = serde_json::from_slice(&answer.bytes).map_err(|_| Errno::EPROTO)?;
            let last = page.spaces.len().max(page.iommufds.len()) < STATS_PAGE;
            spaces.extend(page.spaces.iter().cloned());
            iommufds.extend(page.iommufds.iter().cloned());
            if last {
                return Ok(Stats { spaces, iommufds, ..page });
            }
        }
        Err(Errno::EPROTO)
    }

    /// Binds a device to a driver, or to none.
    ///
    /// # Errors
    /// See [`super::machine::Machine::set_driver`]; ENOSYS detached.
    pub fn set_driver(&self, bdf: &str, driver: Option<&str>) -> Result<(), Errno> {
        let text = driver.map_or(bdf.to_owned(), |driver| format!("{bdf} {driver}"));
        self.control_call(&Request::with_text(Op::SetDriver, &text)).map(drop)
    }

    fn control_call(&self, request: &Request) -> Result<(Answer, Option<OwnedFd>), Errno> {
        let control = self.control.as_ref().ok_or(Errno::ENOSYS)?;
        succeeded(call(control.as_fd(), request, &[])?)
    }
}

/// A socket to connect to a simulation with.
pub(super) fn unconnected() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    Ok(socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?)
}

impl Kernel for Wire {
    fn is_simulated(&self) -> bool {
        true
    }

    fn open(&self, node: &Node) -> Result<OwnedFd, Errno> {
        let (_, fd) = self.control_call(&Request::with_text(Op::Open, &node.to_string()))?;
        fd.ok_or(Errno::EPROTO)
    }

    fn find(&self, node: &Node) -> Result<(), Errno> {
        match self.open(node) {
            // It is there, and not for everybody.
            Ok(_) | Err(Errno::EACCES | Errno::EPERM | Errno::EBUSY) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn ioctl(&self, fd: BorrowedFd<'_>, ioctl: Ioctl<'_>) -> Result<Reply, Errno> {
        let number = ioctl.request.number;
        let mut request = Request { number, ..Request::new(Op::Ioctl) };
        let mut named = Vec::new();
        let mut answered = None;
        match ioctl.arg {
            Arg::Value(value) => request.value = value,
            Arg::BadPointer => request.kind = ArgKind::BadPointer,
            Arg::Text(text) => {
                request.kind = ArgKind::Text;
                request.bytes = text.to_bytes().to_vec();
            }
            Arg::Fd(container) => {
                request.kind = ArgKind::Fd;
                request.slots.push((0, true));
                named.push(container);
            }
            Arg::Struct { bytes, fds, out } => {
                // As the real kernel layer: a struct that promises more than is there is refused.
                if parse::u32_at(bytes, 0) as usize > bytes.len().max(256) {
                    return Err(Errno::EINVAL);
                }
                request.kind = ArgKind::Struct;
                request.bytes = bytes.to_vec();
                for slot in fds {
                    let offset = u32::try_from(slot.offset).map_err(|_| Errno::EINVAL)?;
                    request.slots.push((offset, slot.fd.is_some()));
                    named.extend(slot.fd);
                }
                let mut into = None;
                if let Some((offset, buffer)) = out {
                    let offset = u32::try_from(offset).map_err(|_| Errno::EINVAL)?;
                    request.out = Some((offset, buffer.to_vec()));
                    into = Some(buffer);
                }
                answered = Some((bytes, into));
            }
        }
        let (answer, fd) = call(fd, &request, &named)?;
        if let Some((bytes, out)) = answered {
            copy(bytes, &answer.bytes);
            if let Some(out) = out {
                copy(out, &answer.out);
            }
        }
        let (answer, fd) = succeeded((answer, fd))?;
        Ok(Reply { value: answer.value, fd })
    }

    fn pread(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let len = buf.len().min(wire::MAX_BYTES);
        let request = Request { value: offset, len: len as u32, ..Request::new(Op::Pread) };
        let (answer, _) = succeeded(call(fd, &request, &[])?)?;
        Ok(copy(&mut buf[..len], &answer.bytes))
    }

    fn pwrite(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> Result<usize, Errno> {
        let bytes = buf[..buf.len().min(wire::MAX_BYTES)].to_vec();
        let request = Request { value: offset, bytes, ..Request::new(Op::Pwrite) };
        let (answer, _) = succeeded(call(fd, &request, &[])?)?;
        usize::try_from(answer.value).map_err(|_| Errno::EPROTO)
    }

    fn sysfs_read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        Ok(self.control_call(&Request::with_text(Op::SysfsRead, path))?.0.bytes)
    }

    fn sysfs_write(&self, path: &str, bytes: &[u8]) -> Result<(), Errno> {
        let out = Some((0, bytes.to_vec()));
        let request = Request { out, ..Request::with_text(Op::SysfsWrite, path) };
        self.control_call(&request).map(drop)
    }

    fn sysfs_list(&self, path: &str) -> Result<Vec<String>, Errno> {
        let (answer, _) = self.control_call(&Request::with_text(Op::SysfsList, path))?;
        let text = String::from_utf8(answer.bytes).map_err(|_| Errno::EPROTO)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    fn sysfs_inode(&self, path: &str) -> Result<u64, Errno> {
        let (answer, _) = self.control_call(&Request::with_text(Op::SysfsInode, path))?;
        answer.bytes.try_into().map(u64::from_ne_bytes).map_err(|_| Errno::EPROTO)
    }

    fn sysfs_link(&self, path: &str) -> Result<String, Errno> {
        let (answer, _) = self.control_call(&Request::with_text(Op::SysfsLink, path))?;
        String::from_utf8(answer.bytes).map_err(|_| Errno::EPROTO)
    }
}

/// Makes one call and waits for its answer.
///
/// # Errors
/// ENOTTY the fd is no simulated one; E2BIG more bytes or fds than a message takes; EIO the
/// simulation is gone, or had no use for the message.
fn call(
    fd: BorrowedFd<'_>,
    request: &Request,
    named: &[BorrowedFd<'_>],
) -> Result<(Answer, Option<OwnedFd>), Errno> {
    let out_len = request.out.as_ref().map_or(0, |(_, out)| out.len());
    let too_long = request.bytes.len() > wire::MAX_BYTES || out_len > wire::MAX_BYTES;
    if too_long || named.len() > wire::MAX_CALL_FDS {
        return Err(Errno::E2BIG);
    }
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let (first, rest) = named.split_at(named.len().min(wire::FDS_WITH_CALL));
    for more in rest.chunks(fdpass::MAX_FDS) {
        fdpass::send(ours.as_fd(), b"+", more, MsgFlags::empty())?;
    }
    let mut fds = vec![theirs.as_fd()];
    fds.extend_from_slice(first);
    fdpass::send(fd, &request.encode(), &fds, MsgFlags::empty()).map_err(not_simulated)?;
    // Now only the simulation has the other end: if it lets go of it, we are told.
    drop(theirs);
    receive_answer(&ours)
}

thread_local! {
    /// Where answers are received: too much to allocate for every call.
    static BUF: RefCell<Vec<u8>> = RefCell::new(vec![0; wire::MAX_MESSAGE]);
}

fn receive_answer(socket: &OwnedFd) -> Result<(Answer, Option<OwnedFd>), Errno> {
    BUF.with_borrow_mut(|buf| receive_into(socket, buf))
}

fn receive_into(socket: &OwnedFd, buf: &mut [u8]) -> Result<(Answer, Option<OwnedFd>), Errno> {
    let received = fdpass::receive(socket.as_fd(), buf, 1, MsgFlags::empty());
    let mut received = received.map_err(|error| match error {
        ReceiveError::Errno(errno) => errno,
        ReceiveError::Truncated { .. } => Errno::EMFILE,
    })?;
    let answer = buf.get(..received.len).and_then(Answer::decode).ok_or(Errno::EIO)?;
    Ok((answer, received.fds.pop()))
}

fn succeeded((answer, fd): (Answer, Option<OwnedFd>)) -> Result<(Answer, Option<OwnedFd>), Errno> {
    if answer.errno != 0 { Err(Errno::from_raw(answer.errno)) } else { Ok((answer, fd)) }
}

fn not_simulated(errno: Errno) -> Errno {
    match errno {
        // What a real ioctl says to a file that knows none.
        Errno::ENOTSOCK | Errno::ENOTCONN | Errno::EDESTADDRREQ => Errno::ENOTTY,
        Errno::EPIPE | Errno::ECONNRESET | Errno::ECONNREFUSED => Errno::EIO,
        other => other,
    }
}

/// Copies as many bytes as both have; returns how many.
fn copy(to: &mut [u8], from: &[u8]) -> usize {
    let len = to.len().min(from.len());
    to[..len].copy_from_slice(&from[..len]);
    len
}
