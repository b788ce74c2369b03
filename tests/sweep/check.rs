//! What must hold after a kill and a new start.

use crate::case::{Case, Cast, Form, Holder, Operation, RAISED, confirm};
use crate::common::raw::Reply;
use crate::trace::Role;
use crate::world::{DEVICES, World, soon};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vfio_broker::kernel::{Container, Device, Group, Iommufd, Node};
use vfio_broker::sim::Wire;

type Checked = Result<(), String>;

/// What the service has open when nothing goes on: launcher and broker.
pub type Files = [usize; 2];

/// All of it, to the end of the service. `victims` are those that were killed, where any were.
pub fn check(
    world: &World,
    case: Case,
    mut cast: Cast,
    victims: &BTreeSet<Role>,
    files: Option<Files>,
) -> Result<Files, String> {
    ends_what_was_begun(world, &cast, case)?;
    stands_what_must(&cast, victims, case)?;
    in_qemu(world, &cast)?;
    listed_is_held(world, &cast)?;
    // What a killed keeper has mapped stays as long as a device is open.
    if holders(&cast).all(|holder| holder.stands() || holder.fds.is_empty()) {
        mappings_are_known(world)?;
    }
    for holder in holders(&cast).filter(|holder| holder.stands()) {
        has_its_devices(world, case.form, holder)?;
    }
    in_no_second_hand(world, case, &cast)?;
    goes_on(world, case, &cast)?;
    // Files of leases that have ended are let go of; then the rest is too.
    for holder in [&mut cast.holder, &mut cast.other].into_iter().flatten() {
        if !holder.stands() {
            holder.fds.clear();
        }
    }
    let taken: BTreeSet<&str> =
        holders(&cast).filter(|it| it.stands()).flat_map(|it| it.devices.clone()).collect();
    others_are_free(world, &cast, &taken)?;
    if let Some(holder) = cast.holder.take().filter(Holder::stands) {
        // By Release or by the end of its pipe: in turn.
        if victims.len() == 1 {
            released(world, &holder)?;
        }
    }
    if let Some(qemu) = cast.qemu.take() {
        qemu.model().restart();
    }
    drop(cast.other.take());
    ends(world, files)
}

fn holders(cast: &Cast) -> impl Iterator<Item = &Holder> {
    cast.holder.iter().chain(&cast.other)
}

/// Of a revocation that the keeper knows of the lease ends, and what was confirmed stays so.
fn ends_what_was_begun(world: &World, cast: &Cast, case: Case) -> Checked {
    match case.operation {
        Operation::Revoke | Operation::RevokeInTime => {
            let holder = cast.holder.as_ref().ok_or("no holder")?;
            // What the last broker has asked for, the keeper has heard before this.
            drop(world.call("GetFds", holder.key()));
            soon("what is being revoked ends", || {
                let is_held = |state: &String| state.contains("\"phase\":\"held\"");
                let begun = |state: &String| state.contains("\"forced\":false");
                let states = world.states();
                let goes_on = holder.stands() && states.iter().any(|it| is_held(it) && begun(it));
                goes_on.then(|| format!("{states:?}"))
            })?;
            match cast.ended && holder.stands() {
                true => Err("a lease stands that was revoked".into()),
                false => Ok(()),
            }
        }
        Operation::Confirm if cast.ended => {
            match confirm(world) {
                Some(Reply::Error(..)) => {}
                other => return Err(format!("what was confirmed is to be once more: {other:?}")),
            }
            soon("nothing is left of what was confirmed", || {
                let keepers = world.keepers_with_leases();
                (!keepers.is_empty()).then(|| format!("{:?}", world.states()))
            })
        }
        Operation::Confirm => soon("it can be confirmed", || {
            drop(confirm(world));
            let keepers = world.keepers_with_leases();
            (!keepers.is_empty()).then(|| format!("{:?}", world.states()))
        }),
        _ => Ok(()),
    }
}

/// A lease stands as long as its keeper and its holder do.
fn stands_what_must(cast: &Cast, victims: &BTreeSet<Role>, case: Case) -> Checked {
    let keeper_died = victims.contains(&Role::Keeper) || case.operation == Operation::Salvage;
    if keeper_died {
        return match cast.other.as_ref().is_some_and(Holder::stands) {
            true if case.operation != Operation::Salvage => {
                Err("a lease stands whose keeper was killed".into())
            }
            _ => Ok(()),
        };
    }
    if cast.holder.as_ref().is_some_and(|it| !it.stands()) && !cast.ends {
        return Err("the holder's lease has ended, though its keeper lived".into());
    }
    if cast.other.as_ref().is_some_and(|it| !it.stands()) {
        return Err("the second member's lease has ended, though its keeper lived".into());
    }
    Ok(())
}

