//! The rules about the publication, by its effect: what is inserted into each outbox has to reach the relay.
//!
//! An *outbox* is a table that `-table` names; without `-table`, one of the publication that has the columns. Whether its rows
//! come is judged by what Postgres really sends ([`super::outboxes`]), not by the statements that led there. What has become
//! of it since the relay last looked is for [`super::publication_state`].

use super::column_types;
use super::moved_rows;
use super::outbox_sql::{
    add_columns, create_publication, create_table, publish_whole, send_generated, share_sequence,
    tables,
};
use super::outboxes::{Column, Outboxes, Table, VIA_ROOT, holes, is_empty};
use super::slot::recreate;
use super::{Facts, Finding, Level, Rule, fail, ok, warn};
use crate::config::Config;
use crate::outbox::mapping::{TableMapping, TableName};
use crate::postgres::identifier::identifier;
use std::collections::BTreeSet;
use std::ops::Bound;

const TABLES: &str = "postgres.tables";
/// Tables that one finding names, and findings that one rule has: a database may have them by the ten thousand.
pub(super) const MOST: usize = 10;

/// What must hold while the relay runs: it halts when one fails.
pub const START: [Rule; 2] = [exists, reached];
/// What else `check` looks at.
pub const RULES: [Rule; 8] = [
    complete,
    ignored,
    column_types::of_headers,
    column_types::of_payload,
    copies,
    repeated_ids,
    moved_rows::by_partitions,
    moved_rows::by_filters,
];

fn exists(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.publication";
    let name = identifier(&config.publication);
    vec![match &facts.outboxes.publication {
        None => fail(
            NAME,
            format!("publication {name} does not exist in this database"),
            "it names the tables whose rows are sent",
            create_all(facts, config),
        ),
        Some(publication) if !publication.inserts => fail(
            NAME,
            format!("publication {name} does not publish inserts"),
            "events are inserts",
            format!("ALTER PUBLICATION {name} SET (publish = 'insert');"),
        ),
        Some(_) => ok(NAME, format!("publication {name} publishes inserts")),
    }]
}

/// Creates the tables that are missing, the publication, and the slot again, which does not see what is younger than itself.
fn create_all(facts: &Facts, config: &Config) -> String {
    let named = config.mapping.tables.iter().map(|it| &it.table);
    let prefixes: Vec<String> = (named.filter(|table| table.and_longer))
        .map(TableName::to_string)
        .collect();
    // of another's slot its own finding speaks
    let slot = facts.slot.as_ref().filter(|slot| slot.could_be_ours());
    let remark = "first see whether it was only renamed: then rename it back (ALTER PUBLICATION ... RENAME TO), and nothing is lost; \
                  a slot does not see a publication that is younger than its events";
    let again = slot.map(|_| recreate(facts, config, remark));
    if !prefixes.is_empty() {
        // which tables there are, setup finds out
        let setup = format!(
            "when there is a table {}: jetstream-outbox setup",
            prefixes.join(", ")
        );
        return match again {
            Some(again) => format!("{setup}; then: {again}"),
            None => setup,
        };
    }
    let (mut fix, mut partitioned) = (String::new(), false);
    for wanted in tables(config) {
        let mut same = (facts.outboxes.tables.iter())
            .filter(|table| wanted.matches(&table.schema, &table.name));
        match same.next() {
            None => fix += &format!("{} ", create_table(config, &wanted)),
            Some(table) => partitioned |= table.kind == 'p',
        }
    }
    let root = partitioned && facts.version >= VIA_ROOT;
    fix += &create_publication(config, &tables(config), root);
    match again {
        Some(again) => format!("{fix} {again}"),
        None => fix,
    }
}

/// How its rows become events, if the relay takes them by this name.
fn mapping_of<'a>(config: &'a Config, table: &Table) -> Option<&'a TableMapping> {
    let mapping = config.mapping.of_table(&table.schema, &table.name)?;
    let has = |column: &str| table.column(column).is_some();
    let cloud_events = config.mapping.cloudevents.is_some();
    let is_outbox = !config.mapping.tables.is_empty()
        || mapping.own_columns().into_iter().any(has)
        || mapping.missing_columns(cloud_events, has).is_empty();
    is_outbox.then_some(mapping)
}

