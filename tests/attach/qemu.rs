//! A plain model of what QEMU does with open files, objects and devices on its monitor, with a fault
//! at whichever command a test wants.

use nix::sys::socket::MsgFlags;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use vfio_broker::kernel::{Device, Iommufd, Kernel};
use vfio_broker::sim::Wire;
use vfio_broker::sys::fdpass;

/// What happens at a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// QEMU says an error and does nothing.
    Refuse,
    /// What it says is no QMP; the command is not done.
    Garbage,
    /// The connection is closed before it is done, or after.
    HangUp { done: bool },
    /// There is no answer until the client goes; it is done nevertheless, or not.
    Silence { done: bool },
}

/// What the guest does when it is asked to let go of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guest {
    #[default]
    LetsGo,
    Keeps,
    Refuses,
}

/// All that QEMU has.
#[derive(Debug, Default)]
pub struct Model {
    pub version: [u32; 3],
    pub lacks: &'static str,
    pub guest: Guest,
    /// Named open files.
    pub files: BTreeMap<String, OwnedFd>,
    /// Objects: type and data.
    pub objects: BTreeMap<String, (String, Value)>,
    /// Devices: what they were added with, and their open files.
    pub devices: BTreeMap<String, (Value, OwnedFd)>,
    /// iommufds, by the object that each was for; they are never closed.
    pub iommufds: Vec<(String, OwnedFd)>,
    /// The commands that came, in order.
    pub commands: Vec<String>,
    fault: Option<(usize, Fault)>,
    events: Vec<Value>,
}

