//! The unit that travels from the reader to the publisher: the changes that were ready at once.
//!
//! One buffer holds the bytes of all its events, so that a row costs no allocation of its own; an event
//! is a set of spans into it. Behind the channel an [`Event`] names one by its place in the shared batch, which lives
//! until its last event is acknowledged.

use super::position::Position;
use crate::postgres::Lsn;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::convert::Infallible;
use std::sync::Arc;

/// Nobody holds a batch of more bytes for an event's name alone.
const LARGE_BYTES: usize = 256 * 1024;

/// A stretch of the bytes of a [`Batch`]. 32 bits suffice: a field of Postgres is smaller than 1 GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    start: u32,
    len: u32,
}

/// One step of the replication stream, in the order Postgres sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A row, or a message without a table, to publish.
    Event(EventSpans),
    /// The end of a transaction with events: once everything before it is stored, `end_lsn` may be confirmed.
    Commit {
        /// Where the commit record starts; the `commit_lsn` of the transaction's positions.
        commit_lsn: Lsn,
        /// Where the commit record ends: the position to confirm. (Confirming `commit_lsn` repeats the transaction.)
        end_lsn: Lsn,
        /// Microseconds since 2000-01-01 00:00 UTC, as Postgres counts.
        commit_time_us: i64,
    },
    /// The batch ends in the middle of this transaction, whose events come before and after.
    Open {
        /// Where the commit record starts.
        commit_lsn: Lsn,
        /// Microseconds since 2000-01-01 00:00 UTC.
        commit_time_us: i64,
    },
    /// A keepalive, or the end of a transaction without events: Postgres has sent everything up to here, so it may be
    /// confirmed like a commit.
    Keepalive {
        /// The server's position in the log.
        wal_end: Lsn,
    },
}

/// What is to be done with an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fate {
    /// It is published.
    #[default]
    Publish,
    /// It cannot be published as it is: its subject is the park subject.
    Park,
    /// It cannot be published, and is given up. It keeps its place in the order of positions.
    Lose,
    /// It is none by the flags, but may have been one by earlier ones. It keeps its place, too.
    Ignore,
}

/// Where the parts of an event stand in its batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventSpans {
    /// Where the event stands in Postgres.
    pub position: Position,
    /// What is to be done with it.
    pub fate: Fate,
    subject: Span,
    id: Span,
    headers: Span,
    body: Span,
    table: Span,
}

impl EventSpans {
    /// Bytes of subject, id, headers and body: what the event costs while it waits.
    pub fn size(&self) -> usize {
        [self.subject, self.id, self.headers, self.body]
            .iter()
            .map(|span| span.len as usize)
            .sum()
    }

    /// Bytes of id, headers and body: what of it counts against the server's limits.
    pub fn wire_len(&self) -> usize {
        self.size() - self.subject.len as usize
    }

    /// Bytes of the body.
    pub fn body_len(&self) -> usize {
        self.body.len as usize
    }

    /// Bytes of the id.
    pub fn id_len(&self) -> usize {
        self.id.len as usize
    }
}

/// An event of a batch that is shared: the batch, and the event's place among its changes.
#[derive(Clone)]
pub struct Event {
    batch: Arc<Batch>,
    index: u32,
    fate: Fate,
}

impl Event {
    /// The change at `index` of the batch, if that is an event.
    pub fn new(batch: &Arc<Batch>, index: usize) -> Option<Event> {
        match batch.changes.get(index)? {
            Change::Event(spans) => Some(Event {
                batch: batch.clone(),
                index: u32::try_from(index).ok()?,
                fate: spans.fate,
            }),
            _ => None,
        }
    }

    /// Where its parts stand.
    pub fn spans(&self) -> &EventSpans {
        match self.batch.changes.get(self.index as usize) {
            Some(Change::Event(spans)) => spans,
            _ => unreachable!("there was an event when this was made"),
        }
    }

    /// Where the event stands in Postgres.
    pub fn position(&self) -> Position {
        self.spans().position
    }

    /// What is to be done with it.
    pub fn fate(&self) -> Fate {
        self.fate
    }

    /// The subject alone, for who needs no more: each text of [`view`](Self::view) is checked each time, which
    /// [`parts`](Self::parts) are not.
    pub fn subject(&self) -> &str {
        self.batch.text(self.spans().subject)
    }