/// The tables of a tree by whose names rows come and become events. A partitioned one without partitions stands for those that
/// will come.
pub(super) fn relayed<'a>(
    tree: &'a [Table],
    config: &'a Config,
) -> impl Iterator<Item = (&'a Table, &'a TableMapping)> {
    let is_empty = is_empty(tree);
    let sent = tree.iter().filter(move |table| {
        table.is_sent_by_name() || is_empty && table.member && table.oid == table.root
    });
    sent.filter_map(|table| Some((table, mapping_of(config, table)?)))
}

/// `-table` names it.
fn is_named(config: &Config, table: &Table) -> bool {
    !config.mapping.tables.is_empty()
        && (config.mapping.of_table(&table.schema, &table.name)).is_some()
}

/// Whether what is inserted into each outbox arrives, whole. All is well where it finds nothing, see [`complete`].
fn reached(facts: &Facts, config: &Config) -> Vec<Finding> {
    let outboxes = &facts.outboxes;
    if outboxes.publication.is_none() {
        return Vec::new();
    }
    let (mut findings, mut apart) = (Vec::new(), Vec::new());
    let all: BTreeSet<(&str, &str)> = (outboxes.trees())
        .flat_map(|tree| relayed(tree, config))
        .map(|(table, _)| (table.schema.as_str(), table.name.as_str()))
        .collect();
    for tree in outboxes.trees() {
        findings.extend(under_other_names(config, tree));
        if relayed(tree, config).next().is_some() {
            findings.extend(not_sent(outboxes, config, tree));
            findings.extend(cut(outboxes, config, tree));
            continue;
        }
        match judge_unreached(outboxes, config, tree, &all) {
            Unreached::Lost(finding) => findings.push(finding),
            Unreached::Apart => apart.push(tree),
            Unreached::Elsewhere => {}
        }
    }
    findings.extend(looks_alike(outboxes, config, &apart));
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    findings.truncate(MOST);
    findings
}

/// A few of them, and how many there are.
pub(super) fn list(names: &[String]) -> String {
    match names.get(..MOST) {
        Some(first) if names.len() > MOST => {
            format!("{} and {} more", first.join(", "), names.len() - MOST)
        }
        _ => names.join(", "),
    }
}

/// Why a tree has nothing that is relayed.
enum Unreached {
    /// It is an outbox of ours.
    Lost(Finding),
    /// It looks like one, and nobody sends its rows.
    Apart,
    /// Another publication does, or it is none.
    Elsewhere,
}

/// `all`: schemas and names of what is relayed.
fn judge_unreached(
    outboxes: &Outboxes,
    config: &Config,
    tree: &[Table],
    all: &BTreeSet<(&str, &str)>,
) -> Unreached {
    let Some(root) = tree.first() else {
        return Unreached::Elsewhere;
    };
    let holes: Vec<&Table> = holes(tree).collect();
    if holes.is_empty() {
        return Unreached::Elsewhere;
    }
    let is_ours = match config.mapping.tables.as_slice() {
        [] if all.is_empty() => root.name == "outbox",
        // what was renamed is still called after it: outbox_old is in the publication, outbox is not
        [] => {
            let name = (root.schema.as_str(), root.name.as_str());
            let next = all.range((Bound::Excluded(name), Bound::Unbounded));
            let mut longer = next.take_while(|it| it.0 == name.0 && it.1.starts_with(name.1));
            longer.any(|it| is_copy_of(it.1, name.1))
        }
        // a name without a schema means any of them, and one that is relayed will do
        named => named.iter().any(|it| {
            let matches = |table: &Table| it.table.matches(&table.schema, &table.name);
            tree.iter().any(matches)
                && (it.table.schema.is_some()
                    || !all
                        .iter()
                        .any(|(schema, name)| it.table.matches(schema, name)))
        }),
    };
    if is_ours && (!root.elsewhere || is_named(config, root)) {
        return Unreached::Lost(hole(outboxes, config, tree, &holes));
    }
    // one that stands alone on another server is that server's
    match root.elsewhere || root.kind == 'f' || !config.mapping.tables.is_empty() {
        true => Unreached::Elsewhere,
        false => Unreached::Apart,
    }
}

