//! The publisher thread: carries what the core decides to JetStream, and the answers back.
//!
//! It holds the connection to NATS, and makes a new one when the core or the connection itself says so;
//! the copy stream from Postgres stands still meanwhile and stays up. It calls nothing that can hang:
//! publishing takes what the socket takes, and asking and closing are done by threads of the link.

use super::checkpoint::kv;
use super::checkpoint::record::{Anchor, Cut};
use super::checkpoint::store::{Overtaken, Store};
use super::connect::{self, Connector, From};
use super::core::agreement::Look;
use super::core::trouble::{Cause, Refusal, Trouble};
use super::core::{Core, Next, Tally};
use super::error::{Error, Verdict};
use super::outage::{Outage, WORKING};
use super::progress::Progress;
use super::pulse::Pulse;
use super::repeated::Repeated;
use super::report::Report;
use super::stop::Stop;
use super::vitals::{Phase, ReconnectCause, Vitals};
use crate::config::Config;
use crate::jetstream::ack::{AckError, parse_ack};
use crate::jetstream::client::{Ack, Answer, Link, Reply};
use crate::jetstream::streams;
use crate::jetstream::wire::Publish;
use crate::nats::{self, EndedBy};
use crate::outbox::batch::{Batch, Fate};
use crate::outbox::lineage::Lineage;
use crate::outbox::park::{self, OnPoison};
use crate::postgres::Lsn;
use crossbeam_channel::{Receiver, never, select};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So long outstanding acks are waited for when the session ends before everything is settled.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// So long the last write of the record is tried; without it the next start reads back more. A cluster
/// that has just lost a node needs some seconds to find the bucket a leader.
const RECORD_LIMIT: Duration = Duration::from_secs(5);
/// While something is held back, the confirmable position is looked at this often.
const HOLD_BACK_TICK: Duration = Duration::from_secs(1);
/// An idle stream is looked at this often, to see that it did not go backwards.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Limits that were read again so shortly before are not read once more: many events in a row that are too large must not cost
/// a connection each.
const LIMITS_ARE_NEW: Duration = Duration::from_secs(1);
/// Events that are handed to the connection at once: the server has them while the next are being looked at.
const BURST: usize = 128;
/// The loop comes round more often than every `LOOK_INTERVAL`; what it does takes seconds at most.
const LOOP_LIMIT: Duration = Duration::from_secs(60);
/// One attempt to connect: several servers, and dozens of requests, with a deadline each.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);

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
    closing: Closing,
    /// The reader has ended, and all it has read was taken.
    drained: bool,
    /// Waits until what was published before it is answered.
    postponed: Option<Interrupt>,
    next_look: Instant,
    /// The PING that was sent last over this connection.
    pinged: u64,
    /// When the limits of server and streams were read again: at the last reconnect.
    limits_read: Option<Instant>,
    /// No stream captures this subject, which an event has.
    unrouted: Option<String>,
    /// At the end the record is waited for until then.
    record_until: Option<Instant>,
    /// Of the tally, what was warned of.
    warned: Tally,
    vitals: &'a Vitals,
    pulse: Pulse<'a>,
}

