//! The resume: what a stream already holds, read back from its end. Pure but for the fetch it is given.
//!
//! A relay that starts, or has lost its connection, does not know which of its publishes were stored. The
//! stream does: its last message of ours bears an `Outbox-Position`, and because the fence stores
//! messages in order or not at all, everything up to that position is there and nothing after it is.
//!
//! Two things can hide that last message. Somebody else's messages may follow it: they are passed over.
//! Or it was consumed away (work-queue retention, purge, max_age): then a [`Checkpoint`] of ours tells
//! how far the stream was at some sequence, and each later sequence that is gone was one more event, unless it
//! is known that somebody else's message may have stood there.
//! On a stream where messages do not go like that, the server has lost them: after a power loss its index may
//! be newer than its blocks, and then it still counts what it no longer has (measured, nats-server 2.15.1).
//!
//! And on a replicated stream that others write to, the fence has a gap: somebody else's message can take the
//! sequence of a publish that was refused, and the next one of the pipeline, which expects just that
//! sequence, is stored. What lies between the last event known to be whole and the tail is then read back
//! one by one ([`Between`]), and what is missing there is published late rather than never.

use super::streams::StoredMessage;
use crate::outbox::position::{Position, Source, SourcePosition};
use crate::postgres::Lsn;

/// How many messages are looked at one by one for the last one of ours, above the newest under our subjects and from
/// there down. Foreign messages at the end of a stream are few where the fence holds; at about 0.1 ms a look this is
/// two seconds at most.
pub const LOOK_BACK: u64 = 10_000;

/// The header of the fence: a message without it was published with at-least-once delivery.
pub const EXPECTED_LAST_SEQUENCE: &str = "Nats-Expected-Last-Sequence";

/// The header that carries a [`SourcePosition`].
pub const OUTBOX_POSITION: &str = "Outbox-Position";

/// An event known to stand in the stream at a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The sequence in the stream.
    pub seq: u64,
    /// The event's position in Postgres.
    pub position: Position,
    /// The event's message id, where it was read from the stream itself and is that of this log.
    pub id: Option<String>,
}

/// What a stream holds of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// The last event that is known to be stored; `None`: none of ours was ever found. Its position is one
    /// in the log that we read: see [`Lineage::translate`].
    pub stored: Option<Checkpoint>,
    /// So many events after it are stored too, but were consumed away.
    pub consumed: u64,
    /// So many messages after it were stored, and the server has lost them.
    pub lost: u64,
    /// Messages of others that were passed over.
    pub foreign: u64,
    /// Events may be missing before `stored`.
    pub between: Option<Between>,
    /// `stored` was published without a fence, so that an earlier one that was not confirmed may be missing.
    pub unfenced: bool,
}

/// What stands in the last stretch of a replicated stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Between {
    /// Up to here nothing is missing.
    pub from: Position,
    /// The events of ours behind it and their sequences, in the order of the positions.
    pub stored: Vec<(Position, u64)>,
    /// Others have written there.
    pub others: bool,
}

impl Between {
    /// Of the messages that follow an event at `from`; [`Between::take`] takes them.
    pub fn after(from: Position) -> Between {
        Between {
            from,
            ..Between::default()
        }
    }

    /// One of the messages up to the tail; they come in any order.
    pub fn take(&mut self, lineage: &Lineage, message: &StoredMessage) {
        match ours(&lineage.source, message) {
            Some(at) if lineage.shares(&at) => self.stored.push((at.position, message.seq)),
            Some(_) => {}
            None => self.others = true,
        }
    }

    fn sequence(&self, position: Position) -> Option<u64> {
        let found = self
            .stored
            .binary_search_by_key(&position, |(position, _)| *position);
        found.ok().and_then(|i| Some(self.stored.get(i)?.1))
    }
}

/// What to do with an event on resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stands in the stream; at this sequence, if that is known.
    Stored(Option<u64>),
    /// It does not.
    Publish,
    /// It does not, although later ones do.
    Missing,
    /// Something else stands where it should.
    IdMismatch,
}

impl Tail {
    /// Takes in what was read of the stretch before the tail.
    pub fn look_between(&mut self, mut between: Between) {
        between.stored.sort_unstable();
        if let (Some((position, _)), Some(stored)) = (between.stored.last(), &mut self.stored)
            && *position > stored.position
        {
            // one that was published late stands behind it
            stored.position = *position;
            stored.id = None;
        }
        self.between = Some(between);
    }

