//! `vfio-broker topology`: the IOMMU groups as a tree, with who holds what and what is in the way.

use super::pci_names::PciNames;
use super::style::{Style, ago, all_printable, print, print_json};
use super::{Context, Failure};
use crate::protocol::{self, Device, Group, GroupState, Groups, Lease, Unproved};
use std::collections::HashMap;
use std::sync::mpsc;

/// Show groups and devices, who has them, and what keeps them from being used
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(context: &Context, _: &Args) -> Result<(), Failure> {
    let mut broker = context.connect()?;
    if context.json {
        let groups = broker.topology()?;
        return Ok(print_json(&Groups { groups })?);
    }
    let leases = all_printable(broker.leases()?)?;
    let mut tree = Tree::new(context.style, PciNames::load(), leases);
    let mut replies = broker.call_more(&protocol::Topology {})?;
    std::thread::scope(|scope| {
        // A pager stops reading for as long as somebody looks at a page; the broker hangs up on who
        // stops reading. So replies are read while others are printed.
        let (sender, arrived) = mpsc::channel();
        scope.spawn(move || {
            // It ends early where printing has failed.
            let _ = replies.try_for_each(|reply| sender.send(reply));
        });
        let mut is_empty = true;
        for reply in arrived {
            for group in all_printable(reply?.groups)? {
                is_empty = false;
                print(&tree.draw(&group))?;
            }
        }
        let last = match is_empty {
            true => "no groups that the policy lets you see\n".to_owned(),
            false => tree.how_to_bind(),
        };
        Ok(print(&last)?)
    })
}

struct Tree {
    style: Style,
    names: PciNames,
    leases: HashMap<String, Lease>,
    /// The width of the drivers' names: the longest so far, since each group is drawn when it comes.
    widest: usize,
    /// Something could be bound to a VFIO driver.
    is_left: bool,
}

impl Tree {
    fn new(style: Style, names: PciNames, leases: Vec<Lease>) -> Self {
        let leases = leases.into_iter().map(|lease| (lease.lease.clone(), lease)).collect();
        Self { style, names, leases, widest: "vfio-pci".len(), is_left: false }
    }

    fn draw(&mut self, group: &Group) -> String {
        let drivers = group.devices.iter().filter_map(|device| device.driver.as_ref());
        self.widest = drivers.map(String::len).fold(self.widest, usize::max);
        self.is_left |= group.devices.iter().any(|device| !device.vfio && !is_bridge(device));
        let mut text = self.head(group);
        for (i, device) in group.devices.iter().enumerate() {
            let branch = if i + 1 == group.devices.len() { "`-" } else { "|-" };
            text += &self.device(branch, device);
        }
        if let Some(Unproved { tenant, devices, since, .. }) = &group.unproved {
            text += &format!(
                "   {} only for {tenant}, which had {} by iommufd {} ago, until an administrator \
                 has unbound it\n",
                self.style.yellow("!"),
                devices.join(" "),
                ago(*since)
            );
        }
        for line in group.open_in.iter().flat_map(super::processes::lines) {
            text += &format!("   {} {line}\n", self.style.yellow("!"));
        }
        for blocker in &group.blockers {
            text += &format!("   {} {blocker}\n", self.style.red("!"));
        }
        text
    }

    fn head(&self, group: &Group) -> String {
        let style = self.style;
        let state = match group.state {
            GroupState::Free if !group.viable => style.red("not viable"),
            GroupState::Free if group.devices.iter().any(|device| device.vfio) => {
                style.green("free")
            }
            GroupState::Free if group.devices.iter().all(is_bridge) => {
                style.dim("a bridge: it cannot be handed out")
            }
            GroupState::Free => style.yellow("no VFIO driver"),
            GroupState::Held => style.yellow("held"),
            GroupState::Reclaiming => style.yellow("being taken back"),
            GroupState::Quarantined => style.red("not known to be free yet"),
        };
        format!("{}  {state}\n", style.bold(&format!("group {}", group.id)))
    }

    fn device(&self, branch: &str, device: &Device) -> String {
        let widest = self.widest;
        let Device { bdf, vendor, device: id, class, driver, lease, cdev, .. } = device;
        let cdev = cdev.as_deref().and_then(|path| path.rsplit('/').next());
        let cdev = cdev.map_or(String::new(), |name| format!(", cdev {name}"));
        let driver = driver.as_deref().unwrap_or("-");
        let name = self.names.device(vendor, id);
        let class = self.style.dim(&(self.names.class(class) + &cdev));
        let holder = lease.as_ref().map_or(String::new(), |lease| {
            let known = self.leases.get(lease);
            let vm = known.map_or(String::new(), |l| format!("{} of {}, ", l.vm, l.tenant));
            format!("  {}", self.style.yellow(&format!("<- {vm}lease {lease}")))
        });
        format!("{branch} {bdf}  {driver:widest$}  {name}, {class}{holder}\n")
    }

