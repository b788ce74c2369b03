//! `vfio-broker exec`: gets devices and becomes a program that has their open files.

use super::exec_memlock::{self, Memlock};
use super::style::{complain, printable};
use super::{Context, Failure};
use crate::client::{Acquire, Client, Lease};
use crate::protocol::{Backend, Device, Handout};
use crate::sys::slots::{self, Slots};
use crate::vmm::interpose::Interposed;
use crate::vmm::{self, Arguments, Cdevs, Grants, InheritedFds, Placeholder};
use nix::errno::Errno;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// Get devices and run a program that has their open files
///
/// The program inherits the open files as numbers from 3 on. In its arguments {iommufd},
/// {cdev:DEVICE}, {container}, {group:DEVICE}, {device:DEVICE} and {lease} become those numbers, and
/// LISTEN_FDS, LISTEN_FDNAMES and LISTEN_PID in its environment say the same. A program whose
/// arguments name none of them is given the open files when it opens /dev/vfio/N, /dev/vfio/vfio,
/// /dev/iommu or /dev/vfio/devices/vfioN by itself. The lease lives exactly as long as the program
/// does.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(super) struct Args {
    /// What lists call the holder
    #[arg(long, value_name = "NAME")]
    vm: String,
    /// A device: 65:00.0 or 0000:65:00.0, VENDOR:DEVICE for any free one of that kind, vf:BDF for any
    /// free VF of that device; may come several times
    #[arg(long = "device", value_name = "DEVICE", required = true)]
    devices: Vec<String>,
    /// A function of the same groups that nobody is to use meanwhile; may come several times
    #[arg(long, value_name = "DEVICE")]
    withhold: Vec<String>,
    /// Through which interface of the kernel [default: what the arguments name, or the policy's
    /// first]
    #[arg(long, value_name = "BACKEND")]
    backend: Option<Backend>,
    /// In which form the open files are given [default: what the arguments name, or the policy's
    /// first]
    #[arg(long, value_name = "FORM")]
    handout: Option<Handout>,
    /// Join this shared container of the policy
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// Have the limit of memory that the program may lock (RLIMIT_MEMLOCK) raised, up to what the
    /// policy allows: to so much (4G, 512MiB), or to what the guest's memory needs by the program's
    /// arguments
    #[arg(long, value_name = "auto|SIZE")]
    memlock: Option<Memlock>,
    /// Give the program the lease's open files when it opens VFIO's nodes by itself [default: where
    /// the arguments name no open file]
    #[arg(long, conflicts_with = "inherit")]
    interpose: bool,
    /// Give the program the lease's open files as numbers, also where the arguments name none of
    /// them: it looks at LISTEN_FDS
    #[arg(long)]
    inherit: bool,
    /// An open file of the caller's own that the program is to inherit too, such as a tap device's;
    /// all others above 2 are closed; may come several times
    #[arg(long, value_name = "NUMBER")]
    keep_fd: Vec<RawFd>,
    /// The program and its arguments
    #[arg(value_name = "PROGRAM", required = true, last = true)]
    #[arg(value_hint = clap::ValueHint::CommandWithArguments)]
    program: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  vfio-broker exec --vm web1 --device 65:00.0 --memlock auto -- \\
      qemu-system-x86_64 -machine q35 -m 4G \\
      -object 'iommufd,id=iommufd0,fd={iommufd}' \\
      -device 'vfio-pci,id=nic,iommufd=iommufd0,fd={cdev:65:00.0}'
  vfio-broker exec --vm web1 --device 65:00.0 --memlock auto --handout container -- \\
      qemu-system-x86_64 -m 4G -device vfio-pci,id=nic,host=0000:65:00.0";

const EXIT_CODES: &str = "\
Exit codes: the program's own; 127 there is no such program; 126 it can't be executed; and where it \
was not started, those of vfio-broker.";

