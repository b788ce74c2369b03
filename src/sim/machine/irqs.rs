//! Interrupts of a device: `VFIO_DEVICE_GET_IRQ_INFO` and `VFIO_DEVICE_SET_IRQS`.

use super::device::DeviceState;
use super::{Event, Machine, Named, UserStruct};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::sync::Arc;
use vfio_bindings::bindings::vfio as uapi;

const INTX: u32 = uapi::VFIO_PCI_INTX_IRQ_INDEX;
const MSI: u32 = uapi::VFIO_PCI_MSI_IRQ_INDEX;
const MSIX: u32 = uapi::VFIO_PCI_MSIX_IRQ_INDEX;
const ERR: u32 = uapi::VFIO_PCI_ERR_IRQ_INDEX;
const REQ: u32 = uapi::VFIO_PCI_REQ_IRQ_INDEX;

const NONE: u32 = uapi::VFIO_IRQ_SET_DATA_NONE;
const BOOL: u32 = uapi::VFIO_IRQ_SET_DATA_BOOL;
const EVENTFD: u32 = uapi::VFIO_IRQ_SET_DATA_EVENTFD;
const MASK: u32 = uapi::VFIO_IRQ_SET_ACTION_MASK;
const UNMASK: u32 = uapi::VFIO_IRQ_SET_ACTION_UNMASK;
const TRIGGER: u32 = uapi::VFIO_IRQ_SET_ACTION_TRIGGER;

/// Where the data of a `struct vfio_irq_set` starts.
const DATA: usize = 20;

type Trigger = Arc<dyn Event + Sync>;

/// What a device's interrupts are connected to. One of INTx, MSI and MSI-X is on at a time.
#[derive(Debug, Default)]
pub(super) struct Irqs {
    /// Which is on.
    kind: Option<u32>,
    vectors: BTreeMap<u32, Trigger>,
    /// How many vectors were allocated when it was switched on.
    allocated: u32,
    masked: bool,
    unmask: Option<Trigger>,
    error: Option<Trigger>,
    request: Option<Trigger>,
}

impl Irqs {
    fn disable(&mut self) {
        (self.kind, self.masked, self.unmask) = (None, false, None);
        self.vectors.clear();
    }

    /// Tells the user that the device is wanted back.
    pub(super) fn ask_back(&self) {
        if let Some(request) = &self.request {
            request.signal();
        }
    }
}

/// The decoded head of a `struct vfio_irq_set`.
struct Set {
    data: u32,
    start: u32,
    count: u32,
}

/// What becomes of MSI vectors beyond those that were allocated when it was switched on.
struct Room {
    /// More are allocated.
    grows: bool,
    /// Firing them by hand is an error, rather than nothing.
    checked: bool,
}

impl DeviceState {
    fn irq_count(&self, index: u32) -> u32 {
        match index {
            INTX => u32::from(self.facts.intx),
            MSI => self.facts.msi,
            MSIX => self.facts.msix.map_or(0, |msix| msix.count),
            ERR => u32::from(self.facts.pcie),
            REQ => 1,
            _ => 0,
        }
    }
}

impl Machine {
    pub(super) fn irq_info(&mut self, index: usize, user: &mut UserStruct) -> Result<(), Errno> {
        let can_grow = self.profile().has_dynamic_msix();
        let device = self.device(index)?;
        let dynamic = can_grow && device.facts.msix.is_some();
        let irq = user.u32(8);
        if user.argsz() < 16 || irq > REQ || (irq == ERR && !device.facts.pcie) {
            return Err(Errno::EINVAL);
        }
        let more = match irq {
            INTX => uapi::VFIO_IRQ_INFO_MASKABLE | uapi::VFIO_IRQ_INFO_AUTOMASKED,
            MSIX if dynamic => 0,
            _ => uapi::VFIO_IRQ_INFO_NORESIZE,
        };
        user.set_u32(4, uapi::VFIO_IRQ_INFO_EVENTFD | more);
        user.set_u32(12, device.irq_count(irq));
        Ok(())
    }

    pub(super) fn set_irqs(&mut self, index: usize, user: &UserStruct) -> Result<(), Errno> {
        let dynamic = self.profile().has_dynamic_msix();
        let device = self.device(index)?;
        let (flags, irq) = (user.u32(4), user.u32(8));
        let set = Set { data: flags & 7, start: user.u32(12), count: user.u32(16) };
        check(user, flags, irq, &set, device.irq_count(irq))?;
        let action = flags & (MASK | UNMASK | TRIGGER);
        let room = Room { grows: dynamic && irq == MSIX, checked: !dynamic };
        let (pcie, irqs) = (device.facts.pcie, &mut device.irqs);
        match (irq, action) {
            (INTX, MASK) => mask_intx(irqs, &set, user),
            (INTX, UNMASK) => unmask_intx(irqs, &set, user),
            (INTX, TRIGGER) => trigger_intx(irqs, &set, user),
            (MSI | MSIX, TRIGGER) => trigger_msi(irqs, irq, &room, &set, user),
            (ERR, TRIGGER) if pcie => trigger_one(&mut irqs.error, &set, user),
            (REQ, TRIGGER) => trigger_one(&mut irqs.request, &set, user),
            _ => Err(Errno::ENOTTY),
        }
    }
}