    /// Messages of others were seen behind the last event that was known.
    pub fn has_others(&self) -> bool {
        self.foreign > 0 || self.between.as_ref().is_some_and(|between| between.others)
    }

    /// An event there that is not stored is published behind later ones.
    pub fn is_before_end(&self, position: Position) -> bool {
        self.stored.as_ref().is_some_and(|s| position < s.position)
    }

    /// Whether the event at `position` with `id` is in the stream. Asked once per event of the stream,
    /// in order: each event that was consumed away answers for one.
    pub fn verdict(&mut self, position: Position, id: &str) -> Verdict {
        let Some(stored) = &self.stored else {
            return Verdict::Publish;
        };
        if position == stored.position && stored.id.as_deref().is_some_and(|tail| tail != id) {
            return Verdict::IdMismatch;
        }
        if position <= stored.position {
            return match &self.between {
                Some(between) if position > between.from => match between.sequence(position) {
                    Some(seq) => Verdict::Stored(Some(seq)),
                    None => Verdict::Missing,
                },
                _ => Verdict::Stored((position == stored.position).then_some(stored.seq)),
            };
        }
        if self.consumed > 0 {
            self.consumed -= 1;
            let seq = stored.seq + 1;
            self.stored = Some(Checkpoint {
                seq,
                position,
                id: None,
            });
            return Verdict::Stored(Some(seq));
        }
        Verdict::Publish
    }
}

/// The bounds between which [`find_tail`] looks.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// The stream's first sequence still there.
    pub first_seq: u64,
    /// Its last sequence, stored ever.
    pub last_seq: u64,
    /// Nothing between the two was deleted, so that every sequence is a message.
    pub whole: bool,
    /// See [`StreamConfig::keeps_its_end`](super::streams::StreamConfig::keeps_its_end).
    pub keeps_its_end: bool,
}

/// Finds the last event of `source`'s slot in a stream.
///
/// `newest` is the newest message under the prefix (`last_by_subj`), `fetch` reads the message at a
/// sequence (`None`: deleted), `checkpoint` is the newest one known. The position found is of whatever
/// timeline or system it says; the caller judges that.
pub fn find_tail<E>(
    source: &Source,
    extent: Extent,
    newest: Option<&StoredMessage>,
    checkpoint: Option<&Checkpoint>,
    mut fetch: impl FnMut(u64) -> Result<Option<StoredMessage>, E>,
) -> Result<Found, E> {
    let mut found = Found {
        keeps_its_end: extent.keeps_its_end && newest.is_some(),
        ..Found::default()
    };
    // a checkpoint beyond the end is the mark of a stream that went backwards: the caller sees to it
    let checkpoint = checkpoint.filter(|c| c.seq <= extent.last_seq);
    let newest_seq = newest.map_or(0, |message| message.seq);
    // its message is gone while an older one is there: the search goes on down to that
    let is_lost = |c: &Checkpoint| extent.keeps_its_end && (1..c.seq).contains(&newest_seq);
    let bottom = match checkpoint {
        Some(c) if is_lost(c) => newest_seq.saturating_sub(1),
        Some(c) => c.seq,
        None => 0,
    };
    let mut looks = LOOK_BACK;
    let mut seq = extent.last_seq;
    while seq > bottom {
        if extent.whole && seq > newest_seq && newest_seq >= bottom && newest_seq > 0 {
            // nothing was deleted, so what lies above the newest one under the prefix is under other subjects
            found.foreign += seq - newest_seq;
            seq = newest_seq;
            continue;
        }
        if seq < extent.first_seq {
            found.deleted += seq - bottom;
            break;
        }
        if looks == 0 {
            // nothing of ours is above the newest one under the prefix
            let next = newest_seq.max(bottom);
            if seq <= next {
                break;
            }
            match extent.keeps_its_end && newest_seq > 0 {
                true => found.deleted += seq - next,
                // some may have been ours: it cannot be told how many
                false => found.foreign += seq - next,
            }
            (seq, looks) = (next, LOOK_BACK);
            continue;
        }
        let message = match newest {
            Some(message) if message.seq == seq => Some(message.clone()),
            _ => {
                looks -= 1;
                fetch(seq)?
            }
        };
        match message {
            None => found.deleted += 1,
            Some(message) => match ours(source, &message) {
                Some(position) => {
                    found.message = Some((message, position));
                    return Ok(found);
                }
                None => found.foreign += 1,
            },
        }
        seq -= 1;
    }
    found.reached_checkpoint = checkpoint.is_some();
    if let Some(c) = checkpoint.filter(|c| c.seq >= extent.first_seq.max(1)) {
        // its own event, where that still stands there, tells the id, too
        let message = match newest {
            Some(message) if message.seq == c.seq => Some(message.clone()),
            _ => fetch(c.seq)?,
        };
        let at = message.as_ref().and_then(|message| ours(source, message));
        let at = at.filter(|at| at.position == c.position);
        found.message = message.zip(at);
    }
    Ok(found)
}

