//! The resume: from what the record says and what the streams hold, where to go on. Pure: it asks for what it wants read
//! ([`Resume::next_read`]) and is given the answers ([`Resume::on_read`]), so that the relay and the simulator drive the
//! same one.
//!
//! First the *witnesses* of the cuts are read. A stream agrees with a cut when it exists, its last sequence is not below
//! what the cut has read and its witness, and the witness is there with its position, or is gone and `created` is the
//! same. (nats-server up to 2.14.5 changes `created` after an edit and two restarts: where the witness is there, it
//! decides.) The youngest cut that all streams agree with is the one to resume with.
//!
//! Then the *evidence* is read: every message after what the cut has read, in whatever stream and under whatever subject.
//! A stream that the cut does not speak of, and each one without a cut, is read from its end back to a message of ours at
//! or before the anchor that was not late, or to its start: what was published before that one is older still.

pub mod facts;

use super::evidence::{Evidence, Message};
use crate::outbox::flags::Flags;
use crate::outbox::position::Position;
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::{Anchor, Cut, StreamCut, Witness};
use facts::{Facts, StreamFacts};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

/// What to read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Read {
    /// The message at a sequence of a stream (its index among the facts).
    Message(usize, u64),
    /// Whether there is a stream of that name.
    Exists(String),
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The message at that sequence; `None`: there is none.
    Message(Option<Message>),
    /// There is such a stream.
    Exists(bool),
}

/// Messages were lost that Postgres has been told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// The stream.
    pub stream: String,
    /// How.
    pub how: Disagreement,
}

/// Why a stream does not agree with a cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disagreement {
    /// It ends at `last_seq`, before what it had acknowledged.
    Regressed {
        /// Where it ends.
        last_seq: u64,
        /// What it had acknowledged.
        acked_seq: u64,
    },
    /// It was deleted and created again.
    Recreated,
    /// Its last messages are gone, and older ones are not.
    Torn,
    /// Another message is where one of ours was.
    Refilled {
        /// Its sequence.
        seq: u64,
    },
}

impl Disagreement {
    /// Of the matured cut only an operator can have taken something away so; what a server loses has not matured.
    fn is_of_operator(&self) -> bool {
        matches!(self, Disagreement::Recreated | Disagreement::Torn)
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lost { stream, how } = self;
        match how {
            Disagreement::Regressed {
                last_seq,
                acked_seq,
            } => write!(
                f,
                "stream {stream} ends at sequence {last_seq}, but had acknowledged {acked_seq}"
            ),
            Disagreement::Recreated => {
                write!(
                    f,
                    "stream {stream} was deleted and created again since events were stored in it"
                )
            }
            Disagreement::Torn => write!(
                f,
                "the last messages of stream {stream} are gone, lost by the server or deleted by somebody"
            ),
            Disagreement::Refilled { seq } => write!(
                f,
                "stream {stream} has another message at sequence {seq} than the event that was stored there"
            ),
        }
    }
}

/// Where to go on.
#[derive(Clone, Debug)]
pub struct Resumed {
    /// Everything up to here is resolved.
    pub anchor: Anchor,
    /// The same as an LSN; 0/0 without a cut.
    pub stored_lsn: Lsn,
    /// Which of the facts' cuts it is.
    pub cut: Option<usize>,
    /// Why it is not the youngest.
    pub disagreed: Vec<Lost>,
    /// Even the matured cut disagrees: what is gone is also what Postgres was told of, and the slot cannot send that again.
    pub confirmed_are_gone: bool,
    /// Nothing was on its way when the cut was written, so nothing that is gone was an event after it.
    pub quiescent: bool,
    /// See [`Cut::lenient_upto`].
    pub lenient_upto: Lsn,
    /// The events that are stored after it.
    pub evidence: Evidence,
    /// In the order of the facts: what is known of each stream, which ends at `read_after` for what was read.
    pub streams: Vec<StreamCut>,
    /// The lowest sequence of each stream that is gone and may have been an event after the anchor.
    pub gone: Vec<Option<u64>>,
    /// How many are gone from each stream that loses none by itself: the server lost them, or somebody deleted them.
    pub deleted: Vec<u64>,
    /// A stream with messages of ours after the anchor that have no fence, and the last of these: they are no evidence.
    pub unfenced: Option<(usize, Position)>,
    /// Foreign messages that were read in each stream.
    pub foreign: Vec<u64>,
    /// What is stored after the anchor was made by these.
    pub flags: Flags,
    /// See [`Cut::is_empty`].
    is_empty: bool,
}

