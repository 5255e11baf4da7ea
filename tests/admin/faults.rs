//! Faults that `check` has to find, each on a server that was well before: what makes it, and what is found.
//!
//! To add a fault, add a line to its table. Each is found alone, by its own words; its fix is applied as printed, and then
//! all is well: see [`crate::check_faults`]. [`TOGETHER`] has those that can be there at once. Long, as it is a list.

use crate::check_faults::{Held, Pooler, RESTART};
use crate::rig::{Rig, SLOT, STREAM};
use crate::support::postgres::Postgres;
use jetstream_outbox::postgres::{ConnInfo, Connection, Lsn, replication};
use serde_json::{Value, json};

/// Name, level, and a part of what was found.
pub type Expected = (&'static str, &'static str, &'static str);

/// One fault.
#[derive(Clone, Copy)]
pub struct Fault {
    /// What is found, in this order.
    pub findings: &'static [Expected],
    /// Made first, where SQL is not enough. It is there as long as what it answers.
    pub first: Option<fn(&Rig) -> Held>,
    /// Then this: one statement a transaction, or [`RESTART`].
    pub sql: &'static [&'static str],
    /// The flags of the relay.
    pub flags: &'static [&'static str],
    /// From this version of Postgres on, and up to that.
    pub versions: (u32, u32),
}

const fn fault(findings: &'static [Expected], sql: &'static [&'static str]) -> Fault {
    Fault {
        findings,
        first: None,
        sql,
        flags: &[],
        versions: (12, 99),
    }
}

impl Fault {
    const fn first(mut self, first: fn(&Rig) -> Held) -> Fault {
        self.first = Some(first);
        self
    }

    const fn flags(mut self, flags: &'static [&'static str]) -> Fault {
        self.flags = flags;
        self
    }

    const fn since(mut self, version: u32) -> Fault {
        self.versions.0 = version;
        self
    }

    const fn until(mut self, version: u32) -> Fault {
        self.versions.1 = version;
        self
    }
}

const DROP_SLOT: &str = "SELECT pg_drop_replication_slot('jetstream_outbox')";
const CREATE_SLOT: &str =
    "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput')";
const DROP_OUTBOX: &str = "DROP PUBLICATION jetstream_outbox; DROP TABLE outbox";
const INSERT: &str = "INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'b', '{}')";
const RELOAD: &str = "SELECT pg_reload_conf()";
/// One file of WAL, 16 MB.
const FILL: &str = "SELECT pg_logical_emit_message(false, 'x', 'x'); SELECT pg_switch_wal()";

