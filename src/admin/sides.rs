//! Both sides at one moment, for the commands that compare them: what the slot still has, how far the relay is, and the
//! streams.
//!
//! The order makes a relay that runs no source of false findings: the slot is copied first, then it is read where the WAL
//! ends, then how far everything is resolved, and the streams last. So what is not in the copy, or was resolved when that was
//! read, must be in a stream; what is later waits for the relay.

use super::Error;
use super::bus::Bus;
use super::check::past::{self, Compared};
use super::database::{Access, Database};
use super::slot_copy::{Decoder, Mapped, Next, SlotCopy};
use crate::config::Config;
use crate::exit::Exit;
use crate::jetstream::client::Link;
use crate::jetstream::streams::{self, StoredMessage, StreamInfo, message_request};
use crate::outbox::lineage::Lineage;
use crate::outbox::mapping::Mapping;
use crate::outbox::park::{OnBad, OnPoison};
use crate::outbox::position::Position;
use crate::postgres::{Connection, Lsn};
use crate::relay::checkpoint::record::{Cut, Record};
use crate::relay::connect::message_of;
use crate::relay::session;
use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

/// For one statement: a filter may pass over a large table before it finds a row, and a large transaction is decoded whole.
const STATEMENT_LIMIT: Duration = Duration::from_secs(600);
/// For the WAL from the slot's position to what was resolved last.
const DECODE_LIMIT: Duration = Duration::from_secs(60);
/// Longer than that.
const ANSWER_LIMIT: Duration = Duration::from_secs(630);
/// How long what was committed without waiting for the disk may take to get there.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);
/// So many messages are asked for in a row, and so many of them, or of bytes, are on their way at a time.
const IN_A_ROW: u64 = 512;
const AT_ONCE: u64 = 64;
const AT_ONCE_BYTES: u64 = 4 * 1024 * 1024;
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// See the module.
pub struct Sides<'a> {
    /// The connection to NATS.
    pub bus: Bus<'a, Link>,
    /// Which WAL this is.
    pub lineage: Lineage,
    /// What was committed before this is compared.
    pub upto: Lsn,
    /// What was committed before this is resolved; the relay publishes the rest by itself.
    pub resolved: Lsn,
    /// Those under the prefix, under the park subject, and those that the record names.
    pub streams: Vec<StreamInfo>,
    /// What an operator should know besides.
    pub notes: Vec<String>,
    slot: Option<(Database, SlotCopy)>,
}

/// What of a stream was there when it was read: it may drop messages meanwhile.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scanned {
    /// The sequence of the first message.
    pub first_seq: Option<u64>,
    /// How many messages.
    pub messages: u64,
}

impl<'a> Sides<'a> {
    /// Reads them. `snapshot` is begun between the slot and the streams.
    pub fn open(
        config: &'a Config,
        snapshot: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Sides<'a>, Error> {
        let mut bus = Bus::connect(&config.nats)?;
        let mut database = connect(config, Access::Read)?;
        let mut connection = Connection::connect(&config.db)?;
        let lineage = session::lineage(&mut connection, &config.slot).map_err(of_relay)?;
        let mut notes = Vec::new();
        let past = past(&mut bus, config, lineage.source.system_id);
        let copy = copy(&mut database, config, &mut notes)?;
        snapshot()?;
        let upto = end_of_wal(&mut database)?;
        let confirmed = confirmed(&mut database, config)?;
        let record = match &past {
            Past::Same => bus.record(config, lineage.source.system_id)?,
            // it publishes what the slot has, once that is accepted
            Past::Other(_) => None,
            // what the record says may be of another WAL
            Past::Unknown(_) => None,
        };
        let record = record.and_then(|record| record.rebase(&lineage).ok());
        let streams = read_streams(&mut bus, config, record.as_ref())?;
        let cut = record
            .as_ref()
            .and_then(|it| agreed(&mut bus, it, &streams, &lineage));
        let stored = cut.transpose()?.filter(|lsn| *lsn <= upto);
        notes.extend(past.note());
        if let (Some(record), Some(confirmed)) = (&record, confirmed)
            && record.is_exceeded(confirmed)
        {
            notes.push(format!(
                "slot {} is at {confirmed}, but a relay has confirmed {} at most: a relay halts here, see check",
                config.slot, record.told_lsn
            ));
        }
        Ok(Sides {
            bus,
            lineage,
            upto,
            resolved: confirmed.max(stored).unwrap_or_default(),
            streams,
            notes,
            slot: copy.map(|copy| (database, copy)),
        })
    }

