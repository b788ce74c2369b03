//! How much memory a program may have to lock, as far as its arguments tell.

use std::ffi::OsString;
use std::path::Path;

/// Firmware, video memory and ROMs, which are mapped for devices like the guest's memory.
const BESIDE: u64 = 256 << 20;

/// What a program needs, and where that is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// The guest's memory, with what can be plugged in later.
    pub guest: u64,
    /// The argument that says so.
    pub said: String,
}

impl Need {
    /// The limit that is enough for it.
    pub fn bytes(&self) -> u64 {
        self.guest.saturating_add(BESIDE)
    }

    /// How that was computed.
    pub fn explained(&self) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        format!(
            "{} MiB: {} MiB of {}, and {} MiB for firmware, video memory and ROMs",
            mib(self.bytes()),
            mib(self.guest),
            self.said,
            mib(BESIDE)
        )
    }
}

/// What the arguments of QEMU (`-m`) and cloud-hypervisor (`--memory`) say of the guest's memory;
/// `None` for a program that is neither, and where they say it in another way.
pub fn guest_memory(program: &Path, arguments: &[OsString]) -> Option<Need> {
    let name = program.file_name()?.to_str()?;
    let qemu = name.starts_with("qemu-system-") || ["qemu", "qemu-kvm", "kvm"].contains(&name);
    let options: &[&str] = if qemu { &["-m", "--m"] } else { &["--memory"] };
    if !qemu && name != "cloud-hypervisor" {
        return None;
    }
    let text: Vec<_> = arguments.iter().filter_map(|argument| argument.to_str()).collect();
    let at = text.iter().rposition(|argument| options.contains(argument));
    // Said in another way: as an object's size, or in a file.
    let elsewhere = |argument: &&str| {
        argument.contains("memory-backend=") || argument.trim_start_matches('-') == "readconfig"
    };
    match at {
        None if qemu && text.iter().any(elsewhere) => None,
        // QEMU's own default.
        None if qemu => Some(Need { guest: 128 << 20, said: "QEMU without -m".into() }),
        None => None,
        Some(at) => {
            let value = text.get(at + 1)?;
            let unit = if qemu { 20 } else { 0 };
            let guest = if qemu { of_qemu(value, unit)? } else { of_cloud_hypervisor(value)? };
            Some(Need { guest, said: format!("{} {value}", text.get(at)?) })
        }
    }
}

/// `512`, `4G`, `size=4G,slots=2,maxmem=16G`.
fn of_qemu(value: &str, unit: u32) -> Option<u64> {
    let mut most = None;
    for (at, part) in value.split(',').enumerate() {
        let size = match part.split_once('=') {
            Some(("size" | "maxmem", size)) => size,
            None if at == 0 => part,
            Some(_) => continue,
            None => return None,
        };
        most = most.max(Some(size_of(size, unit)?));
    }
    most
}

/// `size=4G,hotplug_size=8G`; where the memory is described by zones this says nothing.
fn of_cloud_hypervisor(value: &str) -> Option<u64> {
    let mut sum: u64 = 0;
    for part in value.split(',') {
        if let Some(("size" | "hotplug_size", size)) = part.split_once('=') {
            sum = sum.checked_add(size_of(size, 0)?)?;
        }
    }
    (sum > 0).then_some(sum)
}

/// A size: digits, and K, M, G or T, with or without `iB`; without a letter in units of `1 << unit`. There
/// may be a fraction of such a unit, of which whole bytes are taken.
pub fn size_of(text: &str, unit: u32) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (count, rest) = text.split_at_checked(digits)?;
    let (tenths, suffix) = match rest.strip_prefix('.') {
        Some(rest) => {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            rest.split_at_checked(digits)?
        }
        None => ("", rest),
    };
    if rest.starts_with('.') && (tenths.is_empty() || tenths.len() > 6) {
        return None;
    }
    let shift = match suffix.trim_start() {
        "" => unit,
        "B" | "b" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return None,
    };
    let whole = count.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if tenths.is_empty() {
        return Some(whole);
    }
    let parts = tenths.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    whole.checked_add(parts / 10_u64.pow(tenths.len() as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mib(program: &str, arguments: &[&str]) -> Option<u64> {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        guest_memory(program.as_ref(), &arguments).map(|need| need.guest >> 20)
    }

    #[test]
    fn the_guests_memory_is_read_from_the_arguments() {
        let qemu = "/usr/bin/qemu-system-x86_64";
        for (arguments, expected) in [
            (&[][..], Some(128)),
            (&["-m", "512"], Some(512)),
            (&["-m", "4G"], Some(4096)),
            (&["-m", "1024", "-m", "size=2G"], Some(2048)),
            (&["-m", "size=2G,slots=2,maxmem=8G"], Some(8192)),
            (&["-m", "1G,slots=2,maxmem=4096M"], Some(4096)),
            (&["-m"], None),
            (&["-m", "lots"], None),
            (&["-m", "99999999999999T"], None),
            (&["-m", "1.5G"], Some(1536)),
            (&["-machine", "q35,memory-backend=m"], None),
            (&["-readconfig", "vm.cfg"], None),
        ] {
            assert_eq!(mib(qemu, arguments), expected, "{arguments:?}");
        }
        for qemu in ["qemu", "/usr/libexec/qemu-kvm", "kvm"] {
            assert_eq!(mib(qemu, &["-m", "512"]), Some(512), "{qemu}");
        }
        let ch = "cloud-hypervisor";
        assert_eq!(mib(ch, &["--memory", "size=1024M,shared=on"]), Some(1024));
        assert_eq!(mib(ch, &["--memory", "size=1G,hotplug_size=3G"]), Some(4096));
        assert_eq!(mib(ch, &["--memory", "size=0"]), None);
        assert_eq!(mib(ch, &[]), None);
        assert_eq!(mib("crosvm", &["-m", "512"]), None);
    }

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        for (text, bytes) in [
            ("4096", Some(4096)),
            ("1K", Some(1024)),
            ("2 GiB", Some(2 << 30)),
            ("1TiB", Some(1 << 40)),
            ("1.5G", Some(3 << 29)),
        ] {
            assert_eq!(size_of(text, 0), bytes, "{text}");
        }
        for text in ["", "G", "1P", "-1", "1.G", "1.5.5G", "16777216T"] {
            assert_eq!(size_of(text, 0), None, "{text}");
        }
    }

    #[test]
    fn it_says_how_it_was_computed() {
        let need = guest_memory("qemu-system-x86_64".as_ref(), &["-m".into(), "512".into()]);
        let explained = need.unwrap().explained();
        assert!(explained.starts_with("768 MiB: 512 MiB of -m 512, and 256 MiB"), "{explained}");
    }
}