    /// The id alone.
    pub fn id(&self) -> &str {
        self.batch.text(self.spans().id)
    }

    /// Itself, or, of a large batch, its id and position alone: for who names it long after it is stored.
    pub fn named(&self) -> Event {
        if self.batch.len_bytes() <= LARGE_BYTES {
            return self.clone();
        }
        let mut batch = Batch::default();
        let named = batch.draft(self.view().table, self.position(), self.fate, |draft| {
            draft.id(|id| {
                id.extend_from_slice(self.id().as_bytes());
                Ok::<(), Infallible>(())
            })
        });
        match (named, Event::new(&Arc::new(batch), 0)) {
            (Ok(()), Some(named)) => named,
            _ => self.clone(),
        }
    }

    /// As [`named`](Self::named).
    pub fn into_named(self) -> Event {
        match self.batch.len_bytes() <= LARGE_BYTES {
            true => self,
            false => self.named(),
        }
    }

    /// Its bytes alone, for the wire.
    pub fn parts(&self) -> Parts<'_> {
        let spans = self.spans();
        Parts {
            subject: self.batch.slice(spans.subject),
            id: self.batch.slice(spans.id),
            headers: self.batch.slice(spans.headers),
            body: self.batch.slice(spans.body),
        }
    }

    /// All of it.
    pub fn view(&self) -> OutboxEvent<'_> {
        OutboxEvent {
            fate: self.fate,
            ..self.batch.event(self.spans())
        }
    }

    /// It cannot be published, and is given up.
    pub fn give_up(&mut self) {
        self.fate = Fate::Lose;
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.view().fmt(f)
    }
}

/// What of an event goes onto the wire; see [`OutboxEvent`].
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "as there")]
pub struct Parts<'a> {
    pub subject: &'a [u8],
    pub id: &'a [u8],
    pub headers: &'a [u8],
    pub body: &'a [u8],
}

/// A view of one event.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct OutboxEvent<'a> {
    /// What is to be done with it.
    pub fate: Fate,
    /// The NATS subject, already legal on the wire.
    pub subject: &'a str,
    /// The row's id as text; becomes `Nats-Msg-Id`.
    pub id: &'a str,
    /// Header lines beside the relay's own, each `\r\nName: value`; legal as they are, and mostly none.
    pub headers: &'a str,
    /// The message body.
    pub body: &'a [u8],
    /// `schema.table`, for messages to a person.
    pub table: &'a str,
    /// Where the event stands in Postgres.
    pub position: Position,
}

impl std::fmt::Debug for OutboxEvent<'_> {
    /// Names the event; the payload never reaches a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OutboxEvent")
            .field("fate", &self.fate)
            .field("subject", &self.subject)
            .field("id", &self.id)
            .field("headers_len", &self.headers.len())
            .field("body_len", &self.body.len())
            .field("position", &self.position)
            .finish()
    }
}

/// Changes in stream order, and the bytes of their events.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    changes: Vec<Change>,
    table: Span,
    lease: Option<Sender<Infallible>>,
}

impl Batch {
    /// An empty one with room for so many bytes and changes.
    pub fn with_capacity(bytes: usize, changes: usize) -> Batch {
        Batch {
            bytes: Vec::with_capacity(bytes),
            changes: Vec::with_capacity(changes),
            table: Span::default(),
            lease: None,
        }
    }

    /// Tells when it is gone: nothing is ever received, and the channel closes then.
    pub fn lease(&mut self) -> Receiver<Infallible> {
        let (lease, gone) = bounded(0);
        self.lease = Some(lease);
        gone
    }