/// What was attached has its lease, and what has failed has left nothing that keeps one.
fn in_qemu(world: &World, cast: &Cast) -> Checked {
    let Some(qemu) = &cast.qemu else { return Ok(()) };
    soon("what QEMU has is what is listed", || {
        let pipes = qemu.model().files.keys().filter(|name| name.contains("lease")).count();
        let listed = world.leases()?.len();
        (listed > pipes)
            .then(|| format!("{listed} are listed; QEMU has {:?}", qemu.model().leftovers()))
    })
}

fn listed_is_held(world: &World, cast: &Cast) -> Checked {
    if cast.qemu.is_some() {
        return Ok(());
    }
    soon("leases listed are what holders hold", || {
        let Some(leases) = world.leases() else { return Some("Leases is not answered".into()) };
        // One that was revoked is listed until its devices are free.
        let stands = |lease: &&Value| lease["revoked"]["forced"] != true;
        let listed: BTreeMap<String, BTreeSet<String>> = leases
            .iter()
            .filter(stands)
            .map(|lease| {
                let devices = lease["devices"].as_array().unwrap().iter();
                (name(&lease["lease"]), devices.map(name).collect())
            })
            .collect();
        let held: BTreeMap<String, BTreeSet<String>> = holders(cast)
            .filter(|it| it.stands())
            .map(|holder| {
                (
                    name(&holder.reply["lease"]),
                    holder.devices.iter().map(|&it| it.to_owned()).collect(),
                )
            })
            .collect();
        (listed != held).then(|| format!("listed {listed:?}, held {held:?}"))
    })
}

