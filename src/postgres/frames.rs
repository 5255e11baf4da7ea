//! Cuts what the server sends into messages: one buffer, frames lent out in place.
//!
//! It knows lengths and tags, not their meaning. What others can make as long as they like is never held whole: a CopyData
//! message that is larger than the buffer comes in pieces, and errors, notices and settings are cut.
//! Source: <https://www.postgresql.org/docs/current/protocol-message-formats.html>.

use super::error::Error;
use super::limits::{
    CUT_MESSAGE_BYTES, HEAD_BYTES, MAX_COPY_MESSAGE_BYTES, MAX_MESSAGE_BYTES, RECEIVE_BUFFER_BYTES,
};
use std::ops::Range;

/// The tag byte and the four bytes of length.
const HEADER_BYTES: usize = 5;

/// What the header of a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    tag: u8,
    /// Of the whole message, with the header.
    total_bytes: usize,
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

/// What is done with CopyData messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyData {
    /// None is expected.
    Refuse,
    /// Those that are larger than the buffer come by [`FrameBuffer::begin_large`].
    Pieces,
    /// Nobody wants them any more: they are cut.
    Cut,
}

/// Received bytes, those of the last message taken included.
#[derive(Debug)]
pub(super) struct FrameBuffer {
    /// All of it is initialised; `filled` says which part was received and not yet taken.
    bytes: Vec<u8>,
    filled: Range<usize>,
    copy_data: CopyData,
    /// Of the message that comes in pieces, or was cut: what was not taken yet.
    rest: usize,
    /// The rest is passed over.
    is_cut: bool,
}

impl FrameBuffer {
    pub(super) fn new() -> FrameBuffer {
        FrameBuffer {
            bytes: vec![0; RECEIVE_BUFFER_BYTES],
            filled: 0..0,
            copy_data: CopyData::Refuse,
            rest: 0,
            is_cut: false,
        }
    }

    /// From now on.
    pub(super) fn set_copy_data(&mut self, copy_data: CopyData) {
        self.copy_data = copy_data;
    }

    /// Received and not yet taken.
    fn pending(&self) -> &[u8] {
        self.bytes.get(self.filled.clone()).unwrap_or_default()
    }

