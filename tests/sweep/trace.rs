//! The steps of a service's processes, by ptrace(2).
//!
//! A step is a system call that others can notice: a message, a file of the runtime directory, a new
//! process, the end of one, a lock, a limit, the last word of a socket or a pipe. What only reads, and what
//! only the process itself can notice, is none: killed before or after it, all others see the same. Reads
//! of sysfs are messages here, because the kernel is simulated, and are no steps either, and neither are
//! the reply sockets of all such messages. A log's lines are none. Each step has two moments: before the call, and after it where the process then waits, so
//! that others can go on in between.

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How long nothing happens at the end of an operation: no process does more than wait.
const QUIET: Duration = Duration::from_millis(25);

/// Calls that the simulated kernel is read by: see `docs/sim.md`.
const READS: std::ops::RangeInclusive<u32> = 17..=20;

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Launcher,
    Broker,
    Keeper,
    /// Receivers and closers.
    Helper,
    Log,
}

impl Role {
    fn of(pid: Pid) -> Self {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        match name.trim_end() {
            "vfiob-broker" => Self::Broker,
            "vfiob-keeper" => Self::Keeper,
            "vfiob-receiver" | "vfiob-closer" => Self::Helper,
            "vfiob-log" => Self::Log,
            _ => Self::Launcher,
        }
    }
}

/// Before the call, or after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    Before,
    After,
}

/// A point of an operation: the n-th step of a role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Point {
    pub role: Role,
    pub nth: usize,
    pub moment: Moment,
    pub call: &'static str,
    /// Which roles had a process then.
    pub alive: BTreeSet<Role>,
}

impl Point {
    fn is_at(&self, other: &Self) -> bool {
        (self.role, self.nth, self.moment) == (other.role, other.nth, other.moment)
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let moment = if self.moment == Moment::Before { "before" } else { "after" };
        write!(f, "{moment} {:?}'s {} (step {})", self.role, self.call, self.nth)
    }
}

#[derive(Default)]
struct Tracee {
    stopped: bool,
    waits: bool,
    /// The ends of a reply socket that it is about to close.
    reply_ends: u8,
    /// The step that it is in.
    step: Option<Point>,
    /// The step that it has done, with nothing done since.
    done: Option<Point>,
}

/// The processes of one service, traced by this thread.
#[derive(Default)]
pub struct Tracer {
    tracees: BTreeMap<Pid, Tracee>,
    counts: BTreeMap<Role, usize>,
    /// The point that the last news was of.
    latest: Option<Point>,
    /// All points so far.
    pub points: Vec<Point>,
}

impl Tracer {
    /// Traces these processes and all that they start.
    pub fn seize(pids: &[Pid]) -> Self {
        let mut tracer = Self::default();
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACECLONE;
        for pid in pids {
            let seized = ptrace::seize(*pid, options);
            seized.unwrap_or_else(|errno| panic!("ptrace is needed here, and refused: {errno}"));
            tracer.tracees.insert(*pid, Tracee::default());
            ptrace::interrupt(*pid).unwrap();
        }
        while tracer.tracees.values().any(|tracee| !tracee.stopped) {
            tracer.next(false);
        }
        let all: Vec<_> = tracer.tracees.keys().copied().collect();
        all.into_iter().for_each(|pid| tracer.go_on(pid, None));
        tracer
    }

