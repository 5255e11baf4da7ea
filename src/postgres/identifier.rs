//! Names in the statements that a person is told to run: with no quotes where none are needed, since a log line has
//! quotes of its own.
//! Source: <https://www.postgresql.org/docs/current/sql-keywords-appendix.html>.

/// A name as SQL spells it, quoted where it must be.
pub fn identifier(name: &str) -> String {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let reserved = || RESERVED.split(' ').any(|word| word == name);
    let starts_well = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_');
    match starts_well && name.chars().all(plain) && !reserved() {
        true => name.to_string(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}

/// The words that no table, column, role or publication may be called without quotes, of Postgres 12 to 18: those of
/// `pg_get_keywords()` with the `catcode` R or T.
const RESERVED: &str = "\
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation \
    column concurrently constraint create cross current_catalog current_date current_role current_schema \
    current_time current_timestamp current_user default deferrable desc distinct do else end except false fetch for \
    foreign freeze from full grant group having ilike in initially inner intersect into is isnull join lateral \
    leading left like limit localtime localtimestamp natural not notnull null offset on only or order outer overlaps \
    placing primary references returning right select session_user similar some symmetric system_user table \
    tablesample then to trailing true union unique user using variadic verbose when where window with";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_where_sql_asks_for_it() {
        for (name, text) in [
            ("outbox", "outbox"),
            ("_o1", "_o1"),
            ("1o", "\"1o\""),
            ("Outbox", "\"Outbox\""),
            ("a b", "\"a b\""),
            ("a\"b", "\"a\"\"b\""),
            ("order", "\"order\""),
            ("to", "\"to\""),
            ("all", "\"all\""),
            ("with", "\"with\""),
            ("value", "value"),
            ("t", "t"),
            ("", "\"\""),
        ] {
            assert_eq!(identifier(name), text);
        }
    }
}
