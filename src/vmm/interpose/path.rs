//! Which VFIO node a path names. By its words alone: no file system is asked, which could be the
//! program's own and wait for it. So a symbolic link is not followed, unless it is the directory
//! that a relative path starts from, whose name comes from the kernel.

use crate::kernel::Node;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether a path can name a VFIO node at all, from whichever directory.
pub(super) fn may_be_node(path: &[u8]) -> bool {
    let last = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    matches!(last, b"vfio" | b"iommu")
        || last.first().is_some_and(u8::is_ascii_digit)
        || last.starts_with(b"vfio")
        || last.starts_with(b"noiommu-")
}

/// The node that a path names, as seen from the directory `base`, which is not asked for where the
/// path is a whole one.
pub(super) fn node(path: &[u8], base: impl FnOnce() -> Option<Vec<u8>>) -> Option<Node> {
    if !may_be_node(path) {
        return None;
    }
    let base = if path.starts_with(b"/") { Vec::new() } else { base()? };
    let mut words: Vec<&[u8]> = Vec::new();
    for word in base.split(|byte| *byte == b'/').chain(path.split(|byte| *byte == b'/')) {
        match word {
            b"" | b"." => {}
            b".." => drop(words.pop()),
            word => words.push(word),
        }
    }
    let words: Option<Vec<&str>> =
        words.iter().map(|word| std::str::from_utf8(word).ok()).collect();
    match words?.as_slice() {
        ["dev", "iommu"] => Some(Node::Iommu),
        ["dev", "vfio", "vfio"] => Some(Node::Container),
        ["dev", "vfio", "devices", name] => number(name.strip_prefix("vfio")?).map(Node::Cdev),
        ["dev", "vfio", name] => match name.strip_prefix("noiommu-") {
            Some(group) => number(group).map(Node::NoIommuGroup),
            None => number(name).map(Node::Group),
        },
        _ => None,
    }
}

/// A number as the kernel writes it: digits, no zero before them.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// A directory as a process with this root directory names it; `None` where it is outside.
pub(super) fn below_root(directory: &Path, root: &Path) -> Option<Vec<u8>> {
    let below = directory.strip_prefix(root).ok()?;
    Some([b"/", OsStr::as_bytes(below.as_os_str())].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(base: &str, path: &str) -> Option<Node> {
        node(path.as_bytes(), || Some(base.as_bytes().to_vec()))
    }

    #[test]
    fn a_node_is_known_by_its_path_however_it_is_written() {
        for (base, path, node) in [
            ("/", "/dev/vfio/26", Node::Group(26)),
            ("/", "//dev/./vfio//26", Node::Group(26)),
            ("/", "/dev/net/../vfio/vfio", Node::Container),
            ("/", "/../dev/iommu", Node::Iommu),
            ("/dev/vfio", "26", Node::Group(26)),
            ("/dev/vfio", "./devices/vfio3", Node::Cdev(3)),
            ("/dev/vfio/devices", "vfio3", Node::Cdev(3)),
            ("/dev/vfio/devices", "../vfio", Node::Container),
            ("/home/x", "../../dev/vfio/noiommu-7", Node::NoIommuGroup(7)),
        ] {
            assert_eq!(from(base, path), Some(node), "{base} {path}");
        }
    }

    #[test]
    fn other_paths_are_none() {
        for path in [
            "",
            "/",
            "/dev",
            "/dev/vfio",
            "/dev/vfio/",
            "/dev/vfio/26/",
            "/dev/vfio/026",
            "/dev/vfio/-1",
            "/dev/vfio/+1",
            "/dev/vfio/4294967296",
            "/dev/vfio/x",
            "/dev/vfio/devices",
            "/dev/vfio/devices/3",
            "/dev/vfio/vfio3",
            "/dev/iommu/",
            "/dev/iommufd",
            "/etc/passwd",
            "26",
            "/proc/self/fd/26",
            "/dev/vfio/vfio/..",
            "/dev/vfio/\u{666}",
        ] {
            assert_eq!(from("/tmp", path), None, "{path:?}");
        }
        assert_eq!(node(b"/dev/vfio/\xff", || None), None);
        assert_eq!(node(b"26", || None), None, "without a directory");
    }

    #[test]
    fn a_whole_path_does_not_ask_for_the_directory() {
        assert_eq!(node(b"/dev/vfio/26", || panic!("asked")), Some(Node::Group(26)));
        assert_eq!(node(b"passwd", || panic!("asked")), None);
    }

    #[test]
    fn a_directory_is_seen_from_the_programs_own_root() {
        let below = |directory: &str, root: &str| below_root(directory.as_ref(), root.as_ref());
        assert_eq!(below("/dev/vfio", "/"), Some(b"/dev/vfio".to_vec()));
        assert_eq!(below("/jail/dev/vfio", "/jail"), Some(b"/dev/vfio".to_vec()));
        assert_eq!(below("/jail", "/jail"), Some(b"/".to_vec()));
        assert_eq!(below("/other/dev/vfio", "/jail"), None);
        assert_eq!(below("/jailed/dev/vfio", "/jail"), None);
    }
}
