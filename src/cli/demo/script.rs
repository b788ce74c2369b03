//! The demonstration: who asks for what, and what must come of it.

use super::agent::{Agent, Answer, Ask};
use super::report::Report;
use super::setup::Setup;
use crate::cli::Failure;
use crate::cli::style::bytes;
use crate::client::{Acquire, Client, Error, Watch};
use crate::protocol::{self, Device, Event, EventKind, Handout};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// The shared container of the policies.
const POOL: &str = "pool";
/// Whom the policies call alice and nobody.
const UIDS: [u32; 2] = [1000, 65534];
/// How long the broker may take to take something back: far more than it does.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn run(setup: &Setup, report: &mut Report) -> Result<(), Failure> {
    let mut script = Script::new(setup)?;
    script.introduce(report)?;
    script.one_gets_a_device(report)?;
    script.others_are_refused(report)?;
    script.it_is_given_back(report)?;
    if setup.plan.second.is_empty() {
        report.begin_part("Sharing a container takes a second device, in another group")?;
        return report
            .note("there is none here; `vfio-broker demo` shows it on a simulated machine");
    }
    let shared = script.two_share_a_container(report)?;
    script.one_of_them_is_killed(shared, report)
}

/// Who is there.
struct Script<'a> {
    setup: &'a Setup,
    /// This process, which may look and is no tenant with rights to more than others.
    broker: Client,
    alice: Agent,
    bob: Agent,
    devices: Vec<Device>,
}

/// What two members of a shared container have.
struct Shared {
    /// The lease of the one who is killed.
    doomed: String,
    watch: Watch,
}

impl<'a> Script<'a> {
    fn new(setup: &'a Setup) -> Result<Self, Failure> {
        let mut broker = setup.connect()?;
        let groups = broker.topology()?;
        let devices = groups.into_iter().flat_map(|group| group.devices).collect();
        let [alice, bob] = clients(setup)?;
        Ok(Self { setup, broker, alice, bob, devices })
    }

    fn introduce(&self, report: &Report) -> Result<(), Failure> {
        let Self { alice, bob, .. } = self;
        let own = nix::unistd::geteuid();
        report.introduce(&format!("vfio-broker demo, {}", self.setup.plan.title))?;
        report.introduce(&format!(
            "The broker runs as uid {own}. Alice is uid {}, pid {}; Bob is uid {}, pid {}.",
            alice.uid, alice.pid, bob.uid, bob.pid
        ))?;
        if alice.uid == bob.uid {
            report
                .introduce("All under one uid: this process may not start others under another.")?;
        } else {
            report.introduce("Neither has a capability or a right to /dev/vfio.")?;
        }
        Ok(())
    }

    fn one_gets_a_device(&mut self, report: &mut Report) -> Result<(), Failure> {
        let names = self.setup.plan.first.clone();
        report.begin_part(&format!("Alice asks for {}", names.join(" and ")))?;
        let unprivileged = self.alice.capabilities.chars().all(|digit| digit == '0');
        if self.alice.uid != nix::unistd::geteuid().as_raw() {
            report.check(unprivileged, "she has no capability: CapEff is 0")?;
        }
        let start = Instant::now();
        let answer = ask_for(&mut self.alice, "alice-vm", &names, None)?;
        let took = start.elapsed().as_secs_f64() * 1000.0;
        let Answer::Acquired { tenant, handout, fds, .. } = answer else {
            return Err(unexpected(&answer));
        };
        let has = |kind: &str| fds.iter().any(|fd| fd.split(' ').next() == Some(kind));
        let all =
            handout == Handout::Container && ["container", "group", "lease"].map(has) == [true; 3];
        report.check(
            all,
            format!("tenant {tenant} got fds over the socket: {}; in {took:.1} ms", fds.join(", ")),
        )?;

        let before = self.mapped_in_kernel()?;
        let answer = self.alice.ask(&Ask::Map { iova: MIB, size: 4 * MIB })?;
        let after = self.mapped_in_kernel()?;
        let mapped = matches!(answer, Answer::Done);
        let counted = match (before, after) {
            (Some(before), Some(after)) => after == (before.0 + 1, before.1 + 4 * MIB),
            _ => true,
        };
        let seen = after.map_or(String::new(), |a| format!("; the kernel counts {}", figures(a)));
        report.check(
            mapped && counted,
            format!(
                "mapped 4 MiB at {MIB:#x} for DMA with that container{}{seen}",
                reason(&answer)
            ),
        )?;
        for name in &names {
            let said = self.expect_device(true, name)?;
            report.check(true, said)?;
        }
        Ok(())
    }

