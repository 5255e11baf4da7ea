//! `setup -print-sql` and `-print-nats`: what an administrator has to run, with the least privileges the relay works
//! with. A test runs the relay under exactly these.

use super::statements::{
    create_aggregate, create_bucket, create_park_stream, create_publication, create_slot,
    create_stream, create_table, park_stream, tables,
};
use crate::config::Config;
use crate::config::operation::{Setup, Side};
use crate::jetstream::bucket::{BUCKET_BYTES, key_write_subject};
use crate::jetstream::sources::source;
use crate::jetstream::streams::Request;
use crate::outbox::mapping::TableName;
use crate::outbox::message::publish_function;
use crate::postgres::connection::quote_literal;
use crate::postgres::identifier::identifier;
use std::fmt::Write;

/// The whole text.
pub fn text(config: &Config, how: &Setup, side: Side) -> String {
    match side {
        Side::Postgres => sql(config, how),
        Side::Nats => nats(config, how),
    }
}

fn sql(config: &Config, how: &Setup) -> String {
    let role = identifier(&how.role);
    let (place, database) = match config.database_is_named {
        true => {
            let name = identifier(config.db.dbname());
            (format!("the database {name}"), name)
        }
        // psql's own word for the one it is connected to
        false => ("the outbox's database".into(), ":\"DBNAME\"".into()),
    };
    let mut text = format!(
        "-- In psql, as a superuser, in {place}. The server needs wal_level = logical; if SHOW wal_level says\n\
         -- otherwise: ALTER SYSTEM SET wal_level = 'logical'; and a restart.\n\
         -- The slot is not to be made where something before it has failed.\n\
         \\set ON_ERROR_STOP on\n\n\
         -- The relay's role. Give it a password: \\password {role}\n\
         -- It needs no privilege on the table.\n\
         CREATE ROLE {role} WITH LOGIN REPLICATION;\n\
         GRANT CONNECT ON DATABASE {database} TO {role};\n\n"
    );
    let tables = tables(config);
    for table in &tables {
        if let Some(schema) = &table.schema {
            let _ = writeln!(text, "CREATE SCHEMA IF NOT EXISTS {};", identifier(schema));
        }
        text += &create_table(config, table);
        text += "\n\n";
    }
    for named in config
        .mapping
        .tables
        .iter()
        .filter(|it| it.table.and_longer)
    {
        let _ = writeln!(
            text,
            "-- The tables {} are to be there already; the publication is made of those that are.\n",
            named.table
        );
    }
    let names: Vec<String> = tables.iter().map(TableName::sql).collect();
    for table in &names {
        let _ = writeln!(
            text,
            "-- The application: GRANT INSERT, DELETE ON {table} TO ...;"
        );
    }
    if let Some(prefix) = &config.mapping.message_prefix {
        let _ = writeln!(
            text,
            "\n-- The event without a table. Leave it out before Postgres 14, and with -no-messages. Whoever may call it\n\
             -- publishes: REVOKE EXECUTE ON FUNCTION outbox_publish FROM PUBLIC; then GRANT it to the application.\n{}\n",
            publish_function(prefix).trim_end()
        );
    }
    text += &match config.mapping.tables.iter().any(|it| it.table.and_longer) {
        true => gather_publication(config),
        false => create_publication(config, &tables, false),
    };
    text += "\n\n-- After the publication: a slot cannot see a publication that is younger. It keeps log from now on,\n\
             -- so start the relay soon, or the log fills the disk.\n";
    text += &create_slot(&config.slot, how.failover);
    text.push('\n');
    text
}

/// The publication of tables some of which are named by their beginning, which psql has to look for.
fn gather_publication(config: &Config) -> String {
    let named = config.mapping.tables.iter().map(|it| &it.table);
    let each: Vec<String> = named
        .map(|table| {
            if !table.and_longer {
                // in the schema in which it was created just above
                return format!("c.oid = {}::regclass", quote_literal(&table.sql()));
            }
            let begins = format!(
                "starts_with(c.relname::text, {})",
                quote_literal(&table.name)
            );
            match &table.schema {
                Some(schema) => format!("n.nspname = {} AND {begins}", quote_literal(schema)),
                None => begins,
            }
        })
        .collect();
    format!(
        "SELECT format('CREATE PUBLICATION %I FOR TABLE %s WITH (publish = ''insert'')', {}, string_agg(c.oid::regclass::text, ', '))\n\
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace\n\
         WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema')\n\
         AND ({}) \\gexec",
        quote_literal(&config.publication),
        each.join(" OR ")
    )
}

fn nats(config: &Config, how: &Setup) -> String {
    let api = &config.nats.api_prefix;
    let mut allowed = vec![
        format!("{}.>", config.prefix),
        format!("{api}.STREAM.NAMES"),
    ];
    let mut streams = vec![how.stream.clone()];
    if config.mapping.policy.parks() {
        allowed.push(config.mapping.policy.park_subject.clone());
        if create_park_stream(config, how).is_some() {
            streams.push(park_stream(how));
        }
    }
    // a key for each slot and system
    let key = format!("$KV.{}.*", config.checkpoint);
    allowed.push(key_write_subject(&config.nats.api_prefix, &key));
    streams.push(format!("KV_{}", config.checkpoint));
    // the relay does without, `check -aggregate` does not
    streams.extend(how.aggregate.iter().map(|(name, _)| name.clone()));
    for stream in &streams {
        allowed.push(format!("{api}.STREAM.INFO.{stream}"));
        allowed.push(format!("{api}.STREAM.MSG.GET.{stream}"));
    }
    let allowed: Vec<String> = allowed
        .iter()
        .map(|s| format!("          \"{s}\"\n"))
        .collect();
    let mut text = format!(
        "# In the configuration of nats-server. When further streams capture the prefix, allow INFO and MSG.GET of each.\n\
         authorization {{\n  users: [\n    {{\n      user: {:?}\n      password: \"choose-a-better-one\"\n      permissions: {{\n        \
         publish: {{ allow: [\n{}        ] }}\n        subscribe: {{ allow: [ \"_INBOX.>\" ] }}\n      }}\n    }}\n  ]\n}}\n\n\
         # Then, as a user who may create streams, with the nats command-line tool:\n",
        how.role,
        allowed.concat()
    );
    let bucket_bytes = (how.max_bytes > 0).then_some(BUCKET_BYTES);
    let requests = std::iter::once(create_stream(config, how))
        .chain(create_park_stream(config, how))
        .chain([create_bucket(
            config,
            how.replicas.unwrap_or(1),
            bucket_bytes,
        )])
        .chain(aggregate(config, how));
    for (subject, body) in requests {
        // what is asked for is JSON, and JSON of ours has no single quote
        let body = String::from_utf8_lossy(&body);
        let _ = writeln!(text, "nats request '{api}.{subject}' '{body}'");
    }
    if let Some((name, _)) = &how.aggregate {
        let _ = writeln!(
            text,
            "# Where {name} is there already, add the source to it instead: nats stream edit {name} --config=FILE.\n\
             # Before nats-server 2.15 give it \"duplicate_window\":100000000, or it drops events that have an id of another relay's."
        );
    }
    text
}

/// Asks for an aggregate of the stream that is asked for.
fn aggregate(config: &Config, how: &Setup) -> Option<Request> {
    const NEWEST: &str = "2.15";
    let (name, other_prefix) = how.aggregate.as_ref()?;
    let subjects = [format!("{}.>", config.prefix)];
    let source = source(
        &how.stream,
        &subjects,
        &config.prefix,
        other_prefix.as_deref(),
    );
    Some(create_aggregate(how, name, &[source], NEWEST))
}
