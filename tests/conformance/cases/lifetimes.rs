//! What outlives what: fds in other processes, their death, and who is charged.

use crate::agent::Agent;
use crate::script::{Mapped3, PAGE, Script, device, memory};
use std::os::fd::AsFd;
use vfio_broker::kernel::{DmaMap, Group, IommuType, Node, UnmapFlags};

super::cases![
    mappings_of_a_killed_process_stay,
    mappings_of_a_killed_process_go_with_the_group,
    a_device_in_another_process_keeps_the_container,
    a_group_in_another_process_keeps_it_busy,
    a_container_in_another_process_is_just_a_container,
    a_device_alone_in_another_process,
    all_of_it_in_another_process,
    another_process_unmaps,
    another_process_detaches,
    another_process_opens_a_device,
    the_limit_of_another_process,
    the_limit_is_given_back,
    the_limit_is_each_process_its_own,
    an_heir_is_charged,
    an_heir_over_its_limit,
    nodes_of_others,
    no_rights_are_needed_with_fds_in_hand,
    dropping_the_container_keeps_its_mappings,
    dropping_the_group_ends_it,
    the_last_group_resets_the_type,
];

fn agent_with(space: &Mapped3) -> Agent {
    let agent = Agent::start();
    agent.ask("take-container", &[space.container.as_fd()]);
    agent
}

fn mappings_of_a_killed_process_stay(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let agent = agent_with(&space);
    t.note("agent maps", agent.ask("map 256 1024", &[]));
    t.value("left", space.container.info().map(|info| info.dma_avail));
    agent.kill();
    t.value("left", space.container.info().map(|info| info.dma_avail));
    space.map(t, 300, 2);
    t.unmap("the agent's", &space.container, 0, 256 * PAGE, 1024 * PAGE);
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
    t.ok("detach", space.group.unset_container());
}

fn mappings_of_a_killed_process_go_with_the_group(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let agent = agent_with(&space);
    t.note("agent maps", agent.ask("map 256 16", &[]));
    agent.kill();
    t.ok("detach", space.group.unset_container());
    t.ok("attach", space.group.set_container(&space.container));
    t.ok("type", space.container.set_iommu(IommuType::Type1v2));
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}

fn a_device_in_another_process_keeps_the_container(t: &Script) {
    let ready = t.device(device::EDU0);
    let agent = Agent::start();
    t.note("take", agent.ask("take-device", &[ready.device.as_fd()]));
    drop(ready.device);
    t.ok("detach", ready.group.unset_container());
    t.note("agent reads", agent.ask("ids", &[]));
    agent.kill();
    t.ok("detach", ready.group.unset_container());
}

fn a_group_in_another_process_keeps_it_busy(t: &Script) {
    let (_container, group) = t.space();
    let node = t.node(device::EDU0);
    let agent = Agent::start();
    t.note("take", agent.ask("take-group", &[group.as_fd()]));
    t.ok("detach", group.unset_container());
    drop(group);
    t.ok("open", Group::open(t.kernel(), node.clone()));
    t.note("agent's status", agent.ask("status", &[]));
    agent.kill();
    t.ok("open", Group::open(t.kernel(), node));
}

fn a_container_in_another_process_is_just_a_container(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let agent = agent_with(&space);
    t.ok("detach", space.group.unset_container());
    t.note("agent maps", agent.ask("map 0 1", &[]));
    t.ok("attach", space.group.set_container(&space.container));
    t.ok("type", space.container.set_iommu(IommuType::Type1v2));
    t.note("agent maps", agent.ask("map 0 1", &[]));
}

fn a_device_alone_in_another_process(t: &Script) {
    let ready = t.device(device::EDU0);
    let node = t.node(device::EDU0);
    let agent = Agent::start();
    t.note("take", agent.ask("take-device", &[ready.device.as_fd()]));
    drop((ready.device, ready.group, ready.container));
    t.note("agent reads", agent.ask("ids", &[]));
    t.ok("open", Group::open(t.kernel(), node.clone()));
    t.note("agent closes", agent.ask("close", &[]));
    let group = t.ok("open", Group::open(t.kernel(), node));
    if let Some(group) = group {
        t.value("status", group.status());
    }
}

fn all_of_it_in_another_process(t: &Script) {
    let ready = t.device(device::EDU0);
    let node = t.node(device::EDU0);
    let agent = Agent::start();
    agent.ask("take-container", &[ready.container.as_fd()]);
    agent.ask("take-group", &[ready.group.as_fd()]);
    agent.ask("take-device", &[ready.device.as_fd()]);
    drop(ready);
    t.note("agent maps", agent.ask("map 0 16", &[]));
    t.note("agent reads", agent.ask("ids", &[]));
    t.ok("open", Group::open(t.kernel(), node.clone()));
    agent.kill();
    t.ok("open", Group::open(t.kernel(), node));
}

fn another_process_unmaps(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let agent = agent_with(&space);
    t.note("one", agent.ask("unmap 4 2", &[]));
    t.note("part of one", agent.ask("unmap 0 1", &[]));
    t.note("all", agent.ask("unmap-all", &[]));
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}

fn another_process_detaches(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let agent = Agent::start();
    agent.ask("take-group", &[space.group.as_fd()]);
    t.note("agent detaches", agent.ask("unset", &[]));
    t.ok("detach", space.group.unset_container());
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}

