//! Regions of a device: what they are, and reading and writing them.

use super::{Machine, UserStruct};
use nix::errno::Errno;
use std::collections::BTreeMap;
use vfio_bindings::bindings::vfio as uapi;

/// The region's index is in the upper bits of an offset into a device's fd.
const SHIFT: u32 = 40;

const READ: u32 = uapi::VFIO_REGION_INFO_FLAG_READ;
const WRITE: u32 = uapi::VFIO_REGION_INFO_FLAG_WRITE;
const MMAP: u32 = uapi::VFIO_REGION_INFO_FLAG_MMAP;
const CAPS: u32 = uapi::VFIO_REGION_INFO_FLAG_CAPS;

/// What has been written to a device's regions; zeros elsewhere.
#[derive(Debug, Default)]
pub(super) struct Memory(BTreeMap<u64, u8>);

impl Memory {
    fn read(&self, at: u64) -> u8 {
        self.0.get(&at).copied().unwrap_or(0)
    }

    fn write(&mut self, at: u64, byte: u8) {
        if byte == 0 {
            self.0.remove(&at);
        } else {
            self.0.insert(at, byte);
        }
    }
}

/// A region that can be read or written, in bytes.
struct Area {
    size: u64,
    /// A part that reads as ones and ignores writes: the MSI-X table.
    hidden: std::ops::Range<u64>,
}

impl Machine {
    pub(super) fn region_info(&mut self, index: usize, user: &mut UserStruct) -> Result<(), Errno> {
        const WHOLE: usize = 32;
        let argsz = user.argsz();
        if argsz < WHOLE {
            return Err(Errno::EINVAL);
        }
        let facts = &self.device(index)?.facts;
        let region = user.u32(8);
        let mut caps = Vec::new();
        let (mut flags, size) = match region {
            uapi::VFIO_PCI_CONFIG_REGION_INDEX => {
                (READ | WRITE, if facts.pcie { 4096 } else { 256 })
            }
            0..=5 => match facts.bars.iter().find(|bar| u32::from(bar.index) == region) {
                None => (0, 0),
                Some(bar) if bar.can_mmap() => {
                    if facts.msix.is_some_and(|msix| u32::from(msix.bar) == region) {
                        caps.push((uapi::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, Vec::new()));
                    }
                    (READ | WRITE | MMAP, bar.size)
                }
                Some(bar) => (READ | WRITE, bar.size),
            },
            uapi::VFIO_PCI_ROM_REGION_INDEX if facts.rom == 0 => (0, 0),
            uapi::VFIO_PCI_ROM_REGION_INDEX => (READ, facts.rom),
            uapi::VFIO_PCI_VGA_REGION_INDEX if facts.vga => (READ | WRITE, 0xc0000),
            uapi::VFIO_PCI_VGA_REGION_INDEX => return Err(Errno::EINVAL),
            _ => {
                let extra = (region - uapi::VFIO_PCI_NUM_REGIONS) as usize;
                let extra = facts.regions.get(extra).ok_or(Errno::EINVAL)?;
                let kind = [extra.kind.to_ne_bytes(), extra.subtype.to_ne_bytes()].concat();
                caps.push((uapi::VFIO_REGION_INFO_CAP_TYPE, kind));
                if !extra.sparse.is_empty() {
                    let mut areas = (extra.sparse.len() as u64).to_ne_bytes().to_vec();
                    for (offset, size) in &extra.sparse {
                        areas.extend_from_slice(&offset.to_ne_bytes());
                        areas.extend_from_slice(&size.to_ne_bytes());
                    }
                    caps.push((uapi::VFIO_REGION_INFO_CAP_SPARSE_MMAP, areas));
                }
                (extra.flags, extra.size)
            }
        };
        let chain = chain(WHOLE, &caps);
        let mut offset = user.u32(12);
        if !chain.is_empty() {
            flags |= CAPS;
            if argsz < WHOLE + chain.len() {
                user.set_u32(0, (WHOLE + chain.len()) as u32);
                offset = 0;
            } else {
                user.copy_out(WHOLE, &chain);
                offset = WHOLE as u32;
            }
        }
        user.set_u32(4, flags);
        user.set_u32(12, offset);
        user.set_u64(16, size);
        user.set_u64(24, u64::from(region) << SHIFT);
        Ok(())
    }

