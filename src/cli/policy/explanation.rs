//! What a policy says about one caller and one device, and what else stands in the way.

use super::check::words;
use crate::cli::style::limit;
use crate::host::{Device, Group};
use crate::policy::{Decision, Peer, Policy, Risk, Tenant, Trust, Verb};
use crate::protocol::{Backend, Bdf, Handout};
use serde::Serialize;

/// What is known of the device.
pub(super) enum Found<'h> {
    /// Nothing: it is not there.
    Nowhere,
    /// It is there, in no IOMMU group.
    NoGroup,
    /// It is in this group.
    InGroup {
        group: &'h Group,
        device: &'h Device,
        /// The host lets devices be used without interrupt remapping.
        unsafe_interrupts: bool,
    },
}

/// All of the answer.
#[derive(Debug, Serialize)]
pub(super) struct Explanation {
    pub(super) uid: u32,
    pub(super) device: Bdf,
    /// Whether the policy lets the caller acquire the device.
    pub(super) allowed: bool,
    pub(super) tenant: Option<String>,
    /// Tenants before that one, and why they are not for the caller; all of them if none is.
    pub(super) passed_over: Vec<PassedOver>,
    /// The decisions that are needed, the first no at the end.
    pub(super) decisions: Vec<Step>,
    pub(super) handouts: Vec<Handout>,
    pub(super) backends: Vec<Backend>,
    pub(super) containers: Vec<Container>,
    /// Up to where the memlock limit is raised, in bytes; 0 is never.
    pub(super) memlock: u64,
    /// What denies the other functions of its group, which some handouts reach and others don't.
    #[serde(skip)]
    reached: Vec<Decision>,
    /// What would stop it although the policy does not.
    pub(super) obstacles: Vec<String>,
    /// What is good to know.
    pub(super) notes: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct PassedOver {
    tenant: String,
    line: usize,
    reason: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Step {
    /// What was asked.
    pub(super) about: String,
    #[serde(flatten)]
    pub(super) decision: Decision,
}

#[derive(Debug, Serialize)]
pub(super) struct Container {
    name: String,
    trust: Trust,
}

impl Explanation {
    /// Asks the policy everything that the broker would ask it.
    pub(super) fn new(policy: &Policy, peer: &Peer, device: Bdf, found: &Found<'_>) -> Self {
        let mut explanation = Self {
            uid: peer.uid,
            device,
            allowed: false,
            tenant: None,
            passed_over: passed_over(policy, peer),
            decisions: Vec::new(),
            handouts: Vec::new(),
            backends: Vec::new(),
            containers: Vec::new(),
            memlock: 0,
            reached: Vec::new(),
            obstacles: Vec::new(),
            notes: Vec::new(),
        };
        let tenant = policy.tenant(peer);
        match &tenant {
            Ok(tenant) => explanation.of_tenant(policy, tenant, peer, found),
            Err(refusal) => {
                let decision = Decision::from(refusal.clone());
                explanation.decisions.push(Step { about: "tenant".into(), decision });
            }
        }
        let may_have = |device: &Device| {
            tenant.as_ref().is_ok_and(|tenant| policy.device(tenant, &device.facts).allowed)
        };
        explanation.of_host(found, may_have);
        explanation
    }

    /// Asks for this handout too.
    pub(super) fn ask_for(&mut self, policy: &Policy, peer: &Peer, handout: Handout) {
        let Ok(tenant) = policy.tenant(peer) else { return };
        if let Err(refusal) = policy.handout(tenant, Some(handout)) {
            self.allowed = false;
            let decision = Decision::from(refusal);
            self.decisions.push(Step { about: "handout".into(), decision });
        }
        if matches!(handout, Handout::Container | Handout::Group) && !self.reached.is_empty() {
            self.allowed = false;
            let steps = self.reached.drain(..);
            self.decisions
                .extend(steps.map(|decision| Step { about: "companion".into(), decision }));
        }
    }

    fn of_tenant(&mut self, policy: &Policy, tenant: &Tenant, peer: &Peer, found: &Found<'_>) {
        self.tenant = Some(tenant.name.clone());
        self.handouts = tenant.handouts().to_vec();
        self.backends = tenant.backends().to_vec();
        self.memlock = tenant.memlock;
        let may_join = policy.containers().iter().filter(|c| c.members.contains(&tenant.name));
        let shown =
            |c: &crate::policy::SharedContainer| Container { name: c.name.clone(), trust: c.trust };
        self.containers = may_join.map(shown).collect();
        self.decide("right", policy.may(tenant, Verb::Acquire));
        if let Found::InGroup { group, device, unsafe_interrupts } = found {
            self.decide("device", policy.device(tenant, &device.facts));
            if group.noiommu {
                self.decide("risk", policy.risk(tenant, Risk::NoIommu));
            }
            if *unsafe_interrupts {
                self.decide("risk", policy.risk(tenant, Risk::UnsafeInterrupts));
            }
            self.of_companions(policy, tenant, group, device);
            self.allowed = self.decisions.iter().all(|step| step.decision.allowed);
        }
        let mut later = policy.tenants().iter().skip_while(|t| t.name != tenant.name).skip(1);
        if let Some(other) = later.find(|other| other.mismatch(peer).is_none()) {
            self.notes.push(format!(
                "tenant {:?} in line {} is for this caller too, and does not count: the first \
                 does",
                other.name,
                other.line()
            ));
        }
    }

    /// The rest of the group: whoever is handed the group's open file reaches all of it.
    fn of_companions(&mut self, policy: &Policy, tenant: &Tenant, group: &Group, device: &Device) {
        for other in group.devices.iter().filter(|d| d.bdf() != device.bdf() && !d.is_bridge()) {
            let (bdf, decision) = (other.bdf(), policy.device(tenant, &other.facts));
            let (alone, gives_group): (Vec<_>, Vec<_>) = tenant
                .handouts()
                .iter()
                .partition(|handout| matches!(handout, Handout::Devices | Handout::Iommufd));
            let names = |those: &[&Handout]| {
                those.iter().map(|handout| handout.name()).collect::<Vec<_>>().join(" or ")
            };
            if decision.allowed {
                self.notes.push(format!(
                    "{bdf} is in the same group, and {} be named too, to use or to withhold it{}",
                    if gives_group.is_empty() { "may" } else { "must" },
                    match (alone.is_empty(), gives_group.is_empty()) {
                        (false, false) => format!(", with handout {}", names(&gives_group)),
                        _ => String::new(),
                    }
                ));
            } else if !alone.is_empty() {
                self.notes.push(format!(
                    "{bdf} is in the same group, and denied: whoever is handed the group reaches \
                     it, so only handout {} is possible",
                    names(&alone)
                ));
                self.reached.push(decision);
            } else {
                let reason = format!(
                    "{}; whoever is handed the group reaches it too, and handout devices, which \
                     would not, is not among this tenant's",
                    decision.reason
                );
                self.decide("companion", Decision { reason, ..decision });
            }
        }
        if tenant.managed {
            self.notes.push("its driver is changed when it is acquired, and put back after".into());
        }
        if tenant.handouts().contains(&Handout::Iommufd) {
            let who = match tenant.rebind || tenant.managed {
                true => "the broker takes it off its driver and binds it again",
                false => "an administrator has taken it off its driver (or rebind = true)",
            };
            self.notes
                .push(format!("after a lease by iommufd no other tenant can have it until {who}"));
        }
        if device.sriov {
            self.notes.push("it can have VFs: it and they go to one tenant at a time".into());
        }
    }

    fn of_host(&mut self, found: &Found<'_>, may_have: impl Fn(&Device) -> bool) {
        let bdf = self.device;
        match found {
            Found::Nowhere => self.obstacles.push(format!(
                "there is no device {bdf} on this host, so the policy can't be asked about its ids"
            )),
            Found::NoGroup => self.obstacles.push(format!(
                "{bdf} is in no IOMMU group: is the IOMMU on (intel_iommu=on, or in the firmware)?"
            )),
            Found::InGroup { device, .. } if device.is_bridge() => {
                self.obstacles.push(format!("{bdf} is a bridge: it cannot be handed out"));
            }
            Found::InGroup { group, device, .. } => {
                // How to take a device from the host is told to those who may have it only.
                let told = self.allowed;
                if !device.on_vfio {
                    let own = device.blocker(told).with_fix();
                    self.obstacles.push(format!("not on a VFIO driver: {own}"));
                    if device.console {
                        self.obstacles.push(format!("the host's console is on {bdf}"));
                    }
                }
                let blockers = group.blockers(|other| told && may_have(other)).into_iter();
                for other in blockers.filter(|blocker| blocker.bdf != bdf.to_string()) {
                    let other = other.with_fix();
                    self.obstacles.push(format!("group {} is not viable: {other}", group.id));
                }
            }
        }
    }

    fn decide(&mut self, about: &str, decision: Decision) {
        self.decisions.push(Step { about: about.into(), decision });
    }

    /// Yes, no, or that it can't be told because the device is not there.
    pub(super) fn verdict(&self) -> Option<bool> {
        let refused = self.decisions.iter().any(|step| !step.decision.allowed);
        if self.allowed || refused { Some(self.allowed) } else { None }
    }

    /// For a person.
    pub(super) fn text(&self, style: crate::cli::style::Style) -> String {
        let mut text = String::new();
        let mut line = |line: String| text += &(line + "\n");
        let (uid, device) = (self.uid, self.device);
        let verdict = match self.verdict() {
            Some(true) => style.green("allowed"),
            Some(false) => style.red("denied"),
            None => style.yellow("not known"),
        };
        line(format!("uid {uid} acquires {device}: {}", style.bold(&verdict)));
        for passed in &self.passed_over {
            let PassedOver { tenant, line: at, reason } = passed;
            line(style.dim(&format!("  not tenant {tenant:?} (line {at}): {reason}")));
        }
        if let Some(tenant) = &self.tenant {
            line(format!("  is tenant {tenant:?}"));
        }
        for Step { decision: Decision { allowed, rule, reason, .. }, .. } in &self.decisions {
            let sign = if *allowed { style.green("yes") } else { style.red("no ") };
            line(format!("  {sign} {reason}"));
            line(format!("      {}", style.dim(&format!("rule: {rule}"))));
        }
        if self.tenant.is_some() {
            line(format!("  handouts: {} (the first unless asked)", words(&self.handouts)));
            line(format!("  backends: {}", words(&self.backends)));
            let each = self.containers.iter();
            let each: Vec<_> =
                each.map(|c| format!("{} ({})", c.name, words(&[c.trust]))).collect();
            let each = if each.is_empty() { "none".into() } else { each.join(", ") };
            line(format!("  shared containers: {each}"));
            line(match self.memlock {
                0 => "  memlock: not raised".into(),
                most => format!("  memlock: raised up to {}", limit(most)),
            });
        }
        for obstacle in &self.obstacles {
            line(format!("  {} {obstacle}", style.red("!")));
        }
        for note in &self.notes {
            line(format!("  {} {note}", style.dim("-")));
        }
        text
    }
}

/// The tenants before the one that `peer` is.
fn passed_over(policy: &Policy, peer: &Peer) -> Vec<PassedOver> {
    let each = policy.tenants().iter().map_while(|tenant| {
        let reason = tenant.mismatch(peer)?;
        Some(PassedOver { tenant: tenant.name.clone(), line: tenant.line(), reason })
    });
    each.collect()
}
