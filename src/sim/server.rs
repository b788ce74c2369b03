//! The simulation's one thread: it waits on every simulated open file and every control
//! connection, and answers calls one at a time.

mod locks;
mod writes;

use super::answer::Answers;
use super::fault::{Effect, Faults};
use super::incoming::{Call, Disposer, Incoming};
use super::machine::{CallArg, FileId, Machine, UserStruct};
use super::sysfs::Sysfs;
use super::wire::{Answer, ArgKind, MAX_MESSAGE, Op, Request};
use crate::kernel::Node;
use crate::sys::fdpass::{self, ReceiveError};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, setsockopt,
    socket, socketpair, sockopt,
};
use nix::sys::stat::fstat;
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const LISTENER: u64 = 0;
const FIRST: u64 = 1;

/// How many messages one fd may have answered before others get their turn.
const TURN: usize = 32;

/// How long to wait before accepting again when there were no fds left.
const PAUSE: Duration = Duration::from_millis(100);

/// Something that messages come from.
struct Source {
    fd: OwnedFd,
    /// The simulated open file, `None` for a control connection.
    file: Option<FileId>,
    /// The inode of the end that was given out.
    inode: u64,
}

/// The server's state; [`Server::run`] is its thread.
pub(super) struct Server {
    machine: Machine,
    sysfs: Option<Sysfs>,
    faults: Faults,
    epoll: Epoll,
    /// The simulated open files again, for hang-ups alone.
    hangups: Epoll,
    stop: Arc<AtomicBool>,
    listener: UnixListener,
    paused: bool,
    sources: HashMap<u64, Source>,
    incoming: Incoming,
    answers: Answers,
    /// The iommufds whose maps wait for a page, by the token of the answer.
    faulting: HashMap<u64, u64>,
    /// What waits because of that, in its order.
    blocked: Vec<locks::Blocked>,
    next: u64,
    buf: Vec<u8>,
}

impl Server {
    /// A server that listens at `control`. It ends with the first message or connection that it
    /// gets after `stop` was set.
    pub(super) fn new(machine: Machine, control: &Path, stop: Arc<AtomicBool>) -> io::Result<Self> {
        let listener = listen_at(control)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let hangups = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        Ok(Self {
            machine,
            sysfs: None,
            faults: Faults::default(),
            epoll,
            hangups,
            stop,
            listener,
            paused: false,
            sources: HashMap::new(),
            incoming: Incoming::new(Disposer::start()),
            answers: Answers::default(),
            faulting: HashMap::new(),
            blocked: Vec::new(),
            next: FIRST,
            buf: vec![0; MAX_MESSAGE],
        })
    }

