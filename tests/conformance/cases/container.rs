//! Containers: versions, extensions, types, and what type1 says of itself.

use crate::script::{Field, Script, device, memory, u32_at, u64_at};
use vfio_broker::kernel::{Arg, DmaMap, IommuType, request};

super::cases![
    version,
    extensions_of_an_empty_container,
    extensions_with_a_group,
    extensions_of_version_one,
    extensions_of_version_two,
    extensions_far_off,
    type_without_a_group,
    types_that_are_none,
    type_twice,
    version_one,
    version_two,
    nesting,
    ioctl_before_a_type,
    unknown_ioctl,
    requests_of_others,
    bad_pointers,
    info_is_at_least_sixteen_bytes,
    info_says_what_it_wants,
    info_in_full,
    info_counts_mappings,
    info_leaves_the_rest_alone,
    info_of_two_groups,
    type_after_the_group_has_left,
];

fn version(t: &Script) {
    t.value("version", t.container().api_version());
    let (container, _group) = t.space();
    t.value("with a type", container.api_version());
    t.ioctl("with a pointer", &container, request::GET_API_VERSION, Arg::BadPointer);
}

fn extensions(t: &Script, container: &vfio_broker::kernel::Container) {
    for number in 0..16 {
        let arg = Arg::Value(number);
        t.ioctl(&format!("extension {number}"), container, request::CHECK_EXTENSION, arg);
    }
}

fn extensions_of_an_empty_container(t: &Script) {
    extensions(t, &t.container());
}

fn extensions_with_a_group(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    extensions(t, &container);
}

fn extensions_of_version_one(t: &Script) {
    let (container, _group) = t.attached(device::EDU0, IommuType::Type1);
    extensions(t, &container);
}

fn extensions_of_version_two(t: &Script) {
    let (container, group) = t.space();
    extensions(t, &container);
    t.ok("detach", group.unset_container());
    extensions(t, &container);
}

fn extensions_far_off(t: &Script) {
    let container = t.container();
    for number in [0xffff_ffff, 1 << 32, (1 << 32) + 1, u64::MAX] {
        let arg = Arg::Value(number);
        t.ioctl(&format!("extension {number:#x}"), &container, request::CHECK_EXTENSION, arg);
    }
}

fn type_without_a_group(t: &Script) {
    let container = t.container();
    t.ok("version 2", container.set_iommu(IommuType::Type1v2));
    t.ok("none", container.set_iommu(IommuType::Other(77)));
}

fn types_that_are_none(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    for number in [0, 2, 4, 5, 7, 8, 9, 10, 11, 77, u32::MAX] {
        t.ok(&format!("type {number}"), container.set_iommu(IommuType::Other(number)));
    }
    t.ok("version 2", container.set_iommu(IommuType::Type1v2));
}

fn type_twice(t: &Script) {
    let (container, _group) = t.space();
    t.ok("the same", container.set_iommu(IommuType::Type1v2));
    t.ok("another", container.set_iommu(IommuType::Type1));
    t.ok("none", container.set_iommu(IommuType::Other(77)));
}

fn version_one(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::Type1));
    t.ok("device", group.device(device::EDU0));
}

fn version_two(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    t.ok("device", group.device(device::EDU0));
}

fn nesting(t: &Script) {
    let (container, group) = (t.container(), t.group(device::EDU0));
    t.ok("attach", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::Other(6)));
}

fn ioctl_before_a_type(t: &Script) {
    let container = t.container();
    let requests = [
        request::IOMMU_GET_INFO,
        request::IOMMU_MAP_DMA,
        request::IOMMU_UNMAP_DMA,
        request::IOMMU_DIRTY_PAGES,
        request::UNKNOWN,
    ];
    for request in requests {
        t.ioctl(request.name, &container, request, Arg::BadPointer);
    }
    let group = t.group(device::EDU0);
    t.ok("attach", group.set_container(&container));
    for request in requests {
        t.ioctl(request.name, &container, request, Arg::BadPointer);
    }
}

