//! `vfio-broker policy explain`: may this user have that device, and which rule says so. A dry run:
//! it reads the file and this machine, and asks no broker.

use super::explanation::{Explanation, Found};
use super::{Context, Failure, load, path_or_default};
use crate::cli::failure::DENIED;
use crate::cli::style::{print, print_json};
use crate::host::{self, Group, Place};
use crate::kernel::{self, Kernel, Linux};
use crate::policy::{Names, OVERFLOW_ID, Peer, Policy};
use crate::protocol::{Bdf, Handout};
use crate::sim::{Sim, Topology};
use crate::users::SystemUsers;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Say whether a user may have a device, and which rule decides
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Who asks: a uid, or a user's name
    #[arg(long, value_name = "UID", value_parser = uid)]
    uid: u32,
    /// The device's PCI address: 65:00.0 or 0000:65:00.0
    #[arg(long, value_name = "BDF", value_parser = Bdf::typed)]
    device: Bdf,
    /// A group that it is in, its own first [default: the user's groups on this machine]
    #[arg(long, value_name = "GID")]
    gid: Vec<u32>,
    /// The system unit that it runs in
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
    /// Its SELinux label
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
    /// In which form it would be handed out [default: what the tenant gets unless it asks]
    #[arg(long, value_enum)]
    handout: Option<Handout>,
    /// The policy [default: /etc/vfio-broker/policy.toml; with --sim NAME.toml, NAME.policy.toml
    /// beside it]
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Ask about the simulated machine of this file instead of this one
    #[arg(long, value_name = "TOPOLOGY.toml")]
    sim: Option<PathBuf>,
}

fn uid(text: &str) -> Result<u32, String> {
    let known = || SystemUsers.uid(text).ok_or_else(|| format!("there is no user {text:?}"));
    text.parse().or_else(|_| known())
}

pub(super) fn run(context: &Context, args: &Args) -> Result<ExitCode, Failure> {
    let beside = args.sim.as_ref().map(|sim| sim.with_extension("policy.toml"));
    let named = args.policy.clone().or(beside);
    let path = path_or_default(&named);
    let policy = load(path, "--policy FILE")?.map_err(|problems| {
        Failure::new(format!("the policy {} can't be used:\n\n{problems}\n", path.display()))
    })?;
    // The simulation lasts as long as this.
    let sim = args.sim.as_deref().map(simulation).transpose()?;
    let kernel = sim.as_ref().map_or_else(|| Arc::new(Linux) as Arc<dyn Kernel>, Sim::kernel);
    let peer = peer(args);
    let mut explanation = explain(&policy, &peer, args.device, kernel.as_ref())
        .map_err(|error| Failure::new(format!("can't look at the device: {error}")))?;
    if let Some(handout) = args.handout {
        explanation.ask_for(&policy, &peer, handout);
    }
    if peer.groups.is_empty() {
        let uid = peer.uid;
        explanation.notes.push(format!(
            "this machine has no user {uid}, so its groups are not known: name them with --gid"
        ));
    }
    if context.json {
        print_json(&explanation)?;
    } else {
        print(&explanation.text(context.style))?;
    }
    Ok(match explanation.verdict() {
        Some(true) => ExitCode::SUCCESS,
        Some(false) => ExitCode::from(DENIED),
        None => ExitCode::FAILURE,
    })
}

