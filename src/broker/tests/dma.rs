//! MapDma: what is refused, what it costs, and what a peer's memory can do to the broker.

use super::*;
use crate::kernel::Mapped;
use std::os::fd::AsFd;

const MIB: u64 = 1 << 20;

fn bad_field(result: Result<(), Error>) -> String {
    match result {
        Err(Error::BadRequest { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ranges_are_checked_before_the_kernel_sees_them() {
    let world = World::new();
    let grant = world.acquire(1000, &want_as(Handout::Devices, &["0000:02:00.0"])).unwrap();
    let held = &grant.reply;
    let with = |change: &dyn Fn(&mut MapDma), len: usize| {
        let mut request = map_request(held, 0, len as u64);
        change(&mut request);
        let (memory, _) = Mapped::memfd(len).unwrap();
        world.map_dma(1000, &request, memory)
    };
    let field = |change: &dyn Fn(&mut MapDma)| bad_field(with(change, 8192));
    assert_eq!(field(&|r| (r.read, r.write) = (false, false)), "read");
    assert_eq!(field(&|r| r.size = 0), "size");
    assert_eq!(field(&|r| r.size = 4097), "size");
    assert_eq!(field(&|r| r.iova = 1), "iova");
    assert_eq!(field(&|r| r.iova = u64::MAX - 4095), "iova");
    for size in [u64::MAX, u64::MAX - 4095] {
        let over = with(&|r| r.size = size, 8192).unwrap_err();
        assert!(matches!(over, Error::OverLimit { .. }), "{over}");
    }
    assert_eq!(field(&|r| r.size = 16384), "memory");
    assert_eq!(field(&|r| r.offset = 4096), "memory");
    assert_eq!(field(&|r| r.offset = u64::MAX - 4095), "offset");
    assert_eq!(field(&|r| r.offset = 2048), "offset");
    // Beyond the aperture, and in the window of the interrupts.
    assert_eq!(field(&|r| r.iova = 1 << 60), "iova");
    assert_eq!(field(&|r| r.iova = 0xfee0_0000), "iova");
    with(&|_| {}, 8192).unwrap();
    assert!(matches!(with(&|r| r.iova = 4096, 8192), Err(Error::Conflict { .. })));
    assert_eq!(world.stats().spaces[0].mapped_bytes, 8192);
    let list = world.broker.leases(&caller(1000)).unwrap().leases;
    assert_eq!((list[0].mappings, list[0].mapped_bytes), (Some(1), Some(8192)));
    assert_eq!(world.unmap(1000, held, 0, 8192), Ok(8192));
    assert_eq!(world.unmap(1000, held, 0, 8192), Ok(0));
    drop(grant);
    world.serve_hang_ups();
    world.assert_idle();
}

#[test]
fn whole_mappings_are_taken_back_and_only_ones_own() {
    let world = World::new();
    let request = |bdf| want_in("pool", &[bdf]);
    let one = world.acquire(1000, &request("0000:02:00.0")).unwrap();
    let other = world.acquire(1001, &request("0000:08:00.0")).unwrap();
    world.map(1000, &one.reply, 0, 8192).unwrap();
    world.map(1001, &other.reply, 8192, 8192).unwrap();
    world.map(1000, &one.reply, 16384, 8192).unwrap();
    let cut = world.unmap(1000, &one.reply, 0, 4096).unwrap_err();
    assert!(matches!(cut, Error::BadRequest { .. }), "{cut}");
    // From 0 to the end, over the other member's range.
    assert_eq!(world.unmap(1000, &one.reply, 0, 32768), Ok(16384));
    assert_eq!(world.stats().spaces[0].mapped_bytes, 8192);
    assert_eq!(world.unmap(1000, &one.reply, 8192, 8192), Ok(0));
    assert_eq!(world.stats().spaces[0].mapped_bytes, 8192);
}

#[test]
fn a_tenants_quota_is_over_all_its_leases() {
    let world = World::new();
    let one = world.acquire(1000, &want_as(Handout::Devices, &["0000:02:00.0"])).unwrap();
    let two = world.acquire(1000, &want_as(Handout::Devices, &["0000:08:00.0"])).unwrap();
    world.map(1000, &one.reply, 0, MIB - 4096).unwrap();
    let over = world.map(1000, &two.reply, 0, 8192).unwrap_err();
    let limit = "mapped_bytes".to_owned();
    assert_eq!(over, Error::OverLimit { limit, most: MIB, asked: MIB + 4096 });
    world.map(1000, &two.reply, 0, 4096).unwrap();
    assert_eq!(world.unmap(1000, &one.reply, 0, MIB - 4096), Ok(MIB - 4096));
    for n in 1..6 {
        world.map(1000, &two.reply, n << 12, 4096).unwrap();
    }
    let over = world.map(1000, &one.reply, 0, 4096).unwrap_err();
    assert!(matches!(over, Error::OverLimit { most: 6, .. }), "{over}");
    // Whoever makes the call, the lease's own tenant pays.
    let over = world.map(1001, &one.reply, 0, 4096).unwrap_err();
    assert!(matches!(over, Error::OverLimit { most: 6, .. }), "{over}");
}

#[test]
fn memory_that_shrinks_or_is_punched_hurts_nobody_but_its_owner() {
    let world = World::new();
    let grant = world.acquire(1000, &want_as(Handout::Devices, &["0000:02:00.0"])).unwrap();
    let (memory, _) = Mapped::memfd(1 << 16).unwrap();
    let copy = memory.try_clone().unwrap();
    let request = map_request(&grant.reply, 0, 1 << 16);
    world.map_dma(1000, &request, memory).unwrap();
    let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&copy, punch, 0, 8192).unwrap();
    nix::unistd::ftruncate(&copy, 0).unwrap();
    assert_eq!(world.unmap(1000, &grant.reply, 0, 1 << 16), Ok(1 << 16));
    let error = world.map_dma(1000, &request, copy).unwrap_err();
    assert!(matches!(error, Error::BadRequest { .. }), "{error}");
    // Read-only memory can be read by the device, not written.
    let (memory, _) = Mapped::memfd(4096).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory.as_fd()));
    let read_only = || OwnedFd::from(std::fs::File::open(&path).unwrap());
    let mut request = map_request(&grant.reply, 0, 4096);
    let error = world.map_dma(1000, &request, read_only()).unwrap_err();
    assert!(matches!(&error, Error::Kernel { call, .. } if call == "mmap"), "{error}");
    request.write = false;
    world.map_dma(1000, &request, read_only()).unwrap();
}

#[test]
fn what_the_kernel_refuses_leaves_no_trace() {
    let world = World::new();
    let grant = world.acquire(1000, &want_as(Handout::Devices, &["0000:02:00.0"])).unwrap();
    let (before, books) = (world.stats(), world.ledger());
    let fault = crate::sim::Fault::fail("VFIO_IOMMU_MAP_DMA", nix::Error::ENOMEM);
    world.sim.fault(fault).unwrap();
    let error = world.map(1000, &grant.reply, 0, 4096).unwrap_err();
    assert!(advice(&error).unwrap().contains("MEMLOCK"), "{error}");
    assert_eq!((world.stats(), world.ledger()), (before, books));
    world.map(1000, &grant.reply, 0, 4096).unwrap();
    let fault = crate::sim::Fault::fail("VFIO_IOMMU_UNMAP_DMA", nix::Error::EIO);
    world.sim.fault(fault).unwrap();
    assert!(matches!(world.unmap(1000, &grant.reply, 0, 4096), Err(Error::Kernel { .. })));
    assert_eq!(world.unmap(1000, &grant.reply, 0, 4096), Ok(4096));
}

#[test]
fn who_has_the_container_maps_alone() {
    let world = World::new();
    for request in [
        want(&["0000:02:00.0"]),
        want_as(Handout::Group, &["0000:02:00.0"]),
        want_in("friends", &["0000:02:00.0"]),
    ] {
        let grant = world.acquire(1000, &request).unwrap();
        let error = world.map(1000, &grant.reply, 0, 4096).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let error = world.unmap(1000, &grant.reply, 0, 4096).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        drop(grant);
        world.serve_hang_ups();
    }
    world.assert_idle();
}
