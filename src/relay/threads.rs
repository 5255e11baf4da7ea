//! The three threads of a session: started together, ended in order.
//!
//! The order of the end is what loses nothing and repeats nothing: the reader stops, the publisher settles
//! what was read, and only then the feedback thread sends the last status update and CopyDone.

use super::checkpoint::store::Store;
use super::core::{Core, Tally};
use super::error::Error;
use super::feedback::{self, Ask};
use super::preflight::Finding;
use super::preflight::publication_state::PublicationState;
use super::preflight::watch::{WATCH_INTERVAL, Watch};
use super::progress::Progress;
use super::publisher::{Left, Publisher};
use super::reader::{self, CHANNEL_BATCHES, Reader};
use super::stop::Stop;
use super::vitals::{Phase, Vitals};
use crate::config::Config;
use crate::jetstream::client::Link;
use crate::outbox::lineage::Lineage;
use crate::outbox::mapper::Mapper;
use crate::outbox::position::Position;
use crate::postgres::replication::{ReplicationReader, ReplicationWriter};
use crate::postgres::{self, ConnInfo, Connection, Lsn};
use crossbeam_channel::{Receiver, Sender, bounded, never, select, tick};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

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
    /// Everything `-drain` asks for is published.
    Drained,
}

/// What the three threads of a session share.
pub(super) struct Threads<'a> {
    pub(super) config: &'a Config,
    pub(super) stop: &'a Stop,
    pub(super) lineage: &'a Lineage,
    pub(super) upto: Option<Lsn>,
    /// Everything up to here was resolved before.
    pub(super) resolved: Position,
    /// See [`ExactlyOnce::earlier_upto`](super::core::exactly_once::ExactlyOnce::earlier_upto).
    pub(super) earlier_upto: Lsn,
    pub(super) wal_sender_timeout: Duration,
    pub(super) vitals: &'a Vitals,
}

/// Why a session's threads ended, and what they got done.
pub(super) struct Outcome {
    pub(super) result: Result<Ended, Error>,
    pub(super) tally: Tally,
    pub(super) published: PublicationState,
}

impl Threads<'_> {
    /// Starts them, waits until one ends or the relay is asked to stop, and ends the others in order.
    pub(super) fn run(
        &self,
        (mut stream, writer): (ReplicationReader, &ReplicationWriter),
        link: Link,
        core: Core,
        store: Option<&mut Store>,
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
            is_first: true,
            resolved: self.resolved,
            earlier_upto: self.earlier_upto,
            holds_last: self.config.transaction_headers,
        };
        let (read, published, fed_back, first) = thread::scope(|scope| {
            let source = &mut stream;
            let reader = spawn(scope, READER, &ended_sender, move || reader.run(source));
            let publisher = spawn(scope, "publisher", &ended_sender, move || {
                publisher.run(link)
            });
            let feedback = spawn(scope, "feedback", &ended_sender, move || {
                feedback::run(
                    writer,
                    progress,
                    &asks,
                    self.wal_sender_timeout,
                    self.vitals,
                )
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

        let left = published.unwrap_or_else(|_| Left {
            result: Err(PANICKED),
            settled: false,
            tally: Tally::default(),
        });
        let tally = left.tally;
        let result = ending(first, left, read, fed_back);
        // whatever ended the session: what is stored by now is told to Postgres if it still listens
        let told = feedback::last(writer, progress).and_then(|()| stream.finish(GOODBYE_LIMIT));
        if let Err(error) = told {
            log::debug!(cause:% = error; "the last status update may not have arrived");
        }
        Outcome {
            result,
            tally,
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

/// Of what the threads report, that which ended the session.
fn ending(
    first: First,
    published: Left,
    read: thread::Result<Result<reader::Ended, Error>>,
    fed_back: thread::Result<Result<(), postgres::Error>>,
) -> Result<Ended, Error> {
    let shuts_down = first == First::ServerShutsDown;
    if let First::Lost(findings) = first {
        return Err(Error::Preflight(findings));
    }
    match (published.result, read, fed_back) {
        (Err(error), _, _) => Err(error),
        (_, Err(_), _) | (_, _, Err(_)) => Err(PANICKED),
        // it has closed the connection, which is all that the reader sees
        (_, _, Ok(Err(error @ postgres::Error::Timeout { .. }))) => Err(Error::Postgres(error)),
        (_, Ok(Err(error)), _) => Err(error),
        (_, _, Ok(Err(error))) => Err(Error::Postgres(error)),
        _ if shuts_down => Err(Error::ServerShutsDown),
        (_, Ok(Ok(reader::Ended::ByServer)), _) => Err(Error::EndedByServer),
        (_, Ok(Ok(reader::Ended::Drained)), _) if published.settled => Ok(Ended::Drained),
        (_, Ok(Ok(reader::Ended::Drained | reader::Ended::Stopped)), _) => Ok(Ended::Stopped),
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