/// The server, the role and the way there.
pub const SERVER: &[Fault] = &[
    fault(
        &[
            ("postgres.wal_level", "fail", "replica"),
            ("postgres.slot", "fail", "does not exist"),
        ],
        &[DROP_SLOT, "ALTER SYSTEM SET wal_level = 'replica'", RESTART],
    )
    .until(18),
    fault(
        &[("postgres.walsenders", "fail", "0 of 0 walsenders are busy")],
        &["ALTER SYSTEM SET max_wal_senders = 0", RESTART],
    ),
    fault(
        &[
            (
                "postgres.slots",
                "fail",
                "1 of 1 replication slots are taken",
            ),
            ("postgres.slot", "fail", "does not exist"),
        ],
        &[
            DROP_SLOT,
            "SELECT pg_create_physical_replication_slot('another')",
            "ALTER SYSTEM SET max_replication_slots = 1",
            RESTART,
        ],
    ),
    fault(
        &[("postgres.wal_sender_timeout", "warn", "off")],
        &["ALTER SYSTEM SET wal_sender_timeout = 0", RELOAD],
    ),
    fault(
        &[("postgres.wal_sender_timeout", "warn", "5000 ms")],
        &["ALTER SYSTEM SET wal_sender_timeout = '5s'", RELOAD],
    ),
    fault(
        &[("postgres.synchronous_standby", "warn", "ANY 1 (*)")],
        &[
            "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'",
            RELOAD,
        ],
    ),
    fault(
        &[("postgres.synchronous_standby", "warn", "db2, ")],
        &[
            concat!(
                "ALTER SYSTEM SET synchronous_standby_names = 'db2, \"Jetstream-Outbox ",
                env!("CARGO_PKG_VERSION"),
                "\"'"
            ),
            RELOAD,
        ],
    ),
    fault(
        &[("postgres.idle_timeout", "warn", "is 3600 s")],
        &[
            "ALTER SYSTEM SET idle_replication_slot_timeout = '1h'",
            RELOAD,
        ],
    )
    .since(18),
    fault(
        &[("postgres.disk", "warn", "may still take")],
        &["ALTER SYSTEM SET max_slot_wal_keep_size = '2000TB'", RELOAD],
    )
    .since(13),
    fault(
        &[("postgres.role", "fail", "svc may not replicate")],
        &["CREATE ROLE svc LOGIN"],
    )
    .first(|rig| Held::default().by(rig.pg.url("svc", "postgres"))),
    fault(
        &[(
            "postgres.replication",
            "fail",
            "unsupported startup parameter: replication",
        )],
        &[],
    )
    .first(|rig| {
        let pooler = Pooler::start(rig.pg.port());
        Held::default().by(pooler.url())
    }),
    // an address that is none of the loopback interface, and yet is this machine
    fault(&[("postgres.tls", "warn", "not used")], &[]).first(|rig| {
        let port = rig.pg.port();
        Held::default().by(format!("postgres://postgres@0.0.0.0:{port}/postgres"))
    }),
    fault(
        &[
            ("postgres.encoding", "warn", "is SQL_ASCII"),
            ("postgres.messages", "warn", "is SQL_ASCII"),
        ],
        &[],
    )
    .first(|rig| database(rig, "SQL_ASCII")),
    fault(
        &[
            ("postgres.encoding", "warn", "is WIN1252"),
            ("postgres.messages", "warn", "is WIN1252"),
        ],
        &[],
    )
    .first(|rig| database(rig, "WIN1252")),
    fault(
        &[
            ("postgres.encoding", "warn", "is EUC_JP"),
            ("postgres.messages", "warn", "is EUC_JP"),
        ],
        &[],
    )
    .first(|rig| database(rig, "EUC_JP")),
    // each of its bytes is a character, but messages are not converted
    fault(&[("postgres.messages", "warn", "is LATIN1")], &[]).first(|rig| database(rig, "LATIN1")),
    fault(
        &[(
            "postgres.messages",
            "warn",
            "does not emit messages with prefix",
        )],
        &[ANOTHER_PREFIX],
    )
    .since(14),
];

/// The function emits what the relay passes over.
const ANOTHER_PREFIX: &str = "DO $$ BEGIN EXECUTE replace(pg_get_functiondef('outbox_publish'::regproc), \
    '''jetstream_outbox''', '''another'''); END $$";

/// A database of this encoding, which has the slot.
fn database(rig: &Rig, encoding: &str) -> Held {
    rig.pg.execute(DROP_SLOT);
    rig.pg.execute(&format!(
        "CREATE DATABASE old ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
    ));
    Held::set_up_in(rig, "old")
}

