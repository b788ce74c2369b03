//! Filters of system calls: what a process can ask of the kernel for the rest of its life.

#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};
use std::collections::{BTreeMap, BTreeSet};

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
        let mut any = BTreeSet::new();
        let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = BTreeMap::new();
        for SystemCall { number, when } in calls {
            match when {
                [] => drop(any.insert(u32::try_from(number).map_err(|error| error.to_string())?)),
                _ => {
                    let rule = rule(when).map_err(|error| error.to_string())?;
                    rules.entry(number).or_default().push(rule);
                }
            }
        }
        let arch = std::env::consts::ARCH;
        let arch = arch.try_into().map_err(|_| format!("there is no filter for {arch}"))?;
        let filter = SeccompFilter::new(rules, others, listed.clone(), arch);
        let program: BpfProgram =
            filter.and_then(TryInto::try_into).map_err(|error| error.to_string())?;
        let (architecture, rules) = program.split_at_checked(ARCHITECTURE).ok_or("no program")?;
        let search = search(&runs(&any), listed.into())?;
        Ok(Self([architecture, &[step(LOAD, 0)], &behind(search), rules].concat()))
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

/// The first steps of a program of seccompiler's: another architecture's calls are not looked at further.
const ARCHITECTURE: usize = 3;

/// Steps of a program: they load the call's number, compare it, go on further below, or end.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const GO_ON: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const END: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn step(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Where runs of numbers that are all in the set, or all not, begin.
fn runs(numbers: &BTreeSet<u32>) -> Vec<(u32, bool)> {
    let is_in = |number: &u32| numbers.contains(number);
    let ends = numbers.iter().flat_map(|number| [*number, number + 1]);
    let begins = ends.filter(|at| *at > 0 && is_in(at) != is_in(&(at - 1)));
    let begins: BTreeSet<u32> = begins.chain([0]).collect();
    begins.into_iter().map(|at| (at, is_in(&at))).collect()
}

/// Finds the run of the loaded number by halving; ends with `listed` for one that is in the set. seccompiler
/// compares number by number, and the kernel goes that way for each of its calls when a filter is
/// installed: that took a keeper 0.3 ms of its start.
fn search(runs: &[(u32, bool)], listed: u32) -> Result<BpfProgram, String> {
    let (below, from) = runs.split_at(runs.len() / 2);
    match (below, from) {
        ([], [(_, true), ..]) => Ok(vec![step(END, listed)]),
        ([], _) => Ok(vec![step(GO_ON, 0)]),
        (_, from) => {
            let at = from.first().map_or(0, |(at, _)| *at);
            let (below, from) = (search(below, listed)?, search(from, listed)?);
            let jt = below.len().try_into().map_err(|_| "too many system calls to search")?;
            let half = sock_filter { jt, ..step(IS_AT_LEAST, at) };
            Ok([&[half], &*below, &*from].concat())
        }
    }
}

/// Steps of which those that go on do so behind all of them.
fn behind(mut steps: BpfProgram) -> BpfProgram {
    for (left, step) in (0..).zip(steps.iter_mut().rev()) {
        if step.code == GO_ON {
            step.k = left;
        }
    }
    steps
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::calls::HOSTILE;
    use crate::process::role::Role;

    const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;

    /// What a program says, and after how many steps.
    fn run(Filter(program): &Filter, data: &[u32; 16]) -> (u32, usize) {
        let (mut at, mut accumulator, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let jump = |is_so| usize::from(if is_so { jt } else { jf });
            (at, steps) = (at + 1, steps + 1);
            match code {
                END => return (k, steps),
                LOAD => accumulator = data[k as usize / 4],
                IS_AT_LEAST => at += jump(accumulator >= k),
                GO_ON => at += k as usize,
                IS => at += jump(accumulator == k),
                AND => accumulator &= k,
                code => panic!("step {code:#x}"),
            }
        }
    }

    /// A call's number, architecture and arguments, as the kernel shows them.
    fn data(filter: &Filter, number: u32, arguments: [u32; 6]) -> [u32; 16] {
        let mut data = [0; 16];
        (data[0], data[1]) = (number, filter.0[1].k);
        for (index, argument) in arguments.into_iter().enumerate() {
            data[4 + 2 * index] = argument;
        }
        data
    }

    fn role(role: Role) -> Option<(Vec<SystemCall>, Filter)> {
        let calls = role.calls()?.concat();
        Some((calls.clone(), Filter::allow(calls).unwrap()))
    }

    #[test]
    fn each_call_is_judged_by_the_list_alone() {
        let kills = Filter::kill_for(HOSTILE).unwrap();
        for number in (0..1024).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
            let said = run(&kills, &data(&kills, number, [0; 6])).0;
            let is_hostile = HOSTILE.contains(&number.into());
            let expected =
                if is_hostile { libc::SECCOMP_RET_KILL_PROCESS } else { libc::SECCOMP_RET_ALLOW };
            assert_eq!(said, expected, "{number}");
        }
        for (calls, filter) in Role::ALL.into_iter().filter_map(role) {
            for number in (0..1024).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                for arguments in
                    [[0; 6], [1; 6], [0, libc::FIONBIO as u32, 0, 0, 0, 0], [u32::MAX; 6]]
                {
                    let is_so =
                        |it: &Argument| arguments[usize::from(it.index)] & it.mask == it.value;
                    let allows = |call: &SystemCall| {
                        call.number == libc::c_long::from(number) && call.when.iter().all(is_so)
                    };
                    let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
                    let is_allowed = calls.iter().any(allows);
                    let expected = if is_allowed { libc::SECCOMP_RET_ALLOW } else { refused };
                    let said = run(&filter, &data(&filter, number, arguments)).0;
                    assert_eq!(said, expected, "{number} {arguments:?}");
                }
            }
        }
    }

    #[test]
    fn another_architectures_calls_are_not_taken_for_this_ones() {
        let (calls, filter) = role(Role::Keeper).unwrap();
        for call in calls {
            let mut data = data(&filter, call.number as u32, [0; 6]);
            data[1] += 1;
            assert_eq!(run(&filter, &data).0, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }

    #[test]
    fn no_call_takes_a_step_for_each_that_is_listed() {
        let kills = Filter::kill_for(HOSTILE).unwrap();
        let filters = Role::ALL.into_iter().filter_map(role).map(|(_, filter)| filter);
        for filter in filters.chain([kills]) {
            let longest =
                (0..1024).map(|number| run(&filter, &data(&filter, number, [0; 6])).1).max();
            assert!(longest.unwrap() <= 40, "{longest:?} of {}", filter.0.len());
        }
    }
}
