//! Whether the streams still are what is known of them: they are asked now and then, as one that is idle says nothing. Pure.
//! R22.

use super::evidence::Message;
use super::stream::Stream;
use super::trouble::{Cause, Trouble};
use crate::outbox::lineage::Lineage;
use crate::relay::checkpoint::record::Witness;
use std::time::{Duration, Instant};

/// While Postgres is told anything, each stream was seen to agree with the cuts not longer ago than this: well within the
/// default hold-back less the default sync interval of nats-server (150 s less 120 s).
const AGREED_FOR: Duration = Duration::from_secs(30);

/// What is to be asked of JetStream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// The stream of that name.
    Stream(String),
    /// The message at a sequence of it.
    Message(String, u64),
}

/// What is expected of an answer to that.
#[derive(Clone, Debug)]
enum Expected {
    /// The stream ends at this sequence or later.
    End(u64),
    /// This message is there, or none.
    Witness(Witness),
}

/// The answer of this name is to a [`Look::Message`], not to a [`Look::Stream`].
pub fn is_of_message(token: u64) -> bool {
    !token.is_multiple_of(2)
}

/// The state of the questions. See the module.
#[derive(Debug)]
pub struct Agreement {
    /// When all streams were last seen to agree.
    seen_at: Instant,
    asked_at: Instant,
    /// What was asked then and is not answered, and what is expected.
    open: Vec<(u64, Expected)>,
}

impl Agreement {
    /// The streams were just read.
    pub fn new(now: Instant) -> Agreement {
        Agreement {
            seen_at: now,
            asked_at: now,
            open: Vec::new(),
        }
    }

    /// What is to be asked now, and the names of the answers.
    pub fn ask(&mut self, streams: &[Stream], lineage: &Lineage, now: Instant) -> Vec<(u64, Look)> {
        self.asked_at = now;
        self.open.clear();
        let mut looks = Vec::new();
        for (index, stream) in streams.iter().enumerate() {
            let name = || stream.name().to_string();
            let token = 2 * index as u64;
            self.open.push((token, Expected::End(stream.fence.known())));
            looks.push((token, Look::Stream(name())));
            if let Some(witness) = stream.witness(lineage) {
                looks.push((token + 1, Look::Message(name(), witness.seq)));
                self.open.push((token + 1, Expected::Witness(witness)));
            }
        }
        looks
    }

    /// The answer to a [`Look::Stream`].
    pub fn on_stream(
        &mut self,
        streams: &[Stream],
        token: u64,
        created: &str,
        last_seq: u64,
    ) -> Result<(), Trouble> {
        self.on_answer(streams, token, |stream, expected| {
            let ends = matches!(expected, Expected::End(known) if last_seq >= *known);
            ends && stream.created == created
        })
    }

    /// The answer to a [`Look::Message`].
    pub fn on_witness(
        &mut self,
        streams: &[Stream],
        token: u64,
        found: Option<&Message>,
        lineage: &Lineage,
    ) -> Result<(), Trouble> {
        self.on_answer(streams, token, |_, expected| match (found, expected) {
            (Some(found), Expected::Witness(witness)) => found.is_at(&witness.position, lineage),
            _ => true,
        })
    }

    fn on_answer(
        &mut self,
        streams: &[Stream],
        token: u64,
        agrees: impl Fn(&Stream, &Expected) -> bool,
    ) -> Result<(), Trouble> {
        let Some(at) = self.open.iter().position(|(of, _)| *of == token) else {
            return Ok(());
        };
        let (_, expected) = self.open.swap_remove(at);
        if let Some(stream) = streams.get((token / 2) as usize)
            && !agrees(stream, &expected)
        {
            let name = stream.name().to_string();
            return Err(Trouble::Reconnect(Cause::Disagrees(name)));
        }
        if self.open.is_empty() {
            self.seen_at = self.asked_at;
        }
        Ok(())
    }

    /// All streams were seen to agree not long ago.
    pub fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.seen_at) <= AGREED_FOR
    }
}
