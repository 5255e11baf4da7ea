//! Events that cannot be published as they are: what the operator wants done with them, and what they become.
//!
//! A parked event is published in its place in the order, under the park subject, with the id, the fence and the
//! position it would have had, so that it is there once and in order like any other. Its headers tell the cause
//! and the subject it was meant for; its own headers stay, but for those that NATS acts on; its body is cut, and
//! marked so, where it is larger than the server takes.

use super::batch::{Batch, Event, Fate, OutboxEvent};
use super::header::is_plain;
use super::message_id::must_escape;
use super::percent;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

/// Why the event is parked.
pub const PARKED: &str = "Outbox-Parked";
/// The subject it was meant for.
pub const ORIGINAL_SUBJECT: &str = "Outbox-Original-Subject";
/// How many bytes its body had before it was cut.
pub const BODY_CUT: &str = "Outbox-Body-Cut";
/// How many bytes its own headers had, where they are left out.
pub const HEADERS_CUT: &str = "Outbox-Headers-Cut";

/// Of more own headers than this a parked event keeps none.
const MAX_KEPT_HEADERS: usize = 16 * 1024;
/// The longest cause, in bytes.
const MAX_CAUSE_LEN: usize = 1_000;

/// What becomes of an event that can never be published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnPoison {
    /// The relay halts; nothing is confirmed past it.
    #[default]
    Stop,
    /// It is published under the park subject.
    Park,
    /// It is given up, with a warning.
    Skip,
}

/// What becomes of a value that cannot stand in a subject or a header as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBad {
    /// It is encoded, so that it can be read back.
    #[default]
    Encode,
    /// The event is published under the park subject.
    Park,
    /// The relay halts; nothing is confirmed past it.
    Stop,
}

impl fmt::Display for OnPoison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnPoison::Stop => "stop",
            OnPoison::Park => "park",
            OnPoison::Skip => "skip",
        })
    }
}

impl fmt::Display for OnBad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnBad::Encode => "encode",
            OnBad::Park => "park",
            OnBad::Stop => "stop",
        })
    }
}

/// What is to be done with such events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// With one that can never be published.
    pub on_poison: OnPoison,
    /// With one whose subject would hold something encoded.
    pub on_bad_subject: OnBad,
    /// With one whose headers would.
    pub on_bad_header: OnBad,
    /// Where parked events go: a legal subject.
    pub park_subject: String,
}

impl Policy {
    /// Whether events may be parked, so that a stream must capture the park subject.
    pub fn parks(&self) -> bool {
        self.on_poison == OnPoison::Park
            || self.on_bad_subject == OnBad::Park
            || self.on_bad_header == OnBad::Park
    }
}

/// Writes the header lines of a parked event. `own` are those it has already.
pub fn write_headers(own: &str, cause: &str, home: &str, out: &mut Vec<u8>) {
    if own.len() <= MAX_KEPT_HEADERS {
        for line in own.split("\r\n").skip(1).filter(|line| !is_acted_on(line)) {
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(line.as_bytes());
        }
    } else {
        write_line(HEADERS_CUT, &own.len().to_string(), out);
    }
    let mut cut = cause.len().min(MAX_CAUSE_LEN);
    while !cause.is_char_boundary(cut) {
        cut -= 1;
    }
    write_line(PARKED, cause.get(..cut).unwrap_or_default(), out);
    if !home.is_empty() {
        write_line(ORIGINAL_SUBJECT, home, out);
    }
}

/// Writes the line that tells how many bytes a body had before it was cut.
pub fn write_body_cut(len: usize, out: &mut Vec<u8>) {
    write_line(BODY_CUT, &len.to_string(), out);
}

/// Why a parked event is parked, by its header lines.
pub fn cause(headers: &str) -> &str {
    let mut lines = headers.split("\r\n");
    let cause = lines.find_map(|line| line.strip_prefix(PARKED)?.strip_prefix(": "));
    cause.unwrap_or_default()
}

/// A header that the server acts on, and may have refused the event for.
fn is_acted_on(line: &str) -> bool {
    line.get(..5)
        .is_some_and(|begin| begin.eq_ignore_ascii_case("nats-"))
}

fn write_line(name: &str, value: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("\r\n{name}: ").as_bytes());
    if is_plain(value) {
        out.extend_from_slice(value.as_bytes());
    } else {
        percent::write(value, usize::MAX, must_escape, out);
    }
}

