//! A device out of a running QEMU.

use super::state::{State, devices, full_name};
use super::{Error, Result};
use crate::client::Client;
use crate::qmp::{self, Event, Monitor};
use serde_json::json;
use std::time::{Duration, Instant};

/// What is to be detached.
#[derive(Clone, Debug)]
pub struct Detach {
    vm: String,
    device: String,
    patience: Duration,
}

impl Detach {
    /// A device of that VM: its address, or what QEMU calls it.
    pub fn new(vm: impl Into<String>, device: impl Into<String>) -> Self {
        Self { vm: vm.into(), device: device.into(), patience: Duration::from_secs(60) }
    }

    /// All devices of a lease that this QEMU was given; none where it has none of that lease.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn all_of(qemu: &mut Monitor, lease: &str) -> Result<Vec<Self>> {
        let state = State::ask(qemu)?;
        let those = state.records.into_iter().filter(|(_, record)| record.lease == lease);
        Ok(those.map(|(id, record)| Self::new(record.vm, id)).collect())
    }

    /// How long the guest may take to let go of it, 60 s unless set.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }
}

/// A device that is out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detached {
    /// Its address, or UUID.
    pub device: String,
    /// What QEMU called it.
    pub id: String,
    /// The lease that it was of.
    pub lease: String,
    /// Whether the kernel has shown that it is free; `None` where its lease goes on, for another
    /// device of its group.
    pub proved: Option<bool>,
}

/// Takes a device that [`attach`](super::attach) plugged in out of QEMU and gives it back to the
/// broker. The guest is asked; `waiting` is told now and then for how long.
///
/// # Errors
/// See [`Error`]; with [`Error::GuestKeeps`] the device is still in the guest, and it can be tried
/// again.
pub fn detach(
    qemu: &mut Monitor,
    broker: &mut Client,
    request: &Detach,
    waiting: &mut dyn FnMut(Duration),
) -> Result<Detached> {
    let mut state = State::ask(qemu)?;
    let Some((id, device)) = find(request, &state) else {
        state.clear(qemu, broker)?;
        let attached = state.attached();
        let attached = attached.map(|(_, record)| format!("{} to {}", record.device, record.vm));
        let attached = attached.collect();
        let (device, vm) = (full_name(&request.device), request.vm.clone());
        return Err(Error::NotAttached { device, vm, attached });
    };
    if state.devices.contains(&id) {
        match unplug(qemu, &id, request.patience, waiting)? {
            Unplugged::Gone => {}
            Unplugged::Refused => return Err(Error::GuestKeeps { device, id, after: None }),
            Unplugged::NotYet => {
                return Err(Error::GuestKeeps { device, id, after: Some(request.patience) });
            }
        }
    }
    let lease = state.records.get(&id).map(|record| record.lease.clone()).unwrap_or_default();
    let proved = state.give_back(qemu, broker, &id)?;
    state.clear(qemu, broker)?;
    Ok(Detached { device, id, lease, proved })
}

fn find(request: &Detach, state: &State) -> Option<(String, String)> {
    let device = full_name(&request.device);
    let (id, record) = state.records.iter().find(|(id, record)| {
        record.vm == request.vm && (record.device == device || **id == request.device)
    })?;
    Some((id.clone(), record.device.clone()))
}

/// What became of a device that was to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unplugged {
    Gone,
    Refused,
    NotYet,
}

/// How long to wait for an event before looking for oneself: who is not connected when something
/// happens is not told.
const LOOK: Duration = Duration::from_secs(1);

/// Has QEMU take a device out, which takes until the guest has let go of it.
pub(super) fn unplug(
    qemu: &mut Monitor,
    id: &str,
    patience: Duration,
    waiting: &mut dyn FnMut(Duration),
) -> Result<Unplugged> {
    let start = Instant::now();
    // Those of an earlier device of the same name.
    qemu.forget_events();
    match qemu.execute("device_del", json!({ "id": id })) {
        // It was asked for before, or is gone already: both are seen below. What else QEMU refuses
        // would never come.
        Err(qmp::Error::Command { class, desc, .. })
            if class == "DeviceNotFound" || desc.contains("unplug") => {}
        other => drop(other?),
    }
    loop {
        let left = patience.saturating_sub(start.elapsed());
        match qemu.event(left.min(LOOK))? {
            Some(event) if is(&event, "DEVICE_UNPLUG_GUEST_ERROR", id) => {
                return Ok(Unplugged::Refused);
            }
            Some(event) if !is(&event, "DEVICE_DELETED", id) && !left.is_zero() => continue,
            _ => {}
        }
        if !devices(qemu)?.contains(id) {
            return Ok(Unplugged::Gone);
        }
        if left.is_zero() {
            return Ok(Unplugged::NotYet);
        }
        waiting(start.elapsed());
    }
}

fn is(event: &Event, name: &str, id: &str) -> bool {
    event.name == name && event.data.get("device").is_some_and(|device| device == id)
}