fn check(user: &UserStruct, flags: u32, irq: u32, set: &Set, available: u32) -> Result<(), Errno> {
    let known = NONE | BOOL | EVENTFD | MASK | UNMASK | TRIGGER;
    if user.argsz() < DATA || irq > REQ || set.count >= u32::MAX - set.start || flags & !known != 0
    {
        return Err(Errno::EINVAL);
    }
    if set.start >= available || set.start + set.count > available {
        return Err(Errno::EINVAL);
    }
    let unit = match set.data {
        NONE => 0,
        BOOL => 1,
        EVENTFD => 4,
        _ => return Err(Errno::EINVAL),
    };
    if user.argsz() - DATA < set.count as usize * unit {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

/// The eventfd of the nth interrupt, `None` for -1.
fn eventfd(user: &UserStruct, nth: u32) -> Result<Option<Trigger>, Errno> {
    match user.fd(DATA + 4 * nth as usize)? {
        None => Ok(None),
        Some(Named::Event(event)) => Ok(Some(event)),
        Some(_) => Err(Errno::EINVAL),
    }
}

fn only_intx(irqs: &Irqs, set: &Set) -> Result<(), Errno> {
    let wrong = irqs.kind != Some(INTX) || set.start != 0 || set.count != 1;
    if wrong { Err(Errno::EINVAL) } else { Ok(()) }
}

fn mask_intx(irqs: &mut Irqs, set: &Set, user: &UserStruct) -> Result<(), Errno> {
    only_intx(irqs, set)?;
    match set.data {
        NONE => irqs.masked = true,
        BOOL if user.byte(DATA) != 0 => irqs.masked = true,
        BOOL => {}
        _ => return Err(Errno::ENOTTY),
    }
    Ok(())
}

fn unmask_intx(irqs: &mut Irqs, set: &Set, user: &UserStruct) -> Result<(), Errno> {
    only_intx(irqs, set)?;
    match set.data {
        NONE => irqs.masked = false,
        BOOL if user.byte(DATA) != 0 => irqs.masked = false,
        BOOL => {}
        _ => {
            let event = eventfd(user, 0)?;
            if event.is_some() && irqs.unmask.is_some() {
                return Err(Errno::EBUSY);
            }
            irqs.unmask = event;
        }
    }
    Ok(())
}

fn trigger_intx(irqs: &mut Irqs, set: &Set, user: &UserStruct) -> Result<(), Errno> {
    let on = irqs.kind == Some(INTX);
    if on && set.count == 0 && set.data == NONE {
        irqs.disable();
        return Ok(());
    }
    if !(on || irqs.kind.is_none()) || set.start != 0 || set.count != 1 {
        return Err(Errno::EINVAL);
    }
    if set.data == EVENTFD {
        let event = eventfd(user, 0)?;
        irqs.kind = Some(INTX);
        irqs.vectors.clear();
        irqs.vectors.extend(event.map(|event| (0, event)));
        return Ok(());
    }
    if !on {
        return Err(Errno::EINVAL);
    }
    if set.data == NONE || user.byte(DATA) != 0 {
        signal(irqs.vectors.get(&0));
    }
    Ok(())
}

fn trigger_msi(
    irqs: &mut Irqs,
    irq: u32,
    room: &Room,
    set: &Set,
    user: &UserStruct,
) -> Result<(), Errno> {
    let on = irqs.kind == Some(irq);
    if on && set.count == 0 && set.data == NONE {
        irqs.disable();
        return Ok(());
    }
    if !(on || irqs.kind.is_none()) {
        return Err(Errno::EINVAL);
    }
    let beyond = set.start + set.count > irqs.allocated;
    if set.data == EVENTFD {
        if on && !room.grows && beyond {
            return Err(Errno::EINVAL);
        }
        return connect(irqs, irq, set, user);
    }
    if !on || (room.checked && beyond) {
        return Err(Errno::EINVAL);
    }
    for nth in 0..set.count {
        if set.data == NONE || user.byte(DATA + nth as usize) != 0 {
            signal(irqs.vectors.get(&(set.start + nth)));
        }
    }
    Ok(())
}

/// Connects vectors to eventfds; where one of them is none, those up to it are disconnected.
fn connect(irqs: &mut Irqs, irq: u32, set: &Set, user: &UserStruct) -> Result<(), Errno> {
    let was_on = irqs.kind == Some(irq);
    for nth in 0..set.count {
        let vector = set.start + nth;
        irqs.vectors.remove(&vector);
        match eventfd(user, nth) {
            Ok(event) => irqs.vectors.extend(event.map(|event| (vector, event))),
            Err(errno) => {
                irqs.vectors.retain(|at, _| *at < set.start || *at > vector);
                return Err(errno);
            }
        }
    }
    irqs.kind = Some(irq);
    if !was_on {
        irqs.allocated = set.start + set.count;
    }
    Ok(())
}

/// The ERR and REQ interrupts, which have one vector and can be fired by hand.
fn trigger_one(slot: &mut Option<Trigger>, set: &Set, user: &UserStruct) -> Result<(), Errno> {
    if set.start != 0 || set.count > 1 {
        return Err(Errno::EINVAL);
    }
    match set.data {
        NONE if slot.is_none() => return Err(Errno::EINVAL),
        NONE if set.count == 0 => *slot = None,
        NONE => signal(slot.as_ref()),
        _ if set.count == 0 => return Err(Errno::EINVAL),
        BOOL if user.byte(DATA) == 0 => {}
        BOOL => signal(slot.as_ref()),
        _ => *slot = eventfd(user, 0)?,
    }
    Ok(())
}

fn signal(trigger: Option<&Trigger>) {
    if let Some(trigger) = trigger {
        trigger.signal();
    }
}
