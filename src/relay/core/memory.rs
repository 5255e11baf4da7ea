//! What outlives a session of the [`core`](super): how far each stream was seen to be; and of that, what is worth keeping
//! over a restart.

use crate::jetstream::resume::{Checkpoint, Conflict, Lineage};
use crate::outbox::position::{Position, Source, SourcePosition};
use crate::postgres::Lsn;
use std::time::Instant;

/// What outlives a session: how far each stream was seen to be.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Of which log the positions are; `None`: nothing is remembered yet.
    pub(super) source: Option<Source>,
    pub(super) streams: Vec<Remembered>,
    /// See [`Marks::reached`].
    pub reached: Lsn,
}

/// What is worth keeping over a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// How far each stream is known to be.
    pub streams: Vec<Mark>,
    /// The highest LSN that was ever settled (as a position, with ordinal 0). Nothing is confirmed before it has
    /// stood here for the hold-back: a slot that is beyond was moved by somebody else, also when the streams, and
    /// the checkpoint with them, were put back to where they were within the hold-back.
    pub reached: Option<SourcePosition>,
    /// Up to here everything is stored, as far as this session has come.
    pub settled: Lsn,
}

/// Of one stream; the fields are those of [`Stream`](super::stream::Stream).
#[derive(Clone, Debug, Default)]
pub(super) struct Remembered {
    pub(super) name: String,
    pub(super) created: String,
    pub(super) last: Option<Checkpoint>,
    pub(super) acked_seq: u64,
    pub(super) shared: bool,
    pub(super) met_others: bool,
    pub(super) at_rest: bool,
    pub(super) others_at: Option<Instant>,
    pub(super) confirmed_seq: u64,
}

/// How far a stream is known to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The stream's name.
    pub name: String,
    /// When it was created.
    pub created: String,
    /// Where in it nothing of ours is missing; `None` once it went backwards.
    pub last: Option<(u64, SourcePosition)>,
    /// Others were seen to write to it.
    pub shared: bool,
    /// Nothing was on its way to it, and nothing has been published since: what comes and goes behind `last` is somebody
    /// else's.
    pub at_rest: bool,
    /// The sequence that [`Marks::settled`] rests on.
    pub settled_seq: u64,
    /// The sequence that the confirmed LSN rests on.
    pub confirmed_seq: u64,
}

impl Memory {
    /// The last event known to stand in a stream: from there its tail is searched.
    pub fn last_known(&self, stream: &str) -> Option<&Checkpoint> {
        self.streams
            .iter()
            .find(|remembered| remembered.name == stream)?
            .last
            .as_ref()
    }

    /// What a stream has acknowledged, or the checkpoint says of it.
    pub fn acked_seq(&self, stream: &str) -> u64 {
        let found = self.streams.iter().find(|known| known.name == stream);
        found.map_or(0, |known| known.acked_seq)
    }

    /// Before a session: the server may be another than that of the last one, a standby that was promoted or an
    /// old primary that came back. A conflict, with the stream's name, ends the relay.
    pub fn rebase(
        &mut self,
        lineage: &Lineage,
        accept_new_system: bool,
    ) -> Result<(), (String, Conflict)> {
        let of_another = self.source.take().filter(|it| *it != lineage.source);
        self.source = Some(lineage.source.clone());
        let Some(source) = of_another else {
            return Ok(());
        };
        for stream in &mut self.streams {
            // what is gone behind it may have been an event that is not in this log
            stream.at_rest = true;
            // the default, nothing of ours, is true of every log
            let known = |last: &&mut Checkpoint| last.position != Position::default();
            let Some(last) = stream.last.as_mut().filter(known) else {
                continue;
            };
            let at = SourcePosition {
                source: source.clone(),
                position: last.position,
            };
            let position = match lineage.translate(&at) {
                Err(Conflict::OtherSystem(_)) if accept_new_system => Position::default(),
                translated => translated.map_err(|conflict| (stream.name.clone(), conflict))?,
            };
            if position != last.position {
                last.position = position;
                last.id = None;
            }
        }
        Ok(())
    }

    /// Takes over what an earlier process has left, or another relay that had the slot meanwhile and knows better, seen from
    /// this server. What was written from another system proves nothing about it, and is passed over: whether that is meant,
    /// the stream's own end tells. A conflict, with the stream's name, ends the relay.
    pub fn learn(&mut self, marks: Vec<Mark>, lineage: &Lineage) -> Result<(), (String, Conflict)> {
        self.source = Some(lineage.source.clone());
        for mark in marks {
            let is_ours = |(_, at): &(u64, SourcePosition)| at.source.slot == lineage.source.slot;
            if !mark.last.as_ref().is_none_or(is_ours) {
                continue;
            }
            let is_old = |(_, at): &(u64, SourcePosition)| at.source != lineage.source;
            let at_rest = mark.at_rest || mark.last.as_ref().is_some_and(is_old);
            let last = match mark.last {
                None => None,
                Some((seq, at)) => match lineage.translate(&at) {
                    Err(Conflict::OtherSystem(_)) => continue,
                    Err(conflict) => return Err((mark.name, conflict)),
                    Ok(position) => Some(Checkpoint {
                        seq,
                        position,
                        id: None,
                    }),
                },
            };
            let mut known = self.streams.iter_mut();
            if let Some(known) = known.find(|known| known.name == mark.name) {
                let seq = last.as_ref().map_or(0, |last| last.seq);
                let known_seq = known.last.as_ref().map_or(0, |last| last.seq);
                // an older one, from before the bucket was put back, knows of less
                known.at_rest = at_rest && (known.at_rest || seq >= known_seq);
                known.acked_seq = known.acked_seq.max(seq);
                known.confirmed_seq = known.confirmed_seq.max(mark.confirmed_seq);
                if known_seq < seq {
                    known.last = last;
                }
                known.shared |= mark.shared;
                // that was the other relay
                known.met_others = false;
                continue;
            }
            self.streams.push(Remembered {
                name: mark.name,
                created: mark.created,
                acked_seq: last.as_ref().map_or(mark.confirmed_seq, |last| last.seq),
                last,
                shared: mark.shared,
                met_others: false,
                at_rest,
                others_at: None,
                confirmed_seq: mark.confirmed_seq,
            });
        }
        Ok(())
    }
}