/// What [`find_tail`] came upon, from the stream's end downwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The last message of ours, and where it says it stands.
    pub message: Option<(StoredMessage, SourcePosition)>,
    /// Without one: there is a checkpoint, and the search came down to it, or met too many of others' messages above.
    pub reached_checkpoint: bool,
    /// Sequences above it that hold no message any more.
    pub deleted: u64,
    /// Messages above it that are somebody else's.
    pub foreign: u64,
    /// What is gone from above it was lost: of the [`Extent`], unless the stream is empty, as after a purge.
    pub keeps_its_end: bool,
}

/// The position a message bears, if our slot wrote it (on whatever system and timeline).
fn ours(source: &Source, message: &StoredMessage) -> Option<SourcePosition> {
    let position: SourcePosition = message.header(OUTBOX_POSITION)?.parse().ok()?;
    (position.source.slot == source.slot).then_some(position)
}

/// The log we are reading, and where it branched off its ancestors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    /// The slot, system and timeline of the server we are connected to.
    pub source: Source,
    /// Each older timeline of its history, and the LSN at which the next one began (`TIMELINE_HISTORY`).
    pub switch_points: Vec<(u32, Lsn)>,
}

/// The tail's position is not one that this server can have written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// Another system id: another initdb, so LSNs of the two have nothing to do with each other.
    OtherSystem(SourcePosition),
    /// A timeline that is not in this server's history: it was written after a promotion that this
    /// server knows nothing of, so this server is behind or abandoned.
    OtherTimeline(SourcePosition),
}

impl Lineage {
    /// How far this server's log is stored in a stream that is stored up to `at`, whichever timeline that is
    /// on. What the older timeline has beyond the point where the next one began is not in this log, where
    /// other events stand at such positions: there, everything before that point is stored and nothing
    /// from it on.
    pub fn translate(&self, at: &SourcePosition) -> Result<Position, Conflict> {
        if at.source.system_id != self.source.system_id {
            return Err(Conflict::OtherSystem(at.clone()));
        }
        if at.source.timeline == self.source.timeline {
            return Ok(at.position);
        }
        let branch = self
            .switch_points
            .iter()
            .find(|(timeline, _)| *timeline == at.source.timeline);
        match branch {
            // no event has the ordinal 0
            Some((_, lsn)) => Ok(at.position.min(Position {
                commit_lsn: *lsn,
                ordinal: 0,
            })),
            None => Err(Conflict::OtherTimeline(at.clone())),
        }
    }

    /// Whether a position lies in the part of the log that this server has too.
    pub fn shares(&self, at: &SourcePosition) -> bool {
        at.source.slot == self.source.slot && self.translate(at) == Ok(at.position)
    }

    /// How far a position of ours reaches into this server's log: not beyond where the two parted, and not at
    /// all if they have nothing in common.
    pub fn reach(&self, at: &SourcePosition) -> Option<Lsn> {
        let reached = self.translate(at).ok().map(|position| position.commit_lsn);
        reached.filter(|_| at.source.slot == self.source.slot)
    }