/// The event as it is parked under `subject`, alone in a batch; `room` is what id, headers and body may have. One
/// that is parked already is cut to the room.
pub fn parked(event: &OutboxEvent<'_>, subject: &str, cause: &str, room: usize) -> Event {
    let again = event.fate == Fate::Park;
    let mut headers = Vec::new();
    if again {
        headers.extend_from_slice(event.headers.as_bytes());
    } else {
        write_headers(event.headers, cause, event.subject, &mut headers);
    }
    let mut len = event.body.len();
    if event.id.len() + headers.len() + len > room {
        if !event.headers.contains(BODY_CUT) {
            write_body_cut(len, &mut headers);
        }
        len = room.saturating_sub(event.id.len() + headers.len()).min(len);
        // a character of UTF-8 has at most three bytes after its first
        for _ in 0..3 {
            match event.body.get(len) {
                Some(0x80..=0xBF) if len > 0 => len -= 1,
                _ => break,
            }
        }
    }
    let append = |part: &[u8], out: &mut Vec<u8>| {
        out.extend_from_slice(part);
        Ok::<(), Infallible>(())
    };
    let mut batch = Batch::default();
    let Ok(()) = batch.draft(event.table, event.position, Fate::Park, |draft| {
        draft.subject(|out| append(subject.as_bytes(), out))?;
        draft.id(|out| append(event.id.as_bytes(), out))?;
        draft.headers(|out| append(&headers, out))?;
        draft.body(|out| append(event.body.get(..len).unwrap_or_default(), out))
    });
    Event::new(&Arc::new(batch), 0).expect("one event was written")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::position::Position;

    fn event<'a>(headers: &'a str, body: &'a str) -> OutboxEvent<'a> {
        OutboxEvent {
            fate: Fate::Publish,
            subject: "events.a.b",
            id: "7",
            headers,
            body: body.as_bytes(),
            table: "public.outbox",
            position: Position::default(),
        }
    }

    /// Subject, headers and body of the event as parked.
    fn park(event: &OutboxEvent<'_>, room: usize) -> (String, String, String) {
        let parked = parked(event, "s.parked", "too\nlarge", room);
        let parked = parked.view();
        assert_eq!((parked.id, parked.table), (event.id, event.table));
        assert_eq!((parked.fate, parked.position), (Fate::Park, event.position));
        assert_eq!(cause(parked.headers), "too%0Alarge");
        (
            parked.subject.to_string(),
            parked.headers.to_string(),
            String::from_utf8(parked.body.to_vec()).unwrap(),
        )
    }

    const TOLD: &str = "\r\nOutbox-Parked: too%0Alarge\r\nOutbox-Original-Subject: events.a.b";

    #[test]
    fn a_parked_event_tells_why_and_keeps_what_it_can() {
        let many = format!("\r\nX: {}", "x".repeat(MAX_KEPT_HEADERS));
        for (headers, room, kept, told, body) in [
            ("", 1_000, "", "", "größer"),
            (
                "\r\nX: 1\r\nnats-TTL: x\r\nY: 2",
                1_000,
                "\r\nX: 1\r\nY: 2",
                "",
                "größer",
            ),
            (
                many.as_str(),
                1_000,
                "\r\nOutbox-Headers-Cut: 16389",
                "",
                "größer",
            ),
            ("", TOLD.len() + 9, "", "", "größer"),
            ("", TOLD.len() + 8, "", "\r\nOutbox-Body-Cut: 8", ""),
            ("", TOLD.len() + 24, "", "", "größer"),
            ("", 0, "", "\r\nOutbox-Body-Cut: 8", ""),
        ] {
            let expected = (
                "s.parked".to_string(),
                format!("{kept}{TOLD}{told}"),
                body.to_string(),
            );
            assert_eq!(park(&event(headers, "größer"), room), expected, "{room}");
        }
    }

    #[test]
    fn the_cut_falls_between_characters() {
        let fixed = TOLD.len() + 1 + "\r\nOutbox-Body-Cut: 200".len();
        let text = "ö".repeat(100);
        for (room, body) in [(fixed + 3, "ö"), (fixed + 4, "öö"), (fixed + 1, "")] {
            assert_eq!(park(&event("", &text), room).2, body);
        }
    }

    #[test]
    fn what_is_parked_already_is_only_cut() {
        let first = parked(&event("", &"x".repeat(100)), "s.parked", "first", 10_000);
        let first = first.view();
        let again = parked(&first, "s.parked", "second", first.headers.len() + 30);
        let again = again.view();
        assert!(again.headers.starts_with(first.headers) && !again.headers.contains("second"));
        assert!(again.headers.ends_with("\r\nOutbox-Body-Cut: 100"));
        assert_eq!(again.body.len(), 7);
        assert_eq!(
            again.id.len() + again.headers.len() + again.body.len(),
            first.headers.len() + 30
        );
    }

    #[test]
    fn a_cause_is_bounded() {
        let mut out = Vec::new();
        write_headers("", &"ö".repeat(10_000), "", &mut out);
        assert!(out.len() < 1_100);
    }
}
