//! `status`: where the slot and the streams stand, asked of both servers and not of a relay.
//!
//! The stream tells the last event that was published ([`OUTBOX_POSITION`]), the slot what was confirmed: what lies behind
//! the later of the two waits, if it holds an event at all. (Of several streams each has its own end; where events are
//! consumed, no stream has one, and the record of the checkpoint tells.) Whether it does, and
//! since when, only decoding can tell. It is done on a temporary copy of the slot (`pg_copy_logical_replication_slot`,
//! Postgres 12 on), so that neither a relay that runs nor one that starts meanwhile is in its way.

mod decode;

use super::bus::Bus;
use super::check::past::{Compared, compare};
use super::database::{Access, Database};
use super::{Error, bytes, say, span};
use crate::config::Config;
use crate::config::operation;
use crate::exit::Exit;
use crate::jetstream::OUTBOX_POSITION;
use crate::jetstream::streams::{Routes, last_message_request};
use crate::nats::options::Options;
use crate::outbox::position::{Position, SourcePosition};
use crate::postgres::Lsn;
use crate::relay::checkpoint::record::Record;
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
/// With `-watch` a server that does not answer for so long is told of. More than the decoding may take.
const WATCH_LIMIT: Duration = Duration::from_secs(3);

/// What was found.
#[derive(Clone, Debug, Default)]
struct Standing {
    slot: Slot,
    streams: Vec<Stream>,
    waiting: Waiting,
    /// Behind what is known to be published, in bytes; 0 when nothing waits.
    lag_bytes: Option<u64>,
    /// Why a relay halts here: then what waits is not known.
    halts: Option<String>,
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
        /// The stream that lacks it, where there are several.
        stream: Option<usize>,
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
#[derive(Clone, Debug)]
struct Decoded {
    at: Instant,
    waiting: Waiting,
    halts: Option<String>,
}

impl Decoded {
    /// Whether it still holds at `now`, and what it has become.
    fn still(&self, now: Instant, published: &Published) -> Option<Waiting> {
        if now.saturating_duration_since(self.at) >= DECODE_INTERVAL {
            return None;
        }
        match self.waiting {
            Waiting::Event { at, stream, .. } if published.has(at, stream) => None,
            waiting => Some(waiting),
        }
    }
}

/// Prints where things stand, once or each second.
pub fn run(config: &Config, how: &operation::Status) -> Result<Exit, Error> {
    if how.watch {
        return watch(config, how);
    }
    let bus = Bus::connect(&config.nats).map_err(Error::from);
    let (mut database, bus) = match (Database::connect(&config.db, Access::Read), bus) {
        (Ok(database), bus) => (database, bus),
        (Err(_), Err(error)) => return Err(error),
        (Err(error), Ok(_)) => return Err(error),
    };
    match bus.and_then(|mut bus| look(&mut database, &mut bus, config, &mut None)) {
        Ok(standing) => tell(&standing, how, ""),
        Err(error) => {
            say(&without_nats(Some(&mut database), config, how, &error))?;
            Err(error)
        }
    }
}

/// What there is to say without NATS: where the slot stands, which may be what fills a disk. After an error of Postgres that is nothing, or
/// the error as JSON.
fn without_nats(
    database: Option<&mut Database>,
    config: &Config,
    how: &operation::Status,
    error: &Error,
) -> String {
    let is_of_nats = !matches!(error, Error::Postgres(_) | Error::Sql { .. });
    let database = database.filter(|_| is_of_nats);
    let slot = database.and_then(|database| read_slot(database, config).ok());
    match (slot, how.json) {
        (None, true) => format!("{}\n", json!({ "error": error.to_string() })),
        (None, false) => String::new(),
        (Some((slot, _)), true) => {
            format!(
                "{}\n",
                json!({ "slot": slot_json(&slot), "error": error.to_string() })
            )
        }
        (Some((slot, _)), false) => slot_text(&slot),
    }
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
            Err(error) => {
                let slot = without_nats(database.as_mut(), config, how, &error);
                say(&match how.json {
                    true => slot,
                    false => format!("{slot}unknown  {error}; trying again\n{line}"),
                })?;
            }
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
    let (streams, routes) = read_streams(bus, config)?;
    let (slot, system_id) = read_slot(database, config)?;
    let record = match system_id {
        Some(system_id) => bus.record(config, system_id)?,
        None => None,
    };
    let published = Published::new(&slot, &streams, system_id, record.as_ref());
    let now = Instant::now();
    let known = decoded
        .take()
        .filter(|it| it.still(now, &published).is_some());
    let found = match known {
        Some(found) => found,
        None => {
            let halts = record.and_then(|it| halts(config, it, database.answer_limit));
            let waiting = match &halts {
                Some(_) => Waiting::Unknown,
                None => decode::waiting(database, config, &slot, &published, &routes)?,
            };
            let at = now;
            Decoded { at, waiting, halts }
        }
    };
    let Decoded { waiting, halts, .. } = decoded.insert(found).clone();
    let lag_bytes = match (waiting, published.greatest()) {
        _ if halts.is_some() => None,
        (Waiting::Nothing, _) => Some(0),
        // of its stream nothing is known but what it lacks
        (Waiting::Event { at, stream, .. }, _) if stream.is_some() => {
            Some(slot.current.0.saturating_sub(at.commit_lsn.0))
        }
        (_, Some(known)) => Some(slot.current.0.saturating_sub(known.commit_lsn.0)),
        (_, None) => None,
    };
    Ok(Standing {
        slot,
        streams,
        waiting,
        lag_bytes,
        halts,
    })
}

/// Why a relay halts here, if the record tells: this is not the WAL that the streams were written from.
fn halts(config: &Config, record: Record, limit: Duration) -> Option<String> {
    let db = config.db.connecting_within(limit);
    match compare(&db, config, record, limit) {
        Ok(Compared::Other(reason)) => Some(reason),
        Ok(Compared::Same(_)) => None,
        Err(error) => {
            log::info!(cause:% = error; "whether this is the WAL that the streams were written from is not known");
            None
        }
    }
}

/// What is known to be published.
#[derive(Clone, Debug, Default)]
struct Published {
    /// All transactions before it: the slot says so, or the record of the checkpoint.
    confirmed: Option<Position>,
    /// By stream the last event in it, if that was written from this slot and system; with it all before it that the
    /// stream captures.
    tails: Vec<Option<Position>>,
}

impl Published {
    fn new(
        slot: &Slot,
        streams: &[Stream],
        system_id: Option<u64>,
        record: Option<&Record>,
    ) -> Published {
        // events that were consumed since are in no stream, and yet were stored. (What lies beyond the end of the WAL is of
        // another history.)
        let stored_lsn = record.map(|it| it.young.stored_lsn);
        let stored_lsn = stored_lsn.filter(|lsn| *lsn <= slot.current);

        let tail = |stream: &Stream| {
            let at = stream.tail.as_ref()?.position.as_ref()?;
            let ours = at.source.slot == slot.name && Some(at.source.system_id) == system_id;
            // beyond the end of the log is a history of another timeline
            (ours && at.position.commit_lsn <= slot.current).then_some(at.position)
        };
        Published {
            confirmed: slot.confirmed.max(stored_lsn).map(|commit_lsn| Position {
                commit_lsn,
                ordinal: 0,
            }),
            tails: streams.iter().map(tail).collect(),
        }
    }

