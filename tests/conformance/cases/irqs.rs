//! Interrupts: what there are, and `VFIO_DEVICE_SET_IRQS`.

use crate::script::{Field, Ready, Script, device};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use vfio_broker::kernel::{IrqAction, IrqData, request};

super::cases![
    of_a_network_card,
    of_a_device_without_express,
    of_a_vf,
    indexes_that_are_none,
    info_argsz_too_small,
    set_argsz_too_small,
    set_flags_that_are_none,
    set_index_and_range,
    intx_on_and_off,
    intx_masks,
    intx_fires,
    msi_on_and_off,
    msi_fires,
    msix_on_and_off,
    msix_in_parts,
    msix_grows,
    masks_of_msi,
    one_kind_at_a_time,
    eventfds_that_are_none,
    bools,
    request_fires,
    error_fires,
    gone_with_the_last_close,
];

const INTX: u32 = 0;
const MSI: u32 = 1;
const MSIX: u32 = 2;
const ERROR: u32 = 3;
const REQUEST: u32 = 4;

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

fn all(t: &Script, bdf: &str) {
    let ready = t.device(bdf);
    for index in 0..6 {
        t.value(&format!("irq {index}"), ready.device.irq(index));
    }
}

fn of_a_network_card(t: &Script) {
    all(t, device::E1000E);
}

fn of_a_device_without_express(t: &Script) {
    all(t, device::EDU0);
}

fn of_a_vf(t: &Script) {
    all(t, device::VF0);
}

fn indexes_that_are_none(t: &Script) {
    let ready = t.device(device::E1000E);
    for index in [5, 6, 100, u32::MAX] {
        t.value(&format!("irq {index}"), ready.device.irq(index));
    }
}

fn info_argsz_too_small(t: &Script) {
    let ready = t.device(device::E1000E);
    for argsz in [0, 8, 15, 16, 20] {
        let mut fields = vec![Field::U32(argsz), Field::U32(77), Field::U32(MSI)];
        fields.extend([Field::U32(77); 2]);
        let what = format!("argsz {argsz}");
        let bytes = t.fields(&what, &ready.device, request::DEVICE_GET_IRQ_INFO, &fields);
        t.note("bytes", bytes);
    }
}

/// `VFIO_DEVICE_SET_IRQS` with a struct of these fields.
fn set(t: &Script, ready: &Ready, what: &str, head: [u32; 5], data: &[u8]) {
    let mut fields: Vec<Field> = head.into_iter().map(Field::U32).collect();
    fields.extend(data.iter().copied().map(Field::U8));
    t.fields(what, &ready.device, request::DEVICE_SET_IRQS, &fields);
}

/// Trigger with no data.
const FIRE: u32 = 1 << 5 | 1;

fn set_argsz_too_small(t: &Script) {
    let ready = t.device(device::E1000E);
    for argsz in [0, 8, 19] {
        set(t, &ready, &format!("argsz {argsz}"), [argsz, FIRE, MSI, 0, 0], &[]);
    }
    set(t, &ready, "no room for bools", [20, 1 << 5 | 2, MSI, 0, 1], &[0; 4]);
    set(t, &ready, "no room for eventfds", [23, 1 << 5 | 4, MSI, 0, 1], &[0xff; 4]);
    set(t, &ready, "room for an eventfd", [24, 1 << 5 | 4, MSI, 0, 1], &[0xff; 4]);
}

fn set_flags_that_are_none(t: &Script) {
    let ready = t.device(device::E1000E);
    for flags in [0, 1, 7, 3 | 1 << 5, 1 << 5, 1 << 6 | FIRE, 1 | 3 << 4, 1 | 1 << 3 | 1 << 5] {
        set(t, &ready, &format!("flags {flags:#x}"), [20, flags, MSI, 0, 1], &[]);
    }
}

fn set_index_and_range(t: &Script) {
    let ready = t.device(device::E1000E);
    for (index, start, count) in [
        (5, 0, 0),
        (100, 0, 1),
        (MSIX, 5, 0),
        (MSIX, 4, 1),
        (MSIX, 4, 2),
        (MSIX, 0, 6),
        (MSIX, 0, u32::MAX),
        (MSIX, 1, u32::MAX),
        (INTX, 1, 0),
        (INTX, 0, 2),
        (INTX, 0, 0),
        (MSI, 0, 0),
    ] {
        let what = format!("irq {index}, {count} from {start}");
        set(t, &ready, &what, [20, FIRE, index, start, count], &[]);
    }
}

fn eventfd(
    t: &Script,
    ready: &Ready,
    what: &str,
    index: u32,
    start: u32,
    events: &[Option<&EventFd>],
) {
    let fds: Vec<_> = events.iter().map(|event| event.map(AsFd::as_fd)).collect();
    let data = IrqData::Eventfd(&fds);
    t.ok(what, ready.device.set_irqs(index, start, IrqAction::Trigger, data));
}

fn none(
    t: &Script,
    ready: &Ready,
    what: &str,
    index: u32,
    start: u32,
    action: IrqAction,
    count: u32,
) {
    t.ok(what, ready.device.set_irqs(index, start, action, IrqData::None { count }));
}

