//! One session: connect to both sides, find out where to go on, and run the three [`threads`](super::threads).

use super::checkpoint::store::{Identity, Store};
use super::connect::{Connector, Found};
use super::core::at_least_once::AtLeastOnce;
use super::core::continuity::Continuity;
use super::core::exactly_once::ExactlyOnce;
use super::core::resume::facts::Known;
use super::core::trouble::Halt;
use super::core::window::Limits;
use super::core::{Core, Tally};
use super::error::Error;
use super::preflight::publication_state::PublicationState;
use super::preflight::watch::Watch;
use super::preflight::{Facts, Level, publication};
use super::repeated::Repeated;
use super::slot::{self, Slot};
use super::stop::Stop;
use super::threads::{Ended, Threads};
use super::vitals::Vitals;
use crate::config::Config;
use crate::jetstream::Delivery;
use crate::jetstream::client::Link;
use crate::outbox::lineage::{Lineage, parse_timeline_history};
use crate::outbox::mapper::Mapper;
use crate::outbox::position::{Position, Source};
use crate::postgres::replication;
use crate::postgres::{Connection, Lsn};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Unacknowledged bytes: enough for a thousand events of 4 KiB, or several of the largest size, on their
/// way at once; it bounds what the relay holds when JetStream is slow.
const INFLIGHT_BYTES: usize = 4 * 1024 * 1024;
/// nats-server remembers where the last 512 subjects of a connection led. With a new name for each answer it spends a
/// fifth more on an event.
const REPLIES: u64 = 256;
/// So often in a row Postgres may fail to decode at one place, by an error that may pass, before it counts as one that does not.
/// With the pauses between sessions that takes seconds.
const DECODE_TRIES: u32 = 8;

/// What one session leaves to the next. How far it was, the record says.
pub struct Session<'a> {
    config: &'a Config,
    stop: &'a Stop,
    mapper: Mapper,
    store: Store,
    said: Repeated,
    accepted: Accepted,
    /// What of the outboxes reached the relay when it last looked.
    published: Option<PublicationState>,
    /// With `-drain`: the end of the WAL at the first start, which later sessions have to reach too.
    upto: Option<Lsn>,
    /// How often in a row NATS was asked, and no session came of it.
    tries: usize,
    worked: bool,
    /// Postgres has let this process in.
    was_let_in: bool,
    /// How often in a row the streams could not be read back.
    failed_reads: u32,
    /// Where Postgres could not decode its WAL, by which SQLSTATE, and how often in a row.
    undecodable: Option<((String, Lsn), u32)>,
    vitals: &'a Vitals,
}

/// What a session begins with.
struct Begun {
    link: Link,
    core: Core,
    /// Everything up to here was resolved before; the copy stream starts at its commit.
    resolved: Position,
    /// See [`ExactlyOnce::earlier_upto`].
    earlier_upto: Lsn,
    has_record: bool,
    published: PublicationState,
}

/// How far `-resume-anyway` goes, which holds for the first session that comes to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accepted {
    /// Nothing: what does not fit halts the relay.
    Nothing,
    /// What is lost is lost, and what was moved was moved.
    Loss,
    /// And this is another WAL than the one that the streams were written from.
    OtherWal,
}

