//! The publisher thread: carries what the core decides to JetStream, and the answers back.
//!
//! It holds the connection to NATS, and makes a new one when the core or the connection itself says so;
//! the copy stream from Postgres stands still meanwhile and stays up. It calls nothing that can hang:
//! publishing takes what the socket takes, and asking and closing are done by threads of the link.

mod answers;
mod burst;
mod ending;
mod reconnect;

use super::checkpoint::kv;
use super::checkpoint::record::{Anchor, Cut};
use super::checkpoint::store::Store;
use super::connect;
use super::core::agreement::Look;
use super::core::trouble::Refusal;
use super::core::{Core, Tally};
use super::error::Error;
use super::outage::{Outage, WORKING};
use super::progress::Progress;
use super::pulse::Pulse;
use super::repeated::Repeated;
use super::report::Report;
use super::stop::Stop;
use super::vitals::{ReconnectCause, Vitals};
use crate::config::Config;
use crate::jetstream::ack::AckError;
use crate::jetstream::client::Link;
use crate::jetstream::streams;
use crate::nats::{self, EndedBy};
use crate::outbox::batch::{Batch, Fate};
use crate::outbox::flags::Flags;
use crate::outbox::lineage::Lineage;
use crate::postgres::Lsn;
use crossbeam_channel::{Receiver, never, select};
use ending::Ending;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// While something is held back, the confirmable position is looked at this often.
const HOLD_BACK_TICK: Duration = Duration::from_secs(1);
/// An idle stream is looked at this often, to see that it did not go backwards.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// The loop comes round more often than every `LOOK_INTERVAL`; what it does takes seconds at most.
const LOOP_LIMIT: Duration = Duration::from_secs(60);

/// The thread's state. `run` consumes it.
pub struct Publisher<'a> {
    config: &'a Config,
    lineage: &'a Lineage,
    changes: Receiver<Batch>,
    progress: &'a Progress,
    stop: &'a Stop,
    core: Core,
    /// The record; `None` with at-least-once delivery where the bucket cannot be used.
    store: Option<&'a mut Store>,
    /// `<slot> <system id> <timeline>`, as the position header begins.
    source: Arc<str>,
    outage: Outage,
    said: Repeated,
    report: Report,
    ending: Ending,
    /// Waits until what was published before it is answered.
    postponed: Option<Interrupt>,
    next_look: Instant,
    /// The PING that was sent last over this connection.
    pinged: u64,
    /// When the limits of server and streams were read again: at the last reconnect.
    limits_read: Option<Instant>,
    /// No stream captures this subject, which an event has.
    unrouted: Option<String>,
    /// Of the tally, what was warned of.
    warned: Tally,
    vitals: &'a Vitals,
    pulse: Pulse<'a>,
}

/// What the thread leaves.
pub struct Left {
    /// Why it ended.
    pub result: Result<(), Error>,
    /// Everything that was read is stored.
    pub settled: bool,
    /// What it got done.
    pub tally: Tally,
}

/// Why [`Publisher::serve`] left a connection.
enum Interrupt {
    /// It is replaced, for this reason.
    Reconnect(ReconnectCause, String),
    /// The same, after an event that can never be published as it is.
    Refused {
        /// Names the event.
        token: u64,
        /// Why.
        why: Refusal,
    },
    /// The session ends.
    End(Error),
}

impl<'a> Publisher<'a> {
    /// `core` is connected already, to the link that [`Publisher::run`] is given.
    pub fn new(
        config: &'a Config,
        lineage: &'a Lineage,
        changes: Receiver<Batch>,
        progress: &'a Progress,
        stop: &'a Stop,
        (core, store): (Core, Option<&'a mut Store>),
        vitals: &'a Vitals,
    ) -> Publisher<'a> {
        let now = Instant::now();
        Publisher {
            config,
            lineage,
            changes,
            progress,
            stop,
            core,
            store,
            source: lineage.source.to_string().into(),
            outage: Outage::new(config.max_outage),
            said: Repeated::default(),
            report: Report::new(now, vitals),
            ending: Ending::default(),
            postponed: None,
            next_look: now + LOOK_INTERVAL,
            pinged: 0,
            limits_read: None,
            unrouted: None,
            warned: Tally::default(),
            vitals,
            pulse: Pulse::new(vitals),
        }
    }

    /// Publishes until no more changes come and those that came are settled, or the deadline for that passes.
    pub fn run(mut self, link: Link) -> Left {
        let result = self.work(link);
        self.vitals.nats_is_connected(false);
        self.vitals.publisher.ended();
        self.confirm(Instant::now());
        self.pulse.tell(&self.core, self.progress, 0);
        self.report.finish(self.vitals);
        let settled = self.core.window().is_settled();
        if !settled {
            log::warn!("not everything was acknowledged; the slot sends it again");
        } else if result.is_ok() && !self.is_recorded() {
            let store = self.store.as_ref();
            let cause = store.and_then(|store| store.failure());
            log::warn!(
                cause:% = cause.unwrap_or(&AckError::NoAnswer);
                "the checkpoint was not written in time; what it lacks is stored, but not confirmed, so Postgres sends it again at the next start"
            );
        }
        Left {
            result,
            settled,
            tally: self.core.tally(),
        }
    }

