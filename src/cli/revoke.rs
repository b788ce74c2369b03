//! `vfio-broker revoke`: takes a lease back from its holder.

use super::style::{complain, print, print_json, printable};
use super::{Context, EXIT_CODES, Failure};
use super::{processes, qemu};
use crate::protocol::{Left, Revoke, Revoked, Until};
use crate::qmp::Monitor;
use crate::qmp::hotplug::{Detach, detach};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Take a lease back from its holder
///
/// The holder is told through `watch`, and has the grace to give the lease back. Then it gets nothing more
/// of it: what the broker mapped is undone, and the devices go to nobody else until the holder has closed
/// what it has open, which nobody can take from it. A QEMU that `attach` put the devices into can be asked by
/// its monitor, and unplugs them if its guest lets go of them. Root can revoke any lease, and who has the right
/// "manage" those of its tenant. Interrupting this command does not stop it.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{EXAMPLE}\n\n{EXIT_CODES}"))]
pub(super) struct Args {
    /// The lease, as `vfio-broker leases` shows it
    lease: String,
    #[command(flatten)]
    grace: Grace,
    /// Ask this QEMU to give the devices back within the grace, where `attach` put them in: its monitor
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
}

const EXAMPLE: &str = "\
Examples:
  vfio-broker revoke 6f2c91d04ab7e358
  vfio-broker revoke 6f2c91d04ab7e358 --grace 0
  vfio-broker revoke 6f2c91d04ab7e358 --qmp /run/user/1000/web1.qmp";

/// How often is asked whether the revocation has begun.
const LOOK: Duration = Duration::from_millis(20);

/// How long holders have.
#[derive(Debug, clap::Args)]
pub(super) struct Grace {
    /// How long the holder has to give it back: in seconds, or as in 90s, 5min, 1h
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = grace)]
    pub(super) grace: Duration,
}

fn grace(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        _ => return Err("a time is a number of seconds, or as in 90s, 5min, 1h".into()),
    };
    let number: u64 = number.parse().map_err(|_| "it begins with a number")?;
    let seconds = number.saturating_mul(factor);
    if seconds > Revoke::MAX_GRACE {
        return Err("at most a day".into());
    }
    Ok(Duration::from_secs(seconds))
}

/// Exits as for a device that is busy where something of the lease is still in use.
pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let grace = args.grace.grace;
    // What can't be asked is said before anything is taken.
    let qemu = args.qmp.as_deref().map(|socket| InQemu::find(socket, &args.lease, grace));
    let qemu = qemu.transpose()?;
    // The only reply comes when all is over: nothing before that shows whether it was accepted.
    if !context.json && !grace.is_zero() {
        let seconds = grace.as_secs();
        complain(&format!(
            "asking for it; once accepted, the holder has {seconds} s, and Ctrl-C stops nothing\n"
        ));
    }
    let mut broker = context.connect()?;
    let revoked = std::thread::scope(|scope| {
        let revoking = scope.spawn(move || broker.revoke(&args.lease, grace));
        if let Some(qemu) = qemu {
            let is_over = || revoking.is_finished();
            if let Err(failure) = qemu.ask(context, &args.lease, is_over) {
                // It is taken when the time is over.
                failure.report(context.json);
            }
        }
        revoking.join().map_err(|_| Failure::new("revoke has failed"))?.map_err(Failure::from)
    })?;
    if context.json {
        print_json(&revoked)?;
    } else {
        print(&text(&revoked))?;
    }
    Ok(code(&[revoked]))
}

/// A QEMU that has devices of a lease.
struct InQemu {
    monitor: Monitor,
    devices: Vec<Detach>,
    until: Instant,
}

impl InQemu {
    fn find(socket: &Path, lease: &str, grace: Duration) -> Result<Self, Failure> {
        if grace.is_zero() {
            return Err(Failure::new("with --grace 0 QEMU has no time to be asked").code(2));
        }
        let mut monitor = qemu::connect(socket, qemu::GREETING)?;
        let devices = Detach::all_of(&mut monitor, lease).map_err(qemu::failure)?;
        if devices.is_empty() {
            let what = format!("that QEMU was given no device of lease {}", printable(lease));
            let advice = "without --qmp its holder is told through `watch` alone";
            return Err(Failure::new(what).advise(advice));
        }
        Ok(Self { monitor, devices, until: Instant::now() + grace })
    }

    /// Has the guest let go of each device, once the broker has agreed to take them.
    fn ask(
        mut self,
        context: &Context,
        lease: &str,
        is_over: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        let mut broker = context.connect()?;
        while !broker.leases()?.iter().any(|it| it.lease == lease && it.revoked.is_some()) {
            if is_over() {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
        for device in self.devices {
            let left = self.until.saturating_duration_since(Instant::now());
            let device = device.patience(left);
            detach(&mut self.monitor, &mut broker, &device, &mut |_| {}).map_err(qemu::failure)?;
        }
        Ok(())
    }
}

pub(super) fn code(all: &[Revoked]) -> ExitCode {
    let is_left = all.iter().any(|revoked| !revoked.proved);
    ExitCode::from(if is_left { super::failure::BUSY } else { 0 })
}

/// What became of a lease: a line, and one for each device that can't be taken back.
pub(super) fn text(revoked: &Revoked) -> String {
    let Revoked { lease, vm, tenant, forced, proved, left } = revoked;
    let how = if *forced { "was taken" } else { "was given back" };
    let free = if *proved { ", and all of it is free" } else { "; not free yet:" };
    let mut text = printable(&format!("{lease} ({vm} of {tenant}) {how}{free}")) + "\n";
    text.extend(left.iter().flat_map(lines).map(|line| format!("  {}\n", printable(&line))));
    text
}

/// What keeps a device, and who has it.
pub(super) fn lines(left: &Left) -> Vec<String> {
    let who = left.open_in.iter().flat_map(processes::lines).map(|line| format!("  {line}"));
    std::iter::once(in_words(left)).chain(who).collect()
}

fn in_words(left: &Left) -> String {
    let Left { device, reason, until, .. } = left;
    let next = match until {
        Until::Holder => "nobody else gets it until that is closed: end the program that has it",
        Until::Administrator => "or `vfio-broker confirm` says that nobody has it open any more",
        Until::Kernel => "the broker asks again by itself",
    };
    format!("{device}: {reason}; {next}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_what_people_write() {
        for (text, seconds) in [("0", 0), ("30s", 30), ("5min", 300), ("2m", 120), ("1 h", 3600)] {
            assert_eq!(grace(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "s", "-1", "1d", "25h", "99999999999999999999", "1.5h", "1e3"] {
            assert!(grace(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_can_not_be_taken_back_is_said() {
        let left = Left {
            device: "0000:65:00.0".into(),
            reason: "some process still has a device of /dev/vfio/26 open".into(),
            until: Until::Holder,
            open_in: None,
        };
        let revoked = Revoked {
            lease: "l".into(),
            vm: "web1".into(),
            tenant: "a".into(),
            forced: true,
            proved: false,
            left: vec![left],
        };
        let text = text(&revoked);
        assert!(
            text.starts_with("l (web1 of a) was taken; not free yet:\n  0000:65:00.0: "),
            "{text}"
        );
        assert!(text.contains("end the program that has it"), "{text}");
        let proved = Revoked { forced: false, proved: true, left: Vec::new(), ..revoked };
        assert_eq!(super::text(&proved), "l (web1 of a) was given back, and all of it is free\n");
    }
}
