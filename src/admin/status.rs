//! `status`: where the slot and the streams stand, asked of both servers and not of a relay.
//!
//! The stream tells the last event that was published ([`OUTBOX_POSITION`]), the slot what was confirmed: what lies behind
//! the later of the two waits, if it holds an event at all. Whether it does, and since when, only decoding can tell. It
//! is done on a temporary copy of the slot (`pg_copy_logical_replication_slot`, Postgres 12 on), so that neither a relay that
//! runs nor one that starts meanwhile is in its way.

use super::bus::Bus;
use super::database::{Access, Database};
use super::{Error, bytes, say, span};
use crate::config::Config;
use crate::config::operation;
use crate::exit::Exit;
use crate::jetstream::options::Options;
use crate::jetstream::resume::OUTBOX_POSITION;
use crate::jetstream::streams::last_message_request;
use crate::outbox::position::{Position, SourcePosition};
use crate::postgres::Lsn;
use crate::postgres::connection::quote_literal;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

/// Between two prints of `-watch`.
const INTERVAL: Duration = Duration::from_secs(1);
/// With `-watch` the log is decoded at most so often: Postgres writes several lines to its own log each time.
const DECODE_INTERVAL: Duration = Duration::from_secs(10);
/// How many of them the history line shows.
const HISTORY: usize = 60;
/// How many changes are decoded at a time when the oldest event that waits is looked for.
const CHANGES: i32 = 1000;
/// How long that may take; a slot whose log is long tells no seconds then.
const PATIENCE: Duration = Duration::from_secs(5);
/// With `-watch` a server that does not answer for so long is told of. More than the decoding may take.
const WATCH_LIMIT: Duration = Duration::from_secs(3);
/// How long the decoding may take then.
const WATCH_PATIENCE: Duration = Duration::from_secs(2);
/// `timestamp` counts from 2000-01-01, this many seconds after 1970.
const POSTGRES_EPOCH_S: i64 = 946_684_800;

/// What was found.
#[derive(Clone, Debug, Default)]
struct Standing {
    slot: Slot,
    streams: Vec<Stream>,
    waiting: Waiting,
    /// Behind what is known to be published, in bytes; 0 when nothing waits.
    lag_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    name: String,
    server: String,
    confirmed: Option<Lsn>,
    current: Lsn,
    retained_bytes: Option<u64>,
    wal_status: Option<String>,
    holder: Option<Holder>,
}

/// Who reads the slot. What the role may not see is empty.
#[derive(Clone, Debug, Default)]
struct Holder {
    pid: i32,
    application: String,
    address: String,
    since: String,
}

#[derive(Clone, Debug, Default)]
struct Stream {
    name: String,
    messages: u64,
    last_seq: u64,
    tail: Option<Tail>,
}

/// The last message under the prefix.
#[derive(Clone, Debug, Default)]
struct Tail {
    seq: u64,
    age_s: Option<u64>,
    position: Option<SourcePosition>,
}

/// The oldest event that is committed and not published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Waiting {
    /// There is none.
    Nothing,
    /// It is this one.
    Event {
        /// Where it stands.
        at: Position,
        /// Seconds since 1970, by Postgres' clock.
        time_s: i64,
    },
    /// It could not be found out.
    #[default]
    Unknown,
}

impl Waiting {
    /// For how many seconds; `None`: unknown.
    fn seconds(self, now: Timestamp) -> Option<u64> {
        match self {
            Waiting::Nothing => Some(0),
            Waiting::Event { time_s, .. } => {
                Some(now.as_second().saturating_sub(time_s).max(0) as u64)
            }
            Waiting::Unknown => None,
        }
    }
}

/// What was found at the last decoding, with `-watch`.
#[derive(Clone, Copy, Debug)]
struct Decoded {
    at: Instant,
    waiting: Waiting,
}

impl Decoded {
    /// Whether it still holds at `now`, when everything up to `known` is published, and what it has become.
    fn still(self, now: Instant, known: Option<Position>) -> Option<Waiting> {
        if now.saturating_duration_since(self.at) >= DECODE_INTERVAL {
            return None;
        }
        match self.waiting {
            Waiting::Event { at, .. } if known.is_some_and(|known| known >= at) => None,
            waiting => Some(waiting),
        }
    }
}

