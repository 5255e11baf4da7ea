//! What the values of settings must look like. Each function takes the text as typed; its error completes a
//! sentence that begins with that text.

use crate::outbox::mapping::{HeaderColumn, NamedTable, TableMapping, TableName};
use crate::outbox::template::Template;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

/// Above this the window is larger than any server answers at once, and costs memory alone.
pub(super) const INFLIGHT: RangeInclusive<usize> = 1..=65_536;
/// Shorter than a network round trip under load it would end healthy sessions; longer than an hour it hides outages.
pub(super) const CONNECT_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(120);
pub(super) const ACK_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(3600);
/// Shorter than a second there is no time for a single attempt to connect.
pub(super) const MAX_OUTAGE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::MAX;
/// Postgres keeps the WAL of the whole span: a day is as much as a disk should be asked for by a flag.
pub(super) const HOLD_BACK: RangeInclusive<Duration> =
    Duration::ZERO..=Duration::from_secs(24 * 3600);
/// Postgres' NAMEDATALEN less its terminator: longer names are cut off silently there.
const MAX_NAME_BYTES: usize = 63;

/// Source: `ReplicationSlotValidateName` in Postgres.
pub(super) fn check_slot(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(legal) {
        Ok(())
    } else {
        Err("is not a slot's name: 1 to 63 lower-case letters, digits and underscores".to_string())
    }
}

/// A name as ADR-8 has it. Source: the NATS clients' check of bucket names.
pub(super) fn parse_bucket(name: &str) -> Result<String, String> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    match name {
        "none" => Err(
            "is no longer possible: exactly-once delivery needs the checkpoint; allow the user what `jetstream-outbox setup \
             -print-nats` lists, or pass -delivery at-least-once"
                .to_string(),
        ),
        _ if !name.is_empty() && name.bytes().all(legal) => Ok(name.to_string()),
        _ => Err(
            "is not a bucket's name: letters, digits, underscores and dashes".to_string(),
        ),
    }
}

pub(super) fn check_publication(name: &str) -> Result<(), String> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains('\0') {
        Ok(())
    } else {
        Err("is not a publication's name: 1 to 63 bytes".to_string())
    }
}

/// The subject of `-prefix` and `-nats-api-prefix`: tokens between dots, none of them empty or a wildcard.
pub(super) fn check_subject(subject: &str) -> Result<(), String> {
    let legal = |c: char| !c.is_whitespace() && !c.is_control() && c != '*' && c != '>';
    if subject.split('.').any(str::is_empty) {
        Err("has an empty part: it is one or more words with a dot between them".to_string())
    } else if !subject.chars().all(legal) {
        Err("holds white space, a control character or a wildcard".to_string())
    } else {
        Ok(())
    }
}

pub(super) fn parse_inflight(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| INFLIGHT.contains(n));
    number.ok_or_else(|| {
        let (least, most) = INFLIGHT.into_inner();
        format!("is not a whole number from {least} to {most}")
    })
}

/// `9464` or `localhost:9464` for this machine alone, `:9464` for every address it has, both by IPv4 and IPv6; or an
/// address that is written out, `10.0.0.5:9464` or `[::1]:9464`.
pub(super) fn parse_listen(text: &str) -> Result<Vec<SocketAddr>, String> {
    let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let every: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    let (addresses, port) = match text.rsplit_once(':') {
        None => (loopback, text),
        Some(("", port)) => (every, port),
        Some((host, port)) if host.eq_ignore_ascii_case("localhost") => (loopback, port),
        Some(_) => {
            let address = text.parse().map(|address| vec![address]);
            return address.map_err(|_| NO_LISTEN_ADDRESS.to_string());
        }
    };
    let port: u16 = port.parse().map_err(|_| NO_LISTEN_ADDRESS.to_string())?;
    Ok(addresses.map(|ip| SocketAddr::new(ip, port)).into())
}

const NO_LISTEN_ADDRESS: &str = "is not a port like 9464 for this machine alone, :9464 for every address it has, or \
                                 an address and a port like 10.0.0.5:9464";

/// Go's duration syntax (`1h30m`, `1.5s`, `500ms`), and a plain number for seconds. Never negative.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return parse_duration(&format!("{text}s"));
    }
    let mut total: u128 = 0;
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at_checked(number_end)?;
        let unit_end = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at_checked(unit_end)?;
        rest = tail;
        let unit_ns: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let digits = |text: &str| match text {
            "" => Some(0),
            text => text.parse::<u64>().ok().map(u128::from),
        };
        total += digits(whole)? * unit_ns;
        total += digits(fraction)? * unit_ns / 10u128.checked_pow(fraction.len() as u32)?;
    }
    u64::try_from(total).ok().map(Duration::from_nanos)
}