    /// Something is, up to here: everything, if there is one stream.
    fn greatest(&self) -> Option<Position> {
        let tails = self.tails.iter().flatten().copied();
        tails.chain(self.confirmed).max()
    }

    /// Everything is, up to here.
    fn least(&self) -> Option<Position> {
        // none is less than any
        let tail = self.tails.iter().copied().min().flatten();
        tail.max(self.confirmed)
    }

    /// Whether the event there is, which belongs into that stream; `None`: nobody knows into which.
    fn has(&self, at: Position, stream: Option<usize>) -> bool {
        let upto = match stream {
            None => self.greatest(),
            Some(stream) => (self.tails.get(stream).copied().flatten()).max(self.confirmed),
        };
        upto.is_some_and(|upto| upto >= at)
    }
}

fn read_streams(bus: &mut Bus<'_>, config: &Config) -> Result<(Vec<Stream>, Routes), Error> {
    let filter = format!("{}.>", config.prefix);
    let mut streams = Vec::new();
    let found = bus.streams(&filter)?;
    let routes = Routes::new(&found);
    for info in found {
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
    Ok((streams, routes))
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

fn json_of(standing: &Standing) -> Value {
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
    json!({
        "slot": slot_json(&standing.slot),
        "streams": streams,
        "lag_bytes": standing.lag_bytes,
        "lag_seconds": standing.waiting.seconds(Timestamp::now()),
        "halts": standing.halts,
    })
}

fn slot_json(slot: &Slot) -> Value {
    let holder = slot.holder.as_ref().map(|holder| {
        json!({
            "pid": holder.pid, "application_name": holder.application, "client_addr": holder.address,
            "backend_start": holder.since,
        })
    });
    json!({
        "name": slot.name, "confirmed_flush_lsn": slot.confirmed.map(|lsn| lsn.to_string()),
        "current_lsn": slot.current.to_string(), "retained_bytes": slot.retained_bytes,
        "wal_status": slot.wal_status, "holder": holder,
    })
}

fn size(count: Option<u64>) -> String {
    count.map_or("unknown".to_string(), bytes)
}

fn slot_text(slot: &Slot) -> String {
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
    text
}

fn text_of(standing: &Standing) -> String {
    let mut text = slot_text(&standing.slot);
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
    if let Some(reason) = &standing.halts {
        return text + &format!("lag      unknown: a relay halts here, see check: {reason}\n");
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
mod tests;