/// Whether more changes come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// They may.
    No,
    /// They do not; what is in the window has until then, and this connection.
    By(Instant),
    /// They do not; the window is settled however long it takes (`-drain`), unless the relay is to stop.
    WhenSettled,
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
            closing: Closing::No,
            drained: false,
            postponed: None,
            next_look: now + LOOK_INTERVAL,
            pinged: 0,
            limits_read: None,
            unrouted: None,
            record_until: None,
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
        let settled = self.core.window().is_empty();
        if !settled {
            log::warn!("not everything was acknowledged in time; it comes again at the next start");
        } else if result.is_ok() && !self.is_recorded() {
            log::warn!(
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
            let settled = self.is_settled(now);
            if settled && let Core::ExactlyOnce(core) = &mut self.core {
                core.mark_quiescent();
            }
            self.record(link, now, settled);
            self.confirm(now);
            self.pulse
                .tell(&self.core, self.progress, self.changes.len());
            self.report.tick(now, self.vitals);
            self.vitals.publisher.within(LOOP_LIMIT);
            if settled && self.has_recorded(now) {
                return Ok(());
            }
            let changes = if !self.drained && self.core.wants_batch() {
                &self.changes
            } else {
                &idle
            };
            let wake = self.wake(now);
            let stop = match self.closing {
                Closing::No | Closing::WhenSettled => self.stop.channel(),
                Closing::By(_) => &never_stops,
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
                        self.drained = true;
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
    fn record(&mut self, link: &Link, now: Instant, settled: bool) {
        let subject = match &self.store {
            _ if self.core.is_probing() => return,
            Some(store) => store.subject(self.lineage.source.system_id),
            None => return,
        };
        let Some(store) = &mut self.store else {
            return;
        };
        let write = match &mut self.core {
            Core::ExactlyOnce(core) => {
                let urgent = settled || core.wants_record();
                if !store.may_write(now, urgent) {
                    return;
                }
                if urgent && store.holds(&core.cut()) {
                    core.on_recorded_again(now);
                    return;
                }
                store.write(|| core.cut_to_record(), now, urgent)
            }
            Core::AtLeastOnce(core) => store.write(|| bare(core.stored_lsn()), now, settled),
        };
        if let Some(write) = write {
            kv::send(link, &subject, &write);
        }
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
        self.closing = match self.config.drain && !self.stop.is_stopping() {
            true => Closing::WhenSettled,
            false => Closing::By(now + SETTLE_LIMIT),
        };
    }

    /// Everything that is to be published is, or has had its time.
    fn is_settled(&self, now: Instant) -> bool {
        match self.closing {
            Closing::No => false,
            Closing::WhenSettled => self.core.window().is_empty(),
            Closing::By(deadline) => {
                self.drained && self.core.window().is_empty() || now >= deadline
            }
        }
    }

    /// The record holds how far everything is.
    fn is_recorded(&self) -> bool {
        self.store.as_ref().is_none_or(|store| match &self.core {
            Core::ExactlyOnce(core) => store.holds(&core.cut()),
            Core::AtLeastOnce(core) => store.holds(&bare(core.stored_lsn())),
        })
    }

    /// The same, or it has had its time.
    fn has_recorded(&mut self, now: Instant) -> bool {
        let until = *self.record_until.get_or_insert(now + RECORD_LIMIT);
        now >= until || self.is_recorded()
    }

    /// How long nothing needs to be done unless something comes.
    fn wake(&self, now: Instant) -> Duration {
        let mut wake = self.next_look;
        if let Some(deadline) = self.core.deadline() {
            wake = wake.min(deadline);
        }
        if let Closing::By(deadline) = self.closing {
            wake = wake.min(deadline);
        }
        if let Some(until) = self.record_until {
            wake = wake.min(until);
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

    /// Takes what has come over the link.
    fn answered(&mut self, answers: Vec<Answer>, now: Instant) -> Result<(), Interrupt> {
        for answer in answers {
            match answer {
                Answer::Ack(ack) => self.acked(ack, now)?,
                Answer::Reply(reply) => self.replied(reply, now)?,
                // the core looks at its limits before each event
                Answer::Info => {}
                Answer::Pong(number) if number >= self.pinged => self.core.on_pong(),
                Answer::Pong(_) => {}
            }
        }
        Ok(())
    }

    /// Hands the core what JetStream said to a publish.
    fn acked(&mut self, Ack { reply, result }: Ack, now: Instant) -> Result<(), Interrupt> {
        match self.core.answer(reply, result, now) {
            Ok(Some(token)) => {
                self.pulse.acked(token, now);
                self.outage.worked();
                Ok(())
            }
            outcome => self.trouble(outcome.map(|_| ())),
        }
    }

    fn replied(&mut self, Reply { token, result }: Reply, now: Instant) -> Result<(), Interrupt> {
        let result = match result.map_err(AckError::from) {
            // the checkpoint keeps its own time, and a stream is looked at again
            Err(AckError::NoAnswer) => return Ok(()),
            result => result,
        };
        match kv::answers_to(token) {
            Some(number) => self.written(number, result, now),
            None => self.looked_at(token, result),
        }
    }

    /// The answer to a write of the record.
    fn written(
        &mut self,
        number: u64,
        answer: Result<Vec<u8>, AckError>,
        now: Instant,
    ) -> Result<(), Interrupt> {
        let Some(store) = &mut self.store else {
            return Ok(());
        };
        let answer = answer.and_then(|body| parse_ack(&body, None));
        if answer == Err(AckError::NoResponders) {
            // a new connection creates the bucket again
            let reason = "the checkpoint's bucket is gone, or has no leader".to_string();
            return Err(Interrupt::Reconnect(ReconnectCause::NoStream, reason));
        }
        match store.on_written(number, answer, now) {
            Ok(true) => {
                let held = store.held().map_or(Lsn::INVALID, |it| it.young.stored_lsn);
                self.vitals.checkpointed_lsn.raise(held.0);
                if let Core::ExactlyOnce(core) = &mut self.core {
                    core.on_recorded(now);
                }
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(Overtaken) => Err(Interrupt::Reconnect(
                ReconnectCause::Overtaken,
                "the checkpoint of this slot was written meanwhile: by another relay, or by a write of ours that had no answer in time"
                    .to_string(),
            )),
        }
    }

    /// The answer to a [look](Self::look) at a stream.
    fn looked_at(
        &mut self,
        token: u64,
        answer: Result<Vec<u8>, AckError>,
    ) -> Result<(), Interrupt> {
        let Core::ExactlyOnce(core) = &mut self.core else {
            return Ok(());
        };
        let Ok(body) = answer else {
            return Ok(());
        };
        let outcome = if token.is_multiple_of(2) {
            let Ok(info) = streams::parse_info(&body) else {
                return Ok(());
            };
            let (created, last_seq) =
                info.map_or_else(Default::default, |info| (info.created, info.state.last_seq));
            core.on_look(token, &created, last_seq)
        } else {
            let Ok(found) = connect::message(&body) else {
                return Ok(());
            };
            core.on_witness(token, found.as_ref())
        };
        self.trouble(outcome)
    }

    /// Publishes all that may go now, as one burst.
    ///
    /// An event that cannot be published interrupts once everything before it is answered: the connection
    /// is dropped with what has not left yet, so each attempt would lose the same events again.
    fn publish(&mut self, link: &Link, now: Instant) -> Result<(), Interrupt> {
        if self.postponed.is_none() && link.server_info().ldm {
            self.postponed = Some(Interrupt::Reconnect(
                ReconnectCause::LameDuck,
                format!(
                    "{} is in lame duck mode: it is about to shut down",
                    link.server()
                ),
            ));
        }
        if self.postponed.is_none() {
            self.publish_burst(link, now)?;
        }
        match self.postponed.take() {
            Some(interrupt) if self.core.window().waiting() == 0 => Err(interrupt),
            postponed => {
                self.postponed = postponed;
                Ok(())
            }
        }
    }

    fn publish_burst(&mut self, link: &Link, now: Instant) -> Result<(), Interrupt> {
        self.core.set_max_payload(link.max_payload());
        let mut burst = Vec::new();
        let outcome = loop {
            if burst.len() == BURST {
                self.hand_over(link, std::mem::take(&mut burst), now);
            }
            match self.core.next(now) {
                Ok(Next::Publish(publish)) => {
                    if publish.event.fate() == Fate::Park {
                        let event = publish.event.view();
                        log::warn!(
                            id = event.id, table = event.table, position:% = event.position, cause = park::cause(event.headers);
                            "parked an event that cannot be published"
                        );
                    }
                    burst.push(publish);
                }
                Ok(Next::TooLarge { token, too_large }) => {
                    let (size, limit) = (too_large.size, too_large.limit);
                    let cause = format!("{size} bytes are more than the {limit} that NATS accepts");
                    let is_new = |at| now.duration_since(at) < LIMITS_ARE_NEW;
                    if !self.limits_read.is_some_and(is_new) {
                        // they may have been raised since
                        let reason = format!(
                            "reading {} again: {} is too large, {cause}",
                            too_large.setting,
                            self.describe(token)
                        );
                        self.postponed = Some(Interrupt::Reconnect(ReconnectCause::Limits, reason));
                        break Ok(());
                    }
                    let room = self.core.room(&self.config.mapping.policy.park_subject);
                    if !self.put_aside(token, &cause, room) {
                        let event = self.describe(token);
                        self.postponed = Some(Interrupt::End(Error::TooLarge { event, too_large }));
                        break Ok(());
                    }
                }
                Ok(Next::Read { stream, from, to }) => {
                    let outcome = self.read(link, &stream, from, to);
                    if outcome.is_err() {
                        break outcome;
                    }
                }
                Ok(Next::Ping) => {
                    self.hand_over(link, std::mem::take(&mut burst), now);
                    self.pinged = link.ping();
                }
                Ok(Next::Nothing) => break Ok(()),
                Err(trouble) => {
                    self.postponed = self.trouble(Err(trouble)).err();
                    break Ok(());
                }
            }
        };
        self.hand_over(link, burst, now);
        outcome
    }

    fn hand_over(&mut self, link: &Link, burst: Vec<Publish>, now: Instant) {
        if !burst.is_empty() {
            self.pulse.published(&burst, now);
            link.publish(burst, &self.source);
        }
    }

    /// Does with an event that is not on its way, and never can be, what the operator wants done with it; `false`:
    /// the relay is to halt. `room`: what the park subject takes.
    fn put_aside(&mut self, token: u64, cause: &str, room: usize) -> bool {
        let policy = &self.config.mapping.policy;
        let Some(event) = self.core.event(token) else {
            return false;
        };
        // cut to what is taken already, and still not taken
        let is_cut = event.headers.contains(park::BODY_CUT)
            && event.id.len() + event.headers.len() + event.body.len() <= room;
        match (event.fate, policy.on_poison) {
            (Fate::Park, _) if is_cut => false,
            (Fate::Park, _) | (_, OnPoison::Park) => {
                let subject = &policy.park_subject;
                let parked = park::parked(&event, subject, cause, room);
                self.core.replace(token, parked);
                true
            }
            (_, OnPoison::Skip) => {
                log::warn!(
                    id = event.id, table = event.table, position:% = event.position, cause;
                    "gave up an event that cannot be published"
                );
                self.core.give_up(token);
                true
            }
            (_, OnPoison::Stop) => false,
        }
    }

    fn describe(&self, token: u64) -> String {
        let event = self.core.event(token);
        event.map_or_else(
            || "an event".to_string(),
            |event| format!("row {} of {} at {}", event.id, event.table, event.position),
        )
    }

    /// Reads what the core wants to know of a stream before it goes on.
    fn read(&mut self, link: &Link, stream: &str, from: u64, to: u64) -> Result<(), Interrupt> {
        let timeout = self.config.nats.request_timeout;
        self.pulse.nothing_waits();
        // a write of the record may wait
        let mut meanwhile = Vec::new();
        let found = connect::read_gap(link, stream, from..=to, timeout, |answer| {
            meanwhile.push(answer)
        })
        .map_err(|error| Interrupt::Reconnect(ReconnectCause::Connection, error.to_string()))?;
        if let Core::ExactlyOnce(core) = &mut self.core {
            let outcome = core.on_read(found, Instant::now());
            let mut dropped = None;
            self.trouble(outcome.map(|found| dropped = found))?;
            if let Some((id, earlier)) = dropped {
                let at = earlier
                    .position
                    .map(|at| at.to_string())
                    .unwrap_or_default();
                log::warn!(
                    id, stream, seq = from, earlier = at;
                    "dropped an event: an earlier one has used its id"
                );
            }
        }
        // the stream answers, and the window moves on
        self.outage.worked();
        self.answered(meanwhile, Instant::now())
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

    fn trouble(&mut self, outcome: Result<(), Trouble>) -> Result<(), Interrupt> {
        Err(match outcome {
            Ok(()) => return Ok(()),
            Err(Trouble::Reconnect(cause)) => {
                let kind = match cause {
                    Cause::OtherAnswer { .. } | Cause::Elsewhere { .. } => {
                        ReconnectCause::UnexpectedAck
                    }
                    Cause::Refused(_) => ReconnectCause::Refused,
                    Cause::AckTimeout => ReconnectCause::AckTimeout,
                    Cause::NoStream(ref subject) => {
                        self.unrouted = Some(subject.clone());
                        ReconnectCause::NoStream
                    }
                    Cause::Disagrees(_) => ReconnectCause::Regressed,
                };
                Interrupt::Reconnect(kind, cause.to_string())
            }
            Err(Trouble::Refused { token, why }) => Interrupt::Refused { token, why },
            Err(Trouble::Halt(halt)) => Interrupt::End(Error::Halt(halt)),
            Err(Trouble::OutOfOrder(position)) => Interrupt::End(Error::OutOfOrder(position)),
        })
    }

    /// Connects and reads the streams back until that works. `None`: the session is to end.
    fn reconnect(&mut self, reason: &str) -> Result<Option<Link>, Error> {
        let mut reason = reason.to_string();
        let mut tries = 0;
        loop {
            let now = Instant::now();
            let Some(pause) = self.outage.failed(now) else {
                return Err(Error::GaveUp(reason));
            };
            if self.said.is_new(&reason, now) {
                log::warn!(reason = reason.as_str(); "connecting to NATS again; Postgres keeps what is not stored");
            }
            self.vitals.hindered(Some(reason.clone()));
            self.vitals.publisher.within(CONNECT_LIMIT);
            self.stop.wait(pause);
            if self.stop.is_stopping() {
                self.close(Instant::now());
            }
            if matches!(self.closing, Closing::By(_)) {
                // what is not acknowledged comes again; nobody is to wait for a server that is away
                return Ok(None);
            }
            match self.rejoin(tries) {
                Ok(link) => {
                    self.vitals.enter(Phase::Relaying, None);
                    self.vitals
                        .set_nats(link.server(), &link.server_info().version);
                    log::info!(server = link.server(); "connected to NATS again");
                    return Ok(Some(link));
                }
                Err(error)
                    if error.verdict() == Verdict::Retry
                        && !matches!(error, Error::Regressed(_) | Error::Overtaken) =>
                {
                    reason = error.to_string();
                }
                Err(error) => return Err(error),
            }
            tries += 1;
        }
    }

    fn rejoin(&mut self, tries: usize) -> Result<Link, Error> {
        let connector = Connector {
            config: self.config,
            lineage: self.lineage,
            stop: self.stop,
            accept_loss: false,
        };
        let found = connector.find(tries, &mut self.said)?;
        if let Some(subject) = self.unrouted.take() {
            connector.check_home(&found.link, &subject)?;
        }
        let (core, store) = match (&mut self.core, &mut self.store) {
            (Core::AtLeastOnce(core), store) => {
                if let Some(it) = store
                    && !matches!(connector.read_key(&found, it), Ok(Ok(())))
                {
                    *store = None;
                }
                core.resume(connector.capacity(&found));
                self.limits_read = Some(Instant::now());
                return Ok(found.link);
            }
            (Core::ExactlyOnce(core), Some(store)) => (core, store),
            (Core::ExactlyOnce(_), None) => {
                return Err(Error::Internal(
                    "exactly-once delivery without a checkpoint",
                ));
            }
        };
        if let Err(Overtaken) = connector.read_key(&found, store)? {
            // a new session finds out who has the slot, and resumes with what the other has recorded
            return Err(Error::Overtaken);
        }
        let cut = core.on_disconnect();
        let resumed = connector.resume(found, store, From::Core(cut));
        let (link, connection) = resumed.map_err(|error| match error {
            // the slot still has what is lost: a new session begins with an older cut
            Error::Lost(lost) => Error::Regressed(lost),
            error => error,
        })?;
        if let Some(lost) = connection.resumed.disagreed.first() {
            return Err(Error::Regressed(lost.clone()));
        }
        core.resume(connection, Instant::now());
        self.limits_read = Some(Instant::now());
        connector.claim(&link, core, store, false, Lsn::INVALID)?;
        Ok(link)
    }
}

/// What at-least-once delivery records: everything up to here is acknowledged.
fn bare(stored_lsn: Lsn) -> Cut {
    Cut {
        anchor: Anchor::bare(stored_lsn),
        stored_lsn,
        streams: Vec::new(),
        quiescent: false,
        lenient: false,
    }
}
