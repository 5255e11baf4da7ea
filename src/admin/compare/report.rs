//! What `compare` prints: a line a finding, and in the end how many there were.

use crate::admin::reissue::Carried;
use crate::admin::{Error, say};
use crate::exit::Exit;
use crate::outbox::batch::OutboxEvent;
use crate::outbox::position::Position;
use serde_json::{Value, json};

/// So many lines say of which event it cannot be told, or what of the WAL cannot be mapped; the rest is counted.
const UNKNOWN_LINES: u64 = 100;

/// Stream and sequence.
type At<'a> = (&'a str, u64);

/// What is worth a line.
pub enum Finding<'a> {
    /// Committed, resolved, and in no stream. With the position of what the WAL has.
    Missing(&'a OutboxEvent<'a>, Option<Position>),
    /// The same, but the streams do not have all that they had.
    Unknown(&'a OutboxEvent<'a>, Option<Position>),
    /// In a stream under another body.
    Altered(&'a OutboxEvent<'a>, Option<Position>, At<'a>),
    /// Parked.
    Parked(&'a OutboxEvent<'a>, Option<Position>, At<'a>),
    /// In two messages.
    Doubled(&'a str, &'a (String, u64), &'a (String, u64)),
    /// At this position, after that one.
    Disordered(&'a str, Position, Position, At<'a>),
}

/// The findings so far.
#[derive(Debug, Default)]
pub struct Report {
    json: bool,
    outboxes: usize,
    rows: u64,
    wal: u64,
    messages: u64,
    missing: u64,
    published: u64,
    unknown: u64,
    /// Events of the WAL that cannot be mapped; those that are resolved are unknown as well.
    unmapped: u64,
    altered: u64,
    doubled: u64,
    disordered: u64,
    parked: u64,
    waiting: u64,
    given_up: u64,
    /// Streams that do not have all that they had.
    drop: Vec<String>,
}

impl Report {
    /// Prints as JSON, or for a person.
    pub fn new(json: bool) -> Report {
        Report {
            json,
            ..Report::default()
        }
    }

    /// A message was read.
    pub fn read(&mut self) {
        self.messages += 1;
    }

    /// The publication has so many outboxes.
    pub fn outboxes(&mut self, count: usize) {
        self.outboxes = count;
    }

    /// An event was compared, of the WAL or of a row.
    pub fn compared(&mut self, is_of_wal: bool) {
        match is_of_wal {
            true => self.wal += 1,
            false => self.rows += 1,
        }
    }

    /// An event waits for the relay.
    pub fn waits(&mut self) {
        self.waiting += 1;
    }

    /// An event is one that the relay gives up.
    pub fn given_up(&mut self) {
        self.given_up += 1;
    }

    /// The stream does not have all that it had.
    pub fn drops(&mut self, stream: &str) {
        self.drop.push(stream.to_string());
    }

    /// Prints what an operator should know besides.
    pub fn note(&mut self, note: &str) -> Result<(), Error> {
        match self.json {
            true => say(&format!("{}\n", json!({ "note": note }))),
            false => say(&format!("note        {note}\n")),
        }
    }

    /// An event of the WAL cannot be mapped, and nothing is known of it. The relay halts there, unless it passed it by other flags.
    pub fn unmapped(&mut self, is_resolved: bool, why: &str) -> Result<(), Error> {
        self.compared(true);
        match is_resolved {
            true => self.unknown += 1,
            false => self.waits(),
        }
        self.unmapped += 1;
        match self.unmapped > UNKNOWN_LINES {
            true => Ok(()),
            false => self.note(why),
        }
    }

    /// So many more are missing than are held to be printed.
    pub fn more_missing(&mut self, count: u64) -> Result<(), Error> {
        if count == 0 {
            return Ok(());
        }
        self.missing += count;
        self.note(&format!(
            "{count} more events of the WAL are missing or unknown than can be held: publish these, let the relay run, and compare again"
        ))
    }

    /// Prints and counts a finding.
    pub fn found(&mut self, finding: &Finding<'_>) -> Result<(), Error> {
        let count = match finding {
            Finding::Missing(..) => &mut self.missing,
            Finding::Unknown(..) => &mut self.unknown,
            Finding::Altered(..) => &mut self.altered,
            Finding::Parked(..) => &mut self.parked,
            Finding::Doubled(..) => &mut self.doubled,
            Finding::Disordered(..) => &mut self.disordered,
        };
        *count += 1;
        if matches!(finding, Finding::Unknown(..)) && self.unknown > UNKNOWN_LINES {
            return Ok(());
        }
        let text = match self.json {
            true => finding.json().to_string(),
            false => finding.text(),
        };
        say(&format!("{text}\n"))
    }

    /// Prints that a missing event was written to Postgres.
    pub fn published(&mut self, event: &Carried) -> Result<(), Error> {
        self.published += 1;
        match self.json {
            true => {
                let line =
                    json!({ "finding": "published", "id": event.id, "subject": event.subject });
                say(&format!("{line}\n"))
            }
            false => say(&format!("published   {} {}\n", event.id, event.subject)),
        }
    }

    /// Prints why a missing event was not.
    pub fn left(&mut self, id: &str, why: &str) -> Result<(), Error> {
        match self.json {
            true => {
                let line = json!({ "finding": "left", "id": id, "why": why });
                say(&format!("{line}\n"))
            }
            false => say(&format!("left        {id}: {why}; publish it by hand\n")),
        }
    }

    /// These counts.
    #[cfg(test)]
    pub fn missing_unknown_waiting(&self) -> [u64; 3] {
        [self.missing, self.unknown, self.waiting]
    }

    /// Prints the sum, and ends.
    pub fn finish(mut self) -> Result<Exit, Error> {
        let is_blind = self.outboxes == 0 && self.wal == 0;
        if is_blind {
            self.note(
                "nothing was compared: the publication has no outbox, and the slot has no events; \
                 correct -publication, -table or -slot, or compare once events are written",
            )?;
        }
        let still_missing = self.missing - self.published.min(self.missing);
        let found = [
            still_missing,
            self.unknown,
            self.altered,
            self.doubled,
            self.disordered,
        ];
        say(&match self.json {
            true => format!("{}\n", self.json()),
            false => self.text(),
        })?;
        Ok(match !is_blind && found.iter().all(|count| *count == 0) {
            true => Exit::Done,
            false => Exit::Warning,
        })
    }

    fn json(&self) -> Value {
        json!({ "summary": {
            "outboxes": self.outboxes, "rows": self.rows, "wal_events": self.wal, "messages": self.messages, "missing": self.missing,
            "published": self.published, "unknown": self.unknown, "altered": self.altered, "doubled": self.doubled,
            "disordered": self.disordered, "parked": self.parked, "waiting": self.waiting, "given_up": self.given_up,
            "incomplete_streams": self.drop,
        } })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if self.unknown > 0 && !self.drop.is_empty() {
            text += &format!(
                "note        of {} events it cannot be told, since {} does not have all that it has stored; \
                 -where names rows that it must still have\n",
                self.unknown,
                self.drop.join(", ")
            );
        }
        text += &format!(
            "compared    {} rows and {} events of the WAL with {} messages\n",
            self.rows, self.wal, self.messages
        );
        text += &format!(
            "found       {} missing, {} doubled, {} out of order, {} altered, {} unknown",
            self.missing, self.doubled, self.disordered, self.altered, self.unknown
        );
        if self.published > 0 {
            text += &format!("; {} published", self.published);
        }
        text += &format!(
            "\nbesides     {} parked, {} waiting",
            self.parked, self.waiting
        );
        if self.given_up > 0 {
            text += &format!(", {} given up", self.given_up);
        }
        text + "\n"
    }
}

impl Finding<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Finding::Missing(..) => "missing",
            Finding::Unknown(..) => "unknown",
            Finding::Altered(..) => "altered",
            Finding::Parked(..) => "parked",
            Finding::Doubled(..) => "doubled",
            Finding::Disordered(..) => "disordered",
        }
    }

    fn text(&self) -> String {
        let of = |event: &OutboxEvent<'_>, at: &Option<Position>| {
            let at = at.map_or(String::new(), |at| format!(" at {at}"));
            format!("{} {} of {}{at}", event.id, event.subject, event.table)
        };
        let what = match self {
            Finding::Missing(event, at) | Finding::Unknown(event, at) => of(event, at),
            Finding::Altered(event, at, (stream, seq)) => {
                format!(
                    "{}: stream {stream} has another body at sequence {seq}",
                    of(event, at)
                )
            }
            Finding::Parked(event, at, (stream, seq)) => {
                format!("{}: in stream {stream} at sequence {seq}", of(event, at))
            }
            Finding::Doubled(id, (one, seq), (other, again)) => {
                format!("{id}: in stream {one} at sequence {seq}, and in {other} at {again}")
            }
            Finding::Disordered(id, at, before, (stream, seq)) => {
                format!(
                    "{id}: in stream {stream} at sequence {seq}, position {at} comes after {before}"
                )
            }
        };
        format!("{:<12}{what}", self.kind())
    }

    fn json(&self) -> Value {
        let finding = self.kind();
        match self {
            Finding::Missing(event, at) | Finding::Unknown(event, at) => json!({
                "finding": finding, "id": event.id, "subject": event.subject, "source": event.table,
                "position": at.map(|at| at.to_string()),
            }),
            Finding::Altered(event, at, (stream, seq))
            | Finding::Parked(event, at, (stream, seq)) => json!({
                "finding": finding, "id": event.id, "subject": event.subject, "source": event.table,
                "position": at.map(|at| at.to_string()), "stream": stream, "seq": seq,
            }),
            Finding::Doubled(id, (one, seq), (other, again)) => json!({
                "finding": finding, "id": id, "stream": other, "seq": again, "first_stream": one, "first_seq": seq,
            }),
            Finding::Disordered(id, at, before, (stream, seq)) => json!({
                "finding": finding, "id": id, "stream": stream, "seq": seq, "position": at.to_string(),
                "after": before.to_string(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(write: impl FnOnce(&mut Report), expected: Exit) {
        let mut report = Report::new(true);
        write(&mut report);
        assert_eq!(report.finish().expect("it is printed"), expected);
    }

    #[test]
    fn where_nothing_was_compared_nobody_knows() {
        check(|_| {}, Exit::Warning);
        check(|it| it.outboxes(1), Exit::Done);
        check(|it| it.compared(true), Exit::Done);
    }

    #[test]
    fn what_was_resolved_and_cannot_be_mapped_is_unknown() {
        for (is_resolved, expected) in [(true, Exit::Warning), (false, Exit::Done)] {
            let write = |it: &mut Report| {
                for _ in 0..UNKNOWN_LINES + 1 {
                    it.unmapped(is_resolved, "why").expect("it is printed");
                }
            };
            check(write, expected);
        }
    }

    #[test]
    fn what_is_missing_and_was_not_held_is_counted() {
        let write = |count| {
            move |it: &mut Report| {
                it.outboxes(1);
                it.more_missing(count).expect("it is printed");
            }
        };
        check(write(0), Exit::Done);
        check(write(1), Exit::Warning);
    }
}
