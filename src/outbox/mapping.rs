//! What the operator says about the outbox: which columns of which tables make an event, and how.
//!
//! Values only, as the flags give them and [`crate::config`] has checked them. What they come to for one table is
//! worked out by [`super::mapper`] once Postgres has described it.

use super::flags::Flags;
use super::header::check_name;
use super::park::Policy;
use super::plan::{HEADERS, TRACE_CONTEXT, TYPE};
use super::template::Template;
use crate::postgres::identifier::identifier;
use std::fmt;

/// Which rows become events, and what of them.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First part of every subject; has passed [`super::subject::validate_prefix`].
    pub prefix: String,
    /// For every table that is not named.
    pub default: TableMapping,
    /// The only tables to relay, each with its own mapping; none: every table that has the columns.
    pub tables: Vec<NamedTable>,
    /// The prefix of the transactional messages that are events too; `None`: none are.
    pub message_prefix: Option<String>,
    /// `ce-source` of the CloudEvents that events are to be, in binary mode.
    pub cloudevents: Option<String>,
    /// Each event says when its transaction was committed, and that one's id.
    pub position_headers: bool,
    /// What becomes of an event that cannot be published as it is.
    pub policy: Policy,
}

impl Mapping {
    /// The seed's table: `id`, `aggregatetype`, `aggregateid`, `payload`.
    pub fn new(prefix: &str) -> Mapping {
        Mapping {
            prefix: prefix.to_string(),
            default: TableMapping::default(),
            tables: Vec::new(),
            message_prefix: None,
            cloudevents: None,
            position_headers: false,
            policy: Policy::default(),
        }
    }

    /// The flags that make events.
    pub fn flags(&self, publication: &str) -> Flags {
        let columns = |it: &TableMapping| {
            let mut names = it.needed_columns();
            names.extend(it.own_columns());
            names.join(",")
        };
        let tables = self.tables.iter();
        let mut parts: Vec<String> = tables
            .map(|named| format!("{}({})", named.table, columns(&named.mapping)))
            .collect();
        parts.push(format!("*({})", columns(&self.default)));
        parts.extend(self.message_prefix.iter().map(|it| format!("message {it}")));
        // one needs a type
        parts.extend(self.cloudevents.iter().map(|_| "cloudevents".to_string()));
        // the order in which they were given is no matter
        parts.sort_unstable();
        Flags::new(publication, self.message_prefix.is_some(), &parts.join(" "))
    }

    /// The mapping for a table, unless it is left out.
    pub fn of_table(&self, schema: &str, name: &str) -> Option<&TableMapping> {
        if self.tables.is_empty() {
            return Some(&self.default);
        }
        let named = self
            .tables
            .iter()
            .find(|named| named.table.matches(schema, name));
        named.map(|named| &named.mapping)
    }

    /// The headers to which a column of any table is mapped.
    pub fn header_names(&self) -> impl Iterator<Item = &str> {
        let named = self.tables.iter().map(|table| &table.mapping);
        let headers = named.chain([&self.default]).flat_map(|it| &it.headers);
        headers.map(|header| header.name.as_str())
    }

    /// A column is mapped to this header, in whatever case.
    pub fn has_header(&self, name: &str) -> bool {
        let mut headers = self.header_names();
        headers.any(|header| header.eq_ignore_ascii_case(name))
    }

    /// The mapping for messages: the default's, over the members that a message always has.
    pub fn of_messages(&self) -> TableMapping {
        TableMapping {
            subject: self.default.subject.clone(),
            headers: self.default.headers.clone(),
            ..TableMapping::default()
        }
    }
}

/// A table, or several, as `-table` names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTable {
    /// Which.
    pub table: TableName,
    /// How their rows become events.
    pub mapping: TableMapping,
}

/// A table as `pg_class` and `pg_namespace` spell it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    /// `None`: in any schema.
    pub schema: Option<String>,
    /// The table.
    pub name: String,
    /// Every table whose name begins so: the partitions of one that are published under their own names.
    pub and_longer: bool,
}

impl TableName {
    /// As SQL spells it, quoted where it must be.
    pub fn sql(&self) -> String {
        match &self.schema {
            Some(schema) => format!("{}.{}", identifier(schema), identifier(&self.name)),
            None => identifier(&self.name),
        }
    }

