//! The secret that is authority over a lease.

use super::error::no_random;
use crate::ledger::LeaseId;
use crate::protocol::Error;
use std::fmt;

/// 128 random bits.
pub(super) struct Key([u8; 16]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(secret)")
    }
}

impl Key {
    pub(super) fn new() -> Result<Self, Error> {
        random().map(Self)
    }

    /// The key that is written so, if it is one.
    pub(super) fn from_hex(text: &str) -> Option<Self> {
        let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u128::from_str_radix(text, 16).ok().filter(|_| digits)?;
        Some(Self(number.to_be_bytes()))
    }

    /// As it is told to the holder: 32 hexadecimal digits.
    pub(super) fn to_hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Whether `text` is this key. Takes as long for any text of the right length, however much of
    /// it is right.
    pub(super) fn is(&self, text: &str) -> bool {
        let digit = |half: u8| half + if half < 10 { b'0' } else { b'a' - 10 };
        let own = self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
        let differ = own.zip(text.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b));
        text.len() == 2 * self.0.len() && std::hint::black_box(differ) == 0
    }
}

/// A lease's public name: random so that it names no other lease after a restart either.
pub(super) fn new_lease_id() -> Result<LeaseId, Error> {
    random().map(|bytes| LeaseId(u64::from_ne_bytes(bytes)))
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| no_random(&error))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_key_is_the_key() {
        let key = Key::new().unwrap();
        let hex = key.to_hex();
        assert_eq!(hex.len(), 32);
        assert!(key.is(&hex));
        for at in 0..hex.len() {
            let mut wrong = hex.clone().into_bytes();
            wrong[at] ^= 1;
            assert!(!key.is(std::str::from_utf8(&wrong).unwrap()));
        }
        for wrong in ["", &hex[1..], &format!("{hex}0"), "é"] {
            assert!(!key.is(wrong));
        }
        assert_ne!(Key::new().unwrap().to_hex(), hex);
    }
}