/// Transactional messages (`messages` of pgoutput) came with it.
const MESSAGES: u32 = 140_000;

/// Prints where things stand, once or each second.
pub fn run(config: &Config, how: &operation::Status) -> Result<Exit, Error> {
    if how.watch {
        return watch(config, how);
    }
    let mut bus = Bus::connect(&config.nats)?;
    let mut database = Database::connect(&config.db, Access::Read)?;
    let standing = look(&mut database, &mut bus, config, &mut None)?;
    tell(&standing, how, "")
}

/// Prints until somebody ends it. What a server that is away says stands in place of the figures, until it is back.
fn watch(config: &Config, how: &operation::Status) -> Result<Exit, Error> {
    let impatient = Options {
        connect_timeout: WATCH_LIMIT,
        request_timeout: WATCH_LIMIT,
        ..config.nats.clone()
    };
    // an error of the start is one of the command line more often than not: it ends this too
    let mut bus = Bus::connect(&impatient)?;
    let mut database = Some(connect(config)?);
    let mut history = VecDeque::with_capacity(HISTORY);
    let mut decoded = None;
    loop {
        let start = Instant::now();
        let found = look_again(config, &mut database, &mut bus, &mut decoded);
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(found.as_ref().ok().and_then(|standing| standing.lag_bytes));
        if !how.json && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
            // to the upper left, and clear
            say("\x1b[H\x1b[J")?;
        }
        let line = format!("history  {}\n", sparkline(history.make_contiguous()));
        match found {
            Ok(standing) => {
                tell(&standing, how, &line)?;
            }
            Err(error) => say(&match how.json {
                true => format!("{}\n", json!({ "error": error.to_string() })),
                false => format!("unknown  {error}; trying again\n{line}"),
            })?,
        }
        thread::sleep(INTERVAL.saturating_sub(start.elapsed()));
    }
}

fn connect(config: &Config) -> Result<Database, Error> {
    let db = config.db.connecting_within(WATCH_LIMIT);
    Database::connect_within(&db, Access::Read, WATCH_LIMIT)
}

/// Looks, by a new session if the last look ended in an error of Postgres. ([`Bus`] connects anew by itself.)
fn look_again(
    config: &Config,
    database: &mut Option<Database>,
    bus: &mut Bus<'_>,
    decoded: &mut Option<Decoded>,
) -> Result<Standing, Error> {
    let session = match database {
        Some(session) => session,
        None => database.insert(connect(config)?),
    };
    let found = look(session, bus, config, decoded);
    if let Err(Error::Postgres(_) | Error::Sql { .. }) = &found {
        *database = None;
        // another server may answer next, whose log is not the one that was decoded
        *decoded = None;
    }
    found
}

fn tell(standing: &Standing, how: &operation::Status, more: &str) -> Result<Exit, Error> {
    match how.json {
        true => say(&format!("{}\n", json_of(standing)))?,
        false => say(&format!("{}{more}", text_of(standing)))?,
    }
    Ok(match exceeded(standing, how) {
        true => Exit::Warning,
        false => Exit::Done,
    })
}

/// A lag is above its limit, or nobody knows.
fn exceeded(standing: &Standing, how: &operation::Status) -> bool {
    let bytes = how
        .max_lag_bytes
        .is_some_and(|most| standing.lag_bytes.is_none_or(|lag| lag > most));
    let seconds = how.max_lag_seconds.is_some_and(|most| {
        let waiting = standing.waiting.seconds(Timestamp::now());
        waiting.is_none_or(|seconds| seconds > most)
    });
    bytes || seconds
}