fn simulation(path: &Path) -> Result<Sim, Failure> {
    let failed = |why: String| {
        Failure::new(format!("can't simulate the machine of {}: {why}", path.display()))
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let topology = Topology::from_toml(&text).map_err(|error| failed(error.to_string()))?;
    Sim::start(topology).map_err(|error| failed(error.to_string()))
}

/// The caller that is asked about.
fn peer(args: &Args) -> Peer {
    let groups =
        if args.gid.is_empty() { SystemUsers.groups_of(args.uid) } else { args.gid.clone() };
    Peer {
        uid: args.uid,
        // Which is no tenant's group.
        gid: groups.first().copied().unwrap_or(OVERFLOW_ID),
        groups,
        pid: 0,
        unit: args.unit.clone(),
        label: args.label.clone(),
    }
}

fn explain(
    policy: &Policy,
    peer: &Peer,
    bdf: Bdf,
    kernel: &dyn Kernel,
) -> kernel::Result<Explanation> {
    let mut group = match host::find(kernel, bdf)? {
        Place::Nowhere => return Ok(Explanation::new(policy, peer, bdf, &Found::Nowhere)),
        Place::NoGroup => return Ok(Explanation::new(policy, peer, bdf, &Found::NoGroup)),
        Place::Group(id) => Group::scan(kernel, id)?,
    };
    if let Some(group) = group.as_mut().filter(|_| policy.names_serials()) {
        group.read_serials(kernel, policy.serials())?;
    }
    let found = match group.as_ref().and_then(|group| Some((group, group.device(bdf)?))) {
        Some((group, device)) => {
            let unsafe_interrupts = host::allows_unsafe_interrupts(kernel)?;
            Found::InGroup { group, device, unsafe_interrupts }
        }
        // It has gone since.
        None => Found::Nowhere,
    };
    Ok(Explanation::new(policy, peer, bdf, &found))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = r#"version = 1
[[tenant]]
name = "root"
user = 0
rights = ["observe"]
[[tenant]]
name = "alice"
user = 1000
devices = [{ bdf = "0000:65:00.0", id = "8086:10d3" }, "8086:10d4"]
deny = ["0000:65:00.1"]
[[tenant]]
name = "kvm"
group = 36
devices = ["8086:10d3"]
"#;

    const MACHINE: &str = r#"
kernel = "6.12"
[[group]]
id = 26
[[group.device]]
bdf = "0000:65:00.0"
vendor = 0x8086
device = 0x10d3
driver = "vfio-pci"
[[group.device]]
bdf = "0000:65:00.1"
vendor = 0x8086
device = 0x10d4
driver = "e1000e"
"#;

    fn ask(peer: Peer, device: &str) -> Explanation {
        ask_of(POLICY, MACHINE, peer, device)
    }

    fn ask_of(policy: &str, machine: &str, peer: Peer, device: &str) -> Explanation {
        let policy = Policy::parse("policy.toml", policy, &SystemUsers).unwrap();
        let sim = Sim::start(Topology::from_toml(machine).unwrap()).unwrap();
        explain(&policy, &peer, device.parse().unwrap(), sim.kernel().as_ref()).unwrap()
    }

    fn with_devices() -> String {
        POLICY.replace("deny =", "handouts = [\"container\", \"devices\"]\ndeny =")
    }

    fn peer(uid: u32) -> Peer {
        Peer { uid, gid: uid, groups: vec![36], pid: 0, unit: None, label: None }
    }

    fn text(explanation: &Explanation) -> String {
        explanation.text(crate::cli::style::Style::plain())
    }

    #[test]
    fn a_yes_says_by_which_rule_and_what_is_in_the_way() {
        let answer = ask_of(&with_devices(), MACHINE, peer(1000), "0000:65:00.0");
        assert!(answer.allowed);
        let text = text(&answer);
        for words in [
            "uid 1000 acquires 0000:65:00.0: allowed",
            "not tenant \"root\" (line 2)",
            "rule: tenant \"alice\" devices[0], policy.toml:9",
            "handouts: container, devices",
            "group 26 is not viable: 0000:65:00.1 is on e1000e\n",
            "0000:65:00.1 is in the same group, and denied",
            "tenant \"kvm\" in line 12 is for this caller too",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
    }

    #[test]
    fn a_no_says_by_which_rule() {
        let denied = ask(peer(1000), "0000:65:00.1");
        assert!(!denied.allowed);
        let denied = text(&denied);
        assert!(denied.contains("rule: tenant \"alice\" deny[0], policy.toml:10"), "{denied}");
        assert!(!denied.contains("driver_override"), "no advice to take it anyway: {denied}");
        let looks = text(&ask(peer(0), "0000:65:00.0"));
        assert!(looks.contains("tenant \"root\" lacks the right acquire"), "{looks}");
        let stranger = Peer { groups: vec![], ..peer(4711) };
        let stranger = ask(stranger, "0000:65:00.0");
        assert!(!stranger.allowed && stranger.tenant.is_none());
        assert!(text(&stranger).contains("rule: default deny, policy.toml"));
        assert_eq!(stranger.passed_over.len(), 3);
    }

    #[test]
    fn a_denied_companion_denies_the_group_but_not_the_device_alone() {
        let without = MACHINE.replace("driver = \"e1000e\"", "");
        for machine in [MACHINE.replace("e1000e", "vfio-pci"), MACHINE.into(), without] {
            let ask = |policy: &str| ask_of(policy, &machine, peer(1000), "0000:65:00.0");
            let denied = ask(POLICY);
            assert!(!denied.allowed);
            let denied = text(&denied);
            assert!(denied.contains("handout devices, which would not"), "{denied}");
            let alone = ask(&with_devices());
            assert!(alone.allowed);
            assert!(text(&alone).contains("only handout devices is possible"), "{}", text(&alone));
        }
    }

    #[test]
    fn a_companion_that_is_allowed_must_be_named_where_the_group_is_given() {
        let said = |policy: &str| {
            let policy = policy.replace("deny = [\"0000:65:00.1\"]\n", "");
            text(&ask_of(&policy, MACHINE, peer(1000), "0000:65:00.0"))
        };
        let must = "must be named too, to use or to withhold it\n";
        assert!(said(POLICY).contains(must), "{}", said(POLICY));
        let either = said(&with_devices());
        assert!(
            either.contains("must be named too, to use or to withhold it, with handout container")
        );
    }

    #[test]
    fn it_says_how_far_the_memlock_limit_is_raised() {
        let said = |policy: &str| text(&ask_of(policy, MACHINE, peer(1000), "0000:65:00.0"));
        let never = said(POLICY);
        assert!(never.contains("  memlock: not raised\n"), "{never}");
        let some = said(&POLICY.replace("deny =", "memlock = \"4GiB\"\ndeny ="));
        assert!(some.contains("  memlock: raised up to 4 GiB\n"), "{some}");
    }

    #[test]
    fn the_device_is_written_as_with_exec() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        for device in ["65:00.0", "0000:65:00.0"] {
            let line = Line::parse_from(["explain", "--uid", "1000", "--device", device]);
            assert_eq!(line.args.device.to_string(), "0000:65:00.0");
        }
    }

    #[test]
    fn a_handout_that_the_tenant_may_not_have_is_denied() {
        let policy = Policy::parse("policy.toml", &with_devices(), &SystemUsers).unwrap();
        let asked = |handout| {
            let mut answer = ask_of(&with_devices(), MACHINE, peer(1000), "0000:65:00.0");
            answer.ask_for(&policy, &peer(1000), handout);
            (answer.allowed, text(&answer))
        };
        let (allowed, said) = asked(Handout::Devices);
        assert!(allowed, "{said}");
        let (allowed, said) = asked(Handout::Iommufd);
        assert!(!allowed && said.contains("iommufd"), "{said}");
        // Its companion is denied, and the group's file reaches that too.
        let (allowed, said) = asked(Handout::Container);
        assert!(!allowed && said.contains("whoever is handed the group"), "{said}");
    }

    #[test]
    fn a_device_that_is_not_there_is_not_called_allowed() {
        let answer = ask(peer(1000), "0000:66:00.0");
        assert_eq!(answer.verdict(), None);
        let text = text(&answer);
        assert!(text.contains("not known") && text.contains("there is no device"), "{text}");
    }
}
