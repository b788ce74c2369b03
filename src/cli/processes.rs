//! The processes that have something open, in words.

use super::style::ago;
use crate::protocol::{Known, OpenFile, OpenKind, Process, Processes};

/// A line for each process, and one that says what may be missing.
pub(super) fn lines(found: &Processes) -> Vec<String> {
    let Processes { known, why, at, processes } = found;
    let mut lines: Vec<String> = processes.iter().map(line).collect();
    let why = why.as_deref().unwrap_or("not said why");
    let at = ago(*at);
    match known {
        Known::Whole => {}
        Known::Partial => lines.push(format!("there may be others ({at} ago): {why}")),
        Known::Unknown => lines.push(format!("who has it is unknown: {why}")),
    }
    lines
}

fn line(process: &Process) -> String {
    let Process { pid, uid, command, files } = process;
    let is_certain = files.iter().any(|file| file.name.is_some());
    let has = if is_certain { "has" } else { "may have it, by" };
    let mut each: Vec<String> = files.iter().map(file).collect();
    each.dedup();
    format!("pid {pid} ({command}, uid {uid}) {has} {}", each.join(", "))
}

fn file(file: &OpenFile) -> String {
    let name = file.name.as_deref();
    let (what, of) = match file.kind {
        OpenKind::Group => ("group", ""),
        OpenKind::Device => ("device", "a device"),
        OpenKind::Cdev => ("the node of", "the node of a device"),
        OpenKind::Mapping => ("mapped memory of", "mapped memory of a device"),
        OpenKind::Kvm => ("KVM's files for", "KVM's VFIO device"),
        OpenKind::Socket => ("a socket with", "a socket with files in flight"),
        OpenKind::Iommufd => ("iommufd", "an iommufd"),
        OpenKind::Container => ("container", "a container"),
    };
    name.map_or(of.to_owned(), |name| format!("{what} {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(files: &[(OpenKind, Option<&str>)]) -> Process {
        let file = |(kind, name): &(OpenKind, Option<&str>)| OpenFile {
            kind: *kind,
            name: name.map(str::to_owned),
        };
        let files = files.iter().map(file).collect();
        Process { pid: 7, uid: 1000, command: "qemu".into(), files }
    }

    #[test]
    fn who_has_it_is_told_apart_from_who_may_have_it() {
        let bdf = Some("0000:65:00.0");
        let has = process(&[(OpenKind::Group, Some("26")), (OpenKind::Mapping, bdf)]);
        let may = process(&[(OpenKind::Device, None), (OpenKind::Kvm, None)]);
        let found = |known, why: Option<&str>| Processes {
            known,
            why: why.map(str::to_owned),
            at: 0,
            processes: vec![has.clone(), may.clone()],
        };
        let whole = lines(&found(Known::Whole, None));
        assert_eq!(
            whole,
            [
                "pid 7 (qemu, uid 1000) has group 26, mapped memory of 0000:65:00.0",
                "pid 7 (qemu, uid 1000) may have it, by a device, KVM's VFIO device",
            ]
        );
        let partial = lines(&found(Known::Partial, Some("2 could not be looked into")));
        assert!(partial[2].starts_with("there may be others"), "{partial:?}");
        assert!(partial[2].ends_with("2 could not be looked into"), "{partial:?}");
        let unknown =
            lines(&Processes { processes: Vec::new(), ..found(Known::Unknown, Some("x")) });
        assert_eq!(unknown, ["who has it is unknown: x"]);
    }
}
