//! What is read of the outboxes in a real server's catalog, table by table: the facts that the rules about the publication judge.

use crate::support::postgres::Postgres;
use jetstream_outbox::cli::{self, Invocation};
use jetstream_outbox::config::Config;
use jetstream_outbox::postgres::{ConnInfo, Connection};
use jetstream_outbox::relay::preflight::outboxes::{self, Column, Outboxes, Table};
use std::ffi::OsString;

const COLUMNS: &str = "id uuid NOT NULL, aggregatetype text, aggregateid text, payload jsonb";

/// A database, and what is to be read of it.
struct Scene {
    /// `{columns}` stands for [`COLUMNS`].
    sql: &'static [&'static str],
    flags: &'static [&'static str],
    /// Tables that a relay remembers.
    remembered: &'static [&'static str],
    /// A line a table: see [`line`].
    expected: &'static [&'static str],
}

const SCENES: &[Scene] = &[
    // which tables are looked at
    Scene {
        sql: &[
            "CREATE TABLE whole ({columns}); CREATE TABLE part (id int, aggregateid text); CREATE TABLE line (id int, aggregateid text)",
            "CREATE SCHEMA s; CREATE TABLE s.outbox (n int)",
            "CREATE SCHEMA v; CREATE VIEW v.outbox AS SELECT * FROM whole",
            "CREATE TABLE base (n int); CREATE TABLE child ({columns}) INHERITS (base); CREATE TABLE sister () INHERITS (base)",
            "CREATE TABLE low () INHERITS (child)",
            "CREATE TABLE nothing (n int)",
            "CREATE PUBLICATION p FOR TABLE part",
        ],
        flags: &[],
        remembered: &["nothing"],
        expected: &[
            "public.whole r [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.part r via=part member [id:integer aggregateid:text]",
            "s.outbox r []",
            "v.outbox v [id:uuid aggregatetype:text aggregateid:text payload:jsonb] reads=public.whole",
            "public.child r [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.low r below=child [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.nothing r []",
        ],
    },
    // with -table no others, and none of the server's own
    Scene {
        sql: &[
            "CREATE TABLE outbox ({columns}); CREATE SCHEMA a; CREATE TABLE a.outbox ({columns}); CREATE TABLE a.log_1 ({columns})",
            "CREATE PUBLICATION p FOR ALL TABLES",
        ],
        flags: &["-table", "a.outbox,a.log_*,pg_class"],
        remembered: &[],
        expected: &[
            "a.outbox r via=outbox member automatic [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "a.log_1 r via=log_1 member automatic [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
        ],
    },
    // since when it is published
    Scene {
        sql: &[
            "CREATE SCHEMA a; CREATE TABLE old ({columns}); CREATE PUBLICATION p FOR TABLES IN SCHEMA a",
            "CREATE TABLE a.schemas ({columns})",
            "ALTER PUBLICATION p ADD TABLE old",
            "BEGIN; CREATE TABLE new ({columns}); ALTER PUBLICATION p ADD TABLE new; COMMIT",
            "CREATE UNLOGGED TABLE a.unlogged ({columns})",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "public.old r via=old member [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "a.schemas r via=schemas member automatic [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.new r via=new member automatic [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "a.unlogged r unlogged member automatic [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
        ],
    },
    // by which names partitions come: the root's
    Scene {
        sql: &[
            "CREATE TABLE parted ({columns}, state text) PARTITION BY LIST (state)",
            "CREATE TABLE first PARTITION OF parted FOR VALUES IN ('a')",
            "CREATE PUBLICATION p FOR TABLE parted WHERE (aggregatetype <> 'x') WITH (publish_via_partition_root = true)",
            "CREATE TABLE deep PARTITION OF parted DEFAULT PARTITION BY RANGE (aggregateid)",
            "CREATE TABLE leaf PARTITION OF deep DEFAULT",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "public.parted p via=parted member filter=(aggregatetype <> 'x'::text) [id:uuid! aggregatetype:text aggregateid:text \
             payload:jsonb] key=LIST (state)/state/moves",
            "public.first r below=parted partition via=parted member []",
            "public.deep p below=parted partition via=parted member [] key=RANGE (aggregateid)/aggregateid/moves",
            "public.leaf r below=parted partition via=parted member []",
        ],
    },
    // or their own, and one is published alone
    Scene {
        sql: &[
            "CREATE TABLE parted ({columns}) PARTITION BY RANGE (id)",
            "CREATE TABLE first PARTITION OF parted FOR VALUES FROM ('10000000-0000-0000-0000-000000000000') TO (MAXVALUE)",
            "CREATE TABLE second PARTITION OF parted DEFAULT",
            "CREATE TABLE other ({columns}) PARTITION BY HASH (id)",
            "CREATE TABLE alone PARTITION OF other FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
            "CREATE TABLE unsent PARTITION OF other FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
            "CREATE PUBLICATION p FOR TABLE parted, alone",
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER outbox_keeps_partition BEFORE UPDATE ON parted FOR EACH ROW EXECUTE FUNCTION f()",
            "CREATE TRIGGER outbox_keeps_partition BEFORE UPDATE ON other FOR EACH ROW EXECUTE FUNCTION f()",
            "ALTER TABLE other DISABLE TRIGGER outbox_keeps_partition",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "public.parted p member [id:uuid! aggregatetype:text aggregateid:text payload:jsonb] key=RANGE (id)/id/kept",
            "public.first r below=parted partition via=first member [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.second r below=parted partition via=second member [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.other p [id:uuid! aggregatetype:text aggregateid:text payload:jsonb] key=HASH (id)/id",
            "public.alone r below=other partition via=alone member [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.unsent r below=other partition [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
        ],
    },
    // the partition of a table that is published since it exists is, too
    Scene {
        sql: &[
            "BEGIN; CREATE TABLE parted ({columns}) PARTITION BY HASH (id); CREATE PUBLICATION p FOR TABLE parted; \
             CREATE TABLE single PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0); COMMIT",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "public.parted p member automatic [id:uuid! aggregatetype:text aggregateid:text payload:jsonb] key=HASH (id)/id",
            "public.single r below=parted partition via=single member automatic [id:uuid! aggregatetype:text aggregateid:text \
             payload:jsonb]",
        ],
    },
    // in whose publication: of the tree, by name or by schema
    Scene {
        sql: &[
            "CREATE SCHEMA a; CREATE TABLE a.one ({columns}); CREATE TABLE two ({columns}); CREATE TABLE three ({columns})",
            "CREATE TABLE below () INHERITS (two)",
            "CREATE PUBLICATION p; CREATE PUBLICATION q FOR TABLE ONLY two; CREATE PUBLICATION r FOR TABLES IN SCHEMA a",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "a.one r elsewhere [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.two r elsewhere [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.below r below=two elsewhere [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
            "public.three r [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
        ],
    },
    Scene {
        sql: &[
            "CREATE TABLE one ({columns}); CREATE PUBLICATION p; CREATE PUBLICATION q FOR ALL TABLES",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "public.one r elsewhere [id:uuid! aggregatetype:text aggregateid:text payload:jsonb]",
        ],
    },
    // what is sent of a row, and where its id comes from
    Scene {
        sql: &[
            "CREATE TABLE listed ({columns}, headers jsonb)",
            "CREATE TABLE generated (id bigserial, aggregatetype text, payload jsonb, aggregateid text GENERATED ALWAYS AS ('x') STORED)",
            "CREATE TABLE counted (id int GENERATED ALWAYS AS IDENTITY, aggregatetype text, aggregateid text, payload jsonb)",
            "CREATE PUBLICATION p FOR TABLE listed (id, aggregatetype), generated, counted",
        ],
        flags: &[],
        remembered: &[],
        expected: &[
            "public.listed r via=listed member listed [id:uuid! aggregatetype:text aggregateid:text-unsent payload:jsonb-unsent \
             headers:jsonb-unsent]",
            "public.generated r via=generated member [id:bigint!=public.generated_id_seq aggregatetype:text payload:jsonb \
             aggregateid:text-unsent-s]",
            "public.counted r via=counted member [id:integer!=public.counted_id_seq aggregatetype:text aggregateid:text payload:jsonb]",
        ],
    },
];

/// What was read of a table: kind, the root that it is below, by which table's name its rows come, and so on.
fn line(table: &Table, all: &Outboxes) -> String {
    let name = |oid| {
        let found = all.tables.iter().find(|table| table.oid == oid);
        found.map_or("?", |table| table.name.as_str())
    };
    let mut words = vec![format!("{}.{} {}", table.schema, table.name, table.kind)];
    let mut when = |is: bool, word: String| words.extend(is.then_some(word));
    when(
        table.root != table.oid,
        format!("below={}", name(table.root)),
    );
    when(table.unlogged, "unlogged".into());
    when(table.partition, "partition".into());
    let via = table.via.map(name);
    when(via.is_some(), format!("via={}", via.unwrap_or_default()));
    when(table.member, "member".into());
    when(table.automatic, "automatic".into());
    when(table.elsewhere, "elsewhere".into());
    let filter = table.filter.as_deref();
    when(
        filter.is_some(),
        format!("filter={}", filter.unwrap_or_default()),
    );
    when(table.listed, "listed".into());
    let published = table.via.is_some();
    let columns = table.columns.iter().map(|it| column(it, published));
    when(true, format!("[{}]", columns.collect::<Vec<_>>().join(" ")));
    if let Some(key) = &table.key {
        let mut text = format!("key={}/{}", key.text, key.columns.join(","));
        text += if key.moves { "/moves" } else { "" };
        text += if key.kept { "/kept" } else { "" };
        words.push(text);
    }
    words.extend(table.reads.iter().map(|reads| format!("reads={reads}")));
    words.join(" ")
}

/// `name:type`, `!` where it is NOT NULL, its sequence, and whether it is sent where the table is.
fn column(column: &Column, published: bool) -> String {
    let mut text = format!("{}:{}", column.name, column.kind);
    text += if column.not_null { "!" } else { "" };
    text += if published && !column.sent {
        "-unsent"
    } else {
        ""
    };
    if let Some(sequence) = &column.sequence {
        text += &format!("={sequence}");
    }
    for generated in column.generated.chars() {
        text += &format!("-{generated}");
    }
    text
}

#[test]
fn each_table_is_read_as_the_server_treats_it() {
    if Postgres::major_version() < 15 {
        eprintln!(
            "skipped: row filters, column lists and schemas of publications came with Postgres 15"
        );
        return;
    }
    let pg = Postgres::start();
    for (number, scene) in SCENES.iter().enumerate() {
        let database = format!("scene_{number}");
        pg.execute(&format!("CREATE DATABASE {database}"));
        let mut client = pg.client_of(&database).expect("the database");
        for sql in scene.sql {
            let sql = sql.replace("{columns}", COLUMNS);
            client
                .batch_execute(&sql)
                .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        }
        let args = [&["-db", "host=h", "-publication", "p"], scene.flags].concat();
        let Ok(Invocation::Relay(cli)) = cli::parse(args.iter().map(OsString::from)) else {
            panic!("{args:?} do not parse");
        };
        let config = Config::load(&cli, &|_| None).expect("a configuration");
        let info = ConnInfo::parse(&pg.url("postgres", &database), &|_| None);
        let info = info.expect("a connection string").without_replication();
        let mut session = Connection::connect(&info).expect("a session");
        // of nobody else's business
        let temporary = format!("CREATE TEMPORARY TABLE outbox ({COLUMNS})");
        session.simple_query(&temporary).expect("a temporary table");
        let oid = |name: &&str| -> u32 {
            let sql = format!("SELECT '{name}'::regclass::oid");
            client.query_one(&sql, &[]).expect("a table").get(0)
        };
        let remembered: Vec<u32> = scene.remembered.iter().map(oid).collect();
        let read = outboxes::read(&mut session, "p", &config.mapping, &remembered);
        let read = read.expect("the catalog");
        let lines: Vec<String> = read.tables.iter().map(|table| line(table, &read)).collect();
        assert_eq!(lines, scene.expected, "scene {number}: {:#?}", lines);
    }
}
