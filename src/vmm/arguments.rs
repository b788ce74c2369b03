//! A program's arguments, in which `{cdev:0000:65:00.0}` and its like stand for numbers of open
//! files.

use super::{Error, Result};
use crate::protocol::{Bdf, Handout};
use std::ffi::OsString;
use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// What stands for a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placeholder {
    /// `{iommufd}`
    Iommufd,
    /// `{cdev:DEVICE}`: the device's own node.
    Cdev(String),
    /// `{container}`
    Container,
    /// `{group:DEVICE}`: the group that the device is in.
    Group(String),
    /// `{device:DEVICE}`: the device, opened through its group.
    Device(String),
    /// `{lease}`
    Lease,
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iommufd => f.write_str("{iommufd}"),
            Self::Cdev(device) => write!(f, "{{cdev:{device}}}"),
            Self::Container => f.write_str("{container}"),
            Self::Group(device) => write!(f, "{{group:{device}}}"),
            Self::Device(device) => write!(f, "{{device:{device}}}"),
            Self::Lease => f.write_str("{lease}"),
        }
    }
}

impl Placeholder {
    /// What stands between the braces; `None` for what is none of them.
    fn read(text: &str) -> Option<Self> {
        let (name, device) = match text.split_once(':') {
            Some((name, device)) => (name, Some(device.to_owned())),
            None => (text, None),
        };
        Some(match (name, device) {
            ("iommufd", None) => Self::Iommufd,
            ("container", None) => Self::Container,
            ("lease", None) => Self::Lease,
            ("cdev", Some(device)) => Self::Cdev(device),
            ("group", Some(device)) => Self::Group(device),
            ("device", Some(device)) => Self::Device(device),
            _ => return None,
        })
    }

    /// The device that it names.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::Cdev(device) | Self::Group(device) | Self::Device(device) => Some(device),
            Self::Iommufd | Self::Container | Self::Lease => None,
        }
    }

    /// The handouts that have such a file.
    fn handouts(&self) -> &'static [Handout] {
        match self {
            Self::Iommufd | Self::Cdev(_) => &[Handout::Iommufd],
            // The second is that of a shared container whose members all hold it.
            Self::Container => &[Handout::Container, Handout::Devices],
            Self::Group(_) => &[Handout::Container, Handout::Group],
            Self::Device(_) => &[Handout::Devices],
            Self::Lease => {
                &[Handout::Container, Handout::Group, Handout::Devices, Handout::Iommufd]
            }
        }
    }
}

/// One argument: text, with placeholders in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Argument(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(Vec<u8>),
    File(Placeholder),
}

/// The arguments of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments(Vec<Argument>);

impl Arguments {
    /// Reads them. A placeholder is a word of small letters in braces, with or without a colon and
    /// more; in doubled braces it is the text itself, and so is one after a `$`, as shells have
    /// them. All other braces are text too.
    ///
    /// # Errors
    /// [`Error::NoPlaceholder`].
    pub fn read(arguments: &[OsString]) -> Result<Self> {
        let each = arguments.iter().map(|argument| Argument::read(argument.as_bytes()));
        Ok(Self(each.collect::<Result<_>>()?))
    }

    /// The placeholders, in their order.
    pub fn placeholders(&self) -> impl Iterator<Item = &Placeholder> {
        self.0.iter().flat_map(|argument| &argument.0).filter_map(|part| match part {
            Part::File(placeholder) => Some(placeholder),
            Part::Text(_) => None,
        })
    }

    /// The handouts that have a file for each placeholder.
    pub fn handouts(&self) -> Vec<Handout> {
        let mut left = Placeholder::Lease.handouts().to_vec();
        for placeholder in self.placeholders() {
            left.retain(|handout| placeholder.handouts().contains(handout));
        }
        left
    }

    /// A placeholder that this handout has no file for.
    pub fn without_file(&self, handout: Handout) -> Option<&Placeholder> {
        self.placeholders().find(|placeholder| !placeholder.handouts().contains(&handout))
    }

