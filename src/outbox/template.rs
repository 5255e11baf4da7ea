//! The subject template of `-subject`: how a subject is made of a row's columns.
//!
//! `{prefix}.{aggregatetype}.{aggregateid}` is the default. A template is `{prefix}.` and then any mixture of
//! `{column}`, `{column:lower}` and literal text; a dot of the literal text separates tokens. It begins with the
//! prefix because the streams that are the relay's are found by `prefix.>`, and because no value then reaches a
//! subject of the server's own. A value is written by the rule of [`super::subject`], wherever it stands.
//!
//! Pure text here: which columns a table has is known when Postgres describes it, see [`super::mapper`].

use super::percent;
use super::subject::{MAX_PREFIX_LEN, MAX_SUBJECT_LEN, is_illegal, write_value};
use std::fmt;
use std::str::FromStr;

/// The default of `-subject`.
pub const DEFAULT: &str = "{prefix}.{aggregatetype}.{aggregateid}";

/// Columns that one template may name: with more, each would have too little room in a subject.
pub const MAX_COLUMNS: usize = 8;

/// Bytes of literal text that a template may have.
const MAX_TEXT_LEN: usize = 255;

const PREFIX: &str = "{prefix}.";

/// A template that keeps to the grammar. Displayed as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// What follows `{prefix}.`.
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Column { name: String, lower: bool },
}

/// Why a text is no template. Display completes a sentence that begins with the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateError {
    /// It does not begin with `{prefix}.`, or names the prefix again.
    Prefix,
    /// A brace has no partner, or nothing between the two.
    Brace,
    /// What follows the colon in `{column:…}`.
    Modifier(String),
    /// Literal text that cannot stand in a subject, or would be taken for an escape.
    Illegal(char),
    /// Two dots in a row, or one at the end.
    EmptyToken,
    /// More than [`MAX_COLUMNS`] columns.
    TooManyColumns,
    /// More than `MAX_TEXT_LEN` bytes of literal text.
    TooLong,
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TemplateError::Prefix => f.write_str(
                "must begin with {prefix}. and name the prefix only there: the relay's streams are found by it",
            ),
            TemplateError::Brace => f.write_str("has a brace that is not part of a {column}"),
            TemplateError::Modifier(modifier) => {
                write!(f, "has :{modifier} in a column; there is only :lower")
            }
            TemplateError::Illegal(c) => write!(
                f,
                "has {c:?} between its columns; wildcards, white space, control characters and % cannot stand there"
            ),
            TemplateError::EmptyToken => {
                f.write_str("has an empty part: two dots in a row, or one at the end")
            }
            TemplateError::TooManyColumns => {
                write!(f, "names more than {MAX_COLUMNS} columns")
            }
            TemplateError::TooLong => {
                write!(f, "has more than {MAX_TEXT_LEN} bytes between its columns")
            }
        }
    }
}

impl std::error::Error for TemplateError {}

