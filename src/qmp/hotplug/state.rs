//! What a QEMU has of ours. It is all in QEMU: a [`Record`] for each device, kept as an object.

use super::{Error, Result};
use crate::client::{self, Client};
use crate::protocol::Bdf;
use crate::qmp::{self, Monitor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// QEMU's iommufd object, which all attached devices share, and what names of others begin with.
pub(super) const OURS: &str = "vfio-broker";

/// The most devices that a QEMU can have been given here, and the longest it may take to say them.
const MOST_RECORDS: usize = 256;
const MOST_TIME: Duration = Duration::from_secs(60);

/// What is remembered of a device: who has to be told when it goes, and the secret for it. It is an
/// object of QEMU's type `secret`, which is QEMU's way to be given text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) vm: String,
    pub(super) device: String,
    pub(super) lease: String,
    pub(super) key: String,
}

impl Record {
    /// Whether it looks like one of ours. QEMU is not trusted, and may have forged it: without a key it
    /// would be a manager's rights that the broker goes by, and what is no word could pass for ours
    /// where it is told to a person.
    fn is_possible(&self) -> bool {
        let Self { vm, device, lease, key } = self;
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.:@+".contains(c);
        let is_word = |text: &String| (1..=64).contains(&text.len()) && text.chars().all(fits);
        [vm, device, lease, key].into_iter().all(is_word)
    }
}

/// Whether QEMU takes it for the id of an object or a device.
pub(super) fn is_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// The object that holds the record of the device that QEMU calls `id`.
pub(super) fn record_name(id: &str) -> String {
    format!("{OURS}.{id}")
}

/// The lease fd's name in the monitor.
pub(super) fn lease_name(id: &str) -> String {
    format!("{OURS}.lease.{id}")
}

/// The device's open file's name in the monitor, until QEMU uses it.
pub(super) fn device_name(id: &str) -> String {
    format!("{OURS}.device.{id}")
}

/// The iommufd's name in the monitor, until QEMU uses it.
pub(super) fn iommufd_name() -> String {
    format!("{OURS}.iommufd")
}

/// An address with its domain, as the broker writes it.
pub(super) fn full_name(device: &str) -> String {
    Bdf::typed(device).map_or_else(|_| device.to_owned(), |bdf| bdf.to_string())
}

/// What a QEMU has.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Our records, by the id of the device.
    pub(super) records: BTreeMap<String, Record>,
    /// The devices with an id, ours or not.
    pub(super) devices: BTreeSet<String>,
    /// The objects with an id, ours or not, with their types.
    pub(super) objects: BTreeMap<String, String>,
}

impl State {
    /// Asks QEMU. Changes nothing.
    pub(super) fn ask(qemu: &mut Monitor) -> Result<Self> {
        let objects = children(&qemu.execute("qom-list", json!({ "path": "/objects" }))?);
        let devices = devices(qemu)?;
        let mut records = BTreeMap::new();
        let began = Instant::now();
        for (name, kind) in &objects {
            let Some(id) = name.strip_prefix(OURS).and_then(|rest| rest.strip_prefix('.')) else {
                continue;
            };
            if kind != "secret" || !is_id(id) {
                continue;
            }
            // Whoever made up more of them means to keep us.
            if records.len() == MOST_RECORDS || began.elapsed() > MOST_TIME {
                return Err(too_many());
            }
            let arguments = json!({ "path": format!("/objects/{name}"), "property": "data" });
            let text = match qemu.execute("qom-get", arguments) {
                Err(qmp::Error::Command { .. }) => continue,
                other => other?,
            };
            // Somebody else's is left alone.
            let record = text.as_str().map(serde_json::from_str::<Record>);
            if let Some(Ok(record)) = record
                && record.is_possible()
            {
                records.insert(id.to_owned(), record);
            }
        }
        Ok(Self { records, devices, objects })
    }

    /// The devices that are plugged in, by id.
    pub(super) fn attached(&self) -> impl Iterator<Item = (&String, &Record)> {
        self.records.iter().filter(|(id, _)| self.devices.contains(*id))
    }

    /// Clears what is left of attaches that never came to their end, and of devices that the guest
    /// or somebody at the monitor has removed without telling the broker.
    pub(super) fn clear(&mut self, qemu: &mut Monitor, broker: &mut Client) -> Result<()> {
        let is_left = |id: &&String| !self.devices.contains(*id);
        let left: Vec<String> = self.records.keys().filter(is_left).cloned().collect();
        let began = Instant::now();
        for id in left {
            if began.elapsed() > MOST_TIME {
                return Err(too_many());
            }
            self.give_back(qemu, broker, &id)?;
        }
        Ok(())
    }

    /// Ends the lease of a device that QEMU has no more, unless another device has the same lease,
    /// and forgets the device. Says whether the lease has ended and all of it is shown to be free;
    /// `None` where the lease goes on.
    pub(super) fn give_back(
        &mut self,
        qemu: &mut Monitor,
        broker: &mut Client,
        id: &str,
    ) -> Result<Option<bool>> {
        let Some(record) = self.records.remove(id) else { return Ok(None) };
        let released = if self.records.values().any(|other| other.lease == record.lease) {
            Ok(None)
        } else {
            release(broker, &record).map(Some)
        };
        // Also when the broker could not be told: the lease ends with its last lease fd.
        close(qemu, &device_name(id))?;
        close(qemu, &iommufd_name())?;
        close(qemu, &lease_name(id))?;
        delete(qemu, &record_name(id))?;
        Ok(released?)
    }
}

fn too_many() -> Error {
    let why = "it has more of them than devices, or takes too long over them";
    Error::bad("this QEMU's objects vfio-broker.*", why)
}

/// Ends a record's lease. One that has ended by itself is being taken back, and nothing is known.
fn release(broker: &mut Client, record: &Record) -> std::result::Result<bool, client::Error> {
    match broker.release_of(&record.lease, &record.key) {
        Err(error) if Error::lease_is_gone(&error) => Ok(false),
        other => other,
    }
}

/// The devices with an id, ours or not.
pub(super) fn devices(qemu: &mut Monitor) -> Result<BTreeSet<String>> {
    let list = qemu.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
    Ok(children(&list).into_keys().collect())
}

/// Closes a named open file, if there is one of that name.
pub(super) fn close(qemu: &mut Monitor, name: &str) -> Result<()> {
    unless_missing(qemu.execute("closefd", json!({ "fdname": name })))
}

/// Deletes an object, if there is one of that name.
pub(super) fn delete(qemu: &mut Monitor, name: &str) -> Result<()> {
    unless_missing(qemu.execute("object-del", json!({ "id": name })))
}

/// QEMU has one class of errors for everything, and no way to look for a named file; so a refusal
/// to close or delete one is taken to mean that there is none.
fn unless_missing(result: qmp::Result<Value>) -> Result<()> {
    match result {
        Ok(_) | Err(qmp::Error::Command { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The children in a qom-list, with their types.
fn children(list: &Value) -> BTreeMap<String, String> {
    let child = |each: &Value| {
        let kind = each.get("type")?.as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((each.get("name")?.as_str()?.to_owned(), kind.to_owned()))
    };
    list.as_array().into_iter().flatten().filter_map(child).collect()
}
