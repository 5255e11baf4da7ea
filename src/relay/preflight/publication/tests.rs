//! Each rule, from facts as a catalog may have them.

use super::super::outboxes::{Key, Publication};
use super::super::tests::{config, good};
use super::*;

pub const COLUMNS: [&str; 4] = ["id", "aggregatetype", "aggregateid", "payload"];

/// A table that is sent by its own name.
pub fn table(oid: u32, name: &str, columns: &[&str]) -> Table {
    let column = |name: &&str| Column {
        name: name.to_string(),
        kind: "text".into(),
        sent: true,
        not_null: true,
        ..Column::default()
    };
    Table {
        oid,
        root: oid,
        schema: "public".into(),
        name: name.into(),
        kind: 'r',
        via: Some(oid),
        member: true,
        columns: columns.iter().map(column).collect(),
        ..Table::default()
    }
}

pub fn outbox() -> Table {
    table(10, "outbox", &COLUMNS)
}

/// One that is not published.
pub fn apart(table: Table) -> Table {
    Table {
        via: None,
        member: false,
        ..table
    }
}

/// A member of the tree of 1.
pub fn below(table: Table, partition: bool) -> Table {
    Table {
        root: 1,
        partition,
        ..table
    }
}

/// The partitioned table of that tree.
pub fn parent() -> Table {
    Table {
        kind: 'p',
        ..table(1, "outbox", &COLUMNS)
    }
}

pub fn facts(tables: &[Table]) -> Facts {
    let mut facts = good();
    facts.outboxes.tables = tables.to_vec();
    facts
}

/// Expects exactly these findings to be other than ok: level, name, and what each holds.
#[track_caller]
fn check(args: &[&str], facts: &Facts, expected: &[(Level, &str, &[&str])]) {
    let config = config(args);
    let rules = START.iter().chain(&RULES);
    let found: Vec<Finding> = rules.flat_map(|rule| rule(facts, &config)).collect();
    let bad: Vec<&Finding> = found.iter().filter(|it| it.level != Level::Ok).collect();
    assert_eq!(bad.len(), expected.len(), "{found:#?}");
    for (finding, (level, name, parts)) in bad.iter().zip(expected) {
        assert_eq!((finding.level, finding.name), (*level, *name), "{finding}");
        for part in *parts {
            assert!(finding.to_string().contains(part), "{part}: {finding}");
        }
    }
}

pub fn publication(facts: &mut Facts) -> &mut Publication {
    facts.outboxes.publication.as_mut().unwrap()
}

#[test]
fn the_publication_exists_and_publishes_inserts() {
    let mut none = facts(&[outbox()]);
    none.outboxes.publication = None;
    let parts = [
        "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox",
        "pg_drop_replication_slot",
    ];
    check(&[], &none, &[(Level::Fail, "postgres.publication", &parts)]);
    let mut updates = facts(&[outbox()]);
    publication(&mut updates).inserts = false;
    let parts = ["SET (publish = 'insert');"];
    check(
        &[],
        &updates,
        &[(Level::Fail, "postgres.publication", &parts)],
    );
}

