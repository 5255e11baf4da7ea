//! The publication over time: what it publishes, and whether that has become less.
//!
//! Postgres leaves the rows of a publication that was dropped, made anew or narrowed out of the replication
//! stream without a word (18 says it in a notice), and it reads the log with the catalog of the time it was
//! written, so that they stay out when it is sent again. What is seen here can therefore not be mended by the
//! relay; it halts, so that a person learns of it before more is lost. Growing is fine.
//!
//! [`Published`] and its comparison are pure; [`read`] asks the catalog, [`Watch`] asks again while a session
//! runs. Sources: <https://www.postgresql.org/docs/current/catalog-pg-publication.html>,
//! <https://www.postgresql.org/docs/current/catalog-pg-publication-rel.html>.

use super::checkpoint::store::SeenPublication;
use super::slot_wal::SlotWalSeen;
use crate::config::Config;
use crate::outbox::mapping::Mapping;
use crate::postgres::connection::{Rows, quote_literal};
use crate::postgres::{self, ConnInfo, Connection};
use crossbeam_channel::{Receiver, Sender, bounded, never};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

/// How often a running session looks: so much later a change is seen at most, and a look costs Postgres one
/// short session.
pub const WATCH_INTERVAL: Duration = Duration::from_secs(10);
/// A look is no reason to wait long: there is another one soon.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// A publication of more outboxes is remembered without them: the checkpoint is written each second.
const MAX_REMEMBERED_TABLES: usize = 500;

/// `pubviaroot` came with it.
const VIA_ROOT: u32 = 130_000;
/// Row filters, column lists and schemas came with it.
const FILTERS: u32 = 150_000;

/// What a publication publishes, as far as it concerns the relay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// `pg_publication.oid`: another one under the same name is another publication.
    oid: u32,
    inserts: bool,
    all_tables: bool,
    via_root: bool,
    /// The tables that it names.
    tables: Vec<Table>,
    /// The schemas that it names.
    schemas: Vec<Schema>,
    /// Of the tables that it used to publish, those that exist, published or not.
    #[serde(skip)]
    existing: Vec<Table>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Table {
    oid: u32,
    schema: String,
    name: String,
    /// The row filter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    filter: Option<String>,
    /// The column list, as attribute numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<String>,
    /// The relay relays it.
    #[serde(skip, default = "remembered")]
    relayed: bool,
    /// When it was last seen it had another name, by which the relay does not relay it: its rows of that time come so.
    #[serde(skip)]
    was_left_out: bool,
}

/// No other table is written down.
fn remembered() -> bool {
    true
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Schema {
    oid: u32,
    name: String,
}

/// What a publication lacks that it had before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Narrowed {
    /// There is none of that name.
    Dropped,
    /// It is another one: there was none in between.
    MadeAnew,
    /// It publishes no inserts.
    NoInserts,
    /// It was for all tables.
    NotAllTables,
    /// `publish_via_partition_root` has changed, and with it the names of the tables.
    ViaRoot,
    /// A schema is not published.
    Schema(String),
    /// A table is not published.
    Table(String),
    /// A table was dropped and made anew: for a while the new one was not published.
    TableMadeAnew(String),
    /// A table has another name, and one of the two is not relayed.
    Renamed {
        /// What it was called.
        was: String,
        /// What it is called.
        now: String,
    },
    /// A table has a row filter that it had not.
    Filter(String),
    /// Columns of a table are left out.
    Columns(String),
}

