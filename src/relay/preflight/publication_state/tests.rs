//! What a relay remembers, compared with facts as a catalog may have them later.

use super::super::outboxes::Table;
use super::super::publication::tests::{
    COLUMNS, apart, below, facts, outbox, parent, publication, table,
};
use super::super::tests::config;
use super::*;

/// What is lost from one look to the next, in the same process and after a restart.
#[track_caller]
fn check_change(args: &[&str], before: &Facts, now: &Facts, lost: Option<&str>) {
    let config = config(args);
    let state = PublicationState::of(&before.outboxes, &config).unwrap();
    for state in [
        PublicationState::from_text(&state.to_text()).unwrap(),
        state,
    ] {
        let found = state.lost(now, &config).map(|finding| finding.sentence());
        match (&found, lost) {
            (None, None) => {}
            (Some(found), Some(lost)) if found.contains(lost) => {}
            _ => panic!("{lost:?}: {found:?}"),
        }
    }
}

#[test]
fn what_is_lost_since_the_last_look_is_named() {
    let one = facts(&[outbox()]);
    check_change(&[], &one, &one, None);
    check_change(
        &[],
        &one,
        &facts(&[table(9, "new", &COLUMNS), outbox()]),
        None,
    );
    check_change(&[], &one, &facts(&[]), None);
    let mut none = one.clone();
    none.outboxes.publication = None;
    check_change(&[], &one, &none, Some("was dropped:"));
    let mut again = one.clone();
    publication(&mut again).oid += 1;
    check_change(&[], &one, &again, Some("was dropped and created again"));

    let hole = Some("does not reach the relay any more: public.outbox is not in the publication");
    check_change(&[], &one, &facts(&[apart(outbox())]), hole);
    check_change(&[], &facts(&[apart(outbox())]), &one, None);
    let again = Table {
        oid: 11,
        root: 11,
        ..outbox()
    };
    let there = |table: Table| {
        facts(&[Table {
            via: Some(table.oid),
            ..table
        }])
    };
    check_change(
        &[],
        &one,
        &there(again.clone()),
        Some("was not in publication"),
    );
    let automatic = Table {
        automatic: true,
        ..again.clone()
    };
    check_change(&[], &one, &there(automatic), None);
    check_change(
        &[],
        &one,
        &facts(&[apart(again.clone())]),
        Some("and publication jetstream_outbox does not hold it"),
    );
    let old = table(10, "outbox_old", &COLUMNS);
    let renamed = "was renamed to public.outbox_old and created again";
    check_change(
        &[],
        &one,
        &facts(&[old.clone(), apart(again)]),
        Some(renamed),
    );
    check_change(&[], &one, &facts(std::slice::from_ref(&old)), None);
    let both = Some("table public.outbox is called public.outbox_old now");
    check_change(
        &["-table", "outbox"],
        &one,
        &facts(std::slice::from_ref(&old)),
        both,
    );
    check_change(&["-table", "outbox,outbox_old"], &one, &facts(&[old]), None);

    let filtered = |filter: &str, filter_hash: i64| {
        facts(&[Table {
            filter: Some(filter.into()),
            filter_hash: Some(filter_hash),
            ..outbox()
        }])
    };
    let (zero, one_more) = (filtered("n > 0", -1), filtered("n > 1", 2));
    let named = Some("row filter for public.outbox");
    check_change(&[], &one, &zero, named);
    check_change(&[], &zero, &filtered("renamed > 0", -1), None);
    check_change(&[], &zero, &one_more, Some("row filter"));
    check_change(&[], &zero, &one, None);
    let mut cut = one.clone();
    cut.outboxes.tables[0].columns[3].sent = false;
    check_change(&[], &one, &cut, Some("leaves out column payload"));
    check_change(&[], &cut, &one, None);
}