pub(super) fn run(context: &Context, mut args: Args) -> Result<ExitCode, Failure> {
    let program = args.program.remove(0);
    let arguments = Arguments::read(&args.program)?;
    arguments.check(&args.devices)?;
    let interposed = args.interposed(&arguments)?;
    let request = args.request(&arguments)?;
    let path = vmm::find(&program)?;
    let memlock = args.memlock.map(|memlock| memlock.wanted(&path, &args.program)).transpose()?;

    // A container or an iommufd, and the lease fd.
    let most = args.devices.len() + 2;
    let mut slots = Slots::reserve(most, &args.keep_fd).map_err(vmm::Error::from)?;
    let mut broker = context.connect()?;
    let lease = broker.acquire(request);
    let lease = lease.map_err(|error| Failure::from(error).about(&args.devices))?;

    match memlock {
        Some(wanted) => wanted.raise(&mut broker, &lease)?,
        None if lease.handout() == Handout::Devices => {}
        None => exec_memlock::warn(&path, &args.program),
    }
    for (what, advice) in slips(&args.program, !interposed) {
        complain(&format!("vfio-broker: {}\n  -> {advice}\n", printable(&what)));
    }
    let inherited =
        if interposed { InheritedFds::lifeline(&lease) } else { InheritedFds::all(&lease) };
    let groups = groups(&mut broker, &lease, &arguments)?;
    let cdevs = if interposed { cdevs(&mut broker, &lease)? } else { Cdevs::new() };
    drop(broker);
    let filled = arguments.fill(|file| inherited.number(file, &args.devices, &groups))?;
    let mut command = Command::new(&program);
    command.args(filled);
    command
        .env("LISTEN_FDS", inherited.count().to_string())
        .env("LISTEN_FDNAMES", inherited.names());
    slots.fill(inherited.fds()).map_err(vmm::Error::from)?;
    if interposed {
        // The supervisor does not stay in this directory.
        let broker = std::path::absolute(&context.socket)?;
        let log = |text: &str| complain(&format!("vfio-broker: {}\n", printable(text)));
        let answers = Box::new(Grants::new(broker, lease, cdevs)?);
        let ended = Interposed { command, slots, answers, log }.run()?;
        return Ok(ended.as_own());
    }
    // What is close-on-exec goes with this program: our own copies of the files.
    let error = command.env("LISTEN_PID", std::process::id().to_string()).exec();
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::ENOEXEC));
    Err(vmm::Error::Program { program: program.into(), errno }.into())
}

/// What QEMU would fail at without a word that helps, with what to do about it; `by_number`: it is given
/// open files by number alone.
fn slips(arguments: &[OsString], by_number: bool) -> Vec<(String, &'static str)> {
    let values = |option: &'static str, kinds: &'static [&'static str]| {
        let pairs = arguments.iter().zip(arguments.iter().skip(1));
        let those = pairs.filter(move |(name, _)| {
            // Both -device and --device are QEMU's.
            name.to_str()
                .is_some_and(|name| name == option || name.strip_prefix('-') == Some(option))
        });
        let texts = those.filter_map(|(_, value)| value.to_str());
        texts.filter(move |value| value.split(',').next().is_some_and(|kind| kinds.contains(&kind)))
    };
    let has = |value: &str, start: &str| value.split(',').any(|part| part.starts_with(start));
    let (devices, objects) = (
        values("-device", &["vfio-pci", "driver=vfio-pci"]),
        values("-object", &["iommufd", "qom-type=iommufd"]),
    );
    let mut slips = Vec::new();
    for device in devices {
        let mut slip = |why: &str, advice| slips.push((format!("-device {device} {why}"), advice));
        if has(device, "fd=") && !has(device, "id=") {
            slip("has no id=, and QEMU 11.1 crashes on that", "give it one: id=NAME");
        }
        if has(device, "fd=") && !has(device, "iommufd=") {
            let advice = "add -object iommufd,id=iommufd0,fd={iommufd}, and iommufd=iommufd0 there";
            slip("has an open file and no iommufd, which it goes together with", advice);
        }
        if has(device, "fd={iommufd}") {
            slip("has the iommufd's file in its device's place", "it is fd={cdev:DEVICE} there");
        }
        if by_number && has(device, "host=") {
            let why = "opens its device by itself, and gets no file: with an open file's number in the \
                       arguments, opens are not answered";
            slip(why, "name all by number, as fd={cdev:DEVICE}, or none");
        }
    }
    for object in objects.filter(|_| by_number) {
        let mut slip = |why: &str, advice| slips.push((format!("-object {object} {why}"), advice));
        if !has(object, "fd=") {
            let why = "opens /dev/iommu by itself, and gets no file: with an open file's number in the \
                       arguments, opens are not answered";
            slip(why, "give it one: fd={iommufd}");
        }
        if has(object, "fd={cdev:") {
            slip("has a device's file in the iommufd's place", "it is fd={iommufd} there");
        }
    }
    slips
}

impl Args {
    /// What to ask for: what the options say, and else what the arguments need.
    fn request(&self, arguments: &Arguments) -> Result<Acquire, Failure> {
        let mut request = Acquire::new(&*self.vm);
        for device in &self.devices {
            request = request.device(device);
        }
        for device in &self.withhold {
            request = request.withhold(device);
        }
        if let Some(name) = &self.container {
            request = request.container(name);
        }
        if let Some(backend) = self.backend {
            request = request.backend(backend);
        }
        if let Some(handout) = self.handout(arguments)? {
            request = request.handout(handout);
        }
        Ok(request)
    }

    /// Whether the program is to be given files as it opens them.
    fn interposed(&self, arguments: &Arguments) -> Result<bool, Failure> {
        let mut named = arguments.placeholders().filter(|file| **file != Placeholder::Lease);
        match named.next() {
            Some(file) if self.interpose => Err(Failure::new(format!(
                "{file} can't be given by number and be left to be opened at the same time"
            ))
            .advise("leave out --interpose, or what the arguments name beside {lease}")
            .code(2)),
            Some(_) => Ok(false),
            None => Ok(!self.inherit),
        }
    }