    /// Serves until it is stopped.
    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        // Looked at between the last message that was received and the wait for the next.
        while !self.stop.load(Ordering::SeqCst) {
            let found = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(found) => found,
                Err(Errno::EINTR) => 0,
                Err(_) => return,
            };
            for event in events.iter().take(found) {
                match event.data() {
                    LISTENER => self.accept(),
                    token if self.answers.is_held(token) => {
                        self.answers.forget(token);
                    }
                    token => self.serve(token, event.events()),
                }
            }
            self.answers.send_due();
            self.unlock();
            if self.paused && found == 0 {
                self.pause(false);
            }
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let pause = self.paused.then_some(PAUSE);
        let next = self.answers.next_due().into_iter().chain(pause).min();
        // Rounded up, so that it is due when the time is over.
        let next = next.and_then(|it| EpollTimeout::try_from(it + Duration::from_millis(1)).ok());
        next.unwrap_or(EpollTimeout::NONE)
    }

    fn accept(&mut self) {
        for _ in 0..TURN {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let _ = self.add(OwnedFd::from(stream), None, 0);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Out of fds: the listener would report itself again and again.
                Err(_) => return self.pause(true),
            }
        }
    }

    fn pause(&mut self, paused: bool) {
        self.paused = paused;
        let flags = if paused { EpollFlags::empty() } else { EpollFlags::EPOLLIN };
        let _ = self.epoll.modify(&self.listener, &mut EpollEvent::new(flags, LISTENER));
    }

    fn add(&mut self, fd: OwnedFd, file: Option<FileId>, inode: u64) -> Result<(), Errno> {
        let token = self.next;
        self.next += 1;
        self.epoll.add(&fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        if file.is_some() {
            self.hangups.add(&fd, EpollEvent::new(EpollFlags::empty(), token))?;
        }
        self.sources.insert(token, Source { fd, file, inode });
        Ok(())
    }

    /// Answers what has come in on one fd.
    fn serve(&mut self, token: u64, flags: EpollFlags) {
        for _ in 0..TURN {
            match self.receive(token) {
                Ok(Some(call)) => {
                    // What was closed before this call was made has to be closed first.
                    self.reap(token);
                    self.answer(token, call);
                }
                Ok(None) if flags.contains(EpollFlags::EPOLLHUP) => return self.remove(token),
                Ok(None) => return self.half_closed(token),
                Err(ReceiveError::Errno(Errno::EAGAIN)) => return,
                // A message that could not be taken: its reply socket is closed, so that the
                // caller is told.
                Err(ReceiveError::Truncated { .. }) => {}
                Err(ReceiveError::Errno(_)) => return self.remove(token),
            }
        }
    }

    /// Receives one message; `None` at the end.
    fn receive(&mut self, token: u64) -> Result<Option<Call>, ReceiveError> {
        let Some(source) = self.sources.get(&token) else {
            return Err(ReceiveError::Errno(Errno::EAGAIN));
        };
        let flags = MsgFlags::MSG_DONTWAIT;
        let received = fdpass::receive(source.fd.as_fd(), &mut self.buf, fdpass::MAX_FDS, flags)?;
        // An empty message has a sender, the end has none.
        if received.len == 0 && received.sender.is_none() && received.fds.is_empty() {
            return Ok(None);
        }
        let request = self.buf.get(..received.len).and_then(Request::decode);
        Ok(Some(Call { request, sender: received.sender, fds: received.fds }))
    }

    /// Somebody has shut down the writing side of a shared fd, but it is still open.
    fn half_closed(&mut self, token: u64) {
        match self.sources.get(&token) {
            Some(source) if source.file.is_some() => {
                let mut event = EpollEvent::new(EpollFlags::empty(), token);
                let _ = self.epoll.modify(&source.fd, &mut event);
            }
            _ => self.remove(token),
        }
    }

    /// Releases the files that have been closed, in every process, up to now.
    fn reap(&mut self, except: u64) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let found = self.hangups.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            let mut released = 0;
            for event in events.iter().take(found) {
                let token = event.data();
                if token == except {
                    continue;
                }
                // Calls that were made before the close are still waiting.
                while let Ok(Some(call)) = self.receive(token) {
                    self.answer(token, call);
                }
                self.remove(token);
                released += 1;
            }
            if released == 0 {
                return;
            }
        }
    }

    fn remove(&mut self, token: u64) {
        let Some(source) = self.sources.remove(&token) else { return };
        if let Some(file) = source.file {
            self.incoming.forget(source.inode);
            self.close(file);
        }
        if self.paused {
            self.pause(false);
        }
    }

    /// Carries out one message and sends the answer.
    fn answer(&mut self, token: u64, mut call: Call) {
        let Some(reply) = self.incoming.take_reply(&mut call) else { return };
        let file = self.sources.get(&token).and_then(|source| source.file);
        let Some(request) =
            call.request.take().filter(|request| request.op.is_on_file() == file.is_some())
        else {
            return self.answers.send(reply, &Answer::failed(Errno::EINVAL), None);
        };
        let (name, object) = self.describe(file, &request);
        let effect = self.faults.count(&name, &object);
        if let Some(Effect::Fail(errno)) = effect {
            let errno = Errno::from_raw(errno);
            self.incoming.dispose(call);
            return self.answers.send(reply, &Answer::failed(errno), None);
        }
        if request.op == Op::SysfsWrite {
            return self.write_sysfs(request, reply, effect);
        }
        self.once_unlocked(file, request, call, reply, effect);
    }

    /// Sends an answer, or holds it back as a fault says.
    fn give(
        &mut self,
        reply: OwnedFd,
        effect: Option<Effect>,
        answer: &Answer,
        fd: Option<OwnedFd>,
    ) {
        match effect {
            None => self.answers.send(reply, answer, fd),
            Some(effect) => {
                let token = self.next;
                self.next += 1;
                self.answers.hold(&self.epoll, token, effect, reply, answer, fd);
            }
        }
    }

    /// What faults call a call and its object.
    fn describe(&self, file: Option<FileId>, request: &Request) -> (String, String) {
        let text = String::from_utf8_lossy(&request.bytes).into_owned();
        match (file, request.op) {
            (Some(file), Op::Ioctl) => {
                (self.machine.call_name(file, request.number).into(), self.machine.name(file))
            }
            (Some(file), Op::Pread) => ("pread".into(), self.machine.name(file)),
            (Some(file), Op::Pwrite) => ("pwrite".into(), self.machine.name(file)),
            (_, Op::Open) => ("open".into(), text),
            (_, Op::SysfsRead | Op::SysfsList | Op::SysfsLink | Op::SysfsInode) => {
                ("sysfs".into(), text)
            }
            (_, Op::SysfsWrite) => ("sysfs_write".into(), text),
            _ => (String::new(), String::new()),
        }
    }

    fn carry_out(
        &mut self,
        file: Option<FileId>,
        request: Request,
        call: Call,
        reply: &OwnedFd,
    ) -> Result<(Answer, Option<OwnedFd>), Errno> {
        let caller = call.caller().ok_or(Errno::EPERM)?;
        let named = self.incoming.name(&request, call, reply)?;
        let Some(file) = file else { return self.control(&request, &caller) };
        match request.op {
            Op::Pread => {
                let bytes = self.machine.read(file, request.len as usize, request.value)?;
                let value = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
                return Ok((Answer { value, bytes, ..Answer::default() }, None));
            }
            Op::Pwrite => {
                let written = self.machine.write(file, &request.bytes, request.value)?;
                let value = i32::try_from(written).unwrap_or(i32::MAX);
                return Ok((Answer { value, ..Answer::default() }, None));
            }
            _ => {}
        }
        let mut arg = match request.kind {
            ArgKind::Value => CallArg::Value(request.value),
            ArgKind::BadPointer => CallArg::BadPointer,
            ArgKind::Text => CallArg::Text(request.bytes),
            ArgKind::Fd => CallArg::File(named.into_iter().next().and_then(|(_, it)| it)),
            ArgKind::Struct => CallArg::Struct(UserStruct {
                bytes: request.bytes,
                fds: named,
                out: request.out.map(|(_, out)| out),
            }),
        };
        let result = self.machine.ioctl(file, request.number, &mut arg, &caller);
        let mut answer = Answer::default();
        if let CallArg::Struct(user) = arg {
            (answer.bytes, answer.out) = (user.bytes, user.out.unwrap_or_default());
        }
        let mut fd = None;
        match result {
            Ok(done) => {
                answer.value = done.value;
                fd = done.file.map(|file| self.hand_out(file)).transpose()?;
            }
            Err(errno) => answer.errno = errno as i32,
        }
        Ok((answer, fd))
    }

    /// Makes the fd of a new open file. Where that fails the file is closed again.
    fn hand_out(&mut self, file: FileId) -> Result<OwnedFd, Errno> {
        let made = self.make_fd(file);
        if made.is_err() {
            self.machine.close(file);
        }
        made
    }

    fn make_fd(&mut self, file: FileId) -> Result<OwnedFd, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        setsockopt(&ours, sockopt::PassCred, &true)?;
        let inode = fstat(&theirs)?.st_ino;
        self.add(ours, Some(file), inode)?;
        self.incoming.know(inode, file);
        Ok(theirs)
    }

    fn control(
        &mut self,
        request: &Request,
        caller: &super::process::Process,
    ) -> Result<(Answer, Option<OwnedFd>), Errno> {
        let text = || std::str::from_utf8(&request.bytes).map_err(|_| Errno::ENOENT);
        let bytes = match request.op {
            Op::Open => {
                let node = parse_node(text()?).ok_or(Errno::ENOENT)?;
                let file = self.machine.open(&node, caller)?;
                let fd = self.hand_out(file)?;
                return Ok((Answer::default(), Some(fd)));
            }
            Op::SysfsRead => self.tree().read(text()?)?,
            Op::SysfsList => self.tree().list(text()?)?.join("\n").into_bytes(),
            Op::SysfsLink => self.tree().target(text()?)?.into_bytes(),
            Op::SysfsInode => self.tree().inode(text()?)?.to_ne_bytes().to_vec(),
            Op::AddFault => {
                let fault = serde_json::from_slice(&request.bytes).map_err(|_| Errno::EINVAL)?;
                if !self.faults.add(fault) {
                    return Err(Errno::EINVAL);
                }
                Vec::new()
            }
            Op::ClearFaults => {
                self.faults.clear();
                self.answers.send_all();
                Vec::new()
            }
            Op::Stats => {
                let mut stats = self.machine.stats();
                stats.held = self.answers.held() + self.blocked.len() as u64;
                let first = usize::try_from(request.value).unwrap_or(usize::MAX);
                stats.spaces = stats.spaces.into_iter().skip(first).take(STATS_PAGE).collect();
                stats.iommufds = stats.iommufds.into_iter().skip(first).take(STATS_PAGE).collect();
                serde_json::to_vec(&stats).map_err(|_| Errno::EIO)?
            }
            Op::SetDriver => {
                let text = text()?;
                let (bdf, driver) = match text.split_once(' ') {
                    Some((bdf, driver)) => (bdf, Some(driver)),
                    None => (text, None),
                };
                let bdf = bdf.parse().map_err(|_| Errno::ENODEV)?;
                self.sysfs = None;
                self.machine.set_driver(bdf, driver)?;
                Vec::new()
            }
            Op::Ioctl | Op::Pread | Op::Pwrite | Op::SysfsWrite => return Err(Errno::EINVAL),
        };
        Ok((Answer { bytes, ..Answer::default() }, None))
    }

    fn tree(&mut self) -> &Sysfs {
        let machine = &self.machine;
        self.sysfs.get_or_insert_with(|| Sysfs::of(machine))
    }
}

/// How many containers and iommufds each one answer to a request for counts has.
pub(super) const STATS_PAGE: usize = 256;

pub(super) fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    // Connections inherit it: set on them, it would come too late for a message that is already
    // there, whose sender would then be nobody.
    setsockopt(&fd, sockopt::PassCred, &true)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(128)?)?;
    // The standard library's listener accepts from any kind of Unix socket.
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn parse_node(path: &str) -> Option<Node> {
    if path == "/dev/iommu" {
        return Some(Node::Iommu);
    }
    let name = path.strip_prefix("/dev/vfio/")?;
    if name == "vfio" {
        return Some(Node::Container);
    }
    // Only as the kernel writes numbers: no sign, no leading zeros.
    let number = |text: &str| text.parse().ok().filter(|it: &u32| it.to_string() == text);
    if let Some(rest) = name.strip_prefix("devices/vfio") {
        return number(rest).map(Node::Cdev);
    }
    match name.strip_prefix("noiommu-") {
        Some(rest) => number(rest).map(Node::NoIommuGroup),
        None => number(name).map(Node::Group),
    }
}
