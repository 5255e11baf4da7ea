//! `tail`: prints events as they stand in the streams.
//!
//! Messages are read one by one through the API (`STREAM.MSG.GET` with `next_by_subj`), so there is no consumer, nothing to
//! acknowledge, and nobody who shares the stream notices.

use super::bus::Bus;
use super::{Error, say};
use crate::config::Config;
use crate::config::operation::{From, Tail};
use crate::exit::Exit;
use crate::jetstream;
use crate::jetstream::streams::{StoredMessage, StreamInfo, next_message_request};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::thread;
use std::time::Duration;

/// Between two looks for more, with `-follow`.
const LOOK: Duration = Duration::from_millis(200);
/// Before a server that was lost is tried again, with `-follow`.
const PAUSE: Duration = Duration::from_secs(1);

/// How far a stream has been read.
struct Cursor {
    stream: String,
    /// The sequence from which on the next message is looked for.
    next: u64,
    /// The last sequence to print; `None`: no end.
    last: Option<u64>,
    /// A message that waits for its turn.
    head: Option<(Timestamp, StoredMessage)>,
}

/// Prints events until there are no more, or enough.
pub fn run(config: &Config, how: &Tail) -> Result<Exit, Error> {
    let mut bus = Bus::connect(&config.nats)?;
    let infos = bus.streams(&how.subject)?;
    if infos.is_empty() {
        return Err(Error::Wrong {
            what: format!("find the stream of {}: no stream captures it", how.subject),
            remedy: "correct -subject or -prefix; setup creates a stream".into(),
            exit: Exit::Configuration,
        });
    }
    let mut cursors = Vec::with_capacity(infos.len());
    for info in &infos {
        cursors.push(Cursor {
            stream: info.config.name.clone(),
            next: start(&mut bus, info, how)?,
            last: (!how.follow).then_some(info.state.last_seq),
            head: None,
        });
    }
    let several = cursors.len() > 1;
    let mut left = how.count.unwrap_or(u64::MAX);
    let mut lost = false;
    while left > 0 {
        let filled = cursors
            .iter_mut()
            .try_for_each(|cursor| cursor.fill(&mut bus, &how.subject));
        match filled {
            Ok(()) => lost = false,
            Err(error) if how.follow && may_pass(&error) => {
                if !lost {
                    log::warn!("{error}; trying again");
                }
                lost = true;
                thread::sleep(PAUSE);
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let oldest = cursors
            .iter_mut()
            .filter(|cursor| cursor.head.is_some())
            .min_by_key(|cursor| cursor.head.as_ref().map(|(time, _)| *time));
        let taken = oldest.and_then(|cursor| Some((cursor.stream.as_str(), cursor.head.take()?.1)));
        match taken {
            Some((stream, message)) => {
                say(&match how.json {
                    true => json_line(stream, &message),
                    false => text(several.then_some(stream), &message),
                })?;
                left -= 1;
            }
            None if how.follow => thread::sleep(LOOK),
            None => break,
        }
    }
    Ok(Exit::Done)
}

impl Cursor {
    /// Reads the next message, if none waits.
    fn fill(&mut self, bus: &mut Bus<'_>, subject: &str) -> Result<(), jetstream::Error> {
        if self.head.is_some() || self.last.is_some_and(|last| self.next > last) {
            return Ok(());
        }
        let found = bus.message(next_message_request(&self.stream, self.next, subject))?;
        let Some(message) = found.filter(|found| self.last.is_none_or(|last| found.seq <= last))
        else {
            // what is not there now is not waited for
            self.next = self.last.map_or(self.next, |last| last + 1);
            return Ok(());
        };
        self.next = message.seq + 1;
        self.head = Some((time(&message), message));
        Ok(())
    }
}

/// A message whose time cannot be read goes first.
fn time(message: &StoredMessage) -> Timestamp {
    message.time.parse().unwrap_or_default()
}

/// The server may come back.
fn may_pass(error: &jetstream::Error) -> bool {
    use crate::nats::Error::{Lost, NoServer, NotNats, Refused, Timeout, Unreachable};
    match error {
        jetstream::Error::ApiTimeout { .. } => true,
        jetstream::Error::Nats(error) => matches!(
            error,
            Lost { .. }
                | NoServer(_)
                | NotNats { .. }
                | Refused { .. }
                | Timeout { .. }
                | Unreachable { .. }
        ),
        jetstream::Error::Api { .. } => false,
    }
}

/// The sequence to begin with.
fn start(bus: &mut Bus<'_>, info: &StreamInfo, how: &Tail) -> Result<u64, Error> {
    let since = match how.from {
        From::Start => return Ok(info.state.first_seq.max(1)),
        From::End => return Ok(info.state.last_seq + 1),
        From::Sequence(seq) => return Ok(seq.max(1)),
        From::Time(time) => time,
        From::Age(age) => Timestamp::now().checked_sub(age).unwrap_or(Timestamp::MIN),
    };
    // messages are stored in the order of their times: a search among the sequences
    let (mut low, mut high) = (info.state.first_seq.max(1), info.state.last_seq + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        let request = next_message_request(&info.config.name, middle, &how.subject);
        match bus.message(request)? {
            Some(message) if time(&message) < since => low = message.seq + 1,
            _ => high = middle,
        }
    }
    Ok(low)
}

fn json_line(stream: &str, message: &StoredMessage) -> String {
    let mut headers: Map<String, Value> = Map::new();
    for (name, value) in &message.headers {
        let values = headers.entry(name.clone()).or_insert_with(|| json!([]));
        if let Some(values) = values.as_array_mut() {
            values.push(json!(value));
        }
    }
    let (data, text) = match std::str::from_utf8(&message.data) {
        Ok(text) => ("data", text.to_string()),
        Err(_) => ("data_base64", STANDARD.encode(&message.data)),
    };
    let line = json!({
        "stream": stream, "seq": message.seq, "time": message.time, "subject": message.subject, "headers": headers,
        data: text,
    });
    format!("{line}\n")
}

/// As `nats stream view` has it.
fn text(stream: Option<&str>, message: &StoredMessage) -> String {
    let mut text = String::from("[");
    if let Some(stream) = stream {
        text += stream;
        text.push(' ');
    }
    let subject = printable(&message.subject);
    let _ = write!(
        text,
        "{}] Subject: {subject} Received: {}\n\n",
        message.seq, message.time
    );
    for (name, value) in &message.headers {
        let _ = writeln!(text, "  {}: {}", printable(name), printable(value));
    }
    if !message.headers.is_empty() {
        text.push('\n');
    }
    text += &printable(&String::from_utf8_lossy(&message.data));
    text += "\n\n";
    text
}

/// Without what a terminal would obey.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() && c != '\n' && c != '\t' {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(data: &[u8]) -> StoredMessage {
        StoredMessage {
            subject: "events.a".into(),
            seq: 7,
            time: "2026-11-23T11:00:00.5Z".into(),
            headers: vec![("A".into(), "1".into()), ("A".into(), "2".into())],
            data: data.into(),
        }
    }

    #[test]
    fn a_terminal_obeys_nothing_that_is_printed() {
        assert_eq!(
            text(None, &message(b"a\n\x1b[2J\xff")),
            "[7] Subject: events.a Received: 2026-11-23T11:00:00.5Z\n\n  A: 1\n  A: 2\n\na\n\\u{1b}[2J\u{fffd}\n\n"
        );
        assert!(text(Some("EV"), &message(b"")).starts_with("[EV 7] "));
    }

    #[test]
    fn json_holds_every_header_and_any_body() {
        for (data, key, value) in [
            (b"{\"n\":1}".as_slice(), "data", "{\"n\":1}"),
            (b"\xff\x00", "data_base64", "/wA="),
        ] {
            let line: Value = serde_json::from_str(&json_line("EV", &message(data))).unwrap();
            assert_eq!(line[key], value);
            assert_eq!(line["headers"]["A"], json!(["1", "2"]));
            assert_eq!(line["seq"], 7);
        }
    }
}
