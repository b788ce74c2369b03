//! Who has what of the groups that are looked for.

use super::files::{Mapping, OpenFile};
use super::proc::Proc;
use crate::process::holders::{
    MOST_FILES, MOST_GROUPS, MOST_PROCESSES, Report, Search, SearchedGroup,
};
use crate::protocol::{Bdf, OpenFile as Shown, OpenKind, Process};
use crate::sys::node::device_number;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The files of one process, each with a name where it is certain what it is of.
type Files = BTreeSet<(OpenKind, Option<String>)>;

/// What was found so far.
pub(super) struct Found {
    groups: Vec<Group>,
    /// Nodes that have no device by themselves, and which kind of them each is.
    others: BTreeMap<(u32, u32), OpenKind>,
    /// What processes have that may be of any group.
    unnamed: BTreeMap<u32, Files>,
}

/// One of the groups.
struct Group {
    devices: Vec<Bdf>,
    /// The numbers of its node and its devices' own.
    nodes: BTreeMap<(u32, u32), (OpenKind, String)>,
    /// The paths of its devices' own nodes.
    paths: BTreeMap<String, Bdf>,
    /// Who has something that is certainly of it.
    held: BTreeMap<u32, Files>,
}

impl Group {
    fn new(searched: &SearchedGroup) -> Self {
        let number = |node: &str| device_number(Path::new(node));
        let mut nodes = BTreeMap::new();
        let mut paths = BTreeMap::new();
        nodes.extend(
            number(&searched.node).map(|own| (own, (OpenKind::Group, searched.id.to_string()))),
        );
        for device in &searched.devices {
            let Some(node) = &device.node else { continue };
            nodes.extend(number(node).map(|own| (own, (OpenKind::Cdev, device.bdf.to_string()))));
            paths.insert(node.clone(), device.bdf);
        }
        let devices = searched.devices.iter().map(|device| device.bdf).collect();
        Self { devices, nodes, paths, held: BTreeMap::new() }
    }

    fn add(&mut self, pid: u32, kind: OpenKind, name: String) {
        self.held.entry(pid).or_default().insert((kind, Some(name)));
    }
}

impl Found {
    pub(super) fn new(search: &Search) -> Self {
        let others = [("/dev/vfio/vfio", OpenKind::Container), ("/dev/iommu", OpenKind::Iommufd)];
        let number = |(node, kind)| Some((device_number(Path::new(node))?, kind));
        Self {
            groups: search.groups.iter().take(MOST_GROUPS).map(Group::new).collect(),
            others: others.into_iter().filter_map(number).collect(),
            unnamed: BTreeMap::new(),
        }
    }

    /// Takes down what an open file of a process is, if it is anything.
    pub(super) fn look_at(&mut self, pid: u32, file: &OpenFile) {
        match file {
            OpenFile::Node(number) => {
                for group in &mut self.groups {
                    if let Some((kind, name)) = group.nodes.get(number).cloned() {
                        group.add(pid, kind, name);
                    }
                }
                if let Some(kind) = self.others.get(number) {
                    self.add_unnamed(pid, *kind);
                }
            }
            OpenFile::Device(Some(bdf)) => self.add_device(pid, OpenKind::Device, *bdf),
            OpenFile::Deleted(Some(bdf)) => self.add_device(pid, OpenKind::Cdev, *bdf),
            OpenFile::Device(None) => self.add_unnamed(pid, OpenKind::Device),
            OpenFile::Deleted(None) => self.add_unnamed(pid, OpenKind::Cdev),
            OpenFile::Kvm => self.add_unnamed(pid, OpenKind::Kvm),
        }
    }

    /// The same for a mapping.
    pub(super) fn look_at_mapping(&mut self, pid: u32, mapping: &Mapping) {
        match mapping {
            Mapping::Device => self.add_unnamed(pid, OpenKind::Mapping),
            Mapping::Node(path) => {
                for group in &mut self.groups {
                    if let Some(bdf) = group.paths.get(path).copied() {
                        group.add(pid, OpenKind::Mapping, bdf.to_string());
                    }
                }
            }
        }
    }

    /// The same for a socket that has files in its queue, whatever these are.
    pub(super) fn add_queue(&mut self, pid: u32) {
        self.add_unnamed(pid, OpenKind::Socket);
    }

    fn add_device(&mut self, pid: u32, kind: OpenKind, bdf: Bdf) {
        for group in self.groups.iter_mut().filter(|group| group.devices.contains(&bdf)) {
            group.add(pid, kind, bdf.to_string());
        }
    }

    fn add_unnamed(&mut self, pid: u32, kind: OpenKind) {
        self.unnamed.entry(pid).or_default().insert((kind, None));
    }

    /// Whether for each group somebody is known who certainly has something of it.
    pub(super) fn explains_all(&self) -> bool {
        self.groups.iter().all(|group| !group.held.is_empty())
    }

    pub(super) fn report(&self, proc: &Proc, hidden: usize, is_whole: bool) -> Report {
        let mut report = Report { hidden, is_whole, ..Report::default() };
        for group in &self.groups {
            let mut pids: Vec<u32> = group.held.keys().copied().collect();
            if pids.is_empty() {
                // Whoever has something that may be of it; what has no device by itself is none.
                let may = self.unnamed.iter().filter(|(_, files)| {
                    !files
                        .iter()
                        .all(|(kind, _)| matches!(kind, OpenKind::Container | OpenKind::Iommufd))
                });
                pids.extend(may.map(|(pid, _)| *pid));
            }
            report.more |= pids.len() > MOST_PROCESSES;
            pids.truncate(MOST_PROCESSES);
            let shown = pids.into_iter().filter_map(|pid| self.process(proc, group, pid));
            report.found.push(shown.collect());
        }
        report.why = (!proc.has_all()).then(|| "only one PID namespace is seen".into());
        report
    }

    fn process(&self, proc: &Proc, group: &Group, pid: u32) -> Option<Process> {
        let (uid, command) = proc.who(pid)?;
        let named = group.held.get(&pid).into_iter().flatten();
        let all = named.chain(self.unnamed.get(&pid).into_iter().flatten());
        let files =
            all.take(MOST_FILES).map(|(kind, name)| Shown { kind: *kind, name: name.clone() });
        Some(Process { pid, uid, command, files: files.collect() })
    }
}
