//! `vfio-broker exec --memlock`: so that the program may lock its guest's memory.

use super::Failure;
use super::style::{complain, limit};
use crate::client::{self, Client, Lease};
use crate::protocol::Error;
use crate::vmm::{Need, guest_memory, size_of};
use nix::libc::RLIM_INFINITY;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::ffi::OsString;
use std::path::Path;

/// What `--memlock` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memlock {
    Auto,
    Bytes(u64),
}

impl std::str::FromStr for Memlock {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "unlimited" => Ok(Self::Bytes(RLIM_INFINITY)),
            _ => size_of(text, 0)
                .map(Self::Bytes)
                .ok_or_else(|| "write it as auto, 512MiB, 4G, or a number of bytes".into()),
        }
    }
}

/// A limit that is wanted, and why.
pub(super) struct Wanted {
    bytes: u64,
    why: String,
}

impl Memlock {
    /// What is wanted for a program.
    pub(super) fn wanted(self, program: &Path, arguments: &[OsString]) -> Result<Wanted, Failure> {
        match self {
            Self::Bytes(wanted) => {
                Ok(Wanted { bytes: wanted, why: format!("{} (--memlock)", limit(wanted)) })
            }
            Self::Auto => {
                let need = guest_memory(program, arguments).ok_or_else(|| {
                    let program = program.display();
                    let what = "-m of a QEMU, or --memory of a cloud-hypervisor,";
                    Failure::new(format!(
                        "{program} has no {what} that says how much memory it needs"
                    ))
                    .advise(
                        "say how much is to be locked: --memlock 4G, for example; a program that \
                             starts another one can be put before vfio-broker instead",
                    )
                    .code(2)
                })?;
                Ok(Wanted {
                    bytes: need.bytes(),
                    why: format!("{} (--memlock auto)", need.explained()),
                })
            }
        }
    }
}

impl Wanted {
    /// Raises the limit of this process, which the program inherits: by itself as far as it may, else
    /// by the broker.
    pub(super) fn raise(&self, broker: &mut Client, lease: &Lease) -> Result<(), Failure> {
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(std::io::Error::from)?;
        if soft >= self.bytes {
            return Ok(());
        }
        if hard >= self.bytes {
            setrlimit(Resource::RLIMIT_MEMLOCK, self.bytes, hard).map_err(std::io::Error::from)?;
            self.tell();
            return Ok(());
        }
        match broker.set_memlock(lease, self.bytes) {
            Ok(_) => {
                self.tell();
                Ok(())
            }
            Err(error) => {
                let allowed = match &error {
                    client::Error::Broker { error: Error::OverLimit { most, .. }, .. } => format!(
                        "allowed by the policy: {}, as memlock of tenant {}",
                        limit(*most),
                        lease.tenant()
                    ),
                    _ => format!("allowed now: {} (RLIMIT_MEMLOCK, hard)", limit(hard)),
                };
                let failure = Failure::from(error).about(lease.devices());
                Err(failure.detail(format!("needed: {}", self.why)).detail(allowed))
            }
        }
    }

    /// Only once it is so: what is refused names the same numbers.
    fn tell(&self) {
        complain(&format!("vfio-broker: memlock limit: {}\n", self.why));
    }
}

/// A word about a limit that the guest's memory does not fit in, where nobody asked for a higher one.
pub(super) fn warn(program: &Path, arguments: &[OsString]) {
    let soft = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(RLIM_INFINITY, |(soft, _)| soft);
    let Some(Need { guest, said }) = guest_memory(program, arguments) else { return };
    if guest > soft && !may_lock_all() {
        complain(&format!(
            "vfio-broker: the guest has {} ({said}), and the program may lock {} for its devices \
             (RLIMIT_MEMLOCK): it will fail to map them\n  -> --memlock auto, where the policy has \
             memlock for the tenant\n",
            limit(guest),
            limit(soft)
        ));
    }
}

/// Whether this process has CAP_IPC_LOCK, which knows no limit.
fn may_lock_all() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}