    /// There is a slot, so that what is written now is sent to a relay.
    pub fn has_slot(&self) -> bool {
        self.slot.is_some()
    }

    /// Decodes what the slot still has, and gives it to `take` until that fails.
    pub fn decode(
        &mut self,
        config: &Config,
        mut take: impl FnMut(Mapped) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some((mut database, copy)) = self.slot.take() else {
            return Ok(());
        };
        let sql = copy.changes("data");
        let mut decoder = Decoder::new(&judging(&config.mapping));
        let upto = self.upto;
        loop {
            let next = copy.next(&mut database, &sql, |row| {
                let taken = match decoder.take(row.get(1)) {
                    Ok(None) => return ControlFlow::Continue(()),
                    Ok(Some(mapped)) if mapped.place.position.commit_lsn >= upto => Ok(false),
                    Ok(Some(mapped)) => take(mapped).map(|()| true),
                    Err(error) => Err(Error::Wrong {
                        what: format!("decode a copy of the slot: {error}"),
                        remedy: "this is a defect, or the server is no Postgres".into(),
                        exit: Exit::Internal,
                    }),
                };
                match taken {
                    Ok(true) => ControlFlow::Continue(()),
                    Ok(false) => ControlFlow::Break(Ok(())),
                    Err(error) => ControlFlow::Break(Err(error)),
                }
            })?;
            match next {
                Next::More => {}
                Next::Found(result) => {
                    result?;
                    break;
                }
                Next::End => break,
            }
        }
        copy.drop(&mut database)
    }

    /// Reads each message of a stream once, in order. `read` makes of it what is kept, and of that some hundreds are held. Returns
    /// what was there.
    pub fn scan<T>(
        &mut self,
        stream: usize,
        read: impl Fn(StoredMessage) -> Option<T>,
        mut take: impl FnMut(T) -> Result<(), Error>,
    ) -> Result<Scanned, Error> {
        let mut scanned = Scanned::default();
        let Some(info) = self.streams.get(stream) else {
            return Ok(scanned);
        };
        let name = info.config.name.as_str();
        let average = (info.state.bytes / info.state.messages.max(1)).max(1);
        let at_once = (AT_ONCE_BYTES / average).clamp(1, AT_ONCE) as usize;
        let mut next = info.state.first_seq.max(1);
        let mut reported = Instant::now();
        while next <= info.state.last_seq {
            let count = IN_A_ROW.min(info.state.last_seq - next + 1) as usize;
            let mut found: Vec<Option<T>> = (0..count).map(|_| None).collect();
            let mut seqs: Vec<Option<u64>> = vec![None; count];
            self.bus.ask(|link, timeout| {
                let request = |nth: usize| message_request(name, next + nth as u64);
                let keep = |nth: usize, body: &[u8]| {
                    if let (Some(message), Some(place), Some(seq)) = (
                        streams::parse_message(body)?,
                        found.get_mut(nth),
                        seqs.get_mut(nth),
                    ) {
                        // asked again after a break, it is there once
                        *seq = Some(message.seq);
                        *place = read(message);
                    }
                    Ok(())
                };
                link.call_each(count, request, at_once, timeout, keep, |_| ())
            })?;
            for seq in seqs.into_iter().flatten() {
                scanned.first_seq.get_or_insert(seq);
                scanned.messages = scanned.messages.saturating_add(1);
            }
            for found in found.into_iter().flatten() {
                take(found)?;
            }
            let Some(after) = next.checked_add(count as u64) else {
                break;
            };
            next = after;
            if reported.elapsed() >= REPORT_INTERVAL {
                reported = Instant::now();
                log::info!(stream = name, sequence = next, last = info.state.last_seq; "reading the stream");
            }
        }
        Ok(scanned)
    }

    /// How many messages the streams have.
    pub fn messages(&self) -> u64 {
        let counts = self.streams.iter().map(|it| it.state.messages);
        counts.fold(0, u64::saturating_add)
    }

    /// One message of a stream.
    pub fn message(&mut self, stream: usize, seq: u64) -> Result<Option<StoredMessage>, Error> {
        let name = self.name(stream).to_string();
        Ok(self.bus.message(message_request(&name, seq))?)
    }

