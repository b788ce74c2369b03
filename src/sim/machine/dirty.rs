//! Dirty pages: `VFIO_IOMMU_DIRTY_PAGES`, and the bitmaps that come with unmapping.

use super::type1::{Mapping, Type1};
use super::{CallArg, UserStruct};
use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

/// The largest bitmap the kernel takes, in bytes.
pub(super) const MOST_BITMAP: u64 = 1 << 28;

pub(super) fn check_bitmap(size: u64, page: u64, bitmap: u64) -> Result<(), Errno> {
    let pages = size.checked_shr(page.trailing_zeros()).unwrap_or(size);
    if pages == 0 || bitmap == 0 || bitmap > MOST_BITMAP || bitmap < bitmap_bytes(pages) {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

fn bitmap_bytes(pages: u64) -> u64 {
    pages.div_ceil(64) * 8
}

pub(super) fn dirty_pages(
    type1: &mut Type1,
    knows_overflow: bool,
    arg: &mut CallArg,
) -> Result<(), Errno> {
    const START: u32 = uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_START;
    const STOP: u32 = uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP;
    const GET: u32 = uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
    if !type1.v2 {
        return Err(Errno::EACCES);
    }
    let user = arg.user()?;
    let flags = user.u32(4);
    if user.argsz() < 8 || flags & !(START | STOP | GET) != 0 || flags.count_ones() != 1 {
        return Err(Errno::EINVAL);
    }
    let smallest = type1.page();
    if flags != GET {
        let start = flags == START;
        if start != type1.tracking {
            type1.tracking = start;
            for mapping in type1.mappings.values_mut() {
                if start { mapping.track(smallest) } else { mapping.dirty.clear() }
            }
        }
        return Ok(());
    }
    if user.argsz() < 48 {
        return Err(Errno::EINVAL);
    }
    let (iova, size, page) = (user.u64(8), user.u64(16), user.u64(24));
    // Older kernels refuse a range that ends with the last address there is.
    let last = if knows_overflow {
        let len = size.checked_sub(1).ok_or(Errno::EINVAL)?;
        iova.checked_add(len).ok_or(Errno::EOVERFLOW)?
    } else {
        iova.checked_add(size).ok_or(Errno::EINVAL)?.wrapping_sub(1)
    };
    check_bitmap(size, page, user.u64(32))?;
    if page != smallest || (iova | size) & (smallest - 1) != 0 || !type1.tracking {
        return Err(Errno::EINVAL);
    }
    if type1.bisects(iova, last) {
        return Err(Errno::EINVAL);
    }
    for (at, mapping) in type1.mappings.range_mut(iova..=last) {
        report_dirty(user, mapping, (at - iova) / page, page)?;
        let pages = mapping.size / page;
        set_bits(&mut mapping.dirty, pages, false);
    }
    Ok(())
}

/// Writes a mapping's dirty pages where they belong in the caller's bitmap. With a real device in
/// the container any page may have been written, so all are dirty.
///
/// Like the kernel it writes whole words; and where the mapping begins inside one, it takes all of
/// that word over into the mapping's own bitmap, which shows in what is reported later.
pub(super) fn report_dirty(
    user: &mut UserStruct,
    mapping: &mut Mapping,
    first: u64,
    page: u64,
) -> Result<(), Errno> {
    let pages = mapping.size / page;
    set_bits(&mut mapping.dirty, pages, true);
    let bitmap = user.out.as_mut().ok_or(Errno::EFAULT)?;
    let (start, shift) = ((first / 64 * 8) as usize, first % 64);
    let len = bitmap_bytes(pages + shift) as usize;
    let words = bitmap.get_mut(start..start + len).ok_or(Errno::EFAULT)?;
    if shift > 0 {
        let mut carried = 0;
        for word in mapping.dirty.iter_mut().take(len / 8) {
            (*word, carried) = (*word << shift | carried, *word >> (64 - shift));
        }
        let mut before = [0; 8];
        before.copy_from_slice(&words[..8]);
        if let Some(word) = mapping.dirty.first_mut() {
            *word |= u64::from_ne_bytes(before);
        }
    }
    for (bytes, word) in words.chunks_exact_mut(8).zip(&mapping.dirty) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(())
}

/// Sets or clears the first bits.
fn set_bits(words: &mut [u64], bits: u64, on: bool) {
    for (word, start) in words.iter_mut().zip((0..bits).step_by(64)) {
        let mask = if bits - start >= 64 { u64::MAX } else { (1 << (bits - start)) - 1 };
        *word = if on { *word | mask } else { *word & !mask };
    }
}
