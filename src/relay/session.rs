//! One session: connect to both sides, start the three threads, and end them in order.
//!
//! The order of the end is what loses nothing and repeats nothing: the reader stops, the publisher settles
//! what was read, and only then the feedback thread sends the last status update and CopyDone.

use super::bucket;
use super::checkpoint::{CheckpointStore, Opened};
use super::core::memory::Memory;
use super::core::{Core, Limits, Tally};
use super::error::Error;
use super::feedback::{self, Ask};
use super::preflight::publication_state::PublicationState;
use super::preflight::watch::{WATCH_INTERVAL, Watch};
use super::preflight::{Facts, Finding, Level, publication};
use super::progress::Progress;
use super::publisher::{Left, Publisher};
use super::reader::{self, CHANNEL_BATCHES, Reader};
use super::rejoin::{self, Joined};
use super::repeated::Repeated;
use super::slot;
use super::stop::Stop;
use super::vitals::{Phase, Vitals};
use crate::config::Config;
use crate::jetstream::Delivery;
use crate::jetstream::client::Link;
use crate::jetstream::resume::{Lineage, parse_timeline_history};
use crate::outbox::mapper::Mapper;
use crate::outbox::park::OnPoison;
use crate::outbox::position::{Position, Source, SourcePosition};
use crate::postgres::replication::{self, ReplicationReader, ReplicationWriter};
use crate::postgres::{ConnInfo, Connection, Lsn};
use crossbeam_channel::{Receiver, Sender, bounded, never, select, tick};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Unacknowledged bytes: enough for a thousand events of 4 KiB, or several of the largest size, on their
/// way at once; it bounds what the relay holds when JetStream is slow.
const INFLIGHT_BYTES: usize = 4 * 1024 * 1024;
/// nats-server remembers where the last 512 subjects of a connection led. With a new name for each answer it spends a
/// fifth more on an event.
const REPLIES: u64 = 256;
/// A reader that waits for Postgres is woken by a keepalive that we ask for; a dead Postgres sends none.
const WAKE_LIMIT: Duration = Duration::from_secs(3);
/// How often it is asked for until it comes.
const WAKE_INTERVAL: Duration = Duration::from_millis(10);
/// How long Postgres may take to answer CopyDone; in the middle of a large transaction it does not.
const GOODBYE_LIMIT: Duration = Duration::from_secs(2);
/// While JetStream takes nothing, whether Postgres shuts down is looked at this often.
const SHUTDOWN_LOOK: Duration = Duration::from_secs(5);
/// While draining, Postgres is asked this often how far it is: when idle it says so only now and then.
const DRAIN_PING: Duration = Duration::from_millis(100);
/// While a session runs, the supervisor does nothing that takes longer, `SHUTDOWN_LOOK` and a connect included.
const WAIT_LIMIT: Duration = Duration::from_secs(120);

/// Why a session ended, when nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A signal.
    Stopped,
    /// Everything `--drain` asks for is published.
    Drained,
}

/// What one session leaves to the next.
pub struct Session<'a> {
    config: &'a Config,
    stop: &'a Stop,
    mapper: Mapper,
    memory: Memory,
    store: CheckpointStore,
    said: Repeated,
    /// The checkpoint's marks were read, at the first session; from then on `memory` knows better.
    learned: bool,
    /// See [`Marks::reached`](super::core::memory::Marks::reached); as of the last session.
    reached: Option<SourcePosition>,
    /// What of the outboxes reached the relay when it last looked.
    published: Option<PublicationState>,
    /// With `--drain`: the end of the log at the first start, which later sessions have to reach too.
    upto: Option<Lsn>,
    /// How often in a row NATS was asked, and no session came of it.
    tries: usize,
    worked: bool,
    vitals: &'a Vitals,
}

