//! The system calls that processes of this program make, by what they are at.
//!
//! What the C library calls by itself is in [`USUAL`], for glibc and for musl. Calls that later
//! architectures have no more, and the C libraries use where they are, stand beside their successors.

use crate::sys::seccomp::{Argument, SystemCall};
use nix::libc::{self, c_long};

const fn any(number: c_long) -> SystemCall {
    SystemCall { number, when: &[] }
}

const fn when(number: c_long, when: &'static [Argument]) -> SystemCall {
    SystemCall { number, when }
}

const fn is(index: u8, value: u32) -> Argument {
    Argument { index, mask: u32::MAX, value }
}

/// Opens what is there, and not to write.
const fn reads(flags: u8) -> Argument {
    Argument {
        index: flags,
        mask: (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u32,
        value: 0,
    }
}

/// Memory that nobody runs code from.
const NO_CODE: &[Argument] = &[Argument { index: 2, mask: libc::PROT_EXEC as u32, value: 0 }];

/// Between processes of this machine alone.
const UNIX: &[Argument] = &[is(0, libc::AF_UNIX as u32)];

/// A pair of such sockets that goes nowhere else: datagrams could be sent to any address.
const fn pair_of(kind: i32) -> [Argument; 2] {
    const KIND: u32 = 0xf;
    [is(0, libc::AF_UNIX as u32), Argument { index: 1, mask: KIND, value: kind as u32 }]
}
const STREAMS: &[Argument] = &pair_of(libc::SOCK_STREAM);
const PACKETS: &[Argument] = &pair_of(libc::SOCK_SEQPACKET);

/// A thread, and not a process. clone3(2) has its flags in memory, where no filter sees them.
const THREAD: &[Argument] =
    &[Argument { index: 0, mask: libc::CLONE_THREAD as u32, value: libc::CLONE_THREAD as u32 }];

/// Memory, time, open files that are there already, and the end.
pub const USUAL: &[SystemCall] = &[
    any(libc::SYS_read),
    any(libc::SYS_readv),
    any(libc::SYS_write),
    any(libc::SYS_writev),
    any(libc::SYS_close),
    any(libc::SYS_fcntl),
    any(libc::SYS_fstat),
    any(libc::SYS_ppoll),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_poll),
    when(libc::SYS_mmap, NO_CODE),
    when(libc::SYS_mprotect, NO_CODE),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    any(libc::SYS_futex),
    any(libc::SYS_rt_sigaction),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_sched_yield),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_nanosleep),
    any(libc::SYS_getrandom),
    any(libc::SYS_getpid),
    any(libc::SYS_gettid),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

/// Threads.
pub const THREADS: &[SystemCall] = &[
    when(libc::SYS_clone, THREAD),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_rseq),
    any(libc::SYS_sched_getaffinity),
];

/// Messages and open files on sockets that are there already.
pub const MESSAGES: &[SystemCall] = &[
    any(libc::SYS_sendmsg),
    // To whom the socket is connected.
    when(libc::SYS_sendto, &[is(5, 0)]),
    any(libc::SYS_recvmsg),
    any(libc::SYS_recvfrom),
    any(libc::SYS_getsockopt),
    when(libc::SYS_socketpair, STREAMS),
    when(libc::SYS_socketpair, PACKETS),
];

/// Looks at files, and opens none.
pub const LOOKS: &[SystemCall] = &[
    any(libc::SYS_statx),
    any(libc::SYS_newfstatat),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_stat),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_lstat),
    any(libc::SYS_readlinkat),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_readlink),
    any(libc::SYS_faccessat),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_access),
    any(libc::SYS_fstatfs),
];

/// Reads files and directories.
pub const READS: &[SystemCall] = &[
    when(libc::SYS_openat, &[reads(2)]),
    #[cfg(target_arch = "x86_64")]
    when(libc::SYS_open, &[reads(1)]),
    any(libc::SYS_getdents64),
    any(libc::SYS_lseek),
    any(libc::SYS_pread64),
];

/// Waits for many clients in one thread, and lets them in.
pub const SERVES: &[SystemCall] = &[
    any(libc::SYS_epoll_create1),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_epoll_pwait),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_epoll_wait),
    any(libc::SYS_eventfd2),
    any(libc::SYS_accept4),
    any(libc::SYS_setsockopt),
    any(libc::SYS_shutdown),
    // How much of a reply was not read, and sockets that wait for nobody.
    when(libc::SYS_ioctl, &[is(1, libc::TIOCOUTQ as u32)]),
    when(libc::SYS_ioctl, &[is(1, libc::FIONBIO as u32)]),
    any(libc::SYS_getppid),
    any(libc::SYS_geteuid),
];

/// Has one address space: VFIO's files, drivers, and a directory of its own.
#[allow(clippy::unnecessary_cast)] // a limit's name has another type in musl
pub const KEEPS: &[SystemCall] = &[
    any(libc::SYS_openat),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_open),
    // VFIO and iommufd: all have this type, whatever a driver adds.
    when(libc::SYS_ioctl, &[Argument { index: 1, mask: 0xff00, value: (b';' as u32) << 8 }]),
    when(libc::SYS_ioctl, &[is(1, libc::FIONBIO as u32)]),
    any(libc::SYS_pwrite64),
    any(libc::SYS_pipe2),
    when(libc::SYS_socket, UNIX),
    any(libc::SYS_connect),
    any(libc::SYS_bind),
    any(libc::SYS_listen),
    any(libc::SYS_accept4),
    // Whether what came with a call is a client's connection.
    any(libc::SYS_getsockname),
    any(libc::SYS_getpeername),
    // A link of which nothing may be closed.
    any(libc::SYS_shutdown),
    when(libc::SYS_setsockopt, &[is(1, libc::SOL_SOCKET as u32), is(2, libc::SO_OOBINLINE as u32)]),
    any(libc::SYS_flock),
    any(libc::SYS_mkdirat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat2),
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    any(libc::SYS_renameat),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_mkdir),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_rmdir),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_unlink),
    #[cfg(target_arch = "x86_64")]
    any(libc::SYS_rename),
    any(libc::SYS_geteuid),
    // A client's limit of locked memory, and no other one.
    when(libc::SYS_prlimit64, &[is(1, libc::RLIMIT_MEMLOCK as u32)]),
];

/// What none of these processes ever does, nor any library for it: whoever tries has taken it over.
pub const HOSTILE: &[c_long] = &[
    // Other programs, other processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Other views of the system.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    // The kernel itself, and ways past this filter.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];
