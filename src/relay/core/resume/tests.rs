use super::super::evidence::Verdict;
use super::facts::Known;
use super::*;
use crate::outbox::lineage::Lineage;
use crate::outbox::position::{Source, SourcePosition};
use crate::relay::checkpoint::record::AnchorEvent;

const CREATED: &str = "2026-11-23T09:26:06Z";

fn lineage() -> Lineage {
    Lineage {
        source: Source {
            slot: "s".into(),
            system_id: 7,
            timeline: 1,
        },
        switch_points: Vec::new(),
    }
}

fn at(lsn: u64) -> SourcePosition {
    lineage().at(Position {
        commit_lsn: Lsn(lsn),
        ordinal: 1,
    })
}

/// A message of ours: event `lsn` of as much.
fn ours(seq: u64, lsn: u64) -> Message {
    Message {
        seq,
        position: Some(at(lsn)),
        id: Some(lsn.to_string()),
        expected_last_sequence: seq.checked_sub(1),
        ..Message::default()
    }
}

fn foreign(seq: u64) -> Message {
    Message {
        seq,
        ..Message::default()
    }
}

fn flags() -> Flags {
    Flags::new("p", true, "m")
}

/// Everything up to event `lsn` is resolved, which is in stream A at `seq`; nothing after it is at or before that.
fn cut(lsn: u64, seq: u64) -> Cut {
    Cut {
        anchor: Anchor {
            position: at(lsn).position,
            event: Some(AnchorEvent {
                id: lsn.to_string(),
                commit_time_us: 0,
                flags: flags(),
            }),
        },
        stored_lsn: Lsn(lsn + 1),
        streams: vec![StreamCut {
            name: "A".into(),
            created: CREATED.into(),
            read_after: seq,
            witness: Some(Witness {
                seq,
                position: at(lsn),
            }),
            unseen: None,
            share: None,
        }],
        quiescent: false,
        lenient_upto: Lsn::INVALID,
        flags: flags(),
        is_empty: true,
    }
}

fn stream(name: &str, last_seq: u64) -> StreamFacts {
    StreamFacts {
        name: name.into(),
        created: CREATED.into(),
        first_seq: 1,
        last_seq,
        is_routed: true,
        keeps_its_end: true,
        keeps_its_order: true,
        ..StreamFacts::default()
    }
}

fn facts(cuts: Vec<Cut>, streams: Vec<StreamFacts>) -> Facts {
    Facts {
        lineage: lineage(),
        known: Known {
            cuts,
            oldest_is_matured: true,
            confirmed_lsn: Lsn(1),
            ..Known::default()
        },
        streams,
        accept_loss: false,
    }
}

/// Resumes with streams that hold these messages.
fn resume(facts: Facts, held: &[&[Message]]) -> Result<Resumed, Lost> {
    let mut resume = Resume::new(facts);
    while let Some(read) = resume.next_read()? {
        let answer = match &read {
            Read::Message(stream, seq) => {
                assert!(*seq > 0, "the API refuses to look for sequence 0");
                let messages = held.get(*stream).copied().unwrap_or_default();
                let found = messages.iter().find(|message| message.seq == *seq);
                Answer::Message(found.cloned())
            }
            Read::Exists(name) => Answer::Exists(name == "there"),
        };
        resume.on_read(&read, answer);
    }
    assert!(resume.is_done());
    Ok(resume.finish())
}

/// Which cut is chosen of the young one, of event 30 at 3, and the matured one, of event 10 at 1.
#[track_caller]
fn check(change: impl FnOnce(&mut StreamFacts), held: &[Message], expected: Result<usize, ()>) {
    let mut a = stream("A", 3);
    change(&mut a);
    let resumed = resume(facts(vec![cut(30, 3), cut(10, 1)], vec![a]), &[held]);
    let chosen = resumed
        .map(|resumed| resumed.cut.expect("a cut"))
        .map_err(|_| ());
    assert_eq!(chosen, expected);
}

#[test]
fn the_youngest_cut_that_the_stream_agrees_with_is_taken() {
    let all = [ours(1, 10), ours(2, 20), ours(3, 30)];
    check(|_| (), &all, Ok(0));
    // it lost the last one, or two, or all that it ever had
    check(|a| a.last_seq = 2, &all[..2], Ok(1));
    check(|a| a.last_seq = 0, &[], Err(()));
    // `created` changes after an edit and two restarts: the witness decides
    check(|a| a.created = "2027".into(), &all, Ok(0));
    // created again, and empty, or with what came since: an operator's doing, so what the slot has is published
    let again = |last_seq| {
        move |a: &mut StreamFacts| {
            (a.created, a.last_seq) = ("2027".into(), last_seq);
            a.first_seq = a.first_seq.min(last_seq);
        }
    };
    check(again(0), &[], Ok(1));
    check(again(1), &[foreign(1)], Ok(1));
    check(again(1), &[ours(1, 20)], Ok(1));
    // restored from a backup, which a new stream cannot hold: one that has all of the matured cut, and one that has not
    let restored = [ours(1, 10), ours(2, 20)];
    check(again(2), &restored, Ok(1));
    check(again(1), &[ours(1, 5)], Err(()));
    // consumed, and still the same one
    let consumed = |a: &mut StreamFacts| {
        (a.keeps_its_end, a.keeps_its_order) = (false, false);
        a.first_seq = 4;
    };
    check(consumed, &[], Ok(0));
    // another message is there, in the same stream: refilled from the first on, or from the third
    check(|_| (), &[foreign(1), foreign(2), foreign(3)], Err(()));
    check(|_| (), &[ours(1, 10), foreign(2), foreign(3)], Ok(1));
    // the index counts what the blocks have lost
    check(|_| (), &all[..2], Ok(1));
}