    /// Gives back the room that is left.
    pub fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.changes.shrink_to_fit();
    }

    /// Holds nothing any more, and keeps its room.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.changes.clear();
        self.table = Span::default();
    }

    /// Bytes that its events have, or may have before it must grow.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Bytes of memory that it takes.
    #[cfg(test)]
    pub(crate) fn room(&self) -> usize {
        self.bytes.capacity() + self.changes.capacity() * size_of::<Change>()
    }

    /// The changes in stream order.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// No change was added.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Bytes held by the events.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Adds the end of a transaction that something of was added.
    pub fn push(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// Adds what is no event, and has a place.
    pub fn push_ignored(&mut self, position: Position) {
        self.changes.push(Change::Event(EventSpans {
            position,
            fate: Fate::Ignore,
            subject: Span::default(),
            id: Span::default(),
            headers: Span::default(),
            body: Span::default(),
            table: self.table,
        }));
    }

    /// Adds a keepalive, or the end of a transaction without events: it stands for the one just before it too.
    pub fn push_boundary(&mut self, wal_end: Lsn) {
        if let Some(Change::Keepalive { .. }) = self.changes.last() {
            self.changes.pop();
        }
        self.changes.push(Change::Keepalive { wal_end });
    }

    /// Takes back the events behind the last commit or keepalive: of a transaction that cannot be read on.
    pub fn truncate_to_boundary(&mut self) {
        let events = self.changes.iter().rev();
        let open = events
            .take_while(|change| matches!(change, Change::Event(_)))
            .count();
        self.changes.truncate(self.changes.len() - open);
    }

    /// Adds an event whose parts `write` appends, in any order and each at most once. What a failing `write`
    /// has written is taken back.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn draft<E>(
        &mut self,
        table: &str,
        position: Position,
        fate: Fate,
        write: impl FnOnce(&mut Draft<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let before = self.bytes.len();
        if self.bytes.get(self.table.range()) != Some(table.as_bytes()) {
            self.bytes.extend_from_slice(table.as_bytes());
            self.table = span(before, self.bytes.len());
        }
        let mut draft = Draft {
            bytes: &mut self.bytes,
            spans: EventSpans {
                position,
                fate,
                subject: Span::default(),
                id: Span::default(),
                headers: Span::default(),
                body: Span::default(),
                table: self.table,
            },
        };
        let outcome = write(&mut draft);
        let spans = draft.spans;
        match outcome {
            Ok(()) => self.changes.push(Change::Event(spans)),
            Err(_) => {
                self.bytes.truncate(before);
                if self.table.range().end > before {
                    self.table = Span::default();
                }
            }
        }
        outcome
    }

    /// As [`draft`](Self::draft), of an event that has no headers of its own.
    pub fn push_event<E>(
        &mut self,
        table: &str,
        position: Position,
        subject: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        id: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        body: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.draft(table, position, Fate::Publish, |draft| {
            draft.subject(subject)?;
            draft.id(id)?;
            draft.body(body)
        })
    }

    /// The event that `spans`, one of this batch's, describes.
    pub fn event(&self, spans: &EventSpans) -> OutboxEvent<'_> {
        OutboxEvent {
            fate: spans.fate,
            subject: self.text(spans.subject),
            id: self.text(spans.id),
            headers: self.text(spans.headers),
            body: self.slice(spans.body),
            table: self.text(spans.table),
            position: spans.position,
        }
    }

    /// The mapper checks that its texts are UTF-8, so nothing is lost here.
    fn text(&self, span: Span) -> &str {
        std::str::from_utf8(self.slice(span)).unwrap_or_default()
    }

    fn slice(&self, span: Span) -> &[u8] {
        self.bytes.get(span.range()).unwrap_or_default()
    }
}

impl Span {
    fn range(self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.len as usize
    }
}

fn span(start: usize, end: usize) -> Span {
    let fits = |n: usize| {
        u32::try_from(n).expect("a batch stays below 4 GiB: the reader sends it on long before")
    };
    Span {
        start: fits(start),
        len: fits(end - start),
    }
}

/// An event that is being written. Each part gets the batch's buffer and appends to it.
pub struct Draft<'a> {
    bytes: &'a mut Vec<u8>,
    spans: EventSpans,
}

