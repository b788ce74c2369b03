#![allow(unsafe_code)]

use super::*;
use crate::process::role::Helper;
use nix::libc::{self, c_long};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use std::os::fd::AsRawFd;

const CONFINED: [Role; 5] = [
    Role::Broker,
    Role::Keeper,
    Role::Helper(Helper::Receiver),
    Role::Helper(Helper::Closer),
    Role::Log,
];

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::find(SandboxMode::Try).unwrap();
    assert!(sandbox.filters.is_ok(), "{sandbox}");
    sandbox
}

/// Does something in a thread that has a role's filter, which is a thread's own.
fn filtered<T: Send>(role: Role, something: impl FnOnce() -> T + Send) -> T {
    let sandbox = sandbox();
    std::thread::scope(|threads| {
        let thread = threads.spawn(|| {
            set_no_new_privs().unwrap();
            sandbox.filter_calls(role).unwrap();
            something()
        });
        thread.join().unwrap()
    })
}

/// What a system call says in a role's process.
fn call(role: Role, number: c_long, arguments: [c_long; 6]) -> Result<c_long, Errno> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: each call here is refused, or takes numbers and pointers to what is static.
    filtered(role, || Errno::result(unsafe { libc::syscall(number, a, b, c, d, e, f) }))
}

fn open(role: Role, flags: i32) -> Result<c_long, Errno> {
    let path = c"/proc/self/status".as_ptr().expose_provenance() as c_long;
    let opened = call(role, libc::SYS_openat, [libc::AT_FDCWD.into(), path, flags.into(), 0, 0, 0]);
    // Of the thread's own; nobody else knows the number.
    if let Ok(number) = opened {
        nix::unistd::close(number as i32).unwrap();
    }
    opened
}

fn ioctl(role: Role, request: c_long) -> Result<c_long, Errno> {
    let null = std::fs::File::open("/dev/null").unwrap();
    call(role, libc::SYS_ioctl, [null.as_raw_fd().into(), request, 0, 0, 0, 0])
}

#[test]
fn no_role_starts_processes_signals_them_reaches_the_network_or_runs_new_code() {
    let code = (libc::PROT_READ | libc::PROT_EXEC).into();
    let memory = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into();
    for role in CONFINED {
        let refused = [
            call(role, libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0, 0, 0]),
            call(role, libc::SYS_clone3, [0; 6]),
            call(role, libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
            call(role, libc::SYS_socket, [libc::AF_INET.into(), 1, 0, 0, 0, 0]),
            call(role, libc::SYS_setresuid, [-1, -1, -1, 0, 0, 0]),
            call(role, libc::SYS_fchmodat, [-1, 0, 0, 0, 0, 0]),
            call(role, libc::SYS_mmap, [0, 4096, code, memory, -1, 0]),
        ];
        assert_eq!(refused, [Err(Errno::ENOSYS); 7], "{role:?}");
        assert!(call(role, libc::SYS_getpid, [0; 6]).is_ok(), "{role:?}");
    }
}

#[test]
fn the_broker_opens_only_to_read_and_asks_nothing_of_a_device() {
    assert!(open(Role::Broker, libc::O_RDONLY).is_ok());
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC] {
        assert_eq!(open(Role::Broker, flags), Err(Errno::ENOSYS), "{flags:o}");
    }
    // VFIO_GET_API_VERSION, and a terminal's TIOCSTI.
    for request in [0x3b64, 0x5412] {
        assert_eq!(ioctl(Role::Broker, request), Err(Errno::ENOSYS), "{request:x}");
    }
    assert_eq!(call(Role::Broker, libc::SYS_connect, [-1, 0, 0, 0, 0, 0]), Err(Errno::ENOSYS));
    assert_eq!(call(Role::Broker, libc::SYS_prlimit64, [0; 6]), Err(Errno::ENOSYS));
}

