//! The tokio client against a broker on a simulated kernel: several tasks, a watch beside them.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)] // tests

#[path = "cli/broker.rs"]
mod broker;
#[path = "common/brokerd.rs"]
mod brokerd;
#[path = "common/children.rs"]
mod children;

use broker::Broker;
use vfio_broker::client::tokio::Client;
use vfio_broker::client::{Acquire, DmaRange, Error};
use vfio_broker::kernel::{DmaMap, Mapped};
use vfio_broker::protocol::{self, EventKind, Handout};

const NIC: &str = "0000:03:00.0";
const GPU: [&str; 2] = ["0000:01:00.0", "0000:01:00.1"];

fn gpu(vm: &str) -> Acquire {
    GPU.iter().fold(Acquire::new(vm), |request, device| request.device(device))
}

fn run(work: impl Future<Output = Result<(), Error>>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(work).unwrap();
}

#[test]
fn a_lease_maps_opens_and_goes_back() {
    let broker = Broker::start("workstation.toml");
    run(async {
        let mut client = Client::connect_to(broker.socket()).await?;
        let lease = client.acquire(Acquire::new("web1").device(NIC)).await?;
        let container = lease.container()?;
        let (_file, memory) = Mapped::memfd(2 << 20).unwrap();
        let (vaddr, size) = (memory.vaddr(), memory.size() as u64);
        container.map(&DmaMap { flags: DmaMap::READ, vaddr, iova: 0, size })?;
        assert_eq!(lease.device(NIC)?.pci_ids()?, (0x8086, 0x15f3));
        let again = client.get_fds(&lease).await?;
        assert_eq!(again.iter().count(), 2, "container and group");
        drop((container, again));
        assert!(client.release(lease).await?);
        assert!(client.leases().await?.is_empty());
        Ok(())
    });
}

#[test]
fn a_watch_sees_what_another_connection_does() {
    let broker = Broker::start("workstation.toml");
    run(async {
        let mut client = Client::connect_to(broker.socket()).await?;
        let lease = client.acquire(gpu("gpu1").handout(Handout::Devices)).await?;
        let mut watch = client.watch(Some(lease.id())).await?;
        let (file, _) = Mapped::memfd(1 << 20).unwrap();
        client.map_dma(&lease, &file, DmaRange::new(0, 1 << 20)).await?;
        let error = client.map_dma(&lease, &file, DmaRange::new(0, 1 << 20)).await.unwrap_err();
        assert!(
            matches!(error, Error::Broker { error: protocol::Error::Conflict { .. }, .. }),
            "{error}"
        );
        assert_eq!(client.unmap_dma(&lease, 0, 1 << 20).await?, 1 << 20);
        // Four round trips after it was asked for, the watch has begun.
        drop(lease);
        let event = watch.next().await.unwrap()?;
        assert_eq!((event.event, event.vm.as_str()), (EventKind::Gone, "gpu1"));
        Ok(())
    });
}

#[test]
fn an_acquire_that_nobody_waits_for_any_more_holds_nothing() {
    let broker = Broker::start("workstation.toml");
    run(async {
        let mut client = Client::connect_to(broker.socket()).await?;
        for _ in 0..20 {
            // Polled once, so it is sent; then dropped.
            let request = client.acquire(Acquire::new("gone").device(NIC));
            let _ = tokio::time::timeout(std::time::Duration::ZERO, request).await;
        }
        loop {
            match client.acquire(Acquire::new("web1").device(NIC)).await {
                Ok(lease) => {
                    assert_eq!(lease.vm(), "web1");
                    return Ok(());
                }
                Err(Error::Broker {
                    error: protocol::Error::Busy { .. } | protocol::Error::Quarantined { .. },
                    ..
                }) => tokio::task::yield_now().await,
                Err(error) => return Err(error),
            }
        }
    });
}