fn intx_on_and_off(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    none(t, &ready, "off", INTX, 0, IrqAction::Trigger, 0);
    eventfd(t, &ready, "on", INTX, 0, &[Some(&event)]);
    eventfd(t, &ready, "on again", INTX, 0, &[Some(&event)]);
    eventfd(t, &ready, "no eventfd", INTX, 0, &[None]);
    none(t, &ready, "off", INTX, 0, IrqAction::Trigger, 0);
    none(t, &ready, "off again", INTX, 0, IrqAction::Trigger, 0);
}

fn intx_masks(t: &Script) {
    let ready = t.device(device::E1000E);
    let (event, unmask) = (event(), event());
    none(t, &ready, "mask, off", INTX, 0, IrqAction::Mask, 1);
    none(t, &ready, "unmask, off", INTX, 0, IrqAction::Unmask, 1);
    eventfd(t, &ready, "on", INTX, 0, &[Some(&event)]);
    none(t, &ready, "mask", INTX, 0, IrqAction::Mask, 1);
    none(t, &ready, "unmask", INTX, 0, IrqAction::Unmask, 1);
    none(t, &ready, "mask nothing", INTX, 0, IrqAction::Mask, 0);
    for (what, action) in [("mask", IrqAction::Mask), ("unmask", IrqAction::Unmask)] {
        let data = [Some(unmask.as_fd())];
        t.ok(what, ready.device.set_irqs(INTX, 0, action, IrqData::Eventfd(&data)));
        t.ok(what, ready.device.set_irqs(INTX, 0, action, IrqData::Eventfd(&data)));
        t.ok(what, ready.device.set_irqs(INTX, 0, action, IrqData::Eventfd(&[None])));
        t.ok(what, ready.device.set_irqs(INTX, 0, action, IrqData::Bool(&[true])));
    }
}

fn intx_fires(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    none(t, &ready, "off", INTX, 0, IrqAction::Trigger, 1);
    eventfd(t, &ready, "on", INTX, 0, &[Some(&event)]);
    none(t, &ready, "fire", INTX, 0, IrqAction::Trigger, 1);
    t.note("count", event.read());
    t.note("count", event.read());
}

fn msi_on_and_off(t: &Script) {
    let ready = t.device(device::EDU0);
    let event = event();
    none(t, &ready, "off", MSI, 0, IrqAction::Trigger, 0);
    eventfd(t, &ready, "on", MSI, 0, &[Some(&event)]);
    eventfd(t, &ready, "no eventfd", MSI, 0, &[None]);
    none(t, &ready, "off", MSI, 0, IrqAction::Trigger, 0);
    none(t, &ready, "off again", MSI, 0, IrqAction::Trigger, 0);
}

fn msi_fires(t: &Script) {
    let ready = t.device(device::EDU0);
    let event = event();
    none(t, &ready, "off", MSI, 0, IrqAction::Trigger, 1);
    eventfd(t, &ready, "on", MSI, 0, &[Some(&event)]);
    none(t, &ready, "fire", MSI, 0, IrqAction::Trigger, 1);
    none(t, &ready, "fire", MSI, 0, IrqAction::Trigger, 1);
    t.note("count", event.read());
    eventfd(t, &ready, "no eventfd", MSI, 0, &[None]);
    none(t, &ready, "fire", MSI, 0, IrqAction::Trigger, 1);
    t.note("count", event.read());
}

fn msix_on_and_off(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    eventfd(t, &ready, "on", MSIX, 0, &[Some(&event), None, Some(&event)]);
    none(t, &ready, "fire all", MSIX, 0, IrqAction::Trigger, 3);
    t.note("count", event.read());
    none(t, &ready, "fire the second", MSIX, 1, IrqAction::Trigger, 1);
    t.note("count", event.read());
    none(t, &ready, "off", MSIX, 0, IrqAction::Trigger, 0);
    none(t, &ready, "fire all", MSIX, 0, IrqAction::Trigger, 3);
    t.note("count", event.read());
}

fn msix_in_parts(t: &Script) {
    let ready = t.device(device::E1000E);
    let (first, second) = (event(), event());
    eventfd(t, &ready, "two", MSIX, 0, &[Some(&first), Some(&first)]);
    eventfd(t, &ready, "replace the second", MSIX, 1, &[Some(&second)]);
    none(t, &ready, "fire both", MSIX, 0, IrqAction::Trigger, 2);
    t.note("first", first.read());
    t.note("second", second.read());
    eventfd(t, &ready, "take the first", MSIX, 0, &[None]);
    none(t, &ready, "fire both", MSIX, 0, IrqAction::Trigger, 2);
    t.note("first", first.read());
    t.note("second", second.read());
}