fn look(
    database: &mut Database,
    bus: &mut Bus<'_>,
    config: &Config,
    decoded: &mut Option<Decoded>,
) -> Result<Standing, Error> {
    // the streams first: what they lack by then is what is looked for in the slot
    let streams = read_streams(bus, config)?;
    let (slot, system_id) = read_slot(database, config)?;
    let known = published(&slot, &streams, system_id);
    let now = Instant::now();
    let waiting = match decoded.and_then(|decoded| decoded.still(now, known)) {
        Some(waiting) => waiting,
        None => waiting(database, config, &slot, known)?,
    };
    if decoded.is_none_or(|decoded| decoded.still(now, known).is_none()) {
        *decoded = Some(Decoded { at: now, waiting });
    }
    let lag_bytes = match (waiting, known) {
        (Waiting::Nothing, _) => Some(0),
        (_, Some(known)) => Some(slot.current.0.saturating_sub(known.commit_lsn.0)),
        (_, None) => None,
    };
    Ok(Standing {
        slot,
        streams,
        waiting,
        lag_bytes,
    })
}

/// The position up to which everything is published: confirmed, or in a stream, if that was written from this system.
///
/// What is confirmed are whole transactions, all before that LSN; of the one that a stream ends in, it may have a part.
fn published(slot: &Slot, streams: &[Stream], system_id: Option<u64>) -> Option<Position> {
    let tails = streams
        .iter()
        .filter_map(|stream| stream.tail.as_ref()?.position.as_ref())
        .filter(|at| at.source.slot == slot.name && Some(at.source.system_id) == system_id)
        .map(|at| at.position)
        // beyond the end of the log is a history of another timeline
        .filter(|at| at.commit_lsn <= slot.current);
    let confirmed = slot.confirmed.map(|commit_lsn| Position {
        commit_lsn,
        ordinal: 0,
    });
    tails.chain(confirmed).max()
}

fn read_streams(bus: &mut Bus<'_>, config: &Config) -> Result<Vec<Stream>, Error> {
    let filter = format!("{}.>", config.prefix);
    let mut streams = Vec::new();
    for info in bus.streams(&filter)? {
        let last = bus.message(last_message_request(&info.config.name, &filter))?;
        let now: Option<Timestamp> = info.ts.parse().ok();
        let tail = last.map(|message| Tail {
            seq: message.seq,
            // by the server's own clock
            age_s: now
                .zip(message.time.parse::<Timestamp>().ok())
                .map(|(now, time)| now.duration_since(time).as_secs().max(0) as u64),
            position: message
                .header(OUTBOX_POSITION)
                .and_then(|text| text.parse().ok()),
        });
        streams.push(Stream {
            name: info.config.name,
            messages: info.state.messages,
            last_seq: info.state.last_seq,
            tail,
        });
    }
    Ok(streams)
}

fn read_slot(database: &mut Database, config: &Config) -> Result<(Slot, Option<u64>), Error> {
    let wal_status = match database.version >= 130_000 {
        true => "s.wal_status",
        false => "NULL::text",
    };
    let row = database.row(
        "look at the slot",
        &format!(
            "SELECT s.confirmed_flush_lsn::text, e.lsn::text, pg_catalog.pg_wal_lsn_diff(e.lsn, s.restart_lsn)::bigint, \
             {wal_status}, s.active_pid, a.application_name, COALESCE(pg_catalog.host(a.client_addr), ''), a.backend_start::text, \
             (SELECT system_identifier FROM pg_catalog.pg_control_system()) \
             FROM pg_catalog.pg_replication_slots s \
             CROSS JOIN (SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
             ELSE pg_catalog.pg_current_wal_lsn() END AS lsn) e \
             LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid WHERE s.slot_name = $1"
        ),
        &[&config.slot],
    )?;
    let Some(row) = row else {
        return Err(Error::Wrong {
            what: format!("find the slot: {} does not exist", config.slot),
            remedy: "correct -db or -slot, or run setup".into(),
            exit: Exit::Configuration,
        });
    };
    let text = |index: usize| row.get::<_, Option<String>>(index).unwrap_or_default();
    let lsn = |index: usize| text(index).parse::<Lsn>().ok();
    let slot = Slot {
        name: config.slot.clone(),
        server: database.peer.clone(),
        confirmed: lsn(0),
        current: lsn(1).unwrap_or_default(),
        retained_bytes: row.get::<_, Option<i64>>(2).map(|held| held.max(0) as u64),
        wal_status: row.get(3),
        holder: row.get::<_, Option<i32>>(4).map(|pid| Holder {
            pid,
            application: text(5),
            address: text(6),
            since: text(7),
        }),
    };
    // a 64-bit number that the function's type makes signed
    Ok((slot, row.get::<_, Option<i64>>(8).map(|id| id as u64)))
}