#[test]
fn a_tree_without_partitions_that_is_no_outbox_any_more_is_named() {
    let empty = facts(&[parent()]);
    let renamed = Table {
        kind: 'p',
        ..table(1, "outbox", &["id", "kind", "of", "payload"])
    };
    let lost = Some("has not the columns of an outbox any more");
    check_change(&[], &empty, &empty, None);
    check_change(&[], &empty, &facts(&[renamed]), lost);
}

#[test]
fn each_member_has_a_filter_of_its_own() {
    let tree = |filters: &[(u32, Option<i64>)]| {
        let members = filters.iter().map(|&(oid, filter_hash)| Table {
            via: Some(oid),
            filter_hash,
            ..below(table(oid, &format!("p{oid}"), &COLUMNS), true)
        });
        facts(&[parent()].into_iter().chain(members).collect::<Vec<_>>())
    };
    let before = tree(&[(21, None), (22, Some(7))]);
    let filtered = Some("has a row filter for");
    check_change(&[], &before, &before, None);
    check_change(
        &[],
        &before,
        &tree(&[(21, Some(7)), (22, Some(7))]),
        filtered,
    );
    check_change(&[], &before, &tree(&[(21, None), (22, Some(8))]), filtered);
    check_change(&[], &before, &tree(&[(21, None), (22, None)]), None);
    check_change(&[], &before, &tree(&[(22, Some(7)), (23, Some(8))]), None);
    let many = |last| {
        let members = (21..=21 + MOST_HOLES as u32).map(|oid| (oid, Some(7)));
        let members: Vec<_> = members.chain([(999, last)]).collect();
        tree(&members)
    };
    check_change(&[], &many(None), &many(None), None);
    check_change(&[], &many(None), &many(Some(7)), filtered);
}