impl fmt::Display for Narrowed {
    /// Goes on after the publication's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Narrowed::Dropped => f.write_str("was dropped"),
            Narrowed::MadeAnew => f.write_str("was dropped and made anew"),
            Narrowed::NoInserts => f.write_str("does not publish inserts any more"),
            Narrowed::NotAllTables => f.write_str("is not for all tables any more"),
            Narrowed::ViaRoot => f.write_str(
                "names partitions in another way than before (publish_via_partition_root)",
            ),
            Narrowed::Schema(schema) => {
                write!(f, "does not publish the tables of schema {schema} any more")
            }
            Narrowed::Table(table) => write!(f, "does not publish {table} any more"),
            Narrowed::TableMadeAnew(table) => {
                write!(f, "has a table {table} that was dropped and made anew")
            }
            Narrowed::Renamed { was, now } => write!(
                f,
                "has a table {was} that is called {now} now, and not both are named by -table"
            ),
            Narrowed::Filter(table) => {
                write!(f, "has a row filter for {table} that it had not before")
            }
            Narrowed::Columns(table) => {
                write!(f, "leaves out columns of {table} that it published before")
            }
        }
    }
}

impl Published {
    /// What `now` lacks. Tables that the relay does not relay do not count, nor do those that were dropped.
    pub fn narrowed_to(&self, now: Option<&Published>) -> Option<Narrowed> {
        let Some(now) = now else {
            return Some(Narrowed::Dropped);
        };
        if now.oid != self.oid {
            return Some(Narrowed::MadeAnew);
        }
        if self.inserts && !now.inserts {
            return Some(Narrowed::NoInserts);
        }
        if now.via_root != self.via_root {
            return Some(Narrowed::ViaRoot);
        }
        if now.all_tables {
            return None;
        }
        if self.all_tables {
            return Some(Narrowed::NotAllTables);
        }
        let schema_gone = |schema: &&Schema| now.schemas.iter().all(|s| s.oid != schema.oid);
        if let Some(schema) = self.schemas.iter().find(schema_gone) {
            return Some(Narrowed::Schema(schema.name.clone()));
        }
        let mut relayed = self.tables.iter().filter(|table| table.relayed);
        relayed.find_map(|table| table.narrowed_in(now))
    }

    /// For the checkpoint.
    pub fn to_text(&self) -> String {
        let mut relayed = self.clone();
        relayed.tables.retain(|table| table.relayed);
        if relayed.tables.len() > MAX_REMEMBERED_TABLES {
            relayed.tables.clear();
        }
        serde_json::to_string(&relayed).expect("numbers and strings have a JSON form")
    }

    /// From the checkpoint; `None` if another release wrote it in another form.
    pub fn from_text(text: &str) -> Option<Published> {
        serde_json::from_str(text).ok()
    }
}

impl Table {
    fn narrowed_in(&self, now: &Published) -> Option<Narrowed> {
        let label = || self.label();
        let named_alike = |other: &Table| other.schema == self.schema && other.name == self.name;
        if let Some(table) = now.tables.iter().find(|table| table.oid == self.oid) {
            return if !named_alike(table) && (!table.relayed || table.was_left_out) {
                Some(Narrowed::Renamed {
                    was: label(),
                    now: table.label(),
                })
            } else if table.filter.is_some() && table.filter != self.filter {
                Some(Narrowed::Filter(label()))
            } else if !table.has_columns_of(self) {
                Some(Narrowed::Columns(label()))
            } else {
                None
            };
        }
        if now.tables.iter().any(named_alike) {
            return Some(Narrowed::TableMadeAnew(label()));
        }
        let by_schema = now.schemas.iter().any(|schema| schema.name == self.schema);
        let mut existing = now.existing.iter();
        let exists = existing.any(|table| table.oid == self.oid || named_alike(table));
        (exists && !by_schema).then(|| Narrowed::Table(label()))
    }

    fn label(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }

    fn has_columns_of(&self, before: &Table) -> bool {
        match (&self.columns, &before.columns) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(now), Some(before)) => {
                let has = |wanted| now.split(' ').any(|column| column == wanted);
                before.split(' ').all(has)
            }
        }
    }
}