impl Default for Template {
    fn default() -> Template {
        let column = |name: &str| Part::Column {
            name: name.to_string(),
            lower: false,
        };
        Template {
            parts: vec![
                column("aggregatetype"),
                Part::Text(".".to_string()),
                column("aggregateid"),
            ],
        }
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        for part in &self.parts {
            match part {
                Part::Text(text) => f.write_str(text)?,
                Part::Column { name, lower: false } => write!(f, "{{{name}}}")?,
                Part::Column { name, lower: true } => write!(f, "{{{name}:lower}}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Template, TemplateError> {
        let mut rest = text.strip_prefix(PREFIX).ok_or(TemplateError::Prefix)?;
        let mut parts = Vec::new();
        while !rest.is_empty() {
            let (part, after) = match rest.strip_prefix('{') {
                Some(inside) => {
                    let (inside, after) = inside.split_once('}').ok_or(TemplateError::Brace)?;
                    (column(inside)?, after)
                }
                None => {
                    let end = rest.find('{').unwrap_or(rest.len());
                    let (literal, after) = rest.split_at_checked(end).unwrap_or((rest, ""));
                    (Part::Text(check_text(literal)?), after)
                }
            };
            parts.push(part);
            rest = after;
        }
        check_tokens(&parts)?;
        Ok(Template { parts })
    }
}

fn column(inside: &str) -> Result<Part, TemplateError> {
    let (name, lower) = match inside.rsplit_once(':') {
        None => (inside, false),
        Some((name, "lower")) => (name, true),
        Some((_, modifier)) => return Err(TemplateError::Modifier(modifier.to_string())),
    };
    match name {
        "" => Err(TemplateError::Brace),
        "prefix" => Err(TemplateError::Prefix),
        _ if name.contains('{') => Err(TemplateError::Brace),
        _ => Ok(Part::Column {
            name: name.to_string(),
            lower,
        }),
    }
}

fn check_text(text: &str) -> Result<String, TemplateError> {
    if text.contains('}') {
        return Err(TemplateError::Brace);
    }
    match text.chars().find(|&c| is_illegal(c) || c == '%') {
        Some(c) => Err(TemplateError::Illegal(c)),
        None => Ok(text.to_string()),
    }
}

fn check_tokens(parts: &[Part]) -> Result<(), TemplateError> {
    let (mut columns, mut text_len) = (0, 0);
    // a column stands for at least one character
    let mut skeleton = String::new();
    for part in parts {
        match part {
            Part::Text(text) => {
                text_len += text.len();
                skeleton.push_str(text);
            }
            Part::Column { .. } => {
                columns += 1;
                skeleton.push('x');
            }
        }
    }
    if columns > MAX_COLUMNS {
        Err(TemplateError::TooManyColumns)
    } else if text_len > MAX_TEXT_LEN {
        Err(TemplateError::TooLong)
    } else if skeleton.split('.').any(str::is_empty) {
        Err(TemplateError::EmptyToken)
    } else {
        Ok(())
    }
}

impl Template {
    /// The columns it names, each as often as it does.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Column { name, .. } => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// Values for its columns of which it makes this subject, if there are any: those that it was made of, or others that make the
    /// same one. What they make is to be compared, since a value may have been shortened or put in lower case.
    pub fn values(&self, prefix: &str, subject: &str) -> Option<Vec<(&str, String)>> {
        let mut rest = subject.strip_prefix(prefix)?.strip_prefix('.')?;
        let mut values = Vec::new();
        let mut parts = self.parts.iter().peekable();
        while let Some(part) = parts.next() {
            match part {
                Part::Text(text) => rest = rest.strip_prefix(text.as_str())?,
                Part::Column { name, .. } => {
                    let end = match parts.peek() {
                        // a value has one character at least
                        Some(Part::Text(text)) => rest.get(1..)?.find(text.as_str())? + 1,
                        _ => rest.len(),
                    };
                    let (value, after) = rest.split_at_checked(end)?;
                    values.push((name.as_str(), percent::decode(value)?));
                    rest = after;
                }
            }
        }
        rest.is_empty().then_some(values)
    }

    /// The template for one table: `slot` says where the value of a column is found.
    pub fn compile(&self, prefix: &str, mut slot: impl FnMut(&str) -> usize) -> Subject {
        let mut pieces = vec![Piece::Text(format!("{prefix}."))];
        for part in &self.parts {
            match (part, pieces.last_mut()) {
                (Part::Text(text), Some(Piece::Text(before))) => before.push_str(text),
                (Part::Text(text), _) => pieces.push(Piece::Text(text.clone())),
                (Part::Column { name, lower }, _) => pieces.push(Piece::Value {
                    slot: slot(name),
                    lower: *lower,
                }),
            }
        }
        let text_len: usize = pieces.iter().map(Piece::text_len).sum();
        let columns = self.columns().count().max(1);
        let room = (MAX_SUBJECT_LEN - MAX_PREFIX_LEN).saturating_sub(text_len - prefix.len());
        Subject {
            pieces,
            max_value_len: (room / columns).min(percent::MAX_LEN),
        }
    }
}

/// A template whose columns are found in the rows of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    pieces: Vec<Piece>,
    max_value_len: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Value { slot: usize, lower: bool },
}

impl Piece {
    fn text_len(&self) -> usize {
        match self {
            Piece::Text(text) => text.len(),
            Piece::Value { .. } => 0,
        }
    }
}

impl Subject {
    /// Appends the subject to `out`; `value` gives the text at a slot. Tells whether every value stands in it as it is.
    ///
    /// # Errors
    /// Those of `value`.
    pub fn write<'a, E>(
        &self,
        value: impl Fn(usize) -> Result<&'a str, E>,
        out: &mut Vec<u8>,
    ) -> Result<bool, E> {
        let mut plain = true;
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => out.extend_from_slice(text.as_bytes()),
                Piece::Value { slot, lower: false } => {
                    plain &= write_value(value(*slot)?, self.max_value_len, out);
                }
                Piece::Value { slot, lower: true } => {
                    plain &= write_value(&value(*slot)?.to_lowercase(), self.max_value_len, out);
                }
            }
        }
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    /// The subject of a row with these columns.
    fn subject(template: &str, row: &[(&str, &str)]) -> (String, bool) {
        let template: Template = template.parse().unwrap();
        let slot = |name: &str| row.iter().position(|(column, _)| *column == name).unwrap();
        let mut out = Vec::new();
        let value = |slot: usize| Ok::<_, Infallible>(row[slot].1);
        let Ok(plain) = template.compile("events", slot).write(value, &mut out);
        (String::from_utf8(out).unwrap(), plain)
    }