    /// Whether the table `schema.name` is meant.
    pub fn matches(&self, schema: &str, name: &str) -> bool {
        self.schema.as_deref().is_none_or(|own| own == schema)
            && match self.and_longer {
                true => name.starts_with(&self.name),
                false => name == self.name,
            }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
        if let Some(schema) = &self.schema {
            write!(f, "{}.", quoted(schema))?;
        }
        f.write_str(&quoted(&self.name))?;
        f.write_str(if self.and_longer { "*" } else { "" })
    }
}

/// Which columns of a table make an event. Names are compared as they are, in their case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableMapping {
    /// The column of the message id.
    pub id: String,
    /// What `{aggregatetype}` means.
    pub aggregatetype: String,
    /// What `{aggregateid}` means.
    pub aggregateid: String,
    /// The column of the body.
    pub payload: String,
    /// The subject.
    pub subject: Template,
    /// Columns that become headers.
    pub headers: Vec<HeaderColumn>,
    /// The json or jsonb column whose members become headers; `None`: one called `headers`, if there is one.
    pub headers_column: Option<String>,
}

impl Default for TableMapping {
    fn default() -> TableMapping {
        let [id, aggregatetype, aggregateid, payload] =
            ["id", "aggregatetype", "aggregateid", "payload"].map(str::to_string);
        TableMapping {
            id,
            aggregatetype,
            aggregateid,
            payload,
            subject: Template::default(),
            headers: Vec::new(),
            headers_column: None,
        }
    }
}

impl TableMapping {
    /// The column behind a name in the template: `id`, `aggregatetype`, `aggregateid` and `payload` mean the
    /// columns that were chosen for them.
    pub fn column<'a>(&'a self, name: &'a str) -> &'a str {
        match name {
            "id" => &self.id,
            "aggregatetype" => &self.aggregatetype,
            "aggregateid" => &self.aggregateid,
            "payload" => &self.payload,
            other => other,
        }
    }

    /// The columns that a table must have.
    pub fn needed_columns(&self) -> Vec<&str> {
        let mut needed = vec![self.id.as_str(), &self.payload];
        needed.extend(self.subject.columns().map(|name| self.column(name)));
        needed.extend(self.headers.iter().map(|header| header.column.as_str()));
        needed.extend(self.headers_column.as_deref());
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    /// The columns that only an outbox has: a table with one of them is meant as one.
    pub fn own_columns(&self) -> Vec<&str> {
        let of_subject = self.subject.columns().map(|name| self.column(name));
        let mut own = vec![self.aggregatetype.as_str(), &self.aggregateid];
        own.extend(of_subject);
        own.retain(|&name| name != self.id && name != self.payload);
        own
    }

    /// The columns that take part in an event where a table has them.
    pub fn optional_columns(&self) -> Vec<&str> {
        let mut optional = TRACE_CONTEXT.to_vec();
        if self.headers_column.is_none() {
            optional.push(HEADERS);
        }
        optional
    }

    /// Every column that may take part in an event.
    pub fn used_columns(&self) -> Vec<&str> {
        let mut used = self.needed_columns();
        used.extend(self.own_columns());
        used.extend(self.optional_columns());
        used.push(TYPE);
        used
    }

    /// The columns that an event needs and that are not among those of a table; `cloud_events`: one needs a type, too.
    pub fn missing_columns(&self, cloud_events: bool, has: impl Fn(&str) -> bool) -> Vec<String> {
        let mut needed = vec![self.id.as_str()];
        needed.extend(self.subject.columns().map(|name| self.column(name)));
        needed.extend(self.needed_columns());
        if cloud_events && !has(&self.aggregatetype) {
            needed.push(TYPE);
        }
        let mut missing: Vec<String> = Vec::new();
        for column in needed {
            if !has(column) && !missing.iter().any(|known| known == column) {
                missing.push(column.to_string());
            }
        }
        missing
    }
}

/// `-header column=Name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderColumn {
    /// The column.
    pub column: String,
    /// The header; has passed [`check_name`].
    pub name: String,
}

impl fmt::Display for HeaderColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.column, self.name)
    }
}

