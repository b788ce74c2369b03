//! What an Acquire may name, and how "any of that kind" is chosen.

use super::*;

fn denied(error: Error) -> String {
    match error {
        Error::Denied { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn a_companion_in_reach_must_be_allowed_too() {
    let world = World::new();
    let reason = denied(world.acquire(1003, &want(&["0000:01:00.0"])).unwrap_err());
    assert!(reason.contains("0000:01:00.1"), "{reason}");
    let grant = world.acquire(1003, &want_as(Handout::Devices, &["0000:01:00.0"])).unwrap();
    drop(grant);
    let withhold = Some(specs(&["0000:01:00.1"]));
    let request = Acquire { withhold, ..want_as(Handout::Devices, &["0000:01:00.0"]) };
    let reason = denied(world.acquire(1003, &request).unwrap_err());
    assert!(reason.contains("0000:01:00.1"), "{reason}");
}

#[test]
fn a_companion_of_a_group_that_is_given_must_be_named_whatever_driver_it_is_on() {
    let world = World::new();
    let unnamed = |request: &Acquire| match world.acquire(1000, request).unwrap_err() {
        Error::Unnamed { group, companions } => (group, companions.join(" ")),
        other => panic!("{other}"),
    };
    // Without a driver, as 0000:03:00.1, it can be on VFIO's a moment later.
    assert_eq!(unnamed(&want(&["0000:03:00.0"])), (3, "0000:03:00.1".into()));
    let group = want_as(Handout::Group, &["0000:01:00.0"]);
    assert_eq!(unnamed(&group), (1, "0000:01:00.1".into()));
    world.assert_idle();
    drop(world.acquire(1000, &withholding("0000:03:00.1", want(&["0000:03:00.0"]))).unwrap());
    drop(world.acquire(1000, &withholding("0000:01:00.1", group)).unwrap());
    world.serve_hang_ups();
    drop(world.acquire(1000, &want(&["0000:01:00.0", "0000:01:00.1"])).unwrap());
    world.serve_hang_ups();
    // Who is handed devices alone reaches no other.
    drop(world.acquire(1000, &want_as(Handout::Devices, &["0000:01:00.0"])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn what_stands_in_the_way_is_named_with_its_remedy() {
    let world = World::new();
    let Error::NotViable { group: 4, blockers } =
        world.acquire(1000, &want(&["0000:04:00.0"])).unwrap_err()
    else {
        panic!("it is not viable")
    };
    assert_eq!(blockers[0].to_string(), "0000:04:00.1 is on i40e");
    assert!(blockers[0].with_fix().contains("i40e: simulated: give it driver"));
    // A function without a driver does not block, but can't be used.
    let error = world.acquire(1000, &want(&["0000:03:00.1", "0000:03:00.0"])).unwrap_err();
    let Error::NotViable { blockers, .. } = error else { panic!("{error}") };
    assert_eq!(blockers[0].to_string(), "0000:03:00.1 has no driver");
    let fix = blockers[0].fix.as_deref().unwrap();
    assert!(fix.starts_with("simulated:"), "{fix}");
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn any_of_a_kind_is_the_first_that_is_free_and_allowed() {
    let world = World::new();
    let bdf = "0000:05:00.0".parse().unwrap();
    let kind = |vendor: &str, device: &str| DeviceSpec::Kind {
        vendor: vendor.into(),
        device: device.into(),
    };
    let one = |spec| Acquire { devices: vec![spec], ..want(&[]) };
    let first = world.acquire(1000, &one(kind("8086", "10d3"))).unwrap();
    assert_eq!(first.reply.devices, ["0000:02:00.0"]);
    let second = world.acquire(1000, &one(kind("8086", "10d3"))).unwrap();
    assert_eq!(second.reply.devices, ["0000:08:00.0"]);
    let none = world.acquire(1000, &one(kind("8086", "10d3"))).unwrap_err();
    assert!(matches!(none, Error::Busy { holder: None, .. }), "{none}");
    drop((first, second));
    world.serve_hang_ups();
    let both = Acquire {
        devices: vec![kind("8086", "10d3"), specs(&["0000:02:00.0"]).remove(0)],
        ..want(&[])
    };
    let grant = world.acquire(1000, &both).unwrap();
    assert_eq!(grant.reply.devices, ["0000:08:00.0", "0000:02:00.0"]);
    drop(grant);
    world.serve_hang_ups();
    let unknown = world.acquire(1000, &one(kind("dead", "beef"))).unwrap_err();
    assert!(matches!(unknown, Error::NoSuchDevice { .. }));
    denied(world.acquire(1002, &one(DeviceSpec::VfOf { vf_of: bdf })).unwrap_err());
    let blocked = world.acquire(1000, &one(kind("8086", "1572"))).unwrap_err();
    assert!(matches!(blocked, Error::NotViable { .. }), "{blocked}");
    let vfs = |world: &World| {
        world
            .acquire(1000, &one(DeviceSpec::VfOf { vf_of: bdf }))
            .map(|grant| (grant.reply.devices.clone(), grant))
    };
    let (devices, _first) = vfs(&world).unwrap();
    assert_eq!(devices, ["0000:05:00.1"]);
    let (devices, _second) = vfs(&world).unwrap();
    assert_eq!(devices, ["0000:05:00.2"]);
}

#[test]
fn a_token_reaches_the_kernel_and_nothing_else_does() {
    let world = World::new();
    let token = "00112233-4455-6677-8899-aabbccddeeff";
    let with = |token: &str, devices: &[&str]| Acquire {
        vf_token: Some(token.into()),
        ..want_as(Handout::Devices, devices)
    };
    let vf = ["0000:05:00.1"];
    let missing = world.acquire(1000, &want_as(Handout::Devices, &vf)).unwrap_err();
    assert!(advice(&missing).unwrap().contains("vf_token"), "{missing}");
    world.assert_idle();
    let wrong = with("00112233-4455-6677-8899-aabbccddee00", &vf);
    assert!(matches!(world.acquire(1000, &wrong), Err(Error::Kernel { .. })));
    for odd in ["", "x", &format!("{token} "), &token.replace('-', "0"), "0000:05:00.1 vf_token=x"]
    {
        let error = world.acquire(1000, &with(odd, &vf)).unwrap_err();
        assert!(matches!(error, Error::BadRequest { .. }), "{error}");
    }
    // Beside a device that takes none, and once more when the files are asked for again.
    let grant = world.acquire(1000, &with(token, &["0000:05:00.1", "0000:02:00.0"])).unwrap();
    world.get_fds(1000, &get_fds(&grant.reply)).unwrap();
    let container = Acquire { vf_token: Some(token.into()), ..want(&["0000:05:00.2"]) };
    assert!(matches!(world.acquire(1000, &container), Err(Error::BadRequest { .. })));
    drop(grant);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_pf_and_its_vfs_are_one_tenants() {
    let world = World::new();
    let pf = world.acquire(1000, &want(&["0000:05:00.0"])).unwrap();
    let conflict = world.acquire(1001, &want(&["0000:05:00.1"])).unwrap_err();
    assert!(matches!(conflict, Error::Conflict { .. }), "{conflict}");
    drop(world.acquire(1000, &want(&["0000:05:00.1"])).unwrap());
    drop(pf);
    world.serve_hang_ups();
    let _vf = world.acquire(1001, &want(&["0000:05:00.1"])).unwrap();
    let conflict = world.acquire(1000, &want(&["0000:05:00.0"])).unwrap_err();
    assert!(matches!(conflict, Error::Conflict { .. }), "{conflict}");
}

#[test]
fn what_is_not_there_is_said_plainly() {
    let world = World::new();
    let error = |request: &Acquire| world.acquire(1000, request).unwrap_err();
    let nowhere = error(&want(&["0000:99:00.0"]));
    assert_eq!(nowhere, Error::NoSuchDevice { device: "0000:99:00.0".into() });
    let mdev = DeviceSpec::Mdev { mdev: "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001".into() };
    let mdev = Acquire { devices: vec![mdev], ..want(&[]) };
    assert!(matches!(error(&mdev), Error::Unsupported { .. }));
    denied(error(&want_in("nowhere", &["0000:02:00.0"])));
    denied(world.acquire(1002, &want_in("pool", &["0000:02:00.0"])).unwrap_err());
    denied(world.acquire(1004, &want(&["0000:02:00.0"])).unwrap_err());
    world.assert_idle();
}

const NO_IOMMU: &str = r#"
kernel = "6.12"
noiommu = true
interrupt_remapping = false
reserved = []
[[group]]
id = 0
noiommu = true
device = [{ bdf = "0000:00:03.0", vendor = 0x1af4, device = 0x1041, driver = "vfio-pci" }]
"#;

fn one_tenant(accept: &str) -> String {
    format!(
        "version = 1\n[[tenant]]\nname = \"a\"\nuser = 1000\ndevices = [\"1af4:1041\"]\n\
         handouts = [\"container\", \"devices\"]\n{accept}\n"
    )
}

#[test]
fn no_iommu_wants_its_risk_named_and_gives_devices_only() {
    let world = World::of(NO_IOMMU, &one_tenant(""));
    let reason = denied(world.acquire(1000, &want(&["0000:00:03.0"])).unwrap_err());
    assert!(reason.contains("no-iommu"), "{reason}");
    let world = World::of(NO_IOMMU, &one_tenant("accept = [\"no-iommu\"]"));
    let container = want_as(Handout::Container, &["0000:00:03.0"]);
    assert!(matches!(world.acquire(1000, &container), Err(Error::Conflict { .. })));
    world.assert_idle();
    if !nix::unistd::Uid::effective().is_root() {
        return; // Opening the group wants CAP_SYS_RAWIO, in the simulation too.
    }
    let grant = world.acquire(1000, &want(&["0000:00:03.0"])).unwrap();
    assert_eq!((grant.reply.handout, &*grant.reply.iommu), (Handout::Devices, "noiommu"));
    let error = world.map(1000, &grant.reply, 0, 4096).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    drop(grant);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn without_interrupt_remapping_the_risk_is_named_or_nothing_happens() {
    let machine = |unsafe_interrupts: bool| {
        format!(
            "kernel = \"6.12\"\ninterrupt_remapping = false\n\
             allow_unsafe_interrupts = {unsafe_interrupts}\n[[group]]\nid = 2\n\
             device = [{{ bdf = \"0000:02:00.0\", vendor = 0x1af4, device = 0x1041, driver = \"vfio-pci\" }}]\n"
        )
    };
    let world = World::of(&machine(false), &one_tenant(""));
    let error = world.acquire(1000, &want(&["0000:02:00.0"])).unwrap_err();
    assert!(advice(&error).unwrap().contains("allow_unsafe_interrupts"), "{error}");
    world.assert_idle();
    let world = World::of(&machine(true), &one_tenant(""));
    let reason = denied(world.acquire(1000, &want(&["0000:02:00.0"])).unwrap_err());
    assert!(reason.contains("unsafe-interrupts"), "{reason}");
    let world = World::of(&machine(true), &one_tenant("accept = [\"unsafe-interrupts\"]"));
    drop(world.acquire(1000, &want(&["0000:02:00.0"])).unwrap());
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn a_serial_number_is_asked_for_where_the_policy_names_one() {
    let machine = "kernel = \"6.12\"\n[[group]]\nid = 2\ndevice = [{ bdf = \"0000:02:00.0\", \
                   vendor = 0x1af4, device = 0x1041, driver = \"vfio-pci\", config = \
                   [{ at = 0x100, hex = \"03000100 01c3a0ff ff211b00\" }] }]\n";
    let policy = |serial: &str| {
        let device =
            format!("{{ bdf = \"0000:02:00.0\", id = \"1af4:1041\", serial = \"{serial}\" }}");
        format!("version = 1\n[[tenant]]\nname = \"a\"\nuser = 1000\ndevices = [{device}]\n")
    };
    let world = World::of(machine, &policy("00-1b-21-ff-ff-a0-c3-01"));
    drop(world.acquire(1000, &want(&["0000:02:00.0"])).unwrap());
    let world = World::of(machine, &policy("00-1b-21-ff-ff-a0-c3-02"));
    let reason = denied(world.acquire(1000, &want(&["0000:02:00.0"])).unwrap_err());
    assert!(reason.contains("00-1b-21-ff-ff-a0-c3-01"), "{reason}");
}

#[test]
fn a_bridge_is_not_handed_out_whatever_the_policy_says() {
    let machine = "kernel = \"6.12\"\n[[group]]\nid = 1\ndevice = [{ bdf = \"0000:00:01.0\", \
                   vendor = 1, device = 1, class = 0x060400, driver = \"pcieport\", bridge = true }]\n";
    let policy = "version = 1\n[[tenant]]\nname = \"a\"\nuser = 1000\ndevices = [\"0001:0001\"]\n";
    let world = World::of(machine, policy);
    let error = world.acquire(1000, &want(&["0000:00:01.0"])).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(!error.to_string().contains("unbind"), "{error}");
}