impl Resumed {
    /// There is no event of these flags between the anchor and `stored_lsn`.
    pub fn is_empty(&self, flags: &Flags) -> bool {
        self.is_empty && self.flags == *flags
    }

    /// See [`Cut::lenient_upto`].
    pub fn is_lenient(&self) -> bool {
        self.lenient_upto > Lsn::INVALID
    }

    /// It is not the youngest cut.
    pub fn fell_back(&self) -> bool {
        self.cut != Some(0)
    }

    /// R24: for what is stored after the anchor, or only a part of the anchor's transaction, Postgres sent other rows than it sends
    /// by these flags.
    pub fn is_mixed(&self, flags: &Flags) -> bool {
        let Anchor { position, event } = &self.anchor;
        let is_partial = self.stored_lsn <= position.commit_lsn;
        let partial = event.as_ref().filter(|_| is_partial);
        let has_more =
            !self.evidence.is_empty() || !self.quiescent && self.gone.iter().any(Option::is_some);
        partial.is_some_and(|event| !event.flags.counts_as(flags))
            || has_more && !self.flags.counts_as(flags)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Resume {
    facts: Facts,
    phase: Phase,
    witnesses: BTreeMap<(usize, u64), Option<Message>>,
    /// Asked for, and not answered yet.
    due: BTreeSet<Read>,
    chosen: Option<usize>,
    disagreed: Vec<Lost>,
    evidence: Evidence,
    gone: Vec<Option<u64>>,
    deleted: Vec<u64>,
    /// Of streams that were read back, the last message of ours at or before the anchor.
    found: BTreeMap<usize, Witness>,
    /// Streams that were read back to such a message which is not late.
    read_back: BTreeSet<usize>,
    unfenced: Option<(usize, Position)>,
    foreign: Vec<u64>,
    /// Copies of our messages, by the stream that they come from.
    copies: HashMap<String, Vec<(Position, usize, Message)>>,
}

#[derive(Debug)]
enum Phase {
    /// These are still to be asked for.
    Witnesses(Vec<Read>),
    /// These stretches are still to be read, in this direction.
    Messages(Vec<Stretch>),
    /// These streams are still to be looked for.
    Sources(Vec<String>),
    Done,
}

/// Sequences of one stream.
#[derive(Clone, Debug)]
struct Stretch {
    stream: usize,
    from: u64,
    to: u64,
    /// From the end down, to the first message of ours that is not after the anchor.
    backwards: bool,
}

impl Resume {
    /// Begins one.
    pub fn new(facts: Facts) -> Resume {
        let mut reads = BTreeSet::new();
        for (index, stream) in facts.streams.iter().enumerate() {
            let cuts = facts.known.cuts.iter();
            let of_cuts = cuts.filter_map(|cut| cut.stream(&stream.name));
            let witnesses = of_cuts.flat_map(StreamCut::witnesses);
            let there =
                witnesses.filter(|it| (stream.first_seq..=stream.last_seq).contains(&it.seq));
            reads.extend(there.map(|witness| Read::Message(index, witness.seq)));
            if stream.keeps_its_end && !stream.keeps_its_order && stream.last_seq > 0 {
                reads.insert(Read::Message(index, stream.last_seq));
            }
            // a backup that was restored, or a new stream? What is in it tells
            let mut cuts = facts
                .known
                .cuts
                .iter()
                .filter_map(|cut| cut.stream(&stream.name));
            // (of one that never had a message nats-server says 0 for both)
            let is_empty = stream.last_seq < stream.first_seq.max(1);
            if !is_empty && cuts.any(|it| it.created != stream.created) {
                reads.insert(Read::Message(index, stream.first_seq));
                reads.insert(Read::Message(index, stream.last_seq));
            }
        }
        Resume {
            foreign: vec![0; facts.streams.len()],
            gone: vec![None; facts.streams.len()],
            deleted: vec![0; facts.streams.len()],
            phase: Phase::Witnesses(reads.into_iter().collect()),
            facts,
            witnesses: BTreeMap::new(),
            due: BTreeSet::new(),
            chosen: None,
            disagreed: Vec::new(),
            evidence: Evidence::default(),
            found: BTreeMap::new(),
            read_back: BTreeSet::new(),
            unfenced: None,
            copies: HashMap::new(),
        }
    }

    /// The next thing to read; `None` while answers are due before more is asked, and at the end. An error says that
    /// more was lost than can be repaired.
    pub fn next_read(&mut self) -> Result<Option<Read>, Lost> {
        loop {
            let read = match &mut self.phase {
                Phase::Witnesses(reads) => reads.pop(),
                Phase::Messages(stretches) => next_of(stretches),
                Phase::Sources(names) => names.pop().map(Read::Exists),
                Phase::Done => return Ok(None),
            };
            if let Some(read) = read {
                self.due.insert(read.clone());
                return Ok(Some(read));
            }
            if !self.due.is_empty() {
                return Ok(None);
            }
            self.phase = match self.phase {
                Phase::Witnesses(_) => {
                    self.choose()?;
                    Phase::Messages(self.stretches())
                }
                Phase::Messages(_) => Phase::Sources(self.copies.keys().cloned().collect()),
                Phase::Sources(_) | Phase::Done => Phase::Done,
            };
        }
    }

    /// An answer, in any order.
    pub fn on_read(&mut self, read: &Read, answer: Answer) {
        if !self.due.remove(read) {
            return;
        }
        match (read, answer) {
            (Read::Message(stream, seq), Answer::Message(message)) => match self.phase {
                Phase::Witnesses(_) => {
                    self.witnesses.insert((*stream, *seq), message);
                }
                _ => self.on_message(*stream, *seq, message),
            },
            (Read::Exists(name), Answer::Exists(exists)) => {
                // the copies of a stream that is there prove nothing: what it holds was read itself, or is none of ours
                let copies = self.copies.remove(name).filter(|_| !exists);
                for (position, stream, message) in copies.into_iter().flatten() {
                    self.evidence.add(position, stream, &message);
                }
            }
            (Read::Message(..), Answer::Exists(_)) | (Read::Exists(_), Answer::Message(_)) => {}
        }
    }

    /// Everything was read.
    pub fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Done) && self.due.is_empty()
    }

