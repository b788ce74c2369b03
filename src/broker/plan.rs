//! From what an Acquire asks for to devices and groups, as far as the policy and the machine allow.

use super::books::Books;
use super::candidates::{Candidates, fits};
use super::form::{Given, same_form};
use super::{Broker, Caller, error};
use crate::host::{self, Device, Group, Place, allows};
use crate::ledger::{Lease, LeaseId, Member, Space, WantedGroup};
use crate::policy::Tenant;
use crate::protocol::{Acquire, Bdf, DeviceSpec, Error, Handout, is_uuid};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What an Acquire comes to. Which device stands for "any of that kind" is decided last, together
/// with entering it into the ledger.
pub(super) struct Plan {
    pub(super) handout: Handout,
    pub(super) space: Space,
    groups: BTreeMap<u32, Rc<Group>>,
    slots: Vec<Slot>,
    withhold: Vec<(Bdf, u32)>,
    vf_token: Option<String>,
}

enum Slot {
    This(Bdf, u32),
    AnyOf(DeviceSpec, Vec<(Bdf, u32)>),
}

/// A plan with its devices chosen.
pub(super) struct Chosen {
    pub(super) groups: Vec<WantedGroup>,
    /// The devices to use, in the order of the request.
    pub(super) devices: Vec<(Bdf, u32)>,
    /// How the kernel is asked for those that want a token.
    pub(super) names: BTreeMap<Bdf, String>,
}

impl Broker {
    /// Checks a request against policy and machine. `lease` is the one it adds to, `candidates` what it may
    /// choose from.
    pub(super) fn plan(
        &self,
        tenant: &Tenant,
        request: &Acquire,
        lease: Option<&Lease>,
        candidates: Option<&Candidates>,
    ) -> Result<Plan, Error> {
        let mut groups = BTreeMap::new();
        let mut slots = Vec::new();
        let mut all = candidates.map_or_else(BTreeMap::new, |it| it.groups.clone());
        for spec in &request.devices {
            slots.push(match spec {
                DeviceSpec::Bdf { bdf } => Slot::This(*bdf, self.look(tenant, *bdf, &mut groups)?),
                DeviceSpec::Mdev { .. } => {
                    let why = "this broker has no mediated devices yet".into();
                    return Err(Error::Unsupported { what: spec.to_string(), why });
                }
                DeviceSpec::VfOf { .. } | DeviceSpec::Kind { .. } => {
                    let those = all.values().flat_map(|group| {
                        let fitting = group.devices.iter().filter(|device| fits(spec, device));
                        fitting.map(|device| (device.bdf(), group.id))
                    });
                    Slot::AnyOf(spec.clone(), those.collect())
                }
            });
        }
        let mut withhold = Vec::new();
        for spec in request.withhold.as_deref().unwrap_or_default() {
            let DeviceSpec::Bdf { bdf } = spec else {
                return Err(Error::bad("withhold", "name each device by its address"));
            };
            withhold.push((*bdf, self.look(tenant, *bdf, &mut groups)?));
        }
        // What was read for itself is newer than what was read with everything.
        all.append(&mut groups);
        let (handout, space) = match lease {
            Some(lease) => same_form(lease, request)?,
            None => self.form(tenant, request, &given(&slots, &all))?,
        };
        let vf_token = check_token(request.vf_token.as_deref(), handout)?;
        let mut plan = Plan { handout, space, groups: all, slots, withhold, vf_token };
        self.check(tenant, &mut plan)?;
        Self::check_companions(&mut plan, lease)?;
        Ok(plan)
    }