    /// Opens a device as one of them, and compares its ids with those that sysfs shows.
    fn expect_device(&mut self, as_alice: bool, name: &str) -> Result<String, Failure> {
        let actor = if as_alice { &mut self.alice } else { &mut self.bob };
        let answer = actor.ask(&Ask::Device { name: name.to_owned() })?;
        let Answer::Device { vendor, device, regions, irqs } = answer else {
            return Err(unexpected(&answer));
        };
        let ids = format!("{vendor:04x}:{device:04x}");
        let known = self.devices.iter().find(|known| known.bdf == name);
        if known.is_some_and(|known| format!("{}:{}", known.vendor, known.device) != ids) {
            return Err(Failure::new(format!("{name} says it is {ids}, sysfs says otherwise")));
        }
        Ok(format!("opened {name}: it says it is {ids}, {regions} regions, {irqs} interrupt types"))
    }

    fn others_are_refused(&mut self, report: &mut Report) -> Result<(), Failure> {
        let names = self.setup.plan.first.clone();
        report.begin_part("Others are refused, and told why")?;
        let answer = ask_for(&mut self.bob, "bob-vm", &names, None)?;
        let Answer::Refused(refusal) = &answer else { return Err(unexpected(&answer)) };
        let busy = matches!(refusal, protocol::Error::Busy { .. });
        report.check(busy, format!("Bob asks for the same: {}", short(refusal)))?;

        if let Some(denied) = self.setup.plan.denied {
            let answer = ask_for(&mut self.bob, "bob-vm", &[denied.to_owned()], None)?;
            let Answer::Refused(refusal) = &answer else { return Err(unexpected(&answer)) };
            report.check(is_denied(refusal), format!("Bob asks for {denied}: denied"))?;
            if let protocol::Error::Denied { rule, reason, .. } = refusal {
                report.note(reason)?;
                report.note(&format!("by {rule}"))?;
            }
        }
        // This process may look ("observe"), so it is told the holder.
        let own = nix::unistd::geteuid();
        let device = lead(&names).to_owned();
        let refusal = refused(self.broker.acquire(request(&names)))?;
        let named = match &refusal {
            protocol::Error::Busy { holder: Some(holder), .. } => holder.pid == self.alice.pid,
            // On a real host the demonstration's policy gives root nothing.
            refusal => is_denied(refusal) && self.setup.sim.is_none(),
        };
        report
            .check(named, format!("uid {own}, which may observe, asks too: {}", short(&refusal)))?;
        if let Some(denied) = self.setup.plan.denied {
            let refusal = refused(self.broker.acquire(request(&[denied.to_owned()])))?;
            report.check(
                is_denied(&refusal),
                format!("uid {own} asks for {denied}: denied as well"),
            )?;
        }
        let leases = self.broker.leases()?;
        let holder = leases.iter().find(|lease| lease.devices.contains(&device));
        report.check(
            holder.map(|lease| lease.pid) == Some(self.alice.pid),
            format!("`leases` lists who has it: alice-vm, pid {}", self.alice.pid),
        )
    }

    fn it_is_given_back(&mut self, report: &mut Report) -> Result<(), Failure> {
        report.begin_part("Alice gives it back")?;
        let answer = self.alice.ask(&Ask::Release)?;
        let proved = matches!(answer, Answer::Released { proved: true });
        report.check(proved, "the kernel has shown that nothing of it is in use any more")?;
        let names = self.setup.plan.first.clone();
        let answer = ask_for(&mut self.bob, "bob-vm", &names, None)?;
        let got = matches!(answer, Answer::Acquired { .. });
        report.check(got, format!("so Bob gets it now{}", reason(&answer)))?;
        let answer = self.bob.ask(&Ask::Release)?;
        if matches!(answer, Answer::Released { proved: true }) {
            Ok(())
        } else {
            Err(unexpected(&answer))
        }
    }

