//! Columns whose type makes something else of their values than one may expect.

use super::publication::{MOST, relayed, whole};
use super::{Facts, Finding, fail, ok, warn};
use crate::config::Config;
use crate::postgres::identifier::identifier;

/// The column whose members become headers can hold none unless it is JSON.
pub fn of_headers(facts: &Facts, config: &Config) -> Vec<Finding> {
    const NAME: &str = "postgres.headers_column";
    let mut findings = Vec::new();
    for tree in facts.outboxes.trees() {
        // partitions are alike
        let Some((table, mapping)) = relayed(tree, config).next() else {
            continue;
        };
        let wanted = mapping.headers_column.as_ref();
        let Some(column) = table.column(wanted.map_or("headers", String::as_str)) else {
            continue;
        };
        let (text, quoted) = (whole(tree, table).sql(), identifier(&column.name));
        let found = format!("column {quoted} of table {text} is {}", column.kind);
        let fix =
            format!("ALTER TABLE {text} ALTER COLUMN {quoted} TYPE jsonb USING {quoted}::jsonb;");
        findings.push(match wanted {
            _ if matches!(column.kind.as_str(), "json" | "jsonb") => ok(NAME, found),
            Some(_) => fail(
                NAME,
                found,
                "headers are read from the members of json or jsonb",
                fix,
            ),
            None => warn(
                NAME,
                found,
                "it is not json or jsonb, so no event gets headers from it",
                format!("{fix} -- or call it something else, if it holds no headers"),
            ),
        });
        if findings.len() == MOST {
            break;
        }
    }
    findings
}

/// A domain has a number of its own in the replication stream, which does not tell what it is over.
pub fn of_payload(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for tree in facts.outboxes.trees() {
        // partitions are alike
        let Some((table, mapping)) = relayed(tree, config).next() else {
            continue;
        };
        let column = table.column(&mapping.payload);
        let Some((column, base)) = column.and_then(|it| Some((it, it.base.as_deref()?))) else {
            continue;
        };
        let (text, quoted) = (whole(tree, table).sql(), identifier(&column.name));
        let becomes = match base {
            "json" | "jsonb" => "with its white space, and empty where it is NULL",
            "bytea" => "in hexadecimal",
            _ => continue,
        };
        findings.push(warn(
            "postgres.payload_column",
            format!(
                "column {quoted} of table {text} is {}, a domain over {base}",
                column.kind
            ),
            format!("the relay does not know what a domain is over: the body is the text, {becomes}"),
            format!("ALTER TABLE {text} ALTER COLUMN {quoted} TYPE {base}; -- or leave it, if consumers want the text"),
        ));
        if findings.len() == MOST {
            break;
        }
    }
    findings
}