    /// Lets them run up to a point, or until `is_over` and nobody does anything more. Whether the point
    /// was reached; the one that is at it stands still then.
    pub fn run(
        &mut self,
        to: Option<&Point>,
        what: &str,
        mut is_over: impl FnMut() -> bool,
    ) -> bool {
        let (mut last, start) = (Instant::now(), Instant::now());
        loop {
            self.latest = None;
            let stopped = self.next(true);
            if self.latest.take().is_some_and(|point| to.is_some_and(|to| point.is_at(to))) {
                return true;
            }
            if let Some((pid, signal)) = stopped {
                self.go_on(pid, signal);
                last = Instant::now();
                continue;
            }
            let idle = self.tracees.values().all(|tracee| tracee.waits);
            if idle && last.elapsed() > QUIET && is_over() {
                return false;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{what} has no end");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Kills these where they are, and waits until they are no more.
    pub fn kill(&mut self, victims: &BTreeSet<Role>) -> BTreeSet<Pid> {
        let all: Vec<Pid> = self.tracees.keys().copied().collect();
        let dead: BTreeSet<Pid> =
            all.into_iter().filter(|pid| victims.contains(&Role::of(*pid))).collect();
        for pid in &dead {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        while dead.iter().any(|pid| self.tracees.contains_key(pid)) {
            // Who was about to stop stays there: nobody gets further than the point.
            self.next(false);
        }
        dead
    }

    /// Lets all go on, untraced; `all` are the processes there are. One that was forked in the last moment
    /// is traced before it is heard of.
    pub fn release(&mut self, all: impl Fn() -> Vec<Pid>) {
        loop {
            for pid in self.tracees.keys() {
                let _ = ptrace::interrupt(*pid);
            }
            while let Some((&pid, tracee)) = self.tracees.iter().max_by_key(|(_, it)| it.stopped) {
                if tracee.stopped {
                    let _ = ptrace::detach(pid, None);
                    self.tracees.remove(&pid);
                } else if let Some((pid, Some(signal))) = self.next(false) {
                    let _ = ptrace::detach(pid, signal);
                    self.tracees.remove(&pid);
                }
            }
            if !all().into_iter().any(is_traced) {
                return;
            }
            self.next(true);
        }
    }

    fn go_on(&mut self, pid: Pid, signal: Option<Signal>) {
        if let Some(tracee) = self.tracees.get_mut(&pid) {
            tracee.stopped = false;
        }
        // One that is killed just now has no more need of it.
        let _ = ptrace::syscall(pid, signal);
    }

    /// Takes the next news of a process: which one has stopped, and the signal that it is to get.
    fn next(&mut self, at_once: bool) -> Option<(Pid, Option<Signal>)> {
        let mut flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        flags.set(WaitPidFlag::WNOHANG, at_once);
        let (pid, signal) = match waitpid(None, Some(flags)) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) => {
                self.tracees.remove(&pid);
                return None;
            }
            Ok(WaitStatus::PtraceSyscall(pid)) => {
                self.at_call(pid);
                (pid, None)
            }
            Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                let is_fork =
                    [libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_VFORK, libc::PTRACE_EVENT_CLONE]
                        .contains(&event);
                if let Some(child) = ptrace::getevent(pid).ok().filter(|_| is_fork) {
                    self.tracees.entry(Pid::from_raw(child as i32)).or_default();
                }
                (pid, None)
            }
            Ok(WaitStatus::Stopped(pid, signal)) => (pid, Some(signal)),
            Ok(_) => return None,
            Err(Errno::ECHILD) if at_once || self.tracees.is_empty() => {
                self.tracees.clear();
                return None;
            }
            Err(errno) => panic!("waitpid: {errno}"),
        };
        self.tracees.entry(pid).or_default().stopped = true;
        Some((pid, signal))
    }

    /// A process is before a system call, or behind it.
    fn at_call(&mut self, pid: Pid) {
        let Ok(info) = ptrace::syscall_info(pid) else { return };
        let is_entry = info.op == libc::PTRACE_SYSCALL_INFO_ENTRY;
        let mut tracee = self.tracees.remove(&pid).unwrap_or_default();
        tracee.waits = false;
        if is_entry {
            #[allow(unsafe_code)]
            // SAFETY: `op` says which part of the union the kernel has filled in.
            let entry = unsafe { info.u.entry };
            let (number, args) = (entry.nr as i64, entry.args);
            tracee.waits = waits(number);
            let role = Role::of(pid);
            let call = tracee.step(pid, number, &args).filter(|_| role != Role::Log);
            if let Some(call) = call {
                let nth = self.counts.entry(role).or_default();
                *nth += 1;
                let mut alive: BTreeSet<Role> =
                    self.tracees.keys().map(|pid| Role::of(*pid)).collect();
                alive.insert(role);
                let point = Point { role, nth: *nth, moment: Moment::Before, call, alive };
                tracee.step = Some(point.clone());
                self.latest = Some(point.clone());
                self.points.push(point);
            }
        } else if let Some(step) = tracee.step.take() {
            let after = Point { moment: Moment::After, ..step };
            tracee.done = Some(after.clone());
            self.latest = Some(after.clone());
            self.points.push(after);
        }
        if is_entry
            && !tracee.waits
            && let Some(done) = tracee.done.take()
        {
            // It has not waited in between: nobody can tell this from the moment before its next step.
            self.points.retain(|point| !point.is_at(&done));
        } else if tracee.waits {
            tracee.done = None;
        }
        self.tracees.insert(pid, tracee);
    }
}

impl Tracee {
    /// The name of a call that is a step.
    fn step(&mut self, pid: Pid, number: i64, args: &[u64; 6]) -> Option<&'static str> {
        match number {
            libc::SYS_sendmsg => {
                let Some(simulated) = simulated(pid, args[1]) else { return Some("sendmsg") };
                self.reply_ends = 2;
                (!READS.contains(&simulated)).then_some("ioctl")
            }
            libc::SYS_close if self.reply_ends > 0 && file(pid, args[0]).starts_with("socket:") => {
                self.reply_ends -= 1;
                None
            }
            _ => step(pid, number, args),
        }
    }
}

