//! The confirm rule: which LSN may be told to Postgres as flushed, and when. Pure.
//!
//! Postgres keeps the log only for what is not confirmed, so a confirmed event must never be needed again.
//! An ack of JetStream means that the message was written to the operating system, not that it was synced
//! (by default that happens every 2 minutes). So a transaction is confirmed a while after its last ack:
//! `hold_back`. A stream put back to an older state within that time is filled again from the slot.

use crate::postgres::Lsn;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Acks of one second are confirmed together, so that the queue stays short: `hold_back` seconds of entries.
const GRAIN: Duration = Duration::from_secs(1);

/// Boundaries that are acknowledged but too young to be confirmed.
#[derive(Debug)]
pub struct Confirm {
    hold_back: Duration,
    confirmable: Confirmable,
    young: VecDeque<Young>,
}

/// Up to where everything is stored and old enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confirmable {
    /// The LSN to confirm.
    pub lsn: Lsn,
    /// For each stream, the sequence it had reached then: a stream that ends before it has lost
    /// what the slot cannot send again.
    pub sequences: Vec<u64>,
}

#[derive(Debug)]
struct Young {
    opened: Instant,
    acked: Instant,
    upto: Confirmable,
}

impl Confirm {
    /// Confirms `hold_back` after the ack.
    pub fn new(hold_back: Duration) -> Confirm {
        Confirm {
            hold_back,
            confirmable: Confirmable::default(),
            young: VecDeque::new(),
        }
    }

    /// Everything up to `lsn` is stored. `acked`: when its youngest event was, `None` if it had no event
    /// or only such as have been in the stream for `hold_back` already.
    pub fn boundary(
        &mut self,
        lsn: Lsn,
        acked: Option<Instant>,
        sequences: impl Iterator<Item = u64>,
    ) {
        let upto = match (self.young.back_mut(), acked) {
            (None, None) => &mut self.confirmable,
            (Some(last), None) => &mut last.upto,
            (Some(last), Some(now)) if now.saturating_duration_since(last.opened) < GRAIN => {
                // found stored early, but behind one that was acknowledged late: the younger one counts
                last.acked = last.acked.max(now);
                &mut last.upto
            }
            (_, Some(now)) => {
                self.young.push_back(Young {
                    opened: now,
                    acked: now,
                    upto: Confirmable::default(),
                });
                match self.young.back_mut() {
                    Some(last) => &mut last.upto,
                    None => return,
                }
            }
        };
        upto.lsn = upto.lsn.max(lsn);
        upto.sequences.clear();
        upto.sequences.extend(sequences);
    }

    /// Everything up to `lsn` is known to be stored and old enough, whatever waits here.
    pub fn proven(&mut self, lsn: Lsn) {
        self.confirmable.lsn = self.confirmable.lsn.max(lsn);
    }

    /// What could be confirmed at the last call of [`Confirm::confirmable`], or is proven.
    pub fn confirmed(&self) -> Lsn {
        self.confirmable.lsn
    }

    /// What may be confirmed at `now`.
    pub fn confirmable(&mut self, now: Instant) -> &Confirmable {
        while let Some(first) = self.young.front() {
            if now.saturating_duration_since(first.acked) < self.hold_back {
                break;
            }
            if let Some(first) = self.young.pop_front() {
                let lsn = first.upto.lsn.max(self.confirmable.lsn);
                self.confirmable = Confirmable { lsn, ..first.upto };
            }
        }
        &self.confirmable
    }

    /// What made the young ones safe is gone, and has to be done again.
    pub fn forget_young(&mut self) {
        self.young.clear();
    }

    /// Something is acknowledged and waits to grow old.
    pub fn is_waiting(&self) -> bool {
        !self.young.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD_BACK: Duration = Duration::from_secs(150);

    fn lsn(confirm: &mut Confirm, now: Instant) -> u64 {
        confirm.confirmable(now).lsn.0
    }

    #[test]
    fn an_acked_commit_is_confirmed_after_hold_back_and_not_before() {
        let start = Instant::now();
        let mut confirm = Confirm::new(HOLD_BACK);
        confirm.boundary(Lsn(10), Some(start), [1].into_iter());
        assert_eq!(
            lsn(&mut confirm, start + HOLD_BACK - Duration::from_millis(1)),
            0
        );
        assert_eq!(lsn(&mut confirm, start + HOLD_BACK), 10);
        assert_eq!(confirm.confirmable(start + HOLD_BACK).sequences, [1]);
        assert!(!confirm.is_waiting());
    }

    #[test]
    fn without_hold_back_an_ack_confirms_at_once() {
        let now = Instant::now();
        let mut confirm = Confirm::new(Duration::ZERO);
        confirm.boundary(Lsn(10), Some(now), [1].into_iter());
        assert_eq!(lsn(&mut confirm, now), 10);
    }

    #[test]
    fn an_idle_outbox_confirms_what_keepalives_report_but_never_past_a_young_commit() {
        let start = Instant::now();
        let mut confirm = Confirm::new(HOLD_BACK);
        confirm.boundary(Lsn(5), None, [].into_iter());
        assert_eq!(lsn(&mut confirm, start), 5);
        confirm.boundary(Lsn(10), Some(start), [1].into_iter());
        confirm.boundary(Lsn(20), None, [1].into_iter());
        assert_eq!(lsn(&mut confirm, start), 5);
        assert_eq!(lsn(&mut confirm, start + HOLD_BACK), 20);
    }

    #[test]
    fn commits_of_one_second_share_an_entry_and_wait_for_the_youngest() {
        let start = Instant::now();
        let mut confirm = Confirm::new(HOLD_BACK);
        for step in 0..1000 {
            confirm.boundary(
                Lsn(step + 1),
                Some(start + Duration::from_millis(step)),
                [step].into_iter(),
            );
        }
        assert_eq!(confirm.young.len(), 1);
        assert_eq!(lsn(&mut confirm, start + HOLD_BACK), 0);
        assert_eq!(
            lsn(&mut confirm, start + HOLD_BACK + Duration::from_millis(999)),
            1000
        );
    }

    #[test]
    fn what_has_to_be_done_again_waits_anew() {
        let start = Instant::now();
        let mut confirm = Confirm::new(HOLD_BACK);
        let after = |seconds| start + Duration::from_secs(seconds);
        confirm.boundary(Lsn(10), Some(start), [1].into_iter());
        confirm.boundary(Lsn(20), Some(after(100)), [2].into_iter());
        assert_eq!(lsn(&mut confirm, after(150)), 10);
        confirm.forget_young();
        assert_eq!(lsn(&mut confirm, after(900)), 10);
        confirm.boundary(Lsn(20), Some(after(900)), [2].into_iter());
        assert_eq!(lsn(&mut confirm, after(1049)), 10);
        assert_eq!(lsn(&mut confirm, after(1050)), 20);
    }

    #[test]
    fn a_steady_flow_keeps_a_bounded_queue() {
        let start = Instant::now();
        let mut confirm = Confirm::new(HOLD_BACK);
        for step in 0..100_000 {
            let now = start + Duration::from_millis(step * 10);
            confirm.boundary(Lsn(step + 1), Some(now), [step].into_iter());
            confirm.confirmable(now);
            assert!(confirm.young.len() <= 152);
        }
    }
}