    /// What a search says about the stream, seen from this server. The checkpoint's position is one in its log.
    ///
    /// With `accept_new_system` a tail of another system proves nothing and hinders nothing.
    pub fn judge(
        &self,
        found: Found,
        checkpoint: Option<&Checkpoint>,
        accept_new_system: bool,
    ) -> Result<Tail, Conflict> {
        // where others write too, what is gone may have been theirs: rather twice than never
        let gone = if found.foreign == 0 { found.deleted } else { 0 };
        let mut tail = Tail {
            foreign: found.foreign,
            ..Tail::default()
        };
        match found.message {
            Some((message, position)) => {
                let known = match self.translate(&position) {
                    Err(Conflict::OtherSystem(_)) if accept_new_system => return Ok(tail),
                    known => known?,
                };
                let id = message.header("Nats-Msg-Id").map(str::to_string);
                tail.unfenced = message.header(EXPECTED_LAST_SEQUENCE).is_none();
                tail.stored = Some(Checkpoint {
                    seq: message.seq,
                    position: known,
                    id: id.filter(|_| known == position.position),
                });
            }
            None if found.reached_checkpoint => tail.stored = checkpoint.cloned(),
            None => return Ok(tail),
        }
        match found.keeps_its_end {
            true => tail.lost = gone,
            false => tail.consumed = gone,
        }
        Ok(tail)
    }
}