    /// The name of a stream.
    pub fn name(&self, stream: usize) -> &str {
        let info = self.streams.get(stream);
        info.map_or("", |info| info.config.name.as_str())
    }
}

/// A session whose statements may take long.
pub fn connect(config: &Config, access: Access) -> Result<Database, Error> {
    let mut database = Database::connect_within(&config.db, access, ANSWER_LIMIT)?;
    let limit = STATEMENT_LIMIT.as_millis();
    // a role that sees some rows only would find the others missing
    database.run(
        "set the session up",
        &format!(
            "SET statement_timeout = {limit}; SET idle_in_transaction_session_timeout = 0; SET row_security = off"
        ),
    )?;
    Ok(database)
}

/// Events that cannot be published are told from others: those that the relay gives up, and the rest, which it parks or halts at.
pub fn judging(mapping: &Mapping) -> Mapping {
    let mut mapping = mapping.clone();
    if mapping.policy.on_poison == OnPoison::Stop {
        mapping.policy.on_poison = OnPoison::Park;
    }
    for on_bad in [
        &mut mapping.policy.on_bad_subject,
        &mut mapping.policy.on_bad_header,
    ] {
        if *on_bad == OnBad::Stop {
            *on_bad = OnBad::Park;
        }
    }
    mapping
}

fn of_relay(error: crate::relay::error::Error) -> Error {
    match error {
        crate::relay::error::Error::Postgres(error) => Error::Postgres(error),
        error => Error::Wrong {
            what: error.to_string(),
            remedy: "see what check says".into(),
            exit: Exit::Configuration,
        },
    }
}

/// A copy of the slot, if there is one that can be decoded.
fn copy(
    database: &mut Database,
    config: &Config,
    notes: &mut Vec<String>,
) -> Result<Option<SlotCopy>, Error> {
    let slot = database.row(
        "look at the slot",
        "SELECT pg_catalog.pg_is_in_recovery(), s.slot_name IS NOT NULL, COALESCE(to_jsonb(s) ->> 'wal_status' = 'lost', false), \
         EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = $2) \
         FROM (VALUES (1)) AS one LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = $1",
        &[&config.slot, &config.publication],
    )?;
    let flag = |index| slot.as_ref().is_some_and(|row| row.get(index));
    if flag(0) {
        return Err(Error::Wrong {
            what: "compare with Postgres: this server is a standby".into(),
            remedy: "name the primary with -db, where the relay's slot is".into(),
            exit: Exit::Configuration,
        });
    }
    let no_publication = || Error::Wrong {
        what: format!(
            "find the publication: {} does not exist",
            config.publication
        ),
        remedy: "correct -db or -publication, or run setup".into(),
        exit: Exit::Configuration,
    };
    if !flag(3) {
        return Err(no_publication());
    }
    let why = match (flag(1), flag(2)) {
        (false, _) => "does not exist",
        (true, true) => "is lost",
        (true, false) => {
            let copy = SlotCopy::create(database, config, "compare", STATEMENT_LIMIT)?;
            return copy.map(Some).ok_or_else(no_publication);
        }
    };
    notes.push(format!(
        "slot {} {why}: only rows are compared, and nothing waits for a relay",
        config.slot
    ));
    Ok(None)
}

/// Where the WAL ends, once all before it can be decoded.
fn end_of_wal(database: &mut Database) -> Result<Lsn, Error> {
    let mut ask = |sql: &str| -> Result<Lsn, Error> {
        let row = database.row("look where the WAL ends", sql, &[])?;
        let text = row.and_then(|row| row.get::<_, Option<String>>(0));
        Ok(text.and_then(|it| it.parse().ok()).unwrap_or_default())
    };
    let upto = ask("SELECT pg_catalog.pg_current_wal_insert_lsn()::text")?;
    let start = Instant::now();
    // synchronous_commit = off: the WAL writer follows. At the beginning of a page the one never reaches the other
    while ask("SELECT pg_catalog.pg_current_wal_flush_lsn()::text")? < upto
        && start.elapsed() < FLUSH_LIMIT
    {
        thread::sleep(LOOK);
    }
    Ok(upto)
}