#[test]
fn what_is_relayed_is_whole() {
    use Level::{Fail, Warn};
    let tables = |args: &[&str], level, parts: &[&str], all: &[Table]| {
        check(args, &facts(all), &[(level, TABLES, parts)]);
    };
    check(&[], &facts(&[outbox()]), &[]);
    // no outbox, or another's
    check(&[], &facts(&[outbox(), table(11, "other", &["n"])]), &[]);
    tables(
        &[],
        Fail,
        &[
            "table outbox does not exist",
            "CREATE TABLE outbox (",
            "ADD TABLE outbox;",
        ],
        &[],
    );
    tables(
        &["-table", "shop.outbox"],
        Fail,
        &["ADD TABLE shop.outbox;"],
        &[outbox()],
    );
    tables(&["-table", "in*"], Fail, &["no table \"in\"*"], &[outbox()]);
    check(&["-table", "out*"], &facts(&[outbox()]), &[]);

    for (args, parts) in [
        (
            &["-header", "tenant"][..],
            [
                "has no column tenant:",
                "ALTER TABLE public.outbox ADD COLUMN tenant text;",
            ],
        ),
        (
            &["-subject", "{prefix}.{aggregatetype}.{region}"],
            [
                "column region:",
                "ADD COLUMN region character varying(255);",
            ],
        ),
        (
            &["-id-column", "event_id"],
            ["column event_id:", "ADD COLUMN event_id uuid;"],
        ),
        (
            &["-headers-column", "meta"],
            ["column meta:", "ADD COLUMN meta jsonb;"],
        ),
        (
            &["-table", "outbox:payload=body"],
            ["column body:", "ADD COLUMN body jsonb;"],
        ),
    ] {
        tables(args, Fail, &parts, &[outbox()]);
    }
    // {aggregatetype} is the default of a CloudEvent's type; here there is none
    let short = [table(10, "outbox", &["id", "aggregateid", "payload"])];
    let args = ["-subject", "{prefix}.{aggregateid}"];
    check(&args, &facts(&short), &[]);
    let args = [&args[..], &["-cloudevents", "/shop"]].concat();
    tables(
        &args,
        Fail,
        &["has no column type:", "ADD COLUMN type text;"],
        &short,
    );

    let unsent = |name: &str, generated: &str| {
        let mut table = table(10, "outbox", &[&COLUMNS[..], &["headers"]].concat());
        table.columns[4].kind = "jsonb".into();
        let column = table.columns.iter_mut().find(|it| it.name == name).unwrap();
        column.sent = false;
        column.generated = generated.into();
        column.expression = Some("payload->>'id'".into());
        table
    };
    let whole = "DROP TABLE ONLY public.outbox; ALTER PUBLICATION jetstream_outbox ADD TABLE ONLY public.outbox;";
    tables(
        &[],
        Fail,
        &["published without payload", whole],
        &[unsent("payload", "")],
    );
    tables(
        &[],
        Warn,
        &["published without headers", whole],
        &[unsent("headers", "")],
    );
    let stored = "SET (publish_generated_columns = stored);";
    tables(
        &[],
        Fail,
        &["aggregateid of table public.outbox is generated", stored],
        &[unsent("aggregateid", "s")],
    );
    let again = "DROP COLUMN aggregateid, ADD COLUMN aggregateid text GENERATED ALWAYS AS (payload->>'id') STORED;";
    tables(&[], Fail, &[again, stored], &[unsent("aggregateid", "v")]);
    let mut older = facts(&[unsent("aggregateid", "s")]);
    older.outboxes.version = 150_018;
    let parts = [
        "DROP EXPRESSION;",
        "SELECT payload->>'id' INTO NEW.aggregateid",
    ];
    check(&[], &older, &[(Fail, TABLES, &parts)]);

    let filtered = Table {
        filter: Some("n > 1".into()),
        ..outbox()
    };
    tables(
        &[],
        Warn,
        &["row filter for public.outbox: n > 1", whole],
        &[filtered],
    );
}

#[test]
fn what_is_inserted_is_sent() {
    use Level::{Fail, Warn};
    let tables = |args: &[&str], level, parts: &[&str], all: &[Table]| {
        check(args, &facts(all), &[(level, TABLES, parts)]);
    };
    let add = "ALTER PUBLICATION jetstream_outbox ADD TABLE public.outbox;";
    tables(
        &[],
        Fail,
        &["does not hold public.outbox", add],
        &[apart(outbox())],
    );
    tables(&["-table", "outbox"], Fail, &[add], &[apart(outbox())]);
    let named = [apart(outbox()), table(11, "letters", &COLUMNS)];
    tables(&["-table", "outbox,letters"], Fail, &[add], &named);
    // what it was renamed to is still published
    let old = table(11, "outbox_old", &COLUMNS);
    tables(
        &[],
        Fail,
        &["does not hold public.outbox", add],
        &[apart(outbox()), old],
    );
    // another of the same name, or of another
    let mut elsewhere = apart(outbox());
    elsewhere.schema = "shop".into();
    (elsewhere.oid, elsewhere.root) = (9, 9);
    let parts = ["shop.outbox looks like an outbox and is in no publication"];
    tables(&[], Warn, &parts, &[elsewhere.clone(), outbox()]);
    check(
        &["-table", "outbox"],
        &facts(&[elsewhere.clone(), outbox()]),
        &[],
    );
    tables(
        &["-table", "shop.outbox"],
        Fail,
        &["does not hold shop.outbox"],
        &[elsewhere.clone()],
    );
    elsewhere.elsewhere = true;
    check(&[], &facts(&[elsewhere, outbox()]), &[]);

    let unlogged = |table: Table| Table {
        unlogged: true,
        via: None,
        ..table
    };
    let parts = [
        "public.outbox is unlogged",
        "ALTER TABLE public.outbox SET LOGGED;",
    ];
    tables(&[], Fail, &parts, &[unlogged(outbox())]);
    let view = Table {
        kind: 'v',
        reads: Some("app.events".into()),
        ..apart(outbox())
    };
    tables(
        &[],
        Fail,
        &["outbox is a view", "-table app.events"],
        &[view],
    );
}

