//! Framing: one message is JSON and a NUL byte, at most 64 KiB with it.

/// The longest message, its NUL byte included, in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;

/// The peer sent more than [`MAX_MESSAGE`] bytes without a NUL: the connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message is longer than {MAX_MESSAGE} bytes")]
pub struct Oversize;

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Frames {
    buffer: Vec<u8>,
    /// Bytes at the front that have been handed out already.
    taken: usize,
    /// Bytes that are known to hold no NUL.
    searched: usize,
}

impl Frames {
    /// Adds what the peer sent.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.searched -= self.taken;
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message without its NUL, if it is there.
    ///
    /// # Errors
    /// [`Oversize`], and from then on always.
    pub fn next_message(&mut self) -> Result<Option<&[u8]>, Oversize> {
        let start = self.taken;
        let found = self.buffer[self.searched..].iter().position(|&byte| byte == 0);
        let end = found.map_or(self.buffer.len(), |at| self.searched + at);
        if end - start >= MAX_MESSAGE {
            return Err(Oversize);
        }
        self.searched = end;
        if found.is_none() {
            return Ok(None);
        }
        self.taken = end + 1;
        self.searched = self.taken;
        Ok(Some(&self.buffer[start..end]))
    }

    /// Whether part of a message is there.
    pub fn has_partial(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// How long the message is of which a part is there, so far.
    pub fn partial_len(&self) -> usize {
        self.buffer.len() - self.taken
    }

    /// Gives back memory that a burst took: called when the peer falls silent.
    pub fn shrink(&mut self) {
        if self.taken == self.buffer.len() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_however_they_went_in() {
        let stream = b"one\0two\0\0three\0rest";
        for step in 1..=stream.len() {
            let mut frames = Frames::default();
            let mut got = Vec::new();
            for chunk in stream.chunks(step) {
                frames.push(chunk);
                while let Some(message) = frames.next_message().unwrap() {
                    got.push(message.to_vec());
                }
            }
            assert_eq!(got, [&b"one"[..], b"two", b"", b"three"]);
            assert!(frames.has_partial());
        }
    }

    #[test]
    fn the_longest_message_fits_and_one_more_byte_does_not() {
        let mut frames = Frames::default();
        frames.push(&vec![b'x'; MAX_MESSAGE - 1]);
        assert_eq!(frames.next_message(), Ok(None));
        frames.push(b"\0");
        assert_eq!(frames.next_message().unwrap().unwrap().len(), MAX_MESSAGE - 1);
        frames.push(&vec![b'x'; MAX_MESSAGE]);
        assert_eq!(frames.next_message(), Err(Oversize));
        assert_eq!(frames.next_message(), Err(Oversize));
    }
}
