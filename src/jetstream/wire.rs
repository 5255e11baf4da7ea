//! What a publish looks like on the wire, and how large it is. Pure.
//!
//! It is an `HPUB`: a line, a block of headers, the body. The block is `NATS/1.0`, then a line a header (ADR-4): the fence, the message id, the position, and then what the
//! row brings along. nats-server 2.10 finds a header by the first place where its name stands: an id or a value
//! of the row that holds the name of the fence must not come before it, or the publish would go unfenced. The server
//! counts block and body against `max_payload` and `max_msg_size`.

use crate::nats::Error;
use crate::nats::connection::Burst;
use crate::outbox::batch::{Event, EventSpans, Parts};
use std::io::Write;
use std::sync::Arc;

/// A header that is read back, too: its name, and how its line begins.
macro_rules! header {
    ($(#[$doc:meta])* $name:ident, $line:ident = $text:literal) => {
        $(#[$doc])*
        pub const $name: &str = $text;
        const $line: &str = concat!("\r\n", $text, ": ");
    };
}

header! {
    /// The header of the fence (ADR-22): the sequence that the stream must end at.
    EXPECTED_LAST_SEQUENCE, FENCE = "Nats-Expected-Last-Sequence"
}
header! {
    /// The header of the message id.
    MSG_ID, ID = "Nats-Msg-Id"
}
header! {
    /// The header that carries a [`SourcePosition`](crate::outbox::position::SourcePosition).
    OUTBOX_POSITION, POSITION = "Outbox-Position"
}
header! {
    /// The header of an event that was published after later ones.
    OUTBOX_LATE, LATE = "Outbox-Late"
}
header! {
    /// The header of the last event of a transaction in its stream: how many events of the transaction are there.
    TRANSACTION_END, END_OF_TRANSACTION = "Outbox-Transaction-End"
}

const VERSION: &str = "NATS/1.0";
const EXPECTED_LAST_MSG_ID: &str = "\r\nNats-Expected-Last-Msg-Id: ";
const EXPECTED_STREAM: &str = "\r\nNats-Expected-Stream: ";
const TRUE: &str = "true";
const LATE_LEN: usize = LATE.len() + TRUE.len();
const END: &str = "\r\n\r\n";
/// What every block has, but for the values.
const FRAME_LEN: usize = VERSION.len() + ID.len() + END.len();

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
    /// The stream that must store it; on each publish this would cost the server 8 % more, so only the first one of a
    /// connection says so.
    pub expected_stream: Option<Arc<str>>,
    /// It is published after later events.
    pub is_late: bool,
    /// It is the last event of its transaction in its stream, and so many of them are there then.
    pub transaction_end: Option<u64>,
}

impl Publish {
    /// How many bytes its optional headers have.
    fn extra_len(&self) -> usize {
        let stream = self.expected_stream.as_ref();
        stream.map_or(0, |stream| EXPECTED_STREAM.len() + stream.len())
            + if self.is_late { LATE_LEN } else { 0 }
            + (self.transaction_end).map_or(0, |count| END_OF_TRANSACTION.len() + digits(count))
    }
}

/// Subject and id come from the mapper, which lets no control character and no space of a subject through; here they would
/// forge protocol.
pub fn check(event: &Event) -> Result<(), Error> {
    match is_legal(event.parts()) {
        true => Ok(()),
        false => Err(Error::Unpublishable {
            reason: format!(
                "the event at {} has a control character or a space in its subject or id",
                event.position()
            ),
        }),
    }
}

fn is_legal(parts: Parts<'_>) -> bool {
    let has_control = |text: &[u8]| text.iter().any(u8::is_ascii_control);
    !has_control(parts.id) && !has_control(parts.subject) && !parts.subject.contains(&b' ')
}

/// Events on their way to the socket; each is made into bytes when its turn comes.
pub struct Publishes {
    rest: std::vec::IntoIter<Publish>,
    /// `<slot> <system id> <timeline>`, which begins their `Outbox-Position`.
    position_source: Arc<str>,
}

impl Publishes {
    /// Each must have passed [`check`].
    pub fn new(publishes: Vec<Publish>, position_source: &Arc<str>) -> Publishes {
        Publishes {
            rest: publishes.into_iter(),
            position_source: position_source.clone(),
        }
    }
}

impl Burst for Publishes {
    fn encode_next(&mut self, inbox: &str, out: &mut Vec<u8>) -> bool {
        let Some(publish) = self.rest.next() else {
            return false;
        };
        encode(&publish, &self.position_source, inbox, out);
        true
    }
}

/// Appends one publish; its answer goes to `inbox` and the publish's `reply`.
fn encode(publish: &Publish, position_source: &str, inbox: &str, out: &mut Vec<u8>) {
    let event = publish.event.parts();
    let last_id = publish.expected_last.as_ref().map(|last| last.parts().id);
    let all = size(
        publish.event.spans(),
        publish.expected_last_sequence,
        last_id.map(<[u8]>::len),
        position_source.len(),
    );
    let all = all + publish.extra_len();
    let headers = all - event.body.len();
    out.reserve(event.subject.len() + inbox.len() + all + 80);
    out.extend_from_slice(b"HPUB ");
    out.extend_from_slice(event.subject);
    out.extend_from_slice(b" ");
    text(out, inbox);
    number(out, publish.reply);
    out.extend_from_slice(b" ");
    number(out, headers as u64);
    out.extend_from_slice(b" ");
    number(out, all as u64);
    out.extend_from_slice(b"\r\n");
    let start = out.len();
    text(out, VERSION);
    if let Some(seq) = publish.expected_last_sequence {
        text(out, FENCE);
        number(out, seq);
    }
    text(out, ID);
    out.extend_from_slice(event.id);
    if let Some(last_id) = last_id {
        text(out, EXPECTED_LAST_MSG_ID);
        out.extend_from_slice(last_id);
    }
    if let Some(stream) = &publish.expected_stream {
        text(out, EXPECTED_STREAM);
        text(out, stream);
    }
    if publish.is_late {
        text(out, LATE);
        text(out, TRUE);
    }
    if let Some(count) = publish.transaction_end {
        text(out, END_OF_TRANSACTION);
        number(out, count);
    }
    text(out, POSITION);
    text(out, position_source);
    // writing to a Vec cannot fail
    let _ = write!(out, " {}", publish.event.position());
    out.extend_from_slice(event.headers);
    text(out, END);
    debug_assert_eq!(
        out.len() - start,
        headers,
        "the size is that of what is written"
    );
    out.extend_from_slice(event.body);
    out.extend_from_slice(b"\r\n");
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
}

fn number(out: &mut Vec<u8>, number: u64) {
    text(out, itoa::Buffer::new().format(number));
}

/// How many bytes of an event with these parts the server counts.
pub fn size(
    event: &EventSpans,
    expected_last_sequence: Option<u64>,
    expected_last_msg_id_len: Option<usize>,
    position_source_len: usize,
) -> usize {
    let fence = expected_last_sequence.map_or(0, |seq| FENCE.len() + digits(seq))
        + expected_last_msg_id_len.map_or(0, |len| EXPECTED_LAST_MSG_ID.len() + len);
    let lsn = event.position.commit_lsn.0;
    let position = POSITION.len()
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
        + FENCE.len()
        + EXPECTED_LAST_MSG_ID.len()
        + POSITION.len()
        + 20
        + crate::outbox::percent::MAX_LEN
        + " FFFFFFFF/FFFFFFFF 4294967295".len();
    max_payload.saturating_sub(LONGEST + position_source_len)
}

/// The most that [`Publish::transaction_end`] takes.
pub const TRANSACTION_END_LEN: usize = END_OF_TRANSACTION.len() + 20;

/// How many bytes the optional headers of a publish have: [`Publish::expected_stream`] and [`Publish::is_late`].
pub fn extra_len(expected_stream: &str) -> usize {
    EXPECTED_STREAM.len() + expected_stream.len() + LATE_LEN
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
    use crate::outbox::batch::{Batch, Fate};
    use crate::outbox::position::Position;
    use crate::postgres::Lsn;
    use std::convert::Infallible;
    use std::sync::Arc;

    fn event(id: &str, position: Position) -> Event {
        let mut batch = Batch::default();
        let append = |text: &str, out: &mut Vec<u8>| {
            out.extend_from_slice(text.as_bytes());
            Ok::<(), Infallible>(())
        };
        let Ok(()) = batch.draft("public.outbox", position, Fate::Publish, |draft| {
            draft.subject(|out| append("events.a.b", out))?;
            draft.id(|out| append(id, out))?;
            draft.headers(|out| append("\r\nX: 1\r\nY: ö", out))?;
            draft.body(|out| append("{\"a\":1}", out))
        });
        Event::new(&Arc::new(batch), 0).unwrap()
    }

    const SOURCE: &str = "jetstream_outbox 7312345678901234567 1";

    fn encoded(publish: &Publish) -> String {
        let mut out = b"before".to_vec();
        let mut burst = Publishes::new(vec![publish.clone()], &SOURCE.into());
        assert!(burst.encode_next("_INBOX.me.", &mut out));
        assert!(!burst.encode_next("_INBOX.me.", &mut out));
        let text = String::from_utf8(out).unwrap();
        text.strip_prefix("before").unwrap().into()
    }

    #[test]
    fn a_publish_is_a_line_then_headers_with_the_fence_first_then_the_body() {
        let position = |lsn| Position {
            commit_lsn: Lsn(lsn),
            ordinal: 3,
        };
        let mut publish = Publish {
            event: event("id-1", position(0x16B_3748)),
            token: 1,
            reply: 12,
            expected_last_sequence: Some(41),
            expected_last: Some(event("id-0", position(1))),
            expected_stream: None,
            is_late: false,
            transaction_end: None,
        };
        assert_eq!(
            encoded(&publish),
            "HPUB events.a.b _INBOX.me.12 179 186\r\n\
             NATS/1.0\r\n\
             Nats-Expected-Last-Sequence: 41\r\n\
             Nats-Msg-Id: id-1\r\n\
             Nats-Expected-Last-Msg-Id: id-0\r\n\
             Outbox-Position: jetstream_outbox 7312345678901234567 1 0/16B3748 3\r\n\
             X: 1\r\nY: ö\r\n\r\n\
             {\"a\":1}\r\n"
        );
        publish.transaction_end = Some(12);
        assert!(encoded(&publish).contains(
            "-Id: id-0\r\nOutbox-Transaction-End: 12\r\nOutbox-Position: jetstream_outbox 73"
        ));
        (publish.expected_last_sequence, publish.expected_last) = (None, None);
        publish.transaction_end = None;
        assert_eq!(
            encoded(&publish),
            "HPUB events.a.b _INBOX.me.12 113 120\r\n\
             NATS/1.0\r\n\
             Nats-Msg-Id: id-1\r\n\
             Outbox-Position: jetstream_outbox 7312345678901234567 1 0/16B3748 3\r\n\
             X: 1\r\nY: ö\r\n\r\n\
             {\"a\":1}\r\n"
        );
    }

    #[test]
    fn the_size_is_that_of_what_is_written() {
        for (lsn, ordinal, sequence, last_id) in [
            (0, 0, None, None),
            (0x16B_3748, 1, Some(0), None),
            (0xF_0000_0000, 9, Some(9), Some("a")),
            (0x10_0000_0010, 10, Some(10), Some("previous")),
            (u64::MAX, u32::MAX, Some(u64::MAX), Some("größe")),
        ] {
            let position = Position {
                commit_lsn: Lsn(lsn),
                ordinal,
            };
            let publish = Publish {
                event: event("id-1", position),
                token: 0,
                reply: 0,
                expected_last_sequence: sequence,
                expected_last: last_id.map(|id| event(id, position)),
                expected_stream: None,
                is_late: false,
                transaction_end: None,
            };
            let marked = Publish {
                transaction_end: Some(sequence.unwrap_or(1)),
                expected_stream: Some("S".into()),
                is_late: true,
                ..publish.clone()
            };
            let extra = encoded(&marked).len() - encoded(&publish).len();
            assert!(extra <= extra_len("S") + TRANSACTION_END_LEN + 4);
            let text = encoded(&publish);
            let (line, message) = text.split_once("\r\n").unwrap();
            let all = message.len() - "\r\n".len();
            let headers = all - publish.event.view().body.len();
            assert!(line.ends_with(&format!(" {headers} {all}")), "{text}");
            let spans = publish.event.spans();
            let size = size(spans, sequence, last_id.map(str::len), SOURCE.len());
            assert_eq!(size, all, "{text}");
            assert!(room(10_000, SOURCE.len()) <= 10_000 - (size - spans.wire_len()));
        }
        assert_eq!(room(100, 0), 0);
    }

    #[test]
    fn what_would_forge_protocol_is_refused() {
        let position = Position {
            commit_lsn: Lsn(1),
            ordinal: 1,
        };
        let event = event("id-1", position);
        let parts = event.parts();
        assert!(check(&event).is_ok() && is_legal(parts));
        for (subject, id) in [
            ("a\r\nPUB b", "1"),
            ("a b", "1"),
            ("a", "1\r\nNats-Rollup: all"),
            ("a", "1\n"),
        ] {
            let (subject, id) = (subject.as_bytes(), id.as_bytes());
            let forged = Parts {
                subject,
                id,
                ..parts
            };
            assert!(!is_legal(forged), "{}", forged.id.escape_ascii());
        }
    }
}