fn another_process_opens_a_device(t: &Script) {
    let (_container, group) = t.space();
    let agent = Agent::start();
    agent.ask("take-group", &[group.as_fd()]);
    t.note("agent opens", agent.ask(&format!("open-device {}", device::EDU0), &[]));
    t.ok("detach", group.unset_container());
    t.note("agent reads", agent.ask("ids", &[]));
    t.note("agent closes", agent.ask("close", &[]));
    t.ok("detach", group.unset_container());
}

fn the_limit_of_another_process(t: &Script) {
    let (container, _group) = t.space();
    let agent = Agent::unprivileged(16 * PAGE);
    agent.ask("take-container", &[container.as_fd()]);
    t.note("17 pages", agent.ask("map 0 17", &[]));
    t.note("16 pages", agent.ask("map 0 16", &[]));
    t.note("1 page", agent.ask("map 16 1", &[]));
    let memory = memory(64);
    t.map("64 pages here", &container, DmaMap::READ, (memory.vaddr(), 1 << 20, 64 * PAGE));
    t.unmap("all", &container, UnmapFlags::ALL, 0, 0);
}

fn the_limit_is_given_back(t: &Script) {
    let (container, group) = t.space();
    let agent = Agent::unprivileged(16 * PAGE);
    agent.ask("take-container", &[container.as_fd()]);
    t.note("16 pages", agent.ask("map 0 16", &[]));
    t.unmap("unmapped here", &container, 0, 0, 16 * PAGE);
    t.note("16 pages", agent.ask("map 0 16", &[]));
    t.ok("detach", group.unset_container());
    t.ok("attach", group.set_container(&container));
    t.ok("type", container.set_iommu(IommuType::Type1v2));
    t.note("16 pages", agent.ask("map 0 16", &[]));
    t.note("1 page", agent.ask("map 16 1", &[]));
}

fn the_limit_is_each_process_its_own(t: &Script) {
    let (container, _group) = t.space();
    let agents = [Agent::unprivileged(16 * PAGE), Agent::unprivileged(8 * PAGE)];
    for agent in &agents {
        agent.ask("take-container", &[container.as_fd()]);
    }
    t.note("first, 16 pages", agents[0].ask("map 0 16", &[]));
    t.note("second, 16 pages", agents[1].ask("map 16 16", &[]));
    t.note("second, 8 pages", agents[1].ask("map 16 8", &[]));
    t.note("first, 1 page", agents[0].ask("map 32 1", &[]));
}

fn an_heir_is_charged(t: &Script) {
    let (container, _group) = t.space();
    let agents = [Agent::unprivileged(16 * PAGE), Agent::unprivileged(16 * PAGE)];
    for agent in &agents {
        agent.ask("take-container", &[container.as_fd()]);
    }
    t.note("first, 10 pages", agents[0].ask("map 0 10", &[]));
    t.unmap("its address", &container, UnmapFlags::VADDR, 0, 10 * PAGE);
    t.note("second takes it", agents[1].ask("new-address 0 10", &[]));
    t.note("second, 10 pages", agents[1].ask("map 32 10", &[]));
    t.note("first, 16 pages", agents[0].ask("map 64 16", &[]));
}

fn an_heir_over_its_limit(t: &Script) {
    let (container, _group) = t.space();
    let agents = [Agent::unprivileged(16 * PAGE), Agent::unprivileged(8 * PAGE)];
    for agent in &agents {
        agent.ask("take-container", &[container.as_fd()]);
    }
    t.note("first, 10 pages", agents[0].ask("map 0 10", &[]));
    t.unmap("its address", &container, UnmapFlags::VADDR, 0, 10 * PAGE);
    t.note("second takes it", agents[1].ask("new-address 0 10", &[]));
    t.note("first takes it back", agents[0].ask("new-address 0 10", &[]));
    t.note("first, 10 pages", agents[0].ask("map 32 10", &[]));
}

fn nodes_of_others(t: &Script) {
    let agent = Agent::unprivileged(0);
    let Node::Group(id) = t.node(device::EDU0) else { return };
    t.note("group", agent.ask(&format!("open-group {id}"), &[]));
    t.note("no such group", agent.ask("open-group 9999", &[]));
}

fn no_rights_are_needed_with_fds_in_hand(t: &Script) {
    let ready = t.device(device::EDU0);
    let agent = Agent::unprivileged(4 * PAGE);
    agent.ask("take-container", &[ready.container.as_fd()]);
    agent.ask("take-group", &[ready.group.as_fd()]);
    t.note("status", agent.ask("status", &[]));
    t.note("device", agent.ask(&format!("open-device {}", device::EDU0), &[]));
    t.note("ids", agent.ask("ids", &[]));
    t.note("map", agent.ask("map 0 4", &[]));
    t.note("unmap", agent.ask("unmap-all", &[]));
}

fn dropping_the_container_keeps_its_mappings(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    let agent = agent_with(&space);
    drop(space.container);
    t.note("all", agent.ask("unmap-all", &[]));
}

fn dropping_the_group_ends_it(t: &Script) {
    let space = Mapped3::new(t, IommuType::Type1v2);
    drop(space.group);
    t.unmap("all", &space.container, UnmapFlags::ALL, 0, 0);
}

fn the_last_group_resets_the_type(t: &Script) {
    let (container, first) = t.attached(device::EDU0, IommuType::Type1);
    let second = t.group(device::EDU1);
    t.ok("attach", second.set_container(&container));
    drop(first);
    t.ok("another type", container.set_iommu(IommuType::Type1v2));
    drop(second);
    t.ok("no group", container.set_iommu(IommuType::Type1v2));
    let third = t.group(device::EDU0);
    t.ok("attach", third.set_container(&container));
    t.ok("another type", container.set_iommu(IommuType::Type1v2));
}