/// It is the shorter name and what people add to the name of a copy, or of what a new table replaces.
fn is_copy_of(name: &str, shorter: &str) -> bool {
    const ADDED: [&str; 12] = [
        "old", "backup", "bak", "copy", "archive", "tmp", "temp", "prev", "previous", "save",
        "saved", "orig",
    ];
    let Some(added) = name.strip_prefix(shorter) else {
        return false;
    };
    // outbox_old, outbox_2026_11_29, outbox_backup_2, outbox_v1
    added.to_ascii_lowercase().split('_').any(|word| {
        let letters = word.trim_matches(|c: char| c.is_ascii_digit());
        let digits = word.len() - letters.len();
        ADDED.contains(&letters)
            || letters.is_empty() && digits >= 4
            || letters == "v" && digits > 0
    })
}

/// Tables like an outbox that are in no publication at all.
fn looks_alike(outboxes: &Outboxes, config: &Config, apart: &[&[Table]]) -> Option<Finding> {
    let roots: Vec<&Table> = apart.iter().filter_map(|tree| tree.first()).collect();
    let names: Vec<String> = roots.iter().map(|table| table.sql()).collect();
    let (first, tree) = (roots.first()?, apart.first()?);
    let holes: Vec<&Table> = holes(tree).collect();
    let none = "if it is no outbox of the relay's, name those that are with -table";
    Some(warn(
        TABLES,
        match names.len() {
            1 => format!(
                "table {} looks like an outbox and is in no publication",
                first.sql()
            ),
            _ => format!(
                "tables look like outboxes and are in no publication: {}",
                list(&names)
            ),
        },
        "what is inserted there is never sent",
        format!("{} -- {none}", publish(outboxes, config, tree, &holes)),
    ))
}

/// Members of a tree that hold rows which are not sent, though others of it are.
fn not_sent(outboxes: &Outboxes, config: &Config, tree: &[Table]) -> Option<Finding> {
    let root = tree.first()?;
    let holes: Vec<&Table> = holes(tree).collect();
    if holes.is_empty() {
        return None;
    }
    // in the publication by name, below one that is sent, or below one that was asked for
    let is_ours = |table: &&Table| {
        table.member || root.reaches() || is_named(config, table) || is_named(config, root)
    };
    // a parent whose children alone are published may hold nothing
    let is_parent = |table: &&Table| !table.partition && table.oid == root.oid;
    let ours: Vec<&Table> = (holes.iter().copied())
        .filter(|table| is_ours(table) && (is_named(config, table) || !is_parent(table)))
        .collect();
    Some(match ours.is_empty() {
        false => hole(outboxes, config, tree, &ours),
        true => Finding {
            level: Level::Warn,
            ..hole(outboxes, config, tree, &holes)
        },
    })
}

/// What is inserted into these tables of a tree is not sent.
fn hole(outboxes: &Outboxes, config: &Config, tree: &[Table], holes: &[&Table]) -> Finding {
    let name = identifier(&config.publication);
    let names: Vec<String> = holes.iter().map(|table| table.sql()).collect();
    let names = list(&names);
    let why = "what is inserted there is never sent";
    let is = if holes.len() == 1 { "is" } else { "are" };
    let has = |wanted: fn(&Table) -> bool| holes.iter().any(|table| wanted(table));
    let found = if has(|table| table.unlogged) {
        format!("{names} {is} unlogged, so that no row reaches the WAL")
    } else if has(|table| table.kind == 'f') {
        format!("{names} {is} on another server, as a foreign table")
    } else {
        match tree
            .first()
            .filter(|root| holes.iter().all(|it| it.oid != root.oid))
        {
            Some(root) => format!(
                "publication {name} does not hold {names}, below {}",
                root.sql()
            ),
            None => format!("publication {name} does not hold {names}"),
        }
    };
    fail(TABLES, found, why, publish(outboxes, config, tree, holes))
}