pub(super) fn parse_duration_within(
    text: &str,
    range: RangeInclusive<Duration>,
) -> Result<Duration, String> {
    let Some(duration) = parse_duration(text) else {
        return Err("is not a duration like 500ms, 10s, 1h30m or a number of seconds".to_string());
    };
    if range.contains(&duration) {
        Ok(duration)
    } else if duration < *range.start() {
        Err(format!("is less than {:?}", range.start()))
    } else {
        Err(format!("is more than {:?}", range.end()))
    }
}

/// Tables as SQL spells them, separated by commas, each with what differs in its mapping from `default`:
/// `outbox, shop."Outbox":id=event_id,payload=body, events_*`.
pub(super) fn parse_tables(list: &str, default: &TableMapping) -> Result<Vec<NamedTable>, String> {
    let mut tables = Vec::new();
    let mut rest = list.trim_start();
    while !rest.is_empty() {
        let (table, tail) = table_name(rest)?;
        let mut mapping = default.clone();
        rest = match tail.strip_prefix(':') {
            Some(pairs) => table_settings(pairs, &mut mapping)?,
            None => tail,
        };
        tables.push(NamedTable { table, mapping });
        rest = match rest.strip_prefix(',') {
            Some(tail) if !tail.trim_start().is_empty() => tail.trim_start(),
            None if rest.is_empty() => rest,
            _ => {
                return Err(
                    "is not a list of tables like outbox, shop.outbox, \"My Schema\".\"Outbox\" or outbox:id=event_id"
                        .to_string(),
                );
            }
        };
    }
    Ok(tables)
}

/// Takes a table's name, a last `*` and the blanks behind it off the front.
fn table_name(text: &str) -> Result<(TableName, &str), String> {
    let (first, tail) = identifier(text)?;
    let (schema, name, tail) = match tail.strip_prefix('.') {
        None => (None, first, tail),
        Some(tail) => {
            let (name, tail) = identifier(tail.trim_start())?;
            (Some(first), name, tail)
        }
    };
    let (and_longer, tail) = match tail.strip_prefix('*') {
        Some(tail) => (true, tail.trim_start()),
        None => (false, tail),
    };
    let table = TableName {
        schema,
        name,
        and_longer,
    };
    Ok((table, tail))
}

/// Takes `key=value` pairs off the front, up to a comma that is followed by something else.
fn table_settings<'a>(pairs: &'a str, mapping: &mut TableMapping) -> Result<&'a str, String> {
    let mut rest = pairs;
    let mut first = true;
    // `-header` of the default is replaced by the first of the table's own, and these add up
    let mut own_headers = false;
    loop {
        let text = if first {
            rest
        } else {
            rest.strip_prefix(',').unwrap_or("")
        };
        let (pair, after) = match text.find(',') {
            Some(comma) => text.split_at_checked(comma).unwrap_or((text, "")),
            None => (text, ""),
        };
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) if key.trim().bytes().all(|b| b.is_ascii_lowercase()) => {
                (key.trim(), value.trim())
            }
            _ if first => return Err("has no key=value behind a colon".to_string()),
            // another table
            _ => return Ok(rest),
        };
        let column = || match value {
            "" => Err(format!("has no column for {key}")),
            name => Ok(name.to_string()),
        };
        match key {
            "id" => mapping.id = column()?,
            "aggregatetype" => mapping.aggregatetype = column()?,
            "aggregateid" => mapping.aggregateid = column()?,
            "payload" => mapping.payload = column()?,
            "headers" => mapping.headers_column = Some(column()?),
            "subject" => {
                let template = value.parse::<Template>();
                mapping.subject =
                    template.map_err(|error| format!("has a subject that {error}"))?;
            }
            "header" => {
                if !std::mem::replace(&mut own_headers, true) {
                    mapping.headers.clear();
                }
                let header = HeaderColumn::parse(value);
                mapping
                    .headers
                    .push(header.map_err(|error| format!("has a header that {error}"))?);
            }
            _ => {
                return Err(format!(
                    "has the key {key:?}, which is none of id, aggregatetype, aggregateid, payload, subject, header, headers"
                ));
            }
        }
        first = false;
        rest = after;
        if rest.is_empty() {
            return Ok(rest);
        }
    }
}

