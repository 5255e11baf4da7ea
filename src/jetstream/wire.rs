//! What a publish looks like on the wire: its header block, and how large it is. Pure.
//!
//! The block is `NATS/1.0`, then a line a header (ADR-4): the fence, the message id, the position, and then what the
//! row brings along. nats-server 2.10 finds a header by the first place where its name stands: an id or a value
//! of the row that holds the name of the fence must not come before it, or the publish would go unfenced. The server
//! counts block and body against `max_payload` and `max_msg_size`.

use crate::outbox::batch::{Event, EventSpans, OutboxEvent};
use std::fmt::Write;

const MSG_ID: &str = "Nats-Msg-Id";
const EXPECTED_LAST_SEQUENCE: &str = "Nats-Expected-Last-Sequence";
const EXPECTED_LAST_MSG_ID: &str = "\r\nNats-Expected-Last-Msg-Id: ";
const OUTBOX_POSITION: &str = "\r\nOutbox-Position: ";
/// `NATS/1.0`, a line end, the first header's colon, and the two line ends of the block.
const FRAME_LEN: usize = "NATS/1.0\r\nNats-Msg-Id:\r\n\r\n".len();
/// A header that is not the first, but for its value.
const FENCE_LEN: usize = EXPECTED_LAST_SEQUENCE.len() + "\r\n: ".len();

/// An event to publish.
#[derive(Clone, Debug)]
pub struct Publish {
    /// The event.
    pub event: Event,
    /// Names the event.
    pub token: u64,
    /// Names the answer, and comes back with it.
    pub reply: u64,
    /// The fence: the sequence the stream must end at; `None` with at-least-once.
    pub expected_last_sequence: Option<u64>,
    /// The other half of the fence, where the stream allows it: the event whose message must be the last
    /// one. Sequences alone would let an event through behind a lost one, when somebody else's message has
    /// taken the lost one's sequence. Never for a replicated stream.
    pub expected_last: Option<Event>,
}

/// The name of the first header, which the client library writes with its colon, and what stands behind that: its
/// value, and the other lines with it.
pub fn lines(
    event: &OutboxEvent<'_>,
    expected_last_sequence: Option<u64>,
    expected_last_msg_id: Option<&str>,
    position_source: &str,
) -> (&'static str, String) {
    let mut lines =
        String::with_capacity(event.id.len() + position_source.len() + event.headers.len() + 200);
    // writing to a String cannot fail
    let first = match expected_last_sequence {
        Some(seq) => {
            let _ = write!(lines, "{seq}\r\n{MSG_ID}: ");
            EXPECTED_LAST_SEQUENCE
        }
        None => MSG_ID,
    };
    lines.push_str(event.id);
    if let Some(id) = expected_last_msg_id {
        lines.push_str(EXPECTED_LAST_MSG_ID);
        lines.push_str(id);
    }
    let position = event.position;
    let _ = write!(lines, "{OUTBOX_POSITION}{position_source} {position}");
    lines.push_str(event.headers);
    (first, lines)
}

/// How many bytes of an event with these parts the server counts.
pub fn size(
    event: &EventSpans,
    expected_last_sequence: Option<u64>,
    expected_last_msg_id_len: Option<usize>,
    position_source_len: usize,
) -> usize {
    let fence = expected_last_sequence.map_or(0, |seq| FENCE_LEN + digits(seq))
        + expected_last_msg_id_len.map_or(0, |len| EXPECTED_LAST_MSG_ID.len() + len);
    let lsn = event.position.commit_lsn.0;
    let position = OUTBOX_POSITION.len()
        + position_source_len
        + hex_digits(lsn >> 32)
        + hex_digits(lsn & 0xFFFF_FFFF)
        + digits(u64::from(event.position.ordinal))
        + " / ".len();
    FRAME_LEN + fence + position + event.wire_len()
}

/// The bytes that an event's id, headers and body can have at least, whatever the fence is, where the server
/// counts `max_payload`.
pub fn room(max_payload: usize, position_source_len: usize) -> usize {
    const LONGEST: usize = FRAME_LEN
        + FENCE_LEN
        + EXPECTED_LAST_MSG_ID.len()
        + OUTBOX_POSITION.len()
        + 20
        + crate::outbox::percent::MAX_LEN
        + " FFFFFFFF/FFFFFFFF 4294967295".len();
    max_payload.saturating_sub(LONGEST + position_source_len)
}

fn digits(number: u64) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

fn hex_digits(number: u64) -> usize {
    number.checked_ilog2().unwrap_or(0) as usize / 4 + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::batch::{Batch, Change, Fate};
    use crate::outbox::position::Position;
    use crate::postgres::Lsn;
    use std::convert::Infallible;

    #[test]
    fn the_size_is_that_of_what_is_written() {
        for (lsn, ordinal, sequence, last_id) in [
            (0, 0, None, None),
            (0x16B_3748, 1, Some(0), None),
            (0xF_0000_0000, 9, Some(9), Some("")),
            (0x10_0000_0010, 10, Some(10), Some("previous")),
            (u64::MAX, u32::MAX, Some(u64::MAX), Some("größe")),
        ] {
            let position = Position {
                commit_lsn: Lsn(lsn),
                ordinal,
            };
            let mut batch = Batch::default();
            let append = |text: &str, out: &mut Vec<u8>| {
                out.extend_from_slice(text.as_bytes());
                Ok::<(), Infallible>(())
            };
            let Ok(()) = batch.draft("public.outbox", position, Fate::Publish, |draft| {
                draft.subject(|out| append("events.a.b", out))?;
                draft.id(|out| append("id-1", out))?;
                draft.headers(|out| append("\r\nX: 1\r\nY: ö", out))?;
                draft.body(|out| append("{\"a\":1}", out))
            });
            let [Change::Event(spans)] = batch.changes() else {
                panic!("not one event")
            };
            let event = batch.event(spans);
            let source = "jetstream_outbox 7312345678901234567 1";
            let (first, lines) = lines(&event, sequence, last_id, source);
            let block = format!("NATS/1.0\r\n{first}:{lines}\r\n\r\n");
            let fence = block.find(EXPECTED_LAST_SEQUENCE);
            assert!(
                fence.is_none_or(|at| at < block.find("id-1").unwrap()),
                "{block}"
            );
            let size = size(spans, sequence, last_id.map(str::len), source.len());
            assert_eq!(size, block.len() + event.body.len(), "{block}");
            assert!(room(10_000, source.len()) <= 10_000 - (size - spans.wire_len()));
        }
        assert_eq!(room(100, 0), 0);
    }
}
