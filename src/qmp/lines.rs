//! What a monitor sends, cut into lines.

/// The longest line that is taken. The longest that QEMU sends, its schema, has a quarter of this.
pub(super) const MAX_LINE: usize = 1 << 20;

/// A line is longer than [`MAX_LINE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line of more than {MAX_LINE} bytes")]
pub(super) struct TooLong;

/// Bytes that have come and not made a whole line yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// How much of it is known to have no end of line.
    searched: usize,
}

impl Lines {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next line without its end, if it is whole. Empty lines are skipped.
    pub(super) fn next_line(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        loop {
            let unseen = self.buffer.get(self.searched..).unwrap_or_default();
            let Some(end) = unseen.iter().position(|&byte| byte == b'\n') else {
                self.searched = self.buffer.len();
                return if self.searched > MAX_LINE { Err(TooLong) } else { Ok(None) };
            };
            let end = self.searched + end;
            self.searched = 0;
            if end > MAX_LINE {
                return Err(TooLong);
            }
            let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
            line.truncate(end);
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
        for (len, fits) in [(MAX_LINE, true), (MAX_LINE + 1, false)] {
            let mut lines = Lines::default();
            lines.push(&vec![b'x'; len]);
            assert_eq!(lines.next_line(), if fits { Ok(None) } else { Err(TooLong) });
            lines.push(b"\n");
            assert_eq!(lines.next_line().is_ok(), fits);
        }
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_come(
            text in proptest::collection::vec("[a-c\r]{0,4}", 0..8),
            cuts in proptest::collection::vec(1..5usize, 0..40),
        ) {
            let whole = text.iter().map(|line| format!("{line}\n")).collect::<String>();
            let (mut lines, mut got) = (Lines::default(), Vec::new());
            let mut rest = whole.as_bytes();
            for cut in cuts.into_iter().chain([whole.len()]) {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                lines.push(now);
                rest = later;
                while let Some(line) = lines.next_line().unwrap() {
                    got.push(String::from_utf8(line).unwrap());
                }
            }
            let bare = |line: &String| line.strip_suffix('\r').unwrap_or(line).to_owned();
            let expected: Vec<_> = text.iter().map(bare).filter(|line| !line.is_empty()).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