    fn work(&mut self, link: Link) -> Result<(), Error> {
        let mut link = link;
        loop {
            self.vitals.nats_is_connected(true);
            self.progress.set_max_payload(link.max_payload());
            let start = Instant::now();
            let (cause, reason) = match self.serve(&link) {
                Ok(()) => return Ok(()),
                Err(Interrupt::End(error)) => return Err(error),
                Err(Interrupt::Reconnect(cause, reason)) => (cause, reason),
                Err(Interrupt::Refused { token, why }) => {
                    let room = self.core.room(&self.config.mapping.policy.park_subject);
                    self.core.on_disconnect();
                    let event = self.describe(token);
                    let reason = format!("publish {event}: {why}");
                    // what is parked already can become smaller, and nothing else
                    let is_parked = self
                        .core
                        .event(token)
                        .is_some_and(|it| it.fate == Fate::Park);
                    let is_lost = is_parked && !matches!(why, Refusal::ByStream(_));
                    if is_lost || !self.put_aside(token, &why.to_string(), room) {
                        return Err(Error::Refused { event, why });
                    }
                    (ReconnectCause::Refused, reason)
                }
            };
            let is_outage = !matches!(cause, ReconnectCause::Limits | ReconnectCause::LameDuck);
            if start.elapsed() >= WORKING || !is_outage {
                // also when there was nothing to publish
                self.outage.worked();
            }
            self.vitals.nats_is_connected(false);
            self.vitals.reconnects(cause);
            self.pulse.nothing_waits();
            self.core.on_disconnect();
            drop(link);
            match self.reconnect(&reason)? {
                Some(connected) => link = connected,
                None => return Ok(()),
            }
        }
    }

    /// Works with one connection until it fails, or everything is done.
    fn serve(&mut self, link: &Link) -> Result<(), Interrupt> {
        let (idle, never_stops) = (never(), never());
        self.postponed = None;
        loop {
            let now = Instant::now();
            while let Ok(answers) = link.answers().try_recv() {
                self.answered(answers, now)?;
            }
            let outcome = self.core.tick(now);
            self.trouble(outcome)?;
            self.publish(link, now)?;
            self.look(link, now);
            self.warn_of_foreign(now);
            let settled = (self.ending).is_settled(self.core.window().is_settled(), now);
            if settled && let Core::ExactlyOnce(core) = &mut self.core {
                core.mark_quiescent();
            }
            self.record(link, now, settled)?;
            self.confirm(now);
            self.pulse
                .tell(&self.core, self.progress, self.changes.len());
            self.report.tick(now, self.vitals);
            self.vitals.publisher.within(LOOP_LIMIT);
            if settled && (self.is_recorded() || self.ending.gives_the_record_up(now)) {
                return Ok(());
            }
            let changes = if !self.ending.has_read_all() && self.core.wants_batch() {
                &self.changes
            } else {
                &idle
            };
            let wake = self.wake(now);
            let stop = match self.ending.is_limited() {
                false => self.stop.channel(),
                true => &never_stops,
            };
            select! {
                recv(link.answers()) -> answers => match answers {
                    Ok(answers) => self.answered(answers, Instant::now())?,
                    Err(_) => return Err(self.lost(link.lost().try_recv().ok())),
                },
                recv(changes) -> batch => match batch {
                    Ok(batch) => {
                        self.pulse.arrived(&batch);
                        let outcome = self.core.offer(&Arc::new(batch));
                        self.trouble(outcome)?;
                    }
                    Err(_) => {
                        self.ending.read_all();
                        self.close(now);
                    }
                },
                recv(stop) -> _ => self.close(now),
                default(wake) => {}
            }
        }
    }

    /// The link is over; it reports why before its answers end.
    fn lost(&mut self, error: Option<nats::Error>) -> Interrupt {
        if let Some(store) = &mut self.store {
            store.on_disconnect();
        }
        if let (Some(nats::Error::Permission { reason }), Core::AtLeastOnce(_)) =
            (&error, &self.core)
            && reason.contains("$KV.")
        {
            log::warn!("going on without the checkpoint: {reason}");
            self.store = None;
        }
        let by = error.as_ref().map_or(EndedBy::Other, nats::Error::ended_by);
        let reason = match error {
            Some(error) => error.to_string(),
            None => "the connection to NATS ended".to_string(),
        };
        let outcome = self.core.on_end(by, &reason);
        if let Err(interrupt) = self.trouble(outcome) {
            return interrupt;
        }
        Interrupt::Reconnect(ReconnectCause::Connection, reason)
    }

