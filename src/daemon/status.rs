//! Status: what the daemon and its keepers are at.

use super::Daemon;
use super::connection::{Connection, Lost};
use super::incoming::Flags;
use super::lists::{End, List};
use super::outgoing::Answer;
use crate::broker::Oversight;
use crate::process::launcher::PolicyRead;
use crate::protocol::{BrokerStatus, Error, Keeper, PolicyStatus};
use crate::sys::process::{memory, started};
use nix::unistd::{geteuid, getppid};

/// How many keepers are looked at in one step.
const STEP: usize = 32;

impl Connection {
    /// Sends all replies but the last one, which it returns.
    pub(super) async fn status(&self, flags: Flags) -> Result<Result<Answer, Error>, Lost> {
        End::told_apart(self.list_keepers(flags).await)
    }

    async fn list_keepers(&self, flags: Flags) -> Result<Answer, End> {
        let broker = &self.daemon.broker;
        let oversight = broker.oversight(&self.caller);
        let daemon = self.daemon.describe(&oversight);
        let mut list = List::new(self, flags, |keepers: Vec<Keeper>| BrokerStatus {
            keepers,
            ..daemon.clone()
        });
        if oversight == Oversight::Version {
            return list.last();
        }
        broker.look_for_holders(&self.caller).await;
        let (mut all, mut is_over) = (broker.kept(), false);
        while !is_over {
            let mut some = Vec::new();
            while some.len() < STEP && !is_over {
                let kept = all.next().await?;
                is_over = kept.is_none();
                some.extend(kept);
            }
            let step = broker.step(&self.caller).await;
            let keepers = some.iter().filter_map(|kept| broker.keeper(&oversight, kept));
            let keepers = keepers.map(with_process).collect();
            drop(step);
            list.extend(keepers).await?;
        }
        list.last()
    }
}

/// A keeper with what its process shows.
fn with_process(keeper: Keeper) -> Keeper {
    if !keeper.alive {
        return keeper;
    }
    let memory = memory(keeper.pid);
    Keeper {
        since: started(keeper.pid),
        memory: memory.map(|memory| memory.resident),
        shared: memory.map(|memory| memory.shared),
        ..keeper
    }
}

impl Daemon {
    /// Itself, without its keepers.
    fn describe(&self, oversight: &Oversight) -> BrokerStatus {
        let is_seen = *oversight != Oversight::Version;
        BrokerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: is_seen.then(std::process::id),
            since: is_seen.then_some(self.since),
            launcher: is_seen.then(|| getppid().as_raw().unsigned_abs()),
            sandbox: is_seen.then(|| format!("{}; {}", rights(), self.sandbox)),
            connections: is_seen.then(|| self.accounts.connections() as u64),
            policy: is_seen.then(|| self.describe_policy()),
            keepers: Vec::new(),
        }
    }

    fn describe_policy(&self) -> PolicyStatus {
        let PolicyRead { name, read, refused } = self.policy.borrow().clone();
        PolicyStatus {
            file: name,
            read,
            tenants: self.broker.policy().tenants().len() as u64,
            refused_at: refused.as_ref().map(|(at, _)| *at),
            refused: refused.map(|(_, why)| why),
        }
    }
}

/// Whom this process runs as, and what of root's rights it has.
fn rights() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map_or("", str::trim)
    };
    let capabilities = match u64::from_str_radix(field("CapPrm:"), 16) {
        Ok(0) => "no capability".to_owned(),
        Ok(some) => format!("capabilities {some:#x}"),
        Err(_) => "capabilities unknown".to_owned(),
    };
    let privileges = match field("NoNewPrivs:") {
        "1" => "no new privileges",
        _ => "new privileges possible",
    };
    format!("broker: uid {}, {capabilities}, {privileges}", geteuid())
}