/// Calls in which a process is until somebody else does something.
fn waits(number: i64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if [libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_select].contains(&number) {
        return true;
    }
    [
        libc::SYS_restart_syscall,
        libc::SYS_ppoll,
        libc::SYS_epoll_pwait,
        libc::SYS_recvmsg,
        libc::SYS_recvfrom,
        libc::SYS_read,
        libc::SYS_futex,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
    ]
    .contains(&number)
}

/// The name of a step that is a call of its own kind.
fn step(pid: Pid, number: i64, args: &[u64; 6]) -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    match number {
        libc::SYS_rename => return Some("rename"),
        libc::SYS_unlink | libc::SYS_rmdir => return Some("unlink"),
        libc::SYS_mkdir => return Some("mkdir"),
        libc::SYS_fork | libc::SYS_vfork => return Some("fork"),
        libc::SYS_open if args[1] & libc::O_CREAT as u64 != 0 => return Some("create"),
        libc::SYS_chmod => return Some("chmod"),
        _ => {}
    }
    match number {
        libc::SYS_sendto => Some("sendto"),
        libc::SYS_write | libc::SYS_writev | libc::SYS_pwrite64 => {
            (!file(pid, args[0]).starts_with("pipe:")).then_some("write")
        }
        libc::SYS_openat if args[2] & libc::O_CREAT as u64 != 0 => Some("create"),
        libc::SYS_renameat | libc::SYS_renameat2 => Some("rename"),
        libc::SYS_unlinkat => Some("unlink"),
        libc::SYS_mkdirat => Some("mkdir"),
        libc::SYS_fchmod | libc::SYS_fchmodat => Some("chmod"),
        libc::SYS_ftruncate => Some("ftruncate"),
        libc::SYS_bind => Some("bind"),
        libc::SYS_listen => Some("listen"),
        libc::SYS_connect => Some("connect"),
        libc::SYS_accept | libc::SYS_accept4 => Some("accept"),
        libc::SYS_shutdown => Some("shutdown"),
        libc::SYS_clone | libc::SYS_clone3 => Some("fork"),
        libc::SYS_flock => Some("flock"),
        libc::SYS_kill | libc::SYS_pidfd_send_signal => Some("kill"),
        libc::SYS_prlimit64 if args[2] != 0 => Some("prlimit"),
        libc::SYS_exit_group => Some("exit"),
        libc::SYS_close => {
            let file = file(pid, args[0]);
            let is_seen = file.starts_with("socket:") || file.starts_with("pipe:");
            (is_seen || file.ends_with("/lock")).then_some("close")
        }
        _ => None,
    }
}

fn is_traced(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mut tracer = status.lines().filter_map(|line| line.strip_prefix("TracerPid:\t"));
    tracer.any(|tracer| tracer != "0")
}

fn file(pid: Pid, number: u64) -> String {
    let link = std::fs::read_link(format!("/proc/{pid}/fd/{}", number as i32));
    link.map(|it| it.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Which call of the simulated kernel a message is, if it is one.
fn simulated(pid: Pid, header: u64) -> Option<u32> {
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
    };
    let pointer = |at: u64| word(at).map(u64::from_ne_bytes);
    // The third word of a msghdr points to its buffers, and the first of these to its bytes.
    let bytes = pointer(header + 16).and_then(pointer).and_then(word)?;
    let call = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    bytes.starts_with(b"VSIM").then_some(call)
}