fn unknown_ioctl(t: &Script) {
    let (container, group) = t.space();
    t.ioctl("with a type", &container, request::UNKNOWN, Arg::Value(0));
    t.ok("detach", group.unset_container());
    t.ioctl("without", &container, request::UNKNOWN, Arg::Value(0));
}

fn requests_of_others(t: &Script) {
    let (container, _group) = t.space();
    for request in [
        request::GROUP_GET_STATUS,
        request::GROUP_UNSET_CONTAINER,
        request::DEVICE_GET_REGION_INFO,
        request::DEVICE_SET_IRQS,
        request::DEVICE_RESET,
    ] {
        t.ioctl(request.name, &container, request, Arg::Value(0));
    }
}

fn bad_pointers(t: &Script) {
    let (container, _group) = t.space();
    for request in [
        request::IOMMU_GET_INFO,
        request::IOMMU_MAP_DMA,
        request::IOMMU_UNMAP_DMA,
        request::IOMMU_DIRTY_PAGES,
    ] {
        t.ioctl(request.name, &container, request, Arg::BadPointer);
    }
}

fn info_fields(argsz: u32, len: usize) -> Vec<Field> {
    let mut fields = vec![Field::U32(argsz)];
    fields.extend(vec![Field::U32(0x5a5a_5a5a); len / 4 - 1]);
    fields
}

fn info_is_at_least_sixteen_bytes(t: &Script) {
    let (container, _group) = t.space();
    for argsz in [0, 8, 15, 16] {
        let fields = info_fields(argsz, 24);
        let bytes =
            t.fields(&format!("argsz {argsz}"), &container, request::IOMMU_GET_INFO, &fields);
        t.note("bytes", bytes);
    }
}

fn info_says_what_it_wants(t: &Script) {
    let (container, _group) = t.space();
    for argsz in [16, 20, 23, 24, 25, 100] {
        let fields = info_fields(argsz, 256);
        let bytes =
            t.fields(&format!("argsz {argsz}"), &container, request::IOMMU_GET_INFO, &fields);
        t.note("wants", u32_at(&bytes, 0));
        t.note("flags", u32_at(&bytes, 4));
        t.note("page sizes", u64_at(&bytes, 8));
        t.note("offset", u32_at(&bytes, 16));
    }
}

fn info_in_full(t: &Script) {
    for kind in [IommuType::Type1, IommuType::Type1v2] {
        let (container, _group) = t.attached(device::EDU0, kind);
        t.value("info", container.info());
    }
}

fn info_counts_mappings(t: &Script) {
    let (container, _group) = t.space();
    let left = |what: &str| t.value(what, container.info().map(|info| info.dma_avail));
    let memory = memory(3);
    left("none");
    for nth in 0..3 {
        let at = (memory.vaddr() + nth * 4096, nth * 4096, 4096);
        t.map("map", &container, DmaMap::READ, at);
        left("mapped");
    }
    t.map("map again", &container, DmaMap::READ, (memory.vaddr(), 0, 4096));
    left("refused");
    t.unmap("unmap", &container, 0, 0, 8192);
    left("unmapped");
}

fn info_leaves_the_rest_alone(t: &Script) {
    let (container, _group) = t.space();
    let fields = info_fields(200, 256);
    let bytes = t.fields("argsz 200", &container, request::IOMMU_GET_INFO, &fields);
    t.note("behind the capabilities", &bytes[160..]);
}

fn info_of_two_groups(t: &Script) {
    let (container, first) = t.space();
    let second = t.group(device::VF0);
    t.ok("attach", second.set_container(&container));
    t.value("both", container.info());
    t.ok("detach", first.unset_container());
    t.value("the second", container.info());
}

fn type_after_the_group_has_left(t: &Script) {
    let (container, group) = t.space();
    drop(group);
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    t.value("info", container.info().map(drop));
}
