//! Filters of system calls: what a process can ask of the kernel for the rest of its life.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};
use std::collections::BTreeMap;

/// A system call, and what its arguments must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemCall {
    /// Its number on this architecture.
    pub number: libc::c_long,
    /// All of these.
    pub when: &'static [Argument],
}

/// An argument, of which these bits must have this value. Of its lower 32 bits: the kernel takes no more
/// of any that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Which, from 0.
    pub index: u8,
    /// Its bits that count.
    pub mask: u32,
    /// What they must be.
    pub value: u32,
}

/// A compiled filter.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// Lets these calls pass. The others fail with ENOSYS, as on a kernel that has not got them: that is
    /// what C libraries know to live with, and turn to an older call.
    ///
    /// # Errors
    /// What is wrong with the list, or with this architecture.
    pub fn allow(calls: impl IntoIterator<Item = SystemCall>) -> Result<Self, String> {
        let others = SeccompAction::Errno(libc::ENOSYS as u32);
        Self::compile(calls, others, SeccompAction::Allow)
    }

    /// Lets everything pass but these calls: whoever makes one is killed.
    ///
    /// # Errors
    /// What is wrong with the list, or with this architecture.
    pub fn kill_for(calls: &[libc::c_long]) -> Result<Self, String> {
        let calls = calls.iter().map(|number| SystemCall { number: *number, when: &[] });
        Self::compile(calls, SeccompAction::Allow, SeccompAction::KillProcess)
    }

    fn compile(
        calls: impl IntoIterator<Item = SystemCall>,
        others: SeccompAction,
        listed: SeccompAction,
    ) -> Result<Self, String> {
        let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = BTreeMap::new();
        for SystemCall { number, when } in calls {
            let known = rules.contains_key(&number);
            let list = rules.entry(number).or_default();
            match when {
                // No rule of a call means any arguments.
                [] => list.clear(),
                _ if known && list.is_empty() => {}
                _ => list.push(rule(when).map_err(|error| error.to_string())?),
            }
        }
        let arch = std::env::consts::ARCH;
        let arch = arch.try_into().map_err(|_| format!("there is no filter for {arch}"))?;
        let filter = SeccompFilter::new(rules, others, listed, arch);
        let program = filter.and_then(TryInto::try_into);
        program.map(Self).map_err(|error: seccompiler::BackendError| error.to_string())
    }

    /// Puts this thread, and all that it starts, under the filter, which has to be asked for
    /// [no new privileges](nix::sys::prctl::set_no_new_privs) first. What the filter refuses stands in the
    /// kernel's audit log.
    ///
    /// # Errors
    /// See seccomp(2).
    pub fn install(&self) -> Result<(), Errno> {
        #[repr(C)]
        struct Program {
            len: libc::c_ushort,
            filter: *const sock_filter,
        }
        let len = self.0.len().try_into().map_err(|_| Errno::EINVAL)?;
        let program = Program { len, filter: self.0.as_ptr() };
        // SAFETY: `program` points to `len` instructions; both live through the call, which copies them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_LOG,
                &raw const program,
            )
        };
        Errno::result(result).map(drop)
    }
}

fn rule(when: &[Argument]) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = |argument: &Argument| {
        let Argument { index, mask, value } = *argument;
        let equals = SeccompCmpOp::MaskedEq(mask.into());
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, equals, value.into())
    };
    SeccompRule::new(when.iter().map(condition).collect::<Result<_, _>>()?)
}

/// Whether the kernel can filter system calls, and lets this process ask for it.
///
/// # Errors
/// ENOSYS, EINVAL: the kernel can't; EPERM: a filter that this process is under does not let it ask.
pub fn is_available() -> Result<(), Errno> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the call reads one number, which lives through it.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action)
    };
    Errno::result(result).map(drop)
}
