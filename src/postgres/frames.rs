//! Cuts what the server sends into messages: one growable buffer, frames lent out in place.
//!
//! It knows lengths and tags, not their meaning.
//! Source: <https://www.postgresql.org/docs/current/protocol-message-formats.html>.

use super::error::Error;
use super::limits::{KEEP_BUFFER_BYTES, RECEIVE_BUFFER_BYTES};
use std::ops::Range;

/// The tag byte and the four bytes of length.
const HEADER_BYTES: usize = 5;

/// What stands at the start of some received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    tag: u8,
    /// Of the whole message, with the header.
    total_bytes: usize,
}

/// The header at the start of `bytes`, or `None` while it is incomplete.
fn header(bytes: &[u8], max_bytes: usize) -> Result<Option<Header>, Error> {
    let Some(&[tag, a, b, c, d]) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    // the length counts itself but not the tag
    let len = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(4..max_bytes).contains(&len) {
        return Err(Error::Protocol(format!(
            "message {} claims {len} bytes, of at most {max_bytes}",
            name(tag)
        )));
    }
    Ok(Some(Header {
        tag,
        total_bytes: len + 1,
    }))
}

/// A tag byte for a message to a person.
pub(super) fn name(tag: u8) -> String {
    format!("'{}' (0x{tag:02x})", tag.escape_ascii())
}

/// A message that was taken off the buffer; [`FrameBuffer::body`] lends its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) tag: u8,
    start: usize,
    end: usize,
}

/// Received bytes, those of the last message taken included.
#[derive(Debug)]
pub(super) struct FrameBuffer {
    /// All of it is initialised; `filled` says which part was received and not yet taken.
    bytes: Vec<u8>,
    filled: Range<usize>,
    max_bytes: usize,
}

impl FrameBuffer {
    pub(super) fn new(max_bytes: usize) -> FrameBuffer {
        FrameBuffer {
            bytes: vec![0; RECEIVE_BUFFER_BYTES],
            filled: 0..0,
            max_bytes,
        }
    }

    /// From now on messages may be this long.
    pub(super) fn set_max_bytes(&mut self, max_bytes: usize) {
        self.max_bytes = max_bytes;
    }

    /// Received and not yet taken.
    fn pending(&self) -> &[u8] {
        self.bytes.get(self.filled.clone()).unwrap_or_default()
    }

    /// `take` will not ask for more bytes.
    pub(super) fn has_frame(&self) -> bool {
        match header(self.pending(), self.max_bytes) {
            Ok(Some(header)) => header.total_bytes <= self.filled.len(),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// Takes the next message if it is whole.
    pub(super) fn take(&mut self) -> Result<Option<Frame>, Error> {
        match header(self.pending(), self.max_bytes)? {
            Some(Header { tag, total_bytes }) if total_bytes <= self.filled.len() => {
                let start = self.filled.start;
                self.filled.start += total_bytes;
                Ok(Some(Frame {
                    tag,
                    start,
                    end: start + total_bytes,
                }))
            }
            _ => Ok(None),
        }
    }

    /// What follows the header of a message, valid until [`FrameBuffer::space`] is called.
    pub(super) fn body(&self, frame: Frame) -> &[u8] {
        self.bytes
            .get(frame.start + HEADER_BYTES..frame.end)
            .unwrap_or_default()
    }

    /// The whole message, with its header.
    pub(super) fn message(&self, frame: Frame) -> &[u8] {
        self.bytes.get(frame.start..frame.end).unwrap_or_default()
    }

    /// Room to receive into, never empty; to be called when `take` found no whole message.
    ///
    /// The part of a message that is there moves to the front: each message moves at most once. The buffer
    /// doubles only when it is full of received bytes, so a length alone allocates nothing.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let pending = self.filled.len();
        self.bytes.copy_within(self.filled.clone(), 0);
        self.filled = 0..pending;
        if self.bytes.len() > KEEP_BUFFER_BYTES && pending < RECEIVE_BUFFER_BYTES {
            self.bytes.truncate(RECEIVE_BUFFER_BYTES);
            self.bytes.shrink_to_fit();
        } else if pending == self.bytes.len() {
            let limit = self.max_bytes + 1;
            self.bytes
                .resize((2 * pending).min(limit).max(pending + 1), 0);
        }
        self.bytes.get_mut(pending..).unwrap_or_default()
    }

    /// So many bytes were put into [`FrameBuffer::space`].
    pub(super) fn received(&mut self, count: usize) {
        self.filled.end = (self.filled.end + count).min(self.bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1 << 20;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn receive(buffer: &mut FrameBuffer, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let space = buffer.space();
            let count = space.len().min(bytes.len());
            space[..count].copy_from_slice(&bytes[..count]);
            buffer.received(count);
            bytes = &bytes[count..];
        }
    }

    fn drain(buffer: &mut FrameBuffer) -> Vec<(u8, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let expected = buffer.has_frame();
            let frame = buffer.take().unwrap();
            assert_eq!(frame.is_some(), expected);
            let Some(frame) = frame else { return found };
            found.push((frame.tag, buffer.body(frame).to_vec()));
        }
    }

    #[test]
    fn messages_cut_at_every_byte_come_out_whole() {
        let sent = [(b'd', &b"row"[..]), (b'c', b""), (b'Z', b"I")];
        let stream: Vec<u8> = sent.iter().flat_map(|(t, b)| message(*t, b)).collect();
        let expected = sent.map(|(tag, body)| (tag, body.to_vec()));
        for cut in 0..=stream.len() {
            let mut buffer = FrameBuffer::new(MAX);
            receive(&mut buffer, &stream[..cut]);
            let mut found = drain(&mut buffer);
            receive(&mut buffer, &stream[cut..]);
            found.extend(drain(&mut buffer));
            assert_eq!(found, expected, "cut at {cut}");
        }
        let mut buffer = FrameBuffer::new(MAX);
        let mut found = Vec::new();
        for byte in stream {
            receive(&mut buffer, &[byte]);
            found.extend(drain(&mut buffer));
        }
        assert_eq!(found, expected, "byte by byte");
    }

    #[test]
    fn lengths_that_cannot_be_are_refused_before_their_bytes_come() {
        for (length, legal) in [
            (0u32, false),
            (3, false),
            (4, true),
            (MAX as u32 - 1, true),
            (MAX as u32, false),
            (i32::MAX as u32, false),
            (u32::MAX, false),
            (i32::MIN as u32, false),
        ] {
            let mut buffer = FrameBuffer::new(MAX);
            receive(&mut buffer, b"d");
            receive(&mut buffer, &length.to_be_bytes());
            assert_eq!(buffer.take().is_ok(), legal, "{length}");
            assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES, "{length}");
        }
    }

    #[test]
    fn a_large_message_grows_the_buffer_as_it_comes_and_gives_it_back() {
        let large = vec![b'x'; 5 << 20];
        let mut buffer = FrameBuffer::new(16 << 20);
        receive(&mut buffer, &message(b'd', &large)[..100]);
        assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES);
        receive(&mut buffer, &message(b'd', &large)[100..]);
        receive(&mut buffer, &message(b'd', b"small"));
        assert!(buffer.bytes.len() <= 12 << 20);
        assert_eq!(
            drain(&mut buffer),
            [(b'd', large), (b'd', b"small".to_vec())]
        );
        receive(&mut buffer, &message(b'd', b"next"));
        assert_eq!(drain(&mut buffer), [(b'd', b"next".to_vec())]);
        assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES);
    }
}