fn confirmed(database: &mut Database, config: &Config) -> Result<Option<Lsn>, Error> {
    let row = database.row(
        "look at the slot",
        "SELECT confirmed_flush_lsn::text FROM pg_catalog.pg_replication_slots WHERE slot_name = $1",
        &[&config.slot],
    )?;
    let text = row.and_then(|row| row.get::<_, Option<String>>(0));
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Whether this is the WAL that the streams were written from.
enum Past {
    /// It is, or there is no record that would say otherwise.
    Same,
    /// It is not, so that a relay halts.
    Other(String),
    /// That could not be compared.
    Unknown(String),
}

impl Past {
    fn note(&self) -> Option<String> {
        match self {
            Past::Same => None,
            Past::Other(why) => Some(format!("a relay halts here, see check: {why}")),
            Past::Unknown(why) => Some(format!(
                "whether the streams were written from this WAL is not known, so what the slot still has is taken to wait; see check: {why}"
            )),
        }
    }
}

fn past(bus: &mut Bus<'_, Link>, config: &Config, system_id: u64) -> Past {
    let record = match bus.record(config, system_id) {
        Ok(Some(record)) => record,
        Ok(None) => return Past::Same,
        Err(error) => return Past::Unknown(error.to_string()),
    };
    match past::compare(&config.db, config, record, DECODE_LIMIT) {
        Ok(Compared::Other(reason)) => Past::Other(reason),
        Ok(Compared::Same(_)) => Past::Same,
        Err(error) => Past::Unknown(error.to_string()),
    }
}

fn read_streams(
    bus: &mut Bus<'_, Link>,
    config: &Config,
    record: Option<&Record>,
) -> Result<Vec<StreamInfo>, Error> {
    let mut infos = bus.streams(&format!("{}.>", config.prefix))?;
    let parked = bus.streams(&config.mapping.policy.park_subject)?;
    let named = record.iter().flat_map(|record| cuts(record));
    let named: Vec<String> = named
        .flat_map(|cut| cut.streams.iter().map(|it| it.name.clone()))
        .collect();
    let is_new =
        |infos: &[StreamInfo], name: &str| infos.iter().all(|info| info.config.name != name);
    for info in parked {
        if is_new(&infos, &info.config.name) {
            infos.push(info);
        }
    }
    for name in named {
        if is_new(&infos, &name) {
            infos.extend(bus.stream(&name)?);
        }
    }
    Ok(infos)
}

/// The youngest first.
fn cuts(record: &Record) -> impl Iterator<Item = &Cut> {
    let ripening = record.ripening.iter().map(|it| &it.cut);
    [&record.young]
        .into_iter()
        .chain(ripening)
        .chain(&record.matured)
}

/// Up to where everything is resolved, by the youngest cut that all streams agree with: a relay resumes with it. `None`: there is none.
fn agreed(
    bus: &mut Bus<'_, Link>,
    record: &Record,
    infos: &[StreamInfo],
    lineage: &Lineage,
) -> Option<Result<Lsn, Error>> {
    for cut in cuts(record) {
        match agrees(bus, cut, infos, lineage) {
            Ok(true) => return Some(Ok(cut.stored_lsn)),
            Ok(false) => {}
            Err(error) => return Some(Err(error)),
        }
    }
    None
}

fn agrees(
    bus: &mut Bus<'_, Link>,
    cut: &Cut,
    infos: &[StreamInfo],
    lineage: &Lineage,
) -> Result<bool, Error> {
    for of_cut in &cut.streams {
        let named = |info: &&StreamInfo| info.config.name == of_cut.name;
        let Some(info) = infos.iter().find(named) else {
            return Ok(false);
        };
        let witness = of_cut.witness.as_ref();
        let least = of_cut.read_after.max(witness.map_or(0, |it| it.seq));
        let found = match witness {
            Some(witness) if info.state.last_seq >= least => {
                bus.message(message_request(&of_cut.name, witness.seq))?
            }
            _ => None,
        };
        let is_there = match (witness, &found) {
            (Some(witness), Some(found)) => message_of(found).is_at(&witness.position, lineage),
            _ => info.created == of_cut.created,
        };
        if info.state.last_seq < least || !is_there {
            return Ok(false);
        }
        if let Some(unseen) = &of_cut.unseen
            && let Some(found) = bus.message(message_request(&of_cut.name, unseen.seq))?
            && !message_of(&found).is_at(&unseen.position, lineage)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The event there is resolved.
pub fn is_resolved(at: Position, resolved: Lsn) -> bool {
    at.commit_lsn < resolved
}