    #[test]
    fn values_are_found_that_make_the_same_subject() {
        for (template, row) in [
            (DEFAULT, &[("aggregatetype", "a"), ("aggregateid", "b")][..]),
            (DEFAULT, &[("aggregatetype", "a.b"), ("aggregateid", "c.d")]),
            (DEFAULT, &[("aggregatetype", ""), ("aggregateid", "ü *%")]),
            (DEFAULT, &[("aggregatetype", "."), ("aggregateid", "")]),
            ("{prefix}.{a}-v2.{b:lower}", &[("a", "x y"), ("b", "z")]),
            ("{prefix}.fixed.{a}.end", &[("a", "x")]),
            ("{prefix}.fixed", &[]),
        ] {
            let made = subject(template, row).0;
            let parsed: Template = template.parse().unwrap();
            let values = parsed.values("events", &made).unwrap();
            let values: Vec<(&str, &str)> = values.iter().map(|(n, v)| (*n, v.as_str())).collect();
            assert_eq!(subject(template, &values).0, made);
        }
        let default = Template::default();
        for none in ["events", "other.a.b", "events.a", "events.%~00.b"] {
            assert_eq!(default.values("events", none), None, "{none}");
        }
    }

    #[test]
    fn templates() {
        let row = [
            ("aggregatetype", "Account"),
            ("aggregateid", "a 1"),
            ("Tenant", "Ü.x"),
            ("odd:name", ".y"),
            ("empty", ""),
        ];
        for (template, expected, plain) in [
            (DEFAULT, "events.Account.a%201", false),
            ("{prefix}.{aggregatetype}", "events.Account", true),
            ("{prefix}.{aggregatetype:lower}", "events.account", true),
            ("{prefix}.{Tenant:lower}.v2", "events.ü.x.v2", true),
            (
                "{prefix}.{Tenant}.{aggregatetype}-created.{Tenant}",
                "events.Ü.x.Account-created.Ü.x",
                true,
            ),
            ("{prefix}.x{odd:name:lower}y", "events.x%2Eyy", false),
            ("{prefix}.x{empty}", "events.x%", false),
            ("{prefix}.all", "events.all", true),
        ] {
            assert_eq!(
                subject(template, &row),
                (expected.to_string(), plain),
                "{template}"
            );
            let parsed: Template = template.parse().unwrap();
            assert_eq!(parsed.to_string(), template);
        }
        assert_eq!(Ok(Template::default()), DEFAULT.parse());
    }

    #[test]
    fn what_is_no_template_is_refused_with_its_reason() {
        use TemplateError::*;
        let columns = |n: usize| format!("{{prefix}}.{}", "{c}".repeat(n));
        for (template, error) in [
            ("", Prefix),
            ("events.{aggregateid}", Prefix),
            ("{aggregatetype}.{prefix}", Prefix),
            ("{prefix}", Prefix),
            ("{prefix}x.{a}", Prefix),
            ("{prefix}.{prefix}", Prefix),
            ("{prefix}.", EmptyToken),
            ("{prefix}..{a}", EmptyToken),
            ("{prefix}.{a}.", EmptyToken),
            ("{prefix}.{a", Brace),
            ("{prefix}.{a}}", Brace),
            ("{prefix}.{}", Brace),
            ("{prefix}.{{a}", Brace),
            ("{prefix}.{:lower}", Brace),
            ("{prefix}.{a:upper}", Modifier("upper".to_string())),
            ("{prefix}.{a} b", Illegal(' ')),
            ("{prefix}.>", Illegal('>')),
            ("{prefix}.*", Illegal('*')),
            ("{prefix}.a%2E", Illegal('%')),
            ("{prefix}.a\r\n", Illegal('\r')),
            (&columns(9), TooManyColumns),
            (&format!("{{prefix}}.{}", "x".repeat(256)), TooLong),
        ] {
            assert_eq!(template.parse::<Template>(), Err(error), "{template:?}");
        }
        assert!(columns(8).parse::<Template>().is_ok());
    }

    #[test]
    fn a_subject_is_never_longer_than_a_line_allows() {
        let text = "x".repeat(MAX_TEXT_LEN - 8);
        let template = format!("{{prefix}}.{text}{}", ".{c}".repeat(MAX_COLUMNS));
        let template: Template = template.parse().unwrap();
        let long = "value ".repeat(10_000);
        let value = |_| Ok::<_, Infallible>(long.as_str());
        let mut out = Vec::new();
        let compiled = template.compile(&"p".repeat(MAX_PREFIX_LEN), |_| 0);
        let Ok(_) = compiled.write(value, &mut out);
        assert!(out.len() <= MAX_SUBJECT_LEN, "{}", out.len());
        assert!(compiled.max_value_len > 200);
    }
}