    /// The header at the front, or `None` while it is incomplete.
    fn header(&self) -> Result<Option<Header>, Error> {
        let Some(&[tag, a, b, c, d]) = self.pending().first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        // the length counts itself but not the tag
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        let max_bytes = match tag {
            b'E' | b'N' | b'S' => MAX_COPY_MESSAGE_BYTES,
            b'd' if self.copy_data != CopyData::Refuse => MAX_COPY_MESSAGE_BYTES,
            _ => MAX_MESSAGE_BYTES,
        };
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

    /// What follows the first part of this message is passed over.
    fn cuts(&self, header: Header) -> bool {
        match header.tag {
            b'E' | b'N' | b'S' => true,
            b'd' => self.copy_data == CopyData::Cut,
            _ => false,
        }
    }

    fn comes_in_pieces(&self, header: Header) -> bool {
        header.tag == b'd'
            && header.total_bytes > RECEIVE_BUFFER_BYTES
            && self.copy_data == CopyData::Pieces
    }

    /// So much of the message at the front must be there before any of it can be taken.
    fn needs(&self, header: Header) -> usize {
        if header.total_bytes <= CUT_MESSAGE_BYTES {
            header.total_bytes
        } else if self.cuts(header) {
            CUT_MESSAGE_BYTES
        } else if self.comes_in_pieces(header) {
            HEAD_BYTES
        } else {
            header.total_bytes
        }
    }

    /// There is something to be taken: a message, the head of a large one, or a piece of it.
    pub(super) fn has_frame(&self) -> bool {
        if self.rest > 0 {
            return !self.filled.is_empty();
        }
        match self.header() {
            Ok(Some(header)) => self.needs(header) <= self.filled.len(),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// Takes the next message if it is whole, or its first part if it is one that is cut.
    pub(super) fn take(&mut self) -> Result<Option<Frame>, Error> {
        if self.rest > 0 {
            return Ok(None);
        }
        let Some(header) = self.header()? else {
            return Ok(None);
        };
        let len = self.needs(header);
        if len > self.filled.len() || self.comes_in_pieces(header) {
            return Ok(None);
        }
        let start = self.filled.start;
        let end = start + len;
        self.filled.start = end;
        if len < header.total_bytes {
            self.rest = header.total_bytes - len;
            self.is_cut = true;
            self.pass_over_cut();
        }
        let tag = header.tag;
        Ok(Some(Frame { tag, start, end }))
    }

    /// Begins the large CopyData message at the front, once enough of it is there; how long what it carries is. From then on
    /// [`FrameBuffer::piece`] gives it.
    pub(super) fn begin_large(&mut self) -> Result<Option<usize>, Error> {
        match self.header()? {
            Some(header)
                if self.rest == 0
                    && self.comes_in_pieces(header)
                    && self.filled.len() >= HEAD_BYTES =>
            {
                self.filled.start += HEADER_BYTES;
                self.rest = header.total_bytes - HEADER_BYTES;
                self.is_cut = false;
                Ok(Some(self.rest))
            }
            _ => Ok(None),
        }
    }

    /// Of the large message, what is there and was not taken.
    pub(super) fn peek(&self) -> &[u8] {
        let pending = self.pending();
        pending.get(..self.rest).unwrap_or(pending)
    }

    /// Takes so many bytes of the large message, which are there.
    pub(super) fn advance(&mut self, count: usize) {
        let count = count.min(self.peek().len());
        self.filled.start += count;
        self.rest -= count;
    }

    /// More of the large message is to come, or to be taken.
    pub(super) fn is_in_large(&self) -> bool {
        self.rest > 0 && !self.is_cut
    }

    /// Takes what is there of the large message, and whether that was the last of it.
    pub(super) fn piece(&mut self) -> Option<(Range<usize>, bool)> {
        let start = self.filled.start;
        let len = self.peek().len();
        self.advance(len);
        (len > 0).then_some((start..start + len, self.rest == 0))
    }

    /// The bytes of a piece, valid until [`FrameBuffer::space`] is called.
    pub(super) fn bytes(&self, piece: Range<usize>) -> &[u8] {
        self.bytes.get(piece).unwrap_or_default()
    }

    /// What follows the header of a message, valid until [`FrameBuffer::space`] is called.
    pub(super) fn body(&self, frame: Frame) -> &[u8] {
        self.bytes(frame.start + HEADER_BYTES..frame.end)
    }

    /// The whole message, with its header.
    pub(super) fn message(&self, frame: Frame) -> &[u8] {
        self.bytes(frame.start..frame.end)
    }

    /// Room to receive into, never empty; to be called when there was nothing to take.
    ///
    /// The part of a message that is there moves to the front: each message moves at most once. The buffer
    /// doubles only when it is full of received bytes, so a length alone allocates nothing.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let pending = self.filled.len();
        self.bytes.copy_within(self.filled.clone(), 0);
        self.filled = 0..pending;
        if self.bytes.len() > RECEIVE_BUFFER_BYTES && pending < RECEIVE_BUFFER_BYTES {
            self.bytes.truncate(RECEIVE_BUFFER_BYTES);
            self.bytes.shrink_to_fit();
        } else if pending == self.bytes.len() {
            let limit = MAX_MESSAGE_BYTES + 1;
            self.bytes
                .resize((2 * pending).min(limit).max(pending + 1), 0);
        }
        self.bytes.get_mut(pending..).unwrap_or_default()
    }

    /// So many bytes were put into [`FrameBuffer::space`].
    pub(super) fn received(&mut self, count: usize) {
        self.filled.end = (self.filled.end + count).min(self.bytes.len());
        self.pass_over_cut();
    }

    /// Of a message that was cut nothing more is kept, so that the buffer begins with another.
    fn pass_over_cut(&mut self) {
        if self.is_cut && self.rest > 0 {
            self.advance(self.rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = MAX_MESSAGE_BYTES;

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
            let mut buffer = FrameBuffer::new();
            receive(&mut buffer, &stream[..cut]);
            let mut found = drain(&mut buffer);
            receive(&mut buffer, &stream[cut..]);
            found.extend(drain(&mut buffer));
            assert_eq!(found, expected, "cut at {cut}");
        }
        let mut buffer = FrameBuffer::new();
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
            for tag in *b"dD" {
                let mut buffer = FrameBuffer::new();
                receive(&mut buffer, &[tag]);
                receive(&mut buffer, &length.to_be_bytes());
                assert_eq!(buffer.take().is_ok(), legal, "{length}");
                assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES, "{length}");
            }
        }
    }

    #[test]
    fn a_large_message_grows_the_buffer_as_it_comes_and_gives_it_back() {
        let large = vec![b'x'; MAX - 10];
        let mut buffer = FrameBuffer::new();
        receive(&mut buffer, &message(b'D', &large)[..100]);
        assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES);
        receive(&mut buffer, &message(b'D', &large)[100..]);
        assert!(buffer.bytes.len() <= MAX + 1);
        assert_eq!(drain(&mut buffer), [(b'D', large)]);
        receive(&mut buffer, &message(b'D', b"next"));
        assert_eq!(drain(&mut buffer), [(b'D', b"next".to_vec())]);
        assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES);
    }

    /// Takes whatever is there: messages, and the pieces of large ones put together.
    fn take_all(buffer: &mut FrameBuffer, large: &mut Vec<u8>, found: &mut Vec<(u8, Vec<u8>)>) {
        loop {
            let expected = buffer.has_frame();
            let mut taken = false;
            if buffer.is_in_large() {
                if let Some((piece, last)) = buffer.piece() {
                    taken = true;
                    large.extend_from_slice(buffer.bytes(piece));
                    if last {
                        found.push((b'd', std::mem::take(large)));
                    }
                }
            } else if let Some(frame) = buffer.take().unwrap() {
                taken = true;
                found.push((frame.tag, buffer.body(frame).to_vec()));
            } else if let Some(len) = buffer.begin_large().unwrap() {
                taken = true;
                assert!(len > RECEIVE_BUFFER_BYTES - HEADER_BYTES);
                assert!(buffer.peek().len() >= HEAD_BYTES - HEADER_BYTES);
            }
            assert_eq!(taken, expected);
            if !taken {
                return;
            }
        }
    }

    #[test]
    fn what_others_make_long_goes_through_a_buffer_that_does_not_grow() {
        let data = |len: usize| (0..len).map(|i| i as u8).collect::<Vec<u8>>();
        let edge = RECEIVE_BUFFER_BYTES - HEADER_BYTES;
        for copy_data in [CopyData::Pieces, CopyData::Cut] {
            let sent = [
                (b'd', data(10)),
                (b'd', data(edge)),
                (b'd', data(edge + 1)),
                (b'E', data(CUT_MESSAGE_BYTES - HEADER_BYTES)),
                (b'N', data(2_000_000)),
                (b'd', data(3_000_000)),
                (b'd', data(1_000_000)),
                (b'S', data(CUT_MESSAGE_BYTES - HEADER_BYTES + 1)),
                (b'c', data(0)),
            ];
            let stream: Vec<u8> = sent.iter().flat_map(|(t, b)| message(*t, b)).collect();
            for step in [777, 8_191, 65_536] {
                let mut buffer = FrameBuffer::new();
                buffer.set_copy_data(copy_data);
                let (mut large, mut found) = (Vec::new(), Vec::new());
                for bytes in stream.chunks(step) {
                    let mut rest = bytes;
                    while !rest.is_empty() {
                        let space = buffer.space();
                        let count = space.len().min(rest.len());
                        space[..count].copy_from_slice(&rest[..count]);
                        buffer.received(count);
                        rest = &rest[count..];
                        take_all(&mut buffer, &mut large, &mut found);
                    }
                    assert_eq!(buffer.bytes.len(), RECEIVE_BUFFER_BYTES);
                }
                let expected = sent.iter().map(|(tag, body)| {
                    let cut = *tag != b'd' || copy_data == CopyData::Cut;
                    let len = match cut {
                        true => body.len().min(CUT_MESSAGE_BYTES - HEADER_BYTES),
                        false => body.len(),
                    };
                    (*tag, body[..len].to_vec())
                });
                assert!(found.into_iter().eq(expected), "{copy_data:?} {step}");
            }
        }
    }
}
