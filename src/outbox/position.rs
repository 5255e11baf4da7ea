//! Where an event stands in Postgres, as the `Outbox-Position` header carries it.
//!
//! `<slot> <system id> <timeline> <commit lsn> <ordinal>`, for instance
//! `jetstream_outbox 7312345678901234567 1 0/16B3748 3`. The commit's LSN and not the row's own: the rows
//! of one COPY share theirs. Commit records are written in commit order, which is the order Postgres
//! sends transactions in, so positions of one timeline compare like the events themselves.

use crate::postgres::Lsn;
use std::fmt;
use std::str::FromStr;

/// The place of an event among all events of one slot on one timeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Where the commit record of its transaction starts.
    pub commit_lsn: Lsn,
    /// The how-manieth event of its transaction, from 1.
    pub ordinal: u32,
}

/// Which log the positions are positions in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The replication slot's name (lower-case letters, digits and underscores only).
    pub slot: String,
    /// `IDENTIFY_SYSTEM`'s systemid: made once by initdb, the same on a standby.
    pub system_id: u64,
    /// Counted up by each promotion of a standby.
    pub timeline: u32,
}

/// A position and the log it stands in: the value of the header.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourcePosition {
    /// Which log.
    pub source: Source,
    /// Where in it.
    pub position: Position,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.slot, self.system_id, self.timeline)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.commit_lsn, self.ordinal)
    }
}

impl fmt::Display for SourcePosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.source, self.position)
    }
}

/// The header's value is not five words of the form above.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsePositionError;

impl fmt::Display for ParsePositionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not an Outbox-Position of the form `<slot> <system id> <timeline> <commit lsn> <ordinal>`")
    }
}

impl std::error::Error for ParsePositionError {}

impl FromStr for Position {
    type Err = ParsePositionError;

    fn from_str(text: &str) -> Result<Position, ParsePositionError> {
        let (lsn, ordinal) = text.split_once(' ').ok_or(ParsePositionError)?;
        Ok(Position {
            commit_lsn: lsn.parse().map_err(|_| ParsePositionError)?,
            ordinal: ordinal.parse().map_err(|_| ParsePositionError)?,
        })
    }
}

impl FromStr for SourcePosition {
    type Err = ParsePositionError;

    fn from_str(text: &str) -> Result<SourcePosition, ParsePositionError> {
        let mut words = text.split(' ');
        let mut word = || {
            words
                .next()
                .filter(|word| !word.is_empty())
                .ok_or(ParsePositionError)
        };
        let found = SourcePosition {
            source: Source {
                slot: word()?.to_string(),
                system_id: word()?.parse().map_err(|_| ParsePositionError)?,
                timeline: word()?.parse().map_err(|_| ParsePositionError)?,
            },
            position: Position {
                commit_lsn: word()?.parse().map_err(|_| ParsePositionError)?,
                ordinal: word()?.parse().map_err(|_| ParsePositionError)?,
            },
        };
        match words.next() {
            None => Ok(found),
            Some(_) => Err(ParsePositionError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_reads_back() {
        let text = "jetstream_outbox 7312345678901234567 1 0/16B3748 3";
        let read: SourcePosition = text.parse().unwrap();
        assert_eq!(
            read.position,
            Position {
                commit_lsn: Lsn(0x16B3748),
                ordinal: 3
            }
        );
        assert_eq!(
            (read.source.slot.as_str(), read.source.timeline),
            ("jetstream_outbox", 1)
        );
        assert_eq!(read.to_string(), text);
    }

    #[test]
    fn what_is_not_a_position_is_refused() {
        for text in [
            "",
            "s 1 1 0/1",
            "s 1 1 0/1 1 1",
            "s x 1 0/1 1",
            "s 1 1 01 1",
            "s 1 1 0/1 -1",
            " s 1 1 0/1 1",
            "s  1 1 0/1 1",
        ] {
            assert_eq!(
                text.parse::<SourcePosition>(),
                Err(ParsePositionError),
                "{text:?}"
            );
        }
    }

    #[test]
    fn positions_compare_by_commit_then_ordinal() {
        let at = |lsn, ordinal| Position {
            commit_lsn: Lsn(lsn),
            ordinal,
        };
        assert!(at(1, 9) < at(2, 1) && at(2, 1) < at(2, 2));
    }
}