/// Reads what `publication` publishes; `None` if there is none. `mapping` tells which tables are relayed. `before`:
/// what it published when it was last read.
pub fn read(
    connection: &mut Connection,
    publication: &str,
    mapping: &Mapping,
    before: Option<&Published>,
) -> Result<Option<Published>, postgres::Error> {
    let columns = mapping.default.needed_columns();
    let version = connection.server_version_num();
    let start = Instant::now();
    let mut rows = Rows::new();
    for sql in statements(version, publication, &columns, before) {
        let left = LOOK_LIMIT.saturating_sub(start.elapsed());
        rows.extend(connection.simple_query_within(&sql, left)?);
    }
    Ok(parse(&rows, mapping, before))
}

/// Statements whose rows begin with a word that says what they are. Each goes in a message of its own: until 14.2, 13.6
/// and 12.10 a walsender refuses several in one.
fn statements(
    server_version_num: u32,
    publication: &str,
    needed: &[&str],
    before: Option<&Published>,
) -> Vec<String> {
    let count = needed.len();
    let needed: Vec<String> = needed.iter().map(|column| quote_literal(column)).collect();
    let needed = needed.join(", ");
    let name = quote_literal(publication);
    let since = |version, column| match server_version_num >= version {
        true => column,
        false => "NULL",
    };
    let (via_root, filter, columns) = (
        since(VIA_ROOT, "pubviaroot"),
        since(FILTERS, "pg_catalog.pg_get_expr(r.prqual, r.prrelid)"),
        since(FILTERS, "r.prattrs"),
    );
    let mut statements = vec![
        format!(
            "SELECT 'publication', oid, pubinsert, puballtables, {via_root} FROM pg_catalog.pg_publication WHERE pubname = {name}"
        ),
        format!(
            "SELECT 'table', c.oid, n.nspname, c.relname, {filter}, {columns},
             (SELECT count(*) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped
              AND a.attname IN ({needed})) = {count}
         FROM pg_catalog.pg_publication p JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid
         JOIN pg_catalog.pg_class c ON c.oid = r.prrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE p.pubname = {name} ORDER BY c.oid"
        ),
    ];
    if server_version_num >= FILTERS {
        statements.push(format!(
            "SELECT 'schema', n.oid, n.nspname FROM pg_catalog.pg_publication p
             JOIN pg_catalog.pg_publication_namespace s ON s.pnpubid = p.oid JOIN pg_catalog.pg_namespace n ON n.oid = s.pnnspid
             WHERE p.pubname = {name} ORDER BY n.oid"
        ));
    }
    let (mut oids, mut names) = (Vec::new(), Vec::new());
    for table in before.iter().flat_map(|before| &before.tables) {
        oids.push(table.oid.to_string());
        let (schema, name) = (quote_literal(&table.schema), quote_literal(&table.name));
        names.push(format!("({schema}, {name})"));
    }
    if !oids.is_empty() {
        statements.push(format!(
            "SELECT 'existing', c.oid, n.nspname, c.relname FROM pg_catalog.pg_class c
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.oid IN ({}) OR (n.nspname, c.relname) IN ({})",
            oids.join(", "),
            names.join(", ")
        ));
    }
    statements
}

fn parse(rows: &Rows, mapping: &Mapping, before: Option<&Published>) -> Option<Published> {
    let was_left_out = |oid| {
        let mut tables = before.iter().flat_map(|before| &before.tables);
        let was = tables.find(|table| table.oid == oid);
        was.is_some_and(|was| mapping.of_table(&was.schema, &was.name).is_none())
    };
    let mut published = None;
    let (mut tables, mut schemas, mut existing) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let cell = |index: usize| row.get(index).and_then(|cell| cell.as_deref());
        let text = |index: usize| cell(index).unwrap_or_default().to_string();
        let is = |index: usize| cell(index) == Some("t");
        let oid = cell(1).and_then(|oid| oid.parse().ok()).unwrap_or(0);
        match cell(0) {
            Some("publication") => {
                published = Some(Published {
                    oid,
                    inserts: is(2),
                    all_tables: is(3),
                    via_root: is(4),
                    ..Published::default()
                });
            }
            Some("table") => {
                let (schema, name) = (text(2), text(3));
                tables.push(Table {
                    oid,
                    filter: cell(4).map(str::to_string),
                    columns: cell(5).map(str::to_string),
                    relayed: match mapping.tables.is_empty() {
                        true => is(6),
                        false => mapping.of_table(&schema, &name).is_some(),
                    },
                    was_left_out: was_left_out(oid),
                    schema,
                    name,
                });
            }
            Some("schema") => schemas.push(Schema { oid, name: text(2) }),
            _ => existing.push(Table {
                oid,
                schema: text(2),
                name: text(3),
                ..Table::default()
            }),
        }
    }
    Some(Published {
        tables,
        schemas,
        existing,
        ..published?
    })
}