/// Makes what is inserted into these tables of a tree reach the relay.
pub(super) fn publish(
    outboxes: &Outboxes,
    config: &Config,
    tree: &[Table],
    holes: &[&Table],
) -> String {
    let name = identifier(&config.publication);
    let Some((root, publication)) = tree.first().zip(outboxes.publication.as_ref()) else {
        return String::new();
    };
    let mut fix = Vec::new();
    for table in holes.iter().take(MOST) {
        let sql = table.sql();
        match table.kind {
            'f' if table.partition => {
                fix.push(format!(
                    "ALTER TABLE {} DETACH PARTITION {sql};",
                    root.sql()
                ));
            }
            'f' => fix.push(format!(
                "DROP FOREIGN TABLE {sql}; -- and create it in this database"
            )),
            _ if table.unlogged => fix.push(format!("ALTER TABLE {sql} SET LOGGED;")),
            _ => {}
        }
    }
    let outside = || {
        holes
            .iter()
            .filter(|table| !table.member && table.kind != 'f')
    };
    let by_root = root.kind == 'p' && outboxes.version >= VIA_ROOT;
    if publication.all_tables {
        let left_out =
            |name: &&String| !outside().any(|table| table.sql() == **name) && root.sql() != **name;
        let rest: Vec<&str> = publication
            .except
            .iter()
            .filter(left_out)
            .map(String::as_str)
            .collect();
        if rest.len() < publication.except.len() {
            fix.push(match rest.is_empty() {
                true => format!("ALTER PUBLICATION {name} SET ALL TABLES;"),
                false => format!(
                    "ALTER PUBLICATION {name} SET ALL TABLES EXCEPT (TABLE {});",
                    rest.join(", ")
                ),
            });
        }
    } else if by_root && outside().next().is_some() {
        fix.push(format!(
            "ALTER PUBLICATION {name} ADD TABLE {};",
            root.sql()
        ));
    } else {
        let only = if tree.len() > 1 && root.kind != 'p' {
            "ONLY "
        } else {
            ""
        };
        let add =
            |table: &&Table| format!("ALTER PUBLICATION {name} ADD TABLE {only}{};", table.sql());
        fix.extend(outside().take(MOST).map(add));
    }
    let is_missed = |table: &&&Table| !is_named(config, table);
    if is_named(config, root) && holes.iter().any(|table| is_missed(&table)) {
        match by_root && !publication.via_root {
            true => fix.push(via_root(&name)),
            false if by_root => {}
            false => fix.push(format!(
                "-- and add to -table: {}",
                list_missed(config, holes)
            )),
        }
    }
    fix.join(" ")
}

fn list_missed(config: &Config, tables: &[&Table]) -> String {
    let missed = tables.iter().filter(|table| !is_named(config, table));
    let names: Vec<String> = missed
        .map(|table| format!("{}.{}", table.schema, table.name))
        .collect();
    names.join(",")
}

fn via_root(publication: &str) -> String {
    format!("ALTER PUBLICATION {publication} SET (publish_via_partition_root = true);")
}

/// Rows of a tree that come by names which `-table` does not have, though it has that of the tree, or of the table that they are in.
fn under_other_names(config: &Config, tree: &[Table]) -> Option<Finding> {
    let name = identifier(&config.publication);
    let root = tree.first()?;
    let is_meant = |sender: &Table| {
        let mut members = tree.iter().filter(|table| is_named(config, table));
        members.any(|table| table.oid == root.oid || table.via == Some(sender.oid))
    };
    let sent = tree.iter().filter(|table| table.is_sent_by_name());
    let missed: Vec<&Table> = sent
        .filter(|table| !is_named(config, table) && is_meant(table))
        .collect();
    let Some(first) = missed.first() else {
        return partitions_to_come(config, tree, root);
    };
    let list = || format!("add to -table: {}", list_missed(config, &missed));
    // whose rows come under its name already
    let has_own_partitions =
        (tree.iter()).any(|it| it.oid != first.oid && it.via == Some(first.oid));
    let (found, fix) = if first.oid == root.oid {
        let found = format!(
            "publication {name} holds partitions of table {} under its name",
            root.sql()
        );
        (found, list())
    } else if first.partition && !has_own_partitions {
        (
            format!(
                "publication {name} holds the partitions of table {} under their own names",
                root.sql()
            ),
            via_root(&name),
        )
    } else {
        let found = format!(
            "publication {name} holds the children of table {} under their own names",
            root.sql()
        );
        (found, list())
    };
    let why = "-table does not name them, so their rows are ignored";
    Some(fail(TABLES, found, why, fix))
}