    fn two_share_a_container(&mut self, report: &mut Report) -> Result<Shared, Failure> {
        report.begin_part(&format!(
            "Two share one address space on purpose: the policy's container {POOL:?}"
        ))?;
        let (mine, theirs) = (self.setup.plan.second.clone(), self.setup.plan.first.clone());
        let first = ask_for(&mut self.alice, "alice-vm", &mine, Some(POOL))?;
        let Answer::Acquired { lease: doomed, .. } = first else { return Err(unexpected(&first)) };
        let second = ask_for(&mut self.bob, "bob-vm", &theirs, Some(POOL))?;
        let Answer::Acquired { lease, fds, .. } = second else { return Err(unexpected(&second)) };
        let leases = self.broker.leases()?;
        let shares = |id: &str| leases.iter().any(|l| l.lease == id && l.container == POOL);
        let bare = !fds.iter().any(|fd| fd.starts_with("container") || fd.starts_with("group"));
        report.check(
            shares(&doomed) && shares(&lease) && bare && self.spaces()? <= 1,
            format!(
                "{} and {} are in it; the broker keeps the container",
                mine.join(", "),
                theirs.join(", ")
            ),
        )?;
        let at = [0x4000_0000, 0x5000_0000, 0x6000_0000];
        let answers = [
            self.alice.ask(&Ask::MapDma { iova: at[0], size: 2 * MIB })?,
            self.alice.ask(&Ask::MapDma { iova: at[1], size: MIB })?,
            self.bob.ask(&Ask::MapDma { iova: at[2], size: MIB })?,
        ];
        for answer in &answers {
            if !matches!(answer, Answer::Done) {
                return Err(unexpected(answer));
            }
        }
        let counts = self.mapped_of([&doomed, &lease])?;
        report.check(
            counts == [(2, 3 * MIB), (1, MIB)] && self.kernel_agrees((3, 4 * MIB))?,
            format!("MapDma: Alice has {}, Bob has {}", figures(counts[0]), figures(counts[1])),
        )?;
        let answer = self.bob.ask(&Ask::MapDma { iova: at[0] + MIB, size: MIB })?;
        let Answer::Refused(refusal) = &answer else { return Err(unexpected(&answer)) };
        let conflict = matches!(refusal, protocol::Error::Conflict { .. });
        let refused = conflict && self.kernel_agrees((3, 4 * MIB))?;
        report.check(refused, "Bob maps over Alice's range: refused, and nothing has changed")?;
        report.note(&refusal.to_string())?;
        self.expect_device(false, lead(&theirs))?;
        let watch = self.broker.watch(Some(&doomed))?;
        Ok(Shared { doomed, watch })
    }