type Answer = Result<Value, (&'static str, String)>;

fn refused(why: impl Into<String>) -> Answer {
    Err(("GenericError", why.into()))
}

impl Model {
    /// QEMU ends, and another one starts: all is gone.
    pub fn restart(&mut self) {
        *self = Self { version: self.version, ..Self::default() };
    }

    /// What is left in it, but for the iommufd object: that is used again.
    pub fn leftovers(&self) -> Vec<String> {
        let files = self.files.keys().map(|name| format!("file {name}"));
        let objects = self.objects.iter().filter(|(_, (kind, _))| kind != "iommufd");
        let objects = objects.map(|(name, _)| format!("object {name}"));
        files.chain(objects).chain(self.devices.keys().map(|id| format!("device {id}"))).collect()
    }

    fn answer(&mut self, command: &str, arguments: &Value, came: Vec<OwnedFd>) -> Answer {
        let text = |name: &str| arguments[name].as_str().unwrap_or_default().to_owned();
        match command {
            "qmp_capabilities" => Ok(json!({})),
            "qom-list-properties" if self.lacks == text("typename") => {
                Err(("DeviceNotFound", format!("Class '{}' not found", self.lacks)))
            }
            "qom-list-properties" => Ok(json!([{ "name": "fd", "type": "string" }])),
            "device-list-properties" if self.lacks == "vfio-pci" => {
                Err(("DeviceNotFound", "Device 'vfio-pci' not found".into()))
            }
            "device-list-properties" => {
                let all = [("fd", "str"), ("iommufd", "link<iommufd>"), ("x-no-mmap", "bool")];
                let all = all.into_iter().filter(|(name, _)| *name != self.lacks);
                Ok(all.map(|(name, kind)| json!({ "name": name, "type": kind })).collect())
            }
            "qom-list" => {
                let child = |(name, kind): (&String, &str)| json!({ "name": name, "type": format!("child<{kind}>") });
                let list: Vec<_> = match &*text("path") {
                    "/objects" => {
                        self.objects.iter().map(|(name, (kind, _))| child((name, kind))).collect()
                    }
                    "/machine/peripheral" => {
                        self.devices.keys().map(|id| child((id, "vfio-pci"))).collect()
                    }
                    other => return refused(format!("no path {other}")),
                };
                let own = json!({ "name": "type", "type": "string" });
                Ok(list.into_iter().chain([own]).collect())
            }
            "qom-get" => {
                let path = text("path");
                if let Some(name) = path.strip_prefix("/objects/") {
                    let found = self.objects.get(name).map(|(_, data)| data.clone());
                    return found.map_or_else(|| refused("no such object"), Ok);
                }
                let id = path.strip_prefix("/machine/peripheral/").unwrap_or_default();
                if self.devices.contains_key(id) {
                    Ok(true.into())
                } else {
                    refused("no such path")
                }
            }
            "getfd" => {
                let Some(file) = came.into_iter().next() else { return refused("no file came") };
                assert!(!text("fdname").starts_with(|c: char| c.is_ascii_digit()));
                self.files.insert(text("fdname"), file);
                Ok(json!({}))
            }
            "closefd" => match self.files.remove(&text("fdname")) {
                Some(_) => Ok(json!({})),
                None => refused("File descriptor not found"),
            },
            "object-add" => {
                if self.objects.contains_key(&text("id")) {
                    return refused("duplicate property");
                }
                if text("qom-type") == "iommufd" {
                    let Some(file) = self.files.remove(&text("fd")) else {
                        return refused("no such file");
                    };
                    self.iommufds.push((text("id"), file));
                }
                self.objects.insert(text("id"), (text("qom-type"), arguments["data"].clone()));
                Ok(json!({}))
            }
            "object-del" => {
                let used = |(added, _): &(Value, OwnedFd)| added["iommufd"] == arguments["id"];
                if self.devices.values().any(used) {
                    return refused("object is in use");
                }
                match self.objects.remove(&text("id")) {
                    Some(_) => Ok(json!({})),
                    None => refused("object not found"),
                }
            }
            "device_add" => self.device_add(arguments),
            "device_del" => self.device_del(&text("id")),
            other => Err(("CommandNotFound", format!("The command {other} has not been found"))),
        }
    }

    fn device_add(&mut self, arguments: &Value) -> Answer {
        let text = |name: &str| arguments[name].as_str().unwrap_or_default().to_owned();
        assert_eq!(arguments["driver"], "vfio-pci");
        assert!(!text("id").is_empty(), "QEMU crashes without an id");
        if text("bus") == "nowhere" {
            return refused("Bus 'nowhere' not found");
        }
        if self.objects.get(&text("iommufd")).is_none_or(|(kind, _)| kind != "iommufd") {
            return refused("no such iommufd");
        }
        if self.devices.contains_key(&text("id")) {
            return refused("Duplicate device ID");
        }
        let Some(file) = self.files.remove(&text("fd")) else { return refused("no such file") };
        if let Err(error) = self.bind(&file, &text("iommufd")) {
            return refused(format!("vfio: error bind device to iommufd: {error}"));
        }
        self.devices.insert(text("id"), (arguments.clone(), file));
        Ok(json!({}))
    }

    /// What QEMU does first with a device's open file, which is closed with it again.
    fn bind(&self, device: &OwnedFd, iommufd: &str) -> vfio_broker::kernel::Result<u32> {
        let kernel: Arc<dyn Kernel> = Arc::new(Wire::detached());
        let (_, file) = self.iommufds.iter().rfind(|(id, _)| id == iommufd).unwrap();
        let iommufd = Iommufd::from_fd(Arc::clone(&kernel), file.try_clone().unwrap());
        Device::from_fd(kernel, "the device", device.try_clone().unwrap()).bind_iommufd(&iommufd)
    }

    fn device_del(&mut self, id: &str) -> Answer {
        if !self.devices.contains_key(id) {
            return Err(("DeviceNotFound", format!("Device '{id}' not found")));
        }
        let event = |name: &str| json!({ "event": name, "data": { "device": id, "path": "/p" } });
        match self.guest {
            Guest::LetsGo => {
                self.devices.remove(id);
                self.events.push(event("DEVICE_DELETED"));
            }
            Guest::Refuses => self.events.push(event("DEVICE_UNPLUG_GUEST_ERROR")),
            Guest::Keeps => {}
        }
        Ok(json!({}))
    }
}

/// A running model.
pub struct Qemu {
    pub socket: PathBuf,
    model: Arc<Mutex<Model>>,
    faults: Mutex<Receiver<()>>,
    _directory: tempfile::TempDir,
}

impl Qemu {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let model = Model { version: [10, 0, 2], ..Model::default() };
        let model = Arc::new(Mutex::new(model));
        let (at_fault, faults) = channel();
        let served = Arc::clone(&model);
        // Ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.unwrap(), &served, &at_fault);
            }
        });
        Self { socket, model, faults: Mutex::new(faults), _directory: directory }
    }

    pub fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    /// Lets something happen at the command number `at` from now.
    pub fn arm(&self, at: usize, fault: Fault) {
        let mut model = self.model();
        model.commands.clear();
        model.fault = Some((at, fault));
    }

    /// Nothing more happens.
    pub fn disarm(&self) {
        let mut model = self.model();
        model.commands.clear();
        model.fault = None;
    }

    /// Waits until the fault has happened.
    pub fn faulty(&self) {
        self.faults.lock().unwrap().recv_timeout(crate::SOON).expect("the fault never happened");
    }

    pub fn path(&self) -> &Path {
        &self.socket
    }
}