    /// Where to go on, once it is done.
    pub fn finish(self) -> Resumed {
        let (anchor, stored_lsn) = self.anchor();
        let gone = self.gone.iter().enumerate();
        let gone = gone
            .map(|(index, seq)| self.gone_first(index).or(*seq))
            .collect();
        // without a cut that agrees it is as with the oldest
        let of_cut = self.cut().or(self.facts.known.cuts.last());
        let streams = self.facts.streams.iter().enumerate();
        let streams = streams.map(|(index, facts)| StreamCut {
            name: facts.name.clone(),
            created: facts.created.clone(),
            read_after: facts.last_seq,
            witness: self.last_of_ours(index),
            // it was seen now
            unseen: None,
            // a transaction that the anchor is no event of has none before it
            share: match anchor.position.ordinal {
                0 => Some(0),
                _ => self.trusted(index).and_then(|of_cut| of_cut.share),
            },
        });
        let known = &self.facts.known;
        Resumed {
            confirmed_are_gone: known.oldest_is_matured && self.disagreed.len() == known.cuts.len(),
            stored_lsn,
            cut: self.chosen,
            quiescent: self.cut().is_some_and(|cut| cut.quiescent),
            is_empty: self.cut().is_some_and(|cut| cut.is_empty),
            lenient_upto: of_cut.map_or(Lsn::INVALID, |cut| cut.lenient_upto),
            flags: of_cut.map_or(Flags::default(), |cut| cut.flags.clone()),
            streams: streams.collect(),
            anchor,
            evidence: self.evidence,
            disagreed: self.disagreed,
            gone,
            deleted: self.deleted,
            unfenced: self.unfenced,
            foreign: self.foreign,
        }
    }