/// An earlier version compared the text of filters.
#[test]
fn what_an_earlier_version_remembers_of_a_filter_halts_nothing() {
    let config = config(&[]);
    let of = |filter_hash| {
        let table = Table {
            filter_hash,
            ..outbox()
        };
        facts(&[table])
    };
    let remembered = |filter: &str| {
        let state = PublicationState::of(&of(None).outboxes, &config).unwrap();
        let text = state.to_text();
        let oid = r#""name":"outbox""#;
        assert!(text.contains(oid), "{text}");
        PublicationState::from_text(&text.replace(oid, &format!("{oid}{filter}"))).unwrap()
    };
    assert!(
        remembered(r#","filter":7"#)
            .lost(&of(Some(1)), &config)
            .is_none()
    );
    assert!(remembered("").lost(&of(Some(1)), &config).is_some());
    let outbox = Outbox {
        oid: 1,
        schema: "s".into(),
        name: "n".into(),
        ..Outbox::default()
    };
    let as_it_was =
        r#"Outbox { oid: 1, schema: "s", name: "n", filter: None, unsent: [], holes: [] }"#;
    assert_eq!(
        outbox.summary(),
        as_it_was,
        "or many outboxes would seem to have changed"
    );
}

#[test]
fn a_tree_may_grow_and_shrink_where_nothing_is_lost() {
    let leaf = |oid, name: &str| below(table(oid, name, &COLUMNS), true);
    let tree = |members: &[Table]| facts(&[&[apart(parent())], members].concat());
    let one = tree(&[leaf(2, "p1")]);
    check_change(&[], &one, &tree(&[leaf(2, "p1"), leaf(3, "p2")]), None);
    let hole = "does not reach the relay any more: public.p2";
    let holed = tree(&[leaf(2, "p1"), apart(leaf(3, "p2"))]);
    check_change(&[], &one, &holed, Some(hole));
    // it was so before
    check_change(&[], &holed, &holed, None);
    // detached, and nothing of ours
    let mut detached = apart(leaf(2, "p1"));
    detached.root = 2;
    detached.partition = false;
    check_change(
        &[],
        &tree(&[leaf(2, "p1"), leaf(3, "p2")]),
        &facts(&[apart(parent()), leaf(3, "p2"), detached]),
        None,
    );

    // by the names of the partitions, or by that of the root: it matters to -table alone
    let via = Table {
        via: Some(1),
        ..leaf(2, "p1")
    };
    let mut root = facts(&[parent(), via]);
    publication(&mut root).via_root = true;
    check_change(&[], &one, &root, None);
    check_change(&["-table", "outbox,p1"], &one, &root, None);
    let other = Some("by other names than before");
    check_change(&["-table", "outbox"], &root, &one, other);
    check_change(&["-table", "p1"], &one, &root, other);
}

/// Above 500 a digest stands for them; those that were created since do not count.
#[test]
fn very_many_outboxes_are_remembered_by_a_digest() {
    let many = |count: u32| {
        let each = (0..count).map(|n| table(100 + n, &format!("outbox_{n}_"), &COLUMNS));
        facts(&each.collect::<Vec<_>>())
    };
    let config = config(&["-table", "outbox_*"]);
    let state = PublicationState::of(&many(20_000).outboxes, &config).unwrap();
    assert!(state.to_text().len() < 200, "{}", state.to_text());
    let state = PublicationState::from_text(&state.to_text()).unwrap();
    let lost = |facts: &Facts| state.lost(facts, &config).is_some();
    assert!(!lost(&many(20_000)));
    assert!(!lost(&many(20_001)));
    assert!(lost(&many(19_999)));
    let mut hole = many(20_000);
    hole.outboxes.tables[7] = apart(hole.outboxes.tables[7].clone());
    assert!(lost(&hole));
    let mut filtered = many(20_000);
    filtered.outboxes.tables[7].filter_hash = Some(1);
    assert!(lost(&filtered));
}

#[test]
fn what_is_no_loss_does_not_halt() {
    let one = facts(&[outbox()]);
    let mut updates = one.clone();
    publication(&mut updates).inserts = false;
    let lost = Some("does not publish inserts any more");
    check_change(&[], &one, &updates, lost);
    // a column that was left out before
    let mut cut = one.clone();
    cut.outboxes.tables[0].columns[3].sent = false;
    check_change(&[], &cut, &cut, None);
    // a view has no rows of its own
    let view = Table {
        kind: 'v',
        ..apart(table(11, "outbox", &COLUMNS))
    };
    let renamed = facts(&[table(10, "outbox_old", &COLUMNS), view]);
    check_change(&[], &one, &renamed, None);
    // publish_via_partition_root is nothing to children
    let child = Table {
        root: 10,
        ..table(12, "child", &COLUMNS)
    };
    let inherited = facts(&[outbox(), child]);
    let mut via_root = inherited.clone();
    publication(&mut via_root).via_root = true;
    check_change(&["-table", "outbox"], &inherited, &via_root, None);
}

/// The operator has named other tables since: what becomes of the first is no matter.
#[test]
fn what_is_not_asked_for_any_more_is_not_lost() {
    let state = PublicationState::of(&facts(&[outbox()]).outboxes, &config(&[])).unwrap();
    let config = config(&["-table", "other"]);
    let other = table(20, "other", &COLUMNS);
    let again = Table {
        oid: 11,
        root: 11,
        ..apart(outbox())
    };
    for now in [
        facts(&[apart(outbox()), other.clone()]),
        facts(&[table(10, "old", &COLUMNS), again, other]),
    ] {
        assert_eq!(state.lost(&now, &config), None);
    }
}

/// Of very many members that were not sent not each is remembered, and none of them halts.
#[test]
fn holes_without_number_are_remembered_in_part() {
    let leaf = |oid: u32| below(table(oid, &format!("p{oid}"), &COLUMNS), true);
    let holes = (100..1_100).map(|oid| apart(leaf(oid)));
    let tree: Vec<Table> = [apart(parent()), leaf(2)]
        .into_iter()
        .chain(holes)
        .collect();
    let holed = facts(&tree);
    let state = PublicationState::of(&holed.outboxes, &config(&[])).unwrap();
    assert!(state.to_text().len() < 1_000, "{}", state.to_text());
    check_change(&[], &holed, &holed, None);
}