/// The slot, and what keeps it from being created.
pub const SLOTS: &[Fault] = &[
    fault(&[("postgres.slot", "fail", "does not exist")], &[DROP_SLOT]),
    fault(&[("postgres.slot", "fail", "is physical")], &[
            DROP_SLOT,
            "SELECT pg_create_physical_replication_slot('jetstream_outbox')",
        ]),
    fault(&[("postgres.slot", "fail", "of plugin test_decoding")], &[
            DROP_SLOT,
            "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'test_decoding')",
        ]),
    fault(&[("postgres.slot", "fail", "belongs to database elsewhere")], &[]).first(|rig| {
            rig.pg.execute(DROP_SLOT);
            rig.pg.execute("CREATE DATABASE elsewhere");
            let mut elsewhere = rig.pg.client_of("elsewhere").expect("the database");
            elsewhere.batch_execute(CREATE_SLOT).expect("a slot there");
            Held::default()
        }),
    fault(&[("postgres.slot", "fail", "is temporary")], &[]).first(|rig| {
            rig.pg.execute(DROP_SLOT);
            let mut session = rig.pg.client();
            session
                .batch_execute(
                    "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput', true)",
                )
                .expect("a temporary slot");
            Held::while_there(session)
        }),
    fault(&[("postgres.slot", "fail", "was created with two_phase")], &[
            DROP_SLOT,
            "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput', false, true)",
        ]).since(14),
    fault(&[(
            "postgres.slot",
            "warn",
            "whose application_name is Debezium",
        )], &[]).first(|rig| {
            let url = rig.pg.url("postgres", "postgres") + "?application_name=Debezium";
            let info = ConnInfo::parse(&url, &|_| None).expect("a connection string");
            let session = Connection::connect(&info).expect("a replication connection");
            let options = [("proto_version", "1"), ("publication_names", SLOT)];
            let reading = replication::start_replication(session, SLOT, Lsn::INVALID, &options);
            Held::while_there(reading.expect("the slot is free"))
        }),
    fault(&[
            (
                "postgres.open_transactions",
                "warn",
                "prepared transaction 'it''s'",
            ),
            ("postgres.slot", "fail", "does not exist"),
        ], &[
            DROP_SLOT,
            "BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'b', '{}'); PREPARE TRANSACTION 'it''s'",
        ]),
    fault(&[("postgres.retained_log", "warn", "more than half of")], &[
            "ALTER SYSTEM SET max_slot_wal_keep_size = '64MB'",
            RELOAD,
            FILL,
            FILL,
            FILL,
        ]).since(13),
    fault(&[
            ("postgres.slot_log", "fail", "at the next checkpoint"),
            ("postgres.retained_log", "warn", "more than half of"),
        ], &[
            "ALTER SYSTEM SET max_slot_wal_keep_size = '48MB'",
            RELOAD,
            FILL,
            FILL,
            FILL,
            FILL,
            FILL,
            FILL,
        ]).since(13),
    fault(&[("postgres.slot_log", "fail", "has invalidated slot")], &[
            "ALTER SYSTEM SET max_slot_wal_keep_size = '48MB'",
            RELOAD,
            FILL,
            FILL,
            FILL,
            FILL,
            FILL,
            FILL,
            "CHECKPOINT",
        ]).since(13),
    fault(&[("postgres.failover", "fail", "names gone")], &[
            DROP_SLOT,
            "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput', failover => true)",
            "ALTER SYSTEM SET synchronized_standby_slots = 'gone'",
            RELOAD,
        ]).since(17),
    fault(&[("both.slot_position", "fail", "it was re-created, or moved")], &[DROP_SLOT, INSERT, CREATE_SLOT]).first(relay_ran),
];

/// A relay has published an event.
fn relay_ran(rig: &Rig) -> Held {
    rig.commit_event(1, "a");
    rig.drain(&["-hold-back", "0"]);
    Held::default()
}