impl<'a> Session<'a> {
    /// Before the first session.
    pub fn new(
        config: &'a Config,
        stop: &'a Stop,
        mapper: Mapper,
        vitals: &'a Vitals,
    ) -> Session<'a> {
        Session {
            config,
            stop,
            mapper,
            memory: Memory::default(),
            store: CheckpointStore::new(&config.checkpoint, &config.slot, writer()),
            said: Repeated::default(),
            learned: false,
            reached: None,
            published: None,
            upto: None,
            tries: 0,
            worked: false,
            vitals,
        }
    }

    /// Whether the last session got something done.
    pub fn take_worked(&mut self) -> bool {
        std::mem::take(&mut self.worked)
    }

    /// Runs one session to its end.
    pub fn run(&mut self) -> Result<Ended, Error> {
        let outcome = self.connect_and_run();
        if let Err(Error::Backwards(_)) = outcome {
            self.store.unripe();
        }
        outcome
    }

    fn connect_and_run(&mut self) -> Result<Ended, Error> {
        let config = self.config;
        let mut connection = Connection::connect(&config.db)?;
        let (slot, facts) = slot::check(&mut connection, config)?;
        let log_end = slot::current_lsn(&mut connection)?;
        if config.drain && self.upto.is_none() {
            self.vitals.drains_upto.set(log_end.0);
            self.upto = Some(log_end);
        }
        let lineage = lineage(&mut connection, &config.slot)?;
        let conflict = |(stream, conflict)| Error::Conflict { stream, conflict };
        self.memory
            .rebase(&lineage, config.accept_new_system)
            .map_err(conflict)?;
        let tries = self.tries;
        self.tries += 1;
        let found = rejoin::find(config, tries, &mut self.said)?;
        let timeout = config.nats.request_timeout;
        let opened = bucket::open(&mut self.store, &found.link, found.replicas(), timeout)?;
        let Opened {
            marks, by_another, ..
        } = opened.unwrap_or_default();
        let marks_reached = marks.reached.clone();
        let resume_anyway = config.resume_anyway && !self.learned;
        // another relay may have confirmed more since our last session
        let reached = [&self.reached, &marks.reached].into_iter().flatten();
        let reached = reached.filter_map(|at| lineage.reach(at)).max();
        // without a checkpoint nobody says what another relay has confirmed
        let reached = reached.filter(|_| self.store.is_kept());
        if let Some(reached) = reached.filter(|lsn| *lsn < slot.confirmed_flush_lsn)
            && !resume_anyway
        {
            return Err(Error::SlotMoved {
                slot: config.slot.clone(),
                confirmed: slot.confirmed_flush_lsn,
                reached,
            });
        }
        self.memory.reached = reached.unwrap_or_default().max(slot.confirmed_flush_lsn);
        // accepted, also when this session comes to nothing and the checkpoint still holds the old one
        self.reached = Some(SourcePosition {
            source: lineage.source.clone(),
            position: Position {
                commit_lsn: self.memory.reached,
                ordinal: 0,
            },
        });
        let is_news = !self.learned || by_another;
        if is_news {
            let mut marks = marks.streams;
            marks.retain(|mark| !resume_anyway || found.has_kept(mark));
            self.memory.learn(marks, &lineage).map_err(conflict)?;
            self.store.learned();
        }
        self.learned = true;
        // of another system the publication is another one too: pg_upgrade and a restored dump create it again
        let system_id = lineage.source.system_id;
        let of_this_system =
            (marks_reached.as_ref()).is_none_or(|at| at.source.system_id == system_id);
        let published = self.check_publication(connection.peer(), facts, of_this_system)?;
        let memory = &self.memory;
        let (last_known, acked_seq) = (
            |stream: &str| memory.last_known(stream),
            |stream: &str| memory.acked_seq(stream),
        );
        let joined = found.join(config, &lineage, last_known, acked_seq)?;
        joined.tell_others(&mut self.said);
        if is_news && !resume_anyway {
            joined.check_whole(self.memory.reached)?;
        }
        let start = joined.start_position();
        let Joined {
            link,
            routes,
            streams,
        } = joined;

        // at least once there is nothing to compare with what a stream has lost
        let hold_back = match config.delivery {
            Delivery::ExactlyOnce => config.hold_back,
            Delivery::AtLeastOnce => Duration::ZERO,
        };
        let limits = Limits {
            inflight: config.inflight,
            inflight_bytes: INFLIGHT_BYTES,
            replies: REPLIES,
            ack_timeout: config.ack_timeout,
            hold_back,
        };
        let mut core = Core::new(config.delivery, limits, std::mem::take(&mut self.memory));
        if let Err(trouble) = core.connected(routes, streams, Instant::now()) {
            self.memory = core.into_memory();
            return Err(trouble.into());
        }
        core.takes(
            link.max_payload(),
            lineage.source.to_string().len(),
            config.mapping.policy.on_poison != OnPoison::Stop,
        );
        if self.store.is_kept() {
            let ripe = self.store.ripe(&lineage, hold_back, Instant::now());
            core.has_checkpoint(ripe);
        }
        core.log_ended_at(log_end);
        core.starts_at(start, Instant::now());
        let marks = core.marks(&lineage.source);
        match bucket::begin(&mut self.store, &link, marks, timeout) {
            Ok(Some(marks)) => core.kept(marks, Instant::now()),
            Ok(None) => {}
            Err(error) => {
                self.memory = core.into_memory();
                return Err(error);
            }
        }
        if !self.store.is_kept() {
            core.has_no_checkpoint(Instant::now());
        }
        log::info!(
            postgres = connection.parameter("server_version").unwrap_or("unknown"), host = connection.peer(),
            system_id = lineage.source.system_id, timeline = lineage.source.timeline, slot = config.slot.as_str(),
            confirmed_flush_lsn:% = slot.confirmed_flush_lsn, start:% = start,
            nats = link.server_info().version.as_str(), server = link.server();
            "connected"
        );
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
            published,
            self.store.publication(),
        );
        let started = replication::start_replication(connection, &config.slot, start, &options);
        let (stream, writer) = match started {
            Ok(halves) => halves,
            Err(error) => {
                self.memory = core.into_memory();
                return Err(in_use(error, &config.slot));
            }
        };
        let threads = Threads {
            config,
            stop: self.stop,
            lineage: &lineage,
            upto: self.upto,
            status_interval: feedback::status_interval(slot.wal_sender_timeout),
            vitals: self.vitals,
        };
        self.tries = 0;
        self.vitals.sessions.inc();
        self.vitals.confirmed.set(slot.confirmed_flush_lsn.0);
        self.vitals.enter(Phase::Relaying, None);
        let none = CheckpointStore::new("", &config.slot, String::new());
        let store = std::mem::replace(&mut self.store, none);
        let mapper = &mut self.mapper;
        let outcome = threads.run((stream, &writer), link, core, store, mapper, watch);
        self.published = Some(outcome.published);
        self.worked = outcome.left.tally != Tally::default();
        self.memory = outcome.left.memory;
        self.reached = Some(SourcePosition {
            source: lineage.source,
            position: Position {
                commit_lsn: self.memory.reached,
                ordinal: 0,
            },
        });
        self.store = outcome.left.store;
        outcome.result
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
        of_this_system: bool,
    ) -> Result<PublicationState, Error> {
        let config = self.config;
        let seen = self.store.publication();
        let remembered = || PublicationState::from_text(&seen.get().filter(|_| of_this_system)?);
        let accept = self.published.is_none() && config.resume_anyway;
        let before = self.published.clone().or_else(remembered);
        let lost = match before {
            Some(before) => before.look(&mut slot::plain(config, peer)?, &mut facts, config)?,
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

/// Which server this is, and where its history branched.
fn lineage(connection: &mut Connection, slot: &str) -> Result<Lineage, Error> {
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

/// What the three threads of a session share.
struct Threads<'a> {
    config: &'a Config,
    stop: &'a Stop,
    lineage: &'a Lineage,
    upto: Option<Lsn>,
    status_interval: Duration,
    vitals: &'a Vitals,
}

/// Why a session's threads ended, and what the publisher leaves.
struct Outcome {
    result: Result<Ended, Error>,
    left: Left,
    published: PublicationState,
}

impl Threads<'_> {
    /// Starts them, waits until one ends or the relay is asked to stop, and ends the others in order.
    fn run(
        &self,
        (mut stream, writer): (ReplicationReader, &ReplicationWriter),
        link: Link,
        core: Core,
        store: CheckpointStore,
        mapper: &mut Mapper,
        mut watch: Watch,
    ) -> Outcome {
        let progress = &Progress::default();
        // ends this session alone; `self.stop` ends the relay
        let session_stop = &Stop::default();
        let (changes_sender, changes) = bounded(CHANNEL_BATCHES);
        let (asks_sender, asks) = bounded(1);
        let (ended_sender, ended) = bounded(3);
        let publisher = Publisher::new(
            self.config,
            self.lineage,
            changes,
            progress,
            session_stop,
            (core, store),
            self.vitals,
        );
        let reader = Reader {
            changes: changes_sender,
            asks: asks_sender.clone(),
            progress,
            stop: session_stop,
            mapper,
            upto: self.upto,
            vitals: self.vitals,
        };
        let (read, published, fed_back, first) = thread::scope(|scope| {
            let source = &mut stream;
            let reader = spawn(scope, READER, &ended_sender, move || reader.run(source));
            let publisher = spawn(scope, "publisher", &ended_sender, move || {
                publisher.run(link)
            });
            let feedback = spawn(scope, "feedback", &ended_sender, move || {
                feedback::run(writer, progress, &asks, self.status_interval, self.vitals)
            });

            let mut wait = || self.wait(&ended, &asks_sender, progress, &mut watch);
            let mut first = wait();
            if first == First::Ended(READER) {
                // the publisher finds the channel closed when it has taken all that was read
                first = wait();
            }
            if let First::Lost(findings) = &first {
                progress.hold();
                for finding in findings {
                    log::warn!("{}: stopping; nothing more is confirmed", finding.found);
                }
            }
            session_stop.begin();
            if self.stop.is_stopping() {
                self.vitals.enter(Phase::Stopping, None);
            }
            wake(&reader, progress, writer, &asks_sender);
            let read = reader.join();
            let published = publisher.join();
            drop(asks_sender);
            (read, published, feedback.join(), first)
        });

        // a panic of the publisher takes the memory of the streams with it: they are read back as at a start
        let left = published.unwrap_or_else(|_| Left {
            result: Err(PANICKED),
            settled: false,
            tally: Tally::default(),
            memory: Memory::default(),
            store: CheckpointStore::new("", &self.config.slot, String::new()),
        });
        let shuts_down = first == First::ServerShutsDown;
        let result = match (left.result, read, fed_back) {
            (Err(error), _, _) => Err(error),
            (_, Err(_), _) | (_, _, Err(_)) => Err(PANICKED),
            (_, Ok(Err(error)), _) => Err(error),
            (_, _, Ok(Err(error))) => Err(Error::Postgres(error)),
            _ if shuts_down => Err(Error::ServerShutsDown),
            (_, Ok(Ok(reader::Ended::ByServer)), _) => Err(Error::EndedByServer),
            (_, Ok(Ok(reader::Ended::Drained)), _) if left.settled => Ok(Ended::Drained),
            (_, Ok(Ok(reader::Ended::Drained)), _) => Ok(Ended::Stopped),
            (_, Ok(Ok(reader::Ended::Stopped)), _) => Ok(Ended::Stopped),
        };
        let result = match first {
            First::Lost(findings) => Err(Error::Preflight(findings)),
            _ => result,
        };
        // whatever ended the session: what is stored by now is told to Postgres if it still listens
        let told = feedback::last(writer, progress).and_then(|()| stream.finish(GOODBYE_LIMIT));
        if let Err(error) = told {
            log::debug!(cause:% = error; "the last status update may not have arrived");
        }
        let left = Left {
            result: Ok(()),
            ..left
        };
        Outcome {
            result,
            left,
            published: watch.into_state(),
        }
    }

    /// Waits for what ends the session.
    fn wait(
        &self,
        ended: &Receiver<&'static str>,
        asks: &Sender<Ask>,
        progress: &Progress,
        watch: &mut Watch,
    ) -> First {
        let pings = if self.upto.is_some() {
            tick(DRAIN_PING)
        } else {
            never()
        };
        let looks = tick(SHUTDOWN_LOOK);
        let watches = tick(WATCH_INTERVAL);
        loop {
            self.vitals.supervisor.within(WAIT_LIMIT);
            select! {
                recv(ended) -> name => return First::Ended(name.unwrap_or_default()),
                recv(self.stop.channel()) -> _ => return First::StopAsked,
                recv(pings) -> _ => {
                    // a full channel: a status update is about to be sent anyway
                    let _ = asks.try_send(Ask::Ping);
                }
                recv(watches) -> _ => watch.ask(),
                recv(watch.looks()) -> look => match look.map(|now| watch.on_look(now, self.config)) {
                    Ok(Ok(())) => {}
                    Ok(Err(findings)) => return First::Lost(findings),
                    Err(_) => watch.end(),
                },
                recv(looks) -> _ => {
                    if progress.back_pressure() > SHUTDOWN_LOOK && shuts_down(&self.config.db) {
                        return First::ServerShutsDown;
                    }
                }
            }
        }
    }
}

/// What comes first.
#[derive(Clone, Debug, PartialEq, Eq)]
enum First {
    /// The thread of that name ended.
    Ended(&'static str),
    /// The relay is to stop.
    StopAsked,
    /// Postgres is seen to shut down.
    ServerShutsDown,
    /// Rows are seen to be left out.
    Lost(Vec<Finding>),
}

/// Postgres does not shut down before its walsenders have sent everything, and one that we take nothing
/// from cannot even ask. But it refuses new connections.
fn shuts_down(db: &ConnInfo) -> bool {
    match Connection::connect(&db.without_replication()) {
        // cannot_connect_now: it cannot be starting up, as it serves us
        Err(error) => error.sqlstate() == Some("57P03"),
        Ok(_) => false,
    }
}

const READER: &str = "reader";

const PANICKED: Error = Error::Internal("a thread panicked, see the log above");

/// Starts a thread that tells when it ends, also by a panic.
fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &'static str,
    ended: &Sender<&'static str>,
    run: impl FnOnce() -> T + Send + 'scope,
) -> ScopedJoinHandle<'scope, T> {
    struct Tell(Sender<&'static str>, &'static str);
    impl Drop for Tell {
        fn drop(&mut self) {
            let _ = self.0.try_send(self.1);
        }
    }
    let tell = Tell(ended.clone(), name);
    let body = move || {
        let _tell = tell;
        run()
    };
    thread::Builder::new()
        .name(name.to_string())
        .spawn_scoped(scope, body)
        .expect("the system grants a thread, or the relay cannot work at all")
}

/// Waits for the reader, who is asked to stop. One that waits for Postgres is woken by a keepalive, which
/// Postgres sends when asked; if it does not, the connection is closed. One that waits for the publisher
/// is free when that ends.
fn wake<T>(
    reader: &ScopedJoinHandle<'_, T>,
    progress: &Progress,
    writer: &ReplicationWriter,
    asks: &Sender<Ask>,
) {
    let begun = Instant::now();
    while !reader.is_finished() {
        if begun.elapsed() > WAKE_LIMIT && progress.silence() > WAKE_LIMIT {
            writer.shutdown();
        }
        let _ = asks.try_send(Ask::Ping);
        thread::sleep(WAKE_INTERVAL);
    }
}
