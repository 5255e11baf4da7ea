//! Rows that an UPDATE moves: Postgres sends them as if they were inserted, so that there is an event which nobody inserted.
//!
//! Sources: <https://www.postgresql.org/docs/current/logical-replication-row-filter.html>, and `ExecCrossPartitionUpdate` of
//! nodeModifyTable.c.

use super::outbox_sql::keep_partition;
use super::outboxes::Key;
use super::publication::{MOST, list, relayed};
use super::{Facts, Finding, warn};
use crate::config::Config;
use crate::postgres::identifier::identifier;

/// Postgres sends the row of an UPDATE that moves it to another partition as an insert.
pub fn by_partitions(facts: &Facts, config: &Config) -> Vec<Finding> {
    const WHY: &str =
        "Postgres sends such a row as a new one, so that its event is published again";
    let mut findings = Vec::new();
    for tree in facts.outboxes.trees() {
        let Some((_, mapping)) = relayed(tree, config).next() else {
            continue;
        };
        // nobody changes what an event says
        let used = mapping.used_columns();
        let is_kept = |key: &Key| {
            let mut columns = key.columns.iter();
            let is_event = |name: &String| used.contains(&name.as_str());
            key.kept || !key.moves || !key.columns.is_empty() && columns.all(is_event)
        };
        let moves = tree.iter().find_map(|table| {
            let key = table.key.as_ref().filter(|key| !is_kept(key))?;
            Some((table, key))
        });
        if let Some((table, key)) = moves {
            let fix = keep_partition(facts.version, table, key)
                .unwrap_or_else(|| "delete such a row instead of updating it".into());
            findings.push(warn(
                "postgres.partition_moves",
                format!(
                    "table {} is partitioned by {}, which an UPDATE may change",
                    table.sql(),
                    key.text
                ),
                WHY,
                format!("{fix} -- it makes Postgres refuse the UPDATE; delete the row instead"),
            ));
        }
        if findings.len() == MOST {
            break;
        }
    }
    findings
}

/// It sends the row of an UPDATE that its row filter lets in as an insert, where it publishes updates.
pub fn by_filters(facts: &Facts, config: &Config) -> Vec<Finding> {
    let publication = facts.outboxes.publication.as_ref();
    if !publication.is_some_and(|publication| publication.updates) {
        return Vec::new();
    }
    let relayed = (facts.outboxes.trees()).flat_map(|tree| relayed(tree, config));
    let filtered = relayed.filter(|(table, _)| table.filter.is_some());
    let names: Vec<String> = filtered.map(|(table, _)| table.sql()).collect();
    let name = identifier(&config.publication);
    match names.is_empty() {
        true => Vec::new(),
        false => vec![warn(
            "postgres.filter_moves",
            format!(
                "publication {name} publishes updates, and has a row filter for {}",
                list(&names)
            ),
            "Postgres sends a row that an UPDATE makes pass the filter as a new one, so that there is an event which nobody inserted",
            format!("ALTER PUBLICATION {name} SET (publish = 'insert');"),
        )],
    }
}