impl<'a> Session<'a> {
    /// Before the first session.
    pub fn new(
        config: &'a Config,
        stop: &'a Stop,
        mapper: Mapper,
        vitals: &'a Vitals,
    ) -> Session<'a> {
        let identity = Identity {
            bucket: config.checkpoint.clone(),
            slot: config.slot.clone(),
            writer: writer(),
            flags: config.flags(),
            delivery: config.delivery,
        };
        Session {
            config,
            stop,
            mapper,
            store: Store::new(identity, config.hold_back, Instant::now()),
            said: Repeated::default(),
            accepted: match config.resume_anyway {
                true => Accepted::Loss,
                false => Accepted::Nothing,
            },
            published: None,
            upto: None,
            tries: 0,
            worked: false,
            was_let_in: false,
            failed_reads: 0,
            undecodable: None,
            vitals,
        }
    }

    /// Whether the last session got something done.
    pub fn take_worked(&mut self) -> bool {
        std::mem::take(&mut self.worked)
    }

    /// Postgres let us in before, and will again once the file of a password or certificate, which is read at each connect, or
    /// what Postgres has of it, is the new one.
    pub fn may_be_let_in_again(&self, error: &Error) -> bool {
        self.was_let_in && matches!(error, Error::Postgres(error) if error.is_of_sign_in())
    }

    /// Runs one session to its end.
    pub fn run(&mut self) -> Result<Ended, Error> {
        let outcome = self.connect_and_run().map_err(|error| self.returned(error));
        let is_other_wal = |error: &Error| {
            use Halt::{Discontinuous, NotSent, OtherId};
            matches!(
                error,
                Error::Halt(Discontinuous(_) | NotSent { .. } | OtherId { .. })
                    | Error::OtherFlags { .. }
            )
        };
        match outcome {
            Err(error) if self.accepted == Accepted::Loss && is_other_wal(&error) => {
                log::warn!("{error}; accepted (-resume-anyway): going on with what the slot sends");
                self.accepted = Accepted::OtherWal;
                self.connect_and_run()
            }
            outcome => outcome,
        }
    }

    /// What Postgres cannot decode it will never be able to, if it has failed there again and again.
    fn returned(&mut self, mut error: Error) -> Error {
        self.failed_reads += u32::from(matches!(error, Error::ReadBack(_)));
        let Error::Undecodable(found) = &mut error else {
            return error;
        };
        let code = found.error.sqlstate().unwrap_or_default().to_string();
        let place = found.at.or(found.commit_lsn).unwrap_or(found.reached);
        let place = (code, place);
        match &mut self.undecodable {
            Some((known, times)) if *known == place => {
                *times += 1;
                found.is_for_good |= *times >= DECODE_TRIES;
            }
            other => *other = Some((place, 1)),
        }
        error
    }

    fn connect_and_run(&mut self) -> Result<Ended, Error> {
        let config = self.config;
        let mut connection = Connection::connect(&config.db)?;
        self.was_let_in = true;
        self.mapper
            .set_encoding(connection.use_database_encoding()?);
        let (slot, facts) = slot::check(&mut connection, config)?;
        let wal_end = slot::current_lsn(&mut connection)?;
        self.vitals.slot_wal.look(&mut connection, &config.slot);
        if config.drain && self.upto.is_none() {
            self.vitals.drains_upto.set(wal_end.0);
            self.upto = Some(wal_end);
        }
        let lineage = lineage(&mut connection, &config.slot)?;
        let connector = Connector {
            config,
            lineage: &lineage,
            stop: self.stop,
            accept_loss: self.accepted != Accepted::Nothing,
            failed_reads: self.failed_reads,
        };
        let begun = self.begin(&connector, &mut connection, &slot, facts)?;
        let Begun { link, core, .. } = begun;
        log::info!(
            postgres = connection.parameter("server_version").unwrap_or("unknown"), host = connection.peer(),
            system_id = lineage.source.system_id, timeline = lineage.source.timeline, slot = config.slot.as_str(),
            confirmed_flush_lsn:% = slot.confirmed_flush_lsn, start:% = begun.resolved.commit_lsn,
            nats = link.server_info().version.as_str(), server = link.server();
            "connected"
        );
        let version = connection.parameter("server_version").unwrap_or_default();
        self.vitals.set_postgres(connection.peer(), version);
        self.vitals
            .set_nats(link.server(), &link.server_info().version);
        let options = slot::pgoutput_options(
            connection.server_version_num(),
            &config.publication,
            config.mapping.message_prefix.is_some(),
        );
        let options: Vec<(&str, &str)> = options
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let watch = Watch::new(
            config,
            connection.peer(),
            begun.published,
            self.store.publication(),
            self.vitals.slot_wal.clone(),
        );
        let confirmed = slot.confirmed_flush_lsn;
        let peer = connection.peer().to_string();
        let (stream, writer) = replication::start_replication(
            connection,
            &config.slot,
            begun.resolved.commit_lsn,
            &options,
        )
        .map_err(|error| wal_removed(in_use(error, &config.slot), &config.slot, confirmed))?;
        let threads = Threads {
            config,
            stop: self.stop,
            lineage: &lineage,
            upto: self.upto,
            resolved: begun.resolved,
            earlier_upto: begun.earlier_upto,
            wal_sender_timeout: slot.wal_sender_timeout,
            vitals: self.vitals,
        };
        (self.tries, self.failed_reads) = (0, 0);
        self.vitals
            .session_starts(slot.confirmed_flush_lsn, wal_end);
        let store = begun.has_record.then_some(&mut self.store);
        let mapper = &mut self.mapper;
        let outcome = threads.run((stream, &writer), link, core, store, mapper, watch);
        self.published = Some(outcome.published);
        self.worked = outcome.tally != Tally::default();
        if !matches!(outcome.result, Err(Error::Halt(_))) {
            self.accepted = Accepted::Nothing;
        }
        if matches!(outcome.result, Err(Error::Halt(Halt::Discontinuous(_)))) {
            // nothing is told to Postgres before continuity is proven, so it was somebody else
            slot::check_untouched(&mut slot::plain(config, &peer)?, config, &slot)?;
        }
        let result = outcome.result;
        result.map_err(|error| wal_removed(error, &config.slot, confirmed))
    }

    /// Connects to NATS, and finds out where to go on.
    fn begin(
        &mut self,
        connector: &Connector<'_>,
        connection: &mut Connection,
        slot: &Slot,
        facts: Facts,
    ) -> Result<Begun, Error> {
        let tries = self.tries;
        self.tries += 1;
        let mut found = connector.find(tries, &mut self.said)?;
        let limits = Limits {
            inflight: self.config.inflight,
            inflight_bytes: INFLIGHT_BYTES,
            replies: REPLIES,
            ack_timeout: self.config.ack_timeout,
        };
        self.store.start_over();
        let read = connector.read_key(&found, &mut self.store);
        if self.config.delivery == Delivery::ExactlyOnce {
            let _ = read?;
            let published = self.check_publication(connection.peer(), facts)?;
            let (link, core) =
                self.start_exactly_once(connector, found, connection, slot, limits)?;
            return Ok(Begun {
                link,
                resolved: core.resolved_before(),
                earlier_upto: core.earlier_upto(),
                core: Core::ExactlyOnce(Box::new(core)),
                has_record: true,
                published,
            });
        }
        if let Err(error) = &read {
            if self.said.is_new("checkpoint", Instant::now()) {
                log::warn!("going on without the checkpoint: {error}");
            }
            // what is not allowed ends the connection
            found = connector.find(tries, &mut self.said)?;
        }
        let published = self.check_publication(connection.peer(), facts)?;
        let core = AtLeastOnce::start(limits, connector.capacity(&found));
        Ok(Begun {
            link: found.link,
            resolved: Position::default(),
            earlier_upto: Lsn::INVALID,
            core: Core::AtLeastOnce(Box::new(core)),
            has_record: read.is_ok(),
            published,
        })
    }

    /// Resumes with the record, and claims the slot's streams.
    fn start_exactly_once(
        &mut self,
        connector: &Connector<'_>,
        found: Found,
        connection: &mut Connection,
        slot: &Slot,
        limits: Limits,
    ) -> Result<(Link, ExactlyOnce), Error> {
        let confirmed_lsn = slot.confirmed_flush_lsn;
        let held = self.store.held();
        // R20
        if let Some(record) = held.filter(|record| record.is_exceeded(confirmed_lsn))
            && self.accepted == Accepted::Nothing
        {
            return Err(Error::SlotMoved {
                slot: self.config.slot.clone(),
                confirmed: confirmed_lsn,
                told: record.told_lsn,
            });
        }
        self.store.accept_slot(confirmed_lsn);
        let also = match self.accepted {
            Accepted::OtherWal => self.store.disown(),
            Accepted::Nothing | Accepted::Loss => Vec::new(),
        };
        let known = Known {
            also,
            ..Known::of_record(&self.store, confirmed_lsn, Instant::now())
        };
        let (link, found) = connector.resume(found, &self.store, known)?;
        // another relay may have published while this one read: the WAL that it did so from ends behind all that was read
        slot::check_untouched(connection, self.config, slot)?;
        let wal_end = slot::current_lsn(connection)?;
        let resumed = &found.resumed;
        for lost in &resumed.disagreed {
            log::warn!("{lost}; going back to where the checkpoint and the streams agree");
        }
        if resumed.confirmed_are_gone {
            log::warn!(
                "among what is gone are events that Postgres was told of: the slot cannot send them again; if nobody deleted them, \
                 nats-server has lost them: restore the stream from a backup, or write them again"
            );
        }
        let fell_back = resumed.fell_back();
        let anchor = &resumed.anchor;
        let flags = self.config.flags();
        if resumed.is_mixed(&flags) && self.accepted != Accepted::OtherWal {
            return Err(Error::OtherFlags {
                after: anchor.position,
                may_go_back: !resumed.flags.are_several(),
            });
        }
        let continuity = match self.accepted {
            Accepted::OtherWal => Ok(Continuity::accepted(wal_end, flags)),
            _ => Continuity::resumed(resumed, confirmed_lsn, wal_end, flags),
        };
        let continuity = continuity.map_err(|broken| Error::Halt(Halt::Discontinuous(broken)))?;
        let now = Instant::now();
        let lineage = connector.lineage.clone();
        let mut core = ExactlyOnce::start(lineage, limits, continuity, found, wal_end, now);
        connector.claim(&link, &mut core, &mut self.store, fell_back, confirmed_lsn)?;
        Ok((link, core))
    }
}