    /// Finds a device that was named, and reads its group.
    fn look(
        &self,
        tenant: &Tenant,
        bdf: Bdf,
        groups: &mut BTreeMap<u32, Rc<Group>>,
    ) -> Result<u32, Error> {
        let nowhere = || Error::NoSuchDevice { device: bdf.to_string() };
        let id = match host::find(&*self.kernel, bdf)? {
            Place::Group(id) => id,
            Place::Nowhere => return Err(nowhere()),
            Place::NoGroup => {
                let device = Device::scan(&*self.kernel, bdf)?.ok_or_else(nowhere)?;
                self.policy().device(tenant, &device.facts).ok().map_err(Error::from)?;
                return Err(Error::Unsupported {
                    what: bdf.to_string(),
                    why: format!(
                        "it is in no IOMMU group: switch the IOMMU on (VT-d or AMD-Vi in the \
                         firmware, intel_iommu=on), or have no-IOMMU mode on \
                         (vfio.enable_unsafe_noiommu_mode=1) and the device on vfio-pci{}",
                        device.fix().map_or(String::new(), |fix| format!(" ({fix})"))
                    ),
                });
            }
        };
        let group = match groups.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let mut group = Group::scan(&*self.kernel, id)?.ok_or_else(nowhere)?;
                let policy = self.policy();
                if policy.names_serials() {
                    group.read_serials(&*self.kernel, policy.serials())?;
                }
                place.insert(Rc::new(group))
            }
        };
        group.device(bdf).map(|_| id).ok_or_else(nowhere)
    }

    /// Each device, and each group it brings with it, against policy and machine; of those that
    /// only might be taken, what does not pass is left out.
    fn check(&self, tenant: &Tenant, plan: &mut Plan) -> Result<(), Error> {
        let unsafe_interrupts = host::allows_unsafe_interrupts(&*self.kernel)?;
        let check = |bdf: Bdf, id: u32, groups: &BTreeMap<u32, Rc<Group>>, used: bool| {
            let found = groups.get(&id).and_then(|group| group.device(bdf).map(|d| (group, d)));
            let (group, device) =
                found.ok_or_else(|| Error::NoSuchDevice { device: bdf.to_string() })?;
            self.may_have(tenant, group, device, plan.handout, unsafe_interrupts, used)
        };
        for slot in &mut plan.slots {
            match slot {
                Slot::This(bdf, id) => check(*bdf, *id, &plan.groups, true)?,
                Slot::AnyOf(spec, those) => {
                    let none = Error::NoSuchDevice { device: spec.to_string() };
                    let mut why = None;
                    those.retain(|(bdf, id)| match check(*bdf, *id, &plan.groups, true) {
                        Ok(()) => true,
                        Err(error) => {
                            why.get_or_insert(error);
                            false
                        }
                    });
                    if those.is_empty() {
                        return Err(why.unwrap_or(none));
                    }
                }
            }
        }
        for (bdf, id) in &plan.withhold {
            check(*bdf, *id, &plan.groups, false)?;
        }
        Ok(())
    }

    /// Each companion of a group that is given must be named, whatever driver it is on: that can be
    /// VFIO's later. A bridge never leaves its own. Of those that only might be taken, what brings one
    /// with it that nobody names is left out.
    fn check_companions(plan: &mut Plan, lease: Option<&Lease>) -> Result<(), Error> {
        if !plan.handout.gives_group() {
            return Ok(());
        }
        let mut named: BTreeSet<Bdf> = plan.withhold.iter().map(|(bdf, _)| *bdf).collect();
        named.extend(lease.iter().flat_map(|lease| &lease.devices).map(|handed| handed.bdf));
        for slot in &plan.slots {
            match slot {
                Slot::This(bdf, _) => drop(named.insert(*bdf)),
                Slot::AnyOf(..) => {}
            }
        }
        let unnamed = |chosen: Bdf, id: u32| {
            let group = plan.groups.get(&id)?;
            let rest = group.devices.iter().filter(|device| !device.is_bridge());
            let rest = rest.map(Device::bdf).filter(|bdf| *bdf != chosen && !named.contains(bdf));
            let companions: Vec<_> = rest.map(|bdf| bdf.to_string()).collect();
            (!companions.is_empty()).then_some(Error::Unnamed { group: id, companions })
        };
        for slot in &mut plan.slots {
            match slot {
                Slot::This(bdf, id) => unnamed(*bdf, *id).map_or(Ok(()), Err)?,
                Slot::AnyOf(_, those) => {
                    let why = those.first().and_then(|(bdf, id)| unnamed(*bdf, *id));
                    those.retain(|(bdf, id)| unnamed(*bdf, *id).is_none());
                    if let Some(why) = why.filter(|_| those.is_empty()) {
                        return Err(why);
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the tenant may have a device in this form, and whether the machine can give it.
    fn may_have(
        &self,
        tenant: &Tenant,
        group: &Group,
        device: &Device,
        handout: Handout,
        unsafe_interrupts: bool,
        used: bool,
    ) -> Result<(), Error> {
        let policy = self.policy();
        allows(&policy, tenant, group, device, handout, unsafe_interrupts)?;
        if used && device.is_bridge() {
            let why = "it is a bridge, which cannot be handed out".into();
            return Err(Error::Unsupported { what: device.bdf().to_string(), why });
        }
        let mut blockers = group.blockers(|other| policy.device(tenant, &other.facts).allowed);
        if used && !device.on_vfio && blockers.iter().all(|b| b.bdf != device.bdf().to_string()) {
            blockers.insert(0, device.blocker(true));
        }
        if !blockers.is_empty() {
            return Err(Error::NotViable { group: group.id, blockers });
        }
        if used && handout == Handout::Iommufd && device.cdev.is_none() {
            return Err(error::no_cdev(device.bdf()));
        }
        Ok(())
    }

    /// Decides which devices stand for "any of that kind": the free ones with the lowest
    /// addresses. The caller enters them into the ledger before anything else can happen.
    pub(super) fn choose(
        &self,
        caller: &Caller,
        books: &Books,
        plan: &Plan,
        lease: LeaseId,
        tenant: &str,
    ) -> Result<Chosen, Error> {
        let named = plan.slots.iter().filter_map(|slot| match slot {
            Slot::This(bdf, _) => Some(*bdf),
            Slot::AnyOf(..) => None,
        });
        let mut taken: Vec<Bdf> = named.chain(plan.withhold.iter().map(|(bdf, _)| *bdf)).collect();
        let free = |bdf: Bdf, id: u32| match books.ledger.group(id) {
            None => books.ledger.is_open_to(id, tenant),
            Some(group) if group.lease == lease => books
                .ledger
                .live(group.lease)
                .is_some_and(|lease| lease.devices.iter().all(|handed| handed.bdf != bdf)),
            Some(_) => false,
        };
        let mut devices = Vec::new();
        for slot in &plan.slots {
            devices.push(match slot {
                Slot::This(bdf, id) => (*bdf, *id),
                Slot::AnyOf(spec, those) => {
                    let mut each = those.iter();
                    let found = each.find(|(bdf, id)| !taken.contains(bdf) && free(*bdf, *id));
                    let (bdf, id) =
                        found.ok_or_else(|| self.busy(caller, spec.to_string(), None))?;
                    taken.push(*bdf);
                    (*bdf, *id)
                }
            });
        }
        Ok(plan.chosen(devices))
    }
}

impl Plan {
    /// Whether a group might be in it.
    pub(super) fn concerns(&self, group: u32) -> bool {
        self.slots.iter().any(|slot| match slot {
            Slot::This(_, id) => *id == group,
            Slot::AnyOf(_, those) => those.iter().any(|(_, id)| *id == group),
        })
    }

    fn chosen(&self, devices: Vec<(Bdf, u32)>) -> Chosen {
        let mut wanted = BTreeMap::<u32, WantedGroup>::new();
        let mut names = BTreeMap::new();
        let used = devices.iter().map(|device| (device, true));
        for ((bdf, id), used) in used.chain(self.withhold.iter().map(|device| (device, false))) {
            let Some(group) = self.groups.get(id) else { continue };
            let entry = wanted.entry(*id).or_insert_with(|| WantedGroup {
                id: *id,
                noiommu: group.noiommu,
                members: members(group),
                devices: Vec::new(),
                withhold: Vec::new(),
            });
            if used {
                entry.devices.push(*bdf)
            } else {
                entry.withhold.push(*bdf)
            }
            // A device that can have no token refuses one.
            let takes_token = |d: &Device| d.facts.physfn.is_some() || d.sriov;
            if let Some(token) = &self.vf_token
                && group.device(*bdf).is_some_and(takes_token)
            {
                names.insert(*bdf, format!("{bdf} vf_token={token}"));
            }
        }
        Chosen { groups: wanted.into_values().collect(), devices, names }
    }
}

/// What the devices have to do with the form of the lease. Of "any of a kind" one that fits is
/// enough.
fn given(slots: &[Slot], groups: &BTreeMap<u32, Rc<Group>>) -> Given {
    let found = |(bdf, id): &(Bdf, u32)| {
        groups.get(id).and_then(|group| Some((group.noiommu, group.device(*bdf)?)))
    };
    let mut given = Given { noiommu: false, without_cdev: None };
    for (at, slot) in slots.iter().enumerate() {
        let those: Vec<_> = match slot {
            Slot::This(bdf, id) => found(&(*bdf, *id)).into_iter().collect(),
            Slot::AnyOf(_, those) => those.iter().filter_map(found).collect(),
        };
        if at == 0 {
            given.noiommu = those.first().is_some_and(|(noiommu, _)| *noiommu);
        }
        let mut on_vfio = those.iter().map(|(_, device)| device).filter(|device| device.on_vfio);
        let first = on_vfio.clone().next().map(|device| device.bdf());
        if on_vfio.all(|device| device.cdev.is_none()) {
            given.without_cdev = given.without_cdev.or(first);
        }
    }
    given
}

fn members(group: &Group) -> Vec<Member> {
    let on_vfio = group.devices.iter().filter(|device| device.on_vfio);
    on_vfio.map(|device| Member { bdf: device.bdf(), physfn: device.facts.physfn }).collect()
}

/// A token is a UUID and nothing else: it becomes part of what the kernel parses.
fn check_token(token: Option<&str>, handout: Handout) -> Result<Option<String>, Error> {
    let Some(token) = token else { return Ok(None) };
    if !is_uuid(token) {
        return Err(Error::bad("vf_token", "a token is a UUID"));
    }
    if handout != Handout::Devices {
        let why = "with this handout the holder opens the devices, and gives the token, itself";
        return Err(Error::bad("vf_token", why));
    }
    Ok(Some(token.to_owned()))
}