    fn cut(&self) -> Option<&Cut> {
        self.facts.known.cuts.get(self.chosen?)
    }

    fn anchor(&self) -> (Anchor, Lsn) {
        match self.cut() {
            Some(cut) => (cut.anchor.clone(), cut.stored_lsn),
            None => (Anchor::bare(self.facts.known.confirmed_lsn), Lsn::INVALID),
        }
    }

    /// The youngest cut that all streams agree with. R2, R3.
    fn choose(&mut self) -> Result<(), Lost> {
        for index in 0..self.facts.known.cuts.len() {
            let Some(lost) = self.disagreement(index) else {
                self.chosen = Some(index);
                return Ok(());
            };
            self.disagreed.push(lost);
        }
        match self.disagreed.last() {
            Some(lost) if self.facts.known.goes_on => return Err(lost.clone()),
            // from the oldest on, and each stream from its start where it does not agree
            Some(lost) if self.facts.known.oldest_is_matured => {
                if !lost.how.is_of_operator() && !self.facts.accept_loss {
                    return Err(lost.clone());
                }
                self.chosen = self.facts.known.cuts.len().checked_sub(1);
            }
            // Postgres was told nothing yet: the slot has everything
            _ => {}
        }
        Ok(())
    }

    fn disagreement(&self, cut: usize) -> Option<Lost> {
        let cuts = &self.facts.known.cuts;
        // what is gone of the oldest may have been consumed, and there is none to go back to
        let has_older = cut + 1 < cuts.len();
        let cut = cuts.get(cut)?;
        let lost = cut.streams.iter().filter_map(|of_cut| {
            let how = self.disagrees(of_cut, has_older)?;
            Some(Lost {
                stream: of_cut.name.clone(),
                how,
            })
        });
        lost.min_by_key(|lost| lost.how.is_of_operator())
    }

    fn disagrees(&self, of_cut: &StreamCut, has_older: bool) -> Option<Disagreement> {
        let mut streams = self.facts.streams.iter().enumerate();
        let found = streams.find(|(_, stream)| stream.name == of_cut.name);
        let Some((index, stream)) = found else {
            // no event goes there any more, and an operator who deletes a stream deletes what it holds
            return None;
        };
        // without one nothing of ours was in it
        of_cut.witness.as_ref()?;
        if !self.is_same(index, of_cut) || has_older && self.is_distrusted(index, of_cut) {
            let unseen = of_cut.unseen.iter();
            let mut others = unseen.filter(|it| self.is_refilled(index, it));
            let other = others.next().or(of_cut.witness.as_ref());
            let seq = other.map_or(0, |witness| witness.seq);
            return match stream.created != of_cut.created {
                // the name of a stream that has left the prefix is used again
                true if !stream.is_routed => None,
                true if self.is_restored(index, stream) => Some(Disagreement::Regressed {
                    last_seq: stream.last_seq,
                    acked_seq: seq.max(of_cut.read_after),
                }),
                true => Some(Disagreement::Recreated),
                false => Some(Disagreement::Refilled { seq }),
            };
        }
        let witness_seq = of_cut.witness.as_ref().map_or(0, |witness| witness.seq);
        let acked_seq = of_cut.read_after.max(witness_seq);
        if self.is_torn(index, stream, of_cut) {
            return Some(Disagreement::Torn);
        }
        (stream.last_seq < acked_seq).then_some(Disagreement::Regressed {
            last_seq: stream.last_seq,
            acked_seq,
        })
    }

