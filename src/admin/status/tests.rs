//! Where things stand, from what was read.

use super::*;

#[test]
fn a_history_is_drawn() {
    assert_eq!(sparkline(&[]), "");
    assert_eq!(sparkline(&[Some(0), Some(0)]), "▁▁");
    assert_eq!(sparkline(&[Some(0), Some(50), Some(100)]), "▁▄█");
    assert_eq!(sparkline(&[Some(u64::MAX), Some(0)]), "█▁");
    assert_eq!(sparkline(&[Some(1), None, Some(1)]), "█·█");
    assert_eq!(sparkline(&[None]), "·");
}

fn at(commit_lsn: u64, ordinal: u32) -> Position {
    Position {
        commit_lsn: Lsn(commit_lsn),
        ordinal,
    }
}

#[test]
fn the_later_of_slot_and_stream_is_what_is_published() {
    let stream = |position: &str| Stream {
        tail: Some(Tail {
            position: position.parse().ok(),
            ..Tail::default()
        }),
        ..Stream::default()
    };
    let slot = Slot {
        name: "s".into(),
        confirmed: Some(Lsn(0x100)),
        current: Lsn(0x1000),
        ..Slot::default()
    };
    for (position, expected) in [
        ("s 1 1 0/200 1", at(0x200, 1)),
        ("s 1 1 0/100 6", at(0x100, 6)),
        ("s 1 1 0/50 1", at(0x100, 0)),
        ("s 2 1 0/200 1", at(0x100, 0)),
        ("other 1 1 0/200 1", at(0x100, 0)),
        ("s 1 1 0/2000 1", at(0x100, 0)),
        ("none", at(0x100, 0)),
    ] {
        let found = Published::new(&slot, &[stream(position)], Some(1), None);
        let expected = Some(expected);
        assert_eq!(
            (found.least(), found.greatest()),
            (expected, expected),
            "{position}"
        );
    }
    let nothing = Published::new(&Slot::default(), &[], None, None);
    assert_eq!((nothing.least(), nothing.greatest()), (None, None));
}

#[test]
fn of_several_streams_each_has_its_own_end() {
    let of = |tails: &[Option<Position>]| Published {
        confirmed: Some(at(5, 0)),
        tails: tails.to_vec(),
    };
    let (six, nine) = (Some(at(6, 2)), Some(at(9, 1)));
    for (tails, least, greatest) in [
        (&[six, nine][..], at(6, 2), at(9, 1)),
        (&[nine, None], at(5, 0), at(9, 1)),
        (&[None, None], at(5, 0), at(5, 0)),
        (&[Some(at(1, 1)), nine], at(5, 0), at(9, 1)),
    ] {
        let found = (of(tails).least(), of(tails).greatest());
        assert_eq!(found, (Some(least), Some(greatest)), "{tails:?}");
    }
    let published = of(&[six, nine, None]);
    for (event, stream, expected) in [
        (at(6, 2), Some(0), true),
        (at(6, 3), Some(0), false),
        (at(6, 3), Some(1), true),
        (at(6, 3), Some(2), false),
        (at(4, 9), Some(2), true),
        // captured by none
        (at(6, 1), Some(7), false),
        (at(9, 1), None, true),
        (at(9, 2), None, false),
    ] {
        assert_eq!(published.has(event, stream), expected, "{event} {stream:?}");
    }
}

#[test]
fn what_was_decoded_holds_until_it_is_old_or_published() {
    let start = Instant::now();
    let later = start + DECODE_INTERVAL;
    let upto = |confirmed| Published {
        confirmed,
        tails: Vec::new(),
    };
    let sixth = Waiting::Event {
        at: at(5, 6),
        stream: None,
        time_s: 0,
    };
    let nothing = Waiting::Nothing;
    for (waiting, now, known, expected) in [
        (sixth, start, Some(at(4, 9)), Some(sixth)),
        (sixth, start, Some(at(5, 0)), Some(sixth)),
        (sixth, start, Some(at(5, 5)), Some(sixth)),
        (sixth, start, None, Some(sixth)),
        (sixth, start, Some(at(5, 6)), None),
        (sixth, start, Some(at(6, 0)), None),
        (sixth, later, Some(at(4, 1)), None),
        (nothing, start, Some(at(9, 0)), Some(nothing)),
        (nothing, later, Some(at(9, 0)), None),
    ] {
        let found = Decoded {
            at: start,
            waiting,
            halts: None,
        }
        .still(now, &upto(known));
        assert_eq!(found, expected, "{waiting:?} {known:?}");
    }
}

#[test]
fn a_lag_above_its_limit_or_unknown_exceeds() {
    let waits = Waiting::Event {
        at: at(1, 1),
        stream: None,
        time_s: Timestamp::now().as_second() - 1000,
    };
    for (lag_bytes, waiting, limits, expected) in [
        (Some(10), waits, (None, None), false),
        (Some(10), waits, (Some(10), Some(2000)), false),
        (Some(10), waits, (Some(9), None), true),
        (Some(10), waits, (None, Some(999)), true),
        (Some(0), Waiting::Nothing, (Some(0), Some(0)), false),
        (Some(10), Waiting::Unknown, (Some(10), None), false),
        (Some(10), Waiting::Unknown, (None, Some(100)), true),
        (None, Waiting::Unknown, (Some(100), None), true),
    ] {
        let standing = Standing {
            lag_bytes,
            waiting,
            ..Standing::default()
        };
        let how = operation::Status {
            json: false,
            watch: false,
            max_lag_bytes: limits.0,
            max_lag_seconds: limits.1,
        };
        assert_eq!(exceeded(&standing, &how), expected, "{standing:?} {how:?}");
    }
}