    /// Whether each placeholder names one of the devices that are asked for.
    ///
    /// # Errors
    /// [`Error::NamesNothing`], [`Error::Ambiguous`].
    pub fn check(&self, devices: &[String]) -> Result<()> {
        let mut named = self.placeholders().filter(|placeholder| placeholder.device().is_some());
        named.try_for_each(|placeholder| position(placeholder, devices).map(drop))
    }

    /// The arguments with numbers in them.
    ///
    /// # Errors
    /// Those of `number`.
    pub fn fill(&self, number: impl Fn(&Placeholder) -> Result<RawFd>) -> Result<Vec<OsString>> {
        let fill = |argument: &Argument| {
            let mut text = Vec::new();
            for part in &argument.0 {
                match part {
                    Part::Text(bytes) => text.extend_from_slice(bytes),
                    Part::File(file) => {
                        text.extend_from_slice(number(file)?.to_string().as_bytes())
                    }
                }
            }
            Ok(OsString::from_vec(text))
        };
        self.0.iter().map(fill).collect()
    }
}

/// Which of the devices that are asked for a placeholder names.
///
/// # Errors
/// [`Error::NamesNothing`], [`Error::Ambiguous`].
pub(super) fn position(placeholder: &Placeholder, devices: &[String]) -> Result<usize> {
    let wanted = placeholder.device().unwrap_or_default();
    let mut found = devices.iter().enumerate().filter(|(_, device)| same(device, wanted));
    let nothing =
        || Error::NamesNothing { placeholder: placeholder.to_string(), devices: devices.to_vec() };
    let (at, _) = found.next().ok_or_else(nothing)?;
    match found.next() {
        None => Ok(at),
        Some(_) => Err(Error::Ambiguous {
            placeholder: placeholder.to_string(),
            device: wanted.to_owned(),
        }),
    }
}

