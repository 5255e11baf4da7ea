//! A table of the publication that is no outbox is mentioned once, however often it is described. In a
//! process of its own, since a logger can be set only once.

use jetstream_outbox::outbox::mapper::{ColumnInfo, Mapper, TableName};
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
    let named = TableName {
        schema: None,
        name: "outbox".to_string(),
    };
    for (tables, expected) in [
        (vec![], vec!["public.users", "a b.\n\"x"]),
        (vec![named], vec![]),
    ] {
        let mut mapper = Mapper::new("events", &tables);
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