/// Finds the oldest event behind `known`. What keeps it from being found is no error, unless the server is gone: the rest
/// is still worth telling.
fn waiting(
    database: &mut Database,
    config: &Config,
    slot: &Slot,
    known: Option<Position>,
) -> Result<Waiting, Error> {
    if known.is_some_and(|known| known.commit_lsn >= slot.current) {
        return Ok(Waiting::Nothing);
    }
    match decode(database, config, slot, known) {
        Err(error @ Error::Postgres(_)) => Err(error),
        Err(error) => {
            log::info!(cause:% = error; "how long events have been waiting is not known");
            Ok(Waiting::Unknown)
        }
        found => found,
    }
}

fn decode(
    database: &mut Database,
    config: &Config,
    slot: &Slot,
    known: Option<Position>,
) -> Result<Waiting, Error> {
    // this session's own number: programs in two containers may well have the same one
    let session = database.row(
        "ask for the session's number",
        "SELECT pg_catalog.pg_backend_pid()",
        &[],
    )?;
    let session = session.map_or(0, |row| row.get::<_, i32>(0));
    let copy = format!("outbox_status_{session}");
    // before the session is given up
    let patience = match database.answer_limit <= PATIENCE {
        true => WATCH_PATIENCE,
        false => PATIENCE,
    };
    let limit = patience.as_millis();
    database.run(
        "copy the slot",
        &format!(
            "SET statement_timeout = {limit}; SELECT pg_catalog.pg_copy_logical_replication_slot({}, {}, true)",
            quote_literal(&config.slot),
            quote_literal(&copy)
        ),
    )?;
    let found = first_event(database, config, slot, known, &copy, patience);
    // the session's end would drop it as well
    let dropped = database.run(
        "drop the copy of the slot",
        &format!(
            "SET statement_timeout = '30s'; SELECT pg_catalog.pg_drop_replication_slot({})",
            quote_literal(&copy)
        ),
    );
    found.and_then(|found| dropped.map(|()| found))
}

fn first_event(
    database: &mut Database,
    config: &Config,
    slot: &Slot,
    known: Option<Position>,
    copy: &str,
    patience: Duration,
) -> Result<Waiting, Error> {
    const DOING: &str = "decode a copy of the slot";
    let known = known.unwrap_or_default();
    if slot.confirmed.is_some_and(|lsn| known.commit_lsn > lsn) {
        // a transaction whose commit record begins before the slot's position is passed over: all but the last one
        let upto = known.commit_lsn;
        database.run(
            DOING,
            &format!("SELECT pg_catalog.pg_replication_slot_advance('{copy}', '{upto}')"),
        )?;
    }
    // Postgres 18 sends nothing for a publication that does not exist, and no error
    let exists = database.row(
        DOING,
        "SELECT true FROM pg_catalog.pg_publication WHERE pubname = $1",
        &[&config.publication],
    )?;
    if exists.is_none() {
        return Ok(Waiting::Unknown);
    }
    let publication = format!("\"{}\"", config.publication.replace('"', "\"\""));
    let outboxes = outboxes(database, config)?;
    let prefix = match &config.mapping.message_prefix {
        Some(prefix) if database.version >= MESSAGES => Some(prefix),
        _ => None,
    };
    let messages = prefix.map_or("", |_| ", 'messages', 'true'");
    // a string of the protocol ends in a zero
    let prefix = prefix.map(|prefix| [prefix.as_bytes(), b"\0"].concat());
    let end = Instant::now() + patience;
    while Instant::now() < end {
        let rows = database.rows(
            DOING,
            // 66: Begin; 73: Insert, with the table's object id; 77: Message, of which only transactional ones are events
            &format!(
                "SELECT get_byte(data, 0), CASE WHEN get_byte(data, 0) = 66 THEN substr(data, 2, 16) END \
                 FROM pg_catalog.pg_logical_slot_get_binary_changes($1, NULL, $2, \
                 'proto_version', '1', 'publication_names', $3{messages}) WHERE get_byte(data, 0) = 66 \
                 OR get_byte(data, 0) = 73 AND ('x' || encode(substr(data, 2, 4), 'hex'))::bit(32)::bigint = ANY ($4) \
                 OR get_byte(data, 0) = 77 AND get_byte(data, 1) = 1 AND substr(data, 11, length($5::bytea)) = $5"
            ),
            &[&copy, &CHANGES, &publication, &outboxes, &prefix],
        )?;
        if rows.is_empty() {
            return Ok(Waiting::Nothing);
        }
        let mut events = Events::default();
        for row in &rows {
            match row.get::<_, i32>(0) {
                66 => events.begin(row.get::<_, Option<&[u8]>>(1)),
                // Insert or Message
                _ => match events.next() {
                    Waiting::Event { at, .. } if at <= known => {}
                    waiting => return Ok(waiting),
                },
            }
        }
    }
    Ok(Waiting::Unknown)
}