    /// The cut's witness is gone, and can only have been lost or deleted: an older message is there, and either each message
    /// would stay as long, or nothing at all is at the stream's end. (After a power loss the index of nats-server may be
    /// newer than its blocks, and then it still counts what it no longer has.)
    fn is_torn(&self, index: usize, stream: &StreamFacts, of_cut: &StreamCut) -> bool {
        let Some(witness) = &of_cut.witness else {
            return false;
        };
        let is_there = |seq| self.message_at(index, seq).is_some();
        stream.keeps_its_end
            && stream.first_seq < witness.seq
            && witness.seq <= stream.last_seq
            && !is_there(witness.seq)
            && (stream.keeps_its_order || !is_there(stream.last_seq))
    }

    /// A stream that was created again holds what nobody publishes again: an event of before the oldest cut, at its first
    /// or its last sequence. (The API restores a backup as a new stream, with the sequences that its messages had.)
    fn is_restored(&self, index: usize, stream: &StreamFacts) -> bool {
        let Some(oldest) = self.facts.known.cuts.last() else {
            return false;
        };
        let is_older = |seq| {
            let message = self.message_at(index, seq);
            let at = message.and_then(|it| it.ours(&self.facts.lineage));
            at.is_some_and(|at| at <= oldest.anchor.position)
        };
        is_older(stream.first_seq) || is_older(stream.last_seq)
    }

    /// The stream is the one that the cut speaks of: its witness is there, or is gone and `created` is the same.
    fn is_same(&self, stream: usize, of_cut: &StreamCut) -> bool {
        match &of_cut.witness {
            // what is gone of the earlier one, the later one decides
            Some(witness) => {
                let unseen = of_cut.unseen.as_ref();
                self.is_witnessed(stream, of_cut, witness)
                    && unseen.is_none_or(|it| !self.is_refilled(stream, it))
            }
            None => self.has_same_created(stream, of_cut),
        }
    }

    /// What was read there for the witnesses.
    fn message_at(&self, stream: usize, seq: u64) -> Option<&Message> {
        self.witnesses.get(&(stream, seq))?.as_ref()
    }

    /// It has lost something, and its witness is not there.
    fn is_distrusted(&self, stream: usize, of_cut: &StreamCut) -> bool {
        let witness = of_cut.witness.as_ref();
        self.facts.known.distrusted.contains(&of_cut.name)
            && witness.is_none_or(|it| self.message_at(stream, it.seq).is_none())
    }

    fn is_witnessed(&self, stream: usize, of_cut: &StreamCut, witness: &Witness) -> bool {
        match self.message_at(stream, witness.seq) {
            Some(message) => message.is_at(&witness.position, &self.facts.lineage),
            None => self.has_same_created(stream, of_cut),
        }
    }

    /// Another message is in its place.
    fn is_refilled(&self, stream: usize, witness: &Witness) -> bool {
        let message = self.message_at(stream, witness.seq);
        message.is_some_and(|it| !it.is_at(&witness.position, &self.facts.lineage))
    }

    fn has_same_created(&self, stream: usize, of_cut: &StreamCut) -> bool {
        let created = self.facts.streams.get(stream).map(|it| &it.created);
        created == Some(&of_cut.created)
    }

    /// What the chosen cut says of a stream that is the one it speaks of.
    fn trusted(&self, stream: usize) -> Option<&StreamCut> {
        let facts = self.facts.streams.get(stream)?;
        let of_cut = self.cut()?.stream(&facts.name)?;
        let acked_seq = of_cut.witness.as_ref().map_or(0, |witness| witness.seq);
        let agrees = self.is_same(stream, of_cut)
            && !self.is_distrusted(stream, of_cut)
            && !self.is_torn(stream, facts, of_cut)
            && facts.last_seq >= acked_seq.max(of_cut.read_after);
        agrees.then_some(of_cut)
    }

