//! `vfio-broker topology`: the IOMMU groups as a tree, with who holds what and what is in the way.

use super::pci_names::PciNames;
use super::style::{Style, ago, all_printable, print, print_json};
use super::{Context, Failure};
use crate::protocol::{Device, Group, GroupState, Groups, Lease, Unproved};

/// Show groups and devices, who has them, and what keeps them from being used
#[derive(Debug, clap::Args)]
pub(super) struct Args {}

pub(super) fn run(context: &Context, _: &Args) -> Result<(), Failure> {
    let mut broker = context.connect()?;
    let groups = broker.topology()?;
    if context.json {
        return Ok(print_json(&Groups { groups })?);
    }
    if groups.is_empty() {
        return Ok(print("no groups that the policy lets you see\n")?);
    }
    let (groups, leases) = (all_printable(groups)?, all_printable(broker.leases()?)?);
    let tree = Tree { style: context.style, names: PciNames::load(), leases };
    Ok(print(&tree.draw(&groups))?)
}

struct Tree {
    style: Style,
    names: PciNames,
    leases: Vec<Lease>,
}

impl Tree {
    fn draw(&self, groups: &[Group]) -> String {
        let driver = |device: &Device| device.driver.as_ref().map_or(1, String::len);
        let widest = groups.iter().flat_map(|g| &g.devices).map(driver).max().unwrap_or(1);
        let mut text = String::new();
        for group in groups {
            text += &self.head(group);
            for (i, device) in group.devices.iter().enumerate() {
                let branch = if i + 1 == group.devices.len() { "`-" } else { "|-" };
                text += &self.device(branch, device, widest);
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
            for blocker in &group.blockers {
                text += &format!("   {} {blocker}\n", self.style.red("!"));
            }
        }
        text + &self.how_to_bind(groups)
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

    fn device(&self, branch: &str, device: &Device, widest: usize) -> String {
        let Device { bdf, vendor, device: id, class, driver, lease, cdev, .. } = device;
        let cdev = cdev.as_deref().and_then(|path| path.rsplit('/').next());
        let cdev = cdev.map_or(String::new(), |name| format!(", cdev {name}"));
        let driver = driver.as_deref().unwrap_or("-");
        let name = self.names.device(vendor, id);
        let class = self.style.dim(&(self.names.class(class) + &cdev));
        let holder = lease.as_ref().map_or(String::new(), |lease| {
            let known = self.leases.iter().find(|known| known.lease == *lease);
            let vm = known.map_or(String::new(), |l| format!("{} of {}, ", l.vm, l.tenant));
            format!("  {}", self.style.yellow(&format!("<- {vm}lease {lease}")))
        });
        format!("{branch} {bdf}  {driver:widest$}  {name}, {class}{holder}\n")
    }

    /// Where to read how a device gets onto a VFIO driver: not here, where the command would stand
    /// beside what the host needs.
    fn how_to_bind(&self, groups: &[Group]) -> String {
        let devices = groups.iter().flat_map(|group| &group.devices);
        if devices.filter(|device| !is_bridge(device)).all(|device| device.vfio) {
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
        let tree = Tree { style: Style::plain(), names: PciNames::default(), leases: vec![] };
        let drawn = tree.draw(&groups);
        let (drawn, hint) = drawn.split_once("->").unwrap();
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
        assert!(!tree.draw(&groups[2..3]).contains("->"), "nothing is left to bind");
        let left = Unproved {
            tenant: "alice".into(),
            lease: "l1".into(),
            vm: "web1".into(),
            since: 0,
            devices: vec!["0000:66:00.0".into()],
        };
        let whose = Group { unproved: Some(left), ..groups[2].clone() };
        let drawn = tree.draw(&[whose]);
        assert!(drawn.contains("! only for alice, which had 0000:66:00.0 by iommufd"), "{drawn}");
    }
}