/// The object ids of the tables whose rows are events: what the reader finds out from the relation messages.
fn outboxes(database: &mut Database, config: &Config) -> Result<Vec<i64>, Error> {
    let tables = database.rows(
        "look for the outboxes",
        "SELECT c.oid::bigint, n.nspname::text, c.relname::text, array_agg(a.attname::text) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
         WHERE c.relkind IN ('r', 'p') GROUP BY 1, 2, 3",
        &[],
    )?;
    let is_outbox = |table: &&postgres::Row| {
        let (schema, name): (&str, &str) = (table.get(1), table.get(2));
        let columns: Vec<&str> = table.get(3);
        let mapping = config.mapping.of_table(schema, name);
        mapping.is_some_and(|mapping| {
            let mut needed = mapping.needed_columns().into_iter();
            needed.all(|column| columns.contains(&column))
        })
    };
    let outboxes = tables.iter().filter(is_outbox);
    Ok(outboxes.map(|table| table.get(0)).collect())
}

/// Counts the events of a transaction, as the reader does.
#[derive(Debug, Default)]
struct Events {
    /// Its commit's LSN, and its time in microseconds, as Postgres counts.
    began: Option<(u64, i64)>,
    count: u32,
}

impl Events {
    /// Takes what follows the tag of a Begin message.
    fn begin(&mut self, begin: Option<&[u8]>) {
        let number = |bytes: &[u8]| <[u8; 8]>::try_from(bytes).ok();
        let began = || {
            let (lsn, time) = begin?.split_at_checked(8)?;
            Some((
                u64::from_be_bytes(number(lsn)?),
                i64::from_be_bytes(number(time)?),
            ))
        };
        *self = Events {
            began: began(),
            count: 0,
        };
    }

    /// The next event of the transaction, as one that waits.
    fn next(&mut self) -> Waiting {
        self.count += 1;
        let Some((lsn, time_us)) = self.began else {
            return Waiting::Unknown;
        };
        Waiting::Event {
            at: Position {
                commit_lsn: Lsn(lsn),
                ordinal: self.count,
            },
            time_s: time_us.div_euclid(1_000_000) + POSTGRES_EPOCH_S,
        }
    }
}

