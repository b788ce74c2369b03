//! A QEMU that is somebody's who has broken into it, while a manager works with it.

use super::*;
use serde_json::json;
use vfio_broker::client::Lease;

/// Whoever may work on others' leases.
const MANAGER: &str = r#"
version = 1
[[tenant]]
name = "everybody"
anyone = true
rights = ["acquire", "manage"]
devices = ["8086:10d3"]
handouts = ["container", "iommufd"]
"#;

/// Another VM's lease, of which this QEMU knows the public name, and makes a record of its own.
fn forge(world: &World, client: &mut Client, device: &str, key: &str) -> Lease {
    let request = Acquire::new("other").device(device).backend(Backend::Iommufd);
    let lease = client.acquire(request).unwrap();
    let record = json!({ "vm": "web1", "device": "x", "lease": lease.id(), "key": key });
    let object = ("secret".to_owned(), record.to_string().into());
    world.qemu.model().objects.insert("vfio-broker.forged".into(), object);
    lease
}

/// No key, and a wrong one.
const KEYS: [&str; 2] = ["", "00000000000000000000000000000000"];

#[test]
fn a_forged_record_ends_no_lease_of_another_vm() {
    let world = World::with_policy(MANAGER);
    let mut client = world.client();
    for key in KEYS {
        let lease = forge(&world, &mut client, NIC, key);
        assert!(world.detach(&Detach::new("web1", OTHER)).is_err(), "nothing is there");
        assert_eq!(world.leases(), 1, "key {key:?}");
        world.attach(&Attach::new("web1", OTHER).bus("port1")).unwrap();
        world.detach(&Detach::new("web1", OTHER)).unwrap();
        assert_eq!(world.leases(), 1, "key {key:?}");
        client.release(lease).unwrap();
    }
}

#[test]
fn a_forged_record_opens_no_lease_of_another_vm() {
    let world = World::with_policy(MANAGER);
    let mut client = world.client();
    for key in KEYS {
        let lease = forge(&world, &mut client, PAIR[0], key);
        // As if the device were there: else the record is cleared.
        let file = std::fs::File::open("/dev/null").unwrap().into();
        world.qemu.model().devices.insert("forged".into(), (json!({}), file));
        assert!(world.attach(&Attach::new("other", PAIR[1])).is_err());
        let held = client.leases().unwrap();
        assert_eq!(held[0].devices, [PAIR[0]], "key {key:?}");
        let model = world.qemu.model();
        assert!(!model.commands.iter().any(|command| command == "getfd"), "nothing was given");
        drop(model);
        world.qemu.model().restart();
        client.release(lease).unwrap();
    }
}

#[test]
fn a_record_that_is_none_is_told_to_nobody() {
    let world = World::start();
    let good = |device: &str| json!({ "vm": "web1", "device": device, "lease": "l", "key": "k" });
    for (id, record) in [
        ("forged", good("; run `evil`")),
        ("; run `evil`", good(NIC)),
        ("forged", json!({ "vm": "", "device": NIC, "lease": "l", "key": "k" })),
    ] {
        let object = ("secret".to_owned(), record.to_string().into());
        let file = std::fs::File::open("/dev/null").unwrap().into();
        let mut model = world.qemu.model();
        model.objects.insert(format!("vfio-broker.{id}"), object);
        model.devices.insert(id.into(), (json!({}), file));
        drop(model);
        let error = world.detach(&Detach::new("web1", OTHER)).unwrap_err().to_string();
        assert!(error.ends_with("nothing was"), "{error}");
        world.qemu.model().restart();
    }
}

#[test]
fn records_without_end_are_not_gone_through() {
    let world = World::start();
    for number in 0..300 {
        let record = json!({ "vm": "web1", "device": NIC, "lease": "l", "key": "k" });
        let object = ("secret".to_owned(), record.to_string().into());
        world.qemu.model().objects.insert(format!("vfio-broker.x{number}"), object);
    }
    let error = world.attach(&nic()).unwrap_err().to_string();
    assert!(error.contains("more of them than devices"), "{error}");
    assert_eq!(world.leases(), 0);
}