/// There is no partition yet, and one that comes may have a name that `-table` has not.
fn partitions_to_come(config: &Config, tree: &[Table], root: &Table) -> Option<Finding> {
    let mut named = config.mapping.tables.iter().map(|it| &it.table);
    let is_named = named.any(|it| !it.and_longer && it.matches(&root.schema, &root.name));
    if !is_named || !is_empty(tree) || root.kind != 'p' || !root.member || root.is_sent_by_name() {
        return None;
    }
    let name = identifier(&config.publication);
    Some(warn(
        TABLES,
        format!(
            "table {} has no partition yet, and publication {name} will hold those that come under their own names",
            root.sql()
        ),
        "the rows of one that -table does not name are ignored",
        via_root(&name),
    ))
}

/// What is left out of the rows of a tree: columns, or rows by a filter. The first of each, as partitions are alike.
fn cut(outboxes: &Outboxes, config: &Config, tree: &[Table]) -> Vec<Finding> {
    let unsent = relayed(tree, config)
        .find_map(|(table, mapping)| unsent(outboxes, config, tree, table, mapping));
    let filtered = relayed(tree, config).find_map(|(table, _)| {
        let (filter, name) = (table.filter.as_ref()?, identifier(&config.publication));
        Some(warn(
            TABLES,
            format!(
                "publication {name} has a row filter for {}: {filter}",
                table.sql()
            ),
            "rows that it leaves out are never published",
            publish_whole(&config.publication, table),
        ))
    });
    unsent.into_iter().chain(filtered).collect()
}

const STOPS: &str = "the relay stops at its first row";

/// Columns of an event that the table has and the publication does not send.
fn unsent(
    outboxes: &Outboxes,
    config: &Config,
    tree: &[Table],
    table: &Table,
    mapping: &TableMapping,
) -> Option<Finding> {
    let cloud_events = config.mapping.cloudevents.is_some();
    // one that the table has not is not left out
    let is_unsent = |name: &str| table.column(name).is_some_and(|column| !column.sent);
    let needed = mapping.missing_columns(cloud_events, |name| !is_unsent(name));
    let mut optional = mapping.optional_columns();
    optional.retain(|name| is_unsent(name));
    let names: Vec<&str> = match needed.is_empty() {
        true => optional,
        false => needed.iter().map(String::as_str).collect(),
    };
    let columns: Vec<&Column> = names.iter().filter_map(|name| table.column(name)).collect();
    if columns.is_empty() {
        return None;
    }
    let text = table.sql();
    let generated = columns.iter().find(|column| !column.generated.is_empty());
    let (found, fix) = match generated {
        Some(column) => {
            let listed = table.listed.then_some(table);
            let whole = whole(tree, table);
            (
                format!(
                    "column {} of table {text} is generated, and the publication does not send it",
                    identifier(&column.name)
                ),
                send_generated(outboxes.version, &config.publication, whole, column, listed),
            )
        }
        None => (
            format!("table {text} is published without {}", names.join(", ")),
            publish_whole(&config.publication, table),
        ),
    };
    Some(match needed.is_empty() {
        false => fail(TABLES, found, STOPS, fix),
        true => warn(TABLES, found, "its events lack what that column says", fix),
    })
}

/// The table whose columns those of a partition are.
pub(super) fn whole<'a>(tree: &'a [Table], table: &'a Table) -> &'a Table {
    tree.first().filter(|_| table.partition).unwrap_or(table)
}