fn json_of(standing: &Standing) -> Value {
    let slot = &standing.slot;
    let streams: Vec<Value> = standing
        .streams
        .iter()
        .map(|stream| {
            let tail = stream.tail.as_ref();
            json!({
                "name": stream.name, "messages": stream.messages, "last_seq": stream.last_seq,
                "last_event_seq": tail.map(|tail| tail.seq),
                "last_event_age_seconds": tail.and_then(|tail| tail.age_s),
                "last_event_position": tail.and_then(|tail| Some(tail.position.as_ref()?.to_string())),
            })
        })
        .collect();
    let holder = slot.holder.as_ref().map(|holder| {
        json!({
            "pid": holder.pid, "application_name": holder.application, "client_addr": holder.address,
            "backend_start": holder.since,
        })
    });
    json!({
        "slot": {
            "name": slot.name, "confirmed_flush_lsn": slot.confirmed.map(|lsn| lsn.to_string()),
            "current_lsn": slot.current.to_string(), "retained_bytes": slot.retained_bytes,
            "wal_status": slot.wal_status, "holder": holder,
        },
        "streams": streams,
        "lag_bytes": standing.lag_bytes,
        "lag_seconds": standing.waiting.seconds(Timestamp::now()),
    })
}

fn text_of(standing: &Standing) -> String {
    let slot = &standing.slot;
    let size = |count: Option<u64>| count.map_or("unknown".to_string(), bytes);
    let confirmed = slot
        .confirmed
        .map_or("nothing".into(), |lsn| lsn.to_string());
    let mut text = format!(
        "slot     {} at {}: confirmed {confirmed}, log ends at {}, {} of log held",
        slot.name,
        slot.server,
        slot.current,
        size(slot.retained_bytes)
    );
    if let Some(status) = slot
        .wal_status
        .as_ref()
        .filter(|status| *status != "reserved")
    {
        text += &format!(" ({status})");
    }
    text += &match &slot.holder {
        None => "\nrelay    none: the slot is not in use\n".to_string(),
        Some(holder) => {
            let or = |text: &str, other: &str| match text {
                "" => other.to_string(),
                text => text.to_string(),
            };
            format!(
                "\nrelay    {} from {}, server process {}, since {}\n",
                or(&holder.application, "unknown"),
                or(&holder.address, "this machine or unknown"),
                holder.pid,
                or(&holder.since, "unknown")
            )
        }
    };
    for stream in &standing.streams {
        text += &format!("stream   {}: {} messages, ", stream.name, stream.messages);
        text += &match &stream.tail {
            None => "no event\n".to_string(),
            Some(tail) => format!(
                "last event at sequence {}, {} ago, position {}\n",
                tail.seq,
                tail.age_s.map_or("unknown".into(), span),
                match &tail.position {
                    Some(at) => at.to_string(),
                    None => "not told: it is not this relay's".into(),
                }
            ),
        };
    }
    if standing.streams.is_empty() {
        text += "stream   none captures the prefix\n";
    }
    text += &match standing.waiting.seconds(Timestamp::now()) {
        Some(_) if standing.waiting == Waiting::Nothing => {
            "lag      none: the slot has nothing to send\n".to_string()
        }
        Some(seconds) => format!(
            "lag      {} of log, the oldest event waits for {}\n",
            size(standing.lag_bytes),
            span(seconds)
        ),
        None => format!(
            "lag      {} of log, for how long is not known\n",
            size(standing.lag_bytes)
        ),
    };
    text
}