impl Draft<'_> {
    /// The subject.
    pub fn subject<E>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.spans.subject = self.part(write)?;
        Ok(())
    }

    /// The message id.
    pub fn id<E>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        self.spans.id = self.part(write)?;
        Ok(())
    }

    /// Header lines, as [`super::header::Lines`] makes them.
    pub fn headers<E>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.spans.headers = self.part(write)?;
        Ok(())
    }

    /// The body.
    pub fn body<E>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
        self.spans.body = self.part(write)?;
        Ok(())
    }

    fn part<E>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<Span, E> {
        let start = self.bytes.len();
        write(self.bytes)?;
        Ok(span(start, self.bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(batch: &mut Batch, table: &str, ordinal: u32, parts: [&str; 3]) {
        let [subject, id, body] = parts.map(|part| {
            move |bytes: &mut Vec<u8>| {
                bytes.extend_from_slice(part.as_bytes());
                Ok::<(), ()>(())
            }
        });
        batch
            .push_event(
                table,
                Position {
                    commit_lsn: Lsn(7),
                    ordinal,
                },
                subject,
                id,
                body,
            )
            .unwrap();
    }

    fn events(batch: &Batch) -> Vec<(String, String, String, String)> {
        let view = |change: &Change| match change {
            Change::Event(spans) => Some(batch.event(spans)),
            _ => None,
        };
        let text = |e: OutboxEvent<'_>| {
            (
                e.table.into(),
                e.subject.into(),
                e.id.into(),
                String::from_utf8(e.body.to_vec()).unwrap(),
            )
        };
        batch.changes().iter().filter_map(view).map(text).collect()
    }

    /// Whoever remembers an event for its id does not keep a large batch from going.
    #[test]
    fn an_event_of_a_large_batch_can_be_named_without_it() {
        for (bytes, is_itself) in [(100, true), (LARGE_BYTES + 1, false)] {
            let mut batch = Batch::default();
            add(&mut batch, "t", 3, ["s", "id", &"x".repeat(bytes)]);
            let gone = batch.lease();
            let event = Event::new(&Arc::new(batch), 0).unwrap();
            let named = event.named();
            assert_eq!((named.id(), named.position()), ("id", event.position()));
            drop(event);
            assert_eq!(gone.try_recv().unwrap_err().is_empty(), is_itself);
        }
    }

    #[test]
    fn a_keepalive_stands_for_the_one_before_it_but_not_for_a_commit_with_events() {
        let mut batch = Batch::default();
        let commit = Change::Commit {
            commit_lsn: Lsn(1),
            end_lsn: Lsn(2),
            commit_time_us: 7,
        };
        batch.push_boundary(Lsn(1));
        batch.push(commit);
        batch.push_boundary(Lsn(3));
        batch.push_boundary(Lsn(4));
        let boundary = |wal_end| Change::Keepalive {
            wal_end: Lsn(wal_end),
        };
        assert_eq!(batch.changes(), [boundary(1), commit, boundary(4)]);
    }

    #[test]
    fn events_come_out_as_they_went_in() {
        let mut batch = Batch::default();
        add(&mut batch, "public.outbox", 1, ["events.a.1", "x", "{}"]);
        add(&mut batch, "public.outbox", 2, ["events.a.2", "y", ""]);
        add(&mut batch, "public.other", 3, ["events.b.1", "z", "1"]);
        let row = |t: &str, s: &str, i: &str, b: &str| (t.into(), s.into(), i.into(), b.into());
        assert_eq!(
            events(&batch),
            [
                row("public.outbox", "events.a.1", "x", "{}"),
                row("public.outbox", "events.a.2", "y", ""),
                row("public.other", "events.b.1", "z", "1"),
            ]
        );
        assert_eq!(
            batch.len_bytes(),
            "public.outbox".len() + "public.other".len() + 3 * 11 + 2 + 1
        );
    }

    #[test]
    fn an_event_that_fails_leaves_no_bytes() {
        let mut batch = Batch::default();
        let position = Position {
            commit_lsn: Lsn(7),
            ordinal: 1,
        };
        let write = |bytes: &mut Vec<u8>| {
            bytes.push(b'x');
            Ok(())
        };
        assert_eq!(
            batch.push_event("t", position, write, write, |_| Err("no")),
            Err("no")
        );
        assert_eq!((batch.len_bytes(), batch.is_empty()), (0, true));
        add(&mut batch, "t", 1, ["s", "i", "b"]);
        assert_eq!(
            events(&batch),
            [("t".into(), "s".into(), "i".into(), "b".into())]
        );
    }

    #[test]
    fn the_payload_is_not_in_the_debug_form() {
        let mut batch = Batch::default();
        add(&mut batch, "t", 1, ["s", "i", "secret"]);
        let Change::Event(spans) = batch.changes()[0] else {
            panic!()
        };
        assert!(!format!("{:?}", batch.event(&spans)).contains("secret"));
    }
}
