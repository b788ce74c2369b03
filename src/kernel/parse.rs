//! Fields of the kernel's structs, by offset, in the machine's byte order.
//!
//! Reading outside a buffer gives zeros: what a kernel that is older than a field would say.

fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    if let Some(found) = bytes.get(offset..offset.saturating_add(N)) {
        field.copy_from_slice(found);
    }
    field
}

pub(crate) fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_ne_bytes(at(bytes, offset))
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(at(bytes, offset))
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(at(bytes, offset))
}

/// A struct under construction; `argsz`, which iommufd calls `size`, comes first and is set by
/// [`Fields::done`].
#[derive(Default)]
pub(crate) struct Fields(Vec<u8>);

impl Fields {
    /// A struct that starts with room for `argsz`.
    pub(crate) fn with_argsz() -> Self {
        Self(vec![0; 4])
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub(crate) fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend_from_slice(value);
        self
    }

    /// The struct, with `argsz` set to its length.
    pub(crate) fn done(mut self) -> Vec<u8> {
        set_argsz(&mut self.0);
        self.0
    }
}

/// Writes the buffer's length into its first field.
pub(crate) fn set_argsz(bytes: &mut [u8]) {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if let Some(field) = bytes.get_mut(..4) {
        field.copy_from_slice(&len.to_ne_bytes());
    }
}

/// A capability in a chain: its id, its version, and its bytes from its own header on.
pub(crate) struct Capability<'a> {
    pub(crate) id: u16,
    pub(crate) bytes: &'a [u8],
}

/// Walks a capability chain (`struct vfio_info_cap_header`) that starts at `offset`; stops at the
/// first link that points outside the buffer or backwards, so that it always ends.
pub(crate) fn capabilities(bytes: &[u8], offset: u32) -> impl Iterator<Item = Capability<'_>> {
    let mut next = offset as usize;
    let mut last = 0;
    std::iter::from_fn(move || {
        if next <= last || bytes.len() < next.saturating_add(8) {
            return None;
        }
        let here = &bytes[next..];
        last = next;
        next = u32_at(here, 4) as usize;
        Some(Capability { id: u16_at(here, 0), bytes: here })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_ends_even_when_it_points_to_itself() {
        let mut bytes = vec![0u8; 40];
        bytes[24..26].copy_from_slice(&7u16.to_ne_bytes());
        bytes[28..32].copy_from_slice(&24u32.to_ne_bytes());
        let found: Vec<_> = capabilities(&bytes, 24).map(|cap| cap.id).collect();
        assert_eq!(found, [7]);
        assert_eq!(capabilities(&bytes, 39).count(), 0);
        assert_eq!(capabilities(&bytes, u32::MAX).count(), 0);
    }
}