/// Reads a timeline history file: lines of `timeline <tab> switch point <tab> reason`, `#` begins a comment.
/// Lines of another form are passed over, as Postgres' own reader does with what follows the two fields.
pub fn parse_timeline_history(text: &str) -> Vec<(u32, Lsn)> {
    let line = |line: &str| {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    /// Timelines 1 and 2 ended at 0/100 and 0/200.
    #[track_caller]
    fn check(at: &str, translated: Result<&str, &str>) {
        let lineage = Lineage {
            source: Source {
                slot: "slot".to_string(),
                system_id: 7,
                timeline: 3,
            },
            switch_points: parse_timeline_history("1\t0/100\tno reason\n2\t0/200\t# another\n"),
        };
        let position: SourcePosition = at.parse().expect("a position");
        let found = lineage.translate(&position);
        let found = found.as_ref().map(Position::to_string);
        let found = found.map_err(|conflict| match conflict {
            Conflict::OtherSystem(_) => "other system",
            Conflict::OtherTimeline(_) => "other timeline",
        });
        assert_eq!(found, translated.map(str::to_string), "{at}");
    }

    fn source() -> Source {
        Source {
            slot: "slot".to_string(),
            system_id: 7,
            timeline: 1,
        }
    }

    /// The event of this LSN, which stands at that sequence.
    fn checkpoint(seq: u64) -> Checkpoint {
        Checkpoint {
            seq,
            position: Position {
                commit_lsn: Lsn(seq),
                ordinal: 1,
            },
            id: None,
        }
    }

    fn message(seq: u64) -> StoredMessage {
        let position = checkpoint(seq).position;
        StoredMessage {
            subject: "events.a".to_string(),
            seq,
            time: String::new(),
            headers: vec![(
                OUTBOX_POSITION.to_string(),
                format!("{} {position}", source()),
            )],
            data: Vec::new(),
        }
    }

    /// What a search in a stream that keeps its end says: ours are the first `kept` messages of `last_seq`, the others are gone.
    #[track_caller]
    fn check_lost(kept: u64, last_seq: u64, known: Option<u64>) {
        let source = source();
        let extent = Extent {
            first_seq: 1,
            last_seq,
            whole: kept == last_seq,
            keeps_its_end: true,
        };
        let checkpoint = known.map(checkpoint);
        let fetch = |seq| Ok::<_, ()>((seq <= kept).then(|| message(seq)));
        let newest = message(kept);
        let found = find_tail(&source, extent, Some(&newest), checkpoint.as_ref(), fetch);
        let lineage = Lineage {
            source: source.clone(),
            switch_points: Vec::new(),
        };
        let tail = lineage
            .judge(found.unwrap(), checkpoint.as_ref(), false)
            .unwrap();
        let stored = tail.stored.map(|stored| stored.seq);
        assert_eq!(
            (stored, tail.lost, tail.consumed),
            (Some(kept), last_seq - kept, 0)
        );
    }

    /// A stream of `last_seq` messages: ours and those of others, each a range of sequences, are there, the rest is gone. What
    /// is known of it with a checkpoint at `known`: the last event that is stored, and how many were consumed after it.
    #[track_caller]
    fn check_search(
        last_seq: u64,
        known: u64,
        (kept, others): (Range<u64>, Range<u64>),
        expected: (u64, u64),
    ) {
        let (source, checkpoint) = (source(), checkpoint(known));
        let extent = Extent {
            first_seq: (1..=last_seq)
                .find(|seq| kept.contains(seq) || others.contains(seq))
                .unwrap_or(last_seq + 1),
            last_seq,
            whole: false,
            keeps_its_end: false,
        };
        let mut looks = 0;
        let fetch = |seq| {
            looks += 1;
            let found = match (kept.contains(&seq), others.contains(&seq)) {
                (true, _) => Some(message(seq)),
                // of the relay of another slot
                (_, true) => Some(StoredMessage {
                    headers: vec![(OUTBOX_POSITION.to_string(), "other 7 1 0/FF 1".to_string())],
                    ..message(seq)
                }),
                _ => None,
            };
            Ok::<_, ()>(found)
        };
        let newest = kept.clone().last().map(message);
        let found = find_tail(&source, extent, newest.as_ref(), Some(&checkpoint), fetch).unwrap();
        let lineage = Lineage {
            source,
            switch_points: Vec::new(),
        };
        let tail = lineage.judge(found, Some(&checkpoint), false).unwrap();
        let stored = tail.stored.map_or(0, |stored| stored.seq);
        assert_eq!((stored, tail.consumed), expected);
        assert!(looks <= 2 * LOOK_BACK, "{looks}");
    }

    /// As nats-server tells it of a stream that never had a message; it refuses to look for one at 0.
    #[test]
    fn nothing_is_looked_for_in_a_stream_that_never_had_a_message() {
        let extent = Extent {
            first_seq: 0,
            last_seq: 0,
            whole: true,
            keeps_its_end: true,
        };
        let nothing = Checkpoint {
            seq: 0,
            position: Position::default(),
            id: None,
        };
        let found = find_tail(&source(), extent, None, Some(&nothing), Err).unwrap();
        assert!(found.reached_checkpoint && found.message.is_none());
    }

    #[test]
    fn a_search_comes_to_something_however_far_it_has_to_go() {
        const MANY: u64 = 3 * LOOK_BACK;
        let none = || 0..0;
        // all consumed
        check_search(MANY, 5, (none(), none()), (5, MANY - 5));
        // all but the last ones, which another slot's consumer has not had yet
        check_search(MANY, 5, (none(), MANY..MANY + 1), (5, 0));
        // others' messages under other subjects, some of which are gone
        check_search(MANY, 5, (2..8, 9..MANY + 1), (7, 0));
        check_search(MANY, 5, (none(), 9..MANY + 1), (5, 0));
    }

    #[test]
    fn what_a_stream_has_lost_is_told_however_much_it_is() {
        check_lost(10, 10, Some(10));
        check_lost(10, 15, Some(8));
        check_lost(10, 15, Some(10));
        check_lost(10, 15, Some(12));
        check_lost(10, 15, None);
        // a torn block of 8 MB may have held more than is looked at one by one
        for checkpoint in [None, Some(5), Some(12_000), Some(30_000 + LOOK_BACK)] {
            check_lost(20_000, 30_000 + LOOK_BACK, checkpoint);
        }
    }

    #[test]
    fn a_position_counts_up_to_where_this_server_left_its_timeline() {
        check("slot 7 3 0/300 2", Ok("0/300 2"));
        check("slot 7 3 0/50 2", Ok("0/50 2"));
        check("slot 7 2 0/1FF 2", Ok("0/1FF 2"));
        check("slot 7 2 0/200 2", Ok("0/200 0"));
        check("slot 7 2 0/300 2", Ok("0/200 0"));
        check("slot 7 1 0/FF 2", Ok("0/FF 2"));
        // two failovers ago: what the second timeline has is new too
        check("slot 7 1 0/100 2", Ok("0/100 0"));
        check("slot 7 1 0/150 2", Ok("0/100 0"));
        check("slot 7 1 0/300 2", Ok("0/100 0"));
    }

    #[test]
    fn what_this_server_cannot_have_written_is_a_conflict() {
        check("slot 7 4 0/50 2", Err("other timeline"));
        check("slot 8 3 0/50 2", Err("other system"));
        check("slot 8 1 0/50 2", Err("other system"));
    }
}