/// Whether two texts name a device in the same way; `65:00.0` is in domain 0.
fn same(one: &str, other: &str) -> bool {
    match (Bdf::typed(one), Bdf::typed(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => one.eq_ignore_ascii_case(other),
    }
}

impl Argument {
    fn read(mut rest: &[u8]) -> Result<Self> {
        let (mut parts, mut text) = (Vec::new(), Vec::new());
        while let Some((&byte, after)) = rest.split_first() {
            let after_dollar = text.last() == Some(&b'$');
            if let Some(inside) = after.strip_prefix(b"{").and_then(braced).filter(|_| byte == b'{')
                && after.get(inside.len() + 2) == Some(&b'}')
            {
                text.extend_from_slice(format!("{{{inside}}}").as_bytes());
                rest = after.get(inside.len() + 3..).unwrap_or_default();
                continue;
            }
            match braced(after).filter(|_| byte == b'{' && !after_dollar) {
                Some(inside) => {
                    let none = || Error::NoPlaceholder { name: inside.to_owned() };
                    let placeholder = Placeholder::read(inside).ok_or_else(none)?;
                    parts.push(Part::Text(std::mem::take(&mut text)));
                    parts.push(Part::File(placeholder));
                    rest = after.get(inside.len() + 1..).unwrap_or_default();
                }
                None => {
                    text.push(byte);
                    rest = after;
                }
            }
        }
        parts.push(Part::Text(text));
        Ok(Self(parts))
    }
}

/// What has the form of a placeholder and a closing brace after it.
fn braced(text: &[u8]) -> Option<&str> {
    let end = text.iter().position(|byte| *byte == b'}')?;
    let inside = std::str::from_utf8(text.get(..end)?).ok()?;
    let (word, rest) = inside.split_once(':').unwrap_or((inside, ""));
    let good = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
    let plain = rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":.-".contains(&byte));
    (good && plain).then_some(inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Arguments> {
        Arguments::read(&[text.into()])
    }

    /// The argument with a number for each placeholder: 3 for the first, and so on.
    fn filled(text: &str) -> String {
        let arguments = read(text).unwrap();
        let all: Vec<_> = arguments.placeholders().cloned().collect();
        let number =
            |file: &Placeholder| Ok(3 + all.iter().position(|each| each == file).unwrap() as RawFd);
        arguments.fill(number).unwrap().remove(0).into_string().unwrap()
    }

    #[test]
    fn placeholders_become_numbers() {
        assert_eq!(filled("{iommufd}"), "3");
        assert_eq!(filled("iommufd,id=i,fd={iommufd}"), "iommufd,id=i,fd=3");
        assert_eq!(filled("{cdev:0000:65:00.0},{lease},{cdev:0000:65:00.0}"), "3,4,3");
        assert_eq!(
            filled(r#"{"driver":"vfio-pci","fd":"{cdev:65:00.0}"}"#),
            r#"{"driver":"vfio-pci","fd":"3"}"#
        );
        assert_eq!(filled("{group:8086:10d3}{device:vf:0000:3b:00.0}{container}"), "345");
    }

    #[test]
    fn other_braces_stay() {
        for text in [
            "",
            "{",
            "}",
            "{}",
            "{{}}",
            "{ lease }",
            "{Lease}",
            "${lease}",
            "${x}",
            "{\"a\":{\"b\":1}}",
            "{lease",
            "lease}",
            "{cdev:0000:65:00.0",
            "{1}",
            "{a b}",
            "{x,y}",
        ] {
            assert_eq!(filled(text), text);
        }
        for (text, means) in [
            ("{{lease}}", "{lease}"),
            ("{{anything}}", "{anything}"),
            ("{{cdev:65:00.0}}{lease}", "{cdev:65:00.0}3"),
            ("{{{lease}}}", "{{lease}}"),
            ("{{lease}", "{3"),
        ] {
            assert_eq!(filled(text), means, "{text}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_stay() {
        let odd = OsString::from_vec(b"\xff{lease}\xfe{\xff}".to_vec());
        let filled = Arguments::read(&[odd]).unwrap().fill(|_| Ok(7)).unwrap();
        assert_eq!(filled, [OsString::from_vec(b"\xff7\xfe{\xff}".to_vec())]);
    }

    #[test]
    fn what_looks_like_a_placeholder_must_be_one() {
        for (text, name) in [
            ("{iomufd}", "iomufd"),
            ("fd={cdev}", "cdev"),
            ("{lease:x}", "lease:x"),
            ("{x:}", "x:"),
        ] {
            let error = read(text).unwrap_err();
            assert!(matches!(&error, Error::NoPlaceholder { name: n } if n == name), "{error}");
            let way_out = format!("{{{{{name}}}}}");
            assert!(error.to_string().ends_with(&way_out), "{error}");
            assert_eq!(filled(&way_out), format!("{{{name}}}"));
        }
    }

    #[test]
    fn a_placeholder_names_a_device_that_is_asked_for() {
        let asked =
            ["0000:65:00.0".to_owned(), "8086:10d3".into(), "8086:1".into(), "8086:1".into()];
        let check = |text: &str| read(text).unwrap().check(&asked);
        for good in ["{cdev:65:00.0}", "{group:0000:65:00.0}", "{device:8086:10D3}", "{lease}"] {
            check(good).unwrap();
        }
        for bad in ["{cdev:65:00.1}", "{group:8086:10d4}"] {
            assert!(matches!(check(bad), Err(Error::NamesNothing { .. })), "{bad}");
        }
        assert!(matches!(check("{cdev:8086:1}"), Err(Error::Ambiguous { .. })));
    }

    #[test]
    fn placeholders_say_which_handouts_they_go_with() {
        use Handout::{Container, Devices, Group, Iommufd};
        for (text, handouts) in [
            ("x", &[Container, Group, Devices, Iommufd][..]),
            ("{lease}", &[Container, Group, Devices, Iommufd]),
            ("{iommufd}{cdev:65:00.0}", &[Iommufd]),
            ("{group:65:00.0}", &[Container, Group]),
            ("{group:65:00.0}{container}", &[Container]),
            ("{device:65:00.0}", &[Devices]),
            ("{iommufd}{container}", &[]),
        ] {
            assert_eq!(read(text).unwrap().handouts(), handouts, "{text}");
        }
        let arguments = read("{lease}{group:65:00.0}").unwrap();
        assert_eq!(arguments.without_file(Devices).unwrap().to_string(), "{group:65:00.0}");
        assert_eq!(arguments.without_file(Group), None);
    }
}