    fn one_of_them_is_killed(mut self, shared: Shared, report: &mut Report) -> Result<(), Failure> {
        let Shared { doomed, mut watch } = shared;
        report.begin_part("Alice is killed with SIGKILL")?;
        let uid = (self.alice.uid != nix::unistd::geteuid().as_raw()).then_some(self.alice.uid);
        let fresh = Agent::start(self.setup.socket(), uid)?;
        std::mem::replace(&mut self.alice, fresh).kill()?;
        watch.set_timeout(Some(PATIENCE));
        for event in watch {
            match event {
                Ok(Event { event: EventKind::Reclaimed, .. }) | Err(Error::Timeout { .. }) => break,
                Ok(Event { event: EventKind::Quarantined, .. }) => {
                    return Err(Failure::new("her group is quarantined"));
                }
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let leases = self.broker.leases()?;
        let gone = !leases.iter().any(|lease| lease.lease == doomed);
        let left = leases.first().map(|l| (l.mappings.unwrap_or(0), l.mapped_bytes.unwrap_or(0)));
        report.check(
            gone && left == Some((1, MIB)) && self.kernel_agrees((1, MIB))?,
            "her 2 mappings, 3 MiB, are gone; Bob's 1 mapping, 1 MiB, is still there",
        )?;
        let name = lead(&self.setup.plan.first).to_owned();
        let still = self.expect_device(false, &name)?;
        let answer = self.bob.ask(&Ask::MapDma { iova: 0x4000_0000, size: MIB })?;
        report.check(
            matches!(answer, Answer::Done) && still.contains(&name),
            "Bob's device goes on, and he can use the range that was hers",
        )?;
        let names = self.setup.plan.second.clone();
        let answer = ask_for(&mut self.alice, "alice-vm", &names, None)?;
        let got = matches!(answer, Answer::Acquired { .. });
        report
            .check(got, format!("{} can be had again{}", names.join(" and "), reason(&answer)))?;
        self.all_is_given_back(report)
    }

    fn all_is_given_back(mut self, report: &mut Report) -> Result<(), Failure> {
        for actor in [&mut self.alice, &mut self.bob] {
            let answer = actor.ask(&Ask::Release)?;
            if !matches!(answer, Answer::Released { proved: true }) {
                return Err(unexpected(&answer));
            }
        }
        let leases = self.broker.leases()?.len();
        let idle = match &self.setup.sim {
            Some(sim) => sim.stats().map_err(failed)?.is_idle(),
            None => true,
        };
        report.check(leases == 0 && idle, "all given back: no lease, no mapping, no open VFIO file")
    }

    /// What the simulated kernel has mapped: how many mappings, how many bytes.
    fn mapped_in_kernel(&self) -> Result<Option<(u64, u64)>, Failure> {
        let Some(sim) = &self.setup.sim else { return Ok(None) };
        let spaces = sim.stats().map_err(failed)?.spaces;
        let sum = |(count, size), space: &crate::sim::Space| {
            (count + space.mappings, size + space.mapped_bytes)
        };
        Ok(Some(spaces.iter().fold((0, 0), sum)))
    }

    fn kernel_agrees(&self, expected: (u64, u64)) -> Result<bool, Failure> {
        Ok(self.mapped_in_kernel()?.is_none_or(|mapped| mapped == expected))
    }

    fn spaces(&self) -> Result<usize, Failure> {
        let Some(sim) = &self.setup.sim else { return Ok(0) };
        Ok(sim.stats().map_err(failed)?.spaces.len())
    }

    fn mapped_of(&mut self, ids: [&str; 2]) -> Result<[(u64, u64); 2], Failure> {
        let leases = self.broker.leases()?;
        Ok(ids.map(|id| {
            let lease = leases.iter().find(|lease| lease.lease == id);
            lease.map_or((0, 0), |l| (l.mappings.unwrap_or(0), l.mapped_bytes.unwrap_or(0)))
        }))
    }
}

/// Two clients, under uids of their own where this process may do that, else under its own.
fn clients(setup: &Setup) -> Result<[Agent; 2], Failure> {
    if nix::unistd::geteuid().is_root() {
        let [alice, bob] = UIDS.map(|uid| Agent::start(setup.socket(), Some(uid)));
        if let (Ok(alice), Ok(bob)) = (alice, bob) {
            return Ok([alice, bob]);
        }
    }
    Ok([Agent::start(setup.socket(), None)?, Agent::start(setup.socket(), None)?])
}

fn ask_for(
    actor: &mut Agent,
    vm: &str,
    devices: &[String],
    container: Option<&str>,
) -> Result<Answer, Failure> {
    let (vm, devices, container) = (vm.into(), devices.to_vec(), container.map(str::to_owned));
    actor.ask(&Ask::Acquire { vm, devices, container })
}

fn request(devices: &[String]) -> Acquire {
    devices.iter().fold(Acquire::new("demo"), |request, device| request.device(device))
}

/// The device that a group's others go with.
fn lead(devices: &[String]) -> &str {
    devices.first().map_or("", String::as_str)
}

fn refused<T>(result: Result<T, Error>) -> Result<protocol::Error, Failure> {
    match result {
        Err(Error::Broker { error, .. }) => Ok(error),
        Err(other) => Err(other.into()),
        Ok(_) => Err(Failure::new("it was given what it must not have")),
    }
}

fn is_denied(error: &protocol::Error) -> bool {
    matches!(error, protocol::Error::Denied { .. })
}

/// A refusal in one line of the report.
fn short(error: &protocol::Error) -> String {
    match error {
        protocol::Error::Denied { rule, reason, .. } => format!("{reason} ({rule})"),
        protocol::Error::Busy { holder: None, .. } => "busy; he may not know who has it".into(),
        protocol::Error::Busy { holder: Some(holder), .. } => {
            format!("busy, {} has it (pid {})", holder.vm, holder.pid)
        }
        other => other.to_string(),
    }
}

fn reason(answer: &Answer) -> String {
    match answer {
        Answer::Refused(error) => format!(" (refused: {error})"),
        Answer::Failed(text) => format!(" (failed: {text})"),
        _ => String::new(),
    }
}

fn unexpected(answer: &Answer) -> Failure {
    match answer {
        Answer::Refused(error) => error.clone().into(),
        Answer::Failed(text) => Failure::new(text.clone()),
        other => Failure::new(format!("it is not as told: {other:?}")),
    }
}

fn figures((count, size): (u64, u64)) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} mapping{plural}, {}", bytes(size))
}

fn failed(errno: nix::errno::Errno) -> Failure {
    Failure::new(format!("the simulated kernel's books: {errno}"))
}