    /// Where to read how a device gets onto a VFIO driver: not here, where the command would stand
    /// beside what the host needs.
    fn how_to_bind(&self) -> String {
        if !self.is_left {
            return String::new();
        }
        let uid = nix::unistd::geteuid();
        let command = format!("vfio-broker policy explain --uid {uid} --device ADDRESS");
        let arrow = self.style.bold("->");
        format!(
            "{arrow} `{command}` says whether you may have a device, and how it gets onto a VFIO \
             driver\n"
        )
    }
}

fn is_bridge(device: &Device) -> bool {
    device.class.starts_with("0604")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Blocker;

    fn device(bdf: &str, driver: &str, lease: Option<&str>) -> Device {
        Device {
            bdf: bdf.into(),
            vendor: "8086".into(),
            device: "10d3".into(),
            class: "020000".into(),
            driver: (driver != "-").then(|| driver.into()),
            vfio: driver == "vfio-pci",
            cdev: None,
            lease: lease.map(str::to_owned),
        }
    }

    #[test]
    fn the_tree_shows_drivers_holders_and_blockers() {
        let (bdf, driver) = ("0000:00:1f.2".to_owned(), Some("ahci".to_owned()));
        let blocker = Blocker { bdf, driver, fix: Some("unbind it".into()) };
        let free = |id, device| Group {
            id,
            viable: true,
            state: GroupState::Free,
            blockers: vec![],
            unproved: None,
            open_in: None,
            devices: vec![device],
        };
        let port = Device { class: "060400".into(), ..device("0000:00:01.0", "pcieport", None) };
        let groups = [
            Group {
                id: 7,
                viable: true,
                state: GroupState::Held,
                blockers: vec![],
                unproved: None,
                open_in: None,
                devices: vec![
                    device("0000:65:00.0", "vfio-pci", Some("l1")),
                    device("0000:65:00.1", "vfio-pci", None),
                ],
            },
            Group {
                id: 8,
                viable: false,
                state: GroupState::Free,
                blockers: vec![blocker],
                unproved: None,
                open_in: None,
                devices: vec![device("0000:00:1f.2", "ahci", None)],
            },
            free(
                9,
                Device {
                    cdev: Some("/dev/vfio/devices/vfio3".into()),
                    ..device("0000:66:00.0", "vfio-pci", None)
                },
            ),
            free(10, device("0000:67:00.0", "-", None)),
            free(11, port),
        ];
        let tree = || Tree::new(Style::plain(), PciNames::default(), vec![]);
        let mut whole = tree();
        let drawn: String = groups.iter().map(|group| whole.draw(group)).collect();
        let hint = whole.how_to_bind();
        assert_eq!(
            drawn,
            "group 7  held\n\
             |- 0000:65:00.0  vfio-pci  [8086:10d3], class 020000  <- lease l1\n\
             `- 0000:65:00.1  vfio-pci  [8086:10d3], class 020000\n\
             group 8  not viable\n\
             `- 0000:00:1f.2  ahci      [8086:10d3], class 020000\n   \
             ! 0000:00:1f.2 is on ahci\n\
             group 9  free\n\
             `- 0000:66:00.0  vfio-pci  [8086:10d3], class 020000, cdev vfio3\n\
             group 10  no VFIO driver\n\
             `- 0000:67:00.0  -         [8086:10d3], class 020000\n\
             group 11  a bridge: it cannot be handed out\n\
             `- 0000:00:01.0  pcieport  [8086:10d3], class 060400\n"
        );
        assert!(hint.contains("policy explain --uid"), "{hint}");
        let mut bound = tree();
        bound.draw(&groups[2]);
        assert_eq!(bound.how_to_bind(), "", "nothing is left to bind");
        let left = Unproved {
            tenant: "alice".into(),
            lease: "l1".into(),
            vm: "web1".into(),
            since: 0,
            devices: vec!["0000:66:00.0".into()],
        };
        let whose = Group { unproved: Some(left), ..groups[2].clone() };
        let drawn = bound.draw(&whose);
        assert!(drawn.contains("! only for alice, which had 0000:66:00.0 by iommufd"), "{drawn}");
    }
}
