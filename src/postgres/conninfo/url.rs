//! The URL form of a connection string.
//!
//! libpq's reading, which differs from RFC 3986: the user ends at the first `@`, several hosts stand
//! between commas, and a plus sign is no space.
//! Source: <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS>.

use super::ConnInfoError;
use crate::uri::percent_decode;

/// Is it one? If so, what follows the scheme.
pub(super) fn strip_scheme(text: &str) -> Option<&str> {
    text.strip_prefix("postgresql://")
        .or_else(|| text.strip_prefix("postgres://"))
}

/// The pairs that the `key=value` form would have; a later one counts more than an earlier one of the same key.
pub(super) fn parse(text: &str) -> Result<Vec<(String, String)>, ConnInfoError> {
    let mut pairs = Vec::new();
    let mut add = |key: &str, value: String| {
        if !value.is_empty() {
            pairs.push((key.to_string(), value));
        }
    };

    let mut rest = text;
    let userinfo = text.split_once('@');
    if let Some((userinfo, after)) = userinfo.filter(|(before, _)| !before.contains('/')) {
        let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
        add("user", decode(user, "the user")?);
        add("password", decode(password, "the password")?);
        rest = after;
    }

    let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    if authority.contains('@') {
        return Err(ConnInfoError::Url(
            "a second `@`; write one in the user or the password as %40",
        ));
    }
    let (dbname, query) = path.split_once('?').unwrap_or((path, ""));
    // a password with a slash would be taken for a port and a database, whose name is logged
    if dbname.contains('@') {
        return Err(ConnInfoError::Url(
            "an `@` after the first slash; write a slash in the user or the password as %2F, and an @ in the database's name as %40",
        ));
    }
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for one in authority.split(',') {
        let (host, port) = host_and_port(one)?;
        hosts.push(decode(host, "a host")?);
        ports.push(decode(port, "a port")?);
    }
    // empty ones among several keep their place; nothing at all leaves it to the environment
    for (key, list) in [("host", hosts), ("port", ports)] {
        if list.iter().any(|one| !one.is_empty()) {
            add(key, list.join(","));
        }
    }

    add(
        "dbname",
        decode(dbname.strip_prefix('/').unwrap_or(dbname), "the database")?,
    );
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .filter(|(_, value)| !value.contains('='))
            .ok_or(ConnInfoError::Url(
                "a parameter after `?` that is not key=value",
            ))?;
        let (key, value) = (
            decode(key, "a parameter after `?`")?,
            decode(value, "a parameter after `?`")?,
        );
        // JDBC's spelling, which libpq takes too
        match (key.as_str(), value.as_str()) {
            ("ssl", "true") => pairs.push(("sslmode".into(), "require".into())),
            _ => pairs.push((key, value)),
        }
    }
    Ok(pairs)
}

/// `host`, `host:port`, `[IPv6]` or `[IPv6]:port`, either part possibly empty.
fn host_and_port(text: &str) -> Result<(&str, &str), ConnInfoError> {
    let Some(bracketed) = text.strip_prefix('[') else {
        return Ok(text.split_once(':').unwrap_or((text, "")));
    };
    let (host, after) = bracketed.split_once(']').ok_or(ConnInfoError::Url(
        "an IPv6 address without its closing bracket",
    ))?;
    match (host, after.strip_prefix(':')) {
        ("", _) => Err(ConnInfoError::Url("an empty IPv6 address")),
        (host, Some(port)) => Ok((host, port)),
        (host, None) if after.is_empty() => Ok((host, "")),
        _ => Err(ConnInfoError::Url(
            "something other than a port after an IPv6 address",
        )),
    }
}

/// Resolves `%xx`. The text itself stays out of the error: it may be a password.
fn decode(text: &str, what: &'static str) -> Result<String, ConnInfoError> {
    let decoded = percent_decode(text).filter(|it| !it.contains('\0'));
    decoded.ok_or(ConnInfoError::Percent(what))
}
