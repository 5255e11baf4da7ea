//! The fence of one stream: the predicted sequences of what was published to it, and which answer is for which publish. Pure.
//!
//! Every publish carries `Nats-Expected-Last-Sequence: n`, the sequence at which this publisher predicts the stream to end
//! just before it, and the server stores it only there (ADR-22). So publishes are pipelined n, n+1, n+2 …: when one
//! is not stored, those after it are not; a second relay, or a late copy of an old publish, cannot write in between.
//!
//! Each publish is answered once. The ack of a predicted sequence can only be for the publish with that prediction. A
//! refusal can be for each one that waits under the same name, and a replicated stream refuses before it acknowledges
//! what came earlier. So a refusal is not attributed: when every publish is answered, those without an ack are the refused ones.

use std::collections::VecDeque;

/// See the module.
#[derive(Debug)]
pub struct Fence {
    /// How many names the publishes use in turn, by their expected sequences.
    names: u64,
    predicted: u64,
    /// The tokens of the publishes before `predicted`, from the oldest that waits on; `None`: it is acknowledged.
    sent: VecDeque<Option<u64>>,
    /// Of those that are not, so many were answered.
    refused: usize,
    waiting: usize,
    /// Where the stream ends for all that is known: what was acknowledged, read, or named by a refusal.
    end: u64,
    /// The highest sequence that was acknowledged or read.
    known: u64,
}

/// Which publish an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerFor {
    /// The one with this token.
    One(u64),
    /// One of several.
    OneOfSeveral,
    /// None that waits: its name was never used, or each publish under it is answered.
    None,
}

impl Fence {
    /// Of a stream that was read up to its last sequence.
    pub fn new(last_seq: u64, names: u64) -> Fence {
        Fence {
            names,
            predicted: last_seq,
            sent: VecDeque::new(),
            refused: 0,
            waiting: 0,
            end: last_seq,
            known: last_seq,
        }
    }

    /// What the next publish has to carry as its expected last sequence.
    pub fn predicted(&self) -> u64 {
        self.predicted
    }

    /// The next publish is the one with this token.
    pub fn extend(&mut self, token: u64) -> u64 {
        let expected = self.predicted;
        self.predicted += 1;
        self.sent.push_back(Some(token));
        self.waiting += 1;
        expected
    }

    /// Which publish an answer is for that came under `name`; `seq`: that of an ack without `duplicate`.
    pub fn answer_for(&self, name: u64, seq: Option<u64>) -> AnswerFor {
        let oldest = self.oldest();
        if let Some(expected) = seq.and_then(|seq| seq.checked_sub(1))
            && expected % self.names == name
            && let Some(nth) = expected.checked_sub(oldest)
            && let Some(Some(token)) = usize::try_from(nth).ok().and_then(|nth| self.sent.get(nth))
        {
            return AnswerFor::One(*token);
        }
        let first = (name + self.names - oldest % self.names) % self.names;
        let under_it = self.sent.iter().skip(first as usize);
        let mut tokens = under_it.step_by(self.names as usize).flatten();
        match (tokens.next(), tokens.next()) {
            (None, _) => AnswerFor::None,
            (Some(token), None) => AnswerFor::One(*token),
            (Some(_), Some(_)) => AnswerFor::OneOfSeveral,
        }
    }

    /// What the first of `sent` expects.
    fn oldest(&self) -> u64 {
        self.predicted - self.sent.len() as u64
    }

    /// The publish that carried `expected` is stored at the sequence after it.
    pub fn on_ack(&mut self, expected: u64) {
        let nth = expected.checked_sub(self.oldest());
        let sent = nth.and_then(|nth| self.sent.get_mut(usize::try_from(nth).ok()?));
        if sent.and_then(Option::take).is_some() {
            self.waiting -= 1;
            self.known = self.known.max(expected + 1);
            self.end = self.end.max(expected + 1);
        }
        while let Some(None) = self.sent.front() {
            self.sent.pop_front();
        }
    }

    /// One publish was refused; `end`: the stream ends there, for all that the refusal says.
    pub fn on_refusal(&mut self, end: Option<u64>) {
        self.refused += 1;
        self.waiting = self.waiting.saturating_sub(1);
        self.end = self.end.max(end.unwrap_or_default());
    }

    /// Something was refused: nothing more may be published until [`Fence::restart`].
    pub fn is_broken(&self) -> bool {
        self.refused > 0
    }

    /// So many answers are due.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// So many publishes are not acknowledged, refused or not.
    pub fn unacknowledged(&self) -> usize {
        self.sent.iter().flatten().count()
    }

    /// The highest sequence that was acknowledged or read.
    pub fn known(&self) -> u64 {
        self.known
    }

    /// Where the stream ends for all that is known.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Every publish is answered, and the stream was read up to `end`: from there on it can be predicted again.
    pub fn restart(&mut self, end: u64) {
        assert_eq!(self.waiting, 0, "an answer is due");
        self.sent.clear();
        self.refused = 0;
        self.known = end;
        self.end = end;
        self.predicted = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_is_numbered_ahead_and_an_ack_names_its_publish() {
        let mut fence = Fence::new(41, 4);
        let expected: Vec<u64> = (0..9).map(|token| fence.extend(token)).collect();
        assert_eq!(expected, (41..50).collect::<Vec<_>>());
        // 41, 45 and 49 share a name
        assert_eq!(fence.answer_for(1, Some(46)), AnswerFor::One(4));
        assert_eq!(fence.answer_for(1, None), AnswerFor::OneOfSeveral);
        // a sequence that is of another name, or was not predicted, is for any of them
        assert_eq!(fence.answer_for(1, Some(47)), AnswerFor::OneOfSeveral);
        assert_eq!(fence.answer_for(1, Some(54)), AnswerFor::OneOfSeveral);
        assert_eq!(fence.answer_for(1, Some(0)), AnswerFor::OneOfSeveral);
        fence.on_ack(45);
        fence.on_ack(41);
        assert_eq!(fence.answer_for(1, None), AnswerFor::One(8));
        fence.on_ack(49);
        assert_eq!(fence.answer_for(1, None), AnswerFor::None);
        assert_eq!((fence.waiting(), fence.known(), fence.end()), (6, 50, 50));
    }

    #[test]
    fn after_a_refusal_the_fence_restarts_where_the_stream_ends() {
        let mut fence = Fence::new(10, 256);
        for token in 0..4 {
            fence.extend(token);
        }
        // a replicated stream refuses before it acknowledges
        fence.on_refusal(Some(13));
        fence.on_refusal(Some(14));
        assert!(fence.is_broken());
        fence.on_ack(10);
        fence.on_ack(11);
        assert_eq!((fence.waiting(), fence.known(), fence.end()), (0, 12, 14));
        fence.restart(14);
        assert!(!fence.is_broken());
        assert_eq!(fence.extend(2), 14);
    }

    #[test]
    fn an_ack_counts_once() {
        let mut fence = Fence::new(0, 256);
        fence.extend(7);
        fence.on_ack(0);
        fence.on_ack(0);
        assert_eq!(fence.waiting(), 0);
        assert_eq!(fence.answer_for(0, Some(1)), AnswerFor::None);
    }
}
