//! What a person does, and mistakes that change nothing.

use super::*;
use crate::qemu::Guest;
use serde_json::{Value, json};
use vfio_broker::protocol::FdKind;
use vfio_broker::qmp::hotplug::Error;

#[test]
fn in_and_out_three_times_over() {
    let world = World::start();
    let fds = world.broker.settled_fds();
    for _ in 0..3 {
        let attached = world.attach(&nic().property("x-no-mmap", "on")).unwrap();
        assert_eq!((&*attached.device, &*attached.id), (NIC, "vfio-0000-65-00.0"));
        {
            let model = world.qemu.model();
            let (added, _) = &model.devices[&attached.id];
            let expected = json!({
                "driver": "vfio-pci", "id": attached.id, "bus": "port1", "x-no-mmap": true,
                "iommufd": "vfio-broker", "fd": "vfio-broker.device.vfio-0000-65-00.0",
            });
            assert_eq!(added, &expected);
            // The lease fd stays, the others have been taken out of their names.
            let names: Vec<_> = model.files.keys().collect();
            assert_eq!(names, ["vfio-broker.lease.vfio-0000-65-00.0"]);
            assert_eq!(model.iommufds.len(), 1, "one iommufd, however often");
        }
        assert_eq!(world.leases(), 1);
        let detached = world.detach(&Detach::new("web1", "65:00.0")).unwrap();
        assert_eq!((detached.lease, detached.id), (attached.lease, attached.id));
        assert!(detached.proved.is_some());
        world.is_clean();
    }
    world.broker.settles_at(fds);
}

#[test]
fn the_lease_fd_is_the_first_file_and_a_record_the_first_change() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    let model = world.qemu.model();
    let changes =
        model.commands.iter().filter(|command| !command.contains('-') || **command == "object-add");
    let changes: Vec<_> = changes.map(String::as_str).skip(1).collect();
    assert_eq!(changes, ["object-add", "getfd", "getfd", "object-add", "getfd", "device_add"]);
}

#[test]
fn two_devices_share_an_iommufd_and_go_one_by_one() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    world.attach(&Attach::new("web1", OTHER).bus("port2").id("second")).unwrap();
    {
        let model = world.qemu.model();
        let used: Vec<_> = model.devices.values().map(|(added, _)| &added["iommufd"]).collect();
        assert_eq!(used, ["vfio-broker", "vfio-broker"]);
        assert_eq!(model.iommufds.len(), 1);
    }
    assert_eq!(world.leases(), 2);
    world.detach(&Detach::new("web1", NIC)).unwrap();
    world.is_free(NIC);
    assert_eq!(world.leases(), 1);
    world.detach(&Detach::new("web1", "second")).unwrap();
    world.is_free(OTHER);
    world.is_clean();
}

#[test]
fn two_devices_of_a_group_share_a_lease() {
    let world = World::start();
    let [first, second] = PAIR;
    let one = world.attach(&Attach::new("web1", first)).unwrap();
    let two = world.attach(&Attach::new("web1", second)).unwrap();
    assert_eq!(one.lease, two.lease);
    // Nobody else's lease is joined.
    let error = world.attach(&Attach::new("web1", first).id("again")).unwrap_err();
    assert!(matches!(error, Error::AlreadyThere { .. }), "{error}");
    let detached = world.detach(&Detach::new("web1", first)).unwrap();
    assert_eq!(detached.proved, None);
    assert_eq!(world.leases(), 1);
    assert!(world.detach(&Detach::new("web1", second)).unwrap().proved.is_some());
    world.is_clean();
}