#[test]
fn every_member_of_a_tree_is_sent() {
    use Level::{Fail, Warn};
    let tables = |args: &[&str], level, parts: &[&str], all: &[Table]| {
        check(args, &facts(all), &[(level, TABLES, parts)]);
    };
    // published via the root
    let via = |oid, name: &str| Table {
        via: Some(1),
        ..below(table(oid, name, &[]), true)
    };
    let unlogged = Table {
        unlogged: true,
        ..via(3, "p2")
    };
    let foreign = Table {
        kind: 'f',
        ..via(3, "p2")
    };
    check(&[], &facts(&[parent(), via(2, "p1"), via(3, "p2")]), &[]);
    let set = ["public.p2 is unlogged", "ALTER TABLE public.p2 SET LOGGED;"];
    tables(&[], Fail, &set, &[parent(), via(2, "p1"), unlogged]);
    let detach = [
        "public.p2 is on another server",
        "ALTER TABLE public.outbox DETACH PARTITION public.p2;",
    ];
    tables(&[], Fail, &detach, &[parent(), via(2, "p1"), foreign]);

    // one by one: somebody may want it so, unless the root is named
    let each = [
        apart(parent()),
        below(table(2, "p1", &COLUMNS), true),
        apart(below(table(3, "p2", &COLUMNS), true)),
    ];
    let parts = [
        "does not hold public.p2, below public.outbox",
        "ADD TABLE public.outbox;",
    ];
    tables(&[], Warn, &parts, &each);
    let named = ["-table", "outbox"];
    let all = &[
        apart(parent()),
        apart(below(table(2, "p1", &COLUMNS), true)),
    ];
    tables(
        &named,
        Fail,
        &["ADD TABLE public.outbox;", "publish_via_partition_root"],
        all,
    );
    let own = [apart(parent()), below(table(2, "p1", &COLUMNS), true)];
    tables(
        &["-table", "outbox"],
        Fail,
        &["the partitions of table public.outbox"],
        &own,
    );

    // inheritance: below a parent that is sent, not beside a child
    let child = || apart(below(table(3, "child", &COLUMNS), false));
    let mut base = table(1, "base", &COLUMNS);
    tables(
        &[],
        Fail,
        &["ADD TABLE ONLY public.child;"],
        &[base.clone(), child()],
    );
    base = apart(base);
    let sibling = below(table(2, "sibling", &COLUMNS), false);
    tables(
        &[],
        Warn,
        &["public.base, public.child"],
        &[base, sibling, child()],
    );
}

#[test]
fn exceptions_are_taken_back_one_by_one() {
    let mut facts = facts(&[apart(outbox())]);
    facts.outboxes.version = 190_000;
    *publication(&mut facts) = Publication {
        all_tables: true,
        except: vec!["public.users".into(), "public.outbox".into()],
        ..publication(&mut facts).clone()
    };
    let parts = ["SET ALL TABLES EXCEPT (TABLE public.users);"];
    check(&[], &facts, &[(Level::Fail, TABLES, &parts)]);
    publication(&mut facts).except.remove(0);
    check(&[], &facts, &[(Level::Fail, TABLES, &["SET ALL TABLES;"])]);
}