/// One block a number, relative to the largest; a dot where it is not known.
fn sparkline(numbers: &[Option<u64>]) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = numbers.iter().flatten().copied().max();
    let most = most.unwrap_or_default().max(1);
    let block = |number: &Option<u64>| {
        let index = number.map(|number| u128::from(number) * 7 / u128::from(most));
        index
            .and_then(|index| BLOCKS.get(index as usize).copied())
            .unwrap_or('·')
    };
    numbers.iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_history_is_drawn() {
        assert_eq!(sparkline(&[]), "");
        assert_eq!(sparkline(&[Some(0), Some(0)]), "▁▁");
        assert_eq!(sparkline(&[Some(0), Some(50), Some(100)]), "▁▄█");
        assert_eq!(sparkline(&[Some(u64::MAX), Some(0)]), "█▁");
        assert_eq!(sparkline(&[Some(1), None, Some(1)]), "█·█");
        assert_eq!(sparkline(&[None]), "·");
    }

    fn at(commit_lsn: u64, ordinal: u32) -> Position {
        Position {
            commit_lsn: Lsn(commit_lsn),
            ordinal,
        }
    }

    #[test]
    fn the_later_of_slot_and_stream_is_what_is_published() {
        let stream = |position: &str| Stream {
            tail: Some(Tail {
                position: position.parse().ok(),
                ..Tail::default()
            }),
            ..Stream::default()
        };
        let slot = Slot {
            name: "s".into(),
            confirmed: Some(Lsn(0x100)),
            current: Lsn(0x1000),
            ..Slot::default()
        };
        for (position, expected) in [
            ("s 1 1 0/200 1", at(0x200, 1)),
            ("s 1 1 0/100 6", at(0x100, 6)),
            ("s 1 1 0/50 1", at(0x100, 0)),
            ("s 2 1 0/200 1", at(0x100, 0)),
            ("other 1 1 0/200 1", at(0x100, 0)),
            ("s 1 1 0/2000 1", at(0x100, 0)),
            ("none", at(0x100, 0)),
        ] {
            let found = published(&slot, &[stream(position)], Some(1));
            assert_eq!(found, Some(expected), "{position}");
        }
        assert_eq!(published(&Slot::default(), &[], None), None);
    }

    #[test]
    fn what_was_decoded_holds_until_it_is_old_or_published() {
        let start = Instant::now();
        let later = start + DECODE_INTERVAL;
        let sixth = Waiting::Event {
            at: at(5, 6),
            time_s: 0,
        };
        let nothing = Waiting::Nothing;
        for (waiting, now, known, expected) in [
            (sixth, start, Some(at(4, 9)), Some(sixth)),
            (sixth, start, Some(at(5, 0)), Some(sixth)),
            (sixth, start, Some(at(5, 5)), Some(sixth)),
            (sixth, start, None, Some(sixth)),
            (sixth, start, Some(at(5, 6)), None),
            (sixth, start, Some(at(6, 0)), None),
            (sixth, later, Some(at(4, 1)), None),
            (nothing, start, Some(at(9, 0)), Some(nothing)),
            (nothing, later, Some(at(9, 0)), None),
        ] {
            let found = Decoded { at: start, waiting }.still(now, known);
            assert_eq!(found, expected, "{waiting:?} {known:?}");
        }
    }

    #[test]
    fn a_begin_message_tells_where_and_when_its_events_are() {
        let mut begin = 0x1234_u64.to_be_bytes().to_vec();
        begin.extend_from_slice(&1_500_000_i64.to_be_bytes());
        let event = |ordinal| Waiting::Event {
            at: at(0x1234, ordinal),
            time_s: POSTGRES_EPOCH_S + 1,
        };
        let mut events = Events::default();
        for _ in 0..2 {
            events.begin(Some(&begin));
            assert_eq!([events.next(), events.next()], [event(1), event(2)]);
        }
        events.begin(begin.get(..15));
        assert_eq!(events.next(), Waiting::Unknown);
        events.begin(None);
        assert_eq!(events.next(), Waiting::Unknown);
    }

    #[test]
    fn a_lag_above_its_limit_or_unknown_exceeds() {
        let waits = Waiting::Event {
            at: at(1, 1),
            time_s: Timestamp::now().as_second() - 1000,
        };
        for (lag_bytes, waiting, limits, expected) in [
            (Some(10), waits, (None, None), false),
            (Some(10), waits, (Some(10), Some(2000)), false),
            (Some(10), waits, (Some(9), None), true),
            (Some(10), waits, (None, Some(999)), true),
            (Some(0), Waiting::Nothing, (Some(0), Some(0)), false),
            (Some(10), Waiting::Unknown, (Some(10), None), false),
            (Some(10), Waiting::Unknown, (None, Some(100)), true),
            (None, Waiting::Unknown, (Some(100), None), true),
        ] {
            let standing = Standing {
                lag_bytes,
                waiting,
                ..Standing::default()
            };
            let how = operation::Status {
                json: false,
                watch: false,
                max_lag_bytes: limits.0,
                max_lag_seconds: limits.1,
            };
            assert_eq!(exceeded(&standing, &how), expected, "{standing:?} {how:?}");
        }
    }
}