#[test]
fn a_device_that_left_a_lease_which_goes_on_can_come_again() {
    let world = World::start();
    let [first, second] = PAIR;
    let one = world.attach(&Attach::new("web1", first)).unwrap();
    for _ in 0..2 {
        let two = world.attach(&Attach::new("web1", second)).unwrap();
        assert_eq!(one.lease, two.lease);
        assert_eq!(world.detach(&Detach::new("web1", second)).unwrap().proved, None);
    }
    // In that QEMU alone: the lease has it.
    let other = Qemu::start();
    let mut monitor = Monitor::connect_within(other.path(), SOON).unwrap();
    let error =
        attach(&mut monitor, &mut world.client(), &Attach::new("web1", second)).unwrap_err();
    assert!(error.to_string().contains("busy"), "{error}");
    world.detach(&Detach::new("web1", first)).unwrap();
    world.is_clean();
    world.is_free(second);
}

#[test]
fn an_iommufd_of_the_command_line_can_be_shared() {
    let world = World::start();
    let request = Acquire::new("web1").device(OTHER).backend(Backend::Iommufd);
    let mut other = world.client().acquire(request).unwrap();
    let file = other.files_mut().take(FdKind::Iommufd, None).unwrap().fd;
    world.qemu.model().objects.insert("iommufd0".into(), ("iommufd".into(), Value::Null));
    world.qemu.model().iommufds.push(("iommufd0".into(), file));
    world.attach(&nic().iommufd("iommufd0")).unwrap();
    {
        let model = world.qemu.model();
        assert_eq!(model.devices["vfio-0000-65-00.0"].0["iommufd"], "iommufd0");
        assert_eq!((model.iommufds.len(), model.objects.len()), (1, 2));
    }
    world.client().release(other).unwrap();
    world.detach(&Detach::new("web1", NIC)).unwrap();
    world.is_clean();
}