fn serve(stream: &UnixStream, model: &Mutex<Model>, at_fault: &Sender<()>) {
    let say = |value: &Value| {
        let mut to = stream;
        let _ = to.write_all(format!("{value}\r\n").as_bytes());
    };
    let [major, minor, micro] = model.lock().unwrap().version;
    let version = json!({ "major": major, "minor": minor, "micro": micro });
    say(&json!({ "QMP": { "version": { "qemu": version, "package": "" }, "capabilities": [] } }));
    let (mut text, mut files) = (Vec::new(), Vec::new());
    loop {
        let Some(end) = text.iter().position(|byte| *byte == b'\n') else {
            let mut buf = [0; 4096];
            match fdpass::receive(stream.as_fd(), &mut buf, 16, MsgFlags::empty()) {
                Ok(got) if got.len > 0 => {
                    text.extend_from_slice(&buf[..got.len]);
                    files.extend(got.fds);
                    continue;
                }
                _ => return,
            }
        };
        let line: Vec<u8> = text.drain(..=end).collect();
        let call: Value = serde_json::from_slice(&line).unwrap();
        let command = call["execute"].as_str().unwrap();
        let mut model = model.lock().unwrap();
        let number = model.commands.len();
        model.commands.push(command.to_owned());
        let fault = model.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault);
        let came = std::mem::take(&mut files);
        let answer = match fault {
            Some(Fault::Refuse) => refused("an error that a test wants"),
            Some(
                Fault::HangUp { done: false } | Fault::Silence { done: false } | Fault::Garbage,
            ) => {
                drop(came);
                Ok(Value::Null)
            }
            _ => model.answer(command, &call["arguments"], came),
        };
        let events = std::mem::take(&mut model.events);
        drop(model);
        if fault.is_some() {
            at_fault.send(()).unwrap();
        }
        match fault {
            Some(Fault::HangUp { .. }) => return,
            Some(Fault::Silence { .. }) => {
                while fdpass::receive(stream.as_fd(), &mut [0; 64], 16, MsgFlags::empty())
                    .is_ok_and(|got| got.len > 0)
                {}
                return;
            }
            Some(Fault::Garbage) => say(&json!("what is this?")),
            Some(Fault::Refuse) | None => {}
        }
        // Events may come before the answer.
        events.iter().for_each(say);
        match answer {
            Ok(value) => say(&json!({ "return": value, "id": call["id"] })),
            Err((class, desc)) => {
                let error = json!({ "class": class, "desc": desc });
                say(&json!({ "error": error, "id": call["id"] }));
            }
        }
    }
}