/// The publication, and whether what is inserted into the outbox is sent.
pub const PUBLICATION: &[Fault] = &[
    fault(&[("postgres.publication", "fail", "does not exist")], &["DROP PUBLICATION jetstream_outbox"]),
    fault(&[("postgres.publication", "fail", "does not exist")], &[DROP_OUTBOX]),
    fault(&[("postgres.publication", "fail", "does not publish inserts")], &["ALTER PUBLICATION jetstream_outbox SET (publish = 'update')"]),
    fault(&[(
            "postgres.publication_age",
            "warn",
            "created or altered later",
        )], &[
            "DROP PUBLICATION jetstream_outbox",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]),
    // the slot has a row to send of a time when there was no publication
    fault(&[("postgres.start", "fail", "jetstream_outbox")], &[
            "DROP PUBLICATION jetstream_outbox",
            INSERT,
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).since(13),
    fault(&[("postgres.tables", "fail", "does not hold public.outbox")], &["ALTER PUBLICATION jetstream_outbox DROP TABLE outbox"]),
    fault(&[(
            "postgres.tables",
            "warn",
            "has a row filter for public.outbox",
        )], &["ALTER PUBLICATION jetstream_outbox SET TABLE outbox WHERE (aggregatetype <> 'x')"]).since(15),
    fault(&[
            (
                "postgres.tables",
                "warn",
                "has a row filter for public.outbox",
            ),
            (
                "postgres.filter_moves",
                "warn",
                "publishes updates, and has a row filter for public.outbox",
            ),
        ], &[
            "ALTER TABLE outbox REPLICA IDENTITY FULL",
            "ALTER PUBLICATION jetstream_outbox SET TABLE outbox WHERE (aggregatetype <> 'x')",
            "ALTER PUBLICATION jetstream_outbox SET (publish = 'insert, update')",
        ]).since(15),
    fault(&[(
            "postgres.tables",
            "warn",
            "public.outbox has no partition yet",
        )], &[
            DROP_OUTBOX,
            "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb) \
             PARTITION BY RANGE (id)",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).flags(&["-table", "outbox"]).since(13),
    fault(&[(
            "postgres.tables",
            "fail",
            "public.outbox is published without payload",
        )], &[
            "ALTER PUBLICATION jetstream_outbox SET TABLE outbox (id, aggregatetype, aggregateid)",
        ]).since(15),
    fault(&[(
            "postgres.tables",
            "warn",
            "public.outbox is published without headers",
        )], &[
            "ALTER TABLE outbox ADD COLUMN headers jsonb",
            "ALTER PUBLICATION jetstream_outbox SET TABLE outbox (id, aggregatetype, aggregateid, payload)",
        ]).since(15),
    fault(&[(
            "postgres.tables",
            "fail",
            "table public.outbox has no column payload",
        )], &["ALTER TABLE outbox DROP COLUMN payload"]).flags(&["-table", "outbox"]),
    fault(&[(
            "postgres.tables",
            "fail",
            "public.outbox is generated, and the publication does not send it",
        )], &[
            "ALTER TABLE outbox DROP COLUMN aggregateid, ADD COLUMN aggregateid text GENERATED ALWAYS AS (payload->>'id') STORED",
        ]),
    fault(&[(
            "postgres.tables",
            "warn",
            "holds public.orders, which the relay ignores",
        )], &[
            "CREATE TABLE orders (order_id bigint, kind text, body jsonb)",
            "ALTER PUBLICATION jetstream_outbox ADD TABLE orders",
        ]),
    // it has the columns, and is not named
    fault(&[(
            "postgres.tables",
            "warn",
            "holds public.letters, which the relay ignores",
        )], &[
            "CREATE TABLE letters (LIKE outbox INCLUDING ALL)",
            "ALTER PUBLICATION jetstream_outbox ADD TABLE letters",
        ]).flags(&["-table", "outbox"]),
    fault(&[("postgres.tables", "fail", "table outbox does not exist")], &["DROP TABLE outbox"]),
    fault(&[("postgres.tables", "fail", "table b.other does not exist")], &["CREATE SCHEMA b"]).flags(&["-table", "outbox,b.other"]),
    fault(&[("postgres.tables", "fail", "letters is a view")], &["CREATE VIEW letters AS SELECT * FROM outbox"]).flags(&["-table", "letters"]),
    fault(&[("postgres.tables", "fail", "does not hold public.shop_1")], &[
            "CREATE TABLE shop_1 (LIKE outbox INCLUDING ALL)",
            "ALTER PUBLICATION jetstream_outbox DROP TABLE outbox",
        ]).flags(&["-table", "shop_*"]),
    fault(&[("postgres.tables", "fail", "public.outbox is unlogged")], &[
            DROP_OUTBOX,
            "CREATE UNLOGGED TABLE outbox (id uuid PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb)",
            "CREATE PUBLICATION jetstream_outbox FOR ALL TABLES WITH (publish = 'insert')",
        ]),
    fault(&[("postgres.tables", "fail", "public.outbox is unlogged")], &[
            "DROP PUBLICATION jetstream_outbox",
            "CREATE PUBLICATION jetstream_outbox FOR TABLES IN SCHEMA public WITH (publish = 'insert')",
            "ALTER TABLE outbox SET UNLOGGED",
        ]).since(15),
    // in no publication either
    fault(&[("postgres.tables", "fail", "public.outbox is unlogged")], &[
            "ALTER PUBLICATION jetstream_outbox DROP TABLE outbox",
            "ALTER TABLE outbox SET UNLOGGED",
        ]),
    // renamed, and created again
    fault(&[("postgres.tables", "fail", "does not hold public.outbox")], &[
            "ALTER TABLE outbox RENAME TO outbox_old",
            "CREATE TABLE outbox (LIKE outbox_old INCLUDING ALL)",
        ]).flags(&["-table", "outbox"]),
    fault(&[("postgres.tables", "fail", "does not hold b.outbox")], &[
            "CREATE SCHEMA a; CREATE SCHEMA b; ALTER TABLE outbox SET SCHEMA a",
            "DROP PUBLICATION jetstream_outbox",
            "CREATE PUBLICATION jetstream_outbox FOR TABLES IN SCHEMA a WITH (publish = 'insert')",
            "ALTER TABLE a.outbox SET SCHEMA b",
        ]).since(15),
    fault(&[(
            "postgres.tables",
            "warn",
            "b.outbox looks like an outbox and is in no publication",
        )], &["CREATE SCHEMA b; CREATE TABLE b.outbox (LIKE outbox INCLUDING ALL)"]),
    fault(&[("postgres.tables", "fail", "does not hold b.outbox")], &["CREATE SCHEMA b; CREATE TABLE b.outbox (LIKE outbox INCLUDING ALL)"]).flags(&["-table", "public.outbox,b.outbox"]),
    fault(&[(
            "postgres.tables",
            "fail",
            "does not hold public.outbox_2027, below public.outbox",
        )], &["CREATE TABLE outbox_2027 () INHERITS (outbox)"]),
    fault(&[(
            "postgres.tables",
            "fail",
            "holds the children of table public.outbox under their own names",
        )], &[
            "CREATE TABLE older () INHERITS (outbox)",
            "ALTER PUBLICATION jetstream_outbox ADD TABLE older",
        ]).flags(&["-table", "outbox"]),
    fault(&[(
            "postgres.tables",
            "fail",
            "holds the partitions of table public.outbox under their own names",
        )], &[
            PARTED,
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).flags(&["-table", "outbox"]).since(13),
    fault(&[(
            "postgres.tables",
            "fail",
            "holds the partitions of table public.outbox under their own names",
        )], &[
            PARTED,
            "CREATE TABLE outbox_2 PARTITION OF outbox DEFAULT",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).flags(&["-table", "outbox*"]).since(13),
    // attached from elsewhere
    fault(&[(
            "postgres.tables",
            "warn",
            "does not hold public.second, below public.outbox",
        )], &[
            PARTED,
            "CREATE PUBLICATION jetstream_outbox FOR TABLE first WITH (publish = 'insert')",
            "CREATE TABLE second (LIKE outbox); ALTER TABLE outbox ATTACH PARTITION second DEFAULT",
        ]).since(13),
    fault(&[("postgres.tables", "fail", "public.second is unlogged")], &[
            PARTED,
            "CREATE UNLOGGED TABLE second PARTITION OF outbox DEFAULT",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).since(13),
    fault(&[(
            "postgres.tables",
            "fail",
            "public.second is on another server",
        )], &[
            PARTED,
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
            "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER away FOREIGN DATA WRAPPER none",
            "CREATE FOREIGN TABLE second PARTITION OF outbox DEFAULT SERVER away",
        ]).since(13),
    fault(&[("postgres.tables", "fail", "does not hold public.outbox")], &[
            "DROP PUBLICATION jetstream_outbox",
            "CREATE PUBLICATION jetstream_outbox FOR ALL TABLES EXCEPT (TABLE outbox) WITH (publish = 'insert')",
        ]).since(19),
    fault(&[(
            "postgres.publication_change",
            "fail",
            "table public.outbox was dropped and created again, and was not in publication",
        )], &[
            "ALTER TABLE outbox RENAME TO outbox_old; CREATE TABLE outbox (LIKE outbox_old INCLUDING ALL)",
            "ALTER PUBLICATION jetstream_outbox ADD TABLE outbox",
            "DROP TABLE outbox_old",
        ]).first(relay_ran),
];

/// Without a publication.
const PARTED: &str = "DROP PUBLICATION jetstream_outbox; DROP TABLE outbox; \
    CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb) \
    PARTITION BY RANGE (aggregateid); CREATE TABLE first PARTITION OF outbox FOR VALUES FROM ('a') TO ('m')";

/// Nothing is lost today: what surprises later, the application first.
pub const LATER: &[Fault] = &[
    fault(&[(
            "postgres.replica_identity",
            "fail",
            "public.outbox has none",
        )], &[
            "ALTER TABLE outbox REPLICA IDENTITY NOTHING",
            "ALTER PUBLICATION jetstream_outbox SET (publish = 'insert, delete')",
        ]),
    fault(&[
            ("postgres.tables", "warn", "holds public.keyless, which the relay ignores"),
            ("postgres.replica_identity", "fail", "public.keyless has none"),
        ], &[
            "CREATE TABLE keyless (n int)",
            "ALTER PUBLICATION jetstream_outbox ADD TABLE keyless",
            "ALTER PUBLICATION jetstream_outbox SET (publish = 'insert, update')",
        ]),
    // its index was dropped
    fault(&[
            ("postgres.tables", "warn", "holds public.indexed, which the relay ignores"),
            ("postgres.replica_identity", "fail", "public.indexed has none"),
        ], &[
            "CREATE TABLE indexed (n int NOT NULL); CREATE UNIQUE INDEX by_n ON indexed (n)",
            "ALTER TABLE indexed REPLICA IDENTITY USING INDEX by_n; DROP INDEX by_n",
            "ALTER PUBLICATION jetstream_outbox ADD TABLE indexed",
            "ALTER PUBLICATION jetstream_outbox SET (publish = 'insert, delete')",
        ]),
    fault(&[(
            "postgres.headers_column",
            "warn",
            "column headers of table public.outbox is text",
        )], &["ALTER TABLE outbox ADD COLUMN headers text"]),
    fault(&[(
            "postgres.headers_column",
            "fail",
            "column extra of table public.outbox is text",
        )], &["ALTER TABLE outbox ADD COLUMN extra text"]).flags(&["-headers-column", "extra"]),
    fault(&[(
            "postgres.copies",
            "warn",
            "public.outbox_backup looks like a kept copy",
        )], &[
            FOR_ALL_TABLES,
            "CREATE TABLE outbox_backup (LIKE outbox INCLUDING ALL)",
        ]),
    // told by what it lacks, whatever it is called
    fault(&[(
            "postgres.copies",
            "warn",
            "public.before_the_fire looks like a kept copy",
        )], &[FOR_ALL_TABLES, "SELECT * INTO before_the_fire FROM outbox"]),
    fault(&[("postgres.ids", "warn", "the ids of a.outbox, b.outbox")], &[
            DROP_OUTBOX,
            "CREATE SCHEMA a; CREATE TABLE a.outbox (id bigserial, aggregatetype text, aggregateid text, payload jsonb)",
            "CREATE SCHEMA b; CREATE TABLE b.outbox (id bigserial, aggregatetype text, aggregateid text, payload jsonb)",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE a.outbox, b.outbox WITH (publish = 'insert')",
        ]).flags(&["-table", "a.outbox,b.outbox"]),
    fault(&[(
            "postgres.payload_column",
            "warn",
            "column payload of table public.outbox is b.document, a domain over jsonb",
        )], &[
            "CREATE SCHEMA b; CREATE DOMAIN b.json AS jsonb; CREATE DOMAIN b.document AS b.json CHECK (VALUE IS NOT NULL)",
            "ALTER TABLE outbox ALTER payload TYPE b.document",
        ]),
    fault(&[(
            "postgres.ids",
            "warn",
            "the ids of public.counted, public.numbered",
        )], &[
            DROP_OUTBOX,
            "CREATE TABLE counted (id int GENERATED ALWAYS AS IDENTITY, aggregatetype text, aggregateid text, payload jsonb)",
            "CREATE TABLE numbered (id int GENERATED BY DEFAULT AS IDENTITY, aggregatetype text, aggregateid text, payload jsonb)",
            "CREATE PUBLICATION jetstream_outbox FOR ALL TABLES WITH (publish = 'insert')",
        ]),
    fault(&[(
            "postgres.partition_moves",
            "warn",
            "partitioned by LIST (state)",
        )], &[
            DROP_OUTBOX,
            "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb, \
             state text NOT NULL DEFAULT 'new') PARTITION BY LIST (state)",
            "CREATE TABLE o1 PARTITION OF outbox FOR VALUES IN ('new')",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).since(13),
    // a range over what may be unset, and is set later
    fault(&[(
            "postgres.partition_moves",
            "warn",
            "partitioned by RANGE (done)",
        )], &[
            DROP_OUTBOX,
            "CREATE TABLE outbox (id uuid NOT NULL, aggregatetype text NOT NULL, aggregateid text NOT NULL, payload jsonb, \
             done timestamptz) PARTITION BY RANGE (done)",
            "CREATE TABLE o1 PARTITION OF outbox DEFAULT",
            "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox WITH (publish = 'insert')",
        ]).since(13),
];

const FOR_ALL_TABLES: &str = "DROP PUBLICATION jetstream_outbox; \
    CREATE PUBLICATION jetstream_outbox FOR ALL TABLES WITH (publish = 'insert')";

/// The other side.
pub const NATS: &[Fault] = &[
    fault(
        &[("nats.streams", "fail", "no stream captures events.>")],
        &[],
    )
    .first(|rig| delete_stream(rig, STREAM)),
    fault(&[("nats.checkpoint", "warn", "does not exist")], &[])
        .first(|rig| delete_stream(rig, BUCKET)),
    fault(&[("nats.checkpoint", "warn", "is kept in memory")], &[])
        .first(|rig| recreate_stream(rig, BUCKET, "storage", json!("memory"))),
    fault(
        &[(
            "nats.parking",
            "fail",
            "no stream captures jetstream_outbox.parked",
        )],
        &[],
    )
    .flags(&["-on-poison", "park"]),
    fault(
        &[(
            "nats.duplicate_window",
            "warn",
            "remembers message ids for 1 s",
        )],
        &[],
    )
    .first(|rig| recreate_stream(rig, STREAM, "duplicate_window", json!(1_000_000_000_u64)))
    .flags(&["-delivery", "at-least-once"]),
    fault(
        &[(
            "both.history",
            "fail",
            "was written from another Postgres system",
        )],
        &[],
    )
    .first(|rig| {
        let other = Postgres::builder().own_system_id().build();
        other.seed_setup();
        other.execute(INSERT);
        let url = other.url("postgres", "postgres");
        let args = ["-drain", "-db", &url, "-nats", &rig.nats.url()];
        crate::command::run(&args, &[]).with(0);
        Held::default()
    }),
];

const BUCKET: &str = "KV_jetstream_outbox";

fn delete_stream(rig: &Rig, name: &str) -> Held {
    let mut nats = rig.nats.client();
    nats.api(&format!("STREAM.DELETE.{name}"), &Value::Null);
    Held::default()
}

/// With another setting.
fn recreate_stream(rig: &Rig, name: &str, setting: &str, value: Value) -> Held {
    let mut nats = rig.nats.client();
    let mut config = nats.stream_info(name)["config"].clone();
    config[setting] = value;
    delete_stream(rig, name);
    nats.add_stream_with(config);
    Held::default()
}

/// Those that can be there at once, on one server.
pub const TOGETHER: Fault = Fault {
    findings: &[
        ("postgres.role", "fail", "svc may not replicate"),
        ("postgres.walsenders", "fail", "0 of 0 walsenders are busy"),
        ("postgres.wal_sender_timeout", "warn", "off"),
        ("postgres.synchronous_standby", "warn", "ANY 1 (*)"),
        ("postgres.publication", "fail", "does not publish inserts"),
        (
            "postgres.tables",
            "fail",
            "public.outbox_2027, below public.outbox",
        ),
        (
            "postgres.tables",
            "fail",
            "d.outbox is published without payload",
        ),
        ("postgres.tables", "fail", "e.second is unlogged"),
        ("postgres.tables", "fail", "f.outbox is generated"),
        ("postgres.tables", "fail", "j.second is on another server"),
        ("postgres.tables", "warn", "has a row filter for c.outbox"),
        ("postgres.tables", "warn", "b.outbox looks like an outbox"),
        ("postgres.tables", "fail", "g.outbox has no column payload"),
        ("postgres.headers_column", "warn", "h.outbox is text"),
        (
            "postgres.copies",
            "warn",
            "h.outbox_old looks like a kept copy",
        ),
        ("postgres.ids", "warn", "the ids of i.letters, i.outbox"),
        (
            "postgres.partition_moves",
            "warn",
            "table k.outbox is partitioned",
        ),
        (
            "postgres.filter_moves",
            "warn",
            "publishes updates, and has a row filter for c.outbox",
        ),
        ("postgres.tls", "warn", "not used"),
        ("postgres.messages", "warn", "does not emit messages"),
        ("postgres.replica_identity", "fail", "has none"),
        ("postgres.slot", "fail", "was created with two_phase"),
        ("postgres.retained_log", "warn", "more than half of"),
        ("nats.stream_settings", "warn", "it is kept in memory"),
        ("nats.stream_settings", "warn", "max_msg"),
        ("nats.duplicate_window", "warn", "for 1 s"),
        ("nats.checkpoint", "warn", "is kept in memory"),
        ("nats.parking", "fail", "no stream captures"),
    ],
    first: Some(|rig| {
        recreate_stream(rig, BUCKET, "storage", json!("memory"));
        let mut nats = rig.nats.client();
        let mut config = nats.stream_info(STREAM)["config"].clone();
        config["storage"] = json!("memory");
        config["max_msg_size"] = json!(1000);
        config["duplicate_window"] = json!(1_000_000_000_u64);
        delete_stream(rig, STREAM);
        nats.add_stream_with(config);
        let port = rig.pg.port();
        Held::default().by(format!("postgres://svc@0.0.0.0:{port}/postgres"))
    }),
    sql: &[
        "CREATE ROLE svc LOGIN",
        "DROP PUBLICATION jetstream_outbox",
        "CREATE SCHEMA b; CREATE TABLE b.outbox (LIKE outbox INCLUDING ALL)",
        "CREATE SCHEMA c; CREATE TABLE c.outbox (LIKE outbox INCLUDING ALL)",
        "CREATE SCHEMA d; CREATE TABLE d.outbox (LIKE outbox INCLUDING ALL)",
        "CREATE SCHEMA e; CREATE TABLE e.outbox (LIKE outbox) PARTITION BY RANGE (aggregateid); \
         CREATE TABLE e.first PARTITION OF e.outbox FOR VALUES FROM ('a') TO ('m'); \
         CREATE UNLOGGED TABLE e.second PARTITION OF e.outbox DEFAULT",
        "CREATE SCHEMA f; CREATE TABLE f.outbox (LIKE outbox INCLUDING ALL); ALTER TABLE f.outbox DROP COLUMN aggregateid, \
         ADD COLUMN aggregateid text GENERATED ALWAYS AS (payload->>'id') STORED",
        "CREATE SCHEMA g; CREATE TABLE g.outbox (LIKE outbox INCLUDING ALL); ALTER TABLE g.outbox DROP COLUMN payload",
        "CREATE SCHEMA h; CREATE TABLE h.outbox (LIKE outbox INCLUDING ALL); ALTER TABLE h.outbox ADD COLUMN headers text; \
         CREATE TABLE h.outbox_old (LIKE outbox INCLUDING ALL)",
        "CREATE SCHEMA i; CREATE TABLE i.letters (id bigserial PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb); \
         CREATE TABLE i.outbox (id bigserial PRIMARY KEY, aggregatetype text, aggregateid text, payload jsonb)",
        "CREATE SCHEMA j; CREATE TABLE j.outbox (LIKE outbox) PARTITION BY RANGE (aggregateid); \
         CREATE TABLE j.first PARTITION OF j.outbox FOR VALUES FROM ('a') TO ('m'); CREATE FOREIGN DATA WRAPPER none; \
         CREATE SERVER away FOREIGN DATA WRAPPER none",
        "CREATE SCHEMA k; CREATE TABLE k.outbox (LIKE outbox, state text) PARTITION BY LIST (state); \
         CREATE TABLE k.first PARTITION OF k.outbox DEFAULT",
        "CREATE PUBLICATION jetstream_outbox FOR TABLE outbox, c.outbox WHERE (aggregatetype <> 'x'), \
         d.outbox (id, aggregatetype, aggregateid), e.outbox, f.outbox, g.outbox, h.outbox, h.outbox_old, i.letters, i.outbox, \
         j.outbox, k.outbox WITH (publish = 'update, delete')",
        "CREATE TABLE outbox_2027 () INHERITS (outbox)",
        "CREATE FOREIGN TABLE j.second PARTITION OF j.outbox DEFAULT SERVER away",
        ANOTHER_PREFIX,
        DROP_SLOT,
        "SELECT pg_create_logical_replication_slot('jetstream_outbox', 'pgoutput', false, true)",
        "ALTER SYSTEM SET max_slot_wal_keep_size = '96MB'",
        "ALTER SYSTEM SET wal_sender_timeout = 0",
        "ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'",
        "ALTER SYSTEM SET max_wal_senders = 0",
        RESTART,
        FILL,
        FILL,
        FILL,
        FILL,
    ],
    flags: &["-delivery", "at-least-once", "-on-poison", "park"],
    versions: (15, 17),
};