fn name(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// What the broker says is mapped is what the kernel has.
fn mappings_are_known(world: &World) -> Checked {
    soon("mappings listed are the kernel's", || {
        let Some(leases) = world.leases() else { return Some("Leases is not answered".into()) };
        let listed: u64 = leases.iter().map(|lease| lease["mappings"].as_u64().unwrap_or(0)).sum();
        let real: u64 = world.sim.stats().unwrap().spaces.iter().map(|space| space.mappings).sum();
        (listed != real).then(|| format!("{listed} are listed, the kernel has {real}"))
    })
}

/// What a holder was given works.
fn has_its_devices(world: &World, form: Form, holder: &Holder) -> Checked {
    let wire = Arc::new(Wire::detached());
    let copy = |fd: &OwnedFd| fd.try_clone().unwrap();
    let mut iommufd = None;
    let failed = |what: &Value, error: &dyn std::fmt::Display| {
        format!("{what} of a lease that stands: {error}")
    };
    for (given, fd) in holder.given.iter().zip(&holder.fds) {
        let its = given["name"].as_str().unwrap_or_default();
        match given["kind"].as_str().unwrap_or_default() {
            "container" => {
                let container = Container::from_fd(wire.clone(), copy(fd));
                container.info().map_err(|error| failed(given, &error))?;
            }
            "group" => {
                let number = its.parse().unwrap_or(0);
                let group = Group::from_fd(wire.clone(), Node::Group(number), copy(fd));
                let status = group.status().map_err(|error| failed(given, &error))?;
                if form == Form::Container && !status.attached {
                    return Err(format!("{given} is in no container"));
                }
            }
            "device" => {
                let device = Device::from_fd(wire.clone(), its, copy(fd));
                device.info().map_err(|error| failed(given, &error))?;
            }
            "iommufd" => iommufd = Some(Iommufd::from_fd(wire.clone(), copy(fd))),
            "cdev" => {
                let device = Device::from_fd(wire.clone(), its, copy(fd));
                let iommufd = iommufd.as_ref().ok_or("no iommufd came before a cdev")?;
                device.bind_iommufd(iommufd).map_err(|error| failed(given, &error))?;
                device.info().map_err(|error| failed(given, &error))?;
            }
            _ => {}
        }
    }
    let groups = world.groups().ok_or("Topology is not answered")?;
    for device in &holder.devices {
        let state = &groups[DEVICES.iter().position(|it| it == device).unwrap()];
        if state != "held" {
            return Err(format!("{device} of a lease that stands is {state}"));
        }
    }
    Ok(())
}

/// Nobody else gets what somebody may still have.
fn in_no_second_hand(world: &World, case: Case, cast: &Cast) -> Checked {
    for holder in holders(cast).filter(|holder| !holder.fds.is_empty()) {
        // Its own tenant may have it again where a lease that has ended left a node open.
        if !holder.stands() && case.form == Form::Iommufd {
            continue;
        }
        for device in &holder.devices {
            match world
                .call("Acquire", json!({ "vm": "w", "devices": [device], "handout": "group" }))
            {
                Some(Reply::Error(error, _))
                    if error.ends_with(".Busy") || error.ends_with(".Quarantined") => {}
                // The policy lets the group be bound anew, which takes it from whoever kept its file.
                Some(Reply::Ok(..)) if !holder.stands() && is_dead(holder) => {}
                other => return Err(format!("{device}, which somebody has: {other:?}")),
            }
        }
    }
    Ok(())
}

/// Whether none of the groups' files that somebody has is of any use.
fn is_dead(holder: &Holder) -> bool {
    let wire = Arc::new(Wire::detached());
    let is_dead = |(given, fd): (&Value, &OwnedFd)| {
        let node = Node::Group(given["name"].as_str().unwrap_or_default().parse().unwrap_or(0));
        let group = Group::from_fd(wire.clone(), node, fd.try_clone().unwrap());
        given["kind"] == "lease" || given["kind"] == "container" || {
            given["kind"] == "group" && group.status().is_err()
        }
    };
    holder.given.iter().zip(&holder.fds).all(is_dead)
}

/// What was asked for can be asked for again.
fn goes_on(world: &World, case: Case, cast: &Cast) -> Checked {
    let Some(holder) = cast.holder.as_ref().filter(|it| it.stands()) else { return Ok(()) };
    match case.operation {
        Operation::Map | Operation::Unmap => {
            // Whether it is mapped, its holder may not have been told: afterwards it is not.
            let mut client = world.connect().ok_or("no connection")?;
            client.call("org.varlink.service.GetInfo", json!({})).ok();
            drop(holder.unmap(&mut client));
            match holder.map(&mut client) {
                Some(Reply::Ok(..)) => {}
                other => return Err(format!("it can't be mapped: {other:?}")),
            }
            match holder.unmap(&mut client) {
                Some(Reply::Ok(..)) => Ok(()),
                other => Err(format!("it can't be unmapped: {other:?}")),
            }
        }
        Operation::SetMemlock => {
            match world.call("SetMemlock", holder.with(&json!({ "bytes": RAISED }))) {
                Some(Reply::Ok(..)) => Ok(()),
                other => Err(format!("the limit can't be set: {other:?}")),
            }
        }
        _ => Ok(()),
    }
}

fn others_are_free(world: &World, cast: &Cast, taken: &BTreeSet<&str>) -> Checked {
    if cast.qemu.is_some() {
        return Ok(());
    }
    soon("what nobody holds is free", || {
        let Some(groups) = world.groups() else { return Some("Topology is not answered".into()) };
        let wrong = DEVICES
            .iter()
            .zip(groups)
            .find(|(device, state)| !taken.contains(*device) && state != "free");
        wrong.map(|(device, state)| format!("{device} is {state}"))
    })
}

fn released(world: &World, holder: &Holder) -> Checked {
    match world.call("Release", holder.key()) {
        Some(Reply::Ok(..)) => Ok(()),
        other => Err(format!("it can't be released: {other:?}")),
    }
}

/// Nothing is left of it, every device can be had, and the service can be ended.
fn ends(world: &World, files: Option<Files>) -> Result<Files, String> {
    soon("all is free", || {
        let Some(groups) = world.groups() else { return Some("Topology is not answered".into()) };
        groups.iter().any(|state| state != "free").then(|| format!("{groups:?}"))
    })?;
    for device in DEVICES {
        let held = Holder::acquire(world, Form::Container, device)?;
        has_its_devices(world, Form::Container, &held)?;
    }
    soon("no keeper is left", || {
        let keepers = world.keepers_with_leases();
        (!keepers.is_empty()).then(|| format!("{keepers:?}"))
    })?;
    soon("no other process is left", || {
        let mut names: Vec<_> = world.processes().into_iter().map(|(_, name)| name).collect();
        names.sort();
        (names != ["vfio-brokerd", "vfiob-broker", "vfiob-log"]).then(|| format!("{names:?}"))
    })?;
    idle(world)?;
    soon("no file is left open", || {
        let (now, most) = (world.open_files(), files.unwrap_or([usize::MAX; 2]));
        (now[0] > most[0] || now[1] > most[1]).then(|| format!("{now:?} are open, not {most:?}"))
    })?;
    let files = world.open_files();
    let _ = kill(world.launcher, Signal::SIGTERM);
    soon("the service ends", || {
        let _ = world.is_running();
        let left = world.processes();
        (!left.is_empty()).then(|| format!("{left:?}"))
    })?;
    idle(world)?;
    Ok(files)
}

fn idle(world: &World) -> Checked {
    soon("nothing is open in the kernel", || {
        let stats = world.sim.stats().unwrap();
        (!stats.is_idle()).then(|| format!("{stats:?}"))
    })
}