/// A name for this process that no other has, on whatever host or in whatever container.
fn writer() -> String {
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    format!("{:x}-{:x}", since_1970.as_nanos(), std::process::id())
}

impl Session<'_> {
    /// Sees that what reached an earlier session, or an earlier process, still does.
    fn check_publication(
        &mut self,
        peer: &str,
        mut facts: Facts,
    ) -> Result<PublicationState, Error> {
        let config = self.config;
        let seen = self.store.publication();
        let remembered = || PublicationState::from_text(&seen.get()?);
        let accept = self.published.is_none() && config.resume_anyway;
        let before = self.published.clone().or_else(remembered);
        let lost = match before {
            Some(before) => before.look(&mut facts, config, |oids| {
                slot::outboxes(config, peer, oids)
            })?,
            None => None,
        };
        match lost {
            Some(lost) if accept => {
                log::warn!("going on although {} (-resume-anyway)", lost.found);
            }
            Some(lost) => return Err(Error::Preflight(vec![lost])),
            None => {}
        }
        let findings = publication::START
            .iter()
            .flat_map(|rule| rule(&facts, config));
        for finding in findings.filter(|finding| finding.level != Level::Ok) {
            match finding.level {
                Level::Fail => return Err(Error::Preflight(vec![finding])),
                _ if self.said.is_new(&finding.found, Instant::now()) => {
                    log::warn!("{}", finding.sentence());
                }
                _ => {}
            }
        }
        let now = PublicationState::of(&facts.outboxes, config).unwrap_or_default();
        seen.set(Some(now.to_text()));
        Ok(self.published.insert(now).clone())
    }
}