    /// Writes the record if that is due.
    fn record(&mut self, link: &Link, now: Instant, settled: bool) -> Result<(), Interrupt> {
        let subject = match &self.store {
            _ if self.core.is_probing() => return Ok(()),
            Some(store) => store.subject(self.lineage.source.system_id),
            None => return Ok(()),
        };
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        let write = match &mut self.core {
            Core::ExactlyOnce(core) => {
                let urgent = settled || core.wants_record();
                if !store.may_write(now, urgent) {
                    return Ok(());
                }
                if urgent && store.holds(&core.cut()) {
                    core.on_recorded_again(now);
                    return Ok(());
                }
                store.write(|| core.cut_to_record(), now, urgent)
            }
            Core::AtLeastOnce(core) => store.write(
                || bare(core.stored_lsn(), self.config.flags()),
                now,
                settled,
            ),
        };
        if let Some(write) = write {
            let fits = kv::fits(link, &write);
            match (
                fits.map_err(|error| connect::no_checkpoint(store.bucket(), error)),
                &self.core,
            ) {
                (Ok(()), _) => kv::send(link, &subject, &write),
                (Err(error), Core::ExactlyOnce(_)) => return Err(Interrupt::End(error)),
                (Err(error), Core::AtLeastOnce(_)) => {
                    log::warn!("going on without the checkpoint: {error}");
                    self.store = None;
                }
            }
        }
        Ok(())
    }

    /// Tells the feedback thread what may be told to Postgres.
    fn confirm(&mut self, now: Instant) {
        let lsn = match (&self.core, &self.store) {
            (Core::AtLeastOnce(core), _) => core.stored_lsn(),
            (Core::ExactlyOnce(core), Some(store)) if core.may_confirm(now) => {
                store.matured_lsn(now)
            }
            _ => return,
        };
        // R23
        self.progress
            .confirmable(lsn.min(self.progress.received_lsn()));
    }

    /// The end is near: what was read is taken and settled.
    fn close(&mut self, now: Instant) {
        let drains = self.config.drain && !self.stop.is_stopping();
        self.ending.begin(drains, now);
    }

    /// The record holds how far everything is.
    fn is_recorded(&self) -> bool {
        self.store.as_ref().is_none_or(|store| match &self.core {
            Core::ExactlyOnce(core) => store.holds(&core.cut()),
            Core::AtLeastOnce(core) => store.holds(&bare(core.stored_lsn(), self.config.flags())),
        })
    }

    /// How long nothing needs to be done unless something comes.
    fn wake(&self, now: Instant) -> Duration {
        let mut wake = self.next_look;
        if let Some(deadline) = self.core.deadline() {
            wake = wake.min(deadline);
        }
        if let Some(deadline) = self.ending.deadline() {
            wake = wake.min(deadline);
        }
        if let Some(at) = self.core.read_again_at() {
            wake = wake.min(at);
        }
        let wait = wake.saturating_duration_since(now);
        let stored_lsn = self.core.stored_lsn();
        let store = self.store.as_ref();
        if store.is_some_and(|store| store.is_behind(stored_lsn, now)) {
            wait.min(HOLD_BACK_TICK)
        } else {
            wait
        }
    }

    /// Once a minute, what foreign messages do to ours.
    fn warn_of_foreign(&mut self, now: Instant) {
        let tally = self.core.tally();
        if tally.late > self.warned.late && self.said.is_new("late", now) {
            log::warn!(
                events = tally.late - self.warned.late;
                "published events after later ones, marked Outbox-Late: those had passed while the subject moved to another stream, while the event was refused, or behind a foreign message in a replicated stream"
            );
            self.warned.late = tally.late;
        }
        if tally.foreign > self.warned.foreign && self.said.is_new("foreign", now) {
            log::info!(
                messages = tally.foreign - self.warned.foreign;
                "others write to the streams of the events; what their messages hinder is published again after them"
            );
            self.warned.foreign = tally.foreign;
        }
    }

    /// Looks at the streams now and then while nothing is being published.
    fn look(&mut self, link: &Link, now: Instant) {
        if now < self.next_look || self.core.is_probing() {
            return;
        }
        self.next_look = now + LOOK_INTERVAL;
        if let Core::ExactlyOnce(core) = &mut self.core {
            for (token, look) in core.looks(now) {
                let (api, body) = match look {
                    Look::Stream(name) => streams::info_request(&name),
                    Look::Message(name, seq) => streams::message_request(&name, seq),
                };
                link.request(token, &api, &body);
            }
        }
    }
}

/// What at-least-once delivery records: everything up to here is acknowledged.
fn bare(stored_lsn: Lsn, flags: Flags) -> Cut {
    Cut {
        anchor: Anchor::bare(stored_lsn),
        stored_lsn,
        streams: Vec::new(),
        quiescent: false,
        lenient_upto: Lsn::INVALID,
        flags,
        is_empty: false,
    }
}