#[test]
fn a_stream_that_was_deleted_by_an_operator_halts_nothing() {
    let cuts = || vec![cut(30, 3), cut(10, 1)];
    let gone = resume(facts(cuts(), vec![stream("B", 0)]), &[&[]]).unwrap();
    assert_eq!(gone.cut, Some(0));
    let again = StreamFacts {
        created: "2027".into(),
        ..stream("A", 0)
    };
    let again = resume(facts(cuts(), vec![again]), &[&[]]).unwrap();
    assert_eq!(again.cut, Some(1), "what the slot still has comes again");
    assert_eq!(again.streams[0].witness, None);
}

#[test]
fn what_postgres_was_not_told_is_taken_from_the_slot_again() {
    let mut told_nothing = facts(vec![cut(30, 3)], vec![stream("A", 0)]);
    told_nothing.known.oldest_is_matured = false;
    let resumed = resume(told_nothing.clone(), &[&[]]).unwrap();
    assert_eq!((resumed.cut, resumed.anchor), (None, Anchor::bare(Lsn(1))));
    assert_eq!(resumed.lenient_upto, Lsn::INVALID);
    let mut other_wal = told_nothing.clone();
    other_wal.known.cuts[0].lenient_upto = Lsn(40);
    let resumed = resume(other_wal, &[&[]]).unwrap();
    assert_eq!(
        resumed.lenient_upto,
        Lsn(40),
        "events of another WAL may be there"
    );
    let mut goes_on = told_nothing;
    goes_on.known.goes_on = true;
    assert!(
        resume(goes_on, &[&[]]).is_err(),
        "the copy stream has gone on"
    );
}

#[test]
fn of_a_stream_that_has_lost_something_only_a_witness_that_is_there_speaks() {
    // a queue, from which what took the place of the lost one is consumed
    let queue = || StreamFacts {
        keeps_its_end: false,
        keeps_its_order: false,
        ..stream("A", 4)
    };
    let cuts = || vec![cut(40, 4), cut(20, 2)];
    let gone = facts(cuts(), vec![queue()]);
    let held = [ours(1, 10), ours(2, 20)];
    assert_eq!(resume(gone.clone(), &[&held]).unwrap().cut, Some(0));
    let mut distrusted = gone;
    distrusted.known.distrusted = vec!["A".into()];
    let resumed = resume(distrusted.clone(), &[&held]).unwrap();
    assert_eq!(resumed.cut, Some(1));
    // there is none to go back to
    let resumed = resume(distrusted.clone(), &[&[]]).unwrap();
    assert_eq!(resumed.cut, Some(1));
    let all = [&held[..], &[ours(3, 30), ours(4, 40)]].concat();
    assert_eq!(resume(distrusted, &[&all]).unwrap().cut, Some(0));
}