fn in_use(error: crate::postgres::Error, slot: &str) -> Error {
    match error.sqlstate() {
        Some("55006") => Error::SlotInUse {
            slot: slot.to_string(),
            pid: None,
        },
        _ => Error::Postgres(error),
    }
}

/// A file of the WAL that the slot needs is not there: somebody has removed it, or restored the server without it.
fn wal_removed(error: Error, slot: &str, confirmed: Lsn) -> Error {
    match &error {
        Error::Postgres(cause) if cause.sqlstate() == Some("58P01") => Error::Setup(format!(
            "read the WAL: Postgres no longer has what slot {slot} needs ({cause}); what was committed after {confirmed} is lost to \
             the relay: put the file back if there is a copy (an archive has it under the same name), or drop the slot, create it \
             again, publish by hand what the stream lacks, and pass -resume-anyway once"
        )),
        _ => error,
    }
}

/// Which server this is, and where its history branched.
pub fn lineage(connection: &mut Connection, slot: &str) -> Result<Lineage, Error> {
    let system = replication::identify_system(connection)?;
    let switch_points = match system.timeline {
        // the first timeline has no history
        0 | 1 => Vec::new(),
        timeline => {
            let rows = connection.simple_query(&format!("TIMELINE_HISTORY {timeline}"))?;
            let text = rows
                .first()
                .and_then(|row| row.get(1))
                .and_then(|cell| cell.as_deref());
            parse_timeline_history(text.unwrap_or_default())
        }
    };
    let source = Source {
        slot: slot.to_string(),
        system_id: system.system_id,
        timeline: system.timeline,
    };
    Ok(Lineage {
        source,
        switch_points,
    })
}
