//! What of a connection string may be shown. Where it is not certain what is a password, nothing is.

/// Stands for what is not shown.
pub(super) const HIDDEN: &str = "***";

/// Whether a password, or the key to one, stands in the connection string. In doubt it does.
pub(super) fn conninfo_has_password(conninfo: &str) -> bool {
    let userinfo = conninfo
        .split_once("://")
        .and_then(|(_, rest)| rest.rsplit_once('@'))
        .map_or("", |(userinfo, _)| userinfo);
    userinfo.contains(':') || conninfo.to_ascii_lowercase().contains("password")
}

/// `user@host/dbname`; [`HIDDEN`] where it cannot be told for certain what is a password.
pub(super) fn redact_conninfo(conninfo: &str) -> String {
    if conninfo.is_empty() {
        return "environment".to_string();
    }
    let url = ["postgres://", "postgresql://"]
        .iter()
        .find_map(|scheme| conninfo.strip_prefix(scheme));
    let (user, host, dbname) = match url {
        Some(rest) => {
            let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            if tail.contains('@') {
                return HIDDEN.to_string();
            }
            let (userinfo, host) = authority.rsplit_once('@').unwrap_or(("", authority));
            let path = tail.split('?').next().unwrap_or_default();
            (
                userinfo.split(':').next().unwrap_or_default(),
                host,
                path.trim_start_matches('/'),
            )
        }
        None => {
            let words = || conninfo.split_ascii_whitespace();
            if conninfo.contains(['\'', '\\']) || !words().all(|word| word.contains('=')) {
                return HIDDEN.to_string();
            }
            let value = |name: &str| {
                words()
                    .filter_map(|word| word.split_once('='))
                    .find(|(key, _)| *key == name)
                    .map_or("", |(_, value)| value)
            };
            (value("user"), value("host"), value("dbname"))
        }
    };
    // libpq takes a whole connection string for a dbname
    if [user, host, dbname]
        .iter()
        .any(|part| part.contains(['=', '@']))
    {
        return HIDDEN.to_string();
    }
    let at = if user.is_empty() { "" } else { "@" };
    format!("{user}{at}{host}/{dbname}")
}

/// The server without its user, password or token.
pub(super) fn redact_server(server: &str) -> String {
    match (server.split_once("://"), server.rsplit_once('@')) {
        (_, None) => server.to_string(),
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{HIDDEN}@{host}"),
        (None, Some((_, host))) => format!("{HIDDEN}@{host}"),
    }
}
