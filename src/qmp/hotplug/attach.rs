//! A device into a running QEMU.

use super::check::{arguments, check};
use super::detach::{Unplugged, unplug};
use super::state::{
    OURS, Record, State, close, delete, device_name, full_name, iommufd_name, is_id, lease_name,
    record_name,
};
use super::{Error, Result};
use crate::client::{self, Acquire, Client, Files, Lease};
use crate::protocol::{self, Backend, FdKind};
use crate::qmp::{self, Monitor};
use serde_json::{Map, Value, json};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// What is to be attached.
#[derive(Clone, Debug, Default)]
pub struct Attach {
    vm: String,
    device: String,
    withhold: Vec<String>,
    id: Option<String>,
    bus: Option<String>,
    iommufd: Option<String>,
    properties: Vec<(String, String)>,
}

impl Attach {
    /// A device, named as in [`Acquire::device`], for a VM of that name.
    pub fn new(vm: impl Into<String>, device: impl Into<String>) -> Self {
        Self { vm: vm.into(), device: device.into(), ..Self::default() }
    }

    /// Names a function of the device's group that nobody is to use meanwhile.
    #[must_use]
    pub fn withhold(mut self, device: impl Into<String>) -> Self {
        self.withhold.push(device.into());
        self
    }

    /// What QEMU is to call it: else `vfio-` and its address.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Where to plug it in: a `pcie-root-port`'s id, on a machine of type q35.
    #[must_use]
    pub fn bus(mut self, bus: impl Into<String>) -> Self {
        self.bus = Some(bus.into());
        self
    }

    /// An iommufd object that QEMU was started with, for the device to share. Else attached devices
    /// share one of their own.
    #[must_use]
    pub fn iommufd(mut self, id: impl Into<String>) -> Self {
        self.iommufd = Some(id.into());
        self
    }

    /// A further property of QEMU's vfio-pci.
    #[must_use]
    pub fn property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.push((name.into(), value.into()));
        self
    }
}

/// A device that is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its address, or UUID.
    pub device: String,
    /// What QEMU calls it.
    pub id: String,
    /// The lease's public name.
    pub lease: String,
}

/// Gets a device from the broker and plugs it into a running QEMU. The lease then lives until QEMU
/// ends or the device is detached, whatever becomes of the caller.
///
/// What fails half way is undone; should QEMU no longer answer, the error is [`Error::Left`], and the
/// next attach or detach on the same monitor clears what is left.
///
/// # Errors
/// See [`Error`].
pub fn attach(qemu: &mut Monitor, broker: &mut Client, request: &Attach) -> Result<Attached> {
    let types = check(qemu)?;
    let properties = arguments(&request.properties, &types)?;
    let mut state = State::ask(qemu)?;
    refuse(request, &state)?;
    state.clear(qemu, broker)?;
    let given = acquire(broker, request, &state)?;
    let joined = state.records.values().any(|record| record.lease == given.lease);
    let (name, key) = (given.lease.clone(), given.key.clone());
    let mut plug = Plug { qemu, request, state: &state, done: Vec::new(), plugged: false };
    let result = plug.run(given, properties);
    result.map_err(|error| {
        let error = plug.undo(error);
        // What the broker can't be told now it sees by itself once the lease fds are closed. A lease
        // that others share goes on, and so does that of a device that QEMU may still plug in.
        if !joined && !plug.plugged {
            let _ = broker.release_of(&name, &key);
        }
        error
    })
}

/// Finds out what can't be done before anything is touched.
fn refuse(request: &Attach, state: &State) -> Result<()> {
    if let Some(id) = &request.id {
        if !is_id(id) {
            let why = "letters, digits, '-', '.' and '_', beginning with a letter";
            return Err(Error::bad(format!("id {id:?}"), why));
        }
        if state.devices.contains(id) {
            return Err(Error::bad(format!("id {id:?}"), "QEMU has a device of that name"));
        }
    }
    if let Some(iommufd) = &request.iommufd
        && state.objects.get(iommufd).is_none_or(|kind| kind != "iommufd")
    {
        return Err(Error::bad(format!("iommufd {iommufd:?}"), "QEMU has no such iommufd object"));
    }
    let device = full_name(&request.device);
    match state.attached().find(|(_, record)| record.device == device) {
        Some((id, _)) => Err(Error::AlreadyThere { device, id: id.clone() }),
        None => Ok(()),
    }
}