    fn handout(&self, arguments: &Arguments) -> Result<Option<Handout>, Failure> {
        if let Some(handout) = self.handout {
            if let Some(placeholder) = arguments.without_file(handout) {
                return Err(not_in(placeholder, handout));
            }
            return Ok(Some(handout));
        }
        let named = arguments.placeholders().any(|file| *file != Placeholder::Lease);
        let possible = arguments.handouts();
        let of_backend = |handout: &Handout| match self.backend {
            Some(backend) => handout.backend() == backend,
            None => true,
        };
        let mut possible = possible.into_iter().filter(of_backend);
        match possible.next() {
            None => Err(Failure::new("no handout has an open file for each of these placeholders")
                .detail(list(arguments))
                .advise("name files of one backend: see `vfio-broker exec --help`")
                .code(2)),
            // A group alone is in two handouts: the policy decides. In a shared container there is
            // but one.
            Some(_) if !named || self.container.is_some() => Ok(None),
            Some(Handout::Container) if possible.next() == Some(Handout::Group) => Ok(None),
            Some(handout) => Ok(Some(handout)),
        }
    }
}

fn list(arguments: &Arguments) -> String {
    arguments.placeholders().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn not_in(placeholder: &Placeholder, handout: Handout) -> Failure {
    let handout = format!("{handout:?}").to_lowercase();
    let error = vmm::Error::NotInLease { placeholder: placeholder.to_string(), handout };
    Failure::from(error).advise("leave out --handout, or name another one").code(2)
}

/// The groups of the host, where the arguments name a group and the lease has several.
fn groups(
    broker: &mut Client,
    lease: &Lease,
    arguments: &Arguments,
) -> Result<Vec<crate::protocol::Group>, Failure> {
    use crate::protocol::FdKind::Group;
    let several = lease.files().iter().filter(|file| file.kind == Group).count() > 1;
    let named = arguments.placeholders().any(|file| matches!(file, Placeholder::Group(_)));
    Ok(if several && named { broker.topology()? } else { Vec::new() })
}

/// The nodes by which the program would open the lease's devices, as the broker knows them; they are
/// in the host's sysfs too, but not in that of a simulated kernel.
fn cdevs(broker: &mut Client, lease: &Lease) -> Result<Cdevs, Failure> {
    if lease.handout() != Handout::Iommufd {
        return Ok(Cdevs::new());
    }
    let groups = broker.topology()?;
    let devices = groups.into_iter().flat_map(|group| group.devices);
    let number = |node: &str| node.strip_prefix("/dev/vfio/devices/vfio")?.parse().ok();
    let cdev = |device: Device| Some((number(&device.cdev?)?, device.bdf));
    let cdevs = devices.filter(|device| lease.devices().contains(&device.bdf)).filter_map(cdev);
    Ok(cdevs.collect())
}

impl From<vmm::Error> for Failure {
    fn from(error: vmm::Error) -> Self {
        let code = match &error {
            vmm::Error::Program { errno: Errno::ENOENT, .. } => 127,
            vmm::Error::Program { .. } => 126,
            vmm::Error::NoPlaceholder { .. }
            | vmm::Error::NamesNothing { .. }
            | vmm::Error::Ambiguous { .. }
            | vmm::Error::Slots(slots::Error::KeepFd { .. }) => 2,
            _ => 1,
        };
        Failure::new(error.to_string()).code(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_pen_are_found_before_qemu_stumbles() {
        let found = |option: &str, value: &str, by_number: bool| {
            let arguments: Vec<OsString> = ["-m", "4G", option, value].map(Into::into).into();
            slips(&arguments, by_number).into_iter().map(|(what, _)| what).collect::<Vec<_>>()
        };
        let is = |option: &str, value: &str, by_number: bool, word: &str| {
            let found = found(option, value, by_number);
            assert!(found.len() == 1 && found[0].contains(word), "{value}: {found:?}");
        };
        is("-device", "vfio-pci,iommufd=iommufd0,fd={cdev:65:00.0}", true, "has no id=");
        is("--device", "vfio-pci,id=n,fd={cdev:65:00.0}", true, "no iommufd");
        is("-device", "vfio-pci,id=n,iommufd=i,fd={iommufd}", true, "in its device's place");
        is("-device", "vfio-pci,host=0000:65:00.0", true, "by itself");
        is("-object", "iommufd,id=iommufd0", true, "by itself");
        is("-object", "iommufd,id=iommufd0,fd={cdev:65:00.0}", true, "in the iommufd's place");
        for (option, value, by_number) in [
            ("-device", "vfio-pci,id=nic,iommufd=iommufd0,fd={cdev:65:00.0}", true),
            ("-device", "vfio-pci,host=0000:65:00.0", false),
            ("-object", "iommufd,id=iommufd0,fd={iommufd}", true),
            ("-object", "iommufd,id=iommufd0", false),
            ("-device", "virtio-net-pci,fd=3", true),
        ] {
            assert_eq!(found(option, value, by_number), [""; 0], "{value}");
        }
    }
}