/// What is to be relayed is there, with all its columns. The relay starts without: rows of before a column was renamed are
/// still to come, and where there is no table nothing is lost.
fn complete(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut findings = missing(facts, config);
    let cloud_events = config.mapping.cloudevents.is_some();
    let mut held = Vec::new();
    for tree in facts.outboxes.trees() {
        let mut absent = None;
        for (table, mapping) in relayed(tree, config) {
            held.push(table.sql());
            let columns =
                mapping.missing_columns(cloud_events, |name| table.column(name).is_some());
            if !columns.is_empty() {
                // partitions are alike
                absent.get_or_insert((table, columns));
            }
        }
        if let Some((table, columns)) = absent
            && findings.len() < MOST
        {
            findings.push(fail(
                TABLES,
                format!("table {} has no column {}", table.sql(), columns.join(", ")),
                STOPS,
                format!(
                    "{} -- or name the columns that it has with -table, -subject, -header or the flags of columns; if it is no \
                     outbox, name those that are with -table",
                    add_columns(config, &whole(tree, table).label(), &columns)
                ),
            ));
        }
    }
    if findings.is_empty() && !held.is_empty() && reached(facts, config).is_empty() {
        let name = identifier(&config.publication);
        findings.push(ok(
            TABLES,
            format!("publication {name} holds {}", list(&held)),
        ));
    }
    findings
}

/// What `-table` names, or the outbox of a database without any, and there is none.
fn missing(facts: &Facts, config: &Config) -> Vec<Finding> {
    const WHY: &str = "there is nothing to relay";
    let outboxes = &facts.outboxes;
    let Some(publication) = &outboxes.publication else {
        return Vec::new();
    };
    let name = identifier(&config.publication);
    let any_relayed = outboxes
        .trees()
        .any(|tree| relayed(tree, config).next().is_some());
    if config.mapping.tables.is_empty() && any_relayed {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for wanted in tables(config) {
        let mut same =
            (outboxes.tables.iter()).filter(|table| wanted.matches(&table.schema, &table.name));
        let sql = wanted.sql();
        let add = match publication.all_tables {
            true => String::new(),
            false => format!(" ALTER PUBLICATION {name} ADD TABLE {sql};"),
        };
        match same.next() {
            None => findings.push(fail(
                TABLES,
                format!("table {sql} does not exist in this database"),
                WHY,
                format!(
                    "{}{add} -- or correct -table or -db",
                    create_table(config, &wanted)
                ),
            )),
            Some(table) if matches!(table.kind, 'v' | 'm') => findings.push(fail(
                TABLES,
                format!("{sql} is a view"),
                "a publication sends the rows of tables alone",
                format!("-table {}", table.reads.as_deref().unwrap_or_default()),
            )),
            Some(table)
                if config.mapping.tables.is_empty() && mapping_of(config, table).is_none() =>
            {
                findings.push(fail(
                    TABLES,
                    format!("publication {name} holds no table with the columns of an outbox"),
                    WHY,
                    format!("name the columns of {sql} with the flags, or pass -table"),
                ));
            }
            Some(_) => {}
        }
    }
    for named in config
        .mapping
        .tables
        .iter()
        .filter(|it| it.table.and_longer)
    {
        let matches = |table: &Table| named.table.matches(&table.schema, &table.name);
        if !outboxes.tables.iter().any(matches) {
            findings.push(fail(
                TABLES,
                format!("publication {name} holds no table {}", named.table),
                WHY,
                format!("ALTER PUBLICATION {name} ADD TABLE ...; -- each of them"),
            ));
        }
    }
    findings
}

/// Tables that somebody has put into the publication, and whose rows become no events.
fn ignored(facts: &Facts, config: &Config) -> Vec<Finding> {
    let outboxes = &facts.outboxes;
    let Some(publication) = &outboxes.publication else {
        return Vec::new();
    };
    // one that is partitioned stands for its partitions
    let taken: BTreeSet<u32> = (outboxes.trees())
        .filter(|tree| relayed(tree, config).next().is_some())
        .flat_map(|tree| tree.iter().map(|table| table.oid))
        .collect();
    let left = (publication.named.iter()).filter(|(oid, _)| !taken.contains(oid));
    let names: Vec<String> = left.map(|(_, name)| name.clone()).collect();
    // where nothing is relayed that is what has to be said
    let (Some(first), false) = (names.first(), taken.is_empty()) else {
        return Vec::new();
    };
    let name = identifier(&config.publication);
    vec![warn(
        TABLES,
        format!(
            "publication {name} holds {}, which the relay ignores",
            list(&names)
        ),
        "what is inserted there is sent to the relay, and becomes no event",
        format!(
            "add it to -table with its columns, {first}:id=...,payload=... (and all others, if -table was not given); or take it \
             out, if its rows are no events (ALTER PUBLICATION {name} DROP TABLE {})",
            names.join(", ")
        ),
    )]
}

/// One table of each tree that is relayed.
fn outboxes<'a>(
    facts: &'a Facts,
    config: &'a Config,
) -> impl Iterator<Item = (&'a Table, &'a TableMapping)> {
    (facts.outboxes.trees()).filter_map(|tree| {
        let (table, mapping) = relayed(tree, config).next()?;
        Some((
            tree.first()
                .filter(|root| !root.columns.is_empty())
                .unwrap_or(table),
            mapping,
        ))
    })
}