fn msix_grows(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    eventfd(t, &ready, "one", MSIX, 0, &[Some(&event)]);
    eventfd(t, &ready, "the second", MSIX, 1, &[Some(&event)]);
    eventfd(t, &ready, "three", MSIX, 0, &[Some(&event); 3]);
    none(t, &ready, "fire three", MSIX, 0, IrqAction::Trigger, 3);
    t.note("count", event.read());
    none(t, &ready, "off", MSIX, 0, IrqAction::Trigger, 0);
    eventfd(t, &ready, "from the third", MSIX, 2, &[Some(&event)]);
    eventfd(t, &ready, "the first two", MSIX, 0, &[Some(&event); 2]);
    none(t, &ready, "fire three", MSIX, 0, IrqAction::Trigger, 3);
    t.note("count", event.read());
}

fn masks_of_msi(t: &Script) {
    let ready = t.device(device::E1000E);
    for index in [MSI, MSIX, ERROR, REQUEST] {
        none(t, &ready, &format!("mask {index}"), index, 0, IrqAction::Mask, 1);
        none(t, &ready, &format!("unmask {index}"), index, 0, IrqAction::Unmask, 1);
    }
}

fn one_kind_at_a_time(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    eventfd(t, &ready, "MSI-X", MSIX, 0, &[Some(&event)]);
    eventfd(t, &ready, "MSI", MSI, 0, &[Some(&event)]);
    eventfd(t, &ready, "INTx", INTX, 0, &[Some(&event)]);
    none(t, &ready, "MSI off", MSI, 0, IrqAction::Trigger, 0);
    none(t, &ready, "MSI-X off", MSIX, 0, IrqAction::Trigger, 0);
    eventfd(t, &ready, "MSI", MSI, 0, &[Some(&event)]);
}

fn eventfds_that_are_none(t: &Script) {
    let ready = t.device(device::E1000E);
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    for index in [INTX, MSI, MSIX, REQUEST, ERROR] {
        let data = IrqData::Eventfd(&[Some(pipe.as_fd())]);
        let what = format!("a pipe for {index}");
        t.ok(&what, ready.device.set_irqs(index, 0, IrqAction::Trigger, data));
        // Nothing is open under this number.
        let head = [24, 1 << 5 | 4, index, 0, 1];
        set(t, &ready, &format!("200 for {index}"), head, &200u32.to_ne_bytes());
    }
    let event = event();
    eventfd(t, &ready, "MSI-X is still off", MSIX, 0, &[Some(&event)]);
    let data = IrqData::Eventfd(&[Some(event.as_fd()), Some(pipe.as_fd())]);
    t.ok("a pipe behind", ready.device.set_irqs(MSIX, 0, IrqAction::Trigger, data));
    none(t, &ready, "fire", MSIX, 0, IrqAction::Trigger, 1);
    t.note("count", event.read());
}

fn bools(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    eventfd(t, &ready, "on", MSIX, 0, &[Some(&event), Some(&event)]);
    for flags in [[true, true], [true, false], [false, false]] {
        let data = IrqData::Bool(&flags);
        t.ok("fire", ready.device.set_irqs(MSIX, 0, IrqAction::Trigger, data));
        t.note("count", event.read());
    }
}

/// The interrupts that have one vector and no hardware behind it.
fn single(t: &Script, bdf: &str, index: u32) {
    let ready = t.device(bdf);
    let event = event();
    none(t, &ready, "fire, off", index, 0, IrqAction::Trigger, 1);
    none(t, &ready, "off, off", index, 0, IrqAction::Trigger, 0);
    t.ok("bool, off", ready.device.set_irqs(index, 0, IrqAction::Trigger, IrqData::Bool(&[true])));
    eventfd(t, &ready, "on", index, 0, &[Some(&event)]);
    none(t, &ready, "fire", index, 0, IrqAction::Trigger, 1);
    t.note("count", event.read());
    for flag in [true, false] {
        let data = IrqData::Bool(&[flag]);
        t.ok("bool", ready.device.set_irqs(index, 0, IrqAction::Trigger, data));
        t.note("count", event.read());
    }
    t.ok("no bools", ready.device.set_irqs(index, 0, IrqAction::Trigger, IrqData::Bool(&[])));
    eventfd(t, &ready, "no eventfds", index, 0, &[]);
    eventfd(t, &ready, "no eventfd", index, 0, &[None]);
    none(t, &ready, "fire", index, 0, IrqAction::Trigger, 1);
    eventfd(t, &ready, "on", index, 0, &[Some(&event)]);
    none(t, &ready, "off", index, 0, IrqAction::Trigger, 0);
    none(t, &ready, "off again", index, 0, IrqAction::Trigger, 0);
}

fn request_fires(t: &Script) {
    single(t, device::EDU0, REQUEST);
}

fn error_fires(t: &Script) {
    single(t, device::E1000E, ERROR);
    single(t, device::EDU0, ERROR);
}

fn gone_with_the_last_close(t: &Script) {
    let ready = t.device(device::E1000E);
    let event = event();
    eventfd(t, &ready, "on", MSIX, 0, &[Some(&event)]);
    drop(ready.device);
    let device = ready.group.device(device::E1000E).unwrap();
    let ready = Ready { device, ..ready };
    none(t, &ready, "fire", MSIX, 0, IrqAction::Trigger, 1);
    t.note("count", event.read());
    eventfd(t, &ready, "on", MSI, 0, &[Some(&event)]);
}
