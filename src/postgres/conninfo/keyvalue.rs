//! The `key=value` form of a connection string, with libpq's quoting.
//!
//! Source: <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE>.

use super::ConnInfoError;

/// The pairs in the order they stand. Errors name places and not words, which may be parts of a password.
pub(super) fn parse(text: &str) -> Result<Vec<(String, String)>, ConnInfoError> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let place = text.len() - rest.len();
        let syntax = |what| ConnInfoError::Syntax { what, place };
        let (key, after) = rest
            .split_once('=')
            .ok_or(syntax("a keyword without `=` and a value"))?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(syntax("a keyword without `=` and a value"));
        }
        let (value, after) =
            value(after.trim_start()).ok_or(syntax("a quoted value that does not end"))?;
        pairs.push((key.to_string(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// Takes a value off the front: to the closing quote, or to the next white space. A backslash makes the
/// next character an ordinary one.
fn value(text: &str) -> Option<(String, &str)> {
    let quoted = text.strip_prefix('\'');
    let mut chars = quoted.unwrap_or(text).chars();
    let mut value = String::new();
    loop {
        let rest = chars.as_str();
        match chars.next() {
            Some('\\') => value.extend(chars.next()),
            Some('\'') if quoted.is_some() => return Some((value, chars.as_str())),
            Some(c) if quoted.is_none() && c.is_whitespace() => return Some((value, rest)),
            Some(c) => value.push(c),
            None if quoted.is_some() => return None,
            None => return Some((value, rest)),
        }
    }
}