/// Copies of an outbox that were kept, and are relayed as well.
fn copies(facts: &Facts, config: &Config) -> Vec<Finding> {
    let all: Vec<(&Table, &Column)> = outboxes(facts, config)
        .filter_map(|(table, mapping)| Some((table, table.column(&mapping.id)?)))
        .collect();
    // those that are named are meant
    if !config.mapping.tables.is_empty() || all.len() > MOST * MOST {
        return Vec::new();
    }
    let is_copy = |(copy, id): &(&Table, &Column)| {
        all.iter().any(|(other, other_id)| {
            other.schema == copy.schema
                // CREATE TABLE … AS leaves constraints behind
                && (is_copy_of(&copy.name, &other.name) || other_id.not_null && !id.not_null)
        })
    };
    let (copied, kept): (Vec<_>, Vec<_>) = all.iter().partition(|it| is_copy(it));
    let name = |(table, _): &(&Table, &Column)| table.sql();
    let copied: Vec<String> = copied.iter().map(name).collect();
    let kept: Vec<String> = kept
        .iter()
        .map(|(table, _)| format!("{}.{}", table.schema, table.name))
        .collect();
    match copied.is_empty() {
        true => Vec::new(),
        false => vec![warn(
            "postgres.copies",
            format!(
                "{} looks like a kept copy of an outbox, and is relayed too",
                list(&copied)
            ),
            "rows that are copied there are published once more",
            format!("-table {}", kept.join(",")),
        )],
    }
}

/// JetStream takes two events of one id for one.
fn repeated_ids(facts: &Facts, config: &Config) -> Vec<Finding> {
    let counted: Vec<(&Table, &Column)> = outboxes(facts, config)
        .filter_map(|(table, mapping)| Some((table, table.column(&mapping.id)?)))
        .filter(|(_, id)| matches!(id.kind.as_str(), "smallint" | "integer" | "bigint"))
        .collect();
    let Some((_, first)) = counted.first() else {
        return Vec::new();
    };
    let shared =
        first.sequence.is_some() && counted.iter().all(|(_, id)| id.sequence == first.sequence);
    if counted.len() < 2 || shared {
        return Vec::new();
    }
    let names: Vec<String> = counted.iter().map(|(table, _)| table.sql()).collect();
    let fix = share_sequence(&counted).filter(|_| counted.len() <= MOST);
    vec![warn(
        "postgres.ids",
        format!(
            "the ids of {} are numbers that each table counts for itself",
            list(&names)
        ),
        "an id that another table has used within the deduplication window is dropped as a duplicate",
        fix.unwrap_or_else(|| "use ids of type uuid, or one sequence for all of them".into()),
    )]
}

#[cfg(test)]
pub(super) mod tests;