    /// Finds what an offset into a device's fd means: the region, and where in it.
    fn area(&mut self, index: usize, offset: u64, write: bool) -> Result<(u64, Area), Errno> {
        let device = self.device(index)?;
        let facts = &device.facts;
        let region = u32::try_from(offset >> SHIFT).map_err(|_| Errno::EINVAL)?;
        let none = 0..0;
        let area = match region {
            0..=5 => {
                let bar = facts.bars.iter().find(|bar| u32::from(bar.index) == region);
                let bar = bar.ok_or(Errno::EINVAL)?;
                let table = facts.msix.filter(|msix| u32::from(msix.bar) == region);
                let hidden = table
                    .map_or(none, |msix| msix.offset..msix.offset + u64::from(msix.count) * 16);
                Area { size: bar.size, hidden }
            }
            uapi::VFIO_PCI_ROM_REGION_INDEX if !write && facts.rom > 0 => {
                Area { size: facts.rom, hidden: none }
            }
            uapi::VFIO_PCI_VGA_REGION_INDEX if facts.vga => Area { size: 0xc0000, hidden: none },
            _ => {
                let extra = region.checked_sub(uapi::VFIO_PCI_NUM_REGIONS).ok_or(Errno::EINVAL)?;
                let extra = facts.regions.get(extra as usize).ok_or(Errno::EINVAL)?;
                let wanted = if write { WRITE } else { READ };
                if extra.flags & wanted == 0 {
                    return Err(Errno::EINVAL);
                }
                Area { size: extra.size, hidden: none }
            }
        };
        let at = offset & ((1 << SHIFT) - 1);
        if at >= area.size {
            return Err(Errno::EINVAL);
        }
        let is_memory = |&bar: &&crate::sim::topology::Bar| !bar.io;
        let bar = facts.bars.iter().filter(is_memory).any(|bar| u32::from(bar.index) == region);
        if bar && !device.config.memory_enabled() {
            return Err(Errno::EIO);
        }
        Ok((at, area))
    }

    pub(super) fn device_read(
        &mut self,
        index: usize,
        len: usize,
        offset: u64,
    ) -> Result<Vec<u8>, Errno> {
        if len == 0 {
            return Ok(Vec::new());
        }
        if offset >> SHIFT == u64::from(uapi::VFIO_PCI_CONFIG_REGION_INDEX) {
            let at = offset & ((1 << SHIFT) - 1);
            return self.device(index)?.config.read(at, len);
        }
        let (at, area) = self.area(index, offset, false)?;
        let memory = &self.device(index)?.memory;
        let len = (len as u64).min(area.size - at);
        let byte = |at: u64, offset: u64| {
            if area.hidden.contains(&at) { 0xff } else { memory.read(offset) }
        };
        Ok((0..len).map(|i| byte(at + i, offset + i)).collect())
    }

    pub(super) fn device_write(
        &mut self,
        index: usize,
        bytes: &[u8],
        offset: u64,
    ) -> Result<usize, Errno> {
        if bytes.is_empty() {
            return Ok(0);
        }
        if offset >> SHIFT == u64::from(uapi::VFIO_PCI_CONFIG_REGION_INDEX) {
            let at = offset & ((1 << SHIFT) - 1);
            return self.device(index)?.config.write(at, bytes);
        }
        let (at, area) = self.area(index, offset, true)?;
        let memory = &mut self.device(index)?.memory;
        let len = (bytes.len() as u64).min(area.size - at);
        for (i, byte) in (0..len).zip(bytes) {
            if !area.hidden.contains(&(at + i)) {
                memory.write(offset + i, *byte);
            }
        }
        Ok(len as usize)
    }
}

/// A capability chain that begins `base` bytes into its struct.
fn chain(base: usize, caps: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut chain = Vec::new();
    for (i, (id, body)) in caps.iter().enumerate() {
        let end = base + chain.len() + 8 + body.len().next_multiple_of(8);
        let next = if i + 1 == caps.len() { 0 } else { end as u32 };
        chain.extend_from_slice(&(*id as u16).to_ne_bytes());
        chain.extend_from_slice(&1u16.to_ne_bytes());
        chain.extend_from_slice(&next.to_ne_bytes());
        chain.extend_from_slice(body);
        chain.resize(end - base, 0);
    }
    chain
}
