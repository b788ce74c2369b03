//! Those who have their devices all the time.

use crate::copies::Copies;
use crate::daemon::Daemon;
use crate::qemu::Qemu;
use crate::{EDU0, EDU1, NIC};

pub struct Holders {
    /// By the id of their device, with what it is and how many VFIO files there are.
    qemus: Vec<(Qemu, &'static str, (u64, u64), usize)>,
    copies: Copies,
    /// Each one's lease and device.
    leases: Vec<(String, String)>,
}

impl Holders {
    pub fn acquire(daemon: &Daemon) -> Self {
        let card = format!("vfio-pci,id=card,host={NIC}");
        let legacy = qemu(daemon, NIC, "container", &["-device", &card]);
        let mut qemus = vec![(legacy, "card", (0x8086, 0x10d3), 3)];
        if daemon.has_iommufd {
            let edu = format!("vfio-pci,id=edu,iommufd=i0,fd={{cdev:{EDU0}}}");
            let more = ["-object", "iommufd,id=i0,fd={iommufd}", "-device", &edu];
            qemus.push((qemu(daemon, EDU0, "iommufd", &more), "edu", (0x1234, 0x11e8), 2));
        }
        let copies = Copies::acquire(&mut daemon.client(), EDU1);
        let all = daemon.client().leases().unwrap();
        assert_eq!(all.len(), qemus.len() + 1, "{all:?}");
        let leases = all.into_iter().map(|lease| (lease.lease, lease.devices[0].clone())).collect();
        let mut holders = Self { qemus, copies, leases };
        holders.have_all();
        holders
    }

    /// Nobody has lost anything, whether there is a daemon or not.
    pub fn have_all(&mut self) {
        for (qemu, id, device, files) in &mut self.qemus {
            assert!(qemu.launcher.try_wait().unwrap().is_none(), "QEMU has ended");
            assert_eq!(qemu.device(id), *device);
            assert_eq!(qemu.shows().1.len(), *files);
        }
        self.copies.copy();
    }

    /// Their leases are listed, by the names that they have had all the time.
    pub fn are_known(&self, daemon: &Daemon) {
        let all = daemon.client().leases().unwrap();
        for (lease, device) in &self.leases {
            let found = all.iter().find(|it| it.lease == *lease);
            let found = found.unwrap_or_else(|| panic!("lease {lease} is not in {all:?}"));
            assert_eq!(found.devices, [device.as_str()]);
        }
    }

    pub fn end(self) {
        for (qemu, ..) in self.qemus {
            assert_eq!(qemu.quit().code(), Some(0));
        }
    }
}

fn qemu(daemon: &Daemon, device: &str, handout: &str, more: &[&str]) -> Qemu {
    let mut command = daemon.user();
    command.arg(env!("CARGO_BIN_EXE_vfio-broker")).arg("--socket").arg(daemon.socket());
    command.args(["exec", "--vm", device, "--device", device, "--handout", handout, "--"]);
    let mut qemu = Qemu::start(command, "64", more);
    assert!(qemu.greets(), "QEMU did not start");
    qemu
}
