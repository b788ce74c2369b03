//! The filter: which system calls are asked about. Classic BPF, as seccomp(2) takes it.
//!
//! It looks at numbers in registers only, so nothing but opens and three ioctls costs a program
//! anything. A program of another architecture (32 bits on a 64-bit kernel, x32) passes untouched:
//! the broker's files are no secret that would have to be kept from it, it just is not given any.

use nix::libc::{self, sock_filter};

/// What the kernel calls the machine's own architecture; `None` where this crate has not been told.
const ARCH: Option<u32> = match () {
    () if cfg!(all(target_arch = "x86_64", target_pointer_width = "64")) => Some(0xc000_003e),
    () if cfg!(all(target_arch = "aarch64", target_endian = "little")) => Some(0xc000_00b7),
    () => None,
};

/// Where `struct seccomp_data` has the system call's number, and its arguments.
const NR: u32 = 0;
const ARCHITECTURE: u32 = 4;
const SECOND_ARGUMENT: u32 = 16 + 8;

/// The system calls that open a file by its path.
#[cfg(target_arch = "x86_64")]
const OPENS: [libc::c_long; 3] = [libc::SYS_open, libc::SYS_openat, libc::SYS_openat2];
/// The system calls that open a file by its path.
#[cfg(not(target_arch = "x86_64"))]
const OPENS: [libc::c_long; 2] = [libc::SYS_openat, libc::SYS_openat2];

/// A filter that asks about opens, and about ioctls with these request numbers; `None` on an
/// architecture that it does not know.
pub(super) fn program(ioctls: &[u32]) -> Option<Vec<sock_filter>> {
    let arch = ARCH?;
    // Steps of a test that goes on where it does not match, and leads to the end where it does.
    let asked = OPENS.iter().map(|number| *number as u32);
    let tail = ioctls.len();
    let mut program = vec![load(ARCHITECTURE)];
    // The two last instructions are the verdicts: allow, then ask.
    let count = 2 + 1 + OPENS.len() + if tail > 0 { 2 + tail } else { 0 };
    let (allow, ask) = (count, count + 1);
    let to = |from: usize, target: usize| (target - from - 1) as u8;
    program.push(jump_if(arch, 0, to(1, allow)));
    program.push(load(NR));
    for number in asked {
        program.push(jump_if(number, to(program.len(), ask), 0));
    }
    if tail > 0 {
        program.push(jump_if(libc::SYS_ioctl as u32, 0, to(program.len(), allow)));
        // The kernel takes the lower half of it alone; on both machines that comes first.
        program.push(load(SECOND_ARGUMENT));
        for request in ioctls {
            program.push(jump_if(*request, to(program.len(), ask), 0));
        }
    }
    program.push(verdict(libc::SECCOMP_RET_ALLOW));
    program.push(verdict(libc::SECCOMP_RET_USER_NOTIF));
    Some(program)
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn jump_if(value: u32, equal: u8, other: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, equal, other, value)
}

fn verdict(value: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value)
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter on a system call, as the kernel does.
    fn run(program: &[sock_filter], arch: u32, number: u32, second: u64) -> u32 {
        let mut data = [0; 64];
        data[..4].copy_from_slice(&number.to_ne_bytes());
        data[4..8].copy_from_slice(&arch.to_ne_bytes());
        data[24..32].copy_from_slice(&second.to_ne_bytes());
        let (mut at, mut register) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                0x20 => {
                    let bytes = data[k as usize..k as usize + 4].try_into().unwrap();
                    register = u32::from_ne_bytes(bytes);
                }
                0x15 => at += usize::from(if register == k { jt } else { jf }),
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn opens_and_given_ioctls_are_asked_about_and_nothing_else() {
        let arch = ARCH.unwrap();
        for ioctls in [&[][..], &[0x3b66, 0x3b68]] {
            let filter = program(ioctls).unwrap();
            let asked = |arch, number: libc::c_long, second| match run(
                &filter,
                arch,
                number as u32,
                second,
            ) {
                libc::SECCOMP_RET_USER_NOTIF => true,
                libc::SECCOMP_RET_ALLOW => false,
                other => panic!("verdict {other:#x}"),
            };
            let x32 = 0x4000_0000;
            for number in 0..1024 {
                let is_open = OPENS.contains(&number);
                assert_eq!(asked(arch, number, 0), is_open, "{number}");
                assert_eq!(asked(arch, number, 0x3b66), is_open || asked(arch, number, 0x3b68));
                assert!(
                    !asked(0x4000_0003, number, 0x3b68),
                    "an i386 call {number} is asked about"
                );
                assert!(!asked(arch, number | x32, 0x3b68), "an x32 call {number} is asked about");
            }
            for request in [0x3b66, 0x3b68, 0xdead_beef_0000_3b68] {
                assert_eq!(asked(arch, libc::SYS_ioctl, request), !ioctls.is_empty());
            }
            for request in [0x3b67, 0x3b69, 0, u64::MAX] {
                assert!(!asked(arch, libc::SYS_ioctl, request));
            }
        }
    }
}