/// Looks again while a session runs. A thread of its own does, since a server that does not answer may hold it
/// up for as long as a connect takes; it borrows nothing, so that nobody has to wait for its end.
#[derive(Debug)]
pub struct Watch {
    published: Published,
    seen: SeenPublication,
    asks: Sender<Published>,
    looks: Receiver<Option<Published>>,
}

impl Watch {
    /// Begins with what the session's own connection, to the server `peer`, has read, and tells `seen` of more.
    pub fn new(
        config: &Config,
        peer: &str,
        published: Published,
        seen: SeenPublication,
        slot_wal: SlotWalSeen,
    ) -> Watch {
        let (asks, asked) = bounded::<Published>(1);
        let (found, looks) = bounded(1);
        let look = Look {
            db: config.db.without_replication(),
            peer: peer.to_string(),
            publication: config.publication.clone(),
            mapping: config.mapping.clone(),
            slot: config.slot.clone(),
            slot_wal,
        };
        let answer = move || {
            let mut failures = 0;
            for before in asked {
                match look.run(&before) {
                    Ok(now) => {
                        failures = 0;
                        if found.send(now).is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        failures += 1;
                        // the first may be an outage, which the session tells of itself
                        match failures {
                            2 => {
                                log::warn!(cause:% = error; "cannot look whether the publication is still the same; trying again");
                            }
                            _ => log::debug!(cause:% = error; "cannot look at the publication"),
                        }
                    }
                }
            }
        };
        thread::Builder::new()
            .name("watch".to_string())
            .spawn(answer)
            .expect("the system grants a thread, or the relay cannot work at all");
        Watch {
            published,
            seen,
            asks,
            looks,
        }
    }

    /// Asks for a look; while one is under way it is the one.
    pub fn ask(&self) {
        let _ = self.asks.try_send(self.published.clone());
    }

    /// Looks as they come, for a `select!`; each is for [`Watch::take`].
    pub fn looks(&self) -> &Receiver<Option<Published>> {
        &self.looks
    }

    /// There are no more looks: the thread has panicked, as the log says.
    pub fn end(&mut self) {
        self.looks = never();
    }

    /// What a look found: less than before, or perhaps more, which counts from now on.
    pub fn take(&mut self, now: Option<Published>) -> Result<(), Narrowed> {
        if let Some(narrowed) = self.published.narrowed_to(now.as_ref()) {
            return Err(narrowed);
        }
        if let Some(now) = now {
            self.seen.set(Some(now.to_text()));
            self.published = now;
        }
        Ok(())
    }

    /// The last that was seen.
    pub fn into_published(self) -> Published {
        self.published
    }
}

/// One look by a connection of its own. It is not kept: Postgres would wait for it in a smart shutdown.
struct Look {
    db: ConnInfo,
    peer: String,
    publication: String,
    mapping: Mapping,
    slot: String,
    slot_wal: SlotWalSeen,
}