/// Where the event is stored.
fn place(verdict: Verdict) -> Option<(usize, u64)> {
    match verdict {
        Verdict::Stored(found) => Some((found.stream, found.seq)),
        Verdict::Publish => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_message_after_the_cut_is_evidence_in_whatever_stream() {
    let a = [ours(1, 10), ours(2, 40), foreign(3), ours(4, 50)];
    // one that the cut does not name, and an older event at its end
    let b = [ours(1, 60), ours(2, 5)];
    let streams = vec![stream("A", 4), stream("B", 2)];
    let mut resumed = resume(facts(vec![cut(10, 1)], streams.clone()), &[&a, &b]).unwrap();
    let mut verdict = |lsn| {
        let verdict = resumed.evidence.verdict(at(lsn).position, &lsn.to_string());
        resumed.evidence.forget_upto(at(lsn).position);
        place(verdict)
    };
    assert_eq!(verdict(20), None);
    assert_eq!(verdict(40), Some((0, 2)));
    assert_eq!(verdict(50), Some((0, 4)));
    // nothing before an older event of ours can be younger, unless that one was late
    assert_eq!(verdict(60), None);
    assert_eq!(resumed.foreign, [1, 0]);
    let late = Message {
        is_late: true,
        ..ours(2, 5)
    };
    let b = [ours(1, 60), late];
    let mut resumed = resume(facts(vec![cut(10, 1)], streams), &[&a, &b]).unwrap();
    resumed.evidence.forget_upto(at(50).position);
    let verdict = resumed.evidence.verdict(at(60).position, "60");
    assert_eq!(place(verdict), Some((1, 1)));
}

#[test]
fn the_share_of_the_anchor_s_transaction_is_that_of_the_cut_where_its_stream_agrees() {
    let share = |of_cut: Option<u64>, bare: bool, found: u64| {
        let mut cut = cut(10, 1);
        cut.streams[0].share = of_cut;
        // created again, unless its witness is there
        cut.streams[0].created = "another".into();
        if bare {
            cut.anchor = Anchor::bare(Lsn(10));
        }
        let mut facts = facts(vec![cut], vec![stream("A", 1), stream("B", 0)]);
        facts.accept_loss = true;
        let resumed = resume(facts, &[&[ours(1, found)], &[]]).unwrap();
        let streams = resumed.streams.iter();
        streams.map(|stream| stream.share).collect::<Vec<_>>()
    };
    assert_eq!(share(Some(7), false, 10), [Some(7), None]);
    // of a stream that the cut does not name it says nothing
    assert_eq!(share(Some(7), true, 10), [Some(0), Some(0)]);
    assert_eq!(share(Some(7), false, 5), [None, None]);
    assert_eq!(share(None, false, 10), [None, None]);
}

#[test]
fn a_copy_counts_only_where_its_stream_is_gone() {
    for (source, counts) in [("there", false), ("gone", true)] {
        let copy = Message {
            expected_last_sequence: None,
            copied_from: Some(source.into()),
            ..ours(2, 40)
        };
        let held = [ours(1, 10), copy];
        let facts = facts(vec![cut(10, 1)], vec![stream("A", 2)]);
        let resumed = resume(facts, &[&held]).unwrap();
        assert_eq!(!resumed.evidence.is_empty(), counts, "{source}");
    }
}

#[test]
fn after_at_least_once_an_event_without_a_fence_is_told_of() {
    let unfenced = |lsn| Message {
        expected_last_sequence: None,
        ..ours(1, lsn)
    };
    let with = |maybe_unfenced, lsn| {
        let mut facts = facts(Vec::new(), vec![stream("A", 1)]);
        facts.known.maybe_unfenced = maybe_unfenced;
        facts.known.confirmed_lsn = Lsn(20);
        resume(facts, &[&[unfenced(lsn)]]).unwrap().unfenced
    };
    assert_eq!(with(true, 30), Some((0, at(30).position)));
    assert_eq!(with(true, 10), None, "before the slot's position");
    assert_eq!(with(false, 30), None, "a copy of somebody's");
}

#[test]
fn what_was_counted_otherwise_is_refused_and_only_that() {
    let held = [ours(1, 10), ours(2, 40)];
    let streams = || vec![stream("A", 2)];
    let more = resume(facts(vec![cut(10, 1)], streams()), &[&held]).unwrap();
    let nothing = resume(facts(vec![cut(40, 2)], streams()), &[&held]).unwrap();
    let mut partial = nothing.clone();
    partial.stored_lsn = partial.anchor.position.commit_lsn;
    let other_publication = Flags::new("q", true, "m");
    assert!(more.is_mixed(&other_publication));
    assert!(!nothing.is_mixed(&other_publication));
    assert!(partial.is_mixed(&other_publication));
    // the same row, of which another event is made or none
    let other_tables = Flags::new("p", true, "n");
    for resumed in [&more, &nothing, &partial] {
        assert!(!resumed.is_mixed(&other_tables) && !resumed.is_mixed(&flags()));
    }
    // they were changed and changed back behind an older cut
    let mut older = cut(10, 1);
    older.flags = flags().and(&other_publication);
    let lost = facts(vec![cut(50, 3), older], streams());
    assert!(resume(lost, &[&held]).unwrap().is_mixed(&flags()));
}

#[test]
fn a_stream_that_lost_what_postgres_was_told_of_is_told_from_one_that_lost_less() {
    let all = [ours(1, 10), ours(2, 20), ours(3, 30), ours(4, 40)];
    // it still counts what it has lost
    for (held, chosen, confirmed_are_gone) in [
        (&all[..], 0, false),
        (&all[..2], 1, false),
        (&all[..1], 1, true),
    ] {
        let cuts = vec![cut(40, 4), cut(20, 2)];
        let resumed = resume(facts(cuts, vec![stream("A", 4)]), &[held]);
        let resumed = resumed.expect("an operator may delete messages");
        assert_eq!(resumed.cut, Some(chosen), "{held:?}");
        assert_eq!(resumed.confirmed_are_gone, confirmed_are_gone, "{held:?}");
    }
}
