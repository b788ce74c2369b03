//! A holder that leaves an open file of its lease with somebody else before it ends.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use std::error::Error;
use std::io::{BufRead, BufReader, stdin};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use vfio_broker::client::{Acquire, Client, Lease};
use vfio_broker::kernel::{Device, Linux, Mapped};
use vfio_broker::protocol::{Backend, FdKind, Handout};
use vfio_broker::sys::fdpass;

type Done = Result<(), Box<dyn Error>>;

/// Gets a device, and leaves one of the lease's files, `what`, with a process or in a socket's queue, `at`.
pub fn leaves(bdf: &str, what: &str, at: &str) -> Done {
    let lease = acquire(bdf, what)?;
    let file = match what {
        "group" => lease.copy(FdKind::Group, None)?,
        "device" | "mapping" => lease.copy(FdKind::Device, Some(bdf))?,
        "cdev" => lease.copy(FdKind::Cdev, Some(bdf))?,
        "bound cdev" => {
            lease.cdev(bdf)?.bind_iommufd(&lease.iommufd()?)?;
            lease.copy(FdKind::Cdev, Some(bdf))?
        }
        "iommufd" => {
            let (iommufd, device) = (lease.iommufd()?, lease.cdev(bdf)?);
            device.bind_iommufd(&iommufd)?;
            device.attach_iommufd_pt(iommufd.ioas_alloc()?)?;
            lease.copy(FdKind::Iommufd, None)?
        }
        _ => panic!("no such file: {what}"),
    };
    let keeper = match (what, at) {
        ("mapping", _) => with_a_mapping(file)?,
        (_, "process") => with_a_process(file)?,
        (_, "queue") => in_a_queue(&file)?,
        _ => panic!("no such place: {at}"),
    };
    println!("kept by {keeper}");
    super::role::wait();
    Ok(())
}

fn acquire(bdf: &str, what: &str) -> Result<Lease, Box<dyn Error>> {
    let order = Acquire::new("former").device(bdf);
    let order = match what {
        "group" => order.handout(Handout::Container),
        "device" | "mapping" => order.handout(Handout::Devices),
        _ => order.backend(Backend::Iommufd),
    };
    Ok(Client::connect()?.acquire(order)?)
}

fn with_a_process(file: OwnedFd) -> Result<u32, std::io::Error> {
    Ok(Command::new("sleep").arg("600").stdin(file).stdout(Stdio::null()).spawn()?.id())
}

/// In flight: the process has both ends of a socket, and reads neither.
fn in_a_queue(file: &OwnedFd) -> Result<u32, Box<dyn Error>> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (from, to) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    fdpass::send(from.as_fd(), b"x", &[file.as_fd()], MsgFlags::empty())?;
    Ok(Command::new("sleep").arg("600").stdin(from).stdout(to).spawn()?.id())
}

/// This program again, in a role of its own.
fn with_a_mapping(device: OwnedFd) -> Result<u32, std::io::Error> {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([super::role::FLAG, super::role::Role::Mapping.name()])
        .stdin(device)
        .stdout(Stdio::piped());
    let mut process = command.spawn()?;
    // Until it has mapped the device, that is in no mapping.
    let said = process.stdout.take().map(BufReader::new).and_then(|it| it.lines().next());
    assert!(matches!(said, Some(Ok(line)) if line == "mapped"));
    Ok(process.id())
}

/// Maps the first region of the device that is its standard input, and keeps nothing but that.
pub fn maps() -> Done {
    let device =
        Device::from_fd(Arc::new(Linux), "standard input", stdin().as_fd().try_clone_to_owned()?);
    let region = device.region(0)?;
    let mapped = Mapped::file(device.as_fd(), region.offset, region.size as usize, false)?;
    drop(device);
    nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    println!("mapped");
    std::thread::sleep(std::time::Duration::from_secs(600));
    drop(mapped);
    Ok(())
}