#[test]
fn what_can_not_be_done_touches_nothing() {
    let world = World::start();
    let cases = [
        (nic().property("nosuch", "1"), "no such property"),
        (nic().property("x-no-mmap", "maybe"), "is no bool"),
        (nic().property("fd", "3"), "the broker's is used"),
        (nic().id("1st"), "beginning with a letter"),
        (nic().iommufd("iommufd9"), "no such iommufd object"),
    ];
    for (request, says) in cases {
        let error = world.attach(&request).unwrap_err();
        assert!(matches!(error, Error::BadRequest { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    for (lacks, says) in [
        ("iommufd", "built without iommufd"),
        ("vfio-pci", "no vfio-pci"),
        ("fd", "no property \"fd\""),
    ] {
        world.qemu.model().lacks = lacks;
        let error = world.attach(&nic()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    world.qemu.model().lacks = "";
    world.qemu.model().version = [8, 2, 9];
    let error = world.attach(&nic()).unwrap_err();
    assert!(error.to_string().contains("QEMU 8.2.9"), "{error}");
    assert!(error.advice().unwrap().contains("9.0.0 or newer"), "{error:?}");
    let touched = ["object-add", "object-del", "getfd", "device_add"];
    assert!(!world.qemu.model().commands.iter().any(|command| touched.contains(&&**command)));
    assert!(world.qemu.model().iommufds.is_empty());
    world.is_clean();
}

#[test]
fn what_the_broker_refuses_is_the_error() {
    let world = World::start();
    let error = world.attach(&Attach::new("web1", "0000:99:00.0")).unwrap_err();
    assert!(matches!(error, Error::Broker(_)), "{error}");
    let mut client = world.client();
    let _held = client.acquire(Acquire::new("other").device(NIC)).unwrap();
    let error = world.attach(&nic()).unwrap_err();
    assert!(error.to_string().contains("busy"), "{error}");
    assert_eq!(world.qemu.model().leftovers(), [""; 0]);
}

#[test]
fn a_guest_that_keeps_a_device_keeps_its_lease() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    for (guest, says) in [(Guest::Keeps, "has not let go"), (Guest::Refuses, "refuses")] {
        world.qemu.model().guest = guest;
        let request = Detach::new("web1", NIC).patience(Duration::from_millis(10));
        let error = world.detach(&request).unwrap_err();
        assert!(matches!(error, Error::GuestKeeps { .. }), "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!((world.leases(), world.qemu.model().devices.len()), (1, 1));
    }
    world.qemu.model().guest = Guest::LetsGo;
    world.detach(&Detach::new("web1", NIC)).unwrap();
    world.is_clean();
}

#[test]
fn a_device_that_went_by_itself_is_given_back_by_whoever_comes_next() {
    let world = World::start();
    for next in ["attach", "detach", "detach of something else"] {
        world.attach(&nic()).unwrap();
        // The guest ejected it, or somebody at the monitor did.
        world.qemu.model().devices.clear();
        match next {
            "attach" => drop(world.attach(&nic()).unwrap()),
            "detach" => {}
            _ => {
                let error = world.detach(&Detach::new("web1", OTHER)).unwrap_err();
                assert!(matches!(error, Error::NotAttached { .. }), "{error}");
                world.is_clean();
                continue;
            }
        }
        world.detach(&Detach::new("web1", NIC)).unwrap();
        world.is_clean();
    }
}

#[test]
fn another_vms_device_is_not_detached() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    let error = world.detach(&Detach::new("web2", NIC)).unwrap_err();
    assert!(error.to_string().contains("was not attached to web2"), "{error}");
    let whose = "what was: 0000:65:00.0 to web1";
    assert!(error.to_string().ends_with(whose), "{error}");
    assert_eq!(world.leases(), 1);
}

#[test]
fn objects_of_others_are_left_alone() {
    let world = World::start();
    let foreign =
        [("secret", "vfio-broker.x"), ("secret", "disk-key"), ("iothread", "vfio-broker.t")];
    for (kind, name) in foreign {
        let object = (kind.to_owned(), json!("not ours"));
        world.qemu.model().objects.insert(name.to_owned(), object);
    }
    world.attach(&nic()).unwrap();
    world.detach(&Detach::new("web1", NIC)).unwrap();
    for (_, name) in foreign {
        assert!(world.qemu.model().objects.contains_key(name), "{name}");
    }
}

#[test]
fn the_end_of_qemu_is_the_end_of_the_lease() {
    let world = World::start();
    world.attach(&nic()).unwrap();
    world.qemu.model().restart();
    until("the lease has ended", || world.leases() == 0);
    world.is_free(NIC);
}

#[test]
fn the_command_line_says_what_it_did() {
    let world = World::start();
    let socket = text(world.qemu.path()).to_owned();
    let run = |words: &[&str]| {
        let words: Vec<&str> =
            words.iter().copied().chain(["--vm", "web1", "--qmp", &socket]).collect();
        let output = vfio_broker(&world, &words).output().unwrap();
        let both = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(both).unwrap())
    };
    let options = ["--id", "nic", "--bus", "port1", "--property", "x-no-mmap=on"];
    let (code, said) = run(&[&["attach", "--device", NIC], &options[..]].concat());
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with("0000:65:00.0 is in web1 as nic, with lease "), "{said}");
    let (code, said) = run(&["attach", "--device", NIC]);
    assert_eq!((code, said.contains("in this QEMU already, as nic")), (1, true), "{said}");
    let (code, said) = run(&["attach", "--device", OTHER, "--bus", "nowhere"]);
    assert_eq!((code, said.contains("Bus 'nowhere' not found")), (1, true), "{said}");
    world.qemu.model().guest = Guest::Keeps;
    let (code, said) = run(&["detach", "--device", NIC, "--timeout", "0"]);
    assert_eq!((code, said.contains("-> look into the guest")), (1, true), "{said}");
    world.qemu.model().guest = Guest::LetsGo;
    let (code, said) = run(&["--json", "detach", "--device", "nic"]);
    assert_eq!(code, 0, "{said}");
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["device"], &said["released"]), (&json!(NIC), &json!(true)));
    let (code, said) = run(&["detach", "--device", "nic"]);
    assert_eq!((code, said.contains("nothing was")), (1, true), "{said}");
    world.is_clean();
}