impl HeaderColumn {
    /// Reads `column` or `column=Name`. The error completes a sentence that begins with the text.
    pub fn parse(text: &str) -> Result<HeaderColumn, String> {
        let (column, name) = text.split_once('=').unwrap_or((text, text));
        if column.is_empty() {
            return Err("names no column".to_string());
        }
        check_name(name).map_err(|error| error.to_string())?;
        Ok(HeaderColumn {
            column: column.to_string(),
            name: name.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_found_in_the_default_and_in_each_table() {
        let header = |text| HeaderColumn::parse(text).unwrap();
        let mut mapping = Mapping::new("events");
        mapping.default.headers.push(header("a=X"));
        assert!(!mapping.has_header("Nats-TTL"));
        mapping.default.headers.push(header("ttl=nats-ttl"));
        assert!(mapping.has_header("Nats-TTL"));
        let mapping = Mapping {
            tables: vec![NamedTable {
                table: TableName {
                    schema: None,
                    name: "t".into(),
                    and_longer: false,
                },
                mapping: std::mem::take(&mut mapping.default),
            }],
            ..mapping
        };
        assert!(mapping.has_header("Nats-TTL") && mapping.default.headers.is_empty());
    }

    #[test]
    fn flags_are_the_same_in_any_order() {
        let flags = |tables: [&str; 2], prefix: &str| {
            let named = tables.map(|name| NamedTable {
                table: TableName {
                    schema: None,
                    name: name.into(),
                    and_longer: false,
                },
                mapping: TableMapping::default(),
            });
            let mapping = Mapping {
                tables: named.into(),
                message_prefix: Some(prefix.into()),
                ..Mapping::new("events")
            };
            mapping.flags("p")
        };
        assert_eq!(flags(["a", "b"], "m"), flags(["b", "a"], "m"));
        assert_ne!(flags(["a", "b"], "m"), flags(["a", "c"], "m"));
        assert_ne!(flags(["a", "b"], "m"), flags(["a", "b"], "n"));
    }

    #[test]
    fn a_table_is_named_with_or_without_its_schema_and_by_its_beginning() {
        let named = |schema: Option<&str>, name: &str, and_longer| TableName {
            schema: schema.map(str::to_string),
            name: name.to_string(),
            and_longer,
        };
        for (pattern, table, expected) in [
            (named(None, "outbox", false), ("shop", "outbox"), true),
            (named(None, "outbox", false), ("shop", "outbox_2"), false),
            (
                named(Some("shop"), "outbox", false),
                ("shop", "outbox"),
                true,
            ),
            (
                named(Some("Shop"), "outbox", false),
                ("shop", "outbox"),
                false,
            ),
            (named(None, "outbox", true), ("shop", "outbox_2"), true),
            (named(None, "outbox", true), ("shop", "outbox"), true),
            (named(None, "outbox", true), ("shop", "the_outbox"), false),
            (
                named(Some("a"), "outbox", true),
                ("shop", "outbox_2"),
                false,
            ),
        ] {
            let (schema, name) = table;
            assert_eq!(
                pattern.matches(schema, name),
                expected,
                "{pattern} {table:?}"
            );
        }
    }

    #[test]
    fn header_columns() {
        for (text, expected) in [
            ("tenant", Ok(("tenant", "tenant"))),
            ("tenant=X-Tenant", Ok(("tenant", "X-Tenant"))),
            ("a b=X", Ok(("a b", "X"))),
            ("ttl=Nats-TTL", Ok(("ttl", "Nats-TTL"))),
            ("", Err("no column")),
            ("=X", Err("no column")),
            ("a=", Err("header")),
            ("a b", Err("header")),
            ("a=b=c", Ok(("a", "b=c"))),
            ("a=Nats-Msg-Id", Err("NATS")),
            ("a=outbox-position", Err("relay")),
        ] {
            let found = HeaderColumn::parse(text);
            match (&found, expected) {
                (Ok(header), Ok((column, name))) => {
                    assert_eq!(
                        (header.column.as_str(), header.name.as_str()),
                        (column, name)
                    );
                }
                (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
                _ => panic!("{text:?}: {found:?}"),
            }
        }
    }
}