/// What the broker gave: the device, and the lease that it is in.
struct LeasedFiles {
    lease: String,
    key: String,
    lifeline: OwnedFd,
    files: Files,
}

impl From<Lease> for LeasedFiles {
    fn from(lease: Lease) -> Self {
        let (name, key) = (lease.id().to_owned(), lease.key().to_owned());
        let (lifeline, files) = lease.into_parts();
        Self { lease: name, key, lifeline, files }
    }
}

/// A lease for the device. Where a device of the same group is in this QEMU, its lease is the only
/// one that can have it: then it joins that lease.
fn acquire(broker: &mut Client, request: &Attach, state: &State) -> Result<LeasedFiles> {
    let wanted = || {
        let wanted = Acquire::new(&request.vm).device(&request.device).backend(Backend::Iommufd);
        request.withhold.iter().fold(wanted, |wanted, device| wanted.withhold(device))
    };
    let busy = match broker.acquire(wanted()) {
        Ok(lease) => return Ok(lease.into()),
        Err(error) => error,
    };
    let client::Error::Broker { error: protocol::Error::Busy { holder: Some(holder), .. }, .. } =
        &busy
    else {
        return Err(busy.into());
    };
    let Some(record) = state.records.values().find(|record| record.lease == holder.lease) else {
        return Err(busy.into());
    };
    if let Some(given) = again(broker, request, record)? {
        return Ok(given);
    }
    let mut joining = wanted().into_request()?;
    joining.lease = Some(record.lease.clone());
    joining.key = Some(record.key.clone());
    Ok(broker.acquire(joining.into())?.into())
}

/// The device once more, where that lease has it already and QEMU does not: an attach did not come to
/// its end after it had joined the lease, or the device has been detached, and what is in a lease
/// leaves it only with all the rest.
fn again(broker: &mut Client, request: &Attach, record: &Record) -> Result<Option<LeasedFiles>> {
    let device = full_name(&request.device);
    let leases = broker.leases()?;
    let there =
        |lease: &protocol::Lease| lease.lease == record.lease && lease.devices.contains(&device);
    if !leases.iter().any(there) {
        return Ok(None);
    }
    let mut files = broker.open_again(&record.lease, &record.key, FdKind::Cdev, &device)?;
    let Some(lifeline) = files.take(FdKind::Lease, None) else {
        return Err(Error::bad(&request.device, "the broker gave no lease fd with it"));
    };
    let (lease, key) = (record.lease.clone(), record.key.clone());
    Ok(Some(LeasedFiles { lease, key, lifeline: lifeline.fd, files }))
}

/// What has been done in QEMU, to be undone in reverse order.
enum Done {
    Record(String),
    File(String),
    Object(String),
    /// The device is in; its id.
    Device(String),
}

/// One attach under way.
struct Plug<'a> {
    qemu: &'a mut Monitor,
    request: &'a Attach,
    state: &'a State,
    done: Vec<Done>,
    /// QEMU has the device, or may have it.
    plugged: bool,
}