#[test]
fn headers_are_json() {
    use Level::{Fail, Warn};
    let meta = |kind: &str| {
        let mut table = table(10, "outbox", &[&COLUMNS[..], &["headers"]].concat());
        table.columns[4].kind = kind.into();
        facts(&[table])
    };
    const NAME: &str = "postgres.headers_column";
    check(&[], &meta("jsonb"), &[]);
    check(
        &[],
        &meta("text"),
        &[(Warn, NAME, &["TYPE jsonb USING headers::jsonb;"])],
    );
    let args = ["-headers-column", "headers"];
    check(&args, &meta("hstore"), &[(Fail, NAME, &["TYPE jsonb"])]);
}

#[test]
fn copies_ids_and_partitions_that_rows_leave() {
    use Level::Warn;
    let copy = table(11, "outbox_backup", &COLUMNS);
    let parts = [
        "public.outbox_backup looks like a kept copy",
        "-table public.outbox",
    ];
    check(
        &[],
        &facts(&[outbox(), copy.clone()]),
        &[(Warn, "postgres.copies", &parts)],
    );
    check(
        &["-table", "outbox,outbox_backup"],
        &facts(&[outbox(), copy]),
        &[],
    );
    let mut loose = table(11, "kept", &COLUMNS);
    loose.columns.iter_mut().for_each(|it| it.not_null = false);
    check(
        &[],
        &facts(&[outbox(), loose]),
        &[(Warn, "postgres.copies", &["public.kept"])],
    );

    let counted = |oid, name: &str, sequence: &str| {
        let mut table = table(oid, name, &COLUMNS);
        table.columns[0].kind = "bigint".into();
        table.columns[0].sequence = Some(sequence.into());
        table
    };
    let one = counted(10, "outbox", "s1");
    check(
        &[],
        &facts(&[one.clone(), counted(11, "letters", "s1")]),
        &[],
    );
    let parts = [
        "setval('s1', GREATEST(nextval('s1'), nextval('s2')))",
        "SET DEFAULT nextval('s1');",
    ];
    check(
        &[],
        &facts(&[one, counted(11, "letters", "s2")]),
        &[(Warn, "postgres.ids", &parts)],
    );

    let mut parted = parent();
    parted.key = Some(Key {
        text: "LIST (state)".into(),
        columns: vec!["state".into()],
        moves: true,
        kept: false,
    });
    let parts = [
        "LIST (state)",
        "WHEN (ROW(OLD.state) IS DISTINCT FROM ROW(NEW.state))",
    ];
    check(
        &[],
        &facts(&[parted.clone()]),
        &[(Warn, "postgres.partition_moves", &parts)],
    );
    let with = |change: &dyn Fn(&mut Key)| {
        let mut parted = parted.clone();
        change(parted.key.as_mut().unwrap());
        facts(&[parted])
    };
    check(&[], &with(&|key| key.moves = false), &[]);
    check(&[], &with(&|key| key.kept = true), &[]);
    check(
        &[],
        &with(&|key| key.columns = vec!["aggregatetype".into()]),
        &[],
    );
}

#[test]
fn a_copy_is_known_by_its_name() {
    for (name, expected) in [
        ("outbox_old", true),
        ("outbox_backup", true),
        ("outbox_backup_2", true),
        ("outbox_bak2", true),
        ("outbox_2026_11_29", true),
        ("outbox20261129", true),
        ("outbox_v1", true),
        ("outbox_Old", true),
        ("outbox", false),
        ("outbox_1", false),
        ("outbox10", false),
        ("outbox_billing", false),
        ("outbox_folder", false),
        ("old_outbox", false),
    ] {
        assert_eq!(is_copy_of(name, "outbox"), expected, "{name}");
    }
}

/// Partitions whose rows come by the name of the root are no outboxes of their own, whatever they are called.
#[test]
fn rows_are_relayed_by_the_name_by_which_they_come() {
    let leaf = |via| Table {
        via: Some(via),
        ..below(table(2, "outbox_1", &COLUMNS), true)
    };
    let config = config(&["-table", "outbox*"]);
    let count = |leaf: Table| relayed(&[parent(), leaf], &config).count();
    assert_eq!((count(leaf(1)), count(leaf(2))), (1, 2));
}