#[test]
fn a_keeper_asks_vfio_and_raises_no_other_limit() {
    let of_no_device = ioctl(Role::Keeper, 0x3b64);
    assert_eq!(of_no_device, Err(Errno::ENOTTY), "the kernel's own answer");
    assert_eq!(ioctl(Role::Keeper, 0x5412), Err(Errno::ENOSYS));
    let limit = |which: u32| call(Role::Keeper, libc::SYS_prlimit64, [0, which.into(), 0, 0, 0, 0]);
    assert_eq!(limit(libc::RLIMIT_MEMLOCK), Ok(0));
    assert_eq!(limit(libc::RLIMIT_NOFILE), Err(Errno::ENOSYS));
}

#[test]
fn who_has_what_peers_sent_opens_nothing() {
    for role in [Role::Helper(Helper::Receiver), Role::Helper(Helper::Closer), Role::Log] {
        assert_eq!(open(role, libc::O_RDONLY), Err(Errno::ENOSYS), "{role:?}");
    }
}

#[test]
fn who_receives_and_closes_can_have_threads() {
    for role in [Role::Helper(Helper::Receiver), Role::Helper(Helper::Closer)] {
        let one = || std::thread::spawn(|| 1).join().unwrap();
        assert_eq!(filtered(role, one), 1);
    }
}

#[test]
fn what_only_an_attacker_does_kills() {
    let sandbox = sandbox();
    for role in CONFINED {
        for number in [libc::SYS_ptrace, libc::SYS_execve, libc::SYS_bpf, libc::SYS_io_uring_setup]
        {
            // SAFETY: the child makes system calls alone, and ends.
            let child = match unsafe { fork() }.unwrap() {
                ForkResult::Parent { child } => child,
                ForkResult::Child => {
                    let is_filtered =
                        set_no_new_privs().is_ok() && sandbox.filter_calls(role).is_ok();
                    if is_filtered {
                        // SAFETY: null pointers are all that it is given.
                        unsafe { libc::syscall(number, 0, 0, 0, 0) };
                    }
                    // SAFETY: it ends the process.
                    unsafe { libc::_exit(0) }
                }
            };
            let ended = waitpid(child, None).unwrap();
            assert!(
                matches!(ended, WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGSYS, _)),
                "{role:?} {number}: {ended:?}"
            );
        }
    }
}

/// Whether a role's process can open a file to read, and make one.
fn files(role: Role, path: &str) -> [Result<(), i32>; 2] {
    let (sandbox, new) = (sandbox(), tempfile::tempdir().unwrap());
    let errno = |error: std::io::Error| error.raw_os_error().unwrap();
    std::thread::scope(|threads| {
        let thread = threads.spawn(|| {
            set_no_new_privs().unwrap();
            sandbox.limit_files(role).unwrap();
            let read = std::fs::read(path).map(drop).map_err(errno);
            [read, std::fs::write(new.path().join("new"), "x").map_err(errno)]
        });
        thread.join().unwrap()
    })
}

#[test]
fn the_broker_reads_what_devices_and_processes_show_and_nothing_else() {
    if sandbox().landlock.is_err() {
        return println!("SKIPPED: this kernel has no Landlock");
    }
    let denied = Err(libc::EACCES);
    assert_eq!(files(Role::Broker, "/proc/self/status"), [Ok(()), denied]);
    assert_eq!(files(Role::Broker, "/sys/devices/system/cpu/online"), [Ok(()), denied]);
    assert_eq!(files(Role::Broker, "/etc/passwd"), [denied, denied]);
    for role in [Role::Helper(Helper::Receiver), Role::Helper(Helper::Closer), Role::Log] {
        assert_eq!(files(role, "/proc/self/status"), [denied, denied], "{role:?}");
    }
    assert_eq!(files(Role::Keeper, "/proc/self/status"), [Ok(()), Ok(())]);
}

#[test]
fn what_is_off_or_missing_is_said() {
    let off = Sandbox::find(SandboxMode::Off).unwrap().to_string();
    assert_eq!(off, "system calls not filtered (--sandbox=off); files not limited (--sandbox=off)");
    let filtered = "system calls filtered in broker, keeper, receiver, closer, holders, log; ";
    let said = sandbox().to_string();
    assert!(said.starts_with(filtered), "{said}");
    assert!(!said.contains("sim"), "{said}");
}