impl Plug<'_> {
    fn run(&mut self, mut given: LeasedFiles, properties: Map<String, Value>) -> Result<Attached> {
        let Some(cdev) = given.files.take(FdKind::Cdev, None) else {
            let why = "the broker gave it in another form than by iommufd";
            return Err(Error::bad(&self.request.device, why));
        };
        let device = cdev.name;
        let id = self.id_for(&device)?;
        self.remember(&id, &device, &given)?;
        self.give(lease_name(&id), &given.lifeline)?;
        let iommufd = self.iommufd(&mut given.files)?;
        self.give(device_name(&id), &cdev.fd)?;
        // QEMU has its copies: with ours, the files would stay open should it close them.
        drop((cdev.fd, given.files));
        let mut arguments = properties;
        let own = [("driver", "vfio-pci"), ("id", &*id), ("iommufd", &*iommufd)];
        let file = device_name(&id);
        let bus = self.request.bus.as_deref().map(|bus| ("bus", bus));
        for (name, value) in own.into_iter().chain([("fd", &*file)]).chain(bus) {
            arguments.insert(name.to_owned(), value.into());
        }
        match self.qemu.execute("device_add", Value::Object(arguments)) {
            Ok(_) => self.done.push(Done::Device(id.clone())),
            // Nobody knows whether it is done.
            Err(error) if !error.is_answer() => {
                self.plugged = true;
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        }
        self.check(&id, &device)?;
        Ok(Attached { device, id, lease: given.lease })
    }

    fn id_for(&self, device: &str) -> Result<String> {
        let id = match &self.request.id {
            Some(id) => id.clone(),
            None => format!("vfio-{}", device.replace(':', "-")),
        };
        if self.state.devices.contains(&id) {
            return Err(Error::bad(format!("id {id:?}"), "QEMU has a device of that name"));
        }
        Ok(id)
    }

    /// The first thing of all: by it the next attach or detach finds the rest.
    fn remember(&mut self, id: &str, device: &str, given: &LeasedFiles) -> Result<()> {
        let record = Record {
            vm: self.request.vm.clone(),
            device: device.to_owned(),
            lease: given.lease.clone(),
            key: given.key.clone(),
        };
        let data = json!(record).to_string();
        let name = record_name(id);
        let arguments = json!({ "qom-type": "secret", "id": name, "data": data });
        self.done.push(Done::Record(name));
        self.qemu.execute("object-add", arguments)?;
        Ok(())
    }

    fn give(&mut self, name: String, file: impl std::os::fd::AsFd) -> Result<()> {
        self.done.push(Done::File(name.clone()));
        Ok(self.qemu.getfd(&name, file)?)
    }

    /// The iommufd object that the device is to use. One that an earlier attach made is used again:
    /// all devices share its address space, and QEMU never closes an iommufd that it was given, so
    /// with a new one each time they would add up.
    fn iommufd(&mut self, files: &mut Files) -> Result<String> {
        if let Some(iommufd) = &self.request.iommufd {
            return Ok(iommufd.clone());
        }
        match self.state.objects.get(OURS).map(String::as_str) {
            Some("iommufd") => return Ok(OURS.to_owned()),
            Some(kind) => {
                let why = format!("QEMU has one that is no iommufd but a {kind}");
                return Err(Error::bad(format!("object {OURS}"), why));
            }
            None => {}
        }
        let Some(file) = files.take(FdKind::Iommufd, None) else {
            let why = "its group's lease has its iommufd somewhere else: which one is to be named";
            return Err(Error::bad(&self.request.device, why));
        };
        let name = iommufd_name();
        self.give(name.clone(), &file.fd)?;
        self.done.push(Done::Object(OURS.to_owned()));
        let arguments = json!({ "qom-type": "iommufd", "id": OURS, "fd": name });
        self.qemu.execute("object-add", arguments)?;
        Ok(OURS.to_owned())
    }

    fn check(&mut self, id: &str, device: &str) -> Result<()> {
        let path = format!("/machine/peripheral/{id}");
        let asked = json!({ "path": path, "property": "realized" });
        let not_there = |why: String| Error::NotThere { device: device.into(), id: id.into(), why };
        match self.qemu.execute("qom-get", asked) {
            Ok(Value::Bool(true)) => Ok(()),
            Ok(other) => Err(not_there(format!("realized is {other}"))),
            Err(qmp::Error::Command { desc, .. }) => Err(not_there(desc)),
            Err(error) => {
                self.plugged = true;
                Err(error.into())
            }
        }
    }

    /// Takes everything back, the last first; returns the error, with what could not be taken back.
    fn undo(&mut self, error: Error) -> Error {
        let mut left = Vec::new();
        while let Some(done) = self.done.pop() {
            let (what, result) = match done {
                Done::Device(id) => {
                    let gone = unplug(self.qemu, &id, UNDO, &mut |_| {});
                    if !matches!(gone, Ok(Unplugged::Gone)) {
                        self.plugged = true;
                        let why = format!("device {id}, with its lease");
                        return Error::Left { error: Box::new(error), left: vec![why] };
                    }
                    continue;
                }
                Done::File(name) => (format!("file {name}"), close(self.qemu, &name)),
                Done::Record(name) | Done::Object(name) => {
                    (format!("object {name}"), delete(self.qemu, &name))
                }
            };
            if result.is_err() {
                left.push(what);
            }
        }
        if left.is_empty() { error } else { Error::Left { error: Box::new(error), left } }
    }
}

/// How long a guest is given to let go of a device that it has had for no time.
const UNDO: Duration = Duration::from_secs(10);
