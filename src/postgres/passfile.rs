//! The password file, `~/.pgpass` or PGPASSFILE.
//!
//! Source: <https://www.postgresql.org/docs/current/libpq-pgpass.html>.

use super::conninfo::{Address, ConnInfo, DEFAULT_SOCKET_DIRECTORY, Host};
use super::limits::MAX_FILE_BYTES;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The password for `host`, from the file that `info` names. A file that is missing, unreadable or open to
/// others gives none, as with libpq; the last two with a warning.
pub(super) fn look_up(info: &ConnInfo, host: &Host) -> Option<String> {
    let path = info.passfile.as_deref()?;
    let text = match read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            log::warn!(path:% = path.display(), cause:% = error; "password file ignored");
            return None;
        }
    };
    let name = match &host.address {
        // the socket of a host that was not given at all
        Address::Unix { directory } if directory == DEFAULT_SOCKET_DIRECTORY => "localhost",
        Address::Unix { directory } => directory,
        Address::Tcp { name, .. } => name,
    };
    find(
        &text,
        [name, &host.port.to_string(), &info.dbname, &info.user],
    )
}

fn read(path: &Path) -> io::Result<String> {
    let file = std::fs::File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(io::Error::other(
            "group or world can access it; make it 0600",
        ));
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// The password of the first line whose host, port, database and user are `wanted` or `*`.
fn find(text: &str, wanted: [&str; 4]) -> Option<String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| {
            let mut rest = line;
            for value in wanted {
                let (found, after) = field(rest)?;
                if found != "*" && unescape(found) != value {
                    return None;
                }
                rest = after;
            }
            Some(unescape(rest)).filter(|password| !password.is_empty())
        })
}

/// Up to the next colon that has no backslash before it.
fn field(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    let end = text.find(|c| {
        let ends = c == ':' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })?;
    Some((text.get(..end)?, text.get(end + 1..)?))
}

/// A backslash makes the next character an ordinary one.
fn unescape(text: &str) -> String {
    let mut chars = text.chars();
    let mut plain = String::with_capacity(text.len());
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.extend(chars.next()),
            c => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_fits_gives_the_password() {
        let text = r"# a comment
h:5432:db:u:exact
h:*:*:u:any port and database
\:\:1:5432:db:u:escaped host
h2:5432:db:us\:er:escaped user
h3:5432:db:u:p\:a\\s:s
short:5432:db
h4:5432:db:u:
*:*:*:last:fallback
";
        for (wanted, expected) in [
            (["h", "5432", "db", "u"], Some("exact")),
            (["h", "5433", "x", "u"], Some("any port and database")),
            (["::1", "5432", "db", "u"], Some("escaped host")),
            (["h2", "5432", "db", "us:er"], Some("escaped user")),
            (["h3", "5432", "db", "u"], Some(r"p:a\s:s")),
            (["short", "5432", "db", "u"], None),
            (["h4", "5432", "db", "u"], None),
            (["elsewhere", "1", "db", "last"], Some("fallback")),
            (["elsewhere", "1", "db", "u"], None),
            (["# a comment", "5432", "db", "u"], None),
        ] {
            assert_eq!(find(text, wanted).as_deref(), expected, "{wanted:?}");
        }
    }
}
