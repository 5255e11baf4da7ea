//! The truth as Postgres tells it: what was committed, by a slot that no relay knows, and what was confirmed, and when.

use jetstream_outbox::postgres::Lsn;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A message of pgoutput, protocol version 1, as far as the tests look at it.
pub enum Logged<'a> {
    /// An Insert: the first column of its row, which must be text and not null.
    Insert(&'a str),
    /// A Commit: the end of its record.
    Commit(Lsn),
}

/// What a message says; `None` for the kinds that are not looked at.
pub fn read(message: &[u8]) -> Option<Logged<'_>> {
    match message.first()? {
        // relation (4), 'N', number of columns (2), then for each 't', its length (4) and text
        b'I' => {
            assert_eq!((message[5], message[8]), (b'N', b't'), "it is never null");
            let length = u32::from_be_bytes(message[9..13].try_into().expect("four bytes"));
            let text = &message[13..13 + length as usize];
            Some(Logged::Insert(
                std::str::from_utf8(text).expect("it is UTF-8"),
            ))
        }
        // flags, commit_lsn, end_lsn, time
        b'C' => {
            let end_lsn = message[10..18].try_into().expect("eight bytes");
            Some(Logged::Commit(Lsn(u64::from_be_bytes(end_lsn))))
        }
        _ => None,
    }
}

/// `confirmed_flush_lsn` as it was at a time.
pub struct Confirmed {
    pub lsn: Lsn,
    /// By the clock that nats-server stamps messages with: nanoseconds since 1970.
    pub time_ns: u64,
}

impl Confirmed {
    /// As it was read a moment ago.
    pub fn now(lsn: Lsn) -> Confirmed {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let time_ns = since_1970.expect("it is after 1970").as_nanos();
        Confirmed {
            lsn,
            time_ns: u64::try_from(time_ns).expect("it is before 2554"),
        }
    }
}

/// A confirmation that came before what it covers had been stored for the hold-back.
pub struct TooEarly {
    pub lsn: Lsn,
    /// Covered by it: the first event that was never stored, or else the last event of all.
    pub event: usize,
    /// How long the youngest event that it covers had been stored. `None`: the event never was.
    pub age_ms: Option<i64>,
}

/// Of confirmations in the order of their time, those that came too early. The events are in commit order: `ends` has
/// each transaction's end and how many events there are up to it, `stored_ns` when each event was stored, 0 for never.
pub fn too_early(
    confirmations: &[Confirmed],
    ends: &[(Lsn, usize)],
    stored_ns: &[u64],
    hold_back: Duration,
) -> Vec<TooEarly> {
    let mut found = Vec::new();
    // both are in order: one walk finds the youngest event at or before each confirmation. A crash takes the slot
    // back to its last checkpoint; what was covered before was stored by then
    let mut ends = ends.iter().peekable();
    let (mut covered, mut youngest_ns) = (0, 0);
    for &Confirmed { lsn, time_ns } in confirmations {
        while let Some((_, count)) = ends.next_if(|(end, _)| *end <= lsn) {
            let times = &stored_ns[covered..*count];
            if let Some(missing) = times.iter().position(|time| *time == 0) {
                let event = covered + missing;
                found.push(TooEarly {
                    lsn,
                    event,
                    age_ms: None,
                });
            }
            youngest_ns = times.iter().copied().fold(youngest_ns, u64::max);
            covered = *count;
        }
        let age_ns = time_ns as i64 - youngest_ns as i64;
        if covered > 0 && age_ns < hold_back.as_nanos() as i64 {
            found.push(TooEarly {
                lsn,
                event: covered - 1,
                age_ms: Some(age_ns / 1_000_000),
            });
        }
    }
    found
}