impl Look {
    fn run(&self, before: &Published) -> Result<Option<Published>, postgres::Error> {
        let mut connection = Connection::connect(&self.db)?;
        if connection.peer() != self.peer {
            // of several hosts another one, which may be behind: it proves nothing
            return Ok(Some(before.clone()));
        }
        self.slot_wal.look(&mut connection, &self.slot);
        read(
            &mut connection,
            &self.publication,
            &self.mapping,
            Some(before),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::mapping::{NamedTable, TableMapping, TableName};

    fn table(oid: u32, name: &str) -> Table {
        Table {
            oid,
            schema: "public".into(),
            name: name.into(),
            relayed: true,
            ..Table::default()
        }
    }

    fn published(tables: &[Table]) -> Published {
        Published {
            oid: 1,
            inserts: true,
            tables: tables.to_vec(),
            ..Published::default()
        }
    }

    fn schemas(schemas: &[(u32, &str)]) -> Published {
        let schema = |(oid, name): &(u32, &str)| Schema {
            oid: *oid,
            name: name.to_string(),
        };
        Published {
            schemas: schemas.iter().map(schema).collect(),
            ..published(&[])
        }
    }

    #[track_caller]
    fn check(before: &Published, now: Published, expected: Option<Narrowed>) {
        assert_eq!(
            before.narrowed_to(Some(&now)),
            expected,
            "{before:?}\n{now:?}"
        );
        let remembered = Published::from_text(&before.to_text()).unwrap();
        assert_eq!(remembered.narrowed_to(Some(&now)), expected, "remembered");
    }

    #[test]
    fn what_is_less_is_named_and_more_is_fine() {
        let outbox = || table(10, "outbox");
        let one = published(&[outbox()]);
        let all = Published {
            all_tables: true,
            ..published(&[])
        };
        let label = || "public.outbox".to_string();
        assert_eq!(one.narrowed_to(None), Some(Narrowed::Dropped));
        check(&one, one.clone(), None);
        check(&one, published(&[table(9, "new"), outbox()]), None);
        check(&one, all.clone(), None);
        check(&all, one.clone(), Some(Narrowed::NotAllTables));
        let anew = Published {
            oid: 2,
            ..one.clone()
        };
        check(&one, anew, Some(Narrowed::MadeAnew));
        let no_inserts = Published {
            inserts: false,
            ..one.clone()
        };
        check(&one, no_inserts.clone(), Some(Narrowed::NoInserts));
        check(&no_inserts, one.clone(), None);
        let via_root = Published {
            via_root: true,
            ..one.clone()
        };
        check(&one, via_root.clone(), Some(Narrowed::ViaRoot));
        check(&via_root, one.clone(), Some(Narrowed::ViaRoot));

        // a table that is left out, dropped, made anew, renamed, or published by its schema
        let exists = |oid| Published {
            existing: vec![table(oid, "outbox")],
            ..published(&[])
        };
        check(&one, exists(10), Some(Narrowed::Table(label())));
        check(&one, exists(11), Some(Narrowed::Table(label())));
        check(&one, published(&[]), None);
        let anew = published(&[table(11, "outbox")]);
        check(&one, anew, Some(Narrowed::TableMadeAnew(label())));
        check(&one, published(&[table(10, "renamed")]), None);
        let renamed = Narrowed::Renamed {
            was: label(),
            now: "public.renamed".into(),
        };
        let left_out = |name| Table {
            relayed: false,
            ..table(10, name)
        };
        let new_only = Table {
            was_left_out: true,
            ..table(10, "renamed")
        };
        check(
            &one,
            published(&[left_out("renamed")]),
            Some(renamed.clone()),
        );
        check(&one, published(&[new_only]), Some(renamed));
        // the operator's own wish
        check(&one, published(&[left_out("outbox")]), None);
        let by_schema = Published {
            existing: vec![outbox()],
            ..schemas(&[(5, "public")])
        };
        check(&one, by_schema, None);

        let gone = Narrowed::Schema("a".into());
        check(
            &schemas(&[(1, "a"), (2, "b")]),
            schemas(&[(2, "b")]),
            Some(gone),
        );
        check(
            &schemas(&[(1, "a")]),
            schemas(&[(1, "renamed"), (2, "b")]),
            None,
        );

        let with = |filter: Option<&str>, columns: Option<&str>| {
            published(&[Table {
                filter: filter.map(str::to_string),
                columns: columns.map(str::to_string),
                ..outbox()
            }])
        };
        let (filtered, cut) = (Narrowed::Filter(label()), Narrowed::Columns(label()));
        check(&one, with(Some("(id > 0)"), None), Some(filtered.clone()));
        check(
            &with(Some("a"), None),
            with(Some("b"), None),
            Some(filtered),
        );
        check(&with(Some("a"), None), with(Some("a"), None), None);
        check(&with(Some("a"), None), one.clone(), None);
        check(&one, with(None, Some("1 2 3 4")), Some(cut.clone()));
        check(
            &with(None, Some("1 2")),
            with(None, Some("1 12")),
            Some(cut),
        );
        check(&with(None, Some("1 2")), with(None, Some("1 2 3")), None);
        check(&with(None, Some("1 2")), one, None);
    }

    #[test]
    fn a_table_that_is_not_relayed_does_not_count() {
        let users = Table {
            relayed: false,
            ..table(20, "users")
        };
        let both = published(&[table(10, "outbox"), users.clone()]);
        let without = Published {
            existing: vec![users],
            ..published(&[table(10, "outbox")])
        };
        check(&both, without, None);
    }

    /// A walsender of 14.1, 13.5 or 12.9 refuses it.
    #[test]
    fn no_message_to_the_server_holds_two_statements() {
        let before = published(&[table(10, "outbox"), table(11, "letters")]);
        for (version, before, count) in [
            (120_000, None, 2),
            (150_000, None, 3),
            (150_000, Some(&published(&[])), 3),
            (150_000, Some(&before), 4),
        ] {
            let found = statements(version, "p", &["id", "payload"], before);
            assert_eq!(found.len(), count, "{found:?}");
            for sql in found {
                assert!(sql.starts_with("SELECT ") && !sql.contains(';'), "{sql}");
            }
        }
    }

    #[test]
    fn rows_of_the_catalog_are_read() {
        let row = |text: &str| {
            let cell = |cell: &str| (cell != "-").then(|| cell.to_string());
            text.split('|').map(cell).collect::<Vec<_>>()
        };
        let rows = vec![
            row("publication|7|t|f|-"),
            row("table|10|public|outbox|(id > 0)|1 2 3 4|t"),
            row("table|11|shop|users|-|-|f"),
            row("schema|5|s"),
            row("existing|10|public|outbox"),
        ];
        let of = |schema: Option<&str>, name: &str| NamedTable {
            table: TableName {
                schema: schema.map(str::to_string),
                name: name.into(),
                and_longer: false,
            },
            mapping: TableMapping::default(),
        };
        for (tables, expected) in [
            (vec![], [true, false]),
            (vec![of(None, "users")], [false, true]),
            (vec![of(Some("shop"), "outbox")], [false, false]),
        ] {
            let mapping = Mapping {
                tables,
                ..Mapping::new("events")
            };
            let found = parse(&rows, &mapping, None).unwrap();
            assert_eq!(
                (found.oid, found.inserts, found.all_tables),
                (7, true, false)
            );
            assert_eq!((found.schemas.len(), found.existing.len()), (1, 1));
            let relayed: Vec<_> = found.tables.iter().map(|table| table.relayed).collect();
            assert_eq!(relayed, expected);
        }
        assert_eq!(parse(&vec![], &Mapping::new("events"), None), None);

        // a table that was called otherwise, by a name that is not given
        let mapping = Mapping {
            tables: vec![of(None, "outbox")],
            ..Mapping::new("events")
        };
        for (was, left_out) in [("outbox", false), ("letters", true)] {
            let before = published(&[table(10, was)]);
            let found = parse(&rows, &mapping, Some(&before)).unwrap();
            let found: Vec<_> = found
                .tables
                .iter()
                .map(|table| table.was_left_out)
                .collect();
            assert_eq!(found, [left_out, false], "{was}");
        }
    }
}