    /// The first of the messages before the first one that is still there, if they may have been events after the anchor.
    fn gone_first(&self, index: usize) -> Option<u64> {
        let stream = self.facts.streams.get(index)?;
        let read_after = match self.trusted(index) {
            Some(of_cut) => of_cut.read_after,
            None if self.read_back.contains(&index) => return None,
            None => 0,
        };
        let is_gone = read_after < stream.last_seq && read_after + 1 < stream.first_seq;
        is_gone.then_some(read_after + 1)
    }

    /// The message of ours with the highest sequence at or before the anchor.
    fn last_of_ours(&self, index: usize) -> Option<Witness> {
        let of_cut = self.trusted(index).and_then(|cut| cut.witness.as_ref());
        let last = self.found.get(&index).into_iter().chain(of_cut);
        last.max_by_key(|witness| witness.seq).cloned()
    }

    /// What is to be read for evidence. R4.
    fn stretches(&self) -> Vec<Stretch> {
        let streams = self.facts.streams.iter().enumerate();
        let stretches = streams.map(|(index, stream)| {
            let read_after = self.trusted(index).map_or(0, |of_cut| of_cut.read_after);
            Stretch {
                stream: index,
                from: stream.first_seq.max(read_after + 1),
                to: stream.last_seq,
                backwards: self.trusted(index).is_none(),
            }
        });
        stretches.filter(|it| it.from <= it.to).collect()
    }

    fn on_message(&mut self, stream: usize, seq: u64, message: Option<Message>) {
        let Some(message) = message else {
            let facts = self.facts.streams.get(stream);
            if facts.is_some_and(|it| it.keeps_its_end && it.first_seq <= seq) {
                let deleted = self.deleted.get_mut(stream);
                deleted.into_iter().for_each(|it| *it += 1);
            } else {
                let gone = self.gone.get_mut(stream);
                gone.into_iter()
                    .for_each(|it| *it = Some(it.map_or(seq, |lowest| lowest.min(seq))));
            }
            return;
        };
        let lineage = &self.facts.lineage;
        let anchor = self.anchor().0.position;
        let fenced = message.ours(lineage);
        if let Some(position) = fenced {
            if position > anchor {
                self.evidence.add(position, stream, &message);
                return;
            }
            let found = Witness {
                seq: message.seq,
                position: lineage.at(position),
            };
            let known = self.found.entry(stream).or_insert_with(|| found.clone());
            if known.seq < found.seq {
                *known = found;
            }
            if !message.is_late
                && let Phase::Messages(stretches) = &mut self.phase
            {
                stretches.retain(|it| it.stream != stream || !it.backwards);
                self.read_back.insert(stream);
            }
            return;
        }
        if self.facts.known.maybe_unfenced
            && let Some(position) = message.unfenced(lineage)
        {
            if position > anchor {
                let known = self
                    .unfenced
                    .map_or(position, |(_, known)| known.max(position));
                self.unfenced = Some((stream, known));
            }
            return;
        }
        if let Some((position, source)) = message.copy_of_ours(lineage)
            && position > anchor
        {
            let copies = self.copies.entry(source.to_string()).or_default();
            copies.push((position, stream, message.clone()));
        }
        if let Some(foreign) = self.foreign.get_mut(stream) {
            *foreign += 1;
        }
    }
}

fn next_of(stretches: &mut Vec<Stretch>) -> Option<Read> {
    let stretch = stretches.last_mut()?;
    let seq = match stretch.backwards {
        true => stretch.to,
        false => stretch.from,
    };
    let read = Read::Message(stretch.stream, seq);
    if stretch.from == stretch.to {
        stretches.pop();
    } else if stretch.backwards {
        stretch.to -= 1;
    } else {
        stretch.from += 1;
    }
    Some(read)
}

#[cfg(test)]
mod tests;
