//! Looking through a directory that is like `/proc`, and through the real one.

use super::*;
use crate::process::holders::{SearchedDevice, SearchedGroup};
use crate::protocol::{OpenFile, OpenKind, Process};
use std::convert::Infallible;
use std::fs::{create_dir_all, write};
use std::os::unix::fs::symlink;
use tempfile::TempDir;

const DEVICE: &str = "anon_inode:[vfio-device]";
const BDF: &str = "0000:65:00.0";

/// A directory that is like `/proc`.
struct Fake(TempDir);

impl Fake {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        create_dir_all(root.path().join("self/ns")).unwrap();
        symlink(INITIAL_NAMESPACE, root.path().join("self/ns/pid")).unwrap();
        Self(root)
    }

    /// A process with these files, each by what its link and its `fdinfo` say.
    fn process(&self, pid: u32, name: &str, files: &[(&str, &str)]) -> &Self {
        let of = self.0.path().join(pid.to_string());
        create_dir_all(of.join("task")).unwrap();
        let status = format!("Name:\t{name}\nUid:\t1000\t0\t0\t0\nVmSize:\t 8 kB\n");
        write(of.join("status"), status).unwrap();
        self.files(&of, files);
        self
    }

    fn files(&self, of: &Path, files: &[(&str, &str)]) {
        create_dir_all(of.join("fd")).unwrap();
        create_dir_all(of.join("fdinfo")).unwrap();
        for (number, (link, info)) in files.iter().enumerate() {
            symlink(link, of.join(format!("fd/{number}"))).unwrap();
            write(of.join(format!("fdinfo/{number}")), info).unwrap();
        }
    }

    fn thread(&self, pid: u32, thread: u32, files: &[(&str, &str)]) -> &Self {
        self.files(&self.0.path().join(format!("{pid}/task/{thread}")), files);
        self
    }

    fn maps(&self, pid: u32, name: &str) -> &Self {
        let line = format!("7f00-7f80 rw-s 10000000000 00:0e 1049    {name}\n");
        write(self.0.path().join(format!("{pid}/maps")), line).unwrap();
        self
    }

    /// What is found, first and in the end.
    fn look(&self, search: &Search) -> [Report; 2] {
        reports(self.0.path(), search)
    }
}

fn reports(root: &Path, search: &Search) -> [Report; 2] {
    let mut reports = Vec::new();
    let told = look(root, search, |report| {
        reports.push(report.clone());
        Ok::<_, Infallible>(())
    });
    told.unwrap();
    reports.try_into().unwrap()
}

/// Looks for a group whose node is /dev/full and for its device, whose own node is /dev/zero.
fn search() -> Search {
    let devices =
        vec![SearchedDevice { bdf: BDF.parse().unwrap(), node: Some("/dev/zero".into()) }];
    let group = SearchedGroup { id: 26, node: "/dev/full".into(), devices };
    Search { groups: vec![group], keepers: vec![666] }
}

type Shown<'a> = (u32, &'a str, Vec<(OpenKind, Option<&'a str>)>);

fn shown(processes: &[Process]) -> Vec<Shown<'_>> {
    let mut all = Vec::new();
    for Process { pid, command, files, .. } in processes {
        let files = files.iter().map(|file| (file.kind, file.name.as_deref()));
        all.push((*pid, command.as_str(), files.collect()));
    }
    all
}

fn named(path: &str) -> String {
    format!("vfio-device-syspath: /sys/devices/pci0000:64/{path}\n")
}

#[test]
fn who_has_a_node_or_a_named_device_has_it_for_certain() {
    let fake = Fake::new();
    fake.process(10, "group", &[("/dev/null", ""), ("/dev/full", "")])
        .process(11, "cdev", &[("/dev/zero", "")])
        .process(12, "device", &[(DEVICE, &named(BDF))])
        .process(13, "deleted", &[("/dev/vfio/devices/vfio3 (deleted)", &named(BDF))])
        .process(14, "another", &[(DEVICE, &named("0000:66:00.0")), ("socket:[7]", "")])
        .process(666, "keeper", &[("/dev/full", ""), (DEVICE, &named(BDF))]);
    let [first, last] = fake.look(&search());
    let bdf = Some(BDF);
    let expected = [
        (10, "group", vec![(OpenKind::Group, Some("26"))]),
        (11, "cdev", vec![(OpenKind::Cdev, bdf)]),
        (12, "device", vec![(OpenKind::Device, bdf)]),
        (13, "deleted", vec![(OpenKind::Cdev, bdf)]),
    ];
    assert_eq!(shown(&last.found[0]), expected);
    assert_eq!(first.found, last.found);
    assert_eq!((last.is_whole, first.is_whole, last.hidden, &last.why), (true, false, 0, &None));
    assert!(last.found[0].iter().all(|process| process.uid == 1000));
}