/// `column` or `column=Name`, separated by commas.
pub(super) fn parse_headers(list: &str) -> Result<Vec<HeaderColumn>, String> {
    if list.is_empty() {
        return Ok(Vec::new());
    }
    list.split(',').map(HeaderColumn::parse).collect()
}

pub(super) fn check_column(name: &str) -> Result<(), String> {
    if (1..=MAX_NAME_BYTES).contains(&name.len()) && !name.contains('\0') {
        Ok(())
    } else {
        Err("is not a column's name: 1 to 63 bytes".to_string())
    }
}

/// The source of a CloudEvent is a URI reference that is not empty.
pub(super) fn check_source(source: &str) -> Result<(), String> {
    if !source.is_empty() && source.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err(
            "is not a URI: visible ASCII characters, like /shop or https://example.com/shop"
                .to_string(),
        )
    }
}

/// Takes one SQL identifier and the blanks behind it off the front. Unquoted ones fold to lower case.
///
/// Source: <https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS>.
pub(super) fn identifier(text: &str) -> Result<(String, &str), String> {
    let (name, rest) = match text.strip_prefix('"') {
        Some(quoted) => {
            let mut name = String::new();
            let mut rest = quoted;
            loop {
                let (part, tail) = rest
                    .split_once('"')
                    .ok_or("has a double quote that is not closed")?;
                name.push_str(part);
                match tail.strip_prefix('"') {
                    Some(tail) => {
                        name.push('"');
                        rest = tail;
                    }
                    None => break (name, tail),
                }
            }
        }
        None => {
            let legal =
                |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
            let end = text.find(|c| !legal(c)).unwrap_or(text.len());
            let (name, rest) = text.split_at_checked(end).unwrap_or((text, ""));
            if name.starts_with(|c: char| c.is_ascii_digit() || c == '$') {
                return Err(format!("has the name {name}, which needs double quotes"));
            }
            (name.to_ascii_lowercase(), rest)
        }
    };
    if name.is_empty() {
        return Err("has an empty name, or a character that needs double quotes".to_string());
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(format!("has a name of over {MAX_NAME_BYTES} bytes"));
    }
    Ok((name, rest.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let ms = |ms| Some(Duration::from_millis(ms));
        for (text, expect) in [
            ("10s", ms(10_000)),
            ("2m", ms(120_000)),
            ("500ms", ms(500)),
            ("1h30m", ms(5_400_000)),
            ("1.5h", ms(5_400_000)),
            ("1h15m30.918s", ms(4_530_918)),
            (".5s", ms(500)),
            ("1.s", ms(1000)),
            ("+5s", ms(5000)),
            ("0", ms(0)),
            ("7", ms(7000)),
            ("2.5", ms(2500)),
            ("1us", Some(Duration::from_micros(1))),
            ("1µs", Some(Duration::from_micros(1))),
            ("1μs", Some(Duration::from_micros(1))),
            ("1ns", Some(Duration::from_nanos(1))),
            ("", None),
            ("s", None),
            (".", None),
            (".s", None),
            ("1.2.3s", None),
            ("-1s", None),
            ("+", None),
            ("1d", None),
            ("1s ", None),
            ("1S", None),
            ("1h30", None),
            ("99999999999999999999s", None),
            ("9999999999h", None),
            (
                "0.00000000000000000000000000000000000000000000000001s",
                None,
            ),
        ] {
            assert_eq!(parse_duration(text), expect, "{text:?}");
        }
    }

    #[test]
    fn a_port_alone_is_of_this_machine_and_one_behind_a_colon_of_every_address() {
        let loopback = "127.0.0.1:9464 [::1]:9464";
        for (text, expect) in [
            ("9464", Some(loopback)),
            ("localhost:9464", Some(loopback)),
            ("LOCALHOST:9464", Some(loopback)),
            (":9464", Some("0.0.0.0:9464 [::]:9464")),
            ("0.0.0.0:9464", Some("0.0.0.0:9464")),
            ("[::]:9464", Some("[::]:9464")),
            ("[::1]:9464", Some("[::1]:9464")),
            ("127.0.0.1", None),
            ("::1", None),
            ("relay.example:9464", None),
            ("localhost", None),
            ("localhost:", None),
            (":", None),
            ("65536", None),
            ("", None),
        ] {
            let found = parse_listen(text).ok().map(|addresses| {
                let texts = addresses.iter().map(ToString::to_string);
                texts.collect::<Vec<_>>().join(" ")
            });
            assert_eq!(found.as_deref(), expect, "{text}");
        }
    }

    #[test]
    fn tables_are_read_as_sql_reads_them() {
        let name = |schema: Option<&str>, name: &str| TableName {
            schema: schema.map(str::to_string),
            name: name.to_string(),
            and_longer: false,
        };
        let longer = |table| TableName {
            and_longer: true,
            ..table
        };
        let tables = |list: &str| -> Vec<TableName> {
            let found = parse_tables(list, &TableMapping::default());
            found
                .unwrap()
                .into_iter()
                .map(|named| named.table)
                .collect()
        };
        for (list, expect) in [
            ("", vec![]),
            ("outbox", vec![name(None, "outbox")]),
            ("Shop.OutBox", vec![name(Some("shop"), "outbox")]),
            (" a , b . c ", vec![name(None, "a"), name(Some("b"), "c")]),
            (
                "\"My Schema\".\"t,\"\".x\"",
                vec![name(Some("My Schema"), "t,\".x")],
            ),
            ("Ärger$1", vec![name(None, "Ärger$1")]),
            (
                "a_*, b.\"C\"*",
                vec![longer(name(None, "a_")), longer(name(Some("b"), "C"))],
            ),
        ] {
            assert_eq!(tables(list), expect, "{list:?}");
            let shown: Vec<String> = expect.iter().map(TableName::to_string).collect();
            assert_eq!(tables(&shown.join(",")), expect, "{list:?}");
        }
    }

    // the settings that differ from those of `default`, as `-table` takes them: `id=event_id,payload=body`.
    fn differences(mapping: &TableMapping, default: &TableMapping) -> String {
        let mut pairs = Vec::new();
        let mut differs = |key: &str, own: &str, other: &str| {
            if own != other {
                pairs.push(format!("{key}={own}"));
            }
        };
        differs("id", &mapping.id, &default.id);
        differs(
            "aggregatetype",
            &mapping.aggregatetype,
            &default.aggregatetype,
        );
        differs("aggregateid", &mapping.aggregateid, &default.aggregateid);
        differs("payload", &mapping.payload, &default.payload);
        differs(
            "subject",
            &mapping.subject.to_string(),
            &default.subject.to_string(),
        );
        let column = |mapping: &TableMapping| mapping.headers_column.clone().unwrap_or_default();
        differs("headers", &column(mapping), &column(default));
        let headers = mapping.headers.iter();
        pairs.extend(
            headers
                .filter(|header| !default.headers.contains(header))
                .map(|header| format!("header={header}")),
        );
        pairs.join(",")
    }

    #[test]
    fn a_table_may_have_a_mapping_of_its_own() {
        let default = TableMapping {
            headers: vec![HeaderColumn::parse("tenant").unwrap()],
            ..TableMapping::default()
        };
        for (list, expected) in [
            ("a", &["a"][..]),
            ("a:id=ID", &["a id=ID"]),
            (
                "a:id=event id,payload=body,b,c*:subject={prefix}.{x:lower},header=h=X,header=i, d",
                &[
                    "a id=event id,payload=body",
                    "b",
                    "c* subject={prefix}.{x:lower},header=h=X,header=i=i",
                    "d",
                ],
            ),
            ("a:id=x,b:id=y", &["a id=x", "b id=y"]),
            (
                "a:aggregatetype=t,aggregateid=i,headers=meta,\"b=c\"",
                &["a aggregatetype=t,aggregateid=i,headers=meta", "b=c"],
            ),
        ] {
            let found = parse_tables(list, &default).unwrap();
            let shown: Vec<String> = found
                .iter()
                .map(|named| {
                    let table = named.table.to_string().replace('"', "");
                    let differences = differences(&named.mapping, &default);
                    format!("{table} {differences}").trim_end().to_string()
                })
                .collect();
            assert_eq!(shown, expected, "{list}");
        }
        for (list, reason) in [
            ("a:", "no key=value"),
            ("a:id", "no key=value"),
            ("a:id=", "no column for id"),
            ("a:ids=x", "the key \"ids\""),
            ("a:id=x,ids=y", "the key \"ids\""),
            ("a:subject={a}", "begin with {prefix}."),
            ("a:header=x=Nats-Msg-Id", "header that"),
            ("a:id=x,", "list of tables"),
            ("a**", "list of tables"),
        ] {
            let error = parse_tables(list, &default).unwrap_err();
            assert!(error.contains(reason), "{list}: {error}");
        }
    }
}
