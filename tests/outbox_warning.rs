//! A table of the publication that is no outbox is mentioned once, however often it is described. In a
//! process of its own, since a logger can be set only once.

use jetstream_outbox::outbox::mapper::{ColumnInfo, Mapper};
use jetstream_outbox::outbox::mapping::{Mapping, NamedTable, TableMapping, TableName};
use jetstream_outbox::postgres::Lsn;
use log::kv::Key;
use std::sync::Mutex;

static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Warnings;

impl log::Log for Warnings {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.level() <= log::Level::Warn {
            let mut warnings = WARNINGS.lock().expect("no test panics while it logs");
            let table = record.key_values().get(Key::from("table"));
            warnings.push(table.expect("the table is named").to_string());
        }
    }

    fn flush(&self) {}
}

#[test]
fn a_table_that_is_no_outbox_is_warned_of_once() {
    log::set_logger(&Warnings).expect("the only test of this process");
    log::set_max_level(log::LevelFilter::Trace);
    let outbox = ["id", "aggregatetype", "aggregateid", "payload"];
    let named = |name: &str| NamedTable {
        table: TableName {
            schema: None,
            name: name.to_string(),
            and_longer: false,
        },
        mapping: TableMapping::default(),
    };
    for (tables, expected) in [
        (vec![], vec!["public.users", "a b.\n\"x"]),
        (vec![named("outbox")], vec![]),
        // an outbox that is left out loses events, if it was not meant to be
        (vec![named("other")], vec!["public.outbox"]),
    ] {
        let mut mapper = Mapper::new(&Mapping {
            tables,
            ..Mapping::new("events")
        });
        for _ in 0..3 {
            for (id, schema, name, columns) in [
                (1, "public", "users", &outbox[..1]),
                (2, "a b", "\n\"x", &[]),
                (3, "public", "outbox", &outbox),
            ] {
                let columns = columns.iter().map(|name| ColumnInfo { name, type_id: 25 });
                mapper
                    .relation(id, schema, name, columns, Lsn(1))
                    .expect("no outbox, or a whole one");
            }
        }
        let warnings = std::mem::take(&mut *WARNINGS.lock().expect("as above"));
        assert_eq!(warnings, expected);
    }
}