#[test]
fn what_the_kernel_does_not_name_may_be_it_where_nothing_else_is() {
    let fake = Fake::new();
    fake.process(10, "device", &[(DEVICE, "pos:\t0\n"), ("anon_inode:kvm-vfio", "")])
        .process(11, "mapping", &[])
        .maps(11, DEVICE)
        .process(12, "socket", &[("socket:[7]", "scm_fds: 2\n")])
        .process(13, "thread", &[])
        .thread(13, 14, &[("/dev/vfio/devices/vfio3 (deleted)", "")])
        .process(15, "nothing", &[("socket:[8]", "scm_fds: 0\n"), ("/dev/null", "")]);
    let [first, last] = fake.look(&search());
    assert_eq!(first.found[0].len(), 1, "before memory, threads and queues are looked at");
    let expected = [
        (10, "device", vec![(OpenKind::Device, None), (OpenKind::Kvm, None)]),
        (11, "mapping", vec![(OpenKind::Mapping, None)]),
        (12, "socket", vec![(OpenKind::Socket, None)]),
        (13, "thread", vec![(OpenKind::Cdev, None)]),
    ];
    assert_eq!(shown(&last.found[0]), expected);
    // Where somebody certainly has it, nobody else is suspected.
    fake.process(16, "group", &[("/dev/full", "")]);
    let [_, last] = fake.look(&search());
    assert_eq!(shown(&last.found[0]), [(16, "group", vec![(OpenKind::Group, Some("26"))])]);
}

#[test]
fn a_thread_with_files_of_its_own_and_a_mapped_node_are_certain() {
    let fake = Fake::new();
    fake.process(10, "thread", &[]).thread(10, 11, &[("/dev/full", "")]);
    fake.process(12, "mapping", &[]).maps(12, "/dev/vfio/devices/vfio3");
    let mut search = search();
    search.groups[0].devices[0].node = Some("/dev/vfio/devices/vfio3".into());
    let [_, last] = fake.look(&search);
    let expected = [
        (10, "thread", vec![(OpenKind::Group, Some("26"))]),
        (12, "mapping", vec![(OpenKind::Mapping, Some(BDF))]),
    ];
    assert_eq!(shown(&last.found[0]), expected);
}

#[test]
fn a_namespace_of_its_own_shows_not_all() {
    let fake = Fake::new();
    std::fs::remove_file(fake.0.path().join("self/ns/pid")).unwrap();
    symlink("pid:[4026532000]", fake.0.path().join("self/ns/pid")).unwrap();
    let [_, last] = fake.look(&search());
    assert!(last.why.unwrap().contains("namespace"));
}

#[test]
fn a_simulated_machine_is_not_looked_for_in_the_real_one() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let bytes = serde_json::to_vec(&search()).unwrap();
    fdpass::send(ours.as_fd(), &bytes, &[], MsgFlags::empty()).unwrap();
    answer(&theirs, true).unwrap();
    let mut buffer = vec![0; MOST_BYTES];
    let got = fdpass::receive(ours.as_fd(), &mut buffer, 0, MsgFlags::empty()).unwrap();
    let report: Report = serde_json::from_slice(&buffer[..got.len]).unwrap();
    assert!(report.found.is_empty() && report.why.unwrap().contains("simulated"));
}

#[test]
fn another_process_is_found_in_the_real_proc() {
    let file = std::fs::File::open("/dev/full").unwrap();
    let mut child = std::process::Command::new("cat");
    let (_, held) = std::io::pipe().map(|(read, write)| (child.stdin(read), write)).unwrap();
    let mut child = child.stdout(file).spawn().unwrap();
    let [_, last] = reports(Path::new("/proc"), &search());
    drop(held);
    child.wait().unwrap();
    let own = last.found[0].iter().find(|process| process.pid == child.id()).unwrap();
    assert_eq!(own.uid, nix::unistd::getuid().as_raw());
    assert!(own.files.contains(&OpenFile { kind: OpenKind::Group, name: Some("26".into()) }));
}
